"""Crash the buffer at every point of random programs, in every way that a disk allows."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
from crash_model import LONG, Story
from two_processes import explore_in_two

from expbuf_core import codec
from expbuf_core import control as c
from expbuf_core.commit import CommitLog
from expbuf_core.contracts import LoggedOperation
from expbuf_core.state import Change, State
from expbuf_core.testing.crash import CrashFailure, explore
from expbuf_core.testing.recording import (
    NoFolderSync,
    NoFsync,
    RecordingFileSystem,
    RenameBeforeSync,
    WriteInPlace,
)

SEEDS = range(100) if LONG else range(4)
STATES = 3000 if LONG else 450
CODES = ["native", "python"]


def by_turns(*cases: tuple[Any, ...]) -> list[tuple[Any, ...]]:
    """Each case with native code or without, and with both in the long run."""
    if LONG:
        return [(*case, code) for case in cases for code in CODES]
    return [(*case, CODES[i % 2]) for i, case in enumerate(cases)]


@pytest.fixture(autouse=True)
def _written_by(request: pytest.FixtureRequest) -> None:
    """Native code, unless the test is told otherwise."""
    arguments = getattr(request.node, "callspec", None)
    if arguments is not None and arguments.params.get("code") == "python":
        request.getfixturevalue("without_native_code")


def check_all(story: Story, states: int) -> int:
    """How many states there were; an AssertionError where one is wrong."""
    return explore_in_two(
        story.run,
        story.check,
        begin=story.begin,
        states=states,
        seed=story.seed,
        settle=story.settle,
    )


def failures(
    story: Story,
    states: int,
    broken: type[RecordingFileSystem] | None = None,
    stop_after: int = 1,
) -> list[CrashFailure]:
    """What is found where something is wrong."""
    return explore(
        story.run,
        story.check,
        states=states,
        seed=story.seed,
        settle=story.settle,
        broken=broken,
        stop_after=stop_after,
    ).failures


@pytest.fixture(autouse=True)
def _few_warnings() -> Iterator[None]:
    """Faults are warned about, and there are thousands of them."""
    logger = logging.getLogger("expbuf")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    yield
    logger.setLevel(before)


@pytest.mark.parametrize(("seed", "code"), by_turns(*((seed,) for seed in SEEDS)))
def test_sync(seed: int, code: str) -> None:
    story = Story(seed, steps=60)
    story.deep = 3  # crash again while it recovers and goes on, and again
    assert check_all(story, STATES) > STATES // 2


@pytest.mark.parametrize(
    ("durability", "seed", "code"),
    by_turns(*product(["group", "os"], SEEDS if LONG else SEEDS[:1])),
)
def test_weaker_durability(durability: str, seed: int, code: str) -> None:
    story = Story(seed, steps=40, durability=durability)
    story.deep = 2
    check_all(story, STATES // 2)


@pytest.mark.parametrize(
    ("durability", "seed", "code"),
    by_turns(*product(["sync", "group", "os"], SEEDS if LONG else SEEDS[:2])),
)
def test_faults(durability: str, seed: int, code: str) -> None:
    """Syncs and writes fail, the disk is full now and then; and there are crashes, too."""
    story = Story(seed, steps=60, durability=durability, faults=True)
    check_all(story, STATES // 2)
    assert story.failed


# ---------------------------------------------------------------- broken on purpose


class SnapshotsNotSynced(NoFsync):
    """Logs are deleted before the snapshots that replace them are durable."""

    only = "snapshot.*"


class LogsNotSynced(NoFsync):
    """What was appended is not synced."""

    only = "experience_data.*"


@pytest.mark.parametrize(
    "broken",
    [NoFsync, LogsNotSynced, SnapshotsNotSynced, NoFolderSync, RenameBeforeSync, WriteInPlace],
)
def test_broken_disks_are_noticed(broken: type[RecordingFileSystem]) -> None:
    # In the first of these stories every one of them does harm soon.
    assert any(failures(Story(seed, steps=40), 400, broken) for seed in (2, 0, 1))


def test_acknowledging_before_the_sync_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def flush(self: CommitLog, lsn: int, retirements: int | None = None) -> None:
        words = self._control.words
        words[c.PUBLISHED] = max(words[c.PUBLISHED], lsn)

    monkeypatch.setattr(CommitLog, "flush", flush)
    assert failures(Story(1, steps=40), 200)


def test_reusing_ids_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def forget(self: State, operation: LoggedOperation) -> Change:
        return Change()

    monkeypatch.setitem(State._HANDLERS, codec.RESERVE, forget)
    found = failures(Story(1, steps=40, durability="os"), 300, stop_after=20)
    assert any("issued before" in str(failure.error) for failure in found)
