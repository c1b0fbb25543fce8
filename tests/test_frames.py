"""Frames and rows: every byte counts."""

from __future__ import annotations

from itertools import pairwise
from typing import Any
from zlib import crc32

import numpy as np
import pytest

from expbuf_core import codec, frames
from expbuf_core.contracts import Operation, Stamped

SALT = bytes(range(16))
SALT_CRC = crc32(SALT)


def stamped(lsn: int = 7, *, rows: int = 3, body: bytes = b"body!", first_id: int = 40) -> Stamped:
    made = [
        codec.encode_row(np.full(2, i, np.float32), np.empty(0, np.float32), {"answer": "x" * i})
        for i in range(rows)
    ]
    content = bytearray().join(made)
    lengths = np.array([len(row) for row in made], np.uint32)
    seals = frames.stamp_rows(content, lengths, codec.content_crcs(content, lengths), first_id)
    operation = Operation(codec.ADD, body, crc32(body), bytes(content), lengths, seals)
    return Stamped(lsn, first_id if rows else 0, operation)


def laid_out(item: Stamped, offset: int = 4096) -> tuple[bytes, bytes]:
    data, index, data_bytes, index_bytes = frames.encode(
        item, salt=SALT, epoch=5, durable_before=6, data_offset=offset
    )
    both = b"".join(map(bytes, data)), b"".join(map(bytes, index))
    assert (len(both[0]), len(both[1])) == (data_bytes, index_bytes)
    return both


def intact(data: bytes, first_id: int) -> bool:
    """What a reader checks."""
    header = frames.decode_header(data, 0, SALT_CRC)
    if header is None or header.data_bytes != len(data):
        return False
    start = frames.HEADER_BYTES
    if crc32(data[start : start + header.body_len]) != header.body_crc:
        return False
    table = frames.decode_table(data, header, 0)
    if table is None or int(table["length"].sum()) != header.rows_len:
        return False
    bare = start + header.body_len + 8 * header.row_count
    if frames.check_rows(data, bare, first_id, table) is not None:
        return False
    return not any(data[bare + header.rows_len :])


@pytest.mark.parametrize("rows", [0, 1, 3])
@pytest.mark.parametrize("body", [b"", b"1", b"12345678", b"x" * 1001])
def test_a_frame_and_its_parts(rows: int, body: bytes) -> None:
    item = stamped(rows=rows, body=body)
    data, index = laid_out(item)
    assert len(data) % 8 == len(index) % 8 == 0
    header = frames.decode_header(data, 0, SALT_CRC)
    assert header is not None
    assert header == frames.decode_header(index, 0, SALT_CRC)
    assert (header.lsn, header.durable_before, header.epoch, header.data_offset) == (7, 6, 5, 4096)
    assert (header.kind, header.flags, header.row_count) == (codec.ADD, 0, rows)
    assert header.first_id == item.first_id
    assert header.data_bytes == len(data)
    bare = frames.HEADER_BYTES + len(body) + 8 * rows
    assert len(index) == bare + -bare % 8
    assert header.rows_offset == 4096 + bare
    assert data[bare : bare + header.rows_len] == bytes(item.operation.rows)
    assert data[:bare] == index[:bare]
    assert intact(data, 40)


def test_every_changed_byte_is_noticed() -> None:
    data, _ = laid_out(stamped())
    assert intact(data, 40)
    for at in range(len(data)):
        for flip in (1, 0x80, 0xFF):
            changed = bytearray(data)
            changed[at] ^= flip
            assert not intact(bytes(changed), 40), f"byte {at}"
    for end in range(len(data)):
        assert not intact(data[:end], 40), f"cut at {end}"
        assert not intact(data[:end] + bytes(len(data) - end), 40) or not any(data[end:])


def test_a_frame_of_another_file_is_none() -> None:
    data, _ = laid_out(stamped())
    assert frames.decode_header(data, 0, crc32(b"another salt....")) is None
    assert frames.decode_header(data, 8, SALT_CRC) is None


