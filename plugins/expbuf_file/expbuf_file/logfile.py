"""One open log file: reading frames from it, and telling good from bad."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from expbuf_core import alike, frames
from expbuf_core.contracts import LoggedOperation, LoggedRun
from expbuf_core.crc import crc32
from expbuf_core.errors import CorruptionError
from expbuf_core.filesystem import first_unreadable, is_damage, open_to_read, reading
from expbuf_core.frames import Header
from expbuf_core.native import native
from expbuf_file import layout

_FIRST_WINDOW = 1 << 14
_LAST_ID = (1 << 62) - 1  # that is taken together with others: it fits into a column
_LAST_WINDOW = 1 << 22
_NO_LENGTHS: NDArray[np.uint32] = np.empty(0, np.uint32)
NO_BOUND = 1 << 64  # above every LSN


class Begin(NamedTuple):
    """The first frame of a file: where its log comes from."""

    lsn: int
    previous: int
    previous_end: int
    previous_lsn: int
    durable_before: int
    end: int


class Frame(NamedTuple):
    """A frame whose every byte was checked; the next one begins at `end`."""

    offset: int
    end: int
    header: frames.Header
    body: bytes
    lengths: NDArray[np.uint32]


class BadFrame(NamedTuple):
    """Where the intact frames of a file end, and why: `offset` of the frame, `at` of the fault."""

    offset: int
    at: int
    reason: str


class LogFile:
    """A log file, open for reading. Closed with its last reference, so that pins keep it alive."""

    def __init__(
        self,
        folder: Path,
        log: str,
        number: int,
        uuid: bytes | None,
        header: layout.FileHeader | None = None,
    ) -> None:
        self.path = layout.path_of(folder, log, number)
        self.number = number
        self.fd = open_to_read(self.path)
        # Given: the stored one is damaged.
        self.header = header or layout.read_header(self.fd, self.path, uuid)
        self.salt_crc = crc32(self.header.salt)
        self._window = memoryview(b"")  # its first bytes, `_filled`, stand at `_window_at`
        self._window_at = 0
        self._filled = 0
        self._ahead = _FIRST_WINDOW

    def __del__(self) -> None:
        fd = getattr(self, "fd", -1)
        if fd >= 0:
            self.fd = -1
            os.close(fd)

    def size(self) -> int:
        """Bytes of it now. What stands behind the size that it was made with is not its own."""
        return min(os.fstat(self.fd).st_size, self.header.size)

    def read(self, offset: int, length: int) -> memoryview:
        """Up to `length` bytes; shorter at the end of the file. Valid until the next call.

        Reads ahead, further and further.
        """
        at = self._reach(offset, length)
        return self._window[at : min(at + length, self._filled)]

    def _reach(self, offset: int, length: int) -> int:
        """Where in the window these bytes begin; they may end behind `_filled` if the file does."""
        at = offset - self._window_at
        if at < 0 or at + length > self._filled:
            self._fill(offset, length)
            return 0
        return at

    def _fill(self, offset: int, length: int) -> None:
        size = max(length, self._ahead)
        self._ahead = min(4 * self._ahead, _LAST_WINDOW)
        at = offset - self._window_at
        known = bytes(self._window[at : self._filled]) if at >= 0 else b""
        if len(self._window) < size:
            self._window = memoryview(bytearray(size))
        self._window[: len(known)] = known
        self._filled, start = 0, len(known)  # nothing, should reading fail
        try:
            n = self._read_into(self._window[start:size], offset + start)
        except CorruptionError:  # perhaps further ahead than anybody wants to read
            n = self._read_into(self._window[start:length], offset + start)
        self._filled = start + n
        self._window_at = offset

    def _read_into(self, view: memoryview, offset: int) -> int:
        """Read, and nowhere else is this file read; how many bytes: fewer at its end only.

        Raises:
            CorruptionError: The disk does not give them back.
        """
        done = 0
        try:
            while done < len(view) and (n := os.preadv(self.fd, [view[done:]], offset + done)):
                done += n
        except OSError as exc:
            with reading(self.path, first_unreadable(self.fd, offset) if is_damage(exc) else None):
                raise
        return done

    def _bytes_at(self, offset: int, length: int) -> bytearray:
        """Bytes that nobody reads again soon; fewer at the end of the file."""
        raw = bytearray(length)
        n = self._read_into(memoryview(raw), offset)
        return raw if n == length else raw[:n]

    def forget(self, wanted: int = _FIRST_WINDOW) -> None:
        """Drop what was read ahead: the file grows.

        Args:
            wanted: Bytes that will be read.
        """
        self._filled = 0
        self._ahead = min(wanted, _LAST_WINDOW)

    def begin(self) -> Begin | None:
        """The link to the log before, or None while the file is unused (or its link damaged)."""
        found = self.frame(layout.HEADER_BYTES, self.size(), rows=False)
        if isinstance(found, BadFrame) or found.header.kind != frames.LOG_BEGIN:
            return None
        previous, end, lsn = layout.BEGIN_BODY.unpack(found.body)
        return Begin(
            found.header.lsn,
            previous,
            end,
            lsn,
            found.header.durable_before,
            found.end,
        )

    def frames(self, offset: int, limit: int, *, rows: bool) -> Iterator[Frame | BadFrame]:
        """Frames from `offset` up to `limit`; a `BadFrame` is the last, if there is one.

        Args:
            offset: Where a frame begins.
            limit: Where the file ends.
            rows: Whether rows are there, and to be checked.
        """
        while offset < limit:
            found = self.frame(offset, limit, rows=rows)
            yield found
            if isinstance(found, BadFrame):
                return
            offset = found.end

    def frame(self, offset: int, limit: int, *, rows: bool) -> Frame | BadFrame:
        """The frame at `offset`; see `frames`."""
        start = frames.HEADER_BYTES
        at = self._reach(offset, start)
        header = None
        if at + start <= self._filled:
            header = frames.decode_header(self._window, at, self.salt_crc)
        if header is None:
            return BadFrame(offset, offset, "no valid frame header")
        data_log = self.header.log == 0
        body_len, n = header.body_len, header.row_count
        bare = start + body_len + 8 * n
        size = frames.padded(bare + header.rows_len if data_log else bare)
        if header.epoch != self.number or (data_log and header.data_offset != offset):
            return BadFrame(offset, offset, "a frame of another place")
        if offset + size > limit:
            return BadFrame(offset, offset, f"a frame of {size} bytes, beyond the end of the file")
        length = size if rows else bare
        at = self._reach(offset, length)
        raw = self._window[at : min(at + length, self._filled)]
        body = bytes(raw[start : start + body_len])
        if crc32(body) != header.body_crc:
            return BadFrame(offset, offset + start, "checksum mismatch in the body")
        lengths: NDArray[np.uint32] | None = _NO_LENGTHS
        wrong: int | None = None
        if n == 1:  # nearly all
            single = frames.decode_single(raw, header, 0)
            lengths = None if single is None else np.array(single[:1], np.uint32)
            if single is not None and rows and single[0] == header.rows_len:
                row = frames.check_row(raw[bare : bare + header.rows_len])
                if row is None or row[1] != single[1] or row[0] != (header.first_id or row[0]):
                    wrong = bare
        elif n:
            table = frames.decode_table(raw, header, 0)
            lengths = None if table is None else table["length"].copy()
            if table is not None and rows:
                wrong = frames.check_rows(raw, bare, header.first_id or None, table)
        if lengths is None:
            at = offset + start + body_len
            return BadFrame(offset, at, "checksum mismatch in the row table")
        if n and sum(lengths.tolist()) != header.rows_len:
            return BadFrame(offset, offset, "row lengths that contradict the header")
        if wrong is not None:
            return BadFrame(offset, offset + wrong, "checksum mismatch in a row")
        if rows and bare + header.rows_len < size and any(raw[bare + header.rows_len :]):
            return BadFrame(offset, offset + bare + header.rows_len, "padding that is not zero")
        return Frame(offset, offset + size, header, body, lengths)

    def alike(
        self,
        offset: int,
        limit: int,
        *,
        rows: bool,
        lsn: int | None = None,
        until_lsn: int = NO_BOUND,
    ) -> tuple[list[LoggedOperation | LoggedRun], int]:
        """Operations with successive LSNs that stand from `offset` on, as far as was read ahead.

        Nothing is passed over and nothing is found fault with: this ends before the first frame
        that is not plainly the next operation, intact. What that one is, `frames` says, which takes
        several times as long for each.

        Args:
            offset: Where a frame begins.
            limit: Where the file ends.
            rows: Whether rows are there, and to be checked.
            lsn: Of the first; None: any.
            until_lsn: Of the last.

        Returns:
            The operations, those that look alike in runs; perhaps none. Where the last one ends.
        """
        header_bytes = frames.HEADER_BYTES
        at = self._reach(offset, header_bytes)
        window, window_at = self._window, self._window_at
        end = min(self._filled, limit - window_at)
        epoch, salt_crc, data_log = self.number, self.salt_crc, self.header.log == 0
        run = alike.run_of(
            window,
            at,
            end,
            window_at,
            limit,
            epoch=epoch,
            salt_crc=salt_crc,
            data_log=data_log,
            rows=rows,
            lsn=lsn,
            until_lsn=until_lsn,
            location=epoch << layout.OFFSET_BITS,
        )
        if run is not None:
            return [run[0]], window_at + run[1]
        # Spelled out, not called: a call takes longer than what it does.
        decode, decode_row = frames.HEADER.unpack_from, frames.SINGLE_ROW.unpack_from
        pack_id, row_header = frames.ID.pack, frames.ROW_HEADER_BYTES
        found = alike.Alike(epoch << layout.OFFSET_BITS)
        shape: tuple[int, int, int] | None = None
        stretch = 0
        bodies, ids, places, sizes = found.bodies, found.ids, found.places, found.sizes
        while (body_at := at + header_bytes) <= end:
            (
                magic,
                header_crc,
                number,
                _,
                place,
                first_id,
                of,
                kind,
                _,
                body_len,
                body_crc,
                n,
                table_crc,
                rows_len,
            ) = decode(window, at)
            if lsn is None:
                lsn = number
            if (
                magic != frames.MAGIC
                or number != lsn
                or number > until_lsn
                or of != epoch
                or kind >= frames.LOG_BEGIN
                or place >= layout.MAX_FILE_BYTES
                or first_id > _LAST_ID
                or crc32(window[at + 8 : body_at], salt_crc) != header_crc
            ):
                break
            if n > 1 and native is not None and places:
                break  # native code may join it with others
            table_at = body_at + body_len
            rows_at = table_at + 8 * n
            behind = rows_at + rows_len if data_log else rows_at
            following = behind + (at - behind) % 8
            if (following if rows else rows_at) > end or window_at + following > limit:
                break
            body = window[body_at:table_at]
            if (data_log and place != window_at + at) or crc32(body) != body_crc:
                break
            if n == 1:
                if crc32(window[table_at:rows_at]) != table_crc:
                    break
                if rows:
                    if rows_len < row_header:
                        break
                    length, seal, id_, crc, own_seal = decode_row(window, table_at)
                    if (
                        id_ != first_id
                        or own_seal != seal
                        or crc32(window[rows_at + row_header : behind]) != crc
                        or crc32(pack_id(id_), crc) != seal
                    ):
                        break
                else:
                    length = frames.SIZE.unpack_from(window, table_at)[0]
                if length != rows_len:
                    break
            elif n:
                table = frames.table_at(window, table_at, n, table_crc)
                if table is None or int(table["length"].sum(dtype=np.uint64)) != rows_len:
                    break
                if rows and frames.check_rows(window, rows_at, first_id, table) is not None:
                    break
                found.tables[len(places)] = table["length"].copy()
            elif rows_len:
                break
            if rows and behind < following and any(window[behind:following]):
                break
            if (kind, body_len, n) != shape:
                shape = (kind, body_len, n)
                found.shapes.append((len(places), shape))
                stretch = 0
            bodies.append(body)
            ids.append(first_id)
            places.append(place + rows_at - at)
            sizes.append(rows_len)
            lsn += 1
            at = following
            stretch += 1
            if stretch == alike.LEAST_RUN and native is not None and n <= 1:
                break  # it looks like many: native code goes on
        return found.taken_together((lsn or 0) - len(places)), window_at + at

    def proof(self, offset: int, limit: int) -> int:
        """The highest LSN that any valid frame in [offset, limit) says was durable before it."""
        return max((head.durable_before for _, head in self.headers(offset, limit)), default=0)

    def headers(self, offset: int, limit: int) -> Iterator[tuple[int, Header]]:
        """Valid frame headers in [offset, limit), whatever stands between; and where they are."""
        step = 8 << 20
        overlap = frames.HEADER_BYTES - 8
        while offset < limit:
            raw = self._bytes_at(offset, min(step, limit - offset) + overlap)
            if not raw:
                break
            at = _first_nonzero(raw)
            while (found := frames.find_header(raw, at, self.salt_crc)) is not None:
                yield offset + found[0], found[1]
                at = found[0] + 8
            offset += step

    def last_nonzero(self, offset: int, limit: int) -> int:
        """End of the last 8 bytes in [offset, limit) that are not all zero; `offset` if none."""
        last = offset
        step = 8 << 20
        at = offset
        while at < limit:
            raw = self._bytes_at(at, min(step, limit - at))
            if not raw:
                break
            if _first_nonzero(raw) < len(raw):
                last = at + frames.padded(len(raw.rstrip(b"\0")))
            at += len(raw)
        return last

    def operation(self, frame: Frame) -> LoggedOperation:
        """What replicas see of a frame."""
        header = frame.header
        location = header.epoch << layout.OFFSET_BITS | header.rows_offset
        return LoggedOperation(
            header.lsn, header.kind, header.first_id, frame.body, location, frame.lengths
        )

    def corrupt(self, bad: BadFrame, lsn: int) -> CorruptionError:
        """The error for a bad frame that is no torn tail."""
        return CorruptionError(
            f"{self.path.name}: {bad.reason} at offset {bad.at} (lsn {lsn}); nothing was changed. "
            "Run `expbuf verify`",
            path=self.path,
            offset=bad.at,
            lsn=lsn,
        )


def _first_nonzero(raw: bytearray) -> int:
    """Offset, a multiple of 8, of the first 8 bytes that are not all zero; `len(raw)` if none.

    Searching zeros for anything else takes ten times as long.
    """
    words = np.frombuffer(raw, np.uint64, len(raw) // 8)
    if words.any():
        return 8 * int((words != 0).argmax())
    return len(raw) if not any(raw[words.nbytes :]) else words.nbytes
