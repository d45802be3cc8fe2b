//! A row has the same bits alone and in any batch, with weights in the plan and in blocks.

use super::*;
use crate::kernels::tests::Random;
use crate::onnx::{NoExternalData, strip};
use crate::weights::{BlockSource, PrivateBlocks};
use prost::Message;

/// The plan on constants, and the plan on blocks with its source.
fn plans(graph: GraphProto) -> Vec<(Plan, Arc<dyn BlockSource>)> {
    let bytes = model(graph).encode_to_vec();
    let stripped = strip(&bytes, &mut NoExternalData, &mut || Ok(())).unwrap();
    let mut fetch = |ordinal: u32, out: &mut Vec<u8>| {
        out.extend_from_slice(&stripped.tensors[ordinal as usize].data);
        Ok(())
    };
    let tiling = |tensor: &crate::onnx::StoredTensor| Tiling::new(&tensor.dims, tensor.view, tensor.dtype, 16 << 10);
    let tilings: Vec<_> = stripped.tensors.iter().map(|tensor| Some(tiling(tensor).unwrap())).collect();
    let options = CompileOptions { inline_tensor_bytes: 4 << 10, ..CompileOptions::default() };
    let on_blocks = Plan::compile_on_blocks(&stripped.graph, &mut fetch, &tilings, &options, &mut || false).unwrap();
    assert!(!on_blocks.stored_tensors().is_empty());
    let mut blocks = PrivateBlocks::new();
    for tensor in on_blocks.stored_tensors() {
        blocks.add(tensor, &stripped.tensors[tensor.ordinal as usize].data).unwrap();
    }
    let inline = Plan::compile(&stripped.graph, &mut fetch, &options).unwrap();
    vec![(inline, Arc::new(PrivateBlocks::new())), (on_blocks, Arc::new(blocks))]
}

/// Rows along this axis of a tensor.
fn rows_of(tensor: &HostTensor, axis: usize, row: usize) -> (Vec<usize>, Vec<f32>) {
    let (values, size) = (tensor.to_f32().unwrap(), tensor.shape[axis]);
    let inner: usize = tensor.shape[axis + 1..].iter().product();
    let mut shape = tensor.shape.clone();
    shape[axis] = 1;
    (shape, values.chunks(size * inner).flat_map(|outer| outer[row * inner..(row + 1) * inner].to_vec()).collect())
}

/// Compares each row of batches of these sizes with the row alone; rows lie along these axes of input and output.
fn check(what: &str, graph: GraphProto, shape: &[usize], (input, output): (usize, usize), sizes: &[usize]) {
    let mut random = Random::new(50);
    let cancel = Arc::new(AtomicBool::new(false));
    for (way, (plan, source)) in plans(graph).into_iter().enumerate() {
        let result = |shape: &[usize], values: &[f32]| {
            let given = vec![("x".to_owned(), HostTensor::from_f32(shape, values).unwrap())];
            plan.run_on_blocks(given, source.clone(), &cancel).unwrap().swap_remove(0).1
        };
        for &rows in sizes {
            let mut shape = shape.to_vec();
            shape[input] = rows;
            let values = random.values(shape.iter().product());
            let (given, made) = (HostTensor::from_f32(&shape, &values).unwrap(), result(&shape, &values));
            for row in 0..rows {
                let (shape, values) = rows_of(&given, input, row);
                let alone = result(&shape, &values).to_f32().unwrap();
                let together = rows_of(&made, output, row).1;
                let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
                assert_eq!(bits(&alone), bits(&together), "{what}, way {way}: row {row} of {rows}");
            }
        }
    }
}

#[test]
fn products_and_functions() {
    let mut random = Random::new(51);
    for (activation, transposed) in [("Relu", 0), ("Sigmoid", 1), ("Tanh", 0), ("Softmax", 1)] {
        let mut weight =
            |name: &str, dims: &[i64]| floats(name, dims, &random.values(dims.iter().product::<i64>() as usize));
        let (k, n) = (150, 130);
        let dims = |k: i64, n: i64| if transposed == 1 { [n, k] } else { [k, n] };
        let weights = vec![weight("w", &dims(k, n)), weight("b", &[n]), weight("v", &dims(n, 3)), weight("c", &[3])];
        let nodes = vec![
            node("Gemm", &["x", "w", "b"], &["h"]).int("transB", transposed),
            node(activation, &["h"], &["a"]),
            node("Gemm", &["a", "v", "c"], &["y"]).int("transB", transposed),
        ];
        let made =
            graph(vec![info("x", FLOAT, &[N("n"), S(k)])], vec![info("y", FLOAT, &[N("n"), S(3)])], nodes, weights);
        check(activation, made, &[0, 150], (0, 0), &[2, 3, 4, 5, 6, 7, 13, 40, 300]);
    }
}

