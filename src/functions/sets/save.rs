//! Saving sets whose members a query gives.

use super::check_set_name;
use super::members::{Making, Plan};
use crate::catalog::sets::{self, Storage};
use crate::functions::load::describe;
use crate::pg::fmgr::{Call, sql_functions_of_users_code};
use crate::pg::progress::{Activity, Work};
use crate::pg::query::{self, Calls, Column};
use crate::pg::value::type_name;
use crate::pg::{array, error, interrupt, varlena};
use crate::serving;
use crate::serving::sets::{OpenSet, Shared, set_of};
use inference::error::ModelError;
use inference::onnx::{self, NoExternalData, StoredTensor, Stripped};
use pgrx::pg_sys;
use pgrx::prelude::*;
use std::borrow::Cow;
use std::cell::Cell;
use std::ops::Range;
use std::rc::Rc;
use tensor_blocks::DType;

sql_functions_of_users_code!(save_model_set, load_model_set);

fn save_model_set(call: &Call) -> pg_sys::Datum {
    let (name, members): (&str, &str) = (call.need(0, "set_name"), call.need(1, "members"));
    let parent = begin(name, call.get(2));
    let _activity = Activity::begin(Work::Load, None);
    let mut making: Option<Making> = None;
    let mut form: Option<Form> = None;
    let check = |columns: &[Column]| check_columns(columns, &[pg_sys::BYTEAOID], "(name text, model bytea)");
    query::select(members, "members", Calls::Any, check, |row| {
        let member = name_of(row);
        let Some(model) = row[1] else { null_of(&member, "model") };
        let mut add = |model: &[u8]| {
            if let (Some(form), Some(making)) = (&form, &mut making)
                && form.fits(model)
            {
                making.add(&member, |tensor| &model[form.tensors[tensor].clone()]);
                return model.len();
            }
            let stripped = strip(model, &member);
            let making = making.get_or_insert_with(|| start(name, parent.clone(), &stripped, &member));
            check_same(&making.shared, &stripped, &member);
            making.add(&member, |tensor| &stripped.tensors[tensor].data);
            form = form.take().or_else(|| Form::of(model, &stripped));
            model.len()
        };
        // SAFETY: the column is a bytea.
        unsafe { varlena::with_bytes(model, &mut add) }
    });
    finish(name, parent, making)
}

fn load_model_set(call: &Call) -> pg_sys::Datum {
    let (name, parameters): (&str, &str) = (call.need(0, "set_name"), call.need(2, "parameters"));
    let Some(model) = call.bytes(1) else { crate::pg::fmgr::missing("architecture") };
    let parent = begin(name, call.get(3));
    let _activity = Activity::begin(Work::Load, None);
    let stripped = strip(model, "architecture");
    let mut making = start(name, parent.clone(), &stripped, "architecture");
    check_same(&making.shared, &stripped, "architecture");
    let float32 = making.shared.tensors.iter().all(|tensor| tensor.dtype == DType::Float32);
    // The type is known before the first row.
    let in_array = Cell::new(false);
    let check = |columns: &[Column]| {
        let kinds = [pg_sys::BYTEAOID, pg_sys::FLOAT4ARRAYOID];
        check_columns(columns, &kinds, "(name text, parameters real[] or bytea)");
        in_array.set(columns[1].type_oid == pg_sys::FLOAT4ARRAYOID);
        if in_array.get() && !float32 {
            error::raise(
                PgSqlErrorCode::ERRCODE_DATATYPE_MISMATCH,
                "parameters of this architecture are not all float32",
                "",
                "Give them as bytea: the tensors' little-endian bytes, one behind the other.",
            );
        }
    };
    query::select(parameters, "parameters", Calls::Any, check, |row| {
        let member = name_of(row);
        let Some(run) = row[1] else { null_of(&member, "parameters") };
        let mut add = |run: &[u8]| {
            add_run(&mut making, &member, run);
            run.len()
        };
        if in_array.get() {
            return array::with_elements::<f32, _>(run, |_, values| add(bytemuck::cast_slice(values)));
        }
        // SAFETY: the column is a bytea.
        unsafe { varlena::with_bytes(run, &mut add) }
    });
    finish(name, parent, Some(making))
}

