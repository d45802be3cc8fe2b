//! Tests of small forms: the way there and back, for every type, and with damaged bytes.

use super::*;
use crate::Block;

/// Numbers that look random, the same in every run.
struct Noise(u64);

impl Noise {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn bytes(&mut self, len: usize) -> Vec<u8> {
        (0..len).map(|_| self.next() as u8).collect()
    }

    /// A sum of uniform numbers: its exponents are distributed as those of weights.
    fn weight(&mut self) -> f32 {
        (0..6).map(|_| (self.next() >> 40) as f32 / (1 << 24) as f32 - 0.5).sum::<f32>() * 0.05
    }
}

fn value(dtype: DType, shape: &[u32], data: &[u8]) -> Vec<u8> {
    let block = Block::new(dtype, shape.to_vec(), data).unwrap();
    [&block.head(), block.data()].concat()
}

fn of_f32(values: impl Iterator<Item = f32>) -> Vec<u8> {
    let data: Vec<u8> = values.flat_map(f32::to_le_bytes).collect();
    value(DType::Float32, &[data.len() as u32 / 4], &data)
}

/// The form's name and the stored bytes, after the value has come back from it.
fn there_and_back(value: &[u8], compression: Compression) -> Option<(Encoding, Vec<u8>)> {
    let (encoding, stored) = encode(value, compression)?;
    assert!(stored.len() < value.len() && Encoding::from_code(encoding.code()) == Some(encoding));
    let encoded = Encoded::open(encoding, &stored).unwrap();
    assert_eq!(encoded.value_len(), value.len() as u64);
    let mut back = vec![0xaa; value.len()];
    encoded.value_into(&mut back).unwrap();
    assert!(back == value, "{encoding:?}");
    Some((encoding, stored))
}

fn form(value: &[u8], compression: Compression) -> Option<&'static str> {
    there_and_back(value, compression).and_then(|(encoding, _)| encoding.name())
}

#[test]
fn equal_elements_of_every_type_are_one() {
    for &dtype in DType::ALL {
        let width = width_of(dtype);
        let element = Noise(dtype as u64 + 1).bytes(width);
        let data = element.repeat(dtype.byte_len(1000).unwrap() as usize / width);
        for element in [data.clone(), vec![0; data.len()]] {
            let (encoding, stored) = there_and_back(&value(dtype, &[10, 100], &element), Compression::Huffman).unwrap();
            assert_eq!((encoding.name(), stored.len()), (Some("constant"), 12 + width), "{dtype}");
        }
        let mut other = data;
        let last = other.len() - 1;
        other[last] ^= 1;
        assert_ne!(form(&value(dtype, &[10, 100], &other), Compression::None), Some("constant"), "{dtype}");
    }
}

#[test]
fn noise_of_every_type_stays_as_it_is() {
    for &dtype in DType::ALL {
        let data = Noise(dtype as u64 + 77).bytes(dtype.byte_len(5000).unwrap() as usize);
        assert_eq!(encode(&value(dtype, &[5000], &data), Compression::None), None, "{dtype}");
        assert_eq!(encode(&value(dtype, &[5000], &data), Compression::Huffman), None, "{dtype}");
    }
}

#[test]
fn elements_of_every_type_that_repeat_are_compressed_in_planes() {
    for &dtype in DType::ALL {
        let mut noise = Noise(dtype as u64 + 5);
        let data: Vec<u8> = (0..dtype.byte_len(5000).unwrap()).map(|_| (noise.next() % 3) as u8 * 0x31).collect();
        let shape = [5, 1000];
        assert_eq!(encode(&value(dtype, &shape, &data), Compression::None), None, "{dtype}");
        let (encoding, stored) = there_and_back(&value(dtype, &shape, &data), Compression::Huffman).unwrap();
        assert_eq!(encoding.name(), Some("huffman"), "{dtype}");
        assert!(stored.len() * 2 < data.len(), "{dtype}: {} of {}", stored.len(), data.len());
    }
}

#[test]
fn weights_keep_their_mantissas_and_lose_a_tenth_at_least() {
    let mut noise = Noise(9);
    let weights: Vec<f32> = (0..16384).map(|_| noise.weight()).collect();
    assert_eq!(form(&of_f32(weights.iter().copied()), Compression::None), None);
    assert_eq!(form(&of_f32(weights.iter().copied()), Compression::Huffman), Some("huffman"));
    let brain = || weights.iter().map(|&w| f32::from(half::bf16::from_f32(w)));
    assert_eq!(form(&of_f32(brain()), Compression::None), Some("bfloat16"));
    assert_eq!(form(&of_f32(brain()), Compression::Huffman), Some("bfloat16+huffman"));
    let half = || weights.iter().map(|&w| f32::from(half::f16::from_f32(w)));
    assert_eq!(form(&of_f32(half()), Compression::None), Some("float16"));
    assert_eq!(form(&of_f32(half()), Compression::Huffman), Some("float16+huffman"));
    let double: Vec<u8> = weights.iter().flat_map(|&w| f64::from(w).to_le_bytes()).collect();
    let double = value(DType::Float64, &[128, 128], &double);
    assert_eq!(form(&double, Compression::None), Some("float32"));
    assert_eq!(form(&double, Compression::Huffman), Some("float32+huffman"));
}

