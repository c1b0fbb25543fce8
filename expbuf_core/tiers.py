"""What a replica searches: immutable segments from the builder, and an exact tail.

The tail holds the vectors added since the newest segment, in memory; it is searched exactly, which
is why an add is found by the very next search. A search takes one `View` by one reference and needs
no lock: rows of a view only ever go out (removed, evicted), and the buffer filters once more.
"""

from __future__ import annotations

import contextlib
import resource
import weakref
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from expbuf_core import memory
from expbuf_core.exact_search import (
    exact_best,
    exact_search,
    exact_similarities,
    squared_norms,
)
from expbuf_core.segments import OpenSegment, rows_of
from expbuf_core.sketch import LEAST_ROWS, Directions, Sketch

# Of address space: memory is taken as rows are written. As much as most tails ever need, since
# copying a tail to a larger place takes a tenth of a second and longer; but where a process has a
# limit, no more than it can spare for each of its buffers.
_FIRST = (1 << 18, 1 << 30)  # rows, or bytes if those are fewer rows
_FIRST_LIMITED = (1 << 15, 64 << 20)
_GROWTH = 8
_AHEAD = (1 << 20, 8 << 20)  # bytes of a tail: from which on it is taken ahead, how much at most
_LAST_RESORT = 1024  # rows, where so much address space is not to be had
# Dead rows that a tail may have, and how many times as many as live: behind that the live ones are
# moved, so that each dead one costs half a copy at most.
_DEAD = (1024, 2)
_WIDEN = 4
_DENSE = 8
_FEW = 1 / 32  # of a segment's rows: below that, comparing them all beats the index


def _is_limited() -> bool:
    """Whether this process may only have so much address space."""
    return resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY


class View(NamedTuple):
    """What one search looks at."""

    segments: tuple[OpenSegment, ...]
    tail_ids: NDArray[np.int64]
    tail_vectors: NDArray[np.float32]
    tail_squared: NDArray[np.float32] | None
    tail_sketch: Sketch | None
    tail_live: NDArray[np.bool_]
    tail_dead: int


