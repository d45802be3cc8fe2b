//! The bytes that are read, and the caller's wish to be asked.
//!
//! Responsible for: handing out the fields of messages and the text in them, with errors that say what is damaged
//! where, and asking the caller every few MB of work whether to go on.
//!
//! Invariant: everything that is done once for each field goes through [`Source::fields`], so that no file, however
//! it is made, keeps the caller waiting.

use super::wire::{Field, Fields, WireError};
use crate::error::ModelError;
use std::cell::{Cell, RefCell};
use std::ops::Range;

/// A model's bytes. `'c` is the life of the caller's check.
pub(super) struct Source<'a, 'c> {
    pub bytes: &'a [u8],
    check: RefCell<&'c mut dyn FnMut() -> Result<(), ModelError>>,
    since: Cell<usize>,
}

impl<'a, 'c> Source<'a, 'c> {
    /// Work between two checks, in bytes that are looked at one by one: some 10 ms.
    const STEP: usize = 4 << 20;
    /// The work of reading one field, in the same measure.
    const FIELD: usize = 32;

    pub fn new(bytes: &'a [u8], check: &'c mut dyn FnMut() -> Result<(), ModelError>) -> Source<'a, 'c> {
        Source { bytes, check: RefCell::new(check), since: Cell::new(0) }
    }

    /// Counts work, and asks the caller when there was enough of it.
    pub fn advance(&self, bytes: usize) -> Result<(), ModelError> {
        let since = self.since.get().saturating_add(bytes);
        if since < Self::STEP {
            self.since.set(since);
            return Ok(());
        }
        self.since.set(0);
        (self.check.borrow_mut())()
    }

    /// The fields of the message of type `message` that is `body`.
    pub fn fields(
        &self,
        body: Range<usize>,
        message: &'static str,
    ) -> impl Iterator<Item = Result<Field, ModelError>> + use<'_, 'a, 'c> {
        Fields::new(self.bytes, body).map(move |field| {
            self.advance(Self::FIELD)?;
            field.map_err(|error| damaged(error, message))
        })
    }

    /// A string field as text; `what` names it in the error.
    pub fn text(&self, span: &Range<usize>, what: &str) -> Result<&'a str, ModelError> {
        let bytes = &self.bytes[span.clone()];
        let text = std::str::from_utf8(bytes).ok().filter(|text| !text.contains('\0'));
        text.ok_or_else(|| {
            let start = bytes[..bytes.len().min(64)].escape_ascii();
            ModelError::invalid_model(format!("the ONNX model has a {what} that is not text"))
                .detail(format!("At byte {}: \"{start}\".", span.start))
                .hint(AGAIN)
        })
    }
}

const AGAIN: &str = "Copy or export the model again.";

/// A wire error inside a message.
pub(super) fn damaged(error: WireError, message: &str) -> ModelError {
    let detail = match error {
        WireError::Overrun { at, number, .. } => {
            let field = number.map_or(String::new(), |number| format!(" {number}"));
            format!("At byte {at}, field{field} of a {message} reaches past the end of its message.")
        }
        WireError::Malformed { at } => {
            format!("At byte {at}, a {message} has a field that cannot be read.")
        }
    };
    ModelError::invalid_model("the ONNX model is damaged").detail(detail).hint(AGAIN)
}

/// A field whose wire type is not the one that onnx.proto3 gives it.
pub(super) fn wrong_wire_type(message: &str, field: &Field) -> ModelError {
    let (at, number) = (field.span.start, field.number);
    ModelError::invalid_model("the ONNX model is damaged")
        .detail(format!("At byte {at}, field {number} of a {message} has the wrong wire type."))
        .hint(AGAIN)
}

/// Makes room for `additional` more bytes, or fails with `TooLarge`.
pub(super) fn reserve(data: &mut Vec<u8>, additional: usize) -> Result<(), ModelError> {
    data.try_reserve(additional).map_err(|_| {
        ModelError::too_large("the model does not fit in memory")
            .detail(format!("{additional} bytes could not be had at once."))
    })
}
