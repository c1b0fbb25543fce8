"""Several replicas of one folder, deaths and failed syncs among them, in random order; a model.

The deaths are the flags that a dead process leaves in the control page, so that hundreds of them
fit into a second. (`test_kill_storm` kills real processes.) What this finds are replicas that
believe in a file that another one has given up, emptied or deleted.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from expbuf_core import Experience, ExperienceBuffer
from expbuf_core import control as c
from expbuf_core.errors import ExpbufError
from expbuf_core.reindexing import reindex
from expbuf_core.testing.crash import scratch_folder
from expbuf_core.verification import verify

LONG = os.environ.get("EXPBUF_LONG", "") not in ("", "0")
SEEDS = 400 if LONG else 8
STEPS = 120
WEIGHTS = {
    "add": 40,
    "remove": 10,
    "snapshot": 6,
    "read": 20,
    "sync": 3,
    "reopen": 3,
    "reembed": 2,
    "reindex": 3,
    "appender dies": 4,
    "flusher dies": 2,
    "flush fails": 3,
}
FLAGS = {
    "appender dies": c.APPENDING,
    "flusher dies": c.FLUSHING,
    "flush fails": c.FLUSH_FAILED,
}
STORAGE: dict[str, dict[str, Any]] = {
    "file": {"file": {"initial_bytes": 1 << 14, "segment_bytes": 1 << 14}},
    "rename": {"file": {"commit": "rename", "initial_bytes": 1 << 14}},
    "lmdb": {"backend": "lmdb"},
}


def config(storage: str, durability: str) -> dict[str, Any]:
    return {
        "max_size": 150,
        "embedding": {"visual_dim": 4, "question_dim": 4},
        "durability": durability,
        "group_interval_ms": 60_000,
        "index": {"backend": "exact", "builder": "off"},
        "snapshot": {"every_ops": 1_000_000},
        "persistence": STORAGE[storage],
    }


class Scene:
    """Three buffers on one folder, and what must be in it."""

    def __init__(self, folder: Path, settings: dict[str, Any], seed: int) -> None:
        self.folder = folder
        self.rng = random.Random(seed)
        self._open = lambda: ExperienceBuffer.open(folder, config=settings)
        self.buffers = [self._open() for _ in range(3)]
        self.model: dict[int, str] = {}
        self._serial = self._embedded = 0
        self._max_size = settings["max_size"]

    def vector(self, serial: int) -> NDArray[np.float32]:
        """What the embedding is now."""
        return np.array([serial, self._embedded, 0, 0], np.float32)

    def add(self, buffer: ExperienceBuffer) -> None:
        for _ in range(self.rng.choice((1, 5))):
            self._serial += 1
            item = Experience(
                v_embed=self.vector(self._serial),
                q_embed=np.ones(4, np.float32),
                answer=str(self._serial),
                question="?" * self.rng.choice((0, 50, 900)),
            )
            self.model[buffer.add(item)] = str(self._serial)
        for id_ in sorted(self.model)[: -self._max_size]:
            del self.model[id_]

    def remove(self, buffer: ExperienceBuffer) -> None:
        count = min(len(self.model), self.rng.choice((1, 3, 20)))
        ids = self.rng.sample(sorted(self.model), count)
        assert buffer.remove(ids) == count
        for id_ in ids:
            del self.model[id_]

    def reembed(self, buffer: ExperienceBuffer) -> None:
        self._embedded += 1
        buffer.reembed(
            lambda items: {"v_embed": [self.vector(int(item.answer)) for item in items]},
            batch_size=self.rng.choice((7, 100)),
            name=str(self._embedded),
        )

    def reindex(self, _: ExperienceBuffer) -> None:
        fusion = self.rng.choice(("weighted_sum", "weighted_concat"))
        reindex(self.folder, config={"index": {"backend": "exact"}}, fusion=fusion)

    def reopen(self, buffer: ExperienceBuffer) -> None:
        buffer.close()
        self.buffers[self.buffers.index(buffer)] = self._open()

    def step(self) -> None:
        buffer = self.rng.choice(self.buffers)
        (what,) = self.rng.choices(list(WEIGHTS), list(WEIGHTS.values()))
        if what in FLAGS:
            buffer._session.control.words[FLAGS[what]] = 1
        elif what == "read":
            self.check(buffer)
        elif what == "snapshot":
            buffer.save_snapshot()
        elif what == "sync":
            buffer.sync()
        else:
            getattr(self, what)(buffer)

    def check(self, buffer: ExperienceBuffer) -> None:
        items = list(buffer)
        assert {item.id: item.answer for item in items} == self.model
        for item in items:
            assert np.array_equal(np.asarray(item.v_embed), self.vector(int(item.answer)))

    def end(self) -> None:
        for buffer in self.buffers:
            self.check(buffer)
            buffer.close()
        with self._open() as again:
            self.check(again)
            hits = again.search_index(v_embed=[1.0] * 4, q_embed=[1.0] * 4, k=10_000)
            assert sorted(int(id_) for id_ in hits.ids) == sorted(self.model)
            assert not [problem for problem in verify(self.folder) if problem.damage]


@pytest.mark.parametrize("durability", ["sync", "group", "os"])
@pytest.mark.parametrize("storage", list(STORAGE))
def test_changing_hands(storage: str, durability: str) -> None:
    for seed in range(SEEDS):
        home = scratch_folder()
        scene = Scene(home / "buffer", config(storage, durability), seed)
        try:
            for _ in range(STEPS):
                scene.step()
            scene.end()
        except BaseException as exc:
            raise AssertionError(f"seed {seed}: {exc}") from exc
        finally:
            for buffer in scene.buffers:
                with contextlib.suppress(ExpbufError):
                    buffer.close()
            shutil.rmtree(home)
