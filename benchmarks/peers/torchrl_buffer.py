"""TorchRL: prioritized replay over a memory-mapped storage."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.peers.base import BATCH, Material, Peer

torch: Any = importlib.import_module("torch")
data: Any = importlib.import_module("torchrl.data")
tensordict: Any = importlib.import_module("tensordict")
torch.set_num_threads(1)


class TorchRL(Peer):
    """Rows in mapped files, priorities and positions in memory until `dumps`."""

    distributions = ("torchrl", "tensordict", "torch")
    survives_kill = "what was dumped before (see the kills)"
    survives_power = "what was dumped, if the system had written it"
    advice = "TensorDictPrioritizedReplayBuffer, LazyMemmapStorage, alpha 0.6; no text; one thread"

    def __init__(self, folder: Path, material: Material) -> None:
        super().__init__(folder, material)
        self._path = folder / "dump"
        self._buffer = data.TensorDictPrioritizedReplayBuffer(
            alpha=0.6,
            beta=0.4,
            storage=data.LazyMemmapStorage(
                material.capacity, scratch_dir=str(folder / "rows"), existsok=True
            ),
            batch_size=BATCH,
        )
        if self._path.exists():
            self._buffer.loads(str(self._path))

    def _tensors(self, start: int, stop: int) -> Any:
        obs = torch.from_numpy(np.array(self.material.block(start, stop)))
        return tensordict.TensorDict({"obs": obs}, batch_size=[stop - start])

    def add(self, key: int) -> None:
        self._buffer.add(self._tensors(key, key + 1)[0])

    def add_batch(self, start: int, stop: int) -> None:
        self._buffer.extend(self._tensors(start, stop))

    def count(self) -> int:
        return len(self._buffer)

    def save(self) -> None:
        self._buffer.dumps(str(self._path))

    def sample(self) -> Any:
        return self._buffer.sample()

    def update(self, keys: NDArray[np.int64], priorities: NDArray[np.float32]) -> None:
        self._buffer.update_priority(torch.from_numpy(keys), torch.from_numpy(priorities))
