"""What the benchmarks share: the machine, interleaved measurements, ratios, a report.

Absolute times mean little on a machine that others share. So everything that is compared is
measured in turns within one run, and compared turn by turn: what disturbs one disturbs the other.

A run may be boxed in time (`--box`): a comparison that is over its time finishes the turn it is in
and reports fewer repetitions. It never reports a figure that was not measured.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import signal
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from expbuf_core.native import native

DIM = 384
TEXT_BYTES = 500
PAYLOAD_BYTES = 2 * 4 * DIM + TEXT_BYTES  # what a user hands over: two embeddings and some text

T = TypeVar("T")

_DISTRIBUTIONS = (
    "expbuf-core",
    "expbuf-file",
    "expbuf-lmdb",
    "expbuf-faiss-cpu",
    "numpy",
    "faiss-cpu",
    "lmdb",
    "sqlite-vec",
    "cpprb",
    "torchrl",
    "tianshou",
    "usearch",
)


@dataclass
class Row:
    """One figure: its value in every repetition, and what it is compared with."""

    group: str
    name: str
    unit: str
    values: list[float]
    reference: str = ""
    ratios: list[float] = field(default_factory=list)
    target: str = ""
    met: bool | None = None
    against: dict[str, float] = field(default_factory=dict)
    tags: dict[str, Any] = field(default_factory=dict)

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def ratio(self) -> float | None:
        return statistics.median(self.ratios) if self.ratios else None


class Report:
    """Collects rows, prints them as they come, and writes them as JSON.

    Attributes:
        rows: The figures.
        groups: Name and note of each group, in order.
        skipped: What could not be measured, and why.
        extra: Facts that are no figures, for the JSON file.
    """

    def __init__(self, title: str, arguments: argparse.Namespace) -> None:
        self.title = title
        self.arguments = arguments
        self.rows: list[Row] = []
        self.groups: list[dict[str, str]] = []
        self.skipped: list[dict[str, str]] = []
        self.extra: dict[str, Any] = {}
        self._group = ""
        self._begun = time.perf_counter()
        self.facts = machine(arguments.folder)
        print(f"# {title}")
        for name, value in self.facts.items():
            print(f"{name}: {value}")
        print(f"seed: {arguments.seed}; repetitions: {arguments.repetitions}", flush=True)

    def group(self, name: str, note: str = "") -> None:
        load = os.getloadavg()[0]
        print(f"\n## {name} (load average {load:.1f})" + (f"\n{note}" if note else ""), flush=True)
        self._group = name
        self.groups.append({"name": name, "note": note})

    def add(
        self,
        name: str,
        values: Sequence[float],
        unit: str,
        *,
        reference: tuple[str, Sequence[float]] | None = None,
        against: Mapping[str, Sequence[float]] | None = None,
        target: str = "",
        met: Callable[[Row], bool] | None = None,
        tags: Mapping[str, Any] | None = None,
    ) -> Row:
        """Report a figure.

        Args:
            name: Of what was measured.
            values: One for each repetition.
            unit: Of the values.
            reference: Name and values, in the same repetitions, of what it is compared with.
            against: The same of others that it is compared with besides.
            target: What it should reach, in words.
            met: Whether it does.
            tags: Facts for tables and plots: metric, contender, size, …
        """
        row = Row(self._group, name, unit, [float(value) for value in values], target=target)
        row.tags = dict(tags or {})
        if reference is not None:
            row.reference = reference[0]
            row.ratios = [a / b for a, b in zip(row.values, reference[1], strict=True) if b]
        for other, values_there in (against or {}).items():
            ratios = [a / b for a, b in zip(row.values, values_there, strict=False) if b]
            if ratios:
                row.against[other] = statistics.median(ratios)
        row.met = met(row) if met is not None else None
        self.rows.append(row)
        text = f"{name:<44} {_number(row.median):>10} {unit:<14}"
        text += f" [{_number(min(row.values))} … {_number(max(row.values))}]"
        if row.ratio is not None:
            text += f"  {row.ratio:.2f} × {row.reference}"
        for other, ratio in row.against.items():
            text += f"  {ratio:.3g} × {other}"
        if target:
            verdict = "" if row.met is None else " – met" if row.met else " – MISSED"
            text += f"  (target: {target}{verdict})"
        print(text, flush=True)
        return row

    def skip(self, name: str, why: object) -> None:
        self.skipped.append({"group": self._group, "name": name, "why": str(why)})
        print(f"{name:<44} skipped: {why}", flush=True)

    def write(self) -> None:
        path: Path | None = self.arguments.json
        if path is None:
            return
        document = {
            "title": self.title,
            "machine": self.facts,
            "seed": self.arguments.seed,
            "quick": self.arguments.quick,
            "repetitions": self.arguments.repetitions,
            "seconds": round(time.perf_counter() - self._begun, 1),
            "groups": self.groups,
            "skipped": self.skipped,
            "extra": self.extra,
            "rows": [
                {**asdict(row), "median": row.median, "ratio": row.ratio} for row in self.rows
            ],
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(document, indent=1), encoding="utf-8")
        print(f"\nwritten to {path}")


def _number(value: float) -> str:
    if value == 0 or 0.01 <= abs(value) < 1000:
        return f"{value:.3g}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.2e}"


def machine(folder: Path) -> dict[str, str]:
    """What was measured on, and with which versions."""
    model = platform.processor() or "unknown processor"
    for line in _lines("/proc/cpuinfo"):
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    memory = next((line.split()[1] for line in _lines("/proc/meminfo")), "0")
    versions = {"python": platform.python_version()}
    for name in _DISTRIBUTIONS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    if native is None:
        versions["expbuf-core"] += " (no native code)"
    return {
        "date": time.strftime("%Y-%m-%d"),
        "processor": f"{model}, {os.cpu_count()} cores",
        "memory": f"{int(memory) / 2**20:.0f} GiB",
        "system": f"{platform.system()} {platform.release()}, {_file_system(folder)}",
        "load average": f"{os.getloadavg()[0]:.1f}",
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
    }


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []


def _file_system(folder: Path) -> str:
    best, kind = "", "unknown file system"
    for line in _lines("/proc/mounts"):
        _, point, name, *_ = line.split()
        if str(folder.resolve()).startswith(point) and len(point) >= len(best):
            best, kind = point, name
    return kind


def parser(description: str) -> argparse.ArgumentParser:
    """Options that all benchmarks have."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--quick", action="store_true", help="smaller sizes, fewer repetitions")
    made.add_argument("--only", default="", help="groups to run, by their function's name: a,b")
    made.add_argument("--json", type=Path, help="also write the figures to this file")
    made.add_argument(
        "--folder", type=Path, default=Path(tempfile.gettempdir()), help="where to put buffers"
    )
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--repetitions", type=int, default=0, help="default: 5, or 3 if quick")
    made.add_argument(
        "--box",
        type=float,
        default=0,
        help="a comparison over so many seconds makes no more repetitions; default: no limit",
    )
    return made


