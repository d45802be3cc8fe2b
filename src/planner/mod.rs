//! Prediction as a part of the query: calls of `predict` are taken out of plans and computed for many rows at a time.
//!
//! Responsible for: the planner hook ([`hook`]), which lets PostgreSQL plan a query as it is and then puts a node above or
//! below those that call `predict` ([`rewrite`], [`build`]); and that node, a CustomScan, at work ([`scan`], [`batch`],
//! [`explain`]).
//!
//! Invariants:
//! - a query gives the same rows with and without the node, and evaluates volatile functions as often and in the same order:
//!   where that is not sure, the plan stays as it is;
//! - an error of a row is raised when that row's turn has come, not before;
//! - which model is meant, and whether its rows may be stacked, is decided when the query runs, so a plan that is kept stays
//!   right when the model changes.

mod batch;
mod build;
mod by_row;
mod calls;
mod explain;
mod hook;
mod layout;
mod limit;
mod rewrite;
mod rows;
mod scan;
mod shared;
mod tree;

/// Called once, when the library is loaded.
pub fn init() {
    calls::init();
    scan::init();
    hook::init();
}
