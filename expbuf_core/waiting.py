"""Sleeping until a word of memory that several processes share is changed.

By the kernel's futex, where there is one (Linux); elsewhere by short sleeps. Who asks for a lock
again and again takes the processor from the one who holds it: with eight writers on two cores that
costs half of what they could write.

A wake-up is a hint and may be lost (its sender may be killed): every sleep has an end.
"""

from __future__ import annotations

import ctypes
import mmap
import platform
import sys
import time

_SYSCALLS = {"x86_64": 202, "aarch64": 98, "riscv64": 98, "ppc64le": 221}  # little-endian all
_WAIT, _WAKE = 0, 1


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


def _syscall() -> tuple[ctypes._NamedFuncPointer, int] | None:
    number = _SYSCALLS.get(platform.machine())
    if not sys.platform.startswith("linux") or number is None or sys.maxsize < 1 << 32:
        return None
    try:
        return ctypes.CDLL(None).syscall, number
    except (OSError, AttributeError):
        return None


_FUTEX = _syscall()


class Doorbell:
    """Lets processes sleep on the 64-bit words of a mapped file, and wakes them.

    Args:
        mapped: The file, writable, mapped by each process.
    """

    def __init__(self, mapped: mmap.mmap) -> None:
        # The address holds as long as the mapping; the object must not, or it could not be closed.
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(mapped)) if _FUTEX else 0

    def wait(self, word: int, seen: int, timeout_s: float) -> None:
        """Sleep until `ring`, at most so long; not at all if the word is not `seen` any more."""
        if _FUTEX is None or not self._address:
            time.sleep(min(timeout_s, 2e-4))
            return
        function, number = _FUTEX
        timeout = _Timespec(0, int(min(timeout_s, 0.999) * 1e9))
        function(
            ctypes.c_long(number),
            ctypes.c_void_p(self._address + 8 * word),  # the lower half: little-endian
            ctypes.c_int(_WAIT),
            ctypes.c_uint32(seen & 0xFFFFFFFF),
            ctypes.byref(timeout),
            None,
            ctypes.c_uint32(0),
        )

    def ring(self, word: int, count: int) -> int:
        """Wake up to `count` of those who sleep on the word; how many there were."""
        if _FUTEX is None or not self._address:
            return 0
        function, number = _FUTEX
        return int(
            function(
                ctypes.c_long(number),
                ctypes.c_void_p(self._address + 8 * word),
                ctypes.c_int(_WAKE),
                ctypes.c_int(count),
                None,
                None,
                ctypes.c_uint32(0),
            )
        )

    def close(self) -> None:
        """The mapping is about to go."""
        self._address = 0
