//! Callbacks of DDL and maintenance: TOAST relations, VACUUM, CLUSTER.

use super::{call_heapam, is_store};
use crate::pg::tuple::attribute;
use crate::store::locators;
use pgrx::pg_sys;
use pgrx::prelude::*;

/// The TOAST relation of a table with this access method has it too: it is the block store.
#[pg_guard]
pub unsafe extern "C-unwind" fn relation_toast_am(rel: pg_sys::Relation) -> pg_sys::Oid {
    // SAFETY: PostgreSQL passes an open relation.
    unsafe { (*(*rel).rd_rel).relam }
}

#[cfg(any(feature = "pg14", feature = "pg15"))]
type FileNumber = pg_sys::RelFileNode;
#[cfg(not(any(feature = "pg14", feature = "pg15")))]
type FileNumber = pg_sys::RelFileLocator;

/// A new, empty file: of a new relation, or in place of another one (TRUNCATE). In the latter case a store's goes on with
/// the block ids of the old one, so that no id is used twice while somebody may still hold a reference.
#[pg_guard]
pub unsafe extern "C-unwind" fn relation_set_new_file(
    rel: pg_sys::Relation,
    file: *const FileNumber,
    persistence: std::ffi::c_char,
    freeze_xid: *mut pg_sys::TransactionId,
    min_multi: *mut pg_sys::MultiXactId,
) {
    // SAFETY: PostgreSQL passes an open relation, and the number of a file that it will get with this transaction.
    unsafe {
        #[cfg(any(feature = "pg14", feature = "pg15"))]
        let replaces = (*rel).rd_node.relNode != (*file).relNode;
        #[cfg(not(any(feature = "pg14", feature = "pg15")))]
        let replaces = (*rel).rd_locator.relNumber != (*file).relNumber;
        let old = if is_store(rel) && replaces { locators::read_meta(rel) } else { None };
        #[cfg(any(feature = "pg14", feature = "pg15"))]
        call_heapam!(relation_set_new_filenode(rel, file, persistence, freeze_xid, min_multi));
        #[cfg(not(any(feature = "pg14", feature = "pg15")))]
        call_heapam!(relation_set_new_filelocator(rel, file, persistence, freeze_xid, min_multi));
        let Some(old) = old else { return };

        // The relation still has its old file: the new one's metapage is written past the buffers.
        let mut page = locators::first_page(&old);
        let permanent = persistence == pg_sys::RELPERSISTENCE_PERMANENT as std::ffi::c_char;
        if permanent && pg_sys::wal_level >= pg_sys::WalLevel::WAL_LEVEL_REPLICA as i32 {
            let mut file = *file;
            let main = pg_sys::ForkNumber::MAIN_FORKNUM;
            pg_sys::log_newpage(&mut file, main, locators::META_PAGE, page.as_mut_ptr().cast(), false);
        }
        pg_sys::PageSetChecksumInplace(page.as_mut_ptr().cast(), locators::META_PAGE);
        let smgr = pg_sys::smgropen(*file, (*rel).rd_backend);
        pg_sys::smgrextend(
            smgr,
            pg_sys::ForkNumber::MAIN_FORKNUM,
            locators::META_PAGE,
            page.as_mut_ptr().cast(),
            false,
        );
    }
}

/// TRUNCATE of a table that the same transaction made: its file is cut in place.
#[pg_guard]
pub unsafe extern "C-unwind" fn relation_nontransactional_truncate(rel: pg_sys::Relation) {
    // SAFETY: PostgreSQL passes an open relation, locked exclusively.
    let old = if unsafe { is_store(rel) } { locators::read_meta(rel) } else { None };
    call_heapam!(relation_nontransactional_truncate(rel));
    if let Some(old) = old {
        locators::ensure_meta(rel, Some(&old));
    }
}

/// Whether a table gets a block store. heapam sees no need for one where all columns have storage PLAIN; but a column may have
/// become PLAIN while its rows have references, which a copy of the table (VACUUM FULL, CLUSTER) keeps.
#[pg_guard]
pub unsafe extern "C-unwind" fn relation_needs_toast_table(rel: pg_sys::Relation) -> bool {
    // SAFETY: PostgreSQL passes an open relation.
    unsafe {
        if call_heapam!(relation_needs_toast_table(rel)) {
            return true;
        }
        let desc = (*rel).rd_att;
        let plain = pg_sys::TYPSTORAGE_PLAIN as std::ffi::c_char;
        (0..(*desc).natts as usize).map(|i| attribute(desc, i)).any(|att| {
            !(*att).attisdropped
                && (*att).attlen == -1
                && (*att).attstorage == plain
                && pg_sys::get_typstorage((*att).atttypid) != plain
        })
    }
}

/// Index deletion asks the table which entries are dead. A directory entry never is: blocks live until they are swept.
#[pg_guard]
pub unsafe extern "C-unwind" fn index_delete_tuples(
    rel: pg_sys::Relation,
    state: *mut pg_sys::TM_IndexDeleteOp,
) -> pg_sys::TransactionId {
    // SAFETY: PostgreSQL passes an open relation and a filled state.
    unsafe {
        if is_store(rel) {
            (*state).ndeltids = 0;
            return pg_sys::InvalidTransactionId;
        }
        call_heapam!(index_delete_tuples(rel, state))
    }
}
