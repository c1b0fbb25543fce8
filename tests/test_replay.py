"""Replay as an iterable: one process, forked and spawned workers, and a stand-in for torch's."""

from __future__ import annotations

import json
import multiprocessing
import pickle
import sys
import types
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from expbuf_core import (
    ConfigError,
    ExperienceBuffer,
    InvalidExperience,
    NotEnoughExperiences,
    SampleLimitError,
    replay,
)
from expbuf_core.replay import COLUMNS, ReplayBatches

SETTINGS: dict[str, Any] = {"index": {"backend": "exact", "builder": "off"}, "durability": "os"}


def filled(path: Path | None, n: int = 200) -> ExperienceBuffer:
    draw = np.random.default_rng(0)
    buffer = ExperienceBuffer.open(path, **SETTINGS)
    v, q = draw.standard_normal((2, n, 8), dtype=np.float32)
    buffer.add_many({"v_embed": v, "q_embed": q, "confidence": draw.random(n)})
    return buffer


def ids_only(batch: Any) -> list[int]:
    return batch.ids.tolist()  # type: ignore[no-any-return]


def work(batches: ReplayBatches, pipe: Any) -> None:
    pipe.send([batches[i] for i in range(3)])
    pipe.close()


def drawn_in(kind: str, batches: ReplayBatches, processes: int) -> list[list[int]]:
    context: Any = multiprocessing.get_context(kind)
    found = []
    for _ in range(processes):
        mine, theirs = context.Pipe(duplex=False)
        process = context.Process(target=work, args=(batches, theirs))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            process.start()
        theirs.close()
        found.append([id_ for batch in mine.recv() for id_ in batch])
        process.join(60)
        assert process.exitcode == 0
    return found


def test_batches_are_arrays() -> None:
    with filled(None) as buffer:
        batches = ReplayBatches(buffer, 32, length=4, seed=1)
        found = list(batches)
    assert len(found) == len(batches) == 4
    for batch in found:
        assert tuple(batch) == COLUMNS
        assert batch["ids"].shape == batch["is_weights"].shape == (32,)
        assert batch["v_embed"].shape == batch["q_embed"].shape == (32, 8)
        assert batch["v_embed"].dtype == np.float32
        assert np.isnan(batch["total_reward"]).all()


def test_the_same_seed_gives_the_same_batches() -> None:
    with filled(None) as buffer:
        first, again, other = (
            list(ReplayBatches(buffer, 16, length=5, seed=seed, transform=ids_only))
            for seed in (3, 3, 4)
        )
        assert first == again != other
        batches = ReplayBatches(buffer, 16, length=5, seed=3, transform=ids_only)
        assert list(batches) == first
        assert list(batches) != first, "the next epoch goes on"


def test_without_a_seed_the_buffer_decides() -> None:
    with filled(None) as buffer:
        batches = ReplayBatches(buffer, 16, length=2, transform=ids_only)
        assert list(batches) != list(batches)


def test_without_end() -> None:
    with filled(None) as buffer:
        batches = ReplayBatches(buffer, 8, seed=0)
        stream = iter(batches)
        assert len({tuple(next(stream)["ids"]) for _ in range(50)}) == 50
        with pytest.raises(TypeError, match="length"):
            len(batches)
        batches[10_000_000]


def test_by_number() -> None:
    with filled(None) as buffer:
        batches = ReplayBatches(buffer, 8, length=2, seed=0)
        batches[0], batches[1]
        for number in (2, -1):
            with pytest.raises(IndexError):
                batches[number]


def test_new_experiences_are_drawn() -> None:
    with filled(None, 1) as buffer:
        stream = iter(ReplayBatches(buffer, 64, seed=0, transform=ids_only))
        assert set(next(stream)) == {0}
        buffer.add_many({"v_embed": np.ones((9, 8)), "q_embed": np.ones((9, 8))})
        assert len(set(next(stream))) > 5


def test_what_sample_takes() -> None:
    with filled(None) as buffer:
        low = ReplayBatches(buffer, 64, length=1, where=lambda live: live.confidence < 0.5)
        (batch,) = low
        assert (batch["confidence"] < 0.5).all()
        (batch,) = ReplayBatches(buffer, 64, length=1, uniform=True, beta=1.0)
        assert (batch["is_weights"] == 1).all()


@pytest.mark.parametrize("kind", ["fork", "spawn"])
@pytest.mark.parametrize("seed", [None, 7])
def test_workers_draw_on_their_own(kind: str, seed: int | None, tmp_path: Path) -> None:
    with filled(tmp_path / "memory") as buffer:
        batches = ReplayBatches(buffer, 16, length=3, seed=seed, transform=ids_only)
        mine = [id_ for batch in batches for id_ in batch]
        found = [mine, *drawn_in(kind, batches, 2)]
        assert len({tuple(ids) for ids in found}) == 3, "two processes drew the same"
        assert set().union(*found) <= set(range(200))
        assert len(batches[0]) == 16


