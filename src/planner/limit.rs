//! LIMIT: a node directly below one fetches no row that is not asked for.
//!
//! PostgreSQL tells some nodes how many rows a LIMIT wants of them (`ExecSetTupleBound`, execProcnode.c), extensions' nodes are
//! not among them. Here the LIMIT's expressions become part of the node: so it also holds in workers.

use super::build::is_ours;
use super::tree;
use crate::pg::nodes::{self, Node};
use pgrx::pg_sys::{self, NodeTag, Plan};

/// Tells the nodes below a LIMIT how many rows it will take.
///
/// # Safety
/// `limit` is part of a finished plan, with the nodes below in place.
pub unsafe fn hand_down(limit: *mut pg_sys::Limit) {
    // SAFETY: by the contract.
    unsafe {
        // WITH TIES takes more rows than the number says.
        if (*limit).limitOption != pg_sys::LimitOption::LIMIT_OPTION_COUNT || (*limit).limitCount.is_null() {
            return;
        }
        let ends = [(*limit).limitCount, (*limit).limitOffset];
        let ends: Vec<*mut Node> = ends.into_iter().filter(|end| !end.is_null()).collect();
        if ends.iter().all(|end| is_fixed(*end)) {
            bound((*limit).plan.lefttree, &ends);
        }
    }
}

/// True if the expression has the same value whenever it is evaluated.
///
/// # Safety
/// `node` is an expression.
unsafe fn is_fixed(node: *mut Node) -> bool {
    // SAFETY: by the contract.
    unsafe fn varies(node: *mut Node) -> bool {
        unsafe {
            nodes::cast::<pg_sys::Param>(node, NodeTag::T_Param)
                .is_some_and(|param| (*param).paramkind != pg_sys::ParamKind::PARAM_EXTERN)
                || nodes::visit_children(node, &mut |child| varies(child))
        }
    }
    // SAFETY: by the contract.
    unsafe { !varies(node) && !tree::volatile_list(nodes::list([node])) }
}

/// Bounds the nodes of ours that give the plan's rows one for one.
///
/// # Safety
/// `plan` is part of a finished plan, or null.
unsafe fn bound(plan: *mut Plan, ends: &[*mut Node]) {
    // SAFETY: by the contract; the tag says which struct a plan is.
    unsafe {
        if plan.is_null() || !(*plan).qual.is_null() {
            return;
        }
        match nodes::tag(plan) {
            NodeTag::T_CustomScan if is_ours(plan) => {
                let node = plan.cast::<pg_sys::CustomScan>();
                let expressions = nodes::items((*node).custom_exprs).chain(ends.iter().copied());
                (*node).custom_exprs = nodes::list::<Node>(expressions);
            }
            NodeTag::T_Result
            | NodeTag::T_SubqueryScan
            | NodeTag::T_Append
            | NodeTag::T_MergeAppend
            | NodeTag::T_Gather
            | NodeTag::T_GatherMerge => {}
            _ => return,
        }
        tree::change_children(plan, &mut |child| {
            bound(child, ends);
            child
        });
    }
}
