"""P20 to P26: following the log and pinning payloads."""

from __future__ import annotations

import contextlib
import random
import threading
from pathlib import Path
from typing import Any

from expbuf_core.contracts import (
    LogGone,
)
from expbuf_core.testing.persistence_base import (
    PersistenceBase,
)
from expbuf_core.testing.persistence_log import (
    operation,
)
from expbuf_core.testing.processes import TIMEOUT_S


class Reading(PersistenceBase):
    """P20 to P26."""

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
