"""The contract suite of scorers is a test itself: scorers with one planted bug each fail it."""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from expbuf_core.contracts import NoSettings, ScorerProvider, ScoringBatch
from expbuf_core.testing import ScorerSuite
from expbuf_core.testing.scorer_suite import make_batch


class Sound:
    """No bug; what the planted ones begin with."""

    def __init__(self, settings: NoSettings) -> None:
        pass

    def __call__(self, batch: ScoringBatch) -> Any:
        return np.abs(batch.total_reward - batch.confidence) + np.exp2(-batch.age / 3600)


class TestSound(ScorerSuite):
    """A provider may be given as an object, without being installed."""

    provider = ScorerProvider("sound", api_version=1, factory=Sound)


class OneByOne(Sound):
    """No bug either."""

    def one(self, *, confidence: float, total_reward: float, age: float, **rest: Any) -> Any:
        return None if age else abs(total_reward - confidence) + 1.0


class TestOneByOne(ScorerSuite):
    provider = ScorerProvider("one_by_one", api_version=1, factory=OneByOne)


class Signed(Sound):
    def __call__(self, batch: ScoringBatch) -> Any:
        return batch.total_reward - batch.confidence


class AColumn(Sound):
    def __call__(self, batch: ScoringBatch) -> Any:
        return super().__call__(batch)[:, np.newaxis]


class OneForAll(Sound):
    def __call__(self, batch: ScoringBatch) -> Any:
        return super().__call__(batch).mean()


class Logarithmic(Sound):
    def __call__(self, batch: ScoringBatch) -> Any:
        with np.errstate(divide="ignore"):
            return np.abs(np.log(batch.confidence))


class EntropyWithoutCare(Sound):
    def __call__(self, batch: ScoringBatch) -> Any:
        scores = super().__call__(batch)
        with np.errstate(divide="ignore", invalid="ignore"):
            for i, p in enumerate(batch.probabilities):
                if p is not None:
                    scores[i] = max(-(p * np.log(p)).sum() / np.log(len(p)), 0)
        return scores


class TextForNumbers(Sound):
    def __call__(self, batch: ScoringBatch) -> Any:
        return super().__call__(batch).astype("U8")


class OutOfRange(Sound):
    def __call__(self, batch: ScoringBatch) -> Any:
        return super().__call__(batch).astype(np.float64) * 1e38


class RelativeToTheBatch(Sound):
    def __call__(self, batch: ScoringBatch) -> Any:
        scores = super().__call__(batch)
        return scores / scores.max()


class Sorted(Sound):
    def __call__(self, batch: ScoringBatch) -> Any:
        return np.sort(super().__call__(batch))


class Counts(Sound):
    calls = 0

    def __call__(self, batch: ScoringBatch) -> Any:
        Counts.calls += 1
        return super().__call__(batch) + Counts.calls


class WorksInPlace(Sound):
    def __call__(self, batch: ScoringBatch) -> Any:
        batch.total_reward[:] = np.abs(batch.total_reward)
        return super().__call__(batch)


class SmoothsProbabilities(Sound):
    def __call__(self, batch: ScoringBatch) -> Any:
        for p in batch.probabilities:
            if p is not None:
                p += 1e-3
        return super().__call__(batch)


class Remembers(Sound):
    def __init__(self, settings: NoSettings) -> None:
        self.seen: list[ScoringBatch] = []

    def __call__(self, batch: ScoringBatch) -> Any:
        self.seen.append(batch)
        return super().__call__(batch)


class Scratch(Sound):
    """Keeps the batch in itself while it works."""

    batch: Any = None

    def __call__(self, batch: ScoringBatch) -> Any:
        self.batch = batch
        time.sleep(1e-4)
        found = super().__call__(self.batch)
        self.batch = None
        return found


class LargeBatchesOnly(Sound):
    def __call__(self, batch: ScoringBatch) -> Any:
        if len(batch) == 1:
            return np.zeros(1)
        return super().__call__(batch)


class NeedsAReward(Sound):
    def __call__(self, batch: ScoringBatch) -> Any:
        if not batch.reward_known.any():
            raise ValueError("no reward")
        return super().__call__(batch)


class DividesByWhatIsKnown(Sound):
    def __call__(self, batch: ScoringBatch) -> Any:
        with np.errstate(divide="ignore", invalid="ignore"):
            return super().__call__(batch) / batch.reward_known.astype(np.float32)


class WantsOnlyNewOnes(Sound):
    def __call__(self, batch: ScoringBatch) -> Any:
        if len(batch) < 5 and batch.age.any():
            raise ValueError("not new")
        return super().__call__(batch)


