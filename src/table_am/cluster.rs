//! CLUSTER and VACUUM FULL (after `heapam_relation_copy_for_cluster`, heapam_handler.c).
//!
//! Rows go through heapam's rewrite module, so that old versions keep their chains. Blocks keep their ids, so a row's
//! stand-ins are copied as they are; the blocks that rows reference are then copied to the new store, packed.

use super::sharing::{self, Tensors};
use super::slot::{begin_store, end_store, stored_row};
use super::{call_heapam, index_build, is_store};
use crate::pg::relation::OpenRelation;
use crate::pg::tuple::attribute;
use crate::pg::varlena::{self, StandIn};
use crate::pg::{error, error_context, interrupt};
use crate::store::{self, Marks, Uses};
use pgrx::pg_sys;
use pgrx::pg_sys::{HTSV_Result, ScanDirection};
use pgrx::prelude::*;

type RewriteState = *mut std::ffi::c_void;

unsafe extern "C-unwind" {
    // access/rewriteheap.h, for which there is no binding.
    fn begin_heap_rewrite(
        old: pg_sys::Relation,
        new: pg_sys::Relation,
        oldest_xmin: pg_sys::TransactionId,
        freeze_xid: pg_sys::TransactionId,
        cutoff_multi: pg_sys::MultiXactId,
    ) -> RewriteState;
    fn end_heap_rewrite(state: RewriteState);
    fn rewrite_heap_tuple(state: RewriteState, old: pg_sys::HeapTuple, new: pg_sys::HeapTuple);
    fn rewrite_heap_dead_tuple(state: RewriteState, old: pg_sys::HeapTuple) -> bool;
}

/// Writes rows to the new table, and notes the blocks that they reference.
struct Rewrite {
    state: RewriteState,
    new: pg_sys::Relation,
    old_desc: pg_sys::TupleDesc,
    new_desc: pg_sys::TupleDesc,
    store: pg_sys::Oid,
    /// The new table has a store. It may need none, after wide columns were dropped.
    keeps_store: bool,
    values: Vec<pg_sys::Datum>,
    nulls: Vec<bool>,
    marks: Marks,
    uses: Uses,
    tensors: Tensors,
    /// The column that tells a row's tensor.
    tensor_column: Option<usize>,
}

impl Rewrite {
    /// A row of the old table, with stand-ins or, out of a sort, with TOAST pointers in their place.
    unsafe fn row(&mut self, tuple: pg_sys::HeapTuple) {
        // SAFETY: `tuple` is a row of the old table; the arrays have as many entries as it has columns.
        unsafe {
            pg_sys::heap_deform_tuple(tuple, self.old_desc, self.values.as_mut_ptr(), self.nulls.as_mut_ptr());
            let mut stand_ins = Vec::new();
            let mut taken_in: Vec<*mut pg_sys::varlena> = Vec::new();
            let tensor = self.tensor_column.map_or(0, |column| {
                let value = (!self.nulls[column]).then(|| self.values[column]);
                self.tensors.number(value, attribute(self.old_desc, column))
            });
            for column in 0..self.values.len() {
                let att = attribute(self.new_desc, column);
                if (*att).attisdropped {
                    self.nulls[column] = true;
                }
                if self.nulls[column] || (*att).attlen != -1 {
                    continue;
                }
                let datum = self.values[column].cast_mut_ptr::<pg_sys::varlena>();
                let reference = match varlena::toast_pointer(datum) {
                    Some((reference, store)) if store == self.store => {
                        stand_ins.push((column, Box::new(reference.to_bytes())));
                        Some(reference)
                    }
                    _ => StandIn::read(datum),
                };
                if let Some(reference) = reference.filter(|_| !self.keeps_store) {
                    let mut pointer = reference.to_toast_pointer(self.store);
                    let plain = (*att).attstorage == pg_sys::TYPSTORAGE_PLAIN as std::ffi::c_char;
                    let detoast = if plain { pg_sys::detoast_attr } else { pg_sys::detoast_external_attr };
                    taken_in.push(detoast(pointer.as_mut_ptr().cast()));
                    self.values[column] = pg_sys::Datum::from(taken_in[taken_in.len() - 1]);
                    stand_ins.retain(|(other, _)| *other != column);
                } else if let Some(reference) = reference {
                    self.marks.insert(reference.block_id);
                    self.uses.add(reference.block_id, tensor);
                }
            }
            for (column, bytes) in &stand_ins {
                self.values[*column] = pg_sys::Datum::from(bytes.as_ptr());
            }
            let copy = pg_sys::heap_form_tuple(self.new_desc, self.values.as_mut_ptr(), self.nulls.as_mut_ptr());
            without_store(self.new, || rewrite_heap_tuple(self.state, tuple, copy));
            pg_sys::heap_freetuple(copy);
            taken_in.into_iter().for_each(|value| pg_sys::pfree(value.cast()));
        }
    }
}

