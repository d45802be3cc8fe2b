//! Ensembles of decision trees of `ai.onnx.ml`.
//!
//! Responsible for: reading the trees (node tuples of parallel lists) into one array, and walking them. A graph may
//! name any node as a child: trees are checked to be trees when they are read, so that every walk ends.

use super::classical::{Labels, PostTransform, RowModel, largest, logistic, operator};
use super::rewrite::{attribute, integer, text};
use std::collections::HashMap;
use tract_onnx::model::ParsingContext;
use tract_onnx::pb::NodeProto;
use tract_onnx::tract_hir::internal::*;

type Built = TractResult<(Box<dyn InferenceOp>, Vec<String>)>;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Leq,
    Lt,
    Gte,
    Gt,
    Eq,
    Neq,
    Leaf,
}

#[derive(Clone, Debug)]
struct Node {
    mode: Mode,
    feature: usize,
    value: f64,
    /// A missing value (NaN) goes the way of truth.
    missing_true: bool,
    /// Places of the children in the forest's nodes.
    when_true: usize,
    when_false: usize,
    /// Places of a leaf's votes in the forest's votes.
    votes: std::ops::Range<usize>,
}

/// Trees and what their leaves say: (target or class, weight).
#[derive(Debug)]
struct Forest {
    nodes: Vec<Node>,
    roots: Vec<usize>,
    votes: Vec<(usize, f32)>,
    features: usize,
}

impl Forest {
    /// Reads the lists whose names begin with `nodes_` and with `votes` ("class" or "target").
    fn of(pb: &NodeProto, votes: &str, targets: usize) -> TractResult<Forest> {
        let ints = |name: &str| attribute(pb, name).map_or(&[][..], |it| it.ints.as_slice());
        let floats = |name: &str| attribute(pb, name).map_or(&[][..], |it| it.floats.as_slice());
        let modes = attribute(pb, "nodes_modes").map_or(&[][..], |it| it.strings.as_slice());
        let (trees, ids) = (ints("nodes_treeids"), ints("nodes_nodeids"));
        let (features, values) = (ints("nodes_featureids"), floats("nodes_values"));
        let (trues, falses) = (ints("nodes_truenodeids"), ints("nodes_falsenodeids"));
        let missing = ints("nodes_missing_value_tracks_true");
        let count = trees.len();
        ensure!(count > 0, "an ensemble without trees");
        for (name, length) in [
            ("nodes_nodeids", ids.len()),
            ("nodes_modes", modes.len()),
            ("nodes_featureids", features.len()),
            ("nodes_values", values.len()),
            ("nodes_truenodeids", trues.len()),
            ("nodes_falsenodeids", falses.len()),
        ] {
            ensure!(length == count, "{name} has {length} entries where nodes_treeids has {count}");
        }
        let mut places = HashMap::with_capacity(count);
        for (place, key) in trees.iter().copied().zip(ids.iter().copied()).enumerate() {
            ensure!(places.insert(key, place).is_none(), "node {} of tree {} is there twice", key.1, key.0);
        }
        // Votes, grouped by their leaf.
        let list = |what: &str| ints(&format!("{votes}_{what}"));
        let weights = floats(&format!("{votes}_weights"));
        let (vote_trees, vote_nodes, vote_ids) = (list("treeids"), list("nodeids"), list("ids"));
        ensure!(
            [vote_trees.len(), vote_nodes.len(), vote_ids.len()] == [weights.len(); 3],
            "the lists of {votes} votes differ in length"
        );
        let mut order: Vec<(usize, usize)> = Vec::with_capacity(weights.len());
        for vote in 0..weights.len() {
            let key = (vote_trees[vote], vote_nodes[vote]);
            let place = *places.get(&key).with_context(|| format!("a vote for the missing node {key:?}"))?;
            order.push((place, vote));
        }
        order.sort_unstable();
        let mut nodes = Vec::with_capacity(count);
        let mut next = 0;
        let mut child = vec![false; count];
        let mut widest = 0;
        for place in 0..count {
            let mode = match modes[place].as_slice() {
                b"BRANCH_LEQ" => Mode::Leq,
                b"BRANCH_LT" => Mode::Lt,
                b"BRANCH_GTE" => Mode::Gte,
                b"BRANCH_GT" => Mode::Gt,
                b"BRANCH_EQ" => Mode::Eq,
                b"BRANCH_NEQ" => Mode::Neq,
                b"LEAF" => Mode::Leaf,
                other => bail!("node mode {} is not supported", String::from_utf8_lossy(other)),
            };
            let begin = next;
            while order.get(next).is_some_and(|(leaf, _)| *leaf == place) {
                next += 1;
            }
            let mut follow = |id: i64| -> TractResult<usize> {
                let found = places.get(&(trees[place], id)).copied();
                let found =
                    found.with_context(|| format!("node {} of tree {} has no child {id}", ids[place], trees[place]))?;
                ensure!(
                    !std::mem::replace(&mut child[found], true),
                    "node {id} of tree {} has two parents",
                    trees[place]
                );
                Ok(found)
            };
            let (when_true, when_false) = match mode {
                Mode::Leaf => (place, place),
                _ => (follow(trues[place])?, follow(falses[place])?),
            };
            let feature = usize::try_from(features[place]).context("a negative feature")?;
            if mode != Mode::Leaf {
                widest = widest.max(feature.checked_add(1).context("a feature out of range")?);
            }
            nodes.push(Node {
                mode,
                feature,
                value: f64::from(values[place]),
                missing_true: missing.get(place).is_some_and(|tracks| *tracks != 0),
                when_true,
                when_false,
                votes: begin..next,
            });
        }
        // Each node has one parent at most, so what is reached from a root is a tree. A tree's root is its first node.
        let mut roots = Vec::new();
        for place in 0..count {
            if place == 0 || trees[place] != trees[place - 1] {
                ensure!(!child[place], "the first node of tree {} is no root", trees[place]);
                roots.push(place);
            }
        }
        let votes = order
            .iter()
            .map(|(_, vote)| {
                let target = usize::try_from(vote_ids[*vote]).ok().filter(|target| *target < targets);
                Ok((target.with_context(|| format!("a vote for target {}", vote_ids[*vote]))?, weights[*vote]))
            })
            .collect::<TractResult<Vec<_>>>()?;
        Ok(Forest { nodes, roots, votes, features: widest })
    }

