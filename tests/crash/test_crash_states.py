"""Crash the buffer at every point of random programs, in every way that a disk allows."""

from __future__ import annotations

import pytest
from crash_model import LONG, Story

from expbuf_core.testing.crash import Exploration, explore
from expbuf_core.testing.recording import (
    NoFolderSync,
    NoFsync,
    RecordingFileSystem,
    RenameBeforeSync,
)

SEEDS = range(200) if LONG else range(6)
STATES = 3000 if LONG else 500


def run(story: Story, states: int, broken: type[RecordingFileSystem] | None = None) -> Exploration:
    return explore(
        story.run, story.check, states=states, seed=story.seed, settle=story.settle, broken=broken
    )


@pytest.mark.parametrize("seed", SEEDS)
def test_sync(seed: int) -> None:
    story = Story(seed, steps=60)
    story.deep = 3
    result = run(story, STATES)
    result.raise_for_failures()
    assert result.states > STATES // 2


@pytest.mark.parametrize("seed", SEEDS[:2] if not LONG else SEEDS)
@pytest.mark.parametrize("durability", ["group", "os"])
def test_weaker_durability(durability: str, seed: int) -> None:
    story = Story(seed, steps=40, durability=durability)
    story.deep = 2
    run(story, STATES // 2).raise_for_failures()


@pytest.mark.parametrize("broken", [NoFsync, NoFolderSync, RenameBeforeSync])
def test_broken_variants_are_caught(broken: type[RecordingFileSystem]) -> None:
    story = Story(1, steps=40)
    assert run(story, 400, broken).failures
