"""The plain crash test, round trips of payloads, damage that must be noticed."""

from __future__ import annotations

import enum
import math
import os
import shutil
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from module_helpers import (
    OpenBuffer,
    Worker,
    add_all,
    answers,
    columns,
    contents,
    expected,
    experience,
    find,
    finds,
    run_forked,
)

from expbuf_core import CorruptionError, ExperienceBuffer
from expbuf_core import control as c
from expbuf_core.backup import backup
from expbuf_core.repair import repair
from expbuf_core.verification import verify

# ---------------------------------------------------------------- killed, and opened again


def _one_by_one(buffer: ExperienceBuffer, ids: list[int], kind: str) -> None:
    """Twenty operations of a kind and size, one right behind the other: they are read together."""
    if kind == "reembed":
        buffer.reembed(lambda items: {"v_embed": vectors(items) + 1}, batch_size=1)
        return
    for n, id_ in enumerate(ids[:20]):
        if kind == "add":
            buffer.add(experience(100 + n))
        elif kind == "remove":
            buffer.remove([id_])
        elif kind == "priority":
            buffer.update_priorities([id_], [n + 1.0])
        elif kind == "reward":
            buffer.update_rewards([id_], [n + 1.0])
        elif kind == "components":
            buffer.update_rewards([id_], [{"a": n % 10 / 2}])
        elif kind == "outcome":
            buffer.record_outcome([id_], success=n % 2 == 0)
        elif kind == "clear":
            buffer.clear()
        elif kind == "settings":
            assert buffer.path is not None
            ExperienceBuffer.open(buffer.path, max_size=200 + n, index={"builder": "off"}).close()
        else:
            raise AssertionError(kind)


def vectors(items: Any) -> Any:
    return np.stack([item.v_embed for item in items])


@pytest.mark.parametrize("backend", ["file", "lmdb"])
@pytest.mark.parametrize(
    "kind",
    [
        "add",
        "remove",
        "priority",
        "reward",
        "components",
        "outcome",
        "clear",
        "settings",
        "reembed",
    ],
)
def test_many_operations_of_a_kind_in_a_row(
    open_buffer: OpenBuffer, folder: Path, backend: str, kind: str
) -> None:
    """Who follows, recovers, checks, copies or repairs takes them as who wrote them did."""
    if backend == "lmdb":
        pytest.importorskip("expbuf_lmdb")
    writer = open_buffer(persistence=backend)
    ids = add_all(writer, range(30))
    other = open_buffer(persistence=backend)
    assert contents(other) == contents(writer)
    _one_by_one(writer, ids, kind)
    before = contents(writer)
    assert contents(other) == before
    assert contents(open_buffer(persistence=backend)) == before
    copy = folder.with_name("copy")
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("*.tmp"))  # which may go meanwhile
    with ExperienceBuffer.open(copy, mode="r") as recovered:
        assert contents(recovered) == before
    assert not [problem for problem in verify(copy) if problem.damage]
    assert repair(copy, folder.with_name("repaired")).complete
    backup(folder, folder.with_name("backed up"))
    for name in ("repaired", "backed up"):
        with ExperienceBuffer.open(folder.with_name(name), mode="r") as saved:
            assert contents(saved) == before


