"""What LMDB would stumble over in its pages is found before LMDB goes there."""

from __future__ import annotations

import contextlib
import os
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from expbuf_core.contracts import LogGone
from expbuf_core.errors import CorruptionError, StorageError
from expbuf_core.testing.persistence_log import Core, Place, operation, outcome
from expbuf_core.testing.processes import Child
from expbuf_lmdb import layout
from expbuf_lmdb.pages import (
    BIG,
    BRANCH,
    HEADER_BYTES,
    LEAF,
    NODE_BYTES,
    TREE_RECORD_BYTES,
    PageFile,
    TreeRecord,
)
from expbuf_lmdb.trees import check_file, check_trees

LONG = os.environ.get("EXPBUF_LONG", "") not in ("", "0")
NAMES, FREE = b"", b"free"
PAGE = 4096
Damage = Callable[["Image"], None]


class Node(NamedTuple):
    """Where a node stands in the file, and what it says."""

    at: int
    size: int  # or the lower half of a child
    flags: int
    key_bytes: int

    @property
    def value(self) -> int:
        return self.at + NODE_BYTES + self.key_bytes

    @property
    def is_big(self) -> bool:
        return bool(self.flags & BIG)


class Image:
    """The bytes of a file of LMDB, to be changed, and where its trees are."""

    def __init__(self, raw: bytes, path: Path) -> None:
        file = PageFile(path)
        assert file.first is not None
        free, names = file.first.trees
        file.close()
        self.raw = bytearray(raw)
        self.pages: dict[bytes, dict[int, list[int]]] = {}  # by table and kind
        self._look(NAMES, names.root)
        self._look(FREE, free.root)
        self.records: dict[bytes, int] = {}
        for node in self.nodes(self.pages[NAMES][LEAF][0]):
            name = bytes(self.raw[node.at + NODE_BYTES : node.value])
            self.records[name] = node.value
            record = bytes(self.raw[node.value : node.value + TREE_RECORD_BYTES])
            self._look(name, TreeRecord.read(record).root)

    def _look(self, name: bytes, root: int) -> None:
        found = self.pages[name] = {BRANCH: [], LEAF: []}
        waiting = [root]
        while waiting:
            page = waiting.pop(0)
            (kind,) = struct.unpack_from("=H", self.raw, page * PAGE + 10)
            found[kind].append(page)
            if kind == BRANCH:
                waiting += [node.size for node in self.nodes(page)]

    def nodes(self, page: int) -> list[Node]:
        return [
            Node(at, low | high << 16, flags, key_bytes)
            for at in self.pointers(page)
            for low, high, flags, key_bytes in [struct.unpack_from("=HHHH", self.raw, at)]
        ]

    def pointers(self, page: int) -> list[int]:
        start = page * PAGE
        (lower,) = struct.unpack_from("=H", self.raw, start + 12)
        form = f"={(lower - HEADER_BYTES) // 2}H"
        return [start + place for place in struct.unpack_from(form, self.raw, start + HEADER_BYTES)]

    def put(self, at: int, form: str, value: int) -> None:
        struct.pack_into(form, self.raw, at, value)


class Scene(NamedTuple):
    core: Core
    path: Path
    good: bytes
    stage: bytes

    def image(self) -> Image:
        self.path.write_bytes(self.good)
        return Image(self.good, self.path)


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    """Trees of two levels, values on pages of their own, and pages that are free."""
    settings = {"map_bytes": 1 << 20, "stage_bytes": 1 << 14}
    place = Place(tmp_path_factory.mktemp("pages"), "lmdb", settings)
    core = Core(place).create()
    for turn in range(25):
        core.extend(8, rows=4 if turn % 3 == 0 else None, row_bytes=300 + 2700 * (turn % 5 == 0))
        core.sync()
    core.append(operation(core.next_lsn, 1, body_bytes=9000))
    core.sync()
    core.finish()
    path = core.place.folder / layout.DATA
    good = path.read_bytes()
    image = Image(good, path)
    for table in (layout.OPERATIONS, layout.ROWS):
        assert len(image.pages[table][BRANCH]) == 1
        assert len(image.pages[table][LEAF]) > 3
    return Scene(core, path, good, path.with_name(layout.STAGE).read_bytes())


