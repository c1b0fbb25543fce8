"""Runs as a process of its own: forks writers and readers on request, and kills them.

Commands come as lines of JSON on stdin, answers go to stdout. A worker appends lines of JSON to its
report, one before and one after each call; what was written before a SIGKILL stays written.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

import numpy as np

from expbuf_core import Experience, ExperienceBuffer

DIM = 8
MAX_SIZE = 1_000_000

CONFIG: dict[str, Any] = {
    "max_size": MAX_SIZE,
    "embedding": {"visual_dim": DIM, "question_dim": DIM},
    "priority": {"backend": "absolute_reward"},
    "index": {"backend": "exact", "builder": "off"},
    "snapshot": {"every_ops": 300},
}
STORAGE: dict[str, dict[str, Any]] = {
    "file": {"initial_bytes": 1 << 14, "segment_bytes": 1 << 16},
    "lmdb": {"map_bytes": 1 << 20, "stage_bytes": 1 << 15},
}


def open_buffer(folder: Path, durability: str, backend: str) -> ExperienceBuffer:
    persistence = {"backend": backend, backend: STORAGE[backend]}
    config = {**CONFIG, "durability": durability, "persistence": persistence}
    return ExperienceBuffer.open(folder, config=config, mode="a")


def vector(serial: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.random.default_rng(serial).standard_normal(DIM).astype(np.float32)


class Report:
    """Lines in a file that survive the process."""

    def __init__(self, path: Path) -> None:
        self.fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def __call__(self, what: str, **facts: Any) -> None:
        os.write(self.fd, (json.dumps({"what": what, **facts}) + "\n").encode())


def write(buffer: ExperienceBuffer, name: str, rng: random.Random, report: Report) -> None:
    """Add, change and remove experiences, each writer its own."""
    mine: list[int] = []
    serial = 0

    def make(count: int) -> list[Experience]:
        nonlocal serial
        made = []
        for _ in range(count):
            serial += 1
            made.append(
                Experience(
                    v_embed=vector(serial),
                    q_embed=vector(serial + 1),
                    answer=f"{name}/{serial}",
                    question="?" * rng.choice((0, 50, 900)),
                )
            )
        return made

    while True:
        kind = rng.choices(("add", "many", "remove", "reward", "outcome"), (8, 2, 2, 2, 1))[0]
        if kind == "add":
            (item,) = make(1)
            report("add", answers=[item.answer])
            id_ = buffer.add(item)
            report("added", answers=[item.answer], ids=[id_])
            mine.append(id_)
        elif kind == "many":
            items = make(rng.choice((2, 5, 40)))
            answers = [item.answer for item in items]
            report("add", answers=answers)
            ids = [int(id_) for id_ in buffer.add_many(items)]
            report("added", answers=answers, ids=ids)
            mine += ids
        elif mine and kind == "remove":
            ids = [mine.pop(rng.randrange(len(mine)))]
            report("remove", ids=ids)
            buffer.remove(ids)
            report("removed", ids=ids)
        elif mine and kind == "reward":
            ids = [rng.choice(mine)]
            reward = rng.randrange(-100, 100) / 4
            report("reward", ids=ids, reward=reward)
            buffer.update_rewards(ids, [reward])
            report("rewarded", ids=ids, reward=reward)
        elif mine:
            buffer.record_outcome([rng.choice(mine)], success=rng.random() < 0.5)


def read(buffer: ExperienceBuffer, rng: random.Random, report: Report) -> None:
    """Search, look, sample; an id must never change its meaning, and order never break."""
    known: dict[int, str] = {}
    newest = -1
    while True:
        found = buffer.search_index(v_embed=vector(rng.randrange(99)), q_embed=vector(1), k=5)
        ids = [int(id_) for id_ in found.ids]
        assert len(set(ids)) == len(ids), ids
        for hit in found:
            item = hit.experience
            assert item.id == hit.id
            assert known.setdefault(hit.id, item.answer) == item.answer, hit.id
        for count, item in enumerate(buffer):
            assert item.id is not None
            assert known.setdefault(item.id, item.answer) == item.answer, item.id
            newest = max(newest, item.id)
            if count > 20:
                break
        if len(buffer):
            for item in buffer.sample(4):
                assert item.id is not None
                assert known.setdefault(item.id, item.answer) == item.answer, item.id
        report("read", count=len(buffer), newest=newest)


def work(command: dict[str, Any]) -> None:
    report = Report(Path(command["report"]))
    rng = random.Random(command["seed"])
    try:
        folder = Path(command["folder"])
        buffer = open_buffer(folder, command["durability"], command["backend"])
        report("opened", count=len(buffer))
        if command["role"] == "writer":
            write(buffer, command["name"], rng, report)
        else:
            read(buffer, rng, report)
    except BaseException:
        report("error", trace=traceback.format_exc())


def main() -> None:
    living: set[int] = set()

    def end(pid: int) -> None:
        # Only a child that has not been waited for: its number cannot belong to another.
        if pid in living:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            living.discard(pid)

    try:
        for line in sys.stdin:
            command = json.loads(line)
            if "kill" in command:
                end(command["kill"])
                answer = command["kill"]
            else:
                answer = os.fork()
                if answer == 0:
                    try:
                        work(command)
                    finally:
                        os._exit(1)
                living.add(answer)
            sys.stdout.write(f"{answer}\n")
            sys.stdout.flush()
    finally:
        for pid in list(living):
            end(pid)


if __name__ == "__main__":
    main()
