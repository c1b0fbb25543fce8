"""P1 to P8: creating, recovering, starting and joining."""

from __future__ import annotations

import contextlib
import json
import random
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from expbuf_core.contracts import (
    Stamped,
    one_by_one,
)
from expbuf_core.errors import CorruptionError, StorageError
from expbuf_core.testing.persistence_base import (
    LONG,
    PersistenceBase,
    damage_found,
)
from expbuf_core.testing.persistence_log import (
    Core,
    alike,
    image,
    operation,
    outcome,
    relogged,
    rows_of,
    without_rows,
)
from expbuf_core.testing.processes import Child, in_child


class Recovering(PersistenceBase):
    """P1 to P8."""

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
        for _, fs in self.each_failure(writes=True):
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

    def test_p1_a_log_may_begin_anywhere(self, tmp_path: Path) -> None:
        """P1, P7: a log that begins at a higher number is whole; nothing is missing before it."""
        core = self.core(tmp_path)
        core.next_lsn = 70
        core.create()
        for count in (0, 3):
            core.extend(count)
            for after in (0, 30, 69):
                core.follows(after)
            if self.durable():
                core.finish()
                core.place.forget()
                reader = Core(core.place, core.place.adapter(writable=False), core.wrote)
                for after in (0, 30, 69):
                    reader.recovers(after, durable=core.last)
                reader.adapter.close()
                core = core.reopen(lsn=core.next_lsn)
        assert core.last == 72
        core.extend(1).follows()

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
        for _ in range(self.many):
            core.append(without_rows(core.next_lsn, b"%d" % core.next_lsn))
        if self.durable():
            core = core.finish().reopen()
        core.recovers()
        core.follows(self.many // 2)

    def test_p2_operations_that_are_alike(self, tmp_path: Path) -> None:
        """P2, P20: many of one kind and size, which a backend may take together."""
        core = self.core(tmp_path).create()
        for rows, count in ((1, 40), (0, 40), (2, 3), (1, 5), (0, 1), (1, 20)):
            for _ in range(count):
                core.append(alike(core.next_lsn, rows))
        if self.durable():
            core = core.finish().reopen(durable=core.last - 30)
        for after in (0, 1, 17, 39, 40, 41, 79, 88, core.last - 1, core.last):
            core.recovers(after)
            core.follows(after)
        follower, at = core.adapter.follow(0), 0
        for step in (1, 18, 30, 31, 9, core.last - 89):
            found = list(one_by_one(follower.read_alike(at + step)))
            assert [logged.lsn for logged in found] == list(range(at + 1, at + step + 1))
            at += step
        follower.close()

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
                problems = damage_found(adapter, core.last)
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
                assert damage_found(adapter, core.last), "verify finds nothing"
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
            if self.appears_whole and path not in before:
                if share < 0.5:
                    path.unlink(missing_ok=True)
                else:
                    path.write_bytes(new)
                continue
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
                assert not damage_found(reader.adapter, reader.last)
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
