"""Charts of a report: what the buffer holds, and retrieval over time."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from expbuf_core.report import charts
from expbuf_core.report.charts import Bar, Tick
from expbuf_core.report.gather import Columns, Facts, Outcomes
from expbuf_core.report.words import date, duration, number, percent, plural

_GROUPS = 48  # bars of a chart over time


def distributions(facts: Facts) -> str:
    """Priorities, success rates, ages and rewards."""
    columns = facts.columns
    if not len(columns.id):
        return ""
    return _priorities(columns) + _rates(columns) + _ages(facts) + _rewards(columns)


def _priorities(columns: Columns) -> str:
    values = columns.priority.astype(np.float64)
    high = charts.round_above(float(np.quantile(values, 0.995)))
    beyond = int(np.count_nonzero(values > high))
    note = f"Median {number(float(np.median(values)))}, largest {number(float(values.max()))}."
    if beyond:
        note += f" The last bar also counts {beyond:,} beyond."
    return charts.histogram("Priority", values, note=note, number=number, low=0.0, high=high)


def _rates(columns: Columns) -> str:
    rates = columns.rate
    rates = rates[~np.isnan(rates)]
    never = len(columns.id) - len(rates)
    if not len(rates):
        return charts.nothing(
            "Success rate",
            "No outcome has been recorded yet: buffer.record_outcome(found.receipt, success=…) "
            "counts what came of a search.",
        )
    note = f"Of {len(rates):,} that were retrieved; {never:,} never were."
    return charts.histogram(
        "Success rate",
        rates,
        note=note,
        number=percent,
        bins=20,
        low=0.0,
        high=1.0,
        colour=charts.shade,
    )


def _ages(facts: Facts) -> str:
    ages = np.maximum(facts.made_at - facts.columns.timestamp, 0.0)
    oldest = float(ages.max())
    note = f"Median {duration(float(np.median(ages)))}, oldest {duration(oldest)}."
    # A round end in the unit that its labels will have.
    unit = next((u for u in (86400.0, 3600.0, 60.0) if oldest >= 2 * u), 1.0)
    high = charts.round_above(oldest / unit) * unit
    return charts.histogram("Age", ages, note=note, number=_age, low=0.0, high=high, unit=unit)


def _age(seconds: float) -> str:
    for unit, length in (("d", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * length or (unit == "d" and seconds >= length):
            return (
                f"{seconds / length:.2g} {unit}"
                if seconds < 100 * length
                else (f"{seconds / length:,.0f} {unit}")
            )
    return f"{seconds:.2g} s" if seconds else "now"


def _rewards(columns: Columns) -> str:
    known = columns.reward[~np.isnan(columns.reward)]
    unknown = len(columns.id) - len(known)
    if not len(known):
        return charts.nothing("Reward", f"None of the {len(columns.id):,} is known yet.")
    note = f"Of {len(known):,}, mean {number(float(known.mean()))}"
    note += f"; {unknown:,} not known yet." if unknown else "."
    low, high = (float(np.quantile(known, share)) for share in (0.001, 0.999))
    # Round ends, and 0 between them.
    high = charts.round_above(high) if high > 0 else 0.0
    low = -charts.round_above(-low) if low < 0 else 0.0

    def colour(value: float) -> str:
        return "s8" if value > 0 else "s1"

    return charts.histogram(
        "Reward", known, note=note, number=number, low=low, high=high, colour=colour
    )


# ---------------------------------------------------------------- over time


def over_time(facts: Facts) -> str:
    """What can be said of retrieval over time: the buffer keeps counts, and a log without dates.

    So there are two clocks: the order in which experiences came, and the numbers of operations.
    """
    columns = facts.columns
    if not len(columns.id):
        return ""
    return _by_arrival(columns) + _by_operation(facts)


def _by_arrival(columns: Columns) -> str:
    n = len(columns.id)
    groups = np.array_split(np.arange(n), min(_GROUPS, n))
    often, right = [], []
    for rows in groups:
        ids, times = columns.id[rows], columns.timestamp[rows]
        retrievals, successes = columns.retrievals[rows].sum(), columns.successes[rows].sum()
        who = f"id {ids[0]}" if len(rows) == 1 else f"ids {ids[0]} to {ids[-1]}"
        head = f"{who}, {date(float(np.median(times)))}"
        mean = retrievals / len(rows)
        often.append(Bar([(float(mean), "plain")], f"{head}: {mean:.2f} retrievals each"))
        if retrievals:
            rate = float(successes / retrievals)
            tip = f"{head}: {percent(rate)} of {plural(int(retrievals), 'use')} were right"
            right.append(Bar([(rate, charts.shade(rate))], tip))
        else:
            right.append(Bar([(0.0, "plain")], f"{head}: not retrieved yet"))
    spans = [(i, float(np.median(columns.timestamp[rows]))) for i, rows in enumerate(groups)]
    ticks = _dates([(0.5 / len(groups) + i / len(groups), time) for i, time in spans])
    most = len(groups[0])
    each = "One bar an experience" if most == 1 else f"One bar for each {most:,} experiences"
    note = f"{each}, the oldest first. Older ones had more time to be retrieved."
    mean = float(columns.retrievals.mean())
    out = charts.chart(
        "Retrievals of an experience, by arrival",
        often,
        ticks,
        note=note,
        summary=f"Mean retrievals by order of arrival; {mean:.2f} over all",
        number=number,
    )
    if columns.retrievals.any():
        rate = float(columns.successes.sum() / columns.retrievals.sum())
        out += charts.chart(
            "Right when retrieved, by arrival",
            right,
            ticks,
            note="The same groups: which part of their uses was part of a right consensus.",
            summary=f"Success rate by order of arrival; {percent(rate)} over all",
            number=percent,
            top=1.0,
        )
    return out


def _dates(places: Sequence[tuple[float, float]], count: int = 3) -> list[Tick]:
    """Dates under some of the places (at, UTC seconds), in words as short as tell them apart."""
    chosen = [places[round(i)] for i in np.linspace(0, len(places) - 1, min(count, len(places)))]
    days = {date(time, "%Y-%m-%d") for _, time in chosen}
    pattern = "%H:%M:%S" if len(days) == 1 else "%Y-%m-%d"
    if 1 < len(days) < len(chosen) or _close(chosen):
        pattern = "%m-%d %H:%M"
    return [Tick(at, date(time, pattern)) for at, time in chosen]


def _close(chosen: Sequence[tuple[float, float]]) -> bool:
    """Over more than a day, and less than four."""
    span = abs(chosen[-1][1] - chosen[0][1])
    return 86400 <= span < 4 * 86400


def _by_operation(facts: Facts) -> str:
    title = "Recorded outcomes, by operation"
    outcomes = facts.outcomes
    if outcomes is None:
        return charts.nothing(title, "The log could not be read back; the counts above stand.")
    if not len(outcomes.lsn):
        if facts.columns.retrievals.any():
            why = f"The log has none since operation {max(1, outcomes.first_lsn):,}."
        else:
            why = "No outcome has been recorded yet."
        return charts.nothing(title, why)
    first, last = max(1, outcomes.first_lsn), outcomes.last_lsn
    edges = np.linspace(first, last + 1, min(_GROUPS, last + 1 - first) + 1)
    right, _ = np.histogram(outcomes.lsn[outcomes.success], edges)
    wrong, _ = np.histogram(outcomes.lsn[~outcomes.success], edges)
    bars = []
    for i, (good, bad) in enumerate(zip(right.tolist(), wrong.tolist(), strict=True)):
        span = f"operations {math.ceil(edges[i]):,} to {math.ceil(edges[i + 1]) - 1:,}"
        bars.append(Bar([(good, "s8"), (bad, "s1")], f"{span}: {good:,} right, {bad:,} wrong"))
    rate = float(outcomes.success.mean())
    note = (
        f"{plural(len(outcomes.lsn), 'search', 'searches')} in the log since operation {first:,}; "
        f"{percent(rate)} were right. Operations bear numbers, not dates: "
        "those under the axis are of the experiences added there."
    )
    return charts.chart(
        title,
        bars,
        _operations(outcomes, facts.columns, first, last),
        note=note,
        summary=f"{len(outcomes.lsn):,} recorded outcomes, {percent(rate)} of them right",
        number=charts.count,
        legend=[("s8", "right"), ("s1", "wrong")],
    )


def _operations(outcomes: Outcomes, columns: Columns, first: int, last: int) -> list[Tick]:
    """LSNs under the axis, with the date of the add before each where that is still known."""
    ticks = []
    for at in (0.0, 0.5, 1.0):
        lsn = round(first + at * (last - first))
        text = f"{lsn:,}"
        before = int(np.searchsorted(outcomes.add_lsn, lsn, side="right")) - 1
        if before >= 0:
            row = int(np.searchsorted(columns.id, outcomes.add_id[before]))
            if row < len(columns.id) and columns.id[row] == outcomes.add_id[before]:
                text += f" · {date(float(columns.timestamp[row]), '%m-%d %H:%M')}"
        ticks.append(Tick(at, text))
    return ticks
