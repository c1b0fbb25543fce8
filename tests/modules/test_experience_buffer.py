"""`ExperienceBuffer`, method by method: opening, adding, bounds, removing, reading, upkeep."""

from __future__ import annotations

import asyncio
import concurrent.futures
import dataclasses
import json
import logging
import os
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from module_helpers import (
    CONFIG,
    DIM,
    OpenBuffer,
    add_all,
    answers,
    columns,
    contents,
    expected,
    experience,
    find,
    finds,
    unchanged,
    vector,
)

from expbuf_core import (
    BufferClosed,
    ConfigError,
    Experience,
    ExperienceBuffer,
    NotEnoughExperiences,
    StorageError,
    UnknownExperienceError,
)

# ---------------------------------------------------------------- opening


def test_open_creates_and_opens_again(open_buffer: OpenBuffer, folder: Path) -> None:
    with open_buffer() as first:
        assert len(first) == 0
        assert first.path == folder
        id_ = first.add(experience(1))
    with open_buffer() as again:
        assert again.get(id_).answer == "answer 1"
        assert finds(again, 1)


def test_mode_x_creates_and_refuses_what_is_there(open_buffer: OpenBuffer) -> None:
    with open_buffer(mode="x") as buffer:
        add_all(buffer, range(2))
    with pytest.raises(StorageError, match="holds a buffer already"):
        open_buffer(mode="x")
    with open_buffer() as again:
        assert len(again) == 2


def test_mode_r_reads_and_needs_a_buffer(open_buffer: OpenBuffer, folder: Path) -> None:
    with pytest.raises(StorageError, match="no buffer"):
        open_buffer(mode="r")
    assert not folder.exists()
    with open_buffer() as buffer:
        add_all(buffer, range(3))
    with open_buffer(mode="r") as reader:
        assert answers(reader) == expected(range(3))
        assert finds(reader, 1)
        assert len(reader.sample(2)) == 2


def test_an_unknown_mode_is_refused(open_buffer: OpenBuffer, folder: Path) -> None:
    with pytest.raises(ConfigError, match="'r', 'a' or 'x'"):
        open_buffer(mode="w")
    assert not folder.exists()


def test_load_from_disk_needs_a_buffer(open_buffer: OpenBuffer, folder: Path) -> None:
    with pytest.raises(StorageError, match="is no buffer"):
        ExperienceBuffer.load_from_disk(folder, config=CONFIG)
    assert not folder.exists()
    with open_buffer() as buffer:
        add_all(buffer, range(2))
    with ExperienceBuffer.load_from_disk(folder, config=CONFIG, max_size=5) as again:
        assert answers(again) == expected(range(2))
        assert again.max_size == 5


def test_the_folder_knows_its_own_settings(open_buffer: OpenBuffer, folder: Path) -> None:
    with open_buffer(embedding={"metric": "l2"}, fusion="weighted_concat", max_size=7) as buffer:
        buffer.add(Experience(v_embed=vector(1, 3), q_embed=vector(1, 5)))
    with ExperienceBuffer.open(folder, index={"backend": "exact", "builder": "off"}) as again:
        settings = again.stats()["settings"]
        assert (settings["v_dim"], settings["q_dim"], settings["metric"]) == (3, 5, "l2")
        assert settings["fusion"]["name"] == "weighted_concat"
        assert again.max_size == 7
        found = again.search_index(v_embed=vector(1, 3), q_embed=vector(1, 5), k=1)
        assert found[0].similarity == pytest.approx(0, abs=1e-6)


def test_a_path_may_come_from_the_configuration(folder: Path) -> None:
    with ExperienceBuffer.open(config={**CONFIG, "path": str(folder)}) as buffer:
        assert buffer.path == folder
    assert (folder / "expbuf.json").exists()


