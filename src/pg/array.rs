//! Arrays of numbers: elements in place on the way in, one copy on the way out.

use super::error;
use pgrx::pg_sys;
use pgrx::prelude::*;

/// Bytes of `ArrayType` before its dimensions.
const HEADER: usize = std::mem::size_of::<pg_sys::ArrayType>();

/// An element type of fixed width without padding, and its PostgreSQL type.
pub trait Fixed: Copy {
    /// The PostgreSQL type.
    const OID: pg_sys::Oid;
}

impl Fixed for f32 {
    const OID: pg_sys::Oid = pg_sys::FLOAT4OID;
}
impl Fixed for f64 {
    const OID: pg_sys::Oid = pg_sys::FLOAT8OID;
}
impl Fixed for i32 {
    const OID: pg_sys::Oid = pg_sys::INT4OID;
}
impl Fixed for i64 {
    const OID: pg_sys::Oid = pg_sys::INT8OID;
}

/// Calls `f` with dimensions and elements of the array, row-major. Null elements are an ERROR.
pub fn with_elements<T: Fixed, R>(datum: pg_sys::Datum, f: impl FnOnce(&[usize], &[T]) -> R) -> R {
    // SAFETY: the caller's SQL declaration says that the datum is an array of T's type. Elements of such types lie without
    // gaps behind the dimensions, MAXALIGNed, when none is null; a detoasted array is at least int-aligned itself and
    // palloc'd ones MAXALIGNed, and the alignment is checked.
    unsafe {
        let original = datum.cast_mut_ptr::<pg_sys::varlena>();
        let array = pg_sys::pg_detoast_datum(original).cast::<pg_sys::ArrayType>();
        let ndim = (*array).ndim as usize;
        let dims_at = array.cast::<u8>().add(HEADER).cast::<i32>();
        let dims: Vec<usize> = (0..ndim).map(|i| dims_at.add(i).read_unaligned() as usize).collect();
        if (*array).dataoffset != 0 && pg_sys::array_contains_nulls(array) {
            error::raise(
                PgSqlErrorCode::ERRCODE_NULL_VALUE_NOT_ALLOWED,
                "array must not contain nulls",
                "",
                "Replace the nulls, for example with coalesce or array_replace.",
            );
        }
        let count = if ndim == 0 { 0 } else { dims.iter().product() };
        let offset = if (*array).dataoffset != 0 {
            (*array).dataoffset as usize
        } else {
            (HEADER + 8 * ndim).next_multiple_of(8)
        };
        let data = array.cast::<u8>().add(offset);
        let copied;
        let elements: &[T] = if data.cast::<T>().is_aligned() {
            std::slice::from_raw_parts(data.cast::<T>(), count)
        } else {
            copied = (0..count).map(|i| data.cast::<T>().add(i).read_unaligned()).collect::<Vec<T>>();
            &copied
        };
        let result = f(&dims, elements);
        if array.cast() != original {
            pg_sys::pfree(array.cast());
        }
        result
    }
}

/// One row of an array of one dimension without nulls: its elements' bytes, in place. None for any other array, and for one that
/// has to be detoasted first.
///
/// # Safety
/// `datum` points at an array of elements of `width` bytes, which lives as long as the result is used.
pub unsafe fn row_in_place<'a>(datum: pg_sys::Datum, width: usize) -> Option<&'a [u8]> {
    // SAFETY: by the contract; a short header takes three bytes less, and leaves what follows unaligned.
    unsafe {
        let start = datum.cast_mut_ptr::<u8>();
        let value = start.cast::<pg_sys::varlena>();
        // Offsets are those behind a header of four bytes.
        let (base, total) = if pgrx::varatt_is_4b_u(value) {
            (start, pgrx::varsize_4b(value))
        } else if pgrx::varatt_is_1b(value) && !pgrx::varatt_is_1b_e(value) {
            (start.wrapping_sub(3), pgrx::varsize_1b(value) + 3)
        } else {
            return None;
        };
        let word = |at: usize| base.wrapping_add(at).cast::<i32>().read_unaligned();
        if total < HEADER || word(8) != 0 {
            return None;
        }
        let (ndim, offset) = (word(4), HEADER + 8);
        if ndim == 0 {
            return Some(&[]);
        }
        if ndim != 1 || total < offset {
            return None;
        }
        let bytes = usize::try_from(word(HEADER)).ok()?.checked_mul(width)?;
        (offset + bytes <= total).then(|| std::slice::from_raw_parts(base.wrapping_add(offset), bytes))
    }
}

/// Bytes of an array of one dimension with so many values, and of what separates it from the next one.
pub fn f32_row_bytes(width: usize) -> usize {
    (HEADER + 8 + 4 * width).next_multiple_of(8)
}

