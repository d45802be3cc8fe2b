//! How a net is trained: [`TrainOptions`], and reading them from JSON.
//!
//! Invariant: options that were read are within their ranges; a key that is not known is an error, so that a misspelt one is not
//! ignored.

use crate::error::ModelError;
use serde_json::Value;

/// What is minimised.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Loss {
    /// The mean over rows and outputs of the squared difference.
    #[default]
    Mse,
    /// The mean over rows of `-sum(y ln p)`, p being a Softmax: the net's last function, or of its outputs if that has none.
    CrossEntropy,
    /// The mean over rows and outputs of `-y ln p - (1 - y) ln (1 - p)`, p being a Sigmoid: the net's last function, or of its
    /// outputs if that has none.
    BinaryCrossEntropy,
}

impl Loss {
    const NAMES: [(&'static str, Loss); 3] =
        [("mse", Loss::Mse), ("cross_entropy", Loss::CrossEntropy), ("binary_cross_entropy", Loss::BinaryCrossEntropy)];

    /// Its name in options.
    pub fn name(self) -> &'static str {
        Loss::NAMES.iter().find(|(_, loss)| *loss == self).map_or("", |(name, _)| name)
    }
}

/// Settings of [`train`](super::train): stochastic gradient descent as PyTorch's SGD, without Nesterov and dampening.
#[derive(Clone, Debug, PartialEq)]
pub struct TrainOptions {
    /// Passes over all rows. 1 to 1,000,000; default 1.
    pub epochs: u32,
    /// Factor of a step. Above 0, at most 1,000; default 0.01.
    pub learning_rate: f32,
    /// Rows of a step. 1 to 16,777,216; default 32.
    pub batch: u32,
    /// Share of the last step in the next. 0 to below 1; default 0.
    pub momentum: f32,
    /// Factor of the parameters in their gradient. 0 to 1,000; default 0.
    pub weight_decay: f32,
    /// What the order of the rows depends on. Default 0.
    pub seed: u64,
    /// What is minimised. Default mean squared error.
    pub loss: Loss,
    /// How many layers are trained, counted from the last one; all if none is said.
    pub layers: Option<usize>,
}

impl Default for TrainOptions {
    fn default() -> TrainOptions {
        TrainOptions {
            epochs: 1,
            learning_rate: 0.01,
            batch: 32,
            momentum: 0.0,
            weight_decay: 0.0,
            seed: 0,
            loss: Loss::Mse,
            layers: None,
        }
    }
}

const KEYS: &str = "epochs, learning_rate, batch, momentum, weight_decay, seed, loss, layers";
const MOST_EPOCHS: u64 = 1_000_000;
const MOST_BATCH: u64 = 1 << 24;
const MOST_FACTOR: f64 = 1000.0;

impl TrainOptions {
    /// Options from an object with the fields' names as keys; what is not there has its default. The loss is "mse", "cross_entropy" or
    /// "binary_cross_entropy"; "layers" may be null.
    ///
    /// # Errors
    /// `InvalidInput` for another JSON value, an unknown key or a value of another type, `OutOfRange` for one that is beyond
    /// the field's range.
    pub fn of_json(value: &Value) -> Result<TrainOptions, ModelError> {
        let Value::Object(fields) = value else {
            return Err(ModelError::invalid_input("training options must be a JSON object")
                .detail(format!("They are {}.", kind(value)))
                .hint(format!("Keys are {KEYS}.")));
        };
        let mut options = TrainOptions::default();
        for (key, value) in fields {
            match key.as_str() {
                "epochs" => options.epochs = integer(key, value, 1, MOST_EPOCHS)? as u32,
                "learning_rate" => {
                    options.learning_rate = number(key, value, MOST_FACTOR)?;
                    // A number that float32 does not have may have become 0.
                    if options.learning_rate == 0.0 {
                        return Err(beyond(key, value, "above 0"));
                    }
                }
                "batch" => options.batch = integer(key, value, 1, MOST_BATCH)? as u32,
                "momentum" => {
                    options.momentum = number(key, value, 1.0)?;
                    if options.momentum >= 1.0 {
                        return Err(beyond(key, value, "below 1"));
                    }
                }
                "weight_decay" => options.weight_decay = number(key, value, MOST_FACTOR)?,
                "seed" => options.seed = integer(key, value, 0, u64::MAX)?,
                "loss" => options.loss = loss(value)?,
                "layers" if value.is_null() => options.layers = None,
                "layers" => options.layers = Some(integer(key, value, 1, u64::from(u32::MAX))? as usize),
                _ => {
                    return Err(ModelError::invalid_input(format!("training options have no key \"{key}\""))
                        .hint(format!("Keys are {KEYS}.")));
                }
            }
        }
        Ok(options)
    }
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

fn wrong_type(key: &str, value: &Value, wanted: &str) -> ModelError {
    ModelError::invalid_input(format!("training option \"{key}\" must be {wanted}"))
        .detail(format!("It is {}.", if value.is_number() { value.to_string() } else { kind(value).into() }))
        .hint(format!("Give {wanted}, or leave the option out for its default."))
}

fn beyond(key: &str, value: &Value, range: &str) -> ModelError {
    ModelError::out_of_range(format!("training option \"{key}\" is out of range"))
        .detail(format!("It is {value}; it must be {range}."))
        .hint(format!("Give a value that is {range}."))
}

fn integer(key: &str, value: &Value, least: u64, most: u64) -> Result<u64, ModelError> {
    let range = || format!("a whole number from {least} to {most}");
    let found = match (value.as_u64(), value.as_f64()) {
        (Some(found), _) => found,
        // A whole number that was written with a point, or a negative one.
        (None, Some(float)) if float.fract() == 0.0 && float < 0.0 => return Err(beyond(key, value, &range())),
        (None, Some(float)) if float.fract() == 0.0 && float < 2f64.powi(53) => float as u64,
        (None, Some(float)) if float.fract() == 0.0 => return Err(beyond(key, value, &range())),
        _ => return Err(wrong_type(key, value, "a whole number")),
    };
    if (least..=most).contains(&found) { Ok(found) } else { Err(beyond(key, value, &range())) }
}

/// A number from 0 to `most`.
fn number(key: &str, value: &Value, most: f64) -> Result<f32, ModelError> {
    let found = value.as_f64().ok_or_else(|| wrong_type(key, value, "a number"))?;
    if (0.0..=most).contains(&found) { Ok(found as f32) } else { Err(beyond(key, value, &format!("from 0 to {most}"))) }
}

fn loss(value: &Value) -> Result<Loss, ModelError> {
    let name = value.as_str().ok_or_else(|| wrong_type("loss", value, "a string"))?;
    let known = Loss::NAMES.iter().find(|(known, _)| *known == name);
    known.map(|(_, loss)| *loss).ok_or_else(|| {
        ModelError::invalid_input(format!("there is no loss \"{name}\""))
            .hint("It is \"mse\", \"cross_entropy\" or \"binary_cross_entropy\".")
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind::{self, InvalidInput, OutOfRange};
    use serde_json::json;

    #[test]
    fn options_have_defaults_and_are_read_whole() {
        assert_eq!(TrainOptions::of_json(&json!({})).unwrap(), TrainOptions::default());
        let text = r#"{"epochs": 3, "learning_rate": 0.5, "batch": 8, "momentum": 0.9, "weight_decay": 0.25,
            "seed": 18446744073709551615, "loss": "cross_entropy", "layers": 2}"#;
        let read = TrainOptions::of_json(&serde_json::from_str(text).unwrap()).unwrap();
        let expected = TrainOptions {
            epochs: 3,
            learning_rate: 0.5,
            batch: 8,
            momentum: 0.9,
            weight_decay: 0.25,
            seed: u64::MAX,
            loss: Loss::CrossEntropy,
            layers: Some(2),
        };
        assert_eq!(read, expected);
        let loose = TrainOptions::of_json(&json!({"epochs": 4.0, "layers": null, "learning_rate": 1})).unwrap();
        assert_eq!((loose.epochs, loose.layers, loose.learning_rate), (4, None, 1.0));
        for (name, loss) in Loss::NAMES {
            assert_eq!(TrainOptions::of_json(&json!({ "loss": name })).unwrap().loss, loss);
            assert_eq!(loss.name(), name);
        }
    }

    #[test]
    fn wrong_options_are_named() {
        let check = |value: Value, kind: ErrorKind, part: &str| {
            let error = TrainOptions::of_json(&value).unwrap_err();
            assert_eq!(error.kind, kind, "{value}: {error}");
            assert!(error.message.contains(part), "{value}: {error}");
        };
        check(json!([]), InvalidInput, "JSON object");
        check(json!({"epoch": 3}), InvalidInput, "no key \"epoch\"");
        check(json!({"epochs": "3"}), InvalidInput, "\"epochs\" must be a whole number");
        check(json!({"epochs": 1.5}), InvalidInput, "\"epochs\" must be a whole number");
        check(json!({"epochs": 0}), OutOfRange, "\"epochs\"");
        check(json!({"epochs": -1}), OutOfRange, "\"epochs\"");
        check(json!({"epochs": 1e18}), OutOfRange, "\"epochs\"");
        check(json!({"batch": 0}), OutOfRange, "\"batch\"");
        check(json!({"learning_rate": 0}), OutOfRange, "\"learning_rate\"");
        check(json!({"learning_rate": 1e-60}), OutOfRange, "\"learning_rate\"");
        check(json!({"learning_rate": -0.1}), OutOfRange, "\"learning_rate\"");
        check(json!({"learning_rate": true}), InvalidInput, "\"learning_rate\" must be a number");
        check(json!({"momentum": 1}), OutOfRange, "\"momentum\"");
        check(json!({"momentum": 0.999999999999}), OutOfRange, "\"momentum\"");
        check(json!({"weight_decay": 1e9}), OutOfRange, "\"weight_decay\"");
        check(json!({"seed": -1}), OutOfRange, "\"seed\"");
        check(json!({"seed": null}), InvalidInput, "\"seed\"");
        check(json!({"loss": "hinge"}), InvalidInput, "no loss \"hinge\"");
        check(json!({"loss": 1}), InvalidInput, "\"loss\" must be a string");
        check(json!({"layers": 0}), OutOfRange, "\"layers\"");
    }
}
