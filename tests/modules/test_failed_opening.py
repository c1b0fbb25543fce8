"""An opening that fails gives back what it took, and the next one works."""

from __future__ import annotations

import contextlib
import gc
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from expbuf_core import Experience, ExperienceBuffer, StorageError, locks
from expbuf_core.testing.faults import FaultyFileSystem
from expbuf_core.testing.processes import Child, in_child

V = np.ones(4, np.float32)


@pytest.fixture(params=["file", "lmdb"])
def config(request: pytest.FixtureRequest) -> dict[str, Any]:
    if request.param == "lmdb":
        pytest.importorskip("expbuf_lmdb")
    sizes = {"file": {"initial_bytes": 1 << 14}, "lmdb": {"stage_bytes": 1 << 14}}
    return {
        "index": {"builder": "off"},
        "persistence": {"backend": request.param, request.param: sizes[request.param]},
    }


def taken() -> tuple[set[str], int, int]:
    """What this process holds: files, lock files, threads."""
    gc.collect()
    files = set()
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # that of the listing itself
            files.add(f"{fd} {os.readlink(f'/proc/self/fd/{fd}')}")
    files = {name for name in files if "/proc/" not in name}
    return files, len(locks._files), threading.active_count()


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs /proc")
@pytest.mark.parametrize("there", [False, True], ids=["creating", "opening"])
def test_whatever_fails(folder: Path, config: dict[str, Any], there: bool) -> None:
    failed = 0
    for nth in range(1, 100):
        path, fs = folder.with_name(str(nth)), FaultyFileSystem()
        if there:
            with ExperienceBuffer.open(path, config=config) as buffer:
                buffer.add(Experience(v_embed=V, q_embed=V))
        before = taken()
        fault = fs.fail(nth=nth)
        try:
            ExperienceBuffer.open(path, config=config, filesystem=fs).close()
        except StorageError:
            failed += 1
            assert taken() == before, f"call {nth}: {fs.calls}"
        struck = fault.seen >= nth
        with ExperienceBuffer.open(path, config=config) as buffer:
            assert len(buffer) == int(there)
            buffer.add(Experience(v_embed=V, q_embed=V))
        if not struck:
            assert failed > 1
            return


def test_a_log_is_no_standard_stream(tmp_path: Path, config: dict[str, Any]) -> None:
    """What a program without standard streams prints goes into no file of the buffer."""

    def work(child: Child) -> None:
        path = tmp_path / "buffer"
        buffer = ExperienceBuffer.open(path, config=config)
        for fd in range(3):
            os.close(fd)
        for _ in range(20):
            buffer.add(Experience(v_embed=V, q_embed=V, answer="x" * 2000))
        for fd in range(3):
            with contextlib.suppress(OSError):
                os.write(fd, b"printed")
        buffer.close()
        with ExperienceBuffer.open(path, mode="r", config=config) as again:
            assert len(list(again)) == 20

    in_child(work)
