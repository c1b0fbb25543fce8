"""A stand-in for FAISS's GPU layer and the CUDA driver, over FAISS's CPU indexes.

It has the traps of the real ones, as read in FAISS's source: selectors are accepted and ignored; at
most 2048 results and lists; memory is limited, and allocations fail with RuntimeError; distances
are rounded otherwise; using it from two threads at once is a violation, freeing included; touching
anything in a forked child aborts; `knn_gpu` and `index_cpu_to_all_gpus` abort.

In this process: `install(monkeypatch.setattr, Board())`. In those that it starts: the folder of
this file in PYTHONPATH, and EXPBUF_GPU_STANDIN, JSON with what `Board` takes.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import json
import os
import sys
import threading
from collections.abc import Callable
from typing import Any

import numpy as np

MOST = 2048
NO_MEMORY = "Error: 'err == cudaSuccess' failed: StandardGpuResources: alloc fail: out of memory"


class Board:
    """The GPU: what it has, what was done to it."""

    def __init__(
        self, memory: int = 1 << 30, devices: int = 1, abort: bool = False, says: str = ""
    ) -> None:
        self.memory = memory
        self.devices = devices
        self.abort = abort  # on first use, as CUDA does with kernels for another GPU
        self.says = says  # an error of the driver
        self.used = 0
        self.pid = os.getpid()
        self.touched = False
        self.violations: list[str] = []
        self.faults: list[str] = []  # messages of errors to come, one a search
        self.searches: list[tuple[int, int]] = []  # (queries, k)
        self.trained = 0
        self.during: Callable[[], None] | None = None  # called in the middle of a search
        self._owner = 0
        self._depth = 0
        self._guard = threading.Lock()

    def __enter__(self) -> None:
        if self.abort or (self.touched and os.getpid() != self.pid):
            os.abort()
        if not self.touched:
            self.touched, self.pid = True, os.getpid()
        with self._guard:
            if self._depth and self._owner != threading.get_ident():
                self.violations.append("two threads at once")
            self._owner = threading.get_ident()
            self._depth += 1

    def __exit__(self, *exc: object) -> None:
        with self._guard:
            self._depth -= 1

    def allocate(self, size: int) -> None:
        if self.used + size > self.memory:
            raise RuntimeError(NO_MEMORY)
        self.used += size


BOARD = Board()


class Swig:
    """What keeps SWIG's destructor from running."""

    def __init__(self) -> None:
        self.owned = True

    def disown(self) -> None:
        self.owned = False


class Thing:
    """Something on the GPU."""

    def __init__(self, size: int = 0) -> None:
        self.this = Swig()
        self.size = 0
        with BOARD:
            BOARD.allocate(size)
        self.size = size

    def __del__(self) -> None:
        if self.this.owned and self.size >= 0:
            with BOARD:
                BOARD.used -= self.size


class StandardGpuResources(Thing):
    def setTempMemory(self, size: int) -> None:
        self.temp = size


class GpuClonerOptions:
    useFloat16 = False


class GpuIndexFlatConfig:
    useFloat16 = False
    device = 0


class GpuIndex(Thing):
    """A copy of an index, which answers as a GPU would."""

    def __init__(self, faiss: Any, index: Any, size: int) -> None:
        super().__init__(size)
        self._faiss = faiss
        self._index = index
        self.ntotal, self.d = index.ntotal, index.d

    def search(self, x: Any, k: int, *, params: Any = None) -> tuple[Any, Any]:
        with BOARD:
            BOARD.searches.append((len(x), k))
            if BOARD.during is not None:
                BOARD.during()
            if BOARD.faults:
                raise RuntimeError(BOARD.faults.pop(0))
            if not 0 < k <= MOST:
                raise RuntimeError(f"GPU index only supports min/max-K selection up to {MOST}")
            BOARD.allocate(12 * len(x) * k)  # for the results
            BOARD.used -= 12 * len(x) * k
            distances, rows = self._index.search(x, k, params=self._without_selector(params))
            return distances * np.float32(0.999), rows  # rounded otherwise

    def _without_selector(self, params: Any) -> Any:
        faiss = self._faiss
        if isinstance(params, faiss.SearchParametersPreTransform):
            inner = self._without_selector(faiss.downcast_SearchParameters(params.index_params))
            return faiss.SearchParametersPreTransform(index_params=inner)
        if params is None or not hasattr(params, "nprobe"):
            return None
        if not 0 < params.nprobe <= MOST:
            raise RuntimeError(f"GPU IVF index only supports nprobe selection up to {MOST}")
        return faiss.SearchParametersIVF(nprobe=params.nprobe)


