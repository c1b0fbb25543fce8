"""Other prioritized replay buffers, for benchmarks.sampling: each in a process of its own.

They need not be installed beside expbuf: whoever runs this has them. Commands come as lines of
JSON, answers go out as such:

    .venv-peers/bin/python -m benchmarks.replay_peers tianshou
    {"do": "fill", "n": 1000000, "dim": 384, "seed": 0}
    {"do": "time", "what": "sample", "calls": 1000}

Imports nothing of expbuf.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

DIM = 384
BATCH = 256
ALPHA, BETA = 0.6, 0.4
CHUNK = 4096
HERE = Path(__file__).resolve().parents[1]

Operation = Callable[[], Any]
Update = Callable[[NDArray[np.int64], NDArray[np.float32]], Any]
Priorities = NDArray[np.float32]


class Contender:
    """What is measured of one buffer.

    Attributes:
        sample: Draw a batch with its data and weights.
        ids: Draw ids and weights alone; None where that cannot be had.
        update: Set priorities.
    """

    def __init__(self, sample: Operation, update: Update, ids: Operation | None = None) -> None:
        self.sample = sample
        self.ids = ids
        self.update = update


# ---------------------------------------------------------------- what is timed, ours too


def priorities_of(n: int, rng: np.random.Generator) -> Priorities:
    """What n experiences begin with."""
    return rng.random(n).astype(np.float32) + np.float32(0.01)


def blocks(rng: np.random.Generator, n: int, dim: int) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """Embeddings of n rows, some at a time."""
    for start in range(0, n, CHUNK):
        yield start, rng.standard_normal((min(CHUNK, n - start), dim), dtype=np.float32)


class Changes:
    """Other rows and other priorities for every update."""

    def __init__(self, rng: np.random.Generator, n: int) -> None:
        self._rng, self._n = rng, n
        self.draw()

    def draw(self) -> None:
        """Prepare the next."""
        self.ids = self._rng.integers(0, self._n, BATCH)
        self.priorities = self._rng.random(BATCH).astype(np.float32) + np.float32(0.01)

    def made_by(self, update: Update) -> Operation:
        """Make the prepared one."""
        return lambda: update(self.ids, self.priorities)

    def then(self, update: Update, draw: Operation) -> Operation:
        """Make the prepared one, and draw."""

        def cycle() -> None:
            update(self.ids, self.priorities)
            draw()

        return cycle


def typical(operation: Operation, calls: int, before: Operation | None = None) -> float:
    """Median time of a call in microseconds; `before` is called before each, and not timed."""
    times = []
    for _ in range(calls):
        if before is not None:
            before()
        started = time.perf_counter()
        operation()
        times.append(time.perf_counter() - started)
    return float(np.median(times)) * 1e6


# ---------------------------------------------------------------- the peers


def cpprb(n: int, dim: int, priorities: Priorities, rng: np.random.Generator) -> Contender:
    module: Any = importlib.import_module("cpprb")

    def filled(columns: dict[str, Any], data: bool) -> Any:
        buffer = module.PrioritizedReplayBuffer(n, columns, alpha=ALPHA)
        for start, block in blocks(rng, n, dim):
            some = np.zeros(len(block))
            part = priorities[start : start + len(block)]
            rows = dict.fromkeys(columns, some) | ({"obs": block} if data else {})
            buffer.add(**rows, priorities=part)
        return buffer

    buffer = filled({"obs": {"shape": dim}, "act": {}, "rew": {}}, True)
    # It has no call for ids and weights alone; with one number a row that is nearly what it does.
    bare = filled({"act": {}}, False)
    return Contender(
        lambda: buffer.sample(BATCH, beta=BETA),
        buffer.update_priorities,
        lambda: bare.sample(BATCH, beta=BETA),
    )


def torchrl(n: int, dim: int, priorities: Priorities, rng: np.random.Generator) -> Contender:
    torch: Any = importlib.import_module("torch")
    data: Any = importlib.import_module("torchrl.data")
    tensordict: Any = importlib.import_module("tensordict")
    torch.set_num_threads(1)
    buffer = data.TensorDictPrioritizedReplayBuffer(
        alpha=ALPHA, beta=BETA, storage=data.LazyTensorStorage(n), batch_size=BATCH
    )
    for _, block in blocks(rng, n, dim):
        some = torch.zeros(len(block))
        columns = {"obs": torch.from_numpy(block), "act": some, "rew": some}
        buffer.extend(tensordict.TensorDict(columns, batch_size=[len(block)]))
    buffer.update_priority(torch.arange(n), torch.from_numpy(priorities))
    return Contender(
        buffer.sample,
        lambda ids, p: buffer.update_priority(torch.from_numpy(ids), torch.from_numpy(p)),
        lambda: buffer.sampler.sample(buffer.storage, BATCH),
    )


def tianshou(n: int, dim: int, priorities: Priorities, rng: np.random.Generator) -> Contender:
    data: Any = importlib.import_module("tianshou.data")
    buffer = data.PrioritizedReplayBuffer(n, alpha=ALPHA, beta=BETA, ignore_obs_next=True)
    row = data.Batch(
        obs=np.zeros(dim, np.float32), act=0, rew=0.0, terminated=False, truncated=False, info={}
    )
    # It adds one by one, which would take a minute: one for the shapes, the rest into its arrays.
    buffer.add(row)
    for start, block in blocks(rng, n, dim):
        buffer._meta.obs[start : start + len(block)] = block
    buffer._size = n
    buffer.update_weight(np.arange(n), priorities)
    return Contender(
        lambda: buffer.sample(BATCH),
        buffer.update_weight,
        lambda: buffer.get_weight(buffer.sample_indices(BATCH)),
    )


PEERS = {"cpprb": cpprb, "TorchRL": torchrl, "tianshou": tianshou}


# ---------------------------------------------------------------- the process


def _serve(name: str) -> None:
    answers, sys.stdout = sys.stdout, sys.stderr  # what a library prints is no answer
    rng, contender = np.random.default_rng(), None
    for line in sys.stdin:
        command = json.loads(line)
        if command["do"] == "fill":
            n, rng = command["n"], np.random.default_rng(command["seed"])
            contender = PEERS[name](n, command["dim"], priorities_of(n, rng), rng)
            changes = Changes(rng, n)
            draw = contender.ids or contender.sample
            offered = {
                "sample": (contender.sample, None),
                "ids": (contender.ids, None),
                "update": (changes.made_by(contender.update), changes.draw),
                "cycle": (changes.then(contender.update, draw), changes.draw),
            }
            answer: Any = importlib.metadata.version(name.lower())
        else:
            operation, before = offered[command["what"]]
            answer = operation and typical(operation, command["calls"], before)
        print(json.dumps(answer), file=answers, flush=True)


class Unavailable(Exception):
    """A peer is not installed, or failed; the message says how."""


class Replayer(AbstractContextManager["Replayer"]):
    """A process with one peer's buffer in it.

    Args:
        name: Of `PEERS`.
        python: That has it.
        log: For what it writes to its standard error.

    Raises:
        Unavailable: It does not start.
    """

    def __init__(self, name: str, python: Path, log: Path) -> None:
        self._log = log
        if not python.exists():
            raise Unavailable(f"no {python}: make bench-peers")
        with log.open("ab") as errors:
            self._process = subprocess.Popen(
                [str(python), "-m", "benchmarks.replay_peers", name],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                cwd=HERE,
                env={**os.environ, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"},
            )

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.kill()
        self._process.communicate()

    def _ask(self, **command: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            print(json.dumps(command), file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            said = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            raise Unavailable(said[-1] if said else "it ended without a word")
        return json.loads(line)

    def fill(self, n: int, seed: int, dim: int = DIM) -> str:
        """Fill it with n rows. Returns its version."""
        return str(self._ask(do="fill", n=n, dim=dim, seed=seed))

    def time(self, what: str, calls: int) -> float | None:
        """Microseconds of "sample", "ids", "update", or "cycle": an update, then ids.

        None where it has no such thing.
        """
        answer = self._ask(do="time", what=what, calls=calls)
        return None if answer is None else float(answer)


if __name__ == "__main__":
    _serve(sys.argv[1])
