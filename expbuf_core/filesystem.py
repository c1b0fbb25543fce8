"""All writing to a buffer's folder goes through `FileSystem`: one place to record or fail it.

Reading does not; it needs no order and no permission beyond the file's own. But what it cannot read
is told apart here: damage, or a trouble of the moment.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import stat
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import TracebackType

from expbuf_core.errors import CorruptionError, StorageError, StorageFull

_FULL = {  # and what to do about it
    errno.ENOSPC: "free some room and try again",
    errno.EDQUOT: "free some room within the quota and try again",
    errno.EFBIG: "files may not be so large here: raise the limit (`ulimit -f`) and try again",
}
# The disk gives no more what was written, or something else stands in its place. All other errors
# (too many open files, too little memory, no permission) say nothing of what is stored.
_DAMAGE = {
    errno.EIO, errno.EUCLEAN, errno.EBADMSG, errno.EISDIR, errno.ENOTDIR, errno.ELOOP,
}  # fmt: skip
_IOV_MAX = 512
SECTOR = 512
_SOME_BYTES = 1 << 12
_UNBOUNDED = 1 << 62
_PACE_BYTES = 2 << 20  # of a file written aside, between two syncs

Buffer = bytes | bytearray | memoryview


def _sync_file_range() -> Callable[[int, int, int, int], int] | None:
    """Linux's call of this name, which Python lacks; None elsewhere."""
    try:
        function = ctypes.CDLL(None).sync_file_range
    except (OSError, AttributeError):
        return None
    function.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    return function


_SYNC_FILE_RANGE = _sync_file_range()
_SYNC_FILE_RANGE_WRITE = 2


class storage_errors:
    """Turn an OSError into a `StorageError` that says what was tried, on which file."""

    __slots__ = ("path", "what")

    def __init__(self, what: str, path: str | os.PathLike[str]) -> None:
        self.what = what
        self.path = path

    def __enter__(self) -> None:
        return None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not isinstance(exc, OSError) or isinstance(exc, StorageError):
            return
        advice = _FULL.get(exc.errno or 0)
        message = f"cannot {self.what} {os.fspath(self.path)}: {exc.strerror or exc}"
        error = StorageError(message) if advice is None else StorageFull(f"{message}; {advice}")
        error.errno = exc.errno
        raise error from exc


def open_for_good(path: str | os.PathLike[str], flags: int) -> int:
    """`os.open` of what stays open, never as a standard stream.

    A program that has closed its standard output goes on printing: not into a log.
    """
    fd = os.open(path, flags | os.O_CLOEXEC, 0o666)
    if fd > 2:
        return fd
    try:
        return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3)
    finally:
        os.close(fd)


class reading(storage_errors):
    """The same for reading at an offset: what cannot be read for good is a `CorruptionError`."""

    __slots__ = ("offset",)

    def __init__(
        self, path: str | os.PathLike[str], offset: int | None = 0, what: str = "read"
    ) -> None:
        super().__init__(what, path)
        self.offset = offset

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if isinstance(exc, OSError) and not isinstance(exc, StorageError) and is_damage(exc):
            where = f" at offset {self.offset}" if self.offset else ""
            damaged = CorruptionError(
                f"cannot {self.what} {os.fspath(self.path)}{where}: {exc.strerror}; run `expbuf "
                "verify`",
                path=self.path,
                offset=self.offset,
            )
            damaged.errno = exc.errno
            raise damaged from exc
        super().__exit__(kind, exc, trace)


def is_damage(exc: BaseException | None) -> bool:
    """Whether an error says that what is stored there cannot be read, now or later."""
    return isinstance(exc, OSError) and exc.errno in _DAMAGE


def is_missing(exc: BaseException) -> bool:
    """Whether an error, or what caused it, says that there is no such file."""
    return isinstance(exc, FileNotFoundError) or isinstance(exc.__cause__, FileNotFoundError)


