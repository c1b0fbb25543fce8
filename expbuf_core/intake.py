"""What comes in is checked, converted, scored, fused and encoded here, before any lock is taken."""

from __future__ import annotations

import difflib
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from operator import attrgetter
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from expbuf_core import codec
from expbuf_core.codec import AddBody
from expbuf_core.commit import Draft, draft_rows
from expbuf_core.contracts import EmbeddingFusion, PriorityScorer, ScoringBatch
from expbuf_core.errors import (
    DimensionError,
    ExpbufError,
    InvalidExperience,
    PluginContractError,
)
from expbuf_core.experience import Experience

Vectors = NDArray[np.float32]

_OLDEST = 1e30  # seconds; finite in float32
_FLOAT32 = np.dtype(np.float32)
_BLAS_ALONE = 10_000  # numbers
_MOST_DRAWN = 1 << 31
_SHOWN = 80  # characters of a value in a message
_SAFE = (1e-24, 1e30)  # squared lengths in between have lost nothing to float32's range
_LARGEST = float(np.finfo(np.float32).max)
_ORDINARY = 1e12  # the size of numbers of which a fusion can make finite ones

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


# ---------------------------------------------------------------- embeddings


def as_vectors(value: Any, name: str, *, rank: int, dim: int | None) -> Vectors:
    """Convert embeddings to float32, and check them.

    Args:
        value: An array, anything with the array protocol, a torch tensor, a list of numbers.
        name: For messages.
        rank: 1 for one embedding, 2 for several.
        dim: That the buffer holds; None while it is not known.

    Returns:
        (dim,) or (n, dim) float32, C-contiguous, finite. Not a copy where none is needed.

    Raises:
        DimensionError: The shape is wrong.
        InvalidExperience: It is no array of finite real numbers.
    """
    if type(value) is np.ndarray:
        array: NDArray[Any] | None = value
        if (  # nearly always so: nothing to convert
            value.dtype == _FLOAT32
            and value.ndim == rank
            and value.shape[-1] == dim
            and value.flags.c_contiguous
            and math.isfinite(_sum_of_squares(value))
        ):
            return value
    else:
        array = codec.to_numpy(value)
        if array is not None:
            array = np.asarray(array)  # no subclass with multiplication of its own
    if array is None:
        if not isinstance(value, list | tuple):
            raise InvalidExperience(
                f"{name}: expected an array of numbers, found a {type(value).__name__}"
            )
        try:
            array = np.asarray(value)
            if array.dtype.kind in "US":
                raise TypeError("found text")
            if array.dtype.kind == "O":  # beyond 64 bits, or no numbers
                array = array.astype(np.float64)
        except (TypeError, ValueError, OverflowError) as exc:
            raise InvalidExperience(f"{name}: not an array of numbers: {exc}") from exc
    if array.ndim != rank:
        raise _rank_error(array, name, rank)
    if dim is not None and array.shape[-1] != dim:
        raise DimensionError(
            f"{name}: dimension {array.shape[-1]}, but this buffer holds embeddings of dimension "
            f"{dim}",
            expected=dim,
            found=array.shape,
        )
    if array.shape[-1] == 0:
        raise DimensionError(
            f"{name}: empty (shape {array.shape})", expected=dim, found=array.shape
        )
    if array.dtype != np.float32:
        if array.dtype.kind not in "fiub":
            raise InvalidExperience(f"{name}: expected real numbers, found dtype {array.dtype}")
        with np.errstate(over="ignore"):
            array = array.astype(np.float32)
    if not array.flags.c_contiguous:
        array = np.ascontiguousarray(array)
    # This is the fastest pass over the data; only its overflow needs a second look.
    if not math.isfinite(_sum_of_squares(array)) and not np.isfinite(array).all():
        at = tuple(int(i) for i in np.argwhere(~np.isfinite(array))[0])
        raise InvalidExperience(
            f"{name}: {array[at]} at position {at if rank > 1 else at[0]}; embeddings must be "
            "finite in float32"
        )
    return array


def to_read(array: NDArray[Any]) -> NDArray[Any]:
    """The same for a plugin, which must not change it: it may be the caller's, or be stored."""
    view = array.view()
    view.flags.writeable = False
    return view


