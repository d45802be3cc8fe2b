//! Which tensors use a block, and the order of blocks that follows from it.

use super::format::{EXTENT_BYTES, Locator};
use crate::pg::interrupt;
use std::collections::HashMap;
use tensor_blocks::packing::{BlockUse, storage_order_until};

/// References from tensors to blocks.
#[derive(Default)]
pub struct Uses(HashMap<u32, Vec<u64>>);

impl Uses {
    /// Tensor `tensor` uses block `block_id`.
    pub fn add(&mut self, block_id: u32, tensor: u32) {
        let tensors = self.0.entry(block_id).or_default();
        if tensors.last() == Some(&u64::from(tensor)) {
            return;
        }
        if tensors.len() == tensors.capacity() && tensors.len() > 16 {
            // Rows of many tensors may come in any order: what is kept grows with the tensors, not with the rows.
            tensors.sort_unstable();
            tensors.dedup();
        }
        tensors.push(tensor.into());
    }

    /// The blocks in the order in which they are to lie: by sharing class, so that a tensor is read from few tensor pages.
    /// Blocks that no tensor uses come last.
    pub fn order(self, blocks: Vec<(u32, Locator)>) -> Vec<(u32, Locator)> {
        let (used, unused): (Vec<_>, Vec<_>) = blocks.into_iter().partition(|(id, _)| self.0.contains_key(id));
        let uses: Vec<BlockUse<'_>> =
            used.iter().map(|(id, l)| BlockUse { bytes: l.stored_len(), tensors: &self.0[id] }).collect();
        let order = storage_order_until(&uses, EXTENT_BYTES, &mut || !interrupt::should_stop());
        interrupt::check();
        // An interrupt that was no reason to stop after all leaves the order of ids.
        let order = order.unwrap_or_else(|| (0..used.len() as u32).collect());
        order.into_iter().map(|i| used[i as usize]).chain(unused).collect()
    }
}
