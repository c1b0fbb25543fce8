"""What is done in the background: its threads and processes, and what they leave in memory."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from module_helpers import (
    OpenBuffer,
    Worker,
    add_all,
    answers,
    columns,
    expected,
    experience,
    finds,
    run_forked,
)

from expbuf_core import ExperienceBuffer, builder_processes
from expbuf_core.verification import verify
from expbuf_file import layout

DEADLINE_S = 30


def threads(name: str) -> list[threading.Thread]:
    """Those that are alive."""
    return [thread for thread in threading.enumerate() if thread.name == name]


def run_together(*tasks: Callable[[], object]) -> None:
    """Each in a thread of its own, until all are done."""
    running = [threading.Thread(target=task) for task in tasks]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join(DEADLINE_S)
        assert not thread.is_alive(), "hangs"


# ---------------------------------------------------------------- threads


def test_without_a_thread_for_it_the_index_is_adopted_later(
    open_buffer: OpenBuffer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    buffer = open_buffer()
    add_all(buffer, range(40))
    with Worker(folder) as other:
        assert other("buffer.rebuild_index()")
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name == "expbuf-adopt":
            raise RuntimeError("can't start new thread")
        start(thread)

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        assert all(finds(buffer, i) for i in range(40))
        assert buffer.stats()["index"]["tail_rows"] == 40
    assert finds(buffer, 33)
    for thread in threads("expbuf-adopt"):
        thread.join(DEADLINE_S)
    assert buffer.stats()["index"]["tail_rows"] == 0


@pytest.mark.parametrize("refused", [False, True])
def test_threads_that_commit_at_once_begin_one_upkeep(
    open_buffer: OpenBuffer, monkeypatch: pytest.MonkeyPatch, refused: bool
) -> None:
    """With a lock of the caller's, several see at once that something is due."""
    buffer = open_buffer(lock=threading.Lock())
    upkeep = buffer._live().upkeep
    both, start = threading.Barrier(2), threading.Thread.start
    begun: list[threading.Thread] = []

    def is_due() -> bool:
        both.wait(DEADLINE_S)
        return True

    def start_slowly(thread: threading.Thread) -> None:
        if thread.name == "expbuf-upkeep":
            begun.append(thread)
            with contextlib.suppress(threading.BrokenBarrierError):
                both.wait(0.2)  # nobody comes who is made to wait outside
            if refused:
                raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(upkeep, "_is_due", is_due)
    monkeypatch.setattr(upkeep, "_do", lambda: None)
    monkeypatch.setattr(threading.Thread, "start", start_slowly)
    run_together(upkeep.after_commit, upkeep.after_commit)
    monkeypatch.undo()
    assert len(begun) == 1 or refused
    buffer.close()
    assert not [thread for thread in begun if thread.is_alive()]


def test_a_commit_that_a_close_overtakes_begins_no_upkeep(
    open_buffer: OpenBuffer, monkeypatch: pytest.MonkeyPatch
) -> None:
    buffer = open_buffer()
    upkeep = buffer._live().upkeep

    def close_meanwhile() -> bool:
        run_together(buffer.close)
        return True

    monkeypatch.setattr(upkeep, "_is_due", close_meanwhile)
    before = threads("expbuf-upkeep")
    upkeep.after_commit()
    assert threads("expbuf-upkeep") == before


# ---------------------------------------------------------------- buffers in memory

PAYLOAD = 10_000  # bytes of each


def grow(buffer: ExperienceBuffer, batches: int, n: int) -> None:
    """Add batches of large experiences, each with the upkeep that it makes due."""
    upkeep = buffer._live().upkeep
    upkeep.stop()  # its thread: all is done here
    for batch in range(batches):
        buffer.add_many([experience(n * batch + i, answer=str(i) * PAYLOAD) for i in range(n)])
        if upkeep._is_due():
            upkeep._do()


