"""The CartPole example: it learns from what it remembers, and goes on after a kill."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "cartpole"


def train(folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(EXAMPLE / "train.py"), "--folder", str(folder), *more],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


@pytest.mark.parametrize("more", [[], ["--uniform"]])
def test_killed_and_resumed(more: list[str], tmp_path: Path) -> None:
    pytest.importorskip("gymnasium")
    first = train(tmp_path, "--steps", "900", "--kill-at", "620", *more)
    assert first.returncode == -signal.SIGKILL, first.stderr
    second = train(tmp_path, "--steps", "900", *more)
    assert second.returncode == 0, second.stderr
    found = re.match(r"step 500; 620 transitions remembered", second.stdout)
    assert found, second.stdout
    assert "mean return of the last" in second.stdout


def test_the_network_learns(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLE))
    from dqn import DQN  # type: ignore[import-not-found]

    agent, draw = DQN(4, 2, seed=0), np.random.default_rng(0)

    def learn() -> float:
        seen = draw.standard_normal((64, 4)).astype(np.float32)
        actions = draw.integers(0, 2, 64)
        rewards = np.where(actions == (seen[:, 0] > 0), 1, 0).astype(np.float32)
        over = np.ones(64, np.bool_)
        return float(agent.learn(seen, actions, rewards, seen, over, np.ones(64)).mean())

    before = np.mean([learn() for _ in range(5)])
    for _ in range(600):
        learn()
    assert np.mean([learn() for _ in range(5)]) < before / 4
    right = np.array([[2, 0, 0, 0], [-2, 0, 0, 0]], np.float32)
    assert [agent.act(one, 0) for one in right] == [1, 0]
    agent.save(tmp_path / "agent.npz", 7, "a note")
    other = DQN(4, 2, seed=1)
    assert other.load(tmp_path / "agent.npz") == (7, "a note")
    assert other.rng.random() == agent.rng.random(), "the stream does not go on"
    assert np.array_equal(other.online(right), agent.online(right))
    assert other.updates == agent.updates


def test_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """By finite differences."""
    monkeypatch.syspath_prepend(str(EXAMPLE))
    from dqn import Network

    draw = np.random.default_rng(0)
    network = Network(4, 2, 8, draw)
    network.parameters = [p.astype(np.float64) for p in network.parameters]
    x, slope = draw.standard_normal((5, 4)), draw.standard_normal((5, 2))
    gradients = network.gradients(network.layers(x), slope)
    for parameter, gradient in zip(network.parameters, gradients, strict=True):
        at = tuple(draw.integers(0, size) for size in parameter.shape)
        values = []
        for change in (1e-6, -2e-6):
            parameter[at] += change
            values.append((network(x) * slope).sum())
        parameter[at] += 1e-6
        assert np.isclose((values[0] - values[1]) / 2e-6, gradient[at], rtol=1e-4, atol=1e-8)
