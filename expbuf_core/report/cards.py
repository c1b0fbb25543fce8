"""Rankings of a report: the most and least useful experiences, and what replay draws most."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from expbuf_core.report import charts
from expbuf_core.report.gather import Facts, Ranking, Text
from expbuf_core.report.words import duration, escaped, number


def rankings(facts: Facts) -> str:
    """The three rankings side by side."""
    if not len(facts.columns.id):
        return ""
    rates = facts.columns.rate
    ageing = ", ageing left out" if facts.ageing else ""
    return "".join(
        (
            _ranking(
                facts,
                "Most useful",
                "Retrieved, and right at least as often as the mean. Ranked by what so many "
                "outcomes allow to say: 40 of 50 stand before 1 of 1.",
                facts.most_useful,
                "None has taken part in a right consensus yet.",
                rates,
            ),
            _ranking(
                facts,
                "Least useful",
                "Retrieved, and right less often than the mean, the surest first.",
                facts.least_useful,
                "None was worse than the mean."
                if facts.columns.retrievals.any()
                else "None has been retrieved yet.",
                rates,
            ),
            _ranking(
                facts,
                "What replay draws most",
                f"By priority and success rate, as sample() weighs them{ageing}.",
                facts.most_drawn,
                "",
                rates,
            ),
        )
    )


def _ranking(
    facts: Facts,
    title: str,
    note: str,
    ranking: Ranking,
    empty: str,
    rates: NDArray[np.float64],
) -> str:
    cards = [
        _card(facts, int(row), text, float(rates[row]), ranking is facts.most_drawn)
        for row, text in zip(ranking.rows.tolist(), ranking.texts, strict=True)
    ]
    body = f"<ol>{''.join(cards)}</ol>" if cards else f'<p class="nothing">{escaped(empty)}</p>'
    return f'<div class="ranking"><h3>{escaped(title)}</h3><p>{escaped(note)}</p>{body}</div>'


def _card(facts: Facts, row: int, text: Text, rate: float, drawn: bool) -> str:
    columns = facts.columns
    id_ = int(columns.id[row])
    retrievals, successes = int(columns.retrievals[row]), float(columns.successes[row])
    reward = float(columns.reward[row])
    picture = f'<img alt="" src="{escaped(text.picture)}">' if text.picture else ""
    if retrievals:
        used = f"{number(successes)} of {retrievals:,} right"
        bar = (
            f'<span class="rate"><span class="{charts.shade(rate)}" '
            f'style="width:{100 * min(rate, 1):.0f}%"></span></span>'
        )
    else:
        used, bar = "never retrieved", '<span class="rate"></span>'
    facts_ = [
        used,
        f"priority {number(float(columns.priority[row]))}",
        "reward unknown" if math.isnan(reward) else f"reward {number(reward)}",
        f"{duration(max(0.0, facts.made_at - float(columns.timestamp[row])))} old",
    ]
    if drawn:
        facts_.insert(1, f"drawn with {100 * float(facts.draws[row]):.2g}%")
    words = text.problem or text.question or "no question"
    muted = "" if text.question else ' class="muted"'
    answer = f'<span class="answer" dir="auto">{escaped(text.answer)}</span>' if text.answer else ""
    label = f'<span class="label" dir="auto">{escaped(text.label)}</span>' if text.label else ""
    return (
        f'<li><button type="button" data-id="{id_}" title="Show on the map">{picture}'
        f'<span class="what"><span class="question"><span{muted} dir="auto">{escaped(words)}</span>'
        f"{answer}</span>{bar}"
        f'<span class="facts"><b>#{id_}</b> {escaped(" · ".join(facts_))} {label}</span></span>'
        "</button></li>"
    )
