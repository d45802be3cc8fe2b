"""A model that is larger than the memory it may use: 150,000 -> 3,000 -> 14,588, 2 GB of weights, in a quarter of that.

The backend's address space is limited to what it has with the shared memory mapped, and a quarter of the model's bytes. Each
batch is predicted with the file cold. Beside it stand two bounds of the same run: reading the weights once from disk, and the
products in memory (ONNX Runtime, one thread, on a tenth of the rows); and ONNX Runtime under the same limit.
"""

import argparse
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "scripts" / "models"), str(ROOT / "pg_test")]

import numpy as np  # noqa: E402
import onnx  # noqa: E402
from onnx import TensorProto, helper  # noqa: E402

from bench import machine  # noqa: E402
from cluster import Cluster  # noqa: E402
from paths import TARGET  # noqa: E402

BATCHES = (32, 128)


def network(inputs: int, hidden: int, outputs: int, seed: int) -> tuple[onnx.ModelProto, list[np.ndarray]]:
    dice = np.random.default_rng(seed)
    shapes = (inputs, hidden), (hidden,), (hidden, outputs), (outputs,)
    values = [dice.standard_normal(shape, dtype=np.float32) * np.float32(shape[0] ** -0.5) for shape in shapes]
    names = "w1", "b1", "w2", "b2"
    make = helper.make_tensor
    tensors = [make(name, TensorProto.FLOAT, v.shape, v.tobytes(), raw=True) for name, v in zip(names, values, strict=True)]
    nodes = [
        helper.make_node("Gemm", ["x", "w1", "b1"], ["a"]),
        helper.make_node("Relu", ["a"], ["r"]),
        helper.make_node("Gemm", ["r", "w2", "b2"], ["y"]),
    ]
    port = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "larger",
        [port("x", TensorProto.FLOAT, ["batch", inputs])],
        [port("y", TensorProto.FLOAT, ["batch", outputs])],
        tensors,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)])
    model.ir_version = 8
    return model, values


def forget(path: Path) -> None:
    """Takes a file out of the operating system's cache."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def files_of(cluster: Cluster, conn) -> list[Path]:
    (name,) = conn.execute(
        "SELECT pg_relation_filepath(reltoastrelid) FROM pg_class WHERE oid = 'tessera.weight'::regclass"
    ).fetchone()
    base = cluster.data / name
    return [path for path in base.parent.glob(base.name + "*") if path.name.removeprefix(base.name).strip(".0123456789") == ""]


def disk_seconds(files: list[Path]) -> float:
    for path in files:
        forget(path)
    begin = time.perf_counter()
    for path in files:
        with open(path, "rb", buffering=0) as file:
            while file.read(1 << 20):
                pass
    return time.perf_counter() - begin


def one_thread():
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime, options


def product_seconds(inputs: int, hidden: int, outputs: int, batch: int) -> float:
    """The products with resident weights: a tenth of the first layer ten times, and the second one."""
    runtime, options = one_thread()
    total = 0.0
    for rows, columns, times in ((inputs // 10, hidden, 10), (hidden, outputs, 1)):
        weights = np.ones((rows, columns), dtype=np.float32)
        tensor = helper.make_tensor("w", TensorProto.FLOAT, weights.shape, weights.tobytes(), raw=True)
        port = helper.make_tensor_value_info
        ends = [port("x", TensorProto.FLOAT, [batch, rows])], [port("y", TensorProto.FLOAT, [batch, columns])]
        graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "product", *ends, [tensor])
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)])
        model.ir_version = 8
        session = runtime.InferenceSession(model.SerializeToString(), options)
        x = {"x": np.ones((batch, rows), dtype=np.float32)}
        best = min(timed(lambda: session.run(None, x)) for _ in range(3))
        total += best * times
    return total


def timed(work) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def status(pid: int | str, key: str) -> int:
    """kB of a line of a process's status."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key + ":")).split()[1])


