"""What it costs to store experiences durably, to open a buffer, to recover one.

    python -m benchmarks.storage --quick
    python -m benchmarks.storage --json results/storage.json

The reference is the physical one: the same user bytes (two embeddings of 384 float32 and 500 bytes
of text) written into a log file that was filled with zeros beforehand, and synced. SQLite, LMDB and
sqlite-vec take part where they are installed; each syncs every commit, as expbuf does.
"""

from __future__ import annotations

import argparse
import importlib
import json
import mmap
import multiprocessing
import os
import resource
import secrets
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import (
    DIM,
    PAYLOAD_BYTES,
    TEXT_BYTES,
    Report,
    clustered,
    in_turns,
    parse,
    parser,
    percentiles,
    run_groups,
    scratch,
    seconds,
)
from expbuf_core import Experience, ExperienceBuffer

# Storage alone: the builder is a process of its own, and is measured in search.py.
STORAGE_ONLY: dict[str, Any] = {"index": {"backend": "exact", "builder": "off"}}
MANY = 2_000_000
BATCH = 256


class Material:
    """Embeddings and text, made once."""

    def __init__(self, seed: int, n: int = 4096) -> None:
        rng = np.random.default_rng(seed)
        self.v, self.q = clustered(rng, n), clustered(rng, n)
        self.text = "".join(map(chr, rng.integers(32, 126, TEXT_BYTES)))
        self.payload = rng.bytes(PAYLOAD_BYTES)
        self.n = n

    def experience(self, i: int) -> Experience:
        i %= self.n
        return Experience(v_embed=self.v[i], q_embed=self.q[i], question=self.text)

    def columns(self, start: int, n: int) -> dict[str, Any]:
        at = np.arange(start, start + n) % self.n
        return {"v_embed": self.v[at], "q_embed": self.q[at], "question": [self.text] * n}


def opened(path: Path, **settings: Any) -> ExperienceBuffer:
    return ExperienceBuffer.open(path, **{"max_size": MANY, **STORAGE_ONLY, **settings})


# ---------------------------------------------------------------- stores to compare

Store = Callable[[int], None]  # stores so many experiences in one durable commit


class Raw:
    """Writes into a file of zeros and syncs; begins anew at its end.

    Args:
        folder: For the file.
        material: Has the bytes.
        reserved: The room is reserved, and not written before: how expbuf prepares its logs for
            large commits. The next file is reserved at the end of one.
    """

    def __init__(self, folder: Path, material: Material, *, reserved: bool = False) -> None:
        self._path = folder / ("reserved.log" if reserved else "raw.log")
        self._fd, self._size, self._at = -1, 256 << 20, 0
        self._payload = material.payload
        self._reserved = reserved
        self._begin()
        if not reserved:
            zeros = bytes(1 << 20)
            for at in range(0, self._size, len(zeros)):
                os.pwrite(self._fd, zeros, at)
            os.fsync(self._fd)

    def _begin(self) -> None:
        self._at = 0
        if self._fd >= 0 and not self._reserved:
            return
        if self._fd >= 0:
            os.close(self._fd)
            self._path.unlink()
        self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT)
        os.posix_fallocate(self._fd, 0, self._size)
        os.fsync(self._fd)

    def __call__(self, n: int) -> None:
        data = self._payload * n
        if self._at + len(data) > self._size:
            self._begin()
        os.pwrite(self._fd, data, self._at)
        os.fdatasync(self._fd)
        self._at += len(data)


@contextmanager
def sqlite_store(folder: Path, material: Material) -> Iterator[Store]:
    db = sqlite3.connect(folder / "plain.db", isolation_level=None)
    db.execute("PRAGMA journal_mode=WAL")
    db.execute("PRAGMA synchronous=FULL")
    db.execute("CREATE TABLE e (id INTEGER PRIMARY KEY, v BLOB, q BLOB, text TEXT)")
    v, q = material.v[0].tobytes(), material.q[0].tobytes()

    def store(n: int) -> None:
        db.execute("BEGIN IMMEDIATE")
        db.executemany("INSERT INTO e (v, q, text) VALUES (?, ?, ?)", [(v, q, material.text)] * n)
        db.execute("COMMIT")

    yield store
    db.close()


