"""The index backend: builds with the help of a GPU, and opens segments on it."""

from __future__ import annotations

import importlib.util
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from expbuf_core.contracts import IndexContext, IndexSegment
from expbuf_core.errors import BackendUnavailable
from expbuf_faiss import FaissBackend, FaissSettings, Plan
from expbuf_faiss.plans import FLAT, nearest_power_of_two
from expbuf_faiss_gpu import assisting, placing, probe
from expbuf_faiss_gpu.devices import Device, DeviceError, device
from expbuf_faiss_gpu.segment import GpuFlatSegment, GpuSegment, Placed
from expbuf_faiss_gpu.settings import FaissGpuSettings
from expbuf_faiss_gpu.takeover import EXACT, Takeover


class FaissGpuBackend(FaissBackend):
    """FAISS on a GPU. It writes and reads the files of the CPU's plugin.

    Raises:
        BackendUnavailable: The GPU cannot be used, and the first fallback is not "faiss_cpu"; or
            FAISS cannot be used at all.
    """

    segment_type = GpuSegment
    settings: FaissGpuSettings

    def __init__(self, settings: FaissGpuSettings, context: IndexContext) -> None:
        if importlib.util.find_spec("faiss") is None:
            raise BackendUnavailable(
                "no FAISS wheel is installed; try `pip install faiss-gpu` (without faiss-cpu: both "
                "install the same folder)"
            )
        super().__init__(settings, context)
        self._takeover = Takeover(context)
        self._device: Device | None = None
        try:
            self._device = device(settings.device, settings.temp_memory_bytes)
        except DeviceError as exc:
            if self._takeover.by == EXACT:
                raise BackendUnavailable(str(exc)) from exc  # the core has that, and builds less
            self._takeover.instead(exc)

    def plans(self, rows: int) -> list[Plan]:
        """What to build: "auto" means lists of vectors, since no GPU index holds one-bit codes.

        Without a GPU it means what is best on the CPU.
        """
        settings = self.settings
        if self._device is None or settings.index != "auto":
            return super().plans(rows)
        if rows < settings.flat_below:
            return [FLAT]
        lists = f"IVF{settings.lists or nearest_power_of_two(4 * math.sqrt(rows))}"
        if settings.float16:
            return [Plan(f"{lists},SQfp16", optional=True), FLAT]
        return [Plan(f"{lists},Flat", optional=True)]

    def train(self, index: Any, sample: NDArray[np.float32]) -> None:
        """Train an index, finding the centres of its lists on the GPU."""
        if self._device is None or not assisting.train(self._device, index, sample):
            super().train(index, sample)

    def add(self, index: Any, vectors: NDArray[np.float32]) -> None:
        """Add all vectors; which list each goes to is found on the GPU."""
        if self._device is None or not assisting.add(self._device, index, vectors):
            super().add(index, vectors)

    def place(self, index: Any) -> Placed:
        """Copy an index to the GPU, if it can be there and there is room."""
        placed = Placed(index, None, self._takeover)
        if self._device is not None:
            try:
                placed.resident = placing.put_index(self._device, index, self.settings.float16)
            except DeviceError as exc:
                placed.exact = self._takeover.instead(exc, once="place") == EXACT
        return placed

    def open_flat(self, ids: NDArray[np.int64], vectors: NDArray[np.float32]) -> IndexSegment:
        """Open a segment without an index: on the GPU, if its vectors are many and fit.

        Without a GPU in this process, a forked child's for instance, the same class compares on the
        CPU: so that a search finds the same to the last bit.
        """
        if self._device is None or len(ids) < self.settings.flat_below:
            return super().open_flat(ids, vectors)
        placed = Placed(None, None, self._takeover)
        metric = self.context.metric
        try:
            placed.resident = placing.put_vectors(
                self._device, vectors, metric, self.settings.float16
            )
        except DeviceError as exc:
            self._takeover.instead(exc, once="place")
        return GpuFlatSegment(placed, ids, vectors, metric)

    def after_fork(self) -> None:
        """Keep the child from waiting for threads that it does not have."""
        self._takeover.after_fork()
        super().after_fork()


def cpu_backend(settings: FaissSettings, context: IndexContext) -> FaissBackend:
    """Make the CPU's backend from the same wheel.

    Raises:
        BackendUnavailable: That wheel is known not to work.
    """
    if probe.import_error:
        raise BackendUnavailable(probe.import_error)
    return FaissBackend(settings, context)
