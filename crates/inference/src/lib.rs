//! ONNX models without PostgreSQL: split into a graph and tensors, compiled to plans, run.
//!
//! - [`onnx`]: the file format at the wire level, [`onnx::strip`] and [`onnx::merge`];
//! - [`plan`]: a stored graph and its tensors compiled by tract, and run;
//! - [`kernels`]: the arithmetic of operators of our own;
//! - [`net`]: feed-forward nets that run with tensors from outside, for sets of many models of one architecture;
//! - [`weights`]: tensors that lie in blocks outside of plans;
//! - [`worker`]: the thread on which long work runs while its caller stays interruptible;
//! - [`remote`]: runs there whose blocks come from the calling thread;
//! - [`json`] and [`array`]: tensors from and to what SQL has;
//! - [`signature`], [`tensor`], [`error`]: the words they share.
//!
//! Invariants: no panic, abort or file access whatever a model or an input contains; errors carry a kind, a message, a
//! detail and a hint; nothing here calls PostgreSQL.

pub mod array;
pub mod error;
pub mod json;
pub mod kernels;
pub mod net;
pub mod onnx;
pub mod plan;
pub mod remote;
pub mod signature;
pub mod tensor;
pub mod weights;
pub mod worker;