@contextmanager
def sqlite_vec_store(folder: Path, material: Material) -> Iterator[Store]:
    sqlite_vec: Any = importlib.import_module("sqlite_vec")
    apsw: Any = importlib.import_module("apsw")  # Python's own may not load extensions

    db = apsw.Connection(str(folder / "vec.db"))
    db.enable_load_extension(True)
    db.load_extension(sqlite_vec.loadable_path())
    db.execute("PRAGMA journal_mode=WAL")
    db.execute("PRAGMA synchronous=FULL")
    db.execute(f"CREATE VIRTUAL TABLE e USING vec0(v float[{DIM}], q float[{DIM}], +text TEXT)")
    v, q = material.v[0].tobytes(), material.q[0].tobytes()

    def store(n: int) -> None:
        db.execute("BEGIN IMMEDIATE")
        db.executemany("INSERT INTO e (v, q, text) VALUES (?, ?, ?)", [(v, q, material.text)] * n)
        db.execute("COMMIT")

    yield store
    db.close()


@contextmanager
def lmdb_store(folder: Path, material: Material) -> Iterator[Store]:
    lmdb: Any = importlib.import_module("lmdb")

    environment = lmdb.open(str(folder / "lmdb"), map_size=16 << 30)
    key = 0

    def store(n: int) -> None:
        nonlocal key
        with environment.begin(write=True) as transaction:
            for _ in range(n):
                transaction.put(key.to_bytes(8, "big"), material.payload, append=True)
                key += 1

    yield store
    environment.close()


PEERS = {
    "SQLite, WAL, synchronous=FULL": sqlite_store,
    "LMDB, sync": lmdb_store,
    "sqlite-vec, synchronous=FULL": sqlite_vec_store,
}


def _peers(report: Report, stack: ExitStack, folder: Path, material: Material) -> dict[str, Store]:
    found = {}
    for name, make in PEERS.items():
        try:
            found[name] = stack.enter_context(make(folder, material))
        except ImportError as exc:
            report.skip(name, exc)
    return found


# ---------------------------------------------------------------- the machine


def machine_limits(report: Report, arguments: argparse.Namespace) -> None:
    """What the machine gives: the limits behind the figures that follow."""
    report.group(
        "what the machine gives",
        "to any program; and what an add that itself waits for no disk takes right behind the sync "
        "of another file",
    )
    context = multiprocessing.get_context("spawn")
    duration = 0.3 if arguments.quick else 1.0
    material = Material(arguments.seed, 256)
    experiences = [material.experience(i) for i in range(material.n)]
    with (
        scratch(arguments) as folder,
        context.Pool(2) as pool,
        opened(folder / "buffer", durability="os") as buffer,
    ):
        raw = Raw(folder, material)
        pool.map(_computed_for, [0.1, 0.1])

        def typical_add(before: Callable[[], object]) -> float:
            times = []
            for i in range(4 * material.n):
                before()
                started = time.perf_counter()
                buffer.add(experiences[i % material.n])
                times.append(time.perf_counter() - started)
            return float(np.median(times)) * 1e6

        found = in_turns(
            {
                "touch": _first_touch,
                "one": lambda: pool.apply(_computed_for, (duration,)),
                "two": lambda: float(sum(pool.map(_computed_for, [duration, duration], 1))),
                "in a loop": lambda: typical_add(lambda: None),
                "behind": lambda: typical_add(lambda: raw(1)),
            },
            arguments.repetitions,
        )
    report.add(
        "a page of memory touched for the first time",
        found["touch"],
        "µs",
        tags={"metric": "memory.touch"},
    )
    report.add(
        "two processes that compute",
        found["two"],
        "rounds/s",
        reference=("one", found["one"]),
        tags={"metric": "processor.two"},
    )
    report.add(
        "an add at `os`, in a loop",
        found["in a loop"],
        "µs",
        tags={"metric": "processor.loop"},
    )
    report.add(
        "an add at `os`, right behind a sync",
        found["behind"],
        "µs",
        reference=("in a loop", found["in a loop"]),
        tags={"metric": "processor.cold"},
    )


