"""Checking, scoring, fusing and encoding what comes in."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from expbuf_core import Experience, codec, frames
from expbuf_core.builtin.fusions import FusionSettings, WeightedConcat, WeightedSum
from expbuf_core.builtin.scorers import (
    AbsoluteReward,
    AbsoluteRewardSettings,
    TDError,
    TDErrorSettings,
    WeightedSumScorer,
    WeightedSumSettings,
)
from expbuf_core.commit import Draft
from expbuf_core.errors import InvalidExperience, PluginContractError
from expbuf_core.intake import COLUMNS, Intake
from expbuf_core.values import as_ids, checked_priorities

NOW = 1_700_000_000.0
V = np.linspace(-1, 1, 8, dtype=np.float32)
Q = np.linspace(2, 3, 8, dtype=np.float32)
SCORERS = [
    WeightedSumScorer(WeightedSumSettings(reward_scale=0.3)),
    AbsoluteReward(AbsoluteRewardSettings()),
    TDError(TDErrorSettings()),
]
GIVEN: list[dict[str, Any]] = [
    {},
    {"confidence": 0.3},
    {"confidence": 0.1, "rewards": 1.7},
    {"confidence": 0.7, "rewards": {"exact": -0.2, "format": 0.1}},
    {"rewards": 3e38},
    {"probabilities": np.array([0.2, 0.5, 0.3], np.float32), "confidence": 0.9},
    {"timestamp": NOW - 5000.0, "rewards": -2.0},
    {"timestamp": NOW + 5000.0},
    {"metadata": {"value": 0.25, "next_value": 0.5, "nested": [1, None]}},
    {"question": "what is it? «ü»\n\ud800", "answer": "a cat"},
    {"answer": ["a", 1, {"b": None}], "trajectory": {"states": np.arange(3), "raw": b"\0\1"}},
    {"tags": ("a", "b")},
    {"key": "k"},
    {"tags": ("a",), "key": "k", "image": b"png", "question": "q"},
]


def intake(scorer: Any = SCORERS[0], fusion: Any = None, **changed: Any) -> Intake:
    arguments: dict[str, Any] = {
        "v_dim": 8,
        "q_dim": 8,
        "metric": "cosine",
        "fusion": fusion or WeightedSum(FusionSettings()),
        "scorer": scorer,
        "max_experience_bytes": 1 << 20,
        "max_commit_bytes": 1 << 24,
        "representation": 3,
    }
    return Intake(**{**arguments, **changed})


def example(**given: Any) -> Experience:
    return Experience(**{"v_embed": V, "q_embed": Q, "timestamp": NOW, **given})


def content(draft: Draft) -> tuple[bytes, bytes, list[int], list[int]]:
    assert draft.rows is not None
    operation = draft.operation
    return bytes(operation.body), bytes(draft.rows), operation.lengths.tolist(), draft.content_crcs


@pytest.mark.parametrize("scorer", SCORERS, ids=lambda scorer: type(scorer).__name__)
@pytest.mark.parametrize("given", GIVEN, ids=lambda given: "-".join(given) or "plain")
def test_one_is_many_of_one(
    scorer: Any, given: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.time", lambda: NOW)
    made = intake(scorer)
    item = example(**given)
    assert content(made.one(item, None)) == content(made.many([item], None))
    assert content(made.one(item, 0.75)) == content(made.many([item], [0.75]))


@pytest.mark.parametrize("metric", ["cosine", "inner_product", "l2"])
@pytest.mark.parametrize("fusion", [WeightedSum, WeightedConcat])
@pytest.mark.parametrize("scale", [0.0, 1e-30, 1.0, 1e15])
def test_one_is_fused_as_many_are(metric: str, fusion: Any, scale: float) -> None:
    made = intake(fusion=fusion(FusionSettings(normalize_parts=False)), metric=metric)
    item = example(v_embed=V * np.float32(scale))
    assert content(made.one(item, 1.0)) == content(made.many([item], [1.0]))


@pytest.mark.parametrize("given", GIVEN, ids=lambda given: "-".join(given) or "plain")
def test_columns_say_what_objects_say(given: dict[str, Any], rng: np.random.Generator) -> None:
    items = [
        example(v_embed=rng.normal(size=8).astype(np.float32), **(given if i % 2 else {}))
        for i in range(5)
    ]
    columns = {
        name: np.stack([getattr(item, name) for item in items])
        if name.endswith("_embed")
        else [getattr(item, name) for item in items]
        for name in COLUMNS
    }
    priorities = [0.5] * 5  # ages differ by the time between both
    made = intake()
    as_columns, as_objects = made.columns(columns, priorities), made.many(items, priorities)
    assert as_columns.operation.body == as_objects.operation.body
    for one, other in zip(rows(as_columns), rows(as_objects), strict=True):
        assert same(told(one), told(other))


def told(fields: dict[str, Any]) -> dict[str, Any]:
    """Without what says as much as its absence."""
    return {k: x for k, x in fields.items() if not isinstance(x, str | list) or x}


def rows(draft: Draft) -> list[dict[str, Any]]:
    found, at = [], 0
    assert draft.rows is not None
    for length in draft.operation.lengths.tolist():
        found.append(dict(codec.decode_row(draft.rows[at : at + length]).fields))
        at += length
    return found


def same(a: Any, b: Any) -> bool:
    if isinstance(a, np.ndarray):
        return bool(np.array_equal(a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return bool(a == b)


def test_stamped_rows_are_intact() -> None:
    items = [example(question="x" * (7 * i % 100)) for i in range(50)]
    draft = intake().many(items, None)
    assert draft.rows is not None
    lengths = draft.operation.lengths
    first = (1 << 40) - 20  # ids of five and of six bytes
    seals = frames.stamp_rows(draft.rows, lengths, draft.content_crcs, first)
    at = 0
    for i, length in enumerate(lengths.tolist()):
        assert frames.check_row(draft.rows[at : at + length]) == (first + i, seals[i])
        at += length


def test_a_reward_beyond_float32_is_refused_one_by_one_and_together() -> None:
    for bad in (1e39, -1e39):
        with pytest.raises(InvalidExperience, match="rewards"):
            intake().one(example(rewards=bad), None)
        with pytest.raises(InvalidExperience, match="rewards"):
            intake().many([example(), example(rewards=bad)], None)


def test_what_is_too_large_is_refused_one_by_one_and_together() -> None:
    large = example(question="x" * 3000)
    for made in (intake(max_experience_bytes=2000), intake(max_commit_bytes=2000)):
        with pytest.raises(InvalidExperience, match="max_"):
            made.one(large, None)
        with pytest.raises(InvalidExperience, match="max_"):
            made.many([large], None)


def test_embeddings_of_another_layout_are_taken_as_they_are_meant() -> None:
    made = intake()
    plain = content(made.one(example(), 1.0))
    for value in (
        V.astype(np.float64),
        V.astype(">f4"),
        np.repeat(V, 2)[::2],
        V.tolist(),
        np.asfortranarray(V[None])[0],
        np.ma.masked_array(V),
    ):
        assert content(made.one(example(v_embed=value), 1.0)) == plain


def deep(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


@pytest.mark.parametrize(
    "given",
    [
        {"question": np.zeros(3)},
        {"question": 7},
        {"tags": np.zeros(3)},
        {"tags": np.int64(1)},
        {"tags": "word"},
        {"confidence": "x" * 1_000_000},
        {"confidence": 10**5000},
        {"rewards": deep(5000)},
        {"v_embed": [10**400] * 8},
        {"v_embed": np.ma.masked_array(V, V > 0)},
        {"v_embed": np.full(8, 3e38, np.float32), "q_embed": [1] * 7},
    ],
    ids=lambda given: "-".join(given),
)
def test_what_makes_no_sense_is_refused_in_a_short_message(given: dict[str, Any]) -> None:
    with pytest.raises(InvalidExperience) as caught:
        intake().one(example(**given), None)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("ids", [[[1, 2], [3]], deep(100), ["a"], [1.5], [2**70]])
def test_what_are_no_ids_is_refused(ids: Any) -> None:
    with pytest.raises(InvalidExperience):
        as_ids(ids)


@pytest.mark.parametrize("values", [[[1, 2], [3]], deep(100), [math.nan], [-1.0], [1e39], ["a"]])
def test_what_are_no_priorities_is_refused(values: Any) -> None:
    with pytest.raises(InvalidExperience):
        checked_priorities(values, len(values))


def test_plugins_cannot_change_what_they_are_given() -> None:
    """It may be the caller's, and it is stored."""

    class Scribbler(WeightedSum):
        def __call__(self, v: Any, q: Any) -> Any:
            refuses(v, q)
            return super().__call__(v, q)

    def scorer(batch: Any) -> Any:
        refuses(batch.confidence if len(batch) > 1 else None, *batch.probabilities)
        return np.ones(len(batch))

    refused = []

    def refuses(*arrays: Any) -> None:
        for array in arrays:
            if array is not None:
                with pytest.raises(ValueError, match="read-only"):
                    array[:] = 0
                refused.append(array)

    made = intake(scorer, Scribbler(FusionSettings()))
    p = np.array([0.5, 0.5], np.float32)
    v, q, many = V.copy(), Q.copy(), np.stack([V, V])
    made.one(Experience(v_embed=v, q_embed=q, probabilities=p), None)
    made.many([Experience(v_embed=v, q_embed=q, probabilities=p)] * 2, None)
    made.columns({"v_embed": many, "q_embed": many, "confidence": np.ones(2)}, None)
    made.query(v, q, None, rank=1)
    assert len(refused) == 3 + 5 + 3 + 2
    for array in (v, q, many, p):
        array += 0  # still the caller's to change


