//! Values that go to files give the numbers that values in memory give.

use super::*;
use crate::weights::{BlockSource, Frame, SpillFile};
use std::sync::Mutex;

/// Files in memory, counted.
pub(super) struct Files {
    operator_memory: u64,
    written: Arc<Mutex<Vec<u64>>>,
}

struct File {
    bytes: Vec<u8>,
    number: usize,
    written: Arc<Mutex<Vec<u64>>>,
}

impl SpillFile for File {
    fn append(&mut self, bytes: Vec<u8>) -> Result<(), ModelError> {
        self.bytes.extend(&bytes);
        self.written.lock().unwrap()[self.number] = self.bytes.len() as u64;
        Ok(())
    }

    fn read(&mut self, offset: u64, len: usize) -> Result<Vec<u8>, ModelError> {
        Ok(self.bytes[offset as usize..][..len].to_vec())
    }
}

impl BlockSource for Files {
    fn pin(&self, _: u32, _: &[u32]) -> Result<Vec<Box<dyn Frame>>, ModelError> {
        Err(ModelError::internal("there are no blocks"))
    }

    fn operator_memory(&self) -> u64 {
        self.operator_memory
    }

    fn spill_file(&self) -> Result<Option<Box<dyn SpillFile>>, ModelError> {
        let mut written = self.written.lock().unwrap();
        written.push(0);
        Ok(Some(Box::new(File { bytes: vec![], number: written.len() - 1, written: self.written.clone() })))
    }
}

/// A pointwise convolution over a picture, a function, another pointwise convolution, and the mean of each channel.
fn pointwise(reduce: &str) -> GraphProto {
    let filters: Vec<f32> = (0..12 * 3).map(|n| ((n * 7) % 11) as f32 / 11.0 - 0.4).collect();
    let second: Vec<f32> = (0..5 * 12).map(|n| ((n * 5) % 13) as f32 / 13.0 - 0.5).collect();
    graph(
        vec![info("x", FLOAT, &[S(1), S(3), S(40), S(24)])],
        vec![info("y", FLOAT, &[S(1), S(5), S(1), S(1)])],
        vec![
            node("Conv", &["x", "w"], &["c"]),
            node("Erf", &["c"], &["e"]),
            node("Add", &["e", "c"], &["s"]),
            node("Conv", &["s", "v"], &["d"]),
            node(reduce, &["d"], &["y"]),
        ],
        vec![floats("w", &[12, 3, 1, 1], &filters), floats("v", &[5, 12, 1, 1], &second)],
    )
}

#[test]
fn what_goes_to_files_is_what_stays_in_memory() {
    for reduce in ["GlobalAveragePool", "GlobalMaxPool"] {
        let plan = compile_with(model(pointwise(reduce)), &CompileOptions::default()).unwrap();
        let picture: Vec<f32> = (0..3 * 40 * 24).map(|n| ((n * 31) % 101) as f32 / 50.0 - 1.0).collect();
        let input = || vec![("x".to_owned(), HostTensor::from_f32(&[1, 3, 40, 24], &picture).unwrap())];
        let cancel = Arc::new(AtomicBool::new(false));
        let expected = plan.run(input(), &cancel).unwrap()[0].1.to_f32().unwrap();
        for operator_memory in [4_000, 9_000, 30_000] {
            let written = Arc::new(Mutex::new(vec![]));
            let files = Arc::new(Files { operator_memory, written: written.clone() });
            let outputs = plan.run_on_blocks(input(), files, &cancel).unwrap();
            let values = outputs[0].1.to_f32().unwrap();
            for (value, expected) in values.iter().zip(&expected) {
                assert!((value - expected).abs() <= 1e-5 * (1.0 + expected.abs()), "{value} is not {expected}");
            }
            let written = written.lock().unwrap();
            let large = 12 * 40 * 24 * 4;
            assert!(written.contains(&large), "{reduce} with {operator_memory} bytes: files of {written:?} bytes");
        }
    }
}

