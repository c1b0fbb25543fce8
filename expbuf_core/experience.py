"""`Experience`: one question, its answer, and what came of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from numpy.typing import ArrayLike


@dataclass(frozen=True, kw_only=True, eq=False)
class Experience:
    """One answered question. Immutable; `dataclasses.replace` makes a changed copy.

    Nothing is checked or copied here: `ExperienceBuffer.add` does both. Embeddings may be numpy
    arrays, anything with the array protocol, or torch tensors on any device.

    Attributes:
        v_embed: Visual embedding, (v_dim,), or None in a buffer that has none.
        q_embed: Question embedding, (q_dim,), or None in a buffer that has none. One of both is
            needed.
        question: The question as text.
        answer: The answer: text, or any JSON-like tree.
        confidence: In [0, 1].
        rewards: Named reward components, or one number, or None while the reward is unknown.
        trajectory: How the answer came about: any JSON-like tree, numpy arrays and bytes included.
        metadata: Anything else of that kind, by name.
        probabilities: (classes,) probabilities of the possible answers, or None.
        tags: Words to filter by.
        image: Path of the image, or the encoded image itself as bytes.
        key: A name of the caller's for this experience.
        timestamp: UTC seconds; None: the time of the add.
        id: Given by the buffer, for life; None until then.
        priority: As last set; None until added. Read-only, as are the next two.
        retrieval_count: How often it was retrieved and used.
        success_count: How often the consensus it took part in was right.
    """

    v_embed: ArrayLike | None = None
    q_embed: ArrayLike | None = None
    question: str = ""
    answer: Any = None
    confidence: float = 1.0
    rewards: Mapping[str, float] | float | None = None
    trajectory: Any = None
    metadata: Mapping[str, Any] | None = None
    probabilities: ArrayLike | None = None
    tags: tuple[str, ...] = ()
    image: str | bytes | None = None
    key: str | None = None
    timestamp: float | None = None
    id: int | None = None
    priority: float | None = None
    retrieval_count: int = 0
    success_count: float = 0.0

    @property
    def total_reward(self) -> float | None:
        """Sum of the reward components, or None while the reward is unknown."""
        if self.rewards is None:
            return None
        if isinstance(self.rewards, Mapping):
            return math.fsum(self.rewards.values())
        return float(self.rewards)
