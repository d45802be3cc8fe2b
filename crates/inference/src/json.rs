//! Tensors as JSON: nested arrays in the tensor's shape.
//!
//! Responsible for: both directions between a JSON value and a tensor of a port's type. Numbers stand for numbers,
//! true and false for bools, strings for strings, and the strings "NaN", "Infinity", "-Infinity" and (inwards) "-0" for what
//! JSON's numbers, or jsonb's, lack. A scalar is the bare value.
//!
//! Invariants:
//! - nothing is converted silently: a ragged array, a wrong rank, a fraction where an integer belongs, a null or a
//!   number out of range is an error that names its place;
//! - a float32 is written with the fewest digits that read back as the same float32;
//! - nesting is bounded by the rank of the port, and where that is unknown by [`MAX_RANK`].

use crate::array::{not_a_number, out_of_range};
use crate::error::ModelError;
use crate::signature::{Dim, Port, PortType, Signature};
use crate::tensor::{HostTensor, TensorData, element_count};
use ndarray::ArrayViewD;
use serde_json::{Map, Number, Value};
use tensor_blocks::DType;
use tract_onnx::tract_core::internal::f16;

/// The deepest nesting that is read for a port of undeclared rank.
pub const MAX_RANK: usize = 16;

/// The inputs of a run from an object `{"input": nested array, ...}`. A model with one input also takes the bare
/// array. Which inputs are missing or unknown is for the plan to say; only known ones are converted.
///
/// # Errors
/// `UnknownInput` for a name that the signature lacks, else as [`tensor_from_json`].
pub fn inputs_from_json(signature: &Signature, value: &Value) -> Result<Vec<(String, HostTensor)>, ModelError> {
    match (value, signature.inputs.as_slice()) {
        (Value::Object(fields), _) => fields
            .iter()
            .map(|(name, value)| {
                let port = signature.input(name).ok_or_else(|| unknown_input(signature, name))?;
                Ok((name.clone(), tensor_from_json(port, value)?))
            })
            .collect(),
        (Value::Array(_), [port]) => Ok(vec![(port.name.clone(), tensor_from_json(port, value)?)]),
        _ => Err(ModelError::invalid_input("the inputs are no JSON object")
            .hint(format!("Give an object with one field for each of {}.", signature.inputs_text()))),
    }
}

pub(crate) fn unknown_input(signature: &Signature, name: &str) -> ModelError {
    ModelError::unknown_input(format!("the model has no input \"{name}\""))
        .hint(format!("Its inputs are {}.", signature.inputs_text()))
}

/// The outputs of a run as an object `{"output": nested array, ...}`.
///
/// # Errors
/// `UnsupportedType` for element types that have no JSON form.
pub fn outputs_to_json(outputs: &[(String, HostTensor)]) -> Result<Value, ModelError> {
    let mut fields = Map::new();
    for (name, tensor) in outputs {
        fields.insert(name.clone(), tensor_to_json(tensor)?);
    }
    Ok(Value::Object(fields))
}

/// A tensor of the port's type from nested arrays in its shape.
///
/// # Errors
/// `InvalidInput`, `NotANumber` or `OutOfRange`, with the input's name and the place in the array.
pub fn tensor_from_json(port: &Port, value: &Value) -> Result<HostTensor, ModelError> {
    let rank = if port.ranked { port.shape.len() } else { nesting(value) };
    if rank > MAX_RANK {
        return Err(misfit(port, format!("input \"{}\" is nested deeper than {MAX_RANK} arrays", port.name)));
    }
    let shape = shape_of(port, value, rank)?;
    let count = element_count(&shape)
        .ok_or_else(|| ModelError::too_large(format!("input \"{}\" has too many elements", port.name)))?;
    let mut reader = Reader { port, shape: &shape, place: Vec::with_capacity(rank) };
    let data = match port.dtype {
        PortType::String => {
            let mut strings = Vec::with_capacity(count);
            reader.read(value, 0, &mut |reader, leaf| match leaf {
                Value::String(text) => {
                    strings.push(text.clone());
                    Ok(())
                }
                other => Err(reader.wrong(other, "a string")),
            })?;
            TensorData::Strings(strings)
        }
        PortType::Fixed(dtype) => {
            let width = dtype.byte_width().ok_or_else(|| crate::tensor::unsupported_dtype(dtype))?;
            let mut raw = Vec::with_capacity(count.saturating_mul(width).min(1 << 26));
            reader.read(value, 0, &mut |reader, leaf| push(reader, dtype, leaf, &mut raw))?;
            TensorData::Raw(raw)
        }
    };
    HostTensor::new(port.dtype, shape, data)
}

