//! Training a feed-forward net: stochastic gradient descent, the same bits for the same seed.
//!
//! Responsible for: [`train`], which changes parameters in memory, and [`train_onnx`], from an ONNX model to one of the same
//! graph. Losses and their gradients are in [`loss`](super::loss).
//!
//! ```text
//!   epoch:  rows in an order made of (seed, epoch)
//!   step:   batch rows, PIECE at a time:  forward -> loss -> backward, gradients added up
//!           then for each tensor:  v = momentum v + gradient + weight_decay w;  w -= learning_rate v
//! ```
//!
//! Invariants: one thread, and sums in an order that sizes alone decide, so a seed gives the same bits on one processor; memory
//! beyond parameters, gradients and steps does not grow with the batch; layers that are not trained keep their bits.

use super::loss::{Target, loss_and_gradient};
use super::options::TrainOptions;
use super::{FeedForward, Function, Layer, Scratch};
use crate::error::ModelError;
use crate::kernels::gemm::{self, Operand};
use crate::onnx::{NoExternalData, merge, strip};

/// Rows that go forward and backward at a time.
const PIECE: usize = 256;

/// What a training did.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TrainReport {
    /// The loss over all rows before the first step.
    pub first_loss: f64,
    /// The loss over all rows after the last step.
    pub last_loss: f64,
    /// Passes over all rows.
    pub epochs: u32,
}

/// Trains a net whose tensors are `params`, by ordinal, on `rows` rows of K elements, `x`. `y` has for each row N values, or for cross
/// entropy one value, the number of its class. Weight decay, as in PyTorch's SGD, is for biases too. `check` is called at
/// least every 256 rows; its error ends the training. After an error the parameters are somewhere on the way.
///
/// # Errors
/// `InvalidInput` for tensors or data of another size, no rows, and a loss that does not fit the net; `NotANumber` for a NaN or an
/// infinity in the data, and where the loss or a parameter became one; `OutOfRange` for targets that the loss does not take
/// and for more layers than there are; what `check` returns.
pub fn train(
    net: &FeedForward,
    params: &mut [Vec<f32>],
    x: &[f32],
    y: &[f32],
    rows: usize,
    options: &TrainOptions,
    check: &mut dyn FnMut() -> Result<(), ModelError>,
) -> Result<TrainReport, ModelError> {
    check_params(net, params)?;
    check_data(net, x, y, rows)?;
    let target = Target::new(net, y, rows, options.loss)?;
    let first = first_trained(net, options)?;
    let mut trainer = Trainer::new(net, first, target, x);
    let first_loss = trainer.loss(params, rows, check)?;
    check_loss(first_loss, 0)?;
    let batch = options.batch as usize;
    let mut order: Vec<usize> = Vec::with_capacity(rows);
    for epoch in 0..options.epochs {
        order.clear();
        order.extend(0..rows);
        shuffle(&mut order, options.seed, epoch);
        let mut sum = 0.0;
        for batch in order.chunks(batch) {
            sum += trainer.step(params, batch, options, check)?;
        }
        check_loss(sum, epoch + 1)?;
    }
    let last_loss = trainer.loss(params, rows, check)?;
    check_loss(last_loss, options.epochs)?;
    if params.iter().flatten().any(|value| !value.is_finite()) {
        return Err(diverged(options.epochs));
    }
    Ok(TrainReport { first_loss, last_loss, epochs: options.epochs })
}

