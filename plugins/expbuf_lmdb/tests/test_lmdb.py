"""What the contract does not ask: maps, readers, modes, room, crash states, damage, settings."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import resource
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pytest

from expbuf_core import Experience, ExperienceBuffer
from expbuf_core.config_schema import load_config
from expbuf_core.contracts import LogGone
from expbuf_core.errors import (
    ConfigError,
    CorruptionError,
    FormatVersionError,
    StorageError,
    StorageFull,
)
from expbuf_core.repair import repair
from expbuf_core.testing.faults import FaultyFileSystem
from expbuf_core.testing.persistence_log import Core, Place, operation, outcome
from expbuf_core.testing.processes import Child, in_child
from expbuf_core.verification import verify
from expbuf_lmdb import environment, layout
from expbuf_lmdb.adapter import LMDBPersistenceAdapter
from expbuf_lmdb.environment import PRIVATE, READING, WRITING, Environment, wrapped
from expbuf_lmdb.pages import PageFile
from expbuf_lmdb.trees import check_file

LONG = os.environ.get("EXPBUF_LONG", "") not in ("", "0")
SMALL = {"map_bytes": 1 << 20, "stage_bytes": 1 << 14}
CONFIG = {"persistence": {"backend": "lmdb", "lmdb": SMALL}, "index": {"backend": "exact"}}


def place(root: Path, name: str = "buffer", **settings: Any) -> Place:
    return Place(root, "lmdb", {**SMALL, **settings}, name=name)


def adapter_of(core: Core) -> LMDBPersistenceAdapter:
    assert isinstance(core.adapter, LMDBPersistenceAdapter)
    return core.adapter


def environment_of(core: Core) -> Environment:
    return adapter_of(core)._environment()


@contextlib.contextmanager
def opened(path: Path, mode: int = WRITING) -> Iterator[Environment]:
    env = environment.acquire(path, mode, 1 << 20, 64, 30.0)
    try:
        yield env
    finally:
        environment.release(env)


def add(core: Core) -> None:
    core.append(operation(core.next_lsn, 4, row_bytes=3000))
    core.sync()


def until_it_raises(work: Callable[[], object]) -> None:
    for _ in range(1000):
        work()


def experience(number: int) -> Experience:
    vector = np.full(4, number + 1, np.float32)
    return Experience(v_embed=vector, q_embed=vector, answer=f"answer {number}")


# ---------------------------------------------------------------- selecting it


def test_one_line_of_yaml(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("experience_buffer:\n  persistence: {backend: lmdb}\n")
    with ExperienceBuffer.open(tmp_path / "memory", config=tmp_path / "config.yaml") as buffer:
        buffer.add(experience(0))
    assert (tmp_path / "memory" / layout.DATA).exists()
    # The folder knows its backend.
    with ExperienceBuffer.open(tmp_path / "memory") as buffer:
        assert buffer.get(0).answer == "answer 0"
    with pytest.raises(ConfigError, match="expbuf migrate"):
        ExperienceBuffer.open(tmp_path / "memory", persistence={"backend": "file"})


@pytest.mark.parametrize(
    "wrong",
    [{"map_bytes": 2**64}, {"stage_bytes": 2**64}, {"max_readers": 2**32}, {"max_readers": True}],
)
def test_sizes_beyond_any_machine_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"persistence.lmdb.{next(iter(wrong))} = "):
        load_config({"persistence": {"lmdb": wrong}}, env={})


def test_a_creation_that_died_is_taken_up(tmp_path: Path) -> None:
    folder = tmp_path / "memory"
    with ExperienceBuffer.open(folder, persistence={"backend": "lmdb"}):
        pass
    (folder / "expbuf.json").unlink()
    with ExperienceBuffer.open(folder, persistence={"backend": "lmdb"}) as buffer:
        buffer.add(experience(0))
    (folder / "expbuf.json").unlink()
    with pytest.raises(CorruptionError, match="1 experiences are there"):
        ExperienceBuffer.open(folder, persistence={"backend": "lmdb"})


@pytest.mark.parametrize("durability", ["sync", "os"])
@pytest.mark.parametrize("backend", ["lmdb", "file"])
def test_a_buffer_whose_identity_is_lost_is_not_begun_anew(
    tmp_path: Path, durability: str, backend: str
) -> None:
    folder = tmp_path / "buffer"
    buffer = ExperienceBuffer.open(folder, persistence="lmdb", durability=durability)
    with contextlib.closing(buffer):
        buffer.add(experience(1))
        shutil.copytree(folder, tmp_path / "killed")  # at "os" the experience is staged only
    (tmp_path / "killed" / "expbuf.json").unlink()
    before = (tmp_path / "killed" / "log.mdb").read_bytes()
    with pytest.raises(CorruptionError, match=r"expbuf\.json|identity"):
        ExperienceBuffer.open(tmp_path / "killed", persistence=backend)
    assert (tmp_path / "killed" / "log.mdb").read_bytes() == before


def test_a_file_that_could_not_be_opened_can_be_tried_again(tmp_path: Path) -> None:
    with ExperienceBuffer.open(tmp_path / "buffer", persistence="lmdb") as buffer:
        buffer.add(experience(1))
    path = tmp_path / "buffer" / "log.mdb"
    raw = path.read_bytes()
    damaged = bytearray(raw)
    for page in (0, 1):  # the main database of both states begins at a page of something else
        at = page * 4096 + 16 + 24 + 48 + 40
        damaged[at : at + 8] = (0).to_bytes(8, "little")
    path.write_bytes(damaged)
    errors = []
    for _ in range(2):
        with pytest.raises(CorruptionError) as caught:
            ExperienceBuffer.open(tmp_path / "buffer")
        errors.append(caught)  # with all its frames
    path.write_bytes(raw)
    with ExperienceBuffer.open(tmp_path / "buffer") as buffer:
        assert len(buffer) == 1


# ---------------------------------------------------------------- the map


def test_the_map_grows_under_all(tmp_path: Path) -> None:
    core = Core(place(tmp_path)).create().extend(3).sync()

    def work(child: Child) -> None:
        mine = Core(core.place, wrote=core.wrote)
        mine.adapter.attach()
        mine.follows()
        child.say("attached")
        last = int(child.hear())
        mine.wrote |= {n: operation(n, 4, row_bytes=60_000) for n in range(4, last + 1)}
        mine.follows()  # the map is larger than ours
        for n in range(last + 1, last + 41):
            mine.append(operation(n, 4, row_bytes=60_000))
            mine.adapter.sync()
        child.say(mine.last)
        mine.adapter.close()

    child = Child(work)
    assert child.hear() == "attached", child.join()
    follower = core.adapter.follow(0)
    pin, rows = core.pin(core.wrote)
    for _ in range(40):
        core.append(operation(core.next_lsn, 4, row_bytes=60_000))
        core.sync()
    child.say(core.last)
    last = child.hear()
    assert last, child.join()
    core.wrote |= {
        n: operation(n, 4, row_bytes=60_000) for n in range(core.last + 1, int(last) + 1)
    }
    core.agree(list(follower.read(core.last)))
    assert environment_of(core).stats()["map_bytes"] >= 8 << 20
    child.join()
    assert all(bytes(pin.read(i)) == row for i, row in enumerate(rows))


def test_the_map_grows_under_threads(tmp_path: Path) -> None:
    core = Core(place(tmp_path)).create()
    failed: list[BaseException] = []
    stop = threading.Event()

    def read_on() -> None:
        try:
            while not stop.is_set():
                for logged in core.adapter.follow(0).read(core.last):
                    core.payloads_agree(logged)
        except BaseException as exc:
            failed.append(exc)

    threads = [threading.Thread(target=read_on, daemon=True) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(100):
        core.append(operation(core.next_lsn, 1, row_bytes=120_000))
        core.adapter.sync()
    stop.set()
    for thread in threads:
        thread.join(60)
    assert not failed, failed[0]
    core.follows()


# ---------------------------------------------------------------- readers


def test_places_of_dead_readers_are_freed(tmp_path: Path) -> None:
    core = Core(place(tmp_path)).create().extend(5).sync()

    def work(child: Child) -> None:
        mine = Core(core.place)
        mine.adapter.attach()

        def wait(*_: object) -> None:
            child.say("reading")
            child.hear()

        environment_of(mine).read(wait)

    child = Child(work)
    assert child.hear() == "reading", child.join()
    child.kill()
    env = environment_of(core)
    assert env.clear_dead_readers() == 1
    assert env.clear_dead_readers() == 0


def test_a_dead_reader_does_not_make_the_file_grow(tmp_path: Path) -> None:
    core = Core(place(tmp_path)).create().extend(5).sync()

    def work(child: Child) -> None:
        mine = Core(core.place)
        mine.adapter.attach()
        environment_of(mine).read(lambda *_: (child.say("reading"), child.hear()))

    child = Child(work)
    assert child.hear() == "reading", child.join()
    child.kill()
    sizes = []
    for _ in range(30):
        core.extend(5, rows=4, row_bytes=3000).sync()
        core.adapter.drop_below(core.last - 5, *core.live(range(core.last - 5, core.last + 1)))
        sizes.append(environment_of(core).used_bytes())
    assert sizes[-1] <= 1.2 * sizes[10]


def test_more_readers_than_there_is_room_for(tmp_path: Path) -> None:
    core = Core(place(tmp_path, max_readers=8)).create().extend(5).sync()
    core.adapter.close()
    core = Core(core.place, wrote=core.wrote)
    core.adapter.attach()
    gate = threading.Barrier(9)
    wrong: list[BaseException] = []

    def work() -> None:
        try:
            environment_of(core).read(lambda *_: gate.wait(5))
        except (threading.BrokenBarrierError, StorageError) as exc:
            wrong.append(exc)

    threads = [threading.Thread(target=work, daemon=True) for _ in range(8)]
    for thread in threads:
        thread.start()
    with pytest.raises(StorageError, match="max_readers"):
        until_it_raises(core.follows)
    gate.abort()
    for thread in threads:
        thread.join(20)
    core.follows()


# ---------------------------------------------------------------- modes


def test_one_process_reads_first_and_writes_then(tmp_path: Path) -> None:
    core = Core(place(tmp_path)).create().extend(5).finish()
    core.place.forget()
    reader = Core(core.place, core.place.adapter(writable=False), core.wrote)
    reader.recovers()
    assert environment_of(reader)._mode == PRIVATE
    writer = core.reopen()
    assert environment_of(writer) is environment_of(reader)
    assert environment_of(reader)._mode == WRITING
    writer.extend(3).sync()
    reader.wrote = writer.wrote
    reader.adapter.attach()
    reader.follows()
    reader.adapter.close()
    writer.extend(2).finish()


def test_a_reader_of_a_live_buffer_registers(tmp_path: Path) -> None:
    core = Core(place(tmp_path)).create().extend(5)

    def work(child: Child) -> None:
        reader = Core(core.place, core.place.adapter(writable=False), core.wrote)
        reader.adapter.attach()
        reader.follows()
        assert environment_of(reader)._mode == READING

    in_child(work)


def test_a_reader_that_may_not_write_the_lock_file(tmp_path: Path) -> None:
    """It reads unregistered, while pages are reused all the time."""
    core = Core(place(tmp_path)).create().extend(5).sync()

    def work(child: Child) -> None:
        real = lmdb.open

        def denied(*args: Any, **settings: Any) -> Any:
            if settings["lock"]:
                raise lmdb.Error("simulated: Permission denied")
            return real(*args, **settings)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(lmdb, "open", denied)
            reader = Core(core.place, core.place.adapter(writable=False))
            reader.adapter.attach()
            assert environment_of(reader)._mode == PRIVATE
            child.say("reads")
            while True:
                last = child.hear()
                if not last:
                    break
                first = max(1, int(last) - 20)
                reader.wrote = {n: operation(n) for n in range(first, int(last) + 1)}
                with contextlib.suppress(LogGone):
                    reader.follows(first - 1)
                child.say("read")

    child = Child(work)
    assert child.hear() == "reads", child.join()
    for turn in range(150):
        core.extend(3).sync()
        if turn % 10 == 9:
            core.adapter.drop_below(core.last - 25, *core.live(core.wrote))
        if turn % 5 == 0:
            child.say(core.last)
            assert child.hear() == "read", child.join()
    child._out.close()
    child.join()


# ---------------------------------------------------------------- room


@contextlib.contextmanager
def file_limit(size: int) -> Iterator[None]:
    """No file can grow beyond so many bytes; for this process, whatever writes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_shows_before_anything_is_written(tmp_path: Path) -> None:
    def work(child: Child) -> None:
        core = Core(place(tmp_path)).create().extend(5).sync()
        size = adapter_of(core).path.stat().st_size
        with file_limit(size):
            with pytest.raises(StorageFull):
                until_it_raises(lambda: add(core))
            last = core.last
            core.follows()
            # What needs no room for payloads goes on: removing, priorities, outcomes.
            for _ in range(20):
                core.append(operation(core.next_lsn, 0))
                core.sync()
            assert core.last == last + 20
        core.extend(3).sync()
        core.finish().reopen()

    in_child(work)


