"""Experiences and operations to bytes, and back. Nothing here can run code.

Rows hold what is decoded on demand (embeddings, question, answer, trajectory, …); bodies hold what
every replica needs to apply an operation. Trees are JSON with numpy arrays and bytes set aside:
`{"$nd": i}`, `{"$bytes": i}` and `{"$tuple": [...]}` stand in for them, and a key of the user's
that begins with "$" gets a second one.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from expbuf_core.contracts import Buffer, LoggedOperation, LoggedRun, Operation
from expbuf_core.crc import crc32
from expbuf_core.errors import CorruptionError, FormatVersionError, InvalidExperience
from expbuf_core.frames import ROW_HEADER_BYTES

# Kinds of operations; also the names that the event `expbuf_on_committed` uses.
SETTINGS, ADD, REMOVE, PRIORITY, REWARD, OUTCOME, CLEAR, RESERVE, RELOG, CARRY, REEMBED = range(
    1, 12
)
KIND_NAMES = {
    SETTINGS: "settings",
    ADD: "add",
    REMOVE: "remove",
    PRIORITY: "priority",
    REWARD: "reward",
    OUTCOME: "outcome",
    CLEAR: "clear",
    RESERVE: "reserve",
    RELOG: "relog",
    CARRY: "carry",
    REEMBED: "reembed",
}

UNDECODABLE = (
    ValueError,
    IndexError,
    KeyError,
    TypeError,
    AttributeError,
    OverflowError,
    RecursionError,
    struct.error,
)
"""What decoding raises over bytes that are intact and that nothing here has encoded."""

MAX_DEPTH = 100
MAX_INTEGER = 1 << 8192  # Python parses no decimal number of more than 4300 digits
_NO_ROWS = np.empty(0, np.uint32)


# ---------------------------------------------------------------- trees


def pack_tree(tree: Any, attachments: list[bytes], where: str) -> Any:
    """Make a tree JSON can hold; arrays and bytes go to `attachments`.

    Raises:
        InvalidExperience: Something in it is no JSON-like value; the message says where.
    """
    return _pack(tree, attachments, where, 0)


def _pack(tree: Any, attachments: list[bytes], where: str, depth: int) -> Any:
    kind = type(tree)
    if tree is None or kind is str or kind is bool or kind is float:
        return tree
    if kind is int:
        if not -MAX_INTEGER < tree < MAX_INTEGER:
            raise InvalidExperience(f"{where}: an integer of {tree.bit_length()} bits is too large")
        return tree
    if depth > MAX_DEPTH:
        raise InvalidExperience(f"{where}: nested deeper than {MAX_DEPTH} levels")
    if kind is list:
        return [_pack(item, attachments, where, depth + 1) for item in tree]
    if isinstance(tree, Mapping):
        packed = {}
        for key, value in tree.items():
            if not isinstance(key, str):
                raise InvalidExperience(
                    f"{where}: keys must be strings, found {key!r} of type {type(key).__name__}"
                )
            packed["$" + key if key.startswith("$") else key] = _pack(
                value, attachments, where, depth + 1
            )
        return packed
    if isinstance(tree, tuple):
        return {"$tuple": [_pack(item, attachments, where, depth + 1) for item in tree]}
    if isinstance(tree, np.generic):
        return _pack(tree.item(), attachments, where, depth + 1)
    if isinstance(tree, bytes | bytearray | memoryview):
        attachments.append(bytes(tree))
        return {"$bytes": len(attachments) - 1}
    if isinstance(tree, str):
        return str.__str__(tree)
    if isinstance(tree, int | float):  # subclasses: enums and the like
        plain = float(tree) if isinstance(tree, float) else int(tree)
        return _pack(plain, attachments, where, depth)
    if isinstance(tree, list):
        return [_pack(item, attachments, where, depth + 1) for item in tree]
    array = to_numpy(tree)
    if array is None or array.dtype.hasobject or array.dtype.kind == "V":
        what = f"a {type(tree).__name__}" if array is None else f"an array of dtype {array.dtype}"
        raise InvalidExperience(
            f"{where}: cannot store {what}; use None, bool, int, float, str, "
            "bytes, list, tuple, dict with string keys, or numeric arrays"
        )
    attachments.append(array.tobytes())
    return {"$nd": len(attachments) - 1, "dtype": array.dtype.str, "shape": list(array.shape)}


def unpack_tree(tree: Any, attachments: Sequence[Buffer]) -> Any:
    """The inverse of `pack_tree`."""
    if isinstance(tree, list):
        return [unpack_tree(item, attachments) for item in tree]
    if not isinstance(tree, dict):
        return tree
    if "$nd" in tree:
        dtype = np.dtype(str(tree["dtype"]))
        if dtype.hasobject:
            raise ValueError("an array of objects")
        data = attachments[tree["$nd"]]
        return np.frombuffer(bytearray(data), dtype).reshape(tree["shape"])
    if "$bytes" in tree:
        return bytes(attachments[tree["$bytes"]])
    if "$tuple" in tree:
        return tuple(unpack_tree(item, attachments) for item in tree["$tuple"])
    return {
        key[1:] if key.startswith("$$") else key: unpack_tree(value, attachments)
        for key, value in tree.items()
    }


_encoder = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), check_circular=False)
# Those that texts have. The backslash comes first: the others bring some in.
_ESCAPES = {b"\\": rb"\\", b'"': rb"\"", b"\n": rb"\n", b"\r": rb"\r", b"\t": rb"\t"}
_SEPARATOR = "\x01"  # a control that texts do not have, and that has no escape above
_FIRST_UNESCAPED = 0x20
# n texts, in columns: what stands in their first part, in their second, and so on.
Texts = list[Sequence[Buffer]]
_quoted = json.encoder.encode_basestring  # what the encoder makes of a string, without its detours


def dump_json(tree: Any) -> bytes:
    """Compact UTF-8; lone surrogates survive."""
    return _encoder.encode(tree).encode("utf-8", "surrogatepass")


def load_json(data: Buffer) -> Any:
    """The inverse of `dump_json`."""
    return json.loads(bytes(data).decode("utf-8", "surrogatepass"))


# ---------------------------------------------------------------- arrays from anywhere


def to_numpy(value: Any) -> NDArray[Any] | None:
    """A numpy array of a value that is one, behaves like one, or is a torch tensor; else None.

    Torch is never imported: a tensor is known by its methods. It may lie on a device, carry a
    gradient, and be bfloat16, which numpy lacks.
    """
    if isinstance(value, np.ndarray):
        if isinstance(value, np.ma.MaskedArray):
            return _unmasked(value)
        return value
    if hasattr(value, "detach") and hasattr(value, "cpu"):
        tensor = value.detach().cpu()
        if str(getattr(tensor, "dtype", "")) == "torch.bfloat16":
            tensor = tensor.float()
        return np.asarray(tensor.numpy())
    if hasattr(value, "__array__") or hasattr(value, "__array_interface__"):
        return np.asarray(value)
    return None


def _unmasked(array: Any) -> NDArray[Any]:
    """What is behind a mask is no value, whatever number stands there."""
    if np.ma.is_masked(array):
        raise InvalidExperience(
            "an array has masked entries, which have no value; fill them first: array.filled(value)"
        )
    return np.asarray(array.data)


# ---------------------------------------------------------------- rows

# version, flags, v_dim, q_dim, json_len, attachment_count
_CONTENT = struct.Struct("<HHIIII")
_ROW_VERSION = 1
_FIXED = ROW_HEADER_BYTES + _CONTENT.size
_UNSTAMPED = bytes(ROW_HEADER_BYTES)
_LITTLE = 256  # bytes behind the embeddings that are copied along sooner than cut off row by row


class DecodedRow(NamedTuple):
    """A row's content: `fields` are those of `Experience` that are not columns."""

    v_embed: NDArray[np.float32]
    q_embed: NDArray[np.float32]
    fields: dict[str, Any]


