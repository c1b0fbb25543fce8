"""Names, constants and small records. FORMAT.md explains them."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import NamedTuple

from expbuf_core.contracts import Buffer
from expbuf_core.crc import crc32
from expbuf_core.errors import CorruptionError, FormatVersionError

DATA = "log.mdb"
STAGE = "stage.wal"
LOCK = "log.mdb-lock"  # LMDB's own; it holds nothing that outlives its users
TRANSACTION = "transaction"  # in `locks/`: who writes to LMDB
VERSION = 1

# Databases in the environment.
META = b"meta"
OPERATIONS = b"operations"  # LSN -> frame without rows
ROWS = b"rows"  # location -> row
DATABASES = 3

# Words shared between processes. (a) written under the append lock; (w) in LMDB's writer lock.
GENERATION = 0  # (a) of the stage; 0 while it is being begun anew
END = 1  # (a) where the next frame goes in the stage
BASE = 2  # (a) a frame at `offset` of the stage has the address BASE + offset
LAST = 3  # (a) last LSN appended
STORED = 4  # (w) an LSN up to which LMDB has everything; never more than it has
DRAINED = 5  # (w) offset in the stage up to where LMDB has everything; a hint

LARGEST = (1 << 63) - 1  # of LSNs and locations
_KEY = struct.Struct(">Q")
_CRC = struct.Struct("<I")


def key(number: int) -> bytes:
    """An LSN or a location as a key: they sort as they count."""
    return _KEY.pack(number)


def number(raw: bytes) -> int:
    """The inverse of `key`.

    Raises:
        ValueError: It is no such key.
    """
    if len(raw) != _KEY.size:
        raise ValueError(f"a key of {len(raw)} bytes")
    (value,) = _KEY.unpack(raw)
    if value > LARGEST:
        raise ValueError(f"a key that is too large, {value}")
    return int(value)


def corrupt(
    path: Path, message: str, *, lsn: int | None = None, offset: int | None = None
) -> CorruptionError:
    """The error for bytes that are not what was written."""
    return CorruptionError(
        f"{path.name}: {message}; nothing was changed. Run `expbuf verify`",
        path=path,
        lsn=lsn,
        offset=offset,
    )


# ---------------------------------------------------------------- records in `meta`

HEADER_KEY = b"header"
STATE_KEY = b"state"
BEGIN_PREFIX = b"begin"

HEADER_MAGIC = b"EXPBUFM1"
_HEADER = struct.Struct("<8sI4x16s16s")  # magic, version, uuid, salt | crc
_STATE = struct.Struct("<QQQ")  # floor, address, generation | salted crc
_BEGIN = struct.Struct("<QQ")  # lsn, previous | salted crc


class State(NamedTuple):
    """What the tables do not say by themselves.

    Attributes:
        floor: Operations up to this LSN were dropped, or never were.
        address: No frame that is still to come may lie below.
        generation: A stage older than this counts for nothing.
    """

    floor: int
    address: int
    generation: int


def _sealed(raw: bytes, salt: bytes = b"") -> bytes:
    return raw + _CRC.pack(crc32(raw, crc32(salt)))


def _opened(raw: bytes, form: struct.Struct, salt: bytes = b"") -> bytes | None:
    if len(raw) != form.size + 4 or raw != _sealed(raw[:-4], salt):
        return None
    return raw[:-4]


def encode_header(uuid: bytes, salt: bytes) -> bytes:
    """The record that says whose environment this is."""
    return _sealed(_HEADER.pack(HEADER_MAGIC, VERSION, uuid, salt))


HEADER_RECORD_BYTES = _HEADER.size + 4


def peek_header(raw: bytes) -> tuple[bytes, bytes] | None:
    """UUID and salt in a record that lies anywhere; None if it is damaged."""
    inner = _opened(raw, _HEADER)
    if inner is None:
        return None
    _, _, uuid, salt = _HEADER.unpack(inner)
    return uuid, salt


def decode_header(raw: bytes | None, path: Path, uuid: bytes) -> bytes:
    """Check the record and return the salt.

    Raises:
        CorruptionError: It is damaged, or belongs to another buffer.
        FormatVersionError: A newer version wrote it.
    """
    inner = _opened(raw, _HEADER) if raw is not None else None
    if inner is None:
        raise corrupt(path, "the record `header` is missing or damaged")
    magic, version, owner, salt = _HEADER.unpack(inner)
    if magic != HEADER_MAGIC or version > VERSION:
        raise FormatVersionError(
            f"{path.name}: format {magic!r} version {version}; this expbuf reads version {VERSION}"
        )
    if owner != uuid:
        raise corrupt(path, "it belongs to another buffer; it was copied or renamed")
    return bytes(salt)


def encode_state(state: State, salt: bytes) -> bytes:
    """See `State`."""
    return _sealed(_STATE.pack(*state), salt)


def decode_state(raw: bytes | None, path: Path, salt: bytes) -> State:
    """The inverse of `encode_state`.

    Raises:
        CorruptionError: It is damaged.
    """
    inner = _opened(raw, _STATE, salt) if raw is not None else None
    if inner is None:
        raise corrupt(path, "the record `state` is missing or damaged")
    return State(*_STATE.unpack(inner))


BEGIN_RECORD_BYTES = _BEGIN.size + 4


def begin_key(lsn: int) -> bytes:
    """Key of the record that says that the log began anew at `lsn`."""
    return BEGIN_PREFIX + key(lsn)


def encode_begin(lsn: int, previous: int, salt: bytes) -> bytes:
    """The log goes on at `lsn` behind `previous`; the LSNs between were left out."""
    return _sealed(_BEGIN.pack(lsn, previous), salt)


def decode_begin(raw: bytes | None, lsn: int, salt: bytes) -> int | None:
    """The LSN before `lsn`, or None if there is no such record, or a damaged one."""
    inner = _opened(raw, _BEGIN, salt) if raw is not None else None
    if inner is None:
        return None
    stored, previous = _BEGIN.unpack(inner)
    return int(previous) if stored == lsn else None


# ---------------------------------------------------------------- the stage

STAGE_HEADER_BYTES = 4096  # frames begin behind it
_STAGE_MAGIC = b"EXPBUFS1"
# magic, version, uuid, salt, generation, base, last LSN before it, size | crc
_STAGE_HEADER = struct.Struct("<8sI4x16s16sQQQQ")


class StageHeader(NamedTuple):
    """The first page of the stage.

    Attributes:
        uuid: Of the buffer.
        salt: Of the environment.
        generation: Rises each time it is begun anew; also the epoch of its frames.
        base: A frame at `offset` has the address base + offset.
        last_lsn: Everything up to here was in LMDB when it was begun anew.
        size: Of the file.
    """

    uuid: bytes
    salt: bytes
    generation: int
    base: int
    last_lsn: int
    size: int


def encode_stage_header(header: StageHeader) -> bytes:
    """The first page without the zeros that fill it."""
    return _sealed(_STAGE_HEADER.pack(_STAGE_MAGIC, VERSION, *header))


def decode_stage_header(raw: Buffer, path: Path) -> StageHeader | None:
    """The inverse; None if it is damaged.

    Raises:
        FormatVersionError: A newer version wrote it.
    """
    inner = _opened(bytes(raw[: _STAGE_HEADER.size + 4]), _STAGE_HEADER)
    if inner is None:
        return None
    magic, version, *fields = _STAGE_HEADER.unpack(inner)
    if magic != _STAGE_MAGIC or version > VERSION:
        raise FormatVersionError(
            f"{path.name}: format {magic!r} version {version}; this expbuf reads version {VERSION}"
        )
    return StageHeader(*fields)
