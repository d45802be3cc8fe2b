//! The planner hook.

use super::{calls, rewrite};
use crate::serving::settings;
use pgrx::pg_sys;
use pgrx::prelude::*;
use std::ffi::{c_char, c_int};

static mut NEXT: pg_sys::planner_hook_type = None;

/// Called once, when the library is loaded.
pub fn init() {
    // SAFETY: this process has one thread that calls PostgreSQL, and the library is loaded once.
    unsafe {
        NEXT = pg_sys::planner_hook;
        pg_sys::planner_hook = Some(plan);
    }
}

mod bare {
    use super::*;
    unsafe extern "C-unwind" {
        pub fn standard_planner(
            query: *mut pg_sys::Query,
            text: *const c_char,
            cursor_options: c_int,
            parameters: pg_sys::ParamListInfo,
        ) -> *mut pg_sys::PlannedStmt;
    }
}

/// Without a guard of pgrx's around the planner, which would rob the errors of all queries of their context (see
/// [`crate::pg::exec`]): an ERROR leaves this frame as it leaves one of C.
unsafe extern "C-unwind" fn plan(
    query: *mut pg_sys::Query,
    text: *const c_char,
    cursor_options: c_int,
    parameters: pg_sys::ParamListInfo,
) -> *mut pg_sys::PlannedStmt {
    // SAFETY: what PostgreSQL calls the hook with; planning may change the query, so it is looked at before.
    unsafe {
        let seen = look(query);
        let planned = match NEXT {
            Some(next) => next(query, text, cursor_options, parameters),
            None => bare::standard_planner(query, text, cursor_options, parameters),
        };
        if seen.wanted {
            rewrite_plan(planned, seen.volatile, cursor_options);
        }
        planned
    }
}

/// What has to be known of a query before it is planned.
#[repr(C)]
struct Seen {
    wanted: bool,
    volatile: bool,
}

#[pg_guard]
unsafe extern "C-unwind" fn look(query: *mut pg_sys::Query) -> Seen {
    // SAFETY: a query that is about to be planned.
    unsafe {
        let wanted = settings::batching() && calls::in_query(query);
        Seen { wanted, volatile: wanted && pg_sys::contain_volatile_functions(query.cast()) }
    }
}

#[pg_guard]
unsafe extern "C-unwind" fn rewrite_plan(planned: *mut pg_sys::PlannedStmt, volatile: bool, cursor_options: c_int) {
    // SAFETY: comes from the planner, and is not in use yet.
    unsafe { rewrite::statement(planned, volatile, cursor_options as u32) }
}
