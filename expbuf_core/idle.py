"""Work that gets only what others leave of the processors, and notices when that is nothing.

A low priority is not enough for this. Where somebody at the lowest one has a processor, the kernel
still takes it for taken: it lets a writer share the processor of a search, which stops the search a
dozen times. In Linux's idle class a thread's processor counts as free. But where all are taken all
the time, such a thread gets next to nothing, and it may not leave the class again.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import threading
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")

_LOOK_S = 1.0


class Starved(Exception):
    """The thread hardly gets a processor. It goes on nevertheless, until its process ends."""


def run(work: Callable[[], Result], *, patience_s: float, share: float) -> Result:
    """Do something in a thread of the idle class.

    Args:
        work: Must not hold what others wait for.
        patience_s: It may wait so long for a processor.
        share: Beyond that, the least part of the time that it must have had one.

    Returns:
        What `work` returned; what it raises is raised here.

    Raises:
        Starved: It had less.
    """
    outcome: concurrent.futures.Future[Result] = concurrent.futures.Future()
    thread = threading.Thread(target=_run, args=(work, outcome), name="expbuf-idle", daemon=True)
    thread.start()
    while not concurrent.futures.wait((outcome,), _LOOK_S).done:
        had, waited = _processor_s(thread.native_id)
        if waited > patience_s and had < share * (had + waited):
            raise Starved
    return outcome.result()


def _run(work: Callable[[], Result], outcome: concurrent.futures.Future[Result]) -> None:
    try:
        _take_the_last_place()
        outcome.set_result(work())
    except BaseException as exc:
        outcome.set_exception(exc)


def _take_the_last_place() -> None:
    """Put this thread into the idle class, where there is one and starving would be noticed."""
    if hasattr(os, "SCHED_IDLE") and _processor_s(threading.get_native_id()) != (0.0, 0.0):
        with contextlib.suppress(OSError):  # a sandbox forbids it
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))  # 0: this thread alone


def _processor_s(thread: int | None) -> tuple[float, float]:
    """How long a thread had a processor, and how long it waited for one; 0 and 0 if unknown."""
    try:
        with open(f"/proc/self/task/{thread}/schedstat") as file:
            had, waited, _ = file.read().split()
    except (OSError, ValueError):
        return 0.0, 0.0
    return int(had) / 1e9, int(waited) / 1e9
