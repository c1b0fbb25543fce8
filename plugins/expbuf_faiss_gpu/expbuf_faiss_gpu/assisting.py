"""Building an index of the CPU with a GPU doing the two things that take long.

Both are comparisons with the centres of lists: k-means finds the centres, and each vector goes to
the nearest one. The index stays on the CPU, from where it is written. Whatever fails on the GPU is
done on the CPU: a build is never worse off for trying.
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
from numpy.typing import NDArray

from expbuf_faiss import runtime
from expbuf_faiss_gpu import placing
from expbuf_faiss_gpu.devices import Device, DeviceBusy, DeviceError

logger = logging.getLogger("expbuf")

_ROWS = 1 << 16  # assigned at once


def train(device: Device, index: Any, sample: NDArray[np.float32]) -> bool:
    """Train an inverted file; False where the CPU has to do it."""
    faiss = runtime.load()
    ivf = _inverted_file(faiss, index)
    if ivf is None or ivf.quantizer.ntotal:
        return False
    try:
        with device.exclusively() as resources:
            ivf.clustering_index = faiss.index_cpu_to_gpu(resources, device.number, ivf.quantizer)
            try:
                index.train(sample)
            finally:
                ivf.clustering_index = None
    except (RuntimeError, MemoryError) as exc:
        logger.info("the GPU could not train the index, the CPU does it: %s", exc)
        ivf.quantizer.reset()
        return False
    return True


def add(device: Device, index: Any, vectors: NDArray[np.float32]) -> bool:
    """Add vectors to a trained inverted file; False where the CPU has to do it."""
    faiss = runtime.load()
    ivf = _inverted_file(faiss, index)
    if ivf is None or not ivf.quantizer.ntotal:
        return False
    try:
        centres = placing.put_index(device, ivf.quantizer, float16=False)
    except DeviceError as exc:
        logger.info("the GPU does not help to fill the index: %s", exc)
        return False
    working = True
    for start in range(0, len(vectors), _ROWS):
        block = np.ascontiguousarray(vectors[start : start + _ROWS])
        lists = None
        if working:
            try:
                lists = centres.search(block, 1, None)[1]
            except DeviceBusy:
                pass  # this block on the CPU
            except DeviceError as exc:
                logger.info("the GPU could not help any more to fill the index: %s", exc)
                working = False
        if lists is None:
            index.add(block)
        else:
            ivf.add_core(len(block), faiss.swig_ptr(block), None, faiss.swig_ptr(lists))
    return True


def _inverted_file(faiss: Any, index: Any) -> Any:
    """The index, if it is an inverted file whose centres are a plain list; else None."""
    outer = faiss.downcast_index(index)
    if not isinstance(outer, faiss.IndexIVF):
        return None
    return outer if isinstance(faiss.downcast_index(outer.quantizer), faiss.IndexFlat) else None
