//! Classical models of `ai.onnx.ml`: what is common to trees and linear classifiers, and the latter.
//!
//! Responsible for: operators that take rows of numbers and give a label and scores for each. tract's own lack string
//! labels and get the scores of two classes wrong. The corner cases that the ONNX text leaves open (two classes with
//! one score) follow ONNX Runtime.

use std::sync::Arc;
use tract_onnx::model::ParsingContext;
use tract_onnx::pb::NodeProto;
use tract_onnx::tract_hir::internal::*;
use tract_onnx::tract_hir::tract_ndarray::Array1;

use super::rewrite::{attribute, text};

/// Puts the operators into tract's register.
pub(super) fn register(framework: &mut tract_onnx::Onnx) {
    framework.op_register.insert("LinearClassifier", linear_classifier);
    framework.op_register.insert("TreeEnsembleClassifier", super::trees::classifier);
    framework.op_register.insert("TreeEnsembleRegressor", super::trees::regressor);
}

/// A model over rows of numbers.
pub(super) trait RowModel: std::fmt::Debug + Send + Sync + 'static {
    /// ONNX's name of the operator.
    fn name(&self) -> &'static str;
    /// The labels' type if the first output is a label, and the number of scores of a row.
    fn outputs(&self) -> (Option<DatumType>, usize);
    /// Checks the width of the rows.
    fn check_width(&self, width: usize) -> TractResult<()>;
    /// The scores of one row, into `scores`; returns the place of its label in [`labels`](RowModel::labels).
    fn score(&self, row: &[f64], scores: &mut [f32]) -> usize;
    /// Multiply-adds or comparisons of a row, about.
    fn work(&self) -> usize;
    /// The labels; empty without a label output.
    fn labels(&self) -> &Labels;
}

/// Class labels.
#[derive(Clone, Debug)]
pub(super) enum Labels {
    Integers(Vec<i64>),
    Strings(Vec<String>),
}

impl Labels {
    /// Reads the two forms of a label attribute.
    pub fn of(node: &NodeProto, integers: &str, strings: &str) -> TractResult<Labels> {
        if let Some(attribute) = attribute(node, strings).filter(|it| !it.strings.is_empty()) {
            let labels = attribute.strings.iter().map(|bytes| String::from_utf8(bytes.clone()));
            return Ok(Labels::Strings(labels.collect::<Result<_, _>>()?));
        }
        let labels = attribute(node, integers).map_or(vec![], |it| it.ints.clone());
        ensure!(!labels.is_empty(), "a classifier without labels");
        Ok(Labels::Integers(labels))
    }

    pub fn len(&self) -> usize {
        match self {
            Labels::Integers(labels) => labels.len(),
            Labels::Strings(labels) => labels.len(),
        }
    }

    pub fn datum_type(&self) -> DatumType {
        match self {
            Labels::Integers(_) => DatumType::I64,
            Labels::Strings(_) => DatumType::String,
        }
    }
}

/// What is done to the scores of a row at the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum PostTransform {
    None,
    Softmax,
    Logistic,
    SoftmaxZero,
}

impl PostTransform {
    pub fn of(node: &NodeProto) -> TractResult<PostTransform> {
        Ok(match text(node, "post_transform") {
            None | Some("NONE" | "") => PostTransform::None,
            Some("SOFTMAX") => PostTransform::Softmax,
            Some("LOGISTIC") => PostTransform::Logistic,
            Some("SOFTMAX_ZERO") => PostTransform::SoftmaxZero,
            Some(other) => bail!("post_transform {other} is not supported"),
        })
    }

    pub fn apply(self, scores: &mut [f32]) {
        match self {
            PostTransform::None => {}
            PostTransform::Logistic => scores.iter_mut().for_each(|score| *score = logistic(*score)),
            // SOFTMAX_ZERO leaves scores of zero alone.
            PostTransform::Softmax | PostTransform::SoftmaxZero => {
                let keep = |score: f32| self == PostTransform::SoftmaxZero && score.abs() <= 1e-7;
                let largest = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                let mut sum = 0.0;
                for score in scores.iter_mut().filter(|score| !keep(**score)) {
                    *score = (*score - largest).exp();
                    sum += *score;
                }
                if sum > 0.0 {
                    // A zero that was kept stays zero.
                    scores.iter_mut().for_each(|score| *score /= sum);
                }
            }
        }
    }
}

