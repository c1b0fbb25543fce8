"""Getting k allowed rows from an index that cannot leave rows out."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from expbuf_core.exact_search import squared_norms
from expbuf_faiss.segment import RowFilter
from expbuf_faiss_gpu.devices import Resident

MOST = 2048
"""Results, and lists looked at, that one search on a GPU can have."""

_BATCH = 8192  # queries asked at once, at most: others wait so long
_RESULTS = 1 << 22  # results asked for at once: bounds the memory
_GATHERED = 1 << 23  # floats gathered at once: 32 MB

_Rows = NDArray[np.int64]
_Floats = NDArray[np.float32]


class Candidates(NamedTuple):
    """What a GPU found.

    Attributes:
        rows: (m, k) int64, best first, padded with -1.
        distances: (m, k) float32, FAISS's.
        short: (m,) bool, where more rows are to be had, but not from a GPU.
    """

    rows: _Rows
    distances: _Floats
    short: NDArray[np.bool_]


def candidates(
    resident: Resident, queries: _Floats, k: int, parameters: Any, chosen: RowFilter, total: int
) -> Candidates:
    """Ask for more than k rows and leave out what is not allowed, until k are left.

    GPU indexes accept a selector and ignore it. A GPU ranks as many as the next power of two, at
    least 32, as fast as fewer, so that is how many are asked for.

    Args:
        resident: The index.
        queries: (m, dim) float32, C-contiguous.
        k: At least 1, at most `MOST`.
        parameters: FAISS's, for as much effort as is wanted; without a selector.
        chosen: What may be returned.
        total: Rows of the index.

    Raises:
        DeviceError: The GPU failed.
        DeviceBusy: It is needed for something longer.
    """
    found = Candidates(
        np.full((len(queries), k), -1, np.int64),
        np.zeros((len(queries), k), np.float32),
        np.zeros(len(queries), np.bool_),
    )
    step = max(1, min(_BATCH, _RESULTS // k))
    for start in range(0, len(queries), step):
        here = slice(start, start + step)
        part = Candidates(found.rows[here], found.distances[here], found.short[here])
        _fill(part, resident, queries[here], parameters, chosen, total)
    return found


def _fill(
    found: Candidates,
    resident: Resident,
    queries: _Floats,
    parameters: Any,
    chosen: RowFilter,
    total: int,
) -> None:
    k = found.rows.shape[1]
    most = min(MOST, total)
    if chosen.allowed is None:
        ask = min(k, most)
    else:
        ask = min(_power_of_two(k * total / max(1, chosen.count)), most)
    left = np.arange(len(queries))
    while True:
        distances, rows = resident.search(queries[left], ask, parameters)
        exhausted = rows[:, -1] < 0  # in the lists that were looked at there is no more
        if chosen.allowed is not None:
            rows, distances = _allowed_first(rows, distances, chosen.allowed, k)
        have = min(k, rows.shape[1])
        found.rows[left, :have] = rows[:, :have]
        found.distances[left, :have] = distances[:, :have]
        again = ~exhausted & (found.rows[left, -1] < 0)
        left = left[again]
        if not len(left) or ask >= total:
            return
        if ask >= most:
            found.short[left] = True
            return
        ask = min(4 * ask, most)


def _allowed_first(
    rows: _Rows, distances: _Floats, allowed: NDArray[np.uint8], k: int
) -> tuple[_Rows, _Floats]:
    """The first k allowed rows of each line, in their order, padded with -1."""
    good = rows >= 0
    at = np.where(good, rows, 0)
    good &= (allowed[at >> 3] >> (at & 7).astype(np.uint8) & 1).view(np.bool_)
    order = np.argsort(~good, axis=1, kind="stable")[:, :k]
    good = np.take_along_axis(good, order, 1)
    rows = np.where(good, np.take_along_axis(rows, order, 1), -1)
    return rows, np.take_along_axis(distances, order, 1)


def _power_of_two(value: float) -> int:
    return max(32, 1 << math.ceil(math.log2(max(1.0, value))))


def rescored(
    vectors: _Floats, rows: _Rows, queries: _Floats, k: int, metric: str
) -> tuple[_Rows, _Floats]:
    """The k most similar of each query's candidates, by the raw vectors.

    So what a search returns does not depend on how a GPU rounds, nor on which device answered.

    Args:
        vectors: (n, dim) float32.
        rows: (m, c) int64, padded with -1.
        queries: (m, dim) float32.
        k: At least 1; may exceed c.
        metric: Of the vectors.

    Returns:
        rows (m, k) int64 padded with -1; similarities (m, k) float32 in falling order, padded with
        -inf.
    """
    best = np.full((len(queries), k), -1, np.int64)
    similarities = np.full((len(queries), k), -np.inf, np.float32)
    step = max(1, _GATHERED // (rows.shape[1] * vectors.shape[1]))
    for start in range(0, len(queries), step):
        here = rows[start : start + step]
        if metric == "l2":
            # In place: the difference is as large as what was gathered.
            gathered = vectors[np.maximum(here, 0)]
            gathered -= queries[start : start + step, np.newaxis]
            scores = np.float32(0) - squared_norms(gathered)
        else:
            gathered = vectors[np.maximum(here, 0)]
            scores = _products(gathered, queries[start : start + step])
        scores[here < 0] = -np.inf
        order = np.lexsort((here, -scores), axis=-1)[:, :k]
        have = order.shape[1]
        best[start : start + step, :have] = np.take_along_axis(here, order, 1)
        similarities[start : start + step, :have] = np.take_along_axis(scores, order, 1)
    return best, similarities


def _products(gathered: _Floats, queries: _Floats) -> _Floats:
    """(m, c) inner products of (m, c, dim) with (m, dim)."""
    if hasattr(np, "vecdot"):  # since numpy 2.0
        found: _Floats = np.vecdot(gathered, queries[:, np.newaxis])
        return found
    found = np.einsum("mcd,md->mc", gathered, queries)
    return found
