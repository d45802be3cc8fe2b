//! Training against finite differences, against functions that can be learnt, and against itself.

use super::models::*;
use super::*;
use crate::error::ErrorKind::{self, *};
use crate::error::ModelError;
use crate::kernels::tests::Random;
use crate::onnx::{NoExternalData, strip};
use prost::Message;

fn fine() -> Result<(), ModelError> {
    Ok(())
}

/// A net with its parameters.
fn made(random: &mut Random, inputs: usize, layers: &[(Form, bool, &str, usize)]) -> (FeedForward, Vec<Vec<f32>>) {
    let model =
        net(
            random,
            -1,
            inputs,
            layers,
            |node| if node.op_type == "LeakyRelu" { float(node, "alpha", 0.2) } else { node },
        );
    (recognised(&model).unwrap(), stripped(&model).1)
}

fn bits(params: &[Vec<f32>]) -> Vec<u32> {
    params.iter().flatten().map(|value| value.to_bits()).collect()
}

/// The outputs in float64, computed by the definition.
fn reference(net: &FeedForward, params: &[Vec<f64>], x: &[f32]) -> Vec<f64> {
    let mut row: Vec<f64> = x.iter().map(|&x| f64::from(x)).collect();
    for layer in net.layers() {
        let (k, n) = (layer.inputs, layer.outputs);
        let weight = |step: usize, column: usize| {
            params[layer.weights][if layer.transposed { column * k + step } else { step * n + column }]
        };
        let bias = |column: usize| layer.bias.map_or(0.0, |bias| params[bias][column]);
        let sums: Vec<f64> = (0..n)
            .map(|column| (0..k).map(|step| row[step] * weight(step, column)).sum::<f64>() + bias(column))
            .collect();
        let powers: f64 = sums.iter().map(|sum| sum.exp()).sum();
        let function = |sum: f64| match layer.function {
            Function::Identity => sum,
            Function::Relu => sum.max(0.0),
            Function::LeakyRelu(slope) => {
                if sum < 0.0 {
                    sum * f64::from(slope)
                } else {
                    sum
                }
            }
            Function::Sigmoid => 1.0 / (1.0 + (-sum).exp()),
            Function::Tanh => sum.tanh(),
            Function::Softmax => sum.exp() / powers,
        };
        row = sums.into_iter().map(function).collect();
    }
    row
}

/// The mean loss in float64, computed by the definition.
fn reference_loss(net: &FeedForward, params: &[Vec<f64>], x: &[f32], y: &[f32], rows: usize, loss: Loss) -> f64 {
    let (k, n) = net.widths();
    let last = net.layers()[net.layers().len() - 1].function;
    let one = |row: usize| {
        let out = reference(net, params, &x[row * k..][..k]);
        let y: Vec<f64> = y[row * n..][..n].iter().map(|&y| f64::from(y)).collect();
        let powers: f64 = out.iter().map(|out| out.exp()).sum();
        let each = |place: usize| match (loss, last) {
            (Loss::Mse, _) => (out[place] - y[place]).powi(2) / n as f64,
            (Loss::CrossEntropy, Function::Softmax) => -y[place] * out[place].ln(),
            (Loss::CrossEntropy, _) => -y[place] * (out[place].exp() / powers).ln(),
            (Loss::BinaryCrossEntropy, last) => {
                let p = if last == Function::Sigmoid { out[place] } else { 1.0 / (1.0 + (-out[place]).exp()) };
                -(y[place] * p.ln() + (1.0 - y[place]) * (1.0 - p).ln()) / n as f64
            }
        };
        (0..n).map(each).sum::<f64>()
    };
    (0..rows).map(one).sum::<f64>() / rows as f64
}

