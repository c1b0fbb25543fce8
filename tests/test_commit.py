"""The write path under faults: failed syncs, full disks, processes that die in the middle."""

from __future__ import annotations

import contextlib
import errno
import inspect
import os
import shutil
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from expbuf_core import (
    Experience,
    ExperienceBuffer,
    PersistenceAdapter,
    PersistenceProvider,
    PluginContractError,
    StorageError,
    StorageFull,
    hookimpl,
)
from expbuf_core import control as c
from expbuf_core.contracts import Appended
from expbuf_core.errors import ExpbufError, LockTimeout
from expbuf_core.filesystem import Buffer, FileSystem
from expbuf_core.plugins import default_registry
from expbuf_core.repair import repair
from expbuf_core.testing.crash import scratch_folder
from expbuf_core.testing.faults import FaultyFileSystem
from expbuf_core.verification import verify
from expbuf_file.adapter import FilePersistenceAdapter

LONG = os.environ.get("EXPBUF_LONG", "") not in ("", "0")
ERRORS = (errno.EIO, errno.ENOSPC)
DIM = 4
TIMEOUT_S = 30.0
CONFIG: dict[str, Any] = {
    "max_size": 1000,
    "lock_timeout_s": 20.0,
    "index": {"backend": "exact", "builder": "off"},
    "persistence": {"file": {"initial_bytes": 1 << 14, "segment_bytes": 1 << 14}},
}


