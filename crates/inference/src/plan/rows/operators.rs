//! The table of operators: how each hands rows on.
//!
//! An operator that is not in it is not known to keep rows apart, and is refused. What is refused for a reason worth telling
//! is in [`obstacle`].

use super::super::blocks::StoredConst;
use super::super::classical::Rows as ClassicalModel;
use super::super::norm::LayerNorm;
use super::super::recurrent::layer::Layer;
use super::super::reduce::Extreme;
use super::super::{cast, modulo, ops, quantize};
use super::shapes::{axis_op, broadcast, has};
use super::{Run, State};
use tract_onnx::tract_core::ops::array::{
    CumSum, DynSlice, Gather, GatherElements, GatherNd, MultiBroadcastTo, OneHot, Pad, Range, ScatterElements, Slice,
    StridedSlice, Tile, Topk, Trilu, TypedConcat,
};
use tract_onnx::tract_core::ops::binary::TypedBinOp;
use tract_onnx::tract_core::ops::cast::Cast;
use tract_onnx::tract_core::ops::cnn::{Conv, Deconv, MaxPool, PoolSpec, SumPool};
use tract_onnx::tract_core::ops::downsample::Downsample;
use tract_onnx::tract_core::ops::einsum::EinSum;
use tract_onnx::tract_core::ops::element_wise::ElementWiseOp;
use tract_onnx::tract_core::ops::identity::Identity;
use tract_onnx::tract_core::ops::konst::Const;
use tract_onnx::tract_core::ops::logic::Iff;
use tract_onnx::tract_core::ops::nn::{NearestUpsample, Reduce, RmsNorm, Softmax};
use tract_onnx::tract_hir::internal::*;

/// Operators without a type to ask for that compute each element from those of the same place.
const ELEMENTWISE: &[&str] = &["DirectLookup", "ReverseLookup"];

/// Says why rows do not stay apart.
type Refused = String;

/// The states of a node's outputs for these of its inputs.
pub(super) fn rule(
    symbol: &Symbol,
    node: &TypedNode,
    given: &[State],
    facts: &[&TypedFact],
) -> Result<Vec<State>, Refused> {
    if let Some(constant) = node.op_as::<Const>() {
        return Ok(vec![constant_state(constant.val(), symbol)]);
    }
    if node.op_is::<StoredConst>() {
        return Ok(vec![State::Free]);
    }
    if let Some(state) = resize(node, given, facts)? {
        return Ok(vec![state]);
    }
    if let Some(state) = strided(symbol, node, given, facts)? {
        return Ok(vec![state]);
    }
    if given.contains(&State::Count) {
        return Err("takes the number of rows as a value".into());
    }
    let output = &node.outputs.first().ok_or("has no output")?.fact;
    if is_elementwise(node) {
        return elementwise(given, facts, output.rank()).map(one);
    }
    if let Some(product) = node.op_as::<EinSum>() {
        return einsum(product, given, facts).map(one);
    }
    if let Some(op) = node.op_as::<AxisOp>() {
        return match &given[0] {
            State::Rows(run) => axis_op(op, run, symbol).map(one),
            state => Ok(one(state.clone())),
        };
    }
    if let Some(to) = node.op_as::<MultiBroadcastTo>() {
        return broadcast(&facts[0].shape, &to.shape, &given[0], symbol).map(one);
    }
    if let Some(gather) = node.op_as::<Gather>() {
        return gathered(gather.axis, given, facts).map(one);
    }
    if let Some(axes) = along_axes(node) {
        return apart_from(&axes, given, node.outputs.len());
    }
    if node.op_as::<MaxPool>().is_some_and(|op| op.with_index_outputs.is_some()) {
        // Indices count from the first row on.
        return Err("gives indices into all rows".into());
    }
    if let Some(pictures) = pictures(node) {
        return first_axis(pictures, given, node.outputs.len());
    }
    if let Some(layer) = node.op_as::<Layer>() {
        return recurrent(layer, node, given);
    }
    if node.op_is::<ClassicalModel>() {
        return first_axis(facts[0].rank() == 2, given, node.outputs.len());
    }
    if let Some(state) = single(symbol, node, given, facts)? {
        return Ok(one(state));
    }
    Err(obstacle(&node.op.name()))
}

fn one(state: State) -> Vec<State> {
    vec![state]
}

