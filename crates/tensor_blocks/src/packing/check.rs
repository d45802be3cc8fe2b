//! The check of a packing. It shares nothing with the packers: it looks at pages and tensors only.

use super::PackingProblem;
use std::collections::HashMap;

/// Why pages are no packing of a problem.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PackingFault {
    /// More blocks than a page takes.
    #[error("page {page} has {blocks} blocks, more than {per_page}")]
    Overfull {
        /// The page's number.
        page: usize,
        /// Blocks on it.
        blocks: usize,
        /// Blocks that a page takes.
        per_page: usize,
    },
    /// A page without blocks.
    #[error("page {0} is empty")]
    Empty(usize),
    /// A block twice on one page.
    #[error("page {page} has block {block} twice")]
    Twice {
        /// The page's number.
        page: usize,
        /// The block's id.
        block: u32,
    },
    /// A page that serves no tensor: none has all of its blocks.
    #[error("page {0} serves no tensor")]
    Useless(usize),
    /// A block of a tensor that stands on no page of which the tensor has all blocks.
    #[error("block {block} of tensor {tensor} is on no page that has only blocks of this tensor")]
    Uncovered {
        /// The tensor's number.
        tensor: usize,
        /// The block's id.
        block: u32,
    },
}

/// Checks that every tensor is exactly the union of pages: of those all of whose blocks it has.
///
/// # Errors
/// The first fault found, by page and then by tensor.
pub fn check_packing(problem: &PackingProblem, pages: &[Vec<u32>]) -> Result<(), PackingFault> {
    let mut pages_with: HashMap<u32, Vec<usize>> = HashMap::new();
    for (page, blocks) in pages.iter().enumerate() {
        if blocks.is_empty() {
            return Err(PackingFault::Empty(page));
        }
        if blocks.len() > problem.per_page() {
            return Err(PackingFault::Overfull { page, blocks: blocks.len(), per_page: problem.per_page() });
        }
        for &block in blocks {
            let with = pages_with.entry(block).or_default();
            if with.last() == Some(&page) {
                return Err(PackingFault::Twice { page, block });
            }
            with.push(page);
        }
    }
    let mut serves_some = vec![false; pages.len()];
    let mut uncovered = None;
    for (tensor, blocks) in problem.tensors().iter().enumerate() {
        // A page is within the tensor if it is met once for each of its blocks.
        let mut met: HashMap<usize, usize> = HashMap::new();
        for page in blocks.iter().filter_map(|block| pages_with.get(block)).flatten() {
            *met.entry(*page).or_default() += 1;
        }
        let within = |page: &usize| met.get(page) == Some(&pages[*page].len());
        met.keys().filter(|page| within(page)).for_each(|&page| serves_some[page] = true);
        let covered = |block: &u32| pages_with.get(block).is_some_and(|with| with.iter().any(within));
        if let (None, Some(&block)) = (&uncovered, blocks.iter().find(|block| !covered(block))) {
            uncovered = Some(PackingFault::Uncovered { tensor, block });
        }
    }
    match serves_some.iter().position(|serves| !serves) {
        Some(page) => Err(PackingFault::Useless(page)),
        None => uncovered.map_or(Ok(()), Err),
    }
}
