"""What is particular to log files: switching, prepared files, giving up, following, cutting."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from expbuf_core import ExperienceBuffer
from expbuf_core.contracts import (
    Damage,
    LoggedOperation,
    LogGone,
    PersistenceContext,
    Pin,
    Stamped,
    one_by_one,
)
from expbuf_core.crc import crc32
from expbuf_core.errors import CorruptionError, StorageFull
from expbuf_core.filesystem import FileSystem
from expbuf_core.testing.faults import FaultyFileSystem, unreadable
from expbuf_core.testing.persistence_log import (
    alike,
    assert_same,
    ids_of,
    operation,
    places_of,
    rows_of,
    without_rows,
)
from expbuf_file import adapter as adapter_module
from expbuf_file import follower as following
from expbuf_file import layout
from expbuf_file.adapter import FilePersistenceAdapter
from expbuf_file.logfile import Frame, LogFile
from expbuf_file.settings import FileSettings
from expbuf_file.writing import pieces

UUID = bytes(range(16))
TINY = FileSettings(initial_bytes=1 << 14, segment_bytes=1 << 14)


class Folder:
    """A log, the words that its processes share, and what was written to it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.path.mkdir(exist_ok=True)
        self.words = [0] * 8
        self.fs = FaultyFileSystem()
        self.written: dict[int, Stamped] = {}
        self.places: dict[int, Any] = {}
        self.durable = 0
        self._made: list[FilePersistenceAdapter] = []

    def adapter(
        self, settings: FileSettings = TINY, fs: FileSystem | None = None
    ) -> FilePersistenceAdapter:
        context = PersistenceContext(self.path, UUID, fs or self.fs, self.words)
        made = FilePersistenceAdapter(settings, context)
        self._made.append(made)
        return made

    def new(self, settings: FileSettings = TINY) -> FilePersistenceAdapter:
        made = self.adapter(settings)
        made.create(1)
        return made

    def append(self, adapter: FilePersistenceAdapter, *lsns: int, **size: Any) -> None:
        for lsn in lsns:
            item = operation(lsn, **size)
            (self.places[lsn],) = adapter.append([item], self.durable)
            self.written[lsn] = item

    def sync(self, adapter: FilePersistenceAdapter) -> None:
        adapter.sync()
        self.durable = max(self.written)

    def check(self, found: list[LoggedOperation], first: int = 1) -> None:
        """They are what was written, from `first` on."""
        wanted = [lsn for lsn in self.written if lsn >= first]
        assert [item.lsn for item in found] == wanted
        for item in found:
            assert_same(item, self.written[item.lsn])

    def recover(self, after: int = 0, durable: int | None = None) -> list[LoggedOperation]:
        reader = self.adapter(fs=FileSystem())
        return list(reader.recover(after, self.durable if durable is None else durable))

    def numbers(self, log: str = layout.DATA) -> list[int]:
        return layout.numbers(self.path, log)

    def file(self, number: int, log: str = layout.DATA) -> Path:
        return layout.path_of(self.path, log, number)

    def close(self) -> None:
        for adapter in self._made:
            adapter.close()
        self._made.clear()


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Folder]:
    made = Folder(tmp_path / "log")
    yield made
    made.close()


# ---------------------------------------------------------------- creating


def listed(folder: Folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.path.iterdir()}


@pytest.mark.parametrize("zeroed", [0, 8, 100, 200])
def test_what_an_interrupted_creation_leaves_is_replaced(folder: Folder, zeroed: int) -> None:
    """Its last operation may be torn, and of the index log nothing was synced."""
    adapter = folder.new()
    adapter.append([without_rows(1, bytes([1]) * 128)], 0)
    adapter.append([without_rows(2, bytes([1]) * 128)], 0)
    for log in (layout.DATA, layout.INDEX):
        raw = bytearray(folder.file(1, log).read_bytes())
        end = len(raw.rstrip(b"\0"))
        raw[end - zeroed : end] = bytes(zeroed)
        folder.file(1, log).write_bytes(raw if log == layout.DATA else raw[: 4096 * (zeroed % 3)])
    folder.adapter().create(1)
    assert folder.recover() == []


def begun(folder: Folder) -> None:
    folder.append(folder.new(), 1, rows=1, body_bytes=16, row_bytes=24)


def ended(folder: Folder) -> None:
    adapter = folder.new()
    folder.append(adapter, 1, rows=1, body_bytes=16, row_bytes=24)
    adapter.finish(1)


def begun_again(folder: Folder) -> None:
    begun(folder)
    folder.sync(folder._made[0])
    again = folder.adapter()
    assert len(list(again.recover(0, 1))) == 1
    again.start(2, 1)
    assert folder.numbers(layout.INDEX) == [2]


