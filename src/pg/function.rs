//! Functions of users: found by name, called with the caller's rights.

use super::value::type_name;
use super::{error, memory};
use pgrx::pg_sys::{self, Datum};
use pgrx::prelude::*;
use std::ffi::{CStr, CString};

/// A function that returns `double precision`, ready to be called.
pub struct Function {
    /// As an error names it: with its argument types.
    name: String,
    call: pg_sys::FunctionCallInfo,
    arguments: usize,
    /// What a call makes is gone with the next one.
    scratch: pg_sys::MemoryContext,
}

impl Function {
    /// The function that `text` names, as `name`, `schema.name` or `name(types)`, for arguments of these types.
    /// It lives as long as the memory context `home`.
    ///
    /// Errors: `undefined_function`, `datatype_mismatch` if it takes or returns other types, `insufficient_privilege`; those of
    /// the name's syntax. `hint` says which functions would do.
    pub fn returning_double(
        text: &str,
        arguments: &[pg_sys::Oid],
        home: pg_sys::MemoryContext,
        hint: &str,
    ) -> Function {
        let types = arguments.iter().map(|&oid| type_name(oid)).collect::<Vec<_>>().join(", ");
        let oid = find(text, arguments).unwrap_or_else(|| {
            error::raise(
                PgSqlErrorCode::ERRCODE_UNDEFINED_FUNCTION,
                format!("function {text}({types}) does not exist"),
                "",
                hint,
            )
        });
        // SAFETY: syscache look-ups in a transaction; the array of types is palloc'd.
        let (name, fits) = unsafe {
            let (mut types, mut count) = (std::ptr::null_mut(), 0);
            let result = pg_sys::get_func_signature(oid, &mut types, &mut count);
            let types = if count > 0 { std::slice::from_raw_parts(types, count as usize) } else { &[] };
            let plain =
                pg_sys::get_func_prokind(oid) as u8 == pg_sys::PROKIND_FUNCTION && !pg_sys::get_func_retset(oid);
            let name = CStr::from_ptr(pg_sys::format_procedure(oid)).to_string_lossy().into_owned();
            (name, plain && types == arguments && result == pg_sys::FLOAT8OID)
        };
        if !fits {
            error::raise(
                PgSqlErrorCode::ERRCODE_DATATYPE_MISMATCH,
                format!("{name} is no function of ({types}) that returns double precision"),
                "",
                hint,
            );
        }
        if !may_execute(oid) {
            error::raise(
                PgSqlErrorCode::ERRCODE_INSUFFICIENT_PRIVILEGE,
                format!("permission denied for function {name}"),
                "",
                "Its owner can GRANT EXECUTE.",
            );
        }
        // SAFETY: both structs are palloc'd in `home`, with room for the arguments, zeroed, and filled as
        // InitFunctionCallInfoData (fmgr.h) does.
        let (call, scratch) = unsafe {
            let lookup = pg_sys::MemoryContextAllocZero(home, size_of::<pg_sys::FmgrInfo>()).cast::<pg_sys::FmgrInfo>();
            pg_sys::fmgr_info_cxt(oid, lookup, home);
            let bytes =
                size_of::<pg_sys::FunctionCallInfoBaseData>() + arguments.len() * size_of::<pg_sys::NullableDatum>();
            let call = pg_sys::MemoryContextAllocZero(home, bytes).cast::<pg_sys::FunctionCallInfoBaseData>();
            (*call).flinfo = lookup;
            (*call).fncollation = pg_sys::DEFAULT_COLLATION_OID;
            (*call).nargs = arguments.len() as i16;
            (call, memory::new_context(home, c"pg_tessera function call"))
        };
        Function { name, call, arguments: arguments.len(), scratch }
    }

    /// Its name and argument types.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Calls it with what `arguments` makes, none of which is NULL; none for NULL.
    pub fn call(&self, arguments: impl FnOnce() -> Vec<Datum>) -> Option<f64> {
        // SAFETY: the caller gives values of the types that the function was found for; what is made lives in `scratch` until
        // the next call. On an ERROR PostgreSQL resets the current context itself.
        unsafe {
            pg_sys::MemoryContextReset(self.scratch);
            let caller = pg_sys::MemoryContextSwitchTo(self.scratch);
            let arguments = arguments();
            assert_eq!(arguments.len(), self.arguments, "arguments of {}", self.name);
            for (at, value) in arguments.into_iter().enumerate() {
                (*self.call).args.as_mut_ptr().add(at).write(pg_sys::NullableDatum { value, isnull: false });
            }
            (*self.call).isnull = false;
            let function = (*(*self.call).flinfo).fn_addr.expect("fmgr_info has found it");
            let result = pg_sys::ffi::pg_guard_ffi_boundary(|| function(self.call));
            pg_sys::MemoryContextSwitchTo(caller);
            f64::from_datum(result, (*self.call).isnull)
        }
    }
}

fn find(text: &str, arguments: &[pg_sys::Oid]) -> Option<pg_sys::Oid> {
    let text = CString::new(text).ok()?;
    // SAFETY: look-ups in a transaction; the strings and the list are palloc'd or live long enough.
    let oid = unsafe {
        if text.to_bytes().contains(&b'(') {
            let (mut input, mut parameter) = (pg_sys::InvalidOid, pg_sys::InvalidOid);
            pg_sys::getTypeInputInfo(pg_sys::REGPROCEDUREOID, &mut input, &mut parameter);
            pg_sys::Oid::from_datum(
                pg_sys::OidInputFunctionCall(input, text.as_ptr().cast_mut(), parameter, -1),
                false,
            )?
        } else {
            #[cfg(any(feature = "pg14", feature = "pg15"))]
            let names = pg_sys::stringToQualifiedNameList(text.as_ptr());
            #[cfg(not(any(feature = "pg14", feature = "pg15")))]
            let names = pg_sys::stringToQualifiedNameList(text.as_ptr(), std::ptr::null_mut());
            pg_sys::LookupFuncName(names, arguments.len() as i32, arguments.as_ptr(), true)
        }
    };
    (oid != pg_sys::InvalidOid).then_some(oid)
}

fn may_execute(oid: pg_sys::Oid) -> bool {
    // SAFETY: syscache look-ups in a transaction.
    unsafe {
        let (user, execute) = (pg_sys::GetUserId(), pg_sys::ACL_EXECUTE as pg_sys::AclMode);
        #[cfg(any(feature = "pg14", feature = "pg15"))]
        let result = pg_sys::pg_proc_aclcheck(oid, user, execute);
        #[cfg(not(any(feature = "pg14", feature = "pg15")))]
        let result = pg_sys::object_aclcheck(pg_sys::ProcedureRelationId, oid, user, execute);
        result == pg_sys::AclResult::ACLCHECK_OK
    }
}
