"""Choosing an index backend, opening what the builder published, and building it.

`build` is what both the builder process and the builder thread do: cut the live vectors into a
large and a small segment, write them aside, replace the manifest. It needs no lock that a reader or
writer waits for; killed at any instant it leaves the old set in place.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import threading
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from expbuf_core import control as c
from expbuf_core import segments
from expbuf_core.config_schema import BufferConfig
from expbuf_core.contracts import IndexBackend, IndexContext
from expbuf_core.crc import crc32
from expbuf_core.documents import MALFORMED, read_document
from expbuf_core.errors import (
    BackendUnavailable,
    CorruptionError,
    ExpbufError,
    PluginContractError,
    PluginError,
    StorageError,
)
from expbuf_core.filesystem import FileSystem, is_missing, storage_errors
from expbuf_core.plugins import PluginRegistry
from expbuf_core.replica import Replica
from expbuf_core.segments import Manifest, OpenSegment, SegmentInfo
from expbuf_core.tiers import Gatherer

_log = logging.getLogger("expbuf")
_CHUNK = 1 << 14
_TRIES = 5
_MAX_DEAD = 0.25
_FANOUT = 4  # more: fewer segments to search, and each row is written more often
TARGET = "target.json"
# Of this process or machine, at this moment: says nothing of the files.
_SHORTAGE = {errno.EMFILE, errno.ENFILE, errno.ENOMEM}


class IndexChoice:
    """The index backends of one buffer, made when they are first needed.

    Args:
        config: Says which, and what to fall back to.
        registry: Has them.
        context: Dimension, metric, seed.
        representation: Number of that which the vectors are of.

    Attributes:
        unopened: The segments that were published last could not be used.
        damaged: Because they are damaged or missing, for whoever tries.
    """

    def __init__(
        self,
        config: BufferConfig,
        registry: PluginRegistry,
        context: IndexContext,
        representation: int = 0,
    ) -> None:
        self._config = config
        self._registry = registry
        self.context = context
        self.representation = representation
        self._made: dict[str, IndexBackend] = {}
        self._chosen: str | None = None
        self.unopened = self.damaged = False
        if not config.index.fallback:  # this backend or none: tell now, not when it is built
            self.chosen()

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
                backend = provider.factory(settings, self._context_of(name))
            except ExpbufError:
                raise
            except Exception as exc:
                raise BackendUnavailable(
                    f"the index backend {name!r} cannot run here: {type(exc).__name__}: {exc}"
                ) from exc
            if not isinstance(backend, IndexBackend):
                raise PluginContractError(
                    f"the index backend {name!r} made a {type(backend).__name__}; expected an "
                    "IndexBackend"
                )
            self._made[name] = backend
        return backend

    def _context_of(self, name: str) -> IndexContext:
        """The context, and what may take the place of this backend."""
        names = self._in_order()
        after = names[names.index(name) + 1 :] if name in names else names
        return replace(
            self.context, fallback=tuple(after), on_fallback=partial(self._fell_back, name)
        )

    def _in_order(self) -> list[str]:
        wanted = self._config.index.backend
        return [wanted, *(n for n in self._config.index.fallback if n != wanted)]

    def _fell_back(self, wanted: str, used: str, reason: str) -> None:
        """A backend goes on in another way; it may hold any lock, so observers get a thread."""
        _warn_of_fallback(wanted, used, reason)
        if "expbuf_on_fallback" in self._registry.events:
            facts = {"kind": "index", "wanted": wanted, "used": used, "reason": reason}
            thread = threading.Thread(
                target=self._registry.fire,
                args=("expbuf_on_fallback",),
                kwargs=facts,
                name="expbuf-fallback",
            )
            with contextlib.suppress(RuntimeError):  # there is none to be had; the log has it
                thread.start()

    def can(self, name: str, capability: str) -> bool:
        """Whether the backend declares a capability."""
        return capability in self._registry.get("index", name).capabilities

    def chosen(self) -> str:
        """Name of the configured backend, or of the first fallback that works.

        Raises:
            BackendUnavailable: None of them does.
        """
        if self._chosen is None:
            self._chosen = self._choose()
        return self._chosen

    def _choose(self) -> str:
        names = self._in_order()
        wanted = names[0]
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
                _warn_of_fallback(wanted, name, reason)
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


def _warn_of_fallback(wanted: str, used: str, reason: str) -> None:
    _log.warning("index backend %r is not used, %r takes over: %s", wanted, used, reason)


def write_target(home: Path, settings: Mapping[str, object], fs: FileSystem) -> None:
    """Note the settings for which an index is being made here, with their fused dimension."""
    text = json.dumps(settings, sort_keys=True)
    document = json.dumps({"settings": settings, "crc": crc32(text.encode())}, indent=1)
    with storage_errors("write", home / TARGET):
        fs.mkdir(home)
        fs.sync_folder(home.parent)
        fs.write_atomically(home / TARGET, [document.encode()])


def read_target(home: Path) -> dict[str, Any] | None:
    """What `write_target` noted; None where that is nothing, or damaged."""
    try:
        document = read_document(home / TARGET)
        if document is None:
            return None
        text = json.dumps(document["settings"], sort_keys=True)
        return dict(document["settings"]) if document["crc"] == crc32(text.encode()) else None
    except (OSError, *MALFORMED):
        return None


def representation(settings: Mapping[str, object]) -> str:
    """What the fused vectors of a buffer are made by; segments of another are not used."""
    return repr((settings.get("fusion"), settings.get("representation", 0)))


def load(
    folder: Path,
    replica: Replica,
    choice: IndexChoice,
    settings: Mapping[str, object] | None = None,
    *,
    hurry: bool = False,
) -> tuple[Manifest | None, tuple[OpenSegment, ...]]:
    """Open the published segments; none where they are missing, damaged, or not of this buffer.

    Nothing is lost by that: the vectors are in the payloads, and searches stay exact.

    Args:
        folder: Of the buffer.
        replica: Whose live experiences are searched.
        choice: Opens them; it and the settings are of one representation.
        settings: Of the buffer; default: those that the replica has.
        hurry: See `segments.open_segment`.
    """
    for _ in range(_TRIES):
        choice.unopened = choice.damaged = False
        manifest, opened = _load_once(folder, replica, choice, settings, hurry)
        if manifest is None or len(opened) == len(manifest.segments):
            segments.sketch_small_ones(opened, choice.context.metric)
            return manifest, opened
    choice.unopened = choice.damaged = True
    _log.warning("files of the index are missing; it is not used and will be built again")
    return None, ()


def _load_once(
    folder: Path,
    replica: Replica,
    choice: IndexChoice,
    settings: Mapping[str, object] | None,
    hurry: bool,
) -> tuple[Manifest | None, tuple[OpenSegment, ...]]:
    home = segments.home(folder, choice.representation)
    manifest = None
    try:
        manifest = segments.read_manifest(home)
        if manifest is None:
            if replica.control.words[c.INDEX_GENERATION] and not choice.representation:
                choice.unopened = choice.damaged = True  # there was one
            return None, ()
        with replica.lock:
            state, tiers = replica.state, replica.tiers
            stale = (
                manifest.lsn > replica.control.published()
                or manifest.dim != choice.context.dim
                or manifest.metric != choice.context.metric
                or manifest.representation != representation(settings or state.settings)
            )
            if stale:
                choice.unopened = True
                return None, ()
            # What is open already is the same object in the next set: its rows only ever go out.
            same = tiers.representation == choice.representation
            there = {segment.info: segment for segment in tiers.segments} if same else {}
            new = [info for info in manifest.segments if info not in there]
            # Only so many ids as there may be in them: searches wait meanwhile.
            live = state.live_ids(min((info.first_id for info in new), default=state.next_id))
            next_id, watch = state.next_id, tiers.watch()
        opened = tuple(
            there.get(info)
            or segments.open_segment(
                home,
                info,
                manifest.dim,
                choice.make(info.backend),
                live,
                next_id=next_id,
                filters=choice.can(info.backend, "filter"),
                verifies=choice.can(info.backend, "verifies"),
                watch=watch,
                hurry=hurry,
                metric=manifest.metric,
            )
            for info in manifest.segments
        )
    except (CorruptionError, PluginError, ValueError, RuntimeError) as exc:
        _log.warning("the index is not used and will be built again: %s", exc)
        choice.unopened = True
        choice.damaged = isinstance(exc, CorruptionError)
        return None, ()
    except OSError as exc:
        if is_missing(exc):
            return manifest, ()  # the builder has replaced it meanwhile: look again
        if exc.errno in _SHORTAGE:
            raise
        _log.warning("the index is not used and will be built again: %s", exc)
        choice.unopened = choice.damaged = True
        return None, ()
    return manifest, opened


def plan(
    opened: tuple[OpenSegment, ...], live: NDArray[np.int64], growth: float, batch: int
) -> tuple[list[OpenSegment], NDArray[np.int64]]:
    """Which segments stay, and which ids go into a new one.

    The large segment is built anew when the rest, or its dead rows, reach `growth` of it. The rest
    lies in levels, each `_FANOUT` times as large as the one before: what is new goes into the
    lowest together with what that held, and where this is too much for a level, into the next. So
    a row is written again a few times on each level, however many rows there are.

    Args:
        opened: The segments, the oldest first.
        live: (n,) ids, rising.
        growth: Of the large segment.
        batch: Rows that are new at an ordinary build.
    """
    kept = _unspoilt(opened)
    if kept:
        large = kept[0]
        rest = len(live) - (large.info.rows - large.dead)
        if rest > growth * large.info.rows:
            kept = []
    inside = np.zeros(len(live), bool)
    for segment in kept:
        inside |= (live >= segment.info.first_id) & (live < segment.info.end_id)
    moving = len(live) - int(np.count_nonzero(inside))
    while len(kept) > 1:
        newest = kept[-1]
        alive = newest.info.rows - newest.dead
        if _level(alive, batch) > _level(moving, batch):
            break
        moving += alive
        kept.pop()
        inside &= live < newest.info.first_id
    return kept, live[~inside]


def _unspoilt(opened: tuple[OpenSegment, ...]) -> list[OpenSegment]:
    """Segments before the first in which too much is dead."""
    kept: list[OpenSegment] = []
    for segment in opened:
        if segment.dead > _MAX_DEAD * segment.info.rows:
            break
        kept.append(segment)
    return kept


def _level(rows: int, batch: int) -> int:
    """Where a segment of so many rows belongs."""
    level, most = 0, _FANOUT * batch
    while rows > most:
        level, most = level + 1, most * _FANOUT
    return level


def _gathered(gather: Gatherer, ids: NDArray[np.int64]) -> Iterator[NDArray[np.float32]]:
    for start in range(0, len(ids), _CHUNK):
        yield gather(ids[start : start + _CHUNK])
    gather.check()  # before they get a checksum of their own


def build(
    folder: Path,
    replica: Replica,
    choice: IndexChoice,
    fs: FileSystem,
    uuid: bytes,
    growth: float,
    batch: int,
    *,
    anew: bool = False,
) -> Manifest | None:
    """Build segments of everything up to the replica's LSN and publish them.

    The caller holds the builder lock, and the log is durable up to that LSN.

    Args:
        folder: Of the buffer.
        replica: Has the vectors.
        choice: Builds.
        fs: Writes.
        uuid: Of the buffer.
        growth: Of the large segment, by which it is built anew.
        batch: Rows that are new at an ordinary build.
        anew: Keep no segment that is there.

    Returns:
        What was published; None where the representation has changed since the choice was made.

    Raises:
        CorruptionError: A segment that is open has changed since.
    """
    with replica.lock:
        if replica.tiers.representation != choice.representation:
            return None
        lsn = replica.state.lsn
        end_id = replica.state.next_id
        live, opened = replica.state.live_ids(), replica.tiers.segments
        settings = representation(replica.state.settings)
        gather, holds = replica.tiers.gatherer(choice.context.dim), replica.tiers.holder()
    # Without the lock: on a large buffer this takes longer than a search may wait.
    kept, ids = ([], live) if anew else plan(opened, live, growth, batch)
    missing = int(np.count_nonzero(~holds(ids)))
    if missing:
        raise StorageError(f"{folder}: {missing} live experiences have no vector in any tier")
    home = segments.home(folder, choice.representation)
    segments.clear_the_way(home, fs)
    previous = segments.read_manifest_or_none(home)
    published = replica.control.words[c.INDEX_GENERATION]
    generation = max(previous.generation if previous else 0, published) + 1
    infos: list[SegmentInfo] = [segment.info for segment in kept]
    if len(ids):
        name = choice.chosen()
        infos.append(
            segments.write_segment(
                home,
                f"{generation:06d}",
                uuid=uuid,
                ids=ids,
                vectors=_gathered(gather, ids),
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
    fs.mkdir(home)
    segments.write_manifest(home, manifest, fs)
    replica.control.words[c.INDEX_GENERATION] = generation
    segments.drop_unlisted(home, manifest, fs)
    # Of higher numbers somebody may be making one just now.
    segments.drop_representations(folder, lambda number: number < choice.representation, fs)
    return manifest
