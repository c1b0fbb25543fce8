"""Fusions of the visual and the question embedding."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field, model_validator

from expbuf_core.validation import Float

# Squared lengths in between cannot have lost anything to float32's range.
_SAFE = (1e-24, 1e30)


class FusionSettings(BaseModel, extra="forbid", frozen=True):
    """How much each part counts."""

    visual_weight: Float = Field(0.7, ge=0, le=1, description="Weight of the visual embedding.")
    question_weight: Float = Field(0.3, ge=0, le=1, description="Weight of the question embedding.")
    normalize_parts: bool = Field(
        True,
        description="Scale each part to length 1 first; otherwise the longer part decides alone.",
    )

    @model_validator(mode="after")
    def _not_both_zero(self) -> FusionSettings:
        if self.visual_weight + self.question_weight == 0:
            raise ValueError("visual_weight and question_weight cannot both be 0")
        return self


class _WeightedFusion:
    """What both fusions share: each part times a factor, after normalisation if it is wanted.

    In a buffer that has one part only, that part stands alone and unweighted.
    """

    version = 1

    def __init__(self, settings: FusionSettings) -> None:
        self.normalize = settings.normalize_parts
        self.v_factor = self._factor(settings.visual_weight)
        self.q_factor = self._factor(settings.question_weight)

    @staticmethod
    def _factor(weight: float) -> float:
        return weight

    def _scaled(self, part: NDArray[np.float32], factor: float) -> NDArray[np.float32]:
        return _unit(part, factor) if self.normalize else part * np.float32(factor)

    def _parts(self, v: NDArray[np.float32], q: NDArray[np.float32]) -> list[NDArray[np.float32]]:
        if not v.shape[1] or not q.shape[1]:
            return [self._scaled(v if v.shape[1] else q, 1.0)]
        return [self._scaled(v, self.v_factor), self._scaled(q, self.q_factor)]


class WeightedSum(_WeightedFusion):
    """visual_weight · v + question_weight · q; both parts need the same dimension."""

    def output_dim(self, v_dim: int, q_dim: int) -> int:
        """Dimension of both parts, or of the only one.

        Raises:
            ValueError: They differ, or there is none.
        """
        if v_dim and q_dim and v_dim != q_dim:
            raise ValueError(
                f"weighted_sum cannot add a visual embedding of dimension {v_dim} and a question "
                f"embedding of dimension {q_dim}; choose `fusion: weighted_concat`, which takes any"
            )
        return _some_dim(max(v_dim, q_dim))

    def __call__(self, v: NDArray[np.float32], q: NDArray[np.float32]) -> NDArray[np.float32]:
        """Fuse (n, v_dim) and (n, q_dim) to (n, dim) float32."""
        if self.normalize:
            return self._sum(v, q)
        with np.errstate(over="ignore"):  # what is not finite is refused, and not warned of
            return self._sum(v, q)

    def _sum(self, v: NDArray[np.float32], q: NDArray[np.float32]) -> NDArray[np.float32]:
        fused, *rest = self._parts(v, q)
        for part in rest:
            fused += part
        return fused


class WeightedConcat(_WeightedFusion):
    """Both parts side by side, scaled by the square roots of their weights.

    The inner product of two results is exactly the weighted sum of the parts' inner products.
    """

    @staticmethod
    def _factor(weight: float) -> float:
        return math.sqrt(weight)

    def output_dim(self, v_dim: int, q_dim: int) -> int:
        """Sum of the dimensions.

        Raises:
            ValueError: There is no part at all.
        """
        return _some_dim(v_dim + q_dim)

    def __call__(self, v: NDArray[np.float32], q: NDArray[np.float32]) -> NDArray[np.float32]:
        """Fuse (n, v_dim) and (n, q_dim) to (n, v_dim + q_dim) float32."""
        with np.errstate(over="ignore"):  # what is not finite is refused, and not warned of
            return np.concatenate(self._parts(v, q), axis=1)


def _some_dim(dim: int) -> int:
    if dim < 1:
        raise ValueError("a fusion needs a visual or a question embedding; both dimensions are 0")
    return dim


def _unit(part: NDArray[np.float32], length: float) -> NDArray[np.float32]:
    """Scale every row to this length; rows of zeros stay zero."""
    low, high = _SAFE
    if len(part) == 1:  # three times as fast as the general way, and searches come one by one
        square = float(np.vdot(part, part))  # the one product that overflows without a warning
        if low < square < high:
            return part * (length / math.sqrt(square))
    else:
        squares = np.einsum("ij,ij->i", part, part)
        if low < squares.min(initial=1) and squares.max(initial=1) < high:
            factors: NDArray[np.float32] = np.float32(length) / np.sqrt(squares)
            return part * factors[:, None]
    wide = part.astype(np.float64)
    norms = np.sqrt(np.einsum("ij,ij->i", wide, wide))
    norms[norms == 0] = 1
    wide *= (length / norms)[:, None]
    return wide.astype(np.float32)
