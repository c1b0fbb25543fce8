"""Bad input: a clear error, and nothing is written."""

from __future__ import annotations

import dataclasses
import os
import pickle
from collections.abc import Callable, Iterator
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
    expected,
    experience,
    find,
    finds,
    unchanged,
    vector,
)

from expbuf_core import (
    ConfigError,
    CorruptionError,
    DimensionError,
    ExpbufError,
    Experience,
    ExperienceBuffer,
    HostInfo,
    InvalidExperience,
    NotEnoughExperiences,
    PersistenceProvider,
    PluginNotFound,
    ReadOnlyBuffer,
    StorageError,
    UnknownExperienceError,
    hookimpl,
)
from expbuf_core.plugins import default_registry
from expbuf_core.replay import ReplayBatches
from expbuf_core.results import Receipt

NAN, INF = float("nan"), float("inf")
BAD_NUMBERS = [NAN, INF, -INF, "0.5", None, True, np.True_, [], {}, object(), 1j, 10**400]


@pytest.fixture(scope="module")
def buffer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ExperienceBuffer]:
    """Holds three experiences at first. What is refused leaves no trace, so all tests share it."""
    folder = tmp_path_factory.mktemp("bad_input") / "memory"
    limits: Any = {"max_experience_bytes": 4096, "max_commit_bytes": 100_000}
    with ExperienceBuffer.open(folder, config=CONFIG, **limits) as made:
        add_all(made, range(3))
        yield made


def broken(at: int, value: float) -> np.ndarray[Any, np.dtype[np.float32]]:
    array = vector(1)
    array[at] = value
    return array


# ---------------------------------------------------------------- embeddings

BAD_EMBEDDINGS: list[tuple[Any, str]] = [
    (vector(1, DIM + 1), f"dimension {DIM + 1}, but this buffer holds .* {DIM}"),
    (vector(1, DIM - 1), f"dimension {DIM - 1}, but this buffer holds .* {DIM}"),
    (vector(1)[None], r"give v_embed\[0\]"),
    (np.stack([vector(1), vector(2)]), "add_many or search_many"),
    (vector(1).reshape(1, 1, DIM), r"expected shape \(dim,\)"),
    (np.float32(1), r"expected shape \(dim,\)"),
    (1.5, "expected an array of numbers, found a float"),
    (np.empty(0, np.float32), "dimension 0|empty"),
    (broken(2, NAN), "nan at position 2"),
    (broken(0, INF), "inf at position 0"),
    (broken(5, -INF), "-inf at position 5"),
    (np.full(DIM, 1e39), "finite in float32"),
    (np.full(DIM, 1j), "expected real numbers"),
    (np.array(["a"] * DIM), "expected real numbers"),
    (np.array([object()] * DIM), "expected real numbers"),
    (["a"] * DIM, "not an array of numbers"),
    (["1"] * DIM, "not an array of numbers: found text"),
    ([b"1"] * DIM, "not an array of numbers: found text"),
    ([1.0] * (DIM - 1) + ["1"], "not an array of numbers: found text"),
    ([[1.0], [1.0, 2.0]], "not an array of numbers"),
    ("vector", "found a str"),
    (b"vector", "found a bytes"),
    ({"a": 1}, "found a dict"),
    (object(), "found a object"),
    (None, "missing"),
]


@pytest.mark.parametrize(("bad", "message"), BAD_EMBEDDINGS)
def test_a_bad_embedding(buffer: ExperienceBuffer, bad: Any, message: str) -> None:
    with unchanged(buffer):
        with pytest.raises(InvalidExperience, match=message):
            buffer.add(experience(9, v_embed=bad))
        with pytest.raises(InvalidExperience):
            buffer.add_many([experience(8), experience(9, v_embed=bad), experience(10)])
        with pytest.raises(InvalidExperience):
            buffer.add_many([experience(8), experience(9, q_embed=bad)])


@pytest.mark.parametrize("bad", [bad for bad, _ in BAD_EMBEDDINGS[2:-1]])
def test_a_bad_first_embedding_decides_nothing(open_buffer: Any, bad: Any) -> None:
    """What is refused must not fix the dimensions of a new buffer."""
    buffer = open_buffer.memory()
    with unchanged(buffer), pytest.raises(InvalidExperience):
        buffer.add(experience(9, v_embed=bad))
    with unchanged(buffer), pytest.raises(InvalidExperience):
        buffer.add_many([experience(9, v_embed=bad)])
    buffer.add(Experience(v_embed=vector(1, 3), q_embed=vector(2, 3)))
    assert buffer.stats()["settings"]["v_dim"] == 3


@pytest.mark.parametrize(
    "bad",
    [
        {"confidence": 2.0},
        {"answer": object()},
        {"rewards": NAN},
        {"q_embed": vector(1, 4)},  # weighted_sum needs equal dimensions
        {"v_embed": None, "q_embed": None},
        {"metadata": {"x": "y" * 20_000}},
    ],
)
def test_a_bad_first_experience_decides_nothing(
    open_buffer: OpenBuffer, bad: dict[str, Any]
) -> None:
    buffer = open_buffer(max_experience_bytes=4096)
    with unchanged(buffer):
        with pytest.raises((InvalidExperience, ConfigError)):
            buffer.add(experience(1, **bad))
        with pytest.raises((InvalidExperience, ConfigError)):
            buffer.add_many([experience(1, **bad)])
    buffer.add(Experience(v_embed=vector(1, 3), q_embed=vector(2, 3)))
    assert len(buffer) == 1


