//! Queries of users: run with the rights that the current function has, row by row, in bounded memory.
//!
//! Invariants: a query is one SELECT; where it is only to read, it runs under the statement's snapshot, and what it calls cannot change
//! the database either, since the transaction is read-only meanwhile; an ERROR undoes that with the transaction or subtransaction
//! that it ends.

use super::{error, interrupt, memory, nodes};
use pgrx::pg_sys::{self, Datum};
use pgrx::prelude::*;
use std::ffi::{CStr, CString};

/// A column of a query's result.
#[derive(Clone, Debug)]
pub struct Column {
    /// Its name.
    pub name: String,
    /// Its type; of a domain the type below.
    pub type_oid: pg_sys::Oid,
}

/// Most bytes of rows that are asked for at a time, as far as the largest of those before tells.
const PIECE: usize = 1 << 20;

/// What the functions that a query calls may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Calls {
    /// Read.
    Read,
    /// Whatever they may do in the transaction.
    Any,
}

/// Runs the SELECT `sql`, which `what` names in errors: gives its columns to `begin`, then each row to `row`, which returns
/// the bytes of it. What `row` allocates in the current memory context is gone with the next row.
///
/// Errors: whatever the query raises; `syntax_error` if it is no single SELECT, `read_only_sql_transaction` if it writes or
/// locks rows.
pub fn select(
    sql: &str,
    what: &str,
    calls: Calls,
    begin: impl FnOnce(&[Column]),
    mut row: impl FnMut(&[Option<Datum>]) -> usize,
) {
    let Ok(text) = CString::new(sql) else { not_a_select(what) };
    // SAFETY: SPI as its documentation asks for; an ERROR on the way ends the connection, the cursor and the contexts with
    // the (sub)transaction. `XactReadOnly` is backend state that transaction and subtransaction abort restore.
    unsafe {
        pg_sys::SPI_connect();
        let plan = pg_sys::SPI_prepare(text.as_ptr(), 0, std::ptr::null_mut());
        if plan.is_null() {
            not_a_select(what);
        }
        check(plan, what);
        let (before, read_only) = (pg_sys::XactReadOnly, calls == Calls::Read);
        pg_sys::XactReadOnly |= read_only;
        let portal = pg_sys::SPI_cursor_open(std::ptr::null(), plan, std::ptr::null_mut(), std::ptr::null(), read_only);
        begin(&columns((*portal).tupDesc));
        let of_row = memory::new_context(pg_sys::CurrentMemoryContext, c"pg_tessera row of a query");
        let mut wanted = 1;
        loop {
            interrupt::check();
            pg_sys::SPI_cursor_fetch(portal, true, wanted);
            let (count, table) = (pg_sys::SPI_processed as usize, pg_sys::SPI_tuptable);
            if count == 0 || table.is_null() {
                break;
            }
            let mut bytes = 0;
            for at in 0..count {
                pg_sys::MemoryContextReset(of_row);
                let caller = pg_sys::MemoryContextSwitchTo(of_row);
                bytes = bytes.max(row(&values(*(*table).vals.add(at), (*table).tupdesc)));
                pg_sys::MemoryContextSwitchTo(caller);
            }
            pg_sys::SPI_freetuptable(table);
            wanted = (PIECE / bytes.max(1)).clamp(1, 1024) as _;
        }
        pg_sys::SPI_cursor_close(portal);
        pg_sys::XactReadOnly = before;
        pg_sys::SPI_finish();
    }
}

/// Raises `read_only_sql_transaction` where nothing may be written; `what` names the command.
pub fn need_writable(what: &'static CStr) {
    // SAFETY: the string is static.
    unsafe { pg_sys::PreventCommandIfReadOnly(what.as_ptr()) }
}

/// Raises an ERROR unless the plan is one SELECT that changes and locks nothing.
///
/// # Safety
/// `plan` was prepared just now.
unsafe fn check(plan: pg_sys::SPIPlanPtr, what: &str) {
    // SAFETY: by the contract; a plan that was prepared just now has its queries.
    unsafe {
        let sources = nodes::items::<pg_sys::CachedPlanSource>(pg_sys::SPI_plan_get_plan_sources(plan));
        let mut queries = sources.flat_map(|source| nodes::items::<pg_sys::Query>((*source).query_list));
        let (Some(query), None) = (queries.next(), queries.next()) else { not_a_select(what) };
        if (*query).commandType != pg_sys::CmdType::CMD_SELECT {
            not_a_select(what);
        }
        if (*query).hasModifyingCTE || !(*query).rowMarks.is_null() {
            error::raise(
                PgSqlErrorCode::ERRCODE_READ_ONLY_SQL_TRANSACTION,
                format!("the {what} query must not change or lock rows"),
                "",
                "Write a plain SELECT.",
            );
        }
    }
}

fn not_a_select(what: &str) -> ! {
    error::raise(
        PgSqlErrorCode::ERRCODE_SYNTAX_ERROR,
        format!("the {what} query is not a single SELECT"),
        "",
        "Write one SELECT (or VALUES, or TABLE) without INTO.",
    )
}

/// # Safety
/// `desc` describes rows.
unsafe fn columns(desc: pg_sys::TupleDesc) -> Vec<Column> {
    // SAFETY: by the contract; syscache look-ups in a transaction.
    unsafe {
        (0..(*desc).natts as usize)
            .map(|at| {
                let attribute = super::tuple::attribute(desc, at);
                let name = CStr::from_ptr((*attribute).attname.data.as_ptr()).to_string_lossy().into_owned();
                Column { name, type_oid: pg_sys::getBaseType((*attribute).atttypid) }
            })
            .collect()
    }
}

/// # Safety
/// `tuple` is a row of `desc`.
unsafe fn values(tuple: pg_sys::HeapTuple, desc: pg_sys::TupleDesc) -> Vec<Option<Datum>> {
    // SAFETY: by the contract.
    unsafe {
        (1..=(*desc).natts)
            .map(|number| {
                let mut null = false;
                let value = pg_sys::SPI_getbinval(tuple, desc, number, &mut null);
                (!null).then_some(value)
            })
            .collect()
    }
}
