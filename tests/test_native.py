"""Native code and Python do the same: what is plain byte by byte, what is not is left to Python."""

from __future__ import annotations

import gc
import os
import shutil
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from expbuf_core import Experience, ExperienceBuffer, codec, control, frames
from expbuf_core.builtin.fusions import FusionSettings, WeightedConcat, WeightedSum
from expbuf_core.builtin.scorers import WeightedSumScorer, WeightedSumSettings
from expbuf_core.contracts import Operation, Stamped, one_by_one
from expbuf_core.crc import crc32
from expbuf_core.errors import ExpbufError, StorageError
from expbuf_core.intake import Accepted, Intake
from expbuf_core.native import FITS, misfit, native, why_not
from expbuf_core.testing.faults import FaultyFileSystem
from expbuf_file import layout
from expbuf_file.logfile import BadFrame, LogFile

pytestmark = pytest.mark.skipif(native is None, reason=f"no native code: {why_not}")

NOW = 1_700_000_000.0
CONFIG: dict[str, Any] = {"max_size": 10_000, "index": {"backend": "exact", "builder": "off"}}


# ---------------------------------------------------------------- numbers that both know


def test_words_and_sizes_agree() -> None:
    assert native is not None
    names = "GENERATION APPENDED NEXT_ID PUBLISHED DURABLE APPENDING FLUSHING FLUSH_FAILED"
    names += " RETIREMENTS RESERVED_ID RESERVED_LSN ROWS_ADDED WAITING_TO_APPEND"
    names += " WAITING_FOR_FLUSH NEXT_LSN ADAPTER"
    for name in names.split():
        assert getattr(native, f"W_{name}") == getattr(control, name), name
    assert native.W_COUNT == control.WORDS
    assert native.PAGE_BYTES == control.PAGE_BYTES
    assert native.MAGIC == frames.MAGIC
    assert native.FRAME_HEADER == frames.HEADER_BYTES
    assert native.ROW_HEADER == frames.ROW_HEADER_BYTES
    assert native.LOG_BEGIN == frames.LOG_BEGIN
    assert native.KIND_ADD == codec.ADD
    assert native.END_BYTES == layout.END_BYTES
    assert native.A_FIELDS == len(Accepted._fields)


def test_crc(rng: np.random.Generator) -> None:
    assert native is not None
    data = rng.bytes(70_000)
    for n in [*range(300), 1023, 4096, 65_537]:
        for at in (0, 1, 3, 8):
            part = memoryview(data)[at : at + n]
            assert native.crc32(part) == zlib.crc32(part)
            assert native.crc32(part, 0xDEADBEEF) == zlib.crc32(part, 0xDEADBEEF)


# ---------------------------------------------------------------- an experience

V_DIM, Q_DIM = 6, 6
INTAKES: dict[str, dict[str, Any]] = {
    "sum": {},
    "sum, as they are": {"fusion": WeightedSum(FusionSettings(normalize_parts=False))},
    "concat": {"fusion": WeightedConcat(FusionSettings(visual_weight=0.4)), "q_dim": 3},
    "l2": {"metric": "l2", "fusion": WeightedSum(FusionSettings(normalize_parts=False))},
    "one part": {"q_dim": 0},
    "another scorer": {"scorer": lambda batch: np.ones(len(batch))},
}


def intake(**changed: Any) -> Intake:
    arguments: dict[str, Any] = {
        "v_dim": V_DIM,
        "q_dim": Q_DIM,
        "metric": "cosine",
        "fusion": WeightedSum(FusionSettings()),
        "scorer": WeightedSumScorer(WeightedSumSettings(reward_scale=0.3)),
        "max_experience_bytes": 4000,
        "max_commit_bytes": 1 << 24,
        **changed,
    }
    return Intake(**arguments)


def pure(**changed: Any) -> Intake:
    made = intake(**changed)
    made._encoder = None
    return made


def outcome(made: Intake, experience: Experience, priority: Any) -> Accepted | str:
    try:
        return made.accept(experience, priority)
    except ExpbufError as exc:
        return f"{type(exc).__name__}: {exc}"


def assert_same(found: Accepted | str, wanted: Accepted | str) -> None:
    if isinstance(found, str) or isinstance(wanted, str):
        assert found == wanted
        return
    for name in ("row", "crc", "tags", "key", "timestamp", "confidence", "priority"):
        assert getattr(found, name) == getattr(wanted, name), name
    assert found.reward == wanted.reward or (np.isnan(found.reward) and np.isnan(wanted.reward))
    vectors = [np.frombuffer(each.vector, np.float32) for each in (found, wanted)]
    np.testing.assert_allclose(*vectors, rtol=2e-6, atol=1e-7)


