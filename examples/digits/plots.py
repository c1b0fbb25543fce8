"""The picture: how the agent learns, where it was killed, and what came to its mind.

    python examples/digits/plots.py demo_output/figures.json picture.png

draws it again from the figures of a demo.
"""

from __future__ import annotations

import json
import sys
import textwrap
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from numpy.typing import NDArray
from world import Scans

# Okabe and Ito's colours: told apart also by those who see fewer.
BLUE, VERMILLION, GREY = "#0072B2", "#D55E00", "#8C8C8C"
INK, SOFT, LINE, PAPER = "#1F2328", "#6A7178", "#D9DDE1", "#FFFFFF"
WINDOW = 100
SIZE = (10.8, 8.1)  # inches, at 150 dots

STYLE: Any = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9.5,
    "text.color": INK,
    "axes.edgecolor": LINE,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "figure.facecolor": PAPER,
    "axes.facecolor": PAPER,
}


def draw(figures: dict[str, Any], images: NDArray[np.float32], path: Path) -> None:
    """Draw the picture of a demo, whose scans are `images`, into a PNG file."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=SIZE, dpi=150)
        FigureCanvasAgg(figure)  # draws without a display
        _head(figure, figures)
        _curves(figure.add_axes((0.066, 0.478, 0.80, 0.375)), figures)
        _memories(figure, figures, images)
        figure.savefig(path, pil_kwargs={"optimize": True})


# ---------------------------------------------------------------- curves


def _head(figure: Figure, figures: dict[str, Any]) -> None:
    streams = len(figures["streams"])
    mean = "" if streams == 1 else f"mean ± standard deviation of {streams} streams"
    figure.text(0.03, 0.958, "An agent that remembers", size=19, weight="bold", va="center")
    figure.text(
        0.03,
        0.918,
        f"{figures['questions']} scans of handwritten digits, a question about each. "
        "It is only ever told whether its answer was right.",
        size=10,
        color=SOFT,
        va="center",
    )
    _heading(figure, 0.874, f"Right among the last {WINDOW} answers", mean)


def _heading(figure: Figure, y: float, heading: str, remark: str) -> None:
    text = figure.text(0.03, y, heading, size=10.5, weight="bold", va="baseline")
    end = text.get_window_extent().x1 / figure.bbox.width
    figure.text(end + 0.012, y, remark, size=9, color=SOFT, va="baseline")


def _rolling(verdicts: str) -> NDArray[np.float64]:
    """Share of right answers among the last WINDOW, from the WINDOW-th on."""
    right = np.array([int(verdict) for verdict in verdicts], dtype=float)
    window = min(WINDOW, max(1, len(right) // 4))
    return np.convolve(right, np.full(window, 1.0 / window), mode="valid")


def _curves(axes: Axes, figures: dict[str, Any]) -> None:
    total = figures["questions"]
    labels: list[float] = []
    for name, label, colour in (("memory_off", "off", GREY), ("memory_on", "on", BLUE)):
        curves = np.array([_rolling(stream[name]) for stream in figures["streams"]])
        mean = curves.mean(axis=0)
        at = np.arange(total - len(mean), total) + 1
        if len(curves) > 1:
            spread = curves.std(axis=0, ddof=1)
            axes.fill_between(at, mean - spread, mean + spread, color=colour, alpha=0.14, lw=0)
        axes.plot(at, mean, color=colour, lw=2.4, solid_capstyle="round")
        # The labels must not touch where the curves do.
        above = labels and abs(labels[0] - mean[-1]) < 0.22
        end = (total, labels[0] + 0.22 if above else mean[-1])
        labels.append(float(mean[-1]))
        _beside(axes, end, 14, f"memory {label}", colour, size=10)
        _beside(axes, end, -3, f"{figures[name]:.0%}", colour, size=18, weight="bold")
        _beside(axes, end, -19, f"of the last {figures['window']}", SOFT, size=8)
    _kill(axes, figures, dict(zip(at.tolist(), mean.tolist(), strict=True)))
    axes.set_xlim(0, total)
    axes.set_ylim(0, 1)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1])
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.grid(axis="y", color=LINE, lw=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "left", "right"):
        axes.spines[side].set_visible(False)
    axes.tick_params(length=0, labelsize=9)
    axes.set_xlabel("questions answered", color=SOFT, size=9, labelpad=4)


def _kill(axes: Axes, figures: dict[str, Any], curve: dict[int, float]) -> None:
    deaths = [death for stream in figures["streams"] for death in stream["deaths"]]
    if not deaths:
        return
    at = round(float(np.mean([death["questions"] for death in deaths])))
    acknowledged = sum(death["acknowledged"] for death in deaths)
    wrong = sum(len(death["wrong"]) for death in deaths)
    what = "SIGKILL" if len(deaths) == 1 else f"SIGKILL to all {len(deaths)} processes"
    fate = f"{wrong} LOST OR CHANGED" if wrong else "none lost"
    axes.axvline(at, color=VERMILLION, lw=1.2, ls=(0, (4, 3)))
    if at in curve:
        axes.plot(at, curve[at], "o", ms=7, mfc=PAPER, mec=VERMILLION, mew=1.8, zorder=5)
    _beside(axes, (at, 0.105), 7, what, VERMILLION, size=10.5, weight="bold")
    _beside(axes, (at, 0.105), -8, f"{acknowledged} experiences acknowledged, {fate}", SOFT, size=9)


def _beside(
    axes: Axes, point: tuple[float, float], rise: float, text: str, colour: str, **font: Any
) -> None:
    """Write to the right of a point, some points higher."""
    axes.annotate(
        text,
        point,
        xytext=(9, rise),
        textcoords="offset points",
        color=colour,
        va="center",
        annotation_clip=False,
        **font,
    )


# ---------------------------------------------------------------- what came to mind


def _memories(figure: Figure, figures: dict[str, Any], images: NDArray[np.float32]) -> None:
    recalled = figures["streams"][0]["recalled"][-4:]
    if not recalled:
        return
    _heading(
        figure,
        0.391,
        "What came to mind",
        "at the last question of each kind: the most similar experiences, and how similar; "
        "✓ speaks for its answer, ✗ against it",
    )
    verdicts = figures["streams"][0]["memory_on"]
    for i, memory in enumerate(recalled):
        left, top = 0.03 + 0.487 * (i % 2), 0.364 - 0.183 * (i // 2)
        _card(figure, left, top, memory, verdicts[memory["position"]] == "1", images)


def _card(
    figure: Figure,
    left: float,
    top: float,
    memory: dict[str, Any],
    right: bool,
    images: NDArray[np.float32],
) -> None:
    big, small, gap = 0.083, 0.052, 0.0095
    ratio = SIZE[0] / SIZE[1]
    _scan(figure, (left, top - big * ratio, big, big * ratio), images[memory["scan"]], INK, 1.0)
    words = left + big + 0.016
    figure.text(words, top - 0.008, f"“{memory['question']}”", size=10, weight="bold", va="center")
    mark, colour = _verdict(right)
    figure.text(
        words + len(memory["hits"]) * (small + gap) - gap,
        top - 0.008,
        f"{memory['answer']} {mark}",
        size=10.5,
        weight="bold",
        color=colour,
        va="center",
        ha="right",
    )
    for i, hit in enumerate(memory["hits"]):
        x, y = words + i * (small + gap), top - 0.028 - small * ratio
        mark, colour = _verdict(hit["reward"] > 0)
        _scan(figure, (x, y, small, small * ratio), images[hit["scan"]], colour, 1.6)
        middle = x + small / 2
        figure.text(
            middle, y - 0.014, f"{hit['answer']} {mark}", size=8.5, color=colour,
            ha="center", va="center", weight="bold",
        )  # fmt: skip
        figure.text(
            middle, y - 0.032, f"{hit['similarity']:.2f}", size=7.5, color=SOFT,
            ha="center", va="center",
        )  # fmt: skip
        if hit["question"] != memory["question"]:
            asked = textwrap.fill(hit["question"], 14)
            figure.text(middle, y - 0.040, asked, size=5.6, color=SOFT, ha="center", va="top")


def _verdict(right: bool) -> tuple[str, str]:
    return ("✓", BLUE) if right else ("✗", VERMILLION)


def _scan(
    figure: Figure,
    place: tuple[float, float, float, float],
    pixels: NDArray[np.float32],
    colour: str,
    width: float,
) -> None:
    axes = figure.add_axes(place)
    axes.imshow(pixels, cmap="Greys", vmin=0.0, vmax=1.0, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color(colour)
        spine.set_linewidth(width)


if __name__ == "__main__":
    draw(
        json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")),
        Scans.load().images,
        Path(sys.argv[2]),
    )
