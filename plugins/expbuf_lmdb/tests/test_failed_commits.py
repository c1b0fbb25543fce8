"""Transactions that fail, while other processes go on: one truth must come of it, everywhere."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from expbuf_core import Experience, ExperienceBuffer
from expbuf_core import control as c
from expbuf_core.errors import StorageError
from expbuf_core.testing.persistence_log import Core, Place, operation
from expbuf_lmdb.adapter import LMDBPersistenceAdapter
from expbuf_lmdb.environment import Tables, Txn
from expbuf_lmdb.layout import BASE, END, State

SMALL = {"map_bytes": 1 << 20, "stage_bytes": 1 << 14}


def adapter_of(owner: Core | ExperienceBuffer) -> LMDBPersistenceAdapter:
    adapter = owner.adapter if isinstance(owner, Core) else owner._session.adapter
    assert isinstance(adapter, LMDBPersistenceAdapter)
    return adapter


def behind_each_transaction(adapter: LMDBPersistenceAdapter, work: Callable[[], object]) -> None:
    """Let another process do something at the instant when LMDB's writer lock is free again."""
    write = adapter._write

    def followed(*args: Any, **kwargs: Any) -> Any:
        found = write(*args, **kwargs)
        work()
        return found

    adapter._write = followed  # type: ignore[method-assign]


def test_what_was_given_up_is_not_put_back(tmp_path: Path) -> None:
    """Who waited for LMDB while a log was given up still sees the words and the stage of before."""
    core = Core(Place(tmp_path, "lmdb", SMALL)).create().extend(4).sync().extend(3)
    other = core.place.adapter()
    other.attach()
    behind_each_transaction(adapter_of(core), other.prepare)
    begin = core.next_lsn + 1
    core.adapter.retire(core.durable, core.durable, begin)
    for lost in [lsn for lsn in core.wrote if lsn > core.durable]:
        del core.wrote[lost]
    core.next_lsn = begin
    core.follows()
    core.extend(3).follows()
    core.sync().follows()
    core.recovers(durable=core.durable)
    core.finish().reopen()


def test_a_late_report_of_what_was_stored_counts_for_nothing(tmp_path: Path) -> None:
    """An appender dies with several operations in its hands; who stored them is slow to say so."""
    with opened(tmp_path / "buffer") as another:
        one, other = another(), another()
        one.add(experience(0, 10))
        words = one._session.control.words
        words[c.APPENDING] = 1
        lsn = words[c.NEXT_LSN]
        adapter_of(one).append([operation(n) for n in range(lsn, lsn + 5)], words[c.DURABLE])
        slow, reports = adapter_of(other), list[int]()
        note = slow._note_stored
        slow._note_stored = reports.append  # type: ignore[assignment, method-assign]
        slow.prepare()
        assert reports == [lsn + 4]
        one.add(experience(1, 10))
        note(reports[0])
        one.add(experience(2, 10))
        assert adapter_of(one).read(slow.store.last_lsn) == one.lsn == words[c.DURABLE]
        assert list(answers(one)) == list(answers(other)) == list(answers(another()))


def test_what_is_there_after_an_error_is_synced_all_the_same(tmp_path: Path) -> None:
    core = Core(Place(tmp_path, "lmdb", SMALL)).create().extend(4)
    other = core.place.adapter()
    assert isinstance(other, LMDBPersistenceAdapter)
    other.attach()
    Failing(other, 1, happened=True)
    with pytest.raises(StorageError):
        other.prepare()
    before = adapter_of(core).last_transaction()
    core.sync()
    assert adapter_of(core).last_transaction() > before  # one of its own
    core.sync()
    assert adapter_of(core).last_transaction() == before + 1
    core.follows()


def test_a_stage_that_is_begun_anew_meanwhile_is_not_taken_for_damaged(tmp_path: Path) -> None:
    core = Core(Place(tmp_path, "lmdb", SMALL)).create().extend(4).sync()
    mine, other = adapter_of(core), core.place.adapter()
    assert isinstance(other, LMDBPersistenceAdapter)
    other.attach()
    read_state, first = other.store.state, iter([True])

    def state(txn: Txn, tables: Tables) -> State:
        if next(first, False):  # the words of the stage are read, and the last LSN is not
            mine._begin_stage(mine.words[BASE] + mine.words[END])
            mine._room_until = 1 << 40  # LMDB's writer lock is taken
            core.extend(1)
        return read_state(txn, tables)

    other.store.state = state  # type: ignore[method-assign]
    assert other._write(other._put_staged)[0] == core.last - 1
    core.follows()
    other.sync()
    assert other.read(other.store.last_lsn) == core.last
    core.follows()


def experience(number: int, size: int) -> Experience:
    vector = np.full(4, number + 1, np.float32)
    return Experience(v_embed=vector, q_embed=vector, answer=f"{number}:" + "x" * size)


class Failing:
    """Counts transactions of an adapter and lets one of them fail, before or after it happened."""

    def __init__(self, adapter: LMDBPersistenceAdapter, number: int, *, happened: bool) -> None:
        self.seen = 0
        self._number = number
        self._happened = happened
        self._write = adapter._write
        adapter._write = self.write  # type: ignore[method-assign]

    def write(self, *args: Any, **kwargs: Any) -> Any:
        self.seen += 1
        struck = self.seen == self._number
        if struck and not self._happened:
            raise StorageError("simulated")
        found = self._write(*args, **kwargs)
        if struck:
            raise StorageError("simulated")
        return found


@contextlib.contextmanager
def opened(folder: Path) -> Iterator[Callable[[], ExperienceBuffer]]:
    buffers: list[ExperienceBuffer] = []

    def another() -> ExperienceBuffer:
        settings = {"backend": "lmdb", "lmdb": SMALL}
        buffer = ExperienceBuffer.open(folder, persistence=settings, index="exact", max_size=100)
        buffers.append(buffer)
        return buffer

    try:
        yield another
    finally:
        for buffer in buffers:
            buffer.close()


def answers(buffer: ExperienceBuffer) -> dict[int, str]:
    return {int(item.id or 0): item.answer for item in buffer}


@pytest.mark.parametrize("happened", [False, True], ids=["undone", "happened"])
@pytest.mark.parametrize("fails_once_more", [False, True], ids=["once", "twice"])
def test_replicas_agree_whatever_transaction_fails(
    tmp_path: Path, happened: bool, fails_once_more: bool
) -> None:
    """Its error does not say whether it happened: the first page may have reached the disk."""
    sizes = [10, 10, 3000, 10, 30_000, 10, 3000, 10]  # one goes straight into LMDB
    for number in itertools.count(1):
        folder, acknowledged = tmp_path / f"{number}", {}
        with opened(folder) as another:
            one, other = another(), another()
            others = adapter_of(other)
            failing = Failing(adapter_of(one), number, happened=happened)
            if fails_once_more:
                Failing(adapter_of(one), number + 1, happened=not happened)
            behind_each_transaction(adapter_of(one), others.prepare)
            for n, size in enumerate(sizes * 2):
                writer = other if n % 3 == 2 else one
                item = experience(n, size)
                with contextlib.suppress(StorageError):
                    acknowledged[writer.add(item)] = item.answer
                if n % 5 == 4:
                    with contextlib.suppress(StorageError):
                        other.save_snapshot()
                assert answers(one) == answers(other), f"transaction {number}, add {n}"
            found = answers(one)
            assert answers(another()) == found
            assert acknowledged.items() <= found.items()
        with opened(folder) as another:
            assert answers(another()) == found
        if failing.seen < number:
            break
    assert number > 10