class Scene:
    """A folder, and buffers on it that are closed at the end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.fs = FaultyFileSystem()
        self._buffers: list[ExperienceBuffer] = []

    def open(self, fs: FileSystem | None = None, **settings: Any) -> ExperienceBuffer:
        """With faults unless another file system is given."""
        buffer = ExperienceBuffer.open(
            self.folder, config=CONFIG, filesystem=fs or self.fs, **settings
        )
        self._buffers.append(buffer)
        return buffer

    def logs(self) -> list[Path]:
        return sorted(self.folder.glob("experience_data.*.wal"))

    def close(self) -> None:
        self.fs.clear()
        for buffer in reversed(self._buffers):
            with contextlib.suppress(ExpbufError):
                buffer.close()
        self._buffers.clear()


@pytest.fixture
def home() -> Iterator[Path]:
    """In memory where that is possible: what syncs cost is not what is tested."""
    made = scratch_folder()
    yield made
    shutil.rmtree(made)


@pytest.fixture(params=["native", "python"])
def scene(home: Path, request: pytest.FixtureRequest) -> Iterator[Scene]:
    """By native code, where there is some, and by Python."""
    if request.param == "python":
        request.getfixturevalue("without_native_code")
    made = Scene(home / "memory")
    yield made
    made.close()


def vector(serial: int) -> Any:
    return np.random.default_rng(serial).standard_normal(DIM).astype(np.float32)


def experience(serial: int, size: int = 0) -> Experience:
    return Experience(v_embed=vector(serial), answer=serial, trajectory="x" * size or None)


def add(buffer: ExperienceBuffer, serials: range, size: int = 0) -> None:
    for serial in serials:
        buffer.add(experience(serial, size))


def answers(buffer: ExperienceBuffer) -> list[Any]:
    return [item.answer for item in buffer]


def finds(buffer: ExperienceBuffer, serial: int) -> bool:
    hits = buffer.search_index(v_embed=vector(serial), k=1)
    return len(hits) == 1 and hits[0].experience.answer == serial


def check(buffer: ExperienceBuffer, serials: list[Any]) -> None:
    """Store, order, index and sampler hold exactly these."""
    assert answers(buffer) == serials
    found = buffer.search_index(v_embed=vector(0), k=len(serials) + 5)
    assert sorted(found.ids) == buffer.ids().tolist()
    if serials:
        assert {item.answer for item in buffer.sample(30, uniform=True)} <= set(serials)


# ---------------------------------------------------------------- failed syncs


@pytest.mark.parametrize("drop", [False, True])
def test_a_failed_sync_acknowledges_nothing(scene: Scene, drop: bool) -> None:
    """Whether the kernel then loses the pages or not: they count as lost, in every process."""
    buffer, other = scene.open(), scene.open(FileSystem())
    add(buffer, range(3))
    assert len(other) == 3
    file = buffer.stats()["storage"]["current_file"]
    scene.fs.fail_sync(drop=drop)
    with pytest.raises(StorageError, match=r"cannot sync|sync of the log failed"):
        buffer.add(experience(3))
    for each in (buffer, other):
        check(each, [0, 1, 2])
        assert not finds(each, 3)
    buffer.add(experience(4))
    for each in (buffer, other):
        check(each, [0, 1, 2, 4])
        assert finds(each, 4)
        assert not finds(each, 3)
    assert buffer.stats()["storage"]["current_file"] > file
    assert buffer.stats()["log_retirements"] == 1
    other.add(experience(5))
    check(buffer, [0, 1, 2, 4, 5])
    fresh = scene.open(FileSystem())
    check(fresh, [0, 1, 2, 4, 5])
    scene.close()
    check(scene.open(), [0, 1, 2, 4, 5])


@pytest.mark.parametrize("drop", [False, True])
def test_the_one_whose_sync_failed_reads_on(scene: Scene, drop: bool) -> None:
    """Others write first after the failure; then, and later, nothing of it shows up."""
    buffer, other = scene.open(), scene.open(FileSystem())
    add(buffer, range(3))
    for round_ in range(3):
        scene.fs.fail_sync(drop=drop)
        with pytest.raises(StorageError):
            buffer.add(experience(100 + round_))
        other.add(experience(3 + round_))
        serials = list(range(4 + round_))
        check(buffer, serials)
        check(other, serials)
    buffer.add(experience(6))
    check(other, list(range(7)))
    check(buffer, list(range(7)))
    buffer.save_snapshot()
    scene.close()
    check(scene.open(), list(range(7)))


@pytest.mark.parametrize("kind", ["remove", "priority", "reward", "outcome", "clear", "many"])
def test_a_failed_sync_undoes_every_kind(scene: Scene, kind: str) -> None:
    buffer, other = scene.open(), scene.open(FileSystem())
    add(buffer, range(4))
    ids = buffer.ids().tolist()
    receipt = buffer.search_index(v_embed=vector(0), k=2).receipt

    def state(of: ExperienceBuffer) -> list[Any]:
        return [
            (e.id, e.answer, e.priority, e.total_reward, e.retrieval_count, e.success_count)
            for e in of
        ]

    before = state(buffer)
    writes: dict[str, Callable[[], Any]] = {
        "remove": lambda: buffer.remove(ids[:2]),
        "priority": lambda: buffer.update_priorities(ids, [9.0] * 4),
        "reward": lambda: buffer.update_rewards(ids, [9.0] * 4),
        "outcome": lambda: buffer.record_outcome(receipt, success=True),
        "clear": lambda: buffer.clear(),
        "many": lambda: buffer.add_many([experience(i) for i in range(10, 15)]),
    }
    scene.fs.fail_sync()
    with pytest.raises(StorageError):
        writes[kind]()
    assert state(buffer) == state(other) == before
    other.update_priorities(ids[3:], [2.0])
    assert state(buffer) == state(other)
    assert [row[:2] for row in state(buffer)] == [row[:2] for row in before]
    assert writes[kind]()[0] if kind == "many" else writes[kind]() > 0  # the receipt is unused
    assert state(buffer) == state(other) != before


def test_threads_that_share_a_failed_flush_all_hear_of_it(scene: Scene) -> None:
    buffer = scene.open()
    add(buffer, range(2))
    acknowledged: list[int] = []
    failed: list[int] = []
    lock = threading.Lock()
    scene.fs.fail_sync(nth=5)

    def write(start: int) -> None:
        for serial in range(start, start + 10):
            try:
                buffer.add(experience(serial))
                with lock:
                    acknowledged.append(serial)
            except StorageError:
                with lock:
                    failed.append(serial)

    threads = [threading.Thread(target=write, args=(100 * i,)) for i in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT_S)
    assert failed
    assert len(acknowledged) + len(failed) == 40
    assert sorted(answers(buffer)) == sorted([0, 1, *acknowledged])
    scene.close()
    assert sorted(answers(scene.open())) == sorted([0, 1, *acknowledged])


def test_what_a_failed_group_flush_left_is_flushed_without_another_commit(scene: Scene) -> None:
    buffer = scene.open(durability="group", group_interval_ms=1.0)
    add(buffer, [0])
    buffer.sync()
    fault = scene.fs.fail_sync(drop=False)
    buffer.add(experience(1))
    lsn = buffer.lsn
    deadline = time.monotonic() + TIMEOUT_S
    while buffer.stats()["durable_lsn"] < lsn:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert fault.seen > 0  # it has struck
    assert buffer.stats()["log_retirements"] == 1
    assert buffer.stats()["flush_error"] is None
    check(buffer, [0, 1])


@pytest.mark.parametrize("durability", ["group", "os"])
def test_what_was_published_before_its_sync_failed_stays(scene: Scene, durability: str) -> None:
    """Others may have seen it, so it is written again into the new log."""
    buffer = scene.open(durability=durability, group_interval_ms=500.0)
    add(buffer, range(3))
    buffer.sync()
    add(buffer, range(3, 6))
    scene.fs.fail_sync(drop=False)
    with pytest.raises(StorageError):
        buffer.sync()
    check(buffer, list(range(6)))
    buffer.add(experience(6))
    assert buffer.sync() >= buffer.lsn
    check(buffer, list(range(7)))
    other = scene.open(FileSystem())
    check(other, list(range(7)))
    scene.close()
    check(scene.open(), list(range(7)))


@pytest.mark.parametrize("durability", ["group", "os"])
@pytest.mark.parametrize("died", [False, True])
def test_a_reservation_makes_nothing_durable_that_a_flush_lost(
    scene: Scene, durability: str, died: bool
) -> None:
    """The flush fails between the first look of an append and the sync of its reservation."""
    buffer = scene.open(durability=durability, group_interval_ms=5000.0)
    add(buffer, range(3))
    buffer.sync()
    add(buffer, range(3, 6))
    log, words = buffer._session.commit_log, buffer._session.control.words
    look = log._retire_if_broken

    def look_too_early() -> None:
        look()
        log._retire_if_broken = look  # type: ignore[method-assign]
        if died:
            words[c.FLUSHING] = 1
            return
        scene.fs.fail_sync(drop=False)  # that these pages are clean now, is a lie
        with pytest.raises(StorageError):
            buffer.sync()

    log._retire_if_broken = look_too_early  # type: ignore[method-assign]
    words[c.RESERVED_ID] = 0
    buffer.add(experience(6))
    assert buffer.stats()["log_retirements"] == 1
    assert words[c.RESERVED_ID] > words[c.NEXT_ID]
    assert buffer.sync() >= buffer.lsn
    check(buffer, list(range(7)))
    check(scene.open(FileSystem()), list(range(7)))
    scene.close()
    check(scene.open(), list(range(7)))


@pytest.mark.parametrize("durability", ["sync", "group", "os"])
def test_a_sync_that_was_not_tried_has_not_failed(
    scene: Scene, durability: str, without_native_code: None
) -> None:
    """Another process keeps the storage for too long: no error of the disk went with it."""
    buffer = scene.open(durability=durability, group_interval_ms=5000.0)
    add(buffer, range(2))
    words = buffer._session.control.words

    def busy() -> None:
        raise LockTimeout("simulated", pid=1)

    def add_and_sync() -> None:
        buffer.add(experience(2))
        buffer.sync()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(buffer._session.adapter, "sync", busy)
        with pytest.raises(LockTimeout):
            add_and_sync()
        assert words[c.FLUSH_FAILED] == words[c.FLUSHING] == 0
        if durability != "sync":
            words[c.RESERVED_ID] = 0
            with pytest.raises(LockTimeout):  # of a reservation
                buffer.add(experience(77))
    buffer.add(experience(3))
    assert buffer.sync() >= buffer.lsn
    assert buffer.stats()["log_retirements"] == 0
    check(buffer, list(range(4)))
    scene.close()
    check(scene.open(), list(range(4)))


def test_sync_after_a_failed_sync(scene: Scene) -> None:
    buffer = scene.open()
    add(buffer, range(2))
    scene.fs.fail_sync()
    with pytest.raises(StorageError):
        buffer.add(experience(2))
    assert buffer.sync() >= buffer.lsn
    buffer.save_snapshot()
    check(buffer, [0, 1])
    buffer.close()
    with scene.open() as again:
        assert again.recovery.clean
        check(again, [0, 1])


def test_syncs_that_go_on_failing(scene: Scene) -> None:
    buffer = scene.open()
    add(buffer, range(2))
    fault = scene.fs.fail("fdatasync", "fsync", times=None)
    for serial in range(10, 13):
        with pytest.raises(StorageError):
            buffer.add(experience(serial))
        check(buffer, [0, 1])
    scene.fs.faults.remove(fault)
    buffer.add(experience(2))
    check(buffer, [0, 1, 2])
    scene.close()
    check(scene.open(), [0, 1, 2])


# ---------------------------------------------------------------- full disks


@pytest.mark.parametrize("nth", range(1, 4))
@pytest.mark.parametrize("partial", [0.0, 0.4, 1.0])
def test_a_full_disk_at_a_write(scene: Scene, nth: int, partial: float) -> None:
    """Whatever part of it was written: the state is as before, and later writes go on."""
    buffer, other = scene.open(), scene.open(FileSystem())
    add(buffer, range(3))
    scene.fs.fail_write(nth, partial=partial)
    serials = [0, 1, 2]
    full = 0
    for serial in range(3, 7):
        try:
            buffer.add(experience(serial, 300))
            serials.append(serial)
        except StorageFull as exc:
            full += exc.errno == errno.ENOSPC
        check(buffer, serials)
        check(other, serials)
    assert full == 1
    other.add(experience(7))
    check(buffer, [*serials, 7])
    scene.close()
    check(scene.open(), [*serials, 7])


def test_undoing_a_failed_write_that_fails_too(scene: Scene) -> None:
    buffer, other = scene.open(), scene.open(FileSystem())
    add(buffer, range(3))
    scene.fs.fail("pwrite", error=errno.EIO, partial=0.5, times=2)
    with pytest.raises(StorageError):
        buffer.add(experience(3))
    check(buffer, [0, 1, 2])
    other.add(experience(4))
    check(buffer, [0, 1, 2, 4])
    buffer.add(experience(5))
    check(other, [0, 1, 2, 4, 5])
    scene.close()
    check(scene.open(), [0, 1, 2, 4, 5])


def test_removing_works_on_a_full_disk(scene: Scene) -> None:
    buffer = scene.open()
    add(buffer, range(5), 100)
    scene.fs.limit(0)
    serial = 5
    fill: list[StorageFull] = []
    while not fill:
        assert serial < 1000
        try:
            buffer.add(experience(serial, 500))
            serial += 1
        except StorageFull as exc:
            fill.append(exc)
    assert "free some room" in str(fill[0])
    serials = list(range(serial))
    check(buffer, serials)
    ids = buffer.ids()
    assert buffer.remove(ids[:2]) == 2
    assert buffer.update_priorities(ids[2:3], [3.0]) == 1
    check(buffer, serials[2:])
    with pytest.raises(StorageFull):
        buffer.add(experience(999, 500))
    check(buffer, serials[2:])
    scene.fs.limit(None)
    buffer.add(experience(1000, 500))
    check(buffer, [*serials[2:], 1000])
    scene.close()
    check(scene.open(), [*serials[2:], 1000])


def test_no_room_for_a_snapshot(scene: Scene) -> None:
    buffer = scene.open()
    add(buffer, range(5))
    buffer.save_snapshot()
    add(buffer, range(5, 8))
    scene.fs.limit(10)
    with contextlib.suppress(StorageFull):  # it may make room for itself
        buffer.save_snapshot()
    check(buffer, list(range(8)))
    scene.fs.limit(None)
    add(buffer, range(8, 10))
    assert buffer.save_snapshot() > 0
    scene.close()
    check(scene.open(), list(range(10)))


def test_no_room_to_create_one(scene: Scene) -> None:
    scene.fs.limit(10_000)
    with pytest.raises(StorageFull):
        scene.open()
    scene.fs.limit(None)
    with scene.open() as buffer:
        add(buffer, range(2))
    check(scene.open(), [0, 1])


def test_no_room_to_recover(scene: Scene) -> None:
    with scene.open() as buffer:
        add(buffer, range(5))
    logs = scene.logs()
    scene.fs.limit(10)
    for mode in ("a", "r"):
        with scene.open(mode=mode) as again:
            check(again, list(range(5)))
            if mode == "a":
                with pytest.raises(StorageFull, match="free some room"):
                    again.add(experience(5))
                check(again, list(range(5)))
    assert scene.logs() == logs
    scene.fs.limit(None)
    check(scene.open(), list(range(5)))


def test_a_read_only_file_system(scene: Scene) -> None:
    with scene.open() as buffer:
        add(buffer, range(5))
    fault = scene.fs.read_only()
    with pytest.raises(StorageError):
        scene.open()
    with scene.open(mode="r") as reader:
        check(reader, list(range(5)))
    scene.fs.faults.remove(fault)
    check(scene.open(), list(range(5)))


def test_a_file_system_that_becomes_read_only(scene: Scene) -> None:
    buffer = scene.open()
    add(buffer, range(5))
    fault = scene.fs.read_only()
    with pytest.raises(StorageError):
        buffer.add(experience(5))
    check(buffer, list(range(5)))
    scene.fs.faults.remove(fault)
    buffer.add(experience(6))
    check(buffer, [0, 1, 2, 3, 4, 6])


# ---------------------------------------------------------------- a fault at every call


def snapshots(buffer: ExperienceBuffer) -> None:
    for serial in (100, 101):
        buffer.save_snapshot()
        buffer.add(experience(serial))


def programs() -> dict[str, Callable[[ExperienceBuffer], None]]:
    return {
        "add": lambda b: add(b, range(100, 102)),
        "switch": lambda b: add(b, range(100, 130), 600),
        "large": lambda b: add(b, range(100, 101), 40_000),
        "snapshot": lambda b: (b.save_snapshot(), None)[1],
        "snapshots": snapshots,
        "index": lambda b: (b.rebuild_index(), None)[1],
        "remove": lambda b: (b.remove(b.ids()[:1]), None)[1],
    }


@pytest.mark.parametrize("name", programs())
@pytest.mark.parametrize("turn", [0, 1] if LONG else [0])
def test_a_fault_at_every_call(home: Path, name: str, turn: int) -> None:
    """It fails clearly; what was acknowledged stays; the next writes work; so does reopening."""
    program = programs()[name]
    nth = 0
    while True:
        nth += 1
        assert nth < 400
        scene = Scene(home / str(nth))
        buffer, other = scene.open(), scene.open(FileSystem())
        add(buffer, range(5))
        fault = scene.fs.fail(error=ERRORS[(nth + turn) % 2], nth=nth)
        with contextlib.suppress(StorageError):
            program(buffer)
        struck = fault.seen >= nth
        scene.fs.clear()
        kept = answers(other)
        gone = 1 if name == "remove" and 0 not in kept else 0
        assert kept[: 5 - gone] == list(range(gone, 5))
        check(buffer, kept)
        buffer.add(experience(777))
        other.add(experience(778, 2000))
        buffer.save_snapshot()
        buffer.add(experience(779, 6000))
        for each in (buffer, other):
            check(each, [*kept, 777, 778, 779])
            assert finds(each, 779)
        scene.close()
        with scene.open() as again:
            check(again, [*kept, 777, 778, 779])
        shutil.rmtree(scene.folder)
        if not struck:
            assert nth > 2 or name == "index"
            return


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("clean", [False, True])
def test_a_fault_at_every_call_of_opening(home: Path, error: int, clean: bool) -> None:
    source = Scene(home / "source")
    buffer = source.open()
    add(buffer, range(5))
    buffer.save_snapshot()
    add(buffer, range(5, 8))
    if clean:
        buffer.close()
    for nth in range(1, 100):
        scene = Scene(home / str(nth))
        shutil.copytree(source.folder, scene.folder)
        fault = scene.fs.fail(error=error, nth=nth)
        with contextlib.suppress(StorageError):
            scene.open()
        struck = fault.seen >= nth
        scene.close()
        with scene.open() as again:
            check(again, list(range(8)))
            again.add(experience(8))
        with scene.open() as again:
            check(again, list(range(9)))
        if not struck:
            assert nth > 5
            break
    source.close()


@pytest.mark.parametrize("error", ERRORS)
def test_a_fault_at_every_call_of_creation_and_closing(home: Path, error: int) -> None:
    for nth in range(1, 100):
        scene = Scene(home / str(nth))
        fault = scene.fs.fail(error=error, nth=nth)
        acknowledged: list[int] = []
        with contextlib.suppress(StorageError):
            buffer = scene.open()
            try:
                for serial in range(3):
                    buffer.add(experience(serial))
                    acknowledged.append(serial)
            finally:
                buffer.close()
        struck = fault.seen >= nth
        scene.close()
        with scene.open() as again:
            check(again, acknowledged)
            again.add(experience(9))
        with scene.open() as again:
            check(again, [*acknowledged, 9])
        if not struck:
            assert nth > 10
            return


# ---------------------------------------------------------------- processes that die


class Killer(FileSystem):
    """Kills its process before, in the middle of, or behind one of the calls."""

    def __init__(self) -> None:
        self.left: int | None = None
        self.only = ""

    def _strike(self, call: str) -> bool:
        if self.left is None or (self.only and self.only != call):
            return False
        self.left -= 1
        return self.left == 0

    def _call(self, name: str, do: Callable[[], Any]) -> Any:
        if self._strike(name):
            os.kill(os.getpid(), signal.SIGKILL)
        return do()

    def pwrite(self, fd: int, data: Buffer, offset: int) -> None:
        if self._strike("pwrite"):
            view = memoryview(data).cast("B")
            super().pwrite(fd, view[: len(view) // 2], offset)
            os.kill(os.getpid(), signal.SIGKILL)
        super().pwrite(fd, data, offset)

    def pwritev(self, fd: int, parts: Any, offset: int) -> None:
        self.pwrite(fd, b"".join(parts), offset)

    def fdatasync(self, fd: int) -> None:
        self._call("fdatasync", lambda: super(Killer, self).fdatasync(fd))

    def fsync(self, fd: int) -> None:
        self._call("fsync", lambda: super(Killer, self).fsync(fd))

    def truncate(self, fd: int, size: int) -> None:
        self._call("truncate", lambda: super(Killer, self).truncate(fd, size))

    def open(self, path: Path, *, create: bool = False, exclusive: bool = False) -> int:
        def do() -> int:
            return super(Killer, self).open(path, create=create, exclusive=exclusive)

        return int(self._call("open", do))

    def replace(self, source: Path, target: Path) -> None:
        self._call("replace", lambda: super(Killer, self).replace(source, target))

    def unlink(self, path: Path) -> None:
        self._call("unlink", lambda: super(Killer, self).unlink(path))

    def sync_folder(self, path: Path) -> None:
        self._call("sync_folder", lambda: super(Killer, self).sync_folder(path))


def in_child(task: Callable[[], Any]) -> int:
    """Exit code of a forked child."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        status = 1
        try:
            task()
            status = 0
        finally:
            os._exit(status)
    timer = threading.Timer(TIMEOUT_S, os.kill, (child, signal.SIGKILL))
    timer.start()
    try:
        _, status = os.waitpid(child, 0)
    finally:
        timer.cancel()
    return os.waitstatus_to_exitcode(status)


