"""CPU time of models and single layers: this project's plans, tract alone, ONNX Runtime with one thread.

Prints one Markdown table. Each case is measured in turn by all, in several rounds; the best CPU time of a run counts, so
that other load on the machine changes little. Ratios are of the plan with weights in blocks; below 1 it is faster.

    benches/operators.py [--rounds N] [--only WORD]
"""

import argparse
import math
import pathlib
import subprocess
import tempfile
import time

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

ROOT = pathlib.Path(__file__).resolve().parent.parent
MODELS = ROOT / "target" / "models"
BENCH = ROOT / "target" / "debug" / "examples" / "op_bench"
MILLISECONDS = 200
random = np.random.default_rng(0)


class Graph:
    """A graph that is written node by node."""

    def __init__(self, shape):
        self.nodes, self.weights, self.count = [], [], 0
        self.input = helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)

    def weight(self, *shape):
        scale = 1 / math.sqrt(max(1, math.prod(shape[1:])))
        name = f"w{len(self.weights)}"
        values = (random.standard_normal(shape) * scale).astype(np.float32)
        self.weights.append(numpy_helper.from_array(values, name))
        return name

    def node(self, operator, *inputs, outputs=1, **attributes):
        names = [f"v{self.count + place}" for place in range(outputs)]
        self.count += outputs
        self.nodes.append(helper.make_node(operator, list(inputs), names, **attributes))
        return names[0] if outputs == 1 else names

    def conv(self, x, channels, filters, kernel, stride=1, group=1, activation="Relu"):
        y = self.node(
            "Conv", x, self.weight(filters, channels // group, kernel, kernel), self.weight(filters),
            kernel_shape=[kernel] * 2, strides=[stride] * 2, pads=[kernel // 2] * 4, group=group,
        )
        return self.node(activation, y) if activation else y

    def dense(self, x, features, units, activation="Relu"):
        y = self.node("Gemm", x, self.weight(units, features), self.weight(units), transB=1)
        return self.node(activation, y) if activation else y

    def save(self, path, result):
        output = helper.make_tensor_value_info(result, TensorProto.FLOAT, None)
        graph = helper.make_graph(self.nodes, "graph", [self.input], [output], self.weights)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
        model.ir_version = 8
        # A declared output has a shape.
        inferred = onnx.shape_inference.infer_shapes(model)
        onnx.save(inferred, path)


def mlp(path):
    graph = Graph(["batch", 1024])
    x = "x"
    for features, units in [(1024, 2048), (2048, 2048), (2048, 1024)]:
        x = graph.dense(x, features, units)
    graph.save(path, graph.dense(x, 1024, 100, None))


def resnet18(path):
    graph = Graph(["batch", 3, 224, 224])
    x = graph.conv("x", 3, 64, 7, 2)
    x = graph.node("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    channels = 64
    for filters, stride in [(64, 1), (64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), (512, 1)]:
        y = graph.conv(graph.conv(x, channels, filters, 3, stride), filters, filters, 3, activation=None)
        if stride > 1 or channels != filters:
            x = graph.conv(x, channels, filters, 1, stride, activation=None)
        x, channels = graph.node("Relu", graph.node("Add", x, y)), filters
    x = graph.node("Flatten", graph.node("GlobalAveragePool", x))
    graph.save(path, graph.dense(x, 512, 1000, None))


def mobilenet(path):
    graph = Graph(["batch", 3, 224, 224])
    x, channels = graph.conv("x", 3, 32, 3, 2), 32
    for expand, filters, stride in [(1, 16, 1), (6, 24, 2), (6, 24, 1), (6, 32, 2), (6, 32, 1), (6, 64, 2), (6, 64, 1),
                                    (6, 96, 1), (6, 96, 1), (6, 160, 2), (6, 160, 1), (6, 320, 1)]:
        inner = channels * expand
        y = graph.conv(x, channels, inner, 1) if expand > 1 else x
        y = graph.conv(y, inner, inner, 3, stride, group=inner)
        y = graph.conv(y, inner, filters, 1, activation=None)
        x = graph.node("Add", x, y) if stride == 1 and channels == filters else y
        channels = filters
    x = graph.conv(x, channels, 1280, 1)
    x = graph.node("Flatten", graph.node("GlobalAveragePool", x))
    graph.save(path, graph.dense(x, 1280, 1000, None))


def lstm(path):
    graph = Graph([20, "batch", 128])
    y, _, _ = graph.node("LSTM", "x", graph.weight(1, 1024, 128), graph.weight(1, 1024, 256), graph.weight(1, 2048),
                         outputs=3, hidden_size=256)
    graph.save(path, y)


def floats(*shape):
    return (random.standard_normal(shape) * 0.5).astype(np.float32)


def cases(folder):
    """Name, path, inputs."""
    made = {}
    for build in (mlp, resnet18, mobilenet, lstm):
        made[build.__name__] = folder / f"{build.__name__}.onnx"
        build(made[build.__name__])
    for rows in (1, 32, 1024):
        yield f"fraud FC 28-256-2, {rows}", MODELS / "fraud_fc_256.onnx", {"x": floats(rows, 28)}
    for rows in (1, 32, 1024):
        yield f"MLP 1024-2048-2048-1024, {rows}", made["mlp"], {"x": floats(rows, 1024)}
    yield "MLP of 101 MB, 1", MODELS / "big_mlp.onnx", {"x": floats(1, 2048)}
    for rows in (1, 32, 1024):
        yield f"small CNN, {rows}", MODELS / "cnn.onnx", {"x": floats(rows, 3, 32, 32)}
    for rows in (1, 8):
        yield f"ResNet-18, {rows}", made["resnet18"], {"x": floats(rows, 3, 224, 224)}
        yield f"MobileNetV2, {rows}", made["mobilenet"], {"x": floats(rows, 3, 224, 224)}
    yield "OCR orientation, 8", MODELS / "ocr_turn.onnx", {"x": floats(8, 3, 48, 192)}
    yield "OCR recognition, 1", MODELS / "ocr_read.onnx", {"x": floats(1, 3, 48, 320)}
    yield "OCR detection, 320 x 320", MODELS / "ocr_detect.onnx", {"x": floats(1, 3, 320, 320)}
    for rows in (1, 32, 1024):
        tokens = {"input_ids": random.integers(1000, 20000, (rows, 32)), "attention_mask": np.ones((rows, 32), np.int64)}
        yield f"MiniLM-L3, {rows} x 32 tokens", MODELS / "minilm.onnx", tokens
    for rows in (1, 32):
        yield f"LSTM 128-256, 20 steps, {rows}", made["lstm"], {"x": floats(20, rows, 128)}
    state = np.zeros((1, 1, 128), np.float32)
    yield "voice detector, 31 chunks", MODELS / "vad_sequence.onnx", {"input": floats(31, 576), "h": state, "c": state}
    yield "magika, 1", MODELS / "magika.onnx", {"bytes": random.integers(0, 256, (1, 2048)).astype(np.int32)}


def with_onnxruntime(path, inputs):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    session.run(None, inputs)
    best, total, rounds = math.inf, 0, 0
    while rounds < 3 or total < MILLISECONDS:
        start = time.process_time()
        session.run(None, inputs)
        spent = (time.process_time() - start) * 1e3
        best, total, rounds = min(best, spent), total + spent, rounds + 1
    return best


def with_bench(way, path, files):
    done = subprocess.run([BENCH, way, str(MILLISECONDS), path, *files], capture_output=True, text=True)
    return float(done.stdout) if done.returncode == 0 else math.nan


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="")
    arguments = parser.parse_args()
    print("| model, rows | blocks (ms) | plan (ms) | tract (ms) | ONNX Runtime (ms) | blocks / tract | blocks / ONNX Runtime |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    ratios = []
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        for name, path, inputs in cases(folder):
            if arguments.only not in name:
                continue
            files = []
            for key, value in inputs.items():
                np.save(folder / f"{key}.npy", value)
                files.append(f"{key}={folder / key}.npy")
            best = dict.fromkeys(["blocks", "plan", "tract", "onnxruntime"], math.inf)
            for _ in range(arguments.rounds):
                for way in best:
                    got = with_onnxruntime(path, inputs) if way == "onnxruntime" else with_bench(way, path, files)
                    best[way] = got if math.isnan(got) else min(best[way], got)
            ratios.append((best["blocks"] / best["tract"], best["blocks"] / best["onnxruntime"]))
            times = " | ".join(f"{value:.3f}" for value in best.values())
            print(f"| {name} | {times} | {ratios[-1][0]:.2f} | {ratios[-1][1]:.2f} |", flush=True)
    for place, other in enumerate(["tract", "ONNX Runtime"]):
        known = [math.log(ratio[place]) for ratio in ratios if not math.isnan(ratio[place])]
        print(f"\nGeometric mean of blocks / {other}: {math.exp(sum(known) / len(known)):.2f}", end="")
    print()


if __name__ == "__main__":
    main()
