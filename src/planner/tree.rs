//! Plan trees: the children of a node, and what in a subtree must not be evaluated ahead.

use crate::pg::nodes::{self, Node};
use pgrx::pg_sys::{self, NodeTag, Plan};

/// Calls `change` with each child; what it returns takes the child's place.
///
/// # Safety
/// `plan` is a finished plan.
pub unsafe fn change_children(plan: *mut Plan, change: &mut dyn FnMut(*mut Plan) -> *mut Plan) {
    // SAFETY: the tag says which struct a plan is.
    unsafe {
        let mut in_place = |place: &mut *mut Plan| {
            if !place.is_null() {
                *place = change(*place);
            }
        };
        in_place(&mut (*plan).lefttree);
        in_place(&mut (*plan).righttree);
        let many = match nodes::tag(plan) {
            NodeTag::T_Append => (*plan.cast::<pg_sys::Append>()).appendplans,
            NodeTag::T_MergeAppend => (*plan.cast::<pg_sys::MergeAppend>()).mergeplans,
            NodeTag::T_CustomScan => (*plan.cast::<pg_sys::CustomScan>()).custom_plans,
            NodeTag::T_SubqueryScan => {
                in_place(&mut (*plan.cast::<pg_sys::SubqueryScan>()).subplan);
                return;
            }
            _ => return,
        };
        let count = if many.is_null() { 0 } else { (*many).length as usize };
        for at in 0..count {
            let cell = (*many).elements.add(at);
            (*cell).ptr_value = change((*cell).ptr_value.cast()).cast();
        }
    }
}

/// True if the subtree locks rows.
///
/// # Safety
/// `plan` is a finished plan.
pub unsafe fn locks_rows(plan: *mut Plan) -> bool {
    // SAFETY: by the contract.
    unsafe {
        let mut locks = nodes::tag(plan) == NodeTag::T_LockRows;
        change_children(plan, &mut |child| {
            locks |= locks_rows(child);
            child
        });
        locks
    }
}

/// True if evaluating the subtree for more rows than are asked for could be seen: it locks or changes rows, or calls volatile
/// functions, or that is not known. `functions`: whether the query has any volatile functions.
///
/// # Safety
/// `plan` is a finished plan.
pub unsafe fn is_volatile(plan: *mut Plan, functions: bool) -> bool {
    // SAFETY: the tag says which struct a plan is.
    unsafe {
        if let NodeTag::T_LockRows | NodeTag::T_ModifyTable = nodes::tag(plan) {
            return true;
        }
        if !functions {
            let mut volatile = false;
            change_children(plan, &mut |child| {
                volatile |= is_volatile(child, false);
                child
            });
            return volatile;
        }
        if !(*plan).initPlan.is_null() || volatile_list((*plan).targetlist) || volatile_list((*plan).qual) {
            return true;
        }
        let lists: &[*mut pg_sys::List] = match nodes::tag(plan) {
            NodeTag::T_SeqScan
            | NodeTag::T_Sort
            | NodeTag::T_IncrementalSort
            | NodeTag::T_Material
            | NodeTag::T_Memoize
            | NodeTag::T_Hash
            | NodeTag::T_Gather
            | NodeTag::T_GatherMerge
            | NodeTag::T_Append
            | NodeTag::T_MergeAppend
            | NodeTag::T_Agg
            | NodeTag::T_Group
            | NodeTag::T_Unique
            | NodeTag::T_SetOp
            | NodeTag::T_BitmapAnd
            | NodeTag::T_BitmapOr
            | NodeTag::T_ProjectSet
            | NodeTag::T_WorkTableScan
            | NodeTag::T_SubqueryScan => &[],
            NodeTag::T_Result => &[(*plan.cast::<pg_sys::Result>()).resconstantqual.cast()],
            NodeTag::T_IndexScan => &[(*plan.cast::<pg_sys::IndexScan>()).indexqual],
            NodeTag::T_IndexOnlyScan => &[(*plan.cast::<pg_sys::IndexOnlyScan>()).indexqual],
            NodeTag::T_BitmapIndexScan => &[(*plan.cast::<pg_sys::BitmapIndexScan>()).indexqual],
            NodeTag::T_BitmapHeapScan => &[(*plan.cast::<pg_sys::BitmapHeapScan>()).bitmapqualorig],
            NodeTag::T_TidScan => &[(*plan.cast::<pg_sys::TidScan>()).tidquals],
            NodeTag::T_TidRangeScan => &[(*plan.cast::<pg_sys::TidRangeScan>()).tidrangequals],
            NodeTag::T_ValuesScan => &[(*plan.cast::<pg_sys::ValuesScan>()).values_lists],
            NodeTag::T_FunctionScan => &[(*plan.cast::<pg_sys::FunctionScan>()).functions],
            NodeTag::T_NestLoop => &[(*plan.cast::<pg_sys::NestLoop>()).join.joinqual],
            NodeTag::T_MergeJoin => {
                let join = plan.cast::<pg_sys::MergeJoin>();
                &[(*join).join.joinqual, (*join).mergeclauses]
            }
            NodeTag::T_HashJoin => {
                let join = plan.cast::<pg_sys::HashJoin>();
                &[(*join).join.joinqual, (*join).hashclauses]
            }
            NodeTag::T_CustomScan if super::build::is_ours(plan) => {
                &[(*plan.cast::<pg_sys::CustomScan>()).custom_exprs]
            }
            _ => return true,
        };
        if lists.iter().any(|list| volatile_list(*list)) {
            return true;
        }
        let mut volatile = false;
        change_children(plan, &mut |child| {
            volatile |= is_volatile(child, true);
            child
        });
        volatile
    }
}

/// True if an expression of the list is volatile, or has a subplan, of which that is not known.
///
/// # Safety
/// `list` is a list of expressions, or null.
pub unsafe fn volatile_list(list: *mut pg_sys::List) -> bool {
    // SAFETY: by the contract.
    unsafe fn subplan(node: *mut Node) -> bool {
        unsafe {
            matches!(nodes::tag(node), NodeTag::T_SubPlan | NodeTag::T_AlternativeSubPlan)
                || nodes::visit_children(node, &mut |node| subplan(node))
        }
    }
    // SAFETY: by the contract.
    unsafe { !list.is_null() && (pg_sys::contain_volatile_functions(list.cast()) || subplan(list.cast())) }
}
