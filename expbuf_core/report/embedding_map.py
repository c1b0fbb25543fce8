"""Two-dimensional maps of embeddings, by numpy alone.

*Projection*: the two directions of largest variance (PCA). Distances in it are true shadows of
distances in the embedding space, but two directions out of hundreds tend to show one cloud.

*Neighbourhoods*: t-SNE (van der Maaten & Hinton 2008) of some hundred random points, the
landmarks; every other point is placed among the landmarks that it is most similar to. It shows what
is near what, which is what a search sees; distances between groups mean little.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

_FITTED_ROWS = 4096  # principal directions are those of so many points
_DIRECTIONS = 32  # in which neighbourhoods are looked for
_POWER_ROUNDS = 3
_LANDMARKS = 800
_PERPLEXITY = 30.0
_ROUNDS = 250
_EARLY_ROUNDS = 70  # with exaggerated attraction, so that groups find together
_EXAGGERATION = 12.0
_NEAREST = 8  # landmarks that place a point
_CHUNK = 2048


class EmbeddingMap(NamedTuple):
    """Where each of n points lies. Coordinates are in [0, 1].

    Attributes:
        neighbourhoods: (n, 2) float32.
        projection: (n, 2) float32.
        explained: Which part of the variance the projection shows, in [0, 1].
        landmarks: How many points the neighbourhoods were fitted to.
    """

    neighbourhoods: NDArray[np.float32]
    projection: NDArray[np.float32]
    explained: float
    landmarks: int


def embedding_map(vectors: NDArray[np.float32], *, seed: int = 0) -> EmbeddingMap:
    """Lay points out in the plane; the same points and seed give the same map.

    Args:
        vectors: (n, dim) finite, n at least 1.
        seed: Of the choice of landmarks.
    """
    rng = np.random.default_rng(seed)
    reduced, explained = _principal(vectors, rng)
    landmarks = rng.permutation(len(vectors))[:_LANDMARKS]
    placed = _neighbourhoods(reduced[landmarks])
    everywhere = _among(reduced, reduced[landmarks], placed)
    everywhere[landmarks] = placed
    return EmbeddingMap(_fitted(everywhere), _fitted(reduced[:, :2]), explained, len(landmarks))


def _principal(
    vectors: NDArray[np.float32], rng: np.random.Generator
) -> tuple[NDArray[np.float32], float]:
    """Coordinates (n, up to 32, at least 2) along the directions of largest variance.

    Halko et al. 2011: a random subspace, sharpened by power iteration, holds them.
    """
    n, dim = vectors.shape
    chosen = np.sort(rng.permutation(n)[:_FITTED_ROWS])
    fitted = vectors[chosen].astype(np.float64)
    centre = fitted.mean(axis=0)
    fitted -= centre
    total = float(np.square(fitted).sum())
    wanted = min(_DIRECTIONS, dim)
    basis = rng.standard_normal((dim, min(dim, wanted + 8)))
    for _ in range(_POWER_ROUNDS):
        basis, _r = np.linalg.qr(fitted.T @ (fitted @ basis))
    _u, strengths, turn = np.linalg.svd(fitted @ basis, full_matrices=False)
    directions = (basis @ turn.T)[:, :wanted]
    # The sign of a direction is arbitrary: let its largest component be positive.
    largest = np.abs(directions).argmax(axis=0)
    directions *= np.where(directions[largest, np.arange(directions.shape[1])] < 0, -1.0, 1.0)
    offset = (centre @ directions).astype(np.float32)
    found = vectors @ directions.astype(np.float32) - offset
    if found.shape[1] < 2:
        found = np.hstack([found, np.zeros((n, 2 - found.shape[1]), np.float32)])
    shown = float(np.square(strengths[:2]).sum())
    return found, shown / total if total > 0 else 1.0


def _neighbourhoods(points: NDArray[np.float32]) -> NDArray[np.float32]:
    """Exact t-SNE of (m, d) points, begun at their principal coordinates; (m, 2)."""
    m = len(points)
    spread = float(points[:, 0].std()) if m else 0.0
    if m < 4 or spread == 0.0:
        return points[:, :2].copy()
    joint = _joint_probabilities(points)
    eager, pull = joint * np.float32(_EXAGGERATION), np.empty_like(joint)
    nearness = np.empty_like(joint)
    y = (points[:, :2].T * (1e-2 / spread)).astype(np.float32)  # (2, m)
    velocity, gains = np.zeros_like(y), np.ones_like(y)
    rate = max(m / _EXAGGERATION, 50.0)
    for step in range(_ROUNDS):
        early = step < _EARLY_ROUNDS
        # Axis by axis and not by matrix products: for matrices so thin, the threads of a BLAS cost
        # more than they save, and on a busy machine many times as much.
        np.subtract(y[0][:, None], y[0], out=nearness)
        np.square(nearness, out=nearness)
        np.subtract(y[1][:, None], y[1], out=pull)
        np.square(pull, out=pull)
        nearness += pull
        nearness += 1.0
        np.reciprocal(nearness, out=nearness)
        np.fill_diagonal(nearness, 0.0)
        np.multiply(nearness, -1.0 / nearness.sum(), out=pull)
        pull += eager if early else joint
        pull *= nearness
        towards = np.stack([np.einsum("ij,j->i", pull, axis) for axis in y])
        gradient = 4.0 * (pull.sum(axis=1) * y - towards)
        grows = (gradient > 0) != (velocity > 0)
        gains = np.maximum(np.where(grows, gains + 0.2, gains * 0.8), 0.01).astype(np.float32)
        velocity = (0.5 if early else 0.8) * velocity - rate * gains * gradient
        y = y + velocity
        y -= y.mean(axis=1, keepdims=True)
    return y.T


def _joint_probabilities(points: NDArray[np.float32]) -> NDArray[np.float32]:
    """p_ij of t-SNE: Gaussian similarities whose width gives each point the same perplexity."""
    m = len(points)
    distances = _square_distances(points, points).astype(np.float64)
    np.fill_diagonal(distances, np.inf)
    distances -= distances.min(axis=1, keepdims=True)  # cancels, and keeps exp in range
    wanted = np.log(min(_PERPLEXITY, (m - 1) / 3))
    typical = float(np.median(distances[np.isfinite(distances)])) or 1.0
    beta = np.full((m, 1), 1.0 / typical)
    low, high = np.zeros((m, 1)), np.full((m, 1), np.inf)
    finite = np.where(np.isfinite(distances), distances, 0.0)
    conditional = np.empty_like(distances)
    for _ in range(40):
        conditional = np.exp(-distances * beta)
        total = conditional.sum(axis=1, keepdims=True)
        entropy = np.log(total) + beta * (finite * conditional).sum(axis=1, keepdims=True) / total
        conditional /= total
        wide = entropy > wanted
        low, high = np.where(wide, beta, low), np.where(wide, high, beta)
        beta = np.where(np.isfinite(high), (low + high) / 2, beta * 2)
    joint = (conditional + conditional.T) / (2 * m)
    return np.maximum(joint, 1e-12).astype(np.float32)


def _among(
    points: NDArray[np.float32], landmarks: NDArray[np.float32], placed: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Place each point at the mean of its nearest landmarks, weighed by nearness; (n, 2)."""
    k = min(_NEAREST, len(landmarks))
    found = np.empty((len(points), 2), np.float32)
    for start in range(0, len(points), _CHUNK):
        part = slice(start, start + _CHUNK)
        distances = _square_distances(points[part], landmarks)
        nearest = np.argpartition(distances, k - 1, axis=1)[:, :k]
        chosen = np.take_along_axis(distances, nearest, axis=1)
        least = chosen.min(axis=1, keepdims=True)
        scale = np.maximum(chosen.mean(axis=1, keepdims=True) - least, 1e-12)
        weights = np.exp(-2.0 * (chosen - least) / scale)
        weights /= weights.sum(axis=1, keepdims=True)
        found[part] = np.einsum("nk,nkd->nd", weights, placed[nearest])
    return found


def _square_distances(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float32]:
    squares: NDArray[np.float32] = np.square(a).sum(axis=1)[:, None] + np.square(b).sum(axis=1)
    squares -= 2.0 * (a @ b.T)
    np.maximum(squares, 0.0, out=squares)
    return squares


def _fitted(points: NDArray[np.float32]) -> NDArray[np.float32]:
    """Scaled into the unit square, both axes alike, so that shapes keep their proportions."""
    low, high = points.min(axis=0), points.max(axis=0)
    extent = float((high - low).max())
    if not extent > 0:
        return np.full(points.shape, 0.5, np.float32)
    fitted: NDArray[np.float32] = (points - (low + high) / 2) / extent + 0.5
    return fitted.astype(np.float32)