def test_without_a_path_it_is_in_memory(tmp_path: Path) -> None:
    with ExperienceBuffer.open(config=CONFIG) as buffer:
        assert buffer.path is None
        buffer.add(experience(1))
        assert finds(buffer, 1)
        assert buffer.save_snapshot() == buffer.lsn
        assert buffer.rebuild_index() is False
    with pytest.raises(ConfigError, match="in memory"):
        ExperienceBuffer.open(config=CONFIG, mode="r")
    assert os.listdir(tmp_path) == []


def test_recovery_says_what_opening_found(open_buffer: OpenBuffer) -> None:
    with open_buffer() as buffer:
        assert str(buffer.recovery).startswith("new: 0 experiences")
        add_all(buffer, range(4))
        lsn = buffer.lsn
    with open_buffer() as buffer:
        report = buffer.recovery
        assert (report.experiences, report.lsn, report.clean, report.first) == (4, lsn, True, True)
        assert report.torn_bytes == 0
        assert report.warnings == ()
        assert "clean: 4 experiences" in str(report)
        buffer.save_snapshot()
        buffer.add(experience(9))
    with open_buffer() as buffer:
        assert buffer.recovery.snapshot_lsn > 0
        assert buffer.recovery.replayed < 4
        assert buffer.recovery.experiences == 5
        with open_buffer() as second:
            assert not second.recovery.first
            assert "joined: 5 experiences" in str(second.recovery)


def test_close_ends_it_and_may_be_repeated(buffer: ExperienceBuffer) -> None:
    id_ = buffer.add(experience(1))
    receipt = find(buffer, 1).receipt
    buffer.close()
    buffer.close()
    uses: list[Any] = [
        lambda: buffer.add(experience(2)),
        lambda: buffer.add_many([experience(2)]),
        lambda: buffer.submit(experience(2)),
        lambda: buffer.sync(),
        lambda: buffer.remove([id_]),
        lambda: buffer.clear(),
        lambda: buffer.update_priorities([id_], [1.0]),
        lambda: buffer.update_rewards([id_], [1.0]),
        lambda: buffer.record_outcome(receipt, success=True),
        lambda: buffer.add_to_index([id_]),
        lambda: buffer.get(id_),
        lambda: id_ in buffer,
        lambda: len(buffer),
        lambda: list(buffer),
        lambda: buffer.ids(),
        lambda: buffer.lsn,
        lambda: buffer.max_size,
        lambda: buffer.is_full(),
        lambda: find(buffer, 1),
        lambda: buffer.search_many(v_embed=np.ones((1, DIM))),
        lambda: buffer.sample(1),
        lambda: buffer.save_snapshot(),
        lambda: buffer.rebuild_index(),
        lambda: buffer.stats(),
    ]
    for use in uses:
        with pytest.raises(BufferClosed, match="closed"):
            use()
    assert "closed" in repr(buffer)


def test_the_context_manager_closes_also_after_an_error(open_buffer: OpenBuffer) -> None:
    buffer = open_buffer()

    def fail() -> None:
        with buffer:
            buffer.add(experience(1))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    with pytest.raises(BufferClosed):
        len(buffer)
    with open_buffer() as again:
        assert again.recovery.clean
        assert len(again) == 1


# ---------------------------------------------------------------- adding


def test_add_returns_rising_ids_and_the_next_search_finds_it(buffer: ExperienceBuffer) -> None:
    ids = []
    for serial in range(5):
        ids.append(buffer.add(experience(serial)))
        assert finds(buffer, serial)
    assert ids == sorted(set(ids))
    assert all(type(id_) is int for id_ in ids)
    assert answers(buffer) == expected(range(5))


