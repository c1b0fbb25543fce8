"""Prioritized sampling and updates, beside the replay buffers that people use for learning.

    python -m benchmarks.sampling --quick

Peers that are installed take part, each with its own prioritized buffer in memory; none of them
survives a kill. Every row is an embedding of 384 float32 and scalars. Calls are timed one by one,
and their median counts: what else the machine does falls on single calls. Every update is of other
rows with other priorities, since some peers do less for a repeated one.
"""

from __future__ import annotations

import argparse
import importlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.common import DIM, Report, Row, in_turns, parse, parser, run_groups, scratch
from expbuf_core import ExperienceBuffer
from expbuf_core.conditions import LiveColumns
from expbuf_core.sampling import PrioritySampler, SamplingSettings, importance_weights
from expbuf_core.state import State

BATCH = 256
ALPHA, BETA = 0.6, 0.4
_CHUNK = 4096

Operation = Callable[[], Any]
Update = Callable[[NDArray[np.int64], NDArray[np.float32]], Any]
Vectors = NDArray[np.float32]


class Contender:
    """What is measured of one buffer; None where it has no such thing.

    Attributes:
        sample: Draw a batch with its data and weights.
        ids: Draw ids and weights alone.
        update: Set priorities.
    """

    def __init__(self, sample: Operation, update: Update, ids: Operation | None = None) -> None:
        self.sample = sample
        self.ids = ids
        self.update = update


def _blocks(rng: np.random.Generator, n: int) -> Any:
    """Embeddings of n rows, some at a time."""
    for start in range(0, n, _CHUNK):
        size = min(_CHUNK, n - start)
        yield start, rng.standard_normal((size, DIM), dtype=np.float32)


def cpprb(n: int, priorities: NDArray[np.float32], rng: np.random.Generator) -> Contender:
    module: Any = importlib.import_module("cpprb")
    buffer = module.PrioritizedReplayBuffer(
        n, {"obs": {"shape": DIM}, "act": {}, "rew": {}}, alpha=ALPHA
    )
    for start, block in _blocks(rng, n):
        some = np.zeros(len(block))
        part = priorities[start : start + len(block)]
        buffer.add(obs=block, act=some, rew=some, priorities=part)
    return Contender(lambda: buffer.sample(BATCH, beta=BETA), buffer.update_priorities)


def torchrl(n: int, priorities: NDArray[np.float32], rng: np.random.Generator) -> Contender:
    torch: Any = importlib.import_module("torch")
    data: Any = importlib.import_module("torchrl.data")
    tensordict: Any = importlib.import_module("tensordict")
    torch.set_num_threads(1)
    buffer = data.TensorDictPrioritizedReplayBuffer(
        alpha=ALPHA, beta=BETA, storage=data.LazyTensorStorage(n), batch_size=BATCH
    )
    for _, block in _blocks(rng, n):
        some = torch.zeros(len(block))
        columns = {"obs": torch.from_numpy(block), "act": some, "rew": some}
        buffer.extend(tensordict.TensorDict(columns, batch_size=[len(block)]))
    buffer.update_priority(torch.arange(n), torch.from_numpy(priorities))
    return Contender(
        buffer.sample,
        lambda ids, p: buffer.update_priority(torch.from_numpy(ids), torch.from_numpy(p)),
        lambda: buffer.sampler.sample(buffer.storage, BATCH),
    )


def tianshou(n: int, priorities: NDArray[np.float32], rng: np.random.Generator) -> Contender:
    data: Any = importlib.import_module("tianshou.data")
    buffer = data.PrioritizedReplayBuffer(n, alpha=ALPHA, beta=BETA, ignore_obs_next=True)
    row = data.Batch(
        obs=np.zeros(DIM, np.float32), act=0, rew=0.0, terminated=False, truncated=False, info={}
    )
    # It adds one by one, which would take a minute: one for the shapes, the rest into its arrays.
    buffer.add(row)
    for start, block in _blocks(rng, n):
        buffer._meta.obs[start : start + len(block)] = block
    buffer._size = n
    buffer.update_weight(np.arange(n), priorities)
    return Contender(
        lambda: buffer.sample(BATCH),
        buffer.update_weight,
        lambda: buffer.get_weight(buffer.sample_indices(BATCH)),
    )


