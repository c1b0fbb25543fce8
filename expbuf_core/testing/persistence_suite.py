"""The contract of `PersistenceAdapter` as tests; a plugin's test file is a subclass.

    from expbuf_core.testing import PersistenceSuite

    class TestMyStorage(PersistenceSuite):
        provider = "my_storage"

Every behaviour has a number, which stays for ever (`docs/plugins.md`). Only a capability that the
provider does not declare skips a test. What is stored is also read, cut and changed behind the
adapter's back (`stored_files`), so that the code under test never checks itself.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import json
import os
import random
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from numpy.typing import NDArray

from expbuf_core.buffer import ExperienceBuffer
from expbuf_core.contracts import (
    LogGone,
    LogInterrupted,
    PersistenceAdapter,
    PersistenceProvider,
    Problem,
    Stamped,
)
from expbuf_core.errors import CorruptionError, StorageError, StorageFull
from expbuf_core.experience import Experience
from expbuf_core.filesystem import FileSystem
from expbuf_core.hookspecs import hookimpl
from expbuf_core.testing.crash import Acknowledge, explore
from expbuf_core.testing.faults import FaultyFileSystem
from expbuf_core.testing.persistence_log import (
    TIMEOUT_S,
    Child,
    Core,
    Place,
    assert_same,
    image,
    in_child,
    operation,
    outcome,
    places_of,
    provider_of,
    relogged,
    rows_of,
    without_rows,
)
from expbuf_core.testing.recording import RecordingFileSystem

LONG = os.environ.get("EXPBUF_LONG", "") not in ("", "0")


class PersistenceSuite:
    """What every storage backend must do.

    Attributes:
        provider: The backend's name, or its `PersistenceProvider`.
        settings: Its section of the configuration. Small files make the tests harder.
        writes_through_fs: False for a backend whose library writes to the disk by itself: then
            failing disks and power losses cannot be played here, and are the backend's own tests.
        crash_states: How many folders that a power loss could have left are tried in P14.
        flips: How many bytes are changed, one at a time, in P2.
        steady_growth: P32: by how much the folder may grow while the buffer stays the same.
    """

    provider: ClassVar[str | PersistenceProvider] = ""
    settings: ClassVar[Mapping[str, Any]] = {}
    writes_through_fs: ClassVar[bool] = True
    crash_states: ClassVar[int] = 150
    flips: ClassVar[int] = 400
    steady_growth: ClassVar[float] = 1.5

    # ------------------------------------------------------------ the back door

    def stored_files(self, folder: Path) -> list[Path]:
        """Files that hold what the backend stored. Override it to leave out lock files."""
        return sorted(path for path in folder.rglob("*") if path.is_file())

    # ------------------------------------------------------------ creating and recovering

    def test_p1_an_empty_log(self, tmp_path: Path) -> None:
        """P1: a new log holds nothing; its next operation is the one that `create` named."""
        core = self.core(tmp_path).create()
        core.recovers()
        assert core.adapter.torn() == (0, 0)
        core.append()
        core.recovers()

    def test_p1_what_an_interrupted_creation_left_is_replaced(self, tmp_path: Path) -> None:
        """P1: `create` on the leftovers of a creation that died anywhere begins anew."""
        self.needs_durable()
        for _, fs in self.each_failure():
            place = self.place(tmp_path, f"buffer{fs.nth}")
            with contextlib.suppress(StorageError):
                adapter = place.adapter(fs=fs)
                adapter.create(1)
                adapter.append([without_rows(1, b"old")], 0)
                adapter.sync()
            place.close()
            core = Core(place).create().extend(3)
            core.finish().reopen()
            place.close()
            if not fs.struck:
                break

    def test_p2_recovers_what_was_appended(self, tmp_path: Path) -> None:
        """P2: every operation comes back in order, kind, body, ids and payloads byte for byte."""
        core = self.core(tmp_path).create().extend(60)
        core.append(without_rows(core.next_lsn))
        core.append(operation(core.next_lsn, 3, body_bytes=0, row_bytes=0))
        core.append(
            relogged(core.next_lsn, [*rows_of(operation(200, 2)), *rows_of(operation(100, 3))])
        )
        core.append()
        if self.durable():
            core = core.finish().reopen()
        for after in (0, 1, 30, core.last - 1, core.last):
            core.recovers(after)
        core.follows()

    def test_p2_big_commits(self, tmp_path: Path) -> None:
        """P2: commits of many payloads, large payloads and large bodies."""
        core = self.core(tmp_path).create().extend(2)
        core.append(operation(core.next_lsn, 5000, row_bytes=40))
        core.append(operation(core.next_lsn, 2, row_bytes=9 << 20))
        core.append(without_rows(core.next_lsn, random.Random(0).randbytes(3 << 20)))
        core.extend(2)
        if self.durable():
            core = core.finish().reopen()
        core.recovers()
        core.follows()

    def test_p2_many_small_operations(self, tmp_path: Path) -> None:
        """P2: thousands of small operations, through many log files where there are files."""
        core = self.core(tmp_path).create()
        for _ in range(4000):
            core.append(without_rows(core.next_lsn, b"%d" % core.next_lsn))
        if self.durable():
            core = core.finish().reopen()
        core.recovers()
        core.follows(2000)

    def test_p2_changed_bytes(self, tmp_path: Path) -> None:
        """P2, P34: with any byte changed, what was stored comes back or is refused, named.

        Nothing crashes, and `verify` tells damage where recovering does.
        """
        self.needs_durable()
        core = self.core(tmp_path).create().extend(8).sync().extend(8)
        core.append(operation(core.next_lsn, 2, row_bytes=6000)).clear()
        core.finish()
        place = core.place
        draw = random.Random(1)
        cases: list[tuple[Path, int]] = []
        for path in self.stored_files(place.folder):
            data = path.read_bytes()
            filled = [i for i, byte in enumerate(data) if byte]
            cases += [(path, at) for at in draw.sample(filled, min(len(filled), self.flips))]
            cases += [(path, draw.randrange(len(data))) for _ in range(20) if data]
        budget = self.flips * (50 if LONG else 1)
        cases = draw.sample(cases, min(len(cases), budget))
        pristine = image(self.stored_files(place.folder))
        progress = tmp_path / "progress"

        def work(child: Child) -> None:
            for path, at in cases:
                damaged = bytearray(pristine[path])
                damaged[at] ^= draw.choice((1, 0x55, 0xFF))
                progress.write_text(f"{path.name}, byte {at}")
                path.write_bytes(damaged)
                refused = outcome(place, core.wrote) == "refused"
                adapter = place.adapter(writable=False)
                problems = _verified(adapter, core.last)
                adapter.close()
                assert not refused or problems, f"verify finds nothing: {path.name}, byte {at}"
                path.write_bytes(pristine[path])

        try:
            in_child(work)
        except AssertionError as exc:
            raise AssertionError(f"{progress.read_text()}: {exc}") from None

    def test_p2_changed_content(self, tmp_path: Path) -> None:
        """P2, P34: a changed payload or body is noticed by `recover` and by `verify`."""
        self.needs_durable()
        core = self.core(tmp_path).create().extend(5)
        marker = bytes(range(200, 232))
        body = core.append(without_rows(core.next_lsn, marker + b"body"))
        row = core.append(operation(core.next_lsn, 1, row_bytes=400))
        assert body
        assert row
        core.extend(5)
        stored = bytes(core.wrote[core.last - 5].operation.rows)
        core.finish()
        place = core.place
        for needle in (marker, stored[-min(64, len(stored)) :]):
            pristine = image(self.stored_files(place.folder))
            changed = 0
            for path, data in pristine.items():
                damaged, at = bytearray(data), data.find(needle)
                while at >= 0:  # every copy of it: another one may be what counts
                    damaged[at + 3] ^= 0x10
                    changed += 1
                    at = data.find(needle, at + 1)
                path.write_bytes(damaged)
            if changed:
                assert outcome(place, core.wrote) == "refused", "a changed byte went unnoticed"
                adapter = place.adapter(writable=False)
                assert _verified(adapter, core.last), "verify finds nothing"
                place.close()
            for path, data in pristine.items():
                path.write_bytes(data)

    def test_p3_a_torn_tail_is_left_out(self, tmp_path: Path) -> None:
        """P3, P6: of a last write that is on disk in part, nothing is recovered, ever."""
        self.needs_durable()
        for rows in (0, 1, 6):
            core = self.core(tmp_path, f"torn{rows}").create().extend(7).sync()
            before = image(self.stored_files(core.place.folder))
            stamped = operation(core.next_lsn, rows, row_bytes=900, body_bytes=900)
            core.append(stamped)
            after = image(self.stored_files(core.place.folder))
            core.adapter.close()
            for share in (0.0, 0.02, 0.3, 0.6, 0.97):
                self.tear(core, before, after, share, stamped)

    def tear(
        self,
        core: Core,
        before: Mapping[Path, bytes],
        after: Mapping[Path, bytes],
        share: float,
        last: Stamped,
    ) -> None:
        """Keep `share` of what the last append changed, recover, write on, recover again."""
        for path, new in after.items():
            old = before.get(path, b"")
            old += bytes(max(0, len(new) - len(old)))
            changed = [i for i in range(len(new)) if new[i] != old[i]]
            if changed:
                first, end = changed[0], changed[-1] + 1
                cut = first + int((end - first) * share)
                path.write_bytes(new[:cut] + old[cut : len(new)])
            else:
                path.write_bytes(new)
        kept = {lsn: item for lsn, item in core.wrote.items() if lsn != last.lsn}
        core.place.forget()
        torn = Core(core.place, wrote=kept)
        found = list(torn.adapter.recover(0, core.durable))
        if found and found[-1].lsn == last.lsn:
            torn.wrote[last.lsn] = last  # what was cut off is not what counts
        torn.agree(found)
        torn.next_lsn = last.lsn + 1000
        torn.adapter.start(torn.next_lsn, torn.last)
        torn.extend(3).sync().extend(2)
        torn = torn.reopen()
        torn.extend(2).finish().reopen().adapter.close()
        core.place.close()
        shutil.rmtree(core.place.folder)
        core.place.folder.mkdir()

    def test_p4_missing_operations_are_damage(self, tmp_path: Path) -> None:
        """P4: an end before what is known to have been durable is a `CorruptionError`."""
        self.needs_durable()
        core = self.core(tmp_path).create().extend(9).finish()
        place = core.place
        for durable in (core.last + 1, core.last + 100):
            place.forget()
            adapter = place.adapter()
            with pytest.raises(CorruptionError) as caught:
                list(adapter.recover(0, durable))
            assert caught.value.path, "the error names no file"
            place.close()
        core.reopen(durable=core.last)

    def test_p4_cut_and_missing_files(self, tmp_path: Path) -> None:
        """P4, P35: after a clean close, a file that is cut or gone is damage, or made no odds."""
        self.needs_durable()
        core = self.core(tmp_path).create().extend(30).finish()
        pristine = image(self.stored_files(core.place.folder))

        def work(child: Child) -> None:
            for path, data in pristine.items():
                size = len(data)
                lengths = {0, 1, size // 7, size // 3, size // 2, size - 4097, size - 9, size - 1}
                for length in sorted(length for length in lengths if 0 <= length < size):
                    path.write_bytes(data[:length])
                    outcome(core.place, core.wrote)
                path.unlink()
                outcome(core.place, core.wrote)
                path.write_bytes(data)

        in_child(work)

    def test_p4_the_log_must_reach_back(self, tmp_path: Path) -> None:
        """P4: recovering from before what was dropped is refused, unless it is still there."""
        self.needs_durable()
        core = self.core(tmp_path).create()
        self.churn(core, 40)
        core.adapter.drop_below(core.last - 5, *core.live(core.wrote))
        core.finish()
        core.place.forget()
        again = Core(core.place, wrote=core.wrote)
        again.recovers(core.last - 5)
        again.adapter.close()
        assert outcome(core.place, core.wrote) in ("same", "refused")

    def test_p5_recovering_changes_nothing(self, tmp_path: Path) -> None:
        """P5: recovering twice, also read-only, leaves every byte as it is."""
        self.needs_durable()
        core = self.core(tmp_path).create().extend(20).sync().extend(3)
        core.adapter.close()
        place = core.place
        before = image(self.stored_files(place.folder))
        for writable in (False, True, False):
            place.forget()
            reader = Core(place, place.adapter(writable=writable), core.wrote)
            reader.recovers(durable=20)
            reader.recovers(10)
            if not writable:
                reader.follows(5)
                assert not _verified(reader.adapter, reader.last)
                json.dumps(reader.adapter.stats())
            reader.adapter.close()
            assert image(self.stored_files(place.folder)) == before, "recovering changed a file"

    def test_p5_a_folder_that_may_only_be_read(self, tmp_path: Path) -> None:
        """P5: a reader without write permission recovers, follows and pins."""
        self.needs_durable()
        core = self.core(tmp_path).create().extend(20).finish()
        place = core.place
        paths = [place.folder, *place.folder.rglob("*")]
        modes = {path: path.stat().st_mode for path in paths}
        try:
            for path in paths:
                path.chmod(0o555 if path.is_dir() else 0o444)
            place.forget()
            reader = Core(place, place.adapter(writable=False), core.wrote)
            reader.recovers()
            reader.adapter.close()
        finally:
            for path, mode in modes.items():
                path.chmod(mode)

    def test_p6_goes_on_behind_what_was_recovered(self, tmp_path: Path) -> None:
        """P6, P7: `start` may jump far ahead, any number of times, also without appends between."""
        self.needs_durable()
        core = self.core(tmp_path).create().extend(5)
        core = core.reopen().extend(4)
        core = core.reopen(lsn=core.last + 70_000).extend(4).sync()
        core = core.reopen(lsn=core.last + 5)
        core = core.reopen(lsn=core.last + 300).extend(3)
        core = core.finish().reopen(lsn=core.last + 1).extend(2)
        core.follows()
        for after in [0, 5, 9, core.last, *core.wrote]:
            core.follows(after)
        core.finish().reopen()

    def test_p6_starting_is_durable(self, tmp_path: Path) -> None:
        """P6: what was recovered and what `start` began outlives the process."""
        self.needs_durable()
        core = self.core(tmp_path).create().extend(6)
        core.adapter.close()

        def work(child: Child) -> None:
            core.place.forget()
            again = Core(core.place, wrote=core.wrote)
            again.recovers()
            again.adapter.start(100, again.last)
            child.say("started")
            child.hear()

        child = Child(work)
        assert child.hear() == "started", child.join()
        child.kill()
        core.place.forget()
        later = Core(core.place, wrote=core.wrote)
        later.recovers(durable=6)
        later.adapter.start(1000, later.last)
        later.next_lsn = 1000
        later.extend(2).finish().reopen()

    def test_p6_start_fails_anywhere(self, tmp_path: Path) -> None:
        """P6, P40: a `start` that failed half-way can be done again by the next process."""
        self.needs_durable()
        for number, fs in self.each_failure():
            core = self.core(tmp_path, f"start{number}").create().extend(6)
            core.adapter.close()
            core.place.forget()
            adapter = core.place.adapter(fs=fs)
            list(adapter.recover(0, 0))
            fs.arm()
            with contextlib.suppress(StorageError):
                adapter.start(50, core.last)
            fs.disarm()
            adapter.close()
            core.reopen(lsn=90).extend(2).finish().reopen()
            core.place.close()
            if not fs.struck:
                break

    def test_p8_another_adapter_joins(self, tmp_path: Path) -> None:
        """P8, P12: one that attaches sees everything, appends, and is seen."""
        core = self.core(tmp_path).create().extend(10)
        self.needs_multiprocess()
        work = self.joining(core, 10)
        child = Child(work)
        core.wrote |= {lsn: operation(lsn) for lsn in range(11, 21)}
        assert child.hear() == "written", child.join()
        core.follows()
        core.next_lsn = 21
        core.extend(3)
        child.say(core.last)
        child.join()
        core.follows(5)

    def joining(self, core: Core, count: int) -> Callable[[Child], None]:
        """What a second process does: follow, append, say so, follow again."""

        def work(child: Child) -> None:
            core.adapter.after_fork()
            mine = Core(core.place, wrote=core.wrote)
            mine.adapter.attach()
            follower = mine.adapter.follow(0)
            mine.agree(list(follower.read(mine.last)))
            known = mine.last
            mine.extend(count)
            child.say("written")
            last = int(child.hear())
            for lsn in range(mine.last + 1, last + 1):
                mine.wrote[lsn] = operation(lsn)
            mine.agree(list(follower.read(mine.last)), known)
            mine.adapter.close()

        return work

    # ------------------------------------------------------------ appending

    def test_p10_all_or_nothing(self, tmp_path: Path) -> None:
        """P10, P40: of an append that raises, nothing is followed or recovered."""
        self.needs_durable()
        for number, fs in self.each_failure():
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
            if not fs.struck:
                break

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
                with self.failing_sync(fs, core.adapter, drop=drop), pytest.raises(StorageError):
                    core.adapter.sync()
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

    @contextlib.contextmanager
    def failing_sync(
        self, fs: FaultyFileSystem, adapter: PersistenceAdapter, *, drop: bool
    ) -> Iterator[None]:
        """Let the next sync of what was appended fail.

        Override it where the backend's library syncs by itself.

        Args:
            fs: The adapter's.
            adapter: In use.
            drop: The bytes that were not synced are lost as well.
        """
        fs.fail_sync(drop=drop)
        yield
        fs.clear()

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
            if not fs.struck:
                break

    def retired_halfway(self, core: Core, number: int) -> None:
        """A process that died in `retire` leaves the old log, or the new one, whole."""
        place = Place(core.place.root, self.provider, self.settings, name=f"died{number}")
        adapter = place.adapter()
        found = [logged.lsn for logged in adapter.recover(0, core.durable)]
        assert found == [lsn for lsn in core.wrote if lsn <= len(found)], f"found {found}"
        assert len(found) >= core.durable
        place.close()

    # ------------------------------------------------------------ reading

    def test_p20_follows_from_anywhere(self, tmp_path: Path) -> None:
        """P20: from every LSN on, in steps of any size, and no further than was asked."""
        core = self.core(tmp_path).create()
        self.churn(core, 40)
        for after in range(core.last + 1):
            core.follows(after)
        follower, at = core.adapter.follow(0), 0
        draw = random.Random(2)
        while at < core.last:
            until = min(at + draw.randrange(6), core.last)
            found = [logged.lsn for logged in follower.read(until)]
            assert found == list(range(at + 1, until + 1)), f"{found} after {at} up to {until}"
            at = until
        assert not list(follower.read(core.last)), "an operation came twice"
        follower.close()

    def test_p20_follows_as_it_grows(self, tmp_path: Path) -> None:
        """P20: a follower sees each operation once it is appended, over switches too."""
        core = self.core(tmp_path).create()
        follower = core.adapter.follow(0)
        assert not list(follower.read(0))
        for turn in range(60):
            before = core.last
            for _ in range(turn % 4):
                core.append()
            if turn % 9 == 0:
                core.adapter.switch(core.next_lsn, 0)
            if turn % 7 == 0:
                core.sync()
            found = list(follower.read(core.last))
            core.agree(found, before)

    def test_p20_reads_no_further_than_a_gap(self, tmp_path: Path) -> None:
        """P20: asked for an LSN that was left out, a follower stops before what follows it."""
        self.needs_durable()
        core = self.core(tmp_path).create().extend(3)
        core = core.reopen(lsn=50).extend(3)
        follower = core.adapter.follow(0)
        assert [logged.lsn for logged in follower.read(20)] == [1, 2, 3]
        assert not list(follower.read(49))
        assert [logged.lsn for logged in follower.read(50)] == [50]
        assert [logged.lsn for logged in follower.read(52)] == [51, 52]

    def test_p22_skips_its_own(self, tmp_path: Path) -> None:
        """P22: what this process wrote itself is stepped over, and nothing else."""
        core = self.core(tmp_path).create()
        follower = core.adapter.follow(0)
        draw = random.Random(3)
        for turn in range(80):
            first = core.next_lsn
            places = core.append(
                *(operation(first + i) for i in range(draw.choice((1, 1, 1, 2, 3))))
            )
            if turn % 3:
                for i, place in enumerate(places):
                    follower.skip(first + i, place.cursor)
            else:
                core.agree(list(follower.read(core.last)), first - 1)
            if turn % 13 == 5:
                core.adapter.switch(core.next_lsn, 0)
        assert not list(follower.read(core.last)), "something was read that was skipped"
        late = core.adapter.follow(core.last - 1)
        late.skip(core.last, core.at[core.last].cursor)
        core.append()
        core.agree(list(late.read(core.last)), core.last - 1)

    def test_p23_what_was_dropped_is_gone(self, tmp_path: Path) -> None:
        """P23, P25: a follower or pin behind what was dropped is told so, or still served."""
        core = self.core(tmp_path).create()
        self.churn(core, 40)
        lagging = core.adapter.follow(0)
        list(lagging.read(1))
        core.adapter.drop_below(core.last - 3, *core.live([core.last]))
        for anew in (False, True):
            with contextlib.suppress(LogGone):
                follower = core.adapter.follow(2) if anew else lagging
                found = [logged.lsn for logged in follower.read(core.last)]
                assert found[-1] == core.last
                assert found == list(range(found[0], core.last + 1)), "a gap without a word"
                assert found[0] in (2, 3)
        for lsn in [lsn for lsn in core.wrote if core.wrote[lsn].first_id]:
            with contextlib.suppress(LogGone):
                pin, rows = core.pin([lsn])
                assert all(bytes(pin.read(i)) == row for i, row in enumerate(rows)), (
                    "a pin of something deleted gave something else"
                )

    def test_p24_pins_outlive_what_they_pin(self, tmp_path: Path) -> None:
        """P24, P36: a pin reads the same after eviction, deletion, retirement and closing."""
        core = self.core(tmp_path).create()
        self.churn(core, 40)
        pin, rows = core.pin(lsn for lsn in core.wrote if core.wrote[lsn].first_id)
        core.extend(3).sync()
        core.adapter.drop_below(core.last, *core.live([]))
        assert all(bytes(pin.read(i)) == row for i, row in enumerate(rows)), "after dropping"
        self.churn(core, 30)
        core.adapter.drop_below(core.last, *core.live([]))
        assert all(bytes(pin.read(i)) == row for i, row in enumerate(rows)), "after reuse of space"
        core.adapter.close()
        assert all(bytes(pin.read(i)) == row for i, row in enumerate(rows)), "after closing"

    def test_p26_any_thread_reads_a_pin(self, tmp_path: Path) -> None:
        """P26: threads read one pin at once, and what they got stays as it is."""
        core = self.core(tmp_path).create()
        self.churn(core, 30)
        pin, rows = core.pin(lsn for lsn in core.wrote if core.wrote[lsn].first_id)
        read: list[list[Any]] = []

        def work() -> None:
            read.append([pin.read(i) for i in range(len(rows))])

        threads = [threading.Thread(target=work, daemon=True) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(TIMEOUT_S)
        self.churn(core, 30)
        assert len(read) == 4, "a thread failed"
        assert all([bytes(row) for row in found] == rows for found in read)

    # ------------------------------------------------------------ upkeep

    def test_p30_switches(self, tmp_path: Path) -> None:
        """P30, P31: switching loses and moves nothing, prepared or not, empty or not."""
        core = self.core(tmp_path).create()
        core.adapter.switch(core.next_lsn, 0)
        core.adapter.switch(core.next_lsn, 0)
        for turn in range(12):
            core.extend(4)
            if turn % 3 == 1:
                core.adapter.prepare()
                core.adapter.install_prepared()
            if turn % 4 == 2:
                core.adapter.prepare()
                core.adapter.install_prepared()
            core.adapter.switch(core.next_lsn, core.durable)
            if turn % 5 == 3:
                core.sync()
            core.adapter.needs_preparation()
        core.follows()
        if self.durable():
            core.finish().reopen().extend(3).finish().reopen()

    def test_p30_switching_fails_anywhere(self, tmp_path: Path) -> None:
        """P30, P31, P40: where preparing or switching fails, everything is as before."""
        self.needs_durable()
        for number, fs in self.each_failure():
            fs.disarm()
            core = Core(self.place(tmp_path, f"switch{number}", fs)).create().extend(5).sync()
            fs.arm()
            try:
                if number % 2:
                    core.adapter.prepare()
                    core.adapter.install_prepared()
                core.adapter.switch(core.next_lsn, core.durable)
            except LogInterrupted:
                fs.disarm()
                core.adapter.retire(core.durable, core.last, core.next_lsn + 5)
                core.next_lsn += 5
            except StorageError:
                pass
            fs.disarm()
            core.extend(3).follows()
            core.adapter.prepare()
            core.adapter.install_prepared()
            core.adapter.switch(core.next_lsn, core.durable)
            core.extend(2).follows()
            core.reopen().finish()
            core.place.close()
            if not fs.struck:
                break

    def test_p32_keeps_what_is_needed(self, tmp_path: Path) -> None:
        """P32: dropping keeps the operations behind, and the payloads that are named."""
        core = self.core(tmp_path).create()
        self.churn(core, 60)
        live = [lsn for lsn in core.wrote if lsn % 7 == 0 or lsn > 45]
        for below in (0, 1, 20, 20, 45):
            core.adapter.drop_below(below, *core.live(live))
            core.follows(below, payloads=live)
            if self.durable():
                core.recovers(below, payloads=live)
            pin, rows = core.pin(live)
            assert all(bytes(pin.read(i)) == row for i, row in enumerate(rows))
        core.adapter.drop_below(core.last, *core.live(live))
        core.extend(5)
        core.follows(core.last - 5, payloads=range(core.last - 4, core.last + 1))
        if self.durable():
            dropped = core.last - 5
            core.finish()
            core.place.forget()
            again = Core(core.place, wrote=core.wrote)
            again.at = core.at
            again.recovers(dropped, durable=core.last)
            again.adapter.start(core.last + 1, core.last)
            pin, rows = again.pin(live)
            assert all(bytes(pin.read(i)) == row for i, row in enumerate(rows))

    def test_p32_a_steady_buffer_does_not_grow(self, tmp_path: Path) -> None:
        """P32: first in, first out at a steady size: the folder stops growing."""
        self.needs_durable()
        core = self.core(tmp_path).create()
        sizes: list[int] = []
        for turn in range(24):
            for _ in range(8):
                core.append(operation(core.next_lsn, 4, row_bytes=3000))
            core.sync()
            core.adapter.switch(core.next_lsn, core.durable)
            live = [lsn for lsn in core.wrote if lsn > core.last - 16]
            core.adapter.drop_below(core.last - 8, *core.live(live))
            sizes.append(
                sum(os.stat(p).st_blocks * 512 for p in self.stored_files(core.place.folder))
            )
            assert turn < 2 or core.adapter.stats()
        early, late = max(sizes[6:12]), max(sizes[18:])
        assert late <= early * self.steady_growth, f"the folder grew from {early} to {late} bytes"

    def test_p33_dropping_may_die(self, tmp_path: Path) -> None:
        """P33: dropping that fails anywhere keeps what is needed; the next one goes on."""
        self.needs_durable()
        for number, fs in self.each_failure():
            fs.disarm()
            core = Core(self.place(tmp_path, f"drop{number}", fs)).create()
            self.churn(core, 30)
            live = [lsn for lsn in core.wrote if lsn % 5 == 0 or lsn > 20]
            fs.arm()
            with contextlib.suppress(StorageError):
                core.adapter.drop_below(20, *core.live(live))
            fs.disarm()
            core.follows(20, payloads=live)
            core.recovers(20, payloads=live)
            core.adapter.drop_below(20, *core.live(live))
            pin, rows = core.pin(live)
            assert all(bytes(pin.read(i)) == row for i, row in enumerate(rows))
            core.place.close()
            if not fs.struck:
                break

    def test_p34_finds_nothing_where_nothing_is(self, tmp_path: Path) -> None:
        """P34: no damage is found in a buffer that is in use, that was closed, or was killed."""
        core = self.core(tmp_path).create()
        self.churn(core, 30)
        core.extend(2)
        assert not _verified(core.adapter, core.last)
        core.adapter.drop_below(10, *core.live(lsn for lsn in core.wrote if lsn > 8))
        assert not _verified(core.adapter, core.last)
        if self.durable():
            core.adapter.close()
            reader = core.place.adapter(writable=False)
            list(reader.recover(10, 0))
            assert not _verified(reader, core.last)
            reader.close()

    def test_p35_closes_cleanly(self, tmp_path: Path) -> None:
        """P35: a log can be closed and opened again and again, also without a new operation."""
        self.needs_durable()
        core = self.core(tmp_path).create()
        for count in (0, 3, 0, 0, 5):
            core = core.extend(count).finish().reopen()
            assert core.adapter.torn() == (0, 0)
        core.finish()

    def test_p36_closes_twice(self, tmp_path: Path) -> None:
        """P36: closing leaves the folder as it is, may be done twice, and frees descriptors."""
        place = self.place(tmp_path)
        core = Core(place).create().extend(5)
        core.adapter.sync()
        if self.durable():
            before = image(self.stored_files(place.folder))
        core.adapter.close()
        core.adapter.close()
        if not self.durable():
            return
        assert image(self.stored_files(place.folder)) == before, "closing changed a file"
        for turn in range(7):
            core = core.reopen()
            self.churn(core, 20)
            core.follows()
            pin, _ = core.pin(core.at)
            del pin
            core.adapter.close()
            if turn == 1:
                held = _descriptors()
        assert _descriptors() <= held + 2, "descriptors leak"

    def test_p37_facts_are_json(self, tmp_path: Path) -> None:
        """P37: `stats` is JSON-like."""
        core = self.core(tmp_path).create().extend(5)
        json.dumps(core.adapter.stats())

    def test_p38_survivors_move(self, tmp_path: Path) -> None:
        """P38: what `survivors` names is logged again, and the old place may go."""
        core = self.core(tmp_path).create()
        self.churn(core, 60)
        live = [lsn for lsn in core.wrote if lsn % 9 == 0 or lsn > 50]
        ids, places = core.live(live)
        rows = [row for lsn in live for row in rows_of(core.wrote[lsn])]
        lengths = np.array([len(row) for row in rows], np.uint32)
        moving = core.adapter.survivors(places, lengths)
        assert moving.dtype == np.bool_, f"survivors gives {moving.dtype}"
        assert moving.shape == places.shape, f"survivors gives {moving.shape} for {places.shape}"
        if moving.any():
            chosen = [rows[i] for i in np.flatnonzero(moving).tolist()]
            (again,) = core.append(relogged(core.next_lsn, chosen))
            places[moving] = places_of(again.location, lengths[moving])
        core.extend(1).sync()
        core.adapter.switch(core.next_lsn, core.durable)
        core.adapter.drop_below(core.last, ids, places)
        pin = core.adapter.pin(ids, places, lengths)
        assert all(bytes(pin.read(i)) == row for i, row in enumerate(rows)), "a survivor is lost"

    # ------------------------------------------------------------ everywhere

    def test_p40_a_full_disk(self, tmp_path: Path) -> None:
        """P40: on a full disk an append raises `StorageFull` or works; with room it goes on."""
        self.needs_durable()
        fs = FaultyFileSystem()
        core = Core(self.place(tmp_path, fs=fs)).create().extend(5).sync()
        fs.limit(0)
        refused = 0
        for _ in range(400):
            lsn = core.next_lsn
            try:
                core.append(operation(lsn, 3, row_bytes=5000))
            except LogInterrupted:
                raise AssertionError("nothing was written that must be undone") from None
            except StorageFull:
                refused += 1
                if refused > 3:
                    break
                core.follows(lsn - 2)
            else:
                core.adapter.sync()
        assert refused, "a disk without room took 400 commits"
        core.follows()
        fs.clear()
        core.extend(5).sync()
        core.finish().reopen()

    def test_p40_library_errors_are_wrapped(self, tmp_path: Path) -> None:
        """P40: a folder that vanished gives a `StorageError`, not the library's own error."""
        self.needs_durable()
        core = self.core(tmp_path).create().extend(5).finish()
        shutil.rmtree(core.place.folder)
        for name in ("recover", "attach"):
            adapter = core.place.adapter()
            with pytest.raises((StorageError, LogGone)):  # noqa: PT012
                if name == "recover":
                    list(adapter.recover(0, 0))
                    raise StorageError("an empty log was found")
                adapter.attach()
                list(adapter.follow(0).read(5))
            core.place.close()

    def test_p42_files_of_another_buffer(self, tmp_path: Path) -> None:
        """P42: files that carry another buffer's UUID are refused."""
        self.needs_durable()
        core = self.core(tmp_path).create().extend(5).finish()
        core.place.forget()
        stranger = core.place.adapter(uuid=bytes(reversed(range(16))))
        with pytest.raises(CorruptionError):
            list(stranger.recover(0, 0))

    def test_p44_a_forked_child(self, tmp_path: Path) -> None:
        """P44: a child drops what it inherited, opens its own; the parent notices nothing."""
        self.needs_multiprocess()
        core = self.core(tmp_path).create().extend(10).sync()
        follower = core.adapter.follow(0)
        pin, rows = core.pin(core.wrote)
        for round_ in range(3):
            first = core.next_lsn
            in_child(self.forked(core, first))
            core.wrote |= {lsn: operation(lsn) for lsn in range(first, first + 3)}
            core.next_lsn = first + 3
            core.extend(2).sync()
            list(follower.read(core.last))
            core.follows()
            assert all(bytes(pin.read(i)) == row for i, row in enumerate(rows)), f"round {round_}"
        core.finish().reopen()

    def forked(self, core: Core, first: int) -> Callable[[Child], None]:
        """What the child does."""

        def work(child: Child) -> None:
            core.adapter.after_fork()
            core.adapter.close()
            mine = Core(core.place, wrote=core.wrote)
            mine.adapter.attach()
            mine.follows()
            mine.next_lsn = first
            mine.extend(3)
            mine.adapter.sync()
            mine.follows(first - 1)
            mine.adapter.close()

        return work

    def test_p44_forks_beside_threads(self, tmp_path: Path) -> None:
        """P44: a fork at any instant, while other threads write, leaves both sides working."""
        self.needs_multiprocess()
        core = self.core(tmp_path).create().extend(3)
        append, stop = threading.Lock(), threading.Event()
        failed: list[BaseException] = []

        def write_on() -> None:
            try:
                while not stop.is_set():
                    with append:
                        core.append()
                    core.adapter.sync()
            except BaseException as exc:
                failed.append(exc)

        thread = threading.Thread(target=write_on, daemon=True)
        thread.start()
        try:
            for _ in range(10):
                with append:
                    last = core.last

                def work(child: Child, last: int = last) -> None:
                    core.adapter.after_fork()
                    mine = Core(core.place, wrote={n: operation(n) for n in range(1, last + 1)})
                    mine.adapter.attach()
                    mine.follows()
                    mine.adapter.close()

                in_child(work)
        finally:
            stop.set()
            thread.join(TIMEOUT_S)
        if failed:
            raise failed[0]
        core.follows()

    def test_p45_a_stranger(self, tmp_path: Path) -> None:
        """P8, P45: a process that was started apart attaches, follows and appends."""
        self.needs_multiprocess()
        if not isinstance(self.provider, str):
            pytest.skip("a provider without a name cannot be told to a stranger")
        core = self.core(tmp_path).create().extend(12)
        arguments = [self.provider, json.dumps(dict(self.settings)), str(tmp_path), "12"]
        code = (
            "import sys; from expbuf_core.testing import persistence_suite as s;"
            "s._stranger(sys.argv)"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            timeout=TIMEOUT_S,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"the other process failed: {done.stderr[-2000:]}"
        core.wrote |= {lsn: operation(lsn) for lsn in range(13, 17)}
        core.follows()

    # ------------------------------------------------------------ whole buffers

    def test_p50_a_buffer_that_is_killed(self, tmp_path: Path) -> None:
        """P50: a buffer on this backend is killed while it adds; every acknowledged add is back."""
        self.needs_durable()
        for durability in ("sync", "os"):
            folder = tmp_path / durability

            def work(child: Child, folder: Path = folder, durability: str = durability) -> None:
                with self.buffer(folder, durability=durability) as buffer:
                    while True:
                        child.say(buffer.add(_experience(len(buffer))))

            known = 0
            for more in (12, 30, 60):
                child = Child(work)
                for _ in range(more):
                    said = child.hear()
                    assert said, child.join()
                rest = child.kill().split()
                acknowledged = known + more + len(rest)
                with self.buffer(folder) as buffer:
                    known = len(buffer)
                    assert acknowledged <= known <= acknowledged + 1, "an add is lost, or too many"
                    for i, found in enumerate(buffer):
                        assert found.answer == f"answer {i}"
                        assert np.array_equal(np.asarray(found.v_embed), _vector(i))
                    hits = buffer.search_index(v_embed=_vector(7), q_embed=_vector(-7), k=1)
                    assert hits[0].experience.answer == "answer 7"

    def test_p51_snapshots_and_eviction(self, tmp_path: Path) -> None:
        """P51: a small buffer that evicts, snapshots and drops keeps exactly the newest."""
        self.needs_durable()
        folder = tmp_path / "small"
        total = 0
        for _ in range(3):
            with self.buffer(folder, max_size=50, durability="os") as buffer:
                for _ in range(4):
                    buffer.add_many([_experience(total + i) for i in range(30)])
                    total += 30
                    buffer.save_snapshot()
                assert [item.answer for item in buffer] == [
                    f"answer {i}" for i in range(total - 50, total)
                ]

    def test_p52_processes_share_a_buffer(self, tmp_path: Path) -> None:
        """P52: processes add to one buffer at once; each sees what the others acknowledged."""
        self.needs_multiprocess()
        folder = tmp_path / "shared"
        with self.buffer(folder) as buffer:
            buffer.add(_experience(0))

            def work(child: Child) -> None:
                with self.buffer(folder) as mine:
                    for i in range(20):
                        id_ = mine.add(_experience(i))
                        assert id_ in mine
                        child.say(id_)

            children = [Child(work) for _ in range(2)]
            ids = {0}
            for turn in range(40):
                said = children[turn % 2].hear()
                assert said, children[turn % 2].join()
                ids.add(int(said))
                assert int(said) in buffer, "acknowledged elsewhere and not seen here"
            for child in children:
                child.join()
            assert len(ids) == 41, "an id was issued twice"
            assert len(buffer) == 41
        with self.buffer(folder) as buffer:
            assert len(buffer) == 41

    # ------------------------------------------------------------ help

    def durable(self) -> bool:
        """Whether the provider declares the capability "durable"."""
        return "durable" in self._provider().capabilities

    def needs_durable(self) -> None:
        """Skip where nothing survives the process."""
        if not self.durable():
            pytest.skip('does not declare the capability "durable"')

    def needs_multiprocess(self) -> None:
        """Skip where only one process can use a buffer."""
        if "multiprocess" not in self._provider().capabilities:
            pytest.skip('does not declare the capability "multiprocess"')

    def _provider(self) -> PersistenceProvider:
        return provider_of(self.provider)

    def place(self, root: Path, name: str = "buffer", fs: FileSystem | None = None) -> Place:
        """A new folder for a buffer."""
        return Place(root, self.provider, self.settings, name=name, fs=fs)

    def core(self, root: Path, name: str = "buffer") -> Core:
        """A stand-in for the core, on a new folder."""
        return Core(self.place(root, name))

    def churn(self, core: Core, count: int) -> None:
        """Append so many operations, with switches and syncs between."""
        for i in range(count):
            core.append()
            if i % 6 == 5:
                core.sync()
                core.adapter.switch(core.next_lsn, core.durable)

    def each_failure(self) -> Iterator[tuple[int, _FailingOnce]]:
        """File systems whose first, second, … change fails; ends with one that did not fail.

        Every third is tried as an interruption, after which nothing works any more.
        """
        for number in range(1, 400):
            yield number, _FailingOnce(number, for_good=number % 3 == 0)
        raise AssertionError("400 calls and no end")

    def buffer(self, folder: Path, **settings: Any) -> ExperienceBuffer:
        """A whole buffer on this backend."""
        provider = self._provider()
        plugins = [] if isinstance(self.provider, str) else [_Offer(provider)]
        choice = {"backend": provider.name, provider.name: dict(self.settings)}
        return ExperienceBuffer.open(
            folder,
            plugins=plugins,
            persistence=choice,
            index={"backend": "exact", "builder": "off"},
            **settings,
        )


class _Offer:
    """A plugin that offers one provider."""

    def __init__(self, provider: PersistenceProvider) -> None:
        self._provider = provider

    @hookimpl
    def expbuf_register_persistence(self) -> list[PersistenceProvider]:
        """Offer it."""
        return [self._provider]


class _FailingOnce(FaultyFileSystem):
    """The n-th call that changes something fails, while armed.

    Attributes:
        nth: Which.
        struck: Whether it has failed.
    """

    def __init__(self, nth: int, *, for_good: bool) -> None:
        super().__init__()
        self.nth = nth
        self._for_good = for_good
        self._fault = self.fail(error=errno.EIO, nth=nth, times=None if for_good else 1)

    @property
    def struck(self) -> bool:
        """Whether it has failed."""
        return self._fault.seen >= self.nth

    def arm(self) -> None:
        """Count from here."""
        if self._fault not in self.faults:
            self._fault.seen = 0
            self.faults.append(self._fault)

    def disarm(self) -> None:
        """Let everything work."""
        if self._fault in self.faults:
            self.faults.remove(self._fault)
            if not self._fault.seen >= self.nth:
                self._fault.seen = 0


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

    def __init__(self, suite: PersistenceSuite, root: Path, seed: int) -> None:
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


def _verified(adapter: PersistenceAdapter, until_lsn: int) -> list[Problem]:
    """The damage that `verify` finds; an error counts as a finding."""
    try:
        return [problem for problem in adapter.verify(until_lsn) if problem.damage]
    except StorageError as exc:
        return [Problem("", -1, str(exc), True)]


def _descriptors() -> int:
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


def _vector(number: int) -> NDArray[np.float32]:
    return np.random.default_rng(number + 1000).standard_normal(8).astype(np.float32)


def _experience(number: int) -> Experience:
    return Experience(
        v_embed=_vector(number),
        q_embed=_vector(-number),
        answer=f"answer {number}",
        confidence=0.5,
    )


def _stranger(argv: list[str]) -> None:
    """Follow and append in a process of its own; see P45."""
    name, settings, root, last = argv[1:]
    place = Place(Path(root), name, json.loads(settings))
    core = Core(place, wrote={lsn: operation(lsn) for lsn in range(1, int(last) + 1)})
    core.adapter.attach()
    core.follows()
    core.extend(4).follows()
    core.adapter.sync()
    place.close()
