//! Verdicts on rows, and whether they are true: stacked rows against each row alone.

use super::*;
use crate::kernels::tests::{Random, close};
use crate::plan::rows::Rows;

mod chains;
mod hostile;
mod proven;
mod sizes;

/// Rows of a stack.
const ROWS: usize = 5;
/// Free dimensions other than the rows'.
const OTHER: usize = 3;

/// A tensor's elements along an axis from `start` on, `count` of them. Elements have four or eight bytes.
fn cut(tensor: &HostTensor, axis: usize, start: usize, count: usize) -> HostTensor {
    let TensorData::Raw(raw) = &tensor.data else { panic!("strings") };
    let before: usize = tensor.shape[..axis].iter().product();
    let bytes = raw.len() / (before * tensor.shape[axis]).max(1);
    let mut kept = Vec::new();
    for outer in 0..before {
        let first = (outer * tensor.shape[axis] + start) * bytes;
        kept.extend_from_slice(&raw[first..first + count * bytes]);
    }
    let mut shape = tensor.shape.clone();
    shape[axis] = count;
    HostTensor::new(tensor.dtype, shape, TensorData::Raw(kept)).unwrap()
}

/// Indices of one size put together along an axis.
fn stack(parts: &[HostTensor], axis: usize) -> HostTensor {
    let before: usize = parts[0].shape[..axis].iter().product();
    let mut raw = Vec::new();
    for outer in 0..before {
        for part in parts {
            let TensorData::Raw(bytes) = &part.data else { panic!("strings") };
            let each = bytes.len() / before;
            raw.extend_from_slice(&bytes[outer * each..(outer + 1) * each]);
        }
    }
    let mut shape = parts[0].shape.clone();
    shape[axis] = parts.iter().map(|part| part.shape[axis]).sum();
    HostTensor::new(parts[0].dtype, shape, TensorData::Raw(raw)).unwrap()
}

fn values(tensor: &HostTensor) -> Vec<f32> {
    let TensorData::Raw(raw) = &tensor.data else { panic!("strings") };
    match tensor.dtype {
        PortType::Fixed(DType::Int64) => {
            raw.chunks_exact(8).map(|bytes| i64::from_le_bytes(bytes.try_into().unwrap()) as f32).collect()
        }
        _ => tensor.to_f32().unwrap().to_vec(),
    }
}

/// Inputs for this signature, with so many rows along these axes. Integers are small and not negative.
fn inputs(plan: &Plan, axes: &[usize], rows: usize, random: &mut Random) -> Vec<(String, HostTensor)> {
    let mut made = Vec::new();
    for (port, &axis) in plan.signature().inputs.iter().zip(axes) {
        let size = |(at, dim): (usize, &crate::signature::Dim)| match dim {
            crate::signature::Dim::Fixed(size) => *size as usize,
            _ if at == axis => rows,
            _ => OTHER,
        };
        let shape: Vec<usize> = port.shape.iter().enumerate().map(size).collect();
        let count = shape.iter().product();
        let tensor = match port.dtype {
            PortType::Fixed(DType::Int64) => {
                i64s(&shape, &(0..count).map(|_| random.below(4) as i64).collect::<Vec<_>>())
            }
            _ => f32s(&shape, &random.values(count)),
        };
        made.push((port.name.clone(), tensor));
    }
    made
}

/// Compares a run on stacked rows with runs on each, and on the rows in another order. Does nothing for a plan whose rows are
/// dependent.
fn compare(plan: &Plan, random: &mut Random, what: &str) {
    let Rows::Independent { inputs: axes, outputs, .. } = plan.rows() else { return };
    let cancel = AtomicBool::new(false);
    let stacked = inputs(plan, axes, ROWS, random);
    let row = |row: usize| -> Vec<(String, HostTensor)> {
        stacked.iter().zip(axes).map(|((name, tensor), &axis)| (name.clone(), cut(tensor, axis, row, 1))).collect()
    };
    let Ok(whole) = plan.run(stacked.clone(), &cancel) else {
        // A graph that cannot be computed, with one row or many.
        assert!((0..ROWS).any(|at| plan.run(row(at), &cancel).is_err()), "{what}: only a stack fails");
        return;
    };
    let order: Vec<usize> = (0..ROWS).map(|place| (place * 2 + 1) % ROWS).collect();
    let parts: Vec<_> = order.iter().map(|&at| row(at)).collect();
    let shuffled = (0..axes.len()).map(|input| {
        let tensors: Vec<HostTensor> = parts.iter().map(|part| part[input].1.clone()).collect();
        (stacked[input].0.clone(), stack(&tensors, axes[input]))
    });
    let shuffled = plan.run(shuffled.collect(), &cancel).unwrap();
    for (place, &at) in order.iter().enumerate() {
        let alone = plan.run(row(at), &cancel).unwrap();
        for ((alone, &axis), (whole, shuffled)) in alone.iter().zip(outputs).zip(whole.iter().zip(&shuffled)) {
            assert_eq!(alone.1.shape[axis], 1, "{what}");
            assert_eq!(whole.1.shape[axis], ROWS, "{what}");
            let expected = values(&alone.1);
            close(&values(&cut(&whole.1, axis, at, 1)), &expected, 1e-5, &format!("{what}, row {at} of a stack"));
            close(
                &values(&cut(&shuffled.1, axis, place, 1)),
                &expected,
                1e-5,
                &format!("{what}, row {at} in another place"),
            );
        }
    }
}

/// Checks that the rows are proven independent, along these axes, and that they are.
fn independent(what: &str, graph: GraphProto, inputs: &[usize], outputs: &[usize]) {
    let plan = compile(graph).unwrap_or_else(|error| panic!("{what}: {error:?}"));
    match plan.rows() {
        Rows::Independent { inputs: i, outputs: o, .. } => assert_eq!((&i[..], &o[..]), (inputs, outputs), "{what}"),
        Rows::Dependent { reason } => panic!("{what}: {reason}"),
    }
    compare(&plan, &mut Random::new(7), what);
}

/// Checks that the rows are not proven independent, for a reason with this in it.
fn dependent(what: &str, graph: GraphProto, reason: &str) {
    let plan = compile(graph).unwrap_or_else(|error| panic!("{what}: {error:?}"));
    let given = plan.rows().reason().unwrap_or_else(|| panic!("{what} is said to be independent"));
    assert!(given.contains(reason), "{what}: {given}");
}

/// A graph of x, [n, 4], and y of any shape.
fn of_rows(nodes: Vec<NodeProto>, initializers: Vec<TensorProto>) -> GraphProto {
    of(&[N("n"), S(4)], nodes, initializers)
}

/// A graph of x of this shape and y of any.
fn of(shape: &[D], nodes: Vec<NodeProto>, initializers: Vec<TensorProto>) -> GraphProto {
    graph(vec![info("x", FLOAT, shape)], vec![info("y", FLOAT, &[])], nodes, initializers)
}
