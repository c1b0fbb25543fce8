"""Adds that native code does from the experience to the acknowledgement.

What stands between the two in Python (`buffer.add`, `Session.add`, `CommitLog.commit`) is a few
microseconds in a loop, and several times that in the life of an agent, whose caches have seen
something else meanwhile. A plain add of a buffer whose upkeep has nothing to do needs none of it.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from expbuf_core.native import native

if TYPE_CHECKING:
    from expbuf_core.intake import Intake
    from expbuf_core.native._native import Adder, Log
    from expbuf_core.session import Session

_COMMITTED = "expbuf_on_committed"


class PlainAdds:
    """Of one session, as long as it has the same representation.

    Attributes:
        add: Takes an experience, and a priority or None. Returns its id; or what is to be given to
            `finish`, as there is more to do; or None, where Python is to do all of it.

    Args:
        session: An open one, of a folder.
        intake: The session's.
        log: What it writes to.
        adder: Made by `begin`.
    """

    def __init__(self, session: Session, intake: Intake, log: Log, adder: Adder) -> None:
        self._session = session
        self._intake = intake
        self._log = log
        self._adder = adder
        self.add = adder.add
        self.look_ahead()

    @classmethod
    def begin(cls, session: Session, intake: Intake, inside: set[int]) -> PlainAdds | None:
        """Of a session; None where native code cannot add.

        Args:
            session: An open one.
            intake: The session's.
            inside: Threads that are in the middle of a call of the buffer.
        """
        log, encoder = session.commit_log.native_log(), intake.encoder
        if native is None or log is None or encoder is None:
            return None
        adder = native.Adder(
            encoder=encoder,
            log=log,
            labels_of=intake.labels,
            clock=time,
            inside=inside,
            observers=session.registry.events.observers(_COMMITTED),
            representation=intake.representation,
            tells=session.config.durability != "os",
        )
        return cls(session, intake, log, adder)

    def finish(self, found: tuple[int, int, int | None]) -> int:
        """Do what is due behind an add; its id.

        Raises:
            Outdated: See `Session.add`.
        """
        lsn, id_, retirements = found
        session = self._session
        session.commit_log.finish_native(lsn, retirements)
        session.finish_add(lsn, id_, 1, self._intake.representation)
        self.look_ahead()
        return id_

    def look_ahead(self) -> None:
        """Say how far things may go before `finish` has anything to do.

        All that it compares with only rises (the end of the log, as long as the file is the same):
        at worst it is called too early.
        """
        lsn, next_id = self._session.replica.may_lag_until()
        due = self._session.upkeep.due_from(self._log.data_size)
        self._adder.until(
            min(lsn, due.appended),
            next_id,
            due.rows_added,
            due.damaged_index,
            due.file,
            due.data_end,
        )
