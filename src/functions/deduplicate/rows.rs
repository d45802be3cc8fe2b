//! The rows of a validation query, held in memory.
//!
//! Invariants: they are read once, so that rows that change meanwhile change nothing; what they take is counted, and bounded by
//! maintenance_work_mem.

use super::metric::Metric;
use crate::pg::query::{self, Column};
use crate::pg::value::type_name;
use crate::pg::{array, error, memory, value};
use inference::array::{RowBuffer, from_rows};
use inference::error::ModelError;
use inference::signature::Port;
use pgrx::pg_sys::{self, Datum};
use pgrx::prelude::*;

/// How errors name the query.
const WHAT: &str = "validation";

/// Element type of the features, as the model's input is made from it.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Elements {
    Real,
    Double,
    Integer,
    Bigint,
    /// Read by way of the text form: `numeric[]` and `smallint[]`.
    Other,
}

impl Elements {
    fn of(column: &Column) -> Elements {
        match column.type_oid {
            pg_sys::FLOAT4ARRAYOID => Elements::Real,
            pg_sys::FLOAT8ARRAYOID => Elements::Double,
            pg_sys::INT4ARRAYOID => Elements::Integer,
            pg_sys::INT8ARRAYOID => Elements::Bigint,
            pg_sys::NUMERICARRAYOID | pg_sys::INT2ARRAYOID => Elements::Other,
            other => error::raise(
                PgSqlErrorCode::ERRCODE_DATATYPE_MISMATCH,
                format!("column \"{}\" of the {WHAT} query has type {}", column.name, type_name(other)),
                "The first column is the model's input: an array of numbers.",
                "Cast it, for example to real[].",
            ),
        }
    }
}

/// What a row's prediction is compared with.
pub enum Label<'a> {
    /// A number.
    Number(f64),
    /// An array of numbers.
    Numbers(&'a [f64]),
    /// A value of a type that the metric's function takes.
    Value(Datum),
}

/// How a column of labels is read.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum LabelKind {
    /// As a number or as an array of numbers.
    Numbers,
    /// As it is.
    Value,
}

/// The rows.
pub struct Rows {
    elements: Elements,
    features: Vec<u8>,
    /// Where the features of each row end.
    feature_ends: Vec<usize>,
    numbers: Vec<f64>,
    /// Where the numbers of each row's label end.
    number_ends: Vec<usize>,
    values: Vec<Datum>,
    /// Bytes of what the values point at.
    value_bytes: usize,
}

impl Rows {
    /// Reads the rows of the query. `bind` makes a metric of the type of the labels, which are kept in the memory context `home`
    /// if they are no numbers.
    ///
    /// Errors: those of the query; columns that are not features and a label, NULLs, fewer than two rows, or more than fit
    /// in maintenance_work_mem.
    pub fn read(sql: &str, home: pg_sys::MemoryContext, bind: impl FnOnce(&Column) -> Metric) -> (Rows, Metric) {
        let mut rows = Rows {
            elements: Elements::Real,
            features: Vec::new(),
            feature_ends: Vec::new(),
            numbers: Vec::new(),
            number_ends: Vec::new(),
            values: Vec::new(),
            value_bytes: 0,
        };
        let limit = memory::of_maintenance();
        let mut metric = None;
        let label = std::cell::Cell::new((pg_sys::InvalidOid, LabelKind::Value));
        let elements = std::cell::Cell::new(Elements::Real);
        query::select(
            sql,
            WHAT,
            query::Calls::Read,
            |columns| {
                let [features, of_label] = columns else {
                    error::raise(
                        PgSqlErrorCode::ERRCODE_DATATYPE_MISMATCH,
                        format!("the {WHAT} query returns {} columns", columns.len()),
                        "The first is the model's input, the second the label.",
                        "Write SELECT features, label FROM ...",
                    )
                };
                elements.set(Elements::of(features));
                let bound = metric.insert(bind(of_label));
                label.set((of_label.type_oid, bound.label_kind()));
            },
            |values| {
                let &[Some(features), Some(of_label)] = values else {
                    error::raise(
                        PgSqlErrorCode::ERRCODE_NULL_VALUE_NOT_ALLOWED,
                        format!("row {} of the {WHAT} query has a null", rows.len() + 1),
                        "",
                        "Leave such rows out with a WHERE clause.",
                    )
                };
                rows.elements = elements.get();
                let bytes = rows.push_features(features);
                let bytes = bytes + rows.push_label(of_label, label.get(), home);
                let held = rows.bytes();
                if held > limit {
                    error::raise(
                        PgSqlErrorCode::ERRCODE_PROGRAM_LIMIT_EXCEEDED,
                        format!("the rows of the {WHAT} query do not fit in maintenance_work_mem"),
                        &format!("The first {} take {held} of {limit} bytes.", rows.len()),
                        "Add a LIMIT, or raise maintenance_work_mem.",
                    );
                }
                bytes
            },
        );
        match (metric, rows.len()) {
            (Some(metric), 2..) => (rows, metric),
            (_, count) => error::raise(
                PgSqlErrorCode::ERRCODE_NO_DATA,
                format!("the {WHAT} query returns {}", if count == 0 { "no rows" } else { "one row" }),
                "One part of the rows guides the search, the other measures its result.",
                "Give at least two rows, better some hundreds.",
            ),
        }
    }

