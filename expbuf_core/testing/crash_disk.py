"""What is on a disk after a power loss: files page by page, names change by change.

The model is told in `expbuf_core.testing.crash`, which asks for folders at chosen instants.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from expbuf_core.testing.recording import (
    ROOT,
    Created,
    Event,
    FolderSynced,
    Marked,
    NameEvent,
    Recording,
    Renamed,
    Synced,
    Truncated,
    Unlinked,
    Written,
)

PAGE = 4096
"""Unit that the kernel writes back."""

SECTOR = 512
"""Unit that a disk writes atomically."""

_ZERO = bytes(PAGE)


@dataclass(frozen=True)
class FileImage:
    """Content of a file: its pages that are not all zeros, and its size."""

    pages: dict[int, bytes]
    size: int

    def fingerprint(self) -> tuple[Any, ...]:
        """Equal for equal content."""
        whole, rest = divmod(self.size, PAGE)
        known = []
        for number in sorted(self.pages):
            if number < whole:
                known.append((number, self.pages[number]))
            elif number == whole and (tail := self.pages[number][:rest].rstrip(b"\0")):
                known.append((number, tail))
        return self.size, hash(tuple(known))

    def torn(self, event: Written, length: int, *, grown: bool) -> FileImage:
        """This, with the first `length` bytes of a write on top; perhaps of its final size."""
        pages = dict(self.pages)
        done = 0
        while done < length:
            number, begin = divmod(event.offset + done, PAGE)
            piece = event.data[done : min(length, done + PAGE - begin)]
            old = pages.get(number, _ZERO)
            pages[number] = old[:begin] + piece + old[begin + len(piece) :]
            done += len(piece)
        end = event.offset + (len(event.data) if grown else length)
        return FileImage(pages, max(self.size, end))

    def write(self, path: Path) -> None:
        """Write it, sparse."""
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        try:
            run: list[bytes] = []
            begin = 0
            for number in sorted(self.pages):
                if run and number != begin + len(run):
                    os.pwrite(fd, b"".join(run), begin * PAGE)
                    run = []
                if not run:
                    begin = number
                run.append(self.pages[number])
            if run:
                os.pwrite(fd, b"".join(run), begin * PAGE)
            os.ftruncate(fd, self.size)
        finally:
            os.close(fd)


@dataclass(frozen=True)
class Image:
    """A folder as it may stand on disk. Paths are relative."""

    files: dict[str, FileImage]
    folders: list[str]

    def fingerprint(self) -> int:
        """Equal for equal content."""
        return hash(
            (
                tuple(sorted(self.folders)),
                tuple((path, self.files[path].fingerprint()) for path in sorted(self.files)),
            )
        )

    def materialise(self, root: Path) -> None:
        """Write it below an existing, empty folder."""
        for folder in self.folders:
            (root / folder).mkdir(parents=True, exist_ok=True)
        for path, content in self.files.items():
            target = root / path
            target.parent.mkdir(parents=True, exist_ok=True)
            content.write(target)


class DiskFile:
    """Every version that the pages of one file had since they were last synced."""

    def __init__(self, content: bytes = b"") -> None:
        self.durable: dict[int, bytes] = {}
        for begin in range(0, len(content), PAGE):
            page = content[begin : begin + PAGE].ljust(PAGE, b"\0")
            if page != _ZERO:
                self.durable[begin // PAGE] = page
        self.durable_size = len(content)
        self.newer: dict[int, list[tuple[int, bytes]]] = {}
        self.sizes: list[tuple[int, int]] = []
        self._failed = -1

    @property
    def size(self) -> int:
        return self.sizes[-1][1] if self.sizes else self.durable_size

    def page(self, number: int) -> bytes:
        if versions := self.newer.get(number):
            return versions[-1][1]
        return self.durable.get(number, _ZERO)

    def write(self, now: int, offset: int, data: bytes) -> None:
        done = 0
        while done < len(data):
            number, begin = divmod(offset + done, PAGE)
            piece = data[done : done + PAGE - begin]
            old = self.page(number)
            new = old[:begin] + piece + old[begin + len(piece) :]
            self._set(now, number, old, new)
            done += len(piece)
        if offset + len(data) > self.size:
            self.sizes.append((now, offset + len(data)))

    def truncate(self, now: int, size: int) -> None:
        if size < self.size:
            keep, rest = divmod(size, PAGE)
            for number in {*self.durable, *self.newer}:
                if number >= keep:
                    old = self.page(number)
                    new = old[:rest].ljust(PAGE, b"\0") if number == keep else _ZERO
                    self._set(now, number, old, new)
        if size != self.size:
            self.sizes.append((now, size))

    def _set(self, now: int, number: int, old: bytes, new: bytes) -> None:
        if new == old:
            # A page that stays the same adds no state, unless only this write dirties it again
            # after a failed sync.
            versions = self.newer.get(number)
            if not versions or versions[-1][0] > self._failed:
                return
        self.newer.setdefault(number, []).append((now, new))

    def sync(self, now: int, upto: int, *, failed: bool) -> None:
        if failed:
            self._failed = now
            return
        for number, versions in list(self.newer.items()):
            done = sum(1 for when, _ in versions if when < upto)
            if not done or versions[done - 1][0] <= self._failed:
                continue
            page = versions[done - 1][1]
            if page == _ZERO:
                self.durable.pop(number, None)
            else:
                self.durable[number] = page
            if done == len(versions):
                del self.newer[number]
            else:
                self.newer[number] = versions[done:]
        done = sum(1 for when, _ in self.sizes if when < upto)
        if done:
            self.durable_size = self.sizes[done - 1][1]
            del self.sizes[:done]

    @property
    def pending(self) -> bool:
        return bool(self.newer or self.sizes)

    def strict(self) -> FileImage:
        return FileImage(dict(self.durable), self.durable_size)

    def everything(self) -> FileImage:
        return self._image({number: vs[-1][1] for number, vs in self.newer.items()}, self.size)

    def mixture(self, rng: random.Random) -> FileImage:
        if not self.pending:
            return self.strict()
        mode = rng.choice(("any", "any", "old", "new", "ordered", "sectors"))
        instants = [when for versions in self.newer.values() for when, _ in versions]
        until = rng.choice(instants) if instants else 0
        chosen: dict[int, bytes] = {}
        for number, versions in self.newer.items():
            choices = [self.durable.get(number, _ZERO), *(page for _, page in versions)]
            if mode == "ordered":
                pick = sum(1 for when, _ in versions if when <= until)
            elif mode == "old":
                pick = rng.randrange(len(choices)) if rng.random() < 0.15 else 0
            elif mode == "new":
                pick = rng.randrange(len(choices)) if rng.random() < 0.15 else -1
            else:
                pick = rng.randrange(len(choices))
            page = choices[pick]
            if mode == "sectors":
                other = rng.choice(choices)
                page = b"".join(
                    rng.choice((page, other))[at : at + SECTOR] for at in range(0, PAGE, SECTOR)
                )
            chosen[number] = page
        sizes = [self.durable_size, *(size for _, size in self.sizes)]
        if mode == "ordered":
            size = sizes[sum(1 for when, _ in self.sizes if when <= until)]
        else:
            size = rng.choice(sizes) if rng.random() < 0.4 else sizes[-1]
        return self._image(chosen, size)

    def _image(self, chosen: dict[int, bytes], size: int) -> FileImage:
        pages = dict(self.durable)
        for number, page in chosen.items():
            if page == _ZERO:
                pages.pop(number, None)
            else:
                pages[number] = page
        return FileImage(pages, size)


Tree = dict[tuple[int, str], int]


class NameChange:
    """A change of names; pending until all folders that it concerns were synced."""

    def __init__(self, now: int, event: NameEvent) -> None:
        self.now = now
        self.event = event
        self.unsynced = {event.folder}
        if isinstance(event, Renamed):
            self.unsynced.add(event.to_folder)

    def apply(self, tree: Tree) -> None:
        event = self.event
        match event:
            case Created():
                tree[event.folder, event.name] = event.inode
            case Renamed():
                if tree.get((event.folder, event.name)) == event.inode:
                    del tree[event.folder, event.name]
                tree[event.to_folder, event.to_name] = event.inode
            case Unlinked():
                tree.pop((event.folder, event.name), None)


class Disk:
    """Plays a log and knows, at each point, what is durable and what is pending."""

    def __init__(self, recording: Recording) -> None:
        self.files = {inode: DiskFile(content) for inode, content in recording.files.items()}
        self.folders = set(recording.folders)
        self.tree: Tree = dict(recording.tree)  # durable
        self.changes: list[NameChange] = []
        self.acknowledged: list[Any] = []
        self.started: list[Any] = []

    def play(self, now: int, event: Event) -> None:
        match event:
            case Created():
                if event.is_folder:
                    self.folders.add(event.inode)
                else:
                    self.files[event.inode] = DiskFile()
                self.changes.append(NameChange(now, event))
            case Renamed() | Unlinked():
                self.changes.append(NameChange(now, event))
            case Written():
                self.files[event.inode].write(now, event.offset, event.data)
            case Truncated():
                self.files[event.inode].truncate(now, event.size)
            case Synced():
                self.files[event.inode].sync(now, event.upto, failed=event.failed)
            case FolderSynced():
                for change in self.changes:
                    if change.now < event.upto:
                        change.unsynced.discard(event.folder)
                while self.changes and not self.changes[0].unsynced:
                    self.changes.pop(0).apply(self.tree)
            case Marked():
                (self.acknowledged if event.acknowledged else self.started).append(event.value)

    @property
    def pending(self) -> bool:
        return bool(self.changes) or any(file.pending for file in self.files.values())

    def strict(self) -> Image:
        return self._image(self._names(lambda change: False), DiskFile.strict)

    def everything(self) -> Image:
        return self._image(self._names(lambda change: True), DiskFile.everything)

    def mixture(self, rng: random.Random) -> Image:
        mode = rng.choice(("ordered", "ordered", "any", "any", "none", "all"))
        pending = [change for change in self.changes if change.unsynced]
        if mode == "ordered":  # as a journalling file system does it
            chosen = set(pending[: rng.randint(0, len(pending))])
        elif mode == "any":
            chosen = {change for change in pending if rng.random() < 0.5}
        else:
            chosen = set(pending) if mode == "all" else set()
        return self._image(self._names(chosen.__contains__), lambda file: file.mixture(rng))

    def torn(self, base: str, event: Written, length: int, rng: random.Random) -> Image:
        """A crash inside a write: `base` says what became of all that came before."""
        target = self.files[event.inode]
        content: Callable[[DiskFile], FileImage]
        if base == "everything":
            names = self._names(lambda change: True)
            content = DiskFile.everything
        elif base == "strict":
            # The file itself must have a name, or nothing of the write is to be seen.
            names = self._names(lambda change: True)
            content = DiskFile.strict
        else:
            names = self._names(lambda change: rng.random() < 0.5)

            def content(file: DiskFile) -> FileImage:
                return file.mixture(rng)

        grown = base != "everything" and rng.random() < 0.3

        def with_tear(file: DiskFile) -> FileImage:
            made = content(file)
            return made.torn(event, length, grown=grown) if file is target else made

        return self._image(names, with_tear)

    def _names(self, chosen: Callable[[NameChange], bool]) -> Tree:
        tree = dict(self.tree)
        for change in self.changes:
            if not change.unsynced or chosen(change):
                change.apply(tree)
        return tree

    def _image(self, tree: Tree, content: Callable[[DiskFile], FileImage]) -> Image:
        below: dict[int, list[tuple[str, int]]] = {}
        for (folder, name), inode in tree.items():
            below.setdefault(folder, []).append((name, inode))
        files: dict[str, FileImage] = {}
        folders: list[str] = []
        # From the root down: what lies in a folder that has lost its name is lost with it.
        todo = [(ROOT, "")]
        while todo:
            folder, prefix = todo.pop()
            for name, inode in below.get(folder, ()):
                if inode in self.folders:
                    folders.append(prefix + name)
                    todo.append((inode, f"{prefix}{name}/"))
                else:
                    files[prefix + name] = content(self.files[inode])
        return Image(files, folders)