/// A constant has no rows, but may be computed from their number.
fn constant_state(value: &Tensor, symbol: &Symbol) -> State {
    let dims = value.try_as_plain_ram().ok().and_then(|view| view.as_slice::<TDim>().ok().map(<[TDim]>::to_vec));
    match (value.datum_type() == DatumType::TDim, dims) {
        (true, Some(dims)) if !dims.iter().any(|dim| has(dim, symbol)) => State::Free,
        (true, _) => State::Count,
        _ => State::Free,
    }
}

/// Why an operator that is in no table is refused.
fn obstacle(name: &str) -> Refused {
    let random = ["Random", "Multinomial"].iter().any(|it| name.contains(it));
    let selects = ["NonZero", "Unique", "Compress", "NonMaxSuppression"].iter().any(|it| name.contains(it));
    if random {
        "draws random numbers".into()
    } else if selects {
        "makes a shape that depends on the values of all rows".into()
    } else if name == "If" || name.contains("IfThenElse") {
        "branches".into()
    } else {
        "is not known to keep rows apart".into()
    }
}

fn is_elementwise(node: &TypedNode) -> bool {
    node.op_is::<ElementWiseOp>()
        || node.op_is::<TypedBinOp>()
        || node.op_is::<Iff>()
        || node.op_is::<Cast>()
        || node.op_is::<Identity>()
        || node.op_is::<cast::ToDim>()
        || node.op_is::<cast::Parse>()
        || node.op_is::<modulo::Modulo>()
        || node.op_is::<ops::BitShift>()
        || ELEMENTWISE.contains(&&*node.op.name())
}

/// Inputs that are broadcast to one shape: all rows along the same axis, and what has none repeated along it.
fn elementwise(given: &[State], facts: &[&TypedFact], rank: usize) -> Result<State, Refused> {
    let place = |fact: &TypedFact| rank.checked_sub(fact.rank()).ok_or("makes a shape that is not understood");
    let mut found: Option<Run> = None;
    for (state, fact) in given.iter().zip(facts) {
        if let State::Rows(run) = state {
            let run = run.moved(run.axis + place(fact)?);
            match &found {
                Some(known) if *known != run => return Err("combines rows that lie along different axes".into()),
                _ => found = Some(run),
            }
        }
    }
    let Some(run) = found else { return Ok(State::Free) };
    for (state, fact) in given.iter().zip(facts) {
        let more = place(fact)?;
        if *state == State::Free && run.axis >= more && !fact.shape[run.axis - more].is_one() {
            return Err("combines the rows with a constant that has as many".into());
        }
    }
    Ok(State::Rows(run))
}

/// A product: the axis of the rows is one of the output's, and none that is summed over.
fn einsum(product: &EinSum, given: &[State], facts: &[&TypedFact]) -> Result<State, Refused> {
    let mut found: Option<(char, Run)> = None;
    for (input, state) in given.iter().enumerate() {
        let State::Rows(run) = state else { continue };
        let axis = product.axes.axis((InOut::In(input), run.axis)).map_err(|_| "has axes that are not understood")?;
        let output = match (&*axis.outputs[0], axis.inputs.iter().all(|places| places.len() <= 1)) {
            ([output], true) => run.moved(*output),
            ([], _) => return Err("sums over the rows".into()),
            _ => return Err("combines rows that lie along different axes".into()),
        };
        match &found {
            Some(known) if *known != (axis.repr, output.clone()) => {
                return Err("combines rows that lie along different axes".into());
            }
            _ => found = Some((axis.repr, output)),
        }
    }
    let Some((letter, run)) = found else { return Ok(State::Free) };
    for (input, state) in given.iter().enumerate() {
        let places = product.axes.axis_positions(InOut::In(input), letter).unwrap_or(&[]);
        let repeated = |&place: &usize| facts[input].shape.get(place).is_some_and(TDim::is_one);
        if *state == State::Free && !places.iter().all(repeated) {
            return Err("combines the rows with a constant that has as many".into());
        }
    }
    Ok(State::Rows(run))
}

/// A Gather of slices along an axis. Rows may be in the data or in the indices.
fn gathered(axis: usize, given: &[State], facts: &[&TypedFact]) -> Result<State, Refused> {
    match (&given[0], &given[1]) {
        (State::Free, State::Free) => Ok(State::Free),
        (State::Free, State::Rows(run)) => Ok(State::Rows(run.moved(run.axis + axis))),
        (State::Rows(run), State::Free) if run.axis < axis => Ok(State::Rows(run.clone())),
        (State::Rows(run), State::Free) if run.axis > axis => {
            Ok(State::Rows(run.moved(run.axis - 1 + facts[1].rank())))
        }
        (State::Rows(_), State::Free) => Err("selects among the rows".into()),
        _ => Err("selects from the rows by indices that have rows too".into()),
    }
}

