"""Segment files and their manifest: derived, checked, replaced as a whole."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from expbuf_core import segments
from expbuf_core.builtin.exact import ExactIndexBackend, ExactSegment, ExactSettings
from expbuf_core.contracts import IndexContext
from expbuf_core.crc import crc32
from expbuf_core.errors import CorruptionError, StorageError
from expbuf_core.filesystem import FileSystem
from expbuf_core.segments import Manifest, OpenSegment, SegmentInfo
from expbuf_core.testing.faults import FaultyFileSystem

DIM, ROWS = 3, 50
BACKEND = ExactIndexBackend(ExactSettings(), IndexContext(DIM, "l2"))
IDS = np.arange(10, 10 + 2 * ROWS, 2)
VECTORS = np.random.default_rng(0).standard_normal((ROWS, DIM)).astype(np.float32)


def write(folder: Path, name: str = "000001", fs: FileSystem | None = None) -> SegmentInfo:
    return segments.write_segment(
        folder,
        name,
        uuid=bytes(16),
        ids=IDS,
        vectors=iter([VECTORS[:20], VECTORS[20:]]),
        dim=DIM,
        end_id=200,
        backend_name="exact",
        backend=BACKEND,
        fs=fs or FileSystem(),
    )


def open_it(folder: Path, info: SegmentInfo, live: Any = None, **how: Any) -> OpenSegment:
    wanted = IDS if live is None else live
    return segments.open_segment(folder, info, DIM, BACKEND, wanted, filters=True, **how)


def manifest(*infos: SegmentInfo, generation: int = 1) -> Manifest:
    return Manifest(7, generation, DIM, "l2", "('ü', 0)", infos)


def test_a_segment_round_trips(tmp_path: Path) -> None:
    info = write(tmp_path)
    assert (info.rows, info.first_id, info.end_id) == (ROWS, 10, 200)
    assert sorted(os.listdir(tmp_path)) == ["000001.exact", "000001.vectors"]
    opened = open_it(tmp_path, info)
    np.testing.assert_array_equal(opened.ids, IDS)
    np.testing.assert_array_equal(opened.vectors, VECTORS)
    assert opened.vectors.ctypes.data % 64 == 0
    assert not opened.vectors.flags.writeable
    assert (opened.dead, bool(opened.live.all())) == (0, True)
    ids, similarities = opened.index.search(VECTORS[7:8], 1, None)
    assert ids[0, 0] == IDS[7]
    assert similarities[0, 0] == pytest.approx(0, abs=1e-6)
    assert segments.describe(opened)["rows"] == ROWS


def test_rows_that_are_gone_are_out_from_the_start(tmp_path: Path) -> None:
    info = write(tmp_path)
    live = np.array([*IDS[5:20], *IDS[30:], 500, 501])
    opened = open_it(tmp_path, info, live)
    assert opened.dead == 15
    np.testing.assert_array_equal(opened.ids[opened.live], np.intersect1d(IDS, live))
    np.testing.assert_array_equal(
        np.unpackbits(opened.bitmap, bitorder="little")[:ROWS].astype(bool), opened.live
    )
    assert open_it(tmp_path, info, np.empty(0, np.int64)).dead == ROWS


def test_rows_only_ever_go_out(tmp_path: Path) -> None:
    opened = open_it(tmp_path, write(tmp_path))
    opened.remove(np.array([10, 11, 12, 12, 999, -5, IDS[-1]]))
    assert opened.dead == 3
    opened.remove(np.array([10, 12]))
    opened.remove(np.empty(0, np.int64))
    assert opened.dead == 3
    bits = np.unpackbits(opened.bitmap, bitorder="little")[:ROWS].astype(bool)
    np.testing.assert_array_equal(bits, opened.live)
    assert opened.ids[~opened.live].tolist() == [10, 12, IDS[-1]]


def test_large_files_are_synced_as_they_grow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a commit of another process would wait until all of it is on disk."""

    class Counting(FileSystem):
        synced: ClassVar[list[int]] = []

        def fdatasync(self, fd: int) -> None:
            self.synced.append(os.fstat(fd).st_size)
            super().fdatasync(fd)

    monkeypatch.setattr("expbuf_core.filesystem._PACE_BYTES", 100)
    Counting().write_atomically(tmp_path / "file", [b"x" * 30] * 10)
    assert Counting.synced == [120, 240]
    assert (tmp_path / "file").read_bytes() == b"x" * 300


