"""Copies of buffers that are in use: consistent, alone, and never on top of another buffer."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from expbuf_core import Experience, ExperienceBuffer, StorageError
from expbuf_core import backup as backups
from expbuf_core.backup import backup, beyond, restore
from expbuf_core.contracts import LogGone
from expbuf_core.frozen import Frozen, freeze
from expbuf_core.inspection import columns_of, inspect
from expbuf_core.reindexing import reindex
from expbuf_core.testing.crash import scratch_folder
from expbuf_core.transfer import NOTE
from expbuf_core.verification import verify

SMALL = {"persistence": {"file": {"initial_bytes": 1 << 14, "segment_bytes": 1 << 14}}}
QUIET: dict[str, Any] = {"index": {"backend": "exact", "builder": "off"}, **SMALL}


@pytest.fixture
def home() -> Iterator[Path]:
    folder = scratch_folder()
    yield folder
    shutil.rmtree(folder)


def experience(serial: int) -> Experience:
    vector = np.full(4, serial + 1.0) + np.eye(4)[serial % 4]
    return Experience(v_embed=vector, answer=serial, rewards=float(serial), tags=("a", "b"))


def filled(path: Path, n: int = 60, **overrides: Any) -> ExperienceBuffer:
    buffer = ExperienceBuffer.open(path, config=QUIET, **overrides)
    buffer.add_many([experience(serial) for serial in range(n)])
    return buffer


def contents(buffer: ExperienceBuffer) -> list[tuple[Any, ...]]:
    return [
        (e.id, e.answer, e.priority, e.total_reward, e.retrieval_count, e.success_count, e.tags)
        for e in buffer
    ]


def no_damage(folder: Path) -> bool:
    return not [problem for problem in verify(folder) if problem.damage]


@pytest.mark.parametrize("backend", ["file", "lmdb"])
@pytest.mark.parametrize("target", ["file", "lmdb"])
def test_a_backup_is_the_buffer_and_opens_alone(home: Path, backend: str, target: str) -> None:
    with filled(home / "a", persistence=backend) as buffer:
        found = buffer.search_index(v_embed=np.ones(4), k=5)
        buffer.record_outcome(found.receipt, success=True)
        later = buffer.search_index(v_embed=np.ones(4), k=5)
        buffer.remove([3])
        report = backup(home / "a", home / "b", persistence=target, config=SMALL)
        buffer.add(experience(99))  # nothing waits, and nothing that comes later is in it
        expected = contents(buffer)[:-1]
        assert (report.experiences, report.backend) == (59, target)
    shutil.rmtree(home / "a")
    assert no_damage(home / "b")
    with ExperienceBuffer.load_from_disk(home / "b", config=QUIET) as copy:
        assert contents(copy) == expected
        assert copy.record_outcome(found.receipt, success=True) == 0, "it was counted before"
        assert copy.record_outcome(later.receipt, success=True) == 5
        again = copy.search_index(v_embed=np.ones(4), k=5)
        assert again.ids.tolist() == later.ids.tolist()


def test_a_backup_while_another_process_writes(home: Path) -> None:
    code = f"""
import sys
import numpy as np
from expbuf_core import Experience, ExperienceBuffer
buffer = ExperienceBuffer.open({str(home / "a")!r}, config={QUIET!r})
serial = 60
print("ready", flush=True)
while not sys.stdin.closed:
    ids = buffer.add_many([Experience(v_embed=np.full(4, serial + i + 1.0), answer=serial + i)
                           for i in range(20)])
    serial += 20
    buffer.remove(buffer.ids()[10:12])
    if serial % 100 == 0:
        buffer.save_snapshot()
        print("snapshot", flush=True)
