//! Maintenance: checking and repacking a block store.

use super::inspect::open_store;
use crate::pg::error;
use crate::pg::fmgr::{Call, Rows, sql_functions};
use crate::pg::progress::Progress;
use crate::pg::relation::OpenRelation;
use crate::store::{self, Uses};
use crate::table_am::references::for_each_reference;
use crate::table_am::sharing;
use pgrx::pg_sys;
use pgrx::prelude::*;

sql_functions!(check_store, repack);

/// `check_store(regclass)`: a row for each broken invariant of a table and its block store.
///
/// Takes ShareLock on both, so that nobody changes them meanwhile; on a standby, which cannot take it, AccessShareLock.
fn check_store(call: &Call) -> pg_sys::Datum {
    let oid: pg_sys::Oid = call.need(0, "relation");
    // SAFETY: plain question.
    let share = if unsafe { pg_sys::RecoveryInProgress() } { pg_sys::AccessShareLock } else { pg_sys::ShareLock };
    need_owner(oid);
    let table = OpenRelation::table(oid, share);
    let store_oid = open_store(table.raw());
    let mut rows = Rows::start(call);
    let mut report = |problem: &str, id: Option<u32>, detail: String| {
        let id = id.map(|id| pg_sys::Datum::from(i64::from(id)));
        rows.push(&[problem.into_datum(), id, detail.into_datum()]);
    };
    if store_oid == pg_sys::InvalidOid {
        for_each_reference(table.raw(), crate::pg::interrupt::check, |r| {
            report("reference without a block store", Some(r.stand_in.block_id), r.to_string());
        });
        return call.null();
    }
    let store = OpenRelation::table(store_oid, share);
    let live = store::check::check(store.raw(), &mut report);
    for_each_reference(table.raw(), crate::pg::interrupt::check, |r| match live.get(&r.stand_in.block_id) {
        None => report("dangling reference", Some(r.stand_in.block_id), r.to_string()),
        Some(&block) if block != (r.stand_in.ext_info, r.stand_in.raw_len) => {
            report("reference and block disagree", Some(r.stand_in.block_id), r.to_string());
        }
        Some(_) => {}
    });
    call.null()
}

/// `repack(regclass, tensor_column name)`: moves blocks so that those of one tensor lie together.
fn repack(call: &Call) -> pg_sys::Datum {
    let Some(oid) = call.get::<pg_sys::Oid>(0) else { crate::pg::fmgr::missing("relation") };
    let column: Option<&std::ffi::CStr> = call.get(1);
    need_owner(oid);
    let table = OpenRelation::table(oid, pg_sys::AccessShareLock);
    let store_oid = open_store(table.raw());
    if store_oid == pg_sys::InvalidOid {
        return pg_sys::Datum::from(0i64);
    }
    let column = match column {
        None => sharing::default_tensor_column(table.raw()),
        Some(name) => Some(sharing::column_named(table.raw(), name).unwrap_or_else(|| {
            error::raise(
                PgSqlErrorCode::ERRCODE_UNDEFINED_COLUMN,
                format!("column \"{}\" does not exist", name.to_string_lossy()),
                "",
                "Name the column that tells which tensor a row belongs to.",
            )
        })),
    };
    // Keeps VACUUM and another repack away; readers and writers go on.
    let store = OpenRelation::table(store_oid, pg_sys::ShareUpdateExclusiveLock);
    let mut uses = Uses::default();
    sharing::for_each_use(table.raw(), store_oid, column, |block_id, tensor| uses.add(block_id, tensor));
    let mut progress = Progress::cluster(oid);
    let moved = store::repack::repack(store.raw(), |blocks| uses.order(blocks), |done, all| progress.blocks(done, all));
    progress.end();
    pg_sys::Datum::from(moved as i64)
}

/// Owners and superusers only. Asked before a lock is: nobody else may make the table's writers wait.
fn need_owner(oid: pg_sys::Oid) {
    // SAFETY: syscache look-ups, which raise an ERROR if there is no such relation.
    unsafe {
        let role = pg_sys::GetUserId();
        #[cfg(any(feature = "pg14", feature = "pg15"))]
        let owner = pg_sys::pg_class_ownercheck(oid, role);
        #[cfg(not(any(feature = "pg14", feature = "pg15")))]
        let owner = pg_sys::object_ownercheck(pg_sys::RelationRelationId, oid, role);
        if !owner {
            let name = pg_sys::get_rel_name(oid);
            let name = if name.is_null() { c"" } else { std::ffi::CStr::from_ptr(name) }.to_string_lossy();
            error::raise(
                PgSqlErrorCode::ERRCODE_INSUFFICIENT_PRIVILEGE,
                format!("must be owner of table {name}"),
                "",
                "Ask its owner or a superuser.",
            );
        }
    }
}
