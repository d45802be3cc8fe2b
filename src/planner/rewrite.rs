//! Where in a finished plan the nodes go that compute predictions.
//!
//! A node that computes a target list or conditions with calls of `predict` is made to give what those need, and a node of
//! ours above it computes them (`top`). Calls in the arguments of aggregates and of functions that return sets are needed
//! below the node that has them: there they become columns of its child (`lower`).

use super::build::{self, Calls, above};
use super::{limit, tree};
use crate::pg::nodes::{self, Node};
use pgrx::pg_sys::{self, NodeTag, Plan};

/// Rewrites all plans of a statement. `volatile`: the query has volatile functions.
///
/// # Safety
/// `statement` comes from the planner, and is not in use yet.
pub unsafe fn statement(statement: *mut pg_sys::PlannedStmt, volatile: bool, cursor_options: u32) {
    // SAFETY: by the contract.
    unsafe {
        // A subplan that locks rows may be evaluated for each row of a plan.
        let locks = nodes::items::<Plan>((*statement).subplans).any(|plan| !plan.is_null() && tree::locks_rows(plan));
        let mut rewriter = Rewriter { volatile: volatile || locks, made: false, parallel: false, next_id: 0 };
        let scroll = cursor_options & pg_sys::CURSOR_OPT_SCROLL != 0;
        // One that does not go backwards is no different from a query; for WHERE CURRENT OF the node says where its row lies.
        let declared =
            cursor_options & pg_sys::CURSOR_OPT_FAST_PLAN != 0 && cursor_options & pg_sys::CURSOR_OPT_NO_SCROLL == 0;
        let trees = std::iter::once((*statement).planTree).chain(nodes::items((*statement).subplans));
        for tree in trees.filter(|tree| !tree.is_null()) {
            rewriter.number(tree);
        }
        (*statement).planTree = match declared {
            true => rewriter.cursor((*statement).planTree),
            false => rewriter.plan((*statement).planTree),
        };
        let count = if (*statement).subplans.is_null() { 0 } else { (*(*statement).subplans).length as usize };
        for at in 0..count {
            let cell = (*(*statement).subplans).elements.add(at);
            if !(*cell).ptr_value.is_null() {
                (*cell).ptr_value = rewriter.plan((*cell).ptr_value.cast()).cast();
            }
        }
        if rewriter.made && scroll && !pg_sys::ExecSupportsBackwardScan((*statement).planTree) {
            (*statement).planTree = pg_sys::materialize_finished_plan((*statement).planTree);
        }
    }
}

struct Rewriter {
    volatile: bool,
    made: bool,
    /// Below a Gather.
    parallel: bool,
    next_id: i32,
}

impl Rewriter {
    /// # Safety
    /// `plan` is a finished plan.
    unsafe fn number(&mut self, plan: *mut Plan) {
        // SAFETY: by the contract.
        unsafe {
            self.next_id = self.next_id.max((*plan).plan_node_id + 1);
            tree::change_children(plan, &mut |child| {
                self.number(child);
                child
            });
        }
    }

    /// # Safety
    /// `plan` is a finished plan.
    unsafe fn plan(&mut self, plan: *mut Plan) -> *mut Plan {
        // SAFETY: by the contract.
        unsafe {
            pg_sys::check_stack_depth();
            let outside = self.parallel;
            if let NodeTag::T_Gather | NodeTag::T_GatherMerge = nodes::tag(plan) {
                self.parallel = true;
            }
            if let NodeTag::T_Agg | NodeTag::T_WindowAgg | NodeTag::T_ProjectSet = nodes::tag(plan) {
                self.lower(plan);
            }
            let marks = nodes::tag(plan) == NodeTag::T_MergeJoin;
            let inner = (*plan).righttree;
            tree::change_children(plan, &mut |child| {
                if marks && child == inner { self.marked(child) } else { self.plan(child) }
            });
            if let Some(limit) = nodes::cast(plan.cast(), NodeTag::T_Limit) {
                limit::hand_down(limit);
            }
            self.parallel = outside;
            self.top(plan)
        }
    }

    /// The inner side of a merge join: it goes back to a mark, which our node does not.
    ///
    /// # Safety
    /// `plan` is a finished plan.
    unsafe fn marked(&mut self, plan: *mut Plan) -> *mut Plan {
        // SAFETY: by the contract.
        unsafe {
            // A Result has its child go back.
            let passes = nodes::tag(plan) == NodeTag::T_Result;
            tree::change_children(plan, &mut |child| if passes { self.marked(child) } else { self.plan(child) });
            plan
        }
    }