pub(super) fn logistic(score: f32) -> f32 {
    1.0 / (1.0 + (-score).exp())
}

/// The index of the largest score, the first of equals.
pub(super) fn largest(scores: &[f32]) -> usize {
    let mut best = 0;
    for (place, score) in scores.iter().enumerate() {
        if *score > scores[best] {
            best = place;
        }
    }
    best
}

/// Makes the operator of a row model.
pub(super) fn operator(model: impl RowModel) -> Box<dyn InferenceOp> {
    expand(Rows(Arc::new(model)))
}

/// The operator of a row model.
#[derive(Clone, Debug)]
pub(super) struct Rows(Arc<dyn RowModel>);

impl PartialEq for Rows {
    fn eq(&self, other: &Rows) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Eq for Rows {}

impl Expansion for Rows {
    fn name(&self) -> StaticName {
        self.0.name().into()
    }

    fn nboutputs(&self) -> TractResult<usize> {
        Ok(1 + usize::from(self.0.outputs().0.is_some()))
    }

    fn rules<'r, 'p: 'r, 's: 'r>(
        &'s self,
        solver: &mut Solver<'r>,
        inputs: &'p [TensorProxy],
        outputs: &'p [TensorProxy],
    ) -> InferenceResult {
        check_input_arity(inputs, 1)?;
        let (label, width) = self.0.outputs();
        let scores = outputs.len() - 1;
        check_output_arity(outputs, 1 + usize::from(label.is_some()))?;
        if let Some(label) = label {
            solver.equals(&outputs[0].datum_type, label)?;
            solver.equals(&outputs[0].rank, 1)?;
        }
        solver.equals(&outputs[scores].datum_type, f32::datum_type())?;
        solver.equals(&outputs[scores].rank, 2)?;
        solver.equals(&outputs[scores].shape[1], width.to_dim())?;
        solver.given(&inputs[0].shape, move |solver, shape| {
            let rows = if shape.len() > 1 { shape[0].clone() } else { 1.to_dim() };
            if scores == 1 {
                solver.equals(&outputs[0].shape[0], rows.clone())?;
            }
            solver.equals(&outputs[scores].shape[0], rows)
        })
    }

    fn wire(&self, prefix: &str, model: &mut TypedModel, inputs: &[OutletId]) -> TractResult<TVec<OutletId>> {
        model.wire_node(prefix, self.clone(), inputs)
    }
}

impl Op for Rows {
    fn name(&self) -> StaticName {
        self.0.name().into()
    }

    op_as_typed_op!();
}

impl EvalOp for Rows {
    op_out_of_plan!();

    fn eval(&self, _: &EvalContext, inputs: TVec<TValue>) -> TractResult<TVec<TValue>> {
        let input = args_1!(inputs);
        let (label, scores_width) = self.0.outputs();
        let (rows, width) = match input.shape() {
            [width] => (1, *width),
            [rows, width] => (*rows, *width),
            other => bail!("{} of an input of shape {other:?}", self.0.name()),
        };
        self.0.check_width(width)?;
        let values = input.cast_to::<f64>()?;
        let values = values.try_as_plain_ram()?;
        let values = values.as_slice::<f64>()?;
        let mut scores = vec![0f32; rows * scores_width];
        let mut chosen = Vec::with_capacity(rows);
        for row in 0..rows {
            let own = &mut scores[row * scores_width..(row + 1) * scores_width];
            chosen.push(self.0.score(&values[row * width..(row + 1) * width], own));
        }
        let scores = Tensor::from_shape(&[rows, scores_width], &scores)?.into_tvalue();
        if label.is_none() {
            return Ok(tvec!(scores));
        }
        let labels = match self.0.labels() {
            Labels::Integers(labels) => Array1::from_iter(chosen.iter().map(|&place| labels[place])).into_tensor(),
            Labels::Strings(labels) => {
                Array1::from_iter(chosen.iter().map(|&place| labels[place].clone())).into_tensor()
            }
        };
        Ok(tvec!(labels.into_tvalue(), scores))
    }
}