    /// Calls `take` with each vote of the leaves that this row reaches, tree after tree.
    fn walk(&self, row: &[f64], mut take: impl FnMut(usize, f32)) {
        for &root in &self.roots {
            let mut node = &self.nodes[root];
            while node.mode != Mode::Leaf {
                let value = row[node.feature];
                let truth = match node.mode {
                    Mode::Leq => value <= node.value,
                    Mode::Lt => value < node.value,
                    Mode::Gte => value >= node.value,
                    Mode::Gt => value > node.value,
                    Mode::Eq => value == node.value,
                    _ => value != node.value,
                };
                let truth = truth || (node.missing_true && value.is_nan());
                node = &self.nodes[if truth { node.when_true } else { node.when_false }];
            }
            for (target, weight) in &self.votes[node.votes.clone()] {
                take(*target, *weight);
            }
        }
    }

    /// Comparisons of a row, were the trees balanced.
    fn work(&self) -> usize {
        let each = self.nodes.len() / self.roots.len().max(1);
        self.roots.len() * (each.max(1).ilog2() as usize + 1)
    }

    fn check_width(&self, width: usize) -> TractResult<()> {
        ensure!(width >= self.features, "the trees look at {} values a row, not {width}", self.features);
        Ok(())
    }
}

/// TreeEnsembleRegressor.
#[derive(Debug)]
struct Regressor {
    forest: Forest,
    targets: usize,
    aggregate: Aggregate,
    base: Vec<f32>,
    post: PostTransform,
    labels: Labels,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Aggregate {
    Sum,
    Average,
    Min,
    Max,
}

pub(super) fn regressor(_: &ParsingContext, pb: &NodeProto) -> Built {
    let targets = integer(pb, "n_targets").unwrap_or(1);
    let targets = usize::try_from(targets).ok().filter(|targets| (1..=1 << 20).contains(targets));
    let targets = targets.context("n_targets is out of range")?;
    let aggregate = match text(pb, "aggregate_function") {
        None | Some("SUM" | "") => Aggregate::Sum,
        Some("AVERAGE") => Aggregate::Average,
        Some("MIN") => Aggregate::Min,
        Some("MAX") => Aggregate::Max,
        Some(other) => bail!("aggregate_function {other} is not supported"),
    };
    let base = attribute(pb, "base_values").map_or(vec![], |it| it.floats.clone());
    ensure!(base.is_empty() || base.len() == targets, "{} base values for {targets} targets", base.len());
    let forest = Forest::of(pb, "target", targets)?;
    let post = PostTransform::of(pb)?;
    // ONNX Runtime leaves a single score as it is, the text of ONNX does not.
    ensure!(targets > 1 || post == PostTransform::None, "a post_transform of a single target is not supported");
    Ok((operator(Regressor { forest, targets, aggregate, base, post, labels: Labels::Integers(vec![]) }), vec![]))
}

impl RowModel for Regressor {
    fn name(&self) -> &'static str {
        "TreeEnsembleRegressor"
    }

    fn outputs(&self) -> (Option<DatumType>, usize) {
        (None, self.targets)
    }

    fn check_width(&self, width: usize) -> TractResult<()> {
        self.forest.check_width(width)
    }

