"""The contract suite of index backends must fail on every backend with a planted bug."""

from __future__ import annotations

import itertools
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from expbuf_core.builtin.exact import ExactIndexBackend, ExactSegment, ExactSettings
from expbuf_core.contracts import IndexBackend, IndexProvider, IndexSegment
from expbuf_core.exact_search import exact_search, unpack_allowed
from expbuf_core.testing import IndexSuite
from expbuf_core.testing.index_suite import METRICS


def offered(backend: type[IndexBackend], *capabilities: str) -> IndexProvider:
    return IndexProvider(
        "planted",
        api_version=1,
        factory=backend,
        settings=ExactSettings,
        capabilities=frozenset(capabilities),
    )


class Right(ExactSegment):
    """No bug; what the planted ones begin with."""

    def rows(self, found: Any) -> Any:
        return np.searchsorted(self._ids, found)


class TestAProviderObject(IndexSuite):
    """A provider may be given as an object, without being installed."""

    provider = offered(ExactIndexBackend, "filter")
    min_recall = 1.0
    rows = 500


class TestWithoutFilter(IndexSuite):
    """A backend that does not filter keeps the rest of the contract."""

    class Backend(ExactIndexBackend):
        def open(self, path: Path, ids: Any, vectors: Any) -> Any:
            class Segment(Right):
                def search(self, queries: Any, k: int, allowed: Any) -> Any:
                    assert allowed is None, "a bitmap for a backend that declares no filter"
                    return super().search(queries, k, None)

            super().open(path, ids, vectors)
            return Segment(ids, vectors, self._context.metric)

    provider = offered(Backend)
    min_recall = 1.0
    rows = 500


# ---------------------------------------------------------------- segments with a bug


class ReturnsRemoved(Right):
    def search(self, queries: Any, k: int, allowed: Any) -> Any:
        return super().search(queries, k, None)


class FiltersAfterwards(Right):
    def search(self, queries: Any, k: int, allowed: Any) -> Any:
        ids, similarities = super().search(queries, k, None)
        if allowed is not None:
            out = ~unpack_allowed(allowed, len(self._ids))[self.rows(ids)]
            ids[out], similarities[out] = -1, -np.inf
            order = np.argsort(-similarities, axis=1, kind="stable")
            ids = np.take_along_axis(ids, order, 1)
            similarities = np.take_along_axis(similarities, order, 1)
        return ids, similarities


class RemembersTheBitmap(Right):
    known: tuple[Any, Any] = (None, None)

    def search(self, queries: Any, k: int, allowed: Any) -> Any:
        if allowed is not None and self.known[0] is not allowed:
            self.known = (allowed, allowed.copy())
        return super().search(queries, k, None if allowed is None else self.known[1])


class CountsTrailingBits(Right):
    def search(self, queries: Any, k: int, allowed: Any) -> Any:
        if allowed is not None and np.unpackbits(allowed).sum() > len(self._ids):
            raise AssertionError("more bits than rows")
        return super().search(queries, k, allowed)


class IgnoresK(Right):
    def search(self, queries: Any, k: int, allowed: Any) -> Any:
        return super().search(queries, 10, allowed)


class DoesNotPad(Right):
    def search(self, queries: Any, k: int, allowed: Any) -> Any:
        return super().search(queries, min(k, len(self._ids)), allowed)


class PadsWithZeros(Right):
    def search(self, queries: Any, k: int, allowed: Any) -> Any:
        ids, similarities = super().search(queries, k, allowed)
        return np.where(ids < 0, 0, ids), similarities


class UsesItsArraysAgain(Right):
    def search(self, queries: Any, k: int, allowed: Any) -> Any:
        found = super().search(queries, k, allowed)
        kept = self.__dict__.setdefault("kept", {}).setdefault(found[0].shape, found)
        kept[0][:], kept[1][:] = found
        return kept