def _first_touch() -> float:
    """Microseconds a page of 4 KiB of memory that this process did not have before."""
    size = 128 << 20
    with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as fresh:
        view = np.frombuffer(fresh, np.uint8)
        started = time.perf_counter()
        view[::4096] = 1
        taken = time.perf_counter() - started
        del view
    return taken / (size / 4096) * 1e6


def _computed_for(duration: float) -> float:
    """Rounds a second of what needs a processor and nothing else."""
    end, rounds = time.perf_counter() + duration, 0
    while time.perf_counter() < end:
        json.loads(json.dumps({str(i): [i, i / 7, None] for i in range(50)}, sort_keys=True))
        rounds += 1
    return rounds / duration


# ---------------------------------------------------------------- adding


def single_adds(report: Report, arguments: argparse.Namespace) -> None:
    n = 300 if arguments.quick else 2000
    report.group(
        "durable adds, one by one",
        f"one thread; {PAYLOAD_BYTES} user bytes each, every one synced before it is acknowledged",
    )
    material = Material(arguments.seed)
    experiences = [material.experience(i) for i in range(n)]
    with scratch(arguments) as folder, ExitStack() as stack:
        raw = Raw(folder, material)
        buffer = stack.enter_context(opened(folder / "buffer"))
        stores: dict[str, Callable[[int], Any]] = {
            "raw write + fdatasync": lambda i: raw(1),
            "expbuf add": lambda i: buffer.add(experiences[i]),
        }
        for name, store in _peers(report, stack, folder, material).items():
            stores[name] = lambda i, store=store: store(1)  # type: ignore[misc]
        times: dict[str, list[float]] = {name: [] for name in stores}
        cpu: dict[str, list[float]] = {name: [] for name in stores}

        def case(name: str) -> Callable[[], float]:
            def run() -> float:
                store, before, begun = stores[name], time.process_time(), time.perf_counter()
                for i in range(n):
                    started = time.perf_counter()
                    store(i)
                    times[name].append(time.perf_counter() - started)
                cpu[name].append((time.process_time() - before) / n * 1e6)
                return n / (time.perf_counter() - begun)

            return run

        for store in stores.values():  # warm up
            for i in range(50):
                store(i)
        rates = in_turns({name: case(name) for name in stores}, arguments.repetitions)
    reference = rates["raw write + fdatasync"]
    ours = rates["expbuf add"]
    report.add("raw write + fdatasync", reference, "adds/s")
    report.add(
        "expbuf add",
        ours,
        "adds/s",
        reference=("raw", reference),
        target="0.6 × raw",
        met=lambda row: (row.ratio or 0) >= 0.6,
    )
    for name in stores:
        if name in PEERS:
            report.add(name, rates[name], "adds/s", reference=("raw", reference))
            report.add(
                f"expbuf against {name.split(',')[0]}",
                ours,
                "adds/s",
                reference=(name, rates[name]),
                target="ahead",
                met=lambda row: (row.ratio or 0) > 1,
            )
    for name in ("raw write + fdatasync", "expbuf add"):
        p50, p99 = percentiles(times[name])
        report.add(f"{name}, p50", [p50], "ms")
        report.add(f"{name}, p99", [p99], "ms")
    report.add("expbuf add, processor time", cpu["expbuf add"], "µs")


