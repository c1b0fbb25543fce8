"""A process that is stopped or hangs inside a transaction: the others say so, and go on then."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pytest

from expbuf_core import Experience, ExperienceBuffer
from expbuf_core import control as c
from expbuf_core.errors import LockTimeout
from expbuf_core.inspection import openers
from expbuf_core.locks import ProcessLock
from expbuf_core.testing.persistence_log import Core, Place
from expbuf_core.testing.processes import Child, in_child
from expbuf_lmdb import environment
from expbuf_lmdb.adapter import LMDBPersistenceAdapter
from expbuf_lmdb.environment import Environment

SHORT_S = 0.05


def opened(folder: Path, **settings: Any) -> ExperienceBuffer:
    return ExperienceBuffer.open(
        folder,
        **{
            "persistence": {"backend": "lmdb", "lmdb": {"stage_bytes": 1 << 14}},
            "index": {"backend": "exact", "builder": "off"},
            "lock_timeout_s": SHORT_S,
            **settings,
        },
    )


def environment_of(buffer: ExperienceBuffer) -> Environment:
    adapter = buffer._session.adapter
    assert isinstance(adapter, LMDBPersistenceAdapter)
    return adapter._environment()


def experience(number: int, size: int = 0) -> Experience:
    vector = np.full(4, number + 1, np.float32)
    return Experience(v_embed=vector, q_embed=vector, answer=number, trajectory="x" * size or None)


def answers(buffer: ExperienceBuffer) -> list[Any]:
    return [item.answer for item in buffer]


@contextlib.contextmanager
def stuck(folder: Path) -> Iterator[int]:
    """Another process is inside a transaction; its pid."""

    def work(child: Child) -> None:
        with opened(folder, lock_timeout_s=30.0) as buffer:
            environment_of(buffer).write(lambda *_: (child.say("inside"), child.hear()))

    child = Child(work)
    assert child.hear() == "inside", child.join()
    yield child.pid
    child.say("go on")
    child.join()


@pytest.fixture(params=["sync", "group", "os"])
def buffer(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[ExperienceBuffer]:
    with opened(tmp_path / "buffer", durability=request.param) as made:
        made.add(experience(0))
        made.sync()
        yield made


def folder_of(buffer: ExperienceBuffer) -> Path:
    assert buffer._session.path is not None
    return buffer._session.path


def test_a_write_names_the_process(buffer: ExperienceBuffer) -> None:
    words = buffer._session.control.words
    written = [0]

    def add_on() -> None:  # until the stage is full, where nobody syncs
        for number in range(1, 100):
            buffer.add(experience(number, 2000))
            written.append(number)

    with stuck(folder_of(buffer)) as pid:
        with pytest.raises(LockTimeout, match="transaction") as caught:
            add_on()
        while caught.value.pid == os.getpid():  # whose upkeep was just about to wait, too
            with pytest.raises(LockTimeout, match="transaction") as caught:
                buffer.sync()
        assert caught.value.pid == pid
        assert words[c.FLUSH_FAILED] == words[c.APPENDING] == 0
        with pytest.raises(LockTimeout):
            buffer.sync()
        assert answers(buffer) == written
        found = {each.pid: each.locks for each in openers(folder_of(buffer))}
        assert found[pid] == ("transaction",)
    buffer.add(experience(100))
    assert buffer.stats()["log_retirements"] == 0
    # At "sync" it had been written, and nobody was told that it is durable.
    unknown = [len(written)] if buffer._session.config.durability == "sync" else []
    assert answers(buffer) == [*written, *unknown, 100]


def test_a_write_behind_another_that_waits_names_the_stuck_process(tmp_path: Path) -> None:
    """Not the one that has the flush lock meanwhile, with which nothing is wrong."""
    folder = tmp_path / "buffer"

    def work(child: Child) -> None:
        with opened(folder, lock_timeout_s=60.0) as mine:
            child.say("open")
            child.hear()
            mine.add(experience(1))

    with opened(folder) as buffer:
        buffer.add(experience(0))
        leader = Child(work)
        assert leader.hear() == "open", leader.join()
        with stuck(folder) as pid:
            leader.say("go on")
            while not (folder / "locks" / "flush").read_bytes():
                time.sleep(1e-3)  # until it has waited for a while
            with pytest.raises(LockTimeout, match=f"{leader.pid} .*, and waits for") as caught:
                buffer.add(experience(2))
            assert caught.value.pid == pid
        leader.join()
        assert answers(buffer) == [0, 1, 2]


def test_opening_names_the_process(buffer: ExperienceBuffer) -> None:
    folder = folder_of(buffer)
    with stuck(folder) as pid:

        def work(child: Child) -> None:
            with pytest.raises(LockTimeout) as caught:
                opened(folder)
            child.say(caught.value.pid)

        assert in_child(work).split() == [str(pid)]
    in_child(lambda _: opened(folder).close())


def test_upkeep_names_the_process(buffer: ExperienceBuffer) -> None:
    with stuck(folder_of(buffer)) as pid:
        buffer._session.control.words[c.SNAPSHOT_LSN] = buffer.lsn
        with pytest.raises(LockTimeout) as caught:
            buffer._session.adapter.drop_below(1, *[np.empty(0, np.int64)] * 2)
        assert caught.value.pid == pid
    buffer.save_snapshot()
    assert answers(buffer) == [0]


def test_closing_names_the_process(tmp_path: Path) -> None:
    buffer = opened(tmp_path / "buffer", durability="os")
    buffer.add(experience(0))
    with stuck(tmp_path / "buffer") as pid:
        buffer.add(experience(1))
        with pytest.raises(LockTimeout) as caught:
            buffer.close()
        assert caught.value.pid == pid
    with opened(tmp_path / "buffer") as again:
        assert answers(again) == [0, 1]


def test_whoever_is_killed_inside_holds_nobody_up(buffer: ExperienceBuffer) -> None:
    folder = folder_of(buffer)

    def work(child: Child) -> None:
        with opened(folder, lock_timeout_s=30.0) as mine:
            environment_of(mine).write(lambda *_: (child.say("inside"), child.hear()))

    child = Child(work)
    assert child.hear() == "inside", child.join()
    child.kill()
    buffer.add(experience(1))
    buffer.sync()
    assert answers(buffer) == [0, 1]


def test_a_thread_inside_is_named_too(buffer: ExperienceBuffer) -> None:
    inside, go_on = threading.Event(), threading.Event()
    env = environment_of(buffer)
    thread = threading.Thread(
        target=env.write, args=(lambda *_: (inside.set(), go_on.wait(60)),), daemon=True
    )
    thread.start()
    assert inside.wait(60)
    with pytest.raises(LockTimeout, match="another thread of this process"):
        env.write(lambda *_: None)
    go_on.set()
    thread.join(60)
    env.write(lambda *_: None)


def test_a_fork_does_not_wait_for_who_waits(tmp_path: Path) -> None:
    """Nor does a map that grows: both want nobody inside."""
    with opened(tmp_path / "buffer", lock_timeout_s=60.0) as buffer:
        buffer.add(experience(0))
        env, waiting = environment_of(buffer), threading.Event()
        wait = ProcessLock._wait

        def noticed(*args: Any) -> Any:
            waiting.set()
            return wait(*args)

        with stuck(tmp_path / "buffer"), pytest.MonkeyPatch.context() as patch:
            patch.setattr(ProcessLock, "_wait", noticed)
            patch.setattr(environment, "_FORK_WAIT_S", 0)
            thread = threading.Thread(target=buffer.add, args=(experience(1),), daemon=True)
            thread.start()
            assert waiting.wait(60)
            assert env._gate.close(0)
            env._gate.open()
            in_child(lambda _: None)
            assert not environment._leaked
        thread.join(60)
        assert answers(buffer) == [0, 1]


def test_lmdb_itself_is_never_waited_for(tmp_path: Path) -> None:
    """Whatever takes LMDB's writer lock holds ours: opening does, and going over to writing."""
    core = Core(Place(tmp_path, "lmdb", {})).create().extend(2).finish()
    held: list[bool] = []
    path = core.place.folder / "log.mdb"

    class Watched:
        def __init__(self, env: lmdb.Environment, *, readonly: bool) -> None:
            self._env = env
            self._readonly = readonly

        def __getattr__(self, name: str) -> Any:
            return getattr(self._env, name)

        def _note(self) -> None:
            lock = environment.transaction_lock(path, 0)
            held.append(lock.file.mutex._is_owned())
            lock.close()

        def open_db(self, *args: Any, **settings: Any) -> Any:
            if not self._readonly:
                self._note()
            return self._env.open_db(*args, **settings)

        def begin(self, *args: Any, **settings: Any) -> Any:
            if settings.get("write"):
                self._note()
            return self._env.begin(*args, **settings)

    open_ = lmdb.open

    def watched(*args: Any, **settings: Any) -> Any:
        return Watched(open_(*args, **settings), readonly=settings["readonly"])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lmdb, "open", watched)
        reader = Core(core.place, core.place.adapter(writable=False), core.wrote)
        reader.adapter.attach()
        reader.follows()
        assert not held
        core = core.reopen().extend(2).sync()
        core.adapter.drop_below(1, *core.live([3, 4]))
        core.finish()
        reader.adapter.close()
    assert len(held) > 8
    assert all(held)


def test_upkeep_lets_others_in_between_transactions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who waits looks at the lock now and then: it must be free for longer than an instant."""
    monkeypatch.setattr("expbuf_lmdb.adapter._DELETED_AT_ONCE", 5)
    core = Core(Place(tmp_path, "lmdb", {})).create().extend(40, rows=1).sync()
    adapter, events = core.adapter, list[str]()
    assert isinstance(adapter, LMDBPersistenceAdapter)
    write = adapter._write
    lock = environment.transaction_lock(adapter.path, 0)

    def noted(work: Any, *args: Any) -> Any:
        events.append(work.__name__)
        return write(work, *args)

    def paused(seconds: float) -> None:
        assert seconds > 1e-3
        assert lock.try_run(events.append, "pause")

    monkeypatch.setattr(adapter, "_write", noted)
    monkeypatch.setattr("expbuf_lmdb.adapter.time.sleep", paused)
    adapter.drop_below(core.last - 5, *core.live(range(core.last - 5, core.last + 1)))
    lock.close()
    assert events.count("_delete") > 10
    assert events[1:] == ["_delete", "pause"] * events.count("_delete")