# ---------------------------------------------------------------- one by one

DAMAGES: dict[str, tuple[Damage, str]] = {}


def found(reason: str) -> Callable[[Damage], Damage]:
    """Put a damage on the list, with what is to be said of it."""

    def note(damage: Damage) -> Damage:
        DAMAGES[damage.__name__] = damage, reason
        return damage

    return note


OPERATIONS, ROWS = layout.OPERATIONS, layout.ROWS


def leaf(image: Image, table: bytes = ROWS, which: int = 1) -> int:
    return image.pages[table][LEAF][which]


def small(image: Image) -> Node:
    """A node in a leaf of rows, with others below it, whose value stands beside it."""
    nodes = sorted(image.nodes(leaf(image)))
    return next(node for node in nodes[1:] if not node.is_big and node.size > 64)


def big(image: Image, which: int = 0) -> Node:
    pages = image.pages[ROWS][LEAF]
    return [node for page in pages for node in image.nodes(page) if node.is_big][which]


@found("a node outside its page")
def a_node_behind_its_page(image: Image) -> None:
    image.put(leaf(image) * PAGE + HEADER_BYTES, "=H", 0xFFF0)


@found("a node outside its page")
def a_node_in_the_pointers(image: Image) -> None:
    image.put(leaf(image) * PAGE + HEADER_BYTES, "=H", HEADER_BYTES + 2)


@found("a node outside its page")
def a_node_at_an_odd_place(image: Image) -> None:
    (place,) = struct.unpack_from("=H", image.raw, leaf(image) * PAGE + HEADER_BYTES)
    image.put(leaf(image) * PAGE + HEADER_BYTES, "=H", place | 1)


@found("nodes that do not fill their page")
def a_node_twice(image: Image) -> None:
    start = leaf(image) * PAGE + HEADER_BYTES
    image.raw[start : start + 2] = image.raw[start + 2 : start + 4]


@found("nodes that do not fill their page")
def a_node_less(image: Image) -> None:
    at = leaf(image) * PAGE + 12
    (lower,) = struct.unpack_from("=H", image.raw, at)
    image.put(at, "=H", lower - 2)


@found("nodes that do not fill their page")
def a_page_that_begins_later(image: Image) -> None:
    at = leaf(image) * PAGE + 14
    (upper,) = struct.unpack_from("=H", image.raw, at)
    image.put(at, "=H", upper - 8)


@found("no page of this tree")
def an_empty_leaf(image: Image) -> None:
    image.put(leaf(image) * PAGE + 12, "=H", HEADER_BYTES)
    image.put(leaf(image) * PAGE + 14, "=H", PAGE)


@found("no page of this tree")
def a_page_that_is_dirty(image: Image) -> None:
    image.put(leaf(image) * PAGE + 10, "=H", LEAF | 0x10)


@found("nodes that do not fill their page")
def a_value_that_leaves_its_page(image: Image) -> None:
    image.put(small(image).at + 2, "=H", 0x7FFF)


@found("nodes that do not fill their page")
def a_shorter_value(image: Image) -> None:
    node = small(image)
    image.put(node.at, "=H", node.size - 64)


@found("nodes that do not fill their page")
def a_longer_value(image: Image) -> None:
    node = small(image)
    image.put(node.at, "=H", node.size + 64)


@found("nodes that do not fill their page")
def a_value_that_took_from_another(image: Image) -> None:
    """All of them together are as long as before."""
    one, other = [each for each in image.nodes(leaf(image)) if not each.is_big and each.size > 64][
        :2
    ]
    image.put(one.at, "=H", one.size + 32)
    image.put(other.at, "=H", other.size - 32)


