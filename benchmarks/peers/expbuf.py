"""expbuf itself, through the same door as its peers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from benchmarks.peers.base import BATCH, Material, Peer
from expbuf_core import Experience, ExperienceBuffer


class Expbuf(Peer):
    """The default: write-ahead logs, every commit synced, FAISS on the CPU."""

    distributions: tuple[str, ...] = ("expbuf-core", "faiss-cpu", "numpy")
    writers: ClassVar[Literal["processes", "threads", "none"]] = "processes"
    single = False
    advice = "defaults; the index is built by hand, so that no builder runs while others are timed"
    builder = "off"
    settings: ClassVar[dict[str, Any]] = {}

    def __init__(self, folder: Path, material: Material) -> None:
        super().__init__(folder, material)
        self._buffer = ExperienceBuffer.open(
            folder / "buffer",
            max_size=material.capacity,
            index={"backend": "faiss_cpu", "builder": self.builder},
            seed=0,
            **self.settings,
        )

    def _columns(self, start: int, stop: int) -> dict[str, Any]:
        material = self.material
        return {
            "v_embed": material.block(start, stop),
            "question": [material.text(key) for key in range(start, stop)],
        }

    def add(self, key: int) -> None:
        material = self.material
        self._buffer.add(Experience(v_embed=material.vector(key), question=material.text(key)))

    def add_batch(self, start: int, stop: int) -> None:
        self._buffer.add_many(self._columns(start, stop))

    def load(self, n: int) -> None:
        super().load(n)
        self._buffer.sync()

    def count(self) -> int:
        return len(self._buffer)

    def save(self) -> None:
        self._buffer.save_snapshot()

    def close(self) -> None:
        self._buffer.close()

    def ready(self) -> str:
        self._buffer.rebuild_index()
        segments = self._buffer.stats()["index"]["segments"]
        return ", ".join(
            f"{part.get('factory', part['backend'])}, effort {part.get('effort', '-')}, "
            f"rerank {part.get('rerank', '-')}"
            for part in segments
        )

    def rebuild(self) -> None:
        # Growth this small makes one new row merge everything, as 25% of new rows do by default.
        with ExperienceBuffer.open(
            self.folder / "buffer", index={"builder": "off", "growth": 1e-9}
        ) as other:
            other.add(Experience(v_embed=self.material.vector(0)))
            other.rebuild_index()

    def search(self, query: NDArray[np.float32], k: int) -> Sequence[int] | NDArray[np.int64]:
        return self._buffer.search_index(v_embed=query, k=k).ids

    def sample(self) -> Any:
        batch = self._buffer.sample(BATCH)
        return batch.v_embed, batch.is_weights

    def update(self, keys: NDArray[np.int64], priorities: NDArray[np.float32]) -> None:
        self._buffer.update_priorities(keys, priorities)


class ExpbufBuilder(Expbuf):
    """With the builder process, as it is by default: it starts when there is something to build."""

    advice = "defaults throughout"
    builder = "process"


class ExpbufLmdb(Expbuf):
    """The same on LMDB."""

    distributions = ("expbuf-lmdb", "lmdb")
    advice = "`persistence: {backend: lmdb}`"
    settings: ClassVar[dict[str, Any]] = {"persistence": {"backend": "lmdb"}}


class ExpbufOs(Expbuf):
    """Without waiting for the disk: what a replay buffer in memory is fairly compared with."""

    survives_power = "all but the last seconds"
    advice = "`durability: os`"
    settings: ClassVar[dict[str, Any]] = {"durability": "os"}


class ExpbufUncached(ExpbufOs):
    """The same, with the embeddings of every sample read from the log and verified."""

    advice = "`durability: os`, `sampling: {cache_bytes: 0}`"
    settings: ClassVar[dict[str, Any]] = {"durability": "os", "sampling": {"cache_bytes": 0}}
