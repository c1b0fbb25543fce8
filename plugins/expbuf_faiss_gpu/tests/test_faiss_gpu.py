"""What the contract suite does not ask: over-fetching, fallbacks, memory, locks, forks."""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from gpu_standin import NO_MEMORY, Board
from numpy.typing import NDArray

import expbuf_faiss_gpu
from expbuf_core import ExperienceBuffer, HostInfo, hookimpl
from expbuf_core.contracts import IndexContext
from expbuf_core.errors import BackendUnavailable
from expbuf_core.exact_search import exact_search
from expbuf_faiss import FaissBackend, FaissSettings
from expbuf_faiss_gpu import devices, placing, probe
from expbuf_faiss_gpu.backend import FaissGpuBackend, cpu_backend
from expbuf_faiss_gpu.settings import FaissGpuSettings

faiss = pytest.importorskip("faiss")

GPU_WHEEL = importlib.util.find_spec("faiss._gpu_build") is not None
ROWS, DIM = 3000, 32
LISTS = {"index": "IVF16,Flat", "train_iterations": 3}
FLAT = {"index": "flat", "flat_below": 100}


class Told(list[tuple[str, str]]):
    """What a backend tells of its fallbacks."""

    def __call__(self, used: str, reason: str) -> None:
        self.append((used, reason))


@pytest.fixture
def told() -> Told:
    return Told()


def vectors_of(rows: int = ROWS, seed: int = 0) -> NDArray[np.float32]:
    centres = np.random.default_rng(99).standard_normal((30, DIM))
    draw = np.random.default_rng(seed)
    points = centres[draw.integers(0, 30, rows)] + 0.4 * draw.standard_normal((rows, DIM))
    return (points / np.linalg.norm(points, axis=1, keepdims=True)).astype(np.float32)


def backend(told: Told, *fallback: str, **settings: Any) -> FaissGpuBackend:
    context = IndexContext(DIM, "cosine", fallback=fallback, on_fallback=told)
    return FaissGpuBackend(FaissGpuSettings(**settings), context)


def opened(folder: Path, made: FaissBackend, vectors: NDArray[np.float32]) -> Any:
    ids = np.arange(len(vectors))
    path = folder / "index"
    if not path.exists():
        made.build(ids, vectors, path)
    return made.open(path, ids, vectors)


def nearest(
    vectors: NDArray[np.float32],
    queries: NDArray[np.float32],
    k: int,
    allowed: NDArray[np.bool_] | None = None,
) -> NDArray[np.int64]:
    return exact_search(vectors, None, queries, k, "cosine", allowed)[0]


# ---------------------------------------------------------------- rows that are left out


@pytest.mark.parametrize("settings", [{**LISTS, "nprobe": 16}, FLAT], ids=["lists", "flat"])
@pytest.mark.parametrize("keep", [0.9, 0.5, 0.36])
def test_asks_for_more_until_k_are_left(
    board: Board, tmp_path: Path, told: Told, settings: dict[str, Any], keep: float
) -> None:
    vectors, queries = vectors_of(), vectors_of(40, seed=1)
    segment = opened(tmp_path, backend(told, **settings), vectors)
    # What is most similar to the first query is gone: the first guess is not enough for it.
    order = np.argsort(vectors @ queries[0])
    mask = np.zeros(ROWS, np.bool_)
    mask[order[: int(keep * ROWS)]] = True
    board.searches.clear()
    found = segment.search(queries, 10, np.packbits(mask, bitorder="little"))[0]
    assert (found == nearest(vectors, queries, 10, mask)).all()
    asked = [k for _, k in board.searches]
    assert asked[0] < asked[-1] <= 2048
    assert board.searches[-1][0] < len(queries)  # only those that were short are asked again