#[test]
fn one_element_that_is_wider_keeps_a_block_wide() {
    let narrow = |last: u32| of_f32((0..2000).map(|i| i as f32).chain([f32::from_bits(last)]));
    for (bits, expected) in [
        (0x8000_0000, Some("float16")),
        (0x7fc0_0000, Some("float16")),
        (0xffb4_6000, Some("float16")),
        (0x7fc0_0001, None),
        (0x0000_0001, None),
        (0x0080_0000, None),
        (0x3f80_1000, None),
        (0x477f_f000, None),
    ] {
        assert_eq!(form(&narrow(bits), Compression::None), expected, "{bits:#x}");
    }
}

#[test]
fn bits_that_no_arithmetic_keeps_come_back() {
    // Signalling NaNs, negative zeros and subnormal numbers, none of which has a mantissa beyond bfloat16's.
    let bits = [0x7f81_0000u32, 0xff81_0000, 0x8000_0000, 0x0001_0000, 0x807f_0000, 0x7f80_0000];
    let values = (0..600).map(|i| f32::from_bits(bits[i * 7 % 6] ^ (i as u32 % 3) << 16));
    assert_eq!(form(&of_f32(values), Compression::None), Some("bfloat16"));
}

#[test]
fn what_cannot_be_smaller_is_left_alone() {
    for compression in [Compression::None, Compression::Huffman] {
        assert_eq!(encode(&[], compression), None);
        assert_eq!(encode(b"no block at all", compression), None);
        assert_eq!(encode(&value(DType::Float32, &[0, 7], &[]), compression), None);
        assert_eq!(encode(&value(DType::Float32, &[1], &[1, 2, 3, 4]), compression), None);
        let long = [value(DType::Float32, &[2], &[0; 8]), vec![0]].concat();
        assert_eq!(encode(&long, compression), None);
    }
}

#[test]
fn codes_and_names_are_one_to_one() {
    let known: Vec<Encoding> = (0..=u8::MAX).filter_map(Encoding::from_code).collect();
    assert_eq!(known.iter().map(|e| e.code()).collect::<Vec<_>>(), [0, 1, 2, 3, 4, 16, 18, 19, 20]);
    let mut names = std::collections::HashSet::new();
    assert!(known.iter().all(|e| names.insert(e.name())));
}

#[test]
fn damaged_bytes_give_an_error_or_other_elements_and_nothing_else() {
    let mut noise = Noise(3);
    let half = |noise: &mut Noise| f32::from(half::f16::from_f32(noise.weight()));
    let values = [
        of_f32((0..512).map(|_| 1.5)),
        of_f32((0..512).map(|_| half(&mut noise))),
        of_f32((0..512).map(|_| noise.weight())),
        value(DType::Complex128, &[40], &[1, 2].repeat(320)),
    ];
    for value in values {
        for compression in [Compression::None, Compression::Huffman] {
            let Some((encoding, stored)) = encode(&value, compression) else { continue };
            let attempt = |encoding: Encoding, stored: &[u8], room: usize| {
                let mut out = vec![0; room];
                Encoded::open(encoding, stored).and_then(|encoded| encoded.value_into(&mut out))
            };
            assert_eq!(attempt(encoding, &stored, value.len()), Ok(()));
            for room in [0, 1, 11, 12, 13, value.len() - 1, value.len() + 1, value.len() * 2] {
                assert!(attempt(encoding, &stored, room).is_err(), "{room}");
            }
            for cut in 0..stored.len() {
                assert!(attempt(encoding, &stored[..cut], value.len()).is_err(), "{cut}");
            }
            assert!(attempt(encoding, &[&stored[..], &[0]].concat(), value.len()).is_err());
            for at in 0..stored.len() {
                for flip in [1, 0x80, 0xff, noise.next() as u8] {
                    let mut damaged = stored.clone();
                    damaged[at] ^= flip;
                    let _ = attempt(encoding, &damaged, value.len());
                }
            }
            for other in (0..=u8::MAX).filter_map(Encoding::from_code) {
                let _ = attempt(other, &stored, value.len());
            }
        }
    }
    // A shape of which no machine has the memory.
    let huge = [&[1u8, 1, 3, 0][..], &[255, 255, 255, 127].repeat(3), &[0; 4]].concat();
    for encoding in (0..=u8::MAX).filter_map(Encoding::from_code) {
        assert!(Encoded::open(encoding, &huge).is_err_and(|e| e == EncodingError::Head));
    }
}