    /// The plan of a cursor that may go backwards. Scans stay as they are as far as rows come from them one by one: FETCH
    /// BACKWARD goes through them.
    ///
    /// # Safety
    /// `plan` is a finished plan.
    unsafe fn cursor(&mut self, plan: *mut Plan) -> *mut Plan {
        // SAFETY: by the contract.
        unsafe {
            pg_sys::check_stack_depth();
            match nodes::tag(plan) {
                NodeTag::T_Result
                | NodeTag::T_Limit
                | NodeTag::T_LockRows
                | NodeTag::T_Append
                | NodeTag::T_MergeAppend
                | NodeTag::T_SubqueryScan => {
                    tree::change_children(plan, &mut |child| self.cursor(child));
                    if let Some(limit) = nodes::cast(plan.cast(), NodeTag::T_Limit) {
                        limit::hand_down(limit);
                    }
                }
                tag => {
                    if !is_scan(tag) {
                        return self.plan(plan);
                    }
                }
            }
            plan
        }
    }

    fn take_id(&mut self) -> i32 {
        self.next_id += 1;
        self.next_id - 1
    }

    /// The plan, with a node above it that computes its target list and conditions if they call something.
    ///
    /// # Safety
    /// `plan` is a finished plan.
    unsafe fn top(&mut self, plan: *mut Plan) -> *mut Plan {
        // SAFETY: by the contract.
        unsafe {
            if !(projects(plan) || matches!(nodes::tag(plan), NodeTag::T_Agg | NodeTag::T_WindowAgg | NodeTag::T_Group))
            {
                return plan;
            }
            let conditions: Vec<*mut Node> = nodes::items((*plan).qual).collect();
            let calls_in = |node: *mut Node| {
                let mut calls = Calls::default();
                calls.collect(node);
                !calls.is_empty()
            };
            // Those behind the first that calls something keep their place behind it.
            let stay = conditions.iter().position(|condition| calls_in(*condition)).unwrap_or(conditions.len());
            let (stay, go) = conditions.split_at(stay);
            if go.is_empty() && !calls_in((*plan).targetlist.cast()) {
                return plan;
            }
            let go = nodes::list(go.iter().copied());
            if self.volatile && tree::volatile_list(go) {
                return plan;
            }
            let original = *plan;
            let mut parts: Vec<*mut Node> = Vec::new();
            let mut outer = |node: *mut pg_sys::List| {
                let list = nodes::changed(node.cast(), &mut |part| {
                    if !is_part(part) {
                        return None;
                    }
                    let known = parts.iter().position(|known| nodes::equal(*known, part));
                    let place = known.unwrap_or_else(|| {
                        parts.push(part);
                        parts.len() - 1
                    });
                    Some(nodes::var_like(pg_sys::OUTER_VAR, place + 1, part))
                });
                list.cast::<pg_sys::List>()
            };
            let (target, go) = (outer((*plan).targetlist), outer(go));
            (*plan).targetlist = nodes::list(parts.iter().enumerate().map(|(at, part)| nodes::entry(*part, at + 1)));
            (*plan).qual = nodes::list(stay.iter().copied());
            (*plan).initPlan = std::ptr::null_mut();
            let made = if tree::is_volatile(plan, self.volatile) {
                None
            } else {
                let mut costs = original;
                above(plan, target, go, &raw mut costs, self.next_id)
            };
            let Some(made) = made else {
                *plan = original;
                return plan;
            };
            (*made).initPlan = original.initPlan;
            (*made).parallel_aware = self.parallel;
            self.take_id();
            self.made = true;
            made
        }
    }

