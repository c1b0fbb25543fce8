"""How much effort a freshly built index needs, measured on rows of its own."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from expbuf_core.exact_search import exact_search, exact_similarities

NEIGHBOURS = 14
"""What is calibrated is recall at 14: with a quarter of the rows removed, that is recall at 10."""

CANDIDATES_FLOOR = NEIGHBOURS
"""A search for fewer results than this re-ranks as many candidates as one for this many.

So a search for 10 asks for as many as were calibrated: with fewer it missed the target.
"""

RERANK_STEPS = (2, 3, 5, 8, 12, 20, 30, 40)

_GATHER_COST = 32  # re-ranking a candidate costs as much as scanning so many codes
_STANDARD_ERRORS = 2
_FIRST_GRAPH_EFFORT = 16


class Asked(Protocol):
    """What is calibrated."""

    def candidates(
        self, queries: NDArray[np.float32], k: int, effort: int | None
    ) -> NDArray[np.int64]:
        """(m, k) rows, best first, padded with -1."""
        ...


@dataclass(frozen=True)
class Tuning:
    """How to ask an index.

    Attributes:
        effort: Lists to look at, or candidates that HNSW keeps; None where there is no choice.
        rerank: Candidates per wanted result to re-rank; 0 for none.
        recall: What was measured with these.
        reached: Whether that is the target, beyond the error of measuring.
    """

    effort: int | None
    rerank: int
    recall: float
    reached: bool


@dataclass(frozen=True)
class Range:
    """What calibration may choose from.

    Attributes:
        effort: A fixed effort, or None to choose.
        most: Effort that looks at everything; None where there is no choice.
        exact_at_most: Whether the most effort finds the exact result.
        graph: Whether effort is that of a walk through a graph, not a number of lists.
        rerank: Numbers of candidates per result, rising; (0,) for no re-ranking.
    """

    effort: int | None
    most: int | None
    exact_at_most: bool
    graph: bool
    rerank: Sequence[int]


def hold_out(rows: int, wanted: int, seed: int) -> NDArray[np.int64]:
    """Rows to calibrate with, rising; at most an eighth of all."""
    drawn = np.random.default_rng(seed + 1).choice(
        rows, max(1, min(wanted, rows // 8)), replace=False, shuffle=False
    )
    return np.sort(drawn).astype(np.int64)


class Calibration:
    """Measures recall on held-out rows against exact results."""

    def __init__(
        self, vectors: NDArray[np.float32], held_out: NDArray[np.int64], metric: str, target: float
    ) -> None:
        self._vectors = vectors
        self._held_out = held_out
        self._metric = metric
        self._target = target
        self._queries = np.ascontiguousarray(vectors[held_out])
        self._k = min(NEIGHBOURS, len(vectors) - 1)
        rows, similarities = exact_search(vectors, None, self._queries, self._k + 1, metric)
        others = np.where(rows == held_out[:, np.newaxis], -np.inf, similarities)
        worst = -np.sort(-others, axis=1)[:, self._k - 1]
        # Duplicates are as good as each other, whichever of them is found; so similarities are
        # compared, not rows, and what differs by rounding counts as the same.
        self._worst = worst - 1e-5 * np.abs(worst)

    def tune(self, asked: Asked, choice: Range) -> Tuning:
        """Find the cheapest setting that reaches the target, or the best there is."""
        if self._k < 1:
            return Tuning(choice.effort or choice.most, choice.rerank[-1], 1.0, True)
        if choice.effort is not None or choice.most is None:
            return self._cheapest(self._measure(asked, choice, [choice.effort]), choice)
        measured: list[Tuning] = []
        effort = _FIRST_GRAPH_EFFORT if choice.graph else 1
        while effort < choice.most:
            measured += self._measure(asked, choice, [effort])
            if measured[-1].reached:  # the one with the most candidates
                between = {effort * eighths // 8 for eighths in (5, 6, 7, 12)}
                between = {e for e in between if effort // 2 < e < choice.most and e != effort}
                measured += self._measure(asked, choice, sorted(between))
                return self._cheapest(measured, choice)
            effort *= 2
        if choice.exact_at_most:
            return Tuning(choice.most, 0, 1.0, True)
        return self._cheapest(measured + self._measure(asked, choice, [choice.most]), choice)

    def _measure(self, asked: Asked, choice: Range, efforts: Iterable[int | None]) -> list[Tuning]:
        """Ask once for each effort; fewer candidates are a prefix of more."""
        tunings = []
        for effort in efforts:
            wanted = max(1, choice.rerank[-1]) * max(self._k, CANDIDATES_FLOOR)
            found = asked.candidates(self._queries, min(wanted + 1, len(self._vectors)), effort)
            good = np.zeros(found.shape, np.bool_)
            for i, (rows, query) in enumerate(zip(found, self._queries, strict=True)):
                other = np.flatnonzero((rows >= 0) & (rows != self._held_out[i]))
                similar = exact_similarities(self._vectors, rows[other], query, self._metric)
                good[i, : len(other)] = similar >= self._worst[i]
            for rerank in choice.rerank:
                count = self._k if rerank == 0 else rerank * max(self._k, CANDIDATES_FLOOR)
                recalls = np.minimum(good[:, :count].sum(axis=1), self._k) / self._k
                recall = float(recalls.mean())
                # Held-out rows are a sample: stay on the safe side.
                safe = recall - _STANDARD_ERRORS * float(recalls.std()) / math.sqrt(len(recalls))
                tunings.append(Tuning(effort, rerank, recall, safe >= self._target))
        return tunings

    def _cheapest(self, tunings: list[Tuning], choice: Range) -> Tuning:
        def cost(tuning: Tuning) -> float:
            scanned = (tuning.effort or 1) * len(self._vectors) / (choice.most or 1)
            return scanned + tuning.rerank * max(self._k, CANDIDATES_FLOOR) * _GATHER_COST

        reached = [tuning for tuning in tunings if tuning.reached]
        if reached:
            return min(reached, key=cost)
        return max(tunings, key=lambda tuning: (tuning.recall, -cost(tuning)))
