//! The node: a CustomScan above the plan whose rows it predicts.
//!
//! It fetches rows from its child, gathers the inputs of the calls, keeps the columns that are needed after, predicts, and then
//! hands the rows on one by one, in the child's order. What a row needs beyond that, such as a condition, is evaluated when
//! its turn has come, but for conditions behind which there are more calls.
//!
//! A row with which a batch cannot be made, such as one of a wrong length, ends the batch before it, and is evaluated alone by
//! the function itself: it raises what the function raises, when its turn has come.

use super::batch::{Done, InUse};
use super::by_row::ByRow;
use super::layout::{CallLayout, Layout};
use super::shared::{self, Shared};
use crate::catalog;
use crate::pg::progress::Activity;
use crate::pg::{exec, memory, nodes};
use crate::serving::sets;
use inference::array::RowBuffer;
use pgrx::pg_sys::{self, NodeTag};
use pgrx::prelude::*;
use std::ffi::c_void;

const NAME: &std::ffi::CStr = c"Tessera Predict";

/// Function pointers and names that live as long as the process.
struct Static<T>(T);
// SAFETY: never changed.
unsafe impl<T> Sync for Static<T> {}

static METHODS: Static<pg_sys::CustomScanMethods> =
    Static(pg_sys::CustomScanMethods { CustomName: NAME.as_ptr(), CreateCustomScanState: Some(create) });

static EXEC: Static<pg_sys::CustomExecMethods> = Static(pg_sys::CustomExecMethods {
    CustomName: NAME.as_ptr(),
    BeginCustomScan: Some(begin),
    ExecCustomScan: Some(next),
    EndCustomScan: Some(end),
    ReScanCustomScan: Some(rescan),
    MarkPosCustomScan: None,
    RestrPosCustomScan: None,
    EstimateDSMCustomScan: Some(estimate_shared),
    InitializeDSMCustomScan: Some(begin_shared),
    ReInitializeDSMCustomScan: Some(begin_shared_anew),
    InitializeWorkerCustomScan: Some(begin_worker),
    ShutdownCustomScan: Some(shut_down),
    ExplainCustomScan: Some(explain),
});

/// What plans name the node by.
pub fn methods() -> *const pg_sys::CustomScanMethods {
    &raw const METHODS.0
}

/// Called once, when the library is loaded.
pub fn init() {
    // SAFETY: static methods.
    unsafe { pg_sys::RegisterCustomScanMethods(methods()) };
}

/// PostgreSQL's part of the node's state, and ours behind it.
#[repr(C)]
struct NodeState {
    custom: pg_sys::CustomScanState,
    scan: *mut Scan,
}

/// A call at work.
pub struct CallState {
    pub(super) layout: CallLayout,
    model_node: *mut nodes::Node,
    pub(super) model_expr: *mut pg_sys::ExprState,
    /// The array; where it is a column of the child's row, which one.
    pub(super) input_expr: *mut pg_sys::ExprState,
    pub(super) input_column: Option<usize>,
    /// The call as a whole.
    pub(super) whole: *mut pg_sys::ExprState,
    /// The name, once it was asked for; none for NULL.
    pub(super) spec: Option<Option<String>>,
    pub(super) model: Option<InUse>,
    /// There is no model of that name that the role may use: only the function itself says so, if it comes to a call.
    pub(super) refused: bool,
    pub(super) rows: RowBuffer,
    /// The rows, where each names its model.
    pub(super) by_row: ByRow,
    /// Bytes of an input, of what the model computes from it at a time, and of an output, as far as they were seen.
    pub(super) input_bytes: usize,
    pub(super) run_bytes: usize,
    pub(super) output_bytes: usize,
    /// By row of the batch, its place in `rows`.
    pub(super) places: Vec<Option<u32>>,
}

/// How far a row has come. A stage is its calls and then the condition of the same number; the last is that of the target
/// list, which has none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Row {
    /// A condition was not met.
    Dropped,
    /// At this stage, of which the calls are computed or not.
    At { stage: usize, computed: bool },
}

