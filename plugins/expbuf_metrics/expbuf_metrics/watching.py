"""`watch`: what a buffer is like, read when it is scraped."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry
    from prometheus_client.metrics_core import GaugeMetricFamily


class Watched(Protocol):
    """An `ExperienceBuffer`, as far as it is read here."""

    @property
    def path(self) -> Any: ...

    def stats(self) -> dict[str, Any]: ...


_GAUGES: Mapping[str, tuple[str, Callable[[Mapping[str, Any]], float]]] = {
    "expbuf_experiences": ("Experiences held", lambda f: f["experiences"]),
    "expbuf_capacity": ("Experiences held at most", lambda f: f["max_size"]),
    "expbuf_tail_rows": (
        "Experiences that no segment holds yet",
        lambda f: f["index"]["tail_rows"],
    ),
    "expbuf_changed_rows": (
        "Experiences added or removed since the last build of the index began",
        lambda f: f["index"]["changed_rows"],
    ),
    "expbuf_building": (
        "1 while another process builds the index",
        lambda f: f["index"].get("building_pid") is not None,
    ),
    "expbuf_storage_bytes": ("Bytes of all log files", lambda f: _bytes(f["storage"])),
    "expbuf_failed_builds": (
        "Failed builds in all processes since the buffer was opened",
        lambda f: f["index"]["builder_failures"],
    ),
    "expbuf_log_retirements": ("Logs given up", lambda f: f["log_retirements"]),
}


def watch(buffer: Watched, registry: CollectorRegistry | None = None) -> None:
    """Show sizes and lags of a buffer in a registry, until it is closed or gone.

    Args:
        buffer: An open buffer. Only a weak reference is kept.
        registry: None: `prometheus_client.REGISTRY`.
    """
    if registry is None:
        from prometheus_client import REGISTRY

        registry = REGISTRY
    with _lock:
        collector = _collectors.get(registry)
        if collector is None:
            collector = _collectors[registry] = _Collector()
            registry.register(collector)
        collector.buffers.add(buffer)


class _Collector:
    """Reads all watched buffers of one registry."""

    def __init__(self) -> None:
        self.buffers: weakref.WeakSet[Watched] = weakref.WeakSet()

    def describe(self) -> Iterable[GaugeMetricFamily]:
        """Nothing: the names are known without reading."""
        return []

    def collect(self) -> Iterable[GaugeMetricFamily]:
        """All gauges of all buffers that are open."""
        from prometheus_client.metrics_core import GaugeMetricFamily

        read: dict[str, dict[str, Any]] = {}
        for buffer in list(self.buffers):
            with contextlib.suppress(Exception):  # closed, or its folder is gone: nothing to show
                read[str(buffer.path or "")] = buffer.stats()
        for name, (text, value) in _GAUGES.items():
            family = GaugeMetricFamily(name, text, labels=["path"])
            for path, facts in read.items():
                family.add_metric([path], float(value(facts)))
            yield family
        lag = GaugeMetricFamily(
            "expbuf_lag_operations",
            "Operations by which a stage trails the log",
            labels=["path", "stage"],
        )
        for path, facts in read.items():
            last = facts["lsn"]
            for stage, reached in (
                ("durable", facts["durable_lsn"]),
                ("snapshot", facts["snapshot_lsn"]),
                ("index", facts["index"]["lsn"]),
            ):
                lag.add_metric([path, stage], max(0, last - reached))
        yield lag


_lock = threading.Lock()
_collectors: weakref.WeakKeyDictionary[CollectorRegistry, _Collector] = weakref.WeakKeyDictionary()


def _bytes(facts: Any) -> int:
    """Sum of all entries named "bytes", at whatever depth."""
    if not isinstance(facts, Mapping):
        return 0
    return sum(int(value) if key == "bytes" else _bytes(value) for key, value in facts.items())
