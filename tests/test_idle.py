"""Threads that get only what others leave of the processors."""

from __future__ import annotations

import concurrent.futures
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from expbuf_core import ExperienceBuffer, idle
from expbuf_core.testing.processes import Child, in_child

TIMEOUT_S = 240  # at the lowest priority beside others
EXACT = {"index": {"backend": "exact", "builder": "off"}}
SETTINGS = '{"index": {"backend": "exact", "rebuild_every": 1}}'

pytestmark = pytest.mark.skipif(
    not hasattr(os, "SCHED_IDLE") or not Path("/proc/self/schedstat").exists(),
    reason="there is no idle class, or starving would not be noticed",
)


def plainly(work: Callable[[], object], starved: Callable[[], object] = lambda: None) -> object:
    return idle.run(work, patience_s=TIMEOUT_S, share=0.1, starved=starved)


def test_the_thread_is_in_the_idle_class_and_no_other() -> None:
    for _ in range(200):  # also of one that has hardly begun
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
    code = f"import os; os.sched_setaffinity(0, {{{processor}}}); print(flush=True)\nwhile True: 1"
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

    def compute(_: Child) -> None:
        noticed = threading.Event()

        def work() -> None:
            os.sched_setaffinity(0, {processor})  # this thread's
            while not noticed.is_set():
                sum(range(10_000))

        idle.run(work, patience_s=2.0, share=0.25, starved=noticed.set)

    with _all_taken(processor):
        in_child(compute)


@pytest.mark.parametrize(
    ("later", "starves"),
    [
        ((1.0, 29.0), True),
        ((8.0, 22.0), False),  # it had its share
        ((0.0, 10.0), False),  # it waited for something else: a disk
    ],
)
@pytest.mark.parametrize("before", [(0.0, 0.0), (1000.0, 0.0)])
def test_what_starving_is(
    monkeypatch: pytest.MonkeyPatch,
    before: tuple[float, float],
    later: tuple[float, float],
    starves: bool,
) -> None:
    """Only what was of late counts: 30 seconds, in each of which it is looked at."""
    now, figures = [0.0], [before]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(idle, "_processor_s", lambda thread: figures[0])
    watch = idle._Watch(threading.current_thread(), 30.0, 1 / 8)
    now[0] = 500.0
    watch.sees_it_starve()
    for second in range(1, 31):
        now[0] = 500.0 + second
        figures[0] = (before[0] + later[0] * second / 30, before[1] + later[1] * second / 30)
        assert watch.sees_it_starve() == (starves and second == 30), second


def test_the_work_goes_on_where_nothing_can_be_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(idle._Watch, "sees_it_starve", lambda watch: True)
    monkeypatch.setattr(idle, "_LOOK_S", 0.001)
    wait, looks = concurrent.futures.wait, []
    enough = threading.Event()

    def counted(*arguments: Any) -> Any:
        looks.append(1)
        if len(looks) == 5:
            enough.set()
        return wait(*arguments)

    monkeypatch.setattr(concurrent.futures, "wait", counted)
    told: list[int] = []
    assert plainly(lambda: enough.wait(TIMEOUT_S), lambda: told.append(1))
    assert told == [1], "once"


def test_without_figures_nobody_takes_the_last_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(idle, "_processor_s", lambda thread: None)
    assert plainly(lambda: os.sched_getscheduler(0)) == os.SCHED_OTHER


def test_an_interrupt_reaches_the_work() -> None:
    def compute(_: Child) -> None:
        ended = []

        def work() -> None:
            try:
                os.kill(os.getpid(), signal.SIGINT)
                while True:
                    time.sleep(0.001)
            finally:
                ended.append(True)

        with pytest.raises(KeyboardInterrupt):
            plainly(work)
        assert ended == [True]

    in_child(compute)


def test_an_interrupt_that_cannot_reach_the_work() -> None:
    def compute(_: Child) -> None:
        idle._GRACE_S = 0.1

        def work() -> None:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(TIMEOUT_S)  # in a call of a library

        with pytest.raises(idle.StillAtWork):
            plainly(work)

    in_child(compute)


