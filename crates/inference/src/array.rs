//! Rows of numbers into tensors, and tensors into rows.
//!
//! Responsible for: the plain SQL interface, in which a model takes rows of `real[]` and gives rows of `real[]`.
//! The hot path is float32 rows into a float32 input and back: one copy, no detour through float64.
//!
//! Invariants: a value that the element type cannot hold is an error and never changed silently, save for rounding
//! to a narrower floating-point type.

use crate::error::ModelError;
use crate::signature::{Dim, Port, PortType};
use crate::tensor::{HostTensor, TensorData, element_count};
use tensor_blocks::DType;
use tract_onnx::tract_core::internal::f16;

/// A number that a row can be made of: `f32`, `f64`, `i32` or `i64`.
pub trait Element: Copy + Send + Sync + 'static {
    /// The value in float64; integers beyond 2^53 are rounded.
    fn to_f64(self) -> f64;
    /// The value in float32.
    fn to_f32(self) -> f32;
    /// The value as an integer; none for floating-point types.
    fn to_i64(self) -> Option<i64>;
    /// The value of these bytes, as many as the type has, in the machine's order.
    fn of_bytes(bytes: &[u8]) -> Self;
    /// Whether the type is float32.
    const AS_FLOAT32: bool = false;
}

macro_rules! elements {
    ($($type:ty, $float32:literal, $integer:expr;)*) => {
        $(impl Element for $type {
            const AS_FLOAT32: bool = $float32;
            fn of_bytes(bytes: &[u8]) -> $type {
                bytes.try_into().map_or(<$type>::default(), <$type>::from_ne_bytes)
            }
            fn to_f64(self) -> f64 {
                self as f64
            }
            fn to_f32(self) -> f32 {
                self as f32
            }
            fn to_i64(self) -> Option<i64> {
                let integer: fn($type) -> Option<i64> = $integer;
                integer(self)
            }
        })*
    };
}

elements! {
    f32, true, |_| None;
    f64, false, |_| None;
    i32, false, |value| Some(i64::from(value));
    i64, false, Some;
}

/// The shape that `rows` rows of `width` values take in this port. The first dimension counts rows where it is free
/// or equals `rows`; a single row may also be the whole tensor.
///
/// # Errors
/// `InvalidInput` that says what the port takes.
pub fn shape_for(port: &Port, rows: usize, width: usize) -> Result<Vec<usize>, ModelError> {
    let misfit = |what: String| {
        ModelError::invalid_input(what)
            .detail(format!(
                "Input \"{}\" is {}; {rows} rows of {width} values were given.",
                port.name,
                port.type_text()
            ))
            .hint("Give one row with as many values as the input has, or several rows as a two-dimensional array.")
    };
    let total = rows
        .checked_mul(width)
        .ok_or_else(|| ModelError::too_large(format!("{rows} rows of {width} values are too many")))?;
    if !port.ranked {
        return Ok(vec![rows, width]);
    }
    let fixed = |dim: &Dim| match dim {
        Dim::Fixed(size) => usize::try_from(*size).ok(),
        _ => None,
    };
    let sizes: Vec<Option<usize>> = port.shape.iter().map(fixed).collect();
    // Fills the free dimensions of `free` so that they hold `count` elements: at most one can be found that way.
    let fill = |free: &[Option<usize>], count: usize| -> Option<Vec<usize>> {
        let known = free.iter().flatten().try_fold(1usize, |product, size| product.checked_mul(*size))?;
        let missing = free.iter().filter(|size| size.is_none()).count();
        let found = match missing {
            0 if known == count => 0,
            1 if known > 0 && count.is_multiple_of(known) => count / known,
            _ => return None,
        };
        Some(free.iter().map(|size| size.unwrap_or(found)).collect())
    };
    let wrong_length = || {
        let per_row: Option<usize> = sizes
            .get(1..)
            .unwrap_or(&[])
            .iter()
            .copied()
            .try_fold(1usize, |product, size| size.and_then(|size| product.checked_mul(size)));
        match per_row {
            Some(wanted) if wanted != width => {
                misfit(format!("input \"{}\" takes {wanted} values per row, not {width}", port.name))
            }
            None if sizes.iter().skip(1).filter(|size| size.is_none()).count() > 1 => {
                misfit(format!("the shape of input \"{}\" does not follow from the number of values", port.name))
                    .hint("Give the input as JSON: nested arrays say the shape.")
            }
            _ => misfit(format!("{rows} rows of {width} values do not fit input \"{}\"", port.name)),
        }
    };
    let by_rows = match sizes.first() {
        None => None,
        Some(first) if first.is_none_or(|first| first == rows) => {
            // A one-dimensional input has no room for a row of several values: it takes the row as a whole.
            if sizes.len() == 1 && width != 1 {
                None
            } else {
                fill(&sizes[1..], width).map(|rest| [vec![rows], rest].concat())
            }
        }
        Some(_) => None,
    };
    if let Some(shape) = by_rows {
        return Ok(shape);
    }
    // One row that is the whole tensor: a scalar, a vector, or a tensor without a batch.
    let whole = if rows == 1 && sizes.first().is_none_or(|first| sizes.len() == 1 || first.is_some()) {
        fill(&sizes, total)
    } else {
        None
    };
    whole.ok_or_else(wrong_length)
}

