"""What a replica searches: immutable segments from the builder, and an exact tail.

The tail holds the vectors added since the newest segment, in memory; it is searched exactly, which
is why an add is found by the very next search. A search takes one `View` by one reference and needs
no lock: rows of a view only ever go out (removed, evicted), and the buffer filters once more.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from expbuf_core.exact_search import exact_search
from expbuf_core.segments import OpenSegment

_FIRST_BYTES = 32 << 20  # of address space: memory is taken as rows are written
_FIRST_ROWS = 1 << 15  # at most
_GROWTH = 4  # likewise: what is reserved costs nothing, what is copied does
_WIDEN = 4
_DENSE = 8
_FEW = 1 / 32  # of a segment's rows: below that, comparing them all beats the index


class View(NamedTuple):
    """What one search looks at."""

    segments: tuple[OpenSegment, ...]
    tail_ids: NDArray[np.int64]
    tail_vectors: NDArray[np.float32]
    tail_live: NDArray[np.bool_]
    tail_dead: int


class IndexTiers:
    """Segments and tail of one replica. Changed under the replica's lock only.

    Args:
        metric: "cosine", "inner_product" or "l2".
        representation: Which the vectors are of.
    """

    def __init__(self, metric: str, representation: int = 0) -> None:
        self.metric = metric
        self.representation = representation
        self.segments: tuple[OpenSegment, ...] = ()
        self.lsn = 0  # operations up to here are in the segments
        self.end_id = 0  # ids below are in the segments or gone
        self.generation = 0
        self._ids = np.empty(0, np.int64)
        self._vectors = np.empty((0, 0), np.float32)
        self._live = np.empty(0, bool)
        self._rows = 0
        self._dead = 0

    # ------------------------------------------------------------ the tail

    @property
    def tail_rows(self) -> int:
        """Live rows in the tail."""
        return self._rows - self._dead

    def add(self, ids: NDArray[np.int64], vectors: NDArray[np.float32]) -> None:
        """Append vectors of rising ids, unless the segments have them."""
        if ids[0] >= self.end_id:
            self.append(ids, vectors)
        elif ids[-1] >= self.end_id:
            new = ids >= self.end_id
            self.append(ids[new], vectors[new])

    def append(self, ids: NDArray[np.int64], vectors: NDArray[np.float32]) -> None:
        """Append vectors of rising ids, all above those that are in the tail."""
        n, rows = len(ids), self._rows
        if rows + n > len(self._ids):
            self._reserve(n, vectors.shape[1])
            rows = self._rows
        self._ids[rows : rows + n] = ids
        self._vectors[rows : rows + n] = vectors
        self._live[rows : rows + n] = True
        self._rows = rows + n

    def _reserve(self, n: int, dim: int) -> None:
        """Make room by new arrays: views keep the old ones."""
        keep = np.flatnonzero(self._live[: self._rows])
        least = min(_FIRST_BYTES // (4 * dim), _FIRST_ROWS)
        capacity = max(least, _GROWTH * (len(keep) + n))
        try:
            vectors = np.empty((capacity, dim), np.float32)
        except MemoryError:  # so much address space is not to be had
            capacity = max(least, len(keep) + n + len(keep) // 4)
            vectors = np.empty((capacity, dim), np.float32)
        ids, live = np.empty(capacity, np.int64), np.zeros(capacity, bool)
        if 0 < len(keep) == self._rows:
            ids[: len(keep)] = self._ids[: self._rows]
            vectors[: len(keep)] = self._vectors[: self._rows]
        elif len(keep):
            self._ids.take(keep, out=ids[: len(keep)], mode="clip")
            # "clip" writes in place; the default makes a copy first, in case of an error.
            self._vectors.take(keep, axis=0, out=vectors[: len(keep)], mode="clip")
        live[: len(keep)] = True
        self._ids, self._vectors, self._live = ids, vectors, live
        self._rows, self._dead = len(keep), 0

    def remove(self, ids: NDArray[np.int64]) -> None:
        """Take ids out of tail and segments; others are skipped."""
        here = self._ids[: self._rows]
        if len(ids) and len(here) and ids.max() >= here[0]:
            rows = np.searchsorted(here, ids)
            rows[rows == len(here)] = 0
            rows = np.unique(rows[(here[rows] == ids) & self._live[rows]])
            self._live[rows] = False
            self._dead += len(rows)
        if self.segments and len(ids) and ids.min() < self.end_id:
            for segment in self.segments:
                segment.remove(ids)

    def clear(self) -> None:
        """Take everything out."""
        self._ids = np.empty(0, np.int64)
        self._live = np.empty(0, bool)
        self._vectors = np.empty((0, 0), np.float32)
        self._rows = self._dead = 0
        self.segments = ()

    def adopt(
        self, segments: tuple[OpenSegment, ...], *, lsn: int, end_id: int, generation: int
    ) -> None:
        """Search these segments from now on; the tail keeps what is newer than they are."""
        cut = int(np.searchsorted(self._ids[: self._rows], end_id))
        if cut:
            # In new arrays: a search under way has a view that lacks these segments.
            self._ids = self._ids[cut : self._rows].copy()
            self._vectors = self._vectors[cut : self._rows].copy()
            self._live = self._live[cut : self._rows].copy()
            self._rows -= cut
            self._dead = self._rows - int(np.count_nonzero(self._live))
        self.segments = segments
        self.lsn, self.end_id, self.generation = lsn, end_id, generation

    # ------------------------------------------------------------ reading

    def view(self) -> View:
        """What there is now (replica lock held)."""
        n = self._rows
        return View(self.segments, self._ids[:n], self._vectors[:n], self._live[:n], self._dead)

    def holds(self, ids: NDArray[np.int64]) -> NDArray[np.bool_]:
        """For which ids some tier has the vector."""
        found = np.zeros(len(ids), bool)
        for here in (*(segment.ids for segment in self.segments), self._ids[: self._rows]):
            if len(here):
                found |= here[_rows_of(here, ids)] == ids
        return found

    def gatherer(self, dim: int) -> Callable[[NDArray[np.int64]], NDArray[np.float32]]:
        """A function from ids that some tier holds to their vectors, as of now, for any thread."""
        places = [(segment.ids, segment.vectors) for segment in self.segments]
        places.append((self._ids[: self._rows], self._vectors[: self._rows]))

        def gather(ids: NDArray[np.int64]) -> NDArray[np.float32]:
            vectors = np.empty((len(ids), dim), np.float32)
            for here, values in places:
                if len(here):
                    rows = _rows_of(here, ids)
                    hit = here[rows] == ids
                    vectors[hit] = values[rows[hit]]
            return vectors

        return gather


def _rows_of(here: NDArray[np.int64], ids: NDArray[np.int64]) -> NDArray[np.intp]:
    """Row of each id in rising `here`; any row for an id that is not there."""
    rows = np.searchsorted(here, ids)
    rows[rows == len(here)] = 0
    return rows


def search(
    view: View,
    metric: str,
    queries: NDArray[np.float32],
    k: int,
    allowed: NDArray[np.int64] | None = None,
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Find the k most similar live experiences for each query, over all tiers.

    Args:
        view: What to search.
        metric: Of the vectors.
        queries: (m, dim) float32.
        k: At least 1.
        allowed: Rising ids to choose from, or None for all.

    Returns:
        ids (m, k) int64 padded with -1; similarities (m, k) float32 padded with -inf, falling.
    """
    parts = []
    if len(view.tail_ids):
        mask = view.tail_live if view.tail_dead or allowed is not None else None
        if allowed is not None:
            mask = view.tail_live & _member(view.tail_ids, allowed)
        rows, similarities = exact_search(view.tail_vectors, None, queries, k, metric, mask)
        parts.append((_ids_at(view.tail_ids, rows), similarities))
    for segment in view.segments:
        parts.append(_search_segment(segment, metric, queries, k, allowed))
    if not parts:
        m = len(queries)
        return np.full((m, k), -1, np.int64), np.full((m, k), -np.inf, np.float32)
    if len(parts) == 1:
        return parts[0]
    ids = np.concatenate([part[0] for part in parts], axis=1)
    similarities = np.concatenate([part[1] for part in parts], axis=1)
    return best(ids, similarities, k)


