"""A full or read-only disk: a clear error, the state as before, and writing goes on later."""

from __future__ import annotations

import contextlib
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from crash_model import MAX_SIZE, experience, open_buffer, state_of

from expbuf_core import ExperienceBuffer
from expbuf_core.errors import StorageError, StorageFull
from expbuf_core.testing.faults import FaultyFileSystem
from expbuf_core.verification import verify


@pytest.fixture
def fs() -> FaultyFileSystem:
    return FaultyFileSystem()


@pytest.fixture(params=["file", "lmdb"])
def storage(request: pytest.FixtureRequest) -> dict[str, Any]:
    """How the buffer is stored, for `open_buffer`."""
    if request.param == "file":
        return {}
    pytest.importorskip("expbuf_lmdb")
    small = {"map_bytes": 1 << 20, "stage_bytes": 1 << 14}
    return {"persistence": {"backend": "lmdb", "lmdb": small}}


@pytest.fixture
def buffer(
    tmp_path: Path, fs: FaultyFileSystem, storage: dict[str, Any]
) -> Iterator[ExperienceBuffer]:
    with contextlib.closing(open_buffer(tmp_path / "buffer", fs, **storage)) as buffer:
        yield buffer
        fs.clear()


def fill(buffer: ExperienceBuffer, fs: FaultyFileSystem, room: int) -> int:
    """Add until the disk is full; how many went in."""
    fs.limit(room)
    # LMDB's file has a MiB ahead.
    padding = 500 if buffer.stats()["storage"].get("used_bytes") is None else 12_000
    for serial in range(1, 1000):
        before = state_of(buffer)
        try:
            buffer.add(experience(serial, 0.5, padding))
        except StorageFull:
            assert state_of(buffer) == before
            return serial - 1
    raise AssertionError("the disk never filled up")


@pytest.mark.parametrize("room", [0, 1000, 20_000, 100_000])
def test_full_disk(buffer: ExperienceBuffer, fs: FaultyFileSystem, room: int) -> None:
    count = fill(buffer, fs, room)
    before = state_of(buffer)
    assert len(before) == min(count, MAX_SIZE)
    for _ in range(3):
        with pytest.raises(StorageFull, match="free some room"):
            buffer.add(experience(2000, 0.5, 12_000))
    assert state_of(buffer) == before
    fs.limit(None)
    id_ = buffer.add(experience(2001, 0.5, 500))
    assert state_of(buffer)[-1].id == id_


def test_removing_and_snapshotting_work_on_a_full_disk(
    buffer: ExperienceBuffer, fs: FaultyFileSystem, tmp_path: Path, storage: dict[str, Any]
) -> None:
    fill(buffer, fs, 50_000)
    ids = [entry.id for entry in state_of(buffer)]
    buffer.remove(ids[:5])
    assert [entry.id for entry in state_of(buffer)] == ids[5:]
    # Columns are small; what a snapshot frees is large.
    fs.limit(10_000)
    buffer.save_snapshot()
    fs.limit(None)
    before = state_of(buffer)
    buffer.close()
    with contextlib.closing(open_buffer(tmp_path / "buffer", **storage)) as again:
        assert state_of(again) == before


def test_full_disk_at_creation(
    tmp_path: Path, fs: FaultyFileSystem, storage: dict[str, Any]
) -> None:
    fs.limit(1000)
    with pytest.raises(StorageFull):
        open_buffer(tmp_path / "buffer", fs, **storage)
    fs.limit(None)
    with contextlib.closing(open_buffer(tmp_path / "buffer", fs, **storage)) as buffer:
        buffer.add(experience(1, None, 0))


@pytest.mark.parametrize("clean", [True, False])
@pytest.mark.parametrize("room", [0, 1000, 20_000])
def test_full_disk_at_opening(
    tmp_path: Path, fs: FaultyFileSystem, storage: dict[str, Any], room: int, clean: bool
) -> None:
    """What is there can be read, whatever room there is; writing waits for room."""
    first = tmp_path / "buffer"
    path = first if clean else tmp_path / "copy"
    with contextlib.closing(open_buffer(first, **storage)) as buffer:
        ids = [buffer.add(experience(serial, 0.5, 700)) for serial in range(1, 20)]
        before = state_of(buffer)
        if not clean:
            buffer._live().upkeep.stop()  # so that no file comes or goes while they are copied
            shutil.copytree(first, path)  # as a crash would leave it
    for _ in range(2):
        fs.limit(room)
        with contextlib.closing(open_buffer(path, fs, **storage)) as buffer:
            assert state_of(buffer) == before
            if not storage:  # LMDB's file has room ahead, and grows past this file system
                with pytest.raises(StorageFull, match="free some room"):
                    buffer.add(experience(50, 0.5, 700_000))
            assert state_of(buffer) == before
            with contextlib.closing(open_buffer(path, fs, "r", **storage)) as reader:
                assert state_of(reader) == before
            with contextlib.closing(open_buffer(path, fs, **storage)) as second:
                assert state_of(second) == before
    fs.limit(room)
    with (
        contextlib.closing(open_buffer(path, fs, **storage)) as buffer,
        contextlib.closing(open_buffer(path, fs, **storage)) as second,
    ):
        fs.limit(None)
        id_ = second.add(experience(51, 0.5, 700))
        assert id_ > ids[-1]
        assert buffer.add(experience(52, 0.5, 700)) == id_ + 1
        after = state_of(buffer)
        assert state_of(second) == after
        assert after[:-2] == (before + after[-2:])[-len(after) : -2]
    with contextlib.closing(open_buffer(path, **storage)) as buffer:
        assert state_of(buffer) == after
    assert not [problem for problem in verify(path) if problem.damage]


