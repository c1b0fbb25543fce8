"""The physical references: what the disk and the memory allow."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from benchmarks.peers.base import BATCH, Material, NotOffered, Peer

_SIZE = 256 << 20


class RawLog(Peer):
    """The user's bytes written into a file that was filled with zeros, and synced.

    Zeros beforehand are the cheapest way to sync on a journaling file system: no metadata changes.
    Nothing can be found again in what this writes: it is what the disk asks, not a store.
    """

    writers: ClassVar[Literal["processes", "threads", "none"]] = "processes"
    single = False
    advice = "pwrite and fdatasync in a file of zeros; begins anew at its end; each writer a file"

    def __init__(self, folder: Path, material: Material) -> None:
        super().__init__(folder, material)
        self._fd = os.open(folder / f"raw-{os.getpid()}.log", os.O_RDWR | os.O_CREAT)
        zeros = bytes(1 << 20)
        for at in range(0, _SIZE, len(zeros)):
            os.pwrite(self._fd, zeros, at)
        os.fsync(self._fd)
        self._at = 0
        self._lock = threading.Lock()

    def _write(self, data: bytes) -> None:
        with self._lock:
            if self._at + len(data) > _SIZE:
                self._at = 0
            os.pwrite(self._fd, data, self._at)
            self._at += len(data)
        os.fdatasync(self._fd)

    def add(self, key: int) -> None:
        self._write(self.material.vector(key).tobytes() + self.material.text(key).encode())

    def add_batch(self, start: int, stop: int) -> None:
        material = self.material
        texts = "".join(material.text(key) for key in range(start, stop))
        self._write(material.block(start, stop).tobytes() + texts.encode())

    def load(self, n: int) -> None:
        raise NotOffered("keeps nothing")

    def close(self) -> None:
        os.close(self._fd)


class RawMemory(Peer):
    """Numpy arrays: gathering rows and setting numbers, with no priorities at all."""

    distributions = ("numpy",)
    survives_kill = "nothing"
    survives_power = "nothing"
    advice = "one array; random rows without regard to priorities"

    def __init__(self, folder: Path, material: Material) -> None:
        super().__init__(folder, material)
        self._rows = np.zeros((material.capacity, material.dim), np.float32)
        self._priorities = np.zeros(material.capacity, np.float32)
        self._rng = np.random.default_rng(0)
        self._n = 0

    def add(self, key: int) -> None:
        self._rows[key % len(self._rows)] = self.material.vector(key)
        self._n = max(self._n, key + 1)

    def add_batch(self, start: int, stop: int) -> None:
        self._rows[start:stop] = self.material.block(start, stop)
        self._n = max(self._n, stop)

    def count(self) -> int:
        return self._n

    def search(self, query: NDArray[np.float32], k: int) -> NDArray[np.int64]:
        scores = self._rows[: self._n] @ query
        top = np.argpartition(scores, -k)[-k:]
        return top[np.argsort(-scores[top])]

    def sample(self) -> Any:
        ids = self._rng.integers(0, self._n, BATCH)
        return self._rows[ids]

    def update(self, keys: NDArray[np.int64], priorities: NDArray[np.float32]) -> None:
        self._priorities[keys] = priorities
