"""What is asked of the CUDA driver itself, through ctypes: it returns errors and never aborts.

FAISS calls the CUDA runtime, and ends the process where that answers with an error that it does
not expect, in a forked child for instance. So what can be known beforehand is asked here.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_LIBRARY = "libcuda.so.1"
_NO_DEVICE = 100
_retained: dict[int, ctypes.c_void_p] = {}  # primary contexts, kept as long as the process lives


class DriverError(RuntimeError):
    """CUDA cannot be used; the message says why."""


def library() -> Any:
    """Load the driver, without initialising anything.

    Raises:
        DriverError: It is not installed.
    """
    try:
        return ctypes.CDLL(_LIBRARY)
    except OSError as exc:
        raise DriverError(f"no NVIDIA driver ({exc})") from exc


def count() -> int:
    """Initialise CUDA in this process and count its devices, at least 1.

    Raises:
        DriverError: There is none, or this process cannot use it.
    """
    cuda = library()
    _check(cuda, cuda.cuInit(0))
    number = ctypes.c_int()
    _check(cuda, cuda.cuDeviceGetCount(ctypes.byref(number)))
    if number.value < 1:
        _check(cuda, _NO_DEVICE)
    return number.value


def free_memory(device: int) -> tuple[int, int]:
    """Bytes of a device that are free, over all processes, and that it has.

    Raises:
        DriverError: They cannot be told.
    """
    cuda = library()
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    with _current(cuda, device):
        _check(cuda, cuda.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total)))
    return free.value, total.value


def take(device: int, size: int) -> int:
    """Take memory of a device, for trying out what happens without; where it lies.

    Raises:
        DriverError: There is not so much.
    """
    cuda = library()
    at = ctypes.c_uint64()
    with _current(cuda, device):
        _check(cuda, cuda.cuMemAlloc_v2(ctypes.byref(at), ctypes.c_size_t(size)))
    return at.value


def give_back(device: int, at: int) -> None:
    """Give back what `take` took."""
    cuda = library()
    with _current(cuda, device):
        _check(cuda, cuda.cuMemFree_v2(ctypes.c_uint64(at)))


def name(device: int) -> str:
    """What a device is called.

    Raises:
        DriverError: CUDA cannot be used, or has no such device.
    """
    cuda = library()
    handle, text = ctypes.c_int(), ctypes.create_string_buffer(256)
    _check(cuda, cuda.cuInit(0))
    _check(cuda, cuda.cuDeviceGet(ctypes.byref(handle), device))
    _check(cuda, cuda.cuDeviceGetName(text, len(text), handle))
    return text.value.decode(errors="replace")


@contextmanager
def _current(cuda: Any, device: int) -> Iterator[None]:
    """Make the device's context that of this thread: the one that FAISS uses, too.

    So what it takes by being there is taken before anybody measures.
    """
    if device not in _retained:
        handle, context = ctypes.c_int(), ctypes.c_void_p()
        _check(cuda, cuda.cuInit(0))
        _check(cuda, cuda.cuDeviceGet(ctypes.byref(handle), device))
        _check(cuda, cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), handle))
        _retained[device] = context
    popped = ctypes.c_void_p()
    _check(cuda, cuda.cuCtxPushCurrent_v2(_retained[device]))
    try:
        yield
    finally:
        cuda.cuCtxPopCurrent_v2(ctypes.byref(popped))


def _check(cuda: Any, code: int) -> None:
    if code == 0:
        return
    text = ctypes.c_char_p()
    cuda.cuGetErrorString(code, ctypes.byref(text))
    what = (text.value or b"unknown error").decode(errors="replace")
    raise DriverError(f"CUDA says: {what} (error {code})")
