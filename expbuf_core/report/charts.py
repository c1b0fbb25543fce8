"""Charts as HTML with inline SVG.

Shapes are stretched to the width there is; words are HTML beside them, so that they keep their size
on a narrow screen. Colours are classes, so that the style sheet decides them for light and dark.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

SHADES = 10  # of the colours between wrong and right: classes s0 to s9
_GAP = 0.12  # of a bar's width
_FEWEST_UNITS = 1e-9

Number = Callable[[float], str]


class Bar(NamedTuple):
    """One bar, made of parts that stand on each other: (height, class of its colour)."""

    parts: Sequence[tuple[float, str]]
    tip: str


class Tick(NamedTuple):
    """A word under the axis. `at`: 0 at the left end, 1 at the right."""

    at: float
    text: str


def chart(
    title: str,
    bars: Sequence[Bar],
    ticks: Sequence[Tick],
    *,
    note: str,
    summary: str,
    number: Number,
    top: float | None = None,
    legend: Sequence[tuple[str, str]] = (),
) -> str:
    """A chart of bars side by side.

    Args:
        title: Above it.
        bars: From left to right.
        ticks: Under the axis.
        note: Below the title, in small print.
        summary: What the chart says, for those who cannot see it.
        number: Writes the numbers beside the axis.
        top: Where the axis ends; default: a round number above the highest bar.
        legend: (class of a colour, its meaning).
    """
    highest = max((sum(height for height, _ in bar.parts) for bar in bars), default=0.0)
    top = top or round_above(highest)
    width = 1000 / max(len(bars), 1)
    shapes = []
    for i, bar in enumerate(bars):
        base = 100.0
        left = i * width + _GAP * width / 2
        for height, colour in bar.parts:
            if height <= 0:
                continue
            # Never less than a hair, so that few are told from none.
            drawn = max(100 * height / top, 0.6)
            base -= drawn
            shapes.append(
                f'<rect class="{colour}" x="{left:.2f}" y="{base:.2f}" '
                f'width="{width * (1 - _GAP):.2f}" height="{drawn:.2f}"/>'
            )
        # As high as the chart, so that a low bar is found, too.
        shapes.append(
            f'<rect class="hit" x="{i * width:.2f}" y="0" width="{width:.2f}" height="100" '
            f'data-tip="{escape(bar.tip)}"/>'
        )
    lines = "".join(
        f'<span class="line" style="bottom:{100 * share:.0f}%"><i>{escape(number(top * share))}</i>'
        "</span>"
        for share in (0.0, 0.5, 1.0)
    )
    words = "".join(_tick(tick) for tick in ticks)
    meanings = "".join(
        f'<li><span class="swatch {colour}"></span>{escape(meaning)}</li>'
        for colour, meaning in legend
    )
    keys = f'<ul class="keys">{meanings}</ul>' if meanings else ""
    return (
        f'<figure class="chart"><figcaption><h3>{escape(title)}</h3><p>{escape(note)}</p>{keys}'
        f'</figcaption><div class="plot">{lines}<svg viewBox="0 0 1000 100" '
        f'preserveAspectRatio="none" role="img" aria-label="{escape(summary)}">'
        f'{"".join(shapes)}</svg></div><div class="ticks">{words}</div></figure>'
    )


def _tick(tick: Tick) -> str:
    # Words at the ends stay within the chart.
    side = "start" if tick.at < 0.05 else "end" if tick.at > 0.95 else "middle"
    return f'<span class="{side}" style="left:{100 * tick.at:.2f}%">{escape(tick.text)}</span>'


def nothing(title: str, why: str) -> str:
    """In the place of a chart that would be empty."""
    return (
        f'<figure class="chart"><figcaption><h3>{escape(title)}</h3></figcaption>'
        f'<p class="nothing">{escape(why)}</p></figure>'
    )


def histogram(
    title: str,
    values: NDArray[np.float64],
    *,
    note: str,
    number: Number,
    what: str = "experiences",
    bins: int = 40,
    low: float | None = None,
    high: float | None = None,
    unit: float = 1.0,
    colour: Callable[[float], str] = lambda middle: "plain",
) -> str:
    """How often which values come. What lies beyond `low` or `high` is counted at that end.

    Args:
        title: Above it.
        values: (n,) finite, n at least 1.
        note: Below the title.
        number: Writes a value.
        what: The values are of these.
        bins: How many bars.
        low: Where the axis begins; default: the smallest value.
        high: Where it ends; default: the largest value.
        unit: Words under the axis stand at round multiples of it.
        colour: Class of the bar around a value.
    """
    first = float(values.min()) if low is None else low
    last = float(values.max()) if high is None else high
    if not last - first > _FEWEST_UNITS * max(abs(first), abs(last), 1e-300):
        first, last = first - 0.5, first + 0.5
    counts, edges = np.histogram(np.clip(values, first, last), bins, (first, last))
    bars = [
        Bar(
            [(float(count), colour((edges[i] + edges[i + 1]) / 2))],
            f"{number(edges[i])} to {number(edges[i + 1])}: {int(count):,} {what}",
        )
        for i, count in enumerate(counts.tolist())
    ]
    ticks = [
        Tick((x - first) / (last - first), number(x)) for x in _round_values(first, last, unit)
    ]
    summary = (
        f"{title}: {len(values):,} {what} from {number(float(values.min()))} to "
        f"{number(float(values.max()))}, median {number(float(np.median(values)))}"
    )
    return chart(title, bars, ticks, note=note, summary=summary, number=count)


def shade(rate: float) -> str:
    """Class of the colour of a success rate in [0, 1]."""
    return f"s{min(SHADES - 1, max(0, int(rate * SHADES)))}"


def round_above(value: float) -> float:
    """The next number of the form 1, 2, 2.5, 3, 4, 5, 6 or 8 times a power of ten."""
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    for step in (1.0, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0):
        if step * power >= value * (1 - 1e-9):
            return step * power
    return 10.0 * power


def count(value: float) -> str:
    """A count beside an axis; nothing for what is no whole number."""
    for limit, divisor, unit in ((1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if value >= limit:
            return f"{value / divisor:.3g}{unit}"
    return f"{value:,.0f}" if value == int(value) else ""


def _round_values(first: float, last: float, unit: float) -> list[float]:
    """Round numbers in an interval, six at most."""
    least = (last - first) / unit / 5
    power = 10.0 ** math.floor(math.log10(least))
    step = next(x for x in (1.0, 2.0, 5.0, 10.0) if x * power >= least * (1 - 1e-9)) * power * unit
    begin, end = math.ceil(first / step - 1e-6), math.floor(last / step + 1e-6)
    return [i * step for i in range(begin, end + 1)]