@found("nodes that do not fill their page")
def a_value_that_covers_the_next_node(image: Image) -> None:
    """It ends where a third node begins."""
    nodes = [*sorted(image.nodes(leaf(image))), Node((leaf(image) + 1) * PAGE, 0, 0, 0)]
    i = next(i for i, each in enumerate(nodes[:-2]) if not each.is_big)
    image.put(nodes[i].at, "=H", nodes[i].size + nodes[i + 2].at - nodes[i + 1].at)


@found("nodes that do not fill their page")
def a_value_a_byte_too_long(image: Image) -> None:
    node = next(n for n in image.nodes(leaf(image)) if not n.is_big and n.size % 2 == 0)
    image.put(node.at, "=H", node.size + 1)


@found("nodes that do not fill their page")
def a_long_key(image: Image) -> None:
    image.put(small(image).at + 6, "=H", 0x7FFF)


@found("nodes that do not fill their page")
def a_key_of_no_bytes(image: Image) -> None:
    image.put(small(image).at + 6, "=H", 0)


@found("a key of another length")
def a_key_of_seven_bytes(image: Image) -> None:
    """It takes as much room as one of eight."""
    image.put(big(image).at + 6, "=H", 7)


@found("a node of another kind")
def a_strange_flag(image: Image) -> None:
    image.put(small(image).at + 4, "=H", 0x40)


@found("a node of another kind")
def a_tree_among_rows(image: Image) -> None:
    image.put(small(image).at + 4, "=H", 0x02)


@found("keys that do not rise")
def keys_that_fall(image: Image) -> None:
    start = leaf(image) * PAGE + HEADER_BYTES
    first, second = image.raw[start : start + 2], image.raw[start + 2 : start + 4]
    image.raw[start : start + 4] = second + first


@found("a key that belongs to another page")
def a_key_of_the_next_page(image: Image) -> None:
    last, following = image.nodes(leaf(image))[-1], image.nodes(leaf(image, which=2))[0]
    (key,) = struct.unpack_from(">Q", image.raw, following.at + NODE_BYTES)
    image.put(last.at + NODE_BYTES, ">Q", key)
    image.put(following.at + NODE_BYTES, ">Q", key + 1)


@found("a key that belongs to another page")
def a_key_of_the_page_before(image: Image) -> None:
    (key,) = struct.unpack_from(">Q", image.raw, image.nodes(leaf(image))[0].at + NODE_BYTES)
    image.put(image.nodes(leaf(image))[0].at + NODE_BYTES, ">Q", key - 1)


@found("a key that is too large")
def a_key_above_all(image: Image) -> None:
    image.raw[image.nodes(leaf(image, which=-1))[-1].at + NODE_BYTES] |= 0x80


@found("it names a page outside the file")
def a_value_outside(image: Image) -> None:
    image.put(big(image).value, "=Q", 1 << 20)


@found("it names a page outside the file")
def a_value_far_outside(image: Image) -> None:
    image.put(big(image).value, "=Q", (1 << 64) - 2)


@found("it names a page outside the file")
def a_value_in_the_first_page(image: Image) -> None:
    image.put(big(image).value, "=Q", 0)


@found("it names a page that is used twice")
def a_value_on_a_page_of_a_tree(image: Image) -> None:
    image.put(big(image).value, "=Q", leaf(image, OPERATIONS))


@found("it names a page that is used twice")
def a_value_of_another_row(image: Image) -> None:
    start = big(image, 1).value
    image.raw[big(image).value : big(image).value + 8] = image.raw[start : start + 8]


@found("it names a page outside the file")
def a_value_that_reaches_too_far(image: Image) -> None:
    image.put(big(image).at + 2, "=H", 0x7FFF)


@found("it names a page that is used twice")
def a_value_that_reaches_into_the_next(image: Image) -> None:
    node = min((big(image, i) for i in range(8)), key=lambda each: image.raw[each.value])
    image.put(node.at, "=H", node.size + PAGE)


