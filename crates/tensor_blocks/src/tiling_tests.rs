//! Tests of the tiling: edges, and gather and scatter against a copy element by element.

use super::*;

const K64: usize = 64 << 10;

fn tiling(dims: &[u64], view: View, dtype: DType) -> Tiling {
    Tiling::new(dims, view, dtype, K64).unwrap()
}

/// SplitMix64 (Steele, Lea and Flood, 2014): enough for test data, with a seed that a failure can print.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    fn bytes(&mut self, n: usize) -> Vec<u8> {
        (0..n).map(|_| self.next() as u8).collect()
    }
}

#[test]
fn edges_for_64_kb() {
    let edges = |dtype| {
        let t = tiling(&[4096, 4096], View::RowsByLast, dtype);
        (t.tile_rows(), t.tile_cols())
    };
    assert_eq!(edges(DType::Float32), (128, 128));
    assert_eq!(edges(DType::Float64), (64, 128));
    assert_eq!(edges(DType::Float16), (128, 256));
    assert_eq!(edges(DType::Int8), (256, 256));
    assert_eq!(edges(DType::Complex128), (64, 64));
    assert_eq!(edges(DType::Int4), (1, 131072));
    assert_eq!(edges(DType::UInt2), (1, 262144));
}

#[test]
fn narrow_and_low_matrices_fill_their_blocks() {
    let edges = |dims: &[u64], view| {
        let t = tiling(dims, view, DType::Float32);
        (t.tile_rows(), t.tile_cols(), t.tile_count())
    };
    assert_eq!(edges(&[28, 256], View::RowsByLast), (32, 512, 1));
    assert_eq!(edges(&[100_000, 8], View::RowsByLast), (2048, 8, 49));
    assert_eq!(edges(&[64, 3, 7, 7], View::RowsByFirst), (64, 256, 1));
    assert_eq!(edges(&[1000, 100], View::RowsByLast), (128, 128, 8));
    assert_eq!(edges(&[20_000], View::RowsByLast), (1, 16_384, 2));
    assert_eq!(edges(&[1000, 28], View::Transposed), (32, 512, 2));
}

#[test]
fn matrices_by_view() {
    let matrix = |dims: &[u64], view| {
        let t = tiling(dims, view, DType::Float32);
        (t.rows(), t.cols())
    };
    assert_eq!(matrix(&[2, 3, 5], View::RowsByLast), (6, 5));
    assert_eq!(matrix(&[2, 3, 5], View::RowsByFirst), (2, 15));
    assert_eq!(matrix(&[2, 3], View::Transposed), (3, 2));
    assert_eq!(matrix(&[7], View::RowsByLast), (1, 7));
    assert_eq!(matrix(&[7], View::RowsByFirst), (1, 7));
    assert_eq!(matrix(&[], View::RowsByFirst), (1, 1));
    for view in [View::RowsByLast, View::RowsByFirst, View::Transposed] {
        assert_eq!(View::from_name(view.name()), Some(view));
        let empty = tiling(&[3, 0], view, DType::Float32);
        assert_eq!((empty.tile_count(), empty.tiles().count(), empty.byte_len()), (0, 0, 0));
        let empty = tiling(&[0, 3], view, DType::Int4);
        assert_eq!((empty.tile_count(), empty.tiles().count(), empty.byte_len()), (0, 0, 0));
    }
}

#[test]
fn refuses_what_does_not_fit() {
    let new = |dims: &[u64], view, dtype, bytes| Tiling::new(dims, view, dtype, bytes).unwrap_err();
    let huge = [1 << 32, 1 << 32];
    for dims in [&huge[..], &[1 << 61, 2], &[0, 1 << 63, 2], &[u64::MAX]] {
        assert_eq!(
            new(dims, View::RowsByLast, DType::Float32, K64),
            TilingError::TooLarge { dtype: DType::Float32, dims: dims.to_vec() }
        );
    }
    assert!(matches!(new(&[1 << 40, 1 << 20], View::RowsByLast, DType::Int8, 64), TilingError::TooManyTiles { .. }));
    assert_eq!(new(&[2, 2, 2], View::Transposed, DType::Int8, K64), TilingError::NoMatrix(3));
    assert_eq!(new(&[2], View::RowsByLast, DType::Int8, 63), TilingError::BlockBytes(63));
    assert_eq!(new(&[2], View::RowsByLast, DType::Int8, usize::MAX), TilingError::BlockBytes(usize::MAX));

    let t = tiling(&[2, 3], View::RowsByLast, DType::Float32);
    let tile = t.tile(0, 0).unwrap();
    assert_eq!(t.tile(0, 1), None);
    assert_eq!(t.tile(1, 0), None);
    let mut out = Vec::new();
    assert!(matches!(t.gather(tile, &[0; 23], &mut out), Err(TilingError::Length { expected: 24, actual: 23, .. })));
    assert!(matches!(t.scatter(tile, &[0; 25], &mut [0; 24]), Err(TilingError::Length { what: "the block", .. })));
    let foreign = Tile { rows: 3, ..tile };
    assert!(matches!(t.gather(foreign, &[0; 24], &mut out), Err(TilingError::NoSuchTile { .. })));
}