def test_group_without_a_thread_for_it_syncs_at_once(
    open_buffer: OpenBuffer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    buffer = open_buffer(durability="group", group_interval_ms=60_000.0)
    words = buffer._session.control.words
    for n in range(3):
        buffer.add(experience(n))
        assert words[c.DURABLE] == words[c.APPENDED]
    monkeypatch.undo()
    buffer.add(experience(3))
    assert words[c.DURABLE] < words[c.APPENDED]
    assert answers(buffer) == expected(range(4))


@pytest.mark.parametrize("durability", ["sync", "group", "os"])
@pytest.mark.parametrize("indexed", [False, True])
def test_add_snapshot_add_kill_reopen(
    open_buffer: OpenBuffer, folder: Path, durability: str, indexed: bool
) -> None:
    """Everything that was acknowledged is there: in order, with its counters, found by search."""
    worker = Worker(folder, {"durability": durability})
    ids = worker("add_all(buffer, range(10))")
    worker(f"buffer.record_outcome({ids[:3]}, success=True, credit=0.5)")
    if indexed:
        assert worker("buffer.rebuild_index()")
    worker("buffer.save_snapshot()")
    ids += worker(
        "add_all(buffer, range(10, 15)) + buffer.add_many(columns(range(15, 18))).tolist()"
    )
    receipt = worker("str(find(buffer, 12, k=4).receipt)")
    assert worker(f"buffer.record_outcome({receipt!r}, success=True)") == 4
    worker(f"buffer.update_rewards({ids[4:6]}, [1.5, {{'a': -2.0}}])")
    worker(f"buffer.update_priorities({ids[6:7]}, [4.0])")
    worker(f"buffer.remove({ids[8:9]})")
    before = worker("repr(contents(buffer))")
    worker.kill()
    with open_buffer() as buffer:
        assert not buffer.recovery.clean
        assert buffer.recovery.first
        assert repr(contents(buffer)) == before
        left = [i for i in range(18) if i != 8]
        assert answers(buffer) == [f"answer {i}" for i in left]
        assert buffer.ids().tolist() == [ids[i] for i in left]
        assert all(finds(buffer, i) for i in left)
        assert not finds(buffer, 8)
        assert buffer.record_outcome(receipt, success=True) == 0
        assert buffer.add(experience(18)) > ids[-1]
        assert [*verify(folder)] == []
    with open_buffer() as buffer:
        assert buffer.recovery.clean
        assert answers(buffer)[-1] == "answer 18"


def test_killed_again_and_again(open_buffer: OpenBuffer, folder: Path) -> None:
    """Recover, write on, be killed again: nothing is lost on the way."""
    buffer = open_buffer(max_size=40)
    buffer.close()
    for round_ in range(6):

        def child(start: int = 10 * round_) -> None:
            with_killed = ExperienceBuffer.open(
                folder, index={"backend": "exact", "builder": "off"}
            )
            assert answers(with_killed) == expected(range(max(0, start - 40), start))
            add_all(with_killed, range(start, start + 10))
            if start % 20:
                with_killed.save_snapshot()
            os.kill(os.getpid(), 9)

        assert run_forked(child) == -9
    with open_buffer() as again:
        assert answers(again) == expected(range(20, 60))
        assert all(finds(again, i) for i in range(20, 60))


@pytest.mark.parametrize("n", [1, 2, 3])
def test_many_small_logs_and_snapshots(open_buffer: OpenBuffer, folder: Path, n: int) -> None:
    small = {"file": {"initial_bytes": 1 << 14, "segment_bytes": 1 << 14}}
    with open_buffer(max_size=30, persistence=small) as buffer:
        for start in range(0, 200, 5):
            buffer.add_many(columns(range(start, start + 5)))
            if start % (25 * n) == 0:
                buffer.save_snapshot()
        assert answers(buffer) == expected(range(170, 200))
        assert [*verify(folder)] == []
    with open_buffer() as buffer:
        assert answers(buffer) == expected(range(170, 200))
        assert all(finds(buffer, i) for i in range(170, 200))


def test_survivors_of_old_logs_keep_their_payloads(open_buffer: OpenBuffer) -> None:
    """First in, first out frees whole files; what was kept from an old one must stay readable."""
    with open_buffer(max_size=10_000) as buffer:
        for start in range(0, 600, 60):
            ids = buffer.add_many(columns(range(start, start + 60)))
            buffer.remove(ids[1:])
            buffer.save_snapshot()
        assert answers(buffer) == [f"answer {i}" for i in range(0, 600, 60)]
    with open_buffer(max_size=10_000) as buffer:
        assert answers(buffer) == [f"answer {i}" for i in range(0, 600, 60)]
        assert finds(buffer, 120)


def test_the_older_snapshot_serves_where_the_newer_is_damaged(
    open_buffer: OpenBuffer, folder: Path
) -> None:
    with open_buffer(max_size=50) as buffer:
        for start in range(0, 120, 30):
            buffer.add_many(columns(range(start, start + 30)))
            buffer.save_snapshot()
        add_all(buffer, range(120, 125))
    newest = max((folder / "snapshots").glob("*.snap"))
    raw = bytearray(newest.read_bytes())
    raw[len(raw) // 2] ^= 1
    newest.write_bytes(raw)
    with open_buffer(mode="r") as buffer:
        assert answers(buffer) == expected(range(75, 125))
    with open_buffer() as buffer:
        assert "checksum mismatch" in buffer.recovery.warnings[0]
        assert answers(buffer) == expected(range(75, 125))
        assert finds(buffer, 124)


def test_a_lost_log_is_no_torn_tail(open_buffer: OpenBuffer, folder: Path) -> None:
    with open_buffer() as buffer:
        for start in range(0, 400, 20):
            buffer.add_many(columns(range(start, start + 20)))
    logs = sorted(folder.glob("experience_data.*.wal"))
    assert len(logs) > 3
    for lost in logs:
        copy = folder.with_name("copy")
        shutil.copytree(folder, copy)
        (copy / lost.name).unlink()
        with pytest.raises(CorruptionError) as caught:
            open_buffer(copy)
        assert caught.value.path is not None
        assert os.path.dirname(caught.value.path) == str(copy)
        shutil.rmtree(copy)
    with open_buffer() as buffer:
        assert len(buffer) == 400


def test_a_damaged_payload_is_noticed_when_it_is_read(
    open_buffer: OpenBuffer, folder: Path
) -> None:
    with open_buffer() as buffer:
        ids = add_all(buffer, range(3))
        for log in folder.glob("experience_data.*.wal"):
            raw = log.read_bytes()
            at = raw.find(b"answer 1")
            if at >= 0:
                log.write_bytes(raw[:at] + b"anSwer 1" + raw[at + 8 :])
        assert buffer.get(ids[0]).answer == "answer 0"
        with pytest.raises(CorruptionError, match=f"experience {ids[1]}"):
            buffer.get(ids[1])
        with pytest.raises(CorruptionError):
            list(buffer)
        assert find(buffer, 1)[0].id == ids[1]
        with pytest.raises(CorruptionError):
            find(buffer, 1)[0].experience  # noqa: B018  (decodes)


# ---------------------------------------------------------------- payloads


class Colour(enum.IntEnum):
    RED = 3


class Name(str, enum.Enum):
    FIRST = "first"


class Half(float):
    pass


TREES: dict[str, Any] = {
    "null": [None, True, False],
    "integers": [0, -1, 2**63, -(2**63), 2**200, 10**300],
    "floats": [0.1, -0.0, 1e-320, 1e308, math.inf, -math.inf],
    "text": ["", "ünï ✓ 𝕏", "\0", '"\\', "\ud800", "\u2028", "x" * 10_000],
    "bytes": [b"", b"\0\xff", b"y" * 5000],
    "tuples": [(), (1,), (1, (2, [3, (4,)]))],
    "dollars": {"$nd": 0, "$bytes": 1, "$tuple": [1], "$": 2, "$$x": {"$$": 3}},
    "empty": [[], {}, "", (), b""],
    "keys": {"": 1, " ": 2, "ключ": 3, "a.b": 4, "\ud800": 5},
    "nested": {"a": [{"b": ({"c": [b"d"]},)}]},
}

ARRAYS: list[Any] = [
    np.arange(6, dtype=np.int8).reshape(2, 3),
    np.array([1.5, np.nan, np.inf], np.float16),
    np.array(7),
    np.array(2.5, np.float32),
    np.empty((0, 3), np.float64),
    np.empty((2, 0), np.int64),
    np.array([True, False]),
    np.array([1 + 2j], np.complex64),
    np.array([1, 2], ">u2"),
    np.arange(12.0).reshape(3, 4).T,
    np.arange(12)[::-2],
    np.array(["a", "bcd"]),
    np.array([b"a", b"bcd"]),
    np.array(["2024-01-01"], "M8[D]"),
    np.zeros((2, 1, 3, 1), np.uint64),
]


@pytest.mark.parametrize("name", TREES)
@pytest.mark.parametrize("way", ["object", "columns"])
def test_trees_come_back(open_buffer: OpenBuffer, name: str, way: str) -> None:
    tree = TREES[name]
    with open_buffer() as buffer:
        if way == "object":
            id_ = buffer.add(experience(0, answer=tree, trajectory=tree, metadata={"x": tree}))
        else:
            same = {"answer": [tree], "trajectory": [tree], "metadata": [{"x": tree}]}
            id_ = int(buffer.add_many({**columns(range(1)), **same})[0])
    with open_buffer() as buffer:
        found = buffer.get(id_)
        for value in (found.answer, found.trajectory, found.metadata["x"]):  # type: ignore[index]
            assert value == tree
            assert repr(value) == repr(tree)


@pytest.mark.parametrize("array", ARRAYS, ids=lambda a: f"{a.dtype}{a.shape}")
def test_arrays_come_back(open_buffer: Any, array: Any) -> None:
    buffer = open_buffer.memory()
    for id_ in (
        buffer.add(experience(0, trajectory=[array, {"x": array}])),
        *buffer.add_many({**columns(range(1)), "trajectory": [[array, {"x": array}]]}),
    ):
        first, second = buffer.get(int(id_)).trajectory
        for found in (first, second["x"]):
            assert found.dtype == array.dtype
            assert found.shape == array.shape
            np.testing.assert_array_equal(found, array)
            if found.size:
                found[...] = np.zeros_like(found)  # a copy of the caller's own
        np.testing.assert_array_equal(buffer.get(int(id_)).trajectory[0].shape, array.shape)


def test_relatives_of_plain_values_are_stored_as_these(open_buffer: Any) -> None:
    buffer = open_buffer.memory()
    given = {
        "enum": Colour.RED,
        "text enum": Name.FIRST,
        "float": Half(0.5),
        "ordered": OrderedDict(b=1, a=2),
        "numpy": [np.float32(0.5), np.int64(7), np.bool_(True), np.str_("x")],
        "view": memoryview(b"abc"),
        "bytearray": bytearray(b"abc"),
    }
    found = buffer.get(buffer.add(experience(0, answer=given))).answer
    assert found == {
        "enum": 3,
        "text enum": "first",
        "float": 0.5,
        "ordered": {"b": 1, "a": 2},
        "numpy": [0.5, 7, True, "x"],
        "view": b"abc",
        "bytearray": b"abc",
    }
    assert list(found["ordered"]) == ["b", "a"]
    assert [type(x) for x in found["numpy"]] == [float, int, bool, str]
    assert type(found["enum"]) is int


def test_nan_comes_back(open_buffer: Any) -> None:
    buffer = open_buffer.memory()
    found = buffer.get(buffer.add(experience(0, answer=[math.nan, {"x": math.nan}])))
    assert math.isnan(found.answer[0])
    assert math.isnan(found.answer[1]["x"])


def test_deep_trees_come_back(open_buffer: Any) -> None:
    buffer = open_buffer.memory()
    tree: Any = "leaf"
    for i in range(95):
        tree = [tree] if i % 3 else {"x": (tree,)} if i % 2 else {"x": tree}
    depth = buffer.get(buffer.add(experience(0, answer=[1] * 5))).answer
    assert depth == [1] * 5
    shallow: Any = "leaf"
    for _ in range(60):
        shallow = [shallow]
    assert buffer.get(buffer.add(experience(0, answer=shallow))).answer == shallow


leaves = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(st.characters(codec=None, exclude_categories=()))
    | st.binary()
)
trees = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=3) | st.sampled_from(["$nd", "$tuple", "$"]), inner)
    ),
    max_leaves=20,
)
_shared: dict[str, ExperienceBuffer] = {}