def test_a_buffer_in_memory_keeps_little_besides_what_lives(
    open_buffer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However large the experiences are, and however few operations they came in."""
    monkeypatch.setattr("expbuf_core.upkeep._MEMORY_BYTES", 2 * PAYLOAD)
    buffer = open_buffer.memory(max_size=8)
    grow(buffer, 12, 8)
    assert buffer._live().adapter.stats()["bytes"] < 4 * 8 * PAYLOAD
    assert answers(buffer) == [str(i) * PAYLOAD for i in range(8)]
    buffer.update_priorities(buffer.ids(), [float(i) for i in range(8)])
    assert buffer.sample(4).ids.min() >= 88


def test_what_lives_in_a_buffer_in_memory_is_not_looked_through_for_each_add(
    open_buffer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("expbuf_core.upkeep._MEMORY_BYTES", 2 * PAYLOAD)
    buffer = open_buffer.memory(max_size=64)
    grow(buffer, 8, 8)
    upkeep, times = buffer._live().upkeep, 0
    drop = upkeep._drop_dead

    def counted() -> None:
        nonlocal times
        times += 1
        drop()

    monkeypatch.setattr(upkeep, "_drop_dead", counted)
    grow(buffer, 32, 8)
    assert 3 <= times <= 5  # each time when as much has come as lives


def test_large_updates_of_a_buffer_in_memory_are_dropped(
    open_buffer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They have no payload, and lie in operations."""
    monkeypatch.setattr("expbuf_core.upkeep._MEMORY_BYTES", 2 * PAYLOAD)
    buffer = open_buffer.memory(max_size=1000)
    ids = buffer.add_many(columns(range(1000)))
    upkeep = buffer._live().upkeep
    upkeep.stop()
    upkeep._do()
    for n in range(100):
        buffer.update_priorities(ids, np.full(1000, float(n)))
        if upkeep._is_due():
            upkeep._do()
    assert buffer._live().adapter.stats()["operations"] < 50


# ---------------------------------------------------------------- builder processes

SLEEPING = [sys.executable, "-S", "-E", "-c", "import signal; signal.pause()"]


@pytest.fixture
def builders(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Pids of builders, which do nothing, and end with the test."""
    begun: list[int] = []
    spawn = builder_processes._spawn

    def spawn_another(command: list[str]) -> int:
        begun.append(spawn(SLEEPING))
        return begun[-1]

    monkeypatch.setattr(builder_processes, "_started", {})
    monkeypatch.setattr(builder_processes, "_spawn", spawn_another)
    yield begun
    for pid in begun:
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def end(pid: int) -> None:
    """Kill it and leave it a zombie, unless the thread of upkeep is as quick."""
    os.kill(pid, signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)


INDEX = {"backend": "exact", "builder": "process", "rebuild_every": 10}


def until(holds: Callable[[], bool]) -> None:
    """Wait for what another thread does."""
    deadline = time.monotonic() + DEADLINE_S
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_sessions_share_a_builder_and_leave_no_zombie(
    open_buffer: OpenBuffer, folder: Path, builders: list[int]
) -> None:
    for n in range(4):
        with open_buffer(index=INDEX) as buffer:
            add_all(buffer, range(20 * n, 20 * n + 20))
        assert len(builders) == 1
    with open_buffer(folder.with_name("another"), index=INDEX) as buffer:
        add_all(buffer, range(20))
    assert len(builders) == 2
    with open_buffer(index={**INDEX, "rebuild_every": 11}) as buffer:
        add_all(buffer, range(20))
        until(lambda: len(builders) == 3)  # one that builds otherwise
        for pid in builders:
            end(pid)
    for pid in builders:
        with pytest.raises(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)


def test_a_builder_that_ends_without_looking_is_followed_by_another(
    open_buffer: OpenBuffer, builders: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was about to end when the last commit came: nothing need come for another to start."""
    monkeypatch.setattr("expbuf_core.upkeep._AGAIN_S", 0.01)
    with open_buffer(index=INDEX) as buffer:
        add_all(buffer, range(20))
    with open_buffer(index=INDEX) as buffer:
        add_all(buffer, range(20, 40))
        assert len(builders) == 1
        end(builders[0])
        until(lambda: len(builders) > 1)


# ---------------------------------------------------------------- many short sessions


@pytest.mark.parametrize("ends", ["closed", "killed"])
@pytest.mark.parametrize("adds", [0, 1])
def test_short_sessions_leave_few_files(
    open_buffer: OpenBuffer,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    adds: int,
    ends: str,
) -> None:
    """Each leaves a log, and what it added may be live for long."""
    monkeypatch.setattr("expbuf_file.adapter._PIECES", 6)

    sizes = {"file": {"initial_bytes": 1 << 14, "segment_bytes": 1 << 20}}

    def session(n: int) -> None:
        buffer = open_buffer(persistence=sizes)
        add_all(buffer, range(n, n + adds))
        if ends == "closed":
            buffer.close()
        else:
            buffer._live().upkeep.stop()  # what is due is done by then

    with open_buffer() as buffer:
        add_all(buffer, range(3))
    most = 0
    for n in range(3, 18):
        if ends == "closed":
            session(n)
        else:
            assert run_forked(partial(session, n)) == 0
        most = max(most, len(layout.numbers(folder, layout.DATA)))
    assert most <= 6 + 4
    with open_buffer() as buffer:
        assert answers(buffer) == expected(range(3 + 15 * adds))
        assert all(finds(buffer, i) for i in range(3 + 15 * adds))
    assert not [problem for problem in verify(folder) if problem.damage]


def test_who_joins_leaves_the_files_to_the_first(
    open_buffer: OpenBuffer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("expbuf_file.adapter._PIECES", 2)
    for n in range(3):
        with open_buffer() as buffer:
            buffer.add(experience(n))
    first = open_buffer()
    first._live().upkeep.stop()
    assert not first._live().upkeep.snapshot_is_due()
    before = first.lsn
    second = open_buffer()
    assert second._live().adapter.is_scattered()
    assert not second._live().upkeep.snapshot_is_due()
    assert second.lsn == before