def test_dimension_errors_carry_the_facts(buffer: ExperienceBuffer) -> None:
    with pytest.raises(DimensionError) as caught:
        buffer.add(experience(1, v_embed=vector(1, DIM + 2)))
    assert caught.value.expected == DIM
    assert caught.value.found == (DIM + 2,)
    assert isinstance(caught.value, ValueError)


def test_a_part_that_the_buffer_lacks(open_buffer: OpenBuffer) -> None:
    buffer = open_buffer()
    buffer.add(Experience(v_embed=vector(1)))
    with unchanged(buffer):
        with pytest.raises(InvalidExperience, match="created without it"):
            buffer.add(experience(1))
        with pytest.raises(InvalidExperience, match="created without it"):
            buffer.search_index(q_embed=vector(1))
        with pytest.raises(InvalidExperience, match="missing"):
            buffer.add(Experience(q_embed=vector(1)))
    assert buffer.search_index(v_embed=vector(1), k=1)[0].similarity == pytest.approx(1)


def test_zeros_are_no_error(open_buffer: OpenBuffer) -> None:
    buffer = open_buffer()
    id_ = buffer.add(experience(9, v_embed=np.zeros(DIM), q_embed=np.zeros(DIM)))
    assert id_ in find(buffer, 1, k=10).ids


# ---------------------------------------------------------------- other fields

BAD_FIELDS: list[Any] = [
    *[("confidence", bad) for bad in (*BAD_NUMBERS, -0.01, 1.01, np.float64(1.5))],
    *[("timestamp", bad) for bad in BAD_NUMBERS if bad is not None],
    *[("rewards", bad) for bad in BAD_NUMBERS if bad not in (None, {})],
    *[("rewards", {"a": bad}) for bad in BAD_NUMBERS],
    ("rewards", {1: 1.0}),
    ("rewards", {"a": 1e308, "b": 1e308}),
    ("rewards", 1e300),
    ("question", None),
    ("question", 7),
    ("question", b"bytes"),
    ("answer", object()),
    ("answer", {1: "a key that is no string"}),
    ("answer", {"a": {"b": object()}}),
    ("answer", [set()]),
    ("answer", 1j),
    ("answer", np.array([object()])),
    ("answer", np.zeros(2, [("a", "i4"), ("b", "f4")])),
    pytest.param("answer", 10**5000, id="answer-huge"),
    ("trajectory", lambda: None),
    ("metadata", [1]),
    ("metadata", "text"),
    ("probabilities", [0.5, 0.6]),
    ("probabilities", [1.5, -0.5]),
    ("probabilities", [NAN, 1.0]),
    ("probabilities", []),
    ("probabilities", [[0.5, 0.5]]),
    ("probabilities", "0.5"),
    ("tags", "one"),
    ("tags", [1]),
    ("tags", 7),
    ("image", 7),
    ("image", ["a"]),
    ("key", 7),
    ("key", b"k"),
    ("id", 0),
]


@pytest.mark.parametrize(("name", "bad"), BAD_FIELDS)
def test_a_bad_field(buffer: ExperienceBuffer, name: str, bad: Any) -> None:
    with unchanged(buffer):
        with pytest.raises(InvalidExperience, match=name if name != "id" else "has id 0"):
            buffer.add(experience(9, **{name: bad}))
        with pytest.raises(InvalidExperience):
            buffer.add_many([experience(8), experience(9, **{name: bad})])
        if name != "id" and not (name == "question" and bad is None):
            with pytest.raises(InvalidExperience):
                buffer.add_many({**columns(range(2)), name: [bad, bad]})


def test_it_goes_on_after_bad_input(open_buffer: OpenBuffer) -> None:
    buffer = open_buffer()
    first = buffer.add(experience(0))
    for bad in ({"confidence": NAN}, {"v_embed": broken(0, NAN)}, {"answer": object()}):
        with pytest.raises(InvalidExperience):
            buffer.add(experience(1, **bad))
    assert buffer.add(experience(1)) == first + 1
    assert finds(buffer, 1)


def test_too_deep(buffer: ExperienceBuffer) -> None:
    deep: Any = None
    for _ in range(5000):
        deep = [deep]
    with unchanged(buffer), pytest.raises(InvalidExperience, match="answer: nested deeper"):
        buffer.add(experience(9, answer=deep))
    loop: list[Any] = []
    loop.append(loop)
    with unchanged(buffer), pytest.raises(InvalidExperience, match="nested deeper"):
        buffer.add(experience(9, answer=loop))


@pytest.mark.parametrize("bad", [*BAD_NUMBERS[:3], -1.0, -1e-9, "high", True, 1e39])
def test_a_bad_priority(buffer: ExperienceBuffer, bad: Any) -> None:
    with unchanged(buffer):
        with pytest.raises(InvalidExperience, match="priorit"):
            buffer.add(experience(9), priority=bad)
        with pytest.raises(InvalidExperience, match="priorit"):
            buffer.add_many([experience(8), experience(9)], priorities=[1.0, bad])
        with pytest.raises(InvalidExperience, match="priorit"):
            buffer.add_many(columns(range(2)), priorities=[bad, None])
        with pytest.raises(InvalidExperience, match="priorit"):
            buffer.update_priorities([0], [bad])


@pytest.mark.parametrize("bad", [[1.0], [1.0, 2.0, 3.0], 1.0, np.ones((2, 1))])
def test_as_many_priorities_as_experiences(buffer: ExperienceBuffer, bad: Any) -> None:
    with unchanged(buffer):
        with pytest.raises(InvalidExperience, match="priorit"):
            buffer.add_many([experience(8), experience(9)], priorities=bad)
        with pytest.raises(InvalidExperience, match="priorit"):
            buffer.update_priorities([0, 1], bad)