def branch(image: Image) -> tuple[int, list[Node]]:
    (page,) = image.pages[ROWS][BRANCH]
    return page, image.nodes(page)


@found("it names a page that is used twice")
def a_child_of_another_table(image: Image) -> None:
    image.put(branch(image)[1][1].at, "=H", leaf(image, OPERATIONS))


@found("it names a page that is used twice")
def a_child_twice(image: Image) -> None:
    image.put(branch(image)[1][1].at, "=H", leaf(image))
    image.put(branch(image)[1][2].at, "=H", leaf(image))


@found("it names a page that is used twice")
def a_child_that_is_its_parent(image: Image) -> None:
    image.put(branch(image)[1][1].at, "=H", branch(image)[0])


@found("it names a page outside the file")
def a_child_outside(image: Image) -> None:
    image.put(branch(image)[1][1].at + 4, "=H", 0x8000)


@found("it names a page that is used twice")
def a_child_that_is_free(image: Image) -> None:
    """An older state of the same page, perhaps."""
    free = free_list(image)
    old = next(
        page
        for (page,) in struct.iter_unpack("=Q", image.raw[free + 8 : free + 8 + 8 * 3])
        if page not in image.pages[ROWS][LEAF]
    )
    content = image.raw[leaf(image) * PAGE : leaf(image) * PAGE + PAGE]
    image.raw[old * PAGE : old * PAGE + PAGE] = content
    image.put(old * PAGE, "=Q", old)
    image.put(branch(image)[1][1].at, "=H", old)


@found("no page of this tree")
def one_child(image: Image) -> None:
    """All room is taken by its one node, the key of which is long."""
    page, nodes = branch(image)
    image.put(page * PAGE + 12, "=H", HEADER_BYTES + 2)
    image.put(page * PAGE + HEADER_BYTES, "=H", min(nodes).at - page * PAGE)
    image.put(min(nodes).at + 6, "=H", PAGE - (min(nodes).at - page * PAGE) - NODE_BYTES)


@found("nodes that do not fill their page")
def a_key_of_a_branch_of_no_bytes(image: Image) -> None:
    image.put(branch(image)[1][2].at + 6, "=H", 0)


@found("keys that do not rise")
def a_key_of_a_branch_that_falls(image: Image) -> None:
    image.raw[branch(image)[1][2].at + NODE_BYTES] = 0xFF


@found("a key that belongs to another page")
def a_key_of_a_branch_above_its_page(image: Image) -> None:
    """It is that of another key in the page that it leads to."""
    start = image.nodes(leaf(image, which=2))[1].at + NODE_BYTES
    at = branch(image)[1][2].at + NODE_BYTES
    image.raw[at : at + 8] = image.raw[start : start + 8]


@found("no page of this tree")
def a_depth_too_small(image: Image) -> None:
    image.put(image.records[ROWS] + 6, "=H", 1)


@found("no page of this tree")
def a_depth_too_large(image: Image) -> None:
    image.put(image.records[ROWS] + 6, "=H", 3)


@found("a record with strange flags")
def flags_of_a_table(image: Image) -> None:
    image.put(image.records[ROWS] + 4, "=H", 0x04)


@found("no page of this tree")
def a_root_that_is_a_leaf(image: Image) -> None:
    image.put(image.records[ROWS] + 40, "=Q", leaf(image))


@found("it names a page that is used twice")
def a_root_of_another_table(image: Image) -> None:
    at = image.records[OPERATIONS]
    image.raw[image.records[ROWS] : image.records[ROWS] + 48] = image.raw[at : at + 48]


def free_list(image: Image) -> int:
    """Where the longest list of free pages is."""
    nodes = [node for page in image.pages[FREE][LEAF] for node in image.nodes(page)]
    longest = max(nodes, key=lambda node: (not node.is_big, node.size))
    assert longest.size >= 32
    return longest.value


