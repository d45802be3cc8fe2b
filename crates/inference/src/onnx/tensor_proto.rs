//! One `TensorProto` on the wire.
//!
//! Responsible for: reading a tensor's header, checking dimensions and type, and writing the tensor without its data.
//! The data are read in `tensor_data`.
//!
//! Invariant: a parsed tensor has data in at most one typed field; its dimensions are not negative.
//!
//! Source: `TensorProto` in onnx.proto3.

use super::source::{Source, damaged, wrong_wire_type};
use super::wire::{Field, Rope, Value, read_varint};
use crate::error::ModelError;
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
    /// The message without its key and length.
    pub body: Range<usize>,
    pub name: &'a str,
    pub dims: Vec<u64>,
    code: i32,
    pub(super) raw: Option<Range<usize>>,
    /// The typed data field that is not empty, its bytes in all, and its range if it is one packed run.
    pub(super) typed: Option<(u32, usize, Option<Range<usize>>)>,
    pub(super) external: bool,
    pub(super) location: Option<&'a str>,
    pub(super) offset: Option<&'a str>,
    pub(super) length: Option<&'a str>,
}

impl<'a> TensorProto<'a> {
    /// Reads the header of the message that is `body`.
    pub fn parse(source: &Source<'a, '_>, body: Range<usize>) -> Result<TensorProto<'a>, ModelError> {
        let mut tensor = TensorProto {
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
        for field in source.fields(body, "TensorProto") {
            let field = field?;
            match (field.number, &field.value) {
                (field::DIMS, Value::Varint(dim)) => tensor.dim(*dim)?,
                (field::DIMS, Value::Bytes(span)) => {
                    let mut at = span.start;
                    while at < span.end {
                        let dim = read_varint(&source.bytes[..span.end], &mut at);
                        tensor.dim(dim.map_err(|error| damaged(error, "TensorProto"))?)?;
                    }
                }
                (field::DATA_TYPE, Value::Varint(code)) => tensor.code = *code as i32,
                (field::NAME, Value::Bytes(span)) => tensor.name = source.text(span, "tensor name")?,
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
                (field::EXTERNAL_DATA, Value::Bytes(span)) => tensor.external_entry(source, span.clone())?,
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
    fn external_entry(&mut self, source: &Source<'a, '_>, span: Range<usize>) -> Result<(), ModelError> {
        let (mut key, mut value) = ("", "");
        for field in source.fields(span, "StringStringEntryProto") {
            let field = field?;
            match (field.number, &field.value) {
                (1, Value::Bytes(span)) => key = source.text(span, "key of external data")?,
                (2, Value::Bytes(span)) => value = source.text(span, "value of external data")?,
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
        source: &Source<'a, '_>,
        rope: &mut Rope,
        number: u32,
        place: u32,
        insert: impl FnOnce(&mut Rope),
    ) -> Result<(), ModelError> {
        let mut insert = Some(insert);
        rope.begin(number);
        for field in source.fields(self.body.clone(), "TensorProto") {
            let field = field?;
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
    pub fn check_strings(&self, source: &Source<'a, '_>, elements: u64) -> Result<(), ModelError> {
        if self.external {
            return Err(ModelError::unsupported_type(format!("tensor \"{}\" is not supported", self.name))
                .detail("It has strings as external data."));
        }
        let mut strings = 0;
        for field in source.fields(self.body.clone(), "TensorProto") {
            let field = field?;
            strings += u64::from(field.number == field::STRING_DATA);
        }
        let other = self.typed.as_ref().is_some_and(|(number, ..)| *number != field::STRING_DATA);
        if strings != elements || other || self.raw.is_some() {
            return Err(
                self.invalid(format!("It has {strings} strings; its dimensions {:?} ask for {elements}.", self.dims))
            );
        }
        Ok(())
    }
}
