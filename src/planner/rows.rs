//! The rows of a batch: fetched, predicted stage by stage, finished.

use super::batch::raise_if_cancelled;
use super::calls::Elements;
use super::scan::{CallState, Row, Scan};
use crate::pg::progress::{Activity, Work};
use crate::pg::{array, exec, memory};
use crate::serving::settings;
use inference::error::ErrorKind;
use pgrx::pg_sys;
use pgrx::prelude::*;

/// Bytes of a batch of which nothing is given back before the next.
const LITTLE: usize = 256 << 10;

/// Models that rows of a batch may name, for its size: the batch is so much larger.
const MODELS: usize = 64;

/// What became of an input.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Gathered {
    Null,
    Added,
    /// No batch can be made with it.
    Odd,
}

impl CallState {
    /// Adds the input of the row that the context has, and notes its place.
    ///
    /// # Safety
    /// As [`exec`] says; the current memory context is that of the row.
    unsafe fn gather(&mut self, context: *mut pg_sys::ExprContext, slot: *mut pg_sys::TupleTableSlot) -> Gathered {
        // SAFETY: by the contract; the model's name is a text, the input an array of the elements of the call.
        unsafe {
            let Some(input) = self.input(context, slot) else { return Gathered::Null };
            let spec = match self.layout.by_row {
                true => exec::evaluate(self.model_expr, context),
                false => None,
            };
            if self.layout.by_row && spec.is_none() || !self.layout.by_row && self.model.is_none() {
                return Gathered::Null;
            }
            let width = match self.layout.elements {
                Elements::Real | Elements::Integer => 4,
                Elements::Double | Elements::Bigint => 8,
            };
            let bytes = match array::row_in_place(input, width) {
                Some(bytes) => Some(bytes),
                None => array::row_in_place(pg_sys::Datum::from(exec::plain(input.cast_mut_ptr())), width),
            };
            let Some(bytes) = bytes else { return Gathered::Odd };
            let added = match (spec.and_then(|spec| <&str>::from_datum(spec, false)), &self.model) {
                (Some(spec), _) => self.by_row.push(spec, self.layout.elements, bytes),
                (None, Some(model)) => model.push(&mut self.rows, self.layout.elements, bytes),
                (None, None) => false,
            };
            if added { Gathered::Added } else { Gathered::Odd }
        }
    }

    /// Number of inputs gathered.
    fn gathered(&self) -> usize {
        if self.layout.by_row { self.by_row.rows() } else { self.rows.rows() }
    }

    /// The input, from the row that the context has.
    ///
    /// # Safety
    /// As [`exec`] says; `slot` is the child's for an early call.
    unsafe fn input(
        &self,
        context: *mut pg_sys::ExprContext,
        slot: *mut pg_sys::TupleTableSlot,
    ) -> Option<pg_sys::Datum> {
        // SAFETY: by the contract.
        unsafe {
            match self.input_column {
                Some(column) => exec::column(slot, column),
                None => exec::evaluate(self.input_expr, context),
            }
        }
    }

    /// Forgets the last row.
    fn undo(&mut self) {
        if self.places.pop().flatten().is_some() {
            if self.layout.by_row { self.by_row.pop() } else { self.rows.pop() }
        }
    }
}

impl Scan {
    /// Fetches the rows of a batch.
    ///
    /// # Safety
    /// `node` is the node of this state.
    pub(super) unsafe fn fill(&mut self, node: *mut pg_sys::CustomScanState) {
        self.clear();
        // SAFETY: by the contract.
        unsafe {
            let context = (*node).ss.ps.ps_ExprContext;
            let child = (*node).ss.ps.lefttree;
            exec::reset(self.batch_context);
            self.give_back();
            if self.held.is_null() {
                let slot = exec::next_row(child);
                if exec::is_empty(slot) {
                    self.ended = true;
                    return;
                }
                self.held = slot;
            }
            // Names are looked up when there is a row to predict, and anew for each batch.
            let mut alone = !settings::batching();
            for call in &mut self.calls {
                alone |= !call.ready(context);
            }
            if !alone {
                let asked = self.asked(context);
                let most = self.most_rows();
                let wanted = self.size.min(self.within).min(most).min(asked);
                let limit = settings::batch_bytes();
                self.fetch(child, context, wanted, limit);
                self.size = (2 * self.size).min(most);
            }
            if self.rows.is_empty() && !self.held.is_null() {
                self.take_alone(context);
            }
            if let Some(Some(left)) = &mut self.left {
                *left = left.saturating_sub(self.rows.len());
            }
            self.done.largest = self.done.largest.max(self.rows.len() as u64);
        }
    }

