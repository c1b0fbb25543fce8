"""What the groups of the contract of storage stand on."""

from __future__ import annotations

import contextlib
import errno
import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from numpy.typing import NDArray

from expbuf_core.buffer import ExperienceBuffer
from expbuf_core.contracts import (
    PersistenceAdapter,
    PersistenceProvider,
    Problem,
)
from expbuf_core.errors import StorageError
from expbuf_core.experience import Experience
from expbuf_core.filesystem import FileSystem
from expbuf_core.testing.faults import FaultyFileSystem
from expbuf_core.testing.persistence_log import Core, Place
from expbuf_core.testing.suite import Suite

LONG = os.environ.get("EXPBUF_LONG", "") not in ("", "0")


class PersistenceBase(Suite):
    """What all groups of the contract stand on; attributes as for `PersistenceSuite`."""

    kind = "persistence"
    provider: ClassVar[str | PersistenceProvider] = ""
    writes_through_fs: ClassVar[bool] = True
    appears_whole: ClassVar[bool] = False
    many: ClassVar[int] = 4000
    crash_states: ClassVar[int] = 150
    flips: ClassVar[int] = 400
    steady_growth: ClassVar[float] = 1.5

    def stored_files(self, folder: Path) -> list[Path]:
        """Files that hold what the backend stored. Override it to leave out lock files."""
        return sorted(path for path in folder.rglob("*") if path.is_file())

    def durable(self) -> bool:
        """Whether the provider declares the capability "durable"."""
        return "durable" in self.chosen().capabilities

    def needs_durable(self) -> None:
        """Skip where nothing survives the process."""
        self.needs("durable")

    def needs_multiprocess(self) -> None:
        """Skip where only one process can use a buffer."""
        self.needs("multiprocess")

    def place(self, root: Path, name: str = "buffer", fs: FileSystem | None = None) -> Place:
        """A new folder for a buffer."""
        return Place(root, self.provider, self.settings, name=name, fs=fs)

    def core(self, root: Path, name: str = "buffer") -> Core:
        """A stand-in for the core, on a new folder."""
        return Core(self.place(root, name))

    def buffer(self, folder: Path, **settings: Any) -> ExperienceBuffer:
        """A whole buffer on this backend."""
        return ExperienceBuffer.open(
            folder,
            plugins=self.plugins(),
            persistence=self.choice(),
            index={"backend": "exact", "builder": "off"},
            **settings,
        )

    def churn(self, core: Core, count: int) -> None:
        """Append so many operations, with switches and syncs between."""
        for i in range(count):
            core.append()
            if i % 6 == 5:
                core.sync()
                core.adapter.switch(core.next_lsn, core.durable)

    # ------------------------------------------------------------ faults

    def each_failure(self, *, writes: bool = False) -> Iterator[tuple[int, FailingOnce]]:
        """File systems whose first, second, … change fails; ends with one that did not fail.

        Every third is tried as an interruption, after which nothing works any more. Override it
        where the backend's library writes by itself: a `FailingOnce` says when to fail.

        Args:
            writes: What is tried cannot be done without changing a file.
        """
        for number in range(1, 400):
            failing = FailingOnce(number, for_good=number % 3 == 0)
            yield number, failing
            if not failing.struck:
                if number == 1:
                    self._nothing_to_fail(expected=writes)
                return
        raise AssertionError("400 calls and no end")

    @contextlib.contextmanager
    def failing_sync(
        self, fs: FaultyFileSystem, adapter: PersistenceAdapter, *, drop: bool
    ) -> Iterator[None]:
        """Let the next sync of what was appended fail.

        Override it where the backend's library syncs by itself.

        Args:
            fs: The adapter's.
            adapter: In use.
            drop: The bytes that were not synced are lost as well.
        """
        fs.fail_sync(drop=drop)
        yield
        fs.clear()

    @contextlib.contextmanager
    def full_disk(self, fs: FaultyFileSystem, adapter: PersistenceAdapter) -> Iterator[None]:
        """Let the disk have no room for more.

        Override it where the backend's library writes by itself.

        Args:
            fs: The adapter's.
            adapter: In use.
        """
        fs.limit(0)
        yield
        fs.clear()

    def _nothing_to_fail(self, *, expected: bool = True) -> None:
        """No fault has struck: that is right where nothing was written, else say what to do."""
        if not self.writes_through_fs:
            pytest.skip("its library writes to the disk by itself, and no fault was played")
        assert not expected, (
            "nothing was written through `context.fs`: write through it; or, where a library does "
            "the writing, set `writes_through_fs = False` and play its faults by overriding "
            "`each_failure`, `failing_sync` and `full_disk`"
        )


class FailingOnce(FaultyFileSystem):
    """The n-th call that changes something fails, while armed.

    Attributes:
        nth: Which.
        struck: Whether it has failed.
    """

    def __init__(self, nth: int, *, for_good: bool) -> None:
        super().__init__()
        self.nth = nth
        self._for_good = for_good
        self._fault = self.fail(error=errno.EIO, nth=nth, times=None if for_good else 1)

    @property
    def struck(self) -> bool:
        """Whether it has failed."""
        return self._fault.seen >= self.nth

    def arm(self) -> None:
        """Count from here."""
        if self._fault not in self.faults:
            self._fault.seen = 0
            self.faults.append(self._fault)

    def disarm(self) -> None:
        """Let everything work."""
        if self._fault in self.faults:
            self.faults.remove(self._fault)
            if not self._fault.seen >= self.nth:
                self._fault.seen = 0


def damage_found(adapter: PersistenceAdapter, until_lsn: int) -> list[Problem]:
    """The damage that `verify` finds; an error counts as a finding."""
    try:
        return [problem for problem in adapter.verify(until_lsn) if problem.damage]
    except StorageError as exc:
        return [Problem("", -1, str(exc), True)]


def open_descriptors() -> int:
    """How many this process has."""
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


def vector(number: int) -> NDArray[np.float32]:
    """(8,) always the same for the same number."""
    return np.random.default_rng(number + 1000).standard_normal(8).astype(np.float32)


def experience(number: int) -> Experience:
    """One that can be told by its number."""
    return Experience(
        v_embed=vector(number),
        q_embed=vector(-number),
        answer=f"answer {number}",
        confidence=0.5,
    )