@pytest.mark.parametrize("make", [begun, ended, begun_again])
def test_a_damaged_log_is_not_taken_for_an_interrupted_creation(
    folder: Folder, make: Callable[[Folder], None]
) -> None:
    """Whichever byte is wrong, and whatever that hides: what else there is, is not deleted."""
    make(folder)
    folder.close()
    for number in folder.numbers():
        right = folder.file(number).read_bytes()
        for at in [*range(0, 80, 5), *range(4096, len(right.rstrip(b"\0")), 3)]:
            raw = bytearray(right)
            raw[at] ^= 1
            folder.file(number).write_bytes(raw)
            before = listed(folder)
            with pytest.raises(CorruptionError) as caught:
                folder.adapter().create(1)
            assert (caught.value.path, caught.value.offset) != (None, None)
            assert listed(folder) == before, f"byte {at} of file {number}"
        folder.file(number).write_bytes(right)


# ---------------------------------------------------------------- switching


def test_many_tiny_files(folder: Folder) -> None:
    adapter = folder.new()
    follower = adapter.follow(0)
    seen: list[LoggedOperation] = []
    for lsn in range(1, 300):
        folder.append(adapter, lsn)
        if lsn % 7 == 0:
            folder.sync(adapter)
            seen += follower.read(lsn)
    folder.sync(adapter)
    seen += follower.read(299)
    assert len(folder.numbers()) > 10
    assert folder.numbers() == folder.numbers(layout.INDEX)
    folder.check(seen)
    folder.check(list(adapter.follow(0).read(299)))
    folder.check(list(adapter.follow(150).read(299)), 151)
    folder.check(folder.recover())
    folder.check(folder.recover(after=222), 223)
    assert [*adapter.verify(299)] == []
    assert all(folder.file(number).stat().st_size <= 1 << 14 for number in folder.numbers())


def pinned(adapter: FilePersistenceAdapter, folder: Folder, *lsns: int) -> tuple[Pin, list[bytes]]:
    """The first payload of each of these operations."""
    rows = [rows_of(folder.written[lsn])[0] for lsn in lsns]
    ids = np.array([ids_of(folder.written[lsn])[0] for lsn in lsns])
    places = np.array([folder.places[lsn].location for lsn in lsns])
    return adapter.pin(ids, places, np.array([*map(len, rows)], np.uint32)), rows


def test_a_pin_of_many_holds_the_open_logs_and_a_pin_of_few_its_own(folder: Folder) -> None:
    adapter = folder.new()
    for lsn in range(1, 9):
        folder.append(adapter, lsn, rows=2)
        adapter.switch(lsn + 1, lsn)
    folder.sync(adapter)
    everywhere = (1, 8, 3, 4, 5, 6, 7, 2, 1, 1)
    for _ in range(2):  # the first opens the logs
        many, rows = pinned(adapter, folder, *everywhere)
        assert [bytes(row) for row in many.read_many(np.arange(10))] == rows
    few, few_rows = pinned(adapter, folder, 3, 3)
    assert len(open_logs(folder)) == 8
    adapter.drop_below(8, np.array([8]), np.array([folder.places[8].location]))
    # What both hold is deleted and stays readable; what is deleted is not found again.
    assert [bytes(row) for row in many.read_many(np.arange(9, -1, -1))] == rows[::-1]
    with pytest.raises(LogGone):
        pinned(adapter, folder, *everywhere)
    again, rows = pinned(adapter, folder, *[8] * 10)
    assert [bytes(again.read(i)) for i in range(10)] == rows
    del many
    assert open_logs(folder) == {3, 8}
    assert [bytes(few.read(i)) for i in range(2)] == few_rows


def open_logs(folder: Folder) -> set[int]:
    """Numbers of the data logs that this process has open for reading, deleted ones too."""
    found = set()
    for fd in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            target = str(fd.readlink())
            mode = os.O_ACCMODE & int(
                (Path("/proc/self/fdinfo") / fd.name).read_text().split()[3], 8
            )
            if target.startswith(str(folder.path / layout.DATA)) and mode == os.O_RDONLY:
                found.add(int(target.split(".")[-2]))
    return found


def test_an_operation_larger_than_a_file_gets_one_of_its_own(folder: Folder) -> None:
    adapter = folder.new()
    folder.append(adapter, 1, 2)
    folder.append(adapter, 3, rows=30, row_bytes=5000, body_bytes=90_000)
    folder.append(adapter, 4, 5)
    folder.sync(adapter)
    folder.check(list(adapter.follow(0).read(5)))
    folder.check(folder.recover())
    for lsn, place in folder.places.items():
        lengths = folder.written[lsn].operation.lengths
        places = places_of(place.location, lengths)
        pin = adapter.pin(ids_of(folder.written[lsn]), places, lengths)
        for i, row in enumerate(rows_of(folder.written[lsn])):
            assert bytes(pin.read(i)) == row