    fn score(&self, row: &[f64], scores: &mut [f32]) -> usize {
        let mut sums = vec![None::<f64>; self.targets];
        self.forest.walk(row, |target, weight| {
            let weight = f64::from(weight);
            sums[target] = Some(match (sums[target], self.aggregate) {
                (None, _) => weight,
                (Some(sum), Aggregate::Sum | Aggregate::Average) => sum + weight,
                (Some(sum), Aggregate::Min) => sum.min(weight),
                (Some(sum), Aggregate::Max) => sum.max(weight),
            });
        });
        for (target, sum) in sums.into_iter().enumerate() {
            let mut sum = sum.unwrap_or(0.0);
            if self.aggregate == Aggregate::Average {
                sum /= self.forest.roots.len() as f64;
            }
            scores[target] = (sum + f64::from(self.base.get(target).copied().unwrap_or(0.0))) as f32;
        }
        self.post.apply(scores);
        0
    }

    fn work(&self) -> usize {
        self.forest.work()
    }

    fn labels(&self) -> &Labels {
        &self.labels
    }
}

/// TreeEnsembleClassifier.
#[derive(Debug)]
struct Classifier {
    forest: Forest,
    labels: Labels,
    base: Vec<f32>,
    post: PostTransform,
    classes: Classes,
    /// No vote is negative: a score is a probability and the decision between two classes is at one half.
    positive: bool,
}

/// How scores become a decision.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Classes {
    /// The class with the largest score among those that got votes.
    Many,
    /// Two classes, and every leaf votes for both: the sign of the second one's score.
    TwoWithBoth,
    /// Two classes, and all votes are called the first one's, but mean the second one.
    TwoWithFirst,
    /// Two classes, and all votes are for the second one.
    TwoWithSecond,
}

pub(super) fn classifier(_: &ParsingContext, pb: &NodeProto) -> Built {
    let labels = Labels::of(pb, "classlabels_int64s", "classlabels_strings")?;
    let forest = Forest::of(pb, "class", labels.len())?;
    let base = attribute(pb, "base_values").map_or(vec![], |it| it.floats.clone());
    let post = PostTransform::of(pb)?;
    let votes_for = |class: usize| forest.votes.iter().all(|(voted, _)| *voted == class);
    let both = |leaf: &Node| {
        let votes = &forest.votes[leaf.votes.clone()];
        [0, 1].iter().all(|class| votes.iter().any(|(voted, _)| voted == class))
    };
    let zero_one = matches!(&labels, Labels::Integers(labels) if labels == &[0, 1]);
    // Of the many combinations for two classes, those that exporters write and that ONNX Runtime computes in one
    // clear way.
    let classes = match labels.len() {
        2 if votes_for(0) && base.len() < 2 && matches!(post, PostTransform::None | PostTransform::Logistic) => {
            Classes::TwoWithFirst
        }
        2 if votes_for(1) && base.is_empty() => Classes::TwoWithSecond,
        2 if base.is_empty() && zero_one && forest.nodes.iter().all(|node| node.mode != Mode::Leaf || both(node)) => {
            Classes::TwoWithBoth
        }
        2 => bail!("this combination of votes, base_values and post_transform for two classes is not supported"),
        count if count > 2 && (base.is_empty() || base.len() == count) => Classes::Many,
        count => bail!("{} base_values for {count} classes are not supported", base.len()),
    };
    let positive = forest.votes.iter().all(|(_, weight)| *weight >= 0.0);
    Ok((operator(Classifier { forest, labels, base, post, classes, positive }), vec![]))
}

impl RowModel for Classifier {
    fn name(&self) -> &'static str {
        "TreeEnsembleClassifier"
    }

    fn outputs(&self) -> (Option<DatumType>, usize) {
        (Some(self.labels.datum_type()), self.labels.len())
    }

    fn check_width(&self, width: usize) -> TractResult<()> {
        self.forest.check_width(width)
    }

    fn score(&self, row: &[f64], scores: &mut [f32]) -> usize {
        let mut voted = vec![!self.base.is_empty(); scores.len()];
        self.forest.walk(row, |class, weight| {
            scores[class] += weight;
            voted[class] = true;
        });
        let decide = |score: f32| usize::from(if self.positive { score > 0.5 } else { score > 0.0 });
        match self.classes {
            Classes::Many => {
                scores.iter_mut().zip(&self.base).for_each(|(score, base)| *score += base);
                let among =
                    scores.iter().zip(&voted).map(|(score, voted)| if *voted { *score } else { f32::NEG_INFINITY });
                let chosen = largest(&among.collect::<Vec<f32>>());
                self.post.apply(scores);
                chosen
            }
            Classes::TwoWithBoth => {
                let chosen = usize::from(scores[1] > 0.0);
                self.post.apply(scores);
                chosen
            }
            Classes::TwoWithSecond => {
                let chosen = decide(scores[1]);
                self.post.apply(scores);
                chosen
            }
            Classes::TwoWithFirst => {
                let score = scores[0] + self.base.first().copied().unwrap_or(0.0);
                let pair = match (self.post, self.positive) {
                    (PostTransform::Logistic, _) => [logistic(-score), logistic(score)],
                    (_, true) => [1.0 - score, score],
                    (_, false) => [-score, score],
                };
                scores.copy_from_slice(&pair);
                decide(score)
            }
        }
    }

    fn work(&self) -> usize {
        self.forest.work()
    }

    fn labels(&self) -> &Labels {
        &self.labels
    }
}
