//! Members as ONNX files again.

use super::train;
use crate::catalog::sets;
use crate::pg::error;
use crate::pg::fmgr::{Call, next_row, sql_functions_of_users_code, varlena_datum, varlena_with};
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
    recovered_value(&set, found, member, &mut Reader::default())
}

/// Members that are still to be recovered.
struct Left {
    set: Rc<OpenSet>,
    members: std::vec::IntoIter<(Member, String)>,
    reader: Reader,
}

fn recover_model_set(call: &Call) -> pg_sys::Datum {
    let begin = || {
        let set = set_of(call.need(0, "set_name"));
        // In the order in which they are stored, so that each block is read about once.
        let mut members: Vec<_> = set.members().collect();
        members.sort_by_cached_key(|(member, _)| {
            (set.places(*member).first().map(|place| (place.block, place.at)), *member)
        });
        Left { set, members: members.into_iter(), reader: Reader::default() }
    };
    next_row(call, begin, |left| {
        crate::pg::interrupt::check();
        let (member, name) = left.members.next()?;
        let model = recovered_value(&left.set, member, &name, &mut left.reader);
        Some([name.into_datum(), Some(model)])
    })
}

/// A member's ONNX file as a bytea, read or trained.
fn recovered_value(set: &Rc<OpenSet>, member: Member, name: &str, reader: &mut Reader) -> pg_sys::Datum {
    match set.recipe(member) {
        Some(recipe) => varlena_datum(&[&train::again(set, name, &recipe, reader)]),
        None => varlena_with(set.model_bytes(), |out| set.write(member, reader, out)),
    }
}

/// A member's ONNX file, read or trained.
pub(super) fn recovered(set: &Rc<OpenSet>, member: Member, name: &str, reader: &mut Reader) -> Vec<u8> {
    match set.recipe(member) {
        Some(recipe) => train::again(set, name, &recipe, reader),
        None => {
            let mut out = vec![0; set.model_bytes()];
            set.write(member, reader, &mut out);
            out
        }
    }
}

/// The member of this name that a set's was made from.
pub(super) fn parent_of(set: &OpenSet) -> Option<Rc<OpenSet>> {
    set.row.based_on.and_then(sets::set_of_id).map(open)
}
