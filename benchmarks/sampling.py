"""Prioritized sampling and updates, beside the replay buffers that people use for learning.

    python -m benchmarks.sampling --quick

Peers that .venv-peers has (make bench-peers) take part, each with its own prioritized buffer in the
memory of a process of its own; none of them survives a kill. Every row is an embedding of 384
float32 and scalars. All are measured in turns, one process at a time. Calls are timed one by one,
and their median counts: what else the machine does falls on single calls. Every update is of other
rows with other priorities, since some peers do less for a repeated one.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.common import Report, Row, in_turns, parse, parser, run_groups, scratch
from benchmarks.replay_peers import (
    ALPHA,
    BATCH,
    BETA,
    CHUNK,
    DIM,
    HERE,
    PEERS,
    Changes,
    Operation,
    Replayer,
    Unavailable,
    priorities_of,
    typical,
)
from expbuf_core import ExperienceBuffer
from expbuf_core.conditions import LiveColumns
from expbuf_core.sampling import PrioritySampler, SamplingSettings, importance_weights
from expbuf_core.state import State

# What the peers are asked for, too; the rest of the settings is as it comes.
_SAMPLING = {"alpha": ALPHA, "beta": BETA}


def peers(
    report: Report,
    folder: Path,
    n: int,
    stack: ExitStack,
    dim: int = DIM,
    names: Iterable[str] = PEERS,
) -> dict[str, Replayer]:
    """Those that are installed, filled."""
    found, arguments = {}, report.arguments
    for name in names:
        try:
            peer = Replayer(name, arguments.peers_python, folder / f"{name}.log")
            stack.enter_context(peer)
            report.extra.setdefault("peers", {})[name] = peer.fill(n, arguments.seed, dim)
            found[name] = peer
        except Unavailable as exc:
            report.skip(name, exc)
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
    for start in range(0, n, CHUNK):
        part = priorities[start : start + CHUNK]
        block = rng.standard_normal((len(part), dim), dtype=np.float32)
        some = np.zeros(len(part))
        columns = {"v_embed": block, "confidence": some, "rewards": some}
        buffer.add_many(columns, priorities=part)
    if path is not None:
        buffer.sync()
    assert buffer.ids()[0] == 0
    return buffer


def measured(
    report: Report,
    ours: Mapping[str, Operation],
    beside: Mapping[str, Replayer],
    what: str,
    calls: int,
    before: Operation | None = None,
) -> dict[str, list[float]]:
    """Microseconds a call, of ours and of what the peers have for it, measured in turns."""
    cases: dict[str, Callable[[], float]] = {
        name: partial(typical, operation, calls, before) for name, operation in ours.items()
    }
    for name, peer in beside.items():
        if peer.time(what, 50) is None:  # which warms it up as well
            report.skip(name, "has no such thing")
        else:
            cases[name] = partial(_timed, peer, what, calls)
    for operation in ours.values():
        typical(operation, 50, before)
    return in_turns(cases, report.arguments.repetitions)


def _timed(peer: Replayer, what: str, calls: int) -> float:
    return peer.time(what, calls) or 0.0


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
    n = arguments.experiences or (50_000 if arguments.quick else 1_000_000)
    calls = 200 if arguments.quick else 1000
    rng = np.random.default_rng(arguments.seed)
    priorities = priorities_of(n, rng)
    report.group(f"draw {BATCH} of {n:,}", f"{DIM} float32 and scalars; median of a call")
    with scratch(arguments) as folder, ExitStack() as stack:
        beside = peers(report, folder, n, stack)
        config = _SAMPLING | {"cache_bytes": n * (4 * DIM + 16)}
        ours = expbuf(
            folder / "log", n, priorities, DIM, arguments.seed, durability="group", sampling=config
        )
        stack.callback(ours.close)
        small = stack.enter_context(
            expbuf(None, n, priorities, 8, arguments.seed, sampling=_SAMPLING)
        )

        sampler, stream = ours._session.replica.sampler, np.random.default_rng(arguments.seed)
        trees: dict[str, Operation] = {
            "expbuf: draw, weights": lambda: importance_weights(
                sampler.draw(BATCH, rng=stream).probabilities, BETA
            ),
            "expbuf: sample, columns too": lambda: ours.sample(BATCH),
        }
        told(
            report,
            measured(report, trees, beside, "ids", calls),
            {
                "expbuf: draw, weights": (
                    "2 × tianshou, faster than TorchRL and cpprb",
                    lambda ratios: (
                        ratios.get("tianshou", 0) <= 2
                        and ratios.get("TorchRL", 0) <= 1
                        and ratios.get("cpprb", 0) <= 1
                    ),
                )
            },
        )

        report.group(f"draw {BATCH} of {n:,} with data", "weights and embeddings as arrays")
        # As after a while of training: every embedding was read once.
        for first in range(0, n, CHUNK):
            _ = ours.sample(
                min(CHUNK, n - first),
                where=partial(_among, first, first + CHUNK),
                replace=False,
                uniform=True,
            ).v_embed
        told(
            report,
            measured(
                report,
                {"expbuf: cache_bytes for all": lambda: ours.sample(BATCH).v_embed},
                beside,
                "sample",
                calls,
            ),
            {"expbuf: cache_bytes for all": ("not slower than the fastest", _at_most(1.0))},
        )
        ours.close()
        uncached = stack.enter_context(
            ExperienceBuffer.open(
                folder / "log",
                sampling=_SAMPLING | {"cache_bytes": 0},
                index={"backend": "exact", "builder": "off"},
            )
        )
        from_log = {
            "expbuf: cache_bytes 0, read from the log": lambda: uncached.sample(BATCH).v_embed
        }
        told(report, measured(report, from_log, beside, "sample", calls), {})

        changes = Changes(rng, n)
        report.group(f"update {BATCH} priorities of {n:,}", "median of a call")
        updates = {"expbuf: in memory": changes.made_by(small.update_priorities)}
        told(
            report,
            measured(report, updates, beside, "update", calls, changes.draw),
            {"expbuf: in memory": ("faster than all", _at_most(1.0))},
        )
        report.group(
            f"update, then draw {BATCH} of {n:,}",
            "expbuf derives the weights of what was updated at the next draw; ids and weights",
        )
        drawn = small._session.replica.sampler
        cycles = {
            "expbuf: in memory": changes.then(
                small.update_priorities,
                lambda: importance_weights(drawn.draw(BATCH, rng=rng).probabilities, BETA),
            )
        }
        told(report, measured(report, cycles, beside, "cycle", calls, changes.draw), {})


def durable(report: Report, arguments: argparse.Namespace) -> None:
    n = arguments.experiences or (50_000 if arguments.quick else 1_000_000)
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
    sizes = [10_000, 100_000, *([] if arguments.quick else [1_000_000, 10_000_000])]
    calls = 300 if arguments.quick else 1000
    report.group(
        f"draw and update {BATCH} of more and more",
        "columns and trees alone, hardly any data and no log; an update and the draw behind it, "
        "which derives the weights; median of a call. TorchRL is left out: its way to fill a "
        "buffer takes minutes",
    )
    rng = np.random.default_rng(arguments.seed)
    cases: dict[str, Callable[[], float]] = {}
    with scratch(arguments) as folder, ExitStack() as stack:
        for n in sizes:
            state = filled_state(n, rng)
            sampler = PrioritySampler(state, SamplingSettings())
            changes = Changes(rng, n)
            draw = partial(sampler.draw, BATCH, rng=rng)
            cases[f"expbuf, draw of {n:,}"] = partial(typical, draw, calls)
            cycle = partial(_cycle, state, sampler, changes, draw)
            cases[f"expbuf, update and draw of {n:,}"] = partial(
                typical, cycle, calls, changes.draw
            )
            for name, peer in peers(report, folder, n, stack, 1, ["cpprb", "tianshou"]).items():
                for kind, what in (("draw", "ids"), ("update and draw", "cycle")):
                    cases[f"{name}, {kind} of {n:,}"] = partial(_timed, peer, what, calls)
        found = in_turns(cases, arguments.repetitions)
    for name in ("expbuf", "cpprb", "tianshou"):
        for kind in ("draw", "update and draw"):
            first = found.get(f"{name}, {kind} of {sizes[0]:,}")
            for n in sizes:
                values = found.get(f"{name}, {kind} of {n:,}")
                if first is None or values is None:
                    continue
                bound = n > sizes[0] and name == "expbuf"
                report.add(
                    f"{name}, {kind} of {n:,}",
                    values,
                    "µs",
                    reference=(f"{sizes[0]:,}", first),
                    target=f"a tenfold adds no more than {sizes[0]:,} take" if bound else "",
                    met=partial(_grown, 1 + float(np.log10(n / sizes[0]))) if bound else None,
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
    made.add_argument("--experiences", type=int, help="default: 1,000,000, or 50,000 if quick")
    made.add_argument("--peers-python", type=Path, default=HERE / ".venv-peers" / "bin" / "python")
    run_groups(Report("sampling", parse(made)), [replay, durable, growth])


if __name__ == "__main__":
    main()
