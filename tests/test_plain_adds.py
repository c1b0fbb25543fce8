"""Adds that native code does from beginning to end: what Python did besides is still done."""

from __future__ import annotations

import errno
import gc
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from expbuf_core import Experience, ExperienceBuffer
from expbuf_core import control as c
from expbuf_core.errors import BufferClosed, BufferReplaced, ExpbufError, ReentrantCall
from expbuf_core.filesystem import FileSystem
from expbuf_core.hookspecs import hookimpl
from expbuf_core.intake import Intake
from expbuf_core.native import native, why_not
from expbuf_core.reindexing import reindex
from expbuf_core.session import CHANGING
from expbuf_core.testing.faults import FaultyFileSystem
from expbuf_core.upkeep import Upkeep
from expbuf_file.adapter import FilePersistenceAdapter

pytestmark = pytest.mark.skipif(native is None, reason=f"no native code: {why_not}")

DIM = 4
TIMEOUT_S = 60.0
CONFIG: dict[str, Any] = {"max_size": 50_000, "index": {"backend": "exact", "builder": "off"}}


@pytest.fixture(params=["native", "python"])
def code(request: pytest.FixtureRequest) -> str:
    """What does the adds of this test."""
    if request.param == "python":
        request.getfixturevalue("without_native_code")
    return str(request.param)


def experience(serial: int, **fields: Any) -> Experience:
    v, q = np.random.default_rng(serial).standard_normal((2, DIM)).astype(np.float32)
    return Experience(v_embed=v, q_embed=q, answer=serial, **fields)


def opened(path: Path, **settings: Any) -> ExperienceBuffer:
    return ExperienceBuffer.open(path, config=CONFIG, **settings)


def warm(path: Path, **settings: Any) -> ExperienceBuffer:
    """A buffer with one experience, the next of which is a plain add."""
    buffer = opened(path, **settings)
    buffer.add(experience(0))
    assert buffer._session.plain_adds is not None
    return buffer


def run_threads(*tasks: Callable[[], object]) -> None:
    """Each in a thread of its own, until all are done."""
    threads = [threading.Thread(target=task, daemon=True) for task in tasks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT_S)
        assert not thread.is_alive(), "hangs"


def run_process(target: Callable[..., None], *arguments: Any) -> None:
    """In a process of its own: it may crash, or hang."""
    process = multiprocessing.get_context("spawn").Process(target=target, args=arguments)
    process.start()
    process.join(TIMEOUT_S)
    process.kill()
    process.join()
    assert process.exitcode == 0


# ---------------------------------------------------------------- what is due


