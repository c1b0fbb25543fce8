"""All benchmarks, one after the other, and what is made of them.

    python -m benchmarks --quick
    python -m benchmarks --publish

Each suite runs in a process of its own with a limit of time, so the whole has an end: a suite that
is told to stop reports what it has. `--publish` keeps the figures in benchmarks/results.json, and
draws and writes docs/benchmarks.md anew.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks import document
from benchmarks.results import Results

HERE = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Suite:
    """One suite and its limits in seconds, of the complete run and of the quick one.

    Attributes:
        module: To run with `python -m`.
        limit: After which it is told to stop; 0: not in that run.
        box: After which a comparison makes no more repetitions.
        quick_groups: Its groups in the quick run; "" for all.
    """

    module: str
    limit: tuple[int, int]
    box: tuple[int, int]
    quick_groups: str = ""


SUITES = {
    "peers": Suite("benchmarks.peers", (2100, 185), (45, 10)),
    "scaling": Suite("benchmarks.scaling", (1020, 30), (0, 0)),
    "storage": Suite(
        "benchmarks.storage", (420, 35), (40, 8), "machine_limits,single_adds,batches,writers"
    ),
    "search": Suite("benchmarks.search", (780, 0), (60, 0)),
    "sampling": Suite("benchmarks.sampling", (480, 30), (40, 6)),
    "backends": Suite("benchmarks.backends", (150, 0), (20, 0)),
}


def run(name: str, suite: Suite, arguments: argparse.Namespace) -> str:
    """Run one suite. Returns how it went, in a word or two."""
    which = 1 if arguments.quick else 0
    limit = suite.limit[which]
    output: Path = arguments.output
    (output / f"{name}.json").unlink(missing_ok=True)
    if not limit:
        return "not in the quick run"
    command = [sys.executable, "-m", suite.module, "--json", str(output / f"{name}.json")]
    command += ["--seed", str(arguments.seed), "--folder", str(arguments.folder)]
    command += ["--box", str(suite.box[which])]
    if arguments.quick:
        command += ["--quick", "--only", suite.quick_groups]
    if name in ("peers", "scaling", "sampling"):
        command += ["--peers-python", str(arguments.peers_python)]
    if name == "scaling":
        command += ["--budget", str(0.8 * limit)]
    started = time.monotonic()
    process = subprocess.Popen(command, cwd=HERE)
    try:
        code = process.wait(limit)
    except subprocess.TimeoutExpired:
        # The suite cleans up, and writes what it has.
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        return f"cut short after {limit} s"
    took = time.monotonic() - started
    return f"{took:.0f} s" if code == 0 else f"failed with exit status {code} after {took:.0f} s"


def main() -> int:
    made = argparse.ArgumentParser(description="All benchmarks.")
    made.add_argument("--quick", action="store_true", help="smaller sizes; under five minutes")
    made.add_argument("--only", default="", help=f"suites: {','.join(SUITES)}")
    made.add_argument("--output", type=Path, default=HERE / "benchmark_output")
    made.add_argument("--folder", type=Path, default=Path(os.environ.get("TMPDIR", "/tmp")))
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--peers-python", type=Path, default=HERE / ".venv-peers" / "bin" / "python")
    made.add_argument(
        "--publish", action="store_true", help="keep the figures, draw and write the page"
    )
    arguments = made.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    wanted = [name for name in arguments.only.split(",") if name] or list(SUITES)
    outcomes = {}
    for name in wanted:
        suite = SUITES[name]
        if importlib.util.find_spec(suite.module) is None:
            continue
        print(f"\n######## {name}", flush=True)
        outcomes[name] = run(name, suite, arguments)
    results = Results.gather(arguments.output)
    for name, outcome in outcomes.items():
        if name in results.suites:
            results.suites[name]["outcome"] = outcome
    if arguments.publish and document.KEPT.exists():
        # What else lies in the output folder may be of a quick run.
        results = Results.read(document.KEPT).replaced_by(results, outcomes)
    print("\n" + "\n".join(f"{name}: {outcome}" for name, outcome in outcomes.items()))
    kept = document.KEPT if arguments.publish else arguments.output / "results.json"
    results.write(kept)
    results = Results.read(kept)  # in the order of the file, as whoever makes the page from it
    images = HERE / "docs" / "images" if arguments.publish else arguments.output
    try:
        from benchmarks.plots import draw
    except ImportError as exc:
        print(f"no plots: {exc}")
    else:
        for stale in images.glob("bench-*.png"):
            stale.unlink()
        for path in draw(results, images):
            print(path)
    if arguments.publish:
        page = document.PAGE.read_text(encoding="utf-8")
        document.PAGE.write_text(document.filled(page, results), encoding="utf-8")
        print(document.PAGE)
    return int(any("failed" in outcome for outcome in outcomes.values()))


if __name__ == "__main__":
    sys.exit(main())