def test_lmdb_itself_finds_the_disk_full(tmp_path: Path) -> None:
    def work(child: Child) -> None:
        core = Core(place(tmp_path)).create().extend(5).sync()
        env = environment_of(core)
        adapter_of(core)._make_room = lambda *_, **__: None  # type: ignore[method-assign]
        environment._is_full = lambda _: True  # type: ignore[assignment]
        size = adapter_of(core).path.stat().st_size
        with file_limit(size):
            with pytest.raises(StorageFull):
                until_it_raises(lambda: add(core))
            given_up = core.last
            del core.wrote[given_up]
            core.next_lsn += 1
            # A small log can be begun anew, but there is no room for more in it.
            core.adapter.retire(core.durable, core.last, core.next_lsn)
            with pytest.raises(StorageFull):
                until_it_raises(lambda: add(core))
        for lost in [n for n in core.wrote if n > core.durable]:
            del core.wrote[lost]
        core.adapter.retire(core.durable, core.last, core.next_lsn + 1)
        core.next_lsn += 1
        assert environment_of(core) is env
        core.extend(3).sync()
        core.finish().reopen()

    in_child(work)


def test_the_room_ahead_is_given_back(tmp_path: Path) -> None:
    core = Core(place(tmp_path, stage_bytes=1 << 20)).create()
    for _ in range(30):
        core.append(operation(core.next_lsn, 4, row_bytes=60_000))
        core.sync()
    used = environment_of(core).used_bytes()
    assert adapter_of(core).path.stat().st_size > used + (256 << 10)
    core.finish()
    assert adapter_of(core).path.stat().st_size <= used + (300 << 10)
    core = core.reopen()
    core.append(operation(core.next_lsn, 4, row_bytes=2 << 20))  # straight into LMDB
    used = environment_of(core).used_bytes()
    core.finish()
    # The last page is never near the end of the file.
    assert adapter_of(core).path.stat().st_size >= used + (256 << 10)
    core.reopen()