/// `rows` arrays of one dimension, each of `width` values, in the current memory context; the addresses of all are given to
/// `give`, in order. The memory is one piece, in which each has its place.
pub fn rows_from_f32(values: &[f32], rows: usize, width: usize, mut give: impl FnMut(pg_sys::Datum)) {
    let stride = f32_row_bytes(width);
    if width == 0 || stride.saturating_mul(rows) > super::fmgr::MAX_ALLOC {
        for row in 0..rows {
            give(from_f32(&[width], &values[row * width..(row + 1) * width]));
        }
        return;
    }
    // SAFETY: palloc'd with room for all; each is laid out as array.h says.
    unsafe {
        let start = pg_sys::palloc(stride * rows).cast::<u8>();
        for (row, values) in values.chunks_exact(width).take(rows).enumerate() {
            let array = start.add(row * stride).cast::<pg_sys::ArrayType>();
            pgrx::set_varsize_4b(array.cast(), (HEADER + 8 + 4 * width) as i32);
            (*array).ndim = 1;
            (*array).dataoffset = 0;
            (*array).elemtype = pg_sys::FLOAT4OID;
            let dims = array.cast::<u8>().add(HEADER).cast::<i32>();
            *dims = width as i32;
            *dims.add(1) = 1;
            std::ptr::copy_nonoverlapping(values.as_ptr().cast::<u8>(), dims.add(2).cast(), 4 * width);
            give(pg_sys::Datum::from(array));
        }
    }
}

/// An array of `shape` (empty: one dimension with all values) from elements without nulls.
pub fn from_values<T: Fixed>(shape: &[usize], values: &[T]) -> pg_sys::Datum {
    if shape.len() > pg_sys::MAXDIM as usize {
        error::raise(
            PgSqlErrorCode::ERRCODE_PROGRAM_LIMIT_EXCEEDED,
            format!("an array has at most {} dimensions", pg_sys::MAXDIM),
            &format!("The value has {}.", shape.len()),
            "Ask for its bytes instead.",
        );
    }
    let one = [values.len()];
    let shape = if shape.is_empty() { &one } else { shape };
    let offset = (HEADER + 8 * shape.len()).next_multiple_of(8);
    let bytes = offset + std::mem::size_of_val(values);
    if bytes > super::fmgr::MAX_ALLOC || shape.iter().any(|&d| i32::try_from(d).is_err()) {
        error::raise(
            PgSqlErrorCode::ERRCODE_PROGRAM_LIMIT_EXCEEDED,
            "array is larger than the 1 GB that a value can have",
            &format!("It would have {bytes} bytes."),
            "Predict fewer rows at a time.",
        );
    }
    // SAFETY: palloc'd with room for header, dimensions, lower bounds and elements; laid out as array.h says.
    unsafe {
        if values.is_empty() {
            return pg_sys::Datum::from(pg_sys::construct_empty_array(T::OID));
        }
        let array = pg_sys::palloc0(bytes).cast::<pg_sys::ArrayType>();
        pgrx::set_varsize_4b(array.cast(), bytes as i32);
        (*array).ndim = shape.len() as i32;
        (*array).dataoffset = 0;
        (*array).elemtype = T::OID;
        let dims = array.cast::<u8>().add(HEADER).cast::<i32>();
        for (i, &dim) in shape.iter().enumerate() {
            *dims.add(i) = dim as i32;
            *dims.add(shape.len() + i) = 1;
        }
        let data = array.cast::<u8>().add(offset);
        std::ptr::copy_nonoverlapping(values.as_ptr().cast::<u8>(), data, std::mem::size_of_val(values));
        pg_sys::Datum::from(array)
    }
}

/// As [`from_values`], for predictions.
pub fn from_f32(shape: &[usize], values: &[f32]) -> pg_sys::Datum {
    from_values(shape, values)
}

/// Reads an array literal as `double precision[]`.
pub fn parse_f64(text: &str) -> pg_sys::Datum {
    let Ok(text) = std::ffi::CString::new(text) else {
        error::raise(
            PgSqlErrorCode::ERRCODE_INVALID_TEXT_REPRESENTATION,
            "array literal contains a zero byte",
            "",
            "Write '{1,2,3}'.",
        )
    };
    // SAFETY: the type's own input function with its own parameters.
    unsafe {
        let (mut input, mut parameter) = (pg_sys::InvalidOid, pg_sys::InvalidOid);
        pg_sys::getTypeInputInfo(pg_sys::FLOAT8ARRAYOID, &mut input, &mut parameter);
        pg_sys::OidInputFunctionCall(input, text.as_ptr().cast_mut(), parameter, -1)
    }
}
