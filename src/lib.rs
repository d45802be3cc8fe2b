//! pg_tessera: PostgreSQL serves the models that live in it.
//!
//! Floors, each using only those below it: `functions` (SQL functions), `catalog` (models in tables), `table_am` (the
//! access method), `store` (the block store in pages), `pg` (guards over `pg_sys`). See docs/architecture.md.

use pgrx::prelude::*;

mod pg;
mod store;
mod table_am;

::pgrx::pg_module_magic!(name, version);

/// Runs when the library is loaded: by `shared_preload_libraries`, or by the first function that needs it.
#[pg_guard]
pub extern "C-unwind" fn _PG_init() {
    pg::snapshot::init();
}

extension_sql_file!("../sql/access_method.sql", name = "access_method");
