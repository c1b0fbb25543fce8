"""A signal in the middle of an add that native code takes care of, while its thread sleeps."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from expbuf_core import Experience, ExperienceBuffer
from expbuf_core.errors import ReentrantCall
from expbuf_core.filesystem import Buffer, FileSystem
from expbuf_core.native import native

pytestmark = pytest.mark.skipif(native is None, reason="without native code")

CONFIG = {
    "embedding": {"visual_dim": 4, "question_dim": 4},
    "index": {"backend": "exact", "builder": "off"},
}


class Interrupt(BaseException):
    """As KeyboardInterrupt is: no Exception."""


class SlowDisk(FileSystem):
    """Once `slow` is set, the next sync takes until `go_on`."""

    def __init__(self) -> None:
        self.slow = False
        self.go_on = threading.Event()
        self.syncing = threading.Event()
        self.written = threading.Semaphore(0)

    def fdatasync(self, fd: int) -> None:
        if self.slow:
            self.slow = False
            self.syncing.set()
            self.go_on.wait()
        super().fdatasync(fd)

    def pwritev(self, fd: int, parts: Sequence[Buffer], offset: int) -> None:
        super().pwritev(fd, parts, offset)
        if self.syncing.is_set():
            self.written.release()


def experience(answer: str) -> Experience:
    embedding = np.ones(4, np.float32)
    return Experience(v_embed=embedding, q_embed=embedding, answer=answer)


def add_beside_a_sync(folder: Path, handle: Callable[[ExperienceBuffer, SlowDisk], None]) -> None:
    """Add, be interrupted when that is written and waits for its sync, and see what is there."""
    disk = SlowDisk()
    buffer = ExperienceBuffer.open(folder, config=CONFIG, filesystem=disk)
    acknowledged = {}
    for i in range(3):
        acknowledged[f"before {i}"] = buffer.add(experience(f"before {i}"))
    came = threading.Event()

    def handler(*_: Any) -> None:
        if not came.is_set():
            came.set()
            handle(buffer, disk)

    def add() -> None:
        acknowledged["beside"] = buffer.add(experience("beside"))

    main = threading.main_thread().ident
    assert main is not None

    def shoot() -> None:
        disk.written.acquire()  # both logs
        disk.written.acquire()
        while not came.wait(0.01):  # perhaps it does not sleep yet
            signal.pthread_kill(main, signal.SIGUSR1)

    signal.signal(signal.SIGUSR1, handler)
    disk.slow = True
    threads = [threading.Thread(target=add)]
    threads[0].start()
    disk.syncing.wait()
    threads.append(threading.Thread(target=shoot))
    threads[1].start()
    with contextlib.suppress(Interrupt):
        acknowledged["interrupted"] = buffer.add(experience("interrupted"))
    for thread in threads:
        thread.join()
    assert came.is_set()
    acknowledged["behind"] = buffer.add(experience("behind"))
    buffer.close()
    with contextlib.closing(ExperienceBuffer.open(folder)) as again:
        ids = {item.answer: item.id for item in again}
        assert len(ids) == len(again)
    for answer, id_ in acknowledged.items():
        assert ids[answer] == id_


def raise_it(_: ExperienceBuffer, disk: SlowDisk) -> None:
    disk.go_on.set()
    raise Interrupt


def add_another(buffer: ExperienceBuffer, disk: SlowDisk) -> None:
    def release() -> None:
        disk.written.acquire()
        disk.go_on.set()

    threading.Thread(target=release, daemon=True).start()
    with contextlib.suppress(ReentrantCall):
        buffer.add(experience("by the handler"))
    disk.go_on.set()


@pytest.mark.parametrize("handle", [raise_it, add_another])
def test_signal_while_an_add_waits_for_its_sync(
    tmp_path: Path, handle: Callable[[ExperienceBuffer, SlowDisk], None]
) -> None:
    # In a process of its own: it may crash, or hang.
    process = multiprocessing.get_context("spawn").Process(
        target=add_beside_a_sync, args=(tmp_path / "buffer", handle)
    )
    process.start()
    process.join(60)
    process.kill()
    process.join()
    assert process.exitcode == 0
