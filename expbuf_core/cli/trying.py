"""`demo`, `bench`: seeing it work, and how fast it is here."""

from __future__ import annotations

import argparse
from typing import Any

from expbuf_core.cli import output
from expbuf_core.cli.arguments import natural, positive


def add_to(commands: Any) -> None:
    """Add these commands to the parser."""
    demo = commands.add_parser("demo", help="watch an agent learn, get killed, and go on")
    demo.add_argument("folder", nargs="?", help="a new one that is kept; default: none is")
    demo.add_argument("--questions", type=positive, default=1000, metavar="N", help="1000")
    demo.add_argument("--seed", type=natural, default=0)
    demo.add_argument("--json", action="store_true", help="for programs")
    demo.set_defaults(run=_demo)

    bench = commands.add_parser("bench", help="how fast a buffer is on this disk")
    bench.add_argument("folder", nargs="?", default=".", help="on that disk; default: here")
    bench.add_argument("--experiences", type=positive, default=20_000, metavar="N", help="20000")
    bench.add_argument("--dim", type=positive, default=256, help="of both embeddings; 256")
    bench.add_argument("--config", metavar="FILE", help="a YAML file: backends, durability")
    bench.add_argument("--json", action="store_true", help="for programs")
    bench.set_defaults(run=_bench, interrupted="what it wrote is removed")


def _demo(options: argparse.Namespace) -> int:
    from expbuf_core.demo import run

    with output.progress("asking") as progress:
        report = run(options.folder, options.questions, seed=options.seed, progress=progress)
    if options.json:
        output.print_json(report._asdict())
    else:
        print(report)
    return 0 if report.lost == 0 else 3


def _bench(options: argparse.Namespace) -> int:
    from expbuf_core.measuring import measure

    with output.progress("measuring") as progress:
        found = measure(
            options.folder,
            experiences=options.experiences,
            dim=options.dim,
            config=options.config,
            progress=progress,
        )
    if options.json:
        output.print_json(found)
    else:
        output.table(
            ["what", "a second", "median ms", "99 % ms", "note"],
            [[m.what, round(m.per_second), m.median_ms, m.p99_ms, m.note or ""] for m in found],
        )
    return 0
