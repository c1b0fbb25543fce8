"""Crash states of the file adapter alone, in random programs of what the core asks of it."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from pathlib import Path
from zlib import crc32

import numpy as np
import pytest
from two_processes import explore_in_two

from expbuf_core import codec, frames
from expbuf_core.contracts import LoggedOperation, Operation, PersistenceContext, Stamped
from expbuf_core.filesystem import FileSystem
from expbuf_core.testing.crash import Acknowledge, explore
from expbuf_core.testing.faults import FaultyFileSystem
from expbuf_core.testing.recording import NoFolderSync, NoFsync, RecordingFileSystem
from expbuf_file import layout
from expbuf_file.adapter import FilePersistenceAdapter
from expbuf_file.settings import FileSettings

LONG = os.environ.get("EXPBUF_LONG", "") not in ("", "0")
SEEDS = range(60) if LONG else range(4)
STATES = 3000 if LONG else 300

UUID = bytes(range(16))
NONE = np.empty(0, np.uint32)


def make(
    fs: FileSystem, folder: Path, kind: type[FilePersistenceAdapter] = FilePersistenceAdapter
) -> FilePersistenceAdapter:
    settings = FileSettings(initial_bytes=1 << 14, segment_bytes=1 << 14)
    return kind(settings, PersistenceContext(folder, UUID, fs, [0] * 8))


def operation(lsn: int, run: int = 1) -> Stamped:
    """Operation `lsn`, always the same, with or without rows; in another run as large, but new."""
    rng = random.Random(lsn)
    body = bytes(byte ^ run for byte in rng.randbytes(rng.randrange(8, 200)))
    count = rng.choice((0, 1, 1, 5, 0, 12))
    if not count:
        return Stamped(lsn, 0, Operation(codec.REMOVE, body, crc32(body), b"", NONE, NONE))
    first_id = lsn * 100
    contents = [bytes(16) + rng.randbytes(rng.randrange(300)) for _ in range(count)]
    rows = bytearray().join(contents)
    lengths = np.array([len(row) for row in contents], np.uint32)
    seals = frames.stamp_rows(rows, lengths, codec.content_crcs(rows, lengths), first_id)
    return Stamped(
        lsn, first_id, Operation(codec.ADD, body, crc32(body), bytes(rows), lengths, seals)
    )


class Program:
    """A random sequence of calls, and what may be left of it."""

    def __init__(self, seed: int, *, faults: bool, syncs: float = 0.5) -> None:
        self.seed = seed
        self.syncs = syncs
        self.faults = faults
        self.given_up: dict[int, int] = {}  # operation -> the one that was to follow it

    def run(self, recorder: RecordingFileSystem, folder: Path, ack: Acknowledge) -> None:
        rng = random.Random(self.seed)
        fs = FaultyFileSystem(recorder)
        fs.mkdir(folder)
        fs.sync_folder(folder.parent)
        adapter = make(fs, folder)
        adapter.create(1)
        ack(0)
        durable = appended = 0
        lsn = 1
        for _ in range(60):
            ack.start(lsn)
            adapter.append([operation(lsn)], durable)
            appended = lsn
            dice = rng.random()
            if dice < self.syncs:
                adapter.sync()
                durable = lsn
                ack(lsn)
            elif self.faults and dice < 0.6:
                fs.fail_sync(drop=rng.random() < 0.5)
                with pytest.raises(OSError, match="simulated"):
                    adapter.sync()
                fs.clear()
                # All of that flush is given up.
                for lost in range(durable + 1, lsn + 1):
                    self.given_up.setdefault(lost, lsn + 2)
                adapter.retire(durable, durable, lsn + 2)
                appended = durable
                lsn += 1
            elif self.faults and dice < 0.65:
                # An appender died, and nothing says that a page was lost.
                adapter.retire(durable, appended, lsn + 2)
                durable = appended
                ack(appended)
                lsn += 1
            if rng.random() < 0.1:
                adapter.switch(lsn + 1, durable)
            if rng.random() < 0.1:
                adapter.prepare()
                adapter.install_prepared()
            lsn += 1
        adapter.sync()
        ack(appended)
        adapter.finish(lsn - 1)
        adapter.close()

    def check(self, folder: Path, acknowledged: Sequence[int], started: Sequence[int]) -> list[int]:
        """The recovered LSNs: all acknowledged, no gaps but where a log was given up."""
        if not acknowledged:
            return []
        found = recovered(folder)
        assert set(acknowledged) - {0} <= set(found), "acknowledged and lost"
        last = found[-1] if found else 0
        missing = [lsn for lsn in started if lsn <= last and lsn not in found]
        assert all(self.given_up.get(lsn, last + 1) <= last for lsn in missing), missing
        assert set(found) <= set(started)
        return found


def recovered(folder: Path, second_run: int = 1 << 60) -> list[int]:
    """LSNs in the log, each operation and each row compared with what was written.

    Args:
        folder: Of the log.
        second_run: Operations from here on are of run 2.
    """
    adapter = make(FileSystem(), folder)
    try:
        found = list(adapter.recover(0, 0))
        for logged in found:
            same(adapter, logged, 2 if logged.lsn >= second_run else 1)
        return [logged.lsn for logged in found]
    finally:
        adapter.close()


def same(adapter: FilePersistenceAdapter, logged: LoggedOperation, run: int) -> None:
    expected = operation(logged.lsn, run)
    assert bytes(logged.body) == bytes(expected.operation.body)
    assert logged.first_id == expected.first_id
    assert logged.lengths.tolist() == expected.operation.lengths.tolist()
    if len(logged.lengths):
        ends = np.cumsum(logged.lengths, dtype=np.int64)
        places = logged.location + ends - logged.lengths
        ids = np.arange(logged.first_id, logged.first_id + len(ends))
        pin = adapter.pin(ids, places, logged.lengths)
        rows = b"".join(bytes(pin.read(i)) for i in range(len(ends)))
        assert rows == bytes(expected.operation.rows)


class KeepsTail(FilePersistenceAdapter):
    """Broken on purpose: goes on behind the last intact frame, in the same file."""

    def start(self, lsn: int, recovered_lsn: int) -> None:
        number, end = self._reader.number, self._reader.end
        temporary = self._logs._make(layout.INDEX, number, 1 << 16, bytes(16), (), "again")
        temporary.replace(layout.path_of(self._folder, layout.INDEX, number))
        self._set_end(number, end, layout.HEADER_BYTES)


def crash_again(
    folder: Path,
    known: list[int],
    states: int,
    rng: random.Random,
    depth: int,
    kind: type[FilePersistenceAdapter] = FilePersistenceAdapter,
) -> int:
    """Recover and write on, crash in the midst of it, and so on; how many states were checked."""
    count = 0
    run, step = (2, 1) if kind is KeepsTail else (1, 1000)

    def go_on(fs: RecordingFileSystem, folder: Path, ack: Acknowledge) -> None:
        adapter = make(fs, folder, kind)
        found = [logged.lsn for logged in adapter.recover(0, 0)]
        assert found == known
        last = found[-1] if found else 0
        first = last + step
        adapter.start(first, last)
        durable = last
        for lsn in range(first, first + 4):
            ack.start(lsn)
            adapter.append([operation(lsn, run)], durable)
            adapter.sync()
            ack(lsn)
            durable = lsn
            if lsn == first + 1 and kind is not KeepsTail:
                adapter.switch(lsn + 1, durable)
        adapter.finish(durable)
        adapter.close()

    def check(folder: Path, acknowledged: Sequence[int], started: Sequence[int]) -> None:
        nonlocal count
        found = recovered(folder, max([0, *known]) + 1 if run == 2 else 1 << 60)
        assert found[: len(known)] == known
        new = found[len(known) :]
        assert new == list(started)[: len(new)]
        assert len(new) >= len(acknowledged)
        if depth > 1 and rng.random() < 0.1:
            count += crash_again(folder, found, states // 2, rng, depth - 1)

    result = explore(go_on, check, states=states, seed=rng.randrange(1 << 30), initial=folder)
    result.raise_for_failures()
    return count + result.states


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("faults", [False, True], ids=["healthy", "faults"])
def test_random_programs(seed: int, faults: bool) -> None:
    program = Program(seed, faults=faults)
    rng = random.Random()

    def begin(part: int) -> None:
        rng.seed(f"{seed}/{part}")

    def check(folder: Path, acknowledged: Sequence[int], started: Sequence[int]) -> None:
        found = program.check(folder, acknowledged, started)
        if acknowledged and rng.random() < 0.02:
            crash_again(folder, found, 30, rng, depth=3)

    states = explore_in_two(program.run, check, begin=begin, states=STATES, seed=seed)
    assert states > STATES // 2


@pytest.mark.parametrize("broken", [NoFsync, NoFolderSync])
def test_broken_variants_are_caught(broken: type[RecordingFileSystem]) -> None:
    program = Program(1, faults=False)
    result = explore(program.run, program.check, states=200, seed=1, broken=broken, stop_after=1)
    assert result.failures


def test_keeping_a_torn_tail_is_caught() -> None:
    program = Program(1, faults=False, syncs=0.1)
    rng = random.Random(1)
    caught: list[Exception] = []

    def check(folder: Path, acknowledged: Sequence[int], started: Sequence[int]) -> None:
        found = program.check(folder, acknowledged, started)
        if not found or caught:
            return
        adapter = make(FileSystem(), folder)
        list(adapter.recover(0, 0))
        adapter.close()
        if adapter.torn()[0]:
            try:
                crash_again(folder, found, 10, rng, depth=1, kind=KeepsTail)
            except AssertionError as exc:
                caught.append(exc)

    explore(program.run, check, states=600, seed=1).raise_for_failures()
    assert caught
