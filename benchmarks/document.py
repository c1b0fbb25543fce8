"""Writes the tables of docs/benchmarks.md from the figures, so that the two cannot drift apart.

    python -m benchmarks.document            # anew from benchmarks/results.json
    python -m benchmarks.document --check    # fails where the page is not what the figures say

The prose of the page is written by hand and names no figures; what stands between
`<!-- figures: NAME -->` and `<!-- end -->` is made here.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from benchmarks.results import Figure, Results

HERE = Path(__file__).resolve().parents[1]
PAGE = HERE / "docs" / "benchmarks.md"
KEPT = HERE / "benchmarks" / "results.json"
_BLOCK = re.compile(r"(<!-- figures: ([a-z-]+) -->\n).*?(<!-- end -->)", re.DOTALL)

# A loss smaller than this is not told from noise.
MARGIN = 1.05
# Why expbuf loses, by the beginning of the metric; the longest that fits counts.
WHY = {
    "add.one": "An add is checked, scored, fused, numbered and written to two logs; a bare store "
    "takes the bytes as they are",
    "add.batch": "As with single adds; and every vector is written twice, as given and fused",
    "add.writers": "The processes share one fsync, but each add takes the append lock and "
    "processor time",
    "search.p50": "A search returns experiences that are pinned, with receipt and success rates, "
    "after looking for news in the log and searching the tail; a bare index returns numbers",
    "search.p99": "As the median",
    "search.build": "Storing durably is part of it, as is finding the effort that reaches the "
    "recall",
    "search.recall": "The effort is calibrated to the target, not beyond it",
    "search.writer": "The reader applies what the writer logged before it answers, and searches "
    "the new rows exactly",
    "search.rebuild": "The builder is a process of its own and takes its share of the processor "
    "and of the disk; an index in memory is built anew without touching the disk",
    "search.open": "Opening takes locks, looks for what is in the log, reads the columns and "
    "verifies the checksums of the segments",
    "search.memory": "The columns of all experiences, and the vectors of the tail, are in memory",
    "disk": "Vectors lie on disk three times until two snapshots have been taken: as given in the "
    "data log, fused in the index log and in the segment; and the room of each log file is "
    "reserved in advance, twice as large as the last one",
    "kinds": "As with the search above; the effort is calibrated to the target, not beyond it",
    "replay.load": "Each batch is logged and synced; the peers copy into an array",
    "replay.add": "Each add is logged (and synced, but for `os`); the peers lose it with the "
    "process",
    "replay.sample": "Data are read from the log where the peers gather rows of an array",
    "replay.update": "Updates are logged (and synced, but for `os`) before they are applied",
    "replay.step": "Updates are logged (and synced, but for `os`), and data are read from the log",
    "replay.save": "A snapshot is synced and verified; the peers' files are neither",
    "replay.open": "Opening takes locks and looks for what is in the log",
    "replay.memory": "The columns of all experiences and their vectors are in memory until a build",
    "kill.open": "Recovery replays the log, checks every frame and begins a new file",
}
_UNCOMPARED = ("raw log", "raw memory")


def number(value: float) -> str:
    """Three digits, and a comma between thousands."""
    if value == 0:
        return "0"
    if abs(value) >= 1000:
        digits = len(str(int(abs(value)))) - 3
        return f"{round(value, -digits):,.0f}"
    return f"{value:.3g}"


def spread(figure: Figure) -> str:
    if figure.count == 1:
        return number(figure.median)
    return f"{number(figure.median)} ({number(figure.low)}–{number(figure.high)})"


def times(ratio: float) -> str:
    return f"{number(ratio)} ×"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join(lines)


def _bold(name: str) -> str:
    return f"**{name}**" if name == "expbuf" else name


def _compared(results: Results, *columns: tuple[str, str], physical: str = "") -> str:
    """Contenders by row; for each metric the figure, and how it relates to the reference."""
    by_metric = {metric: results.by_contender(metric) for metric, _ in columns}
    names = list(dict.fromkeys(name for found in by_metric.values() for name in found))
    if not names:
        return "*Not measured in this run.*"
    head = [""]
    for metric, title in columns:
        found = by_metric[metric]
        unit = next(iter(found.values())).unit if found else ""
        head.append(f"{title}, {unit}" if unit else title)
        if physical:
            head.append(f"× {physical}")
    rows = []
    for name in names:
        cells = [_bold(name)]
        for metric, _ in columns:
            figure = by_metric[metric].get(name)
            cells.append(spread(figure) if figure else "–")
            if physical:
                ratio = figure.ratio if figure and figure.reference == physical else None
                cells.append(number(ratio) if ratio is not None else "–")
        rows.append(cells)
    return table(head, rows)


# ---------------------------------------------------------------- the blocks of the page


_MACHINE = ("processor", "memory", "system")


def machine(results: Results) -> str:
    lines: list[str] = []
    first: dict[str, str] = {}
    for name, suite in results.suites.items():
        facts = suite["machine"]
        if not lines:
            first = facts
            lines += [f"- {key}: {facts[key]}" for key in (*_MACHINE, "versions")]
        elsewhere = [facts[key] for key in _MACHINE if facts[key] != first[key]]
        where = f"on another machine ({'; '.join(elsewhere)}), " if elsewhere else ""
        size = "quick sizes" if suite["quick"] else "full sizes"
        lines.append(
            f"- {name}: {where}{facts['date']}, {size}, seed {suite['seed']}, "
            f"{suite.get('repetitions', '?')} repetitions, {suite.get('seconds', 0):.0f} s; load "
            f"average at the start {facts['load average']}"
        )
    for key, title in (("memory.copy", "copied"), ("memory.read", "read")):
        for figure in results.figures(key):
            lines.append(f"- memory {title} by one thread at {spread(figure)} {figure.unit}")
    return "\n".join(lines)


def promises(results: Results) -> str:
    facts = results.suites.get("peers", {}).get("extra", {}).get("promises", {})
    rows = [
        (
            _bold(name),
            ", ".join(f"{a} {b}" for a, b in fact["versions"].items()) or "–",
            fact["survives_kill"],
            fact["survives_power"],
            fact["writers"],
            fact["advice"],
        )
        for name, fact in facts.items()
    ]
    head = ("", "versions", "left after a kill", "left after a power loss", "writers", "set up")
    return table(head, rows) if rows else "*Not measured in this run.*"


def storing(results: Results) -> str:
    return _compared(
        results,
        ("add.one", "one by one"),
        ("add.batch", "batches of 256"),
        ("add.writers.processes", "8 processes"),
        ("add.writers.threads", "8 threads"),
        physical="raw log",
    )


def add_times(results: Results) -> str:
    return _compared(
        results,
        ("add.one.p50", "p50"),
        ("add.one.p99", "p99"),
        ("add.one.cpu", "processor time"),
    )


def searching(results: Results) -> str:
    return _compared(
        results,
        ("search.recall", "recall"),
        ("search.p50", "p50"),
        ("search.p99", "p99"),
        ("search.build", "store all and build"),
    )


def search_setups(results: Results) -> str:
    setups = results.suites.get("peers", {}).get("extra", {}).get("search", {})
    lines = [f"- {name}: {text or 'no index'}" for name, text in setups.items()]
    return "\n".join(lines) or "*Not measured in this run.*"


def disturbed(results: Results) -> str:
    return _compared(
        results,
        ("search.p99", "p99 alone"),
        ("search.writer.p50", "p50 beside a writer"),
        ("search.writer.p99", "p99 beside a writer"),
        ("search.writer.rate", "adds meanwhile"),
        ("search.fresh", "sees the other process's add"),
        ("search.rebuild.p99", "p99 beside a rebuild"),
        ("search.rebuild.worst", "worst beside a rebuild"),
    )


def kinds(results: Results) -> str:
    rows = []
    recalls = {
        (row.tags["kind"], row.tags["contender"]): row for row in results.figures("kinds.recall")
    }
    for row in results.figures("kinds.p50"):
        recall = recalls.get((row.tags["kind"], row.tags["contender"]))
        rows.append(
            (
                row.tags["kind"],
                str(row.tags["dim"]),
                str(row.tags["intrinsic"]),
                _bold(row.tags["contender"]),
                spread(row),
                number(recall.median) if recall else "–",
                results.suites[row.suite]["extra"]
                .get(f"data: {row.tags['kind']}", {})
                .get(row.tags["contender"], ""),
            )
        )
    head = ("data", "dimensions", "intrinsic", "", "p50, ms", "recall at 10", "index")
    return table(head, rows) if rows else "*Not measured in this run.*"


def replay(results: Results) -> str:
    return _compared(
        results,
        ("replay.sample.p50", "sample 256"),
        ("replay.update.p50", "update 256"),
        ("replay.step.p50", "update and sample"),
        ("replay.load", "add all"),
        ("replay.add", "add one"),
        ("replay.save", "save"),
        ("replay.open", "open"),
        ("replay.memory", "memory"),
    )


def folder(results: Results) -> str:
    return _compared(
        results,
        ("search.open", "open"),
        ("search.memory", "memory of a process"),
        ("disk", "disk"),
    )


def kills(results: Results) -> str:
    return _compared(
        results,
        ("kill.lost", "lost, killed while adding"),
        ("kill.open", "open afterwards"),
        ("kill.saving", "unusable, killed while saving"),
    )


def scaling(results: Results) -> str:
    rows = []
    for figure in results.figures(suite="scaling"):
        if figure.tags.get("contender") == "expbuf":
            rows.append(figure)
    metrics = list(dict.fromkeys(row.tags["metric"] for row in rows))
    sizes = sorted({row.tags["n"] for row in rows})
    if not rows:
        return "*Not measured in this run.*"
    there = {(row.tags["metric"], row.tags["n"]): row for row in rows}
    lines = []
    for metric in metrics:
        any_row = next(row for row in rows if row.tags["metric"] == metric)
        title = any_row.name.partition(": ")[0]
        cells = [spread(there[metric, n]) if (metric, n) in there else "–" for n in sizes]
        lines.append((f"{title}, {any_row.unit}", *cells))
    return table(("expbuf", *(f"{n:,}" for n in sizes)), lines)


def ended(results: Results) -> str:
    lines = [
        f"- {skip['name']}: {skip['why']}"
        for skip in results.suites.get("scaling", {}).get("skipped", [])
    ]
    return "\n".join(lines) or "*All climbed to the top.*"


def why(metric: str) -> str:
    fitting = [key for key in WHY if metric == key or metric.startswith(key)]
    return WHY[max(fitting, key=len)] if fitting else "not explained yet"


def _compared_with(results: Results) -> Iterator[tuple[str, str, Figure, float, bool]]:
    """Every peer's figure that stands beside one of expbuf's at its default setting.

    Yields:
        Metric; what was measured, in words; the peer's figure; how many times better than expbuf's
        it is (below 1: worse); whether the spreads of both overlap.
    """
    ours = {
        (row.group, row.tags["metric"]): row
        for row in results.figures()
        if row.tags.get("contender") == "expbuf" and "metric" in row.tags
    }
    for row in results.figures():
        ratio = row.against.get("expbuf")
        better = row.tags.get("better")
        name = row.tags.get("contender", "")
        if not ratio or name.startswith("expbuf") or name in _UNCOMPARED or better is None:
            continue
        metric = row.tags["metric"]
        title = row.name.partition(": ")[0]
        if metric.startswith(("replay.", "kill.")):
            title = f"{metric.partition('.')[0]}: {title}"
        if "kind" in row.tags:
            title += f" ({row.tags['kind']})"
        own = ours.get((row.group, metric))
        overlap = own is not None and row.low <= own.high and own.low <= row.high
        yield metric, title, row, ratio if better == "higher" else 1 / ratio, overlap


def _listed(found: Iterable[tuple[str, str, str]]) -> dict[tuple[str, str], list[str]]:
    merged: dict[tuple[str, str], list[str]] = {}
    for metric, title, text in found:
        merged.setdefault((metric, title), []).append(text)
    return merged


def losses(results: Results) -> str:
    """Every comparison in which a peer is ahead of expbuf, with the reason."""
    merged = _listed(
        (metric, title, f"{row.tags['contender']} {'≈ ' * overlap}{times(factor)}")
        for metric, title, row, factor, overlap in _compared_with(results)
        if factor >= MARGIN
    )
    if not merged:
        return "*Nowhere in this run.*"
    lines = [(title, ", ".join(who), why(metric)) for (metric, title), who in merged.items()]
    return table(("what", "ahead of expbuf, by", "why"), lines)


def wins(results: Results) -> str:
    """The same for those that are behind."""
    merged = _listed(
        (metric, title, f"{row.tags['contender']} {'≈ ' * overlap}{times(1 / factor)}")
        for metric, title, row, factor, overlap in _compared_with(results)
        if 1 / factor >= MARGIN
    )
    if not merged:
        return "*Nowhere in this run.*"
    lines = [(title, ", ".join(who)) for (_, title), who in merged.items()]
    return table(("what", "behind expbuf, by"), lines)


LIMITS = {
    "memory.touch": "Every byte that is stored for the first time needs a page of the page cache; "
    "a vector in the tail, memory. A raw log that begins anew needs none",
    "processor.two": "What eight processes can gain over one, where the processor and not the disk "
    "is what they wait for",
    "processor.loop": "Its inverse bounds the threads of one process, which share one interpreter",
    "processor.cold": "What an add takes besides the disk, when each is synced: caches and branch "
    "predictors have forgotten it meanwhile",
}


def limits(results: Results) -> str:
    """What the machine gives to any program."""
    rows = [
        (
            figure.name,
            f"{spread(figure)} {figure.unit}",
            f"{times(figure.ratio)} {figure.reference}" if figure.ratio is not None else "–",
            meaning,
        )
        for metric, meaning in LIMITS.items()
        for figure in results.figures(metric)
    ]
    head = ("what", "measured", "ratio", "what depends on it")
    return table(head, rows) if rows else "*Not measured in this run.*"


def targets(results: Results) -> str:
    rows = [
        (
            f"{row.group}: {row.name}",
            f"{spread(row)} {row.unit}",
            f"{times(row.ratio)} {row.reference}" if row.ratio is not None else "–",
            row.target,
            "–" if row.met is None else "yes" if row.met else "**no**",
        )
        for row in results.figures()
        if row.target
    ]
    return table(("what", "measured", "ratio", "target", "met"), rows) if rows else "*None.*"


def skipped(results: Results) -> str:
    lines = [
        f"- {suite}, {skip['group']}: {skip['name']}: {skip['why']}"
        for suite, document in results.suites.items()
        if suite != "scaling"
        for skip in document.get("skipped", [])
    ]
    return "\n".join(lines) or "*Nothing.*"


PICTURES = {
    "adds": "Durable adds by contender: one by one, in batches, and from eight writers",
    "search": "Recall against latency, and latency while others write or rebuild",
    "kinds": "Latency and recall on five kinds of data",
    "replay": "Drawing, updating, adding, saving and opening a replay buffer",
    "folder": "Opening, memory and disk",
    "scaling": "Every cost against the number of experiences",
}


def picture(name: str) -> Callable[[Results], str]:
    """A picture that `plots.draw` has drawn; without its figures there is none."""

    def made(results: Results) -> str:
        path = f"images/bench-{name}.png"
        return f"![{PICTURES[name]}]({path})" if (PAGE.parent / path).exists() else ""

    return made


BLOCKS: dict[str, Callable[[Results], str]] = {
    "machine": machine,
    "promises": promises,
    "storing": storing,
    "add-times": add_times,
    "searching": searching,
    "search-setups": search_setups,
    "disturbed": disturbed,
    "kinds": kinds,
    "replay": replay,
    "folder": folder,
    "kills": kills,
    "scaling": scaling,
    "ended": ended,
    "limits": limits,
    "losses": losses,
    "wins": wins,
    "targets": targets,
    "skipped": skipped,
    **{f"picture-{name}": picture(name) for name in PICTURES},
}


def filled(page: str, results: Results) -> str:
    """The page with every block made anew.

    Raises:
        KeyError: The page names a block that is not known.
    """

    def made(match: re.Match[str]) -> str:
        text = BLOCKS[match[2]](results)
        return match[1] + (f"{text}\n" if text else "") + match[3]

    return _BLOCK.sub(made, page)


def main() -> None:
    made = argparse.ArgumentParser(description="Write the tables of docs/benchmarks.md.")
    made.add_argument("--results", type=Path, default=KEPT)
    made.add_argument("--check", action="store_true", help="write nothing; fail where they differ")
    arguments = made.parse_args()
    page = PAGE.read_text(encoding="utf-8")
    text = filled(page, Results.read(arguments.results))
    if arguments.check:
        if text != page:
            sys.exit("docs/benchmarks.md is not what benchmarks/results.json says: make bench-docs")
        return
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
