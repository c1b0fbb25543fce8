"""From vectors to the index that reaches the target recall."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from expbuf_core.errors import ConfigError
from expbuf_faiss import training
from expbuf_faiss.calibration import RERANK_STEPS, Calibration, Range, Tuning, hold_out
from expbuf_faiss.parameters import is_ivf, keeps_vectors, most_effort
from expbuf_faiss.plans import Plan
from expbuf_faiss.segment import FaissSegment

if TYPE_CHECKING:
    from expbuf_faiss.backend import FaissBackend

logger = logging.getLogger("expbuf")

_GRAPH_MARGIN = 2


@dataclass(frozen=True)
class Built:
    """A filled index and how to ask it."""

    plan: Plan
    index: Any
    tuning: Tuning


class Building:
    """One build: the plans of a backend, one after the other, until one reaches the target.

    Args:
        faiss: The module.
        backend: Where the plans come from, and the devices.
        vectors: (n, dim) float32; may be mapped.
    """

    def __init__(self, faiss: Any, backend: FaissBackend, vectors: NDArray[np.float32]) -> None:
        self._faiss = faiss
        self._backend = backend
        self._settings = backend.settings
        self._context = backend.context
        self._vectors = vectors
        self._held_out = hold_out(len(vectors), self._settings.calibration_rows, self._context.seed)
        self._calibration: Calibration | None = None
        self._centres: NDArray[np.float32] | None = None

    def run(self, plans: list[Plan]) -> Built | None:
        """Return the first index that reaches the target, or the last; None for none at all.

        None means that comparing every vector does as well, or that there are too few rows.
        """
        built = None
        for plan in plans:
            built = self._build(plan)
            if built is None or built.tuning.reached or self._settings.probes is not None:
                break
            logger.info(
                "index %s reaches recall %.3f of %.3f on %d rows",
                plan.factory,
                built.tuning.recall,
                self._context.target_recall,
                len(self._vectors),
            )
        return built

    def _build(self, plan: Plan) -> Built | None:
        faiss, context = self._faiss, self._context
        if not plan.factory:
            return None
        index = training.make(
            faiss, plan, context.dim, context.metric, self._settings, context.seed
        )
        if training.rows_needed(faiss, index) > len(self._vectors) - len(self._held_out):
            return None
        self._fill(plan, index)
        built = Built(plan, index, self._tune(plan, index))
        return None if plan.optional and self._useless(built) else built

    def _fill(self, plan: Plan, index: Any) -> None:
        others = np.delete(np.arange(len(self._vectors)), self._held_out)
        rows = training.training_rows(
            self._faiss, index, self._settings, others, self._context.seed
        )
        sample = self._vectors[rows]
        ivf = self._faiss.try_extract_index_ivf(index)
        if plan.optional and self._centres is not None and ivf.nlist == len(self._centres):
            training.reuse_centroids(self._faiss, index, self._centres, sample)
        try:
            self._backend.train(index, sample)
            self._backend.add(index, self._vectors)
        except RuntimeError as exc:
            raise ConfigError(
                f"index: FAISS cannot build {plan.factory!r} of {len(self._vectors)} rows: "
                f"{str(exc).splitlines()[-1]}"
            ) from exc
        if plan.optional and self._centres is None:
            self._centres = training.centroids(self._faiss, index)

    def _tune(self, plan: Plan, index: Any) -> Tuning:
        faiss, settings = self._faiss, self._settings
        exact, ivf = keeps_vectors(faiss, index), is_ivf(faiss, index)
        most = most_effort(faiss, index)
        if exact:
            rerank: tuple[int, ...] = (0,)
        elif settings.rerank is not None:
            rerank = (settings.rerank,)
        else:
            rerank = tuple(step for step in RERANK_STEPS if step <= plan.rerank_limit)
        choice = Range(
            effort=min(settings.probes, most) if settings.probes and most and ivf else None,
            most=most,
            exact_at_most=exact and ivf,
            graph=most is not None and not ivf,
            rerank=rerank,
        )
        segment = self._backend.segment_type(
            self._backend.place(index),
            np.arange(len(self._vectors)),
            self._vectors,
            self._context.metric,
            Tuning(choice.effort, rerank[-1], 0.0, False),
        )
        if self._calibration is None:
            self._calibration = Calibration(
                self._vectors, self._held_out, self._context.metric, self._context.target_recall
            )
        tuning = self._calibration.tune(segment, choice)
        self._check_filter(plan, segment)
        if choice.graph and tuning.effort is not None:
            # Rows that are nodes of the graph find their neighbours more easily than others.
            return replace(tuning, effort=tuning.effort * _GRAPH_MARGIN)
        return tuning

    def _check_filter(self, plan: Plan, segment: FaissSegment) -> None:
        """Refuse a kind of index that cannot leave out removed experiences."""
        allowed = np.full((len(self._vectors) + 7) // 8, 0xFE, np.uint8)
        try:
            segment.search(np.ascontiguousarray(self._vectors[:1]), 1, allowed)
        except RuntimeError as exc:
            raise ConfigError(
                f"index: {plan.factory!r} cannot leave out removed experiences: "
                f"{str(exc).splitlines()[-1]}"
            ) from exc

    def _useless(self, built: Built) -> bool:
        """Whether so many lists are needed that comparing every vector is as fast."""
        most, effort = most_effort(self._faiss, built.index), built.tuning.effort
        if most is None or effort is None or not keeps_vectors(self._faiss, built.index):
            return False
        return 2 * effort > most
