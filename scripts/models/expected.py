"""Runs every model in ONNX Runtime and keeps inputs and outputs: target/models/expected/NAME-BATCH.npz.

An entry is `in:NAME` or `out:NAME`. The tests compare what SQL answers with these files.
"""

import zlib

import numpy as np
import onnxruntime

from paths import EXPECTED, MODELS
from zoo import Model


def session(path) -> onnxruntime.InferenceSession:
    """A one-thread session."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def write(model: Model) -> None:
    runtime = session(MODELS / model.file)
    outputs = [port.name for port in runtime.get_outputs()]
    for batch in model.batches:
        rng = np.random.default_rng(zlib.crc32(model.name.encode()) + batch)
        inputs = model.inputs(rng, batch)
        answers = runtime.run(outputs, inputs)
        kept = {f"in:{name}": value for name, value in inputs.items()}
        kept |= {f"out:{name}": np.asarray(value) for name, value in zip(outputs, answers)}
        np.savez(EXPECTED / f"{model.name}-{batch}.npz", **kept)
