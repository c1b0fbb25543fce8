"""The log as native code writes and reads it, against Python; adds of many threads together."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from expbuf_core import Experience, ExperienceBuffer, codec, frames
from expbuf_core.contracts import Operation, Stamped, one_by_one
from expbuf_core.crc import crc32
from expbuf_core.errors import StorageError
from expbuf_core.native import native, why_not
from expbuf_core.testing.faults import FaultyFileSystem
from expbuf_file import layout
from expbuf_file.logfile import BadFrame, LogFile

pytestmark = pytest.mark.skipif(native is None, reason=f"no native code: {why_not}")

CONFIG: dict[str, Any] = {"max_size": 10_000, "index": {"backend": "exact", "builder": "off"}}


# ---------------------------------------------------------------- the log


def filled(path: Path, rng: np.random.Generator, n: int = 150, **settings: Any) -> list[Experience]:
    """Experiences in a buffer, added by several threads, so that some share an operation."""
    vectors = rng.standard_normal((n, 2, 8)).astype(np.float32)
    given = [
        Experience(
            v_embed=v,
            q_embed=q,
            question=f"question {i} é" * (1 + i % 3 * (i > 60)),
            answer={"i": i},
            tags=("t",) if i % 50 == 7 else (),
            key=f"k{i}" if i % 60 == 3 else None,
            rewards=i / n if i % 5 else None,
        )
        for i, (v, q) in enumerate(vectors)
    ]
    with ExperienceBuffer.open(path, **{**CONFIG, **settings}) as buffer:
        buffer.add(given[0])
        assert buffer._session.commit_log._native is not None
        ids = {buffer.add(experience): i for i, experience in enumerate(given[1:50], 1)}
        threads = [
            threading.Thread(
                target=lambda k=k: ids.update(
                    {buffer.add(given[i]): i for i in range(50 + k, n, 5)}
                )
            )
            for k in range(5)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for id_, i in ids.items():
            found = buffer.get(id_)
            assert (found.question, found.answer) == (given[i].question, given[i].answer)
            assert (found.key, found.tags) == (given[i].key, given[i].tags)
            np.testing.assert_array_equal(found.v_embed, vectors[i, 0])
    return given


def check_frames(folder: Path) -> tuple[int, int]:
    """See that the logs are what Python would write; how many adds, and how many rows of theirs."""
    adds = rows_added = 0
    for number in layout.numbers(folder, layout.DATA):
        logs = [LogFile(folder, log, number, None) for log in (layout.DATA, layout.INDEX)]
        data, index = (log.path.read_bytes() for log in logs)
        index_at = layout.HEADER_BYTES
        for frame in logs[0].frames(layout.HEADER_BYTES, logs[0].size(), rows=True):
            if isinstance(frame, BadFrame) or frame.header.kind == frames.LOG_END:
                break
            header, body, lengths = frame.header, frame.body, frame.lengths
            rows_at = header.rows_offset
            rows = bytearray(data[rows_at : rows_at + header.rows_len])
            crcs = codec.content_crcs(rows, lengths)
            seals = frames.stamp_rows(rows, lengths, crcs, header.first_id)
            operation = Operation(header.kind, body, crc32(body), bytes(rows), lengths, seals)
            parts, index_parts, size, index_size = frames.encode(
                Stamped(header.lsn, header.first_id, operation),
                salt=logs[0].header.salt,
                epoch=number,
                durable_before=header.durable_before,
                data_offset=frame.offset,
            )
            assert data[frame.offset : frame.offset + size] == b"".join(map(bytes, parts))
            found = index[index_at : index_at + index_size]
            assert found == b"".join(map(bytes, index_parts))
            index_at += index_size
            if header.kind == codec.ADD:
                adds += 1
                rows_added += len(lengths)
                assert codec.encode_add(codec.decode_add(body)) == body
    return adds, rows_added


@pytest.mark.parametrize("durability", ["sync", "group", "os"])
def test_frames_are_what_python_would_write(
    durability: str, tmp_path: Path, rng: np.random.Generator
) -> None:
    filled(tmp_path / "b", rng, durability=durability)
    assert check_frames(tmp_path / "b")[1] == 150


def scanned(log: LogFile, *, rows: bool, start: int) -> tuple[list[Any], int]:
    """All that can be read of a log file, and where that ends."""
    found: list[Any] = []
    at, limit = start, log.size()
    while True:
        items, after = log.alike(at, limit, rows=rows)
        if not items:
            return found, at
        for operation in one_by_one(iter(items)):
            found.append(
                (*operation[:3], bytes(operation.body), operation.location, list(operation.lengths))
            )
        at = after


@pytest.mark.parametrize("log", [layout.DATA, layout.INDEX])
def test_scanning_whole_and_damaged(
    log: str, tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "b"
    filled(folder, rng)
    number = max(layout.numbers(folder, log))
    path = layout.path_of(folder, log, number)
    whole = path.read_bytes()
    begin = LogFile(folder, log, number, None).begin()
    assert begin is not None
    runs = []

    class Counting:
        @staticmethod
        def run(*args: Any) -> Any:
            assert native is not None
            found = native.run(*args)
            runs.append(found is not None)
            return found

    for case in range(80):
        raw = bytearray(whole)
        at = int(rng.integers(layout.HEADER_BYTES, len(raw)))
        if case % 4 == 1:
            raw[at] ^= 1 << int(rng.integers(8))
        elif case % 4 == 2:
            raw[at : at + 64] = bytes(len(raw[at : at + 64]))
        elif case % 4 == 3:
            del raw[at:]
        path.write_bytes(raw)
        for rows in (log == layout.DATA, False):
            results = []
            for code in (Counting, None):
                monkeypatch.setattr(frames, "native", code)
                results.append(
                    scanned(LogFile(folder, log, number, None), rows=rows, start=begin.end)
                )
            assert results[0] == results[1]
    assert sum(runs) > 80


# ---------------------------------------------------------------- together

THREADS = 8
TIMEOUT_S = 30.0


class Disk(FaultyFileSystem):
    """A sync lasts until it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.syncs, self.held, self.go_on = 0, threading.Event(), threading.Event()
        self.go_on.set()

    def fdatasync(self, fd: int) -> None:
        self.syncs += 1
        self.held.set()
        assert self.go_on.wait(TIMEOUT_S)
        super().fdatasync(fd)


