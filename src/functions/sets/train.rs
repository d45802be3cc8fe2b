//! Members that are kept as the way in which they are trained (*provenance*): training, and training again.
//!
//! What is kept of a set: the function, the query, the parameters, the search path; of a member: the content hash of the result, and a
//! fingerprint of the rows that the query gave. Training again runs with the rights of the set's owner, as a materialized view is
//! refreshed with those of its own.

use super::members::{Making, Plan};
use super::placeholder;
use super::recover::{parent_of, recovered};
use super::save::{begin, check_same, strip};
use crate::catalog::sets::{self, Storage};
use crate::functions::load::content_hash;
use crate::pg::fmgr::{Call, missing, sql_functions_of_users_code};
use crate::pg::progress::{Activity, Work};
use crate::pg::query::{self, Calls};
use crate::pg::{error, identity};
use crate::serving::sets::{OpenSet, Reader, Shared};
use pgrx::pg_sys;
use pgrx::prelude::*;
use serde::{Deserialize, Serialize};
use std::ffi::CString;
use std::rc::Rc;
use tensor_blocks::members::Recipe;

sql_functions_of_users_code!(train_model_set);

/// How the members of a set are trained.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Training {
    /// Qualified name of the function.
    function: String,
    /// The query, in which `$1` is the member's name.
    data: String,
    params: serde_json::Value,
    search_path: String,
}

fn train_model_set(call: &Call) -> pg_sys::Datum {
    let (name, based_on): (&str, &str) = (call.need(0, "set_name"), call.need(1, "based_on"));
    let (function, data): (&str, &str) = (call.need(2, "training"), call.need(3, "data"));
    let params = call.get::<pgrx::JsonB>(4).unwrap_or_else(|| missing("params")).0;
    let verify: bool = call.need(6, "verify");
    let Some(parent) = begin(name, Some(based_on)) else { missing("based_on") };
    let wanted: Vec<String> = match call.get::<Vec<Option<String>>>(5) {
        Some(names) => names.into_iter().map(|name| name.unwrap_or_else(|| missing("members"))).collect(),
        None => parent.members().map(|(_, name)| name).collect(),
    };
    let training =
        Training { function: qualified(function), data: data.to_owned(), params, search_path: search_path() };
    filled(&training, "");
    let _activity = Activity::begin(Work::Load, None);
    let mut making = Making::begin(Plan {
        name,
        storage: Storage::Provenance,
        parent: Some(parent.clone()),
        shared: parent.shared.clone(),
        signature: sets::architecture(parent.row.architecture).signature,
        training: Some(serde_json::to_value(&training).unwrap_or_default()),
    });
    let (mut reader, path) = (Reader::default(), path_of(&training));
    for member in &wanted {
        crate::pg::interrupt::check();
        let found = parent.need(member);
        let base = recovered(&parent, found, member, &mut reader);
        // As it will be when the member is recovered, so that what is not allowed then fails now.
        let recipe =
            identity::as_role(identity::current_user(), &path, |_| train(&training, &parent, member, &base, verify));
        making.add_recipe(member, parent.places(found), recipe);
    }
    making.finish();
    pg_sys::Datum::from(wanted.len() as i64)
}

/// Trains a member, for the first time.
fn train(training: &Training, parent: &OpenSet, member: &str, base: &[u8], verify: bool) -> Recipe {
    let data = fingerprint(training, member);
    let content = content_of(&parent.shared, &run(training, member, base), member);
    if verify {
        let again = content_of(&parent.shared, &run(training, member, base), member);
        if again != content || fingerprint(training, member) != data {
            error::raise(
                PgSqlErrorCode::ERRCODE_EXTERNAL_ROUTINE_INVOCATION_EXCEPTION,
                format!("training member \"{member}\" twice gives two models"),
                "The function, or the order of the query's rows, is not deterministic, so the member could not be trained again.",
                "Use a fixed seed and ORDER BY, or save the trained members with save_model_set.",
            );
        }
    }
    Recipe { content, data }
}

fn path_of(training: &Training) -> CString {
    CString::new(temporary_last(&training.search_path)).unwrap_or_default()
}

