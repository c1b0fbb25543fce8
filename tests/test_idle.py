"""Threads that get only what others leave of the processors."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from expbuf_core import ExperienceBuffer, idle
from expbuf_core.testing.processes import Child, in_child

TIMEOUT_S = 60
EXACT = {"index": {"backend": "exact", "builder": "off"}}

pytestmark = pytest.mark.skipif(
    not hasattr(os, "SCHED_IDLE") or not Path("/proc/self/schedstat").exists(),
    reason="there is no idle class, or starving would not be noticed",
)


def plainly(work: object) -> object:
    return idle.run(work, patience_s=TIMEOUT_S, share=0.1)  # type: ignore[arg-type]


def test_the_thread_is_in_the_idle_class_and_no_other() -> None:
    assert plainly(lambda: os.sched_getscheduler(0)) == os.SCHED_IDLE
    assert os.sched_getscheduler(0) == os.SCHED_OTHER


def test_what_it_raises_is_raised() -> None:
    def fail() -> None:
        raise TimeoutError("of its own")

    with pytest.raises(TimeoutError, match="of its own"):
        plainly(fail)


@contextmanager
def _all_taken(processor: int) -> Iterator[None]:
    """Somebody computes there all the time."""
    code = (
        f"import os; os.sched_setaffinity(0, {{{processor}}}); print(flush=True)\nwhile True: pass"
    )
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    try:
        assert other.stdout is not None
        other.stdout.readline()
        yield
    finally:
        other.kill()
        other.communicate()


def test_starving_is_noticed() -> None:
    processor = min(os.sched_getaffinity(0))
    stop = threading.Event()

    def compute(_: Child) -> None:
        def work() -> None:
            os.sched_setaffinity(0, {processor})  # this thread's
            while not stop.is_set():
                sum(range(10_000))

        with pytest.raises(idle.Starved):
            idle.run(work, patience_s=1.0, share=0.5)

    with _all_taken(processor):
        in_child(compute)


def test_working_is_not_starving() -> None:
    def work() -> int:
        return sum(sum(range(10_000)) for _ in range(10_000))

    assert idle.run(work, patience_s=0.5, share=0.01) > 0


def test_without_figures_nobody_takes_the_last_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(idle, "_processor_s", lambda thread: (0.0, 0.0))
    assert plainly(lambda: os.sched_getscheduler(0)) == os.SCHED_OTHER


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "buffer"
    with ExperienceBuffer.open(path, config=EXACT) as buffer:
        parts = np.random.default_rng(0).standard_normal((2000, 8))
        buffer.add_many({"v_embed": parts, "q_embed": parts})
    return path


def built(path: Path) -> int:
    with ExperienceBuffer.open(path, mode="r") as buffer:
        return sum(segment["rows"] for segment in buffer.stats()["index"]["segments"])


def test_a_starved_builder_begins_anew_and_hurries(folder: Path) -> None:
    program = f"""
import sys
from expbuf_core import builder, idle
idle._LOOK_S = 1e-4
builder.PATIENCE_S, builder.SHARE = 0.0, 1.0
sys.orig_argv = ["python", "-c", "import sys; print('anew', sys.argv[1:])", "and"]
builder.main({str(folder)!r}, '{{"index": {{"backend": "exact", "rebuild_every": 1}}}}', 1.0)
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=True,
    )
    assert done.stdout == "anew ['and', '--hurry']\n", done.stderr
    assert built(folder) == 0


@pytest.mark.parametrize("options", [[], ["--hurry"]])
def test_a_builder_builds(folder: Path, options: list[str]) -> None:
    command = [sys.executable, "-m", "expbuf_core", "builder", str(folder), "--idle-s", "0.1"]
    config = '{"index": {"backend": "exact", "rebuild_every": 1}}'
    subprocess.run([*command, "--config", config, *options], timeout=TIMEOUT_S, check=True)
    assert built(folder) == 2000
