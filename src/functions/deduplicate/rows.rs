//! The rows of a validation query, held in memory.
//!
//! Invariants: they are read once, so that rows that change meanwhile change nothing; what they take is counted, and bounded by
//! maintenance_work_mem.

use super::metric::Metric;
use crate::pg::query::{self, Column, type_name};
use crate::pg::{array, error, memory};
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

/// Where labels that are no numbers are kept, and what is called with them. It goes with the call of the SQL function.
pub struct Home {
    context: pg_sys::MemoryContext,
}

impl Home {
    /// In the current memory context, which is the call's.
    pub fn new() -> Home {
        // SAFETY: the current memory context is one.
        Home { context: unsafe { memory::new_context(pg_sys::CurrentMemoryContext, c"pg_tessera validation rows") } }
    }

    /// The memory context.
    pub fn context(&self) -> pg_sys::MemoryContext {
        self.context
    }

    /// A copy of a value of a type.
    fn keep(&self, value: Datum, type_oid: pg_sys::Oid) -> (Datum, usize) {
        // SAFETY: the value has this type; a varlena is detoasted into the home.
        unsafe {
            let (mut len, mut by_value) = (0i16, false);
            pg_sys::get_typlenbyval(type_oid, &mut len, &mut by_value);
            let caller = pg_sys::MemoryContextSwitchTo(self.context);
            let kept = if len == -1 {
                let plain = pg_sys::pg_detoast_datum_copy(value.cast_mut_ptr());
                (Datum::from(plain), pgrx::varsize_any(plain))
            } else {
                (pg_sys::datumCopy(value, by_value, i32::from(len)), 0)
            };
            pg_sys::MemoryContextSwitchTo(caller);
            kept
        }
    }
}

impl Rows {
    /// Reads the rows of the query. `bind` makes a metric of the type of the labels.
    ///
    /// Errors: those of the query; columns that are not features and a label, NULLs, fewer than two rows, or more than fit
    /// in maintenance_work_mem.
    pub fn read(sql: &str, home: &Home, bind: impl FnOnce(&Column) -> Metric) -> (Rows, Metric) {
        let mut rows = Rows {
            elements: Elements::Real,
            features: Vec::new(),
            feature_ends: Vec::new(),
            numbers: Vec::new(),
            number_ends: Vec::new(),
            values: Vec::new(),
            value_bytes: 0,
        };
        // SAFETY: a setting of PostgreSQL, in kB.
        let limit = unsafe { pg_sys::maintenance_work_mem } as usize * 1024;
        let mut metric = None;
        let label = std::cell::Cell::new((pg_sys::InvalidOid, LabelKind::Value));
        let elements = std::cell::Cell::new(Elements::Real);
        query::select(
            sql,
            WHAT,
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
                let doubles = array::parse_f64(&text(value, pg_sys::NUMERICARRAYOID));
                // An array says its element type itself.
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
    fn push_label(&mut self, value: Datum, (type_oid, kind): (pg_sys::Oid, LabelKind), home: &Home) -> usize {
        let before = self.numbers.len();
        match kind {
            LabelKind::Value => {
                let (value, bytes) = home.keep(value, type_oid);
                self.values.push(value);
                self.value_bytes += bytes;
                return bytes;
            }
            LabelKind::Numbers => with_numbers(value, type_oid, |values| self.numbers.extend(values)),
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

/// True for the arrays of numbers that a label may be.
pub fn is_array(type_oid: pg_sys::Oid) -> bool {
    matches!(
        type_oid,
        pg_sys::FLOAT4ARRAYOID
            | pg_sys::FLOAT8ARRAYOID
            | pg_sys::INT2ARRAYOID
            | pg_sys::INT4ARRAYOID
            | pg_sys::INT8ARRAYOID
            | pg_sys::NUMERICARRAYOID
    )
}

/// True for the numbers that a label may be; a boolean is 0 or 1.
pub fn is_number(type_oid: pg_sys::Oid) -> bool {
    matches!(
        type_oid,
        pg_sys::BOOLOID
            | pg_sys::FLOAT4OID
            | pg_sys::FLOAT8OID
            | pg_sys::INT2OID
            | pg_sys::INT4OID
            | pg_sys::INT8OID
            | pg_sys::NUMERICOID
    )
}

/// Gives a label that is a number, or an array of them, as numbers.
fn with_numbers(value: Datum, type_oid: pg_sys::Oid, give: impl FnOnce(&mut dyn Iterator<Item = f64>)) {
    let one = |number: Option<f64>| give(&mut number.into_iter());
    // SAFETY: the value has this type.
    unsafe {
        match type_oid {
            pg_sys::BOOLOID => one(bool::from_datum(value, false).map(f64::from)),
            pg_sys::FLOAT4OID => one(f32::from_datum(value, false).map(f64::from)),
            pg_sys::FLOAT8OID => one(f64::from_datum(value, false)),
            pg_sys::INT2OID => one(i16::from_datum(value, false).map(f64::from)),
            pg_sys::INT4OID => one(i32::from_datum(value, false).map(f64::from)),
            pg_sys::INT8OID => one(i64::from_datum(value, false).map(|number| number as f64)),
            pg_sys::FLOAT4ARRAYOID => {
                array::with_elements::<f32, _>(value, |_, v| give(&mut v.iter().copied().map(f64::from)));
            }
            pg_sys::FLOAT8ARRAYOID => array::with_elements::<f64, _>(value, |_, v| give(&mut v.iter().copied())),
            other => {
                let text = text(value, other);
                let literal = if is_array(other) { text } else { format!("{{{text}}}") };
                array::with_elements::<f64, _>(array::parse_f64(&literal), |_, v| give(&mut v.iter().copied()));
            }
        }
    }
}

/// The text form of a value of a type.
fn text(value: Datum, type_oid: pg_sys::Oid) -> String {
    // SAFETY: the type's own output function; the string is palloc'd.
    unsafe {
        let (mut output, mut varlena) = (pg_sys::InvalidOid, false);
        pg_sys::getTypeOutputInfo(type_oid, &mut output, &mut varlena);
        let text = pg_sys::OidOutputFunctionCall(output, value);
        std::ffi::CStr::from_ptr(text).to_string_lossy().into_owned()
    }
}
