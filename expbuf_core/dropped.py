"""Sessions of buffers that were dropped without `close`: the next opening closes them.

Otherwise a notebook whose cell opens a buffer again and again runs out of descriptors. A finalizer
runs in the middle of anything, perhaps under a lock that closing needs: it only makes a note.
"""

from __future__ import annotations

import logging
import os
import queue
import weakref

from expbuf_core.session import Session

_log = logging.getLogger("expbuf")
_noted: queue.SimpleQueue[Session] = queue.SimpleQueue()  # the queue that finalizers may use


def note_when_dropped(owner: object, session: Session) -> weakref.finalize[[Session, int], object]:
    """Close a session when its owner is gone.

    Returns:
        Whose `detach` takes that back.
    """
    finalizer = weakref.finalize(owner, _note, session, os.getpid())
    finalizer.atexit = False
    return finalizer


def _note(session: Session, pid: int) -> None:
    if os.getpid() == pid:  # a forked child has nothing to close
        _noted.put(session)


def close_dropped() -> None:
    """Close what was dropped since the last call."""
    while True:
        try:
            session = _noted.get_nowait()
        except queue.Empty:
            return
        where = session.path or "a buffer in memory"
        _log.info("%s was dropped without close and is closed now", where)
        try:
            session.close()
        except Exception as exc:
            _log.warning("%s was dropped without close; closing it failed: %s", where, exc)


def _forget_in_child() -> None:
    global _noted
    _noted = queue.SimpleQueue()


os.register_at_fork(after_in_child=_forget_in_child)
