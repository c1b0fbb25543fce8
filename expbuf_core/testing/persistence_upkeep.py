"""P30 to P38: switching, dropping, verifying, closing."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

import numpy as np

from expbuf_core.contracts import (
    LogInterrupted,
)
from expbuf_core.errors import StorageError
from expbuf_core.testing.persistence_base import (
    PersistenceBase,
    damage_found,
    open_descriptors,
)
from expbuf_core.testing.persistence_log import (
    Core,
    image,
    operation,
    outcome,
    places_of,
    relogged,
    rows_of,
)


class Upkeep(PersistenceBase):
    """P30 to P38."""

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

    def test_p34_finds_nothing_where_nothing_is(self, tmp_path: Path) -> None:
        """P34: no damage is found in a buffer that is in use, that was closed, or was killed."""
        core = self.core(tmp_path).create()
        self.churn(core, 30)
        core.extend(2)
        assert not damage_found(core.adapter, core.last)
        core.adapter.drop_below(10, *core.live(lsn for lsn in core.wrote if lsn > 8))
        assert not damage_found(core.adapter, core.last)
        if self.durable():
            core.adapter.close()
            reader = core.place.adapter(writable=False)
            list(reader.recover(10, 0))
            assert not damage_found(reader, core.last)
            reader.close()

    def test_p35_closes_cleanly(self, tmp_path: Path) -> None:
        """P35: a log can be closed and opened again and again, also without a new operation."""
        self.needs_durable()
        core = self.core(tmp_path).create()
        for count in (0, 3, 0, 0, 5):
            core = core.extend(count).finish().reopen()
            assert core.adapter.torn() == (0, 0)
        core.finish()

    def test_p35_a_missing_end_is_damage(self, tmp_path: Path) -> None:
        """P35: behind a clean close no operation may be lost, whoever says what was durable."""
        self.needs_durable()
        core = self.core(tmp_path).create().extend(5).sync()
        folder = core.place.folder
        before = image(self.stored_files(folder))
        core.append(operation(core.next_lsn, 1))
        appended = image(self.stored_files(folder))
        core.finish()
        for path in self.stored_files(folder):
            if path in appended and path not in before:
                if path.read_bytes() == appended[path]:
                    path.unlink()  # the append made it; else the mark of the end stands in it, too
            elif path in appended:
                old, new, now = before[path], appended[path], bytearray(path.read_bytes())
                for i in range(min(len(new), len(now))):
                    if new[i] == now[i] and (i >= len(old) or old[i] != new[i]):
                        now[i] = old[i] if i < len(old) else 0
                path.write_bytes(now)
        outcome(core.place, core.wrote, durable=0)

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
                held = open_descriptors()
        after = open_descriptors()
        assert after <= held + 2, (
            f"{after - held} descriptors more after five openings: `close` must close all"
        )

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
