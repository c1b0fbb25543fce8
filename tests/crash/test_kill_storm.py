"""Kill writers and readers of one folder again and again; nothing acknowledged may be missing."""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from storm_worker import open_buffer

LONG = os.environ.get("EXPBUF_LONG", "") not in ("", "0")
ROUNDS = 60 if LONG else 4
ROUND_S = 8.0 if LONG else 3.5


class Storm:
    """Processes on one folder, through two parents that fork and kill them.

    The children of one of them do without native code.
    """

    def __init__(self, folder: Path, reports: Path) -> None:
        self.backend = "file"
        self.folder = folder
        self.reports = reports
        self._parents = [
            subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("storm_worker.py"))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=os.environ | {"EXPBUF_NATIVE": native},
            )
            for native in (os.environ.get("EXPBUF_NATIVE", "1"), "0")
        ]
        self._parent_of: dict[int, subprocess.Popen[str]] = {}
        self._names = 0

    def ask(self, parent: subprocess.Popen[str], **command: Any) -> int:
        assert parent.stdin is not None
        assert parent.stdout is not None
        parent.stdin.write(json.dumps(command) + "\n")
        parent.stdin.flush()
        return int(parent.stdout.readline())

    def start(self, role: str, durability: str, seed: int) -> int:
        self._names += 1
        name = f"{role}-{self._names}"
        parent = self._parents[self._names % 2]
        pid = self.ask(
            parent,
            role=role,
            name=name,
            seed=seed,
            durability=durability,
            backend=self.backend,
            folder=str(self.folder),
            report=str(self.reports / f"{name}.jsonl"),
        )
        self._parent_of[pid] = parent
        return pid

    def kill(self, pid: int) -> None:
        self.ask(self._parent_of.pop(pid), kill=pid)

    def wait_for(self, *what: str) -> None:
        """See that each of these has happened at least once, however busy the machine is."""
        deadline = time.monotonic() + 60
        missing = {f'"what": "{name}"' for name in what}
        while missing and time.monotonic() < deadline:
            said = "".join(path.read_text() for path in self.reports.glob("*.jsonl"))
            missing = {name for name in missing if name not in said}
            time.sleep(0.05 if missing else 0)

    def close(self) -> None:
        for parent in self._parents:
            assert parent.stdin is not None
            assert parent.stdout is not None
            parent.stdin.close()
            parent.wait(30)
            parent.stdout.close()


class Ledger:
    """What all reports say."""

    def __init__(self, reports: Path) -> None:
        self.started: set[str] = set()
        self.acknowledged: dict[int, str] = {}
        self.removals: set[int] = set()
        self.removed: set[int] = set()
        self.rewards: dict[int, list[float | None]] = {}  # what may stand there
        self.reads = 0
        for path in sorted(reports.glob("*.jsonl")):
            for line in path.read_text().splitlines():
                facts = json.loads(line)
                match facts["what"]:
                    case "add":
                        self.started.update(facts["answers"])
                    case "added":
                        for id_, answer in zip(facts["ids"], facts["answers"], strict=True):
                            # An id never names another experience.
                            assert self.acknowledged.setdefault(id_, answer) == answer
                    case "remove":
                        self.removals.update(facts["ids"])
                    case "removed":
                        self.removed.update(facts["ids"])
                    case "reward":
                        self.rewards.setdefault(facts["ids"][0], [None]).append(facts["reward"])
                    case "rewarded":
                        self.rewards[facts["ids"][0]] = [facts["reward"]]
                    case "read":
                        self.reads += 1
                    case "error":
                        raise AssertionError(f"{path.stem} failed:\n{facts['trace']}")

    def check(self, folder: Path, backend: str) -> int:
        with contextlib.closing(open_buffer(folder, "sync", backend)) as buffer:
            found = {int(item.id or 0): item for item in buffer}
            ids = list(found)
            assert ids == sorted(set(ids))
            lost = set(self.acknowledged) - set(found) - self.removals
            assert not lost, f"acknowledged and lost: {sorted(lost)[:10]}"
            back = self.removed & set(found)
            assert not back, f"removed and back: {sorted(back)[:10]}"
            answers = Counter(item.answer for item in found.values())
            assert set(answers) <= self.started, "something that nobody wrote"
            assert max(answers.values(), default=1) == 1, answers.most_common(3)
            for id_, item in found.items():
                assert self.acknowledged.get(id_, item.answer) == item.answer
            for id_, allowed in self.rewards.items():
                if id_ in found:
                    assert found[id_].total_reward in allowed
            hits = buffer.search_index(v_embed=[0.5] * 8, q_embed=[0.5] * 8, k=len(found) + 10)
            assert sorted(int(id_) for id_ in hits.ids) == ids
            return len(found)


@pytest.fixture
def storm(disk_path: Path) -> Iterator[Storm]:
    reports = disk_path / "reports"
    reports.mkdir()
    storm = Storm(disk_path / "buffer", reports)
    try:
        yield storm
    finally:
        storm.close()


@pytest.mark.parametrize(
    ("backend", "durability"),
    [
        ("file", "sync"),
        ("file", "group"),
        ("file", "os"),
        ("lmdb", "sync"),
        pytest.param("lmdb", "group", marks=pytest.mark.long),
        ("lmdb", "os"),
    ],
)
def test_kill_storm(storm: Storm, backend: str, durability: str) -> None:
    pytest.importorskip(f"expbuf_{backend}")
    storm.backend = backend
    rng = random.Random(durability)
    kills = count = 0
    rounds = ROUNDS if LONG or backend == "file" else 1
    for _ in range(rounds):
        roles = ["writer", "writer", "writer", "reader"]
        living = {storm.start(role, durability, rng.randrange(1 << 30)): role for role in roles}
        deadline = time.monotonic() + ROUND_S
        while time.monotonic() < deadline:
            time.sleep(rng.choice((0.003, 0.03, 0.15, 0.4)))
            victims = rng.sample(sorted(living), 1 if rng.random() < 0.9 else len(living))
            for pid in victims:
                role = living.pop(pid)
                storm.kill(pid)
                kills += 1
                living[storm.start(role, durability, rng.randrange(1 << 30))] = role
        storm.wait_for("added", "read")
        for pid in living:
            storm.kill(pid)
        count = Ledger(storm.reports).check(storm.folder, backend)
    ledger = Ledger(storm.reports)
    assert kills > 10 * rounds
    assert count > 0
    assert ledger.acknowledged
    assert ledger.reads
