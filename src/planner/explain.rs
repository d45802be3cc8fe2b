//! What EXPLAIN shows of the node.

use super::scan::Scan;
use crate::catalog;
use crate::serving::settings;
use pgrx::pg_sys;
use std::ffi::{CStr, CString};

/// Adds the node's properties.
///
/// # Safety
/// `node` is the node of this state, `explain` that of the running EXPLAIN.
pub unsafe fn explain(node: *mut pg_sys::CustomScanState, scan: &mut Scan, explain: *mut pg_sys::ExplainState) {
    // SAFETY: by the contract.
    unsafe {
        let context = (*node).ss.ps.ps_ExprContext;
        let mut models: Vec<String> = Vec::new();
        for call in &mut scan.calls {
            if call.layout.by_row {
                models.push("named by each row".to_owned());
                continue;
            }
            let Some(spec) = call.name_to_show(context) else { continue };
            let name = spec.split('@').next().unwrap_or(spec);
            // auto_explain asks when the query's snapshot may be gone.
            let may_know = pg_sys::ActiveSnapshotSet() && catalog::is_usable(spec);
            let shown = match may_know.then(|| catalog::estimate(spec)).flatten() {
                Some(estimate) => format!("{name}, version {}", estimate.version),
                None => spec.to_owned(),
            };
            let note = if call.is_row_by_row() { ", row by row" } else { "" };
            models.push(format!("{shown}{note}"));
        }
        models.dedup();
        if !models.is_empty() {
            text(c"Model", &models.join("; "), explain);
        }
        integer(c"Batch Size", settings::batch_size() as i64, explain);
        if (*explain).analyze && !(*node).ss.ps.instrument.is_null() {
            let mut done = scan.done;
            done.add(scan.of_workers);
            integer(c"Batches", done.batches as i64, explain);
            integer(c"Rows Predicted", done.rows as i64, explain);
            integer(c"Largest Batch", done.largest as i64, explain);
            integer(c"Cache Hits", done.hits as i64, explain);
            integer(c"Cache Misses", done.misses as i64, explain);
            if (*explain).timing {
                let milliseconds = done.time.as_secs_f64() * 1e3;
                pg_sys::ExplainPropertyFloat(c"Inference Time".as_ptr(), c"ms".as_ptr(), milliseconds, 3, explain);
            }
        }
    }
}

/// # Safety
/// `explain` is that of the running EXPLAIN.
unsafe fn text(label: &CStr, value: &str, explain: *mut pg_sys::ExplainState) {
    let value = CString::new(value).unwrap_or_default();
    // SAFETY: by the contract; strings are copied.
    unsafe { pg_sys::ExplainPropertyText(label.as_ptr(), value.as_ptr(), explain) };
}

/// # Safety
/// `explain` is that of the running EXPLAIN.
unsafe fn integer(label: &CStr, value: i64, explain: *mut pg_sys::ExplainState) {
    // SAFETY: by the contract.
    unsafe { pg_sys::ExplainPropertyInteger(label.as_ptr(), std::ptr::null(), value, explain) };
}