/// A member's file: files that differ from it in the tensors' bytes only need not be read as ONNX.
struct Form {
    model: Vec<u8>,
    /// Where the tensors lie, by ordinal.
    tensors: Vec<Range<usize>>,
    /// What lies between them, ascending.
    between: Vec<Range<usize>>,
}

impl Form {
    /// Of a file whose tensors lie in it as they are; none for another one.
    fn of(model: &[u8], stripped: &Stripped<'_>) -> Option<Form> {
        let place = |tensor: &StoredTensor<'_>| {
            let Cow::Borrowed(data) = tensor.data else { return None };
            let from = (data.as_ptr() as usize).checked_sub(model.as_ptr() as usize)?;
            // What is empty lies nowhere.
            let from = if data.is_empty() { 0 } else { from };
            (from + data.len() <= model.len()).then_some(from..from + data.len())
        };
        let tensors: Vec<Range<usize>> = stripped.tensors.iter().map(place).collect::<Option<_>>()?;
        let mut taken: Vec<Range<usize>> = tensors.iter().filter(|range| !range.is_empty()).cloned().collect();
        taken.sort_by_key(|range| range.start);
        let (mut between, mut end) = (Vec::new(), 0);
        for range in taken {
            if range.start < end {
                return None;
            }
            between.push(end..range.start);
            end = range.end;
        }
        between.push(end..model.len());
        Some(Form { model: model.to_vec(), tensors, between })
    }

    fn fits(&self, model: &[u8]) -> bool {
        model.len() == self.model.len()
            && self.between.iter().all(|range| model[range.clone()] == self.model[range.clone()])
    }
}

/// Adds a member whose tensors lie one behind the other.
fn add_run(making: &mut Making, member: &str, run: &[u8]) {
    let mut starts = vec![0usize];
    for tensor in &making.shared.tensors {
        starts.push(starts.last().copied().unwrap_or(0) + tensor.bytes as usize);
    }
    let bytes = starts.last().copied().unwrap_or(0);
    if run.len() != bytes {
        error::raise(
            PgSqlErrorCode::ERRCODE_INVALID_PARAMETER_VALUE,
            format!("member \"{member}\" has {} bytes of parameters where the architecture has {bytes}", run.len()),
            "",
            "Give all tensors one behind the other, in the order of the architecture's initializers.",
        );
    }
    making.add(member, |tensor| &run[starts[tensor]..starts[tensor + 1]]);
}

/// Checks and locks the name; the set that it is based on.
pub(super) fn begin(name: &str, based_on: Option<&str>) -> Option<Rc<OpenSet>> {
    check_set_name(name);
    query::need_writable(c"a function that saves a model set");
    sets::lock_set_name(name);
    based_on.map(set_of)
}

/// Makes the set with what the first member shows of the architecture. Compiling it is the check that it can be run.
fn start(name: &str, parent: Option<Rc<OpenSet>>, stripped: &Stripped<'_>, member: &str) -> Making {
    let graph_hash = *blake3::hash(&stripped.graph).as_bytes();
    let signature = match sets::signature_of_graph(&graph_hash) {
        Some(signature) => signature,
        None => {
            let mut fetch = |ordinal: u32, out: &mut Vec<u8>| {
                let tensor = stripped.tensors.get(ordinal as usize);
                let tensor =
                    tensor.ok_or_else(|| ModelError::internal(format!("tensor {ordinal} was not stripped")))?;
                out.extend_from_slice(&tensor.data);
                Ok(())
            };
            let plan = serving::compile(&stripped.graph, &mut fetch, &[]);
            let mut signature = describe(&plan);
            if let Some(fields) = signature.as_object_mut() {
                let elements: u64 = stripped.tensors.iter().map(|tensor| tensor.dims.iter().product::<u64>()).sum();
                fields.insert("parameters".into(), elements.into());
                fields.insert("parameter_bytes".into(), parameter_bytes(&stripped.tensors).into());
            }
            signature
        }
    };
    let shared = match &parent {
        Some(parent) => parent.shared.clone(),
        None => Rc::new(Shared::of_graph(stripped.graph.clone(), graph_hash, &signature)),
    };
    check_same(&shared, stripped, member);
    let storage = if parent.is_some() { Storage::Update } else { Storage::Baseline };
    Making::begin(Plan { name, storage, parent, shared, signature, training: None })
}