def test_everything_in_an_experience_comes_back(buffer: ExperienceBuffer) -> None:
    given = Experience(
        v_embed=vector(1),
        q_embed=vector(2),
        question="which digit? ✓",
        answer={"text": "seven", "votes": [7, 7, 1]},
        confidence=0.25,
        rewards={"correct": 1.0, "length": -0.25},
        trajectory=[{"thought": "…", "logits": np.arange(4.0)}, (1, None)],
        metadata={"scan": 7, "nan": float("nan")},
        probabilities=[0.25, 0.5, 0.25],
        tags=("hard", "digits"),
        image=b"\x89PNG\x00",
        key="scan-7",
        timestamp=1_700_000_000.5,
    )
    id_ = buffer.add(given, priority=0.125)
    found: Any = buffer.get(id_)
    assert found.id == id_
    np.testing.assert_array_equal(found.v_embed, given.v_embed)
    np.testing.assert_array_equal(found.q_embed, given.q_embed)
    assert found.question == given.question
    assert found.answer == given.answer
    assert found.confidence == 0.25
    assert found.rewards == given.rewards
    assert found.total_reward == 0.75
    np.testing.assert_array_equal(found.trajectory[0]["logits"], np.arange(4.0))
    assert found.trajectory[1] == (1, None)
    assert found.metadata["scan"] == 7
    assert np.isnan(found.metadata["nan"])
    np.testing.assert_array_equal(found.probabilities, np.array([0.25, 0.5, 0.25], np.float32))
    assert found.tags == ("hard", "digits")
    assert found.image == given.image
    assert found.key == "scan-7"
    assert found.timestamp == 1_700_000_000.5
    assert found.priority == 0.125
    assert (found.retrieval_count, found.success_count) == (0, 0.0)


def test_what_is_left_out_has_a_default(buffer: ExperienceBuffer) -> None:
    before = time.time()
    found: Any = buffer.get(buffer.add(Experience(v_embed=vector(1), q_embed=vector(2))))
    assert before <= found.timestamp <= time.time()
    assert found.confidence == 1.0
    assert found.rewards is None
    assert found.total_reward is None
    nothing = (found.question, found.answer, found.trajectory, found.metadata)
    assert nothing == ("", None, None, None)
    assert (found.probabilities, found.tags, found.image, found.key) == (None, (), None, None)


def test_an_image_may_be_a_path(buffer: ExperienceBuffer) -> None:
    id_ = buffer.add(experience(1, image=Path("scans/7.png")))
    assert buffer.get(id_).image == os.path.join("scans", "7.png")
    (id_,) = buffer.add_many({**columns(range(1)), "image": [Path("scans/8.png")]})
    assert buffer.get(int(id_)).image == os.path.join("scans", "8.png")


def test_one_number_is_a_reward(buffer: ExperienceBuffer) -> None:
    found = buffer.get(buffer.add(experience(1, rewards=-0.5)))
    assert found.total_reward == -0.5
    found = buffer.get(buffer.add(experience(1, rewards=0)))
    assert found.total_reward == 0.0


def test_the_initial_priority_is_the_scorers(buffer: ExperienceBuffer) -> None:
    # 0.4 * (1 - confidence) + 0.4 * |reward|
    for confidence, reward, wanted in ((0.75, None, 0.1), (0.75, -1.0, 0.5), (1.0, 0.5, 0.2)):
        id_ = buffer.add(experience(1, confidence=confidence, rewards=reward))
        assert buffer.get(id_).priority == pytest.approx(wanted, abs=1e-6)
    # Probabilities take the place of the confidence: their entropy is that of a coin.
    id_ = buffer.add(experience(1, confidence=1.0, probabilities=[0.5, 0.5]))
    assert buffer.get(id_).priority == pytest.approx(0.4, abs=1e-6)


def test_an_experience_from_the_buffer_is_added_again_as_a_copy(buffer: ExperienceBuffer) -> None:
    first = buffer.get(buffer.add(experience(1)))
    with unchanged(buffer), pytest.raises(ValueError, match=r"replace\(experience, id=None\)"):
        buffer.add(first)
    copy = buffer.add(dataclasses.replace(first, id=None, answer="other"))
    assert copy != first.id
    assert buffer.get(copy).answer == "other"


