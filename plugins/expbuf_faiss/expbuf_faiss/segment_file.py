"""The bytes of a segment file; FORMAT.md specifies them.

FAISS maps an index only from the beginning of a file, so what we add stands behind it.
"""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from expbuf_core.crc import crc32
from expbuf_core.errors import CorruptionError, FormatVersionError
from expbuf_core.filesystem import open_to_read, reading

MAGIC = b"EXPBFSG1"
VERSION = 1
# magic, version, bytes of the facts, bytes of FAISS, rows, dim, CRC-32 of FAISS and of the facts
TRAILER = struct.Struct("<8sIIQQIII")
CRC = struct.Struct("<I")
TRAILER_BYTES = TRAILER.size + CRC.size
_CHUNK = 1 << 20


def finish(path: Path, rows: int, dim: int, facts: dict[str, Any]) -> None:
    """Append facts and trailer to what FAISS wrote, or to nothing."""
    encoded = json.dumps(facts, separators=(",", ":"), sort_keys=True).encode()
    with path.open("a+b") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        trailer = TRAILER.pack(
            MAGIC, VERSION, len(encoded), size, rows, dim, _crc(file, size), crc32(encoded)
        )
        file.write(encoded + trailer + CRC.pack(crc32(trailer)))


class Content(NamedTuple):
    """What stands in a file: how many bytes of FAISS, the facts, and the CRC-32 of all of it."""

    index_bytes: int
    facts: dict[str, Any]
    crc: int


def check(path: Path, rows: int, dim: int) -> Content:
    """Verify every byte.

    FAISS believes what it reads: it crashes, or answers wrongly, if bytes have changed.

    Raises:
        CorruptionError: The file is not what was written, or belongs to other vectors.
        FormatVersionError: A newer version wrote it.
    """
    with reading(path), open(open_to_read(path), "rb") as file:
        size = file.seek(0, os.SEEK_END)
        if size < TRAILER_BYTES:
            raise _damaged(path, 0, f"{size} bytes, at least {TRAILER_BYTES} expected")
        start = file.seek(size - TRAILER_BYTES)
        trailer, stored = file.read(TRAILER.size), file.read(CRC.size)
        if trailer[: len(MAGIC)] != MAGIC or CRC.unpack(stored)[0] != crc32(trailer):
            raise _damaged(path, start, "no valid trailer; the file is cut or overwritten")
        _, version, facts_bytes, index_bytes, *found, index_crc, facts_crc = TRAILER.unpack(trailer)
        if version != VERSION:
            raise FormatVersionError(
                f"{path}: segment format {version}; this version reads {VERSION}; "
                "the index can be built again"
            )
        if index_bytes + facts_bytes != start:
            raise _damaged(path, start, f"{start} bytes before the trailer, which says otherwise")
        if found != [rows, dim]:
            raise _damaged(path, start, f"holds (rows, dim) {found}; {[rows, dim]} expected")
        file.seek(0)
        if _crc(file, index_bytes) != index_crc:  # also brings the file into the page cache
            raise _damaged(path, 0, "checksum of the index does not match")
        encoded = file.read(facts_bytes)
        if crc32(encoded) != facts_crc:
            raise _damaged(path, index_bytes, "checksum of the facts does not match")
    crc = crc32(encoded + trailer + stored, index_crc)
    return Content(index_bytes, json.loads(encoded), crc)


def _crc(file: BinaryIO, size: int) -> int:
    crc = 0
    while size > 0:
        chunk = file.read(min(size, _CHUNK))
        if not chunk:
            return -1
        crc = crc32(chunk, crc)
        size -= len(chunk)
    return crc


def _damaged(path: Path, offset: int, what: str) -> CorruptionError:
    return CorruptionError(
        f"{path}: {what}; the index has to be built again", path=path, offset=offset
    )
