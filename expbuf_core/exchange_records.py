"""Experiences as flat records of plain values, for the files that other programs read.

A record has the same columns in every format. Free-form values (trajectory, metadata, an answer
that is no text) are JSON text; what JSON lacks is marked: `{"$nd": base64, "dtype": …, "shape": …}`
an array, `{"$bytes": base64}`, `{"$tuple": […]}`, `{"$float": "nan"}`; a key of the user's that
begins with "$" gets a second one. What does not fit its column stands in `extra`, so nothing is
lost, and a column has one type in all rows.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from expbuf_core.errors import InvalidExperience
from expbuf_core.experience import Experience

VERSION = 1

COLUMNS: dict[str, str] = {
    "id": "int64",
    "sequence": "int64",
    "timestamp": "float64",
    "question": "text",
    "answer": "text",
    "confidence": "float32",
    "reward": "float64",
    "rewards": "text",
    "tags": "texts",
    "key": "text",
    "image": "text",
    "image_bytes": "bytes",
    "probabilities": "float32s",
    "trajectory": "text",
    "metadata": "text",
    "priority": "float32",
    "retrieval_count": "int64",
    "success_count": "float32",
    "extra": "text",
}
"""Columns of a record and their types; `v_embed` and `q_embed` go beside it."""

NATIVE = ("question", "answer", "key", "image")
_COUNTERS = ("id", "sequence", "priority", "retrieval_count", "success_count")


class Item(NamedTuple):
    """An experience on its way in or out. `sequence`: how many were added before it, or None."""

    experience: Experience
    sequence: int | None = None


# ---------------------------------------------------------------- trees


def to_plain(tree: Any) -> Any:
    """A tree as JSON can hold it."""
    if tree is None or isinstance(tree, bool | int | str):
        return tree
    if isinstance(tree, float):
        return tree if math.isfinite(tree) else {"$float": repr(tree)}
    if isinstance(tree, list):
        return [to_plain(item) for item in tree]
    if isinstance(tree, tuple):
        return {"$tuple": [to_plain(item) for item in tree]}
    if isinstance(tree, Mapping):
        return {("$" + k if k.startswith("$") else k): to_plain(v) for k, v in tree.items()}
    if isinstance(tree, bytes):
        return {"$bytes": base64.b64encode(tree).decode()}
    array = np.asarray(tree)
    return {
        "$nd": base64.b64encode(array.tobytes()).decode(),
        "dtype": array.dtype.str,
        "shape": list(array.shape),
    }


def from_plain(tree: Any) -> Any:
    """The inverse of `to_plain`.

    Raises:
        ValueError: A marked value makes no sense.
    """
    if isinstance(tree, list):
        return [from_plain(item) for item in tree]
    if not isinstance(tree, dict):
        return tree
    if "$nd" in tree:
        dtype = np.dtype(str(tree["dtype"]))
        if dtype.hasobject:
            raise ValueError("an array of objects")
        data = bytearray(base64.b64decode(tree["$nd"], validate=True))
        return np.frombuffer(data, dtype).reshape([int(n) for n in tree["shape"]])
    if "$bytes" in tree:
        return base64.b64decode(tree["$bytes"], validate=True)
    if "$tuple" in tree:
        return tuple(from_plain(item) for item in tree["$tuple"])
    if "$float" in tree:
        return float(tree["$float"])
    return {(k[1:] if k.startswith("$$") else k): from_plain(v) for k, v in tree.items()}


def dumps(tree: Any) -> str:
    """JSON text in ASCII: lone surrogates survive, whoever copies it."""
    return json.dumps(to_plain(tree), separators=(",", ":"), allow_nan=False)


def loads(text: Any) -> Any:
    """The inverse of `dumps`; a value that a foreign file holds as it is stays so."""
    return from_plain(json.loads(text) if isinstance(text, str) else text)


# ---------------------------------------------------------------- records


def record_of(experience: Experience, sequence: int) -> dict[str, Any]:
    """An experience as a record, without its embeddings."""
    e = experience
    record: dict[str, Any] = {
        "id": e.id,
        "sequence": sequence,
        "timestamp": e.timestamp,
        "confidence": e.confidence,
        "reward": e.total_reward,
        "rewards": None if e.rewards is None else dumps(e.rewards),
        "trajectory": None if e.trajectory is None else dumps(e.trajectory),
        "metadata": None if e.metadata is None else dumps(e.metadata),
        "priority": e.priority,
        "retrieval_count": e.retrieval_count,
        "success_count": e.success_count,
        "tags": [],
        "image_bytes": e.image if isinstance(e.image, bytes) else None,
        "probabilities": None,
        "extra": None,
    }
    if e.probabilities is not None:
        record["probabilities"] = np.asarray(e.probabilities, np.float32).tolist()
    extra = {}
    for name in NATIVE:
        value = getattr(e, name)
        if name == "image" and isinstance(value, bytes):
            value = None
        fits = value is None or (isinstance(value, str) and _is_utf8(value))
        record[name] = value if fits else None
        if not fits:
            extra[name] = value
            if name == "answer":  # to be seen there, too; what counts is in `extra`
                record[name] = dumps(value)
    if all(map(_is_utf8, e.tags)):
        record["tags"] = list(e.tags)
    else:
        extra["tags"] = list(e.tags)
    if extra:
        record["extra"] = dumps(extra)
    return record


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def item_of(
    record: Mapping[str, Any],
    v_embed: NDArray[np.float32] | None,
    q_embed: NDArray[np.float32] | None,
    where: str,
) -> Item:
    """The inverse of `record_of`; columns that a file lacks count as not given.

    Args:
        record: May have more columns than these; they are not looked at.
        v_embed: (v_dim,) or None.
        q_embed: (q_dim,) or None.
        where: For messages.

    Raises:
        InvalidExperience: A value cannot be read. Whether it can be stored is checked later.
    """
    get = record.get
    try:
        extra = loads(get("extra")) or {}
        image = get("image_bytes") if get("image") is None else get("image")
        if isinstance(image, str) and get("image") is None:
            image = base64.b64decode(image, validate=True)  # a format of text alone
        rewards = loads(get("rewards"))
        total = get("reward")
        if rewards is None and total is not None and not math.isnan(total):
            rewards = float(total)
        probabilities = get("probabilities")
        experience = Experience(
            v_embed=v_embed,
            q_embed=q_embed,
            question=extra.get("question", get("question") or ""),
            answer=extra.get("answer", get("answer")),
            confidence=_or(get("confidence"), 1.0),
            rewards=rewards,
            trajectory=loads(get("trajectory")),
            metadata=loads(get("metadata")),
            probabilities=None if probabilities is None else np.asarray(probabilities, np.float32),
            tags=tuple(extra.get("tags", get("tags") or ())),
            image=extra.get("image", image),
            key=extra.get("key", get("key")),
            timestamp=get("timestamp"),
            id=get("id"),
            priority=get("priority"),
            retrieval_count=_or(get("retrieval_count"), 0),
            success_count=_or(get("success_count"), 0.0),
        )
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as exc:
        raise InvalidExperience(f"{where}: cannot be read: {exc}") from exc
    return Item(experience, get("sequence"))


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value
