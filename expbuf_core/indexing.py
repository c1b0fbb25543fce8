"""Choosing an index backend, opening what the builder published, and building it.

`build` is what both the builder process and the builder thread do: cut the live vectors into a
large and a small segment, write them aside, replace the manifest. It needs no lock that a reader or
writer waits for; killed at any instant it leaves the old set in place.
"""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from expbuf_core import control as c
from expbuf_core import segments
from expbuf_core.config_schema import BufferConfig
from expbuf_core.contracts import IndexBackend, IndexContext
from expbuf_core.errors import (
    BackendUnavailable,
    CorruptionError,
    PluginError,
    StorageError,
)
from expbuf_core.filesystem import FileSystem
from expbuf_core.plugins import PluginRegistry
from expbuf_core.replica import Replica
from expbuf_core.segments import Manifest, OpenSegment, SegmentInfo

_log = logging.getLogger("expbuf")
_CHUNK = 1 << 14
_TRIES = 5
_MAX_DEAD = 0.25


class IndexChoice:
    """The index backends of one buffer, made when they are first needed.

    Args:
        config: Says which, and what to fall back to.
        registry: Has them.
        context: Dimension, metric, seed.
    """

    def __init__(
        self, config: BufferConfig, registry: PluginRegistry, context: IndexContext
    ) -> None:
        self._config = config
        self._registry = registry
        self.context = context
        self._made: dict[str, IndexBackend] = {}
        self._chosen: str | None = None

    def make(self, name: str) -> IndexBackend:
        """The backend of this name.

        Raises:
            PluginError: It is not installed or cannot run here.
        """
        backend = self._made.get(name)
        if backend is None:
            provider = self._registry.get("index", name)
            settings = self._registry.settings("index", name, self._config.index.section(name))
            try:
                backend = provider.factory(settings, self.context)
            except (ImportError, RuntimeError, OSError) as exc:
                if isinstance(exc, PluginError):
                    raise
                raise BackendUnavailable(
                    f"the index backend {name!r} cannot run here: {type(exc).__name__}: {exc}"
                ) from exc
            self._made[name] = backend
        return backend

    def filters(self, name: str) -> bool:
        """Whether the backend leaves rows out by itself."""
        return "filter" in self._registry.get("index", name).capabilities

    def chosen(self) -> str:
        """Name of the configured backend, or of the first fallback that works.

        Raises:
            BackendUnavailable: None of them does.
        """
        if self._chosen is None:
            self._chosen = self._choose()
        return self._chosen

    def _choose(self) -> str:
        wanted = self._config.index.backend
        names = [wanted, *(n for n in self._config.index.fallback if n != wanted)]
        errors: list[str] = []
        first: Exception | None = None
        for name in names:
            try:
                self.make(name)
            except PluginError as exc:
                errors.append(f"{name}: {exc}")
                first = first or exc
                continue
            if errors:
                reason = errors[0]
                _log.warning(
                    "index backend %r is not used, %r takes over: %s", wanted, name, reason
                )
                self._registry.fire(
                    "expbuf_on_fallback", kind="index", wanted=wanted, used=name, reason=reason
                )
            return name
        if len(names) == 1 and first is not None:
            raise first
        raise BackendUnavailable("no index backend can run here: " + "; ".join(errors)) from first

    def after_fork(self) -> None:
        """Tell the backends that this is a forked child."""
        for backend in self._made.values():
            backend.after_fork()


def representation(settings: dict[str, object]) -> str:
    """What the fused vectors of a buffer are made by; segments of another are not used."""
    return repr((settings.get("fusion"), settings.get("representation", 0)))


def load(
    folder: Path, replica: Replica, choice: IndexChoice
) -> tuple[Manifest | None, tuple[OpenSegment, ...]]:
    """Open the published segments; none where they are missing, damaged, or not of this buffer.

    Nothing is lost by that: the vectors are in the payloads, and searches stay exact.
    """
    for _ in range(_TRIES):
        manifest, opened = _load_once(folder, replica, choice)
        if manifest is None or len(opened) == len(manifest.segments):
            return manifest, opened
    return None, ()