class Loops(Sound):
    def __call__(self, batch: ScoringBatch) -> Any:
        one = super().__call__
        columns = (batch.confidence, batch.total_reward, batch.reward_known, batch.age)
        rows = [
            one(ScoringBatch(*(c[i : i + 1] for c in columns[:3]), [None], columns[3][i : i + 1]))
            for i in range(len(batch))
        ]
        return np.concatenate(rows)


class HoldsAFile(Sound):
    def __init__(self, settings: NoSettings) -> None:
        self.fd = os.open("/dev/null", os.O_RDONLY)

    def __del__(self) -> None:
        os.close(self.fd)


class StartsThreads(Sound):
    stop = threading.Event()

    def __init__(self, settings: NoSettings) -> None:
        threading.Thread(target=self.stop.wait, daemon=True).start()


class MarksMetadata(Sound):
    def __call__(self, batch: ScoringBatch) -> Any:
        for metadata in batch.metadata:
            if metadata is not None:
                metadata["seen"] = True  # type: ignore[index]
        return super().__call__(batch)


class MarksMetadataOneByOne(OneByOne):
    def one(self, *, metadata: Any, **rest: Any) -> Any:
        if metadata is not None:
            metadata["nested"] = None
        return super().one(**rest)


class IgnoresTheAge(OneByOne):
    def one(self, *, age: float, **rest: Any) -> Any:
        return super().one(age=0.0, **rest)


class AnArrayOfOne(OneByOne):
    def one(self, **given: Any) -> Any:
        return np.array([super().one(**given) or 0.0])


BUGS: list[tuple[type[Sound], str]] = [
    (Signed, "s1"),
    (AColumn, "s1"),
    (OneForAll, "s1"),
    (Logarithmic, "s1"),
    (EntropyWithoutCare, "s1"),
    (TextForNumbers, "s1"),
    (OutOfRange, "s1"),
    (RelativeToTheBatch, "s2"),
    (LargeBatchesOnly, "s2"),
    (Sorted, "s2"),
    (Counts, "s2"),
    (WorksInPlace, "s3"),
    (SmoothsProbabilities, "s3"),
    (MarksMetadata, "s3"),
    (MarksMetadataOneByOne, "s3"),
    (Remembers, "s3"),
    (Scratch, "s4"),
    (Counts, "s5"),
    (LargeBatchesOnly, "s5"),
    (NeedsAReward, "s6"),
    (DividesByWhatIsKnown, "s6"),
    (WantsOnlyNewOnes, "s6"),
    (Loops, "s7"),
    (HoldsAFile, "s8"),
    (StartsThreads, "s8"),
    (IgnoresTheAge, "s9"),
    (AnArrayOfOne, "s9"),
]


def suite_for(scorer: type[Sound]) -> ScorerSuite:
    class Planted(ScorerSuite):
        provider = ScorerProvider("planted", api_version=1, factory=scorer)
        limit_s = 0.1  # numpy needs 2 ms, a loop 300

    return Planted()


def calls(suite: Any, number: str) -> Iterator[Callable[[], None]]:
    """Every parametrized call of the tests with this number."""
    for name in dir(suite):
        if not name.startswith(f"test_{number}_"):
            continue
        test = getattr(suite, name)
        marks = [mark for mark in getattr(test, "pytestmark", []) if mark.name == "parametrize"]
        choices = [[(mark.args[0], value) for value in mark.args[1]] for mark in marks]
        for chosen in itertools.product(*choices):
            yield lambda test=test, chosen=chosen: test(**dict(chosen))  # type: ignore[misc]


@pytest.mark.parametrize(
    ("bug", "number"), BUGS, ids=lambda value: getattr(value, "__name__", value)
)
def test_the_suite_finds(bug: type[Sound], number: str) -> None:
    errors = []
    StartsThreads.stop.clear()
    try:
        for call in calls(suite_for(bug), number):
            try:
                call()
            except (Exception, pytest.fail.Exception) as exc:
                errors.append(exc)
    finally:
        StartsThreads.stop.set()
    assert errors, f"{number} passed although {bug.__name__}"


def test_every_behaviour_has_a_bug() -> None:
    numbers = {name.split("_")[1] for name in dir(ScorerSuite) if name.startswith("test_s")}
    assert numbers == {number for _, number in BUGS}
    assert numbers == {f"s{i}" for i in range(1, 10)}


def test_batches_are_what_the_contract_says() -> None:
    batch = make_batch(500)
    assert len(batch) == len(batch.probabilities) == 500
    assert {batch.confidence.dtype, batch.total_reward.dtype, batch.age.dtype} == {
        np.dtype(np.float32)
    }
    assert not batch.total_reward[~batch.reward_known].any()
    assert 0 < batch.reward_known.sum() < 500
    given = [p for p in batch.probabilities if p is not None]
    assert 0 < len(given) < 500
    assert all(p.dtype == np.float32 and abs(p.sum() - 1) < 1e-5 for p in given)
