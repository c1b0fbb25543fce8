"""Checksums of whole files, in one piece and in two."""

from __future__ import annotations

import random
from pathlib import Path
from zlib import crc32

import pytest

from expbuf_core import checksums
from expbuf_core.errors import StorageError


@pytest.mark.parametrize("first", [0, 1, 7, 4096, 99_999])
@pytest.mark.parametrize("second", [0, 1, 8, 4097, 65_536, 300_001])
def test_checksums_of_parts_are_joined(first: int, second: int) -> None:
    data = random.Random(first * second).randbytes(first + second)
    parts = crc32(data[:first]), crc32(data[first:])
    assert checksums.joined_crc(*parts, second) == crc32(data)


@pytest.mark.parametrize("cores", [1, 2])
@pytest.mark.parametrize("size", [0, 1, 999, 1000, 1001, 2 * checksums._CHUNK + 77, 1_500_001])
def test_a_file_in_two_parts(
    size: int, cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checksums, "_SPLIT", 1000)
    monkeypatch.setattr(checksums.os, "sched_getaffinity", lambda pid: set(range(cores)))
    data = random.Random(size).randbytes(size)
    path = tmp_path / "file"
    path.write_bytes(data)
    for hurry in (False, True):
        assert checksums.file_crc(path, hurry=hurry) == (size, crc32(data))
        assert checksums.file_crc(path, size, hurry=hurry) == (size, crc32(data))
        assert checksums.file_crc(path, size + 1, hurry=hurry) == (size, 0)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="no-file"):
        checksums.file_crc(tmp_path / "no-file")
