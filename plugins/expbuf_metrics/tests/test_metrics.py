"""The exporter: every event is counted, and none of its failures reaches a caller."""

from __future__ import annotations

import gc
import logging
import os
import re
import signal
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prometheus_client import CollectorRegistry, generate_latest

import expbuf_metrics
from expbuf_core import Experience, ExperienceBuffer, errors, hookspecs
from expbuf_core.plugins import default_registry
from expbuf_metrics import Exporter, watch

EVENTS = sorted(name for name in vars(hookspecs) if name.startswith("expbuf_on_"))
SMALL = {"index": {"backend": "exact", "builder": "off"}, "durability": "os"}


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "memory"


def opened(folder: Path | None, registry: CollectorRegistry, **more: Any) -> ExperienceBuffer:
    return ExperienceBuffer.open(folder, plugins=[Exporter(registry)], **{**SMALL, **more})


def experiences(n: int) -> list[Experience]:
    draw = np.random.default_rng(n)
    return [
        Experience(v_embed=v, q_embed=v, confidence=0.5)
        for v in draw.standard_normal((n, 8), dtype=np.float32)
    ]


def test_it_is_found(registry: CollectorRegistry) -> None:
    (found,) = (plugin for plugin in default_registry().plugins() if plugin.name == "metrics")
    assert found.status == "ok"
    assert len(found.events) == 8


@pytest.fixture
def default(registry: CollectorRegistry, monkeypatch: pytest.MonkeyPatch) -> CollectorRegistry:
    """The installed exporter counts here, as it does in `prometheus_client.REGISTRY`."""
    monkeypatch.setattr(expbuf_metrics.plugin, "_registry", registry)
    monkeypatch.setattr(expbuf_metrics.plugin, "_made", None)
    return registry


def test_installed_and_not_started_it_is_told_nothing(
    folder: Path, default: CollectorRegistry
) -> None:
    with ExperienceBuffer.open(folder, **SMALL) as buffer:
        assert not [event for event in EVENTS if event in default_registry().events]
        buffer.add_many(experiences(5))
        expbuf_metrics.start()
        try:
            assert [event for event in EVENTS if event in default_registry().events] == EVENTS
            buffer.add_many(experiences(3))
            buffer.search_index(v_embed=np.ones(8), k=1)
        finally:
            expbuf_metrics.stop()
        buffer.add_many(experiences(7))
    labels = {"path": str(folder), "kind": "add"}
    assert default.get_sample_value("expbuf_committed_experiences_total", labels) == 3
    assert default.get_sample_value("expbuf_queries_total", {"path": str(folder)}) == 1


def test_idle_it_makes_no_single_add_look_at_the_log(folder: Path) -> None:
    """Adds are applied by the next read, many at once; an observer must not change that."""
    (one,) = experiences(1)
    for listening in (False, True):
        plugin = Exporter(CollectorRegistry(), listening=listening)
        with ExperienceBuffer.open(folder, plugins=[plugin], **SMALL) as buffer:
            buffer.add(one)
            before = buffer.lsn
            for _ in range(20):
                buffer.add(one)
            assert buffer._session.replica.state.lsn == before
            assert buffer.lsn == before + 20


def test_searches(folder: Path, registry: CollectorRegistry) -> None:
    where = {"path": str(folder)}
    with opened(folder, registry) as buffer:
        buffer.add_many(experiences(50))
        buffer.search_index(v_embed=np.ones(8), k=3)
        buffer.search_many(v_embed=np.ones((7, 8)), k=3)
        with pytest.raises(errors.InvalidExperience):
            buffer.search_index(v_embed=np.ones(9))
        buffer.rebuild_index()
        buffer.search_index(v_embed=np.ones(8), k=3)
    assert registry.get_sample_value("expbuf_search_seconds_count", where) == 3
    assert 0 < (registry.get_sample_value("expbuf_search_seconds_sum", where) or 0) < 60
    assert registry.get_sample_value("expbuf_queries_total", where) == 9
    assert registry.get_sample_value("expbuf_degraded_searches_total", where) is None


