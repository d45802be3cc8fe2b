//! Which models a role may see.

use super::sets::set_content;
use crate::pg::identity;
use pgrx::prelude::*;
use std::collections::HashMap;

/// `name@version` of the versions with each content hash, and the names of sets, of the models and sets that the current role may predict with.
pub fn visible_contents() -> HashMap<[u8; 32], Vec<String>> {
    let rows = identity::as_extension_owner(|caller| {
        Spi::connect(|client| {
            let table = client.select(
                "SELECT v.content_hash, m.name || '@' || v.version FROM tessera.model m JOIN tessera.model_version v ON v.model = m.id
                 WHERE pg_catalog.has_type_privilege($1, m.domain::oid, 'USAGE') ORDER BY m.name, v.version",
                None,
                &[caller.into()],
            )?;
            let mut rows = Vec::new();
            for row in table {
                rows.push((row.get::<Vec<u8>>(1)?, row.get::<String>(2)?));
            }
            let table = client.select(
                "SELECT s.id, s.domain::oid, s.name FROM tessera.model_set s
                 WHERE pg_catalog.has_type_privilege($1, s.domain::oid, 'USAGE') ORDER BY s.name",
                None,
                &[caller.into()],
            )?;
            for row in table {
                let (id, domain) = (row.get::<i64>(1)?, row.get::<pgrx::pg_sys::Oid>(2)?);
                let content = id.zip(domain).map(|(id, domain)| set_content(id, domain).to_vec());
                rows.push((content, row.get::<String>(3)?));
            }
            Ok::<_, pgrx::spi::Error>(rows)
        })
    });
    let rows = rows.unwrap_or_else(|e| unreadable(&e));
    let mut contents: HashMap<[u8; 32], Vec<String>> = HashMap::new();
    for (hash, name) in rows {
        if let (Some(hash), Some(name)) = (hash.and_then(|hash| hash.try_into().ok()), name) {
            contents.entry(hash).or_default().push(name);
        }
    }
    contents
}

/// The versions of all models (`tessera.model_version.id`) that the active snapshot sees, and whether the current role may
/// predict with each.
pub fn versions() -> Vec<(i64, bool)> {
    let rows = identity::as_extension_owner(|caller| {
        Spi::connect(|client| {
            let table = client.select(
                "SELECT v.id, pg_catalog.has_type_privilege($1, m.domain::oid, 'USAGE')
                 FROM tessera.model m JOIN tessera.model_version v ON v.model = m.id ORDER BY v.id",
                None,
                &[caller.into()],
            )?;
            let mut rows = Vec::new();
            for row in table {
                rows.push((row.get::<i64>(1)?.unwrap_or_default(), row.get::<bool>(2)?.unwrap_or(false)));
            }
            Ok::<_, pgrx::spi::Error>(rows)
        })
    });
    rows.unwrap_or_else(|e| unreadable(&e))
}

fn unreadable(e: &pgrx::spi::Error) -> ! {
    crate::pg::error::raise(
        PgSqlErrorCode::ERRCODE_EXTERNAL_ROUTINE_EXCEPTION,
        "the models of this database cannot be read",
        &e.to_string(),
        "",
    )
}