def batches(report: Report, arguments: argparse.Namespace) -> None:
    n = 20 if arguments.quick else 100
    report.group(f"durable batches of {BATCH}", "one commit and one sync a batch")
    material = Material(arguments.seed)
    columns = material.columns(0, BATCH)
    experiences = [material.experience(i) for i in range(BATCH)]
    with scratch(arguments) as folder, ExitStack() as stack:
        raw, reserved = Raw(folder, material), Raw(folder, material, reserved=True)
        buffer = stack.enter_context(opened(folder / "buffer"))
        stores: dict[str, Callable[[], Any]] = {
            "raw write + fdatasync, over zeros": lambda: raw(BATCH),
            "raw write + fdatasync, prepared alike": lambda: reserved(BATCH),
            "expbuf add_many, columns": lambda: buffer.add_many(columns),
            "expbuf add_many, objects": lambda: buffer.add_many(experiences),
        }
        for name, store in _peers(report, stack, folder, material).items():
            stores[name] = lambda store=store: store(BATCH)  # type: ignore[misc]

        def case(store: Callable[[], Any]) -> Callable[[], float]:
            return lambda: n * BATCH / seconds(lambda: [store() for _ in range(n)])

        for warm_up in stores.values():
            warm_up()
        rates = in_turns(
            {name: case(store) for name, store in stores.items()}, arguments.repetitions
        )
    zeros = rates.pop("raw write + fdatasync, over zeros")
    reference = rates.pop("raw write + fdatasync, prepared alike")
    report.add("raw write + fdatasync, over zeros", zeros, "experiences/s")
    report.add(
        "raw write + fdatasync, prepared alike",
        reference,
        "experiences/s",
        reference=("raw over zeros", zeros),
    )
    by_columns = rates.pop("expbuf add_many, columns")
    report.add(
        "expbuf add_many, columns",
        by_columns,
        "experiences/s",
        reference=("raw", reference),
        target="0.35 × raw",
        met=lambda row: (row.ratio or 0) >= 0.35,
    )
    report.add(
        "expbuf add_many, columns, again",
        by_columns,
        "experiences/s",
        reference=("raw over zeros", zeros),
    )
    report.add(
        "expbuf add_many, objects",
        rates.pop("expbuf add_many, objects"),
        "experiences/s",
        reference=("raw", reference),
        target="50,000/s",
        met=lambda row: row.median >= 50_000,
    )
    for name, values in rates.items():
        report.add(name, values, "experiences/s", reference=("raw", reference))


# ---------------------------------------------------------------- many writers

WRITERS = 8


def _add_for(buffer: ExperienceBuffer, material: Material, duration: float) -> int:
    len(buffer)  # applies what others have written while this one was not measured
    end, count = time.perf_counter() + duration, 0
    while time.perf_counter() < end:
        buffer.add(material.experience(count))
        count += 1
    return count


def _writer_process(
    path: str, seed: int, duration: float, repetitions: int, barrier: Barrier, counts: Any
) -> None:
    material = Material(seed, 256)
    with opened(Path(path)) as buffer:
        buffer.add(material.experience(0))
        with suppress(threading.BrokenBarrierError):  # the harness makes no more repetitions
            for _ in range(repetitions):
                barrier.wait()
                len(buffer)
                barrier.wait()  # all of them are as far
                counts.put(_add_for(buffer, material, duration))
                barrier.wait()


def writers(report: Report, arguments: argparse.Namespace) -> None:
    duration = 1.0 if arguments.quick else 4.0
    report.group(f"{WRITERS} writers of one buffer", "single adds, each synced; group commit")
    material = Material(arguments.seed)
    context = multiprocessing.get_context("spawn")
    with scratch(arguments) as folder, opened(folder / "buffer") as buffer:
        buffer.add(material.experience(0))
        barrier, counts = context.Barrier(WRITERS + 1), context.Queue()
        processes = [
            context.Process(
                target=_writer_process,
                args=(
                    str(folder / "buffer"),
                    i,
                    duration,
                    arguments.repetitions,
                    barrier,
                    counts,
                ),
            )
            for i in range(WRITERS)
        ]
        for process in processes:
            process.start()

        def threads() -> float:
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

        def many_processes() -> float:
            barrier.wait()
            barrier.wait()
            total = sum(counts.get() for _ in processes)
            barrier.wait()
            return float(total / duration)

        rates = in_turns(
            {
                "one": lambda: _add_for(buffer, material, duration) / duration,
                "threads": threads,
                "processes": many_processes,
            },
            arguments.repetitions,
        )
        barrier.abort()
        for process in processes:
            process.join()
    report.add("one writer", rates["one"], "adds/s")
    for name, least in (("threads", 3.0), ("processes", 1.8)):
        report.add(
            f"{WRITERS} {name}",
            rates[name],
            "adds/s",
            reference=("one writer", rates["one"]),
            target=f"{least:g} × one",
            met=lambda row, least=least: (row.ratio or 0) >= least,  # type: ignore[misc]
        )


