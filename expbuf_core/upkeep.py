"""What commits make due: index builds, snapshots, the next log; in a thread or another process.

Nothing here is waited for by a reader or a writer, and nothing here begins by the clock.
"""

from __future__ import annotations

import contextlib
import json
import logging
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from expbuf_core import builder_processes, codec, folder, indexing, segments, snapshots
from expbuf_core import control as c
from expbuf_core.commit import Draft
from expbuf_core.config_schema import BufferConfig
from expbuf_core.contracts import Appended, LoggedOperation, LogGone
from expbuf_core.errors import BufferClosed, CorruptionError, ExpbufError, StorageFull
from expbuf_core.locks import holder
from expbuf_core.relog import relog_draft
from expbuf_core.replica import end_of
from expbuf_core.state import State
from expbuf_core.tiers import known_directions

if TYPE_CHECKING:
    from expbuf_core.session import Session

_log = logging.getLogger("expbuf")
_STOP_S = 60.0
_AGAIN_S = 0.5  # until it is asked again whether a builder that was found has done what was due
_RETRY_S = 1.0  # pause after a failure, so that a full disk is not met at every commit
# Moved in one commit. Each has a sync of its own, which writers wait behind: so not few small ones;
# and not so many that this process' reads, or writers, notice one.
_RELOG_ROWS, _RELOG_BYTES = 2048, 1 << 20
# Kept of a buffer in memory before what is dead is dropped: so many operations, or bytes. But as
# many bytes as live are always kept, so that to drop costs no more than to add.
_MEMORY_OPERATIONS, _MEMORY_BYTES = 10_000, 8 << 20
_ROW_BYTES = 200  # that an object in memory takes besides what is in it
_FILE, _DATA_END = c.ADAPTER, c.ADAPTER + 1  # native code appends to: see `contracts.OpenLog`
_ASK_AGAIN_BYTES = 1 << 18
_NEVER = (1 << 64) - 1


class Due(NamedTuple):
    """Values of control words from which on something may be due."""

    appended: int
    rows_added: int
    damaged_index: int
    file: int
    data_end: int


CLOSING_OPERATIONS = 10_000  # a log so long makes a snapshot worth while at closing