def test_the_cpu_finds_what_lies_beyond_2048(board: Board, tmp_path: Path, told: Told) -> None:
    """Its index, which leaves rows out by itself; not a scan."""
    vectors, queries = vectors_of(4000), vectors_of(5, seed=1)
    segment = opened(tmp_path, backend(told, **LISTS, nprobe=16), vectors)
    mask = np.zeros(4000, np.bool_)
    mask[np.argsort(vectors @ queries[0])[:1500]] = True  # the 2500 nearest are gone
    board.searches.clear()
    segment._exact = None
    found = segment.search(queries, 10, np.packbits(mask, bitorder="little"))[0]
    assert [k for _, k in board.searches][-1] == 2048
    assert (found == nearest(vectors, queries, 10, mask)).all()
    assert not told


def test_more_than_2048_results(board: Board, tmp_path: Path, told: Told) -> None:
    vectors, queries = vectors_of(12_000), vectors_of(3, seed=1)
    segment = opened(tmp_path, backend(told, **LISTS, nprobe=16), vectors)
    board.searches.clear()
    found = segment.search(queries, 2500, None)[0]
    assert (found == nearest(vectors, queries, 2500)).mean() > 0.99
    assert not board.searches
    assert not told


def test_similarities_do_not_depend_on_the_device(board: Board, tmp_path: Path, told: Told) -> None:
    vectors, queries = vectors_of(), vectors_of(40, seed=1)
    segment = opened(tmp_path, backend(told, **LISTS), vectors)
    there = segment.search(queries, 10, None)
    assert board.searches
    segment.close()
    board.searches.clear()
    here = segment.search(queries, 10, None)
    assert not board.searches
    assert np.array_equal(there[0], here[0])
    assert np.array_equal(there[1], here[1])


def test_many_queries_are_asked_in_batches(board: Board, tmp_path: Path, told: Told) -> None:
    vectors, queries = vectors_of(), vectors_of(9000, seed=1)
    segment = opened(tmp_path, backend(told, **FLAT), vectors)
    board.searches.clear()
    found = segment.search(queries, 3, None)[0]
    assert [m for m, _ in board.searches] == [8192, 808]
    assert (found[-50:] == nearest(vectors, queries[-50:], 3)).all()


# ---------------------------------------------------------------- building


def test_the_gpu_helps_to_build(board: Board, tmp_path: Path, told: Told) -> None:
    """The file is the one that the CPU writes: it is the same index."""
    vectors = vectors_of()
    for name in ("gpu", "cpu"):
        (tmp_path / name).mkdir()
    opened(tmp_path / "gpu", backend(told, **LISTS, nprobe=4), vectors)
    assert board.trained == 1
    assert (ROWS, 1) in board.searches
    context = IndexContext(DIM, "cosine")
    opened(tmp_path / "cpu", FaissBackend(FaissSettings(**LISTS, nprobe=4), context), vectors)
    first, second = ((tmp_path / name / "index").read_bytes() for name in ("gpu", "cpu"))
    assert first == second


def test_a_gpu_that_fails_while_building(board: Board, tmp_path: Path, told: Told) -> None:
    board.faults.append(NO_MEMORY)  # assigning rows to lists
    vectors, queries = vectors_of(), vectors_of(20, seed=1)
    segment = opened(tmp_path, backend(told, **LISTS, nprobe=16), vectors)
    assert (segment.search(queries, 5, None)[0] == nearest(vectors, queries, 5)).all()
    assert not told


def test_what_auto_means(board: Board, told: Told) -> None:
    assert backend(told).plans(19_999)[0].factory == ""
    assert [plan.factory for plan in backend(told).plans(100_000)] == ["IVF1024,Flat"]
    half = backend(told, float16=True, nlist=64)
    assert [plan.factory for plan in half.plans(100_000)] == ["IVF64,SQfp16", ""]


def test_half_precision(board: Board, tmp_path: Path, told: Told) -> None:
    vectors, queries = vectors_of(), vectors_of(40, seed=1)
    for settings in ({**LISTS, "index": "IVF16,SQfp16", "nprobe": 16}, FLAT):
        (tmp_path / settings["index"]).mkdir()
        made = backend(told, **settings, float16=True)
        segment = opened(tmp_path / settings["index"], made, vectors)
        assert segment.info()["device"] == "gpu 0"
        found, similarities = segment.search(queries, 10, None)
        assert (found == nearest(vectors, queries, 10)).all()
        exact = np.einsum("mkd,md->mk", vectors[found], queries)
        np.testing.assert_allclose(similarities, exact, atol=1e-6)