#[allow(clippy::too_many_arguments)]
pub unsafe extern "C-unwind" fn relation_copy_for_cluster(
    old: pg_sys::Relation,
    new: pg_sys::Relation,
    old_index: pg_sys::Relation,
    use_sort: bool,
    oldest_xmin: pg_sys::TransactionId,
    xid_cutoff: *mut pg_sys::TransactionId,
    multi_cutoff: *mut pg_sys::MultiXactId,
    num_tuples: *mut f64,
    tups_vacuumed: *mut f64,
    tups_recently_dead: *mut f64,
) {
    let body = || {
        // SAFETY: PostgreSQL passes open relations, the old one under an exclusive lock, and valid pointers.
        unsafe {
            if is_store(old) {
                error::not_supported(
                    "VACUUM FULL of a block store by itself is not supported",
                    "Use VACUUM FULL on the table that it belongs to.",
                );
            }
            let natts = (*(*new).rd_att).natts as usize;
            let mut rewrite = Rewrite {
                state: pg_sys::ffi::pg_guard_ffi_boundary(|| {
                    begin_heap_rewrite(old, new, oldest_xmin, *xid_cutoff, *multi_cutoff)
                }),
                new,
                old_desc: (*old).rd_att,
                new_desc: (*new).rd_att,
                store: (*(*old).rd_rel).reltoastrelid,
                keeps_store: (*(*new).rd_rel).reltoastrelid != pg_sys::InvalidOid,
                values: vec![pg_sys::Datum::from(0); natts],
                nulls: vec![true; natts],
                marks: Marks::default(),
                uses: Uses::default(),
                tensors: Tensors::default(),
                tensor_column: sharing::default_tensor_column(old),
            };
            let sort = if use_sort {
                let memory = pg_sys::maintenance_work_mem;
                pg_sys::tuplesort_begin_cluster((*old).rd_att, old_index, memory, std::ptr::null_mut(), 0)
            } else {
                std::ptr::null_mut()
            };

            let mut source = Source::begin(old, if use_sort { std::ptr::null_mut() } else { old_index });
            while let Some((tuple, buffer)) = source.next() {
                interrupt::check();
                if is_dead(old, tuple, buffer, oldest_xmin, &mut *tups_recently_dead) {
                    *tups_vacuumed += 1.0;
                    // The rewrite module waits for it if it ends a chain.
                    if pg_sys::ffi::pg_guard_ffi_boundary(|| rewrite_heap_dead_tuple(rewrite.state, tuple)) {
                        *tups_vacuumed += 1.0;
                        *tups_recently_dead -= 1.0;
                    }
                    continue;
                }
                *num_tuples += 1.0;
                progress(pg_sys::PROGRESS_CLUSTER_HEAP_TUPLES_SCANNED, *num_tuples);
                if sort.is_null() {
                    rewrite.row(tuple);
                    progress(pg_sys::PROGRESS_CLUSTER_HEAP_TUPLES_WRITTEN, *num_tuples);
                } else {
                    let row = source.readable_copy(tuple);
                    pg_sys::tuplesort_putheaptuple(sort, row);
                    pg_sys::heap_freetuple(row);
                }
            }
            source.end();

            if !sort.is_null() {
                progress(pg_sys::PROGRESS_CLUSTER_PHASE, f64::from(pg_sys::PROGRESS_CLUSTER_PHASE_SORT_TUPLES));
                pg_sys::tuplesort_performsort(sort);
                progress(pg_sys::PROGRESS_CLUSTER_PHASE, f64::from(pg_sys::PROGRESS_CLUSTER_PHASE_WRITE_NEW_HEAP));
                let mut written = 0.0;
                loop {
                    interrupt::check();
                    let tuple = pg_sys::tuplesort_getheaptuple(sort, true);
                    if tuple.is_null() {
                        break;
                    }
                    rewrite.row(tuple);
                    written += 1.0;
                    progress(pg_sys::PROGRESS_CLUSTER_HEAP_TUPLES_WRITTEN, written);
                }
                pg_sys::tuplesort_end(sort);
            }
            without_store(new, || end_heap_rewrite(rewrite.state));

            let new_store = (*(*new).rd_rel).reltoastrelid;
            if rewrite.store != pg_sys::InvalidOid && new_store != pg_sys::InvalidOid {
                let from = OpenRelation::table(rewrite.store, pg_sys::AccessShareLock);
                store::copy::copy_blocks(from.raw(), new_store, &rewrite.marks, |blocks| rewrite.uses.order(blocks));
            } else if !rewrite.marks.is_empty() {
                error::raise(
                    PgSqlErrorCode::ERRCODE_INTERNAL_ERROR,
                    "rows reference blocks, but the new table has no block store",
                    "",
                    "",
                );
            }
        }
    };
    // SAFETY: the whole of a callback.
    unsafe { error_context::guard(body) }
}

