"""Exact search: against a scan in float64, whatever shape, metric and mask."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from expbuf_core import exact_search as module
from expbuf_core.builtin.exact import ExactIndexBackend, ExactSettings
from expbuf_core.contracts import IndexContext
from expbuf_core.errors import CorruptionError
from expbuf_core.exact_search import (
    METRICS,
    exact_best,
    exact_rerank,
    exact_search,
    squared_norms,
    unpack_allowed,
)
from expbuf_core.testing import IndexSuite

each_metric = pytest.mark.parametrize("metric", METRICS)


class TestExactIndex(IndexSuite):
    """The exact index keeps the contract of index backends."""

    provider = "exact"
    min_recall = 1.0


def reference(
    vectors: NDArray[Any],
    queries: NDArray[Any],
    k: int,
    metric: str,
    mask: NDArray[np.bool_] | None = None,
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """By similarity, then by row, in float64."""
    x, q = vectors.astype(np.float64), queries.astype(np.float64)
    if metric == "l2":
        exact = -((q[:, np.newaxis] - x) ** 2).sum(axis=2)
    else:
        exact = q @ x.T
    rows = np.full((len(q), k), -1, np.int64)
    similarities = np.full((len(q), k), -np.inf)
    live = np.arange(len(x)) if mask is None else np.flatnonzero(mask)
    for i, line in enumerate(exact):
        best = live[np.argsort(-line[live], kind="stable")][:k]
        rows[i, : len(best)] = best
        similarities[i, : len(best)] = line[best]
    return rows, similarities


@each_metric
@given(data=st.data())
def test_against_the_reference(metric: str, data: st.DataObject) -> None:
    """Small integers: no rounding, many ties, so that rows must agree as well."""
    n, m = data.draw(st.integers(0, 60)), data.draw(st.integers(0, 5))
    dim, k = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 70))
    draw = np.random.default_rng(data.draw(st.integers(0, 1 << 32)))
    vectors = draw.integers(-3, 4, (n, dim)).astype(np.float32)
    queries = draw.integers(-3, 4, (m, dim)).astype(np.float32)
    share = data.draw(st.sampled_from([None, 0.0, 0.05, 0.5, 0.95, 1.0]))
    mask = None if share is None else draw.random(n) < share
    norms = squared_norms(vectors) if data.draw(st.booleans()) else None
    rows, similarities = exact_search(vectors, norms, queries, k, metric, mask)
    expected = reference(vectors, queries, k, metric, mask)
    np.testing.assert_array_equal(rows, expected[0])
    np.testing.assert_array_equal(similarities, expected[1])
    assert rows.dtype == np.int64
    assert similarities.dtype == np.float32


@each_metric
@given(data=st.data())
def test_the_best_from_a_floor_on(metric: str, data: st.DataObject) -> None:
    """Whatever reaches the floor and is among the k best is found, in the same order."""
    n, dim = data.draw(st.integers(0, 200)), data.draw(st.integers(1, 5))
    k = data.draw(st.integers(1, 12))
    draw = np.random.default_rng(data.draw(st.integers(0, 1 << 32)))
    vectors = draw.integers(-3, 4, (n, dim)).astype(np.float32)
    query = draw.integers(-3, 4, dim).astype(np.float32)
    share = data.draw(st.sampled_from([None, 0.0, 0.05, 0.5, 1.0]))
    mask = None if share is None else draw.random(n) < share
    floor = data.draw(st.sampled_from([-np.inf, -20.0, -3.0, 0.0, 5.0, 100.0]))
    rows, similarities = exact_best(vectors, None, query, k, metric, mask, floor)
    expected = reference(vectors, query[np.newaxis], k, metric, mask)
    good = expected[1][0] >= floor if floor > -np.inf else expected[0][0] >= 0
    np.testing.assert_array_equal(rows[: good.sum()], expected[0][0][good])
    np.testing.assert_array_equal(similarities[: good.sum()], expected[1][0][good])
    assert len(rows) <= k
    assert (np.diff(similarities) <= 0).all()


@each_metric
@pytest.mark.parametrize("m", [1, 2, 33, 70])
@pytest.mark.parametrize(("n", "dim"), [(1000, 384), (3001, 7)])
def test_sizes(rng: np.random.Generator, metric: str, m: int, n: int, dim: int) -> None:
    vectors = rng.standard_normal((n, dim), dtype=np.float32)
    queries = rng.standard_normal((m, dim), dtype=np.float32)
    rows, similarities = exact_search(vectors, None, queries, 10, metric)
    expected = reference(vectors, queries, 10, metric)
    np.testing.assert_array_equal(rows, expected[0])
    np.testing.assert_allclose(similarities, expected[1], rtol=1e-4, atol=1e-3)


@each_metric
def test_blocks(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, metric: str) -> None:
    """Cut into blocks, with ties across them, it finds the same."""
    vectors = rng.integers(-2, 3, (500, 4)).astype(np.float32)
    queries = rng.integers(-2, 3, (40, 4)).astype(np.float32)
    mask = rng.random(500) < 0.7
    whole = exact_search(vectors, None, queries, 20, metric, mask)
    monkeypatch.setattr(module, "_BLOCK_SCORES", 300)
    parts = exact_search(vectors, None, queries, 20, metric, mask)
    np.testing.assert_array_equal(whole[0], parts[0])
    np.testing.assert_array_equal(whole[1], parts[1])


@pytest.mark.parametrize("m", [1, 3])
def test_l2_far_from_the_origin(rng: np.random.Generator, m: int) -> None:
    """|x|² + |q|² - 2 x·q would leave nothing but rounding: neighbours are still told apart."""
    vectors = (1000 + 0.01 * rng.standard_normal((2000, 64))).astype(np.float32)
    queries = (1000 + 0.01 * rng.standard_normal((m, 64))).astype(np.float32)
    rows, similarities = exact_search(vectors, None, queries, 10, "l2")
    expected = reference(vectors, queries, 10, "l2")
    np.testing.assert_array_equal(rows, expected[0])
    np.testing.assert_allclose(similarities, expected[1], rtol=1e-5)


def test_l2_with_one_very_long_vector(rng: np.random.Generator) -> None:
    vectors = rng.standard_normal((500, 16), dtype=np.float32)
    vectors[7] *= 1e6
    rows, _ = exact_search(vectors, None, vectors[8:20], 5, "l2")
    np.testing.assert_array_equal(rows, reference(vectors, vectors[8:20], 5, "l2")[0])


@each_metric
@pytest.mark.parametrize("k", [3, 30])
def test_overflow_loses_no_row(metric: str, k: int) -> None:
    vectors = np.full((20, 8), 1e30, np.float32)
    vectors[::2] *= -1
    rows, _ = exact_search(vectors, None, vectors[:2], k, metric)
    assert ((rows >= 0).sum(axis=1) == min(k, 20)).all()


def test_l2_of_itself_is_plain_zero(rng: np.random.Generator) -> None:
    vectors = rng.standard_normal((50, 16), dtype=np.float32)
    _, similarities = exact_search(vectors, None, vectors, 50, "l2")
    assert (similarities <= 0).all()
    assert str(similarities[3, 0]) == "0.0"


@each_metric
def test_ties_by_row(metric: str) -> None:
    vectors = np.ones((100, 3), np.float32)
    mask = np.arange(100) % 3 == 1
    rows, _ = exact_search(vectors, None, vectors[:2], 4, metric)
    assert rows.tolist() == [[0, 1, 2, 3]] * 2
    rows, _ = exact_search(vectors, None, vectors[:2], 4, metric, mask)
    assert rows.tolist() == [[1, 4, 7, 10]] * 2


@each_metric
def test_without_vecdot(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, metric: str
) -> None:
    """What numpy 1.26 takes instead finds the same."""
    vectors = rng.standard_normal((300, 32), dtype=np.float32)
    expected = exact_search(vectors, None, vectors[:3], 10, metric)
    monkeypatch.setattr(module, "_dot", module._einsum_dot)
    found = exact_search(vectors, None, vectors[:3], 10, metric)
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_allclose(found[1], expected[1], rtol=1e-5, atol=1e-5)
    found = exact_search(vectors, None, vectors[:1], 10, metric)
    np.testing.assert_array_equal(found[0], expected[0][:1])


@each_metric
def test_rerank(rng: np.random.Generator, metric: str) -> None:
    vectors = rng.integers(-3, 4, (200, 4)).astype(np.float32)
    queries = rng.integers(-3, 4, (6, 4)).astype(np.float32)
    candidates = np.stack([rng.permutation(200)[:50] for _ in queries]).astype(np.int64)
    candidates[:, 3] = -1
    candidates[5] = -1
    rows, similarities = exact_rerank(vectors, candidates, queries, 60, metric)
    for i, line in enumerate(candidates):
        mask = np.isin(np.arange(200), line)
        expected = reference(vectors, queries[i : i + 1], 60, metric, mask)
        np.testing.assert_array_equal(rows[i], expected[0][0])
        np.testing.assert_array_equal(similarities[i], expected[1][0])


@each_metric
@pytest.mark.parametrize("count", [50, 400])
@pytest.mark.parametrize("padded", [False, True])
def test_rerank_for_one_query(
    rng: np.random.Generator, metric: str, count: int, padded: bool
) -> None:
    """Few candidates, or so many that they are parted first; many are as similar as others."""
    vectors = rng.integers(-3, 4, (500, 4)).astype(np.float32)
    candidates = rng.permutation(500)[:count].astype(np.int64)
    if padded:
        candidates[3] = -1
    mask = np.isin(np.arange(500), candidates)
    for query in rng.integers(-3, 4, (20, 1, 4)).astype(np.float32):
        rows, similarities = exact_rerank(vectors, candidates[np.newaxis], query, 10, metric)
        expected = reference(vectors, query, 10, metric, mask)
        np.testing.assert_array_equal(rows, expected[0])
        np.testing.assert_array_equal(similarities, expected[1])


def test_arguments_stay_as_they_are(rng: np.random.Generator) -> None:
    vectors = rng.standard_normal((100, 8), dtype=np.float32)
    queries, mask = vectors[:3].copy(), rng.random(100) < 0.5
    for array in (vectors, queries, mask):
        array.flags.writeable = False
    for metric in METRICS:
        exact_search(vectors, squared_norms(vectors), queries, 5, metric, mask)


@pytest.mark.parametrize(("k", "metric"), [(0, "l2"), (1, "euclid")])
def test_refuses(k: int, metric: str) -> None:
    vectors = np.ones((3, 2), np.float32)
    with pytest.raises(ValueError, match=r"k must be|unknown metric 'euclid'; known: cosine"):
        exact_search(vectors, None, vectors, k, metric)


def test_unpack_allowed() -> None:
    assert unpack_allowed(np.array([0b101, 0xFF], np.uint8), 10).nonzero()[0].tolist() == [
        0,
        2,
        8,
        9,
    ]


def test_the_file_of_other_vectors(tmp_path: Path) -> None:
    vectors = np.ones((5, 3), np.float32)
    backend = ExactIndexBackend(ExactSettings(), IndexContext(dim=3, metric="cosine"))
    backend.build(np.arange(5), vectors, tmp_path / "index")
    with pytest.raises(CorruptionError, match="not the exact index of 4 vectors") as caught:
        backend.open(tmp_path / "index", np.arange(4), vectors[:4])
    assert caught.value.path == str(tmp_path / "index")