def test_degraded_searches(folder: Path, registry: CollectorRegistry) -> None:
    where = {"path": str(folder)}
    choice = {"backend": "nowhere", "fallback": ["exact"]}
    with opened(folder, registry, index=choice) as buffer:
        buffer.add_many(experiences(50))
        buffer.search_index(v_embed=np.ones(8), k=3)  # nothing is built: no index is missed yet
        buffer.rebuild_index()
        buffer.search_index(v_embed=np.ones(8), k=3)
    assert registry.get_sample_value("expbuf_degraded_searches_total", where) == 1
    (segment,) = (folder / "index").glob("*.vectors")
    segment.write_bytes(segment.read_bytes()[:-1])
    with opened(folder, registry) as buffer:
        assert len(buffer.search_index(v_embed=np.ones(8), k=3)) == 3
    assert registry.get_sample_value("expbuf_degraded_searches_total", where) == 2


def test_commits(folder: Path, registry: CollectorRegistry) -> None:
    with opened(folder, registry) as buffer:
        ids = buffer.add_many(experiences(5))
        buffer.add(experiences(1)[0])
        buffer.remove(ids[:2])
        lsn = buffer.stats()["lsn"]

    def value(name: str, kind: str) -> float | None:
        return registry.get_sample_value(name, {"path": str(folder), "kind": kind})

    assert value("expbuf_commit_seconds_count", "add") == 2
    assert value("expbuf_commit_seconds_count", "remove") == 1
    assert 0 < (value("expbuf_commit_seconds_sum", "add") or 0) < 60
    assert value("expbuf_committed_experiences_total", "add") == 6
    assert value("expbuf_committed_experiences_total", "remove") == 2
    assert registry.get_sample_value("expbuf_lsn", {"path": str(folder)}) == lsn


def test_openings_and_evictions(folder: Path, registry: CollectorRegistry) -> None:
    where = {"path": str(folder)}
    for _ in range(2):
        with opened(folder, registry, max_size=10) as buffer:
            buffer.add_many(experiences(8))
    assert registry.get_sample_value("expbuf_opened_total", where) == 2
    assert registry.get_sample_value("expbuf_recovered_experiences", where) == 8
    assert (registry.get_sample_value("expbuf_open_seconds", where) or 0) > 0
    assert registry.get_sample_value("expbuf_evicted_total", where) == 6


def test_index_swaps(folder: Path, registry: CollectorRegistry) -> None:
    where = {"path": str(folder)}
    with opened(folder, registry) as buffer:
        buffer.add_many(experiences(50))
        buffer.rebuild_index()
    assert (registry.get_sample_value("expbuf_index_swaps_total", where) or 0) >= 1
    assert registry.get_sample_value("expbuf_index_segments", where) == 1
    assert registry.get_sample_value("expbuf_index_lsn", where)


def test_builder_failures(
    folder: Path, registry: CollectorRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: Any, **more: Any) -> None:
        raise RuntimeError("no")

    with opened(folder, registry) as buffer:
        buffer.add_many(experiences(50))
        monkeypatch.setattr("expbuf_core.indexing.build", fails)
        with pytest.raises(RuntimeError):
            buffer.rebuild_index()
    where = {"path": str(folder)}
    assert registry.get_sample_value("expbuf_builder_failures_total", where) == 1


def test_fallbacks(folder: Path, registry: CollectorRegistry) -> None:
    choice = {"backend": "nowhere", "fallback": ["exact"]}
    with opened(folder, registry, index=choice) as buffer:
        buffer.add_many(experiences(50))
        buffer.rebuild_index()
    labels = {"kind": "index", "wanted": "nowhere", "used": "exact"}
    assert registry.get_sample_value("expbuf_fallbacks_total", labels) == 1


