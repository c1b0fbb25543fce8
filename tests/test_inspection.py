"""A buffer seen from outside: facts, who has it open, what happens, why a search found a thing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from expbuf_core import Experience, ExperienceBuffer, StorageError
from expbuf_core.explanation import explain
from expbuf_core.inspection import Watch, columns_of, inspect, openers
from expbuf_core.testing.crash import scratch_folder
from expbuf_core.verification import verify

CONFIG: dict[str, Any] = {
    "index": {"backend": "exact", "builder": "off"},
    "persistence": {"file": {"initial_bytes": 1 << 14, "segment_bytes": 1 << 14}},
}


@pytest.fixture
def home() -> Iterator[Path]:
    folder = scratch_folder()
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def buffer(home: Path) -> Iterator[ExperienceBuffer]:
    with ExperienceBuffer.open(home / "a", config=CONFIG, max_size=40) as opened:
        opened.add_many([Experience(v_embed=np.eye(8)[i % 8], answer=i) for i in range(40)])
        yield opened


def test_facts_agree_with_the_buffer(home: Path, buffer: ExperienceBuffer) -> None:
    assert buffer.rebuild_index()
    lsn = buffer.save_snapshot()
    for i in range(5):  # five dead rows in the segment, five in the tail
        buffer.add(Experience(v_embed=np.eye(8)[i], answer=i))
    facts = inspect(home / "a")
    assert (facts["experiences"], facts["total_added"], facts["backend"]) == (40, 45, "file")
    index = facts["index"]
    assert (index["tail_rows"], index["dead_rows"]) == (5, 5)
    assert [(s["backend"], s["rows"]) for s in index["segments"]] == [("exact", 40)]
    assert facts["snapshots"][0]["lsn"] == lsn
    assert facts["lag"] == {
        "unsynced_operations": 0,
        "snapshot_operations": buffer.lsn - lsn,
        "index_operations": buffer.lsn - index["lsn"],
    }
    assert facts["bytes"]["log"] > 0


def test_who_has_it_open(home: Path, buffer: ExperienceBuffer) -> None:
    code = f"""
import sys
from expbuf_core import ExperienceBuffer
with ExperienceBuffer.open({str(home / "a")!r}, config={CONFIG!r}) as buffer:
    with buffer._live().maintenance:
        print("ready", flush=True)
        sys.stdin.read()
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stdin=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline()
        found = {process.pid: process for process in openers(home / "a")}
        other.communicate(timeout=60)
    assert set(found) == {os.getpid(), other.pid}
    assert found[other.pid].locks == ("maintenance",)
    assert sys.executable.rpartition("/")[2] in found[other.pid].command
    assert found[os.getpid()].locks == ()
    assert [process.pid for process in openers(home / "a")] == [os.getpid()]


