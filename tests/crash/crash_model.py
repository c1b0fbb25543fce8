"""A plain model of the buffer, random programs over both, and the oracle for crash states."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import shutil
import struct
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from expbuf_core import Experience, ExperienceBuffer
from expbuf_core.errors import ExpbufError, StorageError
from expbuf_core.filesystem import FileSystem
from expbuf_core.testing.crash import Acknowledge, CrashState, explore
from expbuf_core.testing.faults import FaultyFileSystem
from expbuf_core.testing.recording import RecordingFileSystem

LONG = os.environ.get("EXPBUF_LONG", "") not in ("", "0")

MAX_SIZE = 20
DIM = 4


def open_buffer(
    folder: Path, fs: FileSystem | None = None, mode: str = "a", **settings: Any
) -> ExperienceBuffer:
    """A small buffer whose logs are switched every few dozen operations."""
    config: dict[str, Any] = {
        "max_size": MAX_SIZE,
        "embedding": {"visual_dim": DIM, "question_dim": DIM},
        "priority": {"backend": "absolute_reward"},
        "index": {"backend": "exact", "builder": "off"},
        "persistence": {
            "backend": "file",
            "file": {"initial_bytes": 1 << 14, "segment_bytes": 1 << 14},
        },
        **settings,
    }
    return ExperienceBuffer.open(
        folder, config=config, mode=mode, filesystem=fs if fs is not None else FileSystem()
    )


# ---------------------------------------------------------------- what a buffer holds


class Entry(NamedTuple):
    """One experience as seen from outside."""

    id: int
    answer: str
    v_embed: bytes
    priority: float
    reward: float | None
    retrieval_count: int
    success_count: float


State = tuple[Entry, ...]


def embedding(serial: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """The embedding of the experience with this serial number."""
    return np.random.default_rng(serial).standard_normal(DIM).astype(np.float32)


def experience(serial: int, reward: float | None, padding: int) -> Experience:
    """An experience that is told from all others by its answer and its embedding."""
    return Experience(
        v_embed=embedding(serial),
        q_embed=embedding(-serial % (1 << 31)),
        question="?" * padding,
        answer=f"answer {serial}",
        rewards=reward,
    )


def state_of(buffer: ExperienceBuffer) -> State:
    """Everything that a buffer holds, payloads included, in order."""
    return tuple(entry_of(item) for item in buffer)


def entry_of(item: Experience) -> Entry:
    """What is seen of one experience."""
    return Entry(
        id=-1 if item.id is None else item.id,
        answer=item.answer,
        v_embed=np.asarray(item.v_embed, np.float32).tobytes(),
        priority=float(np.float32(item.priority)),
        reward=item.total_reward,
        retrieval_count=item.retrieval_count,
        success_count=float(item.success_count),
    )


def initial_priority(reward: float | None) -> float:
    """What the scorer in use gives."""
    return float(np.float32(abs(reward or 0.0) + 0.01))


class Model:
    """The same in plain Python."""

    def __init__(self, entries: Sequence[Entry] = ()) -> None:
        self.entries = {entry.id: entry for entry in entries}

    def state(self) -> State:
        """In order of ids, which is that of insertion."""
        return tuple(self.entries[id_] for id_ in sorted(self.entries))

    def add(self, entry: Entry) -> None:
        """First in, first out."""
        self.entries[entry.id] = entry
        while len(self.entries) > MAX_SIZE:
            del self.entries[min(self.entries)]

    def change(self, id_: int, **values: Any) -> None:
        """Nothing happens to what is gone."""
        if id_ in self.entries:
            self.entries[id_] = self.entries[id_]._replace(**values)


def entry(id_: int, serial: int, reward: float | None, priority: float | None) -> Entry:
    """What an add makes."""
    return Entry(
        id=id_,
        answer=f"answer {serial}",
        v_embed=embedding(serial).tobytes(),
        priority=initial_priority(reward) if priority is None else priority,
        reward=reward,
        retrieval_count=0,
        success_count=0.0,
    )


FUTURE = 1 << 40
"""From here on stand ids that nobody knows yet."""


def same_but_for_new_ids(one: State, other: State, known: State) -> bool:
    """Whether two states are alike, whatever ids they give to what is not in `known`."""
    ids = {item.id for item in known}

    def bare(state: State) -> list[Entry]:
        return [item if item.id in ids else item._replace(id=-1) for item in state]

    return bare(one) == bare(other)


def _none(_: object) -> list[int]:
    return []


def _may_fail() -> contextlib.AbstractContextManager[None]:
    return contextlib.suppress(StorageError)


def set_fault(fs: FaultyFileSystem, rng: random.Random, *, drop: bool) -> None:
    """Let something fail soon; `drop`: a failed sync may lose at once what it was to save."""
    match rng.randrange(5):
        case 0:
            fs.fail_sync(rng.choice((1, 1, 2)), drop=drop and rng.random() < 0.5)
        case 1:
            fs.fail_write(rng.choice((1, 1, 2, 3)), partial=rng.random())
        case 2:
            fs.fail(error=errno.EIO, nth=rng.randint(1, 12))
        case 3:
            fs.fail_from(rng.randint(1, 8), error=rng.choice((errno.EIO, errno.EROFS)))
        case _:
            fs.limit(rng.choice((0, 3000, 20_000)))


# ---------------------------------------------------------------- programs


Call = Callable[[], list[int]]
Effect = Callable[["Model", Sequence[int]], None]


class Story:
    """A random program over a buffer, and what may be found after a crash at any point of it.

    Steps are numbered; `states[i]` is what the buffer holds before step i. Step 0 opens it.

    Args:
        seed: Of the program.
        steps: How many.
        durability: Of the buffer.
        base: What the folder holds already, if it is a buffer.
        used: Ids up to here were seen before; none may be issued again.
        start: Number of the first experience; each has its own, in all stories over one folder.
        faults: Calls fail now and then; what was not acknowledged is undone, or its fate is open.
        persistence: Storage backend and its settings; None: small files.
    """

    def __init__(
        self,
        seed: int,
        steps: int,
        *,
        durability: str = "sync",
        base: State | None = None,
        used: int = -1,
        start: int = 1,
        faults: bool = False,
        persistence: dict[str, Any] | None = None,
    ) -> None:
        self.settings: dict[str, Any] = {"durability": durability}
        if persistence is not None:
            self.settings["persistence"] = persistence
        self.seed = seed
        self.steps = steps
        self.durability = durability
        self.states: list[State] = [base or ()]
        self.start = start
        self.faults = faults
        self.highest: list[int] = [used]  # highest id seen before step i
        self.durable_steps: list[int] = []  # steps that make all before them durable
        self.failed: dict[int, State] = {}  # what a step that failed would have made
        self.rebooted = True
        self.rng = random.Random(f"{seed}/checks")  # another one in each of two processes
        self.deep = 0
        self.recorder: type[RecordingFileSystem] | None = None  # for crashes while it recovers

    # -- running

    def run(self, recorder: RecordingFileSystem, folder: Path, ack: Acknowledge) -> None:
        """The workload."""
        rng = random.Random(self.seed)
        fs = FaultyFileSystem(recorder) if self.faults else None
        self._serial = self.start
        buffer: ExperienceBuffer | None = None
        try:
            for step in range(self.steps):
                before = self.states[step]
                self.states.append(before)
                self.highest.append(self.highest[-1])
                ack.start(step)
                kind = "open" if step == 0 else self._kind(rng)
                if kind in ("open", "reopen"):
                    in_order = True
                    if fs is not None and buffer is not None and rng.random() < 0.3:
                        set_fault(fs, rng, drop=self.durability == "sync")
                        in_order = False
                    if buffer is not None:
                        with contextlib.nullcontext() if in_order else _may_fail():
                            buffer.close()
                    if fs is not None:
                        fs.clear()
                    buffer = open_buffer(folder, fs or recorder, **self.settings)
                    self.durable_steps.append(step)
                    if not in_order:
                        self._settle_failures(step, state_of(buffer))
                else:
                    assert buffer is not None
                    self._step(buffer, fs, rng, step, kind)
                quiet(buffer)
                found = state_of(buffer)
                assert found == self.states[-1], (
                    f"step {step}, {kind}, without any crash: " + explain(found, [self.states[-1]])
                )
                ack(step)
        finally:
            if fs is not None:
                fs.clear()
            if buffer is not None:
                buffer.close()

    def _settle_failures(self, step: int, found: State) -> None:
        """After a close that failed, recovery decides what becomes of a step that failed."""
        for failed, state in self.failed.items():
            before = self.states[failed]
            if self.states[step] == before and same_but_for_new_ids(found, state, before):
                self.states[-1] = found
                self.highest[-1] = max([self.highest[-1], *(item.id for item in found)])

    def _step(
        self,
        buffer: ExperienceBuffer,
        fs: FaultyFileSystem | None,
        rng: random.Random,
        step: int,
        kind: str,
    ) -> None:
        before = self.states[step]
        call, effect, new = self._plan(buffer, rng, kind, [entry.id for entry in before])
        if fs is not None and rng.random() < 0.3:
            set_fault(fs, rng, drop=self.durability == "sync")
        after = Model(before)
        try:
            ids = call()
        except StorageError:
            assert fs is not None
            effect(after, [FUTURE + i for i in range(new)])
            self.failed[step] = after.state()
        else:
            effect(after, ids)
            assert all(id_ > self.highest[-1] for id_ in ids), f"{ids} were issued before"
            self.states[-1] = after.state()
            self.highest[-1] = max([self.highest[-1], *ids])
            if kind in ("snapshot", "sync"):
                self.durable_steps.append(step)
        finally:
            if fs is not None:
                fs.clear()

    def _plan(
        self, buffer: ExperienceBuffer, rng: random.Random, kind: str, ids: list[int]
    ) -> tuple[Call, Effect, int]:
        """A call, what it does to the model when it succeeds, how many ids it takes."""
        some = rng.sample(ids, min(len(ids), rng.randint(1, 5)))
        rewards = [rng.randrange(-8, 9) / 4 for _ in some]
        serial = self._serial

        def nothing(model: Model, new: Sequence[int]) -> None:
            pass

        if kind == "add":
            reward = rng.choice([None, 0.5, -1.25])
            priority = rng.choice([None, 0.75, 2.5])
            item = experience(serial, reward, rng.choice((0, 30, 600)))
            self._serial += 1

            def add(model: Model, new: Sequence[int]) -> None:
                model.add(entry(new[0], serial, reward, priority))

            return lambda: [buffer.add(item, priority=priority)], add, 1
        if kind in ("add_many", "columns"):
            n = rng.choice((2, 3, 7, MAX_SIZE + 3))
            given = [rng.choice([None, 1.5]) for _ in range(n)]
            serials = range(serial, serial + n)
            batch: Any = [
                experience(serial, reward, rng.choice((0, 90)))
                for serial, reward in zip(serials, given, strict=True)
            ]
            if kind == "columns":
                batch = {
                    "v_embed": np.stack([embedding(i) for i in serials]),
                    "q_embed": np.stack([embedding(-i % (1 << 31)) for i in serials]),
                    "answer": [f"answer {i}" for i in serials],
                    "rewards": np.array([np.nan if x is None else x for x in given]),
                }
            self._serial += n

            def add_all(model: Model, new: Sequence[int]) -> None:
                for id_, serial, reward in zip(new, serials, given, strict=True):
                    model.add(entry(id_, serial, reward, None))

            return lambda: [int(id_) for id_ in buffer.add_many(batch)], add_all, n
        if kind == "remove":

            def remove(model: Model, new: Sequence[int]) -> None:
                for id_ in some:
                    del model.entries[id_]

            return lambda: _none(buffer.remove(some)), remove, 0
        if kind == "priorities":
            values = [abs(x) for x in rewards]

            def prioritise(model: Model, new: Sequence[int]) -> None:
                for id_, x in zip(some, values, strict=True):
                    model.change(id_, priority=x)

            return lambda: _none(buffer.update_priorities(some, values)), prioritise, 0
        if kind == "rewards":

            def reward_all(model: Model, new: Sequence[int]) -> None:
                for id_, x in zip(some, rewards, strict=True):
                    model.change(id_, reward=x, priority=initial_priority(x))

            return lambda: _none(buffer.update_rewards(some, rewards)), reward_all, 0
        if kind == "outcome":
            success = rng.random() < 0.6
            receipt: Any = some
            if rng.random() < 0.5 and ids:
                found = buffer.search_index(v_embed=embedding(1), q_embed=embedding(2), k=3)
                some = [int(id_) for id_ in found.ids]
                receipt = found.receipt

            def count(model: Model, new: Sequence[int]) -> None:
                for id_ in some:
                    old = model.entries[id_]
                    model.change(
                        id_,
                        retrieval_count=old.retrieval_count + 1,
                        success_count=old.success_count + success,
                    )

            return lambda: _none(buffer.record_outcome(receipt, success=success)), count, 0
        if kind == "clear":

            def clear(model: Model, new: Sequence[int]) -> None:
                model.entries.clear()

            return lambda: _none(buffer.clear()), clear, 0
        if kind == "snapshot":
            return lambda: _none(buffer.save_snapshot()), nothing, 0
        assert kind == "sync"
        return lambda: _none(buffer.sync()), nothing, 0

    @staticmethod
    def _kind(rng: random.Random) -> str:
        kinds = {
            "add": 8,
            "add_many": 2,
            "columns": 1,
            "remove": 3,
            "priorities": 2,
            "rewards": 2,
            "outcome": 3,
            "snapshot": 1.5,
            "sync": 0.5,
            "clear": 0.4,
            "reopen": 1,
        }
        return rng.choices(list(kinds), list(kinds.values()))[0]

    # -- checking

    def begin(self, part: int) -> None:
        """See `explore_in_two`."""
        self.rng = random.Random(f"{self.seed}/checks/{part}")

    def settle(self, root: Path, state: CrashState) -> None:
        """Make the control page look as it would: of this boot, or of another."""
        self.rebooted = state.rebooted
        for name in state.volatile:
            age_control(root / name, rebooted=state.rebooted)

    def least(self, acknowledged: Sequence[int]) -> int:
        """How many steps must not be lost."""
        if not self.rebooted or self.durability == "sync":
            return len(acknowledged)
        return max((step + 1 for step in self.durable_steps if step in acknowledged), default=0)

    def right(self, found: State, acknowledged: Sequence[int], started: Sequence[int]) -> bool:
        """Whether recovery may find this."""
        # states[i] is what stands before step i, so states[i + 1] is what step i made.
        least = self.least(acknowledged)
        if found in self.states[least : len(started) + 1]:
            return True
        # A step that failed may be found done nonetheless, where nothing was written since.
        return any(
            self.states[step] == self.states[least]
            and same_but_for_new_ids(found, state, self.states[step])
            for step, state in self.failed.items()
            if step < least
        ) or any(
            same_but_for_new_ids(found, state, self.states[step])
            for step, state in self.failed.items()
            if least <= step < len(started)
        )

    def check(self, folder: Path, acknowledged: Sequence[int], started: Sequence[int]) -> None:
        """The oracle."""
        copy: Path | None = None
        if self.deep > 0 and folder.exists() and self.rng.random() < 0.02:
            copy = folder.with_name("copy")
            shutil.copytree(folder, copy)
        seen = self.highest[len(acknowledged)]
        with contextlib.closing(open_buffer(folder, **self.settings)) as buffer:
            found = state_of(buffer)
            if not self.right(found, acknowledged, started):
                least = self.least(acknowledged)
                raise AssertionError(explain(found, self.states[least : len(started) + 1]))
            check_search(buffer, found)
            serial = 1_000_000 + len(self.states)
            new = buffer.add(experience(serial, 0.25, 10))
            assert new > seen, f"id {new} was issued before (up to {seen})"
            assert all(new > item.id for item in found)
            expected = Model(found)
            expected.add(entry(new, serial, 0.25, None))
            assert state_of(buffer) == expected.state()
        with contextlib.closing(open_buffer(folder, **self.settings)) as buffer:
            assert state_of(buffer) == expected.state(), "lost or changed by the next opening"
            check_search(buffer, expected.state())
        if copy is not None:
            self.crash_again(copy, found, seen)
            shutil.rmtree(copy)

    def crash_again(self, folder: Path, found: State, used: int) -> None:
        """Crash while it recovers and goes on."""
        used = max([used, *(item.id for item in found)])
        story = Story(
            self.rng.randrange(1 << 30),
            5,
            durability=self.durability,
            persistence=self.settings.get("persistence"),
            base=found,
            used=used,
            start=self.start + 10_000,
        )
        story.deep, story.recorder = self.deep - 1, self.recorder
        result = explore(
            story.run,
            story.check,
            broken=self.recorder,
            states=30,
            seed=self.seed,
            initial=folder,
            settle=story.settle,
        )
        result.raise_for_failures()


def explain(found: State, allowed: Sequence[State]) -> str:
    """How a state differs from the nearest that would be right."""

    def distance(state: State) -> int:
        return len(set(state) ^ set(found))

    if not allowed:
        return f"no state is allowed; found {found}"
    nearest = min(allowed, key=distance)
    extra = sorted(set(found) - set(nearest))
    lacking = sorted(set(nearest) - set(found))
    return f"{len(allowed)} states are allowed; the nearest lacks {extra}, and has {lacking}"


def check_search(buffer: ExperienceBuffer, state: State) -> None:
    """A search for more than there are finds exactly the live ids."""
    found = buffer.search_index(v_embed=embedding(1), q_embed=embedding(2), k=MAX_SIZE + 5)
    assert sorted(int(id_) for id_ in found.ids) == [entry.id for entry in state]
    if state:
        batch = buffer.sample(3)
        assert {int(id_) for id_ in batch.ids} <= {entry.id for entry in state}


def quiet(buffer: ExperienceBuffer) -> None:
    """Wait for what runs behind a commit, so that a program does the same each time."""
    keeper = getattr(getattr(buffer, "_session", None), "_keeper", None)
    deadline = time.monotonic() + 10
    while getattr(keeper, "_busy", False) and time.monotonic() < deadline:
        time.sleep(1e-4)


_BOOT, _INODE = 2 * 8, 6 * 8


def age_control(path: Path, *, rebooted: bool) -> None:
    """Patch a control page: its inode is that of the image; after a reboot, another boot's id."""
    raw = bytearray(path.read_bytes())
    if len(raw) < 64:
        return
    struct.pack_into("<Q", raw, _INODE, os.stat(path).st_ino)
    if rebooted:
        raw[_BOOT : _BOOT + 16] = bytes(16)
    with open(path, "r+b") as file:
        file.write(raw)


def is_refused(folder: Path) -> ExpbufError | None:
    """The error that an opening meets; None if it succeeds."""
    try:
        open_buffer(folder).close()
    except ExpbufError as exc:
        return exc
    return None
