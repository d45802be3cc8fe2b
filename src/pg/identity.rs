//! Whose rights a piece of work runs with.

use pgrx::pg_sys;
use pgrx::prelude::*;
use std::ffi::CStr;

/// The extension's name in `pg_extension`.
const EXTENSION: &CStr = c"pg_tessera";

/// Runs `f` with the rights of the extension's owner and a search path that no user can bend, as a SECURITY DEFINER
/// function with `SET search_path` would, and hands `f` the caller's role.
///
/// An ERROR inside needs no undoing here: transaction and subtransaction abort restore the role, and drop the settings.
pub fn as_extension_owner<T>(f: impl FnOnce(pg_sys::Oid) -> T) -> T {
    as_role(extension_owner(), c"pg_catalog, pg_temp", f)
}

/// Runs `f` with the rights of `owner` and this search path, as REFRESH MATERIALIZED VIEW runs a view's query
/// (matview.c): what it calls cannot change the session's role or settings. Hands `f` the caller's role.
pub fn as_role<T>(owner: pg_sys::Oid, search_path: &CStr, f: impl FnOnce(pg_sys::Oid) -> T) -> T {
    let mut caller = pg_sys::InvalidOid;
    let mut context = 0;
    // SAFETY: plain backend state, saved and restored around `f`; the strings live during the call.
    unsafe {
        pg_sys::GetUserIdAndSecContext(&mut caller, &mut context);
        let nest = pg_sys::NewGUCNestLevel();
        pg_sys::SetUserIdAndSecContext(
            owner,
            context | (pg_sys::SECURITY_LOCAL_USERID_CHANGE | pg_sys::SECURITY_RESTRICTED_OPERATION) as i32,
        );
        // A text means the same whatever the session's lexical rules are.
        for (name, value) in [(c"search_path", search_path), (c"standard_conforming_strings", c"on")] {
            pg_sys::set_config_option(
                name.as_ptr(),
                value.as_ptr(),
                pg_sys::GucContext::PGC_USERSET,
                pg_sys::GucSource::PGC_S_SESSION,
                pg_sys::GucAction::GUC_ACTION_SAVE,
                true,
                0,
                false,
            );
        }
        let result = f(caller);
        pg_sys::AtEOXact_GUC(true, nest);
        pg_sys::SetUserIdAndSecContext(caller, context);
        result
    }
}

/// The role whose rights the current function has.
pub fn current_user() -> pg_sys::Oid {
    // SAFETY: reads backend state.
    unsafe { pg_sys::GetUserId() }
}

/// Owner of the extension in this database.
fn extension_owner() -> pg_sys::Oid {
    // SAFETY: a catalog scan by the index on extname, ended before the row goes out of scope; the struct is the
    // fixed part of the row.
    let owner = unsafe {
        let rel = super::relation::OpenRelation::table(pg_sys::ExtensionRelationId, pg_sys::AccessShareLock);
        let mut key = pg_sys::ScanKeyData::default();
        pg_sys::ScanKeyInit(
            &mut key,
            pg_sys::Anum_pg_extension_extname as i16,
            pg_sys::BTEqualStrategyNumber as pg_sys::StrategyNumber,
            pg_sys::F_NAMEEQ.into(),
            pg_sys::Datum::from(EXTENSION.as_ptr()),
        );
        let index = pg_sys::Oid::from_u32(pg_sys::ExtensionNameIndexId);
        let scan = pg_sys::systable_beginscan(rel.raw(), index, true, std::ptr::null_mut(), 1, &mut key);
        let tuple = pg_sys::systable_getnext(scan);
        let owner =
            (!tuple.is_null()).then(|| (*pg_sys::GETSTRUCT(tuple).cast::<pg_sys::FormData_pg_extension>()).extowner);
        pg_sys::systable_endscan(scan);
        owner
    };
    owner.unwrap_or_else(|| {
        super::error::raise(
            PgSqlErrorCode::ERRCODE_UNDEFINED_OBJECT,
            "extension pg_tessera is not installed in this database",
            "",
            "Run CREATE EXTENSION pg_tessera.",
        )
    })
}
