"""The figures of "High-Reliability Design Decisions" in docs/ARCHITECTURE.md.

    python -m benchmarks.design

What can be counted is counted: syncs, bytes, searches that found what was added. Times are told as
ratios of what is measured in turns, so that whatever else the machine does disturbs both alike. The
*plain plan* stands here as far as it is compared: a `deque` that is pickled, two logs that are both
synced, a `multiprocessing.Lock`.
"""

from __future__ import annotations

import collections
import multiprocessing
import os
import pickle
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pluggy

from expbuf_core import Experience, ExperienceBuffer, snapshots
from expbuf_core.filesystem import Buffer, FileSystem

DIM = 384
EXACT = {"index": {"backend": "exact", "builder": "off"}}
FAISS = {"index": {"backend": "faiss_cpu", "builder": "off"}}


class Counting(FileSystem):
    """The real file system, which counts syncs and the bytes of commits."""

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self.clear()

    def clear(self) -> None:
        """Count from here on."""
        self.syncs = self.bytes = 0

    def _count(self, syncs: int, size: int) -> None:
        with self._mutex:
            self.syncs += syncs
            self.bytes += size

    # Commits are written by this; the zeros of the next log file are not.
    def pwritev(self, fd: int, parts: Sequence[Buffer], offset: int) -> None:
        self._count(0, sum(memoryview(part).nbytes for part in parts))
        super().pwritev(fd, parts, offset)

    def fdatasync(self, fd: int) -> None:
        self._count(1, 0)
        super().fdatasync(fd)

    def fsync(self, fd: int) -> None:
        self._count(1, 0)
        super().fsync(fd)


def tell(what: str, value: str) -> None:
    print(f"{what:64s} {value}", flush=True)


def vectors(n: int) -> Any:
    return np.random.default_rng(0).standard_normal((n, DIM), dtype=np.float32)


def experience(v: Any, i: int) -> Experience:
    return Experience(v_embed=v[i % len(v)], q_embed=v[-1 - i % len(v)], answer="x" * 500)


def fill(buffer: ExperienceBuffer, v: Any, n: int) -> None:
    for start in range(0, n, 1000):
        part = v[np.arange(start, min(n, start + 1000)) % len(v)]
        buffer.add_many({"v_embed": part, "q_embed": part, "answer": ["x" * 500] * len(part)})


def in_turns(turns: int, *operations: Callable[[], Any]) -> list[float]:
    """Median seconds of each, by turns."""
    times: list[list[float]] = [[] for _ in operations]
    for turn in range(turns):
        for at in np.roll(np.arange(len(operations)), turn).tolist():
            started = time.perf_counter()
            operations[at]()
            times[at].append(time.perf_counter() - started)
    return [statistics.median(part) for part in times]


# ---------------------------------------------------------------- durability


