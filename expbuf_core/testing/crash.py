"""Explore what a folder may look like after a crash.

`RecordingFileSystem` performs every call and keeps a log of them; `CrashStates` derives from that
log the folders that a kill or a power loss could have left at any instant; `explore` runs a
workload once and hands every such folder to a check.
Nothing here knows about buffers, so storage plugins of any kind can be tested with it.

The model of a power loss is the weakest that POSIX allows, weaker than any real file system:

- A file's bytes are durable once `fsync` or `fdatasync` of that file returned, and only as far as
  they were written before the call. Each page written since is on disk or not, by itself, in any
  version that it ever had; a page may even be a mixture of sectors.
- A file may have any size that it had since its last sync; what was not written reads as zeros.
- A name appears, moves or goes for good once its folder was synced. Until then each such change is
  on disk or not, by itself. A rename is atomic.
- After a failed sync the kernel calls the unwritten pages clean: no later sync saves them.

A kill loses nothing, except that it can cut the write under way.

A check gets three arguments: the folder, everything acknowledged before that instant, everything
started before it. It raises where the folder breaks a promise. It may write to the folder, which
is its own.
"""

from __future__ import annotations

import os
import random
import shutil
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from expbuf_core.testing.crash_disk import PAGE, SECTOR, Disk, DiskFile, Image
from expbuf_core.testing.recording import (
    Marked,
    Recording,
    RecordingFileSystem,
    Written,
    describe,
)

Check = Callable[[Path, Sequence[Any], Sequence[Any]], object]


@dataclass(frozen=True)
class CrashState:
    """A folder that a crash could have left.

    Attributes:
        name: Names it again for the same workload and seed (see `explore(only=...)`).
        description: When and how the crash happened.
        image: The folder.
        acknowledged: What was acknowledged before that instant.
        started: What was started before it.
        rebooted: Power was lost; else only the process was killed.
        volatile: Files in it that were not recorded but watched.
    """

    name: str
    description: str
    image: Image
    acknowledged: list[Any]
    started: list[Any]
    rebooted: bool
    volatile: list[str]


