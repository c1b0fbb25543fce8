"""`TemporalEnsemble`: answers a question by what was answered to similar ones, and remembers it.

One round: recall the neighbours of the question, let them vote together with the model, report the
consensus, record on the neighbours what came of it, store the new experience. The vote of a
neighbour is

    |vote_i| = similarity_i^similarity_power * 2^(-age_i / half_life_s) * reliability_i

    reliability_i = 1                          its answer is known to be right (total reward > 0)
                    confidence_i * rate_i      its reward is unknown
                    -wrong_weight              its answer is known to be wrong (total reward <= 0)

with rate_i the success rate of the consensus it took part in before. So a neighbour counts at most
1, a guess that was never checked counts less than an answer that was, and a known error speaks
against its answer instead of for it. The model votes with `model_weight` times its confidence.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from expbuf_core.config_schema import InferenceConfig
from expbuf_core.errors import ConfigError, ExpbufError, InvalidExperience, shown
from expbuf_core.experience import Experience
from expbuf_core.values import truth

WRONG_WEIGHT = 0.5
"""Default weight of the evidence that an answer was wrong for a similar question."""

_log = logging.getLogger("expbuf")
_OWN_FIELDS = {"answer", "confidence", "id", "priority", "retrieval_count", "success_count"}
_FIELDS = {f.name for f in fields(Experience)} - _OWN_FIELDS


# ---------------------------------------------------------------- what is needed of a buffer


class Hit(Protocol):
    """One experience that a search found."""

    @property
    def id(self) -> int:
        """Of the experience."""

    @property
    def similarity(self) -> float:
        """Larger is closer, under every metric."""

    @property
    def success_rate(self) -> float:
        """In [0, 1], smoothed: not 0 for an experience without outcomes."""

    @property
    def experience(self) -> Experience:
        """Decoded when it is read."""


class Recall(Protocol):
    """What a search returns."""

    @property
    def receipt(self) -> Any:
        """With it the outcome is recorded exactly once."""

    def __iter__(self) -> Iterator[Hit]:
        """The hits, closest first."""


class Memory(Protocol):
    """The methods of `ExperienceBuffer` that are used here."""

    def __len__(self) -> int:
        """Experiences held."""

    def search_index(
        self, *, v_embed: Any = None, q_embed: Any = None, k: int | None = None
    ) -> Recall:
        """Find the most similar experiences."""

    def record_outcome(self, receipt_or_ids: Any, /, *, success: bool, credit: Any = None) -> int:
        """Count a retrieval, and what came of it."""

    def add(self, experience: Experience, /) -> int:
        """Store an experience."""

    def update_rewards(self, ids: Any, rewards: Any, /) -> int:
        """Say what came of experiences."""


# ---------------------------------------------------------------- results


class Vote(NamedTuple):
    """What was said about one answer, by all that meant the same.

    Attributes:
        answer: As the model put it, else as the heaviest neighbour did.
        weight: Sum for it less the sum against it; may be negative.
        model: What of it the model said.
        ids: Neighbours that spoke for it.
        against: Neighbours that are known to have been wrong with it.
    """

    answer: Any
    weight: float
    model: float
    ids: tuple[int, ...]
    against: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Consensus:
    """The answer of model and memory together.

    Attributes:
        answer: What to say.
        confidence: In [0, 1]: the weight of the answer, divided by all weights and all doubt.
        votes: One entry an answer, heaviest first.
        neighbours: Ids of the experiences that were recalled, closest first.
        credit: For each neighbour 1.0 if it spoke for this answer, or against another one by
            being known to be wrong with it; else 0.0.
        receipt: Of the recall; None without one.
        used_memory: A neighbour took part in the vote.
        experience_id: Of the experience that was stored; None if none was.
        warning: Why memory was not used though it should have been; None if all went well.
        recorded: The outcome was recorded at once: `feedback` does not count it again.
    """

    answer: Any
    confidence: float
    votes: tuple[Vote, ...] = ()
    neighbours: tuple[int, ...] = ()
    credit: tuple[float, ...] = ()
    receipt: Any = None
    used_memory: bool = False
    experience_id: int | None = None
    warning: str | None = None
    recorded: bool = False


# ---------------------------------------------------------------- which answers mean the same


def same_answer(answer: Any) -> Hashable:
    """Group answers by default: text without regard to case and outer blanks, all else by value.

    Any JSON-like tree, with numpy arrays and bytes in it, becomes something hashable: 3 and 3.0
    are the same, True and 1 are not, and the order of a mapping's keys means nothing.
    """
    if isinstance(answer, str):
        return ("text", answer.strip().casefold())
    if isinstance(answer, (np.ndarray, np.generic)):
        return same_answer(answer.tolist())
    if isinstance(answer, bool):
        return ("truth", answer)
    if isinstance(answer, (int, float)):
        return ("number", "nan" if answer != answer else answer)
    if isinstance(answer, (bytes, bytearray, memoryview)):
        return ("bytes", bytes(answer))
    if isinstance(answer, Mapping):
        return ("map", frozenset((same_answer(key), same_answer(answer[key])) for key in answer))
    if isinstance(answer, (list, tuple)):
        return ("list", tuple(map(same_answer, answer)))
    try:
        hash(answer)
    except TypeError:
        return ("other", repr(answer))
    return ("other", answer)


# ---------------------------------------------------------------- votes


class _Neighbour(NamedTuple):
    id: int
    answer: Any
    vote: float


@dataclass
class _Tally:
    """Votes on one answer, while they are counted. `heaviest`: of what gave `answer` its words."""

    answer: Any
    heaviest: float
    model: float = 0.0
    neighbours: float = 0.0
    against_it: float = 0.0
    ids: list[int] = field(default_factory=list)
    against: list[int] = field(default_factory=list)

    @property
    def weight(self) -> float:
        return self.model + self.neighbours - self.against_it


def _similarity(similarities: NDArray[np.float64], metric: str) -> NDArray[np.float64]:
    """Similarities of one recall on [0, 1], whatever the metric."""
    if metric == "l2":  # the negative squared distance
        return 1.0 / (1.0 + np.maximum(-similarities, 0.0))
    positive = np.maximum(similarities, 0.0)
    # Inner products have no bound: then they are relative to the closest.
    scaled: NDArray[np.float64] = positive / max(1.0, float(positive.max(initial=0.0)))
    return scaled


class TemporalEnsemble:
    """Model and memory answer together; see `answer`. Thread-safe where the buffer is.

    Attributes:
        buffer: The memory.
    """

    def __init__(
        self,
        buffer: Memory,
        *,
        k: int | None = None,
        min_experiences: int | None = None,
        confident: float | None = None,
        model_weight: float | None = None,
        similarity_power: float | None = None,
        half_life_s: float | None = None,
        wrong_weight: float | None = None,
        vote_key: Callable[[Any], Any] | None = None,
        await_feedback: bool = False,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Make an ensemble. What is None is taken from `buffer.config.inference`.

        Args:
            buffer: An `ExperienceBuffer`.
            k: Neighbours that are asked, at least 1.
            min_experiences: Below this many experiences nothing is recalled, only stored.
            confident: From this confidence on, a consensus counts as a success of those that took
                part, where nobody says whether it was right.
            model_weight: Weight of the model's own vote.
            similarity_power: The higher, the less the distant neighbours count.
            half_life_s: Seconds in which a vote loses half of its weight; `math.inf`: never.
            wrong_weight: How much a known error speaks against its answer; 0: it is left out.
            vote_key: Gives answers that mean the same an equal key. Default: `same_answer`.
            await_feedback: Record outcomes only in `feedback`, not at once in `answer`.
            clock: Gives the time, in UTC seconds.

        Raises:
            ConfigError: A value is out of bounds.
        """
        config = getattr(buffer, "config", None)
        inference = getattr(config, "inference", None) or InferenceConfig()

        def pick(name: str, given: float | None, low: float, high: float = math.inf) -> float:
            value = getattr(inference, name) if given is None else given
            if not isinstance(value, (int, float)) or not low <= value <= high:
                raise ConfigError(f"{name} must be in [{low}, {high}], not {value!r}")
            if name in ("k", "min_experiences") and value != int(value):
                raise ConfigError(f"{name} must be a whole number, not {value!r}")
            return value

        for name, function in (("vote_key", vote_key), ("clock", clock)):
            if function is not None and not callable(function):
                raise ConfigError(f"{name} must be a function, not {shown(function)}")
        if half_life_s is None and inference.half_life_s is None:
            half_life_s = math.inf
        if wrong_weight is None:
            wrong_weight = getattr(inference, "wrong_weight", WRONG_WEIGHT)
        self.buffer = buffer
        self.k = int(pick("k", k, 1))
        self.min_experiences = int(pick("min_experiences", min_experiences, 0))
        self.confident = pick("confident", confident, 0, 1)
        self.model_weight = pick("model_weight", model_weight, 0)
        self.similarity_power = pick("similarity_power", similarity_power, 0)
        self.half_life_s = pick("half_life_s", half_life_s, 1e-9)
        self.wrong_weight = pick("wrong_weight", wrong_weight, 0)
        self.await_feedback = await_feedback
        self._vote_key = vote_key
        self._clock = clock
        self._metric = str(getattr(getattr(config, "embedding", None), "metric", "cosine"))

    # ------------------------------------------------------------ one question

    def answer(
        self,
        v_embed: Any,
        q_embed: Any,
        *,
        question: str,
        prediction: Any,
        confidence: float,
        probabilities: Mapping[Any, float] | ArrayLike | None = None,
        store: bool = True,
        **experience_fields: Any,
    ) -> Consensus:
        """Answer a question by the votes of the model and of similar experiences; remember it.

        The confidence of the consensus is its weight divided by the weights of all answers and the
        model's doubt, model_weight * (1 - confidence); what known errors take away from an answer
        goes to doubt. Without neighbours it is therefore the model's own confidence. When known
        errors leave no answer with a weight above 0, the answer is the prediction, with
        confidence 0.

        The outcome is recorded at once (unless `await_feedback`), with the receipt and so exactly
        once: each neighbour was retrieved; the consensus counts as a success from `confident` on,
        and its success goes to those that spoke for it (`Consensus.credit`). The stored
        experience holds the consensus and its confidence, since a later reward is for that; the
        model's own are in its metadata (`prediction`, `prediction_confidence`).

        A recall that fails is a warning, not an error: the model then answers alone.

        Args:
            v_embed: Visual embedding, or None.
            q_embed: Question embedding, or None.
            question: As text.
            prediction: The model's answer: text or a JSON-like tree.
            confidence: Of the model in its prediction, in [0, 1].
            probabilities: What the model gives to each answer; a mapping by answer spreads the
                model's vote accordingly, so that the next best answer can win when the best is a
                known error. An array is stored only.
            store: Whether to add the new experience.
            experience_fields: Further fields of `Experience`.

        Returns:
            The consensus.

        Raises:
            InvalidExperience: An argument cannot be stored or searched for; nothing was written.
            ExpbufError: Storing the experience or recording the outcome failed.
        """
        unknown = experience_fields.keys() - _FIELDS
        if unknown:
            raise TypeError(
                f"not fields of an experience to set here: {', '.join(sorted(unknown))}"
            )
        if not _is_number(confidence) or not 0.0 <= confidence <= 1.0:
            raise InvalidExperience(f"confidence must be in [0, 1], not {confidence!r}")
        said = _model_votes(prediction, float(confidence), probabilities)
        receipt, neighbours, warning = self._recall(v_embed, q_embed, experience_fields)
        consensus = self._vote(prediction, float(confidence), said, neighbours)
        consensus = replace(consensus, receipt=receipt, warning=warning)
        if store:
            # Before the outcome is recorded: what cannot be stored is refused with nothing written.
            metadata = dict(experience_fields.pop("metadata", None) or {})
            if consensus.used_memory:
                metadata.setdefault("prediction", prediction)
                metadata.setdefault("prediction_confidence", float(confidence))
            if isinstance(probabilities, Mapping):
                probabilities = _normalised(probabilities)
            experience = Experience(
                v_embed=v_embed,
                q_embed=q_embed,
                question=question,
                answer=consensus.answer,
                confidence=consensus.confidence,
                probabilities=probabilities,
                metadata=metadata or None,
                **experience_fields,
            )
            consensus = replace(consensus, experience_id=int(self.buffer.add(experience)))
        if consensus.used_memory and not self.await_feedback:
            self._record(consensus, consensus.confidence >= self.confident)
            consensus = replace(consensus, recorded=True)
        return consensus

    def feedback(
        self, consensus: Consensus, correct: bool, reward: Mapping[str, float] | float | None = None
    ) -> None:
        """Say whether a consensus was right; may be repeated, and called from another process.

        Records the outcome if it is still open (`await_feedback`): success goes to the neighbours
        that spoke for the answer if it was right, and to none if not. Gives the stored experience
        its reward, so that from now on it votes as known to be right or wrong. A second verdict
        that says the opposite changes this reward, but not what was counted for the neighbours.

        Args:
            consensus: As `answer` returned it.
            correct: Whether its answer was right.
            reward: Default: 1.0 if it was right, else -1.0.

        Raises:
            InvalidExperience: `correct` is not True or False; nothing was written.
            ReceiptExpired: Too much has happened since; the reward was set, the outcome not.
            ExpbufError: The buffer cannot be written.
        """
        if not isinstance(consensus, Consensus):
            raise InvalidExperience(
                f"feedback takes the Consensus that `answer` returned, not {shown(consensus)}"
            )
        correct = truth(correct, "correct")
        if consensus.experience_id is not None:
            value = reward if reward is not None else (1.0 if correct else -1.0)
            self.buffer.update_rewards([consensus.experience_id], [value])
        if consensus.used_memory and not consensus.recorded:
            self._record(consensus, correct)

    # ------------------------------------------------------------ steps

    def _recall(
        self, v_embed: Any, q_embed: Any, experience_fields: Mapping[str, Any]
    ) -> tuple[Any, list[_Neighbour], str | None]:
        if len(self.buffer) < max(1, self.min_experiences):
            return None, [], None
        try:
            found = self.buffer.search_index(v_embed=v_embed, q_embed=q_embed, k=self.k)
            hits = list(found)
            experiences = [hit.experience for hit in hits]  # decoded here, and that may fail
        except InvalidExperience:
            raise  # the caller's mistake: it would come back with every question
        except ExpbufError as exc:
            _log.warning("recall failed, the model answers alone: %s", exc)
            return None, [], f"{type(exc).__name__}: {exc}"
        now = experience_fields.get("timestamp")
        votes = self._vote_weights(hits, experiences, self._clock() if now is None else float(now))
        neighbours = [
            _Neighbour(int(hit.id), experience.answer, vote)
            for hit, experience, vote in zip(hits, experiences, votes.tolist(), strict=True)
        ]
        return found.receipt, neighbours, None

    def _vote_weights(
        self, hits: list[Hit], experiences: list[Experience], now: float
    ) -> NDArray[np.float64]:
        similarities = np.array([hit.similarity for hit in hits], dtype=np.float64)
        votes = _similarity(similarities, self._metric) ** self.similarity_power
        for i, (hit, experience) in enumerate(zip(hits, experiences, strict=True)):
            age_s = max(0.0, now - (now if experience.timestamp is None else experience.timestamp))
            votes[i] *= 2.0 ** (-age_s / self.half_life_s) * self._reliability(hit, experience)
        return votes

    def _reliability(self, hit: Hit, experience: Experience) -> float:
        reward = experience.total_reward
        if reward is None:
            return experience.confidence * float(hit.success_rate)
        # A reward settles it: neither confidence then nor the company kept since says more.
        return 1.0 if reward > 0 else -self.wrong_weight

    def _key(self, answer: Any) -> Hashable:
        if self._vote_key is None:
            return same_answer(answer)
        key = self._vote_key(answer)
        return key if isinstance(key, str) else same_answer(key)

    def _vote(
        self,
        prediction: Any,
        confidence: float,
        said: list[tuple[Any, float]],
        neighbours: list[_Neighbour],
    ) -> Consensus:
        tallies: dict[Hashable, _Tally] = {}
        for answer, probability in said:  # in the model's words, whatever the neighbours weigh
            tally = tallies.setdefault(self._key(answer), _Tally(answer, math.inf))
            tally.model += self.model_weight * probability
        keys = [self._key(neighbour.answer) for neighbour in neighbours]
        for key, (id, answer, vote) in zip(keys, neighbours, strict=True):
            if vote == 0.0:
                continue
            tally = tallies.setdefault(key, _Tally(answer, 0.0))
            if abs(vote) > tally.heaviest:
                tally.answer, tally.heaviest = answer, abs(vote)
            if vote > 0:
                tally.neighbours += vote
                tally.ids.append(id)
            else:
                tally.against_it -= vote
                tally.against.append(id)
        own = self._key(prediction)
        ranked = sorted(tallies.items(), key=lambda item: (-item[1].weight, item[0] != own))
        used_memory = any(neighbour.vote != 0.0 for neighbour in neighbours)
        winner, answer = own, prediction
        if used_memory:
            standing = sum(max(0.0, tally.weight) for _, tally in ranked)
            struck = sum(
                min(tally.against_it, tally.model + tally.neighbours) for _, tally in ranked
            )
            doubt = self.model_weight * max(0.0, 1.0 - sum(share for _, share in said))
            confidence = 0.0
            if ranked[0][1].weight > 0.0:
                winner, answer = ranked[0][0], ranked[0][1].answer
                confidence = min(1.0, ranked[0][1].weight / (standing + struck + doubt))
        return Consensus(
            answer=answer,
            confidence=confidence,
            votes=tuple(
                Vote(
                    tally.answer, tally.weight, tally.model, tuple(tally.ids), tuple(tally.against)
                )
                for _, tally in ranked
            ),
            neighbours=tuple(neighbour.id for neighbour in neighbours),
            credit=tuple(
                float(neighbour.vote > 0 if key == winner else neighbour.vote < 0)
                for key, neighbour in zip(keys, neighbours, strict=True)
            ),
            used_memory=used_memory,
        )

    def _record(self, consensus: Consensus, success: bool) -> None:
        credit = np.array(consensus.credit, dtype=np.float32) if success else None
        self.buffer.record_outcome(consensus.receipt, success=success, credit=credit)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)


def _normalised(probabilities: Mapping[Any, float]) -> NDArray[np.float32] | None:
    values = np.array([float(value) for value in probabilities.values()])
    total = values.sum()
    return (values / total).astype(np.float32) if total > 0 else None


def _model_votes(
    prediction: Any, confidence: float, probabilities: Mapping[Any, float] | ArrayLike | None
) -> list[tuple[Any, float]]:
    """What the model says: answers and their shares of its vote, at most 1 in all."""
    if not isinstance(probabilities, Mapping):
        return [(prediction, confidence)]
    shares = list(probabilities.values())
    if not all(_is_number(share) and 0.0 <= share < math.inf for share in shares):
        raise InvalidExperience("probabilities must be finite and not negative")
    total = max(1.0, math.fsum(shares))
    said = [(answer, float(share) / total) for answer, share in probabilities.items()]
    return [(prediction, 0.0), *said]  # first, so that its words are kept
