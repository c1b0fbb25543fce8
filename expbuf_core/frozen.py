"""A buffer as it was at one LSN, while others go on writing. No lock is held, nobody waits.

The columns are copied once. Payloads are immutable and stay where they are, so they are read while
the copy of the columns is worked through. Two things may happen to one meanwhile: it is moved
(the replica, which goes on following, knows where to), or its experience is evicted and its file
dropped. The latter is met last by whoever goes from the oldest to the newest; it raises `LogGone`,
and only a newer state can still be read whole.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from expbuf_core import control as c
from expbuf_core.buffer import ExperienceBuffer
from expbuf_core.contracts import LogGone, Pin
from expbuf_core.results import PinnedExperiences
from expbuf_core.state import State
from expbuf_core.tiers import Gatherer

_TRIES = 3


class Frozen:
    """What a buffer holds at one LSN. Made by `freeze`; good while the buffer is open.

    Attributes:
        uuid: Of the buffer, 16 bytes.
        state: The columns, its own copy.
        next_id: Ids from here on were free.
        next_lsn: LSNs from here on were free.
    """

    def __init__(self, buffer: ExperienceBuffer) -> None:
        session = buffer._live()
        session.refresh()
        self._session = session
        self.uuid = session.uuid
        with session.replica.lock:
            self.state = State.load(*session.replica.state.dump())
        words = session.control.words
        self._retirements = words[c.RETIREMENTS]
        self.next_id, self.next_lsn = self.state.next_id, self.state.lsn + 1
        if session.control.is_mapped() or session.writable:
            self.next_id = max(self.next_id, int(words[c.NEXT_ID]))
            self.next_lsn = max(self.next_lsn, int(words[c.NEXT_LSN]))
        else:  # how the last process ended is not known
            self.next_id = max(self.next_id, self.state.reserved_id)
            self.next_lsn = max(self.next_lsn, self.state.reserved_lsn)

    def pin(
        self, ids: NDArray[np.int64], locations: NDArray[np.int64], lengths: NDArray[np.uint32]
    ) -> Pin:
        """Hold on to payloads, like a `PersistenceAdapter`; also those that were moved since.

        Raises:
            LogGone: One of them was dropped: freeze anew.
            CorruptionError: One of them is gone, and nobody was to drop it.
        """
        gone = LogGone()
        session = self._session
        # What was not durable may have been written again elsewhere when a log was given up.
        moved = session.control.words[c.RETIREMENTS] != self._retirements
        for attempt in range(_TRIES):
            if attempt or moved:
                session.catch_up_after_deletion(max(0, attempt - 1))
                with session.replica.lock:
                    live = session.replica.state
                    slots = live.find(ids)
                    if (slots < 0).any():
                        raise gone
                    locations, lengths = live.location[slots], live.length[slots]
            try:
                return session.adapter.pin(ids, locations, lengths)
            except LogGone as exc:
                gone = exc
        raise session.payloads_gone(gone)

    def experiences(self, ids: NDArray[np.int64]) -> PinnedExperiences:
        """Experiences as they were.

        Args:
            ids: (n,) that were live.

        Raises:
            LogGone: The payload of one of them was dropped: freeze anew.
        """
        slots = self.state.find(ids)
        chosen = PinnedExperiences(ids, slots, self.state)
        pin = self.pin(ids, chosen.locations, chosen.lengths)
        chosen.pin(pin, self._session.tell_corruption)
        return chosen


def freeze(buffer: ExperienceBuffer) -> Frozen:
    """The buffer as it is now; see `Frozen`."""
    return Frozen(buffer)


def freeze_with_vectors(buffer: ExperienceBuffer) -> tuple[Frozen, Gatherer]:
    """The buffer as it is now, and its fused vectors: (n, dim) float32 of (n,) live ids.

    Raises:
        CorruptionError: Not all vectors can be had.
    """
    session = buffer._live()
    for _ in range(_TRIES):
        with session.replica.lock:
            frozen = Frozen(buffer)
            intake = session.intake()
            if intake is None:
                return frozen, session.replica.tiers.gatherer(0)
            session.fill_index()
            ids = frozen.state.live_ids()
            vectors = session.replica.tiers.gatherer(intake.dim)
            if session.replica.tiers.holds(ids).all():
                return frozen, vectors
    raise session.payloads_gone(None)
