"""LanceDB."""

from __future__ import annotations

import importlib
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from benchmarks.peers.base import Material, NotOffered, Peer, recall_of, tuned

lancedb: Any = importlib.import_module("lancedb")
pa: Any = importlib.import_module("pyarrow")


class Lance(Peer):
    """One table. Each add is a new version with a file of its own."""

    distributions = ("lancedb", "pyarrow")
    survives_power = "what the system had written: an add calls no fsync"
    writers: ClassVar[Literal["processes", "threads", "none"]] = "processes"
    single = False
    advice = "Arrow tables; from 50,000 rows on an IVF_HNSW_SQ index, nprobes and refine_factor "
    advice += "raised until recall 0.95; below, its documents advise none"

    def __init__(self, folder: Path, material: Material) -> None:
        super().__init__(folder, material)
        self._schema = pa.schema(
            [
                ("id", pa.int64()),
                ("vector", pa.list_(pa.float32(), material.dim)),
                ("text", pa.string()),
            ]
        )
        self._db = lancedb.connect(str(folder / "lance"), read_consistency_interval=timedelta(0))
        self._table = self._db.create_table("e", schema=self._schema, exist_ok=True)
        self._nprobes = 20
        self._indexed = bool(self._table.list_indices())

    def add(self, key: int) -> None:
        self.add_batch(key, key + 1)

    def add_batch(self, start: int, stop: int) -> None:
        material = self.material
        flat = pa.array(np.ascontiguousarray(material.block(start, stop)).reshape(-1))
        self._table.add(
            pa.table(
                [
                    pa.array(np.arange(start, stop)),
                    pa.FixedSizeListArray.from_arrays(flat, material.dim),
                    pa.array([material.text(key) for key in range(start, stop)]),
                ],
                schema=self._schema,
            )
        )

    def count(self) -> int:
        return int(self._table.count_rows())

    def _index(self, table: Any) -> None:
        table.create_index(metric="cosine", index_type="IVF_HNSW_SQ", replace=True)

    def ready(self) -> str:
        self._table.optimize()
        if self.count() < 50_000:
            return f"no index (recall {recall_of(self):.3f})"
        self._index(self._table)
        self._indexed = True

        def recall(effort: int) -> float:
            self._nprobes = effort
            return recall_of(self)

        effort, reached = tuned((1, 2, 4, 8, 20, 50), recall)
        return f"IVF_HNSW_SQ, nprobes {effort}, refine_factor 4 (recall {reached:.3f})"

    def tidy(self) -> None:
        self._table.optimize()

    def rebuild(self) -> None:
        if not self._indexed:
            raise NotOffered("no index at this size")
        self._index(lancedb.connect(str(self.folder / "lance")).open_table("e"))

    def search(self, query: NDArray[np.float32], k: int) -> list[int]:
        wanted = self._table.search(query).distance_type("cosine").limit(k)
        if self._indexed:
            wanted = wanted.nprobes(self._nprobes).refine_factor(4)
        found = wanted.select(["id", "text"]).to_arrow()
        return list(found["id"].to_pylist())
