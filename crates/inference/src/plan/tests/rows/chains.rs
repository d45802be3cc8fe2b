//! Graphs made at random: whatever is proven must be true.

use super::*;

/// One more operator on `from`; some misfit, and are not compiled.
fn link(random: &mut Random, from: &str, to: &str, graph: &mut GraphProto) -> NodeProto {
    let axis = random.below(3) as i64 - random.below(2) as i64 * 3;
    let mut constant = |values: &[i64], scalar: bool| {
        let name = format!("{to}c{}", graph.initializer.len());
        let dims: &[i64] = if scalar { &[] } else { &[values.len() as i64] };
        graph.initializer.push(ints(&name, dims, values));
        name
    };
    match random.below(17) {
        0 => node("Relu", &[from], &[to]),
        1 => node("Softmax", &[from], &[to]).int("axis", axis),
        2 => node("ReduceSum", &[from, &constant(&[axis], false)], &[to]).int("keepdims", random.below(2) as i64),
        3 => node("ReduceMax", &[from], &[to]).ints("axes", &[axis]).int("keepdims", 1),
        4 => node("CumSum", &[from, &constant(&[axis], true)], &[to]),
        5 => node("Concat", &[from, from], &[to]).int("axis", axis),
        6 => node("Concat", &[from, "x"], &[to]).int("axis", axis),
        7 => {
            let perms: [&[i64]; 5] = [&[0, 2, 1], &[1, 0, 2], &[2, 0, 1], &[1, 2, 0], &[1, 0]];
            node("Transpose", &[from], &[to]).ints("perm", perms[random.below(5)])
        }
        8 | 9 => {
            let shapes: [&[i64]; 9] = [
                &[-1, 2, 4],
                &[0, -1],
                &[-1, 4],
                &[-1, 2],
                &[2, -1, 4],
                &[0, 2, -1],
                &[-1, 8],
                &[4, -1, 2],
                &[-1, 1, 8],
            ];
            node("Reshape", &[from, &constant(shapes[random.below(9)], false)], &[to])
        }
        10 => node("Gather", &[from, &constant(&[0, 1], random.below(2) == 2)], &[to]).int("axis", axis),
        11 => {
            let (start, end) = (constant(&[random.below(2) as i64], false), constant(&[i64::MAX], false));
            node("Slice", &[from, &start, &end, &constant(&[axis], false)], &[to])
        }
        12 => node("MatMul", &[from, "x"], &[to]),
        13 => node("Sub", &[from, "x"], &[to]),
        14 => node("Unsqueeze", &[from, &constant(&[axis], false)], &[to]),
        15 => node("MatMul", &[from, "w"], &[to]),
        _ => node("Flatten", &[from], &[to]).int("axis", random.below(3) as i64),
    }
}

#[test]
fn what_is_proven_is_true() {
    let (mut proven, mut refused) = (0, 0);
    for seed in 0..1500 {
        let mut random = Random::new(seed);
        let shape: &[D] = [&[N("n"), S(2), S(4)][..], &[N("n"), S(4)], &[S(2), N("n"), S(4)]][random.below(3)];
        let mut made = of(shape, vec![], vec![floats("w", &[4, 4], &random.values(16))]);
        let length = random.between(1, 6);
        let mut from = "x".to_owned();
        for step in 0..length {
            let to = if step + 1 == length { "y".to_owned() } else { format!("v{step}") };
            let link = link(&mut random, &from, &to, &mut made);
            made.node.push(link);
            from = to;
        }
        let Ok(plan) = compile(made) else { continue };
        if plan.rows().are_independent() {
            proven += 1;
            compare(&plan, &mut random, &format!("seed {seed}"));
        } else {
            refused += 1;
        }
    }
    assert!(proven > 100 && refused > 100, "{proven} proven, {refused} refused");
}
