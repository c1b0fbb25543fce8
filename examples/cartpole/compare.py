"""Prioritized against uniform replay: learning curves, one run of each seed killed half-way."""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
from train import read

HERE = Path(__file__).parent


def run(folder: Path, seed: int, steps: int, *, uniform: bool) -> list[tuple[int, float]]:
    """Train, get killed half-way, go on."""
    command = [sys.executable, str(HERE / "train.py"), "--folder", str(folder)]
    command += ["--seed", str(seed), "--steps", str(steps), *(["--uniform"] if uniform else [])]
    killed = subprocess.run([*command, "--kill-at", str(steps // 2)], check=False)
    assert killed.returncode == -signal.SIGKILL, "it was not killed"
    subprocess.run(command, check=True)
    return read(folder / "episodes.csv")


def smoothed(episodes: list[tuple[int, float]], at: np.ndarray) -> np.ndarray:
    """Mean return of the ten episodes before each of these steps."""
    steps, totals = np.array(episodes).T
    ends = np.searchsorted(steps, at, "right")
    return np.array([totals[max(0, end - 10) : end].mean() if end else 0 for end in ends])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("demo_output/cartpole_runs"))
    parser.add_argument("--steps", type=int, default=12_000)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    at = np.linspace(options.steps / 12, options.steps, 12).astype(int)
    curves = {}
    for name in ("prioritized", "uniform"):
        curves[name] = np.array(
            [
                smoothed(
                    run(
                        options.folder / f"{name}{seed}",
                        seed,
                        options.steps,
                        uniform=name == "uniform",
                    ),
                    at,
                )
                for seed in range(options.seeds)
            ]
        )
    print(f"\nmean return of ten episodes, {options.seeds} seeds (least and most)")
    print("   step  " + "".join(f"{name:>22s}" for name in curves))
    for i, step in enumerate(at):
        cells = [
            f"{c[:, i].mean():8.0f} ({c[:, i].min():.0f}-{c[:, i].max():.0f})"
            for c in curves.values()
        ]
        print(f"{step:7d}  " + "".join(f"{cell:>22s}" for cell in cells))
    draw(options.folder / "learning.png", at, curves, options.steps // 2)


def draw(path: Path, at: np.ndarray, curves: dict[str, np.ndarray], killed_at: int) -> None:
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for name, curve in curves.items():
        (line,) = axes.plot(at, curve.mean(0), label=name)
        axes.fill_between(at, curve.min(0), curve.max(0), alpha=0.2, color=line.get_color())
    axes.axvline(killed_at, color="grey", linestyle=":", label="killed and resumed")
    axes.set(xlabel="step", ylabel="mean return of ten episodes", title="CartPole-v1, DQN")
    axes.legend()
    figure.savefig(path, dpi=120)
    print(path)


if __name__ == "__main__":
    main()
