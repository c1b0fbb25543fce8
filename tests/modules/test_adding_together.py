"""What threads add while one of them waits for the disk becomes one operation.

By Python, that is; what native code makes of it is in tests/test_native_log.py.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from expbuf_core import Experience, ExperienceBuffer, StorageFull
from expbuf_core.errors import InvalidExperience, LockTimeout
from expbuf_core.filesystem import Buffer
from expbuf_core.hookspecs import hookimpl
from expbuf_core.testing.faults import FaultyFileSystem

DIM = 8
pytestmark = pytest.mark.usefixtures("without_native_code")

THREADS = 6
TIMEOUT_S = 30.0
CONFIG: dict[str, Any] = {"max_size": 1000, "index": {"backend": "exact", "builder": "off"}}


class SlowDisk(FaultyFileSystem):
    """A sync lasts until it is let go, once `hold` was called; no write may exceed `largest`."""

    def __init__(self) -> None:
        super().__init__()
        self._may_go = threading.Event()
        self._may_go.set()
        self.waiting = threading.Event()
        self.largest = 1 << 30  # of one write

    def hold(self) -> None:
        self.waiting.clear()
        self._may_go.clear()

    def go(self) -> None:
        self._may_go.set()

    def pwritev(self, fd: int, parts: Sequence[Buffer], offset: int) -> None:
        if sum(map(len, parts)) > self.largest:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        super().pwritev(fd, parts, offset)

    def fdatasync(self, fd: int) -> None:
        self.waiting.set()
        assert self._may_go.wait(TIMEOUT_S)
        super().fdatasync(fd)


class Commits:
    """Every add of this process, as observers are told of it."""

    def __init__(self) -> None:
        self.adds: list[tuple[int, int]] = []

    @hookimpl
    def expbuf_on_committed(self, lsn: int, kind: str, count: int) -> None:
        if kind == "add":
            self.adds.append((lsn, count))


class Scene:
    def __init__(self, folder: Path, **settings: Any) -> None:
        self.disk, self.commits = SlowDisk(), Commits()
        self.buffer = ExperienceBuffer.open(
            folder, config=CONFIG, filesystem=self.disk, plugins=[self.commits], **settings
        )
        self.buffer.add(experience(0))

    def together(self, calls: list[Callable[[], Any]]) -> list[Any]:
        """What each call returned or raised, all of them having met in the queue."""
        results: list[Any] = [None] * len(calls)

        def run(i: int) -> None:
            try:
                results[i] = calls[i]()
            except Exception as exc:
                results[i] = exc

        self.commits.adds.clear()
        self.disk.hold()
        first = threading.Thread(target=self.buffer.add, args=(experience(999),))
        first.start()
        assert self.disk.waiting.wait(TIMEOUT_S)
        threads = [threading.Thread(target=run, args=(i,)) for i in range(len(calls))]
        for thread in threads:
            thread.start()
        queue = self.buffer._live().commit_log._threads._queue
        deadline = time.monotonic() + TIMEOUT_S
        while len(queue) < len(calls):
            assert time.monotonic() < deadline
            time.sleep(1e-3)
        self.disk.go()
        for thread in (first, *threads):
            thread.join(TIMEOUT_S)
            assert not thread.is_alive()
        return results


def experience(serial: int, **given: Any) -> Experience:
    vector = np.random.default_rng(serial).standard_normal(DIM).astype(np.float32)
    return Experience(**{"v_embed": vector, "q_embed": vector, "answer": serial, **given})


def is_stored(buffer: ExperienceBuffer, id_: int, serial: int) -> bool:
    wanted = experience(serial)
    found = buffer.search_index(v_embed=wanted.v_embed, q_embed=wanted.q_embed, k=1)
    return buffer.get(id_).answer == serial and found.ids == [id_]


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    made = Scene(tmp_path / "memory")
    yield made
    made.disk.clear()
    made.buffer.close()


def adds(scene: Scene, serials: range) -> list[Callable[[], int]]:
    return [lambda serial=serial: scene.buffer.add(experience(serial)) for serial in serials]  # type: ignore[misc]


def test_one_operation_with_all_of_them(scene: Scene, tmp_path: Path) -> None:
    before = scene.buffer.lsn
    ids = scene.together(adds(scene, range(1, THREADS + 1)))
    assert sorted(ids) == [2 + i for i in range(THREADS)]
    for serial, id_ in enumerate(ids, 1):
        assert is_stored(scene.buffer, id_, serial)
    assert scene.buffer.lsn == before + 2
    assert sorted(scene.commits.adds) == [(before + 1, 1)] + [(before + 2, 1)] * THREADS
    scene.buffer.close()
    with ExperienceBuffer.open(tmp_path / "memory") as again:
        for serial, id_ in enumerate(ids, 1):
            assert is_stored(again, id_, serial)


def test_everything_that_an_experience_holds(scene: Scene) -> None:
    given: list[dict[str, Any]] = [
        {"confidence": 0.25, "rewards": {"exact": 1.0, "format": 0.5}},
        {"tags": ("a", "b"), "key": "k", "timestamp": 1_700_000_000.0},
        {"image": b"png", "trajectory": {"states": np.arange(3)}},
        {"metadata": {"nested": [1, None]}, "probabilities": np.array([0.2, 0.8], np.float32)},
    ]
    ids = scene.together(
        [
            lambda i=i, each=each: scene.buffer.add(experience(i, **each), priority=0.5 + i)
            for i, each in enumerate(given, 1)
        ]
    )
    for i, (id_, each) in enumerate(zip(ids, given, strict=True), 1):
        alone = scene.buffer.get(scene.buffer.add(experience(i, **each), priority=0.5 + i))
        stored = scene.buffer.get(id_)
        assert stored.priority == 0.5 + i
        for name in ("answer", "confidence", "total_reward", "tags", "key", "metadata", "image"):
            assert getattr(stored, name) == getattr(alone, name), name
        assert np.array_equal(stored.v_embed, alone.v_embed)
        assert repr(stored.trajectory) == repr(alone.trajectory)
        assert "timestamp" not in each or stored.timestamp == each["timestamp"]


def test_with_other_operations_between(scene: Scene) -> None:
    priorities = [lambda: scene.buffer.update_priorities([0], [7.0])] * 2
    scene.buffer.add(experience(50))
    removed = [lambda: scene.buffer.remove([1])]
    results = scene.together([*adds(scene, range(1, 4)), *priorities, *removed])
    assert results[3:] == [1, 1, 1]
    assert 1 not in scene.buffer
    assert scene.buffer.get(0).priority == 7.0
    for serial, id_ in enumerate(results[:3], 1):
        assert is_stored(scene.buffer, id_, serial)


def test_one_that_cannot_be_stored_is_alone_with_its_error(tmp_path: Path) -> None:
    """Its parts are finite, and what they are fused to is not: it never comes to the others."""
    weights = {"normalize_parts": False, "visual_weight": 1.0, "question_weight": 1.0}
    fusion = {"backend": "weighted_sum", "weighted_sum": weights}
    scene = Scene(tmp_path / "memory", embedding={"metric": "l2"}, fusion=fusion)
    with scene.buffer as buffer:
        large = np.full(DIM, 3e38, np.float32)
        bad = experience(77, v_embed=large, q_embed=large)
        with pytest.raises(InvalidExperience, match="fused"):
            buffer.add(bad)
        ids = scene.together(adds(scene, range(1, 4)))
        for serial, id_ in enumerate(ids, 1):
            assert is_stored(buffer, id_, serial)
        assert len(buffer) == 5


def test_what_is_too_large_together_is_written_apart(tmp_path: Path) -> None:
    scene = Scene(tmp_path / "memory", max_experience_bytes=1 << 16, max_commit_bytes=1 << 17)
    with scene.buffer as buffer:
        before = buffer.lsn
        large = "x" * 50_000
        calls = [
            lambda i=i: buffer.add(experience(i, question=large))  # type: ignore[misc]
            for i in range(1, 5)
        ]
        ids = scene.together(calls)
        for serial, id_ in enumerate(ids, 1):
            assert is_stored(buffer, id_, serial)
        assert buffer.lsn == before + 5


def test_a_full_disk_refuses_only_what_does_not_fit(scene: Scene) -> None:
    """Together they do not fit. Apart, the small ones do."""
    large = "x" * 200_000
    scene.disk.largest = 100_000
    *ids, error = scene.together(
        [*adds(scene, range(1, 4)), lambda: scene.buffer.add(experience(9, question=large))]
    )
    assert isinstance(error, StorageFull)
    for serial, id_ in enumerate(ids, 1):
        assert is_stored(scene.buffer, id_, serial)
    assert len(scene.buffer) == 5


def failing(scene: Scene, method: str, errors: list[Exception | None]) -> list[int]:
    """Let calls of the adapter fail one after the other, the last kind of them for ever; counts."""
    adapter, calls = scene.buffer._live().adapter, [0]
    real = getattr(adapter, method)

    def call(*args: Any) -> Any:
        error = errors[min(calls[0], len(errors) - 1)]
        calls[0] += 1
        if error is not None:
            raise error
        return real(*args)

    setattr(adapter, method, call)
    return calls


@pytest.mark.parametrize(
    ("method", "errors", "stored"),
    [
        ("append", [None, LockTimeout("simulated")], 0),
        ("append", [None, StorageFull("simulated"), None, LockTimeout("simulated")], 1),
        ("sync", [None, LockTimeout("simulated")], 0),
    ],
    ids=["append", "apart", "sync"],
)
def test_a_lock_that_is_not_free_is_waited_for_once(
    scene: Scene, method: str, errors: list[Exception | None], stored: int
) -> None:
    """Not once for each of them."""
    calls = failing(scene, method, errors)
    others: list[Callable[[], Any]] = [
        lambda: scene.buffer.update_priorities([0], [7.0]),
        lambda: scene.buffer.remove([0]),
    ]
    results = scene.together([*adds(scene, range(1, 4)), *others])
    assert [isinstance(result, LockTimeout) for result in results].count(False) == stored
    assert calls == [len(errors)]
    delattr(scene.buffer._live().adapter, method)
    assert is_stored(scene.buffer, scene.buffer.add(experience(50)), 50)
