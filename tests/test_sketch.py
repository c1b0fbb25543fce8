"""Bounds that spare looking at rows: no row that counts is ever left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from expbuf_core import segments
from expbuf_core.builtin.exact import ExactIndexBackend, ExactSettings
from expbuf_core.contracts import IndexContext
from expbuf_core.exact_search import METRICS, exact_search
from expbuf_core.filesystem import FileSystem
from expbuf_core.sketch import LEAST_ROWS, Directions, Sketch, directions
from expbuf_core.tiers import IndexTiers, search

DIM = 128
each_metric = pytest.mark.parametrize("metric", METRICS)


def embeddings(rng: np.random.Generator, n: int, rank: int = 20, noise: float = 0.1) -> Any:
    """Long in few directions, as embeddings are."""
    basis = np.random.default_rng(5).standard_normal((rank, DIM))
    points = rng.standard_normal((n, rank)) @ basis + noise * rng.standard_normal((n, DIM))
    return points.astype(np.float32)


def shaped(vectors: Any, metric: str) -> NDArray[np.float32]:
    if metric == "cosine":
        vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.ascontiguousarray(vectors, np.float32)


def similarities(vectors: Any, query: Any, metric: str) -> Any:
    wide, q = vectors.astype(np.float64), query.astype(np.float64)
    return -((wide - q) ** 2).sum(axis=1) if metric == "l2" else wide @ q


@each_metric
@pytest.mark.parametrize("kind", ["embeddings", "noise", "one direction", "lengths", "zeros"])
def test_no_row_that_counts_is_out(rng: np.random.Generator, metric: str, kind: str) -> None:
    vectors = embeddings(rng, 3000, noise=3.0 if kind == "noise" else 0.1)
    if kind == "one direction":
        vectors = vectors[:1] * rng.standard_normal((3000, 1)).astype(np.float32)
        vectors += 1e-3 * embeddings(rng, 3000)
    elif kind == "lengths":
        vectors *= np.exp(4 * rng.standard_normal((3000, 1))).astype(np.float32)
    vectors = shaped(vectors, metric)
    if kind == "zeros":
        vectors[::7] = 0
    sketch = Sketch(Directions(vectors[:500]), vectors)
    kept = 0
    for query in vectors[-200:]:
        truth = similarities(vectors[:2800], query, metric)
        for rank in (1, 10, 60):
            floor = float(np.float32(np.sort(truth)[-rank]))
            squared = (vectors[:2800] ** 2).sum(axis=1) if metric == "l2" else None
            told = sketch.candidates(2800, query, floor, squared)
            if told is not None:
                kept += 1
                rows = np.concatenate([told[0], np.arange(told[1], 2800)])
                assert (np.diff(rows) > 0).all()
                assert np.isin(np.flatnonzero(truth >= floor), rows).all()
    assert kept or kind in ("noise", "one direction")


def test_hardly_any_row_is_left(rng: np.random.Generator) -> None:
    vectors = shaped(embeddings(rng, 9000), "cosine")
    known = directions(vectors[:8400])
    assert known is not None
    np.testing.assert_allclose(known.basis @ known.basis.T, np.eye(len(known.basis)), atol=1e-5)
    tail = np.ascontiguousarray(vectors[8400:])
    sketch = Sketch(known, tail)
    sketch.complete(len(tail))
    left = [sketch.candidates(len(tail), query, 0.9) for query in vectors[:100]]
    assert np.mean([len(tail) if told is None else len(told[0]) for told in left]) < 10


def test_what_is_not_sketched_yet_is_looked_at(rng: np.random.Generator) -> None:
    vectors = shaped(embeddings(rng, 2000), "cosine")
    sketch = Sketch(Directions(vectors[:500]), vectors)
    assert sketch.candidates(LEAST_ROWS - 1, vectors[0], 0.9) is None, "as fast without"
    for rows, sketched in ((1900, 512), (1900, 1024), (1900, 1536), (1900, 1900), (2000, 2000)):
        told = sketch.candidates(rows, vectors[0], 0.95)
        assert told is not None
        found, until = told
        assert until == sketched
        assert len(found) < 60
        assert (found < sketched).all()


def test_a_large_debt_is_soon_paid(rng: np.random.Generator) -> None:
    vectors = shaped(embeddings(rng, 20_000), "cosine")
    sketch = Sketch(Directions(vectors[:500]), vectors)
    searches, until = 0, 0
    while until < len(vectors):
        told = sketch.candidates(len(vectors), vectors[0], 0.95)
        assert told is not None
        searches, until = searches + 1, told[1]
    assert searches < 25


def test_bounds_go_along_with_their_rows(rng: np.random.Generator) -> None:
    vectors = shaped(embeddings(rng, 2000), "cosine")
    sketch = Sketch(Directions(vectors[:500]), vectors)
    sketch.complete(1500)
    keep = np.sort(rng.choice(2000, 1600, replace=False))
    moved = np.empty((4000, DIM), np.float32)
    moved[:1600] = vectors[keep]
    kept = int((keep < 1500).sum())
    for copied, n, known in (
        (sketch.copied(vectors.copy(), np.arange(2000)), 2000, 1500),
        (sketch.copied(moved, keep), 1600, kept),
    ):
        fresh = Sketch(sketch.known, copied.vectors)
        fresh.complete(n)
        for query in vectors[:50]:
            told, truth = copied.candidates(known, query, 0.9), fresh.candidates(known, query, 0.9)
            assert told is not None
            assert truth is not None
            np.testing.assert_array_equal(told[0], truth[0])
            assert told[1] == known


def test_gives_up_where_it_is_of_no_use(rng: np.random.Generator) -> None:
    vectors = shaped(rng.standard_normal((2000, DIM)), "cosine")
    sketch = Sketch(Directions(vectors[:1000]), vectors)
    assert all(sketch.candidates(2000, query, 0.2) is None for query in vectors[:40])
    assert sketch.candidates(2000, vectors[0], 0.999) is None, "it is not tried again"


def test_where_there_are_none(rng: np.random.Generator) -> None:
    assert directions(embeddings(rng, 500)) is None, "too few to know"
    assert directions(np.zeros((9000, 64), np.float32)) is None, "too short to save anything"


@pytest.mark.parametrize("scale", [0.0, 1e-25, 1e18, 1e25])
def test_numbers_at_the_limits(rng: np.random.Generator, scale: float) -> None:
    vectors = (embeddings(rng, 1000) * np.float32(scale)).astype(np.float32)
    sketch = Sketch(Directions(vectors), vectors)
    for query in vectors[:20]:
        with np.errstate(all="ignore"):
            truth = vectors @ query
            floor = float(np.nan_to_num(np.sort(truth)[-10]))
            told = sketch.candidates(1000, query, floor)
        if told is not None:
            rows = np.concatenate([told[0], np.arange(told[1], 1000)])
            assert np.isin(np.flatnonzero(~(truth < floor)), rows).all()


@each_metric
def test_a_tail_beside_segments(tmp_path: Path, rng: np.random.Generator, metric: str) -> None:
    """One by one, in a batch, and by comparing all vectors: the same."""
    vectors = shaped(embeddings(rng, 10_500), metric)
    queries, vectors = vectors[10_400:], vectors[:10_400]
    backend = ExactIndexBackend(ExactSettings(), IndexContext(DIM, metric))
    ids = np.arange(len(vectors), dtype=np.int64)
    opened = []
    for name, first, behind in (("1", 0, 8400), ("2", 8400, 9000)):
        info = segments.write_segment(
            tmp_path,
            name,
            uuid=bytes(16),
            ids=ids[first:behind],
            vectors=iter([vectors[first:behind]]),
            dim=DIM,
            end_id=behind,
            backend_name="exact",
            backend=backend,
            fs=FileSystem(),
        )
        opened.append(
            segments.open_segment(tmp_path, info, DIM, backend, ids[first:behind], filters=True)
        )
    segments.sketch_small_ones(tuple(opened), metric)
    large, small = opened
    assert large.directions is not None
    assert large.sketch is None
    assert small.sketch is not None
    left = []
    for query in queries:
        floor = float(np.sort(similarities(vectors[:8400], query, metric))[-10])
        left.append(small.sketch.candidates(600, query, floor, small.sketch.squared))
    assert any(told is not None for told in left)
    kept = small.sketch
    segments.sketch_small_ones(tuple(opened), metric)
    assert small.sketch is kept
    tiers = IndexTiers(metric)
    tiers.adopt(tuple(opened), lsn=1, end_id=9000, generation=1)
    live = np.ones(len(vectors), bool)
    for first, n in ((9000, 9500), (9500, 10_000), (10_000, 10_400)):
        tiers.add(ids[first:n], vectors[first:n])
        gone = rng.choice(n, 200)
        tiers.remove(gone)
        live[gone] = False
        view = tiers.view()
        assert view.tail_sketch is not None
        mask = live[:n]
        truth = exact_search(vectors[:n], None, queries, 10, metric, mask)
        batch = search(view, metric, queries, 10)
        np.testing.assert_array_equal(batch[0], truth[0])
        for i, query in enumerate(queries):
            found = search(view, metric, query[np.newaxis], 10)
            np.testing.assert_array_equal(found[0][0], truth[0][i])
            np.testing.assert_allclose(found[1][0], truth[1][i], rtol=1e-4, atol=1e-4)
        allowed = ids[:n:3]
        mask = live[:n] & (np.arange(n) % 3 == 0)
        truth = exact_search(vectors[:n], None, queries, 10, metric, mask)
        for i, query in enumerate(queries):
            found = search(view, metric, query[np.newaxis], 10, allowed)
            np.testing.assert_array_equal(found[0][0], truth[0][i])
    # Of equals those of lower ids come first, also where only some are bounded yet.
    more = shaped(embeddings(rng, 1500), metric)
    more[[3, 700, 1400]] = queries[0]
    tiers.add(np.arange(10_400, 11_900), more)
    found = search(tiers.view(), metric, queries[:1], 10)
    np.testing.assert_array_equal(found[0], search(tiers.view(), metric, queries[:2], 10)[0][:1])
    if metric != "inner_product":  # there a longer vector is more similar than the same
        assert {10_403, 11_100, 11_800} <= set(found[0][0].tolist())
    if metric != "cosine":
        huge = queries[:1] * np.float32(1e25)
        tiers.add(np.array([11_900]), huge)
        found = search(tiers.view(), metric, huge, 10)  # overflows, and does not warn
        assert found[0][0, 0] == 11_900
