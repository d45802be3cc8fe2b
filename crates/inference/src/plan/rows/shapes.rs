//! Shapes and the axis of rows: algebra of sizes, and the operators that change shapes.

use super::super::branch::Branch;
use super::{Run, State};
use tract_onnx::tract_core::ops::array::StridedSlice;
use tract_onnx::tract_hir::internal::*;

/// True if the size depends on this free dimension.
pub(super) fn has(dim: &TDim, symbol: &Symbol) -> bool {
    dim.symbols().contains(symbol)
}

/// True if two sizes are equal whatever the free dimensions are.
pub(super) fn same(left: &TDim, right: &TDim) -> bool {
    left == right || (left.clone() - right).simplify() == TDim::Val(0)
}

/// The quotient, if there is no rest.
fn over(dividend: &TDim, divisor: &TDim) -> Option<TDim> {
    if same(dividend, divisor) {
        return Some(1.to_dim());
    }
    let (quotient, rest) = dividend.maybe_div(divisor).ok()?;
    let whole = rest == 1 && same(&(quotient.clone() * divisor), dividend);
    whole.then_some(quotient)
}

fn product(dims: &[TDim]) -> TDim {
    dims.iter().fold(1.to_dim(), |product, dim| product * dim)
}

/// A node that computes a truth value from the size of this free dimension, in bodies of branches too.
pub(super) fn comparison(model: &InferenceModel, symbol: &Symbol) -> Option<String> {
    let of_rows = |outlet: &OutletId| {
        let Some(value) = model.outlet_fact(*outlet).ok().and_then(|fact| fact.value.concretize()) else {
            return false;
        };
        let Ok(view) = value.try_as_plain_ram() else { return false };
        view.as_slice::<TDim>().is_ok_and(|dims| dims.iter().any(|dim| has(dim, symbol)))
    };
    model.nodes.iter().find_map(|node| {
        let bodies = node.op.as_op().downcast_ref::<Branch>().into_iter().flat_map(Branch::bodies);
        let inside = bodies.into_iter().find_map(|body| comparison(body, symbol));
        let truth = node.outputs.iter().any(|outlet| outlet.fact.datum_type.concretize() == Some(DatumType::Bool));
        inside.or_else(|| (truth && node.inputs.iter().any(of_rows)).then(|| node.name.clone()))
    })
}

/// An end of a slice from which on exporters mean "to the end": more rows than a run can have.
const BEHIND_ALL: i64 = 1_000_000_000;

/// Slices that go to [`BEHIND_ALL`] get an end that tract knows to be none: with a free dimension it takes others as they are.
pub(super) fn leave_whole(model: &mut InferenceModel) -> TractResult<()> {
    for id in 0..model.nodes.len() {
        if !model.nodes[id].op_is::<StridedSlice>() {
            continue;
        }
        let Some(end) = model.outlet_fact(model.nodes[id].inputs[2])?.value.concretize() else { continue };
        if !end.datum_type().is_integer() {
            continue;
        }
        let mut ends = end.cast_to::<i64>()?.into_owned();
        let mut plain = ends.try_as_plain_ram_mut()?;
        let values = plain.as_slice_mut::<i64>()?;
        if values.iter().any(|value| *value >= BEHIND_ALL) {
            values.iter_mut().filter(|value| **value >= BEHIND_ALL).for_each(|value| *value = i64::MAX);
            let constant = model.add_const(format!("{}.ends", model.nodes[id].name), ends.into_arc_tensor())?;
            model.add_edge(constant, InletId::new(id, 2))?;
        }
    }
    Ok(())
}

/// Where the rows are after an operator on axes.
pub(super) fn axis_op(op: &AxisOp, run: &Run, symbol: &Symbol) -> Result<State, String> {
    let axis = run.axis;
    let moved = match op {
        AxisOp::Add(at) => Some(axis + usize::from(axis >= *at)),
        AxisOp::Rm(at) if *at == axis => None,
        AxisOp::Rm(at) => Some(axis - usize::from(axis > *at)),
        AxisOp::Move(from, to) if axis == *from => Some(*to),
        AxisOp::Move(from, to) => {
            let without = axis - usize::from(axis > *from);
            Some(without + usize::from(without >= *to))
        }
        AxisOp::Reshape(at, from, to) => {
            if (*at..at + from.len()).contains(&axis) {
                return reshape(*at, from, to, run, symbol);
            }
            Some(if axis < *at { axis } else { axis + to.len() - from.len() })
        }
    };
    moved.map(|axis| State::Rows(run.moved(axis))).ok_or_else(|| "removes the axis of the rows".into())
}

