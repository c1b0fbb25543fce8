"""The SQLite backend under the contract of storage.

SQLite writes to the disk by itself, so its faults are played here: a transaction that fails before
or after its changes, and a database that may not grow.
"""

import contextlib
import sqlite3

import expbuf_sqlite
import pytest
from expbuf_core.testing import PersistenceSuite
from expbuf_core.testing.persistence_log import operation


class TestSQLite(PersistenceSuite):
    provider = expbuf_sqlite.expbuf_register_persistence(None)[0]
    writes_through_fs = False

    def stored_files(self, folder):
        """Without the index of the WAL, which SQLite makes anew."""
        return [path for path in super().stored_files(folder) if not path.name.endswith("-shm")]

    def each_failure(self, *, writes=False):
        make, writing = expbuf_sqlite.SQLitePersistence.__init__, expbuf_sqlite.Database.writing

        def made(adapter, settings, context):
            make(adapter, settings, context)
            adapter._db.fs = context.fs

        def strike(database):
            try:
                database.fs.sync_folder(database.path.parent)  # counts, and may fail
            except OSError as exc:
                raise sqlite3.OperationalError(f"disk I/O error: {exc}") from exc

        @contextlib.contextmanager
        def failing(database):
            with writing(database) as db:
                strike(database)
                yield db
                strike(database)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(expbuf_sqlite.SQLitePersistence, "__init__", made)
            patch.setattr(expbuf_sqlite.Database, "writing", failing)
            yield from super().each_failure(writes=writes)

    @contextlib.contextmanager
    def full_disk(self, fs, adapter):
        writer = adapter._db._writer
        (pages,) = writer.execute("PRAGMA page_count").fetchone()
        writer.execute(f"PRAGMA max_page_count = {pages}")
        yield
        writer.execute("PRAGMA max_page_count = 1000000")

    def test_p10_an_append_that_breaks_off(self, tmp_path):
        """P10: where a transaction breaks off, nothing of it stays."""
        core = self.core(tmp_path).create().extend(5)
        bad = operation(core.next_lsn + 1, 3)
        bad = bad._replace(operation=bad.operation._replace(kind=1 << 20))
        with pytest.raises(Exception, match="format"):
            core.adapter.append([operation(core.next_lsn, 3), bad], 0)
        core.follows()
        core.extend(3).finish().reopen()
