"""Qdrant's local mode: its client without a server."""

from __future__ import annotations

import importlib
import warnings
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from benchmarks.peers.base import Material, NotOffered, Peer

client: Any = importlib.import_module("qdrant_client")
models: Any = importlib.import_module("qdrant_client.models")


class QdrantLocal(Peer):
    """Rows in SQLite, and all of them in numpy arrays, which every search compares."""

    distributions = ("qdrant-client",)
    writers: ClassVar[Literal["processes", "threads", "none"]] = "none"
    advice = (
        "QdrantClient(path=…), cosine; one process, one thread; its documents mean it for tests"
    )

    def __init__(self, folder: Path, material: Material) -> None:
        super().__init__(folder, material)
        warnings.filterwarnings("ignore", message="Local mode is not recommended")
        self._client = client.QdrantClient(
            path=str(folder / "qdrant"), force_disable_check_same_thread=True
        )
        if not self._client.collection_exists("e"):
            self._client.create_collection(
                "e",
                vectors_config=models.VectorParams(
                    size=material.dim, distance=models.Distance.COSINE
                ),
            )

    def add(self, key: int) -> None:
        self.add_batch(key, key + 1)

    def add_batch(self, start: int, stop: int) -> None:
        material = self.material
        self._client.upsert(
            "e",
            points=models.Batch(
                ids=list(range(start, stop)),
                vectors=material.block(start, stop).tolist(),
                payloads=[{"text": material.text(key)} for key in range(start, stop)],
            ),
        )

    def count(self) -> int:
        return int(self._client.count("e").count)

    def rebuild(self) -> None:
        raise NotOffered("it has no index")

    def search(self, query: NDArray[np.float32], k: int) -> list[int]:
        found = self._client.query_points("e", query=query, limit=k, with_payload=True)
        return [point.id for point in found.points]

    def close(self) -> None:
        self._client.close()
