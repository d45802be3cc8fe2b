pub mod error;
pub mod onnx;
pub mod array;
pub mod json;
pub mod plan;
pub mod signature;
pub mod tensor;
pub mod worker;
