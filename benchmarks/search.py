"""Finding similar experiences: latency and recall beside raw FAISS, also while others write.

    python -m benchmarks.search --quick

The references are FAISS on the very vectors that the buffer searches, in the same process, one
OpenMP thread: an IVF index of whole vectors whose nprobe was raised until it reaches the recall,
and the buffer's own index file with the same effort, re-ranked by FAISS.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import (
    Report,
    Row,
    clustered,
    in_turns,
    parse,
    parser,
    percentiles,
    run_groups,
    scratch,
)
from benchmarks.data import KINDS
from expbuf_core import ExperienceBuffer
from expbuf_core.exact_search import exact_search

K = 10
RECALL = 0.95
TAIL = 1000  # experiences that no segment holds yet
SAME = "FAISS, the same index, re-ranked"

_WRITER = """
import sys, threading, time
import numpy as np
from expbuf_core import Experience, ExperienceBuffer
rng = np.random.default_rng(5)
parts = rng.standard_normal((1000, 384)).astype(np.float32)
settings = {"index": {"builder": "off"}}
with ExperienceBuffer.open(sys.argv[1], **settings) as buffer:
    stop = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), stop.set()), daemon=True).start()
    print("ready", flush=True)
    i = 0
    while not stop.is_set():
        buffer.add(Experience(v_embed=parts[i % 1000], q_embed=parts[i % 1000]))
        i += 1
    print(i)
"""
_BUILDER = """
import os, sys, threading
from expbuf_core.builder import IndexBuilder
os.nice(19)
builder = IndexBuilder(sys.argv[1], {"index": {"builder": "off", "growth": 1e-6}})
builder.yield_to_others(lambda: print("starved", flush=True))
stop = threading.Event()
threading.Thread(target=lambda: (sys.stdin.read(), stop.set()), daemon=True).start()
print("ready", flush=True)
while not stop.is_set():
    builder.buffer.rebuild_index()
    print("built", flush=True)
builder.close()
"""


@contextmanager
def _beside(program: str, path: Path) -> Iterator[list[str]]:
    """Run a program in another process for the time of the block; then, the lines that it said."""
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    if process.stdout.readline() != "ready\n":
        raise RuntimeError("the process beside did not start")
    said: list[str] = []
    try:
        yield said
    finally:
        said += process.communicate()[0].split()


def _times(search: Callable[[int], Any], n: int) -> list[float]:
    times = []
    for i in range(n):
        started = time.perf_counter()
        search(i)
        times.append(time.perf_counter() - started)
    return times


def _recall(found: Any, exact: Any) -> float:
    return float(np.mean([len(set(a) & set(b)) / K for a, b in zip(found, exact, strict=True)]))


def _ivf_flat(
    faiss: Any, vectors: Any, queries: Any, exact: Any, wanted: float
) -> tuple[Any, float]:
    """FAISS's own index of whole vectors, with the least effort that reaches the recall."""
    n, dim = vectors.shape
    lists = 1 << max(4, round(np.log2(4 * np.sqrt(n))))
    index = faiss.index_factory(dim, f"IVF{lists},Flat", faiss.METRIC_INNER_PRODUCT)
    index.cp.niter = 10
    rng = np.random.default_rng(0)
    index.train(vectors[np.sort(rng.choice(n, min(n, 64 * lists), replace=False))])
    index.add(vectors)
    reached = 0.0
    while reached < wanted and index.nprobe < lists:
        reached = _recall(index.search(queries, K)[1], exact)
        if reached < wanted:
            index.nprobe *= 2
    return index, reached


def search(report: Report, arguments: argparse.Namespace) -> None:
    """Clustered vectors, at the configured default of recall."""
    for n in (100_000,) if arguments.quick else (100_000, 1_000_000):
        rng = np.random.default_rng(arguments.seed)
        everything = clustered(rng, n + TAIL + 2000)
        _searched(report, arguments, "clusters", everything, n, RECALL, beside=n == 100_000)