@found("it names a page that is used twice")
def a_free_page_that_is_used(image: Image) -> None:
    at = free_list(image)
    (count,) = struct.unpack_from("=Q", image.raw, at)
    listed = struct.unpack_from(f"={count}Q", image.raw, at + 8)
    used = leaf(image)
    assert listed[0] > used > listed[-1], "the list must still fall"
    i = next(i for i, page in enumerate(listed) if page < used)
    image.put(at + 8 + 8 * i, "=Q", used)


@found("it names a page outside the file")
def a_free_page_outside(image: Image) -> None:
    image.put(free_list(image) + 8, "=Q", 1 << 40)


@found("an impossible list of free pages")
def a_list_that_does_not_fall(image: Image) -> None:
    at = free_list(image)
    image.raw[at + 16 : at + 24] = image.raw[at + 8 : at + 16]


@found("an impossible list of free pages")
def a_list_that_is_longer_than_its_value(image: Image) -> None:
    image.put(free_list(image), "=Q", 1 << 20)


@found("a key that is too large")
def a_list_of_a_time_to_come(image: Image) -> None:
    node = image.nodes(image.pages[FREE][LEAF][-1])[-1]
    image.put(node.at + NODE_BYTES, "=Q", 1 << 40)


@pytest.mark.parametrize("name", DAMAGES)
def test_what_would_lead_lmdb_astray_is_found(name: str, scene: Scene) -> None:
    damage, reason = DAMAGES[name]
    image = scene.image()
    check_trees(scene.path)
    damage(image)
    assert image.raw != scene.good
    scene.path.write_bytes(image.raw)
    with pytest.raises(CorruptionError, match=rf"{reason}, page \d+ of the table") as error:
        check_trees(scene.path)
    assert error.value.path == str(scene.path)
    check_file(scene.path)  # that looks at less


def test_the_names_and_the_small_table_are_checked_before_they_are_read(scene: Scene) -> None:
    image = scene.image()
    check_file(scene.path)
    for table in (NAMES, layout.META):
        node = image.nodes(image.pages[table][LEAF][0])[0]
        for at in (node.at, node.at + 4, node.at + 6):
            raw = bytearray(scene.good)
            raw[at] ^= 0x10
            scene.path.write_bytes(raw)
            with pytest.raises(CorruptionError, match="page"):
                check_file(scene.path)
    raw = bytearray(scene.good)
    raw[image.records[layout.META] + 4] ^= 0x04  # more than one value a key
    scene.path.write_bytes(raw)
    with pytest.raises(CorruptionError, match=r"strange flags.* of the table meta"):
        check_file(scene.path)


# ---------------------------------------------------------------- before something is deleted

HEADS = {"number": (0, "=Q", 1), "kind": (10, "=H", LEAF), "dirty": (10, "=H", 0x14)}
HEADS |= {f"{n} pages": (12, "=I", n) for n in (0, 2, 3, 1 << 20)}


@pytest.mark.parametrize("head", HEADS)
def test_pages_of_a_value_are_counted_before_they_are_freed(head: str, scene: Scene) -> None:
    """What stands in front of a row says how many pages go with it: others' pages, perhaps."""
    image = scene.image()
    node = big(image)
    (page,) = struct.unpack_from("=Q", image.raw, node.value)
    (key,) = struct.unpack_from(">Q", image.raw, node.at + NODE_BYTES)
    assert HEADER_BYTES + node.size <= PAGE
    at, form, value = HEADS[head]
    image.put(page * PAGE + at, form, value)
    scene.path.write_bytes(image.raw)
    check_trees(scene.path)  # that row stays
    check_trees(scene.path, lambda table, keys: (keys != key) | (table != ROWS))
    with pytest.raises(CorruptionError, match=r"pages are not its own, page \d+ of the table rows"):
        check_trees(scene.path, lambda table, keys: (keys == key) & (table == ROWS))