# ---------------------------------------------------------------- memory


@pytest.mark.parametrize("settings", [LISTS, FLAT], ids=["lists", "flat"])
def test_too_little_memory(
    board: Board, tmp_path: Path, told: Told, settings: dict[str, Any]
) -> None:
    vectors, queries = vectors_of(), vectors_of(40, seed=1)
    made = backend(told, "faiss_cpu", **settings)
    expected = opened(tmp_path, made, vectors).search(queries, 10, None)
    board.memory = 300 << 20
    before = board.used
    segment = opened(tmp_path, made, vectors)
    again = opened(tmp_path, made, vectors)
    assert board.used <= before
    assert [used for used, _ in told] == ["faiss_cpu"]  # told once
    assert "too little memory on GPU 0" in told[0][1]
    assert "of 300 MiB are free" in told[0][1]
    assert segment.info()["device"] == again.info()["device"] == "cpu"
    found = segment.search(queries, 10, None)
    assert np.array_equal(found[0], expected[0])
    assert np.array_equal(found[1], expected[1])


def test_too_little_memory_and_no_fallback(board: Board, tmp_path: Path, told: Told) -> None:
    vectors = vectors_of()
    made = backend(told, **LISTS)
    opened(tmp_path, made, vectors)
    board.memory = 1 << 20
    with pytest.raises(BackendUnavailable, match="too little memory on GPU 0"):
        opened(tmp_path, made, vectors)


def test_too_little_memory_and_exact_as_fallback(board: Board, tmp_path: Path, told: Told) -> None:
    vectors, queries = vectors_of(), vectors_of(40, seed=1)
    made = backend(told, "exact", **LISTS, nprobe=1)
    opened(tmp_path, made, vectors)
    board.memory = 1 << 20
    segment = opened(tmp_path, made, vectors)
    assert [used for used, _ in told] == ["exact"]
    assert (segment.search(queries, 10, None)[0] == nearest(vectors, queries, 10)).all()


def test_memory_that_was_free_may_be_gone(board: Board, tmp_path: Path, told: Told) -> None:
    """Another process was faster: the allocation fails although there was room."""
    vectors = vectors_of()
    made = backend(told, "faiss_cpu", **LISTS)
    opened(tmp_path, made, vectors)
    board.memory, board.used = 1 << 30, 1 << 30
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(placing.Device, "put", _put_without_looking)
        segment = opened(tmp_path, made, vectors)
    assert told == [("faiss_cpu", NO_MEMORY)]
    assert segment.info()["device"] == "cpu"


def _put_without_looking(
    device: devices.Device, make: Callable[[Any, Any], Any], wanted: int
) -> Any:
    with device.exclusively() as resources:
        return devices._called(make, faiss, resources)


@pytest.mark.parametrize("factory", ["Flat", "IVF16,Flat", "IVF16,SQfp16", "IVF16,PQ8x4np"])
@pytest.mark.parametrize("float16", [False, True])
def test_the_estimate_covers_what_is_taken(factory: str, float16: bool) -> None:
    index = faiss.index_factory(DIM, factory)
    if ivf := faiss.try_extract_index_ivf(index):
        ivf.cp.min_points_per_centroid = 1
    index.train(vectors_of(5000))
    index.add(vectors_of(5000))
    number = 2 if float16 and factory == "Flat" else 4
    size = index.ntotal * (number * DIM if ivf is None else ivf.code_size + 8)
    assert size < placing.index_bytes(faiss, index, float16) < 2 * size + (2 << 20)


def test_memory_comes_back(board: Board, tmp_path: Path, told: Told) -> None:
    vectors = vectors_of()
    made = backend(told, **LISTS)
    segment = opened(tmp_path, made, vectors)
    used = board.used
    assert used > 4 * DIM * ROWS
    second = opened(tmp_path, made, vectors)
    assert board.used > used
    second.close()
    assert board.used == used
    del segment
    gc.collect()
    assert board.used == 0


# ---------------------------------------------------------------- failures in the middle of work


