"""Small buffers, experiences that can be told apart, and processes that use the same folder."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from expbuf_core import Experience, ExperienceBuffer
from expbuf_core.errors import ExpbufError

DIM = 6
TIMEOUT_S = 30.0

CONFIG: dict[str, Any] = {
    "max_size": 1000,
    "lock_timeout_s": 20.0,
    "index": {"backend": "exact", "builder": "off"},
    "persistence": {"file": {"initial_bytes": 1 << 14, "segment_bytes": 1 << 15}},
}


class OpenBuffer(Protocol):
    """Opens a buffer: in the test's folder unless another one is named."""

    def __call__(self, path: Path | None = None, **arguments: Any) -> ExperienceBuffer: ...


class Opened:
    """Remembers what it opened."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._buffers: list[ExperienceBuffer] = []

    def __call__(self, path: Path | None = None, **arguments: Any) -> ExperienceBuffer:
        where = self._folder if path is None else path
        buffer = ExperienceBuffer.open(where, config=CONFIG, **arguments)
        self._buffers.append(buffer)
        return buffer

    def memory(self, **arguments: Any) -> ExperienceBuffer:
        """One that has no folder."""
        buffer = ExperienceBuffer.open(None, config=CONFIG, **arguments)
        self._buffers.append(buffer)
        return buffer

    def close(self) -> None:
        """Close them all; a test may have broken some on purpose."""
        for buffer in reversed(self._buffers):
            with contextlib.suppress(ExpbufError):
                buffer.close()


def vector(serial: int, dim: int = DIM) -> NDArray[np.float32]:
    """The embedding of the experience with this serial number; always the same."""
    return np.random.default_rng(serial).standard_normal(dim).astype(np.float32)


def experience(serial: int, **fields: Any) -> Experience:
    """An experience that is told from all others by its answer and its embeddings."""
    values: dict[str, Any] = {
        "v_embed": vector(serial),
        "q_embed": vector(serial + 1_000_000),
        "question": "which one?",
        "answer": f"answer {serial}",
        "confidence": 0.5,
        **fields,
    }
    return Experience(**values)


def columns(serials: range) -> dict[str, Any]:
    """The same as columns."""
    return {
        "v_embed": np.stack([vector(i) for i in serials]),
        "q_embed": np.stack([vector(i + 1_000_000) for i in serials]),
        "question": ["which one?"] * len(serials),
        "answer": [f"answer {i}" for i in serials],
        "confidence": np.full(len(serials), 0.5),
    }


def add_all(buffer: ExperienceBuffer, serials: range) -> list[int]:
    """Add them one by one; their ids."""
    return [buffer.add(experience(i)) for i in serials]


def find(buffer: ExperienceBuffer, serial: int, **arguments: Any) -> Any:
    """What a search for an experience with this serial number finds."""
    v, q = vector(serial), vector(serial + 1_000_000)
    return buffer.search_index(v_embed=v, q_embed=q, **{"k": 1, **arguments})


def finds(buffer: ExperienceBuffer, serial: int) -> bool:
    """Whether a search for this experience finds it."""
    result = find(buffer, serial)
    return len(result) == 1 and result[0].experience.answer == f"answer {serial}"


def answers(buffer: ExperienceBuffer) -> list[str]:
    """Of all experiences, in order."""
    return [item.answer for item in buffer]


def expected(serials: range) -> list[str]:
    """The answers of experiences with these serial numbers."""
    return [f"answer {i}" for i in serials]


def contents(buffer: ExperienceBuffer) -> list[tuple[Any, ...]]:
    """Everything that a buffer holds, in order, comparable by ==."""
    return [
        (
            item.id,
            item.answer,
            np.asarray(item.v_embed).tobytes(),
            item.total_reward,
            item.priority,
            item.retrieval_count,
            item.success_count,
        )
        for item in buffer
    ]


@contextlib.contextmanager
def unchanged(buffer: ExperienceBuffer) -> Iterator[None]:
    """Nothing is written and nothing changes inside."""
    before = (len(buffer), buffer.lsn, buffer.stats()["next_id"], contents(buffer))
    yield
    assert (len(buffer), buffer.lsn, buffer.stats()["next_id"], contents(buffer)) == before


# ---------------------------------------------------------------- other processes

_WORKER = """
import json, os, sys
sys.path.insert(0, {here!r})
import numpy as np
from module_helpers import *
folder, settings = Path(sys.argv[1]), json.loads(sys.argv[2])
buffer = ExperienceBuffer.open(folder, config=CONFIG, **settings)
print("ready", flush=True)
for line in sys.stdin:
    try:
        print(json.dumps({{"value": eval(line)}}), flush=True)  # noqa: S307  (the test's own code)
    except Exception as exc:
        print(json.dumps({{"error": type(exc).__name__, "message": str(exc)}}), flush=True)
"""


class Worker:
    """Another process with the buffer open, which evaluates expressions about `buffer`."""

    def __init__(self, folder: Path, settings: Mapping[str, Any] | None = None) -> None:
        code = _WORKER.format(here=str(Path(__file__).parent))
        self.process = subprocess.Popen(
            [sys.executable, "-W", "error", "-c", code, str(folder), json.dumps(settings or {})],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._line() == "ready"

    def _line(self) -> str:
        assert self.process.stdout is not None
        timer = threading.Timer(TIMEOUT_S, self.process.kill)
        timer.start()
        try:
            line = self.process.stdout.readline()
        finally:
            timer.cancel()
        assert line, f"the process ended ({self.process.wait()}) or hung"
        return line.strip()

    def start(self, expression: str) -> None:
        """Let it evaluate something, without waiting."""
        assert self.process.stdin is not None
        self.process.stdin.write(expression.replace("\n", " ") + "\n")
        self.process.stdin.flush()

    def result(self) -> Any:
        """What became of it."""
        answer = json.loads(self._line())
        if "error" in answer:
            raise RuntimeError(f"{answer['error']}: {answer['message']}")
        return answer["value"]

    def __call__(self, expression: str) -> Any:
        """Evaluate and wait."""
        self.start(expression)
        return self.result()

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()
        self.process.wait(TIMEOUT_S)
        self._close_pipes()

    def end(self) -> None:
        """Let it close the buffer and end."""
        if self.process.poll() is None:
            self("buffer.close()")
            assert self.process.stdin is not None
            self.process.stdin.close()
            assert self.process.wait(TIMEOUT_S) == 0
            self._close_pipes()

    def _close_pipes(self) -> None:
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, kind: object, *rest: object) -> None:
        if kind is None:
            self.end()
        else:
            self.kill()


def run_forked(task: Any) -> int:
    """Run a function in a forked child; its exit code: 0, 1 for an exception, -9 when killed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # threads: what is tested
        child = os.fork()
    if child == 0:
        status = 1
        try:
            task()
            status = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(status)
    timer = threading.Timer(TIMEOUT_S, os.kill, (child, 9))
    timer.start()
    try:
        _, status = os.waitpid(child, 0)
    finally:
        timer.cancel()
    return os.waitstatus_to_exitcode(status)
