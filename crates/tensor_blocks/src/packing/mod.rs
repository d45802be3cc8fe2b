//! Page packing: which blocks share a tensor page.
//!
//! Responsible for: netsDB's page packing over *sharing classes*, as published, and the order in which a block store
//! lays its blocks out. A sharing class is the set of tensors that reference a block (the paper's "equivalent
//! class"), with all blocks that have this set. Source: Zhou et al., *Serving Deep Learning Models with Deduplication
//! from Relational Databases*, PVLDB 15(10), 2022, arXiv 2201.10442, section 5.
//!
//! There are two problems:
//!
//! | | the published one | the store's |
//! | --- | --- | --- |
//! | a block stands | on as many pages as it takes | once |
//! | a page that a tensor reads | has blocks of this tensor only | may have others |
//! | least is sought of | pages | pages read, over all tensors |
//! | here | [`Heuristic`], [`PackingProblem`], [`check_packing`] | [`storage_order`], [`page_reads`] |
//!
//! Invariants: the same input gives the same output, on every machine; nothing here panics on any input; no step is
//! quadratic in blocks, tensors or references.

mod anneal;
mod bounds;
mod check;
mod file;
mod fill;
mod heuristics;
mod sharing;
mod stage_two;
mod storage;

#[cfg(test)]
mod published_tests;
#[cfg(test)]
mod storage_tests;

pub use check::{PackingFault, check_packing};
pub use file::{PackingFile, PackingFileError};
pub use fill::{BlockUse, PageReads, TENSOR_PAGE_BYTES, TensorReads, page_reads};
pub use heuristics::{Heuristic, PackingProblem};
pub use storage::{storage_order, storage_order_until};
