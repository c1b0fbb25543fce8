"""Tries the plugin out on this machine's GPU, and reports.

    python -m expbuf_faiss_gpu.selfcheck [--device 0] [--rows 100000] [--dim 384]

Exit code: 0, all checks passed; 1, one failed; 3, there is no GPU that can be used (2 is a wrong
argument). The contract suite needs pytest: `pip install 'expbuf-faiss-gpu[selfcheck]'`.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

import expbuf_faiss_gpu
from expbuf_core.contracts import IndexBackend, IndexContext, IndexSegment
from expbuf_core.exact_search import exact_search
from expbuf_faiss import FaissBackend, FaissSettings
from expbuf_faiss_gpu import devices, driver
from expbuf_faiss_gpu.backend import FaissGpuBackend
from expbuf_faiss_gpu.settings import FaissGpuSettings

PASSED, FAILED, NO_DEVICE = 0, 1, 3

_K = 10
_QUERIES = 256
_TARGET = 0.95
_SLACK = 0.02  # recall is measured on other queries than those it was calibrated with
_BATCHES = ((1, 200), (32, 40), (1024, 8))  # queries, repetitions
_SCRATCH = 64 << 20
_LEFT = 4 << 20  # of the GPU's memory, when there is to be too little
_CONTRACT_S = 3600

Vectors = NDArray[np.float32]


class Failed(Exception):
    """A check that did not pass; the message says what was found."""


class World(NamedTuple):
    """What the checks share."""

    folder: Path
    device: int
    vectors: Vectors
    queries: Vectors
    nearest: NDArray[np.int64]
    told: list[str]

    def gpu(self, fallback: Sequence[str] = (), **settings: Any) -> FaissGpuBackend:
        """A backend on the GPU; by default it fails where it cannot be used."""
        self.told.clear()
        made = FaissGpuSettings(
            device=self.device,
            temp_memory_bytes=_SCRATCH,
            flat_below=min(20_000, len(self.vectors) // 2),
            **settings,
        )
        return FaissGpuBackend(made, self._context(fallback))

    def cpu(self) -> FaissBackend:
        """The backend that the CPU's plugin would be."""
        rows = min(20_000, len(self.vectors) // 2)
        return FaissBackend(FaissSettings(flat_below=rows), self._context(()))

    def _context(self, fallback: Sequence[str]) -> IndexContext:
        return IndexContext(
            self.vectors.shape[1],
            "cosine",
            target_recall=_TARGET,
            fallback=tuple(fallback),
            on_fallback=lambda used, reason: self.told.append(f"{used}: {reason}"),
        )

    def open(self, backend: IndexBackend, name: str) -> IndexSegment:
        """A segment of all vectors, built at the first call of this name."""
        ids = np.arange(len(self.vectors))
        path = self.folder / name
        if not path.exists():
            backend.build(ids, self.vectors, path)
        return backend.open(path, ids, self.vectors)


# ---------------------------------------------------------------- the checks


def contract(world: World) -> str:
    """The contract suite."""
    if importlib.util.find_spec("pytest") is None:
        raise Failed("needs pytest: pip install 'expbuf-faiss-gpu[selfcheck]'")
    suite = Path(expbuf_faiss_gpu.__file__).with_name("contract.py")
    # As it is: not with the settings of a repository that it may lie in.
    options = ["-q", "-p", "no:cacheprovider", "-c", os.devnull, "--rootdir", str(world.folder)]
    command = [sys.executable, "-m", "pytest", *options, str(suite)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": _visible(world.device)}
    done = subprocess.run(
        command,
        cwd=world.folder,
        env=environment,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=_CONTRACT_S,
        check=False,
    )
    lines = done.stdout.strip().splitlines() or [f"pytest ended with exit code {done.returncode}"]
    if done.returncode:
        raise Failed("\n".join([*lines[-60:], *done.stderr.strip().splitlines()[-20:]]))
    return lines[-1]


def _visible(device: int) -> str:
    """The one GPU to be seen by a process that takes the first one."""
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    return str(device) if not seen else seen.split(",")[device]


def recall(world: World) -> str:
    """Recall at 10 against exact search, for each way in which vectors lie on the GPU."""
    found = []
    for name, settings, least in (
        ("lists", {}, _TARGET - _SLACK),
        ("lists, float16", {"float16": True}, _TARGET - _SLACK),
        ("flat", {"index": "flat"}, 0.999),
        ("flat, float16", {"index": "flat", "float16": True}, 0.99),
    ):
        segment = _on_gpu(world.open(world.gpu(**settings), name))
        ids, similarities = segment.search(world.queries, _K, None)
        share = _share(ids, world.nearest)
        exact = np.einsum("mkd,md->mk", world.vectors[ids], world.queries)
        off = float(np.abs(exact - similarities).max())
        found.append(f"{name} ({segment.info().get('factory', 'compared')}) {share:.4f}")
        if share < least or off > 1e-5:
            raise Failed(f"{name}: recall {share:.4f}, similarities off by {off:.1e}")
        segment.close()
    return ", ".join(found)


def removed(world: World) -> str:
    """Removed rows never come back, and k others do."""
    draw = np.random.default_rng(3)
    rows = len(world.vectors)
    found = []
    for name, settings in (("lists", {}), ("flat", {"index": "flat"})):
        segment = _on_gpu(world.open(world.gpu(**settings), name))
        for share in (0.25, 0.9):
            mask = draw.random(rows) >= share
            mask[np.unique(world.nearest[:, : _K // 2])] = False  # what would be found first
            allowed = np.packbits(mask, bitorder="little")
            ids, _ = segment.search(world.queries, _K, allowed)
            if (ids < 0).any() or not mask[ids].all():
                raise Failed(f"{name}, {share:.0%} removed: removed or missing rows")
            wanted = exact_search(world.vectors, None, world.queries, _K, "cosine", mask)[0]
            reached = _share(ids, wanted)
            found.append(f"{name}, {share:.0%} removed: recall {reached:.4f}")
            if reached < _TARGET - 2 * _SLACK:
                raise Failed(found[-1])
        segment.close()
    return "; ".join(found)


def pressure(world: World) -> str:
    """With the GPU's memory taken, opening and searching go on, on the CPU."""
    backend = world.gpu(["faiss_cpu"])
    backend._device = devices.Device(world.device, 0)  # no scratch memory: each search takes some
    segment = _on_gpu(world.open(backend, "lists"))
    expected = segment.search(world.queries, _K, None)
    many = np.tile(world.queries, (1024 // len(world.queries), 1))
    with _taken(world.device):
        opened = world.open(world.gpu(["faiss_cpu"]), "lists")
        if not str(opened.info().get("device")).startswith("cpu") or not world.told:
            raise Failed("a segment was put on a GPU that has no room")
        why = world.told[0]
        _same(opened.search(world.queries, _K, None), expected)
        world.told.clear()
        segment.search(many, min(1000, len(world.vectors) // 5), None)
        middle = "failed and was answered by the CPU" if world.told else "still had room"
        _same(segment.search(world.queries, _K, None), expected)
    again = _on_gpu(world.open(world.gpu(), "lists"))
    _same(again.search(world.queries, _K, None), expected)
    return f"opening: {why}; a large search {middle}; afterwards the GPU again"


def threads(world: World) -> str:
    """Threads search one segment, and it is dropped and opened meanwhile."""
    backend = world.gpu()
    segment = _on_gpu(world.open(backend, "lists"))
    expected = segment.search(world.queries[:8], _K, None)
    wrong: list[str] = []

    def work() -> None:
        try:
            for _ in range(50):
                _same(segment.search(world.queries[:8], _K, None), expected)
        except BaseException as exc:
            wrong.append(repr(exc))

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for _ in range(3):
        world.open(backend, "lists").search(world.queries[:1], _K, None)
    for worker in workers:
        worker.join()
    if wrong:
        raise Failed(wrong[0])
    return "4 threads, 3 other segments opened and dropped"


def fork(world: World) -> str:
    """A forked child searches on the CPU and finds the same."""
    backend = world.gpu(["faiss_cpu"])
    segment = _on_gpu(world.open(backend, "lists"))
    expected = segment.search(world.queries, _K, None)
    pid = os.fork()
    if not pid:
        code = 1
        try:
            backend.after_fork()
            _same(segment.search(world.queries, _K, None), expected)
            code = 0 if world.told else 2
        finally:
            os._exit(code)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if status:
        raise Failed(f"the child ended with {status}")
    _same(segment.search(world.queries, _K, None), expected)
    return "the child took the CPU, the parent goes on with the GPU"


def speed(world: World) -> str:
    """Time of a search on the GPU and on the CPU, one thread each: a report, not a check."""
    lines = ["microseconds a query (median): queries, CPU, GPU, CPU/GPU, flat on the GPU, CPU/that"]
    cpu = world.open(world.cpu(), "cpu")
    lists = _on_gpu(world.open(world.gpu(), "lists"))
    flat = _on_gpu(world.open(world.gpu(index="flat"), "flat"))
    draw = np.random.default_rng(4)
    for count, repetitions in _BATCHES:
        batch = world.queries[draw.integers(0, len(world.queries), count)]
        here, there, bare = (
            1e6 * _median(partial(segment.search, batch, _K, None), repetitions) / count
            for segment in (cpu, lists, flat)
        )
        lines.append(
            f"{count:>6} {here:10.1f} {there:10.1f} {here / there:8.2f} {bare:10.1f} "
            f"{here / bare:8.2f}"
        )
    kinds = [str(s.info().get("factory", "flat")) for s in (cpu, lists)]
    lines.append(f"CPU: {kinds[0]}; GPU: {kinds[1]}")
    return "\n".join(lines)


CHECKS: tuple[Callable[[World], str], ...] = (
    recall,
    removed,
    threads,
    pressure,
    fork,
    speed,
    contract,
)


# ---------------------------------------------------------------- help


def _on_gpu(segment: IndexSegment) -> IndexSegment:
    where = str(segment.info().get("device"))
    if not where.startswith("gpu"):
        raise Failed(f"the segment is not on the GPU but on {where!r}: {segment.info()}")
    return segment


def _share(found: NDArray[np.int64], wanted: NDArray[np.int64]) -> float:
    hits = [len(set(a) & set(b)) for a, b in zip(found.tolist(), wanted.tolist(), strict=True)]
    return sum(hits) / wanted.size


def _same(found: tuple[Any, Any], expected: tuple[Any, Any]) -> None:
    if np.abs(found[1] - expected[1]).max() > 1e-5 or (found[0] == expected[0]).mean() < 0.999:
        raise Failed("the answer differs from the GPU's")


@contextmanager
def _taken(device: int) -> Iterator[None]:
    """Take the GPU's memory, all but a little, in pieces: it may be scattered."""
    pieces: list[int] = []
    size = 1 << 40
    try:
        while size > _LEFT:
            free = driver.free_memory(device)[0] - _LEFT
            size = min(size // 2, max(0, free))
            if size <= _LEFT:
                break
            try:
                pieces.append(driver.take(device, size))
                size = 1 << 40
            except driver.DriverError:
                pass
        yield
    finally:
        for at in pieces:
            driver.give_back(device, at)


def _median(call: Callable[[], object], repetitions: int) -> float:
    call()
    times = []
    for _ in range(repetitions):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def _clustered(rows: int, dim: int, seed: int) -> Vectors:
    """Points around centres in a space of fewer dimensions, like embeddings; normalised."""
    fixed = np.random.default_rng(1)
    latent = max(4, dim // 8)
    centres = fixed.standard_normal((max(20, rows // 500), latent), np.float32)
    basis = fixed.standard_normal((latent, dim), np.float32)
    draw = np.random.default_rng(seed)
    count = _QUERIES if seed else rows
    points = centres[draw.integers(0, len(centres), count)]
    points = points + np.float32(0.7) * draw.standard_normal((count, latent), np.float32)
    vectors = points @ basis
    return np.ascontiguousarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))


def _write(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the checks, one after the other, whatever fails; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m expbuf_faiss_gpu.selfcheck")
    parser.add_argument("--device", type=int, default=0, help="number of the GPU (0)")
    parser.add_argument("--rows", type=int, default=100_000, help="vectors to search (100000)")
    parser.add_argument("--dim", type=int, default=384, help="their dimension (384)")
    names = [check.__name__ for check in CHECKS]
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="checks to run")
    given = parser.parse_args(arguments)
    try:
        device = devices.device(given.device, _SCRATCH)
    except devices.DeviceError as exc:
        _write(f"no device: {exc}")
        return NO_DEVICE
    free, total = driver.free_memory(given.device)
    _write(
        f"GPU {given.device}: {device.name}, {free >> 20:,} of {total >> 20:,} MiB free; "
        f"{given.rows} vectors of dimension {given.dim}"
    )
    vectors = _clustered(given.rows, given.dim, 0)
    queries = _clustered(given.rows, given.dim, 1)
    nearest = exact_search(vectors, None, queries, _K, "cosine")[0]
    failures = 0
    with tempfile.TemporaryDirectory() as folder:
        world = World(Path(folder), given.device, vectors, queries, nearest, [])
        for check in CHECKS:
            if check.__name__ not in given.only:
                continue
            started = time.perf_counter()
            try:
                text, result = check(world), "ok"
            except Failed as exc:
                text, result = str(exc), "FAILED"
            except Exception:
                text, result = traceback.format_exc(), "FAILED"
            failures += result != "ok"
            seconds = time.perf_counter() - started
            indented = text.strip().replace("\n", "\n" + " " * 10)
            _write(f"{result:<7} {check.__name__} ({seconds:.1f} s)\n{' ' * 10}{indented}")
    _write(f"{failures} of {len(given.only)} checks failed" if failures else "all checks passed")
    return FAILED if failures else PASSED


if __name__ == "__main__":
    sys.exit(main())
