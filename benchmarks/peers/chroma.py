"""Chroma with a PersistentClient."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from benchmarks.peers.base import Material, NotOffered, Peer, recall_of, tuned

chromadb: Any = importlib.import_module("chromadb")
settings: Any = importlib.import_module("chromadb.config")


class Chroma(Peer):
    """One collection; HNSW in memory, saved now and then, and a log in SQLite."""

    distributions = ("chromadb",)
    survives_power = "all (SQLite with a rollback journal)"
    writers: ClassVar[Literal["processes", "threads", "none"]] = "threads"
    advice = "PersistentClient, cosine; ef_search raised until recall 0.95; its documents call the "
    advice += "client unsafe for several processes"

    def __init__(self, folder: Path, material: Material) -> None:
        super().__init__(folder, material)
        self._client = chromadb.PersistentClient(
            path=str(folder / "chroma"), settings=settings.Settings(anonymized_telemetry=False)
        )
        self._limit = self._client.get_max_batch_size()
        self._items = self._client.get_or_create_collection(
            "experiences", configuration={"hnsw": {"space": "cosine"}}, embedding_function=None
        )

    def add(self, key: int) -> None:
        self.add_batch(key, key + 1)

    def add_batch(self, start: int, stop: int) -> None:
        material = self.material
        for at in range(start, stop, self._limit):
            end = min(at + self._limit, stop)
            self._items.add(
                ids=[str(key) for key in range(at, end)],
                embeddings=material.block(at, end),
                documents=[material.text(key) for key in range(at, end)],
            )

    def count(self) -> int:
        return int(self._items.count())

    def ready(self) -> str:
        def recall(effort: int) -> float:
            self._items.modify(configuration={"hnsw": {"ef_search": effort}})
            return recall_of(self)

        effort, reached = tuned((100, 200, 400, 800), recall)
        return f"HNSW, ef_search {effort} (recall {reached:.3f})"

    def rebuild(self) -> None:
        raise NotOffered("its index is never rebuilt, only grown")

    def search(self, query: NDArray[np.float32], k: int) -> list[int]:
        found = self._items.query(query_embeddings=[query], n_results=k, include=["documents"])
        return [int(key) for key in found["ids"][0]]
