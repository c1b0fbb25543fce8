"""How each cost grows: from ten thousand experiences to ten million.

    python -m benchmarks.scaling --quick
    python -m benchmarks.scaling --sizes 10000,100000,1000000 --budget 600

One contender at a time, each in a process of its own, from small to large, in a box of time: what
the next size would take is foretold from the last one, and a contender for which that is more than
its box or the memory has left ends there, with a word on why. So the curves end where they must,
and no figure is extrapolated. Narrow vectors (32 float32, 100 bytes of text): what grows here is
the number of experiences.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks.common import Report, parser, run_groups, scratch
from benchmarks.data import clusters, passages
from benchmarks.peers.base import BATCH, K, NotOffered
from benchmarks.peers.client import HERE, Client, PeerFailed, disk_bytes, lay_out, warm_up

DIM, INTRINSIC, TEXT_BYTES = 32, 16, 100
ROOM = 20_000  # experiences added while measuring
UNSAVED = 2_000  # of them since the last save, at most, before the kill
# Share of the box of time that each may use.
SHARES = {
    "expbuf": 10.0,
    "raw memory": 1.0,
    "FAISS IVF": 4.0,
    "FAISS HNSW": 2.0,
    "usearch": 2.0,
    "sqlite-vec": 1.0,
    "cpprb": 1.0,
    "TorchRL": 1.0,
    "tianshou": 1.0,
}
METRICS = {
    "load": ("store in the quickest way", "experiences/s"),
    "build": ("build the index", "s"),
    "add": ("add, p50", "µs"),
    "search": ("search, p50", "µs"),
    "recall": ("recall", f"at {K}"),
    "sample": (f"sample {BATCH}, p50", "µs"),
    "update": (f"update {BATCH}, p50", "µs"),
    "step": (f"update and sample {BATCH}, p50", "µs"),
    "save": ("save (a snapshot)", "s"),
    "open": ("open after a clean close", "s"),
    "recover": ("open after a kill", "s"),
    "memory": ("private memory of a process", "bytes each"),
    "disk": ("disk", "bytes each"),
}


def _available_bytes() -> int:
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 1 << 62


def _foretold(last: tuple[int, float], n: int) -> float:
    """Seconds at the next size: in proportion, and a quarter more for what grows faster."""
    size, took = last
    return 1.25 * took * n / size if size else 0.0


class Ladder:
    """One contender's climb through the sizes."""

    def __init__(self, report: Report, arguments: argparse.Namespace, name: str) -> None:
        self._report, self._arguments, self._name = report, arguments, name
        total = sum(SHARES.values())
        self._left = arguments.budget * SHARES[name] / total
        self._last: tuple[int, float] | None = None
        self._built: tuple[int, float] = (0, 0.0)
        self._least = 0.0

    def may_climb(self, n: int) -> bool:
        """Whether the next size fits the time and the memory that are left."""
        needed = 4 * n * (DIM + 16) * 4
        if needed > _available_bytes():
            self._report.skip(self._name, f"{n:,}: about {needed >> 30} GiB of memory needed")
            return False
        if self._last is not None:
            # What the smallest size took is for starting processes, and does not grow.
            size, took = self._last
            foretold = self._least + _foretold((size, took - self._least), n)
            if self._may_build(n):
                foretold += _foretold(self._built, n)
            if foretold > self._left:
                self._report.skip(
                    self._name,
                    f"{n:,}: would take about {foretold:.0f} s of {max(0.0, self._left):.0f} left",
                )
                return False
        return True

    def _may_build(self, n: int) -> bool:
        """Whether there is time for an index; without one there is still much to measure."""
        return bool(_foretold(self._built, n) < 0.6 * self._left)

    def climb(self, folder: Path, data: Path, n: int) -> bool:
        """Measure one size. Returns False where the contender has failed."""
        started = time.perf_counter()
        try:
            self._measure(folder, data, n)
        except PeerFailed as exc:
            self._report.skip(self._name, f"{n:,}: {exc}")
            return False
        took = time.perf_counter() - started
        self._left -= took
        size, built = self._built
        self._last = (n, took - built if size == n else took)
        self._least = min(self._least or self._last[1], self._last[1])
        return True

    def _measure(self, folder: Path, data: Path, n: int) -> None:
        repetitions = self._arguments.repetitions
        limit = max(60.0, 2 * self._left)
        clients: list[Client] = []

        def fresh(replay: bool | None = None) -> tuple[Client, Any]:
            client = Client(self._name, self._arguments.peers_python, folder / "log")
            clients.append(client)
            if replay is not None:
                warm_up(client, folder / "warm", data, replay=replay)
            return client, client(
                "open",
                folder=str(folder / "store"),
                data=str(data),
                capacity=n + ROOM,
                first_key=n if replay is None else n + ROOM - UNSAVED,
                timeout_s=limit,
            )

        try:
            folder.mkdir(parents=True)
            client, _ = fresh()
            loaded = client("load", n=n, timeout_s=limit)
            self._add("load", n, [n / loaded])
            searches = self._offered(lambda: client("search", seconds=1, most=1, timeout_s=limit))
            if searches and not self._may_build(n):
                about = _foretold(self._built, n)
                self._report.skip(self._name, f"{n:,}: an index would take about {about:.0f} s")
                searches = False
            if searches:
                built = client("ready", timeout_s=limit)
                if built["what"]:
                    self._add("build", n, [built["seconds"]])
                    self._built = (n, built["seconds"])
                    print(f"  {built['what']}")
                self._add("recall", n, [client("recall", timeout_s=limit)])
                self._repeat(client, "search", n, repetitions, "p50", 1e3, seconds=0.5, most=2000)
            self._repeat(client, "sample", n, repetitions, "p50", 1, seconds=0.4, most=2000)
            for do in ("update", "step"):
                self._repeat(client, do, n, repetitions, "p50", 1, seconds=0.3, most=2000, rows=n)
            saves = self._offered(lambda: self._add("save", n, [client("save", timeout_s=limit)]))
            self._repeat(
                client,
                "add",
                n,
                repetitions,
                "p50",
                1e3,
                seconds=0.4,
                most=ROOM // (2 * repetitions),
            )
            if saves:
                self._offered(lambda: client("save", timeout_s=limit))
            client.stop()
            size = disk_bytes(folder / "store")
            if size:
                self._add("disk", n, [size / n])
                with suppress(NotOffered):  # neither searched nor sampled at this size
                    self._reopen(fresh, n, searches)
        finally:
            for client in clients:
                client.stop()

    def _reopen(self, fresh: Callable[..., tuple[Client, Any]], n: int, searches: bool) -> None:
        client, facts = fresh(not searches)
        opened = facts["opened"] + client("first_use", replay=not searches)["first"]
        self._add("open", n, [opened])
        used = client("private", replay=not searches) - facts["private_before"]
        self._add("memory", n, [max(1.0, used / n)])
        # What is left to recover: these, where adds are durable.
        self._offered(lambda: client("add", seconds=2, most=UNSAVED))
        client.kill()
        client.stop()
        client, facts = fresh(not searches)
        again = facts["opened"] + client("first_use", replay=not searches)["first"]
        self._add("recover", n, [again])
        client.stop()

    def _repeat(
        self,
        client: Client,
        do: str,
        n: int,
        repetitions: int,
        key: str,
        factor: float,
        **arguments: Any,
    ) -> None:
        try:
            values = [client(do, **arguments)[key] * factor for _ in range(repetitions)]
        except NotOffered:
            return
        self._add(do, n, values)

    @staticmethod
    def _offered(call: Callable[[], Any]) -> bool:
        try:
            call()
        except NotOffered:
            return False
        return True

    def _add(self, metric: str, n: int, values: Sequence[float]) -> None:
        title, unit = METRICS[metric]
        self._report.add(
            f"{title}: {self._name}, {n:,}",
            values,
            unit,
            tags={"metric": f"scale.{metric}", "contender": self._name, "n": n},
        )


