"""What the contract suite does not ask: choice of index, calibration, file format, threads."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from pydantic import ValidationError

from expbuf_core.builtin.exact import ExactSegment
from expbuf_core.contracts import IndexContext
from expbuf_core.errors import ConfigError, CorruptionError, FormatVersionError
from expbuf_core.exact_search import exact_search
from expbuf_faiss import FaissBackend, FaissSegment, FaissSettings, runtime, segment_file
from expbuf_faiss.parameters import parameters
from expbuf_faiss.plans import Plan, nearest_power_of_two, plans
from expbuf_faiss.segment import count_allowed

faiss = pytest.importorskip("faiss")

ROWS = 4000
DIM = 128


def clustered(rows: int, dim: int = DIM, seed: int = 0) -> NDArray[np.float32]:
    draw = np.random.default_rng(1)
    centres, basis = draw.standard_normal((40, 24)), draw.standard_normal((24, dim))
    draw = np.random.default_rng(seed)
    points = centres[draw.integers(0, 40, rows)] + 0.7 * draw.standard_normal((rows, 24))
    return unit(points @ basis)


def unit(points: NDArray[Any]) -> NDArray[np.float32]:
    return (points / np.linalg.norm(points, axis=1, keepdims=True)).astype(np.float32)


def backend(dim: int = DIM, target: float = 0.95, **settings: Any) -> FaissBackend:
    context = IndexContext(dim=dim, metric="cosine", seed=0, target_recall=target)
    return FaissBackend(FaissSettings(**settings), context)


def build(folder: Path, vectors: NDArray[np.float32], made: FaissBackend) -> Any:
    ids = np.arange(len(vectors), dtype=np.int64)
    made.build(ids, vectors, folder / "index")
    return made.open(folder / "index", ids, vectors)


def recall(
    segment: Any, vectors: NDArray[np.float32], queries: NDArray[np.float32], k: int = 10
) -> float:
    found = segment.search(queries, k, None)[0]
    nearest = exact_search(vectors, None, queries, k, "cosine")[0]
    return float(np.mean([len(set(a) & set(b)) / k for a, b in zip(found, nearest, strict=True)]))


# ---------------------------------------------------------------- settings


def test_both_names_of_a_setting() -> None:
    assert FaissSettings(n_lists=8, n_probes=2).lists == 8
    assert FaissSettings(nlist=8, nprobe=2).probes == 2
    with pytest.raises(ValidationError, match="nlist and n_lists are the same"):
        FaissSettings(nlist=8, n_lists=9)


@pytest.mark.parametrize(
    "wrong",
    [
        {"nlist": 0},
        {"index": ""},
        {"rerank": -1},
        {"nlists": 5},
        {"nlist": True},
        {"train_iterations": 10**30},
        {"train_rows_per_list": 10**30},
    ],
)
def test_wrong_settings(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        FaissSettings.model_validate(wrong)


# ---------------------------------------------------------------- the choice of an index


@pytest.mark.parametrize(("rows", "factories"), [
    (19_999, [""]),
    (100_000, ["IVF256,RaBitQ", "IVF256,PQ192x4fsr", "RR384,IVF256,PQ192x4fsr",
               "RR384,IVF512,RaBitQ", "IVF1024,Flat"]),
    (1_000_000, ["IVF512,RaBitQ", "RR384,IVF2048,RaBitQ", "IVF4096,Flat"]),
])  # fmt: skip
def test_automatic(rows: int, factories: list[str]) -> None:
    assert [plan.factory for plan in plans(FaissSettings(), rows, 384)] == factories


def test_automatic_by_dimension() -> None:
    assert [plan.factory for plan in plans(FaissSettings(), 100_000, 64)] == ["IVF1024,Flat"]
    assert plans(FaissSettings(), 100_000, 1024)[1].factory == "HR,IVF512,RaBitQ"
    factories = [plan.factory for plan in plans(FaissSettings(), 50_000, 600)]
    assert factories[1:3] == ["IVF128,PQ300x4fsr", "HR,IVF128,PQ512x4fsr"]
    factories = [plan.factory for plan in plans(FaissSettings(), 50_000, 97)]
    assert factories == ["IVF128,RaBitQ", "RR97,IVF256,RaBitQ", "IVF1024,Flat"], "no pairs"


def test_copies_of_codes_are_bounded() -> None:
    def copied(rows: int, **settings: int) -> bool:
        return any("fs" in plan.factory for plan in plans(FaissSettings(**settings), rows, 384))

    assert copied(150_000)
    assert not copied(200_000), "more than 32 MiB"
    assert copied(200_000, private_bytes=1 << 26)
    assert not copied(30_000, private_bytes=0)


def test_explicit() -> None:
    assert plans(FaissSettings(index="PQ16"), 9, 64) == [Plan("PQ16")]
    assert plans(FaissSettings(index="SQ8,RFlat"), 9, 64) == [Plan("SQ8")]
    settings = FaissSettings(index="IVFPQ", nlist=64, m=8, nbits=6)
    assert plans(settings, 100_000, 64) == [Plan("IVF64,PQ8x6np")]
    assert plans(FaissSettings(index="IVFPQ"), 10_000, 100)[0].factory == "IVF512,PQ10x8np"


def test_sub_vectors_must_divide() -> None:
    with pytest.raises(ConfigError, match="m = 7 does not divide the dimension 128; choose one of"):
        backend(index="IVFPQ", m=7)


@pytest.mark.parametrize("value", [0.5, 1, 2, 3, 1000, 1024, 5000])
def test_nearest_power_of_two(value: float) -> None:
    power = nearest_power_of_two(value)
    assert power & (power - 1) == 0
    assert power / 1.5 <= max(1, value) <= power * 1.5


@pytest.mark.parametrize(
    "factory", ["IVFF,nonsense", "IDMap,Flat", "PQ77", "PQ16x6np", "SQ8,Refine(SQfp16)"]
)
def test_factories_that_do_not_fit(tmp_path: Path, factory: str) -> None:
    """Not understood; with ids of its own; of a wrong dimension; unable to filter; with a copy."""
    with pytest.raises(ConfigError, match=re.escape(repr(factory))):
        build(tmp_path, clustered(ROWS), backend(index=factory))


@pytest.mark.parametrize("settings", [{"index": "IVF4096,Flat"}, {"index": "IVFPQ", "nbits": 12}])
def test_too_few_rows_to_train(tmp_path: Path, settings: dict[str, Any]) -> None:
    vectors = clustered(2000)
    segment = build(tmp_path, vectors, backend(**settings))
    assert segment.info()["kind"] == "flat"


@pytest.mark.parametrize("factory", [
    "IVF32,Flat", "IVF32,SQ8", "IVF32,PQ32x4fsr", "IVF32,RaBitQfs", "IVF32,PQ16x6np",
    "IVF32_HNSW16,Flat", "SQ8", "RaBitQ", "PCAR32,SQ8", "HNSW16,SQ8", "Flat",
])  # fmt: skip
def test_factory_strings(tmp_path: Path, factory: str) -> None:
    """Any of them reaches the target, leaves out what is removed, and has exact similarities."""
    vectors, queries = clustered(ROWS), clustered(50, seed=2)
    segment = build(tmp_path, vectors, backend(index=factory, train_iterations=4))
    assert segment.info()["factory"] == factory
    assert recall(segment, vectors, queries) >= 0.93
    half = np.full(ROWS // 8, 0b01010101, np.uint8)
    rows, similarities = segment.search(queries, 10, half)
    assert (rows % 2 == 0).all()
    exact = np.einsum("mkd,md->mk", vectors[rows], queries)
    np.testing.assert_allclose(similarities, exact, atol=1e-5)


def test_no_reranking(tmp_path: Path) -> None:
    vectors, queries = clustered(ROWS), clustered(50, seed=2)
    segment = build(tmp_path, vectors, backend(index="IVF16,SQ8", rerank=0, nprobe=16))
    assert segment.info()["rerank"] == 0
    assert recall(segment, vectors, queries) >= 0.93


# ---------------------------------------------------------------- calibration


@pytest.mark.parametrize("target", [0.8, 0.95, 0.99])
@pytest.mark.parametrize("seed", range(3))
def test_reaches_the_target(tmp_path: Path, target: float, seed: int) -> None:
    """Also for queries that were never seen; and where few results are wanted."""
    vectors, queries = clustered(20_000, seed=10 + seed), clustered(1000, seed=2)
    segment = build(tmp_path, vectors, backend(target=target, flat_below=1000))
    assert segment.info()["kind"] == "faiss"
    assert segment.info()["recall"] >= target
    assert recall(segment, vectors, queries) >= target
    assert recall(segment, vectors, queries, k=3) >= target


def test_ten_results_take_what_was_calibrated(tmp_path: Path) -> None:
    """These vectors once reached 0.938: codes had more candidates in calibration than later."""
    draw = np.random.default_rng(4)
    basis = draw.standard_normal((32, 384)).astype(np.float32)
    centres = draw.standard_normal((256, 32)).astype(np.float32)
    points = centres[draw.integers(0, 256, 31_000)]
    points += 0.5 * draw.standard_normal(points.shape).astype(np.float32)
    vectors = unit(points @ basis)
    segment = build(tmp_path, vectors[:30_000], backend(384))
    assert segment.info()["rerank"] > 0
    assert recall(segment, vectors[:30_000], vectors[30_000:]) >= 0.95


def test_more_is_asked_for_more(tmp_path: Path) -> None:
    vectors = clustered(20_000)
    efforts = []
    for target in (0.8, 0.99):
        folder = tmp_path / str(target)
        folder.mkdir()
        made = build(folder, vectors, backend(target=target, index="IVF128,Flat"))
        efforts.append(made.info()["effort"])
    assert efforts[0] < efforts[1] < 128


def test_nprobe_is_taken_as_given(tmp_path: Path) -> None:
    made = backend(index="IVF64,Flat", n_probes=3, target=0.99)
    assert build(tmp_path, clustered(ROWS), made).info()["effort"] == 3


def test_rotates_where_few_dimensions_matter(tmp_path: Path) -> None:
    scale = np.arange(1, DIM + 1) ** -1.0
    draw = np.random.default_rng(0)
    vectors = unit(draw.standard_normal((20_000, DIM)) * scale)
    segment = build(tmp_path, vectors, backend(flat_below=1000))
    assert segment.info()["factory"] == "RR128,IVF128,PQ64x4fsr"
    queries = unit(draw.standard_normal((100, DIM)) * scale)
    assert recall(segment, vectors, queries) >= 0.94


def test_without_copies_of_codes(tmp_path: Path) -> None:
    scale = np.arange(1, DIM + 1) ** -1.0
    vectors = unit(np.random.default_rng(0).standard_normal((20_000, DIM)) * scale)
    segment = build(tmp_path, vectors, backend(flat_below=1000, private_bytes=0))
    assert segment.info()["factory"] == "RR128,IVF256,RaBitQ"


def test_gives_up_where_there_is_no_structure(tmp_path: Path) -> None:
    """Then so many lists have to be looked at that comparing every vector is as fast."""
    vectors = unit(np.random.default_rng(0).standard_normal((5000, 256)))
    made = backend(256, flat_below=1000, private_bytes=0)
    assert build(tmp_path, vectors, made).info()["kind"] == "flat"


def test_codes_alone_where_there_is_no_structure(tmp_path: Path) -> None:
    """All of them are scanned sooner than the vectors would be, and the recall is as asked for."""
    everything = unit(np.random.default_rng(0).standard_normal((5200, 256)))
    segment = build(tmp_path, everything[:5000], backend(256, flat_below=1000))
    assert segment.info()["effort"] == 64, "all lists"
    assert recall(segment, everything[:5000], everything[5000:]) >= 0.95


def test_building_repeats_itself(tmp_path: Path) -> None:
    vectors = clustered(ROWS)
    for name in "ab":
        (tmp_path / name).mkdir()
        build(tmp_path / name, vectors, backend(flat_below=1000))
    first, second = ((tmp_path / name / "index").read_bytes() for name in "ab")
    assert first == second


# ---------------------------------------------------------------- the file


def test_the_format_is_as_documented(tmp_path: Path) -> None:
    text = (Path(__file__).parents[1] / "FORMAT.md").read_text()
    lines = re.findall(r"^    [0-9a-f]{4}  ((?:[0-9a-f]{2} ?)+)$", text, re.MULTILINE)
    path = tmp_path / "index"
    segment_file.finish(path, 3, 4, {"kind": "flat"})
    assert path.read_bytes() == bytes.fromhex("".join(lines))
    assert segment_file.check(path, 3, 4) == (0, {"kind": "flat"}, zlib.crc32(path.read_bytes()))


def test_every_damaged_byte_is_found(tmp_path: Path) -> None:
    path = tmp_path / "index"
    path.write_bytes(b"what FAISS wrote")
    segment_file.finish(path, 3, 4, {"kind": "faiss"})
    whole = path.read_bytes()
    for offset in range(len(whole)):
        damaged = bytearray(whole)
        damaged[offset] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(CorruptionError) as caught:
            segment_file.check(path, 3, 4)
        assert caught.value.path == str(path)
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(CorruptionError):
            segment_file.check(path, 3, 4)


def test_something_else_in_its_place(tmp_path: Path) -> None:
    path = tmp_path / "index"
    path.mkdir()
    with pytest.raises(CorruptionError, match="something else"):
        segment_file.check(path, 3, 4)
    path.rmdir()
    path.symlink_to(path.name)
    with pytest.raises(CorruptionError, match="symbolic links"):
        segment_file.check(path, 3, 4)


@pytest.mark.parametrize("mmap", [True, False])
def test_in_a_folder_whose_name_is_no_text(tmp_path: Path, mmap: bool) -> None:
    """FAISS takes a path as UTF-8 only; the system takes any bytes."""
    folder = tmp_path / os.fsdecode(b"\xff")
    folder.mkdir()
    vectors = clustered(ROWS)
    segment = build(folder, vectors, backend(index="IVFFlat", mmap=mmap))
    assert (segment.search(vectors[:50], 1, None)[0][:, 0] == np.arange(50)).mean() > 0.9
    assert [path.name for path in folder.iterdir()] == ["index"]


@pytest.mark.parametrize(("rows", "dim"), [(4, 4), (3, 5)])
def test_the_file_of_other_vectors(tmp_path: Path, rows: int, dim: int) -> None:
    segment_file.finish(tmp_path / "index", 3, 4, {"kind": "flat"})
    with pytest.raises(CorruptionError, match="expected"):
        segment_file.check(tmp_path / "index", rows, dim)


def test_a_newer_format(tmp_path: Path) -> None:
    path = tmp_path / "index"
    segment_file.finish(path, 3, 4, {"kind": "flat"})
    data = bytearray(path.read_bytes())
    trailer = data[-segment_file.TRAILER_BYTES : -4]
    trailer[8] = 2
    path.write_bytes(data[: -segment_file.TRAILER_BYTES] + trailer + zlib.crc32(trailer).to_bytes(4, "little"))  # noqa: E501  # fmt: skip
    with pytest.raises(FormatVersionError, match="segment format 2"):
        segment_file.check(path, 3, 4)


def test_an_index_of_another_metric(tmp_path: Path) -> None:
    vectors = clustered(ROWS)
    build(tmp_path, vectors, backend(index="IVF16,Flat"))
    other = FaissBackend(FaissSettings(), IndexContext(dim=DIM, metric="l2"))
    with pytest.raises(CorruptionError, match="metric"):
        other.open(tmp_path / "index", np.arange(ROWS), vectors)


# ---------------------------------------------------------------- searching


def test_more_effort_for_more_results_and_fewer_rows(tmp_path: Path) -> None:
    vectors, queries = clustered(20_000), clustered(50, seed=2)
    segment = build(tmp_path, vectors, backend(flat_below=1000))
    for k in (10, 100, 500):
        found = segment.search(queries, k, None)[0]
        nearest = exact_search(vectors, None, queries, k, "cosine")[0]
        hits = np.mean([len(set(a) & set(b)) / k for a, b in zip(found, nearest, strict=True)])
        assert hits >= 0.93, k
    for share in (0.75, 0.5, 0.25, 0.1, 0.05):
        mask = np.random.default_rng(3).random(20_000) < share
        found = segment.search(queries, 10, np.packbits(mask, bitorder="little"))[0]
        nearest = exact_search(vectors, None, queries, 10, "cosine", mask)[0]
        hits = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(found, nearest, strict=True)])
        assert hits >= 0.93, share


def test_a_subclass_may_find_too_few(tmp_path: Path) -> None:
    """A device that ignores bitmaps filters by itself, and may come back with less."""

    class Poor(FaissSegment):
        asked: list[int | None] = []  # noqa: RUF012

        def search_index(self, queries: Any, k: int, effort: Any, chosen: Any) -> Any:
            self.asked.append(effort)
            rows, distances = super().search_index(queries, k, effort, chosen)
            if effort is not None and effort < 32:
                rows[:, 5:] = -1
            return rows, distances

    class PoorBackend(FaissBackend):
        segment_type = Poor

    made = PoorBackend(
        FaissSettings(index="IVF64,Flat", nprobe=1), IndexContext(dim=DIM, metric="cosine")
    )
    segment = build(tmp_path, clustered(ROWS), made)
    Poor.asked.clear()
    found = segment.search(clustered(3, seed=2), 10, None)[0]
    assert (found >= 0).all()
    assert Poor.asked == [1, 8, 64]


@pytest.mark.parametrize("rows", [1, 7, 8, 9, 1001])
def test_count_allowed(rows: int) -> None:
    mask = np.random.default_rng(0).random(rows) < 0.5
    bitmap = np.packbits(mask, bitorder="little")
    bitmap[-1] |= 0xFF << (rows - 1) % 8 + 1 & 0xFF  # bits behind the last row
    assert count_allowed(bitmap, rows) == mask.sum()


def test_parameters_keep_the_bitmap_alive() -> None:
    index = faiss.index_factory(16, "OPQ4,IVF4,PQ4x4np")
    made = parameters(faiss, index, 2, faiss.IDSelectorBitmap(np.full(2, 255, np.uint8)))
    vectors = np.random.default_rng(0).standard_normal((16 * 40, 16)).astype(np.float32)
    index.train(vectors)
    index.add(vectors[:16])
    for _ in range(100):
        np.full(2, 0, np.uint8)  # would take the place of a freed bitmap
    assert (index.search(vectors[:4], 1, params=made)[1] >= 0).all()


# ---------------------------------------------------------------- threads, imports


def test_one_thread_wherever_it_is_called_from(tmp_path: Path) -> None:
    segment = build(tmp_path, clustered(ROWS), backend(index="IVF16,Flat"))
    seen = []

    def work() -> None:
        segment.search(clustered(1, seed=2), 10, None)
        seen.append(faiss.omp_get_max_threads())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(60)
    runtime.after_fork()
    assert [*seen, faiss.omp_get_max_threads()] == [1, 1]


def test_small_buffers_never_import_faiss(tmp_path: Path) -> None:
    """Importing takes longer than anything that is done with few experiences."""
    code = """
import sys
from pathlib import Path
import numpy as np
from expbuf_core.contracts import IndexContext
from expbuf_faiss import FaissBackend, FaissSettings
made = FaissBackend(FaissSettings(), IndexContext(dim=8, metric="cosine"))
vectors = np.eye(8, dtype=np.float32)
made.build(np.arange(8), vectors, Path(sys.argv[1]))
assert made.open(Path(sys.argv[1]), np.arange(8), vectors).search(vectors, 1, None)[0][3] == 3
made.after_fork()
assert "faiss" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code, tmp_path / "index"], check=True, timeout=60)


def test_flat_is_the_core_s_own(tmp_path: Path) -> None:
    assert isinstance(build(tmp_path, clustered(100), backend()), ExactSegment)
