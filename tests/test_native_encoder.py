"""An experience by native code and by Python: the same bytes; the rest is left to Python."""

from __future__ import annotations

import gc
import tempfile
import time
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from expbuf_core import Experience, codec
from expbuf_core.builtin.fusions import FusionSettings, WeightedConcat, WeightedSum
from expbuf_core.builtin.scorers import WeightedSumScorer, WeightedSumSettings
from expbuf_core.errors import ExpbufError
from expbuf_core.intake import Accepted, Intake
from expbuf_core.native import native, why_not

pytestmark = pytest.mark.skipif(native is None, reason=f"no native code: {why_not}")

NOW = 1_700_000_000.0
V_DIM, Q_DIM = 6, 6
INTAKES: dict[str, dict[str, Any]] = {
    "sum": {},
    "sum, as they are": {"fusion": WeightedSum(FusionSettings(normalize_parts=False))},
    "concat": {"fusion": WeightedConcat(FusionSettings(visual_weight=0.4)), "q_dim": 3},
    "l2": {"metric": "l2", "fusion": WeightedSum(FusionSettings(normalize_parts=False))},
    "one part": {"q_dim": 0},
    "another scorer": {"scorer": lambda batch: np.ones(len(batch))},
}


def intake(**changed: Any) -> Intake:
    arguments: dict[str, Any] = {
        "v_dim": V_DIM,
        "q_dim": Q_DIM,
        "metric": "cosine",
        "fusion": WeightedSum(FusionSettings()),
        "scorer": WeightedSumScorer(WeightedSumSettings(reward_scale=0.3)),
        "max_experience_bytes": 4000,
        "max_commit_bytes": 1 << 24,
        **changed,
    }
    return Intake(**arguments)


def pure(**changed: Any) -> Intake:
    made = intake(**changed)
    made.encoder = None
    return made


def outcome(made: Intake, experience: Experience, priority: Any) -> Accepted | str:
    try:
        return made.accept(experience, priority)
    except ExpbufError as exc:
        return f"{type(exc).__name__}: {exc}"


def assert_same(found: Accepted | str, wanted: Accepted | str) -> None:
    if isinstance(found, str) or isinstance(wanted, str):
        assert found == wanted
        return
    for name in ("row", "crc", "tags", "key", "timestamp", "confidence", "priority"):
        assert getattr(found, name) == getattr(wanted, name), name
    assert found.reward == wanted.reward or (np.isnan(found.reward) and np.isnan(wanted.reward))
    vectors = [np.frombuffer(each.vector, np.float32) for each in (found, wanted)]
    np.testing.assert_allclose(*vectors, rtol=2e-6, atol=1e-7)


def memmap(array: np.ndarray[Any, Any]) -> np.memmap[Any, Any]:
    """The same, in a file that is mapped."""
    with tempfile.TemporaryFile() as file:
        array.tofile(file)
        return np.memmap(file, array.dtype, "r", shape=array.shape)


