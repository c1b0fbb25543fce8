"""`Exporter`: the plugin that counts events."""

from __future__ import annotations

import os
import threading
import weakref
from typing import TYPE_CHECKING

from expbuf_core.hookspecs import hookimpl

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

# A fork while another thread holds one of the metrics' locks would leave it held in the child for
# ever: so all counting is done under this one, and forks wait for it.
_counting = threading.RLock()
os.register_at_fork(
    before=_counting.acquire, after_in_parent=_counting.release, after_in_child=_counting.release
)

_SECONDS = (2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.2, 0.5, 1, 5)


class _Metrics:
    """The metrics in one registry."""

    def __init__(self, registry: CollectorRegistry) -> None:
        from prometheus_client import Counter, Gauge, Histogram  # not before an event comes

        self.of_commits: dict[tuple[str, str], tuple[Histogram, Counter, Gauge]] = {}
        where = ("path",)
        self.commit_seconds = Histogram(
            "expbuf_commit_seconds",
            "From the call to the acknowledgement of a commit",
            ("path", "kind"),
            registry=registry,
            buckets=_SECONDS,
        )
        self.committed = Counter(
            "expbuf_committed_experiences",
            "Experiences that commits concerned",
            ("path", "kind"),
            registry=registry,
        )
        self.of_searches: dict[str, tuple[Histogram, Counter, Gauge]] = {}
        self.search_seconds = Histogram(
            "expbuf_search_seconds",
            "From the call to the answer of a search",
            where,
            registry=registry,
            buckets=_SECONDS,
        )
        self.queries = Counter("expbuf_queries", "Queries answered", where, registry=registry)
        self.degraded = Counter(
            "expbuf_degraded_searches",
            "Searches in which the configured index took no part",
            where,
            registry=registry,
        )
        self.evicted = Counter("expbuf_evicted", "Experiences evicted", where, registry=registry)
        self.lsn = Gauge(
            "expbuf_lsn", "Log position that this process has reached", where, registry=registry
        )
        self.opened = Counter("expbuf_opened", "Openings of a buffer", where, registry=registry)
        self.open_seconds = Gauge(
            "expbuf_open_seconds", "What the last opening took", where, registry=registry
        )
        self.recovered = Gauge(
            "expbuf_recovered_experiences",
            "Experiences that the last opening found",
            where,
            registry=registry,
        )
        self.swaps = Counter(
            "expbuf_index_swaps", "New sets of index segments", where, registry=registry
        )
        self.segments = Gauge("expbuf_index_segments", "Index segments", where, registry=registry)
        self.index_lsn = Gauge(
            "expbuf_index_lsn", "Log position of the segments", where, registry=registry
        )
        self.builder_failures = Counter(
            "expbuf_builder_failures", "Index builds that failed", where, registry=registry
        )
        self.fallbacks = Counter(
            "expbuf_fallbacks",
            "Fallbacks that took the place of a configured backend",
            ("kind", "wanted", "used"),
            registry=registry,
        )
        self.corruptions = Counter(
            "expbuf_corruptions", "Damage that was found", where, registry=registry
        )


_known: weakref.WeakKeyDictionary[CollectorRegistry, _Metrics] = weakref.WeakKeyDictionary()


class Exporter:
    """Counts events in a registry; exporters of one registry count in the same metrics.

    Args:
        registry: None: `prometheus_client.REGISTRY`.
        listening: Whether it counts; may be changed at any time.
    """

    def __init__(
        self, registry: CollectorRegistry | None = None, *, listening: bool = True
    ) -> None:
        self.listening = listening
        self._registry = registry
        self._made: _Metrics | None = None

    def _metrics(self) -> _Metrics:
        """The metrics; `_counting` is held."""
        if self._made is None:
            if self._registry is None:
                from prometheus_client import REGISTRY

                self._registry = REGISTRY
            if self._registry not in _known:
                _known[self._registry] = _Metrics(self._registry)
            self._made = _known[self._registry]
        return self._made

    @hookimpl
    def expbuf_on_committed(
        self, path: str, lsn: int, kind: str, count: int, seconds: float
    ) -> None:
        """Count a commit, and how long it took."""
        with _counting:
            metrics = self._metrics()
            known = metrics.of_commits.get((path, kind))
            if known is None:  # looking up labels takes longer than counting
                known = metrics.of_commits[path, kind] = (
                    metrics.commit_seconds.labels(path, kind),
                    metrics.committed.labels(path, kind),
                    metrics.lsn.labels(path),
                )
            known[0].observe(seconds)
            known[1].inc(count)
            known[2].set(lsn)

    @hookimpl
    def expbuf_on_searched(
        self, path: str, lsn: int, queries: int, seconds: float, degraded: bool
    ) -> None:
        """Count a search, and how long it took."""
        with _counting:
            metrics = self._metrics()
            known = metrics.of_searches.get(path)
            if known is None:
                known = metrics.of_searches[path] = (
                    metrics.search_seconds.labels(path),
                    metrics.queries.labels(path),
                    metrics.lsn.labels(path),
                )
            known[0].observe(seconds)
            known[1].inc(queries)
            known[2].set(lsn)
            if degraded:
                metrics.degraded.labels(path).inc()

    @hookimpl
    def expbuf_on_evicted(self, path: str, lsn: int, count: int) -> None:
        """Count evicted experiences."""
        with _counting:
            self._metrics().evicted.labels(path).inc(count)
            self._metrics().lsn.labels(path).set(lsn)

    @hookimpl
    def expbuf_on_recovered(self, path: str, lsn: int, count: int, seconds: float) -> None:
        """Count an opening."""
        with _counting:
            metrics = self._metrics()
            metrics.opened.labels(path).inc()
            metrics.open_seconds.labels(path).set(seconds)
            metrics.recovered.labels(path).set(count)
            metrics.lsn.labels(path).set(lsn)

    @hookimpl
    def expbuf_on_index_swapped(self, path: str, lsn: int, segments: int) -> None:
        """Count a swap of segments."""
        with _counting:
            metrics = self._metrics()
            metrics.swaps.labels(path).inc()
            metrics.segments.labels(path).set(segments)
            metrics.index_lsn.labels(path).set(lsn)

    @hookimpl
    def expbuf_on_builder_failed(self, path: str) -> None:
        """Count a build that failed."""
        with _counting:
            self._metrics().builder_failures.labels(path).inc()

    @hookimpl
    def expbuf_on_fallback(self, kind: str, wanted: str, used: str) -> None:
        """Count a fallback."""
        with _counting:
            self._metrics().fallbacks.labels(kind, wanted, used).inc()

    @hookimpl
    def expbuf_on_corruption(self, path: str) -> None:
        """Count damage."""
        with _counting:
            self._metrics().corruptions.labels(path).inc()
