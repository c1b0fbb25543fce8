import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expbuf_core.sum_tree import FAN_OUT, SumTree

# One to four levels, whole and broken rows.
CAPACITIES = [1, 2, 15, 16, 17, 255, 4096, 4097, 65_536, 65_537, 1_100_000]


def naive_find(weights, u):
    """The definition, on the leaves alone."""
    return np.cumsum(weights).searchsorted(u, side="right")


def assert_parents_are_sums(tree):
    for rows, parents in zip(tree._rows[:-1], tree._levels[1:], strict=True):
        expected = np.einsum("ij->i", rows)
        np.testing.assert_array_equal(parents[: len(rows)], expected)  # to the last bit
        assert not parents[len(rows) :].any()


@pytest.mark.parametrize("capacity", CAPACITIES)
def test_find_agrees_with_the_definition(capacity):
    rng = np.random.default_rng(capacity)
    # Whole numbers: every sum is exact, so the answers must be equal and not merely close.
    weights = rng.integers(0, 4, capacity).astype(float)
    weights[rng.integers(capacity)] = 1.0
    tree = SumTree(capacity)
    tree.rebuild(weights)
    assert tree.total == weights.sum()
    u = np.concatenate([rng.random(3000) * tree.total, np.arange(min(tree.total, 2000))])
    np.testing.assert_array_equal(tree.find(u), naive_find(weights, u))
    slots = rng.integers(0, capacity, 50)
    np.testing.assert_array_equal(tree.weights(slots), weights[slots])


@pytest.mark.parametrize("capacity", CAPACITIES)
def test_before_is_where_a_slot_begins(capacity):
    rng = np.random.default_rng(capacity)
    weights = rng.integers(1, 4, capacity).astype(float)
    tree = SumTree(capacity)
    tree.rebuild(weights)
    begins = np.cumsum(weights) - weights
    for slot in {0, capacity - 1, *rng.integers(0, capacity, 50).tolist()}:
        assert tree.before(slot) == begins[slot]
        assert tree.find([tree.before(slot)]).tolist() == [slot]


@pytest.mark.parametrize("capacity", CAPACITIES)
def test_updates_one_by_one_together_and_rebuilding_give_the_same_tree(capacity):
    rng = np.random.default_rng(7)
    n = min(capacity, 300)
    slots = rng.choice(capacity, n, replace=False)
    weights = rng.random(n) * 10.0 ** rng.integers(-9, 9, n)
    one_by_one, together, rebuilt = SumTree(capacity), SumTree(capacity), SumTree(capacity)
    for slot, weight in zip(slots.tolist(), weights.tolist(), strict=True):
        one_by_one.update(slot, weight)
    for part in np.array_split(np.arange(n), 5):
        together.update(slots[part], weights[part])
    full = np.zeros(capacity)
    full[slots] = weights
    rebuilt.rebuild(full)
    u = rng.random(500) * rebuilt.total
    for tree in (one_by_one, together):
        assert tree.total == rebuilt.total
        for level, expected in zip(tree._levels, rebuilt._levels, strict=True):
            np.testing.assert_array_equal(level, expected)
        np.testing.assert_array_equal(tree.find(u), rebuilt.find(u))


def test_of_a_slot_given_twice_the_last_weight_wins():
    for capacity in (100, 100_000):
        tree = SumTree(capacity)
        tree.update(np.array([3, 99, 3, 3]), np.array([5.0, 1.0, 7.0, 2.0]))
        assert tree.weights([3, 99]).tolist() == [2.0, 1.0]
        assert tree.total == 3.0
        tree.update([5, 5], 4.0)  # one weight for all
        assert tree.total == 7.0


def test_nothing_to_update():
    tree = SumTree(10)
    tree.update([], [])
    tree.rebuild([])
    assert tree.total == 0.0
    assert tree.weights([]).size == 0


def test_growing_keeps_the_weights():
    rng = np.random.default_rng(2)
    tree = SumTree(10)
    weights = rng.random(10)
    tree.rebuild(weights)
    for capacity in (10, 11, 5000, 200_000):
        tree.grow(capacity)
        assert_parents_are_sums(tree)
        np.testing.assert_array_equal(tree.weights(np.arange(10)), weights)
        tree.update(capacity - 1, 1.0)
        assert tree.find([tree.total]).tolist() == [capacity - 1]
        tree.update(capacity - 1, weights[9] if capacity == 10 else 0.0)
    with pytest.raises(ValueError, match="cannot shrink from 200000 to 5"):
        tree.grow(5)


