"""Embeddings of experiences from their payloads: intact, and of the dimensions that they must have.

A payload may be intact and of no use all the same, where its embeddings are not what the buffer's
settings say.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from numpy.typing import NDArray

from expbuf_core import codec, frames
from expbuf_core.contracts import Buffer, Pin
from expbuf_core.errors import CorruptionError

Dims = tuple[Any, Any] | None
"""Of the visual embedding and of the question's; None where they are not known."""

_ADVICE = "; `expbuf repair` saves all others"


def read_embeddings(
    pin: Pin, ids: NDArray[np.int64], dims: Dims
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Embeddings of pinned experiences.

    Args:
        pin: Their payloads.
        ids: (n,) of all that are pinned, at least one.
        dims: That they have; None for any, of all alike.

    Returns:
        (n, v_dim) and (n, q_dim) float32.

    Raises:
        CorruptionError: A payload is damaged, or its embeddings have other dimensions.
    """
    rows = pin.read_many(np.arange(len(ids)))
    damaged = frames.first_damaged(rows, ids.tolist())
    if damaged >= 0:
        raise frames.damaged_payload(pin, damaged, int(ids[damaged]))
    wanted = dims or _dims_of(rows[0])
    try:
        v, q = codec.decode_embeddings(rows, "v_embed", "q_embed")
    except codec.UNDECODABLE as exc:
        raise _first_error(pin, ids, rows, wanted, str(exc)) from exc
    if (v.shape[1], q.shape[1]) != wanted:
        raise _first_error(pin, ids, rows, wanted, "")
    return v, q


def _first_error(
    pin: Pin, ids: NDArray[np.int64], rows: list[Buffer], dims: Dims, reason: str
) -> CorruptionError:
    for i, row in enumerate(rows):
        error = misfit(pin, i, int(ids[i]), row, dims)
        if error is not None:
            return error
    return CorruptionError(
        f"payloads of experiences {ids[0]} to {ids[-1]} cannot be decoded: {reason}{_ADVICE}"
    )


def _dims_of(row: Buffer) -> Dims:
    try:
        return codec.dimensions(row)
    except codec.UNDECODABLE:
        return None


def misfit(pin: Pin, i: int, id_: int, row: Buffer, dims: Dims) -> CorruptionError | None:
    """The error for a pinned payload that is intact and does not belong into its buffer.

    Args:
        pin: Knows where it is.
        i: Its number in there.
        id_: Of its experience.
        row: The payload.
        dims: Of the buffer.

    Returns:
        None where it belongs there.
    """
    path, offset = pin.where(i)
    message = misfit_message(path, offset, id_, row, dims)
    if message is None:
        return None
    return CorruptionError(
        message + _ADVICE, path=path or None, offset=offset if offset >= 0 else None
    )


def misfit_message(path: str, offset: int, id_: int, row: Buffer, dims: Dims) -> str | None:
    """What `misfit` says, without what to do."""
    found = _dims_of(row)
    if found is not None and found == dims:
        return None
    place = f" at offset {offset}" if offset >= 0 else ""
    what = (
        "has a payload that cannot be decoded"
        if found is None
        else f"has embeddings of dimensions {found}, and the buffer's are {dims}"
    )
    return f"{os.path.basename(path) or 'storage'}: experience {id_}{place} {what}"
