"""Snapshots: the columns of a replica after exactly one LSN, in one checksummed file.

    magic, version, tree crc, tree bytes, uuid, header crc | tree (JSON) | columns

The tree names each column with its dtype, length and checksum. Payloads are not in it: they stay in
the log they were written to, so a snapshot costs O(columns). A file appears under its name whole
and durable or not at all; the newest two are kept, so that damage to one loses nothing.
"""

from __future__ import annotations

import contextlib
import os
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from expbuf_core import codec
from expbuf_core.crc import crc32
from expbuf_core.errors import CorruptionError, FormatVersionError, StorageError
from expbuf_core.exact_search import METRICS
from expbuf_core.filesystem import (
    FileSystem,
    is_missing,
    names_in,
    read_file,
    remove,
    storage_errors,
)
from expbuf_core.state import COLUMNS, REEMBEDDED, REEMBEDDED_COLUMNS, State

FOLDER = "snapshots"
_MAGIC = b"EXPBUFS1"
_VERSION = 1
_HEADER = struct.Struct("<8sIIQ16sI")  # magic, version, tree crc, tree bytes, uuid, header crc
_COVERED = _HEADER.size - 4
_NAME = re.compile(r"snapshot\.(\d{20})\.snap")
KEPT = 2
_MOST = 1 << 62  # as the configuration allows, of rows and of what is kept besides
_MOST_DIM = 1 << 20
_KNOWN = {*COLUMNS, *(REEMBEDDED + name for name in REEMBEDDED_COLUMNS)}


def path_of(folder: Path, lsn: int) -> Path:
    """Name of the snapshot at `lsn`."""
    return folder / FOLDER / f"snapshot.{lsn:020d}.snap"


def available(folder: Path) -> list[int]:
    """LSNs of the snapshots that exist, newest first.

    Raises:
        CorruptionError: Their folder cannot be read.
    """
    names = names_in(folder / FOLDER)
    return sorted((int(m[1]) for name in names if (m := _NAME.fullmatch(name))), reverse=True)


def write(
    folder: Path,
    uuid: bytes,
    tree: dict[str, Any],
    columns: dict[str, NDArray[Any]],
    fs: FileSystem,
) -> Path:
    """Write a snapshot, read it back, and only then let it appear under its name.

    Args:
        folder: Of the buffer.
        uuid: Of the buffer.
        tree: As `State.dump` makes it.
        columns: As `State.dump` makes them; O(columns) bytes are written.
        fs: Writes.

    Raises:
        StorageError: It could not be written; the older snapshots stand.
    """
    described = {
        name: [column.dtype.str, len(column), crc32(column.tobytes())]
        for name, column in columns.items()
    }
    text = codec.dump_json({**tree, "columns": described})
    head = _HEADER.pack(_MAGIC, _VERSION, crc32(text), len(text), uuid, 0)[:_COVERED]
    path = path_of(folder, tree["lsn"])

    def chunks() -> Iterator[bytes]:
        yield head + struct.pack("<I", crc32(head))
        yield text
        for column in columns.values():
            yield column.tobytes()

    with storage_errors("write the snapshot", path):
        fs.mkdir(path.parent)
        # A folder whose name a power loss takes, takes the snapshots along; and a process that was
        # killed may have made it without coming to this.
        fs.sync_folder(folder)
        fs.write_atomically(path, chunks())
    read(folder, tree["lsn"], uuid)
    return path


def read(folder: Path, lsn: int, uuid: bytes) -> State:
    """Load a snapshot.

    Raises:
        CorruptionError: Any byte of it is not what was written, or cannot be read.
        FormatVersionError: A newer version wrote it.
    """
    path = path_of(folder, lsn)

    def read_part(start: int, most: int) -> bytes:
        with storage_errors("read the snapshot", path):
            return read_file(path, start, most)

    def damaged(what: str, offset: int) -> CorruptionError:
        return CorruptionError(
            f"{FOLDER}/{path.name}: {what} at offset {offset}; the snapshot before it and the log "
            "are used instead where they suffice. Run `expbuf verify`",
            path=path,
            offset=offset,
            lsn=lsn,
        )

    head = read_part(0, _HEADER.size)
    if len(head) < _HEADER.size:
        raise damaged("the file was cut", len(head))
    magic, version, tree_crc, tree_bytes, owner, head_crc = _HEADER.unpack(head)
    if head_crc != crc32(head[:_COVERED]) or magic != _MAGIC:
        raise damaged("checksum mismatch in the header", 0)
    if version > _VERSION:
        raise FormatVersionError(f"{path.name}: snapshot version {version}; known: {_VERSION}")
    if owner != uuid:
        raise damaged("the snapshot of another buffer", 24)
    text = read_part(_HEADER.size, tree_bytes)
    if len(text) != tree_bytes or crc32(text) != tree_crc:
        raise damaged("checksum mismatch in the tree", _HEADER.size)
    try:
        tree = codec.load_json(text)
        start, at = _HEADER.size + tree_bytes, 0
        view = memoryview(read_part(start, column_bytes(tree) + 1))
        columns: dict[str, NDArray[Any]] = {}
        for name, (dtype, n, crc) in tree["columns"].items():
            if name not in _KNOWN:
                raise FormatVersionError(f"{path.name}: unknown column {name!r}")
            size = np.dtype(dtype).itemsize * n
            if at + size > len(view) or crc32(view[at : at + size]) != crc:
                raise damaged(f"checksum mismatch in column {name!r}", start + at)
            columns[name] = np.frombuffer(view[at : at + size], dtype)
            at += size
        if at != len(view):
            raise damaged("bytes behind the end", start + at)
        if tree["lsn"] != lsn:
            raise damaged(f"the snapshot of lsn {tree['lsn']} under this name", 0)
        return state_of(tree, columns)
    except codec.UNDECODABLE as exc:
        raise damaged(f"a tree that makes no sense ({exc!r})", _HEADER.size) from exc