def recovered(scene: Scene, content: bytes) -> Core:
    place = scene.core.place
    place.close()
    scene.path.write_bytes(content)
    scene.path.with_name(layout.STAGE).write_bytes(scene.stage)
    place.forget()
    core = Core(place, place.adapter(), dict(scene.core.wrote))
    core.at = dict(scene.core.at)
    list(core.adapter.recover(0, 0))
    core.next_lsn = core.last + 1
    return core


def with_one_page_more(image: Image, key: Callable[[int], bool]) -> bytes:
    """The row of such a key takes a page of another one along."""
    rows = [node for page in image.pages[ROWS][LEAF] for node in image.nodes(page) if node.is_big]
    keys = [struct.unpack_from(">Q", image.raw, node.at + NODE_BYTES)[0] for node in rows]
    node = next(node for node, number in zip(rows, keys, strict=True) if key(number))
    (page,) = struct.unpack_from("=Q", image.raw, node.value)
    image.put(page * PAGE + 12, "=I", 2)
    return bytes(image.raw)


def test_dropping_deletes_nothing_where_it_would_take_others_along(scene: Scene) -> None:
    core = recovered(scene, with_one_page_more(scene.image(), lambda key: True))
    core.adapter.start(core.next_lsn, core.last)
    everything = rows_read(core, sorted(core.wrote))
    assert everything.keys() == core.wrote.keys()
    with pytest.raises(CorruptionError, match="pages are not its own"):
        core.adapter.drop_below(core.last - 5, *core.live([]))
    assert rows_read(core, sorted(core.wrote)) == everything
    assert len(core.recovers()) == len(everything)
    core.place.close()


def test_giving_up_deletes_nothing_where_it_would_take_others_along(scene: Scene) -> None:
    keep = scene.core.last - 60
    image = scene.image()
    core = recovered(
        scene, with_one_page_more(image, lambda key: key > scene.core.at[keep].location)
    )
    with pytest.raises(CorruptionError, match="pages are not its own"):
        core.adapter.start(keep + 1, keep)
    core.place.forget()
    assert len(core.recovers()) == len(core.wrote)
    core.place.close()


def turn(scene: Scene, at: int, bit: int) -> None:
    """Damage the file while it is open."""
    with open(scene.path, "r+b") as file:
        file.seek(at)
        (octet,) = file.read(1)
        file.seek(at)
        file.write(bytes([octet ^ 1 << bit]))


@pytest.mark.parametrize("table", [OPERATIONS, ROWS])
@pytest.mark.parametrize(("byte", "bit"), [(-2, 0), (0, 7)], ids=["length", "range"])
def test_a_damaged_key_is_told_where_it_is_read(
    scene: Scene, table: bytes, byte: int, bit: int
) -> None:
    """Of the last entry: so the keys still rise."""
    image = scene.image()
    core = recovered(scene, scene.good)
    core.adapter.start(core.next_lsn, core.last)
    image = Image(scene.path.read_bytes(), scene.path)
    turn(scene, image.nodes(leaf(image, table, -1))[-1].at + NODE_BYTES + byte, bit)
    with pytest.raises(CorruptionError, match=r"a key|nodes that do not"):
        core.adapter.drop_below(core.last - 5, *core.live(core.wrote))
    if table == OPERATIONS:
        with pytest.raises(CorruptionError, match=r"a key"):
            core.adapter.read(core.adapter.store.last_lsn)
    core.place.close()


def test_a_key_that_became_another_takes_no_live_payload_along(scene: Scene) -> None:
    """It still fits between its neighbours, and nobody asks for a row of that key."""
    image = scene.image()
    core = recovered(scene, scene.good)
    core.adapter.start(core.next_lsn, core.last)
    image = Image(scene.path.read_bytes(), scene.path)
    lost = small(image)
    content = bytes(image.raw[lost.value : lost.value + lost.size])
    turn(scene, lost.at + NODE_BYTES + 7, 3)
    with pytest.raises(CorruptionError, match=r"the payload at \d+ is missing"):
        core.adapter.drop_below(core.last, *core.live(core.wrote))
    image = Image(scene.path.read_bytes(), scene.path)
    nodes = [node for page in image.pages[ROWS][LEAF] for node in image.nodes(page)]
    assert content in {bytes(image.raw[node.value : node.value + node.size]) for node in nodes}
    core.place.close()


