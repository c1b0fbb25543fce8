"""Ctrl-C, or another signal handler that raises, in the middle of a call.

Python runs signal handlers in the main thread, when it enters a function and when a builtin
returns. So a profile function that raises at the n-th such event is a signal at that very instant,
and all instants can be tried one by one.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest

from expbuf_core import Experience, ExperienceBuffer
from expbuf_core.errors import ReentrantCall

CODE = tuple(f"{Path(__file__).parents[2]}/{name}/" for name in ("expbuf_core", "plugins"))
DIM = 4

# What comes while Python itself calls (a generator that is closed), it prints and drops.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


class Interrupt(BaseException):
    """As KeyboardInterrupt is: no Exception."""


class Signal:
    """Calls a handler at the n-th instant inside this project's code."""

    def __init__(self, at: int, handler: Callable[[], None]) -> None:
        self._left = at
        self._handler = handler

    def __call__(self, frame: FrameType, event: str, arg: Any) -> None:
        file = frame.f_code.co_filename
        if event not in ("call", "c_return") or not file.startswith(CODE):
            return
        if frame.f_code.co_name == "__del__":
            return  # what it raises is printed and dropped
        self._left -= 1
        if self._left == 0:
            sys.setprofile(None)
            self._handler()

    @property
    def came(self) -> bool:
        return self._left <= 0


@contextlib.contextmanager
def signal_at(at: int, handler: Callable[[], None]) -> Iterator[Signal]:
    signal = Signal(at, handler)
    sys.setprofile(signal)
    try:
        yield signal
    finally:
        sys.setprofile(None)


def interrupt() -> None:
    raise Interrupt


def vector(n: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.random.default_rng(n).standard_normal(DIM, dtype=np.float32)


def experience(n: int) -> Experience:
    return Experience(v_embed=vector(n), q_embed=vector(n), answer=str(n))


def options(backend: str) -> dict[str, Any]:
    return {
        "persistence": backend,
        "index": {"backend": "exact", "builder": "off"},
        "durability": "os",
        "max_size": 8,
        "lock_timeout_s": 2,
    }


def contents(buffer: ExperienceBuffer) -> list[tuple[int, Any, float, int]]:
    return [(e.id or 0, e.answer, float(e.priority or 0), e.retrieval_count or 0) for e in buffer]


def write_something(buffer: ExperienceBuffer, n: int) -> None:
    """What another process does meanwhile: some of each kind of operation, and evictions."""
    ids = buffer.add_many([experience(n + i) for i in range(3)])
    buffer.add(experience(n + 3))
    buffer.update_priorities(ids[:2], [n + 1.0, n + 2.0])
    buffer.record_outcome(ids, success=True)
    buffer.remove(ids[-1:])


@pytest.mark.parametrize("backend", ["file", "lmdb"])
def test_reading_goes_on_after_an_interrupt(folder: Path, backend: str) -> None:
    with (
        ExperienceBuffer.open(folder, **options(backend)) as writer,
        ExperienceBuffer.open(folder, **options(backend)) as reader,
    ):
        for at in range(1, 2000):
            write_something(writer, 10 * at)
            if at % 16 == 0:
                writer.save_snapshot()  # what an interrupted replica begins from
            with contextlib.suppress(Interrupt), signal_at(at, interrupt) as signal:
                reader.search_index(v_embed=vector(1), k=3)
            assert contents(reader) == contents(writer), f"interrupted at instant {at}"
            found = reader.search_index(v_embed=vector(10 * at), q_embed=vector(10 * at), k=8)
            assert sorted(hit.id for hit in found) == writer.ids().tolist()
            assert found[0].experience.answer == str(10 * at)
            reader.sample(4)
            if not signal.came:
                break
        assert 50 < at < 1999  # all instants were tried


def test_a_buffer_in_memory_outlives_an_interrupt() -> None:
    with ExperienceBuffer.open(None, **options("memory")) as buffer:
        for at in range(1, 2000):
            buffer.add_many([experience(10 * at + i) for i in range(3)])
            buffer.submit(experience(10 * at + 3)).result()  # what another thread adds, waits
            expected = [str(10 * n + i) for n in (at - 1, at) for i in range(4)][-8:]
            with contextlib.suppress(Interrupt), signal_at(at, interrupt) as signal:
                buffer.search_index(v_embed=vector(1), k=3)
            assert [answer for _, answer, _, _ in contents(buffer)][-4:] == expected[-4:]
            found = buffer.search_index(v_embed=vector(10 * at), q_embed=vector(10 * at), k=8)
            assert [hit.id for hit in found if hit.experience.answer == str(10 * at)]
            assert sorted(hit.id for hit in found) == buffer.ids().tolist()
            if not signal.came:
                break
        assert 50 < at < 1999


def test_a_buffer_in_memory_begins_anew_from_where_its_log_was_dropped() -> None:
    with ExperienceBuffer.open(None, **options("memory")) as buffer:
        ids = buffer.add_many([experience(i) for i in range(6)])
        for i in range(10_001):  # so many operations are kept
            buffer.update_priorities(ids[:1], [float(i)])
        buffer._session.upkeep._do()
        buffer.add(experience(6))
        before = contents(buffer)
        buffer._session.replica.broken = True
        assert contents(buffer) == before
        assert buffer.search_index(v_embed=vector(5), q_embed=vector(5), k=1)[0].id == 5


def test_a_handler_that_reads_in_the_middle_of_a_read_is_told(folder: Path) -> None:
    told: list[str] = []
    with (
        ExperienceBuffer.open(folder, **options("file")) as writer,
        ExperienceBuffer.open(folder, **options("file")) as reader,
    ):

        def handler() -> None:
            try:
                len(reader)
            except ReentrantCall as exc:
                told.append(str(exc))

        for at in range(1, 2000):
            writer.add_many([experience(at)])
            with signal_at(at, handler) as signal:
                reader.search_index(v_embed=vector(1), k=3)
            assert reader.ids().tolist() == writer.ids().tolist()
            if not signal.came:
                break
    assert told
    assert "signal handler" in told[0]