/// All row versions of the old table, in the order of its pages or of an index.
struct Source {
    rel: pg_sys::Relation,
    slot: *mut pg_sys::TupleTableSlot,
    table_scan: pg_sys::TableScanDesc,
    index_scan: pg_sys::IndexScanDesc,
    page: pg_sys::BlockNumber,
}

impl Source {
    /// By `index` if it is not null.
    unsafe fn begin(rel: pg_sys::Relation, index: pg_sys::Relation) -> Source {
        // SAFETY: open relations.
        unsafe {
            let any = &raw mut pg_sys::SnapshotAnyData;
            let mut table_scan: pg_sys::TableScanDesc = std::ptr::null_mut();
            let mut index_scan: pg_sys::IndexScanDesc = std::ptr::null_mut();
            if index.is_null() {
                progress(pg_sys::PROGRESS_CLUSTER_PHASE, f64::from(pg_sys::PROGRESS_CLUSTER_PHASE_SEQ_SCAN_HEAP));
                table_scan = pg_sys::table_beginscan(rel, any, 0, std::ptr::null_mut());
                let pages = (*table_scan.cast::<pg_sys::HeapScanDescData>()).rs_nblocks;
                progress(pg_sys::PROGRESS_CLUSTER_TOTAL_HEAP_BLKS, f64::from(pages));
            } else {
                progress(pg_sys::PROGRESS_CLUSTER_PHASE, f64::from(pg_sys::PROGRESS_CLUSTER_PHASE_INDEX_SCAN_HEAP));
                progress(pg_sys::PROGRESS_CLUSTER_INDEX_RELID, f64::from((*index).rd_id.to_u32()));
                #[cfg(not(feature = "pg18"))]
                {
                    index_scan = pg_sys::index_beginscan(rel, index, any, 0, 0);
                }
                #[cfg(feature = "pg18")]
                {
                    index_scan = pg_sys::index_beginscan(rel, index, any, std::ptr::null_mut(), 0, 0);
                }
                pg_sys::index_rescan(index_scan, std::ptr::null_mut(), 0, std::ptr::null_mut(), 0);
            }
            let slot = pg_sys::table_slot_create(rel, std::ptr::null_mut());
            Source { rel, slot, table_scan, index_scan, page: pg_sys::InvalidBlockNumber }
        }
    }

    /// The next row version as it is stored, and the pinned buffer that it lies in.
    unsafe fn next(&mut self) -> Option<(pg_sys::HeapTuple, pg_sys::Buffer)> {
        // SAFETY: a running scan and a slot of this access method.
        unsafe {
            let forward = ScanDirection::ForwardScanDirection;
            if !self.index_scan.is_null() {
                if !pg_sys::index_getnext_slot(self.index_scan, forward, self.slot) {
                    return None;
                }
                if (*self.index_scan).xs_recheck {
                    error::raise(
                        PgSqlErrorCode::ERRCODE_FEATURE_NOT_SUPPORTED,
                        "CLUSTER does not support lossy index conditions",
                        "",
                        "Use another index.",
                    );
                }
            } else {
                let inner = begin_store(self.slot, self.rel);
                let scan = self.table_scan.cast::<pg_sys::HeapScanDescData>();
                if !pg_sys::heap_getnextslot(self.table_scan, forward, inner) {
                    progress(pg_sys::PROGRESS_CLUSTER_HEAP_BLKS_SCANNED, f64::from((*scan).rs_nblocks));
                    return None;
                }
                end_store(self.slot, self.rel);
                if self.page != (*scan).rs_cblock {
                    self.page = (*scan).rs_cblock;
                    // A synchronized scan may begin in the middle of the table.
                    let (pages, start) = (u64::from((*scan).rs_nblocks), u64::from((*scan).rs_startblock));
                    let done = (u64::from(self.page) + pages - start) % pages + 1;
                    progress(pg_sys::PROGRESS_CLUSTER_HEAP_BLKS_SCANNED, done as f64);
                }
            }
            let inner = stored_row(self.slot);
            let tuple = pg_sys::ExecFetchSlotHeapTuple(inner, false, std::ptr::null_mut());
            Some((tuple, (*inner.cast::<pg_sys::BufferHeapTupleTableSlot>()).buffer))
        }
    }

