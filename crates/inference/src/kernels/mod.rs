//! Kernels: the arithmetic of block operators on slices of float32, on one thread.
//!
//! Responsible for: products of matrices ([`gemm`]), convolutions ([`conv`], [`transposed`]), steps of recurrent layers ([`recurrent`]) and
//! what is applied to an output afterwards ([`epilogue`]), for any processor of the target's family: the widest vectors
//! are chosen when the process first computes.
//!
//! Invariants:
//! - no kernel knows where its operands lie, or of tract;
//! - a result depends on the processor only by rounding: sums are formed in another order;
//! - `unsafe` is confined to [`lanes`], [`levels`], [`micro`], [`rows`], [`depthwise`], [`gemm`],
//!   [`epilogue`] and the calls of [`levels`], behind functions that check what they are given once.

pub mod conv;
mod depthwise;
pub mod epilogue;
pub mod filters;
pub mod gemm;
mod lanes;
mod levels;
mod micro;
pub mod recurrent;
mod rows;
pub mod transposed;

#[cfg(test)]
pub(crate) mod tests;
