"""Builder processes: one for a purpose, waited for when they have ended."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator

import pytest

from expbuf_core import builder_processes
from expbuf_core.builder_processes import reap, start

SLEEPING = [sys.executable, "-S", "-E", "-c", "import signal; signal.pause()"]


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Processes of this test alone, which end with it."""
    monkeypatch.setattr(builder_processes, "_started", {})
    yield
    for pid in pids():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def pids() -> list[int]:
    return list(builder_processes._started.values())


def end(pid: int) -> None:
    """Kill it and leave it a zombie."""
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)


def is_child(pid: int) -> bool:
    try:
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG)
    except ChildProcessError:
        return False
    return True


def test_one_for_a_purpose() -> None:
    assert start("a", SLEEPING)
    assert not start("a", SLEEPING)
    assert start("b", SLEEPING)
    first, second = pids()
    end(first)
    assert start("a", SLEEPING)
    assert not is_child(first)
    assert second in pids()
    assert len(pids()) == 2


def test_what_has_ended_is_waited_for() -> None:
    for purpose in range(3):
        start(purpose, SLEEPING)
    ended, running, other = pids()
    end(ended)
    end(other)
    reap()
    assert pids() == [running]
    assert [is_child(pid) for pid in (ended, running, other)] == [False, True, False]
    reap()


def test_somebody_else_may_have_waited() -> None:
    start("a", SLEEPING)
    (pid,) = pids()
    end(pid)
    os.waitpid(pid, 0)
    assert start("a", SLEEPING)
    assert pids() != [pid]


def test_what_cannot_be_started_is_not_there() -> None:
    with pytest.raises(OSError):  # noqa: PT011
        start("a", ["/nowhere/python"])
    assert start("a", SLEEPING)


def test_threads_start_one() -> None:
    begin, started = threading.Barrier(8), []

    def run() -> None:
        begin.wait(30)
        started.append(start("a", SLEEPING))

    threads = [threading.Thread(target=run) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(started) == [False] * 7 + [True]
    assert len(pids()) == 1


def test_a_forked_child_waits_for_its_own_alone() -> None:
    start("a", SLEEPING)
    (parents,) = pids()
    held, free = threading.Event(), threading.Event()

    def hold() -> None:
        with builder_processes._mutex:
            held.set()
            free.wait(30)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(30)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # threads: what is tested
        child = os.fork()
    if child == 0:
        signal.alarm(20)
        reap()
        fine = not pids() and start("a", SLEEPING) and pids() != [parents]
        for pid in pids():
            os.kill(pid, signal.SIGKILL)
        os._exit(0 if fine else 1)
    free.set()
    thread.join(30)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert pids() == [parents]
    assert is_child(parents)