def test_later_changes_to_what_was_added_change_nothing(buffer: ExperienceBuffer) -> None:
    v, trajectory = vector(1), [np.zeros(2)]
    id_ = buffer.add(experience(1, v_embed=v, trajectory=trajectory))
    v[:] = 7
    trajectory[0][:] = 7
    np.testing.assert_array_equal(buffer.get(id_).v_embed, vector(1))
    np.testing.assert_array_equal(buffer.get(id_).trajectory[0], [0, 0])
    assert finds(buffer, 1)


def test_add_many_takes_objects_in_one_commit(buffer: ExperienceBuffer) -> None:
    buffer.add(experience(0))
    lsn = buffer.lsn
    ids = buffer.add_many(experience(i) for i in range(1, 6))
    assert ids.dtype == np.int64
    assert buffer.lsn == lsn + 1
    np.testing.assert_array_equal(ids, np.arange(ids[0], ids[0] + 5))
    assert answers(buffer) == expected(range(6))
    assert all(finds(buffer, i) for i in range(6))


def test_add_many_takes_columns(buffer: ExperienceBuffer) -> None:
    given = {
        **columns(range(4)),
        "rewards": [0.5, None, {"a": 1.0, "b": 2.0}, -1],
        "trajectory": [[i] for i in range(4)],
        "metadata": [{"i": i} if i else None for i in range(4)],
        "tags": [("even",), (), ("even",), ("odd", "three")],
        "key": [f"k{i}" for i in range(4)],
        "timestamp": np.arange(4) + 0.5,
        "probabilities": [None, [0.5, 0.5], None, np.array([1.0])],
        "image": [b"png", "path", None, None],
    }
    ids = buffer.add_many(given)
    found = [buffer.get(int(id_)) for id_ in ids]
    assert [e.answer for e in found] == expected(range(4))
    assert [e.question for e in found] == ["which one?"] * 4
    assert [e.total_reward for e in found] == [0.5, None, 3.0, -1.0]
    assert found[2].rewards == {"a": 1.0, "b": 2.0}
    assert [e.trajectory for e in found] == [[0], [1], [2], [3]]
    assert [e.metadata for e in found] == [None, {"i": 1}, {"i": 2}, {"i": 3}]
    assert [e.tags for e in found] == [("even",), (), ("even",), ("odd", "three")]
    assert [e.key for e in found] == ["k0", "k1", "k2", "k3"]
    assert [e.timestamp for e in found] == [0.5, 1.5, 2.5, 3.5]
    assert [e.image for e in found] == [b"png", "path", None, None]
    assert found[0].probabilities is None
    np.testing.assert_array_equal(found[1].probabilities, np.array([0.5, 0.5], np.float32))
    assert all(finds(buffer, i) for i in range(4))


@pytest.mark.parametrize("rewards", [None, np.array([1.0, np.nan, -2.0])])
def test_columns_and_objects_are_the_same(buffer: ExperienceBuffer, rewards: Any) -> None:
    given = columns(range(3))
    one_by_one = [experience(i) for i in range(3)]
    if rewards is not None:
        given["rewards"] = rewards
        one_by_one = [
            dataclasses.replace(e, rewards=None if np.isnan(r) else float(r))
            for e, r in zip(one_by_one, rewards, strict=True)
        ]
    buffer.add_many(given)
    buffer.add_many(one_by_one)
    both = contents(buffer)
    assert [x[1:] for x in both[:3]] == [x[1:] for x in both[3:]]


def test_rewards_come_as_columns_by_component(buffer: ExperienceBuffer) -> None:
    rewards = {"correct": np.array([1.0, 0.0]), "brief": [0.25, 0.5]}
    ids = buffer.add_many({**columns(range(2)), "rewards": rewards})
    assert [buffer.get(int(i)).total_reward for i in ids] == [1.25, 0.5]
    assert buffer.get(int(ids[0])).rewards == {"correct": 1.0, "brief": 0.25}


def test_priorities_are_given_for_some(buffer: ExperienceBuffer) -> None:
    ids = buffer.add_many([experience(i) for i in range(3)], priorities=[5.0, None, 0.0])
    assert [buffer.get(int(i)).priority for i in ids] == [5.0, pytest.approx(0.2), 0.0]
    ids = buffer.add_many(columns(range(2)), priorities=np.array([0.5, 2.0]))
    assert [buffer.get(int(i)).priority for i in ids] == [0.5, 2.0]


