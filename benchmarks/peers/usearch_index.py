"""usearch: an index in memory, and a file when it is saved."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.peers.base import Material, Peer, recall_of, tuned

usearch: Any = importlib.import_module("usearch.index")


class Usearch(Peer):
    """Vectors alone. What was added since the last save is gone with the process."""

    distributions = ("usearch",)
    survives_kill = "what was saved before (see the kills)"
    survives_power = "what was saved, if the system had written it"
    advice = "HNSW with its defaults, float32; expansion_search raised until recall 0.95; no text"

    def __init__(self, folder: Path, material: Material) -> None:
        super().__init__(folder, material)
        self._index = usearch.Index(ndim=material.dim, metric="cos", dtype="f32")
        self._path = str(folder / "index.usearch")
        if os.path.exists(self._path):
            self._index.load(self._path)

    def load(self, n: int) -> None:
        for start in range(0, n, 4096):
            stop = min(start + 4096, n)
            keys = np.arange(start, stop)
            self._index.add(keys, self.material.block(start, stop), threads=1)

    def count(self) -> int:
        return len(self._index)

    def save(self) -> None:
        self._index.save(self._path)

    def ready(self) -> str:
        def recall(effort: int) -> float:
            self._index.expansion_search = effort
            return recall_of(self)

        effort, reached = tuned((16, 32, 64, 128, 256, 512, 1024), recall)
        return f"HNSW, expansion_search {effort} (recall {reached:.3f})"

    def search(self, query: NDArray[np.float32], k: int) -> NDArray[np.int64]:
        return self._index.search(query, k, threads=1).keys  # type: ignore[no-any-return]
