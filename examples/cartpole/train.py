"""CartPole by DQN; the replay memory is an expbuf buffer. Kill it at any time and run it again."""

from __future__ import annotations

import argparse
import csv
import json
import os
import signal
import time
from pathlib import Path

import gymnasium
import numpy as np
from dqn import DQN

from expbuf_core import Experience, ExperienceBuffer

BATCH = 64
WARM_UP = 500  # steps before learning begins
SAVE_EVERY = 250
ALPHA = 0.6


def train(
    folder: Path, *, steps: int, prioritized: bool, seed: int, kill_at: int | None = None
) -> list[tuple[int, float]]:
    """Train up to so many steps in all; (step, return) of every episode."""
    folder.mkdir(parents=True, exist_ok=True)
    agent = DQN(4, 2, seed=seed)
    weights, curve = folder / "agent.npz", folder / "episodes.csv"
    step, stream = agent.load(weights) if weights.exists() else (0, "")
    episodes = [episode for episode in read(curve) if episode[0] <= step]
    environment = gymnasium.make("CartPole-v1")
    with ExperienceBuffer.open(
        folder / "memory",
        max_size=20_000,
        durability="os",  # survives every kill; "sync" would survive a power failure, too
        fusion="weighted_concat",  # the parts differ in length
        index={"backend": "exact", "builder": "off"},  # nobody searches here
        sampling={"alpha": ALPHA},
        seed=seed,
    ) as memory:
        if stream:  # draw on as if nothing had happened
            memory.set_rng_state(json.loads(stream))
        print(f"step {step}; {len(memory)} transitions remembered ({memory.recovery})")
        highest = 1.0
        while step < steps:
            observation, _ = environment.reset(seed=seed * 100_000 + step)
            total, over = 0.0, False
            while not over and step < steps:
                action = agent.act(observation, max(0.05, 1 - step / 2000))
                following, reward, terminal, truncated, _ = environment.step(action)
                memory.add(
                    # All that learning needs in arrays: nothing is decoded one by one.
                    Experience(
                        v_embed=np.append(observation, [action, terminal]),
                        q_embed=following,
                        rewards={"step": float(reward)},
                    ),
                    priority=highest,  # so that each is looked at soon
                )
                observation, over = following, terminal or truncated
                total += float(reward)
                step += 1
                if len(memory) >= WARM_UP:
                    highest = max(highest, learn(agent, memory, step / steps, prioritized))
                if step % SAVE_EVERY == 0:
                    agent.save(weights, step, json.dumps(memory.rng_state()))
                if step == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)
            if over:
                episodes.append((step, total))
                with curve.open("w", newline="") as file:
                    csv.writer(file).writerows(episodes)
        agent.save(weights, step, json.dumps(memory.rng_state()))
    environment.close()
    return episodes


def learn(agent: DQN, memory: ExperienceBuffer, progress: float, prioritized: bool) -> float:
    """One update; the highest new priority."""
    batch = memory.sample(BATCH, beta=0.4 + 0.6 * progress, uniform=not prioritized)
    now = batch.v_embed
    errors = agent.learn(
        now[:, :-2],
        now[:, -2].astype(int),
        batch.total_reward.astype(np.float32),
        batch.q_embed,
        now[:, -1] > 0,
        batch.is_weights,
    )
    if not prioritized:
        return 0.0
    memory.update_priorities(batch.ids, errors)
    return float(errors.max())


def read(curve: Path) -> list[tuple[int, float]]:
    if not curve.exists():
        return []
    with curve.open(newline="") as file:
        return [(int(step), float(total)) for step, total in csv.reader(file)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("demo_output/cartpole"))
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--uniform", action="store_true", help="without priorities")
    parser.add_argument("--kill-at", type=int, help="SIGKILL itself at this step")
    options = parser.parse_args()
    started = time.monotonic()
    episodes = train(
        options.folder,
        steps=options.steps,
        prioritized=not options.uniform,
        seed=options.seed,
        kill_at=options.kill_at,
    )
    last = [total for _, total in episodes[-20:]]
    print(
        f"{len(episodes)} episodes; mean return of the last {len(last)}: "
        f"{np.mean(last) if last else 0:.0f} of 500; {time.monotonic() - started:.0f} s"
    )


if __name__ == "__main__":
    main()