def _load_once(
    folder: Path, replica: Replica, choice: IndexChoice
) -> tuple[Manifest | None, tuple[OpenSegment, ...]]:
    with replica.lock:
        settings, live = replica.state.settings, replica.state.live_ids()
    manifest = None
    try:
        manifest = segments.read_manifest(folder)
        if manifest is None:
            return None, ()
        stale = (
            manifest.lsn > replica.control.published()
            or manifest.dim != choice.context.dim
            or manifest.metric != choice.context.metric
            or manifest.representation != representation(settings)
        )
        if stale:
            return None, ()
        opened = tuple(
            segments.open_segment(
                folder,
                info,
                manifest.dim,
                choice.make(info.backend),
                live,
                filters=choice.filters(info.backend),
            )
            for info in manifest.segments
        )
    except (CorruptionError, PluginError, ValueError, RuntimeError) as exc:
        _log.warning("the index is not used and will be built again: %s", exc)
        return None, ()
    except StorageError as exc:
        if isinstance(exc.__cause__, FileNotFoundError):
            return manifest, ()  # the builder has replaced it meanwhile: look again
        raise
    return manifest, opened


def plan(replica: Replica, growth: float) -> tuple[list[OpenSegment], NDArray[np.int64]]:
    """Which segments stay, and which ids go into a new one.

    Two levels: what is new goes into a small segment with what the last small one held; when that
    or the dead rows reach `growth` of the large one, all become one.
    """
    state, tiers = replica.state, replica.tiers
    live = state.live_ids()
    kept: list[OpenSegment] = []
    if tiers.segments:
        large = tiers.segments[0]
        alive = large.info.rows - large.dead
        rest = len(live) - alive
        if rest <= growth * large.info.rows and large.dead <= _MAX_DEAD * large.info.rows:
            kept = [large]
    inside = np.zeros(len(live), bool)
    for segment in kept:
        inside |= (live >= segment.info.first_id) & (live < segment.info.end_id)
    return kept, live[~inside]


def build(
    folder: Path,
    replica: Replica,
    choice: IndexChoice,
    fs: FileSystem,
    uuid: bytes,
    growth: float,
) -> Manifest:
    """Build segments of everything up to the replica's LSN and publish them.

    The caller holds the builder lock, and the log is durable up to that LSN.
    """
    with replica.lock:
        lsn = replica.state.lsn
        end_id = replica.state.next_id
        kept, ids = plan(replica, growth)
        settings = representation(replica.state.settings)
        missing = int(np.count_nonzero(~replica.tiers.holds(ids)))
        gather = replica.tiers.gatherer(choice.context.dim)
    if missing:
        raise StorageError(f"{folder}: {missing} live experiences have no vector in any tier")
    previous = segments.read_manifest_or_none(folder)
    published = replica.control.words[c.INDEX_GENERATION]
    generation = max(previous.generation if previous else 0, published) + 1
    infos: list[SegmentInfo] = [segment.info for segment in kept]
    if len(ids):
        name = choice.chosen()
        infos.append(
            segments.write_segment(
                folder,
                f"{generation:06d}",
                uuid=uuid,
                ids=ids,
                vectors=(gather(ids[i : i + _CHUNK]) for i in range(0, len(ids), _CHUNK)),
                dim=choice.context.dim,
                end_id=end_id,
                backend_name=name,
                backend=choice.make(name),
                fs=fs,
            )
        )
    manifest = Manifest(
        lsn=lsn,
        generation=generation,
        dim=choice.context.dim,
        metric=choice.context.metric,
        representation=settings,
        segments=tuple(infos),
    )
    fs.mkdir(folder / segments.FOLDER)
    segments.write_manifest(folder, manifest, fs)
    replica.control.words[c.INDEX_GENERATION] = generation
    segments.drop_unlisted(folder, manifest, fs)
    return manifest
