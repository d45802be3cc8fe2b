//! How the axes of a stored tensor's view relate to the matrix that its blocks tile.
//!
//! Responsible for: following a tensor through changes of axes, so that an operator that uses the changed tensor knows
//! which of its axes walk the matrix's rows and which its columns.

use crate::weights::StoredTensor;
use tensor_blocks::View;
use tract_onnx::tract_hir::internal::*;

/// One axis of a view: an axis of the tensor as it is stored, or none for an axis of size 1 that was added.
pub(super) type Axis = Option<usize>;

/// A stored tensor with its axes moved, added and removed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct StoredView {
    pub axes: TVec<Axis>,
    /// Sizes of the stored axes.
    dims: TVec<usize>,
}

impl StoredView {
    /// The tensor as it is stored.
    pub fn of(tensor: &StoredTensor) -> StoredView {
        StoredView { axes: (0..tensor.dims.len()).map(Some).collect(), dims: tensor.dims.iter().copied().collect() }
    }

    /// The view after a change; none if it mixes axes.
    pub fn change(&self, change: &AxisOp) -> Option<StoredView> {
        let mut axes = self.axes.clone();
        match *change {
            AxisOp::Add(at) if at <= axes.len() => axes.insert(at, None),
            AxisOp::Rm(at) if at < axes.len() && self.size(at) == 1 => {
                axes.remove(at);
            }
            AxisOp::Move(from, to) if from < axes.len() && to < axes.len() => {
                let axis = axes.remove(from);
                axes.insert(to, axis);
            }
            _ => return None,
        }
        Some(StoredView { axes, dims: self.dims.clone() })
    }

    /// Size of an axis of the view.
    pub fn size(&self, axis: usize) -> usize {
        self.axes[axis].map_or(1, |stored| self.dims[stored])
    }
}

/// The stored axes, of a size other than 1, that walk the rows and the columns of the matrix, outermost first.
pub(super) fn matrix_axes(tensor: &StoredTensor) -> Option<(TVec<usize>, TVec<usize>)> {
    let rank = tensor.dims.len();
    if tensor.dtype().is_packed() || rank == 0 {
        return None;
    }
    let (rows, cols): (TVec<usize>, TVec<usize>) = match tensor.tiling.view() {
        View::RowsByLast => ((0..rank - 1).collect(), tvec!(rank - 1)),
        View::RowsByFirst if rank == 1 => (tvec!(), tvec!(0)),
        View::RowsByFirst => (tvec!(0), (1..rank).collect()),
        View::Transposed => (tvec!(1), tvec!(0)),
    };
    let wide = |axes: TVec<usize>| axes.into_iter().filter(|&axis| tensor.dims[axis] != 1).collect();
    Some((wide(rows), wide(cols)))
}
