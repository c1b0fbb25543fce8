"""The process that a peer runs in: reads commands, one JSON object a line, and answers likewise.

    python -m benchmarks.peers.worker NAME

What is timed is timed here, so that the pipe costs nothing. Whatever libraries print goes to
standard error.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import mmap
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import percentiles, private_bytes
from benchmarks.peers import PEERS
from benchmarks.peers.base import BATCH, Material, NotOffered, Peer, recall_of

K = 10
MEMORY_QUERIES = 50


def material_of(folder: Path, capacity: int) -> Material:
    """What `client.lay_out` wrote, mapped."""

    def mapped(name: str) -> Any:
        return np.load(folder / name, mmap_mode="r")

    texts = json.loads((folder / "texts.json").read_text(encoding="utf-8"))
    # Queries are used over and over; rows are read as they are stored.
    return Material(
        mapped("vectors.npy"), np.array(mapped("queries.npy")), np.array(mapped("truth.npy")),
        texts, capacity,
    )  # fmt: skip


class Worker:
    """Carries out commands on one peer."""

    def __init__(self, name: str) -> None:
        entry = PEERS[name]
        self.cls: type[Peer] = getattr(
            importlib.import_module(f"benchmarks.peers.{entry.module}"), entry.cls
        )
        self.peer: Any = None
        self.next_key = 0
        self.folder = Path()

    # ---------------------------------------------------------------- life

    def describe(self) -> dict[str, Any]:
        cls = self.cls
        versions = {name: importlib.metadata.version(name) for name in cls.distributions}
        return {
            "versions": versions,
            "survives_kill": cls.survives_kill,
            "survives_power": cls.survives_power,
            "writers": cls.writers,
            "single": cls.single,
            "advice": cls.advice,
        }

    def open(self, folder: str, data: str, capacity: int, first_key: int = 0) -> dict[str, Any]:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        material = material_of(Path(data), capacity)
        before = private_bytes()
        started = time.perf_counter()
        self.peer = self.cls(self.folder, material)
        opened = time.perf_counter() - started
        self.next_key = first_key
        return {"opened": opened, "private_before": before}

    def first_use(self, replay: bool) -> dict[str, Any]:
        """The first search, or the first sample where the peer does not search."""
        started = time.perf_counter()
        if replay:
            self.peer.sample()
        else:
            self.peer.search(self.peer.material.queries[0], K)
        return {"first": time.perf_counter() - started}

    def count(self) -> int:
        return int(self.peer.count())

    def private(self, replay: bool) -> int:
        """Private dirty bytes after some use."""
        for i in range(MEMORY_QUERIES):
            if replay:
                self.peer.sample()
            else:
                self.peer.search(self.peer.material.queries[i], K)
        return private_bytes()

    def save(self, more: bool = False) -> float:
        """How long a save takes; with `more`, there is something new to save if it can be had."""
        if more:
            with suppress(NotOffered):
                self.peer.add(self.next_key)
                self.next_key += 1
        started = time.perf_counter()
        self.peer.save()
        return time.perf_counter() - started

    def tidy(self) -> None:
        self.peer.tidy()

    def close(self) -> None:
        if self.peer is not None:
            self.peer.close()
        self.peer = None

    # ---------------------------------------------------------------- storing

    def load(self, n: int) -> float:
        started = time.perf_counter()
        self.peer.load(n)
        self.next_key = max(self.next_key, n)
        return time.perf_counter() - started

    def ready(self) -> dict[str, Any]:
        started = time.perf_counter()
        what = self.peer.ready()
        return {"seconds": time.perf_counter() - started, "what": what}

    def add(self, seconds: float, most: int) -> dict[str, Any]:
        """Single adds for some time."""
        times: list[float] = []
        processor = time.process_time()
        begun = time.perf_counter()
        end = begun + seconds
        while len(times) < most:
            started = time.perf_counter()
            if started > end:
                break
            self.peer.add(self.next_key)
            times.append(time.perf_counter() - started)
            self.next_key += 1
        elapsed = time.perf_counter() - begun
        p50, p99 = percentiles(times)
        return {
            "rate": len(times) / elapsed,
            "p50": p50,
            "p99": p99,
            "processor": (time.process_time() - processor) / len(times) * 1e6,
            "added": len(times),
        }

    def add_batches(self, seconds: float, most: int) -> dict[str, Any]:
        begun = time.perf_counter()
        done = 0
        while done < most and (done == 0 or time.perf_counter() < begun + seconds):
            self.peer.add_batch(self.next_key, self.next_key + BATCH)
            self.next_key += BATCH
            done += 1
        return {"rate": done * BATCH / (time.perf_counter() - begun)}

    def add_threads(self, seconds: float, threads: int) -> dict[str, Any]:
        """Single adds by several threads at once."""
        counts = [0] * threads
        failures: list[BaseException] = []
        base, end = self.next_key, time.perf_counter() + seconds
        stride = 1 << 22

        def write(which: int) -> None:
            try:
                while time.perf_counter() < end:
                    self.peer.add(base + which * stride + counts[which])
                    counts[which] += 1
            except BaseException as exc:
                failures.append(exc)

        running = [threading.Thread(target=write, args=(i,)) for i in range(threads)]
        for thread in running:
            thread.start()
        for thread in running:
            thread.join()
        if failures:
            raise failures[0]
        # Each turn begins behind what the threads of the last one wrote.
        self.next_key = base + max(counts)
        return {"rate": sum(counts) / seconds}

    def add_until_killed(self, counter: str) -> None:
        """Single adds, counted in a mapped file as they are acknowledged."""
        with open(counter, "r+b") as file, mmap.mmap(file.fileno(), 8) as page:
            words = np.frombuffer(page, np.int64)
            while True:
                self.peer.add(self.next_key)
                self.next_key += 1
                words[0] += 1

    def save_until_killed(self) -> None:
        while True:
            self.save(more=True)

    # ---------------------------------------------------------------- searching

    def recall(self) -> float:
        return recall_of(self.peer, 500)

    def _search_while(self, more: Callable[[int], bool]) -> dict[str, Any]:
        queries = self.peer.material.queries
        times: list[float] = []
        while more(len(times)):
            query = queries[len(times) % len(queries)]
            started = time.perf_counter()
            self.peer.search(query, K)
            times.append(time.perf_counter() - started)
        p50, p99 = percentiles(times)
        return {"p50": p50, "p99": p99, "searches": len(times), "worst": max(times) * 1e3}

    def search(self, seconds: float, most: int) -> dict[str, Any]:
        end = time.perf_counter() + seconds
        return self._search_while(lambda n: n < most and time.perf_counter() < end)

    def search_beside_thread(self, seconds: float, work: str) -> dict[str, Any]:
        """Searches while another thread of this process adds, or rebuilds the index."""
        done, failures = [0], []
        stop = threading.Event()

        def beside() -> None:
            try:
                while not stop.is_set():
                    if work == "rebuild":
                        self.peer.rebuild()
                    else:
                        self.peer.add(self.next_key)
                        self.next_key += 1
                    done[0] += 1
            except BaseException as exc:
                failures.append(exc)

        thread = threading.Thread(target=beside)
        thread.start()
        end = time.perf_counter() + seconds
        try:
            # A rebuild that was begun is seen to its end: its worst moment may be its last.
            result = self._search_while(
                lambda n: (
                    time.perf_counter() < end
                    or (work == "rebuild" and not done[0] and thread.is_alive())
                )
            )
        finally:
            stop.set()
            thread.join()
        if failures:
            raise failures[0]
        return {**result, "done": done[0]}

    def rebuild(self, seconds: float) -> dict[str, Any]:
        """Rebuild the index over and over, at low priority as a builder should."""
        os.nice(19)
        if hasattr(os, "SCHED_IDLE"):
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
        begun, done = time.perf_counter(), 0
        while done == 0 or time.perf_counter() < begun + seconds:
            self.peer.rebuild()
            done += 1
        return {"done": done, "seconds": (time.perf_counter() - begun) / done}

    def finds(self, key: int) -> bool:
        """Whether a search with a stored vector finds its key."""
        found = self.peer.search(np.array(self.peer.material.vector(key)), K)
        return key in set(map(int, found))

    # ---------------------------------------------------------------- replay

    def sample(self, seconds: float, most: int) -> dict[str, Any]:
        self.peer.sample()
        return self._repeated(self.peer.sample, seconds, most)

    def update(self, seconds: float, most: int, rows: int) -> dict[str, Any]:
        once = self._updating(rows)
        once()
        return self._repeated(once, seconds, most)

    def step(self, seconds: float, most: int, rows: int) -> dict[str, Any]:
        """A step of learning, update and sample: each finds the caches as the other left them."""
        update = self._updating(rows)

        def once() -> None:
            update()
            self.peer.sample()

        once()
        return self._repeated(once, seconds, most)

    def _updating(self, rows: int) -> Callable[[], None]:
        rng = np.random.default_rng(7)
        changes = [
            (rng.integers(0, rows, BATCH), rng.random(BATCH).astype(np.float32) + 0.01)
            for _ in range(16)
        ]
        turn = [0]

        def once() -> None:
            turn[0] += 1
            self.peer.update(*changes[turn[0] % 16])

        return once

    def _repeated(self, once: Callable[[], Any], seconds: float, most: int) -> dict[str, Any]:
        times: list[float] = []
        end = time.perf_counter() + seconds
        while len(times) < most:
            started = time.perf_counter()
            if started > end:
                break
            once()
            times.append(time.perf_counter() - started)
        p50, p99 = percentiles(times)
        return {"mean": float(np.mean(times)) * 1e6, "p50": p50 * 1e3, "p99": p99 * 1e3}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    sys.stdout = sys.stderr

    def answer(**what: Any) -> None:
        answers.write(json.dumps(what) + "\n")
        answers.flush()

    try:
        worker = Worker(sys.argv[1])
        answer(result=worker.describe())
    except BaseException as exc:
        answer(error=f"{type(exc).__name__}: {exc}")
        return
    for line in sys.stdin:
        command = json.loads(line)
        try:
            answer(result=getattr(worker, command.pop("do"))(**command))
        except NotOffered as exc:
            answer(not_offered=str(exc))
        except BaseException as exc:
            traceback.print_exc()
            answer(error=f"{type(exc).__name__}: {exc}")


if __name__ == "__main__":
    main()