@lru_cache(maxsize=256)
def _key(name: str) -> str:
    """A field's name as JSON, up to its value."""
    return f"{_quoted(name)}:"


def _value(name: str, value: Any, attachments: list[bytes]) -> str:
    """One of a payload's fields as JSON."""
    if type(value) is str:
        return _quoted(value)
    return _encoder.encode(pack_tree(value, attachments, name))


def _text_of(fields: Mapping[str, Any], attachments: list[bytes]) -> bytes:
    """A payload's fields as JSON."""
    members = [_key(name) + _value(name, value, attachments) for name, value in fields.items()]
    return f"{{{','.join(members)}}}".encode("utf-8", "surrogatepass")


def encode_row(v: NDArray[np.float32], q: NDArray[np.float32], fields: Mapping[str, Any]) -> bytes:
    """Encode a payload; `stamp_rows` fills in the first 16 bytes later.

    Args:
        v: (v_dim,) float32.
        q: (q_dim,) float32.
        fields: Trees by name; those that are absent are left out.
    """
    attachments: list[bytes] = []
    text = _text_of(fields, attachments)
    head = _CONTENT.pack(_ROW_VERSION, 0, len(v), len(q), len(text), len(attachments))
    sizes = struct.pack(f"<{len(attachments)}Q", *map(len, attachments)) if attachments else b""
    return b"".join((_UNSTAMPED, head, v.data, q.data, sizes, text, *attachments))