    /// Number of rows.
    pub fn len(&self) -> usize {
        self.feature_ends.len()
    }

    fn bytes(&self) -> usize {
        let words = self.feature_ends.len() + self.number_ends.len() + self.numbers.len() + self.values.len();
        self.features.len() + self.value_bytes + 8 * words
    }

    /// Returns the bytes that were added.
    fn push_features(&mut self, value: Datum) -> usize {
        let before = self.features.len();
        let row = self.len() + 1;
        match self.elements {
            Elements::Real => array::with_elements::<f32, _>(value, |d, v| self.extend(row, d, v, |v| v.to_ne_bytes())),
            Elements::Double => {
                array::with_elements::<f64, _>(value, |d, v| self.extend(row, d, v, |v| v.to_ne_bytes()));
            }
            Elements::Integer => {
                array::with_elements::<i32, _>(value, |d, v| self.extend(row, d, v, |v| v.to_ne_bytes()));
            }
            Elements::Bigint => {
                array::with_elements::<i64, _>(value, |d, v| self.extend(row, d, v, |v| v.to_ne_bytes()));
            }
            Elements::Other => {
                // An array says its element type itself.
                let doubles = array::parse_f64(&value::text(value, pg_sys::NUMERICARRAYOID));
                array::with_elements::<f64, _>(doubles, |d, v| self.extend(row, d, v, |v| v.to_ne_bytes()));
            }
        }
        self.feature_ends.push(self.features.len());
        self.features.len() - before
    }

    fn extend<T: Copy, const N: usize>(&mut self, row: usize, dims: &[usize], values: &[T], bytes: fn(T) -> [u8; N]) {
        if dims.len() > 1 {
            error::raise(
                PgSqlErrorCode::ERRCODE_ARRAY_ELEMENT_ERROR,
                format!("the features in row {row} of the {WHAT} query have {} dimensions", dims.len()),
                "",
                "Give each row as an array of one dimension.",
            );
        }
        self.features.extend(values.iter().flat_map(|&value| bytes(value)));
    }

    /// Returns the bytes that were added.
    fn push_label(
        &mut self,
        value: Datum,
        (type_oid, kind): (pg_sys::Oid, LabelKind),
        home: pg_sys::MemoryContext,
    ) -> usize {
        let before = self.numbers.len();
        match kind {
            LabelKind::Value => {
                let (value, bytes) = value::keep(value, type_oid, home);
                self.values.push(value);
                self.value_bytes += bytes;
                return bytes;
            }
            LabelKind::Numbers => value::numbers(value, type_oid, |values| self.numbers.extend(values)),
        }
        self.number_ends.push(self.numbers.len());
        8 * (self.numbers.len() - before)
    }

    /// The label of a row.
    pub fn label(&self, row: usize) -> Label<'_> {
        if let Some(&value) = self.values.get(row) {
            return Label::Value(value);
        }
        let from = if row == 0 { 0 } else { self.number_ends[row - 1] };
        match &self.numbers[from..self.number_ends[row]] {
            &[number] => Label::Number(number),
            numbers => Label::Numbers(numbers),
        }
    }

    fn features(&self, row: usize) -> &[u8] {
        let from = if row == 0 { 0 } else { self.feature_ends[row - 1] };
        &self.features[from..self.feature_ends[row]]
    }

    /// Bytes of a row's features.
    pub fn width(&self, row: usize) -> usize {
        self.features(row).len()
    }

    /// Adds the features of a row to a batch. ERROR if they do not fit the model's input.
    pub fn gather(&self, row: usize, port: &Port, batch: &mut RowBuffer) {
        let bytes = self.features(row);
        let added = match self.elements {
            Elements::Real => batch.push::<f32>(port, bytes),
            Elements::Double | Elements::Other => batch.push::<f64>(port, bytes),
            Elements::Integer => batch.push::<i32>(port, bytes),
            Elements::Bigint => batch.push::<i64>(port, bytes),
        };
        if !added {
            self.refuse(row, port);
        }
    }

    /// Raises the ERROR that says why a row does not fit the model's input.
    fn refuse(&self, row: usize, port: &Port) -> ! {
        let bytes = self.features(row);
        macro_rules! reason {
            ($type:ty) => {{
                let (values, _) = bytes.as_chunks::<{ size_of::<$type>() }>();
                let values: Vec<$type> = values.iter().map(|bytes| <$type>::from_ne_bytes(*bytes)).collect();
                from_rows(port, 1, values.len(), &values).err()
            }};
        }
        let reason = match self.elements {
            Elements::Real => reason!(f32),
            Elements::Double | Elements::Other => reason!(f64),
            Elements::Integer => reason!(i32),
            Elements::Bigint => reason!(i64),
        };
        let mut reason = reason.unwrap_or_else(|| ModelError::invalid_input("rows of a batch differ in their width"));
        reason.message = format!("row {} of the {WHAT} query does not fit the model: {}", row + 1, reason.message);
        error::raise_model(reason)
    }
}