PEERS = {"cpprb": cpprb, "TorchRL": torchrl, "tianshou": tianshou}


def peers(report: Report, n: int, priorities: NDArray[np.float32]) -> dict[str, Contender]:
    """Those that are installed, filled."""
    found = {}
    for name, make in PEERS.items():
        try:
            found[name] = make(n, priorities, np.random.default_rng(report.arguments.seed))
        except Exception as exc:
            report.skip(name, f"{type(exc).__name__}: {exc}")
    return found


def expbuf(
    path: Path | None, n: int, priorities: NDArray[np.float32], dim: int, seed: int, **settings: Any
) -> ExperienceBuffer:
    """A filled buffer whose ids begin at 0."""
    buffer = ExperienceBuffer.open(
        path,
        max_size=n,
        index={"backend": "exact", "builder": "off"},
        snapshot={"every_ops": 1 << 40},
        seed=seed,
        **settings,
    )
    rng = np.random.default_rng(seed)
    for start in range(0, n, _CHUNK):
        part = priorities[start : start + _CHUNK]
        block = rng.standard_normal((len(part), dim), dtype=np.float32)
        some = np.zeros(len(part))
        columns = {"v_embed": block, "confidence": some, "rewards": some}
        buffer.add_many(columns, priorities=part)
    if path is not None:
        buffer.sync()
    assert buffer.ids()[0] == 0
    return buffer


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


def measured(
    report: Report, cases: Mapping[str, Operation], calls: int, before: Operation | None = None
) -> dict[str, list[float]]:
    """Microseconds a call of each, measured in turns."""

    def timed(operation: Operation) -> Callable[[], float]:
        return lambda: typical(operation, calls, before)

    return in_turns(
        {name: timed(operation) for name, operation in cases.items()},
        report.arguments.repetitions,
    )


def told(
    report: Report,
    figures: Mapping[str, Sequence[float]],
    bounds: Mapping[str, tuple[str, Callable[[Mapping[str, float]], bool]]],
) -> None:
    """Report figures, ours in ratio to each peer's.

    Args:
        report: Where to.
        figures: By name; ours begin with "expbuf".
        bounds: For some of ours: the target in words, and whether the ratios to peers meet it.
    """
    others = {name: list(values) for name, values in figures.items() if name in PEERS}
    for name, values in figures.items():
        ours = name not in others
        ratios = {
            peer: float(np.median(np.array(values) / np.array(theirs)))
            for peer, theirs in others.items()
        }
        target, holds = bounds.get(name, ("", None))
        verdict = holds(ratios) if holds is not None and ratios else None
        report.add(
            name,
            values,
            "µs",
            against=others if ours else None,
            target=target,
            met=None if verdict is None else partial(_known, verdict),
        )


def _known(verdict: bool, _row: Row) -> bool:
    return verdict


def _among(first: int, end: int, live: LiveColumns) -> NDArray[np.bool_]:
    """A condition: ids from `first` to before `end`."""
    among: NDArray[np.bool_] = (live.id >= first) & (live.id < end)
    return among


def _at_most(factor: float, *names: str) -> Callable[[Mapping[str, float]], bool]:
    """The ratio to each of these peers, as far as they are here, is at most this."""
    return lambda ratios: all(
        ratio <= factor for name, ratio in ratios.items() if name in (names or PEERS)
    )


