"""What comes in is checked, converted, scored, fused and encoded here, before any lock is taken."""

from __future__ import annotations

import difflib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from operator import attrgetter
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from expbuf_core import codec
from expbuf_core.builtin.fusions import WeightedConcat, WeightedSum
from expbuf_core.builtin.scorers import WeightedSumScorer
from expbuf_core.codec import AddBody
from expbuf_core.commit import Draft, draft_rows
from expbuf_core.contracts import EmbeddingFusion, PriorityScorer, ScoringBatch
from expbuf_core.embeddings import (
    Vectors,
    as_array,
    as_vectors,
    fuse,
    fused_dim,
    normalised,
    plugin_named,
    stacked,
    to_read,
)
from expbuf_core.errors import (
    DimensionError,
    InvalidExperience,
    PluginContractError,
    blame,
    shown,
)
from expbuf_core.experience import Experience
from expbuf_core.native import native
from expbuf_core.values import (
    OLDEST,
    ages,
    are_priorities,
    checked_image,
    checked_metadata,
    checked_probabilities,
    checked_tags,
    checked_text,
    finite32,
    float_column,
    initial_priorities,
    length_of,
    list_column,
    number,
    reward_columns,
    rewards,
)

if TYPE_CHECKING:
    from expbuf_core.native._native import Encoder

_LARGEST = float(np.finfo(np.float32).max)
# That native code takes for numbers.
_SCALARS = tuple({np.dtype(code).type for code in ("e", "f", "d", *"bBhHiIlLqQ")})

COLUMNS = (
    "v_embed",
    "q_embed",
    "question",
    "answer",
    "confidence",
    "rewards",
    "trajectory",
    "metadata",
    "probabilities",
    "tags",
    "image",
    "key",
    "timestamp",
)


def _any(value: Any) -> Any:
    return value


# What goes into a payload, in this order, and what checks it.
_CHECKS: dict[str, Callable[[Any], Any]] = {
    "question": partial(checked_text, name="question"),
    "answer": _any,
    "rewards": rewards,
    "trajectory": _any,
    "metadata": checked_metadata,
    "probabilities": checked_probabilities,
    "image": checked_image,
    "tags": checked_tags,
    "key": partial(checked_text, name="key"),
}
_EMPTY: dict[str, Any] = {"question": "", "tags": ()}  # where nothing is there; elsewhere None
# Of columns.
_KINDS = {
    "question": (str, "strings"),
    "key": (str, "strings"),
    "metadata": (Mapping, "mappings"),
}


# ---------------------------------------------------------------- experiences


class _Checked(NamedTuple):
    """An experience without its embeddings, checked; `fields` go into its payload."""

    fields: dict[str, Any]
    confidence: float
    reward: float
    timestamp: float
    tags: list[str]
    key: str | None


class Accepted(NamedTuple):
    """An experience that can be stored as it is; see `Intake.accept`.

    Attributes:
        row: Its payload, encoded.
        crc: CRC-32 of the payload's content.
        vector: The fused embedding, (dim,) float32 as bytes.
        timestamp: UTC seconds.
        reward: The total; NaN while unknown.
        confidence: In [0, 1].
        priority: As given, or the scorer's.
        tags: It is known by these,
        key: and by this.
    """

    row: bytes
    crc: int
    vector: bytes
    timestamp: float
    reward: float
    confidence: float
    priority: float
    tags: list[str]
    key: str | None


class _Numbers(NamedTuple):
    """Of n experiences: (n,) each."""

    confidence: NDArray[np.float32]
    reward: NDArray[np.float64]
    timestamp: NDArray[np.float64]


def _numbers(items: Sequence[Accepted]) -> _Numbers:
    return _Numbers(
        np.array([item.confidence for item in items], np.float32),
        np.array([item.reward for item in items], np.float64),
        np.array([item.timestamp for item in items], np.float64),
    )


class _Columns(NamedTuple):
    """n experiences without their embeddings, checked.

    Attributes:
        lists: What goes into the payloads, by field: n values, None where one has none.
        numbers: All the rest.
    """

    lists: dict[str, list[Any]]
    numbers: _Numbers


