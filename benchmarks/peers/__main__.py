"""expbuf beside its peers: storing, searching, replay, opening, kills.

    python -m benchmarks.peers --quick
    python -m benchmarks.peers --peers Chroma,LanceDB --only adds,search

Every peer runs in a process of its own and gets the same experiences: one embedding and 500 bytes
of text each. All are measured in turns, at their own durable setting where they have one; what each
promises is printed at the end. The physical reference is a plain file that the same bytes are
written to and synced; for searches FAISS on the same vectors; for replay numpy.
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import Report, in_turns, parser, run_groups, scratch, seconds
from benchmarks.data import KINDS, TEXT_BYTES, clusters, intrinsic_dimension, passages
from benchmarks.peers.base import BATCH, K, NotOffered
from benchmarks.peers.client import HERE, Client, PeerFailed, disk_bytes, lay_out, warm_up
from benchmarks.peers.crew import Crew, compare, of

STORES = (
    "raw log",
    "expbuf",
    "expbuf + builder",
    "expbuf, LMDB",
    "SQLite",
    "LMDB",
    "sqlite-vec",
    "Chroma",
    "LanceDB",
    "Qdrant local",
)
INDEXES = (
    "FAISS IVF",
    "FAISS HNSW",
    "raw memory",
    "expbuf",
    "expbuf + builder",
    "sqlite-vec",
    "Chroma",
    "LanceDB",
    "Qdrant local",
    "usearch",
)
REPLAY = ("raw memory", "expbuf", "expbuf, os", "expbuf, uncached", "cpprb", "TorchRL", "tianshou")
SAVERS = ("expbuf", "usearch", "FAISS HNSW", "cpprb", "TorchRL", "tianshou")
WRITERS = 8
ROOM = 1 << 16  # experiences that may be added while measuring


def _texts(arguments: argparse.Namespace) -> list[str]:
    return passages(1000, arguments.seed)


# ---------------------------------------------------------------- the machine


def physical(report: Report, arguments: argparse.Namespace) -> None:
    """What disk and memory allow, by themselves."""
    report.group("the machine", "one thread")
    source = np.ones(1 << 27, np.float32)
    target = np.zeros_like(source)
    copied = 2 * source.nbytes / 1e9  # read once, written once
    half = in_turns(
        {
            "copy": lambda: copied / seconds(lambda: np.copyto(target, source)),
            "read": lambda: source.nbytes / 1e9 / seconds(lambda: np.max(source)),
        },
        arguments.repetitions,
    )
    report.add("memory bandwidth, copy", half["copy"], "GB/s", tags={"metric": "memory.copy"})
    report.add("memory bandwidth, read", half["read"], "GB/s", tags={"metric": "memory.read"})


def promises(report: Report, arguments: argparse.Namespace) -> None:
    """What each peer that took part promises of an acknowledged write, and how it was set up."""
    report.group("what is promised", "by the documents and the source of each")
    for name, facts in report.extra.get("promises", {}).items():
        versions = ", ".join(f"{a} {b}" for a, b in facts["versions"].items())
        print(f"{name}{f' ({versions})' if versions else ''}: {facts['advice']}")
        print(f"    after a kill: {facts['survives_kill']}")
        print(f"    after a power loss: {facts['survives_power']}", flush=True)


# ---------------------------------------------------------------- storing


def adds(report: Report, arguments: argparse.Namespace) -> None:
    """One by one and in batches, each acknowledged when it is durable."""
    box, most, batches = (0.4, 1500, 20) if arguments.quick else (1.5, 5000, 100)
    with scratch(arguments) as folder:
        lay_out(folder / "data", clusters(20_000, 10, arguments.seed), 1000, _texts(arguments))
        with Crew(report, arguments, STORES, folder, capacity=1 << 20) as crew:
            crew.once("add", seconds=0.3, most=100)  # warm up
            crew.once("add_batches", seconds=0.3, most=2)
            report.group(
                "durable adds, one by one",
                f"384 float32 and {TEXT_BYTES} bytes of text each; one thread",
            )
            one = crew.turns(lambda name, peer: peer("add", seconds=box / 3, most=most), rounds=3)
            compare(report, "add.one", "adds", "adds/s", of(one, "rate"), physical="raw log")
            for key in ("p50", "p99"):
                compare(
                    report,
                    f"add.one.{key}",
                    f"add {key}",
                    "ms",
                    of(one, key),
                    physical="raw log",
                    better="lower",
                )
            compare(
                report,
                "add.one.cpu",
                "processor time of an add",
                "µs",
                of(one, "processor"),
                physical="raw log",
                better="lower",
            )
            report.group(f"durable batches of {BATCH}", "one commit a batch")
            many = crew.turns(
                lambda name, peer: peer("add_batches", seconds=box / 3, most=batches), rounds=3
            )
            compare(
                report,
                "add.batch",
                f"batches of {BATCH}",
                "experiences/s",
                of(many, "rate"),
                physical="raw log",
            )
            crew.stop_all()


def writers(report: Report, arguments: argparse.Namespace) -> None:
    """Eight at once: processes where a peer allows them, else threads."""
    box = 0.5 if arguments.quick else 1.5
    report.group(
        f"{WRITERS} writers",
        "single adds to one folder; processes where the peer allows them, else threads of one",
    )
    names = [name for name in STORES if name not in ("expbuf + builder",)]
    rates: dict[str, list[float]] = {}
    with scratch(arguments) as folder:
        lay_out(folder / "data", clusters(20_000, 10, arguments.seed), 1000, _texts(arguments))
        with Crew(report, arguments, names, folder, capacity=1 << 24) as crew:
            for name in list(crew.clients):
                if crew.facts[name]["writers"] == "none":
                    crew.dismiss(name, "one process, one thread")
            crew.once("add", seconds=0.2, most=50)
            others: dict[str, list[Client]] = {}
            try:
                for name in crew.clients:
                    if crew.facts[name]["writers"] == "processes":
                        others[name] = []
                        for i in range(1, WRITERS):
                            client = crew.fresh(name)
                            others[name].append(client)
                            crew.open(client, crew.folder_of(name), first_key=i << 20)

                def measure(name: str, peer: Client) -> float:
                    if name not in others:
                        done = peer("add_threads", seconds=box, threads=WRITERS)
                        return float(done["rate"])
                    everybody = [peer, *others[name]]
                    for client in everybody:
                        client.send("add", seconds=box, most=1 << 20)
                    answers = [client.answer(60 + 10 * box) for client in everybody]
                    return float(sum(answer["added"] for answer in answers) / box)

                rates = crew.turns(measure)
            finally:
                for clients in others.values():
                    for client in clients:
                        client.stop()
            ways = {name: crew.facts[name]["writers"] for name in rates}
            crew.stop_all()
    for way in ("processes", "threads"):
        some = {name: values for name, values in rates.items() if ways[name] == way}
        if way == "threads" and some:
            some = {"expbuf": rates["expbuf"], **some} if "expbuf" in rates else some
        compare(
            report,
            f"add.writers.{way}",
            f"{WRITERS} writers" + (" (threads)" if way == "threads" else ""),
            "adds/s",
            some,
            physical="raw log",
            tags={"way": way},
        )


# ---------------------------------------------------------------- searching


def search(report: Report, arguments: argparse.Namespace) -> None:
    """Load, build, search; search beside a writer and beside a rebuild; open again."""
    n = 20_000 if arguments.quick else 50_000
    box, most = (0.4, 1000) if arguments.quick else (1.5, 4000)
    names = list(INDEXES)
    with scratch(arguments) as folder:
        data = clusters(n + ROOM, 1000, arguments.seed)
        lay_out(folder / "data", data, n, _texts(arguments))
        if arguments.quick:
            names.remove("Qdrant local")
            report.group(f"search of {n:,}")
            report.skip("Qdrant local", "storing takes longer than the quick run has")
        with Crew(report, arguments, names, folder, capacity=n + 2 * ROOM) as crew:
            _load_and_search(report, crew, n, box, most)
            _beside_writer(report, crew, box)
            _beside_rebuild(report, crew, box)
            crew.once("save", timeout_s=300)
            counts = crew.once("count")
            names = crew.stop_all()
            _disk(report, crew, counts, n)
            _opening(report, arguments, crew, names, replay=False)


def _load_and_search(report: Report, crew: Crew, n: int, box: float, most: int) -> None:
    report.group(
        f"search of {n:,}",
        f"k = {K}; 384 dimensions, 32 of them intrinsic; recall against exact results; an effort "
        "that can be chosen is the least that reaches recall 0.95; one query at a time",
    )
    loaded = crew.once("load", n=n, timeout_s=300)
    built = crew.once("ready", timeout_s=300)
    for name, facts in built.items():
        print(f"  {name}: {facts['what'] or 'no index'}")
        report.extra.setdefault("search", {})[name] = facts["what"]
    together = {name: [loaded[name] + built[name]["seconds"]] for name in built if name in loaded}
    compare(
        report,
        "search.build",
        "store all and build",
        "s",
        together,
        physical="FAISS IVF",
        better="lower",
        tags={"n": n},
    )
    recalls = crew.once("recall")
    compare(
        report,
        "search.recall",
        "recall",
        f"at {K}",
        {name: [value] for name, value in recalls.items()},
        tags={"n": n},
    )
    crew.once("search", seconds=0.3, most=200)
    found = crew.turns(lambda name, peer: peer("search", seconds=box, most=most))
    for key in ("p50", "p99"):
        compare(
            report,
            f"search.{key}",
            f"search {key}",
            "ms",
            of(found, key),
            physical="FAISS IVF",
            better="lower",
            tags={"n": n},
        )


def _beside_writer(report: Report, crew: Crew, box: float) -> None:
    report.group(
        "search beside a writer",
        "another process adds one by one where the peer allows it, else another thread; fresh: "
        "whether the reader finds the last add once it was acknowledged",
    )
    fresh: dict[str, list[float]] = {}
    others: dict[str, Client] = {}
    behind: dict[str, int] = {}

    def measure(name: str, peer: Client) -> dict[str, Any]:
        peer("tidy")
        if crew.facts[name]["single"]:
            result = peer("search_beside_thread", seconds=box, work="add")
            return {**result, "rate": result["done"] / box}
        if name not in others:
            others[name] = crew.fresh(name)
            behind[name] = int(peer("count"))
            crew.open(others[name], crew.folder_of(name), first_key=behind[name])
        others[name].send("add", seconds=box, most=1 << 20)
        result = peer("search", seconds=box, most=1 << 30)
        written = others[name].answer(60)
        behind[name] += written["added"]
        fresh.setdefault(name, []).append(float(peer("finds", key=behind[name] - 1)))
        return {**result, "rate": written["rate"]}

    skip = {"raw memory", "FAISS IVF", "FAISS HNSW", "usearch"}
    names = [name for name in crew.clients if name not in skip]
    try:
        alone = crew.turns(
            lambda name, peer: peer("search", seconds=box / 2, most=1 << 30), names=names
        )
        beside = crew.turns(measure, names=names)
    finally:
        for client in others.values():
            client.stop()
    for key in ("p50", "p99"):
        compare(
            report,
            f"search.writer.{key}",
            f"beside a writer {key}",
            "ms",
            of(beside, key),
            better="lower",
            tags={
                "alone": {name: float(np.median([r[key] for r in alone[name]])) for name in alone}
            },
        )
    compare(report, "search.writer.rate", "adds meanwhile", "adds/s", of(beside, "rate"))
    compare(report, "search.fresh", "sees another process's add", "of 1", fresh)


def _beside_rebuild(report: Report, crew: Crew, box: float) -> None:
    report.group(
        "search beside a rebuild",
        "the whole index is built anew meanwhile, over and over: in another process at low "
        "priority where the peer allows it, else in another thread",
    )

    def measure(name: str, peer: Client) -> dict[str, Any]:
        if crew.facts[name]["single"]:
            return dict(peer("search_beside_thread", seconds=box, work="rebuild", timeout_s=200))
        other = crew.fresh(name)
        try:
            crew.open(other, crew.folder_of(name))
            other.send("rebuild", seconds=box)
            result = dict(peer("search", seconds=box, most=1 << 30))
            other.answer(200)
        finally:
            other.stop()
        return result

    names = [
        name for name in ("expbuf", "FAISS IVF", "FAISS HNSW", "LanceDB") if name in crew.clients
    ]
    beside = crew.turns(measure, names=names)
    for key in ("p50", "p99", "worst"):
        compare(
            report,
            f"search.rebuild.{key}",
            f"beside a rebuild {key}",
            "ms",
            of(beside, key),
            better="lower",
        )


def _disk(report: Report, crew: Crew, counts: dict[str, int], n: int) -> None:
    report.group("disk", "bytes that the file system gave, for each byte that the user handed over")
    payload = 4 * 384 + TEXT_BYTES
    sizes = {
        name: [disk_bytes(crew.folder_of(name)) / (count * payload)]
        for name, count in counts.items()
        if disk_bytes(crew.folder_of(name))
    }
    compare(report, "disk", "disk", "bytes a byte", sizes, better="lower", tags={"n": n})


def _opening(
    report: Report, arguments: argparse.Namespace, crew: Crew, names: list[str], *, replay: bool
) -> None:
    what = "the first sample" if replay else "the first result"
    report.group(
        f"opening, until {what}",
        "a fresh process, page cache warm, its libraries imported and used once before; memory: "
        "private dirty bytes that opening and some use added (mapped files are page cache)",
    )
    kind = "replay" if replay else "search"
    opened: dict[str, list[float]] = {name: [] for name in names}
    memory: dict[str, list[float]] = {name: [] for name in names}
    failed: dict[str, Exception] = {}

    def case(name: str) -> Callable[[], None]:
        def run() -> None:
            if name in failed:
                return
            client = crew.fresh(name)
            try:
                warm = crew.folder / "warm" / crew.folder_of(name).name
                warm_up(client, warm, crew.data, replay=replay)
                facts = crew.open(client, crew.folder_of(name))
                first = client("first_use", replay=replay)
                used = client("private", replay=replay)
                opened[name].append(facts["opened"] + first["first"])
                memory[name].append((used - facts["private_before"]) / 2**20)
            except (PeerFailed, NotOffered) as exc:
                failed[name] = exc
            finally:
                client.stop()

        return run

    skip = {"raw memory", "expbuf + builder"}
    in_turns(
        {name: case(name) for name in names if name not in skip},
        1 if arguments.quick else min(3, arguments.repetitions),
    )
    for name, exc in failed.items():
        report.skip(name, exc)
    compare(
        report,
        f"{kind}.open",
        "open",
        "s",
        {name: values for name, values in opened.items() if values and name not in failed},
        better="lower",
    )
    compare(
        report,
        f"{kind}.memory",
        "memory of a process",
        "MiB",
        {name: values for name, values in memory.items() if values and name not in failed},
        better="lower",
    )


def kinds(report: Report, arguments: argparse.Namespace) -> None:
    """The same search on other data: what is hard for an index is not its size alone."""
    n = 21_000 if arguments.quick else 40_000
    box, most = (0.4, 500) if arguments.quick else (1.0, 2000)
    names = ("FAISS IVF", "FAISS HNSW", "expbuf", "usearch")
    for kind, make in KINDS.items():
        try:
            data = make(n, 500, arguments.seed)
        except ImportError as exc:
            report.group(f"data: {kind}")
            report.skip(kind, exc)
            continue
        about = intrinsic_dimension(data.vectors)
        report.group(
            f"data: {kind}, {n:,}",
            f"{data.note}; {data.dim} dimensions, about {about:.0f} of them intrinsic as measured",
        )
        with scratch(arguments) as folder:
            lay_out(folder / "data", data, n, _texts(arguments))
            with Crew(report, arguments, names, folder, capacity=n + 1000) as crew:
                crew.once("load", n=n, timeout_s=300)
                built = crew.once("ready", timeout_s=300)
                recalls = crew.once("recall")
                crew.once("search", seconds=0.3, most=100)
                found = crew.turns(lambda name, peer: peer("search", seconds=box, most=most))
        tags = {"kind": kind, "n": n, "dim": data.dim, "intrinsic": round(about, 1)}
        report.extra[f"data: {kind}"] = {name: built[name]["what"] for name in built}
        compare(
            report,
            "kinds.recall",
            "recall",
            f"at {K}",
            {name: [value] for name, value in recalls.items()},
            tags=tags,
        )
        compare(
            report,
            "kinds.p50",
            "search p50",
            "ms",
            of(found, "p50"),
            physical="FAISS IVF",
            better="lower",
            tags=tags,
        )


# ---------------------------------------------------------------- replay


def replay(report: Report, arguments: argparse.Namespace) -> None:
    """Adding, drawing with data and weights, updating, saving, opening again."""
    n = 50_000 if arguments.quick else 200_000
    box, most = (0.3, 2000) if arguments.quick else (1.5, 10_000)
    with scratch(arguments) as folder:
        data = clusters(n, 10, arguments.seed, dim=64)
        lay_out(folder / "data", data, 1000, _texts(arguments))
        with Crew(report, arguments, REPLAY, folder, capacity=n + ROOM) as crew:
            report.group(
                f"replay of {n:,}",
                f"64 float32 each, batches of {BATCH}, one thread; what the peers add is gone with "
                "the process until they save",
            )
            loaded = crew.once("load", n=n, timeout_s=300)
            crew.once("ready", timeout_s=300)
            compare(
                report,
                "replay.load",
                "add all, the quickest way",
                "experiences/s",
                {name: [n / value] for name, value in loaded.items()},
                physical="raw memory",
                tags={"n": n},
            )
            crew.once("add", seconds=0.2, most=50)
            # Fewer than there is room for: in a full buffer each add also evicts.
            each = ROOM // (2 * arguments.repetitions)
            one = crew.turns(lambda name, peer: peer("add", seconds=box / 2, most=each))
            compare(
                report,
                "replay.add",
                "add one",
                "adds/s",
                of(one, "rate"),
                physical="raw memory",
                tags={"n": n},
            )
            for do, title, extra in (
                ("sample", f"sample {BATCH} with data and weights", {}),
                ("update", f"update {BATCH}", {"rows": n}),
                ("step", f"a learning step: update {BATCH} and sample {BATCH}", {"rows": n}),
            ):
                crew.once(do, seconds=0.2, most=100, **extra)
                done = crew.turns(
                    lambda name, peer, do=do, extra=extra: peer(  # type: ignore[misc]
                        do, seconds=box, most=most, **extra
                    )
                )
                for key in ("p50", "p99"):
                    compare(
                        report,
                        f"replay.{do}.{key}",
                        f"{title}, {key}",
                        "µs",
                        of(done, key),
                        physical="raw memory",
                        better="lower",
                        tags={"n": n},
                    )
            saved = crew.turns(
                lambda name, peer: {"seconds": peer("save", more=True, timeout_s=200)},
                quietly=True,
            )
            compare(
                report,
                "replay.save",
                "save a checkpoint (a snapshot)",
                "s",
                of(saved, "seconds"),
                better="lower",
                tags={"n": n},
            )
            names = crew.stop_all()
            _opening(report, arguments, crew, names, replay=True)


# ---------------------------------------------------------------- kills


def kills(report: Report, arguments: argparse.Namespace) -> None:
    """SIGKILL while adding, and while saving; what is there afterwards."""
    before = 2_000 if arguments.quick else 5_000
    box = 0.4 if arguments.quick else 1.0
    report.group(
        "killed while adding",
        f"{before:,} experiences, then single adds until SIGKILL; lost: acknowledged and not there "
        "afterwards",
    )
    lost: dict[str, list[float]] = {}
    took: dict[str, list[float]] = {}
    with scratch(arguments) as folder:
        lay_out(folder / "data", clusters(20_000, 10, arguments.seed), 1000, _texts(arguments))
        for repetition in range(1 if arguments.quick else min(2, arguments.repetitions)):
            names = [name for name in STORES if name not in ("raw log", "expbuf + builder")]
            with Crew(report, arguments, names, folder, capacity=1 << 20) as crew:
                crew.once("load", n=before)
                for name in list(crew.clients):
                    counter = folder / "counter"
                    counter.write_bytes(bytes(8))
                    client = crew.clients.pop(name)
                    client.send("add_until_killed", counter=str(counter))
                    time.sleep(box)
                    client.kill()
                    client.stop()
                    acknowledged = before + int(np.fromfile(counter, np.int64)[0])
                    other = crew.fresh(name)
                    try:
                        warm_up(other, folder / "warm" / name, crew.data, replay=False)
                        opened = crew.open(other, crew.folder_of(name))["opened"]
                        started = time.perf_counter()
                        there = int(other("count"))
                        opened += time.perf_counter() - started
                    except (PeerFailed, NotOffered) as exc:
                        report.skip(name, f"in repetition {repetition}: {exc}")
                        continue
                    finally:
                        other.stop()
                    lost.setdefault(name, []).append(max(0, acknowledged - there))
                    took.setdefault(name, []).append(opened)
            for name in names:
                shutil.rmtree(folder / crew.folder_of(name), ignore_errors=True)
    compare(report, "kill.lost", "lost", "experiences", lost, better="lower")
    compare(
        report,
        "kill.open",
        "open and recover",
        "s",
        took,
        better="lower",
        tags={"n": before},
    )
    _killed_while_saving(report, arguments)


def _killed_while_saving(report: Report, arguments: argparse.Namespace) -> None:
    n, times = 5_000, 2 if arguments.quick else 8
    report.group(
        "killed while saving",
        f"{n:,} experiences, saved once, then one more and saved, over and over until killed; bad: "
        "not all are there afterwards",
    )
    rng = np.random.default_rng(arguments.seed)
    bad: dict[str, list[float]] = {}
    with scratch(arguments) as folder:
        lay_out(folder / "data", clusters(n, 10, arguments.seed), n, _texts(arguments))
        with Crew(report, arguments, SAVERS, folder, capacity=2 * n) as crew:
            crew.once("load", n=n)
            took = {name: crew.clients[name]("save") for name in crew.clients}
            for name in crew.stop_all():
                for _ in range(times):
                    copy = folder / "copy"
                    shutil.rmtree(copy, ignore_errors=True)
                    shutil.copytree(crew.folder_of(name), copy)
                    client, other = crew.fresh(name), crew.fresh(name)
                    try:
                        crew.open(client, copy)
                        client.send("save_until_killed")
                        time.sleep(0.02 + float(rng.uniform(0, 3)) * took[name])
                        client.kill()
                        crew.open(other, copy)
                        whole = int(other("count")) >= n
                    except (PeerFailed, NotOffered) as exc:
                        print(f"  {name}: {exc}")
                        whole = False
                    finally:
                        client.stop()
                        other.stop()
                    bad.setdefault(name, []).append(float(not whole))
    values = {name: [float(np.sum(results))] for name, results in bad.items()}
    compare(
        report,
        "kill.saving",
        "bad",
        f"of {times} kills",
        values,
        better="lower",
        tags={"times": times},
    )


# The most wanted first: a run that is cut short lacks the last ones.
GROUPS = [physical, adds, writers, search, replay, kills, promises, kinds]


def main() -> None:
    made = parser("expbuf beside its peers.")
    made.add_argument("--peers", default="", help="only these: a,b; expbuf always takes part")
    made.add_argument(
        "--peers-python",
        type=Path,
        default=HERE / ".venv-peers" / "bin" / "python",
        help="the interpreter that has the peers (make bench-peers)",
    )
    arguments = made.parse_args()
    arguments.repetitions = arguments.repetitions or (2 if arguments.quick else 5)
    run_groups(Report("peers", arguments), GROUPS)


if __name__ == "__main__":
    main()
