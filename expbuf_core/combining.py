"""Threads that have the same to do at the same time let one of them do it for all."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

Item = TypeVar("Item")


class _Place(Generic[Item]):
    """A thread's place in the queue."""

    __slots__ = ("error", "item", "leads", "wake")

    def __init__(self, item: Item) -> None:
        self.item = item
        self.leads = False
        self.error: BaseException | None = None
        self.wake = threading.Lock()


class Combiner(Generic[Item]):
    """A queue whose first thread works for all that stand in it.

    Who arrives while one is at work waits; when that one is done, the first of those who wait takes
    all that has come together. Each leads at most once, so nobody works for others for ever.

    Args:
        work: Is given the items, in order of arrival. What concerns one item it leaves in the item;
            an error that it raises is raised in all the threads.
        limit: Most items at a time.
    """

    def __init__(self, work: Callable[[list[Item]], None], limit: int = 256) -> None:
        self._work = work
        self._limit = limit
        self._mutex = threading.Lock()
        self._queue: deque[_Place[Item]] = deque()
        self._led = False

    def do(self, item: Item) -> None:
        """Return when the work on this item is done, by this thread or another."""
        alone, place = False, None
        try:
            with self._mutex:
                alone = not self._led  # then nobody stands in the queue
                if alone:
                    self._led = True
                else:
                    place = _Place(item)
                    place.wake.acquire()
                    self._queue.append(place)
            if place is None:
                self._work([item])
                return
            place.wake.acquire()
        except BaseException:
            # A KeyboardInterrupt, perhaps: nobody may wait for this thread to lead.
            if place is not None:
                self._leave(place)
            raise
        finally:
            if alone:
                with self._mutex:
                    self._hand_on()
        if place.leads:
            self._lead(place)
        elif place.error is not None:
            raise place.error

    def _leave(self, place: _Place[Item]) -> None:
        with self._mutex:
            if place in self._queue:
                self._queue.remove(place)
            if place.leads:
                self._hand_on()

    def _lead(self, own: _Place[Item]) -> None:
        with self._mutex:
            count = min(len(self._queue), self._limit)
            batch = [self._queue.popleft() for _ in range(count)]
        error: BaseException | None = None
        try:
            self._work([place.item for place in batch])
        except BaseException as exc:
            error = exc
            raise
        finally:
            with self._mutex:
                self._hand_on()
            for place in batch:
                if place is not own:
                    place.error = error
                    place.wake.release()

    def _hand_on(self) -> None:
        """Let the next in the queue lead (mutex held)."""
        if self._queue:
            self._queue[0].leads = True
            self._queue[0].wake.release()
        else:
            self._led = False
