"""Exports and imports: nothing is lost, and other programs read them."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from expbuf_core import (
    BackendUnavailable,
    ConfigError,
    Experience,
    ExperienceBuffer,
    InvalidExperience,
    StorageError,
)
from expbuf_core.contracts import LogGone
from expbuf_core.exchange import export_experiences, import_experiences
from expbuf_core.exchange_formats import PARTS
from expbuf_core.exchange_records import COLUMNS, dumps, item_of, loads, record_of
from expbuf_core.frozen import Frozen
from expbuf_core.testing.crash import scratch_folder

SMALL: dict[str, Any] = {"persistence": {"file": {"initial_bytes": 1 << 14}}}
QUIET: dict[str, Any] = {
    "index": {"backend": "exact", "builder": "off"},
    "fusion": "weighted_concat",
    **SMALL,
}
KINDS = ["parquet", "jsonl"]


@pytest.fixture
def home() -> Iterator[Path]:
    folder = scratch_folder()
    yield folder
    shutil.rmtree(folder)


def same(left: Any, right: Any) -> bool:
    """Equal in every bit, and of one type."""
    if isinstance(left, np.ndarray) or isinstance(right, np.ndarray):
        return (left.dtype, left.shape, left.tobytes()) == (
            right.dtype,
            right.shape,
            right.tobytes(),
        )
    if type(left) is not type(right):
        return False
    if isinstance(left, dict):
        return list(left) == list(right) and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    return bool(left == right or (left != left and right != right))


def assert_same(left: ExperienceBuffer, right: ExperienceBuffer) -> None:
    assert left.ids().tolist() == right.ids().tolist()
    for one, other in zip(left, right, strict=True):
        for field in dataclasses.fields(Experience):
            values = getattr(one, field.name), getattr(other, field.name)
            assert same(*values), (one.id, field.name, *values)


def everything() -> list[Experience]:
    rng = np.random.default_rng(0)
    answers = [
        "a",
        {"x": np.arange(3), "t": (1, 2.5), "b": b"\0\1"},
        None,
        7,
        float("nan"),
        "\ud800",
    ]
    return [
        Experience(
            v_embed=rng.standard_normal(8) * 10.0 ** rng.integers(-30, 10),
            q_embed=-np.zeros(3) if i == 4 else rng.standard_normal(3),
            question=f"question {i}" if i % 2 else "",
            answer=answers[i % len(answers)],
            confidence=rng.random(),
            rewards=[None, 1.5, {"a": 0.1, "b": -2.0}, {}][i % 4],
            trajectory=[{"s": np.ones((2, 2), np.float16)}, float("inf")] if i % 5 == 0 else None,
            metadata={"$k": [1], "u": "\udfff", "": None} if i % 7 == 0 else None,
            probabilities=rng.dirichlet(np.ones(4)) if i % 3 else None,
            tags=(("x", f"t{i % 9}"), (), ("\ud801",))[i % 3],
            image=[None, "p.png", b"\x89P\xff"][i % 3],
            key=None if i % 2 else f"k{i}",
            timestamp=1e9 + i / 3,
        )
        for i in range(60)
    ]


@pytest.fixture
def buffer(home: Path) -> Iterator[ExperienceBuffer]:
    with ExperienceBuffer.open(home / "a", config=QUIET, max_size=777) as opened:
        given = everything()
        opened.add_many(given)
        opened.remove(np.arange(0, 60, 11))
        found = opened.search_index(v_embed=given[5].v_embed, q_embed=given[5].q_embed, k=9)
        opened.record_outcome(found.receipt, success=True, credit=0.3)
        opened.update_rewards([1, 2, 3], [5.0, {"z": 1.25}, -1.0])
        opened.update_priorities([4], [9.5])
        yield opened


def target(home: Path, kind: str) -> Path:
    if kind == "parquet":
        pytest.importorskip("pyarrow")
    return home / ("e.parquet" if kind == "parquet" else "e")


@pytest.mark.parametrize("kind", KINDS)
def test_the_round_trip_loses_nothing(home: Path, buffer: ExperienceBuffer, kind: str) -> None:
    file = target(home, kind)
    report = export_experiences(home / "a", file)
    assert (report.format, report.experiences, report.lsn) == (kind, 54, buffer.lsn)
    back = import_experiences(file, home / "b", config=SMALL)
    assert (back.experiences, back.first_id, back.last_id, back.kept_ids) == (54, 1, 59, True)
    with ExperienceBuffer.load_from_disk(home / "b", config={"index": "exact"}) as copy:
        assert_same(buffer, copy)
        assert copy.max_size == 777
        one, other = (side._live().replica.state for side in (buffer, copy))
        assert one.next_id == other.next_id
        assert one.total_added == other.total_added
        assert (one.sequence[one.live_slots()] == other.sequence[other.live_slots()]).all()
        given = everything()[5]
        found = [
            side.search_index(v_embed=given.v_embed, q_embed=given.q_embed, k=60)
            for side in (buffer, copy)
        ]
        assert same(found[0].ids, found[1].ids)
        assert same(found[0].similarities, found[1].similarities)
        assert copy.add(given) == 60


@pytest.mark.parametrize("kind", KINDS)
def test_adding_gives_new_ids(home: Path, buffer: ExperienceBuffer, kind: str) -> None:
    file = target(home, kind)
    export_experiences(buffer, file)
    report = import_experiences(file, home / "a", add=True, config=SMALL)
    assert (report.first_id, report.last_id, report.kept_ids) == (60, 113, False)
    old, new = buffer.get(2), buffer.get(61)
    for name in ("answer", "rewards", "priority", "timestamp", "tags", "v_embed"):
        assert same(getattr(old, name), getattr(new, name)), name
    assert new.retrieval_count == 0
    again = import_experiences(file, home / "a", add=True, skip=50, config=SMALL)
    assert (again.experiences, again.first_id) == (4, 114)
    with pytest.raises(StorageError, match="holds a buffer already"):
        import_experiences(file, home / "a")


def test_other_programs_read_parquet(home: Path, buffer: ExperienceBuffer) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    export_experiences(home / "a", home / "e.parquet")
    table = parquet.read_table(home / "e.parquet")
    assert table.schema.names == [*COLUMNS, "v_embed", "q_embed"]
    types = {str(field.type) for field in table.schema}
    nested = {"list<element: string>", "list<element: float>"}
    plain = {"int64", "double", "float", "string", "binary"}
    assert types - nested - plain == {
        "fixed_size_list<element: float>[8]",
        "fixed_size_list<element: float>[3]",
    }, "no type that pandas or datasets do not have"
    row = table.slice(0, 1).to_pylist()[0]
    assert row["id"] == 1
    assert json.loads(row["answer"]) == json.loads(row["extra"])["answer"]
    assert row["rewards"] == '{"reward":5.0}'
    assert row["reward"] == 5.0


def test_json_lines_have_one_type_a_column(home: Path, buffer: ExperienceBuffer) -> None:
    export_experiences(home / "a", home / "e")
    kinds: dict[str, set[type]] = {}
    text = (home / "e" / "experiences.jsonl").read_text("ascii")
    assert "NaN" not in text
    for line in text.splitlines():
        for name, value in json.loads(line).items():
            if value is not None:
                kinds.setdefault(name, set()).add(type(value))
    assert set(kinds) == set(COLUMNS)
    assert all(len(found) == 1 for found in kinds.values()), kinds
    assert np.load(home / "e" / "v_embed.npy").shape == (54, 8)


# ---------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize("kind", KINDS)
def test_an_interrupted_export_leaves_nothing(
    home: Path, buffer: ExperienceBuffer, kind: str
) -> None:
    file = target(home, kind)
    before = sorted(home.iterdir())

    def interrupt(done: int, total: int) -> None:
        (own,) = set(home.iterdir()) - set(before)
        fd = os.open(own, os.O_RDONLY)
        with pytest.raises(BlockingIOError):  # so no other export removes it
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(fd)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_experiences(home / "a", file, progress=interrupt)
    assert sorted(home.iterdir()) == before
    file.write_text("")
    with pytest.raises(StorageError, match="exists already"):
        export_experiences(home / "a", file)


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_killed_export_has_left_is_removed_by_the_next(
    home: Path, buffer: ExperienceBuffer, kind: str
) -> None:
    file = target(home, kind)
    foreign = [home / f"{file.name}.tmp", home / f"x{file.name}.7.tmp"]
    for path in foreign:
        path.write_text("")
    left = home / f"{file.name}.4711.tmp"  # as a kill leaves it: nobody has it open
    if kind == "jsonl":
        left.mkdir()
        (left / "experiences.jsonl").write_text("{")
    else:
        left.write_text("PAR1")
    under_way = left.with_name(f"{file.name}.1.tmp")
    under_way.write_text("")
    with open(under_way) as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        export_experiences(home / "a", file)
    assert not left.exists()
    assert under_way.exists()
    assert import_experiences(file, home / "b", config=QUIET).experiences == 54
    for path in foreign:
        assert path.exists()


def test_an_export_is_begun_anew_where_it_is_overtaken(
    home: Path, buffer: ExperienceBuffer, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = [0]
    real = Frozen.pin

    def pin(self: Frozen, *arguments: Any) -> Any:
        tries[0] += 1
        if tries[0] == 1:
            buffer.remove([1])
            raise LogGone
        return real(self, *arguments)

    monkeypatch.setattr(Frozen, "pin", pin)
    assert export_experiences(home / "a", home / "e").experiences == 53


@pytest.mark.parametrize("kind", KINDS)
def test_an_interrupted_import_is_gone_on_with(
    home: Path, buffer: ExperienceBuffer, kind: str
) -> None:
    file = target(home, kind)
    export_experiences(home / "a", file)
    for stop in (1, 2, 3):  # while it is checked, before and after the first part was copied
        left = [stop]

        def interrupt(done: int, total: int, left: list[int] = left) -> None:
            left[0] -= 1
            if not left[0]:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            import_experiences(file, home / "b", config=SMALL, progress=interrupt)
        with pytest.raises(StorageError):
            ExperienceBuffer.open(home / "b", mode="r")
    import_experiences(file, home / "b", config=SMALL)
    with ExperienceBuffer.load_from_disk(home / "b", config={"index": "exact"}) as copy:
        assert_same(buffer, copy)
    names = {path.name for path in home.iterdir()}
    assert names == {"a", "b", file.name}


def test_a_missing_library_is_named(
    home: Path, buffer: ExperienceBuffer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(BackendUnavailable, match=r"expbuf-core\[parquet\]"):
        export_experiences(home / "a", home / "e.parquet")
    assert not (home / "e.parquet").exists()


def test_files_of_others(home: Path) -> None:
    """Embeddings alone are enough; the rest is as for an add."""
    made = home / "made"
    made.mkdir()
    rng = np.random.default_rng(0)
    np.save(made / "v_embed.npy", rng.standard_normal((5, 4)))
    lines = [{"answer": str(i), "surplus": i, "confidence": 0.5} for i in range(5)]
    (made / "experiences.jsonl").write_text("\n".join(map(json.dumps, lines)))
    report = import_experiences(made, home / "b", config=SMALL)
    assert (report.experiences, report.kept_ids, report.last_id) == (5, False, 4)
    with ExperienceBuffer.load_from_disk(home / "b", config={"index": "exact"}) as copy:
        assert [e.answer for e in copy] == list("01234")
        with ExperienceBuffer.open(config={"index": "exact"}) as scored:
            scored.add(Experience(v_embed=np.ones(4), confidence=0.5))
            assert copy.get(3).priority == scored.get(0).priority
    np.save(made / "q_embed.npy", rng.standard_normal((5, 2)))
    with pytest.raises(ConfigError, match="weighted_concat"):
        import_experiences(made, home / "c", config=SMALL)
    report = import_experiences(made, home / "c", config={"fusion": "weighted_concat", **SMALL})
    assert report.experiences == 5


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("id", 3, "do not rise"),
        ("id", -1, "do not rise"),
        ("id", 1 << 70, "no integers"),
        ("confidence", 2.0, "confidence"),
        ("confidence", "x", "confidence"),
        ("priority", -1.0, "priorit"),
        ("retrieval_count", -1, "counts"),
        ("retrieval_count", 1 << 40, "counts"),
        ("success_count", -0.5, "counts"),
        ("rewards", '{"a": "x"}', "rewards"),
        ("rewards", "{", "line 4"),
        ("trajectory", '{"$nd": "AA==", "dtype": "O", "shape": [1]}', "objects"),
        ("trajectory", '{"$nd": "AA==", "dtype": "<f8", "shape": [9]}', "line 4"),
        ("trajectory", '{"$bytes": "?"}', "line 4"),
        ("metadata", "[1]", "metadata"),
        ("tags", 5, "line 4"),
        ("probabilities", [0.1], "sum to 1"),
        ("image_bytes", "?", "line 4"),
        ("timestamp", "soon", "timestamp"),
    ],
)
def test_bad_values_are_refused_before_anything_is_written(
    home: Path, buffer: ExperienceBuffer, name: str, value: Any, why: str
) -> None:
    export_experiences(home / "a", home / "e")
    file = home / "e" / "experiences.jsonl"
    lines = file.read_text().splitlines()
    record = {**json.loads(lines[3]), name: value}
    if name == "image_bytes":
        record["image"] = None
    lines[3] = json.dumps(record)
    file.write_text("\n".join(lines))
    with pytest.raises(InvalidExperience, match=why):
        import_experiences(home / "e", home / "b", config=SMALL)
    assert not (home / "b").exists()


@pytest.mark.parametrize("add", [False, True])
def test_a_bad_value_is_told_with_its_place(home: Path, add: bool) -> None:
    made = home / "made"
    made.mkdir()
    np.save(made / "v_embed.npy", np.ones((600, 4)))
    lines: list[dict[str, Any]] = [{} for _ in range(600)]
    lines[301] = {"confidence": 2.0}
    (made / "experiences.jsonl").write_text("\n".join(map(json.dumps, lines)))
    place = "in experiences 0 to 511" if add else "in experience 301"
    with pytest.raises(InvalidExperience, match=f"{place}: confidence: "):
        import_experiences(made, home / "b", config=SMALL, add=add)


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (b'{"answer": "\xff"}', "can't decode byte"),
        (b'{"answer": ' + b"[" * 200_000 + b"]" * 200_000 + b"}", "recursion"),
        (b'{"answer": 1', "delimiter"),
    ],
)
def test_a_line_that_is_no_json_is_named(home: Path, line: bytes, why: str) -> None:
    made = home / "made"
    made.mkdir()
    np.save(made / "v_embed.npy", np.ones((2, 4)))
    (made / "experiences.jsonl").write_bytes(b"{}\n" + line + b"\n")
    with pytest.raises(StorageError, match=rf"experiences.jsonl: line 2 is no JSON: .*{why}"):
        import_experiences(made, home / "b", config=SMALL)
    assert not (home / "b").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_columns_that_are_not_looked_at_are_told(
    home: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    """One is misspelt easily, and what it held would not be missed before it is needed."""
    made = home / "made"
    if kind == "jsonl":
        made.mkdir()
        np.save(made / "v_embed.npy", np.ones((2, 4)))
        (made / "experiences.jsonl").write_text('{"answer": "a"}\n{"answers": "b", "key": "k"}')
    else:
        arrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        columns = {"v_embed": [[1.0], [2.0]], "answers": ["a", "b"], "key": ["k", "l"]}
        parquet.write_table(arrow.table(columns), made)
    import_experiences(made, home / "b", config=SMALL)
    assert [record.getMessage() for record in caplog.records] == [
        f"{made}: not looked at: answers; known columns are {', '.join([*COLUMNS, *PARTS])}"
    ]


def test_files_that_are_none(home: Path, buffer: ExperienceBuffer) -> None:
    export_experiences(home / "a", home / "e")
    header = home / "e" / "export.json"
    for text, why in (
        ("{", "no JSON"),
        ("{}", "header is damaged"),
        (header.read_text().replace('"version": 1', '"version": 9'), "version 9"),
        (header.read_text().replace('"v_dim": 8', '"v_dim": 9'), "do not fit"),
    ):
        kept = header.read_text()
        header.write_text(text)
        with pytest.raises(StorageError, match=why):
            import_experiences(home / "e", home / "b")
        header.write_text(kept)
    np.save(home / "e" / "v_embed.npy", np.ones((3, 8)))
    with pytest.raises(StorageError, match="54 lines"):
        import_experiences(home / "e", home / "b")
    (home / "e" / "v_embed.npy").write_bytes(b"\x93NUMPY\x01\x00junk")
    with pytest.raises(StorageError, match="no array"):
        import_experiences(home / "e", home / "b")
    np.save(home / "e" / "v_embed.npy", np.array([[{}]]), allow_pickle=True)
    with pytest.raises(StorageError, match="no array"):
        import_experiences(home / "e", home / "b")
    for wrong in ("nothing", "a"):
        with pytest.raises(StorageError):
            import_experiences(home / wrong, home / "b")
    (home / "text").write_text("text")
    pytest.importorskip("pyarrow")
    with pytest.raises(StorageError, match="no Parquet file"):
        import_experiences(home / "text", home / "b")
    assert not (home / "b").exists()


# ---------------------------------------------------------------- records

_leaves = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.binary() | st.text()
    | st.sampled_from([np.arange(4, dtype="<i2").reshape(2, 2), np.array(["a", "bc"])])
)  # fmt: skip
trees = st.recursive(
    _leaves,
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner) | st.tuples(inner, inner),
    max_leaves=8,
)


@given(trees)
def test_trees_come_back(tree: Any) -> None:
    text = dumps(tree)
    assert text.isascii()
    assert same(loads(text), tree)


@given(answer=trees, question=st.text(), key=st.none() | st.text(), tags=st.lists(st.text()))
def test_records_come_back(answer: Any, question: str, key: str | None, tags: list[str]) -> None:
    given = Experience(
        v_embed=np.ones(2, np.float32), answer=answer, question=question, key=key,
        tags=tuple(tags), timestamp=1.0, id=3, priority=0.5,
    )  # fmt: skip
    record = json.loads(json.dumps(record_of(given, 9)))
    found, sequence = item_of(record, np.ones(2, np.float32), None, "here")
    assert sequence == 9
    for field in dataclasses.fields(Experience):
        assert same(getattr(found, field.name), getattr(given, field.name)), field.name
