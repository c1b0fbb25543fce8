"""A buffer's folder: what makes it one, what it is called, where it may lie.

expbuf.json                      identity: format, UUID, storage backend; written last at creation
migration.json                   while it is there: a buffer is being copied into the folder
control                          words shared by the processes that have it open; a cache
locks/                           lock files, used for nothing else
snapshots/  index/               see those modules
*.wal, …                         the storage adapter's own
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from expbuf_core.crc import crc32
from expbuf_core.documents import MALFORMED, read_document
from expbuf_core.errors import CorruptionError, FormatVersionError, StorageError
from expbuf_core.filesystem import FileSystem, storage_errors

IDENTITY = "expbuf.json"
UNFINISHED = "migration.json"
"""Stands in a folder that a buffer is being copied into; the copy is whole when it goes."""
CONTROL = "control"
LOCKS = "locks"
FORMAT = 1
_OWN = {CONTROL, LOCKS, "snapshots", "index"}

_NETWORK = {
    "9p", "afs", "ceph", "cifs", "fuse.ceph", "fuse.glusterfs", "fuse.s3fs", "fuse.sshfs",
    "gfs2", "glusterfs", "lustre", "ncpfs", "nfs", "nfs4", "ocfs2", "smb3", "smbfs",
}  # fmt: skip


class Identity(NamedTuple):
    """What a folder says it is."""

    uuid: bytes
    backend: str


def read_identity(folder: Path) -> Identity | None:
    """The identity of a buffer's folder; None if it has none, or is an unfinished copy.

    Raises:
        StorageError: There is a file in the place of the folder, or it cannot be read now.
        CorruptionError: The identity is damaged or cannot be read.
        FormatVersionError: A newer version wrote it.
    """
    path = folder / IDENTITY
    if folder.exists() and not folder.is_dir():
        raise StorageError(f"{folder} is a file; a buffer is a folder")
    try:
        document = read_document(path)
        if document is None:
            return None
        version = int(document["format"])
        if document["crc"] != _checksum(document):
            raise ValueError("checksum mismatch")
        identity = Identity(bytes.fromhex(document["uuid"]), str(document["backend"]))
        if len(identity.uuid) != 16:
            raise ValueError("the UUID is not 16 bytes long")
    except MALFORMED as exc:
        if (folder / UNFINISHED).exists():
            return None
        raise CorruptionError(
            f"{path}: damaged ({exc}); restore it from a backup or run `expbuf repair`",
            path=path,
            offset=0,
        ) from exc
    if (folder / UNFINISHED).exists():
        return None
    if version > FORMAT:
        raise FormatVersionError(f"{folder}: format {version}; this expbuf reads up to {FORMAT}")
    return identity


def check_new(folder: Path) -> None:
    """See that a buffer may be created here, or has been by another process by now.

    Raises:
        StorageError: The folder holds something else.
        CorruptionError: It holds a buffer whose identity is missing.
    """
    if not folder.exists():
        return
    check_finished(folder)
    with storage_errors("list", folder):
        names = set(os.listdir(folder))
    leftovers = (".wal", ".tmp", ".mdb", ".mdb-lock")
    foreign = {name for name in names - _OWN if not name.endswith(leftovers)}
    # A creation that was interrupted leaves the first log at most. More than that was a buffer.
    logs = sorted(
        name for name in names if name.startswith("experience_data.") and name.endswith(".wal")
    )
    was_one = any((folder / "snapshots").glob("*.snap")) or (
        bool(logs) and logs[-1] > "experience_data.000002.wal"
    )
    if (folder / IDENTITY).exists():  # asked last: what a creation writes last is there
        return
    if foreign:
        shown = ", ".join(sorted(foreign)[:5])
        raise StorageError(
            f"{folder} is no buffer, and holds other files ({shown}); choose a new or empty folder"
        )
    if was_one:
        raise CorruptionError(
            f"{folder}: holds the logs of a buffer, but {IDENTITY} is missing; restore it from a "
            "backup or run `expbuf repair`",
            path=folder / IDENTITY,
            offset=0,
        )


def no_buffer(folder: Path) -> StorageError:
    """The error for a folder without an identity: what it is instead."""
    if not folder.exists():
        return StorageError(f"{folder} is no buffer: there is no such folder")
    if (folder / UNFINISHED).exists():
        return _unfinished(folder)
    message = f"{folder} is no buffer: it has no {IDENTITY}"
    if any((folder / "snapshots").glob("*.snap")):
        message += ", but the rest of one; `expbuf repair` finds the identity again"
        return CorruptionError(message, path=folder / IDENTITY, offset=0)
    return StorageError(message)


def check_finished(folder: Path) -> None:
    """See that a folder is not an unfinished copy of a buffer.

    Raises:
        StorageError: It is one.
    """
    if (folder / UNFINISHED).exists():
        raise _unfinished(folder)


def _unfinished(folder: Path) -> StorageError:
    known = ""
    with contextlib.suppress(StorageError):
        known = str((read_unfinished(folder) or {}).get("command", ""))
    command = f"`{known}`" if known else "the command that began it"
    return StorageError(
        f"{folder} is no buffer yet: it is an unfinished copy of one ({UNFINISHED}). To finish it, "
        f"run {command} again. To discard it, remove the folder; the buffer that it is copied from "
        "is as it was"
    )


def read_unfinished(folder: Path) -> dict[str, Any] | None:
    """What is being copied into a folder; None where nothing is.

    Raises:
        StorageError: It cannot be read.
        CorruptionError: It is damaged.
    """
    path = folder / UNFINISHED
    try:
        note = read_document(path)
        if note is None:
            return None
        stored = note.pop("crc")
        if stored != crc32(json.dumps(note).encode()) or not isinstance(note["uuid"], str):
            raise ValueError("checksum mismatch")
    except MALFORMED as exc:
        raise CorruptionError(
            f"{path}: damaged ({exc}); remove the folder and begin the copy anew",
            path=path,
            offset=0,
        ) from exc
    return note


def write_identity(folder: Path, backend: str, uuid: bytes, fs: FileSystem) -> None:
    """Make the folder a buffer; the last step of its creation."""
    document: dict[str, Any] = {"format": FORMAT, "uuid": uuid.hex(), "backend": backend}
    document["crc"] = _checksum(document)
    with storage_errors("write", folder / IDENTITY):
        fs.write_atomically(folder / IDENTITY, [json.dumps(document, indent=1).encode()])
        fs.sync_folder(folder.parent)


def _checksum(document: Mapping[str, Any]) -> int:
    facts = [document[key] for key in ("format", "uuid", "backend")]
    return crc32(json.dumps(facts).encode())


def new_uuid() -> bytes:
    """16 random bytes."""
    return secrets.token_bytes(16)


def file_system(folder: Path) -> str:
    """Type of the file system the folder lies on, "" if unknown."""
    try:
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return ""
    target = os.path.realpath(folder)
    best, kind = "", ""
    for line in lines:
        left, _, right = line.partition(" - ")
        mount = left.split()[4].replace("\\040", " ")
        inside = target == mount or target.startswith(mount.rstrip("/") + "/")
        if inside and len(mount) >= len(best):
            best, kind = mount, right.split()[0]
    return kind


def shared_memory_is_coherent(folder: Path) -> bool:
    """Whether several processes may use the folder: mapped pages and locks work across them."""
    return file_system(folder) not in _NETWORK
