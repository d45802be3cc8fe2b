//! Which tensors use a block, and the order of blocks that follows from it.

use super::format::{EXTENT_BYTES, Locator};
use std::collections::HashMap;

/// References from tensors to blocks.
#[derive(Default)]
pub struct Uses(HashMap<u32, Vec<u32>>);

impl Uses {
    /// Tensor `tensor` uses block `block_id`.
    pub fn add(&mut self, block_id: u32, tensor: u32) {
        let tensors = self.0.entry(block_id).or_default();
        if tensors.last() != Some(&tensor) {
            tensors.push(tensor);
        }
    }

    /// The blocks in the order in which they are to lie: by sharing class, so that a tensor is read from few tensor pages.
    /// Blocks that no tensor uses come last.
    pub fn order(mut self, blocks: Vec<(u32, Locator)>) -> Vec<(u32, Locator)> {
        let _ = EXTENT_BYTES;
        let mut keyed: Vec<(bool, Vec<u32>, (u32, Locator))> = blocks
            .into_iter()
            .map(|block| {
                let mut tensors = self.0.remove(&block.0).unwrap_or_default();
                tensors.sort_unstable();
                tensors.dedup();
                (tensors.is_empty(), tensors, block)
            })
            .collect();
        keyed.sort_by(|a, b| (a.0, &a.1, a.2.0).cmp(&(b.0, &b.1, b.2.0)));
        keyed.into_iter().map(|(_, _, block)| block).collect()
    }
}