/// The tensor that this port takes, from `rows` rows of `width` values each, row after row.
///
/// # Errors
/// `InvalidInput` if the rows do not fit the port or it takes strings, `NotANumber` for NaN or infinity into an
/// integer, `OutOfRange` for a value that the element type cannot hold, `UnsupportedType` for types without numbers.
pub fn from_rows<T: Element>(port: &Port, rows: usize, width: usize, values: &[T]) -> Result<HostTensor, ModelError> {
    let shape = shape_for(port, rows, width)?;
    if element_count(&shape) != Some(values.len()) {
        return Err(ModelError::invalid_input(format!(
            "{} values were given where {rows} rows of {width} were announced",
            values.len()
        )));
    }
    let PortType::Fixed(dtype) = port.dtype else {
        return Err(ModelError::invalid_input(format!("input \"{}\" takes strings, not numbers", port.name))
            .hint("Give the input as JSON."));
    };
    let raw = encode(dtype, values).map_err(|error| name_input(error, &port.name))?;
    Ok(HostTensor { dtype: port.dtype, shape, data: TensorData::Raw(raw) })
}

/// Rows for one port, gathered one by one.
#[derive(Clone, Debug, Default)]
pub struct RowBuffer {
    width: usize,
    rows: usize,
    raw: Vec<u8>,
}

impl RowBuffer {
    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Bytes of all rows.
    pub fn bytes(&self) -> usize {
        self.raw.len()
    }

    /// Forgets all rows.
    pub fn clear(&mut self) {
        (self.width, self.rows) = (0, 0);
        self.raw.clear();
    }

    /// Makes room for as many rows in all, of the width of those that are there, and for no more: memory that is not
    /// written to is not in use yet.
    pub fn reserve(&mut self, rows: usize) {
        let row = self.raw.len() / self.rows.max(1);
        self.raw.reserve_exact(row.saturating_mul(rows.saturating_sub(self.rows)));
    }

    /// Forgets the last row.
    pub fn pop(&mut self) {
        let row = self.raw.len() / self.rows.max(1);
        self.raw.truncate(self.raw.len() - row);
        self.rows = self.rows.saturating_sub(1);
    }

    /// Adds a row of numbers, given as their bytes in the machine's order. False, and nothing is added, if it does not fit the
    /// port as one row, or not with the rows that are there.
    pub fn push<T: Element>(&mut self, port: &Port, bytes: &[u8]) -> bool {
        let width = bytes.len() / size_of::<T>();
        let PortType::Fixed(dtype) = port.dtype else { return false };
        if self.rows == 0 {
            if shape_for(port, 1, width).is_err() {
                return false;
            }
            self.width = width;
        } else if width != self.width {
            return false;
        }
        if T::AS_FLOAT32 && dtype == DType::Float32 && cfg!(target_endian = "little") {
            self.raw.extend_from_slice(bytes);
        } else {
            let values: Vec<T> = bytes.chunks_exact(size_of::<T>()).map(T::of_bytes).collect();
            let Ok(raw) = encode(dtype, &values) else { return false };
            self.raw.extend_from_slice(&raw);
        }
        self.rows += 1;
        true
    }

    /// The values of these rows, for a port of float32.
    pub fn floats(&self, rows: std::ops::Range<usize>) -> Vec<f32> {
        let row = self.raw.len() / self.rows.max(1);
        let raw = &self.raw[rows.start * row..rows.end * row];
        raw.as_chunks::<4>().0.iter().map(|value| f32::from_le_bytes(*value)).collect()
    }

