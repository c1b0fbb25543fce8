"""A recovery in the middle of a read in mode "r", which has no share in the open lock."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from expbuf_core import (
    CorruptionError,
    Experience,
    ExperienceBuffer,
    StorageError,
    hookimpl,
    recovery,
    session,
)
from expbuf_core import control as c
from expbuf_core.control import Control
from expbuf_core.replica import Replica
from expbuf_core.verification import verify
from expbuf_file.adapter import FilePersistenceAdapter

SETTINGS: dict[str, Any] = {"index": {"backend": "exact", "builder": "off"}}


def experience(n: int) -> Experience:
    return Experience(v_embed=np.full(4, n + 1.0), q_embed=np.full(4, 1.0), answer=str(n))


KILLED = """
import sys
import numpy as np
from expbuf_core import ExperienceBuffer
parts = np.ones((5, 4))
buffer = ExperienceBuffer.open(sys.argv[1], index={"backend": "exact", "builder": "off"})
buffer.add_many({"v_embed": parts, "q_embed": parts, "answer": list("01234")})
print("added", flush=True)
sys.stdin.read()
"""


def before_its_next_refresh(
    monkeypatch: pytest.MonkeyPatch, reader: ExperienceBuffer, work: Callable[[], None]
) -> None:
    """Have something done when the reader has looked at who writes, and not at what yet."""
    real, mine, todo = Replica.refresh, reader._session.replica, [work]

    def refresh(self: Replica) -> None:
        if self is mine and todo:
            todo.pop()()
        real(self)

    monkeypatch.setattr(Replica, "refresh", refresh)


@pytest.mark.parametrize("backend", ["file", "lmdb"])
def test_a_recovery_between_two_looks(
    folder: Path, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    ExperienceBuffer.open(folder, config={**SETTINGS, "persistence": backend}).close()
    killed = subprocess.Popen(
        [sys.executable, "-c", KILLED, folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert killed.stdout is not None
    assert killed.stdout.readline() == b"added\n"
    with ExperienceBuffer.open(folder, config=SETTINGS, mode="r") as reader:
        assert len(reader) == 5
        came: list[ExperienceBuffer] = []

        def recover() -> None:
            killed.kill()
            killed.communicate()
            came.append(ExperienceBuffer.open(folder, config=SETTINGS))
            came[0].add(experience(5))

        before_its_next_refresh(monkeypatch, reader, recover)
        assert [e.answer for e in reader] == ["0", "1", "2", "3", "4", "5"]
        came[0].close()


def test_what_is_being_recovered_is_as_it_was(folder: Path) -> None:
    """The page is in flux until the recovery is through."""
    with ExperienceBuffer.open(folder, config=SETTINGS) as writer:
        writer.add_many([experience(n) for n in range(5)])
        with ExperienceBuffer.open(folder, config=SETTINGS, mode="r") as reader:
            words = writer._session.control.words
            generation, lsn = words[c.GENERATION], words[c.DURABLE]
            words[c.GENERATION] = 0
            for durable in (0, lsn + 1):
                words[c.DURABLE] = words[c.PUBLISHED] = durable
                assert len(reader) == 5
            words[c.DURABLE] = words[c.PUBLISHED] = lsn
            words[c.GENERATION] = generation
            writer.add(experience(5))
            assert len(reader) == 6


def test_a_recovery_is_waited_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with ExperienceBuffer.open(folder, config=SETTINGS) as writer:
        writer.add(experience(0))
        with ExperienceBuffer.open(folder, config=SETTINGS, mode="r") as reader:
            words = writer._session.control.words
            generation, lsn = words[c.GENERATION], words[c.DURABLE]

            def begin() -> None:
                words[c.GENERATION] = 0
                words[c.DURABLE] = lsn + 1

            def end(seconds: float) -> None:
                words[c.DURABLE] = lsn
                words[c.GENERATION] = generation + 2

            before_its_next_refresh(monkeypatch, reader, begin)
            monkeypatch.setattr(session.time, "sleep", end)
            assert len(reader) == 1
            assert words[c.GENERATION] == generation + 2


def test_a_recovery_that_does_not_end(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with ExperienceBuffer.open(folder, config=SETTINGS) as writer:
        writer.add(experience(0))
        with ExperienceBuffer.open(folder, config=SETTINGS, mode="r", lock_timeout_s=0.2) as reader:
            words = writer._session.control.words
            generation, lsn = words[c.GENERATION], words[c.DURABLE]

            def begin() -> None:
                words[c.GENERATION] = 0
                words[c.DURABLE] = lsn + 1

            before_its_next_refresh(monkeypatch, reader, begin)
            with pytest.raises(StorageError, match="is being recovered"):
                len(reader)
            words[c.DURABLE], words[c.GENERATION] = lsn, generation
            assert len(reader) == 1


@pytest.mark.parametrize("page", [True, False])
def test_without_writers_nothing_is_waited_for(folder: Path, page: bool) -> None:
    """Also where an exception has left what was read half-way, and it is read anew."""
    with ExperienceBuffer.open(folder, config=SETTINGS) as writer:
        writer.add_many([experience(n) for n in range(5)])
    if not page:
        (folder / "control").unlink()
    with ExperienceBuffer.open(folder, config=SETTINGS, mode="r", lock_timeout_s=0.2) as reader:
        reader._session.replica.broken = True
        assert [e.answer for e in reader] == ["0", "1", "2", "3", "4"]


@pytest.mark.parametrize("backend", ["file", "lmdb"])
@pytest.mark.parametrize("before", ["a writer", "a control page", "no control page"])
def test_a_recovery_while_a_reader_opens(
    folder: Path, monkeypatch: pytest.MonkeyPatch, backend: str, before: str
) -> None:
    """What it then misses is no damage: it opens once more, and tells nobody."""
    with ExperienceBuffer.open(folder, config={**SETTINGS, "persistence": backend}) as writer:
        writer.add_many([experience(n) for n in range(5)])
        writing = before == "a writer"
        if not writing:
            writer.close()
        if before == "no control page":
            (folder / "control").unlink()
        came: list[ExperienceBuffer] = []
        told: list[str] = []

        name = "follow_from_snapshot" if writing else "recover"
        real = getattr(recovery, name)

        def once(replica: Replica, path: Path, *more: object) -> object:
            if came or replica.adapter is getattr(writer._session, "adapter", None):
                return real(replica, path, *more)
            writer.close()
            came.append(None)  # type: ignore[arg-type]  # so that its own recovery is the real one
            came[0] = ExperienceBuffer.open(folder, config=SETTINGS)
            came[0].add(experience(5))
            raise CorruptionError("operation 4 is missing", path=folder, offset=0)

        monkeypatch.setattr(recovery, name, once)
        with ExperienceBuffer.open(
            folder, config=SETTINGS, mode="r", plugins=[Told(told)]
        ) as reader:
            assert [e.answer for e in reader] == ["0", "1", "2", "3", "4", "5"]
        assert not told
        came[0].close()


class Told:
    def __init__(self, told: list[str]) -> None:
        self.told = told

    @hookimpl
    def expbuf_on_corruption(self, path: str, offset: int, error: str) -> None:
        self.told.append(error)


def test_recoveries_without_end(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ExperienceBuffer.open(folder, config=SETTINGS).close()
    tries = []

    def overtaken(*arguments: object) -> None:
        page = Control.map(folder / "control", writable=True)
        page.activate()
        page.close()
        tries.append(1)
        raise CorruptionError("operation 4 is missing", path=folder, offset=0)

    monkeypatch.setattr(recovery, "recover", overtaken)
    with pytest.raises(CorruptionError, match="operation 4"):
        ExperienceBuffer.open(folder, config=SETTINGS, mode="r")
    assert len(tries) == 10


def test_damage_stays_damage(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with ExperienceBuffer.open(folder, config=SETTINGS) as writer:
        writer.add(experience(0))

        def damaged(*arguments: object) -> None:
            raise CorruptionError("operation 4 is missing", path=folder, offset=0)

        monkeypatch.setattr(recovery, "follow_from_snapshot", damaged)
        with pytest.raises(CorruptionError, match="operation 4"):
            ExperienceBuffer.open(folder, config=SETTINGS, mode="r")


def test_payloads_that_move_while_they_are_verified(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few survivors do not keep a file: they are written again, and it is deleted."""
    small = {"file": {"initial_bytes": 1 << 14, "segment_bytes": 1 << 14}}
    with ExperienceBuffer.open(folder, config={**SETTINGS, "persistence": small}) as writer:
        writer.add_many([experience(n) for n in range(300)])
        keep = [3, 50, 299]
        writer.remove(sorted(set(range(300)) - set(keep)))
        before = set(folder.glob("experience_data.*"))
        real, todo = FilePersistenceAdapter.pin, [True]

        def pin(self: Any, *arguments: Any) -> Any:
            if self is not writer._session.adapter and todo:
                todo.clear()
                for n in range(300, 303):
                    writer.save_snapshot()
                    writer.add(experience(n))
            return real(self, *arguments)

        monkeypatch.setattr(FilePersistenceAdapter, "pin", pin)
        assert not [problem for problem in verify(folder) if problem.damage]
        assert not todo
        assert before - set(folder.glob("experience_data.*"))
        assert set(keep) <= set(writer.ids().tolist())
