"""Builder processes that this process has started: one at a time for each buffer, and no zombies.

They outlive the session that started them, and the next session of the same buffer goes on with the
one that is there. What has ended is waited for when a buffer is opened or closed, and at each
start: nobody else would, and the system keeps what has ended until somebody has.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Hashable

_mutex = threading.RLock()
_started: dict[Hashable, int] = {}  # pids, by what they were started for


def start(purpose: Hashable, command: list[str]) -> bool:
    """Start a process that outlives this one, unless one for the same purpose runs.

    Args:
        purpose: Names the buffer and how it is to be built.
        command: A program and its arguments.

    Returns:
        Whether one was started.
    """
    with _mutex:
        reap()
        if purpose in _started:
            return False
        _started[purpose] = _spawn(command)
        return True


def reap() -> None:
    """Take leave of those that have ended."""
    with _mutex:
        for purpose, pid in list(_started.items()):
            if _ended(pid):
                del _started[purpose]


def _spawn(command: list[str]) -> int:
    """Start a process in a session of its own; its pid."""
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    try:
        actions = [(os.POSIX_SPAWN_DUP2, null, 0), (os.POSIX_SPAWN_DUP2, null, 1)]
        return os.posix_spawn(command[0], command, os.environ, file_actions=actions, setsid=True)
    finally:
        os.close(null)


def _ended(pid: int) -> bool:
    """Whether a child has ended; reaps it."""
    try:
        return os.waitpid(pid, os.WNOHANG)[0] == pid
    except ChildProcessError:  # somebody else has waited for it
        return True


def _forget_in_child() -> None:
    # They are the parent's children; the child may get one with the same number.
    global _mutex
    _mutex = threading.RLock()
    _started.clear()


os.register_at_fork(after_in_child=_forget_in_child)
