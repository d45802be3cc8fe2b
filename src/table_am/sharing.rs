//! Which tensors use which blocks, as the rows of a table tell: what repacking goes by.

use crate::pg::tuple::attribute;
use crate::pg::{interrupt, varlena};
use pgrx::pg_sys;
use std::collections::HashMap;
use std::ffi::CStr;

/// The column (from 0) that tells a row's tensor where nobody says: the first one of the primary key, else of the table.
pub fn default_tensor_column(table: pg_sys::Relation) -> Option<usize> {
    // SAFETY: open relation; the index is opened for a look at its key.
    unsafe {
        #[cfg(not(feature = "pg18"))]
        let index = pg_sys::RelationGetPrimaryKeyIndex(table);
        #[cfg(feature = "pg18")]
        let index = pg_sys::RelationGetPrimaryKeyIndex(table, true);
        if index != pg_sys::InvalidOid {
            let index = crate::pg::relation::OpenRelation::index(index, pg_sys::AccessShareLock);
            let key = &(*(*index.raw()).rd_index).indkey;
            let column = *key.values.as_ptr();
            return Some(column as usize - 1);
        }
        let desc = (*table).rd_att;
        (0..(*desc).natts as usize).find(|&column| !(*attribute(desc, column)).attisdropped)
    }
}

/// The column (from 0) of that name.
pub fn column_named(table: pg_sys::Relation, name: &CStr) -> Option<usize> {
    // SAFETY: open relation.
    unsafe {
        let desc = (*table).rd_att;
        (0..(*desc).natts as usize).find(|&column| {
            let att = attribute(desc, column);
            !(*att).attisdropped && CStr::from_ptr((*att).attname.data.as_ptr()) == name
        })
    }
}

/// Numbers for the values of a column: equal values of equal form get the same.
#[derive(Default)]
pub struct Tensors(HashMap<Option<Vec<u8>>, u32>);

impl Tensors {
    /// The number of a value; `None` for NULL.
    ///
    /// # Safety
    /// `value` is a value of the column `att`.
    pub unsafe fn number(&mut self, value: Option<pg_sys::Datum>, att: *const pg_sys::FormData_pg_attribute) -> u32 {
        let next = self.0.len() as u32;
        // SAFETY: by the contract. A value that lies in a store is known by its reference.
        let key = value.map(|datum| unsafe {
            if (*att).attbyval {
                (datum.value() as u64).to_ne_bytes().to_vec()
            } else {
                let start = datum.cast_mut_ptr::<u8>();
                let len = match (*att).attlen {
                    -1 => varlena::size_in_row(start.cast()),
                    -2 => CStr::from_ptr(start.cast()).count_bytes(),
                    fixed => fixed as usize,
                };
                std::slice::from_raw_parts(start, len).to_vec()
            }
        });
        *self.0.entry(key).or_insert(next)
    }
}

/// Calls `f(block id, tensor)` for each reference from a visible row to the store.
pub fn for_each_use(
    table: pg_sys::Relation,
    store: pg_sys::Oid,
    tensor_column: Option<usize>,
    mut f: impl FnMut(u32, u32),
) {
    let mut tensors = Tensors::default();
    // SAFETY: the table is open; scan and slot end below, or with the transaction on an ERROR.
    unsafe {
        let slot = pg_sys::table_slot_create(table, std::ptr::null_mut());
        let scan = pg_sys::table_beginscan(table, pg_sys::GetActiveSnapshot(), 0, std::ptr::null_mut());
        while pg_sys::table_scan_getnextslot(scan, pg_sys::ScanDirection::ForwardScanDirection, slot) {
            interrupt::check();
            pg_sys::slot_getallattrs(slot);
            let desc = (*slot).tts_tupleDescriptor;
            let value = |i: usize| (!*(*slot).tts_isnull.add(i)).then(|| *(*slot).tts_values.add(i));
            let tensor = tensor_column.map_or(0, |column| tensors.number(value(column), attribute(desc, column)));
            for column in 0..(*desc).natts as usize {
                if (*attribute(desc, column)).attlen != -1 {
                    continue;
                }
                let Some(datum) = value(column) else { continue };
                if let Some((reference, from)) = varlena::toast_pointer(datum.cast_mut_ptr())
                    && from == store
                {
                    f(reference.block_id, tensor);
                }
            }
        }
        pg_sys::table_endscan(scan);
        pg_sys::ExecDropSingleTupleTableSlot(slot);
    }
}