def encode_columns(
    v: NDArray[np.float32], q: NDArray[np.float32], columns: Mapping[str, Sequence[Any]]
) -> tuple[bytearray, NDArray[np.uint32]]:
    """Encode n payloads.

    Args:
        v: (n, v_dim) float32.
        q: (n, q_dim) float32.
        columns: Of each field n trees, None where a payload lacks it.

    Returns:
        The rows one behind the other, (n,) uint32 lengths.
    """
    texts = encode_texts(columns, len(v))
    if texts is not None:
        return encode_bare_rows(v, q, texts)
    rows = []
    for i, values in enumerate(zip(*columns.values(), strict=True)):
        fields = {k: x for k, x in zip(columns, values, strict=True) if x is not None}
        rows.append(encode_row(v[i], q[i], fields))
    return bytearray().join(rows), np.fromiter(map(len, rows), np.uint32, len(rows))


def encode_bare_rows(
    v: NDArray[np.float32], q: NDArray[np.float32], texts: Texts | None
) -> tuple[bytearray, NDArray[np.uint32]]:
    """Encode n payloads without attachments at once.

    Args:
        v: (n, v_dim) float32.
        q: (n, q_dim) float32.
        texts: JSON of each, or None where all are empty.

    Returns:
        The rows one behind the other, (n,) uint32 lengths.
    """
    n, v_dim = v.shape
    q_dim = q.shape[1]
    if not n:
        return bytearray(), np.empty(0, np.uint32)
    texts = texts or [[b"{}"] * n]
    sizes = np.zeros(n, np.uint32)
    for column in texts:
        sizes += np.fromiter(map(len, column), np.uint32, n)
    q_at = _FIXED + 4 * v_dim
    width = q_at + 4 * q_dim
    head = _CONTENT.pack(_ROW_VERSION, 0, v_dim, q_dim, 0, 0)
    table = np.empty((n, width), np.uint8)  # all but the texts
    table[:, :_FIXED] = np.frombuffer(_UNSTAMPED + head, np.uint8)
    table[:, _FIXED - 8 : _FIXED - 4] = sizes.astype("<u4").view(np.uint8).reshape(n, 4)
    table[:, _FIXED:q_at] = v.view(np.uint8)
    table[:, q_at:] = q.view(np.uint8)
    raw, step = table.reshape(-1).data, 1 + len(texts)
    parts: list[Buffer] = [b""] * (step * n)
    parts[0::step] = [raw[at : at + width] for at in range(0, n * width, width)]
    for i, column in enumerate(texts, 1):
        parts[i::step] = column
    return bytearray().join(parts), sizes + np.uint32(width)


def encode_texts(columns: Mapping[str, Sequence[Any]], n: int) -> Texts | None:
    """JSON of n payloads, given by columns; None entries are left out.

    Returns:
        The texts; None if one of them needs attachments.
    """
    if not columns:
        return [[b"{}"] * n]
    attachments: list[bytes] = []
    complete, members = True, []
    for name, values in columns.items():
        key, kinds = _key(name).encode("utf-8", "surrogatepass"), set(map(type, values))
        if kinds == {str}:
            members.append(_Member(key + b'"', _all_escaped(values), b'"'))
            continue
        complete = complete and type(None) not in kinds
        found = [None if x is None else _value(name, x, attachments) for x in values]
        if attachments:
            return None
        coded = [x if x is None else x.encode("utf-8", "surrogatepass") for x in found]
        members.append(_Member(key, coded, b""))
    if not complete:
        return [_without_gaps(members)]
    texts: Texts = []
    before = b"{"
    for member in members:
        texts += [[before + member.before] * n, member.values]
        before = member.behind + b","
    return [*texts, [before[:-1] + b"}"] * n]


class _Member(NamedTuple):
    """Of the JSON of n payloads: the value in each, and what stands around it."""

    before: bytes
    values: Sequence[Any]  # Buffer, or None where there is none
    behind: bytes


def _without_gaps(members: list[_Member]) -> list[bytes]:
    """The texts, where some lack some members."""
    columns = [
        [b"" if value is None else b"".join((before, value, behind)) for value in values]
        for before, values, behind in members
    ]
    return [b"{" + b",".join(filter(None, each)) + b"}" for each in zip(*columns, strict=True)]


def _all_escaped(values: Sequence[str]) -> list[Buffer]:
    """What `_quoted` makes of each, without the quotes.

    It looks at one character after the other, and at one string; that hardly any needs an escape,
    scans of all at once tell in a fraction of the time.
    """
    whole = _SEPARATOR.join(values).encode("utf-8", "surrogatepass")
    controls = np.count_nonzero(np.frombuffer(whole, np.uint8) < _FIRST_UNESCAPED)
    known = len(values) - 1
    if controls != known:
        known += sum(whole.count(code) for code in b"\n\r\t")
    if controls != known:
        return [_quoted(value)[1:-1].encode("utf-8", "surrogatepass") for value in values]
    for character, escape in _ESCAPES.items():
        whole = whole.replace(character, escape)
    ends = np.flatnonzero(np.frombuffer(whole, np.uint8) < _FIRST_UNESCAPED).tolist()
    view = memoryview(whole)
    starts = [0, *[end + 1 for end in ends]]
    return [view[i:j] for i, j in zip(starts, [*ends, len(whole)], strict=True)]


