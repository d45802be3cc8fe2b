//! Weights that lie in blocks, outside of plans.
//!
//! Responsible for: the words between block operators, which compute on blocks, and whoever has the blocks. A run has one
//! [`BlockSource`]; operators reach it by [`for_each_block`], because tract hands an operator nothing of ours.
//!
//! Invariants:
//! - an operator holds few frames at a time ([`WINDOW`]), works with as few as one, and holds none while it asks for
//!   more; a source may get the next ones ready meanwhile. So a cache of two frames is enough for a run;
//! - between two blocks the run's cancel flag is looked at;
//! - frames are released by dropping them, on whatever thread and whether unwinding or not.

use crate::error::ModelError;
use crate::worker::cancelled;
use std::cell::RefCell;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use tensor_blocks::{DType, Tiling};

/// Most blocks that an operator asks for at a time: 2 MB of the usual size.
pub const WINDOW: usize = 32;

/// One block, in place and pinned; dropping it releases it.
pub trait Frame: Send {
    /// The block's elements as they are stored: row-major, little-endian. At least 64-byte aligned.
    fn bytes(&self) -> &[u8];
}

/// Who has the blocks of a model's stored tensors.
pub trait BlockSource: Send + Sync {
    /// Pins blocks of the stored tensor `tensor` (its ordinal in the graph). `wanted` are block numbers in the order in
    /// which they will be used: number `block_row * block_cols + block_col` of the tensor's tiling.
    ///
    /// Gives frames for the leading blocks of `wanted`: as many as can be had at a time, at least one, at most [`WINDOW`].
    /// The others tell what will be wanted next.
    ///
    /// # Errors
    /// `Cancelled`, and what reading a block from where it is stored may raise.
    fn pin(&self, tensor: u32, wanted: &[u32]) -> Result<Vec<Box<dyn Frame>>, ModelError>;

    /// Bytes of a value above which it goes to a temporary file, where the operators allow it.
    fn operator_memory(&self) -> u64 {
        u64::MAX
    }

    /// A new, empty temporary file; none where there are no files.
    ///
    /// # Errors
    /// What making it may raise.
    fn spill_file(&self) -> Result<Option<Box<dyn SpillFile>>, ModelError> {
        Ok(None)
    }
}

/// A temporary file, gone when it is dropped.
pub trait SpillFile: Send {
    /// Writes behind what was written before.
    ///
    /// # Errors
    /// What writing may raise.
    fn append(&mut self, bytes: Vec<u8>) -> Result<(), ModelError>;

    /// Reads `len` bytes from byte `offset`.
    ///
    /// # Errors
    /// What reading may raise; `Internal` if there are not so many.
    fn read(&mut self, offset: u64, len: usize) -> Result<Vec<u8>, ModelError>;
}

/// A tensor that a plan does not hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredTensor {
    /// Its ordinal in the graph.
    pub ordinal: u32,
    /// Dimensions, outermost first.
    pub dims: Vec<usize>,
    /// How it is cut into blocks, and its element type.
    pub tiling: Tiling,
}

impl StoredTensor {
    /// Element type.
    pub fn dtype(&self) -> DType {
        self.tiling.dtype()
    }
}

/// A run's source of blocks, and its cancel flag.
type Run = (Arc<dyn BlockSource>, Arc<AtomicBool>);

thread_local! {
    static RUN: RefCell<Option<Run>> = const { RefCell::new(None) };
}

/// Calls `run` with `source` as this thread's source of blocks; `cancel` ends it between two blocks.
pub fn with_source<T>(source: Arc<dyn BlockSource>, cancel: Arc<AtomicBool>, run: impl FnOnce() -> T) -> T {
    struct Before(Option<Run>);
    impl Drop for Before {
        fn drop(&mut self) {
            let before = self.0.take();
            RUN.with_borrow_mut(|run| *run = before);
        }
    }
    let _before = Before(RUN.with_borrow_mut(|run| run.replace((source, cancel))));
    run()
}

/// The source of blocks of this thread's run, if there is one.
pub(crate) fn source() -> Option<Arc<dyn BlockSource>> {
    RUN.with_borrow(|run| run.as_ref().map(|(source, _)| source.clone()))
}