def _flat_copy(faiss: Any, resources: Any, dim: int, metric: int, config: Any) -> Any:
    class Flat(GpuIndex):
        def add(self, x: Any) -> None:
            if config.useFloat16:
                x = np.asarray(x).astype(np.float16).astype(np.float32)
            with BOARD:
                BOARD.allocate(x.size * (2 if config.useFloat16 else 4))
                self.size += x.size * (2 if config.useFloat16 else 4)
                self._index.add(x)

    return Flat(faiss, faiss.IndexFlat(dim, metric), 0)


def patches(faiss: Any) -> dict[str, Any]:
    """What a FAISS for CPUs lacks, by name."""

    def index_cpu_to_gpu(resources: Any, device: int, index: Any, options: Any = None) -> Any:
        assert isinstance(resources, StandardGpuResources)
        if not 0 <= device < BOARD.devices:
            raise RuntimeError(f"Invalid GPU device {device}")
        index = faiss.downcast_index(index)
        inner = index
        while isinstance(inner, faiss.IndexPreTransform):
            inner = faiss.downcast_index(inner.index)
        if not isinstance(inner, _GPU_TYPES(faiss)):
            raise RuntimeError("Error: This index type is not implemented on GPU.")
        if isinstance(index, faiss.IndexFlat) and not index.ntotal:
            with BOARD:
                BOARD.trained += 1
            return faiss.clone_index(index)  # for k-means, which runs inside FAISS
        ivf = faiss.try_extract_index_ivf(index)
        code = 4 * index.d if ivf is None else ivf.code_size + 8
        return GpuIndex(faiss, faiss.clone_index(index), index.ntotal * code)

    def aborts(*arguments: Any) -> Any:
        os.abort()

    return {
        "StandardGpuResources": StandardGpuResources,
        "GpuClonerOptions": GpuClonerOptions,
        "GpuIndexFlatConfig": GpuIndexFlatConfig,
        "GpuIndexFlat": lambda *arguments: _flat_copy(faiss, *arguments),
        "index_cpu_to_gpu": index_cpu_to_gpu,
        "get_num_gpus": lambda: BOARD.devices,
        "knn_gpu": aborts,
        "index_cpu_to_all_gpus": aborts,
    }


def _GPU_TYPES(faiss: Any) -> tuple[type, ...]:
    return (
        faiss.IndexFlat,
        faiss.IndexIVFFlat,
        faiss.IndexIVFScalarQuantizer,
        faiss.IndexIVFPQ,
    )


def driver_patches(error: type[Exception]) -> dict[str, Any]:
    """What the CUDA driver says, by name of the function of `expbuf_faiss_gpu.driver`."""

    def count() -> int:
        if BOARD.says:
            raise error(BOARD.says)
        return BOARD.devices

    def free_memory(device: int) -> tuple[int, int]:
        with BOARD:
            return BOARD.memory - BOARD.used, BOARD.memory

    def take(device: int, size: int) -> int:
        BOARD.allocate(size)
        return size

    def give_back(device: int, at: int) -> None:
        BOARD.used -= at

    return {
        "library": object,
        "count": count,
        "free_memory": free_memory,
        "take": take,
        "give_back": give_back,
        "name": lambda device: "stand-in",
    }


def install(patch: Callable[..., Any], board: Board) -> None:
    """Put it into this process.

    Args:
        patch: `monkeypatch.setattr`.
        board: To use.
    """
    import faiss

    from expbuf_faiss_gpu import driver

    patch(sys.modules[__name__], "BOARD", board)
    for name, value in patches(faiss).items():
        patch(faiss, name, value, raising=False)
    for name, value in driver_patches(driver.DriverError).items():
        patch(driver, name, value)


class _Hook(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        if fullname not in ("faiss", "expbuf_faiss_gpu.driver"):
            return None
        sys.meta_path.remove(self)
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            sys.meta_path.insert(0, self)
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            run(module)
            made = patches(module) if fullname == "faiss" else driver_patches(module.DriverError)
            vars(module).update(made)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def install_when_imported() -> None:
    """Put it into this process, as soon as FAISS and the driver are imported."""
    global BOARD
    BOARD = Board(**json.loads(os.environ["EXPBUF_GPU_STANDIN"]))
    sys.meta_path.insert(0, _Hook())