@pytest.mark.parametrize("settings", [LISTS, FLAT], ids=["lists", "flat"])
def test_a_search_that_fails_is_answered(
    board: Board, tmp_path: Path, told: Told, settings: dict[str, Any]
) -> None:
    vectors, queries = vectors_of(), vectors_of(40, seed=1)
    segment = opened(tmp_path, backend(told, "faiss_cpu", "exact", **settings), vectors)
    expected = segment.search(queries, 10, None)
    used = board.used
    board.faults.append(NO_MEMORY)
    found = segment.search(queries, 10, None)
    assert np.array_equal(found[0], expected[0])
    assert np.array_equal(found[1], expected[1])
    assert told == [("faiss_cpu", NO_MEMORY)]
    assert segment.info()["device"] == "cpu"
    assert board.used < used
    board.searches.clear()
    segment.search(queries, 10, None)
    assert not board.searches
    assert len(told) == 1


@pytest.mark.parametrize("settings", [LISTS, FLAT], ids=["lists", "flat"])
def test_a_search_that_fails_without_a_fallback(
    board: Board, tmp_path: Path, told: Told, settings: dict[str, Any]
) -> None:
    vectors, queries = vectors_of(), vectors_of(40, seed=1)
    segment = opened(tmp_path, backend(told, **settings), vectors)
    board.faults.append(NO_MEMORY)
    with pytest.raises(BackendUnavailable, match="out of memory"):
        segment.search(queries, 10, None)
    segment.search(queries, 10, None)  # it may pass
    assert segment.info()["device"] == "gpu 0"
    assert not told


# ---------------------------------------------------------------- threads


def test_a_search_does_not_wait_for_a_build(board: Board, tmp_path: Path, told: Told) -> None:
    vectors, queries = vectors_of(), vectors_of(40, seed=1)
    segment = opened(tmp_path, backend(told, **LISTS), vectors)
    expected = segment.search(queries, 10, None)
    board.searches.clear()
    found: list[Any] = []
    with devices.device(0, 0).exclusively():
        thread = threading.Thread(target=lambda: found.append(segment.search(queries, 10, None)))
        thread.start()
        thread.join(60)
        assert found, "the search waits"
    assert not board.searches
    assert np.array_equal(found[0][0], expected[0])
    assert not told


def test_dropping_a_segment_while_another_thread_searches(
    board: Board, tmp_path: Path, told: Told
) -> None:
    """Freeing waits until the search is over; `board` would see them at the same time."""
    vectors, queries = vectors_of(), vectors_of(4, seed=1)
    made = backend(told, **LISTS)
    segment = opened(tmp_path, made, vectors)
    used = board.used
    dropped = [opened(tmp_path, made, vectors)]

    def during() -> None:
        thread = threading.Thread(target=dropped.clear)
        thread.start()
        thread.join(60)
        gc.collect()

    board.during = during
    segment.search(queries, 10, None)
    board.during = None
    assert not dropped
    assert board.used == used


# ---------------------------------------------------------------- forks


def in_child(check: Callable[[], bool]) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if not pid:
        code = 1
        try:
            signal.alarm(60)
            code = 0 if check() else 1
            gc.collect()
        finally:
            os._exit(code)
    return os.waitpid(pid, 0)[1] == 0


@pytest.mark.parametrize("settings", [LISTS, FLAT], ids=["lists", "flat"])
def test_a_forked_child_takes_the_cpu(
    board: Board, tmp_path: Path, told: Told, settings: dict[str, Any]
) -> None:
    vectors, queries = vectors_of(), vectors_of(4, seed=1)
    made = backend(told, "faiss_cpu", **settings)
    segments = [opened(tmp_path, made, vectors)]
    expected = segments[0].search(queries, 10, None)
    device = devices.device(0, 0)

    def child() -> bool:
        made.after_fork()
        found = segments[0].search(queries, 10, None)
        assert np.array_equal(found[1], expected[1])
        assert len(told) == 1
        assert "does not survive a fork" in told[0][1]
        segments.append(opened(tmp_path, made, vectors))
        assert segments[1].info()["device"] == "cpu"
        told.clear()
        assert backend(told, "faiss_cpu", **LISTS)._device is None
        assert "does not survive a fork" in told[0][1]
        with pytest.raises(BackendUnavailable, match="start it by spawn"):
            backend(told, **LISTS)
        segments.clear()  # frees nothing: the real thing would abort
        device._held.clear()
        device._resources = None
        return True

    assert in_child(child)
    assert segments[0].info()["device"] == "gpu 0"