def open_to_read(path: Path) -> int:
    """Open a file for reading, without waiting for anybody: what stands there may be a FIFO.

    Raises:
        CorruptionError: What stands there is no file.
        OSError: It is missing, or cannot be opened now.
    """
    try:
        fd = open_for_good(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError as exc:
        if is_missing(exc) and path.is_symlink():
            # Its name is there, and stays: who lists the folder again meets it again.
            raise _no_file(path, "a link to nothing") from None  # it is not what is missing
        if not is_damage(exc):
            raise
        with reading(path, what="open"):
            raise
    if is_plain(fd):
        return fd
    os.close(fd)
    raise _no_file(path, "something else")


def _no_file(path: Path, what: str) -> CorruptionError:
    return CorruptionError(
        f"{path}: {what} stands in the place of a file; run `expbuf verify`", path=path, offset=0
    )


def is_plain(fd: int) -> bool:
    """Whether what was opened is a file, and no folder, FIFO or device."""
    return stat.S_ISREG(os.fstat(fd).st_mode)


def read_file(path: Path, start: int = 0, most: int = _UNBOUNDED) -> bytes:
    """What stands in a file from `start` on.

    Args:
        path: Of the file.
        start: Offset of the first byte.
        most: Read no more bytes than these. The size of a damaged file says nothing: it may be
            beyond all memory.

    Raises:
        CorruptionError: It cannot be read, or is no file; the offset is that of the first byte.
        OSError: It is missing, or cannot be read now.
    """
    fd = open_to_read(path)
    parts: list[bytes] = []
    at, size, end = start, os.fstat(fd).st_size, start + most
    try:
        while part := os.pread(fd, min(max(size - at, _SOME_BYTES), end - at), at):
            parts.append(part)
            at += len(part)
    except OSError as exc:
        if not is_damage(exc):
            raise
        with reading(path, first_unreadable(fd, at)):
            raise
    finally:
        os.close(fd)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def read_if_there(path: Path, most: int = _UNBOUNDED) -> bytes | None:
    """All of a file, up to so many bytes; None where it is missing.

    Raises:
        CorruptionError: It cannot be read, or is no file.
        StorageError: It cannot be read now.
    """
    try:
        with storage_errors("read", path):
            return read_file(path, most=most)
    except StorageError as exc:
        if is_missing(exc):
            return None
        raise


def first_unreadable(fd: int, offset: int = 0) -> int:
    """Where, at or behind an offset, a file cannot be read; its end if it can."""
    offset -= offset % SECTOR
    with contextlib.suppress(OSError):
        while os.pread(fd, SECTOR, offset):
            offset += SECTOR
    return offset


def names_in(folder: Path) -> list[str]:
    """Names in a folder; none where it is missing.

    Raises:
        CorruptionError: It cannot be listed, or is no folder.
        StorageError: It cannot be listed now.
    """
    try:
        with reading(folder, what="list"):
            return os.listdir(folder)
    except StorageError as exc:
        if is_missing(exc):
            return []
        raise


def remove(path: Path, fs: FileSystem) -> None:
    """Remove what stands under a name of ours; a folder only if nothing is in it."""
    if path.is_dir() and not path.is_symlink():
        with contextlib.suppress(OSError):
            path.rmdir()
    else:
        with storage_errors("remove", path):
            fs.unlink(path)


class FileSystem:
    """The real file system. A test subclasses it to record writes, or to make them fail."""

    def open(self, path: Path, *, create: bool = False, exclusive: bool = False) -> int:
        """Open for reading and writing."""
        flags = os.O_RDWR
        if create or exclusive:
            flags |= os.O_CREAT
        if exclusive:
            flags |= os.O_EXCL
        return open_for_good(path, flags)

    def close(self, fd: int) -> None:
        """Close what `open` returned."""
        os.close(fd)

    def pwrite(self, fd: int, data: Buffer, offset: int) -> None:
        """Write all of it, or raise."""
        view = memoryview(data).cast("B")
        done = 0
        while done < len(view):
            done += os.pwrite(fd, view[done:], offset + done)

    def pwritev(self, fd: int, parts: Sequence[Buffer], offset: int) -> None:
        """Write all parts one behind the other, or raise."""
        total = sum(map(len, parts))
        if len(parts) <= _IOV_MAX and os.pwritev(fd, parts, offset) == total:
            return
        # Too many parts, or a short write (a full disk, a signal): say again what must stand there.
        self.pwrite(fd, b"".join(parts), offset)

    def allocate(self, fd: int, size: int) -> None:
        """Reserve room for a file, so that a full disk cannot stop writes into it."""
        os.posix_fallocate(fd, 0, size)

    def truncate(self, fd: int, size: int) -> None:
        """Set the size of a file that no other process has seen."""
        os.ftruncate(fd, size)

    def start_writing(self, fd: int, offset: int, length: int) -> None:
        """Let these bytes be on their way to the disk when they are synced; only a hint.

        What the caller does until then costs no time of its own. Errors are left to the sync.
        """
        if _SYNC_FILE_RANGE is not None:
            _SYNC_FILE_RANGE(fd, offset, length, _SYNC_FILE_RANGE_WRITE)

    def fdatasync(self, fd: int) -> None:
        """Make a file's bytes durable."""
        os.fdatasync(fd)

    def fsync(self, fd: int) -> None:
        """Make a file's bytes and its inode durable."""
        os.fsync(fd)

    def replace(self, source: Path, target: Path) -> None:
        """Rename atomically; durable only after `sync_folder`."""
        os.replace(source, target)

    def unlink(self, path: Path) -> None:
        """Remove a name; nothing happens where it is gone already."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)

    def mkdir(self, path: Path) -> None:
        """Make a folder with its parents; durable only after `sync_folder` of the parent."""
        os.makedirs(path, exist_ok=True)

    def sync_folder(self, path: Path) -> None:
        """Make the names in a folder durable."""
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def write_atomically(self, path: Path, chunks: Iterable[Buffer]) -> None:
        """Let a file appear under its name whole and durable, or not at all.

        A large one is synced as it grows: else the commits of others would wait for all of it.
        """
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        fd = self.open(temporary, create=True)
        try:
            try:
                self.truncate(fd, 0)
                offset = synced = 0
                for chunk in chunks:
                    view = memoryview(chunk).cast("B")
                    for at in range(0, len(view), _PACE_BYTES):
                        part = view[at : at + _PACE_BYTES]
                        self.pwrite(fd, part, offset)
                        offset += len(part)
                        if offset - synced >= _PACE_BYTES:
                            self.fdatasync(fd)
                            synced = offset
                self.fsync(fd)
            finally:
                self.close(fd)
            self.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                self.unlink(temporary)
            raise
        self.sync_folder(path.parent)