@pytest.mark.parametrize(
    "nothing", [[], (), {name: np.empty((0, DIM)) for name in ("v_embed", "q_embed")}]
)
def test_adding_nothing_writes_nothing(buffer: ExperienceBuffer, nothing: Any) -> None:
    buffer.add(experience(0))
    with unchanged(buffer):
        ids = buffer.add_many(nothing)
    assert ids.shape == (0,)
    assert ids.dtype == np.int64


def test_adding_nothing_first_decides_no_dimensions(buffer: ExperienceBuffer) -> None:
    lsn = buffer.lsn
    buffer.add_many({"v_embed": np.empty((0, 3)), "q_embed": np.empty((0, 3))})
    assert buffer.lsn == lsn
    assert finds(buffer, 1) is False
    buffer.add(experience(1))
    assert finds(buffer, 1)


def test_submit_resolves_when_acknowledged(buffer: ExperienceBuffer) -> None:
    futures = [buffer.submit(experience(i)) for i in range(6)]
    done, _ = concurrent.futures.wait(futures, timeout=30)
    assert len(done) == 6
    ids = [future.result() for future in futures]
    assert len(set(ids)) == 6
    assert [buffer.get(id_).answer for id_ in ids] == expected(range(6))


def test_submit_can_be_awaited(buffer: ExperienceBuffer) -> None:
    async def main() -> int:
        return await asyncio.wait_for(asyncio.wrap_future(buffer.submit(experience(3))), 30)

    id_ = asyncio.run(main())
    assert buffer.get(id_).answer == "answer 3"


def test_submit_hands_errors_on(buffer: ExperienceBuffer) -> None:
    future = buffer.submit(experience(1, confidence=2.0))
    with pytest.raises(ValueError, match="confidence"):
        future.result(timeout=30)


def test_what_is_submitted_is_what_it_was_then(open_buffer: OpenBuffer) -> None:
    """Observations often come in one array, over and over."""
    buffer = open_buffer()
    v, q = np.zeros(DIM, np.float32), np.zeros(DIM, np.float32)
    notes: dict[str, Any] = {"array": np.zeros(2), "list": [0]}
    futures = []
    for n in range(30):
        v[:], q[:], notes["array"][:], notes["list"][0] = n, -n, n, n
        futures.append(buffer.submit(Experience(v_embed=v, q_embed=q, metadata=notes)))
    v[:] = q[:] = np.nan
    notes["list"][0] = object()
    for n, future in enumerate(futures):
        found = buffer.get(future.result(timeout=30))
        assert found.metadata is not None
        assert set(found.v_embed) == {n}
        assert set(found.q_embed) == {-n}
        assert set(found.metadata["array"]) == {n}
        assert found.metadata["list"] == [n]


def test_close_waits_for_submitted_ones(open_buffer: OpenBuffer) -> None:
    buffer = open_buffer()
    futures = [buffer.submit(experience(i)) for i in range(20)]
    buffer.close()
    assert len({future.result(timeout=0) for future in futures}) == 20
    with open_buffer() as again:
        assert len(again) == 20


@pytest.mark.parametrize("durability", ["sync", "group", "os"])
def test_sync_says_up_to_where_all_is_on_disk(open_buffer: OpenBuffer, durability: str) -> None:
    buffer = open_buffer(durability=durability)
    add_all(buffer, range(3))
    lsn = buffer.lsn
    assert buffer.sync() >= lsn
    assert buffer.stats()["durable_lsn"] >= lsn
    assert finds(buffer, 2)


@pytest.mark.parametrize("durability", ["sync", "group", "os"])
def test_every_durability_survives_a_close(open_buffer: OpenBuffer, durability: str) -> None:
    with open_buffer(durability=durability) as buffer:
        add_all(buffer, range(5))
    with open_buffer() as again:
        assert answers(again) == expected(range(5))