SINGLE = Experience(v_embed=V, q_embed=Q)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda n: None,
        lambda n: ["1"] * n,
        lambda n: np.ones(n) + 0j,
        lambda n: [[1], [1, 2]],
        lambda n: iter(range(n)),
        lambda n: np.array([10**400] * n, object),
        lambda n: np.ones((n, 1)),
        lambda n: np.ones(n + 1),
        lambda n: np.full(n, np.nan),
        lambda n: np.full(n, -1.0),
        lambda n: np.full(n, 1e300),
        lambda n: "x" * 1000,
    ],
)
@pytest.mark.parametrize("n", [1, 3])
def test_scores_that_are_none_name_the_scorer(wrong: Any, n: int) -> None:
    class Planted:
        def __call__(self, batch: Any) -> Any:
            return wrong(len(batch))

    made = intake(Planted(), names=("weighted_sum", "planted"))
    with pytest.raises(PluginContractError) as caught:
        made.one(SINGLE, None) if n == 1 else made.many([SINGLE] * n, None)
    message = str(caught.value)
    assert message.startswith("the priority scorer 'planted' (Planted) returned ")
    assert message.endswith(f"; expected {n} finite priorities, none below 0")
    assert len(message) < 300


class Planted:
    """A fusion that returns what it is told to."""

    version = 1

    def __init__(self, dim: Any, fused: Any = None) -> None:
        self.dim, self.fused = dim, fused

    def output_dim(self, v_dim: int, q_dim: int) -> Any:
        return self.dim() if callable(self.dim) else self.dim

    def __call__(self, v: Any, q: Any) -> Any:
        return self.fused(v, q)


