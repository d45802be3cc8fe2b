//! The unique index of a TOAST relation, used as a directory: `(chunk_id, chunk_seq) -> TID`.

use super::relation::OpenRelation;
use pgrx::pg_sys;
use pgrx::prelude::*;

/// The indexes of one TOAST relation, open for writing.
pub struct ToastIndexes {
    store: pg_sys::Relation,
    indexes: Vec<OpenRelation>,
    valid: usize,
}

impl ToastIndexes {
    /// Opens every index of `store`. All that are ready take insertions (a failed REINDEX CONCURRENTLY leaves a second
    /// one behind); the first valid one answers look-ups.
    pub fn open(store: pg_sys::Relation, lockmode: u32) -> ToastIndexes {
        // SAFETY: `store` is open; the list is a palloc'd copy in the current memory context, freed here.
        let oids: Vec<pg_sys::Oid> = unsafe {
            let list = pg_sys::RelationGetIndexList(store);
            let oids = (0..if list.is_null() { 0 } else { (*list).length })
                .map(|i| (*(*list).elements.add(i as usize)).oid_value)
                .collect();
            pg_sys::list_free(list);
            oids
        };
        let indexes: Vec<OpenRelation> = oids.into_iter().map(|oid| OpenRelation::index(oid, lockmode)).collect();
        // SAFETY: each index is open, so its pg_index row is there.
        let valid =
            indexes.iter().position(|index| unsafe { (*(*index.raw()).rd_index).indisvalid }).unwrap_or_else(|| {
                super::error::raise(
                    PgSqlErrorCode::ERRCODE_INDEX_CORRUPTED,
                    "block store has no valid directory index",
                    "",
                    "REINDEX the table.",
                )
            });
        ToastIndexes { store, indexes, valid }
    }

    /// The block ids under `chunk_id`, as their TIDs tell: `f` is called with each until it returns `Some`.
    pub fn find<T>(&self, chunk_id: u32, mut f: impl FnMut(pg_sys::ItemPointerData) -> Option<T>) -> Option<T> {
        let index = self.indexes[self.valid].raw();
        // SAFETY: both relations are open. The scan key lives until index_endscan. kill_prior_tuple stays false, so no
        // entry is ever marked dead; SnapshotAny asks for no visibility check and takes no predicate lock.
        unsafe {
            let mut key = pg_sys::ScanKeyData::default();
            pg_sys::ScanKeyInit(
                &mut key,
                1,
                pg_sys::BTEqualStrategyNumber as pg_sys::StrategyNumber,
                pg_sys::F_OIDEQ.into(),
                pg_sys::Datum::from(chunk_id),
            );
            let any = &raw mut pg_sys::SnapshotAnyData;
            #[cfg(not(feature = "pg18"))]
            let scan = pg_sys::index_beginscan(self.store, index, any, 1, 0);
            #[cfg(feature = "pg18")]
            let scan = pg_sys::index_beginscan(self.store, index, any, std::ptr::null_mut(), 1, 0);
            pg_sys::index_rescan(scan, &mut key, 1, std::ptr::null_mut(), 0);
            let mut found = None;
            while found.is_none() {
                let tid = pg_sys::index_getnext_tid(scan, pg_sys::ScanDirection::ForwardScanDirection);
                if tid.is_null() {
                    break;
                }
                found = f(*tid);
            }
            pg_sys::index_endscan(scan);
            found
        }
    }

    /// Enters each `(chunk_id, chunk_seq) -> tid` into every index that is ready for insertions.
    pub fn insert(&self, entries: impl Iterator<Item = (u32, u32, pg_sys::ItemPointerData)>) {
        // SAFETY: index and store are open and locked RowExclusive. No uniqueness check: block ids are never
        // reused, so keys are unique by construction, and a check would visit heap rows that do not exist.
        unsafe {
            let ready = self.indexes.iter().map(OpenRelation::raw).filter(|index| (*(**index).rd_index).indisready);
            let ready: Vec<_> = ready.map(|index| (index, pg_sys::BuildIndexInfo(index))).collect();
            for (chunk_id, chunk_seq, mut tid) in entries {
                for &(index, info) in &ready {
                    let mut values = [pg_sys::Datum::from(chunk_id), pg_sys::Datum::from(chunk_seq as i32)];
                    let mut nulls = [false; 2];
                    pg_sys::index_insert(
                        index,
                        values.as_mut_ptr(),
                        nulls.as_mut_ptr(),
                        &mut tid,
                        self.store,
                        pg_sys::IndexUniqueCheck::UNIQUE_CHECK_NO,
                        false,
                        info,
                    );
                }
            }
            ready.into_iter().for_each(|(_, info)| pg_sys::pfree(info.cast()));
        }
    }

    /// Removes the entries whose TIDs `gone` says yes to, from every index that is ready for insertions. Another one has
    /// none: it is what a failed REINDEX CONCURRENTLY left, and its file may have no page at all.
    pub fn delete(&self, gone: impl Fn(pg_sys::ItemPointerData) -> bool) {
        for index in &self.indexes {
            // SAFETY: index and store are open and locked. The callback gets the state that is passed beside it.
            unsafe {
                if !(*(*index.raw()).rd_index).indisready {
                    continue;
                }
                let mut info = pg_sys::IndexVacuumInfo { index: index.raw(), ..Default::default() };
                #[cfg(not(any(feature = "pg14", feature = "pg15")))]
                {
                    info.heaprel = self.store;
                }
                info.estimated_count = true;
                info.message_level = pgrx::PgLogLevel::DEBUG2 as i32;
                info.num_heap_tuples = f64::from((*(*self.store).rd_rel).reltuples.max(0.0));
                let mut state: &dyn Fn(pg_sys::ItemPointerData) -> bool = &gone;
                let state = (&raw mut state).cast();
                let stats = pg_sys::index_bulk_delete(&mut info, std::ptr::null_mut(), Some(is_gone), state);
                let stats = pg_sys::index_vacuum_cleanup(&mut info, stats);
                if !stats.is_null() {
                    pg_sys::pfree(stats.cast());
                }
            }
        }
    }

    /// Calls `f` with the TID of every entry of the index that answers look-ups.
    pub fn for_each(&self, mut f: impl FnMut(pg_sys::ItemPointerData)) {
        let index = self.indexes[self.valid].raw();
        // SAFETY: as in `find`, without a key.
        unsafe {
            let any = &raw mut pg_sys::SnapshotAnyData;
            #[cfg(not(feature = "pg18"))]
            let scan = pg_sys::index_beginscan(self.store, index, any, 0, 0);
            #[cfg(feature = "pg18")]
            let scan = pg_sys::index_beginscan(self.store, index, any, std::ptr::null_mut(), 0, 0);
            pg_sys::index_rescan(scan, std::ptr::null_mut(), 0, std::ptr::null_mut(), 0);
            loop {
                let tid = pg_sys::index_getnext_tid(scan, pg_sys::ScanDirection::ForwardScanDirection);
                if tid.is_null() {
                    break;
                }
                super::interrupt::check();
                f(*tid);
            }
            pg_sys::index_endscan(scan);
        }
    }
}

/// `IndexBulkDeleteCallback`, called by the index access method under its page's lock.
#[pg_guard]
unsafe extern "C-unwind" fn is_gone(tid: pg_sys::ItemPointer, state: *mut std::ffi::c_void) -> bool {
    // SAFETY: `state` is the pointer that `delete` passed, and lives until it returns.
    unsafe { (*state.cast::<&dyn Fn(pg_sys::ItemPointerData) -> bool>())(*tid) }
}