def test_an_experience_over_its_limit(buffer: ExperienceBuffer) -> None:
    with unchanged(buffer):
        with pytest.raises(InvalidExperience, match=r"max_experience_bytes is 4,096"):
            buffer.add(experience(9, trajectory=b"x" * 5000))
        with pytest.raises(InvalidExperience, match="experience 1 takes"):
            buffer.add_many([experience(8), experience(9, trajectory="x" * 5000)])
        with pytest.raises(InvalidExperience, match="experience 1 takes"):
            buffer.add_many({**columns(range(2)), "trajectory": ["", "x" * 5000]})
        with pytest.raises(InvalidExperience, match=r"max_commit_bytes .* several parts"):
            buffer.add_many([experience(i, trajectory="x" * 3000) for i in range(60)])


@pytest.mark.parametrize("bad", [None, 7, "experience", {"v_embed": 1}, vector(1)])
def test_what_is_no_experience(buffer: ExperienceBuffer, bad: Any) -> None:
    with unchanged(buffer):
        with pytest.raises(InvalidExperience, match="expected an Experience"):
            buffer.add(bad)
        with pytest.raises(InvalidExperience):
            buffer.add_many(bad)
        with pytest.raises(InvalidExperience):
            buffer.add_many([experience(1), bad])


def test_one_experience_is_not_several(buffer: ExperienceBuffer) -> None:
    with unchanged(buffer), pytest.raises(InvalidExperience, match="give one to add"):
        buffer.add_many(experience(1))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"colour": ["red"] * 2}, "unknown columns: 'colour'; known: v_embed"),
        ({"confidence": [0.5]}, "confidence"),
        ({"confidence": [0.5, 1.5]}, r"\[0, 1\]"),
        ({"confidence": 0.5}, "confidence"),
        ({"confidence": np.array([True, False])}, "confidence"),
        ({"answer": ["only one"]}, "expected 2 entries, found 1"),
        ({"answer": "ab"}, "answer"),
        ({"answer": 7}, "answer"),
        ({"answer": np.float64(7)}, "answer"),
        ({"timestamp": [NAN, 1.0]}, "timestamp"),
        ({"rewards": [INF, 1.0]}, "rewards"),
        ({"rewards": np.array([INF, 1.0])}, "rewards"),
        ({"rewards": {"a": [1.0]}}, "rewards"),
        ({"tags": ["ab", "cd"]}, "tags"),
        ({"v_embed": np.ones((3, DIM))}, "entries|has 2"),
        ({"v_embed": np.ones(DIM)}, r"give v_embed\[None\]"),
        ({"v_embed": 3.0}, "v_embed|columns"),
        ({"v_embed": np.full((2, DIM), NAN)}, r"position \(0, 0\)"),
        ({"v_embed": None}, "missing"),
    ],
)
def test_bad_columns(buffer: ExperienceBuffer, bad: dict[str, Any], message: str) -> None:
    with unchanged(buffer), pytest.raises(InvalidExperience, match=message):
        buffer.add_many({**columns(range(2)), **bad})


def test_columns_without_embeddings(open_buffer: OpenBuffer) -> None:
    buffer = open_buffer()
    for bad in ({}, {"answer": ["a"]}, {"v_embed": None}):
        with unchanged(buffer), pytest.raises(InvalidExperience, match="needs v_embed"):
            buffer.add_many(bad)


# ---------------------------------------------------------------- ids, outcomes, rewards

BAD_IDS: list[Any] = [
    None,
    1.5,
    [0, 1.5],
    "0",
    ["0"],
    [None],
    [True],
    True,
    object(),
    [[0], [1, 2]],
]


@pytest.mark.parametrize("bad", BAD_IDS)
def test_what_is_no_id(buffer: ExperienceBuffer, bad: Any) -> None:
    uses: list[Callable[[], Any]] = [
        lambda: buffer.remove(bad),
        lambda: buffer.update_priorities(bad, [1.0]),
        lambda: buffer.update_rewards(bad, [1.0]),
        lambda: buffer.record_outcome(bad, success=True),
        lambda: buffer.add_to_index(bad),
    ]
    if bad is not None:  # nothing to leave out
        uses.append(lambda: find(buffer, 1, exclude=bad))
    with unchanged(buffer):
        for use in uses:
            with pytest.raises((InvalidExperience, ValueError)):
                use()


@pytest.mark.parametrize("bad", [None, 1.5, "0", True, [0]])
def test_get_takes_one_id(buffer: ExperienceBuffer, bad: Any) -> None:
    with pytest.raises(InvalidExperience, match="an id is an integer"):
        buffer.get(bad)


@pytest.mark.parametrize("never", [1_000_000, -1, 2**62])
def test_an_id_that_was_never_issued(buffer: ExperienceBuffer, never: int) -> None:
    with unchanged(buffer):
        for use in (
            lambda: buffer.remove([0, never]),
            lambda: buffer.update_priorities([0, never], [1.0, 2.0]),
            lambda: buffer.update_rewards([0, never], [1.0, 2.0]),
            lambda: buffer.record_outcome([0, never], success=True),
            lambda: buffer.add_to_index([never]),
            lambda: buffer.get(never),
        ):
            with pytest.raises(UnknownExperienceError, match=f"id {never} was never issued") as e:
                use()
            assert e.value.id == never
            assert isinstance(e.value, KeyError)


