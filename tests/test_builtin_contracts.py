"""The built-in scorers, fusions and index under the contracts that every plugin has to keep."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from expbuf_core.testing import FusionSuite, IndexSuite, ScorerSuite


class TestWeightedSumScorer(ScorerSuite):
    provider = "weighted_sum"


class TestWeightedSumScorerWithSettings(ScorerSuite):
    provider = "weighted_sum"
    settings = {"age_weight": 0, "reward_scale": 10, "age_half_life_s": 60}  # noqa: RUF012


class TestAbsoluteReward(ScorerSuite):
    provider = "absolute_reward"


class TestTDError(ScorerSuite):
    provider = "td_error"


class TestTDErrorWithMetadata(ScorerSuite):
    provider = "td_error"
    settings = {"discount": 0.9, "unknown": 3.0, "reward_scale": 0.1}  # noqa: RUF012
    metadata = (
        None,
        {"value": -2.5, "next_value": 4.0},
        {"td_error": -0.25},
        {},
        {"next_value": np.float32(1.5)},
    )


class TestWeightedSumFusion(FusionSuite):
    provider = "weighted_sum"


class TestBareSum(FusionSuite):
    provider = "weighted_sum"
    settings = {"normalize_parts": False}  # noqa: RUF012


class TestWeightedConcat(FusionSuite):
    provider = "weighted_concat"


class TestUnevenConcat(FusionSuite):
    provider = "weighted_concat"
    settings = {"visual_weight": 0.99, "question_weight": 0.01}  # noqa: RUF012


class TestExact(IndexSuite):
    provider = "exact"
    min_recall = 1.0


@pytest.mark.parametrize("suite", [ScorerSuite, FusionSuite])
def test_every_test_states_its_number(suite: type[Any]) -> None:
    for name, test in vars(suite).items():
        if name.startswith("test_"):
            assert test.__doc__.startswith(name.split("_")[1].upper()), name
