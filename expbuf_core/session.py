"""An open buffer of one process: what `ExperienceBuffer` holds on to.

In one object, which a forked child throws away and makes anew.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import threading
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, cast

import numpy as np

from expbuf_core import codec, folder, indexing, recovery
from expbuf_core import control as c
from expbuf_core.commit import Addition, CommitLog, Draft, Lock
from expbuf_core.config_schema import BufferConfig
from expbuf_core.contracts import (
    EmbeddingFusion,
    IndexContext,
    LogGone,
    PersistenceAdapter,
    PriorityScorer,
)
from expbuf_core.control import Control
from expbuf_core.embeddings import fused_dim
from expbuf_core.errors import (
    BufferClosed,
    BufferReplaced,
    ConfigError,
    CorruptionError,
    DimensionError,
    PluginError,
    ReadOnlyBuffer,
    StorageError,
)
from expbuf_core.filesystem import FileSystem
from expbuf_core.intake import Accepted, Intake
from expbuf_core.locks import OpenLock, ProcessLock, ThreadLock, registry_is_mine
from expbuf_core.opening import open_session
from expbuf_core.plain_adds import PlainAdds
from expbuf_core.plugins import PluginRegistry
from expbuf_core.recovery import RecoveryReport
from expbuf_core.replica import Replica
from expbuf_core.segments import Manifest, OpenSegment
from expbuf_core.upkeep import Upkeep

_log = logging.getLogger("expbuf")
_TRIES = 10
_POLL_S = 1e-3
CHANGING = 1 << 32  # in the control word REPRESENTATION: a change is under way


class Prepared(NamedTuple):
    """The index of a representation that is about to count, open."""

    choice: indexing.IndexChoice
    manifest: Manifest
    opened: tuple[OpenSegment, ...]


class Outdated(Exception):
    """An add was fused for a representation that the buffer has left; it was not stored."""


class _LetGo:
    """Stands where a closed session had what takes memory."""

    def __getattr__(self, name: str) -> NoReturn:
        raise BufferClosed("the buffer is closed; open it again")


class Session:
    """Attributes without a value here are set while it opens, and stay until `close`."""

    adapter: PersistenceAdapter
    control: Control
    replica: Replica
    commit_log: CommitLog
    maintenance: Lock
    builder_lock: Lock
    recovery: RecoveryReport

    def __init__(
        self,
        path: Path | None,
        config: BufferConfig,
        registry: PluginRegistry,
        *,
        mode: str,
        lock: AbstractContextManager[object] | None,
        fs: FileSystem,
    ) -> None:
        self.path = path
        self.config = config
        self.registry = registry
        self.mode = mode
        self.fs = fs
        self.uuid = b""
        self.outer_lock = lock
        self.open_lock: OpenLock | None = None
        self.opening_lock: ProcessLock | None = None
        self.locks: list[Lock | OpenLock] = []
        self.choice: indexing.IndexChoice | None = None
        self.closed = False
        self.abandoned = False  # by a forked child
        self._adapter_closed = self._gone = False
        self._closing = threading.RLock()
        # Of a reader, which has no share in the open lock: which recovery it follows, and the
        # control page on which it sees that a writer has come.
        self.generation = 0
        self.watched: Control | None = None
        self.adapter_words: memoryview | None = None  # a part of the control page's words
        self._intake: Intake | None = None
        self.plain_adds: PlainAdds | None = None
        self.asks_for_plain_adds = False
        # In memory only threads can meet, and they have to meet at one lock.
        in_memory, timeout = path is None, config.lock_timeout_s
        self._representation_lock: Lock | None = ThreadLock(timeout) if in_memory else None
        self._change_lock = ThreadLock(timeout)
        self.prepared: Prepared | None = None
        self.any_fusion = False  # opened to change it
        self.control_path = "" if path is None else str(path / folder.CONTROL)
        self._control_inode = 0
        self.fusion: EmbeddingFusion = self._make_plugin("fusion", config.fusion)
        self._fused_by = self.fusion_settings()
        self.scorer: PriorityScorer = self._make_plugin("priority", config.priority)
        self.upkeep = Upkeep(self)

    def _make_plugin(self, kind: Any, choice: Any) -> Any:
        settings = self.registry.settings(kind, choice.backend, choice.section(choice.backend))
        return self.registry.make(kind, choice.backend, settings)

    def fusion_settings(self) -> dict[str, Any]:
        """The configured fusion, as it is logged."""
        choice = self.config.fusion
        settings = self.registry.settings("fusion", choice.backend, choice.section(choice.backend))
        return {
            "name": choice.backend,
            "version": int(self.fusion.version),
            "settings": settings.model_dump(mode="json"),
        }

    @functools.cached_property
    def name(self) -> str:
        """Of the buffer, in receipts."""
        return self.uuid[:8].hex()

    def open(self) -> None:
        """Create, recover or join the buffer."""
        self.recovery = report = open_session(self)
        self._choose_index()
        self.upkeep.tell_damage()
        self.registry.fire(
            "expbuf_on_recovered",
            path=str(self.path or ""),
            lsn=report.lsn,
            count=report.experiences,
            seconds=report.seconds,
        )

    @property
    def writable(self) -> bool:
        """Whether this session may write."""
        return self.mode != "r"

    # ------------------------------------------------------------ the folder's identity

    def lock_file(self, name: str) -> ProcessLock:
        """The folder's lock of that name, which is let go of with the session."""
        assert self.path is not None
        lock = ProcessLock(self.path / folder.LOCKS / name, self.config.lock_timeout_s)
        self.locks.append(lock)
        return lock

    def map_control(self, path: Path) -> None:
        """Map the control page, and remember which file it is."""
        self.control = Control.map(path / folder.CONTROL, writable=True)
        self._control_inode = os.stat(self.control_path).st_ino

    def check_folder(self) -> None:
        """See that the folder is the one that was opened (append lock held)."""
        if self.path is None:
            return
        try:
            found = os.stat(self.control_path)
        except OSError as exc:
            raise BufferReplaced(
                f"{self.path}: the folder was removed or replaced while it was open ({exc}); open "
                "the buffer again"
            ) from exc
        if found.st_ino != self._control_inode:
            raise BufferReplaced(
                f"{self.path}: the folder was replaced while it was open; open the buffer again"
            )
        # Its words say where to write. Somebody who copies files into the folder, or cuts them,
        # changes them under all who have it open.
        if found.st_size < c.PAGE_BYTES or self.control.words[c.GENERATION] != self.generation:
            raise c.not_ours(self.control_path)

    def is_replaced(self) -> bool:
        """Whether another buffer, or none, is at the path."""
        if self.path is None:
            return False
        try:
            identity = folder.read_identity(self.path)
        except StorageError:
            return False
        return identity is None or identity.uuid != self.uuid

    # ------------------------------------------------------------ reading and writing

    def refresh(self) -> None:
        """See what has been published, and what the builder has swapped in."""
        if self.mode == "r":
            self._refresh_reader()
        else:
            self._refresh_replica()
        replica = self.replica
        if replica.evicted:
            evicted, replica.evicted = replica.evicted, 0
            self.registry.fire(
                "expbuf_on_evicted",
                path=str(self.path or ""),
                lsn=replica.state.lsn,
                count=evicted,
            )
        if replica.incomplete:
            self._meet_representation()
        if self.path is not None and self._intake is not None and replica.index_is_stale():
            self.upkeep.adopt_later()
        if replica.tiers.is_short():
            self.upkeep.take_memory()

    def _refresh_replica(self) -> None:
        try:
            self.replica.refresh()
        except LogGone:
            self._start_anew()

    def _refresh_reader(self) -> None:
        """The same without a share in the open lock.

        All writers may die, and others recover, between any two looks at the control page. What
        was read by looks at both is not believed.
        """
        deadline, meddled = time.monotonic() + self.config.lock_timeout_s, self.replica.broken
        while True:
            settled = self._follow_writers()
            if settled:
                try:
                    self._refresh_replica()
                except StorageError:
                    if not self._is_overtaken():
                        raise
                else:
                    if not self._is_overtaken():
                        return
                meddled = True
            elif not meddled:
                return  # until the recovery is through things are as they were
            if time.monotonic() > deadline:
                raise StorageError(
                    f"{self.path}: is being recovered by another process, for longer than "
                    "lock_timeout_s; try again"
                )
            if not settled:
                time.sleep(_POLL_S)

    def _is_overtaken(self) -> bool:
        """Whether a recovery has begun since writers were looked for."""
        return (self.watched or self.control).words[c.GENERATION] != self.generation

    def _follow_writers(self) -> bool:
        """Notice that writers came, or came anew; False while one is still recovering."""
        assert self.path is not None
        page = self.watched
        if page is None and not self.control.is_mapped():
            page = self.watched = Control.map_existing(self.path / folder.CONTROL)
        page = page or self.control
        generation = page.words[c.GENERATION]
        if generation == self.generation:
            return True
        if generation == 0:
            return False
        page.check(self.path / folder.CONTROL, self.uuid)
        self.generation = generation
        self.watched = None
        self.control = self.replica.control = page
        self.adapter.attach()
        self.replica.broken = True  # of another generation: `_start_anew` makes it anew
        return True

    def _start_anew(self) -> None:
        """Load the newest snapshot and follow from there.

        The log behind this replica is gone, or an exception has left it half-way.
        """
        with self.replica.lock:
            if self.path is None:
                self.upkeep.load_base()
            else:
                recovery.follow_from_snapshot(self.replica, self.path)
            self.load_index()

    def catch_up_after_deletion(self, attempt: int) -> None:
        """A payload that this replica believes in is deleted: see what has happened since."""
        self.refresh()
        if attempt and self.path is not None:
            self._start_anew()

    def payloads_gone(self, gone: LogGone | None) -> CorruptionError:
        """The error where payloads are still gone after this replica has caught up.

        Args:
            gone: What the adapter said last.
        """
        path = self.path if gone is None or gone.path is None else Path(gone.path)
        what = "payloads of live experiences are gone"
        if path is not None and not path.exists():
            what = "missing, with payloads of live experiences"
        return CorruptionError(f"{path or 'storage'}: {what}; run `expbuf verify`", path=path)

    def tell_corruption(self, exc: CorruptionError) -> None:
        """Tell observers of damage, before the error reaches the caller."""
        self.registry.fire(
            "expbuf_on_corruption",
            path=exc.path or str(self.path or ""),
            offset=-1 if exc.offset is None else exc.offset,
            error=str(exc),
        )

    def add(self, intake: Intake, accepted: Accepted) -> int:
        """Write one experience, and apply it here when the next read needs it.

        Returns:
            Its id.

        Raises:
            Outdated: The representation has changed since it was accepted: accept it again.
        """
        work = Addition(intake, accepted)
        return self._commit(work, codec.ADD, 1, intake.representation)[1]

    def commit(self, draft: Draft) -> tuple[int, int, int]:
        """Write an operation and apply it here.

        Returns:
            Its LSN, the id of its first row, and to how many experiences it applied.

        Raises:
            Outdated: The representation has changed since an add was drafted: draft it again.
        """
        kind = draft.operation.kind
        representation = (
            codec.add_representation(draft.operation.body) if kind == codec.ADD else None
        )
        return self._commit(draft, kind, len(draft.content_crcs), representation)

    def _commit(
        self, work: Draft | Addition, kind: int, count: int, representation: int | None
    ) -> tuple[int, int, int]:
        if self.mode == "r":
            raise ReadOnlyBuffer(f"{self.path} is open in mode 'r'; open it in mode 'a' to write")
        listening = "expbuf_on_committed" in self.registry.events
        started = time.monotonic() if listening else 0.0
        if representation is not None and self.control.words[c.REPRESENTATION] != representation:
            self._check_representation(representation)
        lsn, first_id = self.commit_log.commit(work)
        if representation is not None:
            self.finish_add(lsn, first_id, count, representation)
        else:
            self.refresh()
            count = self.replica.counts.pop(lsn, 0)
        if listening:
            self.registry.fire(
                "expbuf_on_committed",
                path=str(self.path or ""),
                lsn=lsn,
                kind=codec.KIND_NAMES[kind],
                count=count,
                seconds=time.monotonic() - started,
            )
        return lsn, first_id, count

    def finish_add(self, lsn: int, first_id: int, count: int, representation: int) -> None:
        """See that an add that is written counts, and apply it if the next read should not.

        Raises:
            Outdated: It does not: a change of the representation has come first.
        """
        # Asked again: a change may have begun in between, and its operation come first.
        if self.control.words[c.REPRESENTATION] != representation:
            self._check_overtaken(lsn, first_id, count)
        if count > 1 or not self.replica.may_lag():
            self.refresh()

    # ------------------------------------------------------------ representation

    def change_lock(self) -> Lock:
        """Held by whoever makes a change of the representation; to be closed."""
        if self.path is None:
            return self._change_lock
        return ProcessLock(self.path / folder.LOCKS / "reindex", self.config.lock_timeout_s)

    def representation_lock(self) -> Lock:
        """Held while a change comes to count; adds wait for it meanwhile."""
        if self._representation_lock is None:
            self._representation_lock = self.lock_file("representation")
        return self._representation_lock

    def _settle_representation(self) -> None:
        """See what the representation is, once no change is under way.

        Whoever began one may have died: what the log says counts.
        """
        with self.representation_lock():
            self.commit_log.sync()
            self.refresh()
            self.control.words[c.REPRESENTATION] = self.replica.state.representation

    def _check_representation(self, representation: int) -> None:
        self._settle_representation()
        if self.replica.state.representation != representation:
            raise Outdated

    def _check_overtaken(self, lsn: int, first_id: int, count: int) -> None:
        # It is published, and what stands before it in the log decides: nobody need be waited for.
        self.refresh()
        with self.replica.lock:
            if self.replica.was_refused(lsn, first_id, count):
                raise Outdated

    def use_fusion(self, stored: Mapping[str, Any]) -> None:
        """Fuse as the buffer does, whatever this process is configured for.

        Raises:
            PluginError: That fusion is not installed.
            ConfigError: Another version of it is.
        """
        name = stored["name"]
        settings = self.registry.settings("fusion", name, stored["settings"])
        fusion: EmbeddingFusion = self.registry.make("fusion", name, settings)
        if int(fusion.version) != stored["version"] and not self.any_fusion:
            raise ConfigError(
                f"the fusion {name!r} of {self.path or 'the buffer'} has version "
                f"{stored['version']}, the installed one {fusion.version}; change the buffer by "
                "`expbuf reindex`",
                key="fusion",
            )
        self.fusion, self._fused_by = fusion, dict(stored)

    def _follow_fusion(self) -> None:
        stored = self.replica.state.settings["fusion"]
        if stored != self._fused_by:
            self.use_fusion(stored)

    def _meet_representation(self) -> None:
        """Go over to the representation that the log has changed to."""
        with self.replica.lock:
            if self.replica.incomplete:
                self.load_index()

    # ------------------------------------------------------------ dimensions

    def intake(self, v: Any = None, q: Any = None) -> Intake | None:
        """What checks input; None while the buffer has no dimensions and none are given.

        Args:
            v: A visual embedding to take the dimension from, if the buffer has none yet.
            q: The same for the question.
        """
        if self._intake is not None:
            return self._intake
        self.refresh()
        settings = self.replica.state.settings
        if settings["v_dim"] is None or settings["q_dim"] is None:
            if v is None and q is None:
                return None
            self._fix_dimensions(v, q)
        with self.replica.lock:
            intake = self._make_intake()
        self._choose_index()
        return intake

    def _choose_index(self) -> None:
        """See now whether a fallback takes the place of the configured index, and tell (no lock).

        Where none can, whoever builds meets the error; until then searches are exact.
        """
        if self.choice is not None and self.path is not None:
            with contextlib.suppress(PluginError):
                self.choice.chosen()

    def _make_intake(self) -> Intake:
        """Make what is fused here of the representation that counts now (replica lock held)."""
        self._follow_fusion()
        settings = self.replica.state.settings
        v_dim, q_dim, metric = int(settings["v_dim"]), int(settings["q_dim"]), settings["metric"]
        dim = self._fused_dim(v_dim, q_dim)
        representation = self.replica.state.representation
        self.choice = self.index_choice(dim, metric, representation)
        self._intake = Intake(
            v_dim=v_dim,
            q_dim=q_dim,
            metric=metric,
            fusion=self.fusion,
            scorer=self.scorer,
            names=(self._fused_by["name"], self.config.priority.backend),
            max_experience_bytes=self.config.max_experience_bytes,
            max_commit_bytes=self.config.max_commit_bytes,
            representation=representation,
        )
        self.plain_adds, self.asks_for_plain_adds = None, True
        return self._intake

    def begin_plain_adds(self, inside: set[int]) -> None:
        """Have native code do the adds that follow, where it can.

        Args:
            inside: Threads that are in the middle of a call of the buffer.
        """
        with self.replica.lock:
            if self.asks_for_plain_adds and self._intake is not None:
                self.plain_adds = PlainAdds.begin(self, self._intake, inside)
                self.asks_for_plain_adds = False

    def index_choice(self, dim: int, metric: str, representation: int) -> indexing.IndexChoice:
        """The configured index backends, for vectors of a representation."""
        index = self.config.index
        context = IndexContext(
            dim=dim, metric=metric, seed=index.seed, target_recall=index.target_recall
        )
        return indexing.IndexChoice(self.config, self.registry, context, representation)

    def _fused_dim(self, v_dim: int, q_dim: int) -> int:
        try:
            return fused_dim(self.fusion, v_dim, q_dim, self._fused_by["name"])
        except ValueError as exc:
            raise ConfigError(str(exc), key="fusion") from exc

    def _fix_dimensions(self, v: Any, q: Any) -> None:
        """The first add decides the dimensions, for all processes."""
        settings = dict(self.replica.state.settings)
        for name, embedding in (("v_dim", v), ("q_dim", q)):
            if settings[name] is None:
                settings[name] = _last_dim(embedding)
        self._fused_dim(settings["v_dim"], settings["q_dim"])
        with self.maintenance:
            # Another process may have been first; its operation is then published already.
            if self.writable:
                self.commit_log.sync()
            self.refresh()
            current = self.replica.state.settings
            if current["v_dim"] is None or current["q_dim"] is None:
                self.commit(Draft(codec.encode_settings(settings), weight=0))

    def load_index(self) -> None:
        """At opening: open the segments, and fuse again what neither they nor the log hold."""
        replica = self.replica
        with replica.lock:
            words = self.control.words
            for _ in range(_TRIES):
                self._follow_fusion()
                if None in replica.state.dims:
                    replica.incomplete = replica.broken = False  # there is nothing in it
                    return
                intake = self._intake
                if intake is None or self._is_outdated():
                    intake = self._make_intake()
                assert self.choice is not None
                if self.path is None:
                    replica.fill(intake.refuse)
                    replica.incomplete = replica.broken = False
                    return
                manifest, opened = self._next_index() or indexing.load(
                    self.path, replica, self.choice, hurry=True
                )
                if manifest is not None and self.writable:
                    words[c.INDEX_GENERATION] = max(words[c.INDEX_GENERATION], manifest.generation)
                replica.adopt(manifest, opened, words[c.INDEX_GENERATION])
                try:
                    replica.fill(intake.refuse)
                    replica.incomplete = replica.broken = False
                    return
                except LogGone as exc:
                    gone = exc
                    # Payloads were evicted and deleted since this replica looked: look again,
                    # perhaps at another representation.
                    recovery.follow_from_snapshot(replica, self.path)
        raise self.payloads_gone(gone)

    def prepare(
        self, choice: indexing.IndexChoice, manifest: Manifest, opened: tuple[OpenSegment, ...]
    ) -> None:
        """Keep an open index for when its representation begins to count."""
        self.prepared = Prepared(choice, manifest, opened)

    def _next_index(self) -> tuple[Manifest | None, tuple[OpenSegment, ...]] | None:
        """The index of this representation, if it was opened before it began to count."""
        prepared, self.prepared = self.prepared, None
        if prepared is None or prepared.choice.representation != self.replica.state.representation:
            return None
        self.choice = prepared.choice
        return prepared.manifest, prepared.opened

    def _is_outdated(self) -> bool:
        """Whether what is fused here is of another representation than the buffer's."""
        intake = self._intake
        return intake is not None and (intake.representation != self.replica.state.representation)

    def fill_index(self) -> None:
        """Fuse again what no tier holds (replica lock held)."""
        if self._intake is not None and not self._is_outdated():
            try:
                self.replica.fill(self._intake.refuse)
            except LogGone:
                self._start_anew()

    def distrust_index(self) -> None:
        """Search nothing that is in segments, but what their vectors are made of."""
        with self.replica.lock:
            self.replica.adopt(None, (), self.control.words[c.INDEX_GENERATION])
            self.fill_index()

    # ------------------------------------------------------------ closing

    def close(self) -> None:
        """Let go, whatever this raises; the last to leave marks the buffer closed cleanly.

        Raises:
            StorageError: Not all that was written could be made durable, or a lock was not free in
                time.
        """
        with self._closing:
            if not self.closed:
                self.upkeep.stop()
            try:
                if not self.closed and self.writable and hasattr(self, "commit_log"):
                    self._close_writable()
            finally:
                self.give_up()

    def is_entered(self) -> bool:
        """Whether this thread is in the middle of something that `close` would wait for.

        It may be in another buffer on the same folder, whose locks are the same.
        """
        if self.closed:
            return False
        lock: Any = self.replica.lock
        return bool(
            lock._is_owned() or registry_is_mine() or any(lock.is_mine() for lock in self.locks)
        )

    def give_up(self) -> None:
        """Give back what was taken, and close nothing in order: an opening has failed, say.

        Where a signal handler has raised in the middle of it, another call does the rest.
        """
        if self._gone:
            return
        self.closed = True
        try:
            if hasattr(self, "commit_log"):
                self.commit_log.stop()
            if hasattr(self, "adapter") and not self._adapter_closed:
                self._adapter_closed = True  # and never again: its descriptors may be others' then
                self.adapter.close()
        finally:
            self.let_go()
        if hasattr(self, "replica"):
            self.replica.let_go()
        self._gone = True
        # Somebody may keep the buffer, and with it maps of files that are long deleted.
        self.replica = self.commit_log = cast(Any, _LetGo())
        self.prepared = None
        self.upkeep.let_go()

    def let_go(self) -> None:
        """Close lock files and the control page."""
        while self.locks:
            self.locks.pop().close()
        if self.adapter_words is not None:
            self.adapter_words.release()
        if self.watched is not None:
            self.watched.close()
        if hasattr(self, "control"):
            self.control.close()

    def _close_writable(self) -> None:
        try:
            self.commit_log.sync()
        except BaseException:
            with contextlib.suppress(StorageError):  # of the two, the first tells more
                self.commit_log.close()
            raise
        self.commit_log.close()
        if self.opening_lock is None or self.open_lock is None or self.path is None:
            return
        self.opening_lock.run(self._leave, self.path, self.open_lock)

    def _leave(self, path: Path, open_lock: OpenLock) -> None:
        """Mark the buffer closed cleanly, if this is the last to leave (opening lock held)."""
        try:
            # Without a log to append to there is none to end.
            begun = self.control.words[c.APPENDING] != c.POSTPONED
            if begun and open_lock.is_last():
                self.check_folder()  # what is there now may be another buffer
                self.refresh()
                self.upkeep.closing_snapshot()
                self.adapter.finish(self.replica.state.lsn)
                self.control.mark_clean(path / folder.CONTROL, self.fs)
        except (OSError, BufferReplaced) as exc:
            _log.warning("%s was not closed cleanly; the next opening recovers: %s", path, exc)
        finally:
            open_lock.leave()

    def forked(self) -> None:
        """In a forked child, at once: who is in the middle of an add goes on in Python."""
        if hasattr(self, "commit_log"):  # readers have none
            self.commit_log.forked()

    def abandon(self) -> None:
        """In a forked child: forget everything without touching the folder."""
        self.closed = self.abandoned = True
        if hasattr(self, "commit_log"):  # readers have none
            self.commit_log.abandon()
        self.adapter.after_fork()
        if self.choice is not None:
            self.choice.after_fork()
        self.locks.clear()  # the registry of lock files has forgotten them already
        self.let_go()


def _last_dim(embedding: Any) -> int:
    """Dimension of an embedding of whatever kind; 0 where there is none."""
    if embedding is None:
        return 0
    shape = getattr(embedding, "shape", None)
    if shape is None:
        shape = np.shape(embedding)
    if not shape:
        raise DimensionError("an embedding needs at least one dimension", found=())
    return int(shape[-1])
