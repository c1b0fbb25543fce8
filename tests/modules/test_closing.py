"""What other threads are in the middle of while the buffer is closed, and folders that changed."""

from __future__ import annotations

import contextlib
import gc
import os
import shutil
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from expbuf_core import Experience, ExperienceBuffer, LiveColumns, locks
from expbuf_core.codec import encode_clear
from expbuf_core.commit import Draft
from expbuf_core.control import APPENDING
from expbuf_core.errors import BufferClosed, BufferReplaced, LockTimeout, ReentrantCall
from expbuf_core.locks import ProcessLock, holder
from expbuf_core.session import Session
from expbuf_core.testing.processes import Child, in_threads
from expbuf_core.verification import verify

SMALL = {"file": {"initial_bytes": 1 << 14, "segment_bytes": 1 << 14}}
DEADLINE_S = 30


def experience(n: int) -> Experience:
    return Experience(v_embed=np.full(4, n + 1.0), q_embed=np.full(4, 1.0), answer=str(n))


def open_small(folder: Path, **settings: Any) -> ExperienceBuffer:
    config = {"persistence": SMALL, "index": {"backend": "exact", "builder": "off"}}
    return ExperienceBuffer.open(folder, config=config, **settings)


class Held:
    """A lock that tells when somebody wants it, and lets go only then."""

    def __init__(self, lock: Any) -> None:
        self._lock = lock
        self.wanted, self.free = threading.Event(), threading.Event()

    def run(self, work: Callable[..., object], *arguments: object) -> None:
        self.wanted.set()
        assert self.free.wait(DEADLINE_S)
        self._lock.run(work, *arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._lock, name)


def test_a_closed_buffer_leaves_nothing_in_memory(folder: Path) -> None:
    """A process that opens one buffer after the other, for years, does not grow."""
    kept = []
    for n in range(3):
        with open_small(folder) as buffer:
            buffer.add(experience(n))
            assert buffer.search_index(v_embed=np.ones(4), q_embed=np.ones(4), k=3)
            session = buffer._live()
            kept += [weakref.ref(session), weakref.ref(session.replica)]
        del buffer, session
    gc.collect()
    assert [ref() for ref in kept] == [None] * 6


@pytest.mark.parametrize("mode", ["a", "r", "memory"])
def test_a_closed_buffer_that_somebody_keeps_gives_its_memory_back(folder: Path, mode: str) -> None:
    """A notebook keeps its variables; a mapped index file would keep its room on the disk, too."""
    with open_small(folder) as buffer:
        buffer.add_many([experience(n) for n in range(300)])
        buffer.rebuild_index()
    buffer = (
        ExperienceBuffer.open(config={"index": "exact"})
        if mode == "memory"
        else ExperienceBuffer.open(folder, mode=mode)
    )
    if mode == "memory":
        buffer.add_many([experience(n) for n in range(300)])
    found = buffer.search_index(v_embed=np.ones(4), k=3)
    replica = buffer._live().replica
    assert len(replica.tiers.segments) == (mode != "memory")
    assert buffer.sample(4).v_embed.shape == (4, 4)
    kept = [weakref.ref(thing) for thing in (replica, replica.state, buffer._cache)]
    del replica
    buffer.close()
    gc.collect()
    assert [ref() for ref in kept] == [None] * 3
    assert str(folder / "index") not in Path("/proc/self/maps").read_text()
    assert found[0].experience.answer  # what was found stays readable
    for use in (buffer.stats, lambda: len(buffer), lambda: list(buffer), buffer.ids, buffer.sync):
        with pytest.raises(BufferClosed):
            use()
    assert "closed" in repr(buffer)
    buffer.close()