#[test]
fn gradients_are_those_of_finite_differences() {
    let mut random = Random::new(3);
    let cases: [(&str, Loss); 11] = [
        ("", Loss::Mse),
        ("Relu", Loss::Mse),
        ("LeakyRelu", Loss::Mse),
        ("Sigmoid", Loss::Mse),
        ("Tanh", Loss::Mse),
        ("Softmax", Loss::Mse),
        ("", Loss::CrossEntropy),
        ("Softmax", Loss::CrossEntropy),
        ("", Loss::BinaryCrossEntropy),
        ("Sigmoid", Loss::BinaryCrossEntropy),
        ("Tanh", Loss::Mse),
    ];
    for (place, (last, loss)) in cases.into_iter().enumerate() {
        let hidden = ["Tanh", "Sigmoid", "LeakyRelu", "Softmax", "Relu"][place % 5];
        let (form, other) = if place % 2 == 0 { (Form::Turned, Form::Gemm) } else { (Form::MatMul, Form::Turned) };
        let (net, params) = made(&mut random, 4, &[(form, true, hidden, 6), (other, place % 3 > 0, last, 3)]);
        // More rows than a piece of a batch has.
        let rows = 300;
        let x = random.values(rows * 4);
        let y: Vec<f32> = random.values(rows * 3).iter().map(|value| value.abs()).collect();
        // One step of all rows with a rate of 1 takes the gradient from the parameters.
        let options = TrainOptions { batch: rows as u32, learning_rate: 1.0, loss, ..TrainOptions::default() };
        let mut trained = params.clone();
        let report = train(&net, &mut trained, &x, &y, rows, &options, &mut fine).unwrap();
        let exact: Vec<Vec<f64>> = params.iter().map(|tensor| tensor.iter().map(|&v| f64::from(v)).collect()).collect();
        let expected = reference_loss(&net, &exact, &x, &y, rows, loss);
        assert!(
            (report.first_loss - expected).abs() < 1e-5 * (1.0 + expected),
            "{last} {loss:?}: {report:?} {expected}"
        );
        for (ordinal, tensor) in params.iter().enumerate() {
            for at in 0..tensor.len() {
                let moved = |by: f64| {
                    let mut params = exact.clone();
                    params[ordinal][at] += by;
                    reference_loss(&net, &params, &x, &y, rows, loss)
                };
                let slope = (moved(1e-5) - moved(-1e-5)) / 2e-5;
                let gradient = f64::from(tensor[at]) - f64::from(trained[ordinal][at]);
                // A row near the corner of Relu may be on the other side in float32.
                let near = (gradient - slope).abs() < 2e-5 + 2e-3 * slope.abs();
                assert!(near, "{hidden}, {last}, {loss:?}: {gradient} instead of {slope} at {at} of {ordinal}");
            }
        }
    }
}

#[test]
fn a_function_is_learnt() {
    let mut random = Random::new(4);
    let (net, mut params) = made(&mut random, 2, &[(Form::Turned, true, "Tanh", 24), (Form::Turned, true, "", 1)]);
    let rows = 1000;
    let x = random.values(rows * 2);
    let y: Vec<f32> = x.chunks(2).map(|row| row[0] * row[1] + 0.5 * row[0]).collect();
    let options = TrainOptions { epochs: 150, learning_rate: 0.1, momentum: 0.9, ..TrainOptions::default() };
    let report = train(&net, &mut params, &x, &y, rows, &options, &mut fine).unwrap();
    assert!(report.first_loss > 0.05 && report.last_loss < 5e-4 && report.epochs == 150, "{report:?}");
    // What is reported is what the net computes.
    let tensors: Vec<&[f32]> = params.iter().map(Vec::as_slice).collect();
    let mut out = vec![0.0; rows];
    net.run(&tensors, &x, rows, &mut out, &mut Scratch::default());
    let loss = out.iter().zip(&y).map(|(out, y)| f64::from(out - y).powi(2)).sum::<f64>() / rows as f64;
    assert!((loss - report.last_loss).abs() < 1e-9);
}

