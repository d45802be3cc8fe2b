//! Sharing classes.

use std::collections::HashMap;

/// Blocks between two questions whether to go on.
const BLOCKS_PER_QUESTION: usize = 1024;

/// Blocks that the same tensors reference.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Class {
    /// Numbers of the tensors, ascending, each once.
    pub tensors: Box<[u32]>,
    /// The blocks, ascending.
    pub blocks: Vec<u32>,
}

/// All blocks by sharing class.
pub(crate) struct Sharing {
    /// Numbered in the order in which their first blocks come.
    pub classes: Vec<Class>,
    /// Class of each block.
    pub class_of: Vec<u32>,
    /// Tensors are numbered from 0 to here.
    pub tensor_count: usize,
}

impl Sharing {
    /// Groups blocks; `uses` has for each block the tensors that reference it, in any order, also several times.
    ///
    /// Tensors get numbers in the order of their keys. Time O(R log R) for R references.
    pub fn new<'a>(uses: impl Iterator<Item = &'a [u64]> + Clone) -> Sharing {
        // Nobody says stop.
        Sharing::until(uses, &mut || true).unwrap_or(Sharing { classes: vec![], class_of: vec![], tensor_count: 0 })
    }

    /// [`Sharing::new`] that ends with `None` when `go_on` says false.
    pub fn until<'a>(
        uses: impl Iterator<Item = &'a [u64]> + Clone,
        go_on: &mut dyn FnMut() -> bool,
    ) -> Option<Sharing> {
        let mut keys: Vec<u64> = uses.clone().flatten().copied().collect();
        keys.sort_unstable();
        keys.dedup();
        let mut by_tensors: HashMap<Box<[u32]>, u32> = HashMap::new();
        let mut classes: Vec<Class> = Vec::new();
        let mut class_of = Vec::new();
        let mut tensors = Vec::new();
        for (block, list) in uses.enumerate() {
            tensors.clear();
            tensors.extend(list.iter().filter_map(|key| keys.binary_search(key).ok()).map(|at| at as u32));
            tensors.sort_unstable();
            tensors.dedup();
            let class = match by_tensors.get(tensors.as_slice()) {
                Some(&class) => class,
                None => {
                    let class = classes.len() as u32;
                    by_tensors.insert(tensors.as_slice().into(), class);
                    classes.push(Class { tensors: tensors.as_slice().into(), blocks: Vec::new() });
                    class
                }
            };
            if block % BLOCKS_PER_QUESTION == 0 && !go_on() {
                return None;
            }
            classes[class as usize].blocks.push(block as u32);
            class_of.push(class);
        }
        Some(Sharing { classes, class_of, tensor_count: keys.len() })
    }

    /// The tensors that reference `block`.
    pub fn tensors(&self, block: u32) -> &[u32] {
        &self.classes[self.class_of[block as usize] as usize].tensors
    }

    /// The tensors that reference every one of `blocks`: those that may use a page of these blocks in the published
    /// problem.
    pub fn users(&self, blocks: &[u32]) -> Vec<u32> {
        let Some((&first, rest)) = blocks.split_first() else { return Vec::new() };
        let mut users = self.tensors(first).to_vec();
        let mut last = self.class_of[first as usize];
        for &block in rest {
            let class = self.class_of[block as usize];
            if class != last {
                let tensors = &self.classes[class as usize].tensors;
                users.retain(|tensor| tensors.binary_search(tensor).is_ok());
                last = class;
            }
        }
        users
    }
}
