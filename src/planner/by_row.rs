//! A call of `predict` whose model is named by each row: rows are gathered by model, and each model runs on its own.
//!
//! Members of a set of feed-forward nets are one group, whatever their number: their rows go together through [`OpenSet::predict`].
//! Other models have a group each, in which rows are stacked as in a call for one model.
//!
//! Invariant: what a name means is looked up anew for each batch, as for a call for one model.

use super::batch::{Done, InUse, raise_if_cancelled};
use super::calls::Elements;
use crate::cache;
use crate::catalog::{self, sets::split_member};
use crate::pg::{array, interrupt};
use crate::serving::sets::{self, Member, OpenSet};
use crate::serving::settings;
use inference::array::RowBuffer;
use inference::error::ModelError;
use inference::signature::Port;
use pgrx::pg_sys;
use std::collections::HashMap;
use std::rc::Rc;
use std::time::Instant;

/// Groups of a batch: each holds a plan.
const GROUPS: usize = 64;

enum Of {
    Model(Box<InUse>),
    Set { set: Rc<OpenSet>, port: Port, members: Vec<Member> },
}

struct Group {
    name: String,
    of: Of,
    rows: RowBuffer,
    /// Looked up for this batch.
    current: bool,
}

/// Where a gathered row is: its group, and its number there.
#[derive(Clone, Copy)]
struct At {
    group: u32,
    row: u32,
}

/// The rows of a call, by model.
#[derive(Default)]
pub struct ByRow {
    groups: Vec<Group>,
    /// Groups by the name of their model or set.
    names: HashMap<String, usize>,
    gathered: Vec<At>,
}

impl ByRow {
    /// Forgets the rows; names are looked up anew.
    pub fn clear(&mut self) {
        if self.groups.len() > GROUPS / 2 {
            self.groups.clear();
            self.names.clear();
        }
        for group in &mut self.groups {
            group.rows.clear();
            group.current = false;
            if let Of::Set { members, .. } = &mut group.of {
                members.clear();
            }
        }
        self.gathered.clear();
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.gathered.len()
    }

    /// Forgets the last row.
    pub fn pop(&mut self) {
        if let Some(at) = self.gathered.pop() {
            let group = &mut self.groups[at.group as usize];
            group.rows.pop();
            if let Of::Set { members, .. } = &mut group.of {
                members.pop();
            }
        }
    }

    /// Adds a row for the model `spec`, an array of these elements without nulls. False if it does not fit.
    pub fn push(&mut self, spec: &str, elements: Elements, bytes: &[u8]) -> bool {
        let member = split_member(spec);
        let known = member.and_then(|(set, member)| {
            let at = *self.names.get(set)?;
            self.is_current(at).then_some((at, member))
        });
        let known = known.or_else(|| self.set_group(member?)).map(|(at, member)| (at, Some(member)));
        let Some((at, member)) = known.or_else(|| self.model_group(spec).map(|at| (at, None))) else { return false };
        let group = &mut self.groups[at];
        let pushed = match (&mut group.of, member) {
            (Of::Model(model), None) => model.push(&mut group.rows, elements, bytes),
            (Of::Set { set, port, members }, Some(name)) => {
                let found = set.find(name).filter(|found| set.recipe(*found).is_none());
                let pushed = found.is_some() && elements.push(&mut group.rows, port, bytes);
                members.extend(found.filter(|_| pushed));
                pushed
            }
            _ => false,
        };
        if pushed {
            self.gathered.push(At { group: at as u32, row: group.rows.rows() as u32 - 1 });
        }
        pushed
    }

    /// True if a group's name still means the same.
    fn is_current(&mut self, at: usize) -> bool {
        let group = &mut self.groups[at];
        if !group.current {
            group.current = match &group.of {
                Of::Model(model) => model.is(&group.name),
                Of::Set { set, .. } => sets::usable_set(&group.name).is_some_and(|now| Rc::ptr_eq(&now, set)),
            };
        }
        group.current
    }

