"""The LMDB backend under the contract of storage."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from expbuf_core.contracts import PersistenceAdapter
from expbuf_core.errors import StorageError
from expbuf_core.testing.faults import FaultyFileSystem
from expbuf_core.testing.persistence_suite import PersistenceSuite
from expbuf_lmdb.adapter import LMDBPersistenceAdapter
from expbuf_lmdb.environment import Environment


class LMDBSuite(PersistenceSuite):
    provider = "lmdb"
    writes_through_fs = False  # LMDB writes and syncs its file itself

    def stored_files(self, folder: Path) -> list[Path]:
        found = super().stored_files(folder)
        return [p for p in found if not p.name.endswith("-lock") and p.parent.name != "locks"]

    @contextlib.contextmanager
    def failing_sync(
        self, fs: FaultyFileSystem, adapter: PersistenceAdapter, *, drop: bool
    ) -> Iterator[None]:
        assert isinstance(adapter, LMDBPersistenceAdapter)

        def failing(*_: object) -> None:
            raise StorageError("a simulated failure of LMDB's sync")

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Environment, "write", failing)
            yield


class TestLargeStage(LMDBSuite):
    settings = {"stage_bytes": 1 << 18}  # noqa: RUF012

    @pytest.fixture
    def tmp_path(self, disk_path: Path) -> Path:
        """On a disk, as most buffers are."""
        return disk_path


class TestSmallStage(LMDBSuite):
    settings = {"map_bytes": 1 << 20, "stage_bytes": 1 << 14}  # noqa: RUF012
