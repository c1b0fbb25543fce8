"""Frames and rows: the checksummed units that every durable byte of a log consists of.

A *frame* is one operation (one commit) in a log; a *row* is one experience's payload inside it. The
layout is specified in `plugins/expbuf_file/FORMAT.md`. All integers are little-endian.

The body and every row carry checksums that are computed once, before any lock is taken. The header
binds them to a place: its own checksum covers them together with the LSN, the offset and a salt
that is random for each file, so that neither a stale frame nor bytes that a user stored can pass
for a frame.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from expbuf_core.contracts import Buffer, Pin, Stamped
from expbuf_core.crc import crc32
from expbuf_core.errors import CorruptionError

MAGIC = 0x46505845  # "EXPF"
_MAGIC_BYTES = struct.pack("<I", MAGIC)

# magic, header_crc | lsn, durable_before, data_offset, first_id, epoch, kind, flags,
# body_len, body_crc, row_count, table_crc, rows_len
HEADER = struct.Struct("<IIQQQQIHHIIIIQ")
_COVERED = struct.Struct("<QQQQIHHIIIIQ")  # HEADER behind its checksum
_START = struct.Struct("<II")
TABLE_ROW = struct.Struct("<II")  # length and seal, in the row table
HEADER_BYTES = HEADER.size
TABLE_ENTRY = np.dtype([("length", "<u4"), ("crc", "<u4")])

# Kinds from 0xF0 belong to the log itself and use up no LSN.
LOG_BEGIN = 0xF0
LOG_END = 0xF1

MAX_ROWS = 1 << 26


class Header(NamedTuple):
    """A decoded frame header; see FORMAT.md."""

    lsn: int
    durable_before: int
    data_offset: int
    first_id: int
    epoch: int
    kind: int
    flags: int
    body_len: int
    body_crc: int
    row_count: int
    table_crc: int
    rows_len: int

    @property
    def data_bytes(self) -> int:
        """Size of the frame with its rows, padded."""
        return padded(HEADER_BYTES + self.body_len + 8 * self.row_count + self.rows_len)

    @property
    def rows_offset(self) -> int:
        """Where the rows begin in the data log."""
        return self.data_offset + HEADER_BYTES + self.body_len + 8 * self.row_count


def padded(n: int) -> int:
    """Size with its padding to whole 8 bytes."""
    return (n + 7) & ~7


_PADDING = [b"\0" * i for i in range(8)]


def encode(
    stamped: Stamped, *, salt: bytes, epoch: int, durable_before: int, data_offset: int
) -> tuple[list[Buffer], list[Buffer], int, int]:
    """Lay out one operation for both logs.

    Returns:
        The parts for the data log, the parts for the index log, and the size of each.
    """
    operation = stamped.operation
    lengths = operation.lengths
    n = len(lengths)
    if n == 1:
        table_bytes = _START.pack(int(lengths[0]), int(operation.row_crcs[0]))
        table_crc = crc32(table_bytes)
    elif n:
        table = np.empty(n, TABLE_ENTRY)
        table["length"] = lengths
        table["crc"] = operation.row_crcs
        table_bytes = table.tobytes()
        table_crc = crc32(table_bytes)
    else:
        table_bytes, table_crc = b"", 0
    body_len, rows_len = len(operation.body), len(operation.rows)
    covered = _COVERED.pack(
        stamped.lsn,
        durable_before,
        data_offset,
        stamped.first_id,
        epoch,
        operation.kind,
        0,
        body_len,
        operation.body_crc,
        n,
        table_crc,
        rows_len,
    )
    head = _START.pack(MAGIC, crc32(covered, crc32(salt))) + covered
    bare = HEADER_BYTES + body_len + 8 * n
    index_parts = [head, operation.body, table_bytes, _PADDING[-bare % 8]]
    if not rows_len:
        return index_parts, index_parts, padded(bare), padded(bare)
    whole = bare + rows_len
    data_parts = [head, operation.body, table_bytes, operation.rows, _PADDING[-whole % 8]]
    return data_parts, index_parts, padded(whole), padded(bare)


def decode_header(data: Buffer, offset: int, salt_crc: int) -> Header | None:
    """Decode and check the header at `offset`; None if these bytes are no header of this file.

    Args:
        data: Bytes of the log.
        offset: Where in them the header begins.
        salt_crc: CRC-32 of the file's salt.
    """
    if offset + HEADER_BYTES > len(data):
        return None
    fields = HEADER.unpack_from(data, offset)
    if fields[0] != MAGIC:
        return None
    if crc32(data[offset + 8 : offset + HEADER_BYTES], salt_crc) != fields[1]:
        return None
    return tuple.__new__(Header, fields[2:])  # `_make` takes three times as long


def find_header(data: Buffer, start: int, salt_crc: int) -> tuple[int, Header] | None:
    """The first valid header at or behind `start`, which is a multiple of 8."""
    raw = data if isinstance(data, bytes | bytearray) else bytes(data)
    at = raw.find(_MAGIC_BYTES, start)
    while at >= 0:
        if at % 8 == 0:
            header = decode_header(raw, at, salt_crc)
            if header is not None:
                return at, header
        at = raw.find(_MAGIC_BYTES, at + 1)
    return None


def decode_table(data: Buffer, header: Header, offset: int) -> NDArray[np.void] | None:
    """The table of row lengths and checksums of the frame at `offset`, or None if damaged."""
    at = offset + HEADER_BYTES + header.body_len
    return table_at(data, at, header.row_count, header.table_crc)


def table_at(data: Buffer, at: int, n: int, crc: int) -> NDArray[np.void] | None:
    """The table of n rows that begins at `at`, or None if damaged."""
    raw = memoryview(data)[at : at + 8 * n]
    if len(raw) != 8 * n or crc32(raw) != crc:
        return None
    return np.frombuffer(raw, TABLE_ENTRY)


def decode_single(data: Buffer, header: Header, offset: int) -> tuple[int, int] | None:
    """(length, checksum) of the one row of the frame at `offset`, or None if damaged.

    What `decode_table` says of it, in a fifth of the time.
    """
    start = offset + HEADER_BYTES + header.body_len
    raw = data[start : start + 8]
    if len(raw) != 8 or crc32(raw) != header.table_crc:
        return None
    length, crc = _START.unpack(raw)
    return length, crc


def check_rows(
    data: Buffer, start: int, first_id: int | None, table: NDArray[np.void]
) -> int | None:
    """Check the rows that begin at `start`.

    Args:
        data: Bytes of the log.
        start: Where in them the first row begins.
        first_id: Rows are numbered from here; None where each row may have any id.
        table: Of the frame.

    Returns:
        None if all are what was written, else the offset of the first that is not.
    """
    view = memoryview(data)
    end, at = len(view), start
    unpack, pack, header = ROW.unpack_from, ID.pack, ROW_HEADER_BYTES
    # `check_row` spelled out: a call takes longer than what it does.
    for i, (length, seal) in enumerate(table.tolist()):
        following = at + length
        if length < header or following > end:
            return at
        id_, crc, own_seal = unpack(view, at)
        if (
            own_seal != seal
            or crc32(view[at + header : following]) != crc
            or crc32(pack(id_), crc) != seal
            or (first_id is not None and id_ != first_id + i)
        ):
            return at
        at = following
    return None


# ---------------------------------------------------------------- rows

# id, content_crc, seal | content. The seal binds the content to its id. It is stamped under the
# append lock, once the id is known; the content, with the long checksum, is made before.
ROW = struct.Struct("<qII")
_ROW_HEAD = np.dtype([("id", "<i8"), ("crc", "<u4"), ("seal", "<u4")])
ROW_HEADER_BYTES = ROW.size
ID = struct.Struct("<q")
SIZE = struct.Struct("<I")
SINGLE_ROW = struct.Struct("<IIqII")  # table entry and header of a row that is the only one
_FEW = 128  # with more rows arrays are faster
# What one byte does to a CRC-32: crc32 keeps its state inverted, before and after.
_CRC_TABLE = ~np.array([crc32(bytes([i]), 0xFFFFFFFF) for i in range(256)], np.uint32)


def stamp_rows(
    rows: bytearray, lengths: NDArray[np.uint32], content_crcs: list[int], first_id: int
) -> NDArray[np.uint32]:
    """Write ids and seals into rows whose contents stand; return the seals, (n,) uint32."""
    n = len(content_crcs)
    if n <= _FEW:
        seals, at = [], 0
        for id_, (length, crc) in enumerate(
            zip(lengths.tolist(), content_crcs, strict=True), first_id
        ):
            seal = crc32(ID.pack(id_), crc)
            ROW.pack_into(rows, at, id_, crc, seal)
            seals.append(seal)
            at += length
        return np.array(seals, np.uint32)
    heads = np.empty(n, _ROW_HEAD)
    heads["id"] = np.arange(first_id, first_id + n)
    heads["crc"] = content_crcs
    heads["seal"] = _seals(heads["id"], heads["crc"])
    starts = np.cumsum(lengths, dtype=np.int64) - lengths
    where = starts[:, None] + np.arange(ROW_HEADER_BYTES)
    np.frombuffer(rows, np.uint8)[where] = heads.view(np.uint8).reshape(n, ROW_HEADER_BYTES)
    return heads["seal"].copy()


def _seals(ids: NDArray[np.int64], crcs: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """`crc32(ID.pack(id), crc)` of many rows at once: this happens under the append lock."""
    state = ~crcs
    octets = ids.astype("<i8").view(np.uint8).reshape(-1, 8)
    for i in range(8):
        state = _CRC_TABLE[(state ^ octets[:, i]) & 0xFF] ^ (state >> np.uint32(8))
    return ~state


def check_row(row: Buffer) -> tuple[int, int] | None:
    """(id, seal) of an intact row, else None."""
    if len(row) < ROW_HEADER_BYTES:
        return None
    id_, crc, seal = ROW.unpack_from(row)
    if crc32(memoryview(row)[ROW_HEADER_BYTES:]) != crc or crc32(ID.pack(id_), crc) != seal:
        return None
    return id_, seal


def first_damaged(rows: Sequence[Buffer], ids: Sequence[int]) -> int:
    """Number of the first row that is not the intact payload of its id; -1 where all are."""
    unpack, pack = ROW.unpack_from, ID.pack
    for i, (row, wanted) in enumerate(zip(rows, ids, strict=True)):
        if len(row) < ROW_HEADER_BYTES:
            return i
        id_, crc, seal = unpack(row)
        if (
            id_ != wanted
            or crc32(memoryview(row)[ROW_HEADER_BYTES:]) != crc
            or crc32(pack(id_), crc) != seal
        ):
            return i
    return -1


def damaged_payload(pin: Pin, i: int, id_: int) -> CorruptionError:
    """The error for a pinned row that is not the intact payload of this experience."""
    path, offset = pin.where(i)
    name = path.rpartition("/")[2] or "storage"
    return CorruptionError(
        f"{name}: the payload of experience {id_} at offset {offset} is damaged, or is another "
        "one's; run `expbuf verify`",
        path=path or None,
        offset=offset if offset >= 0 else None,
    )
