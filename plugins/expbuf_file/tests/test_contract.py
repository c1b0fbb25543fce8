"""The file backend under the contract of storage: default, tiny log files, a file a commit."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from expbuf_core.testing.crash import scratch_folder
from expbuf_core.testing.persistence_suite import PersistenceSuite


class TestFile(PersistenceSuite):
    provider = "file"
    crash_states = 40  # each writes and reads a log file of 1 MiB

    @pytest.fixture
    def tmp_path(self, disk_path: Path) -> Path:
        """On a disk, as most buffers are."""
        return disk_path


class TestSmallFiles(PersistenceSuite):
    provider = "file"
    settings = {"initial_bytes": 1 << 14, "segment_bytes": 1 << 15}  # noqa: RUF012


class TestRename(PersistenceSuite):
    provider = "file"
    settings = {"commit": "rename", "initial_bytes": 1 << 14, "segment_bytes": 1 << 15}  # noqa: RUF012
    appears_whole = True
    many = 100
    crash_states = 40
    flips = 60

    @pytest.fixture
    def tmp_path(self) -> Iterator[Path]:
        """In memory: a sync of the disk for each of thousands of commits takes minutes."""
        folder = scratch_folder()
        yield folder
        shutil.rmtree(folder)
