//! Names of models: `fraud`, and `fraud@3` for a version of it.

use crate::pg::error;
use pgrx::prelude::*;

/// Longest name in bytes: that of any PostgreSQL object, since a domain carries it (NAMEDATALEN - 1).
const LONGEST: usize = 63;

/// What a function was given to name a model by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ModelSpec<'a> {
    /// Name of the model.
    pub name: &'a str,
    /// The version asked for; `None` for the active one.
    pub version: Option<i32>,
}

impl<'a> ModelSpec<'a> {
    /// Reads `name` or `name@version`.
    pub fn parse(text: &'a str) -> ModelSpec<'a> {
        match text.split_once('@') {
            None => ModelSpec { name: text, version: None },
            Some((name, digits)) => match digits.parse::<i32>() {
                Ok(version) if version > 0 && digits.bytes().all(|b| b.is_ascii_digit()) => {
                    ModelSpec { name, version: Some(version) }
                }
                _ => error::raise(
                    PgSqlErrorCode::ERRCODE_INVALID_PARAMETER_VALUE,
                    format!("invalid model version in \"{text}\""),
                    &format!("\"{digits}\" is no version number."),
                    "Write the name, or name@version with a whole number from 1.",
                ),
            },
        }
    }

    /// With an explicit version argument, which must not contradict the one in the name.
    pub fn with_version(self, version: Option<i32>) -> ModelSpec<'a> {
        match (self.version, version) {
            (Some(a), Some(b)) if a != b => error::raise(
                PgSqlErrorCode::ERRCODE_INVALID_PARAMETER_VALUE,
                "two different versions were given",
                &format!("The name says {a}, the argument {b}."),
                "Give the version once.",
            ),
            (a, b) => ModelSpec { name: self.name, version: a.or(b) },
        }
    }
}

/// Checks the name of a model that is to be made or renamed.
pub fn check_name(name: &str) {
    let wrong = if name.is_empty() {
        "It is empty."
    } else if name.contains('@') {
        "The character @ separates a name from a version."
    } else if name.len() > LONGEST {
        "It is longer than 63 bytes."
    } else if name.chars().any(char::is_control) {
        "It contains a control character."
    } else {
        return;
    };
    error::raise(
        PgSqlErrorCode::ERRCODE_INVALID_NAME,
        format!("invalid model name \"{}\"", name.escape_default()),
        wrong,
        "Use 1 to 63 bytes without @ and control characters.",
    )
}

// A #[pg_test], since what refuses a name raises an ERROR, which a program without a server cannot link.
#[cfg(any(test, feature = "pg_test"))]
#[pgrx::pg_schema]
mod tests {
    use super::*;

    #[pg_test]
    fn a_name_may_carry_a_version() {
        assert_eq!(ModelSpec::parse("a b"), ModelSpec { name: "a b", version: None });
        assert_eq!(ModelSpec::parse("fraud@12"), ModelSpec { name: "fraud", version: Some(12) });
        assert_eq!(ModelSpec::parse("fraud").with_version(Some(2)).version, Some(2));
    }
}