def test_closing_waits_for_a_snapshot_under_way(folder: Path) -> None:
    buffer = open_small(folder)
    for n in range(10):
        buffer.add(experience(n))
    held = Held(buffer._session.maintenance)
    buffer._session.maintenance = held  # type: ignore[assignment]
    failed: list[BaseException] = []

    def snapshot() -> None:
        try:
            buffer.save_snapshot()
        except BaseException as exc:
            failed.append(exc)

    snapshotter = threading.Thread(target=snapshot, daemon=True)
    snapshotter.start()
    assert held.wanted.wait(DEADLINE_S)
    closer = threading.Thread(target=buffer.close, daemon=True)
    closer.start()
    closer.join(0.5)  # it would be done by then, if it did not wait for the snapshot
    held.free.set()
    for thread in (snapshotter, closer):
        thread.join(DEADLINE_S)
        assert not thread.is_alive()
    assert not failed
    with pytest.raises(BufferClosed):
        buffer.save_snapshot()
    with open_small(folder) as again:
        assert [e.answer for e in again] == [str(n) for n in range(10)]
        assert again.recovery.snapshot_lsn > 0
    assert not [problem for problem in verify(folder) if problem.damage]


def test_several_threads_may_close(folder: Path) -> None:
    buffer = open_small(folder)
    other = open_small(folder)
    other.add(experience(1))
    threads = [threading.Thread(target=buffer.close) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE_S)
    other.add(experience(2))  # it is still open for the others
    other.close()
    with open_small(folder) as again:
        assert again.recovery.clean
        assert len(again) == 2


def test_what_is_submitted_while_it_closes_leaves_no_thread(folder: Path) -> None:
    """`close` comes when `submit` has found the buffer open, and has no pool yet."""
    buffer = open_small(folder)
    writer, calls = buffer._writer, []

    def close_meanwhile() -> Any:
        session = writer()
        calls.append(session)
        if len(calls) == 1:
            in_threads(lambda _: buffer.close(), 1)
        return session

    buffer._writer = close_meanwhile  # type: ignore[method-assign]
    before = threading.active_count()
    with pytest.raises(BufferClosed):
        buffer.submit(experience(1))
    assert threading.active_count() == before


class Busy:
    """Another process that holds one of the folder's locks until it is told to let go."""

    def __init__(self, folder: Path, name: str) -> None:
        def hold(child: Child) -> None:
            with ProcessLock(folder / "locks" / name, DEADLINE_S):
                child.say("held")
                child.hear()

        self._child = Child(hold)
        assert self._child.hear() == "held"

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        self._child.say("let go")
        self._child.join()


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs /proc")
@pytest.mark.parametrize("durability", ["group", "sync"])
@pytest.mark.parametrize("name", ["append", "flush", "opening"])
def test_closing_that_cannot_have_a_lock_leaves_nothing(
    folder: Path, name: str, durability: str
) -> None:
    settings = {"lock_timeout_s": 0.02, "durability": durability, "group_interval_ms": 60_000}
    left, before = [], set(threading.enumerate())
    for n in range(3):
        buffer = open_small(folder, **settings)
        buffer.add(experience(n))
        with Busy(folder, name):
            if name == "flush" and durability == "sync":
                buffer.close()  # all is durable: it asks for that lock for nothing
            else:
                with pytest.raises(LockTimeout):
                    buffer.close()
        buffer.close()  # does nothing
        with pytest.raises(BufferClosed):
            buffer.add(experience(n))
        assert set(threading.enumerate()) <= before
        left.append(len(os.listdir("/proc/self/fd")))
    assert left == [left[0]] * 3
    with open_small(folder) as again:
        assert [e.answer for e in again] == ["0", "1", "2"]


class Gone:
    """In the place of an adapter that was closed."""

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"{name} of an adapter that was closed")


def test_nothing_is_written_after_closing_could_not_have_a_lock(folder: Path) -> None:
    with open_small(folder, lock_timeout_s=0.02) as other:  # keeps the lock files
        buffer = open_small(folder, lock_timeout_s=0.02, durability="group")
        buffer.add(experience(1))
        log = buffer._live().commit_log
        with Busy(folder, "append"), pytest.raises(LockTimeout):
            buffer.close()
        log._adapter = cast(Any, Gone())
        other.add(experience(2))
        late = Draft(encode_clear())
        install = partial(log._append_lock.run, log._install_prepared)
        for use in (partial(log.commit, late), partial(log.flush, 99), log.switch, install):
            with pytest.raises(BufferClosed):
                use()
        log._control.words[APPENDING] = 1
        with pytest.raises(BufferClosed):
            log._append_lock.run(log._retire_if_broken)


