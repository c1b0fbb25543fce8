"""Vectors to search: synthetic clusters, patches of photographs, passages of text.

    python -m benchmarks.data

What an index can do depends on the data: on how many directions neighbours differ in, far more than
on how many numbers a vector has. So the clusters have an intrinsic dimension that is chosen, and
two kinds of real vectors stand beside them, made from what packages ship, so that nothing has to be
fetched: patches of scikit-learn's two photographs, and passages of the source text of Python's
standard library. No model makes them: pixels and hashed words, which is what can be made anywhere
alike.
"""

from __future__ import annotations

import argparse
import re
import sysconfig
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Vectors = NDArray[np.float32]

TEXT_BYTES = 500
PATCH = 8  # pixels; times 8 times 3 colours: 192 numbers
WORDS = 4096  # hashed; projected to
TEXT_DIM = 256


@dataclass
class Dataset:
    """Vectors of length 1 to store, and others, drawn alike, to search with.

    Attributes:
        name: Of the kind.
        vectors: (n, dim) float32.
        queries: (m, dim) float32; none of them is among the vectors.
        note: What they are, in words.
    """

    name: str
    vectors: Vectors
    queries: Vectors
    note: str

    @property
    def dim(self) -> int:
        return int(self.vectors.shape[1])


def _unit(vectors: Vectors) -> Vectors:
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(vectors / np.maximum(lengths, 1e-12), np.float32)


def clusters(
    n: int, queries: int, seed: int, *, dim: int = 384, intrinsic: int = 32, centres: int = 256
) -> Dataset:
    """Normal clusters in a random subspace of `intrinsic` dimensions."""
    rng = np.random.default_rng(seed)
    intrinsic = min(intrinsic, dim)
    basis = rng.standard_normal((intrinsic, dim)).astype(np.float32)
    middles = rng.standard_normal((centres, intrinsic)).astype(np.float32)
    made = np.empty((n + queries, dim), np.float32)
    for start in range(0, len(made), 1 << 16):
        size = min(1 << 16, len(made) - start)
        points = middles[rng.integers(0, centres, size)]
        points += 0.5 * rng.standard_normal((size, intrinsic)).astype(np.float32)
        made[start : start + size] = _unit(points @ basis)
    note = f"{centres} normal clusters in {intrinsic} of {dim} dimensions"
    return Dataset(f"clusters-{intrinsic}", made[:n], made[n:], note)


def photographs(n: int, queries: int, seed: int) -> Dataset:
    """Patches of scikit-learn's two photographs, less their mean colour."""
    from sklearn.datasets import load_sample_images

    rng = np.random.default_rng(seed)
    images = [np.asarray(image, np.float32) for image in load_sample_images().images]
    views = [
        np.lib.stride_tricks.sliding_window_view(image, (PATCH, PATCH, image.shape[2]))[:, :, 0]
        for image in images
    ]
    sizes = [view.shape[0] * view.shape[1] for view in views]
    if sum(sizes) < n + queries:
        raise ValueError(f"the photographs have {sum(sizes):,} patches, not {n + queries:,}")
    chosen = rng.permutation(sum(sizes))[: n + queries]
    made = np.empty((n + queries, PATCH * PATCH * 3), np.float32)
    for which, view in enumerate(views):
        first = sum(sizes[:which])
        rows = np.flatnonzero((chosen >= first) & (chosen < first + sizes[which]))
        y, x = np.divmod(chosen[rows] - first, view.shape[1])
        patches = view[y, x].reshape(len(rows), -1, 3)
        made[rows] = (patches - patches.mean(axis=1, keepdims=True)).reshape(len(rows), -1)
    # A patch of one colour has no direction of its own.
    made += 0.5 * rng.standard_normal(made.shape).astype(np.float32)
    made = _unit(made)
    note = f"{PATCH} by {PATCH} pixels of two photographs, less their mean colour"
    return Dataset("photographs", made[:n], made[n:], note)


