"""The columns of a replica against a plain model: operations, the ring, dump and load."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from expbuf_core import codec
from expbuf_core.codec import AddBody, OutcomeBody
from expbuf_core.contracts import LoggedOperation, LoggedRun, Operation
from expbuf_core.errors import CorruptionError, FormatVersionError
from expbuf_core.state import COLUMNS, Change, State

NO_ROWS = np.empty(0, np.uint32)


class Log:
    """Applies operations to a state, numbered as a log would."""

    def __init__(self, max_size: int = 8, receipts_kept: int = 4) -> None:
        self.state = State()
        self.lsn = 0
        self.next_id = 0
        self.sizes = {"max_size": max_size, "receipts_kept": receipts_kept}
        self.settings()

    def settings(self, **changes: int) -> Change:
        self.sizes |= changes
        return self.apply(codec.encode_settings({"metric": "cosine", **self.sizes}))

    def apply(self, operation: Operation, first_id: int = 0, lengths: Any = NO_ROWS) -> Change:
        self.lsn += 1
        return self.state.apply(
            LoggedOperation(
                self.lsn, operation.kind, first_id, operation.body, self.lsn << 32, lengths
            )
        )

    def add(
        self, n: int = 1, *, rewards: Any = None, tags: Any = None, keys: Any = None, gap: int = 0
    ) -> list[int]:
        """Ids of n new experiences whose columns follow from their ids."""
        first = self.next_id + gap
        ids = np.arange(first, first + n)
        labels = None
        if tags is not None or keys is not None:
            labels = {"tags": tags or [[]] * n, "keys": keys or [None] * n}
        body = codec.encode_add(
            AddBody(
                timestamp=ids.astype(np.float64),
                reward=np.full(n, np.nan) if rewards is None else np.asarray(rewards, float),
                confidence=np.full(n, 0.25, np.float32),
                priority=(ids + 1).astype(np.float32),
                vectors=np.full((n, 2), first, np.float32),
                labels=labels,
            )
        )
        lengths = np.arange(100, 100 + n, dtype=np.uint32)
        self.last = self.apply(Operation(codec.ADD, body, 0, b"", lengths, lengths), first, lengths)
        self.next_id = first + n
        return list(range(first, first + n))

    def relog(self, n: int, tags: Any) -> list[int]:
        """The same by the operation that a copy of a buffer consists of."""
        ids = np.arange(self.next_id, self.next_id + n)
        columns = {name: np.zeros(n, kind) for name, kind in codec.RELOG_COLUMNS.items()}
        columns |= {"id": ids, "sequence": ids}
        vectors = np.zeros((n, 2), np.float32)
        body = codec.encode_relog(codec.RelogBody(columns, vectors, {"tags": tags}))
        lengths = np.arange(100, 100 + n, dtype=np.uint32)
        self.apply(Operation(codec.RELOG, body, 0, b"", lengths, lengths), 0, lengths)
        self.next_id += n
        return ids.tolist()

    def live(self) -> list[int]:
        return [int(id_) for id_ in self.state.live_ids()]


def ids(*values: int) -> Any:
    return np.array(values, np.int64)


def outcome(receipt: bytes, lsn: int, *wanted: int, success: bool = True) -> Operation:
    credit = np.ones(len(wanted), np.float32)
    return codec.encode_outcome(OutcomeBody(receipt, lsn, success, ids(*wanted), credit))


# ---------------------------------------------------------------- single operations


def test_an_add_fills_every_column() -> None:
    log = Log()
    log.add(2)
    (third,) = log.add(1, rewards=[2.0])
    state = log.state
    slot = state.find_one(third)
    assert state.location[slot] == log.lsn << 32
    assert state.length[slot] == 100
    assert state.timestamp[slot] == 2
    assert state.reward[slot] == 2.0
    assert state.confidence[slot] == 0.25
    assert state.priority[slot] == 3.0
    assert state.sequence[slot] == 2
    assert (state.retrieval_count[slot], state.success_count[slot], state.flags[slot]) == (0, 0, 0)
    assert (state.count, state.total_added, state.next_id, state.lsn) == (3, 3, 3, log.lsn)
    assert np.isnan(state.reward[state.find_one(0)])


def test_rows_of_a_batch_lie_one_behind_the_other() -> None:
    log = Log()
    log.add(4)
    at = log.state.find(ids(0, 1, 2, 3))
    assert log.state.location[at].tolist() == [(log.lsn << 32) + x for x in (0, 100, 201, 303)]
    assert log.state.length[at].tolist() == [100, 101, 102, 103]


def test_what_an_add_says_it_did() -> None:
    log = Log(max_size=3)
    log.add(2)
    assert (log.last.applied, log.last.evicted, log.last.removed) == (2, 0, None)
    log.add(2)
    assert log.last.removed is not None
    assert log.last.removed.tolist() == [0]
    assert log.last.evicted == 1
    log.add(5)  # more than there is room for: its own first ones go, too
    assert log.last.removed is not None
    assert log.last.removed.tolist() == [1, 2, 3, 4, 5]
    assert log.live() == [6, 7, 8]
    assert log.state.find_one(5) == -1


@pytest.mark.parametrize("n", [1, 3])
def test_tags_of_one_and_of_several(n: int) -> None:
    log = Log(max_size=20)
    log.add(n, tags=[["a", "b"]] * n)
    log.add(n, tags=[["c"]] * n, keys=[f"k{i}" for i in range(n)])
    log.add(n)
    state = log.state
    sets = [state.tag_sets[state.tags[slot]] for slot in state.live_slots()]
    assert sets == [("a", "b")] * n + [("c",)] * n + [()] * n


def tags_of(state: State) -> dict[int, tuple[str, ...]]:
    """By id."""
    slots = state.live_slots()
    numbers = state.tags[slots].tolist()
    return {
        id_: state.tag_sets[number]
        for id_, number in zip(state.id[slots].tolist(), numbers, strict=True)
    }


@pytest.mark.parametrize("by", ["add", "relog"])
def test_tags_of_what_is_gone_are_forgotten(by: str) -> None:
    log = Log(max_size=100)
    added: dict[int, tuple[str, ...]] = {}
    for n in range(60):
        tags = [["common"], [], *([f"{n}-{i}", "common"] for i in range(78))]
        new = log.add(80, tags=tags) if by == "add" else log.relog(80, tags)
        added |= {id_: tuple(each) for id_, each in zip(new, tags, strict=True)}
        log.apply(codec.encode_remove(ids(*new[10:30])))
        state = log.state
        assert len(state.tag_sets) <= 2 * state.count + 1024 + 80
        assert tags_of(state) == {id_: added[id_] for id_ in log.live()}
    log.add(1, tags=[["common"]])
    assert log.state.tag_sets.count(("common",)) == 1


def test_many_sets_of_tags_in_use_are_seldom_looked_through(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    log = Log(max_size=5000)
    passes = 0

    def live_slots(state: State) -> Any:
        nonlocal passes
        passes += 1
        return live(state)

    live = State.live_slots
    log.add(5000, tags=[[f"first {i}"] for i in range(5000)])
    monkeypatch.setattr(State, "live_slots", live_slots)
    for n in range(200):
        log.add(100, tags=[[f"{n}-{i}"] for i in range(100)])
    assert 2 <= passes <= 4


def test_remove_skips_what_is_gone_and_counts_the_rest() -> None:
    log = Log()
    log.add(5)
    change = log.apply(codec.encode_remove(ids(1, 1, 3, 77)))
    assert change.applied == 2
    assert change.removed is not None
    assert change.removed.tolist() == [1, 3]
    assert log.live() == [0, 2, 4]
    assert log.apply(codec.encode_remove(ids(1, 3))).applied == 0
    assert log.live() == [0, 2, 4]


def test_of_a_priority_that_is_given_twice_the_last_counts() -> None:
    log = Log()
    log.add(3)
    log.apply(codec.encode_priority(ids(1, 2, 1), np.array([5, 6, 7], np.float32)))
    assert log.state.priority[log.state.find(ids(0, 1, 2))].tolist() == [1, 7, 6]


def test_rewards_and_their_components() -> None:
    log = Log()
    log.add(3, rewards=[1.0, 2.0, 3.0])
    values, priorities = np.array([0.5, -1.0]), np.array([8, 9], np.float32)
    named = {"0": {"a": 0.25, "b": 0.25}}
    log.apply(codec.encode_reward(ids(0, 1), values, priorities, named))
    at = log.state.find(ids(0, 1, 2))
    assert log.state.reward[at].tolist() == [0.5, -1.0, 3.0]
    assert log.state.priority[at].tolist() == [8, 9, 3]
    assert log.state.rewards == {0: {"a": 0.25, "b": 0.25}}
    assert log.state.flags[at].tolist() == [0, 1, 0]
    log.apply(codec.encode_remove(ids(0)))
    assert log.state.rewards == {}


def test_a_receipt_counts_once_and_old_ones_never() -> None:
    log = Log(receipts_kept=2)
    log.add(2)
    tokens = [bytes([i]) * 16 for i in range(1, 6)]
    made_at = log.lsn
    for token in tokens[:3]:
        assert log.apply(outcome(token, made_at, 0, 1)).applied == 2
    assert log.apply(outcome(tokens[2], made_at, 0, 1)).applied == 0  # a repeat
    assert log.apply(outcome(tokens[0], made_at, 0, 1)).applied == 0  # forgotten: too old to tell
    assert log.apply(outcome(tokens[3], made_at, 0, 1)).applied == 0  # new, as old as that
    assert log.apply(outcome(tokens[4], log.lsn, 0)).applied == 1
    assert log.state.retrieval_count[log.state.find(ids(0, 1))].tolist() == [4, 3]
    assert len(log.state.receipts) == 2


def test_outcomes_without_a_receipt_count_every_time() -> None:
    log = Log()
    log.add(2)
    for success in (True, False, True):
        log.apply(outcome(bytes(16), 0, 0, 0, 1, success=success))
    at = log.state.find(ids(0, 1))
    assert log.state.retrieval_count[at].tolist() == [6, 3]
    assert log.state.success_count[at].tolist() == [4, 2]
    assert not log.state.receipts


def test_clear_empties_and_goes_on() -> None:
    log = Log()
    log.add(5)
    change = log.apply(codec.encode_clear())
    assert (change.applied, change.cleared) == (5, True)
    assert log.live() == []
    assert log.add(2) == [5, 6]
    assert log.live() == [5, 6]


def test_a_smaller_size_evicts() -> None:
    log = Log(max_size=8)
    log.add(8)
    change = log.settings(max_size=3)
    assert change.settings
    assert change.evicted == 5
    assert log.live() == [5, 6, 7]
    assert log.settings(max_size=10).evicted == 0


def test_dimensions_that_are_decided_stay_decided() -> None:
    """Two processes may set something at once, one of them without having seen the first add."""
    log = Log()
    log.apply(codec.encode_settings({**log.sizes, "metric": "l2", "v_dim": None, "q_dim": None}))
    log.apply(codec.encode_settings({**log.sizes, "metric": "l2", "v_dim": 4, "q_dim": 0}))
    sizes = {**log.sizes, "max_size": 5}
    log.apply(codec.encode_settings({**sizes, "metric": "l2", "v_dim": None, "q_dim": None}))
    settings = log.state.settings
    assert (settings["v_dim"], settings["q_dim"], settings["max_size"]) == (4, 0, 5)


def test_settings_that_have_not_seen_an_add_do_nothing() -> None:
    log = Log()
    log.add(3)

    def change(max_size: int, seen: int) -> bool:
        wanted = {"metric": "cosine", **log.sizes, "max_size": max_size, "if_next_id": seen}
        return log.apply(codec.encode_settings(wanted)).settings

    assert not change(9, seen=2)
    assert log.state.settings["max_size"] == 8
    assert change(9, seen=3)
    assert change(10, seen=5), "what it has seen is lost, as a repair may find it"
    assert log.state.settings["max_size"] == 10
    assert "if_next_id" not in log.state.settings


def test_reservations_are_remembered() -> None:
    log = Log()
    log.apply(codec.encode_reserve(500, 700))
    assert (log.state.reserved_id, log.state.reserved_lsn) == (500, 700)


# ---------------------------------------------------------------- what makes no sense


def test_an_unknown_kind_is_a_newer_versions() -> None:
    log = Log()
    with pytest.raises(FormatVersionError, match="kind 99"):
        log.apply(Operation(99, b"", 0, b"", NO_ROWS, NO_ROWS))


@pytest.mark.parametrize(
    "kind", [codec.ADD, codec.REMOVE, codec.PRIORITY, codec.REWARD, codec.OUTCOME, codec.SETTINGS]
)
@pytest.mark.parametrize("body", [b"", b"\xff" * 7, b"\xff" * 64, b"[]", b"{", b"[" * 100_000])
def test_a_body_without_sense_is_corruption(kind: int, body: bytes) -> None:
    """Its checksum fits, so nothing but the decoder can notice."""
    log = Log()
    log.add(3)
    before = (log.live(), log.state.settings)
    lengths = np.full(1, 10, np.uint32) if kind == codec.ADD else NO_ROWS
    with pytest.raises(CorruptionError, match=f"operation {log.lsn + 1} "):
        log.apply(Operation(kind, body, 0, b"", lengths, lengths), 3, lengths)
    assert (log.live(), log.state.settings) == before


def test_ids_never_come_again() -> None:
    log = Log()
    log.add(3)
    log.next_id = 2
    with pytest.raises(CorruptionError, match="issued before"):
        log.add(1)


def test_an_add_needs_a_payload_for_each() -> None:
    log = Log()
    wide, narrow = np.zeros(2), np.zeros(2, np.float32)
    vectors = np.zeros((2, 2), np.float32)
    body = codec.encode_add(AddBody(wide, wide, narrow, narrow, vectors, None))
    with pytest.raises(CorruptionError, match="2 experiences with 0 payloads"):
        log.apply(Operation(codec.ADD, body, 0, b"", NO_ROWS, NO_ROWS))


# ---------------------------------------------------------------- the ring


def test_the_ring_stays_small() -> None:
    """FIFO for ever, with removals in the middle: the columns do not grow."""
    log = Log(max_size=500)
    rng = np.random.default_rng(3)
    for _ in range(800):
        log.add(int(rng.integers(1, 60)))
        if rng.random() < 0.5:
            live = log.state.live_ids()
            log.apply(codec.encode_remove(rng.choice(live, len(live) // 3, replace=False)))
    assert log.state.capacity <= 2048
    assert log.state.count <= 500
    live = log.state.live_ids()
    assert (np.diff(live) > 0).all()
    assert (log.state.id[log.state.find(live)] == live).all()


def test_growth_keeps_order_and_values() -> None:
    log = Log(max_size=100_000)
    for n in (700, 1, 900, 3000, 1, 1):
        log.add(n)
    assert log.state.capacity >= log.state.count == 4603
    assert log.live() == list(range(4603))
    at = log.state.find(np.arange(4603))
    np.testing.assert_array_equal(log.state.priority[at], np.arange(1, 4604, dtype=np.float32))
    np.testing.assert_array_equal(log.state.sequence[at], np.arange(4603))


def test_find_with_gaps_and_strangers() -> None:
    log = Log(max_size=100)
    for gap in (0, 50, 7, 0, 1000):
        log.add(5, gap=gap)
    live = log.live()
    wanted = np.array([*live, -1, 2**62, -(2**62), 30, 1061, 10**6], np.int64)
    slots = log.state.find(wanted)
    assert log.state.id[slots[: len(live)]].tolist() == live
    assert (slots[len(live) :] == -1).all()
    for id_ in wanted.tolist():
        assert (log.state.find_one(id_) >= 0) == (id_ in live)
    assert log.state.find(np.empty(0, np.int64)).shape == (0,)


# ---------------------------------------------------------------- dump and load


def columns(state: State) -> dict[str, Any]:
    tree, found = state.dump()
    del tree["tag_sets"]
    sets = [state.tag_sets[code] for code in found.pop("tags").tolist()]
    return {"tree": tree, "tags": sets, **{name: x.tolist() for name, x in found.items()}}


def assert_equal(first: State, second: State) -> None:
    a, b = columns(first), columns(second)
    reward = a.pop("reward"), b.pop("reward")
    np.testing.assert_array_equal(*reward)
    assert a == b
    assert (first.count, first.tail - first.head >= first.count) == (second.count, True)


def test_dump_and_load_give_the_same_state() -> None:
    log = Log(max_size=50)
    for i in range(30):
        log.add(3, tags=[[f"t{i % 4}"], [], ["x", f"t{i % 3}"]])
        log.apply(codec.encode_remove(ids(3 * i)))
        log.apply(outcome(bytes([i + 1]) * 16, log.lsn, 3 * i + 1))
    log.apply(
        codec.encode_reward(ids(88, 89), np.ones(2), np.ones(2, np.float32), {"88": {"a": 1.0}})
    )
    tree, found = log.state.dump()
    assert set(found) == set(COLUMNS)
    loaded = State.load(json.loads(json.dumps(tree)), found)
    assert_equal(log.state, loaded)
    # And they stay the same.
    other = Log()
    other.state, other.lsn, other.next_id, other.sizes = loaded, log.lsn, log.next_id, log.sizes
    for each in (log, other):
        each.add(4, tags=[["new"], ["x", "t1"], [], ["t0"]])
        each.apply(codec.encode_remove(ids(88)))
    assert_equal(log.state, other.state)


def alike(operations: list[LoggedOperation]) -> LoggedRun:
    """Operations of one kind and size, taken together as they are when they are read."""
    lengths = [operation.lengths for operation in operations]
    return LoggedRun(
        operations[0].lsn,
        operations[0].kind,
        np.frombuffer(b"".join(bytes(each.body) for each in operations), np.uint8).reshape(
            len(operations), -1
        ),
        np.array([operation.first_id for operation in operations]),
        np.array([operation.location for operation in operations]),
        np.concatenate(lengths) if len(lengths[0]) else None,
    )


@pytest.mark.parametrize("seed", range(8))
def test_what_is_alike_is_applied_together_as_it_is_one_by_one(seed: int) -> None:
    """Adds, priorities and outcomes; some of what is gone, or was counted before, or too old."""
    rng = np.random.default_rng(seed)
    log = Log(max_size=30, receipts_kept=5)
    together = State()
    applied: list[LoggedOperation] = []
    one_by_one = log.state.apply

    def apply(operation: LoggedOperation) -> Change:
        applied.append(operation)
        return one_by_one(operation)

    log.state.apply = apply  # type: ignore[method-assign, assignment]
    together.apply(LoggedOperation(1, codec.SETTINGS, 0, settings_body(log), 0, NO_ROWS))
    receipts = [b"", *(bytes([i]) * 16 for i in range(1, 9))]
    for _ in range(12):
        applied.clear()
        kind, n = rng.integers(4), int(rng.integers(1, 40))
        changes = []
        for i in range(n):
            some = ids(*rng.integers(max(0, log.next_id - 40), log.next_id + 3, 3))
            if kind == 0:
                tags = [["late"]] if i > n // 2 and seed % 2 else None
                log.add(tags=tags)
                changes.append(log.last)
            elif kind == 1:
                changes.append(log.apply(codec.encode_priority(some, rng.random(3, np.float32))))
            elif kind == 2:
                receipt, issued = receipts[rng.integers(9)], int(rng.integers(log.lsn + 1))
                success = bool(rng.integers(2))
                changes.append(log.apply(outcome(receipt, issued, *some, success=success)))
            else:
                changes.append(log.apply(codec.encode_remove(some[:1])))
        parts = [applied] if len({len(each.body) for each in applied}) == 1 else []
        for part in parts or [[each] for each in applied]:
            change = together.apply_run(alike(part))
            if parts and kind:
                assert change.applied == sum(each.applied for each in changes)
        assert_equal(log.state, together)
    late = alike([LoggedOperation(log.lsn + 1, codec.PRIORITY, 0, b"\1" + bytes(7), 0, NO_ROWS)])
    with pytest.raises(CorruptionError, match=str(log.lsn + 1)):
        together.apply_run(late)


def settings_body(log: Log) -> bytes:
    return bytes(codec.encode_settings({"metric": "cosine", **log.sizes}).body)


class StateMachine(RuleBasedStateMachine):
    """Random operations; after each, the state and a copy that is dumped and loaded agree."""

    def __init__(self) -> None:
        super().__init__()
        self.model: dict[int, dict[str, Any]] = {}

    @initialize(max_size=st.integers(1, 12))
    def start(self, max_size: int) -> None:
        self.log = Log(max_size=max_size)
        self.total = 0

    def _trim(self) -> None:
        while len(self.model) > self.log.sizes["max_size"]:
            del self.model[min(self.model)]

    @rule(n=st.integers(1, 20), gap=st.sampled_from([0, 0, 0, 5]), tagged=st.booleans())
    def add(self, n: int, gap: int, tagged: bool) -> None:
        tags = [[f"t{i % 2}"] for i in range(n)] if tagged else None
        for i, id_ in enumerate(self.log.add(n, gap=gap, tags=tags)):
            self.model[id_] = {
                "priority": id_ + 1.0,
                "retrievals": 0,
                "reward": None,
                "tags": (f"t{i % 2}",) if tagged else (),
                "sequence": self.total + i,
            }
        self.total += n
        self._trim()

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        chosen = data.draw(st.lists(st.sampled_from(sorted(self.model)), max_size=6))
        assert self.log.apply(codec.encode_remove(ids(*chosen))).applied == len(set(chosen))
        for id_ in set(chosen):
            del self.model[id_]

    @precondition(lambda self: self.model)
    @rule(data=st.data(), value=st.integers(0, 9))
    def update(self, data: st.DataObject, value: int) -> None:
        chosen = data.draw(st.lists(st.sampled_from(sorted(self.model)), unique=True, max_size=4))
        array = ids(*chosen)
        values = np.full(len(chosen), value, np.float32)
        self.log.apply(codec.encode_priority(array, values))
        self.log.apply(codec.encode_reward(array, values.astype(np.float64), values, None))
        self.log.apply(outcome(bytes(16), 0, *chosen))
        for id_ in chosen:
            row = self.model[id_]
            row.update(priority=value, reward=value, retrievals=row["retrievals"] + 1)

    @rule(max_size=st.integers(1, 12))
    def resize(self, max_size: int) -> None:
        self.log.settings(max_size=max_size)
        self._trim()

    @rule()
    def clear(self) -> None:
        assert self.log.apply(codec.encode_clear()).applied == len(self.model)
        self.model.clear()

    @rule()
    def reload(self) -> None:
        tree, found = self.log.state.dump()
        loaded = State.load(json.loads(json.dumps(tree)), found)
        assert_equal(self.log.state, loaded)
        self.log.state = loaded

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "log"):
            return
        state = self.log.state
        live = sorted(self.model)
        assert state.live_ids().tolist() == live
        first = live[len(live) // 2] if live else 0
        assert state.live_ids(first).tolist() == [id_ for id_ in live if id_ >= first]
        assert state.live_ids(first + 1).tolist() == [id_ for id_ in live if id_ > first]
        assert state.count == len(live)
        assert state.total_added == self.total
        assert int(state.live.sum()) == len(live)
        at = state.find(np.array(live, np.int64))
        rows = [self.model[id_] for id_ in live]
        assert state.priority[at].tolist() == [row["priority"] for row in rows]
        assert state.retrieval_count[at].tolist() == [row["retrievals"] for row in rows]
        assert state.sequence[at].tolist() == [row["sequence"] for row in rows]
        assert [state.tag_sets[code] for code in state.tags[at]] == [row["tags"] for row in rows]
        rewards = [np.nan if row["reward"] is None else row["reward"] for row in rows]
        np.testing.assert_array_equal(state.reward[at], rewards)
        for id_ in range(self.log.next_id):
            assert (state.find_one(id_) >= 0) == (id_ in self.model)


StateMachine.TestCase.settings = hypothesis_settings(stateful_step_count=30)
TestAgainstAModel = StateMachine.TestCase


def test_nothing_is_imported_by_the_first_use_of_numpy() -> None:
    """A process may be forked in the middle of that; the child would wait for its lock for ever."""
    code = (
        "import sys, expbuf_core, numpy as np; before = set(sys.modules)\n"
        "np.unique([2, 1], return_index=True); np.setdiff1d([1], [2], assume_unique=True)\n"
        "assert set(sys.modules) == before, set(sys.modules) - before"
    )
    subprocess.run([sys.executable, "-c", code], timeout=60, check=True)