/// A reshape of axes one of which has the rows: what is before and after them is spread over the new axes.
fn reshape(at: usize, from: &[TDim], to: &[TDim], run: &Run, symbol: &Symbol) -> Result<State, String> {
    let place = run.axis - at;
    let before = product(&from[..place]) * &run.before;
    let after = product(&from[place + 1..]) * &run.after;
    let found = to.iter().position(|dim| has(dim, symbol)).and_then(|place| {
        let before = over(&before, &product(&to[..place]))?;
        let after = over(&after, &product(&to[place + 1..]))?;
        let size = before.clone() * symbol.to_dim() * &after;
        same(&size, &to[place]).then_some(Run { axis: at + place, before, after })
    });
    found.map(State::Rows).ok_or_else(|| "mixes rows with what is within them".into())
}

/// A value of this shape repeated to that one.
pub(super) fn broadcast(from: &ShapeFact, to: &ShapeFact, state: &State, symbol: &Symbol) -> Result<State, String> {
    let more = to.rank().checked_sub(from.rank()).ok_or("makes a shape that is not understood")?;
    match state {
        State::Rows(run) => Ok(State::Rows(run.moved(run.axis + more))),
        State::Count => Err("takes the number of rows as a value".into()),
        State::Free => {
            let Some(axis) = to.iter().position(|dim| has(dim, symbol)) else { return Ok(State::Free) };
            // Every index along the axis has the same value, so each row has its own.
            let repeated = axis < more || from[axis - more].is_one();
            let after = over(&to[axis], &symbol.to_dim()).filter(|_| repeated);
            let after = after.ok_or("makes a shape that is not understood")?;
            Ok(State::Rows(Run { axis, before: 1.to_dim(), after }))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_followed_through_reshapes() {
        let scope = SymbolScope::default();
        let (rows, steps) = (scope.sym("n"), scope.sym("t"));
        let (n, t) = (rows.to_dim(), steps.to_dim());
        let go = |from: &[TDim], to: &[TDim], run: Run| match axis_op(
            &AxisOp::Reshape(0, from.into(), to.into()),
            &run,
            &rows,
        ) {
            Ok(State::Rows(run)) => Some(run),
            _ => None,
        };
        let four = 4.to_dim();
        // (n, t, 4) to (n t, 4), and back with the 4 before the rows' end.
        let flat = go(&[n.clone(), t.clone(), four.clone()], &[n.clone() * &t, four.clone()], Run::at(0)).unwrap();
        assert_eq!(flat, Run { axis: 0, before: 1.to_dim(), after: t.clone() });
        let back = go(&[n.clone() * &t, four.clone()], &[n.clone(), four.clone() * &t], flat).unwrap();
        assert_eq!(back, Run::at(0));
        // (t, n, 4) to (t n, 4): the rows are the quicker ones.
        let inner = go(&[t.clone(), n.clone(), four.clone()], &[t.clone() * &n, four.clone()], Run::at(1)).unwrap();
        assert_eq!(inner, Run { axis: 0, before: t.clone(), after: 1.to_dim() });
        // Which are not what comes out as (n, t, 4).
        assert_eq!(go(&[t.clone() * &n, four.clone()], &[n.clone(), t.clone(), four.clone()], inner), None);
        assert_eq!(go(&[n.clone(), 3.to_dim()], &[3.to_dim(), n.clone()], Run::at(0)), None);
        let halves = go(&[n.clone(), four.clone()], &[n.clone() * 2, 2.to_dim()], Run::at(0)).unwrap();
        assert_eq!(halves, Run { axis: 0, before: 1.to_dim(), after: 2.to_dim() });
        assert_eq!(go(&[n.clone() * 2, 2.to_dim()], &[n.clone(), four], halves), Some(Run::at(0)));
    }
}
