"""Memory from the system: kept where it would be given back, taken before it is needed.

The first touch of a page is dear, most of all on virtual machines, whose host has to find it, too:
2 MiB have been seen to take 9 ms. Both functions are hints, and change nothing but time.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import mmap
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

_KEPT_BYTES = 16 << 20  # glibc goes up to 32 MiB
_STEP = 2 << 20  # taken in one call, for which changes of the address space wait
_POPULATE_WRITE = 23  # since Linux 5.14; older ones refuse it


def _madvise() -> Callable[[int, int, int], int] | None:
    """The C library's, since `mmap` offers its own for its own memory only, and holds the GIL."""
    if not sys.platform.startswith("linux"):
        return None  # the number means something else, if anything
    try:
        function = ctypes.CDLL(None).madvise
    except (OSError, AttributeError):
        return None
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function


_MADVISE = _madvise()


@functools.cache
def keep_freed() -> None:
    """Let the allocator keep what a batch took, for the next one.

    It gets blocks of a megabyte from the system and gives them back, so that every batch of
    experiences or samples would meet fresh pages, and pay for their first touch up to a third of
    what it takes in all. But the C library of Linux keeps blocks as large as the largest that was
    ever freed, and twice as much in all. This one is never touched.
    """
    with contextlib.suppress(MemoryError):
        np.empty(_KEPT_BYTES, np.uint8)


def take(array: NDArray[Any]) -> None:
    """Have the system find the memory of an array, whole pages of it, and change nothing in it.

    Others may read and write it meanwhile.

    Args:
        array: C-contiguous.
    """
    if _MADVISE is None:
        return
    page = mmap.PAGESIZE
    address = array.ctypes.data
    at, end = -(-address // page) * page, (address + array.nbytes) // page * page
    while at < end:
        size = min(_STEP, end - at)
        if _MADVISE(at, size, _POPULATE_WRITE):
            return  # not here, or not now: the first touch will
        at += size