def test_a_dead_flush_leader_is_survived(scene: Scene) -> None:
    """It died inside its fsync, with its flag set; whether that sync failed, nobody will know."""
    killer = Killer()
    writer, other = scene.open(killer), scene.open(FileSystem())
    add(writer, range(3))

    def child() -> None:
        killer.left, killer.only = 1, "fdatasync"
        writer.add(experience(3))

    assert in_child(child) == -signal.SIGKILL
    assert other._session.control.words[c.FLUSHING] == 1
    check(other, [0, 1, 2])
    other.add(experience(4))
    serials = answers(other)
    assert [s for s in serials if s != 3] == [0, 1, 2, 4]  # 3 was not acknowledged: as may be
    for each in (other, writer):
        check(each, serials)
    writer.add(experience(5))
    check(other, [*serials, 5])
    assert other.stats()["log_retirements"] >= 1
    scene.close()
    check(scene.open(), [*serials, 5])


def test_a_dead_appender_is_survived(scene: Scene) -> None:
    """It died in the middle of its write, under the append lock, with its flag set."""
    killer = Killer()
    writer, other = scene.open(killer), scene.open(FileSystem())
    add(writer, range(3))

    def child() -> None:
        killer.left, killer.only = 1, "pwrite"
        writer.add(experience(3, 900))

    assert in_child(child) == -signal.SIGKILL
    assert other._session.control.words[c.APPENDING] == 1
    check(other, [0, 1, 2])
    before = other.stats()["next_id"]
    new = other.add(experience(4))
    assert new > before  # the dead one may have stamped ids
    check(other, [0, 1, 2, 4])
    check(writer, [0, 1, 2, 4])
    scene.close()
    check(scene.open(), [0, 1, 2, 4])


