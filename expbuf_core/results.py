"""What searches and samples return: hits, receipts, batches; payloads are decoded on demand."""

from __future__ import annotations

import math
import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn, overload

import numpy as np
from numpy.typing import NDArray

from expbuf_core import codec, frames, payloads
from expbuf_core.contracts import Buffer, Pin
from expbuf_core.crc import crc32
from expbuf_core.embedding_cache import EmbeddingCache
from expbuf_core.errors import CorruptionError, InvalidExperience, shown
from expbuf_core.experience import Experience
from expbuf_core.sampling import success_rate
from expbuf_core.state import SCALAR_REWARD, State

# ---------------------------------------------------------------- receipts


@dataclass(frozen=True)
class Receipt:
    """Proof of a retrieval, to be handed to `record_outcome` once its outcome is known.

    Made without any write. `str(receipt)` is its text form, which `record_outcome` takes as well.

    Attributes:
        buffer: First 8 bytes of the buffer's UUID, in hex.
        token: 16 random bytes, in hex.
        lsn: What the search had seen.
        ids: What it found.
    """

    buffer: str
    token: str
    lsn: int
    ids: tuple[int, ...]

    @classmethod
    def new(cls, buffer: str, lsn: int, ids: tuple[int, ...]) -> Receipt:
        """A receipt that nobody has seen before."""
        return cls(buffer, secrets.token_hex(16), lsn, ids)

    def __str__(self) -> str:
        body = f"{self.buffer}.{self.token}.{self.lsn}.{','.join(map(str, self.ids))}"
        return f"{body}.{crc32(body.encode()):08x}"

    @classmethod
    def parse(cls, text: str) -> Receipt:
        """The inverse of `str`.

        Raises:
            InvalidExperience: The text is no receipt.
        """
        body, _, crc = text.rpartition(".")
        try:
            if int(crc, 16) != crc32(body.encode()):
                raise ValueError
            buffer, token, lsn, ids = body.split(".")
            numbers = tuple(int(id_) for id_ in ids.split(",") if id_)
            return cls(buffer, token, int(lsn), numbers)
        except ValueError:
            raise InvalidExperience(f"not a receipt: {text[:80]!r}") from None

    def checked(self) -> tuple[bytes, int, NDArray[np.int64]]:
        """Token, LSN and ids.

        Raises:
            InvalidExperience: Somebody has made it by hand, and not well.
        """
        try:
            token, lsn = bytes.fromhex(self.token), self.lsn
            ids = np.array(self.ids)
            sound = ids.ndim == 1 and (ids.dtype.kind == "i" or not len(ids))
            if len(token) != 16 or not sound or not isinstance(lsn, int) or not 0 <= lsn < 1 << 63:
                raise ValueError
        except (TypeError, ValueError):
            raise InvalidExperience(
                f"not a receipt of a search: {shown(self)}; nothing was counted"
            ) from None
        return token, lsn, ids.astype(np.int64)


# ---------------------------------------------------------------- payloads


class ColumnValues(NamedTuple):
    """Columns of some experiences, as they were when these were chosen; each (n,)."""

    timestamp: NDArray[np.float64]
    reward: NDArray[np.float64]
    confidence: NDArray[np.float32]
    priority: NDArray[np.float32]
    retrieval_count: NDArray[np.uint32]
    success_count: NDArray[np.float32]
    flags: NDArray[np.uint8]


def _tell_nobody(exc: CorruptionError) -> None:
    pass


