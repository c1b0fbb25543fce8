"""Sessions of buffers that were dropped without `close`: the next opening closes them.

Otherwise a notebook whose cell opens a buffer again and again runs out of descriptors. A finalizer
runs in the middle of anything, perhaps under a lock that closing needs: it only makes a note.

Where a buffer goes with a cycle (an agent that keeps a bound method of its own is one), the
collector calls the finalizers of all that only the cycle refers to, the session's files among them,
before anybody can close the session. So what closing reads and writes by is referred to from here.
"""

from __future__ import annotations

import logging
import os
import queue
import threading

from expbuf_core.contracts import PersistenceAdapter
from expbuf_core.session import Session

_log = logging.getLogger("expbuf")
_WAIT_S = 1.0
_noted: queue.SimpleQueue[tuple[int, Session]] = queue.SimpleQueue()  # finalizers may use this one
# By the `Unclosed` that they belong to. Not the sessions: see there.
_kept: dict[int, PersistenceAdapter] = {}


class Unclosed:
    """Belongs to a buffer, and goes with it.

    A finalizer of its own, unlike `weakref.finalize`, keeps nothing alive: plugins of a session may
    well refer to the buffer.
    """

    def __init__(self, session: Session) -> None:
        self._session: Session | None = session if session.path is not None else None
        self._pid = os.getpid()
        if self._session is not None:
            _kept[id(self)] = session.adapter

    def closed(self) -> None:
        """There is nothing left to do."""
        self._session = None
        _kept.pop(id(self), None)

    def __del__(self) -> None:
        if self._session is not None:
            _noted.put((self._pid, self._session))
            _kept.pop(id(self), None)


def close_dropped() -> None:
    """Close what was dropped since the last call; what takes long goes on in the background."""
    sessions = []
    while True:
        try:
            pid, session = _noted.get_nowait()
        except queue.Empty:
            break
        if pid == os.getpid():  # a forked child has nothing to close
            sessions.append(session)
    if sessions:
        thread = threading.Thread(target=_close, args=(sessions,), name="expbuf-drop", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # no more threads
            for session in sessions:
                _noted.put((os.getpid(), session))
        else:
            thread.join(_WAIT_S)


def _close(sessions: list[Session]) -> None:
    for session in sessions:
        _log.info("%s was dropped without close and is closed now", session.path)
        try:
            if not session.closed:  # else its buffer has tried, and was told
                session.replica.look_anew()
            session.close()
        except Exception as exc:
            _log.warning("%s was dropped without close; closing it failed: %s", session.path, exc)
