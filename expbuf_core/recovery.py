"""Loading a buffer's state: the newest intact snapshot, and the log behind it."""

from __future__ import annotations

import contextlib
import logging
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from expbuf_core import snapshots
from expbuf_core.contracts import LogGone
from expbuf_core.errors import CorruptionError
from expbuf_core.replica import Replica
from expbuf_core.state import State, runs
from expbuf_core.tiers import IndexTiers

_log = logging.getLogger("expbuf")
_TRIES = 10


@dataclass(frozen=True)
class RecoveryReport:
    """What opening found.

    Attributes:
        lsn: Last operation.
        experiences: In the buffer.
        snapshot_lsn: Of the snapshot that was loaded; 0: none.
        replayed: Operations applied from the log.
        torn_bytes: Bytes of an unfinished last write, left out: nothing of it was acknowledged.
        clean: The last process closed the buffer in order.
        first: This process was the first to open it, and recovered it.
        seconds: What it took.
        warnings: What was passed over (damaged snapshots).
    """

    lsn: int
    experiences: int
    snapshot_lsn: int
    replayed: int
    torn_bytes: int
    clean: bool
    first: bool
    seconds: float
    warnings: tuple[str, ...] = ()

    def __str__(self) -> str:
        how = "clean" if self.clean else "recovered" if self.first else "joined"
        if self.lsn <= 1:
            how = "new"
        text = (
            f"{how}: {self.experiences} experiences at lsn {self.lsn} "
            f"({self.replayed} operations replayed in {self.seconds:.3f} s"
        )
        torn = f"; a torn tail of {self.torn_bytes} bytes left out" if self.torn_bytes else ""
        return text + torn + ")"


class Loaded(NamedTuple):
    """How a replica came to its state."""

    snapshot_lsn: int = 0
    replayed: int = 0
    torn_bytes: int = 0
    warnings: tuple[str, ...] = ()
    rows: int = 0  # experiences added behind the snapshot


class _Ahead:
    """Has another thread take the memory of vectors to come, where the machine can do both."""

    def __init__(self) -> None:
        self._helper = ThreadPoolExecutor(1, "expbuf-memory")  # the thread starts with the first
        self._last: Future[None] | None = None

    def see_to(self, tiers: IndexTiers) -> None:
        """Begin, unless that is under way or there is enough."""
        if tiers.is_short() and (self._last is None or self._last.done()):
            with contextlib.suppress(RuntimeError):  # no more threads
                self._last = self._helper.submit(tiers.take_ahead)

    def __enter__(self) -> _Ahead:
        return self

    def __exit__(self, *_: object) -> None:
        self._helper.shutdown()


def recover(replica: Replica, path: Path, witness: int) -> Loaded:
    """Load what is on disk, verifying all that is newer than the snapshot (open lock held alone).

    Args:
        replica: To be loaded.
        path: Folder of the buffer.
        witness: An LSN that is known to have been durable.

    Raises:
        CorruptionError: Something that was durable is damaged or missing.
    """
    state, errors = snapshots.newest(path, replica.uuid)
    if state is not None:
        replica.reset(state)
    snapshot_lsn, added = replica.state.lsn, replica.state.total_added
    replayed = 0
    try:
        with _Ahead() as ahead:
            for run in runs(replica.adapter.recover_alike(snapshot_lsn, witness)):
                replica.apply_run(run)
                replayed += len(run)
                ahead.see_to(replica.tiers)
        if not replica.state.settings:
            raise CorruptionError(
                f"{path}: neither a snapshot nor the beginning of the log can be read",
                path=path,
                offset=0,
            )
    except CorruptionError:
        if errors:  # the log that would replace the damaged snapshot is gone, too
            raise errors[0] from None
        raise
    for error in errors:
        _log.warning("%s", error)
    replica.evicted = 0
    return Loaded(
        snapshot_lsn,
        replayed,
        replica.adapter.torn()[0],
        tuple(map(str, errors)),
        replica.state.total_added - added,
    )


def follow_from_snapshot(replica: Replica, path: Path) -> Loaded:
    """Load the newest snapshot and follow the log that live processes write.

    The replica stays `broken`, that is, nobody uses it, until the caller has loaded its index.
    """
    for attempt in range(_TRIES):
        state, errors = snapshots.newest(path, replica.uuid)
        with replica.lock:
            if state is None:
                # Without a snapshot, too: its place may be in a log that another session has
                # closed.
                state = State() if replica.broken else replica.state
            replica.broken = True
            replica.reset(state)
            lsn, added = replica.state.lsn, replica.state.total_added
            try:
                replica.follow_to(replica.control.published())
            except LogGone:  # a newer snapshot has replaced that part of the log meanwhile
                if attempt + 1 < _TRIES:
                    continue
                gap = CorruptionError(
                    f"{path}: the log has a gap and no snapshot covers it", path=path
                )
                raise (errors[0] if errors else gap) from None
            return Loaded(lsn, replica.state.lsn - lsn, rows=replica.state.total_added - added)
    raise AssertionError("unreachable")
