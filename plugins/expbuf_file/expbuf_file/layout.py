"""Names and headers of the log files: constants and little else. FORMAT.md explains them."""

from __future__ import annotations

import os
import re
import struct
from pathlib import Path
from typing import NamedTuple

from expbuf_core.crc import crc32
from expbuf_core.errors import CorruptionError, FormatVersionError
from expbuf_core.filesystem import reading, storage_errors

DATA = "experience_data"
INDEX = "index_operations"
_NAME = re.compile(rf"({DATA}|{INDEX})\.(\d{{6,12}})\.wal")

HEADER_BYTES = 4096  # frames begin behind a page of their own, which is never written again
VERSION = 1
_MAGIC = b"EXPBUFL1"
# magic, version, log (0 data, 1 index), number, size, uuid, salt, flags | crc
_HEADER = struct.Struct("<8sIIQQ16s16sQ")
BORN_IN_USE = 1  # flag: the file appeared with its LOG_BEGIN frame in it
_CRC = struct.Struct("<I")

# Where a log file continues another: file, end offset, last LSN. Body of the LOG_BEGIN frame.
BEGIN_BODY = struct.Struct("<QQQ")
# Which file comes next (0: closed cleanly). Body of the LOG_END frame.
END_BODY = struct.Struct("<Q")
END_BYTES = 80

OFFSET_BITS = 40  # a location is number << 40 | offset
MAX_FILE_BYTES = 1 << OFFSET_BITS


class FileHeader(NamedTuple):
    """What the first page of a log file says."""

    log: int
    number: int
    size: int
    uuid: bytes
    salt: bytes
    flags: int


def path_of(folder: Path, log: str, number: int) -> Path:
    """Name of a log file."""
    return folder / f"{log}.{number:06d}.wal"


def numbers(folder: Path, log: str) -> list[int]:
    """Numbers of the log files that exist, rising."""
    found = []
    with storage_errors("list", folder):
        names = os.listdir(folder)
    for name in names:
        match = _NAME.fullmatch(name)
        if match and match[1] == log:
            found.append(int(match[2]))
    return sorted(found)


def encode_header(header: FileHeader) -> bytes:
    """The first page."""
    raw = _HEADER.pack(_MAGIC, VERSION, *header)
    return (raw + _CRC.pack(crc32(raw))).ljust(HEADER_BYTES, b"\0")


def read_header(fd: int, path: Path, uuid: bytes | None) -> FileHeader:
    """Read and check the first page.

    Args:
        fd: Of the file.
        path: Of the file.
        uuid: Of the buffer; None: of whatever buffer it is.

    Raises:
        CorruptionError: It is damaged, cannot be read, or belongs to another buffer.
        FormatVersionError: A newer version wrote it.
    """
    with reading(path):
        raw = os.pread(fd, HEADER_BYTES, 0)
    end = _HEADER.size
    if len(raw) < HEADER_BYTES:
        raise CorruptionError(
            f"{path.name}: {len(raw)} bytes; a log file has at least {HEADER_BYTES}; the file was "
            "cut. Run `expbuf verify`",
            path=path,
            offset=len(raw),
        )
    (stored,) = _CRC.unpack_from(raw, end)
    magic, version, log, number, size, owner, salt, flags = _HEADER.unpack_from(raw)
    if stored != crc32(raw[:end]):
        raise CorruptionError(
            f"{path.name}: checksum mismatch in the file header (offset 0): stored {stored:08x}, "
            f"computed {crc32(raw[:end]):08x}; run `expbuf verify`",
            path=path,
            offset=0,
        )
    if behind := raw[end + 4 :].lstrip(b"\0"):
        at = HEADER_BYTES - len(behind)
        raise CorruptionError(
            f"{path.name}: byte {behind[0]:#04x} at offset {at}, where only zeros are behind the "
            "header; run `expbuf verify`",
            path=path,
            offset=at,
        )
    if magic != _MAGIC or version > VERSION:
        raise FormatVersionError(
            f"{path.name}: log format {magic!r} version {version}; this expbuf reads version "
            f"{VERSION}"
        )
    names = [path_of(path.parent, each, number).name for each in (DATA, INDEX)]
    if owner != (uuid or owner) or path.name not in names[log : log + 1]:
        raise CorruptionError(
            f"{path.name}: belongs to another buffer or place (number {number}); it was copied or "
            "renamed",
            path=path,
            offset=0,
        )
    return FileHeader(log, number, size, owner, salt, flags)