/// A source whose runs spill what is above `operator_memory` bytes.
pub(super) fn files(operator_memory: u64) -> Arc<Files> {
    Arc::new(Files { operator_memory, written: Arc::default() })
}

#[test]
fn an_operator_whose_size_depends_on_data_sees_what_lies_in_a_file() {
    let filters: Vec<f32> = (0..12 * 3).map(|n| ((n * 7) % 11) as f32 / 11.0 - 0.4).collect();
    let graph = graph(
        vec![info("x", FLOAT, &[S(1), S(3), S(40), S(24)])],
        vec![info("y", FLOAT, &[S(1), S(12), S(40), S(2)])],
        vec![
            node("Conv", &["x", "w"], &["c"]),
            node("Erf", &["c"], &["e"]),
            node("TopK", &["e", "k"], &["y", "at"]).int("axis", 3),
        ],
        vec![floats("w", &[12, 3, 1, 1], &filters), ints("k", &[1], &[2])],
    );
    let plan = compile(graph).unwrap();
    let picture: Vec<f32> = (0..3 * 40 * 24).map(|n| ((n * 31) % 101) as f32 / 50.0 - 1.0).collect();
    let input = || vec![("x".to_owned(), HostTensor::from_f32(&[1, 3, 40, 24], &picture).unwrap())];
    let cancel = Arc::new(AtomicBool::new(false));
    let expected = plan.run(input(), &cancel).unwrap()[0].1.to_f32().unwrap().to_vec();
    let made = plan.run_on_blocks(input(), files(9_000), &cancel).unwrap();
    assert_eq!(made[0].1.to_f32().unwrap(), expected);
}

#[test]
fn what_cannot_be_cut_where_it_is_needed_counts_against_the_limit() {
    let filters: Vec<f32> = (0..64 * 9).map(|n| ((n * 7) % 11) as f32 / 11.0 - 0.4).collect();
    // A convolution of 3 x 3 is cut between images only: one image is in memory as a whole.
    let graph = graph(
        vec![info("x", FLOAT, &[N("batch"), S(1), S(64), S(64)])],
        vec![info("y", FLOAT, &[N("batch"), S(64), S(1), S(1)])],
        vec![
            node("Conv", &["x", "w"], &["c"]).ints("pads", &[1; 4]),
            node("Erf", &["c"], &["e"]),
            node("GlobalAveragePool", &["e"], &["y"]),
        ],
        vec![floats("w", &[64, 1, 3, 3], &filters)],
    );
    let image = 64 * 64 * 64 * 4;
    for (limit, fits) in [(image / 2, false), (3 * image, true)] {
        let options = CompileOptions { memory_limit: limit, ..CompileOptions::default() };
        let plan = compile_with(model(graph.clone()), &options).unwrap();
        for images in [1, 2, 5] {
            let input = vec![("x".to_owned(), f32s(&[images, 1, 64, 64], &vec![0.5; images * 64 * 64]))];
            let cancel = Arc::new(AtomicBool::new(false));
            let made = plan.run_on_blocks(input, files(20_000), &cancel);
            match (fits, made) {
                (true, made) => drop(made.unwrap()),
                (false, made) => assert_eq!(made.unwrap_err().kind, TooLarge, "{images} images, {limit} bytes"),
            }
        }
        if fits {
            // The setting is raised: the same run would take more memory than before.
            let input = vec![("x".to_owned(), f32s(&[5, 1, 64, 64], &vec![0.5; 5 * 64 * 64]))];
            let made = plan.run_on_blocks(input, files(u64::MAX), &Arc::new(AtomicBool::new(false)));
            assert_eq!(made.unwrap_err().kind, TooLarge);
        }
    }
}