def test_closing_that_cannot_have_a_lock_waits_for_a_thread_that_writes(
    folder: Path, without_native_code: None
) -> None:
    """Else its file might be another one's by then."""
    with open_small(folder):  # keeps the lock files
        buffer = open_small(folder, lock_timeout_s=0.02)
        buffer.add(experience(1))
        adapter = buffer._live().adapter
        append, close, happened = adapter.append, adapter.close, list[str]()
        writing, go_on = threading.Event(), threading.Event()

        def slow(*arguments: Any) -> Any:
            writing.set()
            assert go_on.wait(DEADLINE_S)
            written = append(*arguments)
            happened.append("written")
            return written

        def closed() -> None:
            happened.append("closed")
            close()

        adapter.append, adapter.close = slow, closed  # type: ignore[method-assign]
        with ThreadPoolExecutor(2) as pool:
            adding = pool.submit(buffer.add, experience(2))
            assert writing.wait(DEADLINE_S)
            closing = pool.submit(buffer.close)
            with pytest.raises(FutureTimeout):
                closing.result(0.2)  # it gives up by then
            go_on.set()
            with pytest.raises(LockTimeout, match="another thread of this process"):
                closing.result(DEADLINE_S)
            assert happened == ["written", "closed"]
            with contextlib.suppress(BufferClosed):  # written, but perhaps not synced any more
                adding.result(DEADLINE_S)


def test_who_closes_last_closes_cleanly_though_others_could_not(folder: Path) -> None:
    last = open_small(folder)
    buffer = open_small(folder, lock_timeout_s=0.02, durability="group")
    buffer.add(experience(1))
    with Busy(folder, "append"), pytest.raises(LockTimeout):
        buffer.close()
    last.add(experience(2))
    last.close()
    with open_small(folder) as again:
        assert again.recovery.clean
        assert [e.answer for e in again] == ["1", "2"]


@pytest.mark.parametrize("durability", ["group", "os"])
def test_closing_makes_durable_what_is_written_at_the_last_moment(
    folder: Path, durability: str
) -> None:
    with open_small(folder) as other:
        buffer = open_small(folder, durability=durability, group_interval_ms=60_000)
        buffer.add(experience(1))
        log = buffer._live().commit_log
        close = log.close

        def add_before() -> None:
            in_threads(lambda _: buffer.add(experience(2)), 1)
            close()

        log.close = add_before  # type: ignore[method-assign]
        buffer.close()
        facts = other.stats()
        assert facts["durable_lsn"] == facts["appended_lsn"] > 0
        assert len(other) == 2


@pytest.mark.parametrize("backend", ["file", "lmdb"])
def test_nothing_is_written_into_a_folder_that_took_its_place(folder: Path, backend: str) -> None:
    old = ExperienceBuffer.open(folder, persistence=backend, index="exact")
    old.add_many([experience(n) for n in range(30)])
    folder.rename(folder.with_name("moved"))
    with ExperienceBuffer.open(folder, persistence=backend, index="exact") as new:
        new.add(experience(99))
        new.save_snapshot()
        before = sorted(path.relative_to(folder) for path in folder.rglob("*"))
        for work in (old.save_snapshot, old.rebuild_index, lambda: old.add(experience(1))):
            with pytest.raises(BufferReplaced, match="open the buffer again"):
                work()
        assert sorted(path.relative_to(folder) for path in folder.rglob("*")) == before
    old.close()
    assert not [problem for problem in verify(folder) if problem.damage]
    shutil.rmtree(folder)
    folder.with_name("moved").rename(folder)
    with ExperienceBuffer.open(folder) as back:
        assert len(back) == 30


