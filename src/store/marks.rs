//! Sets of block ids: those that rows reference.

use super::format::LOCATORS;
use std::collections::HashMap;

/// A set of block ids, by locator page: ids that are in use lie close together.
#[derive(Default)]
pub struct Marks(HashMap<u32, u128>);

impl Marks {
    /// Adds an id.
    pub fn insert(&mut self, block_id: u32) {
        *self.0.entry(block_id / LOCATORS).or_default() |= 1 << (block_id % LOCATORS);
    }

    /// True if the id was added.
    pub fn contains(&self, block_id: u32) -> bool {
        self.0.get(&(block_id / LOCATORS)).is_some_and(|bits| bits >> (block_id % LOCATORS) & 1 == 1)
    }

    /// True if none was.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// All ids, in order.
    pub fn ids(&self) -> Vec<u32> {
        let mut pages: Vec<_> = self.0.iter().collect();
        pages.sort_unstable();
        pages
            .into_iter()
            .flat_map(|(page, bits)| {
                (0..LOCATORS).filter(move |slot| bits >> slot & 1 == 1).map(move |slot| page * LOCATORS + slot)
            })
            .collect()
    }
}

const _: () = assert!(LOCATORS <= 128);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_hold_what_was_added() {
        let mut marks = Marks::default();
        let ids = [1, 126, 127, 128, 5000, u32::MAX];
        ids.iter().rev().for_each(|&id| marks.insert(id));
        assert!(ids.iter().all(|&id| marks.contains(id)) && !marks.contains(2) && !marks.contains(4999));
        assert_eq!(marks.ids(), ids);
    }
}