pub struct Scan {
    pub(super) layout: Layout,
    pub(super) calls: Vec<CallState>,
    pub(super) conditions: Vec<*mut pg_sys::ExprState>,
    /// Of a LIMIT above: count, and offset if it has one (limit.rs).
    pub(super) limit: Vec<*mut pg_sys::ExprState>,
    /// How many rows it will still take, once that was asked for; none if there is no end.
    pub(super) left: Option<Option<usize>>,
    /// By kept column, how its values are copied.
    pub(super) copies: Vec<(usize, bool, i16)>,
    pub(super) width: usize,
    pub(super) batch_context: pg_sys::MemoryContext,
    pub(super) values: Vec<pg_sys::Datum>,
    pub(super) nulls: Vec<bool>,
    pub(super) rows: Vec<Row>,
    /// By row: no batch can be made with it at its stage.
    pub(super) odd: Vec<bool>,
    /// Rows for which a call is being computed.
    pub(super) chosen: Vec<usize>,
    /// The child if it scans a table, for WHERE CURRENT OF; else null.
    pub(super) table_scan: *mut pg_sys::ScanState,
    /// Of a scan of a table, by row, where the row lies.
    pub(super) origins: Vec<(pg_sys::ItemPointerData, pg_sys::Oid)>,
    /// The next row to hand on.
    pub(super) at: usize,
    /// Rows of the next batch, and what is held of it.
    pub(super) size: usize,
    /// The most rows of a batch since a run took too much memory.
    pub(super) within: usize,
    /// Bytes of the last batch, as they were counted when it was fetched, and of the largest before it.
    pub(super) fetched_bytes: usize,
    pub(super) largest_bytes: usize,
    /// The child's slot if its row is not in a batch yet, else null.
    pub(super) held: *mut pg_sys::TupleTableSlot,
    pub(super) ended: bool,
    pub(super) done: Done,
    /// What parallel workers did, and where they say so: null when there are none (shared.rs).
    pub(super) of_workers: Done,
    pub(super) shared: *mut Shared,
    /// Shown from the first batch on, until the scan ends.
    pub(super) activity: Option<Activity>,
}

#[pg_guard]
unsafe extern "C-unwind" fn create(_plan: *mut pg_sys::CustomScan) -> *mut pg_sys::Node {
    // SAFETY: zeros are a valid state before it begins.
    unsafe {
        let node = nodes::make::<NodeState>(NodeTag::T_CustomScanState);
        (*node).custom.methods = &raw const EXEC.0;
        node.cast()
    }
}

#[pg_guard]
unsafe extern "C-unwind" fn begin(node: *mut pg_sys::CustomScanState, estate: *mut pg_sys::EState, flags: i32) {
    // SAFETY: the node is one of ours, and its plan one that the planner made (build.rs).
    unsafe {
        let plan = (*node).ss.ps.plan.cast::<pg_sys::CustomScan>();
        let child = exec::begin((*plan).scan.plan.lefttree, estate, flags);
        (*node).ss.ps.lefttree = child;
        let layout = Layout::of_numbers(&nodes::numbers((*plan).custom_private)).unwrap_or_else(|| {
            crate::pg::error::not_supported(
                "the plan was made by another version of pg_tessera",
                "Prepare the statement again.",
            )
        });
        let parent = &raw mut (*node).ss.ps;
        let behind = nodes::items::<pg_sys::Expr>((*plan).custom_exprs).skip(layout.calls.len());
        let limit = behind.map(|end| pg_sys::ExecInitExpr(end, parent)).collect();
        let calls = nodes::items::<pg_sys::FuncExpr>((*plan).custom_exprs)
            .zip(&layout.calls)
            .map(|(call, &layout)| CallState::new(call, layout, parent))
            .collect();
        let conditions = nodes::items::<nodes::Node>((*plan).scan.plan.qual)
            .map(|condition| pg_sys::ExecInitQual(nodes::list([condition]), parent))
            .collect();
        let desc = (*(*node).ss.ss_ScanTupleSlot).tts_tupleDescriptor;
        let copies = layout.kept.iter().enumerate().map(|(at, &column)| {
            let attribute = &*crate::pg::tuple::attribute(desc, at);
            (column, attribute.attbyval, attribute.attlen)
        });
        let width = layout.kept.len() + layout.calls.len();
        let scan = Box::new(Scan {
            calls,
            conditions,
            limit,
            left: None,
            copies: copies.collect(),
            width,
            batch_context: memory::new_context((*estate).es_query_cxt, c"pg_tessera batch"),
            values: Vec::new(),
            nulls: Vec::new(),
            rows: Vec::new(),
            odd: Vec::new(),
            chosen: Vec::new(),
            table_scan: table_scan(child),
            origins: Vec::new(),
            at: 0,
            size: 1,
            within: usize::MAX,
            fetched_bytes: 0,
            largest_bytes: 0,
            held: std::ptr::null_mut(),
            ended: false,
            done: Done::default(),
            of_workers: Done::default(),
            shared: std::ptr::null_mut(),
            activity: None,
            layout,
        });
        if !scan.table_scan.is_null() {
            // By which execCurrentOf (execCurrent.c) finds the scan of a cursor; it asks our slot for the row's place.
            (*node).ss.ss_currentRelation = (*scan.table_scan).ss_currentRelation;
        }
        let scan = Box::into_raw(scan);
        (*node.cast::<NodeState>()).scan = scan;
        memory::drop_with((*estate).es_query_cxt, scan);
    }
}

