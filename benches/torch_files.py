"""Saves and loads models with PyTorch, a file a model, and prints the seconds as JSON; it knows nothing of the project.

    torch_files.py PARAMETERS.f32 LAYOUT.json FOLDER

PARAMETERS.f32 has a row of float32 per model, LAYOUT.json the (name, shape) of each tensor of a row. Where PyTorch is missing, numpy's
savez stands in: a zip of raw arrays as well, without the pickle.
"""

import json
import os
import sys
import time
from math import prod
from pathlib import Path

try:
    import torch
except ImportError:
    torch = None
    import numpy as np


def states(parameters: Path, layout: list) -> list[dict]:
    """State dictionaries whose tensors own their memory, as those of models in training."""
    width = sum(prod(shape) for _name, shape in layout)
    raw = bytearray(parameters.read_bytes())
    rows = torch.frombuffer(raw, dtype=torch.float32) if torch else np.frombuffer(raw, dtype=np.float32)
    made = []
    for row in rows.reshape(-1, width):
        state, first = {}, 0
        for name, shape in layout:
            piece = row[first:first + prod(shape)].reshape(shape)
            state[name] = piece.clone() if torch else piece.copy()
            first += prod(shape)
        made.append(state)
    return made


def save(state: dict, path: Path) -> None:
    if torch:
        torch.save(state, path)
    else:
        np.savez(path, **state)


def load(path: Path) -> dict:
    return torch.load(path) if torch else dict(np.load(path))


def main() -> None:
    parameters, layout, folder = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text()), Path(sys.argv[3])
    if torch:
        torch.set_num_threads(1)
    models, figures = states(parameters, layout), {"by": f"torch {torch.__version__}" if torch else "numpy.savez"}
    for durable in (False, True):
        home = folder / ("durable" if durable else "plain")
        home.mkdir(parents=True)
        paths = [home / f"{number:04}.npz" for number in range(len(models))]
        save(models[0], home / "first")  # what is loaded or imported by the first one is not counted
        os.sync()
        started = time.perf_counter()
        for state, path in zip(models, paths):
            save(state, path)
            if durable:
                descriptor = os.open(path, os.O_RDONLY)
                os.fsync(descriptor)
                os.close(descriptor)
        if durable:
            descriptor = os.open(home, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
        figures["save_fsync" if durable else "save"] = time.perf_counter() - started
    figures["bytes"] = sum(path.stat().st_size for path in paths)
    figures["disk"] = sum(path.stat().st_blocks * 512 for path in paths)
    started = time.perf_counter()
    loaded = [load(path) for path in paths]
    figures["load"] = time.perf_counter() - started
    equal = torch.equal if torch else (lambda a, b: bool((a == b).all()))
    assert all(equal(there[name], state[name]) for there, state in zip(loaded, models) for name in state), "what was loaded differs"
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
