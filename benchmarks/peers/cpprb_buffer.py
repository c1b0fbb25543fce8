"""cpprb: prioritized replay in C++."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.peers.base import BATCH, Material, Peer

cpprb: Any = importlib.import_module("cpprb")


class Cpprb(Peer):
    """In memory; `save_transitions` writes a checkpoint, without the priorities."""

    distributions = ("cpprb",)
    survives_kill = "what was saved before, without its priorities (see the kills)"
    survives_power = "the same, if the system had written it"
    advice = "PrioritizedReplayBuffer, alpha 0.6, the vector as observation; no text"

    def __init__(self, folder: Path, material: Material) -> None:
        super().__init__(folder, material)
        self._buffer = cpprb.PrioritizedReplayBuffer(
            material.capacity, {"obs": {"shape": material.dim}, "rew": {}}, alpha=0.6
        )
        self._path = str(folder / "transitions.npz")
        if os.path.exists(self._path):
            self._buffer.load_transitions(self._path)

    def add(self, key: int) -> None:
        self._buffer.add(obs=self.material.vector(key), rew=0.0)

    def add_batch(self, start: int, stop: int) -> None:
        self._buffer.add(obs=self.material.block(start, stop), rew=np.zeros(stop - start))

    def count(self) -> int:
        return int(self._buffer.get_stored_size())

    def save(self) -> None:
        self._buffer.save_transitions(self._path, safe=False)

    def sample(self) -> Any:
        return self._buffer.sample(BATCH, beta=0.4)

    def update(self, keys: NDArray[np.int64], priorities: NDArray[np.float32]) -> None:
        self._buffer.update_priorities(keys, priorities)
