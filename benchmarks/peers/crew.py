"""Several peers at once: the same commands to all, in turns; who fails leaves, and is reported."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any

from benchmarks.common import Report, Row, in_turns
from benchmarks.peers.base import NotOffered
from benchmarks.peers.client import Client, PeerFailed

OURS = "expbuf"


class Crew(AbstractContextManager["Crew"]):
    """Workers of several peers, each with its own folder.

    Attributes:
        clients: By name; those that still take part.
        facts: What each peer says of itself, also of those that have left.
    """

    def __init__(
        self,
        report: Report,
        arguments: argparse.Namespace,
        names: Iterable[str],
        folder: Path,
        *,
        capacity: int,
    ) -> None:
        self._report, self._arguments = report, arguments
        self.folder, self.data, self._capacity = folder, folder / "data", capacity
        self.clients: dict[str, Client] = {}
        self.facts: dict[str, dict[str, Any]] = {}
        only = [name.strip() for name in arguments.peers.split(",") if name.strip()]
        for name in names:
            if only and name not in only and not name.startswith(OURS):
                continue
            try:
                self.start(name)
            except (PeerFailed, NotOffered) as exc:
                self.dismiss(name, exc)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for client in self.clients.values():
            client.stop()

    def __enter__(self) -> Crew:
        return self

    # ---------------------------------------------------------------- life

    def folder_of(self, name: str) -> Path:
        return self.folder / name.replace(" ", "-").replace(",", "")

    def fresh(self, name: str) -> Client:
        """Another worker for a peer, with nothing opened yet."""
        return Client(name, self._arguments.peers_python, self.folder / f"{name}.log")

    def open(self, client: Client, folder: Path, first_key: int = 0) -> Any:
        return client(
            "open",
            folder=str(folder),
            data=str(self.data),
            capacity=self._capacity,
            first_key=first_key,
        )

    def start(self, name: str) -> None:
        client = self.fresh(name)
        self.clients[name] = client
        self.facts[name] = client.facts
        self._report.extra.setdefault("promises", {}).setdefault(name, client.facts)
        self.open(client, self.folder_of(name))

    def dismiss(self, name: str, why: object) -> None:
        """A peer leaves; its process ends."""
        client = self.clients.pop(name, None)
        if client is not None:
            client.stop()
        self._report.skip(name, why)

    def stop_all(self) -> list[str]:
        """End all processes. Returns who took part."""
        names = list(self.clients)
        for client in self.clients.values():
            client.stop()
        self.clients.clear()
        return names

    # ---------------------------------------------------------------- commands

    def once(self, do: str, *, timeout_s: float = 120, **arguments: Any) -> dict[str, Any]:
        """A command to all, one after the other. Who does not offer it stays, and is left out."""
        results = {}
        for name in list(self.clients):
            try:
                results[name] = self.clients[name](do, timeout_s=timeout_s, **arguments)
            except NotOffered:
                continue
            except PeerFailed as exc:
                self.dismiss(name, exc)
        return results

    def turns(
        self,
        call: Callable[[str, Client], Any],
        *,
        names: Sequence[str] | None = None,
        quietly: bool = False,
        rounds: int = 1,
    ) -> dict[str, list[Any]]:
        """Measure all in turns; in every repetition in another order.

        Args:
            call: Measures one, given its name and worker.
            names: Whom; default: all.
            quietly: Do not report who does not offer it.
            rounds: In every repetition; short rounds spread what disturbs over all alike.

        Returns:
            What the call returned, of those with whom it always worked.
        """
        failed: dict[str, Exception] = {}

        def case(name: str) -> Callable[[], Any]:
            def run() -> Any:
                if name in failed:
                    return None
                try:
                    return call(name, self.clients[name])
                except (PeerFailed, NotOffered) as exc:
                    failed[name] = exc
                    return None

            return run

        taking_part = [name for name in (names or self.clients) if name in self.clients]
        if not taking_part:
            return {}
        results = in_turns(
            {name: case(name) for name in taking_part}, rounds * self._arguments.repetitions
        )
        for name, exc in failed.items():
            if not (quietly and isinstance(exc, NotOffered)):
                self._report.skip(name, exc)
        return {name: values for name, values in results.items() if name not in failed}


def compare(
    report: Report,
    metric: str,
    title: str,
    unit: str,
    values: Mapping[str, Sequence[float]],
    *,
    physical: str | None = None,
    better: str = "higher",
    tags: Mapping[str, Any] | None = None,
) -> list[Row]:
    """Report one figure of all peers: against the physical reference, and expbuf against each.

    Args:
        report: Where to.
        metric: Its name for tables and plots.
        title: Its name for people.
        unit: Of the values.
        values: By peer and repetition.
        physical: Which of them is the reference.
        better: "higher" or "lower".
        tags: More facts for the rows.
    """
    ours = values.get(OURS)
    rows = []
    for name in values:
        reference = None
        if physical is not None and physical in values and name != physical:
            n = min(len(values[name]), len(values[physical]))
            reference = (physical, values[physical][:n])
        against = {OURS: ours} if ours is not None and name != OURS and name != physical else None
        rows.append(
            report.add(
                f"{title}: {name}",
                values[name][: len(reference[1])] if reference else values[name],
                unit,
                reference=reference,
                against=against,
                tags={"metric": metric, "contender": name, "better": better, **(tags or {})},
            )
        )
    return rows


def of(results: Mapping[str, Sequence[Mapping[str, Any]]], key: str) -> dict[str, list[float]]:
    """One figure out of the results of `turns`."""
    return {name: [float(value[key]) for value in values] for name, values in results.items()}
