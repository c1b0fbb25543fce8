"""The self-check, on the stand-in: it passes, it fails where it should, it says when there is none.

What it finds on a real GPU is for it to say.
"""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import gpu_standin
import pytest
from gpu_standin import Board

from expbuf_faiss_gpu import devices, probe, selfcheck

SMALL = ["--rows", "4000", "--dim", "32"]
QUICK = ["recall", "removed", "threads", "pressure", "fork"]


@pytest.fixture(autouse=True)
def _fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selfcheck, "_BATCHES", ((1, 2), (32, 2)))
    monkeypatch.setattr(selfcheck, "_QUERIES", 64)


def test_passes(board: Board, capsys: pytest.CaptureFixture[str]) -> None:
    code = selfcheck.main([*SMALL, "--only", *QUICK, "speed"])
    out = capsys.readouterr().out
    assert code == selfcheck.PASSED, out
    print(out)
    assert out.startswith("GPU 0: stand-in, 1,024 of 1,024 MiB free")
    assert "too little memory on GPU 0" in out
    assert "a large search failed and was answered by the CPU" in out
    assert out.endswith("all checks passed\n")


def test_fails(
    board: Board, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    search = gpu_standin.GpuIndex.search

    def wrong(self: Any, x: Any, k: int, *, params: Any = None) -> Any:
        distances, rows = search(self, x, k, params=params)
        return distances, (rows + 1) % self.ntotal

    monkeypatch.setattr(gpu_standin.GpuIndex, "search", wrong)
    code = selfcheck.main([*SMALL, "--only", "recall"])
    out = capsys.readouterr().out
    assert code == selfcheck.FAILED, out
    assert "FAILED  recall" in out
    assert "1 of 1 checks failed" in out


def test_no_device(
    board: Board, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(devices, "probe", lambda number: probe.Verdict(False, "none at all"))
    assert selfcheck.main([]) == selfcheck.NO_DEVICE
    assert capsys.readouterr().out == "no device: none at all\n"


def test_as_a_command() -> None:
    """Without a GPU, in this environment as it is."""
    done = subprocess.run(
        [sys.executable, "-m", "expbuf_faiss_gpu.selfcheck", *SMALL, "--only", "recall"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    if done.returncode != selfcheck.PASSED:
        assert done.returncode == selfcheck.NO_DEVICE, done.stdout + done.stderr
        assert done.stdout.startswith("no device: ")
