//! Kernels: the arithmetic of block operators on slices of float32, on one thread.
//!
//! Responsible for: products of matrices ([`gemm`]), of which one may be held ready ([`dense`]), rows that are normalised
//! ([`normal`]), convolutions ([`conv`], [`transposed`]), steps of recurrent layers ([`recurrent`]) and
//! what is applied to an output afterwards ([`epilogue`]), for any processor of the target's family: the widest vectors
//! are chosen when the process first computes.
//!
//! Invariants:
//! - no kernel knows where its operands lie, or of tract;
//! - a result depends on the processor only by rounding: sums are formed in another order;
//! - on one processor, what is computed of a row (of a product's left side, of a softmax, of a normalisation, of a step of a
//!   recurrent layer) has the same bits whatever other rows are computed with it: kernels are chosen by the other sizes, or
//!   compute the same sums in the same order; functions of one value give the same bits in a vector and alone, because
//!   the compiler may neither reorder nor fuse their steps;
//! - `unsafe` is confined to [`lanes`], [`levels`], [`micro`], [`rows`], [`depthwise`], [`gemm`], [`turn`],
//!   [`turned`] and [`epilogue`], behind functions that check what they are given once.

pub mod conv;
pub mod dense;
mod depthwise;
pub mod epilogue;
pub mod filters;
pub mod gemm;
mod lanes;
mod levels;
mod micro;
pub mod normal;
pub mod recurrent;
mod rows;
pub mod transposed;
pub mod turn;
pub mod turned;

#[cfg(test)]
pub(crate) mod tests;