    /// The group of a set of feed-forward nets; none if it is no such set.
    fn set_group<'m>(&mut self, (name, member): (&str, &'m str)) -> Option<(usize, &'m str)> {
        let set = sets::usable_set(name)?;
        let port = set.shared.net_port().filter(|_| set.shared.independent)?.clone();
        let at = self.add(name, Of::Set { set, port, members: Vec::new() })?;
        Some((at, member))
    }

    /// The group of a model; none if there is none that the role may use, or its rows do not go together.
    fn model_group(&mut self, spec: &str) -> Option<usize> {
        if let Some(&at) = self.names.get(spec)
            && self.is_current(at)
        {
            return Some(at);
        }
        if !sets::is_usable_member(spec).unwrap_or_else(|| catalog::is_usable(spec)) {
            return None;
        }
        let model = InUse::of(spec);
        if !model.batched {
            return None;
        }
        self.add(spec, Of::Model(Box::new(model)))
    }

    /// Adds a group, or puts what its name means now in the place of what it meant. None if there is no room for it in this batch.
    fn add(&mut self, name: &str, of: Of) -> Option<usize> {
        let group = Group { name: name.to_owned(), of, rows: RowBuffer::default(), current: true };
        match self.names.get(name) {
            // Within a batch a name means the same, so that there are no rows for what it meant.
            Some(&at) => {
                self.groups[at] = group;
                Some(at)
            }
            None if self.groups.len() < GROUPS => {
                self.groups.push(group);
                self.names.insert(name.to_owned(), self.groups.len() - 1);
                Some(self.groups.len() - 1)
            }
            None => None,
        }
    }

    /// Bytes that the models' values take at a time for a row, as [`InUse::run_bytes`].
    pub fn run_bytes(&self) -> usize {
        let of_group = |group: &Group| match &group.of {
            Of::Model(model) if group.rows.rows() > 0 => model.run_bytes(&group.rows),
            _ => 0,
        };
        self.groups.iter().map(of_group).max().unwrap_or(0)
    }

    /// Bytes of all rows.
    pub fn bytes(&self) -> usize {
        self.groups.iter().map(|group| group.rows.bytes()).sum()
    }

    /// What is shown of progress: a model's or a set's content hash.
    pub fn content_hash(&self) -> Option<[u8; 32]> {
        self.groups.iter().find(|group| group.rows.rows() > 0).map(|group| match &group.of {
            Of::Model(model) => *model.content_hash(),
            Of::Set { set, .. } => *set.content_hash(),
        })
    }

    /// Predicts all rows; the arrays, in the current memory context, by the order in which rows were added. None for those whose model
    /// cannot compute them. Returns the bytes of the largest one too.
    pub fn predict(&self, done: &mut Done) -> (Vec<Option<pg_sys::Datum>>, usize) {
        let mut by_group = Vec::with_capacity(self.groups.len());
        let mut largest = 0;
        for group in &self.groups {
            let mut made = Vec::with_capacity(group.rows.rows());
            if group.rows.rows() > 0 {
                match group.predict(0..group.rows.rows(), done, &mut made) {
                    Ok(bytes) => largest = largest.max(bytes),
                    Err(error) => {
                        raise_if_cancelled(&error);
                        made.clear();
                    }
                }
            }
            by_group.push(made);
        }
        let value = |at: &At| by_group[at.group as usize].get(at.row as usize).copied();
        (self.gathered.iter().map(value).collect(), largest)
    }

    /// Predicts a row. ERROR if its model cannot compute it.
    pub fn predict_one(&self, row: usize, done: &mut Done) -> Option<pg_sys::Datum> {
        let at = self.gathered[row];
        let (group, row) = (&self.groups[at.group as usize], at.row as usize);
        let mut made = Vec::new();
        group.predict(row..row + 1, done, &mut made).unwrap_or_else(|error| interrupt::raise_or_model(error));
        made.pop()
    }
}

impl Group {
    fn predict(
        &self,
        range: std::ops::Range<usize>,
        done: &mut Done,
        made: &mut Vec<pg_sys::Datum>,
    ) -> Result<usize, ModelError> {
        match &self.of {
            Of::Model(model) => {
                let (mut from, mut bytes) = (range.start, 0);
                while from < range.end {
                    let to = from.saturating_add(settings::batch_size()).min(range.end);
                    bytes = model.predict(&self.rows, from..to, done, |value| made.push(value))?;
                    from = to;
                }
                Ok(bytes)
            }
            Of::Set { set, members, .. } => {
                let (begin, [hits, misses]) = (Instant::now(), cache::session_counts());
                let count = range.len();
                let mut out = Vec::new();
                let width = set.predict(&members[range.clone()], &self.rows.floats(range), &mut out);
                done.time += begin.elapsed();
                let now = cache::session_counts();
                (done.hits, done.misses) = (done.hits + now[0] - hits, done.misses + now[1] - misses);
                done.batches += 1;
                done.rows += count as u64;
                array::rows_from_f32(&out, count, width, &mut |value| made.push(value));
                Ok(array::f32_row_bytes(width))
            }
        }
    }
}