#[test]
fn classes_are_learnt_from_their_numbers_as_from_rows() {
    let mut random = Random::new(6);
    let (net, params) = made(&mut random, 2, &[(Form::Gemm, true, "Relu", 20), (Form::MatMul, true, "Softmax", 3)]);
    let rows = 600;
    let x = random.values(rows * 2);
    let class = |row: &[f32]| if row[0] > 0.2 { 0 } else { 1 + usize::from(row[1] > 0.0) };
    let classes: Vec<f32> = x.chunks(2).map(|row| class(row) as f32).collect();
    let lines: Vec<f32> =
        x.chunks(2).flat_map(|row| (0..3).map(|column| f32::from(column == class(row))).collect::<Vec<_>>()).collect();
    let options = TrainOptions {
        epochs: 60,
        learning_rate: 0.1,
        momentum: 0.9,
        loss: Loss::CrossEntropy,
        ..TrainOptions::default()
    };
    let (mut by_class, mut by_line) = (params.clone(), params);
    let report = train(&net, &mut by_class, &x, &classes, rows, &options, &mut fine).unwrap();
    assert!(report.first_loss > 0.7 && report.last_loss < 0.1, "{report:?}");
    assert_eq!(train(&net, &mut by_line, &x, &lines, rows, &options, &mut fine).unwrap(), report);
    assert_eq!(bits(&by_class), bits(&by_line));
}

#[test]
fn the_seed_decides_the_bits() {
    let mut random = Random::new(7);
    let layers =
        [(Form::Turned, true, "Relu", 16), (Form::Turned, true, "Relu", 16), (Form::Turned, true, "Sigmoid", 2)];
    let (net, params) = made(&mut random, 5, &layers);
    let rows = 333;
    let x = random.values(rows * 5);
    let y: Vec<f32> = random.values(rows * 2).iter().map(|value| value.abs()).collect();
    let trained = |seed: u64, layers: Option<usize>| {
        let options = TrainOptions {
            epochs: 3,
            seed,
            layers,
            momentum: 0.5,
            weight_decay: 0.01,
            loss: Loss::BinaryCrossEntropy,
            ..TrainOptions::default()
        };
        let mut params = params.clone();
        train(&net, &mut params, &x, &y, rows, &options, &mut fine).unwrap();
        params
    };
    let all = trained(1, None);
    assert_eq!(bits(&all), bits(&trained(1, None)));
    assert_eq!(bits(&all), bits(&trained(1, Some(3))));
    assert_ne!(bits(&all), bits(&trained(2, None)));
    for count in 1..=3 {
        let some = trained(1, Some(count));
        for (ordinal, (before, after)) in params.iter().zip(&some).enumerate() {
            // Two tensors a layer.
            let changes = ordinal / 2 >= 3 - count;
            assert_eq!(before != after, changes, "tensor {ordinal} with {count} layers");
        }
    }
}

#[test]
fn steps_are_those_of_momentum_and_weight_decay() {
    // One weight, one row, y = 0: the gradient of (w x)^2 is 2 w x^2.
    let (net, _) = made(&mut Random::new(1), 1, &[(Form::Gemm, false, "", 1)]);
    let mut params = vec![vec![1.0f32]];
    let options =
        TrainOptions { epochs: 3, learning_rate: 0.125, momentum: 0.5, weight_decay: 0.25, ..TrainOptions::default() };
    train(&net, &mut params, &[0.5], &[0.0], 1, &options, &mut fine).unwrap();
    let (mut weight, mut step) = (1.0f32, 0.0f32);
    for _ in 0..3 {
        step = 0.5 * step + (0.5 * weight + 0.25 * weight);
        weight -= 0.125 * step;
    }
    assert_eq!(params[0][0], weight);
}

