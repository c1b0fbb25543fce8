"""Exact nearest neighbours in numpy: for in-memory tails, small segments, re-ranking, calibration.

No call here reaches the threads of the BLAS behind numpy. On cores that other processes use as
well, a matrix product that waits for a second thread takes milliseconds instead of microseconds:
so a single query goes through per-row dot products, and a batch through a stack of products each
too small for BLAS to share out.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import cast

import numpy as np
from numpy.typing import NDArray

METRICS = ("cosine", "inner_product", "l2")

_BLOCK_SCORES = 1 << 22  # scores held at once: 16 MB
_BATCH = 32  # queries scored together
_PRODUCT = 1 << 18  # multiplications up to which OpenBLAS stays in the calling thread
_PRODUCT_BY_ONE = 9000  # the same of a matrix and a vector
_CROWD = 8  # times k: so many that reach the floor are too many to sort
_SPARSE = 8  # gather rows one by one when fewer than 1 in so many is allowed
_MANY = 200  # candidates that are parted before they are sorted

_Float = NDArray[np.float32]
_Rows = NDArray[np.int64]


def _einsum_dot(a: _Float, b: _Float, out: _Float | None = None) -> _Float:
    return cast(_Float, np.einsum("...i,...i->...", a, b, out=out))


# Since numpy 2.0; per row one BLAS dot product, which never starts a thread at these lengths.
_dot: Callable[..., _Float] = getattr(np, "vecdot", _einsum_dot)


def dot(a: _Float, b: _Float, out: _Float | None = None) -> _Float:
    """Inner products along the last axis, by this thread alone."""
    return _dot(a, b, out=out)


def short_products(rows: _Float, vector: _Float) -> _Float:
    """(n,) inner products of (n, d) rows and (d,), by this thread alone; `dot` where d is small.

    There a call of BLAS for each row takes longer than what it computes.
    """
    n, d = rows.shape
    step = max(1, _PRODUCT_BY_ONE // d)
    whole = n - n % step
    products = np.empty(n, np.float32)
    np.matmul(rows[:whole].reshape(-1, step, d), vector, out=products[:whole].reshape(-1, step))
    if whole < n:
        np.matmul(rows[whole:], vector, out=products[whole:])
    return products


def squared_norms(vectors: _Float) -> _Float:
    """(n,) squared lengths of (n, dim) vectors, as `exact_search` takes them for "l2"."""
    with np.errstate(over="ignore"):
        return _dot(vectors, vectors)


def exact_search(
    vectors: _Float,
    squared: _Float | None,
    queries: _Float,
    k: int,
    metric: str,
    allowed: NDArray[np.bool_] | None = None,
) -> tuple[_Rows, _Float]:
    """Find the k most similar rows for each query by looking at all of them.

    Equal similarities come in the order of their rows. Memory is bounded whatever n and m are.
    Reads `vectors` (and runs) without the GIL for the most part; any number of threads at once.

    Args:
        vectors: (n, dim) float32, C-contiguous; may be a read-only memory map. n may be 0.
        squared: (n,) `squared_norms(vectors)`, used by "l2" alone; None computes them.
        queries: (m, dim) float32, C-contiguous.
        k: At least 1; may exceed n.
        metric: "cosine" (of normalised vectors: the inner product), "inner_product" or "l2".
        allowed: None, or (n,) bool: only these rows may be returned.

    Returns:
        rows (m, k) int64, padded with -1; similarities (m, k) float32, larger is closer (for "l2"
        the negative squared distance, never positive), in falling order, padded with -inf.
    """
    if metric not in METRICS:
        raise ValueError(f"unknown metric {metric!r}; known: {', '.join(METRICS)}")
    if k < 1:
        raise ValueError(f"k must be at least 1, not {k}")
    vectors = np.asarray(vectors)  # a plain view: slicing a numpy.memmap object is slow
    rows = np.empty((len(queries), k), np.int64)
    rows.fill(-1)
    similarities = np.empty((len(queries), k), np.float32)
    similarities.fill(-np.inf)
    if len(queries) == 1 and len(vectors) <= _BLOCK_SCORES:
        picked, values = exact_best(vectors, squared, queries[0], k, metric, allowed)
        rows[0, : len(picked)] = picked
        similarities[0, : len(values)] = values
        return rows, similarities
    offset, chosen = 0, None
    if allowed is not None:
        offset, stop, chosen = _narrow(allowed)
        vectors = vectors[offset:stop]
        squared = None if squared is None else squared[offset:stop]
        if chosen is not None and np.count_nonzero(chosen) * _SPARSE < len(vectors):
            picked = np.flatnonzero(chosen)
            found = exact_search(
                vectors[picked],
                None if squared is None else squared[picked],
                queries,
                k,
                metric,
            )
            hit = found[0] >= 0
            rows[hit] = picked[found[0][hit]] + offset
            return rows, found[1]
    if not len(vectors):
        return rows, similarities
    if metric == "l2" and squared is None:
        squared = squared_norms(vectors)
    for first in range(0, len(queries), _BATCH):
        batch = queries[first : first + _BATCH]
        with np.errstate(over="ignore", invalid="ignore"):  # vectors of 1e19 and more
            parts = [
                _search_block(
                    vectors[start:stop],
                    None if squared is None else squared[start:stop],
                    batch,
                    k,
                    metric,
                    None if chosen is None else chosen[start:stop],
                    start + offset,
                )
                for start, stop in _blocks(len(vectors), len(batch))
            ]
        for i in range(len(batch)):
            _merge([part[i] for part in parts], rows[first + i], similarities[first + i])
    return rows, similarities


def exact_best(
    vectors: _Float,
    squared: _Float | None,
    query: _Float,
    k: int,
    metric: str,
    allowed: NDArray[np.bool_] | None = None,
    floor: float = -math.inf,
) -> tuple[_Rows, _Float]:
    """Find the k most similar rows for one query, as `exact_search` does, without padding.

    The fastest way to search a few thousand rows; takes 4 bytes of memory a row.

    Args:
        vectors: As for `exact_search`.
        squared: As for `exact_search`.
        query: (dim,) float32.
        k: At least 1.
        metric: As for `exact_search`.
        allowed: As for `exact_search`.
        floor: Rows less similar may be left out: with the k-th best of what was found elsewhere
            there is nothing to sort.

    Returns:
        rows (up to k,) int64 and similarities float32, in falling order.
    """
    offset, chosen = 0, None
    if allowed is not None:
        offset, stop, chosen = _narrow(allowed)
        vectors = vectors[offset:stop]
        squared = None if squared is None else squared[offset:stop]
        if chosen is not None and np.count_nonzero(chosen) * _SPARSE < len(vectors):
            picked = np.flatnonzero(chosen)
            squared = None if squared is None else squared[picked]
            rows, values = exact_best(vectors[picked], squared, query, k, metric, None, floor)
            return picked[rows] + offset, values
    if not len(vectors):
        return np.empty(0, np.int64), np.empty(0, np.float32)
    if metric == "cosine":  # nothing overflows
        rows, values = _best_products(_dot(vectors, query), k, chosen, floor)
    else:
        with np.errstate(over="ignore", invalid="ignore"):  # vectors of 1e19 and more
            if metric == "inner_product":
                rows, values = _best_products(_dot(vectors, query), k, chosen, floor)
            else:
                if squared is None:
                    squared = squared_norms(vectors)
                rows = _near(_dot(vectors, query), squared, query, k, chosen, floor)
                rows, values = _first(rows, exact_similarities(vectors, rows, query, metric), k)
    return rows + offset if offset else rows, values


def exact_rerank(
    vectors: _Float, candidates: _Rows, queries: _Float, k: int, metric: str
) -> tuple[_Rows, _Float]:
    """Find the k most similar among each query's candidates.

    Args:
        vectors: (n, dim) float32, C-contiguous.
        candidates: (m, c) rows, padded with -1, none twice in a line.
        queries: (m, dim) float32, C-contiguous.
        k: At least 1.
        metric: As in `exact_search`.

    Returns:
        As `exact_search`.
    """
    vectors = np.asarray(vectors)
    if len(queries) == 1 and k <= candidates.shape[1] and np.minimum.reduce(candidates[0]) >= 0:
        picked = candidates[0]
        scores = exact_similarities(vectors, picked, queries[0], metric)
        if len(scores) > _MANY:
            near = _at_least(scores, k)
            picked, scores = picked.take(near), scores.take(near)
        order = np.lexsort((picked, -scores))[:k]
        return picked.take(order)[np.newaxis], scores.take(order)[np.newaxis]
    rows = np.full((len(queries), k), -1, np.int64)
    similarities = np.full((len(queries), k), -np.inf, np.float32)
    for i, query in enumerate(queries):
        picked = candidates[i]
        if picked.size and picked.min() < 0:
            picked = picked[picked >= 0]
        scores = exact_similarities(vectors, picked, query, metric)
        # By similarity, then by row: the order that a scan of all rows gives.
        order = np.lexsort((picked, -scores))[:k]
        rows[i, : len(order)] = picked[order]
        similarities[i, : len(order)] = scores[order]
    return rows, similarities


def exact_similarities(vectors: _Float, rows: _Rows, query: _Float, metric: str) -> _Float:
    """(c,) similarities of one query to these rows, without cancellation under "l2"."""
    if metric != "l2":
        return _dot(vectors.take(rows, axis=0), query)  # half the time of brackets
    result = np.empty(len(rows), np.float32)
    for start in range(0, len(rows), 4096):
        difference = vectors.take(rows[start : start + 4096], axis=0) - query
        np.subtract(
            np.float32(0), _dot(difference, difference), out=result[start : start + 4096]
        )  # 0 - x, since -x would make -0.0 of an exact match
    return result


def unpack_allowed(allowed: NDArray[np.uint8], count: int) -> NDArray[np.bool_]:
    """(count,) bool from a bitmap with the least significant bit first."""
    return np.unpackbits(allowed, count=count, bitorder="little").view(np.bool_)


def _narrow(allowed: NDArray[np.bool_]) -> tuple[int, int, NDArray[np.bool_] | None]:
    """First and last allowed row + 1, and the mask between them, None where all are allowed.

    First in, first out removes a prefix: what is left is a slice.
    """
    if not len(allowed):
        return 0, 0, None
    start = int(allowed.argmax())
    if not allowed[start]:
        return 0, 0, None
    stop = len(allowed) - int(allowed[::-1].argmax())
    between = allowed[start:stop]
    return start, stop, None if between.all() else between


def _blocks(n: int, m: int) -> list[tuple[int, int]]:
    size = max(1, _BLOCK_SCORES // m)
    return [(start, min(start + size, n)) for start in range(0, n, size)]


def inner_products(vectors: _Float, queries: _Float) -> _Float:
    """(m, n) inner products of (n, dim) vectors and (m, dim) queries, by this thread alone."""
    if len(queries) == 1:
        return _dot(vectors, queries[0])[np.newaxis]
    n, dim = vectors.shape
    step = max(1, _PRODUCT // (dim * len(queries)))
    whole = n - n % step
    products = np.empty((n, len(queries)), np.float32)
    np.matmul(
        vectors[:whole].reshape(-1, step, dim),
        queries.T,
        out=products[:whole].reshape(-1, step, len(queries)),
    )
    if whole < n:
        np.matmul(vectors[whole:], queries.T, out=products[whole:])
    return np.ascontiguousarray(products.T)


def _search_block(
    vectors: _Float,
    squared: _Float | None,
    queries: _Float,
    k: int,
    metric: str,
    allowed: NDArray[np.bool_] | None,
    offset: int,
) -> list[tuple[_Rows, _Float]]:
    """For each query up to k rows (shifted by `offset`) with their similarities, best first."""
    products = inner_products(vectors, queries)
    found = []
    for query, scores in zip(queries, products, strict=True):
        if metric == "l2":
            assert squared is not None  # the caller computed them
            rows = _near(scores, squared, query, k, allowed, -math.inf)
            rows, values = _first(rows, exact_similarities(vectors, rows, query, metric), k)
        else:
            rows, values = _best_products(scores, k, allowed, -math.inf)
        found.append((rows + offset, values))
    return found


def _best_products(
    scores: _Float,
    k: int,
    allowed: NDArray[np.bool_] | None,
    floor: float,
) -> tuple[_Rows, _Float]:
    """Up to k rows with the largest scores, from `floor` on; spoils the scores."""
    if allowed is not None:
        np.copyto(scores, np.float32(-np.inf), where=~allowed)
    candidates = None
    if floor > -math.inf:
        candidates = (scores < floor).__invert__().nonzero()[0]  # what is NaN stays in
    if candidates is None or len(candidates) > _CROWD * k:
        candidates = _at_least(scores, k)
    if allowed is not None:
        candidates = candidates[allowed[candidates]]
    return _first(candidates, scores.take(candidates), k)


def _first(rows: _Rows, values: _Float, k: int) -> tuple[_Rows, _Float]:
    """The k most similar of rising rows; equals in their order, as a stable sort leaves them."""
    if len(rows) < 2:
        return rows, values
    order = np.negative(values).argsort(kind="stable")[:k]
    return rows.take(order), values.take(order)


def _at_least(scores: _Float, k: int) -> _Rows:
    """Rows whose score is at least the k-th largest, rising."""
    if k >= len(scores):
        return np.arange(len(scores), dtype=np.int64)
    sorted_in_part = scores.copy()
    sorted_in_part.partition(len(scores) - k)
    below = scores < sorted_in_part[len(scores) - k]
    return cast(_Rows, (~below).nonzero()[0])  # negated: what overflowed to NaN stays in


def _near(
    products: _Float,
    squared: _Float,
    query: _Float,
    k: int,
    allowed: NDArray[np.bool_] | None,
    floor: float,
) -> _Rows:
    """Rows that may be among the k nearest, rising: all that rounding leaves in doubt.

    |x - q|² = |x|² + |q|² - 2 x·q cancels where both are long and close to each other. So each row
    gets bounds; who cannot reach the k-th best lower bound is out, and the rest is computed
    without cancellation.
    """
    lengths = squared + _dot(query, query)
    distance = lengths - 2 * products
    # Dot products are summed in at least eight lanes; a lane's error grows with its length.
    error = lengths * np.float32((len(query) / 8 + 16) * np.finfo(np.float32).eps)
    upper = distance + error
    if allowed is not None:
        np.copyto(upper, np.float32(np.inf), where=~allowed)
    lower = distance - error
    rows = None
    if floor > -math.inf:
        rows = _inside(lower, -floor, allowed)
    if rows is None or len(rows) > _CROWD * k:
        kth = float(np.partition(upper, k - 1)[k - 1]) if k < len(upper) else math.inf
        rows = _inside(lower, kth, allowed)
    return rows


def _inside(lower: _Float, most: float, allowed: NDArray[np.bool_] | None) -> _Rows:
    """Rows whose lower bound is no more than that, rising."""
    inside = ~(lower > most)  # negated: what overflowed to NaN stays in
    if allowed is not None:
        inside &= allowed
    return cast(_Rows, inside.nonzero()[0])


def _merge(parts: list[tuple[_Rows, _Float]], rows: _Rows, similarities: _Float) -> None:
    """Write the best of several blocks' results, which come in the order of their rows."""
    if len(parts) == 1:
        picked, values = parts[0]
    else:
        picked = np.concatenate([part[0] for part in parts])
        values = np.concatenate([part[1] for part in parts])
        order = np.argsort(-values, kind="stable")[: len(rows)]
        picked, values = picked[order], values[order]
    rows[: len(picked)] = picked
    similarities[: len(values)] = values