@pytest.mark.parametrize("hurry", [False, True])
def test_an_index_that_is_verified_by_its_backend_is_read_once(
    hurry: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info, read = write(tmp_path), []
    monkeypatch.setattr(segments, "_verify", lambda path, *_, **__: read.append(path.name))
    open_it(tmp_path, info, verifies=True, hurry=hurry)
    assert read == ["000001.vectors", "000001.exact"]  # which file it was is not said
    read.clear()
    monkeypatch.setattr(ExactSegment, "file_crc", info.index_crc)
    open_it(tmp_path, info, verifies=True, hurry=hurry)
    assert read == ["000001.vectors"]
    monkeypatch.setattr(ExactSegment, "file_crc", info.index_crc ^ 1)
    with pytest.raises(CorruptionError, match="not the file that"):
        open_it(tmp_path, info, verifies=True, hurry=hurry)


@pytest.mark.parametrize("hurry", [False, True])
def test_damaged_vectors_are_noticed_beside_an_index_that_verifies_itself(
    hurry: bool, tmp_path: Path
) -> None:
    info, path = write(tmp_path), tmp_path / "000001.vectors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    with pytest.raises(CorruptionError, match="built again"):
        open_it(tmp_path, info, verifies=True, hurry=hurry)


@pytest.mark.parametrize("ids", [np.arange(5, 40), np.arange(5, 40, 3), np.array([7])])
def test_rows_of_ids_with_and_without_gaps(ids: Any) -> None:
    wanted = np.arange(60)
    rows = segments.rows_of(ids, wanted)
    found = ids[rows] == wanted
    np.testing.assert_array_equal(wanted[found], ids)
    np.testing.assert_array_equal(rows[found], np.arange(len(ids)))


@pytest.mark.parametrize("hurry", [False, True])
@pytest.mark.parametrize("kind", ["vectors", "exact"])
def test_damage_is_noticed_before_it_is_used(tmp_path: Path, kind: str, hurry: bool) -> None:
    info = write(tmp_path)
    path = tmp_path / f"000001.{kind}"
    good = path.read_bytes()
    for at in (*range(0, len(good), max(1, len(good) // 50)), len(good) - 1):
        raw = bytearray(good)
        raw[at] ^= 1
        path.write_bytes(raw)
        with pytest.raises(CorruptionError, match="built again") as caught:
            open_it(tmp_path, info, hurry=hurry)
        assert caught.value.path == str(path)
    for other in (good[:-1], good + b"\0", good[:10], b""):
        path.write_bytes(other)
        with pytest.raises(CorruptionError):
            open_it(tmp_path, info, hurry=hurry)
    path.unlink()
    with pytest.raises(StorageError):
        open_it(tmp_path, info, hurry=hurry)
    path.write_bytes(good)
    open_it(tmp_path, info, hurry=hurry)


def test_vectors_of_another_dimension(tmp_path: Path) -> None:
    write(tmp_path)
    with pytest.raises(CorruptionError, match="dimension 4"):
        segments.map_vectors(segments.vectors_path(tmp_path, "000001"), 4)
    (tmp_path / "empty").write_bytes(b"")
    with pytest.raises(CorruptionError):
        segments.map_vectors(tmp_path / "empty", DIM)


@pytest.mark.parametrize("call", ["create", "pwrite", "fsync", "replace", "sync_folder", "open"])
def test_what_fails_is_no_segment(tmp_path: Path, call: str) -> None:
    fs = FaultyFileSystem()
    fs.fail(call)
    with pytest.raises(StorageError):
        write(tmp_path, fs=fs)
    info = write(tmp_path, "000002", fs)
    segments.write_manifest(tmp_path, manifest(info), fs)
    segments.drop_unlisted(tmp_path, manifest(info), fs)
    names = ["000002.exact", "000002.vectors", "manifest.json"]
    assert sorted(os.listdir(tmp_path)) == names


# ---------------------------------------------------------------- the manifest


def test_a_manifest_round_trips(tmp_path: Path) -> None:
    assert segments.read_manifest(tmp_path) is None
    info = write(tmp_path)
    wanted = manifest(info, info._replace(name="000002"))
    segments.write_manifest(tmp_path, wanted, FileSystem())
    assert segments.read_manifest(tmp_path) == wanted
    newer = manifest(generation=2)
    segments.write_manifest(tmp_path, newer, FileSystem())
    assert segments.read_manifest(tmp_path) == newer


def test_every_changed_byte_of_a_manifest_is_noticed_or_harmless(tmp_path: Path) -> None:
    wanted = manifest(write(tmp_path))
    segments.write_manifest(tmp_path, wanted, FileSystem())
    path = tmp_path / "manifest.json"
    good = path.read_bytes()
    for at in range(len(good)):
        for flip in (1, 0x80):
            raw = bytearray(good)
            raw[at] ^= flip
            path.write_bytes(raw)
            found = segments.read_manifest_or_none(tmp_path)
            if found is None:
                with pytest.raises(CorruptionError) as caught:
                    segments.read_manifest(tmp_path)
                assert caught.value.path == str(path)
            else:
                assert found == wanted
    for end in range(len(good)):
        path.write_bytes(good[:end])
        assert segments.read_manifest_or_none(tmp_path) is None


@pytest.mark.parametrize(
    "text",
    ["", "null", "[]", "7", '"x"', "{}", '{"manifest": 1, "crc": 0}', '{"manifest": [], "crc": 1}',
     "[" * 100_000, '{"crc": 223132457, "manifest": []}', '{"manifest": [], "crc": 3733663341}'],
)  # fmt: skip
def test_what_is_no_manifest(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(CorruptionError, match="built again"):
        segments.read_manifest(tmp_path)


def test_a_manifest_with_a_fitting_checksum_and_no_sense(tmp_path: Path) -> None:
    bodies: list[Any] = [
        [],
        7,
        "x",
        {},
        {"segments": 1},
        {"segments": [{}]},
        {"segments": [], "lsn": 1},
    ]
    for body in bodies:
        document = {"manifest": body, "crc": crc32(json.dumps(body, sort_keys=True).encode())}
        (tmp_path / "manifest.json").write_text(json.dumps(document))
        with pytest.raises(CorruptionError):
            segments.read_manifest(tmp_path)


NONSENSE: list[tuple[str, Any]] = [
    ("lsn", 1 << 70),
    ("lsn", -1),
    ("generation", 1 << 70),
    ("dim", "x"),
    ("metric", 7),
    ("representation", 5),
    ("segments.rows", -1),
    ("segments.rows", True),
    ("segments.name", "../expbuf.json"),
    ("segments.name", "a/b\0c"),
    ("segments.name", "x" * 5000),
    ("segments.backend", "../x"),
    ("segments.first_id", 1 << 70),
    ("segments.vectors_bytes", "x"),
]


@pytest.mark.parametrize(("key", "value"), NONSENSE)
def test_a_manifest_that_names_what_cannot_be(tmp_path: Path, key: str, value: Any) -> None:
    segments.write_manifest(tmp_path, manifest(write(tmp_path)), FileSystem())
    path = tmp_path / "manifest.json"
    document = json.loads(path.read_bytes())
    outer, _, last = key.rpartition(".")
    facts = document["manifest"]["segments"][0] if outer else document["manifest"]
    facts[last] = value
    document["crc"] = crc32(json.dumps(document["manifest"], sort_keys=True).encode())
    path.write_text(json.dumps(document))
    with pytest.raises(CorruptionError, match=f"{last} = "):
        segments.read_manifest(tmp_path)


@pytest.mark.parametrize("wrong", [{"rows": 3}, {"first_id": 11}, {"end_id": 12}])
def test_a_segment_of_other_ids_than_listed(tmp_path: Path, wrong: dict[str, int]) -> None:
    """Searches would miss what is in it."""
    info = write(tmp_path)._replace(**wrong)
    with pytest.raises(CorruptionError, match="other ids"):
        open_it(tmp_path, info)


def test_unlisted_files_go(tmp_path: Path) -> None:
    segments.drop_unlisted(tmp_path, None, FileSystem())
    old, new = write(tmp_path, "000001"), write(tmp_path, "000002")
    (tmp_path / "000003.vectors.99.tmp").write_bytes(b"half")
    segments.write_manifest(tmp_path, manifest(new), FileSystem())
    opened = open_it(tmp_path, old)
    segments.drop_unlisted(tmp_path, manifest(new), FileSystem())
    assert sorted(os.listdir(tmp_path)) == [
        "000002.exact",
        "000002.vectors",
        "manifest.json",
    ]
    np.testing.assert_array_equal(opened.vectors, VECTORS)  # mapped: readable to the end
