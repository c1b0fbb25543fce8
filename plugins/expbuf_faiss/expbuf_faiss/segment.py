"""Searching one immutable index."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from expbuf_core.builtin.exact import ExactSegment
from expbuf_core.contracts import IndexSegment
from expbuf_faiss import runtime
from expbuf_faiss.calibration import CANDIDATES_FLOOR, NEIGHBOURS, Tuning
from expbuf_faiss.parameters import most_effort, parameters

_FEW = 1024  # so few allowed rows are compared one by one
_WIDER = 8
_KEPT = 16  # parameter objects kept for one filter


class RowFilter:
    """A bitmap of allowed rows, and what was made of it.

    Attributes:
        allowed: The bitmap, or None where every row is allowed.
        count: Set bits when the bitmap was first seen. It may have changed since: whoever trusts
            this number looks at the results, too.
        selector: FAISS's view of the bitmap, or None.
        parameters: By effort, search parameters that carry the selector.
    """

    def __init__(self, faiss: Any, allowed: NDArray[np.uint8] | None, rows: int) -> None:
        self.allowed = allowed
        self.count = rows if allowed is None else count_allowed(allowed, rows)
        # FAISS reads the array itself, during each search: this object keeps both alive.
        self.selector = None if allowed is None else faiss.IDSelectorBitmap(allowed)
        self.parameters: dict[int | None, Any] = {}
        self.efforts: dict[int, int | None] = {}  # by number of results


class FaissSegment(IndexSegment):
    """Searches an index that is never changed: FAISS allows that from any number of threads.

    A subclass for another device overrides `search_index`, the only method that asks FAISS.
    """

    def __init__(
        self,
        index: Any,
        ids: NDArray[np.int64],
        vectors: NDArray[np.float32],
        metric: str,
        tuning: Tuning,
        facts: dict[str, Any] | None = None,
    ) -> None:
        faiss = runtime.load()
        self._pointer = faiss.swig_ptr
        self._index = index
        self._dim = vectors.shape[1]
        self._ids = np.asarray(ids)
        self._vectors = np.ascontiguousarray(vectors, np.float32)  # FAISS believes in a pointer
        self._where = faiss.swig_ptr(self._vectors)
        self._metric = metric
        self._nearest_of = (
            faiss.knn_L2sqr_by_idx if metric == "l2" else faiss.knn_inner_products_by_idx
        )
        self._tuning = tuning
        self._facts = dict(facts or {})
        self._most = most_effort(faiss, index)
        self._exact = ExactSegment(ids, vectors, metric)
        self._everything = RowFilter(faiss, None, len(self._ids))
        self._filter = self._everything  # the one used last; searches mostly share theirs

    def search(
        self, queries: NDArray[np.float32], k: int, allowed: NDArray[np.uint8] | None
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """See `IndexSegment.search`. As many results as there are allowed rows, up to k."""
        faiss = runtime.load()
        chosen = self._everything if allowed is None else self._filter
        if chosen.allowed is not allowed:
            chosen = self._filter = RowFilter(faiss, allowed, len(self._ids))
        if len(queries) == 1 and _FEW < chosen.count >= 4 * k:
            # Searches mostly come one by one, and each call into numpy counts.
            if k not in chosen.efforts:
                if len(chosen.efforts) >= _KEPT:
                    chosen.efforts.clear()
                chosen.efforts[k] = self._effort(k, chosen.count)
            rows, found = self._ranked(queries, k, chosen.efforts[k], chosen)
            if rows[0, -1] >= 0:
                return self._ids.take(rows), found
        wanted = min(k, chosen.count)
        if chosen.count <= _FEW or wanted * 4 > chosen.count:
            return self._exact.search(queries, k, allowed)
        ids = np.full((len(queries), k), -1, np.int64)
        similarities = np.full((len(queries), k), -np.inf, np.float32)
        effort = self._effort(wanted, chosen.count)
        left = np.arange(len(queries))
        while True:
            rows, found = self._ranked(queries[left], wanted, effort, chosen)
            whole = rows[:, -1] >= 0
            ids[left[whole], :wanted] = self._ids[rows[whole]]
            similarities[left[whole], :wanted] = found[whole]
            left = left[~whole]
            if not len(left):
                return ids, similarities
            if effort is None or self._most is None or effort >= self._most:
                break
            effort = min(effort * _WIDER, self._most)
        ids[left], similarities[left] = self._exact.search(queries[left], k, allowed)
        return ids, similarities

    def candidates(
        self, queries: NDArray[np.float32], k: int, effort: int | None
    ) -> NDArray[np.int64]:
        """(m, k) rows as the index ranks them, padded with -1; for calibration."""
        return self.search_index(queries, k, effort, self._everything)[0]

    def search_index(
        self, queries: NDArray[np.float32], k: int, effort: int | None, chosen: RowFilter
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Ask FAISS.

        Args:
            queries: (m, dim) float32, C-contiguous.
            k: Results wanted, at most `chosen.count`.
            effort: As in `Tuning`.
            chosen: What may be returned: `allowed`, None or a bitmap, and `count` set bits.

        Returns:
            (m, k) rows, padded with -1, and FAISS's distances, best first.
        """
        found = chosen.parameters.get(effort)
        if found is None:
            if len(chosen.parameters) >= _KEPT:
                chosen.parameters.clear()
            found = parameters(runtime.load(), self._index, effort, chosen.selector)
            chosen.parameters[effort] = found
        pointer = self._pointer
        if queries.shape[1] != self._dim:  # FAISS believes in the pointer
            raise ValueError(f"queries of dimension {queries.shape[1]}, not {self._dim}")
        distances = np.empty((len(queries), k), np.float32)
        rows = np.empty((len(queries), k), np.int64)
        # What `search` of FAISS's Python layer does, in a third of the time.
        self._index.search_c(
            len(queries), pointer(queries), k, pointer(distances), pointer(rows), found
        )
        return rows, distances

    def info(self) -> dict[str, Any]:
        """Facts worth showing."""
        return {"rows": len(self._ids), **self._facts}

    def _ranked(
        self, queries: NDArray[np.float32], k: int, effort: int | None, chosen: RowFilter
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """(m, k) rows and similarities; a line that ends with -1 has fewer than k."""
        rerank = self._tuning.rerank
        if rerank:
            wanted = min(rerank * max(k, CANDIDATES_FLOOR), chosen.count)
            candidates, _ = self.search_index(queries, wanted, effort, chosen)
            rows, distances = self._compared(queries, candidates, k)
        else:
            rows, distances = self.search_index(queries, k, effort, chosen)
        return rows, np.float32(0) - distances if self._metric == "l2" else distances

    def _compared(
        self, queries: NDArray[np.float32], candidates: NDArray[np.int64], k: int
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """The k best of each line of candidates, by their whole vectors, which nobody copies."""
        pointer, (m, wanted) = self._pointer, candidates.shape
        distances = np.empty((m, k), np.float32)
        rows = np.empty((m, k), np.int64)
        self._nearest_of(
            *(pointer(queries), self._where, pointer(candidates), self._dim),
            *(m, len(self._vectors), wanted, k, pointer(distances), pointer(rows), wanted),
        )
        return rows, distances

    def _effort(self, k: int, count: int) -> int | None:
        """The calibrated effort; more where neighbours lie further out than calibrated for."""
        effort = self._tuning.effort
        if effort is None or self._most is None:
            return effort
        factor = math.sqrt(max(1.0, k / NEIGHBOURS))
        factor *= max(1.0, 0.75 * len(self._ids) / count)
        return min(self._most, math.ceil(effort * factor))


def count_allowed(allowed: NDArray[np.uint8], rows: int) -> int:
    """Set bits among the first `rows`."""
    whole = rows // 8
    count = int(np.unpackbits(allowed[whole:], count=rows % 8, bitorder="little").sum())
    if hasattr(np, "bitwise_count"):  # since numpy 2.0
        return count + int(np.bitwise_count(allowed[:whole]).sum(dtype=np.int64))
    return count + int(np.unpackbits(allowed[:whole]).sum(dtype=np.int64))
