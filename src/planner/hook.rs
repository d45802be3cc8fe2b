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

#[pg_guard]
unsafe extern "C-unwind" fn plan(
    query: *mut pg_sys::Query,
    text: *const c_char,
    cursor_options: c_int,
    parameters: pg_sys::ParamListInfo,
) -> *mut pg_sys::PlannedStmt {
    // SAFETY: what PostgreSQL calls the hook with; planning may change the query, so it is looked at before.
    unsafe {
        let wanted = settings::batching() && calls::in_query(query);
        let volatile = wanted && pg_sys::contain_volatile_functions(query.cast());
        let planned = match NEXT {
            Some(next) => next(query, text, cursor_options, parameters),
            None => pg_sys::standard_planner(query, text, cursor_options, parameters),
        };
        if wanted {
            rewrite::statement(planned, volatile, cursor_options as u32);
        }
        planned
    }
}
