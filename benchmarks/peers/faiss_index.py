"""FAISS itself: an index in memory, and a file when it is written."""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.peers.base import Material, Peer, recall_of, tuned

faiss: Any = importlib.import_module("faiss")
faiss.omp_set_num_threads(1)


class FaissIndex(Peer):
    """Vectors alone. What was added since the last write is gone with the process."""

    distributions = ("faiss-cpu",)
    survives_kill = "what was written before (see the kills)"
    survives_power = "what was written, if the system had put it on disk"
    advice = "the effort raised until recall 0.95; one thread; no text"
    efforts: Sequence[int] = ()

    def __init__(self, folder: Path, material: Material) -> None:
        super().__init__(folder, material)
        self._path = str(folder / "index.faiss")
        self._index: Any = None
        if os.path.exists(self._path):
            self._index = faiss.read_index(self._path)

    def _made(self, vectors: NDArray[np.float32]) -> Any:
        raise NotImplementedError

    def _set(self, index: Any, effort: int) -> None:
        raise NotImplementedError

    def load(self, n: int) -> None:
        vectors = np.ascontiguousarray(self.material.block(0, n))
        self._index = self._made(vectors)

    def count(self) -> int:
        return int(self._index.ntotal) if self._index is not None else 0

    def save(self) -> None:
        faiss.write_index(self._index, self._path)

    def ready(self) -> str:
        def recall(effort: int) -> float:
            self._set(self._index, effort)
            return recall_of(self)

        effort, reached = tuned(self.efforts, recall)
        return f"{type(self).__name__}, effort {effort} (recall {reached:.3f})"

    def rebuild(self) -> None:
        self._made(np.ascontiguousarray(self.material.block(0, self.count())))

    def search(self, query: NDArray[np.float32], k: int) -> NDArray[np.int64]:
        return self._index.search(query[None], k)[1][0]  # type: ignore[no-any-return]


class FaissIvf(FaissIndex):
    """Inverted lists of whole vectors, a power of two near 4·√n of them, 64 rows each to train."""

    efforts = (1, 2, 4, 8, 16, 32, 64, 128, 256)

    def _made(self, vectors: NDArray[np.float32]) -> Any:
        n = len(vectors)
        lists = 1 << max(4, round(np.log2(4 * np.sqrt(n))))
        index = faiss.index_factory(
            vectors.shape[1], f"IVF{lists},Flat", faiss.METRIC_INNER_PRODUCT
        )
        index.cp.niter = 10
        rng = np.random.default_rng(0)
        index.train(vectors[np.sort(rng.choice(n, min(n, 64 * lists), replace=False))])
        index.add(vectors)
        return index

    def _set(self, index: Any, effort: int) -> None:
        index.nprobe = effort


class FaissHnsw(FaissIndex):
    """HNSW32."""

    efforts = (16, 32, 64, 128, 256, 512)

    def _made(self, vectors: NDArray[np.float32]) -> Any:
        index = faiss.IndexHNSWFlat(vectors.shape[1], 32, faiss.METRIC_INNER_PRODUCT)
        index.add(vectors)
        return index

    def _set(self, index: Any, effort: int) -> None:
        index.hnsw.efSearch = effort