# ---------------------------------------------------------------- opening

_OPEN = """
import json, sys, time
from pathlib import Path
import numpy as np
from benchmarks.common import private_bytes
from expbuf_core import ExperienceBuffer

path, warm = sys.argv[1:]
query = np.random.default_rng(1).standard_normal(384).astype(np.float32)
with ExperienceBuffer.open(warm) as buffer:  # imports are not part of opening
    buffer.search_index(v_embed=query, q_embed=query, k=10)
before = private_bytes()
started = time.perf_counter()
buffer = ExperienceBuffer.open(path, mode="a")
opened = time.perf_counter() - started
found = buffer.search_index(v_embed=query, q_embed=query, k=10)
searched = time.perf_counter() - started
assert len(found) == 10
used = private_bytes() - before
print(json.dumps({"opened": opened, "searched": searched, "private": used / len(buffer),
                  "replayed": buffer.recovery.replayed, "clean": buffer.recovery.clean}))
buffer.close()
"""


def _fill(buffer: ExperienceBuffer, vectors: Any, n: int) -> None:
    for start in range(0, n, 4096):
        part = vectors[start : start + 4096]
        buffer.add_many({"v_embed": part, "q_embed": part})


def opening(report: Report, arguments: argparse.Namespace) -> None:
    n = 100_000 if arguments.quick else 1_000_000
    report.group(
        f"opening {n:,} experiences after a clean close",
        "in a fresh process, page cache warm, imports excluded; private memory is what grew in "
        "dirty private pages: mapped files are page cache",
    )
    rng = np.random.default_rng(arguments.seed)
    vectors = clustered(rng, n)
    here = Path(__file__).resolve().parents[1]
    for backend in ("exact", "faiss_cpu"):
        with scratch(arguments) as folder:
            index = {"backend": backend, "builder": "off"}
            try:
                for name, size in (("warm", 20_000), ("buffer", n)):
                    with ExperienceBuffer.open(
                        folder / name, max_size=n, durability="os", index=index
                    ) as buffer:
                        _fill(buffer, vectors, size)
                        buffer.rebuild_index()
                        kinds = [part["kind"] for part in buffer.stats()["index"]["segments"]]
            except Exception as exc:
                report.skip(f"index {backend}", exc)
                continue
            results = []
            for _ in range(arguments.repetitions + 1):
                done = subprocess.run(
                    [sys.executable, "-c", _OPEN, str(folder / "buffer"), str(folder / "warm")],
                    capture_output=True,
                    text=True,
                    check=True,
                    env={**os.environ, "PYTHONPATH": str(here)},
                )
                results.append(json.loads(done.stdout))
            results = results[1:]  # the first brings the files into the page cache
            name = f"{backend} ({kinds[0]})"
            report.add(f"{name}, until open", [r["opened"] for r in results], "s")
            report.add(
                f"{name}, until the first result",
                [r["searched"] for r in results],
                "s",
                target="1 s",
                met=lambda row: row.median < 1.0,
            )
            report.add(
                f"{name}, private memory",
                [r["private"] for r in results],
                "bytes each",
                target="120",
                met=lambda row: row.median < 120,
            )


