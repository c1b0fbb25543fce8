"""`FilePersistenceAdapter`: two numbered write-ahead logs in the buffer's folder."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from expbuf_core import frames
from expbuf_core.contracts import (
    Appended,
    Buffer,
    Damage,
    LogFollower,
    LoggedOperation,
    LoggedRun,
    LogGone,
    LogInterrupted,
    LogPostponed,
    OpenLog,
    PersistenceAdapter,
    PersistenceContext,
    Pin,
    Problem,
    Stamped,
)
from expbuf_core.errors import CorruptionError, StorageError, StorageFull
from expbuf_core.filesystem import storage_errors
from expbuf_file import layout
from expbuf_file.follower import FileFollower, FilePin, Part
from expbuf_file.logfile import BadFrame, Begin, Frame, LogFile
from expbuf_file.logfolder import INDEX_SLACK, LogFolder
from expbuf_file.recovering import LogReader
from expbuf_file.salvage import Salvage, uuid_of
from expbuf_file.settings import FileSettings
from expbuf_file.verifying import verify_file
from expbuf_file.writing import begin_frame, end_frame, lay_out, pages, pieces, repeated

# Words shared between processes, written under the append lock (SYNCED: the flush lock).
_FILE, _DATA_END, _INDEX_END, _SYNCED, _WRITTEN = 0, 1, 2, 3, 4

_ZEROS = bytes(1 << 20)
_LARGE = 1 << 16  # a commit that pays for its own changes of metadata
_PIECE = 1 << 20  # of a commit: on its way to the disk while the next one is copied
_SMALL = 1 << 14  # a log file on a full disk, for what makes room
_SPARSE = 0.25  # a sealed file with a smaller live share is emptied
_MOVED_BYTES = 64 << 20  # at a time
_PIECES = 32  # small log files that may be there: each opening leaves one


@dataclass
class _Writable:
    """The pair of files that appends go to."""

    number: int
    data_path: Path
    index_path: Path
    data_fd: int
    index_fd: int
    data_size: int
    index_size: int
    salt: bytes
    followed: bool = False  # the next pair is prepared
    last: tuple[int, int] = (0, 0)  # where the newest commit of this process stands


class FilePersistenceAdapter(PersistenceAdapter):
    """See `PersistenceAdapter` for the contract and FORMAT.md for the files."""

    def __init__(self, settings: FileSettings, context: PersistenceContext) -> None:
        if context.path is None:
            raise StorageError("the file backend needs a folder")
        self._settings = settings
        self._folder: Path = context.path
        self._uuid = context.uuid
        self._fs = context.fs
        self._words = context.words
        self._logs = LogFolder(context.path, context.uuid, context.fs, settings.initial_bytes)
        self._reader = LogReader(self._logs)
        self._writable: _Writable | None = None
        self._hastens = False  # what was appended last
        self._sync_fds: dict[int, tuple[int, Path]] = {}
        self._prepared: tuple[int, Path, Path] | None = None
        self._salvaged: dict[int, LogFile] = {}

    # ------------------------------------------------------------ creation and recovery

    def create(self, lsn: int) -> None:
        self._logs.check_leftovers()
        for log in (layout.DATA, layout.INDEX):
            for number in layout.numbers(self._folder, log):
                self._logs.unlink(log, number)
        *ends, _ = self._logs.begin_file(1, lsn, previous=(0, 0, 0), durable=0)
        self._set_end(1, *ends)
        self._words[_SYNCED] = 1

    def recover(self, after_lsn: int, durable_lsn: int) -> Iterator[LoggedOperation]:
        self._reader = LogReader(self._logs)
        return self._reader.recover(after_lsn, durable_lsn)

    def recover_alike(
        self, after_lsn: int, durable_lsn: int
    ) -> Iterator[LoggedOperation | LoggedRun]:
        self._reader = LogReader(self._logs)
        return self._reader.recover_alike(after_lsn, durable_lsn)

    def torn(self) -> tuple[int, int]:
        return self._reader.torn_bytes, int(self._reader.torn_bytes > 0)

    def start(self, lsn: int, recovered_lsn: int) -> None:
        state = self._reader
        # What was recovered may stand in the page cache only. It counts as durable from here on.
        for number, end in state.scanned.items():
            path = layout.path_of(self._folder, layout.DATA, number)
            with storage_errors("sync", path):
                fd = self._fs.open(path)
                try:
                    # After a sync that failed, the system calls pages clean that never reached the
                    # disk: writing them again makes the next sync an honest one.
                    for at in range(state.unproven.get(number, end), end, len(_ZEROS)):
                        part = os.pread(fd, min(len(_ZEROS), end - at), at)
                        self._fs.pwrite(fd, part, at)
                    self._fs.fdatasync(fd)
                finally:
                    self._fs.close(fd)
        for name in os.listdir(self._folder):
            if name.endswith(".tmp") and ".wal." in name:
                with contextlib.suppress(OSError):  # room only
                    self._fs.unlink(self._folder / name)
        numbers = layout.numbers(self._folder, layout.DATA)
        index_numbers = layout.numbers(self._folder, layout.INDEX)
        number = max([*numbers, *index_numbers, 0]) + 1
        previous = (state.number, state.end, recovered_lsn)
        try:
            *ends, _ = self._begin(number, lsn, previous, recovered_lsn)
        except StorageFull as exc:
            ends = self._begin_on_full_disk(number, lsn, previous, recovered_lsn, exc)
        # From here on the new file rules. What it leaves out goes: torn tails, unused files; and
        # index logs that may be torn (followers read the recovered data logs instead).
        for old in numbers:
            if old > state.number:
                self._logs.unlink(layout.DATA, old)
        for old in layout.numbers(self._folder, layout.INDEX):
            if old != number:
                self._logs.unlink(layout.INDEX, old)
        if state.number:
            self._logs.trim(state.number, state.end)
        self._set_end(number, *ends)
        self._words[_SYNCED] = number

    def _begin(
        self,
        number: int,
        lsn: int,
        previous: tuple[int, int, int],
        durable: int,
        again: Sequence[Stamped] = (),
    ) -> tuple[int, int, list[Appended]]:
        """Begin a log; a small one where there is no room for more."""
        make = partial(self._logs.begin_file, number, lsn, previous=previous, durable=durable)
        try:
            return make(again=again)
        except StorageFull:
            return make(again=again, small=True)

    def _begin_on_full_disk(
        self,
        number: int,
        lsn: int,
        previous: tuple[int, int, int],
        durable: int,
        cause: StorageFull,
    ) -> list[int]:
        """Begin a log in the room of the index logs, which go at a recovery anyhow; or later."""
        for old in layout.numbers(self._folder, layout.INDEX):
            self._logs.unlink(layout.INDEX, old)
        with contextlib.suppress(StorageFull):
            *ends, _ = self._begin(number, lsn, previous, durable)
            return ends
        last, end, _ = previous
        self._set_end(last, end, layout.HEADER_BYTES)
        self._words[_SYNCED] = last
        raise LogPostponed(str(cause)) from cause

    def attach(self) -> None:
        self._logs.begins.clear()

    # ------------------------------------------------------------ files

    def _next_size(self, needed: int) -> int:
        current = self._writable.data_size if self._writable else self._settings.initial_bytes // 2
        size = min(2 * current, max(self._settings.segment_bytes, self._settings.initial_bytes))
        needed += 2 * layout.HEADER_BYTES
        if needed > layout.MAX_FILE_BYTES:
            raise StorageError(f"a commit of {needed} bytes does not fit into one log file")
        return max(size, (needed + 4095) & ~4095)

    def _set_end(self, number: int, data_end: int, index_end: int) -> None:
        self._words[_FILE] = number
        self._words[_DATA_END] = self._words[_WRITTEN] = data_end
        self._words[_INDEX_END] = index_end

    def _current(self) -> _Writable:
        number = self._words[_FILE]
        current = self._writable
        if current is None or current.number != number:
            self._release()
            self._logs.let_go_of_deleted()
            data = self._logs.open(layout.DATA, number)
            index = self._logs.open(layout.INDEX, number)
            with storage_errors("open", data.path):
                data_fd = self._fs.open(data.path)
            try:
                with storage_errors("open", index.path):
                    index_fd = self._fs.open(index.path)
            except BaseException:
                self._fs.close(data_fd)
                raise
            current = self._writable = _Writable(
                number,
                data.path,
                index.path,
                data_fd,
                index_fd,
                data.header.size,
                index.header.size,
                data.header.salt,
            )
        return current

    def _release(self) -> None:
        current, self._writable = self._writable, None
        if current is not None:
            self._fs.close(current.data_fd)
            self._fs.close(current.index_fd)

    # ------------------------------------------------------------ writing

    def append(self, stamped: Sequence[Stamped], durable_lsn: int) -> list[Appended]:
        if self._settings.commit == "rename":
            return self._append_by_rename(stamped, durable_lsn)
        current = self._current()
        data_at, index_at = self._words[_DATA_END], self._words[_INDEX_END]
        data, index, places, data_end, index_end = lay_out(
            stamped, current.number, current.salt, durable_lsn, data_at, index_at
        )
        room = layout.END_BYTES
        if data_end + room > current.data_size or index_end + room > current.index_size:
            self._switch(stamped[0].lsn, durable_lsn, data_end - data_at, index_end - index_at)
            return self.append(stamped, durable_lsn)
        try:
            with storage_errors("write", current.data_path):
                if data_end > self._words[_WRITTEN]:
                    self._write_ahead(current, data_at, data_end)
                self._write_data(current.data_fd, data, data_at, data_end)
            with storage_errors("write", current.index_path):
                self._fs.pwritev(current.index_fd, index, index_at)
        except StorageError as exc:
            self._undo(current.data_fd, data_at, data_end, exc)
            raise
        self._words[_DATA_END] = data_end
        self._words[_INDEX_END] = index_end
        current.last = (data_at, data_end)
        return places

    def _write_ahead(self, current: _Writable, data_at: int, data_end: int) -> None:
        """Let small commits overwrite zeros that were written; a large one takes room as it is.

        The first sync of room that was only reserved writes metadata, too, which takes longer than
        the sync of a small commit itself. For a large commit it is not worth writing twice. (Who
        appends to an `OpenLog` does the same.)
        """
        if data_end - data_at < _LARGE:
            end = min(data_at + len(_ZEROS), current.data_size)
            self._fs.pwrite(current.data_fd, memoryview(_ZEROS)[: end - data_at], data_at)
            self._words[_WRITTEN] = end
        else:
            self._words[_WRITTEN] = data_end

    def _write_data(self, fd: int, parts: list[Buffer], at: int, end: int) -> None:
        """Write a commit; a large one in pieces, if this process is one that syncs each commit."""
        syncs, self._hastens = self._hastens, False
        if not syncs or end - at <= _PIECE:
            self._fs.pwritev(fd, parts, at)
            return
        for piece in pieces(parts, _PIECE):
            self._fs.pwritev(fd, piece, at)
            size = sum(map(len, piece))
            if size == _PIECE:  # the rest is hastened behind the append
                self._fs.start_writing(fd, at, size)
            at += size

    def hasten(self) -> None:
        self._hastens = True
        current = self._writable
        if current is not None and self._settings.commit != "rename":
            # Should another thread switch logs at this moment, a hint is given in vain.
            start, end = current.last
            self._fs.start_writing(current.data_fd, start, end - start)

    def open_log(self) -> OpenLog | None:
        current = self._writable
        if current is None or self._settings.commit == "rename" or self._is_changed():
            return None
        return OpenLog(
            current.data_fd,
            current.index_fd,
            current.number,
            current.data_size,
            current.index_size,
            current.salt,
            current.data_path,
        )

    def _is_changed(self) -> bool:
        """Whether somebody has made more, or something else, of appending or syncing."""
        mine = FilePersistenceAdapter
        return (
            getattr(self.append, "__func__", None) is not mine.append
            or getattr(self.sync, "__func__", None) is not mine.sync
        )

    def synced_log(self) -> tuple[int, int] | None:
        number = self._words[_SYNCED]
        known = self._sync_fds.get(number)
        return None if known is None else (known[0], number)

    def _append_by_rename(self, stamped: Sequence[Stamped], durable_lsn: int) -> list[Appended]:
        """Let a commit appear as a log file of its own, whole and durable or not at all."""
        old, last = self._words[_FILE], stamped[-1].lsn
        number = self._free_number()
        data_end, index_end, places = self._logs.begin_file(
            number,
            last + 1,
            previous=(old, self._words[_DATA_END], stamped[0].lsn - 1),
            durable=durable_lsn,
            again=stamped,
            small=True,
        )
        self._end_index(old, stamped[0].lsn - 1, number)
        self._set_end(number, data_end, index_end)
        return places

    def _free_number(self) -> int:
        logs = (layout.DATA, layout.INDEX)
        return max(n for log in logs for n in layout.numbers(self._folder, log)) + 1

    def _undo(self, fd: int, start: int, end: int, cause: StorageError) -> None:
        """Leave no trace of a failed append in the data log: zeros stood there before."""
        try:
            for at in range(start, end, len(_ZEROS)):
                self._fs.pwrite(fd, memoryview(_ZEROS)[: end - at], at)
        except OSError as exc:
            raise LogInterrupted(f"{cause}; undoing it failed, too: {exc}") from cause

    def sync(self) -> None:
        current = self._words[_FILE]
        for number in range(max(1, self._words[_SYNCED]), current + 1):
            known = self._sync_fds.get(number)
            if known is None:
                path = layout.path_of(self._folder, layout.DATA, number)
                if number < current and not path.exists():
                    continue  # a number that was never used, or a log that was given up
                with storage_errors("open", path):
                    known = self._sync_fds[number] = (self._fs.open(path), path)
            fd, path = known
            with storage_errors("sync", path):
                self._fs.fdatasync(fd)
        self._words[_SYNCED] = current
        for number in [n for n in self._sync_fds if n < current]:
            self._fs.close(self._sync_fds.pop(number)[0])

    def switch(self, next_lsn: int, durable_lsn: int) -> None:
        self._switch(next_lsn, durable_lsn, 0, 0)

    def _switch(self, next_lsn: int, durable_lsn: int, data_room: int, index_room: int) -> None:
        """End the current files and begin the next: one frame in each of the four."""
        current = self._current()
        number = current.number + 1
        first = layout.HEADER_BYTES
        if not self._has_room(number, data_room, index_room):
            self._logs.publish(number, *self._next_pair(number, data_room, index_room))
        salt = self._logs.open(layout.DATA, number).header.salt
        data_at, index_at = self._words[_DATA_END], self._words[_INDEX_END]
        previous = (current.number, data_at, next_lsn - 1)
        new_data, new_index, _, data_begin, index_begin = lay_out(
            [begin_frame(next_lsn, previous)], number, salt, durable_lsn, first, first
        )
        old_data, old_index, _, _, index_end = lay_out(
            [end_frame(next_lsn - 1, number)],
            current.number,
            current.salt,
            durable_lsn,
            data_at,
            index_at,
        )
        try:
            with storage_errors("write", current.data_path):
                self._fs.pwritev(current.data_fd, old_data, data_at)
                self._fs.pwritev(current.index_fd, old_index, index_at)
                self._fs.truncate(current.index_fd, index_end)
            for log, parts in ((layout.INDEX, new_index), (layout.DATA, new_data)):
                path = layout.path_of(self._folder, log, number)
                with storage_errors("write", path):
                    fd = self._fs.open(path)
                    try:
                        self._fs.pwritev(fd, parts, first)
                    finally:
                        self._fs.close(fd)
        except StorageError as exc:
            # Half of it may stand. To undo it in an order that no crash can spoil is not possible;
            # to go on in a new log is.
            raise LogInterrupted(str(exc)) from exc
        self._set_end(number, data_begin, index_begin)
        self._current()

    def _next_pair(self, number: int, data_room: int, index_room: int) -> tuple[Path, Path]:
        """Make the next files; smaller ones where the disk has no room for large ones."""
        spare = 2 * layout.HEADER_BYTES
        size = self._next_size(data_room)
        # Operations without rows are how room is made: they may have the last of it.
        least = min(size, self._settings.initial_bytes) if data_room > index_room else _SMALL
        while True:
            index_size = pages(max(size // 2, index_room + spare) + min(INDEX_SLACK, size // 8))
            try:
                return self._logs.make_pair(number, size, index_size, str(os.getpid()))
            except StorageFull:
                smaller = pages(max(size // 2, least, data_room + spare))
                if smaller >= size:
                    raise
                size = smaller

    def _has_room(self, number: int, data_room: int, index_room: int) -> bool:
        """Whether a next pair is prepared, and large enough."""
        try:
            data = self._logs.open(layout.DATA, number).header
            index = self._logs.open(layout.INDEX, number).header
        except StorageError:
            return False
        spare = 2 * layout.HEADER_BYTES
        return data.size >= data_room + spare and index.size >= index_room + spare

    def needs_preparation(self) -> bool:
        current = self._writable
        if self._settings.commit == "rename":
            return False
        if current is None or current.followed or self._words[_DATA_END] < current.data_size // 2:
            return False
        following = layout.path_of(self._folder, layout.DATA, current.number + 1)
        current.followed = following.exists()
        return not current.followed

    def prepare(self) -> None:
        number = self._words[_FILE] + 1
        path = layout.path_of(self._folder, layout.DATA, number)
        if self._settings.commit == "rename" or path.exists():
            return
        size = self._next_size(0)
        index_size = pages(size // 2 + INDEX_SLACK)
        pair = self._logs.make_pair(number, size, index_size, f"{os.getpid()}.spare")
        self._prepared = (number, *pair)

    def install_prepared(self) -> None:
        if self._prepared is None:
            return
        number, index_tmp, data_tmp = self._prepared
        self._prepared = None
        exists = layout.path_of(self._folder, layout.DATA, number).exists()
        if number != self._words[_FILE] + 1 or exists:
            with storage_errors("remove", index_tmp):
                self._fs.unlink(index_tmp)
                self._fs.unlink(data_tmp)
        else:
            self._logs.publish(number, index_tmp, data_tmp)

    def retire(self, durable_lsn: int, keep_lsn: int, next_lsn: int) -> None:
        old = self._words[_FILE]
        self._logs.begins.clear()
        chain = self._logs.chain(durable_lsn)
        # Not from a file whose first frame may be unsynced: the new one could lose its link.
        synced = [n for n in chain if n <= self._words[_SYNCED]]
        start = max(n for n in synced if chain[n].previous_lsn <= durable_lsn)
        previous = (start, chain[start].end, durable_lsn)
        again: list[Stamped] = []
        repeats = [n for n in chain if n >= start]
        for number in repeats:
            file = self._logs.open(layout.DATA, number)
            for found in file.frames(chain[number].end, file.size(), rows=True):
                if isinstance(found, BadFrame) or found.header.kind == frames.LOG_END:
                    break
                header = found.header
                if header.lsn > keep_lsn:
                    break
                if header.lsn <= durable_lsn:
                    previous = (number, found.end, durable_lsn)
                elif header.kind != frames.LOG_BEGIN and (
                    # A retirement that failed may have repeated some already.
                    not again or header.lsn > again[-1].lsn
                ):
                    again.append(repeated(file, found))
        if keep_lsn > durable_lsn and (not again or again[-1].lsn != keep_lsn):
            last = again[-1].lsn if again else durable_lsn
            raise StorageError(
                f"{self._folder}: the log was given up after a failed sync, and operations "
                f"{last + 1} to {keep_lsn} cannot be read back"
            )
        number = self._free_number()
        *ends, _ = self._begin(number, next_lsn, previous, durable_lsn, again)
        for given_up in sorted({old, *repeats}):
            if layout.path_of(self._folder, layout.INDEX, given_up).exists():
                self._end_index(given_up, keep_lsn, number)
        self._set_end(number, *ends)
        self._words[_SYNCED] = number

    def _end_index(self, number: int, keep_lsn: int, following: int) -> None:
        """Lead followers from a log that was given up to the one in its place."""
        file = self._logs.open(layout.INDEX, number)
        current = number == self._words[_FILE]
        limit = self._words[_INDEX_END] if current else file.size()
        at = layout.HEADER_BYTES
        for found in file.frames(at, limit, rows=False):
            # The begin frame stands first whatever LSN it names.
            if isinstance(found, BadFrame) or (
                found.header.lsn > keep_lsn and at > layout.HEADER_BYTES
            ):
                break
            if found.header.kind == frames.LOG_END:
                return  # all of it is kept, and the file it leads to is ended, too
            at = found.end
        _, parts, _, _, _ = lay_out(
            [end_frame(keep_lsn, following)], number, file.header.salt, keep_lsn, at, at
        )
        with storage_errors("write", file.path):
            fd = self._fs.open(file.path)
            try:
                self._fs.pwritev(fd, parts, at)
            finally:
                self._fs.close(fd)

    # ------------------------------------------------------------ reading

    def follow(self, after_lsn: int) -> LogFollower:
        files = self._start_of(after_lsn)
        moved = self._logs.let_go_of_deleted
        return FileFollower(self._folder, self._uuid, after_lsn, files, moved, self._index_end)

    def _index_end(self, number: int) -> int:
        """Where the index log of that number ends; 0 unless it is the current one."""
        end = self._words[_INDEX_END]
        return end if self._words[_FILE] == number else 0

    def _start_of(self, after_lsn: int) -> list[Part]:
        """Files to follow from `after_lsn` on."""
        chain = self._logs.chain(after_lsn)
        first = max((n for n in chain if chain[n].previous_lsn <= after_lsn), default=None)
        if first is None:
            raise LogGone
        files = [n for n in chain if n >= first]
        parts = [
            Part(number, chain[following].previous_end, chain[following].previous_lsn)
            for number, following in itertools.pairwise(files)
        ]
        return [*parts, Part(files[-1])]

    def pin(
        self, ids: NDArray[np.int64], locations: NDArray[np.int64], lengths: NDArray[np.uint32]
    ) -> Pin:
        numbers = locations >> layout.OFFSET_BITS
        held = self._logs.held()
        # Rather all that are open than to look for each one; but then a few payloads must not keep
        # many files from being deleted.
        few = len(held.files) <= len(numbers) and not self._salvaged
        if few and np.logical_and.reduce(held.known.take(numbers, mode="clip")):
            return FilePin(held.files, locations, lengths)
        files: dict[int, LogFile] = {}
        for number in set(numbers.tolist()):
            try:
                files[number] = self._salvaged.get(number) or self._logs.shared(layout.DATA, number)
            except StorageError as exc:
                if isinstance(exc.__cause__, FileNotFoundError):
                    raise LogGone(layout.path_of(self._folder, layout.DATA, number)) from exc
                raise
        return FilePin(files, locations, lengths)

    # ------------------------------------------------------------ upkeep

    def drop_below(
        self, lsn: int, live_ids: NDArray[np.int64], live_locations: NDArray[np.int64]
    ) -> None:
        chain = self._logs.chain(lsn)
        needed = max((n for n in chain if chain[n].previous_lsn <= lsn), default=0)
        with_payloads = set(np.unique(live_locations >> layout.OFFSET_BITS).tolist())
        for number in layout.numbers(self._folder, layout.INDEX):
            if number < needed:
                self._logs.unlink(layout.INDEX, number)
        for number in layout.numbers(self._folder, layout.DATA):
            if number < needed and number not in with_payloads:
                self._logs.unlink(layout.DATA, number)
        self._trim_sealed(chain)

    def _trim_sealed(self, chain: Mapping[int, Begin]) -> None:
        """Give back the room that ended logs have not used: a snapshot ends a log early.

        Only behind an end marker that is durable, so that a file is cut where it says it ends.
        """
        for number, following in itertools.pairwise(chain):
            if following > self._words[_SYNCED]:
                break
            end = chain[following].previous_end
            try:
                file = self._logs.open(layout.DATA, number)
            except StorageError:
                continue  # deleted above
            if file.size() <= end + layout.END_BYTES:
                continue
            found = file.frame(end, end + layout.END_BYTES, rows=False)
            if isinstance(found, Frame) and found.header.kind == frames.LOG_END:
                self._logs.trim(number, found.end)

    def survivors(
        self, live_locations: NDArray[np.int64], lengths: NDArray[np.uint32]
    ) -> NDArray[np.bool_]:
        numbers = live_locations >> layout.OFFSET_BITS
        moving = np.zeros(len(numbers), bool)
        room, freed = _MOVED_BYTES, 0
        for number in np.unique(numbers).tolist():
            path = layout.path_of(self._folder, layout.DATA, number)
            if number >= self._words[_FILE] or not path.exists():
                continue
            inside = numbers == number
            live, size = int(lengths[inside].sum(dtype=np.int64)), path.stat().st_size
            if live < _SPARSE * size and live <= room:
                moving |= inside
                room -= live
                freed += size - live
        if freed < self._settings.segment_bytes // 4:
            moving[:] = False  # not for a few bytes: to move them is a commit
        return moving | np.isin(numbers, self._to_merge(numbers, lengths))

    def is_scattered(self) -> bool:
        return len(self._pieces()) > _PIECES

    def _pieces(self) -> list[int]:
        """Numbers of small data logs that have ended."""
        pieces, small = [], min(self._settings.segment_bytes, _MOVED_BYTES) // 4
        for number in layout.numbers(self._folder, layout.DATA):
            if number < self._words[_FILE]:
                with contextlib.suppress(OSError):  # what cannot be looked at is not moved
                    path = layout.path_of(self._folder, layout.DATA, number)
                    if path.stat().st_size < small:
                        pieces.append(number)
        return pieces

    def _to_merge(self, numbers: NDArray[np.int64], lengths: NDArray[np.uint32]) -> list[int]:
        """Numbers of pieces whose live payloads had better lie in one log, where they are many.

        One that holds more than all the smaller ones together stays. So what is left are few, each
        at least as large as all before it, and a payload is moved only with as many others.
        """
        pieces = self._pieces()
        sizes = np.bincount(numbers, lengths, minlength=max(pieces, default=0) + 1)[pieces]
        live = sorted((int(size), n) for size, n in zip(sizes, pieces, strict=True) if size)
        if len(live) <= _PIECES // 2:
            return []
        merged = total = 0
        for i, (size, _) in enumerate(live):
            if total + size > _MOVED_BYTES:
                break
            if size <= total:
                merged = i + 1
            total += size
        return [number for _, number in live[:merged]]

    def verify(self, until_lsn: int) -> Iterator[Problem]:
        try:
            chain = self._logs.chain(until_lsn)
        except CorruptionError as exc:
            yield Problem(exc.path or "", exc.offset or 0, str(exc), True)
            return
        last = max(chain, default=0)
        for number in layout.numbers(self._folder, layout.DATA):
            path = layout.path_of(self._folder, layout.DATA, number)
            try:
                file = self._logs.open(layout.DATA, number)
            except CorruptionError as exc:
                yield Problem(str(path), exc.offset or 0, str(exc), True)
                continue
            except StorageError as exc:
                if not path.exists():
                    continue  # dropped meanwhile
                yield Problem(str(path), -1, str(exc), True)
                continue
            ends = [begin.previous_end for begin in chain.values() if begin.previous == number]
            if number not in chain and chain and number > min(chain):
                continue  # given up: what was to be kept of it was written again
            try:
                yield from verify_file(
                    file, min(ends, default=None), until_lsn, number == last, linked=number in chain
                )
            except CorruptionError as exc:  # reading ends there
                yield Problem(str(path), exc.offset or 0, str(exc), True)

    def identify(self) -> bytes:
        return uuid_of(self._folder)

    def salvage(self, after_lsn: int) -> Iterator[LoggedOperation | Damage]:
        salvage = Salvage(self._folder, self._uuid)
        self._salvaged = salvage.files
        return salvage.operations(after_lsn)

    def stats(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for log in (layout.DATA, layout.INDEX):
            numbers = layout.numbers(self._folder, log)
            total = 0
            for number in numbers:
                with contextlib.suppress(OSError):
                    total += os.stat(layout.path_of(self._folder, log, number)).st_size
            found[log] = {"files": len(numbers), "bytes": total}
        found["current_file"] = self._words[_FILE]
        return found

    def finish(self, last_lsn: int) -> None:
        current = self._current()
        data_at, index_at = self._words[_DATA_END], self._words[_INDEX_END]
        data, index, _, data_end, index_end = lay_out(
            [end_frame(last_lsn, 0)], current.number, current.salt, last_lsn, data_at, index_at
        )
        path = layout.path_of(self._folder, layout.DATA, current.number)
        with storage_errors("finish", path):
            self._fs.pwritev(current.data_fd, data, data_at)
            self._fs.pwritev(current.index_fd, index, index_at)
            self._fs.fdatasync(current.data_fd)
            self._fs.truncate(current.data_fd, data_end)
            self._fs.truncate(current.index_fd, index_end)
            self._fs.fsync(current.data_fd)
        for number in layout.numbers(self._folder, layout.DATA):
            if number > current.number:  # prepared and not used
                self._logs.unlink(layout.INDEX, number)
                self._logs.unlink(layout.DATA, number)

    def close(self) -> None:
        self._release()
        for fd, _ in self._sync_fds.values():
            self._fs.close(fd)
        self._sync_fds.clear()
        self._salvaged = {}
        self._logs.forget_all()

    def after_fork(self) -> None:
        # Plain descriptors, shared with the parent: closing ours does nothing to its.
        self.close()
        self._logs.begins.clear()
        self._prepared = None
