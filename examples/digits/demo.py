"""Watch an agent learn from its own memory, get killed, come back with everything, and go on.

    python examples/digits/demo.py

The agent lives in a process of its own (worker.py), which kills itself with SIGKILL in the middle
of the stream. A new process opens the memory; and this one, which has kept books (ledger.py),
compares what the memory had acknowledged with what is found. At the end: a table and a picture.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import shutil
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from life import Event, Life, Stream, WorkerFailed
from numpy.typing import NDArray
from screen import Bar, bold, dim, red, say, table
from world import KINDS, Scans, World

FIRST_SEED = 10  # the settings of the agent were found on other streams


class Demo:
    """Streams of questions, each answered with memory off and with memory on.

    Args:
        scans: What the questions are about.
        questions: Length of each stream; None: every scan once.
        streams: How many.
        folder: For the memories.
    """

    def __init__(self, scans: Scans, questions: int | None, streams: int, folder: Path) -> None:
        self.worlds = [World(scans, FIRST_SEED + i, questions) for i in range(streams)]
        self.questions = len(self.worlds[0])
        self.half = self.questions // 2
        self.window = min(200, max(1, self.questions // 3))
        self.off = [Stream(world.seed) for world in self.worlds]
        self.on = [Stream(world.seed) for world in self.worlds]
        self._folder = folder
        self._scans = folder / "scans.npz"
        scans.write(self._scans)

    # ------------------------------------------------------------ one stream, step by step

    def watch(self) -> None:
        """Show the first stream: memory off, memory on, the kill, and the return."""
        off, on = self.off[0], self.on[0]
        self._show("memory off", off, self._options())
        killed = self._show("memory on", on, self._options(on, "--die-at", str(self.half)))
        death = on.die()
        say()
        say(f"  {red(f'Process {killed} is dead')}, by SIGKILL. It had answered question")
        say(f"  {self.half + 1}, and did not live to hear whether that was right.")
        say()

        def tell(event: Event, pid: int) -> None:
            if event["event"] == "found":
                state = "NOT AS THEY WERE:" if death.wrong else "in order, all as they were"
                say(
                    f"  acknowledged before      {bold(f'{death.acknowledged:5}')} experiences,"
                    f" {death.outcomes} outcomes of recalls"
                )
                say(f"  found by process {pid:<7} {bold(f'{death.found:5}')} experiences, {state}")
                for line in death.wrong:
                    say(f"    {red(line)}")
                say(f"  found by searching       {bold(f'{death.searchable:5}')} experiences")
                say(dim(f"  {event['report']}"))
            elif event["event"] == "relived":
                say()
                say("  The network died with the process, and is learnt again from the memory:")
                say(f"  {event['seconds']:.1f} s. On with question {death.acknowledged + 1}.")
                say()

        self._show("memory on", on, self._options(on, "--stock"), tell)

    def _show(
        self,
        label: str,
        stream: Stream,
        options: list[str],
        tell: Callable[[Event, int], None] = lambda event, pid: None,
    ) -> int:
        """Follow a process with a progress bar; returns its process id."""
        bar: Bar | None = None

        def note() -> str:
            recent = stream.verdicts()[-self.window :]
            return f"{recent.mean():4.0%} of the last {len(recent)} right" if len(recent) else ""

        def see(event: Event) -> None:
            nonlocal bar
            tell(event, life.pid)
            if event["event"] == "answering" and bar is None:
                bar = Bar(label, self.questions, len(stream.right))
            elif event["event"] == "judged" and bar is not None:
                bar.update(len(stream.right), note)

        life = Life(stream, options, see)
        life.follow()
        if bar is not None:
            bar.finish(len(stream.right), note)
        return life.pid

    def _options(self, stream: Stream | None = None, *more: str) -> list[str]:
        options = ["--scans", str(self._scans), "--questions", str(self.questions), *more]
        if stream is not None:
            options += ["--memory", str(self._folder / f"stream-{stream.seed}")]
        return options

    # ------------------------------------------------------------ the other streams

    def repeat(self) -> None:
        """Do the same with the other streams, but kill their processes at random moments."""
        off, on = self.off[1:], self.on[1:]
        if not off:
            return
        bar = Bar(f"{len(off)} more", 2 * len(off) * self.questions)

        def note() -> str:
            return "streams of questions, off and on"

        with ThreadPoolExecutor(min(2, os.cpu_count() or 1)) as pool:
            jobs = [pool.submit(self._kill_at_random, stream) for stream in on]
            jobs += [pool.submit(self._leave_alone, stream) for stream in off]
            while not all(job.done() for job in jobs):
                time.sleep(0.1)
                bar.update(sum(len(stream.right) for stream in (*off, *on)), note)
            for job in jobs:
                job.result()
        bar.finish(sum(len(stream.right) for stream in (*off, *on)), note)

    def _leave_alone(self, stream: Stream) -> None:
        Life(stream, self._options()).follow()

    def _kill_at_random(self, stream: Stream) -> None:
        def see(event: Event) -> None:
            if event["event"] == "judged" and event["position"] == self.half:
                # A question takes some milliseconds: whatever it is doing then.
                threading.Timer(random.uniform(0.0, 0.015), life.kill).start()

        # Under "group" nobody waits for the disk, and a killed process loses as little: nothing.
        fast = ("--durability", "group")
        life = Life(stream, self._options(stream, *fast), see)
        if life.follow():
            stream.die()
            Life(stream, self._options(stream, "--stock", *fast)).follow()

    # ------------------------------------------------------------ what came of it

    def figures(self) -> dict[str, Any]:
        """All that table and picture show, JSON-like."""
        return {
            "questions": self.questions,
            "window": self.window,
            "kinds": [kind.name for kind in KINDS],
            "memory_off": float(self._tail(self.off).mean()),
            "memory_on": float(self._tail(self.on).mean()),
            "streams": [
                {
                    "seed": on.seed,
                    "kinds": "".join(str(world[i].kind) for i in range(self.questions)),
                    "memory_off": "".join(str(int(right)) for right in off.verdicts()),
                    "memory_on": "".join(str(int(right)) for right in on.verdicts()),
                    "deaths": [asdict(death) for death in on.deaths],
                    "recalled": on.recalled,
                }
                for world, off, on in zip(self.worlds, self.off, self.on, strict=True)
            ],
        }

    def report(self) -> bool:
        """Print the table; returns whether every memory kept what it had acknowledged."""
        off, on = self._tail(self.off), self._tail(self.on)
        first = self.questions - self.window
        kinds = np.array([[w[first + i].kind for i in range(self.window)] for w in self.worlds])
        rows = [
            [kind.name, f"{off[kinds == i].mean():.0%}", f"{on[kinds == i].mean():.0%}"]
            for i, kind in enumerate(KINDS)
            if (kinds == i).any()
        ]
        rows += [[], ["all questions", f"{off.mean():.1%}", f"{on.mean():.1%}"]]
        if len(off) > 1:
            spread = [f"± {answers.mean(axis=1).std(ddof=1):.1%}" for answers in (off, on)]
            rows += [["between streams", *spread]]
        say()
        table([f"right of the last {self.window}", "memory off", "memory on"], rows)
        say()
        deaths = [death for stream in self.on for death in stream.deaths]
        acknowledged = sum(death.acknowledged for death in deaths)
        found = sum(death.found for death in deaths)
        killed = "1 process" if len(deaths) == 1 else f"{len(deaths)} processes"
        say(f"  {killed} killed; {acknowledged} experiences acknowledged, {found} found.")
        if found > acknowledged:
            say(dim(f"  ({found - acknowledged} of them written, but not yet acknowledged.)"))
        wrong = [line for death in deaths for line in death.wrong]
        for line in wrong:
            say(f"  {red(line)}")
        return not wrong

    def _tail(self, streams: list[Stream]) -> NDArray[np.float64]:
        return np.array([stream.verdicts()[-self.window :] for stream in streams])


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--questions", type=int, help="length of a stream; default: all scans")
    parser.add_argument("--streams", type=int, default=5, help="how many; default: 5")
    parser.add_argument("--output", type=Path, default=Path("demo_output"), help="folder")
    parser.add_argument("--no-picture", action="store_true")
    arguments = parser.parse_args()
    if arguments.streams < 1 or (arguments.questions or 1797) < 10:
        parser.error("at least 1 stream and 10 questions")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal without UTF-8 shows question marks

    began = time.monotonic()
    memories = arguments.output / "memories"
    shutil.rmtree(memories, ignore_errors=True)
    memories.mkdir(parents=True)
    scans = Scans.load()
    demo = Demo(scans, arguments.questions, arguments.streams, memories)
    say()
    say(f"  {bold('An agent that remembers')}")
    say(
        f"  {demo.questions} scans of handwritten digits, and a question about each. It starts from"
    )
    say("  scratch, and is only ever told whether its answer was right.")
    say()
    demo.watch()
    demo.repeat()
    kept = demo.report()
    figures = demo.figures()
    (arguments.output / "figures.json").write_text(json.dumps(figures), encoding="utf-8")
    if not arguments.no_picture:
        from plots import draw  # matplotlib takes a while to import

        picture = arguments.output / "demo.png"
        draw(figures, scans.images, picture)
        say(f"  The picture: {bold(str(picture))}")
    command = os.path.relpath(Path(sys.executable).with_name("expbuf"))
    say(f"  A memory:    {bold(f'{command} report {memories}/stream-{FIRST_SEED}')}")
    say(dim(f"  {time.monotonic() - began:.0f} s"))
    say()
    return 0 if kept else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
    except WorkerFailed as failed:
        sys.exit(f"\n{failed}")