texts = st.text(st.characters(), max_size=20)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | texts
numpys = st.sampled_from(
    [
        np.float16(0.1),
        np.float32(0.1),
        np.float64(0.1),
        np.float32(np.nan),
        np.float64(-np.inf),
        np.longdouble(0.1),
        np.int8(-1),
        np.uint64(2**64 - 1),
        np.int64(1),
        np.bool_(True),
        np.complex64(1j),
        np.str_("a"),
        np.datetime64("2020-01-01"),
        np.arange(6, dtype=np.int32).reshape(2, 3).T,
        np.arange(4, dtype=">f4")[::2],
        np.zeros((0, 2), np.uint8),
        np.array(1.5),
        np.array([True]),
        np.array(["a"]),
        np.array([None]),
        np.array(["2020-01-01"], "M8[D]"),
        np.array([(1, 2)], "i4,f4"),
        np.ma.MaskedArray([1, 2], [False, True]),
    ]
)
odd = st.tuples(st.integers(), texts) | st.binary(max_size=5) | st.just(1 << 80) | numpys
trees = st.recursive(
    scalars | odd,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(texts, inner, max_size=4)
    ),
    max_leaves=10,
)
numbers = st.floats(0, 1) | st.integers(0, 1) | st.floats() | st.booleans() | st.just("x") | numpys
parts = st.sampled_from(
    [
        np.linspace(-1, 1, V_DIM, dtype=np.float32),
        np.linspace(2, 3, V_DIM, dtype=np.float32),
        np.linspace(2, 3, V_DIM),
        np.full(V_DIM, 1e39),
        np.full(V_DIM, 1e-42),
        np.linspace(2, 3, 2 * V_DIM)[::2],
        np.linspace(2, 3, V_DIM, dtype=np.float16),
        np.linspace(2, 3, 3, dtype=np.float32),
        np.linspace(2, 3, 2 * V_DIM, dtype=np.float32)[::2],
        np.zeros(V_DIM, np.float32),
        np.full(V_DIM, 1e-30, np.float32),
        np.full(V_DIM, 3e38, np.float32),
        np.array([1, 2, np.nan, 0, 0, 0], np.float32),
        np.array([1, 2, -np.inf, 0, 0, 0], np.float32),
        np.ones((1, V_DIM), np.float32),
        np.ones(V_DIM, ">f4"),
        np.array([-0.0, 1e-7, -6e-8, 65504, -1.5, 1], np.float16),
        np.array([1, 2, -np.inf, 0, 0, 0], np.float16),
        np.array([1, 2, np.nan, 0, 0, 0], np.float16),
        np.ones(V_DIM, ">f2"),
        memmap(np.linspace(2, 3, V_DIM, dtype=np.float32)),
        memmap(np.linspace(2, 3, V_DIM)),
        memmap(np.arange(V_DIM)),
        [1.0] * V_DIM,
        np.linspace(-1, 1, V_DIM).tolist(),
        tuple(np.linspace(-1e-3, 1, V_DIM).tolist()),
        [1.0, 2, 3.0, 4.0, 5.0, 6.0],
        [1.0, True, 3.0, 4.0, 5.0, 6.0],
        [1.0, "2", 3.0, 4.0, 5.0, 6.0],
        [1.0, 1e300, 3.0, 4.0, 5.0, 6.0],
        [1.0, float("nan"), 3.0, 4.0, 5.0, 6.0],
        [1.0] * (V_DIM + 1),
        [[1.0]] * V_DIM,
        [np.float64(1.5)] * V_DIM,
        [],
        None,
    ]
)


@st.composite
def experiences(draw: st.DrawFn) -> Experience:
    """Ordinary for the most part, with an oddity here and there."""
    fields: dict[str, Any] = {
        "v_embed": draw(parts),
        "q_embed": draw(parts),
        "question": draw(texts),
    }
    rare: dict[str, st.SearchStrategy[Any]] = {
        "answer": trees | odd,
        "trajectory": trees | odd,
        "metadata": st.dictionaries(texts, trees, max_size=3) | odd,
        "rewards": numbers | st.dictionaries(texts, numbers, max_size=4),
        "confidence": numbers,
        "probabilities": st.just(np.array([0.25, 0.75], np.float32)),
        "tags": st.lists(texts, max_size=3).map(tuple) | st.lists(texts, max_size=3) | odd,
        "image": texts | st.binary(max_size=4) | numpys,
        "key": texts | odd,
        "timestamp": st.floats(0, 4e9) | st.integers(0, 1 << 40) | numbers,
        "id": st.integers(0, 3),
    }
    for name in draw(st.sets(st.sampled_from(sorted(rare)), max_size=4)):
        fields[name] = draw(rare[name])
    return Experience(**fields)


@pytest.mark.parametrize("kind", INTAKES)
@given(experience=experiences(), priority=st.none() | numbers)
def test_whatever_comes_in(kind: str, experience: Experience, priority: Any) -> None:
    both = [make(**INTAKES[kind]) for make in (intake, pure)]
    with mock.patch("time.time", return_value=NOW):
        found, wanted = (outcome(made, experience, priority) for made in both)
    if isinstance(found, Accepted) and isinstance(wanted, Accepted) and wanted.timestamp < NOW:
        # Its age counts, by a function that numpy and C may round differently.
        assert found.priority == pytest.approx(wanted.priority, rel=1e-14, abs=0)
        found = found._replace(priority=wanted.priority)
    assert_same(found, wanted)


