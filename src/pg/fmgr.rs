//! SQL-callable functions in the server's own calling convention, for which the SQL is written by hand in `sql/`.

use pgrx::pg_sys;
use pgrx::prelude::*;

/// `MaxAllocSize` (memutils.h), which has no binding: a value has at most 1 GB - 1.
pub const MAX_ALLOC: usize = 0x3fff_ffff;

/// Arguments of one call.
pub struct Call {
    fcinfo: pg_sys::FunctionCallInfo,
}

impl Call {
    /// # Safety
    /// `fcinfo` is that of the running call.
    pub unsafe fn new(fcinfo: pg_sys::FunctionCallInfo) -> Call {
        Call { fcinfo }
    }

    /// Number of arguments.
    pub fn nargs(&self) -> usize {
        // SAFETY: the call is running.
        unsafe { (*self.fcinfo).nargs as usize }
    }

    /// Argument `n` as it came, not detoasted; `None` for NULL and where there is no such argument.
    pub fn datum(&self, n: usize) -> Option<pg_sys::Datum> {
        if n >= self.nargs() {
            return None;
        }
        // SAFETY: the call is running and has this argument.
        unsafe {
            let arg = (*self.fcinfo).args.as_ptr().add(n).read();
            (!arg.isnull).then_some(arg.value)
        }
    }

    /// Argument `n` converted; `None` for NULL.
    pub fn get<T: FromDatum>(&self, n: usize) -> Option<T> {
        // SAFETY: the SQL declaration of the function says that the argument has this type.
        self.datum(n).and_then(|datum| unsafe { T::from_datum(datum, false) })
    }

    /// Argument `n` of a function that is STRICT, or whose callers may not pass NULL there.
    pub fn need<T: FromDatum>(&self, n: usize, name: &str) -> T {
        self.get(n).unwrap_or_else(|| missing(name))
    }

    /// Bytes of a varlena argument (bytea, text, tensor_block), detoasted; they live until the call's context is reset.
    pub fn bytes(&self, n: usize) -> Option<&[u8]> {
        // SAFETY: the SQL declaration says that the argument is a varlena; the copy, if one is made, is palloc'd.
        self.datum(n)
            .map(|datum| unsafe { super::varlena::payload(pg_sys::pg_detoast_datum_packed(datum.cast_mut_ptr())) })
    }

    /// Returns SQL NULL.
    pub fn null(&self) -> pg_sys::Datum {
        // SAFETY: the call is running.
        unsafe { (*self.fcinfo).isnull = true };
        pg_sys::Datum::from(0)
    }

    /// A row of the function's row type: a datum for each column, `None` for NULL.
    pub fn record(&self, row: &[Option<pg_sys::Datum>]) -> pg_sys::Datum {
        let mut values: Vec<pg_sys::Datum> = row.iter().map(|v| v.unwrap_or(pg_sys::Datum::from(0))).collect();
        let mut nulls: Vec<bool> = row.iter().map(Option::is_none).collect();
        // SAFETY: the SQL declaration gives the function's row type: as many columns as there are values, of their types.
        unsafe {
            let mut desc = std::ptr::null_mut();
            pg_sys::get_call_result_type(self.fcinfo, std::ptr::null_mut(), &mut desc);
            assert_eq!((*desc).natts as usize, row.len(), "columns of the declaration");
            let desc = pg_sys::BlessTupleDesc(desc);
            let tuple = pg_sys::heap_form_tuple(desc, values.as_mut_ptr(), nulls.as_mut_ptr());
            pg_sys::HeapTupleHeaderGetDatum((*tuple).t_data)
        }
    }

    /// The raw call.
    pub fn raw(&self) -> pg_sys::FunctionCallInfo {
        self.fcinfo
    }
}

/// Raises the ERROR for an argument that is NULL and may not be.
pub fn missing(name: &str) -> ! {
    super::error::raise(
        PgSqlErrorCode::ERRCODE_NULL_VALUE_NOT_ALLOWED,
        format!("argument \"{name}\" must not be null"),
        "",
        "Pass a value.",
    )
}

/// Makes a Rust function `fn(&Call) -> pg_sys::Datum` callable from SQL under its own name.
macro_rules! sql_functions {
    ($($name:ident),* $(,)?) => {$(
        const _: () = {
            #[unsafe(export_name = concat!("pg_finfo_tessera_", stringify!($name)))]
            extern "C-unwind" fn info() -> &'static pgrx::pg_sys::Pg_finfo_record {
                const V1: pgrx::pg_sys::Pg_finfo_record = pgrx::pg_sys::Pg_finfo_record { api_version: 1 };
                &V1
            }
            #[unsafe(export_name = concat!("tessera_", stringify!($name)))]
            #[pgrx::pg_guard]
            unsafe extern "C-unwind" fn call(fcinfo: pgrx::pg_sys::FunctionCallInfo) -> pgrx::pg_sys::Datum {
                // SAFETY: the server passes the call's own arguments.
                $name(&unsafe { $crate::pg::fmgr::Call::new(fcinfo) })
            }
        };
    )*};
}
pub(crate) use sql_functions;