class Needs:
    """What upkeep was asked for, and behind how many adds; it is taken as done at once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.met: list[tuple[str, int]] = []
        monkeypatch.setattr(Upkeep, "_begin", lambda upkeep: self._begin(upkeep))

    def _begin(self, upkeep: Upkeep) -> None:
        words = upkeep._session.control.words
        if upkeep.build_is_due() and upkeep._builds:
            self.met.append(("build", words[c.NEXT_ID]))
            words[c.BUILT_ROWS], upkeep._asked_for = words[c.ROWS_ADDED], words[c.DAMAGED_INDEX]
        if upkeep.snapshot_is_due():
            self.met.append(("snapshot", words[c.NEXT_ID]))
            words[c.SNAPSHOT_LSN] = words[c.APPENDED]

    def of(self, kind: str) -> list[int]:
        return [n for what, n in self.met if what == kind]


def test_builds_and_snapshots_are_asked_for_at_the_same_adds(
    code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs = Needs(monkeypatch)
    index = {"backend": "exact", "builder": "thread", "rebuild_every": 10}
    with opened(tmp_path / "b", index=index, snapshot={"every_ops": 26}) as buffer:
        for i in range(100):
            buffer.add(experience(i))
        assert (buffer._session.plain_adds is not None) == (code == "native")
    assert needs.of("build") == list(range(10, 101, 10))
    assert needs.of("snapshot") == [24, 50, 76]  # two operations before the first add count, too


def test_builds_and_snapshots_come_true(code: str, tmp_path: Path) -> None:
    swapped = threading.Event()

    class Watcher:
        @hookimpl
        def expbuf_on_index_swapped(self, lsn: int) -> None:
            if lsn > 50:
                swapped.set()

    index = {"backend": "exact", "builder": "thread", "rebuild_every": 50}
    settings: dict[str, Any] = {"index": index, "snapshot": {"every_ops": 60}}
    with opened(tmp_path / "b", plugins=[Watcher()], **settings) as buffer:
        for i in range(200):
            buffer.add(experience(i))
        assert swapped.wait(TIMEOUT_S)
    assert list((tmp_path / "b").glob("snapshots/*")) or list((tmp_path / "b").glob("*snap*"))


def test_a_damaged_index_is_heard_of_at_the_next_add(
    code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs = Needs(monkeypatch)
    with opened(tmp_path / "b", index={"backend": "exact", "builder": "thread"}) as buffer:
        for i in range(5):
            buffer.add(experience(i))
        words = buffer._session.control.words
        words[c.DAMAGED_INDEX] = words[c.INDEX_GENERATION] + 1
        assert not needs.met
        buffer.add(experience(5))
        buffer.add(experience(6))
    assert needs.met == [("build", 6)]


def test_damage_that_is_told_while_it_is_asked_what_is_due(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs = Needs(monkeypatch)
    with opened(tmp_path / "b", index={"backend": "exact", "builder": "thread"}) as buffer:
        upkeep = buffer._session.upkeep
        words, is_due = buffer._session.control.words, upkeep._is_due

        def and_then_it_is() -> bool:
            due = is_due()
            words[c.DAMAGED_INDEX] = words[c.INDEX_GENERATION] + 1
            return due

        with monkeypatch.context() as patched:
            plain = buffer._session
            assert plain.plain_adds is None
            buffer.add(experience(0))
            patched.setattr(upkeep, "_is_due", and_then_it_is)
            plain.plain_adds.look_ahead()  # type: ignore[union-attr]
        buffer.add(experience(1))
    assert needs.met == [("build", 2)]


@pytest.mark.parametrize(
    ("log_bytes", "bytes_each"), [(1 << 15, 1 << 9), (1 << 18, 1 << 10), (1 << 22, 40 << 10)]
)
def test_the_next_log_is_prepared_before_it_is_needed(
    code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log_bytes: int, bytes_each: int
) -> None:
    """Also where logs are small, and where one has ended far behind the end of the next."""
    prepared = []

    def at_once(upkeep: Upkeep) -> None:
        assert upkeep._session.adapter.needs_preparation()
        upkeep._session.maintenance.try_run(upkeep._session.commit_log.prepare)

    def prepare(adapter: FilePersistenceAdapter) -> None:
        prepared.append(adapter._words[0] + 1)
        really(adapter)

    really = FilePersistenceAdapter.prepare
    monkeypatch.setattr(Upkeep, "_begin", at_once)
    monkeypatch.setattr(FilePersistenceAdapter, "prepare", prepare)
    sizes = {"initial_bytes": log_bytes, "segment_bytes": log_bytes}
    with opened(tmp_path / "b", persistence={"file": sizes}) as buffer:
        first = buffer._session.control.words[c.ADAPTER]
        for i in range(5 * log_bytes // bytes_each):
            buffer.add(experience(i, question="x" * bytes_each))
        last = buffer._session.control.words[c.ADAPTER]
    assert last > first + 4
    assert prepared[: last - first] == list(range(first + 1, last + 1))


def test_a_writer_lags_no_further_than_it_may(code: str, tmp_path: Path) -> None:
    with warm(tmp_path / "b") if code == "native" else opened(tmp_path / "b") as buffer:
        lag = 0
        for i in range(1200):
            buffer.add(experience(i))
            state = buffer._session.replica.state
            lag = max(lag, buffer._session.control.words[c.APPENDED] - state.lsn)
        assert lag < 512
        assert code == "python" or lag > 100


@pytest.mark.parametrize("builder", ["thread", "off"])
def test_what_is_never_due(tmp_path: Path, builder: str) -> None:
    """By settings that no word of the control page comes to."""
    settings = {"snapshot__every_ops": 1 << 70, "index__rebuild_every": 1 << 70}
    with opened(tmp_path / "b", index__builder=builder, **settings) as buffer:
        assert [buffer.add(experience(i)) for i in range(3)] == [0, 1, 2]
        assert buffer._session.plain_adds is not None


def test_at_group_a_plain_add_is_synced_in_time(tmp_path: Path) -> None:
    with warm(tmp_path / "b", durability="group") as buffer:
        words = buffer._session.control.words
        for i in range(3):
            buffer.add(experience(i))
            deadline = time.monotonic() + TIMEOUT_S
            while words[c.DURABLE] < words[c.APPENDED]:
                assert time.monotonic() < deadline
                time.sleep(0.001)


# ---------------------------------------------------------------- observers and the clock


class Ear:
    """Hears of commits, once it listens."""

    def __init__(self) -> None:
        self.listening = False
        self.heard: list[int] = []

    @hookimpl
    def expbuf_on_committed(self, lsn: int, kind: str, count: int) -> None:
        assert (kind, count) == ("add", 1)
        self.heard.append(lsn)


def test_an_observer_hears_of_every_commit_while_it_listens(code: str, tmp_path: Path) -> None:
    ear = Ear()
    with opened(tmp_path / "b", plugins=[ear]) as buffer:
        words = buffer._session.control.words
        buffer.add(experience(0))
        told = []
        for i in range(1, 40):
            ear.listening = i // 5 % 2 == 1
            buffer.add(experience(i))
            if ear.listening:
                told.append(words[c.APPENDED])
    assert ear.heard == told


def test_an_observer_that_is_switched_on_while_threads_add(tmp_path: Path) -> None:
    ear = Ear()
    begun: list[int] = []  # ids of adds that began behind the switch

    with warm(tmp_path / "b", plugins=[ear]) as buffer:

        def add(serial: int) -> None:
            for i in range(200):
                switched = ear.listening
                id_ = buffer.add(experience(1000 * serial + i))
                if switched:
                    begun.append(id_)
                if i == 50 and serial == 0:
                    ear.listening = True

        run_threads(*(lambda k=k: add(k) for k in range(4)))
        assert len(begun) >= 149
        assert len(begun) <= len(ear.heard) <= len(begun) + 4


def test_what_asking_an_observer_raises_is_not_swallowed(tmp_path: Path) -> None:
    class Asked(Ear):
        trouble: BaseException | None = None

        def __getattribute__(self, name: str) -> Any:
            if name == "listening" and self.trouble is not None:
                trouble, self.trouble = self.trouble, None
                raise trouble
            return super().__getattribute__(name)

    ear = Asked()
    with warm(tmp_path / "b", plugins=[ear]) as buffer:
        for trouble in (KeyboardInterrupt(), RuntimeError("what?")):
            ear.trouble = trouble
            with pytest.raises(type(trouble)):
                buffer.add(experience(1))
        assert buffer.add(experience(1)) == 1
        assert not buffer._inside


def test_another_clock(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As tests put one in the place of `time.time`, for a while."""
    with opened(tmp_path / "b") as buffer:
        with monkeypatch.context() as patched:
            patched.setattr(time, "time", lambda: 5.5)
            assert [buffer.get(buffer.add(experience(i))).timestamp for i in range(2)] == [5.5] * 2
        before = time.time()
        assert buffer.get(buffer.add(experience(2))).timestamp >= before  # type: ignore[operator]
        monkeypatch.setattr(time, "time", lambda: 7)
        assert buffer.get(buffer.add(experience(3))).timestamp == 7


