"""LMDB: one transaction a commit, synced, as it does by default."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any, ClassVar, Literal

from benchmarks.peers.base import Material, Peer

lmdb: Any = importlib.import_module("lmdb")


class Lmdb(Peer):
    """A key and the bytes."""

    distributions = ("lmdb",)
    writers: ClassVar[Literal["processes", "threads", "none"]] = "processes"
    single = False
    advice = "defaults (sync, metasync)"

    def __init__(self, folder: Path, material: Material) -> None:
        super().__init__(folder, material)
        size = max(1 << 30, 4 * material.capacity * material.payload_bytes)
        self._db = lmdb.open(str(folder / "lmdb"), map_size=size)

    def _put(self, transaction: Any, key: int) -> None:
        material = self.material
        value = material.vector(key).tobytes() + material.text(key).encode()
        transaction.put(key.to_bytes(8, "big"), value)

    def add(self, key: int) -> None:
        with self._db.begin(write=True) as transaction:
            self._put(transaction, key)

    def add_batch(self, start: int, stop: int) -> None:
        with self._db.begin(write=True) as transaction:
            for key in range(start, stop):
                self._put(transaction, key)

    def count(self) -> int:
        return int(self._db.stat()["entries"])

    def close(self) -> None:
        self._db.close()