def _in_columns(experiences: Sequence[Experience], now: float) -> _Columns:
    """What `Intake._checked` makes of each, in a fraction of the time it takes for many."""
    n = len(experiences)

    def values(name: str) -> list[Any]:
        return list(map(attrgetter(name), experiences))

    for id_ in values("id"):
        if id_ is not None:
            raise _has_an_id(id_)
    lists: dict[str, list[Any]] = {}
    reward = np.full(n, np.nan)
    for name, check in _CHECKS.items():
        found = values(name)
        empty = _EMPTY.get(name)
        if set(map(type, found)) == {type(empty)} and not any(found):
            continue
        if name == "rewards":
            pairs = [rewards(value) for value in found]
            reward = np.array([total for total, _ in pairs], np.float64)
            lists[name] = [components for _, components in pairs]
        elif empty is None:
            lists[name] = [value if value is None else check(value) for value in found]
        else:
            lists[name] = [check(value) or None for value in found]
    confidence = [number(value, "confidence", 0.0, 1.0) for value in values("confidence")]
    timestamp = [now if x is None else number(x, "timestamp") for x in values("timestamp")]
    return _Columns(
        lists, _Numbers(np.array(confidence, np.float32), reward, np.array(timestamp, np.float64))
    )


def _has_an_id(id_: Any) -> InvalidExperience:
    return InvalidExperience(
        f"this experience has id {id_} already; to add a copy use "
        "dataclasses.replace(experience, id=None)"
    )


def _narrow(value: float) -> float:
    """As it is in float32."""
    return float(np.float32(value)) if value else 0.0


def _labels(tags: list[list[str]], keys: list[str | None]) -> dict[str, list[Any]] | None:
    """What replicas know experiences by; None where there is nothing."""
    if not any(tags) and all(key is None for key in keys):
        return None
    return {"tags": tags, "keys": keys}


def _labels_of(items: Sequence[Accepted]) -> dict[str, list[Any]] | None:
    return _labels([item.tags for item in items], [item.key for item in items])