/// As [`sql_functions`], for functions in which users' own code runs: its errors keep their CONTEXT and names.
macro_rules! sql_functions_of_users_code {
    ($($name:ident),* $(,)?) => {$(
        const _: () = {
            #[unsafe(export_name = concat!("pg_finfo_tessera_", stringify!($name)))]
            extern "C-unwind" fn info() -> &'static pgrx::pg_sys::Pg_finfo_record {
                const V1: pgrx::pg_sys::Pg_finfo_record = pgrx::pg_sys::Pg_finfo_record { api_version: 1 };
                &V1
            }
            #[unsafe(export_name = concat!("tessera_", stringify!($name)))]
            unsafe extern "C-unwind" fn call(fcinfo: pgrx::pg_sys::FunctionCallInfo) -> pgrx::pg_sys::Datum {
                // SAFETY: called by the server on its main thread, with the call's own arguments; nothing here has a
                // destructor.
                unsafe { $crate::pg::error_context::guard(|| $name(&$crate::pg::fmgr::Call::new(fcinfo))) }
            }
        };
    )*};
}
pub(crate) use sql_functions_of_users_code;

/// A varlena of `bytes` in the current memory context.
pub fn varlena_datum(parts: &[&[u8]]) -> pg_sys::Datum {
    let len: usize = parts.iter().map(|p| p.len()).sum();
    if len + super::varlena::VARHDRSZ > MAX_ALLOC {
        super::error::raise(
            PgSqlErrorCode::ERRCODE_PROGRAM_LIMIT_EXCEEDED,
            "value is larger than the 1 GB that a column value can have",
            &format!("It has {len} bytes."),
            "Use a large object, or smaller pieces.",
        );
    }
    // SAFETY: palloc'd with room for the header and all parts.
    unsafe {
        let datum = pg_sys::palloc(len + super::varlena::VARHDRSZ).cast::<pg_sys::varlena>();
        pgrx::set_varsize_4b(datum, (len + super::varlena::VARHDRSZ) as i32);
        let mut at = datum.cast::<u8>().add(super::varlena::VARHDRSZ);
        for part in parts {
            std::ptr::copy_nonoverlapping(part.as_ptr(), at, part.len());
            at = at.add(part.len());
        }
        pg_sys::Datum::from(datum)
    }
}

/// A varlena of the bytes, which it takes as they are: the first [`VARHDRSZ`](super::varlena::VARHDRSZ) become its header. It is read
/// where they lie, for as long as they do.
pub fn varlena_in_place(bytes: &mut [u8]) -> pg_sys::Datum {
    assert!((super::varlena::VARHDRSZ..=MAX_ALLOC).contains(&bytes.len()));
    // PostgreSQL reads the header as a word.
    if !bytes.as_ptr().cast::<u32>().is_aligned() {
        return varlena_datum(&[&bytes[super::varlena::VARHDRSZ..]]);
    }
    // SAFETY: aligned, with room for the header.
    unsafe {
        let datum = bytes.as_mut_ptr().cast::<pg_sys::varlena>();
        pgrx::set_varsize_4b(datum, bytes.len() as i32);
        pg_sys::Datum::from(datum)
    }
}

/// A copy of these bytes, which are a whole value with its header, in the current memory context.
pub fn raw_datum(bytes: &[u8]) -> pg_sys::Datum {
    // SAFETY: palloc raises an ERROR rather than return null; the copy fits.
    unsafe {
        let copy = pg_sys::palloc(bytes.len()).cast::<u8>();
        std::ptr::copy_nonoverlapping(bytes.as_ptr(), copy, bytes.len());
        pg_sys::Datum::from(copy)
    }
}