texts = st.text(st.characters(), max_size=20)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | texts
numpys = st.sampled_from(
    [
        np.float16(0.1),
        np.float32(0.1),
        np.float64(0.1),
        np.float32(np.nan),
        np.float64(-np.inf),
        np.longdouble(0.1),
        np.int8(-1),
        np.uint64(2**64 - 1),
        np.int64(1),
        np.bool_(True),
        np.complex64(1j),
        np.str_("a"),
        np.datetime64("2020-01-01"),
        np.arange(6, dtype=np.int32).reshape(2, 3).T,
        np.arange(4, dtype=">f4")[::2],
        np.zeros((0, 2), np.uint8),
        np.array(1.5),
        np.array([True]),
        np.array(["a"]),
        np.array([None]),
        np.array(["2020-01-01"], "M8[D]"),
        np.array([(1, 2)], "i4,f4"),
        np.ma.MaskedArray([1, 2], [False, True]),
    ]
)
odd = st.tuples(st.integers(), texts) | st.binary(max_size=5) | st.just(1 << 80) | numpys
trees = st.recursive(
    scalars | odd,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(texts, inner, max_size=4)
    ),
    max_leaves=10,
)
numbers = st.floats(0, 1) | st.integers(0, 1) | st.floats() | st.booleans() | st.just("x") | numpys
parts = st.sampled_from(
    [
        np.linspace(-1, 1, V_DIM, dtype=np.float32),
        np.linspace(2, 3, V_DIM, dtype=np.float32),
        np.linspace(2, 3, V_DIM),
        np.full(V_DIM, 1e39),
        np.full(V_DIM, 1e-42),
        np.linspace(2, 3, 2 * V_DIM)[::2],
        np.linspace(2, 3, V_DIM, dtype=np.float16),
        np.linspace(2, 3, 3, dtype=np.float32),
        np.linspace(2, 3, 2 * V_DIM, dtype=np.float32)[::2],
        np.zeros(V_DIM, np.float32),
        np.full(V_DIM, 1e-30, np.float32),
        np.full(V_DIM, 3e38, np.float32),
        np.array([1, 2, np.nan, 0, 0, 0], np.float32),
        np.array([1, 2, -np.inf, 0, 0, 0], np.float32),
        np.ones((1, V_DIM), np.float32),
        np.ones(V_DIM, ">f4"),
        [1.0] * V_DIM,
        None,
    ]
)


@st.composite
def experiences(draw: st.DrawFn) -> Experience:
    """Ordinary for the most part, with an oddity here and there."""
    fields: dict[str, Any] = {
        "v_embed": draw(parts),
        "q_embed": draw(parts),
        "question": draw(texts),
    }
    rare: dict[str, st.SearchStrategy[Any]] = {
        "answer": trees | odd,
        "trajectory": trees | odd,
        "metadata": st.dictionaries(texts, trees, max_size=3) | odd,
        "rewards": numbers | st.dictionaries(texts, numbers, max_size=4),
        "confidence": numbers,
        "probabilities": st.just(np.array([0.25, 0.75], np.float32)),
        "tags": st.lists(texts, max_size=3).map(tuple) | st.lists(texts, max_size=3) | odd,
        "image": texts | st.binary(max_size=4) | numpys,
        "key": texts | odd,
        "timestamp": st.floats(0, 4e9) | st.integers(0, 1 << 40) | numbers,
        "id": st.integers(0, 3),
    }
    for name in draw(st.sets(st.sampled_from(sorted(rare)), max_size=4)):
        fields[name] = draw(rare[name])
    return Experience(**fields)


@pytest.mark.parametrize("kind", INTAKES)
@given(experience=experiences(), priority=st.none() | numbers)
def test_whatever_comes_in(kind: str, experience: Experience, priority: Any) -> None:
    both = [make(**INTAKES[kind]) for make in (intake, pure)]
    with mock.patch("time.time", return_value=NOW):
        found, wanted = (outcome(made, experience, priority) for made in both)
    if isinstance(found, Accepted) and isinstance(wanted, Accepted) and wanted.timestamp < NOW:
        # Its age counts, by a function that numpy and C may round differently.
        assert found.priority == pytest.approx(wanted.priority, rel=1e-14, abs=0)
        found = found._replace(priority=wanted.priority)
    assert_same(found, wanted)