def best(
    ids: NDArray[np.int64], similarities: NDArray[np.float32], k: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The k most similar of each row, in falling order; of equals, those that come first."""
    order = np.argsort(-similarities, axis=1, kind="stable")[:, :k]
    if len(order) == 1:
        return ids[:, order[0]], similarities[:, order[0]]
    return np.take_along_axis(ids, order, 1), np.take_along_axis(similarities, order, 1)


def _ids_at(ids: NDArray[np.int64], rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Ids of these rows, whose padding (-1) stands at the end of each line."""
    found: NDArray[np.int64] = ids[rows]
    if rows[:, -1].min(initial=0) < 0:
        found[rows < 0] = -1
    return found


def _search_segment(
    segment: OpenSegment,
    metric: str,
    queries: NDArray[np.float32],
    k: int,
    allowed: NDArray[np.int64] | None,
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    rows = segment.info.rows
    if allowed is None:
        live, bitmap, count = segment.live, segment.bitmap, rows - segment.dead
    else:
        live = segment.live & _member(segment.ids, allowed)
        bitmap, count = np.packbits(live, bitorder="little"), int(np.count_nonzero(live))
        if count <= _FEW * rows:
            at, similarities = exact_search(segment.vectors, None, queries, k, metric, live)
            return _ids_at(segment.ids, at), similarities
    wanted = min(k, count)
    filtered = count < rows
    if not segment.filters:
        return _search_unfiltered(segment, metric, queries, k, live, wanted)
    ids, similarities = segment.index.search(queries, k, bitmap if filtered else None)
    return _complete(segment, metric, queries, k, live, wanted, ids, similarities)


def _search_unfiltered(
    segment: OpenSegment,
    metric: str,
    queries: NDArray[np.float32],
    k: int,
    live: NDArray[np.bool_],
    wanted: int,
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """For an index that cannot leave rows out: ask for more, and filter."""
    rows = segment.info.rows
    ask = k
    while True:
        ids, similarities = segment.index.search(queries, min(ask, rows), None)
        at = np.searchsorted(segment.ids, ids)
        at[at == rows] = 0
        good = (ids >= 0) & (segment.ids[at] == ids) & live[at]
        if ask >= rows or bool((good.sum(axis=1) >= wanted).all()) or ask > 2048:
            break
        ask *= _WIDEN
    similarities = np.where(good, similarities, -np.inf)
    ids, similarities = best(np.where(good, ids, -1), similarities, k)
    if ids.shape[1] < k:
        pad = ((0, 0), (0, k - ids.shape[1]))
        ids = np.pad(ids, pad, constant_values=-1)
        similarities = np.pad(similarities, pad, constant_values=-np.inf)
    return _complete(segment, metric, queries, k, live, wanted, ids, similarities)


def _complete(
    segment: OpenSegment,
    metric: str,
    queries: NDArray[np.float32],
    k: int,
    live: NDArray[np.bool_],
    wanted: int,
    ids: NDArray[np.int64],
    similarities: NDArray[np.float32],
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Search exactly where an approximate index returned fewer than there are."""
    if wanted and ids[:, wanted - 1].min(initial=0) < 0:
        short = np.flatnonzero(ids[:, wanted - 1] < 0)
        exact_rows, exact = exact_search(segment.vectors, None, queries[short], k, metric, live)
        ids[short] = _ids_at(segment.ids, exact_rows)
        similarities[short] = exact
    return ids, similarities


def _member(ids: NDArray[np.int64], chosen: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which of the rising `ids` are in the rising `chosen`."""
    if not len(chosen) or not len(ids):
        return np.zeros(len(ids), bool)
    first, span = int(ids[0]), int(ids[-1] - ids[0]) + 1
    if span <= _DENSE * len(ids):  # a table is an order of magnitude faster than bisection
        inside = chosen[(chosen >= first) & (chosen < first + span)]
        table = np.zeros(span, bool)
        table[inside - first] = True
        member: NDArray[np.bool_] = table[ids - first]
        return member
    at = np.searchsorted(chosen, ids)
    at[at == len(chosen)] = 0
    member = chosen[at] == ids
    return member
