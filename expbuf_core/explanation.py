"""Why a search found what it found: the similarity taken apart, and where each hit came from."""

from __future__ import annotations

import math
import time
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from expbuf_core.buffer import ExperienceBuffer
from expbuf_core.exact_search import exact_search
from expbuf_core.experience import Experience
from expbuf_core.intake import Intake
from expbuf_core.results import SearchResult

TAIL = "tail"


class Explanation(NamedTuple):
    """Why one experience was found.

    Attributes:
        rank: From 1, the most similar.
        id: Of the experience.
        similarity: As the search gave it.
        exact: The same from the whole vectors: an index that compresses them may differ.
        visual: Cosine of the visual embeddings alone; None where one is missing.
        question: Cosine of the question embeddings alone; None where one is missing.
        tier: Name of the segment that it came from, or "tail": added since the last build, and
            searched exactly.
        backend: Of that segment; "exact" for the tail.
        confidence: In [0, 1].
        reward: Total, or None while it is unknown.
        priority: For sampling.
        retrieval_count: How often it was retrieved and used.
        success_count: How often the consensus it took part in was right.
        success_rate: In [0, 1], smoothed by the configured prior.
        age_s: Seconds since its timestamp.
    """

    rank: int
    id: int
    similarity: float
    exact: float
    visual: float | None
    question: float | None
    tier: str
    backend: str
    confidence: float
    reward: float | None
    priority: float
    retrieval_count: int
    success_count: float
    success_rate: float
    age_s: float


def explain(
    buffer: ExperienceBuffer,
    found: SearchResult,
    *,
    v_embed: Any = None,
    q_embed: Any = None,
    hybrid_embed: Any = None,
) -> list[Explanation]:
    """Say why a search found what it found.

    Args:
        buffer: That was searched.
        found: What it found.
        v_embed: As given to the search.
        q_embed: As given to the search.
        hybrid_embed: As given to the search.

    Returns:
        One for each hit, in order. The tier is where a hit is now: a build since the search may
        have moved it.
    """
    session = buffer._live()
    intake = session.intake()
    if intake is None or not len(found):
        return []
    query = intake.query(v_embed, q_embed, hybrid_embed, rank=1)
    replica = session.replica
    with replica.lock:
        metric, segments = replica.tiers.metric, replica.tiers.segments
        vectors = replica.tiers.gatherer(intake.dim)(found.ids)
        held = replica.tiers.holds(found.ids)
    for i in np.flatnonzero(~held).tolist():  # it has been evicted since, and its vector is gone
        vectors[i] = _fused(intake, found[i].experience)
    rows, values = exact_search(vectors, None, query, len(vectors), metric, None)
    exact = np.empty(len(vectors), np.float32)
    exact[rows[0]] = values[0]
    now, explanations = time.time(), []
    for i, hit in enumerate(found):
        experience = hit.experience
        tier, backend = TAIL, "exact"
        for segment in segments:
            at = int(np.searchsorted(segment.ids, hit.id))
            if at < len(segment.ids) and segment.ids[at] == hit.id:
                tier, backend = segment.info.name, segment.info.backend
        explanations.append(
            Explanation(
                rank=i + 1,
                id=hit.id,
                similarity=hit.similarity,
                exact=float(exact[i]),
                visual=_cosine(v_embed, experience.v_embed),
                question=_cosine(q_embed, experience.q_embed),
                tier=tier,
                backend=backend,
                confidence=float(experience.confidence),
                reward=experience.total_reward,
                priority=hit.priority,
                retrieval_count=hit.retrieval_count,
                success_count=hit.success_count,
                success_rate=hit.success_rate,
                age_s=max(0.0, now - float(experience.timestamp or now)),
            )
        )
    return explanations


def _fused(intake: Intake, experience: Experience) -> NDArray[np.float32]:
    parts = [
        np.zeros((1, dim), np.float32) if part is None else np.asarray(part, np.float32)[np.newaxis]
        for part, dim in ((experience.v_embed, intake.v_dim), (experience.q_embed, intake.q_dim))
    ]
    fused: NDArray[np.float32] = intake.refuse(*parts)[0]
    return fused


def _cosine(left: Any, right: Any) -> float | None:
    if left is None or right is None:
        return None
    a: NDArray[np.float64] = np.asarray(left, np.float64)
    b: NDArray[np.float64] = np.asarray(right, np.float64)
    norm = math.sqrt(float(a @ a) * float(b @ b))
    return float(a @ b) / norm if norm > 0 else 0.0
