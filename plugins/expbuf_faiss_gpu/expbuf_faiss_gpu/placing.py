"""Copying an index, or bare vectors, to a GPU."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from expbuf_faiss import runtime
from expbuf_faiss_gpu.devices import Device, Resident

_BLOCK = 32  # lists on a GPU are filled up to a multiple of so many rows
_LIST_BYTES = 1024  # what the allocator rounds up, for a list's codes and ids
_PAGE = 256 << 20  # FAISS converts vectors on the device in pieces of this size


def put_index(device: Device, index: Any, float16: bool) -> Resident:
    """Copy an index.

    Raises:
        DeviceError: This kind of index cannot be on a GPU, or there is too little memory.
    """

    def make(faiss: Any, resources: Any) -> Any:
        options = faiss.GpuClonerOptions()
        options.useFloat16 = float16
        return faiss.index_cpu_to_gpu(resources, device.number, index, options)

    return device.put(make, index_bytes(runtime.load(), index, float16))


def put_vectors(
    device: Device, vectors: NDArray[np.float32], metric: str, float16: bool
) -> Resident:
    """Copy vectors, to be compared with every query.

    Raises:
        DeviceError: There is too little memory.
    """
    vectors = np.asarray(vectors)

    def make(faiss: Any, resources: Any) -> Any:
        config = faiss.GpuIndexFlatConfig()
        config.device = device.number
        config.useFloat16 = float16
        kind = faiss.METRIC_L2 if metric == "l2" else faiss.METRIC_INNER_PRODUCT
        index = faiss.GpuIndexFlat(resources, vectors.shape[1], kind, config)
        index.add(vectors)  # all at once: each call copies what is there already
        return index

    return device.put(make, flat_bytes(len(vectors), vectors.shape[1], float16))


def flat_bytes(rows: int, dim: int, float16: bool) -> int:
    """Bytes that vectors take on a GPU, with their lengths and what converting them takes."""
    if float16:
        return rows * (2 * dim + 4) + min(_PAGE, 4 * rows * dim) * 3 // 2
    return rows * (4 * dim + 4)


def index_bytes(faiss: Any, index: Any, float16: bool) -> int:
    """Bytes that an index takes on a GPU."""
    ivf = faiss.try_extract_index_ivf(index)
    if ivf is None:
        return flat_bytes(index.ntotal, index.d, float16)
    rows = index.ntotal + ivf.nlist * _BLOCK // 2
    return int(rows * (ivf.code_size + 8) + ivf.nlist * (4 * ivf.d + 4 + _LIST_BYTES))
