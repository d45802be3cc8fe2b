//! Tests of the cache with artificial blocks.

pub mod blocks;
mod functions;
mod one_process;
mod policies;
