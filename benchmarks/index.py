"""The index in use: freshness under kills, memory that processes share, what growing costs.

python -m benchmarks.index --quick
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import (
    DIM,
    Report,
    clustered,
    parse,
    parser,
    percentiles,
    run_groups,
    scratch,
)
from expbuf_core import Experience, ExperienceBuffer
from expbuf_core.upkeep import builder_command

_SEARCHER = """
import json, sys, time
import numpy as np
from expbuf_core import ExperienceBuffer
path, mode = sys.argv[1:3]
buffer = ExperienceBuffer.open(path, mode=mode, index={"builder": "off"})
print("ready", flush=True)
for line in sys.stdin:
    seed, count = json.loads(line)
    rng = np.random.default_rng(seed)
    dim = buffer.stats()["settings"]["v_dim"]
    found, times = [], []
    for _ in range(count):
        query = rng.standard_normal(dim).astype(np.float32)
        started = time.perf_counter()
        hits = buffer.search_index(v_embed=query, q_embed=query, k=1)
        times.append(time.perf_counter() - started)
        found.append(hits[0].id if len(hits) else -1)
    memory = dict(
        line.split()[:2] for line in open("/proc/self/smaps_rollup").read().splitlines()[1:]
    )
    kib = {name.rstrip(":"): int(value) for name, value in memory.items()}
    index = buffer.stats()["index"]
    print(json.dumps({"found": found, "times": times, "kib": kib, "lsn": index["lsn"]}), flush=True)