def test_a_forked_child_of_a_process_that_has_not_used_it(
    board: Board, tmp_path: Path, told: Told
) -> None:
    """It has the GPU, although a thread that it does not have held the locks."""
    vectors, queries = vectors_of(), vectors_of(4, seed=1)
    made = backend(told, **LISTS)
    device = devices.device(0, 0)
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with device._lock, device._counting:
            held.set()
            done.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    assert held.wait(60)

    def child() -> bool:
        made.after_fork()
        segment = opened(tmp_path, made, vectors)
        return bool(segment.info()["device"] == "gpu 0" and segment.search(queries, 1, None))

    try:
        assert in_child(child)
    finally:
        done.set()
        thread.join()


# ---------------------------------------------------------------- whether there is a GPU


@pytest.fixture
def asked(board: Board, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., probe.Verdict]]:
    """Asks the real probe, in a process with the stand-in."""

    def ask(**facts: Any) -> probe.Verdict:
        monkeypatch.setenv("EXPBUF_GPU_STANDIN", json.dumps(facts) if facts else "")
        monkeypatch.setattr(probe, "import_error", "")
        probe.probe.cache_clear()
        return probe.probe(0)

    yield ask
    probe.probe.cache_clear()


def test_a_gpu_that_works(board: Board) -> None:
    assert probe.try_out(0) == probe.Verdict(True, name="stand-in", memory=board.memory)


def test_no_such_gpu(board: Board) -> None:
    assert probe.try_out(1).reason == "no GPU 1: CUDA has 1, counted from 0"


def test_a_driver_that_says_no(board: Board) -> None:
    board.says = "CUDA says: system not yet initialized (error 802)"
    assert probe.try_out(0) == probe.Verdict(False, board.says)


def test_a_gpu_that_aborts(asked: Callable[..., probe.Verdict]) -> None:
    verdict = asked(abort=True)
    assert not verdict.usable
    assert "ended with SIGABRT" in verdict.reason


@pytest.mark.skipif(GPU_WHEEL, reason="this FAISS is built for GPUs")
def test_a_faiss_for_cpus(asked: Callable[..., probe.Verdict]) -> None:
    assert "built for CPUs only" in asked().reason


