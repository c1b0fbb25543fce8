"""The crash states of a buffer on LMDB, which writes its file itself, past the file system of ours.

What a transaction has written is told to the recorder as soon as it is committed: its pages in any
order, a sync, then one of the two first pages, through a descriptor that syncs each write.
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
from crash_model import LONG, Story, open_buffer
from two_processes import explore_in_two

from expbuf_core.testing.crash import explore
from expbuf_core.testing.recording import NoFsync, RecordingFileSystem

environment = pytest.importorskip("expbuf_lmdb.environment")

PAGE = 4096
SEEDS = range(60) if LONG else range(1)
STATES = 2000 if LONG else 50
LMDB = {"backend": "lmdb", "lmdb": {"map_bytes": 1 << 20, "stage_bytes": 1 << 14}}


@pytest.fixture(autouse=True)
def _few_warnings() -> Iterator[None]:
    logger = logging.getLogger("expbuf")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    yield
    logger.setLevel(before)


@pytest.fixture(autouse=True)
def _transactions_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    real: Callable[..., Any] = environment.Environment.write

    def write(env: Any, work: Any) -> Any:
        for recorder in Told.living:
            if recorder.root in env.path.parents:
                with recorder._lock:  # one transaction after the other, as LMDB has it
                    before = env.path.read_bytes()
                    result = real(env, work)
                    recorder.committed(env.path, before)
                    return result
        return real(env, work)

    monkeypatch.setattr(environment.Environment, "write", write)


class Told(RecordingFileSystem):
    """Also told what LMDB writes.

    Attributes:
        in_order: What LMDB does; otherwise the first page goes before the others are synced.
        transactions: How many it was told.
    """

    in_order = True
    transactions = 0
    living: ClassVar[weakref.WeakSet[Told]] = weakref.WeakSet()

    def __init__(self, root: Path, **settings: Any) -> None:
        super().__init__(root, **settings)
        Told.living.add(self)

    def committed(self, path: Path, before: bytes) -> None:
        """Note a transaction. Writing the same bytes once more changes nothing."""
        after = path.read_bytes()
        before = before.ljust(len(after), b"\0")
        places = [
            at for at in range(0, len(after), PAGE) if before[at:][:PAGE] != after[at:][:PAGE]
        ]
        fd = self.open(path)
        try:
            pages = [at for at in places if at >= 2 * PAGE]
            random.Random(len(after)).shuffle(pages)
            for at in pages:
                self.pwrite(fd, after[at : at + PAGE], at)
            if self.in_order:
                self.fdatasync(fd)
            for at in places:
                if at < 2 * PAGE:
                    changed = [i for i in range(at, at + PAGE) if before[i] != after[i]]
                    first, end = changed[0], changed[-1] + 1
                    self.pwrite(fd, after[first:end], first)
            self.fdatasync(fd)
        finally:
            self.close(fd)
        Told.transactions += 1


class FirstPageTooEarly(Told):
    in_order = False


class NeverSynced(NoFsync, Told):
    only = "log.mdb"


def settings(story: Story, states: int, kind: type[Told]) -> dict[str, Any]:
    story.recorder = kind
    return {"states": states, "seed": story.seed, "settle": story.settle, "broken": kind}


def test_what_lmdb_does(tmp_path: Path) -> None:
    """It syncs its pages, and has a descriptor of its own, with O_DSYNC, for the first ones."""
    with contextlib.closing(open_buffer(tmp_path / "buffer", persistence=LMDB)) as buffer:
        env = buffer._live().adapter._environment()._env
        flags = env.flags()
        assert flags["sync"]
        assert flags["metasync"]
        assert not flags["writemap"]
        assert not flags["map_async"]
        kinds = []
        for name in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):
                if os.readlink(f"/proc/self/fd/{name}") == env.path():
                    text = Path(f"/proc/self/fdinfo/{name}").read_text()
                    kinds.append(bool(int(text.split("flags:")[1].split()[0], 8) & os.O_DSYNC))
        assert sorted(set(kinds)) == [False, True]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("durability", ["sync", "group", "os"])
def test_crash_states(durability: str, seed: int) -> None:
    story = Story(seed, steps=40, durability=durability, persistence=LMDB)
    story.deep = 2 if LONG else 1  # crash again while it recovers and goes on
    before = Told.transactions
    found = explore_in_two(
        story.run, story.check, begin=story.begin, **settings(story, STATES, Told)
    )
    assert found > STATES // 2
    assert Told.transactions > before + 5


@pytest.mark.parametrize("broken", [FirstPageTooEarly, NeverSynced])
def test_broken_disks_are_noticed(broken: type[Told]) -> None:
    stories = (Story(seed, steps=25, persistence=LMDB) for seed in range(4))
    assert any(
        explore(story.run, story.check, stop_after=1, **settings(story, 100, broken)).failures
        for story in stories
    )