def _sum_of_squares(array: Vectors) -> float:
    """Of a C-contiguous array; unlike `@`, this overflows without a warning.

    By this thread alone: for more than 10,000 numbers OpenBLAS wakes others, and each spins for a
    while behind its part, at the cost of whoever shares the processor.
    """
    if array.size <= _BLAS_ALONE:
        return float(np.vdot(array, array))
    flat = array.reshape(-1)
    return float(np.einsum("i,i->", flat, flat))


def _stacked(parts: Sequence[NDArray[Any]], dim: int) -> NDArray[Any]:
    """(n, dim) of n rows; a third of what `np.stack` takes."""
    return np.concatenate(parts).reshape(len(parts), dim)


def _rank_error(array: NDArray[Any], name: str, rank: int) -> DimensionError:
    hint = ""
    if rank == 1 and array.ndim == 2 and array.shape[0] == 1:
        hint = f"; this is a batch of one: give {name}[0]"
    elif rank == 1 and array.ndim == 2:
        hint = "; for several experiences at once use add_many or search_many"
    elif rank == 2 and array.ndim == 1:
        hint = f"; for a single one give {name}[None]"
    expected = "(dim,)" if rank == 1 else "(n, dim)"
    return DimensionError(
        f"{name}: expected shape {expected}, found {array.shape}{hint}", found=array.shape
    )


def _normalised_plainly(vectors: Vectors) -> Vectors | None:
    """Rows of length 1, finite; None where that takes more care."""
    low, high = _SAFE
    if len(vectors) == 1:  # as adds and searches come
        square = float(np.vdot(vectors, vectors))  # the one product that overflows without warning
        return vectors * (1.0 / math.sqrt(square)) if low < square < high else None
    squares = np.einsum("ij,ij->i", vectors, vectors)
    if not (low < squares.min(initial=1) and squares.max(initial=1) < high):
        return None
    factors: NDArray[np.float32] = 1.0 / np.sqrt(squares)
    return vectors * factors[:, None]


def normalised(vectors: Vectors) -> Vectors:
    """Scale rows to length 1; rows of zeros stay zero. What is finite stays finite."""
    scaled = _normalised_plainly(vectors)
    if scaled is not None:
        return scaled
    wide = vectors.astype(np.float64)
    norms = np.sqrt(np.einsum("ij,ij->i", wide, wide))
    norms[norms == 0] = 1
    wide /= norms[:, None]
    return wide.astype(np.float32)


def _plugin(noun: str, name: str, plugin: object) -> str:
    """A plugin in a message."""
    named = f"the {noun} {name!r}" if name else f"the {noun}"
    return f"{named} ({type(plugin).__name__})"


def _as_array(found: Any, who: str, wanted: str) -> NDArray[Any]:
    """What a plugin has returned, as an array."""
    try:
        return np.asarray(found)
    except (TypeError, ValueError, OverflowError) as exc:  # ragged, or it cannot be read
        raise PluginContractError(f"{who} returned {shown(found)}; expected {wanted}") from exc


def fused_dim(fusion: EmbeddingFusion, v_dim: int, q_dim: int, name: str = "") -> int:
    """Dimension of the fused vectors. `name`: of the fusion, for messages.

    Raises:
        ValueError: The fusion does not take these dimensions, and says why.
        PluginContractError: It says something else than a dimension.
    """
    who = _plugin("embedding fusion", name, fusion)
    try:
        dim = fusion.output_dim(v_dim, q_dim)
    except (ExpbufError, ValueError):
        raise
    except Exception as exc:
        raise PluginContractError(
            f"{who} failed in output_dim({v_dim}, {q_dim}): {type(exc).__name__}: {exc}; expected "
            "a dimension, or a ValueError that says why there is none"
        ) from exc
    if not isinstance(dim, int | np.integer) or isinstance(dim, bool) or dim < 1:
        raise PluginContractError(
            f"{who} returned {shown(dim)} from output_dim({v_dim}, {q_dim}); expected an integer "
            "of at least 1"
        )
    return int(dim)


