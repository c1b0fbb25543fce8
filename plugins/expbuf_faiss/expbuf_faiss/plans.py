"""Which index to build for how many rows of what dimension."""

from __future__ import annotations

import math
from dataclasses import dataclass

from expbuf_core.errors import ConfigError
from expbuf_faiss.settings import FaissSettings

_CODES_FROM_DIM = 96
_MATRIX_UP_TO_DIM = 512
# Lists, in square roots of the rows. Of whole vectors many short lists are fastest. Codes are so
# cheap that comparing the query with the centroids is most of the work, and what they take of a
# cache is missed by all that follows.
_LISTS_OF_VECTORS = 4.0
_LISTS_OF_CODES = 0.7
_LISTS_OF_HARD_CODES = 1.6  # of which many have to be looked at
_ID_BYTES = 8
_SPARE = 2  # FAISS copies each list into as much memory as the next power of two


@dataclass(frozen=True)
class Plan:
    """An index to build.

    Attributes:
        factory: A FAISS factory string, or "" for none: every vector is compared.
        rerank_limit: Candidates per wanted result up to which re-ranking is tried. An index that
            needs more to reach the target recall makes way for the next plan.
        optional: Chosen by "auto": dropped where comparing every vector does as well; its lists
            may be those of the plan before it.
    """

    factory: str
    rerank_limit: int = 40
    optional: bool = False


FLAT = Plan("")


def nearest_power_of_two(value: float) -> int:
    """At least 1."""
    return 1 << max(0, round(math.log2(max(1.0, value))))


def plans(settings: FaissSettings, rows: int, dim: int) -> list[Plan]:
    """What to build, best first; the last one always reaches the target.

    Raises:
        ConfigError: The settings do not fit the dimension.
    """
    if settings.index == "flat":
        return [FLAT]
    if settings.index == "auto":
        return _automatic(settings, rows, dim)
    if settings.index == "IVFFlat":
        return [Plan(_lists(settings, rows, _LISTS_OF_VECTORS) + ",Flat")]
    if settings.index == "IVFPQ":
        # "np": no polysemous training, which takes minutes and is of use to another kind of search.
        m = sub_vectors(settings, dim)
        return [Plan(f"{_lists(settings, rows, _LISTS_OF_VECTORS)},PQ{m}x{settings.nbits}np")]
    # Refining is what we do anyway, from the raw vectors instead of a copy of them.
    return [Plan(settings.index.removesuffix(",RFlat"))]


def _automatic(settings: FaissSettings, rows: int, dim: int) -> list[Plan]:
    """Codes of a bit a dimension, re-ranked from the raw vectors; full vectors where that fails.

    Few long lists also make training a tenth of the work. Codes take 1/32 of the space of the
    vectors, which are mapped beside the index anyway. Where they tell neighbours apart too badly,
    codes of two bits in FAISS's layout for fast scans are searched two to four times as fast; but
    that layout cannot be mapped, so there is a limit to what they may take of each process.
    """
    if rows < settings.flat_below:
        return [FLAT]
    lists = Plan(_lists(settings, rows, _LISTS_OF_VECTORS) + ",Flat", optional=True)
    if dim < _CODES_FROM_DIM:
        return [lists]
    few = _lists(settings, rows, _LISTS_OF_CODES)
    # A rotation spreads what a few dimensions hold over all of them. It costs every query a
    # multiplication by a matrix, so it has to be needed. Beyond some size a Hadamard
    # transformation is cheaper, although it pads the dimension to a power of two.
    rotation, rotated = (f"RR{dim}", dim) if dim <= _MATRIX_UP_TO_DIM else ("HR", _padded(dim))
    chosen = [Plan(f"{few},RaBitQ", rerank_limit=10, optional=True)]
    for before, width, limit in (("", dim, 20), (f"{rotation},", rotated, 40)):
        row = _SPARE * (width // 4 + _ID_BYTES)
        if rows * row <= settings.private_bytes and width % 2 == 0:
            factory = f"{before}{few},PQ{width // 2}x4fsr"
            chosen.append(Plan(factory, rerank_limit=limit, optional=True))
    many = _lists(settings, rows, _LISTS_OF_HARD_CODES)
    return [*chosen, Plan(f"{rotation},{many},RaBitQ", optional=True), lists]


def _padded(dim: int) -> int:
    """The least power of two that is no less: the width of a Hadamard transformation."""
    return 1 << (dim - 1).bit_length()


def _lists(settings: FaissSettings, rows: int, factor: float) -> str:
    return f"IVF{settings.lists or nearest_power_of_two(factor * math.sqrt(rows))}"


def sub_vectors(settings: FaissSettings, dim: int) -> int:
    """The setting `m`, or the divisor of the dimension nearest to an eighth of it."""
    if settings.m is None:
        return min(
            (m for m in range(1, dim + 1) if dim % m == 0), key=lambda m: (abs(m - dim / 8), m)
        )
    if dim % settings.m:
        divisors = [str(m) for m in range(1, dim + 1) if dim % m == 0]
        raise ConfigError(
            f"index: m = {settings.m} does not divide the dimension {dim}; "
            f"choose one of {', '.join(divisors)}"
        )
    return settings.m
