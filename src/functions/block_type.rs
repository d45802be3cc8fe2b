//! The type `tensor_block`: input and output, casts, accessors, comparison.

use crate::pg::fmgr::{Call, MAX_ALLOC, sql_functions, varlena_datum};
use crate::pg::varlena;
use crate::pg::{array, error};
use pgrx::pg_sys;
use pgrx::prelude::*;
use std::ffi::CStr;
use tensor_blocks::{Block, BlockError, DType};

sql_functions!(
    block_in,
    block_out,
    block_recv,
    block_send,
    block_from_real,
    block_from_double,
    block_from_bytea,
    block_from_parts,
    block_to_real,
    block_to_double,
    block_to_bytea,
    block_dtype,
    block_shape,
    block_hash,
    block_data,
    block_cmp,
    block_eq,
    block_ne,
    block_lt,
    block_le,
    block_gt,
    block_ge,
    block_hash32,
    block_id,
);

fn invalid(e: BlockError) -> ! {
    error::raise(
        match e {
            BlockError::Syntax(_) => PgSqlErrorCode::ERRCODE_INVALID_TEXT_REPRESENTATION,
            BlockError::Shape(_) | BlockError::Rank(_) => PgSqlErrorCode::ERRCODE_PROGRAM_LIMIT_EXCEEDED,
            _ => PgSqlErrorCode::ERRCODE_INVALID_BINARY_REPRESENTATION,
        },
        "invalid tensor block",
        &format!("{e}."),
        "The text form is dtype[dim,dim,...]:base64, for example float32[2]:AACAPwAAAEA=.",
    )
}

/// The value's datum.
pub fn to_datum(block: &Block<'_>) -> pg_sys::Datum {
    varlena_datum(&[&block.head(), block.data()])
}

fn arg<'c>(call: &'c Call, n: usize) -> Block<'c> {
    let bytes = call.bytes(n).unwrap_or_default();
    Block::decode(bytes).unwrap_or_else(|e| invalid(e))
}

fn block_in(call: &Call) -> pg_sys::Datum {
    let text: &CStr = call.need(0, "text");
    let text = text.to_str().unwrap_or_default();
    to_datum(&Block::parse(text).unwrap_or_else(|e| invalid(e)))
}

fn block_out(call: &Call) -> pg_sys::Datum {
    let mut text = arg(call, 0).to_string().into_bytes();
    text.push(0);
    if text.len() > MAX_ALLOC {
        error::raise(
            PgSqlErrorCode::ERRCODE_PROGRAM_LIMIT_EXCEEDED,
            "text form of the tensor block is larger than 1 GB",
            "",
            "Use the binary format, or smaller blocks.",
        );
    }
    // SAFETY: palloc'd with room for the text and its zero.
    unsafe {
        let out = pg_sys::palloc(text.len()).cast::<u8>();
        std::ptr::copy_nonoverlapping(text.as_ptr(), out, text.len());
        pg_sys::Datum::from(out)
    }
}

fn block_recv(call: &Call) -> pg_sys::Datum {
    let Some(buffer) = call.datum(0) else { return call.null() };
    // SAFETY: a receive function gets a StringInfo; everything behind the cursor is the value.
    let bytes = unsafe {
        let buffer = buffer.cast_mut_ptr::<pg_sys::StringInfoData>();
        let (cursor, len) = ((*buffer).cursor as usize, (*buffer).len as usize);
        (*buffer).cursor = (*buffer).len;
        std::slice::from_raw_parts((*buffer).data.cast::<u8>().add(cursor), len - cursor)
    };
    to_datum(&Block::decode(bytes).unwrap_or_else(|e| invalid(e)))
}

/// Binary output, and the cast to bytea: the binary form as it is stored.
fn block_send(call: &Call) -> pg_sys::Datum {
    varlena_datum(&[call.bytes(0).unwrap_or_default()])
}

fn block_to_bytea(call: &Call) -> pg_sys::Datum {
    block_send(call)
}

fn block_from_bytea(call: &Call) -> pg_sys::Datum {
    to_datum(&arg(call, 0))
}

/// A block of an array argument's elements in its shape.
fn from_array<T: array::Fixed>(call: &Call, dtype: DType) -> pg_sys::Datum {
    let Some(datum) = call.datum(0) else { return call.null() };
    array::with_elements::<T, _>(datum, |dims, values| {
        let shape = if dims.is_empty() { vec![0] } else { dims.iter().map(|&d| d as u32).collect() };
        // SAFETY: plain numbers, read as bytes. PostgreSQL and the block's form are both little-endian here.
        let bytes = unsafe { std::slice::from_raw_parts(values.as_ptr().cast::<u8>(), std::mem::size_of_val(values)) };
        to_datum(&Block::new(dtype, shape, bytes).unwrap_or_else(|e| invalid(e)))
    })
}

