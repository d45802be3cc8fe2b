//! Tests of the published problem: the check against the definition, packings against the check, and bounds.

use super::*;
use crate::random::Random;
use std::collections::BTreeSet;

/// Tensors drawn from a few sets of blocks, so that there are sharing classes of several blocks.
fn random_problem(seed: u64) -> PackingProblem {
    let mut random = Random(seed);
    let (tensors, sets) = (random.below(9), 1 + random.below(12));
    let sets: Vec<Vec<u32>> = (0..sets)
        .map(|_| {
            let start = random.below(200) as u32;
            (start..start + random.below(30) as u32).map(|id| id * 1_000_003).collect()
        })
        .collect();
    let tensor = |_| sets.iter().filter(|_| random.below(2) == 0).flatten().copied().collect();
    let tensors = (0..tensors).map(tensor).collect();
    PackingProblem::new(1 + Random(!seed).below(9), tensors)
}

/// The definition, word by word.
fn is_packing(problem: &PackingProblem, pages: &[Vec<u32>]) -> bool {
    let pages: Vec<BTreeSet<u32>> = pages.iter().map(|page| page.iter().copied().collect()).collect();
    let mut used = vec![false; pages.len()];
    let exact = problem.tensors().iter().all(|tensor| {
        let tensor: BTreeSet<u32> = tensor.iter().copied().collect();
        let mut union = BTreeSet::new();
        for (page, blocks) in pages.iter().enumerate().filter(|(_, blocks)| blocks.is_subset(&tensor)) {
            union.extend(blocks);
            used[page] = true;
        }
        union == tensor
    });
    exact && used.iter().all(|used| *used) && pages.iter().all(|page| (1..=problem.per_page()).contains(&page.len()))
}

#[test]
fn every_heuristic_gives_a_packing() {
    for seed in 0..500 {
        let problem = random_problem(seed);
        for heuristic in Heuristic::ALL {
            let pages = heuristic.pack(&problem);
            let context = format!("seed {seed}, {}", heuristic.name());
            assert_eq!(check_packing(&problem, &pages), Ok(()), "{context}");
            assert!(is_packing(&problem, &pages), "{context}");
            assert!(pages.len() >= problem.chain_bound(), "{context}");
            assert_eq!(pages, heuristic.pack(&problem), "{context}: not the same again");
        }
        assert!(problem.chain_bound() >= problem.lower_bound(), "seed {seed}");
    }
}

#[test]
fn the_check_sees_what_the_definition_sees() {
    let mut refused = 0;
    for seed in 0..2000 {
        let problem = random_problem(seed);
        let mut random = Random(seed + 7);
        let mut pages = Heuristic::ALL[random.below(4)].pack(&problem);
        if pages.is_empty() {
            continue;
        }
        let (from, to) = (random.below(pages.len()), random.below(pages.len()));
        match random.below(4) {
            0 => drop(pages.remove(from)),
            1 => {
                if let Some(block) = pages[from].pop() {
                    pages[to].push(block);
                }
            }
            2 => drop(pages[from].pop()),
            _ => pages.swap(from, to),
        }
        let twice = |page: &Vec<u32>| page.iter().collect::<BTreeSet<_>>().len() < page.len();
        let expected = is_packing(&problem, &pages) && !pages.iter().any(twice);
        refused += usize::from(!expected);
        assert_eq!(check_packing(&problem, &pages).is_ok(), expected, "seed {seed}: {pages:?}");
    }
    assert!(refused > 500, "only {refused} of the damaged packings are none");
}

#[test]
fn each_fault_is_named() {
    let problem = PackingProblem::new(2, vec![vec![1, 2, 3], vec![3, 4]]);
    let check = |pages: &[&[u32]]| check_packing(&problem, &pages.iter().map(|page| page.to_vec()).collect::<Vec<_>>());
    assert_eq!(check(&[&[1, 2], &[3], &[4]]), Ok(()));
    assert_eq!(check(&[&[1, 2], &[3, 4], &[3]]), Ok(()));
    assert_eq!(check(&[&[1, 2], &[3, 4]]), Err(PackingFault::Uncovered { tensor: 0, block: 3 }));
    assert_eq!(check(&[&[1, 2], &[3], &[4], &[2, 4]]), Err(PackingFault::Useless(3)));
    assert_eq!(check(&[&[1, 2], &[3], &[4], &[9]]), Err(PackingFault::Useless(3)));
    assert_eq!(check(&[&[1, 2], &[]]), Err(PackingFault::Empty(1)));
    assert_eq!(check(&[&[1, 2, 3], &[4]]), Err(PackingFault::Overfull { page: 0, blocks: 3, per_page: 2 }));
    assert_eq!(check(&[&[1, 2], &[4, 4]]), Err(PackingFault::Twice { page: 1, block: 4 }));
}

