"""Whatever instant a builder dies at: nothing is lost, nothing is stuck, the next one goes on."""

from __future__ import annotations

import os
import random
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from expbuf_core import ExperienceBuffer, segments
from expbuf_core.filesystem import FileSystem
from expbuf_core.testing.crash import scratch_folder

LONG = os.environ.get("EXPBUF_LONG", "") not in ("", "0")
DIM = 8
CONFIG: dict[str, Any] = {
    "max_size": 120,
    "index": {"backend": "exact", "builder": "off", "growth": 0.3},
    "persistence": {"file": {"initial_bytes": 1 << 14, "segment_bytes": 1 << 16}},
}
CALLS = ("open", "pwrite", "fsync", "replace", "sync_folder", "unlink", "mkdir")


class Dying(FileSystem):
    """Kills its process before its n-th call."""

    left = 1 << 60

    def __getattribute__(self, name: str) -> Any:
        if name in CALLS:
            Dying.left -= 1
            if Dying.left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return super().__getattribute__(name)


@pytest.fixture
def folder() -> Iterator[Path]:
    home = scratch_folder()
    yield home / "buffer"
    shutil.rmtree(home)


def vector(serial: int) -> Any:
    return np.random.default_rng(serial).standard_normal(DIM).astype(np.float32)


def build_and_die(path: Path, calls: int) -> int:
    """Exit code of a builder that is killed before so many calls."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            with ExperienceBuffer.open(path, config=CONFIG, filesystem=Dying()) as buffer:
                Dying.left = calls
                status = 0 if buffer.rebuild_index() else 2
                Dying.left = 1 << 60
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def check(buffer: ExperienceBuffer, live: list[int], rng: random.Random) -> None:
    """All of the live ones are found, and nothing else."""
    assert buffer.ids().tolist() == live
    for serial in rng.sample(live, 5):
        hits = buffer.search_index(v_embed=vector(serial), q_embed=vector(serial), k=len(live) + 1)
        assert hits[0].id == serial
        assert sorted(hit.id for hit in hits) == live


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # forks beside threads are the point
def test_killed_at_every_call(folder: Path) -> None:
    rng, live, serial = random.Random(3), list[int](), 0
    killed = finished = 0
    with ExperienceBuffer.open(folder, config=CONFIG) as buffer:
        for calls in [*range(0, 36, 1 if LONG else 2)] * (10 if LONG else 1):
            for _ in range(rng.choice((1, 5, 25))):
                assert buffer.add_many({"v_embed": [vector(serial)], "q_embed": [vector(serial)]})[
                    0
                ] == (serial)
                live.append(serial)
                serial += 1
            live = live[-120:]
            for gone in rng.sample(live, min(3, len(live) - 5)) if len(live) > 8 else ():
                buffer.remove([gone])
                live.remove(gone)
            code = build_and_die(folder, calls)
            assert code in (0, -signal.SIGKILL)
            killed += code != 0
            finished += code == 0
            if len(live) < 5:
                continue
            check(buffer, live, rng)
            buffer._live().upkeep.adopt_now()  # what the dead builder has or has not published
            check(buffer, live, rng)
            with ExperienceBuffer.open(folder, mode="r", config=CONFIG) as reader:
                check(reader, live, rng)
        assert buffer.rebuild_index(), "the lock of a dead builder is free"
        check(buffer, live, rng)
        manifest = segments.read_manifest(segments.home(folder, 0))
        assert manifest is not None
        names = {"manifest.json"}
        for info in manifest.segments:
            names |= {f"{info.name}.vectors", f"{info.name}.exact"}
        assert set(os.listdir(folder / segments.FOLDER)) == names, "no garbage stays"
    assert killed > 5
    assert finished > 2