/// Trains an ONNX model that is a feed-forward net, as [`train`]: ONNX in, ONNX of the same graph out.
///
/// # Errors
/// Those of [`strip`] and [`train`]; `UnsupportedOperator` for a model that is no feed-forward net.
pub fn train_onnx(
    model: &[u8],
    x: &[f32],
    y: &[f32],
    rows: usize,
    options: &TrainOptions,
    check: &mut dyn FnMut() -> Result<(), ModelError>,
) -> Result<Vec<u8>, ModelError> {
    let stripped = strip(model, &mut NoExternalData, check)?;
    let net = FeedForward::of_graph(&stripped.graph).ok_or_else(|| {
        ModelError::unsupported_operator("the model is not a feed-forward net, and cannot be trained here").hint(
            "Trained are chains of Gemm, or MatMul and Add, with Relu, LeakyRelu, Sigmoid, Tanh or Softmax between, in float32; \
             train other models where they were made.",
        )
    })?;
    // Little-endian, at any alignment.
    let floats = |data: &[u8]| data.as_chunks::<4>().0.iter().map(|word| f32::from_le_bytes(*word)).collect();
    let mut params: Vec<Vec<f32>> = stripped.tensors.iter().map(|tensor| floats(&tensor.data)).collect();
    train(&net, &mut params, x, y, rows, options, check)?;
    let mut made = Vec::new();
    let mut fetch = |ordinal: u32, out: &mut Vec<u8>| {
        let tensor = params.get(ordinal as usize).ok_or_else(|| ModelError::internal("a trained tensor is missing"))?;
        out.extend(tensor.iter().flat_map(|value| value.to_le_bytes()));
        Ok(())
    };
    merge(&stripped.graph, &mut fetch, &mut made)?;
    Ok(made)
}

fn check_params(net: &FeedForward, params: &[Vec<f32>]) -> Result<(), ModelError> {
    let fits = |ordinal: usize, size: usize| params.get(ordinal).is_some_and(|tensor| tensor.len() == size);
    let layer = |layer: &Layer| {
        fits(layer.weights, layer.inputs * layer.outputs) && layer.bias.is_none_or(|bias| fits(bias, layer.outputs))
    };
    if params.len() < net.tensors || !net.layers.iter().all(layer) {
        return Err(ModelError::invalid_input("the tensors do not fit the net"));
    }
    Ok(())
}

fn check_data(net: &FeedForward, x: &[f32], y: &[f32], rows: usize) -> Result<(), ModelError> {
    let (k, _) = net.widths();
    if rows == 0 {
        return Err(ModelError::invalid_input("there are no rows to train on"));
    }
    if rows.checked_mul(k) != Some(x.len()) {
        return Err(ModelError::invalid_input("the inputs to train on do not fit the model")
            .detail(format!("{rows} rows of {k} values are wanted; there are {} values.", x.len())));
    }
    for (what, values) in [("an input", x), ("a target", y)] {
        if let Some(place) = values.iter().position(|value| !value.is_finite()) {
            return Err(ModelError::not_a_number(format!("{what} to train on is not a finite number"))
                .detail(format!("It is {}, in row {}.", values[place], place / (values.len() / rows).max(1) + 1)));
        }
    }
    Ok(())
}

/// The first layer that is trained.
fn first_trained(net: &FeedForward, options: &TrainOptions) -> Result<usize, ModelError> {
    let count = net.layers.len();
    let first = count.checked_sub(options.layers.unwrap_or(count)).ok_or_else(|| {
        ModelError::out_of_range("more layers are to be trained than the model has")
            .detail(format!("It has {count} layers."))
    })?;
    let (kept, trained) = net.layers.split_at(first);
    let tensors = |layer: &Layer| [Some(layer.weights), layer.bias];
    let shared = |tensor: &Option<usize>| tensor.is_some() && trained.iter().flat_map(tensors).any(|it| it == *tensor);
    if kept.iter().flat_map(tensors).any(|tensor| shared(&tensor)) {
        return Err(ModelError::invalid_input("a layer that is trained shares a tensor with one that is not")
            .hint("Train all layers."));
    }
    Ok(first)
}

fn check_loss(loss: f64, epochs: u32) -> Result<(), ModelError> {
    if loss.is_finite() { Ok(()) } else { Err(diverged(epochs)) }
}

fn diverged(epochs: u32) -> ModelError {
    ModelError::not_a_number("the training diverged")
        .detail(format!("The loss or a parameter was not a finite number after {epochs} epochs."))
        .hint("Use a smaller learning_rate, and scale the inputs to about -1 to 1.")
}