class Tail:
    """Vectors in memory, of rising ids. What was read stays, but for rows that go out.

    Args:
        metric: "l2" keeps the squared lengths, too.
    """

    def __init__(self, metric: str) -> None:
        self._metric = metric
        self.rows = 0  # in use, dead ones among them
        self.dead = 0
        self._taken = 0  # rows whose memory is there
        self.is_short = False  # rows to come will soon meet memory that was never touched
        self._ids = np.empty(0, np.int64)
        self._vectors = np.empty((0, 0), np.float32)
        self._squared: NDArray[np.float32] | None = None
        self._live = np.empty(0, bool)
        self._sketch: Sketch | None = None
        self.directions: Directions | None = None  # in which most of what comes is long

    @property
    def ids(self) -> NDArray[np.int64]:
        """(rows,) int64."""
        return self._ids[: self.rows]

    @property
    def vectors(self) -> NDArray[np.float32]:
        """(rows, dim) float32."""
        return self._vectors[: self.rows]

    @property
    def squared(self) -> NDArray[np.float32] | None:
        """(rows,) float32 squared lengths, or None."""
        return None if self._squared is None else self._squared[: self.rows]

    @property
    def live(self) -> NDArray[np.bool_]:
        """(rows,) bool."""
        return self._live[: self.rows]

    def sketch(self) -> Sketch | None:
        """Bounds for these vectors, where they may be of use."""
        if self.directions is None or self.rows < LEAST_ROWS:
            return None
        sketch = self._sketch
        if sketch is None or sketch.known is not self.directions:
            sketch = self._sketch = Sketch(self.directions, self._vectors)
        return sketch

    def append(self, ids: NDArray[np.int64], vectors: NDArray[np.float32]) -> None:
        """Append vectors of rising ids, all above those that are here."""
        n = len(ids)
        if self.rows + n > len(self._ids):
            self._reserve(n, vectors.shape[1])
        first, behind = self.rows, self.rows + n
        self._ids[first:behind] = ids
        self._vectors[first:behind] = vectors
        if self._squared is not None:
            self._squared[first:behind] = squared_norms(self._vectors[first:behind])
        self._live[first:behind] = True
        self.rows = behind
        ahead = self._ahead()
        self.is_short = 0 < ahead and behind + ahead // 2 > self._taken

    def _ahead(self) -> int:
        """Rows whose memory to take ahead: never more than there are."""
        row = self._vectors.strides[0]
        least, most = _AHEAD
        return min(self.rows, most // row) if self.rows * row >= least else 0

    def take_ahead(self) -> None:
        """Have the memory of rows to come ready. Needs no lock."""
        vectors, first = self._vectors, max(self.rows, self._taken)
        self._taken = max(first, self.rows + self._ahead())
        self.is_short = False
        memory.take(vectors[first : self._taken])

    def _reserve(self, n: int, dim: int) -> None:
        """Make room for n more."""
        kept = self.rows - self.dead
        rows, spare = _FIRST_LIMITED if _is_limited() else _FIRST
        try:
            self._move_to(max(min(rows, spare // (4 * dim)), _GROWTH * (kept + n)), dim)
        except MemoryError:
            self._move_to(max(_LAST_RESORT, kept + n + kept // 4), dim)

    def _move_to(self, capacity: int, dim: int) -> None:
        """Have the live rows in new arrays: views keep the old ones."""
        vectors = np.empty((capacity, dim), np.float32)
        keep = np.flatnonzero(self.live)
        kept = len(keep)
        ids, live = np.empty(capacity, np.int64), np.zeros(capacity, bool)
        squared = np.empty(capacity, np.float32) if self._metric == "l2" else None
        if 0 < kept == self.rows:
            ids[:kept] = self.ids
            vectors[:kept] = self.vectors
        elif kept:
            self._ids.take(keep, out=ids[:kept], mode="clip")
            # "clip" writes in place; the default makes a copy first, in case of an error.
            self._vectors.take(keep, axis=0, out=vectors[:kept], mode="clip")
        if squared is not None and self._squared is not None:
            squared[:kept] = self._squared[keep]
        live[:kept] = True
        if self._sketch is not None:
            self._sketch = self._sketch.copied(vectors, keep)
        self._ids, self._vectors, self._live, self._squared = ids, vectors, live, squared
        self.rows, self.dead, self._taken = kept, 0, 0

    def remove(self, ids: NDArray[np.int64]) -> bool:
        """Take ids out; False if none of them can be here."""
        here = self.ids
        if not len(ids) or not len(here) or ids.max() < here[0]:
            return False
        rows = np.searchsorted(here, ids)
        rows[rows == len(here)] = 0
        rows = np.unique(rows[(here[rows] == ids) & self._live[rows]])
        self._live[rows] = False
        self.dead += len(rows)
        self._leave_dead()
        return True

    def _leave_dead(self) -> None:
        """Move away from dead rows where they are many."""
        least, times = _DEAD
        kept = self.rows - self.dead
        if self.dead > max(least, times * kept):
            # Room up to the next time, and no more: the allocator has so little at hand again.
            room = (times + 2) * max(least, kept)
            with contextlib.suppress(MemoryError):  # they may stay
                self._move_to(room, self._vectors.shape[1])

    def behind(self, end_id: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Ids from that one on, and their vectors; dead ones too."""
        cut = int(np.searchsorted(self.ids, end_id))
        return self.ids[cut:], self.vectors[cut:]

    def keep_only(self, newer: Tail) -> None:
        """Take out what is no longer in `newer`, of which this is a copy."""
        if not self.rows:
            return
        here = newer.ids
        if len(here):
            at = np.searchsorted(here, self.ids)
            at[at == len(here)] = 0
            self._live[: self.rows] &= (here[at] == self.ids) & newer.live[at]
        else:
            self._live[: self.rows] = False
        self.dead = self.rows - int(np.count_nonzero(self.live))


class Watch:
    """What went out of the tiers since somebody began to open segments aside."""

    __slots__ = ("__weakref__", "cleared", "removed")

    def __init__(self) -> None:
        self.removed: list[NDArray[np.int64]] = []
        self.cleared = False


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
        self._tail = Tail(metric)
        self._view: View | None = None
        self._watches: list[weakref.ref[Watch]] = []

    # ------------------------------------------------------------ the tail

    @property
    def tail_rows(self) -> int:
        """Live rows in the tail."""
        return self._tail.rows - self._tail.dead

    @property
    def live_rows(self) -> int:
        """Live rows in all tiers."""
        inside = sum(segment.info.rows - segment.dead for segment in self.segments)
        return inside + self.tail_rows

    def add(self, ids: NDArray[np.int64], vectors: NDArray[np.float32]) -> None:
        """Append vectors of rising ids, unless the segments have them."""
        if ids[0] >= self.end_id:
            self.append(ids, vectors)
        elif ids[-1] >= self.end_id:
            new = ids >= self.end_id
            self.append(ids[new], vectors[new])

    def append(self, ids: NDArray[np.int64], vectors: NDArray[np.float32]) -> None:
        """Append vectors of rising ids, all above those that are in the tail."""
        self._view = None
        self._tail.append(ids, vectors)

    def is_short(self) -> bool:
        """See `Tail.is_short`."""
        return self._tail.is_short

    def take_ahead(self) -> None:
        """See `Tail.take_ahead`."""
        self._tail.take_ahead()

    def replace_tail(self, ids: NDArray[np.int64], vectors: NDArray[np.float32]) -> None:
        """Have these in the tail instead."""
        self._view = None
        tail = Tail(self.metric)
        tail.directions = self._tail.directions
        tail.append(ids, vectors)
        self._tail = tail

    def remove(self, ids: NDArray[np.int64]) -> None:
        """Take ids out of tail and segments; others are skipped."""
        if self._tail.remove(ids):
            self._view = None
        if self.segments and len(ids) and ids.min() < self.end_id:
            for segment in self.segments:
                segment.remove(ids)
        for watch in self._watching():
            watch.removed.append(ids)

    def clear(self) -> None:
        """Take everything out."""
        self._view = None
        self._tail = Tail(self.metric)
        self.segments = ()
        for watch in self._watching():
            watch.cleared = True

    # ------------------------------------------------------------ other segments

    def watch(self) -> Watch:
        """Note what goes out from now on, for as long as somebody holds the result."""
        watch = Watch()
        self._watches = [ref for ref in self._watches if ref() is not None]
        self._watches.append(weakref.ref(watch))
        return watch

    def _watching(self) -> list[Watch]:
        return [watch for ref in self._watches if (watch := ref()) is not None]

    def gone_since(self, segment: OpenSegment) -> NDArray[np.int64] | None:
        """Ids that went out since a segment was opened; None where that is not known."""
        if any(segment is one for one in self.segments):
            return np.empty(0, np.int64)  # it was told of each
        for watch in self._watching():
            if watch is segment.watch and not watch.cleared:
                return np.concatenate([np.empty(0, np.int64), *watch.removed])
        return None

    def copied_tail(self, end_id: int, known: Directions | None = None) -> Callable[[], Tail]:
        """What copies the tail from that id on, as of now, and needs no lock.

        With directions it bounds the rows at once: no search has to.
        """
        ids, vectors = self._tail.behind(end_id)

        def copy() -> Tail:
            tail = Tail(self.metric)
            tail.directions = known
            if len(ids):
                tail.append(ids, vectors)
            sketch = tail.sketch()
            if sketch is not None:
                sketch.complete(tail.rows)
            return tail

        return copy

    def adopt(
        self,
        segments: tuple[OpenSegment, ...],
        *,
        lsn: int,
        end_id: int,
        generation: int,
        tail: Tail | None = None,
    ) -> None:
        """Search these segments from now on; the tail keeps what is newer than they are.

        Args:
            segments: To search.
            lsn: Operations up to it are in them.
            end_id: Ids below it are in them, or gone.
            generation: Of the manifest that lists them.
            tail: What `copied_tail(end_id)` has copied: what came since is added.
        """
        current = self._tail
        if current.rows and (tail is not None or current.ids[0] < end_id):
            # A copy: a search under way has a view that lacks these segments.
            tail = self.copied_tail(end_id)() if tail is None else tail
            since = end_id if not tail.rows else int(tail.ids[-1]) + 1
            ids, vectors = current.behind(since)
            if len(ids):
                tail.append(ids, vectors)
            tail.keep_only(current)
            self._tail = tail
        self._tail.directions = known_directions(segments)
        self._view = None
        self.segments = segments
        self.lsn, self.end_id, self.generation = lsn, end_id, generation

    # ------------------------------------------------------------ reading

    def view(self) -> View:
        """What there is now (replica lock held)."""
        view = self._view
        if view is None:
            tail = self._tail
            view = self._view = View(
                self.segments,
                tail.ids,
                tail.vectors,
                tail.squared,
                tail.sketch(),
                tail.live,
                tail.dead,
            )
        return view

    def holds(self, ids: NDArray[np.int64]) -> NDArray[np.bool_]:
        """For which ids some tier has the vector."""
        return self.holder()(ids)

    def holder(self) -> Callable[[NDArray[np.int64]], NDArray[np.bool_]]:
        """`holds` as of now, for any thread."""
        places = [*(segment.ids for segment in self.segments), self._tail.ids]

        def holds(ids: NDArray[np.int64]) -> NDArray[np.bool_]:
            found = np.zeros(len(ids), bool)
            for here in places:
                if len(here):
                    found |= here[rows_of(here, ids)] == ids
            return found

        return holds

    def gatherer(self, dim: int) -> Gatherer:
        """From ids that some tier holds to their vectors, as of now, for any thread."""
        return Gatherer(self.segments, self._tail, dim)


class Gatherer:
    """Vectors by id, of some tiers as they were at one instant."""

    def __init__(self, opened: tuple[OpenSegment, ...], tail: Tail, dim: int) -> None:
        self._segments = opened
        self._places = [(segment.ids, segment.vectors) for segment in opened]
        self._places.append((tail.ids, tail.vectors))
        self._dim = dim
        self._used: set[int] = set()  # numbers of segments

    def __call__(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """(n, dim) float32 of (n,) ids that are there."""
        vectors = np.empty((len(ids), self._dim), np.float32)
        for i, (here, values) in enumerate(self._places):
            if len(here):
                rows = rows_of(here, ids)
                hit = here[rows] == ids
                if hit.any():
                    vectors[hit] = values[rows[hit]]
                    self._used.add(i)
        return vectors

    def check(self) -> None:
        """See that all that was given was right, before it is kept anywhere.

        Raises:
            CorruptionError: A segment has changed since it was opened.
        """
        for i, segment in enumerate(self._segments):
            if i in self._used:
                segment.check()


def known_directions(opened: tuple[OpenSegment, ...]) -> Directions | None:
    """Those of the large segment, or None."""
    return next((one.directions for one in opened if one.directions is not None), None)


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
    if len(queries) == 1:
        if metric == "cosine":  # nothing overflows
            return _search_one(view, metric, queries, k, allowed)
        with np.errstate(over="ignore", invalid="ignore"):  # vectors of 1e19 and more
            return _search_one(view, metric, queries, k, allowed)
    parts = [_search_segment(one, metric, queries, k, allowed) for one in view.segments]
    if len(view.tail_ids):
        rows, similarities = exact_search(
            view.tail_vectors, view.tail_squared, queries, k, metric, _tail_mask(view, allowed)
        )
        parts.append((_ids_at(view.tail_ids, rows), similarities))
    if not parts:
        return _nothing(len(queries), k)
    return _merged(parts, k)


def _search_one(
    view: View,
    metric: str,
    query: NDArray[np.float32],
    k: int,
    allowed: NDArray[np.int64] | None,
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """As `search`, for one query (1, dim).

    The segments come first: what they find says how similar a row of the tail has to be to count,
    which spares sorting it. Each call into numpy counts here.
    """
    ids, similarities, floor = [], [], -np.inf
    for segment in view.segments:
        part = None
        if segment.sketch is not None and floor > -np.inf and allowed is None:
            part = _search_sketched(segment, segment.sketch, metric, query[0], floor)
        if part is None:
            found = _search_segment(segment, metric, query, k, allowed)
            part = found[0][0], found[1][0]
            floor = max(floor, float(part[1][-1]))
        ids.append(part[0])
        similarities.append(part[1])
    for rows, values in _search_tail(view, metric, query[0], k, allowed, floor):
        if len(rows):
            ids.append(view.tail_ids.take(rows))
            similarities.append(values)
    return _nearest(ids, similarities, k)


def _search_tail(
    view: View,
    metric: str,
    query: NDArray[np.float32],
    k: int,
    allowed: NDArray[np.int64] | None,
    floor: float,
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
    """Rows that may be among the k most similar, from `floor` on, in no order."""
    rows = len(view.tail_ids)
    if not rows:
        return
    mask = _tail_mask(view, allowed)
    first = 0  # the row that nothing has told about yet
    if view.tail_sketch is not None and floor > -np.inf:
        told = view.tail_sketch.candidates(rows, query, floor, view.tail_squared)
        if told is not None:
            near, first = told
            near = near if mask is None else near[mask[near]]
            yield near, exact_similarities(view.tail_vectors, near, query, metric)
    if first < rows:
        near, values = exact_best(
            view.tail_vectors[first:],
            None if view.tail_squared is None else view.tail_squared[first:],
            query,
            k,
            metric,
            None if mask is None else mask[first:],
            floor,
        )
        yield near + first if first else near, values


def _tail_mask(view: View, allowed: NDArray[np.int64] | None) -> NDArray[np.bool_] | None:
    """Which rows of the tail may be found; None for all."""
    if allowed is not None:
        return view.tail_live & _member(view.tail_ids, allowed)
    return view.tail_live if view.tail_dead else None


def _search_sketched(
    segment: OpenSegment,
    sketch: Sketch,
    metric: str,
    query: NDArray[np.float32],
    floor: float,
) -> tuple[NDArray[np.int64], NDArray[np.float32]] | None:
    """Ids of a small segment from `floor` on, in no order; None where bounds do not tell."""
    told = sketch.candidates(segment.info.rows, query, floor, sketch.squared)
    if told is None:
        return None
    rows, _ = told
    if len(rows) and segment.dead:
        rows = rows[segment.live[rows]]
    return segment.ids.take(rows), exact_similarities(sketch.vectors, rows, query, metric)


def _nothing(m: int, k: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Padding alone."""
    return np.full((m, k), -1, np.int64), np.full((m, k), -np.inf, np.float32)


def _nearest(
    ids: list[NDArray[np.int64]], similarities: list[NDArray[np.float32]], k: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The k most similar of what the tiers have found for one query, (1, k), padded.

    Where several have found something, that is at least k; one alone gives it in falling order.
    """
    if len(ids) > 1:
        found = np.concatenate(similarities)
        first = np.negative(found).argsort(kind="stable")[:k]
        return np.concatenate(ids).take(first)[np.newaxis], found.take(first)[np.newaxis]
    padded = _nothing(1, k)  # never the arrays of an index, which may use them again
    for some, values in zip(ids, similarities, strict=True):
        padded[0][0, : len(some)], padded[1][0, : len(some)] = some, values
    return padded


def _merged(
    parts: list[tuple[NDArray[np.int64], NDArray[np.float32]]], k: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The k most similar of what at least one tier has found, in arrays of their own."""
    if len(parts) == 1:  # an index may use its arrays again
        return parts[0][0].copy(), parts[0][1].copy()
    ids = np.concatenate([part[0] for part in parts], axis=1)
    similarities = np.concatenate([part[1] for part in parts], axis=1)
    return best(ids, similarities, k)


def best(
    ids: NDArray[np.int64], similarities: NDArray[np.float32], k: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The k most similar of each row, in falling order; of equals, those that come first."""
    if len(ids) == 1:
        first = np.negative(similarities[0]).argsort(kind="stable")[:k]
        return ids.take(first, axis=1), similarities.take(first, axis=1)
    order = np.argsort(-similarities, axis=1, kind="stable")[:, :k]
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
    ids, similarities = segment.search(queries, k, bitmap if filtered else None)
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
        ids, similarities = segment.search(queries, min(ask, rows))
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
    if len(ids) == 1 and wanted and ids[0, wanted - 1] >= 0:
        return ids, similarities
    if wanted and ids[:, wanted - 1].min(initial=0) < 0:
        short = np.flatnonzero(ids[:, wanted - 1] < 0)
        exact_rows, exact = exact_search(segment.vectors, None, queries[short], k, metric, live)
        ids, similarities = ids.copy(), similarities.copy()  # these are the index's own
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