"""
    filled(home / "a", max_size=100).close()
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stdin=subprocess.PIPE
    ) as writer:
        assert writer.stdout is not None
        try:
            for i in range(3):
                for _ in range(2):  # it goes on, and drops what is evicted
                    assert writer.stdout.readline()
                backup(home / "a", home / f"b{i}", config=SMALL)
        finally:
            writer.kill()
    for i in range(3):
        assert no_damage(home / f"b{i}")
        with ExperienceBuffer.load_from_disk(home / f"b{i}", config=QUIET) as copy:
            found = [(e.id, e.answer) for e in copy]
            assert 90 <= len(found) <= 100
            assert all(id_ == answer for id_, answer in found), "of one instant, and none twice"
            added = copy._live().replica.state.total_added
            assert found[-1][0] == added - 1, "up to the last add of its instant"


def test_payloads_that_are_dropped_meanwhile_begin_it_anew(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with filled(home / "a", max_size=60) as buffer:
        turns = [0]
        real = backups.copy

        def overtaken(*arguments: Any, **named: Any) -> Any:
            turns[0] += 1
            if turns[0] == 1:  # all that was to be copied is evicted, and dropped
                buffer.add_many([experience(serial) for serial in range(60, 120)])
                for _ in range(3):
                    buffer.save_snapshot()
                    buffer.add(experience(200))
            return real(*arguments, **named)

        monkeypatch.setattr(backups, "copy", overtaken)
        backup(home / "a", home / "b", config=SMALL)
        assert turns == [2]
        with ExperienceBuffer.load_from_disk(home / "b", config=QUIET) as copy:
            assert contents(copy) == contents(buffer)


def test_what_is_dropped_behind_the_copy_does_not_disturb_it(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A payload that was copied is compared by its seal once it is gone from the source."""
    filled(home / "a").close()

    def gone(*arguments: object) -> None:
        raise LogGone

    def drop(done: int, total: int) -> None:
        if done == total // 2:
            monkeypatch.setattr(Frozen, "pin", gone)

    backup(home / "a", home / "b", config=SMALL, progress=drop)
    with ExperienceBuffer.load_from_disk(home / "b", config=QUIET) as copy:
        assert [e.answer for e in copy] == list(range(60))
    monkeypatch.undo()

    def spoil(done: int, total: int) -> None:
        if done == total // 2:
            monkeypatch.setattr(Frozen, "pin", gone)
            wrong = SimpleNamespace(check_row=lambda row: (7, 0))
            monkeypatch.setattr("expbuf_core.transfer.frames", wrong)

    with pytest.raises(StorageError, match="the payload of experience 0, read back, differs"):
        backup(home / "a", home / "c", config=SMALL, progress=spoil)


