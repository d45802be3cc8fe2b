//! Tensors on their way into and out of a run.
//!
//! Responsible for: a dense tensor in plain memory and its conversion to and from the engine's.
//!
//! Invariant: fixed-width data are little-endian, row-major and exactly as long as dtype and shape say, however the
//! tensor was made: [`HostTensor::new`] checks it, and so does every use.

use crate::error::ModelError;
use crate::signature::PortType;
use tensor_blocks::DType;
use tract_onnx::prelude::tract_ndarray::ArrayD;
use tract_onnx::prelude::{Datum, DatumType, IntoTensor, Tensor, TractError};
use tract_onnx::tract_core::internal::{SymbolValues, TDim, f16};

/// The elements of a tensor.
#[derive(Clone, Debug, PartialEq)]
pub enum TensorData {
    /// Fixed-width elements: little-endian, row-major, types below a byte packed.
    Raw(Vec<u8>),
    /// Strings, row-major.
    Strings(Vec<String>),
}

/// A dense tensor in plain memory.
#[derive(Clone, Debug, PartialEq)]
pub struct HostTensor {
    /// Element type.
    pub dtype: PortType,
    /// Sizes, outermost first; empty for a scalar.
    pub shape: Vec<usize>,
    /// Elements.
    pub data: TensorData,
}

/// Number of elements of a shape; none if it does not fit.
pub(crate) fn element_count(shape: &[usize]) -> Option<usize> {
    if shape.contains(&0) {
        return Some(0);
    }
    shape.iter().try_fold(1usize, |count, &size| count.checked_mul(size))
}

impl HostTensor {
    /// A tensor whose data fit its type and shape.
    ///
    /// # Errors
    /// `InvalidInput` if data and shape disagree, `TooLarge` if the shape's product overflows.
    pub fn new(dtype: PortType, shape: Vec<usize>, data: TensorData) -> Result<HostTensor, ModelError> {
        let tensor = HostTensor { dtype, shape, data };
        tensor.check()?;
        Ok(tensor)
    }

    /// A float32 tensor.
    ///
    /// # Errors
    /// As [`new`](HostTensor::new).
    pub fn from_f32(shape: &[usize], values: &[f32]) -> Result<HostTensor, ModelError> {
        let raw = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        HostTensor::new(DType::Float32.into(), shape.to_vec(), TensorData::Raw(raw))
    }

    /// The elements of a float32 tensor; none for other types.
    pub fn to_f32(&self) -> Option<Vec<f32>> {
        match (&self.data, self.dtype) {
            (TensorData::Raw(raw), PortType::Fixed(DType::Float32)) => {
                Some(raw.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect())
            }
            _ => None,
        }
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        element_count(&self.shape).unwrap_or(usize::MAX)
    }

    /// True without elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn check(&self) -> Result<(), ModelError> {
        let overflow = || ModelError::too_large(format!("a tensor of shape {:?} has too many elements", self.shape));
        let count = element_count(&self.shape).ok_or_else(overflow)?;
        let (held, wanted) = match (&self.data, self.dtype) {
            (TensorData::Raw(raw), PortType::Fixed(dtype)) => {
                (raw.len() as u64, dtype.byte_len(count as u64).ok_or_else(overflow)?)
            }
            (TensorData::Strings(strings), PortType::String) => (strings.len() as u64, count as u64),
            _ => {
                return Err(ModelError::invalid_input(format!(
                    "the data of a tensor are not of its type {}",
                    self.dtype
                )));
            }
        };
        if held != wanted {
            return Err(ModelError::invalid_input(format!(
                "the data of a tensor do not fit its shape: {} of shape {:?}",
                self.dtype, self.shape
            ))
            .detail(format!("There are {held} bytes or strings where {wanted} are needed.")));
        }
        Ok(())
    }

    /// The engine's tensor of the same content.
    pub(crate) fn to_engine(&self) -> Result<Tensor, ModelError> {
        self.check()?;
        match (&self.data, self.dtype) {
            (TensorData::Raw(raw), PortType::Fixed(dtype)) => engine_tensor(dtype, &self.shape, raw),
            (TensorData::Strings(strings), _) => Ok(ArrayD::from_shape_vec(self.shape.clone(), strings.clone())
                .map_err(|error| ModelError::internal(format!("cannot make a tensor of strings: {error}")))?
                .into_tensor()),
            _ => unreachable!("check has compared data and type"),
        }
    }

    /// Appends a tensor along the first axis.
    ///
    /// # Errors
    /// `Internal` if it has another element type, or differs in another axis.
    pub(crate) fn append_rows(&mut self, more: HostTensor) -> Result<(), ModelError> {
        let rest = |shape: &[usize]| shape.get(1..).map(<[usize]>::to_vec);
        let fits = self.dtype == more.dtype && rest(&self.shape) == rest(&more.shape) && !self.shape.is_empty();
        match (&mut self.data, more.data) {
            (TensorData::Raw(whole), TensorData::Raw(piece)) if fits => whole.extend(piece),
            (TensorData::Strings(whole), TensorData::Strings(piece)) if fits => whole.extend(piece),
            _ => return Err(ModelError::internal("slices of a batch do not fit together")),
        }
        self.shape[0] += more.shape[0];
        Ok(())
    }

    /// A tensor that the engine has made in a run with these sizes of the free dimensions: computed shapes may still
    /// be written with their names.
    ///
    /// # Errors
    /// `UnsupportedType` for element types that ONNX does not have.
    pub(crate) fn from_engine(tensor: &Tensor, sizes: &SymbolValues) -> Result<HostTensor, ModelError> {
        let internal = |error: TractError| ModelError::internal(format!("cannot read a tensor of the engine: {error}"));
        let shape = tensor.shape().to_vec();
        if tensor.datum_type() == TDim::datum_type() {
            let view = tensor.try_as_plain_ram().map_err(internal)?;
            let dims = view.as_slice::<TDim>().map_err(internal)?;
            let values = dims.iter().map(|dim| dim.eval(sizes).to_i64()).collect::<Result<Vec<_>, _>>();
            let values = values.map_err(|error| internal(error.into()))?;
            let raw = values.iter().flat_map(|value| value.to_le_bytes()).collect();
            return HostTensor::new(DType::Int64.into(), shape, TensorData::Raw(raw));
        }
        let view = tensor.try_as_plain_ram().map_err(internal)?;
        if tensor.datum_type() == DatumType::String {
            let strings = view.as_slice::<String>().map_err(internal)?.to_vec();
            return HostTensor::new(PortType::String, shape, TensorData::Strings(strings));
        }
        let dtype = dtype_of_engine(tensor.datum_type().unquantized()).ok_or_else(|| {
            ModelError::unsupported_type(format!("the engine returned elements of type {:?}", tensor.datum_type()))
        })?;
        HostTensor::new(dtype.into(), shape, TensorData::Raw(view.as_bytes().to_vec()))
    }
}