def plain(serial: int, **fields: Any) -> Experience:
    vector = np.random.default_rng(serial).standard_normal(8).astype(np.float32)
    return Experience(v_embed=vector, q_embed=vector, answer=serial, **fields)


class Crowd:
    """Threads that add while the first of them waits for the disk."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.disk = Disk()
        self.buffer = ExperienceBuffer.open(folder, **CONFIG, filesystem=self.disk, **settings)
        self.buffer.add(plain(0))
        self.results: dict[int, int | BaseException] = {}
        self.threads: list[threading.Thread] = []

    def add(self, experience: Experience) -> None:
        def run() -> None:
            serial: Any = experience.answer
            try:
                self.results[serial] = self.buffer.add(experience)
            except BaseException as exc:
                self.results[serial] = exc

        self.threads.append(threading.Thread(target=run))
        self.threads[-1].start()

    def gather(self, experiences: list[Experience]) -> None:
        """Until all have come: the first is being synced."""
        log = self.buffer._session.commit_log._native
        assert log is not None
        self.disk.held.clear()
        self.disk.go_on.clear()
        self.add(plain(100 + len(self.threads)))
        assert self.disk.held.wait(TIMEOUT_S)
        for experience in experiences:
            self.add(experience)
        deadline = time.monotonic() + TIMEOUT_S
        while log.inside < 1 + len(experiences):
            assert time.monotonic() < deadline
            time.sleep(1e-3)

    def disperse(self) -> None:
        self.disk.go_on.set()
        for thread in self.threads:
            thread.join(TIMEOUT_S)
            assert not thread.is_alive()


def test_one_sync_for_all_that_came_meanwhile(tmp_path: Path) -> None:
    crowd = Crowd(tmp_path / "b")
    before = crowd.disk.syncs
    tagged = [plain(i, tags=("t",), key=f"k{i}") for i in range(1, 3)]
    crowd.gather(tagged + [plain(i) for i in range(3, 1 + THREADS)])
    crowd.disperse()
    assert crowd.disk.syncs - before <= 3  # the first; the others; one that was late, perhaps
    with crowd.buffer as buffer:
        assert sorted(map(str, crowd.results.values())) == sorted(map(str, range(1, THREADS + 2)))
        for serial, id_ in crowd.results.items():
            assert isinstance(id_, int)
            assert buffer.get(id_).answer == serial
            assert buffer.get(id_).key == (f"k{serial}" if serial < 3 else None)
        assert len(buffer) == THREADS + 2
    with ExperienceBuffer.open(tmp_path / "b") as again:
        assert len(again) == THREADS + 2


def test_many_that_come_again_share_operations(tmp_path: Path) -> None:
    """How many, depends on how many there were at the end of the sync before: tried some times."""
    crowd = Crowd(tmp_path / "b")
    operations = rows = round_ = 0
    while operations == rows and round_ < 10:
        crowd.gather([plain(i + 10 * round_) for i in range(1, 1 + THREADS)])
        crowd.disperse()
        round_ += 1
        operations, rows = check_frames(tmp_path / "b")
        assert rows == 1 + round_ * (THREADS + 1)
    assert operations < rows
    assert sorted(map(int, crowd.results.values())) == list(range(1, rows))  # type: ignore[arg-type]
    crowd.buffer.close()


def test_a_sync_that_fails_fails_for_all(tmp_path: Path) -> None:
    crowd = Crowd(tmp_path / "b")
    crowd.gather([plain(i) for i in range(1, THREADS)])
    crowd.disk.fail("fdatasync")
    crowd.disperse()
    crowd.disk.clear()
    with crowd.buffer as buffer:
        failed = {k for k, v in crowd.results.items() if isinstance(v, StorageError)}
        assert failed
        assert all("sync" in str(crowd.results[serial]) for serial in failed)
        later = buffer.add(plain(200))
        assert buffer.stats()["log_retirements"] >= 1
        stored = {e.answer for e in buffer}
        assert {k for k in crowd.results if k not in failed} <= stored
        assert not failed & stored
        assert buffer.get(later).answer == 200
    with ExperienceBuffer.open(tmp_path / "b") as again:
        assert {e.answer for e in again} == stored


class Interrupt(BaseException):
    """As KeyboardInterrupt is: no Exception."""


def test_an_interrupt_is_for_the_thread_that_it_came_to(tmp_path: Path) -> None:
    crowd = Crowd(tmp_path / "b")
    crowd.gather([plain(i) for i in range(1, 1 + THREADS)])
    sync, wanted = crowd.disk.fdatasync, crowd.disk.syncs + 1

    def fdatasync(fd: int) -> None:
        if crowd.disk.syncs == wanted - 1:  # of all that came meanwhile
            crowd.disk.syncs += 1
            raise Interrupt
        sync(fd)

    crowd.disk.fdatasync = fdatasync  # type: ignore[method-assign]
    crowd.disperse()
    with crowd.buffer as buffer:
        raised = [x for x in crowd.results.values() if isinstance(x, BaseException)]
        assert sum(isinstance(x, Interrupt) for x in raised) == 1
        assert len(raised) > 1
        for other in raised:
            assert isinstance(other, Interrupt | StorageError)
            assert isinstance(other, Interrupt) or "was interrupted" in str(other)
        buffer.add(plain(200))


def test_what_does_not_fit_the_disk_takes_no_others_along(tmp_path: Path) -> None:
    crowd = Crowd(tmp_path / "b")
    crowd.gather([plain(i) for i in range(1, 4)])
    crowd.disk.fail("pwritev", times=1)
    crowd.disperse()
    crowd.disk.clear()
    with crowd.buffer as buffer:
        failed = [v for v in crowd.results.values() if isinstance(v, Exception)]
        assert len(failed) <= 1
        assert len(buffer) == 5 - len(failed)


# ---------------------------------------------------------------- without it


def test_without_native_code(tmp_path: Path, rng: np.random.Generator) -> None:
    """The same folder, by a process that has none."""
    given = filled(tmp_path / "b", rng)
    code = (
        "import sys, numpy as np\n"
        "from expbuf_core import Experience, ExperienceBuffer\n"
        "from expbuf_core.native import native, why_not\n"
        "assert native is None and why_not == 'EXPBUF_NATIVE=0'\n"
        "with ExperienceBuffer.open(sys.argv[1], index={'builder': 'off'}) as buffer:\n"
        "    assert len(buffer) == 150, len(buffer)\n"
        "    v = np.ones(8, np.float32)\n"
        "    print(buffer.add(Experience(v_embed=v, q_embed=v, question='pure')))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "b")],
        env={**os.environ, "EXPBUF_NATIVE": "0"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    with ExperienceBuffer.open(tmp_path / "b", **CONFIG) as buffer:
        assert buffer.get(int(done.stdout)).question == "pure"
        assert len(buffer) == len(given) + 1