def column_bytes(tree: dict[str, Any]) -> int:
    """Bytes of all columns, by what an intact tree says: no file of a snapshot is longer.

    Raises:
        ValueError: It makes no sense; or another of `codec.UNDECODABLE`.
    """
    sizes = [np.dtype(dtype).itemsize * n for dtype, n, _ in tree["columns"].values()]
    return int(sum(sizes))


def state_of(tree: dict[str, Any], columns: dict[str, NDArray[Any]]) -> State:
    """The state that a tree and its columns tell of.

    A right checksum says that they are what was written, and not that it made sense.

    Raises:
        ValueError: It does not; or another of `codec.UNDECODABLE`.
    """
    for name in ("next_id", "reserved_id", "reserved_lsn", "total_added", "receipts_horizon"):
        _check_number(name, tree[name])
    n = len(columns["id"])
    for name, kind in COLUMNS.items():
        if (columns[name].dtype, len(columns[name])) != (np.dtype(kind), n):
            raise ValueError(f"column {name!r}: {columns[name].dtype}, {len(columns[name])} rows")
    ids = columns["id"]
    if n and not (ids[0] >= 0 and (np.diff(ids) > 0).all() and ids[-1] < tree["next_id"]):
        raise ValueError(f"ids that do not rise up to next_id = {tree['next_id']}")
    if not set(np.unique(columns["tags"]).tolist()) <= {0, *map(int, tree["tag_sets"])}:
        raise ValueError("tags without their names")
    for _, lsn in tree["receipts"]:
        _check_number("a receipt", lsn)
    for named in tree["rewards"].values():
        if not all(type(value) in (int, float) for value in named.values()):
            raise ValueError("rewards that are no numbers")
    if tree["lsn"]:
        _check_settings(tree["settings"])
    return State.load(tree, columns)


def _check_settings(settings: dict[str, Any]) -> None:
    for name in ("max_size", "receipts_kept"):
        _check_number(name, settings[name], 1, _MOST)
    if settings["metric"] not in METRICS:
        raise ValueError(f"metric = {settings['metric']!r}")
    _check_number("representation", settings.get("representation", 0), 0, 1 << 31)
    for name in ("v_dim", "q_dim"):
        if settings.get(name) is not None:
            _check_number(name, settings[name], 0, _MOST_DIM)
    if "fusion" in settings:
        fusion = settings["fusion"]
        _check_number("fusion.version", fusion["version"], -_MOST, _MOST)
        if not (isinstance(fusion["name"], str) and isinstance(fusion["settings"], dict)):
            raise ValueError(f"fusion = {fusion}")


def _check_number(name: str, value: Any, least: int = 0, most: int = (1 << 63) - 1) -> None:
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{name} = {value!r}; expected {least} to {most}")


def newest(folder: Path, uuid: bytes) -> tuple[State | None, list[CorruptionError]]:
    """The newest snapshot that is intact, and what is wrong with newer ones.

    Returns:
        The state (None if there is no intact snapshot), errors of those that were passed over.
    """
    errors: dict[int, CorruptionError] = {}
    try:
        while lsns := [lsn for lsn in available(folder) if lsn not in errors]:
            try:
                return read(folder, lsns[0], uuid), list(errors.values())
            except CorruptionError as exc:
                errors[lsns[0]] = exc
            except StorageError as exc:
                if not is_missing(exc):
                    raise
                # Dropped since it was listed: there are newer ones.
    except CorruptionError as exc:  # their folder; the log may do without
        return None, [*errors.values(), exc]
    return None, list(errors.values())


def make_room(folder: Path, uuid: bytes, fs: FileSystem) -> bool:
    """On a full disk: drop all but the newest snapshot; False if that is not intact, or all."""
    lsns = available(folder)
    if len(lsns) < 2:
        return False
    try:
        read(folder, lsns[0], uuid)
    except StorageError:
        return False
    drop_old(folder, fs, keep=1)
    return True


def drop_old(folder: Path, fs: FileSystem, keep: int = KEPT) -> int:
    """Remove all but the newest snapshots; the LSN of the oldest that is left (0: none)."""
    lsns = available(folder)
    for lsn in lsns[keep:]:
        remove(path_of(folder, lsn), fs)
    with contextlib.suppress(OSError):
        for name in os.listdir(folder / FOLDER):
            if name.endswith(".tmp") and f".{os.getpid()}." not in name:
                fs.unlink(folder / FOLDER / name)
    return lsns[:keep][-1] if lsns else 0
