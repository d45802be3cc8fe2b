//! The node that computes predictions: from expressions over a child plan to a CustomScan.

use super::calls;
use super::layout::{CallLayout, Layout};
use super::scan;
use crate::pg::nodes::{self, Node};
use pgrx::pg_sys::{self, NodeTag, Plan};

/// Calls in the order in which they are computed: what a call needs comes before it.
#[derive(Default)]
pub struct Calls {
    calls: Vec<*mut Node>,
    /// Where those begin that are collected for the present stage.
    stage: usize,
}

impl Calls {
    /// What is collected from now on is computed after what is there.
    fn begin_stage(&mut self) {
        self.stage = self.calls.len();
    }

    /// Those that evaluating the expression computes in any case, innermost first. A call on which no column of the row has
    /// an influence is none: it costs one run as it is.
    ///
    /// # Safety
    /// `node` is an expression, a list of such, or null.
    pub unsafe fn collect(&mut self, node: *mut Node) {
        // SAFETY: by the contract; the tag says which struct a node is.
        unsafe {
            if node.is_null() {
                return;
            }
            match nodes::tag(node) {
                NodeTag::T_CaseExpr => {
                    let case = node.cast::<pg_sys::CaseExpr>();
                    self.collect((*case).arg.cast());
                    if let Some(first) = nodes::items::<pg_sys::CaseWhen>((*case).args).next() {
                        self.collect((*first).expr.cast());
                    }
                }
                NodeTag::T_CoalesceExpr => self.collect_first((*node.cast::<pg_sys::CoalesceExpr>()).args),
                NodeTag::T_BoolExpr if (*node.cast::<pg_sys::BoolExpr>()).boolop != pg_sys::BoolExprType::NOT_EXPR => {
                    self.collect_first((*node.cast::<pg_sys::BoolExpr>()).args);
                }
                // Not all of it need be evaluated.
                NodeTag::T_RowCompareExpr => {}
                #[cfg(feature = "pg18")]
                NodeTag::T_JsonExpr => {}
                // Evaluated elsewhere, or not for each row.
                NodeTag::T_SubPlan | NodeTag::T_AlternativeSubPlan | NodeTag::T_Aggref | NodeTag::T_WindowFunc => {}
                _ => {
                    nodes::visit_children(node, &mut |child| {
                        self.collect(child);
                        false
                    });
                    if calls::predict(node).is_some() && depends_on_row(node) {
                        self.add(node);
                    }
                }
            }
        }
    }

    /// # Safety
    /// `list` is a list of expressions.
    unsafe fn collect_first(&mut self, list: *mut pg_sys::List) {
        // SAFETY: by the contract.
        unsafe {
            if let Some(first) = nodes::items::<Node>(list).next() {
                self.collect(first);
            }
        }
    }

    /// # Safety
    /// `call` is a call.
    unsafe fn add(&mut self, call: *mut Node) {
        // SAFETY: by the contract.
        unsafe {
            if is_volatile(call) || self.find(call).is_some() {
                return;
            }
            // A call of this stage can have it in a branch that need not be reached, from which it was not collected.
            let place = self.calls[self.stage..].iter().position(|&known| contains(known, call));
            self.calls.insert(place.map_or(self.calls.len(), |place| self.stage + place), call);
        }
    }

    /// The number of a call that is equal to this one.
    ///
    /// # Safety
    /// `node` is a node.
    pub unsafe fn find(&self, node: *mut Node) -> Option<usize> {
        // SAFETY: by the contract.
        self.calls.iter().position(|call| unsafe { nodes::equal(*call, node) })
    }

    pub fn is_empty(&self) -> bool {
        self.calls.is_empty()
    }

    pub fn len(&self) -> usize {
        self.calls.len()
    }

    pub fn iter(&self) -> impl Iterator<Item = *mut Node> + '_ {
        self.calls.iter().copied()
    }
}

/// # Safety
/// `node` is an expression.
unsafe fn is_volatile(node: *mut Node) -> bool {
    // SAFETY: by the contract.
    unsafe {
        let one = nodes::list([node]);
        super::tree::volatile_list(one)
    }
}

