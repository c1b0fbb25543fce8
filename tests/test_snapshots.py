"""Snapshot files: whole, checked, two of them."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from expbuf_core import codec, snapshots
from expbuf_core.codec import AddBody
from expbuf_core.contracts import LoggedOperation
from expbuf_core.crc import crc32
from expbuf_core.errors import CorruptionError, FormatVersionError, StorageError, StorageFull
from expbuf_core.filesystem import FileSystem
from expbuf_core.state import State
from expbuf_core.testing.faults import FaultyFileSystem

UUID = bytes(range(16))
NO_ROWS = np.empty(0, np.uint32)


def state(lsn: int, n: int = 20) -> State:
    """Some state after `lsn`."""
    made = State()
    settings = codec.encode_settings({"metric": "l2", "max_size": 100, "receipts_kept": 5})
    made.apply(LoggedOperation(1, settings.kind, 0, settings.body, 0, NO_ROWS))
    tags = [["even"] if i % 2 == 0 else [] for i in range(n)]
    body = AddBody(
        timestamp=np.arange(n, dtype=np.float64),
        reward=np.where(np.arange(n) % 3 == 0, np.nan, 1.0),
        confidence=np.full(n, 0.5, np.float32),
        priority=np.arange(n, dtype=np.float32),
        vectors=np.ones((n, 2), np.float32),
        labels={"tags": tags, "keys": [None] * n},
    )
    lengths = np.full(n, 9, np.uint32)
    made.apply(LoggedOperation(lsn, codec.ADD, 5, codec.encode_add(body), 77, lengths))
    return made


def write(folder: Path, lsn: int, fs: FileSystem | None = None, uuid: bytes = UUID) -> Path:
    return snapshots.write(folder, uuid, *state(lsn).dump(), fs or FileSystem())


def same(a: State, b: State) -> bool:
    (tree_a, columns_a), (tree_b, columns_b) = a.dump(), b.dump()
    return tree_a == tree_b and all(
        np.array_equal(columns_a[k], columns_b[k], equal_nan=columns_a[k].dtype.kind == "f")
        for k in columns_a
    )


def test_a_state_round_trips(tmp_path: Path) -> None:
    path = write(tmp_path, 9)
    assert path == snapshots.path_of(tmp_path, 9)
    assert os.listdir(path.parent) == [path.name]
    found = snapshots.read(tmp_path, 9, UUID)
    assert same(found, state(9))
    assert (found.lsn, found.count, found.next_id) == (9, 20, 25)
    assert found.settings["metric"] == "l2"
    assert found.tag_sets[found.tags[found.find_one(5)]] == ("even",)


def test_an_empty_state_round_trips(tmp_path: Path) -> None:
    empty = State()
    snapshots.write(tmp_path, UUID, *empty.dump(), FileSystem())
    assert same(snapshots.read(tmp_path, 0, UUID), empty)


def test_every_changed_byte_is_noticed(tmp_path: Path) -> None:
    path = write(tmp_path, 9)
    good = path.read_bytes()
    for at in [*range(300), *range(300, len(good), 5), len(good) - 1]:
        raw = bytearray(good)
        raw[at] ^= 0x40
        path.write_bytes(raw)
        with pytest.raises(CorruptionError) as caught:
            snapshots.read(tmp_path, 9, UUID)
        assert caught.value.path == str(path)
        assert caught.value.offset is not None
        assert caught.value.offset <= at


def test_cut_and_longer_files_are_noticed(tmp_path: Path) -> None:
    path = write(tmp_path, 9)
    good = path.read_bytes()
    for end in [*range(120), *range(120, len(good), 37), len(good) - 1]:
        path.write_bytes(good[:end])
        with pytest.raises(CorruptionError, match="offset"):
            snapshots.read(tmp_path, 9, UUID)
    path.write_bytes(good + b"\0")
    with pytest.raises(CorruptionError, match="behind the end"):
        snapshots.read(tmp_path, 9, UUID)


def test_a_stranger_or_a_wrong_name_is_noticed(tmp_path: Path) -> None:
    path = write(tmp_path, 9)
    with pytest.raises(CorruptionError, match="another buffer"):
        snapshots.read(tmp_path, 9, bytes(16))
    path.rename(snapshots.path_of(tmp_path, 10))
    with pytest.raises(CorruptionError, match="lsn 9 under this name"):
        snapshots.read(tmp_path, 10, UUID)


def test_a_newer_version_is_told(tmp_path: Path) -> None:
    path = write(tmp_path, 9)
    raw = bytearray(path.read_bytes())
    raw[8] = 9
    end = snapshots._HEADER.size - 4
    raw[end : end + 4] = crc32(raw[:end]).to_bytes(4, "little")
    path.write_bytes(raw)
    with pytest.raises(FormatVersionError, match="version 9"):
        snapshots.read(tmp_path, 9, UUID)
    with pytest.raises(FormatVersionError):  # never passed over for an older one
        snapshots.newest(tmp_path, UUID)


def rewritten(path: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    """Change the tree, with all checksums right."""
    raw, size = path.read_bytes(), snapshots._HEADER.size
    magic, version, _, tree_bytes, uuid, _ = snapshots._HEADER.unpack_from(raw)
    tree = json.loads(raw[size : size + tree_bytes])
    edit(tree)
    text = json.dumps(tree).encode()
    head = struct.pack("<8sIIQ16s", magic, version, crc32(text), len(text), uuid)
    head += struct.pack("<I", crc32(head))
    path.write_bytes(head + text + raw[size + tree_bytes :])


NONSENSE: list[tuple[str, Any]] = [
    ("next_id", 1 << 70),
    ("next_id", -1),
    ("next_id", 0),
    ("next_id", "x"),
    ("reserved_id", 1 << 70),
    ("total_added", -5),
    ("total_added", True),
    ("receipts_horizon", "a"),
    ("receipts", 5),
    ("receipts", [["zz", 1]]),
    ("receipts", [["00", "x"]]),
    ("rewards", {"x": {"a": 1}}),
    ("rewards", {"5": {"a": "b"}}),
    ("tag_sets", []),
    ("tag_sets", {}),
    ("settings", {}),
    ("settings", None),
    ("settings.max_size", 0),
    ("settings.max_size", 10**30),
    ("settings.metric", "zzz"),
    ("settings.metric", []),
    ("settings.representation", 1 << 40),
    ("settings.v_dim", 1 << 40),
    ("settings.fusion", None),
    ("settings.fusion", {"name": 1, "version": 1, "settings": {}}),
    ("columns", {}),
    ("columns", 5),
    ("columns.id", ["|O", 5, 0]),
    ("columns.id", ["<i8", 1 << 60, 0]),
    ("columns.id", ["<i8", -1, 0]),
    ("columns.id", ["zz", 1, 0]),
    ("columns.flags", ["|u1", 0, 0]),
]


@pytest.mark.parametrize(("key", "value"), NONSENSE)
def test_a_tree_that_makes_no_sense(tmp_path: Path, key: str, value: Any) -> None:
    """With all checksums right: damage like any other, and the older snapshot is used."""

    def edit(tree: dict[str, Any]) -> None:
        *outer, last = key.split(".")
        (tree[outer[0]] if outer else tree)[last] = value

    write(tmp_path, 9)
    path = write(tmp_path, 20)
    rewritten(path, lambda tree: None)
    assert same(snapshots.read(tmp_path, 20, UUID), state(20))
    rewritten(path, edit)
    with pytest.raises(CorruptionError, match="offset") as caught:
        snapshots.read(tmp_path, 20, UUID)
    assert (caught.value.path, caught.value.lsn) == (str(path), 20)
    found, errors = snapshots.newest(tmp_path, UUID)
    assert found is not None
    assert (found.lsn, len(errors)) == (9, 1)


def test_a_tree_that_is_none(tmp_path: Path) -> None:
    path = write(tmp_path, 9)
    raw, size = path.read_bytes(), snapshots._HEADER.size
    text = b"[" * 100_000
    head = struct.pack("<8sIIQ16s", raw[:8], 1, crc32(text), len(text), UUID)
    path.write_bytes(head + struct.pack("<I", crc32(head)) + text + raw[size:])
    with pytest.raises(CorruptionError, match="makes no sense"):
        snapshots.read(tmp_path, 9, UUID)


def test_the_newest_intact_one_is_found(tmp_path: Path) -> None:
    assert snapshots.newest(tmp_path, UUID) == (None, [])
    for lsn in (9, 100, 20):
        write(tmp_path, lsn)
    assert snapshots.available(tmp_path) == [100, 20, 9]
    found, errors = snapshots.newest(tmp_path, UUID)
    assert found is not None
    assert (found.lsn, errors) == (100, [])
    for lsn in (100, 20):
        snapshots.path_of(tmp_path, lsn).write_bytes(b"short")
    found, errors = snapshots.newest(tmp_path, UUID)
    assert found is not None
    assert found.lsn == 9
    assert [error.lsn for error in errors] == [100, 20]


def test_one_that_is_dropped_meanwhile_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process takes a snapshot, and drops the old ones, between listing and reading."""
    write(tmp_path, 9)
    read = snapshots.read
    asked = []

    def late(folder: Path, lsn: int, uuid: bytes) -> State:
        asked.append(lsn)
        if len(asked) == 1:
            write(folder, 20)
            snapshots.drop_old(folder, FileSystem(), keep=1)
        return read(folder, lsn, uuid)

    monkeypatch.setattr(snapshots, "read", late)
    found, errors = snapshots.newest(tmp_path, UUID)
    assert found is not None
    assert (found.lsn, errors) == (20, [])
    assert asked[0] == 9


