//! The training function that comes with the extension: small feed-forward networks by stochastic gradient descent.

use crate::pg::cursor::{Column, QueryRow, each_row};
use crate::pg::fmgr::{Call, missing, sql_functions, varlena_datum};
use crate::pg::{array, error, interrupt};
use inference::net::{TrainOptions, train_onnx};
use pgrx::pg_sys;
use pgrx::prelude::*;
use std::cell::RefCell;

sql_functions!(train_feed_forward);

/// Most values of the training data, which are in memory as a whole: 1 GB.
const VALUES: usize = 1 << 28;

/// How a column's numbers lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Numbers {
    Reals,
    Doubles,
    Real,
    Double,
    Smallint,
    Integer,
    Bigint,
    Boolean,
}

impl Numbers {
    fn of(type_oid: pg_sys::Oid) -> Option<Numbers> {
        Some(match type_oid {
            pg_sys::FLOAT4ARRAYOID => Numbers::Reals,
            pg_sys::FLOAT8ARRAYOID => Numbers::Doubles,
            pg_sys::FLOAT4OID => Numbers::Real,
            pg_sys::FLOAT8OID => Numbers::Double,
            pg_sys::INT2OID => Numbers::Smallint,
            pg_sys::INT4OID => Numbers::Integer,
            pg_sys::INT8OID => Numbers::Bigint,
            pg_sys::BOOLOID => Numbers::Boolean,
            _ => return None,
        })
    }

    /// Appends the column's numbers.
    fn read(self, row: &QueryRow, column: usize, out: &mut Vec<f32>) {
        let Some(datum) = row.datum(column) else {
            error::raise(
                PgSqlErrorCode::ERRCODE_NULL_VALUE_NOT_ALLOWED,
                "a row of the training data has a null",
                "",
                "Leave such rows out of the query.",
            )
        };
        let one = |value: Option<f64>| value.unwrap_or_default() as f32;
        match self {
            Numbers::Reals => array::with_elements::<f32, _>(datum, |_, values| out.extend_from_slice(values)),
            Numbers::Doubles => {
                array::with_elements::<f64, _>(datum, |_, values| out.extend(values.iter().map(|&value| value as f32)));
            }
            Numbers::Real => out.push(row.get::<f32>(column).unwrap_or_default()),
            Numbers::Double => out.push(one(row.get::<f64>(column))),
            Numbers::Smallint => out.push(one(row.get::<i16>(column).map(f64::from))),
            Numbers::Integer => out.push(one(row.get::<i32>(column).map(f64::from))),
            Numbers::Bigint => out.push(one(row.get::<i64>(column).map(|value| value as f64))),
            Numbers::Boolean => out.push(one(row.get::<bool>(column).map(|value| f64::from(u8::from(value))))),
        }
    }
}

#[derive(Default)]
struct Data {
    kinds: Vec<Numbers>,
    x: Vec<f32>,
    y: Vec<f32>,
    rows: usize,
    /// Numbers of a row's two columns.
    widths: [usize; 2],
}

fn train_feed_forward(call: &Call) -> pg_sys::Datum {
    let Some(model) = call.bytes(0) else { missing("onnx") };
    let query: &str = call.need(1, "data");
    let params: pgrx::JsonB = call.need(2, "params");
    let options = TrainOptions::of_json(&params.0).unwrap_or_else(|e| error::raise_model(e));
    let data = RefCell::new(Data::default());
    each_row(query, &mut |columns| data.borrow_mut().kinds = kinds_of(columns), &mut |row| data.borrow_mut().add(row));
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
    fn add(&mut self, row: &QueryRow) {
        let before = [self.x.len(), self.y.len()];
        self.kinds[0].read(row, 0, &mut self.x);
        self.kinds[1].read(row, 1, &mut self.y);
        let widths = [self.x.len() - before[0], self.y.len() - before[1]];
        if self.rows > 0 && widths != self.widths {
            error::raise(
                PgSqlErrorCode::ERRCODE_INVALID_PARAMETER_VALUE,
                "rows of the training data differ in length",
                &format!("One has {} and {} values, another {} and {}.", self.widths[0], self.widths[1], widths[0], widths[1]),
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
    }
}

fn kinds_of(columns: &[Column]) -> Vec<Numbers> {
    let kinds: Vec<Option<Numbers>> = columns.iter().map(|column| Numbers::of(column.type_oid)).collect();
    match kinds[..] {
        [Some(input), Some(target)] => vec![input, target],
        _ => error::raise(
            PgSqlErrorCode::ERRCODE_DATATYPE_MISMATCH,
            "the columns of the training data do not fit",
            &format!("The query gives {} columns.", columns.len()),
            "Give (input, target): real[] or double precision[], or single numbers; cast what is numeric.",
        ),
    }
}