def test_the_stage_keeps_its_size_whatever_who_joins_is_configured_for(tmp_path: Path) -> None:
    core = Core(place(tmp_path)).create().extend(3)
    stage = adapter_of(core).stage.path
    size = stage.stat().st_size
    joined = Core(place(tmp_path, stage_bytes=1 << 20), wrote=core.wrote)
    joined.adapter.attach()
    for _ in range(10):
        joined.append(operation(joined.next_lsn, 2, row_bytes=3000))
    assert stage.stat().st_size == size
    joined.sync()
    joined.adapter.close()
    core = Core(core.place, core.adapter, joined.wrote)
    core.extend(3)
    core.follows()
    core.reopen()


@pytest.mark.parametrize("attaches", [True, False])
def test_a_reader_follows_where_the_stage_is_made_anew(tmp_path: Path, attaches: bool) -> None:
    """It joins the writers that have made another, or has not noticed them yet."""
    core = Core(place(tmp_path)).create().extend(3)
    reader = Core(core.place, core.place.adapter(writable=False), core.wrote)
    reader.adapter.attach()
    reader.follows()
    pin, rows = core.pin(core.wrote)
    core.finish()
    core = Core(place(tmp_path, stage_bytes=1 << 15), wrote=core.wrote).reopen().extend(2)
    if attaches:
        reader.adapter.attach()
    reader.wrote = core.wrote
    reader.follows()
    assert all(bytes(pin.read(i)) == row for i, row in enumerate(rows))
    core.extend(40, rows=2, row_bytes=1000)  # and in place, now
    reader.follows()


