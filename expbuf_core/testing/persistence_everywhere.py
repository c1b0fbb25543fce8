"""P40 to P52: errors, forks and threads; whole buffers on the backend."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from expbuf_core.contracts import (
    LogGone,
    LogInterrupted,
)
from expbuf_core.errors import CorruptionError, StorageError, StorageFull
from expbuf_core.testing.faults import FaultyFileSystem
from expbuf_core.testing.persistence_base import (
    PersistenceBase,
    experience,
    vector,
)
from expbuf_core.testing.persistence_log import (
    Core,
    operation,
)
from expbuf_core.testing.processes import TIMEOUT_S, Child, in_child


class Everywhere(PersistenceBase):
    """P40 to P45."""

    def test_p40_a_full_disk(self, tmp_path: Path) -> None:
        """P40: on a full disk an append raises `StorageFull` or works; with room it goes on."""
        self.needs_durable()
        fs = FaultyFileSystem()
        core = Core(self.place(tmp_path, fs=fs)).create().extend(5).sync()
        refused = 0
        with self.full_disk(fs, core.adapter):
            for _ in range(400):
                lsn = core.next_lsn
                try:
                    core.append(operation(lsn, 3, row_bytes=5000))
                except LogInterrupted:
                    raise AssertionError("nothing was written that must be undone") from None
                except StorageFull:
                    refused += 1
                    if refused > 3:
                        break
                    core.follows(lsn - 2)
                else:
                    core.adapter.sync()
            if not refused:
                self._nothing_to_fail()
            core.follows()
        core.extend(5).sync()
        core.finish().reopen()

    def test_p40_library_errors_are_wrapped(self, tmp_path: Path) -> None:
        """P40: a folder that vanished gives a `StorageError`, not the library's own error."""
        self.needs_durable()
        core = self.core(tmp_path).create().extend(5).finish()
        shutil.rmtree(core.place.folder)
        for name in ("recover", "attach"):
            adapter = core.place.adapter()
            with pytest.raises((StorageError, LogGone)):  # noqa: PT012
                if name == "recover":
                    list(adapter.recover(0, core.last))
                else:
                    adapter.attach()
                    list(adapter.follow(0).read(5))
            core.place.close()

    def test_p42_files_of_another_buffer(self, tmp_path: Path) -> None:
        """P42: files that carry another buffer's UUID are refused."""
        self.needs_durable()
        core = self.core(tmp_path).create().extend(5).finish()
        core.place.forget()
        stranger = core.place.adapter(uuid=bytes(reversed(range(16))))
        with pytest.raises(CorruptionError):
            list(stranger.recover(0, 0))

    def test_p44_a_forked_child(self, tmp_path: Path) -> None:
        """P44: a child drops what it inherited, opens its own; the parent notices nothing."""
        self.needs_multiprocess()
        core = self.core(tmp_path).create().extend(10).sync()
        follower = core.adapter.follow(0)
        pin, rows = core.pin(core.wrote)
        for round_ in range(3):
            first = core.next_lsn
            in_child(self.forked(core, first))
            core.wrote |= {lsn: operation(lsn) for lsn in range(first, first + 3)}
            core.next_lsn = first + 3
            core.extend(2).sync()
            list(follower.read(core.last))
            core.follows()
            assert all(bytes(pin.read(i)) == row for i, row in enumerate(rows)), f"round {round_}"
        core.finish().reopen()

    def forked(self, core: Core, first: int) -> Callable[[Child], None]:
        """What the child does."""

        def work(child: Child) -> None:
            core.adapter.after_fork()
            core.adapter.close()
            mine = Core(core.place, wrote=core.wrote)
            mine.adapter.attach()
            mine.follows()
            mine.next_lsn = first
            mine.extend(3)
            mine.adapter.sync()
            mine.follows(first - 1)
            mine.adapter.close()

        return work

    def test_p44_forks_beside_threads(self, tmp_path: Path) -> None:
        """P44: a fork at any instant, while other threads write, leaves both sides working."""
        self.needs_multiprocess()
        core = self.core(tmp_path).create().extend(3)
        append, stop = threading.Condition(), threading.Event()
        failed: list[BaseException] = []
        limit = 0

        def write_on() -> None:
            try:
                while not stop.is_set():
                    with append:
                        if append.wait_for(lambda: core.last < limit, 0.1):
                            core.append()
                            append.notify()
                    core.adapter.sync()
            except BaseException as exc:
                with append:
                    failed.append(exc)
                    append.notify()

        thread = threading.Thread(target=write_on, daemon=True)
        thread.start()
        try:
            for _ in range(10):
                with append:
                    # It writes as each child is forked, and not without end: each reads it all.
                    last, limit = core.last, core.last + 60
                    append.notify()
                    append.wait_for(lambda: core.last > last or failed, TIMEOUT_S)  # noqa: B023
                    assert core.last > last, f"the thread does not write: {failed}"
                    last = core.last

                def work(child: Child, last: int = last) -> None:
                    core.adapter.after_fork()
                    mine = Core(core.place, wrote={n: operation(n) for n in range(1, last + 1)})
                    mine.adapter.attach()
                    mine.follows()
                    mine.adapter.close()

                in_child(work)
        finally:
            stop.set()
            thread.join(TIMEOUT_S)
        if failed:
            raise failed[0]
        core.follows()

    def test_p45_a_stranger(self, tmp_path: Path) -> None:
        """P8, P45: a process that was started apart attaches, follows and appends."""
        self.needs_multiprocess()
        core = self.core(tmp_path).create().extend(12)
        self.elsewhere("joins", str(tmp_path), core.last)
        core.wrote |= {lsn: operation(lsn) for lsn in range(13, 17)}
        core.follows()

    def joins(self, root: str, last: int) -> None:
        """In another process, see P45: follow what there is, and append to it."""
        place = self.place(Path(root))
        core = Core(place, wrote={lsn: operation(lsn) for lsn in range(1, last + 1)})
        core.adapter.attach()
        core.follows()
        core.extend(4).follows()
        core.adapter.sync()
        place.close()


