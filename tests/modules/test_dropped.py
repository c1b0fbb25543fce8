"""Buffers that nobody closes."""

from __future__ import annotations

import gc
import logging
import os
import threading
import weakref
from pathlib import Path

import numpy as np
import pytest

from expbuf_core import Experience, ExperienceBuffer, dropped, hookimpl
from expbuf_core.locks import opener
from expbuf_core.testing.faults import FaultyFileSystem
from expbuf_core.testing.processes import Child, in_child

SETTINGS = {"index": {"backend": "exact", "builder": "off"}}
TIMES = 30


def experience(n: int) -> Experience:
    return Experience(v_embed=np.full(4, n + 1.0), q_embed=np.full(4, 1.0), answer=str(n))


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture(autouse=True)
def _nothing_is_left_of_others() -> None:
    gc.collect()
    ExperienceBuffer.open(config=SETTINGS).close()
    gc.collect()


def test_a_cell_that_is_run_again_and_again(folder: Path) -> None:
    """`buffer = ExperienceBuffer.open(...)` drops the one before."""
    buffer = ExperienceBuffer.open(folder, config=SETTINGS)
    counts = []
    for n in range(TIMES):
        buffer = ExperienceBuffer.open(folder, config=SETTINGS)
        buffer.add(experience(n))
        gc.collect()
        counts.append((descriptors(), threading.active_count()))
    assert max(counts[3:]) <= max(counts[:3]), counts
    buffer.close()
    with ExperienceBuffer.open(folder, config=SETTINGS) as again:
        assert again.recovery.clean
        assert [e.answer for e in again] == [str(n) for n in range(TIMES)]


def test_it_is_not_closed_before(folder: Path) -> None:
    """Not by a finalizer, which runs in the middle of anything; by the next opening."""
    buffer = ExperienceBuffer.open(folder, config=SETTINGS)
    buffer.add(experience(1))
    lock = next((folder / "locks").glob("open*"))
    del buffer
    gc.collect()
    assert opener(lock) == os.getpid()
    ExperienceBuffer.open(config=SETTINGS).close()
    assert opener(lock) is None


class Trainer:
    """Observes its own buffer: the session refers to the plugin, and that to the buffer."""

    def __init__(self, folder: Path, backend: str = "file") -> None:
        self.buffer = ExperienceBuffer.open(
            folder, config=SETTINGS, persistence=backend, plugins=[self]
        )

    @hookimpl
    def expbuf_on_committed(self) -> None: ...


def test_of_a_cycle(folder: Path) -> None:
    before = descriptors()
    gone = []
    for n in range(3):
        trainer = Trainer(folder)
        trainer.buffer.add(experience(n))
        gone.append(weakref.ref(trainer))
        del trainer
        gc.collect()
    with ExperienceBuffer.open(folder, config=SETTINGS) as buffer:
        assert buffer.recovery.clean
        assert len(buffer) == 3
    gc.collect()
    assert descriptors() == before
    assert [ref() for ref in gone] == [None] * 3


@pytest.mark.parametrize("backend", ["file", "lmdb"])
def test_of_a_cycle_that_lags(folder: Path, backend: str, caplog: pytest.LogCaptureFixture) -> None:
    """The collector calls every finalizer of a cycle before the session is closed.

    What closing reads the log by has to be open all the same.
    """
    trainer = Trainer(folder, backend)
    with ExperienceBuffer.open(folder, config=SETTINGS) as other:
        trainer.buffer.add(experience(0))
        other.add(experience(1))
        assert len(trainer.buffer) == 2
        assert trainer.buffer.get(1).answer == "1"
        other.save_snapshot()  # in the next log file
        other.add(experience(2))
    before = descriptors()
    gone = weakref.ref(trainer)
    del trainer
    gc.collect()
    with ExperienceBuffer.open(folder, config=SETTINGS) as buffer:
        assert buffer.recovery.clean
        assert len(buffer) == 3
    assert descriptors() < before
    assert gone() is None
    assert not caplog.records


def test_one_in_memory_goes_at_once() -> None:
    buffer = ExperienceBuffer.open(config=SETTINGS)
    buffer.add(experience(0))
    session = weakref.ref(buffer._live())
    del buffer
    gc.collect()
    assert session() is None


def test_opening_does_not_wait_for_what_takes_long(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dropped, "_WAIT_S", 0.01)
    buffer = ExperienceBuffer.open(folder, config=SETTINGS)
    buffer.add(experience(0))
    working = buffer._live().upkeep._working
    with working:  # as during a build
        del buffer
        gc.collect()
        other = ExperienceBuffer.open(folder, config=SETTINGS)
        other.add(experience(1))
        (closing,) = (each for each in threading.enumerate() if each.name == "expbuf-drop")
    closing.join(30)
    assert len(other) == 2
    other.close()
    with ExperienceBuffer.open(folder, config=SETTINGS) as again:
        assert again.recovery.clean
        assert len(again) == 2


def test_what_was_submitted_is_written_first(folder: Path) -> None:
    buffer = ExperienceBuffer.open(folder, config=SETTINGS)
    futures = [buffer.submit(experience(n)) for n in range(50)]
    del buffer
    assert len({future.result(30) for future in futures}) == 50
    with ExperienceBuffer.open(folder, config=SETTINGS) as again:
        assert len(again) == 50


def test_a_child_that_drops_it_leaves_the_parent_alone(folder: Path) -> None:
    buffer = [ExperienceBuffer.open(folder, config=SETTINGS)]
    buffer[0].add(experience(0))

    def child(_: Child) -> None:
        told: list[logging.LogRecord] = []
        handler = logging.Handler(logging.INFO)
        handler.emit = told.append  # type: ignore[method-assign]
        logging.getLogger("expbuf").addHandler(handler)
        logging.getLogger("expbuf").setLevel(logging.INFO)
        buffer.clear()
        gc.collect()
        ExperienceBuffer.open(config=SETTINGS).close()
        assert not told, "there was nothing to close"

    in_child(child)
    buffer[0].add(experience(1))
    assert len(buffer[0]) == 2
    buffer[0].close()
    with ExperienceBuffer.open(folder, config=SETTINGS) as again:
        assert again.recovery.clean


def test_a_child_that_has_used_it_and_drops_it(folder: Path) -> None:
    buffer = [ExperienceBuffer.open(folder, config=SETTINGS)]

    def child(_: Child) -> None:
        buffer[0].add(experience(0))
        before = descriptors()
        buffer.clear()
        gc.collect()
        ExperienceBuffer.open(config=SETTINGS).close()
        assert descriptors() < before

    in_child(child)
    buffer[0].add(experience(1))
    assert len(buffer[0]) == 2
    buffer[0].close()


def test_closing_that_fails_is_told(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    files = FaultyFileSystem()
    buffer = ExperienceBuffer.open(folder, config=SETTINGS, durability="os", filesystem=files)
    buffer.add(experience(0))
    files.fail("fdatasync", "fsync", times=None)
    del buffer
    gc.collect()
    with caplog.at_level(logging.WARNING, "expbuf"):
        ExperienceBuffer.open(config=SETTINGS).close()
    assert "was dropped without close; closing it failed" in caplog.text
    with ExperienceBuffer.open(folder, config=SETTINGS) as again:
        assert len(again) == 1