/// How deep the first elements are nested.
fn nesting(mut value: &Value) -> usize {
    let mut depth = 0;
    while let Value::Array(items) = value {
        depth += 1;
        match items.first() {
            Some(first) if depth <= MAX_RANK => value = first,
            _ => break,
        }
    }
    depth
}

fn misfit(port: &Port, message: String) -> ModelError {
    ModelError::invalid_input(message).hint(format!(
        "Input \"{}\" is {}: give it as nested arrays in that shape.",
        port.name,
        port.type_text()
    ))
}

/// The shape that the first elements show; every other element is compared with it while reading.
fn shape_of(port: &Port, value: &Value, rank: usize) -> Result<Vec<usize>, ModelError> {
    let mut shape = Vec::with_capacity(rank);
    let mut level = Some(value);
    for axis in 0..rank {
        let size = match level {
            Some(Value::Array(items)) => {
                level = items.first();
                items.len()
            }
            // Behind an empty array nothing shows the other sizes: the declared ones hold, and free ones are 0.
            None => match port.shape.get(axis) {
                Some(Dim::Fixed(size)) => usize::try_from(*size).unwrap_or(usize::MAX),
                _ => 0,
            },
            Some(_) => {
                return Err(misfit(
                    port,
                    format!("input \"{}\" has {rank} dimensions, but the JSON value has {axis}", port.name),
                ));
            }
        };
        shape.push(size);
    }
    Ok(shape)
}

struct Reader<'a> {
    port: &'a Port,
    shape: &'a [usize],
    place: Vec<usize>,
}

impl Reader<'_> {
    fn read<F>(&mut self, value: &Value, axis: usize, leaf: &mut F) -> Result<(), ModelError>
    where
        F: FnMut(&Reader<'_>, &Value) -> Result<(), ModelError>,
    {
        if axis == self.shape.len() {
            return leaf(self, value);
        }
        let Value::Array(items) = value else { return Err(self.wrong(value, "an array")) };
        if items.len() != self.shape[axis] {
            return Err(misfit(
                self.port,
                format!(
                    "input \"{}\" is ragged: {} elements at {} where others have {}",
                    self.port.name,
                    items.len(),
                    self.place_text(),
                    self.shape[axis]
                ),
            ));
        }
        for (index, item) in items.iter().enumerate() {
            self.place.push(index);
            self.read(item, axis + 1, leaf)?;
            self.place.pop();
        }
        Ok(())
    }

    fn place_text(&self) -> String {
        self.place.iter().map(|index| format!("[{index}]")).collect::<String>()
    }

    fn wrong(&self, value: &Value, wanted: &str) -> ModelError {
        let found = match value {
            Value::Null => "null",
            Value::Bool(_) => "a boolean",
            Value::Number(_) => "a number",
            Value::String(_) => "a string",
            Value::Array(_) => "an array",
            Value::Object(_) => "an object",
        };
        misfit(self.port, format!("input \"{}\" has {found} at {}, where {wanted} belongs", self.port.name, self.at()))
    }

    fn at(&self) -> String {
        if self.place.is_empty() { "the top".into() } else { self.place_text() }
    }

    fn name(&self, error: ModelError) -> ModelError {
        let detail = format!("It stands at {} of input \"{}\".", self.at(), self.port.name);
        error.detail(detail)
    }
}

/// The value of a special string.
fn special(text: &str) -> Option<f64> {
    match text {
        "NaN" => Some(f64::NAN),
        "Infinity" => Some(f64::INFINITY),
        "-Infinity" => Some(f64::NEG_INFINITY),
        // jsonb keeps numbers as numeric, which has no negative zero.
        "-0" => Some(-0.0),
        _ => None,
    }
}

