"""What a build keeps and what it writes again."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from expbuf_core.indexing import plan

BATCH, GROWTH = 20, 0.25
LOGGED = 4.5  # what the logs take of a row with two embeddings, as multiples of its fused vector


class Builds:
    """Builds without files: which ids lie in which segment."""

    def __init__(self) -> None:
        self.segments: list[Any] = []
        self.live = np.empty(0, np.int64)
        self.next_id = 0
        self.written = 0

    def add(self, n: int) -> None:
        self.live = np.append(self.live, np.arange(self.next_id, self.next_id + n))
        self.next_id += n

    def remove(self, ids: Any) -> None:
        self.live = self.live[~np.isin(self.live, ids)]
        for segment in self.segments:
            segment.dead = segment.info.rows - int(np.isin(segment.ids, self.live).sum())

    def build(self) -> None:
        kept, ids = plan(tuple(self.segments), self.live, GROWTH, BATCH)
        assert kept == self.segments[: len(kept)], "the oldest stay"
        held = [ids, *(segment.ids[np.isin(segment.ids, self.live)] for segment in kept)]
        assert sorted(np.concatenate(held).tolist()) == self.live.tolist(), "each once, none lost"
        self.segments = list(kept)
        if len(ids):
            info = SimpleNamespace(rows=len(ids), first_id=int(ids[0]), end_id=self.next_id)
            self.segments.append(SimpleNamespace(info=info, ids=ids, dead=0))
        self.written += len(ids)


def written_per_row(rows: int) -> tuple[float, int]:
    """Of a buffer that grows to so many rows, over its second half; and the most segments."""
    builds, most = Builds(), 0
    while builds.next_id < 0.5 * rows:
        builds.add(BATCH)
        builds.build()
    builds.written = 0
    while builds.next_id < rows:
        builds.add(BATCH)
        builds.build()
        most = max(most, len(builds.segments))
    return builds.written / (0.5 * rows), most


def test_what_is_written_for_a_row_hardly_grows() -> None:
    """Eighty times the rows, at the same number of rows a build."""
    small, _ = written_per_row(10 * BATCH)
    large, most = written_per_row(800 * BATCH)
    assert LOGGED + large <= 2 * (LOGGED + small)
    assert most <= 5


def test_a_full_buffer_is_in_a_steady_state() -> None:
    builds = Builds()
    builds.add(200 * BATCH)
    builds.build()
    amounts = []
    for _ in range(3):
        builds.written = 0
        for _ in range(200):
            builds.add(BATCH)
            builds.remove(builds.live[:BATCH])
            builds.build()
        amounts.append(builds.written)
    assert max(amounts) <= 1.2 * min(amounts)
    assert max(amounts) / (200 * BATCH) < 20


def test_removals_anywhere() -> None:
    rng = np.random.default_rng(1)
    builds = Builds()
    for _ in range(300):
        builds.add(int(rng.integers(1, 3 * BATCH)))
        if rng.random() < 0.5:
            builds.remove(rng.choice(builds.live, min(len(builds.live), int(rng.integers(1, 400)))))
        builds.build()
        assert all(segment.dead <= 0.25 * segment.info.rows for segment in builds.segments)
    builds.remove(builds.live)
    builds.build()
    assert builds.segments == []


@pytest.mark.parametrize("rows", [1, 5])
def test_the_first_build(rows: int) -> None:
    builds = Builds()
    builds.build()
    builds.add(rows)
    builds.build()
    assert [segment.info.rows for segment in builds.segments] == [rows]
