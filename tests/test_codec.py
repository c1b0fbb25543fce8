"""Trees, rows and bodies to bytes and back, and what hostile bytes may do: nothing."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from expbuf_core import codec, frames
from expbuf_core.codec import AddBody, OutcomeBody
from expbuf_core.errors import FormatVersionError, InvalidExperience

texts = st.text(st.characters(codec=None, exclude_categories=()))
arrays = st.builds(
    lambda dtype, shape: np.arange(math.prod(shape)).astype(dtype).reshape(shape),
    st.sampled_from(["u1", "<i4", ">f4", "f8", "f2", "?", "c8"]),
    st.lists(st.integers(0, 3), max_size=3).map(tuple),
)
leaves = st.none() | st.booleans() | st.integers() | st.floats() | texts | st.binary() | arrays
keys = texts | st.sampled_from(["$", "$$", "$nd", "$bytes", "$tuple", "dtype", "shape"])
trees = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(keys, inner, max_size=4)
    ),
    max_leaves=25,
)


def same(a: Any, b: Any) -> bool:
    """Equal, of the same type, NaN equal to itself."""
    if isinstance(a, np.ndarray):
        if not isinstance(b, np.ndarray) or (a.dtype, a.shape) != (b.dtype, b.shape):
            return False
        return a.tobytes() == b.tobytes()
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, float):
        return math.copysign(1, a) == math.copysign(1, b) and (a == b or (a != a and b != b))
    return bool(a == b)


@given(tree=trees)
def test_trees_round_trip(tree: Any) -> None:
    attachments: list[bytes] = []
    packed = codec.pack_tree(tree, attachments, "tree")
    stored = codec.load_json(codec.dump_json(packed))
    assert same(codec.unpack_tree(stored, attachments), tree) or has_nan_sign(tree)


def has_nan_sign(tree: Any) -> bool:
    """JSON keeps no sign of a NaN."""
    if isinstance(tree, float):
        return math.isnan(tree) and math.copysign(1, tree) < 0
    if isinstance(tree, dict):
        return any(map(has_nan_sign, tree.values()))
    return isinstance(tree, list | tuple) and any(map(has_nan_sign, tree))


@given(fields=st.dictionaries(texts, trees, max_size=4), dims=st.tuples(*[st.integers(0, 5)] * 2))
def test_rows_round_trip(fields: dict[str, Any], dims: tuple[int, int]) -> None:
    v, q = (np.arange(dim, dtype=np.float32) + 0.5 for dim in dims)
    row = codec.decode_row(codec.encode_row(v, q, fields))
    np.testing.assert_array_equal(row.v_embed, v)
    np.testing.assert_array_equal(row.q_embed, q)
    assert same(row.fields, fields) or has_nan_sign(fields)


@pytest.mark.parametrize("equal", [True, False])
@pytest.mark.parametrize("n", [0, 1, 5])
def test_bare_rows_are_rows(n: int, equal: bool) -> None:
    """The fast way gives the same bytes as one row after the other."""
    rng = np.random.default_rng(1)
    v, q = rng.random((n, 3), np.float32), rng.random((n, 2), np.float32)
    fields = [{"answer": "x" * (3 if equal else i)} for i in range(n)]
    rows, lengths = codec.encode_bare_rows(v, q, [[codec.dump_json(f) for f in fields]])
    one_by_one = [codec.encode_row(v[i], q[i], fields[i]) for i in range(n)]
    assert bytes(rows) == b"".join(one_by_one)
    assert lengths.tolist() == [len(row) for row in one_by_one]
    assert lengths.dtype == np.uint32
    assert len(codec.content_crcs(rows, lengths)) == n
    bare, _ = codec.encode_bare_rows(v, q, None)
    assert bytes(bare) == b"".join(codec.encode_row(v[i], q[i], {}) for i in range(n))


_AWKWARD = st.text(st.sampled_from('a\\"\n\r\t\b\f\0\x1f\x7f é\u2028\ud800😀'), max_size=9)


@given(values=st.lists(st.one_of(_AWKWARD, texts), min_size=1, max_size=5))
def test_texts_of_a_column_are_those_of_each(values: list[str]) -> None:
    """A column of strings is escaped all at once; the encoder is asked where that falls short."""
    n = len(values)
    answers = [value or None for value in reversed(values)]
    for columns in (
        {"question": values},
        {"question": values, "key": values[::-1]},
        {"metadata": [{"at": value} for value in values], "question": values},
        {"question": values, "answer": answers},
        {"answer": answers, "key": values},
        {"answer": answers},
        {},
    ):
        texts = codec.encode_texts(columns, n)
        assert texts is not None
        rows = [{name: column[i] for name, column in columns.items()} for i in range(n)]
        assert [b"".join(each) for each in zip(*texts, strict=True)] == [
            codec.dump_json({name: x for name, x in row.items() if x is not None}) for row in rows
        ]


def test_what_no_tree_holds_is_named() -> None:
    for bad, where in (
        ({"a": [1, {"b": object()}]}, "answer"),
        ({1: 2}, "keys must be strings, found 1 of type int"),
        (np.array([None]), "cannot store an array of dtype object"),
        (range(3), "cannot store a range"),
        (10**5000, "too large"),
        ({"x": -(10**5000)}, "too large"),
        (1j, "cannot store a complex"),
    ):
        with pytest.raises(InvalidExperience, match=where):
            codec.pack_tree(bad, [], "answer")


def test_depth_is_bounded_on_the_way_in() -> None:
    def nest(depth: int) -> Any:
        tree: Any = 1
        for _ in range(depth):
            tree = [tree]
        return tree

    packed = codec.pack_tree(nest(codec.MAX_DEPTH), [], "t")
    assert codec.unpack_tree(codec.load_json(codec.dump_json(packed)), []) == nest(codec.MAX_DEPTH)
    with pytest.raises(InvalidExperience, match="nested deeper than 100"):
        codec.pack_tree(nest(codec.MAX_DEPTH + 2), [], "t")


# ---------------------------------------------------------------- bodies


def add_body(n: int, dim: int, labels: Any = None) -> AddBody:
    rng = np.random.default_rng(n)
    return AddBody(
        timestamp=rng.random(n),
        reward=np.where(rng.random(n) < 0.5, np.nan, rng.random(n)),
        confidence=rng.random(n, np.float32),
        priority=rng.random(n, np.float32),
        vectors=rng.random((n, dim), np.float32),
        labels=labels,
    )


@pytest.mark.parametrize("n", [0, 1, 7])
@pytest.mark.parametrize("labelled", [False, True])
def test_adds_round_trip(n: int, labelled: bool) -> None:
    labels = {"tags": [["a", "ü"]] * n, "keys": ["\ud800", *[None] * (n - 1)][:n]}
    body = add_body(n, 3, labels if labelled else None)
    found = codec.decode_add(codec.encode_add(body))
    for name in ("timestamp", "reward", "confidence", "priority", "vectors"):
        a, b = getattr(found, name), getattr(body, name)
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        np.testing.assert_array_equal(a, b)
    assert found.labels == body.labels


def test_other_bodies_round_trip() -> None:
    some = np.array([3, 1 << 62, 0], np.int64)
    np.testing.assert_array_equal(codec.decode_ids(codec.encode_remove(some).body), some)
    values = np.array([0.5, 0, 9], np.float32)
    found = codec.decode_priority(codec.encode_priority(some, values).body)
    np.testing.assert_array_equal(found[0], some)
    np.testing.assert_array_equal(found[1], values)
    totals, named = np.array([0.5, -1, 3.0]), {"3": {"a": 0.5}}
    for components in (None, named):
        got = codec.decode_reward(codec.encode_reward(some, totals, values, components).body)
        np.testing.assert_array_equal(got[1], totals)
        np.testing.assert_array_equal(got[2], values)
        assert got[3] == (components or {})
    assert codec.decode_reserve(codec.encode_reserve(5, 1 << 60).body) == (5, 1 << 60)
    settings = {"max_size": 3, "ü": [1, None]}
    assert codec.load_json(codec.encode_settings(settings).body) == settings
    assert codec.encode_clear().body == b""


@pytest.mark.parametrize(
    "receipt", [bytes(16), bytes(range(16)), b"\0" * 15 + b"\1", b"\1" + b"\0" * 15]
)
def test_outcomes_round_trip(receipt: bytes) -> None:
    given_ = OutcomeBody(receipt, 77, True, np.array([1, 2]), np.array([0.5, 1], np.float32))
    found = codec.decode_outcome(codec.encode_outcome(given_).body)
    assert found.receipt == (receipt if any(receipt) else b"")
    assert (found.receipt_lsn, found.success) == (77, True)
    np.testing.assert_array_equal(found.ids, given_.ids)
    np.testing.assert_array_equal(found.credit, given_.credit)


# ---------------------------------------------------------------- hostile bytes

_TWO, _ONES = np.arange(2), np.ones(2, np.float32)
DECODERS: dict[str, tuple[Callable[[Any], Any], bytes]] = {
    "add": (
        codec.decode_add,
        codec.encode_add(add_body(3, 2, {"tags": [[]] * 3, "keys": ["k"] * 3})),
    ),
    "remove": (codec.decode_ids, bytes(codec.encode_remove(np.arange(3)).body)),
    "priority": (codec.decode_priority, bytes(codec.encode_priority(_TWO, _ONES).body)),
    "reward": (
        codec.decode_reward,
        bytes(codec.encode_reward(_TWO, np.ones(2), _ONES, {"0": {"a": 1.0}}).body),
    ),
    "outcome": (
        codec.decode_outcome,
        bytes(codec.encode_outcome(OutcomeBody(bytes(16), 1, True, _TWO, _ONES)).body),
    ),
    "reserve": (codec.decode_reserve, bytes(codec.encode_reserve(1, 2).body)),
    "row": (
        codec.decode_row,
        codec.encode_row(_ONES, _ONES[:1], {"a": [np.arange(3), b"x", (1,)]}),
    ),
}


@pytest.mark.parametrize("name", DECODERS)
@given(data=st.data())
def test_changed_bytes_raise_or_decode(name: str, data: st.DataObject) -> None:
    """Checksums keep such bytes away; a decoder that meets them must still not misbehave."""
    decode, good = DECODERS[name]
    raw = bytearray(good)
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    raw = raw[: data.draw(st.integers(0, len(raw)))] if data.draw(st.booleans()) else raw
    try:
        decode(bytes(raw))
    except (*codec.UNDECODABLE, FormatVersionError):
        pass


def test_lengths_are_not_believed() -> None:
    """Four gigabytes of rows in a body of a few bytes."""
    huge = b"\xff\xff\xff\xff"
    for decode, _ in DECODERS.values():
        if decode is codec.decode_reserve:
            continue  # two numbers, and nothing that they are the length of
        with pytest.raises((*codec.UNDECODABLE, FormatVersionError)):
            decode(huge * 16)


def test_no_objects_from_bytes() -> None:
    with pytest.raises(ValueError, match="array of objects"):
        codec.unpack_tree({"$nd": 0, "dtype": "|O", "shape": [1]}, [bytes(8)])


def test_a_newer_row_is_told() -> None:
    row = bytearray(codec.encode_row(np.ones(1, np.float32), np.ones(1, np.float32), {}))
    row[frames.ROW_HEADER_BYTES] = 9
    with pytest.raises(FormatVersionError, match="version 9"):
        codec.decode_row(row)


# ---------------------------------------------------------------- arrays from anywhere


def test_what_is_an_array() -> None:
    class Protocol:
        def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
            return np.arange(3)

    array = np.arange(2)
    assert codec.to_numpy(array) is array
    assert codec.to_numpy(Protocol()).tolist() == [0, 1, 2]  # type: ignore[union-attr]
    assert codec.to_numpy(np.float32(3)) == 3
    for other in ([1, 2], (1,), 1.5, "x", None, {}, object()):
        assert codec.to_numpy(other) is None


# ---------------------------------------------------------------- embeddings of many


@pytest.mark.parametrize("n", [1, 5])
@pytest.mark.parametrize("texts", [True, False])
def test_embeddings_of_many_are_those_of_each(n: int, texts: bool) -> None:
    draw = np.random.default_rng(0)
    v, q = draw.random((n, 6), np.float32), draw.random((n, 3), np.float32)
    fields: list[dict[str, Any]] = [{"answer": "x" * i} if texts else {} for i in range(n)]
    rows = [codec.encode_row(v[i], q[i], fields[i]) for i in range(n)]
    for payloads in (rows, [memoryview(row) for row in rows]):
        for found, wanted in zip(
            codec.decode_embeddings(payloads, "v_embed", "q_embed"), (v, q), strict=True
        ):
            assert found.flags.c_contiguous
            assert found.flags.writeable
            np.testing.assert_array_equal(found, wanted)
        (only,) = codec.decode_embeddings(payloads, "q_embed")
        np.testing.assert_array_equal(only, q)


@pytest.mark.parametrize("behind", [0, 100, 1000, 5000])
def test_embeddings_before_much_text_or_little(behind: int) -> None:
    draw = np.random.default_rng(0)
    v, none = draw.random((4, 6), np.float32), np.empty((4, 0), np.float32)
    rows = [codec.encode_row(v[i], none[i], {"answer": "x" * behind}) for i in range(4)]
    found, nothing = codec.decode_embeddings(rows, "v_embed", "q_embed")
    np.testing.assert_array_equal(found, v)
    assert nothing.shape == (4, 0)


def test_embeddings_of_what_does_not_belong_together() -> None:
    row = codec.encode_row(np.ones(4, np.float32), np.ones(2, np.float32), {})
    other = codec.encode_row(np.ones(5, np.float32), np.ones(1, np.float32), {})
    for rows in ([row, other], [row, row[:50]], [row, b""], [b"", row], [row[:40]]):
        with pytest.raises(ValueError, match=r"row|dimensions|reshape"):
            codec.decode_embeddings(rows, "q_embed")
