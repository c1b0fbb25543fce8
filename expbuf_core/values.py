"""Numbers, texts, ids and columns of them, as they come in: checked and converted."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from expbuf_core import codec
from expbuf_core.embeddings import as_vectors, to_read
from expbuf_core.errors import InvalidExperience, shown

OLDEST = 1e30  # seconds; finite in float32
_MOST_DRAWN = 1 << 31
_INFINITY = int(np.float32(np.inf).view(np.uint32))

# ---------------------------------------------------------------- single ones


def number(value: Any, name: str, low: float = -math.inf, high: float = math.inf) -> float:
    """A finite number within bounds.

    Raises:
        InvalidExperience: It is not.
    """
    if type(value) is not float:
        odd = isinstance(value, str | bytes | bool | np.bool_ | np.complexfloating)
        # Older versions of numpy take an array of one number for that number.
        if odd or value is None or (isinstance(value, np.ndarray) and value.ndim):
            raise InvalidExperience(f"{name}: expected a number, found {shown(value)}")
        try:
            value = float(value)
        except (TypeError, ValueError, OverflowError) as exc:
            raise InvalidExperience(f"{name}: expected a number, found {shown(value)}") from exc
    if not low <= value <= high or math.isinf(value):
        bounds = "" if math.isinf(low) else f" of at least {low:g}"
        if math.isfinite(high):
            bounds = f" in [{low:g}, {high:g}]"
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


def checked_text(value: Any, name: str) -> str:
    """A string; else raises `InvalidExperience`, as all below."""
    if not isinstance(value, str):
        raise InvalidExperience(f"{name}: expected a string, found a {type(value).__name__}")
    return value


def checked_image(value: Any) -> str | bytes:
    """A path as text, or encoded bytes."""
    image = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(image, str | bytes):
        raise InvalidExperience(
            f"image: expected a path or encoded bytes, found a {type(value).__name__}"
        )
    return image


def checked_tags(value: Any, name: str = "tags") -> list[str]:
    """A list of strings."""
    if isinstance(value, str) or not isinstance(value, Sequence | set | frozenset):
        raise InvalidExperience(f"{name}: expected a sequence of strings, found {shown(value)}")
    return [checked_text(tag, name) for tag in value]


def checked_metadata(value: Any) -> Mapping[str, Any]:
    """A mapping."""
    if not isinstance(value, Mapping):
        raise InvalidExperience(f"metadata: expected a mapping, found a {type(value).__name__}")
    return value


def checked_probabilities(value: Any, name: str = "probabilities") -> NDArray[np.float32]:
    """Read-only (c,) float32, none negative, that sum to 1."""
    array = as_vectors(value, name, rank=1, dim=None)
    total, least = float(array.sum(dtype=np.float64)), float(array.min())
    if least < 0:
        raise InvalidExperience(f"{name}: {least:g} is negative")
    if abs(total - 1.0) > 1e-2:
        raise InvalidExperience(f"{name}: must sum to 1, not to {total:g}")
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


def in_order(values: Any, name: str) -> list[Any]:
    """The entries of what has them in the order of the experiences.

    Raises:
        InvalidExperience: It has no order, is a mapping, whose keys would be taken, or bytes.
    """
    if isinstance(values, Mapping | set | frozenset | str | bytes | bytearray):
        raise InvalidExperience(
            f"{name}: expected a list of one for each, in the order of the experiences; found a "
            f"{type(values).__name__}"
        )
    return listed(values, name)


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
    if isinstance(ids, bytes | bytearray):  # whose entries are integers
        raise InvalidExperience(f"{name}: expected integers, found a {type(ids).__name__}")
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


# ---------------------------------------------------------------- several


def length_of(column: Any) -> int:
    """Number of entries of a column, whatever holds it."""
    try:
        return len(column)
    except TypeError as exc:
        array = codec.to_numpy(column)  # the array protocol asks for no length
        if array is not None and array.ndim:
            return len(array)
        raise InvalidExperience(
            f"columns hold several entries each, found a {type(column).__name__}"
        ) from exc


def initial_priorities(given: Any, n: int) -> NDArray[np.float32]:
    """(n,) float32, NaN where the scorer decides."""
    values = in_order(given, "priorities")
    if len(values) != n:
        raise InvalidExperience(f"{len(values)} priorities for {n} experiences")
    checked = [math.nan if x is None else number(x, "priority", 0.0) for x in values]
    return finite32(np.array(checked, np.float64), "priority", nan=True)


def are_priorities(values: NDArray[np.float32]) -> bool:
    """Whether all are finite, and none is negative (comparisons with NaN are false)."""
    if len(values) == 1:
        return 0.0 <= float(values[0]) < math.inf
    return not len(values) or bool(values.min() >= 0.0 and values.max() < np.inf)


def ages(now: float, timestamp: NDArray[np.float64]) -> NDArray[np.float32]:
    """(n,) seconds since these times; 0 where clocks disagree."""
    return np.minimum(np.maximum(now - timestamp, 0.0), OLDEST).astype(np.float32)


def finite32(values: NDArray[np.float64], name: str, *, nan: bool = False) -> NDArray[np.float32]:
    """float32 of values that must stay finite there."""
    with np.errstate(over="ignore"):
        narrow = values.astype(np.float32)
    bad = np.isinf(narrow) if nan else ~np.isfinite(narrow)
    if bad.any():
        raise InvalidExperience(
            f"{name}: {float(values[bad][0])!r} is not finite in float32; nothing was written"
        )
    return narrow


def checked_priorities(values: Any, n: int) -> NDArray[np.float32]:
    """(n,) float32 priorities, finite and not negative."""
    array = codec.to_numpy(values)
    if array is None:
        single = isinstance(values, int | float)
        array = _array_of([values] if single else in_order(values, "priorities"), "priorities")
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
        least = float(narrow.min())
        raise InvalidExperience(f"priorities: {least!r} is negative; nothing was written")
    return narrow


def float_column(value: Any, name: str, n: int, default: float) -> NDArray[np.float64]:
    """(n,) finite float64; the default where there is no such column."""
    if value is None:
        return np.full(n, default)
    array = codec.to_numpy(value)
    if array is None:
        array = np.array([number(x, name) for x in in_order(value, name)])
    if array.shape != (n,) or array.dtype.kind not in "fiu":
        raise InvalidExperience(
            f"column {name!r}: expected {n} numbers, found {array.dtype} of shape {array.shape}"
        )
    array = array.astype(np.float64)
    if not np.isfinite(array).all():
        raise InvalidExperience(f"column {name!r}: every value must be finite")
    return array


def list_column(value: Any, name: str, n: int, *, rows: bool = False) -> list[Any]:
    """A list of n. `rows`: the entries of an array are arrays."""
    array = codec.to_numpy(value)
    if array is not None and array.ndim:
        values = list(array) if rows else array.tolist()
    else:
        values = in_order(value, f"column {name!r}")
    if len(values) != n:
        raise InvalidExperience(f"column {name!r}: expected {n} entries, found {len(values)}")
    return values


def reward_columns(
    value: Any, n: int
) -> tuple[NDArray[np.float64], list[dict[str, float] | None] | None]:
    """(n,) totals, NaN where unknown, and the components of each."""
    if value is None:
        return np.full(n, np.nan), None
    if isinstance(value, Mapping):
        named = {
            str(name): float_column(part, f"rewards[{name!r}]", n, 0.0)
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
    pairs = [rewards(x) for x in list_column(value, "rewards", n)]
    return np.array([pair[0] for pair in pairs]), [pair[1] for pair in pairs]


# ---------------------------------------------------------------- updates


def is_row(values: Any, dtype: type[np.generic]) -> bool:
    """Whether this is a plain one-dimensional array of that type, as a learner hands it back."""
    return (
        type(values) is np.ndarray
        and values.dtype == dtype
        and values.ndim == 1
        and values.flags.c_contiguous
    )


def new_priorities(values: Any, n: int) -> NDArray[np.float32]:
    """(n,) float32, finite and not negative."""
    if is_row(values, np.float32) and len(values) == n:
        plain: NDArray[np.float32] = values
        # As whole numbers, floats are in order: infinity, NaN and what has a sign are the greatest.
        if np.maximum.reduce(plain.view(np.uint32), initial=0) < _INFINITY:
            return plain
    return checked_priorities(values, n)


def new_rewards(values: Any) -> tuple[NDArray[np.float64], dict[int, dict[str, float]]]:
    """(n,) totals, and the components of those that are given by components, by their place."""
    array = codec.to_numpy(values)
    if array is not None and array.ndim == 1 and array.dtype.kind in "fiu":
        totals = array.astype(np.float64)
        if np.isfinite(totals).all():
            return totals, {}
    items = in_order(values if array is None else array.tolist(), "rewards")
    parsed = [rewards(item) for item in items]
    totals = np.array([total for total, _ in parsed], np.float64)
    if np.isnan(totals).any():
        raise InvalidExperience("rewards: None is not a reward; nothing was written")
    return totals, {
        i: named
        for i, (item, (_, named)) in enumerate(zip(items, parsed, strict=True))
        if isinstance(item, Mapping) and named is not None
    }


def credits_of(credit: Any, ids: NDArray[np.int64]) -> NDArray[np.float32]:
    """(n,) float32 in [0, 1]: what part of a success is due to each of these."""
    n = len(ids)
    if credit is None:
        return np.ones(n, np.float32)
    if isinstance(credit, Mapping):
        for key in credit:  # JSON makes texts of them, and nobody would get any
            if isinstance(key, bool) or not isinstance(key, int | np.integer):
                raise InvalidExperience(f"credit: an id is an integer, not {shown(key)}")
        values = np.array([number(credit.get(i, 0.0), "credit", 0, 1) for i in ids.tolist()])
    elif isinstance(credit, int | float):
        values = np.full(n, number(credit, "credit", 0.0, 1.0))
    else:
        array = codec.to_numpy(credit)
        if array is not None:
            array = np.broadcast_to(array, (n,)) if array.ndim == 0 else array
        items = in_order(credit, "credit") if array is None else array.tolist()
        if len(items) != n:
            raise InvalidExperience(f"{len(items)} credits for {n} experiences")
        values = np.array([number(x, "credit", 0.0, 1.0) for x in items])
    return finite32(values.astype(np.float64), "credit")
