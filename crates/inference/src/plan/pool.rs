//! Memory of values that are done with, for those that come next in the same run.
//!
//! Responsible for: giving our own operators a tensor to write to ([`output`]) that another value of the run had, of the
//! same size. New memory of some megabytes costs as much as a convolution: the C library maps it, the kernel clears each page
//! when it is first touched, and gives it back with the value. Whole networks repeat sizes, and slices of a batch repeat all.
//!
//! Invariants:
//! - what is kept is known by its count of owners: a tensor is given out again only when nobody else has it;
//! - a run keeps idle memory only as far as its demand leaves room below its limit, and nothing of it when it ends.

use std::cell::RefCell;
use std::sync::Once;
use tract_onnx::tract_hir::internal::*;

/// Smaller values are the C library's.
const LEAST: usize = 64 << 10;
/// Most bytes that are kept idle.
const MOST: u64 = 64 << 20;

struct Pool {
    /// What was made last comes last.
    kept: Vec<Arc<Tensor>>,
    room: u64,
}

thread_local! {
    static POOL: RefCell<Option<Pool>> = const { RefCell::new(None) };
}

fn bytes(tensor: &Tensor) -> u64 {
    (tensor.len() * tensor.datum_type().size_of()) as u64
}

/// Values up to this size come from the heap, of which twice as much may lie idle until the extension trims it.
const HEAP: usize = 16 << 20;

/// Lets the C library serve values from its heap: at first it maps each larger than 128 kB, and gives the end of the heap
/// back whenever twice that is free, so that a run would touch new pages for every value. It learns from the largest that
/// is freed (mallopt(3), M_MMAP_THRESHOLD); this one is never touched.
fn prepare_heap() {
    static DONE: Once = Once::new();
    DONE.call_once(|| drop(std::hint::black_box(Vec::<u8>::with_capacity(HEAP))));
}

/// Calls `run` with a pool that holds at most `room` bytes of idle memory.
pub(super) fn with_pool<T>(room: u64, run: impl FnOnce() -> T) -> T {
    struct Before(Option<Pool>);
    impl Drop for Before {
        fn drop(&mut self) {
            let before = self.0.take();
            POOL.with_borrow_mut(|pool| *pool = before);
        }
    }
    prepare_heap();
    let pool = Pool { kept: vec![], room: room.min(MOST) };
    let _before = Before(POOL.with_borrow_mut(|place| place.replace(pool)));
    run()
}

/// A tensor of float32 of this shape and any content, that its only owner may write to.
pub(super) fn output(shape: &[usize]) -> TractResult<Tensor> {
    let len: usize = shape.iter().product();
    let found = POOL.with_borrow_mut(|pool| {
        let kept = &mut pool.as_mut()?.kept;
        // The latest is the one that is still in the cache.
        let fits = |tensor: &Arc<Tensor>| Arc::strong_count(tensor) == 1 && tensor.len() == len;
        let place = kept.iter().rposition(fits)?;
        Arc::try_unwrap(kept.remove(place)).ok()
    });
    match found {
        Some(mut tensor) => {
            tensor.set_shape(shape)?;
            Ok(tensor)
        }
        None => Tensor::zero::<f32>(shape),
    }
}

/// Keeps a value that a node has made, for when all its users are done with it. They must not want to write to it: they
/// would have to copy it.
pub(super) fn keep(value: &TValue) {
    if value.datum_type() != f32::datum_type() || bytes(value) < LEAST as u64 {
        return;
    }
    POOL.with_borrow_mut(|pool| {
        let Some(pool) = pool else { return };
        if bytes(value) > pool.room {
            return;
        }
        let mut idle = bytes(value);
        for tensor in &pool.kept {
            idle += if Arc::strong_count(tensor) == 1 { bytes(tensor) } else { 0 };
        }
        // The oldest goes first.
        while idle > pool.room {
            let Some(place) = pool.kept.iter().position(|tensor| Arc::strong_count(tensor) == 1) else { break };
            idle -= bytes(&pool.kept.remove(place));
        }
        pool.kept.push(value.clone().into_arc_tensor());
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_given_out_again_when_nobody_has_it() {
        with_pool(1 << 20, || {
            let first = output(&[4, 32 << 10]).unwrap().into_tvalue();
            let address = first.as_bytes().as_ptr();
            keep(&first);
            let second = output(&[4, 32 << 10]).unwrap();
            assert_ne!(second.as_bytes().as_ptr(), address, "the first one is still in use");
            drop(first);
            assert_eq!(output(&[8, 8, 2048]).unwrap().as_bytes().as_ptr(), address);
            assert_ne!(output(&[16 << 10]).unwrap().len(), 128 << 10);
        });
    }

    #[test]
    fn no_more_is_kept_idle_than_there_is_room_for() {
        with_pool(1 << 20, || {
            for _ in 0..5 {
                let values: Vec<TValue> = (0..4).map(|_| output(&[100 << 10]).unwrap().into_tvalue()).collect();
                values.iter().for_each(keep);
            }
            let idle = POOL.with_borrow(|pool| pool.as_ref().unwrap().kept.len());
            // Those in use are not counted before they are done with; the next value makes room.
            assert!(idle <= 4, "{idle}");
        });
        POOL.with_borrow(|pool| assert!(pool.is_none()));
    }
}