    /// The most rows of a batch, as far as memory allows. Where rows name their models, a model gets few of them.
    fn most_rows(&self) -> usize {
        let by_row = self.calls.iter().any(|call| call.layout.by_row);
        settings::batch_size() * if by_row { MODELS } else { 1 }
    }

    /// While batches grow, what a smaller one took is given back before a larger one is fetched: the C library keeps it in
    /// pieces in which the larger one's values find no room. Batches of the same size use it again.
    fn give_back(&mut self) {
        if self.fetched_bytes > self.largest_bytes.max(LITTLE) {
            self.largest_bytes = self.fetched_bytes;
            memory::give_back();
        }
        self.fetched_bytes = 0;
    }

    /// How many rows are asked for at most, by a LIMIT; at least one.
    ///
    /// # Safety
    /// `context` is the node's.
    unsafe fn asked(&mut self, context: *mut pg_sys::ExprContext) -> usize {
        let limit = &self.limit;
        let left = *self.left.get_or_insert_with(|| {
            let mut rows = 0_i64;
            for (at, &end) in limit.iter().enumerate() {
                // SAFETY: both are of type bigint.
                let value = unsafe { exec::evaluate_aside(end, context) }.map(|count| count.value() as i64);
                // No count is no limit, no offset is 0.
                rows = rows.saturating_add(value.or((at > 0).then_some(0))?);
            }
            (!limit.is_empty()).then(|| usize::try_from(rows).ok()).flatten()
        });
        left.unwrap_or(usize::MAX).max(1)
    }

    /// # Safety
    /// As [`exec`] says, with the node's context and child.
    unsafe fn fetch(
        &mut self,
        child: *mut pg_sys::PlanState,
        context: *mut pg_sys::ExprContext,
        wanted: usize,
        limit: usize,
    ) {
        // SAFETY: by the contract.
        unsafe {
            let caller = pg_sys::CurrentMemoryContext;
            let scratch = (*context).ecxt_per_tuple_memory;
            let computed = self.computed_bytes();
            let mut bytes = computed;
            while self.rows.len() < wanted && (self.rows.is_empty() || bytes < limit) {
                if self.held.is_null() {
                    let slot = exec::next_row(child);
                    if exec::is_empty(slot) {
                        self.ended = true;
                        return;
                    }
                    self.held = slot;
                }
                exec::reset(scratch);
                (*context).ecxt_outertuple = self.held;
                pg_sys::CurrentMemoryContext = scratch;
                let mut odd = None;
                for (at, call) in self.calls.iter_mut().enumerate() {
                    if !call.layout.early {
                        call.places.push(None);
                        continue;
                    }
                    match call.gather(context, self.held) {
                        Gathered::Null => call.places.push(None),
                        Gathered::Added => call.places.push(Some(call.gathered() as u32 - 1)),
                        Gathered::Odd => {
                            odd = Some(at);
                            break;
                        }
                    }
                    bytes += match call.layout.by_row {
                        true => call.input_bytes,
                        false => call.rows.bytes() / call.rows.rows().max(1),
                    };
                }
                pg_sys::CurrentMemoryContext = caller;
                if let Some(at) = odd {
                    self.calls[..at].iter_mut().for_each(CallState::undo);
                    return;
                }
                bytes = bytes.saturating_add(self.keep()).saturating_add(computed);
                self.fetched_bytes = bytes;
                if self.rows.len() == 1 {
                    if self.calls.iter().any(CallState::is_wider) {
                        // What such rows take is known after one of them.
                        self.size = 1;
                        return;
                    }
                    let expected = wanted.min(limit / (bytes - computed).max(1));
                    self.calls.iter_mut().filter(|call| call.layout.early).for_each(|call| call.rows.reserve(expected));
                }
            }
        }
    }

    /// Bytes that predicting a row takes beyond those of its columns: what each call holds, and what one at a time computes.
    fn computed_bytes(&self) -> usize {
        let held: usize = self.calls.iter().map(CallState::held_bytes).sum();
        held.saturating_add(self.calls.iter().map(CallState::passing_bytes).max().unwrap_or(0))
    }