/// The engine's name of an element type; none if it lacks the type.
pub(crate) fn engine_of_dtype(dtype: DType) -> Option<DatumType> {
    Some(match dtype {
        DType::Float32 => DatumType::F32,
        DType::UInt8 => DatumType::U8,
        DType::Int8 => DatumType::I8,
        DType::UInt16 => DatumType::U16,
        DType::Int16 => DatumType::I16,
        DType::Int32 => DatumType::I32,
        DType::Int64 => DatumType::I64,
        DType::Bool => DatumType::Bool,
        DType::Float16 => DatumType::F16,
        DType::Float64 => DatumType::F64,
        DType::UInt32 => DatumType::U32,
        DType::UInt64 => DatumType::U64,
        _ => return None,
    })
}

fn dtype_of_engine(datum_type: DatumType) -> Option<DType> {
    DType::ALL.iter().copied().find(|&dtype| engine_of_dtype(dtype) == Some(datum_type))
}

/// The engine's tensor of these little-endian row-major bytes.
///
/// # Errors
/// `UnsupportedType` if the engine lacks the type, `InvalidModel` if bytes and shape disagree.
pub(crate) fn engine_tensor(dtype: DType, shape: &[usize], raw: &[u8]) -> Result<Tensor, ModelError> {
    let datum_type = engine_of_dtype(dtype).ok_or_else(|| unsupported_dtype(dtype))?;
    let wanted = element_count(shape).and_then(|count| dtype.byte_len(count as u64));
    if wanted != Some(raw.len() as u64) {
        return Err(ModelError::invalid_model(format!(
            "{} bytes do not make a tensor of {dtype} and shape {shape:?}",
            raw.len()
        )));
    }
    macro_rules! fill {
        ($element:ty, $width:literal) => {{
            let values = raw.as_chunks::<$width>().0.iter().map(|bytes| <$element>::from_le_bytes(*bytes)).collect();
            tensor_of::<$element>(shape, values)
        }};
    }
    match datum_type {
        DatumType::F32 => fill!(f32, 4),
        DatumType::F64 => fill!(f64, 8),
        DatumType::F16 => fill!(f16, 2),
        DatumType::U8 => tensor_of(shape, raw.to_vec()),
        DatumType::U16 => fill!(u16, 2),
        DatumType::U32 => fill!(u32, 4),
        DatumType::U64 => fill!(u64, 8),
        DatumType::I8 => fill!(i8, 1),
        DatumType::I16 => fill!(i16, 2),
        DatumType::I32 => fill!(i32, 4),
        DatumType::I64 => fill!(i64, 8),
        // Any byte but 0 is true: a bool of Rust may only hold 0 or 1.
        DatumType::Bool => tensor_of(shape, raw.iter().map(|&byte| byte != 0).collect()),
        _ => Err(unsupported_dtype(dtype)),
    }
}

/// The error for an element type that the engine lacks.
pub(crate) fn unsupported_dtype(dtype: DType) -> ModelError {
    ModelError::unsupported_type(format!("element type {dtype} cannot be computed with"))
        .hint("Export the model with float32, float16, float64, bool, string or 8 to 64 bit integers.")
}

fn tensor_of<T: tract_onnx::prelude::Datum>(shape: &[usize], values: Vec<T>) -> Result<Tensor, ModelError> {
    ArrayD::from_shape_vec(shape.to_vec(), values)
        .map(IntoTensor::into_tensor)
        .map_err(|error| ModelError::internal(format!("cannot make a tensor of shape {shape:?}: {error}")))
}
