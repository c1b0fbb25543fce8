"""Laying out operations as frames for both logs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from expbuf_core import frames
from expbuf_core.contracts import Appended, Buffer, Operation, Stamped
from expbuf_core.crc import crc32
from expbuf_file import layout
from expbuf_file.logfile import BadFrame, Frame, LogFile

_NONE: NDArray[np.uint32] = np.empty(0, np.uint32)


def pages(size: int) -> int:
    """Round up to whole pages."""
    return (size + 4095) & ~4095


def log_frame(kind: int, lsn: int, body: bytes) -> Stamped:
    """A frame of the log itself, which uses up no LSN."""
    return Stamped(lsn, 0, Operation(kind, body, crc32(body), b"", _NONE, _NONE))


def begin_frame(lsn: int, previous: tuple[int, int, int]) -> Stamped:
    """The first frame of a log file: which file, end offset and last LSN it continues."""
    return log_frame(frames.LOG_BEGIN, lsn, layout.BEGIN_BODY.pack(*previous))


def end_frame(last_lsn: int, following: int) -> Stamped:
    """The last frame of a log file: which file follows; 0 for a clean close."""
    return log_frame(frames.LOG_END, last_lsn, layout.END_BODY.pack(following))


def lay_out(
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


def pieces(parts: Iterable[Buffer], size: int) -> Iterator[list[Buffer]]:
    """The same bytes as lists of parts, each of `size` bytes, the last one of what remains."""
    piece: list[Buffer] = []
    room = size
    for part in parts:
        view = memoryview(part)
        while len(view) > room:
            yield [*piece, view[:room]]
            view = view[room:]
            piece, room = [], size
        piece.append(view)
        room -= len(view)
    yield piece


def repeated(file: LogFile, found: Frame) -> Stamped:
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
