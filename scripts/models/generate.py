"""Makes the generated models: float32, opset 17, weights from fixed seeds, so each run writes the same bytes."""

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

FLOAT = TensorProto.FLOAT


def save(folder: Path, name: str, nodes, inputs, outputs, weights: dict[str, np.ndarray]) -> onnx.ModelProto:
    """Checks and writes one model; inputs and outputs map a name to a shape (a str is a symbolic dim)."""
    graph = helper.make_graph(
        nodes, "main",  # variants of one architecture have one graph
        [helper.make_tensor_value_info(key, FLOAT, shape) for key, shape in inputs.items()],
        [helper.make_tensor_value_info(key, FLOAT, shape) for key, shape in outputs.items()],
        [numpy_helper.from_array(value, key) for key, value in weights.items()])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], producer_name="pg_tessera")
    model.ir_version = 8
    onnx.checker.check_model(model)
    (folder / f"{name}.onnx").write_bytes(model.SerializeToString())
    return model


def he(rng: np.random.Generator, *shape: int, fan_in: int) -> np.ndarray:
    return (rng.normal(size=shape) * np.sqrt(2 / fan_in)).astype(np.float32)


def dense_weights(seed: int, sizes: list[int], transposed: bool) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    weights = {}
    for i, (k, n) in enumerate(zip(sizes, sizes[1:])):
        weights[f"w{i}"] = he(rng, *((n, k) if transposed else (k, n)), fan_in=k)
        weights[f"b{i}"] = (rng.normal(size=n) * 0.1).astype(np.float32)
    return weights


def dense_net(folder: Path, name: str, sizes: list[int], weights: dict[str, np.ndarray], *,
              transposed: bool = False, softmax: bool = True, batch: str | int = "batch") -> onnx.ModelProto:
    """A fully connected net with ReLU between layers: MatMul and Add, or Gemm with transB as PyTorch exports."""
    nodes, at = [], "x"
    layers = len(sizes) - 1
    for i in range(layers):
        if transposed:
            nodes.append(helper.make_node("Gemm", [at, f"w{i}", f"b{i}"], [f"z{i}"], f"gemm{i}", transB=1))
        else:
            nodes.append(helper.make_node("MatMul", [at, f"w{i}"], [f"m{i}"], f"matmul{i}"))
            nodes.append(helper.make_node("Add", [f"m{i}", f"b{i}"], [f"z{i}"], f"add{i}"))
        at = f"z{i}"
        if i + 1 < layers:
            nodes.append(helper.make_node("Relu", [at], [f"h{i}"], f"relu{i}"))
            at = f"h{i}"
    last = "Softmax" if softmax else "Identity"
    nodes.append(helper.make_node(last, [at], ["y"], last.lower()))
    return save(folder, name, nodes, {"x": [batch, sizes[0]]}, {"y": [batch, sizes[-1]]}, weights)


def fraud(folder: Path) -> None:
    small = dense_weights(1, [28, 256, 2], transposed=False)
    dense_net(folder, "fraud_fc_256", [28, 256, 2], small)
    tuned = dict(small) | {key: dense_weights(2, [28, 256, 2], transposed=False)[key] for key in ("w1", "b1")}
    dense_net(folder, "fraud_fc_256_tuned", [28, 256, 2], tuned)
    dense_net(folder, "fraud_fixed", [28, 256, 2], small, batch=4)
    wide = dense_weights(3, [28, 512, 2], transposed=True)
    dense_net(folder, "fraud_fc_512", [28, 512, 2], wide, transposed=True)
    model = dense_net(folder, "external", [28, 256, 2], dense_weights(4, [28, 256, 2], transposed=False))
    data = folder / "external.bin"
    data.unlink(missing_ok=True)  # onnx appends
    onnx.save_model(model, folder / "external.onnx", save_as_external_data=True, location="external.bin", size_threshold=0)
    data.chmod(0o644)  # the server reads it


def large(folder: Path) -> None:
    encoder = [76, 3072, 768]
    weights = dense_weights(5, encoder, transposed=True)
    dense_net(folder, "encoder_fc", encoder, weights, transposed=True, softmax=False)
    tuned = weights | {key: dense_weights(11, encoder, transposed=True)[key] for key in ("w1", "b1")}
    dense_net(folder, "encoder_fc_tuned", encoder, tuned, transposed=True, softmax=False)
    # 100 MB each, for loads that take a while; the two share no block.
    deep = [2048] * 7
    for name, seed in (("big_mlp", 6), ("big_mlp_2", 7)):
        dense_net(folder, name, deep, dense_weights(seed, deep, transposed=False), softmax=False)