/// For operators that keep the shape, or change it along some axes: the axes along which they mix indices.
fn along_axes(node: &TypedNode) -> Option<TVec<usize>> {
    if let Some(reduce) = node.op_as::<Reduce>() {
        return Some(reduce.axes.clone());
    }
    if let Some(extreme) = node.op_as::<Extreme>() {
        return Some(extreme.0.axes.clone());
    }
    if let Some(softmax) = node.op_as::<Softmax>() {
        return Some(softmax.axes.clone());
    }
    if let Some(pad) = node.op_as::<Pad>() {
        let padded = pad.pads.iter().enumerate().filter(|(_, pads)| **pads != (0, 0));
        return Some(padded.map(|(axis, _)| axis).collect());
    }
    if let Some(upsample) = node.op_as::<NearestUpsample>() {
        let scaled = upsample.scales.iter().enumerate().filter(|(_, scale)| **scale != 1);
        return Some(scaled.map(|(axis, _)| axis).collect());
    }
    if node.op_is::<Trilu>() {
        let rank = node.outputs.first()?.fact.rank();
        return Some((rank.saturating_sub(2)..rank).collect());
    }
    if node.op_is::<LayerNorm>() {
        return Some(tvec![node.outputs.first()?.fact.rank().checked_sub(1)?]);
    }
    let axis = node.op_as::<RmsNorm>().map(|op| op.axis);
    let axis = axis.or_else(|| node.op_as::<CumSum>().map(|op| op.axis));
    let axis = axis.or_else(|| node.op_as::<Topk>().map(|op| op.axis));
    let axis = axis.or_else(|| node.op_as::<Downsample>().map(|op| op.axis));
    axis.map(|axis| tvec![axis])
}

/// The first input has rows that the operator does not mix; the others have none.
fn apart_from(axes: &[usize], given: &[State], outputs: usize) -> Result<Vec<State>, Refused> {
    if given[1..].iter().any(|state| *state != State::Free) {
        return Err("has a parameter that depends on the rows".into());
    }
    match &given[0] {
        State::Rows(run) if axes.contains(&run.axis) => Err(format!("is taken over axis {}, the rows", run.axis)),
        state => Ok(vec![state.clone(); outputs]),
    }
}

/// Convolutions and pooling, which take pictures of rows along axis 0: true if they have this axis.
fn pictures(node: &TypedNode) -> Option<bool> {
    let spec: Option<&PoolSpec> = node
        .op_as::<Conv>()
        .map(|op| &op.pool_spec)
        .or_else(|| node.op_as::<Deconv>().map(|op| &op.pool_spec))
        .or_else(|| node.op_as::<MaxPool>().map(|op| &op.pool_spec))
        .or_else(|| node.op_as::<SumPool>().map(|op| &op.pool_spec));
    if let Some(spec) = spec {
        return Some(spec.data_format.has_n());
    }
    // Local response normalisation is over the channels, axis 1.
    (node.op.name() == "Lrn").then_some(true)
}

/// Rows along the first axis of the first input, where `known`, come out along the first axis.
fn first_axis(known: bool, given: &[State], outputs: usize) -> Result<Vec<State>, Refused> {
    if given[1..].iter().any(|state| *state != State::Free) {
        return Err("has a parameter that depends on the rows".into());
    }
    match &given[0] {
        State::Rows(run) if !known || run.axis != 0 => {
            Err(format!("has the rows along axis {}, where it mixes them", run.axis))
        }
        state => Ok(vec![state.clone(); outputs]),
    }
}

