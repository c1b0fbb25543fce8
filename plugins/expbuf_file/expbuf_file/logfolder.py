"""The log files of one folder: making them, opening them, and which of them make up the log."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import secrets
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from expbuf_core import frames
from expbuf_core.contracts import Appended, Buffer, Stamped
from expbuf_core.errors import CorruptionError, StorageError
from expbuf_core.filesystem import FileSystem, remove, storage_errors
from expbuf_file import layout
from expbuf_file.logfile import BadFrame, Begin, LogFile
from expbuf_file.writing import begin_frame, lay_out, pages

_MOST_HANDLES = 4096
INDEX_SLACK = 1 << 16
_MOST_NUMBERED = 1 << 16  # a file of a higher number is looked for by itself


class Held(NamedTuple):
    """Data logs that are open, and stay so for whoever has this.

    Attributes:
        files: By number.
        known: (n,) whether a number is one of these; the last says no, for all beyond.
    """

    files: dict[int, LogFile]
    known: NDArray[np.bool_]


class LogFolder:
    """The log files in a buffer's folder.

    Args:
        path: The folder.
        uuid: Of the buffer.
        fs: Writes.
        initial_bytes: Size of a file that begins a log.

    Attributes:
        begins: How each data log continues another, as far as it was looked at; for `chain`, and
            to be cleared where that may have changed.
    """

    def __init__(self, path: Path, uuid: bytes, fs: FileSystem, initial_bytes: int) -> None:
        self.path = path
        self.uuid = uuid
        self.fs = fs
        self.initial_bytes = initial_bytes
        self.begins: dict[int, Begin] = {}
        self._files: dict[tuple[str, int], LogFile] = {}
        self._files_mutex = threading.Lock()
        self._held: Held | None = None  # none of `_files`, or as they are
        # A sample touches nearly all logs. To open one takes longer than to read from it.
        allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self._most_files = min(allowed // 4, _MOST_HANDLES) if allowed > 0 else _MOST_HANDLES

    def forget_all(self) -> None:
        """Close what is open; what others still hold stays readable for them."""
        self._files_mutex = threading.Lock()
        self._files.clear()
        self._held = None
        self.begins.clear()

    def unlink(self, log: str, number: int) -> None:
        path = layout.path_of(self.path, log, number)
        with storage_errors("remove", path):
            remove(path, self.fs)
        self._forget(log, number)
        if log == layout.DATA:
            self.begins.pop(number, None)

    def trim(self, number: int, end: int) -> None:
        """Give back the room behind the end of a recovered file."""
        path = layout.path_of(self.path, layout.DATA, number)
        with contextlib.suppress(OSError):  # room only; the file is right as it is
            fd = self.fs.open(path)
            try:
                if os.fstat(fd).st_size > end:
                    self.fs.truncate(fd, end)
            finally:
                self.fs.close(fd)

    def chain(self, after_lsn: int) -> dict[int, Begin]:
        """The data logs that make up the log behind `after_lsn`, by number, oldest first.

        Each with how it continues the one before. Another thread may drop some meanwhile.

        A file names its predecessor; files that were skipped that way were given up. After a power
        loss the first frame of a file may be lost and that of its successor not: then neither is
        part of the log (unless something says that they were durable; see `LogReader`).
        """
        numbers = layout.numbers(self.path, layout.DATA)
        chain: dict[int, Begin] = {}  # newest first
        wanted: int | None = None
        for number in reversed(numbers):
            if wanted is not None and number > wanted:
                continue
            if wanted is not None and number < wanted:
                break  # a gap: older files hold payloads only
            try:
                begin = self.begin(number)
            except StorageError as exc:
                if isinstance(exc.__cause__, FileNotFoundError):
                    break  # dropped since the folder was listed, and so are those before it
                raise
            if begin is None:
                if chain and chain[min(chain)].previous_lsn <= after_lsn:
                    break  # damaged, but nothing behind `after_lsn` is missing
                chain.clear()  # prepared and never used, or lost with what came behind it
                wanted = None
                continue
            chain[number] = begin
            wanted = begin.previous
        return dict(reversed(chain.items()))

    def begin(self, number: int) -> Begin | None:
        begin = self.begins.get(number)
        if begin is None:
            file = self.open(layout.DATA, number)
            begin = file.begin()
            if begin is not None:
                self.begins[number] = begin
            elif file.header.flags & layout.BORN_IN_USE:
                at, size = layout.HEADER_BYTES, file.size()
                if size < file.header.size and size < at + layout.END_BYTES:
                    raise file.corrupt(BadFrame(at, size, "the file was cut"), 0)
                raise file.corrupt(BadFrame(at, at, "the first frame is damaged"), 0)
        return begin

    def check_leftovers(self) -> None:
        """See that logs without an identity beside them are what an interrupted creation leaves.

        The index logs are asked, too: they name what damage hides in a data log.

        Raises:
            CorruptionError: There was a buffer, or a data log cannot be read.
        """
        for log, more in ((layout.DATA, _more_than_created), (layout.INDEX, _rows_named)):
            for number in layout.numbers(self.path, log):
                try:
                    file = self.open(log, number, anyones=True)
                except CorruptionError:
                    if log == layout.DATA:  # was synced before it had its name
                        raise
                    continue
                at = more(file)
                if at is not None:
                    raise CorruptionError(
                        f"{file.path.name}: holds the log of a buffer, whose identity "
                        "(expbuf.json) is missing; restore it from a backup or run `expbuf "
                        "repair`. If nothing was ever added to it, remove the folder",
                        path=file.path,
                        offset=at,
                    )

    def open(self, log: str, number: int, *, anyones: bool = False) -> LogFile:
        """A log file for one reader: what it reads ahead belongs to one thread.

        `anyones`: Of whatever buffer it is.
        """
        with storage_errors("open", layout.path_of(self.path, log, number)):
            return LogFile(self.path, log, number, None if anyones else self.uuid)

    def shared(self, log: str, number: int) -> LogFile:
        """A log file that is or was in use, shared by all threads for reading at given places."""
        file = self._files.get((log, number))
        if file is None:
            file = self.open(log, number)
            with self._files_mutex:
                if len(self._files) >= self._most_files:
                    del self._files[next(iter(self._files))]
                self._files[log, number] = file
                self._held = None
        return file

    def held(self) -> Held:
        """The data logs that `shared` has opened so far."""
        held = self._held
        if held is None:
            with self._files_mutex:
                files = {
                    number: file
                    for (log, number), file in self._files.items()
                    if log == layout.DATA and number < _MOST_NUMBERED
                }
                known = np.zeros(max(files, default=0) + 2, np.bool_)
                known[list(files)] = True
                held = self._held = Held(files, known)
        return held

    def let_go_of_deleted(self) -> None:
        """Close what another process has deleted: open, it would keep its room on the disk."""
        with self._files_mutex:
            gone = [key for key, file in self._files.items() if not os.fstat(file.fd).st_nlink]
            for key in gone:
                del self._files[key]
            if gone:
                self._held = None

    def _forget(self, log: str, number: int) -> None:
        with self._files_mutex:
            self._files.pop((log, number), None)
            self._held = None

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
        path = layout.path_of(self.path, log, number)
        temporary = path.with_name(f"{path.name}.{suffix}.tmp")
        header = layout.FileHeader(
            (layout.DATA, layout.INDEX).index(log),
            number,
            size,
            self.uuid,
            salt,
            layout.BORN_IN_USE if first else 0,
        )
        with storage_errors("create", path):
            fd = self.fs.open(temporary, create=True)
            try:
                self.fs.truncate(fd, 0)
                self.fs.allocate(fd, size)
                self.fs.pwrite(fd, layout.encode_header(header), 0)
                if first:
                    self.fs.pwritev(fd, list(first), layout.HEADER_BYTES)
                if log == layout.DATA:
                    self.fs.fsync(fd)
            except BaseException:
                with contextlib.suppress(OSError):
                    self.fs.unlink(temporary)
                raise
            finally:
                self.fs.close(fd)
        return temporary

    def make_pair(self, number: int, size: int, index_size: int, suffix: str) -> tuple[Path, Path]:
        return self._make_both(number, size, index_size, ((), ()), secrets.token_bytes(16), suffix)

    def _make_both(
        self,
        number: int,
        size: int,
        index_size: int,
        first: tuple[Sequence[Buffer], Sequence[Buffer]],
        salt: bytes,
        suffix: str,
    ) -> tuple[Path, Path]:
        """Make the index log and the data log of a number, or neither."""
        self._check_room(size + index_size, layout.path_of(self.path, layout.DATA, number))
        index_tmp = self._make(layout.INDEX, number, index_size, salt, first[1], suffix)
        try:
            return index_tmp, self._make(layout.DATA, number, size, salt, first[0], suffix)
        except BaseException:
            with contextlib.suppress(OSError):
                self.fs.unlink(index_tmp)  # its room is what the data log lacked
            raise

    def _check_room(self, size: int, path: Path) -> None:
        """Fail before half of a large file is written, where it cannot be but in vain."""
        try:
            room = os.statvfs(self.path)
        except OSError:
            return
        free = room.f_bfree * room.f_frsize
        if 0 < room.f_blocks and free < size:
            with storage_errors("create", path):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def begin_file(
        self,
        number: int,
        lsn: int,
        *,
        previous: tuple[int, int, int],
        durable: int,
        again: Sequence[Stamped] = (),
        small: bool = False,
    ) -> tuple[int, int, list[Appended]]:
        """Make a pair of log files that is in use from birth, and durable.

        Args:
            number: Of the files.
            lsn: Of the next operation.
            previous: File, end offset and last LSN of the log that it continues.
            durable: Highest durable LSN.
            again: Operations that stand in it already.
            small: Leave no room for more.

        Returns:
            Where the data log and the index log go on, and where the operations stand.
        """
        stamped = [begin_frame(again[0].lsn if again else lsn, previous)]
        if again:
            stamped += [*again, begin_frame(lsn, previous)]
        salt = secrets.token_bytes(16)
        data, index, places, data_end, index_end = lay_out(
            stamped, number, salt, durable, layout.HEADER_BYTES, layout.HEADER_BYTES
        )
        size = max(0 if small else self.initial_bytes, data_end + layout.HEADER_BYTES)
        index_size = max(size // 2, index_end) + (layout.HEADER_BYTES if small else INDEX_SLACK)
        suffix = str(os.getpid())
        pair = self._make_both(number, pages(size), pages(index_size), (data, index), salt, suffix)
        self.publish(number, *pair)
        return data_end, index_end, places[1 : 1 + len(again)]

    def publish(self, number: int, index_tmp: Path, data_tmp: Path) -> None:
        for log, temporary in ((layout.INDEX, index_tmp), (layout.DATA, data_tmp)):
            path = layout.path_of(self.path, log, number)
            with storage_errors("create", path):
                self.fs.replace(temporary, path)
            self._forget(log, number)
        self.begins.pop(number, None)
        with storage_errors("sync", self.path):
            self.fs.sync_folder(self.path)


def _more_than_created(file: LogFile) -> int | None:
    """Offset of what no interrupted creation leaves in a data log; None where nothing is.

    It leaves operations without rows, the last one perhaps torn, and nothing behind that; they
    continue nothing that was durable, and nobody has ended them.
    """
    at = layout.HEADER_BYTES
    for found in file.frames(at, file.size(), rows=False):
        if isinstance(found, BadFrame):
            break
        header = found.header
        continues = header.kind == frames.LOG_BEGIN and header.durable_before
        if continues or header.kind == frames.LOG_END or header.row_count:
            return at
        at = found.end
    if at == layout.HEADER_BYTES and file.header.flags & layout.BORN_IN_USE:
        return at  # its first frame was synced before it had its name
    behind = file.headers(at, file.size())
    return next((place for place, header in behind if place > at or header.row_count), None)


def _rows_named(file: LogFile) -> int | None:
    """Offset of a frame of an index log that names rows; it may be torn anywhere."""
    found = file.headers(layout.HEADER_BYTES, file.size())
    return next((place for place, header in found if header.row_count), None)