def content_crcs(rows: Buffer, lengths: NDArray[np.uint32]) -> list[int]:
    """CRC-32 of each row's content."""
    view = memoryview(rows)
    if len(lengths) == 1:
        return [crc32(view[ROW_HEADER_BYTES:])]
    ends = np.cumsum(lengths, dtype=np.int64)
    starts = ends - lengths + ROW_HEADER_BYTES
    return [crc32(view[i:j]) for i, j in zip(starts.tolist(), ends.tolist(), strict=True)]


def reembedded_row(row: Buffer, v: NDArray[np.float32], q: NDArray[np.float32]) -> bytearray:
    """A payload with other embeddings, and all the rest byte by byte as it was.

    Args:
        row: As stored, intact.
        v: (v_dim,) float32.
        q: (q_dim,) float32.
    """
    version, flags, v_dim, q_dim, text_len, count = _CONTENT.unpack_from(row, ROW_HEADER_BYTES)
    head = _CONTENT.pack(version, flags, len(v), len(q), text_len, count)
    rest = memoryview(row)[_FIXED + 4 * (v_dim + q_dim) :]
    return bytearray().join((bytes(ROW_HEADER_BYTES), head, v.tobytes(), q.tobytes(), rest))


def dimensions(row: Buffer) -> tuple[int, int]:
    """(v_dim, q_dim) of a payload whose checksum has been verified.

    Raises:
        struct.error: It is shorter than its header.
    """
    _, _, v_dim, q_dim, _, _ = _CONTENT.unpack_from(row, ROW_HEADER_BYTES)
    return v_dim, q_dim


def decode_row(row: Buffer) -> DecodedRow:
    """Decode a payload whose checksum has been verified.

    Raises:
        ValueError: The content is not what `encode_row` makes.
        FormatVersionError: A newer version wrote it.
    """
    if len(row) < _FIXED:
        raise ValueError("a row shorter than its header")
    version, _flags, v_dim, q_dim, text_len, count = _CONTENT.unpack_from(row, ROW_HEADER_BYTES)
    if version > _ROW_VERSION:
        raise FormatVersionError(f"rows of version {version}; this expbuf reads {_ROW_VERSION}")
    view = memoryview(row)
    at = _FIXED
    if at + 4 * (v_dim + q_dim) + 8 * count + text_len > len(view):
        raise ValueError("a row whose parts exceed it")
    v = np.frombuffer(view[at : at + 4 * v_dim], np.float32)
    at += 4 * v_dim
    q = np.frombuffer(view[at : at + 4 * q_dim], np.float32)
    at += 4 * q_dim
    sizes = struct.unpack_from(f"<{count}Q", view, at)
    at += 8 * count
    tree = load_json(view[at : at + text_len])
    at += text_len
    attachments = []
    for size in sizes:
        if at + size > len(view):
            raise ValueError("an attachment that exceeds its row")
        attachments.append(view[at : at + size])
        at += size
    if not isinstance(tree, dict):
        raise ValueError("a row whose tree is no mapping")
    return DecodedRow(v, q, {key: unpack_tree(value, attachments) for key, value in tree.items()})


def decode_embeddings(rows: Sequence[Buffer], *parts: str) -> list[NDArray[np.float32]]:
    """Parts of the embeddings of n payloads whose checksums have been verified.

    Args:
        rows: n payloads, at least one, of the same dimensions.
        parts: Each "v_embed" or "q_embed".

    Returns:
        (n, dim) float32 for each of the parts.

    Raises:
        ValueError: The content is not what `encode_row` makes, or dimensions differ.
        FormatVersionError: A newer version wrote it.
    """
    n, size = len(rows), len(rows[0])
    first = decode_row(rows[0])  # finds out a version or dimensions that make no sense
    middle = _FIXED + first.v_embed.nbytes
    end = middle + first.q_embed.nbytes
    if size - end > _LITTLE or set(map(len, rows)) != {size}:
        rows, size = [row[:end] for row in rows], end
    joined = b"".join(rows)
    if len(joined) != n * size:
        raise ValueError("a row whose embeddings exceed it")
    table = np.frombuffer(joined, np.uint8).reshape(n, size)
    # All but the sizes of what follows.
    if (table[:, ROW_HEADER_BYTES : _FIXED - 8] != table[0, ROW_HEADER_BYTES : _FIXED - 8]).any():
        raise ValueError("payloads of different dimensions or versions")
    found = []
    for part in parts:
        span = slice(_FIXED, middle) if part == "v_embed" else slice(middle, end)
        found.append(table[:, span].copy().view(np.float32))
    return found