def test_what_a_dead_appender_left_is_no_damage(scene: Scene, home: Path) -> None:
    """Nor where its log is only kept for a payload, so that no other one says where it ends."""
    killer = Killer()
    writer, other = scene.open(killer), scene.open(FileSystem())
    add(writer, range(1), 9000)

    def child() -> None:
        killer.left, killer.only = 1, "pwrite"
        writer.add(experience(1, 900))

    assert in_child(child) == -signal.SIGKILL
    torn = scene.logs()[0]
    for serial in range(2, 6):
        other.add(experience(serial))
        assert not list(verify(scene.folder))
        other.save_snapshot()
    assert scene.logs()[0] == torn, "its payload is in use"
    assert not list(verify(scene.folder))
    scene.close()
    report = repair(scene.folder, home / "copy")
    assert report.complete
    assert not report.damage
    check(scene.open(), [0, 2, 3, 4, 5])
    scene.close()
    raw = bytearray(torn.read_bytes())
    raw[9000] ^= 1  # of the payload, before what is torn
    torn.write_bytes(raw)
    assert [problem for problem in verify(scene.folder) if problem.damage]
    assert repair(scene.folder, home / "rest").lost_ids == ((0, 0),)


class Interposed:
    """The words, and other processes that come in between two looks at them."""

    def __init__(self, words: Any, work: dict[int, Callable[[], object]]) -> None:
        self.words = words
        self.looks = 0
        self._work = work

    def __getitem__(self, which: int) -> Any:
        value = self.words[which]
        caller = inspect.currentframe().f_back.f_code.co_name  # type: ignore[union-attr]
        if caller in ("flush", "_judge_retired") and which in (c.DURABLE, c.RETIREMENTS):
            self.looks += 1
            self._work.get(self.looks, lambda: None)()
        return value

    def __setitem__(self, which: int, value: int) -> None:
        self.words[which] = value