/// Trains a member again, and makes sure that it comes out as it did.
pub(super) fn again(set: &Rc<OpenSet>, member: &str, recipe: &Recipe, reader: &mut Reader) -> Vec<u8> {
    let json = set.row.training.clone().unwrap_or_default();
    let training: Training = serde_json::from_value(json).unwrap_or_else(|e| {
        error::raise(
            PgSqlErrorCode::ERRCODE_DATA_CORRUPTED,
            format!("how the members of model set \"{}\" are trained cannot be read", set.row.name),
            &format!("{e}."),
            "Restore the tables of pg_tessera from a backup.",
        )
    });
    let Some(parent) = parent_of(set) else {
        error::raise(
            PgSqlErrorCode::ERRCODE_INSUFFICIENT_PRIVILEGE,
            format!("permission denied for the model set that \"{}\" is trained from", set.row.name),
            "Its members are trained from those of another set, which this role may not use.",
            "Ask that set's owner to grant USAGE on its domain.",
        )
    };
    let base = recovered(&parent, parent.need(member), member, reader);
    if recipe.is_inherited() {
        return base;
    }
    let owner = owner_of(set);
    check_temporary(set, owner);
    identity::as_role(owner, &path_of(&training), |_| {
        if fingerprint(&training, member) != recipe.data {
            changed(
                set,
                member,
                "The rows that the query of its training data gives are not those that it was trained with.",
            );
        }
        let model = run(&training, member, &base);
        if content_of(&set.shared, &model, member) != recipe.content {
            changed(
                set,
                member,
                "The training data are the same, but training gives another model: the function or what it uses has changed.",
            );
        }
        model
    })
}

/// The search path with the session's temporary tables last, which come first where it does not say where.
fn temporary_last(path: &str) -> String {
    match path.trim() {
        "" => "pg_temp".to_owned(),
        path if path.split(',').any(|part| part.trim() == "pg_temp") => path.to_owned(),
        path => format!("{path}, pg_temp"),
    }
}

/// Raises an ERROR if the session has temporary tables, types or functions of a role without the rights of the set's owner: its
/// query, or the training function, could take them for its own, and run what is in them with the owner's rights.
fn check_temporary(set: &OpenSet, owner: pg_sys::Oid) {
    const FOREIGN: &str = "SELECT pg_my_temp_schema() <> 0 AND EXISTS (
        SELECT FROM (SELECT relnamespace, relowner FROM pg_class UNION ALL SELECT typnamespace, typowner FROM pg_type
                     UNION ALL SELECT pronamespace, proowner FROM pg_proc) o (namespace, owner)
        WHERE namespace = pg_my_temp_schema() AND NOT pg_has_role(owner, $1, 'USAGE'))";
    // Not with the caller's search path, whose operators could answer otherwise.
    let foreign = identity::as_extension_owner(|_| Spi::get_one_with_args::<bool>(FOREIGN, &[owner.into()]));
    if !matches!(foreign, Ok(Some(false))) {
        error::raise(
            PgSqlErrorCode::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE,
            format!(
                "members of model set \"{}\" cannot be trained where there are temporary tables of others",
                set.row.name
            ),
            "They are trained with the rights of the set's owner, whose query must not find tables, views, types or functions that another role has put in the way.",
            "Recover them in another session, or DISCARD TEMP first.",
        );
    }
}

fn changed(set: &OpenSet, member: &str, detail: &str) -> ! {
    error::raise(
        PgSqlErrorCode::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE,
        format!("member \"{member}\" of model set \"{}\" cannot be recovered", set.row.name),
        detail,
        "Bring the data and the training function back to what they were when the set was saved.",
    )
}

fn owner_of(set: &OpenSet) -> pg_sys::Oid {
    // Not with the caller's search path, whose operators could find another.
    let query = "SELECT typowner FROM pg_type WHERE oid = $1";
    let owner =
        identity::as_extension_owner(|_| Spi::get_one_with_args::<pg_sys::Oid>(query, &[set.row.domain().into()]));
    owner.ok().flatten().unwrap_or_else(identity::current_user)
}

fn search_path() -> String {
    Spi::get_one::<String>("SELECT pg_catalog.current_setting('search_path')").ok().flatten().unwrap_or_default()
}