# ---------------------------------------------------------------- bodies


def _operation(kind: int, body: bytes) -> Operation:
    return Operation(kind, body, crc32(body), b"", _NO_ROWS, _NO_ROWS)


# n, dim, representation, sections
_ADD = struct.Struct("<IIII")
_SECTION = struct.Struct("<II")  # type, bytes
SECTION_LABELS = 1  # JSON: {"tags": [[...]], "keys": [...]}; absent where all are empty


class AddBody(NamedTuple):
    """What replicas know of n new experiences.

    Attributes:
        timestamp: (n,) float64, UTC seconds.
        reward: (n,) float64, NaN where unknown.
        confidence: (n,) float32.
        priority: (n,) float32.
        vectors: (n, dim) float32, fused, and normalised where the metric is cosine.
        labels: {"tags": n lists, "keys": n strings or None}, or None.
        representation: Which the vectors are of; -1 where they are of several.
    """

    timestamp: NDArray[np.float64]
    reward: NDArray[np.float64]
    confidence: NDArray[np.float32]
    priority: NDArray[np.float32]
    vectors: NDArray[np.float32]
    labels: dict[str, list[Any]] | None
    representation: int = 0


def encode_add(body: AddBody) -> bytes:
    """Encode the body of an add."""
    n, dim = body.vectors.shape
    parts: list[Buffer] = [
        _ADD.pack(n, dim, body.representation, 0 if body.labels is None else 1),
        body.timestamp.tobytes(),
        body.reward.tobytes(),
        body.confidence.tobytes(),
        body.priority.tobytes(),
        np.ascontiguousarray(body.vectors).data,
    ]
    if body.labels is not None:
        text = dump_json(body.labels)
        parts += [_SECTION.pack(SECTION_LABELS, len(text)), text]
    return b"".join(parts)


_ADD_ONE = struct.Struct("<IIIIddff")  # `_ADD` and the columns of the only experience


def encode_add_one(
    timestamp: float,
    reward: float,
    confidence: float,
    priority: float,
    vector: bytes,
    labels: dict[str, list[Any]] | None,
    representation: int,
) -> bytes:
    """`encode_add` of one experience; its vector as the bytes of (dim,) float32."""
    sections = 0 if labels is None else 1
    head = _ADD_ONE.pack(
        1, len(vector) // 4, representation, sections, timestamp, reward, confidence, priority
    )
    if labels is None:
        return head + vector
    text = dump_json(labels)
    return b"".join((head, vector, _SECTION.pack(SECTION_LABELS, len(text)), text))


@lru_cache(maxsize=64)
def _add_type(n: int, dim: int) -> np.dtype[Any]:
    """An add without sections as one record."""
    return np.dtype(
        [
            ("head", "<u4", (4,)),
            ("timestamp", "<f8", (n,)),
            ("reward", "<f8", (n,)),
            ("confidence", "<f4", (n,)),
            ("priority", "<f4", (n,)),
            ("vectors", "<f4", (n, dim)),
        ]
    )


def decode_add(*bodies: Buffer) -> AddBody:
    """The inverse of `encode_add`; several bodies become one, as if they had been added at once."""
    data = bodies[0]
    n, dim, _, sections = _ADD.unpack_from(data)
    at = _ADD.size + n * (24 + 4 * dim)
    if at > len(data):
        raise ValueError("an add whose columns exceed its body")
    kind = _add_type(n, dim)
    if len(bodies) > 1:
        if sections or any(len(body) != at for body in bodies):
            return _joined([decode_add(body) for body in bodies])
        table = np.frombuffer(b"".join(bodies), kind)
        if (table["head"] != table["head"][0]).any():
            return _joined([decode_add(body) for body in bodies])
    else:
        table = np.frombuffer(memoryview(data)[:at], kind)
    labels = None
    for _ in range(sections):
        kind, size = _SECTION.unpack_from(data, at)
        at += _SECTION.size
        if at + size > len(data):
            raise ValueError("a section that exceeds its body")
        if kind != SECTION_LABELS:
            raise FormatVersionError(f"an add has a section of kind {kind}, unknown to this expbuf")
        labels = load_json(memoryview(data)[at : at + size])
        at += size
    return _added(table, labels)


def decode_adds(bodies: NDArray[np.uint8]) -> AddBody | None:
    """The same of (m, size) bodies; None where that must be done one by one."""
    n, dim, representation, sections = _ADD.unpack_from(bodies.data)
    if sections or _ADD.size + n * (24 + 4 * dim) != bodies.shape[1]:
        return None
    if len(bodies) == 1:
        return _one_added(bodies[0], n, dim, representation)
    table = bodies.reshape(-1).view(_add_type(n, dim))
    if (table["head"] != table["head"][0]).any():
        return None
    return _added(table, None)


