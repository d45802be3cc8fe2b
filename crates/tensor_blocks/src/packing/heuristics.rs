//! The published problem and netsDB's heuristics for it.
//!
//! A block may stand on several pages, and each tensor must be the union of whole pages. So a page serves those tensors
//! that have all of its blocks, and the fewest pages are sought.

use super::bounds;
use super::sharing::Sharing;
use std::cmp::Reverse;

/// Tensors as sets of blocks, and the size of a page.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PackingProblem {
    per_page: usize,
    tensors: Vec<Vec<u32>>,
}

/// How pages are formed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Heuristic {
    /// Tensor after tensor as they come: a tensor uses the pages that have only blocks of it, and what these lack is
    /// put on new pages in the order of the ids. The paper's baseline.
    ArrivalOrder,
    /// Each sharing class on pages of its own. The paper's greedy-1.
    Greedy1,
    /// As in arrival order, but the largest tensor first and the most shared blocks first. The paper's greedy-2.
    Greedy2,
    /// Full pages from each sharing class, then greedy-2 over what is left: the paper's two-stage algorithm. Ours does
    /// the second stage also with pages that end where classes end, and takes what needs fewer pages.
    TwoStage,
}

impl PackingProblem {
    /// `tensors` has the block ids of each tensor, in any order; ids that come twice count once. `per_page` is the
    /// number of blocks on a page; 0 is taken as 1.
    pub fn new(per_page: usize, mut tensors: Vec<Vec<u32>>) -> PackingProblem {
        for blocks in &mut tensors {
            blocks.sort_unstable();
            blocks.dedup();
        }
        PackingProblem { per_page: per_page.max(1), tensors }
    }

    /// Blocks on a page, at least 1.
    pub fn per_page(&self) -> usize {
        self.per_page
    }

    /// The block ids of each tensor, ascending.
    pub fn tensors(&self) -> &[Vec<u32>] {
        &self.tensors
    }

    /// All block ids, ascending, each once.
    pub fn block_ids(&self) -> Vec<u32> {
        let mut ids: Vec<u32> = self.tensors.iter().flatten().copied().collect();
        ids.sort_unstable();
        ids.dedup();
        ids
    }

    /// Pages that the distinct blocks fill: the bound that the paper gives. See [`PackingProblem::chain_bound`] for a
    /// higher one.
    pub fn lower_bound(&self) -> usize {
        self.block_ids().len().div_ceil(self.per_page)
    }

    /// A lower bound that takes into account that a page serves no tensor that lacks one of its blocks.
    ///
    /// Take the tensors one after the other, t1, t2, .... What ti adds to those before needs pages that hold an added
    /// block and serve ti. Such a page serves none of the tensors before, which lack this block, so it is not among the
    /// pages counted for them. Hence any packing has at least the sum of ceil(|ti \ (t1 u ... u ti-1)| / `per_page`)
    /// pages, for every order. Up to 12 tensors the best order is found, by dynamic programming over the
    /// sets of tensors; beyond that the orders tried are largest first and smallest first.
    pub fn chain_bound(&self) -> usize {
        bounds::chain_bound(&self.dense().1, self.tensors.len(), self.per_page)
    }

    /// Tensors with blocks numbered from 0, the blocks' sharing, and the block ids by number.
    pub(super) fn dense(&self) -> (Vec<Vec<u32>>, Sharing, Vec<u32>) {
        let ids = self.block_ids();
        let number = |id: &u32| ids.binary_search(id).ok().map(|at| at as u32);
        let tensors: Vec<Vec<u32>> = self.tensors.iter().map(|list| list.iter().filter_map(number).collect()).collect();
        let mut uses: Vec<Vec<u64>> = vec![Vec::new(); ids.len()];
        for (tensor, blocks) in tensors.iter().enumerate() {
            blocks.iter().for_each(|&block| uses[block as usize].push(tensor as u64));
        }
        let mut sharing = Sharing::new(uses.iter().map(Vec::as_slice));
        self.restore_numbers(&mut sharing);
        (tensors, sharing, ids)
    }

    /// A sharing numbers only the tensors that have blocks; here their numbers must be their places in the problem.
    fn restore_numbers(&self, sharing: &mut Sharing) {
        let places: Vec<u32> =
            (0..self.tensors.len() as u32).filter(|&at| !self.tensors[at as usize].is_empty()).collect();
        for class in &mut sharing.classes {
            class.tensors.iter_mut().for_each(|tensor| *tensor = places[*tensor as usize]);
        }
        sharing.tensor_count = self.tensors.len();
    }
}

impl Heuristic {
    /// All of them, as the paper orders them.
    pub const ALL: [Heuristic; 4] =
        [Heuristic::ArrivalOrder, Heuristic::Greedy1, Heuristic::Greedy2, Heuristic::TwoStage];