/// Puts the rows into the order of an epoch: Fisher and Yates's shuffle, with a generator that is a function of seed, epoch
/// and place.
fn shuffle(order: &mut [usize], seed: u64, epoch: u32) {
    let key = mix(mix(seed) ^ u64::from(epoch));
    for place in (1..order.len()).rev() {
        let word = mix(key.wrapping_add(place as u64));
        // The high half of the product is below place + 1.
        let other = (u128::from(word) * (place as u128 + 1)) >> 64;
        order.swap(place, other as usize);
    }
}

/// SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014) at a place of its sequence.
fn mix(place: u64) -> u64 {
    let mut mixed = place.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

/// What a training holds besides the parameters.
struct Trainer<'a> {
    layers: Vec<Layer>,
    /// The first layer that is trained.
    first: usize,
    target: Target<'a>,
    x: &'a [f32],
    /// By ordinal, empty for tensors that are not trained.
    gradients: Vec<Vec<f32>>,
    steps: Vec<Vec<f32>>,
    /// Of a piece: the rows that go into each layer, then those that come out of the last one.
    rows: Vec<Vec<f32>>,
    /// Of a piece, for LeakyRelu: its inputs, whose signs its outputs need not have.
    sums: Vec<Vec<f32>>,
    /// Of a piece: gradients at the outputs and the inputs of a layer.
    delta: Vec<f32>,
    next: Vec<f32>,
    scratch: Scratch,
}

