"""`migrate`: the copy is the same buffer, whatever happens on the way."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from expbuf_core import Experience, ExperienceBuffer, cli, codec
from expbuf_core import control as c
from expbuf_core.config_schema import load_config
from expbuf_core.contracts import Stamped
from expbuf_core.errors import (
    ConfigError,
    CorruptionError,
    LockTimeout,
    PluginNotFound,
    StorageError,
)
from expbuf_core.filesystem import FileSystem
from expbuf_core.locks import ProcessLock
from expbuf_core.plugins import default_registry
from expbuf_core.testing.crash import explore, scratch_folder
from expbuf_core.testing.recording import RecordingFileSystem
from expbuf_core.transfer import NOTE, Content, Storage, migrate
from expbuf_core.verification import verify

LONG = os.environ.get("EXPBUF_LONG", "") not in ("", "0")
DIM = 4
SMALL = {"persistence": {"file": {"initial_bytes": 1 << 14, "segment_bytes": 1 << 14}}}
CONFIG: dict[str, Any] = {
    "max_size": 40,
    "index": {"backend": "exact", "builder": "off"},
    "lock_timeout_s": 10.0,
    **SMALL,
}
BACKENDS = [name for name in ("file", "lmdb") if name in default_registry().names("persistence")]

Facts = tuple[Any, ...]


def opened(folder: Path, **settings: Any) -> ExperienceBuffer:
    config = CONFIG
    if (folder / "expbuf.json").exists():  # its backend may be any
        config = {key: value for key, value in CONFIG.items() if key != "persistence"}
    return ExperienceBuffer.open(folder, config=config, **settings)


def experience(serial: int, padding: int = 300) -> Experience:
    rng = np.random.default_rng(serial)
    return Experience(
        v_embed=rng.standard_normal(DIM).astype(np.float32),
        q_embed=rng.standard_normal(DIM).astype(np.float32),
        question="?" * padding,
        answer={"text": f"answer {serial}", "raw": bytes([serial % 256])},
        confidence=0.5,
        rewards={"correct": 0.25 * (serial % 4)} if serial % 3 else None,
        tags=("odd", f"n{serial % 5}") if serial % 2 else (),
        trajectory=[np.arange(serial % 7)],
        key=f"key {serial}",
    )


def facts_of(item: Experience) -> Facts:
    return (
        item.id,
        json.dumps(item.answer, default=repr),
        np.asarray(item.v_embed).tobytes(),
        np.asarray(item.q_embed).tobytes(),
        item.confidence,
        item.rewards if isinstance(item.rewards, float | None) else dict(item.rewards),
        item.tags,
        item.timestamp,
        item.priority,
        item.retrieval_count,
        item.success_count,
        repr(item.trajectory),
        item.key,
    )


class Known(NamedTuple):
    """What a buffer holds and answers."""

    items: tuple[Facts, ...]
    hits: tuple[list[int], list[float]]
    draws: list[int]
    max_size: int


def known(buffer: ExperienceBuffer) -> Known:
    hits = buffer.search_index(v_embed=np.ones(DIM), q_embed=np.ones(DIM), k=5)
    return Known(
        tuple(facts_of(item) for item in buffer),
        ([hit.id for hit in hits], [round(hit.similarity, 5) for hit in hits]),
        buffer.sample(20).ids.tolist(),
        buffer.max_size,
    )


class Scene(NamedTuple):
    """A buffer and what is known of it."""

    folder: Path
    known: Known
    counted: str
    fresh: str
    lsn: int
    next_id: int


def make(folder: Path, **settings: Any) -> Scene:
    """A buffer with everything that one can have."""
    with opened(folder, **settings) as buffer:
        for serial in range(30):
            buffer.add(experience(serial, 700))
        buffer.add_many([experience(serial) for serial in range(30, 48)])  # evicts
        buffer.update_rewards([13, 14], [1.0, -2.0])
        buffer.update_rewards([15], [{"late": 2.0}])
        buffer.save_snapshot()
        result = buffer.search_index(v_embed=np.ones(DIM), k=3)
        counted = str(result.receipt)
        assert buffer.record_outcome(counted, success=True) == 3
        buffer.remove([20, 47])  # the newest, too: its id must not come again
        buffer.update_priorities([21, 22], [3.0, 4.0])
        fresh = str(buffer.search_index(v_embed=-np.ones(DIM), k=2).receipt)
        lsn = buffer.lsn
    with opened(folder, seed=1) as buffer:
        return Scene(folder, known(buffer), counted, fresh, lsn, 48)


@pytest.fixture(scope="module")
def scene() -> Iterator[Scene]:
    home = scratch_folder()
    yield make(home / "source")
    shutil.rmtree(home)


@pytest.fixture
def home() -> Iterator[Path]:
    folder = scratch_folder()
    yield folder
    shutil.rmtree(folder)


def check(target: Path, scene: Scene) -> None:
    """The target is that buffer, and works."""
    assert not (target / NOTE).exists()
    assert [problem for problem in verify(target) if problem.damage] == []
    with opened(target, seed=1) as buffer:
        assert buffer.recovery.clean
        assert buffer.lsn > scene.lsn
        assert known(buffer) == scene.known
        assert buffer.record_outcome(scene.counted, success=True) == 0, "counted before"
        assert buffer.record_outcome(scene.fresh, success=True) == 2
        new = buffer.add(experience(1000))
        assert new >= scene.next_id, "an id is never given twice"
        hits = buffer.search_index(
            v_embed=experience(1000).v_embed, q_embed=experience(1000).q_embed, k=1
        )
        assert [hit.id for hit in hits] == [new]
    with opened(target) as buffer:
        assert new in buffer


# ---------------------------------------------------------------- copies


@pytest.mark.parametrize("backend", BACKENDS)
def test_everything_is_taken_over(scene: Scene, home: Path, backend: str) -> None:
    steps: list[tuple[int, int]] = []
    report = migrate(
        scene.folder,
        home / "target",
        backend,
        config=SMALL,
        progress=lambda done, total: steps.append((done, total)),
    )
    n = len(scene.known.items)
    assert (report.experiences, report.resumed, report.backend) == (n, 0, backend)
    assert report.uuid in (scene.folder / "expbuf.json").read_text()
    assert json.loads((home / "target" / "expbuf.json").read_text())["backend"] == backend
    assert steps == sorted(steps)
    assert steps[0][1] == steps[-1][1] == steps[-1][0] == 2 * n
    with opened(home / "target") as buffer:
        assert buffer.lsn == report.lsn
    check(home / "target", scene)
    with opened(scene.folder, seed=1) as buffer:
        assert known(buffer) == scene.known, "the source is as it was"


@pytest.mark.skipif("lmdb" not in BACKENDS, reason="needs expbuf-lmdb")
def test_there_and_back(scene: Scene, home: Path) -> None:
    migrate(scene.folder, home / "there", "lmdb")
    migrate(home / "there", home / "back", "file", config=SMALL)
    check(home / "back", scene)


@pytest.mark.parametrize("durability", ["group", "os"])
def test_numbers_that_are_reserved(home: Path, durability: str) -> None:
    scene = make(home / "source", durability=durability)
    migrate(home / "source", home / "target", "file", config=SMALL)
    check(home / "target", scene)


def test_vectors_come_from_the_index_too(home: Path) -> None:
    with opened(home / "source", index={"backend": "exact", "builder": "off"}) as buffer:
        for serial in range(20):
            buffer.add(experience(serial))
        buffer.rebuild_index()
        buffer.save_snapshot()
        buffer.add(experience(20))
    with opened(home / "source", seed=1) as buffer:
        expected = known(buffer)
    migrate(home / "source", home / "target", "file", config=SMALL)
    with opened(home / "target", seed=1) as buffer:
        assert known(buffer) == expected


def test_an_empty_buffer(home: Path) -> None:
    opened(home / "source").close()
    report = migrate(home / "source", home / "target", "file", config=SMALL)
    assert report.experiences == 0
    with opened(home / "target") as buffer:
        assert buffer.add(experience(1)) == 0


def test_a_copy_of_a_copy_goes_on_behind_it(scene: Scene, home: Path) -> None:
    first = migrate(scene.folder, home / "one", "file", config=SMALL)
    second = migrate(home / "one", home / "two", "file", config=SMALL)
    assert second.lsn > first.lsn > scene.lsn
    check(home / "two", scene)


def test_large_experiences_go_into_several_operations(home: Path) -> None:
    with opened(home / "source") as buffer:
        for serial in range(5):
            buffer.add(experience(serial, 3 << 20))
    report = migrate(home / "source", home / "target", "file", config=SMALL)
    with opened(home / "source") as one, opened(home / "target") as other:
        assert report.lsn - one.lsn > 5
        assert [facts_of(item) for item in one] == [facts_of(item) for item in other]


# ---------------------------------------------------------------- readers and writers of the source


def test_readers_go_on_and_writers_wait(scene: Scene, home: Path) -> None:
    shutil.copytree(scene.folder, home / "source")
    copying, written = threading.Event(), threading.Event()
    source = opened(home / "source", lock_timeout_s=0.1)
    other = opened(home / "source", lock_timeout_s=20.0)
    added: list[int] = []

    def write() -> None:
        copying.wait(10)
        added.append(other.add(experience(500)))
        written.set()

    def progress(done: int, total: int) -> None:
        copying.set()
        assert not written.wait(0.05)
        assert len(source.search_index(v_embed=np.ones(DIM), k=3)) == 3
        with pytest.raises(LockTimeout, match="append"):
            source.add(experience(501))

    writer = threading.Thread(target=write)
    writer.start()
    with source, other:
        migrate(home / "source", home / "target", "file", config=SMALL, progress=progress)
        writer.join(10)
        assert added == [48], "it went on when the copy was done"
    check(home / "target", scene)


def test_a_process_that_waits_is_told_who_copies(scene: Scene, home: Path) -> None:
    shutil.copytree(scene.folder, home / "source")
    code = (
        "import sys\n"
        "from expbuf_core import Experience, ExperienceBuffer\n"
        "from expbuf_core.errors import LockTimeout\n"
        "buffer = ExperienceBuffer.open(sys.argv[1], lock_timeout_s=0.1, index='exact')\n"
        "assert len(buffer.search_index(v_embed=[1.0] * 4, k=2)) == 2\n"
        "try:\n"
        "    buffer.remove([13])\n"
        "except LockTimeout as exc:\n"
        "    print(exc.pid)\n"
    )
    told: list[str] = []

    def progress(done: int, total: int) -> None:
        if not told:
            done_ = subprocess.run(
                [sys.executable, "-c", code, str(home / "source")],
                capture_output=True,
                text=True,
                check=True,
            )
            told.append(done_.stdout.strip())

    migrate(home / "source", home / "target", "file", config=SMALL, progress=progress)
    assert told == [str(os.getpid())]


@pytest.mark.parametrize("left", [c.FLUSHING, c.FLUSH_FAILED])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_writer_that_dies_while_the_copy_takes_the_append_lock(
    home: Path, monkeypatch: pytest.MonkeyPatch, backend: str, left: int
) -> None:
    """Its log is given up under the lock that the copy holds already."""
    with opened(home / "source", durability="os", persistence=backend) as writer:
        writer.add_many([experience(serial) for serial in range(5)])
        words = writer._live().control.words

        class Lock(ProcessLock):
            def __enter__(self) -> None:
                if self.file.path.name == "append":
                    added.append(writer.add(experience(5)))
                    assert words[c.DURABLE] < words[c.APPENDED]
                    words[left] = 1
                super().__enter__()

        added: list[int] = []
        monkeypatch.setattr("expbuf_core.transfer.ProcessLock", Lock)
        report = migrate(home / "source", home / "target", "file", config=SMALL)
        assert (len(added), report.experiences) == (1, 6)
        assert words[left] == 0
        assert writer.add(experience(6)) > added[0]
    with opened(home / "target") as copy, opened(home / "source") as source:
        assert [facts_of(item) for item in copy] == [facts_of(item) for item in source][:6]


# ---------------------------------------------------------------- interruptions


class Stopped(BaseException):
    """Like Ctrl-C."""


def stop_after(calls: int) -> Any:
    left = [calls]

    def progress(done: int, total: int) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise Stopped

    return progress


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("expbuf_core.transfer._BATCH_ROWS", 7)


def settled(scene: Scene, home: Path) -> Path:
    """A copy of the source of which nothing is due.

    Each opening leaves a small log in it, and where they are many, one of the next merges them.
    """
    shutil.copytree(scene.folder, home / "source")
    with opened(home / "source") as buffer:
        buffer.save_snapshot()
    return home / "source"


@pytest.mark.usefixtures("small_batches")
@pytest.mark.parametrize("backend", BACKENDS)
def test_an_interrupted_copy_is_no_buffer_and_goes_on(
    scene: Scene, home: Path, backend: str
) -> None:
    source, target = settled(scene, home), home / "target"
    resumed = []
    for calls in range(14):
        with contextlib.suppress(Stopped):
            report = migrate(source, target, backend, config=SMALL, progress=stop_after(calls))
            resumed.append(report.resumed)
            break
        for mode in ("a", "x"):
            with pytest.raises(StorageError, match="is no buffer"):
                opened(target, mode=mode)
        with pytest.raises(StorageError):
            opened(target, mode="r")
    assert resumed == [len(scene.known.items)]
    check(target, scene)


@pytest.mark.usefixtures("small_batches")
def test_an_unfinished_copy_says_how_to_finish_it(scene: Scene, home: Path) -> None:
    target, file = home / "the target", home / "small.yaml"
    file.write_text(json.dumps({"experience_buffer": SMALL}))
    with pytest.raises(Stopped):
        migrate(scene.folder, target, "file", config=file, progress=stop_after(3))
    messages = []
    for attempt in (
        lambda: opened(target),
        lambda: opened(target, mode="r"),
        lambda: ExperienceBuffer.load_from_disk(target),
        lambda: list(verify(target)),
    ):
        with pytest.raises(StorageError, match="is an unfinished copy of one") as caught:
            attempt()
        messages.append(str(caught.value))
    (command,) = {message.split("`")[1] for message in messages}
    assert cli.main(shlex.split(command)[1:]) == 0
    check(target, scene)


def test_an_unfinished_copy_whose_note_is_damaged_is_told_all_the_same(
    scene: Scene, home: Path
) -> None:
    with pytest.raises(Stopped):
        migrate(scene.folder, home / "target", "file", config=SMALL, progress=stop_after(0))
    (home / "target" / NOTE).write_text("{")
    with pytest.raises(StorageError, match="run the command that began it again"):
        opened(home / "target")


@pytest.mark.usefixtures("small_batches")
def test_it_goes_on_behind_the_last_experience(scene: Scene, home: Path) -> None:
    source = settled(scene, home)
    with pytest.raises(Stopped):
        migrate(source, home / "target", "file", config=SMALL, progress=stop_after(3))
    steps: list[int] = []
    report = migrate(
        source,
        home / "target",
        "file",
        config=SMALL,
        progress=lambda done, total: steps.append(done),
    )
    assert report.resumed in (14, 21)
    assert steps[0] == report.resumed
    check(home / "target", scene)


@pytest.mark.usefixtures("small_batches")
def test_a_source_that_has_changed_is_copied_anew(scene: Scene, home: Path) -> None:
    shutil.copytree(scene.folder, home / "source")
    with pytest.raises(Stopped):
        migrate(home / "source", home / "target", "file", config=SMALL, progress=stop_after(3))
    with opened(home / "source") as buffer:
        buffer.update_priorities([13], [9.0])
        buffer.remove([14])
    with opened(home / "source", seed=1) as buffer:
        expected = known(buffer)
    report = migrate(home / "source", home / "target", "file", config=SMALL)
    assert report.resumed == 0
    with opened(home / "target", seed=1) as buffer:
        assert known(buffer) == expected


class StoppedAtTheEnd(FileSystem):
    """Stops where all is written and read back, and only the note is still to go."""

    def unlink(self, path: Path) -> None:
        if path.name == NOTE:
            raise Stopped
        super().unlink(path)


def stopped_at_the_end(source: Path, target: Path, backend: str = "file") -> None:
    with pytest.raises(Stopped):
        migrate(source, target, backend, config=SMALL, filesystem=StoppedAtTheEnd())
    assert (target / "expbuf.json").exists()
    with pytest.raises(StorageError, match="is an unfinished copy of one"):
        opened(target)
    with pytest.raises(StorageError, match="is an unfinished copy of one"):
        opened(target, mode="r")


def test_it_is_no_buffer_before_the_note_is_gone(scene: Scene, home: Path) -> None:
    source = settled(scene, home)
    stopped_at_the_end(source, home / "target")
    report = migrate(source, home / "target", "file", config=SMALL)
    assert report.resumed == report.experiences == len(scene.known.items)
    check(home / "target", scene)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_source_that_changed_behind_the_last_step_but_one_is_copied_anew(
    scene: Scene, home: Path, backend: str
) -> None:
    shutil.copytree(scene.folder, home / "source")
    stopped_at_the_end(home / "source", home / "target", backend)
    with opened(home / "source") as buffer:
        buffer.remove(buffer.ids()[:30])
        buffer.add(experience(90))
    with opened(home / "source", seed=1) as buffer:
        expected = known(buffer)
    report = migrate(home / "source", home / "target", backend, config=SMALL)
    assert (report.experiences, report.resumed) == (len(expected.items), 0)
    with opened(home / "target", seed=1) as buffer:
        assert known(buffer) == expected
        assert buffer.lsn == report.lsn


@pytest.mark.skipif("lmdb" not in BACKENDS, reason="needs expbuf-lmdb")
def test_another_backend_behind_the_last_step_but_one(scene: Scene, home: Path) -> None:
    stopped_at_the_end(scene.folder, home / "target", "file")
    report = migrate(scene.folder, home / "target", "lmdb")
    assert (report.backend, report.resumed) == ("lmdb", 0)
    assert not list((home / "target").glob("experience_data.*"))
    check(home / "target", scene)


@pytest.mark.parametrize("durability", ["group", "os"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_numbers_of_a_killed_writer_do_not_stop_a_copy_that_goes_on(
    home: Path, backend: str, durability: str
) -> None:
    """The first call closes the source in order, so the second finds less to be reserved."""
    with opened(home / "live", durability=durability) as buffer:
        buffer.add_many([experience(serial) for serial in range(20)])
        expected = [facts_of(item) for item in buffer]
        buffer._live().upkeep.stop()  # so that no file comes or goes while they are copied
        shutil.copytree(home / "live", home / "source")

    def stop(done: int, total: int) -> None:
        if done == total:
            raise Stopped

    with pytest.raises(Stopped):
        migrate(home / "source", home / "target", backend, config=SMALL, progress=stop)
    report = migrate(home / "source", home / "target", backend, config=SMALL)
    assert report.resumed == report.experiences == 20
    with opened(home / "target") as buffer:
        assert [facts_of(item) for item in buffer] == expected
        assert buffer.add(experience(50)) >= 1 << 16, "behind all that was reserved"


def test_what_is_not_as_in_the_source_is_named(
    scene: Scene, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    carried = Content.carried
    monkeypatch.setattr(Content, "carried", lambda self: {**carried(self), "receipts": []})
    with pytest.raises(StorageError, match="target: the list of receipts, read back, differs"):
        migrate(scene.folder, home / "target", "file", config=SMALL)


def test_an_unfinished_copy_of_another_buffer_is_left_alone(scene: Scene, home: Path) -> None:
    with pytest.raises(Stopped):
        migrate(scene.folder, home / "target", "file", config=SMALL, progress=stop_after(0))
    with opened(home / "other") as buffer:
        buffer.add(experience(1))
    with pytest.raises(StorageError, match="unfinished copy of another buffer"):
        migrate(home / "other", home / "target", "file", config=SMALL)


@pytest.mark.parametrize("backend", BACKENDS)
def test_killed_at_random_points(scene: Scene, home: Path, backend: str) -> None:
    """SIGKILL at the n-th call that changes a file; again and again, until it comes through."""
    code = (
        "import os, signal, sys\n"
        "from expbuf_core import transfer\n"
        "from expbuf_core.filesystem import FileSystem\n"
        "transfer._BATCH_ROWS = 7\n"
        "left = int(sys.argv[4])\n"
        "def dying(method):\n"
        "    def call(self, *arguments, **more):\n"
        "        global left\n"
        "        left -= 1\n"
        "        if left < 0:\n"
        "            os.kill(os.getpid(), signal.SIGKILL)\n"
        "        return method(self, *arguments, **more)\n"
        "    return call\n"
        "names = ('pwrite', 'pwritev', 'fsync', 'fdatasync', 'replace', 'unlink', 'sync_folder')\n"
        "fs = type('Dying', (FileSystem,), {n: dying(getattr(FileSystem, n)) for n in names})()\n"
        "transfer.migrate(sys.argv[1], sys.argv[2], sys.argv[3], filesystem=fs,\n"
        "    config={'persistence': {'file': {'initial_bytes': 16384, 'segment_bytes': 16384}}})\n"
    )
    rng, target, kills = random.Random(backend), home / "target", 0
    shutil.copytree(scene.folder, home / "source")
    while True:
        calls = rng.randrange(2, 50) if kills < (40 if LONG else 3) else 1 << 30
        done = subprocess.run(
            [sys.executable, "-c", code, str(home / "source"), str(target), backend, str(calls)],
            check=False,
            capture_output=True,
            text=True,
        )
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL, done.stderr
        kills += 1
        if not (target / "expbuf.json").exists() and target.exists():
            with pytest.raises(StorageError):
                opened(target, mode="r")
    check(target, scene)


def test_every_state_that_a_power_loss_can_leave(home: Path) -> None:
    with opened(home / "source") as buffer:
        for serial in range(6):
            buffer.add(experience(serial))
        buffer.record_outcome([1], success=True)
        counted = str(buffer.search_index(v_embed=np.ones(DIM), k=2).receipt)
        buffer.record_outcome(counted, success=True)
        fresh = str(buffer.search_index(v_embed=np.ones(DIM), k=2).receipt)
        lsn = buffer.lsn
    with opened(home / "source", seed=1) as buffer:
        scene = Scene(home / "source", known(buffer), counted, fresh, lsn, 6)
    finished = 0

    def workload(fs: RecordingFileSystem, target: Path, acknowledge: Any) -> None:
        migrate(home / "source", target, "file", config=SMALL, filesystem=fs)
        acknowledge("done")

    def recover(target: Path, acknowledged: Sequence[Any], started: Sequence[Any]) -> None:
        nonlocal finished
        if (target / "expbuf.json").exists():
            finished += 1
        else:
            assert not acknowledged, "it was finished"
            if target.exists():
                with pytest.raises(StorageError):
                    opened(target, mode="r")
            migrate(home / "source", target, "file", config=SMALL)
        if (target / NOTE).exists():  # the very last step was missing
            migrate(home / "source", target, "file", config=SMALL)
        with opened(target, seed=1) as buffer:
            assert known(buffer) == scene.known
            assert buffer.record_outcome(scene.fresh, success=True) == 2
            assert buffer.add(experience(50)) == 6

    result = explore(workload, recover, states=2000 if LONG else 80)
    result.raise_for_failures()
    assert 0 < finished < result.states


# ---------------------------------------------------------------- refusals


def test_targets_that_are_not_free(scene: Scene, home: Path) -> None:
    (home / "taken").mkdir()
    (home / "taken" / "letter.txt").write_text("dear")
    with pytest.raises(StorageError, match="holds other files"):
        migrate(scene.folder, home / "taken", "file")
    (home / "file").write_text("")
    with pytest.raises(StorageError, match="is a file"):
        migrate(scene.folder, home / "file", "file")
    opened(home / "buffer").close()
    with pytest.raises(StorageError, match="holds a buffer already"):
        migrate(scene.folder, home / "buffer", "file")
    for target in (scene.folder, scene.folder / "inside", scene.folder.parent):
        with pytest.raises(StorageError, match="one must not be, or hold, the other"):
            migrate(scene.folder, target, "file")
    assert (home / "taken" / "letter.txt").read_text() == "dear"


def test_what_cannot_be_chosen(scene: Scene, home: Path) -> None:
    with pytest.raises(PluginNotFound):
        migrate(scene.folder, home / "target", "granite")
    with pytest.raises(ConfigError, match="keeps nothing"):
        migrate(scene.folder, home / "target", "memory")
    with pytest.raises(StorageError, match="is no buffer"):
        migrate(home / "nothing", home / "target", "file")
    assert list(home.iterdir()) == []


def test_two_at_once(scene: Scene, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("expbuf_core.transfer._TARGET_TIMEOUT_S", 0.1)

    def progress(done: int, total: int) -> None:
        # Of the same process another thread's lock, of another process that one's.
        with pytest.raises(LockTimeout):
            migrate_again()

    def migrate_again() -> None:
        shutil.copytree(scene.folder, home / "copy", dirs_exist_ok=True)
        migrate(home / "copy", home / "target", "file", config=SMALL)

    migrate(scene.folder, home / "target", "file", config=SMALL, progress=progress)
    check(home / "target", scene)


def test_a_damaged_source_is_not_copied(scene: Scene, home: Path) -> None:
    shutil.copytree(scene.folder, home / "source")
    for path in (home / "source").glob("experience_data.*.wal"):
        raw = bytearray(path.read_bytes())
        at = raw.find(b"answer 15")
        if at >= 0:
            raw[at] ^= 1
            path.write_bytes(raw)
    with pytest.raises(CorruptionError):
        migrate(home / "source", home / "target", "file", config=SMALL)
    assert not (home / "target" / "expbuf.json").exists()


def test_a_disk_that_lies_is_noticed(scene: Scene, home: Path) -> None:
    """What was read back differs: the target never becomes a buffer."""

    def spoil(done: int, total: int) -> None:
        if done == total // 2:
            for path in (home / "target").glob("experience_data.*.wal"):
                raw = bytearray(path.read_bytes())
                at = raw.find(b"answer 15")
                if at >= 0:
                    raw[at] ^= 1
                    path.write_bytes(raw)

    with pytest.raises(StorageError):
        migrate(scene.folder, home / "target", "file", config=SMALL, progress=spoil)
    assert not (home / "target" / "expbuf.json").exists()
    with pytest.raises(StorageError, match="is no buffer"):
        opened(home / "target")
    assert migrate(scene.folder, home / "target", "file", config=SMALL).resumed == 0
    check(home / "target", scene)


def test_a_damaged_note(scene: Scene, home: Path) -> None:
    with pytest.raises(Stopped):
        migrate(scene.folder, home / "target", "file", config=SMALL, progress=stop_after(0))
    (home / "target" / NOTE).write_text("{}")
    with pytest.raises(CorruptionError, match="remove the folder"):
        migrate(scene.folder, home / "target", "file", config=SMALL)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_source_that_may_only_be_read(scene: Scene, home: Path) -> None:
    shutil.copytree(scene.folder, home / "source")
    os.chmod(home / "source", 0o500)
    try:
        migrate(home / "source", home / "target", "file", config=SMALL)
    finally:
        os.chmod(home / "source", 0o700)
    check(home / "target", scene)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_log_may_begin_at_any_number(home: Path, backend: str) -> None:
    """A log that begins behind another's numbers is whole: nothing comes before it."""
    registry = default_registry()
    storage = Storage.choose(registry, backend, load_config({}, env={}))
    adapter = storage.open(home, bytes(range(16)), FileSystem(), writable=True)
    adapter.create(70)
    adapter.append([Stamped(70, 0, codec.encode_clear())], 0)
    adapter.finish(70)
    adapter.close()
    adapter = storage.open(home, bytes(range(16)), FileSystem(), writable=False)
    assert [operation.lsn for operation in adapter.recover(0, 70)] == [70]
    assert [operation.lsn for operation in adapter.follow(0).read(70)] == [70]
    assert list(adapter.verify(70)) == []
    adapter.close()


def test_the_environment_does_not_change_the_source(
    scene: Scene, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EXPBUF__MAX_SIZE", "3")
    monkeypatch.setenv("EXPBUF__PERSISTENCE__BACKEND", "memory")
    report = migrate(scene.folder, home / "target", "file", config=SMALL)
    assert report.experiences == len(scene.known.items)
