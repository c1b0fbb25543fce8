"""Segments and tail searched as one, against all vectors in one array."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from expbuf_core import segments
from expbuf_core.builtin.exact import ExactIndexBackend, ExactSettings
from expbuf_core.contracts import IndexContext, IndexSegment
from expbuf_core.exact_search import exact_search
from expbuf_core.filesystem import FileSystem
from expbuf_core.segments import OpenSegment
from expbuf_core.tiers import IndexTiers, Tail, search

DIM = 5
UUID = bytes(16)


class Bad(IndexSegment):
    """An index that cannot leave rows out, and finds less than there is."""

    def __init__(self, inner: IndexSegment, share: float) -> None:
        self.inner, self.share = inner, share

    def search(
        self, queries: NDArray[np.float32], k: int, allowed: NDArray[np.uint8] | None
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        assert allowed is None
        ids, similarities = self.inner.search(queries, k, None)
        lost = int(k * (1 - self.share))
        if lost:
            ids[:, k - lost :], similarities[:, k - lost :] = -1, -np.inf
        return ids, similarities


class World:
    """Tiers, and the truth beside them."""

    def __init__(
        self, folder: Path, metric: str, *, filters: bool = True, share: float = 1.0
    ) -> None:
        self.folder, self.metric, self.filters, self.share = folder, metric, filters, share
        self.tiers = IndexTiers(metric)
        self.rng = np.random.default_rng(1)
        self.vectors: dict[int, NDArray[np.float32]] = {}
        self.next_id = 3
        self.generation = 0

    def add(self, n: int, gap: int = 0) -> None:
        vectors = self.rng.standard_normal((n, DIM), np.float32)
        if self.metric == "cosine":
            vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        ids = np.arange(self.next_id + gap, self.next_id + gap + n)
        self.tiers.add(ids, vectors)
        self.vectors |= dict(zip(ids.tolist(), vectors, strict=True))
        self.next_id = int(ids[-1]) + 1

    def remove(self, ids: Any) -> None:
        self.tiers.remove(np.asarray(ids, np.int64))
        for id_ in np.asarray(ids).tolist():
            self.vectors.pop(id_, None)

    def segment(self, ids: list[int]) -> OpenSegment:
        """A segment of these ids, built and opened."""
        backend = ExactIndexBackend(ExactSettings(), IndexContext(DIM, self.metric))
        self.generation += 1
        info = segments.write_segment(
            self.folder,
            f"{self.generation:06d}",
            uuid=UUID,
            ids=np.array(ids, np.int64),
            vectors=iter([np.stack([self.vectors[i] for i in ids])]),
            dim=DIM,
            end_id=self.next_id,
            backend_name="exact",
            backend=backend,
            fs=FileSystem(),
        )
        live = np.array(sorted(self.vectors), np.int64)
        opened = segments.open_segment(self.folder, info, DIM, backend, live, filters=self.filters)
        if not self.filters:
            opened.index = Bad(opened.index, self.share)
        return opened

    def build(self, *parts: list[int]) -> None:
        opened = tuple(self.segment(part) for part in parts)
        end = max(segment.info.end_id for segment in opened)
        self.tiers.adopt(opened, lsn=0, end_id=end, generation=self.generation)

    def check(self, k: int, allowed: Any = None, queries: int = 3) -> None:
        """The same as one exact search over all that is live; one by one, too."""
        if queries > 1:
            self.check(k, allowed, 1)
        wanted = self.rng.standard_normal((queries, DIM), np.float32)
        chosen = sorted(self.vectors if allowed is None else set(allowed) & set(self.vectors))
        array = None if allowed is None else np.array(sorted(allowed), np.int64)
        ids, similarities = search(self.tiers.view(), self.metric, wanted, k, array)
        assert ids.shape == similarities.shape == (queries, k)
        if not chosen:
            assert (ids == -1).all()
            return
        matrix = np.stack([self.vectors[i] for i in chosen])
        rows, truth = exact_search(matrix, None, wanted, k, self.metric)
        np.testing.assert_array_equal(ids, np.where(rows >= 0, np.array(chosen)[rows], -1))
        np.testing.assert_allclose(similarities, truth, atol=1e-5)


@pytest.fixture(params=["cosine", "inner_product", "l2"])
def metric(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def ids_of(world: World) -> list[int]:
    return sorted(world.vectors)


def test_nothing_is_found_in_nothing(tmp_path: Path, metric: str) -> None:
    world = World(tmp_path, metric)
    world.check(3)
    world.add(4)
    world.remove(ids_of(world))
    world.check(3)
    world.tiers.clear()
    world.check(3)


def test_the_tail_alone(tmp_path: Path, metric: str) -> None:
    world = World(tmp_path, metric)
    for n in (1, 1, 300, 5, 700, 1):
        world.add(n, gap=n % 3)
        world.check(7)
    assert world.tiers.tail_rows == 1008
    world.remove(ids_of(world)[::3])
    world.check(7)
    world.check(1000)
    world.remove(ids_of(world)[:500])
    world.check(200)


@pytest.mark.parametrize("filters", [True, False])
@pytest.mark.parametrize("share", [1.0, 0.5])
def test_segments_and_tail(tmp_path: Path, metric: str, filters: bool, share: float) -> None:
    world = World(tmp_path, metric, filters=filters, share=share)
    world.add(200)
    first = ids_of(world)
    world.build(first)
    assert world.tiers.tail_rows == 0
    world.check(9)
    world.add(60)
    world.check(9)
    if share < 1:  # an index that finds too little is helped out only where it returns too few
        return
    world.remove(first[:50])
    world.check(9)
    world.check(300)
    late = [i for i in ids_of(world) if i > first[-1]]
    world.build([i for i in first if i in world.vectors], late)
    world.check(9)
    world.remove(late[::2])
    world.add(3)
    world.check(9)
    world.check(250)
    world.remove(first)
    world.check(40)


def test_an_index_that_finds_too_little_is_helped_out(tmp_path: Path) -> None:
    world = World(tmp_path, "cosine", filters=False, share=0.0)
    world.add(50)
    world.build(ids_of(world))
    world.check(5)
    world.remove(ids_of(world)[::2])
    world.check(30)


@pytest.mark.parametrize("filters", [True, False])
def test_only_some_are_allowed(tmp_path: Path, metric: str, filters: bool) -> None:
    world = World(tmp_path, metric, filters=filters)
    world.add(80)
    world.build(ids_of(world))
    world.add(40)
    every = ids_of(world)
    for allowed in (every, every[::5], every[-3:], every[:2], [10**6], []):
        world.check(6, allowed=allowed)
    world.remove(every[::10])
    world.check(6, allowed=every[::5])


def test_of_equals_the_older_come_first(tmp_path: Path, metric: str) -> None:
    world = World(tmp_path, metric)
    tiers = world.tiers
    # Whole numbers: whoever computes similarities, in whatever order, finds the same.
    vectors = world.rng.integers(-3, 4, (160, DIM)).astype(np.float32)
    vectors[40:] = np.tile(vectors[:40], (3, 1))
    tiers.add(np.arange(160), vectors)
    world.vectors, world.next_id = dict(enumerate(vectors)), 100
    world.build(list(range(40)), list(range(40, 100)))
    queries = world.rng.integers(-3, 4, (3, DIM)).astype(np.float32)
    for k in (1, 4, 6, 160):
        rows, _ = exact_search(vectors, None, queries, k, metric)
        np.testing.assert_array_equal(search(tiers.view(), metric, queries, k)[0], rows)
        for query, expected in zip(queries, rows, strict=True):
            one = search(tiers.view(), metric, query[np.newaxis], k)[0]
            np.testing.assert_array_equal(one[0], expected)


def test_no_queries(tmp_path: Path) -> None:
    for filters in (True, False):
        world = World(tmp_path / str(filters), "l2", filters=filters)
        world.check(4, queries=0)
        world.add(10)
        world.check(4, queries=0)
        world.build(ids_of(world))
        world.check(4, queries=0)


def test_what_the_segments_have_is_not_added_again(tmp_path: Path) -> None:
    world = World(tmp_path, "cosine")
    world.add(10)
    every = ids_of(world)
    world.build(every)
    world.tiers.add(np.array(every[-2:]), np.stack([world.vectors[i] for i in every[-2:]]))
    assert world.tiers.tail_rows == 0
    world.check(10)


def test_a_search_under_way_keeps_its_view(tmp_path: Path, metric: str) -> None:
    """Adopting, growing and clearing take nothing from a view; removal does."""
    world = World(tmp_path, metric)
    world.add(100)
    view = world.tiers.view()
    queries = world.rng.standard_normal((2, DIM), np.float32)
    before = search(view, metric, queries, 8)

    def unchanged() -> None:
        after = search(view, metric, queries, 8)
        np.testing.assert_array_equal(before[0], after[0])
        np.testing.assert_array_equal(before[1], after[1])

    world.add(150)
    unchanged()
    world.add(900)
    unchanged()
    world.build(ids_of(world))
    unchanged()
    world.tiers.clear()
    unchanged()
    assert search(world.tiers.view(), metric, queries, 8)[0].max() == -1


def test_segments_opened_aside_miss_nothing(tmp_path: Path, metric: str) -> None:
    """What goes out while they are being opened is out of them; what comes is in the tail."""
    world = World(tmp_path, metric)
    world.add(100)
    world.remove(ids_of(world)[:10])
    watch = world.tiers.watch()
    segment = world.segment(ids_of(world))
    segment.watch = watch
    end_id = segment.info.end_id
    world.add(5)
    world.remove([*ids_of(world)[40:50], end_id + 3])
    copy = world.tiers.copied_tail(end_id)
    world.add(7)
    tail = copy()
    world.remove([ids_of(world)[3], end_id + 1, end_id + 6])
    gone = world.tiers.gone_since(segment)
    assert gone is not None
    segment.remove(gone)
    world.tiers.adopt((segment,), lsn=0, end_id=end_id, generation=1, tail=tail)
    assert world.tiers.tail_rows == 12 - 3
    assert world.tiers.live_rows == len(world.vectors)
    world.check(9)
    world.check(200)
    assert world.tiers.gone_since(segment) is not None, "it is told of each from now on"


def test_what_is_not_known_is_looked_at(tmp_path: Path) -> None:
    world = World(tmp_path, "cosine")
    world.add(20)
    segment = world.segment(ids_of(world))
    assert world.tiers.gone_since(segment) is None
    segment.watch = watch = world.tiers.watch()
    assert world.tiers.gone_since(segment) is not None
    world.tiers.clear()
    assert world.tiers.gone_since(segment) is None
    segment.watch = watch = world.tiers.watch()
    other = IndexTiers("cosine")
    assert other.gone_since(segment) is None
    del watch


def test_where_vectors_are(tmp_path: Path) -> None:
    world = World(tmp_path, "l2")
    world.add(30)
    world.build(ids_of(world))
    world.add(20, gap=4)
    world.remove(ids_of(world)[5:40:7])
    every = np.array(ids_of(world))
    assert world.tiers.holds(every).all()
    assert not world.tiers.holds(np.array([0, 1, 2, 10**6])).any()
    gather = world.tiers.gatherer(DIM)
    np.testing.assert_array_equal(gather(every), np.stack([world.vectors[i] for i in every]))
    np.testing.assert_array_equal(
        gather(every[7:9]), np.stack([world.vectors[i] for i in every[7:9]])
    )


def test_random_histories(tmp_path: Path, metric: str) -> None:
    world = World(tmp_path, metric)
    rng = np.random.default_rng(8)
    for step in range(60):
        kind = rng.choice(["add", "remove", "fifo", "build"], p=[0.5, 0.2, 0.2, 0.1])
        every = ids_of(world)
        if kind == "add" or not every:
            world.add(int(rng.integers(1, 30)), gap=int(rng.integers(0, 3)))
        elif kind == "remove":
            world.remove(rng.choice(every, min(len(every), 7), replace=False))
        elif kind == "fifo":
            world.remove(every[: int(rng.integers(1, 20))])
        else:
            cut = len(every) // 2
            world.build(*[part for part in (every[:cut], every[cut:]) if part])
        if step % 3 == 0:
            world.check(int(rng.integers(1, 40)))


def test_a_tail_that_nobody_builds_holds_few_dead_rows(tmp_path: Path, metric: str) -> None:
    world = World(tmp_path, metric)
    tail = world.tiers._tail
    held, moves = world.tiers.view(), 0
    for _ in range(40):
        before = tail.vectors
        world.add(300)
        held = world.tiers.view()
        world.remove(ids_of(world)[:-500])  # first in, first out
        moves += not np.shares_memory(before, tail.vectors)
        assert tail.dead <= max(1024, 2 * 500)
        assert tail.rows - tail.dead == len(world.vectors) <= 500
    world.check(9)
    assert moves <= 40 * 300 / 1024  # once for so many dead ones
    assert held.tail_ids[-1] == world.next_id - 1
    assert held.tail_vectors.shape == (len(held.tail_ids), DIM)
    world.remove(ids_of(world))
    world.check(3)
    world.add(2000)
    world.remove(ids_of(world)[1:])
    assert tail.rows == 1
    world.check(3)


def test_a_search_under_way_keeps_its_view_when_dead_rows_go(tmp_path: Path, metric: str) -> None:
    world = World(tmp_path, metric)
    world.add(3000)
    view = world.tiers.view()
    queries = world.rng.standard_normal((2, DIM), np.float32)
    before = search(view, metric, queries, 8)
    world.remove(np.setdiff1d(ids_of(world), before[0]))
    assert world.tiers._tail.rows < 20
    world.add(3000)
    after = search(view, metric, queries, 8)
    np.testing.assert_array_equal(before[0], after[0])
    np.testing.assert_array_equal(before[1], after[1])


def test_dead_rows_may_go_while_segments_are_opened_aside(tmp_path: Path, metric: str) -> None:
    world = World(tmp_path, metric)
    world.add(100)
    watch = world.tiers.watch()
    segment = world.segment(ids_of(world))
    segment.watch = watch
    end_id = segment.info.end_id
    world.add(2000)
    copy = world.tiers.copied_tail(end_id)
    world.remove(ids_of(world)[50:2080])  # all but a few of the segment and the tail
    assert world.tiers._tail.dead == 0
    world.add(7)
    tail = copy()
    gone = world.tiers.gone_since(segment)
    assert gone is not None
    segment.remove(gone)
    world.tiers.adopt((segment,), lsn=0, end_id=end_id, generation=1, tail=tail)
    assert world.tiers.live_rows == len(world.vectors) == 50 + 20 + 7
    world.check(9)


def test_without_memory_dead_rows_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(tmp_path, "l2")
    world.add(3000)
    room = np.empty

    def refuse(*arguments: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr(np, "empty", refuse)
    world.tiers.remove(np.array(ids_of(world)[:2500]))
    monkeypatch.setattr(np, "empty", room)
    world.remove(ids_of(world)[:2500])
    assert world.tiers.tail_rows == 500
    world.check(9)


_SHORT_OF_MEMORY = """
import resource
import numpy as np
from expbuf_core.tiers import Tail

