"""Draws the figures of a run.

    python -m benchmarks.plots benchmark_output --to benchmark_output

Logarithmic scales, because what is compared differs by orders of magnitude; a bar or a point is the
median of the repetitions, a whisker reaches from the least to the greatest.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import FuncFormatter, NullFormatter

from benchmarks.results import Figure, Results

# Okabe and Ito's colours: told apart also by those who see fewer.
OURS, OURS_TOO, PHYSICAL, OTHERS = "#0072B2", "#56B4E9", "#8C8C8C", "#E69F00"
LINES = ("#D55E00", "#009E73", "#CC79A7", "#E69F00", "#8C510A", "#7570B3", "#666666", "#000000")
INK, SOFT, LINE = "#1F2328", "#6A7178", "#D9DDE1"
STYLE: Any = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "text.color": INK,
    "axes.edgecolor": LINE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "xtick.color": SOFT,
    "ytick.color": INK,
    "legend.frameon": False,
}
_PHYSICAL = ("raw log", "raw memory", "FAISS IVF", "FAISS HNSW")


def colour(name: str) -> str:
    if name == "expbuf":
        return OURS
    if name.startswith("expbuf"):
        return OURS_TOO
    return PHYSICAL if name in _PHYSICAL else OTHERS


def number(value: float) -> str:
    """A figure in few characters."""
    if value == 0:
        return "0"
    for size, suffix in ((1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{suffix}"
    return f"{value:.3g}"


_TICKS = FuncFormatter(lambda value, _: number(value))


def _canvas(width: float, height: float) -> Canvas:
    figure = Canvas(figsize=(width, height), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)  # draws without a display
    return figure


def _save(figure: Canvas, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, pil_kwargs={"optimize": True}, metadata={"Software": None})


def _whiskers(figures: Sequence[Figure]) -> Any:
    middle = np.array([figure.median for figure in figures])
    low = middle - np.array([figure.low for figure in figures])
    high = np.array([figure.high for figure in figures]) - middle
    return np.maximum([low, high], 0)


def bars(axes: Axes, results: Results, metric: str, title: str, better: str) -> bool:
    """Horizontal bars of all contenders, the best at the top. Returns whether there are any."""
    found = [figure for figure in results.figures(metric) if figure.median > 0]
    if not found:
        axes.set_visible(False)
        return False
    found.sort(key=lambda figure: figure.median, reverse=better == "lower")
    places = np.arange(len(found))
    middle = [figure.median for figure in found]
    names = [figure.tags["contender"] for figure in found]
    axes.barh(places, middle, color=[colour(name) for name in names], height=0.68)
    axes.errorbar(
        middle, places, xerr=_whiskers(found), fmt="none", ecolor=INK, elinewidth=1, capsize=2
    )
    axes.set_yticks(places, names)
    axes.set_ylim(-0.6, max(len(found), 5) - 0.4)  # few bars are no thicker
    axes.set_xscale("log")
    low, high = min(figure.low for figure in found), max(figure.high for figure in found)
    axes.set_xlim(max(low, 1e-9) / 2, high * 4)
    for place, figure in zip(places, found, strict=True):
        axes.annotate(
            number(figure.median),
            (max(figure.high, figure.median), place),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=7.5,
        )
    axes.grid(visible=False, axis="y")
    axes.xaxis.set_major_formatter(_TICKS)
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_title(f"{title} ({found[0].unit}; {better} is better)", wrap=True)
    return True


def _panels(
    results: Results, panels: Sequence[tuple[str, str, str]], columns: int, height: float
) -> Canvas | None:
    panels = [panel for panel in panels if any(True for _ in results.figures(panel[0]))]
    if not panels:
        return None
    rows = -(-len(panels) // columns)
    figure = _canvas(5.0 * columns, height * rows)
    axes = np.atleast_1d(figure.subplots(rows, columns)).ravel()
    for where, (metric, title, better) in zip(axes, panels, strict=False):
        bars(where, results, metric, title, better)
    for where in axes[len(panels) :]:
        where.set_visible(False)
    return figure


def adds(results: Results) -> Canvas | None:
    return _panels(
        results,
        [
            ("add.one", "one by one, one thread", "higher"),
            ("add.batch", "batches of 256", "higher"),
            ("add.writers.processes", "eight processes", "higher"),
            ("add.writers.threads", "eight threads", "higher"),
        ],
        2,
        2.9,
    )


def search(results: Results) -> Canvas | None:
    """Recall and latency of each, and what a writer and a rebuild do to it."""
    latency = results.by_contender("search.p50")
    recall = results.by_contender("search.recall")
    if not latency:
        return None
    figure = _canvas(10, 3.9)
    left, right = figure.subplots(1, 2)
    for name, found in latency.items():
        if name not in recall:
            continue
        left.errorbar(
            found.median,
            recall[name].median,
            xerr=_whiskers([found]),
            fmt="o",
            color=colour(name),
            ecolor=LINE,
            markersize=6,
        )
        left.annotate(
            name,
            (found.median, recall[name].median),
            xytext=(5, -9 if recall[name].median > 0.995 else 4),
            textcoords="offset points",
            fontsize=7.5,
            rotation=-30 if recall[name].median > 0.995 else 0,
        )
    left.set_xscale("log")
    left.xaxis.set_major_formatter(_TICKS)
    left.set_xlim(right=max(found.high for found in latency.values()) * 4)
    left.set_ylim(min(0.94, *(f.median - 0.02 for f in recall.values())), 1.01)
    n = next(iter(latency.values())).tags["n"]
    left.set_xlabel("search p50 (ms)")
    left.set_ylabel("recall at 10")
    left.set_title(f"{n:,} vectors of 384")
    _disturbed(right, results)
    return figure


def _disturbed(axes: Axes, results: Results) -> None:
    ways = (
        ("search.p99", "alone", "o"),
        ("search.writer.p99", "beside a writer", "s"),
        ("search.rebuild.p99", "beside a rebuild", "^"),
    )
    names = sorted(
        {name for metric, _, _ in ways[1:] for name in results.by_contender(metric)},
        key=lambda name: (
            results.by_contender("search.p99")[name].median
            if name in results.by_contender("search.p99")
            else 0
        ),
        reverse=True,
    )
    shades = (PHYSICAL, LINES[0], LINES[1])
    for (metric, label, marker), shade in zip(ways, shades, strict=True):
        found = results.by_contender(metric)
        there = [name for name in names if name in found]
        if there:
            axes.errorbar(
                [found[name].median for name in there],
                [names.index(name) for name in there],
                xerr=_whiskers([found[name] for name in there]),
                fmt=marker,
                color=shade,
                elinewidth=1,
                capsize=2,
                label=label,
            )
    axes.set_yticks(range(len(names)), names)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(_TICKS)
    axes.set_title("search p99 while others work (ms)")
    axes.legend(fontsize=8)


def kinds(results: Results) -> Canvas | None:
    """Latency and recall on each kind of data."""
    found = list(results.figures("kinds.p50"))
    if not found:
        return None
    data = list(dict.fromkeys(figure.tags["kind"] for figure in found))
    names = list(dict.fromkeys(figure.tags["contender"] for figure in found))
    figure = _canvas(10, 3.6)
    panels = figure.subplots(1, 2)
    for axes, metric, title in (
        (panels[0], "kinds.p50", "search p50 (ms)"),
        (panels[1], "kinds.recall", "recall at 10"),
    ):
        for offset, name in enumerate(names):
            rows = {
                row.tags["kind"]: row
                for row in results.figures(metric)
                if row.tags["contender"] == name
            }
            there = [kind for kind in data if kind in rows]
            axes.errorbar(
                [data.index(kind) + 0.12 * (offset - len(names) / 2) for kind in there],
                [rows[kind].median for kind in there],
                yerr=_whiskers([rows[kind] for kind in there]),
                fmt="o",
                color=OURS if name == "expbuf" else LINES[offset],
                capsize=2,
                label=name,
            )
        axes.set_xticks(range(len(data)), data, rotation=15)
        axes.set_title(title)
    panels[0].set_yscale("log")
    panels[0].yaxis.set_major_formatter(_TICKS)
    panels[0].legend(fontsize=8)
    return figure


def replay(results: Results) -> Canvas | None:
    return _panels(
        results,
        [
            ("replay.sample.p50", "draw 256 with data and weights", "lower"),
            ("replay.step.p50", "update 256 priorities and draw 256", "lower"),
            ("replay.load", "add all in the quickest way", "higher"),
            ("replay.add", "add one", "higher"),
            ("replay.save", "save all (a snapshot)", "lower"),
            ("replay.open", "open, until the first sample", "lower"),
        ],
        2,
        2.1,
    )


def folder(results: Results) -> Canvas | None:
    return _panels(
        results,
        [
            ("search.open", "open, until the first result", "lower"),
            ("search.memory", "private memory of a process", "lower"),
            ("disk", "disk, for each byte stored", "lower"),
            ("kill.open", "open after a kill", "lower"),
        ],
        2,
        2.6,
    )


_GROWTH = (
    ("scale.add", "add, p50 (µs)"),
    ("scale.search", "search, p50 (µs)"),
    ("scale.sample", "sample 256, p50 (µs)"),
    ("scale.step", "update and sample 256, p50 (µs)"),
    ("scale.load", "store all (experiences/s)"),
    ("scale.build", "build the index (s)"),
    ("scale.open", "open after a clean close (s)"),
    ("scale.recover", "open after a kill (s)"),
    ("scale.memory", "private memory (bytes each)"),
)


def scaling(results: Results) -> Canvas | None:
    """Every cost against the number of experiences, both logarithmic."""
    if not any(True for _ in results.figures("scale.load")):
        return None
    names = list(
        dict.fromkeys(
            figure.tags["contender"]
            for figure in results.figures(suite="scaling")
            if "contender" in figure.tags
        )
    )
    others = [name for name in names if name != "expbuf"]
    shade = {name: LINES[i % len(LINES)] for i, name in enumerate(others)} | {"expbuf": OURS}
    figure = _canvas(11, 8.2)
    for axes, (metric, title) in zip(figure.subplots(3, 3).ravel(), _GROWTH, strict=True):
        for name in names:
            rows = sorted(
                (row for row in results.figures(metric) if row.tags["contender"] == name),
                key=lambda row: row.tags["n"],
            )
            if rows:
                axes.errorbar(
                    [row.tags["n"] for row in rows],
                    [row.median for row in rows],
                    yerr=_whiskers(rows),
                    marker="o",
                    markersize=3.5,
                    linewidth=2.2 if name == "expbuf" else 1.1,
                    color=shade[name],
                    capsize=2,
                    label=name,
                )
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.xaxis.set_major_formatter(_TICKS)
        axes.yaxis.set_major_formatter(_TICKS)
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_title(title)
    handles: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(
        list(handles.values()), list(handles), loc="outside lower center", ncols=len(handles)
    )
    return figure


PLOTS: dict[str, Callable[[Results], Canvas | None]] = {
    "adds": adds,
    "search": search,
    "kinds": kinds,
    "replay": replay,
    "folder": folder,
    "scaling": scaling,
}


def draw(results: Results, to: Path) -> list[Path]:
    """Draw all that there are figures for, as `bench-NAME.png`. Returns the files."""
    drawn = []
    with mpl.rc_context(STYLE):
        for name, plot in PLOTS.items():
            figure = plot(results)
            if figure is not None:
                path = to / f"bench-{name}.png"
                _save(figure, path)
                drawn.append(path)
    return drawn


def main() -> None:
    made = argparse.ArgumentParser(description="Draw the figures of a run.")
    made.add_argument("figures", type=Path, help="a folder of JSON files, or one results file")
    made.add_argument("--to", type=Path, default=Path("benchmark_output"))
    arguments = made.parse_args()
    source: Path = arguments.figures
    results = Results.gather(source) if source.is_dir() else Results.read(source)
    for path in draw(results, arguments.to):
        print(path)


if __name__ == "__main__":
    main()
