"""The two storage backends side by side: what `file` and `lmdb` cost, and when to choose which.

    python -m benchmarks.backends --quick
    python -m benchmarks.backends --json results/backends.json

Each backend has its own limit, measured in the same turns: for `file` the same user bytes written
into a file that was filled with zeros beforehand, and synced; for `lmdb` the same bytes put into a
plain LMDB environment, one transaction a commit, synced.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shutil
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, closing, suppress
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import (
    PAYLOAD_BYTES,
    Report,
    in_turns,
    parse,
    parser,
    percentiles,
    run_groups,
    scratch,
    seconds,
)
from benchmarks.storage import (
    BATCH,
    STORAGE_ONLY,
    WRITERS,
    Material,
    Raw,
    _add_for,
    _left_by_a_kill,
    lmdb_store,
    opened,
)
from expbuf_core import ExperienceBuffer

BACKENDS = ("file", "lmdb")
_TURNS = 8  # short and many, so that what disturbs a turn disturbs few ratios
RAW = {"file": "raw write + fdatasync", "lmdb": "raw LMDB, sync"}


def stored_by(backend: str) -> dict[str, Any]:
    return {"persistence": {"backend": backend}}


def allocated(folder: Path) -> int:
    """Bytes on disk: what was never written in a file takes none."""
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())


class Stores:
    """Both backends and both limits, in one folder; each stores so many experiences at a call."""

    def __init__(self, stack: ExitStack, folder: Path, material: Material) -> None:
        self.buffers = {
            backend: stack.enter_context(opened(folder / backend, **stored_by(backend)))
            for backend in BACKENDS
        }
        self.limits: dict[str, Callable[[int], Any]] = {
            "file": Raw(folder, material),
            "lmdb": stack.enter_context(lmdb_store(folder, material)),
        }


def _with_limits(
    report: Report, what: str, rates: dict[str, list[float]], unit: str, least: float = 0.0
) -> None:
    """Report each backend against its own limit, and LMDB against files."""
    for backend in BACKENDS:
        limit = rates[RAW[backend]]
        report.add(RAW[backend], limit, unit)
        report.add(
            f"{backend}: {what}",
            rates[backend],
            unit,
            reference=(RAW[backend], limit),
            target=f"{least:g} × its limit" if least else "",
            met=(lambda row: (row.ratio or 0) >= least) if least else None,
        )
    report.add(f"lmdb: {what}, again", rates["lmdb"], unit, reference=("file", rates["file"]))


# ---------------------------------------------------------------- writing


def single_adds(report: Report, arguments: argparse.Namespace) -> None:
    n = 50
    turns = _TURNS * arguments.repetitions
    report.group(
        "durable adds, one by one",
        f"one thread; {PAYLOAD_BYTES} user bytes each, every one synced before it is acknowledged",
    )
    material = Material(arguments.seed)
    experiences = [material.experience(i) for i in range(n)]
    with scratch(arguments) as folder, ExitStack() as stack:
        stores = Stores(stack, folder, material)
        cases: dict[str, Callable[[int], Any]] = {}
        for backend in BACKENDS:
            buffer, limit = stores.buffers[backend], stores.limits[backend]
            cases[RAW[backend]] = lambda i, limit=limit: limit(1)  # type: ignore[misc]
            cases[backend] = lambda i, buffer=buffer: buffer.add(experiences[i])  # type: ignore[misc]
        times: dict[str, list[float]] = {name: [] for name in cases}
        cpu: dict[str, list[float]] = {name: [] for name in cases}

        def case(name: str) -> Callable[[], float]:
            def run() -> float:
                store, before, begun = cases[name], time.process_time(), time.perf_counter()
                for i in range(n):
                    started = time.perf_counter()
                    store(i)
                    times[name].append(time.perf_counter() - started)
                cpu[name].append((time.process_time() - before) / n * 1e6)
                return n / (time.perf_counter() - begun)

            return run

        for store in cases.values():  # warm up
            for i in range(n):
                store(i)
        rates = in_turns({name: case(name) for name in cases}, turns)
    _with_limits(report, "add", rates, "adds/s", 0.6)
    for backend in BACKENDS:
        # Half of all adds are faster, whatever else the machine did at times.
        ratio = float(np.median(times[RAW[backend]]) / np.median(times[backend]))
        report.add(f"{backend}: p50 of its limit over its own", [ratio], "×")
    for name in cases:
        p50, p99 = percentiles(times[name])
        report.add(f"{name}, p50", [p50], "ms")
        report.add(f"{name}, p99", [p99], "ms")
        report.add(f"{name}, processor time", cpu[name], "µs")


def weaker_durability(report: Report, arguments: argparse.Namespace) -> None:
    n = 500 if arguments.quick else 2000
    report.group("adds that do not wait for the disk", "one thread, one by one")
    material = Material(arguments.seed)
    for durability in ("group", "os"):
        with scratch(arguments) as folder, ExitStack() as stack:
            cases: dict[str, Callable[[], float]] = {}
            for backend in BACKENDS:
                buffer = stack.enter_context(
                    opened(folder / backend, durability=durability, **stored_by(backend))
                )

                def adds(buffer: ExperienceBuffer = buffer) -> float:
                    return n / seconds(
                        lambda: [buffer.add(material.experience(i)) for i in range(n)]
                    )

                cases[backend] = adds
            rates = in_turns(cases, arguments.repetitions)
        report.add(f"file: add, {durability}", rates["file"], "adds/s")
        report.add(
            f"lmdb: add, {durability}",
            rates["lmdb"],
            "adds/s",
            reference=("file", rates["file"]),
        )


def batches(report: Report, arguments: argparse.Namespace) -> None:
    n = 5
    turns = _TURNS * arguments.repetitions
    report.group(f"durable batches of {BATCH}", "one commit and one sync a batch")
    material = Material(arguments.seed)
    columns = material.columns(0, BATCH)
    with scratch(arguments) as folder, ExitStack() as stack:
        stores = Stores(stack, folder, material)
        cases: dict[str, Callable[[], Any]] = {}
        for backend in BACKENDS:
            buffer, limit = stores.buffers[backend], stores.limits[backend]
            cases[RAW[backend]] = lambda limit=limit: limit(BATCH)  # type: ignore[misc]
            cases[backend] = lambda buffer=buffer: buffer.add_many(columns)  # type: ignore[misc]

        def case(store: Callable[[], Any]) -> Callable[[], float]:
            return lambda: n * BATCH / seconds(lambda: [store() for _ in range(n)])

        for warm_up in cases.values():
            warm_up()
        rates = in_turns({name: case(store) for name, store in cases.items()}, turns)
    _with_limits(report, "add_many, columns", rates, "experiences/s")


def writers(report: Report, arguments: argparse.Namespace) -> None:
    duration = 0.3 if arguments.quick else 1.5
    report.group(f"{WRITERS} writers of one buffer", "single adds, each synced; group commit")
    material = Material(arguments.seed)
    for backend in BACKENDS:
        with (
            scratch(arguments) as folder,
            opened(folder / "buffer", **stored_by(backend)) as buffer,
        ):
            buffer.add(material.experience(0))
            together = _Processes(folder / "buffer", duration)
            with closing(together):
                rates = in_turns(
                    {
                        "one": lambda: _add_for(buffer, material, duration) / duration,
                        "threads": lambda: _threads(buffer, material, duration),
                        "processes": together,
                    },
                    arguments.repetitions,
                )
        report.add(f"{backend}: one writer", rates["one"], "adds/s")
        for name in ("threads", "processes"):
            report.add(
                f"{backend}: {WRITERS} {name}",
                rates[name],
                "adds/s",
                reference=("one writer", rates["one"]),
            )


def _threads(buffer: ExperienceBuffer, material: Material, duration: float) -> float:
    done: list[int] = []
    running = [
        threading.Thread(target=lambda: done.append(_add_for(buffer, material, duration)))
        for _ in range(WRITERS)
    ]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    return sum(done) / duration


class _Processes:
    """Writers in processes of their own, that all add for some seconds when told to."""

    def __init__(self, path: Path, duration: float) -> None:
        context = multiprocessing.get_context("spawn")
        self._duration = duration
        self._barrier, self._counts = context.Barrier(WRITERS + 1), context.Queue()
        arguments = (str(path), duration, self._barrier, self._counts)
        self._processes = [
            context.Process(target=_write_when_told, args=(i, *arguments)) for i in range(WRITERS)
        ]
        for process in self._processes:
            process.start()

    def __call__(self) -> float:
        self._barrier.wait()
        total = sum(self._counts.get() for _ in self._processes)
        self._barrier.wait()
        return float(total / self._duration)

    def close(self) -> None:
        self._barrier.abort()  # tells them to end
        for process in self._processes:
            process.join()


def _write_when_told(seed: int, path: str, duration: float, barrier: Barrier, counts: Any) -> None:
    material = Material(seed, 256)
    with opened(Path(path)) as buffer, suppress(threading.BrokenBarrierError):
        buffer.add(material.experience(0))
        while True:
            barrier.wait()
            counts.put(_add_for(buffer, material, duration))
            barrier.wait()


# ---------------------------------------------------------------- reading


def reading(report: Report, arguments: argparse.Namespace) -> None:
    n = 5_120 if arguments.quick else 20_480
    turns = 10 if arguments.quick else 40
    report.group(
        f"reading {BATCH} of {n:,} experiences",
        "at random, payloads decoded to visual embeddings; page cache warm",
    )
    material = Material(arguments.seed)
    with scratch(arguments) as folder, ExitStack() as stack:
        cases: dict[str, Callable[[], float]] = {}
        for backend in BACKENDS:
            buffer = stack.enter_context(
                opened(folder / backend, durability="os", **stored_by(backend))
            )
            for start in range(0, n, BATCH):
                buffer.add_many(material.columns(start, BATCH))
            buffer.sync()

            def sampled(buffer: ExperienceBuffer = buffer) -> float:
                taken = seconds(lambda: [buffer.sample(BATCH).v_embed for _ in range(turns)])
                return taken / turns * 1e3

            cases[backend] = sampled
            sampled()
        times = in_turns(cases, arguments.repetitions)
    report.add("file: sample and read", times["file"], "ms")
    report.add("lmdb: sample and read", times["lmdb"], "ms", reference=("file", times["file"]))


# ---------------------------------------------------------------- recovery


def recovery(report: Report, arguments: argparse.Namespace) -> None:
    n = 2_000 if arguments.quick else 20_000
    report.group(
        "recovery after a kill",
        "operations replayed per second of opening; nothing but the log to recover from",
    )
    material = Material(arguments.seed)

    def adds(buffer: ExperienceBuffer) -> None:
        for i in range(n):
            buffer.add(material.experience(i))

    def in_batches(buffer: ExperienceBuffer) -> None:
        for start in range(0, n, BATCH):
            buffer.add_many(material.columns(start, min(BATCH, n - start)))

    for name, write in (("single adds", adds), (f"adds in batches of {BATCH}", in_batches)):
        with scratch(arguments) as folder:
            for backend in BACKENDS:
                _left_by_a_kill(folder / backend, write, **stored_by(backend))

            def opens(backend: str, folder: Path = folder) -> float:
                path = folder / "copy"
                shutil.copytree(folder / backend, path)
                os.sync()
                started = time.perf_counter()
                with ExperienceBuffer.open(path, **STORAGE_ONLY) as buffer:
                    rate = n / (time.perf_counter() - started)
                    assert len(buffer) == n
                shutil.rmtree(path)
                return rate

            rates = in_turns(
                {backend: lambda backend=backend: opens(backend) for backend in BACKENDS},  # type: ignore[misc]
                arguments.repetitions,
            )
        report.add(f"file: {name}", rates["file"], "adds/s")
        report.add(f"lmdb: {name}", rates["lmdb"], "adds/s", reference=("file", rates["file"]))


# ---------------------------------------------------------------- disk


def disk(report: Report, arguments: argparse.Namespace) -> None:
    n = 2_000 if arguments.quick else 10_000
    report.group(
        "disk", f"bytes allocated for {n:,} experiences of {PAYLOAD_BYTES} user bytes each, closed"
    )
    material = Material(arguments.seed)
    for backend in BACKENDS:
        with scratch(arguments) as folder:
            with opened(folder / "empty", **stored_by(backend)):
                pass
            report.add(f"{backend}: an empty buffer", [allocated(folder / "empty") / 1024], "KiB")
            for name in ("batches", "single adds"):
                path = folder / name
                with opened(path, durability="os", **stored_by(backend)) as buffer:
                    if name == "batches":
                        for start in range(0, n, BATCH):
                            buffer.add_many(material.columns(start, min(BATCH, n - start)))
                    else:
                        for i in range(n):
                            buffer.add(material.experience(i))
                each = allocated(path) / n
                report.add(f"{backend}: {name}", [each], "bytes each")
                report.add(f"{backend}: {name}, over the user's bytes", [each / PAYLOAD_BYTES], "×")


def growth(report: Report, arguments: argparse.Namespace) -> None:
    size = 500 if arguments.quick else 5_000
    turns = 9 if arguments.quick else 18
    report.group(
        f"first in, first out at {size:,} experiences",
        f"the folder while {turns} times as many go through it, a snapshot after each {size:,}; it "
        "must stop growing",
    )
    material = Material(arguments.seed)
    for backend in BACKENDS:
        sizes = []
        with (
            scratch(arguments) as folder,
            opened(
                folder / "buffer", max_size=size, durability="os", **stored_by(backend)
            ) as buffer,
        ):
            for turn in range(turns):
                for i in range(0, size, 50):
                    at = turn * size + i
                    if i % 100:
                        buffer.add_many(material.columns(at, 50))
                    else:
                        for each in range(at, at + 50):
                            buffer.add(material.experience(each))
                buffer.save_snapshot()
                sizes.append(allocated(folder / "buffer"))
        half = np.array(sizes[turns // 2 :], np.float64)
        report.add(f"{backend}: the most it took", [max(sizes) / 2**20], "MiB")
        report.add(f"{backend}: for each experience in it", [max(sizes) / size], "bytes")
        report.add(
            f"{backend}: last third over the third before",
            [max(sizes[-(turns // 3) :]) / max(sizes[turns // 3 : -(turns // 3)])],
            "×",
            target="1.05",
            met=lambda row: row.median <= 1.05,
        )
        report.add(f"{backend}: second half, least to most", [half.max() / half.min()], "×")


def main() -> None:
    made = parser("The storage backends side by side.")
    report = Report("backends", parse(made))
    run_groups(
        report,
        [single_adds, batches, writers, growth, disk, recovery, reading, weaker_durability],
    )


if __name__ == "__main__":
    main()