/// The child as a scan of a table whose slot says where each row lies; else null.
///
/// # Safety
/// `child` is an initialised plan.
unsafe fn table_scan(child: *mut pg_sys::PlanState) -> *mut pg_sys::ScanState {
    // SAFETY: these states begin with a ScanState.
    unsafe {
        let scan = child.cast::<pg_sys::ScanState>();
        match nodes::tag(child) {
            NodeTag::T_SeqScanState
            | NodeTag::T_SampleScanState
            | NodeTag::T_IndexScanState
            | NodeTag::T_BitmapHeapScanState
            | NodeTag::T_TidScanState
            | NodeTag::T_TidRangeScanState
                if !(*scan).ss_currentRelation.is_null() =>
            {
                scan
            }
            _ => std::ptr::null_mut(),
        }
    }
}

/// Our part of the state.
///
/// # Safety
/// `node` is one of ours that has begun, and there is no other reference to its state.
unsafe fn state<'a>(node: *mut pg_sys::CustomScanState) -> &'a mut Scan {
    // SAFETY: by the contract.
    unsafe { &mut *(*node.cast::<NodeState>()).scan }
}

#[pg_guard]
unsafe extern "C-unwind" fn next(node: *mut pg_sys::CustomScanState) -> *mut pg_sys::TupleTableSlot {
    // SAFETY: the executor calls this between begin and end.
    unsafe { state(node).next(node) }
}

#[pg_guard]
unsafe extern "C-unwind" fn end(node: *mut pg_sys::CustomScanState) {
    // SAFETY: the node has begun; our part goes with the query's memory.
    unsafe { state(node).activity = None };
    // SAFETY: as before.
    unsafe { exec::end((*node).ss.ps.lefttree) };
}

#[pg_guard]
unsafe extern "C-unwind" fn rescan(node: *mut pg_sys::CustomScanState) {
    // SAFETY: the node has begun.
    unsafe {
        state(node).restart();
        let child = (*node).ss.ps.lefttree;
        if (*child).chgParam.is_null() {
            exec::rescan(child);
        }
    }
}

#[pg_guard]
unsafe extern "C-unwind" fn estimate_shared(
    _node: *mut pg_sys::CustomScanState,
    context: *mut pg_sys::ParallelContext,
) -> pg_sys::Size {
    // SAFETY: the context of a parallel query that is being set up.
    shared::bytes(unsafe { (*context).nworkers } as usize)
}

#[pg_guard]
unsafe extern "C-unwind" fn begin_shared(
    node: *mut pg_sys::CustomScanState,
    context: *mut pg_sys::ParallelContext,
    place: *mut c_void,
) {
    // SAFETY: the node has begun; the place is as large as was asked for, for the same context.
    unsafe {
        Shared::set_up(place.cast(), (*context).nworkers as usize);
        state(node).shared = place.cast();
    }
}

