"""The figures of all suites in one file, small enough to keep: medians, spreads, ratios."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SUITES = ("peers", "scaling", "storage", "search", "sampling", "backends")
DIGITS = 4


def _short(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")


@dataclass
class Figure:
    """One row of one suite.

    Attributes:
        suite: Name of the suite.
        group: Of the row.
        name: Of the row.
        unit: Of the values.
        median: Of the repetitions.
        low: Least of the repetitions.
        high: Greatest.
        count: Repetitions.
        reference: What `ratio` is relative to; "" for nothing.
        ratio: Median of the ratios turn by turn.
        against: The same for others, by name.
        target: What it should reach, in words.
        met: Whether it does.
        tags: Metric, contender, size, …
    """

    suite: str
    group: str
    name: str
    unit: str
    median: float
    low: float
    high: float
    count: int
    reference: str = ""
    ratio: float | None = None
    against: dict[str, float] = field(default_factory=dict)
    target: str = ""
    met: bool | None = None
    tags: dict[str, Any] = field(default_factory=dict)


class Results:
    """All suites of one run.

    Attributes:
        suites: By name, as in the file.
    """

    def __init__(self, suites: dict[str, dict[str, Any]]) -> None:
        self.suites = suites

    @classmethod
    def gather(cls, folder: Path) -> Results:
        """Read what the suites wrote; a suite that did not run is left out."""
        suites = {}
        for name in SUITES:
            path = folder / f"{name}.json"
            if not path.exists():
                continue
            document = json.loads(path.read_text(encoding="utf-8"))
            document["rows"] = [_kept(row) for row in document["rows"]]
            suites[name] = document
        return cls(suites)

    @classmethod
    def read(cls, path: Path) -> Results:
        suites = json.loads(path.read_text(encoding="utf-8"))["suites"]
        return cls({name: {**kept["suite"], "rows": kept["rows"]} for name, kept in suites.items()})

    def replaced_by(self, newer: Results, names: Collection[str]) -> Results:
        """The same with these suites from another run, where it has them."""
        suites = self.suites | {name: newer.suites[name] for name in names if name in newer.suites}
        return Results({name: suites[name] for name in SUITES if name in suites})

    def write(self, path: Path) -> None:
        """One row a line, so that two versions can be compared."""
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = ['{"suites": {']
        for number, (name, document) in enumerate(self.suites.items()):
            suite = {key: value for key, value in document.items() if key != "rows"}
            rows = document["rows"]
            head = json.dumps(suite, ensure_ascii=False, sort_keys=True)
            lines.append(f'{json.dumps(name)}: {{"suite": {head}, "rows": [')
            lines += [
                json.dumps(row, ensure_ascii=False, sort_keys=True)
                + ("," if i + 1 < len(rows) else "")
                for i, row in enumerate(rows)
            ]
            lines.append("]}" + ("," if number + 1 < len(self.suites) else ""))
        lines.append("}}")
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")

    def figures(self, metric: str | None = None, suite: str | None = None) -> Iterator[Figure]:
        """All rows, or those of one metric or suite."""
        for name, document in self.suites.items():
            if suite is not None and name != suite:
                continue
            for row in document["rows"]:
                if metric is None or row["tags"].get("metric") == metric:
                    yield Figure(suite=name, **row)

    def by_contender(self, metric: str) -> dict[str, Figure]:
        return {figure.tags["contender"]: figure for figure in self.figures(metric)}


def _kept(row: dict[str, Any]) -> dict[str, Any]:
    values: Sequence[float] = row["values"]
    return {
        "group": row["group"],
        "name": row["name"],
        "unit": row["unit"],
        "median": _short(row["median"]),
        "low": _short(min(values)),
        "high": _short(max(values)),
        "count": len(values),
        "reference": row.get("reference", ""),
        "ratio": None if row.get("ratio") is None else _short(row["ratio"]),
        "against": {name: _short(value) for name, value in row.get("against", {}).items()},
        "target": row.get("target", ""),
        "met": row.get("met"),
        "tags": row.get("tags", {}),
    }