# ---------------------------------------------------------------- recovery


def _left_by_a_kill(path: Path, write: Callable[[ExperienceBuffer], None], **settings: Any) -> None:
    """Let a child write a buffer and end without closing it."""
    pid = os.fork()
    if not pid:
        code = 1
        try:
            settings |= {"durability": "os", "snapshot": {"every_ops": 1 << 40}}
            buffer = opened(path, **settings)
            write(buffer)
            buffer.sync()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    if os.waitpid(pid, 0)[1]:
        raise RuntimeError("the child that was to be killed failed")


def recovery(report: Report, arguments: argparse.Namespace) -> None:
    n = 40_000 if arguments.quick else 200_000
    report.group(
        "recovery after a kill",
        "operations replayed per second of opening; nothing but the log to recover from",
    )
    material = Material(arguments.seed)
    small = {"v_embed": material.v[:1000, :8], "q_embed": material.q[:1000, :8]}

    def adds(buffer: ExperienceBuffer) -> None:
        for i in range(n):
            buffer.add(material.experience(i))

    def batches_of_256(buffer: ExperienceBuffer) -> None:
        for start in range(0, n, BATCH):
            buffer.add_many(material.columns(start, min(BATCH, n - start)))

    def priorities(buffer: ExperienceBuffer) -> None:
        buffer.add_many(small)
        for i in range(n):
            buffer.update_priorities([i % 1000], [0.5])

    def outcomes(buffer: ExperienceBuffer) -> None:
        buffer.add_many(small)
        for i in range(n):
            if i % 1000 == 0:  # receipts expire
                found = buffer.search_index(v_embed=small["v_embed"][0], k=8)
            receipt = replace(found.receipt, token=secrets.token_hex(16))
            buffer.record_outcome(receipt, success=True)

    for name, write, wanted in (
        ("single adds", adds, 100_000),
        (f"adds in batches of {BATCH}", batches_of_256, 100_000),
        ("priority updates", priorities, 200_000),
        ("outcomes of 8 hits", outcomes, 0),
    ):
        rates, processor = [], []
        with scratch(arguments) as folder:
            _left_by_a_kill(folder / "left", write)
            for repetition in range(arguments.repetitions):
                path = folder / f"copy{repetition}"
                shutil.copytree(folder / "left", path)
                os.sync()
                used = resource.getrusage(resource.RUSAGE_SELF)
                started = time.perf_counter()
                with ExperienceBuffer.open(path, **STORAGE_ONLY) as buffer:
                    rates.append(n / (time.perf_counter() - started))
                    now = resource.getrusage(resource.RUSAGE_SELF)
                    spent = now.ru_utime - used.ru_utime + now.ru_stime - used.ru_stime
                    processor.append(n / spent)
                    assert buffer.recovery.replayed >= n / BATCH
                shutil.rmtree(path)
        unit = "adds/s" if "adds" in name else "operations/s"
        report.add(
            name,
            rates,
            unit,
            target=f"{wanted:,}/s" if wanted else "",
            met=(lambda row, wanted=wanted: row.median >= wanted) if wanted else None,  # type: ignore[misc]
        )
        report.add(f"{name}, by processor time", processor, unit)


# ---------------------------------------------------------------- switches and snapshots


def _pauses(buffer: ExperienceBuffer, material: Material, stop: threading.Event) -> list[float]:
    """Durations of adds, one after the other, until told to stop."""
    times: list[float] = []
    while not stop.is_set():
        started = time.perf_counter()
        buffer.add(material.experience(len(times)))
        times.append(time.perf_counter() - started)
    return times


def _beside(buffer: ExperienceBuffer, material: Material, work: Callable[[], Any]) -> float:
    """The longest pause of a writer, in ms, while something else is done beside it."""
    stop = threading.Event()
    times: list[float] = []
    writer = threading.Thread(target=lambda: times.extend(_pauses(buffer, material, stop)))
    writer.start()
    time.sleep(0.2)
    work()
    time.sleep(0.2)
    stop.set()
    writer.join()
    return max(times) * 1e3