class PinnedExperiences(Sequence[Experience]):
    """Experiences that are decoded when they are looked at, and stay readable.

    They decode also after they were evicted and their files deleted.
    """

    def __init__(
        self,
        ids: NDArray[np.int64],
        slots: NDArray[np.int64],
        state: State,
        cache: EmbeddingCache | None = None,
    ) -> None:
        self.ids = ids
        self.values = ColumnValues(
            state.timestamp.take(slots),
            state.reward.take(slots),
            state.confidence.take(slots),
            state.priority.take(slots),
            state.retrieval_count.take(slots),
            state.success_count.take(slots),
            state.flags.take(slots),
        )
        self._dims = state.dims
        self.locations = state.location.take(slots)
        self.lengths = state.length.take(slots)
        named = state.rewards
        self._named = {i: dict(named[i]) for i in ids.tolist() if i in named} if named else {}
        self._pin: Pin | None = None
        self._tell: Callable[[CorruptionError], None] = _tell_nobody
        self._cache = cache
        self._rows: list[Buffer | None] = []  # those that were read, and found intact
        self._decoded: dict[int, codec.DecodedRow] = {}
        self._parts: dict[str, NDArray[np.float32]] = {}

    def pin(self, pin: Pin, tell: Callable[[CorruptionError], None]) -> None:
        """Hold on to the payloads. `tell`: called when one of them turns out to be damaged."""
        self._pin = pin
        self._tell = tell

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "what a search or sample has found is read from the buffer's files when it is looked "
            "at, and cannot be pickled or copied; use `list(found.experiences)`, `found.ids` and "
            "the other arrays, and `found.receipt`"
        )

    def __len__(self) -> int:
        return len(self.ids)

    @overload
    def __getitem__(self, i: int) -> Experience: ...

    @overload
    def __getitem__(self, i: slice) -> list[Experience]: ...

    def __getitem__(self, i: int | slice) -> Experience | list[Experience]:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        n = len(self)
        if not -n <= i < n:
            raise IndexError(f"{i} of {n} experiences")
        return self._experience(i % n)

    def row(self, i: int) -> codec.DecodedRow:
        """Payload of the i-th, checked.

        Raises:
            CorruptionError: It is not what was written.
        """
        found = self._decoded.get(i)
        if found is None:
            (raw,) = self._verified(np.array([i]))
            try:
                found = self._decoded[i] = codec.decode_row(raw)
            except codec.UNDECODABLE as exc:
                raise self._undecodable(int(self.ids[i]), exc) from exc
        return found

    def fields(self, *names: str) -> list[dict[str, Any]]:
        """Fields of all the payloads; at least those of these names, where there are any.

        Read all at once, and decoded only where such a name stands.

        Raises:
            CorruptionError: A payload is not what was written.
        """
        marks = [f'"{name}"'.encode() for name in names]
        found: list[dict[str, Any]] = []
        for i, raw in enumerate(self._verified(np.arange(len(self)))):
            text = bytes(raw)
            mentioned = any(mark in text for mark in marks)
            found.append(self.row(i).fields if mentioned else {})
        return found

    def raw(self, i: int) -> Buffer:
        """Payload of the i-th as it is stored, checked; raises like `row`."""
        return self._verified(np.array([i]))[0]

    def check(self, i: int) -> None:
        """See that the payload of the i-th is intact, and has embeddings as the buffer's are.

        Raises:
            CorruptionError: They are not.
        """
        row = self.raw(i)
        assert self._pin is not None
        error = payloads.misfit(self._pin, i, int(self.ids[i]), row, self._dims)
        if error is not None:
            self._tell(error)
            raise error

    def _verified(self, which: NDArray[np.int64]) -> list[Buffer]:
        """Payloads as they are stored, checked."""
        if not self._rows and len(which) == len(self):  # all of them, and none is here yet
            found = self._read(np.arange(len(self)))
            self._rows = list(found)
            return found
        rows = self._rows = self._rows or [None] * len(self)
        missing = [i for i in which.tolist() if rows[i] is None]
        if missing:
            for i, row in zip(missing, self._read(np.array(missing)), strict=True):
                rows[i] = row
        return [row for i in which.tolist() if (row := rows[i]) is not None]

    def _read(self, which: NDArray[np.int64]) -> list[Buffer]:
        """Payloads from the storage, checked."""
        if self._pin is None:
            raise RuntimeError("payloads that were not pinned")
        wanted = self.ids[which].tolist()
        try:
            found = self._pin.read_many(which)
            bad = frames.first_damaged(found, wanted)
            if bad >= 0:
                raise frames.damaged_payload(self._pin, int(which[bad]), wanted[bad])
        except CorruptionError as exc:
            self._tell(exc)
            raise
        return found

    def _undecodable(self, id_: int, exc: Exception) -> CorruptionError:
        error = CorruptionError(f"experience {id_} cannot be decoded: {exc}")
        self._tell(error)
        return error

    def _experience(self, i: int) -> Experience:
        row = self.row(i)
        values, fields = self.values, row.fields
        id_ = int(self.ids[i])
        reward = float(values.reward[i])
        rewards: Any = fields.get("rewards")
        if math.isnan(reward):
            rewards = None
        elif values.flags[i] & SCALAR_REWARD:
            rewards = {"reward": reward}
        elif id_ in self._named:
            rewards = self._named[id_]
        elif rewards is None:
            rewards = {"reward": reward}
        return Experience(
            v_embed=row.v_embed if len(row.v_embed) else None,
            q_embed=row.q_embed if len(row.q_embed) else None,
            question=fields.get("question", ""),
            answer=fields.get("answer"),
            confidence=float(values.confidence[i]),
            rewards=rewards,
            trajectory=fields.get("trajectory"),
            metadata=fields.get("metadata"),
            probabilities=fields.get("probabilities"),
            tags=tuple(fields.get("tags", ())),
            image=fields.get("image"),
            key=fields.get("key"),
            timestamp=float(values.timestamp[i]),
            id=id_,
            priority=float(values.priority[i]),
            retrieval_count=int(values.retrieval_count[i]),
            success_count=float(values.success_count[i]),
        )

    def embeddings(self, part: str) -> NDArray[np.float32]:
        """(n, dim) float32 of "v_embed" or "q_embed"; the same array every time.

        Raises:
            CorruptionError: A payload is not what was written.
        """
        if part not in self._parts:
            self._parts[part] = self._embeddings(part)
        return self._parts[part]

    def _embeddings(self, part: str) -> NDArray[np.float32]:
        n = len(self)
        if n == 0:
            return np.empty((0, 0), np.float32)
        if self._cache is None:
            return self._stored(np.arange(n), part)[0]
        vectors, held = self._cache.get(part, self.ids, self.locations)
        if np.count_nonzero(held) < n:
            which = np.flatnonzero(~held)
            ids = self.ids[which]
            if not self._cache.has_room(ids):
                (vectors[which],) = self._stored(which, part)
                return vectors
            v, q = self._stored(which, "v_embed", "q_embed")
            vectors[which] = v if part == "v_embed" else q
            self._cache.put(ids, self.locations[which], v, q)
        return vectors

    def _stored(self, which: NDArray[np.int64], *parts: str) -> list[NDArray[np.float32]]:
        rows = self._verified(which)
        try:
            return codec.decode_embeddings(rows, *parts)
        except codec.UNDECODABLE as exc:
            raise self._undecodable(int(self.ids[which[0]]), exc) from exc