/// Sequences have their rows along axis 1, behind the time.
fn recurrent(layer: &Layer, node: &TypedNode, given: &[State]) -> Result<Vec<State>, Refused> {
    let state_of_rows = |slot: &Option<usize>| slot.is_none_or(|slot| given[slot] == given[0]);
    let initial: TVec<usize> = layer.initial.iter().flatten().copied().collect();
    let parameters = given.iter().enumerate().skip(1).filter(|(slot, _)| !initial.contains(slot));
    if parameters.into_iter().any(|(_, state)| *state != State::Free) {
        return Err("has a parameter that depends on the rows".into());
    }
    match &given[0] {
        State::Rows(run) if run.axis == 1 => {
            if !layer.initial.iter().all(state_of_rows) {
                return Err("has an initial state without the rows of its sequences".into());
            }
            // Y is time, direction, row, feature; Y_h and Y_c are direction, row, feature.
            Ok(node.outputs.iter().map(|outlet| State::Rows(run.moved(outlet.fact.rank() - 2))).collect())
        }
        State::Free if initial.iter().all(|&slot| given[slot] == State::Free) => {
            Ok(vec![State::Free; node.outputs.len()])
        }
        State::Rows(run) => Err(format!("has the rows along axis {}, where it mixes them", run.axis)),
        _ => Err("has an initial state with rows and a sequence without".into()),
    }
}

/// Operators of one output that have rules of their own; none for what is not known.
fn single(symbol: &Symbol, node: &TypedNode, given: &[State], facts: &[&TypedFact]) -> Result<Option<State>, Refused> {
    let over = |run: &Run| format!("is taken over axis {}, the rows", run.axis);
    let one_run = || given.iter().all(|state| state == &given[0]);
    let state = if let Some(concat) = node.op_as::<TypedConcat>() {
        match &given[0] {
            _ if !one_run() => return Err("puts values with rows beside values without, or with other ones".into()),
            State::Rows(run) if run.axis == concat.axis => return Err(over(run)),
            state => state.clone(),
        }
    } else if let Some(slice) = node.op_as::<Slice>() {
        let counts = has(&slice.start, symbol) || has(&slice.end, symbol);
        match &given[0] {
            State::Rows(run) if run.axis == slice.axis => return Err(over(run)),
            _ if counts => return Err("takes the number of rows as a value".into()),
            state => state.clone(),
        }
    } else if let Some(slice) = node.op_as::<DynSlice>() {
        if has(&slice.len, symbol) {
            return Err("takes the number of rows as a value".into());
        }
        return apart_from(&[slice.axis], given, 1).map(|mut states| states.pop());
    } else if let Some(tile) = node.op_as::<Tile>() {
        let counts = tile.multipliers.iter().any(|count| has(count, symbol));
        match &given[0] {
            State::Rows(run) if !tile.multipliers.get(run.axis).is_some_and(TDim::is_one) => return Err(over(run)),
            State::Rows(_) if counts => return Err("takes the number of rows as a value".into()),
            State::Free if counts => broadcast(&facts[0].shape, &node.outputs[0].fact.shape, &State::Free, symbol)?,
            state => state.clone(),
        }
    } else if let Some(gather) = node.op_as::<GatherElements>() {
        beside(gather.axis, given)?
    } else if let Some(scatter) = node.op_as::<ScatterElements>() {
        beside(scatter.axis, given)?
    } else if let Some(gather) = node.op_as::<GatherNd>() {
        match (&given[0], &given[1]) {
            (State::Free, State::Free) => State::Free,
            (State::Free, State::Rows(run)) if gather.batch_dims == 0 && run.axis + 1 < facts[1].rank() => {
                State::Rows(run.clone())
            }
            (State::Rows(data), State::Rows(indices)) if data == indices && data.axis < gather.batch_dims => {
                State::Rows(data.clone())
            }
            _ => return Err("selects among the rows".into()),
        }
    } else if let Some(hot) = node.op_as::<OneHot>() {
        match &given[0] {
            State::Rows(run) => State::Rows(run.moved(run.axis + usize::from(run.axis >= hot.axis))),
            state => state.clone(),
        }
    } else if node.op_is::<Range>() && given.iter().all(|state| *state == State::Free) {
        State::Free
    } else if let Some(scales) = node.op_as::<quantize::Linear>() {
        if given[1..].iter().any(|state| *state != State::Free) {
            return Err("has a scale that depends on the rows".into());
        }
        match &given[0] {
            State::Rows(run) if scales.scaled_axis(facts) == Some(run.axis) => return Err(over(run)),
            state => state.clone(),
        }
    } else {
        return Ok(None);
    };
    Ok(Some(state))
}

/// Indices that select, along an axis, from what lies beside them: all inputs have the same rows.
fn beside(axis: usize, given: &[State]) -> Result<State, Refused> {
    match &given[0] {
        _ if given.iter().any(|state| *state != given[0]) => Err("selects among the rows".into()),
        State::Rows(run) if run.axis == axis => Err("selects among the rows".into()),
        state => Ok(state.clone()),
    }
}

