"""Most rows of a tail are far from a query: a few directions tell, and spare reading them whole.

Let B be some orthonormal directions, y = B x the coordinates of x along them, and r the length of
what is left of it. Then x·q ≤ y·y_q + r r_q (Cauchy-Schwarz for what is left). Rows whose bound
stays below what is wanted are out, and what remains is compared as ever: the result is exact.
Embeddings have most of their length in few directions, those of a sample's largest variance, so
that hardly a row remains where they are known; where they have not, one scan is as good.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from expbuf_core.exact_search import dot, inner_products, short_products, squared_norms

LEAST_DIM = 128
LEAST_ROWS = 384  # fewer are scanned as fast as they are bounded
_SAMPLE = 2048
_ITERATIONS = 3
_STEP = 512  # rows that one search may bound
_CATCH_UP = 8  # or this part of those that are missing
_SHARE = 4  # more candidates than one row in so many: not worth while
_PATIENCE = 16
# Of |x|²: more than rounding can do to coordinates, lengths and products, in float32.
_SLACK = np.float32(3e-4)

_Float = NDArray[np.float32]


class Directions:
    """Those in which a sample of vectors is longest, nearly.

    Attributes:
        basis: (d, dim) float32, orthonormal rows.
    """

    def __init__(self, sample: _Float, seed: int = 0) -> None:
        dim = sample.shape[1]
        count = min(128, dim // 48 * 8)
        sample = np.ascontiguousarray(sample)
        transposed = np.ascontiguousarray(sample.T)
        basis = np.random.default_rng(seed).standard_normal((count, dim), dtype=np.float32)
        with np.errstate(over="ignore", invalid="ignore"):
            for _ in range(_ITERATIONS):  # any orthonormal basis is right, so few are enough
                basis = _orthonormal(inner_products(transposed, inner_products(sample, basis)))
        self.basis = basis

    def bounding(self, vectors: _Float) -> _Float:
        """(n, d + 1) float32: coordinates, and at least the length of the rest."""
        made = np.empty((len(vectors), len(self.basis) + 1), np.float32)
        made[:, :-1] = inner_products(self.basis, vectors)
        squared = squared_norms(vectors)
        rest = squared - squared_norms(np.ascontiguousarray(made[:, :-1]))
        made[:, -1] = np.sqrt(np.maximum(rest, 0) + _SLACK * squared)
        return made

    def bounding_one(self, vector: _Float) -> _Float:
        """The same for one (dim,): a search makes few calls."""
        made = np.empty(len(self.basis) + 1, np.float32)
        coordinates = made[:-1]
        dot(self.basis, vector, out=coordinates)
        squared = float(dot(vector, vector))
        rest = squared - float(dot(coordinates, coordinates))
        made[-1] = math.sqrt(max(rest, 0.0) + float(_SLACK) * squared)
        return made


def _orthonormal(rows: _Float) -> _Float:
    if not np.isfinite(rows).all():  # vectors of 1e19 and more
        rows = np.nan_to_num(rows / np.float32(1e38))
    basis, _ = np.linalg.qr(rows.T)
    return np.ascontiguousarray(basis.T)


def directions(vectors: _Float) -> Directions | None:
    """Directions for what may be added to these vectors; None where they are of no use."""
    if len(vectors) < 4 * _SAMPLE or vectors.shape[1] < LEAST_DIM:
        return None
    rows = np.sort(np.random.default_rng(0).choice(len(vectors), _SAMPLE, replace=False))
    return Directions(np.asarray(vectors)[rows])


class Sketch:
    """Bounds for the rows of an array that is filled from the beginning; made as they are needed.

    For any number of threads: two that sketch the same rows write the same.

    Args:
        known: Directions.
        vectors: (capacity, dim) float32.

    Attributes:
        known: As given.
        vectors: As given.
        squared: (capacity,) squared lengths, of a `whole` one under "l2", else None.
    """

    def __init__(self, known: Directions, vectors: _Float) -> None:
        self.known = known
        self.vectors = vectors
        self._bounding = np.empty((len(vectors), len(known.basis) + 1), np.float32)
        self._made = 0
        self._useless = 0
        self.squared: _Float | None = None  # lengths, of a whole one under "l2"

    @classmethod
    def whole(cls, known: Directions, vectors: _Float, metric: str) -> Sketch:
        """Of an array that is full already."""
        vectors = np.asarray(vectors)
        sketch = cls(known, vectors)
        with np.errstate(over="ignore", invalid="ignore"):
            sketch.squared = squared_norms(vectors) if metric == "l2" else None
        sketch.complete(len(vectors))
        return sketch

    def copied(self, vectors: _Float, kept: NDArray[np.int64]) -> Sketch:
        """The same for an array that begins with these rows of this one, rising."""
        sketch = Sketch(self.known, vectors)
        bounded = kept[: int(np.searchsorted(kept, self._made))]
        sketch._made = len(bounded)
        self._bounding.take(bounded, axis=0, out=sketch._bounding[: len(bounded)], mode="clip")
        sketch._useless = self._useless
        return sketch

    def complete(self, rows: int) -> None:
        """Bound so many rows now, and spare the searches to come the work."""
        with np.errstate(over="ignore", invalid="ignore"):
            while self._made < rows:
                self._bound_until(min(rows, self._made + _STEP))

    def _bound_until(self, until: int) -> int:
        made = self._made
        self._bounding[made:until] = self.known.bounding(self.vectors[made:until])
        self._made = until
        return until

    def candidates(
        self, rows: int, query: _Float, floor: float, squared: _Float | None = None
    ) -> tuple[NDArray[np.int64], int] | None:
        """Rows that may be at least as similar to a query as `floor`.

        Of overflows numpy warns unless the caller sees to it.

        Args:
            rows: How many of the array are filled.
            query: (dim,)
            floor: Finite.
            squared: (rows,) squared lengths under "l2"; None: similarity is the inner product.

        Returns:
            Such rows, rising, and the row from which on none is bounded yet: `rows` mostly. None
            where it is better to look at all of them.
        """
        if rows < LEAST_ROWS or self._useless > _PATIENCE:
            return None
        made = self._made
        if made < rows:
            made = self._bound_until(min(rows, made + max(_STEP, (rows - made) // _CATCH_UP)))
        asked = self.known.bounding_one(query)
        bounds = short_products(self._bounding[:made], asked)
        if squared is None:
            out = bounds < floor
        else:  # |x - q|² >= |x|² + |q|² - 2 bound, where rounding is a part of the lengths
            out = (squared[:made] + dot(query, query)) * (1 - _SLACK) - 2 * bounds > -floor
        found: NDArray[np.int64] = np.invert(out, out=out).nonzero()[0]
        if len(found) * _SHARE > made:
            self._useless += 1
            return None
        self._useless = max(0, self._useless - 1)
        return found, made