# ---------------------------------------------------------------- any bit


def bits(image: Image) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Every bit that leads LMDB somewhere, and those that say how large a node is.

    They are in heads of pages, pointers, nodes, records and in front of long values.
    """
    spans = [(at, TREE_RECORD_BYTES) for at in image.records.values()]
    sizes = []
    for kinds in image.pages.values():
        for page in [*kinds[BRANCH], *kinds[LEAF]]:
            pointers = image.pointers(page)
            spans.append((page * PAGE, HEADER_BYTES + 2 * len(pointers)))
            for node in image.nodes(page):
                spans.append((node.at, NODE_BYTES + node.key_bytes + 8 * node.is_big))
                if node.is_big:
                    (number,) = struct.unpack_from("=Q", image.raw, node.value)
                    spans.append((number * PAGE, HEADER_BYTES))
                sizes += [(node.at, 2), (node.at + 6, 2)]
    every, of_sizes = (
        [(at + i, bit) for at, size in each for i in range(size) for bit in range(8)]
        for each in (spans, sizes)
    )
    return every, of_sizes


def rows_read(core: Core, lsns: list[int]) -> dict[int, list[bytes]]:
    """The payloads that can be read of these operations."""
    rows = {}
    for lsn in lsns:
        with contextlib.suppress(StorageError, LogGone):
            pin, wanted = core.pin([lsn])
            assert [bytes(pin.read(i)) for i in range(len(wanted))] == wanted
            rows[lsn] = wanted
    return rows


def use(scene: Scene) -> str:
    """Read, write and delete as a buffer does; no live payload may be lost."""
    place, wrote = scene.core.place, dict(scene.core.wrote)
    said = outcome(place, wrote)
    core = Core(place, place.adapter(), wrote)
    core.at = dict(scene.core.at)
    last, live = core.last, sorted(wrote)[::5]
    with contextlib.suppress(CorruptionError):
        list(core.adapter.recover(0, 0))
        core.adapter.start(last + 1, last)
        before = rows_read(core, live)
        core.next_lsn = last + 1
        for turn in range(3):
            core.extend(3, rows=3, row_bytes=3000).sync()
            with contextlib.suppress(CorruptionError):
                core.adapter.drop_below(last - 60 + 30 * turn, *core.live(live))
        core.extend(6, rows=3, row_bytes=3000).sync()
        after = rows_read(core, live)
        assert before.keys() <= after.keys(), "a payload was lost"
        core.adapter.finish(core.last)
    place.close()
    return said


def uses(scene: Scene, changes: list[tuple[int, int]]) -> list[str]:
    """What comes of it with each of these bits turned, in a process of its own."""

    def work(child: Child) -> None:
        while child.hear():
            child.say(use(scene))  # from now on the file may be another one

    child, said = Child(work), []
    for at, bit in changes:
        content = bytearray(scene.good)
        content[at] ^= 1 << bit
        scene.path.write_bytes(content)
        scene.path.with_name(layout.STAGE).write_bytes(scene.stage)
        with contextlib.suppress(BrokenPipeError):
            child.say("go")
        said.append(child.hear())
        assert said[-1], f"bit {bit} of byte {at % PAGE} of page {at // PAGE}: {child.join()}"
    child._out.close()
    child.join()
    return said


def test_no_bit_kills_the_process(scene: Scene) -> None:
    draw, n = random.Random(3), 1500 if LONG else 20
    changes = [change for each in bits(scene.image()) for change in draw.sample(each, n)]
    nothing = (PAGE - 1, 0)  # behind what counts of a first page
    for start in range(0, len(changes), 200):
        said = uses(scene, [nothing, *changes[start : start + 200]])
        assert said[0] == "same"
        assert "refused" in said
