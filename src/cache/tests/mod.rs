//! Tests of the cache with artificial blocks.

pub mod blocks;
mod one_process;