@pytest.mark.parametrize("bad", [*(bad for bad in BAD_NUMBERS if bad != {}), 1e300, {"a": NAN}])
def test_a_bad_reward(buffer: ExperienceBuffer, bad: Any) -> None:
    with unchanged(buffer), pytest.raises(InvalidExperience, match="reward"):
        buffer.update_rewards([0, 1], [0.5, bad])


@pytest.mark.parametrize("bad", [[1.0], [1.0, 2.0, 3.0], 1.0, np.float64(1), None])
def test_as_many_rewards_as_ids(buffer: ExperienceBuffer, bad: Any) -> None:
    with unchanged(buffer), pytest.raises(InvalidExperience, match="rewards"):
        buffer.update_rewards([0, 1], bad)


@pytest.mark.parametrize(
    "bad", [NAN, -0.1, 1.1, True, "all", [0.5], [0.5, 0.5, 2], object(), {0: 2}]
)
def test_a_bad_credit(buffer: ExperienceBuffer, bad: Any) -> None:
    with unchanged(buffer), pytest.raises(InvalidExperience, match="credit"):
        buffer.record_outcome([0, 1, 2], success=True, credit=bad)
    receipt = find(buffer, 0, k=3).receipt
    with unchanged(buffer), pytest.raises(InvalidExperience, match="credit"):
        buffer.record_outcome(receipt, success=True, credit=bad)
    assert buffer.record_outcome(receipt, success=True) == 3


def test_what_is_no_receipt_of_this_buffer(buffer: ExperienceBuffer, open_buffer: Any) -> None:
    receipt = find(buffer, 1, k=2).receipt
    text = str(receipt)
    other = open_buffer.memory()
    add_all(other, range(3))
    foreign = find(other, 1, k=2).receipt
    with unchanged(buffer):
        for bad in ("", "no receipt", text[:-1], text.replace(".", ";"), "x" + text, text[:-9]):
            with pytest.raises(InvalidExperience, match="not a receipt"):
                buffer.record_outcome(bad, success=True)
        for bad in (foreign, str(foreign)):
            with pytest.raises(InvalidExperience, match="another buffer"):
                buffer.record_outcome(bad, success=True)
        unknown = Receipt(receipt.buffer, receipt.token, receipt.lsn, (0, 1_000_000))
        with pytest.raises(UnknownExperienceError):
            buffer.record_outcome(unknown, success=True)
    assert buffer.record_outcome(text, success=True) == 2


# ---------------------------------------------------------------- searches and samples


@pytest.mark.parametrize("bad", [0, -1, 1.0, "3", True, NAN])
def test_k_is_at_least_1(buffer: ExperienceBuffer, bad: Any) -> None:
    with pytest.raises(InvalidExperience, match="k must be an integer of at least 1"):
        find(buffer, 1, k=bad)
    with pytest.raises(InvalidExperience, match="k must be"):
        buffer.search_many(v_embed=np.ones((2, DIM)), q_embed=np.ones((2, DIM)), k=bad)


@pytest.mark.parametrize("bad", [bad for bad, _ in BAD_EMBEDDINGS[:-1]])
def test_a_bad_query(buffer: ExperienceBuffer, bad: Any) -> None:
    with pytest.raises(InvalidExperience):
        buffer.search_index(v_embed=bad, q_embed=vector(1))
    with pytest.raises(InvalidExperience):
        buffer.search_index(hybrid_embed=bad)


def test_queries_that_make_no_sense(buffer: ExperienceBuffer) -> None:
    one, two = np.ones((1, DIM)), np.ones((2, DIM))
    with pytest.raises(InvalidExperience, match="needs v_embed, q_embed or hybrid_embed"):
        buffer.search_index()
    with pytest.raises(InvalidExperience, match="either hybrid_embed, or"):
        buffer.search_index(v_embed=one[0], hybrid_embed=one[0])
    with pytest.raises(DimensionError, match=r"v_embed\[0\]"):
        buffer.search_index(v_embed=one, q_embed=one[0])
    with pytest.raises(DimensionError, match=r"v_embed\[None\]"):
        buffer.search_many(v_embed=one[0])
    with pytest.raises(DimensionError, match="holds 1 queries"):
        buffer.search_many(v_embed=one, q_embed=two)
    with pytest.raises(DimensionError):
        buffer.search_many(hybrid_embed=np.ones((2, DIM + 1)))


def test_a_bad_query_of_a_buffer_without_experiences(open_buffer: OpenBuffer) -> None:
    buffer = open_buffer()
    for bad in (np.full(DIM, NAN), vector(1)[None], "text"):
        with pytest.raises(InvalidExperience):
            buffer.search_index(v_embed=bad)
    with pytest.raises(InvalidExperience):
        buffer.search_many(v_embed=1.5)


@pytest.mark.parametrize("bad", [0, -1, 1.5, "3", True, None])
def test_a_batch_holds_at_least_one(buffer: ExperienceBuffer, bad: Any) -> None:
    with pytest.raises(InvalidExperience, match="batch_size"):
        buffer.sample(bad)


@pytest.mark.parametrize("bad", [-0.1, 1.1, NAN, "1", True])
def test_beta_has_bounds(buffer: ExperienceBuffer, bad: Any) -> None:
    with pytest.raises(InvalidExperience, match="beta"):
        buffer.sample(2, beta=bad)


def test_a_sample_needs_enough(buffer: ExperienceBuffer, open_buffer: Any) -> None:
    for uniform in (False, True):
        with pytest.raises(NotEnoughExperiences, match="4 different"):
            buffer.sample(4, replace=False, uniform=uniform)
        with pytest.raises(NotEnoughExperiences, match="empty"):
            open_buffer.memory().sample(1, uniform=uniform)


