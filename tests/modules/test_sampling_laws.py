"""What is drawn from a buffer on disk follows the stated law, whatever happened to it before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from module_helpers import OpenBuffer, Worker, columns
from numpy.typing import NDArray

from expbuf_core import ExperienceBuffer

SIZE = 120
DRAWS = 40_000
BETA = 0.7
AGEING = {"ageing": "adds", "half_life": 50.0}


def law(buffer: ExperienceBuffer) -> NDArray[np.float64]:
    """P(i) of the live experiences, oldest first, by the documented formula and nothing else."""
    s = buffer.config.sampling
    live = list(buffer)
    priority = np.array([one.priority for one in live], np.float64)
    tries = np.array([one.retrieval_count for one in live], np.float64)
    successes = np.array([one.success_count for one in live], np.float64)
    rate = (successes + s.success_prior * s.success_prior_count) / (tries + s.success_prior_count)
    factor = np.maximum(s.success_floor, 1 + s.success_weight * (rate - s.success_prior))
    weight = (priority + s.eps) ** s.alpha * factor
    if s.half_life is not None:  # ids are consecutive here, so they count the adds
        weight *= 2.0 ** ((buffer.ids() - buffer.ids()[-1]) / s.half_life)
    law: NDArray[np.float64] = weight / weight.sum()
    return law


def check(buffer: ExperienceBuffer) -> None:
    """Frequencies by a chi-squared test; probabilities and weights to the last digits."""
    ids, wanted = buffer.ids(), law(buffer)
    batch = buffer.sample(DRAWS, beta=BETA)
    at = np.searchsorted(ids, batch.ids)
    assert (ids[at] == batch.ids).all()
    np.testing.assert_allclose(batch.probabilities, wanted[at], rtol=1e-5)
    weights = (len(ids) * wanted[at]) ** -BETA
    np.testing.assert_allclose(batch.is_weights, weights / weights.max(), rtol=1e-5)
    # What is expected less than five times is taken together, as the test demands.
    expected, found = wanted * DRAWS, np.bincount(at, minlength=len(ids))
    rare = expected < 5
    expected = np.append(expected[~rare], expected[rare].sum())
    found = np.append(found[~rare], found[rare].sum())
    expected, found = expected[expected > 0], found[expected > 0]
    excess = ((found - expected) ** 2 / expected).sum() - (len(expected) - 1)
    assert abs(excess) < 5 * np.sqrt(2 * (len(expected) - 1)), "these are other frequencies"


def change(buffer: ExperienceBuffer, rng: np.random.Generator) -> None:
    """Adds that evict, updates and outcomes."""
    first = buffer.total_added
    buffer.add_many(columns(range(first, first + 30)), priorities=rng.random(30) ** 4)
    some = rng.choice(buffer.ids(), 40)
    buffer.update_priorities(some, rng.random(40) * 10 ** rng.uniform(-3, 3, 40))
    for success in (True, False):
        buffer.record_outcome(rng.choice(buffer.ids(), 20), success=success)


@pytest.mark.parametrize("ageing", [{}, AGEING], ids=["", "ageing"])
def test_draws_follow_the_law_after_everything(
    ageing: dict[str, Any], open_buffer: OpenBuffer, folder: Path
) -> None:
    settings: dict[str, Any] = {"max_size": SIZE, "sampling": {"stratified": False, **ageing}}
    rng = np.random.default_rng(0)
    buffer = open_buffer(seed=1, **settings)
    for _ in range(36):  # until the ring is at its beginning again
        change(buffer, rng)
    check(buffer)
    buffer.save_snapshot()  # whoever joins has a ring that begins with it
    with Worker(folder, settings) as other:
        stream = "__import__('numpy').random.default_rng(5)"
        theirs = f"[buffer.lsn, buffer.sample(64, rng={stream}).ids.tolist()]"
        for _ in range(3):  # the same batch from both
            change(buffer, rng)
            mine = buffer.sample(64, rng=np.random.default_rng(5)).ids.tolist()
            assert other(theirs) == [buffer.lsn, mine]
        other(f"buffer.update_priorities({buffer.ids()[:50].tolist()}, {[3.5] * 50})")
        check(buffer)
        buffer.save_snapshot()
        change(buffer, rng)
        before = law(buffer)
        buffer.close()
        other.kill()
    again = open_buffer(seed=2, **settings)
    np.testing.assert_array_equal(law(again), before)
    check(again)
    change(again, rng)
    check(again)
