//! What radius, bands and hashes per band find of near duplicates, as a table in Markdown:
//!
//! ```text
//! cargo run --release -p tensor_blocks --example near_parameters [-- FILE]
//! ```
//!
//! FILE has blocks of 128 x 128 float32, one after the other, little-endian, and nothing else; without it the blocks
//! are made up, normally distributed. To a block is added noise with which 71 % and 99 % of its elements stay within
//! the tolerance of 0.01, and in a third copy every fourth row is replaced. Recall is over the copies that are near
//! enough, with any band in common and, in brackets, among the eight blocks with most bands in common. "By accident"
//! are other blocks with a band in common, for each block and 100,000 indexed ones.

use tensor_blocks::DType;
use tensor_blocks::near::{NearError, NearIndex, NearOptions, Span, elements_f32, share_within};

const ELEMENTS: usize = 128 * 128;
const MADE_UP: usize = 300;
/// Every block is compared with every other.
const MOST: usize = 2000;

/// SplitMix64 (Steele, Lea and Flood, 2014).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A sum of eight uniform numbers.
    fn normal(&mut self) -> f32 {
        let four = |bits: u64| (bits & 0xffff) + (bits >> 16 & 0xffff) + (bits >> 32 & 0xffff) + (bits >> 48);
        ((four(self.next()) + four(self.next())) as f32 - 262_140.0) / 53_510.0
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!(
        "| weights | span | bands | hashes | radius | noise, 71 % within | noise, 99 % within | rows replaced \
         | by accident |"
    );
    println!("| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |");
    if let Some(path) = std::env::args().nth(1) {
        let mut values = Vec::new();
        if !elements_f32(DType::Float32, &std::fs::read(&path)?, &mut values) {
            return Err("the file is no whole number of float32".into());
        }
        let blocks: Vec<Vec<f32>> = values.chunks_exact(ELEMENTS).take(MOST).map(<[f32]>::to_vec).collect();
        table(&format!("{} of a file", blocks.len()), &blocks)?;
        return Ok(());
    }
    for sigma in [0.02, 0.03, 0.05, 0.1, 0.3] {
        let mut random = Random(1);
        let blocks: Vec<Vec<f32>> =
            (0..MADE_UP).map(|_| (0..ELEMENTS).map(|_| sigma * random.normal()).collect()).collect();
        table(&format!("sigma {sigma}"), &blocks)?;
    }
    Ok(())
}

fn table(weights: &str, blocks: &[Vec<f32>]) -> Result<(), NearError> {
    let of = |radius: f64, bands: u32, hashes_per_band: u32| NearOptions {
        radius,
        bands,
        hashes_per_band,
        ..NearOptions::default()
    };
    // The same width as the run's 6, over the whole block.
    let whole = NearOptions { span: Span::Block, radius: 6.0 * 0.01 * 128.0, ..of(6.0, 64, 16) };
    let tried = [of(4.0, 64, 16), of(6.0, 64, 16), of(8.0, 64, 16), of(6.0, 32, 16), of(4.0, 64, 8), of(8.0, 64, 24)];
    for options in [NearOptions::published(), whole].into_iter().chain(tried) {
        line(weights, blocks, &options)?;
    }
    Ok(())
}

fn line(weights: &str, blocks: &[Vec<f32>], options: &NearOptions) -> Result<(), NearError> {
    let mut index = NearIndex::new(ELEMENTS, options)?;
    let signatures: Vec<_> = blocks.iter().map(|values| index.signature(values)).collect();
    signatures.iter().zip(0..).for_each(|(signature, id)| index.insert(id, signature));
    let mut accidents = 0usize;
    for (at, signature) in signatures.iter().enumerate() {
        let alike = |other: usize| share_within(&blocks[at], &blocks[other], options.tolerance) >= options.share;
        accidents += (0..at).filter(|&other| signature.common_bands(&signatures[other]) > 0 && !alike(other)).count();
    }
    let pairs = blocks.len() * blocks.len().saturating_sub(1) / 2;
    let span = if options.span == Span::Run { "run" } else { "block" };
    print!("| {weights} | {span} | {} | {} | {} |", options.bands, options.hashes_per_band, options.radius);
    let mut random = Random(2);
    for (noise, rows) in [(0.0095, false), (0.00388, false), (0.00388, true)] {
        let (mut near, mut found, mut first) = (0u32, 0u32, 0u32);
        for (at, values) in blocks.iter().enumerate() {
            let from = &blocks[(at + 1) % blocks.len()];
            let copy: Vec<f32> = (0..ELEMENTS)
                .map(|of| if rows && of / 128 % 4 == 1 { from[of] } else { values[of] + noise * random.normal() })
                .collect();
            if share_within(values, &copy, options.tolerance) < options.share {
                continue;
            }
            let signature = index.signature(&copy);
            near += 1;
            found += u32::from(signature.common_bands(&signatures[at]) > 0);
            first += u32::from(index.candidates(&signature, 8).iter().any(|candidate| candidate.id == at as u64));
        }
        let share = |of: u32| f64::from(of) / f64::from(near.max(1));
        print!(" {:.3} ({:.3}) |", share(found), share(first));
    }
    println!(" {:.1} |", accidents as f64 / pairs.max(1) as f64 * 1e5);
    Ok(())
}