impl TypedOp for Rows {
    as_op!();

    fn output_facts(&self, inputs: &[&TypedFact]) -> TractResult<TVec<TypedFact>> {
        let shape = &inputs[0].shape;
        ensure!(matches!(shape.rank(), 1 | 2), "{} of an input of shape {shape:?}", self.0.name());
        if let Ok(width) = shape[shape.rank() - 1].to_usize() {
            self.0.check_width(width)?;
        }
        let rows = if shape.rank() == 2 { shape[0].clone() } else { 1.to_dim() };
        let (label, width) = self.0.outputs();
        let mut facts: TVec<TypedFact> = label.iter().map(|label| label.fact([rows.clone()])).collect();
        facts.push(f32::fact([rows, width.to_dim()]));
        Ok(facts)
    }

    fn cost(&self, inputs: &[&TypedFact]) -> TractResult<TVec<(Cost, TDim)>> {
        let shape = &inputs[0].shape;
        let rows = if shape.rank() == 2 { shape[0].clone() } else { 1.to_dim() };
        Ok(tvec!((Cost::FMA(f32::datum_type()), rows * self.0.work())))
    }
}

/// ai.onnx.ml LinearClassifier: scores = coefficients x + intercepts.
#[derive(Debug)]
struct LinearClassifier {
    /// One row of coefficients for each score.
    coefficients: Vec<f32>,
    intercepts: Vec<f32>,
    width: usize,
    scores: usize,
    labels: Labels,
    post: PostTransform,
}

fn linear_classifier(_: &ParsingContext, node: &NodeProto) -> TractResult<(Box<dyn InferenceOp>, Vec<String>)> {
    let floats = |name: &str| attribute(node, name).map_or(vec![], |it| it.floats.clone());
    let (coefficients, mut intercepts) = (floats("coefficients"), floats("intercepts"));
    let labels = Labels::of(node, "classlabels_ints", "classlabels_strings")?;
    let scores = if intercepts.is_empty() { labels.len() } else { intercepts.len() };
    intercepts.resize(scores, 0.0);
    ensure!(
        !coefficients.is_empty() && coefficients.len().is_multiple_of(scores),
        "LinearClassifier with {} coefficients for {scores} scores",
        coefficients.len()
    );
    let enough = labels.len() == scores || (scores == 1 && labels.len() == 2);
    ensure!(enough, "LinearClassifier with {scores} scores for {} labels is not supported", labels.len());
    let width = coefficients.len() / scores;
    let post = PostTransform::of(node)?;
    ensure!(
        scores > 1 || matches!(post, PostTransform::None | PostTransform::Logistic),
        "post_transform {post:?} of one score is not supported"
    );
    let model = LinearClassifier { coefficients, intercepts, width, scores, labels, post };
    Ok((operator(model), vec![]))
}

impl RowModel for LinearClassifier {
    fn name(&self) -> &'static str {
        "LinearClassifier"
    }

    fn outputs(&self) -> (Option<DatumType>, usize) {
        (Some(self.labels.datum_type()), self.labels.len())
    }

    fn check_width(&self, width: usize) -> TractResult<()> {
        ensure!(width == self.width, "LinearClassifier takes {} values a row, not {width}", self.width);
        Ok(())
    }

    fn score(&self, row: &[f64], scores: &mut [f32]) -> usize {
        for (index, intercept) in self.intercepts.iter().enumerate() {
            let weights = &self.coefficients[index * self.width..(index + 1) * self.width];
            let sum: f64 = weights.iter().zip(row).map(|(weight, value)| f64::from(*weight) * value).sum();
            scores[index] = (sum + f64::from(*intercept)) as f32;
        }
        if self.scores < scores.len() {
            // One score for two classes: it is the second one's.
            let score = scores[0];
            let pair = match self.post {
                PostTransform::Logistic => [logistic(-score), logistic(score)],
                _ => [1.0 - score, score],
            };
            scores.copy_from_slice(&pair);
            return usize::from(score > 0.0);
        }
        let chosen = largest(scores);
        self.post.apply(scores);
        chosen
    }

    fn work(&self) -> usize {
        self.coefficients.len()
    }

    fn labels(&self) -> &Labels {
        &self.labels
    }
}
