"""One process's copy of the buffer: columns, index tiers and sampler, kept in step with the log."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from expbuf_core import codec, payloads, segments
from expbuf_core.contracts import (
    Appended,
    LogFollower,
    LoggedOperation,
    LoggedRun,
    LogGone,
    PersistenceAdapter,
)
from expbuf_core.control import APPENDED, DURABLE, INDEX_GENERATION, NEXT_ID, RETIREMENTS, Control
from expbuf_core.errors import CorruptionError, ReentrantCall, StorageError
from expbuf_core.sampling import PrioritySampler, Settings
from expbuf_core.segments import Manifest
from expbuf_core.state import Change, State, runs
from expbuf_core.tiers import IndexTiers, Tail

_log = logging.getLogger("expbuf")
_REFUSE_CHUNK = 1024
_LAG = 512  # operations that a writer may leave to be applied
_LAG_ROWS = 1024  # and experiences in them: one may hold many

Refuse = Callable[[NDArray[np.float32], NDArray[np.float32]], NDArray[np.float32]]


class _Own(NamedTuple):
    """An operation that this process wrote; `retirements`: of logs, when it did."""

    operation: LoggedOperation
    place: Appended
    retirements: int


def _empty_tiers(state: State) -> IndexTiers:
    return IndexTiers(str(state.settings.get("metric", "cosine")), state.representation)


class Replica:
    """Applies the log in order. All state is read and changed under `lock`, I/O of others never.

    Args:
        adapter: The storage.
        control: Says what is published.
        sampling: For the sampler.
        folder: Of the buffer; None for one in memory.
        uuid: Of the buffer.
    """

    def __init__(
        self,
        adapter: PersistenceAdapter,
        control: Control,
        sampling: Settings,
        folder: Path | None,
        uuid: bytes,
    ) -> None:
        self.lock = threading.RLock()
        self.adapter = adapter
        self.control = control
        self.folder = folder
        self.uuid = uuid
        self._sampling = sampling
        self._follower: LogFollower | None = None
        self._cursor: tuple[int, object] | None = None  # (LSN, behind it), of our own last one
        self._own: dict[int, _Own] = {}
        self._refused: set[int] = set()  # adds that came too late for their representation
        self.counts: dict[int, int] = {}  # of own operations, until their caller has read them
        self.evicted = 0  # since it was last told
        self._following_now = False
        self.broken = False  # an operation may be applied in part: see `_catch_up`
        self.reset(State())

    def reset(self, state: State) -> None:
        """Start from this state."""
        self.state = state
        self.began = state.lsn  # of what came before, nothing was seen but what became of it
        self.tiers = _empty_tiers(state)
        self.incomplete = False  # the tiers lack what was added before the representation changed
        self.sampler = PrioritySampler(state, self._sampling)
        self._leave_log()
        self.settled()

    def settled(self) -> None:
        """All that is applied is durable, and stands where it will stay."""
        self._settled = self.state.lsn
        self._retirements = self.control.words[RETIREMENTS]

    def _leave_log(self) -> None:
        """Look for the place to read on anew."""
        if self._follower is not None:
            self._follower.close()
        self._follower = self._cursor = None

    def look_anew(self) -> None:
        """Read on in files that are opened anew: a finalizer may have closed those that were."""
        with self.lock:
            self._leave_log()

    def let_go(self) -> None:
        """Close the log, unless another thread is reading it: then it goes with this replica."""
        if self.lock.acquire(blocking=False):
            try:
                self._leave_log()
            finally:
                self.lock.release()

    # ------------------------------------------------------------ following

    def written(self, operation: LoggedOperation, place: Appended) -> None:
        """Keep an operation of this process at hand until it is published."""
        self._own[operation.lsn] = _Own(operation, place, self.control.words[RETIREMENTS])

    def _at_hand(self, lsn: int) -> _Own | None:
        """An operation of this process, unless the log that it was written to was given up.

        What became of it then, the new log says: it was either written again or lost.
        """
        own = self._own.get(lsn)
        if own is None or own.retirements != self.control.words[RETIREMENTS]:
            return None
        return own

    def _apply_own(self, own: _Own, published: int) -> None:
        """Apply an operation of this process; an add with the adds right behind it."""
        run = [own.operation]
        if run[0].kind == codec.ADD:
            while (lsn := run[-1].lsn + 1) <= published:
                following = self._at_hand(lsn)
                if following is None or following.operation.kind != codec.ADD:
                    break
                own = following
                run.append(own.operation)
        for operation in run:
            del self._own[operation.lsn]
        if self._follower is not None:
            self._follower.skip(run[-1].lsn, own.place.cursor)
        else:
            self._cursor = (run[-1].lsn, own.place.cursor)
        change = self.apply(*run)
        if run[0].kind != codec.ADD:
            self.counts[run[0].lsn] = change.applied

    def may_lag(self) -> bool:
        """Whether the next read may as well apply what there is, many at once, as a write now."""
        words, (lsn, next_id) = self.control.words, self.may_lag_until()
        return words[APPENDED] < lsn and words[NEXT_ID] < next_id

    def may_lag_until(self) -> tuple[int, int]:
        """Before APPENDED and NEXT_ID come to these, it may."""
        return self.state.lsn + _LAG, self.state.next_id + _LAG_ROWS

    def refresh(self) -> None:
        """Apply what has been published since; one comparison where that is nothing.

        Raises:
            LogGone: This replica must start from the newest snapshot: it lags too far behind, or
                an exception came in the middle of an operation.
            ReentrantCall: This thread is in here already.
        """
        control = self.control
        if (
            control.published() == self.state.lsn
            and control.words[RETIREMENTS] == self._retirements
            and not self.broken
        ):
            return
        with self.lock:
            if self.broken:
                raise LogGone
            self._catch_up(self.control.published())

    def follow_to(self, lsn: int) -> None:
        """Apply everything up to `lsn`, which is published, and nothing beyond (lock held)."""
        self._catch_up(lsn)

    def _settle(self) -> int:
        """Where a log was given up since, learn where the new one has what was written again.

        What is durable never moves; what is applied here and was not, may have.

        Returns:
            Up to where all was durable.
        """
        words, state = self.control.words, self.state
        durable = words[DURABLE]  # read first: a retirement counts itself before it raises it
        retirements = words[RETIREMENTS]
        if retirements != self._retirements:
            self._leave_log()
            if self._settled < state.lsn:
                with contextlib.closing(self.adapter.follow(self._settled)) as follower:
                    for operation in follower.read(state.lsn):
                        state.relocate(operation)
            self._retirements = retirements
        return durable

    def _catch_up(self, published: int) -> None:
        """Apply what there is (lock held).

        A signal handler may raise between any two instructions of the main thread; Ctrl-C does. A
        replica that was stopped in the middle is thrown away: the log has it all.
        """
        if self._following_now:
            raise ReentrantCall(
                "the buffer was called by a signal handler or finalizer that interrupted a call "
                "of the same thread; let it set a flag, or call from another thread"
            )
        self._following_now = True
        try:
            self._apply_published(published)
        except LogGone:
            raise
        except StorageError:  # from reading: what was read before it is applied
            self._leave_log()
            raise
        except BaseException:
            self.broken = True
            raise
        finally:
            self._following_now = False

    def _apply_published(self, published: int) -> None:
        durable = self._settle()
        try:
            self._apply_up_to(published)
        finally:
            # As far as can be. Whoever changes the representation syncs first, so what is looked
            # at again, should the log be given up, is never from before the last change: its
            # payloads are elsewhere now, and only the settings say so.
            self._settled = min(durable, self.state.lsn)

    def _apply_up_to(self, published: int) -> None:
        state = self.state
        while state.lsn < published:
            mine = [n for n in list(self._own) if state.lsn < n <= published and self._at_hand(n)]
            if self._is_mostly_own(mine, published):
                own = self._at_hand(state.lsn + 1)
                if own is not None:
                    self._apply_own(own, published)
                continue
            before = state.lsn
            try:
                self._apply_following(published)
            except BaseException:
                # It has read further than is applied: what is between would be passed over.
                self._leave_log()
                raise
            if state.lsn == before:
                until = min(mine, default=published + 1)
                own = self._at_hand(until)
                if own is not None:  # LSNs jump from here to our own operation
                    self._apply_own(own, published)
                    continue
                if self._own.get(until) is not None:
                    continue  # its log was given up just now: read on
                raise CorruptionError(
                    f"{self.folder or 'storage'}: operation {state.lsn + 1} was published and "
                    "cannot be read from the log; run `expbuf verify`",
                    path=self.folder,
                    lsn=state.lsn + 1,
                )
        if self._own:
            for lsn in [n for n in list(self._own) if n <= state.lsn]:
                del self._own[lsn]  # of a log that was given up

    def _is_mostly_own(self, mine: Sequence[int], published: int) -> bool:
        """Whether half of what is to be applied now are operations of this process, next in turn.

        Where they stand among others', reading all of them takes less than applying each by itself.
        """
        following = self.state.lsn + 1
        here = set(mine)
        end = following
        while end in here:
            end += 1
        return end > following and 2 * (end - following) > published - self.state.lsn - 1

    def _apply_following(self, until_lsn: int) -> None:
        """Read on in the log and apply what it has, up to there."""
        for run in runs(self._following().read_alike(until_lsn)):
            if isinstance(run, LoggedRun):
                mine_too = [n for n in list(self._own) if run.first_lsn <= n <= run.last_lsn]
                if not mine_too or run.kind == codec.ADD:
                    for lsn in mine_too:
                        self._own.pop(lsn, None)
                    self.apply_run(run)
                    continue
                run = list(run.operations())
            written_here = {op.lsn for op in run if self._own.pop(op.lsn, None) is not None}
            if not written_here or run[0].kind == codec.ADD:
                self.apply(*run)
                continue
            for operation in run:
                applied = self.apply(operation).applied
                if operation.lsn in written_here:
                    self.counts[operation.lsn] = applied

    def _following(self) -> LogFollower:
        if self._follower is None:
            self._follower = self.adapter.follow(self.state.lsn)
            if self._cursor is not None and self._cursor[0] == self.state.lsn:
                self._follower.skip(*self._cursor)
        return self._follower

    # ------------------------------------------------------------ applying

    def apply(self, *run: LoggedOperation) -> Change:
        """Apply the next operation or run to columns, tiers and sampler (lock held)."""
        try:
            return self._changed(self.state.apply(*run))
        except BaseException:
            self.broken = True
            raise

    def apply_run(self, run: list[LoggedOperation] | LoggedRun) -> Change:
        """`apply` of what `runs` makes (lock held)."""
        try:
            return self._changed(self.state.apply_run(run))
        except BaseException:
            self.broken = True
            raise

    def _changed(self, change: Change) -> Change:
        """Let tiers and sampler follow the columns."""
        state, tiers = self.state, self.tiers
        if change.settings:
            metric = str(state.settings.get("metric", "cosine"))
            if metric != tiers.metric or state.representation != tiers.representation:
                self.tiers = tiers = _empty_tiers(state)
                self.incomplete = self.incomplete or change.represented
        if change.added is not None and change.vectors is not None:
            tiers.add(change.added, change.vectors)
        if change.cleared:
            tiers.clear()
        elif change.removed is not None:
            tiers.remove(change.removed)
        if change.refused:
            self._refused.update(change.refused)
        self.evicted += change.evicted
        self.sampler.mark(change.touched)
        return change

    def was_refused(self, lsn: int, first_id: int, count: int) -> bool:
        """Whether an add that is applied, in a snapshot perhaps, left nothing (lock held).

        Of one in a snapshot that is said, too, where all of it was removed or evicted meanwhile:
        its writer had not acknowledged it.
        """
        if lsn in self._refused or lsn > self.began:
            return lsn in self._refused
        return bool((self.state.find(np.arange(first_id, first_id + count)) < 0).all())

    # ------------------------------------------------------------ index

    def index_is_stale(self) -> bool:
        """Whether the builder has published another set of segments."""
        return self.control.words[INDEX_GENERATION] != self.tiers.generation

    def uncovered(self) -> NDArray[np.int64]:
        """Live ids whose vectors are nowhere: behind the segments, before what was replayed."""
        ids = self.state.live_ids()
        return ids[~self.tiers.holds(ids)]

    def fill(self, refuse: Refuse) -> int:
        """Fuse again, from the payloads, the vectors that no tier holds (lock held).

        Returns:
            How many there were.
        """
        tiers, state = self.tiers, self.state
        if state.lsn >= tiers.lsn and tiers.live_rows == state.count:
            return 0  # every row is live, and in one tier only
        missing = self.uncovered()
        if not len(missing):
            return 0
        view = self.tiers.view()
        keep = view.tail_live
        ids = np.concatenate([missing, view.tail_ids[keep]])
        blocks = [*self._fused(missing, refuse), view.tail_vectors[keep]]
        vectors = np.concatenate([block for block in blocks if len(block)])
        order = np.argsort(ids, kind="stable")
        tiers.replace_tail(ids[order], vectors[order])
        return len(missing)

    def _fused(self, ids: NDArray[np.int64], refuse: Refuse) -> Iterator[NDArray[np.float32]]:
        state = self.state
        for start in range(0, len(ids), _REFUSE_CHUNK):
            part = ids[start : start + _REFUSE_CHUNK]
            slots = state.find(part)
            pin = self.adapter.pin(part, state.location[slots], state.length[slots])
            yield refuse(*payloads.read_embeddings(pin, part, state.dims))

    def adopt(
        self,
        manifest: Manifest | None,
        opened: tuple[segments.OpenSegment, ...],
        generation: int,
        tail: Tail | None = None,
    ) -> None:
        """Search these segments from now on (lock held).

        Args:
            manifest: That lists them.
            opened: The segments.
            generation: Of the manifest.
            tail: What is newer, if it was copied already.
        """
        live = None
        for segment in opened:
            gone = self.tiers.gone_since(segment)
            if gone is None:  # look at every row; on a large buffer searches notice that
                live = self.state.live_ids() if live is None else live
                gone = np.setdiff1d(segment.ids, live, assume_unique=True)
            segment.remove(gone)
            segment.watch = None
        self.tiers.adopt(
            opened,
            lsn=manifest.lsn if manifest else 0,
            end_id=end_of(manifest),
            generation=generation,
            tail=tail,
        )


def end_of(manifest: Manifest | None) -> int:
    """Ids from that one on are in none of its segments."""
    return max((info.end_id for info in manifest.segments), default=0) if manifest else 0
