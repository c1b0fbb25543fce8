"""What a peer offers to the harness."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

RECALL = 0.95  # what an index that has a parameter for it is tuned to reach
K = 10
BATCH = 256


class NotOffered(Exception):
    """The peer has no such operation; the message says what it has instead."""


@dataclass
class Material:
    """What is stored: row i of the vectors with its text, under the key i.

    Attributes:
        vectors: (n, dim) float32, mapped; a key beyond n stands for row `key % n`.
        queries: (m, dim) float32.
        truth: (m, K) keys of the exact results, as long as just the first n keys are stored.
        texts: Some passages; key i has passage `i % len(texts)`.
        capacity: Most experiences that will be stored.
    """

    vectors: NDArray[np.float32]
    queries: NDArray[np.float32]
    truth: NDArray[np.int64]
    texts: list[str]
    capacity: int

    @property
    def dim(self) -> int:
        return int(self.vectors.shape[1])

    @property
    def payload_bytes(self) -> int:
        """What a user hands over for one experience."""
        return 4 * self.dim + len(self.texts[0])

    def vector(self, key: int) -> NDArray[np.float32]:
        row: NDArray[np.float32] = self.vectors[key % len(self.vectors)]
        return row

    def block(self, start: int, stop: int) -> NDArray[np.float32]:
        n = len(self.vectors)
        if start // n == (stop - 1) // n:
            return self.vectors[start % n : (stop - 1) % n + 1]
        return self.vectors[np.arange(start, stop) % n]

    def text(self, key: int) -> str:
        return self.texts[key % len(self.texts)]


class Peer:
    """One contender. Making it opens its folder, or creates what is not there.

    An operation that a peer does not have raises `NotOffered`, which is what this class does.

    Attributes:
        distributions: Whose versions are reported.
        survives_kill: What is left of an acknowledged add when the process is killed.
        survives_power: The same when the power fails.
        writers: How eight writers share one folder: as processes, as threads of one process (it
            refuses more, or they would overwrite each other), or not at all.
        single: Whether only one process at a time may have the folder open.
        advice: How it is set up here, and on whose advice.
    """

    distributions: tuple[str, ...] = ()
    survives_kill: ClassVar[str] = "all"
    survives_power: ClassVar[str] = "all"
    writers: ClassVar[Literal["processes", "threads", "none"]] = "none"
    single: ClassVar[bool] = True
    advice: ClassVar[str] = ""

    def __init__(self, folder: Path, material: Material) -> None:
        self.folder = folder
        self.material = material

    # ---------------------------------------------------------------- storing

    def add(self, key: int) -> None:
        """Store one experience, as durably as the peer can. Called from several threads."""
        raise NotOffered("no durable add: all is in memory until it is saved")

    def add_batch(self, start: int, stop: int) -> None:
        """Store the keys from `start` to before `stop` in one go."""
        raise NotOffered("no durable add: all is in memory until it is saved")

    def load(self, n: int) -> None:
        """Store the keys 0 to n - 1, in the quickest way that the documents advise."""
        for start in range(0, n, 4096):
            self.add_batch(start, min(start + 4096, n))

    def count(self) -> int:
        """Experiences stored."""
        raise NotOffered("does not count")

    def save(self) -> None:
        """Write what is not yet on disk: a checkpoint, a snapshot."""
        raise NotOffered("nothing to save: what was added is on disk")

    def tidy(self) -> None:
        """What the documents advise to do now and then, when nobody waits for it."""

    def close(self) -> None:
        """Leave the folder so that it can be opened again."""

    # ---------------------------------------------------------------- searching

    def ready(self) -> str:
        """Build and tune what makes searches fast. Returns what was built, in words."""
        return ""

    def rebuild(self) -> None:
        """Build the index anew, while others search."""
        raise NotOffered("its index is never rebuilt")

    def search(self, query: NDArray[np.float32], k: int) -> Sequence[int] | NDArray[np.int64]:
        """Keys of the k most similar, with what was stored under them at hand."""
        raise NotOffered("does not search")

    # ---------------------------------------------------------------- replay

    def sample(self) -> Any:
        """Draw BATCH experiences by priority, with data and importance weights."""
        raise NotOffered("does not sample")

    def update(self, keys: NDArray[np.int64], priorities: NDArray[np.float32]) -> None:
        """Set priorities."""
        raise NotOffered("has no priorities")


def tuned(values: Sequence[int], recall: Any) -> tuple[int, float]:
    """The least effort that reaches RECALL, or the greatest.

    Args:
        values: Efforts, rising.
        recall: Sets an effort and measures.
    """
    effort, reached = values[0], 0.0
    for effort in values:
        reached = recall(effort)
        if reached >= RECALL:
            break
    return effort, reached


def recall_of(peer: Peer, queries: int = 200) -> float:
    """Share of the exact results that the peer finds."""
    material = peer.material
    hits = 0
    for i in range(min(queries, len(material.queries))):
        found = peer.search(material.queries[i], K)
        hits += len(set(map(int, found)) & set(material.truth[i].tolist()))
    return hits / (K * min(queries, len(material.queries)))
