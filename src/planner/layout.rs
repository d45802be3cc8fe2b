//! What the planner tells the executor about a node, in a form that plans can be copied and sent to workers with.

use super::calls::Elements;
use crate::pg::nodes;
use pgrx::pg_sys;

/// Changes with the meaning of the numbers: a plan does not outlive its library, but its workers may have another one.
const FORMAT: i32 = 2;

/// One call of `predict`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CallLayout {
    /// Its arguments are evaluated on the child's row when that is fetched, and are not needed after; else on the node's own
    /// row.
    pub early: bool,
    /// Element type of the array that it takes.
    pub elements: Elements,
    /// The condition for which it is needed first, by number; their count if for the target list only.
    pub stage: usize,
    /// Each row names the model.
    pub by_row: bool,
}

/// The row of a node: columns kept of the child's row, then one column for each call.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Layout {
    /// The child's columns, from 1.
    pub kept: Vec<usize>,
    pub calls: Vec<CallLayout>,
}

impl Layout {
    /// As a list for a plan.
    pub fn to_list(&self) -> *mut pg_sys::List {
        let mut numbers = vec![FORMAT, self.kept.len() as i32];
        numbers.extend(self.kept.iter().map(|&column| column as i32));
        for call in &self.calls {
            numbers.extend([i32::from(call.early), call.elements.number(), call.stage as i32, i32::from(call.by_row)]);
        }
        nodes::number_list(numbers)
    }

    /// From the list of a plan; none if it is not one that this library has made.
    pub fn of_numbers(numbers: &[i32]) -> Option<Layout> {
        let (&format, rest) = numbers.split_first()?;
        let (&count, rest) = rest.split_first()?;
        let (kept, calls) = rest.split_at_checked(usize::try_from(count).ok()?)?;
        if format != FORMAT || !calls.len().is_multiple_of(4) {
            return None;
        }
        let call = |numbers: &[i32]| {
            Some(CallLayout {
                early: numbers[0] != 0,
                elements: Elements::of_number(numbers[1])?,
                stage: usize::try_from(numbers[2]).ok()?,
                by_row: numbers[3] != 0,
            })
        };
        let kept = kept.iter().map(|&column| usize::try_from(column).ok().filter(|column| *column > 0));
        Some(Layout {
            kept: kept.collect::<Option<_>>()?,
            calls: calls.chunks_exact(4).map(call).collect::<Option<_>>()?,
        })
    }
}
