//! Queries of users: run with the rights that the current function has, row by row, in bounded memory.

use super::{error, memory};
use pgrx::pg_sys;
use pgrx::prelude::*;
use std::ffi::{CStr, CString};

/// Rows that are fetched at a time.
const AT_A_TIME: i64 = 128;

/// A column of a query's result.
#[derive(Clone, Debug)]
pub struct Column {
    /// Its name.
    pub name: String,
    /// Its type.
    pub type_oid: pg_sys::Oid,
}

/// A row of a query's result.
pub struct QueryRow {
    tuple: pg_sys::HeapTuple,
    desc: pg_sys::TupleDesc,
}

impl QueryRow {
    /// Column `n` (from 0) as it lies there; `None` for NULL.
    pub fn datum(&self, n: usize) -> Option<pg_sys::Datum> {
        // SAFETY: the row lives while it is handed on; the server checks the number.
        unsafe {
            let mut null = false;
            let datum = pg_sys::SPI_getbinval(self.tuple, self.desc, n as i32 + 1, &mut null);
            (!null).then_some(datum)
        }
    }

    /// Column `n` (from 0), converted to what its type is; `None` for NULL.
    pub fn get<T: FromDatum>(&self, n: usize) -> Option<T> {
        // SAFETY: the caller has looked at the column's type.
        self.datum(n).and_then(|datum| unsafe { T::from_datum(datum, false) })
    }

    /// Calls `f` with the detoasted bytes of varlena column `n` (from 0).
    pub fn with_bytes<T>(&self, n: usize, f: impl FnOnce(&[u8]) -> T) -> Option<T> {
        self.datum(n).map(|datum| {
            // SAFETY: the caller has looked at the column's type; the copy, if one is made, goes with the row's memory.
            unsafe { f(super::varlena::payload(pg_sys::pg_detoast_datum_packed(datum.cast_mut_ptr()))) }
        })
    }
}

/// Runs the query that `sql` is, hands `describe` the columns before it runs, and then each row to `row`. What `row` allocates of
/// PostgreSQL's memory is freed after it.
///
/// Errors of the query are raised as they are. What is no query with a result is refused, and so are several statements.
pub fn each_row(sql: &str, describe: &mut dyn FnMut(&[Column]), row: &mut dyn FnMut(&QueryRow)) {
    let text = CString::new(sql).unwrap_or_else(|_| no_query("It has a zero byte."));
    // SAFETY: in a function called from SQL. SPI's level ends below, or with the (sub)transaction on an ERROR, which also frees
    // the portal and the memory contexts made here.
    unsafe {
        check(pg_sys::SPI_connect());
        let plan = pg_sys::SPI_prepare(text.as_ptr(), 0, std::ptr::null_mut());
        if plan.is_null() {
            no_query("It cannot be prepared.");
        }
        if !pg_sys::SPI_is_cursor_plan(plan) {
            no_query("It is no single statement that gives rows.");
        }
        let portal = pg_sys::SPI_cursor_open(std::ptr::null(), plan, std::ptr::null_mut(), std::ptr::null(), false);
        describe(&columns((*portal).tupDesc));
        let scratch = memory::new_context(pg_sys::CurrentMemoryContext, c"pg_tessera row of a query");
        loop {
            pg_sys::SPI_cursor_fetch(portal, true, AT_A_TIME as _);
            let table = pg_sys::SPI_tuptable;
            let count = pg_sys::SPI_processed as usize;
            for at in 0..count {
                super::interrupt::check();
                pg_sys::MemoryContextReset(scratch);
                let caller = pg_sys::MemoryContextSwitchTo(scratch);
                row(&QueryRow { tuple: *(*table).vals.add(at), desc: (*table).tupdesc });
                pg_sys::MemoryContextSwitchTo(caller);
            }
            pg_sys::SPI_freetuptable(table);
            if count == 0 {
                break;
            }
        }
        pg_sys::SPI_cursor_close(portal);
        check(pg_sys::SPI_finish());
    }
}

fn no_query(detail: &str) -> ! {
    error::raise(
        PgSqlErrorCode::ERRCODE_INVALID_CURSOR_DEFINITION,
        "a query that gives rows is wanted",
        detail,
        "Write one SELECT, VALUES or TABLE statement.",
    )
}

fn check(status: i32) {
    if status < 0 {
        error::raise(
            PgSqlErrorCode::ERRCODE_EXTERNAL_ROUTINE_EXCEPTION,
            "the query cannot be run here",
            &format!("SPI says {status}."),
            "",
        );
    }
}

/// # Safety
/// `desc` is a row descriptor.
unsafe fn columns(desc: pg_sys::TupleDesc) -> Vec<Column> {
    // SAFETY: by the contract.
    unsafe {
        (0..(*desc).natts as usize)
            .map(|at| {
                let attribute = &*super::tuple::attribute(desc, at);
                let name = CStr::from_ptr(attribute.attname.data.as_ptr()).to_string_lossy().into_owned();
                Column { name, type_oid: attribute.atttypid }
            })
            .collect()
    }
}
