//! References to blocks: the stand-ins in every tuple that is physically in a table's pages, whoever can see it.

use crate::pg::buffer::Pinned;
use crate::pg::relation;
use crate::pg::tuple::attribute;
use crate::pg::varlena::StandIn;
use pgrx::pg_sys;

/// A stand-in, and where it was found.
pub struct Reference {
    /// The reference.
    pub stand_in: StandIn,
    /// Page and line pointer of the tuple.
    pub page: u32,
    pub offset: u16,
    /// Column, from 0.
    pub column: usize,
}

impl std::fmt::Display for Reference {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "The row is at ({},{}), column {}.", self.page, self.offset, self.column + 1)
    }
}

/// Calls `f` with each stand-in of the open table `rel`, also of dead tuples and of dropped columns, and `pause` between
/// pages. Visibility does not count here, so that a page that is all-visible is read as well.
pub fn for_each_reference(rel: pg_sys::Relation, pause: impl Fn(), mut f: impl FnMut(Reference)) {
    let mut found: Vec<Reference> = Vec::new();
    // SAFETY: open relation; the ring lives in the current memory context and is freed here.
    unsafe {
        let ring = pg_sys::GetAccessStrategy(pg_sys::BufferAccessStrategyType::BAS_BULKREAD);
        for number in 0..relation::pages(rel) {
            pause();
            read_page(rel, number, ring, &mut found);
            found.drain(..).for_each(&mut f);
        }
        pg_sys::FreeAccessStrategy(ring);
    }
}

unsafe fn read_page(rel: pg_sys::Relation, number: u32, ring: pg_sys::BufferAccessStrategy, out: &mut Vec<Reference>) {
    // SAFETY: tuples are read under the page's share lock; the descriptor is the table's own.
    unsafe {
        let pin = Pinned::read_with(rel, number, ring);
        let locked = pin.share();
        let page = locked.bytes().as_ptr() as pg_sys::Page;
        if crate::pg::buffer::is_new(locked.bytes()) {
            return;
        }
        let desc = (*rel).rd_att;
        let natts = (*desc).natts as usize;
        let mut values = vec![pg_sys::Datum::from(0); natts];
        let mut nulls = vec![true; natts];
        for offset in 1..=pg_sys::PageGetMaxOffsetNumber(page) {
            let item = pg_sys::PageGetItemId(page, offset);
            if (*item).lp_flags() != pg_sys::LP_NORMAL {
                continue;
            }
            let mut tuple = pg_sys::HeapTupleData {
                t_len: (*item).lp_len(),
                t_data: pg_sys::PageGetItem(page, item).cast(),
                ..Default::default()
            };
            pg_sys::heap_deform_tuple(&mut tuple, desc, values.as_mut_ptr(), nulls.as_mut_ptr());
            for column in 0..natts {
                if nulls[column] || (*attribute(desc, column)).attlen != -1 {
                    continue;
                }
                if let Some(stand_in) = StandIn::read(values[column].cast_mut_ptr()) {
                    out.push(Reference { stand_in, page: number, offset, column });
                }
            }
        }
    }
}
