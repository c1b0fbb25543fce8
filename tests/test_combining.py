"""Threads that let one of them work for all."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable

import pytest

from expbuf_core.combining import Combiner
from expbuf_core.errors import ReentrantCall, StorageError

TIMEOUT_S = 30.0


class Item:
    def __init__(self, number: int) -> None:
        self.number = number
        self.done_by = 0


class Scene:
    """A combiner whose work stops at a gate, and threads that use it."""

    def __init__(self) -> None:
        self.combiner: Combiner[Item] = Combiner(self.work)
        self.gate = threading.Semaphore(0)
        self.at_work = threading.Semaphore(0)
        self.batches: list[list[int]] = []
        self.errors: dict[int, BaseException] = {}
        self.error: BaseException | None = None
        self.threads: list[threading.Thread] = []

    def work(self, items: list[Item]) -> None:
        self.at_work.release()
        assert self.gate.acquire(timeout=TIMEOUT_S)
        self.batches.append([item.number for item in items])
        for item in items:
            item.done_by = threading.get_ident()
        error, self.error = self.error, None
        if error is not None:
            raise error

    def start(self, number: int) -> Item:
        """A thread that stands in the queue, or works, when this returns."""
        item, queue = Item(number), self.combiner._queue
        length, led = len(queue), self.combiner._led

        def use() -> None:
            try:
                self.combiner.do(item)
            except BaseException as exc:
                self.errors[number] = exc

        thread = threading.Thread(target=use)
        thread.start()
        self.threads.append(thread)
        if led:
            wait_for(lambda: len(queue) == length + 1)
        else:
            assert self.at_work.acquire(timeout=TIMEOUT_S)
        return item

    def end(self, batches: int) -> None:
        for _ in range(batches):
            self.gate.release()
        for thread in self.threads:
            thread.join(TIMEOUT_S)
            assert not thread.is_alive()


def wait_for(fact: Callable[[], bool]) -> None:
    event = threading.Event()
    for _ in range(int(TIMEOUT_S * 1000)):
        if fact():
            return
        event.wait(0.001)
    raise AssertionError("it never came")


def test_one_alone_works_at_once() -> None:
    scene = Scene()
    scene.gate.release()
    item = Item(1)
    scene.combiner.do(item)
    assert scene.batches == [[1]]
    assert item.done_by == threading.get_ident()


def test_those_who_wait_are_one_batch_in_order() -> None:
    scene = Scene()
    items = [scene.start(number) for number in range(6)]
    scene.end(2)
    assert scene.batches == [[0], [1, 2, 3, 4, 5]]
    assert scene.errors == {}
    assert len({item.done_by for item in items[1:]}) == 1


def test_an_error_reaches_all_of_its_batch_and_nobody_else() -> None:
    scene = Scene()
    for number in range(3):
        scene.start(number)
    scene.gate.release()
    assert scene.at_work.acquire(timeout=TIMEOUT_S)  # 1 works for 1 and 2
    scene.start(3)
    scene.error = OSError("no")
    scene.end(2)
    assert scene.batches == [[0], [1, 2], [3]]
    assert {number: str(error) for number, error in scene.errors.items()} == {1: "no", 2: "no"}


def interrupt_when(fact: Callable[[], bool]) -> threading.Thread:
    """SIGINT to the main thread once `fact` holds; a lock that it waits for lets it go."""

    def kill() -> None:
        wait_for(fact)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    thread = threading.Thread(target=kill)
    thread.start()
    return thread


def test_one_who_is_interrupted_while_waiting_leaves_the_queue() -> None:
    scene = Scene()
    scene.start(0)
    queue = scene.combiner._queue
    killer = interrupt_when(lambda: len(queue) == 1)
    with pytest.raises(KeyboardInterrupt):
        scene.combiner.do(Item(1))
    killer.join(TIMEOUT_S)
    assert not queue
    scene.start(2)
    scene.end(2)
    assert scene.batches == [[0], [2]]


def test_a_call_from_a_signal_handler_is_told_so() -> None:
    combiner: Combiner[int] = Combiner(lambda items: combiner.do(items[0] + 1))
    with pytest.raises(ReentrantCall):
        combiner.do(0)
    seen: list[int] = []
    combiner = Combiner(seen.extend)
    combiner.do(7)
    assert seen == [7]


def test_those_whose_leader_is_interrupted_are_told() -> None:
    scene = Scene()
    for number in range(3):
        scene.start(number)
    scene.gate.release()
    assert scene.at_work.acquire(timeout=TIMEOUT_S)  # 1 works for 1 and 2
    scene.error = KeyboardInterrupt()
    scene.end(1)
    assert isinstance(scene.errors[1], KeyboardInterrupt)
    assert isinstance(scene.errors[2], StorageError)
    assert isinstance(scene.errors[2].__cause__, KeyboardInterrupt)


def test_a_leader_who_is_interrupted_hands_on() -> None:
    scene = Scene()
    scene.start(0)
    scene.error = KeyboardInterrupt()
    scene.start(1)
    scene.end(2)
    assert isinstance(scene.errors[0], KeyboardInterrupt)
    assert scene.batches == [[0], [1]]
