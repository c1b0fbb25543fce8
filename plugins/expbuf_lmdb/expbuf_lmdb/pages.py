"""LMDB's pages, read without LMDB: it believes what stands in them, and has no checksums.

Version 0.9 of its format: pages of the machine's size, byte order and word size. Nothing here can
be led out of the file, or round in circles, by what stands in it.
"""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from expbuf_core.errors import FormatVersionError
from expbuf_core.filesystem import storage_errors
from expbuf_lmdb import layout

HEADER_BYTES = 16
_HEADER = struct.Struct("=QHHHH")  # number, padding, flags, end of the pointers, begin of the nodes
_NODE = struct.Struct("=HHHH")  # low and high half of a size or child, flags, size of the key
_NUMBER = struct.Struct("=Q")
_BRANCH, _LEAF = 0x01, 0x02
BIG, _TREE = 0x01, 0x02  # flags of a node: its value stands in pages of its own; is a tree

# The first two pages: number, padding, flags, two unused; magic, version, address, map size, two
# trees (page size or padding, flags, depth, branch, leaf and overflow pages, entries, root), last
# page, transaction.
_FIRST = struct.Struct("=QHHHHIIQQIHHQQQQQIHHQQQQQQQ")
_TREE_RECORD = struct.Struct("=IHHQQQQQ")
_IS_META = 0x08
_MAGIC = 0xBEEFC0DE
_FORMAT = 1
NOWHERE = (1 << 64) - 1
_FREE = b"free pages"
SIZES = (512, 1024, 2048, 4096, 8192, 16384, 32768)


class First(NamedTuple):
    """What counts of a first page. `roots`: of the free pages and of the names of databases."""

    page_bytes: int
    roots: tuple[int, int]
    last: int
    transaction: int
    map_bytes: int


def check_file(path: Path) -> None:
    """See that LMDB can map this file without running off its end.

    LMDB believes its first pages, and a map behind the end of a file kills the process.

    Raises:
        CorruptionError: It was cut, or its first pages are damaged.
        FormatVersionError: Another version of LMDB wrote it.
    """
    wrong: str | None = ""
    for attempt in range(5):  # another process may be writing one of the two pages right now
        with storage_errors("read", path):
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                raw = os.pread(fd, 2 * 65536, 0)
                size = os.fstat(fd).st_size
            finally:
                os.close(fd)
        wrong = _wrong_with(raw, size)
        if wrong is None:
            return
        time.sleep(0.002 * attempt)
    assert wrong is not None
    if wrong.startswith("version"):
        raise FormatVersionError(f"{path.name}: {wrong}; expbuf reads version {_FORMAT} of LMDB")
    raise layout.corrupt(path, wrong, offset=0)


def check_trees(path: Path) -> None:
    """See that LMDB can follow its trees in this file.

    Nobody writes meanwhile, or the caller is in a transaction, so that no page is used again.

    Raises:
        CorruptionError: It cannot.
    """
    for attempt in (1, 2):  # a first page may just be written
        file = PageFile(path)
        try:
            bad = next(file.check(), None)
            if bad is not None and attempt == 2:
                table = f" of the table {bad.of.decode()}" if bad.of else ""
                offset = bad.page * file.page_bytes
                raise layout.corrupt(path, f"{bad.reason}, page {bad.page}{table}", offset=offset)
        finally:
            file.close()
        if bad is None:
            return


def _wrong_with(raw: bytes, size: int) -> str | None:
    """What is wrong with the first pages of a file of this size; None: nothing."""
    if len(raw) < _FIRST.size:
        return f"the file was cut to {size} bytes"
    page_bytes = _FIRST.unpack_from(raw)[9]
    if page_bytes not in SIZES:
        return f"a page size of {page_bytes}"
    newest = First(page_bytes, (0, 0), 0, -1, 0)
    for i in range(2):
        if len(raw) < i * page_bytes + _FIRST.size:
            return f"the file was cut to {size} bytes"
        first = _first(raw, i, page_bytes)
        if isinstance(first, str):
            return first
        newest = max(newest, first, key=lambda each: (each.transaction, each.last))
    # The older state may name pages that were never written again, or may be torn: a transaction
    # writes over it, its number last. The newer one counts.
    if not 1 <= newest.last or newest.map_bytes > 1 << 47:
        return f"a map of {newest.map_bytes} bytes and {newest.last} pages"
    if any(root > newest.last and root != NOWHERE for root in newest.roots):
        return "a tree behind the end of the file"
    if (newest.last + 1) * page_bytes > size:
        return f"the file was cut to {size} of {(newest.last + 1) * page_bytes} bytes"
    return None