@lru_cache
def _library() -> tuple[str, ...]:
    """The standard library's source files, as far as they are ASCII."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    texts = []
    for path in sorted(folder.glob("**/*.py")):
        if {"site-packages", "lib2to3", "idlelib"}.isdisjoint(path.parts):
            text = path.read_text(encoding="ascii", errors="ignore")
            if len(text) > 2 * TEXT_BYTES:
                texts.append(text)
    return tuple(texts)


def passages(n: int, seed: int) -> list[str]:
    """Passages of the standard library's source text, of TEXT_BYTES ASCII characters."""
    rng = np.random.default_rng(seed)
    texts = _library()
    lengths = np.array([len(text) - TEXT_BYTES for text in texts])
    ends = np.cumsum(lengths)
    # Apart as far as the text allows: passages that overlap are near duplicates.
    step = int(max(1, min(TEXT_BYTES, ends[-1] // n)))
    slots = ends[-1] // step
    places = rng.choice(slots, n, replace=n > slots) * step
    which = np.searchsorted(ends, places, side="right")
    offsets = places - (ends[which] - lengths[which])
    return [texts[w][at : at + TEXT_BYTES] for w, at in zip(which, offsets, strict=True)]


def library_text(n: int, queries: int, seed: int) -> Dataset:
    """Passages of the standard library: weighted hashed words, projected at random."""
    rng = np.random.default_rng(seed)
    word = re.compile(r"[A-Za-z]{2,}")
    slots: dict[str, int] = {}
    rows, columns = [], []
    for row, text in enumerate(passages(n + queries, seed)):
        for found in word.findall(text):
            if found not in slots:
                slots[found] = zlib.crc32(found.lower().encode()) % WORDS
            rows.append(row)
            columns.append(slots[found])
    flat = np.asarray(rows, np.int64) * WORDS + np.asarray(columns)
    cells, counts = np.unique(flat, return_counts=True)
    passage, column = np.divmod(cells, WORDS)
    frequency = np.bincount(column, minlength=WORDS)
    weight = (np.log((n + queries + 1) / (frequency + 1)))[column] * np.log1p(counts)
    projection = rng.standard_normal((WORDS, TEXT_DIM)).astype(np.float32)
    made = np.zeros((n + queries, TEXT_DIM), np.float32)
    bounds = np.searchsorted(passage, np.arange(n + queries + 1))
    for i in range(n + queries):
        part = slice(bounds[i], bounds[i + 1])
        made[i] = weight[part].astype(np.float32) @ projection[column[part]]
    made = _unit(made)
    note = f"passages of Python's standard library, hashed words projected to {TEXT_DIM}"
    return Dataset("library text", made[:n], made[n:], note)


def wide(n: int, queries: int, seed: int) -> Dataset:
    """Clusters of 128 intrinsic dimensions: as hard as embeddings get."""
    return clusters(n, queries, seed, intrinsic=128)


def plain(n: int, queries: int, seed: int) -> Dataset:
    """Clusters of 32 intrinsic dimensions."""
    return clusters(n, queries, seed)


def easy(n: int, queries: int, seed: int) -> Dataset:
    """Clusters of 8 intrinsic dimensions."""
    return clusters(n, queries, seed, intrinsic=8)


KINDS: dict[str, Callable[[int, int, int], Dataset]] = {
    "clusters-8": easy,
    "clusters-32": plain,
    "clusters-128": wide,
    "photographs": photographs,
    "library text": library_text,
}


def nearest(vectors: Vectors, queries: Vectors, k: int) -> NDArray[np.int64]:
    """(m, k) rows of the vectors closest to each query by inner product, exactly."""
    best = np.empty((len(queries), k), np.int64)
    scores = np.full((len(queries), k), -np.inf, np.float32)
    best[:] = -1
    for start in range(0, len(vectors), 1 << 15):
        block = queries @ vectors[start : start + (1 << 15)].T
        both = np.concatenate([scores, block], axis=1)
        ids = np.concatenate(
            [best, np.broadcast_to(np.arange(start, start + block.shape[1]), block.shape)], axis=1
        )
        top = np.argpartition(-both, k - 1, axis=1)[:, :k]
        scores = np.take_along_axis(both, top, axis=1)
        best = np.take_along_axis(ids, top, axis=1)
    order = np.argsort(-scores, axis=1, kind="stable")
    return np.take_along_axis(best, order, axis=1)


def intrinsic_dimension(vectors: Vectors, *, rows: int = 1000) -> float:
    """Estimate from the ratio of the distances to the two nearest neighbours.

    Facco et al. 2017: the ratio r follows a Pareto law whose exponent is the dimension; its maximum
    likelihood estimate is the count over the sum of log r.
    """
    some = vectors[:rows]
    near = nearest(vectors, some, 3)
    others = np.take_along_axis(near, np.array([[1, 2]]), axis=1)
    first, second = (
        np.linalg.norm(some - vectors[others[:, place]], axis=1).astype(np.float64)
        for place in (0, 1)
    )
    distinct = (first > 1e-6) & (second > first)
    logs = np.log(second[distinct] / first[distinct])
    return float(np.count_nonzero(distinct) / logs.sum())


def main() -> None:
    made = argparse.ArgumentParser(description="What the vectors of each kind are like.")
    made.add_argument("--rows", type=int, default=20_000)
    made.add_argument("--seed", type=int, default=0)
    arguments = made.parse_args()
    for name, make in KINDS.items():
        started = time.perf_counter()
        data = make(arguments.rows, 100, arguments.seed)
        took = time.perf_counter() - started
        measured = intrinsic_dimension(data.vectors)
        print(
            f"{name:<14} {data.vectors.shape!s:<16} intrinsic dimension about {measured:4.1f} "
            f"(made in {took:.1f} s): {data.note}"
        )


if __name__ == "__main__":
    main()