def recall(report: Report, arguments: argparse.Namespace) -> None:
    """A higher recall, and vectors that were not made for the purpose."""
    n = 100_000
    rng = np.random.default_rng(arguments.seed)
    _searched(report, arguments, "clusters", clustered(rng, n + TAIL + 2000), n, 0.99)
    for wanted in (RECALL,) if arguments.quick else (RECALL, 0.99):
        data = KINDS["photographs"](n + TAIL, 2000, arguments.seed)
        everything = np.concatenate([data.vectors, data.queries])
        _searched(report, arguments, "patches of photographs", everything, n, wanted)


def _searched(
    report: Report,
    arguments: argparse.Namespace,
    kind: str,
    everything: Any,
    n: int,
    wanted: float,
    *,
    beside: bool = False,
) -> None:
    try:
        import faiss
    except ImportError as exc:
        report.skip("search", exc)
        return
    calls = 1000 if arguments.quick else 4000
    at = "" if wanted == RECALL else f", recall {wanted}"
    report.group(
        f"search of {n:,}" + ("" if kind == "clusters" else f", {kind}") + at,
        f"k = {K}, {everything.shape[1]} dimensions, {kind}, unit vectors; one large segment and a "
        f"tail of {TAIL}; times in ms",
    )
    vectors, queries = everything[: n + TAIL], everything[n + TAIL :]
    with scratch(arguments) as folder:
        path = folder / "buffer"
        index = {"backend": "faiss_cpu", "builder": "off", "target_recall": wanted}
        settings: dict[str, Any] = {"index": index}
        with ExperienceBuffer.open(path, max_size=2 * n, durability="os", **settings) as buffer:
            for start in range(0, n, 4096):
                part = vectors[start : min(start + 4096, n)]
                buffer.add_many({"v_embed": part, "q_embed": part})
            started = time.perf_counter()
            buffer.rebuild_index()
            report.add("building the index", [time.perf_counter() - started], "s")
            part = vectors[n:]
            buffer.add_many({"v_embed": part, "q_embed": part})
        with ExperienceBuffer.open(path, **settings) as buffer:
            _measure(report, arguments, faiss, buffer, vectors, queries, calls, wanted)
        if beside:
            _measure_beside(report, arguments, queries, calls, path, settings)


