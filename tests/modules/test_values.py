"""Priorities, rewards and outcomes: what an experience turns out to be worth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from module_helpers import (
    OpenBuffer,
    Worker,
    add_all,
    contents,
    experience,
    find,
    unchanged,
)

from expbuf_core import (
    ExperienceBuffer,
    ReceiptExpired,
)
from expbuf_core.results import Receipt

# ---------------------------------------------------------------- updates


def test_update_priorities(buffer: ExperienceBuffer) -> None:
    ids = add_all(buffer, range(4))
    assert buffer.update_priorities(ids[:2], [0.5, 2.0]) == 2
    assert [buffer.get(i).priority for i in ids[:3]] == [0.5, 2.0, pytest.approx(0.2)]
    assert buffer.update_priorities([ids[0], ids[0]], [1.0, 3.0]) >= 1
    assert buffer.get(ids[0]).priority == 3.0
    buffer.remove([ids[3]])
    assert buffer.update_priorities(ids, np.ones(4)) == 3
    assert buffer.update_priorities([], []) == 0


def test_update_rewards_recomputes_the_priority(buffer: ExperienceBuffer) -> None:
    ids = add_all(buffer, range(3))
    before: Any = buffer.get(ids[0]).priority
    later: list[Any] = [1.0, {"right": 0.5, "brief": 0.25}]
    assert buffer.update_rewards(ids[:2], later) == 2
    assert buffer.get(ids[0]).total_reward == 1.0
    assert buffer.get(ids[0]).priority == pytest.approx(before + 0.4, abs=1e-4)
    assert buffer.get(ids[1]).rewards == {"right": 0.5, "brief": 0.25}
    assert buffer.get(ids[2]).total_reward is None
    assert buffer.update_rewards(ids[1], [2.0]) == 1
    assert buffer.get(ids[1]).total_reward == 2.0
    assert buffer.sample(8).total_reward.shape == (8,)
    buffer.remove([ids[0]])
    assert buffer.update_rewards(ids[:1], [1.0]) == 0


def test_rewards_as_an_array_are_those_of_a_list(buffer: ExperienceBuffer) -> None:
    ids = add_all(buffer, range(4))
    named: list[Any] = [{"right": 0.25}, {"right": 0.5}, 0.5, 0.75]
    assert buffer.update_rewards(ids, named) == 4
    twice = np.array([ids[0], ids[3], ids[0]])
    assert buffer.update_rewards(twice, np.array([9.0, 1.5, -2.0], np.float32)) == 2
    assert [buffer.get(i).rewards for i in ids] == [
        {"reward": -2.0},
        {"right": 0.5},
        {"reward": 0.5},
        {"reward": 1.5},
    ]
    mixed: list[Any] = [3.0, {"right": 4.0}, {"brief": 5.0}]
    buffer.update_rewards([ids[2], ids[2], ids[1]], mixed)
    assert [buffer.get(i).rewards for i in ids[1:3]] == [{"brief": 5.0}, {"right": 4.0}]


def test_rewards_are_scored_by_what_is_stored(open_buffer: OpenBuffer) -> None:
    """Probabilities and metadata of the payload, whatever else its texts say."""
    told = '"probabilities" and "metadata"'
    with open_buffer(priority="td_error") as buffer:
        ids = [
            buffer.add(experience(0, question=told)),
            buffer.add(experience(1, question=told, metadata={"value": 0.25, told: told})),
            buffer.add(experience(2, metadata={"value": 0.5})),
        ]
        assert buffer.update_rewards(ids, np.ones(3)) == 3
        assert [buffer.get(i).priority for i in ids[1:]] == [0.75, 0.5]
        assert buffer.get(ids[1]).question == told


def test_updates_survive_reopening_and_snapshots(open_buffer: OpenBuffer) -> None:
    with open_buffer() as buffer:
        ids = add_all(buffer, range(4))
        buffer.update_priorities(ids[:1], [7.0])
        later: list[Any] = [1.5, {"a": 1.0}]
        buffer.update_rewards(ids[1:3], later)
        buffer.record_outcome(ids[:2], success=True, credit=[0.5, 1.0])
        before = contents(buffer)
    with open_buffer() as buffer:
        assert contents(buffer) == before
        assert buffer.get(ids[2]).rewards == {"a": 1.0}
        buffer.save_snapshot()
    with open_buffer() as buffer:
        assert contents(buffer) == before
        assert buffer.get(ids[2]).rewards == {"a": 1.0}


# ---------------------------------------------------------------- outcomes


def test_a_receipt_counts_exactly_once(buffer: ExperienceBuffer) -> None:
    ids = add_all(buffer, range(6))
    result = find(buffer, 2, k=3)
    assert buffer.record_outcome(result.receipt, success=True) == 3
    lsn = buffer.lsn
    assert buffer.record_outcome(result.receipt, success=True) == 0
    assert buffer.record_outcome(str(result.receipt), success=False) == 0
    assert buffer.lsn == lsn
    for id_ in ids:
        counts = (buffer.get(id_).retrieval_count, buffer.get(id_).success_count)
        assert counts == ((1, 1.0) if id_ in result.ids else (0, 0.0))
    assert buffer.record_outcome(find(buffer, 2, k=3).receipt, success=False) == 3
    hit = find(buffer, 2, k=1)[0]
    assert (hit.retrieval_count, hit.success_count) == (2, 1.0)
    assert hit.success_rate == pytest.approx((1 + 0.5 * 2) / (2 + 2))


def test_the_text_form_of_a_receipt_does_the_same(buffer: ExperienceBuffer) -> None:
    add_all(buffer, range(3))
    receipt = find(buffer, 1, k=2).receipt
    text = str(receipt)
    assert Receipt.parse(text) == receipt
    assert buffer.record_outcome(text, success=True) == 2
    assert buffer.record_outcome(receipt, success=True) == 0


def test_a_receipt_counts_once_across_reopening(open_buffer: OpenBuffer) -> None:
    with open_buffer() as buffer:
        add_all(buffer, range(3))
        used, fresh = (str(find(buffer, 1, k=2).receipt) for _ in range(2))
        buffer.record_outcome(used, success=True)
    with open_buffer() as buffer:
        assert buffer.record_outcome(used, success=True) == 0
        buffer.save_snapshot()
    with open_buffer() as buffer:
        assert buffer.record_outcome(used, success=True) == 0
        assert buffer.record_outcome(fresh, success=True) == 2
        assert find(buffer, 1)[0].retrieval_count == 2


def test_a_receipt_counts_once_among_processes_that_die(
    open_buffer: OpenBuffer, folder: Path
) -> None:
    """Three processes record the same outcomes at the same time; one is killed at it."""
    buffer = open_buffer()
    ids = add_all(buffer, range(6))
    receipts = [find(buffer, i % 6, k=3).receipt for i in range(40)]
    texts = [str(receipt) for receipt in receipts]
    record = f"[buffer.record_outcome(text, success=True) for text in {texts!r}]"
    with Worker(folder) as one, Worker(folder) as two:
        doomed = Worker(folder)
        doomed.start(record)
        for worker in (one, two):
            worker.start(record)
        buffer.record_outcome(receipts[0], success=True)
        doomed.kill()
        counted = [sum(worker.result()) for worker in (one, two)]
        assert sum(counted) <= 40 * 3
        wanted = {id_: sum(id_ in receipt.ids for receipt in receipts) for id_ in ids}
        for look in (one, two):
            assert look("[e.retrieval_count for e in buffer]") == list(wanted.values())
    buffer.close()
    with open_buffer() as again:
        assert [again.record_outcome(text, success=True) for text in texts] == [0] * 40
        assert {e.id: e.retrieval_count for e in again} == wanted
        assert {e.id: e.success_count for e in again} == wanted


def test_processes_sample_by_each_others_updates(open_buffer: OpenBuffer, folder: Path) -> None:
    """A learner's priorities are seen by inference workers, and their outcomes by it."""
    buffer = open_buffer(sampling={"eps": 1e-6, "alpha": 1.0, "success_weight": 0.0})
    ids = add_all(buffer, range(6))
    settings = {"sampling": {"eps": 1e-6, "alpha": 1.0, "success_weight": 100.0}}
    with Worker(folder, settings) as other:
        for favourite in ids[:3]:
            buffer.update_priorities(ids, [1.0 if id_ == favourite else 0.0 for id_ in ids])
            assert set(other("buffer.sample(32).ids.tolist()")) == {favourite}
            other(f"buffer.update_priorities({ids}, [2.0 * (i == {ids[5]}) for i in {ids}])")
            assert set(buffer.sample(32).ids.tolist()) == {ids[5]}
        buffer.update_priorities(ids, [0.0] * 6)
        for _ in range(50):
            buffer.record_outcome([ids[4]], success=True)
        drawn = other("buffer.sample(256).ids.tolist()")
        assert drawn.count(ids[4]) > 256 * 40 / (40 + 5) * 0.9