    /// The row at hand with TOAST pointers, so that a comparison of its columns can read them, and with the header of the
    /// stored one.
    unsafe fn readable_copy(&mut self, stored: pg_sys::HeapTuple) -> pg_sys::HeapTuple {
        // SAFETY: the slot holds the row `stored`.
        unsafe {
            let copy = pg_sys::ExecCopySlotHeapTuple(self.slot);
            (*copy).t_self = (*stored).t_self;
            (*copy).t_tableOid = (*stored).t_tableOid;
            copy
        }
    }

    unsafe fn end(self) {
        // SAFETY: begun by `begin`.
        unsafe {
            if !self.index_scan.is_null() {
                pg_sys::index_endscan(self.index_scan);
            } else {
                call_heapam!(scan_end(self.table_scan));
            }
            pg_sys::ExecDropSingleTupleTableSlot(self.slot);
        }
    }
}

/// True if no transaction can see the row version.
unsafe fn is_dead(
    rel: pg_sys::Relation,
    tuple: pg_sys::HeapTuple,
    buffer: pg_sys::Buffer,
    oldest_xmin: pg_sys::TransactionId,
    recently_dead: &mut f64,
) -> bool {
    // SAFETY: the scan has the buffer pinned.
    unsafe {
        pg_sys::LockBuffer(buffer, pg_sys::BUFFER_LOCK_SHARE as i32);
        let state = pg_sys::HeapTupleSatisfiesVacuum(tuple, oldest_xmin, buffer);
        let header = (*tuple).t_data;
        let own = |xid| pg_sys::TransactionIdIsCurrentTransactionId(xid);
        let concurrent = match state {
            HTSV_Result::HEAPTUPLE_INSERT_IN_PROGRESS => !own(pg_sys::htup::HeapTupleHeaderGetXmin(header)),
            HTSV_Result::HEAPTUPLE_DELETE_IN_PROGRESS => !own(index_build::update_xid(header)),
            _ => false,
        };
        pg_sys::LockBuffer(buffer, pg_sys::BUFFER_LOCK_UNLOCK as i32);
        if concurrent {
            // Cannot be under the exclusive lock; heapam says so and copies the row, which is right in any case.
            let name = std::ffi::CStr::from_ptr((*(*rel).rd_rel).relname.data.as_ptr()).to_string_lossy();
            pgrx::warning!("concurrent change in progress within table \"{name}\"");
        }
        if matches!(state, HTSV_Result::HEAPTUPLE_RECENTLY_DEAD | HTSV_Result::HEAPTUPLE_DELETE_IN_PROGRESS) {
            *recently_dead += 1.0;
        }
        state == HTSV_Result::HEAPTUPLE_DEAD
    }
}

/// Calls into the rewrite module while the new table seems to have no TOAST relation: heapam's toaster would write heap
/// pages into it, if a row is wide by values that lie in it (their storage, or `toast_tuple_target`, was another one when
/// they were stored). Such a row stays as it is. On an ERROR the new table is gone.
unsafe fn without_store<T>(new: pg_sys::Relation, f: impl FnOnce() -> T) -> T {
    // SAFETY: the open relation that this transaction has made and nobody else sees.
    unsafe {
        let store = std::mem::replace(&mut (*(*new).rd_rel).reltoastrelid, pg_sys::InvalidOid);
        let result = pg_sys::ffi::pg_guard_ffi_boundary(f);
        (*(*new).rd_rel).reltoastrelid = store;
        result
    }
}

fn progress(parameter: u32, value: f64) {
    crate::pg::progress::update(parameter, value as i64);
}