def scaling(report: Report, arguments: argparse.Namespace) -> None:
    """All contenders at each size, from small to large."""
    sizes = [int(size) for size in arguments.sizes.split(",")]
    ladders = {name: Ladder(report, arguments, name) for name in SHARES}
    texts = [text[:TEXT_BYTES] for text in passages(1000, arguments.seed)]
    for n in sizes:
        report.group(
            f"{n:,} experiences",
            f"{DIM} float32, {INTRINSIC} of them intrinsic, and {TEXT_BYTES} bytes of text each",
        )
        if not ladders:
            break
        with scratch(arguments) as folder:
            data = clusters(n + ROOM, 200, arguments.seed, dim=DIM, intrinsic=INTRINSIC)
            lay_out(folder / "data", data, n, texts)
            del data
            for name in list(ladders):
                there = folder / name.replace(" ", "-")
                if not (
                    ladders[name].may_climb(n) and ladders[name].climb(there, folder / "data", n)
                ):
                    del ladders[name]
                for path in sorted(there.rglob("*"), reverse=True):  # room for the next one
                    path.rmdir() if path.is_dir() else path.unlink()


def main() -> None:
    made = parser("How each cost grows with the number of experiences.")
    made.add_argument("--sizes", default="", help="default: 10 thousand to 10 million")
    made.add_argument("--budget", type=float, default=0, help="seconds for all; default: 720")
    made.add_argument("--peers-python", type=Path, default=HERE / ".venv-peers" / "bin" / "python")
    arguments = made.parse_args()
    arguments.repetitions = arguments.repetitions or (3 if arguments.quick else 5)
    arguments.budget = arguments.budget or (30 if arguments.quick else 720)
    arguments.sizes = arguments.sizes or (
        "3000,10000,30000,100000" if arguments.quick else "10000,100000,1000000,10000000"
    )
    run_groups(Report("scaling", arguments), [scaling])


if __name__ == "__main__":
    main()
