"""Following the log as it grows, and holding on to payloads."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from expbuf_core import frames
from expbuf_core.contracts import (
    Buffer,
    LogFollower,
    LoggedOperation,
    LoggedRun,
    LogGone,
    Pin,
    behind,
    last_of,
    one_by_one,
)
from expbuf_core.errors import CorruptionError
from expbuf_core.filesystem import reading
from expbuf_file import layout
from expbuf_file.logfile import BadFrame, LogFile

_OFFSET = layout.MAX_FILE_BYTES - 1  # bits of a place that are the offset in its file
_PROBED = 8  # rows after which it is clear whether one had to come from the disk
_PROBED_NEXT = 32  # where the first did not
_TYPICAL_BYTES = 2048  # of an operation in an index log
_COLD_S = 20e-6  # a row that is there takes a few microseconds


class Part(NamedTuple):
    """A file to read, as far as it is part of the log; its successor says so, the last has none.

    Attributes:
        number: Of the file.
        end: Where it ends in the data log.
        last_lsn: Its last operation; what stands behind was given up, and written again elsewhere.
    """

    number: int
    end: int | None = None
    last_lsn: int | None = None


class FileFollower(LogFollower):
    """Reads the index log; where that is gone (a recovered file), the data log without its rows.

    Args:
        folder: Of the buffer.
        uuid: Of the buffer.
        after_lsn: Operations up to here are known.
        files: Files to read, oldest first.
        moved: Called when it goes on to another file.
        end_of: Where the index log of that number ends by now; 0 where that is not known.
    """

    def __init__(
        self,
        folder: Path,
        uuid: bytes,
        after_lsn: int,
        files: list[Part],
        moved: Callable[[], None],
        end_of: Callable[[int], int],
    ) -> None:
        self._folder = folder
        self._uuid = uuid
        self._lsn = after_lsn
        self._files = files
        self._moved = moved
        self._end_of = end_of
        self._file: LogFile | None = None
        self._offset = layout.HEADER_BYTES

    def read(self, until_lsn: int) -> Iterator[LoggedOperation]:
        return one_by_one(self.read_alike(until_lsn))

    def read_alike(self, until_lsn: int) -> Iterator[LoggedOperation | LoggedRun]:
        if self._file is not None:
            self._file.forget(self._wanted(until_lsn))
        while self._lsn < until_lsn:
            file = self._file or self._open()
            moved = yield from self._read_file(file, until_lsn)
            if moved is None:
                return
            if self._lsn < until_lsn and not moved:
                if file.header.log == 0 and self._files[0].end is None:
                    raise LogGone  # its index log was dropped, and with that the way on
                raise CorruptionError(
                    f"{file.path.name}: operation {self._lsn + 1} is missing or damaged at offset "
                    f"{self._offset}; run `expbuf verify`",
                    path=file.path,
                    offset=self._offset,
                    lsn=self._lsn + 1,
                )

    def _wanted(self, until_lsn: int) -> int:
        """Bytes that stand up to there; what was never written would come from the disk."""
        end = self._end_of(self._files[0].number)
        return max(end - self._offset, 0) or max(until_lsn - self._lsn, 8) * _TYPICAL_BYTES

    def _read_file(
        self, file: LogFile, until_lsn: int
    ) -> Generator[LoggedOperation | LoggedRun, None, bool | None]:
        """Yield a file's operations.

        Returns:
            Whether the log goes on in another file; None where no more is wanted.
        """
        _, end, last_lsn = self._files[0]
        limit = file.size() if file.header.log == 1 or end is None else end
        until = until_lsn if last_lsn is None else min(until_lsn, last_lsn)
        while self._offset < limit:
            items, after = file.alike(self._offset, limit, rows=False, until_lsn=until)
            if not items:
                found = file.frame(self._offset, limit, rows=False)
                if isinstance(found, BadFrame):
                    return False
                header, after = found.header, found.end
                if header.kind == frames.LOG_END:
                    (following,) = layout.END_BODY.unpack(found.body)
                    return self._advance(following)
                if header.kind != frames.LOG_BEGIN:
                    if last_lsn is not None and header.lsn > last_lsn:
                        return self._advance(0)
                    if header.lsn > until_lsn:
                        return None  # numbers were left out; what comes next is not wanted yet
                    items = [file.operation(found)]
            self._offset = after
            for item in behind(items, self._lsn):
                self._lsn = last_of(item)
                yield item
            if items and self._lsn == until_lsn:
                return None
        return self._advance(0)

    def _open(self) -> LogFile:
        self._moved()
        number = self._files[0].number
        for log in (layout.INDEX, layout.DATA):
            try:
                self._file = LogFile(self._folder, log, number, self._uuid)
            except FileNotFoundError:
                continue
            if log == layout.DATA:
                self._offset = layout.HEADER_BYTES  # what `skip` said is a place in the index log
            return self._file
        raise LogGone

    def _advance(self, following: int) -> bool:
        """Go on to the next file; False if there is none."""
        if len(self._files) > 1:
            del self._files[0]
        elif following:
            self._files = [Part(following)]
        else:
            return False
        self._file = None
        self._offset = layout.HEADER_BYTES
        return True

    def skip(self, lsn: int, cursor: Any) -> None:
        number, offset = cursor
        self._lsn = lsn
        if self._files[0].number != number:
            self._files = [Part(number)]
            self._file = None
        self._offset = offset

    def close(self) -> None:
        self._file = None


class FilePin(Pin):
    """Holds the log files open: a file that is deleted stays readable until the last reference."""

    def __init__(
        self,
        files: dict[int, LogFile],
        places: NDArray[np.int64],
        lengths: NDArray[np.uint32],
    ) -> None:
        self._files = files
        self._places = places
        self._lengths = lengths

    def read(self, i: int) -> Buffer:
        return self.read_many(np.array([i]))[0]

    def read_many(self, which: NDArray[np.int64]) -> list[Buffer]:
        rows: list[Buffer] = []
        wanted = self._places[which]
        places, lengths = wanted.tolist(), self._lengths[which].tolist()
        fds = {number: file.fd for number, file in self._files.items()}
        reads = list(
            zip(
                [fds[number] for number in (wanted >> layout.OFFSET_BITS).tolist()],
                lengths,
                (wanted & _OFFSET).tolist(),
                strict=True,
            )
        )
        at, probed, announced = 0, _PROBED, False
        while at < len(reads):
            started, some = time.perf_counter(), reads[at : at + probed]
            try:
                rows += [os.pread(fd, length, offset) for fd, length, offset in some]
            except OSError:  # once more, one by one, to say which file it is
                for place, (fd, length, offset) in zip(places[at:], some, strict=False):
                    with reading(self._files[place >> layout.OFFSET_BITS].path, place & _OFFSET):
                        rows.append(os.pread(fd, length, offset))
            at += probed
            if not announced and time.perf_counter() - started > probed * _COLD_S:
                self._announce(places[at:], lengths[at:])
                announced = True
            probed = _PROBED_NEXT
        for row, length, place in zip(rows, lengths, places, strict=True):
            if len(row) < length:
                file = self._files[place >> layout.OFFSET_BITS]
                path, offset = file.path, (place & _OFFSET) + len(row)
                with reading(path, offset):
                    os.pread(file.fd, 1, offset)  # raises if it is the disk that gives no more
                raise CorruptionError(
                    f"{path.name}: the file ends at offset {offset}, inside a payload; run "
                    "`expbuf verify`",
                    path=path,
                    offset=offset,
                )
        return rows

    def _announce(self, places: list[int], lengths: list[int]) -> None:
        """Let the system fetch these rows all at once: some before them came from the disk."""
        for place, length in zip(places, lengths, strict=True):
            fd = self._files[place >> layout.OFFSET_BITS].fd
            with contextlib.suppress(OSError):
                os.posix_fadvise(fd, place & _OFFSET, length, os.POSIX_FADV_WILLNEED)

    def where(self, i: int) -> tuple[str, int]:
        place = int(self._places[i])
        file = self._files[place >> layout.OFFSET_BITS]
        return str(file.path), place & _OFFSET