def test_going_through_a_folder_that_was_replaced_says_so(folder: Path) -> None:
    with open_small(folder) as buffer:
        buffer.add_many([experience(n) for n in range(30)])
    buffer = ExperienceBuffer.open(folder, mode="r")
    going = iter(buffer)
    shutil.rmtree(folder)
    with open_small(folder) as other:
        other.add_many([experience(n) for n in range(40)])
        with pytest.raises(BufferReplaced, match="open the buffer again"):
            next(going)
    buffer.close()


class Taken:
    """A lock in the place of another; a signal comes while this thread has it."""

    def __init__(self, lock: Any, handler: Callable[[], None]) -> None:
        self._lock, self._handler = lock, handler

    def run(self, work: Callable[..., object], *arguments: object) -> None:
        def interrupted() -> None:
            self._handler()
            work(*arguments)

        self._lock.run(interrupted)

    def __enter__(self) -> None:
        self._lock.__enter__()
        self._handler()

    def __exit__(self, *exc: object) -> None:
        self._lock.__exit__(*exc)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._lock, name)


def test_a_handler_that_closes_while_another_buffer_uses_the_same_folder_is_told(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What that one holds just then, closing would wait for."""
    buffer, told = open_small(folder, lock_timeout_s=0.02), list[str]()

    def handler() -> None:
        with pytest.raises(ReentrantCall):
            buffer.close()
        told.append("told")

    lock_file, registry = Session.lock_file, locks._registry_mutex

    def taken(session: Session, name: str) -> Any:
        lock = lock_file(session, name)
        return Taken(lock, handler) if name == "opening" else lock

    monkeypatch.setattr(Session, "lock_file", taken)
    with open_small(folder) as other:
        other.add(experience(1))
    assert len(told) == 2  # as the other one was opened, and as it was closed
    monkeypatch.undo()
    monkeypatch.setattr(locks, "_registry_mutex", Taken(registry, handler))
    assert holder(folder / "locks" / "builder") is None
    monkeypatch.undo()
    assert len(told) == 3
    buffer.add(experience(2))
    buffer.close()
    with open_small(folder) as again:
        assert again.recovery.clean
        assert len(again) == 2


def test_what_is_done_with_a_replica_outside_the_buffers_own_calls_keeps_it_open(
    folder: Path,
) -> None:
    with open_small(folder) as buffer:
        buffer.add(experience(1))
        with buffer._live().replica.lock, pytest.raises(ReentrantCall):
            buffer.close()
        assert len(buffer) == 1


@pytest.mark.parametrize("mode", ["a", "r"])
def test_reading_from_a_folder_that_is_gone_says_so(folder: Path, mode: str) -> None:
    with open_small(folder) as buffer:
        buffer.add_many([experience(n) for n in range(30)])
    buffer = ExperienceBuffer.open(folder, mode=mode)
    shutil.rmtree(folder)
    with pytest.raises(BufferReplaced, match="removed or replaced"):
        buffer.get(3)
    with pytest.raises(BufferReplaced, match="removed or replaced"):
        buffer.sample(3)
    buffer.close()


@pytest.mark.parametrize("backend", ["file", "lmdb"])
def test_a_call_that_a_close_overtakes_says_so(folder: Path, backend: str) -> None:
    buffer = ExperienceBuffer.open(folder, persistence=backend, index="exact")
    buffer.add_many([experience(n) for n in range(30)])

    def close_meanwhile(columns: LiveColumns) -> Any:
        with pytest.raises(ReentrantCall, match="still open"):
            buffer.close()
        in_threads(lambda _: buffer.close(), 1)
        return columns.reward == columns.reward

    with contextlib.suppress(BufferClosed):  # if anything, it is that
        buffer.search_index(v_embed=np.ones(4), where=close_meanwhile)
    with pytest.raises(BufferClosed):
        buffer.get(3)