def test_nothing_lost_is_acknowledged_whenever_the_log_is_given_up(
    scene: Scene, without_native_code: None
) -> None:
    """A thread that waits for its flush may sleep for long between two looks at the words."""
    buffer, other = scene.open(), scene.open(FileSystem())
    words, log, serial = buffer._session.control.words, buffer._session.commit_log, 100
    buffer.add(experience(0))

    def give_up() -> None:
        nonlocal serial
        words[c.FLUSH_FAILED] = 1
        serial += 1
        other.add(experience(serial))

    def give_up_twice() -> None:
        give_up()
        give_up()

    def flush(*args: Any) -> None:
        # 0: before it looks at all
        turn.get(0, lambda: None)()
        type(log).flush(log, *args)

    log.flush = flush  # type: ignore[method-assign]
    turn: dict[int, Callable[[], object]]
    turns = [{1: give_up}, {2: give_up}, {1: give_up_twice}, {0: give_up, 3: give_up}]
    for number, turn in enumerate(turns, 50):
        watched = Interposed(words, turn)
        log._control.words = watched  # type: ignore[assignment]
        try:
            with pytest.raises(StorageError, match="must be taken as lost"):
                buffer.add(experience(number))
        finally:
            log._control.words = words
        assert watched.looks >= 2
        assert answers(buffer) == answers(other)
        assert number not in answers(other)