# ---------------------------------------------------------------- bounded, first in first out


def test_full_means_that_the_oldest_goes(buffer: ExperienceBuffer) -> None:
    ids = add_all(buffer, range(8))
    assert buffer.is_full()
    for serial in range(8, 20):
        new = buffer.add(experience(serial))
        ids.append(new)
        assert len(buffer) == 8
        assert answers(buffer) == expected(range(serial - 7, serial + 1))
        assert new in buffer
        assert ids[serial - 8] not in buffer
        gone = find(buffer, serial - 8, k=8)  # from store and index at once
        assert sorted(gone.ids) == sorted(ids[serial - 7 :])
        with pytest.raises(UnknownExperienceError, match="evicted or removed"):
            buffer.get(ids[serial - 8])
    np.testing.assert_array_equal(buffer.ids(), ids[-8:])


def test_a_batch_larger_than_the_buffer_keeps_its_end(buffer: ExperienceBuffer) -> None:
    add_all(buffer, range(3))
    ids = buffer.add_many([experience(i) for i in range(100, 121)])
    assert len(ids) == 21
    assert answers(buffer) == expected(range(113, 121))
    assert len(find(buffer, 101, k=30)) == 8


def test_a_smaller_max_size_evicts_and_is_logged(open_buffer: OpenBuffer) -> None:
    with open_buffer(max_size=10) as buffer:
        add_all(buffer, range(10))
    with open_buffer(max_size=4) as buffer:
        assert buffer.max_size == 4
        assert answers(buffer) == expected(range(6, 10))
        assert len(find(buffer, 1, k=10)) == 4
    from_config = {key: value for key, value in CONFIG.items() if key != "max_size"}
    with ExperienceBuffer.open(buffer.path, config=from_config) as again:
        assert again.max_size == 4
        assert answers(again) == expected(range(6, 10))
    with open_buffer(max_size=6) as buffer:
        assert not buffer.is_full()
        add_all(buffer, range(10, 13))
        assert answers(buffer) == expected(range(7, 13))


def test_max_size_change_is_seen_by_others(open_buffer: OpenBuffer) -> None:
    first = open_buffer(max_size=10)
    add_all(first, range(10))
    open_buffer(max_size=3)
    assert len(first) == 3
    assert first.max_size == 3


# ---------------------------------------------------------------- removing


def test_remove_takes_it_from_store_and_index(buffer: ExperienceBuffer) -> None:
    ids = add_all(buffer, range(5))
    assert buffer.remove([ids[1], ids[3]]) == 2
    assert answers(buffer) == ["answer 0", "answer 2", "answer 4"]
    assert ids[1] not in buffer
    assert sorted(find(buffer, 1, k=10).ids) == [ids[0], ids[2], ids[4]]
    with pytest.raises(UnknownExperienceError):
        buffer.get(ids[1])
    assert buffer.remove([ids[1], ids[1], ids[0]]) == 1
    assert buffer.remove(np.array([ids[2]], np.int32)) == 1
    assert buffer.remove(ids[4]) == 1
    assert len(buffer) == 0


def test_ids_are_never_issued_again(buffer: ExperienceBuffer) -> None:
    ids = add_all(buffer, range(4))
    buffer.remove(ids)
    assert buffer.add(experience(9)) > max(ids)
    last = int(buffer.ids()[-1])
    buffer.clear()
    assert buffer.add(experience(10)) > last


def test_remove_makes_room(buffer: ExperienceBuffer) -> None:
    ids = add_all(buffer, range(8))
    buffer.remove([ids[4]])
    assert not buffer.is_full()
    buffer.add(experience(8))
    assert answers(buffer) == [f"answer {i}" for i in (0, 1, 2, 3, 5, 6, 7, 8)]