/// The qualified name of the training function. ERROR if there is none of that name with the right arguments and result.
fn qualified(function: &str) -> String {
    let query = "SELECT pg_catalog.format('%I.%I', n.nspname, p.proname), p.prorettype = 'bytea'::regtype AND NOT p.proretset AND p.prokind = 'f',
                        n.oid = pg_catalog.pg_my_temp_schema()
                 FROM pg_catalog.pg_proc p JOIN pg_catalog.pg_namespace n ON n.oid = p.pronamespace
                 WHERE p.oid = pg_catalog.to_regprocedure($1 || '(pg_catalog.bytea, pg_catalog.text, pg_catalog.jsonb)')";
    let found = Spi::get_three_with_args::<String, bool, bool>(query, &[function.into()]);
    match found {
        // Another session has other functions under that name.
        Ok((_, _, Some(true))) => error::raise(
            PgSqlErrorCode::ERRCODE_INVALID_OBJECT_DEFINITION,
            format!("training function {function} is temporary"),
            "The members could not be trained again in another session.",
            "Create the function in a schema that stays.",
        ),
        Ok((Some(name), Some(true), _)) => name,
        _ => error::raise(
            PgSqlErrorCode::ERRCODE_UNDEFINED_FUNCTION,
            format!("training function {function}(bytea, text, jsonb) returning bytea does not exist"),
            "",
            "Name a function that takes an ONNX model, a query and parameters, and returns the trained ONNX model; train_feed_forward is one.",
        ),
    }
}

/// The query for a member.
fn filled(training: &Training, member: &str) -> String {
    placeholder::fill(&training.data, &pgrx::spi::quote_literal(member)).unwrap_or_else(|| {
        error::raise(
            PgSqlErrorCode::ERRCODE_SYNTAX_ERROR,
            "the query of the training data cannot be read",
            "It ends within a string or a comment, or has another parameter than $1.",
            "Write one SELECT in which $1 stands for the member's name.",
        )
    })
}

/// Calls the training function for a member.
fn run(training: &Training, member: &str, base: &[u8]) -> Vec<u8> {
    let query = format!("SELECT {}($1, $2, $3)", training.function);
    let arguments =
        [base.to_vec().into(), filled(training, member).into(), pgrx::JsonB(training.params.clone()).into()];
    let result = Spi::connect_mut(|client| {
        let table = client.update(&query, Some(1), &arguments)?;
        table.first().get_one::<Vec<u8>>()
    });
    match result {
        Ok(Some(model)) => model,
        Ok(None) => error::raise(
            PgSqlErrorCode::ERRCODE_NULL_VALUE_NOT_ALLOWED,
            format!("training member \"{member}\" gives null"),
            "",
            "A training function returns the trained ONNX model.",
        ),
        Err(e) => error::raise(
            PgSqlErrorCode::ERRCODE_EXTERNAL_ROUTINE_EXCEPTION,
            format!("member \"{member}\" cannot be trained"),
            &format!("{e}."),
            "",
        ),
    }
}

/// Identity of a trained member. ERROR if it is no member of the architecture.
fn content_of(shared: &Shared, model: &[u8], member: &str) -> [u8; 32] {
    let stripped = strip(model, member);
    check_same(shared, &stripped, member);
    content_hash(&shared.graph_hash, &stripped.tensors)
}

/// Identity of the rows that the query gives for a member, in their order: their columns in binary form, as COPY has them.
fn fingerprint(training: &Training, member: &str) -> [u8; 32] {
    let hasher = blake3::Hasher::new_derive_key("pg_tessera training data v1");
    let state = std::cell::RefCell::new((hasher, Vec::new()));
    query::select(
        &filled(training, member),
        "training data",
        Calls::Any,
        |columns| state.borrow_mut().1 = columns.iter().map(|column| sender(column.type_oid)).collect(),
        |row| {
            let (hasher, senders) = &mut *state.borrow_mut();
            add_row(hasher, senders, row)
        },
    );
    let (hasher, _) = state.into_inner();
    *hasher.finalize().as_bytes()
}

/// Adds a row to the fingerprint; its bytes.
fn add_row(hasher: &mut blake3::Hasher, senders: &[pg_sys::Oid], row: &[Option<pg_sys::Datum>]) -> usize {
    let mut count = 0;
    for (value, &sender) in row.iter().zip(senders) {
        match *value {
            None => {
                hasher.update(&(-1i32).to_le_bytes());
            }
            // SAFETY: the send function of the column's type; its result is a palloc'd bytea.
            Some(datum) => unsafe {
                let sent = pg_sys::OidSendFunctionCall(sender, datum);
                let bytes = crate::pg::varlena::payload(sent.cast());
                hasher.update(&(bytes.len() as i32).to_le_bytes()).update(bytes);
                count += bytes.len();
            },
        }
    }
    count
}

/// The function that gives values of a type in binary form. ERROR if it has none.
fn sender(type_oid: pg_sys::Oid) -> pg_sys::Oid {
    let (mut function, mut varlena) = (pg_sys::InvalidOid, false);
    // SAFETY: a syscache look-up that raises an ERROR for types that cannot be sent.
    unsafe { pg_sys::getTypeBinaryOutputInfo(type_oid, &mut function, &mut varlena) };
    function
}
