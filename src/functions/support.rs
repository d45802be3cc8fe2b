//! What the planner is told of `predict`.

use crate::catalog;
use crate::pg::fmgr::{Call, sql_functions};
use crate::pg::nodes;
use pgrx::pg_sys::{self, NodeTag};
use pgrx::prelude::*;

sql_functions!(predict_support);

/// Nanoseconds of a row beside the model's arithmetic.
const ROW: f64 = 150.0;
/// Floating-point operations of a nanosecond, in batches.
const SPEED: f64 = 30.0;
/// Nanoseconds of a unit of cost: what a scan of cached pages takes, by its default costs.
const UNIT: f64 = 3_000.0;
/// Of a model that is not known while planning.
const UNKNOWN: f64 = 10_000.0;

/// Support function of `predict`: its cost, from the model's floating-point operations.
fn predict_support(call: &Call) -> pg_sys::Datum {
    let nothing = pg_sys::Datum::from(0);
    let Some(request) = call.datum(0) else { return nothing };
    // SAFETY: the planner passes a node, of which the tag says which one.
    unsafe {
        let request = request.cast_mut_ptr::<nodes::Node>();
        let Some(cost) = nodes::cast::<pg_sys::SupportRequestCost>(request, NodeTag::T_SupportRequestCost) else {
            return nothing;
        };
        let nanoseconds = match flops((*cost).node) {
            Some(flops) => ROW + flops / SPEED,
            None => UNKNOWN,
        };
        (*cost).startup = 0.0;
        (*cost).per_tuple = nanoseconds / UNIT;
        pg_sys::Datum::from(cost)
    }
}

/// Operations of a row of the model that a call names by a constant.
///
/// # Safety
/// `call` is a node or null.
unsafe fn flops(call: *mut nodes::Node) -> Option<f64> {
    // SAFETY: by the contract; a constant of the first argument is a text.
    unsafe {
        let call = nodes::cast::<pg_sys::FuncExpr>(call, NodeTag::T_FuncExpr)?;
        let model = nodes::items::<nodes::Node>((*call).args).next()?;
        let model = nodes::cast::<pg_sys::Const>(model, NodeTag::T_Const)?;
        let spec = String::from_datum((*model).constvalue, (*model).constisnull)?;
        let may_know = pg_sys::ActiveSnapshotSet() && catalog::is_usable(&spec);
        may_know.then(|| catalog::estimate(&spec))??.flops_per_row
    }
}
