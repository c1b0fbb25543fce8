"""Watch an agent learn from its own memory, get killed, come back with everything, and go on.

    python examples/digits/demo.py

The agent lives in a process of its own (worker.py). In the middle of the stream it kills itself
with SIGKILL; a new process opens the memory, and this one, which kept the books (ledger.py),
compares what was acknowledged with what was found. At the end: a table, and a picture.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from ledger import Ledger
from numpy.typing import NDArray
from screen import Bar, bold, dim, say, style, table
from world import KINDS, World

WORKER = Path(__file__).with_name("worker.py")
FIRST_SEED = 10


@dataclass
class Death:
    """A kill, and what became of the memory.

    Attributes:
        questions: Answered before, and judged.
        acknowledged: Experiences that the memory had acknowledged.
        outcomes: The same, for outcomes of retrievals.
        found: Experiences that the next process found.
        searchable: How many of them a search finds.
        wrong: What was not as acknowledged; empty if all is well.
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
        deaths: How often it was killed.
        recalled: What a few questions brought to mind.
    """

    seed: int
    right: dict[int, bool] = field(default_factory=dict)
    deaths: list[Death] = field(default_factory=list)
    recalled: list[dict[str, Any]] = field(default_factory=list)
    ledger: Ledger = field(default_factory=Ledger)

    @property
    def verdicts(self) -> NDArray[np.float64]:
        """1.0 where the answer was right, by position."""
        return np.array([self.right[position] for position in sorted(self.right)], dtype=float)


class WorkerFailed(RuntimeError):
    """The process of an agent ended, and nobody had killed it."""


class Life:
    """One process of an agent, followed until it ends.

    Args:
        stream: What it says goes in here.
        options: Command line of the worker.
        on_event: Called with everything it says.
    """

    def __init__(
        self,
        stream: Stream,
        options: list[str],
        on_event: Callable[[dict[str, Any]], None] = lambda event: None,
    ) -> None:
        self._stream = stream
        self._on_event = on_event
        # The matrices are small: threads of a BLAS would only wait for each other.
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        command = [sys.executable, str(WORKER), "--seed", str(stream.seed), *options]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment)
        self.pid = self._process.pid

    def follow(self) -> bool:
        """Read all that the process says until it ends; returns whether it was killed."""
        assert self._process.stdout is not None
        try:
            for line in self._process.stdout:
                if line.endswith(b"\n"):  # else it died while it said so
                    self._note(json.loads(line))
        except BaseException:
            self.kill()
            raise
        finally:
            self._process.stdout.close()
            status = self._process.wait()
        if status not in (0, -signal.SIGKILL):
            raise WorkerFailed(f"the process of the agent ended with status {status}")
        return status != 0

    def kill(self) -> None:
        """End it, as power loss would: nothing is asked, nothing is closed."""
        self._process.kill()

    def _note(self, event: dict[str, Any]) -> None:
        stream = self._stream
        stream.ledger.note(event)
        if event["event"] == "judged":
            stream.right[event["position"]] = event["right"]
        elif event["event"] == "recalled":
            stream.recalled.append(event)
        elif event["event"] == "found" and stream.deaths:
            death = stream.deaths[-1]
            death.found = len(event["experiences"])
            death.searchable = event["searchable"]
            death.wrong = stream.ledger.audit(event["experiences"])
        self._on_event(event)

    def bury(self) -> Death:
        """Take down what had been acknowledged when it was killed."""
        stream = self._stream
        ledger = stream.ledger
        death = Death(len(stream.right), len(ledger.entries), ledger.outcomes)
        stream.deaths.append(death)
        return death


# ---------------------------------------------------------------- the stream that is watched


class Demo:
    """The whole demonstration.

    Args:
        questions: Length of each stream.
        streams: How many, each with memory off and on.
        folder: Where memories, picture and figures go.
    """

    def __init__(self, questions: int, streams: int, folder: Path) -> None:
        self.questions, self.folder = questions, folder
        self.seeds = [FIRST_SEED + i for i in range(streams)]
        self.worlds = {seed: World(seed, questions) for seed in self.seeds}
        self.questions = len(self.worlds[self.seeds[0]])
        self.window = min(200, max(1, self.questions // 3))
        self.half = self.questions // 2
        self.memories = folder / "memories"
        self.off: list[Stream] = []
        self.on: list[Stream] = []

    def options(self, seed: int, *more: str) -> list[str]:
        """Command line of a worker with memory."""
        memory = str(self.memories / f"stream-{seed}")
        return ["--questions", str(self.questions), "--memory", memory, *more]

    def watch(self) -> None:
        """The first stream, step by step: memory off, memory on, the kill, the return."""
        seed = self.seeds[0]
        self.off.append(Stream(seed))
        self._show("memory off", self.off[0], ["--questions", str(self.questions)])

        self.on.append(Stream(seed))
        stream = self.on[0]
        life = self._show("memory on", stream, self.options(seed, "--die-at", str(self.half)))
        death = life.bury()
        say()
        say(
            f"  {style(f'Process {life.pid} is dead', '1;31')}: SIGKILL, after it had answered question"
        )
        say(f"  {self.half + 1} and before it knew whether it was right. No close(), no save.")
        say()
        self._show("memory on", stream, self.options(seed, "--stock"), lambda event, pid: (
            self._recovered(event, pid, death)
        ))  # fmt: skip

    def _show(
        self,
        label: str,
        stream: Stream,
        options: list[str],
        on_event: Callable[[dict[str, Any], int], None] = lambda event, pid: None,
    ) -> Life:
        bar: list[Bar] = []

        def note() -> str:
            recent = stream.verdicts[-self.window :]
            return f"{recent.mean():4.0%} of the last {len(recent)} right"

        def see(event: dict[str, Any]) -> None:
            on_event(event, life.pid)
            if event["event"] == "answering" and not bar:
                bar.append(Bar(label, self.questions, len(stream.right)))
            if event["event"] == "judged" and bar:
                bar[0].update(len(stream.right), note())

        life = Life(stream, options, see)
        life.follow()
        if bar:
            bar[0].finish(len(stream.right), note() if stream.right else "")
        return life

    def _recovered(self, event: dict[str, Any], pid: int, death: Death) -> None:
        if event["event"] == "found":
            say(f"  acknowledged before it died  {bold(f'{death.acknowledged:5}')} experiences, "
                f"{death.outcomes} outcomes")  # fmt: skip
            say(f"  found by process {pid:<11} {bold(f'{death.found:5}')} experiences, "
                f"{'in order, every answer, reward and counter as it was' if not death.wrong else 'NOT AS THEY WERE'}")  # noqa: E501  # fmt: skip
            for line in death.wrong:
                say(f"    {style(line, '31')}")
            say(f"  found by search              {bold(f'{death.searchable:5}')} of them")
        elif event["event"] == "relived":
            say(
                f"  Its network is gone; rebuilt from the memory in {event['seconds']:.1f} s. It goes on."
            )
            say()

    # ------------------------------------------------------------ the other streams

    def repeat(self) -> None:
        """The same with the other streams; their processes are killed at random moments."""
        seeds = self.seeds[1:]
        if not seeds:
            return
        off, on = [Stream(seed) for seed in seeds], [Stream(seed) for seed in seeds]
        total = 2 * len(seeds) * self.questions
        bar = Bar(f"{len(seeds)} more {'stream' if len(seeds) == 1 else 'streams'}", total)

        def done() -> int:
            return sum(len(stream.right) for stream in (*off, *on))

        with ThreadPoolExecutor(min(2, os.cpu_count() or 1)) as pool:
            futures = [pool.submit(self._with_memory, stream) for stream in on]
            plain = ["--questions", str(self.questions)]
            futures += [pool.submit(Life(stream, plain).follow) for stream in off]
            while not all(future.done() for future in futures):
                time.sleep(0.1)
                bar.update(done(), "off and on")
            for future in futures:
                future.result()
        bar.finish(total, "off and on")
        self.off += off
        self.on += on

    def _with_memory(self, stream: Stream) -> None:
        killer: list[threading.Timer] = []

        def see(event: dict[str, Any]) -> None:
            if event["event"] == "judged" and event["position"] == self.half and not killer:
                # Within the few milliseconds of one question, anywhere.
                killer.append(threading.Timer(random.uniform(0.0, 0.01), first.kill))
                killer[0].start()

        first = Life(stream, self.options(stream.seed), see)
        if first.follow():
            first.bury()
            Life(stream, self.options(stream.seed, "--stock")).follow()

    # ------------------------------------------------------------ what came of it

    def report(self) -> bool:
        """Print the table; returns whether no memory lost anything."""
        off, on = self.tail(self.off), self.tail(self.on)
        kinds = np.array([[self.worlds[seed]._kinds[-self.window :]] for seed in self.seeds])
        rows = [
            [name.name, f"{off[kinds[:, 0] == i].mean():.0%}", f"{on[kinds[:, 0] == i].mean():.0%}"]
            for i, name in enumerate(KINDS)
            if (kinds == i).any()
        ]
        spread = [f"± {values.mean(axis=1).std():.0%}" for values in (off, on)]
        rows += [
            [],
            ["all questions", f"{off.mean():.1%}", f"{on.mean():.1%}"],
            ["between streams", *spread],
        ]
        say()
        table([f"right, last {self.window} of {self.questions}", "memory off", "memory on"], rows)
        deaths = [death for stream in self.on for death in stream.deaths]
        acknowledged = sum(death.acknowledged for death in deaths)
        found = sum(death.found for death in deaths)
        wrong = [line for death in deaths for line in death.wrong]
        wrong += [
            "not everything is found by search"
            for death in deaths
            if death.searchable != death.found
        ]
        say()
        say(f"  {len(deaths)} processes killed; {acknowledged} experiences acknowledged before, "
            f"{found} found after.")  # fmt: skip
        if found > acknowledged:
            say(dim(f"  ({found - acknowledged} had been written, but not yet acknowledged.)"))
        for line in wrong:
            say(f"  {style(line, '1;31')}")
        return not wrong

    def tail(self, streams: list[Stream]) -> NDArray[np.float64]:
        """Verdicts on the last questions, (streams, window)."""
        return np.array([stream.verdicts[-self.window :] for stream in streams])

    def save(self) -> None:
        """Write the figures for whoever wants to read them."""
        figures = {
            "questions": self.questions,
            "window": self.window,
            "memory_off": float(self.tail(self.off).mean()),
            "memory_on": float(self.tail(self.on).mean()),
            "streams": [
                {
                    "seed": on.seed,
                    "memory_off": float(off.verdicts[-self.window :].mean()),
                    "memory_on": float(on.verdicts[-self.window :].mean()),
                    "deaths": [asdict(death) for death in on.deaths],
                }
                for off, on in zip(self.off, self.on, strict=True)
            ],
        }
        path = self.folder / "results.json"
        path.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--questions", type=int, help="length of a stream; default: all 1797 scans")
    parser.add_argument("--streams", type=int, default=5, help="how many; default: %(default)s")
    parser.add_argument(
        "--output", type=Path, default=Path("demo_output"), help="folder; default: %(default)s"
    )
    parser.add_argument("--no-picture", action="store_true")
    arguments = parser.parse_args()
    if sys.stdout.encoding.lower() != "utf-8":
        sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    began = time.monotonic()
    arguments.output.mkdir(parents=True, exist_ok=True)

    demo = Demo(arguments.questions, max(1, arguments.streams), arguments.output)
    shutil.rmtree(demo.memories, ignore_errors=True)
    say(bold("\nAn agent that remembers"))
    say(
        f"{demo.questions} scans of handwritten digits, a question about each. The agent starts from"
    )
    say("scratch and is told only whether its answers were right.\n")
    demo.watch()
    demo.repeat()
    kept = demo.report()
    demo.save()
    if not arguments.no_picture:
        from plots import draw  # matplotlib takes a second to import

        draw(demo, arguments.output / "demo.png")
        say(f"  Picture: {bold(str(arguments.output / 'demo.png'))}")
    say(dim(f"  {time.monotonic() - began:.0f} s\n"))
    return 0 if kept else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
