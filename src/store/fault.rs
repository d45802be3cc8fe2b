//! Faults on purpose, for tests: an ERROR at a named point of a change.
//!
//! Built with the feature `pg_test` only; otherwise a point is nothing.

/// A point at which a test may ask for an ERROR, by `SET tessera_test.fault = 'NAME'`.
#[inline]
pub fn point(_name: &str) {
    #[cfg(any(test, feature = "pg_test"))]
    inject(_name);
}

#[cfg(any(test, feature = "pg_test"))]
fn inject(name: &str) {
    use pgrx::prelude::*;
    // SAFETY: a custom setting, read as a string that lives until the next SET; missing is allowed.
    let wanted = unsafe {
        let value = pgrx::pg_sys::GetConfigOption(c"tessera_test.fault".as_ptr(), true, false);
        if value.is_null() {
            return;
        }
        std::ffi::CStr::from_ptr(value).to_string_lossy().into_owned()
    };
    if wanted == name {
        crate::pg::error::raise(PgSqlErrorCode::ERRCODE_INTERNAL_ERROR, format!("fault at \"{name}\""), "", "");
    }
}