def test_clear_removes_everything(buffer: ExperienceBuffer) -> None:
    add_all(buffer, range(5))
    assert buffer.clear() == 5
    assert len(buffer) == 0
    assert list(buffer) == []
    assert len(find(buffer, 1, k=3)) == 0
    with pytest.raises(NotEnoughExperiences):
        buffer.sample(1)
    assert buffer.clear() == 0
    buffer.add(experience(7))
    assert finds(buffer, 7)


# ---------------------------------------------------------------- reading


def test_get_and_indexing(buffer: ExperienceBuffer) -> None:
    ids = add_all(buffer, range(3))
    assert buffer.get(ids[1]).answer == "answer 1"
    assert buffer[ids[2]].answer == "answer 2"
    assert buffer.get(np.int64(ids[0])).id == ids[0]  # type: ignore[arg-type]
    for never in (99, -1, 2**70):
        with pytest.raises(UnknownExperienceError, match="never issued") as caught:
            buffer.get(never)
        assert caught.value.id == never
    with pytest.raises(KeyError):
        buffer.get(99)


def test_contains(buffer: ExperienceBuffer) -> None:
    id_ = buffer.add(experience(1))
    assert id_ in buffer
    assert np.int64(id_) in buffer
    for other in (id_ + 1, -1, 2**70, -(2**70), "0", None, 1.5, (1,)):
        assert other not in buffer


def test_len_ids_and_iteration(buffer: ExperienceBuffer) -> None:
    assert (len(buffer), list(buffer), buffer.ids().tolist()) == (0, [], [])
    ids = add_all(buffer, range(8))
    assert len(buffer) == 8
    assert [e.id for e in buffer] == ids == buffer.ids().tolist()
    assert buffer.ids().dtype == np.int64


def test_iteration_goes_on_while_others_write(buffer: ExperienceBuffer) -> None:
    add_all(buffer, range(8))
    seen = []
    for item in buffer:
        seen.append(item.answer)
        if len(seen) == 2:
            add_all(buffer, range(8, 11))
    assert seen == expected(range(8))


def test_iteration_over_many(open_buffer: OpenBuffer) -> None:
    buffer = open_buffer(max_size=700)
    buffer.add_many(columns(range(900)))
    assert answers(buffer) == expected(range(200, 900))


def test_repr_names_place_and_size(buffer: ExperienceBuffer) -> None:
    buffer.add(experience(1))
    assert "1 experiences" in repr(buffer)


def test_add_to_index_is_idempotent(buffer: ExperienceBuffer) -> None:
    ids = add_all(buffer, range(3))
    lsn = buffer.lsn
    assert buffer.add_to_index(ids) == 3
    assert buffer.add_to_index(ids) == 3
    assert buffer.lsn == lsn
    assert len(find(buffer, 1, k=10)) == 3
    buffer.remove(ids[:1])
    assert buffer.add_to_index(ids) == 2


def test_stats_are_json(buffer: ExperienceBuffer) -> None:
    empty = buffer.stats()
    assert empty["experiences"] == 0
    assert empty["mean_reward"] is None
    ids = add_all(buffer, range(10))
    buffer.update_rewards(ids[-2:], [1.0, 2.0])
    buffer.record_outcome(ids[-3:], success=True)
    facts = buffer.stats()
    assert json.loads(json.dumps(facts)) == facts
    assert facts["experiences"] == facts["max_size"] == 8
    assert facts["total_added"] == 10
    assert facts["next_id"] == ids[-1] + 1
    assert facts["rewards_known"] == 2
    assert facts["mean_reward"] == 1.5
    assert (facts["retrievals"], facts["successes"]) == (3, 3.0)
    assert facts["lsn"] == buffer.lsn
    assert facts["index"]["tail_rows"] == 8


# ---------------------------------------------------------------- snapshots and index