class Unsorted(Right):
    def search(self, queries: Any, k: int, allowed: Any) -> Any:
        ids, similarities = super().search(queries, k, allowed)
        return ids[:, ::-1], similarities[:, ::-1]


class RowsForIds(Right):
    def search(self, queries: Any, k: int, allowed: Any) -> Any:
        ids, similarities = super().search(queries, k, allowed)
        return np.where(ids < 0, -1, self.rows(ids)), similarities


class IdsIn32Bits(Right):
    def search(self, queries: Any, k: int, allowed: Any) -> Any:
        ids, similarities = super().search(queries, k, allowed)
        return ids.astype(np.int32).astype(np.int64), similarities


class Farthest(Right):
    def search(self, queries: Any, k: int, allowed: Any) -> Any:
        ids, similarities = super().search(-queries, k, allowed)
        return ids, -similarities


class OffByOne(Right):
    def search(self, queries: Any, k: int, allowed: Any) -> Any:
        ids, similarities = super().search(queries, k, allowed)
        neighbour = self._ids[np.minimum(self.rows(ids) + 1, len(self._ids) - 1)]
        return np.where(ids < 0, -1, neighbour), similarities


class PositiveDistances(Right):
    def search(self, queries: Any, k: int, allowed: Any) -> Any:
        ids, similarities = super().search(queries, k, allowed)
        return ids, np.abs(similarities) if self._metric == "l2" else similarities


class AnotherTypeOfSimilarity(Right):
    def search(self, queries: Any, k: int, allowed: Any) -> Any:
        ids, similarities = super().search(queries, k, allowed)
        return ids, similarities.astype(np.float64)


class CoarseSimilarities(Right):
    def search(self, queries: Any, k: int, allowed: Any) -> Any:
        ids, similarities = super().search(queries, k, allowed)
        return ids, similarities.astype(np.float16).astype(np.float32)


class TheSameTwice(Right):
    def search(self, queries: Any, k: int, allowed: Any) -> Any:
        ids, similarities = super().search(queries, k, allowed)
        ids[:, 1:2], similarities[:, 1:2] = ids[:, :1], similarities[:, :1]
        return ids, similarities


class AlwaysTheInnerProduct(Right):
    def search(self, queries: Any, k: int, allowed: Any) -> Any:
        self._metric = "inner_product"
        return super().search(queries, k, allowed)


class FirstQueryOnly(Right):
    def search(self, queries: Any, k: int, allowed: Any) -> Any:
        return super().search(np.repeat(queries[:1], len(queries), axis=0), k, allowed)


class LooksAtHalf(Right):
    def search(self, queries: Any, k: int, allowed: Any) -> Any:
        half = np.arange(len(self._ids)) < len(self._ids) // 2
        rows, similarities = exact_search(self._vectors, None, queries, k, self._metric, half)
        return np.where(rows < 0, -1, self._ids[rows]), similarities


class ForgetsNeighbours(Right):
    """Finds something for every query, but not what is nearest."""

    def search(self, queries: Any, k: int, allowed: Any) -> Any:
        ids, similarities = super().search(queries, k + 5, allowed)
        return ids[:, 5:].copy(), similarities[:, 5:].copy()


class Scratch(Right):
    """Keeps the query in itself while it works."""

    query: Any = None

    def search(self, queries: Any, k: int, allowed: Any) -> Any:
        self.query = queries
        time.sleep(1e-4)
        return super().search(self.query, k, allowed)


class Restless(Right):
    calls = 0

    def search(self, queries: Any, k: int, allowed: Any) -> Any:
        ids, similarities = super().search(queries, k, allowed)
        self.calls += 1
        return np.roll(ids, self.calls % 2, axis=1), similarities


class OnlyInItsProcess(Right):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._pid = os.getpid()

    def search(self, queries: Any, k: int, allowed: Any) -> Any:
        if os.getpid() != self._pid:
            time.sleep(3600)  # for threads that the child does not have
        return super().search(queries, k, allowed)


