"""`expbuf demo`: an agent learns from its own answers, is killed in the middle, and goes on.

The world is made up, so that nothing has to be downloaded: things of some kinds, seen through
noise, by a model that is right about half the time and never learns. What it gets better by is its
memory alone. The agent is a process of its own, which is ended by SIGKILL, without a word.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from expbuf_core.buffer import ExperienceBuffer
from expbuf_core.config_schema import load_config
from expbuf_core.errors import StorageError
from expbuf_core.inference import TemporalEnsemble
from expbuf_core.plugins import default_registry

Progress = Callable[[int, int], None]

_KINDS, _DIM = 20, 32
_RIGHT = 0.5  # of the model's own answers
_NOISE = 0.55
_PART = 10  # lines of the report


class DemoReport(NamedTuple):
    """What happened.

    Attributes:
        questions: That were asked.
        alone: Share of right answers of the model alone, in each tenth of the questions.
        with_memory: The same of the agent with its memory.
        killed_at: Question at which the agent was killed.
        acknowledged: Experiences that had been acknowledged then.
        found: Experiences that were there when it was opened again.
        lost: Acknowledged ones that were not there.
        folder: Of the buffer; None where it was not kept.
    """

    questions: int
    alone: tuple[float, ...]
    with_memory: tuple[float, ...]
    killed_at: int
    acknowledged: int
    found: int
    lost: int
    folder: str | None

    def __str__(self) -> str:
        lines = ["right answers    the model alone    with its memory"]
        killed = (self.killed_at - 1) * len(self.alone) // max(self.questions, 1)
        for i, (alone, memory) in enumerate(zip(self.alone, self.with_memory, strict=True)):
            first = i * self.questions // len(self.alone) + 1
            last = (i + 1) * self.questions // len(self.alone)
            bar = "█" * round(20 * memory)
            lines.append(f"{first:6d}–{last:<6d}   {alone:14.0%} {memory:18.0%}  {bar}")
            if i == killed:
                lines.append(
                    f"                 killed at question {self.killed_at}: {self.acknowledged} "
                    f"experiences acknowledged, {self.found} found, {self.lost} lost"
                )
        if self.folder is not None:
            lines.append(f"its memory is in {self.folder}: expbuf info {self.folder}")
        return "\n".join(lines)


def run(
    folder: str | os.PathLike[str] | None = None,
    questions: int = 1000,
    *,
    seed: int = 0,
    progress: Progress | None = None,
) -> DemoReport:
    """Let the agent answer, kill it half-way, let it go on.

    Args:
        folder: Of its memory, a new one, which is kept; None: one that is removed afterwards.
        questions: At least 1.
        seed: Of the world.
        progress: Called with (done, total).

    Raises:
        StorageError: The folder exists, or cannot be written.
        PluginNotFound: The storage backend is not installed.
    """
    if folder is not None and Path(folder).exists():
        raise StorageError(f"{folder} exists already; name a new folder")
    default_registry().get("persistence", load_config().persistence.backend)
    scratch = Path(tempfile.mkdtemp(prefix="expbuf-demo.")) if folder is None else None
    memory = Path(folder) if folder is not None else Path(str(scratch)) / "memory"
    try:
        answers: list[tuple[bool, bool]] = []
        kill_at = max(1, questions // 2)
        acknowledged = found = 0
        for life in range(2):
            until = questions + 1 if life else kill_at
            for line in _life(memory, len(answers), questions, seed, until - len(answers)):
                if "found" in line:
                    found = line["found"]
                    continue
                answers.append((line["alone"], line["memory"]))
                acknowledged = line["stored"] if life == 0 else acknowledged
                if progress is not None:
                    progress(len(answers), questions)
        parts = np.array_split(np.array(answers, float), min(_PART, len(answers)))
        shares = [part.mean(axis=0) for part in parts]
        return DemoReport(
            questions=questions,
            alone=tuple(float(share[0]) for share in shares),
            with_memory=tuple(float(share[1]) for share in shares),
            killed_at=kill_at,
            acknowledged=acknowledged,
            found=found,
            lost=max(0, acknowledged - found),
            folder=None if folder is None else str(folder),
        )
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)


def _life(
    memory: Path, first: int, questions: int, seed: int, lines: int
) -> Iterator[dict[str, Any]]:
    """What an agent says, until it is through or has said so many lines: then it is killed."""
    command = [sys.executable, "-m", "expbuf_core.demo"]
    arguments = [str(memory), str(first), str(questions), str(seed)]
    # In a session of its own: Ctrl-C is for this process, which then ends the other one.
    agent = subprocess.Popen([*command, *arguments], stdout=subprocess.PIPE, start_new_session=True)
    assert agent.stdout is not None
    try:
        said = 0
        for raw in agent.stdout:
            line = json.loads(raw)
            yield line
            said += "found" not in line
            if said >= lines:
                agent.send_signal(signal.SIGKILL)
                break
    finally:
        agent.kill()
        agent.stdout.close()
        code = agent.wait()
    if code not in (0, -signal.SIGKILL):
        raise StorageError(f"the agent ended with code {code}; its message is above")


# ---------------------------------------------------------------- the agent's process


def _say(**facts: Any) -> None:
    sys.stdout.write(json.dumps(facts) + "\n")
    sys.stdout.flush()


def _agent(memory: str, first: int, questions: int, seed: int) -> None:
    """Answer the questions from `first` on."""
    kinds = np.random.default_rng(seed).standard_normal((2, _KINDS, _DIM))
    with ExperienceBuffer.open(memory, index="exact", index__builder="off") as buffer:
        _say(found=len(buffer))
        ensemble = TemporalEnsemble(buffer, k=8, await_feedback=True)
        for i in range(first, questions):
            rng = np.random.default_rng((seed, i))
            truth = int(rng.integers(_KINDS))
            v, q = kinds[:, truth] + _NOISE * rng.standard_normal((2, _DIM))
            guess = truth if rng.random() < _RIGHT else int(rng.integers(_KINDS))
            answer = ensemble.answer(
                v, q, question="what is it?", prediction=guess,
                confidence=float(rng.uniform(0.3, 0.7)),
            )  # fmt: skip
            right = bool(answer.answer == truth)
            ensemble.feedback(answer, correct=right)
            _say(alone=guess == truth, memory=right, stored=len(buffer))


if __name__ == "__main__":
    _agent(sys.argv[1], *map(int, sys.argv[2:5]))