def test_scaling_by_a_power_of_two_is_exact():
    rng = np.random.default_rng(3)
    tree = SumTree(100_000)
    weights = rng.random(100_000)
    tree.rebuild(weights)
    total = tree.total
    u = rng.random(1000)
    slots = tree.find(u * total)
    tree.scale(-300)
    assert tree.total == total * 2.0**-300
    np.testing.assert_array_equal(tree.find(u * tree.total), slots)
    tree.scale(300)
    assert tree.total == total
    tree.scale(-1060)  # into what cannot be represented exactly
    assert_parents_are_sums(tree)
    tree.find(u * tree.total)
    tree.scale(-100)
    assert tree.total == 0.0


@pytest.mark.parametrize("bad", [-1.0, -1e-300, np.nan, np.inf, -np.inf])
def test_bad_weights_change_nothing(bad):
    tree = SumTree(20)
    tree.rebuild(np.ones(20))
    with pytest.raises(ValueError, match="finite and not negative"):
        tree.update(3, bad)
    with pytest.raises(ValueError, match="finite and not negative"):
        tree.update([1, 2, 3], [4.0, bad, 5.0])
    with pytest.raises(ValueError, match="finite and not negative"):
        tree.rebuild([4.0, bad, 5.0])
    assert tree.total == 20.0
    assert tree.weights(np.arange(20)).tolist() == [1.0] * 20


@pytest.mark.parametrize("bad", [-1, 20, 31, 1 << 40])
def test_slots_out_of_bounds_change_nothing(bad):
    tree = SumTree(20)
    tree.rebuild(np.ones(20))
    with pytest.raises(IndexError):
        tree.update(bad, 2.0)
    with pytest.raises(IndexError):
        tree.update([1, bad], 2.0)
    assert tree.total == 20.0


def test_other_bad_arguments():
    with pytest.raises(ValueError, match="at least 1"):
        SumTree(0)
    with pytest.raises(ValueError, match="at most 3 weights"):
        SumTree(3).rebuild(np.ones(4))
    with pytest.raises(ValueError, match="all weights are 0"):
        SumTree(3).find([0.0])


# ---------------------------------------------------------------- what is never drawn


def extreme_points(tree):
    """Points where rounding may go wrong: both ends, and each boundary of leaves and its ulps."""
    sums = np.cumsum(tree._levels[0])
    points = [0.0, 5e-324, np.nextafter(tree.total, 0.0), tree.total, np.inf, -1.0]
    return np.concatenate([points, sums, np.nextafter(sums, 0.0), np.nextafter(sums, np.inf)])


@pytest.mark.parametrize("capacity", [1, 16, 17, 300, 4500, 70_000])
@pytest.mark.parametrize("live", ["first", "last", "middle", "few", "half", "most"])
def test_slots_of_weight_zero_are_never_found(capacity, live):
    rng = np.random.default_rng(capacity)
    mask = {
        "first": np.arange(capacity) == 0,
        "last": np.arange(capacity) == capacity - 1,
        "middle": np.arange(capacity) == capacity // 2,
        "few": rng.random(capacity) < 0.01,
        "half": rng.random(capacity) < 0.5,
        "most": rng.random(capacity) < 0.99,
    }[live]
    if not mask.any():
        mask[0] = True
    for spread in (0, 3, 18, 200):  # wide ranges make sums round hard
        weights = np.where(mask, 10.0 ** rng.uniform(-spread, spread, capacity), 0.0)
        tree = SumTree(capacity)
        tree.rebuild(weights)
        found = tree.find(np.concatenate([extreme_points(tree), rng.random(5000) * tree.total]))
        assert found.min() >= 0
        assert found.max() < capacity
        assert tree.weights(found).min() > 0.0


def test_the_guard_itself_lands_on_weights_above_zero():
    rng = np.random.default_rng(0)
    tree = SumTree(100_000)
    weights = np.where(rng.random(100_000) < 0.1, rng.random(100_000), 0.0)
    tree.rebuild(weights)
    for node in np.flatnonzero(tree._levels[-1])[:200].tolist():
        node_weight = float(tree._levels[-1][node])
        for rest in (0.0, node_weight * 0.5, np.nextafter(node_weight, 0), node_weight * 1.1):
            slot = tree._descend_carefully(node, rest)
            assert weights[slot] > 0.0
            assert slot >> (4 * (len(tree._levels) - 1)) == node