#[test]
fn what_cannot_be_trained_is_named() {
    let mut random = Random::new(8);
    let (net, params) = made(&mut random, 2, &[(Form::Gemm, true, "Relu", 4), (Form::Gemm, true, "Softmax", 3)]);
    let (x, y) = (random.values(20), vec![0.5; 30]);
    let check = |x: &[f32], y: &[f32], rows, options: &TrainOptions, kind: ErrorKind, part: &str| {
        let error = train(&net, &mut params.clone(), x, y, rows, options, &mut fine).unwrap_err();
        assert_eq!(error.kind, kind, "{error}");
        assert!(error.to_string().contains(part), "{error}");
    };
    let plain = TrainOptions::default();
    let crossed = TrainOptions { loss: Loss::CrossEntropy, ..plain.clone() };
    check(&[], &[], 0, &plain, InvalidInput, "no rows");
    check(&x[1..], &y, 10, &plain, InvalidInput, "10 rows of 2 values are wanted; there are 19 values");
    check(&x, &y[1..], 10, &plain, InvalidInput, "10 rows of 3 values are wanted; there are 29 values");
    check(&x, &y[..10], 10, &plain, InvalidInput, "targets");
    let mut broken = x.clone();
    broken[7] = f32::NAN;
    check(&broken, &y, 10, &plain, NotANumber, "an input to train on is not a finite number (It is NaN, in row 4.)");
    let mut broken = y.clone();
    broken[29] = f32::INFINITY;
    check(&x, &broken, 10, &plain, NotANumber, "a target to train on is not a finite number (It is inf, in row 10.)");
    check(&x, &[3.0; 10], 10, &crossed, OutOfRange, "not a class");
    check(&x, &[0.5; 10], 10, &crossed, OutOfRange, "not a class");
    check(&x, &[1.5; 30], 10, &crossed, OutOfRange, "not a probability");
    let binary = TrainOptions { loss: Loss::BinaryCrossEntropy, ..plain.clone() };
    check(&x, &y, 10, &binary, InvalidInput, "\"binary_cross_entropy\" does not fit");
    check(&x, &y, 10, &TrainOptions { layers: Some(3), ..plain.clone() }, OutOfRange, "It has 2 layers");
    let wild = TrainOptions { learning_rate: 1000.0, epochs: 500, ..plain.clone() };
    let (line, mut tensors) = made(&mut random, 2, &[(Form::Gemm, true, "", 4), (Form::Gemm, true, "", 1)]);
    let error = train(&line, &mut tensors, &x, &y[..10], 10, &wild, &mut fine).unwrap_err();
    assert_eq!((error.kind, error.message.as_str()), (NotANumber, "the training diverged"));
    let mut short = params.clone();
    short[0].pop();
    let error = train(&net, &mut short, &x, &y, 10, &plain, &mut fine).unwrap_err();
    assert_eq!(error.kind, InvalidInput);
}

#[test]
fn a_training_ends_where_it_is_told_to() {
    let mut random = Random::new(9);
    let (net, mut params) = made(&mut random, 2, &[(Form::Gemm, true, "Relu", 4), (Form::Gemm, true, "", 1)]);
    let (x, y) = (random.values(2000), random.values(1000));
    let mut calls = 0;
    let mut check = || {
        calls += 1;
        if calls < 10 { Ok(()) } else { Err(ModelError::cancelled("stopped")) }
    };
    let options = TrainOptions { epochs: 1_000_000, ..TrainOptions::default() };
    let error = train(&net, &mut params, &x, &y, 1000, &options, &mut check).unwrap_err();
    assert_eq!((error.kind, calls), (Cancelled, 10));
}

#[test]
fn an_onnx_model_is_trained_to_one_of_the_same_graph() {
    let mut random = Random::new(10);
    let layers = [(Form::Turned, true, "Relu", 8), (Form::MatMul, true, "", 1)];
    let model = net(&mut random, -1, 3, &layers, |node| node).encode_to_vec();
    let (x, y) = (random.values(300), random.values(100));
    let options = TrainOptions { layers: Some(1), ..TrainOptions::default() };
    let trained = train_onnx(&model, &x, &y, 100, &options, &mut fine).unwrap();
    let before = strip(&model, &mut NoExternalData, &mut fine).unwrap();
    let after = strip(&trained, &mut NoExternalData, &mut fine).unwrap();
    assert_eq!(before.graph, after.graph);
    for (place, (before, after)) in before.tensors.iter().zip(&after.tensors).enumerate() {
        assert_eq!(before.data != after.data, place >= 2, "tensor {place}");
    }
    let other = changed_operator(&model);
    let error = train_onnx(&other, &x, &y, 100, &options, &mut fine).unwrap_err();
    assert!(error.kind == UnsupportedOperator && error.hint.is_some(), "{error}");
    assert_eq!(train_onnx(b"PK\x03\x04", &x, &y, 100, &options, &mut fine).unwrap_err().kind, NotOnnx);
}

/// The model with Softplus in the place of Relu.
fn changed_operator(model: &[u8]) -> Vec<u8> {
    let mut model = tract_onnx::pb::ModelProto::decode(model).unwrap();
    model.graph.as_mut().unwrap().node[1].op_type = "Softplus".into();
    model.encode_to_vec()
}