def test_damage(folder: Path, registry: CollectorRegistry) -> None:
    with opened(folder, registry) as buffer:
        buffer.add_many(experiences(20))
    (log,) = folder.glob("experience_data.*")
    content = bytearray(log.read_bytes())
    content[len(content.rstrip(b"\0")) // 2] ^= 0x55
    log.write_bytes(content)
    with pytest.raises(errors.CorruptionError):
        opened(folder, registry)
    assert registry.get_sample_value("expbuf_corruptions_total", {"path": str(log)}) == 1


def test_watching(folder: Path, registry: CollectorRegistry) -> None:
    with opened(folder, registry, max_size=40) as buffer:
        watch(buffer, registry)
        watch(buffer, registry)
        buffer.add_many(experiences(30))
        where = {"path": str(folder)}
        assert registry.get_sample_value("expbuf_experiences", where) == 30
        assert registry.get_sample_value("expbuf_capacity", where) == 40
        assert registry.get_sample_value("expbuf_tail_rows", where) == 30
        assert (registry.get_sample_value("expbuf_storage_bytes", where) or 0) > 0
        assert registry.get_sample_value("expbuf_changed_rows", where) == 30
        assert registry.get_sample_value("expbuf_building", where) == 0
        for stage in ("durable", "snapshot", "index"):
            lag = registry.get_sample_value("expbuf_lag_operations", {**where, "stage": stage})
            assert lag is not None
            assert lag >= 0
        text = generate_latest(registry).decode()
    assert len(re.findall(r"^expbuf_experiences\{", text, re.M)) == 1
    assert registry.get_sample_value("expbuf_experiences", where) is None, "closed"
    del buffer
    gc.collect()
    generate_latest(registry)


def test_exporters_share_a_registry(registry: CollectorRegistry) -> None:
    plugins = [Exporter(registry), Exporter(registry)]
    with ExperienceBuffer.open(plugins=plugins, **SMALL) as buffer:
        buffer.add_many(experiences(3))
    labels = {"path": "", "kind": "add"}
    assert registry.get_sample_value("expbuf_committed_experiences_total", labels) == 6


def test_an_observer_that_raises_fails_no_commit(
    folder: Path,
    registry: CollectorRegistry,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fails(self: Exporter) -> Any:
        raise RuntimeError("the registry is broken")

    monkeypatch.setattr(Exporter, "_metrics", fails)
    with caplog.at_level(logging.CRITICAL, "expbuf"), opened(folder, registry) as buffer:
        ids = buffer.add_many(experiences(4))
        assert buffer.remove(ids[:1]) == 1
        assert len(buffer) == 3
    monkeypatch.undo()
    with opened(folder, registry) as buffer:
        assert len(buffer) == 3


@pytest.fixture
def busy(folder: Path, registry: CollectorRegistry) -> Iterator[ExperienceBuffer]:
    """A buffer whose other threads commit, and are counted, all the time."""
    stop = threading.Event()
    with opened(folder, registry) as buffer:

        def work() -> None:
            while not stop.wait(0.001):
                buffer.add_many(experiences(1))

        threads = [threading.Thread(target=work, daemon=True) for _ in range(2)]
        for thread in threads:
            thread.start()
        yield buffer
        stop.set()
        for thread in threads:
            thread.join(30)


def test_forks(busy: ExperienceBuffer) -> None:
    """No fork catches a lock of a metric held: a child counts, too."""
    for _ in range(20):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            pid = os.fork()
        if not pid:
            code = 1
            try:
                signal.alarm(30)
                busy.add_many(experiences(1))
                code = 0
            finally:
                os._exit(code)
        assert os.waitpid(pid, 0)[1] == 0


def test_loading_is_cheap() -> None:
    assert isinstance(expbuf_metrics.plugin, Exporter)
    source = Path(expbuf_metrics.__file__).parent
    for path in source.glob("*.py"):
        for line in path.read_text().splitlines():
            assert not line.startswith(("import prometheus", "from prometheus")), path


def test_every_metric_is_documented(folder: Path, registry: CollectorRegistry) -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    with opened(folder, registry) as buffer:
        watch(buffer, registry)
        buffer.add_many(experiences(2))
        buffer.search_index(v_embed=np.ones(8), k=1)
        families = [family.name for family in registry.collect()]
    for name in families:
        assert f"`{name}`" in readme or f"`{name}_total`" in readme, name