@pytest.mark.parametrize("flag", [c.APPENDING, c.FLUSHING])
@pytest.mark.parametrize("first", ["sync", "snapshot", "add", "close", "remove"])
def test_whoever_comes_first_after_a_death(scene: Scene, flag: int, first: str) -> None:
    buffer, other = scene.open(), scene.open(FileSystem())
    add(buffer, range(3))
    buffer._session.control.words[flag] = 1
    serials = [0, 1, 2]
    if first == "sync":
        other.sync()
    elif first == "snapshot":
        other.save_snapshot()
    elif first == "add":
        other.add(experience(3))
        serials.append(3)
    elif first == "remove":
        other.remove(other.ids()[:1])
        serials.remove(0)
    else:
        other.close()
    buffer.add(experience(9))
    check(buffer, [*serials, 9])
    scene.close()
    check(scene.open(), [*serials, 9])


@pytest.mark.parametrize("cause", [c.APPENDING, c.FLUSH_FAILED])
@pytest.mark.parametrize("durability", ["group", "os"])
def test_payloads_written_again_are_found_where_they_are_now(
    scene: Scene, durability: str, cause: int
) -> None:
    """The file that was given up may lie about its pages: nobody may believe in it any more."""
    quick = {"durability": durability, "group_interval_ms": 60_000}
    config = {**CONFIG, **quick}
    buffer = ExperienceBuffer.open(scene.folder, config=config)
    other = ExperienceBuffer.open(scene.folder, config=config)
    with buffer, other:
        add(buffer, range(3))
        buffer.sync()
        add(buffer, range(3, 20))
        old = buffer._session.control.words[c.ADAPTER]
        check(other, list(range(20)))
        buffer._session.control.words[cause] = 1
        add(other, [20])
        assert buffer.stats()["log_retirements"] == 1
        given_up = buffer._session.adapter._writable.data_path
        for each in (buffer, other):
            assert len(each) == 21
            state = each._session.replica.state
            files = state.location[state.live_slots()] >> 40
            assert (files == old).tolist() == [True] * 3 + [False] * 18
        # What stands behind the durable part of the old file is nothing to anybody.
        logs = buffer._session.adapter._logs
        logs.begins.clear()
        chain = logs.chain(0)
        os.truncate(given_up, chain[max(chain)].previous_end)
        for each in (buffer, other):
            check(each, list(range(21)))
        buffer.save_snapshot()
        for each in (buffer, other):
            check(each, list(range(21)))
    with scene.open() as again:
        check(again, list(range(21)))


