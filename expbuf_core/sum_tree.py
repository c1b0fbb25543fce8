"""`SumTree`: draws slots in proportion to weights that change all the time.

A wide tree in numpy: fan-out 16, one contiguous float64 array a level, the top level searched by
bisection. A parent is always recomputed from its children, never adjusted by a difference:
differences drift, until nodes are negative. `numpy.einsum` adds the 16 children of a row in one
fixed order, so every node is a function of the leaves alone, whatever the history of updates; two
processes that hold the same weights therefore draw the same slots from the same random numbers.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

FAN_OUT = 16
_SHIFT = 4  # log2(FAN_OUT)
_TOP = 4096  # a cumulative sum and a bisection of this many cost less than one more level
_CHUNK = 1024  # rows a descent: 1024 x 16 x 16 stays below what OpenBLAS hands to several threads
# Times 16 children in a column, gives their inclusive prefix sums but for the last, which is the
# parent. `cumsum` takes 10 times as long.
_INFINITY = int(np.array(np.inf).view(np.uint64))
_PREFIXES = np.tril(np.ones((FAN_OUT - 1, FAN_OUT)))

Slots = NDArray[np.int64]
Weights = NDArray[np.float64]


class _Bench(NamedTuple):
    """Where `find` works on n points: fresh memory for every call would cost it a tenth.

    Attributes:
        children: (n, 16) weights below the node of each point.
        before: (16, n) sums before each child; 0 before the first.
        upto: (15, n) the same memory from the second on: sums up to each child but the last.
        passed: (15, n) bool: the point lies behind that child.
        counts: (15, n) the same memory as numbers.
        columns: (n,) 0, 1, 2, …
    """

    children: Weights
    before: Weights
    upto: Weights
    passed: NDArray[np.bool_]
    counts: NDArray[np.int8]
    columns: Slots


def _bench(n: int) -> _Bench:
    before, passed = np.zeros((FAN_OUT, n)), np.empty((FAN_OUT - 1, n), np.bool_)
    children = np.empty((n, FAN_OUT))
    return _Bench(children, before, before[1:], passed, passed.view(np.int8), np.arange(n))


class SumTree:
    """Weights by slot, their sum, and the slot under each point of that sum.

    Not thread-safe: the caller holds a lock, also for `find` and `total`, which may complete a
    cumulative sum. A slot of weight 0 is never found.
    """

    def __init__(self, capacity: int) -> None:
        """Make a tree of `capacity` slots, all of weight 0.

        Args:
            capacity: At least 1.
        """
        if capacity < 1:
            raise ValueError(f"capacity must be at least 1, not {capacity}")
        self.capacity = capacity
        self._allocate()

    def _allocate(self) -> None:
        # _levels[0] holds the leaves, _levels[-1] the top. Every level but the top is padded with
        # zeros to whole rows; _rows[i] is the same memory as (rows, 16).
        sizes = [self.capacity]
        while sizes[-1] > _TOP:
            sizes.append(-(-sizes[-1] // FAN_OUT))
        padded = [-(-size // FAN_OUT) * FAN_OUT for size in sizes]
        self._levels: list[Weights] = [np.zeros(size) for size in padded]
        self._rows = [level.reshape(-1, FAN_OUT) for level in self._levels]
        self._downwards = self._rows[-2::-1]  # all levels but the top
        self._cumulative: Weights | None = None
        self._work = _bench(1)

    def _sum_all(self) -> None:
        for rows, parents in zip(self._rows[:-1], self._levels[1:], strict=True):
            np.einsum("ij->i", rows, out=parents[: len(rows)])
        self._cumulative = None

    # ------------------------------------------------------------ writing

    def update(self, slots: ArrayLike, weights: ArrayLike) -> None:
        """Set the weights of some slots; where a slot is given twice, the last one wins.

        Cost O(n log capacity), about 12 µs for 256 slots of a million.

        Args:
            slots: (n,) or one number, in [0, capacity).
            weights: (n,) or one number, finite, at least 0; their total must be finite too.

        Raises:
            ValueError: A weight is negative, NaN or infinite; nothing was changed.
            IndexError: A slot is out of bounds; nothing was changed.
        """
        if isinstance(slots, int) and isinstance(weights, (int, float)):
            self._update_one(slots, weights)
            return
        index = np.atleast_1d(np.asarray(slots, dtype=np.int64))
        values = np.asarray(weights, dtype=np.float64)
        if index.size == 0:
            return
        _check_weights(values)
        # A negative one is huge as an unsigned number.
        if np.maximum.reduce(index.view(np.uint64), axis=None) >= self.capacity:
            raise IndexError(f"slots must be in [0, {self.capacity})")
        if values.ndim == 0 or values.size != index.size:
            values = np.broadcast_to(values, index.shape)
        self._levels[0].put(index, values)
        if index.size * FAN_OUT >= self.capacity:
            self._sum_all()
            return
        for rows, parents in zip(self._rows, self._levels[1:], strict=False):
            index = index >> _SHIFT
            parents.put(index, np.einsum("ij->i", rows.take(index, axis=0)))
        self._cumulative = None

    def _update_one(self, slot: int, weight: float) -> None:
        if not 0.0 <= weight < np.inf:
            raise ValueError(f"weights must be finite and not negative, not {weight}")
        if not 0 <= slot < self.capacity:
            raise IndexError(f"slots must be in [0, {self.capacity}), not {slot}")
        self._levels[0][slot] = weight
        for rows, parents in zip(self._rows[:-1], self._levels[1:], strict=True):
            slot >>= _SHIFT
            # The same kernel as for many rows: the order of the additions must be the same.
            np.einsum("ij->i", rows[slot : slot + 1], out=parents[slot : slot + 1])
        self._cumulative = None

    def rebuild(self, weights: ArrayLike) -> None:
        """Set all weights at once.

        Args:
            weights: (n,), n at most `capacity`; the slots behind get weight 0.

        Raises:
            ValueError: A weight is negative, NaN or infinite, or there are too many of them;
                nothing was changed.
        """
        values = np.asarray(weights, dtype=np.float64)
        if values.ndim != 1 or values.size > self.capacity:
            raise ValueError(
                f"expected at most {self.capacity} weights in one dimension, got {values.shape}"
            )
        _check_weights(values)
        leaves = self._levels[0]
        leaves[: values.size] = values
        leaves[values.size :] = 0.0
        self._sum_all()

    def grow(self, capacity: int) -> None:
        """Make room for more slots; the weights stay. Cost O(capacity).

        Raises:
            ValueError: `capacity` is smaller than it was.
        """
        if capacity < self.capacity:
            raise ValueError(f"cannot shrink from {self.capacity} to {capacity} slots")
        leaves, n = self._levels[0], self.capacity
        self.capacity = capacity
        self._allocate()
        self._levels[0][:n] = leaves[:n]
        self._sum_all()

    def scale(self, exponent: int) -> None:
        """Multiply all weights by 2**exponent: exactly, except for what underflows to 0."""
        np.ldexp(self._levels[0], exponent, out=self._levels[0])
        self._sum_all()  # where children underflow, the scaled parent would not be their sum

    # ------------------------------------------------------------ reading

    @property
    def total(self) -> float:
        """Sum of all weights."""
        return float(self._top()[-1])

    def _top(self) -> Weights:
        """Sums of the top level: node i has the points from [i] up to [i + 1]."""
        if self._cumulative is None:
            sums = np.zeros(self._levels[-1].size + 1)
            self._levels[-1].cumsum(out=sums[1:])
            self._cumulative = sums
        return self._cumulative

    def weights(self, slots: ArrayLike) -> Weights:
        """Weights of these slots, a copy of the shape of `slots`."""
        taken: Weights = self._levels[0].take(np.asarray(slots, dtype=np.int64))
        return taken

    def before(self, slot: int) -> float:
        """Sum of the weights of all slots before this one: where `find` begins to return it."""
        total = 0.0
        for rows in self._rows[:-1]:
            row, child = slot >> _SHIFT, slot & (FAN_OUT - 1)
            if child:
                total += float(np.add.reduce(rows[row, :child]))
            slot = row
        return total + float(self._top()[slot])

    def find(self, u: ArrayLike) -> Slots:
        """Slot under each point of the sum.

        Slot i has the points in [w_0 + … + w_{i-1}, w_0 + … + w_i).

        Cost O(n log capacity), about 45 µs for 256 points of a million slots.

        Args:
            u: (n,) points in [0, total); what lies outside is taken as the nearest point inside.

        Returns:
            (n,) int64. Each has a weight above 0.

        Raises:
            ValueError: All weights are 0.
        """
        return self.find_with_weights(u)[0]

    def find_with_weights(self, u: ArrayLike) -> tuple[Slots, Weights]:
        """`find`, and the weights of what was found: (n,) int64, (n,) float64 above 0."""
        points = np.atleast_1d(np.asarray(u, dtype=np.float64))
        top = self._top()
        if not top[-1] > 0.0:
            raise ValueError("all weights are 0")
        points = np.minimum(np.maximum(points, 0.0), math.nextafter(top[-1], 0.0))
        if points.size <= _CHUNK:
            return self._descend(points, top)
        parts = [self._descend(points[i : i + _CHUNK], top) for i in range(0, points.size, _CHUNK)]
        return np.concatenate([part[0] for part in parts]), np.concatenate([p[1] for p in parts])

    def _descend(self, points: Weights, top: Weights) -> tuple[Slots, Weights]:
        # top[node] <= point < top[node + 1], so node has a weight above 0.
        n = points.size
        if n != len(self._work.columns):
            self._work = _bench(n)
        children, before, upto, passed, counts, columns = self._work
        node = top.searchsorted(points, side="right")
        node -= 1
        rest = points - top.take(node)
        for rows in self._downwards:
            rows.take(node, axis=0, out=children, mode="clip")  # else `out` is buffered
            np.matmul(_PREFIXES, children.T, out=upto)
            np.less_equal(upto, rest, out=passed)
            child = np.add.reduce(counts, axis=0, dtype=np.int8).astype(np.int64)
            node <<= _SHIFT
            node += child
            child *= n
            child += columns
            rest -= before.take(child)
        weights = self._levels[0].take(node)
        if np.count_nonzero(weights) < n:
            # Rounding has led past the last child of weight above 0, by one ulp of a sum.
            for i in np.flatnonzero(weights == 0.0).tolist():
                begin = int(top.searchsorted(points[i], side="right")) - 1
                node[i] = self._descend_carefully(begin, float(points[i] - top[begin]))
            weights = self._levels[0].take(node)
        return node.astype(np.int64, copy=False), weights

    def _descend_carefully(self, node: int, rest: float) -> int:
        """Descend from a node of weight above 0 by such nodes only."""
        for rows in self._downwards:
            row = rows[node]
            children = np.flatnonzero(row)
            sums = np.cumsum(row[children])
            at = min(int(sums.searchsorted(rest, side="right")), children.size - 1)
            rest -= float(sums[at - 1]) if at else 0.0
            node = (node << _SHIFT) + int(children[at])
        return node


def _check_weights(values: Weights) -> None:
    if not values.size:
        return
    # As whole numbers, floats are in order: infinity, NaN and what has a sign are the greatest.
    if np.maximum.reduce(values.view(np.uint64), axis=None) < _INFINITY:
        return
    # Least and greatest hand on NaN, which fails both comparisons. (Minus zero is as good as zero.)
    if not (
        np.minimum.reduce(values, axis=None) >= 0.0
        and np.maximum.reduce(values, axis=None) < np.inf
    ):
        raise ValueError("weights must be finite and not negative")
