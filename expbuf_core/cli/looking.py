"""`info`, `top`, `report`: what a buffer holds and how it fares. They disturb nobody."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from expbuf_core.cli import output
from expbuf_core.cli.arguments import positive, seconds

if TYPE_CHECKING:
    from expbuf_core.inspection import Tick


def add_to(commands: Any) -> None:
    """Add these commands to the parser."""
    info = commands.add_parser("info", help="what a buffer holds, its lag, who has it open")
    info.add_argument("folder")
    info.add_argument("--json", action="store_true", help="for programs")
    info.set_defaults(run=_info)

    top = commands.add_parser("top", help="what happens in a buffer right now")
    top.add_argument("folder")
    top.add_argument("--interval", type=seconds, default=1.0, metavar="S", help="default: 1")
    top.add_argument("--count", type=positive, metavar="N", help="end after so many lines")
    top.add_argument("--search", action="store_true", help="measure a search at each line, too")
    top.add_argument("--json", action="store_true", help="for programs: one line of JSON each")
    top.set_defaults(run=_top)

    report = commands.add_parser("report", help="what it holds and how it fares, as an HTML page")
    report.add_argument("folder")
    report.add_argument("--output", metavar="FILE", help="default: FOLDER.html")
    report.add_argument("--points", type=positive, metavar="N", help="most on the map")
    report.add_argument("--config", metavar="FILE", help="a YAML file: how sampling is configured")
    report.add_argument("--open", action="store_true", help="in the browser")
    report.add_argument("--json", action="store_true", help="for programs")
    report.set_defaults(run=_report)


# ---------------------------------------------------------------- info


def _info(options: argparse.Namespace) -> int:
    from expbuf_core.inspection import inspect

    facts = inspect(options.folder)
    if options.json:
        output.print_json(facts)
    else:
        output.pairs(_shown(facts))
    return 3 if "damage" in facts else 0


def _shown(facts: dict[str, Any]) -> list[tuple[str, Any]]:
    """What `info` says of it, from the most to the least urgent."""
    shown: list[tuple[str, Any]] = [("folder", facts["path"])]
    if "damage" in facts:
        shown.append(("DAMAGE", facts["damage"]))
    if "experiences" in facts:
        share = 100 * facts["experiences"] / facts["max_size"]
        settings, lag = facts["settings"], facts["lag"]
        fusion = settings["fusion"]["name"]
        shown += [
            ("experiences", f"{facts['experiences']} of {facts['max_size']} ({share:.0f} %)"),
            ("added ever", facts["total_added"]),
            ("rewards known", facts["rewards_known"]),
            ("mean reward", facts["mean_reward"]),
            ("retrievals", f"{facts['retrievals']}, successes {facts['successes']:g}"),
            (
                "embeddings",
                f"v {settings['v_dim']}, q {settings['q_dim']}, {settings['metric']}, {fusion}",
            ),
            ("lsn", f"{facts['lsn']}, {lag['unsynced_operations']} operations not on disk yet"),
            ("opening", facts["recovery"]),
        ]
    if "backend" in facts:
        shown.append(("storage", f"{facts['backend']}, uuid {facts['uuid']}"))
    sizes = facts["bytes"]
    shown.append(("disk", ", ".join(f"{kind} {output.size(n)}" for kind, n in sizes.items())))
    for snapshot in facts["snapshots"]:
        age, size = output.duration(snapshot["age_s"]), output.size(snapshot["bytes"])
        shown.append(("snapshot", f"lsn {snapshot['lsn']}, {size}, {age} old"))
    if "lag" in facts:
        shown.append(("snapshot lag", f"{facts['lag']['snapshot_operations']} operations"))
    index = facts["index"]
    for segment in index["segments"]:
        size = output.size(segment["bytes"])
        shown.append(
            (
                "index",
                f"segment {segment['name']}: {segment['backend']}, {segment['rows']} rows, {size}",
            )
        )
    if "tail_rows" in index:
        text = f"{index['tail_rows']} rows searched exactly; {index['dead_rows']} dead in segments"
        shown.append(("index tail", text))
    building = index["building_pid"]
    shown.append(("index builder", "idle" if building is None else f"process {building}"))
    if index.get("builder_failures"):
        shown.append(("BUILDER FAILED", f"{index['builder_failures']} times since it was opened"))
    if facts.get("log_retirements"):
        shown.append(("LOGS GIVEN UP", f"{facts['log_retirements']} since it was opened"))
    for process in facts["open_by"]:
        locks = f"; holds {', '.join(process['locks'])}" if process["locks"] else ""
        text = f"process {process['pid']}{locks}: {process['command']}"
        shown.append(("open", output.shortened(text, 160)))
    if not facts["open_by"]:
        shown.append(("open", "nobody has it open for writing"))
    return shown


# ---------------------------------------------------------------- top

# The most important first: a terminal that is too narrow shows only those that fit.
_COLUMNS = (
    ("time", 8), ("experiences", 11), ("adds/s", 8), ("sync ms", 8), ("read ms", 8),
    ("search ms", 9), ("tail rows", 9), ("open by", 7), ("building", 8), ("retrieved/s", 11),
    ("right/s", 8), ("evicted/s", 9), ("ops/s", 8), ("unsynced", 8), ("log behind", 10),
)  # fmt: skip


def _top(options: argparse.Namespace) -> int:
    from expbuf_core.inspection import Watch

    with contextlib.ExitStack() as stack:
        watch = stack.enter_context(Watch(options.folder, searches=options.search))
        console = None if options.json else output.terminal()
        live: Any = None
        if console is not None:
            from rich.live import Live

            live = stack.enter_context(Live(console=console, auto_refresh=False))
        elif not options.json:
            print(" ".join(name.rjust(width) for name, width in _COLUMNS), flush=True)
        lines: list[list[str]] = []
        for _ in itertools.count() if options.count is None else range(options.count):
            tick = watch.tick(options.interval)
            if options.json:
                output.print_json(tick)
                continue
            lines.append(_line(tick))
            if live is None or console is None:
                columns = zip(lines[-1], _COLUMNS, strict=True)
                print(" ".join(cell.rjust(width) for cell, (_, width) in columns), flush=True)
            else:
                lines = lines[-20:]
                live.update(_drawn(options.folder, lines, console.width), refresh=True)
    return 0


def _line(tick: Tick) -> list[str]:
    def ms(value: float | None) -> str:
        return "-" if value is None else f"{value:.2f}"

    return [
        time.strftime("%H:%M:%S"), str(tick.experiences), f"{tick.adds:.1f}",
        ms(tick.sync_wait_ms), ms(tick.read_ms), ms(tick.search_ms), str(tick.index_rows),
        str(tick.processes), output.plain(tick.building_pid), f"{tick.retrievals:.1f}",
        f"{tick.successes:.1f}", f"{tick.evictions:.1f}", f"{tick.operations:.1f}",
        f"{tick.unsynced:.1f}", str(tick.snapshot_operations),
    ]  # fmt: skip


def _drawn(folder: str, lines: list[list[str]], width: int) -> Any:
    from rich.table import Table

    ends = list(itertools.accumulate(each + 1 for _, each in _COLUMNS))
    shown = max(1, sum(end <= width for end in ends))
    table = Table(title=folder, box=None, header_style="bold", pad_edge=False, padding=(0, 1, 0, 0))
    for name, each in _COLUMNS[:shown]:
        table.add_column(name, justify="right", no_wrap=True, min_width=each)
    for line in lines:
        table.add_row(*line[:shown])
    return table


# ---------------------------------------------------------------- report


def _report(options: argparse.Namespace) -> int:
    from expbuf_core.report import write_report

    target = options.output or f"{Path(options.folder).resolve()}.html"
    points = {} if options.points is None else {"points": options.points}
    page = write_report(options.folder, target, config=options.config, **points)
    if options.json:
        output.print_json({"page": page})
    else:
        print(page)
    if options.open:
        import webbrowser

        webbrowser.open(page.resolve().as_uri())
    return 0