PLAIN: list[dict[str, Any]] = [
    {"question": 'what is it? «ü» \U0001f600 "\\\n\r\t\b\f\x00\x1f\x7f/'},
    {"answer": "a cat", "rewards": {"exact": 1.0, "format": -0.25, "length": 3}},
    {"answer": {"choices": [1, -2.5, 1e300, True, None]}, "rewards": 2},
    {"trajectory": [{"step": i, "thought": "t" * i} for i in range(9)], "confidence": 0},
    {"metadata": {"source": "web", "nested": {"": []}}, "tags": ("a", "b"), "key": "k"},
    {"image": "a.png", "answer": "", "rewards": {}, "metadata": {}},
    {"answer": 2**63 - 1, "confidence": 0.1},
    {"confidence": np.float32(0.3), "rewards": {"a": np.float64(0.1), "b": np.float32(0.1)}},
    {"confidence": np.float64(1), "rewards": np.int64(-3), "answer": np.float16(0.1)},
    {"answer": ("a", (1, [])), "trajectory": [("s", 0, 0.5), ("t", 1, -0.5)]},
    {"image": b"\x89PNG\0", "metadata": {"thumbnail": np.zeros((4, 4, 3), np.uint8), "b": b""}},
    {"trajectory": [{"state": np.arange(4.0), "at": np.array(1)}, np.arange(6).reshape(2, 3).T]},
    {"metadata": {"loss": np.float32(0.1), "n": np.uint64(2**63 - 1), "x": np.ones(2, ">i2")}},
    {"v_embed": np.linspace(-1, 1, V_DIM), "q_embed": np.linspace(1, 1e-40, V_DIM)},
    {"question": 'é"\\\n\x01' * 300, "answer": "a" * 5000 + '"\n', "image": bytes(5000)},
]


@pytest.mark.parametrize("fields", PLAIN)
def test_what_is_plain_is_done_natively(fields: dict[str, Any]) -> None:
    roomy: dict[str, Any] = {"max_experience_bytes": 1 << 20}
    made, v = intake(**roomy), np.linspace(-1, 1, V_DIM, dtype=np.float32)
    experience = Experience(**{"v_embed": v, "q_embed": v + 2, "timestamp": NOW + 1e9, **fields})
    assert made._encoder is not None
    accepted = made._encoder.accept(experience, None, NOW)
    assert accepted is not None
    assert_same(accepted, pure(**roomy).accept(experience, None))
    given = made._encoder.accept(experience, 0.5, NOW)
    assert given is not None
    assert_same(given, pure(**roomy).accept(experience, 0.5))
    size = len(accepted.row)
    for most, fits in ((size, True), (size - 1, False)):
        made = intake(max_experience_bytes=most)
        assert made._encoder is not None
        assert (made._encoder.accept(experience, None, NOW) is not None) == fits