def _added(table: NDArray[np.void], labels: dict[str, list[Any]] | None) -> AddBody:
    m, n, dim = table["vectors"].shape
    return AddBody(
        table["timestamp"].ravel(),
        table["reward"].ravel(),
        table["confidence"].ravel(),
        table["priority"].ravel(),
        table["vectors"].reshape(m * n, dim),
        labels,
        int(table["head"][0, 2]),
    )


def _one_added(body: Buffer, n: int, dim: int, representation: int) -> AddBody:
    """A body without sections."""
    at = _ADD.size
    return AddBody(
        np.frombuffer(body, np.float64, n, at),
        np.frombuffer(body, np.float64, n, at + 8 * n),
        np.frombuffer(body, np.float32, n, at + 16 * n),
        np.frombuffer(body, np.float32, n, at + 20 * n),
        np.frombuffer(body, np.float32, n * dim, at + 24 * n).reshape(n, dim),
        None,
        representation,
    )


@dataclass(frozen=True)
class LoggedAdds(LoggedRun):
    """Successive adds without labels, as the one that adds what they all add.

    `bodies` is its body, (1, size) uint8; `first_ids`, `locations` and `lengths` are those of its
    rows, (n,) each.

    Attributes:
        counts: (m,) uint32, how many rows each of the adds has.
    """

    counts: NDArray[np.uint32]

    def __len__(self) -> int:
        return len(self.counts)

    def behind(self, lsn: int) -> LoggedRun:
        cut = max(0, lsn + 1 - self.first_lsn)
        if not cut:
            return self
        rows = slice(int(self.counts[:cut].sum(dtype=np.int64)), None)
        assert self.lengths is not None
        return LoggedAdds(
            self.first_lsn + cut,
            self.kind,
            np.frombuffer(self._body_of(rows), np.uint8)[np.newaxis],
            self.first_ids[rows],
            self.locations[rows],
            self.lengths[rows],
            self.counts[cut:],
        )

    def operations(self) -> Iterator[LoggedOperation]:
        assert self.lengths is not None
        start = 0
        for lsn, n in enumerate(self.counts.tolist(), self.first_lsn):
            rows = slice(start, start + n)
            first_id, location = int(self.first_ids[start]), int(self.locations[start])
            body = self._body_of(rows)
            yield LoggedOperation(lsn, self.kind, first_id, body, location, self.lengths[rows])
            start += n

    def _body_of(self, rows: slice) -> bytes:
        """The body of the add that adds these."""
        added = decode_adds(self.bodies)
        assert added is not None
        return encode_add(
            AddBody(
                added.timestamp[rows],
                added.reward[rows],
                added.confidence[rows],
                added.priority[rows],
                added.vectors[rows],
                None,
                added.representation,
            )
        )


def add_representation(body: Buffer) -> int:
    """Which representation the vectors of an add are of."""
    return int(_ADD.unpack_from(body)[2])


def _joined(parts: list[AddBody]) -> AddBody:
    """Several adds as one."""
    timestamp, reward, confidence, priority, vectors = (
        np.concatenate([part[i] for part in parts]) for i in range(5)
    )
    labels: dict[str, list[Any]] = {"tags": [], "keys": []}
    for part in parts:
        n = len(part.timestamp)
        labels["tags"] += part.labels["tags"] if part.labels else [[]] * n
        labels["keys"] += part.labels["keys"] if part.labels else [None] * n
    representations = {part.representation for part in parts}
    representation = representations.pop() if len(representations) == 1 else -1
    return AddBody(timestamp, reward, confidence, priority, vectors, labels, representation)


_RELOG = struct.Struct("<III4x")  # n, dim, bytes of the labels
RELOG_COLUMNS: dict[str, Any] = {
    "id": np.int64,
    "sequence": np.int64,
    "timestamp": np.float64,
    "reward": np.float64,
    "confidence": np.float32,
    "priority": np.float32,
    "retrieval_count": np.uint32,
    "success_count": np.float32,
    "flags": np.uint8,
}


class RelogBody(NamedTuple):
    """n experiences that were logged before, with all their columns.

    In the buffer that they are from, only their place changes; in another one they are added as
    they are.

    Attributes:
        columns: (n,) each, by the names in `RELOG_COLUMNS`; ids rise.
        vectors: (n, dim) float32; dim 0 where they only move.
        labels: {"tags": n lists, "rewards": named components by id}, or None.
    """

    columns: dict[str, NDArray[Any]]
    vectors: NDArray[np.float32]
    labels: dict[str, Any] | None


def encode_relog(body: RelogBody) -> bytes:
    """Encode the body of a relog."""
    n, dim = body.vectors.shape
    text = b"" if body.labels is None else dump_json(body.labels)
    columns = [body.columns[name].astype(kind).tobytes() for name, kind in RELOG_COLUMNS.items()]
    return b"".join((_RELOG.pack(n, dim, len(text)), *columns, body.vectors.tobytes(), text))