@given(tree=trees)
def test_any_tree_comes_back(tree: Any) -> None:
    buffer = _shared.setdefault("buffer", ExperienceBuffer.open(max_size=5))
    for way in ("object", "columns"):
        if way == "object":
            id_ = buffer.add(experience(0, answer=tree))
        else:
            id_ = int(buffer.add_many({**columns(range(1)), "answer": [tree]})[0])
        found = buffer.get(id_).answer
        assert found == tree
        assert repr(found) == repr(tree)


@pytest.mark.parametrize("durability", ["group", "os"])
@pytest.mark.parametrize("backend", ["file", "lmdb"])
def test_numbers_that_were_lost_do_not_come_again_behind_a_session_that_used_none(
    open_buffer: OpenBuffer, folder: Path, backend: str, durability: str
) -> None:
    """The first opening behind a power loss leaves some out, and closes in order."""
    pytest.importorskip(f"expbuf_{backend}")
    image = folder.with_name("image")
    writer = open_buffer(persistence=backend, durability=durability, group_interval_ms=60_000)
    writer.add(experience(0))
    shutil.copytree(folder, image, ignore=shutil.ignore_patterns("*.tmp"))
    lost = writer.add(experience(1))  # acknowledged, and not on the disk when the power fails
    lsn = writer.lsn
    for _ in range(3):
        with ExperienceBuffer.open(image) as buffer:
            assert len(buffer) == 1
    with ExperienceBuffer.open(image) as buffer:
        assert buffer.recovery.clean
        assert buffer.add(experience(1)) > lost
        assert buffer.lsn > lsn
