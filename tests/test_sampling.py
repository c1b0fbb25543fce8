import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expbuf_core import codec
from expbuf_core.contracts import LoggedOperation
from expbuf_core.errors import ConfigError, NotEnoughExperiences
from expbuf_core.sampling import (
    PrioritySampler,
    SamplingSettings,
    importance_weights,
    restore_rng,
    rng_state,
    sampling_weights,
    success_rate,
)
from expbuf_core.state import State

PLAIN = SamplingSettings(alpha=1.0, eps=0.0, success_weight=0.0)  # the weight is the priority


def make_columns(n, *, capacity=1024, start=0, seed=0):
    """The columns of n experiences, the oldest in slot `start`; `at` finds them by their order."""
    rng = np.random.default_rng(seed)
    state = State()
    assert state.capacity == 1024
    while state.capacity < capacity:
        state._grow(2 * state.capacity)
    at = np.arange(start, start + n) & (state.capacity - 1)
    tries = rng.integers(0, 20, n)
    state.priority[at] = rng.random(n)
    state.retrieval_count[at] = tries
    state.success_count[at] = rng.binomial(tries, 0.6)
    state.live[at] = True
    state.timestamp[at] = 1.8e9 + np.arange(n)
    state.id[at] = state.sequence[at] = np.arange(n)
    state.head, state.tail, state.count, state.next_id = start, start + n, n, n
    state.settings = {"max_size": state.capacity, "receipts_kept": 10}
    return state


def drop(state, slots):
    state._drop(np.atleast_1d(slots))


def exact_probabilities(columns, config, reference=None):
    """From the definition, without the module's own code."""
    p = columns.priority.astype(np.float64)
    n, s = columns.retrieval_count.astype(np.float64), columns.success_count.astype(np.float64)
    rate = (s + config.success_prior * config.success_prior_count) / (
        n + config.success_prior_count
    )
    w = (p + config.eps) ** config.alpha
    w *= np.maximum(0.05, 1 + config.success_weight * (rate - config.success_prior))
    live = columns.live
    if config.ageing != "off":
        t = columns.sequence if config.ageing == "adds" else columns.timestamp
        w *= 2.0 ** np.minimum((t - t[live].max()) / config.half_life, 0.0)
    w[~live] = 0.0
    return w / w.sum()


def chi_squared_z(counts, probabilities):
    """Chi-squared statistic as a standard normal (Wilson and Hilferty 1931)."""
    drawn = probabilities > 0
    assert counts[~drawn].sum() == 0
    counts, expected = counts[drawn], counts.sum() * probabilities[drawn]
    rare = expected < 10  # too few draws for the approximation: counted as one
    if expected[rare].sum() >= 10:
        counts = np.append(counts[~rare], counts[rare].sum())
        expected = np.append(expected[~rare], expected[rare].sum())
    else:
        counts, expected = counts[~rare], expected[~rare]
    df = len(expected) - 1
    chi2 = ((counts - expected) ** 2 / expected).sum()
    return ((chi2 / df) ** (1 / 3) - (1 - 2 / (9 * df))) / np.sqrt(2 / (9 * df))


def assert_frequencies(
    sampler, probabilities, *, batches=400, batch_size=500, seed=1, draw=None, rtol=1e-9
):
    rng = np.random.default_rng(seed)
    counts = np.zeros(len(probabilities))
    draw = draw or sampler.draw
    for _ in range(batches):
        drawn = draw(batch_size, rng=rng, stratified=False)
        counts += np.bincount(drawn.slots, minlength=len(counts))
        np.testing.assert_allclose(drawn.probabilities, probabilities[drawn.slots], rtol=rtol)
    assert abs(chi_squared_z(counts, probabilities)) < 4  # seeded: passes always or never


# ---------------------------------------------------------------- the formula


def test_default_weights_are_as_documented():
    config = SamplingSettings()
    assert (config.alpha, config.beta, config.eps) == (0.6, 0.4, 1e-3)
    weight = sampling_weights([0.5], [8], [8.0], config)
    assert weight[0] == pytest.approx(0.501**0.6 * (1 + (8 + 1) / (8 + 2) - 0.5))