#[test]
fn operands_that_are_broadcast_are_cut_with_what_they_are_added_to() {
    let mut random = crate::kernels::tests::Random::new(91);
    let cancel = Arc::new(AtomicBool::new(false));
    let mut spilled = 0;
    for (channels, height, width) in [(12, 40, 23), (8, 33, 24), (5, 64, 7), (16, 31, 31), (1, 128, 9)] {
        let whole = [1, channels, height, width];
        for ones in 0..16 {
            let dims: Vec<i64> = (0..4).map(|axis| if ones & 1 << axis == 0 { whole[axis] } else { 1 }).collect();
            let count = dims.iter().product::<i64>() as usize;
            for operator in ["Add", "Sub", "Div", "Max"] {
                let graph = graph(
                    vec![
                        info("x", FLOAT, &whole.map(S)),
                        info("z", FLOAT, &dims.iter().map(|&dim| S(dim)).collect::<Vec<_>>()),
                    ],
                    vec![info("y", FLOAT, &[S(1), S(1), S(1), S(1)])],
                    vec![
                        node("Erf", &["x"], &["e"]),
                        node(operator, &["z", "e"], &["t"]),
                        node(operator, &["t", "z"], &["s"]),
                        node("Mul", &["s", "w"], &["u"]),
                        node("Add", &["u", "v"], &["a"]),
                        node("ReduceMax", &["a"], &["y"]).ints("axes", &[0, 1, 2, 3]),
                    ],
                    vec![floats("w", &dims, &random.values(count)), floats("v", &[1], &[0.25])],
                );
                let plan = compile(graph).unwrap();
                let x = random.values((channels * height * width) as usize);
                let z: Vec<f32> = random.values(count).iter().map(|value| value + 2.0).collect();
                let shape = |dims: &[i64]| dims.iter().map(|&dim| dim as usize).collect::<Vec<_>>();
                let input =
                    || vec![("x".to_owned(), f32s(&shape(&whole), &x)), ("z".to_owned(), f32s(&shape(&dims), &z))];
                let expected = plan.run(input(), &cancel).unwrap()[0].1.to_f32().unwrap()[0];
                for operator_memory in [3_000, 7_777] {
                    let files = files(operator_memory);
                    let made = plan.run_on_blocks(input(), files.clone(), &cancel).unwrap()[0].1.to_f32().unwrap()[0];
                    assert!(
                        (made - expected).abs() <= 1e-5 * (1.0 + expected.abs()),
                        "{operator} {whole:?} {dims:?}: {made} is not {expected}"
                    );
                    spilled += files.written.lock().unwrap().len();
                }
            }
        }
    }
    assert!(spilled > 100, "{spilled}");
}

#[test]
fn transposed_convolutions_are_cut_between_images() {
    let filters: Vec<f32> = (0..3 * 8 * 4).map(|n| ((n * 7) % 11) as f32 / 11.0 - 0.4).collect();
    let graph = graph(
        vec![info("x", FLOAT, &[N("batch"), S(3), S(12), S(10)])],
        vec![info("y", FLOAT, &[N("batch"), S(8), S(1), S(1)])],
        vec![
            node("ConvTranspose", &["x", "w"], &["t"]).ints("strides", &[2, 2]),
            node("Erf", &["t"], &["e"]),
            node("GlobalMaxPool", &["e"], &["y"]),
        ],
        vec![floats("w", &[3, 8, 2, 2], &filters)],
    );
    let plan = compile(graph).unwrap();
    let pictures: Vec<f32> = (0..7 * 3 * 120).map(|n| ((n * 31) % 101) as f32 / 50.0 - 1.0).collect();
    let input = || vec![("x".to_owned(), HostTensor::from_f32(&[7, 3, 12, 10], &pictures).unwrap())];
    let cancel = Arc::new(AtomicBool::new(false));
    let expected = plan.run(input(), &cancel).unwrap()[0].1.to_f32().unwrap().to_vec();
    let files = files(40_000);
    let written = files.written.clone();
    let made = plan.run_on_blocks(input(), files, &cancel).unwrap();
    assert_eq!(made[0].1.to_f32().unwrap(), expected);
    assert!(written.lock().unwrap().contains(&(7 * 8 * 480 * 4)), "the pictures go to a file");
}
