"""Ctrl-C, or another signal handler that raises, in the middle of a call.

Python runs signal handlers in the main thread, when it enters a function and when a builtin
returns. So a profile function that raises at the n-th such event is a signal at that very instant,
and all instants can be tried one by one.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

import numpy as np
import pytest

from expbuf_core import Experience, ExperienceBuffer, commit
from expbuf_core.errors import BufferClosed, ReentrantCall
from expbuf_core.native import native

CODE = tuple(f"{Path(__file__).parents[2]}/{name}/" for name in ("expbuf_core", "plugins"))
DIM = 4
LONG = os.environ.get("EXPBUF_LONG", "") not in ("", "0")
SMALL = {"initial_bytes": 1 << 14, "segment_bytes": 1 << 14}  # many logs are given up

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
        "persistence": {"backend": backend, "file": SMALL} if backend == "file" else backend,
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


OPS = {
    "add": lambda b, n: b.add(experience(n)),
    "add_many": lambda b, n: b.add_many([experience(n), experience(n + 1)]),
    "priorities": lambda b, n: b.update_priorities(b.ids()[:1], [1.0]),
    "outcome": lambda b, n: b.record_outcome(b.ids()[:1], success=True),
    "remove": lambda b, n: b.remove(b.ids()[:1]),
    "sync": lambda b, n: b.sync(),
    "snapshot": lambda b, n: b.save_snapshot(),
}


def from_another_thread(work: Callable[[], object]) -> None:
    failed: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as exc:
            failed.append(exc)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(10)
    assert not thread.is_alive(), "hangs"
    assert not failed, repr(failed)


def instants(op: str, rng: np.random.Generator) -> Iterator[int]:
    """Which instants to try: all of them in a long run."""
    if op in ("sync", "snapshot"):  # grow as they are interrupted
        yield from np.sort(
            rng.choice(np.arange(1, 900), 600 if LONG else 40, replace=False)
        ).tolist()
        return
    at, step = 0, 25 if op == "close" else 9  # each is another buffer
    while True:
        at += 1 if LONG else int(rng.integers(1, step))
        yield at


@pytest.mark.timeout(900)
@pytest.mark.parametrize("durability", ["sync", "os"])
@pytest.mark.parametrize("backend", ["file", "lmdb", "memory"])
@pytest.mark.parametrize("op", OPS)
def test_writing_goes_on_after_an_interrupt(
    folder: Path, op: str, backend: str, durability: str, rng: np.random.Generator
) -> None:
    """No lock stays held, nobody hangs, and what was acknowledged is there."""
    if backend == "memory" and durability == "sync":
        durability = "group"
    path = None if backend == "memory" else folder
    with ExperienceBuffer.open(path, **{**options(backend), "durability": durability}) as buffer:
        buffer.add_many([experience(n) for n in range(8)])
        for at in instants(op, rng):
            with contextlib.suppress(Interrupt), signal_at(at, interrupt) as signal:
                OPS[op](buffer, 10 * at)
            # Another thread first: it cannot know that what this one holds is stale.
            from_another_thread(partial(buffer.add, experience(10 * at + 5)))
            new = buffer.add(experience(10 * at + 6))
            assert buffer.get(new).answer == str(10 * at + 6)
            ids = buffer.ids().tolist()
            assert ids == sorted(set(ids))
            if not signal.came:
                break
        expected = contents(buffer)
    if path is not None:
        with ExperienceBuffer.open(path) as again:
            assert contents(again) == expected


@pytest.mark.parametrize("code", [native, None], ids=["native", "python"])
def test_a_handler_that_adds_in_the_middle_of_an_add_is_told(
    folder: Path, code: ModuleType | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not: hangs for ever. In the middle of native code there is no handler."""
    monkeypatch.setattr(commit, "native", code)
    outcomes: list[str] = []
    with ExperienceBuffer.open(folder, **options("file")) as buffer:
        buffer.add(experience(0))

        def handler() -> None:
            def inner() -> None:
                try:
                    buffer.add(experience(1))
                    outcomes.append("added")
                except ReentrantCall:
                    outcomes.append("told")

            inner()

        for at in range(1, 3000):
            with signal_at(at, handler) as signal:
                buffer.add(experience(10 * at))
            if not signal.came:
                break
    assert set(outcomes) == {"added", "told"} if code is None else {"added"}