def test_a_lonely_reader_takes_no_row_from_a_stage_that_was_begun_anew(tmp_path: Path) -> None:
    """It has not seen yet that writers came, and what it looks for is dropped by now."""
    core = Core(place(tmp_path)).create().extend(3, rows=1)
    core.adapter.close()  # killed: only the stage has them
    core.place.forget()
    adapter = core.place.adapter(writable=False, words=[0] * 8)
    reader = Core(core.place, adapter, core.wrote)
    reader.at = dict(core.at)
    reader.recovers()
    old = dict(core.wrote)
    core = core.reopen()
    pin, rows = reader.pin(old)
    core.extend(30, rows=2, row_bytes=1000).sync()
    core.adapter.drop_below(core.last, *core.live([core.last]))
    with pytest.raises(LogGone):
        reader.pin(old)
    assert all(bytes(pin.read(i)) == row for i, row in enumerate(rows))
    reader.adapter.attach()
    with pytest.raises(LogGone):
        reader.pin(old)


def test_a_read_that_is_overtaken_keeps_its_file(tmp_path: Path) -> None:
    """While one thread reads the stage, another joins the writers and lets go of it."""
    core = Core(place(tmp_path)).create().extend(3)
    reader = core.place.adapter(writable=False)
    assert isinstance(reader, LMDBPersistenceAdapter)
    reader.attach()
    read = os.pread
    opened_since: list[int] = []

    def overtaken(fd: int, length: int, offset: int) -> bytes:
        if offset and not opened_since:  # behind the header
            reader.attach()
            opened_since.append(os.open(os.devnull, os.O_RDONLY))
        return read(fd, length, offset)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("expbuf_lmdb.stage.os.pread", overtaken)
        Core(core.place, reader, core.wrote).follows()
    os.close(opened_since[0])