    /// Makes the held row the last one of the batch: its kept columns are copied. Returns their bytes.
    ///
    /// # Safety
    /// As [`exec`] says; a row is held.
    unsafe fn keep(&mut self) -> usize {
        // SAFETY: by the contract; the kept columns have the types that the plan says.
        unsafe {
            let caller = pg_sys::CurrentMemoryContext;
            pg_sys::CurrentMemoryContext = self.batch_context;
            let mut bytes = 16 * self.width;
            for &(column, by_value, len) in &self.copies {
                // An expanded array is flat, and shows its size, when it is copied.
                let copied = exec::column(self.held, column).map(|value| exec::copy(value, by_value, len));
                if let (Some(copied), -1) = (copied, len) {
                    bytes += pgrx::varsize_any(copied.cast_mut_ptr());
                }
                self.nulls.push(copied.is_none());
                self.values.push(copied.unwrap_or(pg_sys::Datum::from(0)));
            }
            if !self.table_scan.is_null() {
                let slot = (*self.table_scan).ss_ScanTupleSlot;
                self.origins.push(((*slot).tts_tid, (*slot).tts_tableOid));
            }
            pg_sys::CurrentMemoryContext = caller;
            self.values.resize(self.values.len() + self.calls.len(), pg_sys::Datum::from(0));
            self.nulls.resize(self.nulls.len() + self.calls.len(), true);
            self.rows.push(Row::At { stage: 0, computed: false });
            self.held = std::ptr::null_mut();
            bytes
        }
    }

    /// Makes the held row a batch of its own, and has the functions themselves compute its early calls.
    ///
    /// # Safety
    /// As [`exec`] says; a row is held.
    unsafe fn take_alone(&mut self, context: *mut pg_sys::ExprContext) {
        // SAFETY: by the contract.
        unsafe {
            let caller = pg_sys::CurrentMemoryContext;
            (*context).ecxt_outertuple = self.held;
            self.keep();
            pg_sys::CurrentMemoryContext = self.batch_context;
            for at in 0..self.calls.len() {
                self.calls[at].places.push(None);
                if self.calls[at].layout.early {
                    let value = exec::evaluate(self.calls[at].whole, context);
                    self.put(0, at, value);
                }
            }
            pg_sys::CurrentMemoryContext = caller;
        }
        // Of the first stage only nested calls, which are not early, are left to do.
        if self.calls.iter().all(|call| call.layout.stage > 0 || call.layout.early) {
            self.rows[0] = Row::At { stage: 0, computed: true };
        }
    }

    /// Predicts the batch, stage by stage.
    ///
    /// # Safety
    /// `node` is the node of this state.
    pub(super) unsafe fn compute(&mut self, node: *mut pg_sys::CustomScanState) {
        // SAFETY: by the contract.
        unsafe {
            for stage in 0..=self.conditions.len() {
                if self.rows.is_empty() {
                    return;
                }
                self.odd.clear();
                self.odd.resize(self.rows.len(), false);
                for at in 0..self.calls.len() {
                    if self.calls[at].layout.stage == stage {
                        self.predict(node, at);
                    }
                }
                for (row, &odd) in self.rows.iter_mut().zip(&self.odd) {
                    if *row == (Row::At { stage, computed: false }) && !odd {
                        *row = Row::At { stage, computed: true };
                    }
                }
                // A condition is evaluated ahead only to spare calls.
                if !self.calls.iter().any(|call| call.layout.stage > stage) {
                    return;
                }
                for row in 0..self.rows.len() {
                    if self.rows[row] == (Row::At { stage, computed: true }) {
                        let context = (*node).ss.ps.ps_ExprContext;
                        exec::reset((*context).ecxt_per_tuple_memory);
                        (*context).ecxt_scantuple = (*node).ss.ss_ScanTupleSlot;
                        self.show((*node).ss.ss_ScanTupleSlot, row);
                        let met = self.meets(node, stage);
                        self.rows[row] = if met { Row::At { stage: stage + 1, computed: false } } else { Row::Dropped };
                    }
                }
            }
        }
    }

