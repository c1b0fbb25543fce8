"""Random operations against an exact model: what is gone never appears, what is there does."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from expbuf_core import ExperienceBuffer

LONG = os.environ.get("EXPBUF_LONG", "") not in ("", "0")
OPERATIONS = 100_000 if LONG else 900
DIM, MAX_SIZE = 16, 400


class Model:
    """The live experiences, oldest first, and their unit vectors."""

    def __init__(self) -> None:
        self.vectors: dict[int, NDArray[np.float32]] = {}

    def add(self, first: int, vectors: NDArray[np.float32]) -> None:
        for i, vector in enumerate(vectors):
            self.vectors[first + i] = vector
        for id_ in list(self.vectors)[: max(0, len(self.vectors) - MAX_SIZE)]:
            del self.vectors[id_]

    def nearest(self, query: NDArray[np.float32], k: int, left_out: list[int]) -> list[int]:
        ids = [id_ for id_ in self.vectors if id_ not in left_out]
        if not ids:
            return []
        similarities = np.stack([self.vectors[id_] for id_ in ids]) @ query
        return [ids[i] for i in np.argsort(-similarities, kind="stable")[:k]]


def unit(rng: np.random.Generator, n: int) -> NDArray[np.float32]:
    vectors = rng.standard_normal((n, DIM)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.mark.timeout(3600 if LONG else 120)
@pytest.mark.parametrize("backend", ["exact", "faiss_cpu"])
def test_random_operations(folder: Path, backend: str) -> None:
    if backend == "faiss_cpu":
        pytest.importorskip("faiss")
    rng = np.random.default_rng(len(backend))
    settings: dict[str, Any] = {
        "max_size": MAX_SIZE,
        "durability": "os",
        "index": {
            "backend": backend,
            "builder": "off",
            "growth": 0.4,
            "faiss_cpu": {"index": "HNSW16", "flat_below": 50} if backend == "faiss_cpu" else {},
        },
    }
    model, found, expected = Model(), 0, 0
    buffer = ExperienceBuffer.open(folder, **settings)
    other = ExperienceBuffer.open(folder, **settings)  # lags behind, and must not show it
    for number in range(OPERATIONS):
        kind = rng.choice(
            ["one", "many", "remove", "search", "build", "adopt", "reopen", "clear"],
            p=[0.3, 0.06, 0.15, 0.44, 0.015, 0.03, 0.0045, 0.0005],
        )
        if kind in ("one", "many"):
            vectors = unit(rng, 1 if kind == "one" else int(rng.integers(2, 60)))
            ids = buffer.add_many({"v_embed": vectors, "q_embed": vectors})
            model.add(int(ids[0]), vectors)
        elif kind == "remove" and model.vectors:
            ids = rng.choice(list(model.vectors), min(len(model.vectors), int(rng.integers(1, 9))))
            buffer.remove(ids)
            for id_ in set(ids.tolist()):
                del model.vectors[id_]
        elif kind == "search":
            asked = other if rng.random() < 0.3 else buffer
            k, query = int(rng.integers(1, 15)), unit(rng, 1)[0]
            left_out: list[int] = []
            if rng.random() < 0.3 and model.vectors:
                left_out = rng.choice(list(model.vectors), 3).tolist()
            hits = asked.search_index(v_embed=query, q_embed=query, k=k, exclude=left_out)
            got, wanted = [hit.id for hit in hits], model.nearest(query, k, left_out)
            assert len(got) == len(set(got)) == len(wanted), (number, got, wanted)
            assert set(got) <= set(model.vectors) - set(left_out), (number, got)
            found += len(set(got) & set(wanted))
            expected += len(wanted)
            if backend == "exact":
                assert got == wanted, number
        elif kind == "build":
            buffer.rebuild_index()
        elif kind == "adopt":
            other._live().upkeep.adopt_now()
        elif kind == "reopen":
            if rng.random() < 0.5:
                buffer.save_snapshot()
            buffer.close()
            buffer = ExperienceBuffer.open(folder, **settings)
        elif kind == "clear":
            buffer.clear()
            model.vectors.clear()
    assert found >= 0.95 * expected
    assert expected > OPERATIONS
    other.close()
    buffer.close()
