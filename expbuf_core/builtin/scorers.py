"""Scorers of initial priority."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field

from expbuf_core.contracts import ScoringBatch
from expbuf_core.errors import InvalidExperience
from expbuf_core.validation import Float


class WeightedSumSettings(BaseModel, extra="forbid", frozen=True):
    """Weights of the three parts of the initial priority."""

    uncertainty_weight: Float = Field(
        0.4, ge=0, le=1e6, description="Weight of P_uncertainty, in [0, 1]."
    )
    reward_weight: Float = Field(
        0.4, ge=0, le=1e6, description="Weight of P_reward, |total reward| scaled."
    )
    age_weight: Float = Field(
        0.2, ge=0, le=1e6, description="Weight of P_age, in [0, 1); 0 at insertion."
    )
    reward_scale: Float = Field(
        1.0, gt=0, le=1e6, description="P_reward = reward_scale · |total reward|."
    )
    age_half_life_s: Float = Field(
        86_400.0, gt=0, description="Age in seconds at which P_age is 1/2."
    )


class WeightedSumScorer:
    """Priority by uncertainty, reward and age.

    P_age = 1 − 2^(−age / age_half_life_s) rises with age: it lifts an experience whose reward came
    late above the new ones of equal worth, which have many draws still before them.
    """

    def __init__(self, settings: WeightedSumSettings) -> None:
        self.settings = settings

    def _calculate_initial_priority(self, batch: ScoringBatch) -> NDArray[np.float64]:
        s = self.settings
        priority = s.uncertainty_weight * _uncertainty(batch)
        priority += (s.reward_weight * s.reward_scale) * np.abs(_reward(batch))
        if s.age_weight and batch.age.any():
            age = np.maximum(batch.age, 0)  # clocks may disagree
            priority += s.age_weight * -np.expm1(age * (-np.log(2) / s.age_half_life_s))
        return priority

    __call__ = _calculate_initial_priority

    def one(
        self,
        *,
        confidence: float,
        total_reward: float,
        reward_known: bool,
        probabilities: NDArray[np.float32] | None,
        age: float,
        metadata: Mapping[str, Any] | None,
    ) -> float | None:
        """Of one experience; see `PriorityScorer`."""
        if probabilities is not None or age:
            return None
        s = self.settings
        score = s.uncertainty_weight * (1.0 - confidence)
        if reward_known:
            score += (s.reward_weight * s.reward_scale) * abs(total_reward)
        return score


class AbsoluteRewardSettings(BaseModel, extra="forbid", frozen=True):
    """Settings of `AbsoluteReward`."""

    reward_scale: Float = Field(
        1.0, gt=0, le=1e6, description="Priority for a total reward of 1 or −1."
    )
    floor: Float = Field(
        0.01, ge=0, le=1e6, description="Added to every priority, also without reward."
    )


class AbsoluteReward:
    """Priority by |total reward| alone: what went very well or very badly is replayed first."""

    def __init__(self, settings: AbsoluteRewardSettings) -> None:
        self._settings = settings

    def __call__(self, batch: ScoringBatch) -> NDArray[np.float64]:
        """Return (n,) priorities; see `PriorityScorer`."""
        return np.abs(_reward(batch)) * self._settings.reward_scale + self._settings.floor


class TDErrorSettings(BaseModel, extra="forbid", frozen=True):
    """Settings of `TDError`."""

    discount: Float = Field(
        0.99, ge=0, le=1, description="What the value of the next state is multiplied by."
    )
    reward_scale: Float = Field(
        1.0, gt=0, le=1e6, description="What the total reward is multiplied by."
    )
    unknown: Float = Field(
        1.0, ge=0, le=1e6, description="Priority as long as no TD error can be told."
    )


class TDError:
    """Priority by |TD error|, |reward_scale · reward + discount · next_value − value|.

    What an experience carries in `metadata` decides: `value` is what the agent expected of it and
    `next_value` what it expected afterwards (0 where it is absent, as at the end of an episode).
    Without a `value` it is the confidence, so that an answered question, an episode of one step,
    has the error |reward − confidence|. A reward that comes later counts.

    `td_error` is one that the agent computed itself; it is taken as it is, and stays. With neither
    that nor a known reward the priority is `unknown`.
    """

    def __init__(self, settings: TDErrorSettings) -> None:
        self._settings = settings

    def __call__(self, batch: ScoringBatch) -> NDArray[np.float64]:
        """Return (n,) priorities; see `PriorityScorer`.

        Raises:
            InvalidExperience: One of the three is no finite number.
        """
        s = self._settings
        value, following = batch.confidence.astype(np.float64), np.zeros(len(batch))
        given = np.full(len(batch), np.nan)
        for i, metadata in enumerate(batch.metadata):
            if metadata:
                for name, column in (("td_error", given), ("value", value)):
                    if metadata.get(name) is not None:
                        column[i] = _finite(metadata, name)
                if metadata.get("next_value") is not None:
                    following[i] = _finite(metadata, "next_value")
        error = np.abs(s.reward_scale * _reward(batch) + s.discount * following - value)
        error[np.logical_not(batch.reward_known)] = s.unknown
        error = np.where(np.isnan(given), error, np.abs(given))
        most: NDArray[np.float64] = np.minimum(error, np.finfo(np.float32).max)
        return most


def _finite(metadata: Mapping[str, Any], name: str) -> float:
    found = metadata[name]
    try:
        number = float(found)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if isinstance(found, str | bool) or not math.isfinite(number):
        raise InvalidExperience(f"metadata[{name!r}]: expected a finite number, found {found!r}")
    return number


def _reward(batch: ScoringBatch) -> NDArray[np.float64]:
    """(n,) total rewards; 0 where unknown. Wide, so that scaling cannot overflow."""
    reward: NDArray[np.float64] = batch.total_reward.astype(np.float64)
    reward[np.logical_not(batch.reward_known)] = 0
    return reward


def _uncertainty(batch: ScoringBatch) -> NDArray[np.float64]:
    """(n,) normalised entropy where probabilities are given, else 1 − confidence; in [0, 1]."""
    uncertainty = 1.0 - batch.confidence.astype(np.float64)
    rows = [i for i, p in enumerate(batch.probabilities) if p is not None]
    if rows:
        uncertainty[rows] = _normalised_entropy([batch.probabilities[i] for i in rows])
    return uncertainty


def _normalised_entropy(
    distributions: Sequence[NDArray[np.float32] | None],
) -> NDArray[np.float64]:
    """H(p) / log(classes) of each, in [0, 1]; one class alone is certain."""
    p = np.concatenate(distributions, dtype=np.float64)  # type: ignore[arg-type]
    classes = np.array([len(d) for d in distributions if d is not None])
    starts = np.concatenate(([0], np.cumsum(classes)[:-1]))
    # p · log p is 0 at 0, where the logarithm is not defined.
    entropy = -np.add.reduceat(p * np.log(np.where(p > 0, p, 1.0)), starts)
    normalised: NDArray[np.float64] = entropy / np.log(np.maximum(classes, 2))
    return normalised.clip(0.0, 1.0)
