"""Several processes, threads and buffers on one folder: one order, and nobody reads stale."""

from __future__ import annotations

import concurrent.futures
import contextlib
import itertools
import os
import pickle
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from module_helpers import (
    CONFIG,
    DIM,
    TIMEOUT_S,
    OpenBuffer,
    Worker,
    add_all,
    answers,
    columns,
    contents,
    expected,
    experience,
    find,
    finds,
    run_forked,
    vector,
)

from expbuf_core import (
    BufferClosed,
    BufferReplaced,
    ConfigError,
    CorruptionError,
    ExperienceBuffer,
    LockTimeout,
    StorageError,
    UnknownExperienceError,
)
from expbuf_core.builder import IndexBuilder
from expbuf_core.locks import ProcessLock
from expbuf_core.state import State
from expbuf_core.testing.processes import Child
from expbuf_file import layout

# ---------------------------------------------------------------- two buffers, one process


def test_two_buffers_on_one_folder(open_buffer: OpenBuffer) -> None:
    first, second = open_buffer(), open_buffer()
    for serial in range(0, 30, 2):
        first.add(experience(serial))
        assert finds(second, serial)
        second.add(experience(serial + 1))
        assert finds(first, serial + 1)
    assert answers(first) == answers(second) == expected(range(30))
    assert first.lsn == second.lsn
    receipt = find(first, 3, k=4).receipt
    assert second.record_outcome(receipt, success=True) == 4
    assert first.record_outcome(receipt, success=True) == 0
    assert contents(first) == contents(second)
    first.close()
    assert finds(second, 7)
    second.add(experience(30))
    second.close()
    with open_buffer() as again:
        assert answers(again) == expected(range(31))
        assert again.recovery.clean


def test_own_operations_among_those_of_others(open_buffer: OpenBuffer) -> None:
    """A writer that does not read applies its own with the others', and is told of each of its."""
    first, second = open_buffer(), open_buffer()
    gone: set[int] = set()
    for serial in range(600):
        writer = (first, second, second)[serial % 3]
        id_ = writer.add(experience(serial))
        if serial % 97 == 50:
            assert first.update_priorities([id_, id_ - 1], [1, 2.5]) == 2
        if serial % 101 == 60:
            assert second.remove([id_, id_ - 1]) == 2
            assert first.remove([id_]) == 0
            gone |= {serial, serial - 1}
    for buffer in (first, second):
        assert answers(buffer) == [x for i, x in enumerate(expected(range(600))) if i not in gone]
    assert contents(first) == contents(second)
    assert len(first) == 600 - len(gone)


def test_updates_while_another_one_adds(open_buffer: OpenBuffer) -> None:
    """Between what a writer has read and its own operation stand those of others."""
    first, second = open_buffer(), open_buffer()
    ids = second.add_many(columns(range(10)))
    done = threading.Event()

    def add_on() -> None:
        while not done.is_set():
            first.add(experience(0))

    thread = threading.Thread(target=add_on)
    thread.start()
    try:
        for i in range(200):
            assert second.update_priorities(ids[: 1 + i % 9], [float(i)] * (1 + i % 9)) == 1 + i % 9
    finally:
        done.set()
        thread.join()