def test_credit_by_similarity(buffer: ExperienceBuffer) -> None:
    add_all(buffer, range(6))
    found = find(buffer, 2, k=3)
    shares = found.credit()
    assert shares.dtype == np.float32
    np.testing.assert_allclose(shares, np.maximum(found.similarities, 0) / found.similarities[0])
    np.testing.assert_allclose(found.credit(2.0), shares**2, rtol=1e-6)
    assert buffer.record_outcome(found.receipt, success=True, credit=shares) == 3
    for hit, share in zip(found, shares.tolist(), strict=True):
        assert buffer.get(hit.id).success_count == pytest.approx(share)
    nothing = find(buffer, 2, k=3, where=lambda live: live.id < 0)
    assert nothing.credit().shape == (0,)


def test_credit_by_distance(open_buffer: OpenBuffer) -> None:
    buffer = open_buffer(embedding={"metric": "l2"})
    add_all(buffer, range(6))
    for found in (find(buffer, 2, k=4), find(buffer, 77, k=4)):
        shares = found.credit()
        assert shares[0] == 1.0
        assert (np.diff(shares) <= 0).all()
        assert ((shares >= 0) & (shares <= 1)).all()
    np.testing.assert_allclose(shares, found.similarities[0] / found.similarities, rtol=1e-6)


