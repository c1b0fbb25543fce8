"""A GPU for tests: the stand-in, in this process and in those that it starts."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

STANDIN = Path(__file__).with_name("standin")
sys.path.append(str(STANDIN))

import gpu_standin  # noqa: E402  (after the path is set)

from expbuf_faiss_gpu import devices  # noqa: E402
from expbuf_faiss_gpu.probe import Verdict  # noqa: E402


@pytest.fixture
def board(monkeypatch: pytest.MonkeyPatch) -> Iterator[gpu_standin.Board]:
    """A GPU with 1 GiB, of which nothing is used."""
    pytest.importorskip("faiss")
    board = gpu_standin.Board()
    gpu_standin.install(monkeypatch.setattr, board)
    monkeypatch.setattr(devices, "_devices", {})
    monkeypatch.setattr(devices, "probe", lambda number: Verdict(True, name="stand-in"))
    path = os.pathsep.join([str(STANDIN), *filter(None, [os.environ.get("PYTHONPATH")])])
    monkeypatch.setenv("PYTHONPATH", path)
    monkeypatch.setenv("EXPBUF_GPU_STANDIN", json.dumps({"memory": board.memory}))
    yield board
    assert not board.violations