@pytest.mark.parametrize("configured", [1 << 14, 1 << 20])
def test_where_another_stage_has_no_room_the_old_one_will_do(
    tmp_path: Path, configured: int
) -> None:
    fs = FaultyFileSystem()
    core = Core(place(tmp_path, stage_bytes=1 << 15)).create().extend(5)
    stage = adapter_of(core).stage.path
    core.adapter.close()
    other = Place(tmp_path, "lmdb", {**SMALL, "stage_bytes": configured}, fs=fs)
    core = Core(other, wrote=core.wrote)
    fs.limit(0)
    core = core.reopen()
    assert stage.stat().st_size == 1 << 15
    core.extend(20)
    core.follows()
    fs.limit(None)
    core = core.reopen()
    assert stage.stat().st_size == configured
    core.extend(3).reopen()


def test_the_lock_file_has_its_room_on_the_disk(tmp_path: Path) -> None:
    """LMDB stores into its map: where that is a hole, a full disk would kill the process."""
    core = Core(place(tmp_path, max_readers=100)).create().extend(3)
    lock = adapter_of(core).path.with_name(f"{layout.DATA}-lock")
    core.adapter.close()
    lock.unlink()
    core = Core(core.place, wrote=core.wrote).reopen()
    found = lock.stat()
    assert found.st_blocks * 512 >= found.st_size
    assert environment_of(core)._env.info()["max_readers"] == 100
    core.extend(2).reopen()


# ---------------------------------------------------------------- failing and dying


@pytest.mark.parametrize("reading", [False, True], ids=["writing", "reading"])
def test_a_first_page_that_cannot_be_written_is_survived(tmp_path: Path, reading: bool) -> None:
    core = Core(place(tmp_path)).create().extend(5).sync().extend(2)
    env = environment_of(core)
    begin, failing = env._env.begin, iter([True])

    class Panicking:
        def __getattr__(self, name: str) -> Any:
            return getattr(real, name)

        def begin(self, *args: Any, **settings: Any) -> Any:
            if settings.get("write", False) != reading and next(failing, False):
                raise lmdb.PanicError("simulated")
            return begin(*args, **settings)

    real, env._env = env._env, Panicking()  # type: ignore[assignment]
    if reading:
        core.follows()
    core.sync()
    assert isinstance(env._env, lmdb.Environment)
    core.follows()
    core.finish().reopen()


def test_every_state_that_a_power_loss_leaves(tmp_path: Path) -> None:
    """A transaction writes pages, syncs, and writes one of two first pages: what may be on disk."""
    core = Core(place(tmp_path, stage_bytes=1 << 20)).create().extend(30).sync()
    path = adapter_of(core).path
    draw = random.Random(0)
    states = 0
    for turn in range(6):
        before, last = path.read_bytes(), core.last
        core.extend(draw.randrange(1, 6)).sync()
        if turn == 3:
            core.adapter.drop_below(core.last - 8, *core.live(core.wrote))
            before, last = path.read_bytes(), core.last
            core.extend(2).sync()
        after = path.read_bytes()
        before = before.ljust(len(after), b"\0")
        changed = [
            at
            for at in range(0, len(after), 4096)
            if before[at : at + 4096] != after[at : at + 4096]
        ]
        data = [at for at in changed if at >= 2 * 4096]
        subsets = [draw.sample(data, draw.randrange(len(data) + 1)) for _ in range(12)]
        for chosen in [*subsets, data, []]:
            mixed = bytearray(before)
            for at in chosen:
                mixed[at : at + 4096] = after[at : at + 4096]
            states += check_state(core, bytes(mixed), last)
        states += check_state(core, after, core.last)
    assert states > 60


