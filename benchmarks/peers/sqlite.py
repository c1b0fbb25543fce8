"""SQLite, and sqlite-vec on it."""

from __future__ import annotations

import importlib
import threading
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from benchmarks.peers.base import Material, Peer

# apsw brings an SQLite of its own that may load extensions; many Pythons' sqlite3 may not.
apsw: Any = importlib.import_module("apsw")


class Sqlite(Peer):
    """One table, in WAL mode; synchronous=FULL syncs every commit."""

    distributions: tuple[str, ...] = ("apsw",)
    writers: ClassVar[Literal["processes", "threads", "none"]] = "processes"
    single = False
    advice = "journal_mode=WAL, synchronous=FULL; by its documents the least that is durable"
    table = "CREATE TABLE IF NOT EXISTS e (id INTEGER PRIMARY KEY, v BLOB, text TEXT)"
    insert = "INSERT INTO e (id, v, text) VALUES (?, ?, ?)"

    def __init__(self, folder: Path, material: Material) -> None:
        super().__init__(folder, material)
        self._local = threading.local()
        self._db.execute(self.table.format(dim=material.dim))

    @property
    def _db(self) -> Any:
        """This thread's connection."""
        db = getattr(self._local, "db", None)
        if db is None:
            db = self._local.db = apsw.Connection(str(self.folder / "e.db"))
            db.set_busy_timeout(30_000)
            self._prepare(db)
            for pragma in ("journal_mode=WAL", "synchronous=FULL"):
                list(db.execute(f"PRAGMA {pragma}"))
        return db

    def _prepare(self, db: Any) -> None:
        """For subclasses."""

    def add(self, key: int) -> None:
        row = (key, self.material.vector(key).tobytes(), self.material.text(key))
        self._db.execute(self.insert, row)

    def add_batch(self, start: int, stop: int) -> None:
        material = self.material
        rows = [
            (key, material.vector(key).tobytes(), material.text(key)) for key in range(start, stop)
        ]
        db = self._db
        db.execute("BEGIN IMMEDIATE")
        db.executemany(self.insert, rows)
        db.execute("COMMIT")

    def count(self) -> int:
        return int(next(iter(self._db.execute("SELECT count(*) FROM e")))[0])

    def close(self) -> None:
        self._db.close()


class SqliteVec(Sqlite):
    """A vec0 table: every search compares every vector."""

    distributions = ("sqlite-vec", "apsw")
    advice = "vec0 table with the text as an auxiliary column; WAL, synchronous=FULL"
    table = (
        "CREATE VIRTUAL TABLE IF NOT EXISTS e USING "
        "vec0(id INTEGER PRIMARY KEY, v float[{dim}] distance_metric=cosine, +text TEXT)"
    )

    def _prepare(self, db: Any) -> None:
        sqlite_vec: Any = importlib.import_module("sqlite_vec")
        db.enable_load_extension(True)
        db.load_extension(sqlite_vec.loadable_path())

    def search(self, query: NDArray[np.float32], k: int) -> list[int]:
        found = self._db.execute(
            "SELECT id, text FROM e WHERE v MATCH ? AND k = ?", (query.tobytes(), k)
        )
        return [row[0] for row in found]
