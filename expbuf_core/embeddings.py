"""Embeddings as they come in, converted and checked; normalised; fused."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from expbuf_core import codec
from expbuf_core.contracts import EmbeddingFusion
from expbuf_core.errors import (
    DimensionError,
    ExpbufError,
    InvalidExperience,
    PluginContractError,
    blame,
    shown,
)

Vectors = NDArray[np.float32]

_FLOAT32 = np.dtype(np.float32)
_BLAS_ALONE = 10_000  # numbers
_SAFE = (1e-24, 1e30)  # squared lengths in between have lost nothing to float32's range
_ORDINARY = 1e12  # the size of numbers of which a fusion can make finite ones


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
            f"{name}: {array[at]} at position {at if rank > 1 else at[0]}; {_plural(name)} must "
            "be finite in float32"
        )
    return array


def _plural(name: str) -> str:
    return "embeddings" if name.endswith("_embed") else name


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


def stacked(parts: Sequence[NDArray[Any]], dim: int) -> NDArray[Any]:
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


def plugin_named(noun: str, name: str, plugin: object) -> str:
    """A plugin in a message."""
    named = f"the {noun} {name!r}" if name else f"the {noun}"
    return f"{named} ({type(plugin).__name__})"


def as_array(found: Any, who: str, wanted: str) -> NDArray[Any]:
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
    who = plugin_named("embedding fusion", name, fusion)
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
    try:
        found = fusion(to_read(v), to_read(q))
    except Exception as exc:
        blame(exc, plugin_named("embedding fusion", name, fusion))
        raise
    if type(found) is not np.ndarray or found.shape != (len(v), dim) or found.dtype != _FLOAT32:
        who, wanted = plugin_named("embedding fusion", name, fusion), f"float32 {(len(v), dim)}"
        found = as_array(found, who, wanted)
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
                f"{plugin_named('embedding fusion', name, fusion)} returned numbers that are not "
                "finite for parts that are"
            )
        raise InvalidExperience("the fused embedding is not finite: its parts are too large")
    return normalised(fused) if metric == "cosine" else np.ascontiguousarray(fused)