/// The block of a tile, element by element from the definition of the view.
fn reference(t: &Tiling, tile: Tile, dims: &[u64], src: &[u8]) -> Vec<u8> {
    let bits = t.dtype().bits() as u64;
    let get = |index: u64| -> u128 {
        if bits < 8 {
            let bit = index * bits;
            return u128::from(src[(bit / 8) as usize] >> (bit % 8)) & ((1 << bits) - 1);
        }
        let width = bits as usize / 8;
        let at = index as usize * width;
        let mut element = [0; 16];
        element[..width].copy_from_slice(&src[at..at + width]);
        u128::from_le_bytes(element)
    };
    let mut out = vec![0; t.tile_bytes(tile)];
    let mut place = 0;
    for row in tile.row0..tile.row0 + u64::from(tile.rows) {
        for col in tile.col0..tile.col0 + u64::from(tile.cols) {
            let transposed = t.view() == View::Transposed && bits >= 8;
            let element = get(if transposed { col * dims[1] + row } else { row * t.cols() + col });
            if bits < 8 {
                out[(place * bits / 8) as usize] |= (element as u8) << (place * bits % 8);
            } else {
                let width = bits as usize / 8;
                out[place as usize * width..][..width].copy_from_slice(&element.to_le_bytes()[..width]);
            }
            place += 1;
        }
    }
    out
}

fn check_roundtrip(dims: &[u64], view: View, dtype: DType, block_bytes: usize, random: &mut Random) {
    let context = || format!("{dims:?} {view} {dtype} {block_bytes}");
    let t = Tiling::new(dims, view, dtype, block_bytes).unwrap();
    assert!(t.tile_rows().is_power_of_two() && t.tile_cols().is_power_of_two(), "{}", context());
    let mut src = random.bytes(t.byte_len());
    if dtype.is_packed() {
        // The padding of the last byte is zero.
        let used = dims.iter().product::<u64>() * u64::from(dtype.bits()) % 8;
        if let (1.., Some(last)) = (used, src.last_mut()) {
            *last &= (1 << used) - 1;
        }
    }
    let mut back = random.bytes(src.len());
    let mut block = vec![0xee; 3];
    let mut elements = 0;
    for tile in t.tiles() {
        t.gather(tile, &src, &mut block).unwrap();
        assert!(block.len() <= block_bytes, "{}", context());
        assert_eq!(block, reference(&t, tile, dims, &src), "{} {tile:?}", context());
        t.scatter(tile, &block, &mut back).unwrap();
        elements += u64::from(tile.rows) * u64::from(tile.cols);
    }
    assert_eq!(elements, dims.iter().product::<u64>(), "{}", context());
    assert_eq!(back, src, "{}", context());
}

#[test]
fn gather_and_scatter_are_inverse() {
    let mut random = Random(1);
    for &dtype in DType::ALL {
        for view in [View::RowsByLast, View::RowsByFirst, View::Transposed] {
            for dims in [[1, 1], [1, 17], [17, 1], [33, 47], [64, 64], [65, 129]] {
                check_roundtrip(&dims, view, dtype, 1024, &mut random);
            }
        }
        for dims in [&[][..], &[1], &[1025], &[3, 5, 7], &[2, 1, 9, 4], &[3, 0, 2]] {
            check_roundtrip(dims, View::RowsByLast, dtype, 64, &mut random);
            check_roundtrip(dims, View::RowsByFirst, dtype, 64, &mut random);
        }
    }
}

#[test]
fn gather_and_scatter_are_inverse_for_random_tensors() {
    for seed in 0..400 {
        let mut random = Random(seed);
        let dtype = DType::ALL[random.below(DType::ALL.len() as u64) as usize];
        let rank = random.below(5) as usize;
        let dims: Vec<u64> = (0..rank).map(|_| random.below(if rank > 2 { 12 } else { 90 })).collect();
        let views = [View::RowsByLast, View::RowsByFirst, View::Transposed];
        let view = views[random.below(if rank == 2 { 3 } else { 2 }) as usize];
        let block_bytes = 64 + random.below(5000) as usize;
        check_roundtrip(&dims, view, dtype, block_bytes, &mut random);
    }
}
