//! Parse, plan and expression trees: lists, walks, and copies with changes.
//!
//! Nodes are made in the current memory context and belong to it, as everywhere in the planner. The functions take raw
//! pointers, since a node's type is known by its tag only; each says what its pointers have to be.

use pgrx::pg_sys::{self, NodeTag};
use pgrx::prelude::*;
use std::ffi::c_void;

/// Any node.
pub type Node = pg_sys::Node;

/// The tag of a node.
///
/// # Safety
/// `node` is a node and not null.
pub unsafe fn tag<T>(node: *const T) -> NodeTag {
    // SAFETY: every node begins with its tag.
    unsafe { (*node.cast::<Node>()).type_ }
}

/// The node as one of type `T` if it has this tag.
///
/// # Safety
/// `node` is a node or null, and nodes with this tag are `T`s.
pub unsafe fn cast<T>(node: *const Node, wanted: NodeTag) -> Option<*mut T> {
    // SAFETY: by the contract.
    unsafe { (!node.is_null() && tag(node) == wanted).then(|| node.cast_mut().cast::<T>()) }
}

/// The pointers of a list.
///
/// # Safety
/// `list` is a list of pointers or null, and is not changed while the result is in use.
pub unsafe fn items<T>(list: *const pg_sys::List) -> impl Iterator<Item = *mut T> + Clone {
    // SAFETY: a list has `length` cells.
    let count = if list.is_null() { 0 } else { unsafe { (*list).length as usize } };
    // SAFETY: as above, and by the contract.
    (0..count).map(move |at| unsafe { (*(*list).elements.add(at)).ptr_value.cast::<T>() })
}

/// The numbers of a list of integers.
///
/// # Safety
/// `list` is a list of integers or null.
pub unsafe fn numbers(list: *const pg_sys::List) -> Vec<i32> {
    // SAFETY: by the contract.
    unsafe {
        let count = if list.is_null() { 0 } else { (*list).length as usize };
        (0..count).map(|at| (*(*list).elements.add(at)).int_value).collect()
    }
}

/// A list of these pointers.
///
/// # Safety
/// They are nodes.
pub unsafe fn list<T>(items: impl IntoIterator<Item = *mut T>) -> *mut pg_sys::List {
    let mut made = std::ptr::null_mut();
    for item in items {
        // SAFETY: a list that was made here.
        made = unsafe { pg_sys::lappend(made, item.cast()) };
    }
    made
}

/// A list of these integers.
pub fn number_list(numbers: impl IntoIterator<Item = i32>) -> *mut pg_sys::List {
    let mut made = std::ptr::null_mut();
    for number in numbers {
        // SAFETY: a list that was made here.
        made = unsafe { pg_sys::lappend_int(made, number) };
    }
    made
}

/// A zeroed node with this tag.
///
/// # Safety
/// Nodes with this tag are `T`s.
pub unsafe fn make<T>(tag: NodeTag) -> *mut T {
    // SAFETY: palloc'd with the type's size; zeros are valid for plan nodes.
    unsafe {
        let node = pg_sys::palloc0(std::mem::size_of::<T>()).cast::<Node>();
        (*node).type_ = tag;
        node.cast()
    }
}

/// True if the nodes are equal (`equal()`).
///
/// # Safety
/// Both are nodes or null.
pub unsafe fn equal(a: *const Node, b: *const Node) -> bool {
    // SAFETY: by the contract.
    unsafe { pg_sys::equal(a.cast(), b.cast()) }
}

type Visit<'a> = &'a mut dyn FnMut(*mut Node) -> bool;

/// Calls `visit` with each node directly below this one (of a list: each item). Ends with true as soon as it says so.
///
/// # Safety
/// `node` is an expression, a list of such, or null.
pub unsafe fn visit_children(node: *mut Node, mut visit: Visit<'_>) -> bool {
    #[pg_guard]
    unsafe extern "C-unwind" fn one(node: *mut Node, context: *mut c_void) -> bool {
        // SAFETY: the context is the visitor below, which outlives the walk.
        !node.is_null() && unsafe { (*context.cast::<Visit<'_>>())(node) }
    }
    // SAFETY: by the contract.
    unsafe { pg_sys::expression_tree_walker(node, Some(one), (&raw mut visit).cast()) }
}

/// The same for a query: its own expressions and those of its tables and subqueries.
///
/// # Safety
/// `query` is a query.
pub unsafe fn visit_query(query: *mut pg_sys::Query, mut visit: Visit<'_>) -> bool {
    #[pg_guard]
    unsafe extern "C-unwind" fn one(node: *mut Node, context: *mut c_void) -> bool {
        // SAFETY: the context is the visitor below, which outlives the walk.
        !node.is_null() && unsafe { (*context.cast::<Visit<'_>>())(node) }
    }
    // SAFETY: by the contract.
    unsafe { pg_sys::query_tree_walker(query, Some(one), (&raw mut visit).cast(), 0) }
}

type Change<'a> = &'a mut dyn FnMut(*mut Node) -> Option<*mut Node>;

/// A copy of the expression in which each node for which `change` gives another is exchanged; below such a node nothing is
/// looked at.
///
/// # Safety
/// `node` is an expression, a list of such, or null.
pub unsafe fn changed(node: *mut Node, change: Change<'_>) -> *mut Node {
    #[pg_guard]
    unsafe extern "C-unwind" fn one(node: *mut Node, context: *mut c_void) -> *mut Node {
        if node.is_null() {
            return node;
        }
        // SAFETY: the context is the pointer below, which outlives the walk.
        unsafe {
            match (*context.cast::<Change<'_>>())(node) {
                Some(other) => other,
                None => below(node, context),
            }
        }
    }
    /// # Safety
    /// As that of `changed`; `context` points at a `Change`.
    unsafe fn below(node: *mut Node, context: *mut c_void) -> *mut Node {
        // SAFETY: PostgreSQL 15 declares the callback without its parameters.
        #[cfg(not(any(feature = "pg16", feature = "pg17", feature = "pg18")))]
        unsafe {
            let callback = one as unsafe extern "C-unwind" fn(*mut Node, *mut c_void) -> *mut Node;
            let untyped: unsafe extern "C-unwind" fn() -> *mut Node = std::mem::transmute(callback);
            pg_sys::expression_tree_mutator(node, Some(untyped), context)
        }
        // SAFETY: by the contract.
        #[cfg(any(feature = "pg16", feature = "pg17", feature = "pg18"))]
        unsafe {
            pg_sys::expression_tree_mutator_impl(node, Some(one), context)
        }
    }
    let mut context = change;
    // SAFETY: as above.
    unsafe { one(node, (&raw mut context).cast()) }
}

/// A Var of a plan: column `attno` of what `varno` stands for, of the type that `like` has.
///
/// # Safety
/// `like` is an expression.
pub unsafe fn var_like(varno: i32, attno: usize, like: *mut Node) -> *mut Node {
    // SAFETY: by the contract.
    unsafe {
        let (kind, modifier) = (pg_sys::exprType(like), pg_sys::exprTypmod(like));
        let var =
            pg_sys::makeVar(varno as _, attno as pg_sys::AttrNumber, kind, modifier, pg_sys::exprCollation(like), 0);
        var.cast()
    }
}

/// An entry of a target list.
///
/// # Safety
/// `expr` is an expression.
pub unsafe fn entry(expr: *mut Node, number: usize) -> *mut pg_sys::TargetEntry {
    // SAFETY: by the contract.
    unsafe { pg_sys::makeTargetEntry(expr.cast(), number as pg_sys::AttrNumber, std::ptr::null_mut(), false) }
}
