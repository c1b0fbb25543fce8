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
    buffer never push each other out where all of them fit. An entry holds for one id and one place
    of its payload: neither ever names anything else.

    Args:
        budget_bytes: Memory that it may come to take; it takes it as it fills.
        v_dim: Dimension of the visual embeddings.
        q_dim: Dimension of the question embeddings.
        most: Experiences that there may be: more rows would be of no use.
    """

    def __init__(self, budget_bytes: int, v_dim: int, q_dim: int, most: int | None = None) -> None:
        self.made_for = (v_dim, q_dim, most)
        rows = budget_bytes // (4 * (v_dim + q_dim) + 16)
        self.rows = max(1, rows if most is None else min(rows, most))
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
        with self._lock:
            held = self._ids.take(at) == ids
            held &= self._locations.take(at) == locations
            return self._parts[part].take(at, axis=0), held

    def put(
        self,
        ids: NDArray[np.int64],
        locations: NDArray[np.int64],
        v_embed: Vectors,
        q_embed: Vectors,
    ) -> None:
        """Keep the embeddings of these experiences, (n, v_dim) and (n, q_dim), verified."""
        at = ids % self.rows
        # Of several that want one row, and of one that comes several times, only the last may stay:
        # all three assignments below must agree on it.
        last = len(at) - 1 - np.unique(at[::-1], return_index=True)[1]
        at = at[last]
        with self._lock:
            self._ids[at], self._locations[at] = ids[last], locations[last]
            self._parts["v_embed"][at], self._parts["q_embed"][at] = v_embed[last], q_embed[last]