CALLS = {
    "add": OPS["add"],
    "priorities": OPS["priorities"],
    "submit": lambda b, n: b.submit(experience(n)).result(10),
    "search": lambda b, n: b.search_index(v_embed=vector(n), k=3),
    "sample": lambda b, n: b.sample(4).v_embed,
    "sync": OPS["sync"],
    "snapshot": OPS["snapshot"],
    "stats": lambda b, n: b.stats(),
}


def closing(buffer: Callable[[], ExperienceBuffer], outcomes: list[str]) -> Callable[[], None]:
    """A handler that closes the buffer there is then, and notes what came of it."""

    def handler() -> None:
        def inner() -> None:
            try:
                buffer().close()
                outcomes.append("closed")
            except ReentrantCall:
                outcomes.append("told")

        inner()

    return handler


@pytest.mark.timeout(900)
@pytest.mark.parametrize("backend", ["file", "lmdb"])
@pytest.mark.parametrize("call", CALLS)
def test_a_handler_that_closes_in_the_middle_of_a_call_is_told(
    folder: Path, call: str, backend: str, rng: np.random.Generator
) -> None:
    """Nothing is closed then, and the call goes on. Before and behind it, the buffer is closed."""
    outcomes: list[str] = []
    buffer = ExperienceBuffer.open(folder, **options(backend))

    handler = closing(lambda: buffer, outcomes)
    for at in instants(call, rng):
        if outcomes[-1:] == ["closed"]:
            buffer = ExperienceBuffer.open(folder, **options(backend))
            assert buffer.recovery.clean
        buffer.add_many([experience(n) for n in range(8)])
        with signal_at(at, handler) as signal:
            try:
                CALLS[call](buffer, 10 * at)
            except BufferClosed:
                assert outcomes[-1] == "closed"
        if outcomes[-1:] != ["closed"]:
            before = buffer.lsn
            buffer.add(experience(1))
            assert buffer.lsn == before + 1  # no log was given up
        if not signal.came:
            break
    buffer.close()
    assert "told" in outcomes
    assert set(outcomes) <= {"told", "closed"}


@pytest.mark.timeout(900)
@pytest.mark.parametrize("backend", ["file", "lmdb"])
def test_a_handler_that_closes_while_it_is_being_closed_is_told(
    folder: Path, backend: str, rng: np.random.Generator
) -> None:
    outcomes: list[str] = []

    handler = closing(lambda: buffer, outcomes)
    for n, at in enumerate(instants("close", rng)):
        buffer = ExperienceBuffer.open(folder, **options(backend))
        assert n == 0 or buffer.recovery.clean
        buffer.add(experience(at))
        with signal_at(at, handler) as signal:
            buffer.close()
        if not signal.came:
            break
    assert "told" in outcomes


@pytest.mark.timeout(900)
@pytest.mark.parametrize("durability", ["sync", "group"])
@pytest.mark.parametrize("backend", ["file", "lmdb"])
def test_closing_that_is_interrupted(
    folder: Path, backend: str, durability: str, rng: np.random.Generator
) -> None:
    """It may be called again, and nothing hangs or is lost; at "sync", beside another one."""
    other = ExperienceBuffer.open(folder, **options(backend)) if durability == "sync" else None
    threads = threading.active_count()
    expected: list[str] = []
    for at in instants("close", rng):
        buffer = ExperienceBuffer.open(folder, **{**options(backend), "durability": durability})
        assert [answer for _, answer, _, _ in contents(buffer)] == expected
        buffer.add(experience(at))
        expected = [*expected, str(at)][-8:]
        with contextlib.suppress(Interrupt), signal_at(at, interrupt) as signal:
            buffer.close()
        buffer.close()
        with pytest.raises(BufferClosed):
            buffer.add(experience(0))
        assert threading.active_count() == threads
        if not signal.came:
            break
    if other is not None:
        other.close()
    assert at > 50


@pytest.mark.timeout(900)
def test_closing_after_an_interrupt_inside_of_pythons_own_locks(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when `SystemExit` of a handler ends an add, and `with` closes the buffer."""
    settings = {**options("file"), "durability": "group", "group_interval_ms": 60_000}
    with ExperienceBuffer.open(folder, **settings) as buffer:
        buffer.add(experience(0))  # the flusher has started
    monkeypatch.setattr(f"{__name__}.CODE", (threading.__file__,))
    for at in range(1, 20):
        buffer = ExperienceBuffer.open(folder, **settings)
        buffer.add(experience(1))
        with contextlib.suppress(Interrupt), signal_at(at, interrupt) as signal:
            buffer.add(experience(2))
        from_another_thread(buffer.close)
        if not signal.came:
            break
    assert not signal.came