def replay(report: Report, arguments: argparse.Namespace) -> None:
    n = 50_000 if arguments.quick else 1_000_000
    calls = 200 if arguments.quick else 1000
    rng = np.random.default_rng(arguments.seed)
    priorities = rng.random(n).astype(np.float32) + np.float32(0.01)
    report.group(f"draw {BATCH} of {n:,}", f"{DIM} float32 and scalars; median of a call")
    with scratch(arguments) as folder, ExitStack() as stack:
        ours = stack.enter_context(
            expbuf(folder / "log", n, priorities, DIM, arguments.seed, durability="group")
        )
        small = stack.enter_context(expbuf(None, n, priorities, 8, arguments.seed))
        beside = peers(report, n, priorities)

        sampler, stream = ours._session.replica.sampler, np.random.default_rng(arguments.seed)
        trees: dict[str, Operation] = {
            "expbuf: draw, weights": lambda: importance_weights(
                sampler.draw(BATCH, rng=stream).probabilities, BETA
            ),
            "expbuf: sample, columns too": lambda: ours.sample(BATCH),
        }
        trees |= {name: peer.ids for name, peer in beside.items() if peer.ids is not None}
        report.skip("cpprb", "draws no ids and weights alone")
        found = measured(report, trees, calls)
        told(
            report,
            found,
            {
                "expbuf: draw, weights": (
                    "2 × tianshou, faster than TorchRL",
                    lambda ratios: ratios.get("tianshou", 0) <= 2 and ratios.get("TorchRL", 0) <= 1,
                )
            },
        )

        report.group(f"draw {BATCH} of {n:,} with data", "weights and embeddings as arrays")
        full = {name: peer.sample for name, peer in beside.items()}
        from_log = measured(
            report, {"expbuf: read from the log": lambda: ours.sample(BATCH).v_embed, **full}, calls
        )
        told(report, from_log, {})
        # As after a while of training: every embedding was read once.
        ours.close()
        config = {"cache_bytes": n * (4 * DIM + 16)}
        ours = stack.enter_context(
            ExperienceBuffer.open(
                folder / "log", sampling=config, index={"backend": "exact", "builder": "off"}
            )
        )
        for first in range(0, n, _CHUNK):
            _ = ours.sample(
                min(_CHUNK, n - first),
                where=partial(_among, first, first + _CHUNK),
                replace=False,
                uniform=True,
            ).v_embed
        cached = measured(
            report, {"expbuf: cache_bytes": lambda: ours.sample(BATCH).v_embed, **full}, calls
        )
        told(
            report,
            cached,
            {"expbuf: cache_bytes": ("not slower than the fastest", _at_most(1.0))},
        )

        changes = Changes(rng, n)
        report.group(f"update {BATCH} priorities of {n:,}", "median of a call")
        updates = {"expbuf: in memory": changes.made_by(small.update_priorities)}
        updates |= {name: changes.made_by(peer.update) for name, peer in beside.items()}
        told(
            report,
            measured(report, updates, calls, changes.draw),
            {"expbuf: in memory": ("faster than all", _at_most(1.0))},
        )
        report.group(
            f"update, then draw {BATCH} of {n:,}",
            "expbuf derives the weights of what was updated at the next draw; without data, but "
            "for cpprb",
        )

        def both(update: Update, draw: Operation) -> Operation:
            def cycle() -> None:
                update(changes.ids, changes.priorities)
                draw()

            return cycle

        cycles = {
            "expbuf: in memory": both(
                small.update_priorities, lambda: small._session.replica.sampler.draw(BATCH, rng=rng)
            )
        }
        cycles |= {
            name: both(peer.update, peer.ids or peer.sample) for name, peer in beside.items()
        }
        told(report, measured(report, cycles, calls, changes.draw), {})


