"""The GPUs of this process: for each one resource object, one lock, and what lies on it.

FAISS's GPU objects may be used by one thread at a time, and that holds for freeing them, too. A
forked child must not touch any: CUDA does not survive a fork, and FAISS would end the process.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from expbuf_faiss import runtime
from expbuf_faiss_gpu import driver
from expbuf_faiss_gpu.probe import probe

_MARGIN = 128 << 20  # of device memory, for what cuBLAS and the allocator take
_PATIENCE_S = 0.01

_FORKED = (
    "CUDA does not survive a fork, and this process is the child of one that uses the GPU; start "
    "it by spawn"
)


class DeviceError(RuntimeError):
    """The GPU cannot do what it was asked for; the message says why.

    Attributes:
        cpu_works: Whether FAISS's CPU indexes can be used.
    """

    def __init__(self, message: str, *, cpu_works: bool = True) -> None:
        super().__init__(message)
        self.cpu_works = cpu_works


class DeviceBusy(Exception):
    """An index is built on the GPU, or copied to it: whoever searches takes the CPU meanwhile."""


class Resident:
    """An index on a GPU. Frees itself, whichever thread drops it last."""

    def __init__(self, device: Device, key: int) -> None:
        self.device = device
        self._key = key

    def search(
        self, queries: NDArray[np.float32], k: int, parameters: Any
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """(m, k) distances and rows as FAISS gives them; no row is left out.

        Raises:
            DeviceError: It failed, or this is a forked child.
            DeviceBusy: Something longer is under way.
        """
        with self.device.searching() as held:
            index = held.get(self._key)
            if index is None:
                raise DeviceError("the index was taken off the GPU after an error")
            distances, rows = _called(index.search, queries, k, params=parameters)
        return distances, rows

    def free(self) -> None:
        """Give its memory back now or, while the device is in use, right after that."""
        self.device.free(self._key)

    def __del__(self) -> None:
        self.free()


class Device:
    """One GPU in one process.

    Args:
        number: As CUDA counts.
        temp_memory: Scratch memory of the resource object, in bytes.
    """

    def __init__(self, number: int, temp_memory: int) -> None:
        self.number = number
        self._temp_memory = temp_memory
        self._lock = threading.RLock()
        self._resources: Any = None
        self._used = False  # CUDA was called in this process
        self._lost = ""
        self._building = 0  # threads in `exclusively`, or waiting for it
        self._counting = threading.Lock()
        self._held: dict[int, Any] = {}
        self._keys = itertools.count()
        self._dead: deque[int] = deque()

    def check(self) -> None:
        """See that this process may use it.

        Raises:
            DeviceError: It may not.
        """
        if self._lost:
            raise DeviceError(self._lost)

    @property
    def name(self) -> str:
        """What the GPU is called."""
        return probe(self.number).name

    # ------------------------------------------------------------ using it

    @contextmanager
    def searching(self) -> Iterator[dict[int, Any]]:
        """Hold the device for one search; yields what lies on it, by key.

        Raises:
            DeviceError: This process may not use it.
            DeviceBusy: It is held by `exclusively`, which may take seconds.
        """
        self.check()
        while self._building or not self._lock.acquire(timeout=_PATIENCE_S):
            if self._building:
                raise DeviceBusy
        try:
            yield self._held
        finally:
            self._release()

    @contextmanager
    def exclusively(self) -> Iterator[Any]:
        """Hold the device for something longer; yields the resource object.

        Raises:
            DeviceError: CUDA cannot be used in this process.
        """
        self.check()
        with self._counting:
            self._building += 1
        try:
            with self._lock:
                self._bury()
                if self._resources is None:
                    self._start()
                yield self._resources
        finally:
            with self._counting:
                self._building -= 1

    def put(self, make: Callable[[Any, Any], Any], wanted: int) -> Resident:
        """Copy an index to the device.

        Args:
            make: Called with the module and the resource object; returns the index.
            wanted: Bytes that it will take.

        Raises:
            DeviceError: There is too little memory, or FAISS cannot have this index on a GPU.
        """
        faiss = runtime.load()
        with self.exclusively() as resources:
            if not self._held:
                wanted += self._temp_memory  # taken with the first index
            free, total = _called(driver.free_memory, self.number)
            if wanted + _MARGIN > free:
                raise DeviceError(
                    f"too little memory on GPU {self.number}: {_mib(wanted + _MARGIN)} are needed, "
                    f"{_mib(free)} of {_mib(total)} are free"
                )
            index = _called(make, faiss, resources)
            key = next(self._keys)
            self._held[key] = index
        return Resident(self, key)

    def free(self, key: int) -> None:
        """Let go of an index; never waits."""
        self._dead.append(key)
        if not self._lost and self._lock.acquire(blocking=False):
            self._release()

    def _start(self) -> None:
        faiss = runtime.load()
        self._used = True
        if self.number >= _called(driver.count):
            raise DeviceError(f"no GPU {self.number} any more")
        if _called(faiss.get_num_gpus) <= self.number:
            raise DeviceError("FAISS finds no GPU that it can use")
        resources = _called(faiss.StandardGpuResources)
        _called(resources.setTempMemory, self._temp_memory)
        self._resources = resources

    def _release(self) -> None:
        # Once more after letting go: what another thread could not free meanwhile.
        while True:
            self._bury()
            self._lock.release()
            if not self._dead or not self._lock.acquire(blocking=False):
                return

    def _bury(self) -> None:
        """Free what was dropped (lock held)."""
        while self._dead:
            self._held.pop(self._dead.popleft(), None)

    # ------------------------------------------------------------ forks

    def inherit(self) -> None:
        """In a forked child: never call CUDA for anything of the parent's."""
        self._lock = threading.RLock()  # the old one may be held by a thread that is not here
        self._counting = threading.Lock()
        self._building = 0
        if self._used:
            self._lost = _FORKED
        for thing in (*self._held.values(), self._resources):
            if thing is not None:
                thing.this.disown()  # its destructor would call CUDA


def _called(function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """Call FAISS or the driver."""
    try:
        return function(*arguments, **named)
    except (RuntimeError, MemoryError) as exc:  # FAISS knows no finer errors
        if isinstance(exc, DeviceError):
            raise
        raise DeviceError((str(exc).strip().splitlines() or [repr(exc)])[-1]) from exc


def _mib(size: int) -> str:
    return f"{size / (1 << 20):,.0f} MiB"


# ---------------------------------------------------------------- of this process

_devices: dict[int, Device] = {}
_opening = threading.Lock()


def device(number: int, temp_memory: int) -> Device:
    """The device of this number, the same for everybody in this process.

    Whether it can be used is tried out in a process of its own first. The scratch memory is what
    the first caller wanted.

    Raises:
        DeviceError: It cannot be used.
    """
    verdict = probe(number)
    if not verdict.usable:
        raise DeviceError(verdict.reason, cpu_works=verdict.imports)
    with _opening:
        found = _devices.get(number)
        if found is None:
            found = _devices[number] = Device(number, temp_memory)
    found.check()
    return found


def _after_fork() -> None:
    global _opening
    _opening = threading.Lock()
    for found in _devices.values():
        found.inherit()


os.register_at_fork(after_in_child=_after_fork)
