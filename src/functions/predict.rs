//! Prediction: arguments to tensors, a run, outputs to values.

use crate::pg::fmgr::{Call, sql_functions, varlena_datum};
use crate::pg::{array, error};
use crate::serving::{self, model_of, run};
use inference::array::{Element, from_rows, to_rows_f32};
use inference::json;
use inference::plan::Plan;
use inference::signature::{Dim, Port};
use inference::tensor::{HostTensor, TensorData};
use pgrx::pg_sys;
use pgrx::prelude::*;
use std::ffi::CStr;

sql_functions!(predict_real, predict_double, predict_integer, predict_bigint, predict_text, predict_jsonb);

/// The only input of a model, for the array forms.
fn only_input<'p>(plan: &'p Plan, spec: &str) -> &'p Port {
    let inputs = &plan.signature().inputs;
    match inputs.as_slice() {
        [port] => port,
        _ => error::raise(
            PgSqlErrorCode::ERRCODE_INVALID_PARAMETER_VALUE,
            format!("model \"{spec}\" has {} inputs, and an array is one", inputs.len()),
            &format!("It takes {}.", plan.signature().inputs_text()),
            "Name the inputs: predict(model, '{\"input\": [...], ...}'::jsonb).",
        ),
    }
}

/// Number and length of the rows that an array is.
fn rows_of(dims: &[usize]) -> Option<(usize, usize)> {
    match *dims {
        [] => Some((1, 0)),
        [width] => Some((1, width)),
        [rows, width] => Some((rows, width)),
        _ => None,
    }
}

/// The values of a float32 tensor.
fn floats_of(tensor: &HostTensor) -> Vec<f32> {
    match &tensor.data {
        TensorData::Raw(raw) => raw.as_chunks::<4>().0.iter().map(|value| f32::from_le_bytes(*value)).collect(),
        _ => Vec::new(),
    }
}

/// One row, or the rows of a two-dimensional array, through the model; the first output, flattened per row.
fn predict_rows<T: Element>(spec: &str, dims: &[usize], values: &[T]) -> pg_sys::Datum {
    if let Some((set, member)) = serving::sets::member_of(spec)
        && let Some(port) = set.shared.net_port()
        && let Some((rows, width)) = rows_of(dims)
        && rows > 0
    {
        // Rows run straight on the member's parameters.
        let input = |rows: usize, values: &[T]| {
            floats_of(&from_rows(port, rows, width, values).unwrap_or_else(|e| error::raise_model(e)))
        };
        // One by one where the graph declares another number of rows.
        let input = match port.shape.first() {
            Some(Dim::Fixed(n)) if *n != rows as u64 => {
                values.chunks_exact(width.max(1)).flat_map(|row| input(1, row)).collect()
            }
            _ => input(rows, values),
        };
        let out = set.predict_one(member, &input);
        let width = out.len() / rows;
        return if dims.len() < 2 { array::from_f32(&[width], &out) } else { array::from_f32(&[rows, width], &out) };
    }
    let model = model_of(spec);
    let plan = &model.plan;
    let port = only_input(plan, spec);
    let Some((rows, width)) = rows_of(dims) else {
        error::raise(
            PgSqlErrorCode::ERRCODE_ARRAY_ELEMENT_ERROR,
            format!("input of predict has {} dimensions", dims.len()),
            "One dimension is a row, two are several rows.",
            "Flatten each row, or give the input as jsonb in the tensor's own shape.",
        )
    };
    let predict = |rows: usize, values: &[T]| {
        let input = from_rows(port, rows, width, values).unwrap_or_else(|e| error::raise_model(e));
        let outputs = run(&model, vec![(port.name.clone(), input)], rows as u64);
        let Some((_, first)) = outputs.first() else {
            error::not_supported("the model has no output", "Load a model with at least one output.")
        };
        to_rows_f32(first, rows).unwrap_or_else(|e| error::raise_model(e))
    };
    if dims.len() < 2 {
        let (_, out) = predict(1, values);
        return array::from_f32(&[out.len()], &out);
    }
    let whole_batch = matches!(port.shape.first(), Some(Dim::Fixed(n)) if *n == rows as u64);
    if plan.batch_is_free() || whole_batch {
        let (out_width, out) = predict(rows, values);
        return array::from_f32(&[rows, out_width], &out);
    }
    // Any other model takes one row at a time.
    let (mut out, mut out_width) = (Vec::new(), 0);
    for row in values.chunks_exact(width.max(1)) {
        let (w, mut values) = predict(1, row);
        if !out.is_empty() && w != out_width {
            error::raise(
                PgSqlErrorCode::ERRCODE_ARRAY_ELEMENT_ERROR,
                "the rows' outputs differ in length and make no array",
                &format!("One has {out_width} values, another {w}."),
                "Predict row by row.",
            );
        }
        out_width = w;
        out.append(&mut values);
    }
    array::from_f32(&[rows, out_width], &out)
}

