"""The contract of `IndexBackend` as tests; a plugin's test file is a subclass.

    from expbuf_core.testing import IndexSuite

    class TestMyIndex(IndexSuite):
        provider = "my_index"

Every behaviour has a number, which stays for ever. Only a capability that the provider does not
declare skips a test. What a backend returns is compared with a scan in float64, written here and
nowhere else used.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ClassVar, NamedTuple, cast

import numpy as np
import pytest
from numpy.typing import NDArray

from expbuf_core.contracts import IndexBackend, IndexContext, IndexProvider, IndexSegment
from expbuf_core.crc import crc32
from expbuf_core.errors import BackendUnavailable
from expbuf_core.testing.processes import Child, in_child, in_threads
from expbuf_core.testing.suite import Suite

METRICS = ("cosine", "inner_product", "l2")

Ids = NDArray[np.int64]
Vectors = NDArray[np.float32]
Found = tuple[Ids, Vectors]

each_metric = pytest.mark.parametrize("metric", METRICS)


class Case(NamedTuple):
    """A segment that was built and opened, and what it was built from.

    `ids` and `vectors` are what the backend was given: `vectors` a read-only map of `pristine`.
    """

    backend: IndexBackend
    segment: IndexSegment
    path: Path
    ids: Ids
    vectors: Vectors
    pristine: Vectors
    queries: Vectors
    metric: str


class IndexSuite(Suite):
    """What every index backend must do.

    Attributes:
        provider: The backend's name, or its `IndexProvider`.
        settings: Its section of the configuration.
        metrics: Those that the backend serves; it refuses the others when it is made (X13).
        rows: Vectors in most segments; raise it for a backend that is exact below some number.
        dim: Their dimension.
        min_recall: Mean recall at 10 that must be reached, also with a quarter removed.
        tolerance: By how much a similarity may be off, relative to the vectors' lengths.
    """

    kind = "index"
    provider: ClassVar[str | IndexProvider] = ""
    metrics: ClassVar[Sequence[str]] = METRICS
    rows: ClassVar[int] = 2000
    dim: ClassVar[int] = 48
    min_recall: ClassVar[float] = 0.9
    tolerance: ClassVar[float] = 1e-5

    # ------------------------------------------------------------ results

    @each_metric
    def test_x1_finds_the_most_similar(self, tmp_path: Path, metric: str) -> None:
        """X1: recall at 10 reaches `min_recall` under every metric."""
        case = self.case(tmp_path, metric)
        ids, _ = case.segment.search(case.queries, 10, None)
        self.check_recall(case, ids, 10)

    @each_metric
    def test_x2_similarities_are_those_of_the_ids(self, tmp_path: Path, metric: str) -> None:
        """X2: each similarity belongs to its id, larger is closer, and L2 is never positive."""
        case = self.case(tmp_path, metric)
        ids, similarities = case.segment.search(case.queries, 10, None)
        self.check_results(case, case.queries, 10, ids, similarities)

    def test_x3_ids_are_as_given(self, tmp_path: Path) -> None:
        """X3: ids with gaps, beyond 32 bits, come back as they are; never a row number."""
        case = self.case(tmp_path, first_id=1 << 40)
        ids, _ = case.segment.search(case.queries, 10, None)
        assert np.isin(ids, case.ids).all(), "an id was returned that was never given"
        self.check_recall(case, ids, 10)

    @each_metric
    def test_x4_a_stored_vector_finds_itself(self, tmp_path: Path, metric: str) -> None:
        """X4: the nearest of a stored vector is itself (cosine, L2), at the similarity it must."""
        if metric == "inner_product":
            metric = "cosine"  # a longer vector may be more similar than itself
        case = self.case(tmp_path, metric)
        rows = np.arange(0, self.rows, self.rows // 20)
        ids, similarities = case.segment.search(np.ascontiguousarray(case.pristine[rows]), 1, None)
        share = float((ids[:, 0] == case.ids[rows]).mean())
        assert share >= self.min_recall, f"only {share:.0%} of stored vectors find themselves"
        own = similarities[ids[:, 0] == case.ids[rows], 0]
        wanted = 0.0 if metric == "l2" else 1.0
        assert np.allclose(own, wanted, atol=10 * self.tolerance), (
            f"similarities to itself from {own.min():.6g} to {own.max():.6g}, wanted {wanted}"
        )

    @pytest.mark.parametrize("k", [1, 2, 10, 100])
    def test_x5_returns_k(self, tmp_path: Path, k: int) -> None:
        """X5: exactly k columns, and no padding while there are rows."""
        case = self.case(tmp_path)
        ids, similarities = case.segment.search(case.queries, k, None)
        self.check_results(case, case.queries, k, ids, similarities)

    def test_x6_more_than_there_are(self, tmp_path: Path) -> None:
        """X6: k beyond the rows returns every id once, then -1 and -inf."""
        case = self.case(tmp_path, rows=37)
        ids, similarities = case.segment.search(case.queries, 50, None)
        self.check_results(case, case.queries, 50, ids, similarities)
        assert (np.sort(ids[:, :37]) == case.ids).all(), "not every id was returned"

    def test_x7_all_rows(self, tmp_path: Path) -> None:
        """X7: k equal to the rows of a large segment returns all of them."""
        case = self.case(tmp_path)
        ids, similarities = case.segment.search(case.queries[:2], self.rows, None)
        self.check_results(case, case.queries[:2], self.rows, ids, similarities)
        assert (np.sort(ids) == case.ids).all(), "not every id was returned"

    def test_x8_batch_equals_singles(self, tmp_path: Path) -> None:
        """X8: a batch finds what its queries find one by one, up to rounding."""
        case = self.case(tmp_path)
        ids, similarities = case.segment.search(case.queries, 10, None)
        for i in range(len(case.queries)):
            alone = case.segment.search(case.queries[i : i + 1], 10, None)
            self.check_same((ids[i : i + 1], similarities[i : i + 1]), alone)

    def test_x9_repeats_itself(self, tmp_path: Path) -> None:
        """X9: the same query finds the same, in this segment and in one opened anew."""
        case = self.case(tmp_path)
        first = case.segment.search(case.queries, 10, None)
        assert _identical(first, case.segment.search(case.queries, 10, None)), "not repeatable"
        again = case.backend.open(case.path, case.ids, case.vectors)
        assert _identical(first, again.search(case.queries, 10, None)), "opened anew it differs"

    def test_x10_duplicates(self, tmp_path: Path) -> None:
        """X10: of equal vectors every one can be found; none twice."""
        vectors = np.repeat(self.vectors(self.rows // 50, "cosine"), 50, axis=0)
        case = self.case(tmp_path, given=vectors)
        ids, similarities = case.segment.search(np.ascontiguousarray(vectors[::500]), 20, None)
        self.check_results(case, np.ascontiguousarray(vectors[::500]), 20, ids, similarities)
        assert np.allclose(similarities, 1, atol=10 * self.tolerance), "a duplicate was missed"

    @pytest.mark.parametrize("rows", [1, 2, 7, 8, 9, 64])
    def test_x11_small_segments(self, tmp_path: Path, rows: int) -> None:
        """X11: segments of a few rows are complete."""
        case = self.case(tmp_path, rows=rows)
        ids, similarities = case.segment.search(case.queries, 10, None)
        self.check_results(case, case.queries, 10, ids, similarities)

    @each_metric
    def test_x12_constant_vectors(self, tmp_path: Path, metric: str) -> None:
        """X12: vectors that are all the same, or zero, neither fail nor give NaN."""
        given = np.ones((self.rows, self.dim), np.float32) / np.float32(np.sqrt(self.dim))
        given[1::2] = 0
        case = self.case(tmp_path, metric, given=given)
        ids, similarities = case.segment.search(case.queries, 10, None)
        self.check_results(case, case.queries, 10, ids, similarities)

    @each_metric
    def test_x13_refuses_other_metrics(self, metric: str) -> None:
        """X13: a metric that it does not serve is refused when it is made."""
        if metric in self.metrics:
            self.backend(metric)
            return
        with pytest.raises(BackendUnavailable, match=metric):
            self.backend(metric)

    def test_x14_results_are_the_callers(self, tmp_path: Path) -> None:
        """X14: what a search returned stays as it is when others follow."""
        case = self.case(tmp_path)
        for queries in (case.queries[:1], case.queries):
            found = case.segment.search(queries, 10, None)
            before = found[0].copy(), found[1].copy()
            case.segment.search(np.ascontiguousarray(-queries), 10, None)
            assert _identical(before, found), "a later search has changed an earlier result"

    # ------------------------------------------------------------ allowed rows

    @each_metric
    def test_x20_never_what_is_not_allowed(self, tmp_path: Path, metric: str) -> None:
        """X20: with a quarter removed, none of it is returned, and recall holds up."""
        self.needs("filter")
        case = self.case(tmp_path, metric)
        mask = np.random.default_rng(1).random(self.rows) < 0.75
        ids, similarities = case.segment.search(case.queries, 10, _bitmap(mask))
        self.check_results(case, case.queries, 10, ids, similarities, mask)
        self.check_recall(case, ids, 10, mask)

    def test_x21_a_removed_prefix(self, tmp_path: Path) -> None:
        """X21: as X20, for what first in, first out leaves."""
        self.needs("filter")
        case = self.case(tmp_path)
        mask = np.arange(self.rows) >= self.rows // 3
        ids, similarities = case.segment.search(case.queries, 10, _bitmap(mask))
        self.check_results(case, case.queries, 10, ids, similarities, mask)
        self.check_recall(case, ids, 10, mask)

    @pytest.mark.parametrize("left", [1, 5, 10, 11, 40, 500])
    def test_x22_few_left(self, tmp_path: Path, left: int) -> None:
        """X22: k results whenever k rows are allowed, wherever they lie; all where fewer are."""
        self.needs("filter")
        case = self.case(tmp_path)
        mask = np.zeros(self.rows, np.bool_)
        mask[np.random.default_rng(2).choice(self.rows, left, replace=False)] = True
        ids, similarities = case.segment.search(case.queries, 10, _bitmap(mask))
        self.check_results(case, case.queries, 10, ids, similarities, mask)

    def test_x23_none_left(self, tmp_path: Path) -> None:
        """X23: with everything removed, nothing but padding."""
        self.needs("filter")
        case = self.case(tmp_path)
        mask = np.zeros(self.rows, np.bool_)
        ids, similarities = case.segment.search(case.queries, 10, _bitmap(mask))
        self.check_results(case, case.queries, 10, ids, similarities, mask)

    def test_x24_the_nearest_are_removed(self, tmp_path: Path) -> None:
        """X24: what was found and then removed is replaced by the next nearest, again and again."""
        self.needs("filter")
        case = self.case(tmp_path)
        query = case.queries[:1]
        mask = np.ones(self.rows, np.bool_)
        for _ in range(20):
            ids, similarities = case.segment.search(query, 10, _bitmap(mask))
            self.check_results(case, query, 10, ids, similarities, mask)
            mask[np.searchsorted(case.ids, ids[0])] = False

    def test_x25_all_allowed(self, tmp_path: Path) -> None:
        """X25: a bitmap of ones finds what no bitmap finds, bits behind the last row or not."""
        self.needs("filter")
        rows = self.rows - self.rows % 8 - 3
        case = self.case(tmp_path, rows=rows)
        free = case.segment.search(case.queries, 10, None)
        for bitmap in (_bitmap(np.ones(rows, np.bool_)), np.full((rows + 7) // 8, 255, np.uint8)):
            self.check_same(free, case.segment.search(case.queries, 10, bitmap))

    def test_x26_the_bitmap_may_change(self, tmp_path: Path) -> None:
        """X26: the bitmap counts as it is at the call, also when the same array was used before."""
        self.needs("filter")
        case = self.case(tmp_path)
        bitmap = _bitmap(np.ones(self.rows, np.bool_))
        case.segment.search(case.queries, 10, bitmap)
        mask = np.random.default_rng(3).random(self.rows) < 0.02
        bitmap[:] = _bitmap(mask)
        ids, similarities = case.segment.search(case.queries, 10, bitmap)
        self.check_results(case, case.queries, 10, ids, similarities, mask)

    # ------------------------------------------------------------ files

    def test_x30_build_writes_one_file(self, tmp_path: Path) -> None:
        """X30: `build` writes `path` and nothing else beside it."""
        folder = tmp_path / "alone"
        folder.mkdir()
        self.backend("cosine").build(
            np.arange(self.rows), self.vectors(self.rows, "cosine"), folder / "index.tmp"
        )
        left = sorted(entry.name for entry in folder.iterdir())
        assert left == ["index.tmp"], f"build was to write index.tmp, and left {left}"

    def test_x31_the_file_may_be_renamed(self, tmp_path: Path) -> None:
        """X31: a file opens under another name, in another folder, and with its builder gone."""
        case = self.case(tmp_path)
        elsewhere = tmp_path / "elsewhere"
        elsewhere.mkdir()
        moved = elsewhere / "segment"
        os.rename(case.path, moved)
        segment = self.backend(case.metric).open(moved, case.ids, case.vectors)
        expected = case.segment.search(case.queries, 10, None)
        assert _identical(expected, segment.search(case.queries, 10, None)), "it answers otherwise"

    def test_x32_nothing_given_is_changed(self, tmp_path: Path) -> None:
        """X32: read-only maps are enough; searching changes neither file nor arguments."""
        case = self.case(tmp_path)
        before, queries = case.path.read_bytes(), case.queries.copy()
        bitmap = None
        if self.filters():
            bitmap = _bitmap(np.arange(self.rows) % 2 == 0)
            bitmap.flags.writeable = False
        frozen = case.queries.copy()
        frozen.flags.writeable = False
        case.segment.search(frozen, 10, bitmap)
        assert case.path.read_bytes() == before, "a search changed the file"
        assert (frozen == queries).all(), "a search changed its queries"
        assert (np.asarray(case.vectors) == case.pristine).all(), "the vectors were changed"

    def test_x33_a_deleted_file_stays_open(self, tmp_path: Path) -> None:
        """X33: an open segment goes on answering when its file is replaced or deleted."""
        case = self.case(tmp_path)
        expected = case.segment.search(case.queries, 10, None)
        case.path.unlink()
        assert _identical(expected, case.segment.search(case.queries, 10, None))

    def test_x34_a_cut_file_raises(self, tmp_path: Path) -> None:
        """X34: a file cut anywhere raises on opening: no crash, no wrong answer."""
        case = self.case(tmp_path)
        size = case.path.stat().st_size
        for length in sorted({0, 1, size // 3, size // 2, size - 1}):
            cut = tmp_path / f"cut{length}"
            cut.write_bytes(case.path.read_bytes()[:length])

            def opened(cut: Path = cut) -> bool:
                try:
                    self.backend(case.metric).open(cut, case.ids, case.vectors)
                except Exception:
                    return True
                return False

            assert _in_child(opened), f"a file cut from {size} to {length} bytes was opened"

    def test_x35_a_damaged_file_does_not_crash(self, tmp_path: Path) -> None:
        """X35: with a byte changed a file raises, or answers; the process survives.

        It has to raise if the backend declares "verifies". A `file_crc` is that of the file.
        """
        case = self.case(tmp_path)
        assert case.segment.file_crc in (None, crc32(case.path.read_bytes()))
        size = case.path.stat().st_size
        for offset in np.linspace(0, size - 1, 12).astype(int):
            damaged = tmp_path / f"damaged{offset}"
            content = bytearray(case.path.read_bytes())
            content[offset] ^= 0x55
            damaged.write_bytes(content)

            def survives(damaged: Path = damaged) -> bool:
                try:
                    segment = self.backend(case.metric).open(damaged, case.ids, case.vectors)
                    segment.search(case.queries, 10, None)
                except Exception:
                    return True
                return "verifies" not in self.chosen().capabilities

            assert _in_child(survives), f"byte {offset} changed: it died, or did not verify it"

    def test_x36_facts_are_json(self, tmp_path: Path) -> None:
        """X36: `info` is JSON-like."""
        json.dumps(self.case(tmp_path).segment.info())

    def test_x37_close(self, tmp_path: Path) -> None:
        """X37: `close` may be called twice, and leaves other segments of the file alone."""
        case = self.case(tmp_path)
        other = case.backend.open(case.path, case.ids, case.vectors)
        expected = other.search(case.queries, 10, None)
        case.segment.close()
        case.segment.close()
        assert _identical(expected, other.search(case.queries, 10, None)), "closing hurt another"

    # ------------------------------------------------------------ threads and processes

    def test_x40_threads(self, tmp_path: Path) -> None:
        """X40: several threads search one segment, filtered or not, and find what one finds."""
        case = self.case(tmp_path)
        bitmaps: list[NDArray[np.uint8] | None] = [None]
        if self.filters():
            draw = np.random.default_rng(4)
            bitmaps += [_bitmap(draw.random(self.rows) < share) for share in (0.75, 0.3)]
        expected = [
            [case.segment.search(query[np.newaxis], 10, bitmap) for query in case.queries]
            for bitmap in bitmaps
        ]

        def work(first: int) -> None:
            for turn in range(3 * len(bitmaps)):
                which = (first + turn) % len(bitmaps)
                for i, query in enumerate(case.queries):
                    found = case.segment.search(query[np.newaxis], 10, bitmaps[which])
                    assert _identical(found, expected[which][i]), (
                        f"a thread found something else for query {i}, bitmap {which}"
                    )

        in_threads(work)

    def test_x41_a_forked_child(self, tmp_path: Path) -> None:
        """X41: after `after_fork` a child searches an inherited segment, and opens others."""
        case = self.case(tmp_path)
        expected = case.segment.search(case.queries, 10, None)

        def child() -> bool:
            case.backend.after_fork()
            inherited = case.segment.search(case.queries, 10, None)
            own = case.backend.open(case.path, case.ids, case.vectors)
            return _identical(expected, inherited) and _identical(
                expected, own.search(case.queries, 10, None)
            )

        assert _in_child(child), "the child found something else, died, or hung"

    def test_x42_another_process(self, tmp_path: Path) -> None:
        """X42: a process that has built nothing opens the file and finds the same."""
        case = self.case(tmp_path)
        expected = case.segment.search(case.queries, 10, None)
        for name, array in (("ids", case.ids), ("queries", case.queries), ("found", expected[0])):
            np.save(tmp_path / f"{name}.npy", array)
        np.save(tmp_path / "similarities.npy", expected[1])
        self.elsewhere("finds_the_same", str(tmp_path), case.metric)

    def finds_the_same(self, folder: str, metric: str) -> None:
        """In another process, see X42: open the segment in the folder and compare."""
        ids, queries, found, similarities = (
            np.load(Path(folder) / f"{name}.npy")
            for name in ("ids", "queries", "found", "similarities")
        )
        vectors = np.load(Path(folder) / "raw.npy", mmap_mode="r")
        backend = self.backend(metric, vectors.shape[1])
        backend.after_fork()  # where it is a child after all
        segment = backend.open(Path(folder) / "index", ids, vectors)
        assert _identical((found, similarities), segment.search(queries, 10, None)), (
            "the other process found something else"
        )

    # ------------------------------------------------------------ help

    def backend(self, metric: str, dim: int | None = None) -> IndexBackend:
        """Make the backend under test."""
        context = IndexContext(dim=dim or self.dim, metric=metric, seed=0, target_recall=0.95)
        return cast(IndexBackend, self.make(context))

    def filters(self) -> bool:
        """Whether the provider declares the capability "filter"."""
        return "filter" in self.chosen().capabilities

    def vectors(self, rows: int, metric: str, seed: int = 0) -> Vectors:
        """Clustered vectors; normalised for "cosine", of different lengths otherwise."""
        draw = np.random.default_rng(99)
        latent = max(2, self.dim // 4)
        centres = draw.standard_normal((40, latent))
        basis = draw.standard_normal((latent, self.dim)) / np.sqrt(latent)
        draw = np.random.default_rng(seed)
        points = centres[draw.integers(0, len(centres), rows)]
        points = (points + 0.7 * draw.standard_normal(points.shape)) @ basis
        points += 0.05 * draw.standard_normal(points.shape)
        if metric == "cosine":
            points /= np.linalg.norm(points, axis=1, keepdims=True)
        return np.ascontiguousarray(points, np.float32)

    def case(
        self,
        folder: Path,
        metric: str = "",
        *,
        rows: int | None = None,
        first_id: int = 1000,
        given: Vectors | None = None,
    ) -> Case:
        """Build a segment of mapped vectors, open it, and draw queries for it."""
        metric = metric or self.metrics[0]
        if metric not in self.metrics:
            pytest.skip(f"does not serve the metric {metric!r}")
        pristine = self.vectors(rows or self.rows, metric) if given is None else given
        steps = np.random.default_rng(5).integers(1, 4, len(pristine))
        ids = (first_id + np.cumsum(steps)).astype(np.int64)
        np.save(folder / "raw.npy", pristine)
        vectors = np.load(folder / "raw.npy", mmap_mode="r")
        path = folder / "index"
        backend = self.backend(metric)
        backend.build(ids, vectors, path)
        segment = backend.open(path, ids, vectors)
        queries = self.vectors(40, metric, seed=7)
        return Case(backend, segment, path, ids, vectors, pristine, queries, metric)

    def check_results(
        self,
        case: Case,
        queries: Vectors,
        k: int,
        ids: Ids,
        similarities: Vectors,
        mask: NDArray[np.bool_] | None = None,
    ) -> None:
        """Check everything about a result but whether the nearest were found."""
        shape = (len(queries), k)
        assert ids.shape == similarities.shape == shape, f"shapes {ids.shape}, wanted {shape}"
        assert ids.dtype == np.int64, f"ids are {ids.dtype}"
        assert similarities.dtype == np.float32, f"similarities are {similarities.dtype}"
        live = case.ids if mask is None else case.ids[mask]
        wanted = min(k, len(live))
        padding = ids[:, wanted:], similarities[:, wanted:]
        assert (padding[0] == -1).all(), "too many results, or ids not padded with -1"
        assert np.isneginf(padding[1]).all(), "similarities not padded with -inf"
        ids, similarities = ids[:, :wanted], similarities[:, :wanted]
        assert (ids != -1).all(), f"fewer than {wanted} results although as many are allowed"
        unknown = ids[~np.isin(ids, live)]
        assert not len(unknown), f"ids that are removed, or were never given: {unknown[:5]}"
        for line in ids:
            assert len(np.unique(line)) == wanted, "an id was returned twice"
        assert not np.isnan(similarities).any(), "a similarity is NaN"
        falling = np.diff(similarities.astype(np.float64), axis=1) <= 0
        assert falling.all(), "similarities do not fall"
        if case.metric == "l2":
            assert (similarities <= 0).all(), "a positive similarity under l2"
        exact = _similarities(case.pristine, queries, case.metric)
        rows = np.searchsorted(case.ids, ids)
        off = np.abs(np.take_along_axis(exact, rows, axis=1) - similarities)
        scale = np.maximum(1.0, np.linalg.norm(queries, axis=1).max() ** 2)
        scale = max(scale, float((case.pristine.astype(np.float64) ** 2).sum(axis=1).max()))
        if not off.size:
            return
        worst = np.unravel_index(off.argmax(), off.shape)
        assert off[worst] <= self.tolerance * scale, (
            f"a similarity is not that of its id: {similarities[worst]:.6g} for id {ids[worst]}, "
            f"whose {case.metric} similarity is {exact[worst[0], rows[worst]]:.6g}"
        )

    def check_recall(
        self, case: Case, ids: Ids, k: int, mask: NDArray[np.bool_] | None = None
    ) -> None:
        """Check that the nearest were found."""
        exact = _similarities(case.pristine, case.queries, case.metric)
        if mask is not None:
            exact[:, ~mask] = -np.inf
        rows = np.argsort(-exact, axis=1, kind="stable")[:, :k]
        recall = _overlap(case.ids[rows], ids)
        if recall >= self.min_recall:
            return
        why = ""
        if _overlap(rows, ids) > recall:
            why = "; these are row numbers: return ids[rows] (X3)"
        elif _overlap(case.ids[np.argsort(exact, axis=1, kind="stable")[:, :k]], ids) > recall:
            why = "; these are the least similar: larger is closer under every metric (X2)"
        raise AssertionError(f"recall {recall:.3f}, at least {self.min_recall} wanted{why}")

    def check_same(self, a: Found, b: Found) -> None:
        """Check that two results differ by rounding at most."""
        assert np.allclose(a[1], b[1], atol=10 * self.tolerance), "similarities differ"
        close = np.abs(np.diff(a[1], axis=1)) <= 10 * self.tolerance
        near = np.zeros(a[0].shape, np.bool_)  # these may have changed places
        near[:, 1:] |= close
        near[:, :-1] |= close
        near[:, -1] = True
        assert ((a[0] == b[0]) | near).all(), "other ids were found"


def _overlap(wanted: Ids, found: Ids) -> float:
    """Share of what is wanted that was found."""
    pairs = zip(wanted.tolist(), found.tolist(), strict=True)
    return sum(len(set(a) & set(b)) for a, b in pairs) / wanted.size


def _bitmap(mask: NDArray[np.bool_]) -> NDArray[np.uint8]:
    return np.packbits(mask, bitorder="little")


def _identical(a: Found, b: Found) -> bool:
    return np.array_equal(a[0], b[0]) and np.array_equal(a[1], b[1])


def _similarities(vectors: Vectors, queries: Vectors, metric: str) -> NDArray[np.float64]:
    """(m, n), in float64."""
    x, q = vectors.astype(np.float64), queries.astype(np.float64)
    if metric == "l2":
        return -np.stack([((x - query) ** 2).sum(axis=1) for query in q])
    return q @ x.T


def _in_child(check: Callable[[], bool]) -> bool:
    """Run in a forked child, which may die or hang; say whether it returned True."""

    def work(child: Child) -> None:
        assert check()

    try:
        in_child(work)
    except AssertionError:
        return False
    return True