    /// True if the shown row meets a condition.
    ///
    /// # Safety
    /// `node` is the node of this state, and its slot has the row.
    unsafe fn meets(&self, node: *mut pg_sys::CustomScanState, condition: usize) -> bool {
        // SAFETY: by the contract.
        unsafe {
            let Some(&state) = self.conditions.get(condition) else { return true };
            let met = exec::meets(state, (*node).ss.ps.ps_ExprContext);
            let instrument = (*node).ss.ps.instrument;
            if !met && !instrument.is_null() {
                (*instrument).nfiltered1 += 1.0;
            }
            met
        }
    }

    /// Computes a call for all rows that are at its stage. Those with which no batch can be made are noted as odd.
    ///
    /// # Safety
    /// `node` is the node of this state.
    unsafe fn predict(&mut self, node: *mut pg_sys::CustomScanState, at: usize) {
        let stage = self.calls[at].layout.stage;
        let waiting = Row::At { stage, computed: false };
        self.chosen.clear();
        self.chosen.extend((0..self.rows.len()).filter(|&row| self.rows[row] == waiting && !self.odd[row]));
        if !self.calls[at].layout.early {
            // SAFETY: by the contract.
            unsafe { self.gather_late(node, at) };
        }
        if self.calls[at].layout.by_row {
            // SAFETY: by the contract.
            return unsafe { self.predict_by_row(at) };
        }
        // A row that was taken alone has been computed as far as it is early.
        let call = &self.calls[at];
        let Some(model) = &call.model else { return };
        if call.rows.rows() == 0 {
            return;
        }
        let input_bytes = call.rows.bytes() / call.rows.rows();
        if call.input_bytes != input_bytes || call.run_bytes == 0 {
            let run_bytes = model.run_bytes(&call.rows);
            (self.calls[at].input_bytes, self.calls[at].run_bytes) = (input_bytes, run_bytes);
        }
        let call = &self.calls[at];
        let Some(model) = &call.model else { return };
        self.activity.get_or_insert_with(|| Activity::begin(Work::Predict, Some(model.content_hash())));
        // Less than the batch where its rows are wider than those before it.
        let at_a_time = (settings::batch_bytes() / call.passing_bytes().max(1)).max(1);
        let mut made = Vec::with_capacity(call.rows.rows());
        // SAFETY: a context of this scan; on an ERROR the transaction's end takes care of the current one.
        let result = unsafe {
            let caller = pg_sys::CurrentMemoryContext;
            pg_sys::CurrentMemoryContext = self.batch_context;
            let (mut done, mut from, mut result) = (self.done, 0, Ok(0));
            while from < call.rows.rows() && result.is_ok() {
                let to = from.saturating_add(at_a_time).min(call.rows.rows());
                result = model.predict(&call.rows, from..to, &mut done, |value| made.push(value));
                from = to;
            }
            pg_sys::CurrentMemoryContext = caller;
            self.done = done;
            self.publish();
            result
        };
        match result {
            Ok(bytes) => {
                self.calls[at].output_bytes = bytes;
                for n in 0..self.chosen.len() {
                    let row = self.chosen[n];
                    if let Some(place) = self.calls[at].places[row] {
                        self.put(row, at, Some(made[place as usize]));
                    }
                }
            }
            Err(error) => {
                raise_if_cancelled(&error);
                if error.kind == ErrorKind::TooLarge {
                    self.within = (call.rows.rows() / 2).max(1);
                }
                // Each is computed alone when its turn has come.
                self.chosen.iter().for_each(|&row| self.odd[row] = true);
            }
        }
    }

    /// Computes a call whose rows name their models.
    ///
    /// # Safety
    /// As [`exec`] says.
    unsafe fn predict_by_row(&mut self, at: usize) {
        let call = &self.calls[at];
        if call.by_row.rows() == 0 {
            return;
        }
        let input_bytes = call.by_row.bytes() / call.by_row.rows();
        let run_bytes = call.by_row.run_bytes();
        let content_hash = call.by_row.content_hash();
        self.activity.get_or_insert_with(|| Activity::begin(Work::Predict, content_hash.as_ref()));
        // SAFETY: a context of this scan; on an ERROR the transaction's end takes care of the current one.
        let (made, output_bytes) = unsafe {
            let caller = pg_sys::CurrentMemoryContext;
            pg_sys::CurrentMemoryContext = self.batch_context;
            let mut done = self.done;
            let made = self.calls[at].by_row.predict(&mut done);
            pg_sys::CurrentMemoryContext = caller;
            self.done = done;
            self.publish();
            made
        };
        let call = &mut self.calls[at];
        (call.input_bytes, call.run_bytes, call.output_bytes) = (input_bytes, run_bytes, output_bytes);
        for n in 0..self.chosen.len() {
            let row = self.chosen[n];
            let Some(place) = self.calls[at].places[row] else { continue };
            match made[place as usize] {
                Some(value) => self.put(row, at, Some(value)),
                // It is computed alone when its turn has come.
                None => self.odd[row] = true,
            }
        }
    }