#[test]
fn recurrent_layers() {
    let mut random = Random::new(52);
    for (operator, gates) in [("LSTM", 4i64), ("GRU", 3)] {
        let mut weight =
            |name: &str, dims: &[i64]| floats(name, dims, &random.values(dims.iter().product::<i64>() as usize));
        let (features, size) = (20, 48);
        let rows = gates * size;
        let weights =
            vec![weight("w", &[1, rows, features]), weight("r", &[1, rows, size]), weight("b", &[1, 2 * rows])];
        let nodes = vec![node(operator, &["x", "w", "r", "b"], &["y"]).int("hidden_size", size)];
        let (input, output) = ([N("t"), N("n"), S(features)], [N("t"), S(1), N("n"), S(size)]);
        let made = graph(vec![info("x", FLOAT, &input)], vec![info("y", FLOAT, &output)], nodes, weights);
        check(operator, made, &[5, 0, 20], (1, 2), &[2, 3, 5, 7, 24]);
    }
}

#[test]
fn convolutions() {
    let mut random = Random::new(53);
    for (kernel, group) in [(3, 1), (1, 1), (3, 16)] {
        let mut weight =
            |name: &str, dims: &[i64]| floats(name, dims, &random.values(dims.iter().product::<i64>() as usize));
        let weights = vec![weight("w", &[128, 16 / group, kernel, kernel]), weight("b", &[128])];
        let nodes = vec![
            node("Conv", &["x", "w", "b"], &["c"]).ints("kernel_shape", &[kernel, kernel]).int("group", group),
            node("Relu", &["c"], &["y"]),
        ];
        let shape = |channels: i64, size: i64| [N("n"), S(channels), S(size), S(size)];
        let (input, output) = (info("x", FLOAT, &shape(16, 9)), info("y", FLOAT, &shape(128, 10 - kernel)));
        check("Conv", graph(vec![input], vec![output], nodes, weights), &[0, 16, 9, 9], (0, 0), &[2, 3, 9]);
    }
}

/// Of tensors that are stored as the transpose of what others are, with at least eight rows and columns in each block.
#[test]
fn a_product_has_the_same_bits_whichever_way_its_matrix_lies() {
    let mut random = Random::new(51);
    let cancel = Arc::new(AtomicBool::new(false));
    let bits = |tensor: &HostTensor| -> Vec<u32> { tensor.to_f32().unwrap().iter().map(|v| v.to_bits()).collect() };
    for (k, n) in [(64, 64), (200, 72), (136, 40), (8, 700), (700, 8), (300, 333)] {
        let values = random.values(k * n);
        for op in ["MatMul", "Gemm"] {
            let made = graph(
                vec![info("x", FLOAT, &[N("n"), S(k as i64)])],
                vec![info("y", FLOAT, &[N("n"), S(n as i64)])],
                match op {
                    "MatMul" => vec![node("MatMul", &["x", "w"], &["y"])],
                    _ => vec![node("Gemm", &["x", "w"], &["y"]).int("transB", 1)],
                },
                vec![floats("w", &if op == "MatMul" { [k as i64, n as i64] } else { [n as i64, k as i64] }, &values)],
            );
            let bytes = model(made).encode_to_vec();
            let stripped = strip(&bytes, &mut NoExternalData, &mut || Ok(())).unwrap();
            let tensor = &stripped.tensors[0];
            let turned = tensor.view.turned(2).unwrap();
            let plans = [tensor.view, turned].map(|view| {
                let tiling = Tiling::new(&tensor.dims, view, tensor.dtype, 16 << 10).unwrap();
                let options = CompileOptions { inline_tensor_bytes: 4 << 10, ..CompileOptions::default() };
                let mut fetch = |_: u32, _: &mut Vec<u8>| Err(ModelError::internal("it is stored"));
                let tilings = [Some(tiling)];
                let plan = Plan::compile_on_blocks(&stripped.graph, &mut fetch, &tilings, &options, &mut || false);
                let plan = plan.unwrap();
                assert_eq!(plan.stored_tensors()[0].tiling.view(), view);
                let mut blocks = PrivateBlocks::new();
                blocks.add(&plan.stored_tensors()[0], &tensor.data).unwrap();
                (plan, Arc::new(blocks))
            });
            for m in [1, 2, 5, 31, 100] {
                let x = random.values(m * k);
                let [plain, turned] = plans.each_ref().map(|(plan, blocks)| {
                    let given = vec![("x".to_owned(), HostTensor::from_f32(&[m, k], &x).unwrap())];
                    bits(&plan.run_on_blocks(given, blocks.clone(), &cancel).unwrap()[0].1)
                });
                assert!(plain == turned, "{op}, {m} x {k} x {n}");
            }
        }
    }
}