/// # Errors
/// `Cancelled` if this thread's run is to end.
pub(crate) fn check_cancelled() -> Result<(), ModelError> {
    let cancel = RUN.with_borrow(|run| run.as_ref().is_some_and(|(_, cancel)| cancel.load(Ordering::Relaxed)));
    if cancel { Err(cancelled()) } else { Ok(()) }
}

/// Calls `each` with the place in `wanted` and the bytes of every wanted block, in order.
///
/// # Errors
/// What the source or `each` return, `Cancelled`; `Internal` without a source.
pub fn for_each_block(
    tensor: &StoredTensor,
    wanted: &[u32],
    mut each: impl FnMut(usize, &[u8]) -> Result<(), ModelError>,
) -> Result<(), ModelError> {
    let (source, cancel) = RUN
        .with_borrow(Clone::clone)
        .ok_or_else(|| ModelError::internal("a block operator runs without a source of blocks"))?;
    let mut done = 0;
    while done < wanted.len() {
        let ask = &wanted[done..];
        let frames = source.pin(tensor.ordinal, ask)?;
        if frames.is_empty() || frames.len() > ask.len().min(WINDOW) {
            return Err(ModelError::internal("the source of blocks gave another number of frames"));
        }
        for frame in frames {
            if cancel.load(Ordering::Relaxed) {
                return Err(cancelled());
            }
            each(done, frame.bytes())?;
            done += 1;
        }
    }
    Ok(())
}

/// Blocks in private memory: for tests, benchmarks, and runs outside of a server.
pub struct PrivateBlocks {
    tensors: Vec<Option<Vec<Arc<AlignedBytes>>>>,
}

/// Bytes that begin at a multiple of 64.
#[derive(Clone, Debug, Default)]
pub struct AlignedBytes {
    lines: Vec<Line>,
    len: usize,
}

#[derive(Clone, Copy, Debug, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C, align(64))]
struct Line([u8; 64]);

impl AlignedBytes {
    /// `len` zeros.
    pub fn zeroed(len: usize) -> AlignedBytes {
        AlignedBytes { lines: vec![Line([0; 64]); len.div_ceil(64)], len }
    }

    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        &bytemuck::cast_slice(&self.lines)[..self.len]
    }

    /// The bytes, to be written.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        &mut bytemuck::cast_slice_mut(&mut self.lines)[..self.len]
    }
}

impl Frame for AlignedBytes {
    fn bytes(&self) -> &[u8] {
        self.bytes()
    }
}

struct Shared(Arc<AlignedBytes>);

impl Frame for Shared {
    fn bytes(&self) -> &[u8] {
        self.0.bytes()
    }
}

impl PrivateBlocks {
    /// No tensors.
    pub fn new() -> PrivateBlocks {
        PrivateBlocks { tensors: Vec::new() }
    }

    /// Cuts a tensor's row-major bytes into blocks.
    ///
    /// # Errors
    /// `Internal` if the bytes are not those of such a tensor.
    pub fn add(&mut self, tensor: &StoredTensor, bytes: &[u8]) -> Result<(), ModelError> {
        let mut blocks = Vec::new();
        let mut buffer = Vec::new();
        for tile in tensor.tiling.tiles() {
            tensor.tiling.gather(tile, bytes, &mut buffer).map_err(|error| ModelError::internal(error.to_string()))?;
            let mut block = AlignedBytes::zeroed(buffer.len());
            block.bytes_mut().copy_from_slice(&buffer);
            blocks.push(Arc::new(block));
        }
        let place = tensor.ordinal as usize;
        if self.tensors.len() <= place {
            self.tensors.resize_with(place + 1, || None);
        }
        self.tensors[place] = Some(blocks);
        Ok(())
    }
}

impl Default for PrivateBlocks {
    fn default() -> PrivateBlocks {
        PrivateBlocks::new()
    }
}

impl BlockSource for PrivateBlocks {
    fn pin(&self, tensor: u32, wanted: &[u32]) -> Result<Vec<Box<dyn Frame>>, ModelError> {
        let missing = || ModelError::internal(format!("tensor {tensor} has no such block"));
        let blocks = self.tensors.get(tensor as usize).and_then(Option::as_ref).ok_or_else(missing)?;
        wanted
            .iter()
            .take(WINDOW)
            .map(|&block| {
                let block = blocks.get(block as usize).ok_or_else(missing)?;
                Ok(Box::new(Shared(block.clone())) as Box<dyn Frame>)
            })
            .collect()
    }
}
