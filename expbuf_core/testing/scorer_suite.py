"""The contract of `PriorityScorer` as tests; a plugin's test file is a subclass.

    from expbuf_core.testing import ScorerSuite

    class TestSurprise(ScorerSuite):
        provider = "surprise"

Every behaviour has a number, which stays for ever (`docs/plugins.md`).
"""

from __future__ import annotations

import copy
import gc
import os
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, ClassVar, cast

import numpy as np
import pytest
from numpy.typing import NDArray

from expbuf_core.buffer import ExperienceBuffer
from expbuf_core.contracts import PriorityScorer, ScorerProvider, ScoringBatch
from expbuf_core.experience import Experience
from expbuf_core.testing.processes import TIMEOUT_S, in_threads
from expbuf_core.testing.suite import Suite

Scores = NDArray[np.float32]


class ScorerSuite(Suite):
    """What every scorer of initial priority must do.

    Attributes:
        provider: The scorer's name, or its `ScorerProvider`.
        settings: Its section of the configuration.
        metadata: What the experiences of S1 to S4, S7 and S9 carry, in turn, for a scorer that
            looks at it. Default: something that means nothing to any.
        limit_s: S7: what 100,000 experiences may take.
    """

    kind = "priority"
    provider: ClassVar[str | ScorerProvider] = ""
    metadata: ClassVar[Sequence[Mapping[str, Any] | None]] = (
        {"source": "suite", "nested": {"parts": [1, 2]}},
        None,
        {},
    )
    limit_s: ClassVar[float] = 2.0

    @pytest.mark.parametrize("n", [1, 2, 33, 1000])
    def test_s1_one_priority_for_each(self, n: int) -> None:
        """S1: (n,) finite numbers, none below 0."""
        self.scores(self.batch(n))

    def test_s1_at_the_limits(self) -> None:
        """S1: so at the ends of every range: certain, impossible, enormous, new, ancient."""
        none, sure = None, np.array([0, 1, 0], np.float32)
        for reward in (0.0, 1e-38, -1e-38, 1.0, -1.0, 1e6, -1e6):
            for age in (0.0, 1e-3, 1e10):
                self.scores(
                    ScoringBatch(
                        confidence=np.array([0, 1, 0, 1, 0.5], np.float32),
                        total_reward=np.full(5, reward, np.float32),
                        reward_known=np.ones(5, np.bool_),
                        probabilities=[none, none, sure, np.ones(1, np.float32), sure],
                        age=np.full(5, age, np.float32),
                    )
                )

    @pytest.mark.parametrize("n", [2, 50])
    def test_s2_batch_equals_singles(self, n: int) -> None:
        """S2: a batch gives what its members give one by one, in whatever company and order."""
        batch = self.batch(n, seed=2)
        together = self.scores(batch)
        for i in range(n):
            alone = self.scores(pick(batch, [i]))[0]
            assert np.isclose(together[i], alone, rtol=1e-4, atol=1e-6), (
                f"{together[i]} among {n} experiences, {alone} alone"
            )
        backwards = self.scores(pick(batch, range(n)[::-1]))[::-1]
        assert np.allclose(together, backwards, rtol=1e-4, atol=1e-6), "the order matters"

    def test_s3_arguments_stay_as_they_are(self) -> None:
        """S3: nothing that it is given is changed, or need be writable."""
        scorer, batch = self.scorer(), self.batch(40)
        before = copy.deepcopy(batch)
        self.scores(batch)
        if (one := getattr(scorer, "one", None)) is not None:
            for i in range(len(batch)):
                _ask(one, batch, i)
        for field in fields(ScoringBatch):
            assert _same(getattr(batch, field.name), getattr(before, field.name)), (
                f"{field.name} was changed"
            )
        for array in _arrays(batch):
            array.flags.writeable = False
        self.scores(batch)

    def test_s3_keeps_nothing(self) -> None:
        """S3: nothing that it was given lives on in it."""
        scorer, batch = self.scorer(), self.batch(40)
        alive = [weakref.ref(array) for array in _arrays(batch)]
        scorer(batch)  # neither the batch nor a result that may be a view of it
        del batch
        gc.collect()
        assert not any(array() is not None for array in alive), "it keeps an argument"

    def test_s4_threads(self) -> None:
        """S4: several threads use one scorer at once, and get what one gets."""
        scorer = self.scorer()
        batches = [self.batch(n, seed=n) for n in (1, 2, 7, 30, 300)]
        expected = [self.scores(batch) for batch in batches]

        def work(first: int) -> None:
            for turn in range(60):
                which = (first + turn) % len(batches)
                found = np.asarray(scorer(batches[which]), np.float32)
                assert np.array_equal(found, expected[which]), (
                    f"a thread got something else for a batch of {len(batches[which])}"
                )

        in_threads(work)

    def test_s5_in_a_buffer(self) -> None:
        """S5, S1: a buffer takes the scores as they are, for single adds and for many."""
        draw = np.random.default_rng(3)
        with self.buffer() as buffer:
            single = buffer.add(_experience(draw, confidence=0.25, rewards={"r": 0.5}))
            ids = buffer.add_many([_experience(draw, confidence=c) for c in (0.0, 0.5, 1.0)])
            now = self.scores(
                ScoringBatch(
                    confidence=np.array([0.25, 0.0, 0.5, 1.0], np.float32),
                    total_reward=np.array([0.5, 0, 0, 0], np.float32),
                    reward_known=np.array([True, False, False, False]),
                    probabilities=[None] * 4,
                    age=np.zeros(4, np.float32),
                )
            )
            found = [buffer.get(int(id_)).priority for id_ in (single, *ids)]
            assert np.allclose(np.array(found, np.float64), now, rtol=1e-3, atol=1e-5), (
                f"the buffer holds {found}, the scorer says {now.tolist()}"
            )

    def test_s6_unknown_rewards(self) -> None:
        """S6: works without a known reward, with some, and with all."""
        for known in ([False], [True], [False, False], [False, True, False]):
            n = len(known)
            self.scores(
                ScoringBatch(
                    confidence=np.full(n, 0.5, np.float32),
                    total_reward=np.where(known, 1, 0).astype(np.float32),
                    reward_known=np.array(known),
                    probabilities=[None] * n,
                    age=np.zeros(n, np.float32),
                )
            )

    def test_s6_a_reward_that_comes_later(self) -> None:
        """S6: in a buffer, `update_rewards` scores again, with the age of then."""
        draw = np.random.default_rng(4)
        with self.buffer() as buffer:
            old = _experience(draw, confidence=0.5, timestamp=time.time() - 3600)
            ids = buffer.add_many([old, _experience(draw, confidence=0.5)])
            assert buffer.update_rewards(ids, [1.0, -1.0]) == 2
            found = [buffer.get(int(id_)).priority for id_ in ids]
            wanted = self.scores(
                ScoringBatch(
                    confidence=np.full(2, 0.5, np.float32),
                    total_reward=np.array([1, -1], np.float32),
                    reward_known=np.ones(2, np.bool_),
                    probabilities=[None, None],
                    age=np.array([3600, 0], np.float32),
                )
            )
            assert np.allclose(np.array(found, np.float64), wanted, rtol=1e-2, atol=1e-3)

    def test_s7_a_hundred_thousand(self) -> None:
        """S7: 100,000 at once within `limit_s`."""
        scorer, batch = self.scorer(), self.batch(100_000)
        taken = []
        for _ in range(3):  # the machine may be busy
            started = time.perf_counter()
            scorer(batch)
            taken.append(time.perf_counter() - started)
            if taken[-1] <= self.limit_s:
                return
        pytest.fail(f"100,000 experiences take {min(taken):.1f} s, {self.limit_s} s allowed")

    def test_s8_cheap_to_make(self) -> None:
        """S8: making and using many leaves no file open and no thread running."""
        batch = self.batch(3)
        self.scorer()(batch)  # what is imported only once
        files, threads = _open_files(), threading.active_count()
        started = time.perf_counter()
        scorers = [self.scorer() for _ in range(100)]
        assert time.perf_counter() - started < TIMEOUT_S / 6, "slow to make"
        for scorer in scorers:
            scorer(batch)
        assert _open_files() <= files, "it holds a file or a device"
        assert threading.active_count() <= threads, "it has started a thread"

    def test_s9_one_by_one(self) -> None:
        """S9: `one`, where there is such a method, says what a batch says, or None."""
        n = 200
        scorer, batch = self.scorer(), self.batch(n)
        one = getattr(scorer, "one", None)
        if one is None:
            pytest.skip("this scorer has no method `one`, which is optional")
        for age in (batch.age, np.zeros(n, np.float32)):
            batch = replace(batch, age=age)
            wanted = self.scores(batch)
            for i in range(n):
                found = _ask(one, batch, i)
                assert found is None or type(found) is float, f"`one` returned {found!r}"
                assert found is None or np.isclose(found, wanted[i], rtol=1e-6, atol=0), (
                    f"`one` says {found}, the batch {wanted[i]}"
                )

    # ------------------------------------------------------------ help

    def scorer(self) -> PriorityScorer:
        """Make the scorer under test."""
        return cast(PriorityScorer, self.make())

    def scores(self, batch: ScoringBatch) -> Scores:
        """What a scorer made anew says, checked (S1)."""
        found = np.asarray(self.scorer()(batch))
        assert found.shape == (len(batch),), f"shape {found.shape} for {len(batch)} experiences"
        assert found.dtype.kind in "fiu", f"priorities are {found.dtype}"
        with np.errstate(over="ignore"):
            found = found.astype(np.float32)
        assert np.isfinite(found).all(), f"not finite in float32: {found[~np.isfinite(found)][:3]}"
        assert (found >= 0).all(), f"below 0: {found[found < 0][:3]}"
        return cast(Scores, found)

    def batch(self, n: int, seed: int = 0) -> ScoringBatch:
        """So many experiences of all sorts."""
        return make_batch(n, seed, self.metadata)

    def buffer(self) -> ExperienceBuffer:
        """A buffer in memory that scores by it."""
        return ExperienceBuffer.open(plugins=self.plugins(), priority=self.choice(), index="exact")


