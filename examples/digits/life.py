"""Agents in processes of their own, followed by a parent that keeps the books."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from ledger import Ledger
from numpy.typing import NDArray

WORKER = Path(__file__).with_name("worker.py")

Event = dict[str, Any]


class WorkerFailed(RuntimeError):
    """The process of an agent ended with an error of its own."""


@dataclass
class Death:
    """A kill, and what became of the memory.

    Attributes:
        questions: Answered and judged before.
        acknowledged: Experiences that the memory had acknowledged.
        outcomes: Outcomes of retrievals that it had acknowledged.
        found: Experiences that the next process found.
        searchable: How many of them a search finds.
        wrong: What was not as acknowledged, in words; empty if all is well.
    """

    questions: int
    acknowledged: int
    outcomes: int
    found: int = 0
    searchable: int = 0
    wrong: list[str] = field(default_factory=list)


@dataclass
class Stream:
    """One agent and its stream of questions, over all of its processes.

    Attributes:
        seed: Of the stream.
        right: Verdicts by position.
        deaths: One for each time it was killed.
        recalled: What some questions brought to mind.
        ledger: What its memory has promised.
    """

    seed: int
    right: dict[int, bool] = field(default_factory=dict)
    deaths: list[Death] = field(default_factory=list)
    recalled: list[Event] = field(default_factory=list)
    ledger: Ledger = field(default_factory=Ledger)

    def verdicts(self) -> NDArray[np.float64]:
        """1.0 where the answer was right, else 0.0, by position."""
        return np.array([self.right[position] for position in sorted(self.right)], dtype=float)

    def note(self, event: Event) -> None:
        """Take down what its process says."""
        self.ledger.note(event)
        kind = event["event"]
        if kind == "judged":
            self.right[event["position"]] = event["right"]
        elif kind == "recalled":
            self.recalled.append(event)
        elif kind == "answered" and self.recalled:
            if self.recalled[-1]["position"] == event["position"]:
                self.recalled[-1]["answer"] = event["answer"]
        elif kind == "found" and self.deaths:
            death = self.deaths[-1]
            death.found = len(event["experiences"])
            death.searchable = event["searchable"]
            death.wrong = self.ledger.audit(event["experiences"])
            if death.searchable != death.found:
                death.wrong.append(f"search finds only {death.searchable} of {death.found}")

    def die(self) -> Death:
        """Take down what had been acknowledged when its process was killed."""
        death = Death(len(self.right), len(self.ledger.entries), self.ledger.outcomes)
        self.deaths.append(death)
        return death


class Life:
    """One process of an agent.

    Args:
        stream: What the process says is noted here.
        options: Of its command line.
        on_event: Called with everything it says.
    """

    def __init__(
        self, stream: Stream, options: list[str], on_event: Callable[[Event], None] | None = None
    ) -> None:
        self._stream = stream
        self._on_event = on_event
        # The matrices are small: several threads would only wait for each other.
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        command = [sys.executable, str(WORKER), "--seed", str(stream.seed), *options]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment)
        self.pid = self._process.pid

    def kill(self) -> None:
        """SIGKILL: nothing is asked, nothing is closed."""
        self._process.kill()

    def follow(self) -> bool:
        """Note what the process says until it ends.

        Returns:
            Whether it was killed.

        Raises:
            WorkerFailed: It ended with an error of its own.
        """
        said = self._process.stdout
        assert said is not None
        try:
            for line in said:
                if line.endswith(b"\n"):  # else it died in the middle of the word
                    event = json.loads(line)
                    self._stream.note(event)
                    if self._on_event is not None:
                        self._on_event(event)
        except BaseException:
            self.kill()
            raise
        finally:
            said.close()
            status = self._process.wait()
        if status not in (0, -signal.SIGKILL):
            raise WorkerFailed(f"an agent's process ended with status {status}; see above")
        return status != 0