/// A varlena of `len` bytes in the current memory context, which `fill` writes.
pub fn varlena_with(len: usize, fill: impl FnOnce(&mut [u8])) -> pg_sys::Datum {
    if len > MAX_ALLOC - super::varlena::VARHDRSZ {
        super::error::raise(
            PgSqlErrorCode::ERRCODE_PROGRAM_LIMIT_EXCEEDED,
            "value is larger than the 1 GB that a column value can have",
            &format!("It has {len} bytes."),
            "Use a large object, or smaller pieces.",
        );
    }
    // SAFETY: palloc'd with room for the header and the bytes, which are set before they are lent.
    unsafe {
        let datum = pg_sys::palloc(len + super::varlena::VARHDRSZ).cast::<pg_sys::varlena>();
        pgrx::set_varsize_4b(datum, (len + super::varlena::VARHDRSZ) as i32);
        let bytes = datum.cast::<u8>().add(super::varlena::VARHDRSZ);
        std::ptr::write_bytes(bytes, 0, len);
        fill(std::slice::from_raw_parts_mut(bytes, len));
        pg_sys::Datum::from(datum)
    }
}

/// The next row of a function that returns a set of rows one by one, as it is called for them: nothing is collected. `begin` makes
/// what is kept between the calls, which is dropped wherever the query ends: dropping it must call nothing of PostgreSQL's.
/// `next` gives a row, a datum for each column, until it gives none.
pub fn next_row<S, const N: usize>(
    call: &Call,
    begin: impl FnOnce() -> S,
    next: impl FnOnce(&mut S) -> Option<[Option<pg_sys::Datum>; N]>,
) -> pg_sys::Datum {
    // SAFETY: as funcapi.h asks for: the state is made at the first call, in memory that lives as long as the calls go on; a context
    // that cannot take a set is refused by the server's own error.
    unsafe {
        let fcinfo = call.raw();
        if (*(*fcinfo).flinfo).fn_extra.is_null() {
            let context = pg_sys::init_MultiFuncCall(fcinfo);
            let caller = pg_sys::MemoryContextSwitchTo((*context).multi_call_memory_ctx);
            let mut desc = std::ptr::null_mut();
            pg_sys::get_call_result_type(fcinfo, std::ptr::null_mut(), &mut desc);
            (*context).tuple_desc = pg_sys::BlessTupleDesc(pg_sys::CreateTupleDescCopy(desc));
            pg_sys::MemoryContextSwitchTo(caller);
            let state = Box::into_raw(Box::new(begin()));
            (*context).user_fctx = state.cast();
            super::memory::drop_with((*context).multi_call_memory_ctx, state);
        }
        let context = pg_sys::per_MultiFuncCall(fcinfo);
        let info = (*fcinfo).resultinfo.cast::<pg_sys::ReturnSetInfo>();
        let Some(row) = next(&mut *(*context).user_fctx.cast::<S>()) else {
            pg_sys::end_MultiFuncCall(fcinfo, context);
            (*info).isDone = pg_sys::ExprDoneCond::ExprEndResult;
            return call.null();
        };
        let mut values = row.map(|value| value.unwrap_or(pg_sys::Datum::from(0)));
        let mut nulls = row.map(|value| value.is_none());
        assert_eq!((*(*context).tuple_desc).natts as usize, N, "columns of the declaration");
        let tuple = pg_sys::heap_form_tuple((*context).tuple_desc, values.as_mut_ptr(), nulls.as_mut_ptr());
        (*context).call_cntr += 1;
        (*info).isDone = pg_sys::ExprDoneCond::ExprMultipleResult;
        pg_sys::HeapTupleHeaderGetDatum((*tuple).t_data)
    }
}

/// Rows of a function that is declared `RETURNS TABLE` or `SETOF`, collected in a tuplestore.
pub struct Rows {
    store: *mut pg_sys::Tuplestorestate,
    desc: pg_sys::TupleDesc,
}

impl Rows {
    /// Starts the result of the running call.
    pub fn start(call: &Call) -> Rows {
        // SAFETY: the call is running; a context that cannot take a set is refused by the server's own error.
        unsafe {
            pg_sys::InitMaterializedSRF(call.raw(), 0);
            let info = (*call.raw()).resultinfo.cast::<pg_sys::ReturnSetInfo>();
            Rows { store: (*info).setResult, desc: (*info).setDesc }
        }
    }

    /// Adds a row: a datum for each column, `None` for NULL.
    pub fn push(&mut self, row: &[Option<pg_sys::Datum>]) {
        let mut values: Vec<pg_sys::Datum> = row.iter().map(|v| v.unwrap_or(pg_sys::Datum::from(0))).collect();
        let mut nulls: Vec<bool> = row.iter().map(Option::is_none).collect();
        // SAFETY: the SQL declaration has as many columns as the row has values, of their types.
        unsafe {
            assert_eq!((*self.desc).natts as usize, row.len(), "columns of the declaration");
            pg_sys::tuplestore_putvalues(self.store, self.desc, values.as_mut_ptr(), nulls.as_mut_ptr());
        }
    }
}