def matmul(folder: Path) -> None:
    weight = he(np.random.default_rng(8), 1024, 1024, fan_in=1024)
    node = [helper.make_node("MatMul", ["x", "w"], ["y"], "matmul")]
    for name in ("matmul_1024", "matmul_1024_edited"):
        save(folder, name, node, {"x": ["batch", 1024]}, {"y": ["batch", 1024]}, {"w": weight})
        weight = weight.copy()
        weight[700, 300] += 1.0


def cnn(folder: Path) -> None:
    rng = np.random.default_rng(9)
    nodes, weights, at, channels = [], {}, "x", 3
    for i, wide in enumerate((16, 32, 64)):
        weights[f"k{i}"] = he(rng, wide, channels, 3, 3, fan_in=channels * 9)
        for key, value in (("scale", 1.0), ("bias", 0.0), ("mean", 0.0), ("var", 1.0)):
            weights[f"{key}{i}"] = (value + 0.1 * np.abs(rng.normal(size=wide))).astype(np.float32)
        nodes += [
            helper.make_node("Conv", [at, f"k{i}"], [f"c{i}"], f"conv{i}", kernel_shape=[3, 3],
                             strides=[2, 2] if i else [1, 1], pads=[1, 1, 1, 1]),
            helper.make_node("BatchNormalization", [f"c{i}", f"scale{i}", f"bias{i}", f"mean{i}", f"var{i}"], [f"n{i}"], f"bn{i}"),
            helper.make_node("Relu", [f"n{i}"], [f"r{i}"], f"relu{i}")]
        at, channels = f"r{i}", wide
    weights["w"] = he(rng, 10, 64, fan_in=64)
    weights["b"] = (rng.normal(size=10) * 0.1).astype(np.float32)
    nodes += [
        helper.make_node("GlobalAveragePool", [at], ["pooled"], "pool"),
        helper.make_node("Flatten", ["pooled"], ["flat"], "flatten"),
        helper.make_node("Gemm", ["flat", "w", "b"], ["logits"], "gemm", transB=1),
        helper.make_node("Softmax", ["logits"], ["y"], "softmax")]
    save(folder, "cnn", nodes, {"x": ["batch", 3, 32, 32]}, {"y": ["batch", 10]}, weights)


def lstm(folder: Path) -> None:
    """[batch, 20, 8] -> LSTM of 32 -> the last step -> 4 classes."""
    rng = np.random.default_rng(10)
    hidden, features = 32, 8
    weights = {
        "w": he(rng, 1, 4 * hidden, features, fan_in=2 * features),
        "r": he(rng, 1, 4 * hidden, hidden, fan_in=2 * hidden),
        "bias": (rng.normal(size=(1, 8 * hidden)) * 0.1).astype(np.float32),
        "axis": np.array([0], dtype=np.int64),
        "out_w": he(rng, hidden, 4, fan_in=hidden),
        "out_b": np.zeros(4, dtype=np.float32)}
    nodes = [
        helper.make_node("Transpose", ["x"], ["steps"], "transpose", perm=[1, 0, 2]),
        helper.make_node("LSTM", ["steps", "w", "r", "bias"], ["", "last"], "lstm", hidden_size=hidden),
        helper.make_node("Squeeze", ["last", "axis"], ["state"], "squeeze"),
        helper.make_node("Gemm", ["state", "out_w", "out_b"], ["logits"], "gemm"),
        helper.make_node("Softmax", ["logits"], ["y"], "softmax")]
    save(folder, "lstm", nodes, {"x": ["batch", 20, 8]}, {"y": ["batch", 4]}, weights)


def slow(folder: Path) -> None:
    """Seconds of work from one number: a single product of 6000 x 6000, and 400 products of 1024 x 1024."""
    def expanded(size: int):
        return [helper.make_node("Expand", ["x", "shape"], ["wide"], "expand"),
                helper.make_node("Mul", ["wide", "ramp"], ["m"], "spread")], {
                    "shape": np.array([size, size], dtype=np.int64),
                    "ramp": (np.arange(size, dtype=np.float32) % 7 - 3).reshape(1, size) / size}

    nodes, weights = expanded(6000)
    nodes += [helper.make_node("MatMul", ["m", "m"], ["p"], "product"),
              helper.make_node("ReduceMax", ["p"], ["y"], "largest")]
    save(folder, "slow_operator", nodes, {"x": [1, 1]}, {"y": [1, 1]}, weights)

    nodes, weights = expanded(1024)
    at = "m"
    for i in range(400):
        nodes.append(helper.make_node("MatMul", [at, "m"], [f"p{i}"], f"product{i}"))
        at = f"p{i}"
    nodes.append(helper.make_node("ReduceMax", [at], ["y"], "largest"))
    save(folder, "slow_chain", nodes, {"x": [1, 1]}, {"y": [1, 1]}, weights)


def everything(folder: Path) -> None:
    for make in (fraud, large, matmul, cnn, lstm, slow):
        make(folder)