def test_the_smallest_weights_are_found():
    tree = SumTree(5000)
    tree.update([7, 4000], [5e-324, 5e-324])
    assert tree.find([0.0, 5e-324]).tolist() == [7, 4000]
    assert tree.total == 1e-323


# ---------------------------------------------------------------- drift


def drift(n_updates, capacity, seed):
    rng = np.random.default_rng(seed)
    tree = SumTree(capacity)
    leaves = np.zeros(capacity)
    for _ in range(n_updates // 1000):
        slots = rng.integers(0, capacity, 1000)
        weights = 10.0 ** rng.uniform(-12, 12, 1000)
        weights[rng.random(1000) < 0.1] = 0.0
        tree.update(slots, weights)
        leaves[slots] = weights
    np.testing.assert_array_equal(tree.weights(np.arange(capacity)), leaves)
    assert_parents_are_sums(tree)
    assert tree.total == pytest.approx(leaves.sum(), rel=1e-14)
    assert min(level.min() for level in tree._levels) >= 0.0
    # What remains when the large ones go is as exact: differences would leave rubbish here.
    small = np.where(leaves < 1e-6, leaves, 0.0)
    tree.update(np.flatnonzero(leaves >= 1e-6), 0.0)
    assert tree.total == pytest.approx(small.sum(), rel=1e-14)


def test_no_drift_after_a_million_updates():
    drift(1_000_000, 70_000, seed=5)


@pytest.mark.long
@pytest.mark.skipif(not os.environ.get("EXPBUF_LONG"), reason="runs for minutes: EXPBUF_LONG=1")
def test_no_drift_after_ten_million_updates():
    drift(10_000_000, 1_000_000, seed=6)


# ---------------------------------------------------------------- against a model

sizes = st.sampled_from([1, 5, 16, 40, 4097, 5000])
whole_weights = st.integers(0, 1000).map(float)


@st.composite
def histories(draw):
    first = capacity = draw(sizes)
    steps = []
    for _ in range(draw(st.integers(1, 12))):
        kind = draw(st.sampled_from(["one", "many", "grow", "rebuild", "scale"]))
        if kind == "one":
            steps.append((kind, draw(st.integers(0, capacity - 1)), draw(whole_weights)))
        elif kind == "many":
            n = draw(st.integers(0, 40))
            slots = draw(st.lists(st.integers(0, capacity - 1), min_size=n, max_size=n))
            weights = draw(st.lists(whole_weights, min_size=n, max_size=n))
            steps.append((kind, slots, weights))
        elif kind == "grow":
            capacity += draw(st.integers(0, 2 * FAN_OUT))
            steps.append((kind, capacity))
        elif kind == "rebuild":
            steps.append((kind, draw(st.lists(whole_weights, max_size=min(capacity, 40)))))
        else:
            steps.append((kind, draw(st.integers(-3, 3))))
    return first, steps


@settings(max_examples=150, deadline=None)
@given(histories(), st.lists(st.floats(0, 1), max_size=20))
def test_any_history_gives_what_a_plain_array_gives(history, fractions):
    capacity, steps = history
    tree, model = SumTree(capacity), np.zeros(capacity)
    for step in steps:
        if step[0] == "one":
            tree.update(step[1], step[2])
            model[step[1]] = step[2]
        elif step[0] == "many":
            tree.update(step[1], step[2])
            for slot, weight in zip(step[1], step[2], strict=True):
                model[slot] = weight
        elif step[0] == "grow":
            tree.grow(step[1])
            model = np.concatenate([model, np.zeros(step[1] - len(model))])
        elif step[0] == "rebuild":
            tree.rebuild(step[1])
            model[:] = 0.0
            model[: len(step[1])] = step[1]
        elif step[0] == "scale":
            tree.scale(step[1])
            model = model * 2.0 ** step[1]
        np.testing.assert_array_equal(tree.weights(np.arange(len(model))), model)
        assert tree.total == model.sum()
    if model.any():
        u = np.minimum(np.array(fractions) * tree.total, np.nextafter(tree.total, 0.0))
        np.testing.assert_array_equal(tree.find(u), naive_find(model, u))