class ChangesQueries(Right):
    def search(self, queries: Any, k: int, allowed: Any) -> Any:
        queries /= np.linalg.norm(queries, axis=1, keepdims=True)
        return super().search(queries, k, allowed)


class OddFacts(Right):
    def info(self) -> dict[str, Any]:
        return {"rows": np.int64(3)}


class NotANumber(Right):
    def search(self, queries: Any, k: int, allowed: Any) -> Any:
        ids, similarities = super().search(queries, k, allowed)
        with np.errstate(invalid="ignore"):
            return ids, similarities * np.sign(np.abs(similarities)) / np.sign(np.abs(similarities))


# ---------------------------------------------------------------- backends with a bug


class WritesTwoFiles(ExactIndexBackend):
    def build(self, ids: Any, vectors: Any, path: Path) -> None:
        super().build(ids, vectors, path)
        path.with_name("index.ids").write_bytes(ids.tobytes())


class KnowsItsPath(ExactIndexBackend):
    def build(self, ids: Any, vectors: Any, path: Path) -> None:
        path.write_text(str(path))

    def open(self, path: Path, ids: Any, vectors: Any) -> Any:
        if path.read_text() != str(path):
            raise AssertionError("it was moved")
        return Right(ids, vectors, self._context.metric)


class BelievesAnyFile(ExactIndexBackend):
    def open(self, path: Path, ids: Any, vectors: Any) -> Any:
        return Right(ids, vectors, self._context.metric)


class DiesOfDamage(ExactIndexBackend):
    def open(self, path: Path, ids: Any, vectors: Any) -> Any:
        try:
            return super().open(path, ids, vectors)
        except Exception:
            os.kill(os.getpid(), signal.SIGKILL)
            raise


class PretendsToServeAll(ExactIndexBackend):
    metrics = ("cosine", "l2")


class KeepsEverythingInMemory(ExactIndexBackend):
    """A fork would not notice: it has that memory, too."""

    built: set[Path] = set()  # noqa: RUF012

    def build(self, ids: Any, vectors: Any, path: Path) -> None:
        super().build(ids, vectors, path)
        self.built.add(path)

    def open(self, path: Path, ids: Any, vectors: Any) -> Any:
        assert path in self.built
        return super().open(path, ids, vectors)


class ClosesOthers(ExactIndexBackend):
    shared: dict[Path, list[Any]] = {}  # noqa: RUF012

    def open(self, path: Path, ids: Any, vectors: Any) -> Any:
        vectors_of = self.shared.setdefault(path, [vectors])

        class Segment(Right):
            def search(self, queries: Any, k: int, allowed: Any) -> Any:
                assert vectors_of, "closed"
                return super().search(queries, k, allowed)

            def close(self) -> None:
                vectors_of.clear()

        return Segment(ids, vectors, self._context.metric)


BUGS: list[tuple[type[IndexSegment] | type[IndexBackend], str]] = [
    (ReturnsRemoved, "x20"),
    (ReturnsRemoved, "x21"),
    (ReturnsRemoved, "x23"),
    (ReturnsRemoved, "x24"),
    (FiltersAfterwards, "x20"),
    (FiltersAfterwards, "x22"),
    (RemembersTheBitmap, "x26"),
    (CountsTrailingBits, "x25"),
    (IgnoresK, "x5"),
    (DoesNotPad, "x6"),
    (DoesNotPad, "x11"),
    (PadsWithZeros, "x6"),
    (Unsorted, "x2"),
    (RowsForIds, "x3"),
    (RowsForIds, "x2"),
    (IdsIn32Bits, "x3"),
    (OffByOne, "x2"),
    (OffByOne, "x4"),
    (PositiveDistances, "x2"),
    (AnotherTypeOfSimilarity, "x2"),
    (CoarseSimilarities, "x2"),
    (TheSameTwice, "x10"),
    (AlwaysTheInnerProduct, "x1"),
    (FirstQueryOnly, "x8"),
    (LooksAtHalf, "x1"),
    (LooksAtHalf, "x7"),
    (ForgetsNeighbours, "x1"),
    (Restless, "x9"),
    (NotANumber, "x12"),
    (WritesTwoFiles, "x30"),
    (KnowsItsPath, "x31"),
    (ChangesQueries, "x32"),
    (PretendsToServeAll, "x13"),
    (UsesItsArraysAgain, "x14"),
    (BelievesAnyFile, "x34"),
    (DiesOfDamage, "x35"),
    (OddFacts, "x36"),
    (ClosesOthers, "x37"),
    (Scratch, "x40"),
    (OnlyInItsProcess, "x41"),
    (KeepsEverythingInMemory, "x42"),
]