# ---------------------------------------------------------------- representation


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_change_of_representation_while_threads_add(tmp_path: Path, elsewhere: bool) -> None:
    """Of this process' making or of another's: all that was acknowledged is there, as changed."""
    path = tmp_path / "b"
    ids: dict[int, int] = {}
    stop = threading.Event()
    with warm(path) as buffer:

        def add(thread: int) -> None:
            serial = 10_000 * (thread + 1)
            while not stop.is_set():
                ids[serial] = buffer.add(experience(serial))
                serial += 1
                time.sleep(0.005)  # a change has so much to do, and takes so long

        def change() -> None:
            try:
                for fusion in ("weighted_concat", "weighted_sum", "weighted_concat"):
                    least = len(ids) + 30
                    while len(ids) < least and not stop.is_set():
                        time.sleep(0.001)
                    if elsewhere:
                        run_process(_reindex, path, fusion)
                    else:
                        reindex(path, config=CONFIG, fusion=fusion)
                least = len(ids) + 30
                while len(ids) < least:
                    time.sleep(0.001)
            finally:
                stop.set()

        run_threads(change, *(lambda k=k: add(k) for k in range(4)))
        assert buffer._session.replica.state.representation >= 3
        check_found(buffer, ids)
    with ExperienceBuffer.open(path) as again:
        check_found(again, ids)
        assert len(again) == len(ids) + 1