def test_it_gives_up_where_it_is_always_overtaken(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled(home / "a").close()

    def gone(*arguments: object) -> None:
        raise LogGone

    monkeypatch.setattr(Frozen, "pin", gone)
    with pytest.raises(StorageError, match="faster than they can be copied"):
        backup(home / "a", home / "b")
    assert not (home / "b" / "expbuf.json").exists()


def test_a_payload_that_was_moved_is_found(home: Path) -> None:
    with filled(home / "a") as buffer, columns_of(home / "a") as reader:
        frozen = freeze(reader)
        keep = np.array([5, 33])
        buffer.remove([id_ for id_ in range(60) if id_ not in keep])
        buffer.add(experience(100))
        buffer.save_snapshot()
        slots = buffer._live().replica.state.find(keep)
        buffer._live().upkeep._move(keep)
        assert (buffer._live().replica.state.location[slots] != 0).all()
        for _ in range(3):
            buffer.add(experience(101))
            buffer.save_snapshot()
        read = frozen.experiences(keep)
        assert [e.answer for e in read] == [5, 33]
        with pytest.raises(LogGone):
            list(frozen.experiences(np.array([7, 33])))


@pytest.mark.parametrize("command", [backup, restore])
def test_it_overwrites_nothing(home: Path, command: Callable[..., Any]) -> None:
    filled(home / "a").close()
    filled(home / "other", 3).close()
    (home / "files").mkdir()
    (home / "files" / "x").write_text("")
    (home / "file").write_text("")
    for name, why in (
        ("other", "holds a buffer already"),
        ("files", "holds other files"),
        ("file", "is a file"),
        ("a", "one must not be"),
        ("a/inside", "one must not be"),
    ):
        with pytest.raises(StorageError, match=why):
            command(home / "a", home / name)
    with ExperienceBuffer.load_from_disk(home / "other", config=QUIET) as other:
        assert len(other) == 3
    with pytest.raises(StorageError, match="no buffer"):
        command(home / "files", home / "new")
    assert not (home / "new").exists()


def test_an_unfinished_backup_is_none(home: Path) -> None:
    filled(home / "a").close()

    def interrupt(done: int, total: int) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        backup(home / "a", home / "b", progress=interrupt)
    assert json.loads((home / "b" / NOTE).read_text())
    for look in (lambda: restore(home / "b", home / "c"), lambda: inspect(home / "b")):
        with pytest.raises(StorageError, match=rf"run `expbuf backup {home}/a {home}/b` again"):
            look()
    assert backup(home / "a", home / "b").resumed == 60
    assert restore(home / "b", home / "c").experiences == 60


def test_ids_that_the_lost_buffer_gave_do_not_come_again(home: Path) -> None:
    with filled(home / "a") as buffer:
        backup(home / "a", home / "b", config=SMALL)
        lost = buffer.add(experience(70))
    times = [restore(home / "b", home / f"c{i}", config=SMALL) for i in range(2)]
    assert times[0].uuid == times[1].uuid
    given = []
    for name in ("b", "c0", "c1"):
        with ExperienceBuffer.load_from_disk(home / name, config=QUIET) as copy:
            given.append(copy.add(experience(71)))
            assert copy.get(given[-1]).answer == 71
            assert lost not in copy
    assert min(given) > lost + (1 << 20)
    assert given[0] < given[1] <= given[2]


def test_numbers_of_copies_do_not_meet() -> None:
    now = 1_800_000_000.0
    first, second = beyond(1000, now), beyond(1000, now + 60)
    assert second - first >= 60 * 60_000, "more than a buffer takes in a minute"
    assert beyond(first + 5, now) > first + 5, "a copy of a copy"
    assert beyond(1000, 0.0) > 1 << 20, "with a clock that knows nothing"


def test_a_buffer_in_memory_can_be_kept(home: Path) -> None:
    with ExperienceBuffer.open(config={"index": "exact"}) as buffer:
        buffer.add_many([experience(serial) for serial in range(10)])
        assert backup(buffer, home / "b", config=SMALL).backend == "file"
        with ExperienceBuffer.load_from_disk(home / "b", config=QUIET) as copy:
            assert contents(copy) == contents(buffer)


def test_an_empty_buffer(home: Path) -> None:
    ExperienceBuffer.open(home / "a", config=QUIET).close()
    assert backup(home / "a", home / "b").experiences == 0
    with ExperienceBuffer.load_from_disk(home / "b", config=QUIET) as copy:
        copy.add(experience(1))


def test_a_reindexed_buffer(home: Path) -> None:
    given = [Experience(v_embed=np.eye(4)[i % 4], q_embed=np.ones(4)) for i in range(8)]
    with ExperienceBuffer.open(home / "a", config=QUIET) as buffer:
        buffer.add_many(given)
    reindex(home / "a", fusion="weighted_concat", index__backend="exact")
    backup(home / "a", home / "b", config=SMALL)
    query = {"v_embed": np.array([1.0, 2.0, 0.0, 0.0]), "q_embed": np.ones(4)}
    found = []
    for name in ("a", "b"):
        with ExperienceBuffer.load_from_disk(home / name, config={"index": "exact"}) as copy:
            found.append(copy.search_index(**query, k=4))
    assert found[0].ids.tolist() == found[1].ids.tolist()
    assert found[0].similarities.tolist() == found[1].similarities.tolist()
