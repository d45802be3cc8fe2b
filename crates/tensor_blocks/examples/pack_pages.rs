//! Packs the pages of a problem with each heuristic, checks the packings, and prints one JSON line per heuristic:
//!
//! ```text
//! cargo run --release -p tensor_blocks --example pack_pages -- [--store] FILE.json
//! ```
//!
//! With `--store` it prints the store's problem instead: pages, and pages read over all tensors, in the order of the
//! ids and in the storage order, for blocks of 65,548 bytes.

use serde_json::json;
use std::error::Error;
use std::process::ExitCode;
use std::time::Instant;
use tensor_blocks::packing::{
    BlockUse, Heuristic, PackingFile, PackingProblem, TENSOR_PAGE_BYTES, check_packing, page_reads, storage_order,
};

/// Stored bytes of a block of 128 x 128 float32.
const BLOCK_BYTES: u32 = 65_548;

fn main() -> ExitCode {
    let mut arguments: Vec<String> = std::env::args().skip(1).collect();
    let store = arguments.iter().position(|argument| argument == "--store").map(|at| arguments.remove(at)).is_some();
    let [path] = arguments.as_slice() else {
        eprintln!("usage: pack_pages [--store] FILE.json");
        return ExitCode::from(2);
    };
    match run(path, store) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("pack_pages: {path}: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(path: &str, store: bool) -> Result<(), Box<dyn Error>> {
    let file: PackingFile = serde_json::from_slice(&std::fs::read(path)?)?;
    let problem = file.problem()?;
    if store {
        return store_lines(&file.workload, &problem);
    }
    let (lower_bound, chain_bound) = (problem.lower_bound(), problem.chain_bound());
    for heuristic in Heuristic::ALL {
        let start = Instant::now();
        let pages = heuristic.pack(&problem);
        let seconds = start.elapsed().as_secs_f64();
        check_packing(&problem, &pages).map_err(|fault| format!("{}: {fault}", heuristic.name()))?;
        let line = json!({
            "heuristic": heuristic.name(), "pages": pages.len(), "lower_bound": lower_bound,
            "seconds": seconds, "chain_bound": chain_bound, "workload": file.workload,
        });
        println!("{line}");
    }
    Ok(())
}

fn store_lines(workload: &str, problem: &PackingProblem) -> Result<(), Box<dyn Error>> {
    let ids = problem.block_ids();
    let mut uses: Vec<Vec<u64>> = vec![Vec::new(); ids.len()];
    for (tensor, blocks) in problem.tensors().iter().enumerate() {
        for block in blocks {
            uses[ids.binary_search(block).map_err(|_| "a block without a number")?].push(tensor as u64);
        }
    }
    let blocks: Vec<BlockUse> = uses.iter().map(|tensors| BlockUse { bytes: BLOCK_BYTES, tensors }).collect();
    let by_id: Vec<u32> = (0..blocks.len() as u32).collect();
    let start = Instant::now();
    let packed = storage_order(&blocks, TENSOR_PAGE_BYTES);
    let seconds = start.elapsed().as_secs_f64();
    for (name, order, seconds) in [("by_id", by_id, 0.0), ("storage_order", packed, seconds)] {
        let reads = page_reads(&blocks, &order, TENSOR_PAGE_BYTES);
        let line = json!({
            "order": name, "pages": reads.pages, "lower_bound": problem.lower_bound(), "pages_read": reads.pages_read(),
            "fewest_pages_read": reads.fewest(), "read_amplification": reads.amplification(), "seconds": seconds,
            "workload": workload,
        });
        println!("{line}");
    }
    Ok(())
}
