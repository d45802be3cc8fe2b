//! Which function calls are predictions.

use crate::pg::nodes::{self, Node};
use inference::array::RowBuffer;
use inference::signature::Port;
use pgrx::pg_sys::{self, NodeTag};
use pgrx::prelude::*;
use std::cell::RefCell;
use std::collections::HashMap;
use std::ffi::CStr;

/// Element type of the array that a call takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Elements {
    Real,
    Double,
    Integer,
    Bigint,
}

impl Elements {
    const ALL: [(Elements, &'static CStr); 4] = [
        (Elements::Real, c"tessera_predict_real"),
        (Elements::Double, c"tessera_predict_double"),
        (Elements::Integer, c"tessera_predict_integer"),
        (Elements::Bigint, c"tessera_predict_bigint"),
    ];

    /// As a number, for plans.
    pub fn number(self) -> i32 {
        self as i32
    }

    /// Adds a row of such elements, without nulls, given as their bytes. False if it does not fit.
    pub fn push(self, rows: &mut RowBuffer, port: &Port, bytes: &[u8]) -> bool {
        match self {
            Elements::Real => rows.push::<f32>(port, bytes),
            Elements::Double => rows.push::<f64>(port, bytes),
            Elements::Integer => rows.push::<i32>(port, bytes),
            Elements::Bigint => rows.push::<i64>(port, bytes),
        }
    }

    /// Of a number that a plan has.
    pub fn of_number(number: i32) -> Option<Elements> {
        Elements::ALL.iter().map(|(elements, _)| *elements).find(|elements| elements.number() == number)
    }
}

/// What a function is to us.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Known {
    Other,
    /// May turn into a prediction when it is put in line.
    Inline,
    Predict(Elements),
}

thread_local! {
    static KNOWN: RefCell<HashMap<pg_sys::Oid, Known>> = RefCell::new(HashMap::new());
}

/// Called once, when the library is loaded.
pub fn init() {
    #[pg_guard]
    unsafe extern "C-unwind" fn forget(_argument: pg_sys::Datum, _cache: i32, _hash: u32) {
        KNOWN.with_borrow_mut(HashMap::clear);
    }
    // SAFETY: the callback stays loaded and calls nothing of PostgreSQL's.
    unsafe { pg_sys::CacheRegisterSyscacheCallback(PROCOID, Some(forget), pg_sys::Datum::from(0)) };
}

/// `ClanguageId` and `SQLlanguageId` (pg_language.dat), which have no binding.
const C_LANGUAGE: pg_sys::Oid = pg_sys::Oid::from_u32(13);
const SQL_LANGUAGE: pg_sys::Oid = pg_sys::Oid::from_u32(14);

const PROCOID: i32 = pg_sys::SysCacheIdentifier::PROCOID as i32;

fn known(function: pg_sys::Oid) -> Known {
    if function.to_u32() < pg_sys::FirstNormalObjectId {
        return Known::Other;
    }
    if let Some(known) = KNOWN.with_borrow(|all| all.get(&function).copied()) {
        return known;
    }
    // SAFETY: a syscache look-up in a transaction; the tuple is released.
    let found = unsafe {
        let tuple = pg_sys::SearchSysCache1(PROCOID, pg_sys::Datum::from(function));
        if tuple.is_null() {
            return Known::Other;
        }
        let row = &*pg_sys::GETSTRUCT(tuple).cast::<pg_sys::FormData_pg_proc>();
        let found = match row.prolang {
            SQL_LANGUAGE => Known::Inline,
            C_LANGUAGE if row.pronargs == 2 => {
                let symbol = text(tuple, pg_sys::Anum_pg_proc_prosrc);
                let library = text(tuple, pg_sys::Anum_pg_proc_probin);
                let ours = library.is_some_and(|name| name.rsplit('/').next() == Some("pg_tessera"));
                let elements = Elements::ALL
                    .iter()
                    .find(|(_, name)| ours && symbol.as_deref().map(str::as_bytes) == Some(name.to_bytes()));
                elements.map_or(Known::Other, |(elements, _)| Known::Predict(*elements))
            }
            _ => Known::Other,
        };
        pg_sys::ReleaseSysCache(tuple);
        found
    };
    KNOWN.with_borrow_mut(|all| all.insert(function, found));
    found
}

/// A text column of a row of `pg_proc`.
///
/// # Safety
/// `tuple` is one of the syscache.
unsafe fn text(tuple: pg_sys::HeapTuple, column: u32) -> Option<String> {
    // SAFETY: by the contract; the column is a text.
    unsafe {
        let mut null = false;
        let datum = pg_sys::SysCacheGetAttr(PROCOID, tuple, column as pg_sys::AttrNumber, &mut null);
        String::from_datum(datum, null)
    }
}

/// The element type if `node` is a call of `predict` for an array.
///
/// # Safety
/// `node` is a node or null.
pub unsafe fn predict(node: *const Node) -> Option<Elements> {
    // SAFETY: by the contract.
    unsafe {
        let call = nodes::cast::<pg_sys::FuncExpr>(node, NodeTag::T_FuncExpr)?;
        match known((*call).funcid) {
            Known::Predict(elements) if !(*call).funcretset => Some(elements),
            _ => None,
        }
    }
}

/// True if the query calls `predict`, or a function that may turn out to.
///
/// # Safety
/// `query` is a query.
pub unsafe fn in_query(query: *mut pg_sys::Query) -> bool {
    // SAFETY: by the contract.
    unsafe fn visit(node: *mut Node) -> bool {
        unsafe {
            if let Some(query) = nodes::cast::<pg_sys::Query>(node, NodeTag::T_Query) {
                return nodes::visit_query(query, &mut |node| visit(node));
            }
            if let Some(call) = nodes::cast::<pg_sys::FuncExpr>(node, NodeTag::T_FuncExpr)
                && known((*call).funcid) != Known::Other
            {
                return true;
            }
            nodes::visit_children(node, &mut |node| visit(node))
        }
    }
    // SAFETY: by the contract.
    unsafe { nodes::visit_query(query, &mut |node| visit(node)) }
}
