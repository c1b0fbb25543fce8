"""tianshou: prioritized replay in numpy and numba."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.peers.base import BATCH, Material, NotOffered, Peer

data: Any = importlib.import_module("tianshou.data")


class Tianshou(Peer):
    """In memory; `save_hdf5` writes a checkpoint."""

    distributions = ("tianshou", "numba")
    survives_kill = "what was saved before (see the kills)"
    survives_power = "the same, if the system had written it"
    advice = "PrioritizedReplayBuffer, alpha 0.6, beta 0.4, the vector as observation; no text"

    def __init__(self, folder: Path, material: Material) -> None:
        super().__init__(folder, material)
        self._path = str(folder / "buffer.hdf5")
        if os.path.exists(self._path):
            self._buffer = data.PrioritizedReplayBuffer.load_hdf5(self._path)
        else:
            self._buffer = data.PrioritizedReplayBuffer(
                material.capacity, alpha=0.6, beta=0.4, ignore_obs_next=True
            )

    def add(self, key: int) -> None:
        self._buffer.add(
            data.Batch(
                obs=self.material.vector(key),
                act=0,
                rew=0.0,
                terminated=False,
                truncated=False,
                info={},
            )
        )

    def add_batch(self, start: int, stop: int) -> None:
        raise NotOffered("adds one by one")

    def load(self, n: int) -> None:
        for key in range(n):
            self.add(key)

    def count(self) -> int:
        return len(self._buffer)

    def save(self) -> None:
        self._buffer.save_hdf5(self._path)

    def sample(self) -> Any:
        return self._buffer.sample(BATCH)

    def update(self, keys: NDArray[np.int64], priorities: NDArray[np.float32]) -> None:
        self._buffer.update_weight(keys, priorities)