@pytest.mark.parametrize("name", programs())
def test_killed_at_every_call(home: Path, name: str) -> None:
    """Two others have the buffer open: they lose nothing that was acknowledged, and go on."""
    program = programs()[name]
    nth = 0
    while True:
        nth += 1
        assert nth < 300
        scene = Scene(home / str(nth))
        killer = Killer()
        doomed, other = scene.open(killer), scene.open(FileSystem())
        behind = scene.open(FileSystem())  # has read nothing when the doomed one dies
        reader = scene.open(FileSystem())  # has read everything
        add(other, range(5))
        assert answers(reader) == [0, 1, 2, 3, 4]

        def child(killer: Killer = killer, doomed: ExperienceBuffer = doomed, n: int = nth) -> None:
            assert len(doomed) == 5
            killer.left = n
            program(doomed)

        died = in_child(child) == -signal.SIGKILL
        kept = answers(other)
        gone = 1 if name == "remove" and 0 not in kept else 0
        assert kept[: 5 - gone] == list(range(gone, 5))
        if not died and name not in ("snapshot", "index"):
            assert len(kept) != 5
        other.add(experience(777))
        kept = answers(other)  # an unacknowledged one may have been saved
        assert kept[-1] == 777
        for each in (reader, other, behind):
            check(each, kept)
        behind.add(experience(778, 6000))
        other.save_snapshot()
        other.add(experience(779))
        for each in (reader, behind, other, doomed):
            check(each, [*kept, 778, 779])
        scene.close()
        with scene.open() as again:
            check(again, [*kept, 778, 779])
        shutil.rmtree(scene.folder)
        if not died:
            return