/// True if a column is in the expression.
///
/// # Safety
/// `node` is an expression.
unsafe fn has_columns(node: *mut Node) -> bool {
    // SAFETY: by the contract.
    unsafe {
        matches!(nodes::tag(node), NodeTag::T_Var | NodeTag::T_Aggref | NodeTag::T_WindowFunc | NodeTag::T_GroupingFunc)
            || nodes::visit_children(node, &mut |child| has_columns(child))
    }
}

/// True if each row names the model.
///
/// # Safety
/// `call` is a call of `predict`.
unsafe fn is_named_by_row(call: *mut Node) -> bool {
    // SAFETY: by the contract.
    unsafe {
        let model = nodes::items::<Node>((*call.cast::<pg_sys::FuncExpr>()).args).next();
        model.is_some_and(|model| has_columns(model))
    }
}

/// # Safety
/// `call` is a call of `predict`.
unsafe fn depends_on_row(call: *mut Node) -> bool {
    // SAFETY: by the contract.
    unsafe { has_columns(call) }
}

/// The columns of the child that an expression uses, without those in calls.
///
/// # Safety
/// `node` is an expression over the child's columns (`OUTER_VAR`), a list of such, or null.
unsafe fn columns(node: *mut Node, calls: &Calls, found: &mut Vec<usize>) {
    // SAFETY: by the contract.
    unsafe {
        if node.is_null() || calls.find(node).is_some() {
            return;
        }
        if let Some(column) = outer_column(node) {
            if !found.contains(&column) {
                found.push(column);
            }
            return;
        }
        nodes::visit_children(node, &mut |child| {
            columns(child, calls, found);
            false
        });
    }
}

/// The number of the child's column if the node is one.
///
/// # Safety
/// `node` is an expression.
pub unsafe fn outer_column(node: *mut Node) -> Option<usize> {
    // SAFETY: by the contract.
    unsafe {
        let var = nodes::cast::<pg_sys::Var>(node, NodeTag::T_Var)?;
        ((*var).varno == pg_sys::OUTER_VAR).then_some((*var).varattno as usize)
    }
}