/// Resize, of which tract has two, leaves an axis alone whose size and scale stay the same. Its sizes may have the number of
/// rows among them.
fn resize(node: &TypedNode, given: &[State], facts: &[&TypedFact]) -> Result<Option<State>, Refused> {
    if node.op.name() != "Resize" {
        return Ok(None);
    }
    let State::Rows(run) = &given[0] else {
        let free = given.iter().all(|state| *state == State::Free);
        return if free { Ok(Some(State::Free)) } else { Err("takes the number of rows as a value".into()) };
    };
    let rank = facts[0].rank();
    let mut kept = false;
    for fact in &facts[1..] {
        let Some(values) = &fact.konst else { return Err("is resized by what is no constant".into()) };
        match (values.len(), values.datum_type().is_float()) {
            (0, _) => {}
            // The output's shape was inferred from the sizes, and is compared with the rows by the caller.
            (count, false) if count == rank => kept = true,
            (count, true) if count == rank => {
                let scales = values.cast_to::<f32>().ok();
                let scales = scales.as_ref().and_then(|scales| scales.try_as_plain_ram().ok());
                let scale = scales.as_ref().and_then(|scales| scales.as_slice::<f32>().ok()?.get(run.axis).copied());
                kept |= scale == Some(1.0);
            }
            // A region to crop, or sizes of some axes.
            _ => return Err("is not known to keep rows apart".into()),
        }
    }
    // A policy for the aspect ratio scales all axes alike.
    let policy = format!("{:?}", node.op);
    if !kept || policy.contains("NotLarger") || policy.contains("NotSmaller") {
        return Err(format!("resizes axis {}, the rows", run.axis));
    }
    Ok(Some(State::Rows(run.clone())))
}

/// ONNX's Slice before it is one of tract's. The axis of the rows may be among its axes if it is left whole; its end may be the
/// number of rows there.
fn strided(symbol: &Symbol, node: &TypedNode, given: &[State], facts: &[&TypedFact]) -> Result<Option<State>, Refused> {
    let Some(slice) = node.op_as::<StridedSlice>() else { return Ok(None) };
    if slice.begin_mask != 0 || slice.end_mask != 0 || slice.shrink_axis_mask != 0 {
        return Err("is not known to keep rows apart".into());
    }
    if given[1..].iter().any(|state| matches!(state, State::Rows(_))) {
        return Err("has a parameter that depends on the rows".into());
    }
    // None for what is not a constant; all of it may be data then, but not of the rows.
    let values = |input: usize| -> Option<Vec<TDim>> {
        let tensor = facts.get(input)?.konst.as_ref()?.cast_to::<TDim>().ok()?;
        Some(tensor.try_as_plain_ram().ok()?.as_slice::<TDim>().ok()?.to_vec())
    };
    let rank = facts[0].rank();
    let axes: Vec<usize> = match slice.optional_axes_input {
        None => (0..rank).collect(),
        Some(input) => {
            let axes = values(input).ok_or("has axes that are no constants")?;
            let axis =
                |dim: &TDim| usize::try_from(dim.as_i64().map_or(-1, |at| if at < 0 { at + rank as i64 } else { at }));
            axes.iter().map(axis).collect::<Result<_, _>>().map_err(|_| "has axes that are no constants")?
        }
    };
    let own = match &given[0] {
        State::Rows(run) => axes.iter().position(|&axis| axis == run.axis),
        State::Free => None,
        State::Count => return Err("takes the number of rows as a value".into()),
    };
    let counts = |input: usize| match (&given[input], values(input)) {
        (State::Free, _) => false,
        (_, Some(values)) => values.iter().enumerate().any(|(at, dim)| Some(at) != own && has(dim, symbol)),
        (_, None) => true,
    };
    if (1..given.len()).any(counts) {
        return Err("takes the number of rows as a value".into());
    }
    if let (Some(own), State::Rows(run)) = (own, &given[0]) {
        let is =
            |input: usize, wanted: i64| values(input).is_some_and(|values| values.get(own) == Some(&TDim::Val(wanted)));
        // From the first on, one by one: it is whole if its size is, which the caller looks at.
        if !is(1, 0) || slice.optional_steps_input.is_some_and(|input| !is(input, 1)) {
            return Err(format!("is taken over axis {}, the rows", run.axis));
        }
    }
    Ok(Some(given[0].clone()))
}