used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (40 << 20),) * 2)
tail, dim = Tail("l2"), 384
for first in range(0, 6000, 500):
    ids = np.arange(first, first + 500)
    tail.append(ids, np.repeat(ids.astype(np.float32)[:, None], dim, axis=1))
assert len(tail._ids) < 1 << 15  # there was no room for more
assert (tail.ids == np.arange(6000)).all()
assert (tail.vectors[:, 0] == tail.ids).all() and (tail.vectors[:, -1] == tail.ids).all()
assert tail.live.all()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits of address space are Linux's")
def test_where_address_space_is_short() -> None:
    subprocess.run([sys.executable, "-c", _SHORT_OF_MEMORY], timeout=60, check=True)


def test_memory_is_taken_ahead_where_a_tail_grows() -> None:
    tail = Tail("cosine")
    block = np.ones((256, 512), np.float32)  # half a megabyte

    def grow(times: int) -> None:
        for _ in range(times):
            tail.append(np.arange(tail.rows, tail.rows + 256), block)

    assert not tail.is_short
    grow(1)
    assert not tail.is_short  # a small one is left alone
    grow(1)
    assert tail.is_short
    tail.take_ahead()
    assert not tail.is_short  # as much again
    grow(1)
    assert tail.is_short  # half of that is in use
    tail.take_ahead()
    np.testing.assert_array_equal(tail.vectors, np.ones((768, 512), np.float32))
    grow(60)
    tail.take_ahead()
    grow(7)
    assert not tail.is_short  # never more than 8 MiB
    grow(2)
    assert tail.is_short