fn push(reader: &Reader<'_>, dtype: DType, value: &Value, raw: &mut Vec<u8>) -> Result<(), ModelError> {
    let float = || match value {
        Value::Number(number) => number.as_f64().ok_or_else(|| reader.wrong(value, "a number")),
        Value::String(text) => special(text)
            .ok_or_else(|| reader.wrong(value, "a number, or one of \"NaN\", \"Infinity\", \"-Infinity\",")),
        other => Err(reader.wrong(other, "a number")),
    };
    let fits = |value: f64, narrow_is_infinite: bool| {
        if narrow_is_infinite && value.is_finite() { Err(reader.name(out_of_range(value, dtype))) } else { Ok(()) }
    };
    macro_rules! integer {
        ($type:ty) => {{
            let integer: Option<$type> = match value {
                Value::Number(number) => match (number.as_i64(), number.as_u64(), number.as_f64()) {
                    (Some(integer), _, _) => <$type>::try_from(integer).ok(),
                    (_, Some(integer), _) => <$type>::try_from(integer).ok(),
                    (_, _, Some(float)) if float.fract() != 0.0 => return Err(reader.wrong(value, "an integer")),
                    (_, _, Some(float)) if float.abs() < 1e30 => <$type>::try_from(float as i128).ok(),
                    _ => None,
                },
                Value::String(text) => match special(text) {
                    Some(float) => return Err(reader.name(not_a_number(float, dtype))),
                    None => return Err(reader.wrong(value, "an integer")),
                },
                other => return Err(reader.wrong(other, "an integer")),
            };
            let integer = integer.ok_or_else(|| {
                let float = value.as_f64().unwrap_or(f64::INFINITY);
                reader.name(out_of_range(float, dtype))
            })?;
            raw.extend_from_slice(&integer.to_le_bytes());
        }};
    }
    match dtype {
        DType::Float32 => {
            let wide = float()?;
            let narrow = wide as f32;
            fits(wide, narrow.is_infinite())?;
            raw.extend_from_slice(&narrow.to_le_bytes());
        }
        DType::Float64 => raw.extend_from_slice(&float()?.to_le_bytes()),
        DType::Float16 => {
            let wide = float()?;
            let narrow = f16::from_f64(wide);
            fits(wide, narrow.is_infinite())?;
            raw.extend_from_slice(&narrow.to_le_bytes());
        }
        DType::Bool => match value {
            Value::Bool(truth) => raw.push(u8::from(*truth)),
            other => return Err(reader.wrong(other, "a boolean")),
        },
        DType::Int8 => integer!(i8),
        DType::UInt8 => integer!(u8),
        DType::Int16 => integer!(i16),
        DType::UInt16 => integer!(u16),
        DType::Int32 => integer!(i32),
        DType::UInt32 => integer!(u32),
        DType::Int64 => integer!(i64),
        DType::UInt64 => integer!(u64),
        _ => return Err(crate::tensor::unsupported_dtype(dtype)),
    }
    Ok(())
}

/// Nested arrays of a tensor's elements.
///
/// # Errors
/// `UnsupportedType` for element types that have no JSON form.
pub fn tensor_to_json(tensor: &HostTensor) -> Result<Value, ModelError> {
    let leaves: Vec<Value> = match (&tensor.data, tensor.dtype) {
        (TensorData::Strings(strings), _) => strings.iter().cloned().map(Value::String).collect(),
        (TensorData::Raw(raw), PortType::Fixed(dtype)) => numbers(dtype, raw)?,
        _ => return Err(ModelError::internal("a tensor of strings holds numbers")),
    };
    let nested = ArrayViewD::from_shape(tensor.shape.as_slice(), &leaves)
        .map_err(|e| ModelError::internal("a tensor's elements do not fill its shape").detail(e.to_string()))?;
    Ok(nest(nested))
}

fn nest(values: ArrayViewD<'_, Value>) -> Value {
    match values.ndim() {
        0 => values.first().cloned().unwrap_or(Value::Null),
        _ => Value::Array(values.outer_iter().map(nest).collect()),
    }
}

