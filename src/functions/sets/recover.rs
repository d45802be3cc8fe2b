//! Members as ONNX files again.

use super::train;
use crate::catalog::sets;
use crate::pg::error;
use crate::pg::fmgr::{Call, MAX_ALLOC, Rows, sql_functions_of_users_code, varlena_datum};
use crate::serving::sets::{Member, OpenSet, Reader, open, set_of};
use pgrx::pg_sys;
use pgrx::prelude::*;
use std::rc::Rc;

sql_functions_of_users_code!(recover_model, recover_model_set);

fn recover_model(call: &Call) -> pg_sys::Datum {
    let spec: &str = call.need(0, "member");
    let Some((set, member)) = sets::split_member(spec) else {
        error::raise(
            PgSqlErrorCode::ERRCODE_INVALID_NAME,
            format!("\"{spec}\" names no member of a model set"),
            "",
            "Write set/member. Models that were loaded by themselves are given back by export_model.",
        )
    };
    let set = set_of(set);
    let found = set.need(member);
    varlena_datum(&[&recovered(&set, found, member, &mut Reader::default())])
}

fn recover_model_set(call: &Call) -> pg_sys::Datum {
    let set = set_of(call.need(0, "set_name"));
    let mut rows = Rows::start(call);
    // In the order in which they are stored, so that each block is read about once.
    let mut members: Vec<_> =
        set.members().map(|(member, name)| (set.places(member).first().copied(), member, name)).collect();
    members.sort_by_key(|(place, member, _)| (place.map(|place| (place.block, place.at)), *member));
    let (mut reader, mut out) = (Reader::default(), Vec::new());
    for (_, member, name) in members {
        crate::pg::interrupt::check();
        recover(&set, member, &name, &mut reader, &mut out);
        let model = varlena_datum(&[&out]);
        rows.push(&[name.into_datum(), Some(model)]);
        // SAFETY: palloc'd just now; the row has a copy.
        unsafe { pg_sys::pfree(model.cast_mut_ptr()) };
    }
    call.null()
}

/// A member's ONNX file, read or trained.
pub(super) fn recovered(set: &Rc<OpenSet>, member: Member, name: &str, reader: &mut Reader) -> Vec<u8> {
    let mut out = Vec::new();
    recover(set, member, name, reader, &mut out);
    out
}

/// The same, in place of what is in `out`.
fn recover(set: &Rc<OpenSet>, member: Member, name: &str, reader: &mut Reader, out: &mut Vec<u8>) {
    match set.recipe(member) {
        Some(recipe) => *out = train::again(set, name, &recipe, reader),
        None => stored(set, member, reader, out),
    }
}

/// A stored member's ONNX file.
fn stored(set: &OpenSet, member: Member, reader: &mut Reader, out: &mut Vec<u8>) {
    set.write(member, reader, out);
    if out.len() > MAX_ALLOC - 64 {
        error::raise(
            PgSqlErrorCode::ERRCODE_PROGRAM_LIMIT_EXCEEDED,
            "model is larger than the 1 GB that a bytea can have",
            "",
            "Models of that size are better loaded each by itself.",
        );
    }
}

/// The member of this name that a set's was made from.
pub(super) fn parent_of(set: &OpenSet) -> Option<Rc<OpenSet>> {
    set.row.based_on.and_then(sets::set_of_id).map(open)
}
