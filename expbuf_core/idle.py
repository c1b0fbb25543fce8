"""Work that gets only what others leave of the processors, and notices when that is nothing.

A low priority is not enough for this. Where somebody at the lowest one has a processor, the kernel
still takes it for taken: it lets a writer share the processor of a search, which stops the search a
dozen times. In Linux's idle class a thread's processor counts as free. But where all are taken all
the time, such a thread gets next to nothing, and it may not leave the class again.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import ctypes
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")

_LOOK_S = 1.0
_GRACE_S = 10.0  # for what is in the middle of a call of a library


class StillAtWork(BaseException):
    """The caller was interrupted, and the thread could not be: the process had better end."""


def run(
    work: Callable[[], Result],
    *,
    patience_s: float,
    share: float,
    starved: Callable[[], object],
) -> Result:
    """Do something in a thread of the idle class.

    Args:
        work: Must hold nothing that anybody waits for who is in a hurry.
        patience_s: For so long it may get as good as nothing.
        share: The least part of that time in which it must have had a processor.
        starved: Called once, if it has had less. The work goes on if this returns.

    Returns:
        What `work` returned; what it raises is raised here.

    Raises:
        KeyboardInterrupt: The work was interrupted, too.
        StillAtWork: It could not be.
    """
    outcome: concurrent.futures.Future[Result] = concurrent.futures.Future()
    thread = threading.Thread(target=_run, args=(work, outcome), name="expbuf-idle", daemon=True)
    watch: _Watch | None = _Watch(thread, patience_s, share)
    try:
        thread.start()
        while not concurrent.futures.wait((outcome,), _LOOK_S).done:
            if watch is not None and watch.sees_it_starve():
                watch = None
                starved()
    except KeyboardInterrupt:
        _interrupt(thread)
        if not concurrent.futures.wait((outcome,), _GRACE_S).done:
            raise StillAtWork from None
        raise
    return outcome.result()


class _Watch:
    """Looks at a thread now and then."""

    def __init__(self, thread: threading.Thread, patience_s: float, share: float) -> None:
        self._thread = thread
        self._patience_s = patience_s
        self._share = share
        # When it was looked at, and how long it had had and waited for a processor by then.
        self._seen: deque[tuple[float, float, float]] = deque([(time.monotonic(), 0.0, 0.0)])

    def sees_it_starve(self) -> bool:
        """Whether it has had next to nothing of late."""
        now, seen = time.monotonic(), self._seen
        figures = _processor_s(self._thread.native_id)
        if figures is None:
            return False
        had, waited = figures
        seen.append((now, had, waited))
        while len(seen) > 1 and seen[1][0] <= now - self._patience_s:
            seen.popleft()
        then, had_then, waited_then = seen[0]
        of_late = now - then
        return (
            of_late >= self._patience_s
            and waited - waited_then > of_late / 2  # else it waits for something else
            and had - had_then < self._share * of_late
        )


def _run(work: Callable[[], Result], outcome: concurrent.futures.Future[Result]) -> None:
    try:
        _take_the_last_place()
        outcome.set_result(work())
    except BaseException as exc:
        outcome.set_exception(exc)


def _take_the_last_place() -> None:
    """Put this thread into the idle class, where there is one and starving would be noticed."""
    if hasattr(os, "SCHED_IDLE") and _processor_s(threading.get_native_id()) is not None:
        with contextlib.suppress(OSError):  # a sandbox forbids it
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))  # 0: this thread alone


def _processor_s(thread: int | None) -> tuple[float, float] | None:
    """How long a thread had a processor, and how long it waited for one; None if unknown."""
    try:
        with open(f"/proc/self/task/{thread}/schedstat") as file:
            had, waited, _ = file.read().split()
    except (OSError, ValueError):
        return None
    return int(had) / 1e9, int(waited) / 1e9


def _interrupt(thread: threading.Thread) -> None:
    """Raise KeyboardInterrupt in it, as soon as it is in Python again."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(
        ctypes.c_ulong(thread.ident or 0), ctypes.py_object(KeyboardInterrupt)
    )
