"""The control page: what all processes that have a buffer open share in memory.

One small mapped file of aligned 64-bit words, one fact each. It is a cache and never the truth: it
is set anew by the first opener, who holds the open lock alone, and believed only under a matching
boot id, buffer and generation. Its one use after a crash is as a witness: what it once called
durable must be in the log, else the log is damaged.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import secrets
import struct
import time
from pathlib import Path
from typing import cast

from expbuf_core.contracts import Words
from expbuf_core.crc import crc32
from expbuf_core.errors import CorruptionError, StorageError
from expbuf_core.filesystem import FileSystem, is_missing, is_plain, reading, storage_errors
from expbuf_core.waiting import Doorbell

PAGE_BYTES = 4096
_MAGIC = int.from_bytes(b"EXPBUFC1", "little")

# Who writes a word: (o) the first opener alone, (a) under the append lock, (f) under the flush
# lock, (b) under the builder lock, (m) under the maintenance lock, (r) under the representation
# lock.
MAGIC = 0  # (o)
GENERATION = 1  # (o) random at each recovery; 0 while one is under way
BOOT = 2  # (o) two words
UUID = 4  # (o) two words
INODE = 6  # (o) of this file: a copied folder is no witness
CLEAN = 7  # (o) checksum of APPENDED, the next numbers and UUID after a clean close, else 0
APPENDED = 8  # (a) last LSN written
NEXT_LSN = 31  # (a) more than APPENDED + 1 after a crash: numbers may have been seen and lost
NEXT_ID = 9  # (a)
PUBLISHED = 10  # (a) last LSN that readers may see because its writer asked for no more
DURABLE = 11  # (f) last LSN on disk; readers may see it
APPENDING = 12  # (a) 1 while an append or retirement is under way; found set, it died. 2: POSTPONED
FLUSHING = 13  # (f) 1 while a flush is under way; found set, its leader died
FLUSH_FAILED = 14  # (f) 1 from a failed flush until the log is retired
RETIREMENTS = 15  # (a, f) how often a log was retired
KEPT = 16  # (a, f) the last LSN that survived the last retirement
RESERVED_ID = 17  # (a) ids below are reserved on disk
RESERVED_LSN = 18  # (a) LSNs below are reserved on disk
INDEX_GENERATION = 19  # (b) rises with every index manifest
SNAPSHOT_LSN = 20  # (m) of the newest snapshot
ROWS_ADDED = 21  # (a) experiences and other changes since the folder was opened
BUILT_ROWS = 22  # (b) ROWS_ADDED when the last build began
BUILDER_FAILURES = 23  # (b)
REPRESENTATION = 24  # (r) number of the current one, | 1 << 32 while it is being changed
NEXT_REPRESENTATION = 25  # (r) of an index that is complete and about to be changed to, else 0
WAITING_TO_APPEND = 26  # (anybody) a hint: somebody sleeps until APPENDED changes
WAITING_FOR_FLUSH = 27  # (anybody) a hint: somebody sleeps until DURABLE changes
DAMAGED_INDEX = 28  # (anybody) a hint: INDEX_GENERATION + 1 of one that could not be opened
ADAPTER = 32  # eight words of the storage adapter
WORDS = 64

POSTPONED = 2  # in APPENDING: opened on a full disk; there is no log to append to yet


def boot_id() -> bytes:
    """16 bytes that change with every boot of this machine (or container host)."""
    try:
        text = Path("/proc/sys/kernel/random/boot_id").read_text()
        return bytes.fromhex(text.strip().replace("-", ""))
    except (OSError, ValueError):
        return b"\0" * 16


def not_ours(path: str | os.PathLike[str]) -> CorruptionError:
    """The error for a page that was changed from outside while the buffer is open."""
    return CorruptionError(
        f"{os.fspath(path)}: not the control page that those who have the buffer open have set; "
        "close it in all processes, and open it again",
        path=path,
        offset=0,
    )


def _pair(raw: bytes) -> tuple[int, int]:
    first, second = struct.unpack("<QQ", raw)
    return first, second


def _checksum(words: Words) -> int:
    fields = (words[APPENDED], words[NEXT_ID], words[NEXT_LSN], words[UUID], words[UUID + 1])
    return crc32(struct.pack("<5Q", *fields)) | 1 << 32


class Control:
    """The words, by number: `control.words[DURABLE]`. One load or store each, never torn."""

    def __init__(
        self,
        words: Words,
        mapped: mmap.mmap | None = None,
        inode: int = 0,
        bell: Doorbell | None = None,
    ) -> None:
        self.words = words
        self._map = mapped
        self._inode = inode
        self._bell = bell

    @classmethod
    def private(cls) -> Control:
        """Words of this process alone, for a buffer in memory or a private reader."""
        return cls([0] * WORDS)

    @classmethod
    def map(cls, path: Path, *, writable: bool) -> Control:
        """Map the page; a writable one is created where it is missing."""
        flags = (os.O_RDWR | os.O_CREAT) if writable else os.O_RDONLY
        with storage_errors("map", path):
            fd = os.open(path, flags | os.O_CLOEXEC, 0o666)
            try:
                if not is_plain(fd):
                    raise OSError(errno.EINVAL, "something else stands in its place")
                if writable and os.fstat(fd).st_size < PAGE_BYTES:
                    # Written, not just extended: a hole would be filled at the first store, and
                    # a full disk would kill the process there.
                    os.pwrite(fd, bytes(PAGE_BYTES), 0)
                access = mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ
                mapped = mmap.mmap(fd, PAGE_BYTES, access=access)
                inode = os.fstat(fd).st_ino
            finally:
                os.close(fd)
        bell = Doorbell(mapped) if writable else None
        return cls(cast("Words", memoryview(mapped).cast("Q")), mapped, inode, bell)

    @classmethod
    def map_existing(cls, path: Path) -> Control | None:
        """Map the page read-only; None where there is none."""
        try:
            with reading(path, what="map"):
                if os.stat(path).st_size < PAGE_BYTES:
                    return None
        except StorageError as exc:
            if is_missing(exc):
                return None
            raise
        return cls.map(path, writable=False)

    def is_mapped(self) -> bool:
        """Whether other processes can see these words."""
        return self._map is not None

    def check(self, path: Path, uuid: bytes) -> None:
        """See that a recovery of this buffer has set the page, before its words are believed.

        Args:
            path: Of the page.
            uuid: Of the buffer.

        Raises:
            CorruptionError: Something else stands there, though a generation does.
        """
        words, generation = self.words, self.words[GENERATION]
        found = words[MAGIC], words[UUID], words[UUID + 1], words[INODE]
        if found == (_MAGIC, *_pair(uuid), self._inode) or words[GENERATION] != generation:
            return  # or a recovery has begun meanwhile
        raise not_ours(path)

    def witness(self, uuid: bytes) -> int:
        """Highest LSN that this page, as found, proves durable; 0 if it proves nothing."""
        words = self.words
        if words[MAGIC] != _MAGIC or (words[UUID], words[UUID + 1]) != _pair(uuid):
            return 0
        if words[CLEAN] and words[CLEAN] == _checksum(words):
            return words[APPENDED]
        believed = (
            (words[BOOT], words[BOOT + 1]) == _pair(boot_id())
            and words[INODE] == self._inode
            and words[DURABLE] <= words[APPENDED]
        )
        return words[DURABLE] if believed else 0

    def closed_cleanly(self, uuid: bytes) -> bool:
        """True if the last to close the buffer did so in order, in this boot.

        After a power loss the page may be an old one, from before the last session: as a witness it
        is still right, but not about how that session ended.
        """
        words = self.words
        return (
            words[MAGIC] == _MAGIC
            and (words[UUID], words[UUID + 1]) == _pair(uuid)
            and (words[BOOT], words[BOOT + 1]) == _pair(boot_id())
            and words[CLEAN] != 0
            and words[CLEAN] == _checksum(words)
        )

    def reset(self, uuid: bytes) -> None:
        """Set the page anew (open lock held alone); `activate` makes it valid."""
        words = self.words
        words[GENERATION] = 0
        words[CLEAN] = 0
        for i in range(WORDS):
            if i != MAGIC:
                words[i] = 0
        words[UUID], words[UUID + 1] = _pair(uuid)
        words[BOOT], words[BOOT + 1] = _pair(boot_id())
        words[INODE] = self._inode
        words[MAGIC] = _MAGIC

    def activate(self) -> None:
        """Let others believe the page."""
        self.words[GENERATION] = secrets.randbits(63) | 1

    def published(self) -> int:
        """Last LSN that readers may see."""
        words = self.words
        published, durable = words[PUBLISHED], words[DURABLE]
        return durable if durable > published else published

    def await_change(self, word: int, hint: int, seen: int, timeout_s: float) -> None:
        """Sleep until `tell` of this word, or so long; not if it is no longer `seen`.

        Args:
            word: Number of the word that will change.
            hint: Number of the word that says that somebody waits for it.
            seen: Its value when it was looked at last.
            timeout_s: At most so long.
        """
        if self._bell is None:
            time.sleep(min(timeout_s, 1e-4))
            return
        self.words[hint] = 1
        self._bell.wait(word, seen, timeout_s)

    def tell(self, word: int, hint: int, count: int) -> None:
        """Wake those who wait for a change of this word, up to `count`; cheap if nobody does."""
        if self.words[hint] and self._bell is not None and self._bell.ring(word, count) < count:
            self.words[hint] = 0

    def mark_clean(self, path: Path, fs: FileSystem) -> None:
        """Note a clean close, durably (open lock held alone)."""
        self.words[CLEAN] = _checksum(self.words)
        if self._map is not None:
            self._map.flush()
            fd = fs.open(path)
            try:
                fs.fsync(fd)
            finally:
                fs.close(fd)

    def close(self) -> None:
        """Unmap; a mapping still referenced elsewhere goes with its last reference."""
        if self._bell is not None:
            self._bell.close()
        if self._map is not None:
            words, self.words = self.words, [0] * WORDS
            if isinstance(words, memoryview):
                words.release()
            with contextlib.suppress(BufferError):
                self._map.close()
            self._map = None
