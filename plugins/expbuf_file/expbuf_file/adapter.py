"""`FilePersistenceAdapter`: two numbered write-ahead logs in the buffer's folder."""

from __future__ import annotations

import contextlib
import os
import secrets
import threading
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from expbuf_core import frames
from expbuf_core.contracts import (
    Appended,
    Buffer,
    LogFollower,
    LoggedOperation,
    LogGone,
    LogInterrupted,
    Operation,
    PersistenceAdapter,
    PersistenceContext,
    Pin,
    Problem,
    Stamped,
)
from expbuf_core.errors import CorruptionError, StorageError
from expbuf_core.filesystem import storage_errors
from expbuf_file import layout
from expbuf_file.follower import FileFollower, FilePin
from expbuf_file.logfile import BadFrame, Begin, Frame, LogFile
from expbuf_file.settings import FileSettings

# Words shared between processes, written under the append lock (SYNCED: the flush lock).
_FILE, _DATA_END, _INDEX_END, _SYNCED = 0, 1, 2, 3

_NONE: NDArray[np.uint32] = np.empty(0, np.uint32)
_ZEROS = bytes(1 << 20)
_MAX_HANDLES = 256
_INDEX_SLACK = 1 << 16


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


@dataclass
class _Recovered:
    """Where the last `recover` stopped."""

    last_lsn: int
    number: int = 0
    end: int = 0
    torn_bytes: int = 0
    scanned: list[int] = field(default_factory=list)


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
        self._writable: _Writable | None = None
        self._sync_fds: dict[int, tuple[int, Path]] = {}
        self._files: dict[tuple[str, int], LogFile] = {}
        self._files_mutex = threading.Lock()
        self._begins: dict[int, Begin] = {}
        self._recovered = _Recovered(0)
        self._prepared: tuple[int, Path, Path] | None = None

    # ------------------------------------------------------------ creation and recovery

    def create(self, lsn: int) -> None:
        for log in (layout.DATA, layout.INDEX):
            for number in layout.numbers(self._folder, log):
                self._fs.unlink(layout.path_of(self._folder, log, number))
        ends = self._begin_file(1, lsn, previous=(0, 0, lsn - 1), durable=lsn - 1)
        self._set_end(1, *ends)
        self._words[_SYNCED] = 1

    def recover(self, after_lsn: int, durable_lsn: int) -> Iterator[LoggedOperation]:
        self._begins.clear()
        chain = self._chain()
        while len(chain) > 1 and self._begins[chain[1]].previous_lsn <= after_lsn:
            chain.pop(0)
        if not chain or self._begins[chain[0]].previous_lsn > after_lsn:
            first = f"begins at lsn {self._begins[chain[0]].lsn}" if chain else "is missing"
            raise CorruptionError(
                f"{self._folder}: the log {first}, but operations from lsn {after_lsn + 1} on are "
                "needed: log files were deleted or damaged. Run `expbuf verify`",
                path=layout.path_of(self._folder, layout.DATA, chain[0] if chain else 1),
                lsn=after_lsn + 1,
            )
        state = self._recovered = _Recovered(after_lsn)
        for number, following in zip(chain, [*chain[1:], 0], strict=True):
            successor = self._begins[following] if following else None
            intact = yield from self._recover_file(number, successor, durable_lsn)
            if not intact:
                return
        # Nothing is torn; is anything missing behind the end?
        lsn = state.last_lsn + 1
        proof = max(durable_lsn, self._proof_behind(chain[-1]))
        if proof >= lsn:
            missing = BadFrame(state.end, state.end, f"lsn {proof} was durable and is missing")
            raise self._file(layout.DATA, state.number).corrupt(missing, lsn)

    def _recover_file(
        self, number: int, successor: Begin | None, durable_lsn: int
    ) -> Generator[LoggedOperation, None, bool]:
        """Yield a file's operations; return whether it ends where it should."""
        file = self._open(layout.DATA, number)
        begin = self._begins[number]
        state = self._recovered
        state.scanned.append(number)
        state.number, state.end = number, begin.end
        size = file.size()
        limit = successor.previous_end if successor else size
        lsn = begin.lsn
        bad: BadFrame | None = None
        sealed = False
        for found in file.frames(begin.end, limit, rows=True):
            if isinstance(found, BadFrame):
                bad = found
                break
            header = found.header
            if header.kind == frames.LOG_END:
                sealed = True
                (following,) = layout.END_BODY.unpack(found.body)
                if following and not layout.path_of(self._folder, layout.DATA, following).exists():
                    raise file.corrupt(
                        BadFrame(found.offset, found.offset, f"log file {following} is missing"),
                        lsn,
                    )
                break
            if header.kind == frames.LOG_BEGIN:
                lsn = header.lsn  # LSNs jump where a log was given up
            elif header.lsn != lsn:
                bad = BadFrame(found.offset, found.offset, f"lsn {header.lsn} out of order")
                break
            else:
                lsn += 1
                if header.lsn > state.last_lsn:
                    state.last_lsn = header.lsn
                    state.end = found.offset + header.data_bytes
                    yield file.operation(found)
            state.end = found.offset + header.data_bytes
        if size < (limit if successor else file.header.size) and not sealed:
            # Sizes are made durable before a file is used: this is no torn tail.
            raise file.corrupt(BadFrame(state.end, size, "the file was cut"), lsn)
        if bad is not None:
            self._judge(file, bad, lsn, min(limit, size), durable_lsn)
            return False
        if successor and successor.previous_lsn not in (lsn - 1, state.last_lsn):
            raise file.corrupt(BadFrame(limit, limit, "operations are missing"), lsn)
        return True

    def _judge(self, file: LogFile, bad: BadFrame, lsn: int, limit: int, durable_lsn: int) -> None:
        """Return if the operations from `lsn` on are a torn tail; raise if they are damaged.

        A flush of several pages may leave holes, so valid frames behind a bad one prove nothing
        by themselves; what counts is whether anything says that this LSN had been durable.
        """
        proof = max(durable_lsn, file.proof(bad.offset + 8, limit), self._proof_behind(file.number))
        if proof >= lsn:
            raise file.corrupt(bad, lsn)
        end = file.last_nonzero(bad.offset, limit)
        self._recovered.torn_bytes = end - bad.offset

    def _proof_behind(self, number: int) -> int:
        """The highest LSN that any later file says was durable."""
        proof = 0
        for later in layout.numbers(self._folder, layout.DATA):
            if later > number:
                file = self._open(layout.DATA, later)
                if file.header.flags & layout.BORN_IN_USE and self._begin(later) is None:
                    at = layout.HEADER_BYTES
                    raise file.corrupt(BadFrame(at, at, "the first frame is damaged"), 0)
                proof = max(proof, file.proof(layout.HEADER_BYTES, file.size()))
        return proof

    def torn(self) -> tuple[int, int]:
        return self._recovered.torn_bytes, int(self._recovered.torn_bytes > 0)

    def start(self, lsn: int, recovered_lsn: int) -> None:
        state = self._recovered
        # What was recovered may stand in the page cache only. It counts as durable from here on.
        for number in state.scanned:
            path = layout.path_of(self._folder, layout.DATA, number)
            with storage_errors("sync", path):
                fd = self._fs.open(path)
                try:
                    self._fs.fdatasync(fd)
                finally:
                    self._fs.close(fd)
        numbers = layout.numbers(self._folder, layout.DATA)
        index_numbers = layout.numbers(self._folder, layout.INDEX)
        number = max([*numbers, *index_numbers, 0]) + 1
        previous = (state.number, state.end, recovered_lsn)
        ends = self._begin_file(number, lsn, previous=previous, durable=recovered_lsn)
        # From here on the new file rules. What it leaves out goes: torn tails, unused files; and
        # index logs that may be torn (followers read the recovered data logs instead).
        for old in numbers:
            if old > state.number:
                self._unlink(layout.DATA, old)
        for old in index_numbers:
            self._unlink(layout.INDEX, old)
        for name in os.listdir(self._folder):
            if name.endswith(".tmp") and ".wal." in name:
                self._fs.unlink(self._folder / name)
        if state.number:
            self._trim(state.number, state.end)
        self._set_end(number, *ends)
        self._words[_SYNCED] = number

    def _unlink(self, log: str, number: int) -> None:
        self._fs.unlink(layout.path_of(self._folder, log, number))
        self._forget(log, number)
        if log == layout.DATA:
            self._begins.pop(number, None)

    def _trim(self, number: int, end: int) -> None:
        """Give back the room behind the end of a recovered file."""
        path = layout.path_of(self._folder, layout.DATA, number)
        with contextlib.suppress(OSError):  # room only; the file is right as it is
            fd = self._fs.open(path)
            try:
                if os.fstat(fd).st_size > end:
                    self._fs.truncate(fd, end)
            finally:
                self._fs.close(fd)

    def attach(self) -> None:
        self._begins.clear()

    def _chain(self) -> list[int]:
        """Numbers of the data logs that make up the log, oldest first.

        A file names its predecessor; files that were skipped that way were given up.
        """
        numbers = layout.numbers(self._folder, layout.DATA)
        chain: list[int] = []
        wanted: int | None = None
        for number in reversed(numbers):
            if wanted is not None and number > wanted:
                continue
            if wanted is not None and number < wanted:
                break  # a gap: older files hold payloads only
            begin = self._begin(number)
            if begin is None:
                if wanted is None:
                    continue  # prepared, never used
                break
            chain.append(number)
            wanted = begin.previous
        return chain[::-1]

    def _begin(self, number: int) -> Begin | None:
        begin = self._begins.get(number)
        if begin is None:
            begin = self._open(layout.DATA, number).begin()
            if begin is not None:
                self._begins[number] = begin
        return begin

    # ------------------------------------------------------------ files

    def _open(self, log: str, number: int) -> LogFile:
        """A log file for one reader: what it reads ahead belongs to one thread."""
        with storage_errors("open", layout.path_of(self._folder, log, number)):
            return LogFile(self._folder, log, number, self._uuid)

    def _file(self, log: str, number: int) -> LogFile:
        """A log file shared by all threads, for its header and for reading at given places."""
        file = self._files.get((log, number))
        if file is None:
            file = self._open(log, number)
            with self._files_mutex:
                if len(self._files) >= _MAX_HANDLES:
                    del self._files[next(iter(self._files))]
                self._files[log, number] = file
        return file

    def _forget(self, log: str, number: int) -> None:
        with self._files_mutex:
            self._files.pop((log, number), None)

    def _next_size(self, needed: int) -> int:
        current = self._writable.data_size if self._writable else self._settings.initial_bytes // 2
        size = min(2 * current, max(self._settings.segment_bytes, self._settings.initial_bytes))
        needed += 2 * layout.HEADER_BYTES
        if needed > layout.MAX_FILE_BYTES:
            raise StorageError(f"a commit of {needed} bytes does not fit into one log file")
        return max(size, (needed + 4095) & ~4095)

    def _make(
        self,
        log: str,
        number: int,
        size: int,
        salt: bytes,
        first: Sequence[Buffer],
        suffix: str,
    ) -> Path:
        """Write a log file aside, complete and synced, under a temporary name."""
        path = layout.path_of(self._folder, log, number)
        temporary = path.with_name(f"{path.name}.{suffix}.tmp")
        header = layout.FileHeader(
            (layout.DATA, layout.INDEX).index(log),
            number,
            size,
            self._uuid,
            salt,
            layout.BORN_IN_USE if first else 0,
        )
        with storage_errors("create", path):
            fd = self._fs.open(temporary, create=True)
            try:
                self._fs.truncate(fd, 0)
                if log == layout.DATA:
                    # Written zeros, not just reserved blocks: a later fsync then has no metadata
                    # to write.
                    for at in range(0, size, len(_ZEROS)):
                        self._fs.pwrite(fd, memoryview(_ZEROS)[: size - at], at)
                else:
                    self._fs.allocate(fd, size)
                self._fs.pwrite(fd, layout.encode_header(header), 0)
                if first:
                    self._fs.pwritev(fd, list(first), layout.HEADER_BYTES)
                if log == layout.DATA:
                    self._fs.fsync(fd)
            except BaseException:
                with contextlib.suppress(OSError):
                    self._fs.unlink(temporary)
                raise
            finally:
                self._fs.close(fd)
        return temporary

    def _make_pair(self, number: int, size: int, index_size: int, suffix: str) -> tuple[Path, Path]:
        salt = secrets.token_bytes(16)
        index_tmp = self._make(layout.INDEX, number, index_size, salt, (), suffix)
        return index_tmp, self._make(layout.DATA, number, size, salt, (), suffix)

    def _begin_file(
        self,
        number: int,
        lsn: int,
        *,
        previous: tuple[int, int, int],
        durable: int,
        again: Sequence[Stamped] = (),
    ) -> tuple[int, int]:
        """Make a pair of log files that is in use from birth, and durable.

        Args:
            number: Of the files.
            lsn: Of the next operation.
            previous: File, end offset and last LSN of the log that it continues.
            durable: Highest durable LSN.
            again: Operations to repeat before that.

        Returns:
            Where the data log and the index log go on.
        """
        stamped = [_begin_frame(again[0].lsn if again else lsn, previous)]
        if again:
            stamped += [*again, _begin_frame(lsn, previous)]
        salt = secrets.token_bytes(16)
        data, index, _, data_end, index_end = _lay_out(
            stamped, number, salt, durable, layout.HEADER_BYTES, layout.HEADER_BYTES
        )
        size = max(self._settings.initial_bytes, data_end + layout.HEADER_BYTES)
        index_size = max(size // 2, index_end) + _INDEX_SLACK
        suffix = str(os.getpid())
        index_tmp = self._make(layout.INDEX, number, _pages(index_size), salt, index, suffix)
        data_tmp = self._make(layout.DATA, number, _pages(size), salt, data, suffix)
        self._publish(number, index_tmp, data_tmp)
        return data_end, index_end

    def _publish(self, number: int, index_tmp: Path, data_tmp: Path) -> None:
        for log, temporary in ((layout.INDEX, index_tmp), (layout.DATA, data_tmp)):
            path = layout.path_of(self._folder, log, number)
            with storage_errors("create", path):
                self._fs.replace(temporary, path)
            self._forget(log, number)
        self._begins.pop(number, None)
        with storage_errors("sync", self._folder):
            self._fs.sync_folder(self._folder)

    def _set_end(self, number: int, data_end: int, index_end: int) -> None:
        self._words[_FILE] = number
        self._words[_DATA_END] = data_end
        self._words[_INDEX_END] = index_end

    def _current(self) -> _Writable:
        number = self._words[_FILE]
        current = self._writable
        if current is None or current.number != number:
            self._release()
            data = self._file(layout.DATA, number)
            index = self._file(layout.INDEX, number)
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
        current = self._current()
        data_at, index_at = self._words[_DATA_END], self._words[_INDEX_END]
        data, index, places, data_end, index_end = _lay_out(
            stamped, current.number, current.salt, durable_lsn, data_at, index_at
        )
        room = layout.END_BYTES
        if data_end + room > current.data_size or index_end + room > current.index_size:
            self._switch(stamped[0].lsn, durable_lsn, data_end - data_at, index_end - index_at)
            return self.append(stamped, durable_lsn)
        try:
            with storage_errors("write", current.data_path):
                self._fs.pwritev(current.data_fd, data, data_at)
            with storage_errors("write", current.index_path):
                self._fs.pwritev(current.index_fd, index, index_at)
        except StorageError as exc:
            self._undo(current.data_fd, data_at, data_end, exc)
            raise
        self._words[_DATA_END] = data_end
        self._words[_INDEX_END] = index_end
        return places

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
            size = self._next_size(data_room)
            index_size = _pages(max(size // 2, index_room + 2 * first) + _INDEX_SLACK)
            pair = self._make_pair(number, size, index_size, str(os.getpid()))
            self._publish(number, *pair)
        salt = self._file(layout.DATA, number).header.salt
        data_at, index_at = self._words[_DATA_END], self._words[_INDEX_END]
        previous = (current.number, data_at, next_lsn - 1)
        new_data, new_index, _, data_begin, index_begin = _lay_out(
            [_begin_frame(next_lsn, previous)], number, salt, durable_lsn, first, first
        )
        old_data, old_index, _, _, index_end = _lay_out(
            [_end_frame(next_lsn - 1, number)],
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
            # A successor that names this place would hide what is appended here from now on.
            with storage_errors("remove", layout.path_of(self._folder, layout.DATA, number)):
                self._unlink(layout.DATA, number)
            self._undo(current.data_fd, data_at, data_at + layout.END_BYTES, exc)
            raise
        self._set_end(number, data_begin, index_begin)
        self._current()

    def _has_room(self, number: int, data_room: int, index_room: int) -> bool:
        """Whether a next pair is prepared, and large enough."""
        try:
            data = self._file(layout.DATA, number).header
            index = self._file(layout.INDEX, number).header
        except StorageError:
            return False
        spare = 2 * layout.HEADER_BYTES
        return data.size >= data_room + spare and index.size >= index_room + spare

    def needs_preparation(self) -> bool:
        current = self._writable
        if current is None or current.followed or self._words[_DATA_END] < current.data_size // 2:
            return False
        following = layout.path_of(self._folder, layout.DATA, current.number + 1)
        current.followed = following.exists()
        return not current.followed

    def prepare(self) -> None:
        number = self._words[_FILE] + 1
        size = self._next_size(0)
        index_size = _pages(size // 2 + _INDEX_SLACK)
        pair = self._make_pair(number, size, index_size, f"{os.getpid()}.spare")
        self._prepared = (number, *pair)

    def install_prepared(self) -> None:
        if self._prepared is None:
            return
        number, index_tmp, data_tmp = self._prepared
        self._prepared = None
        exists = layout.path_of(self._folder, layout.DATA, number).exists()
        if number != self._words[_FILE] + 1 or exists:
            self._fs.unlink(index_tmp)
            self._fs.unlink(data_tmp)
        else:
            self._publish(number, index_tmp, data_tmp)

    def retire(self, durable_lsn: int, keep_lsn: int, next_lsn: int) -> None:
        old = self._words[_FILE]
        self._begins.clear()
        chain = self._chain()
        start = max(n for n in chain if self._begins[n].previous_lsn <= durable_lsn)
        previous = (start, self._begins[start].end, durable_lsn)
        again: list[Stamped] = []
        for number in chain[chain.index(start) :]:
            file = self._open(layout.DATA, number)
            for found in file.frames(self._begins[number].end, file.size(), rows=True):
                if isinstance(found, BadFrame) or found.header.kind == frames.LOG_END:
                    break
                header = found.header
                if header.lsn > keep_lsn:
                    break
                if header.lsn <= durable_lsn:
                    previous = (number, found.offset + header.data_bytes, durable_lsn)
                elif header.kind != frames.LOG_BEGIN:
                    again.append(_repeated(file, found))
        if keep_lsn > durable_lsn and (not again or again[-1].lsn != keep_lsn):
            last = again[-1].lsn if again else durable_lsn
            raise StorageError(
                f"{self._folder}: the log was given up after a failed sync, and operations "
                f"{last + 1} to {keep_lsn} cannot be read back"
            )
        numbers = [
            n for log in (layout.DATA, layout.INDEX) for n in layout.numbers(self._folder, log)
        ]
        number = max(numbers) + 1
        ends = self._begin_file(
            number, next_lsn, previous=previous, durable=durable_lsn, again=again
        )
        self._end_index(old, keep_lsn, number)
        self._set_end(number, *ends)
        self._words[_SYNCED] = number

    def _end_index(self, number: int, keep_lsn: int, following: int) -> None:
        """Lead followers from a log that was given up to the one in its place."""
        file = self._open(layout.INDEX, number)
        at = layout.HEADER_BYTES
        for found in file.frames(at, self._words[_INDEX_END], rows=False):
            # The begin frame stands first whatever LSN it names.
            if isinstance(found, BadFrame) or (
                found.header.lsn > keep_lsn and at > layout.HEADER_BYTES
            ):
                break
            at = found.offset + found.header.index_bytes
        _, parts, _, _, _ = _lay_out(
            [_end_frame(keep_lsn, following)], number, file.header.salt, keep_lsn, at, at
        )
        with storage_errors("write", file.path):
            fd = self._fs.open(file.path)
            try:
                self._fs.pwritev(fd, parts, at)
            finally:
                self._fs.close(fd)

    # ------------------------------------------------------------ reading

    def follow(self, after_lsn: int) -> LogFollower:
        return FileFollower(self._folder, self._uuid, after_lsn, self._start_of(after_lsn))

    def _start_of(self, after_lsn: int) -> list[tuple[int, int | None]]:
        """Files to follow from `after_lsn` on, each with its end, where that is known."""
        chain = self._chain()
        first = max((n for n in chain if self._begins[n].previous_lsn <= after_lsn), default=None)
        if first is None:
            raise LogGone
        files = chain[chain.index(first) :]
        ends = [self._begins[n].previous_end for n in files[1:]]
        return list(zip(files, [*ends, None], strict=True))

    def pin(
        self, ids: NDArray[np.int64], locations: NDArray[np.int64], lengths: NDArray[np.uint32]
    ) -> Pin:
        places = locations.tolist()
        files: dict[int, LogFile] = {}
        for place in places:
            number = place >> layout.OFFSET_BITS
            if number not in files:
                try:
                    files[number] = self._file(layout.DATA, number)
                except StorageError as exc:
                    if isinstance(exc.__cause__, FileNotFoundError):
                        raise LogGone from exc
                    raise
        return FilePin(files, places, lengths.tolist())

    # ------------------------------------------------------------ upkeep

    def drop_below(
        self, lsn: int, live_ids: NDArray[np.int64], live_locations: NDArray[np.int64]
    ) -> None:
        chain = self._chain()
        needed = max((n for n in chain if self._begins[n].previous_lsn <= lsn), default=0)
        with_payloads = set(np.unique(live_locations >> layout.OFFSET_BITS).tolist())
        for number in layout.numbers(self._folder, layout.INDEX):
            if number < needed:
                self._unlink(layout.INDEX, number)
        for number in layout.numbers(self._folder, layout.DATA):
            if number < needed and number not in with_payloads:
                self._unlink(layout.DATA, number)

    def verify(self, until_lsn: int) -> Iterator[Problem]:
        try:
            chain = self._chain()
        except CorruptionError as exc:
            yield Problem(exc.path or "", exc.offset or 0, str(exc), True)
            return
        last = chain[-1] if chain else 0
        for number in layout.numbers(self._folder, layout.DATA):
            path = layout.path_of(self._folder, layout.DATA, number)
            try:
                file = self._open(layout.DATA, number)
            except CorruptionError as exc:
                yield Problem(str(path), exc.offset or 0, str(exc), True)
                continue
            except StorageError as exc:
                if not path.exists():
                    continue  # dropped meanwhile
                yield Problem(str(path), -1, str(exc), True)
                continue
            ends = [
                b.previous_end
                for n, b in self._begins.items()
                if b.previous == number and n in chain
            ]
            yield from _verify_file(file, min(ends, default=None), until_lsn, number == last)

    def stats(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for log in (layout.DATA, layout.INDEX):
            numbers = layout.numbers(self._folder, log)
            total = 0
            for number in numbers:
                with contextlib.suppress(FileNotFoundError):
                    total += os.stat(layout.path_of(self._folder, log, number)).st_size
            found[log] = {"files": len(numbers), "bytes": total}
        found["current_file"] = self._words[_FILE]
        return found

    def finish(self, last_lsn: int) -> None:
        current = self._current()
        data_at, index_at = self._words[_DATA_END], self._words[_INDEX_END]
        data, index, _, data_end, index_end = _lay_out(
            [_end_frame(last_lsn, 0)], current.number, current.salt, last_lsn, data_at, index_at
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
                self._unlink(layout.INDEX, number)
                self._unlink(layout.DATA, number)

    def close(self) -> None:
        self._release()
        for fd, _ in self._sync_fds.values():
            self._fs.close(fd)
        self._sync_fds.clear()
        self._files.clear()

    def after_fork(self) -> None:
        self._files_mutex = threading.Lock()
        # Plain descriptors, shared with the parent: closing ours does nothing to its.
        self.close()
        self._begins.clear()
        self._prepared = None


def _pages(size: int) -> int:
    return (size + 4095) & ~4095


def _log_frame(kind: int, lsn: int, body: bytes) -> Stamped:
    return Stamped(lsn, 0, Operation(kind, body, crc32(body), b"", _NONE, _NONE))


def _begin_frame(lsn: int, previous: tuple[int, int, int]) -> Stamped:
    return _log_frame(frames.LOG_BEGIN, lsn, layout.BEGIN_BODY.pack(*previous))


def _end_frame(last_lsn: int, following: int) -> Stamped:
    return _log_frame(frames.LOG_END, last_lsn, layout.END_BODY.pack(following))


def _lay_out(
    stamped: Sequence[Stamped],
    number: int,
    salt: bytes,
    durable_lsn: int,
    data_at: int,
    index_at: int,
) -> tuple[list[Buffer], list[Buffer], list[Appended], int, int]:
    """Parts for both logs, where each operation goes, and where both logs then end."""
    data: list[Buffer] = []
    index: list[Buffer] = []
    places: list[Appended] = []
    for item in stamped:
        data_parts, index_parts, data_bytes, index_bytes = frames.encode(
            item, salt=salt, epoch=number, durable_before=durable_lsn, data_offset=data_at
        )
        data += data_parts
        index += index_parts
        operation = item.operation
        rows_at = data_at + frames.HEADER_BYTES + len(operation.body) + 8 * len(operation.lengths)
        data_at += data_bytes
        index_at += index_bytes
        places.append(Appended(number << layout.OFFSET_BITS | rows_at, (number, index_at)))
    return data, index, places, data_at, index_at


def _repeated(file: LogFile, found: Frame) -> Stamped:
    """An operation as it stands in a log, to be written into another."""
    header = found.header
    raw = bytes(file.read(found.offset, header.data_bytes))
    at = frames.HEADER_BYTES + header.body_len + 8 * header.row_count
    rows = raw[at : at + header.rows_len]
    lengths, crcs = _NONE, _NONE
    if header.row_count:
        table = frames.decode_table(raw, header, 0)
        if table is None:
            raise file.corrupt(BadFrame(found.offset, found.offset, "row table"), header.lsn)
        lengths, crcs = table["length"].copy(), table["crc"].copy()
    operation = Operation(header.kind, found.body, header.body_crc, rows, lengths, crcs)
    return Stamped(header.lsn, header.first_id, operation)


def _verify_file(file: LogFile, end: int | None, until_lsn: int, last: bool) -> Iterator[Problem]:
    path = str(file.path)
    begin = file.begin()
    at = layout.HEADER_BYTES
    if begin is None:
        if file.header.flags & layout.BORN_IN_USE or file.proof(at, file.size()):
            yield Problem(path, at, f"{file.path.name}: the first frame is damaged", True)
        return
    size = file.size()
    limit = size if end is None else end
    if size < limit:
        yield Problem(path, size, f"{file.path.name}: the file was cut at {size} of {limit}", True)
        limit = size
    lsn = begin.lsn - 1
    sealed = False
    for found in file.frames(at, limit, rows=True):
        if isinstance(found, BadFrame):
            torn = last and lsn >= until_lsn and file.proof(found.offset + 8, limit) <= lsn
            if not torn:
                yield Problem(path, found.at, str(file.corrupt(found, lsn + 1)), True)
            elif file.last_nonzero(found.offset, limit) > found.offset and not until_lsn:
                yield Problem(path, found.at, f"{file.path.name}: a torn tail", False)
            return
        if found.header.kind == frames.LOG_END:
            sealed = True
            break
        lsn = found.header.lsn
    if not sealed and end is None and size < file.header.size:
        yield Problem(path, size, f"{file.path.name}: the file was cut at {size}", True)