def parse(made: argparse.ArgumentParser) -> argparse.Namespace:
    arguments = made.parse_args()
    arguments.repetitions = arguments.repetitions or (3 if arguments.quick else 5)
    return arguments


def run_groups(
    report: Report, groups: Sequence[Callable[[Report, argparse.Namespace], None]]
) -> None:
    """Run the groups that were asked for; write the report also when told to stop."""
    wanted = [name for name in report.arguments.only.split(",") if name]
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    global _box
    _box = report.arguments.box
    try:
        for group in groups:
            if not wanted or group.__name__ in wanted:
                group(report, report.arguments)
    except KeyboardInterrupt:
        report.skip("the rest", "told to stop")
        raise SystemExit(130) from None
    finally:
        report.write()


_box = 0.0  # seconds that one call of `in_turns` may take; 0: any


def in_turns(cases: Mapping[str, Callable[[], T]], repetitions: int) -> dict[str, list[T]]:
    """Run each case once in every repetition, each time in another order.

    Returns:
        What each case returned, by repetition; fewer than asked for where the time was over.
    """
    names = list(cases)
    values: dict[str, list[T]] = {name: [] for name in names}
    started = time.perf_counter()
    for repetition in range(repetitions):
        if repetition and _box and time.perf_counter() - started > _box:
            break
        turn = repetition % len(names)
        for name in names[turn:] + names[:turn]:
            values[name].append(cases[name]())
    return values


def seconds(function: Callable[[], Any]) -> float:
    """How long a call takes."""
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


@contextmanager
def scratch(arguments: argparse.Namespace) -> Iterator[Path]:
    """A folder that is gone afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="expbuf-bench-", dir=arguments.folder))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def clustered(
    rng: np.random.Generator, n: int, dim: int = DIM, *, latent: int = 32, clusters: int = 256
) -> NDArray[np.float32]:
    """(n, dim) unit vectors in clusters, of an intrinsic dimension as embeddings have it."""
    basis = rng.standard_normal((latent, dim)).astype(np.float32)
    centres = rng.standard_normal((clusters, latent)).astype(np.float32)
    vectors = np.empty((n, dim), np.float32)
    for start in range(0, n, 1 << 16):
        size = min(1 << 16, n - start)
        points = centres[rng.integers(0, clusters, size)]
        points += 0.5 * rng.standard_normal((size, latent)).astype(np.float32)
        block = points @ basis
        vectors[start : start + size] = block / np.linalg.norm(block, axis=1, keepdims=True)
    return vectors


def private_bytes() -> int:
    """Memory of this process that no other can share.

    Clean pages of mapped files are left out: the kernel calls them private as long as nobody else
    maps them, but they are page cache, and the next process that opens the buffer shares them.
    """
    total = 0
    for line in _lines("/proc/self/smaps_rollup"):
        if line.startswith(("Private_Dirty:", "Private_Hugetlb:")):
            total += int(line.split()[1]) * 1024
    return total


def percentiles(times: Sequence[float]) -> tuple[float, float]:
    """p50 and p99 in milliseconds of times in seconds."""
    p50, p99 = np.percentile(np.asarray(times), [50, 99])
    return float(p50) * 1e3, float(p99) * 1e3