def test_save_snapshot_returns_its_lsn_and_bounds_the_log(open_buffer: OpenBuffer) -> None:
    buffer = open_buffer(max_size=20)
    for round_ in range(6):
        add_all(buffer, range(round_ * 40, round_ * 40 + 40))
        lsn = buffer.lsn
        assert buffer.save_snapshot() == lsn
        assert buffer.stats()["snapshot_lsn"] == lsn
    assert buffer.stats()["storage"]["experience_data"]["files"] <= 6
    assert answers(buffer) == expected(range(220, 240))
    buffer.close()
    with open_buffer() as again:
        assert answers(again) == expected(range(220, 240))
        assert again.recovery.replayed == 0
        assert finds(again, 230)


def test_rebuild_index_changes_no_answer(open_buffer: OpenBuffer, folder: Path) -> None:
    buffer = open_buffer(max_size=60)
    assert buffer.rebuild_index() is False
    buffer.add_many(columns(range(50)))
    before = [find(buffer, i, k=5).ids.tolist() for i in range(50)]
    assert buffer.rebuild_index() is True
    assert buffer.stats()["index"]["tail_rows"] == 0
    assert [find(buffer, i, k=5).ids.tolist() for i in range(50)] == before
    ids = add_all(buffer, range(50, 75))
    assert finds(buffer, 74)
    assert not finds(buffer, 3)
    buffer.remove(ids[:1])
    assert not finds(buffer, 50)
    assert len(find(buffer, 60, k=100)) == 59
    buffer.rebuild_index()
    assert len(find(buffer, 60, k=100)) == 59
    buffer.close()
    with open_buffer() as again:
        assert len(find(again, 60, k=100)) == 59
        assert finds(again, 74)
    assert list((folder / "index").glob("*.vectors"))


@pytest.mark.parametrize("harm", ["manifest", "vectors", "index"])
def test_a_lost_or_damaged_index_costs_no_data(
    open_buffer: OpenBuffer, folder: Path, harm: str, caplog: pytest.LogCaptureFixture
) -> None:
    with open_buffer() as buffer:
        buffer.add_many(columns(range(30)))
        buffer.rebuild_index()
        buffer.save_snapshot()
        add_all(buffer, range(30, 33))
    if harm == "manifest":
        (folder / "index" / "manifest.json").unlink()
    for path in (folder / "index").glob("*.vectors" if harm == "vectors" else "*.exact"):
        if harm != "manifest":
            path.write_bytes(b"x" + path.read_bytes()[1:])
    with caplog.at_level(logging.WARNING, "expbuf"), open_buffer() as again:
        assert ("index" in caplog.text) == (harm != "manifest")
        assert all(finds(again, i) for i in range(33))
        assert again.rebuild_index()
        assert all(finds(again, i) for i in range(33))


# ---------------------------------------------------------------- a model


def test_random_operations_against_a_plain_list(buffer: ExperienceBuffer) -> None:
    """Store, order, index and sampler hold the same experiences after every operation."""
    rng = np.random.default_rng(5)
    model: dict[int, int] = {}
    serial = 0
    for _ in range(120):
        kind = rng.choice(["add", "many", "remove", "clear"], p=[0.55, 0.2, 0.2, 0.05])
        if kind == "add":
            model[buffer.add(experience(serial))] = serial
            serial += 1
        elif kind == "many":
            n = int(rng.integers(1, 13))
            ids = buffer.add_many(columns(range(serial, serial + n)))
            model |= dict(zip(ids.tolist(), range(serial, serial + n), strict=True))
            serial += n
        elif kind == "remove" and model:
            chosen = rng.choice(list(model), min(len(model), 2), replace=False).tolist()
            assert buffer.remove(chosen) == len(chosen)
            for id_ in chosen:
                del model[id_]
        elif kind == "clear":
            assert buffer.clear() == len(model)
            model.clear()
        for id_ in sorted(model)[:-8]:
            del model[id_]
        assert buffer.ids().tolist() == sorted(model)
        assert answers(buffer) == [f"answer {model[i]}" for i in sorted(model)]
        assert sorted(find(buffer, serial, k=50).ids) == sorted(model)
        if model:
            assert set(Counter(buffer.sample(40).ids.tolist())) <= set(model)