fn parameter_bytes(tensors: &[StoredTensor<'_>]) -> u64 {
    tensors.iter().map(|tensor| tensor.data.len() as u64).sum()
}

fn finish(name: &str, parent: Option<Rc<OpenSet>>, making: Option<Making>) -> pg_sys::Datum {
    let making = making.unwrap_or_else(|| match parent {
        // Nothing has changed since.
        Some(parent) => {
            let signature = sets::architecture(parent.row.architecture).signature;
            let shared = parent.shared.clone();
            Making::begin(Plan {
                name,
                storage: Storage::Update,
                parent: Some(parent),
                shared,
                signature,
                training: None,
            })
        }
        None => error::raise(
            PgSqlErrorCode::ERRCODE_NO_DATA_FOUND,
            "the query gives no member",
            "A set has at least one.",
            "Give a query with a row for each member.",
        ),
    });
    pg_sys::Datum::from(making.finish())
}

/// Divides a member's ONNX file.
pub(super) fn strip<'a>(model: &'a [u8], member: &str) -> Stripped<'a> {
    let mut check = || {
        interrupt::check();
        Ok(())
    };
    onnx::strip(model, &mut NoExternalData, &mut check).unwrap_or_else(|mut e| {
        let what = format!("Member \"{member}\".");
        e.detail = Some(e.detail.map_or(what.clone(), |detail| format!("{what} {detail}")));
        error::raise_model(e)
    })
}

/// Raises an ERROR if a member has another graph than the set's architecture.
pub(super) fn check_same(shared: &Shared, stripped: &Stripped<'_>, member: &str) {
    if stripped.graph == shared.graph && stripped.tensors.len() == shared.tensors.len() {
        return;
    }
    let shape = |dims: &[u64]| format!("{dims:?}");
    let detail = if stripped.tensors.len() == shared.tensors.len() {
        let unlike = stripped
            .tensors
            .iter()
            .zip(&shared.tensors)
            .find(|(here, there)| here.dims != there.dims || here.dtype != there.dtype);
        match unlike {
            Some((here, there)) => Cow::Owned(format!(
                "Its tensor \"{}\" is {}{}, and {}{} in the set.",
                here.name,
                here.dtype.name(),
                shape(&here.dims),
                there.dtype.name(),
                shape(&there.dims)
            )),
            None => Cow::Borrowed("Its tensors have the same shapes, but its nodes, names or attributes differ."),
        }
    } else {
        Cow::Owned(format!(
            "It has {} tensors, and the set's members have {}.",
            stripped.tensors.len(),
            shared.tensors.len()
        ))
    };
    error::raise(
        PgSqlErrorCode::ERRCODE_INVALID_PARAMETER_VALUE,
        format!("member \"{member}\" has another architecture than the set"),
        &detail,
        "Members of a set are equal but for their parameters; save others as another set.",
    )
}

fn name_of(row: &[Option<pg_sys::Datum>]) -> String {
    // SAFETY: the column is a text.
    row[0].and_then(|name| unsafe { String::from_datum(name, false) }).unwrap_or_else(|| {
        error::raise(
            PgSqlErrorCode::ERRCODE_NULL_VALUE_NOT_ALLOWED,
            "the name of a member is null",
            "",
            "Give each member a name.",
        )
    })
}

fn null_of(member: &str, what: &str) -> ! {
    error::raise(
        PgSqlErrorCode::ERRCODE_NULL_VALUE_NOT_ALLOWED,
        format!("{what} of member \"{member}\" is null"),
        "",
        "Leave such rows out of the query.",
    )
}

/// Raises an ERROR unless the query gives a name and something of one of these types.
fn check_columns(columns: &[Column], second: &[pg_sys::Oid], wanted: &str) {
    let text = [pg_sys::TEXTOID, pg_sys::VARCHAROID];
    let fits = matches!(columns, [name, value] if text.contains(&name.type_oid) && second.contains(&value.type_oid));
    if fits {
        return;
    }
    let given: Vec<String> =
        columns.iter().map(|column| format!("{} {}", column.name, type_name(column.type_oid))).collect();
    error::raise(
        PgSqlErrorCode::ERRCODE_DATATYPE_MISMATCH,
        "the query's columns do not fit",
        &format!("It gives ({}).", given.join(", ")),
        &format!("Give {wanted}."),
    )
}
