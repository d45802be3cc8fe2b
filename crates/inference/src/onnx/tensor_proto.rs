//! One `TensorProto` on the wire.
//!
//! Responsible for: reading a tensor's header, checking that its dimensions, its type and its data agree, and giving
//! its data as little-endian bytes whatever field they stand in.
//!
//! Invariants:
//! - nothing is allocated by a number from the file: data that are converted take at most 8 times their bytes in
//!   the file, and external data are read in pieces;
//! - `raw_data`, `float_data` and `double_data` are not copied when they stand in one piece.
//!
//! Source: `TensorProto` in onnx.proto3.

use super::external::ExternalData;
use super::wire::{Field, Fields, Rope, Value, WireError, read_varint};
use crate::error::ModelError;
use std::borrow::Cow;
use std::ops::Range;
use tensor_blocks::DType;

/// Field numbers of `TensorProto`.
pub(super) mod field {
    pub const DIMS: u32 = 1;
    pub const DATA_TYPE: u32 = 2;
    pub const SEGMENT: u32 = 3;
    pub const FLOAT_DATA: u32 = 4;
    pub const INT32_DATA: u32 = 5;
    pub const STRING_DATA: u32 = 6;
    pub const INT64_DATA: u32 = 7;
    pub const NAME: u32 = 8;
    pub const RAW_DATA: u32 = 9;
    pub const DOUBLE_DATA: u32 = 10;
    pub const UINT64_DATA: u32 = 11;
    pub const EXTERNAL_DATA: u32 = 13;
    pub const DATA_LOCATION: u32 = 14;
}

/// ONNX's code of strings, the one type without a fixed width.
const STRING: i32 = 8;
/// More dimensions than NumPy takes; a block has a rank of one byte.
const MAX_RANK: usize = 64;
/// External data are read in pieces of this size, so that a load can be interrupted.
const EXTERNAL_PIECE: u64 = 16 << 20;

/// Counts the bytes that were worked through, and lets the caller interrupt every few MB.
pub(super) struct Progress<'c> {
    check: &'c mut dyn FnMut() -> Result<(), ModelError>,
    since: usize,
}

impl<'c> Progress<'c> {
    const STEP: usize = 4 << 20;

    pub fn new(check: &'c mut dyn FnMut() -> Result<(), ModelError>) -> Progress<'c> {
        Progress { check, since: 0 }
    }

    pub fn advance(&mut self, bytes: usize) -> Result<(), ModelError> {
        self.since = self.since.saturating_add(bytes);
        if self.since < Self::STEP {
            return Ok(());
        }
        self.since = 0;
        (self.check)()
    }
}

/// Makes room for `additional` more bytes, or fails with `TooLarge`.
pub(super) fn reserve(data: &mut Vec<u8>, additional: usize) -> Result<(), ModelError> {
    data.try_reserve(additional).map_err(|_| {
        ModelError::too_large("a tensor does not fit in memory").detail(format!("It needs {additional} bytes."))
    })
}

/// A wire error inside a model that is one at the outermost level.
pub(super) fn malformed(error: WireError, message: &str) -> ModelError {
    let detail = match error {
        WireError::Overrun { at, number, .. } => {
            let field = number.map_or(String::new(), |number| format!(" {number}"));
            format!("At byte {at}, field{field} of a {message} reaches past the end of its message.")
        }
        WireError::Malformed { at } => format!("At byte {at}, a {message} has a field that cannot be read."),
    };
    ModelError::invalid_model("the ONNX model is damaged").detail(detail).hint("Copy or export the model again.")
}

/// A string field as text.
pub(super) fn text<'a>(model: &'a [u8], span: &Range<usize>, what: &str) -> Result<&'a str, ModelError> {
    let bytes = &model[span.clone()];
    std::str::from_utf8(bytes).ok().filter(|text| !text.contains('\0')).ok_or_else(|| {
        ModelError::invalid_model(format!("the ONNX model has a {what} that is not text"))
            .detail(format!("At byte {}: \"{}\".", span.start, bytes[..bytes.len().min(64)].escape_ascii()))
    })
}