def test_other_files_are_left_alone(tmp_path: Path) -> None:
    write(tmp_path, 9)
    folder = tmp_path / "snapshots"
    for name in ("snapshot.9.snap", "snapshot.00000000000000000009.snap.bak", "notes"):
        (folder / name).write_text("mine")
    assert snapshots.available(tmp_path) == [9]
    snapshots.drop_old(tmp_path, FileSystem())
    assert len(os.listdir(folder)) == 4


def test_old_ones_go(tmp_path: Path) -> None:
    assert snapshots.drop_old(tmp_path, FileSystem()) == 0
    for lsn in (5, 6, 7, 8):
        write(tmp_path, lsn)
    assert snapshots.drop_old(tmp_path, FileSystem()) == 7
    assert snapshots.available(tmp_path) == [8, 7]


@pytest.mark.parametrize("call", ["create", "pwrite", "fsync", "replace", "truncate", "mkdir"])
def test_what_fails_leaves_no_trace(tmp_path: Path, call: str) -> None:
    if call != "mkdir":
        write(tmp_path, 5)
    fs = FaultyFileSystem()
    fs.fail(call)
    with pytest.raises(StorageError, match="cannot write the snapshot"):
        write(tmp_path, 9, fs)
    assert snapshots.available(tmp_path) == ([] if call == "mkdir" else [5])
    if call != "mkdir":
        assert len(os.listdir(tmp_path / "snapshots")) == 1
    write(tmp_path, 9, fs)
    assert snapshots.available(tmp_path)[0] == 9


def test_a_full_disk(tmp_path: Path) -> None:
    fs = FaultyFileSystem()
    fs.limit(100)
    with pytest.raises(StorageFull):
        write(tmp_path, 9, fs)
    assert snapshots.available(tmp_path) == []


def test_it_is_read_back_before_it_counts(tmp_path: Path) -> None:
    """A disk that writes something else is found out before the old logs go."""

    class Liar(FileSystem):
        def pwrite(self, fd: int, data: Any, offset: int) -> None:
            raw = bytearray(data)
            raw[-1] ^= 1
            super().pwrite(fd, raw, offset)

    with pytest.raises(CorruptionError):
        write(tmp_path, 9, Liar())


def test_the_tree_is_json(tmp_path: Path) -> None:
    tree, _ = state(9).dump()
    assert json.loads(json.dumps(tree)) == tree
