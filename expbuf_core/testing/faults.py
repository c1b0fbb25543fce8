"""A file system that fails on request, and bytes that cannot be read, as with disks and kernels."""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import math
import os
import stat
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from expbuf_core.filesystem import Buffer, FileSystem
from expbuf_core.testing.recording import RecordingFileSystem

_WRITES = frozenset({"pwrite", "truncate", "allocate"})
_SYNCS = frozenset({"fdatasync", "fsync"})
_NAMES = frozenset({"create", "replace", "unlink", "mkdir"})
_MUTATIONS = _WRITES | _SYNCS | _NAMES | {"sync_folder"}


@dataclass
class Fault:
    """A rule of a `FaultyFileSystem`.

    Attributes:
        calls: Names of the calls that it concerns. "create" is an `open` that makes a file, "open"
            any other; "pwrite" stands for `pwritev` too.
        error: The errno.
        nth: The first call that fails, counted from 1 when the fault is set; each call that the
            fault concerns counts.
        times: How many calls fail; None: all from then on.
        path: Pattern of the name (not the folder) of the file.
        partial: For "pwrite": the part of the bytes that is written nonetheless, 0 to 1.
        drop: For syncs: what was not synced is really lost, as when the kernel forgets the pages.
        seen: Calls so far.
    """

    calls: frozenset[str]
    error: int
    nth: int = 1
    times: int | None = 1
    path: str = "*"
    partial: float = 0.0
    drop: bool = False
    seen: int = 0

    def strikes(self, call: str, name: str) -> bool:
        """Count a call, and say whether it fails."""
        if call not in self.calls or not fnmatch.fnmatch(name, self.path):
            return False
        self.seen += 1
        return self.seen >= self.nth and (self.times is None or self.seen < self.nth + self.times)


@contextlib.contextmanager
def unreadable(
    path: Path, offset: int = 0, length: int = 1 << 62, error: int = errno.EIO
) -> Iterator[None]:
    """Let this process get an error where it reads these bytes of a file; short reads before them.

    That is where it reads by `os.pread` or `os.preadv`, as logs and snapshots are read.
    """
    found = path.stat()
    pread, preadv = os.pread, os.preadv

    def room(fd: int, size: int, at: int) -> int:
        """How many bytes are given back."""
        facts = os.fstat(fd)
        if (facts.st_dev, facts.st_ino) != (found.st_dev, found.st_ino):
            return size
        if offset <= at < offset + length:
            raise OSError(error, os.strerror(error))
        return min(size, offset - at) if at < offset else size

    def short_pread(fd: int, size: int, at: int) -> bytes:
        return pread(fd, room(fd, size, at), at)

    def short_preadv(fd: int, buffers: Sequence[Any], at: int) -> int:
        whole = sum(map(len, buffers))
        left = room(fd, whole, at)
        return preadv(fd, buffers if left == whole else [memoryview(buffers[0])[:left]], at)

    with mock.patch.object(os, "pread", short_pread), mock.patch.object(os, "preadv", short_preadv):
        yield