PLAIN: list[dict[str, Any]] = [
    {"question": 'what is it? «ü» \U0001f600 "\\\n\r\t\b\f\x00\x1f\x7f/'},
    {"answer": "a cat", "rewards": {"exact": 1.0, "format": -0.25, "length": 3}},
    {"answer": {"choices": [1, -2.5, 1e300, True, None]}, "rewards": 2},
    {"trajectory": [{"step": i, "thought": "t" * i} for i in range(9)], "confidence": 0},
    {"metadata": {"source": "web", "nested": {"": []}}, "tags": ("a", "b"), "key": "k"},
    {"image": "a.png", "answer": "", "rewards": {}, "metadata": {}},
    {"answer": 2**63 - 1, "confidence": 0.1},
    {"confidence": np.float32(0.3), "rewards": {"a": np.float64(0.1), "b": np.float32(0.1)}},
    {"confidence": np.float64(1), "rewards": np.int64(-3), "answer": np.float16(0.1)},
    {"answer": ("a", (1, [])), "trajectory": [("s", 0, 0.5), ("t", 1, -0.5)]},
    {"image": b"\x89PNG\0", "metadata": {"thumbnail": np.zeros((4, 4, 3), np.uint8), "b": b""}},
    {"trajectory": [{"state": np.arange(4.0), "at": np.array(1)}, np.arange(6).reshape(2, 3).T]},
    {"metadata": {"loss": np.float32(0.1), "n": np.uint64(2**63 - 1), "x": np.ones(2, ">i2")}},
    {"v_embed": np.linspace(-1, 1, V_DIM), "q_embed": np.linspace(1, 1e-40, V_DIM)},
    {"v_embed": np.linspace(-1, 1, V_DIM, dtype=np.float16), "q_embed": [0.1] * V_DIM},
    {"v_embed": memmap(np.linspace(-1, 1, V_DIM, dtype=np.float32)), "q_embed": (0.1,) * V_DIM},
    {"v_embed": memmap(np.ones((2, V_DIM)))[1], "q_embed": np.full(V_DIM, -3e-6, np.float16)},
    {"question": 'é"\\\n\x01' * 300, "answer": "a" * 5000 + '"\n', "image": bytes(5000)},
]


@pytest.mark.parametrize("fields", PLAIN)
def test_what_is_plain_is_done_natively(fields: dict[str, Any]) -> None:
    roomy: dict[str, Any] = {"max_experience_bytes": 1 << 20}
    made, v = intake(**roomy), np.linspace(-1, 1, V_DIM, dtype=np.float32)
    experience = Experience(**{"v_embed": v, "q_embed": v + 2, "timestamp": NOW + 1e9, **fields})
    assert made.encoder is not None
    accepted = made.encoder.accept(experience, None, NOW)
    assert accepted is not None
    assert_same(accepted, pure(**roomy).accept(experience, None))
    given = made.encoder.accept(experience, 0.5, NOW)
    assert given is not None
    assert_same(given, pure(**roomy).accept(experience, 0.5))
    size = len(accepted.row)
    for most, fits in ((size, True), (size - 1, False)):
        made = intake(max_experience_bytes=most)
        assert made.encoder is not None
        assert (made.encoder.accept(experience, None, NOW) is not None) == fits


def test_every_half() -> None:
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    finite = halves[np.isfinite(halves)]
    made = intake(v_dim=len(finite), q_dim=0, max_experience_bytes=1 << 20)
    assert made.encoder is not None
    accepted = made.encoder.accept(Experience(v_embed=finite), None, NOW)
    assert accepted is not None
    stored = codec.decode_embeddings([accepted.row], "v_embed")[0][0]
    assert stored.tobytes() == finite.astype(np.float32).tobytes()