@pytest.mark.parametrize("storage", ["file", "rename", "lmdb"])
def test_killed_at_every_call_of_giving_a_log_up(home: Path, storage: str) -> None:
    """Nothing is appended to the old log while the new one may be the log already."""
    pytest.importorskip("expbuf_lmdb" if storage == "lmdb" else "expbuf_file")
    persistence: dict[str, Any] = {**CONFIG["persistence"], "backend": "file"}
    if storage == "lmdb":
        persistence = {"backend": "lmdb"}
    elif storage == "rename":
        persistence["file"] = {**persistence["file"], "commit": "rename"}
    settings = {"durability": "os", "persistence": persistence}
    for nth in range(1, 60):
        scene, copy = Scene(home / str(nth)), Scene(home / f"{nth} copy")
        killer = Killer()
        doomed, other = scene.open(killer, **settings), scene.open(FileSystem(), **settings)
        add(other, range(3))
        other.sync()
        add(other, range(3, 6))
        words = other._session.control.words

        def child(killer: Killer = killer, doomed: ExperienceBuffer = doomed, n: int = nth) -> None:
            doomed.sync()
            doomed.update_priorities(doomed.ids(), np.arange(6.0))
            doomed._session.control.words[c.FLUSHING] = 1  # as one leaves it who dies in a sync
            killer.left = n
            doomed.sync()

        died = in_child(child) == -signal.SIGKILL
        add(other, range(6, 9))
        # All die; what follows finds their files. (Not those whose locks this process holds.)
        aside = shutil.ignore_patterns("locks", "*-lock", "*.tmp")
        shutil.copytree(scene.folder, copy.folder, ignore=aside)
        joined, recovered = scene.open(FileSystem(), **settings), copy.open(**settings)
        for each in (other, doomed, joined, recovered):
            check(each, list(range(9)))
        assert words[c.RETIREMENTS] >= 1
        for each in (scene, copy):
            each.close()
            with each.open(**settings) as again:
                check(again, list(range(9)))
            shutil.rmtree(each.folder)
        if not died:
            assert nth > 1
            return


def test_killed_at_every_call_of_creation(home: Path) -> None:
    for nth in range(1, 100):
        scene = Scene(home / str(nth))

        def child(scene: Scene = scene, n: int = nth) -> None:
            killer = Killer()
            killer.left = n
            scene.open(killer).add(experience(0))

        died = in_child(child) == -signal.SIGKILL
        with scene.open() as buffer:
            assert answers(buffer) in ([], [0])
            assert died or answers(buffer) == [0]
            buffer.add(experience(1))
        with scene.open() as buffer:
            assert answers(buffer)[-1] == 1
        shutil.rmtree(scene.folder)
        if not died:
            assert nth > 5
            return


def test_killed_at_every_call_of_recovery(home: Path) -> None:
    source = Scene(home / "source")
    buffer = source.open()
    add(buffer, range(5))
    buffer.save_snapshot()
    add(buffer, range(5, 8))
    for nth in range(1, 60):
        scene = Scene(home / str(nth))
        shutil.copytree(source.folder, scene.folder)

        def child(scene: Scene = scene, n: int = nth) -> None:
            killer = Killer()
            killer.left = n
            scene.open(killer)

        died = in_child(child) == -signal.SIGKILL
        with scene.open() as again:
            check(again, list(range(8)))
            again.add(experience(8))
        with scene.open() as again:
            check(again, list(range(9)))
        shutil.rmtree(scene.folder)
        if not died:
            assert nth > 3
            break
    source.close()


def test_a_snapshot_taken_right_behind_that_of_another_spares_what_that_one_moved(
    scene: Scene,
) -> None:
    buffer, other = scene.open(), scene.open(FileSystem())
    ids = [buffer.add(experience(serial, 900)) for serial in range(80)]
    check(other, list(range(80)))
    kept = list(range(0, 80, 13))  # one a file; so many that they fill the next one well
    buffer.remove([id_ for serial, id_ in enumerate(ids) if serial not in kept])
    check(other, kept)
    first = scene.logs()[0]
    buffer.save_snapshot()
    buffer.update_priorities(ids[:1], [2.0])
    buffer.save_snapshot()
    assert not first.exists()  # what it held was moved
    other.save_snapshot()
    for each in (buffer, other):
        check(each, kept)
    scene.close()
    check(scene.open(), kept)


# ---------------------------------------------------------------- a broken contract


@pytest.mark.parametrize(
    "answer", [None, [], 7, ["somewhere"], [Appended(None, None)], [Appended(0, None)] * 2]
)
def test_an_adapter_that_does_not_say_where_it_has_written(scene: Scene, answer: Any) -> None:
    """Nobody knows what it has done, so nothing of it counts; what was acknowledged stays."""
    says = [lambda found: found]

    def made(*arguments: Any) -> PersistenceAdapter:
        adapter: Any = FilePersistenceAdapter(*arguments)
        append = adapter.append
        adapter.append = lambda *operations: says[0](append(*operations))
        return cast(PersistenceAdapter, adapter)

    class Planted:
        @hookimpl
        def expbuf_register_persistence(self) -> list[PersistenceProvider]:
            file = cast(PersistenceProvider, default_registry().get("persistence", "file"))
            return [replace(file, name="planted", factory=made)]

    planted: dict[str, Any] = {"plugins": [Planted()], "persistence": "planted"}
    buffer = scene.open(**planted)
    buffer.add(experience(0))
    says[0] = lambda found: answer
    for _ in range(2):
        with pytest.raises(PluginContractError, match=r"FilePersistenceAdapter .*`append`"):
            buffer.add(experience(1))
    assert answers(buffer) == [0]
    says[0] = lambda found: found
    buffer.add(experience(2))
    buffer.close()
    assert answers(scene.open(**planted)) == [0, 2]