@pytest.mark.parametrize("ago", [-5.0, 1e-3, 1.0, 86_400.0, 1e9, 1e300])
@pytest.mark.parametrize("weight", [0.0, 0.2, 3.0])
def test_its_age_counts(ago: float, weight: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.time", lambda: NOW)
    scorer = WeightedSumScorer(WeightedSumSettings(age_weight=weight, age_half_life_s=3600.0))
    v = np.ones(V_DIM, np.float32)
    given: dict[str, Any] = {"confidence": 0.3, "rewards": -2.0, "timestamp": NOW - ago}
    experience = Experience(v_embed=v, q_embed=v, **given)
    made = intake(scorer=scorer)
    assert made._encoder is not None
    found = made._encoder.accept(experience, None, NOW)
    wanted = pure(scorer=scorer).accept(experience, None)
    assert found is not None
    assert found.timestamp == wanted.timestamp
    assert found.priority == pytest.approx(wanted.priority, rel=1e-14 if weight else 0, abs=0)


def test_who_changes_what_is_being_added() -> None:
    """In the middle of it, as a finalizer may that the garbage collector runs (3.11 and older)."""
    made, v = intake(max_experience_bytes=1 << 20), np.ones(V_DIM, np.float32)
    assert made._encoder is not None
    tree: dict[str, Any] = {str(i): [np.ones(2), [np.ones(2)]] for i in range(9)}
    changes = iter(range(1 << 30))

    def meddle(phase: str, _: dict[str, int]) -> None:
        i = next(changes)
        tree.pop(f"x{i - 1}", None)
        tree.update({str(k): [np.ones(3), [np.ones(i % 3)]] for k in range(9)})
        if i % 7 == 0:
            tree[f"x{i}"] = []

    threshold = gc.get_threshold()
    experience = Experience(v_embed=v, q_embed=v, answer=tree)
    gc.collect()
    gc.freeze()  # each collection has little to look at
    gc.callbacks.append(meddle)
    gc.set_threshold(1)
    try:
        for _ in range(20):
            accepted = made._encoder.accept(experience, None, NOW)
            assert accepted is None or codec.decode_row(accepted.row).fields["answer"]
    finally:
        gc.set_threshold(*threshold)
        gc.callbacks.remove(meddle)
        gc.unfreeze()


ODD: list[dict[str, Any]] = [
    {"question": "\ud800"},
    {"answer": np.array([None])},
    {"answer": np.array(["a"])},
    {"answer": np.str_("a")},
    {"answer": np.bool_(True)},
    {"answer": np.longdouble(1)},
    {"answer": np.float32(np.nan)},
    {"answer": bytearray(b"a")},
    {"answer": np.ma.MaskedArray([1])},
    {"answer": {"$nd": 0}},
    {"answer": 2**63},
    {"answer": float("nan")},
    {"answer": {1: 2}},
    {"answer": [[]] * 1 + [np.uint64(2**63)]},
    {"rewards": np.bool_(True)},
    {"confidence": np.float32(1.5)},
    {"rewards": float("nan")},
    {"rewards": {"a": True}},
    {"rewards": {"a": 1.7e308, "b": 1.7e308}},
    {"confidence": True},
    {"confidence": 1.5},
    {"metadata": [1]},
    {"tags": {"a"}},
    {"key": 3},
    {"image": np.zeros((2, 2), np.uint8)},
    {"image": bytes(4000)},
    {"v_embed": np.full(V_DIM, 1e39)},
    {"id": 0},
    {"probabilities": np.array([0.5, 0.5], np.float32)},
    {"question": "q" * 4000},
]


@pytest.mark.parametrize("fields", ODD)
def test_what_is_not_plain_is_left_alone(fields: dict[str, Any]) -> None:
    made, v = intake(), np.linspace(-1, 1, V_DIM, dtype=np.float32)
    experience = Experience(**{"v_embed": v, "q_embed": v + 2, "timestamp": NOW + 1e9, **fields})
    assert made._encoder is not None
    assert made._encoder.accept(experience, None, NOW) is None


@pytest.mark.parametrize("odd", [None, {"answer": 2**63}])
def test_several_at_once(odd: dict[str, Any] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    v = np.linspace(-1, 1, V_DIM, dtype=np.float32)
    fields = [*PLAIN, *([] if odd is None else [odd])]
    given = [
        Experience(**{"v_embed": v + i, "q_embed": v - i, "timestamp": NOW + 1e9, **each})
        for i, each in enumerate(fields)
    ]
    monkeypatch.setattr(time, "time", lambda: NOW)
    found, wanted = (
        make(max_experience_bytes=1 << 20).many(given, None) for make in (intake, pure)
    )
    assert found.rows == wanted.rows
    assert found.content_crcs == wanted.content_crcs
    assert found.weight == wanted.weight == len(given)
    bodies = [codec.decode_add(each.operation.body) for each in (found, wanted)]
    assert bodies[0].labels == bodies[1].labels
    for name in ("timestamp", "reward", "confidence", "priority", "vectors"):
        columns = [getattr(body, name) for body in bodies]
        np.testing.assert_allclose(*columns, rtol=2e-6, atol=1e-7)
    without_time = [Experience(v_embed=v, q_embed=v + 1)] * 3
    now = codec.decode_add(intake().many(without_time, None).operation.body).timestamp
    assert now.tolist() == [NOW] * 3


def test_too_deep_is_left_alone() -> None:
    tree: Any = []
    for _ in range(200):
        tree = [tree]
    made, v = intake(), np.ones(V_DIM, np.float32)
    assert made._encoder is not None
    experience = Experience(v_embed=v, q_embed=v, answer=tree)
    assert made._encoder.accept(experience, None, NOW) is None


@pytest.mark.parametrize("nth", range(1, 9))
@pytest.mark.parametrize("number", [2.0, np.nan])
def test_what_changes_while_it_is_encoded(nth: int, number: float) -> None:
    """The collector may run anything in between: what is accepted fits together all the same."""
    fusion = WeightedSum(FusionSettings())
    made = intake(metric="inner_product", fusion=fusion, v_dim=3, q_dim=3)
    assert made._encoder is not None
    v, q, tags = np.ones(3, np.float32), np.ones(3, np.float32), ["a"]
    experience = Experience(v_embed=v, q_embed=q, rewards={"a": 1.0}, tags=tags)  # type: ignore[arg-type]
    runs = 0
    kept: list[list[int]] = [[] for _ in range(1000)]  # none can be had for free any more

    def change(phase: str, info: dict[str, int]) -> None:
        nonlocal runs
        runs += phase == "start"
        if runs == nth:
            v[:] = number
            tags.append("b")
        kept.extend([] for _ in range(10))  # it comes again at once

    usual = gc.get_threshold()
    gc.callbacks.append(change)
    try:
        gc.set_threshold(1)
        accepted = made._encoder.accept(experience, None, NOW)
    finally:
        gc.set_threshold(*usual)
        gc.callbacks.remove(change)
    if accepted is None:  # Python says what is wrong
        assert np.isnan(number)
        return
    row = codec.decode_row(accepted.row)
    assert list(row.fields["tags"]) == accepted.tags
    parts = codec.decode_embeddings([accepted.row], "v_embed", "q_embed")
    assert np.isfinite(parts).all()
    wanted = fusion(*parts)[0]
    np.testing.assert_allclose(np.frombuffer(accepted.vector, np.float32), wanted, rtol=1e-6)


def test_subclasses_are_left_alone() -> None:
    """They may do anything: of experiences, arrays, fusions, scorers."""

    class Mine(Experience):
        pass

    class Sum(WeightedSum):
        pass

    class Scorer(WeightedSumScorer):
        pass

    class Array(np.ndarray):  # type: ignore[type-arg]
        pass

    v = np.ones(V_DIM, np.float32)
    made = intake()
    assert made._encoder is not None
    assert made._encoder.accept(Mine(v_embed=v, q_embed=v), None, NOW) is None
    assert made._encoder.accept(Experience(v_embed=v.view(Array), q_embed=v), None, NOW) is None
    assert intake(fusion=Sum(FusionSettings()))._encoder is None
    scored = intake(scorer=Scorer(WeightedSumSettings()))
    assert scored._encoder is not None
    assert scored._encoder.accept(Experience(v_embed=v, q_embed=v), None, NOW) is None
    assert scored._encoder.accept(Experience(v_embed=v, q_embed=v), 1.0, NOW) is not None


# ---------------------------------------------------------------- the log


def filled(path: Path, rng: np.random.Generator, n: int = 150, **settings: Any) -> list[Experience]:
    """Experiences in a buffer, added by several threads, so that some share an operation."""
    vectors = rng.standard_normal((n, 2, 8)).astype(np.float32)
    given = [
        Experience(
            v_embed=v,
            q_embed=q,
            question=f"question {i} é" * (1 + i % 3 * (i > 60)),
            answer={"i": i},
            tags=("t",) if i % 50 == 7 else (),
            key=f"k{i}" if i % 60 == 3 else None,
            rewards=i / n if i % 5 else None,
        )
        for i, (v, q) in enumerate(vectors)
    ]
    with ExperienceBuffer.open(path, **{**CONFIG, **settings}) as buffer:
        buffer.add(given[0])
        assert buffer._session.commit_log._native is not None
        ids = {buffer.add(experience): i for i, experience in enumerate(given[1:50], 1)}
        threads = [
            threading.Thread(
                target=lambda k=k: ids.update(
                    {buffer.add(given[i]): i for i in range(50 + k, n, 5)}
                )
            )
            for k in range(5)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for id_, i in ids.items():
            found = buffer.get(id_)
            assert (found.question, found.answer) == (given[i].question, given[i].answer)
            assert (found.key, found.tags) == (given[i].key, given[i].tags)
            np.testing.assert_array_equal(found.v_embed, vectors[i, 0])
    return given


def check_frames(folder: Path) -> tuple[int, int]:
    """See that the logs are what Python would write; how many adds, and how many rows of theirs."""
    adds = rows_added = 0
    for number in layout.numbers(folder, layout.DATA):
        logs = [LogFile(folder, log, number, None) for log in (layout.DATA, layout.INDEX)]
        data, index = (log.path.read_bytes() for log in logs)
        index_at = layout.HEADER_BYTES
        for frame in logs[0].frames(layout.HEADER_BYTES, logs[0].size(), rows=True):
            if isinstance(frame, BadFrame) or frame.header.kind == frames.LOG_END:
                break
            header, body, lengths = frame.header, frame.body, frame.lengths
            rows_at = header.rows_offset
            rows = bytearray(data[rows_at : rows_at + header.rows_len])
            crcs = codec.content_crcs(rows, lengths)
            seals = frames.stamp_rows(rows, lengths, crcs, header.first_id)
            operation = Operation(header.kind, body, crc32(body), bytes(rows), lengths, seals)
            parts, index_parts, size, index_size = frames.encode(
                Stamped(header.lsn, header.first_id, operation),
                salt=logs[0].header.salt,
                epoch=number,
                durable_before=header.durable_before,
                data_offset=frame.offset,
            )
            assert data[frame.offset : frame.offset + size] == b"".join(map(bytes, parts))
            found = index[index_at : index_at + index_size]
            assert found == b"".join(map(bytes, index_parts))
            index_at += index_size
            if header.kind == codec.ADD:
                adds += 1
                rows_added += len(lengths)
                assert codec.encode_add(codec.decode_add(body)) == body
    return adds, rows_added


@pytest.mark.parametrize("durability", ["sync", "group", "os"])
def test_frames_are_what_python_would_write(
    durability: str, tmp_path: Path, rng: np.random.Generator
) -> None:
    filled(tmp_path / "b", rng, durability=durability)
    assert check_frames(tmp_path / "b")[1] == 150


def scanned(log: LogFile, *, rows: bool, start: int) -> tuple[list[Any], int]:
    """All that can be read of a log file, and where that ends."""
    found: list[Any] = []
    at, limit = start, log.size()
    while True:
        items, after = log.alike(at, limit, rows=rows)
        if not items:
            return found, at
        for operation in one_by_one(iter(items)):
            found.append(
                (*operation[:3], bytes(operation.body), operation.location, list(operation.lengths))
            )
        at = after


@pytest.mark.parametrize("log", [layout.DATA, layout.INDEX])
def test_scanning_whole_and_damaged(
    log: str, tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "b"
    filled(folder, rng)
    number = max(layout.numbers(folder, log))
    path = layout.path_of(folder, log, number)
    whole = path.read_bytes()
    begin = LogFile(folder, log, number, None).begin()
    assert begin is not None
    runs = []

    class Counting:
        @staticmethod
        def run(*args: Any) -> Any:
            assert native is not None
            found = native.run(*args)
            runs.append(found is not None)
            return found

    for case in range(80):
        raw = bytearray(whole)
        at = int(rng.integers(layout.HEADER_BYTES, len(raw)))
        if case % 4 == 1:
            raw[at] ^= 1 << int(rng.integers(8))
        elif case % 4 == 2:
            raw[at : at + 64] = bytes(len(raw[at : at + 64]))
        elif case % 4 == 3:
            del raw[at:]
        path.write_bytes(raw)
        for rows in (log == layout.DATA, False):
            results = []
            for code in (Counting, None):
                monkeypatch.setattr(frames, "native", code)
                results.append(
                    scanned(LogFile(folder, log, number, None), rows=rows, start=begin.end)
                )
            assert results[0] == results[1]
    assert sum(runs) > 80


# ---------------------------------------------------------------- together

THREADS = 8
TIMEOUT_S = 30.0


class Disk(FaultyFileSystem):
    """A sync lasts until it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.syncs, self.held, self.go_on = 0, threading.Event(), threading.Event()
        self.go_on.set()

    def fdatasync(self, fd: int) -> None:
        self.syncs += 1
        self.held.set()
        assert self.go_on.wait(TIMEOUT_S)
        super().fdatasync(fd)


def plain(serial: int, **fields: Any) -> Experience:
    vector = np.random.default_rng(serial).standard_normal(8).astype(np.float32)
    return Experience(v_embed=vector, q_embed=vector, answer=serial, **fields)


class Crowd:
    """Threads that add while the first of them waits for the disk."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.disk = Disk()
        self.buffer = ExperienceBuffer.open(folder, **CONFIG, filesystem=self.disk, **settings)
        self.buffer.add(plain(0))
        self.results: dict[int, int | BaseException] = {}
        self.threads: list[threading.Thread] = []

    def add(self, experience: Experience) -> None:
        def run() -> None:
            serial: Any = experience.answer
            try:
                self.results[serial] = self.buffer.add(experience)
            except BaseException as exc:
                self.results[serial] = exc

        self.threads.append(threading.Thread(target=run))
        self.threads[-1].start()

    def gather(self, experiences: list[Experience]) -> None:
        """Until all have come: the first is being synced."""
        log = self.buffer._session.commit_log._native
        assert log is not None
        self.disk.held.clear()
        self.disk.go_on.clear()
        self.add(plain(100 + len(self.threads)))
        assert self.disk.held.wait(TIMEOUT_S)
        for experience in experiences:
            self.add(experience)
        deadline = time.monotonic() + TIMEOUT_S
        while log.inside < 1 + len(experiences):
            assert time.monotonic() < deadline
            time.sleep(1e-3)

    def disperse(self) -> None:
        self.disk.go_on.set()
        for thread in self.threads:
            thread.join(TIMEOUT_S)
            assert not thread.is_alive()


def test_one_sync_for_all_that_came_meanwhile(tmp_path: Path) -> None:
    crowd = Crowd(tmp_path / "b")
    before = crowd.disk.syncs
    tagged = [plain(i, tags=("t",), key=f"k{i}") for i in range(1, 3)]
    crowd.gather(tagged + [plain(i) for i in range(3, 1 + THREADS)])
    crowd.disperse()
    assert crowd.disk.syncs - before <= 3  # the first; the others; one that was late, perhaps
    with crowd.buffer as buffer:
        assert sorted(map(str, crowd.results.values())) == sorted(map(str, range(1, THREADS + 2)))
        for serial, id_ in crowd.results.items():
            assert isinstance(id_, int)
            assert buffer.get(id_).answer == serial
            assert buffer.get(id_).key == (f"k{serial}" if serial < 3 else None)
        assert len(buffer) == THREADS + 2
    with ExperienceBuffer.open(tmp_path / "b") as again:
        assert len(again) == THREADS + 2


def test_many_that_come_again_share_operations(tmp_path: Path) -> None:
    """How many, depends on how many there were at the end of the sync before: tried some times."""
    crowd = Crowd(tmp_path / "b")
    operations = rows = round_ = 0
    while operations == rows and round_ < 10:
        crowd.gather([plain(i + 10 * round_) for i in range(1, 1 + THREADS)])
        crowd.disperse()
        round_ += 1
        operations, rows = check_frames(tmp_path / "b")
        assert rows == 1 + round_ * (THREADS + 1)
    assert operations < rows
    assert sorted(map(int, crowd.results.values())) == list(range(1, rows))  # type: ignore[arg-type]
    crowd.buffer.close()


def test_a_sync_that_fails_fails_for_all(tmp_path: Path) -> None:
    crowd = Crowd(tmp_path / "b")
    crowd.gather([plain(i) for i in range(1, THREADS)])
    crowd.disk.fail("fdatasync")
    crowd.disperse()
    crowd.disk.clear()
    with crowd.buffer as buffer:
        failed = {k for k, v in crowd.results.items() if isinstance(v, StorageError)}
        assert failed
        assert all("sync" in str(crowd.results[serial]) for serial in failed)
        later = buffer.add(plain(200))
        assert buffer.stats()["log_retirements"] >= 1
        stored = {e.answer for e in buffer}
        assert {k for k in crowd.results if k not in failed} <= stored
        assert not failed & stored
        assert buffer.get(later).answer == 200
    with ExperienceBuffer.open(tmp_path / "b") as again:
        assert {e.answer for e in again} == stored


class Interrupt(BaseException):
    """As KeyboardInterrupt is: no Exception."""


def test_an_interrupt_is_for_the_thread_that_it_came_to(tmp_path: Path) -> None:
    crowd = Crowd(tmp_path / "b")
    crowd.gather([plain(i) for i in range(1, 1 + THREADS)])
    sync, wanted = crowd.disk.fdatasync, crowd.disk.syncs + 1

    def fdatasync(fd: int) -> None:
        if crowd.disk.syncs == wanted - 1:  # of all that came meanwhile
            crowd.disk.syncs += 1
            raise Interrupt
        sync(fd)

    crowd.disk.fdatasync = fdatasync  # type: ignore[method-assign]
    crowd.disperse()
    with crowd.buffer as buffer:
        raised = [x for x in crowd.results.values() if isinstance(x, BaseException)]
        assert sum(isinstance(x, Interrupt) for x in raised) == 1
        assert len(raised) > 1
        for other in raised:
            assert isinstance(other, Interrupt | StorageError)
            assert isinstance(other, Interrupt) or "was interrupted" in str(other)
        buffer.add(plain(200))


def test_what_does_not_fit_the_disk_takes_no_others_along(tmp_path: Path) -> None:
    crowd = Crowd(tmp_path / "b")
    crowd.gather([plain(i) for i in range(1, 4)])
    crowd.disk.fail("pwritev", times=1)
    crowd.disperse()
    crowd.disk.clear()
    with crowd.buffer as buffer:
        failed = [v for v in crowd.results.values() if isinstance(v, Exception)]
        assert len(failed) <= 1
        assert len(buffer) == 5 - len(failed)


# ---------------------------------------------------------------- its mutex


def test_mutex_excludes_and_knows_its_owner() -> None:
    assert native is not None
    mutex, inside, most = native.Mutex(), [], []

    def work() -> None:
        for _ in range(2000):
            with mutex:
                assert mutex._is_owned()
                inside.append(1)
                most.append(len(inside))
                inside.pop()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(most) == 1
    assert not mutex._is_owned()
    with pytest.raises(RuntimeError, match="does not hold"):
        mutex.release()
    with mutex, pytest.raises(RuntimeError, match="already"):
        mutex.acquire()
    assert mutex.acquire(blocking=False)
    other: list[Any] = []
    thread = threading.Thread(
        target=lambda: other.extend(
            [mutex.acquire(False), mutex.acquire(timeout=0.01), mutex._is_owned()]
        )
    )
    thread.start()
    thread.join()
    assert other == [False, False, False]
    mutex.release()


# ---------------------------------------------------------------- without it


def test_what_was_built_for_another_version_is_not_used(tmp_path: Path) -> None:
    found = ModuleType("found")
    found.__file__ = "/there/_native.so"
    assert "its number is none" in misfit(found, tmp_path)  # before there was one
    found.FITS = FITS + 1  # type: ignore[attr-defined]
    assert misfit(found, tmp_path).endswith(f"its number is {FITS + 1}, expected {FITS}")
    found.FITS, source = FITS, tmp_path / "a.c"  # type: ignore[attr-defined]
    found.SOURCES = zlib.crc32(b"int a; int b;")  # type: ignore[attr-defined]
    assert not misfit(found, tmp_path)  # a wheel: no sources there
    source.write_bytes(b"int a; ")
    (tmp_path / "b.h").write_bytes(b"int b;")
    assert not misfit(found, tmp_path)
    source.write_bytes(b"int c; ")
    assert "other sources" in misfit(found, tmp_path)
    found.SOURCES = 0  # type: ignore[attr-defined]
    assert not misfit(found, tmp_path)  # compiled by hand: nobody knows


@pytest.mark.parametrize("what", ["as it is", "gone", "cut", "of another version"])
def test_works_with_whatever_lies_there(what: str, tmp_path: Path) -> None:
    import expbuf_core

    assert native is not None
    compiled = Path(native.__file__ or "")
    package = tmp_path / "expbuf_core"
    shutil.copytree(Path(expbuf_core.__file__).parent, package)
    there = package / "native" / compiled.name
    expected = ""
    if what == "gone":
        there.unlink()
        expected = "it was not compiled when"
    elif what == "cut":
        there.write_bytes(compiled.read_bytes()[:100])
        expected = compiled.name  # and what the system says
    elif what == "of another version":
        init = package / "native" / "__init__.py"
        text = init.read_text()
        assert f"\nFITS = {FITS}\n" in text
        init.write_text(text.replace(f"\nFITS = {FITS}\n", f"\nFITS = {FITS + 1}\n"))
        expected = f"its number is {FITS}, expected {FITS + 1}"
    code = (
        "import sys, numpy as np, expbuf_core\n"
        "assert expbuf_core.__file__.startswith(sys.argv[1]), expbuf_core.__file__\n"
        "from expbuf_core import Experience, ExperienceBuffer\n"
        "from expbuf_core.native import native, why_not\n"
        "v = np.ones(8, np.float32)\n"
        "with ExperienceBuffer.open(sys.argv[1] + '/b', index={'builder': 'off'}) as buffer:\n"
        "    buffer.add(Experience(v_embed=v, q_embed=v))\n"
        "print(native is None, why_not)\n"
    )
    path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": path},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{what != 'as it is'} ")
    assert expected in done.stdout


def test_without_native_code(tmp_path: Path, rng: np.random.Generator) -> None:
    """The same folder, by a process that has none."""
    given = filled(tmp_path / "b", rng)
    code = (
        "import sys, numpy as np\n"
        "from expbuf_core import Experience, ExperienceBuffer\n"
        "from expbuf_core.native import native, why_not\n"
        "assert native is None and why_not == 'EXPBUF_NATIVE=0'\n"
        "with ExperienceBuffer.open(sys.argv[1], index={'builder': 'off'}) as buffer:\n"
        "    assert len(buffer) == 150, len(buffer)\n"
        "    v = np.ones(8, np.float32)\n"
        "    print(buffer.add(Experience(v_embed=v, q_embed=v, question='pure')))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "b")],
        env={**os.environ, "EXPBUF_NATIVE": "0"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    with ExperienceBuffer.open(tmp_path / "b", **CONFIG) as buffer:
        assert buffer.get(int(done.stdout)).question == "pure"
        assert len(buffer) == len(given) + 1