# ---------------------------------------------------------------- searches


class Hit:
    """One experience that a search found.

    Attributes:
        id: Of the experience.
        similarity: Larger is closer, under every metric.
        success_rate: In [0, 1], smoothed by the configured prior.
    """

    __slots__ = ("_at", "_experiences", "id", "similarity", "success_rate")

    def __init__(
        self, experiences: PinnedExperiences, at: int, similarity: float, success_rate: float
    ) -> None:
        self._experiences = experiences
        self._at = at
        self.id = int(experiences.ids[at])
        self.similarity = similarity
        self.success_rate = success_rate

    @property
    def experience(self) -> Experience:
        """The experience, decoded when it is looked at."""
        return self._experiences[self._at]

    @property
    def retrieval_count(self) -> int:
        """How often it had been retrieved."""
        return int(self._experiences.values.retrieval_count[self._at])

    @property
    def success_count(self) -> float:
        """How often the consensus it took part in had been right."""
        return float(self._experiences.values.success_count[self._at])

    @property
    def priority(self) -> float:
        """Its priority."""
        return float(self._experiences.values.priority[self._at])

    def __repr__(self) -> str:
        return f"Hit(id={self.id}, similarity={self.similarity:.4f})"


class SearchResult(Sequence[Hit]):
    """Hits, the most similar first.

    Attributes:
        ids: (n,) int64.
        similarities: (n,) float32.
        lsn: What the search had seen.
    """

    def __init__(
        self,
        experiences: PinnedExperiences,
        similarities: NDArray[np.float32],
        *,
        prior: tuple[float, float],
        buffer: str,
        lsn: int,
    ) -> None:
        self.ids = experiences.ids.copy()  # the caller's, who may sort it
        self.similarities = similarities
        self.experiences = experiences
        self.lsn = lsn
        self._prior = prior  # of the success rate: its value, and how much it counts
        self._buffer = buffer
        self._token = os.urandom(16)  # now: a forked child has the same
        self._receipt: Receipt | None = None
        self._rates: list[float] | None = None

    @property
    def receipt(self) -> Receipt:
        """Hand it to `record_outcome`; the same every time."""
        if self._receipt is None:
            ids = tuple(self.experiences.ids.tolist())
            self._receipt = Receipt(self._buffer, self._token.hex(), self.lsn, ids)
        return self._receipt

    def __len__(self) -> int:
        return len(self.ids)

    @overload
    def __getitem__(self, i: int) -> Hit: ...

    @overload
    def __getitem__(self, i: slice) -> list[Hit]: ...

    def __getitem__(self, i: int | slice) -> Hit | list[Hit]:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        n = len(self)
        if not -n <= i < n:
            raise IndexError(f"{i} of {n} hits")
        i %= n
        if self._rates is None:
            values = self.experiences.values
            self._rates = success_rate(
                values.retrieval_count, values.success_count, *self._prior
            ).tolist()
        return Hit(self.experiences, i, float(self.similarities[i]), self._rates[i])

    def __iter__(self) -> Iterator[Hit]:
        for i in range(len(self)):
            yield self[i]

    def credit(self, power: float = 1.0) -> NDArray[np.float32]:
        """What part of a success is due to each hit by its similarity, for `record_outcome`.

        Args:
            power: The higher, the less the distant hits get.

        Returns:
            (n,) float32 in [0, 1]: (similarity / that of the nearest)^power, and 0 where it is not
            above 0. Where none is, as under `l2`: how far the nearest is in proportion.
        """
        similarities = self.similarities.astype(np.float64)
        if not len(similarities):
            return np.empty(0, np.float32)
        nearest = similarities[0]
        if nearest > 0:
            shares = np.maximum(similarities, 0.0) / nearest
        else:
            # Negative squared distances; the nearest may be at distance 0.
            with np.errstate(divide="ignore", invalid="ignore"):
                shares = np.where(similarities == nearest, 1.0, nearest / similarities)
        credit: NDArray[np.float32] = (shares**power).astype(np.float32)
        return credit

    def __repr__(self) -> str:
        return f"SearchResult({', '.join(map(repr, self))})"


