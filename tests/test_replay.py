"""Replay as an iterable: one process, forked and spawned workers, and a stand-in for torch's."""

from __future__ import annotations

import multiprocessing
import pickle
import sys
import types
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from expbuf_core import ExperienceBuffer, InvalidExperience, NotEnoughExperiences
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


def test_torch_itself(tmp_path: Path) -> None:
    data = pytest.importorskip("torch.utils.data")
    with filled(tmp_path / "memory") as buffer:
        batches = ReplayBatches(buffer, 16, length=6, seed=0)
        loader = data.DataLoader(batches, batch_size=None, num_workers=2)
        for _ in range(2):
            found = [tuple(batch["ids"].tolist()) for batch in loader]
            assert len(set(found)) == 6