/// A field whose wire type is not the one that onnx.proto3 gives it.
pub(super) fn wrong_wire_type(message: &str, field: &Field) -> ModelError {
    ModelError::invalid_model("the ONNX model is damaged").detail(format!(
        "At byte {}, field {} of a {message} has the wrong wire type.",
        field.span.start, field.number
    ))
}

/// What a tensor's elements are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Layout {
    /// Fixed-width elements, `bytes` in all; fits `isize`.
    Fixed { dtype: DType, elements: u64, bytes: u64 },
    /// Strings.
    Strings { elements: u64 },
}

/// A tensor's header and the places of its data.
pub(super) struct TensorProto<'a> {
    model: &'a [u8],
    /// The message without its key and length.
    pub body: Range<usize>,
    pub name: &'a str,
    pub dims: Vec<u64>,
    code: i32,
    raw: Option<Range<usize>>,
    /// The typed data field that is not empty, its bytes in all, and its range if it is one packed run.
    typed: Option<(u32, usize, Option<Range<usize>>)>,
    external: bool,
    location: Option<&'a str>,
    offset: Option<&'a str>,
    length: Option<&'a str>,
}

impl<'a> TensorProto<'a> {
    /// Reads the header of the message that is `body` of `model`.
    pub fn parse(model: &'a [u8], body: Range<usize>) -> Result<TensorProto<'a>, ModelError> {
        let mut tensor = TensorProto {
            model,
            body: body.clone(),
            name: "",
            dims: Vec::new(),
            code: 0,
            raw: None,
            typed: None,
            external: false,
            location: None,
            offset: None,
            length: None,
        };
        for field in Fields::new(model, body) {
            let field = field.map_err(|error| malformed(error, "TensorProto"))?;
            match (field.number, &field.value) {
                (field::DIMS, Value::Varint(dim)) => tensor.dim(*dim)?,
                (field::DIMS, Value::Bytes(span)) => {
                    let mut at = span.start;
                    while at < span.end {
                        let dim = read_varint(&model[..span.end], &mut at);
                        tensor.dim(dim.map_err(|error| malformed(error, "TensorProto"))?)?;
                    }
                }
                (field::DATA_TYPE, Value::Varint(code)) => tensor.code = *code as i32,
                (field::NAME, Value::Bytes(span)) => tensor.name = text(model, span, "tensor name")?,
                (field::RAW_DATA, Value::Bytes(span)) => tensor.raw = Some(span.clone()),
                (
                    field::FLOAT_DATA
                    | field::INT32_DATA
                    | field::STRING_DATA
                    | field::INT64_DATA
                    | field::DOUBLE_DATA
                    | field::UINT64_DATA,
                    value,
                ) => tensor.typed_field(&field, value)?,
                (field::EXTERNAL_DATA, Value::Bytes(span)) => tensor.external_entry(span.clone())?,
                (field::DATA_LOCATION, Value::Varint(location)) => {
                    tensor.external = match location {
                        0 => false,
                        1 => true,
                        other => {
                            return Err(tensor.invalid(format!("Its data_location {other} is not known.")));
                        }
                    }
                }
                (field::SEGMENT, _) => {
                    return Err(tensor.invalid("It is a segment of a tensor, which ONNX readers do not take.".into()));
                }
                (1..=14, Value::Bytes(_)) if field.number == 12 => {}
                (1..=14, _) => return Err(wrong_wire_type("TensorProto", &field)),
                _ => {}
            }
        }
        Ok(tensor)
    }

    fn dim(&mut self, dim: u64) -> Result<(), ModelError> {
        if self.dims.len() == MAX_RANK {
            return Err(ModelError::too_large(format!("tensor \"{}\" has too many dimensions", self.name))
                .detail(format!("At most {MAX_RANK} are supported.")));
        }
        if dim > i64::MAX as u64 {
            return Err(self.invalid(format!("It has the negative dimension {}.", dim as i64)));
        }
        self.dims.push(dim);
        Ok(())
    }

    fn typed_field(&mut self, field: &Field, value: &Value) -> Result<(), ModelError> {
        let (bytes, run) = match value {
            Value::Bytes(span) => (span.len(), Some(span.clone())),
            Value::Varint(_) if matches!(field.number, field::INT32_DATA | field::INT64_DATA | field::UINT64_DATA) => {
                (field.span.len(), None)
            }
            Value::Fixed32(_) if field.number == field::FLOAT_DATA => (4, None),
            Value::Fixed64(_) if field.number == field::DOUBLE_DATA => (8, None),
            _ => return Err(wrong_wire_type("TensorProto", field)),
        };
        // An empty string is an element, an empty packed run is none.
        if bytes == 0 && field.number != field::STRING_DATA {
            return Ok(());
        }
        self.typed = match self.typed.take() {
            None => Some((field.number, bytes, run)),
            Some((number, before, _)) if number == field.number => Some((number, before + bytes, None)),
            Some((number, ..)) => {
                return Err(self.invalid(format!("It has data in field {number} and in field {}.", field.number)));
            }
        };
        Ok(())
    }

    /// A `StringStringEntryProto` of external_data.
    fn external_entry(&mut self, span: Range<usize>) -> Result<(), ModelError> {
        let (mut key, mut value) = ("", "");
        for field in Fields::new(self.model, span) {
            let field = field.map_err(|error| malformed(error, "StringStringEntryProto"))?;
            match (field.number, &field.value) {
                (1, Value::Bytes(span)) => key = text(self.model, span, "key of external data")?,
                (2, Value::Bytes(span)) => value = text(self.model, span, "value of external data")?,
                (1 | 2, _) => return Err(wrong_wire_type("StringStringEntryProto", &field)),
                _ => {}
            }
        }
        match key {
            "location" => self.location = Some(value),
            "offset" => self.offset = Some(value),
            "length" => self.length = Some(value),
            _ => {}
        }
        Ok(())
    }

    pub fn is_external(&self) -> bool {
        self.external
    }

    /// The location and the offset of external data, as they stand there.
    pub fn external_place(&self) -> (Option<&'a str>, Option<&'a str>) {
        (self.location, self.offset)
    }

    /// Appends field `number`: this tensor without its data and without references to external data, and what
    /// `insert` appends, in the place of a field numbered `place` in the order of numbers, in which writers write.
    pub fn rewrite(
        &self,
        rope: &mut Rope,
        number: u32,
        place: u32,
        insert: impl FnOnce(&mut Rope),
    ) -> Result<(), ModelError> {
        let mut insert = Some(insert);
        rope.begin(number);
        for field in Fields::new(self.model, self.body.clone()) {
            let field = field.map_err(|error| malformed(error, "TensorProto"))?;
            match field.number {
                field::FLOAT_DATA
                | field::INT32_DATA
                | field::STRING_DATA
                | field::INT64_DATA
                | field::RAW_DATA
                | field::DOUBLE_DATA
                | field::UINT64_DATA
                | field::EXTERNAL_DATA
                | field::DATA_LOCATION => continue,
                number if number > place => insert.take().into_iter().for_each(|insert| insert(rope)),
                _ => {}
            }
            rope.source(field.span);
        }
        insert.take().into_iter().for_each(|insert| insert(rope));
        rope.end();
        Ok(())
    }

    /// An error about this tensor.
    pub fn invalid(&self, detail: String) -> ModelError {
        ModelError::invalid_model(format!("the ONNX model has an invalid tensor \"{}\"", self.name)).detail(detail)
    }

    /// Type and size.
    pub fn layout(&self) -> Result<Layout, ModelError> {
        let too_large = || {
            ModelError::too_large(format!("tensor \"{}\" is too large", self.name))
                .detail(format!("Its dimensions are {:?}.", self.dims))
        };
        let nonzero = self.dims.iter().filter(|&&dim| dim > 0);
        let product = nonzero.copied().try_fold(1, u64::checked_mul).ok_or_else(too_large)?;
        let elements = if self.dims.contains(&0) { 0 } else { product };
        if self.code == STRING {
            return Ok(Layout::Strings { elements });
        }
        if self.code == 0 {
            return Err(self.invalid("It has no data type.".into()));
        }
        let dtype = DType::from_onnx(self.code).ok_or_else(|| {
            ModelError::unsupported_type(format!("tensor \"{}\" has an unsupported element type", self.name))
                .detail(format!("The code of its ONNX data type is {}.", self.code))
                .hint("Convert the model to an element type such as float32, float16 or int8.")
        })?;
        let bytes = dtype.byte_len(elements).filter(|&bytes| bytes <= isize::MAX as u64).ok_or_else(too_large)?;
        Ok(Layout::Fixed { dtype, elements, bytes })
    }

    /// Checks that a string tensor has as many strings as its dimensions say.
    pub fn check_strings(&self, elements: u64, progress: &mut Progress) -> Result<(), ModelError> {
        if self.external {
            return Err(ModelError::unsupported_type(format!("tensor \"{}\" is not supported", self.name))
                .detail("It has strings as external data."));
        }
        let mut strings = 0;
        for field in Fields::new(self.model, self.body.clone()) {
            let field = field.map_err(|error| malformed(error, "TensorProto"))?;
            progress.advance(field.span.len().min(64))?;
            strings += u64::from(field.number == field::STRING_DATA);
        }
        let other = self.typed.as_ref().is_some_and(|(number, ..)| *number != field::STRING_DATA);
        if strings != elements || other || self.raw.is_some() {
            return Err(self.invalid(format!(
                "It has {strings} strings; its dimensions {:?} ask for {elements}.",
                self.dims
            )));
        }
        Ok(())
    }

    /// The elements as little-endian bytes, row-major; `layout` is this tensor's and fixed-width.
    pub fn data(
        &self,
        (dtype, elements, bytes): (DType, u64, u64),
        external: &mut dyn ExternalData,
        progress: &mut Progress,
    ) -> Result<Cow<'a, [u8]>, ModelError> {
        let raw = self.raw.clone().filter(|raw| !raw.is_empty() || self.typed.is_none());
        let data = match (self.external, raw, &self.typed) {
            (true, None, None) => Cow::Owned(self.external_data(bytes, external, progress)?),
            (true, Some(raw), None) if raw.is_empty() => Cow::Owned(self.external_data(bytes, external, progress)?),
            (true, ..) => return Err(self.invalid("It has data in the model and external data.".into())),
            (false, Some(_), Some(_)) => {
                return Err(self.invalid("It has data in raw_data and in another field.".into()));
            }
            (false, Some(raw), None) => Cow::Borrowed(&self.model[raw]),
            (false, None, Some((number, total, run))) => {
                self.typed_data(dtype, elements, bytes, *number, *total, run.clone(), progress)?
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
            progress.advance(data.len())?;
            if let Some(byte) = data.iter().find(|&&byte| byte > 1) {
                return Err(self.invalid(format!("It is of type bool and has the value {byte}.")));
            }
        }
        Ok(data)
    }

    fn external_data(
        &self,
        bytes: u64,
        external: &mut dyn ExternalData,
        progress: &mut Progress,
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
            progress.advance(read.len())?;
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
        dtype: DType,
        elements: u64,
        bytes: u64,
        number: u32,
        total: usize,
        run: Option<Range<usize>>,
        progress: &mut Progress,
    ) -> Result<Cow<'a, [u8]>, ModelError> {
        let store = Store::of(dtype, number)
            .ok_or_else(|| self.invalid(format!("Its type is {dtype}, its data stand in field {number}.")))?;
        if let (Store::Plain, Some(run)) = (store, run) {
            return Ok(Cow::Borrowed(&self.model[run]));
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
        for field in Fields::new(self.model, self.body.clone()) {
            let field = field.map_err(|error| malformed(error, "TensorProto"))?;
            if field.number != number {
                continue;
            }
            match field.value {
                Value::Fixed32(value) => out.extend_from_slice(&value.to_le_bytes()),
                Value::Fixed64(value) => out.extend_from_slice(&value.to_le_bytes()),
                Value::Bytes(span) if store == Store::Plain => out.extend_from_slice(&self.model[span]),
                Value::Varint(value) => self.push(&mut out, store, value)?,
                Value::Bytes(span) => {
                    let (packed, mut at) = (&self.model[..span.end], span.start);
                    while at < span.end && out.len() as u64 <= bytes {
                        let value = read_varint(packed, &mut at);
                        self.push(&mut out, store, value.map_err(|error| malformed(error, "TensorProto"))?)?;
                        progress.advance(1)?;
                    }
                }
            }
            progress.advance(8)?;
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
