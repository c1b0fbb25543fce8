"""The write path: numbers, append lock, group commit, publication.

    encode (no lock) -> append lock: number, stamp, append -> release -> hasten
                     -> flush lock: one fsync for all that arrived -> publish -> acknowledge

What need not come before the write comes behind it: the disk is at work by then.

Threads of one process that arrive together are one append and one flush, and what they add is one
operation; processes share flushes. Adds that nothing stands in the way of go the same way in native
code (`expbuf_core.native`); what it leaves alone comes here.

Lock order: append before flush. Whoever finds that a flush failed, that its leader died, or that an
appender died half-way, retires the log before anything else is written.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from expbuf_core import codec, frames
from expbuf_core import control as c
from expbuf_core.combining import INTERRUPTED, Combiner
from expbuf_core.contracts import (
    Appended,
    LoggedOperation,
    LogInterrupted,
    Operation,
    PersistenceAdapter,
    Stamped,
)
from expbuf_core.control import Control
from expbuf_core.crc import crc32
from expbuf_core.errors import BufferClosed, LockTimeout, PluginContractError, StorageError
from expbuf_core.filesystem import FileSystem, storage_errors
from expbuf_core.locks import ProcessLock
from expbuf_core.native import native

if TYPE_CHECKING:
    from expbuf_core.native._native import Log as NativeLog

RESERVATION = 1 << 16
_EVERYBODY = 1 << 30
_RETRY_S = 1.0  # after a failed flush
_APPEND_PAUSE_S = 1e-3  # a lost wake-up costs so much
_FLUSH_PAUSE_S = 5e-3
_PATIENCE_S = 3e-4  # of native code, for others to come: about two syncs
_NONE: NDArray[np.uint32] = np.empty(0, np.uint32)

Result = TypeVar("Result")


class Lock(Protocol):
    """What both `ProcessLock` and `ThreadLock` offer."""

    def run(
        self,
        work: Callable[..., Result],
        *args: Any,
        pause: Callable[[], bool] | None = None,
    ) -> Result | None: ...

    def try_run(self, work: Callable[..., object], *args: Any) -> bool: ...

    def acquire(self, timeout_s: float | None = None) -> None: ...

    def try_acquire(self) -> bool: ...

    def release(self) -> None: ...

    def is_mine(self) -> bool: ...

    def drain(self) -> None: ...

    def close(self) -> None: ...

    def __enter__(self) -> None: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


class Draft:
    """An operation on its way into the log.

    Attributes:
        operation: As encoded; its rows are stamped under the append lock.
        content_crcs: Checksums of the rows' contents.
        weight: Experiences it concerns, for the counters that start the builder.
    """

    __slots__ = ("content_crcs", "operation", "rows", "weight")

    def __init__(
        self,
        operation: Operation,
        *,
        rows: bytearray | None = None,
        content_crcs: list[int] | None = None,
        weight: int = 1,
    ) -> None:
        self.operation = operation
        self.rows = rows
        self.content_crcs = content_crcs or []
        self.weight = weight


class Drafter(Protocol):
    """Makes one operation of all that several threads add; see `Intake.draft`."""

    representation: int

    def draft(self, accepted: Sequence[Any]) -> Draft: ...

    def labels(self, accepted: Any) -> bytes | None: ...


class Addition(NamedTuple):
    """An experience to add, not drafted yet: with those of other threads it is one operation."""

    drafter: Drafter
    accepted: Any


class _Call:
    """What a thread wants to be written, and what became of it."""

    __slots__ = ("error", "first_id", "lsn", "work")

    def __init__(self, work: Draft | Addition) -> None:
        self.work = work
        self.lsn = self.first_id = 0
        self.error: Exception | None = None


class _Entry:
    """An operation that is written for one call or, row by row, for several."""

    __slots__ = ("calls", "draft", "error", "first_id", "lsn", "retirements")

    def __init__(self, draft: Draft, calls: list[_Call]) -> None:
        self.draft = draft
        self.calls = calls
        self.lsn = self.first_id = self.retirements = 0
        self.error: StorageError | None = None

    def tell(self) -> None:
        """Let the calls know."""
        first_id = self.first_id
        for call in self.calls:
            call.lsn, call.first_id, call.error = self.lsn, first_id, self.error
            first_id += 1


def _entries(calls: list[_Call]) -> list[_Entry]:
    """What is to be written; calls that ask for what cannot be are left out, with an error."""
    if len(calls) == 1:
        return _singly(calls)
    entries: list[_Entry] = []
    additions: dict[Drafter, list[_Call]] = {}
    accepted: dict[Drafter, list[Any]] = {}
    for call in calls:
        work = call.work
        if isinstance(work, Addition):
            additions.setdefault(work.drafter, []).append(call)
            accepted.setdefault(work.drafter, []).append(work.accepted)
        else:
            entries.append(_Entry(work, [call]))
    for drafter, together in additions.items():
        try:
            entries.append(_Entry(drafter.draft(accepted[drafter]), together))
        except Exception:  # of one of them, or of all: too large for one operation
            entries += _singly(together)
    return entries


def _singly(calls: list[_Call]) -> list[_Entry]:
    """An entry for each call that can be drafted."""
    entries = []
    for call in calls:
        work = call.work
        try:
            draft = work if isinstance(work, Draft) else work.drafter.draft((work.accepted,))
        except Exception as exc:
            call.error = exc
        else:
            entries.append(_Entry(draft, [call]))
    return entries


def _apart(entries: list[_Entry]) -> list[_Entry]:
    """The same, but an entry for each call."""
    apart = []
    for entry in entries:
        apart += _singly(entry.calls) if len(entry.calls) > 1 else [entry]
    return apart


class CommitLog:
    """Appends operations and makes them durable; one a process and buffer.

    Args:
        adapter: The storage.
        control: The words shared with other processes.
        append_lock: Excludes appenders.
        flush_lock: Excludes leaders of a flush.
        durability: "sync", "group" or "os".
        group_interval_s: At "group", how long a commit may stay unsynced.
        written: Called under the append lock with each operation written, where it stands, so
            that this process need not read it again.
        appended: Called after each append, without a lock, before the flush is waited for.
        outer: A lock of the caller's to hold around appends besides.
        check: Called before each append; raises if the folder is not what it was.
        reserves: Numbers must survive a power loss.
    """

    def __init__(
        self,
        adapter: PersistenceAdapter,
        control: Control,
        *,
        append_lock: Lock,
        flush_lock: Lock,
        durability: str,
        group_interval_s: float,
        written: Callable[[LoggedOperation, Appended], None],
        appended: Callable[[], None] = lambda: None,
        outer: AbstractContextManager[object] | None = None,
        check: Callable[[], None] = lambda: None,
        reserves: bool = True,
    ) -> None:
        self._adapter = adapter
        self._control = control
        self._append_lock = append_lock
        self._flush_lock = flush_lock
        self._durability = durability
        self._interval = group_interval_s
        self._written = written
        self._appended = appended
        self._outer = outer
        self._check = check
        self._syncs = durability == "sync"
        self._reserves = reserves and not self._syncs
        self._native: NativeLog | None = None
        self._native_path: str | os.PathLike[str] = ""  # of what it appends to
        self._threads = Combiner(self._commit)
        self._closed = False
        self._starting = threading.Lock()
        self._flusher: threading.Thread | None = None
        # Builtins, no `Event`: its lock stays held where a signal handler raises in the middle.
        self._dirty: queue.SimpleQueue[None] = queue.SimpleQueue()  # something is to be flushed
        self._going = threading.Lock()  # held until the flusher is to end
        self._going.acquire()
        self.flush_error: str | None = None

    # ------------------------------------------------------------ commit

    def commit(self, work: Draft | Addition) -> tuple[int, int]:
        """Write one operation and return when it is durable at the configured level.

        Args:
            work: The operation; or an experience, which is in one operation with those that other
                threads add at the same time.

        Returns:
            Its LSN and the id of its first row, or of the experience.

        Raises:
            StorageError: It was not written, or its durability is not known.
            LockTimeout: A lock was not free in time: that for appends, and nothing was written; or
                one that a sync needs, and its durability is not known.
        """
        if self._native is not None and self._outer is None and isinstance(work, Addition):
            found = self._added_natively(self._native, work)
            if found is not None:
                return found
        call = _Call(work)
        if self._outer is None:
            self._threads.do(call)
        else:  # whoever holds that lock must not wait for a thread that waits for it
            self._commit([call], self._outer)
        if call.error is not None:
            raise call.error
        return call.lsn, call.first_id

    def _commit(
        self, calls: list[_Call], outer: AbstractContextManager[object] | None = None
    ) -> None:
        entries = _entries(calls)
        if not entries:
            return
        if outer is None:
            self._append(entries)
        else:
            with outer:
                self._append(entries)
        self._appended()
        self._finish(entries)
        for entry in entries:
            entry.tell()

    # ------------------------------------------------------------ plain adds

    def write_natively(self, control: str, fs: FileSystem, max_commit_bytes: int) -> None:
        """Let native code write plain adds, if there is any, and as soon as the adapter says where.

        Args:
            control: Path of the control page, which this process has set or joined by now.
            fs: Of the buffer.
            max_commit_bytes: Of the configuration.
        """
        words = self._control.words
        append_lock, flush_lock = self._append_lock, self._flush_lock
        if (
            native is None
            or not isinstance(append_lock, ProcessLock)
            or not isinstance(flush_lock, ProcessLock)
            or not isinstance(words, memoryview)
        ):
            return
        self._native = native.Log(
            words=words,
            control=control,
            inode=words[c.INODE],
            generation=words[c.GENERATION],
            append_mutex=append_lock.file.mutex,
            append_fd=append_lock.file.fd,
            flush_mutex=flush_lock.file.mutex,
            flush_fd=flush_lock.file.fd,
            fail=self._fail,
            fs=None if type(fs) is FileSystem else fs,
            syncs=self._syncs,
            reserves=self._reserves,
            max_commit=max_commit_bytes,
            patience=_PATIENCE_S,
        )

    def _added_natively(self, log: NativeLog, addition: Addition) -> tuple[int, int] | None:
        """Have a plain add written by native code; None: it was not, there is more to it."""
        drafter = addition.drafter
        found = log.add(addition.accepted, drafter.representation, drafter.labels)
        if found is None:
            return None
        lsn, first_id, retirements = found
        self.finish_native(lsn, retirements)
        return lsn, first_id

    def finish_native(self, lsn: int, retirements: int | None) -> None:
        """Do what is left to do behind what native code has appended.

        Args:
            lsn: Of the operation.
            retirements: Of logs, when it was written, if it is not durable as configured.
        """
        self._appended()
        if retirements is not None:
            if self._syncs:
                self.flush(lsn, retirements)
            elif self._durability == "group":
                self._flush_later()

    def native_log(self) -> NativeLog | None:
        """What writes plain adds; None where they must be given to `commit`."""
        return self._native if self._outer is None else None

    def _fail(self, what: str, exc: BaseException) -> NoReturn:
        """Raise what native code has met at a write or a sync."""
        if isinstance(exc, InterruptedError):  # of the thread that wrote for this one
            raise StorageError(INTERRUPTED)
        try:
            with storage_errors(what, self._native_path):
                raise exc
        except StorageError as error:
            if what == "sync":
                self.flush_error = str(error)
            raise

    def _append_natively_nowhere(self) -> None:
        """The adapter may go on to other files (append lock held)."""
        if self._native is not None:
            self._native.append_nowhere()

    def _append_natively_from_now_on(self) -> None:
        """To where the adapter appends now, if it says so (append lock held)."""
        if self._native is not None:
            log = self._adapter.open_log()
            if log is None:
                self._native.close()  # nobody is inside: it never began
                self._native = None
            else:
                self._native.append_to(
                    log.data_fd,
                    log.index_fd,
                    log.number,
                    log.data_size,
                    log.index_size,
                    crc32(log.salt),
                )
                self._native_path = log.path

    # ------------------------------------------------------------ append

    def _append(self, entries: list[_Entry]) -> None:
        """Write operations one behind the other."""
        control = self._control
        self._seen_appended = control.words[c.APPENDED]
        try:
            self._append_lock.run(self._append_now, entries, pause=self._await_append)
        finally:
            control.tell(c.APPENDED, c.WAITING_TO_APPEND, 1)
        # Where a flush is under way, another will have to follow it anyhow.
        if self._syncs and not control.words[c.FLUSHING]:
            self._adapter.hasten()

    def _await_append(self) -> bool:
        """Sleep until another process has appended, or nearly so."""
        control, seen = self._control, self._seen_appended
        control.await_change(c.APPENDED, c.WAITING_TO_APPEND, seen, _APPEND_PAUSE_S)
        self._seen_appended = control.words[c.APPENDED]
        return True

    def _append_now(self, entries: list[_Entry]) -> None:
        """`_append` (append lock held)."""
        self._check_open()
        words = self._control.words
        self._check()
        self._retire_if_broken()
        if self._reserves:
            self._reserve(entries)
        try:
            self._write(entries)
        except (LogInterrupted, LockTimeout):
            raise
        except StorageError:
            if len(entries) == 1 and len(entries[0].calls) < 2:
                raise
            entries[:] = _apart(entries)
            self._write_singly(entries)
        if not self._syncs:
            words[c.PUBLISHED] = words[c.APPENDED]
        for entry in entries:
            entry.retirements = words[c.RETIREMENTS]

    def _write_singly(self, entries: list[_Entry]) -> None:
        """After a failure: what is too large for the log or the disk must not take others along."""
        for i, entry in enumerate(entries):
            try:
                self._write([entry])
            except LogInterrupted:
                raise
            except LockTimeout as exc:  # the others would wait as long, and for the same
                for each in entries[i:]:
                    each.error = exc
                return
            except StorageError as exc:
                entry.error = exc

    def _finish(self, entries: list[_Entry]) -> None:
        """Return when the operations are as durable as configured."""
        if self._syncs:
            # The last one's flush is that of all.
            written = [entry for entry in reversed(entries) if entry.error is None]
            for i, entry in enumerate(written):
                try:
                    self.flush(entry.lsn, entry.retirements)
                except LockTimeout as exc:  # the others would wait as long, and for the same
                    for each in written[i:]:
                        each.error = None if self._is_durable(each) else exc
                    return
                except StorageError as exc:
                    entry.error = exc
        elif self._durability == "group":
            self._flush_later()

    def _is_durable(self, entry: _Entry) -> bool:
        words = self._control.words
        durable = words[c.DURABLE]  # read first; see `flush`
        return bool(words[c.RETIREMENTS] == entry.retirements and durable >= entry.lsn)

    def _write(self, entries: list[_Entry]) -> None:
        """Number, stamp and append (append lock held)."""
        words = self._control.words
        lsn, next_id, added = words[c.NEXT_LSN], words[c.NEXT_ID], 0
        stamped = []
        for entry in entries:
            draft = entry.draft
            operation = draft.operation
            entry.lsn, entry.first_id = lsn, next_id
            count = 0
            if draft.rows is not None:
                kind, body, body_crc, _, lengths, _ = operation
                crcs = frames.stamp_rows(draft.rows, lengths, draft.content_crcs, next_id)
                operation = Operation(kind, body, body_crc, draft.rows, lengths, crcs)
                if kind == codec.ADD:
                    count = len(draft.content_crcs)
            stamped.append(Stamped(lsn, next_id if count else 0, operation))
            lsn += 1
            next_id += count
            added += draft.weight
        words[c.APPENDING] = 1
        self._append_natively_nowhere()
        try:
            places = self._adapter.append(stamped, words[c.DURABLE])
        except LogInterrupted:
            raise  # APPENDING stays set: the next append retires the log
        except Exception:
            words[c.APPENDING] = 0
            raise
        logged = self._logged(stamped, places)
        self._append_natively_from_now_on()
        words[c.NEXT_ID] = next_id
        words[c.ROWS_ADDED] += added
        words[c.NEXT_LSN] = lsn
        words[c.APPENDED] = lsn - 1
        words[c.APPENDING] = 0
        for found, place in zip(logged, places, strict=True):
            self._written(found, place)

    def _logged(
        self, stamped: Sequence[Stamped], places: Sequence[Appended]
    ) -> list[LoggedOperation]:
        """What was appended, as it stands in the log.

        Raises:
            PluginContractError: The adapter has not said where. As nobody knows what it has done,
                the log is given up: APPENDING is set, and the next append retires it.
        """
        try:
            return [
                LoggedOperation(
                    lsn,
                    operation.kind,
                    first_id,
                    operation.body,
                    int(place.location),
                    operation.lengths,
                )
                for (lsn, first_id, operation), place in zip(stamped, places, strict=True)
            ]
        except (TypeError, ValueError, AttributeError) as exc:
            raise PluginContractError(
                f"the storage adapter {type(self._adapter).__name__} returned a "
                f"{type(places).__name__} from `append` that is no list of {len(stamped)} Appended "
                f"({exc}); nothing was acknowledged"
            ) from exc

    def _reserve(self, entries: list[_Entry]) -> None:
        """Make a reservation durable before an id or LSN beyond the last one can be seen.

        Where commits are published before they are synced, a power loss takes operations that
        others have seen. Their ids and LSNs must never be issued again.
        """
        words = self._control.words
        count = sum(len(entry.draft.content_crcs) for entry in entries)
        while True:
            next_id, next_lsn = words[c.NEXT_ID] + count, words[c.NEXT_LSN] + len(entries) + 1
            if next_id <= words[c.RESERVED_ID] and next_lsn <= words[c.RESERVED_LSN]:
                return
            limit_id, limit_lsn = next_id + RESERVATION, next_lsn + RESERVATION
            entry = _Entry(Draft(codec.encode_reserve(limit_id, limit_lsn), weight=0), [])
            self._write([entry])
            if self._flush_lock.run(self._sync_whole_log, entry.lsn):
                words[c.RESERVED_ID], words[c.RESERVED_LSN] = limit_id, limit_lsn
                return

    def _sync_whole_log(self, lsn: int) -> bool:
        """Sync, or give the log up if nobody can tell what it holds (both locks held)."""
        words = self._control.words
        if words[c.FLUSHING] or words[c.FLUSH_FAILED]:  # since this append looked
            self._retire()
            return False
        self._sync_to(lsn)
        return True

    # ------------------------------------------------------------ flush

    def flush(self, lsn: int, retirements: int | None = None) -> None:
        """Return when everything up to `lsn` is durable.

        Leaders take turns, of this process and of others, and each covers what has been appended
        meanwhile.

        Args:
            lsn: As returned by an append.
            retirements: The counter when it was appended; None for "whatever is there".

        Raises:
            StorageError: The flush failed, or the log was given up before it.
        """
        words = self._control.words
        while True:
            durable = words[c.DURABLE]  # read first: behind a retirement it is that of a new log
            if retirements is not None and words[c.RETIREMENTS] != retirements:
                self._judge_retired(lsn, retirements)
                return
            if durable >= lsn:
                return
            if not (words[c.FLUSHING] and self._leader_flushed(durable)):
                self._lead(lsn, retirements)

    def _leader_flushed(self, durable: int) -> bool:
        """Sleep while another one flushes, and ask for no lock; False if nothing came of it."""
        control = self._control
        control.await_change(c.DURABLE, c.WAITING_FOR_FLUSH, durable, _FLUSH_PAUSE_S)
        return bool(control.words[c.DURABLE] != durable)

    def _judge_retired(self, lsn: int, retirements: int) -> None:
        # In the lock: the two words must be of the same retirement.
        if self._flush_lock.run(self._was_kept, lsn, retirements):
            return  # written again into the new log, and synced there
        raise StorageError(
            f"operation {lsn} was in a log whose sync failed; it was not acknowledged and must be "
            "taken as lost. Later writes go to a new log"
        )

    def _was_kept(self, lsn: int, retirements: int) -> bool:
        words = self._control.words
        return bool(words[c.RETIREMENTS] == retirements + 1 and lsn <= words[c.KEPT])

    def _lead(self, lsn: int, retirements: int | None) -> None:
        control, died = self._control, False
        self._seen_durable = control.words[c.DURABLE]
        try:
            died = bool(
                self._flush_lock.run(
                    self._flush_now, lsn, retirements, pause=lambda: self._await_flush(lsn)
                )
            )
        finally:
            control.tell(c.DURABLE, c.WAITING_FOR_FLUSH, _EVERYBODY)
        if died:
            # Its error report, if there was one, died with it. All pages are still readable.
            self._append_lock.run(self._flush_lock.run, self._retire)

    def _await_flush(self, lsn: int) -> bool:
        """Sleep until another process has flushed; False if that has covered `lsn`."""
        control, seen = self._control, self._seen_durable
        if control.words[c.DURABLE] >= lsn:
            return False
        control.await_change(c.DURABLE, c.WAITING_FOR_FLUSH, seen, _FLUSH_PAUSE_S)
        self._seen_durable = durable = control.words[c.DURABLE]
        return durable < lsn

    def _flush_now(self, lsn: int, retirements: int | None) -> bool:
        """Sync, unless that is done (flush lock held); True if a leader died at it."""
        self._check_open()
        words = self._control.words
        if words[c.DURABLE] >= lsn or (
            retirements is not None and words[c.RETIREMENTS] != retirements
        ):
            return False
        if words[c.FLUSH_FAILED]:
            raise StorageError(f"a sync of the log failed; operation {lsn} was not acknowledged")
        if words[c.FLUSHING]:
            return True
        self._sync_to(words[c.APPENDED])
        return False

    def _sync_to(self, lsn: int) -> None:
        """Sync, and say that all up to `lsn` is durable (flush lock held)."""
        words = self._control.words
        words[c.FLUSHING] = 1
        if self._native is not None:
            self._native.sync_nothing()
        try:
            self._adapter.sync()
        except LockTimeout:  # none was tried
            words[c.FLUSHING] = 0
            raise
        except BaseException as exc:
            # Linux reports a write error once and then calls the pages clean: a second sync
            # would lie. A mere interrupt took no report away with it.
            if isinstance(exc, Exception) or isinstance(exc.__context__, Exception):
                words[c.FLUSH_FAILED] = 1
                self.flush_error = str(exc)
            words[c.FLUSHING] = 0
            raise
        if lsn > words[c.DURABLE]:
            words[c.DURABLE] = lsn
        if self._native is not None and (synced := self._adapter.synced_log()) is not None:
            self._native.sync_with(*synced)
        words[c.FLUSHING] = 0
        self.flush_error = None

    def _retire_if_broken(self) -> None:
        """Go on in a new log if a flush failed or an appender died half-way (append lock held)."""
        words = self._control.words
        if words[c.APPENDING] or words[c.FLUSH_FAILED]:
            self._flush_lock.run(self._retire)

    def _retire(self) -> None:
        """Go on in a new log if nobody can tell what the old one holds (both locks held)."""
        self._check_open()
        words = self._control.words
        if not (words[c.APPENDING] or words[c.FLUSH_FAILED] or words[c.FLUSHING]):
            return  # somebody else has seen to it
        self._check()  # or the words say so because they are no words of ours any more
        failed = words[c.FLUSH_FAILED] != 0
        # After a failed flush only what others may have seen is carried over; after a mere
        # death, everything that was written whole.
        keep = self._control.published() if failed else words[c.APPENDED]
        next_lsn = words[c.NEXT_LSN] + 1
        died = words[c.APPENDING] == 1
        if died:
            next_lsn += RESERVATION  # whoever died may have stamped several
        # From here on the new log may be the log, though the words name the old one. If this dies
        # or fails half-way, nobody may append to either before it was seen through.
        words[c.APPENDING] = words[c.APPENDING] or 1
        self._append_natively_nowhere()
        self._adapter.retire(words[c.DURABLE], keep, next_lsn)
        if died:
            # The dead appender may have stamped ids; skip more than one commit can hold.
            words[c.NEXT_ID] += frames.MAX_ROWS
        words[c.KEPT] = keep
        words[c.RETIREMENTS] += 1
        words[c.APPENDED] = keep
        words[c.NEXT_LSN] = next_lsn
        words[c.DURABLE] = max(words[c.DURABLE], keep)
        words[c.FLUSHING] = 0
        words[c.FLUSH_FAILED] = 0
        words[c.APPENDING] = 0
        self.flush_error = None

    def sync(self) -> int:
        """Make durable all that any process has written so far.

        Returns:
            The LSN up to which everything is durable.
        """
        words = self._control.words
        if words[c.FLUSH_FAILED]:
            self._append_lock.run(self._retire_if_broken)
        retirements, target = words[c.RETIREMENTS], words[c.APPENDED]
        if words[c.DURABLE] < target:
            self.flush(target, retirements)
        return int(words[c.DURABLE])

    def settle(self) -> None:
        """`sync`, for whoever keeps all appenders out (append lock held by this thread)."""
        words = self._control.words
        if words[c.FLUSH_FAILED]:
            self._flush_lock.run(self._retire)
        while words[c.DURABLE] < words[c.APPENDED]:
            self._flush_lock.run(self._sync_whole_log, words[c.APPENDED])

    def appended(self) -> int:
        """Last LSN written by any process."""
        return int(self._control.words[c.APPENDED])

    # ------------------------------------------------------------ group mode

    def _flush_later(self) -> None:
        """Within the interval; at once where the system gives no thread for that."""
        try:
            self._start_flusher()
        except RuntimeError:
            try:
                self.sync()
            except StorageError as exc:
                self.flush_error = str(exc)
        else:
            if self._dirty.empty():
                self._dirty.put(None)

    def _start_flusher(self) -> None:
        if self._flusher is None or not self._flusher.is_alive():
            with self._starting:
                if self._flusher is None or not self._flusher.is_alive():
                    flusher = threading.Thread(
                        target=self._flush_in_time, name="expbuf-flush", daemon=True
                    )
                    flusher.start()  # or there is none
                    self._flusher = flusher

    def _flush_in_time(self) -> None:
        while not self._closed:
            self._dirty.get()
            # The interval itself is the promise of "group".
            if self._going.acquire(timeout=self._interval):
                return  # the buffer is closed
            try:
                self.sync()
            except (StorageError, ValueError) as exc:
                self.flush_error = str(exc)
                if self._going.acquire(timeout=_RETRY_S):
                    return
                self._dirty.put(None)  # what is written must not wait for the next commit

    # ------------------------------------------------------------ life

    def switch(self) -> None:
        """Begin a new log."""
        self._append_lock.run(self._switch)

    def _switch(self) -> None:
        self._check_open()
        words = self._control.words
        self._retire_if_broken()
        words[c.APPENDING] = 1
        self._append_natively_nowhere()
        try:
            self._adapter.switch(words[c.NEXT_LSN], words[c.DURABLE])
        except LogInterrupted:
            raise
        except Exception:
            words[c.APPENDING] = 0
            raise
        words[c.APPENDING] = 0

    def prepare(self) -> None:
        """Let the adapter prepare its next log (maintenance lock held)."""
        self._adapter.prepare()
        self._append_lock.run(self._install_prepared)

    def _install_prepared(self) -> None:
        self._check_open()
        self._adapter.install_prepared()

    def close(self) -> None:
        """Stop the flusher, and have the adapter used no more, whatever this raises.

        Raises:
            StorageError: Something that was written since `sync` is not durable.
            LockTimeout: A lock was not free in time.
        """
        try:
            self._append_lock.run(self._close)
        finally:
            self.stop()

    def stop(self) -> None:
        """Stop the flusher, and wait for all that use the adapter just now."""
        self._closed = True  # who gets a lock later sees it
        if self._native is not None:
            self._native.shut()
        try:  # noqa: SIM105  (`suppress` is no builtin)
            self._going.release()
        except RuntimeError:  # the flusher has seen it
            pass
        self._dirty.put(None)
        self._append_lock.drain()
        self._flush_lock.drain()
        if self._native is not None:
            self._native.close()
        if self._flusher is not None and self._flusher is not threading.current_thread():
            self._flusher.join(timeout=10)

    def forked(self) -> None:
        """In a forked child: write natively no more. The lock files' numbers may be others'."""
        if self._native is not None:
            self._native.shut()

    def abandon(self) -> None:
        """In a forked child: let go of the control page."""
        if self._native is not None:
            self._native.abandon()

    def _close(self) -> None:
        """`close` (append lock held)."""
        words = self._control.words
        if words[c.DURABLE] < words[c.APPENDED]:  # other threads have written since `sync`
            self._flush_lock.run(self._flush_rest)
        self._closed = True
        if self._native is not None:
            self._native.shut()

    def _flush_rest(self) -> None:
        """Sync what nobody will later (both locks held)."""
        if self._flush_now(self._control.words[c.APPENDED], None):
            self._retire()

    def _check_open(self) -> None:
        """See that the adapter is still there (one of the locks held)."""
        if self._closed:
            raise BufferClosed("the buffer is closed; open it again")


def draft_rows(
    kind: int,
    body: bytes,
    rows: bytearray,
    lengths: NDArray[np.uint32],
    *,
    crcs: list[int] | None = None,
) -> Draft:
    """A draft whose rows wait for their ids.

    Args:
        kind: Of the operation.
        body: Of the operation.
        rows: n, unstamped, one behind the other.
        lengths: (n,)
        crcs: Checksums of the rows' contents; None: they are computed here.
    """
    if crcs is None:
        crcs = codec.content_crcs(rows, lengths)
    operation = Operation(kind, body, crc32(body), b"", lengths, _NONE)
    return Draft(operation, rows=rows, content_crcs=crcs, weight=len(lengths))
