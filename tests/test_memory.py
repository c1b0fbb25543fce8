"""Memory that is taken ahead: there is no page fault left, and nothing changes."""

from __future__ import annotations

import ctypes
import mmap
import resource
import sys
import threading

import numpy as np
import pytest

from expbuf_core import memory

PAGES = 2048


def faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def untouched() -> np.ndarray:
    """Small pages, whatever the machine does with large ones."""
    mapped = mmap.mmap(-1, PAGES * mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        mapped.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(mapped, np.uint8)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can be asked")
def test_no_fault_is_left() -> None:
    if not can_populate():
        pytest.skip("this kernel cannot be asked (Linux 5.14 and later can)")
    array = untouched()
    memory.take(array)
    before = faults()
    array[:: mmap.PAGESIZE] = 1
    assert faults() - before < PAGES // 8

    array = untouched()
    before = faults()
    array[:: mmap.PAGESIZE] = 1
    assert faults() - before >= PAGES // 2  # as it would be otherwise


def can_populate() -> bool:
    array = untouched()
    madvise = ctypes.CDLL(None).madvise
    return bool(madvise(ctypes.c_void_p(array.ctypes.data), ctypes.c_size_t(4096), 23) == 0)


def test_nothing_changes() -> None:
    array = np.arange(1_000_003, dtype=np.float64)
    memory.take(array)
    memory.take(array[5:7])  # no whole page
    memory.take(array[:0])
    np.testing.assert_array_equal(array, np.arange(1_000_003))


def test_others_write_meanwhile() -> None:
    array = untouched()
    writer = threading.Thread(target=array.fill, args=(7,))
    writer.start()
    memory.take(array)
    writer.join()
    assert (array == 7).all()


def test_where_it_cannot_be_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_MADVISE", None)
    memory.take(np.ones(100_000))
    monkeypatch.setattr(memory, "_MADVISE", lambda *_: -1)
    memory.take(np.ones(100_000))