class Upkeep:
    """The upkeep of one session. A thread starts with the first need.

    Attributes:
        build_by: Runs the computing part of a build, during which nothing is held that readers or
            writers wait for.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self.build_by: Callable[[Callable[[], object]], object] = _at_once
        self._wanted: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._starting = threading.RLock()  # what follows is changed by any thread that commits
        self._thread: threading.Thread | None = None
        self._busy = False
        self._ending = False
        self._failed_at = 0.0
        self._found_builder = False  # that another session, or a need before, has started
        self._asked_for = 0  # what the hint of a damaged index was when a build began last
        self._adopting = _Aside("expbuf-adopt", self._adopt_aside)
        self._taking = _Aside("expbuf-memory", self._take_memory)
        # Held by whoever changes files of the folder outside the write path, so that `stop` can
        # wait for threads of the caller's, too.
        self._working = threading.RLock()
        self._stopped = False
        # Of a buffer in memory: bytes written so far; and as of when dead ones were dropped last,
        # the LSN, that figure, and bytes that lived.
        self._written_bytes = 0
        self._dropped_at = self._dropped_bytes = self._live_bytes = 0
        self._base: tuple[dict[str, Any], dict[str, NDArray[Any]]] | None = None  # as of then
        self._snapshot_lsn = 0  # of the snapshot behind which experiences are counted, and
        self._snapshot_rows = 0  # what the counter of added ones said then
        self._scattered = False  # so many logs were there at opening that there had better be fewer
        # Asked at each commit.
        self._builds = session.config.index.builder in ("process", "thread")
        self._rebuild_every = session.config.index.rebuild_every
        self._snapshot_every = session.config.snapshot.every_ops

    def begin(self, rows: int, *, first: bool) -> None:
        """At opening: so many experiences were added behind the newest snapshot."""
        builder_processes.reap()
        words = self._session.control.words
        self._snapshot_lsn = words[c.SNAPSHOT_LSN]
        self._snapshot_rows = words[c.ROWS_ADDED] - rows
        # Now, since it may be only opened and closed, or killed, as it was so many times before.
        self._scattered = first and self._session.adapter.is_scattered()
        if self._scattered:
            self.after_commit()

    def let_go(self) -> None:
        """Keep nothing in memory: the session is closed, and what it has is gone."""
        self._base = None

    def load_base(self) -> None:
        """Begin a replica in memory anew (its lock held)."""
        replica = self._session.replica
        replica.broken = True
        replica.reset(State() if self._base is None else State.load(*self._base))
        replica.follow_to(replica.control.published())

    # ------------------------------------------------------------ the thread

    def after_commit(self) -> None:
        """See whether anything is due; almost always a few comparisons."""
        if self._busy or not self._is_due():
            return
        if self._failed_at and time.monotonic() - self._failed_at < _RETRY_S:
            return
        with self._starting:
            if not self._busy and not self._ending:
                self._begin()

    def _begin(self) -> None:
        """Have the thread do what is due."""
        self._busy = True
        try:
            if self._thread is None:
                thread = threading.Thread(target=self._run, name="expbuf-upkeep", daemon=True)
                thread.start()
                self._thread = thread
            self._wanted.put(True)
        except RuntimeError as exc:  # no more threads: the commit stands all the same
            self._busy, self._failed_at = False, time.monotonic()
            _log.warning("upkeep cannot begin and will be tried again: %s", exc)
        except BaseException:
            self._busy = False
            raise

    def _next(self) -> bool:
        """Wait until something is to be done; False: no more."""
        try:
            return self._wanted.get(timeout=_AGAIN_S if self._found_builder else None)
        except queue.Empty:
            return True
        finally:
            self._found_builder = False

    def _run(self) -> None:
        while self._next():
            try:
                self._do()
                self._failed_at = 0.0
            except Exception as exc:
                if not self._session.closed:
                    where = self._session.path or "the buffer in memory"
                    _log.warning("upkeep of %s failed and will be tried again: %s", where, exc)
                self._failed_at = time.monotonic()
            finally:
                self._busy = False

    def stop(self) -> None:
        """Let the tasks under way end, and no other begin."""
        with self._starting:
            self._ending = True
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            self._wanted.put(False)
            thread.join(timeout=_STOP_S)
        builder_processes.reap()
        free = self._working.acquire(timeout=_STOP_S)
        self._stopped = True
        if free:
            self._working.release()

    @contextlib.contextmanager
    def _at_work(self) -> Iterator[None]:
        """Keep `close` waiting, and see that this is still the buffer's folder."""
        with self._working:
            if self._stopped:
                raise BufferClosed("the buffer is closed; open it again")
            self._session.check_folder()
            yield

    def _is_due(self) -> bool:
        session = self._session
        if session.path is None:
            operations = session.replica.state.lsn - self._dropped_at
            written = self._written_bytes - self._dropped_bytes
            return operations > _MEMORY_OPERATIONS or written > max(_MEMORY_BYTES, self._live_bytes)
        return (
            (self._builds and self.build_is_due())
            or self.snapshot_is_due()
            or session.adapter.needs_preparation()
        )

    def due_from(self, log_bytes: int) -> Due:
        """How far things may go before `after_commit` has anything to do.

        Args:
            log_bytes: Size of the log file.
        """
        words, session = self._session.control.words, self._session
        # Read first: what changes while it is asked whether anything is due is due from now on.
        damaged, file, end = words[c.DAMAGED_INDEX], words[_FILE], words[_DATA_END]
        if session.path is None or self._busy or self._is_due():
            return Due(0, 0, 0, 0, 0)
        lsn = self._snapshot_lsn + self._snapshot_every
        rows = self._snapshot_rows + self._snapshot_every
        if self._builds:
            rows = min(rows, words[c.BUILT_ROWS] + self._rebuild_every)
        # Whether the adapter needs preparation it is asked now and then.
        end += min(_ASK_AGAIN_BYTES, log_bytes >> 3)
        damaged = damaged + 1 if self._builds else _NEVER
        return Due(min(lsn, _NEVER), min(rows, _NEVER), damaged, file + 1, end)

    def _do(self) -> None:
        session = self._session
        if session.closed:
            return
        if session.path is None:
            self._drop_dead()
            return
        if session.adapter.needs_preparation():
            session.maintenance.try_run(session.commit_log.prepare)
        if self._builds and self.build_is_due():
            if session.config.index.builder == "thread":
                self.build_index()
            else:
                self._start_builder()
        if self.snapshot_is_due():
            self.snapshot(if_due=True)

    # ------------------------------------------------------------ in memory

    def written(self, operation: LoggedOperation, place: Appended) -> None:
        """See what a buffer in memory grows by (append lock held)."""
        lengths = operation.lengths
        rows = int(lengths.sum(dtype=np.int64)) + _ROW_BYTES * len(lengths) if len(lengths) else 0
        self._written_bytes += len(operation.body) + _ROW_BYTES + rows
        self._session.replica.written(operation, place)

    def _drop_dead(self) -> None:
        """Let go of operations, which the columns stand for, and of payloads of none that lives."""
        session, replica = self._session, self._session.replica
        written = self._written_bytes  # before looking: what comes meanwhile is kept
        with replica.lock:
            ids, locations, lengths = self._live_payloads()
            self._base = replica.state.dump()
            self._dropped_at, self._dropped_bytes = replica.state.lsn, written
            self._live_bytes = int(lengths.sum(dtype=np.int64)) + _ROW_BYTES * len(lengths)
            session.adapter.drop_below(self._dropped_at, ids, locations)

    # ------------------------------------------------------------ index

    def build_is_due(self) -> bool:
        """Whether enough has changed since the last build began."""
        words = self._session.control.words
        changed = words[c.ROWS_ADDED] - words[c.BUILT_ROWS]
        return changed >= self._rebuild_every or (words[c.DAMAGED_INDEX] > 0 and self._is_lost())

    def _is_lost(self) -> bool:
        """Whether somebody could not open the published index, and nobody was asked for another."""
        return self.index_is_damaged() and (
            self._session.control.words[c.DAMAGED_INDEX] != self._asked_for
        )

    def index_is_damaged(self) -> bool:
        """Whether somebody could not open the published index, and there is no newer one."""
        words = self._session.control.words
        return words[c.DAMAGED_INDEX] == words[c.INDEX_GENERATION] + 1

    def tell_damage(self) -> None:
        """See that an index is built again if this process could not open the published one."""
        session = self._session
        if session.choice is None or not session.choice.damaged or not session.writable:
            return
        words = session.control.words
        words[c.DAMAGED_INDEX] = words[c.INDEX_GENERATION] + 1
        self.after_commit()

    def build_index(self, *, anew: bool = False) -> bool:
        """Build and publish segments now; False if another builder is at it or nothing is there.

        `anew`: keep none that is there, as after a change of the index backend.
        """
        with self._at_work():
            return self._build_index(anew)

    def _build_index(self, anew: bool) -> bool:
        session = self._session
        if session.path is None or session.intake() is None or session.choice is None:
            return False
        if not session.builder_lock.try_run(self._build, session.choice, anew):
            return False
        self.adopt_now()
        return True

    def _build(self, choice: indexing.IndexChoice, anew: bool) -> None:
        """`build_index` (builder lock held)."""
        session = self._session
        assert session.path is not None
        try:
            words = session.control.words
            words[c.BUILT_ROWS] = words[c.ROWS_ADDED]
            self._asked_for = words[c.DAMAGED_INDEX]
            session.refresh()
            # Nothing derived is written before the log is durable up to it.
            session.commit_log.sync()
            build = partial(
                indexing.build,
                session.path,
                session.replica,
                choice,
                session.fs,
                session.uuid,
                session.config.index.growth,
                session.config.index.rebuild_every,
            )
            try:
                self.build_by(partial(build, anew=anew or self.index_is_damaged()))
            except CorruptionError as exc:
                _log.warning("the index is made anew from the payloads: %s", exc)
                session.distrust_index()
                self.build_by(partial(build, anew=True))
        except Exception as exc:
            session.control.words[c.BUILDER_FAILURES] += 1
            _log.error("the index builder failed; searches stay exact: %s", exc)
            session.registry.fire(
                "expbuf_on_builder_failed", path=str(session.path), error=str(exc)
            )
            raise

    def adopt_later(self) -> None:
        """Open newly published segments aside, in the background, and then change over."""
        self._adopting.begin()

    def _adopt_aside(self) -> None:
        try:
            self.adopt_now()
        except (ExpbufError, LogGone, OSError, ValueError) as exc:
            if not self._session.closed:
                _log.warning("the new index could not be opened; searches stay exact: %s", exc)

    def take_memory(self) -> None:
        """Have the memory of vectors to come found, in the background."""
        self._taking.begin()

    def _take_memory(self) -> None:
        with contextlib.suppress(BufferClosed):
            self._session.replica.tiers.take_ahead()

    def adopt_now(self) -> None:
        """Open what the builder has published last, and search it from now on."""
        session = self._session
        choice = session.choice
        if session.closed or session.path is None or session.intake() is None or choice is None:
            return
        self._prepare_next()
        generation = session.control.words[c.INDEX_GENERATION]
        replica = session.replica
        if replica.tiers.representation != choice.representation:
            return  # whoever meets the new one opens what there is of it
        manifest, opened = indexing.load(session.path, replica, choice)
        self.tell_damage()
        with replica.lock:
            copy_tail = replica.tiers.copied_tail(end_of(manifest), known_directions(opened))
        tail = copy_tail()  # searches go on meanwhile
        with replica.lock:
            if session.closed or replica.tiers.representation != choice.representation:
                return
            if manifest is None and replica.tiers.segments:
                replica.tiers.generation = generation  # keep what is there
                return
            if manifest is not None and replica.state.lsn < manifest.lsn:
                session.refresh()  # a replica adopts segments only once it is as far as they are
            replica.adopt(manifest, opened, generation, tail)
            session.fill_index()
        session.registry.fire(
            "expbuf_on_index_swapped",
            path=str(session.path),
            lsn=manifest.lsn if manifest else 0,
            segments=len(opened),
        )

    def _prepare_next(self) -> None:
        """Open the index of a representation that is about to count, so that no search waits."""
        session = self._session
        number = session.control.words[c.NEXT_REPRESENTATION]
        if session.path is None or number <= session.replica.tiers.representation:
            return
        settings = indexing.read_target(segments.home(session.path, number))
        if settings is None or settings["representation"] != number:
            return
        choice = session.index_choice(settings["dim"], settings["metric"], number)
        manifest, opened = indexing.load(session.path, session.replica, choice, settings)
        if manifest is not None:
            session.prepare(choice, manifest, opened)

    def _start_builder(self) -> None:
        """Start a builder process, unless one is there."""
        session = self._session
        if not session.builder_lock.try_run(lambda: None):
            return
        words = session.control.words
        added, damaged = words[c.ROWS_ADDED], words[c.DAMAGED_INDEX]
        command = builder_command(session.path, session.config)
        if builder_processes.start((session.uuid, *command), command):
            words[c.BUILT_ROWS], self._asked_for = added, damaged
        else:  # it will see to this, or has just stopped looking
            self._found_builder = True

    def is_alone(self) -> bool:
        """Whether no other process has the buffer open for writing."""
        path = self._session.path
        return path is not None and holder(path / folder.LOCKS / "open") is None

    # ------------------------------------------------------------ snapshots

    def snapshot_is_due(self) -> bool:
        """Whether the log behind the newest snapshot has grown long, or lies in many files."""
        return self._scattered or self._behind() >= self._snapshot_every

    def _behind(self) -> int:
        """Operations behind the newest snapshot; an add counts with each of its experiences."""
        words = self._session.control.words
        if words[c.SNAPSHOT_LSN] != self._snapshot_lsn:
            self._snapshot_lsn = words[c.SNAPSHOT_LSN]
            self._snapshot_rows = words[c.ROWS_ADDED]
        operations = words[c.APPENDED] - self._snapshot_lsn
        rows = words[c.ROWS_ADDED] - self._snapshot_rows
        return operations if operations > rows else rows

    def snapshot(self, *, if_due: bool = False) -> int:
        """Switch logs, write the columns as of the switch, drop what nobody needs; the LSN.

        `if_due`: do nothing if another process was faster.
        """
        session = self._session
        if session.path is None:
            session.refresh()
            return session.replica.state.lsn
        with self._at_work():
            session.maintenance.run(self._snapshot, if_due)
        return session.control.words[c.SNAPSHOT_LSN]

    def _snapshot(self, if_due: bool) -> None:
        """`snapshot` (maintenance lock held)."""
        session, words = self._session, self._session.control.words
        if if_due and not self.snapshot_is_due():
            return
        session.commit_log.sync()
        if self._scattered and words[c.APPENDED] == words[c.SNAPSHOT_LSN]:
            # Sessions that wrote nothing have left logs, too, which the older snapshot may need.
            # For a newer one in its place there has to be an operation, which need do nothing.
            session.commit(Draft(codec.encode_remove(np.empty(0, np.int64)), weight=0))
        if words[c.APPENDED] > words[c.SNAPSHOT_LSN]:
            self._move_survivors()
            # Without room for another log the snapshot is as good; it only frees less.
            with contextlib.suppress(StorageFull):
                session.commit_log.prepare()
                session.commit_log.switch()
                session.commit_log.sync()
            session.refresh()
            self._write_snapshot()
        self._drop_logs()
        self._scattered = False

    def closing_snapshot(self) -> None:
        """At a clean close: spare the next opening a long replay (open lock held alone)."""
        if self._behind() > CLOSING_OPERATIONS:
            self._write_snapshot()

    def _write_snapshot(self) -> int:
        session, words = self._session, self._session.control.words
        assert session.path is not None
        retirements = -1
        while words[c.RETIREMENTS] != retirements:  # else it tells of payloads where they were
            retirements = words[c.RETIREMENTS]
            session.refresh()
            with session.replica.lock:
                tree, columns = session.replica.state.dump()
            lsn = int(tree["lsn"])
            session.commit_log.flush(lsn)  # a snapshot is never ahead of the disk
        try:
            snapshots.write(session.path, session.uuid, tree, columns, session.fs)
        except StorageFull:
            if not snapshots.make_room(session.path, session.uuid, session.fs):
                raise
            snapshots.write(session.path, session.uuid, tree, columns, session.fs)
        session.control.words[c.SNAPSHOT_LSN] = lsn
        return lsn

    def _drop_logs(self) -> None:
        """Delete logs that neither of the kept snapshots needs (maintenance lock held)."""
        session = self._session
        assert session.path is not None
        session.check_folder()
        oldest = snapshots.drop_old(session.path, session.fs)
        if len(snapshots.available(session.path)) < snapshots.KEPT:
            return  # one snapshot alone is no reason to trust it with everything
        ids, locations, _ = self._live_payloads()
        session.adapter.drop_below(oldest, ids, locations)

    def _move_survivors(self) -> None:
        """Empty storage that a few live experiences keep from being deleted."""
        ids, locations, lengths = self._live_payloads()
        alone = self._session.adapter.survivors(locations, lengths)
        ids, locations = ids[alone], locations[alone]
        replica = self._session.replica
        with replica.lock:  # not new embeddings that wait for their representation
            moving = ids[replica.state.location[replica.state.find(ids)] == locations]
        each = max(1, int(lengths[alone].mean())) if len(moving) else 1
        step = max(1, min(_RELOG_ROWS, _RELOG_BYTES // each))
        for start in range(0, len(moving), step):
            self._move(moving[start : start + step])

    def _live_payloads(
        self,
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.uint32]]:
        """Ids, locations and lengths of all that must stay."""
        # Another process may have moved payloads: what it left is free, what it wrote is not.
        self._session.refresh()
        replica = self._session.replica
        with replica.lock:
            state = replica.state
            slots = state.live_slots()
            ids, places, lengths = state.id[slots], state.location[slots], state.length[slots]
            if state.reembedded is None:
                return ids, places, lengths
            more = state.reembedded.columns()
        order = np.argsort(ids := np.concatenate([ids, more["id"]]), kind="stable")
        places = np.concatenate([places, more["location"]])
        lengths = np.concatenate([lengths, more["length"]])
        return ids[order], places[order], lengths[order]

    def _move(self, ids: NDArray[np.int64]) -> None:
        """Log the last few experiences of a mostly dead file again, so that it can go."""
        session = self._session
        with session.replica.lock:
            state = session.replica.state
            slots = state.find(ids)
            ids, slots = ids[slots >= 0], slots[slots >= 0]
            pin = session.adapter.pin(ids, state.location[slots], state.length[slots])
            draft = relog_draft(state, ids, slots, pin, None)
        if len(ids):
            session.commit(draft)


class _Aside:
    """Something that is done in the background, by a thread that ends with it.

    Args:
        name: Of the thread.
        work: To be done.
    """

    def __init__(self, name: str, work: Callable[[], None]) -> None:
        self._name = name
        self._work = work
        self._starting = threading.Lock()
        self._thread: threading.Thread | None = None

    def begin(self) -> None:
        """Do it, unless that is under way. Without another thread to be had, a later call will."""
        if self._is_under_way() or self._starting.locked():
            return
        with self._starting:
            if self._is_under_way():
                return
            thread = threading.Thread(target=self._work, name=self._name, daemon=True)
            with contextlib.suppress(RuntimeError):
                thread.start()
                self._thread = thread

    def _is_under_way(self) -> bool:
        return self._thread is not None and self._thread.is_alive()


# ---------------------------------------------------------------- the builder's process


def _at_once(work: Callable[[], object]) -> object:
    return work()


def builder_command(path: Path | None, config: BufferConfig) -> list[str]:
    """Command line of an index builder for this buffer."""
    wanted = {
        "index": {**config.index.model_dump(mode="json"), "builder": "external"},
        "snapshot": config.snapshot.model_dump(mode="json"),
        "lock_timeout_s": config.lock_timeout_s,
    }
    return [*builder_program(), str(path), "--config", json.dumps(wanted)]


def builder_program() -> list[str]:
    """What `expbuf builder` is, wherever that command may be."""
    return [sys.executable, "-m", "expbuf_core", "builder"]