    /// Makes calls in the arguments of the plan's aggregates or of its functions that return sets columns of its child.
    ///
    /// # Safety
    /// `plan` is an Agg, a WindowAgg or a ProjectSet of a finished plan.
    unsafe fn lower(&mut self, plan: *mut Plan) {
        // SAFETY: by the contract.
        unsafe {
            let child = (*plan).lefttree;
            let mut calls = Calls::default();
            if nodes::tag(plan) == NodeTag::T_ProjectSet {
                calls.collect((*plan).targetlist.cast());
            } else {
                collect_in_aggregates((*plan).targetlist.cast(), &mut calls);
                collect_in_aggregates((*plan).qual.cast(), &mut calls);
            }
            if calls.is_empty() || child.is_null() {
                return;
            }
            let width = nodes::items::<Node>((*child).targetlist).count();
            // Nested calls are computed with the outer one.
            let column_for = |list: *mut Node| {
                nodes::changed(list, &mut |part| {
                    let call = calls.find(part)?;
                    Some(nodes::var_like(pg_sys::OUTER_VAR, width + call + 1, part))
                })
            };
            let everywhere = nodes::tag(plan) == NodeTag::T_ProjectSet;
            let exchange = |list: *mut pg_sys::List| {
                let changed = match everywhere {
                    true => column_for(list.cast()),
                    false => nodes::changed(list.cast(), &mut |part| in_aggregate(part, &column_for)),
                };
                changed.cast::<pg_sys::List>()
            };
            let (target, conditions) = (exchange((*plan).targetlist), exchange((*plan).qual));
            let used = used_columns(plan, target, conditions);
            let column = |entry: &mut pg_sys::TargetEntry, expr: *mut Node| {
                if used.as_ref().is_none_or(|used| used.contains(&(entry.resno as usize))) {
                    return expr;
                }
                let (kind, modifier) = (pg_sys::exprType(expr), pg_sys::exprTypmod(expr));
                pg_sys::makeNullConst(kind, modifier, pg_sys::exprCollation(expr)).cast()
            };
            let entries: Vec<*mut pg_sys::TargetEntry> = nodes::items((*child).targetlist).collect();
            let mut wider: Vec<*mut pg_sys::TargetEntry> = Vec::new();
            if projects(child) && !(self.volatile && tree::volatile_list((*child).targetlist)) {
                // The child's own expressions take the place of its columns.
                for &old in &entries {
                    let new = pg_sys::copyObjectImpl(old.cast()).cast::<pg_sys::TargetEntry>();
                    (*new).expr = column(&mut *new, (*new).expr.cast()).cast();
                    wider.push(new);
                }
                for call in calls.iter() {
                    let call = nodes::changed(call, &mut |part| {
                        let at = build::outer_column(part)?;
                        Some((**entries.get(at.checked_sub(1)?)?).expr.cast::<Node>())
                    });
                    wider.push(nodes::entry(call, wider.len() + 1));
                }
                (*child).targetlist = nodes::list(wider);
            } else {
                for &old in &entries {
                    let var = nodes::var_like(pg_sys::OUTER_VAR, (*old).resno as usize, (*old).expr.cast());
                    let new = pg_sys::copyObjectImpl(old.cast()).cast::<pg_sys::TargetEntry>();
                    (*new).expr = column(&mut *new, var).cast();
                    wider.push(new);
                }
                for call in calls.iter() {
                    wider.push(nodes::entry(call, wider.len() + 1));
                }
                if tree::is_volatile(child, self.volatile) {
                    return;
                }
                let Some(made) = above(child, nodes::list(wider), std::ptr::null_mut(), child, self.next_id) else {
                    return;
                };
                (*made).parallel_aware = self.parallel;
                self.take_id();
                self.made = true;
                (*plan).lefttree = made;
            }
            (*plan).targetlist = target;
            (*plan).qual = conditions;
        }
    }
}

/// True for plans that read what is no plan below them.
fn is_scan(tag: NodeTag) -> bool {
    matches!(
        tag,
        NodeTag::T_SeqScan
            | NodeTag::T_SampleScan
            | NodeTag::T_IndexScan
            | NodeTag::T_IndexOnlyScan
            | NodeTag::T_BitmapHeapScan
            | NodeTag::T_TidScan
            | NodeTag::T_TidRangeScan
            | NodeTag::T_FunctionScan
            | NodeTag::T_ValuesScan
            | NodeTag::T_TableFuncScan
            | NodeTag::T_CteScan
            | NodeTag::T_NamedTuplestoreScan
            | NodeTag::T_WorkTableScan
    )
}

/// True for plans that compute any target list over what they read.
///
/// # Safety
/// `plan` is a plan.
unsafe fn projects(plan: *mut Plan) -> bool {
    // SAFETY: by the contract.
    match unsafe { nodes::tag(plan) } {
        tag if is_scan(tag) => true,
        NodeTag::T_SubqueryScan | NodeTag::T_NestLoop | NodeTag::T_MergeJoin | NodeTag::T_HashJoin => true,
        // SAFETY: by the contract.
        NodeTag::T_Result => unsafe { !(*plan).lefttree.is_null() },
        _ => false,
    }
}

