"""Threads that have the same to do at the same time let one of them do it for all.

A signal handler may raise in the main thread (Ctrl-C does) whenever a function is entered, a
builtin returns, or a loop goes round. Nobody may wait for ever for a thread that it has met: so
what must be done in the end is done by single builtins and plain stores, in an order that stays
right wherever it is interrupted.
"""

from __future__ import annotations

import threading
from _thread import get_ident
from collections import deque
from collections.abc import Callable
from operator import attrgetter
from typing import Generic, TypeVar

from expbuf_core.errors import ReentrantCall, StorageError

INTERRUPTED = (
    "the thread that wrote for this one, too, was interrupted; what was to be written may or may "
    "not be in the log"
)

Item = TypeVar("Item")

_RELEASE = type(threading.Lock()).release
_WAKE = attrgetter("wake")


class _Outcome:
    """Of one call of `work`."""

    __slots__ = ("done", "error")

    def __init__(self) -> None:
        self.done = False
        self.error: BaseException | None = None


class _Place(Generic[Item]):
    """A thread's place in the queue.

    Attributes:
        leads: Its thread is to work for all. It stands in the queue no longer.
        outcome: Of the work that its item was given to; None: nobody has taken it.
        wake: Held until one of both is known.
    """

    __slots__ = ("item", "leads", "outcome", "wake")

    def __init__(self, item: Item) -> None:
        self.item = item
        self.leads = False
        self.outcome: _Outcome | None = None
        self.wake = threading.Lock()


class Combiner(Generic[Item]):
    """A queue whose first thread works for all that stand in it.

    Who arrives while one is at work waits; when that one is done, the first of those who wait takes
    all that has come together. Each leads at most once, so nobody works for others for ever.

    Args:
        work: Is given the items, in order of arrival. What concerns one item it leaves in the item;
            an error that it raises is raised in all the threads.
    """

    def __init__(self, work: Callable[[list[Item]], None]) -> None:
        self._work = work
        self._mutex = threading.Lock()
        self._queue: deque[_Place[Item]] = deque()
        self._led = False
        self._inside: set[int] = set()  # threads

    def do(self, item: Item) -> None:
        """Return when the work on this item is done, by this thread or another.

        Raises:
            ReentrantCall: This thread is in here already: a signal handler interrupted it.
            StorageError: The thread that worked for this one was interrupted.
        """
        thread = get_ident()
        if thread in self._inside:
            raise ReentrantCall(
                "the buffer was called by a signal handler or finalizer that interrupted a write "
                "of the same thread; let it set a flag, or call from another thread"
            )
        try:
            self._inside.add(thread)
            while not self._done(_Place(item)):
                pass  # its leader was interrupted before it began
        finally:
            self._inside.discard(thread)

    def _done(self, place: _Place[Item]) -> bool:
        """Wait and lead, or be worked for; False if nothing has come of it."""
        outcome: _Outcome | None = None
        others: list[_Place[Item]] = []
        try:
            with self._mutex:
                if self._led:
                    place.wake.acquire()
                    self._queue.append(place)
                else:
                    self._led = place.leads = True
            if not place.leads:
                place.wake.acquire()
            if place.leads:
                outcome = _Outcome()
                if self._queue:
                    with self._mutex:
                        others = list(self._queue)
                        self._queue.clear()
                    for other in others:
                        other.outcome = outcome
                self._work([place.item, *[other.item for other in others]])
                outcome.done = True
        except BaseException as exc:
            if outcome is not None:
                outcome.error = exc
            raise
        finally:
            try:
                with self._mutex:
                    if not place.leads:
                        if place in self._queue:  # interrupted while it waited
                            self._queue.remove(place)
                    elif self._queue:
                        heir = self._queue[0]
                        heir.leads = True
                        del self._queue[0]
                        heir.wake.release()
                    else:
                        self._led = False
            finally:
                deque(map(_RELEASE, map(_WAKE, others)), maxlen=0)  # all of them by one builtin
        return _told(place.outcome) if outcome is None else True


def _told(outcome: _Outcome | None) -> bool:
    """Whether the work is done; raises what its leader met."""
    if outcome is None or outcome.done:
        return outcome is not None
    if isinstance(outcome.error, Exception):
        raise outcome.error
    raise StorageError(INTERRUPTED) from outcome.error