    /// The rows `from` to `to` as what the port takes.
    ///
    /// # Errors
    /// As [`from_rows`].
    pub fn tensor(&self, port: &Port, from: usize, to: usize) -> Result<HostTensor, ModelError> {
        let shape = shape_for(port, to - from, self.width)?;
        let row = self.raw.len() / self.rows.max(1);
        HostTensor::new(port.dtype, shape, TensorData::Raw(self.raw[from * row..to * row].to_vec()))
    }
}

pub(crate) fn name_input(mut error: ModelError, name: &str) -> ModelError {
    error.message = format!("{} in input \"{name}\"", error.message);
    error
}

/// Little-endian bytes of these numbers in this element type.
fn encode<T: Element>(dtype: DType, values: &[T]) -> Result<Vec<u8>, ModelError> {
    macro_rules! integers {
        ($type:ty) => {{
            let mut raw = Vec::with_capacity(size_of_val(values));
            for value in values {
                let integer = match value.to_i64() {
                    Some(integer) => <$type>::try_from(integer).ok(),
                    None => integral(value.to_f64(), dtype)?.and_then(|integer| <$type>::try_from(integer).ok()),
                };
                let integer = integer.ok_or_else(|| out_of_range(value.to_f64(), dtype))?;
                raw.extend_from_slice(&integer.to_le_bytes());
            }
            Ok(raw)
        }};
    }
    match dtype {
        DType::Float32 => {
            let mut raw = vec![0; values.len() * 4];
            let mut overflow = None;
            for (bytes, value) in raw.as_chunks_mut::<4>().0.iter_mut().zip(values) {
                let narrow = value.to_f32();
                if narrow.is_infinite() && value.to_f64().is_finite() {
                    overflow = Some(value.to_f64());
                }
                *bytes = narrow.to_le_bytes();
            }
            overflow.map_or(Ok(raw), |value| Err(out_of_range(value, dtype)))
        }
        DType::Float64 => Ok(values.iter().flat_map(|value| value.to_f64().to_le_bytes()).collect()),
        DType::Float16 => {
            let mut raw = Vec::with_capacity(values.len() * 2);
            for value in values {
                let narrow = f16::from_f64(value.to_f64());
                if narrow.is_infinite() && value.to_f64().is_finite() {
                    return Err(out_of_range(value.to_f64(), dtype));
                }
                raw.extend_from_slice(&narrow.to_le_bytes());
            }
            Ok(raw)
        }
        DType::Bool => values
            .iter()
            .map(|value| match value.to_f64() {
                0.0 => Ok(0),
                1.0 => Ok(1),
                other if other.is_finite() => Err(out_of_range(other, dtype)),
                other => Err(not_a_number(other, dtype)),
            })
            .collect(),
        DType::Int8 => integers!(i8),
        DType::UInt8 => integers!(u8),
        DType::Int16 => integers!(i16),
        DType::UInt16 => integers!(u16),
        DType::Int32 => integers!(i32),
        DType::UInt32 => integers!(u32),
        DType::Int64 => integers!(i64),
        DType::UInt64 => integers!(u64),
        _ => Err(crate::tensor::unsupported_dtype(dtype)),
    }
}

/// The integer of this value: none beyond 128 bits' worth of any element type.
fn integral(value: f64, dtype: DType) -> Result<Option<i128>, ModelError> {
    if !value.is_finite() {
        return Err(not_a_number(value, dtype));
    }
    if value.fract() != 0.0 {
        return Err(ModelError::invalid_input(format!("the value {value} is no integer, as {dtype} takes"))
            .hint("Round the values before."));
    }
    Ok((value.abs() < 1e30).then_some(value as i128))
}

pub(crate) fn not_a_number(value: f64, dtype: DType) -> ModelError {
    ModelError::not_a_number(format!("the value {value} is no number that {dtype} has"))
        .hint("Replace or filter such values before.")
}

pub(crate) fn out_of_range(value: f64, dtype: DType) -> ModelError {
    ModelError::out_of_range(format!("the value {value} is out of range for {dtype}"))
}

/// An output as `rows` rows of float32: the width of a row, and the values row after row. Narrower types are
/// widened, wider ones rounded.
///
/// # Errors
/// `InvalidInput` if the output holds strings or does not split into that many rows.
pub fn to_rows_f32(tensor: &HostTensor, rows: usize) -> Result<(usize, Vec<f32>), ModelError> {
    let width = row_width(tensor, rows)?;
    let values = match (&tensor.data, tensor.dtype) {
        (TensorData::Raw(raw), PortType::Fixed(DType::Float32)) => {
            raw.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect()
        }
        _ => to_f64(tensor)?.into_iter().map(|value| value as f32).collect(),
    };
    Ok((width, values))
}

