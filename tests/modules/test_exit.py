"""Buffers at the end of the interpreter, which takes no threads any more."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest
from module_helpers import OpenBuffer, answers, expected, experience, find, finds

from expbuf_core import ExperienceBuffer

AT_EXIT = """
import atexit, sys
import numpy as np
from expbuf_core import Experience, ExperienceBuffer

V = np.ones(4, np.float32)

def open_it():
    return ExperienceBuffer.open(
        sys.argv[1], durability=sys.argv[2], snapshot={"every_ops": 100},
        index={"backend": "exact", "builder": "thread", "rebuild_every": 100},
    )

def use(buffer):
    for n in range(4):
        buffer.add_many({"v_embed": np.tile(V, (60, 1)), "q_embed": np.tile(V, (60, 1))})
        buffer.add(Experience(v_embed=V, q_embed=V))
        assert buffer.submit(Experience(v_embed=V, q_embed=V)).result(30) == 62 * (n + 1) - 1
        assert len(buffer.search_index(v_embed=V, q_embed=V, k=3)) == 3
        assert buffer.sample(4).v_embed.shape == (4, 4)
    buffer.save_snapshot()
    buffer.rebuild_index()
    buffer.sync()
    buffer.close()

@atexit.register
def at_exit():
    use(open_it() if buffer is None else buffer)
    print("done")

buffer = open_it() if sys.argv[3] == "open" else None
"""


@pytest.mark.parametrize("there", ["open", "opened there"])
def test_everything_works_in_an_exit_handler(folder: Path, there: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", AT_EXIT, str(folder), "group", there],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.stdout, done.stderr, done.returncode) == ("done\n", "", 0)
    with ExperienceBuffer.open(folder) as buffer:
        assert buffer.recovery.clean
        assert len(buffer) == 248


@pytest.mark.parametrize("durability", ["sync", "group", "os"])
def test_everything_works_without_another_thread(
    open_buffer: OpenBuffer, durability: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Later versions of Python start none in an exit handler."""

    def start(self: threading.Thread) -> NoReturn:
        raise RuntimeError("can't create new thread at interpreter shutdown")

    monkeypatch.setattr(threading.Thread, "start", start)
    buffer = open_buffer(durability=durability, snapshot={"every_ops": 3})
    for n in range(6):
        assert buffer.add(experience(2 * n)) == 2 * n
        assert buffer.submit(experience(2 * n + 1)).result(0) == 2 * n + 1
        assert finds(buffer, n)
    assert len(find(buffer, 0).ids) > 0
    assert len(np.unique(buffer.sample(8).ids)) > 0
    buffer.save_snapshot()
    buffer.rebuild_index()
    assert finds(buffer, 11)
    buffer.close()
    monkeypatch.undo()
    with open_buffer() as again:
        assert again.recovery.clean
        assert answers(again) == expected(range(12))


AT_SIGTERM = """
import signal, sys
import numpy as np
from expbuf_core import Experience, ExperienceBuffer

signal.signal(signal.SIGTERM, lambda *_: sys.exit())
V = np.ones(4, np.float32)
with ExperienceBuffer.open(sys.argv[1], durability="group", index="exact") as buffer:
    while True:
        print(buffer.add(Experience(v_embed=V, q_embed=V)), flush=True)
        assert buffer.search_index(v_embed=V, q_embed=V, k=3)
"""


def test_a_handler_of_sigterm_that_exits_closes_the_buffer(folder: Path) -> None:
    """As the documentation recommends it, whatever it interrupts."""
    with subprocess.Popen(
        [sys.executable, "-c", AT_SIGTERM, str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as agent:
        assert agent.stdout is not None
        assert agent.stdout.readline() == "0\n"
        agent.terminate()
        added, told = agent.communicate(timeout=30)
    assert (told, agent.returncode) == ("", 0)
    with ExperienceBuffer.open(folder) as buffer:
        assert buffer.recovery.clean
        assert len(buffer) >= len(added.split())