    /// Its name in reports.
    pub const fn name(self) -> &'static str {
        match self {
            Heuristic::ArrivalOrder => "arrival_order",
            Heuristic::Greedy1 => "greedy_1",
            Heuristic::Greedy2 => "greedy_2",
            Heuristic::TwoStage => "two_stage",
        }
    }

    /// The pages, as block ids.
    ///
    /// Time O(R log R) for R references of tensors to blocks, as long as a page does not serve more tensors than its
    /// blocks have references.
    pub fn pack(self, problem: &PackingProblem) -> Vec<Vec<u32>> {
        let (tensors, sharing, ids) = problem.dense();
        let per_page = problem.per_page;
        let in_classes = || sharing.classes.iter().map(|class| class.blocks.chunks(per_page));
        let pages: Vec<Vec<u32>> = match self {
            Heuristic::ArrivalOrder => tensor_by_tensor(&tensors, &sharing, per_page, Way::AsTheyCome),
            Heuristic::Greedy1 => in_classes().flatten().map(<[u32]>::to_vec).collect(),
            Heuristic::Greedy2 => tensor_by_tensor(&tensors, &sharing, per_page, Way::LargestFirst),
            Heuristic::TwoStage => {
                let full = |page: &&[u32]| page.len() == per_page;
                let mut pages: Vec<Vec<u32>> = in_classes().flatten().filter(full).map(<[u32]>::to_vec).collect();
                let mut left = tensors.clone();
                let mut packed = vec![false; ids.len()];
                pages.iter().flatten().for_each(|&block| packed[block as usize] = true);
                left.iter_mut().for_each(|blocks| blocks.retain(|&block| !packed[block as usize]));
                let filled = tensor_by_tensor(&left, &sharing, per_page, Way::LargestFirst);
                let cut = tensor_by_tensor(&left, &sharing, per_page, Way::CutAtClasses);
                pages.extend(if cut.len() < filled.len() { cut } else { filled });
                pages
            }
        };
        pages.into_iter().map(|page| page.into_iter().map(|block| ids[block as usize]).collect()).collect()
    }
}

/// How tensors are packed one after the other.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    AsTheyCome,
    /// The largest tensor first, and its most shared blocks first.
    LargestFirst,
    /// The same; and where the last page would not be full, its room is used to end pages earlier.
    CutAtClasses,
}

/// Each tensor takes the pages that are there already and have only blocks of it, and what it lacks goes to new pages.
fn tensor_by_tensor(tensors: &[Vec<u32>], sharing: &Sharing, per_page: usize, way: Way) -> Vec<Vec<u32>> {
    let mut turns: Vec<usize> = (0..tensors.len()).collect();
    if way != Way::AsTheyCome {
        turns.sort_by_key(|&tensor| Reverse(tensors[tensor].len()));
    }
    let mut pages: Vec<Vec<u32>> = Vec::new();
    let mut pages_of: Vec<Vec<usize>> = vec![Vec::new(); tensors.len()];
    let mut had_by = vec![usize::MAX; sharing.class_of.len()];
    for tensor in turns {
        for &page in &pages_of[tensor] {
            pages[page].iter().for_each(|&block| had_by[block as usize] = tensor);
        }
        let mut lacks: Vec<u32> =
            tensors[tensor].iter().copied().filter(|&block| had_by[block as usize] != tensor).collect();
        if way != Way::AsTheyCome {
            // Blocks of one class stay together: their page then serves all tensors of the class.
            lacks
                .sort_by_key(|&block| (Reverse(sharing.tensors(block).len()), sharing.class_of[block as usize], block));
        }
        let cuts = match way {
            Way::CutAtClasses => cut_at_classes(&lacks, sharing, per_page),
            _ => lacks.chunks(per_page).collect(),
        };
        for page in cuts {
            sharing.users(page).iter().for_each(|&user| pages_of[user as usize].push(pages.len()));
            pages.push(page.to_vec());
        }
    }
    pages
}

/// As few pages of `blocks` as filling them takes, but cut before a block that would leave the page fewer tensors to
/// serve, while the last page has room for that: a page that more tensors can use saves them pages of their own.
fn cut_at_classes<'a>(blocks: &'a [u32], sharing: &Sharing, per_page: usize) -> Vec<&'a [u32]> {
    let mut spare = blocks.len().div_ceil(per_page) * per_page - blocks.len();
    let mut pages = Vec::new();
    let mut rest = blocks;
    while !rest.is_empty() {
        let whole = &rest[..per_page.min(rest.len())];
        // How many tensors the first 1, 2, ... blocks serve; this never grows.
        let mut users = sharing.tensors(whole[0]).to_vec();
        let served: Vec<usize> = whole
            .iter()
            .map(|&block| {
                let tensors = sharing.tensors(block);
                users.retain(|user| tensors.binary_search(user).is_ok());
                users.len()
            })
            .collect();
        let least = whole.len() - spare.saturating_sub(per_page - whole.len()).min(whole.len() - 1);
        let len =
            (least..whole.len()).rev().find(|&len| served[len - 1] > served[whole.len() - 1]).unwrap_or(whole.len());
        spare -= (per_page - len).min(spare);
        let (page, after) = rest.split_at(len);
        pages.push(page);
        rest = after;
    }
    pages
}
