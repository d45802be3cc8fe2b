//! Rows of a table by an index, under the active snapshot.
//!
//! The extension's own tables are read so, not by SPI: no privilege check stands in the way (the floors above make their
//! own), no search path can bend the query, and a look-up costs microseconds.

use super::relation::OpenRelation;
use pgrx::pg_sys;
use pgrx::prelude::*;

/// An equality on a column of the index.
#[derive(Clone, Copy)]
pub enum Key<'a> {
    /// `bigint`
    Int8(i64),
    /// `integer`
    Int4(i32),
    /// `text COLLATE "C"`
    Text(&'a str),
    /// `bytea`
    Bytea(&'a [u8]),
}

/// A row in a slot.
pub struct Row {
    slot: *mut pg_sys::TupleTableSlot,
}

impl Row {
    /// Column `n` (from 1), converted; `None` for NULL.
    pub fn get<T: FromDatum>(&self, n: usize) -> Option<T> {
        // SAFETY: the caller names the column's type.
        self.datum(n).and_then(|datum| unsafe { T::from_datum(datum, false) })
    }

    /// Column `n` (from 1) as it lies there.
    pub fn datum(&self, n: usize) -> Option<pg_sys::Datum> {
        // SAFETY: the slot holds a row.
        unsafe {
            let natts = (*(*self.slot).tts_tupleDescriptor).natts as usize;
            assert!(n >= 1 && n <= natts, "the table has no column {n}");
            pg_sys::slot_getsomeattrs(self.slot, n as i32);
            (!*(*self.slot).tts_isnull.add(n - 1)).then(|| *(*self.slot).tts_values.add(n - 1))
        }
    }

    /// Calls `f` with the detoasted bytes of varlena column `n` (from 1); the copy is freed afterwards.
    pub fn with_bytes<T>(&self, n: usize, f: impl FnOnce(&[u8]) -> T) -> Option<T> {
        self.datum(n).map(|datum| {
            // SAFETY: the caller names a varlena column.
            unsafe {
                let original = datum.cast_mut_ptr::<pg_sys::varlena>();
                let plain = pg_sys::pg_detoast_datum_packed(original);
                let result = f(super::varlena::payload(plain));
                if plain != original {
                    pg_sys::pfree(plain.cast());
                }
                result
            }
        })
    }
}

/// An oid that is found by name each time: the objects may have been dropped and made again.
pub fn relation_oid(schema: &std::ffi::CStr, name: &std::ffi::CStr) -> Option<pg_sys::Oid> {
    // SAFETY: syscache look-ups in a transaction.
    let oid = unsafe {
        let namespace = pg_sys::get_namespace_oid(schema.as_ptr(), true);
        if namespace == pg_sys::InvalidOid {
            return None;
        }
        pg_sys::get_relname_relid(name.as_ptr(), namespace)
    };
    (oid != pg_sys::InvalidOid).then_some(oid)
}

/// Calls `f` with each row of `table` that `index` finds for `keys` (on its leading columns), in index order, until `f`
/// breaks or there are no more. Returns what `f` broke with.
pub fn by_index<T>(
    table: pg_sys::Oid,
    index: pg_sys::Oid,
    keys: &[Key<'_>],
    mut f: impl FnMut(&Row) -> std::ops::ControlFlow<T>,
) -> Option<T> {
    let table = OpenRelation::table(table, pg_sys::AccessShareLock);
    let index = OpenRelation::index(index, pg_sys::AccessShareLock);
    // SAFETY: both are open until the end; slot, scan and registered snapshot end below, or with the transaction's
    // resource owner and memory on an ERROR. Key datums live until the scan ends.
    unsafe {
        let mut scan_keys: Vec<pg_sys::ScanKeyData> = Vec::with_capacity(keys.len());
        for (i, key) in keys.iter().enumerate() {
            let (procedure, datum) = match *key {
                Key::Int8(v) => (pg_sys::F_INT8EQ, pg_sys::Datum::from(v)),
                Key::Int4(v) => (pg_sys::F_INT4EQ, pg_sys::Datum::from(v)),
                Key::Text(v) => (pg_sys::F_TEXTEQ, super::fmgr::varlena_datum(&[v.as_bytes()])),
                Key::Bytea(v) => (pg_sys::F_BYTEAEQ, super::fmgr::varlena_datum(&[v])),
            };
            let mut scan_key = pg_sys::ScanKeyData::default();
            pg_sys::ScanKeyInit(
                &mut scan_key,
                (i + 1) as i16,
                pg_sys::BTEqualStrategyNumber as pg_sys::StrategyNumber,
                procedure.into(),
                datum,
            );
            scan_keys.push(scan_key);
        }
        let snapshot = pg_sys::GetActiveSnapshot();
        let slot = pg_sys::table_slot_create(table.raw(), std::ptr::null_mut());
        let nkeys = scan_keys.len() as i32;
        #[cfg(not(feature = "pg18"))]
        let scan = pg_sys::index_beginscan(table.raw(), index.raw(), snapshot, nkeys, 0);
        #[cfg(feature = "pg18")]
        let scan = pg_sys::index_beginscan(table.raw(), index.raw(), snapshot, std::ptr::null_mut(), nkeys, 0);
        pg_sys::index_rescan(scan, scan_keys.as_mut_ptr(), nkeys, std::ptr::null_mut(), 0);
        let mut found = None;
        while pg_sys::index_getnext_slot(scan, pg_sys::ScanDirection::ForwardScanDirection, slot) {
            if let std::ops::ControlFlow::Break(value) = f(&Row { slot }) {
                found = Some(value);
                break;
            }
        }
        pg_sys::index_endscan(scan);
        pg_sys::ExecDropSingleTupleTableSlot(slot);
        found
    }
}