/// The fewest pages of all choices of pages, for problems of up to five blocks: an oracle for the bound.
fn fewest_pages(problem: &PackingProblem) -> usize {
    let ids = problem.block_ids();
    let page = |set: usize| -> Vec<u32> {
        ids.iter().enumerate().filter(|(at, _)| set >> at & 1 == 1).map(|(_, id)| *id).collect()
    };
    let serves = |page: &Vec<u32>| problem.tensors().iter().any(|tensor| page.iter().all(|id| tensor.contains(id)));
    let possible: Vec<Vec<u32>> =
        (1..1 << ids.len()).map(page).filter(|page| page.len() <= problem.per_page() && serves(page)).collect();
    fn choose(problem: &PackingProblem, possible: &[Vec<u32>], chosen: &mut Vec<Vec<u32>>, left: usize) -> bool {
        if left == 0 {
            return is_packing(problem, chosen);
        }
        (0..possible.len()).any(|at| {
            chosen.push(possible[at].clone());
            let found = choose(problem, &possible[at + 1..], chosen, left - 1);
            chosen.pop();
            found
        })
    }
    (0..).find(|&pages| choose(problem, &possible, &mut Vec::new(), pages)).unwrap()
}

#[test]
fn no_packing_is_below_the_chain_bound() {
    let (mut tight, mut above_simple) = (0, 0);
    for seed in 0..60 {
        let mut random = Random(seed);
        let tensor = |_| (0..5).filter(|_| random.below(2) == 0).collect();
        let problem = PackingProblem::new(2, (0..3).map(tensor).collect());
        let (fewest, bound) = (fewest_pages(&problem), problem.chain_bound());
        assert!(bound <= fewest, "seed {seed}: {problem:?} needs {fewest} pages, the bound says {bound}");
        tight += usize::from(bound == fewest);
        above_simple += usize::from(bound > problem.lower_bound());
        assert!(Heuristic::TwoStage.pack(&problem).len() >= fewest, "seed {seed}");
    }
    assert!(tight > 20 && above_simple > 20, "{tight} tight, {above_simple} above the simple bound");
}

#[test]
fn the_bound_of_many_tensors_is_one_too() {
    let family: Vec<Vec<u32>> = (0..40).map(|t| (0..80).chain(100 + 10 * t..110 + 10 * t).collect()).collect();
    let problem = PackingProblem::new(8, family);
    // 90 blocks of the first, and ten of each other.
    assert_eq!(problem.chain_bound(), 12 + 39 * 2);
    assert_eq!(Heuristic::TwoStage.pack(&problem).len(), 10 + 40 * 2);
}

#[test]
fn odd_problems() {
    let pages = |per_page, tensors: Vec<Vec<u32>>| {
        let problem = PackingProblem::new(per_page, tensors);
        Heuristic::ALL.map(|heuristic| {
            let pages = heuristic.pack(&problem);
            assert_eq!(check_packing(&problem, &pages), Ok(()), "{}", heuristic.name());
            pages.len()
        })
    };
    assert_eq!(pages(8, vec![]), [0; 4]);
    assert_eq!(pages(8, vec![vec![], vec![]]), [0; 4]);
    assert_eq!(pages(8, vec![vec![u32::MAX, 0, 0, u32::MAX]]), [1; 4]);
    assert_eq!(pages(0, vec![vec![1, 2, 3]]), [3; 4]);
    assert_eq!(pages(usize::MAX, vec![vec![1, 2, 3], vec![1]]), [2; 4]);
    assert_eq!(pages(8, vec![(0..100).collect(); 3]), [13; 4]);
    assert_eq!(pages(8, vec![vec![], (0..8).collect(), vec![], (0..9).collect()]), [2, 2, 2, 2]);
}
