//! pg_tessera: PostgreSQL serves the models that live in it.
//!
//! Floors, each using only those below it: `functions` (SQL functions), `catalog` (models in tables), `table_am` (the
//! access method), `cache` (tensor blocks in memory), `store` (the block store in pages), `pg` (guards over `pg_sys`). See docs/architecture.md.

use pgrx::prelude::*;

mod cache;
mod catalog;
mod functions;
mod pg;
mod planner;
mod serving;
mod store;
mod table_am;

::pgrx::pg_module_magic!(name, version);

/// Runs when the library is loaded: by `shared_preload_libraries`, or by the first function that needs it.
#[pg_guard]
pub extern "C-unwind" fn _PG_init() {
    pg::snapshot::init();
    cache::init();
    serving::settings::init();
    planner::init();
}

extension_sql_file!("../sql/block_type.sql", name = "block_type", bootstrap);
extension_sql_file!("../sql/access_method.sql", name = "access_method", requires = ["block_type"]);
extension_sql_file!("../sql/catalog.sql", name = "catalog", requires = ["access_method"]);
extension_sql_file!("../sql/functions.sql", name = "functions", requires = ["catalog"]);
extension_sql_file!("../sql/deduplicate.sql", name = "deduplicate", requires = ["functions"]);
extension_sql_file!("../sql/maintenance.sql", name = "maintenance", requires = ["deduplicate"]);
extension_sql_file!("../sql/views.sql", name = "views", requires = ["maintenance"]);
extension_sql_file!("../sql/sets.sql", name = "sets", requires = ["views"]);
extension_sql_file!("../sql/cache.sql", name = "cache", requires = ["sets"], finalize);

/// Required by `cargo pgrx test`.
#[cfg(test)]
pub mod pg_test {
    /// Called once before the tests.
    pub fn setup(_options: Vec<&str>) {}

    /// Settings of the tests' server.
    #[must_use]
    pub fn postgresql_conf_options() -> Vec<&'static str> {
        vec!["shared_preload_libraries = 'pg_tessera'"]
    }
}
