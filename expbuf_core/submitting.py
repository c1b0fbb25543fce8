"""Work that other threads do for whoever submits it.

A pool may have no thread to give: at the end of the interpreter it takes nothing any more, and a
system may have no threads left. Then who submits does the work itself.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, TypeVar

from expbuf_core.errors import BufferClosed

Result = TypeVar("Result")


class _Work(Generic[Result]):
    """Something to do, once."""

    def __init__(self, function: Callable[..., Result], arguments: tuple[Any, ...]) -> None:
        self.future: Future[Result] = Future()
        self._function = function
        self._arguments = arguments
        self._begun = threading.Lock()  # stays held

    def do(self) -> None:
        """Nothing, if it was begun or cancelled."""
        # A pool may have queued what it then has no thread for, and find one later.
        if not self._begun.acquire(blocking=False):
            return
        if not self.future.set_running_or_notify_cancel():
            return
        try:
            result = self._function(*self._arguments)
        except BaseException as exc:
            self.future.set_exception(exc)
            if not isinstance(exc, Exception):
                raise  # Ctrl-C, in the thread that has submitted it
        else:
            self.future.set_result(result)


class Submitter:
    """Does what is submitted, until it is closed.

    Args:
        threads: At most so many; they start when they are needed.
        name: They are called so.
    """

    def __init__(self, threads: int, name: str) -> None:
        self._threads = threads
        self._name = name
        self._mutex = threading.Lock()
        self._closed = False
        self._pool: ThreadPoolExecutor | None = None

    def submit(self, function: Callable[..., Result], *arguments: Any) -> Future[Result]:
        """Have a function called.

        Raises:
            BufferClosed: Nothing is taken any more.
        """
        work = _Work(function, arguments)
        with self._mutex:
            if self._closed:  # else the pool might come after `close` has looked for one
                raise BufferClosed("the buffer is closed; open it again")
            try:
                if self._pool is None:
                    self._pool = ThreadPoolExecutor(self._threads, self._name)
                self._pool.submit(work.do)
                return work.future
            except RuntimeError:
                pass
        work.do()
        return work.future

    def close(self) -> None:
        """Wait until all that was submitted is done."""
        with self._mutex:
            self._closed = True
            pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown(wait=True)

    def __enter__(self) -> Submitter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