def test_files_grow_up_to_their_limit(folder: Folder) -> None:
    settings = FileSettings(initial_bytes=1 << 14, segment_bytes=1 << 16)
    adapter = folder.new(settings)
    folder.append(adapter, *range(1, 400))
    sizes = [folder.file(number).stat().st_size for number in folder.numbers()]
    assert sizes[0] == 1 << 14
    assert sizes == sorted(sizes)
    assert max(sizes) == 1 << 16


def test_switching_by_hand_and_with_nothing_in_between(folder: Folder) -> None:
    adapter = folder.new()
    for lsn in range(1, 6):
        adapter.switch(lsn, folder.durable)
        adapter.switch(lsn, folder.durable)
        folder.append(adapter, lsn)
    folder.sync(adapter)
    assert folder.numbers() == list(range(1, 12))
    folder.check(list(adapter.follow(0).read(5)))
    folder.check(folder.recover())


def test_two_adapters_take_turns(folder: Folder) -> None:
    one = folder.new()
    two = folder.adapter()
    two.attach()
    followers = one.follow(0), two.follow(0)
    for lsn in range(1, 120):
        folder.append((one, two)[lsn % 2], lsn)
        if lsn % 11 == 0:
            folder.sync((one, two)[lsn % 3 == 0])
    folder.sync(one)
    for follower in followers:
        folder.check(list(follower.read(119)))
    folder.check(folder.recover())


# ---------------------------------------------------------------- prepared files


def test_a_prepared_file_is_used(folder: Folder) -> None:
    adapter = folder.new()
    lsn = 0
    while not adapter.needs_preparation():
        lsn += 1
        folder.append(adapter, lsn)
        assert lsn < 100
    adapter.prepare()
    assert folder.numbers() == [1]
    adapter.install_prepared()
    adapter.install_prepared()
    assert folder.numbers() == [1, 2]
    assert not adapter.needs_preparation()
    before = folder.fs.calls["create"]
    while folder.words[0] == 1:
        lsn += 1
        folder.append(adapter, lsn)
    assert folder.fs.calls["create"] == before
    folder.sync(adapter)
    folder.check(folder.recover())
    folder.check(list(adapter.follow(0).read(lsn)))


def test_a_prepared_file_that_is_not_used(folder: Folder) -> None:
    """It is no part of the log, neither to followers nor to recovery, and goes in the end."""
    adapter = folder.new()
    folder.append(adapter, 1, 2)
    adapter.prepare()
    adapter.install_prepared()
    folder.append(adapter, 3)
    folder.sync(adapter)
    folder.check(list(adapter.follow(0).read(3)))
    folder.check(folder.recover())
    assert [*adapter.verify(3)] == []
    adapter.finish(3)
    assert folder.numbers() == [1]
    folder.check(folder.recover())


def test_one_that_was_prepared_too_late(folder: Folder) -> None:
    adapter, other = folder.new(), folder.adapter()
    other.attach()
    folder.append(adapter, 1)
    adapter.prepare()
    folder.append(other, 2)
    other.switch(3, 0)
    adapter.install_prepared()
    folder.append(adapter, 3)
    folder.sync(other)
    assert folder.numbers() == [1, 2]
    assert [path for path in folder.path.iterdir() if path.suffix == ".tmp"] == []
    folder.check(folder.recover())


def test_a_prepared_file_that_is_too_small(folder: Folder) -> None:
    adapter = folder.new()
    folder.append(adapter, 1)
    adapter.prepare()
    adapter.install_prepared()
    folder.append(adapter, 2, rows=20, row_bytes=9000)
    folder.append(adapter, 3)
    folder.sync(adapter)
    folder.check(folder.recover())
    folder.check(list(adapter.follow(0).read(3)))


@pytest.mark.parametrize("nth", range(1, 12))
def test_preparing_on_a_full_disk_leaves_nothing(folder: Folder, nth: int) -> None:
    adapter = folder.new()
    folder.append(adapter, 1)
    fault = folder.fs.fail("create", "pwrite", "allocate", "fsync", "replace", error=28, nth=nth)
    with contextlib.suppress(StorageFull):  # and no other error
        adapter.prepare()
        adapter.install_prepared()
    folder.fs.faults.remove(fault)
    folder.append(adapter, 2)
    folder.sync(adapter)
    adapter.prepare()
    adapter.install_prepared()
    adapter.switch(3, 2)
    folder.append(adapter, 3)
    folder.sync(adapter)
    folder.check(folder.recover())


# ---------------------------------------------------------------- large commits