class CrashStates:
    """The folders that a crash could have left at any instant of a recording.

    Iterating yields about `states` of them, no two alike; the same for the same recording and
    seed. For each instant, that is before each event and at the end: the strict image (only what
    is durable), everything (after a kill); for each write, cuts of it at sector boundaries and
    elsewhere; and random mixtures for as long as the number lasts.

    Args:
        recording: What was recorded.
        states: How many to aim for.
        seed: Of all choices.
    """

    def __init__(self, recording: Recording, *, states: int = 1000, seed: int = 0) -> None:
        self.recording = recording
        self.states = states
        self.seed = seed
        self._cuts, self._writes, pending = self._survey()
        budget = max(states, 1)
        rng = random.Random(f"{seed}/plan")
        plan = [(cut, kind, 0) for cut in self._cuts for kind in ("strict", "kill")]
        if len(plan) > budget // 2:
            plan = rng.sample(plan, max(budget // 2, 1))
        torn = [
            (cut, f"torn-{base}", length)
            for cut, event in self._writes.items()
            for base, length in self._tears(event, rng)
        ]
        if len(torn) > budget // 4:
            torn = rng.sample(torn, budget // 4)
        self._plan: dict[int, list[tuple[str, int]]] = {cut: [] for cut in self._cuts}
        for cut, kind, number in plan + torn:
            self._plan[cut].append((kind, number))
        # Where something is pending, the rest of the budget goes.
        rest = budget - len(plan) - len(torn)
        self._mixtures = dict.fromkeys(pending, 0)
        if pending and rest > 0:
            share, more = divmod(rest, len(pending))
            self._mixtures = dict.fromkeys(pending, share)
            for cut in rng.sample(pending, more):
                self._mixtures[cut] += 1

    def __iter__(self) -> Iterator[CrashState]:
        seen: set[tuple[int, int, int, bool]] = set()
        owed = 0  # mixtures that turned out to be known already are made up for later
        disk = Disk(self.recording)
        played = 0
        for cut in self._cuts:
            while played < cut:
                disk.play(played, self.recording.events[played])
                played += 1
            for kind, number in self._plan[cut]:
                state = self._state(disk, cut, kind, number)
                if self._is_new(state, seen):
                    yield state
            if cut not in self._mixtures:
                continue
            want = self._mixtures[cut] + min(owed, self._mixtures[cut] + 4)
            made = tried = 0
            while made < want and tried < 2 * want + 4:
                state = self._state(disk, cut, "mixture", tried)
                tried += 1
                if self._is_new(state, seen):
                    made += 1
                    yield state
            owed += self._mixtures[cut] - made

    def state(self, name: str) -> CrashState:
        """Make one state again, by its name."""
        at, kind, number = name.split("/")
        disk = Disk(self.recording)
        for now, event in enumerate(self.recording.events[: int(at)]):
            disk.play(now, event)
        return self._state(disk, int(at), kind, int(number))

    def _survey(self) -> tuple[list[int], dict[int, Written], list[int]]:
        """Instants worth looking at, those inside of a write, and those with pending changes."""
        events = self.recording.events
        disk = Disk(self.recording)
        cuts: list[int] = []
        writes: dict[int, Written] = {}
        pending: list[int] = []
        for now in range(len(events) + 1):
            event = events[now] if now < len(events) else None
            # Marks change nothing on disk, and the instant behind them promises more.
            if not isinstance(event, Marked):
                cuts.append(now)
                if disk.pending:
                    pending.append(now)
                if isinstance(event, Written):
                    writes[now] = event
            if event is not None:
                disk.play(now, event)
        return cuts, writes, pending

    def _tears(self, event: Written, rng: random.Random) -> Iterator[tuple[str, int]]:
        size = len(event.data)
        first = -event.offset % SECTOR
        lengths = set(range(first or SECTOR, size, SECTOR))
        if len(lengths) > 12:
            lengths = set(rng.sample(sorted(lengths), 12))
        if size > 1:
            lengths.update(rng.randrange(1, size) for _ in range(4))
        for length in sorted(lengths):
            yield rng.choice(("everything", "strict", "mixture")), length
        # A kill may end a long write too, between two pages.
        pages = range(-event.offset % PAGE or PAGE, size, PAGE)
        for length in rng.sample(pages, min(len(pages), 3)):
            yield "kill", length

    def _state(self, disk: Disk, cut: int, kind: str, number: int) -> CrashState:
        name = f"{cut}/{kind}/{number}"
        rng = random.Random(f"{self.seed}/{name}")
        events = self.recording.events
        rebooted = True
        if kind == "strict":
            image, how = disk.strict(), "power loss, only what was synced is there"
        elif kind == "kill":
            image, how, rebooted = disk.everything(), "kill", False
        elif kind == "mixture":
            image, how = disk.mixture(rng), "power loss, a part of what was not synced is there"
        else:
            event = self._writes[cut]
            base = kind.removeprefix("torn-")
            rebooted = base != "kill"
            image = disk.torn(base if rebooted else "everything", event, number, rng)
            how = f"{'power loss' if rebooted else 'kill'} after {number} bytes of it ({base})"
        volatile = self._add_volatile(image, cut, rebooted, rng)
        before = describe(events[cut]) if cut < len(events) else "end of the workload"
        return CrashState(
            name=name,
            description=f"before event {cut}, {before}: {how}",
            image=image,
            acknowledged=list(disk.acknowledged),
            started=list(disk.started),
            rebooted=rebooted,
            volatile=volatile,
        )

    def _add_volatile(
        self, image: Image, cut: int, rebooted: bool, rng: random.Random
    ) -> list[str]:
        """After a kill as it was; after a power loss as at any time before, or gone."""
        added = []
        for path, history in self.recording.volatile.items():
            known = [content for when, content in history if when <= cut]
            if not known or (rebooted and rng.random() < 0.5):
                continue
            content = rng.choice(known) if rebooted else known[-1]
            parent = os.path.dirname(path)
            if content is not None and (not parent or parent in image.folders):
                image.files[path] = DiskFile(content).strict()
                added.append(path)
        return added

    @staticmethod
    def _is_new(state: CrashState, seen: set[tuple[int, int, int, bool]]) -> bool:
        # The same folder must be looked at again when more has been promised.
        key = (
            state.image.fingerprint(),
            len(state.acknowledged),
            len(state.started),
            state.rebooted,
        )
        if key in seen:
            return False
        seen.add(key)
        return True


# ---------------------------------------------------------------- exploring


class Acknowledge(Protocol):
    """Handed to a workload: `ack.start(x)` before it begins x, `ack(x)` once x is promised."""

    def __call__(self, value: Any) -> None:
        """`value` was acknowledged."""
        ...

    def start(self, value: Any) -> None:
        """`value` is about to be written."""
        ...


class _Acknowledge:
    def __init__(self, fs: RecordingFileSystem) -> None:
        self._fs = fs

    def __call__(self, value: Any) -> None:
        self._fs.mark(value)

    def start(self, value: Any) -> None:
        self._fs.mark(value, acknowledged=False)


Workload = Callable[[RecordingFileSystem, Path, Acknowledge], None]


@dataclass(frozen=True)
class CrashFailure:
    """A state in which a check failed. `name` makes it again: `explore(only=name)`."""

    name: str
    description: str
    error: BaseException
    trace: str


@dataclass
class Exploration:
    """What `explore` found.

    Attributes:
        events: How many calls were recorded.
        states: How many different states were checked.
        kinds: How many of each kind.
        failures: States in which the check failed.
        seed: Of all choices.
    """

    events: int
    states: int
    kinds: Counter[str]
    failures: list[CrashFailure]
    seed: int

    def report(self, limit: int = 5) -> str:
        """A text about the failures, and how to make them again."""
        lines = [
            f"{len(self.failures)} of {self.states} crash states broke a promise "
            f"({self.events} events, seed {self.seed})"
        ]
        for failure in self.failures[:limit]:
            lines += [
                "",
                f"--- {failure.description}",
                f"    again: explore(..., seed={self.seed}, only={failure.name!r})",
                failure.trace.rstrip(),
            ]
        return "\n".join(lines)

    def raise_for_failures(self) -> None:
        """Raise an AssertionError that describes the failures, where there are any."""
        if self.failures:
            raise AssertionError(self.report())


def forget_volatile(root: Path, state: CrashState) -> None:
    """The default for `settle`."""
    if state.rebooted:
        for path in state.volatile:
            (root / path).unlink()


def scratch_folder() -> Path:
    """A new folder for images: in memory where the machine offers that."""
    memory = Path("/dev/shm")
    place = memory if memory.is_dir() and os.access(memory, os.W_OK | os.X_OK) else None
    return Path(tempfile.mkdtemp(prefix="expbuf-crash-", dir=place))


def record(
    workload: Workload,
    root: Path,
    *,
    broken: Callable[[Path], RecordingFileSystem] = RecordingFileSystem,
    initial: Path | None = None,
) -> Recording:
    """Run a workload on the folder `root / "buffer"` and return what it did.

    Args:
        workload: Called with the file system, the folder (not made yet, unless `initial` is
            given) and the function that marks acknowledgements.
        root: An existing, empty folder.
        broken: Makes the file system; a broken variant shows that a check can fail.
        initial: Folder whose content stands there at first, durable.
    """
    folder = root / "buffer"
    if initial is not None:
        shutil.copytree(initial, folder, symlinks=True)
    fs = broken(root)
    workload(fs, folder, _Acknowledge(fs))
    return fs.recording


def explore(
    workload: Workload,
    check: Check,
    *,
    states: int,
    seed: int = 0,
    broken: Callable[[Path], RecordingFileSystem] | None = None,
    initial: Path | None = None,
    settle: Callable[[Path, CrashState], None] | None = None,
    only: str | None = None,
    stop_after: int | None = 20,
    keep: Path | None = None,
) -> Exploration:
    """Run a workload once, and check every folder that a crash could have left.

    Args:
        workload: See `record`.
        check: See the module's text. Any exception counts as a failure.
        states: How many states to aim for; those alike are checked once.
        seed: Of all choices.
        broken: See `record`.
        initial: See `record`.
        settle: Called with the root of each image before the check, to make volatile files look as
            they would (say, as of another boot). Default: after a power loss they are gone.
        only: Check only the state of this name.
        stop_after: Give up after so many failures; None: never.
        keep: Copy the folder of the first failure here, as it was before the check.
    """
    home = scratch_folder()
    try:
        (home / "run").mkdir()
        recording = record(
            workload, home / "run", broken=broken or RecordingFileSystem, initial=initial
        )
        shutil.rmtree(home / "run")
        crashes = CrashStates(recording, states=states, seed=seed)
        result = Exploration(len(recording.events), 0, Counter(), [], seed)
        for state in [crashes.state(only)] if only is not None else crashes:
            place = home / "image"
            place.mkdir()
            state.image.materialise(place)
            (settle or forget_volatile)(place, state)
            try:
                check(place / "buffer", state.acknowledged, state.started)
            except Exception as exc:
                result.failures.append(
                    CrashFailure(
                        name=state.name,
                        description=state.description,
                        error=exc,
                        trace="".join(traceback.format_exception(exc, limit=-6)),
                    )
                )
                if keep is not None and len(result.failures) == 1:
                    state.image.materialise(keep)
                    (settle or forget_volatile)(keep, state)
            result.states += 1
            result.kinds[state.name.split("/")[1]] += 1
            shutil.rmtree(place)
            if stop_after is not None and len(result.failures) >= stop_after:
                break
        return result
    finally:
        shutil.rmtree(home, ignore_errors=True)