def test_who_has_it_open_where_the_system_does_not_list_locks(
    home: Path, buffer: ExperienceBuffer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("expbuf_core.inspection._record_locks", dict)
    assert [process.pid for process in openers(home / "a")] == [os.getpid()]


def test_a_watch_sees_what_happens(home: Path, buffer: ExperienceBuffer) -> None:
    with Watch(home / "a", searches=True) as watch:
        before = watch.tick(0.01)
        assert (before.adds, before.operations, before.sync_wait_ms) == (0, 0, None)
        for i in range(10):
            buffer.add(Experience(v_embed=np.eye(8)[i % 8], answer=i))
        buffer.record_outcome(buffer.ids()[-2:], success=True)
        tick = watch.tick(0.01)
    seen = {
        name: round(getattr(tick, name) * tick.seconds)
        for name in ("adds", "operations", "evictions", "retrievals", "successes")
    }
    assert seen == {
        "adds": 10, "operations": 11, "evictions": 10, "retrievals": 2, "successes": 2,
    }  # fmt: skip
    assert (tick.experiences, tick.index_rows, tick.processes) == (40, 40, 1)
    assert tick.read_ms is not None
    assert tick.search_ms is not None


def test_an_empty_buffer_can_be_watched(home: Path) -> None:
    with ExperienceBuffer.open(home / "b", config=CONFIG), Watch(home / "b") as watch:
        assert watch.tick(0.01).read_ms is None
    with Watch(home / "b") as watch:  # and one that nobody has open
        assert watch.tick(0.01).unsynced == 0


def test_columns_are_read_without_an_index(home: Path, buffer: ExperienceBuffer) -> None:
    assert buffer.rebuild_index()
    with columns_of(home / "a") as reader:
        assert [e.answer for e in reader] == list(range(40))
        buffer.add(Experience(v_embed=np.ones(8), answer="new"))
        assert reader.get(40).answer == "new"
        assert len(reader.sample(4)) == 4
        assert not reader._live().replica.tiers.segments
    with pytest.raises(StorageError, match="no buffer"):
        columns_of(home)


def test_what_is_being_written_is_no_damage(
    home: Path, buffer: ExperienceBuffer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between what `verify` reads and what it concludes, others go on writing."""
    from expbuf_file.logfile import LogFile

    real, added = LogFile.proof, [0]

    def meanwhile(self: LogFile, offset: int, limit: int) -> int:
        if not added[0]:
            for i in range(3):
                buffer.add(Experience(v_embed=np.ones(8), answer=i))
                added[0] += 1
        return real(self, offset, limit)

    monkeypatch.setattr(LogFile, "proof", meanwhile)
    assert [problem for problem in verify(home / "a") if problem.damage] == []
    assert added == [3]


# ---------------------------------------------------------------- explanations


def test_explanations(home: Path) -> None:
    config = {**CONFIG, "fusion": "weighted_concat"}
    with ExperienceBuffer.open(home / "a", config=config) as buffer:
        rng = np.random.default_rng(0)
        v, q = rng.standard_normal((20, 8)), rng.standard_normal((20, 4))
        buffer.add_many([Experience(v_embed=a, q_embed=b) for a, b in zip(v, q, strict=True)])
        buffer.rebuild_index()
        last = buffer.add(Experience(v_embed=v[3], q_embed=-q[3], rewards=2.0, confidence=0.25))
        found = buffer.search_index(v_embed=v[3], q_embed=q[3], k=21)
        reasons = explain(buffer, found, v_embed=v[3], q_embed=q[3])
        assert [reason.id for reason in reasons] == found.ids.tolist()
        assert [reason.rank for reason in reasons] == list(range(1, 22))
        for reason in reasons:
            assert reason.exact == pytest.approx(reason.similarity, abs=1e-6)
            assert reason.visual is not None
            assert reason.question is not None
            fused = 0.7 * reason.visual + 0.3 * reason.question
            assert reason.similarity == pytest.approx(fused, abs=1e-6)
        by_id = {reason.id: reason for reason in reasons}
        assert (by_id[3].visual, by_id[3].tier) == (pytest.approx(1), "000001")
        new = by_id[last]
        assert (new.visual, new.question) == (pytest.approx(1), pytest.approx(-1))
        assert (new.tier, new.backend, new.reward, new.confidence) == ("tail", "exact", 2.0, 0.25)
        fused = buffer.search_index(hybrid_embed=np.ones(12), k=1)
        (reason,) = explain(buffer, fused, hybrid_embed=np.ones(12))
        assert (reason.visual, reason.question) == (None, None)
        none = buffer.search_index(v_embed=v[3], k=1, where=lambda c: c.id < 0)
        assert explain(buffer, none, v_embed=v[3]) == []


def test_what_was_evicted_meanwhile_is_explained(home: Path) -> None:
    rng = np.random.default_rng(0)
    with ExperienceBuffer.open(home / "a", config=CONFIG, max_size=2000) as buffer:
        v = rng.standard_normal((2000, 8), dtype=np.float32)
        buffer.add_many({"v_embed": v, "q_embed": v})
        found = buffer.search_index(v_embed=v[3], q_embed=v[3], k=9)
        buffer.remove(buffer.ids()[:-1])
        gone = [reason.exact for reason in explain(buffer, found, v_embed=v[3], q_embed=v[3])]
        np.testing.assert_allclose(gone, found.similarities, atol=1e-6)


def test_a_reader_outlives_its_writers(home: Path) -> None:
    """Each session of writers closes its log in order; who only reads goes on to the next one."""

    def write(serial: int) -> None:
        with ExperienceBuffer.open(home / "a", config=CONFIG) as writer:
            writer.add(Experience(v_embed=np.eye(8)[serial], answer=serial))

    write(0)
    with (
        Watch(home / "a") as watch,
        ExperienceBuffer.open(home / "a", mode="r", config=CONFIG) as reader,
    ):
        for serial in range(1, 5):
            write(serial)
            with ExperienceBuffer.open(home / "a", config=CONFIG) as writer:
                assert [e.answer for e in reader] == list(range(serial + 1))
                assert watch.tick(0.01).experiences == serial + 1
                found = reader.search_index(v_embed=np.eye(8)[serial], k=1)
                assert found.ids.tolist() == writer.ids()[-1:].tolist()
