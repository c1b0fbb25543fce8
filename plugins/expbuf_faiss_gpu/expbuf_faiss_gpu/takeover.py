"""What happens when the GPU cannot be used."""

from __future__ import annotations

import threading

from expbuf_core.contracts import IndexContext
from expbuf_core.errors import BackendUnavailable
from expbuf_faiss_gpu.devices import DeviceError

CPU = "faiss_cpu"
EXACT = "exact"


class Takeover:
    """Lets the first fallback take over where this plugin has it, and tells of it once.

    The CPU index is that of the same wheel, over the same file.

    Attributes:
        by: Name of what may take over, or "".
    """

    def __init__(self, context: IndexContext) -> None:
        first = context.fallback[0] if context.fallback else ""
        self.by = first if first in (CPU, EXACT) else ""
        self._tell = context.on_fallback
        self._lock = threading.Lock()
        self._told: set[str] = set()

    def instead(self, error: DeviceError, *, once: str = "") -> str:
        """Say that the GPU is not used; the name of what takes its place.

        Args:
            error: Why.
            once: What could not be done, where telling the first time is enough, although the next
                reason reads differently: each new segment would meet it again.

        Raises:
            BackendUnavailable: The configuration allows nothing else, or not first.
        """
        if not self.by or (self.by == CPU and not error.cpu_works):
            raise BackendUnavailable(
                f"the index backend 'faiss_gpu' cannot run: {error}"
            ) from error
        key = once or str(error)
        with self._lock:
            new = key not in self._told
            self._told.add(key)
        if new:
            self._tell(self.by, str(error))
        return self.by

    def after_fork(self) -> None:
        """In a forked child: another thread of the parent may have held the lock."""
        self._lock = threading.Lock()