/// True for what a node below has to give: columns, and what only an aggregation or a window can compute.
///
/// # Safety
/// `node` is an expression.
unsafe fn is_part(node: *mut Node) -> bool {
    // SAFETY: by the contract.
    matches!(
        unsafe { nodes::tag(node) },
        NodeTag::T_Var | NodeTag::T_Aggref | NodeTag::T_WindowFunc | NodeTag::T_GroupingFunc
    )
}

/// If the node is an aggregate or a window function, a copy of it with what it evaluates for each row changed. Outside of
/// these, and in direct arguments, columns are those of a group: of several grouping sets some are null there.
///
/// # Safety
/// `node` is an expression.
unsafe fn in_aggregate(node: *mut Node, change: &dyn Fn(*mut Node) -> *mut Node) -> Option<*mut Node> {
    // SAFETY: by the contract.
    unsafe {
        if nodes::cast::<pg_sys::Aggref>(node, NodeTag::T_Aggref).is_some() {
            let copy = pg_sys::copyObjectImpl(node.cast()).cast::<pg_sys::Aggref>();
            (*copy).args = change((*copy).args.cast()).cast();
            (*copy).aggfilter = change((*copy).aggfilter.cast()).cast();
            return Some(copy.cast());
        }
        nodes::cast::<pg_sys::WindowFunc>(node, NodeTag::T_WindowFunc)?;
        let copy = pg_sys::copyObjectImpl(node.cast()).cast::<pg_sys::WindowFunc>();
        (*copy).args = change((*copy).args.cast()).cast();
        (*copy).aggfilter = change((*copy).aggfilter.cast()).cast();
        Some(copy.cast())
    }
}

/// Calls in the arguments of aggregates and window functions that are evaluated for each row.
///
/// # Safety
/// `node` is an expression, a list of such, or null.
unsafe fn collect_in_aggregates(node: *mut Node, calls: &mut Calls) {
    // SAFETY: by the contract.
    unsafe {
        if node.is_null() {
            return;
        }
        if let Some(aggregate) = nodes::cast::<pg_sys::Aggref>(node, NodeTag::T_Aggref) {
            if (*aggregate).aggfilter.is_null() {
                calls.collect((*aggregate).args.cast());
            } else {
                calls.collect((*aggregate).aggfilter.cast());
            }
            return;
        }
        if let Some(function) = nodes::cast::<pg_sys::WindowFunc>(node, NodeTag::T_WindowFunc) {
            if (*function).aggfilter.is_null() {
                calls.collect((*function).args.cast());
            } else {
                calls.collect((*function).aggfilter.cast());
            }
            return;
        }
        nodes::visit_children(node, &mut |child| {
            collect_in_aggregates(child, calls);
            false
        });
    }
}

/// The child's columns that a plan uses, when it has these target list and conditions; none if that is all of them.
///
/// # Safety
/// `plan` is an Agg, a WindowAgg or a ProjectSet.
unsafe fn used_columns(
    plan: *mut Plan,
    target: *mut pg_sys::List,
    conditions: *mut pg_sys::List,
) -> Option<Vec<usize>> {
    // SAFETY: by the contract.
    unsafe fn visit(node: *mut Node, used: &mut Vec<usize>) {
        unsafe {
            if node.is_null() {
                return;
            }
            used.extend(build::outer_column(node));
            nodes::visit_children(node, &mut |child| {
                visit(child, used);
                false
            });
        }
    }
    // SAFETY: by the contract; an array of column numbers is as long as its count says.
    unsafe {
        let mut used = Vec::new();
        visit(target.cast(), &mut used);
        visit(conditions.cast(), &mut used);
        let mut add = |numbers: *const pg_sys::AttrNumber, count: i32| {
            used.extend((0..count as usize).map(|at| *numbers.add(at) as usize));
        };
        match nodes::tag(plan) {
            NodeTag::T_ProjectSet => {}
            NodeTag::T_Agg => {
                let agg = &*plan.cast::<pg_sys::Agg>();
                if !agg.chain.is_null() || !agg.groupingSets.is_null() {
                    return None;
                }
                add(agg.grpColIdx, agg.numCols);
            }
            // Its frames have expressions of their own.
            _ => return None,
        }
        // A whole row is all of it.
        (!used.contains(&0)).then_some(used)
    }
}