def _measure(
    report: Report,
    arguments: argparse.Namespace,
    faiss: Any,
    buffer: ExperienceBuffer,
    vectors: Any,
    queries: Any,
    calls: int,
    wanted_recall: float,
) -> None:
    some = queries[:500]
    exact = exact_search(vectors, None, some, K, "cosine")[0]
    found = [buffer.search_index(hybrid_embed=query, k=K).ids for query in some]
    report.add(
        "recall of expbuf",
        [_recall(found, exact)],
        f"at {K}",
        target=f"{wanted_recall}",
        met=lambda row: row.median >= wanted_recall,
    )
    from expbuf_faiss.calibration import CANDIDATES_FLOOR

    segment = buffer.stats()["index"]["segments"][0]
    print(f"  index: { {k: segment[k] for k in ('factory', 'effort', 'rerank') if k in segment} }")
    faiss.omp_set_num_threads(os.cpu_count() or 1)  # building alone
    flat, reached = _ivf_flat(faiss, vectors, some, exact, wanted_recall)
    faiss.omp_set_num_threads(1)
    report.add(f"recall of FAISS IVF,Flat at nprobe {flat.nprobe}", [reached], f"at {K}")
    cases: dict[str, Callable[[int], Any]] = {
        "expbuf": lambda i: buffer.search_index(hybrid_embed=queries[i % len(queries)], k=K),
        "FAISS IVF,Flat": lambda i: flat.search(queries[i % len(queries)][None], K),
    }
    if "factory" in segment and buffer.path is not None:
        name = f"{segment['name']}.{segment['backend']}"
        same = faiss.read_index(str(buffer.path / "index" / name), faiss.IO_FLAG_MMAP_IFC)
        faiss.extract_index_ivf(same).nprobe = segment["effort"]
        # What expbuf does besides, FAISS can do: compare the best by their whole vectors.
        refined = faiss.IndexRefineFlat(same, faiss.swig_ptr(vectors[: same.ntotal]))
        # As many as expbuf compares.
        refined.k_factor = max(1.0, segment.get("rerank", 0) * CANDIDATES_FLOOR / K)
        cases[SAME] = lambda i: refined.search(queries[i % len(queries)][None], K)
        report.add(
            "recall of the same index, re-ranked by FAISS",
            [_recall(refined.search(some, K)[1], exact)],
            f"at {K}",
        )
    everything: dict[str, list[list[float]]] = {name: [] for name in cases}

    def case(name: str) -> Callable[[], float]:
        def run() -> float:
            everything[name].append(_times(cases[name], calls))
            return percentiles(everything[name][-1])[0]

        return run

    for run in cases.values():
        _times(run, 200)
    p50 = in_turns({name: case(name) for name in cases}, arguments.repetitions)
    for name, values in p50.items():
        report.add(f"{name}, p50", values, "ms")
        report.add(f"{name}, p99", [percentiles(times)[1] for times in everything[name]], "ms")
    for name in [name for name in p50 if name != "expbuf"]:
        report.add(
            f"expbuf beside {name}",
            p50["expbuf"],
            "ms",
            reference=(name, p50[name]),
            target="1.3 × or 0.1 ms more",
            met=partial(_near, p50[name]),
        )


def _near(reference: list[float], row: Row) -> bool:
    """No more than 1.3 times as long, or 0.1 ms longer, in most turns."""
    near = [a <= max(1.3 * b, b + 0.1) for a, b in zip(row.values, reference, strict=True)]
    return bool(np.median(near) >= 0.5)


def _measure_beside(
    report: Report,
    arguments: argparse.Namespace,
    queries: Any,
    calls: int,
    path: Path,
    settings: dict[str, Any],
) -> None:
    """Each turn in a copy of its own: what a writer has added is no burden of the next turn."""
    builds: list[float] = []

    def turn(*programs: str) -> Callable[[], float]:
        def run() -> float:
            said: list[list[str]] = []
            copy = path.with_name("copy")
            shutil.copytree(path, copy)
            os.sync()
            with ExperienceBuffer.open(copy, **settings) as buffer, ExitStack() as stack:

                def search(i: int) -> Any:
                    return buffer.search_index(hybrid_embed=queries[i % len(queries)], k=K)

                _times(search, 200)
                for program in programs:
                    said.append(stack.enter_context(_beside(program, copy)))
                found = percentiles(_times(search, calls))[1]
            shutil.rmtree(copy)
            if _BUILDER in programs:
                builds.append(said[-1].count("built"))
                if "starved" in said[-1]:
                    print("  the builder hardly got a processor")
            return found

        return run

    p99 = in_turns(
        {"alone": turn(), "writer": turn(_WRITER), "builder": turn(_WRITER, _BUILDER)},
        arguments.repetitions,
    )
    report.add("expbuf p99, alone", p99["alone"], "ms")
    report.add(
        "expbuf p99, beside a writer", p99["writer"], "ms", reference=("alone", p99["alone"])
    )
    report.add("builds meanwhile, the last one seen to its end", builds, "")
    report.add(
        "expbuf p99, beside a writer and the builder",
        p99["builder"],
        "ms",
        reference=("beside a writer", p99["writer"]),
        target="1.5 × beside a writer",
        met=lambda row: (row.ratio or 9) <= 1.5,
    )


def main() -> None:
    made = parser("Finding similar experiences.")
    run_groups(Report("search", parse(made)), [search, recall])


if __name__ == "__main__":
    main()