class Intake:
    """Turns experiences into operations.

    Args:
        v_dim: Dimension of the visual embedding; 0: there is none.
        q_dim: Dimension of the question embedding; 0: there is none.
        metric: Of the buffer.
        fusion: Of the buffer.
        scorer: Gives initial priorities.
        max_experience_bytes: Most bytes that one experience may take.
        max_commit_bytes: Most bytes that one commit may take.
        representation: Number of the buffer's; what is fused here is of it.
        names: Of fusion and scorer, for messages.
    """

    def __init__(
        self,
        *,
        v_dim: int,
        q_dim: int,
        metric: str,
        fusion: EmbeddingFusion,
        scorer: PriorityScorer,
        max_experience_bytes: int,
        max_commit_bytes: int,
        representation: int = 0,
        names: tuple[str, str] = ("", ""),
    ) -> None:
        self.v_dim, self.q_dim = v_dim, q_dim
        self.metric = metric
        self.fusion = fusion
        self.scorer = scorer
        self._ask_one: Callable[..., float | None] | None = getattr(scorer, "one", None)
        self._fusion_name, self._scorer_name = names
        self.dim = fused_dim(fusion, v_dim, q_dim, self._fusion_name)
        self._max_experience = max_experience_bytes
        self._max_commit = max_commit_bytes
        self.representation = representation
        self.encoder = self._make_encoder()

    # ------------------------------------------------------------ parts

    def _part(self, value: Any, name: str, dim: int, *, rank: int, n: int = 1) -> Vectors:
        if value is None:
            if dim:
                raise InvalidExperience(
                    f"{name}: missing; this buffer holds embeddings of dimension {dim} there"
                )
            return np.empty((n, 0) if rank == 2 else (0,), np.float32)
        if not dim:
            raise InvalidExperience(f"{name}: given, but this buffer was created without it")
        return as_vectors(value, name, rank=rank, dim=dim)

    def query(self, v: Any, q: Any, hybrid: Any, *, rank: int) -> Vectors:
        """Fused query vectors (m, dim), read-only; a part that is missing counts as zeros."""
        return to_read(self._query(v, q, hybrid, rank=rank))

    def _query(self, v: Any, q: Any, hybrid: Any, *, rank: int) -> Vectors:
        if hybrid is not None:
            if v is not None or q is not None:
                raise InvalidExperience("give either hybrid_embed, or v_embed and q_embed")
            vectors = as_vectors(hybrid, "hybrid_embed", rank=rank, dim=self.dim)
            if rank == 1:
                vectors = vectors[np.newaxis]
            return normalised(vectors) if self.metric == "cosine" else vectors
        if v is None and q is None:
            raise InvalidExperience("a search needs v_embed, q_embed or hybrid_embed")
        parts = []
        for value, name, dim in ((v, "v_embed", self.v_dim), (q, "q_embed", self.q_dim)):
            part = None if value is None else self._part(value, name, dim, rank=rank)
            parts.append(part[np.newaxis] if part is not None and rank == 1 else part)
        m = len(parts[0]) if parts[0] is not None else len(parts[1])  # type: ignore[arg-type]
        filled = [
            np.zeros((m, dim), np.float32) if part is None else part
            for part, dim in zip(parts, (self.v_dim, self.q_dim), strict=True)
        ]
        if len(filled[0]) != len(filled[1]):
            raise DimensionError(
                f"v_embed holds {len(filled[0])} queries, q_embed {len(filled[1])}"
            )
        return self.refuse(filled[0], filled[1])

    def refuse(self, v: Vectors, q: Vectors) -> Vectors:
        """Fused vectors of parts (n, v_dim) and (n, q_dim)."""
        return fuse(self.fusion, self.metric, v, q, self.dim, self._fusion_name)

    def score(
        self,
        confidence: NDArray[np.float32],
        reward: NDArray[np.float64],
        probabilities: Sequence[NDArray[np.float32] | None],
        age: NDArray[np.float32],
        metadata: Sequence[Mapping[str, Any] | None] = (),
    ) -> NDArray[np.float32]:
        """Initial priorities, checked."""
        unknown = np.isnan(reward)
        with np.errstate(over="ignore"):
            total = reward.astype(np.float32)
            total[unknown] = 0
            if np.isinf(total).any():
                finite32(reward[~unknown], "rewards")
            batch = ScoringBatch(
                confidence=to_read(confidence),
                total_reward=total,
                reward_known=~unknown,
                probabilities=probabilities,
                age=age,
                metadata=metadata,
            )
            return self._checked_scores(self._scored(self.scorer, batch), batch)

    def _scored(self, score: Callable[..., Any], *batch: ScoringBatch, **single: Any) -> Any:
        """What the scorer returns; its errors say whose they are."""
        try:
            return score(*batch, **single)
        except Exception as exc:
            blame(exc, plugin_named("priority scorer", self._scorer_name, self.scorer))
            raise

    def _checked_scores(self, found: Any, batch: ScoringBatch) -> NDArray[np.float32]:
        who = plugin_named("priority scorer", self._scorer_name, self.scorer)
        wanted = f"{len(batch)} finite priorities, none below 0"
        array = as_array(found, who, wanted)
        if array.dtype.kind in "fiub" and array.shape == (len(batch),):
            with np.errstate(over="ignore"):
                scores = array.astype(np.float32)
            if are_priorities(scores):
                return scores
        values = "" if array.size > 1 else f" {shown(found)}"
        if array.size > 1 and array.dtype.kind in "fiub":
            bad = array[~(np.isfinite(array) & (array >= 0) & (array <= _LARGEST))]
            values = f" with {bad[0]}" if bad.size else ""
        raise PluginContractError(
            f"{who} returned {array.dtype} {array.shape}{values}; expected {wanted}"
        )

    # ------------------------------------------------------------ drafts

    def _make_encoder(self) -> Encoder | None:
        """What does the plain case of `accept`; None where nothing is plain."""
        fusion, scorer = self.fusion, self.scorer
        # Of exactly these types: what a subclass does, who knows.
        if (
            native is None
            or not isinstance(fusion, WeightedSum | WeightedConcat)
            or type(fusion) not in (WeightedSum, WeightedConcat)
        ):
            return None
        scores, uncertainty, reward, age, half_life = False, 0.0, 0.0, 0.0, 1.0
        if isinstance(scorer, WeightedSumScorer) and type(scorer) is WeightedSumScorer:
            s = scorer.settings
            scores = True
            uncertainty, reward = s.uncertainty_weight, s.reward_weight * s.reward_scale
            age, half_life = s.age_weight, s.age_half_life_s
        encoder: Encoder = native.Encoder(
            experience=Experience,
            accepted=Accepted,
            array=np.ndarray,
            memmap=np.memmap,
            scalars=_SCALARS,
            fsum=math.fsum,
            v_dim=self.v_dim,
            q_dim=self.q_dim,
            dim=self.dim,
            max_row=min(self._max_experience, self._max_commit - 4 * self.dim),
            concat=type(fusion) is WeightedConcat,
            normalize=fusion.normalize,
            cosine=self.metric == "cosine",
            v_factor=fusion.v_factor,
            q_factor=fusion.q_factor,
            scores=scores,
            uncertainty=uncertainty,
            reward=reward,
            age=age,
            half_life=half_life,
        )
        return encoder

    def accept(self, experience: Experience, priority: float | None) -> Accepted:
        """Check one experience, score, encode and fuse it: all that may run code of the user's."""
        now = time.time()
        if self.encoder is not None:
            accepted: Accepted | None = self.encoder.accept(experience, priority, now)
            if accepted is not None:
                return accepted
        v = self._part(experience.v_embed, "v_embed", self.v_dim, rank=1)
        q = self._part(experience.q_embed, "q_embed", self.q_dim, rank=1)
        item = self._checked(experience, now)
        row = codec.encode_row(v, q, item.fields)
        if len(row) > self._max_experience or len(row) + 4 * self.dim > self._max_commit:
            self._check_sizes(np.array([len(row)], np.uint32))
        if priority is not None:
            value = float(initial_priorities([priority], 1)[0])
        else:
            value = self._score_one(item, now)
        (crc,) = codec.content_crcs(row, np.array((len(row),), np.uint32))
        vector = self.refuse(v[np.newaxis], q[np.newaxis]).tobytes()
        return Accepted(
            row,
            crc,
            vector,
            item.timestamp,
            item.reward,
            item.confidence,
            value,
            item.tags,
            item.key,
        )

    def accept_again(self, accepted: Accepted) -> Accepted:
        """The same, of what was accepted for another representation.

        Raises:
            InvalidExperience: This one has other dimensions.
        """
        v, q = codec.decode_embeddings([accepted.row], "v_embed", "q_embed")
        for part, name, dim in ((v, "v_embed", self.v_dim), (q, "q_embed", self.q_dim)):
            self._part(part[0] if part.size else None, name, dim, rank=1)
        return accepted._replace(vector=self.refuse(v, q).tobytes())

    def draft(self, accepted: Sequence[Accepted]) -> Draft:
        """What was accepted as one operation.

        One alone is drafted without arrays of one number: each costs a microsecond.
        """
        crcs = [each.crc for each in accepted]
        if len(accepted) == 1:
            (one,) = accepted
            body = codec.encode_add_one(
                *(one.timestamp, one.reward, one.confidence, one.priority, one.vector),
                _labels_of(accepted),
                self.representation,
            )
            lengths = np.array((len(one.row),), np.uint32)
            return draft_rows(codec.ADD, body, bytearray(one.row), lengths, crcs=crcs)
        lengths = np.array([len(each.row) for each in accepted], np.uint32)
        self._check_sizes(lengths)
        vectors = np.frombuffer(b"".join([each.vector for each in accepted]), np.float32)
        return self._draft(
            vectors.reshape(-1, self.dim),
            bytearray().join([each.row for each in accepted]),
            lengths,
            _numbers(accepted),
            np.array([each.priority for each in accepted], np.float32),
            _labels_of(accepted),
            crcs,
        )

    def labels(self, accepted: Accepted) -> bytes | None:
        """What replicas know it by, encoded; None where there is nothing."""
        found = _labels_of((accepted,))
        return None if found is None else codec.dump_json(found)

    def one(self, experience: Experience, priority: float | None) -> Draft:
        """One experience as an operation."""
        return self.draft((self.accept(experience, priority),))

    def _score_one(self, item: _Checked, now: float) -> float:
        """`score` of one experience."""
        known = item.reward == item.reward
        total = item.reward if known else 0.0
        if not -_LARGEST <= total <= _LARGEST:
            finite32(np.array([total]), "rewards")
        age = min(max(now - item.timestamp, 0.0), OLDEST)
        probabilities, metadata = item.fields.get("probabilities"), item.fields.get("metadata")
        if self._ask_one is not None:
            score = self._scored(
                self._ask_one,
                confidence=_narrow(item.confidence),
                total_reward=_narrow(total),
                reward_known=known,
                probabilities=probabilities,
                age=_narrow(age),
                metadata=metadata,
            )
            if type(score) is float and 0.0 <= score <= _LARGEST:
                return score
        batch = ScoringBatch(
            confidence=np.array((item.confidence,), np.float32),
            total_reward=np.array((total,), np.float32),
            reward_known=np.array((known,)),
            probabilities=(probabilities,),
            age=np.array((age,), np.float32),
            metadata=(metadata,),
        )
        scores = self._scored(self.scorer, batch)
        if type(scores) is np.ndarray and scores.shape == (1,) and scores.dtype.kind == "f":
            score = float(scores[0])
            if 0.0 <= score <= _LARGEST:
                return score
        return float(self._checked_scores(scores, batch)[0])  # says what is wrong

    def many(
        self, experiences: Sequence[Experience], priorities: Sequence[float | None] | None
    ) -> Draft:
        """Several experiences as one operation."""
        now = time.time()
        if priorities is None and (plain := self._all_plain(experiences, now)):
            return self.draft(plain)
        for item in experiences:
            if not isinstance(item, Experience):
                raise InvalidExperience(
                    f"expected an Experience, found a {type(item).__name__}; columns are given as "
                    "a mapping of arrays"
                )
        v = self._stack([item.v_embed for item in experiences], "v_embed", self.v_dim)
        q = self._stack([item.q_embed for item in experiences], "q_embed", self.q_dim)
        return self._together(v, q, _in_columns(experiences, now), priorities, now)

    def _all_plain(self, experiences: Sequence[Experience], now: float) -> list[Accepted]:
        """All of them, accepted by native code; none, if one is not for that."""
        accepted: list[Accepted] = []
        if self.encoder is not None:
            accept = self.encoder.accept
            for experience in experiences:
                found: Accepted | None = accept(experience, None, now)
                if found is None:
                    return []
                accepted.append(found)
        return accepted

    def _together(
        self, v: Vectors, q: Vectors, columns: _Columns, priorities: Any, now: float
    ) -> Draft:
        """What has been checked, as one operation."""
        lists, n = columns.lists, len(v)
        rows, lengths = codec.encode_columns(v, q, lists)
        scores = self._priorities(
            priorities,
            *columns.numbers,
            lists.get("probabilities", [None] * n),
            lists.get("metadata", ()),
            now,
        )
        tags = [each or [] for each in lists["tags"]] if "tags" in lists else [[]] * n
        labels = _labels(tags, lists.get("key", [None] * n))
        self._check_sizes(lengths)
        return self._draft(self.refuse(v, q), rows, lengths, columns.numbers, scores, labels)

    def _checked(self, item: Experience, now: float) -> _Checked:
        """Everything of an experience but its embeddings."""
        if item.id is not None:
            raise _has_an_id(item.id)
        fields: dict[str, Any] = {}
        question = item.question
        if type(question) is not str or question:
            fields["question"] = checked_text(question, "question")
        if item.answer is not None:
            fields["answer"] = item.answer
        reward = math.nan
        if item.rewards is not None:
            reward, fields["rewards"] = rewards(item.rewards)
        if item.trajectory is not None:
            fields["trajectory"] = item.trajectory
        if item.metadata is not None:
            fields["metadata"] = checked_metadata(item.metadata)
        if item.probabilities is not None:
            fields["probabilities"] = checked_probabilities(item.probabilities)
        if item.image is not None:
            fields["image"] = checked_image(item.image)
        tags = checked_tags(item.tags) if type(item.tags) is not tuple or item.tags else []
        if tags:
            fields["tags"] = tags
        if item.key is not None:
            fields["key"] = checked_text(item.key, "key")
        return _Checked(
            fields,
            number(item.confidence, "confidence", 0.0, 1.0),
            reward,
            now if item.timestamp is None else number(item.timestamp, "timestamp"),
            tags,
            item.key,
        )

    def _stack(self, parts: list[Any], name: str, dim: int) -> Vectors:
        """(n, dim) of n single embeddings."""
        if len(parts) > 1 and dim and all(type(part) is np.ndarray for part in parts):
            shape = (dim,)
            if all(part.shape == shape for part in parts):
                with np.errstate(over="ignore"):
                    return as_vectors(stacked(parts, dim), name, rank=2, dim=dim)
        return stacked([self._part(part, name, dim, rank=1) for part in parts], dim)

    def columns(self, columns: Mapping[str, Any], priorities: Any) -> Draft:
        """A mapping of columns as one operation; see `ExperienceBuffer.add_many`."""
        unknown = [name for name in columns if name not in COLUMNS]
        if unknown:
            near = difflib.get_close_matches(str(unknown[0]), COLUMNS, 1)
            hint = f". Did you mean {near[0]!r}?" if near else ""
            raise InvalidExperience(
                f"unknown columns: {', '.join(map(shown, unknown))}; known: "
                f"{', '.join(COLUMNS)}{hint}"
            )
        now = time.time()
        given = next(
            (columns[x] for x in ("v_embed", "q_embed") if columns.get(x) is not None), None
        )
        if given is None:
            raise InvalidExperience("the columns need v_embed, q_embed, or both")
        n = length_of(given)
        v = self._part(columns.get("v_embed"), "v_embed", self.v_dim, rank=2, n=n)
        q = self._part(columns.get("q_embed"), "q_embed", self.q_dim, rank=2, n=n)
        for name, values in (("v_embed", v), ("q_embed", q)):
            if len(values) != n:
                raise InvalidExperience(f"column {name!r} has {len(values)} entries, not {n}")
        confidence = float_column(columns.get("confidence"), "confidence", n, 1.0)
        if n and not (0.0 <= confidence.min() and confidence.max() <= 1.0):
            raise InvalidExperience("confidence: every value must be in [0, 1]")
        timestamp = float_column(columns.get("timestamp"), "timestamp", n, now)
        reward, components = reward_columns(columns.get("rewards"), n)
        lists = {
            name: list_column(columns[name], name, n)
            for name in ("question", "answer", "trajectory", "metadata", "image", "key")
            if columns.get(name) is not None
        }
        if columns.get("probabilities") is not None:
            lists["probabilities"] = [
                None if p is None else checked_probabilities(p)
                for p in list_column(columns["probabilities"], "probabilities", n, rows=True)
            ]
        if components is not None:
            lists["rewards"] = components
        if columns.get("tags") is not None:
            lists["tags"] = [
                checked_tags(tags) or None for tags in list_column(columns["tags"], "tags", n)
            ]
        for name, kind in _KINDS.items():
            for value in lists.get(name, ()):
                if value is not None and not isinstance(value, kind[0]):
                    raise InvalidExperience(
                        f"column {name!r}: expected {kind[1]}, found a {type(value).__name__}"
                    )
        if "image" in lists:
            lists["image"] = [
                None if image is None else checked_image(image) for image in lists["image"]
            ]
        numbers = _Numbers(confidence.astype(np.float32), reward, timestamp)
        return self._together(v, q, _Columns(lists, numbers), priorities, now)

    def _check_sizes(self, lengths: NDArray[np.uint32]) -> None:
        n = len(lengths)
        if n and int(lengths.max()) > self._max_experience:
            i = int(lengths.argmax())
            raise InvalidExperience(
                f"experience {i} takes {int(lengths[i]):,} bytes; max_experience_bytes is "
                f"{self._max_experience:,}"
            )
        total = int(lengths.sum(dtype=np.int64)) + 4 * n * self.dim
        if total > self._max_commit:
            raise InvalidExperience(
                f"{n} experiences take {total:,} bytes; max_commit_bytes is "
                f"{self._max_commit:,}: add them in several parts"
            )

    def _priorities(
        self,
        given: Any,
        confidence: NDArray[np.float32],
        reward: NDArray[np.float64],
        timestamp: NDArray[np.float64],
        probabilities: Sequence[NDArray[np.float32] | None],
        metadata: Sequence[Mapping[str, Any] | None],
        now: float,
    ) -> NDArray[np.float32]:
        """(n,) as given, and the scorer's where none is."""
        own = None if given is None else initial_priorities(given, len(confidence))
        if own is not None and not np.isnan(own).any():
            return own
        scores = self.score(confidence, reward, probabilities, ages(now, timestamp), metadata)
        return scores if own is None else np.where(np.isnan(own), scores, own)

    def _draft(
        self,
        vectors: Vectors,
        rows: bytearray,
        lengths: NDArray[np.uint32],
        numbers: _Numbers,
        priority: NDArray[np.float32],
        labels: dict[str, list[Any]] | None,
        crcs: list[int] | None = None,
    ) -> Draft:
        confidence, reward, timestamp = numbers
        body = codec.encode_add(
            AddBody(timestamp, reward, confidence, priority, vectors, labels, self.representation)
        )
        return draft_rows(codec.ADD, body, rows, lengths, crcs=crcs)
