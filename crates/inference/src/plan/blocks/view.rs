//! How the axes of a stored tensor's view relate to the matrix that its blocks tile.
//!
//! Responsible for: following a tensor through changes of axes, so that an operator that uses the changed tensor knows
//! which of its axes walk the matrix's rows and which its columns.

use crate::weights::StoredTensor;
use tensor_blocks::View;
use tract_onnx::tract_hir::internal::*;

/// A part of an axis of the tensor as it is stored: which axis, and the part's place among the parts of that axis.
pub(super) type Part = (usize, usize);

/// One axis of a view.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Axis {
    /// None for an axis of size 1 that was added.
    part: Option<Part>,
    size: usize,
}

/// A stored tensor with its axes split, moved, added and removed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct StoredView {
    axes: TVec<Axis>,
    rank: usize,
}

impl StoredView {
    /// The tensor of these dimensions as it is stored.
    pub fn of(dims: &[usize]) -> StoredView {
        let axes = dims.iter().enumerate().map(|(at, &size)| Axis { part: Some((at, 0)), size }).collect();
        StoredView { axes, rank: dims.len() }
    }

    /// The view after a change; none if it mixes axes.
    pub fn change(&self, change: &AxisOp) -> Option<StoredView> {
        let mut axes = self.axes.clone();
        match change {
            AxisOp::Add(at) if *at <= axes.len() => axes.insert(*at, Axis { part: None, size: 1 }),
            AxisOp::Rm(at) if axes.get(*at)?.size == 1 => {
                axes.remove(*at);
            }
            AxisOp::Move(from, to) if *from < axes.len() && *to < axes.len() => {
                let axis = axes.remove(*from);
                axes.insert(*to, axis);
            }
            // One whole axis becomes several.
            AxisOp::Reshape(at, from, to) if from.len() == 1 => {
                let whole = axes.remove(*at);
                let (stored, 0) = whole.part? else { return None };
                if axes.iter().any(|axis| axis.part.is_some_and(|(other, _)| other == stored)) {
                    return None;
                }
                let sizes = to.iter().map(|dim| dim.to_usize().ok()).collect::<Option<TVec<usize>>>()?;
                if sizes.iter().product::<usize>() != whole.size {
                    return None;
                }
                for (place, size) in sizes.into_iter().enumerate() {
                    axes.insert(at + place, Axis { part: Some((stored, place)), size });
                }
            }
            _ => return None,
        }
        Some(StoredView { axes, rank: self.rank })
    }

    /// Size of an axis of the view.
    pub fn size(&self, axis: usize) -> usize {
        self.axes[axis].size
    }

    /// The part of a stored axis that an axis of the view is.
    pub fn part(&self, axis: usize) -> Option<Part> {
        self.axes[axis].part
    }

    /// True for the tensor as it is stored.
    pub fn is_plain(&self) -> bool {
        self.axes.len() == self.rank && self.axes.iter().enumerate().all(|(at, axis)| axis.part == Some((at, 0)))
    }

    /// The parts of these stored axes that are wider than 1, outermost first.
    pub fn parts_of(&self, stored: &[usize]) -> TVec<Part> {
        let wide = self.axes.iter().filter(|axis| axis.size != 1).filter_map(|axis| axis.part);
        let mut parts: TVec<Part> = wide.filter(|(axis, _)| stored.contains(axis)).collect();
        parts.sort_unstable();
        parts
    }
}

/// Axes of a tensor that walk the rows and the columns of a matrix, outermost first.
pub(super) type MatrixAxes = (TVec<usize>, TVec<usize>);

/// The stored axes that walk the rows and the columns of the matrix.
pub(super) fn matrix_axes(tensor: &StoredTensor) -> Option<MatrixAxes> {
    let rank = tensor.dims.len();
    if tensor.dtype().is_packed() || rank == 0 {
        return None;
    }
    Some(match tensor.tiling.view() {
        View::RowsByLast => ((0..rank - 1).collect(), tvec!(rank - 1)),
        View::RowsByFirst if rank == 1 => (tvec!(), tvec!(0)),
        View::RowsByFirst => (tvec!(0), (1..rank).collect()),
        View::Transposed => (tvec!(1), tvec!(0)),
    })
}