def test_ids_are_counted_at_every_call(buffer: ExperienceBuffer) -> None:
    ids = add_all(buffer, range(3))
    for _ in range(2):
        assert buffer.record_outcome(ids[:2], success=True) == 2
    assert buffer.record_outcome(np.array(ids[:1]), success=False) == 1
    assert buffer.get(ids[0]).retrieval_count == 3
    assert buffer.get(ids[0]).success_count == 2.0
    buffer.remove(ids[:1])
    assert buffer.record_outcome(ids, success=True) == 2


@pytest.mark.parametrize(
    ("credit", "wanted"),
    [
        (None, [1, 1, 1]),
        (0.25, [0.25] * 3),
        (1, [1, 1, 1]),
        (np.float32(0.5), [0.5] * 3),
        ([0.5, 0, 1], [0.5, 0, 1]),
        (np.array([0.5, 0.25, 0.75]), [0.5, 0.25, 0.75]),
        ("by id", [0, 0.75, 0]),
    ],
)
def test_credit(buffer: ExperienceBuffer, credit: Any, wanted: list[float]) -> None:
    ids = add_all(buffer, range(3))
    if isinstance(credit, str):
        credit = {ids[1]: 0.75}
    assert buffer.record_outcome(ids, success=True, credit=credit) == 3
    assert [buffer.get(i).success_count for i in ids] == wanted
    buffer.record_outcome(ids, success=False, credit=credit)
    assert [buffer.get(i).success_count for i in ids] == wanted
    assert [buffer.get(i).retrieval_count for i in ids] == [2, 2, 2]


def test_the_receipt_of_an_empty_result_counts_nothing(buffer: ExperienceBuffer) -> None:
    buffer.add(experience(1))
    buffer.clear()
    with unchanged(buffer):
        assert buffer.record_outcome(find(buffer, 1).receipt, success=True) == 0


def test_an_old_receipt_is_refused(open_buffer: OpenBuffer) -> None:
    buffer = open_buffer(receipts_kept=2)
    add_all(buffer, range(2))
    receipts = [find(buffer, 1).receipt for _ in range(4)]
    old = receipts[0]
    for receipt in receipts[1:]:
        buffer.record_outcome(receipt, success=True)
    for receipt in receipts[2:]:
        assert buffer.record_outcome(receipt, success=True) == 0
    with unchanged(buffer):
        for receipt in receipts[:2]:  # one that was forgotten, one that was never used
            with pytest.raises(ReceiptExpired, match="receipts_kept = 2"):
                buffer.record_outcome(receipt, success=True)
    assert old.lsn < buffer.lsn
