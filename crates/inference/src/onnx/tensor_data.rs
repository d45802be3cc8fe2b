//! The data of one `TensorProto`.
//!
//! Responsible for: giving a tensor's elements as little-endian bytes, whichever of the fields they stand in, or
//! wherever outside the model.
//!
//! Invariants:
//! - there are as many bytes as dimensions and type say;
//! - nothing is allocated by a number from the file: data that are converted take at most 8 times their bytes in
//!   the file, and external data are read in pieces;
//! - `raw_data`, `float_data` and `double_data` are not copied when they stand in one piece.
//!
//! Source: the comments on the data fields of `TensorProto` in onnx.proto3.

use super::external::ExternalData;
use super::source::{Source, damaged, reserve};
use super::tensor_proto::{TensorProto, field};
use super::wire::{Value, read_varint};
use crate::error::ModelError;
use std::borrow::Cow;
use std::ops::Range;
use tensor_blocks::DType;

/// External data are read in pieces of this size, so that a load can be interrupted.
const EXTERNAL_PIECE: u64 = 16 << 20;

impl<'a> TensorProto<'a> {
    /// The elements as little-endian bytes, row-major; `layout` is this tensor's and fixed-width.
    pub fn data(
        &self,
        source: &Source<'a, '_>,
        (dtype, elements, bytes): (DType, u64, u64),
        external: &mut dyn ExternalData,
    ) -> Result<Cow<'a, [u8]>, ModelError> {
        let raw = self.raw.clone().filter(|raw| !raw.is_empty() || self.typed.is_none());
        let data = match (self.external, raw, &self.typed) {
            (true, None, None) => Cow::Owned(self.external_data(source, bytes, external)?),
            (true, Some(raw), None) if raw.is_empty() => Cow::Owned(self.external_data(source, bytes, external)?),
            (true, ..) => {
                return Err(self.invalid("It has data in the model and external data.".into()));
            }
            (false, Some(_), Some(_)) => {
                return Err(self.invalid("It has data in raw_data and in another field.".into()));
            }
            (false, Some(raw), None) => Cow::Borrowed(&source.bytes[raw]),
            (false, None, Some((number, total, run))) => {
                self.typed_data(source, dtype, elements, bytes, *number, *total, run.clone())?
            }
            (false, None, None) => Cow::Borrowed(&[][..]),
        };
        if data.len() as u64 != bytes {
            return Err(self.invalid(format!(
                "Its dimensions {:?} and type {dtype} ask for {bytes} bytes of data; it has {}.",
                self.dims,
                data.len()
            )));
        }
        if dtype == DType::Bool {
            for part in data.chunks(1 << 20) {
                source.advance(part.len())?;
                if let Some(byte) = part.iter().find(|&&byte| byte > 1) {
                    return Err(self.invalid(format!("It is of type bool and has the value {byte}.")));
                }
            }
        }
        Ok(data)
    }

    fn external_data(
        &self,
        source: &Source<'a, '_>,
        bytes: u64,
        external: &mut dyn ExternalData,
    ) -> Result<Vec<u8>, ModelError> {
        let location = self.location.ok_or_else(|| self.invalid("Its external data have no location.".into()))?;
        let number = |key: &str, value: Option<&str>, default: u64| match value {
            None => Ok(default),
            Some(value) => value
                .parse()
                .map_err(|_| self.invalid(format!("The {key} of its external data is {value:?}, no number."))),
        };
        let offset: u64 = number("offset", self.offset, 0)?;
        let length = number("length", self.length, bytes)?;
        if length != bytes || offset.checked_add(bytes).is_none() {
            return Err(self.invalid(format!(
                "Its dimensions {:?} ask for {bytes} bytes of data; its external data have {length}, from {offset}.",
                self.dims
            )));
        }
        let mut data = Vec::new();
        while (data.len() as u64) < bytes {
            let done = data.len() as u64;
            let piece = EXTERNAL_PIECE.min(bytes - done);
            let read = external.read(location, offset + done, Some(piece))?;
            if read.len() as u64 != piece {
                return Err(ModelError::internal(format!(
                    "external data gave {} bytes instead of {piece}",
                    read.len()
                )));
            }
            source.advance(read.len())?;
            if data.is_empty() {
                data = read;
            } else {
                reserve(&mut data, read.len())?;
                data.extend_from_slice(&read);
            }
        }
        Ok(data)
    }

    #[allow(clippy::too_many_arguments)]
    fn typed_data(
        &self,
        source: &Source<'a, '_>,
        dtype: DType,
        elements: u64,
        bytes: u64,
        number: u32,
        total: usize,
        run: Option<Range<usize>>,
    ) -> Result<Cow<'a, [u8]>, ModelError> {
        let store = Store::of(dtype, number)
            .ok_or_else(|| self.invalid(format!("Its type is {dtype}, its data stand in field {number}.")))?;
        if let (Store::Plain, Some(run)) = (store, run) {
            return Ok(Cow::Borrowed(&source.bytes[run]));
        }
        // A stored value gives one element, or one byte of elements narrower than a byte, and takes a byte at least.
        let values = if dtype.is_packed() { bytes } else { elements };
        if store != Store::Plain && values > total as u64 {
            return Err(self.invalid(format!(
                "Its dimensions {:?} ask for {values} values; field {number} has {total} bytes.",
                self.dims
            )));
        }
        let room = (bytes as usize).min(total.saturating_mul(8));
        let mut out = Vec::new();
        reserve(&mut out, room)?;
        for field in source.fields(self.body.clone(), "TensorProto") {
            let field = field?;
            if field.number != number {
                continue;
            }
            match field.value {
                Value::Fixed32(value) => out.extend_from_slice(&value.to_le_bytes()),
                Value::Fixed64(value) => out.extend_from_slice(&value.to_le_bytes()),
                Value::Bytes(span) if store == Store::Plain => out.extend_from_slice(&source.bytes[span]),
                Value::Varint(value) => self.push(&mut out, store, value)?,
                Value::Bytes(span) => {
                    let (packed, mut at) = (&source.bytes[..span.end], span.start);
                    while at < span.end && out.len() as u64 <= bytes {
                        let value = read_varint(packed, &mut at);
                        self.push(&mut out, store, value.map_err(|error| damaged(error, "TensorProto"))?)?;
                        source.advance(1)?;
                    }
                }
            }
            if out.len() as u64 > bytes {
                break;
            }
        }
        Ok(Cow::Owned(out))
    }

    fn push(&self, out: &mut Vec<u8>, store: Store, value: u64) -> Result<(), ModelError> {
        let Store::Integers { width, min, max } = store else {
            return Err(self.invalid("Its data field has the wrong wire type.".into()));
        };
        // An int32 stands on the wire with the sign of its 64 bits; all but uint64 fit i64.
        if width < 8 {
            let value = value as i64;
            if value < min || value > max {
                return Err(self.invalid(format!("It has the value {value}, which is not in {min} to {max}.")));
            }
        }
        out.extend_from_slice(&value.to_le_bytes()[..width]);
        Ok(())
    }
}

