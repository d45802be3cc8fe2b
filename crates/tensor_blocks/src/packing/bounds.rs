//! Lower bounds of the published problem.

use super::sharing::Sharing;
use std::cmp::Reverse;

/// Tensors up to which the best order is found.
const EXACT_TENSORS: usize = 12;

/// Classes times sets of tensors up to which it is found.
const EXACT_WORK: usize = 1 << 26;

/// See [`super::PackingProblem::chain_bound`].
pub(super) fn chain_bound(sharing: &Sharing, tensors: usize, per_page: usize) -> usize {
    if tensors <= EXACT_TENSORS && sharing.classes.len() << tensors <= EXACT_WORK {
        best_chain(sharing, tensors, per_page)
    } else {
        let mut size = vec![0usize; tensors];
        for class in &sharing.classes {
            class.tensors.iter().for_each(|&tensor| size[tensor as usize] += class.blocks.len());
        }
        let mut order: Vec<usize> = (0..tensors).collect();
        order.sort_by_key(|&tensor| Reverse(size[tensor]));
        let largest_first = chain(sharing, &order, per_page);
        order.reverse();
        largest_first.max(chain(sharing, &order, per_page))
    }
}

/// The bound of one order: a class counts for the first of its tensors.
fn chain(sharing: &Sharing, order: &[usize], per_page: usize) -> usize {
    let mut turn = vec![0; order.len()];
    order.iter().enumerate().for_each(|(at, &tensor)| turn[tensor] = at);
    let mut added = vec![0usize; order.len()];
    for class in &sharing.classes {
        if let Some(first) = class.tensors.iter().map(|&tensor| turn[tensor as usize]).min() {
            added[first] += class.blocks.len();
        }
    }
    added.iter().map(|blocks| blocks.div_ceil(per_page)).sum()
}

/// The highest bound of all orders. `best[set]` is that of the orders of `set`, which end in any of its tensors.
fn best_chain(sharing: &Sharing, tensors: usize, per_page: usize) -> usize {
    let mut blocks = vec![0usize; 1 << tensors];
    for class in &sharing.classes {
        let mask = class.tensors.iter().fold(0, |mask, &tensor| mask | 1usize << tensor);
        (0..blocks.len()).filter(|set| set & mask != 0).for_each(|set| blocks[set] += class.blocks.len());
    }
    let mut best = vec![0usize; 1 << tensors];
    for set in 1..best.len() {
        for tensor in (0..tensors).filter(|tensor| set >> tensor & 1 == 1) {
            let before = set & !(1 << tensor);
            best[set] = best[set].max(best[before] + (blocks[set] - blocks[before]).div_ceil(per_page));
        }
    }
    best.last().copied().unwrap_or(0)
}
