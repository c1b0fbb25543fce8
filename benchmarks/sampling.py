"""Prioritized sampling and updates, beside the replay buffers that people use for learning.

    python -m benchmarks.sampling --quick

Peers that are installed take part, each with its own prioritized buffer in memory; none of them
survives a kill. expbuf's updates are measured in memory (`durability: os`, no sync is waited for)
and at `group`, which syncs within 10 ms.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import numpy as np

from benchmarks.common import Report, in_turns, parse, parser, run_groups, scratch, seconds
from expbuf_core import ExperienceBuffer
from expbuf_core.sum_tree import SumTree

BATCH = 256
DIM = 16  # of each embedding here: what is drawn does not depend on it
TURNS = 16  # different updates

Operation = Callable[[], Any]


class Peer:
    """What is measured of one buffer; None where it has no such thing."""

    def __init__(self, sample: Operation, update: Callable[[int], Any]) -> None:
        self.sample = sample
        self.update = update


def cpprb_peer(n: int, priorities: Any, updates: Any) -> Peer:
    cpprb: Any = importlib.import_module("cpprb")

    buffer = cpprb.PrioritizedReplayBuffer(n, {"obs": {"shape": 2 * DIM}, "rew": {}}, alpha=0.6)
    for start in range(0, n, 4096):
        part = priorities[start : start + 4096]
        buffer.add(
            obs=np.zeros((len(part), 2 * DIM), np.float32),
            rew=np.zeros(len(part)),
            priorities=part,
        )
    return Peer(
        lambda: buffer.sample(BATCH, beta=0.4),
        lambda i: buffer.update_priorities(updates[i][0], updates[i][1]),
    )


def torchrl_peer(n: int, priorities: Any, updates: Any) -> Peer:
    torch: Any = importlib.import_module("torch")
    data: Any = importlib.import_module("torchrl.data")
    tensordict: Any = importlib.import_module("tensordict")

    buffer = data.TensorDictPrioritizedReplayBuffer(
        alpha=0.6, beta=0.4, storage=data.LazyTensorStorage(n), batch_size=BATCH
    )
    for start in range(0, n, 1 << 16):
        size = min(1 << 16, n - start)
        buffer.extend(tensordict.TensorDict({"obs": torch.zeros(size, 2 * DIM)}, batch_size=[size]))
    buffer.update_priority(torch.arange(n), torch.from_numpy(priorities))
    tensors = [(torch.from_numpy(ids), torch.from_numpy(p)) for ids, p in updates]
    return Peer(buffer.sample, lambda i: buffer.update_priority(*tensors[i]))


def tianshou_peer(n: int, priorities: Any, updates: Any) -> Peer:
    data: Any = importlib.import_module("tianshou.data")

    buffer = data.PrioritizedReplayBuffer(n, alpha=0.6, beta=0.4)
    row = data.Batch(
        obs=np.zeros(2 * DIM, np.float32),
        act=0,
        rew=0.0,
        terminated=False,
        truncated=False,
        obs_next=np.zeros(1, np.float32),
        info={},
    )
    for _ in range(n):
        buffer.add(row)
    buffer.update_weight(np.arange(n), priorities)
    return Peer(lambda: buffer.sample(BATCH), lambda i: buffer.update_weight(*updates[i]))


PEERS = {"cpprb": cpprb_peer, "TorchRL": torchrl_peer, "tianshou": tianshou_peer}


def _microseconds(operation: Operation, n: int) -> float:
    return seconds(lambda: [operation() for _ in range(n)]) / n * 1e6


def _fill(buffer: ExperienceBuffer, rng: np.random.Generator, priorities: Any) -> None:
    for start in range(0, len(priorities), 4096):
        part = priorities[start : start + 4096]
        block = rng.standard_normal((len(part), DIM)).astype(np.float32)
        buffer.add_many({"v_embed": block, "q_embed": block}, priorities=part.tolist())


def replay(report: Report, arguments: argparse.Namespace) -> None:
    n = 100_000 if arguments.quick else 1_000_000
    calls = 200 if arguments.quick else 1000
    report.group(f"draw and update {BATCH} of {n:,}", "microseconds a call, one thread")
    rng = np.random.default_rng(arguments.seed)
    priorities = rng.random(n).astype(np.float32) + 0.01
    updates = [
        (rng.integers(0, n, BATCH), rng.random(BATCH).astype(np.float32) + 0.01)
        for _ in range(TURNS)
    ]
    settings: dict[str, Any] = {
        "max_size": n,
        "index": {"backend": "exact", "builder": "off"},
        "snapshot": {"every_ops": 1 << 40},
    }
    with scratch(arguments) as folder, ExitStack() as stack:
        ours = {}
        for level in ("os", "group"):
            ours[level] = stack.enter_context(
                ExperienceBuffer.open(folder / level, durability=level, **settings)
            )
            _fill(ours[level], rng, priorities)
            ours[level].sync()
            assert ours[level].ids()[0] == 0
        tree = SumTree(n)
        tree.rebuild(priorities)
        samples: dict[str, Operation] = {
            "expbuf sample: ids, weights, columns": lambda: ours["os"].sample(BATCH),
            "expbuf sample with embeddings": lambda: ours["os"].sample(BATCH).v_embed,
            "sum tree of expbuf alone": lambda: tree.find(rng.random(BATCH) * tree.total),
        }
        changes: dict[str, Callable[[int], Any]] = {
            "expbuf update_priorities, os": lambda i: ours["os"].update_priorities(*updates[i]),
            "expbuf update_priorities, group": lambda i: ours["group"].update_priorities(
                *updates[i]
            ),
            "sum tree of expbuf alone": lambda i: tree.update(*updates[i]),
        }
        for name, make in PEERS.items():
            try:
                peer = make(n, priorities, updates)
            except Exception as exc:
                report.skip(name, f"{type(exc).__name__}: {exc}")
                continue
            samples[f"{name} sample with data"] = peer.sample
            changes[f"{name} update"] = peer.update

        def drawn(operation: Operation) -> Operation:
            return lambda: _microseconds(operation, calls)

        def changed(operation: Callable[[int], Any]) -> Operation:
            return lambda: (
                _microseconds(lambda: [operation(i) for i in range(TURNS)], calls // TURNS) / TURNS
            )

        drawing = in_turns(
            {name: drawn(operation) for name, operation in samples.items()},
            arguments.repetitions,
        )
        changing = in_turns(
            {name: changed(operation) for name, operation in changes.items()},
            arguments.repetitions,
        )
    first = "expbuf sample: ids, weights, columns"
    for name, values in drawing.items():
        report.add(name, values, "µs", reference=("expbuf", drawing[first]))
    for name, values in changing.items():
        durable = name.endswith("group")
        report.add(
            name,
            values,
            "µs",
            reference=("expbuf, os", changing["expbuf update_priorities, os"]),
            target="500 µs, that is 2,000/s" if durable else "",
            met=(lambda row: row.median <= 500) if durable else None,
        )


def main() -> None:
    made = parser("Prioritized sampling and updates.")
    run_groups(Report("sampling", parse(made)), [replay])


if __name__ == "__main__":
    main()