class FaultyFileSystem(FileSystem):
    """Fails on request, as disks and kernels do; else it does what `inner` does.

    Args:
        inner: Performs the calls, for example a `RecordingFileSystem`.

    Attributes:
        calls: How often each call was made, for finding out where it may fail.
        faults: Rules in force; take one out to end it.
    """

    def __init__(self, inner: FileSystem | None = None) -> None:
        self.inner = inner or FileSystem()
        self.calls: Counter[str] = Counter()
        self.faults: list[Fault] = []
        self._room: int | None = None
        self._lock = threading.RLock()
        self._names: dict[int, str] = {}
        # For each inode: what stood where something was written since the last sync.
        self._undo: dict[tuple[int, int], list[tuple[int, bytes]]] = {}

    # -- setting faults

    def fail(
        self,
        *calls: str,
        error: int = errno.EIO,
        nth: int = 1,
        times: int | None = 1,
        path: str = "*",
        partial: float = 0.0,
        drop: bool = False,
    ) -> Fault:
        """Let calls fail; see `Fault`. Without names: every call that changes something."""
        fault = Fault(frozenset(calls) or _MUTATIONS, error, nth, times, path, partial, drop)
        with self._lock:
            self.faults.append(fault)
        return fault

    def fail_sync(self, nth: int = 1, *, drop: bool = True, path: str = "*") -> Fault:
        """The n-th sync of a file fails once with EIO; the next one claims that all is well."""
        return self.fail(*_SYNCS, error=errno.EIO, nth=nth, path=path, drop=drop)

    def fail_write(self, nth: int = 1, *, partial: float = 0.5, path: str = "*") -> Fault:
        """The n-th write fills the disk: a part of it is written, then ENOSPC."""
        return self.fail("pwrite", error=errno.ENOSPC, nth=nth, partial=partial, path=path)

    def fail_from(self, nth: int, *, error: int = errno.EIO) -> Fault:
        """Every call from the n-th on fails, as when the disk is pulled out."""
        return self.fail(error=error, nth=nth, times=None)

    def read_only(self) -> Fault:
        """The file system is mounted read-only."""
        return self.fail("open", *_MUTATIONS, error=errno.EROFS, times=None)

    def deny(self, *calls: str, path: str = "*") -> Fault:
        """Take the permission away for new descriptors and names."""
        return self.fail(*(calls or ("open", *_NAMES)), error=errno.EACCES, times=None, path=path)

    def limit(self, room: int | None) -> None:
        """Only so many more bytes fit on the disk; unlinking gives room back. None: no limit.

        Overwriting needs no room. Folders, inodes and journal cost nothing here.
        """
        with self._lock:
            self._room = room

    @property
    def room(self) -> int | None:
        """Bytes that still fit, or None."""
        return self._room

    def clear(self) -> None:
        """End all faults."""
        with self._lock:
            self.faults.clear()
            self._room = None

    # -- calls

    def open(self, path: Path, *, create: bool = False, exclusive: bool = False) -> int:
        """Open, or fail."""
        makes = exclusive or (create and not os.path.lexists(path))
        self._enter("create" if makes else "open", path.name)
        fd = self.inner.open(path, create=create, exclusive=exclusive)
        with self._lock:
            self._names[fd] = path.name
        return fd

    def close(self, fd: int) -> None:
        """Close; this never fails."""
        with self._lock:
            self._names.pop(fd, None)
        self.calls["close"] += 1
        self.inner.close(fd)

    def pwrite(self, fd: int, data: Buffer, offset: int) -> None:
        """Write all, or a part and fail."""
        view = memoryview(data).cast("B")
        with self._lock:
            fault = self._strike("pwrite", self._names.get(fd, ""))
            length = len(view)
            if fault is not None:
                length = math.floor(length * fault.partial)
            error = fault.error if fault is not None else 0
            fits = self._fits(fd, offset, length)
            if fits < length:
                length, error = fits, error or errno.ENOSPC
            if length:
                before = os.fstat(fd)
                self._remember(fd, offset, length, before)
                self.inner.pwrite(fd, view[:length], offset)
                if self._room is not None:
                    self._room -= max(0, offset + length - before.st_size)
            if error:
                raise self._error(error, self._names.get(fd, ""))

    def pwritev(self, fd: int, parts: Sequence[Buffer], offset: int) -> None:
        """Write all, or a part and fail."""
        self.pwrite(fd, b"".join(parts), offset)

    def truncate(self, fd: int, size: int) -> None:
        """Set the size, or fail."""
        self._enter("truncate", self._names.get(fd, ""))
        with self._lock:
            before = os.fstat(fd)
            if size < before.st_size:
                self._remember(fd, size, before.st_size - size, before)
            self.inner.truncate(fd, size)
            if self._room is not None:
                # Pays for the hole at once, since writing into it counts as overwriting.
                self._room -= size - before.st_size

    def allocate(self, fd: int, size: int) -> None:
        """Reserve room, or fail."""
        self._enter("allocate", self._names.get(fd, ""))
        with self._lock:
            grown = max(0, size - os.fstat(fd).st_size)
            if self._room is not None and grown > self._room:
                raise self._error(errno.ENOSPC, self._names.get(fd, ""))
            self.inner.allocate(fd, size)
            if self._room is not None:
                self._room -= grown

    def fdatasync(self, fd: int) -> None:
        """Sync, or fail."""
        self._sync("fdatasync", fd)

    def fsync(self, fd: int) -> None:
        """Sync, or fail."""
        self._sync("fsync", fd)

    def replace(self, source: Path, target: Path) -> None:
        """Rename, or fail. What stood at the target gives its room back."""
        self._enter("replace", target.name)
        freed = self._held(target)
        self.inner.replace(source, target)
        self._free(freed)

    def unlink(self, path: Path) -> None:
        """Remove a name, or fail."""
        self._enter("unlink", path.name)
        freed = self._held(path)
        self.inner.unlink(path)
        self._free(freed)

    def mkdir(self, path: Path) -> None:
        """Make a folder, or fail where it would be a new one."""
        if not path.is_dir():
            self._enter("mkdir", path.name)
        self.inner.mkdir(path)

    def sync_folder(self, path: Path) -> None:
        """Sync the names, or fail."""
        self._enter("sync_folder", path.name)
        self.inner.sync_folder(path)

    # -- bookkeeping

    def _strike(self, call: str, name: str) -> Fault | None:
        with self._lock:
            self.calls[call] += 1
            # All of them count the call, also those behind the one that strikes.
            struck = [fault for fault in self.faults if fault.strikes(call, name)]
        return struck[0] if struck else None

    def _enter(self, call: str, name: str) -> None:
        fault = self._strike(call, name)
        if fault is not None:
            raise self._error(fault.error, name)

    @staticmethod
    def _error(code: int, name: str) -> OSError:
        return OSError(code, f"{os.strerror(code)} (simulated)", name)

    def _sync(self, call: str, fd: int) -> None:
        fault = self._strike(call, self._names.get(fd, ""))
        where = os.fstat(fd)
        inode = (where.st_dev, where.st_ino)
        if fault is None:
            with self._lock:
                covered = self._undo.pop(inode, None)
            try:
                (self.inner.fdatasync if call == "fdatasync" else self.inner.fsync)(fd)
            except OSError:
                with self._lock:
                    self._undo[inode] = (covered or []) + self._undo.get(inode, [])
                raise
            return
        with self._lock:
            lost = self._undo.pop(inode, [])
            if isinstance(self.inner, RecordingFileSystem):
                self.inner.sync_failed(fd)
            if fault.drop:
                # Past the recorder: for it these bytes are lost already.
                for offset, old in reversed(lost):
                    os.pwrite(fd, old, offset)
        raise self._error(fault.error, self._names.get(fd, ""))

    def _remember(self, fd: int, offset: int, length: int, before: os.stat_result) -> None:
        if not stat.S_ISREG(before.st_mode):
            return
        old = os.pread(fd, length, offset).ljust(length, b"\0")
        self._undo.setdefault((before.st_dev, before.st_ino), []).append((offset, old))

    def _fits(self, fd: int, offset: int, length: int) -> int:
        if self._room is None:
            return length
        end = os.fstat(fd).st_size
        return max(0, min(length, max(end - offset, 0) + self._room))

    def _held(self, path: Path) -> int:
        with contextlib.suppress(OSError):
            where = os.stat(path)
            if where.st_nlink == 1 and stat.S_ISREG(where.st_mode):
                return where.st_size
        return 0

    def _free(self, freed: int) -> None:
        with self._lock:
            if self._room is not None:
                self._room += freed