_SNAPSHOT = """
import sys
from expbuf_core import ExperienceBuffer
settings = {"index": {"backend": "exact", "builder": "off"}}
with ExperienceBuffer.open(sys.argv[1], **settings) as buffer:
    print("ready", flush=True)
    for line in sys.stdin:
        buffer.save_snapshot()
        print("done", flush=True)
"""
_WRITE = """
import os, sys
path, size = sys.argv[1], int(sys.argv[2])
print("ready", flush=True)
for line in sys.stdin:
    with open(path + ".tmp", "wb", buffering=0) as file:
        block = os.urandom(1 << 20)
        for _ in range(size >> 20):
            file.write(block)
        os.fsync(file.fileno())
    os.replace(path + ".tmp", path)
    print("done", flush=True)
"""


class Helper:
    """A process that does something each time it is told to."""

    def __init__(self, program: str, *arguments: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", program, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._answer()

    def _answer(self) -> None:
        assert self._process.stdout is not None
        if not self._process.stdout.readline():
            raise RuntimeError("the helper has ended")

    def __call__(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        self._answer()

    def close(self) -> None:
        self._process.communicate()


def snapshots(report: Report, arguments: argparse.Namespace) -> None:
    n = 100_000 if arguments.quick else 1_000_000
    report.group(
        f"snapshots of {n:,} experiences",
        "the longest pause of a thread that adds all the time, while another process takes a "
        "snapshot, or just writes and syncs as many bytes",
    )
    material = Material(arguments.seed)
    narrow = {"v_embed": material.v[:, :8].copy(), "q_embed": material.q[:, :8].copy()}
    with scratch(arguments) as folder:
        path = folder / "buffer"
        material.v, material.q = narrow["v_embed"], narrow["q_embed"]
        with opened(path) as buffer:
            for _ in range(n // material.n + 1):
                buffer.add_many(narrow)
            buffer.save_snapshot()
            newest = max((path / "snapshots").iterdir(), key=lambda file: file.name)
            size = newest.stat().st_size
            snapshot, write = (
                Helper(_SNAPSHOT, str(path)),
                Helper(_WRITE, str(folder / "bytes"), str(size)),
            )
            try:
                pauses = in_turns(
                    {
                        "nothing": lambda: _beside(buffer, material, lambda: time.sleep(0.5)),
                        "bytes": lambda: _beside(buffer, material, write),
                        "snapshot": lambda: _beside(buffer, material, snapshot),
                    },
                    arguments.repetitions,
                )
            finally:
                snapshot.close()
                write.close()
            holds = _switch_holds(buffer, material, 20 if arguments.quick else 50)
    report.add("longest pause beside nothing", pauses["nothing"], "ms")
    report.add(f"longest pause beside {size >> 20} MiB of bytes", pauses["bytes"], "ms")
    report.add(
        "longest pause beside a snapshot",
        pauses["snapshot"],
        "ms",
        reference=("bytes", pauses["bytes"]),
        target="1 × bytes",
        met=lambda row: (row.ratio or 9) <= 1.1,
    )
    report.add(
        "a switch of logs holds the append lock",
        holds,
        "ms",
        target="5 ms",
        met=lambda row: row.median < 5,
    )


def _switch_holds(buffer: ExperienceBuffer, material: Material, n: int) -> list[float]:
    """How long switching to a prepared log takes, in ms (under the append lock throughout)."""
    log = buffer._session.commit_log
    times = []
    for _ in range(n):
        log.prepare()
        times.append(seconds(log.switch) * 1e3)
        buffer.add(material.experience(0))
    return times


def main() -> None:
    made = parser("Storing durably, opening, recovering.")
    report = Report("storage", parse(made))
    run_groups(
        report, [machine_limits, single_adds, batches, writers, opening, recovery, snapshots]
    )


if __name__ == "__main__":
    main()