def _first(raw: bytes, i: int, page_bytes: int) -> First | str:
    """The i-th first page, or what is wrong with it."""
    if len(raw) < i * page_bytes + _FIRST.size:
        return "the file was cut"
    fields = _FIRST.unpack_from(raw, i * page_bytes)
    page, flags, (magic, version), map_size = fields[0], fields[2], fields[5:7], fields[8]
    roots, last, transaction = (fields[16], fields[24]), fields[25], fields[26]
    if magic != _MAGIC or not flags & _IS_META or page != i:
        return f"page {i} is no first page of LMDB"
    if version != _FORMAT:
        return f"version {version} of LMDB's format"
    if fields[9] != page_bytes:
        return "page sizes that contradict each other"
    return First(page_bytes, roots, last, transaction, map_size)


class Node(NamedTuple):
    """An entry of a tree. `offset` and `length`: of its value in the file."""

    key: bytes
    offset: int
    length: int


class Bad(NamedTuple):
    """A page that is not what led to it says. `of`: the database; b"": the tree of databases."""

    page: int
    of: bytes
    reason: str


class PageFile:
    """A file of LMDB, read by its pages.

    Args:
        path: Of the file.

    Attributes:
        size: Of the file.
        page_bytes: Of a page.
        bad: What `entries` stepped over.
        wrong: What is wrong with the first pages; None: nothing.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with storage_errors("open", path):
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self.size = os.fstat(self._fd).st_size
        self.bad: list[Bad] = []
        raw = self.read(0, 2 * 65536)
        self.wrong = _wrong_with(raw, self.size)
        # A transaction leaves the pages of the state before it alone: either first page will do.
        found = [_first(raw, i, size) for size in SIZES for i in (0, 1)]
        states = [first for first in found if isinstance(first, First)]
        newest = max(states, key=lambda first: first.transaction, default=None)
        self.page_bytes = newest.page_bytes if newest is not None else os.sysconf("SC_PAGE_SIZE")
        self._first = newest
        self._roots = {} if newest is None else self._named(newest.roots[1])

    def close(self) -> None:
        """Let go of the file."""
        os.close(self._fd)

    def read(self, offset: int, length: int) -> bytes:
        """So many bytes, or those that there are: neither number is believed."""
        if offset >= self.size:
            return b""
        length = min(length, self.size - offset)
        with storage_errors("read", self.path):
            return os.pread(self._fd, length, offset)

    def _named(self, root: int) -> dict[bytes, int]:
        """Roots of the databases, by name."""
        roots = {}
        for node in self._walk(root, b"", kind=_TREE):
            raw = self.read(node.offset, node.length)
            if len(raw) == _TREE_RECORD.size:
                roots[node.key] = _TREE_RECORD.unpack(raw)[7]
        return roots

    def entries(self, name: bytes) -> Iterator[Node]:
        """The entries of a database, as far as pages lead to them; `bad` tells what does not."""
        if name not in self._roots:
            self.bad.append(Bad(0, name, "a database is missing"))
            return
        yield from self._walk(self._roots[name], name, kind=0)

    def check(self) -> Iterator[Bad]:
        """Pages that are not of the kind that the page above them says, and what leads out of one.

        LMDB ends the process where it comes to such a page from the one beside it, follows a node
        out of its page or the file, or takes a page behind the end of the file for a free one. So
        this looks at all of them: O(nodes of the trees), without the values on pages of their own.
        """
        if self._first is None:
            return
        free, names = self._first.roots
        trees = {**self._roots, b"": names, _FREE: free}
        for name, root in trees.items():
            waiting, seen = [root] if root != NOWHERE else [], set()
            while waiting:
                number = waiting.pop()
                at = number * self.page_bytes
                raw = self.read(at, self.page_bytes)
                flags, lower = self._kind(number, raw[:HEADER_BYTES])
                if number in seen or not flags or len(raw) < self.page_bytes:
                    yield Bad(number, name, "no page of a tree")
                elif flags == _BRANCH:
                    _, nodes, reason = self._parsed(number, raw)
                    if reason:
                        yield Bad(number, name, reason)
                    waiting += [low | high << 16 | more << 32 for _, low, high, more, _ in nodes]
                elif not self._is_sound_leaf(raw, lower):
                    yield Bad(number, name, "a node outside its page, or a value outside the file")
                seen.add(number)

        yield from self._check_free(free, self._first.last)

    def _is_sound_leaf(self, raw: bytes, lower: int) -> bool:
        """Whether all nodes of a leaf lie inside it, and the values that they name in the file."""
        places = np.frombuffer(raw, "=u2", (lower - HEADER_BYTES) // 2, HEADER_BYTES).astype(int)
        upper = _HEADER.unpack_from(raw)[4]
        if not len(places):
            return True
        if places.min() < upper or places.max() > self.page_bytes - _NODE.size:
            return False
        octets = np.frombuffer(raw, np.uint8)
        heads = octets[places[:, None] + np.arange(_NODE.size)].view("=u2").astype(int)
        sizes, flags, keys = heads[:, 0] | heads[:, 1] << 16, heads[:, 2], heads[:, 3]
        big = flags & BIG != 0
        starts = places + _NODE.size + keys
        inside = starts + np.where(big, _NUMBER.size, sizes)
        if (flags & ~(BIG | _TREE)).any() or inside.max() > self.page_bytes:
            return False
        numbers = octets[starts[big][:, None] + np.arange(_NUMBER.size)].view("=u8").ravel()
        most = self.size // self.page_bytes
        if (numbers < 2).any() or (numbers >= most).any():
            return False
        ends = numbers.astype(int) * self.page_bytes + HEADER_BYTES + sizes[big]
        return not len(ends) or int(ends.max()) <= self.size

    def _check_free(self, root: int, last: int) -> Iterator[Bad]:
        """Lists of free pages: a count, and so many falling numbers of pages of this file."""
        for node in self._walk(root, _FREE, kind=0):
            raw = self.read(node.offset, node.length)
            pages = np.frombuffer(raw[: len(raw) // 8 * 8], "=u8").astype(np.int64)
            listed = pages[1 : 1 + int(pages[0])] if len(pages) else pages
            if (
                not len(pages)
                or int(pages[0]) != len(listed)
                or (len(listed) and not 2 <= listed[-1] <= listed[0] <= last)
                or (np.diff(listed) >= 0).any()
            ):
                yield Bad(node.offset // self.page_bytes, _FREE, "an impossible list of free pages")

    def _kind(self, number: int, header: bytes) -> tuple[int, int]:
        """Kind of a page, and the end of its pointers; zeros if it is none of a tree."""
        if len(header) < HEADER_BYTES:
            return 0, 0
        stored, _, flags, lower, upper = _HEADER.unpack(header)
        if stored != number or flags not in (_BRANCH, _LEAF) or lower % 2:
            return 0, 0
        return (flags, lower) if HEADER_BYTES <= lower <= upper <= self.page_bytes else (0, 0)

    def _walk(self, root: int, name: bytes, kind: int) -> Iterator[Node]:
        waiting, seen = [root] if root != NOWHERE else [], set()
        while waiting:
            number = waiting.pop()
            if number in seen:
                self.bad.append(Bad(number, name, "more than one page leads here"))
                continue
            seen.add(number)
            at = number * self.page_bytes
            raw = self.read(at, self.page_bytes)
            flags, nodes, reason = self._parsed(number, raw)
            if reason:
                self.bad.append(Bad(number, name, reason))
            if flags == _BRANCH:
                waiting += [low | high << 16 | more << 32 for _, low, high, more, _ in nodes][::-1]
                continue
            for place, low, high, more, key_bytes in nodes:
                if more & ~BIG != kind:
                    self.bad.append(Bad(number, name, "a node of another kind"))
                    continue
                key = raw[place + _NODE.size : place + _NODE.size + key_bytes]
                start, length = place + _NODE.size + key_bytes, low | high << 16
                if more & BIG:
                    (big,) = _NUMBER.unpack_from(raw, start)
                    yield Node(key, big * self.page_bytes + HEADER_BYTES, length)
                else:
                    yield Node(key, at + start, length)

    def _parsed(
        self, number: int, raw: bytes
    ) -> tuple[int, list[tuple[int, int, int, int, int]], str]:
        """Kind of a page, its nodes as far as they are plausible, and what is wrong."""
        if len(raw) < self.page_bytes:
            return 0, [], "a page behind the end of the file"
        flags, lower = self._kind(number, raw[:HEADER_BYTES])
        if not flags:
            return 0, [], "no page of a tree"
        upper = _HEADER.unpack_from(raw)[4]
        nodes, reason = [], ""
        for (place,) in struct.iter_unpack("=H", raw[HEADER_BYTES:lower]):
            if not upper <= place <= self.page_bytes - _NODE.size:
                reason = "a node outside its page"
                continue
            low, high, more, key_bytes = _NODE.unpack_from(raw, place)
            inside = 0 if flags == _BRANCH else 8 if more & BIG else low | high << 16
            if place + _NODE.size + key_bytes + inside > self.page_bytes:
                reason = "a node that is larger than its page"
                continue
            nodes.append((place, low, high, more, key_bytes))
        return flags, nodes, reason