class Peak:
    """The most anonymous memory that a process has while this is entered, in MB."""

    def __init__(self, pid: int):
        self.pid, self.most, self.over = pid, 0, threading.Event()

    def __enter__(self) -> "Peak":
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def watch(self) -> None:
        while not self.over.wait(0.01):
            self.most = max(self.most, status(self.pid, "RssAnon") // 1024)

    def __exit__(self, *_) -> None:
        self.over.set()
        self.thread.join()


QUESTION = """
INSERT INTO question SELECT %(batch)s, array_agg(line ORDER BY b) FROM (
    SELECT b, (SELECT array_agg(((i * 7 + b * 13) %% 1000)::real / 1000::real ORDER BY i) FROM generate_series(1, %(inputs)s) i) line
    FROM generate_series(1, %(batch)s) b) lines
"""
UNDER_LIMIT = """
import resource, sys, time
import numpy as np, onnxruntime
size = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmSize:")) * 1024
resource.setrlimit(resource.RLIMIT_AS, (size + int(sys.argv[2]),) * 2)
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
begin = time.perf_counter()
session = onnxruntime.InferenceSession(sys.argv[1], options)
session.run(None, {"x": np.ones((32, session.get_inputs()[0].shape[1]), dtype=np.float32)})
print(f"{time.perf_counter() - begin:.1f} s")
"""


def onnx_runtime_under_limit(path: Path, limit: int) -> str:
    command = [sys.executable, "-c", UNDER_LIMIT, str(path), str(limit)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0:
        return done.stdout.strip()
    return "fails: " + (done.stderr.strip().splitlines() or ["killed"])[-1].replace(str(path), path.name)[-160:]


def expected(x: np.ndarray, values: list[np.ndarray]) -> np.ndarray:
    w1, b1, w2, b2 = values
    return np.maximum(x @ w1 + b1, 0) @ w2 + b2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scale", type=float, default=1.0, help="of the first layer's rows")
    parser.add_argument("--markdown", type=Path)
    options = parser.parse_args()
    inputs, hidden, outputs = int(150_000 * options.scale), 3_000, 14_588

    folder = TARGET / "larger"
    folder.mkdir(exist_ok=True)
    path = folder / "larger.onnx"
    model, values = network(inputs, hidden, outputs, 7)
    path.write_bytes(model.SerializeToString())
    size = path.stat().st_size
    del model
    path.chmod(0o644)
    quarter = size // 4

    cluster = Cluster("bench_larger", settings=("tessera.block_cache_size = '64MB'", "max_wal_size = '4GB'"))
    cluster.remove()
    cluster.start()
    lines = [
        f"{inputs:,} -> {hidden:,} -> {outputs:,}: {size / 1e9:.2f} GB; the backend may take {quarter / 1e6:.0f} MB beyond its",
        "shared memory (block cache 64 MB).",
        "",
        "| batch | predict, s | disk, s | products, s | of their sum | peak of anonymous memory, MB |",
        "| ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    try:
        with cluster.connect() as conn:
            content = path.read_bytes()
            conn.execute("SELECT lo_from_bytea(4711, '')")
            for start in range(0, len(content), 64 << 20):
                conn.execute("SELECT lo_put(4711, %s, %b)", (start, content[start : start + (64 << 20)]))
            del content
            conn.execute("SELECT load_model_from_large_object('larger', 4711)")
            conn.execute("SELECT lo_unlink(4711)")
            small, _ = network(40, 300, 300, 8)
            conn.execute("SELECT load_model('small', %b)", (small.SerializeToString(),))
            conn.execute("CHECKPOINT")
        with cluster.connect() as conn:
            files = files_of(cluster, conn)
            (pid,) = conn.execute("SELECT pg_backend_pid()").fetchone()
            # The compute thread's stack is address space too.
            conn.execute("SELECT predict('small', array_fill(1::real, ARRAY[40]))")
            conn.execute("CREATE TEMP TABLE question (batch int, x real[])")
            questions = {}
            for batch in BATCHES:
                places = np.arange(1, inputs + 1)[None, :] * 7 + np.arange(1, batch + 1)[:, None] * 13
                questions[batch] = (places % 1000).astype(np.float32) / np.float32(1000)
                conn.execute(QUESTION, {"batch": batch, "inputs": inputs})
            limit = status(pid, "VmSize") * 1024 + quarter
            # Only a process of the same user may do this.
            cluster.as_server("prlimit", "--pid", str(pid), f"--as={limit}")
            for batch in BATCHES:
                disk = disk_seconds(files)
                products = product_seconds(inputs, hidden, outputs, batch)
                for file in files:
                    forget(file)
                with Peak(pid) as peak:
                    begin = time.perf_counter()
                    (count, *some) = conn.execute(
                        "SELECT cardinality(y), y[1:2] FROM (SELECT predict('larger', x) y FROM question WHERE batch = %s OFFSET 0) q",
                        (batch,),
                    ).fetchone()
                    seconds = time.perf_counter() - begin
                assert count == batch * outputs
                wanted = expected(questions[batch][:2], values)
                worst = np.abs(np.array(some[0], dtype=np.float32) - wanted).max()
                assert worst < 1e-3, f"outputs differ by {worst}"
                ratio = seconds / (disk + products)
                lines.append(f"| {batch} | {seconds:.2f} | {disk:.2f} | {products:.2f} | {ratio:.2f} | {peak.most} |")
                print(lines[-1], flush=True)
            about = machine(conn)
    finally:
        cluster.remove()
    lines += ["", f"ONNX Runtime under the same limit: {onnx_runtime_under_limit(path, quarter)}", "", about]
    path.unlink()
    text = "\n".join(lines)
    print(text)
    if options.markdown:
        options.markdown.write_text(text + "\n")


if __name__ == "__main__":
    main()