def check_state(core: Core, content: bytes, last: int) -> int:
    copy = core.place.copy("state")
    (copy.folder / layout.DATA).write_bytes(content)
    (copy.folder / f"{layout.DATA}-lock").unlink()
    recovered = Core(copy)
    found = list(recovered.adapter.recover(floor_of(recovered), 0))
    # Operations that are in the stage only may come back as well: they were written whole.
    assert found[-1].lsn >= last
    recovered.wrote = {n: operation(n) for n in range(1, found[-1].lsn + 1)}
    recovered.agree(found, found[0].lsn - 1)
    recovered.adapter.start(1000, found[-1].lsn)
    recovered.next_lsn = 1000
    recovered.extend(2).sync()
    assert not [problem for problem in recovered.adapter.verify(1001) if problem.damage]
    copy.close()
    shutil.rmtree(copy.folder)
    return 1


def floor_of(core: Core) -> int:
    adapter = adapter_of(core)
    return adapter.read(adapter.store.state).floor


def test_without_its_stage_lmdb_is_whole(tmp_path: Path) -> None:
    """At any power loss the stage may hold anything: all that was synced is in LMDB."""
    core = Core(place(tmp_path)).create().extend(20).sync().extend(4)
    draw = random.Random(1)
    stage = core.place.folder / layout.STAGE
    good = stage.read_bytes()
    core.adapter.close()
    for turn in range(40):
        damaged = bytearray(good)
        for _ in range(draw.choice((1, 3, 30))):
            at = draw.randrange(96, len(damaged))
            damaged[at : at + draw.choice((1, 512))] = draw.randbytes(1)
        stage.write_bytes(damaged if turn else bytes(len(good)))
        core.place.forget()
        recovered = Core(core.place, core.place.adapter(writable=False))
        found = [logged.lsn for logged in recovered.adapter.recover(0, 20)]
        assert found == list(range(1, len(found) + 1))
        assert len(found) >= 20
        recovered.adapter.close()


def dying(nth: int, *, late: bool) -> None:
    """Let this process die in its n-th transaction: before LMDB commits it, or right behind."""
    begun = itertools.count(1)
    real: Callable[..., Any] = Environment.write

    def write(env: Environment, work: Callable[..., Any]) -> Any:
        mine = next(begun) == nth

        def last(*arguments: Any) -> Any:
            result = work(*arguments)
            if mine and not late:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        result = real(env, last)
        if mine:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    Environment.write = write  # type: ignore[method-assign,assignment]


@pytest.mark.parametrize("late", [False, True])
def test_killed_in_any_transaction(tmp_path: Path, late: bool) -> None:
    """While it adds, takes snapshots and drops; and the next one in the midst of recovering."""
    settings: dict[str, Any] = {
        "persistence": {"backend": "lmdb", "lmdb": SMALL},
        "index": {"backend": "exact", "builder": "off"},
        "max_size": 6,
    }
    for nth in (1, 2, 5, 9, 14, 20):
        folder = tmp_path / str(nth)

        def work(child: Child, folder: Path = folder, nth: int = nth) -> None:
            dying(nth, late=late)
            with ExperienceBuffer.open(folder, **settings) as buffer:
                for number in range(14):
                    buffer.add(experience(number))
                    child.say(number)
                    if number % 4 == 3:
                        buffer.save_snapshot()
            raise AssertionError("it should be dead")

        def recover(child: Child, folder: Path = folder) -> None:
            dying(1, late=late)
            ExperienceBuffer.open(folder, **settings)

        said = Child(work)._reap(signal.SIGKILL).split()
        if (folder / "expbuf.json").exists():
            Child(recover)._reap(signal.SIGKILL)
        with ExperienceBuffer.open(folder, **settings) as buffer:
            found = [int(str(item.answer).split()[1]) for item in buffer]
            assert found == list(range(max(found, default=-1) + 1))[-6:]
            assert len(said) - 1 <= max(found, default=-1) <= len(said), "lost, or never written"
            buffer.add(experience(99))
        with ExperienceBuffer.open(folder, **settings) as buffer:
            assert len(buffer) == min(len(found) + 1, 6)
            session = buffer._live()
            assert not [each for each in session.adapter.verify(buffer.lsn) if each.damage]


# ---------------------------------------------------------------- damage


