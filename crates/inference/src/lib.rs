pub mod array;
pub mod error;
pub mod json;
pub mod onnx;
pub mod plan;
pub mod signature;
pub mod tensor;
pub mod worker;
