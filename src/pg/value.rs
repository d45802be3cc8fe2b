//! Values of types that a user's query decides: numbers of any type, text forms, copies.

use super::{array, exec};
use pgrx::pg_sys::{self, Datum};
use pgrx::prelude::*;

/// A type's name as SQL writes it.
pub fn type_name(oid: pg_sys::Oid) -> String {
    // SAFETY: a syscache look-up; the string is palloc'd.
    unsafe { std::ffi::CStr::from_ptr(pg_sys::format_type_be(oid)).to_string_lossy().into_owned() }
}

/// A copy of a value of a type in a memory context, detoasted, and the bytes that it points at.
pub fn keep(value: Datum, type_oid: pg_sys::Oid, home: pg_sys::MemoryContext) -> (Datum, usize) {
    // SAFETY: the value has this type.
    unsafe {
        let (mut len, mut by_value) = (0i16, false);
        pg_sys::get_typlenbyval(type_oid, &mut len, &mut by_value);
        let caller = pg_sys::MemoryContextSwitchTo(home);
        let kept = match len {
            -1 => {
                let plain = pg_sys::pg_detoast_datum_copy(value.cast_mut_ptr());
                (Datum::from(plain), pgrx::varsize_any(plain))
            }
            _ => {
                let copy = pg_sys::ffi::pg_guard_ffi_boundary(|| exec::copy(value, by_value, len));
                (copy, usize::try_from(len).unwrap_or(0))
            }
        };
        pg_sys::MemoryContextSwitchTo(caller);
        kept
    }
}

/// True for arrays of numbers.
pub fn is_array(type_oid: pg_sys::Oid) -> bool {
    matches!(
        type_oid,
        pg_sys::FLOAT4ARRAYOID
            | pg_sys::FLOAT8ARRAYOID
            | pg_sys::INT2ARRAYOID
            | pg_sys::INT4ARRAYOID
            | pg_sys::INT8ARRAYOID
            | pg_sys::NUMERICARRAYOID
    )
}

/// True for types of numbers; a boolean is 0 or 1.
pub fn is_number(type_oid: pg_sys::Oid) -> bool {
    matches!(
        type_oid,
        pg_sys::BOOLOID
            | pg_sys::FLOAT4OID
            | pg_sys::FLOAT8OID
            | pg_sys::INT2OID
            | pg_sys::INT4OID
            | pg_sys::INT8OID
            | pg_sys::NUMERICOID
    )
}

/// Gives a number, or an array of them, of a type for which [`is_number`] or [`is_array`] holds.
pub fn numbers(value: Datum, type_oid: pg_sys::Oid, give: impl FnOnce(&mut dyn Iterator<Item = f64>)) {
    // SAFETY: the value has this type.
    unsafe {
        match type_oid {
            pg_sys::BOOLOID => give(&mut bool::from_datum(value, false).map(f64::from).into_iter()),
            pg_sys::FLOAT4OID => give(&mut f32::from_datum(value, false).map(f64::from).into_iter()),
            pg_sys::FLOAT8OID => give(&mut f64::from_datum(value, false).into_iter()),
            pg_sys::INT2OID => give(&mut i16::from_datum(value, false).map(f64::from).into_iter()),
            pg_sys::INT4OID => give(&mut i32::from_datum(value, false).map(f64::from).into_iter()),
            pg_sys::INT8OID => give(&mut i64::from_datum(value, false).map(|number| number as f64).into_iter()),
            pg_sys::FLOAT4ARRAYOID => {
                array::with_elements::<f32, _>(value, |_, v| give(&mut v.iter().copied().map(f64::from)));
            }
            pg_sys::FLOAT8ARRAYOID => array::with_elements::<f64, _>(value, |_, v| give(&mut v.iter().copied())),
            other => {
                let text = text(value, other);
                let literal = if is_array(other) { text } else { format!("{{{text}}}") };
                array::with_elements::<f64, _>(array::parse_f64(&literal), |_, v| give(&mut v.iter().copied()));
            }
        }
    }
}

/// The text form of a value of a type.
pub fn text(value: Datum, type_oid: pg_sys::Oid) -> String {
    // SAFETY: the type's own output function; the string is palloc'd.
    unsafe {
        let (mut output, mut varlena) = (pg_sys::InvalidOid, false);
        pg_sys::getTypeOutputInfo(type_oid, &mut output, &mut varlena);
        let text = pg_sys::OidOutputFunctionCall(output, value);
        std::ffi::CStr::from_ptr(text).to_string_lossy().into_owned()
    }
}