    /// Gathers the inputs of a call from the rows of the batch.
    ///
    /// # Safety
    /// As [`exec`] says; `node` is the node of this state.
    unsafe fn gather_late(&mut self, node: *mut pg_sys::CustomScanState, at: usize) {
        // SAFETY: by the contract.
        unsafe {
            let (context, slot) = ((*node).ss.ps.ps_ExprContext, (*node).ss.ss_ScanTupleSlot);
            let caller = pg_sys::CurrentMemoryContext;
            (*context).ecxt_scantuple = slot;
            self.calls[at].clear();
            self.calls[at].places.resize(self.rows.len(), None);
            for n in 0..self.chosen.len() {
                let row = self.chosen[n];
                exec::reset((*context).ecxt_per_tuple_memory);
                self.show(slot, row);
                pg_sys::CurrentMemoryContext = (*context).ecxt_per_tuple_memory;
                let call = &mut self.calls[at];
                let batched =
                    call.layout.by_row || !call.refused && call.model.as_ref().is_none_or(|model| model.batched);
                if !batched {
                    self.odd[row] = true;
                    continue;
                }
                match call.gather(context, slot) {
                    Gathered::Null => {}
                    Gathered::Added => call.places[row] = Some(call.gathered() as u32 - 1),
                    Gathered::Odd => self.odd[row] = true,
                }
            }
            pg_sys::CurrentMemoryContext = caller;
        }
    }

    /// Does what a row lacks, now that its turn has come and it is in the node's slot. False if it does not meet a condition.
    ///
    /// # Safety
    /// `node` is the node of this state.
    pub(super) unsafe fn finish_row(&mut self, node: *mut pg_sys::CustomScanState, row: usize) -> bool {
        let Row::At { mut stage, mut computed } = self.rows[row] else { return false };
        // SAFETY: by the contract.
        unsafe {
            let (context, slot) = ((*node).ss.ps.ps_ExprContext, (*node).ss.ss_ScanTupleSlot);
            loop {
                for at in 0..self.calls.len() {
                    if !computed && self.calls[at].layout.stage == stage {
                        self.predict_one(context, row, at);
                        self.show(slot, row);
                    }
                }
                if stage == self.conditions.len() {
                    return true;
                }
                if !self.meets(node, stage) {
                    return false;
                }
                (stage, computed) = (stage + 1, false);
            }
        }
    }

    /// Computes a call for one row, which is in the node's slot.
    ///
    /// # Safety
    /// `context` is the node's.
    unsafe fn predict_one(&mut self, context: *mut pg_sys::ExprContext, row: usize, at: usize) {
        // SAFETY: by the contract. On an ERROR the transaction's end takes care of the current context.
        unsafe {
            let caller = pg_sys::CurrentMemoryContext;
            pg_sys::CurrentMemoryContext = self.batch_context;
            let call = &self.calls[at];
            if !call.layout.early {
                let value = exec::evaluate(call.whole, context);
                self.put(row, at, value);
            } else if let (true, Some(Some(place))) = (call.layout.by_row, call.places.get(row).copied()) {
                let mut done = self.done;
                let made = call.by_row.predict_one(place as usize, &mut done);
                self.done = done;
                self.publish();
                self.put(row, at, made);
            } else if let (Some(Some(place)), Some(model)) = (call.places.get(row).copied(), &call.model) {
                let place = place as usize;
                let (mut done, mut made) = (self.done, None);
                let result = model.predict(&call.rows, place..place + 1, &mut done, |value| made = Some(value));
                result.unwrap_or_else(|error| crate::pg::interrupt::raise_or_model(error));
                self.done = done;
                self.publish();
                self.put(row, at, made);
            }
            pg_sys::CurrentMemoryContext = caller;
        }
    }
}
