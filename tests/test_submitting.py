"""Work for other threads, and where there are none."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import NoReturn

import pytest

from expbuf_core.errors import BufferClosed
from expbuf_core.submitting import Submitter

TIMEOUT_S = 30.0


@pytest.fixture
def submitter() -> Iterator[Submitter]:
    with Submitter(2, "test-submit") as made:
        yield made


def no_thread(self: threading.Thread) -> NoReturn:
    raise RuntimeError("can't start new thread")


def test_another_thread_does_it(submitter: Submitter) -> None:
    future = submitter.submit(threading.current_thread)
    assert future.result(TIMEOUT_S).name.startswith("test-submit")


def test_an_error_is_the_futures(submitter: Submitter) -> None:
    with pytest.raises(ZeroDivisionError):
        submitter.submit(divmod, 1, 0).result(TIMEOUT_S)


def test_what_is_cancelled_in_time_is_not_done(submitter: Submitter) -> None:
    go_on, done = threading.Event(), list[int]()
    busy = [submitter.submit(go_on.wait, TIMEOUT_S) for _ in range(2)]
    future = submitter.submit(done.append, 1)
    assert future.cancel()
    go_on.set()
    submitter.close()
    assert all(each.result() for each in busy)
    assert not done


def test_closing_waits_and_takes_nothing_more() -> None:
    submitter, done = Submitter(1, "test-submit"), list[int]()
    for n in range(20):
        submitter.submit(done.append, n)
    submitter.close()
    assert done == list(range(20))
    with pytest.raises(BufferClosed):
        submitter.submit(done.append, 20)
    submitter.close()
    assert done == list(range(20))


def test_without_a_thread_it_is_done_here_and_once(
    submitter: Submitter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pool has queued it by the time at which the system has no thread for it."""
    done: list[tuple[int, threading.Thread]] = []

    def do(n: int) -> int:
        done.append((n, threading.current_thread()))
        return n

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", no_thread)
        assert submitter.submit(do, 1).done()
    assert submitter.submit(do, 2).result(TIMEOUT_S) == 2
    submitter.close()
    assert [n for n, _ in done] == [1, 2]
    assert done[0][1] is threading.current_thread()


def test_an_interrupt_here_reaches_who_submitted(
    submitter: Submitter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threading.Thread, "start", no_thread)

    def interrupted() -> NoReturn:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        submitter.submit(interrupted)