def test_a_faiss_without_its_libraries(
    asked: Callable[..., probe.Verdict],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    told: Told,
) -> None:
    (tmp_path / "faiss.py").write_text("raise RuntimeError('libcublas.so.12 not found')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    verdict = asked()
    assert not verdict.imports
    assert verdict.reason.endswith("RuntimeError: libcublas.so.12 not found")
    # Neither does the CPU index of that wheel work; the core goes on to the next fallback.
    monkeypatch.setattr(devices, "probe", probe.probe)
    with pytest.raises(BackendUnavailable, match=r"libcublas\.so\.12"):
        backend(told, "faiss_cpu", "exact")
    with pytest.raises(BackendUnavailable, match=r"libcublas\.so\.12"):
        cpu_backend(FaissSettings(), IndexContext(DIM, "cosine"))
    assert not told


def test_no_wheel_at_all(told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BackendUnavailable, match="pip install faiss-gpu"):
        backend(told, "faiss_cpu")


# ---------------------------------------------------------------- in a buffer


class Observer:
    """Observes fallbacks, which are told in a thread."""

    def __init__(self) -> None:
        self.events: list[tuple[str, str, str]] = []
        self.told = threading.Event()

    @hookimpl
    def expbuf_on_fallback(self, kind: str, wanted: str, used: str, reason: str) -> None:
        self.events.append((wanted, used, reason))
        self.told.set()


def buffer_with(folder: Path, *fallback: str, observer: Observer | None = None) -> ExperienceBuffer:
    return ExperienceBuffer.open(
        folder,
        plugins=() if observer is None else (observer,),
        index={
            "backend": "faiss_gpu",
            "fallback": list(fallback),
            "builder": "off",
            "faiss_gpu": {"flat_below": 1500, "nlist": 16, "train_iterations": 3},
        },
    )


def filled(buffer: ExperienceBuffer, vectors: NDArray[np.float32]) -> None:
    n = len(vectors)
    columns = {"v_embed": vectors, "q_embed": vectors, "answer": ["a"] * n, "confidence": [0.5] * n}
    buffer.add_many(columns)


def devices_of(buffer: ExperienceBuffer) -> set[str]:
    return {part.get("device", "cpu") for part in buffer.stats()["index"]["segments"]}


def test_a_buffer_on_a_gpu(board: Board, tmp_path: Path) -> None:
    vectors = vectors_of()
    with buffer_with(tmp_path / "b") as buffer:
        filled(buffer, vectors)
        assert buffer.rebuild_index()
        assert devices_of(buffer) == {"gpu 0"}
        board.searches.clear()
        first = int(buffer.search_index(v_embed=vectors[7], q_embed=vectors[7], k=1).ids[0])
        assert board.searches
        newest = vectors_of(1, seed=9)
        filled(buffer, newest)  # not in the segment: found in the tail
        found = buffer.search_index(v_embed=newest[0], q_embed=newest[0], k=1)
        assert found.ids[0] == buffer.ids()[-1]
        buffer.remove([first])
        ids, _, _ = buffer.search_many(v_embed=vectors[:32], q_embed=vectors[:32], k=5)
        assert first not in ids
        assert ids.min() >= 0


def test_a_buffer_without_a_gpu(
    board: Board,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Built with the GPU, searched without: a warning that says why, an event, the same answers."""
    vectors = vectors_of()
    with buffer_with(tmp_path / "b") as buffer:
        filled(buffer, vectors)
        buffer.rebuild_index()
        expected = buffer.search_many(v_embed=vectors[:9], q_embed=vectors[:9], k=5)[0]
    monkeypatch.setattr(devices, "probe", lambda number: probe.Verdict(False, "no GPU at all"))
    observer = Observer()
    with buffer_with(tmp_path / "b", "faiss_cpu", "exact", observer=observer) as buffer:
        assert devices_of(buffer) == {"cpu"}
        found = buffer.search_many(v_embed=vectors[:9], q_embed=vectors[:9], k=5)[0]
        assert np.array_equal(found, expected)
    assert observer.told.wait(60)
    assert observer.events == [("faiss_gpu", "faiss_cpu", "no GPU at all")]
    assert "'faiss_gpu' is not used, 'faiss_cpu' takes over: no GPU at all" in caplog.text


def test_a_buffer_with_exact_search_as_fallback(
    board: Board, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "probe", lambda number: probe.Verdict(False, "no GPU at all"))
    observer = Observer()
    with buffer_with(tmp_path / "b", "exact", observer=observer) as buffer:
        filled(buffer, vectors_of())
        buffer.rebuild_index()
        assert [part["backend"] for part in buffer.stats()["index"]["segments"]] == ["exact"]
    assert observer.events == [("faiss_gpu", "exact", "faiss_gpu: no GPU at all")]


def test_a_buffer_without_fallback(
    board: Board, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with buffer_with(tmp_path / "b") as buffer:
        filled(buffer, vectors_of())
    monkeypatch.setattr(devices, "probe", lambda number: probe.Verdict(False, "no GPU at all"))
    with pytest.raises(BackendUnavailable, match="no GPU at all"):
        buffer_with(tmp_path / "b")


# ---------------------------------------------------------------- what is offered


def test_offers_the_cpu_where_nobody_else_does(monkeypatch: pytest.MonkeyPatch) -> None:
    host = HostInfo("0", 1)
    offered = cast(Any, expbuf_faiss_gpu.expbuf_register_index_backends)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert [provider.name for provider in offered(host)] == ["faiss_gpu"]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert [provider.name for provider in offered(host)] == ["faiss_gpu", "faiss_cpu"]
