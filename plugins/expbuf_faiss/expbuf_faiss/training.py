"""Making, training and filling a FAISS index."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from expbuf_core.errors import ConfigError
from expbuf_faiss.plans import Plan
from expbuf_faiss.settings import FaissSettings

_ADD_ROWS = 1 << 16
_LEAST_TRAINING_ROWS = 1 << 14  # for the code books, which do not depend on the number of lists


def make(faiss: Any, plan: Plan, dim: int, metric: str, settings: FaissSettings, seed: int) -> Any:
    """Make an empty, untrained index.

    Raises:
        ConfigError: FAISS does not understand the factory string, or it makes an index that
            cannot be used here.
    """
    kind = faiss.METRIC_L2 if metric == "l2" else faiss.METRIC_INNER_PRODUCT
    try:
        index = faiss.index_factory(dim, plan.factory, kind)
    except RuntimeError as exc:
        raise ConfigError(
            f"index: FAISS makes no index {plan.factory!r} of dimension {dim} and metric "
            f"{metric}: {str(exc).splitlines()[-1]}"
        ) from exc
    outer = faiss.downcast_index(index)
    if isinstance(outer, (faiss.IndexIDMap, faiss.IndexIDMap2)):
        raise ConfigError(
            f"index: {plan.factory!r} keeps ids of its own; expbuf keeps them, leave out the IDMap"
        )
    if isinstance(outer, faiss.IndexRefine):
        raise ConfigError(
            f"index: {plan.factory!r} refines from a copy of the vectors; "
            "leave that out, and see the setting `rerank`"
        )
    ivf = faiss.try_extract_index_ivf(index)
    if ivf is not None:
        _limit(ivf.cp, settings, seed)
    quantizer = _product_quantizer(faiss, index)
    if quantizer is not None:
        _limit(quantizer.cp, settings, seed)
    return index


def rows_needed(faiss: Any, index: Any) -> int:
    """Fewest rows that FAISS agrees to train this index on."""
    ivf = faiss.try_extract_index_ivf(index)
    quantizer = _product_quantizer(faiss, index)
    return max(1 if ivf is None else ivf.nlist, 1 if quantizer is None else quantizer.ksub)


def training_rows(
    faiss: Any, index: Any, settings: FaissSettings, rows: NDArray[np.int64], seed: int
) -> NDArray[np.int64]:
    """Draw from `rows` those to train on, rising: reading them is a forward pass over a map."""
    ivf = faiss.try_extract_index_ivf(index)
    wanted = max(
        _LEAST_TRAINING_ROWS, 0 if ivf is None else ivf.nlist * settings.train_rows_per_list
    )
    if len(rows) <= wanted:
        return rows
    drawn = np.random.default_rng(seed).choice(len(rows), wanted, replace=False, shuffle=False)
    return np.sort(rows[drawn])


def centroids(faiss: Any, index: Any) -> NDArray[np.float32]:
    """(nlist, dim) centres of the lists of a trained inverted file."""
    ivf = faiss.try_extract_index_ivf(index)
    found: NDArray[np.float32] = ivf.quantizer.reconstruct_n(0, ivf.nlist)
    return found


def reuse_centroids(
    faiss: Any, index: Any, centres: NDArray[np.float32], sample: NDArray[np.float32]
) -> None:
    """Give an untrained inverted file the centres of another one with as many lists.

    A rotation in front of it leaves distances as they are, so rotated centres are as good.
    """
    outer = faiss.downcast_index(index)
    if isinstance(outer, faiss.IndexPreTransform):
        rotation = faiss.downcast_VectorTransform(outer.chain.at(0))
        if not rotation.is_trained:
            rotation.train(sample)
        centres = rotation.apply(centres)
    quantizer = faiss.try_extract_index_ivf(index).quantizer
    quantizer.train(centres)
    quantizer.add(centres)


def add(index: Any, vectors: NDArray[np.float32]) -> None:
    """Add all vectors, in blocks: never a second copy of a mapped file."""
    for start in range(0, len(vectors), _ADD_ROWS):
        index.add(vectors[start : start + _ADD_ROWS])


def _limit(clustering: Any, settings: FaissSettings, seed: int) -> None:
    clustering.niter = settings.train_iterations
    clustering.max_points_per_centroid = settings.train_rows_per_list
    clustering.min_points_per_centroid = 1  # FAISS warns on stderr below this
    clustering.seed = seed % (1 << 31)


def _product_quantizer(faiss: Any, index: Any) -> Any:
    ivf = faiss.try_extract_index_ivf(index)
    return getattr(faiss.downcast_index(index if ivf is None else ivf), "pq", None)
