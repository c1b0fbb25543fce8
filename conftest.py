"""What all tests share, the core's and the plugins': seeds, hypothesis profiles, long tests."""

from __future__ import annotations

import contextlib
import gc
import os
import random
import resource
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

LONG = os.environ.get("EXPBUF_LONG", "") not in ("", "0")

# Files and processes make single examples slow and uneven: no deadline, and no complaint about it.
_common = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True)
settings.register_profile("quick", _common, max_examples=25, derandomize=True)
settings.register_profile("long", _common, max_examples=1000)
settings.load_profile("long" if LONG else "quick")


MEMORY = Path("/dev/shm")
ROOM = 2 << 30  # several times what any test needs


def pytest_configure() -> None:
    """Let `tmp_path` be in memory, where that has room: it is rarely the disk that is tested."""
    with contextlib.suppress(OSError):
        writable = os.access(MEMORY, os.W_OK | os.X_OK)
        if not LONG and writable and shutil.disk_usage(MEMORY).free > ROOM:
            os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))


@pytest.fixture
def disk_path() -> Iterator[Path]:
    """As `tmp_path`, but always where temporary files are, which is a disk as a rule."""
    with tempfile.TemporaryDirectory(prefix="expbuf-test-") as folder:
        yield Path(folder)


@pytest.fixture
def little_memory() -> Iterator[None]:
    """An absurd size that is believed shows as a MemoryError."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.fixture
def without_native_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Buffers that are opened in this test do with Python alone."""
    for module in ("alike", "commit", "intake", "plain_adds"):
        monkeypatch.setattr(f"expbuf_core.{module}.native", None)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if LONG:
        return
    skip = pytest.mark.skip(reason="long: set EXPBUF_LONG=1, or run `make test-long`")
    for item in items:
        if item.get_closest_marker("long"):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Seed the global generators, for whatever draws from them unasked."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002


@pytest.fixture
def rng() -> np.random.Generator:
    """A fresh generator with a fixed seed."""
    return np.random.default_rng(0)


def pytest_collection_finish() -> None:
    """What was imported and collected stays to the end: no collection has to look at it again."""
    gc.collect()
    gc.freeze()
