"""The built-in scorers, against the formulas they state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import ArrayLike, NDArray
from pydantic import ValidationError

from expbuf_core import Experience, ExperienceBuffer, InvalidExperience
from expbuf_core.builtin.scorers import (
    AbsoluteReward,
    AbsoluteRewardSettings,
    TDError,
    TDErrorSettings,
    WeightedSumScorer,
    WeightedSumSettings,
)
from expbuf_core.contracts import ScoringBatch


def batch(
    confidence: Sequence[float],
    reward: Sequence[float | None] | None = None,
    probabilities: Sequence[ArrayLike | None] | None = None,
    age: Sequence[float] | None = None,
) -> ScoringBatch:
    n = len(confidence)
    rewards = reward if reward is not None else [None] * n
    given = probabilities if probabilities is not None else [None] * n
    return ScoringBatch(
        confidence=np.array(confidence, np.float32),
        total_reward=np.array([r or 0 for r in rewards], np.float32),
        reward_known=np.array([r is not None for r in rewards]),
        probabilities=[None if p is None else np.asarray(p, np.float32) for p in given],
        age=np.array(age if age is not None else [0] * n, np.float32),
    )


def score(scored: ScoringBatch, **settings: Any) -> NDArray[np.floating[Any]]:
    return WeightedSumScorer(WeightedSumSettings(**settings))(scored)


def test_the_parts_have_the_stated_weights() -> None:
    found = score(batch([0.75], [-2.0], age=[86_400]))
    np.testing.assert_allclose(found, [0.4 * 0.25 + 0.4 * 2.0 + 0.2 * 0.5], rtol=1e-6)


def test_an_unknown_reward_counts_nothing() -> None:
    scored = batch([0.5, 0.5], [None, 0.0])
    scored.total_reward[0] = 9  # whatever stands there
    np.testing.assert_allclose(score(scored), [0.2, 0.2], rtol=1e-6)


def test_entropy_replaces_confidence_where_probabilities_are_given() -> None:
    uniform, certain, half = [0.25] * 4, [0, 1, 0], [0.5, 0.5, 0, 0]
    scored = batch([0.9, 0.9, 0.9, 0.9, 0.9], probabilities=[uniform, None, certain, half, [1.0]])
    found = score(scored, uncertainty_weight=1, reward_weight=0, age_weight=0)
    np.testing.assert_allclose(found, [1.0, 0.1, 0.0, 0.5, 0.0], atol=1e-6)


def test_probabilities_of_every_length_agree_with_the_definition() -> None:
    rng = np.random.default_rng(3)
    given = [rng.dirichlet(np.ones(n)) for n in rng.integers(2, 40, size=50)]
    expected = [-(p * np.log(p)).sum() / np.log(len(p)) for p in given]
    found = score(batch([0.0] * 50, probabilities=given), uncertainty_weight=1)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_age_lifts_and_a_clock_that_runs_behind_does_not_lower() -> None:
    ages = [0.0, 3600.0, 86_400.0, 1e9, -5000.0]
    found = score(batch([1.0] * 5, age=ages))
    np.testing.assert_allclose(found[[0, 2, 3, 4]], [0.0, 0.1, 0.2, 0.0], atol=1e-6)
    assert found[0] < found[1] < found[2]


def test_a_batch_is_scored_as_its_members_are() -> None:
    rng = np.random.default_rng(4)
    confidence = rng.random(20).tolist()
    reward = [None if i % 3 == 0 else float(r) for i, r in enumerate(rng.normal(size=20))]
    given = [rng.dirichlet(np.ones(5)) if i % 2 else None for i in range(20)]
    age = rng.exponential(1e5, size=20).tolist()
    together = score(batch(confidence, reward, given, age))
    singly = [
        score(batch([confidence[i]], [reward[i]], [given[i]], [age[i]]))[0] for i in range(20)
    ]
    np.testing.assert_allclose(together, singly, rtol=1e-6)


@pytest.mark.parametrize("scorer", [WeightedSumScorer, AbsoluteReward])
def test_priorities_are_finite_and_not_negative(scorer: Any) -> None:
    settings = WeightedSumSettings if scorer is WeightedSumScorer else AbsoluteRewardSettings
    made = scorer(settings(reward_scale=1e6))
    most = float(np.finfo(np.float32).max)
    rounded = np.array([0.5000001, 0.5000001], np.float32)  # entropy just beyond its bounds
    scored = batch(
        [0, 1, 1, 1], [most, -most, 0, None], [None, None, rounded, [1, 0]], [0, 1, 2, 3]
    )
    found = made(scored)
    assert found.shape == (4,)
    assert np.isfinite(found).all()
    assert (found >= 0).all()
    assert made(batch([])).shape == (0,)


@pytest.mark.parametrize("scorer", [WeightedSumScorer, AbsoluteReward])
def test_arguments_stay_as_they_are(scorer: Any) -> None:
    settings = WeightedSumSettings if scorer is WeightedSumScorer else AbsoluteRewardSettings
    scored = batch([0.5, 0.25], [1.0, None], [[0.5, 0.5], None], [5.0, 6.0])
    before = batch([0.5, 0.25], [1.0, None], [[0.5, 0.5], None], [5.0, 6.0])
    scorer(settings())(scored)
    np.testing.assert_array_equal(scored.confidence, before.confidence)
    np.testing.assert_array_equal(scored.total_reward, before.total_reward)
    np.testing.assert_array_equal(scored.age, before.age)
    assert scored.probabilities[0] is not None
    np.testing.assert_array_equal(scored.probabilities[0], [0.5, 0.5])


def test_absolute_reward() -> None:
    scorer = AbsoluteReward(AbsoluteRewardSettings(reward_scale=2, floor=0.5))
    found = scorer(batch([0, 0, 0], [1.5, -1.5, None]))
    np.testing.assert_allclose(found, [3.5, 3.5, 0.5])


def test_td_error() -> None:
    scorer = TDError(TDErrorSettings(discount=0.5, reward_scale=2, unknown=9))
    scored = replace(
        batch([0.25] * 6, [1.0, 1.0, 1.0, None, None, -1.0]),
        metadata=[
            None,  # one step: the confidence is what was expected
            {"value": 3.0, "next_value": 4.0},
            {"td_error": -0.125, "value": 3.0},
            {"value": 1.0},
            {"td_error": np.float32(7.5)},
            {"next_value": 1, "other": "x"},
        ],
    )
    np.testing.assert_allclose(scorer(scored), [1.75, 1.0, 0.125, 9, 7.5, 1.75])
    np.testing.assert_allclose(scorer(replace(scored, metadata=())), [1.75] * 3 + [9, 9, 2.25])
    huge = replace(batch([0.0], [1.0]), metadata=[{"td_error": -1e300}])
    assert np.isfinite(scorer(huge).astype(np.float32)).all()


@pytest.mark.parametrize("bad", ["1.0", True, float("nan"), float("inf"), [1.0, 2.0], 10**400])
@pytest.mark.parametrize("name", ["td_error", "value", "next_value"])
def test_a_td_error_of_what_is_no_number(name: str, bad: Any) -> None:
    scored = replace(batch([0.5, 0.5], [1.0, 1.0]), metadata=[None, {name: bad}])
    with pytest.raises(InvalidExperience, match=rf"metadata\['{name}'\]"):
        TDError(TDErrorSettings())(scored)


def test_td_errors_in_a_buffer() -> None:
    with ExperienceBuffer.open(priority="td_error", index={"backend": "exact"}) as buffer:
        one, columns = np.ones(4, np.float32), np.ones((3, 4), np.float32)
        ids = [
            buffer.add(Experience(v_embed=one, rewards=1.0, metadata={"value": 0.25})),
            *buffer.add_many([Experience(v_embed=one, confidence=0.5)]).tolist(),
            *buffer.add_many(
                {"v_embed": columns, "metadata": [{"td_error": 0.5}, None, {"value": 2.0}]}
            ).tolist(),
        ]
        assert [buffer.get(i).priority for i in ids] == [0.75, 1.0, 0.5, 1.0, 1.0]
        buffer.update_rewards(ids, [0.0] * 5)
        assert [buffer.get(i).priority for i in ids] == [0.25, 0.5, 0.5, 1.0, 2.0]
        with pytest.raises(InvalidExperience, match="td_error"):
            buffer.add(Experience(v_embed=one, metadata={"td_error": "much"}))
        assert len(buffer) == 5


@pytest.mark.parametrize(
    "bad", [{"reward_weight": -1}, {"reward_scale": 0}, {"age_weight": float("inf")}, {"p_age": 1}]
)
def test_settings_have_bounds(bad: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        WeightedSumSettings(**bad)