def durable(report: Report, arguments: argparse.Namespace) -> None:
    n = 50_000 if arguments.quick else 1_000_000
    calls = 300 if arguments.quick else 2000
    rng = np.random.default_rng(arguments.seed)
    priorities = rng.random(n).astype(np.float32) + np.float32(0.01)
    changes = Changes(rng, n)
    report.group(f"durable updates of {BATCH} of {n:,}", "one thread")
    with scratch(arguments) as folder, ExitStack() as stack:
        cases: dict[str, Callable[[], float]] = {}
        expbuf(folder / "log", n, priorities, 8, arguments.seed, durability="group").close()
        for level in ("group", "sync"):
            buffer = stack.enter_context(
                ExperienceBuffer.open(
                    folder / "log", durability=level, index={"backend": "exact", "builder": "off"}
                )
            )

            def rate(buffer: ExperienceBuffer = buffer) -> float:
                started = time.perf_counter()
                for _ in range(calls):
                    buffer.update_priorities(rng.integers(0, n, BATCH), changes.priorities)
                buffer.sync()  # what was promised has to be kept within the time
                return calls / (time.perf_counter() - started)

            cases[f"expbuf: {level}"] = rate
        record = os.urandom(12 * BATCH + 96)
        with (folder / "raw").open("wb+") as raw:
            raw.write(bytes(len(record) * calls))
            raw.flush()
            os.fsync(raw.fileno())

            def disk() -> float:
                started = time.perf_counter()
                for i in range(calls):
                    os.pwrite(raw.fileno(), record, i * len(record))
                    os.fdatasync(raw.fileno())
                return calls / (time.perf_counter() - started)

            cases["the disk: as many bytes, each synced"] = disk
            found = in_turns(cases, arguments.repetitions)
    for name, values in found.items():
        limit = found["the disk: as many bytes, each synced"]
        report.add(
            name,
            values,
            "batches/s",
            reference=("the disk", limit) if name.startswith("expbuf") else None,
            target="2,000/s, or the disk" if name.endswith("group") else "",
            met=(lambda row: row.median >= 2000 or (row.ratio or 0) >= 1)
            if name.endswith("group")
            else None,
        )


def filled_state(n: int, rng: np.random.Generator) -> State:
    """The columns of n experiences without payloads: what drawing and updating looks at."""
    state = State()
    capacity = state.capacity
    while capacity < n:
        capacity *= 2
    state._grow(capacity)
    state.id[:n] = np.arange(n)
    state.priority[:n] = rng.random(n, dtype=np.float32)
    state.live[:n] = True
    state.tail = state.count = n
    return state


def growth(report: Report, arguments: argparse.Namespace) -> None:
    sizes = [10_000, 100_000, 1_000_000, *([] if arguments.quick else [10_000_000])]
    calls = 300 if arguments.quick else 1000
    report.group(
        f"draw and update {BATCH} of more and more",
        "columns and tree alone, without payloads and log; an update and the draw behind it, which "
        "derives the weights; median of a call",
    )
    rng = np.random.default_rng(arguments.seed)
    cases: dict[str, Callable[[], float]] = {}
    for n in sizes:
        state = filled_state(n, rng)
        sampler = PrioritySampler(state, SamplingSettings())
        changes = Changes(rng, n)
        draw = partial(sampler.draw, BATCH, rng=rng)
        cases[f"draw of {n:,}"] = partial(typical, draw, calls)
        cycle = partial(_cycle, state, sampler, changes, draw)
        cases[f"update and draw of {n:,}"] = partial(typical, cycle, calls, changes.draw)
    found = in_turns(cases, arguments.repetitions)
    for kind in ("draw", "update and draw"):
        first = found[f"{kind} of {sizes[0]:,}"]
        for n in sizes:
            allowed = 1 + float(np.log10(n / sizes[0]))
            more = n > sizes[0]
            report.add(
                f"{kind} of {n:,}",
                found[f"{kind} of {n:,}"],
                "µs",
                reference=(f"{sizes[0]:,}", first),
                target=f"a tenfold adds no more than {sizes[0]:,} take" if more else "",
                met=partial(_grown, allowed) if more else None,
            )


def _cycle(state: State, sampler: PrioritySampler, changes: Changes, draw: Operation) -> None:
    slots = state.find(changes.ids)
    state.priority.put(slots, changes.priorities)
    sampler.mark(slots)
    draw()


def _grown(allowed: float, row: Row) -> bool:
    return (row.ratio or 0.0) <= allowed


def main() -> None:
    made = parser("Prioritized sampling and updates.")
    run_groups(Report("sampling", parse(made)), [growth, durable, replay])


if __name__ == "__main__":
    main()
