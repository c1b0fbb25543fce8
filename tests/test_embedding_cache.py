"""Sampled embeddings kept in memory: the same as those that are stored, in every situation."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from expbuf_core import ExperienceBuffer
from expbuf_core.contracts import Pin
from expbuf_core.embedding_cache import EmbeddingCache
from expbuf_core.results import PinnedExperiences

SETTINGS: dict[str, Any] = {
    "index": {"backend": "exact", "builder": "off"},
    "fusion": "weighted_concat",
    "durability": "os",
}
ROW_BYTES = 4 * (3 + 2) + 16


def embeddings(ids: NDArray[np.int64]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """(n, 3) and (n, 2), different for each id."""
    numbers = ids[:, None].astype(np.float32)
    return np.repeat(numbers, 3, axis=1), np.repeat(-numbers, 2, axis=1)


def test_what_was_put_is_got() -> None:
    cache = EmbeddingCache(100 * ROW_BYTES, 3, 2, 1000)
    assert cache.rows == 100
    ids = np.arange(250, 300)
    assert not cache.get("v_embed", ids, ids)[1].any()
    v, q = embeddings(ids)
    cache.put(ids, ids, v, q)
    for part, wanted in (("v_embed", v), ("q_embed", q)):
        found, held = cache.get(part, ids[::-1], ids[::-1])
        assert held.all()
        np.testing.assert_array_equal(found, wanted[::-1])
        found[:] = 0  # a copy
    np.testing.assert_array_equal(cache.get("v_embed", ids, ids)[0], v)


def test_another_id_or_another_place_is_something_else() -> None:
    cache = EmbeddingCache(100 * ROW_BYTES, 3, 2, 1000)
    ids = np.arange(10)
    cache.put(ids, ids + 7, *embeddings(ids))
    assert not cache.get("v_embed", ids + 100, ids + 7)[1].any()
    assert not cache.get("v_embed", ids, ids)[1].any()
    assert cache.get("v_embed", ids, ids + 7)[1].all()


def test_of_those_that_share_a_row_the_last_stays_whole() -> None:
    cache = EmbeddingCache(10 * ROW_BYTES, 3, 2, 20)
    ids = np.array([3, 13, 3, 23, 4, 4])
    cache.put(ids, ids, *embeddings(ids))
    found, held = cache.get("v_embed", ids, ids)
    assert held.tolist() == [False, False, False, True, True, True]
    assert found[held][:, 0].tolist() == [23, 4, 4]
    assert cache.get("q_embed", ids, ids)[0][held][:, 0].tolist() == [-23, -4, -4]


def test_who_may_be_live_is_not_pushed_out() -> None:
    cache = EmbeddingCache(10 * ROW_BYTES, 3, 2, 25)

    def put(*numbers: int) -> list[int]:
        """Put these; which of all are here then."""
        ids = np.array(numbers)
        cache.put(ids, ids, *embeddings(ids))
        every = np.arange(100)
        found, held = cache.get("v_embed", every, every)
        np.testing.assert_array_equal(found[held], embeddings(every[held])[0])
        return every[held].tolist()

    assert put(3, 4) == [3, 4]
    assert not cache.has_room(np.array([13, 24]))
    assert put(13, 24, 5) == [3, 4, 5]
    assert cache.has_room(np.array([13, 28, 34]))
    assert put(24, 33) == [4, 5, 33], "3 is gone once 28 was added"
    moved = np.array([33])
    cache.put(moved, moved + 1000, *embeddings(moved))
    assert cache.get("v_embed", moved, moved + 1000)[1].all()
    assert EmbeddingCache(1 << 20, 3, 2, 25).rows == 25, "more are of no use"


def test_there_is_room_for_one() -> None:
    cache = EmbeddingCache(1, 3, 0, 1)
    assert cache.rows == 1
    ids = np.arange(5)
    cache.put(ids, ids, embeddings(ids)[0], np.empty((5, 0), np.float32))
    assert cache.get("v_embed", ids, ids)[1].tolist() == [False] * 4 + [True]


def test_threads_never_see_half_an_entry() -> None:
    cache = EmbeddingCache(50 * ROW_BYTES, 3, 2, 50)
    wrong: list[int] = []
    done = threading.Event()

    def work(seed: int) -> None:
        draw = np.random.default_rng(seed)
        for _ in range(300):
            ids = draw.integers(0, 200, 40)
            found, held = cache.get("v_embed", ids, ids)
            wrong.extend(ids[held][(found[held] != ids[held][:, None]).any(axis=1)].tolist())
            cache.put(ids, ids, *embeddings(ids))
        done.set()

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert done.is_set()
    assert not wrong


# ---------------------------------------------------------------- in a buffer


def fill(buffer: ExperienceBuffer, first: int, n: int) -> None:
    """Experiences whose embeddings tell their ids."""
    v, q = embeddings(np.arange(first, first + n))
    buffer.add_many({"v_embed": v + 1, "q_embed": q - 1})


def check(batch: Any) -> None:
    v, q = embeddings(batch.ids)
    np.testing.assert_array_equal(batch.v_embed, v + 1)
    np.testing.assert_array_equal(batch.q_embed, q - 1)


def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Collects how many payloads each look at the storage wanted."""
    found: list[int] = []
    verified = PinnedExperiences._verified

    def counting(self: PinnedExperiences, which: NDArray[np.int64]) -> Any:
        found.append(len(which))
        return verified(self, which)

    monkeypatch.setattr(PinnedExperiences, "_verified", counting)
    return found


@pytest.mark.parametrize("rows", [0, 7, 40, 1000])
def test_a_batch_is_the_same_with_and_without(rows: int, tmp_path: Path) -> None:
    settings: Any = {**SETTINGS, "max_size": 60, "sampling": {"cache_bytes": rows * ROW_BYTES}}
    with ExperienceBuffer.open(tmp_path / "memory", seed=0, **settings) as buffer:
        for first in range(0, 200, 20):
            fill(buffer, first, 20)
            for _ in range(3):
                check(buffer.sample(32))
        check(buffer.sample(20, replace=False, where=lambda live: live.id % 3 == 0))
        buffer.save_snapshot()
        check(buffer.sample(64))


def test_what_is_held_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings: Any = {**SETTINGS, "sampling": {"cache_bytes": 1 << 20}}
    with ExperienceBuffer.open(tmp_path / "memory", **settings) as buffer:
        fill(buffer, 0, 50)
        check(buffer.sample(50, replace=False))
        looked = reads(monkeypatch)
        for _ in range(5):
            check(buffer.sample(64))
        assert looked == []
        fill(buffer, 50, 1)
        check(buffer.sample(51, replace=False))
        assert set(looked) == {1}


def test_one_look_at_the_storage_serves_both_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ExperienceBuffer.open(tmp_path / "memory", **SETTINGS) as buffer:
        fill(buffer, 0, 50)
        batch = buffer.sample(16)
        pin: Pin | None = batch.experiences._pin
        assert pin is not None
        calls: list[int] = []
        read_many = pin.read_many
        monkeypatch.setattr(pin, "read_many", lambda at: calls.append(len(at)) or read_many(at))
        check(batch)
        assert batch.v_embed is batch.v_embed
        assert [one.id for one in batch] == batch.ids.tolist()
        assert calls == [16]
