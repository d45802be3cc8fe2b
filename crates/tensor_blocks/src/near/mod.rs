//! Near-duplicate search: which stored block could stand in for another one.
//!
//! Responsible for: the candidates (locality-sensitive hashing), how alike two blocks are, in which order blocks are
//! tried, and how many of them may be merged. Source: Zhou et al., *Serving Deep Learning Models with Deduplication
//! from Relational Databases*, PVLDB 15(10), 2022, arXiv 2201.10442, section 4, and the indexer of netsDB. Reading
//! blocks, predicting and storing are the caller's:
//!
//! ```text
//!   block --elements_f32--> values --signature--> NearIndex --candidates--> a few ids
//!     |                       |                                              | read, share_within >= share
//!     | importance            |                                              v
//!     +--> least important first ----------------> the most alike block, for each block that has one
//!                                                                            | largest_prefix: merge the first n,
//!                                                                            v predict, is the metric within bounds?
//!                                                                     what is merged
//! ```
//!
//! Invariants:
//! - a signature has the same bits on every machine for the same options: only additions in a fixed order, products,
//!   square roots and conversions are used, which IEEE 754 rounds in one way, and no fused operation;
//! - blocks of equal finite values always have all bands in common; a NaN or an infinity is like nothing;
//! - nothing here panics on any values; a candidate is a guess, which [`share_within`] must confirm.

mod alike;
mod index;
mod options;
mod signature;
mod walk;

#[cfg(test)]
mod tests;

pub use alike::{Importance, elements_f32, importance, share_within};
pub use index::{Candidate, NearIndex};
pub use options::{NearError, NearOptions, Span};
pub use signature::Signature;
pub use walk::{Walk, largest_prefix};
