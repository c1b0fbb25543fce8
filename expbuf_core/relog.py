"""Logging experiences again: in a new place of the same log, or as they are in another buffer."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from expbuf_core import codec, frames
from expbuf_core.codec import RelogBody
from expbuf_core.commit import Draft
from expbuf_core.contracts import Operation, Pin
from expbuf_core.crc import crc32
from expbuf_core.state import State


def relog_draft(
    state: State,
    ids: NDArray[np.int64],
    slots: NDArray[np.int64],
    pin: Pin,
    vectors: NDArray[np.float32] | None,
) -> Draft:
    """An operation that logs live experiences again, with all that is known of them.

    Args:
        state: Has them; locked by the caller, or its own.
        ids: (n,) rising.
        slots: (n,) theirs.
        pin: Their payloads, in this order.
        vectors: (n, dim) for another buffer; None where they only move.

    Raises:
        CorruptionError: A payload is damaged; it is not logged again as if it were not.
    """
    rows = bytearray()
    lengths = np.empty(len(ids), np.uint32)
    seals = np.empty(len(ids), np.uint32)
    for i, id_ in enumerate(ids.tolist()):
        row = pin.read(i)
        checked = frames.check_row(row)
        if checked is None or checked[0] != id_:
            raise frames.damaged_payload(pin, i, id_)
        lengths[i], seals[i] = len(row), checked[1]
        rows += row
    columns = {name: getattr(state, name)[slots] for name in codec.RELOG_COLUMNS}
    labels = None
    if vectors is not None:
        tags = [list(state.tag_sets[code]) for code in state.tags[slots].tolist()]
        named = {str(id_): state.rewards[id_] for id_ in ids.tolist() if id_ in state.rewards}
        labels = {"tags": tags, "rewards": named} if any(tags) or named else None
    else:
        vectors = np.empty((len(ids), 0), np.float32)
    body = codec.encode_relog(RelogBody(columns, vectors, labels))
    operation = Operation(codec.RELOG, body, crc32(body), rows, lengths, seals)
    return Draft(operation, weight=0)
