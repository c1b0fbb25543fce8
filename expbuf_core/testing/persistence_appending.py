"""P10 to P19: appending, making durable, retiring."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from expbuf_core.contracts import (
    LogInterrupted,
)
from expbuf_core.errors import StorageError
from expbuf_core.filesystem import FileSystem
from expbuf_core.testing.crash import Acknowledge, explore
from expbuf_core.testing.faults import FaultyFileSystem
from expbuf_core.testing.persistence_base import (
    LONG,
    PersistenceBase,
)
from expbuf_core.testing.persistence_log import (
    Core,
    Place,
    assert_same,
    operation,
)
from expbuf_core.testing.processes import TIMEOUT_S, Child, in_child
from expbuf_core.testing.recording import RecordingFileSystem


class Appending(PersistenceBase):
    """P10 to P19."""

    def test_p10_all_or_nothing(self, tmp_path: Path) -> None:
        """P10, P40: of an append that raises, nothing is followed or recovered."""
        self.needs_durable()
        for number, fs in self.each_failure(writes=True):
            fs.disarm()
            core = Core(self.place(tmp_path, f"append{number}", fs)).create().extend(4).sync()
            items = [operation(core.next_lsn + i, 3) for i in range(3)]
            fs.arm()
            try:
                core.append(*items)
            except LogInterrupted:
                fs.disarm()
                core.adapter.retire(core.durable, core.last, core.next_lsn + 5)
                core.next_lsn += 5
            except StorageError:
                fs.disarm()
            fs.disarm()
            core.follows()
            core.extend(2)
            core.follows()
            core.reopen().finish()
            core.place.close()

    def test_p11_locations(self, tmp_path: Path) -> None:
        """P11, P24: payloads are where lengths and location say, in any order, repeated."""
        core = self.core(tmp_path).create()
        for count in (1, 7, 0, 2, 30):
            core.append(operation(core.next_lsn, count))
        first = core.next_lsn
        core.append(*(operation(first + i, i % 3) for i in range(6)))
        for logged in core.adapter.follow(0).read(core.last):
            if logged.lengths.size:
                assert logged.location == core.at[logged.lsn].location, "two locations"
        every = [lsn for lsn in core.wrote if core.wrote[lsn].first_id]
        count = sum(len(core.wrote[lsn].operation.lengths) for lsn in every)
        order = random.Random(0).choices(range(count), k=3 * count)
        pin, rows = core.pin(every, order)
        read = random.Random(1).sample(range(len(rows)), len(rows))
        assert all(bytes(pin.read(i)) == rows[i] for i in read), "a pin gave another payload"
        together = [bytes(row) for row in pin.read_many(np.array(read))]
        assert together == [rows[i] for i in read], "several at once are not what one by one is"

    def test_p12_appends_alternate(self, tmp_path: Path) -> None:
        """P12, P20: two processes that append in turn make one log, and both follow it."""
        self.needs_multiprocess()
        core = self.core(tmp_path).create().extend(3).sync()
        turns = 25

        def work(child: Child) -> None:
            core.adapter.after_fork()
            mine = Core(core.place, wrote=core.wrote)
            mine.adapter.attach()
            follower = mine.adapter.follow(mine.last)
            for _ in range(turns):
                last = int(child.hear())
                for logged in follower.read(last):
                    assert_same(logged, operation(logged.lsn))
                    mine.wrote[logged.lsn] = operation(logged.lsn)
                assert mine.last == last, f"followed up to {mine.last}, published is {last}"
                mine.next_lsn = last + 1
                (place,) = mine.append()
                follower.skip(mine.last, place.cursor)
                if mine.last % 3 == 0:
                    mine.adapter.sync()
                if mine.last % 7 == 0:
                    mine.adapter.switch(mine.next_lsn, 0)
                child.say(mine.last)
            mine.follows()
            mine.adapter.close()

        child = Child(work)
        follower = core.adapter.follow(core.last)
        for turn in range(turns):
            (place,) = core.append()
            follower.skip(core.last, place.cursor)
            child.say(core.last)
            last = child.hear()
            assert last, child.join()
            core.wrote[int(last)] = operation(int(last))
            core.next_lsn = int(last) + 1
            for logged in follower.read(int(last)):
                assert_same(logged, operation(logged.lsn))
                core.payloads_agree(logged)
            if turn % 5 == 0:
                core.adapter.sync()
        child.join()
        core.follows()
        core.finish().reopen()

    def test_p13_a_killed_process(self, tmp_path: Path) -> None:
        """P13: what was appended, synced or not, outlives a SIGKILL of its process."""
        self.needs_durable()
        for syncs in (0, 1):
            place = self.place(tmp_path, f"killed{syncs}")

            def work(child: Child, place: Place = place, syncs: int = syncs) -> None:
                mine = Core(place).create()
                while True:
                    mine.append()
                    if syncs:
                        mine.adapter.sync()
                    child.say(mine.last)

            for delay in (3, 40):
                child = Child(work)
                last = ""
                while last != str(delay):
                    last = child.hear()
                    assert last, child.join()
                rest = child.kill().split()
                acknowledged = max([delay, *map(int, rest)])
                place.forget()
                adapter = place.adapter()
                found = list(adapter.recover(0, acknowledged if syncs else 0))
                lsns = [logged.lsn for logged in found]
                assert lsns == list(range(1, len(lsns) + 1)), "not a prefix"
                assert len(lsns) >= acknowledged, f"{acknowledged} was appended, {len(lsns)} found"
                for logged in found:
                    assert_same(logged, operation(logged.lsn))
                place.close()
                shutil.rmtree(place.folder)
                place.folder.mkdir()

    def test_p14_power_losses(self, tmp_path: Path) -> None:
        """P14, P1, P3, P6, P30, P33, P41: what was synced survives a power loss at any instant.

        A random program of everything that the core asks for is recorded, and every folder that a
        power loss could have left is recovered; what is found is written on.
        """
        self.needs_durable()
        if not self.writes_through_fs:
            pytest.skip("its library writes to the disk by itself")
        for seed in range(8 if LONG else 2):
            program = _Program(self, tmp_path / f"seed{seed}", seed)
            states = self.crash_states * (10 if LONG else 1)
            result = explore(program.run, program.check, states=states, seed=seed)
            result.raise_for_failures()

    def test_p14_syncs_what_others_appended(self, tmp_path: Path) -> None:
        """P14: a sync covers appends of other processes, also in files already left behind."""
        self.needs_multiprocess()
        fs = _Syncs()
        core = Core(self.place(tmp_path, fs=fs)).create().extend(3).sync()

        def work(child: Child) -> None:
            core.adapter.after_fork()
            mine = Core(core.place, wrote=core.wrote)
            mine.adapter.attach()
            mine.extend(4)
            mine.adapter.switch(mine.next_lsn, core.durable)
            mine.extend(4)
            mine.adapter.close()

        in_child(work)
        core.wrote |= {lsn: operation(lsn) for lsn in range(4, 12)}
        core.sync()
        if self.writes_through_fs:
            written = self.stored_files(core.place.folder)
            assert fs.synced & {os.stat(path).st_ino for path in written}, "no file was synced"
        core.follows()

    def test_p15_syncs_beside_appends(self, tmp_path: Path) -> None:
        """P15, P45: threads append, sync, follow and pin at once."""
        core = self.core(tmp_path).create()
        append, flush = threading.Lock(), threading.Lock()
        stop = threading.Event()
        failed: list[BaseException] = []

        def guarded(work: Callable[[], object]) -> threading.Thread:
            def run() -> None:
                try:
                    work()
                except BaseException as exc:
                    failed.append(exc)
                    stop.set()

            thread = threading.Thread(target=run, daemon=True)
            thread.start()
            return thread

        def append_some() -> None:
            for _ in range(120):
                with append:
                    core.append()

        def sync_on() -> None:
            while not stop.is_set():
                with flush:
                    core.adapter.sync()

        def follow_on() -> None:
            follower, seen = core.adapter.follow(0), 0
            while not stop.is_set() or seen < core.last:
                last = core.last
                for logged in follower.read(last):
                    seen += 1
                    assert logged.lsn == seen, f"lsn {logged.lsn} where {seen} was next"
                    core.payloads_agree(logged)
                assert seen >= last, f"the follower stopped at {seen} of {last}"
                core.adapter.stats()

        writers = [guarded(append_some) for _ in range(3)]
        others = [guarded(sync_on), guarded(follow_on), guarded(follow_on)]
        for thread in writers:
            thread.join(TIMEOUT_S)
        stop.set()
        for thread in others:
            thread.join(TIMEOUT_S)
            assert not thread.is_alive(), "a thread hangs"
        if failed:
            raise failed[0]
        core.follows()
        if self.durable():
            core.finish().reopen()

    def test_p16_a_failing_sync_raises(self, tmp_path: Path) -> None:
        """P16, P17: a sync that fails raises; `retire` then leads on, with what was published."""
        self.needs_durable()
        for keeps in (0, 2):
            for drop in (False, True):
                fs = FaultyFileSystem()
                place = self.place(tmp_path, f"sync{keeps}{drop}", fs)
                core = Core(place).create().extend(6).sync()
                follower = core.adapter.follow(2)
                list(follower.read(5))
                core.extend(5)
                before = _synced(fs)
                with self.failing_sync(fs, core.adapter, drop=drop):
                    try:
                        core.adapter.sync()
                    except StorageError:
                        pass
                    else:
                        if _synced(fs) == before:
                            pytest.skip("`sync` syncs nothing through `context.fs`")
                        raise AssertionError("a sync failed, and nothing was raised")
                # Where the pages are lost, nothing beyond what was durable can be kept.
                kept = core.durable + (0 if drop else keeps)
                for lost in [lsn for lsn in core.wrote if lsn > kept]:
                    del core.wrote[lost]
                core.adapter.retire(core.durable, kept, 40)
                core.durable, core.next_lsn = kept, 40
                core.extend(3)
                core.agree(list(follower.read(core.last)), 5)
                core.follows()
                core.sync().extend(1)
                core.reopen(lsn=70).extend(2).finish().reopen()
                place.close()

    def test_p17_retires(self, tmp_path: Path) -> None:
        """P17, P18: a log is given up: what is kept stays, the rest never comes back."""
        core = self.core(tmp_path).create()
        if not self.durable():
            pytest.skip('does not declare the capability "durable"')
        core.extend(8).sync().extend(6)
        durable, last = core.durable, core.last
        behind = core.adapter.follow(3)
        level = core.adapter.follow(0)
        list(level.read(durable))
        pin, rows = core.pin(lsn for lsn in core.wrote if lsn <= durable)
        # An appender died: everything that was written whole is kept.
        core.adapter.retire(durable, last, last + 10)
        core.durable, core.next_lsn = last, last + 10
        core.follows()
        core.agree(list(behind.read(last)), 3)
        core.extend(4)
        core.agree(list(level.read(core.last)), durable)
        core.agree(list(behind.read(core.last)), last)
        assert all(bytes(pin.read(i)) == row for i, row in enumerate(rows))
        again, rows = core.pin(lsn for lsn in core.wrote if lsn <= durable)
        assert all(bytes(again.read(i)) == row for i, row in enumerate(rows)), "a location changed"
        # A sync failed: what nobody has seen is given up.
        core.sync().extend(5)
        for lost in range(core.durable + 1, core.last + 1):
            del core.wrote[lost]
        core.adapter.retire(core.durable, core.durable, core.next_lsn + 1)
        core.next_lsn += 1
        core.follows()
        core.extend(3)
        core.agree(list(behind.read(core.last)), core.durable)
        core = core.reopen(lsn=core.last + 1)
        core.adapter.retire(core.durable, core.last, core.next_lsn + 1)
        core.next_lsn += 1
        core.extend(2).finish().reopen()

    def test_p18_locations_behind_a_retirement(self, tmp_path: Path) -> None:
        """P18: a new follower yields where payloads lie now; there a fresh adapter finds them."""
        self.needs_durable()
        core = self.core(tmp_path).create()
        for turn in range(4):
            core.extend(5).sync().extend(6, rows=3)
            # A sync that failed, or an appender that died: little is kept, or all of it.
            kept = core.last - (4 if turn % 2 else 0)
            for lost in range(kept + 1, core.last + 1):
                del core.wrote[lost]
            durable, core.next_lsn = core.durable, core.next_lsn + 10
            core.adapter.retire(durable, kept, core.next_lsn)
            core.durable = kept
            for behind in (durable, kept, 0):
                core.follows(behind)
        core.extend(3, rows=2)
        followed = list(core.adapter.follow(0).read(core.last))
        core.adapter.close()
        core.place.forget()
        fresh = Core(core.place, core.place.adapter(writable=False), core.wrote)
        found = fresh.recovers(durable=core.durable)
        for one, other in zip(followed, found, strict=True):
            if len(one.lengths):
                assert one.location == other.location, f"lsn {one.lsn}: two locations"

    def test_p17_retiring_fails_anywhere(self, tmp_path: Path) -> None:
        """P17, P40: a `retire` that fails has changed nothing, and can be done again."""
        self.needs_durable()
        for number, fs in self.each_failure():
            fs.disarm()
            core = Core(self.place(tmp_path, f"retire{number}", fs)).create()
            core.extend(6).sync().extend(4)
            kept = core.last - 2
            fs.arm()
            with contextlib.suppress(StorageError):
                core.adapter.retire(core.durable, kept, 50)
            fs.disarm()
            if fs.struck:
                core.place.copy(f"died{number}")
                self.retired_halfway(core, number)
                core.adapter.retire(core.durable, kept, 60)
                core.next_lsn = 60
            else:
                core.next_lsn = 50
            for lost in [lsn for lsn in core.wrote if lsn > kept]:
                del core.wrote[lost]
            core.follows()
            core.extend(2).follows()
            core.finish().reopen()
            core.place.close()

    def retired_halfway(self, core: Core, number: int) -> None:
        """A process that died in `retire` leaves the old log, or the new one, whole."""
        place = Place(core.place.root, self.provider, self.settings, name=f"died{number}")
        adapter = place.adapter()
        found = [logged.lsn for logged in adapter.recover(0, core.durable)]
        assert found == [lsn for lsn in core.wrote if lsn <= len(found)], f"found {found}"
        assert len(found) >= core.durable
        place.close()

    def test_p19_hastens(self, tmp_path: Path) -> None:
        """P19: what was appended may be on its way to the disk before it is synced."""
        core = self.core(tmp_path).create()
        core.adapter.hasten()  # nothing was appended yet
        for count in (1, 40, 1):
            core.extend(count)
            core.adapter.hasten()
            core.follows()
        core.sync()
        core.adapter.hasten()  # all of it is on the disk already
        core.adapter.switch(core.next_lsn, core.durable)
        core.adapter.hasten()
        core.extend(2)
        core.adapter.hasten()
        core.follows()
        if self.durable():
            core.sync().reopen().follows()


class _Syncs(FileSystem):
    """Remembers which files were synced."""

    def __init__(self) -> None:
        self.synced: set[int] = set()

    def fdatasync(self, fd: int) -> None:
        """Sync, and note it."""
        self.synced.add(os.fstat(fd).st_ino)
        super().fdatasync(fd)

    def fsync(self, fd: int) -> None:
        """Sync, and note it."""
        self.synced.add(os.fstat(fd).st_ino)
        super().fsync(fd)


class _Program:
    """A random sequence of what the core asks of an adapter, and what may be left of it."""

    def __init__(self, suite: PersistenceBase, root: Path, seed: int) -> None:
        self._suite = suite
        self._seed = seed
        self._root = root
        root.mkdir()
        self._checks = 0
        self._dropped = 0

    def _place(self, folder: Path, fs: FileSystem, name: str) -> Place:
        place = Place(self._root, self._suite.provider, self._suite.settings, name=name, fs=fs)
        place.folder.rmdir()
        place.folder = folder
        place.forget()
        return place

    def run(self, recorder: RecordingFileSystem, folder: Path, ack: Acknowledge) -> None:
        """The workload of `explore`; it marks LSNs."""
        draw = random.Random(self._seed)
        recorder.mkdir(folder)
        recorder.sync_folder(folder.parent)
        place = self._place(folder, recorder, "run")
        core = Core(place).create()
        ack(("created", 0))
        for _ in range(50):
            ack.start(("lsn", core.next_lsn))
            core.append()
            dice = draw.random()
            if dice < 0.5:
                core.sync()
                ack(("lsn", core.last))
            elif dice < 0.6:
                core.adapter.switch(core.next_lsn, core.durable)
            elif dice < 0.66:
                core.adapter.prepare()
                core.adapter.install_prepared()
            elif dice < 0.7 and core.durable > 10:
                # As the core does: a snapshot at `below` exists, and so do the payloads behind.
                below = core.durable - 5
                ack.start(("drop", below))
                core.adapter.drop_below(below, *core.live(n for n in core.wrote if n > below - 3))
        core.sync()
        ack(("lsn", core.last))
        core.adapter.finish(core.last)
        core.adapter.close()
        ack(("lsn", core.last))

    def check(self, folder: Path, acknowledged: Sequence[Any], started: Sequence[Any]) -> None:
        """Recovered is a prefix with everything acknowledged, and can be written on."""
        if not acknowledged:
            return
        self._checks += 1
        place = self._place(folder, FileSystem(), f"check{self._checks}")
        try:
            after = max([0, *(n for what, n in started if what == "drop")])
            wanted = max(n for what, n in acknowledged if what != "drop")
            last = max([0, *(n for what, n in started if what == "lsn")])
            core = Core(place)
            found = list(core.adapter.recover(after, wanted))
            core.wrote = {n: operation(n) for n in range(1, len(found) + after + 1)}
            core.agree(found, after)
            assert wanted <= core.last <= last, f"{wanted} acknowledged, {core.last} recovered"
            first = core.last + 100
            core.adapter.start(first, core.last)
            core.next_lsn = first
            core.extend(2).sync()
            core.follows(after)
            core.adapter.close()
            place.forget()
            again = Core(place, wrote=core.wrote)
            again.recovers(after, durable=core.last)
        finally:
            place.close()
            (self._root / f"check{self._checks}.words").unlink()


def _synced(fs: FaultyFileSystem) -> int:
    return fs.calls["fsync"] + fs.calls["fdatasync"]
