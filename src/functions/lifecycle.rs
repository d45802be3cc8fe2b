//! Versions and names: activate, rename, drop; export.

use crate::catalog::{self, ModelSpec};
use crate::pg::fmgr::{Call, MAX_ALLOC, sql_functions, varlena_datum};
use crate::pg::large_object::LargeObject;
use crate::pg::{error, interrupt};
use inference::error::ModelError;
use pgrx::pg_sys;
use pgrx::prelude::*;
use std::io::Write;

sql_functions!(
    activate_model,
    rename_model,
    drop_model,
    declare_independent_rows,
    export_model,
    export_model_to_large_object,
    on_sql_drop,
);

fn activate_model(call: &Call) -> pg_sys::Datum {
    let name: &str = call.need(0, "name");
    let spec = ModelSpec::parse(name).with_version(Some(call.need(1, "version")));
    catalog::activate(spec.name, spec.version.expect("given above"));
    pg_sys::Datum::from(0)
}

fn rename_model(call: &Call) -> pg_sys::Datum {
    let (name, new_name): (&str, &str) = (call.need(0, "name"), call.need(1, "new_name"));
    catalog::rename(name, new_name);
    pg_sys::Datum::from(0)
}

fn drop_model(call: &Call) -> pg_sys::Datum {
    let name: &str = call.need(0, "name");
    catalog::drop_model(&ModelSpec::parse(name).with_version(call.get(1)));
    pg_sys::Datum::from(0)
}

fn declare_independent_rows(call: &Call) -> pg_sys::Datum {
    let name: &str = call.need(0, "name");
    catalog::declare_rows(&ModelSpec::parse(name), call.get(1));
    pg_sys::Datum::from(0)
}

/// Event trigger on `sql_drop`: a model goes with its domain, however that was dropped.
fn on_sql_drop(call: &Call) -> pg_sys::Datum {
    // During DROP EXTENSION the tables are gone with the domains.
    if crate::pg::scan::relation_oid(c"tessera", c"weight").is_some() {
        let dropped_domains = crate::pg::identity::as_extension_owner(|_| {
            Spi::get_two::<bool, bool>(
                "WITH gone AS (SELECT objid FROM pg_event_trigger_dropped_objects() WHERE classid = 'pg_type'::regclass)
                 SELECT EXISTS (SELECT FROM tessera.model WHERE domain::oid IN (SELECT objid FROM gone)),
                        EXISTS (SELECT FROM tessera.model_set WHERE domain::oid IN (SELECT objid FROM gone))",
            )
        });
        if let Ok((models, sets)) = dropped_domains {
            if models == Some(true) {
                catalog::drop_orphans();
            }
            if sets == Some(true) {
                catalog::sets::drop_orphan_sets();
            }
        }
    }
    call.null();
    pg_sys::Datum::from(0)
}

/// Writes the ONNX file of the named version to `out`.
fn export(call: &Call, out: &mut dyn Write) {
    let name: &str = call.need(0, "name");
    let version = catalog::resolve(&ModelSpec::parse(name).with_version(call.get(1)));
    let graph = catalog::graph(&version.graph_hash);
    let tensors = catalog::tensors(version.id);
    let mut fetch = |ordinal: u32, bytes: &mut Vec<u8>| {
        interrupt::check();
        let tensor = tensors
            .get(ordinal as usize)
            .ok_or_else(|| ModelError::internal(format!("tensor {ordinal} of the graph is not stored")))?;
        catalog::read_tensor(tensor, bytes);
        Ok(())
    };
    inference::onnx::merge(&graph, &mut fetch, out).unwrap_or_else(|e| error::raise_model(e));
}

fn export_model(call: &Call) -> pg_sys::Datum {
    struct Bounded(Vec<u8>);
    impl Write for Bounded {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            if self.0.len() + bytes.len() > MAX_ALLOC - 64 {
                error::raise(
                    PgSqlErrorCode::ERRCODE_PROGRAM_LIMIT_EXCEEDED,
                    "model is larger than the 1 GB that a bytea can have",
                    "",
                    "Use export_model_to_large_object.",
                );
            }
            self.0.extend_from_slice(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    let mut out = Bounded(Vec::new());
    export(call, &mut out);
    varlena_datum(&[&out.0])
}

fn export_model_to_large_object(call: &Call) -> pg_sys::Datum {
    let mut object = LargeObject::create();
    export(call, &mut object);
    let oid = object.oid();
    pg_sys::Datum::from(oid)
}