class WholeBuffers(PersistenceBase):
    """P50 to P52."""

    def test_p50_a_buffer_that_is_killed(self, tmp_path: Path) -> None:
        """P50: a buffer on this backend is killed while it adds; every acknowledged add is back."""
        self.needs_durable()
        for durability in ("sync", "os"):
            folder = tmp_path / durability

            def work(child: Child, folder: Path = folder, durability: str = durability) -> None:
                with self.buffer(folder, durability=durability) as buffer:
                    while True:
                        child.say(buffer.add(experience(len(buffer))))

            known = 0
            for more in (12, 30, 60):
                child = Child(work)
                for _ in range(more):
                    said = child.hear()
                    assert said, child.join()
                rest = child.kill().split()
                acknowledged = known + more + len(rest)
                with self.buffer(folder) as buffer:
                    known = len(buffer)
                    assert acknowledged <= known <= acknowledged + 1, "an add is lost, or too many"
                    for i, found in enumerate(buffer):
                        assert found.answer == f"answer {i}"
                        assert np.array_equal(np.asarray(found.v_embed), vector(i))
                    hits = buffer.search_index(v_embed=vector(7), q_embed=vector(-7), k=1)
                    assert hits[0].experience.answer == "answer 7"

    def test_p51_snapshots_and_eviction(self, tmp_path: Path) -> None:
        """P51: a small buffer that evicts, snapshots and drops keeps exactly the newest."""
        self.needs_durable()
        folder = tmp_path / "small"
        total = 0

        def newest() -> list[str]:
            return [f"answer {i}" for i in range(max(0, total - 50), total)]

        for _ in range(3):
            with self.buffer(folder, max_size=50, durability="os") as buffer:
                assert [item.answer for item in buffer] == newest(), "after opening"
                for _ in range(4):
                    buffer.add_many([experience(total + i) for i in range(30)])
                    total += 30
                    buffer.save_snapshot()
                assert [item.answer for item in buffer] == newest(), "after dropping"

    def test_p52_processes_share_a_buffer(self, tmp_path: Path) -> None:
        """P52: processes add to one buffer at once; each sees what the others acknowledged."""
        self.needs_multiprocess()
        folder = tmp_path / "shared"
        with self.buffer(folder) as buffer:
            buffer.add(experience(0))

            def work(child: Child) -> None:
                with self.buffer(folder) as mine:
                    for i in range(20):
                        id_ = mine.add(experience(i))
                        assert id_ in mine
                        child.say(id_)

            children = [Child(work) for _ in range(2)]
            ids = {0}
            for turn in range(40):
                said = children[turn % 2].hear()
                assert said, children[turn % 2].join()
                ids.add(int(said))
                assert int(said) in buffer, "acknowledged elsewhere and not seen here"
            for child in children:
                child.join()
            assert len(ids) == 41, "an id was issued twice"
            assert len(buffer) == 41
        with self.buffer(folder) as buffer:
            assert len(buffer) == 41