#[pg_guard]
unsafe extern "C-unwind" fn begin_shared_anew(
    node: *mut pg_sys::CustomScanState,
    context: *mut pg_sys::ParallelContext,
    place: *mut c_void,
) {
    // SAFETY: as before; the workers of the last time have ended.
    unsafe {
        state(node).collect_workers();
        begin_shared(node, context, place);
    }
}

#[pg_guard]
unsafe extern "C-unwind" fn begin_worker(
    node: *mut pg_sys::CustomScanState,
    _toc: *mut pg_sys::shm_toc,
    place: *mut c_void,
) {
    // SAFETY: the node has begun, and the leader has made the place.
    unsafe { state(node).shared = place.cast() };
}

#[pg_guard]
unsafe extern "C-unwind" fn shut_down(node: *mut pg_sys::CustomScanState) {
    // SAFETY: the node has begun; memory of a parallel query is still there.
    unsafe { state(node).collect_workers() };
}

#[pg_guard]
unsafe extern "C-unwind" fn explain(
    node: *mut pg_sys::CustomScanState,
    _ancestors: *mut pg_sys::List,
    explain: *mut pg_sys::ExplainState,
) {
    // SAFETY: the node has begun.
    unsafe { super::explain::explain(node, state(node), explain) };
}

impl CallState {
    /// # Safety
    /// `call` is a call of `predict` in the plan of `parent`.
    unsafe fn new(call: *mut pg_sys::FuncExpr, layout: CallLayout, parent: *mut pg_sys::PlanState) -> CallState {
        // SAFETY: by the contract; `predict` has two arguments.
        unsafe {
            let mut arguments = nodes::items::<pg_sys::Expr>((*call).args);
            let (model, input) = (arguments.next(), arguments.next());
            let (model, input) = (model.unwrap_or(std::ptr::null_mut()), input.unwrap_or(std::ptr::null_mut()));
            CallState {
                layout,
                model_node: model.cast(),
                model_expr: pg_sys::ExecInitExpr(model, parent),
                input_expr: pg_sys::ExecInitExpr(input, parent),
                input_column: if layout.early { super::build::outer_column(input.cast()) } else { None },
                whole: pg_sys::ExecInitExpr(call.cast(), parent),
                spec: None,
                model: None,
                refused: false,
                rows: RowBuffer::default(),
                by_row: ByRow::default(),
                input_bytes: 0,
                run_bytes: 0,
                output_bytes: 0,
                places: Vec::new(),
            }
        }
    }

    pub(super) fn clear(&mut self) {
        self.rows.clear();
        self.by_row.clear();
        self.places.clear();
    }

    /// True if what is gathered is wider than what was predicted before.
    pub(super) fn is_wider(&self) -> bool {
        self.input_bytes > 0 && self.rows.rows() > 0 && self.rows.bytes() / self.rows.rows() > self.input_bytes
    }

    /// Bytes of a row that are held until the batch has been handed on, beyond those that are counted when it is fetched.
    pub(super) fn held_bytes(&self) -> usize {
        let input = if self.layout.early { 0 } else { self.input_bytes };
        self.output_bytes + input
    }

    /// Bytes of a row while the model runs: its values, among which are input and output, and the output once more on its way.
    pub(super) fn passing_bytes(&self) -> usize {
        self.run_bytes.saturating_add(self.input_bytes + self.output_bytes)
    }

    /// The name of the model, which is one for all rows.
    ///
    /// # Safety
    /// `context` is the node's.
    pub(super) unsafe fn name(&mut self, context: *mut pg_sys::ExprContext) -> Option<&str> {
        let expr = self.model_expr;
        self.spec
            .get_or_insert_with(|| {
                // SAFETY: the model's name is a text; a string is made of it before its memory is used again.
                unsafe {
                    let datum = exec::evaluate_aside(expr, context);
                    datum.and_then(|datum| String::from_datum(datum, false))
                }
            })
            .as_deref()
    }