/// A node above `child` with this target list and these conditions, all over the child's columns (`OUTER_VAR`); none if
/// they call nothing. `costs` is the plan that the node and its child take the place of, `id` a number that no node has.
///
/// # Safety
/// All are parts of a finished plan; target list and conditions may be shared with it.
pub unsafe fn above(
    child: *mut Plan,
    target: *mut pg_sys::List,
    conditions: *mut pg_sys::List,
    costs: *mut Plan,
    id: i32,
) -> Option<*mut Plan> {
    // SAFETY: by the contract.
    unsafe {
        let conditions: Vec<*mut Node> = nodes::items(conditions).collect();
        let mut all = Calls::default();
        let mut stages = Vec::new();
        for (stage, &condition) in conditions.iter().enumerate() {
            all.begin_stage();
            all.collect(condition);
            stages.resize(all.len(), stage);
        }
        all.begin_stage();
        all.collect(target.cast());
        stages.resize(all.len(), conditions.len());
        if all.is_empty() {
            return None;
        }
        // A call whose arguments are all there when the row is fetched, and that is needed for every row: what comes before
        // the first condition that calls something stays in the child.
        let early: Vec<bool> = all
            .iter()
            .zip(&stages)
            .map(|(call, stage)| {
                let nested = nodes::visit_children(call, &mut |child| contains_call(child, &all));
                *stage == 0 && !nested
            })
            .collect();
        let mut kept = Vec::new();
        for &condition in &conditions {
            columns(condition, &all, &mut kept);
        }
        columns(target.cast(), &all, &mut kept);
        for (call, early) in all.iter().zip(&early) {
            if !early {
                columns((*call.cast::<pg_sys::FuncExpr>()).args.cast(), &all, &mut kept);
            }
        }
        kept.sort_unstable();
        let child_target: Vec<*mut pg_sys::TargetEntry> = nodes::items((*child).targetlist).collect();
        let column_of = |at: usize| (*child_target[at - 1]).expr.cast::<Node>();
        // The node's own row, which expressions name INDEX_VAR.
        let mut row: Vec<*mut pg_sys::TargetEntry> = Vec::new();
        for &column in &kept {
            let like = column_of(column);
            row.push(nodes::entry(nodes::var_like(pg_sys::OUTER_VAR, column, like), row.len() + 1));
        }
        for call in all.iter() {
            row.push(nodes::entry(pg_sys::copyObjectImpl(call.cast()).cast(), row.len() + 1));
        }
        // A condition or a call can have a call that is computed only later, such as one in a branch of CASE: it stays. The
        // columns that it needs are there, because no call of a later stage is early.
        let own = |node: *mut Node, itself: Option<*mut Node>, computed: usize| {
            nodes::changed(node, &mut |part| {
                if itself == Some(part) {
                    return None;
                }
                if let Some(call) = all.find(part).filter(|&call| call < computed) {
                    return Some(nodes::var_like(pg_sys::INDEX_VAR, kept.len() + call + 1, part));
                }
                let column = outer_column(part)?;
                let place = kept.iter().position(|kept| *kept == column)?;
                Some(nodes::var_like(pg_sys::INDEX_VAR, place + 1, part))
            })
        };
        let layout = Layout {
            kept: kept.clone(),
            calls: all
                .iter()
                .zip(&early)
                .zip(&stages)
                .filter_map(|((call, &early), &stage)| {
                    Some(CallLayout { early, elements: calls::predict(call)?, stage, by_row: is_named_by_row(call) })
                })
                .collect(),
        };
        let expressions = all.iter().zip(&early).enumerate().map(|(at, (call, &early))| {
            if early { pg_sys::copyObjectImpl(call.cast()).cast::<Node>() } else { own(call, Some(call), at) }
        });
        let computed_at = |stage: usize| stages.partition_point(|&of_call| of_call <= stage);
        let node = nodes::make::<pg_sys::CustomScan>(NodeTag::T_CustomScan);
        let plan = &mut (*node).scan.plan;
        plan.startup_cost = (*costs).startup_cost;
        plan.total_cost = (*costs).total_cost;
        plan.plan_rows = (*costs).plan_rows;
        plan.plan_width = (*costs).plan_width;
        plan.parallel_safe = (*costs).parallel_safe;
        plan.plan_node_id = id;
        plan.extParam = pg_sys::bms_copy((*costs).extParam);
        plan.allParam = pg_sys::bms_copy((*costs).allParam);
        plan.targetlist = own(target.cast(), None, all.len()).cast();
        plan.qual =
            nodes::list(conditions.iter().enumerate().map(|(at, &condition)| own(condition, None, computed_at(at))));
        plan.lefttree = child;
        (*node).custom_scan_tlist = nodes::list(row);
        (*node).custom_exprs = nodes::list(expressions);
        (*node).custom_private = layout.to_list();
        (*node).methods = scan::methods();
        Some(node.cast())
    }
}

/// True if the call is a part of the expression.
///
/// # Safety
/// Both are expressions.
unsafe fn contains(node: *mut Node, call: *mut Node) -> bool {
    // SAFETY: by the contract.
    unsafe { nodes::visit_children(node, &mut |child| nodes::equal(child, call) || contains(child, call)) }
}

/// # Safety
/// `node` is an expression.
unsafe fn contains_call(node: *mut Node, calls: &Calls) -> bool {
    // SAFETY: by the contract.
    unsafe { calls.find(node).is_some() || nodes::visit_children(node, &mut |child| contains_call(child, calls)) }
}

/// True for a node that [`above`] has made.
///
/// # Safety
/// `plan` is a plan.
pub unsafe fn is_ours(plan: *mut Plan) -> bool {
    // SAFETY: by the contract.
    unsafe {
        nodes::cast::<pg_sys::CustomScan>(plan.cast(), NodeTag::T_CustomScan)
            .is_some_and(|custom| std::ptr::eq((*custom).methods, scan::methods()))
    }
}
