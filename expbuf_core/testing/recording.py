"""A file system that keeps a log of what is done to it, and broken variants of it.

`expbuf_core.testing.crash` derives from such a log what a crash could have left.
"""

from __future__ import annotations

import contextlib
import fnmatch
import os
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from expbuf_core.filesystem import Buffer, FileSystem

VOLATILE = ("control",)
"""Names of files that are a cache for living processes, never trusted after a reboot."""

LOCKS = ("locks",)
"""Names of folders whose files say nothing; opening and closing one would end a POSIX lock."""

ROOT = 0
"""Inode of the folder in which everything happens."""


# ---------------------------------------------------------------- the log


@dataclass(frozen=True)
class Created:
    """A file (or a folder) got its first name."""

    inode: int
    folder: int
    name: str
    is_folder: bool
    path: str


@dataclass(frozen=True)
class Written:
    """Bytes of a file were overwritten or appended."""

    inode: int
    offset: int
    data: bytes
    path: str


@dataclass(frozen=True)
class Truncated:
    """The size of a file was set."""

    inode: int
    size: int
    path: str


@dataclass(frozen=True)
class Synced:
    """What happened to a file before event `upto` is durable; or, if it failed, never will be."""

    inode: int
    upto: int
    path: str
    failed: bool = False


@dataclass(frozen=True)
class Renamed:
    """A name moved, and replaced what stood at its target."""

    inode: int
    folder: int
    name: str
    to_folder: int
    to_name: str
    path: str


@dataclass(frozen=True)
class Unlinked:
    """A name was removed."""

    folder: int
    name: str
    path: str


@dataclass(frozen=True)
class FolderSynced:
    """The changes to the names of a folder before event `upto` are durable."""

    folder: int
    upto: int
    path: str


@dataclass(frozen=True)
class Marked:
    """The workload started something, or it was promised that something is done."""

    value: Any
    acknowledged: bool
    path: str = ""


Event = Created | Written | Truncated | Synced | Renamed | Unlinked | FolderSynced | Marked
NameEvent = Created | Renamed | Unlinked


def describe(event: Event) -> str:
    """Say what an event did."""
    match event:
        case Written():
            return f"write of {len(event.data)} bytes at {event.offset} of {event.path}"
        case Truncated():
            return f"truncation of {event.path} to {event.size}"
        case Synced():
            return f"{'failed sync' if event.failed else 'sync'} of {event.path}"
        case Renamed():
            return f"rename of {event.path} to {event.to_name}"
        case Marked():
            return f"{'acknowledgement' if event.acknowledged else 'start'} of {event.value!r}"
        case Created() | Unlinked() | FolderSynced():
            return f"{type(event).__name__.lower()} {event.path}"


@dataclass
class Recording:
    """What a `RecordingFileSystem` saw.

    Attributes:
        events: Every change, in order.
        tree: Names before the first event: (folder's inode, name) to inode.
        files: Content of every file before the first event, durable.
        folders: Inodes that are folders before the first event.
        volatile: For each file that is volatile: what it held, from which event on. None: absent.
    """

    events: list[Event] = field(default_factory=list)
    tree: dict[tuple[int, str], int] = field(default_factory=dict)
    files: dict[int, bytes] = field(default_factory=dict)
    folders: set[int] = field(default_factory=lambda: {ROOT})
    volatile: dict[str, list[tuple[int, bytes | None]]] = field(default_factory=dict)