@pytest.mark.parametrize("dim", [None, 16.0, 0, -3, True, "8", lambda: {}["x"]])
def test_a_dimension_that_is_none_names_the_fusion(dim: Any) -> None:
    with pytest.raises(PluginContractError, match=r"^the embedding fusion 'mine' \(Planted\) "):
        intake(fusion=Planted(dim), names=("mine", "weighted_sum"))
    assert intake(fusion=Planted(np.int64(8))).dim == 8


@pytest.mark.parametrize(
    "fused",
    [
        lambda v, q: None,
        lambda v, q: v[:, 1:],
        lambda v, q: v.astype(np.float64),
        lambda v, q: v.tolist(),
        lambda v, q: [[1.0], [1.0, 2.0]],
        lambda v, q: v * np.float32(np.nan),
    ],
)
@pytest.mark.parametrize("metric", ["cosine", "l2"])
def test_vectors_that_are_none_name_the_fusion(fused: Any, metric: str) -> None:
    made = intake(fusion=Planted(8, fused), names=("mine", "weighted_sum"), metric=metric)
    with pytest.raises(PluginContractError, match=r"^the embedding fusion 'mine' \(Planted\) ret"):
        made.one(SINGLE, 1.0)


@pytest.mark.parametrize("metric", ["cosine", "l2"])
def test_parts_that_are_too_large_are_told(metric: str) -> None:
    def product(v: Any, q: Any) -> Any:
        with np.errstate(over="ignore"):
            return v * q

    made = intake(fusion=Planted(8, product), metric=metric)
    large = np.full(8, 1e30, np.float32)
    with pytest.raises(InvalidExperience, match="its parts are too large"):
        made.one(Experience(v_embed=large, q_embed=large), 1.0)


@pytest.mark.parametrize("value", [1j, np.complex64(1j), np.complex128(0.5)])
def test_complex_numbers_are_none(value: Any) -> None:
    """Of numpy's, `float` keeps the real part, and only warns."""
    for given in ({"confidence": value}, {"rewards": value}, {"timestamp": value}):
        with pytest.raises(InvalidExperience, match="expected a number"):
            intake().accept(Experience(v_embed=V, q_embed=Q, **given), None)
    with pytest.raises(InvalidExperience, match="priority: expected a number"):
        intake().accept(Experience(v_embed=V, q_embed=Q), value)


@pytest.mark.parametrize("value", [np.array([1.0]), np.array([[True]])])
def test_arrays_of_one_number_are_none(value: Any) -> None:
    """As numpy has it from 2.4 on; before, it takes them with a mere warning."""
    with pytest.raises(InvalidExperience, match="confidence: expected a number"):
        intake().accept(Experience(v_embed=V, q_embed=Q, confidence=value), None)
    half = Experience(v_embed=V, q_embed=Q, confidence=np.array(0.5))  # type: ignore[arg-type]
    assert intake().accept(half, None).confidence == 0.5