/// How the values of a typed data field become bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Store {
    /// As they are: IEEE numbers of 4 or 8 bytes.
    Plain,
    /// Varints, stored in `width` bytes.
    Integers { width: usize, min: i64, max: i64 },
}

impl Store {
    /// The way from this field to this type; none if the field is not for the type.
    fn of(dtype: DType, number: u32) -> Option<Store> {
        let integers = |width, min: i64, max: i64| Some(Store::Integers { width, min, max });
        // Bit patterns: written zero-extended as ONNX says, or sign-extended as some writers do.
        let pattern8 = || integers(1, i64::from(i8::MIN), i64::from(u8::MAX));
        let pattern16 = || integers(2, i64::from(i16::MIN), i64::from(u16::MAX));
        match (number, dtype) {
            (field::FLOAT_DATA, DType::Float32 | DType::Complex64) => Some(Store::Plain),
            (field::DOUBLE_DATA, DType::Float64 | DType::Complex128) => Some(Store::Plain),
            (field::INT64_DATA, DType::Int64) => integers(8, i64::MIN, i64::MAX),
            (field::UINT64_DATA, DType::UInt64) => integers(8, i64::MIN, i64::MAX),
            (field::UINT64_DATA, DType::UInt32) => integers(4, 0, i64::from(u32::MAX)),
            (field::INT32_DATA, dtype) => match dtype {
                DType::Int32 => integers(4, i64::from(i32::MIN), i64::from(i32::MAX)),
                DType::Int16 => integers(2, i64::from(i16::MIN), i64::from(i16::MAX)),
                DType::UInt16 => integers(2, 0, i64::from(u16::MAX)),
                DType::Int8 => integers(1, i64::from(i8::MIN), i64::from(i8::MAX)),
                DType::UInt8 => integers(1, 0, i64::from(u8::MAX)),
                DType::Bool => integers(1, 0, 1),
                DType::Float16 | DType::BFloat16 => pattern16(),
                DType::Float8E4M3FN
                | DType::Float8E4M3FNUZ
                | DType::Float8E5M2
                | DType::Float8E5M2FNUZ
                | DType::Float8E8M0
                | DType::UInt4
                | DType::Int4
                | DType::Float4E2M1
                | DType::UInt2
                | DType::Int2 => pattern8(),
                _ => None,
            },
            _ => None,
        }
    }
}