def test_a_read_that_was_interrupted_passes_nothing_over(
    open_buffer: OpenBuffer, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = open_buffer(), open_buffer()
    add_all(first, range(3))
    add_all(first, range(3, 30))
    first.record_outcome(first.add(experience(30)), success=True)

    def interrupted(state: State, run: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(State, "apply_run", interrupted)
        patched.setattr(State, "apply", interrupted)
        with pytest.raises(KeyboardInterrupt):
            len(second)
    first.add(experience(31))
    assert answers(second) == expected(range(32))
    assert contents(first) == contents(second)


def test_a_reader_beside_a_writer_in_one_process(open_buffer: OpenBuffer) -> None:
    writer = open_buffer()
    add_all(writer, range(3))
    reader = open_buffer(mode="r")
    for serial in range(3, 20):
        writer.add(experience(serial))
        assert finds(reader, serial)
        assert len(reader) == serial + 1


def test_memory_is_taken_ahead_by_who_only_reads(open_buffer: OpenBuffer) -> None:
    """Whoever applies what others add would meet pages that were never touched in its searches."""
    writer, reader = open_buffer(), open_buffer()
    vectors = np.random.default_rng(0).standard_normal((700, 512), dtype=np.float32)
    writer.add_many({"v_embed": vectors, "q_embed": vectors})  # 1.4 MB
    assert len(reader.search_index(v_embed=vectors[3], q_embed=vectors[3], k=1)) == 1
    for thread in threading.enumerate():
        if thread.name == "expbuf-memory":
            thread.join(TIMEOUT_S)
    tail = reader._live().replica.tiers._tail
    assert tail.rows == 700
    assert tail._taken == 1400


def test_logs_are_followed_across_switches_and_snapshots(open_buffer: OpenBuffer) -> None:
    first, second = open_buffer(max_size=50), open_buffer(max_size=50)
    idle = open_buffer(max_size=50)  # looks only at the end, when its place in the log is long gone
    for start in range(0, 400, 40):
        writer, reader = (first, second) if start % 80 else (second, first)
        writer.add_many(columns(range(start, start + 40)))
        writer.save_snapshot()
        assert finds(reader, start + 39)
    for buffer in (idle, first, second):
        assert finds(buffer, 399)
        assert finds(buffer, 351)
        assert len(find(buffer, 390, k=100)) == 50
        assert answers(buffer) == expected(range(350, 400))


def zeros(control: Path) -> None:
    with open(control, "r+b") as file:
        file.write(bytes(4096))


def cut(control: Path) -> None:
    os.truncate(control, 200)


def older(control: Path) -> None:
    with open(control, "r+b") as file:
        file.write(control.with_name("control.older").read_bytes())


@pytest.mark.parametrize("change", [zeros, cut, older])
def test_a_control_page_that_is_changed_under_a_writer_stops_it(
    folder: Path, open_buffer: OpenBuffer, change: Callable[[Path], None]
) -> None:
    """As by a copy into the folder. Nothing is acknowledged that would be written anywhere."""
    with open_buffer() as buffer:
        add_all(buffer, range(3))
    (folder / "control.older").write_bytes((folder / "control").read_bytes())
    buffer = open_buffer()
    add_all(buffer, range(3, 6))
    change(folder / "control")
    for use in (lambda: buffer.add(experience(6)), lambda: buffer.remove([0])):
        with pytest.raises(CorruptionError, match="not the control page") as caught:
            use()
        assert (caught.value.path, caught.value.offset) == (str(folder / "control"), 0)
    with contextlib.suppress(StorageError):
        buffer.close()
    (folder / "control.older").unlink()
    with open_buffer() as again:
        assert answers(again) == expected(range(6))


def test_a_control_page_that_calls_the_log_broken_is_checked_first(
    folder: Path, open_buffer: OpenBuffer
) -> None:
    """No new log is begun with the numbers of a page that somebody has overwritten."""
    buffer = open_buffer()
    add_all(buffer, range(3))
    with open(folder / "control", "r+b") as file:
        file.write(b"\xff" * 4096)
    logs = {path.name: path.read_bytes() for path in folder.glob("*.wal")}
    for use in (lambda: buffer.add(experience(3)), buffer.sync):
        with pytest.raises(CorruptionError, match="not the control page"):
            use()
    with contextlib.suppress(StorageError):
        buffer.close()
    assert {path.name: path.read_bytes() for path in folder.glob("*.wal")} == logs
    with open_buffer() as again:
        assert answers(again) == expected(range(3))


def test_a_reader_does_not_follow_a_control_page_of_another_time(
    folder: Path, open_buffer: OpenBuffer
) -> None:
    """It took an older state for the present one."""
    with open_buffer() as buffer:
        add_all(buffer, range(3))
    shutil.copyfile(folder / "control", folder / "control.older")
    with open_buffer() as buffer:
        add_all(buffer, range(3, 6))
        buffer.save_snapshot()
    page = bytearray((folder / "control.older").read_bytes())
    page[48:56] = bytes(8)  # of a file with another inode
    (folder / "control.older").write_bytes(page)
    with open_buffer(mode="r") as reader:
        assert len(reader) == 6
        older(folder / "control")
        with pytest.raises(CorruptionError, match="not the control page"):
            answers(reader)


def test_a_reader_stays_while_writers_come_and_go(open_buffer: OpenBuffer) -> None:
    with open_buffer() as writer:
        add_all(writer, range(3))
    reader = open_buffer(mode="r")
    for round_ in range(1, 5):
        with open_buffer() as writer:
            if round_ == 2:
                writer.save_snapshot()
            writer.add_many(columns(range(3 * round_, 3 * round_ + 3)))
            assert finds(reader, 3 * round_ + 2)
            assert finds(reader, 0)
        assert answers(reader) == expected(range(3 * round_ + 3))


# ---------------------------------------------------------------- threads


def test_threads_write_and_search(open_buffer: OpenBuffer) -> None:
    buffer = open_buffer(max_size=200)

    def write(start: int) -> list[int]:
        ids = []
        for serial in range(start, start + 25):
            ids.append(buffer.add(experience(serial)))
            assert finds(buffer, serial)
            assert ids[-1] in buffer
            buffer.sample(3)
        return ids

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        made = list(pool.map(write, range(0, 100, 25), timeout=TIMEOUT_S))
    assert sorted(itertools.chain(*made)) == buffer.ids().tolist()
    assert sorted(answers(buffer)) == sorted(expected(range(100)))
    assert all(ids == sorted(ids) for ids in made)


def test_readers_are_not_stopped_by_snapshots_and_builds(open_buffer: OpenBuffer) -> None:
    buffer = open_buffer(max_size=300)
    buffer.add_many(columns(range(200)))
    stop = threading.Event()
    errors: list[BaseException] = []

    def read() -> None:
        try:
            while not stop.is_set():
                assert len(find(buffer, 150, k=5)) == 5
                assert len(buffer.sample(4).v_embed) == 4
        except BaseException as exc:
            errors.append(exc)

    threads = [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for start in range(200, 600, 40):
            buffer.add_many(columns(range(start, start + 40)))
            buffer.save_snapshot()
            assert buffer.rebuild_index()
    finally:
        stop.set()
        for thread in threads:
            thread.join(TIMEOUT_S)
    assert not errors, errors[0]
    assert answers(buffer) == expected(range(300, 600))


# ---------------------------------------------------------------- processes


def test_processes_see_each_other_at_once(open_buffer: OpenBuffer, folder: Path) -> None:
    buffer = open_buffer()
    add_all(buffer, range(2))
    with Worker(folder) as other:
        assert other("len(buffer)") == 2
        assert other("buffer.recovery.first") is False
        for serial in range(2, 22, 2):
            buffer.add(experience(serial))
            assert other(f"finds(buffer, {serial})")
            other(f"buffer.add(experience({serial + 1}))")
            assert finds(buffer, serial + 1)
        assert other("answers(buffer)") == answers(buffer) == expected(range(22))
        ids = buffer.ids().tolist()
        other(f"buffer.remove([{ids[3]}])")
        assert ids[3] not in buffer
        buffer.update_priorities(ids[4:5], [7.0])
        assert other(f"buffer.get({ids[4]}).priority") == 7.0
        other(f"buffer.update_rewards([{ids[5]}], [{{'a': 1.5}}])")
        assert buffer.get(ids[5]).rewards == {"a": 1.5}
        receipt = str(find(buffer, 6, k=3).receipt)
        assert other(f"buffer.record_outcome({receipt!r}, success=True)") == 3
        assert buffer.record_outcome(receipt, success=True) == 0
        assert find(buffer, 6)[0].retrieval_count == 1
        other("buffer.clear()")
        assert len(buffer) == 0
    assert buffer.add(experience(50)) > ids[-1]


@pytest.mark.parametrize("durability", ["sync", "group", "os"])
def test_several_writers_share_one_order(
    open_buffer: OpenBuffer, folder: Path, durability: str
) -> None:
    buffer = open_buffer(durability=durability)
    with (
        Worker(folder, {"durability": durability}) as one,
        Worker(folder, {"durability": durability}) as two,
    ):
        one.start("add_all(buffer, range(1000, 1040))")
        two.start(
            "[buffer.add_many(columns(range(i, i + 4))).tolist() for i in range(2000, 2040, 4)]"
        )
        mine = add_all(buffer, range(30))
        theirs: tuple[list[int], list[int]] = one.result(), [*itertools.chain(*two.result())]
        for ids in (mine, *theirs):
            assert ids == sorted(ids)
        assert sorted([*mine, *theirs[0], *theirs[1]]) == buffer.ids().tolist()
        assert one("answers(buffer)") == two("answers(buffer)") == answers(buffer)
        assert one("buffer.lsn") == two("buffer.lsn") == buffer.lsn
        assert one("contents(buffer) == contents(buffer)")
    buffer.close()
    with open_buffer() as again:
        assert len(again) == 110
        assert again.recovery.clean


def replica(buffer: ExperienceBuffer) -> tuple[Any, ...]:
    """All that a replica holds, and what it finds."""
    assert len(buffer)  # applies what there is
    tree, columns = buffer._session.replica.state.dump()
    found = [find(buffer, serial, k=5) for serial in range(0, 400, 37)]
    hits = [(hits.ids.tolist(), np.round(hits.similarities, 4).tolist()) for hits in found]
    return tree, {name: column.tobytes() for name, column in columns.items()}, hits


def test_what_readers_followed_is_what_a_fresh_opening_finds(
    open_buffer: OpenBuffer, folder: Path
) -> None:
    """Adds of all sizes among updates, over many logs and recoveries, from before and within."""
    open_buffer().close()
    readers = [open_buffer(mode="r")]
    mixed = (
        "[buffer.add(experience(i)) if i % 5 else "
        "buffer.add_many(columns(range(1000 + i, 1001 + i + i % 40))).tolist() "
        "and buffer.update_priorities(buffer.ids()[-1:], [i]) for i in range({0}, {0} + 60)]"
    )
    started = 0
    for round_ in range(2):
        workers = [Worker(folder, {"durability": "os"}) for _ in range(2)]
        readers.append(open_buffer(mode="r"))
        for worker in workers:
            started += 100
            worker.start(mixed.format(started))
        for reader in readers[: round_ + 1]:  # the last one reads it all at once
            for _ in range(10):
                find(reader, started)
        for worker in workers:
            worker.result()
        latest = replica(readers[-1])
        for reader in readers[:-1]:
            assert replica(reader) == latest
        for worker in workers:  # nobody else writes: the next one recovers
            worker.kill()
        with open_buffer() as fresh:
            assert not fresh.recovery.clean
            assert len(fresh) > 100
            wanted = replica(fresh)
            for reader in [*readers, open_buffer(mode="r")]:
                assert replica(reader) == wanted
    assert max(layout.numbers(folder, layout.INDEX)) > 6


def test_a_writer_killed_and_others_go_on(open_buffer: OpenBuffer, folder: Path) -> None:
    buffer = open_buffer()
    for round_ in range(3):
        other = Worker(folder)
        other(f"add_all(buffer, range({10 * round_}, {10 * round_ + 5}))")
        other.kill()
        assert answers(buffer)[-5:] == expected(range(10 * round_, 10 * round_ + 5))
        add_all(buffer, range(10 * round_ + 5, 10 * round_ + 10))
    assert answers(buffer) == expected(range(30))
    buffer.close()
    with open_buffer() as again:
        assert answers(again) == expected(range(30))


def test_scripts_without_a_main_guard(open_buffer: OpenBuffer, folder: Path) -> None:
    """A plain script that ends without closing, with an index builder of its own."""
    script = f"""
import numpy as np
from expbuf_core import Experience, ExperienceBuffer
index = {{"backend": "exact", "rebuild_every": 20, "idle_s": 0.2}}
buffer = ExperienceBuffer.open({str(folder)!r}, index=index)
for i in range(50):
    buffer.add(Experience(v_embed=np.eye(60, dtype=np.float32)[i], answer=i))
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        timeout=TIMEOUT_S,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    with open_buffer() as buffer:
        assert [item.answer for item in buffer] == list(range(50))
        hit = buffer.search_index(v_embed=np.eye(60)[7], k=1)[0]
        assert hit.experience.answer == 7


def test_lock_timeout_names_the_holder(open_buffer: OpenBuffer, folder: Path) -> None:
    buffer = open_buffer(lock_timeout_s=0.2)
    buffer.add(experience(0))
    with Worker(folder) as other:
        other(
            "globals().update(lock=__import__('expbuf_core.locks', fromlist=['x'])"
            ".ProcessLock(folder / 'locks' / 'append', 5)) or lock.acquire()"
        )
        with pytest.raises(LockTimeout, match=f"process {other.process.pid} has held") as caught:
            buffer.add(experience(1))
        assert caught.value.pid == other.process.pid
        assert isinstance(caught.value, TimeoutError)
        assert len(buffer) == 1
        assert finds(buffer, 0)  # no reader waits
        other("lock.release()")
        buffer.add(experience(1))
        assert answers(buffer) == expected(range(2))


def test_a_killed_holder_keeps_no_lock(open_buffer: OpenBuffer, folder: Path) -> None:
    buffer = open_buffer()
    other = Worker(folder)
    for name in ("append", "flush", "maintenance", "opening", "builder"):
        other(
            f"globals().update({name}=__import__('expbuf_core.locks', fromlist=['x'])"
            f".ProcessLock(folder / 'locks' / '{name}', 5)) or {name}.acquire()"
        )
    other.kill()
    buffer.add(experience(0))
    buffer.save_snapshot()
    assert buffer.rebuild_index()
    with open_buffer() as second:
        assert finds(second, 0)


# ---------------------------------------------------------------- fork, spawn, pickle


def test_a_forked_child_opens_it_again(open_buffer: OpenBuffer) -> None:
    buffer = open_buffer(seed=1)
    add_all(buffer, range(5))
    parents = buffer.sample(8).ids.tolist()

    def child() -> None:
        assert finds(buffer, 4)
        ids = add_all(buffer, range(5, 9))
        assert ids == list(range(5, 9))
        assert answers(buffer) == expected(range(9))
        buffer.submit(experience(9)).result(timeout=TIMEOUT_S)
        buffer.close()
        with pytest.raises(BufferClosed):
            len(buffer)

    assert run_forked(child) == 0
    assert answers(buffer) == expected(range(10))
    assert finds(buffer, 8)
    assert buffer.add(experience(10)) == 10
    assert len(parents) == 8


def test_a_forked_child_of_a_reader(open_buffer: OpenBuffer) -> None:
    writer = open_buffer()
    add_all(writer, range(3))
    reader = open_buffer(mode="r")
    assert answers(reader) == expected(range(3))

    def child() -> None:
        assert answers(reader) == expected(range(3))

    assert run_forked(child) == 0
    assert answers(reader) == expected(range(3))


def test_a_forked_child_draws_another_stream(open_buffer: OpenBuffer, tmp_path: Path) -> None:
    buffer = open_buffer(seed=1)
    buffer.add_many(columns(range(100)))
    state = buffer.rng_state()

    def child() -> None:
        (tmp_path / "drawn").write_text(str(buffer.sample(20).ids.tolist()))

    assert run_forked(child) == 0
    assert buffer.rng_state() == state
    assert str(buffer.sample(20).ids.tolist()) != (tmp_path / "drawn").read_text()


def test_a_forked_child_that_never_touches_it(open_buffer: OpenBuffer) -> None:
    buffer = open_buffer()
    buffer.add(experience(0))
    assert run_forked(lambda: None) == 0
    assert run_forked(buffer.close) == 0
    buffer.add(experience(1))
    assert answers(buffer) == expected(range(2))
    buffer.close()
    with open_buffer() as again:
        assert again.recovery.clean


def test_a_closed_buffer_stays_closed_in_a_child(open_buffer: OpenBuffer) -> None:
    buffer = open_buffer()
    buffer.add(experience(0))
    buffer.close()

    def child() -> None:
        with pytest.raises(BufferClosed):
            buffer.add(experience(1))

    assert run_forked(child) == 0
    with open_buffer() as again:
        assert len(again) == 1


def test_a_forked_child_tries_again_what_it_could_not_open(
    open_buffer: OpenBuffer, folder: Path
) -> None:
    buffer = open_buffer(lock_timeout_s=0.05)
    buffer.add(experience(0))
    opening = ProcessLock(folder / "locks" / "opening", 5)

    def use(child: Child) -> None:
        for call in (buffer.ids, buffer.stats, lambda: len(buffer)):
            with pytest.raises(LockTimeout):
                call()
        child.say("tried")
        assert child.hear() == "free"
        assert buffer.add(experience(1)) == 1
        buffer.close()
        with pytest.raises(BufferClosed):
            buffer.ids()

    with opening:
        child = Child(use)
        assert child.hear() == "tried"
    child.say("free")
    child.join()
    opening.close()
    assert answers(buffer) == expected(range(2))


def test_a_forked_child_of_a_killed_holder_keeps_no_lock(
    open_buffer: OpenBuffer, folder: Path
) -> None:
    buffer = open_buffer()
    other = Worker(folder)
    pid = other(
        "globals().update(lock=__import__('expbuf_core.locks', fromlist=['x'])"
        ".ProcessLock(folder / 'locks' / 'append', 5)) or lock.acquire() or os.fork()"
        " or __import__('time').sleep(60)"
    )
    other.kill()
    try:
        buffer.add(experience(0))
        assert finds(buffer, 0)
    finally:
        os.kill(pid, 9)


def test_fork_while_other_threads_write(open_buffer: OpenBuffer) -> None:
    buffer = open_buffer(max_size=1_000_000)  # the thread evicts nothing
    stop = threading.Event()

    def write() -> None:
        serial = 1000
        while not stop.is_set():
            buffer.add(experience(serial))
            serial += 1

    thread = threading.Thread(target=write)
    thread.start()
    try:
        for serial in range(5):
            assert run_forked(lambda serial=serial: buffer.add(experience(serial))) == 0
            assert finds(buffer, serial)
    finally:
        stop.set()
        thread.join(TIMEOUT_S)
    assert answers(buffer).count("answer 3") == 1


def test_a_buffer_in_memory_is_its_makers_alone(open_buffer: Any) -> None:
    buffer = open_buffer.memory()
    buffer.add(experience(0))

    def child() -> None:
        with pytest.raises(BufferClosed, match="belongs to the process that made it"):
            buffer.add(experience(1))

    assert run_forked(child) == 0
    assert len(buffer) == 1
    with pytest.raises(TypeError, match="cannot be pickled"):
        pickle.dumps(buffer)


def test_a_pickled_buffer_in_a_spawned_process(open_buffer: OpenBuffer, tmp_path: Path) -> None:
    buffer = open_buffer(mode="x", max_size=77)
    add_all(buffer, range(3))
    (tmp_path / "pickled").write_bytes(pickle.dumps(buffer))
    script = f"""
import pickle, sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
from module_helpers import *
buffer = pickle.loads(Path({str(tmp_path / "pickled")!r}).read_bytes())
assert buffer.max_size == 77
assert finds(buffer, 2)
add_all(buffer, range(3, 6))
buffer.close()
"""
    subprocess.run([sys.executable, "-W", "error", "-c", script], timeout=TIMEOUT_S, check=True)
    assert answers(buffer) == expected(range(6))


def test_what_cannot_be_pickled_says_so(open_buffer: OpenBuffer) -> None:
    with pytest.raises(TypeError, match="cannot be pickled"):
        pickle.dumps(open_buffer(lock=threading.Lock()))


def test_a_pickle_of_a_buffer_that_was_replaced(open_buffer: OpenBuffer, folder: Path) -> None:
    with open_buffer() as buffer:
        buffer.add(experience(0))
        data = pickle.dumps(buffer)
    shutil.rmtree(folder)
    with pytest.raises(BufferReplaced):
        pickle.loads(data)  # noqa: S301  (made above)
    with open_buffer():
        pass
    with pytest.raises(BufferReplaced, match="no longer holds"):
        pickle.loads(data)  # noqa: S301  (made above)


def test_a_lock_of_the_callers_is_held_around_appends(open_buffer: OpenBuffer) -> None:
    held: list[str] = []

    class Lock:
        def __enter__(self) -> None:
            held.append("in")

        def __exit__(self, *exc: object) -> None:
            held.append("out")

    buffer = open_buffer(lock=Lock())
    held.clear()
    buffer.add(experience(0))
    buffer.add(experience(1))
    assert held.count("in") == held.count("out") >= 2
    assert answers(buffer) == expected(range(2))


# ---------------------------------------------------------------- the folder


def test_a_folder_removed_while_open(open_buffer: OpenBuffer, folder: Path) -> None:
    buffer = open_buffer()
    buffer.add(experience(0))
    result = find(buffer, 0)
    shutil.rmtree(folder)
    with pytest.raises(BufferReplaced, match="open the buffer again"):
        buffer.add(experience(1))
    assert result[0].experience.answer == "answer 0"
    assert len(buffer) == 1
    buffer._session.closed = True  # nothing is left to close


def test_a_folder_replaced_while_open(open_buffer: OpenBuffer, folder: Path) -> None:
    buffer = open_buffer()
    add_all(buffer, range(3))
    shutil.copytree(folder, folder.with_name("copy"))
    folder.rename(folder.with_name("old"))
    folder.with_name("copy").rename(folder)
    with pytest.raises(BufferReplaced, match="replaced"):
        buffer.add(experience(3))
    buffer._session.closed = True
    with open_buffer() as again:
        assert answers(again) == expected(range(3))


def test_a_copied_folder_is_a_buffer(open_buffer: OpenBuffer, folder: Path) -> None:
    """Also when it was copied while it was open, and by its copier before the last add."""
    buffer = open_buffer()
    add_all(buffer, range(5))
    shutil.copytree(folder, folder.with_name("copy"))
    buffer.add(experience(5))
    with open_buffer(folder.with_name("copy")) as copy:
        assert answers(copy) == expected(range(5))
        copy.add(experience(99))
        assert finds(copy, 99)
    assert answers(buffer) == expected(range(6))


def test_a_moved_folder_is_a_buffer(open_buffer: OpenBuffer, folder: Path) -> None:
    with open_buffer() as buffer:
        add_all(buffer, range(5))
        buffer.rebuild_index()
        buffer.save_snapshot()
    elsewhere = folder.with_name("elsewhere")
    folder.rename(elsewhere)
    with open_buffer(elsewhere) as buffer:
        assert answers(buffer) == expected(range(5))
        assert finds(buffer, 3)


def test_relative_paths_and_changed_directories(
    open_buffer: OpenBuffer, folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(folder.parent)
    buffer = open_buffer(Path(folder.name))
    assert buffer.path == folder
    monkeypatch.chdir(tmp_path)
    add_all(buffer, range(50))
    buffer.save_snapshot()
    assert answers(buffer) == expected(range(50))
    assert os.listdir(tmp_path) == []


def test_opening_together_recovers_once(folder: Path, open_buffer: OpenBuffer) -> None:
    other = Worker(folder)
    other("add_all(buffer, range(5))")
    other.kill()
    barrier = threading.Barrier(4)
    opened: list[ExperienceBuffer] = []

    def open_one() -> None:
        barrier.wait(TIMEOUT_S)
        opened.append(open_buffer())

    threads = [threading.Thread(target=open_one) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT_S)
    assert sorted(buffer.recovery.first for buffer in opened) == [False] * 3 + [True]
    opened[2].add(experience(5))
    for buffer in opened:
        assert answers(buffer) == expected(range(6))


def test_opening_waits_for_the_opening_lock(open_buffer: OpenBuffer, folder: Path) -> None:
    with open_buffer() as buffer:
        buffer.add(experience(0))
    lock = ProcessLock(folder / "locks" / "opening", 5)
    lock.acquire()
    with pytest.raises(LockTimeout, match="opening") as caught:
        open_buffer(lock_timeout_s=0.1)
    assert caught.value.pid == os.getpid()
    lock.release()
    with open_buffer(lock_timeout_s=0.1) as again:
        assert len(again) == 1


def test_evicted_by_another_process(open_buffer: OpenBuffer, folder: Path) -> None:
    buffer = open_buffer(max_size=20)
    ids = add_all(buffer, range(20))
    with Worker(folder, {"max_size": 20}) as other:
        other("add_all(buffer, range(20, 45)) and buffer.save_snapshot()")
        with pytest.raises(UnknownExperienceError):
            buffer.get(ids[0])
        assert buffer.update_priorities(ids, np.ones(20)) == 0
        assert buffer.record_outcome(ids, success=True) == 0
        assert answers(buffer) == expected(range(25, 45))
        assert len(find(buffer, 30, k=50)) == 20


def test_an_index_built_elsewhere_is_taken_over(open_buffer: OpenBuffer, folder: Path) -> None:
    buffer = open_buffer()
    add_all(buffer, range(60))
    with Worker(folder) as other:
        assert other("buffer.rebuild_index()")
    deadline = time.monotonic() + TIMEOUT_S
    while buffer.stats()["index"]["tail_rows"]:  # it is opened aside
        assert time.monotonic() < deadline
        assert finds(buffer, 33)
        time.sleep(0.01)
    buffer.add(experience(60))
    assert all(finds(buffer, i) for i in range(61))
    many = buffer.search_many(v_embed=np.stack([vector(3), vector(4)]), q_embed=np.ones((2, DIM)))
    assert many.ids.shape == (2, 8)


@pytest.mark.parametrize("damage", ["index", "vectors", "manifest", "one is missing", "all gone"])
def test_a_damaged_index_is_built_again_beside_one_that_is_open(
    open_buffer: OpenBuffer, folder: Path, damage: str
) -> None:
    """Whoever comes later finds the damage, and a builder that has the old one open is told."""
    buffer = open_buffer()
    add_all(buffer, range(60))
    buffer.rebuild_index()
    builder = IndexBuilder(folder, {"index": {"builder": "off", "rebuild_every": 1000}})
    assert not builder.due()
    index = folder / "index"
    if damage == "all gone":
        shutil.rmtree(index)
    elif damage == "one is missing":
        (index / "000001.exact").unlink()
    else:
        name = "manifest.json" if damage == "manifest" else f"000001.{damage}"
        path = index / name.replace(".index", ".exact")
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    assert finds(open_buffer(), 33)
    assert builder.due()
    other = open_buffer(index={"backend": "exact", "builder": "thread", "rebuild_every": 1000})
    assert finds(other, 33)
    other._live().upkeep.stop()  # once it has done what was due
    assert not builder.due()
    assert [segment["rows"] for segment in other.stats()["index"]["segments"]] == [60]
    builder.close()
    late = open_buffer()
    assert late.stats()["index"]["tail_rows"] == 0
    for each in (buffer, other, late):
        assert all(finds(each, i) for i in range(60))


def test_a_builder_changes_nothing_but_the_index(
    open_buffer: OpenBuffer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A smaller `max_size` evicts: a builder refuses it, and one for programs is no matter."""
    buffer = open_buffer()
    add_all(buffer, range(20))
    with pytest.raises(ConfigError, match="max_size: not for a builder, which takes only index"):
        IndexBuilder(folder, {"max_size": 1})
    monkeypatch.setenv("EXPBUF__MAX_SIZE", "1")
    monkeypatch.setenv("EXPBUF__EMBEDDING__METRIC", "l2")
    monkeypatch.setenv("EXPBUF__INDEX__REBUILD_EVERY", "7")
    builder = IndexBuilder(folder, {"index": {"builder": "off"}})
    assert builder.due()
    assert builder.buffer.config.index.rebuild_every == 7
    builder.close()
    assert answers(buffer) == expected(range(20))
    assert buffer.max_size == 1000


def test_a_network_folder_is_refused_to_a_second_process(
    open_buffer: OpenBuffer, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = open_buffer()
    add_all(first, range(2))
    monkeypatch.setattr("expbuf_core.folder.file_system", lambda folder: "nfs4")
    with pytest.raises(StorageError, match=r"network file system \(nfs4\)"):
        open_buffer()
    first.add(experience(2))
    first.close()
    with ExperienceBuffer.open(first.path, config=CONFIG) as alone:
        assert answers(alone) == expected(range(3))