def decode_relog(data: Buffer) -> RelogBody:
    """The inverse of `encode_relog`."""
    n, dim, text_len = _RELOG.unpack_from(data)
    at = _RELOG.size
    columns = {}
    for name, kind in RELOG_COLUMNS.items():
        columns[name] = np.frombuffer(data, kind, n, at)
        at += columns[name].nbytes
    if at + 4 * n * dim + text_len > len(data):
        raise ValueError("a relog whose vectors exceed its body")
    # After n bytes of flags nothing is aligned; a copy is.
    vectors = np.frombuffer(bytes(memoryview(data)[at : at + 4 * n * dim]), np.float32)
    at += 4 * n * dim
    labels = load_json(memoryview(data)[at : at + text_len]) if text_len else None
    return RelogBody(columns, vectors.reshape(n, dim), labels)


_REEMBED = struct.Struct("<IIII")  # n, representation, bytes of the name, 0


class ReembedBody(NamedTuple):
    """n experiences with new embeddings, which count from the change of representation on.

    Attributes:
        representation: Their place, and their embeddings, are those of this one.
        name: Of whoever makes the embeddings; another one begins anew.
        ids: (n,) int64, rising.
    """

    representation: int
    name: str
    ids: NDArray[np.int64]


def encode_reembed(body: ReembedBody) -> bytes:
    """Encode the body of a reembed."""
    name = body.name.encode("utf-8", "surrogatepass")
    head = _REEMBED.pack(len(body.ids), body.representation, len(name), 0)
    return b"".join((head, body.ids.tobytes(), name))


def decode_reembed(data: Buffer) -> ReembedBody:
    """The inverse of `encode_reembed`."""
    n, representation, name_len, _ = _REEMBED.unpack_from(data)
    ids = np.frombuffer(data, np.int64, n, _REEMBED.size)
    at = _REEMBED.size + ids.nbytes
    if at + name_len > len(data):
        raise ValueError("a reembed whose name exceeds its body")
    name = bytes(memoryview(data)[at : at + name_len]).decode("utf-8", "surrogatepass")
    return ReembedBody(representation, name, ids)


def encode_carry(facts: Mapping[str, Any]) -> Operation:
    """What a buffer takes over from another besides experiences: receipts, numbers."""
    return _operation(CARRY, dump_json(facts))


_COUNT = struct.Struct("<I4x")


def encode_remove(ids: NDArray[np.int64]) -> Operation:
    """Remove these experiences."""
    return _operation(REMOVE, _COUNT.pack(len(ids)) + ids.tobytes())


def decode_ids(data: Buffer) -> NDArray[np.int64]:
    """The ids that a body begins with."""
    (n,) = _COUNT.unpack_from(data)
    return np.frombuffer(data, np.int64, n, _COUNT.size)


def encode_priority(ids: NDArray[np.int64], priorities: NDArray[np.float32]) -> Operation:
    """Set priorities."""
    return _operation(PRIORITY, _COUNT.pack(len(ids)) + ids.tobytes() + priorities.tobytes())


@lru_cache(maxsize=64)
def _priority_type(n: int) -> np.dtype[Any]:
    return np.dtype([("n", "<u4"), ("zero", "<u4"), ("ids", "<i8", (n,)), ("p", "<f4", (n,))])