fn block_from_real(call: &Call) -> pg_sys::Datum {
    from_array::<f32>(call, DType::Float32)
}

fn block_from_double(call: &Call) -> pg_sys::Datum {
    from_array::<f64>(call, DType::Float64)
}

/// `tensor_block(dtype, shape, data)`.
fn block_from_parts(call: &Call) -> pg_sys::Datum {
    let name: &str = call.need(0, "dtype");
    let dims: Vec<i32> = call.need(1, "shape");
    let data = call.bytes(2).unwrap_or_default();
    let dtype = DType::from_name(name).unwrap_or_else(|| {
        error::raise(
            PgSqlErrorCode::ERRCODE_INVALID_PARAMETER_VALUE,
            format!("element type \"{name}\" is not known"),
            "",
            &format!("Types are {}.", DType::ALL.iter().map(|d| d.name()).collect::<Vec<_>>().join(", ")),
        )
    });
    let shape = dims.iter().map(|&dim| u32::try_from(dim)).collect::<Result<Vec<u32>, _>>().unwrap_or_else(|_| {
        error::raise(
            PgSqlErrorCode::ERRCODE_INVALID_PARAMETER_VALUE,
            "a dimension is negative",
            &format!("The shape is {dims:?}."),
            "Give dimensions of zero or more.",
        )
    });
    to_datum(&Block::new(dtype, shape, data).unwrap_or_else(|e| invalid(e)))
}

fn shape_of(block: &Block<'_>) -> Vec<usize> {
    block.shape().iter().map(|&d| d as usize).collect()
}

fn numbers(block: &Block<'_>) -> Vec<f64> {
    block.to_f64().unwrap_or_else(|| {
        error::raise(
            PgSqlErrorCode::ERRCODE_CANNOT_COERCE,
            format!("elements of type {} cannot be cast to numbers", block.dtype().name()),
            "",
            "Use data(block) for the plain bytes.",
        )
    })
}

fn block_to_real(call: &Call) -> pg_sys::Datum {
    let block = arg(call, 0);
    let values: Vec<f32> = numbers(&block).into_iter().map(|v| v as f32).collect();
    array::from_values(&shape_of(&block), &values)
}

fn block_to_double(call: &Call) -> pg_sys::Datum {
    let block = arg(call, 0);
    array::from_values(&shape_of(&block), &numbers(&block))
}

fn block_dtype(call: &Call) -> pg_sys::Datum {
    varlena_datum(&[arg(call, 0).dtype().name().as_bytes()])
}

fn block_shape(call: &Call) -> pg_sys::Datum {
    let dims: Vec<i32> = arg(call, 0).shape().iter().map(|&d| d as i32).collect();
    array::from_values(&[dims.len()], &dims)
}

fn block_hash(call: &Call) -> pg_sys::Datum {
    varlena_datum(&[&arg(call, 0).hash().0])
}

fn block_data(call: &Call) -> pg_sys::Datum {
    varlena_datum(&[arg(call, 0).data()])
}

fn compare(call: &Call) -> std::cmp::Ordering {
    call.bytes(0).unwrap_or_default().cmp(call.bytes(1).unwrap_or_default())
}

fn block_cmp(call: &Call) -> pg_sys::Datum {
    pg_sys::Datum::from(compare(call) as i32)
}

fn block_eq(call: &Call) -> pg_sys::Datum {
    pg_sys::Datum::from(compare(call).is_eq())
}

fn block_ne(call: &Call) -> pg_sys::Datum {
    pg_sys::Datum::from(compare(call).is_ne())
}

fn block_lt(call: &Call) -> pg_sys::Datum {
    pg_sys::Datum::from(compare(call).is_lt())
}

fn block_le(call: &Call) -> pg_sys::Datum {
    pg_sys::Datum::from(compare(call).is_le())
}

fn block_gt(call: &Call) -> pg_sys::Datum {
    pg_sys::Datum::from(compare(call).is_gt())
}

fn block_ge(call: &Call) -> pg_sys::Datum {
    pg_sys::Datum::from(compare(call).is_ge())
}

fn block_hash32(call: &Call) -> pg_sys::Datum {
    let hash = arg(call, 0).hash().0;
    pg_sys::Datum::from(i32::from_le_bytes([hash[0], hash[1], hash[2], hash[3]]))
}

/// `tessera.block_id(value)`: the number under which a table's block store has the value; NULL for a value in the row.
fn block_id(call: &Call) -> pg_sys::Datum {
    let Some(datum) = call.datum(0) else { return call.null() };
    // SAFETY: the SQL declaration admits varlena types only by their own check below; a TOAST pointer is not followed.
    match unsafe { varlena::toast_pointer(datum.cast_mut_ptr()) } {
        Some((reference, _)) => pg_sys::Datum::from(i64::from(reference.block_id)),
        None => call.null(),
    }
}