impl<'a> Trainer<'a> {
    fn new(net: &FeedForward, first: usize, target: Target<'a>, x: &'a [f32]) -> Trainer<'a> {
        let mut layers = net.layers.clone();
        if target.takes_logits()
            && let Some(last) = layers.last_mut()
        {
            // The loss has it.
            last.function = Function::Identity;
        }
        let mut gradients = vec![Vec::new(); net.tensors];
        for layer in &layers[first..] {
            gradients[layer.weights] = vec![0.0; layer.inputs * layer.outputs];
            if let Some(bias) = layer.bias {
                gradients[bias] = vec![0.0; layer.outputs];
            }
        }
        let count = layers.len();
        Trainer {
            layers,
            first,
            target,
            x,
            steps: gradients.clone(),
            gradients,
            rows: vec![Vec::new(); count + 1],
            sums: vec![Vec::new(); count],
            delta: Vec::new(),
            next: Vec::new(),
            scratch: Scratch::default(),
        }
    }

    /// The mean loss over all rows.
    fn loss(
        &mut self,
        params: &[Vec<f32>],
        rows: usize,
        check: &mut dyn FnMut() -> Result<(), ModelError>,
    ) -> Result<f64, ModelError> {
        let mut sum = 0.0;
        let mut piece = Vec::with_capacity(PIECE);
        for first in (0..rows).step_by(PIECE) {
            check()?;
            piece.clear();
            piece.extend(first..rows.min(first + PIECE));
            sum += self.forward(params, &piece, 1.0);
        }
        Ok(sum / rows as f64)
    }

    /// One step on these rows. Returns the sum of their losses before it.
    fn step(
        &mut self,
        params: &mut [Vec<f32>],
        batch: &[usize],
        options: &TrainOptions,
        check: &mut dyn FnMut() -> Result<(), ModelError>,
    ) -> Result<f64, ModelError> {
        self.gradients.iter_mut().for_each(|gradient| gradient.fill(0.0));
        let mut sum = 0.0;
        for piece in batch.chunks(PIECE) {
            check()?;
            sum += self.forward(params, piece, 1.0 / batch.len() as f32);
            self.backward(params, piece.len());
        }
        for ((tensor, gradient), step) in params.iter_mut().zip(&self.gradients).zip(&mut self.steps) {
            for ((value, gradient), step) in tensor.iter_mut().zip(gradient).zip(step) {
                *step = options.momentum * *step + (gradient + options.weight_decay * *value);
                *value -= options.learning_rate * *step;
            }
        }
        Ok(sum)
    }

    /// Takes rows through the net. Returns the sum of their losses, and leaves the gradient at the outputs, times
    /// `share`, in `delta`.
    fn forward(&mut self, params: &[Vec<f32>], piece: &[usize], share: f32) -> f64 {
        let m = piece.len();
        let tensors: Vec<&[f32]> = params.iter().map(Vec::as_slice).collect();
        let width = self.layers.first().map_or(0, |layer| layer.inputs);
        self.rows[0].clear();
        for &row in piece {
            self.rows[0].extend_from_slice(&self.x[row * width..][..width]);
        }
        for (place, layer) in self.layers.iter().enumerate() {
            let (before, after) = self.rows.split_at_mut(place + 1);
            let (input, out) = (&before[place], &mut after[0]);
            out.resize(m * layer.outputs, 0.0);
            if let Function::LeakyRelu(_) = layer.function {
                let sums = &mut self.sums[place];
                sums.resize(m * layer.outputs, 0.0);
                let plain = Layer { function: Function::Identity, ..*layer };
                plain.run(&tensors, input, m, sums, &mut self.scratch);
                out.copy_from_slice(sums);
                layer.finish(out);
            } else {
                layer.run(&tensors, input, m, out, &mut self.scratch);
            }
        }
        let outputs = &self.rows[self.layers.len()];
        loss_and_gradient(&self.target, outputs, piece, share, &mut self.delta)
    }

    /// Adds the gradients of the rows that went forward last.
    fn backward(&mut self, params: &[Vec<f32>], m: usize) {
        for (place, layer) in self.layers.iter().enumerate().skip(self.first).rev() {
            let Layer { inputs: k, outputs: n, transposed, .. } = *layer;
            derive(layer, &mut self.delta, &self.rows[place + 1], &self.sums[place]);
            let (input, delta) = (&self.rows[place], &self.delta);
            let gradient = &mut self.gradients[layer.weights];
            if transposed {
                let (a, b) = (Operand::transposed(delta, n), Operand::row_major(input, k));
                gemm::product(gradient, k, n, k, m, a, b, true);
            } else {
                let (a, b) = (Operand::transposed(input, k), Operand::row_major(delta, n));
                gemm::product(gradient, n, k, n, m, a, b, true);
            }
            if let Some(bias) = layer.bias {
                let gradient = &mut self.gradients[bias];
                for row in delta.chunks_exact(n) {
                    gradient.iter_mut().zip(row).for_each(|(sum, delta)| *sum += delta);
                }
            }
            if place > self.first {
                let weights = &params[layer.weights];
                let weights = if transposed { Operand::row_major(weights, k) } else { Operand::transposed(weights, n) };
                self.next.resize(m * k, 0.0);
                gemm::product(&mut self.next, k, m, k, n, Operand::row_major(delta, n), weights, false);
                std::mem::swap(&mut self.delta, &mut self.next);
            }
        }
    }
}

/// Turns the gradient at a layer's outputs into that at its sums.
fn derive(layer: &Layer, delta: &mut [f32], outputs: &[f32], sums: &[f32]) {
    let pairs = delta.iter_mut().zip(outputs);
    match layer.function {
        Function::Identity => {}
        Function::Relu => pairs.for_each(|(delta, &y)| *delta = if y > 0.0 { *delta } else { 0.0 }),
        Function::LeakyRelu(slope) => {
            delta
                .iter_mut()
                .zip(sums)
                .for_each(|(delta, &sum)| *delta = if sum < 0.0 { *delta * slope } else { *delta });
        }
        Function::Sigmoid => pairs.for_each(|(delta, &y)| *delta *= y * (1.0 - y)),
        Function::Tanh => pairs.for_each(|(delta, &y)| *delta *= 1.0 - y * y),
        Function::Softmax => {
            let rows = delta.chunks_exact_mut(layer.outputs).zip(outputs.chunks_exact(layer.outputs));
            for (delta, y) in rows {
                let mean: f32 = delta.iter().zip(y).map(|(delta, y)| delta * y).sum();
                delta.iter_mut().zip(y).for_each(|(delta, y)| *delta = y * (*delta - mean));
            }
        }
    }
}
