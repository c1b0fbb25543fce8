"""The plugins in examples/plugins: each keeps its contract, and works once it is installed."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples" / "plugins"
NAMES = sorted(path.parent.name for path in EXAMPLES.glob("*/pyproject.toml"))
LIBRARIES = {"expbuf_usearch": "usearch"}


def example(name: str) -> ModuleType:
    """The test file of an example, imported as in its own folder."""
    sys.path.insert(0, str(EXAMPLES / name))
    try:
        return importlib.import_module(f"test_{name}")
    finally:
        sys.path.remove(str(EXAMPLES / name))


class TestSurprise(example("expbuf_surprise").TestSurprise):  # type: ignore[misc]
    pass


class TestScaledSurprise(example("expbuf_surprise").TestScaled):  # type: ignore[misc]
    pass


class TestSQLite(example("expbuf_sqlite").TestSQLite):  # type: ignore[misc]
    flips = 100
    many = 300


try:
    _usearch: Any = example("expbuf_usearch").TestUSearch
except pytest.skip.Exception:

    @pytest.mark.skip(reason="usearch is not installed")
    def test_usearch() -> None:
        pass

else:

    class TestUSearch(_usearch):  # type: ignore[misc]
        pass


PROGRAM = """
import sys
import numpy as np
from expbuf_core import Experience, ExperienceBuffer

draw = np.random.default_rng(0)
v, q = draw.standard_normal((2, 300, 16), dtype=np.float32)
with ExperienceBuffer.open("memory", config="choice.yaml") as buffer:
    buffer.add_many(
        [Experience(v_embed=v[i], q_embed=q[i], confidence=0.5) for i in range(300)]
    )
    buffer.rebuild_index()
    assert buffer.search_index(v_embed=v[7], q_embed=q[7], k=1).ids[0] == 7
    buffer.update_rewards([7], [2.0])
    print(buffer.get(7).priority)
    print(buffer.stats()["storage"].get("file"))
    print(buffer.stats()["index"]["segments"][0]["backend"])
with ExperienceBuffer.open("memory") as buffer:
    assert len(buffer) == 300
"""
CHOICES = {
    "expbuf_surprise": "priority: {backend: surprise, surprise: {reward_scale: 2.0}}",
    "expbuf_usearch": "index: usearch",
    "expbuf_sqlite": "persistence: sqlite",
}
SAID = {
    "expbuf_surprise": (0, "0.5"),  # |2.0 / 2.0 - 0.5|
    "expbuf_usearch": (2, "usearch"),
    "expbuf_sqlite": (1, "experience_log.sqlite"),
}


@pytest.mark.parametrize("name", NAMES)
def test_installed_and_named_in_the_configuration(name: str, tmp_path: Path) -> None:
    if name in LIBRARIES:
        pytest.importorskip(LIBRARIES[name])
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=EXAMPLES / name, capture_output=True, timeout=120, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    (tmp_path / "choice.yaml").write_text(f"experience_buffer:\n  {CHOICES[name]}\n")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("EXPBUF_")}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=tmp_path,
        env={**environment, "PYTHONPATH": str(tmp_path / "site")},
        timeout=120,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    line, wanted = SAID[name]
    assert done.stdout.splitlines()[line] == wanted


def test_the_index_is_short() -> None:
    lines = (EXAMPLES / "expbuf_usearch" / "expbuf_usearch.py").read_text().splitlines()
    assert len(lines) <= 100


def test_the_core_knows_none_of_them() -> None:
    words = [name.removeprefix("expbuf_") for name in NAMES]
    for path in (ROOT / "expbuf_core").rglob("*.py"):
        text = path.read_text("utf-8").lower()
        assert not [word for word in words if f"expbuf_{word}" in text], path