fn numbers(dtype: DType, raw: &[u8]) -> Result<Vec<Value>, ModelError> {
    macro_rules! integers {
        ($type:ty, $width:literal) => {
            raw.as_chunks::<$width>().0.iter().map(|bytes| <$type>::from_le_bytes(*bytes).into()).collect()
        };
    }
    Ok(match dtype {
        DType::Bool => raw.iter().map(|&byte| Value::Bool(byte != 0)).collect(),
        DType::Float32 => raw.as_chunks::<4>().0.iter().map(|bytes| shortest(f32::from_le_bytes(*bytes))).collect(),
        DType::Float16 => {
            raw.as_chunks::<2>().0.iter().map(|bytes| shortest(f16::from_le_bytes(*bytes).to_f32())).collect()
        }
        DType::Float64 => raw.as_chunks::<8>().0.iter().map(|bytes| number(f64::from_le_bytes(*bytes))).collect(),
        DType::Int8 => integers!(i8, 1),
        DType::UInt8 => integers!(u8, 1),
        DType::Int16 => integers!(i16, 2),
        DType::UInt16 => integers!(u16, 2),
        DType::Int32 => integers!(i32, 4),
        DType::UInt32 => integers!(u32, 4),
        DType::Int64 => integers!(i64, 8),
        DType::UInt64 => integers!(u64, 8),
        _ => return Err(crate::tensor::unsupported_dtype(dtype)),
    })
}

fn number(value: f64) -> Value {
    match Number::from_f64(value) {
        Some(number) => Value::Number(number),
        None if value.is_nan() => Value::String("NaN".into()),
        None if value > 0.0 => Value::String("Infinity".into()),
        None => Value::String("-Infinity".into()),
    }
}

