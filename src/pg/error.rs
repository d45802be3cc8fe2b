//! Errors as PostgreSQL users know them: SQLSTATE, message, detail, hint.

use inference::error::{ErrorKind, ModelError};
use pgrx::pg_sys::panic::ErrorReport;
use pgrx::prelude::*;

/// Raises an ERROR. `detail` and `hint` may be empty.
pub fn raise(code: PgSqlErrorCode, message: impl Into<String>, detail: &str, hint: &str) -> ! {
    let mut report = ErrorReport::new(code, message.into(), "pg_tessera");
    if !detail.is_empty() {
        report = report.set_detail(detail);
    }
    if !hint.is_empty() {
        report = report.set_hint(hint);
    }
    report.report(PgLogLevel::ERROR);
    unreachable!("an ERROR does not return")
}

/// Raises `feature_not_supported`.
pub fn not_supported(what: &str, hint: &str) -> ! {
    raise(PgSqlErrorCode::ERRCODE_FEATURE_NOT_SUPPORTED, what, "", hint)
}

/// Raises the ERROR that stands for a [`ModelError`].
pub fn raise_model(error: ModelError) -> ! {
    raise(
        sqlstate(&error.kind),
        error.message,
        error.detail.as_deref().unwrap_or(""),
        error.hint.as_deref().unwrap_or_else(|| way_out(&error.kind)),
    )
}

/// What a user can do about an error of this kind that says nothing more particular.
fn way_out(kind: &ErrorKind) -> &'static str {
    match kind {
        ErrorKind::NotOnnx => "Give the bytes of an .onnx file.",
        ErrorKind::Truncated => "Transfer the file again; check that it was written to its end.",
        ErrorKind::InvalidModel => {
            "Check the file with onnx.checker, and export the model again, if possible for a plain batch."
        }
        ErrorKind::UnsupportedOperator | ErrorKind::UnsupportedOpset => {
            "Export the model for another opset, or without that operator."
        }
        ErrorKind::UnsupportedType => "Export the model with another element type, such as float32.",
        ErrorKind::ExternalDataMissing => "Put the external data files beside the model, as they were exported.",
        ErrorKind::ExternalDataOutside => "Keep external data files in the folder of the model.",
        ErrorKind::TooLarge => "Predict fewer rows at a time, or raise tessera.max_prediction_memory.",
        ErrorKind::InvalidInput | ErrorKind::MissingInput | ErrorKind::UnknownInput => {
            "See tessera.model_inputs for what the model takes."
        }
        ErrorKind::NotANumber | ErrorKind::OutOfRange => "Give values that the input's element type can hold.",
        ErrorKind::Cancelled => "",
        ErrorKind::Internal | ErrorKind::WantsInline => "Please report this with the model, if it can be shared.",
    }
}

/// The SQLSTATE on which a client would branch.
fn sqlstate(kind: &ErrorKind) -> PgSqlErrorCode {
    match kind {
        ErrorKind::NotOnnx | ErrorKind::Truncated | ErrorKind::InvalidModel => {
            PgSqlErrorCode::ERRCODE_INVALID_BINARY_REPRESENTATION
        }
        ErrorKind::UnsupportedOperator | ErrorKind::UnsupportedOpset | ErrorKind::UnsupportedType => {
            PgSqlErrorCode::ERRCODE_FEATURE_NOT_SUPPORTED
        }
        ErrorKind::ExternalDataMissing => PgSqlErrorCode::ERRCODE_UNDEFINED_FILE,
        ErrorKind::ExternalDataOutside => PgSqlErrorCode::ERRCODE_INSUFFICIENT_PRIVILEGE,
        ErrorKind::TooLarge => PgSqlErrorCode::ERRCODE_PROGRAM_LIMIT_EXCEEDED,
        ErrorKind::InvalidInput => PgSqlErrorCode::ERRCODE_INVALID_PARAMETER_VALUE,
        ErrorKind::MissingInput | ErrorKind::UnknownInput => PgSqlErrorCode::ERRCODE_UNDEFINED_PARAMETER,
        ErrorKind::NotANumber | ErrorKind::OutOfRange => PgSqlErrorCode::ERRCODE_NUMERIC_VALUE_OUT_OF_RANGE,
        ErrorKind::Cancelled => PgSqlErrorCode::ERRCODE_QUERY_CANCELED,
        // Not internal_error: what a user's model or input can cause must not look like a server fault.
        ErrorKind::Internal | ErrorKind::WantsInline => PgSqlErrorCode::ERRCODE_EXTERNAL_ROUTINE_EXCEPTION,
    }
}

/// Tells the client, and goes on.
pub fn notice(message: &str, hint: &str) {
    ErrorReport::new(PgSqlErrorCode::ERRCODE_SUCCESSFUL_COMPLETION, message.to_owned(), "pg_tessera")
        .set_hint(hint)
        .report(PgLogLevel::NOTICE);
}