/// The same in float64.
///
/// # Errors
/// As [`to_rows_f32`].
pub fn to_rows_f64(tensor: &HostTensor, rows: usize) -> Result<(usize, Vec<f64>), ModelError> {
    Ok((row_width(tensor, rows)?, to_f64(tensor)?))
}

/// Values per row when an output is split into `rows` rows: its first dimension counts them, or all of it is one row.
fn row_width(tensor: &HostTensor, rows: usize) -> Result<usize, ModelError> {
    let total = tensor.len();
    if tensor.shape.first() == Some(&rows) {
        return Ok(element_count(&tensor.shape[1..]).unwrap_or(total));
    }
    if rows == 1 {
        return Ok(total);
    }
    Err(ModelError::invalid_input(format!("the output does not split into {rows} rows"))
        .detail(format!("Its shape is {:?}.", tensor.shape))
        .hint("Predict row by row, or give the inputs as JSON."))
}

/// Every element in float64.
pub(crate) fn to_f64(tensor: &HostTensor) -> Result<Vec<f64>, ModelError> {
    macro_rules! widen {
        ($raw:ident, $width:literal, $read:expr) => {
            Ok($raw.as_chunks::<$width>().0.iter().map(|bytes| $read(*bytes)).collect())
        };
    }
    let (TensorData::Raw(raw), PortType::Fixed(dtype)) = (&tensor.data, tensor.dtype) else {
        return Err(ModelError::invalid_input("the output holds strings, not numbers")
            .hint("Use the form of predict that takes and gives JSON."));
    };
    match dtype {
        DType::Float32 => widen!(raw, 4, |bytes| f64::from(f32::from_le_bytes(bytes))),
        DType::Float64 => widen!(raw, 8, f64::from_le_bytes),
        DType::Float16 => widen!(raw, 2, |bytes| f16::from_le_bytes(bytes).to_f64()),
        DType::Bool | DType::UInt8 => Ok(raw.iter().map(|&byte| f64::from(byte)).collect()),
        DType::Int8 => widen!(raw, 1, |bytes| f64::from(i8::from_le_bytes(bytes))),
        DType::Int16 => widen!(raw, 2, |bytes| f64::from(i16::from_le_bytes(bytes))),
        DType::UInt16 => widen!(raw, 2, |bytes| f64::from(u16::from_le_bytes(bytes))),
        DType::Int32 => widen!(raw, 4, |bytes| f64::from(i32::from_le_bytes(bytes))),
        DType::UInt32 => widen!(raw, 4, |bytes| f64::from(u32::from_le_bytes(bytes))),
        DType::Int64 => widen!(raw, 8, |bytes| i64::from_le_bytes(bytes) as f64),
        DType::UInt64 => widen!(raw, 8, |bytes| u64::from_le_bytes(bytes) as f64),
        _ => Err(crate::tensor::unsupported_dtype(dtype)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;

    fn port(dtype: DType, dims: &[i64]) -> Port {
        let dim = |&size: &i64| match size {
            -1 => Dim::Symbol("n".into()),
            -2 => Dim::Unknown,
            _ => Dim::Fixed(size as u64),
        };
        Port::new("x", dtype.into(), dims.iter().map(dim).collect())
    }

    #[test]
    fn shapes_follow_the_port() {
        let shape = |dims: &[i64], rows, width| shape_for(&port(DType::Float32, dims), rows, width);
        assert_eq!(shape(&[-1, 28], 3, 28), Ok(vec![3, 28]));
        assert_eq!(shape(&[-1, 28], 0, 28), Ok(vec![0, 28]));
        assert_eq!(shape(&[1, 28], 1, 28), Ok(vec![1, 28]));
        assert_eq!(shape(&[-1, 3, 2, 2], 2, 12), Ok(vec![2, 3, 2, 2]));
        assert_eq!(shape(&[-1, -2], 2, 12), Ok(vec![2, 12]));
        assert_eq!(shape(&[-1, 3, -2], 2, 12), Ok(vec![2, 3, 4]));
        assert_eq!(shape(&[], 1, 1), Ok(vec![]));
        assert_eq!(shape(&[28], 1, 28), Ok(vec![28]));
        assert_eq!(shape(&[-1], 1, 28), Ok(vec![28]));
        assert_eq!(shape(&[-1], 5, 1), Ok(vec![5]));
        assert_eq!(shape(&[3, 4], 3, 4), Ok(vec![3, 4]));
        assert_eq!(shape(&[3, 4], 1, 12), Ok(vec![3, 4]));
        for (dims, rows, width) in
            [(&[-1, 28][..], 1, 27), (&[1, 28], 2, 28), (&[-1, -1, -2], 1, 4), (&[-1, 3, -2], 1, 4), (&[], 2, 1)]
        {
            let error = shape(dims, rows, width).unwrap_err();
            assert_eq!(error.kind, ErrorKind::InvalidInput, "{dims:?} {rows} {width}");
            assert!(error.hint.is_some());
        }
        let error = shape(&[-1, 28], 1, 27).unwrap_err();
        assert_eq!(error.message, "input \"x\" takes 28 values per row, not 27");
        assert_eq!(shape(&[-1], usize::MAX, 2).unwrap_err().kind, ErrorKind::TooLarge);
    }

    #[test]
    fn float32_goes_through_unchanged() {
        let values = [1.5f32, f32::NAN, f32::INFINITY, -0.0, f32::MIN_POSITIVE / 2.0, 0.1];
        let tensor = from_rows(&port(DType::Float32, &[-1, 3]), 2, 3, &values).unwrap();
        let (width, back) = to_rows_f32(&tensor, 2).unwrap();
        assert_eq!(width, 3);
        let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
        assert_eq!(bits(&back), bits(&values));
    }

    #[test]
    fn values_that_do_not_fit_are_refused() {
        let kind = |dtype, value: f64| from_rows(&port(dtype, &[-1, 1]), 1, 1, &[value]).map_err(|error| error.kind);
        for dtype in [DType::Int64, DType::UInt8, DType::Bool] {
            assert_eq!(kind(dtype, f64::NAN).unwrap_err(), ErrorKind::NotANumber);
            assert_eq!(kind(dtype, f64::INFINITY).unwrap_err(), ErrorKind::NotANumber);
            assert_eq!(kind(dtype, 1e300).unwrap_err(), ErrorKind::OutOfRange);
        }
        assert_eq!(kind(DType::Int64, 0.5).unwrap_err(), ErrorKind::InvalidInput);
        assert_eq!(kind(DType::UInt8, -1.0).unwrap_err(), ErrorKind::OutOfRange);
        assert_eq!(kind(DType::Int64, 9_223_372_036_854_775_808.0).unwrap_err(), ErrorKind::OutOfRange);
        assert_eq!(kind(DType::Float32, 1e39).unwrap_err(), ErrorKind::OutOfRange);
        assert_eq!(kind(DType::Float16, 70000.0).unwrap_err(), ErrorKind::OutOfRange);
        assert!(kind(DType::Float32, f64::NAN).is_ok());
        assert_eq!(kind(DType::BFloat16, 1.0).unwrap_err(), ErrorKind::UnsupportedType);
        let strings = Port::new("s", PortType::String, vec![Dim::Unknown]);
        assert_eq!(from_rows(&strings, 1, 1, &[1.0]).unwrap_err().kind, ErrorKind::InvalidInput);
    }

    #[test]
    fn every_type_comes_back() {
        use DType::*;
        for dtype in [Int8, UInt8, Int16, UInt16, Int32, UInt32, Int64, UInt64, Float16, Float32, Float64] {
            let tensor = from_rows(&port(dtype, &[-1, 2]), 2, 2, &[0i64, 1, 2, 127]).unwrap();
            assert_eq!(to_rows_f64(&tensor, 2).unwrap(), (2, vec![0.0, 1.0, 2.0, 127.0]), "{dtype}");
            assert_eq!(to_rows_f32(&tensor, 1).unwrap(), (4, vec![0.0, 1.0, 2.0, 127.0]), "{dtype}");
        }
        let exact = from_rows(&port(Int64, &[-1, 1]), 1, 1, &[i64::MAX]).unwrap();
        assert_eq!(exact.data, TensorData::Raw(i64::MAX.to_le_bytes().to_vec()));
        let tensor = HostTensor::from_f32(&[3, 2], &[0.0; 6]).unwrap();
        assert_eq!(to_rows_f32(&tensor, 2).unwrap_err().kind, ErrorKind::InvalidInput);
    }
}