def fuse(
    fusion: EmbeddingFusion, metric: str, v: Vectors, q: Vectors, dim: int, name: str = ""
) -> Vectors:
    """Fused vectors as they are indexed: (n, dim) float32, normalised under cosine.

    Args:
        fusion: Of the buffer.
        metric: Of the buffer.
        v: (n, v_dim)
        q: (n, q_dim)
        dim: Of the result.
        name: Of the fusion, for messages.

    Raises:
        PluginContractError: The fusion returned something else.
        InvalidExperience: The parts are so large that their fusion is not finite.
    """
    found = fusion(to_read(v), to_read(q))
    if type(found) is not np.ndarray or found.shape != (len(v), dim) or found.dtype != _FLOAT32:
        who, wanted = _plugin("embedding fusion", name, fusion), f"float32 {(len(v), dim)}"
        found = _as_array(found, who, wanted)
        if found.shape != (len(v), dim) or found.dtype != _FLOAT32:
            raise PluginContractError(
                f"{who} returned {found.dtype} {found.shape}; expected {wanted}"
            )
    fused: Vectors = found
    if metric == "cosine":
        scaled = _normalised_plainly(fused)
        if scaled is not None:
            return scaled
    # Their sum of squares is finite if they are; where it is not, a second look tells.
    if not math.isfinite(_sum_of_squares(fused)) and not np.isfinite(fused).all():
        if max(np.abs(part).max(initial=0.0) for part in (v, q)) <= _ORDINARY:
            raise PluginContractError(
                f"{_plugin('embedding fusion', name, fusion)} returned numbers that are not "
                "finite for parts that are"
            )
        raise InvalidExperience("the fused embedding is not finite: its parts are too large")
    return normalised(fused) if metric == "cosine" else np.ascontiguousarray(fused)


# ---------------------------------------------------------------- single values


def shown(value: object) -> str:
    """A value in a message: short, and whatever it is."""
    try:
        text = repr(value)
    except Exception:  # nested too deep, an integer of thousands of digits, a `__repr__` that fails
        return f"a {type(value).__name__}"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}... (a {type(value).__name__})"


def number(value: Any, name: str, low: float = -math.inf, high: float = math.inf) -> float:
    """A finite number within bounds.

    Raises:
        InvalidExperience: It is not.
    """
    if type(value) is not float:
        if isinstance(value, str | bytes | bool | np.bool_) or value is None:
            raise InvalidExperience(f"{name}: expected a number, found {shown(value)}")
        try:
            value = float(value)
        except (TypeError, ValueError, OverflowError) as exc:
            raise InvalidExperience(f"{name}: expected a number, found {shown(value)}") from exc
    if not low <= value <= high or math.isinf(value):
        bounds = "" if math.isinf(low) else f" in [{low:g}, {high:g}]"
        raise InvalidExperience(f"{name}: expected a finite number{bounds}, found {shown(value)}")
    return float(value)


def truth(value: Any, name: str) -> bool:
    """True or False; a 0 or 1 of a data set will do.

    Raises:
        InvalidExperience: It is something else.
    """
    if not isinstance(value, bool | np.bool_) and not (
        isinstance(value, int | np.integer) and value in (0, 1)
    ):
        raise InvalidExperience(f"{name} must be True or False, not {shown(value)}")
    return bool(value)


def rewards(value: Any, where: str = "rewards") -> tuple[float, dict[str, float] | None]:
    """(total, components); NaN and None while unknown."""
    if value is None:
        return math.nan, None
    if isinstance(value, Mapping):
        components = {}
        for name, part in value.items():
            if not isinstance(name, str):
                raise InvalidExperience(
                    f"{where}: component names must be strings, found {shown(name)}"
                )
            components[name] = number(part, f"{where}[{name!r}]")
        try:
            total = math.fsum(components.values())
        except OverflowError:
            total = math.inf
        return number(total, where), components
    try:
        total = number(value, where)
    except InvalidExperience as exc:
        raise InvalidExperience(f"{exc}, or a mapping of names to numbers") from exc
    return total, {"reward": total}


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise InvalidExperience(f"{name}: expected a string, found a {type(value).__name__}")
    return value


