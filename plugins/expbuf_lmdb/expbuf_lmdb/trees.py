"""Whether LMDB may follow its trees: it believes what stands in a page, and has no checksums.

LMDB copies and moves nodes by the sizes that they name, ends the process where it comes to a page
of another kind than it expects, and writes over every page that a list of free ones names. So each
page and node of the trees is held against what LMDB's own writing always gives:

- The levels of a tree are as many as its record says, and all pages of one are of one kind.
- The nodes of a page fill it from the first one to its end, without a gap.
- Keys rise from page to page, and lie where the keys of the level above say.
- No page is used twice, and none that is in use is free.

This takes O(nodes), many pages at once, and reads no values but those that LMDB itself goes by.

A long value stands in pages of its own, and the first of them says how many. LMDB believes that
where it frees them. So it is checked for values that are about to be deleted: to check it for all
of them, opening would have to read nearly the whole file.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from expbuf_core.errors import CorruptionError, FormatVersionError
from expbuf_lmdb import layout
from expbuf_lmdb.pages import (
    BIG,
    BRANCH,
    FORMAT,
    HEADER_BYTES,
    LEAF,
    NODE_BYTES,
    NOWHERE,
    TREE,
    TREE_RECORD_BYTES,
    PageFile,
    TreeRecord,
)

# Which keys of a table are about to be deleted.
Deleted = Callable[[bytes, NDArray[np.int64]], NDArray[np.bool_]]
_Bools = NDArray[np.bool_]
_Ints = NDArray[np.int64]
_Keys = NDArray[Any]  # numbers, or bytes as objects

_NAMES, _FREE = b"", b"free pages"
_NUMBERS = {
    layout.OPERATIONS: ">u8",
    layout.ROWS: ">u8",
    _FREE: "=u8",
}  # how a key of 8 bytes reads
_FLAGS_OF_FREE = 0x08  # of its record; its other bits are the environment's
_FLAGS = 0x7F  # those that say how keys and values are arranged

_NUMBER_BYTES = 8  # of the page at which a long value begins
_OVERFLOW = 0x04
_VALUE_HEADER = np.dtype([("number", "=u8"), ("", "=u2"), ("flags", "=u2"), ("pages", "=u4")])

_PAGES_AT_ONCE = 128
_DEEPEST = 32
_TRIES_A_STATE = 3
_STATES = 30


def check_file(path: Path) -> None:
    """See that LMDB can map this file without running off its end, and find its tables there.

    LMDB believes its first pages, and a map behind the end of a file kills the process.

    Raises:
        CorruptionError: It was cut, or its first pages or the tables' names are damaged.
        FormatVersionError: Another version of LMDB wrote it.
    """
    _check(path, None, whole=False)


def check_trees(path: Path, deleted: Deleted | None = None) -> dict[bytes, int]:
    """See that LMDB can follow its trees in this file, and delete these keys.

    Nobody writes meanwhile, or the caller is in a transaction, so that no page is used again.

    Returns:
        How many keys of operations and rows stay.

    Raises:
        CorruptionError: It cannot.
    """
    return _check(path, deleted, whole=True)


def _check(path: Path, deleted: Deleted | None, *, whole: bool) -> dict[bytes, int]:
    # Others may be writing a first page right now, or use pages again while they are read here.
    failed_at, failed, states = -1, 0, 0
    while True:
        with contextlib.closing(PageFile(path)) as file:
            try:
                _see_first_pages(file)
                check = _Check(file, deleted)
                check.run(whole=whole)
                return check.stay
            except (CorruptionError, FormatVersionError):
                state = 0 if file.first is None else file.first.transaction
                if state != failed_at:
                    failed_at, failed, states = state, 0, states + 1
                failed += 1
                if failed == _TRIES_A_STATE or states == _STATES:
                    raise
        time.sleep(0.002 * failed)


def _see_first_pages(file: PageFile) -> None:
    wrong = file.wrong
    if wrong is None:
        return
    name = file.path.name
    if wrong.startswith("version"):
        raise FormatVersionError(f"{name}: {wrong}; expbuf reads version {FORMAT} of LMDB")
    raise layout.corrupt(file.path, wrong, offset=0)


class _Level(NamedTuple):
    """Pages of one level of a tree, in order. `lows`: no key below one is smaller."""

    pages: _Ints
    lows: _Keys


class _Nodes(NamedTuple):
    """The nodes of some pages, in order.

    Attributes:
        raw: The pages.
        firsts: Which node is the first of each page.
        pages: In which page each stands, by its number.
        values: Where its value, or the number of that value's page, stands in `raw`.
        sizes: Of the value; of a node of a branch the lower half of the child.
        flags: Of a node of a branch the upper half of the child.
        keys: Of a branch's first node, whatever stands there.
    """

    raw: NDArray[np.uint8]
    firsts: _Ints
    pages: _Ints
    values: _Ints
    sizes: _Ints
    flags: _Ints
    keys: _Keys


class _Check:
    """One look at all pages of a file.

    Args:
        file: Its first pages are in order.
        deleted: Which keys are about to be deleted.

    Attributes:
        stay: How many keys of a table are not.
    """

    def __init__(self, file: PageFile, deleted: Deleted | None) -> None:
        assert file.first is not None
        self._file = file
        self._first = file.first
        self._deleted = deleted
        self._page_bytes = file.page_bytes
        self._used = np.zeros(self._first.last + 1, np.bool_)
        self._used[:2] = True
        self._tables: dict[bytes, TreeRecord] = {}
        self.stay = {layout.OPERATIONS: 0, layout.ROWS: 0}

    def run(self, *, whole: bool) -> None:
        """Raise what is wrong first. `whole`: not the tables' names and `meta` alone."""
        free, names = self._first.trees
        self._see(free.flags & _FLAGS == _FLAGS_OF_FREE, 0, _FREE, "a record with strange flags")
        self._tree(_NAMES, names)
        for name in (layout.META, layout.OPERATIONS, layout.ROWS):
            if name in self._tables and (whole or name == layout.META):
                self._tree(name, self._tables[name])
        if whole:
            self._tree(_FREE, free)

    def _tree(self, name: bytes, record: TreeRecord) -> None:
        self._see(name == _FREE or not record.flags, 0, name, "a record with strange flags")
        if record.root == NOWHERE:
            self._see(record.depth == 0, 0, name, "a depth of a tree that is empty")
            return
        self._see(0 < record.depth <= _DEEPEST, 0, name, "an impossible depth")
        self._see(2 <= record.root <= self._first.last, 0, name, "a root outside the file")
        root = np.array([record.root], np.int64)
        self._use(root, root, name)
        low: _Keys = np.zeros(1, np.uint64) if name in _NUMBERS else _objects([b""])
        level = _Level(root, low)
        for _ in range(record.depth - 1):
            parts = list(self._level(level, name, BRANCH))
            level = _Level(*map(np.concatenate, zip(*parts, strict=True)))
        for _ in self._level(level, name, LEAF):
            pass

    def _level(self, level: _Level, name: bytes, kind: int) -> Iterator[_Level]:
        """Check the pages of a level; of branches, the level below."""
        before: _Keys = level.lows[:0]  # the last key so far
        for start in range(0, len(level.pages), _PAGES_AT_ONCE):
            pages = level.pages[start : start + _PAGES_AT_ONCE]
            lows = level.lows[start : start + _PAGES_AT_ONCE]
            nodes = self._nodes(pages, name, kind)
            keys, known = nodes.keys, len(before)
            if kind == BRANCH:
                keys[nodes.firsts] = lows  # what stands there means nothing
            rising = np.concatenate([before, keys])
            others = nodes.pages[1 - known :]
            self._see_all(rising[1:] > rising[:-1], others, name, "keys that do not rise")
            if kind == BRANCH:
                children = nodes.sizes | nodes.flags << 32
                self._use(children, nodes.pages, name)
                yield _Level(children, keys)
            else:
                ends = rising[nodes.firsts[1 - known :] + known - 1]
                apart = (keys[nodes.firsts] >= lows) & np.append(
                    np.ones(1 - known, np.bool_), ends < lows[1 - known :]
                )
                self._see_all(apart, pages, name, "a key that belongs to another page")
                self._values(nodes, name)
            before = keys[-1:]
        if kind == LEAF and name in _NUMBERS:
            largest = self._first.transaction if name == _FREE else layout.LARGEST
            self._see(int(before[0]) <= largest, int(pages[-1]), name, "a key that is too large")

    def _nodes(self, pages: _Ints, name: bytes, kind: int) -> _Nodes:
        """The nodes of pages that are all of this kind."""
        words, rows = self._read(pages, name)
        stored = np.ascontiguousarray(rows[:, :4]).view("=u8")[:, 0]
        flags, lower, upper = (rows[:, i].astype(np.int64) for i in (5, 6, 7))
        # LMDB allows the tree of the free pages to have a branch with one child.
        least = 2 if kind == BRANCH and name != _FREE else 1
        sound = (stored == pages.astype(np.uint64)) & (flags == kind) & (lower % 2 == 0)
        sound &= (lower >= HEADER_BYTES + 2 * least) & (lower <= upper)
        sound &= upper <= self._page_bytes
        self._see_all(sound, pages, name, "no page of this tree")

        counts = (lower - HEADER_BYTES) // 2
        firsts = np.cumsum(counts) - counts
        owners = np.repeat(np.arange(len(pages)), counts)
        pointers = np.arange(len(owners)) - firsts[owners] + HEADER_BYTES // 2
        places = rows[owners, pointers].astype(np.int64)
        numbers = pages[owners]
        inside = (places >= upper[owners]) & (places <= self._page_bytes - NODE_BYTES)
        self._see_all(inside & (places % 2 == 0), numbers, name, "a node outside its page")

        at = owners * self._page_bytes + places
        low, high, more, key_bytes = (words[at // 2 + i].astype(np.int64) for i in range(4))
        sizes = low | high << 16
        if kind == LEAF:
            known = BIG | TREE if name == _NAMES else BIG
            self._see_all(more & ~known == 0, numbers, name, "a node of another kind")
            lengths = NODE_BYTES + key_bytes + np.where(more & BIG != 0, _NUMBER_BYTES, sizes)
        else:
            lengths = NODE_BYTES + key_bytes
        filled = self._are_filled(at, lengths + 1 & ~1, firsts, owners, upper)
        self._see_all(filled, pages, name, "nodes that do not fill their page")
        if name in _NUMBERS:
            as_wide = key_bytes == 8
            if kind == BRANCH:
                as_wide[firsts] = True  # LMDB puts none there, or leaves one
            self._see_all(as_wide, numbers, name, "a key of another length")
        keys = _keys(words, name, at + NODE_BYTES, key_bytes)
        values = at + NODE_BYTES + key_bytes
        return _Nodes(words.view(np.uint8), firsts, numbers, values, sizes, more, keys)

    def _read(self, pages: _Ints, name: bytes) -> tuple[NDArray[np.uint16], NDArray[np.uint16]]:
        """Pages as words of two bytes, with zeros behind them; and the same, a row a page."""
        size = self._page_bytes
        parts = self._file.beginnings(pages.tolist(), size)
        for part, page in zip(parts, pages.tolist(), strict=True):
            self._see(len(part) == size, page, name, "a page behind the end of the file")
        # A key is looked for at each node, and may be none at the last one.
        words = np.frombuffer(b"".join([*parts, bytes(8)]), np.uint16)
        return words, words[:-4].reshape(len(pages), -1)

    def _are_filled(
        self, at: _Ints, lengths: _Ints, firsts: _Ints, owners: _Ints, upper: _Ints
    ) -> _Bools:
        """Whether the nodes of each page fill it from where they begin to its end.

        Each must end where another one begins, or with the page. So one leads to the next, from
        the first to the end; and if that is all the room that they have, there are no others.
        """
        heads = np.arange(len(upper)) * self._page_bytes
        begins = np.zeros(len(upper) * self._page_bytes // 2 + 1, np.bool_)
        begins[at // 2] = True
        first = begins[(heads + upper) // 2]
        page_ends = heads + self._page_bytes
        begins[page_ends // 2] = True
        ends = at + lengths
        inside = ends <= page_ends[owners]
        meets = inside & begins[np.where(inside, ends, 0) // 2]
        filled: _Bools = np.add.reduceat(lengths, firsts) == self._page_bytes - upper
        filled &= first & np.logical_and.reduceat(meets, firsts)
        return filled

    def _values(self, nodes: _Nodes, name: bytes) -> None:
        """Check where the values of a leaf's nodes are, and those that LMDB itself reads."""
        big = nodes.flags & BIG != 0
        places = nodes.values[big][:, None] + np.arange(_NUMBER_BYTES)
        # A number above 2^63 becomes one below zero, which is none either.
        numbers = nodes.raw[places].view("=u8")[:, 0].astype(np.int64)
        counts = (HEADER_BYTES - 1 + nodes.sizes[big]) // self._page_bytes + 1
        self._use(numbers, nodes.pages[big], name, counts)
        if name in self.stay:
            freed = np.zeros(len(big), np.bool_)
            if self._deleted is not None:
                freed = self._deleted(name, nodes.keys.astype(np.int64))
            self.stay[name] += len(freed) - int(np.count_nonzero(freed))
            which = freed[big]
        else:
            which = np.ones(len(numbers), np.bool_)
        self._heads(numbers[which], counts[which], nodes.pages[big][which], name)
        if name == _NAMES:
            self._note_tables(nodes)
        elif name == _FREE:
            self._free(nodes)

    def _heads(self, numbers: _Ints, counts: _Ints, owners: _Ints, name: bytes) -> None:
        """Check what stands in front of values on pages of their own."""
        raw = self._file.beginnings(numbers.tolist(), HEADER_BYTES)
        heads = np.frombuffer(b"".join(raw), _VALUE_HEADER)
        sound = (heads["number"] == numbers) & (heads["flags"] == _OVERFLOW)
        self._see_all(
            sound & (heads["pages"] == counts), owners, name, "a value whose pages are not its own"
        )

    def _note_tables(self, nodes: _Nodes) -> None:
        for i in np.flatnonzero(nodes.flags == TREE).tolist():
            page, start, size = (int(of[i]) for of in (nodes.pages, nodes.values, nodes.sizes))
            self._see(size == TREE_RECORD_BYTES, page, _NAMES, "a table whose record is none")
            self._tables[nodes.keys[i]] = TreeRecord.read(nodes.raw[start : start + size].tobytes())

    def _free(self, nodes: _Nodes) -> None:
        """Lists of free pages: a count, and so many falling numbers of pages that nobody uses."""
        big = (nodes.flags & BIG != 0).tolist()
        for i, page in enumerate(nodes.pages.tolist()):
            start, size = int(nodes.values[i]), int(nodes.sizes[i])
            raw = nodes.raw[start : start + (_NUMBER_BYTES if big[i] else size)].tobytes()
            if big[i]:
                at = int.from_bytes(raw, sys.byteorder) * self._page_bytes + HEADER_BYTES
                raw = self._file.read(at, size)
            numbers = np.frombuffer(raw[: len(raw) // 8 * 8], "=u8").astype(np.int64)
            count = int(numbers[0]) if len(numbers) else -1
            listed = numbers[1 : 1 + max(count, 0)]
            falls = count == len(listed) and bool((np.diff(listed) < 0).all())
            self._see(falls, page, _FREE, "an impossible list of free pages")
            self._use(listed, np.full(len(listed), page), _FREE)

    # ------------------------------------------------------------ what is wrong

    def _use(self, pages: _Ints, owners: _Ints, name: bytes, counts: _Ints | None = None) -> None:
        """Note pages, or runs of them, as used; nobody else may use them.

        Args:
            pages: Their numbers.
            owners: The pages that name them.
            name: Of the table.
            counts: How long each run is.
        """
        room = len(self._used) - (1 if counts is None else counts)
        inside = (pages >= 2) & (pages <= room)
        self._see_all(inside, owners, name, "it names a page outside the file")
        if counts is not None:
            # No run is longer than the file, but all of them together may be, if they overlap.
            apart = int(counts.sum()) <= len(self._used)
            self._see(apart, int(owners[:1].sum()), name, "it names pages that are used twice")
            starts = np.repeat(pages - np.cumsum(counts) + counts, counts)
            pages, owners = starts + np.arange(len(starts)), np.repeat(owners, counts)
        twice = self._used[pages]
        self._see_all(~twice, owners, name, "it names a page that is used twice")
        self._used[pages] = True
        order = np.argsort(pages, kind="stable")
        again = pages[order][1:] == pages[order][:-1]
        self._see_all(~again, owners[order][1:], name, "it names a page that is used twice")

    def _see_all(self, sound: _Bools, pages: _Ints, name: bytes, reason: str) -> None:
        """See that this is so for each of these pages."""
        if not sound.all():
            self._see(False, int(pages[np.argmin(sound)]), name, reason)

    def _see(self, sound: bool, page: int, name: bytes, reason: str) -> None:
        if not sound:
            table = f" of the table {name.decode()}" if name else ""
            raise layout.corrupt(
                self._file.path,
                f"{reason}, page {page}{table}",
                offset=page * self._page_bytes,
            )


def _keys(words: NDArray[np.uint16], name: bytes, at: _Ints, key_bytes: _Ints) -> _Keys:
    """The keys of a table that begin at these bytes."""
    if name in _NUMBERS:
        eights = words[(at // 2)[:, None] + np.arange(4)]
        keys: _Keys = eights.view(_NUMBERS[name])[:, 0].astype(np.uint64)
        return keys
    raw = words.view(np.uint8)
    ends = (at + key_bytes).tolist()
    return _objects([raw[i:j].tobytes() for i, j in zip(at.tolist(), ends, strict=True)])


def _objects(keys: list[bytes]) -> _Keys:
    """Keys as an array: numpy's own strings lose zeros at their end."""
    array = np.empty(len(keys), object)
    array[:] = keys
    return array
