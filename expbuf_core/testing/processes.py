"""Children, strangers and threads, for tests of what several of them do to each other."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator

TIMEOUT_S = 120


@contextlib.contextmanager
def forking_allowed() -> Iterator[None]:
    """Python warns when a process with threads forks; here none of them holds a lock."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


class Child:
    """A forked process that runs a function. `say` and `hear` pass lines between both.

    A child whose function raises, or that is killed by a signal, fails the test in `join`. One that
    a failing test has forgotten is killed.
    """

    _parent = 0  # until there is a child to wait for

    def __init__(self, work: Callable[[Child], object]) -> None:
        sys.stdout.flush()
        mine, theirs = os.pipe(), os.pipe()
        with forking_allowed():
            self.pid = os.fork()
        if self.pid:
            self._parent = os.getpid()
            os.close(mine[1])
            os.close(theirs[0])
            self._in, self._out = os.fdopen(mine[0], "rb"), os.fdopen(theirs[1], "wb", 0)
            return
        code = 1
        try:
            signal.alarm(TIMEOUT_S)
            os.close(mine[0])
            os.close(theirs[1])
            self._in, self._out = os.fdopen(theirs[0], "rb"), os.fdopen(mine[1], "wb", 0)
            work(self)
            code = 0
        except BaseException:
            with contextlib.suppress(BaseException):
                self._out.write(b"\n" + traceback.format_exc().encode("utf-8", "replace"))
        finally:
            os._exit(code)

    def say(self, line: object) -> None:
        """Send a line to the other side."""
        self._out.write(f"{line}\n".encode())

    def hear(self) -> str:
        """The other side's next line; "" at its end."""
        return self._in.readline().decode().rstrip("\n")

    def kill(self) -> str:
        """SIGKILL it; what it had still said."""
        os.kill(self.pid, signal.SIGKILL)
        return self._reap(signal.SIGKILL)

    def join(self) -> str:
        """Wait for its end and return what it had still said.

        Raises:
            AssertionError: It failed, died or hung.
        """
        return self._reap(None)

    def __del__(self) -> None:
        if self._parent == os.getpid():  # not in another child, which has a copy of this object
            with contextlib.suppress(AssertionError, OSError):
                self.kill()

    def _reap(self, expected: int | None) -> str:
        self._parent = 0
        rest = self._in.read().decode("utf-8", "replace")
        self._in.close()
        self._out.close()
        _, status = os.waitpid(self.pid, 0)
        if os.WIFSIGNALED(status):
            number = os.WTERMSIG(status)
            assert number == expected, f"the child died of signal {number}: {rest[-3000:]}"
        else:
            assert os.WEXITSTATUS(status) == 0, f"the child failed: {rest[-3000:]}"
        return rest


def in_child(work: Callable[[Child], object]) -> str:
    """Run a function in a forked child to its end; what it said."""
    return Child(work).join()


def in_threads(work: Callable[[int], object], count: int = 4) -> None:
    """Run a function in so many threads at once, each with its number; raise what one raised."""
    failed: list[BaseException] = []

    def run(number: int) -> None:
        try:
            work(number)
        except BaseException as exc:
            failed.append(exc)

    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT_S)
        assert not thread.is_alive(), "a thread hangs"
    if failed:
        raise failed[0]
