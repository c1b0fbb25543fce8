"""Nodes that would lead LMDB out of their page or the file are found before LMDB follows them."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from expbuf_core import Experience, ExperienceBuffer
from expbuf_core.errors import CorruptionError
from expbuf_lmdb.pages import BIG, HEADER_BYTES, PageFile, check_trees

LEAF = 0x02
Damage = Callable[[bytearray, int, int], bool]  # page, end of its pointers, first node; if it fits


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pages") / "memory"
    options = {"persistence": "lmdb", "index": {"backend": "exact", "builder": "off"}}
    with ExperienceBuffer.open(folder, **options) as buffer:
        for n in range(60):
            v = np.full(8, n + 1.0)
            buffer.add(Experience(v_embed=v, q_embed=v, question="x" * (6000 * (n % 2))))
    (path,) = folder.glob("*.mdb")
    check_trees(path)
    return path


def put(page: bytearray, at: int, form: str, value: int) -> bool:
    struct.pack_into(form, page, at, value)
    return True


def big(page: bytearray, place: int) -> int:
    """Where a node has the number of the page of its value; 0 if it has none."""
    _, _, flags, key = struct.unpack_from("=HHHH", page, place)
    return place + 8 + key if flags & BIG else 0


DAMAGES: dict[str, Damage] = {
    "a node behind its page": lambda page, _, node: put(page, HEADER_BYTES, "=H", 0xFFF0),
    "a node in the pointers": lambda page, end, node: put(page, HEADER_BYTES, "=H", end - 2),
    "a long key": lambda page, _, node: put(page, node + 6, "=H", 0x7FFF),
    "a strange flag": lambda page, _, node: put(page, node + 4, "=H", 0x40),
    "a long value": lambda page, _, node: not big(page, node) and put(page, node + 2, "=H", 0x7FFF),
    "a value outside": lambda page, _, node: (
        bool(big(page, node)) and put(page, big(page, node), "=Q", 1 << 20)
    ),
    "a value in the first page": lambda page, _, node: (
        bool(big(page, node)) and put(page, big(page, node), "=Q", 0)
    ),
    "a long value elsewhere": lambda page, _, node: (
        bool(big(page, node)) and put(page, node + 2, "=H", 0x7FFF)
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_leads_out_of_a_leaf_is_found(damage: str, stored: Path, tmp_path: Path) -> None:
    raw = stored.read_bytes()
    size = PageFile(stored).page_bytes
    copy, changed, found = tmp_path / stored.name, [], []
    for at in range(2 * size, len(raw), size):
        page = bytearray(raw[at : at + size])
        number, _, flags, lower, _ = struct.unpack_from("=QHHHH", page)
        if number != at // size or flags != LEAF or lower <= HEADER_BYTES:
            continue
        (node,) = struct.unpack_from("=H", page, HEADER_BYTES)
        if not DAMAGES[damage](page, lower, node):
            continue
        copy.write_bytes(raw[:at] + page + raw[at + size :])
        changed.append(at)
        try:
            check_trees(copy)
        except CorruptionError as exc:
            found.append(exc.offset)
    assert found  # other pages are of an older state
    assert set(found) <= set(changed)