@pytest.mark.parametrize("ago", [-5.0, 1e-3, 1.0, 86_400.0, 1e9, 1e300])
@pytest.mark.parametrize("weight", [0.0, 0.2, 3.0])
def test_its_age_counts(ago: float, weight: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.time", lambda: NOW)
    scorer = WeightedSumScorer(WeightedSumSettings(age_weight=weight, age_half_life_s=3600.0))
    v = np.ones(V_DIM, np.float32)
    given: dict[str, Any] = {"confidence": 0.3, "rewards": -2.0, "timestamp": NOW - ago}
    experience = Experience(v_embed=v, q_embed=v, **given)
    made = intake(scorer=scorer)
    assert made.encoder is not None
    found = made.encoder.accept(experience, None, NOW)
    wanted = pure(scorer=scorer).accept(experience, None)
    assert found is not None
    assert found.timestamp == wanted.timestamp
    assert found.priority == pytest.approx(wanted.priority, rel=1e-14 if weight else 0, abs=0)


def test_who_changes_what_is_being_added() -> None:
    """In the middle of it, as a finalizer may that the garbage collector runs (3.11 and older)."""
    made, v = intake(max_experience_bytes=1 << 20), np.ones(V_DIM, np.float32)
    assert made.encoder is not None
    tree: dict[str, Any] = {str(i): [np.ones(2), [np.ones(2)]] for i in range(9)}
    changes = iter(range(1 << 30))

    def meddle(phase: str, _: dict[str, int]) -> None:
        i = next(changes)
        tree.pop(f"x{i - 1}", None)
        tree.update({str(k): [np.ones(3), [np.ones(i % 3)]] for k in range(9)})
        if i % 7 == 0:
            tree[f"x{i}"] = []

    threshold = gc.get_threshold()
    experience = Experience(v_embed=v, q_embed=v, answer=tree)
    gc.collect()
    gc.freeze()  # each collection has little to look at
    gc.callbacks.append(meddle)
    gc.set_threshold(1)
    try:
        for _ in range(20):
            accepted = made.encoder.accept(experience, None, NOW)
            assert accepted is None or codec.decode_row(accepted.row).fields["answer"]
    finally:
        gc.set_threshold(*threshold)
        gc.callbacks.remove(meddle)
        gc.unfreeze()


ODD: list[dict[str, Any]] = [
    {"question": "\ud800"},
    {"answer": np.array([None])},
    {"answer": np.array(["a"])},
    {"answer": np.str_("a")},
    {"answer": np.bool_(True)},
    {"answer": np.longdouble(1)},
    {"answer": np.float32(np.nan)},
    {"answer": bytearray(b"a")},
    {"answer": np.ma.MaskedArray([1])},
    {"answer": {"$nd": 0}},
    {"answer": 2**63},
    {"answer": float("nan")},
    {"answer": {1: 2}},
    {"answer": [[]] * 1 + [np.uint64(2**63)]},
    {"rewards": np.bool_(True)},
    {"confidence": np.float32(1.5)},
    {"rewards": float("nan")},
    {"rewards": {"a": True}},
    {"rewards": {"a": 1.7e308, "b": 1.7e308}},
    {"confidence": True},
    {"confidence": 1.5},
    {"metadata": [1]},
    {"tags": {"a"}},
    {"key": 3},
    {"image": np.zeros((2, 2), np.uint8)},
    {"image": bytes(4000)},
    {"v_embed": np.full(V_DIM, 1e39)},
    {"v_embed": [1e39] * V_DIM},
    {"v_embed": [1.0] * (V_DIM + 1)},
    {"v_embed": (1.0,) * (V_DIM - 1)},
    {"v_embed": [1.0, 2, 3.0, 4.0, 5.0, 6.0]},
    {"v_embed": [1.0, True, 3.0, 4.0, 5.0, 6.0]},
    {"v_embed": [np.float64(1.5)] * V_DIM},
    {"v_embed": np.ones(V_DIM, ">f2")},
    {"v_embed": memmap(np.arange(V_DIM))},
    {"v_embed": np.frombuffer(bytes(4 * V_DIM + 1), np.float32, offset=1)},
    {"id": 0},
    {"probabilities": np.array([0.5, 0.5], np.float32)},
    {"question": "q" * 4000},
]


@pytest.mark.parametrize("fields", ODD)
def test_what_is_not_plain_is_left_alone(fields: dict[str, Any]) -> None:
    made, v = intake(), np.linspace(-1, 1, V_DIM, dtype=np.float32)
    experience = Experience(**{"v_embed": v, "q_embed": v + 2, "timestamp": NOW + 1e9, **fields})
    assert made.encoder is not None
    assert made.encoder.accept(experience, None, NOW) is None


@pytest.mark.parametrize("odd", [None, {"answer": 2**63}])
def test_several_at_once(odd: dict[str, Any] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    v = np.linspace(-1, 1, V_DIM, dtype=np.float32)
    fields = [*PLAIN, *([] if odd is None else [odd])]
    given = [
        Experience(**{"v_embed": v + i, "q_embed": v - i, "timestamp": NOW + 1e9, **each})
        for i, each in enumerate(fields)
    ]
    monkeypatch.setattr(time, "time", lambda: NOW)
    found, wanted = (
        make(max_experience_bytes=1 << 20).many(given, None) for make in (intake, pure)
    )
    assert found.rows == wanted.rows
    assert found.content_crcs == wanted.content_crcs
    assert found.weight == wanted.weight == len(given)
    bodies = [codec.decode_add(each.operation.body) for each in (found, wanted)]
    assert bodies[0].labels == bodies[1].labels
    for name in ("timestamp", "reward", "confidence", "priority", "vectors"):
        columns = [getattr(body, name) for body in bodies]
        np.testing.assert_allclose(*columns, rtol=2e-6, atol=1e-7)
    without_time = [Experience(v_embed=v, q_embed=v + 1)] * 3
    now = codec.decode_add(intake().many(without_time, None).operation.body).timestamp
    assert now.tolist() == [NOW] * 3


def test_too_deep_is_left_alone() -> None:
    tree: Any = []
    for _ in range(200):
        tree = [tree]
    made, v = intake(), np.ones(V_DIM, np.float32)
    assert made.encoder is not None
    experience = Experience(v_embed=v, q_embed=v, answer=tree)
    assert made.encoder.accept(experience, None, NOW) is None


@pytest.mark.parametrize("nth", range(1, 9))
@pytest.mark.parametrize("number", [2.0, np.nan])
def test_what_changes_while_it_is_encoded(nth: int, number: float) -> None:
    """The collector may run anything in between: what is accepted fits together all the same."""
    fusion = WeightedSum(FusionSettings())
    made = intake(metric="inner_product", fusion=fusion, v_dim=3, q_dim=3)
    assert made.encoder is not None
    v, q, tags = np.ones(3, np.float32), np.ones(3, np.float32), ["a"]
    experience = Experience(v_embed=v, q_embed=q, rewards={"a": 1.0}, tags=tags)  # type: ignore[arg-type]
    runs = 0
    kept: list[list[int]] = [[] for _ in range(1000)]  # none can be had for free any more

    def change(phase: str, info: dict[str, int]) -> None:
        nonlocal runs
        runs += phase == "start"
        if runs == nth:
            v[:] = number
            tags.append("b")
        kept.extend([] for _ in range(10))  # it comes again at once

    usual = gc.get_threshold()
    gc.callbacks.append(change)
    try:
        gc.set_threshold(1)
        accepted = made.encoder.accept(experience, None, NOW)
    finally:
        gc.set_threshold(*usual)
        gc.callbacks.remove(change)
    if accepted is None:  # Python says what is wrong
        assert np.isnan(number)
        return
    row = codec.decode_row(accepted.row)
    assert list(row.fields["tags"]) == accepted.tags
    parts = codec.decode_embeddings([accepted.row], "v_embed", "q_embed")
    assert np.isfinite(parts).all()
    wanted = fusion(*parts)[0]
    np.testing.assert_allclose(np.frombuffer(accepted.vector, np.float32), wanted, rtol=1e-6)


def test_subclasses_are_left_alone() -> None:
    """They may do anything: of experiences, arrays, fusions, scorers."""

    class Mine(Experience):
        pass

    class Sum(WeightedSum):
        pass

    class Scorer(WeightedSumScorer):
        pass

    class Array(np.ndarray):  # type: ignore[type-arg]
        pass

    v = np.ones(V_DIM, np.float32)
    made = intake()
    assert made.encoder is not None
    assert made.encoder.accept(Mine(v_embed=v, q_embed=v), None, NOW) is None
    assert made.encoder.accept(Experience(v_embed=v.view(Array), q_embed=v), None, NOW) is None
    assert intake(fusion=Sum(FusionSettings())).encoder is None
    scored = intake(scorer=Scorer(WeightedSumSettings()))
    assert scored.encoder is not None
    assert scored.encoder.accept(Experience(v_embed=v, q_embed=v), None, NOW) is None
    assert scored.encoder.accept(Experience(v_embed=v, q_embed=v), 1.0, NOW) is not None