def _image(value: Any) -> str | bytes:
    image = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(image, str | bytes):
        raise InvalidExperience(
            f"image: expected a path or encoded bytes, found a {type(value).__name__}"
        )
    return image


def _tags(value: Any, name: str = "tags") -> list[str]:
    if isinstance(value, str) or not isinstance(value, Sequence | set | frozenset):
        raise InvalidExperience(f"{name}: expected a sequence of strings, found {shown(value)}")
    return [_text(tag, name) for tag in value]


def _metadata(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise InvalidExperience(f"metadata: expected a mapping, found a {type(value).__name__}")
    return value


def _probabilities(value: Any, name: str = "probabilities") -> NDArray[np.float32]:
    array = as_vectors(value, name, rank=1, dim=None)
    total = float(array.sum(dtype=np.float64))
    if array.min() < 0 or abs(total - 1.0) > 1e-2:
        raise InvalidExperience(f"{name}: must not be negative and must sum to 1, not to {total:g}")
    return to_read(array)


def listed(values: Any, name: str) -> list[Any]:
    """The entries of whatever can be iterated over.

    Raises:
        InvalidExperience: It cannot.
    """
    try:
        return list(values)
    except TypeError as exc:
        raise InvalidExperience(
            f"{name}: expected several, found a {type(values).__name__}"
        ) from exc


def _array_of(values: list[Any], name: str) -> NDArray[Any]:
    try:
        return np.asarray(values)
    except (TypeError, ValueError, OverflowError) as exc:  # ragged, or nested too deep
        raise InvalidExperience(f"{name}: expected a flat sequence of numbers: {exc}") from exc


def as_ids(ids: Any, name: str = "ids") -> NDArray[np.int64]:
    """(n,) int64 of whatever holds ids. `name`: for messages.

    Raises:
        InvalidExperience: It holds something else.
    """
    if isinstance(ids, tuple | list) and not ids:
        return np.empty(0, np.int64)
    array = codec.to_numpy(ids)
    if array is None:
        array = _array_of([ids] if isinstance(ids, int) else listed(ids, name), name)
    if array.size == 0:
        return np.empty(0, np.int64)
    if array.dtype.kind not in "iu":
        raise InvalidExperience(f"{name} must be integers, found dtype {array.dtype}")
    if array.dtype.kind == "u" and int(array.max()) > np.iinfo(np.int64).max:
        raise InvalidExperience(f"{name} must fit into int64")
    return np.atleast_1d(array).reshape(-1).astype(np.int64)


def check_batch_size(value: Any) -> None:
    """Raise unless so many can be drawn."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise InvalidExperience(f"batch_size must be an integer, not {shown(value)}")
    if not 1 <= value < _MOST_DRAWN:
        raise InvalidExperience(
            f"batch_size must be at least 1 and below {_MOST_DRAWN:,}, not {shown(value)}"
        )


def _any(value: Any) -> Any:
    return value


# What goes into a payload, in this order, and what checks it.
_CHECKS: dict[str, Callable[[Any], Any]] = {
    "question": partial(_text, name="question"),
    "answer": _any,
    "rewards": rewards,
    "trajectory": _any,
    "metadata": _metadata,
    "probabilities": _probabilities,
    "image": _image,
    "tags": _tags,
    "key": partial(_text, name="key"),
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
    """An experience that can be stored as it is; see `Intake.accept`."""

    v: Vectors
    q: Vectors
    row: bytes
    item: _Checked
    priority: float


class _Numbers(NamedTuple):
    """Of n experiences: (n,) each."""

    confidence: NDArray[np.float32]
    reward: NDArray[np.float64]
    timestamp: NDArray[np.float64]


def _numbers(items: Sequence[_Checked]) -> _Numbers:
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


def _labels_of(items: Sequence[_Checked]) -> dict[str, list[Any]] | None:
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
            return self._checked_scores(self.scorer(batch), batch)

    def _checked_scores(self, found: Any, batch: ScoringBatch) -> NDArray[np.float32]:
        who = _plugin("priority scorer", self._scorer_name, self.scorer)
        wanted = f"{len(batch)} finite priorities, none below 0"
        array = _as_array(found, who, wanted)
        if array.dtype.kind in "fiub" and array.shape == (len(batch),):
            with np.errstate(over="ignore"):
                scores = array.astype(np.float32)
            if _are_priorities(scores):
                return scores
        values = "" if array.size > 1 else f" {shown(found)}"
        if array.size > 1 and array.dtype.kind in "fiub":
            bad = array[~(np.isfinite(array) & (array >= 0) & (array <= _LARGEST))]
            values = f" with {bad[0]}" if bad.size else ""
        raise PluginContractError(
            f"{who} returned {array.dtype} {array.shape}{values}; expected {wanted}"
        )

    # ------------------------------------------------------------ drafts

    def accept(self, experience: Experience, priority: float | None) -> Accepted:
        """Check one experience, score and encode it: all that may run code of the user's."""
        now = time.time()
        v = self._part(experience.v_embed, "v_embed", self.v_dim, rank=1)
        q = self._part(experience.q_embed, "q_embed", self.q_dim, rank=1)
        item = self._checked(experience, now)
        row = codec.encode_row(v, q, item.fields)
        if len(row) > self._max_experience or len(row) + 4 * self.dim > self._max_commit:
            self._check_sizes(np.array([len(row)], np.uint32))
        if priority is not None:
            value = float(_priorities([priority], 1)[0])
        else:
            value = self._score_one(item, now)
        return Accepted(v, q, row, item, value)

    def draft(self, accepted: Sequence[Accepted]) -> Draft:
        """What was accepted as one operation.

        One alone is drafted without arrays of one number: each costs a microsecond.
        """
        if len(accepted) == 1:
            ((v, q, row, item, value),) = accepted
            vector = self.refuse(v[np.newaxis], q[np.newaxis])
            body = codec.encode_add_one(
                *(item.timestamp, item.reward, item.confidence, value, vector),
                _labels_of((item,)),
                self.representation,
            )
            lengths = np.array((len(row),), np.uint32)
            return draft_rows(codec.ADD, body, bytearray(row), lengths, 1)
        items = [each.item for each in accepted]
        return self._draft(
            _stacked([each.v for each in accepted], self.v_dim),
            _stacked([each.q for each in accepted], self.q_dim),
            bytearray().join([each.row for each in accepted]),
            np.array([len(each.row) for each in accepted], np.uint32),
            _numbers(items),
            np.array([each.priority for each in accepted], np.float32),
            _labels_of(items),
        )

    def one(self, experience: Experience, priority: float | None) -> Draft:
        """One experience as an operation."""
        return self.draft((self.accept(experience, priority),))

    def _score_one(self, item: _Checked, now: float) -> float:
        """`score` of one experience."""
        known = item.reward == item.reward
        total = item.reward if known else 0.0
        if not -_LARGEST <= total <= _LARGEST:
            finite32(np.array([total]), "rewards")
        age = min(max(now - item.timestamp, 0.0), _OLDEST)
        probabilities, metadata = item.fields.get("probabilities"), item.fields.get("metadata")
        if self._ask_one is not None:
            score = self._ask_one(
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
        scores = self.scorer(batch)
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
        for item in experiences:
            if not isinstance(item, Experience):
                raise InvalidExperience(
                    f"expected an Experience, found a {type(item).__name__}; columns are given as "
                    "a mapping of arrays"
                )
        v = self._stack([item.v_embed for item in experiences], "v_embed", self.v_dim)
        q = self._stack([item.q_embed for item in experiences], "q_embed", self.q_dim)
        return self._together(v, q, _in_columns(experiences, now), priorities, now)

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
        return self._draft(v, q, rows, lengths, columns.numbers, scores, labels)

    def _checked(self, item: Experience, now: float) -> _Checked:
        """Everything of an experience but its embeddings."""
        if item.id is not None:
            raise _has_an_id(item.id)
        fields: dict[str, Any] = {}
        question = item.question
        if type(question) is not str or question:
            fields["question"] = _text(question, "question")
        if item.answer is not None:
            fields["answer"] = item.answer
        reward = math.nan
        if item.rewards is not None:
            reward, fields["rewards"] = rewards(item.rewards)
        if item.trajectory is not None:
            fields["trajectory"] = item.trajectory
        if item.metadata is not None:
            fields["metadata"] = _metadata(item.metadata)
        if item.probabilities is not None:
            fields["probabilities"] = _probabilities(item.probabilities)
        if item.image is not None:
            fields["image"] = _image(item.image)
        tags = _tags(item.tags) if type(item.tags) is not tuple or item.tags else []
        if tags:
            fields["tags"] = tags
        if item.key is not None:
            fields["key"] = _text(item.key, "key")
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
                    return as_vectors(_stacked(parts, dim), name, rank=2, dim=dim)
        return _stacked([self._part(part, name, dim, rank=1) for part in parts], dim)

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
        n = _length(given)
        v = self._part(columns.get("v_embed"), "v_embed", self.v_dim, rank=2, n=n)
        q = self._part(columns.get("q_embed"), "q_embed", self.q_dim, rank=2, n=n)
        for name, values in (("v_embed", v), ("q_embed", q)):
            if len(values) != n:
                raise InvalidExperience(f"column {name!r} has {len(values)} entries, not {n}")
        confidence = _float_column(columns.get("confidence"), "confidence", n, 1.0)
        if n and not (0.0 <= confidence.min() and confidence.max() <= 1.0):
            raise InvalidExperience("confidence: every value must be in [0, 1]")
        timestamp = _float_column(columns.get("timestamp"), "timestamp", n, now)
        reward, components = _reward_columns(columns.get("rewards"), n)
        lists = {
            name: _list_column(columns[name], name, n)
            for name in ("question", "answer", "trajectory", "metadata", "image", "key")
            if columns.get(name) is not None
        }
        if columns.get("probabilities") is not None:
            lists["probabilities"] = [
                None if p is None else _probabilities(p)
                for p in _list_column(columns["probabilities"], "probabilities", n, rows=True)
            ]
        if components is not None:
            lists["rewards"] = components
        if columns.get("tags") is not None:
            lists["tags"] = [
                _tags(tags) or None for tags in _list_column(columns["tags"], "tags", n)
            ]
        for name, kind in _KINDS.items():
            for value in lists.get(name, ()):
                if value is not None and not isinstance(value, kind[0]):
                    raise InvalidExperience(
                        f"column {name!r}: expected {kind[1]}, found a {type(value).__name__}"
                    )
        if "image" in lists:
            lists["image"] = [None if image is None else _image(image) for image in lists["image"]]
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
        own = None if given is None else _priorities(given, len(confidence))
        if own is not None and not np.isnan(own).any():
            return own
        scores = self.score(confidence, reward, probabilities, ages(now, timestamp), metadata)
        return scores if own is None else np.where(np.isnan(own), scores, own)

    def _draft(
        self,
        v: Vectors,
        q: Vectors,
        rows: bytearray,
        lengths: NDArray[np.uint32],
        numbers: _Numbers,
        priority: NDArray[np.float32],
        labels: dict[str, list[Any]] | None,
    ) -> Draft:
        self._check_sizes(lengths)
        vectors = self.refuse(v, q)
        confidence, reward, timestamp = numbers
        body = codec.encode_add(
            AddBody(timestamp, reward, confidence, priority, vectors, labels, self.representation)
        )
        return draft_rows(codec.ADD, body, rows, lengths, len(lengths))


def _length(column: Any) -> int:
    try:
        return len(column)
    except TypeError as exc:
        array = codec.to_numpy(column)  # the array protocol asks for no length
        if array is not None and array.ndim:
            return len(array)
        raise InvalidExperience(
            f"columns hold several entries each, found a {type(column).__name__}"
        ) from exc


def _priorities(given: Any, n: int) -> NDArray[np.float32]:
    """(n,) float32, NaN where the scorer decides."""
    values = listed(given, "priorities")
    if len(values) != n:
        raise InvalidExperience(f"{len(values)} priorities for {n} experiences")
    checked = [math.nan if x is None else number(x, "priority", 0.0) for x in values]
    return finite32(np.array(checked, np.float64), "priority", nan=True)


def _are_priorities(values: NDArray[np.float32]) -> bool:
    """Whether all are finite, and none is negative (comparisons with NaN are false)."""
    if len(values) == 1:
        return 0.0 <= float(values[0]) < math.inf
    return not len(values) or bool(values.min() >= 0.0 and values.max() < np.inf)


def ages(now: float, timestamp: NDArray[np.float64]) -> NDArray[np.float32]:
    """(n,) seconds since these times; 0 where clocks disagree."""
    return np.minimum(np.maximum(now - timestamp, 0.0), _OLDEST).astype(np.float32)


def finite32(values: NDArray[np.float64], name: str, *, nan: bool = False) -> NDArray[np.float32]:
    """float32 of values that must stay finite there."""
    with np.errstate(over="ignore"):
        narrow = values.astype(np.float32)
    bad = np.isinf(narrow) if nan else ~np.isfinite(narrow)
    if bad.any():
        raise InvalidExperience(
            f"{name}: {values[bad][0]!r} is not finite in float32; nothing was written"
        )
    return narrow


def checked_priorities(values: Any, n: int) -> NDArray[np.float32]:
    """(n,) float32 priorities, finite and not negative."""
    array = codec.to_numpy(values)
    if array is None:
        single = isinstance(values, int | float)
        array = _array_of([values] if single else listed(values, "priorities"), "priorities")
    array = np.atleast_1d(array)
    if array.shape != (n,) or (n and array.dtype.kind not in "fiu"):
        raise InvalidExperience(
            f"expected {n} priorities, found {array.dtype} of shape {array.shape}"
        )
    # As a learner gives them; NaN fails both comparisons.
    if array.dtype == np.float32 and n and 0 <= array.min() and array.max() < np.inf:
        return array
    narrow = finite32(array.astype(np.float64), "priorities")
    if n and narrow.min() < 0:
        raise InvalidExperience(f"priorities: {narrow.min()!r} is negative; nothing was written")
    return narrow


def _float_column(value: Any, name: str, n: int, default: float) -> NDArray[np.float64]:
    if value is None:
        return np.full(n, default)
    array = codec.to_numpy(value)
    if array is None:
        array = np.array([number(x, name) for x in listed(value, name)])
    if array.shape != (n,) or array.dtype.kind not in "fiu":
        raise InvalidExperience(
            f"column {name!r}: expected {n} numbers, found {array.dtype} of shape {array.shape}"
        )
    array = array.astype(np.float64)
    if not np.isfinite(array).all():
        raise InvalidExperience(f"column {name!r}: every value must be finite")
    return array


def _list_column(value: Any, name: str, n: int, *, rows: bool = False) -> list[Any]:
    array = codec.to_numpy(value)
    if array is not None and array.ndim:
        values = list(array) if rows else array.tolist()
    else:
        values = listed(value, f"column {name!r}")
    if isinstance(value, str | bytes):
        raise InvalidExperience(
            f"column {name!r}: expected a list of {n}, found a {type(value).__name__}"
        )
    if len(values) != n:
        raise InvalidExperience(f"column {name!r}: expected {n} entries, found {len(values)}")
    return values


def _reward_columns(
    value: Any, n: int
) -> tuple[NDArray[np.float64], list[dict[str, float] | None] | None]:
    """(n,) totals, NaN where unknown, and the components of each."""
    if value is None:
        return np.full(n, np.nan), None
    if isinstance(value, Mapping):
        named = {
            str(name): _float_column(part, f"rewards[{name!r}]", n, 0.0)
            for name, part in value.items()
        }
        total = np.sum(list(named.values()), axis=0) if named else np.zeros(n)
        components: list[dict[str, float] | None] = [
            {name: float(part[i]) for name, part in named.items()} for i in range(n)
        ]
        return np.asarray(total, np.float64), components
    array = codec.to_numpy(value)
    if array is not None and array.dtype.kind in "fiu" and array.shape == (n,):
        total = array.astype(np.float64)
        if np.isinf(total).any():
            raise InvalidExperience("column 'rewards': every value must be finite, or NaN: unknown")
        return total, [None if math.isnan(x) else {"reward": x} for x in total.tolist()]
    pairs = [rewards(x) for x in _list_column(value, "rewards", n)]
    return np.array([pair[0] for pair in pairs]), [pair[1] for pair in pairs]
