//! The training function that comes with the extension: small feed-forward networks by stochastic gradient descent.

use crate::pg::fmgr::{Call, missing, sql_functions_of_users_code, varlena_datum};
use crate::pg::query::{self, Calls, Column};
use crate::pg::{error, interrupt, value};
use inference::net::{TrainOptions, train_onnx};
use pgrx::pg_sys;
use pgrx::prelude::*;
use std::cell::RefCell;

sql_functions_of_users_code!(train_feed_forward);

/// Most values of the training data, which are in memory as a whole: 1 GB.
const VALUES: usize = 1 << 28;

struct Data {
    types: [pg_sys::Oid; 2],
    x: Vec<f32>,
    y: Vec<f32>,
    rows: usize,
    /// Numbers of a row's two columns.
    widths: [usize; 2],
}

fn train_feed_forward(call: &Call) -> pg_sys::Datum {
    let Some(model) = call.bytes(0) else { missing("onnx") };
    let samples: &str = call.need(1, "data");
    let params: pgrx::JsonB = call.need(2, "params");
    let options = TrainOptions::of_json(&params.0).unwrap_or_else(|e| error::raise_model(e));
    let data =
        RefCell::new(Data { types: [pg_sys::InvalidOid; 2], x: Vec::new(), y: Vec::new(), rows: 0, widths: [0; 2] });
    query::select(
        samples,
        "training data",
        Calls::Any,
        |columns| data.borrow_mut().types = types_of(columns),
        |row| data.borrow_mut().add(row),
    );
    let Data { x, y, rows, .. } = data.into_inner();
    if rows == 0 {
        error::raise(
            PgSqlErrorCode::ERRCODE_NO_DATA_FOUND,
            "the query of the training data gives no row",
            "",
            "Give a query with a row (input, target) for each sample.",
        );
    }
    let mut check = || {
        interrupt::check();
        Ok(())
    };
    let trained = train_onnx(model, &x, &y, rows, &options, &mut check).unwrap_or_else(|e| error::raise_model(e));
    varlena_datum(&[&trained])
}

impl Data {
    /// Adds a row; its bytes.
    fn add(&mut self, row: &[Option<pg_sys::Datum>]) -> usize {
        let before = [self.x.len(), self.y.len()];
        let (Some(input), Some(target)) = (row[0], row[1]) else {
            error::raise(
                PgSqlErrorCode::ERRCODE_NULL_VALUE_NOT_ALLOWED,
                "a row of the training data has a null",
                "",
                "Leave such rows out of the query.",
            )
        };
        value::numbers(input, self.types[0], |numbers| self.x.extend(numbers.map(|number| number as f32)));
        value::numbers(target, self.types[1], |numbers| self.y.extend(numbers.map(|number| number as f32)));
        let widths = [self.x.len() - before[0], self.y.len() - before[1]];
        if self.rows > 0 && widths != self.widths {
            error::raise(
                PgSqlErrorCode::ERRCODE_INVALID_PARAMETER_VALUE,
                "rows of the training data differ in length",
                &format!(
                    "One has {} and {} values, another {} and {}.",
                    self.widths[0], self.widths[1], widths[0], widths[1]
                ),
                "Give arrays of one length as input, and of one length as target.",
            );
        }
        (self.widths, self.rows) = (widths, self.rows + 1);
        if self.x.len() + self.y.len() > VALUES {
            error::raise(
                PgSqlErrorCode::ERRCODE_PROGRAM_LIMIT_EXCEEDED,
                "the training data are larger than 1 GB",
                "",
                "Train on a sample, or with a function of your own.",
            );
        }
        4 * (widths[0] + widths[1])
    }
}

fn types_of(columns: &[Column]) -> [pg_sys::Oid; 2] {
    let types: Vec<pg_sys::Oid> = columns.iter().map(|column| column.type_oid).collect();
    match types[..] {
        [input, target] if [input, target].iter().all(|kind| value::is_array(*kind) || value::is_number(*kind)) => {
            [input, target]
        }
        _ => error::raise(
            PgSqlErrorCode::ERRCODE_DATATYPE_MISMATCH,
            "the columns of the training data do not fit",
            &format!(
                "The query gives {}.",
                types.iter().map(|kind| value::type_name(*kind)).collect::<Vec<_>>().join(", ")
            ),
            "Give (input, target): arrays of numbers, or single numbers.",
        ),
    }
}