fn predict_array<T: Element + array::Fixed>(call: &Call) -> pg_sys::Datum {
    let spec: &str = call.need(0, "model");
    let Some(datum) = call.datum(1) else { return call.null() };
    array::with_elements::<T, _>(datum, |dims, values| predict_rows(spec, dims, values))
}

fn predict_real(call: &Call) -> pg_sys::Datum {
    predict_array::<f32>(call)
}

fn predict_double(call: &Call) -> pg_sys::Datum {
    predict_array::<f64>(call)
}

fn predict_integer(call: &Call) -> pg_sys::Datum {
    predict_array::<i32>(call)
}

fn predict_bigint(call: &Call) -> pg_sys::Datum {
    predict_array::<i64>(call)
}

/// Takes what has no type: an array literal such as `'{1,2}'`.
fn predict_text(call: &Call) -> pg_sys::Datum {
    let spec: &str = call.need(0, "model");
    let text: &str = call.need(1, "input");
    let trimmed = text.trim_start();
    let inner = trimmed.strip_prefix('{').unwrap_or(trimmed).trim_start();
    if !trimmed.starts_with('{') || inner.starts_with('"') && inner.contains(':') {
        error::raise(
            PgSqlErrorCode::ERRCODE_INVALID_TEXT_REPRESENTATION,
            "input of predict is no array literal",
            "A value without a type is read as an array of numbers.",
            "Write '{1,2,3}' for one row, '{{1,2},{3,4}}' for several, or cast to jsonb for named inputs.",
        );
    }
    array::with_elements::<f64, _>(array::parse_f64(text), |dims, values| predict_rows(spec, dims, values))
}

/// A jsonb argument. Its numbers can be larger than any float, which is the caller's error and not one of the server.
fn json_argument(call: &Call, n: usize) -> serde_json::Value {
    // SAFETY: the SQL declaration says that the argument is a jsonb.
    let text: Option<&CStr> = unsafe { pgrx::direct_function_call(pg_sys::jsonb_out, &[call.datum(n)]) };
    serde_json::from_slice(text.unwrap_or_default().to_bytes()).unwrap_or_else(|e| {
        error::raise(
            PgSqlErrorCode::ERRCODE_NUMERIC_VALUE_OUT_OF_RANGE,
            "inputs of predict cannot be read",
            &format!("{e}."),
            "Give numbers that a double precision value can hold, nested at most 128 deep.",
        )
    })
}

fn predict_jsonb(call: &Call) -> pg_sys::Datum {
    let spec: &str = call.need(0, "model");
    let model = model_of(spec);
    let inputs = json_argument(call, 1);
    let inputs = json::inputs_from_json(model.plan.signature(), &inputs).unwrap_or_else(|e| error::raise_model(e));
    let first = inputs.first().and_then(|(_, tensor)| tensor.shape.first().copied());
    let rows = first.filter(|_| model.plan.batch_is_free()).unwrap_or(1);
    let outputs = run(&model, inputs, rows as u64);
    let value = json::outputs_to_json(&outputs).unwrap_or_else(|e| error::raise_model(e));
    pgrx::JsonB(value).into_datum().unwrap_or_else(|| varlena_datum(&[]))
}