def test_frames_are_found_behind_anything() -> None:
    data, _ = laid_out(stamped())
    noise = np.random.default_rng(0).bytes(800) + frames._MAGIC_BYTES * 3
    noise += bytes(-len(noise) % 8)
    raw = noise + data + noise
    found = frames.find_header(raw, 0, SALT_CRC)
    assert found is not None
    assert found[0] == len(noise)
    assert found[1].lsn == 7
    assert frames.find_header(raw, len(noise) + 8, SALT_CRC) is None
    assert frames.find_header(memoryview(raw), 0, SALT_CRC) == found
    assert frames.find_header(b"", 0, SALT_CRC) is None


def test_a_frame_that_a_user_stores_is_no_frame() -> None:
    """A payload may hold the bytes of a frame; it does not know the file's salt."""
    inner = b"".join(
        map(bytes, frames.encode(stamped(99), salt=bytes(16), epoch=5, durable_before=98,
                                 data_offset=0)[0])
    )  # fmt: skip
    assert frames.find_header(bytes(64) + inner, 0, SALT_CRC) is None


# ---------------------------------------------------------------- rows


def test_a_row_knows_its_id() -> None:
    item = stamped(rows=4, first_id=123)
    at = 0
    rows: list[Any] = []
    for length in item.operation.lengths.tolist():
        rows.append(bytes(item.operation.rows)[at : at + length])
        at += length
    assert [frames.check_row(row)[0] for row in rows] == [123, 124, 125, 126]  # type: ignore[index]
    assert [frames.check_row(row)[1] for row in rows] == item.operation.row_crcs.tolist()  # type: ignore[index]
    for row in rows:
        for i in range(len(row)):
            changed = bytearray(row)
            changed[i] ^= 0x10
            assert frames.check_row(changed) is None
        for end in range(len(row)):
            assert frames.check_row(row[:end]) is None
    # The right content under another row's head is no row either.
    assert frames.check_row(rows[0][:16] + rows[1][16:]) is None


def test_rows_out_of_order_are_noticed() -> None:
    item = stamped(rows=3)
    operation = item.operation
    table = np.empty(3, frames.TABLE_ENTRY)
    table["length"], table["crc"] = operation.lengths, operation.row_crcs
    rows = bytes(operation.rows)
    assert frames.check_rows(rows, 0, 40, table) is None
    assert frames.check_rows(rows, 0, None, table) is None
    assert frames.check_rows(rows, 0, 41, table) == 0
    first = int(operation.lengths[0])
    assert frames.check_rows(rows[first:], 0, 40, table[1:]) == 0
    assert frames.check_rows(rows[first:], 0, None, table[1:]) is None
    assert frames.check_rows(rows[:-1], 0, 40, table) == int(operation.lengths[:2].sum())


@pytest.mark.parametrize("n", [0, 1, 2, 50])
def test_few_rows_are_stamped_as_many_are(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = np.array([frames.ROW_HEADER_BYTES + i for i in range(n)], np.uint32)
    crcs = [crc32(bytes(i)) for i in range(n)]
    made = []
    for few in (0, 1000):
        monkeypatch.setattr(frames, "_FEW", few)
        rows = bytearray(int(lengths.sum()))
        seals = frames.stamp_rows(rows, lengths, crcs, 2**40 + 7)
        made.append((bytes(rows), seals.dtype, seals.tolist()))
    assert made[0] == made[1]


def test_the_first_damaged_of_several_rows() -> None:
    contents = [b"one" * 10, b"two" * 7, b"", b"four"]
    lengths = np.array([frames.ROW_HEADER_BYTES + len(c) for c in contents], np.uint32)
    rows = bytearray().join(bytes(frames.ROW_HEADER_BYTES) + c for c in contents)
    frames.stamp_rows(rows, lengths, [crc32(c) for c in contents], 5)
    at = [0, *np.cumsum(lengths).tolist()]
    good = [bytes(rows[begin:end]) for begin, end in pairwise(at)]
    ids = [5, 6, 7, 8]
    assert frames.first_damaged(good, ids) == -1
    assert frames.first_damaged([], []) == -1
    for i, row in enumerate(good):
        for byte in range(len(row)):
            bad = bytearray(row)
            bad[byte] ^= 4
            assert frames.first_damaged([*good[:i], bad, *good[i + 1 :]], ids) == i
        assert frames.first_damaged([*good[:i], row[:9], *good[i + 1 :]], ids) == i
    assert frames.first_damaged(good, [5, 6, 8, 7]) == 2