def test_a_cut_file_does_not_kill_the_process(tmp_path: Path) -> None:
    core = Core(place(tmp_path)).create().extend(60).finish()
    path = adapter_of(core).path
    size = path.stat().st_size
    for length in (0, 100, 4096, 8191, 8192, 40_000, size // 4):
        with open(path, "r+b") as file:
            content = file.read()
            file.truncate(length)
        with pytest.raises(CorruptionError, match="cut"):
            check_file(path)
        assert outcome(core.place, core.wrote) == "refused"
        path.write_bytes(content)
    check_file(path)


def test_a_page_that_is_another_does_not_kill_the_process(tmp_path: Path) -> None:
    """LMDB aborts where a page beside the one that it reads is none of the tree."""
    core = Core(place(tmp_path)).create()
    for turn in range(25):
        core.extend(8, rows=4 if turn % 3 == 0 else None, row_bytes=300 + 2700 * (turn % 5 == 0))
        core.sync()
    path = adapter_of(core).path
    core.finish()
    good = path.read_bytes()
    reader = PageFile(path)
    tables = (layout.OPERATIONS, layout.ROWS)
    pages = sorted({node.offset // 4096 for name in tables for node in reader.entries(name)})
    reader.close()
    draw = random.Random(0)
    outcomes = []

    def work(child: Child) -> None:
        while child.hear():
            found = outcome(core.place, core.wrote)
            dropping = core.place.adapter()
            with contextlib.suppress(CorruptionError):
                list(dropping.recover(core.last, 0))
                dropping.start(core.last + 1, core.last)
                dropping.drop_below(core.last - 5, *core.live([]))
            core.place.close()
            child.say(found)  # from now on the file may be another one

    child = Child(work)
    for kind in ("zeros", "noise", "another", "header") * (40 if LONG else 6):
        content, at = bytearray(good), 4096 * draw.choice(pages)
        if kind == "zeros":
            content[at : at + 4096] = bytes(4096)
        elif kind == "noise":
            content[at : at + 4096] = draw.randbytes(4096)
        elif kind == "another":
            other = 4096 * draw.choice(pages)
            content[at : at + 4096] = good[other : other + 4096]
        else:
            content[at + 10 : at + 40] = draw.randbytes(30)
        path.write_bytes(content)
        with contextlib.suppress(BrokenPipeError):
            child.say("go")
        said = child.hear()
        assert said, f"{kind}, page {at // 4096}: {child.join()}"
        outcomes.append(said)
    child._out.close()
    child.join()
    assert "refused" in outcomes


def test_first_pages_are_checked(tmp_path: Path) -> None:
    core = Core(place(tmp_path)).create().extend(5).finish()
    path = adapter_of(core).path
    good = path.read_bytes()
    changes = {
        16: (b"\0\0\0\0", CorruptionError),  # magic
        20: (b"\7\0\0\0", FormatVersionError),  # version
        32: (b"\0\0\0\0\0\0\xff\0", CorruptionError),  # size of the map
        40: (b"\1\0\0\0", CorruptionError),  # size of a page
        80: (b"\0\0\0\0\0\0\xff\0", CorruptionError),  # root of the free list
        128: (b"\0\0\0\0\0\0\xff\0", CorruptionError),  # root of the main tree
        136: (b"\0\0\0\0\0\xff\0\0", CorruptionError),  # last page
    }
    for page in (0, 4096):
        for at, (value, error) in changes.items():
            damaged = bytearray(good)
            damaged[page + at : page + at + len(value)] = value
            path.write_bytes(damaged)
            if at in (32, 80, 128, 136) and page != newest(good):
                check_file(path)  # of the older state: nobody reads there
                continue
            with pytest.raises(error):
                check_file(path)
    path.write_bytes(good)
    check_file(path)


def newest(content: bytes) -> int:
    first, second = (int.from_bytes(content[p + 144 : p + 152], "little") for p in (0, 4096))
    return 0 if first > second else 4096


def test_an_older_state_is_noticed(tmp_path: Path) -> None:
    """LMDB rolled back by one transaction: the stage knows better."""
    core = Core(place(tmp_path)).create().extend(20).sync().extend(3).finish()
    path = adapter_of(core).path
    content = bytearray(path.read_bytes())
    at = newest(bytes(content))
    content[at + 144 : at + 152] = bytes(8)  # the newest state looks oldest now
    path.write_bytes(content)
    core.place.forget()
    with pytest.raises(CorruptionError, match="is missing"):
        list(core.place.adapter().recover(0, 0))


def test_an_environment_of_somebody_else(tmp_path: Path) -> None:
    core = Core(place(tmp_path)).create().extend(5).finish()
    path = adapter_of(core).path
    path.unlink()
    env = lmdb.open(str(path), subdir=False, max_dbs=3, lock=False, map_size=1 << 20)
    with env.begin(write=True) as txn:
        txn.put(b"a", b"b")
    env.close()
    with pytest.raises(CorruptionError, match="a database is missing"):
        list(core.place.adapter().recover(0, 0))


@pytest.mark.parametrize("instead", [Path.mkdir, os.mkfifo])
@pytest.mark.parametrize("name", [layout.DATA, layout.STAGE])
def test_something_else_in_the_place_of_a_file(
    tmp_path: Path, name: str, instead: Callable[[Path], None]
) -> None:
    """Nobody waits for a FIFO to be written to, nor does repairing."""
    with ExperienceBuffer.open(tmp_path / "memory", config=CONFIG) as buffer:
        buffer.add(experience(0))
        buffer.save_snapshot()
    path = tmp_path / "memory" / name
    path.unlink()
    instead(path)
    for mode in ("r", "a"):
        with pytest.raises(CorruptionError, match=name) as caught:
            ExperienceBuffer.open(tmp_path / "memory", config=CONFIG, mode=mode)
        assert caught.value.path == str(path)
    assert [problem.path for problem in verify(tmp_path / "memory") if problem.damage] == [
        str(path)
    ]
    assert repair(tmp_path / "memory", config=CONFIG).saved == 1  # either has it


@pytest.mark.parametrize("change", [os.unlink, lambda path: path.write_bytes(bytes(1 << 14))])
def test_repairing_says_that_commits_may_have_been_in_a_lost_stage(
    tmp_path: Path, change: Callable[[Path], object]
) -> None:
    """It cannot know: they were acknowledged, at "group" and "os", and were nowhere else."""
    folder = tmp_path / "memory"

    def work(child: Child) -> None:
        buffer = ExperienceBuffer.open(folder, config={**CONFIG, "durability": "os"})
        buffer.add(experience(0))
        buffer.sync()
        buffer.add(experience(1))
        child.say("added")
        child.hear()

    child = Child(work)
    assert child.hear() == "added"
    child.kill()
    with ExperienceBuffer.open(folder, config=CONFIG, mode="r") as buffer:
        assert len(buffer) == 2
    change(folder / layout.STAGE)
    report = repair(folder, config=CONFIG)
    assert report.saved == 1
    assert [place.path for place in report.damage] == [str(folder / layout.STAGE)]
    assert any("unless it was damaged later" in note for note in report.notes)


@pytest.mark.parametrize("name", [layout.STAGE, layout.DATA])
def test_a_file_beyond_all_memory(tmp_path: Path, name: str) -> None:
    """How long it is stands in it; the file system need not be right."""
    with ExperienceBuffer.open(tmp_path / "memory", config=CONFIG) as buffer:
        buffer.add(experience(0))
    os.truncate(tmp_path / "memory" / name, 1 << 42)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30), hard))
    try:
        assert repair(tmp_path / "memory", config=CONFIG).saved == 1
        for mode in ("r", "a"):
            with ExperienceBuffer.open(tmp_path / "memory", config=CONFIG, mode=mode) as buffer:
                assert [item.answer for item in buffer] == ["answer 0"]
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def test_errors_of_lmdb(tmp_path: Path) -> None:
    path = tmp_path / layout.DATA
    path.write_bytes(b"")
    assert isinstance(wrapped(lmdb.DiskError("x"), "write", path), StorageFull)
    assert isinstance(wrapped(lmdb.MapFullError("x"), "write", path), StorageFull)
    assert isinstance(wrapped(lmdb.CorruptedError("x"), "read", path), CorruptionError)
    assert isinstance(wrapped(lmdb.InvalidError("x"), "open", path), CorruptionError)
    assert isinstance(wrapped(lmdb.VersionMismatchError("x"), "open", path), FormatVersionError)
    plain = wrapped(lmdb.LockError("x"), "write", path)
    assert type(plain) is StorageError
    assert str(path) in str(plain)


def test_a_stage_that_cannot_be_begun_anew_stops_nothing(tmp_path: Path) -> None:
    fs = FaultyFileSystem()
    core = Core(Place(tmp_path, "lmdb", SMALL, fs=fs)).create()
    for turn in range(60):
        if turn % 7 == 3:
            fs.fail("pwrite", path=layout.STAGE)
        try:
            core.append(operation(core.next_lsn, 2, row_bytes=2500))
        except StorageError:
            if core.place.words[layout.GENERATION] == 0:
                core.adapter.retire(core.durable, core.last, core.next_lsn + 1)
                core.next_lsn += 1
        fs.clear()
    core.follows()
    core.finish().reopen()


def test_in_a_folder_whose_name_is_no_text(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"\xff")
    one = np.ones(4, np.float32)
    with ExperienceBuffer.open(folder, persistence="lmdb", index="exact") as buffer:
        buffer.add(Experience(v_embed=one, answer="yes"))
    with ExperienceBuffer.open(folder, mode="r") as buffer:
        assert [e.answer for e in buffer] == ["yes"]