def test_a_change_that_overtakes_a_plain_add(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It looked before the change began, and is written behind it."""
    labels, path = Intake.labels, tmp_path / "b"

    def changing(intake: Intake, accepted: Any) -> bytes | None:
        made = labels(intake, accepted)
        if change:
            reindex(path, config=CONFIG, fusion=change.pop())
        return made

    change: list[str] = []
    monkeypatch.setattr(Intake, "labels", changing)
    with warm(path) as buffer:
        for i, id_, fusion in ((1, 2, "weighted_concat"), (3, 5, "weighted_sum")):
            change.append(fusion)
            before = buffer._session.plain_adds
            # An id was given to what did not count, and is not given again.
            assert buffer.add(experience(i, key=str(i))) == id_
            assert buffer.add(experience(i + 1)) == id_ + 1
            check_found(buffer, {i: id_, i + 1: id_ + 1})
            assert buffer._session.plain_adds not in (None, before)
        assert len(buffer) == 5
    with ExperienceBuffer.open(path) as again:
        assert len(again) == 5


def test_while_a_change_is_under_way_no_add_is_plain(tmp_path: Path) -> None:
    with warm(tmp_path / "b") as buffer:
        words, plain = buffer._session.control.words, buffer._session.plain_adds
        assert plain is not None
        words[c.REPRESENTATION] |= CHANGING
        assert plain.add(experience(1), None) is None
        assert buffer.add(experience(1)) == 1  # who made it has died: Python sees to that
        assert not words[c.REPRESENTATION] & CHANGING
        assert plain.add(experience(2), None) == 2


def _reindex(path: Path, fusion: str) -> None:
    reindex(path, config=CONFIG, fusion=fusion)


def check_found(buffer: ExperienceBuffer, ids: dict[int, int]) -> None:
    """All of them are there, and found by what they are now fused to."""
    assert len(set(ids.values())) == len(ids)
    kept = {item.id: item.answer for item in buffer}
    assert {id_: kept.get(id_) for id_ in ids.values()} == {id_: i for i, id_ in ids.items()}
    items = [experience(serial) for serial in ids]
    for start in range(0, len(items), 1000):
        some = items[start : start + 1000]
        v, q = ([getattr(item, name) for item in some] for name in ("v_embed", "q_embed"))
        found = buffer.search_many(v_embed=np.stack(v), q_embed=np.stack(q), k=1)
        assert found.ids[:, 0].tolist() == list(ids.values())[start : start + 1000]
        np.testing.assert_allclose(found.similarities[:, 0], 1.0, atol=1e-5)


# ---------------------------------------------------------------- closing


def test_closing_in_the_middle_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As by a finalizer, which may run while labels are made."""
    labels, refused = Intake.labels, []

    def closing(intake: Intake, accepted: Any) -> bytes | None:
        if plain:
            with pytest.raises(ReentrantCall):
                buffer.close()
            refused.append(accepted)
        return labels(intake, accepted)

    plain = False
    monkeypatch.setattr(Intake, "labels", closing)
    with warm(tmp_path / "b") as buffer:
        plain = True
        assert buffer.add(experience(1, key="k")) == 1
        assert len(refused) == 1
        assert not buffer._inside
        assert buffer.add(experience(2)) == 2


def _close_while_labels_are_made(path: Path) -> None:
    labels = Intake.labels
    closers: list[threading.Thread] = []

    def slow(intake: Intake, accepted: Any) -> bytes | None:
        if closing:
            closers.append(threading.Thread(target=buffer.close))
            closers[0].start()
            closers[0].join(TIMEOUT_S / 2)
        return labels(intake, accepted)

    closing = False
    Intake.labels = slow  # type: ignore[method-assign]
    buffer = warm(path)
    buffer.add(experience(1, key="k"))
    closing = True
    with pytest.raises(BufferClosed):
        buffer.add(experience(2, key="l"))
    assert not closers[0].is_alive()
    with ExperienceBuffer.open(path) as again:
        assert again.ids().tolist() == [0, 1]


def test_closed_by_another_thread_while_labels_are_made(tmp_path: Path) -> None:
    run_process(_close_while_labels_are_made, tmp_path / "b")


def _closed_by_others(path: Path) -> None:
    for round_ in range(15):
        buffer, ids, going = warm(path / str(round_)), [0], threading.Semaphore(0)

        def add(buffer: Any = buffer, ids: Any = ids, going: Any = going) -> None:
            try:
                while True:
                    ids.append(buffer.add(experience(len(ids), tags=("t",) * (len(ids) % 2))))
                    going.release()
            except BufferClosed:
                pass

        def close(buffer: Any = buffer, going: Any = going) -> None:
            for _ in range(20):
                going.acquire()
            buffer.close()

        run_threads(close, *[add] * 5)
        with ExperienceBuffer.open(path / str(round_)) as again:
            assert set(ids) <= set(again.ids().tolist())


def test_closed_by_another_thread_while_threads_add(tmp_path: Path) -> None:
    run_process(_closed_by_others, tmp_path)


class Interrupting(FileSystem):
    """A signal comes in the middle of each sync, if wanted."""

    wanted = False

    def fdatasync(self, fd: int) -> None:
        super().fdatasync(fd)
        if self.wanted:
            signal.raise_signal(signal.SIGUSR1)


@pytest.fixture
def closing_signal() -> Iterator[list[Any]]:
    """A handler that closes the buffer in this list; what came of it is behind it."""
    met: list[Any] = []

    def handler(*_: Any) -> None:
        try:
            met[0].close()
        except ReentrantCall as exc:
            met.append(exc)

    before = signal.signal(signal.SIGUSR1, handler)
    yield met
    signal.signal(signal.SIGUSR1, before)


def test_a_signal_handler_cannot_close_it(tmp_path: Path, closing_signal: list[Any]) -> None:
    disk = Interrupting()
    with warm(tmp_path / "b", filesystem=disk) as buffer:
        closing_signal.append(buffer)
        disk.wanted = True
        assert buffer.add(experience(1)) == 1
        disk.wanted = False
        assert len(closing_signal) == 2
        assert isinstance(closing_signal[1], ReentrantCall)
        assert buffer.add(experience(2)) == 2


# ---------------------------------------------------------------- processes


def test_a_forked_child_adds_and_its_parent_goes_on(tmp_path: Path) -> None:
    with warm(tmp_path / "b") as buffer:
        assert buffer.add(experience(1)) == 1
        session = buffer._session
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                for _ in range(40):  # in the place of the parent's lock files
                    os.open(os.devnull, os.O_RDWR)
                code = 0 if [buffer.add(experience(i)) for i in (2, 3, 4)] == [2, 3, 4] else 2
                code = code or (0 if buffer._session is not session else 3)
                buffer.close()
            finally:
                os._exit(code)
        assert os.waitpid(pid, 0)[1] == 0
        assert buffer.add(experience(5)) == 5
        assert [item.answer for item in buffer] == list(range(6))


def test_a_fork_in_the_middle_of_an_add(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a finalizer, say: both go on with the add, each in a session of its own."""
    labels, pids = Intake.labels, [0]

    def forking(intake: Intake, accepted: Any) -> bytes | None:
        if not pids:
            pids.append(os.fork())
            for _ in range(40 if pids == [0] else 0):  # in the place of the parent's lock files
                os.open(os.devnull, os.O_RDWR)
        return labels(intake, accepted)

    monkeypatch.setattr(Intake, "labels", forking)
    with warm(tmp_path / "b") as buffer:
        buffer.add(experience(1, key="a"))
        session = buffer._session
        pids.clear()
        id_ = buffer.add(experience(2, key="b"))
        if pids == [0]:
            code = 1
            try:
                code = 0 if buffer._session is not session else 2
                buffer.add(experience(3, key="c"))
                buffer.close()
            except BaseException:
                code = 1
            finally:
                os._exit(code)
        assert os.waitpid(pids[0], 0)[1] == 0
        assert buffer.get(id_).answer == 2
        assert sorted(item.answer for item in buffer) == [0, 1, 2, 2, 3]
        assert buffer.add(experience(4, key="d")) == 5


def test_a_pickled_buffer_adds(tmp_path: Path) -> None:
    with warm(tmp_path / "b") as buffer:
        buffer.add(experience(1))
        with pickle.loads(pickle.dumps(buffer)) as other:  # noqa: S301  (of this test)
            for i in range(2, 10, 2):
                assert buffer.add(experience(i)) == i
                assert other.add(experience(i + 1)) == i + 1
            assert other._session.plain_adds is not None
        assert len(buffer) == 10


DAEMONS = """
import sys, threading
import numpy as np
from expbuf_core import Experience, ExperienceBuffer

index = {"backend": "exact", "builder": "off"}
buffer = ExperienceBuffer.open(sys.argv[1], index=index)
ids, enough = [], threading.Semaphore(0)

def add():
    item = Experience(v_embed=np.ones(4), q_embed=np.ones(4), tags=("t",))
    while True:
        ids.append(buffer.add(item))
        enough.release()

for _ in range(6):
    threading.Thread(target=add, daemon=True).start()
for _ in range(50):
    enough.acquire()
print(max(ids), flush=True)
"""


def test_the_interpreter_ends_while_daemon_threads_add(tmp_path: Path) -> None:
    for round_ in range(5):
        path = tmp_path / str(round_)
        done = subprocess.run(
            [sys.executable, "-c", DAEMONS, path],
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, "")
        with ExperienceBuffer.open(path) as buffer:
            assert len(buffer) > int(done.stdout)


# ---------------------------------------------------------------- errors


def test_what_a_failing_disk_leaves(tmp_path: Path) -> None:
    disk = FaultyFileSystem()
    with warm(tmp_path / "b", filesystem=disk) as buffer:
        disk.fail_write()
        with pytest.raises(ExpbufError):
            buffer.add(experience(1))
        assert buffer.add(experience(2)) == 1
        disk.fail_sync()
        with pytest.raises(ExpbufError):
            buffer.add(experience(3))
        disk.clear()
        buffer.add(experience(4))
        assert [item.answer for item in buffer] == [0, 2, 4]


def test_a_folder_that_is_replaced(code: str, tmp_path: Path) -> None:
    buffer = opened(tmp_path / "b")
    buffer.add(experience(0))
    buffer.add(experience(1))
    (tmp_path / "b").rename(tmp_path / "c")
    with pytest.raises(BufferReplaced):
        buffer.add(experience(2))
    opened(tmp_path / "b").close()
    with pytest.raises(BufferReplaced):
        buffer.add(experience(2))
    buffer.close()


class Vanishing(FileSystem):
    """The folder goes while it is synced, and the sync fails."""

    folder: Path | None = None

    def fdatasync(self, fd: int) -> None:
        if self.folder is not None:
            self.folder.rename(self.folder.with_name("gone"))
            self.folder = None
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        super().fdatasync(fd)


def test_an_error_says_what_lies_behind_it(tmp_path: Path) -> None:
    disk = Vanishing()
    with warm(tmp_path / "b", filesystem=disk) as buffer:
        disk.folder = tmp_path / "b"
        with pytest.raises(BufferReplaced):
            buffer.add(experience(1))
        (tmp_path / "gone").rename(tmp_path / "b")


BAD: list[tuple[Any, Any]] = [
    (None, None),
    (Experience(v_embed=np.ones(DIM + 1), q_embed=np.ones(DIM)), None),
    (Experience(v_embed=np.full(DIM, np.nan), q_embed=np.ones(DIM)), None),
    (Experience(v_embed=np.ones(DIM)), None),
    (Experience(v_embed=np.ones(DIM), q_embed=np.ones(DIM), confidence=2.0), None),
    (Experience(v_embed=np.ones(DIM), q_embed=np.ones(DIM), answer=object), None),
    *((experience(1), priority) for priority in (float("nan"), -1, -0.5, 1e39, 10**400, "1")),
]


def test_bad_input_is_refused_as_python_does(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    met: list[list[tuple[type, str]]] = []
    for code in ("native", "python"):
        if code == "python":
            request.getfixturevalue("without_native_code")
        with opened(tmp_path / code) as buffer:
            buffer.add(experience(0))
            met.append([])
            for item, priority in BAD:
                with pytest.raises(ExpbufError) as caught:
                    buffer.add(item, priority=priority)
                met[-1].append((caught.type, str(caught.value)))
            assert buffer.add(experience(1), priority=np.float32(0.5)) == 1
            assert not buffer._inside
    assert met[0] == met[1]


# ---------------------------------------------------------------- memory


def test_nothing_is_left_in_memory(tmp_path: Path) -> None:
    ear = Ear()
    item, labelled, bad = experience(1), experience(2, tags=("t",), key="k"), BAD[2][0]
    with warm(tmp_path / "b", plugins=[ear], durability="os", max_size=10) as buffer:

        def many() -> None:
            for i in range(600):
                buffer.add(item)
                buffer.add(labelled, priority=0.5)
                ear.listening = i % 50 == 0
                with pytest.raises(ExpbufError):
                    buffer.add(bad)
            len(buffer)
            ear.heard.clear()
            gc.collect()

        def counts() -> list[int]:
            kept = (item, labelled, bad, ear, time, buffer._inside, buffer._session.plain_adds)
            return [sys.getrefcount(each) for each in kept]

        many()
        before, blocks = counts(), sys.getallocatedblocks()
        many()
        assert counts() == before
        assert sys.getallocatedblocks() - blocks < 300


def test_a_buffer_that_goes_with_a_cycle_is_closed_and_freed(tmp_path: Path) -> None:
    assert native is not None
    adders = sum(isinstance(each, native.Adder) for each in gc.get_objects())
    for i in range(3):
        buffer: Any = warm(tmp_path / str(i))
        buffer.add(experience(1, key="k"))
        buffer.itself = buffer
        buffer.method = buffer.add
        del buffer
        gc.collect()
    opened(tmp_path / "last").close()  # closes what was dropped
    deadline = time.monotonic() + TIMEOUT_S
    while True:
        gc.collect()
        if sum(isinstance(each, native.Adder) for each in gc.get_objects()) <= adders:
            break
        assert time.monotonic() < deadline
        time.sleep(0.01)
    with ExperienceBuffer.open(tmp_path / "0") as again:
        assert [item.answer for item in again] == [0, 1]
