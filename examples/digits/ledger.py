"""What the memory has promised, written down by somebody who is not the memory.

The parent keeps the books of its child: what was acknowledged, and the one write that was under way
when the child died, which may or may not have happened, but never in part.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass
class Entry:
    """What is known about one experience."""

    answer: Any
    reward: float | None = None
    retrieved: int = 0
    succeeded: float = 0.0

    def same(self, other: Entry) -> bool:
        """Equal, but for rounding of the credit."""
        close = math.isclose(self.succeeded, other.succeeded, abs_tol=1e-4)
        return close and replace(self, succeeded=0.0) == replace(other, succeeded=0.0)


@dataclass
class Ledger:
    """The books: entries by id, in the order of their acknowledgement."""

    entries: dict[int, Entry] = field(default_factory=dict)
    outcomes: int = 0
    _answering: bool = False
    _judging: dict[str, Any] | None = None

    def note(self, event: dict[str, Any]) -> None:
        """Take down what the child says it does."""
        kind = event["event"]
        if kind == "answering":
            self._answering = True
        elif kind == "answered":
            self._answering = False
            self.entries[event["id"]] = Entry(event["answer"])
        elif kind == "judging":
            self._judging = event
        elif kind == "judged" and self._judging is not None:
            self.entries[self._judging["id"]].reward = 1.0 if event["right"] else -1.0
            neighbours = zip(self._judging["neighbours"], self._judging["credit"], strict=True)
            for id, credit in neighbours:
                self.entries[id].retrieved += 1
                self.entries[id].succeeded += credit
            self.outcomes += bool(self._judging["neighbours"])
            self._judging = None

    def audit(self, found: list[list[Any]]) -> list[str]:
        """Compare with what a new process found; afterwards the books say what was found.

        Args:
            found: Id, answer, reward, retrieval count, success count of each, in order.

        Returns:
            What is wrong; empty if all is well.
        """
        there = {id: Entry(*rest) for id, *rest in found}
        wrong = [f"experience {id} is lost" for id in self.entries if id not in there]
        order = [id for id, *_ in found]
        extra = [id for id in order if id not in self.entries]
        if len(extra) > int(self._answering) or order != [*self.entries, *extra]:
            wrong.append(f"wrong order, or experiences that nobody stored: {extra}")
        under_way = self._judging or {"id": None, "neighbours": [], "credit": []}
        credited = dict(zip(under_way["neighbours"], under_way["credit"], strict=True))
        took_part = set()  # whether the outcome that was under way happened
        for id, entry in self.entries.items():
            now = there.get(id)
            if now is None:
                continue
            before = replace(entry)
            if id == under_way["id"]:
                before.reward = now.reward
            if id in credited:
                happened = now.retrieved > entry.retrieved
                took_part.add(happened)
                before.retrieved += happened
                before.succeeded += happened * credited[id]
            if not now.same(before):
                wrong.append(f"experience {id}: {before} was acknowledged, {now} was found")
        if len(took_part) > 1:
            wrong.append("an outcome was counted for some of its neighbours only")
        self.outcomes += True in took_part
        self.entries = there
        self._answering, self._judging = False, None
        return wrong