def test_pickled(tmp_path: Path) -> None:
    with filled(tmp_path / "memory") as buffer:
        batches = ReplayBatches(buffer, 16, length=3, seed=5, transform=ids_only)
        batches[0]
        copy = pickle.loads(pickle.dumps(batches))  # noqa: S301
        assert len(copy) == 3
        assert len(copy[0]) == 16
        copy._buffer.close()


def test_workers_of_a_data_loader(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their draws follow from torch's seeds, which differ by worker and epoch."""
    info = types.SimpleNamespace(id=0, seed=100)
    data = types.ModuleType("torch.utils.data")
    data.get_worker_info = lambda: info  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.data", data)

    def drawn(worker: int, seed: int) -> tuple[int, ...]:
        info.id, info.seed = worker, seed
        batches = ReplayBatches(buffer, 16, length=1, seed=0, transform=ids_only)
        return tuple(batches[0])

    with filled(None) as buffer:
        first = drawn(0, 100)
        assert drawn(0, 100) == first
        assert len({first, drawn(1, 101), drawn(0, 102), drawn(1, 103)}) == 4


def test_an_empty_buffer() -> None:
    with ExperienceBuffer.open(**SETTINGS) as buffer, pytest.raises(NotEnoughExperiences):
        next(iter(ReplayBatches(buffer, 4)))


def test_a_length_of_nothing() -> None:
    with filled(None, 2) as buffer, pytest.raises(InvalidExperience, match="length"):
        ReplayBatches(buffer, 4, length=0)


@pytest.mark.parametrize(
    "wrong",
    [
        {"length": "3"},
        {"length": 1.5},
        {"length": True},
        {"seed": -1},
        {"seed": "x"},
        {"seed": 1.5},
        {"samples_per_insert": "x"},
        {"insert_wait_s": "x", "samples_per_insert": 1},
        {"insert_wait_s": None, "samples_per_insert": True},
        {"transform": 5},
    ],
)
def test_arguments_are_checked_before_the_first_draw(wrong: dict[str, Any]) -> None:
    with filled(None, 2) as buffer, pytest.raises(InvalidExperience, match="must be a"):
        ReplayBatches(buffer, 4, **wrong)


def test_numbers_may_be_numpys() -> None:
    with filled(None, 8) as buffer:
        few = ReplayBatches(buffer, 4, length=np.int64(2), seed=np.uint8(1))
        assert len(few) == len(list(few)) == 2
        limited = ReplayBatches(buffer, 4, samples_per_insert=1e308)
        assert len(limited.draw()["ids"]) == 4


def test_torch_itself(tmp_path: Path) -> None:
    data = pytest.importorskip("torch.utils.data")
    with filled(tmp_path / "memory") as buffer:
        batches = ReplayBatches(buffer, 16, length=6, seed=0)
        loader = data.DataLoader(batches, batch_size=None, num_workers=2)
        for _ in range(2):
            found = [tuple(batch["ids"].tolist()) for batch in loader]
            assert len(set(found)) == 6


# ---------------------------------------------------------------- samples per insert


def add(buffer: ExperienceBuffer, n: int) -> None:
    buffer.add_many({"v_embed": np.ones((n, 8)), "q_embed": np.ones((n, 8))})


def drawn_until_the_limit(batches: ReplayBatches) -> int:
    drawn = 0
    while True:
        try:
            drawn += len(batches.draw())
        except SampleLimitError as exc:
            limit = exc
            break
    assert limit.drawn == drawn
    assert drawn <= limit.allowed < drawn + 16
    return drawn


def test_samples_per_insert() -> None:
    with filled(None, 100) as buffer:
        batches = ReplayBatches(
            buffer, 16, samples_per_insert=2, insert_wait_s=0, transform=ids_only
        )
        assert drawn_until_the_limit(batches) == 192  # of 200
        assert buffer.sample(512).ids.shape == (512,)  # of no concern to anybody else
        add(buffer, 3)
        with pytest.raises(SampleLimitError):
            batches.draw()  # 208, and 206 are allowed
        add(buffer, 1)
        assert len(batches.draw()) == 16


def test_evicted_experiences_were_added_all_the_same() -> None:
    with ExperienceBuffer.open(max_size=50, **SETTINGS) as buffer:
        add(buffer, 80)
        batches = ReplayBatches(
            buffer, 10, samples_per_insert=1, insert_wait_s=0, transform=ids_only
        )
        assert drawn_until_the_limit(batches) == 50, "what is gone at the beginning counts not"
        add(buffer, 30)
        assert [len(batches.draw()) for _ in range(3)] == [10, 10, 10]


def test_the_limit_may_be_configured() -> None:
    sampling = {"samples_per_insert": 0.5, "insert_wait_s": 0}
    with ExperienceBuffer.open(sampling=sampling, **SETTINGS) as buffer:
        add(buffer, 100)
        batches = ReplayBatches(buffer, 16, transform=ids_only)
        assert drawn_until_the_limit(batches) == 48  # of 50
        free = ReplayBatches(buffer, 16, samples_per_insert=np.inf, length=50)
        assert len(list(free)) == 50
        other = ReplayBatches(buffer, 16, samples_per_insert=1, transform=ids_only)
        assert drawn_until_the_limit(other) == 96


class Clock:
    """Time that passes only while somebody sleeps; something may happen meanwhile."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, happens: Any = lambda: None) -> None:
        self.now, self.slept, self.happens = 100.0, 0, happens
        monkeypatch.setattr(replay.time, "sleep", self.sleep)
        monkeypatch.setattr(replay.time, "monotonic", lambda: self.now)

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.now += seconds
        self.slept += 1
        self.happens()


def test_a_draw_beyond_the_limit_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    with filled(None, 16) as buffer:
        batches = ReplayBatches(buffer, 16, samples_per_insert=1, insert_wait_s=9)
        clock = Clock(monkeypatch, lambda: add(buffer, 1))
        batches.draw()
        assert clock.slept == 0
        batches.draw()
        assert clock.slept == 16
        assert buffer.total_added == 32


def test_what_is_added_begins_the_wait_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    with filled(None, 16) as buffer:
        batches = ReplayBatches(buffer, 16, samples_per_insert=1, insert_wait_s=9)
        batches.draw()
        left = [4]

        def now_and_then() -> None:
            if left[0] and clock.now > 100 + 8 * (5 - left[0]):
                left[0] -= 1
                add(buffer, 1)

        clock = Clock(monkeypatch, now_and_then)
        with pytest.raises(SampleLimitError, match="nothing was added for 9 s") as raised:
            batches.draw()
        assert 100 + 4 * 8 + 9 <= clock.now < 100 + 4 * 8 + 9 + 1
        assert (raised.value.drawn, raised.value.allowed) == (16, 20)


@pytest.mark.parametrize("kind", ["fork", "spawn"])
def test_workers_share_the_count(kind: str, tmp_path: Path) -> None:
    with filled(tmp_path / "memory", 100) as buffer:
        batches = ReplayBatches(
            buffer, 16, samples_per_insert=2, insert_wait_s=0, transform=ids_only
        )
        batches.draw()
        drawn_in(kind, batches, 2)
        state: Any = batches.state_dict()
        assert state["limit"]["drawn"] == 16 + 2 * 3 * 16
        drawn = 7 * 16
        while drawn + 16 <= 200:
            drawn += len(batches.draw())
        with pytest.raises(SampleLimitError):
            batches.draw()


def test_a_copy_that_is_no_child_counts_for_itself(tmp_path: Path) -> None:
    with filled(tmp_path / "memory", 100) as buffer:
        batches = ReplayBatches(
            buffer, 16, samples_per_insert=1, insert_wait_s=0, transform=ids_only
        )
        batches.draw()
        copy = pickle.loads(pickle.dumps(batches))  # noqa: S301
        assert drawn_until_the_limit(copy) == 96
        assert batches.state_dict()["limit"]["drawn"] == 16
        copy._buffer.close()


@pytest.mark.parametrize("bad", [0, -1, float("nan")])
def test_a_limit_that_is_none(bad: float) -> None:
    with filled(None, 2) as buffer:
        with pytest.raises(InvalidExperience, match="samples_per_insert"):
            ReplayBatches(buffer, 4, samples_per_insert=bad)
        with pytest.raises(InvalidExperience, match="insert_wait_s"):
            ReplayBatches(buffer, 4, samples_per_insert=1, insert_wait_s=-1)


# ---------------------------------------------------------------- going on


@pytest.mark.parametrize("seed", [None, 3])
def test_a_state_is_gone_on_from(seed: int | None, tmp_path: Path) -> None:
    def batches(buffer: ExperienceBuffer) -> ReplayBatches:
        return ReplayBatches(
            buffer,
            16,
            seed=seed,
            length=5,
            transform=ids_only,
            samples_per_insert=1,
            insert_wait_s=0,
        )

    with filled(tmp_path / "memory") as buffer:
        first = batches(buffer)
        for _ in first:
            pass
        state = json.loads(json.dumps(first.state_dict()))
        wanted = list(first)
    with ExperienceBuffer.open(tmp_path / "memory", **SETTINGS) as buffer:
        again = batches(buffer)
        again.load_state_dict(state)
        assert list(again) == wanted
        assert again.state_dict()["limit"] == {"begin": 0, "drawn": 160}
        with pytest.raises(SampleLimitError):
            list(again)


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"rng": None, "limit": None},
        {"rng": {"bit_generator": "os"}, "limit": None},
        {"rng": {}, "limit": {"begin": 0}},
        None,
    ],
)
def test_a_state_that_is_none(state: Any) -> None:
    with filled(None, 2) as buffer, pytest.raises(ConfigError):
        ReplayBatches(buffer, 4, seed=0).load_state_dict(state)
