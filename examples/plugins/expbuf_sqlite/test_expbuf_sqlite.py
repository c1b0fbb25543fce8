"""The SQLite backend under the contract of storage."""

import expbuf_sqlite
import pytest
from expbuf_core.errors import StorageFull
from expbuf_core.testing import PersistenceSuite
from expbuf_core.testing.persistence_log import operation


class TestSQLite(PersistenceSuite):
    provider = expbuf_sqlite.expbuf_register_persistence(None)[0]
    writes_through_fs = False  # SQLite writes by itself

    def stored_files(self, folder):
        """Without the index of the WAL, which SQLite makes anew."""
        return [path for path in super().stored_files(folder) if not path.name.endswith("-shm")]

    def failing_sync(self, fs, adapter, *, drop):
        pytest.skip("each append is durable: `sync` has nothing to do that could fail")

    def test_p40_a_full_disk(self, tmp_path):
        """P40: a full database refuses appends and stays as it was; with room it goes on."""
        core = self.core(tmp_path).create().extend(5)
        writer = core.adapter._db._writer
        writer.execute("PRAGMA max_page_count = 20")
        with pytest.raises(StorageFull):
            core.extend(50, rows=3, row_bytes=5000)
        core.follows()
        writer.execute("PRAGMA max_page_count = 1000000")
        core.extend(5).finish().reopen()

    def test_p10_an_append_that_breaks_off(self, tmp_path):
        """P10: where a transaction breaks off, nothing of it stays."""
        core = self.core(tmp_path).create().extend(5)
        bad = operation(core.next_lsn + 1, 3)
        bad = bad._replace(operation=bad.operation._replace(kind=1 << 20))
        with pytest.raises(Exception, match="format"):
            core.adapter.append([operation(core.next_lsn, 3), bad], 0)
        core.follows()
        core.extend(3).finish().reopen()