    /// The name as far as it is known without running a part of the query, for EXPLAIN.
    ///
    /// # Safety
    /// `context` is the node's.
    pub(super) unsafe fn name_to_show(&mut self, context: *mut pg_sys::ExprContext) -> Option<&str> {
        // SAFETY: by the contract; parameters from outside are there before the query begins, or not at all.
        let constant = unsafe {
            let given = !(*context).ecxt_param_list_info.is_null();
            nodes::cast::<pg_sys::Const>(self.model_node, NodeTag::T_Const).is_some()
                || nodes::cast::<pg_sys::Param>(self.model_node, NodeTag::T_Param)
                    .is_some_and(|param| given && (*param).paramkind == pg_sys::ParamKind::PARAM_EXTERN)
        };
        if self.spec.is_none() && !constant {
            return None;
        }
        // SAFETY: by the contract.
        unsafe { self.name(context) }
    }

    /// Gets the model ready. False if rows of it have to be predicted one by one.
    ///
    /// # Safety
    /// `context` is the node's.
    pub(super) unsafe fn ready(&mut self, context: *mut pg_sys::ExprContext) -> bool {
        if self.layout.by_row {
            return true;
        }
        // SAFETY: by the contract.
        let Some(spec) = (unsafe { self.name(context) }).map(str::to_owned) else {
            (self.model, self.refused) = (None, false);
            return true;
        };
        if self.model.is_none() {
            self.refused = !sets::is_usable_member(&spec).unwrap_or_else(|| catalog::is_usable(&spec));
            if self.refused {
                return false;
            }
        }
        if !self.model.as_ref().is_some_and(|model| model.is(&spec)) {
            self.model = Some(InUse::of(&spec));
        }
        self.model.as_ref().is_some_and(|model| model.batched)
    }

    /// True if the model is known to take rows one by one.
    pub fn is_row_by_row(&self) -> bool {
        self.model.as_ref().is_some_and(|model| !model.batched)
    }
}

impl Scan {
    fn restart(&mut self) {
        self.clear();
        (self.size, self.held, self.ended, self.left) = (1, std::ptr::null_mut(), false, None);
        for call in &mut self.calls {
            call.spec = None;
        }
    }

    pub(super) fn clear(&mut self) {
        self.values.clear();
        self.nulls.clear();
        self.rows.clear();
        self.origins.clear();
        self.at = 0;
        for call in &mut self.calls {
            call.clear();
        }
    }

    /// # Safety
    /// `node` is the node of this state.
    unsafe fn next(&mut self, node: *mut pg_sys::CustomScanState) -> *mut pg_sys::TupleTableSlot {
        // SAFETY: by the contract.
        unsafe {
            let slot = (*node).ss.ss_ScanTupleSlot;
            let context = (*node).ss.ps.ps_ExprContext;
            let last = Row::At { stage: self.conditions.len(), computed: true };
            loop {
                while self.at < self.rows.len() {
                    let row = self.at;
                    self.at += 1;
                    if self.rows[row] == Row::Dropped {
                        continue;
                    }
                    exec::reset((*context).ecxt_per_tuple_memory);
                    (*context).ecxt_scantuple = slot;
                    self.show(slot, row);
                    if self.rows[row] != last && !self.finish_row(node, row) {
                        continue;
                    }
                    let projection = (*node).ss.ps.ps_ProjInfo;
                    return if projection.is_null() { slot } else { exec::project(projection) };
                }
                if self.ended && self.held.is_null() {
                    pg_sys::ExecClearTuple(slot);
                    return std::ptr::null_mut();
                }
                self.fill(node);
                self.compute(node);
            }
        }
    }

    /// Puts a row of the batch into the node's slot.
    ///
    /// # Safety
    /// `slot` is the node's scan slot.
    pub(super) unsafe fn show(&self, slot: *mut pg_sys::TupleTableSlot, row: usize) {
        let range = row * self.width..(row + 1) * self.width;
        // SAFETY: the slot has a column for each value.
        unsafe {
            exec::store(slot, &self.values[range.clone()], &self.nulls[range]);
            if let Some(&(place, table)) = self.origins.get(row) {
                (*slot).tts_tid = place;
                (*slot).tts_tableOid = table;
            }
        }
    }

    pub(super) fn put(&mut self, row: usize, call: usize, value: Option<pg_sys::Datum>) {
        let at = row * self.width + self.layout.kept.len() + call;
        self.values[at] = value.unwrap_or(pg_sys::Datum::from(0));
        self.nulls[at] = value.is_none();
    }
}