class RecordingFileSystem(FileSystem):
    """Performs every call for real and keeps a log of it.

    A file is followed by its inode, so renames and descriptors that outlive a name are understood.
    Calls of several threads are put in one order; a sync covers what was written before it began.
    What stands in the folder at first counts as durable.

    Args:
        root: Folder in which everything happens; calls elsewhere are performed and not recorded.
        volatile: Names of files that are not recorded but watched: their content is noted at every
            event, since they may be mapped and change without any call.
        locks: Names of folders whose files are neither recorded nor ever opened.
        real_sync: Also ask the real disk to sync. Nothing depends on it, and it is slow.
    """

    def __init__(
        self,
        root: Path,
        *,
        volatile: Sequence[str] = VOLATILE,
        locks: Sequence[str] = LOCKS,
        real_sync: bool = False,
    ) -> None:
        self.root = Path(os.path.realpath(root))
        self.recording = Recording()
        self._volatile = frozenset(volatile)
        self._locks = frozenset(locks)
        self._real_sync = real_sync
        self._lock = threading.RLock()
        self._tree: dict[tuple[int, str], int] = {}
        self._folders = {ROOT}
        self._descriptors: dict[int, tuple[int, str] | None] = {}
        self._inodes = ROOT
        self._watched: dict[Path, str] = {}
        self._watch_in(self.root)
        self._scan(self.root, ROOT)
        self.recording.tree = dict(self._tree)
        self.recording.folders = set(self._folders)

    def mark(self, value: Any, *, acknowledged: bool = True) -> None:
        """Note in the log that `value` was acknowledged (or just started)."""
        self._log(Marked(value, acknowledged))

    # -- calls

    def open(self, path: Path, *, create: bool = False, exclusive: bool = False) -> int:
        """Open, and note the file where this made it."""
        with self._lock:
            fd = super().open(path, create=create, exclusive=exclusive)
            place = self._place(path)
            if place is None:
                self._descriptors[fd] = None
                return fd
            shown = self._show(path)
            inode = self._tree.get(place)
            if inode is None:
                inode = self._adopt(path, place, shown)
            self._descriptors[fd] = (inode, shown)
            return fd

    def close(self, fd: int) -> None:
        """Close."""
        with self._lock:
            self._descriptors.pop(fd, None)
            super().close(fd)

    def pwrite(self, fd: int, data: Buffer, offset: int) -> None:
        """Write, and note what."""
        with self._lock:
            super().pwrite(fd, data, offset)
            if (known := self._descriptors.get(fd)) is not None:
                self._log(Written(known[0], offset, bytes(data), known[1]))

    def pwritev(self, fd: int, parts: Sequence[Buffer], offset: int) -> None:
        """Write as one event."""
        self.pwrite(fd, b"".join(parts), offset)

    def truncate(self, fd: int, size: int) -> None:
        """Set the size, and note it."""
        with self._lock:
            super().truncate(fd, size)
            if (known := self._descriptors.get(fd)) is not None:
                self._log(Truncated(known[0], size, known[1]))

    def allocate(self, fd: int, size: int) -> None:
        """Reserve room, and note that the file grew."""
        with self._lock:
            before = os.fstat(fd).st_size
            super().allocate(fd, size)
            known = self._descriptors.get(fd)
            if known is not None and size > before:
                self._log(Truncated(known[0], size, known[1]))

    def fdatasync(self, fd: int) -> None:
        """Note that what was written before is durable."""
        upto = len(self.recording.events)
        if self._real_sync:
            super().fdatasync(fd)
        self._synced(fd, upto)

    def fsync(self, fd: int) -> None:
        """Note that what was written before is durable."""
        upto = len(self.recording.events)
        if self._real_sync:
            super().fsync(fd)
        self._synced(fd, upto)

    def sync_failed(self, fd: int) -> None:
        """Note that a sync failed: what is not durable yet can never become so any more."""
        self._synced(fd, len(self.recording.events), failed=True)

    def replace(self, source: Path, target: Path) -> None:
        """Rename, and note it."""
        with self._lock:
            origin, goal = self._place(source), self._place(target)
            if origin is not None and origin not in self._tree and source.exists():
                self._adopt(source, origin, self._show(source))
            super().replace(source, target)
            if origin is None or goal is None:
                return
            inode = self._tree.pop(origin)
            self._tree[goal] = inode
            self._log(Renamed(inode, *origin, *goal, self._show(source)))

    def unlink(self, path: Path) -> None:
        """Remove a name, and note it."""
        with self._lock:
            super().unlink(path)
            place = self._place(path)
            if place is not None and self._tree.pop(place, None) is not None:
                self._log(Unlinked(*place, self._show(path)))

    def mkdir(self, path: Path) -> None:
        """Make folders, and note each new one."""
        with self._lock:
            super().mkdir(path)
            self._folder(Path(os.path.realpath(path)))

    def sync_folder(self, path: Path) -> None:
        """Note that the names in the folder are durable."""
        upto = len(self.recording.events)
        if self._real_sync:
            super().sync_folder(path)
        with self._lock:
            inode = self._folder(Path(os.path.realpath(path)))
            if inode is not None:
                self._log(FolderSynced(inode, upto, self._show(path)))

    # -- bookkeeping

    def _log(self, event: Event) -> None:
        with self._lock:
            now = len(self.recording.events)
            self._watch(now)
            self.recording.events.append(event)

    def _watch(self, now: int) -> None:
        """Note what the volatile files hold; it may have changed without any call."""
        for path, shown in self._watched.items():
            content: bytes | None = None
            with contextlib.suppress(OSError):
                content = path.read_bytes()
            history = self.recording.volatile.setdefault(shown, [])
            if not history or history[-1][1] != content:
                history.append((now, content))

    def _synced(self, fd: int, upto: int, *, failed: bool = False) -> None:
        os.fstat(fd)  # a closed descriptor fails here as it does in a real sync
        with self._lock:
            if (known := self._descriptors.get(fd)) is not None:
                self._log(Synced(known[0], upto, known[1], failed))
            else:
                # What a volatile file is synced for is worth knowing; it may not stay for long.
                self._watch(len(self.recording.events))

    def _show(self, path: Path) -> str:
        return os.path.relpath(os.path.realpath(path), self.root)

    def _new_inode(self) -> int:
        self._inodes += 1
        return self._inodes

    def _place(self, path: Path) -> tuple[int, str] | None:
        """Folder's inode and name; None for what is not recorded."""
        parent = Path(os.path.realpath(path.parent))
        folder = self._folder(parent)
        if folder is None or self._is_cache(parent / path.name):
            return None
        return folder, path.name

    def _is_cache(self, path: Path) -> bool:
        above = path.parent.relative_to(self.root).parts
        return path.name in self._volatile or not self._locks.isdisjoint(above)

    def _watch_in(self, folder: Path) -> None:
        for name in self._volatile:
            path = folder / name
            self._watched[path] = os.path.relpath(path, self.root)

    def _folder(self, path: Path) -> int | None:
        """Inode of a folder, which is noted as new where nobody told about it."""
        try:
            parts = path.relative_to(self.root).parts
        except ValueError:
            return None
        inode = ROOT
        for depth, name in enumerate(parts, 1):
            below = self._tree.get((inode, name))
            if below is None:
                below = self._new_inode()
                self._tree[inode, name] = below
                self._folders.add(below)
                shown = os.path.join(*parts[:depth])
                self._watch_in(self.root / shown)
                self._log(Created(below, inode, name, True, shown))
            inode = below
        return inode

    def _adopt(self, path: Path, place: tuple[int, str], shown: str) -> int:
        """Note a new file; what it holds already was written by others and is not durable."""
        is_folder = path.is_dir()
        inode = self._new_inode()
        self._tree[place] = inode
        self._log(Created(inode, *place, is_folder, shown))
        if not is_folder and (content := path.read_bytes()):
            self._log(Written(inode, 0, content, shown))
        return inode

    def _scan(self, path: Path, folder: int) -> None:
        for entry in sorted(os.scandir(path), key=lambda entry: entry.name):
            is_folder = entry.is_dir(follow_symlinks=False)
            if not is_folder and self._is_cache(Path(entry.path)):
                continue
            inode = self._new_inode()
            self._tree[folder, entry.name] = inode
            if is_folder:
                self._folders.add(inode)
                self._watch_in(Path(entry.path))
                self._scan(Path(entry.path), inode)
            else:
                self.recording.files[inode] = Path(entry.path).read_bytes()


