"""A small agent that answers questions about images and learns from whether it was right.

It begins with nothing: two fixed random transformations for eyes and ears, and a network of 64
hidden units whose last layer is zero. Without memory the network takes one gradient step an answer.
With memory the agent also asks what it answered to similar questions (`TemporalEnsemble`), and
replays what it remembers by priority.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from world import ANSWERS, Question

from expbuf_core import Experience, ExperienceBuffer
from expbuf_core.inference import Consensus, TemporalEnsemble

DIM = 128
NUMBER_OF = {answer: number for number, answer in enumerate(ANSWERS)}

MEMORY: dict[str, Any] = {
    # Only an experience with a similar image AND a similar question helps. `weighted_concat` makes
    # the similarity exactly 0.7 times the one plus 0.3 times the other; in the cosine of a
    # `weighted_sum` the weights count squared, so that the question is nearly drowned out.
    "fusion": {"backend": "weighted_concat"},
    "embedding": {"visual_dim": DIM, "question_dim": DIM},
    "max_size": 10_000,
    # As a thread, the index builder dies together with the agent. As a process of its own, which is
    # the default, it would outlive the kill with the memory open, and leave nothing to recover.
    "index": {"builder": "thread"},
}

Array = NDArray[np.float32]


# ---------------------------------------------------------------- eyes and ears


class Eyes:
    """Random features of the pixels, whose inner product is about exp(-|x - y|² / 2σ²).

    Fixed before the first image is seen: orthogonal directions of random lengths (Yu et al. 2016).
    """

    def __init__(self, sigma: float = 2.0) -> None:
        rng = np.random.default_rng(0)
        half = DIM // 2
        directions, _ = np.linalg.qr(rng.standard_normal((64, half)))
        lengths = np.sqrt(rng.chisquare(64, half))
        self._directions = (directions * lengths / sigma).astype(np.float32)

    def __call__(self, pixels: Array) -> Array:
        angles = pixels.ravel() @ self._directions
        features: Array = np.concatenate([np.cos(angles), np.sin(angles)])
        return features / np.float32(np.sqrt(DIM / 2))


def hear(question: str) -> Array:
    """Hash the character 2-, 3- and 4-grams of a question into a vector of unit length."""
    text = f" {question.lower()} "
    vector = np.zeros(DIM, dtype=np.float32)
    for n in (2, 3, 4):
        for start in range(len(text) - n + 1):
            # Not hash(): that differs from process to process.
            code = zlib.crc32(text[start : start + n].encode())
            vector[code % DIM] += 1.0 if code >> 31 else -1.0
    return vector / np.float32(np.linalg.norm(vector))


# ---------------------------------------------------------------- the model of its own


class Network:
    """One hidden layer, plain gradient descent, and no other teacher than right and wrong."""

    def __init__(self, hidden: int = 64, learning_rate: float = 0.05, gain: float = 8.0) -> None:
        rng = np.random.default_rng(5)
        scale = np.float32(np.sqrt(1.0 / DIM))
        self._w1 = rng.standard_normal((2 * DIM, hidden), dtype=np.float32) * scale
        self._b1 = np.zeros(hidden, dtype=np.float32)
        self._w2 = np.zeros((hidden, len(ANSWERS)), dtype=np.float32)
        self._b2 = np.zeros(len(ANSWERS), dtype=np.float32)
        self._learning_rate = np.float32(learning_rate)
        self._gain = np.float32(gain)

    def __call__(self, v: Array, q: Array) -> Array:
        """Probabilities of the answers, (n, answers), for n images and questions."""
        return self._forward(v, q)[2]

    def _forward(self, v: Array, q: Array) -> tuple[Array, Array, Array]:
        x = np.concatenate([v, q], axis=1) * self._gain
        hidden = np.maximum(x @ self._w1 + self._b1, 0.0)
        logits = hidden @ self._w2 + self._b2
        logits = np.exp(logits - logits.max(axis=1, keepdims=True))
        return x, hidden, logits / logits.sum(axis=1, keepdims=True)

    def learn(
        self, v: Array, q: Array, said: NDArray[np.int64], reward: Array, weight: Array
    ) -> Array:
        """Take one step; returns how surprising each verdict was, (n,) in [0, 1].

        The loss is -log p(said) where that was right, and -log(1 - p(said)) where it was wrong.
        An unknown reward (0) teaches nothing.
        """
        x, hidden, p = self._forward(v, q)
        rows = np.arange(len(said))
        p_said = p[rows, said]
        slope = p.copy()
        slope[rows, said] -= 1.0
        wrong = reward < 0
        slope[wrong] *= -(p_said[wrong] / (1.01 - p_said[wrong]))[:, None]
        slope *= (weight * (reward != 0) / len(said))[:, None]
        back = (slope @ self._w2.T) * (hidden > 0)
        for parameter, gradient in (
            (self._w1, x.T @ back),
            (self._b1, back.sum(axis=0)),
            (self._w2, hidden.T @ slope),
            (self._b2, slope.sum(axis=0)),
        ):
            parameter -= self._learning_rate * gradient.astype(np.float32)
        surprise = np.where(wrong, p_said, 1.0 - p_said)
        return np.where(reward != 0, surprise, 0.0).astype(np.float32)


# ---------------------------------------------------------------- the agent


@dataclass(frozen=True)
class Reply:
    """What the agent said.

    Attributes:
        answer: One of `ANSWERS`.
        consensus: Of network and memory; None without memory.
        v: Embedding of the image, (DIM,).
        q: Embedding of the question, (DIM,).
    """

    answer: str
    consensus: Consensus | None
    v: Array
    q: Array


class Agent:
    """Answers, is told whether that was right, and learns.

    Args:
        memory: Where its experiences go; None: it has no memory.
        recall: Whether similar experiences vote on the answer.
        replay: Whether it learns again from what it remembers.
    """

    batch_size, batches, passes = 32, 2, 2  # of replay after each answer

    def __init__(
        self, memory: ExperienceBuffer | None, *, recall: bool = True, replay: bool = True
    ) -> None:
        self.memory = memory
        self.network = Network()
        self._eyes = Eyes()
        self._replay = replay
        self._ensemble = None
        if memory is not None:
            self._ensemble = TemporalEnsemble(
                memory,
                k=32,
                min_experiences=16 if recall else 1 << 62,
                # A network that learns on the job is often sure and wrong: memory outvotes it
                # wherever it has anything close to say.
                model_weight=0.1,
                similarity_power=14.0,
                # Told only right or wrong, an agent learns as much from its errors.
                wrong_weight=1.0,
                await_feedback=True,
            )

    def sense(self, question: Question) -> tuple[Array, Array]:
        """Embeddings of the image and of the question, (DIM,) each."""
        return self._eyes(question.pixels), hear(question.text)

    def answer(self, question: Question) -> Reply:
        """Answer a question; with memory, the new experience is on disk on return."""
        v, q = self.sense(question)
        p = self.network(v[None], q[None])[0]
        # Drawn by position: a process that goes on for a dead one has no random state to restore.
        ties = np.random.default_rng(question.position).random(len(ANSWERS))
        best = max(range(len(ANSWERS)), key=lambda number: (p[number], ties[number]))
        if self._ensemble is None:
            return Reply(ANSWERS[best], None, v, q)
        consensus = self._ensemble.answer(
            v,
            q,
            question=question.text,
            prediction=ANSWERS[best],
            confidence=min(1.0, float(p[best])),
            probabilities=dict(zip(ANSWERS, p.tolist(), strict=True)),
            metadata={
                "position": question.position,
                "scan": question.scan,
                "thumbnail": (question.pixels * 255).astype(np.uint8),  # for `expbuf report`
            },
        )
        return Reply(consensus.answer, consensus, v, q)

    def feedback(self, reply: Reply, right: bool) -> None:
        """Be told whether an answer was right: the network takes a step, memory keeps score."""
        said = np.array([NUMBER_OF[reply.answer]])
        reward = np.array([1.0 if right else -1.0], dtype=np.float32)
        one = np.ones(1, dtype=np.float32)
        self.network.learn(reply.v[None], reply.q[None], said, reward, one)
        if self._ensemble is not None and reply.consensus is not None:
            self._ensemble.feedback(reply.consensus, right)

    def replay(self) -> None:
        """Learn again from what memory thinks worth it, and tell it what was still surprising."""
        if self.memory is None or not self._replay or len(self.memory) < self.batch_size:
            return
        batch = self.memory.sample(
            self.batch_size * self.batches, rng=np.random.default_rng(len(self.memory))
        )
        v, q = batch.v_embed, batch.q_embed
        said, reward = _verdicts(batch.experiences)
        surprise = np.zeros(len(said), dtype=np.float32)
        for part in np.split(np.arange(len(said)), self.batches) * self.passes:
            surprise[part] = self.network.learn(
                v[part], q[part], said[part], reward[part], batch.is_weights[part]
            )
        self.memory.update_priorities(batch.ids, surprise)

    def relive(self) -> int:
        """Rebuild a lost network from the experiences.

        In the order in which they were made, each followed by as much replay of the earlier ones as
        at the time: learnt all at once, from the first step on, they make a clearly worse network.

        Returns:
            How many experiences there were.
        """
        if self.memory is None or not len(self.memory):
            return 0
        experiences = list(self.memory)
        v = np.array([experience.v_embed for experience in experiences], dtype=np.float32)
        q = np.array([experience.q_embed for experience in experiences], dtype=np.float32)
        said, reward = _verdicts(experiences)
        weight = np.ones(self.batch_size, dtype=np.float32)
        rng = np.random.default_rng(len(experiences))
        for newest in range(len(experiences)):
            batches = [np.array([newest])]
            if self._replay and newest >= self.batch_size:
                steps = self.batches * self.passes
                batches += list(rng.integers(newest + 1, size=(steps, self.batch_size)))
            for drawn in batches:
                self.network.learn(
                    v[drawn], q[drawn], said[drawn], reward[drawn], weight[: len(drawn)]
                )
        return len(experiences)


def _verdicts(experiences: Sequence[Experience]) -> tuple[NDArray[np.int64], Array]:
    """Numbers of the answers, and rewards; 0 where the reward is not known."""
    said = np.array([NUMBER_OF[str(experience.answer)] for experience in experiences])
    rewards = [experience.total_reward or 0.0 for experience in experiences]
    return said, np.array(rewards, dtype=np.float32)
