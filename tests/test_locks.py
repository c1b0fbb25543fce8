"""Locks that die with their holder, and name it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from pathlib import Path
from typing import Any

import pytest

from expbuf_core.errors import BufferClosed, LockTimeout, ReentrantCall
from expbuf_core.locks import OpenLock, ProcessLock, ThreadLock, holder, opener

TIMEOUT_S = 20.0
_HOLD = """
import sys
from pathlib import Path
from expbuf_core.locks import OpenLock, ProcessLock
lock = ProcessLock(Path(sys.argv[1]), 5)
lock.acquire()
print("held", flush=True)
sys.stdin.readline()
lock.release()
print("released", flush=True)
sys.stdin.readline()
"""
_SHARE = _HOLD.replace("ProcessLock(Path(sys.argv[1]), 5)", "OpenLock(Path(sys.argv[1]))")
_SHARE = _SHARE.replace("lock.acquire()", "lock.share()").replace("lock.release()", "lock.leave()")

_WAIT = """
import sys
from pathlib import Path
from expbuf_core.locks import ProcessLock
path = Path(sys.argv[1])
last = ProcessLock(path.with_name("last"), 30)
with ProcessLock(path, 5):
    print("held", flush=True)
    with last:
        pass
print("released", flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "lock"


class Process:
    """Another process that holds a lock."""

    def __init__(self, code: str, path: Path) -> None:
        self.popen = subprocess.Popen(
            [sys.executable, "-c", code, str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.pid = self.popen.pid
        self.expect("held")

    def expect(self, word: str) -> None:
        assert self.popen.stdout is not None
        assert self.popen.stdout.readline().strip() == word

    def go_on(self) -> None:
        assert self.popen.stdin is not None
        self.popen.stdin.write("\n")
        self.popen.stdin.flush()
        self.expect("released")

    def kill(self) -> None:
        self.popen.kill()
        self.popen.communicate(timeout=TIMEOUT_S)


@pytest.fixture
def elsewhere(path: Path) -> Iterator[Callable[..., Process]]:
    made: list[Process] = []

    def start(code: str, where: Path = path) -> Process:
        made.append(Process(code, where))
        return made[-1]

    yield start
    for process in made:
        process.kill()


def in_child(task: Callable[[], Any]) -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        status = 1
        try:
            task()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


# ---------------------------------------------------------------- one process


def test_it_excludes_the_threads_of_a_process(path: Path) -> None:
    first, second = ProcessLock(path, 5), ProcessLock(path, 0.05)
    with first:
        assert not second.try_acquire()
        caught: list[LockTimeout] = []

        def wait() -> None:
            with pytest.raises(LockTimeout) as info:
                second.acquire()
            caught.append(info.value)

        thread = threading.Thread(target=wait)
        thread.start()
        thread.join(TIMEOUT_S)
        assert caught[0].pid == os.getpid()
        assert "another thread of this process" in str(caught[0])
        assert str(path) in str(caught[0])
    assert second.try_acquire()
    second.release()


def test_counting_under_it_loses_nothing(path: Path) -> None:
    total = 0

    def count() -> None:
        nonlocal total
        lock = ProcessLock(path, TIMEOUT_S)
        for _ in range(200):
            with lock:
                value = total
                time.sleep(0)  # lets other threads run
                total = value + 1

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT_S)
    assert total == 800


def test_an_error_inside_releases_it(path: Path) -> None:
    lock = ProcessLock(path, 1)
    with pytest.raises(ZeroDivisionError), lock:
        raise ZeroDivisionError
    assert lock.try_acquire()
    lock.release()


def test_closing_another_descriptor_does_not_drop_it(path: Path, elsewhere: Any) -> None:
    """The trap of record locks: so each file is opened once a process."""
    lock = ProcessLock(path, 1)
    with lock:
        again = ProcessLock(path, 1)
        del again
        holder(path)
        script = "import sys; from pathlib import Path; from expbuf_core.locks import ProcessLock;"
        script += "sys.exit(ProcessLock(Path(sys.argv[1]), 1).try_acquire())"
        run = subprocess.run([sys.executable, "-c", script, str(path)], check=False, timeout=30)
        assert run.returncode == 0


# ---------------------------------------------------------------- several processes


def test_a_timeout_names_the_holder(path: Path, elsewhere: Any) -> None:
    other = elsewhere(_HOLD)
    lock = ProcessLock(path, 0.05)
    assert holder(path) == other.pid
    assert not lock.try_acquire()
    started = time.monotonic()
    with pytest.raises(LockTimeout, match=f"process {other.pid} has held the lock") as caught:
        lock.acquire()
    assert caught.value.pid == other.pid
    assert time.monotonic() - started < 5
    with pytest.raises(LockTimeout):
        lock.acquire(0)
    other.go_on()
    assert holder(path) is None
    with lock:
        pass


def test_every_thread_that_waits_is_told_which_process_holds_it(path: Path, elsewhere: Any) -> None:
    other = elsewhere(_HOLD)
    ahead, behind = ProcessLock(path, TIMEOUT_S), ProcessLock(path, 0.05)
    waits = threading.Event()
    with ThreadPoolExecutor(1) as pool:

        def pause() -> bool:
            waits.set()
            time.sleep(1e-3)
            return True

        waiting = pool.submit(ahead.run, lambda: None, pause=pause)
        assert waits.wait(TIMEOUT_S)
        with pytest.raises(LockTimeout, match=f"process {other.pid} has held") as caught:
            behind.run(lambda: None)
        assert caught.value.pid == other.pid
        other.go_on()
        waiting.result(TIMEOUT_S)


def until_it_waits(path: Path) -> None:
    """Another process that holds this lock has been waiting for the other one for a while."""
    lock = ProcessLock(path, 0)  # closing another descriptor would drop the lock in this process
    while not os.pread(lock.file.fd, 100, 0):
        time.sleep(1e-3)
    lock.close()


def test_a_timeout_names_whom_the_holder_waits_for(path: Path, elsewhere: Any) -> None:
    root = elsewhere(_HOLD, path.with_name("last"))
    middle = elsewhere(_WAIT)
    until_it_waits(path)
    lock = ProcessLock(path, 0.02)
    with pytest.raises(LockTimeout, match=f"{middle.pid} .* for last, .* {root.pid} ") as caught:
        lock.acquire()
    assert caught.value.pid == root.pid
    middle.kill()
    with lock, ThreadPoolExecutor(1) as pool:  # what the dead one waited for counts for nothing
        with pytest.raises(LockTimeout) as caught:
            pool.submit(lock.acquire).result(TIMEOUT_S)
        assert caught.value.pid == os.getpid()


def test_a_holder_that_waits_no_longer_is_named_itself(path: Path, elsewhere: Any) -> None:
    with ProcessLock(path.with_name("last"), TIMEOUT_S):
        middle = elsewhere(_WAIT)
        until_it_waits(path)
        with pytest.raises(LockTimeout) as caught:  # it waits for this process
            ProcessLock(path, 0.02).acquire()
        assert caught.value.pid == middle.pid
    middle.expect("released")
    assert path.read_bytes() == b""


def test_between_threads_too_the_process_that_they_wait_for_is_named(
    path: Path, elsewhere: Any
) -> None:
    root = elsewhere(_HOLD, path.with_name("last"))
    lock, last = ProcessLock(path, 0.02), ProcessLock(path.with_name("last"), TIMEOUT_S)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(lock.run, last.run, lambda: None)
        until_it_waits(path)
        with pytest.raises(LockTimeout, match=f"another thread .* {root.pid} ") as caught:
            lock.acquire()
        assert caught.value.pid == root.pid
        root.go_on()
        waiting.result(TIMEOUT_S)


def test_it_dies_with_its_holder(path: Path, elsewhere: Any) -> None:
    other = elsewhere(_HOLD)
    lock = ProcessLock(path, TIMEOUT_S)
    got: list[float] = []

    def wait() -> None:
        with lock:
            got.append(time.monotonic())

    thread = threading.Thread(target=wait)
    thread.start()
    other.kill()
    thread.join(TIMEOUT_S)
    assert got


def test_a_stopped_holder_keeps_it(path: Path, elsewhere: Any) -> None:
    other = elsewhere(_HOLD)
    other.popen.send_signal(signal.SIGSTOP)
    with pytest.raises(LockTimeout):
        ProcessLock(path, 0.02).acquire()
    other.popen.send_signal(signal.SIGCONT)
    other.go_on()
    with ProcessLock(path, TIMEOUT_S):
        pass


def test_a_forked_child_does_not_hold_it(path: Path) -> None:
    lock = ProcessLock(path, 1)
    lock.acquire()

    def child() -> None:
        mine = ProcessLock(path, 0.05)
        assert not mine.try_acquire()
        assert holder(path) == os.getppid()

    assert in_child(child) == 0
    lock.release()

    def free() -> None:
        with ProcessLock(path, 1):
            pass

    assert in_child(free) == 0
    with lock:
        pass


def test_a_child_that_ends_drops_no_lock_of_its_parent(path: Path, elsewhere: Any) -> None:
    lock = ProcessLock(path, 1)
    with lock:
        assert in_child(lambda: None) == 0
        assert in_child(lambda: ProcessLock(path, 0.01).try_acquire()) == 0
        script = "import sys; from pathlib import Path; from expbuf_core.locks import holder;"
        script += f"sys.exit(holder(Path(sys.argv[1])) != {os.getpid()})"
        run = subprocess.run([sys.executable, "-c", script, str(path)], check=False, timeout=30)
        assert run.returncode == 0


def test_nobody_holds_what_is_not_there(path: Path) -> None:
    assert holder(path) is None or not path.exists()
    assert opener(path.with_name("other")) is None


# ---------------------------------------------------------------- who has it open


def test_first_and_last(path: Path, elsewhere: Any) -> None:
    lock = OpenLock(path)
    assert lock.is_first()
    lock.share()
    second = OpenLock(path)
    assert not second.is_first()
    second.share()
    assert not lock.is_last()
    second.leave()
    assert lock.is_last()
    assert opener(path) == os.getpid()
    lock.leave()
    assert opener(path) is None
    other = elsewhere(_SHARE)
    assert not lock.is_first()
    assert opener(path) == holder(path) == other.pid
    lock.share()
    assert not lock.is_last()
    other.go_on()
    assert lock.is_last()
    lock.leave()


def test_a_killed_opener_is_none(path: Path, elsewhere: Any) -> None:
    other = elsewhere(_SHARE)
    lock = OpenLock(path)
    assert not lock.is_first()
    other.kill()
    assert lock.is_first()
    lock.leave()


# ---------------------------------------------------------------- threads alone


def in_thread(work: Callable[[], object]) -> None:
    """Run it in another thread; its assertions count."""
    with ThreadPoolExecutor(1) as pool:
        pool.submit(work).result(TIMEOUT_S)


def make_thread_lock(path: Path, timeout_s: float) -> ThreadLock:
    return ThreadLock(timeout_s)


@pytest.mark.parametrize("make", [ProcessLock, make_thread_lock])
def test_work_under_it_excludes_other_threads(path: Path, make: Any) -> None:
    lock = make(path, 0.02)

    def other() -> None:
        assert not lock.try_acquire()
        assert not lock.try_run(pytest.fail)
        with pytest.raises(LockTimeout) as caught:
            lock.run(pytest.fail)
        assert caught.value.pid == os.getpid()
        with pytest.raises(LockTimeout):
            lock.acquire(0)

    assert lock.run(in_thread, other) is None
    assert lock.run(lambda a, b: a + b, 1, 2) == 3
    in_thread(lambda: lock.run(lambda: None))
    with lock:
        in_thread(other)
    assert lock.try_run(in_thread, other)


@pytest.mark.parametrize("make", [ProcessLock, make_thread_lock])
def test_the_thread_that_has_it_is_told_so(path: Path, make: Any) -> None:
    """Not: waits for itself."""
    lock = make(path, TIMEOUT_S)

    def again() -> str:
        assert not lock.try_acquire()
        assert not lock.try_run(pytest.fail)
        with pytest.raises(LockTimeout, match="this thread"):
            lock.acquire()
        return "told"

    def interrupting() -> None:
        again()
        with pytest.raises(ReentrantCall):
            lock.run(pytest.fail)

    lock.run(interrupting)
    with lock:
        again()
        with pytest.raises(LockTimeout, match="this thread"):
            lock.run(pytest.fail)
    with pytest.raises(ZeroDivisionError):
        lock.run(lambda: 1 / 0)
    in_thread(lambda: lock.acquire(0) or lock.release())


def test_who_waits_for_another_process_may_give_up(path: Path, elsewhere: Any) -> None:
    other = elsewhere(_HOLD)
    lock = ProcessLock(path, TIMEOUT_S)
    answers = [True, True, False]
    assert lock.run(pytest.fail, pause=lambda: answers.pop(0)) is None
    assert not answers
    assert not lock.try_run(pytest.fail)
    with pytest.raises(LockTimeout, match=str(other.pid)):
        ProcessLock(path, 0.02).run(pytest.fail)
    other.go_on()
    assert lock.run(lambda: "mine") == "mine"


def test_a_lock_between_threads() -> None:
    lock = ThreadLock(0.02)
    assert lock.try_acquire()
    lock.release()
    lock.release()  # of nothing


def test_closing_waits_for_who_is_inside(path: Path) -> None:
    """Else it would unlock whatever file has got the descriptor's number meanwhile."""
    lock, inside, go_on = ProcessLock(path, TIMEOUT_S), threading.Event(), threading.Event()

    def work() -> None:
        inside.set()
        assert go_on.wait(TIMEOUT_S)
        os.fstat(lock.file.fd)  # still open

    with ThreadPoolExecutor(2) as pool:
        working = pool.submit(lock.run, work)
        assert inside.wait(TIMEOUT_S)
        closing = pool.submit(lock.close)
        with pytest.raises(FutureTimeout):
            closing.result(0.05)
        go_on.set()
        working.result(TIMEOUT_S)
        closing.result(TIMEOUT_S)
    for take in (lambda: lock.run(pytest.fail), lambda: lock.try_run(pytest.fail), lock.acquire):
        with pytest.raises(BufferClosed):
            take()
    lock.release()
