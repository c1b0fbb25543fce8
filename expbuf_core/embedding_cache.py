"""`EmbeddingCache`: embeddings that were sampled lately, so that drawing them again reads no file.

Each process that samples has its own. Replay draws the same experiences many times, and to read and
verify a payload takes longer than to copy it from memory.
"""

from __future__ import annotations

import threading

import numpy as np
from numpy.typing import NDArray

Vectors = NDArray[np.float32]


class EmbeddingCache:
    """Embeddings by id, as many as fit. Thread-safe.

    An id keeps its place, id modulo rows: ids rise and the oldest go first, so the experiences of a
    buffer never push each other out where all of them fit. Where they do not, who is here stays
    until so much was added that it must be gone: to replace it by another that is drawn as often
    costs time and gains nothing. An entry holds for one id and one place of its payload: neither
    ever names anything else.

    Args:
        budget_bytes: Memory that it may come to take; it takes it as it fills.
        v_dim: Dimension of the visual embeddings.
        q_dim: Dimension of the question embeddings.
        most: Experiences that there may be: more rows would be of no use.
    """

    def __init__(self, budget_bytes: int, v_dim: int, q_dim: int, most: int) -> None:
        self.made_for = (v_dim, q_dim, most)
        self.rows = max(1, min(budget_bytes // (4 * (v_dim + q_dim) + 16), most))
        self._most = most
        self._ids = np.full(self.rows, -1, np.int64)
        self._locations = np.zeros(self.rows, np.int64)
        self._parts = {
            "v_embed": np.empty((self.rows, v_dim), np.float32),
            "q_embed": np.empty((self.rows, q_dim), np.float32),
        }
        self._lock = threading.Lock()

    def get(
        self, part: str, ids: NDArray[np.int64], locations: NDArray[np.int64]
    ) -> tuple[Vectors, NDArray[np.bool_]]:
        """Embeddings of these experiences, as far as they are here.

        Args:
            part: "v_embed" or "q_embed".
            ids: (n,)
            locations: (n,) where their payloads lie.

        Returns:
            (n, dim) float32, a copy; (n,) bool: which rows of it hold what was asked for.
        """
        at = ids % self.rows
        vectors = self._parts[part]
        with self._lock:
            held = self._ids.take(at) == ids
            held &= self._locations.take(at) == locations
            if np.count_nonzero(held) == len(at):
                return vectors.take(at, axis=0), held
            found = np.empty((len(at), vectors.shape[1]), np.float32)
            found[held] = vectors[at[held]]
            return found, held

    def has_room(self, ids: NDArray[np.int64]) -> bool:
        """Whether `put` would keep one of these."""
        return bool(self._room(ids, ids % self.rows).any())

    def _room(self, ids: NDArray[np.int64], at: NDArray[np.int64]) -> NDArray[np.bool_]:
        """(n,) bool: nobody else who may be live is in that row."""
        there = self._ids.take(at)
        room: NDArray[np.bool_] = (there < 0) | (there == ids) | (there <= ids - self._most)
        return room

    def put(
        self,
        ids: NDArray[np.int64],
        locations: NDArray[np.int64],
        v_embed: Vectors,
        q_embed: Vectors,
    ) -> None:
        """Keep the embeddings of these experiences, (n, v_dim) and (n, q_dim), verified.

        As far as there is room for them.
        """
        at = ids % self.rows
        # Of several that want one row, and of one that comes several times, only the last may stay:
        # all three assignments below must agree on it.
        last = len(at) - 1 - np.unique(at[::-1], return_index=True)[1]
        with self._lock:
            last = last[self._room(ids[last], at[last])]
            at = at[last]
            self._ids[at], self._locations[at] = ids[last], locations[last]
            self._parts["v_embed"][at], self._parts["q_embed"][at] = v_embed[last], q_embed[last]