# ---------------------------------------------------------------- the builder


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


_STARVED = """
import sys, threading
from expbuf_core import builder, idle
from expbuf_core.cli import main
begin, noticed = idle._run, threading.Event()
def run(work, outcome):
    assert noticed.wait({timeout})
    begin(work, outcome)
def sees_it_starve(watch):
    if {works}:
        noticed.set()
    return True
idle._LOOK_S = 1e-4
idle._run = run
idle._Watch.sees_it_starve = sees_it_starve
sys.executable = {executable!r}
sys.argv[1:] = {arguments!r}
sys.exit(main({given}))
"""


def starved(
    tmp_path: Path, arguments: list[str], executable: str, given: str = "", works: bool = True
) -> Any:
    """Run a builder that starves at once, and then works nonetheless or cannot."""
    program = _STARVED.format(
        executable=executable, arguments=arguments, given=given, works=works, timeout=TIMEOUT_S
    )
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=TIMEOUT_S
    )


@pytest.mark.parametrize("shape", ["plain", "double dash", "relative"])
def test_a_starved_builder_begins_anew_and_hurries(
    folder: Path, tmp_path: Path, shape: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    instead = tmp_path / "python"
    instead.write_text(f'#!/bin/sh\necho "$@"\nexec {sys.executable} "$@"\n')
    instead.chmod(0o755)
    arguments = ["builder", "--idle-s", "0.1", "--config", SETTINGS]
    monkeypatch.chdir(tmp_path)
    path = str(folder) if shape == "plain" else "buffer"
    arguments += ["--", path] if shape == "double dash" else [path]
    done = starved(tmp_path, arguments, str(instead), works=False)
    assert done.returncode == 0, done.stderr
    command = f"-m expbuf_core builder --hurry --config {SETTINGS} --idle-s 0.1 -- {path}"
    assert done.stdout.splitlines() == [command]
    assert built(folder) == 2000


def test_a_starved_builder_that_cannot_begin_anew(folder: Path, tmp_path: Path) -> None:
    arguments = ["builder", str(folder), "--idle-s", "0.1", "--config", SETTINGS]
    done = starved(tmp_path, arguments, "/nowhere")
    assert done.returncode == 0
    assert "cannot begin anew and goes on slowly" in done.stderr
    assert built(folder) == 2000


def test_a_process_that_is_more_than_a_builder_stays(folder: Path, tmp_path: Path) -> None:
    arguments = ["builder", str(folder), "--idle-s", "0.1", "--config", SETTINGS]
    done = starved(tmp_path, ["of", "its", "own"], "/nowhere", given=json.dumps(arguments))
    assert (done.returncode, done.stderr) == (0, "")
    assert built(folder) == 2000


@pytest.mark.parametrize("options", [[], ["--hurry"]])
def test_a_builder_builds(folder: Path, options: list[str]) -> None:
    command = [sys.executable, "-m", "expbuf_core", "builder", str(folder), "--idle-s", "0.1"]
    subprocess.run([*command, "--config", SETTINGS, *options], timeout=TIMEOUT_S, check=True)
    assert built(folder) == 2000


def test_an_interrupted_builder_leaves_nothing_behind(folder: Path) -> None:
    program = f"""
import os, signal, sys, time
from expbuf_core import segments
from expbuf_core.cli import main
def wait(*arguments, **named):
    os.kill(os.getpid(), signal.SIGINT)
    while True:
        time.sleep(0.001)
segments.write_manifest = wait
sys.argv[1:] = ["builder", {str(folder)!r}, "--config", {SETTINGS!r}]
sys.exit(main())
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=TIMEOUT_S
    )
    assert done.returncode == 130, done.stderr
    assert "builder was interrupted; the old index stays in use" in done.stderr
    with ExperienceBuffer.open(folder, config=EXACT) as buffer:
        assert buffer.recovery.clean
        assert len(buffer) == 2000
