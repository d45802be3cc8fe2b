"""Other ways of finding near-duplicate blocks, in numpy, on the blocks that the extension would store: what netsDB compares with.

Pairwise: each block against every one that is stored, by the share of elements within a tolerance; then, as netsDB does, the least
important blocks are merged as long as the accuracy on guiding texts holds. MISTIQUE-like (Vartak et al., SIGMOD 2018): values are cut into bins, a
block is the set of its (place, bin) pairs, and blocks whose MinHash signatures agree in enough places are taken for one; nothing is checked.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

EDGE = 128
HASHES = 64


def tiles(matrix: np.ndarray) -> dict[tuple[int, int], list[tuple[int, int]]]:
    """Where the tiles of a matrix begin, by their shape: 128 x 128, and what is left at the edges."""
    found: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for row in range(0, matrix.shape[0], EDGE):
        for col in range(0, matrix.shape[1], EDGE):
            shape = matrix[row:row + EDGE, col:col + EDGE].shape
            found.setdefault(shape, []).append((row, col))
    return found


def cut(matrix: np.ndarray, shape: tuple[int, int], places: list[tuple[int, int]]) -> np.ndarray:
    """[tiles, elements] of one shape."""
    return np.stack([matrix[row:row + shape[0], col:col + shape[1]].reshape(-1) for row, col in places])


@dataclass
class Stored:
    """Distinct blocks of one shape, with what the way of searching wants to know of each."""

    values: np.ndarray
    known: np.ndarray
    exact: dict[bytes, int] = field(default_factory=dict)

    def add(self, values: np.ndarray, known: np.ndarray) -> None:
        for row in values:
            self.exact[row.tobytes()] = len(self.exact)
        self.values, self.known = np.concatenate([self.values, values]), np.concatenate([self.known, known])


@dataclass
class Found:
    """What a way came to: bytes of distinct blocks, the merged matrices, and how long the search took."""

    bytes: int = 0
    matrices: list[np.ndarray] = field(default_factory=list)
    merged: list[int] = field(default_factory=list)
    seconds: float = 0.0
    compared: int = 0


class Pairwise:
    """Nearest stored block, and whether enough of its elements are within the tolerance. All distances of two stacks are one product,
    which gives what comparing pair by pair gives, so `pair_seconds` says how long that takes for one pair."""

    def __init__(self, tolerance: float = 0.01, share: float = 0.5):
        self.tolerance, self.share = tolerance, share

    def known(self, values: np.ndarray) -> np.ndarray:
        return np.einsum("ij,ij->i", values, values)

    def nearest(self, values: np.ndarray, known: np.ndarray, stored: Stored) -> tuple[np.ndarray, np.ndarray]:
        best, good = np.empty(len(values), np.int64), np.empty(len(values), bool)
        for begin in range(0, len(values), 256):
            some = slice(begin, begin + 256)
            distances = stored.known[None] - 2 * (values[some] @ stored.values.T)  # and |x|^2, the same for all
            best[some] = distances.argmin(axis=1)
            good[some] = (np.abs(values[some] - stored.values[best[some]]) <= self.tolerance).mean(axis=1) >= self.share
        return best, good

    def pair_seconds(self, values: np.ndarray) -> float:
        """One comparison of two blocks of this size."""
        pairs = np.random.default_rng(1).integers(len(values), size=(400, 2))
        started = time.perf_counter()
        for one, other in pairs:
            (np.abs(values[one] - values[other]) <= self.tolerance).mean()
        return (time.perf_counter() - started) / len(pairs)


class MinHash:
    """Signatures of 64 hashes; blocks are one if at least `similar` of them agree, an estimate of Jaccard's index."""

    def __init__(self, similar: float, width: float = 0.02):
        self.similar, self.width = similar, width
        dice = np.random.default_rng(1)
        self.factors = (dice.integers(1 << 31, size=HASHES, dtype=np.uint32) * np.uint32(2) + np.uint32(1))[:, None]
        self.offsets = dice.integers(1 << 32, size=HASHES, dtype=np.uint32)[:, None]

    def known(self, values: np.ndarray) -> np.ndarray:
        made, places = np.empty((len(values), HASHES), np.uint32), np.arange(values.shape[1], dtype=np.uint32) * np.uint32(0x9E3779B1)
        for row, signature in zip(values, made):
            x = (np.floor(row / np.float32(self.width)).astype(np.int32).view(np.uint32) * np.uint32(0x85EBCA6B)) ^ places
            x ^= x >> np.uint32(15)
            x *= np.uint32(0x2C1B3C6D)
            x ^= x >> np.uint32(13)
            signature[:] = (x[None] * self.factors + self.offsets).min(axis=1)
        return made

    def nearest(self, values: np.ndarray, known: np.ndarray, stored: Stored) -> tuple[np.ndarray, np.ndarray]:
        best, good = np.empty(len(values), np.int64), np.empty(len(values), bool)
        for at, signature in enumerate(known):
            agree = (stored.known == signature).sum(axis=1)
            best[at] = agree.argmax()
            good[at] = agree[best[at]] >= self.similar * HASHES
        return best, good


def largest_prefix(total: int, accept: Callable[[int], bool]) -> int:
    """By bisection, as if what holds for n held for less."""
    low, high = 0, total
    if total and accept(total):
        return total
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if accept(middle) else (low, middle)
    return low


def search(matrices: list[np.ndarray], way: Pairwise | MinHash, accept: Callable[[int, np.ndarray], bool] | None = None) -> Found:
    """Goes through the matrices one by one. With `accept` (number of the matrix, the matrix with blocks replaced) the least important blocks,
    by the 75th percentile of their magnitudes, are merged first, as many as are accepted; without it all that were found."""
    found, stores = Found(), {}
    for number, matrix in enumerate(matrices):
        merged, candidates = matrix.copy(), []
        for shape, places in tiles(matrix).items():
            values = cut(matrix, shape, places)
            started = time.perf_counter()
            known = way.known(values)
            store = stores.setdefault(shape, Stored(values[:0], known[:0]))
            fresh = np.array([row.tobytes() not in store.exact for row in values], dtype=bool)
            best, good = np.zeros(len(values), np.int64), np.zeros(len(values), bool)
            if len(store.values) and fresh.any():
                best[fresh], good[fresh] = way.nearest(values[fresh], known[fresh], store)
                found.compared += int(fresh.sum()) * len(store.values)
            found.seconds += time.perf_counter() - started
            weight = np.quantile(np.abs(values), 0.75, axis=1)
            candidates += [(weight[at], shape, at, best[at]) for at in np.flatnonzero(good)]
            stores[shape] = store
        candidates.sort(key=lambda one: one[0])

        def replaced(count: int) -> np.ndarray:
            merged[:] = matrix
            for _weight, shape, at, target in candidates[:count]:
                row, col = tiles_of[shape][at]
                merged[row:row + shape[0], col:col + shape[1]] = stores[shape].values[target].reshape(shape)
            return merged

        tiles_of = tiles(matrix)
        count = len(candidates) if accept is None else largest_prefix(len(candidates), lambda n: accept(number, replaced(n)))
        replaced(count)
        gone = {(shape, at) for _weight, shape, at, _target in candidates[:count]}
        for shape, places in tiles_of.items():
            values, store = cut(matrix, shape, places), stores[shape]
            own = [at for at, row in enumerate(values) if (shape, at) not in gone and row.tobytes() not in store.exact]
            store.add(values[own], way.known(values[own]))
            found.bytes += values[own].nbytes
        found.matrices.append(merged.copy())
        found.merged.append(count)
    return found