"""


class _Searcher:
    """Another process that searches."""

    def __init__(self, path: Path, mode: str = "a") -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", _SEARCHER, str(path), mode],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._line()

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the searcher ended: {self._process.wait()}")
        return line

    def __call__(self, seed: int, count: int = 1) -> dict[str, Any]:
        """Search for the vectors that a seed makes."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([seed, count]) + "\n")
        self._process.stdin.flush()
        found: dict[str, Any] = json.loads(self._line())
        return found

    def __enter__(self) -> _Searcher:
        return self

    def __exit__(self, *rest: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


# ---------------------------------------------------------------- freshness


def freshness(report: Report, arguments: argparse.Namespace) -> None:
    """Each add is looked for by the very next search of another process."""
    asked = 1000 if arguments.quick else 10_000
    report.group(
        f"freshness, {asked:,} adds",
        "each acknowledged add is searched for at once in another process; builders are killed and "
        "started, segments swapped, experiences evicted; every tenth add another process that has "
        "not read since the tenth before is asked, too",
    )
    rng = random.Random(arguments.seed)
    with scratch(arguments) as folder, ExitStack() as opened:
        path = folder / "buffer"
        settings: dict[str, Any] = {
            "max_size": 4000,
            "durability": "group",
            "index": {"backend": "faiss_cpu", "builder": "off", "rebuild_every": 100},
        }
        buffer = opened.enter_context(ExperienceBuffer.open(path, **settings))
        first = np.zeros(64, np.float32)
        first[0] = 1
        buffer.add(Experience(v_embed=first, q_embed=first))
        quick = opened.enter_context(_Searcher(path))
        lagging = opened.enter_context(_Searcher(path))
        reader = opened.enter_context(_Searcher(path, "r"))
        command = builder_command(path, buffer.config)
        builder = subprocess.Popen(command)
        found = late = late_asked = kills = 0
        lsns: set[int] = set()
        for i in range(asked):
            vector = np.random.default_rng(i).standard_normal(64).astype(np.float32)
            id_ = buffer.add(Experience(v_embed=vector, q_embed=vector))
            answer = quick(i)
            found += answer["found"] == [id_]
            lsns.add(answer["lsn"])
            if i % 10 == 9:
                late_asked += 2
                late += sum(other(i)["found"] == [id_] for other in (lagging, reader))
            if rng.random() < 0.002:
                builder.send_signal(signal.SIGKILL)
                builder.wait()
                kills += 1
            if builder.poll() is not None:
                builder = subprocess.Popen(command)
        builder.kill()
        builder.wait()
        report.add(
            "found by the next search",
            [found],
            f"of {asked:,}",
            target="all",
            met=lambda row: row.median == asked,
        )
        report.add(
            "found by processes that lag",
            [late],
            f"of {late_asked:,}",
            target="all",
            met=lambda row: row.median == late_asked,
        )
        report.add("kills of a builder", [kills], "times")
        report.add("segments swapped", [len(lsns) - 1], "times")


# ---------------------------------------------------------------- sharing


def sharing(report: Report, arguments: argparse.Namespace) -> None:
    """Four processes search one buffer."""
    n, processes = (50_000 if arguments.quick else 500_000), 4
    report.group(
        f"memory of {processes} processes on {n:,} experiences",
        f"{DIM} dimensions; PSS counts a page that k processes map as 1/k in each",
    )
    with scratch(arguments) as folder, ExitStack() as opened:
        path = folder / "buffer"
        index = {"backend": "faiss_cpu", "builder": "off"}
        rng = np.random.default_rng(arguments.seed)
        with ExperienceBuffer.open(path, max_size=n, durability="os", index=index) as buffer:
            vectors = clustered(rng, n)
            for start in range(0, n, 4096):
                part = vectors[start : start + 4096]
                buffer.add_many({"v_embed": part, "q_embed": part})
            del vectors
            buffer.rebuild_index()
            buffer.save_snapshot()
        del buffer  # or this process would count among those that map the index
        gc.collect()
        files = sum(file.stat().st_size for file in (path / "index").iterdir()) / 2**20
        searchers: list[_Searcher] = []
        memory: list[float] = []
        private: list[float] = []
        for _ in range(processes):
            searchers.append(opened.enter_context(_Searcher(path)))
            for searcher in searchers:  # until each has met what the others have mapped
                searcher(0, 300)
            last = [searcher(1, 300)["kib"] for searcher in searchers]
            memory.append(sum(kib["Pss"] for kib in last) / 1024)
            private.append(sum(kib["Private_Dirty"] for kib in last) / 1024 / len(last))
        report.add("files of the index", [files], "MiB")
        report.add("one process, PSS", [memory[0]], "MiB")
        report.add("private of each", [private[-1]], "MiB")
        more = private[-1] * (processes - 1)
        report.add(
            f"{processes} processes, PSS together",
            [memory[-1]],
            "MiB",
            reference=("one process and what others need for themselves", [memory[0] + more]),
            target="the index once",
            met=lambda row: (row.ratio or 9) <= 1.05,
        )


# ---------------------------------------------------------------- growing


def _used() -> tuple[int, float]:
    """(bytes written, seconds of CPU) of this process so far."""
    written = 0
    for line in Path("/proc/self/io").read_text().splitlines():
        if line.startswith("wchar:"):
            written = int(line.split()[1])
    return written, time.process_time()


def growing(report: Report, arguments: argparse.Namespace) -> None:
    """Adds one by one, a build after each thousand, from small to large; then in a full buffer."""
    most = 100_000 if arguments.quick else 1_000_000
    report.group(
        f"growing to {most:,}",
        f"{DIM} dimensions; adds one by one at `os`, a build every 1,000, in one process whose "
        "writes and CPU are counted; each over its last half, or 250,000: all is built anew then",
    )
    rng = np.random.default_rng(arguments.seed)
    vectors = clustered(rng, most + most // 4)
    sizes = [size for size in (20_000, 100_000, 1_000_000) if size <= most]
    windows = {f"to {size:,}": (size - min(size // 2, 250_000), size) for size in sizes}
    windows["in a full buffer"] = (most, most + most // 4)
    figures: dict[str, tuple[float, float, float]] = {}
    with scratch(arguments) as folder:
        index = {"backend": "faiss_cpu", "builder": "off", "rebuild_every": 1000}
        path = folder / "buffer"
        with ExperienceBuffer.open(path, max_size=most, durability="os", index=index) as buffer:
            done = 0
            for name, (begin, end) in windows.items():
                if begin > done:  # what lies between is not measured
                    part = vectors[done:begin]
                    for start in range(0, len(part), 4096):
                        some = part[start : start + 4096]
                        buffer.add_many({"v_embed": some, "q_embed": some})
                    buffer.rebuild_index()
                    done = begin
                started = _used()
                built = [0.0, 0.0]
                for i in range(done, end):
                    buffer.add(Experience(v_embed=vectors[i], q_embed=vectors[i]))
                    if i % 1000 == 999:
                        before = _used()
                        buffer.rebuild_index()
                        built = [a + b - c for a, b, c in zip(built, _used(), before, strict=True)]
                used = [b - a for a, b in zip(started, _used(), strict=True)]
                count = end - done
                done = end
                figures[name] = (
                    used[0] / count,
                    used[1] / count * 1e6,
                    built[1] / count * 1e6,
                )
                first = figures[next(iter(windows))]
                bytes_, cpu, of_index = figures[name]
                last = name != next(iter(windows)) and name != "in a full buffer"
                report.add(
                    f"bytes written an add, {name}",
                    [bytes_],
                    "bytes",
                    reference=("the smallest", [first[0]]),
                    target="2 × the smallest" if last else "",
                    met=(lambda row: (row.ratio or 9) <= 2) if last else None,
                )
                report.add(
                    f"CPU an add, {name}",
                    [cpu],
                    "µs",
                    reference=("the smallest", [first[1]]),
                    target="4 × the smallest" if last else "",
                    met=(lambda row: (row.ratio or 9) <= 4) if last else None,
                )
                report.add(f"of that the index, {name}", [of_index], "µs")
                times = []
                for _ in range(1000):
                    query = vectors[rng.integers(0, done)]
                    began = time.perf_counter()
                    buffer.search_index(hybrid_embed=query, k=10)
                    times.append(time.perf_counter() - began)
                report.add(f"search p50, {name}", [percentiles(times)[0]], "ms")
                segments = [item["rows"] for item in buffer.stats()["index"]["segments"]]
                print(f"  segments: {segments}", flush=True)


def main() -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    made = parser("The index in use.")
    run_groups(Report("index", parse(made)), [freshness, sharing, growing])


if __name__ == "__main__":
    main()