class SearchBatch(NamedTuple):
    """What `search_many` returns.

    Attributes:
        ids: (n, k) int64, padded with -1.
        similarities: (n, k) float32, padded with -inf.
        receipts: One for each query.
    """

    ids: NDArray[np.int64]
    similarities: NDArray[np.float32]
    receipts: list[Receipt]


# ---------------------------------------------------------------- samples


class SampleBatch:
    """What `sample` returns. Arrays are this batch's own.

    Attributes:
        ids: (n,) int64.
        is_weights: (n,) float32 in (0, 1]: importance weights.
        probabilities: (n,) float64: P(i) of each draw.
        lsn: The sample sees every commit up to it.
        experiences: The experiences, decoded when looked at.
    """

    def __init__(
        self,
        experiences: PinnedExperiences,
        is_weights: NDArray[np.float32],
        probabilities: NDArray[np.float64],
        lsn: int,
    ) -> None:
        self.ids = experiences.ids.copy()  # the caller's, who may sort it
        self.is_weights = is_weights
        self.probabilities = probabilities
        self.lsn = lsn
        self.experiences = experiences

    def __len__(self) -> int:
        return len(self.ids)

    def __iter__(self) -> Iterator[Experience]:
        return iter(self.experiences)

    @property
    def total_reward(self) -> NDArray[np.float64]:
        """(n,) float64, NaN where unknown."""
        return self.experiences.values.reward

    @property
    def confidence(self) -> NDArray[np.float32]:
        """(n,) float32."""
        return self.experiences.values.confidence

    @property
    def priority(self) -> NDArray[np.float32]:
        """(n,) float32, as it was when drawn."""
        return self.experiences.values.priority

    @property
    def timestamp(self) -> NDArray[np.float64]:
        """(n,) float64, UTC seconds."""
        return self.experiences.values.timestamp

    @property
    def retrieval_count(self) -> NDArray[np.uint32]:
        """(n,) uint32."""
        return self.experiences.values.retrieval_count

    @property
    def success_count(self) -> NDArray[np.float32]:
        """(n,) float32."""
        return self.experiences.values.success_count

    @property
    def v_embed(self) -> NDArray[np.float32]:
        """(n, v_dim) float32, read from the payloads into one array."""
        return self.experiences.embeddings("v_embed")

    @property
    def q_embed(self) -> NDArray[np.float32]:
        """(n, q_dim) float32, read from the payloads into one array."""
        return self.experiences.embeddings("q_embed")

    def __repr__(self) -> str:
        return f"SampleBatch({len(self)} experiences, lsn={self.lsn})"
