"""The crash explorer itself: it passes what is right and catches every planted bug."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import struct
import tempfile
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from expbuf_core.errors import StorageFull
from expbuf_core.filesystem import FileSystem, storage_errors
from expbuf_core.testing.crash import CrashStates, Exploration, explore, record
from expbuf_core.testing.crash_disk import PAGE, Image
from expbuf_core.testing.faults import FaultyFileSystem
from expbuf_core.testing.recording import (
    Created,
    FolderSynced,
    NoFolderSync,
    NoFsync,
    Recording,
    RecordingFileSystem,
    RenameBeforeSync,
    Renamed,
    Synced,
    Unlinked,
    WriteInPlace,
    Written,
)

# ---------------------------------------------------------------- two toy stores


class ToyLog:
    """Appends numbers to a log; each entry fills a sector, so that stale ones line up."""

    ENTRY = 512

    def __init__(
        self,
        fs: FileSystem,
        folder: Path,
        *,
        sync_names: bool = True,
        keep_tail: bool = False,
    ) -> None:
        self.fs = fs
        path = folder / "log"
        if not path.exists():
            fs.mkdir(folder)
            fd = fs.open(path, create=True)
            fs.fsync(fd)
            if sync_names:
                fs.sync_folder(folder)
                fs.sync_folder(folder.parent)
        else:
            fd = fs.open(path)
        self.fd = fd
        self.values = list(self.read(folder))
        self.end = len(self.values) * self.ENTRY
        if not keep_tail and os.fstat(fd).st_size > self.end:
            fs.truncate(fd, self.end)
            fs.fsync(fd)

    @classmethod
    def read(cls, folder: Path) -> Iterator[int]:
        with contextlib.suppress(FileNotFoundError):
            data = (folder / "log").read_bytes()
            for at in range(0, len(data), cls.ENTRY):
                entry = data[at : at + cls.ENTRY]
                if len(entry) < cls.ENTRY:
                    return
                value, crc = struct.unpack_from("<QI", entry)
                if not crc or crc != zlib.crc32(entry[:8] + entry[12:]):
                    return
                yield value

    def write(self, value: int) -> None:
        body = bytes([value % 255 + 1]) * (self.ENTRY - 12)
        head = struct.pack("<Q", value)
        entry = head + struct.pack("<I", zlib.crc32(head + body)) + body
        self.fs.pwrite(self.fd, entry, self.end)
        self.end += self.ENTRY

    def sync(self) -> None:
        self.fs.fdatasync(self.fd)

    def close(self) -> None:
        self.fs.close(self.fd)


class ToyDocument:
    """One number in a file that is replaced as a whole."""

    @staticmethod
    def put(fs: FileSystem, folder: Path, value: int) -> None:
        body = b"%d," % value * 3000  # several pages
        fs.write_atomically(folder / "document", [struct.pack("<I", zlib.crc32(body)), body])

    @staticmethod
    def get(folder: Path) -> int:
        try:
            data = (folder / "document").read_bytes()
        except FileNotFoundError:
            return 0
        assert zlib.crc32(data[4:]) == struct.unpack_from("<I", data)[0], "document is damaged"
        return int(data[4:].split(b",")[0])


Ack = Any


def log_workload(
    *, ack_first: bool = False, batch: int = 1, **options: Any
) -> Callable[[RecordingFileSystem, Path, Ack], None]:
    def run(fs: RecordingFileSystem, folder: Path, ack: Ack) -> None:
        log = ToyLog(fs, folder, **options)
        first = log.values[-1] + 1 if log.values else 1
        for begin in range(first, first + 12, batch):
            values = range(begin, begin + batch)
            for value in values:
                ack.start(value)
                log.write(value)
            if ack_first:
                for value in values:
                    ack(value)
            log.sync()
            if not ack_first:
                for value in values:
                    ack(value)
        log.close()

    return run


def log_check(folder: Path, acknowledged: Sequence[int], started: Sequence[int]) -> None:
    values = list(ToyLog.read(folder))
    assert values == list(started)[: len(values)], f"no prefix: {values}"
    assert len(values) >= len(acknowledged), f"{len(acknowledged)} acknowledged, {values} found"


def document_workload(fs: RecordingFileSystem, folder: Path, ack: Ack) -> None:
    fs.mkdir(folder)
    fs.sync_folder(folder.parent)
    for value in range(1, 8):
        ack.start(value)
        ToyDocument.put(fs, folder, value)
        ack(value)


def document_check(folder: Path, acknowledged: Sequence[int], started: Sequence[int]) -> None:
    value = ToyDocument.get(folder)
    assert max(acknowledged, default=0) <= value <= max(started, default=0)


# ---------------------------------------------------------------- right and wrong stores


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("batch", [1, 4])
def test_right_log_passes(seed: int, batch: int) -> None:
    result = explore(log_workload(batch=batch), log_check, states=400, seed=seed)
    result.raise_for_failures()
    assert result.states > 100
    assert {"strict", "kill", "mixture"} <= set(result.kinds)
    assert any(kind.startswith("torn") for kind in result.kinds)


@pytest.mark.parametrize("seed", range(3))
def test_right_document_passes(seed: int) -> None:
    result = explore(document_workload, document_check, states=400, seed=seed)
    result.raise_for_failures()
    assert result.states > 150


def caught(result: Exploration) -> bool:
    for failure in result.failures:
        assert failure.name.split("/")[0] in failure.description
    return bool(result.failures)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("workload", "broken"),
    [
        (log_workload(), NoFsync),
        (log_workload(), NoFolderSync),
        (log_workload(batch=3), NoFsync),
        (log_workload(ack_first=True), None),
        (log_workload(sync_names=False), None),
    ],
    ids=["no fsync", "no folder sync", "no fsync, batches", "ack before fsync", "no names"],
)
def test_wrong_log_is_caught(
    workload: Any, broken: type[RecordingFileSystem] | None, seed: int
) -> None:
    assert caught(explore(workload, log_check, states=200, seed=seed, broken=broken))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("broken", [NoFsync, NoFolderSync, RenameBeforeSync, WriteInPlace])
def test_wrong_document_is_caught(broken: type[RecordingFileSystem], seed: int) -> None:
    result = explore(document_workload, document_check, states=200, seed=seed, broken=broken)
    assert caught(result)


def crash_twice(keep_tail: bool, seed: int) -> int:
    """Crash, recover, write on (one commit a sync), crash again: failures of the second crash."""
    failures = 0
    rng = random.Random(seed)

    def check(folder: Path, acknowledged: Sequence[int], started: Sequence[int]) -> None:
        nonlocal failures
        log_check(folder, acknowledged, started)
        if not folder.exists() or rng.random() < 0.75:
            return
        survived = list(ToyLog.read(folder))

        def on(fs: RecordingFileSystem, folder: Path, ack: Ack) -> None:
            log = ToyLog(fs, folder, keep_tail=keep_tail)
            for value in (100, 101):
                ack.start(value)
                log.write(value)
                log.sync()
                ack(value)
            log.close()

        def check_again(folder: Path, acknowledged: Sequence[int], started: Sequence[int]) -> None:
            log_check(folder, [*survived, *acknowledged], [*survived, *started])

        again = explore(on, check_again, states=15, seed=seed, initial=folder)
        failures += len(again.failures)

    explore(log_workload(batch=6), check, states=150, seed=seed).raise_for_failures()
    return failures


def test_crash_recover_write_crash() -> None:
    # A tail of valid entries behind a hole comes back to life once the hole is filled.
    assert crash_twice(keep_tail=False, seed=1) == 0
    assert crash_twice(keep_tail=True, seed=1) > 0


def test_failure_is_reproducible() -> None:
    result = explore(log_workload(), log_check, states=100, seed=5, broken=NoFsync)
    first = result.failures[0]
    again = explore(log_workload(), log_check, states=1, seed=5, broken=NoFsync, only=first.name)
    assert again.states == 1
    assert str(again.failures[0].error) == str(first.error)
    assert first.name in result.report()
    with pytest.raises(AssertionError, match="broke a promise"):
        result.raise_for_failures()


def test_failing_folder_is_kept(tmp_path: Path) -> None:
    explore(log_workload(), log_check, states=60, broken=NoFsync, keep=tmp_path)
    assert (tmp_path / "buffer").is_dir()


# ---------------------------------------------------------------- what the recorder sees


@pytest.fixture
def root() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def strict(recording: Recording) -> Image:
    """Only what is durable at the end."""
    states = CrashStates(recording, states=10)
    return states.state(f"{len(recording.events)}/strict/0").image


def everything(recording: Recording) -> Image:
    states = CrashStates(recording, states=10)
    return states.state(f"{len(recording.events)}/kill/0").image


def content(image: Image, path: str) -> bytes:
    held = image.files[path]
    data = bytearray(held.size)
    for number, page in held.pages.items():
        piece = page[: max(0, held.size - number * PAGE)]
        data[number * PAGE : number * PAGE + len(piece)] = piece
    return bytes(data)


def test_log_of_events(root: Path) -> None:
    fs = RecordingFileSystem(root)
    fs.mkdir(root / "a" / "b")
    fd = fs.open(root / "a" / "b" / "one", create=True)
    fs.pwritev(fd, [b"12", b"34"], 1)
    fs.fsync(fd)
    fs.replace(root / "a" / "b" / "one", root / "a" / "two")
    fs.pwrite(fd, b"z", 0)  # through the descriptor, under the new name
    fs.close(fd)
    fs.sync_folder(root / "a")
    fs.unlink(root / "a" / "two")
    fs.unlink(root / "a" / "never")
    kinds = [type(event) for event in fs.recording.events]
    assert kinds == [
        *(Created, Created, Created, Written, Synced),
        *(Renamed, Written, FolderSynced, Unlinked),
    ]
    assert not (root / "a" / "two").exists()


def test_size_and_content_follow_the_real_file(root: Path) -> None:
    rng = random.Random(3)
    fs = RecordingFileSystem(root)
    paths = [root / name for name in "abc"]
    fds = [fs.open(path, create=True) for path in paths]
    for _ in range(300):
        fd = rng.choice(fds)
        match rng.randrange(6):
            case 0:
                fs.truncate(fd, rng.randrange(3 * PAGE))
            case 1:
                fs.fdatasync(fd)
            case 2:
                fs.pwrite(fd, bytes(rng.randrange(PAGE)), rng.randrange(3 * PAGE))
            case _:
                data = rng.randbytes(rng.randrange(1, 2 * PAGE))
                fs.pwrite(fd, data, rng.randrange(3 * PAGE))
    image = everything(fs.recording)
    for path in paths:
        assert content(image, path.name) == path.read_bytes()
    for fd in fds:
        fs.fsync(fd)
        fs.close(fd)
    assert strict(fs.recording).files == {}  # no name is durable
    fs.sync_folder(root)
    image = strict(fs.recording)
    for path in paths:
        assert content(image, path.name) == path.read_bytes()


def test_what_a_folder_held_is_durable(root: Path) -> None:
    (root / "sub").mkdir()
    (root / "sub" / "old").write_bytes(b"old" * 3000)
    fs = RecordingFileSystem(root)
    fd = fs.open(root / "sub" / "old")
    fs.pwrite(fd, b"new", 0)
    fs.close(fd)
    assert content(strict(fs.recording), "sub/old") == b"old" * 3000
    assert content(everything(fs.recording), "sub/old") == b"new" + b"old" * 2999


def test_files_of_others_are_adopted_as_not_durable(root: Path) -> None:
    fs = RecordingFileSystem(root)
    (root / "x").write_bytes(b"abc")
    fs.replace(root / "x", root / "y")
    fs.sync_folder(root)
    assert content(everything(fs.recording), "y") == b"abc"
    assert content(strict(fs.recording), "y") == b""


def test_a_sync_covers_what_was_written_before_it(root: Path) -> None:
    class Slow(RecordingFileSystem):
        def _synced(self, fd: int, upto: int, *, failed: bool = False) -> None:
            begun.set()
            written.wait(10)
            super()._synced(fd, upto, failed=failed)

    begun, written = threading.Event(), threading.Event()
    fs = Slow(root)
    fd = fs.open(root / "f", create=True)
    fs.sync_folder(root)
    fs.pwrite(fd, b"a", 0)
    thread = threading.Thread(target=fs.fdatasync, args=(fd,))
    thread.start()
    begun.wait(10)
    fs.pwrite(fd, b"b", 1)
    written.set()
    thread.join()
    fs.close(fd)
    assert content(strict(fs.recording), "f") == b"a"


def test_after_a_failed_sync_pages_stay_lost(root: Path) -> None:
    recorder = RecordingFileSystem(root)
    fs = FaultyFileSystem(recorder)
    fd = fs.open(root / "f", create=True)
    fs.sync_folder(root)
    fs.pwrite(fd, b"a" * PAGE * 2, 0)
    fs.fail_sync(drop=False)
    with pytest.raises(OSError, match="simulated"):
        fs.fdatasync(fd)
    fs.pwrite(fd, b"b", 0)  # dirties the first page again, not the second
    fs.fdatasync(fd)
    fs.close(fd)
    data = content(strict(recorder.recording), "f")
    assert data[:PAGE] == b"b" + b"a" * (PAGE - 1)
    assert data[PAGE:].strip(b"\0") == b""


def test_lost_folder_takes_its_files_along(root: Path) -> None:
    fs = RecordingFileSystem(root)
    fs.mkdir(root / "d")
    fd = fs.open(root / "d" / "f", create=True)
    fs.fsync(fd)
    fs.close(fd)
    fs.sync_folder(root / "d")
    assert strict(fs.recording).files == {}
    fs.sync_folder(root)
    assert list(strict(fs.recording).files) == ["d/f"]


def test_rename_of_a_folder(root: Path) -> None:
    fs = RecordingFileSystem(root)
    fs.mkdir(root / "aside")
    fd = fs.open(root / "aside" / "f", create=True)
    fs.close(fd)
    fs.sync_folder(root / "aside")
    fs.sync_folder(root)
    fs.replace(root / "aside", root / "final")
    assert list(strict(fs.recording).files) == ["aside/f"]
    assert list(everything(fs.recording).files) == ["final/f"]


def test_volatile_and_lock_files(root: Path) -> None:
    fs = RecordingFileSystem(root)
    fs.mkdir(root / "locks")
    (root / "locks" / "append").write_bytes(b"")
    (root / "control").write_bytes(b"1")
    fs.mark("first")
    (root / "control").write_bytes(b"2")  # as if mapped: without any call
    fs.mark("second")
    fd = fs.open(root / "f", create=True)
    fs.close(fd)
    assert content(everything(fs.recording), "control") == b"2"
    assert everything(fs.recording).folders == ["locks"]
    found = set()
    for state in CrashStates(fs.recording, states=400):
        held = "control" in state.image.files
        assert state.volatile == ["control"] * held
        found.add((state.rebooted, content(state.image, "control") if held else None))
        assert not any(path.startswith("locks/") for path in state.image.files)
    assert {(False, b"2"), (True, None)} <= found
    assert found <= {
        *((False, None), (False, b"2"), (True, None)),
        *((True, b"1"), (True, b"2")),
    }


def test_renames_are_atomic_and_subsets_occur(root: Path) -> None:
    (root / "a").write_bytes(b"new")
    (root / "b").write_bytes(b"old")
    fs = RecordingFileSystem(root)
    fs.replace(root / "a", root / "b")
    fs.unlink(root / "c")
    found = set()
    for state in CrashStates(fs.recording, states=50):
        names = {path: content(state.image, path) for path in state.image.files}
        found.add(tuple(sorted(names.items())))
    assert found == {(("a", b"new"), ("b", b"old")), (("b", b"new"),)}


def test_pages_are_written_back_in_any_order(root: Path) -> None:
    (root / "f").write_bytes(b"0" * 3 * PAGE)
    fs = RecordingFileSystem(root)
    fd = fs.open(root / "f")
    for number, mark in enumerate((b"1", b"2", b"3")):
        fs.pwrite(fd, mark * PAGE, number * PAGE)
    fs.close(fd)
    found = {
        tuple(content(state.image, "f")[at] for at in range(0, 3 * PAGE, PAGE))
        for state in CrashStates(fs.recording, states=300)
    }
    assert (48, 48, 51) in found
    assert (49, 48, 51) in found
    assert (48, 50, 51) in found


def test_states_are_alike_for_one_seed_and_differ_from_each_other(root: Path) -> None:
    recording = record(log_workload(batch=4), root)
    names = [
        (state.name, state.image.fingerprint()) for state in CrashStates(recording, states=300)
    ]
    again = [
        (state.name, state.image.fingerprint()) for state in CrashStates(recording, states=300)
    ]
    other = [
        (state.name, state.image.fingerprint())
        for state in CrashStates(recording, states=300, seed=1)
    ]
    assert names == again != other
    assert len({name for name, _ in names}) == len(names)


def test_images_can_be_written(root: Path, tmp_path: Path) -> None:
    recording = record(log_workload(batch=4), root)
    for number, state in enumerate(CrashStates(recording, states=40)):
        place = tmp_path / str(number)
        place.mkdir()
        state.image.materialise(place)
        found = {
            str(path.relative_to(place)): path.read_bytes()
            for path in place.rglob("*")
            if path.is_file()
        }
        assert found == {path: content(state.image, path) for path in state.image.files}


def test_torn_writes_are_cut_at_sectors_and_elsewhere(root: Path) -> None:
    fs = RecordingFileSystem(root)
    fd = fs.open(root / "f", create=True)
    fs.sync_folder(root)
    fs.pwrite(fd, b"x" * 2000, 100)
    fs.close(fd)
    sizes = {
        state.image.files["f"].size
        for state in CrashStates(fs.recording, states=200)
        if state.name.split("/")[1] == "torn-everything"
    }
    lengths = {
        len(content(state.image, "f").rstrip(b"\0"))
        for state in CrashStates(fs.recording, states=200)
        if state.name.split("/")[1].startswith("torn")
    }
    assert sizes
    assert lengths & {512, 1024, 1536}
    assert any(length % 512 for length in lengths)
    assert max(lengths) < 2100


# ---------------------------------------------------------------- faults


def test_sync_fails_once_and_drops_what_was_not_synced(root: Path) -> None:
    fs = FaultyFileSystem()
    fd = fs.open(root / "f", create=True)
    fs.pwrite(fd, b"safe", 0)
    fs.fdatasync(fd)
    fs.fail_sync(2)
    fs.pwrite(fd, b"SAFE", 0)
    fs.fsync(fd)
    fs.pwrite(fd, b"lost", 2)
    with pytest.raises(OSError, match="simulated") as caught_error:
        fs.fdatasync(fd)
    assert caught_error.value.errno == errno.EIO
    fs.fdatasync(fd)  # and claims that all is well
    fs.close(fd)
    # The size stays: only the pages were forgotten.
    assert (root / "f").read_bytes() == b"SAFE\0\0"


def test_write_fails_half_way(root: Path) -> None:
    fs = FaultyFileSystem()
    fd = fs.open(root / "f", create=True)
    fs.fail_write(2)
    fs.pwrite(fd, b"1234", 0)
    with pytest.raises(StorageFull, match="No space left"), storage_errors("write", root / "f"):
        fs.pwritev(fd, [b"56", b"78"], 4)
    assert (root / "f").read_bytes() == b"123456"
    fs.pwrite(fd, b"5678", 4)
    fs.close(fd)
    assert (root / "f").read_bytes() == b"12345678"


def test_everything_fails_from_a_call_on(root: Path) -> None:
    fs = FaultyFileSystem()
    fd = fs.open(root / "f", create=True)
    fs.fail_from(3)
    fs.pwrite(fd, b"1", 0)
    fs.fsync(fd)
    calls: list[Callable[[], None]] = [
        lambda: fs.pwrite(fd, b"2", 0),
        lambda: fs.truncate(fd, 0),
        lambda: fs.fsync(fd),
        lambda: fs.sync_folder(root),
        lambda: fs.replace(root / "f", root / "g"),
        lambda: fs.unlink(root / "f"),
        lambda: fs.mkdir(root / "d"),
        lambda: fs.write_atomically(root / "w", [b"w"]),
    ]
    for call in calls:
        with pytest.raises(OSError, match="simulated"):
            call()
    fs.close(fd)
    fs.clear()
    assert sorted(os.listdir(root)) == ["f"]
    assert (root / "f").read_bytes() == b"1"


def test_full_disk_has_room_again_after_unlink(root: Path) -> None:
    fs = FaultyFileSystem()
    a, b = (fs.open(root / name, create=True) for name in "ab")
    fs.limit(10)
    fs.pwrite(a, b"12345678", 0)
    assert fs.room == 2
    fs.pwrite(a, b"abc", 0)  # overwriting needs no room
    with pytest.raises(OSError, match="No space"):
        fs.pwrite(b, b"123", 0)
    assert (root / "b").read_bytes() == b"12"
    fs.close(a)
    fs.unlink(root / "a")
    assert fs.room == 8
    fs.pwrite(b, b"123456", 0)
    with pytest.raises(OSError, match="No space"):
        fs.write_atomically(root / "c", [b"123456"])
    assert fs.room == 4
    assert os.listdir(root) == ["b"]
    fs.limit(None)
    fs.pwrite(b, b"0" * 100, 0)
    fs.close(b)


def test_read_only_and_denied(root: Path) -> None:
    (root / "f").write_bytes(b"1")
    fs = FaultyFileSystem()
    rule = fs.read_only()
    with pytest.raises(OSError, match="Read-only"):
        fs.open(root / "f")
    with pytest.raises(OSError, match="Read-only"):
        fs.open(root / "g", create=True)
    fs.faults.remove(rule)
    fs.deny(path="*.wal")
    fs.close(fs.open(root / "g", create=True))
    with pytest.raises(PermissionError):
        fs.open(root / "g.wal", create=True)


def test_only_files_of_a_pattern_fail(root: Path) -> None:
    fs = FaultyFileSystem()
    a, b = fs.open(root / "a.wal", create=True), fs.open(root / "b.meta", create=True)
    fs.fail("pwrite", error=errno.EIO, path="*.wal", times=None)
    fs.pwrite(b, b"1", 0)
    with pytest.raises(OSError, match="simulated"):
        fs.pwrite(a, b"1", 0)
    fs.close(a)
    fs.close(b)
    assert fs.calls["pwrite"] == 2


@pytest.mark.parametrize("nth", range(1, 9))
def test_an_atomic_write_survives_each_fault(root: Path, nth: int) -> None:
    ToyDocument.put(FileSystem(), root, 1)
    fs = FaultyFileSystem()
    fs.fail(nth=nth)
    with contextlib.suppress(OSError):
        ToyDocument.put(fs, root, 2)
    assert ToyDocument.get(root) in (1, 2)
    fs.clear()
    ToyDocument.put(fs, root, 3)
    assert os.listdir(root) == ["document"]
