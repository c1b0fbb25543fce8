"""The demo itself, on a short stream: it learns, is killed, and loses nothing."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from expbuf_core import ExperienceBuffer

DIGITS = Path(__file__).parents[1] / "examples" / "digits"


def run_demo(output: Path, *options: str) -> tuple[dict[str, Any], str]:
    """What it found out, and what it printed."""
    pytest.importorskip("sklearn")
    done = subprocess.run(
        [sys.executable, str(DIGITS / "demo.py"), "--output", str(output), *options],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((output / "figures.json").read_text()), done.stdout


def test_memory_helps_and_survives_the_kill(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    figures, printed = run_demo(tmp_path, "--questions", "600", "--streams", "1")

    (stream,) = figures["streams"]
    (death,) = stream["deaths"]
    assert death["acknowledged"] == death["found"] == death["searchable"] == 301
    assert death["outcomes"] > 250
    assert death["wrong"] == []
    assert len(stream["memory_on"]) == len(stream["memory_off"]) == 600  # it went on to the end
    assert figures["memory_on"] > figures["memory_off"] + 0.1
    assert "by SIGKILL" in printed
    (command,) = (line for line in printed.splitlines() if "A memory:" in line)
    folder = Path(command.split()[-1])
    with ExperienceBuffer.open(folder, mode="r") as memory:
        assert memory.get(7).metadata["thumbnail"].shape == (8, 8)
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")


def test_killed_at_random_moments(tmp_path: Path) -> None:
    figures, _ = run_demo(tmp_path, "--questions", "60", "--streams", "3", "--no-picture")

    for stream in figures["streams"][1:]:
        (death,) = stream["deaths"]
        assert death["wrong"] == []
        assert 31 <= death["acknowledged"] <= death["found"] <= death["acknowledged"] + 1
        assert len(stream["memory_on"]) == 60


# ---------------------------------------------------------------- whether it would notice a loss


@pytest.fixture(scope="module")
def ledger() -> ModuleType:
    name = "digits_ledger"
    spec = importlib.util.spec_from_file_location(name, DIGITS / "ledger.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def books(ledger: ModuleType, *last: dict[str, Any]) -> Any:
    """Two answers, of which the second was voted on by the first and judged; then `last`."""
    kept = ledger.Ledger()
    for event in (
        {"event": "answering", "position": 0},
        {"event": "answered", "position": 0, "id": 0, "answer": "3"},
        {"event": "judging", "id": 0, "neighbours": [], "credit": []},
        {"event": "judged", "position": 0, "right": False},
        {"event": "answering", "position": 1},
        {"event": "answered", "position": 1, "id": 1, "answer": "yes"},
        {"event": "judging", "id": 1, "neighbours": [0], "credit": [1.0]},
        {"event": "judged", "position": 1, "right": True},
        *last,
    ):
        kept.note(event)
    return kept


AS_IT_WAS = ([0, "3", -1.0, 1, 1.0], [1, "yes", 1.0, 0, 0.0])


def test_the_books_agree(ledger: ModuleType) -> None:
    assert books(ledger).audit([*AS_IT_WAS]) == []


@pytest.mark.parametrize(
    "found",
    [
        [AS_IT_WAS[1]],
        [AS_IT_WAS[0]],
        [AS_IT_WAS[1], AS_IT_WAS[0]],
        [*AS_IT_WAS, [2, "no", None, 0, 0.0]],
        [[0, "4", -1.0, 1, 1.0], AS_IT_WAS[1]],
        [[0, "3", None, 1, 1.0], AS_IT_WAS[1]],
        [[0, "3", -1.0, 0, 1.0], AS_IT_WAS[1]],
        [[0, "3", -1.0, 1, 0.0], AS_IT_WAS[1]],
    ],
    ids=["first", "last", "order", "invented", "answer", "reward", "retrievals", "successes"],
)
def test_the_books_disagree(ledger: ModuleType, found: list[list[Any]]) -> None:
    assert books(ledger).audit(found)


def test_what_was_under_way_may_have_happened(ledger: ModuleType) -> None:
    answering = {"event": "answering", "position": 2}
    new = [2, "no", None, 0, 0.0]
    assert books(ledger, answering).audit([*AS_IT_WAS]) == []
    assert books(ledger, answering).audit([*AS_IT_WAS, new]) == []
    assert books(ledger, answering).audit([*AS_IT_WAS, new, [3, "no", None, 0, 0.0]])

    judging = (
        answering,
        {"event": "answered", "position": 2, "id": 2, "answer": "no"},
        {"event": "judging", "id": 2, "neighbours": [0, 1], "credit": [0.0, 1.0]},
    )
    credited = [[0, "3", -1.0, 2, 1.0], [1, "yes", 1.0, 1, 1.0]]
    rewarded = [2, "no", 1.0, 0, 0.0]
    assert books(ledger, *judging).audit([*AS_IT_WAS, new]) == []
    assert books(ledger, *judging).audit([*AS_IT_WAS, rewarded]) == []
    assert books(ledger, *judging).audit([*credited, rewarded]) == []
    assert books(ledger, *judging).audit([credited[0], AS_IT_WAS[1], rewarded])
    assert books(ledger, *judging).audit([[0, "3", -1.0, 2, 0.0], credited[1], rewarded])