def syncs_of_adds(folder: Path) -> None:
    v, counting = vectors(256), Counting()
    with ExperienceBuffer.open(folder / "one", config=EXACT, filesystem=counting) as buffer:
        buffer.add(experience(v, 0))
        counting.clear()
        for i in range(500):
            buffer.add(experience(v, i))
        tell("syncs an add, one writer", f"{counting.syncs / 500:.3f}")
    for writers in (8, 32):
        with ExperienceBuffer.open(
            folder / f"many-{writers}", config=EXACT, filesystem=counting
        ) as buffer:
            buffer.add(experience(v, 0))
            counting.clear()

            def work(buffer: ExperienceBuffer = buffer) -> None:
                for i in range(100):
                    buffer.add(experience(v, i))

            threads = [threading.Thread(target=work) for _ in range(writers)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            tell(f"syncs an add, {writers} threads", f"{counting.syncs / (100 * writers):.3f}")


def bytes_of_adds(folder: Path) -> None:
    v = vectors(1000)
    for n in (1_000, 10_000, 100_000):
        counting = Counting()
        path = folder / f"bytes-{n}"
        with ExperienceBuffer.open(
            path, config=EXACT, max_size=n, durability="os", filesystem=counting
        ) as buffer:
            fill(buffer, v, n)
            counting.clear()
            for i in range(50):
                buffer.add(experience(v, i))
            added = counting.bytes / 50
            tell(f"bytes an add, at {n:,}", f"{added:,.0f}")
            snapshot = snapshots.path_of(path, buffer.save_snapshot())
            each = snapshot.stat().st_size / n
            tell(f"bytes of a snapshot for each experience, at {n:,}", f"{each:.1f}")
        if n <= 10_000:
            stored = collections.deque((v[0], v[0], v[0], "x" * 500, i) for i in range(n))
            plain = len(pickle.dumps([tuple(map(_copied, one)) for one in stored]))
            tell(f"bytes of the pickled deque, at {n:,}", f"{plain:,}")


def _copied(value: Any) -> Any:
    """Of its own: pickle writes what is shared once."""
    return value.copy() if isinstance(value, np.ndarray) else value


def one_log_or_two(folder: Path) -> None:
    """A record appended and synced, to one log and to two, in files that exist beforehand."""
    record, size = os.urandom(4096), 32 << 20
    files = []
    for name in ("a", "b", "c"):
        fd = os.open(folder / f"log-{name}", os.O_RDWR | os.O_CREAT)
        os.pwrite(fd, bytes(size), 0)
        os.fsync(fd)
        files.append(fd)
    at = [0]

    def one() -> None:
        at[0] += 4096
        os.pwrite(files[0], record, at[0] % size)
        os.fdatasync(files[0])

    def two() -> None:
        for fd in files[1:]:
            os.pwrite(fd, record, at[0] % size)
            os.fdatasync(fd)

    single, double = in_turns(1500, one, two)
    tell("two synced logs instead of one, times as long", f"{double / single:.2f}")
    for fd in files:
        os.close(fd)


def append_or_rename(folder: Path) -> None:
    v = vectors(256)
    rename = {**EXACT, "persistence": {"backend": "file", "file": {"commit": "rename"}}}
    with (
        ExperienceBuffer.open(folder / "append", config=EXACT) as appending,
        ExperienceBuffer.open(folder / "rename", config=rename) as renaming,
    ):
        one = experience(v, 0)
        appending.add(one)
        renaming.add(one)
        fast, slow = in_turns(400, lambda: appending.add(one), lambda: renaming.add(one))
        tell("tmp, sync, rename for each add, times as long", f"{slow / fast:.2f}")


def replay(folder: Path) -> None:
    v, path = vectors(1000), folder / "replayed"
    for kind in ("single adds", "snapshot and index"):
        buffer = ExperienceBuffer.open(
            path / kind.replace(" ", "-"), config=EXACT, durability="os", max_size=50_000
        )
        for i in range(20_000):
            buffer.add(experience(v, i))
        if kind != "single adds":
            buffer.rebuild_index()
            buffer.save_snapshot()
        where = buffer.path
        assert where is not None
        # Left without closing, as a kill would.
        code = f"""
import time
from expbuf_core import ExperienceBuffer
started = time.process_time()
buffer = ExperienceBuffer.open({str(where)!r}, index="exact")
print(time.process_time() - started, buffer.recovery.replayed)
"""
        left = folder / f"left-{kind.replace(' ', '-')}"
        subprocess.run(["cp", "-r", str(where), str(left)], check=True)
        done = subprocess.run(
            [sys.executable, "-c", code.replace(str(where), str(left))],
            capture_output=True,
            text=True,
            check=True,
        )
        seconds, replayed = done.stdout.split()
        tell(
            f"opening 20,000 after a kill, {kind}",
            f"{float(seconds):.2f} s of the processor, {replayed} operations replayed",
        )
        buffer.close()


# ---------------------------------------------------------------- read availability


def _searches(path: str, pipe: Connection) -> None:
    with ExperienceBuffer.open(path, mode="r") as buffer:
        pipe.send("ready")
        while (query := pipe.recv()) is not None:
            found = buffer.search_index(v_embed=query, q_embed=query, k=1)
            pipe.send(int(found[0].id))


def freshness(folder: Path) -> None:
    """Adds that the very next search of another process finds, while the index is built."""
    v, path = vectors(3000), folder / "fresh"
    with ExperienceBuffer.open(path, config=FAISS, durability="os") as buffer:
        fill(buffer, v, 2000)
        context = multiprocessing.get_context("spawn")
        here, there = context.Pipe()
        reader = context.Process(target=_searches, args=(str(path), there))
        reader.start()
        here.recv()
        found, asked = 0, 1000
        stop, builds = threading.Event(), [0]

        def build() -> None:
            while not stop.is_set():
                builds[0] += bool(buffer.rebuild_index())

        builder = threading.Thread(target=build)
        builder.start()
        for i in range(asked):
            one = v[2000 + i]
            id_ = buffer.add(Experience(v_embed=one, q_embed=one))
            here.send(one)
            found += here.recv() == id_
        stop.set()
        builder.join()
        here.send(None)
        reader.join()
        tell(
            "adds found by the next search of another process",
            f"{found} of {asked}, over {builds[0]} builds",
        )


def _builds(path: str, pipe: Connection) -> None:
    """Builds the index again and again while it is told to, at the builder's priority."""
    os.nice(19)
    v, built = vectors(3000), 0
    with ExperienceBuffer.open(path, config=FAISS, durability="os") as buffer:
        pipe.send("ready")
        while pipe.recv():
            while not pipe.poll():
                fill(buffer, v, 1000)
                built += bool(buffer.rebuild_index())
            pipe.recv()
            pipe.send(built)


def beside_builds(folder: Path) -> None:
    """Searches of one process, alone and while another one adds and builds, in turns."""
    path, n = folder / "beside", 50_000
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((500, DIM), dtype=np.float32)
    v = centres[rng.integers(0, 500, n)] + 0.5 * rng.standard_normal((n, DIM), dtype=np.float32)
    with ExperienceBuffer.open(path, config=FAISS, durability="os", max_size=n) as buffer:
        fill(buffer, v, n)
        buffer.rebuild_index()
        context = multiprocessing.get_context("spawn")
        here, there = context.Pipe()
        builder = context.Process(target=_builds, args=(str(path), there))
        builder.start()
        here.recv()
        ratios: dict[float, list[float]] = {0.5: [], 0.99: []}
        built = 0
        for _ in range(8):
            alone = _times(buffer, v)
            here.send(True)
            busy = _times(buffer, v)
            here.send(False)
            built = here.recv()
            for share, found in ratios.items():
                found.append(float(np.quantile(busy, share) / np.quantile(alone, share)))
        here.send(False)
        builder.join()
    for share, found in ratios.items():
        what = f"p{100 * share:.0f} of searches beside adds and builds, times that alone"
        tell(what, f"{statistics.median(found):.2f} ({built} builds)")


def _times(buffer: ExperienceBuffer, v: Any) -> list[float]:
    times = []
    for i in range(1500):
        started = time.perf_counter()
        buffer.search_index(v_embed=v[i * 7], q_embed=v[i * 7], k=5)
        times.append(time.perf_counter() - started)
    return times


# ---------------------------------------------------------------- flexibility


def backends(folder: Path) -> None:
    v = vectors(20_000)
    with (
        ExperienceBuffer.open(folder / "in-files", config=EXACT) as files,
        ExperienceBuffer.open(
            folder / "in-lmdb", config={**EXACT, "persistence": {"backend": "lmdb"}}
        ) as lmdb,
    ):
        one = experience(v, 0)
        files.add(one)
        lmdb.add(one)
        fast, slow = in_turns(400, lambda: files.add(one), lambda: lmdb.add(one))
        tell("an add into LMDB, times as long as into files", f"{slow / fast:.2f}")


# ---------------------------------------------------------------- locks, positions, hooks


def _hold(path: str, pipe: Connection) -> None:
    buffer = ExperienceBuffer.open(path, config=EXACT)
    buffer._live().commit_log._append_lock.acquire()
    pipe.send("held")
    time.sleep(600)


def _hold_plain(lock: Any, pipe: Connection) -> None:
    lock.acquire()
    pipe.send("held")
    time.sleep(600)


def locks(folder: Path) -> None:
    context = multiprocessing.get_context("spawn")
    v = vectors(256)
    waits = []
    with ExperienceBuffer.open(folder / "locked", config=EXACT) as buffer:
        buffer.add(experience(v, 0))
        for i in range(5):
            here, there = context.Pipe()
            holder = context.Process(target=_hold, args=(str(folder / "locked"), there))
            holder.start()
            here.recv()
            assert holder.pid is not None
            os.kill(holder.pid, signal.SIGKILL)
            started = time.perf_counter()
            buffer.add(experience(v, i))
            waits.append(time.perf_counter() - started)
            holder.join()
    tell("an add after its lock's holder was killed, ms", f"{1000 * statistics.median(waits):.1f}")
    lock = context.Lock()
    here, there = context.Pipe()
    holder = context.Process(target=_hold_plain, args=(lock, there))
    holder.start()
    here.recv()
    assert holder.pid is not None
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    tell("multiprocessing.Lock, ten seconds after the same", str(lock.acquire(timeout=10)))


def positions(folder: Path) -> None:
    n = 1_000_000
    stored, ring = collections.deque(range(n)), np.arange(n)
    places = np.random.default_rng(0).integers(0, n, 256)
    listed = places.tolist()
    slow, fast = in_turns(15, lambda: [stored[i] for i in listed], lambda: ring[places])
    tell("256 of a million at random: deque, times as long as columns", f"{slow / fast:,.0f}")


def hooks(folder: Path) -> None:
    spec, implementation = pluggy.HookspecMarker("design"), pluggy.HookimplMarker("design")

    class Specs:
        @spec
        def score(self, confidence: float) -> float: ...  # type: ignore[empty-body]

    class Plugin:
        @implementation
        def score(self, confidence: float) -> float:
            return 1.0 - confidence

    manager, plugin = pluggy.PluginManager("design"), Plugin()
    manager.add_hookspecs(Specs)
    manager.register(plugin)
    calls = range(2000)
    hook = manager.hook.score

    def hooked() -> None:
        for _ in calls:
            hook(confidence=0.5)

    def called() -> None:
        for _ in calls:
            plugin.score(confidence=0.5)

    slow, fast = in_turns(50, hooked, called)
    tell("a hook instead of a method, times as long", f"{slow / fast:.0f}")


def main() -> None:
    parts = (
        syncs_of_adds,
        bytes_of_adds,
        one_log_or_two,
        append_or_rename,
        replay,
        freshness,
        beside_builds,
        backends,
        locks,
        positions,
        hooks,
    )
    chosen = [part for part in parts if not sys.argv[1:] or part.__name__ in sys.argv[1:]]
    with tempfile.TemporaryDirectory(prefix="expbuf-design-") as folder:
        for part in chosen:
            part(Path(folder))


if __name__ == "__main__":
    main()