# ---------------------------------------------------------------- broken variants


class NoFsync(RecordingFileSystem):
    """Broken on purpose: syncing a file says that it worked and does nothing.

    Attributes:
        only: Pattern of the names of the files that this happens to.
    """

    only = "*"

    def _synced(self, fd: int, upto: int, *, failed: bool = False) -> None:
        known = self._descriptors.get(fd)
        if known is None or not fnmatch.fnmatch(os.path.basename(known[1]), self.only):
            super()._synced(fd, upto, failed=failed)


class NoFolderSync(RecordingFileSystem):
    """Broken on purpose: syncing a folder says that it worked and does nothing."""

    def sync_folder(self, path: Path) -> None:
        """Do nothing."""


class RenameBeforeSync(RecordingFileSystem):
    """Broken on purpose: a file gets its final name first and is synced only then."""

    def write_atomically(self, path: Path, chunks: Iterable[Buffer]) -> None:
        """As it should be, in the wrong order."""
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        fd = self.open(temporary, create=True)
        try:
            self.truncate(fd, 0)
            offset = 0
            for chunk in chunks:
                self.pwrite(fd, chunk, offset)
                offset += memoryview(chunk).nbytes
            self.replace(temporary, path)
            self.sync_folder(path.parent)
            self.fsync(fd)
        finally:
            self.close(fd)


class WriteInPlace(RecordingFileSystem):
    """Broken on purpose: what should appear atomically is written over what stands there."""

    def write_atomically(self, path: Path, chunks: Iterable[Buffer]) -> None:
        """Overwrite in place, and sync."""
        fd = self.open(path, create=True)
        try:
            self.truncate(fd, 0)
            offset = 0
            for chunk in chunks:
                self.pwrite(fd, chunk, offset)
                offset += memoryview(chunk).nbytes
            self.fsync(fd)
        finally:
            self.close(fd)
        self.sync_folder(path.parent)
