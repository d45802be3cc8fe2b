//! How well predictions agree with labels.

use super::rows::{Label, LabelKind};
use crate::pg::function::Function;
use crate::pg::query::Column;
use crate::pg::value::{is_array, is_number, type_name};
use crate::pg::{array, error};
use inference::signature::PortType;
use pgrx::pg_sys::{self, Datum};
use pgrx::prelude::*;

/// Which metrics there are, for hints.
const CHOICE: &str = "A metric is 'accuracy', 'mse', 'cosine', or a function (prediction real[], label T) that returns double precision, where T is the label's type.";

/// A metric: the mean over rows of what it gives for each.
pub enum Metric {
    /// Whether the largest output, of one output whether it is at least 0.5, is the label's class.
    Accuracy,
    /// Squared error, averaged over the outputs. Lower is better.
    MeanSquare,
    /// Cosine of the angle between output and label.
    Cosine,
    /// A user's function of prediction and label.
    Function(Function),
}

impl Metric {
    /// The metric of this name for labels of a column. A function lives as long as the memory context `home`.
    ///
    /// Errors: labels of another type than it compares with; those of [`Function::returning_double`].
    pub fn of(text: &str, label: &Column, home: pg_sys::MemoryContext) -> Metric {
        let number = is_number(label.type_oid);
        let (metric, fits, takes) = match text {
            "accuracy" => (Metric::Accuracy, number, "a number: the class, counted from 0"),
            "mse" => (Metric::MeanSquare, number || is_array(label.type_oid), "a number, or an array of numbers"),
            "cosine" => (Metric::Cosine, is_array(label.type_oid), "an array of numbers"),
            _ => {
                let types = [pg_sys::FLOAT4ARRAYOID, label.type_oid];
                return Metric::Function(Function::returning_double(text, &types, home, CHOICE));
            }
        };
        if !fits {
            error::raise(
                PgSqlErrorCode::ERRCODE_DATATYPE_MISMATCH,
                format!("column \"{}\" of the validation query has type {}", label.name, type_name(label.type_oid)),
                &format!("Metric {text} compares a prediction with {takes}."),
                "Cast the label, or give a function as the metric.",
            );
        }
        metric
    }

    /// How it wants labels.
    pub fn label_kind(&self) -> LabelKind {
        match self {
            Metric::Function(_) => LabelKind::Value,
            _ => LabelKind::Numbers,
        }
    }

    /// By how much `after` is worse than `before`.
    pub fn drop(&self, before: f64, after: f64) -> f64 {
        match self {
            Metric::MeanSquare => after - before,
            _ => before - after,
        }
    }

    /// What it gives for a row (counted from 0) whose output has element type `dtype`. NaN where a prediction has it.
    pub fn score(&self, row: usize, prediction: &[f32], dtype: PortType, label: Label<'_>) -> f64 {
        match (self, label) {
            (Metric::Accuracy, Label::Number(label)) => accuracy(row, prediction, dtype, label),
            (Metric::MeanSquare, Label::Number(label)) => mean_square(row, prediction, &[label]),
            (Metric::MeanSquare, Label::Numbers(label)) => mean_square(row, prediction, label),
            (Metric::Cosine, Label::Number(label)) => cosine(row, prediction, &[label]),
            (Metric::Cosine, Label::Numbers(label)) => cosine(row, prediction, label),
            (Metric::Function(function), Label::Value(label)) => call(row, function, prediction, label),
            (_, Label::Numbers(_) | Label::Number(_) | Label::Value(_)) => {
                unreachable!("labels are read as the metric wants them")
            }
        }
    }
}

fn accuracy(row: usize, prediction: &[f32], dtype: PortType, label: f64) -> f64 {
    let whole = !dtype.is_float();
    let classes = match prediction {
        // The class itself.
        [class] if whole => return f64::from(f64::from(*class) == label),
        [_] => 2,
        outputs => outputs.len(),
    };
    if label.fract() != 0.0 || !(0.0..classes as f64).contains(&label) {
        error::raise(
            PgSqlErrorCode::ERRCODE_INVALID_PARAMETER_VALUE,
            format!("label {label} in row {} of the validation query is no class of the model", row + 1),
            &format!("Classes are numbered from 0, and the model tells {classes} apart."),
            "Number the labels as the model's outputs, or give a function as the metric.",
        );
    }
    if prediction.iter().any(|output| output.is_nan()) {
        return 0.0;
    }
    let class = match prediction {
        [probability] => usize::from(*probability >= 0.5),
        // Of equal ones the first.
        outputs => (0..outputs.len()).fold(0, |best, at| if outputs[at] > outputs[best] { at } else { best }),
    };
    f64::from(class as f64 == label)
}

fn mean_square(row: usize, prediction: &[f32], label: &[f64]) -> f64 {
    same_width(row, prediction, label);
    let squares = prediction.iter().zip(label).map(|(&is, &wanted)| (f64::from(is) - wanted).powi(2));
    squares.sum::<f64>() / label.len() as f64
}

fn cosine(row: usize, prediction: &[f32], label: &[f64]) -> f64 {
    same_width(row, prediction, label);
    let of = |product: fn(f64, f64) -> f64| {
        prediction.iter().zip(label).map(|(&is, &wanted)| product(f64::from(is), wanted)).sum::<f64>()
    };
    let (dot, is, wanted) = (of(|a, b| a * b), of(|a, _| a * a), of(|_, b| b * b));
    // A vector of zeros has no direction.
    if is * wanted == 0.0 { 0.0 } else { dot / (is.sqrt() * wanted.sqrt()) }
}

fn same_width(row: usize, prediction: &[f32], label: &[f64]) {
    if prediction.len() != label.len() || label.is_empty() {
        error::raise(
            PgSqlErrorCode::ERRCODE_INVALID_PARAMETER_VALUE,
            format!(
                "the label in row {} of the validation query has {} numbers, the prediction {}",
                row + 1,
                label.len(),
                prediction.len()
            ),
            "",
            "Give labels of as many numbers as the model's first output has.",
        );
    }
}

fn call(row: usize, function: &Function, prediction: &[f32], label: Datum) -> f64 {
    let score = function.call(|| vec![array::from_f32(&[prediction.len()], prediction), label]);
    match score {
        Some(score) if !score.is_nan() => score,
        other => error::raise(
            PgSqlErrorCode::ERRCODE_DATA_EXCEPTION,
            format!("the metric {} returned {}", function.name(), if other.is_none() { "null" } else { "NaN" }),
            &format!("So it did for row {} of the validation query.", row + 1),
            "Have it return a number for every row.",
        ),
    }
}
