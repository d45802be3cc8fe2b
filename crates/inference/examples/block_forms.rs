//! What the small forms of blocks save and cost: `block_forms MODEL.onnx...`. One line a model: bytes of its blocks, what is left of
//! them in forms that are always tried and with Huffman's code besides, and MB of blocks per second of encoding, decoding and, to
//! compare with, hashing. Each is the best of five passes.

use inference::onnx::{NoExternalData, strip};
use std::path::Path;
use std::time::Instant;
use tensor_blocks::encoding::{Compression, Encoded, Encoding, encode};
use tensor_blocks::{Block, Tiling, block_hash};

type Failure = Box<dyn std::error::Error>;

/// Bytes of a block, as models are loaded by default.
const BLOCK_BYTES: usize = 65_536;
const PASSES: usize = 5;

fn main() -> Result<(), Failure> {
    println!(
        "{:20} {:>10}  {:24} {:>7} {:>7} {:>7} {:>7}",
        "model", "bytes", "forms", "ratio", "encode", "decode", "hash"
    );
    for path in std::env::args().skip(1) {
        let name = Path::new(&path).file_stem().map_or(path.clone(), |name| name.to_string_lossy().into_owned());
        let blocks = blocks_of(&path)?;
        for compression in [Compression::None, Compression::Huffman] {
            println!("{name:20} {}", measure(&blocks, compression)?);
        }
    }
    Ok(())
}

/// The blocks of a model in their binary form.
fn blocks_of(path: &str) -> Result<Vec<Vec<u8>>, Failure> {
    let bytes = std::fs::read(path)?;
    let stripped = strip(&bytes, &mut NoExternalData, &mut || Ok(()))?;
    let mut blocks = Vec::new();
    let mut elements = Vec::new();
    for tensor in &stripped.tensors {
        let tiling = Tiling::new(&tensor.dims, tensor.view, tensor.dtype, BLOCK_BYTES)?;
        for tile in tiling.tiles() {
            tiling.gather(tile, &tensor.data, &mut elements)?;
            let block = Block::new(tensor.dtype, vec![tile.rows, tile.cols], elements.as_slice())?;
            blocks.push([&block.head(), block.data()].concat());
        }
    }
    Ok(blocks)
}

fn measure(blocks: &[Vec<u8>], compression: Compression) -> Result<String, Failure> {
    let total: usize = blocks.iter().map(Vec::len).sum();
    let mut small = Vec::new();
    let encoding = best(|| {
        small = blocks.iter().map(|block| encode(block, compression)).collect::<Vec<_>>();
        Ok(())
    })?;
    let mut out = Vec::new();
    let decoding = best(|| {
        for (block, small) in blocks.iter().zip(&small) {
            out.resize(block.len(), 0);
            match small {
                Some((encoding, stored)) => Encoded::open(*encoding, stored)?.value_into(&mut out)?,
                None => out.copy_from_slice(block),
            }
            assert!(out[0] == block[0]);
        }
        Ok(())
    })?;
    for (block, (encoding, stored)) in blocks.iter().zip(&small).filter_map(|(b, s)| Some((b, s.as_ref()?))) {
        out.resize(block.len(), 0);
        Encoded::open(*encoding, stored)?.value_into(&mut out)?;
        assert!(out == *block);
    }
    let hashing = best(|| {
        for block in blocks {
            let block = Block::decode(block)?;
            std::hint::black_box(block_hash(block.dtype(), block.shape(), block.data()));
        }
        Ok(())
    })?;
    let stored: usize = blocks.iter().zip(&small).map(|(b, s)| s.as_ref().map_or(b.len(), |s| s.1.len())).sum();
    let mut forms: Vec<(&str, usize)> = Vec::new();
    for form in small.iter().map(|s| s.as_ref().map_or(Encoding::PLAIN, |s| s.0).name().unwrap_or("plain")) {
        match forms.iter_mut().find(|(name, _)| *name == form) {
            Some((_, count)) => *count += 1,
            None => forms.push((form, 1)),
        }
    }
    let forms: Vec<String> = forms.into_iter().map(|(form, count)| format!("{count} {form}")).collect();
    let speed = |seconds: f64| total as f64 / 1e6 / seconds;
    Ok(format!(
        "{total:>10}  {:24} {:>7.4} {:>7.0} {:>7.0} {:>7.0}",
        forms.join(", "),
        stored as f64 / total as f64,
        speed(encoding),
        speed(decoding),
        speed(hashing)
    ))
}

/// Seconds of the fastest of some runs.
fn best(mut run: impl FnMut() -> Result<(), Failure>) -> Result<f64, Failure> {
    let mut best = f64::INFINITY;
    for _ in 0..PASSES {
        let begin = Instant::now();
        run()?;
        best = best.min(begin.elapsed().as_secs_f64());
    }
    Ok(best)
}