def make_batch(
    n: int, seed: int = 0, metadata: Sequence[Mapping[str, Any] | None] = ()
) -> ScoringBatch:
    """Experiences of all sorts: with and without reward, probabilities, age, metadata."""
    draw = np.random.default_rng(seed)
    known = draw.random(n) < 0.6
    weights = draw.exponential(size=(n, 5)).astype(np.float32)
    weights /= weights.sum(axis=1, keepdims=True)
    classes = draw.integers(0, 5, n).tolist()
    return ScoringBatch(
        confidence=draw.random(n).astype(np.float32),
        total_reward=np.where(known, draw.normal(0, 3, n), 0).astype(np.float32),
        reward_known=known,
        probabilities=[row if count else None for row, count in zip(weights, classes, strict=True)],
        age=np.where(draw.random(n) < 0.5, 0, draw.exponential(1e5, n)).astype(np.float32),
        metadata=[copy.deepcopy(metadata[i % len(metadata)]) for i in range(n)] if metadata else (),
    )


def pick(batch: ScoringBatch, rows: Sequence[int]) -> ScoringBatch:
    """Some experiences of a batch, in this order."""
    chosen = list(rows)
    return ScoringBatch(
        confidence=batch.confidence[chosen],
        total_reward=batch.total_reward[chosen],
        reward_known=batch.reward_known[chosen],
        probabilities=[batch.probabilities[i] for i in chosen],
        age=batch.age[chosen],
        metadata=[batch.metadata[i] for i in chosen] if batch.metadata else (),
    )


def _experience(draw: np.random.Generator, **fields: Any) -> Experience:
    v, q = draw.standard_normal((2, 8), dtype=np.float32)
    return Experience(v_embed=v, q_embed=q, **fields)


def _ask(one: Callable[..., Any], batch: ScoringBatch, i: int) -> Any:
    """What the method `one` says of the i-th of a batch."""
    return one(
        confidence=float(batch.confidence[i]),
        total_reward=float(batch.total_reward[i]),
        reward_known=bool(batch.reward_known[i]),
        probabilities=batch.probabilities[i],
        age=float(batch.age[i]),
        metadata=batch.metadata[i] if batch.metadata else None,
    )


def _arrays(batch: ScoringBatch) -> list[NDArray[Any]]:
    columns = (batch.confidence, batch.total_reward, batch.reward_known, batch.age)
    return [*columns, *(p for p in batch.probabilities if p is not None)]


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and np.array_equal(a, b)
    return len(a) == len(b) and all(
        (x is None) == (y is None) and (x is None or np.array_equal(x, y))
        for x, y in zip(a, b, strict=True)
    )


def _open_files() -> int:
    gc.collect()
    try:
        return len(os.listdir("/proc/self/fd"))
    except FileNotFoundError:  # no such listing here
        return 0
