//! The error of everything that has to do with models.
//!
//! Responsible for: one error type that carries what PostgreSQL's `ereport` wants to know: a kind that the caller
//! maps to an SQLSTATE, a lower-case message that says what was wrong, a detail with the values, and a hint with the
//! way out.
//!
//! Invariant: whatever a user can cause (a bad file, a bad input) has a kind of its own; [`ErrorKind::Internal`] is
//! for a fault of ours.

use std::fmt;
use tensor_blocks::TilingError;

/// What went wrong, at the grain at which a client would branch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    /// The bytes are no ONNX model.
    NotOnnx,
    /// The bytes end in the middle of an ONNX model.
    Truncated,
    /// An ONNX model that contradicts itself or the format.
    InvalidModel,
    /// An operator that cannot be run.
    UnsupportedOperator,
    /// An operator set version that cannot be run.
    UnsupportedOpset,
    /// An element type that cannot be stored or run.
    UnsupportedType,
    /// Tensor data stands in another file that is not there or may not be read.
    ExternalDataMissing,
    /// Tensor data is said to stand outside the folder of the model.
    ExternalDataOutside,
    /// A size beyond what can be represented or is allowed.
    TooLarge,
    /// An input with the wrong shape, type or form.
    InvalidInput,
    /// An input that the model needs was not given.
    MissingInput,
    /// An input was given that the model does not have.
    UnknownInput,
    /// A NaN or an infinity where none may stand.
    NotANumber,
    /// A value that does not fit the element type.
    OutOfRange,
    /// Stopped at the caller's wish.
    Cancelled,
    /// Tensors that were to stay in blocks have uses that only an inline tensor has. Never leaves this crate.
    WantsInline,
    /// A fault in this library.
    Internal,
}

/// An error with a kind, a message, and where useful a detail and a hint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModelError {
    /// What a client would branch on.
    pub kind: ErrorKind,
    /// What was wrong: starts in lower case, no full stop.
    pub message: String,
    /// The values: a full sentence.
    pub detail: Option<String>,
    /// The way out: a full sentence.
    pub hint: Option<String>,
    /// Ordinals of the stored tensors that the error is about.
    pub tensors: Vec<u32>,
}

impl ModelError {
    /// An error without detail and hint.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> ModelError {
        ModelError { kind, message: message.into(), detail: None, hint: None, tensors: Vec::new() }
    }

    /// These stored tensors have to be inline.
    pub(crate) fn wants_inline(tensors: impl IntoIterator<Item = u32>) -> ModelError {
        let mut error = ModelError::new(ErrorKind::WantsInline, "tensors have to be inline");
        error.tensors.extend(tensors);
        error
    }

    /// The same error with this detail.
    #[must_use]
    pub fn detail(mut self, detail: impl Into<String>) -> ModelError {
        self.detail = Some(detail.into());
        self
    }

    /// The same error with this hint.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> ModelError {
        self.hint = Some(hint.into());
        self
    }
}

macro_rules! constructors {
    ($($function:ident => $kind:ident;)*) => {
        /// One constructor for each kind.
        #[allow(missing_docs)]
        impl ModelError {
            $(pub fn $function(message: impl Into<String>) -> ModelError {
                ModelError::new(ErrorKind::$kind, message)
            })*
        }
    };
}

constructors! {
    not_onnx => NotOnnx;
    truncated => Truncated;
    invalid_model => InvalidModel;
    unsupported_operator => UnsupportedOperator;
    unsupported_opset => UnsupportedOpset;
    unsupported_type => UnsupportedType;
    external_data_missing => ExternalDataMissing;
    external_data_outside => ExternalDataOutside;
    too_large => TooLarge;
    invalid_input => InvalidInput;
    missing_input => MissingInput;
    unknown_input => UnknownInput;
    not_a_number => NotANumber;
    out_of_range => OutOfRange;
    cancelled => Cancelled;
    internal => Internal;
}

impl fmt::Display for ModelError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)?;
        if let Some(detail) = &self.detail {
            write!(f, " ({detail})")?;
        }
        Ok(())
    }
}

impl std::error::Error for ModelError {}

impl From<TilingError> for ModelError {
    /// A size that cannot be stored is the model's; everything else was a wrong call.
    fn from(error: TilingError) -> ModelError {
        match error {
            TilingError::TooLarge { .. } | TilingError::TooManyTiles { .. } => {
                ModelError::too_large("a tensor is too large").detail(format!("{error}."))
            }
            _ => ModelError::internal(error.to_string()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn carries_what_ereport_wants() {
        let error = ModelError::truncated("the file is cut off").detail("It has 3 bytes.").hint("Copy it again.");
        assert_eq!(error.kind, ErrorKind::Truncated);
        assert_eq!(error.to_string(), "the file is cut off (It has 3 bytes.)");
        assert_eq!(error.hint.as_deref(), Some("Copy it again."));
        assert_eq!(ModelError::cancelled("stopped").detail, None);
        let large = TilingError::TooManyTiles { rows: 1, cols: 1, tile_rows: 1, tile_cols: 1 };
        assert_eq!(ModelError::from(large).kind, ErrorKind::TooLarge);
        assert_eq!(ModelError::from(TilingError::NoMatrix(3)).kind, ErrorKind::Internal);
    }
}