def suite_for(bug: type[Any]) -> IndexSuite:
    backend = bug
    if issubclass(bug, IndexSegment):

        class Backend(ExactIndexBackend):
            def open(self, path: Path, ids: Any, vectors: Any) -> Any:
                super().open(path, ids, vectors)
                return bug(ids, vectors, self._context.metric)

        backend = Backend

    class Planted(IndexSuite):
        provider = offered(backend, "filter")
        min_recall = 0.95
        rows = 500
        metrics = getattr(bug, "metrics", METRICS)

    return Planted()


def calls(suite: IndexSuite, number: str, folder: Path) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Every parametrized call of the test with this number, each with a folder of its own."""
    (name,) = (name for name in dir(suite) if name.startswith(f"test_{number}_"))
    test = getattr(suite, name)
    marks = [mark for mark in getattr(test, "pytestmark", []) if mark.name == "parametrize"]
    choices = [[(mark.args[0], value) for value in mark.args[1]] for mark in marks]
    for i, chosen in enumerate(itertools.product(*choices)):
        own = folder / str(i)
        own.mkdir()
        yield test, {"tmp_path": own, **dict(chosen)}


@pytest.mark.parametrize(
    ("bug", "number"), BUGS, ids=lambda value: getattr(value, "__name__", value)
)
def test_the_suite_finds(
    bug: type[Any], number: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("expbuf_core.testing.processes.TIMEOUT_S", 2)
    errors = []
    for test, arguments in calls(suite_for(bug), number, tmp_path):
        try:
            test(**arguments)
        except (Exception, pytest.fail.Exception) as exc:
            errors.append(exc)
    assert errors, f"{number} passed although {bug.__name__}"


@pytest.mark.parametrize(
    ("bug", "number", "advice"),
    [
        (RowsForIds, "x1", r"row numbers: return ids\[rows\]"),
        (Farthest, "x1", r"the least similar: larger is closer"),
        (OffByOne, "x2", r"-?[0-9.e-]+ for id \d+, whose \w+ similarity is"),
        (WritesTwoFiles, "x30", r"left \['index.ids', 'index.tmp'\]"),
    ],
)
def test_the_message_says_what_to_look_for(
    bug: type[Any], number: str, advice: str, tmp_path: Path
) -> None:
    test, arguments = next(calls(suite_for(bug), number, tmp_path))
    with pytest.raises(AssertionError, match=advice):
        test(**arguments)


def test_every_behaviour_has_a_bug_or_is_known_to_have_none() -> None:
    """A test that nothing can fail is no test; a file that is read once cannot vanish (X33)."""
    numbers = {name.split("_")[1] for name in dir(IndexSuite) if name.startswith("test_x")}
    assert numbers - {number for _, number in BUGS} == {"x33"}


def test_numbers_stand_in_the_docstrings() -> None:
    for name in dir(IndexSuite):
        if name.startswith("test_x"):
            number = name.split("_")[1].upper()
            assert (getattr(IndexSuite, name).__doc__ or "").startswith(f"{number}: "), name