# ---------------------------------------------------------------- folders and settings


def tree(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_a_file_where_a_folder_should_be(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    for mode in ("a", "x", "r"):
        with pytest.raises(StorageError, match="is a file; a buffer is a folder"):
            ExperienceBuffer.open(file, config=CONFIG, mode=mode)
        with pytest.raises(StorageError):
            ExperienceBuffer.open(file / "below", config=CONFIG, mode=mode)
    with pytest.raises(StorageError):
        ExperienceBuffer.load_from_disk(file)
    assert tree(tmp_path) == {"file": b"mine"}


def test_a_folder_that_is_no_buffer(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    (tmp_path / "data").mkdir()
    for mode in ("a", "x"):
        with pytest.raises(StorageError, match=r"holds other files \(data, thesis.tex\)"):
            ExperienceBuffer.open(tmp_path, config=CONFIG, mode=mode)
    with pytest.raises(StorageError, match="is no buffer"):
        ExperienceBuffer.open(tmp_path, config=CONFIG, mode="r")
    with pytest.raises(StorageError, match="is no buffer"):
        ExperienceBuffer.load_from_disk(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["data", "thesis.tex"]


def test_a_buffer_without_its_identity(open_buffer: OpenBuffer, folder: Path) -> None:
    with open_buffer() as buffer:
        add_all(buffer, range(3))
        buffer.save_snapshot()
    (folder / "expbuf.json").unlink()
    before = tree(folder)
    with pytest.raises(CorruptionError, match=r"expbuf.json is missing"):
        open_buffer()
    assert tree(folder) == before


@pytest.mark.parametrize("damage", [b"", b"{}", b"\xff\xfe", b'{"format": 1, "uuid": "00"}'])
def test_a_damaged_identity(open_buffer: OpenBuffer, folder: Path, damage: bytes) -> None:
    with open_buffer() as buffer:
        add_all(buffer, range(3))
    (folder / "expbuf.json").write_bytes(damage)
    before = tree(folder)
    with pytest.raises(CorruptionError, match=r"expbuf\.json") as caught:
        open_buffer()
    assert caught.value.path == str(folder / "expbuf.json")
    assert tree(folder) == before


CONFLICTS: list[tuple[dict[str, Any], str]] = [
    ({"embedding": {"visual_dim": DIM + 1}}, "embedding.visual_dim"),
    ({"embedding": {"question_dim": DIM + 1}}, "embedding.question_dim"),
    ({"embedding": {"visual_dim": 0}}, "embedding.visual_dim"),
    ({"embedding": {"metric": "l2"}}, "embedding.metric"),
    ({"fusion": "weighted_concat"}, "fusion"),
    ({"fusion": {"weighted_sum": {"visual_weight": 0.5}}}, "fusion"),
]


@pytest.mark.parametrize(("conflict", "key"), CONFLICTS)
@pytest.mark.parametrize("mode", ["a", "r"])
def test_a_buffer_of_another_kind(
    open_buffer: OpenBuffer, conflict: dict[str, Any], key: str, mode: str
) -> None:
    with open_buffer() as buffer:
        add_all(buffer, range(3))
        lsn = buffer.lsn
    with pytest.raises(ConfigError, match="was created with") as caught:
        open_buffer(mode=mode, **conflict)
    assert caught.value.key == key
    with open_buffer() as again:
        assert again.lsn == lsn
        assert answers(again) == expected(range(3))


def test_another_storage_backend_names_the_way(open_buffer: OpenBuffer, folder: Path) -> None:
    class Other:
        """Offers the file backend under another name."""

        @hookimpl
        def expbuf_register_persistence(self, host: HostInfo) -> list[PersistenceProvider]:
            file: Any = default_registry().get("persistence", "file")
            return [dataclasses.replace(file, name="other")]

    with open_buffer() as buffer:
        add_all(buffer, range(2))
    for mode in ("a", "r"):
        with pytest.raises(ConfigError, match=f"expbuf migrate {folder} TARGET"):
            open_buffer(mode=mode, persistence="other", plugins=[Other()])
    with open_buffer() as again:
        assert finds(again, 1)


def test_backends_that_are_not_installed(open_buffer: OpenBuffer, folder: Path) -> None:
    with pytest.raises(PluginNotFound, match="Did you mean 'file'"):
        open_buffer(persistence="flie")
    with pytest.raises(PluginNotFound):
        open_buffer(fusion="magic")
    assert not (folder / "expbuf.json").exists()


def test_bad_settings_change_nothing(open_buffer: OpenBuffer, folder: Path) -> None:
    for bad in ({"max_size": 0}, {"durability": "maybe"}, {"max_sice": 3}, {"max_size": True}):
        with pytest.raises(ConfigError):
            open_buffer(**bad)
    assert not folder.exists()


def test_a_fusion_that_does_not_fit_the_dimensions(open_buffer: OpenBuffer) -> None:
    buffer = open_buffer()
    with unchanged(buffer), pytest.raises(ConfigError, match="weighted_concat"):
        buffer.add(Experience(v_embed=vector(1, 3), q_embed=vector(1, 5)))
    buffer.add(Experience(v_embed=vector(1, 4), q_embed=vector(1, 4)))


# ---------------------------------------------------------------- read-only


@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize("filled", [False, True])
def test_a_reader_writes_nothing(
    open_buffer: OpenBuffer, folder: Path, live: bool, filled: bool
) -> None:
    writer = open_buffer()
    ids = add_all(writer, range(3)) if filled else []
    receipt = find(writer, 1, k=2).receipt if filled else None
    if not live:
        writer.close()
    before = tree(folder)
    reader = open_buffer(mode="r")
    uses: list[Any] = [
        lambda: reader.add(experience(9)),
        lambda: reader.add_many([experience(9)]),
        lambda: reader.add_many(columns(range(2))),
        lambda: reader.submit(experience(9)).result(timeout=30),
        lambda: reader.remove(ids),
        lambda: reader.clear(),
        lambda: reader.update_priorities(ids, [1.0] * len(ids)),
        lambda: reader.update_rewards(ids, [1.0] * len(ids)),
        lambda: reader.record_outcome(receipt or ids, success=True),
        lambda: reader.sync(),
        lambda: reader.save_snapshot(),
        lambda: reader.rebuild_index(),
    ]
    for use in uses:
        with pytest.raises(ReadOnlyBuffer, match="mode 'a'") as caught:
            use()
        assert isinstance(caught.value, PermissionError)
    assert answers(reader) == expected(range(len(ids)))
    assert reader.stats()["experiences"] == len(ids)
    reader.close()
    if not live:
        assert tree(folder) == before


def test_every_error_is_an_expbuf_error() -> None:
    import expbuf_core

    for name in expbuf_core.__all__:
        value = getattr(expbuf_core, name)
        if isinstance(value, type) and issubclass(value, Exception):
            assert issubclass(value, ExpbufError), name


NESTED: list[Any] = []
for _ in range(100_000):
    NESTED = [NESTED]


@pytest.mark.parametrize(
    "bad",
    [10**5000, [10**5000], NESTED, "x" * 10_000, 1 << 70],
    ids=["digits", "digits in a list", "nested", "long", "large"],
)
def test_a_message_is_short_whatever_the_value(buffer: ExperienceBuffer, bad: Any) -> None:
    add_all(buffer, range(1))
    calls: list[Callable[[], object]] = [
        lambda: buffer.search_many(v_embed=vector(0)[None], k=bad),
        lambda: buffer.sample(bad),
    ]
    if not isinstance(bad, int):  # a search for more than there is finds what there is
        calls.append(lambda: buffer.search_index(v_embed=vector(0), k=bad))
    for work in calls:
        with pytest.raises(InvalidExperience) as caught:
            work()
        assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    "bad", [None, "yes", [True], np.zeros(2), 0.5, np.nan, 2, -1, np.int64(2), 1.0, 10**400]
)
def test_success_is_true_or_false(buffer: ExperienceBuffer, bad: Any) -> None:
    add_all(buffer, range(1))
    with unchanged(buffer), pytest.raises(InvalidExperience, match="success must be"):
        buffer.record_outcome([0], success=bad)


@pytest.mark.parametrize(
    "wrong",
    [
        {"token": "no hex"},
        {"token": "00"},
        {"token": ""},
        {"token": None},
        {"lsn": 10**30},
        {"lsn": -1},
        {"lsn": "5"},
        {"lsn": 5.0},
        {"ids": (0.5,)},
        {"lsn": None},
        {"ids": (10**30,)},
        {"ids": ("x",)},
        {"ids": ((0,),)},
        {"ids": None},
    ],
)
def test_receipts_made_by_hand_are_refused(buffer: ExperienceBuffer, wrong: Any) -> None:
    add_all(buffer, range(1))
    made = dataclasses.replace(find(buffer, 0).receipt, **wrong)
    with unchanged(buffer), pytest.raises(InvalidExperience, match="not a receipt"):
        buffer.record_outcome(made, success=True)
    if any(value in (10**30, (10**30,), "no hex") for value in wrong.values()):  # as text, too
        with unchanged(buffer), pytest.raises(InvalidExperience, match="not a receipt"):
            buffer.record_outcome(str(made), success=True)


@pytest.mark.parametrize("good", [True, np.True_, 1, np.int64(1), np.uint8(1)])
def test_success_may_be_a_0_or_1_of_a_data_set(buffer: ExperienceBuffer, good: Any) -> None:
    id_ = buffer.add(experience(0))
    buffer.record_outcome([id_], success=good)
    buffer.record_outcome([id_], success=good * 0)
    assert (buffer[id_].retrieval_count, buffer[id_].success_count) == (2, 1.0)


def test_reembed_needs_a_function_and_a_name(buffer: ExperienceBuffer) -> None:
    add_all(buffer, range(1))
    with unchanged(buffer), pytest.raises(InvalidExperience, match="a function"):
        buffer.reembed(None)  # type: ignore[arg-type]
    with unchanged(buffer), pytest.raises(InvalidExperience, match="name must be"):
        buffer.reembed(lambda _: {}, name=3)  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", [None, 3, "state", [1, 2], {}])
def test_what_is_no_state_of_a_random_stream(buffer: ExperienceBuffer, bad: Any) -> None:
    with pytest.raises(ConfigError, match="not the state"):
        buffer.set_rng_state(bad)


@pytest.mark.parametrize("bad", ["", b"", 3, 1.5, ["a"], "a\0b"])
def test_what_is_no_path(bad: Any) -> None:
    with pytest.raises(ConfigError, match="path"):
        ExperienceBuffer.open(bad)


def test_a_path_that_the_system_refuses(tmp_path: Path) -> None:
    for bad in (tmp_path / ("n" * 300), Path(os.devnull) / "buffer"):
        for work in (ExperienceBuffer.open, ExperienceBuffer.load_from_disk):
            with pytest.raises(StorageError):
                work(bad)


@pytest.mark.parametrize("path", ["~/memory", b"~/memory", Path("~"), "~someone/memory"])
def test_no_folder_is_made_for_a_tilde(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"~ is not expanded.*expanduser"):
        ExperienceBuffer.open(path)
    with pytest.raises(ConfigError, match="~ is not expanded"):
        ExperienceBuffer.open(config={"path": os.fsdecode(path)})
    assert not list(tmp_path.iterdir())
    meant = os.path.join(".", os.fsdecode(path))
    ExperienceBuffer.open(meant, config=CONFIG).close()
    with ExperienceBuffer.open(path, config=CONFIG) as buffer:
        assert buffer.path == tmp_path / os.fsdecode(path)


def test_a_path_of_bytes(tmp_path: Path) -> None:
    with ExperienceBuffer.open(os.fsencode(tmp_path / "b"), config=CONFIG) as buffer:  # type: ignore[arg-type]
        assert buffer.path == tmp_path / "b"


# ---------------------------------------------------------------- what a first user gets wrong


def test_a_batch_is_not_padded_to_what_no_buffer_holds(buffer: ExperienceBuffer) -> None:
    query = np.ones((2, DIM))
    for k in (300_000_000, 10**12):
        with pytest.raises(InvalidExperience, match="padded to it, and this buffer holds at most"):
            buffer.search_many(v_embed=query, q_embed=query, k=k)
    assert buffer.search_many(v_embed=query, q_embed=query, k=5000).ids.shape == (2, 5000)
    assert len(buffer.search_index(v_embed=query[0], k=10**12)) == len(buffer)


def test_what_is_masked_is_no_value(buffer: ExperienceBuffer) -> None:
    masked, whole = np.ma.masked_array([1, 2], [0, 1]), np.ma.masked_array([1, 2])
    v = vector(1)
    for wrong in (
        lambda: buffer.add(Experience(v_embed=v, q_embed=v, metadata={"a": masked})),
        lambda: buffer.add(Experience(v_embed=v, q_embed=v, trajectory=[masked])),
        lambda: buffer.add(Experience(v_embed=np.ma.masked_array(v, v > 0), q_embed=v)),
        lambda: buffer.update_priorities([0, 1], masked),
        lambda: buffer.remove(masked),
        lambda: buffer.record_outcome([0, 1], success=True, credit=masked / 2),
    ):
        with unchanged(buffer), pytest.raises(InvalidExperience, match="masked entries"):
            wrong()
    id_ = buffer.add(Experience(v_embed=v, q_embed=v, metadata={"a": whole}))
    found = buffer.get(id_).metadata
    assert found is not None
    assert found["a"].tolist() == [1, 2]
    buffer.remove(id_)


def test_nothing_to_exclude(buffer: ExperienceBuffer) -> None:
    query = vector(1)
    assert buffer.search_index(v_embed=query, k=2, exclude=None).ids.tolist() == (
        buffer.search_index(v_embed=query, k=2).ids.tolist()
    )
    assert buffer.search_many(v_embed=query[np.newaxis], k=2, exclude=None).ids.shape == (1, 2)
    with pytest.raises(InvalidExperience, match="exclude"):
        buffer.search_index(v_embed=query, k=2, exclude=3.5)  # type: ignore[arg-type]


def test_results_say_why_they_are_not_pickled(buffer: ExperienceBuffer) -> None:
    found = buffer.search_index(v_embed=vector(1), k=2)
    for result in (found, found[0], buffer.sample(2), found.experiences):
        with pytest.raises(TypeError, match=r"list\(found\.experiences\)"):
            pickle.dumps(result)
    kept = (list(found.experiences), found.ids, found.receipt)
    again = pickle.loads(pickle.dumps(kept))  # noqa: S301  (made above)
    assert [e.answer for e in again[0]] == [hit.experience.answer for hit in found]
    assert again[2] == found.receipt


def test_a_result_is_not_its_receipt(buffer: ExperienceBuffer) -> None:
    found: Any = buffer.search_index(v_embed=vector(1), k=2)
    many: Any = buffer.search_many(v_embed=vector(1)[np.newaxis], k=2)
    for result in (found, many):
        with unchanged(buffer), pytest.raises(InvalidExperience, match=r"\.receipt"):
            buffer.record_outcome(result, success=True)


def test_arguments_of_sampling(buffer: ExperienceBuffer) -> None:
    for rng in (5, "x", np.random):
        with pytest.raises(InvalidExperience, match="default_rng"):
            buffer.sample(2, rng=rng)  # type: ignore[arg-type]
    for size in (0, -1, 1.5, True, 1 << 31):
        with pytest.raises(InvalidExperience, match="batch_size"):
            ReplayBatches(buffer, size)  # type: ignore[arg-type]
    with pytest.raises(InvalidExperience, match="each for itself"):
        buffer.sample(2, where=lambda columns: columns.has_tag(["a"]))  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", [-1, "x", 1.5])
def test_seeds(folder: Path, seed: Any) -> None:
    with pytest.raises(ConfigError, match="seed = "):
        ExperienceBuffer.open(folder, seed=seed)
    assert not folder.exists()


def test_a_text_is_no_column(buffer: ExperienceBuffer) -> None:
    parts = np.ones((3, DIM))
    for name in ("answer", "question", "tags"):
        with unchanged(buffer), pytest.raises(InvalidExperience, match=r"a list .*found a str"):
            buffer.add_many({"v_embed": parts, "q_embed": parts, name: "abc"})


def test_files_of_others(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "training.yaml"
    file.write_text("training: {lr: 0.1}\nmodel: {layers: 3}\n")
    with pytest.raises(ConfigError, match=r"no section 'experience_buffer'.*training, model"):
        ExperienceBuffer.open(folder, config=file)
    file.write_text("persistance: {backend: file}\n")  # misspelt
    with pytest.raises(ConfigError, match="did you mean 'persistence'"):
        ExperienceBuffer.open(folder, config=file)
    for wrong in (5, ["a"], object()):
        with pytest.raises(ConfigError, match="expected a path, a mapping"):
            ExperienceBuffer.open(folder, config=wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="must be a list"):
        ExperienceBuffer.open(folder, index={"fallback": "exact"})


@pytest.mark.parametrize(
    "bad", [{0: 0.5, 1: 1.0}, {0.5, 1.0}, frozenset({0.5, 1.0}), b"ab", bytearray(b"ab")]
)
def test_what_has_no_order_or_is_bytes_is_no_list_of_values(
    buffer: ExperienceBuffer, bad: Any
) -> None:
    """The keys of a mapping, say, would be taken for the rewards."""
    parts = np.ones((2, DIM))
    items = [experience(8), experience(9)]
    uses: list[Callable[[], Any]] = [
        lambda: buffer.update_rewards([0, 1], bad),
        lambda: buffer.update_priorities([0, 1], bad),
        lambda: buffer.add_many(items, priorities=bad),
        lambda: buffer.add_many({"v_embed": parts, "q_embed": parts}, priorities=bad),
        lambda: buffer.add_many({"v_embed": parts, "q_embed": parts, "confidence": bad}),
        lambda: buffer.add_many({"v_embed": parts, "q_embed": parts, "answer": bad}),
    ]
    with unchanged(buffer):
        for use in uses:
            with pytest.raises(InvalidExperience, match=f"found a {type(bad).__name__}"):
                use()


def test_rewards_by_name_for_one_experience(buffer: ExperienceBuffer) -> None:
    with unchanged(buffer), pytest.raises(InvalidExperience, match=r"in the order.*found a dict"):
        buffer.update_rewards([0], {"correct": 1.0})  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [bytes, bytearray])
def test_bytes_are_no_ids(buffer: ExperienceBuffer, kind: Any) -> None:
    """Of an encoded receipt each byte would be one."""
    uses: list[Callable[[], Any]] = [
        lambda: buffer.record_outcome(kind(b"\0\1"), success=True),
        lambda: buffer.remove(kind(b"\0\1")),
        lambda: buffer.update_priorities(kind(b"\0\1"), [1.0, 2.0]),
        lambda: find(buffer, 1, exclude=kind(b"\0\1")),
    ]
    with unchanged(buffer):
        for use in uses:
            with pytest.raises(InvalidExperience, match=f"integers, found a {kind.__name__}"):
                use()


@pytest.mark.parametrize("bad", ["0", 0.5, None, (0,), True])
def test_a_credit_by_something_else_than_ids(buffer: ExperienceBuffer, bad: Any) -> None:
    """JSON makes texts of a mapping's keys; nobody would have got any credit."""
    receipt = find(buffer, 0, k=3).receipt
    with (
        unchanged(buffer),
        pytest.raises(InvalidExperience, match=r"credit: .*an id is an integer"),
    ):
        buffer.record_outcome(receipt, success=True, credit={bad: 1.0})
    assert buffer.record_outcome(receipt, success=True) == 3


@pytest.mark.parametrize("name", ["question", "metadata", "tags", "nonsense"])
def test_a_condition_on_what_is_no_column(buffer: ExperienceBuffer, name: str) -> None:
    with pytest.raises(AttributeError, match=rf"no column '{name}'.*confidence.*has_tag"):
        buffer.search_index(v_embed=vector(1), k=2, where=lambda c: getattr(c, name) == "x")


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ([-0.1, 1.1], "-0.1 is negative"),
        ([0.5, 0.2], "sum to 1, not to 0.7"),
        ([NAN, 1.0], "nan at position 0; probabilities must be finite"),
    ],
)
def test_what_is_wrong_with_probabilities(buffer: ExperienceBuffer, bad: Any, message: str) -> None:
    with unchanged(buffer), pytest.raises(InvalidExperience, match=message):
        buffer.add(experience(9, probabilities=bad))


def test_messages_show_numbers_as_they_were_given(buffer: ExperienceBuffer) -> None:
    for use in (
        lambda: buffer.update_rewards([0], [1e300]),
        lambda: buffer.update_priorities([0], [1e300]),
        lambda: buffer.add(experience(9), priority=1e300),
        lambda: buffer.add(experience(9, rewards=1e300)),
    ):
        with unchanged(buffer), pytest.raises(InvalidExperience, match=r": 1e\+300 is not finite"):
            use()
    with unchanged(buffer), pytest.raises(InvalidExperience, match=r"-1\.0 is negative"):
        buffer.update_priorities([0], [-1])
    with unchanged(buffer), pytest.raises(InvalidExperience, match="at least 0, found -1"):
        buffer.add(experience(9), priority=-1)


@pytest.mark.parametrize(
    ("bad", "kind"),
    [(np.array([1, None]), "object"), (np.zeros(2, [("a", "f4")]), r"\[\('a', '<f4'\)\]")],
)
def test_an_array_that_cannot_be_stored(buffer: ExperienceBuffer, bad: Any, kind: str) -> None:
    message = rf"metadata: cannot store an array of dtype {kind}"
    with unchanged(buffer), pytest.raises(InvalidExperience, match=message):
        buffer.add(experience(9, metadata={"a": bad}))
