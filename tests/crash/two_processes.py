"""Half of the work in a forked process, for tests that do nothing but work."""

from __future__ import annotations

import json
import os
import shutil
import signal
import traceback
import warnings
from collections.abc import Callable
from itertools import count
from typing import Any

from expbuf_core.testing.crash import Check, Workload, explore, record, scratch_folder
from expbuf_core.testing.recording import RecordingFileSystem


def in_two_processes(task: Callable[[int], Any]) -> tuple[Any, Any]:
    """What `task(0)` and `task(1)` return, run at the same time.

    Args:
        task: Returns what JSON can say. `task(0)` runs in a forked child: what it changes is lost.

    Raises:
        AssertionError: The child's task raised, or the child died; the message has its traceback.
    """
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # threads that idle, of earlier tests
        child = os.fork()
    if child == 0:
        status = 1
        try:
            os.close(reading)
            with open(writing, "w", encoding="utf-8") as pipe:
                json.dump(_said(task), pipe)
            status = 0
        finally:
            os._exit(status)
    os.close(writing)
    with open(reading, encoding="utf-8") as pipe:
        try:
            here = task(1)
            text = pipe.read()
        except BaseException:
            os.kill(child, signal.SIGKILL)
            raise
        finally:
            _, status = os.waitpid(child, 0)
    assert status == 0, f"the other process died: {os.waitstatus_to_exitcode(status)}"
    there = json.loads(text)
    assert "error" not in there, f"in the other process:\n{there['error']}"
    return there["value"], here


def _said(task: Callable[[int], Any]) -> dict[str, Any]:
    try:
        return {"value": task(0)}
    except BaseException:
        return {"error": traceback.format_exc()}


def explore_in_two(
    workload: Workload,
    check: Check,
    *,
    begin: Callable[[int], object],
    broken: type[RecordingFileSystem] = RecordingFileSystem,
    **settings: Any,
) -> int:
    """`explore`, each process checking every second state; how many states there were.

    Args:
        workload: Run once, here.
        check: See `explore`.
        begin: Called with 0 in one process, 1 in the other, before its first check: what the
            checks draw at random must not be the same in both.
        broken: See `explore`.
        settings: All others of `explore`.

    Raises:
        AssertionError: States broke a promise.
    """
    home = scratch_folder()
    try:
        recorder = broken(home)
        record(workload, home, broken=lambda _: recorder)
    finally:
        shutil.rmtree(home)

    def half(part: int) -> tuple[int, str]:
        turns = count(part)
        begin(part)

        def every_second(*state: Any) -> None:
            if next(turns) % 2:
                check(*state)

        # What was recorded is looked at, and nothing is run again.
        result = explore(_nothing, every_second, broken=lambda _: recorder, **settings)
        return result.states, result.report() if result.failures else ""

    (states, failures), (states_here, failures_here) = in_two_processes(half)
    assert not failures + failures_here, f"{failures}\n{failures_here}"
    assert states == states_here
    return states_here


def _nothing(*_: object) -> None:
    pass