def decode_priority(*bodies: Buffer) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Ids and priorities, of several bodies one behind the other."""
    (n,) = _COUNT.unpack_from(bodies[0])
    size = _COUNT.size + 12 * n
    if len(bodies) == 1 and len(bodies[0]) == size:
        ids = np.frombuffer(bodies[0], np.int64, n, _COUNT.size)
        return ids, np.frombuffer(bodies[0], np.float32, n, _COUNT.size + ids.nbytes)
    if all(len(body) == size for body in bodies):
        table = np.frombuffer(b"".join(bodies), _priority_type(n))
        if (table["n"] == n).all():
            return table["ids"].ravel(), table["p"].ravel()
    elif len(bodies) == 1:
        raise ValueError(f"{n} priorities in {len(bodies[0])} bytes")
    parts = [decode_priority(body) for body in bodies]
    return np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])


def decode_priorities(
    bodies: NDArray[np.uint8],
) -> tuple[NDArray[np.int64], NDArray[np.float32]] | None:
    """`decode_priority` of (m, size) bodies; None where that must be done one by one."""
    (n,) = _COUNT.unpack_from(bodies.data)
    if _COUNT.size + 12 * n != bodies.shape[1]:
        return None
    table = bodies.reshape(-1).view(_priority_type(n))
    return (table["ids"].ravel(), table["p"].ravel()) if (table["n"] == n).all() else None


def encode_reward(
    ids: NDArray[np.int64],
    rewards: NDArray[np.float64],
    priorities: NDArray[np.float32],
    components: dict[str, dict[str, float]] | None,
) -> Operation:
    """Set total rewards and the priorities that follow; `components` by id, where named."""
    text = dump_json(components) if components else b""
    body = b"".join(
        (_COUNT.pack(len(ids)), ids.tobytes(), rewards.tobytes(), priorities.tobytes(), text)
    )
    return _operation(REWARD, body)


def decode_reward(
    data: Buffer,
) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float32], dict[str, Any]]:
    """Ids, total rewards, priorities, components by id."""
    ids = decode_ids(data)
    at = _COUNT.size + ids.nbytes
    rewards = np.frombuffer(data, np.float64, len(ids), at)
    at += rewards.nbytes
    priorities = np.frombuffer(data, np.float32, len(ids), at)
    at += priorities.nbytes
    return ids, rewards, priorities, load_json(memoryview(data)[at:]) if at < len(data) else {}


_OUTCOME = struct.Struct("<16sQII")  # receipt (zeros: none), its LSN, success, n


class OutcomeBody(NamedTuple):
    """What came of a retrieval. `receipt` is b"" where ids were named directly."""

    receipt: bytes
    receipt_lsn: int
    success: bool
    ids: NDArray[np.int64]
    credit: NDArray[np.float32]


def encode_outcome(outcome: OutcomeBody) -> Operation:
    """Record an outcome."""
    head = _OUTCOME.pack(
        outcome.receipt, outcome.receipt_lsn, int(outcome.success), len(outcome.ids)
    )
    return _operation(OUTCOME, head + outcome.ids.tobytes() + outcome.credit.tobytes())


def decode_outcome(data: Buffer) -> OutcomeBody:
    """The inverse of `encode_outcome`."""
    receipt, lsn, success, n = _OUTCOME.unpack_from(data)
    ids = np.frombuffer(data, np.int64, n, _OUTCOME.size)
    credit = np.frombuffer(data, np.float32, n, _OUTCOME.size + ids.nbytes)
    return OutcomeBody(receipt.strip(b"\0") and receipt, lsn, bool(success), ids, credit)


class OutcomeBodies(NamedTuple):
    """`OutcomeBody` of m outcomes of as many experiences each.

    Attributes:
        receipts: m, each as there.
        receipt_lsns: m.
        success: (m,) bool.
        ids: (m, n) int64.
        credit: (m, n) float32.
    """

    receipts: list[bytes]
    receipt_lsns: list[int]
    success: NDArray[np.bool_]
    ids: NDArray[np.int64]
    credit: NDArray[np.float32]


@lru_cache(maxsize=64)
def _outcome_type(n: int) -> np.dtype[Any]:
    head = [("receipt", "V16"), ("lsn", "<u8"), ("success", "<u4"), ("n", "<u4")]
    return np.dtype([*head, ("ids", "<i8", (n,)), ("credit", "<f4", (n,))])


def decode_outcomes(bodies: NDArray[np.uint8]) -> OutcomeBodies | None:
    """`decode_outcome` of (m, size) bodies; None where that must be done one by one."""
    *_, n = _OUTCOME.unpack_from(bodies.data)
    if _OUTCOME.size + 12 * n != bodies.shape[1]:
        return None
    table = bodies.reshape(-1).view(_outcome_type(n))
    if (table["n"] != n).any():
        return None
    raw, none = table["receipt"].tobytes(), bytes(16)
    receipts = [raw[at : at + 16] for at in range(0, len(raw), 16)]
    return OutcomeBodies(
        [b"" if receipt == none else receipt for receipt in receipts],
        table["lsn"].tolist(),
        table["success"] != 0,
        table["ids"],
        table["credit"],
    )


def encode_clear() -> Operation:
    """Remove everything."""
    return _operation(CLEAR, b"")


def encode_settings(settings: Mapping[str, Any]) -> Operation:
    """Set the buffer's logged settings, all of them."""
    return _operation(SETTINGS, dump_json(settings))


_RESERVE = struct.Struct("<QQ")


def encode_reserve(next_id: int, next_lsn: int) -> Operation:
    """After a crash, ids and LSNs go on from here at the earliest."""
    return _operation(RESERVE, _RESERVE.pack(next_id, next_lsn))


def decode_reserve(data: Buffer) -> tuple[int, int]:
    """(next_id, next_lsn)."""
    next_id, next_lsn = _RESERVE.unpack_from(data)
    return next_id, next_lsn


def corrupt_body(lsn: int, kind: int, exc: Exception) -> CorruptionError:
    """The error for a body that its checksum calls intact and that still makes no sense."""
    name = KIND_NAMES.get(kind, str(kind))
    return CorruptionError(f"operation {lsn} ({name}) cannot be decoded: {exc}", lsn=lsn)
