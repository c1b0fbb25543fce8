"""What an index backend answers to a search, checked before it is used.

A plugin that returns something else than its contract says must not lead to a wrong result, nor to
an error deep in the core that names no plugin. A search of a few results pays a microsecond for it.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from expbuf_core.errors import PluginContractError

Found = tuple[NDArray[np.int64], NDArray[np.float32]]

_INT64, _FLOAT32 = np.dtype(np.int64), np.dtype(np.float32)
_FEW = 16  # results; so many are looked at faster as Python numbers
_LARGEST = float(np.finfo(np.float32).max)
_MOST = {"cosine": 1.0, "l2": 0.0}  # similarity that there is
_ROUNDING = 1e-3  # of a squared length
_CODES = 1.0  # by so much an index that compresses its vectors may be off under cosine


def checked(
    answer: Any,
    queries: NDArray[np.float32],
    k: int,
    backend: str,
    vectors: NDArray[np.float32],
    metric: str = "",
) -> Found:
    """The answer, where it has the shape, types and order that it must have, and no id twice.

    Distances in the place of similarities would put the farthest first: they rise, or are larger
    than any similarity.

    Whether these are the nearest, and rows that are allowed, is for the suite to tell.

    Args:
        answer: What `IndexSegment.search` has returned.
        queries: What it was asked, (m, dim).
        k: How many it was to find.
        backend: Its name, for messages.
        vectors: Of the segment.
        metric: Of the buffer; "" if any similarity will do.

    Raises:
        PluginContractError: It has not.
    """
    shape = len(queries), k
    try:
        ids, similarities = answer
        fits = (
            ids.dtype == _INT64
            and similarities.dtype == _FLOAT32
            and ids.shape == shape == similarities.shape
        )
    except (TypeError, ValueError, AttributeError):
        fits = False
    if not fits:
        raise PluginContractError(
            f"the index backend {backend!r} returned {_described(answer)} from `search`; expected "
            f"ids int64 {shape} and similarities float32 {shape}"
        )
    if shape[0] == 1 and k <= _FEW:
        row = ids.tolist()[0]
        values = similarities.tolist()[0]
        top, most = sum(values), max(values)  # a NaN or an infinity among them stays one in the sum
        again = len(set(row)) != k if row[-1] >= 0 else _any_twice(ids)
        rises = values != sorted(values, reverse=True)
    else:
        top = most = np.maximum.reduce(similarities, axis=None, initial=-np.inf)
        again = _any_twice(ids)
        rises = bool((similarities[:, 1:] > similarities[:, :-1]).any())
    if not top < math.inf and not _overflowed(queries, vectors):
        bad = similarities[~(similarities < np.inf)][0]
        raise PluginContractError(
            f"the index backend {backend!r} returned the similarity {bad} from `search`; expected "
            "finite numbers, and -inf as padding alone"
        )
    if most > _MOST.get(metric, math.inf) and most > _most(metric, queries, vectors):
        raise PluginContractError(
            f"the index backend {backend!r} returned the similarity {most:g} from `search`; under "
            f"{metric} none is above {_MOST[metric]:g}: larger is closer, and a distance is none"
        )
    if rises and top < math.inf:
        raise PluginContractError(
            f"the index backend {backend!r} returned similarities that rise from `search`: "
            f"{similarities[:1, :8]}; expected falling order: larger is closer, and a distance is "
            "no similarity"
        )
    if again:
        raise PluginContractError(
            f"the index backend {backend!r} returned an id twice from one `search`: {ids[:1, :8]}"
        )
    return ids, similarities


def _any_twice(ids: NDArray[np.int64]) -> bool:
    """Whether an id comes twice in one row, side by side: equal similarities put it there."""
    same = ids[:, 1:] == ids[:, :-1]
    return bool(same.any()) and bool((same & (ids[:, 1:] >= 0)).any())


def _most(metric: str, queries: NDArray[np.float32], vectors: NDArray[np.float32]) -> float:
    """Largest similarity that may come of rounding."""
    return _CODES + 1.0 if metric == "cosine" else _ROUNDING * _reach(queries, vectors)


def _overflowed(queries: NDArray[np.float32], vectors: NDArray[np.float32]) -> bool:
    """Whether vectors are so long that what is not finite may be right."""
    return _reach(queries, vectors) >= _LARGEST


def _reach(queries: NDArray[np.float32], vectors: NDArray[np.float32]) -> float:
    """A squared distance that none exceeds."""
    asked = float(np.linalg.norm(queries.astype(np.float64), axis=1).max())
    held = math.sqrt(vectors.shape[1]) * float(np.abs(vectors).max(initial=0.0))
    return (asked + held) ** 2


def _described(answer: Any) -> str:
    """Types and shapes of an answer, for a message."""
    if isinstance(answer, np.ndarray):
        return f"one array, {answer.dtype} {answer.shape}"
    if not isinstance(answer, tuple | list):
        return "None" if answer is None else f"a {type(answer).__name__}"
    return (
        " and ".join(
            f"{part.dtype} {part.shape}"
            if isinstance(part, np.ndarray)
            else f"a {type(part).__name__}"
            for part in answer[:4]
        )
        or f"an empty {type(answer).__name__}"
    )
