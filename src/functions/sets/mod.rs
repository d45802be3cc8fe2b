//! Sets of models of one architecture: saving, recovering, training, dropping.
//!
//! - [`save`]: members from a query, as ONNX files or as parameters alone;
//! - [`train`]: members that are kept as the way in which they are trained;
//! - [`recover`]: members as ONNX files again;
//! - [`recommend`]: what each way of keeping a set costs.

mod fit;
mod hashing;
mod members;
mod placeholder;
mod recommend;
mod recover;
mod save;
mod train;

use crate::catalog::{self, sets};
use crate::pg::error;
use crate::pg::fmgr::{Call, Rows, sql_functions};
use pgrx::pg_sys;
use pgrx::prelude::*;

sql_functions!(drop_model_set, set_member_names);

fn drop_model_set(call: &Call) -> pg_sys::Datum {
    sets::drop_set(call.need(0, "set_name"));
    pg_sys::Datum::from(0)
}

fn set_member_names(call: &Call) -> pg_sys::Datum {
    let mut rows = Rows::start(call);
    if let Some(row) = sets::set_of_id(call.need(0, "model_set")) {
        let set = crate::serving::sets::open(row);
        for (place, (_, name)) in set.members().enumerate() {
            rows.push(&[name.into_datum(), (place as i64).into_datum()]);
        }
    }
    call.null()
}

/// Raises an ERROR if that cannot be the name of a set.
fn check_set_name(name: &str) {
    catalog::check_name(name);
    if name.contains('/') {
        error::raise(
            PgSqlErrorCode::ERRCODE_INVALID_NAME,
            format!("invalid name \"{}\" of a model set", name.escape_default()),
            "The character / separates the name of a set from that of a member.",
            "Use 1 to 63 bytes without /, @ and control characters.",
        );
    }
}
