"""LMDB's pages, read without LMDB: it believes what stands in them, and has no checksums.

Version 0.9 of its format: pages of the machine's size, byte order and word size. Nothing here can
be led out of the file, or round in circles, by what stands in it.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from expbuf_core.filesystem import open_to_read, storage_errors

HEADER_BYTES = 16
_HEADER = struct.Struct("=QHHHH")  # number, padding, flags, end of the pointers, begin of the nodes
_NODE = struct.Struct("=HHHH")  # low and high half of a size or child, flags, size of the key
NODE_BYTES = _NODE.size
_NUMBER = struct.Struct("=Q")
BRANCH, LEAF = 0x01, 0x02
BIG, TREE = 0x01, 0x02  # flags of a node: its value stands in pages of its own; is a tree

# The first two pages: number, padding, flags, two unused; magic, version, address, map size, two
# trees (page size or padding, flags, depth, branch, leaf and overflow pages, entries, root), last
# page, transaction.
_FIRST = struct.Struct("=QHHHHIIQQIHHQQQQQIHHQQQQQQQ")
_TREE_RECORD = struct.Struct("=IHHQQQQQ")
TREE_RECORD_BYTES = _TREE_RECORD.size
_IS_META = 0x08
_MAGIC = 0xBEEFC0DE
FORMAT = 1
NOWHERE = (1 << 64) - 1
SIZES = (512, 1024, 2048, 4096, 8192, 16384, 32768)


class TreeRecord(NamedTuple):
    """What LMDB knows of a tree, in the order in which it stands there."""

    padding: int  # or the size of a page
    flags: int
    depth: int
    branches: int
    leaves: int
    others: int
    entries: int
    root: int

    @classmethod
    def read(cls, raw: bytes) -> TreeRecord:
        """The record in these `TREE_RECORD_BYTES`."""
        return cls(*_TREE_RECORD.unpack(raw))


class First(NamedTuple):
    """What counts of a first page. `trees`: of the free pages and of the names of databases."""

    page_bytes: int
    trees: tuple[TreeRecord, TreeRecord]
    last: int
    transaction: int
    map_bytes: int


def _wrong_with(raw: bytes, size: int) -> str | None:
    """What is wrong with the first pages of a file of this size; None: nothing."""
    if len(raw) < _FIRST.size:
        return f"the file was cut to {size} bytes"
    page_bytes = _FIRST.unpack_from(raw)[9]
    if page_bytes not in SIZES:
        return f"a page size of {page_bytes}"
    firsts = []
    for i in range(2):
        if len(raw) < i * page_bytes + _FIRST.size:
            return f"the file was cut to {size} bytes"
        first = _first(raw, i, page_bytes)
        if isinstance(first, str):
            return first
        firsts.append(first)
    newest = max(firsts, key=lambda each: (each.transaction, each.last))
    # The older state may name pages that were never written again, or may be torn: a transaction
    # writes over it, its number last. The newer one counts.
    if not 1 <= newest.last or newest.map_bytes > 1 << 47:
        return f"a map of {newest.map_bytes} bytes and {newest.last} pages"
    if any(tree.root > newest.last and tree.root != NOWHERE for tree in newest.trees):
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
    trees = TreeRecord(*fields[9:17]), TreeRecord(*fields[17:25])
    last, transaction = fields[25:]
    if magic != _MAGIC or not flags & _IS_META or page != i:
        return f"page {i} is no first page of LMDB"
    if version != FORMAT:
        return f"version {version} of LMDB's format"
    if fields[9] != page_bytes:
        return "page sizes that contradict each other"
    return First(page_bytes, trees, last, transaction, map_size)


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
        first: The newest state of which there is a first page.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with storage_errors("open", path):
            self._fd = open_to_read(path)
        self.size = os.fstat(self._fd).st_size
        self.bad: list[Bad] = []
        raw = self.read(0, 2 * 65536)
        self.wrong = _wrong_with(raw, self.size)
        # A transaction leaves the pages of the state before it alone: either first page will do.
        found = [_first(raw, i, size) for size in SIZES for i in (0, 1)]
        states = [first for first in found if isinstance(first, First)]
        newest = max(states, key=lambda first: first.transaction, default=None)
        self.page_bytes = newest.page_bytes if newest is not None else os.sysconf("SC_PAGE_SIZE")
        self.first = newest
        self._roots = {} if newest is None else self._named(newest.trees[1].root)

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

    def data_behind(self, offset: int) -> int:
        """Begin of the first page from `offset` on that is not in a hole; the size if all are."""
        try:
            found = os.lseek(self._fd, offset, os.SEEK_DATA)
        except OSError:  # there is none
            return self.size
        return found - found % self.page_bytes

    def beginnings(self, pages: list[int], length: int) -> list[bytes]:
        """What stands in front of pages of this file, so many bytes of each."""
        fd, page_bytes, pread = self._fd, self.page_bytes, os.pread
        with storage_errors("read", self.path):
            return [pread(fd, length, page * page_bytes) for page in pages]

    def _named(self, root: int) -> dict[bytes, int]:
        """Roots of the databases, by name."""
        roots = {}
        for node in self._walk(root, b"", kind=TREE):
            raw = self.read(node.offset, node.length)
            if len(raw) == TREE_RECORD_BYTES:
                roots[node.key] = TreeRecord.read(raw).root
        return roots

    def entries(self, name: bytes) -> Iterator[Node]:
        """The entries of a database, as far as pages lead to them; `bad` tells what does not."""
        if name not in self._roots:
            self.bad.append(Bad(0, name, "a database is missing"))
            return
        yield from self._walk(self._roots[name], name, kind=0)

    def _kind(self, number: int, header: bytes) -> tuple[int, int]:
        """Kind of a page, and the end of its pointers; zeros if it is none of a tree."""
        if len(header) < HEADER_BYTES:
            return 0, 0
        stored, _, flags, lower, upper = _HEADER.unpack(header)
        if stored != number or flags not in (BRANCH, LEAF) or lower % 2:
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
            if flags == BRANCH:
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
            inside = 0 if flags == BRANCH else 8 if more & BIG else low | high << 16
            if place + _NODE.size + key_bytes + inside > self.page_bytes:
                reason = "a node that is larger than its page"
                continue
            nodes.append((place, low, high, more, key_bytes))
        return flags, nodes, reason