/// The float64 that is written with the digits that suffice for this float32: 0.1 and not 0.10000000149011612.
fn shortest(value: f32) -> Value {
    let wide = f64::from(value);
    let written =
        if value.is_finite() && value.fract() != 0.0 { format!("{value:e}").parse().unwrap_or(wide) } else { wide };
    number(written)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;
    use serde_json::json;

    fn port(dtype: impl Into<PortType>, rank: usize) -> Port {
        Port::new("x", dtype.into(), vec![Dim::Unknown; rank])
    }

    fn error(port: &Port, value: Value) -> ModelError {
        tensor_from_json(port, &value).unwrap_err()
    }

    #[test]
    fn numbers_come_back() {
        use DType::*;
        for dtype in [Int8, UInt8, Int16, UInt16, Int32, UInt32, Int64, UInt64] {
            let value = json!([[1, 2, 3], [4, 5, 127]]);
            let tensor = tensor_from_json(&port(dtype, 2), &value).unwrap();
            assert_eq!(tensor.shape, [2, 3]);
            assert_eq!(tensor_to_json(&tensor).unwrap(), value, "{dtype}");
        }
        let value = json!([i64::MIN, i64::MAX, -1]);
        assert_eq!(tensor_to_json(&tensor_from_json(&port(Int64, 1), &value).unwrap()).unwrap(), value);
        let value = json!([u64::MAX, 0]);
        assert_eq!(tensor_to_json(&tensor_from_json(&port(UInt64, 1), &value).unwrap()).unwrap(), value);
        // An integral float is an integer, as jsonb does not tell them apart.
        let tensor = tensor_from_json(&port(Int32, 1), &json!([2.0, 1e3])).unwrap();
        assert_eq!(tensor_to_json(&tensor).unwrap(), json!([2, 1000]));
    }

    #[test]
    fn floats_keep_their_bits_and_their_digits() {
        let value = json!([0.1, "NaN", "Infinity", "-Infinity", "-0", 1.0e-45, 3.4028235e38]);
        let tensor = tensor_from_json(&port(DType::Float32, 1), &value).unwrap();
        let floats = tensor.to_f32().unwrap();
        assert!(floats[1].is_nan() && floats[4].is_sign_negative());
        assert_eq!(floats[2], f32::INFINITY);
        assert_eq!((floats[0], floats[5].to_bits(), floats[6]), (0.1, 1, f32::MAX));
        let back = tensor_to_json(&tensor).unwrap();
        assert_eq!(back[0].to_string(), "0.1");
        assert_eq!(back[1], "NaN");
        let again = tensor_from_json(&port(DType::Float32, 1), &back).unwrap();
        let bits = |tensor: &HostTensor| tensor.to_f32().unwrap().iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        assert_eq!(bits(&again), bits(&tensor));
        for dtype in [DType::Float64, DType::Float16] {
            let value = json!([0.5, "NaN", "-Infinity", 65504.0]);
            assert_eq!(tensor_to_json(&tensor_from_json(&port(dtype, 1), &value).unwrap()).unwrap(), value);
        }
    }

    #[test]
    fn bools_strings_scalars_and_empties() {
        let value = json!([[true], [false]]);
        assert_eq!(tensor_to_json(&tensor_from_json(&port(DType::Bool, 2), &value).unwrap()).unwrap(), value);
        let value = json!(["a", "NaN", ""]);
        assert_eq!(tensor_to_json(&tensor_from_json(&port(PortType::String, 1), &value).unwrap()).unwrap(), value);
        let tensor = tensor_from_json(&port(DType::Float32, 0), &json!(2.5)).unwrap();
        assert_eq!((tensor.shape.len(), tensor_to_json(&tensor).unwrap()), (0, json!(2.5)));
        let fixed = Port::new("x", DType::Float32.into(), vec![Dim::Unknown, Dim::Fixed(3)]);
        assert_eq!(tensor_from_json(&fixed, &json!([])).unwrap().shape, [0, 3]);
        assert_eq!(tensor_from_json(&port(DType::Float32, 2), &json!([[], []])).unwrap().shape, [2, 0]);
        let mut unranked = port(DType::Int64, 0);
        unranked.ranked = false;
        assert_eq!(tensor_from_json(&unranked, &json!([[[1], [2]]])).unwrap().shape, [1, 2, 1]);
        assert_eq!(tensor_from_json(&unranked, &json!(1)).unwrap().shape.len(), 0);
        let mut deep = json!(1);
        for _ in 0..40 {
            deep = Value::Array(vec![deep]);
        }
        assert_eq!(error(&unranked, deep).kind, ErrorKind::InvalidInput);
    }

    #[test]
    fn misfits_are_refused_with_their_place() {
        use ErrorKind::*;
        let float = port(DType::Float32, 2);
        let ragged = error(&float, json!([[1, 2], [3]]));
        assert_eq!((ragged.kind, ragged.message.contains("ragged: 1 elements at [1]")), (InvalidInput, true));
        let int = port(DType::Int64, 1);
        for (port, value, kind) in [
            (&float, json!([1, 2]), InvalidInput),
            (&float, json!([[[1]]]), InvalidInput),
            (&float, json!([[null]]), InvalidInput),
            (&float, json!([[true]]), InvalidInput),
            (&float, json!([["one"]]), InvalidInput),
            (&float, json!([[1e39]]), OutOfRange),
            (&int, json!([1.5]), InvalidInput),
            (&int, json!(["1"]), InvalidInput),
            (&int, json!(["NaN"]), NotANumber),
            (&int, json!([1e25]), OutOfRange),
            (&int, json!([u64::MAX]), OutOfRange),
            (&port(DType::UInt8, 1), json!([256]), OutOfRange),
            (&port(DType::UInt8, 1), json!([-1]), OutOfRange),
            (&port(DType::Bool, 1), json!([1]), InvalidInput),
            (&port(PortType::String, 1), json!([1]), InvalidInput),
            (&port(DType::BFloat16, 1), json!([1]), UnsupportedType),
        ] {
            assert_eq!(error(port, value.clone()).kind, kind, "{value}");
        }
        assert!(error(&int, json!([1, 2, 3.5])).message.contains("[2]"));
    }

    #[test]
    fn objects_name_inputs() {
        let signature = Signature {
            inputs: vec![port(DType::Float32, 1)],
            outputs: vec![],
            opsets: vec![],
            ir_version: 8,
            producer: String::new(),
        };
        assert_eq!(inputs_from_json(&signature, &json!({"x": [1]})).unwrap()[0].0, "x");
        assert_eq!(inputs_from_json(&signature, &json!([1])).unwrap()[0].1.shape, [1]);
        assert_eq!(inputs_from_json(&signature, &json!({"y": [1]})).unwrap_err().kind, ErrorKind::UnknownInput);
        assert_eq!(inputs_from_json(&signature, &json!(1)).unwrap_err().kind, ErrorKind::InvalidInput);
        let outputs = vec![("y".to_owned(), HostTensor::from_f32(&[1, 1], &[0.25]).unwrap())];
        assert_eq!(outputs_to_json(&outputs).unwrap(), json!({"y": [[0.25]]}));
    }
}