@given(
    sizes=st.lists(st.integers(0, 40), max_size=9),
    size=st.integers(1, 50),
)
def test_pieces_are_the_same_bytes(sizes: list[int], size: int) -> None:
    parts = [bytes([i + 1]) * n for i, n in enumerate(sizes)]
    made = [b"".join(map(bytes, piece)) for piece in pieces(parts, size)]
    assert b"".join(made) == b"".join(parts)
    assert all(len(piece) == size for piece in made[:-1])
    assert len(made[-1]) <= size


def in_pieces(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> FilePersistenceAdapter:
    """An adapter that syncs each commit, and writes them in pieces of 256 bytes."""
    monkeypatch.setattr(adapter_module, "_PIECE", 256)
    made = folder.new()
    folder.append(made, 1)
    made.hasten()
    folder.sync(made)
    return made


def test_a_commit_in_pieces(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = in_pieces(folder, monkeypatch)
    before = folder.fs.calls["pwrite"]
    folder.append(adapter, 2, rows=20)
    assert folder.fs.calls["pwrite"] - before > 10
    before = folder.fs.calls["pwrite"]
    folder.append(adapter, 3, rows=20)  # the last one was not hastened: who knows what it waits for
    assert folder.fs.calls["pwrite"] - before < 5
    folder.sync(adapter)
    folder.check(folder.recover())
    folder.check(list(adapter.follow(0).read(3)))


@pytest.mark.parametrize("nth", range(1, 12))
def test_a_piece_that_fails_leaves_nothing(
    folder: Folder, monkeypatch: pytest.MonkeyPatch, nth: int
) -> None:
    adapter = in_pieces(folder, monkeypatch)
    before = folder.file(1).read_bytes()
    fault = folder.fs.fail("pwrite", error=28, nth=nth, partial=0.5)
    with pytest.raises(StorageFull):
        adapter.append([operation(2, rows=20)], folder.durable)
    folder.fs.faults.remove(fault)
    assert folder.file(1).read_bytes() == before
    folder.append(adapter, 2)
    folder.sync(adapter)
    folder.check(folder.recover())


# ---------------------------------------------------------------- giving a log up


@pytest.mark.parametrize("kept", [4, 5, 7])
@pytest.mark.parametrize("switches", [(), (3,), (5,), (6,), (5, 6), (3, 5, 7), (7, 8)])
def test_a_log_that_is_given_up(folder: Folder, kept: int, switches: tuple[int, ...]) -> None:
    """Up to `kept` it stays, behind it goes, and followers find their way in either case."""
    adapter = folder.new()
    early = adapter.follow(0)
    for lsn in range(1, 8):
        if lsn in switches:
            adapter.switch(lsn, folder.durable)
        folder.append(adapter, lsn)
        if lsn == 4:
            folder.sync(adapter)
    behind = adapter.follow(0)
    assert [item.lsn for item in early.read(4)] == [1, 2, 3, 4]
    adapter.retire(4, kept, 10)
    for lsn in range(kept + 1, 8):
        del folder.written[lsn]
    folder.append(adapter, 10, 11)
    adapter.switch(12, 11)
    folder.append(adapter, 12)
    folder.sync(adapter)
    for follower, first in (
        (early, 5),
        (behind, 1),
        (adapter.follow(0), 1),
        (adapter.follow(11), 12),
    ):
        folder.check(list(follower.read(12)), first)
    folder.check(folder.recover())
    assert [*adapter.verify(12)] == []


def test_given_up_again_and_again(folder: Folder) -> None:
    adapter = folder.new()
    follower = adapter.follow(0)
    seen: list[LoggedOperation] = []
    lsn = 1
    for round_ in range(6):
        folder.append(adapter, lsn, lsn + 1)
        folder.sync(adapter)
        folder.append(adapter, lsn + 2, lsn + 3)
        keep = lsn + 1 + round_ % 3
        adapter.retire(lsn + 1, keep, lsn + 9)
        for lost in range(keep + 1, lsn + 4):
            del folder.written[lost]
        folder.durable = keep
        if round_ % 2:
            seen += follower.read(keep)
        lsn += 9
    folder.append(adapter, lsn)
    folder.sync(adapter)
    seen += follower.read(lsn)
    folder.check(seen)
    folder.check(folder.recover())


# ---------------------------------------------------------------- followers


def test_a_follower_reads_no_further_than_asked(folder: Folder) -> None:
    adapter = folder.new()
    folder.append(adapter, *range(1, 60))
    follower = adapter.follow(0)
    for until in (1, 1, 2, 30, 29, 31, 59):
        before = until if until <= 1 else None
        found = [item.lsn for item in follower.read(until)]
        assert found == sorted(found)
        assert not found or found[-1] == until or before
    assert list(follower.read(59)) == []


def test_following_the_data_log_where_the_index_log_is_gone(folder: Folder) -> None:
    adapter = folder.new()
    folder.append(adapter, *range(1, 100))
    folder.sync(adapter)
    adapter.finish(99)
    for number in folder.numbers(layout.INDEX):
        folder.file(number, layout.INDEX).unlink()
    reader = folder.adapter()
    folder.check(list(reader.recover(0, 99)))
    reader.start(100, 99)
    folder.append(reader, 100, 101)
    folder.sync(reader)
    folder.check(list(reader.follow(0).read(101)))
    folder.check(list(reader.follow(40).read(101)), 41)


def test_a_follower_whose_place_is_gone(folder: Folder) -> None:
    adapter = folder.new()
    folder.append(adapter, 1, 2)
    slow = adapter.follow(0)
    for lsn in range(3, 9):
        adapter.switch(lsn, lsn - 1)
        folder.append(adapter, lsn)
    folder.sync(adapter)
    nothing = np.empty(0, np.int64)
    adapter.drop_below(6, nothing, nothing)
    with pytest.raises(LogGone):
        list(slow.read(8))
    with pytest.raises(LogGone):
        adapter.follow(2)
    folder.check(list(adapter.follow(6).read(8)), 7)
    folder.check(folder.recover(after=6), 7)
    with pytest.raises(CorruptionError, match="lsn 3 on are needed"):
        folder.recover(after=2)


def test_a_follower_whose_index_log_was_dropped(folder: Folder) -> None:
    """The data log stays for its payloads; where it was given up, it does not lead on."""
    adapter = folder.new()
    folder.append(adapter, 1, 2)
    folder.sync(adapter)
    slow = adapter.follow(2)
    adapter.retire(2, 2, 5)
    folder.append(adapter, 5, 6)
    folder.sync(adapter)
    folder.file(1, layout.INDEX).unlink()
    with pytest.raises(LogGone):
        list(slow.read(6))
    folder.check(list(adapter.follow(2).read(6)), 5)


def test_skipping_across_a_switch(folder: Folder) -> None:
    adapter = folder.new()
    follower = adapter.follow(0)
    for lsn in range(1, 40):
        folder.append(adapter, lsn)
        follower.skip(lsn, folder.places[lsn].cursor)
    folder.append(adapter, 40)
    folder.check(list(follower.read(40)), 40)


# ---------------------------------------------------------------- what is kept


def test_payloads_keep_their_files(folder: Folder) -> None:
    adapter = folder.new()
    for lsn in range(1, 8):
        folder.append(adapter, lsn, rows=2)
        adapter.switch(lsn + 1, lsn)
    folder.sync(adapter)
    live = [folder.places[2].location, folder.places[5].location]
    adapter.drop_below(7, np.array([2, 5]), np.array(live))
    assert folder.numbers() == [2, 5, 8]
    assert folder.numbers(layout.INDEX) == [8]
    for lsn in (2, 5):
        lengths = folder.written[lsn].operation.lengths
        places = places_of(folder.places[lsn].location, lengths)
        pin = adapter.pin(ids_of(folder.written[lsn]), places, lengths)
        assert [bytes(pin.read(i)) for i in range(2)] == rows_of(folder.written[lsn])
    with pytest.raises(LogGone):
        adapter.pin(np.array([3]), np.array([folder.places[3].location]), np.array([9], np.uint32))
    folder.append(adapter, 8)
    folder.sync(adapter)
    folder.check(folder.recover(after=7), 8)


def test_small_logs_are_merged_where_they_are_many(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A log that holds more than all the smaller ones together stays."""
    monkeypatch.setattr(adapter_module, "_PIECES", 8)
    monkeypatch.setattr(adapter_module, "_SPARSE", 0)
    adapter = folder.new(FileSettings(initial_bytes=1 << 14, segment_bytes=1 << 26))
    rows = {1: 3, 2: 60, 3: 3, 4: 3, 5: 250, 6: 3, 7: 0, 8: 3}  # by LSN
    for lsn, n in rows.items():
        folder.append(adapter, lsn, rows=n)
        adapter.switch(lsn + 1, lsn)

    def merged() -> list[int]:
        """LSNs whose rows are to be moved."""
        live = [lsn for lsn, n in rows.items() if n]
        lengths = [folder.written[lsn].operation.lengths for lsn in live]
        places = [
            places_of(folder.places[lsn].location, each)
            for lsn, each in zip(live, lengths, strict=True)
        ]
        moving = adapter.survivors(np.concatenate(places), np.concatenate(lengths))
        owners = np.repeat(live, [len(each) for each in lengths])
        return [lsn for lsn in live if moving[owners == lsn].all()]

    assert merged() == [1, 3, 4, 6, 8]
    assert not adapter.is_scattered()
    folder.append(adapter, 9, rows=58)
    adapter.switch(10, 9)
    assert adapter.is_scattered()
    rows[9] = 58
    assert merged() == [1, 2, 3, 4, 6, 8, 9]
    monkeypatch.setattr(adapter_module, "_PIECES", 16)
    assert merged() == []
    assert not adapter.is_scattered()


# ---------------------------------------------------------------- torn, damaged, cut, missing


def crashed(folder: Folder, *, synced: int, written: int) -> tuple[Path, int]:
    """A log whose last operations were not synced; its file, and where these begin."""
    adapter = folder.new(FileSettings(initial_bytes=1 << 17))
    folder.append(adapter, *range(1, synced + 1))
    folder.sync(adapter)
    at = folder.words[1]
    folder.append(adapter, *range(synced + 1, written + 1))
    return folder.file(1), at


@pytest.mark.parametrize("hole", [0, 8, 100])
def test_a_torn_tail_is_left_out_and_overwritten(folder: Folder, hole: int) -> None:
    path, at = crashed(folder, synced=5, written=8)
    raw = bytearray(path.read_bytes())
    raw[at + hole : at + hole + 24] = bytes(24)
    path.write_bytes(raw)
    for lsn in (6, 7, 8):
        del folder.written[lsn]
    reader = folder.adapter()
    folder.check(list(reader.recover(0, 0)))
    torn, operations = reader.torn()
    assert torn > 0
    assert operations == 1
    reader.start(20, 5)
    assert path.stat().st_size == at
    folder.append(reader, 20)
    folder.sync(reader)
    folder.check(folder.recover())
    folder.check(list(reader.follow(0).read(20)))


def test_a_witness_makes_damage_of_a_torn_tail(folder: Folder) -> None:
    path, at = crashed(folder, synced=5, written=8)
    raw = bytearray(path.read_bytes())
    raw[at + 10] ^= 1
    path.write_bytes(raw)
    before = path.read_bytes()
    with pytest.raises(CorruptionError, match=f"at offset {at}") as caught:
        folder.recover(durable=6)
    assert (caught.value.path, caught.value.offset, caught.value.lsn) == (str(path), at, 6)
    assert path.read_bytes() == before


def test_a_later_frame_that_says_so_makes_damage_of_it(folder: Folder) -> None:
    """Valid frames behind a bad one prove nothing, unless they say that it had been durable."""
    path, at = crashed(folder, synced=5, written=6)
    adapter = folder._made[0]
    folder.sync(adapter)
    folder.append(adapter, 7)  # written when 6 was known to be durable
    raw = bytearray(path.read_bytes())
    raw[at + 10] ^= 1
    path.write_bytes(raw)
    with pytest.raises(CorruptionError) as caught:
        folder.recover(durable=0)
    assert caught.value.lsn == 6


@pytest.mark.parametrize("log", [layout.DATA])
def test_a_cut_file(folder: Folder, log: str) -> None:
    """Sizes are made durable before a file is used, so a short one was cut."""
    path, at = crashed(folder, synced=5, written=6)
    good = path.read_bytes()
    for end in (0, 100, 4096, at - 8, at, at + 8, len(good) - 4096, len(good) - 1):
        path.write_bytes(good[:end])
        with pytest.raises(CorruptionError, match="cut") as caught:
            folder.recover()
        assert caught.value.path == str(path)
    path.write_bytes(good)
    folder.check(folder.recover())


def test_a_missing_file(folder: Folder, tmp_path: Path) -> None:
    adapter = folder.new()
    for lsn in range(1, 7):
        folder.append(adapter, lsn)
        folder.sync(adapter)
        adapter.switch(lsn + 1, lsn)
    for lost in folder.numbers():
        copy = Folder(tmp_path / f"copy{lost}")
        shutil.copytree(folder.path, copy.path, dirs_exist_ok=True)
        copy.file(lost).unlink()
        with pytest.raises(CorruptionError) as caught:
            copy.recover(durable=6)
        assert caught.value.path is not None
        assert caught.value.path.startswith(str(copy.path))
        copy.close()


def test_a_file_of_another_buffer(folder: Folder, tmp_path: Path) -> None:
    adapter = folder.new()
    folder.append(adapter, 1)
    folder.sync(adapter)
    other = FilePersistenceAdapter(
        TINY, PersistenceContext(folder.path, bytes(16), FileSystem(), [0] * 8)
    )
    with pytest.raises(CorruptionError, match="another buffer"):
        list(other.recover(0, 0))
    shutil.copy(folder.file(1), folder.file(2))
    with pytest.raises(CorruptionError, match="copied or renamed"):
        folder.recover()


def test_a_tail_that_cannot_be_read_is_not_taken_for_unused_room(folder: Folder) -> None:
    """Zeros stand for what the disk does not give back, and zeros are what unused room holds."""
    adapter = folder.new()
    folder.append(adapter, 1, rows=1, body_bytes=16, row_bytes=24)
    for lsn in range(2, 200):  # up to one that ends where a sector does
        folder.append(adapter, lsn, rows=1, body_bytes=16, row_bytes=24)
        end = folder.words[1]
        if end % 512 == 0:
            break
    folder.append(adapter, lsn + 1)
    folder.file(1, layout.INDEX).unlink()
    for start, lost in ((end, True), (end + 4096, False)):
        with unreadable(folder.file(1), start):
            found = list(folder.adapter().salvage(0))
        damage = [item for item in found if isinstance(item, Damage)]
        assert [item.lsn for item in found if isinstance(item, LoggedOperation)][:lsn] == [
            *range(1, lsn + 1)
        ]
        assert any(place.torn and place.first_lsn == lsn + 1 for place in damage) == lost


def test_a_header_that_is_wrong_says_where(folder: Folder) -> None:
    """A checksum that does not match is told with both; a right one is no reason to believe it."""
    folder.new()
    path = folder.file(1)
    right = path.read_bytes()

    def refused(at: int, value: int, *, sealed: bool) -> CorruptionError:
        raw = bytearray(right)
        raw[at] = value
        if sealed:
            raw[72:76] = crc32(raw[:72]).to_bytes(4, "little")
        path.write_bytes(raw)
        with pytest.raises(CorruptionError) as caught:
            folder.recover()
        return caught.value

    assert "checksum mismatch" in str(refused(40, 1, sealed=False))
    error = refused(2000, 1, sealed=False)
    assert (error.offset, "0x01 at offset 2000" in str(error)) == (2000, True)
    assert "another buffer or place" in str(refused(12, 5, sealed=True))  # which log


def test_starting_anew_drops_what_was_left_out(folder: Folder) -> None:
    adapter = folder.new()
    folder.append(adapter, 1, 2)
    folder.sync(adapter)
    adapter.prepare()
    adapter.install_prepared()
    (folder.path / "experience_data.000009.wal.77.tmp").write_bytes(b"half")
    reader = folder.adapter()
    folder.check(list(reader.recover(0, 2)))
    reader.start(3, 2)
    assert folder.numbers() == [1, 3]
    assert folder.numbers(layout.INDEX) == [3]
    assert [name for name in os.listdir(folder.path) if name.endswith(".tmp")] == []
    folder.append(reader, 3)
    folder.sync(reader)
    folder.check(folder.recover())


def test_an_ended_log_gives_back_what_it_has_not_used(folder: Folder) -> None:
    adapter = folder.new()
    nothing = np.empty(0, np.int64)
    folder.append(adapter, 1, 2, 3)
    folder.sync(adapter)
    adapter.switch(4, 3)
    folder.append(adapter, 4, 5)
    adapter.drop_below(0, nothing, nothing)  # the end marker may not be on the disk yet
    first = folder.file(1)
    reserved = first.stat().st_size
    end = layout.HEADER_BYTES + len(first.read_bytes()[layout.HEADER_BYTES :].rstrip(b"\0"))
    assert reserved - end > 1 << 12
    folder.sync(adapter)
    adapter.drop_below(0, nothing, nothing)
    assert end <= first.stat().st_size < end + 8
    assert not list(adapter.verify(5))
    folder.check(list(adapter.follow(0).read(5)))
    adapter.drop_below(0, nothing, nothing)  # nothing more to do
    folder.append(adapter, 6)
    folder.sync(adapter)
    folder.check(folder.recover(durable=6))


def test_a_clean_end_is_part_of_the_log(folder: Folder) -> None:
    adapter = folder.new()
    folder.append(adapter, *range(1, 30))
    adapter.finish(29)
    folder.check(folder.recover(durable=29))
    last = folder.file(folder.numbers()[-1])
    raw = last.read_bytes()
    assert len(raw) < 1 << 14  # trimmed
    last.write_bytes(raw[:-8])
    with pytest.raises(CorruptionError, match="cut"):
        folder.recover(durable=29)


@pytest.mark.parametrize("log", [layout.DATA, layout.INDEX])
def test_what_is_read_together_is_what_is_read_one_by_one(folder: Folder, log: str) -> None:
    """Whatever byte is changed, and wherever the file ends: the same operations, or fewer."""
    adapter = folder.new()
    for lsn in range(1, 56):
        item = alike(lsn, (1, 0, 2)[(lsn // 20) % 3], row_bytes=60)
        (folder.places[lsn],) = adapter.append([item], 0)
        folder.written[lsn] = item
    folder.sync(adapter)
    path, rows = folder.file(1, log), log == layout.DATA
    data = bytearray(path.read_bytes())

    def both(end: int) -> tuple[list[LoggedOperation], list[LoggedOperation], list[int]]:
        """Of the frames before `end`, read one by one and together; and where each ends."""
        slow, fast, ends = [], [], []
        file = LogFile(folder.path, log, 1, UUID)
        start = at = begin.end
        for found in file.frames(at, end, rows=rows):
            if not isinstance(found, Frame):
                break
            slow.append(file.operation(found))
            ends.append(found.end)
        while True:
            items, at = file.alike(at, end, rows=rows, lsn=len(fast) + 1)
            if not items:
                break
            fast += one_by_one(items)
            assert [start, *ends][len(fast)] == at
        return slow, fast, ends

    file = LogFile(folder.path, log, 1, UUID)
    begin = file.begin()
    assert begin is not None
    end = file.size()
    slow, fast, ends = both(end)
    folder.check(slow)
    folder.check(fast)
    for i, cut in enumerate(ends):
        assert [len(found) for found in both(cut)] == [i + 1] * 3
        assert [len(found) for found in both(cut - 1)] == [i] * 3
    for at in range(begin.end, ends[-1], 13):
        data[at] ^= 1 << at % 8
        path.write_bytes(data)
        slow, fast, _ = both(end)
        assert [item.lsn for item in slow] == [item.lsn for item in fast]
        assert len(slow) == sum(end <= at for end in ends)
        data[at] ^= 1 << at % 8


@pytest.mark.parametrize("fails", [False, True])
def test_rows_that_come_from_the_disk_are_announced(
    fails: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are the same; the system knows of them before they are read one by one."""
    announced: list[tuple[int, int]] = []

    def advise(fd: int, offset: int, length: int, advice: int) -> None:
        assert advice == os.POSIX_FADV_WILLNEED
        announced.append((offset, length))
        if fails:
            raise OSError(errno.EIO, "no")

    monkeypatch.setattr(following, "_COLD_S", -1.0)  # everything seems to
    monkeypatch.setattr(os, "posix_fadvise", advise)
    values = np.arange(40, dtype=np.float32)
    with ExperienceBuffer.open(tmp_path / "memory", index="exact") as buffer:
        buffer.add_many({"v_embed": np.repeat(values[:, None], 4, axis=1)})
        batch = buffer.sample(40, replace=False, uniform=True)
        np.testing.assert_array_equal(batch.v_embed[:, 0], values[batch.ids])
        assert len(announced) == 40 - 8
        assert buffer.get(3).v_embed is not None
        assert len(announced) == 40 - 8, "a single one has nothing to announce"


def test_a_log_is_found_while_another_thread_forgets_what_it_knew_of_it(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A snapshot drops logs, and a failed sync retires one, in threads of their own."""
    adapter = folder.new()
    folder.append(adapter, *range(1, 60), row_bytes=2000)
    folder.sync(adapter)
    assert len(folder.numbers()) > 3
    known = adapter._logs.chain

    def chain(after_lsn: int) -> Any:
        found = known(after_lsn)
        adapter._logs.begins.clear()
        return found

    monkeypatch.setattr(adapter._logs, "chain", chain)
    folder.check(list(adapter.follow(10).read(59)), 11)
    adapter.drop_below(20, *(np.empty(0, np.int64) for _ in range(2)))
    assert not [problem for problem in adapter.verify(59) if problem.damage]
    adapter.retire(59, 59, 60)
    folder.append(adapter, *range(60, 65))
    folder.check(list(adapter.follow(30).read(64)), 31)


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs /proc")
@pytest.mark.parametrize("mode", ["r", "a"])
def test_what_another_process_deletes_gives_its_room_back(tmp_path: Path, mode: str) -> None:
    """A process that reads, or writes now and then, keeps no logs that are gone."""
    path = tmp_path / "memory"
    sizes = {"file": {"initial_bytes": 1 << 14, "segment_bytes": 1 << 14}}
    config = {"max_size": 20, "index": {"builder": "off"}, "persistence": sizes}

    def deleted() -> int:
        found = 0
        for fd in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):
                name = os.readlink(f"/proc/self/fd/{fd}")
                found += name.startswith(f"{path}/experience_data") and "(deleted)" in name
        return found

    columns = {"v_embed": np.ones((20, 4), np.float32), "answer": ["x" * 500] * 20}
    with ExperienceBuffer.open(path, config=config) as writer:
        writer.add_many(columns)
        with ExperienceBuffer.open(path, mode=mode, config=config) as other:
            for turn in range(20):
                writer.add_many(columns)
                assert len(other.sample(20, uniform=True).experiences) == 20
                if mode == "a" and turn % 2:
                    other.add_many(columns)
                writer.save_snapshot()
                assert deleted() <= 8
            assert len(list(path.glob("experience_data.*"))) < 8


@pytest.mark.parametrize("wrong", [{"initial_bytes": 2**64}, {"segment_bytes": True}])
def test_sizes_that_are_none_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        FileSettings.model_validate(wrong)