def test_success_rate_is_smoothed_by_the_prior():
    rates = success_rate([0, 2, 100, 0], [0, 0, 100, 0], 0.5, 2.0)
    np.testing.assert_allclose(rates, [0.5, 0.25, 101 / 102, 0.5])
    # Without a prior, what has no outcomes still has the prior's rate.
    np.testing.assert_allclose(success_rate([0, 4], [0, 1], 0.7, 0.0), [0.7, 0.25])


@pytest.mark.parametrize("prior", [0.0, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("success_weight", [0.0, 0.5, 1.0, 5.0])
def test_new_experiences_are_neither_favoured_nor_starved(prior, success_weight):
    config = SamplingSettings(success_prior=prior, success_weight=success_weight)
    new, right, wrong = sampling_weights([0.3] * 3, [0, 50, 50], [0.0, 50.0, 0.0], config)
    assert new == pytest.approx(0.301**0.6)
    assert wrong <= new <= right
    assert wrong >= config.success_floor * new * (1 - 1e-12)


@pytest.mark.parametrize("prior", [0.1, 0.3, 0.7])
def test_without_outcomes_the_factor_is_exactly_one(prior):
    """So that it may be left out where nothing has outcomes."""
    config = SamplingSettings(success_prior=prior, success_prior_count=3.0, success_weight=50.0)
    alone = sampling_weights([0.3], [0], [0.0], config)
    beside = sampling_weights([0.3, 0.3], [0, 9], [0.0, 1.0], config)
    assert alone[0] == beside[0] == pytest.approx(0.301**0.6, rel=1e-6)


@pytest.mark.parametrize("floor", [0.0, 0.05, 0.5, 1.0])
def test_the_floor_of_the_success_factor(floor):
    config = SamplingSettings(success_weight=10.0, success_floor=floor, eps=0.0, alpha=1.0)
    new, wrong, right = sampling_weights([2.0] * 3, [0, 98, 98], [0.0, 0.0, 98.0], config)
    assert (new, wrong) == (2.0, 2.0 * floor)
    assert right > new


def test_alpha_zero_ignores_priorities_and_eps_keeps_zero_alive():
    config = SamplingSettings(alpha=0.0, eps=0.0, success_weight=0.0)
    assert sampling_weights([0.0, 1.0, 9.0], [0] * 3, [0] * 3, config).tolist() == [1, 1, 1]
    config = SamplingSettings(alpha=1.0, eps=0.01, success_weight=0.0)
    np.testing.assert_allclose(sampling_weights([0.0, 1.0], [0] * 2, [0] * 2, config), [0.01, 1.01])


def test_ageing_by_whole_and_broken_half_lives_and_far_out():
    ages = np.array([0.0, -1.0, 0.5, 100.25, -1e6, -1e15])
    config = SamplingSettings(alpha=1.0, eps=0.0)
    weights = sampling_weights(np.full(6, 3.0), np.zeros(6), np.zeros(6), config, ages)
    np.testing.assert_allclose(weights, [3.0, 1.5, 3 * 2**0.5, 3 * 2**100.25, 0.0, 0.0])


def test_importance_weights_against_the_formula():
    rng = np.random.default_rng(0)
    p = rng.random(500) ** 4 + 1e-12
    for beta in (0.0, 0.4, 1.0):
        expected = (2000 * p) ** -beta
        weights = importance_weights(p, beta)
        assert weights.dtype == np.float32
        np.testing.assert_allclose(weights, expected / expected.max(), rtol=1e-6)
        assert weights.max() == 1.0
    assert importance_weights([1.0], 0.4).tolist() == [1.0]
    assert importance_weights([], 0.4).shape == (0,)
    extreme = importance_weights([1e-320, 1.0], 1.0)  # (N P)^-1 overflows
    assert extreme[0] == 1.0
    assert 0.0 < extreme[1] < 1e-30


# ---------------------------------------------------------------- frequencies


@pytest.mark.parametrize("start", [0, 37, 1000])  # 1000: the ring wraps around
@pytest.mark.parametrize("config", [PLAIN, SamplingSettings(), SamplingSettings(success_weight=3)])
def test_frequencies(config, start):
    columns = make_columns(280, start=start)
    drop(columns, (start + np.arange(5, 280, 7)) & 1023)
    sampler = PrioritySampler(columns, config)
    assert_frequencies(sampler, exact_probabilities(columns, config), batches=200)


def test_stratified_draws_have_the_same_probabilities_and_less_variance():
    columns = make_columns(200, start=950)
    sampler = PrioritySampler(columns, SamplingSettings())
    p = exact_probabilities(columns, SamplingSettings())
    rng = np.random.default_rng(4)
    batches = np.array(
        [np.bincount(sampler.draw(100, rng=rng).slots, minlength=1024) for _ in range(3000)]
    )
    # Each slot comes 100 p times a batch on average, and never far from it.
    live = p > 0
    assert not batches[:, ~live].any()
    error = (batches.mean(axis=0) - 100 * p)[live] / np.sqrt(100 * p[live] / 3000)
    assert np.abs(error).max() < 4
    assert np.abs(batches - 100 * p).max() < 2.0
    assert batches.var(axis=0).sum() < 0.7 * (100 * p).sum()
    ids = columns.id[sampler.draw(100, rng=rng).slots]
    assert (np.diff(ids) >= 0).all()  # the oldest first, also where the ring wraps around


class Constant:
    """Stands in for a random stream, and always says the same."""

    def __init__(self, value):
        self.value = value

    def random(self, n):
        return np.full(n, self.value)


@pytest.mark.parametrize("start", [0, 5, 1023])
def test_many_small_strata_reach_the_ends(start):
    columns = make_columns(3, start=start)
    columns.priority[(start + np.arange(3)) & 1023] = [1.0, 0.0, 1.0]
    sampler = PrioritySampler(columns, PLAIN)
    for value in (0.0, np.nextafter(1.0, 0.0)):
        for n in (1, 2, 3, 1000, 5000):
            drawn = sampler.draw(n, rng=Constant(value))
            assert set(columns.id[drawn.slots].tolist()) <= {0, 2}
            drawn = sampler.draw_where(columns.live, n, rng=Constant(value))
            assert set(columns.id[drawn.slots].tolist()) <= {0, 2}


@pytest.mark.parametrize("eps", [0.0, 1e-3])
def test_all_zero_priorities_sample_uniformly(eps):
    config = replace(PLAIN, eps=eps, alpha=0.6)
    columns = make_columns(70, start=1000)
    drop(columns, np.arange(1003, 1013))
    columns.priority[:] = 0.0
    sampler = PrioritySampler(columns, config)
    live = columns.live
    assert_frequencies(sampler, live / 60, batches=50)
    even = np.arange(1024) % 2 == 0

    def where(batch_size, **options):
        return sampler.draw_where(even, batch_size, **options)

    assert_frequencies(sampler, (live & even) / (live & even).sum(), batches=50, draw=where)
    drawn = sampler.draw_without_replacement(60, rng=np.random.default_rng(0))
    assert sorted(drawn.slots.tolist()) == np.flatnonzero(live).tolist()


def test_zero_priorities_among_others_are_never_drawn():
    columns = make_columns(1000)
    columns.priority[1:] = 0.0
    sampler = PrioritySampler(columns, PLAIN)
    drawn = sampler.draw(5000, rng=np.random.default_rng(0))
    assert not drawn.slots.any()
    assert (drawn.probabilities == 1.0).all()


def test_one_experience():
    columns = make_columns(1, start=9)
    for priority in (0.0, 0.7):
        columns.priority[9] = priority
        for config in (PLAIN, SamplingSettings()):
            sampler = PrioritySampler(columns, config)
            rng = np.random.default_rng(0)
            for drawn in (
                sampler.draw(4, rng=rng),
                sampler.uniform(4, rng=rng),
                sampler.draw_where(np.array([9]), 4, rng=rng),
            ):
                assert drawn.slots.tolist() == [9] * 4
                assert drawn.probabilities.tolist() == [1.0] * 4
            assert sampler.draw_without_replacement(1, rng=rng).slots.tolist() == [9]


def test_an_empty_buffer_and_bad_sizes():
    columns = make_columns(0)
    sampler = PrioritySampler(columns, SamplingSettings())
    rng = np.random.default_rng(0)
    for draw in (sampler.draw, sampler.uniform, sampler.draw_without_replacement):
        with pytest.raises(NotEnoughExperiences, match="empty"):
            draw(1, rng=rng)
    with pytest.raises(NotEnoughExperiences):
        sampler.draw_where(columns.live, 1, rng=rng)
    columns = make_columns(3)
    sampler.columns = columns
    sampler.mark_all()
    with pytest.raises(ValueError, match="at least 1"):
        sampler.draw(0, rng=rng)
    with pytest.raises(NotEnoughExperiences, match=r"4 different .* holds 3"):
        sampler.draw_without_replacement(4, rng=rng)
    with pytest.raises(NotEnoughExperiences, match="matches"):
        sampler.draw_where(np.array([7, 8]), 1, rng=rng)
    drop(columns, np.arange(3))  # emptied again
    sampler.mark(np.arange(3))
    with pytest.raises(NotEnoughExperiences):
        sampler.draw(1, rng=rng)


def test_uniform():
    columns = make_columns(70, start=1000)
    sampler = PrioritySampler(columns, SamplingSettings())

    def uniform(batch_size, *, rng, stratified):
        return sampler.uniform(batch_size, rng=rng)

    assert_frequencies(sampler, (columns.live) / 70, batches=50, draw=uniform)
    for slot, left in ((1005, 69), (2, 68)):
        drop(columns, slot)
        sampler.mark(slot)
        assert_frequencies(sampler, (columns.live) / left, batches=50, draw=uniform)


@pytest.mark.parametrize("as_mask", [True, False])
def test_draw_where_has_the_exact_conditional_probabilities(as_mask):
    config = SamplingSettings()
    columns = make_columns(250, start=900)
    mask = np.arange(1024) % 3 == 1
    p = np.where(mask, exact_probabilities(columns, config), 0.0)
    sampler = PrioritySampler(columns, config)
    matching = mask if as_mask else np.flatnonzero(mask)

    def where(batch_size, **options):
        return sampler.draw_where(matching, batch_size, **options)

    assert_frequencies(sampler, p / p.sum(), batches=100, draw=where)
    drawn = sampler.draw_where(matching, 4000, rng=np.random.default_rng(0), stratified=True)
    np.testing.assert_allclose(
        np.bincount(drawn.slots, minlength=1024) / 4000, p / p.sum(), atol=2 / 4000
    )


def test_where_without_replacement_has_the_exact_conditional_probabilities():
    columns = make_columns(9)
    columns.priority[:9] = np.arange(1, 10)
    sampler = PrioritySampler(columns, PLAIN)
    matching, rng = np.array([1, 4, 8]), np.random.default_rng(3)
    counts = {}
    for _ in range(4000):
        drawn = sampler.draw_where(matching, 2, rng=rng, replace=False)
        pair = tuple(drawn.slots.tolist())
        counts[pair] = counts.get(pair, 0) + 1
    p = dict(zip([1, 4, 8], np.array([2, 5, 9]) / 16, strict=True))
    np.testing.assert_allclose(drawn.probabilities, [p[i] for i in pair])
    pairs = [(i, j) for i in p for j in p if i != j]
    expected = np.array([p[i] * p[j] / (1 - p[i]) for i, j in pairs])
    observed = np.array([counts.get(pair, 0) for pair in pairs])
    assert observed.sum() == 4000
    assert abs(chi_squared_z(observed, expected)) < 4
    with pytest.raises(NotEnoughExperiences, match=r"4 different .* 3 match"):
        sampler.draw_where(matching, 4, rng=rng, replace=False)
    columns.priority[1] = 0.0
    sampler.mark(1)
    with pytest.raises(NotEnoughExperiences, match="only 2 have a sampling weight"):
        sampler.draw_where(matching, 3, rng=rng, replace=False)


@pytest.mark.parametrize("zero", [False, True])
def test_where_uniform(zero):
    columns = make_columns(30)
    if zero:
        columns.priority[:] = 0.0  # nothing to go by: uniform, asked for or not
    sampler = PrioritySampler(columns, PLAIN)
    mask = np.arange(columns.capacity) % 4 == 2
    p = (mask & columns.live) / (mask & columns.live).sum()

    def where(batch_size, *, rng, stratified):
        return sampler.draw_where(mask, batch_size, rng=rng, uniform=not zero)

    assert_frequencies(sampler, p, batches=50, draw=where)
    n = int((p > 0).sum())
    drawn = sampler.draw_where(
        mask, n, rng=np.random.default_rng(0), uniform=not zero, replace=False
    )
    assert sorted(drawn.slots.tolist()) == np.flatnonzero(p).tolist()


# ---------------------------------------------------------------- what happens to a replica


class Replica:
    """A real state with its sampler, driven by operations."""

    def __init__(self, config, max_size=300):
        self.state = State()
        self.sampler = PrioritySampler(self.state, config)
        self.apply(codec.encode_settings({"max_size": max_size, "receipts_kept": 10}))

    def apply(self, operation, n=0):
        change = self.state.apply(
            LoggedOperation(
                self.state.lsn + 1,
                operation.kind,
                self.state.next_id,
                operation.body,
                0,
                np.ones(n, np.uint32),
            )
        )
        self.sampler.mark(change.touched)

    def add(self, priorities, *, gap=0):
        n = len(priorities)
        self.state.next_id += gap
        body = codec.AddBody(
            timestamp=1.8e9 + np.arange(self.state.next_id, self.state.next_id + n, dtype=float),
            reward=np.full(n, np.nan),
            confidence=np.ones(n, np.float32),
            priority=np.asarray(priorities, np.float32),
            vectors=np.zeros((n, 1), np.float32),
            labels=None,
        )
        operation = codec.encode_clear()._replace(kind=codec.ADD, body=codec.encode_add(body))
        self.apply(operation, n)

    def set_priorities(self, ids, priorities):
        self.apply(codec.encode_priority(ids, np.asarray(priorities, np.float32)))

    def record_outcome(self, ids, success):
        credit = np.ones(len(ids), np.float32)
        self.apply(codec.encode_outcome(codec.OutcomeBody(b"\0" * 16, 0, success, ids, credit)))

    def remove(self, ids):
        self.apply(codec.encode_remove(ids))

    def reloaded(self):
        """A newcomer that starts from a snapshot: its ring lies elsewhere."""
        return PrioritySampler(State.load(*self.state.dump()), self.sampler.settings)


def assert_same_batches(one, other):
    for stratified in (True, False):
        a = one.draw(64, rng=np.random.default_rng(1), stratified=stratified)
        b = other.draw(64, rng=np.random.default_rng(1), stratified=stratified)
        np.testing.assert_array_equal(one.columns.id[a.slots], other.columns.id[b.slots])
        np.testing.assert_allclose(a.probabilities, b.probabilities, rtol=1e-9)
    a, b = (s.uniform(64, rng=np.random.default_rng(1)) for s in (one, other))
    np.testing.assert_array_equal(one.columns.id[a.slots], other.columns.id[b.slots])
    n = min(20, one.columns.count)
    a, b = (s.draw_without_replacement(n, rng=np.random.default_rng(1)) for s in (one, other))
    np.testing.assert_array_equal(one.columns.id[a.slots], other.columns.id[b.slots])
    a, b = (
        s.draw_where(s.columns.id % 2 == one.columns.id[a.slots[0]] % 2, 64, rng=rng)
        for s, rng in ((one, np.random.default_rng(1)), (other, np.random.default_rng(1)))
    )
    np.testing.assert_array_equal(one.columns.id[a.slots], other.columns.id[b.slots])


def test_frequencies_after_updates_evictions_removals_outcomes_and_recovery():
    rng = np.random.default_rng(3)
    config = SamplingSettings()
    replica = Replica(config, max_size=200)

    def check(sampler=replica.sampler):
        p = exact_probabilities(sampler.columns, config)
        assert_frequencies(sampler, p, batches=200, seed=5)

    replica.add(rng.random(150))
    check()
    replica.set_priorities(np.arange(20, 40), rng.random(20) * 5)
    replica.record_outcome(np.arange(10, 30), True)
    replica.record_outcome(np.arange(25, 60), False)
    check()
    for _ in range(100):  # one by one, and the oldest are evicted
        replica.add(rng.random(1))
        replica.sampler.draw(1, rng=rng)
    assert replica.state.id[replica.state.live_slots()].min() == 50
    check()
    replica.remove(np.arange(100, 130))
    check()
    replica.apply(codec.encode_settings({"max_size": 120, "receipts_kept": 10}))
    assert replica.state.count == 120
    check()
    check(replica.reloaded())
    replica.apply(codec.encode_clear())
    with pytest.raises(NotEnoughExperiences):
        replica.sampler.draw(1, rng=rng)
    replica.add(rng.random(10))
    check()


@pytest.mark.parametrize("ageing", ["off", "adds"])
def test_growth_and_compaction_of_the_ring_are_noticed(ageing):
    rng = np.random.default_rng(0)
    config = SamplingSettings(ageing=ageing, half_life=500.0)
    replica = Replica(config, max_size=3000)
    for step in range(400):
        replica.add(rng.random(int(rng.integers(1, 40))))
        if step % 3 == 0:  # leave holes, so that the ring is compacted now and then
            live = replica.state.live_ids()
            replica.remove(rng.choice(live, len(live) // 8, replace=False))
        if step % 7 == 0:
            drawn = replica.sampler.draw(50, rng=rng)
            p = exact_probabilities(replica.state, config)
            np.testing.assert_allclose(drawn.probabilities, p[drawn.slots], rtol=1e-9)
            assert_same_batches(replica.sampler, replica.reloaded())
    assert replica.state.moves > 5


operations = st.one_of(
    st.tuples(st.just("add"), st.integers(1, 90), st.sampled_from([0, 0, 0, 5, 4096])),
    st.tuples(st.just("remove"), st.integers(0, 2**32), st.integers(1, 60)),
    st.tuples(st.just("priority"), st.integers(0, 2**32), st.integers(1, 60)),
    st.tuples(st.just("outcome"), st.integers(0, 2**32), st.integers(1, 60)),
    st.tuples(st.just("max_size"), st.integers(1, 400), st.just(0)),
    st.tuples(st.just("clear"), st.just(0), st.just(0)),
    st.tuples(st.just("draw"), st.just(0), st.just(0)),
)


@settings(max_examples=150, deadline=None)
@given(
    ageing=st.sampled_from(["off", "adds", "time"]),
    half_life=st.sampled_from([0.1, 7.3, 1e4]),
    history=st.lists(operations, max_size=40),
)
def test_the_batch_depends_on_what_is_held_and_not_on_how_it_came_about(ageing, half_life, history):
    config = SamplingSettings(ageing=ageing, half_life=half_life)
    replica = Replica(config)
    state = replica.state
    for name, one, two in history:
        rng = np.random.default_rng(one)
        oldest = max(0, state.next_id - 400)
        if name == "add":
            replica.add(rng.random(one), gap=two)
        elif name == "draw":
            if state.count:
                replica.sampler.draw(5, rng=rng)
        elif name == "clear":
            replica.apply(codec.encode_clear())
        elif name == "max_size":
            replica.apply(codec.encode_settings({"max_size": one, "receipts_kept": 10}))
        else:
            ids = rng.integers(oldest, state.next_id + 1, two)
            if name == "remove":
                replica.remove(ids)
            elif name == "priority":
                replica.set_priorities(ids, rng.random(two) * 4)
            else:
                replica.record_outcome(ids, bool(one % 2))
    if not state.count:
        with pytest.raises(NotEnoughExperiences):
            replica.sampler.draw(1, rng=np.random.default_rng(0))
        return
    drawn = replica.sampler.draw(64, rng=np.random.default_rng(0))
    p = exact_probabilities(state, config)
    np.testing.assert_allclose(drawn.probabilities, p[drawn.slots], rtol=1e-5)
    assert_same_batches(replica.sampler, replica.reloaded())


# ---------------------------------------------------------------- without replacement


@pytest.mark.parametrize("weights", [[1.0, 2.0, 3.0, 4.0], [1e6, 1.0, 2.0, 3.0]])
def test_successive_draws_without_replacement(weights):
    columns = make_columns(4)
    columns.priority[:4] = weights
    sampler = PrioritySampler(columns, PLAIN)
    rng = np.random.default_rng(8)
    n = 6000
    counts = {}
    for _ in range(n):
        pair = tuple(sampler.draw_without_replacement(2, rng=rng).slots.tolist())
        counts[pair] = counts.get(pair, 0) + 1
    p = np.array(weights) / np.sum(weights)
    pairs = [(i, j) for i in range(4) for j in range(4) if i != j]
    expected = np.array([p[i] * p[j] / (1 - p[i]) for i, j in pairs])
    common = expected * n > 5  # with a heavy weight, some pairs are all but impossible
    observed = np.array([counts.get(pair, 0) for pair in pairs])
    assert observed[~common].sum() < 10
    assert abs(chi_squared_z(observed[common], expected[common] / expected[common].sum())) < 4


def test_without_replacement_when_a_few_weights_outweigh_all_others():
    columns = make_columns(5000, capacity=8192)
    columns.priority[:] = 1e-30
    columns.priority[:3] = 1e30
    sampler = PrioritySampler(columns, PLAIN)
    drawn = sampler.draw_without_replacement(2000, rng=np.random.default_rng(0))
    assert len(set(drawn.slots.tolist())) == 2000
    assert set(drawn.slots[:3].tolist()) == {0, 1, 2}
    everything = sampler.draw_without_replacement(5000, rng=np.random.default_rng(0))
    assert sorted(everything.slots.tolist()) == list(range(5000))


def test_without_replacement_counts_what_can_be_drawn():
    columns = make_columns(50)
    columns.priority[10:] = 0.0
    sampler = PrioritySampler(columns, PLAIN)
    rng = np.random.default_rng(0)
    assert sorted(sampler.draw_without_replacement(10, rng=rng).slots.tolist()) == list(range(10))
    with pytest.raises(NotEnoughExperiences, match="only 10 have a sampling weight"):
        sampler.draw_without_replacement(11, rng=rng)


# ---------------------------------------------------------------- ageing


@pytest.mark.parametrize("ageing", ["adds", "time"])
def test_frequencies_with_ageing(ageing):
    config = SamplingSettings(ageing=ageing, half_life=100.0)
    columns = make_columns(290, start=900)
    sampler = PrioritySampler(columns, config)
    # A timestamp in float64 is exact to 2.4e-7 s.
    assert_frequencies(sampler, exact_probabilities(columns, config), rtol=1e-8)


def test_ageing_never_overflows_and_needs_no_rebuilding():
    # 64 experiences at a time, 20,000 adds, a half-life of 3 adds: 2^6666 in all.
    config = SamplingSettings(ageing="adds", half_life=3.0)
    replica = Replica(config, max_size=64)
    rng = np.random.default_rng(0)
    rebuilds = []
    rebuild = replica.sampler._rebuild
    replica.sampler._rebuild = lambda: (rebuilds.append(1), rebuild())[1]
    for add in range(20_000):
        replica.add(rng.random(1))
        if add % 5 == 0:
            drawn = replica.sampler.draw(8, rng=rng)
            assert (add - replica.state.id[drawn.slots]).max() < 64
    assert len(rebuilds) == 1  # at the first draw
    drawn = replica.sampler.draw(5000, rng=rng)
    p = exact_probabilities(replica.state, config)
    np.testing.assert_allclose(drawn.probabilities, p[drawn.slots], rtol=1e-9)
    np.testing.assert_allclose(np.bincount(drawn.slots, minlength=1024) / 5000, p, atol=2 / 5000)


def test_after_the_newest_are_removed_the_old_ones_regain_their_precision():
    config = SamplingSettings(ageing="adds", half_life=1.0, success_weight=0.0)
    columns = make_columns(200)
    columns.sequence[100:200] += 10_000
    sampler = PrioritySampler(columns, config)
    rng = np.random.default_rng(0)
    assert sampler.draw(100, rng=rng).slots.min() >= 100
    for slot in range(100, 200):  # one by one: never a rebuild for their number
        drop(columns, slot)
        sampler.mark(slot)
        drawn = sampler.draw(10, rng=rng)
        assert columns.live[drawn.slots].all()
    p = exact_probabilities(columns, config)
    np.testing.assert_allclose(drawn.probabilities, p[drawn.slots], rtol=1e-9)
    # An emptied slot still holds its time, far ahead of the reference now.
    sampler.mark(150)
    sampler.draw(10, rng=rng)


def test_without_replacement_reaches_what_ageing_made_too_light_for_the_sum():
    config = SamplingSettings(ageing="adds", half_life=0.01, success_weight=0.0)
    columns = make_columns(100)
    columns.priority[:] = 0.5
    sampler = PrioritySampler(columns, config)
    drawn = sampler.draw_without_replacement(100, rng=np.random.default_rng(0))
    assert drawn.slots.tolist() == list(range(99, -1, -1))  # 2^100 between neighbours
    assert drawn.probabilities[0] == 1.0
    assert drawn.probabilities[-1] == 0.0
    assert importance_weights(drawn.probabilities, 0.5).min() > 0.0


def test_absurd_times_neither_overflow_nor_stop_the_draws():
    config = SamplingSettings(ageing="time", half_life=1e-3)
    columns = make_columns(10)
    columns.timestamp[:3] = [1e308, -1e308, 0.0]
    sampler = PrioritySampler(columns, config)
    assert set(sampler.draw(50, rng=np.random.default_rng(0)).slots.tolist()) == {0}
    drop(columns, 0)  # nothing is marked: it fell off the end
    sampler.mark(None)
    assert set(sampler.draw(50, rng=np.random.default_rng(0)).slots.tolist()) == {9}


def test_ageing_needs_a_half_life():
    for half_life in (None, 0.0, -1.0):
        with pytest.raises(ConfigError, match="half_life"):
            PrioritySampler(make_columns(2), SamplingSettings(ageing="adds", half_life=half_life))
    with pytest.raises(ConfigError, match="'off', 'adds' or 'time'"):
        PrioritySampler(make_columns(2), SamplingSettings(ageing="weekly", half_life=1.0))


# ---------------------------------------------------------------- random streams


@pytest.mark.parametrize("name", ["PCG64", "PCG64DXSM", "MT19937", "Philox", "SFC64"])
def test_a_saved_stream_goes_on_where_it_stood(name):
    rng = np.random.Generator(getattr(np.random, name)(5))
    rng.random(13)
    rng.integers(0, 9, 3, dtype=np.int32)  # leaves half a word behind
    state = json.loads(json.dumps(rng_state(rng)))
    restored = restore_rng(state)
    np.testing.assert_array_equal(restored.random(50), rng.random(50))
    np.testing.assert_array_equal(
        restored.integers(0, 9, 5, dtype=np.int32), rng.integers(0, 9, 5, dtype=np.int32)
    )

    def numbers(tree):
        if isinstance(tree, dict):
            tree = tree.values()
        if isinstance(tree, int):
            yield tree
        elif not isinstance(tree, str):
            for item in tree:
                yield from numbers(item)

    assert all(abs(number) <= 2**53 for number in numbers(state))


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"bit_generator": "default_rng"},
        {"bit_generator": ["PCG64"]},
        {"bit_generator": "PCG64"},
        {"bit_generator": "PCG64", "state": {"state": "0xzz", "inc": 1}},
        {"bit_generator": "PCG64", "state": {"state": -1, "inc": "0x1"}, "has_uint32": 0},
        {"bit_generator": "MT19937", "state": {"key": {"dtype": "O", "values": [1]}, "pos": 1}},
        "PCG64",
    ],
)
def test_a_damaged_stream_is_refused(state):
    with pytest.raises(ConfigError):
        restore_rng(state)