def test_files_may_not_be_so_large(tmp_path: Path) -> None:
    """The error says that it is no want of room."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with open_buffer(tmp_path / "buffer") as buffer:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 14, hard))
        try:
            with pytest.raises(StorageFull, match=r"raise the limit \(`ulimit -f`\)"):
                buffer.add_many([experience(serial, 0.5, 12_000) for serial in range(3)])
            before = state_of(buffer)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert before == state_of(buffer)
        buffer.add(experience(1000, 0.5, 12_000))


def test_read_only_disk(buffer: ExperienceBuffer, fs: FaultyFileSystem) -> None:
    buffer.add(experience(1, None, 0))
    before = state_of(buffer)
    rule = fs.read_only()
    with pytest.raises(StorageError, match="Read-only"):
        buffer.add(experience(2, None, 0))
    assert state_of(buffer) == before
    fs.faults.remove(rule)
    buffer.add(experience(3, None, 0))
    assert len(state_of(buffer)) == 2


@pytest.mark.parametrize("storage", ["file"], indirect=True)  # LMDB syncs its file itself
@pytest.mark.parametrize("drop", [False, True])
def test_failed_sync(buffer: ExperienceBuffer, fs: FaultyFileSystem, drop: bool) -> None:
    buffer.add(experience(1, None, 0))
    before = state_of(buffer)
    fs.fail_sync(drop=drop)
    with pytest.raises(StorageError, match="simulated"):
        buffer.add(experience(2, None, 0))
    assert state_of(buffer) == before
    buffer.add(experience(3, None, 0))
    assert [entry.answer for entry in state_of(buffer)] == ["answer 1", "answer 3"]


LARGE_LOGS = {"persistence": {"file": {"initial_bytes": 1 << 17, "segment_bytes": 1 << 17}}}


def add_many_times(buffer: ExperienceBuffer, padding: int) -> None:
    for serial in range(1, 1000):
        buffer.add(experience(serial, 0.5, padding))


def test_a_large_removal_needs_no_large_log(tmp_path: Path, fs: FaultyFileSystem) -> None:
    """The log is full to the last byte, and what is left of the disk is too small for another."""
    arguments = {**LARGE_LOGS, "max_size": 1000}
    with contextlib.closing(open_buffer(tmp_path / "buffer", fs, **arguments)) as buffer:
        fs.limit(60_000)
        with pytest.raises(StorageFull):
            add_many_times(buffer, 3)
        ids = [entry.id for entry in state_of(buffer)]
        assert buffer.remove(ids[5:]) == len(ids) - 5
        with pytest.raises(StorageFull):
            buffer.add(experience(2000, 0.5, 50_000))
        buffer.save_snapshot()
        fs.limit(None)
        assert [entry.id for entry in state_of(buffer)] == ids[:5]


def test_where_a_large_log_has_no_room_a_smaller_one_is_made(
    tmp_path: Path, fs: FaultyFileSystem
) -> None:
    arguments = {"persistence": {"file": {"initial_bytes": 1 << 15, "segment_bytes": 1 << 24}}}
    with contextlib.closing(open_buffer(tmp_path / "buffer", fs, **arguments)) as buffer:
        for serial in range(100):  # the next log would have some hundreds of KiB
            buffer.add(experience(serial, 0.5, 3000))
        fs.limit(150_000)
        with pytest.raises(StorageFull):
            add_many_times(buffer, 3000)
        assert not list((tmp_path / "buffer").glob("*.tmp"))  # half a pair takes no room
        before = state_of(buffer)
        fs.limit(150_000)
        for serial in range(10):
            buffer.add(experience(2000 + serial, 0.5, 3000))
        assert len(state_of(buffer)) >= min(len(before), MAX_SIZE)


def test_a_snapshot_takes_the_place_of_an_older_one(
    buffer: ExperienceBuffer, fs: FaultyFileSystem, tmp_path: Path
) -> None:
    for serial in range(1, 4):
        buffer.add(experience(serial, 0.5, 3))
        buffer.save_snapshot()
    snapshots = tmp_path / "buffer" / "snapshots"
    before = {path.name for path in snapshots.iterdir()}
    assert len(before) == 2
    buffer.update_priorities(buffer.ids()[:1], [3.0])
    fs.limit(500)  # less than a snapshot
    buffer.save_snapshot()
    fs.limit(None)
    after = {path.name for path in snapshots.iterdir()}
    assert after - before
    assert max(before) in after


def test_an_index_that_could_not_be_written_takes_no_room(
    buffer: ExperienceBuffer, fs: FaultyFileSystem, tmp_path: Path
) -> None:
    buffer.add_many([experience(serial, 0.5, 3) for serial in range(20)])
    fs.fail("replace", error=28, path="*.exact")
    with pytest.raises(StorageFull):
        buffer.rebuild_index()
    assert not list((tmp_path / "buffer" / "index").glob("00*"))
