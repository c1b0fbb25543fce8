"""An open buffer of one process: opening, recovering, following, upkeep, closing.

`ExperienceBuffer` is the facade; what it holds on to lives here, in one object that a forked child
throws away and makes anew.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel

from expbuf_core import codec, folder, indexing, snapshots
from expbuf_core import control as c
from expbuf_core.commit import CommitLog, Draft, Lock
from expbuf_core.config_schema import BufferConfig
from expbuf_core.contracts import (
    EmbeddingFusion,
    IndexContext,
    LogGone,
    PersistenceAdapter,
    PersistenceContext,
    PriorityScorer,
)
from expbuf_core.control import Control
from expbuf_core.errors import (
    BufferReplaced,
    ConfigError,
    CorruptionError,
    DimensionError,
    ExpbufError,
    LockTimeout,
    PluginContractError,
    ReadOnlyBuffer,
    StorageError,
)
from expbuf_core.filesystem import FileSystem, storage_errors
from expbuf_core.intake import Intake
from expbuf_core.locks import OpenLock, ProcessLock, holder
from expbuf_core.plugins import PluginRegistry
from expbuf_core.replica import Replica
from expbuf_core.segments import Manifest, OpenSegment

_log = logging.getLogger("expbuf")


_NEW = {"lsn": 1, "snapshot_lsn": 0, "replayed": 0, "torn_bytes": 0, "clean": True, "first": True}


@dataclass(frozen=True)
class RecoveryReport:
    """What opening found.

    Attributes:
        lsn: Last operation.
        experiences: In the buffer.
        snapshot_lsn: Of the snapshot that was loaded; 0: none.
        replayed: Operations applied from the log.
        torn_bytes: Bytes of an unfinished last write, left out: nothing of it was acknowledged.
        clean: The last process closed the buffer in order.
        first: This process was the first to open it, and recovered it.
        seconds: What it took.
        warnings: What was passed over (damaged snapshots).
    """

    lsn: int
    experiences: int
    snapshot_lsn: int
    replayed: int
    torn_bytes: int
    clean: bool
    first: bool
    seconds: float
    warnings: tuple[str, ...] = ()

    def __str__(self) -> str:
        how = "clean" if self.clean else "recovered" if self.first else "joined"
        if self.lsn <= 1:
            how = "new"
        text = (
            f"{how}: {self.experiences} experiences at lsn {self.lsn} "
            f"({self.replayed} operations replayed in {self.seconds:.3f} s"
        )
        torn = f"; a torn tail of {self.torn_bytes} bytes left out" if self.torn_bytes else ""
        return text + torn + ")"


class ThreadLock:
    """`ProcessLock` for a buffer that only this process can see."""

    def __init__(self, timeout_s: float) -> None:
        self._lock = threading.Lock()
        self.timeout_s = timeout_s

    def acquire(self, timeout_s: float | None = None) -> None:
        """Take the lock, or raise `LockTimeout`."""
        if not self._lock.acquire(timeout=self.timeout_s if timeout_s is None else timeout_s):
            raise LockTimeout("another thread has held the lock for too long", pid=os.getpid())

    def try_acquire(self) -> bool:
        """Take the lock if it is free."""
        return self._lock.acquire(blocking=False)

    def release(self) -> None:
        """Let go."""
        self._lock.release()

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *exc: object) -> None:
        self.release()


class Session:
    """See the module. Attributes are set by `open` and stay until `close`."""

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
        self.adapter: PersistenceAdapter
        self.control: Control
        self.replica: Replica
        self.commit_log: CommitLog
        self.recovery: RecoveryReport
        self._outer = lock
        self._open_lock: OpenLock | None = None
        self._opening: ProcessLock | None = None
        self.maintenance: Lock
        self.builder_lock: Lock
        self._intake: Intake | None = None
        self._choice: indexing.IndexChoice | None = None
        self._keeper: _Keeper | None = None
        self._builder: int | None = None  # pid
        self._adopting = threading.Lock()
        self._snapshot_at = 0
        self._dropped_at = 0
        self._inode = 0
        self._control_path = "" if path is None else str(path / folder.CONTROL)
        self._generation = 0
        self._watched: Control | None = None
        self.recovering = False
        self.closed = False
        self.fusion = self._make_plugin("fusion", config.fusion)
        self.scorer: PriorityScorer = self._make_plugin("priority", config.priority)

    def _make_plugin(self, kind: Any, choice: Any) -> Any:
        provider = self.registry.get(kind, choice.backend)
        settings = self.registry.settings(kind, choice.backend, choice.section(choice.backend))
        return provider.factory(settings)

    # ------------------------------------------------------------ opening

    def open(self) -> None:
        """Create, recover or join the buffer."""
        started = time.monotonic()
        if self.path is None:
            self._open_memory()
        else:
            self._open_folder(self.path)
        self.recovery = RecoveryReport(
            **self._report, seconds=time.monotonic() - started, experiences=self.replica.state.count
        )
        if self.writable:
            self._keeper = _Keeper(self)
        self.registry.fire(
            "expbuf_on_recovered",
            path=str(self.path or ""),
            lsn=self.recovery.lsn,
            count=self.recovery.experiences,
            seconds=self.recovery.seconds,
        )

    _report: dict[str, Any]

    @property
    def writable(self) -> bool:
        """Whether this session may write."""
        return self.mode != "r"

    def _open_memory(self) -> None:
        timeout = self.config.lock_timeout_s
        self.uuid = folder.new_uuid()
        self.control = Control.private()
        self.maintenance, self.builder_lock = ThreadLock(timeout), ThreadLock(timeout)
        self.adapter = self._make_adapter("memory", None)
        self.adapter.create(1)
        self.replica = Replica(self.adapter, self.control, self.config.sampling, None, self.uuid)
        self.control.words[c.NEXT_LSN] = 1
        self._make_commit_log(ThreadLock(timeout), ThreadLock(timeout))
        self._write_first_settings()
        self._report = dict(_NEW)

    def _make_adapter(self, name: str, path: Path | None) -> PersistenceAdapter:
        provider = self.registry.get("persistence", name)
        settings: BaseModel = self.registry.settings(
            "persistence", name, self.config.persistence.section(name)
        )
        words = self.control.words
        context = PersistenceContext(
            path=path,
            uuid=self.uuid,
            fs=self.fs,
            words=(words[c.ADAPTER : c.ADAPTER + 8] if isinstance(words, memoryview) else [0] * 8),
            writable=self.writable,
        )
        adapter = provider.factory(settings, context)
        if not isinstance(adapter, PersistenceAdapter):
            raise PluginContractError(
                f"the persistence backend {name!r} made a {type(adapter).__name__}; expected a "
                "PersistenceAdapter"
            )
        return adapter

    def _make_commit_log(self, append_lock: Lock, flush_lock: Lock) -> None:
        self.commit_log = CommitLog(
            self.adapter,
            self.control,
            append_lock=append_lock,
            flush_lock=flush_lock,
            durability="os" if self.path is None else self.config.durability,
            group_interval_s=self.config.group_interval_ms / 1000,
            written=self.replica.written,
            outer=self._outer,
            check=self._check_folder if self.path is not None else lambda: None,
            reserves=self.path is not None,
        )

    def _open_folder(self, path: Path) -> None:
        if self.mode == "r":
            self._open_readonly(path)
            return
        backend = self.config.persistence.backend
        with storage_errors("create", path):
            if path.exists() and not path.is_dir():
                raise StorageError(f"{path} is a file; a buffer is a folder")
            if folder.read_identity(path) is None:
                folder.check_new(path)
            self.fs.mkdir(path / folder.LOCKS)
        locks = path / folder.LOCKS
        timeout = self.config.lock_timeout_s
        self._opening = ProcessLock(locks / "opening", timeout)
        self.maintenance = ProcessLock(locks / "maintenance", timeout)
        self.builder_lock = ProcessLock(locks / "builder", timeout)
        append_lock = ProcessLock(locks / "append", timeout)
        flush_lock = ProcessLock(locks / "flush", timeout)
        with self._opening:
            self._open_lock = OpenLock(locks / "open")
            first = self._open_lock.is_first()
            try:
                if not first and not folder.shared_memory_is_coherent(path):
                    raise StorageError(
                        f"{path} lies on a network file system ({folder.file_system(path)}), where "
                        "several processes cannot share a buffer, and another process has it open"
                    )
                identity = folder.read_identity(path)
                if identity is not None and self.mode == "x":
                    raise StorageError(f"{path} holds a buffer already; mode 'x' creates a new one")
                created = identity is None
                if identity is None:
                    folder.check_new(path)
                    self.uuid = folder.new_uuid()
                else:
                    self.uuid = identity.uuid
                    self._check_backend(identity.backend)
                    backend = identity.backend
                self.control = Control.map(path / folder.CONTROL, writable=True)
                self.control.note_inode(path / folder.CONTROL)
                self._inode = os.stat(path / folder.CONTROL).st_ino
                if created:
                    self._create(path, backend, append_lock, flush_lock)
                elif first:
                    self._recover(path, backend, append_lock, flush_lock)
                else:
                    self._attach(path, backend, append_lock, flush_lock)
                if first:
                    self.control.activate()
                self._open_lock.share()
            except BaseException:
                if first:
                    self._open_lock.leave()
                raise
        try:
            self.recovering = first
            self._reconcile()
            self._load_index()
            self.recovering = False
        except BaseException:
            self.close()
            raise

    def _check_backend(self, stored: str) -> None:
        wanted = self.config.persistence.backend
        if wanted != stored and "persistence.backend" in self.config.explicit:
            raise ConfigError(
                f"persistence.backend = {wanted!r}, but {self.path} was created with {stored!r}; "
                f"to move it: expbuf migrate {self.path} TARGET --persistence {wanted}"
            )

    def _create(self, path: Path, backend: str, append_lock: Lock, flush_lock: Lock) -> None:
        self.control.reset(self.uuid)
        self.adapter = self._make_adapter(backend, path)
        self.adapter.create(1)
        self.replica = Replica(self.adapter, self.control, self.config.sampling, path, self.uuid)
        self.control.words[c.NEXT_LSN] = 1
        self._make_commit_log(append_lock, flush_lock)
        self._write_first_settings()
        self.commit_log.sync()
        folder.write_identity(path, backend, self.uuid, self.fs)
        self._report = dict(_NEW)

    def _write_first_settings(self) -> None:
        config = self.config
        self._write_settings(
            {
                "v_dim": config.embedding.visual_dim,
                "q_dim": config.embedding.question_dim,
                "metric": config.embedding.metric,
                "fusion": self._fusion_settings(),
                "representation": 0,
                "max_size": config.max_size,
                "receipts_kept": config.receipts_kept,
            }
        )

    def _fusion_settings(self) -> dict[str, Any]:
        choice = self.config.fusion
        settings = self.registry.settings("fusion", choice.backend, choice.section(choice.backend))
        return {
            "name": choice.backend,
            "version": int(self.fusion.version),
            "settings": settings.model_dump(mode="json"),
        }

    def _write_settings(self, settings: Mapping[str, Any]) -> None:
        self.commit(Draft(codec.encode_settings(settings), weight=0))

    def _recover(self, path: Path, backend: str, append_lock: Lock, flush_lock: Lock) -> None:
        """Load the newest snapshot, replay the log, begin a new one (open lock held alone)."""
        control = self.control
        witness = control.witness(self.uuid)
        clean = control.closed_cleanly(self.uuid)
        self.adapter = self._make_adapter(backend, path)
        replica = Replica(self.adapter, control, self.config.sampling, path, self.uuid)
        self.replica = replica
        with self._corruption_told():
            snapshot_lsn, replayed, warnings = self._load(replica, witness)
        state = replica.state
        control.reset(self.uuid)
        next_id, next_lsn = state.next_id, state.lsn + 1
        if not clean:
            # Ids and LSNs that were seen and then lost with the power must not come again.
            next_id = max(next_id, state.reserved_id)
            next_lsn = max(next_lsn, state.reserved_lsn)
        self.adapter.start(next_lsn, state.lsn)
        words = control.words
        words[c.APPENDED] = words[c.PUBLISHED] = words[c.DURABLE] = state.lsn
        words[c.NEXT_LSN], words[c.NEXT_ID] = next_lsn, next_id
        words[c.RESERVED_ID], words[c.RESERVED_LSN] = state.reserved_id, state.reserved_lsn
        words[c.SNAPSHOT_LSN] = snapshot_lsn
        self._make_commit_log(append_lock, flush_lock)
        self._report = {
            "lsn": state.lsn,
            "snapshot_lsn": snapshot_lsn,
            "replayed": replayed,
            "torn_bytes": self.adapter.torn()[0],
            "clean": clean,
            "first": True,
            "warnings": warnings,
        }

    def _load(self, replica: Replica, witness: int) -> tuple[int, int, tuple[str, ...]]:
        """Newest intact snapshot and the log behind it; (its LSN, operations, warnings)."""
        assert self.path is not None
        state, errors = snapshots.newest(self.path, self.uuid)
        if state is not None:
            replica.reset(state)
        snapshot_lsn = replica.state.lsn
        replayed = 0
        try:
            for operation in self.adapter.recover(snapshot_lsn, witness):
                replica.apply(operation)
                replayed += 1
        except CorruptionError:
            if errors:
                # The log that would replace the damaged snapshot is gone, too.
                raise errors[0] from None
            raise
        if not replica.state.settings:
            raise (
                errors[0]
                if errors
                else CorruptionError(
                    f"{self.path}: neither a snapshot nor the beginning of the log can be read",
                    path=self.path,
                    offset=0,
                )
            )
        for error in errors:
            _log.warning("%s", error)
        replica.counts.clear()
        replica.evicted = 0
        return snapshot_lsn, replayed, tuple(map(str, errors))

    def _attach(self, path: Path, backend: str, append_lock: Lock, flush_lock: Lock) -> None:
        """Join a buffer that others hold open."""
        self.adapter = self._make_adapter(backend, path)
        self.adapter.attach()
        self.replica = Replica(self.adapter, self.control, self.config.sampling, path, self.uuid)
        snapshot_lsn = self._follow_from_snapshot(path)
        self._make_commit_log(append_lock, flush_lock)
        lsn = self.replica.state.lsn
        self._report = {
            "lsn": lsn,
            "snapshot_lsn": snapshot_lsn,
            "replayed": lsn - snapshot_lsn,
            "torn_bytes": 0,
            "clean": False,
            "first": False,
        }

    def _follow_from_snapshot(self, path: Path) -> int:
        for attempt in range(10):
            state, errors = snapshots.newest(path, self.uuid)
            if state is not None:
                self.replica.reset(state)
            try:
                with self.replica.lock:
                    lsn = self.replica.state.lsn
                    self.replica.follow_to(self.control.published())
                return lsn
            except LogGone:
                if attempt == 9:
                    raise (
                        errors[0]
                        if errors
                        else CorruptionError(
                            f"{path}: the log has a gap and no snapshot covers it", path=path
                        )
                    ) from None
        raise AssertionError("unreachable")

    def _open_readonly(self, path: Path) -> None:
        identity = folder.read_identity(path)
        if identity is None:
            raise StorageError(f"{path} is no buffer: it has no {folder.IDENTITY}")
        self.uuid = identity.uuid
        self._check_backend(identity.backend)
        self.maintenance = self.builder_lock = ThreadLock(self.config.lock_timeout_s)
        live = self._live_control(path)
        self.control = live or Control.private()
        self.adapter = self._make_adapter(identity.backend, path)
        self.replica = Replica(self.adapter, self.control, self.config.sampling, path, self.uuid)
        if live is not None:
            self._generation = live.words[c.GENERATION]
            self.adapter.attach()
            snapshot_lsn = self._follow_from_snapshot(path)
            replayed = self.replica.state.lsn - snapshot_lsn
        else:
            # Nobody has it open: recover in private, and change nothing.
            witness = 0
            self._watched = _map_for_reading(path / folder.CONTROL)
            if self._watched is not None:
                self._generation = self._watched.words[c.GENERATION]
                witness = self._watched.witness(self.uuid)
            with self._corruption_told():
                snapshot_lsn, replayed, _ = self._load(self.replica, witness)
            self.control.words[c.PUBLISHED] = self.replica.state.lsn
        self._report = {
            "lsn": self.replica.state.lsn,
            "snapshot_lsn": snapshot_lsn,
            "replayed": replayed,
            "torn_bytes": self.adapter.torn()[0] if live is None else 0,
            "clean": False,
            "first": live is None,
        }
        self._load_index()

    def _live_control(self, path: Path) -> Control | None:
        """The control page if a process has the buffer open, else None."""
        lock = path / folder.LOCKS / "open"
        if not lock.exists() or holder(lock) is None:
            return None
        control = _map_for_reading(path / folder.CONTROL)
        if control is None:
            return None
        deadline = time.monotonic() + self.config.lock_timeout_s
        while control.words[c.GENERATION] == 0:  # being recovered right now
            if time.monotonic() > deadline or holder(lock) is None:
                control.close()
                return None
            time.sleep(0.005)
        return control

    def _follow_writers(self) -> None:
        """A reader without a share in the open lock notices that writers came, or came anew."""
        assert self.path is not None
        page = self._watched or self.control
        generation = page.words[c.GENERATION]
        if generation in (0, self._generation):
            return  # nothing new; or being recovered: until then things are as they were
        self._generation = generation
        self._watched = None
        self.control = self.replica.control = page
        self.adapter.attach()
        self._start_anew()

    @contextlib.contextmanager
    def _corruption_told(self) -> Any:
        try:
            yield
        except CorruptionError as exc:
            self.registry.fire(
                "expbuf_on_corruption",
                path=exc.path or str(self.path),
                offset=-1 if exc.offset is None else exc.offset,
                error=str(exc),
            )
            raise

    def _reconcile(self) -> None:
        """Compare the configuration with what the folder was created with."""
        stored = self.replica.state.settings
        config, explicit = self.config, self.config.explicit
        for key, name in (("metric", "metric"), ("visual_dim", "v_dim"), ("question_dim", "q_dim")):
            wanted = getattr(config.embedding, key)
            dotted = f"embedding.{key}"
            if dotted in explicit and wanted is not None and stored[name] not in (None, wanted):
                raise ConfigError(
                    f"{dotted} = {wanted!r}, but {self.path} was created with {stored[name]!r}; "
                    "open it without that key, or change the buffer by `expbuf reindex`",
                    key=dotted,
                )
        self._reconcile_fusion(stored)
        changed = dict(stored)
        for key in ("max_size", "receipts_kept"):
            if key in explicit:
                changed[key] = getattr(config, key)
        for key, name in (("visual_dim", "v_dim"), ("question_dim", "q_dim")):
            if stored[name] is None and getattr(config.embedding, key) is not None:
                changed[name] = getattr(config.embedding, key)
        if changed != stored:
            self._write_settings(changed)

    def _reconcile_fusion(self, stored: Mapping[str, Any]) -> None:
        wanted = self._fusion_settings()
        if wanted == stored["fusion"]:
            return
        if any(key == "fusion" or key.startswith("fusion.") for key in self.config.explicit):
            raise ConfigError(
                f"fusion: configured {wanted}, but {self.path} was created with "
                f"{stored['fusion']}; open it without that key, or change the buffer by "
                "`expbuf reindex`",
                key="fusion",
            )
        name, settings = stored["fusion"]["name"], stored["fusion"]["settings"]
        provider = self.registry.get("fusion", name)
        self.fusion = provider.factory(self.registry.settings("fusion", name, settings))
        if int(self.fusion.version) != stored["fusion"]["version"]:
            raise ConfigError(
                f"the fusion {name!r} of {self.path} has version {stored['fusion']['version']}, "
                f"the installed one {self.fusion.version}; change the buffer by `expbuf reindex`",
                key="fusion",
            )

    # ------------------------------------------------------------ folder checks

    def _check_folder(self) -> None:
        """See that the folder is the one that was opened (append lock held)."""
        assert self.path is not None
        try:
            inode = os.stat(self._control_path).st_ino
        except OSError as exc:
            raise BufferReplaced(
                f"{self.path}: the folder was removed or replaced while it was open ({exc}); open "
                "the buffer again"
            ) from exc
        if inode != self._inode:
            raise BufferReplaced(
                f"{self.path}: the folder was replaced while it was open; open the buffer again"
            )

    # ------------------------------------------------------------ reading and writing

    def refresh(self) -> None:
        """See what has been published, and what the builder has swapped in."""
        if not self.writable:
            self._follow_writers()
        try:
            self.replica.refresh()
        except LogGone:
            self._start_anew()
        if self.replica.evicted:
            evicted, self.replica.evicted = self.replica.evicted, 0
            self.registry.fire(
                "expbuf_on_evicted",
                path=str(self.path or ""),
                lsn=self.replica.state.lsn,
                count=evicted,
            )
        if self.path is not None and self._intake is not None and self.replica.index_is_stale():
            self.adopt_later()

    def _start_anew(self) -> None:
        """Load the newest snapshot and follow from there: the log behind this replica is gone."""
        assert self.path is not None
        with self.replica.lock:
            self._follow_from_snapshot(self.path)
            self._load_index()

    def catch_up_after_deletion(self, attempt: int) -> None:
        """A payload that this replica believes in is deleted: see what has happened since."""
        self.refresh()
        if attempt and self.path is not None:
            self._start_anew()

    def commit(self, draft: Draft) -> tuple[int, int, int]:
        """Write an operation and apply it here; (LSN, first id, experiences it applied to)."""
        if not self.writable:
            raise ReadOnlyBuffer(f"{self.path} is open in mode 'r'; open it in mode 'a' to write")
        started = time.monotonic()
        lsn, first_id = self.commit_log.commit(draft)
        self.refresh()
        count = self.replica.counts.pop(lsn, 0)
        kind = draft.operation.kind
        if "expbuf_on_committed" in self.registry.events:
            self.registry.fire(
                "expbuf_on_committed",
                path=str(self.path or ""),
                lsn=lsn,
                kind=codec.KIND_NAMES[kind],
                count=count,
                seconds=time.monotonic() - started,
            )
        if self._keeper is not None:
            self._keeper.after_commit()
        return lsn, first_id, count

    # ------------------------------------------------------------ dimensions

    def intake(self, v: Any = None, q: Any = None) -> Intake | None:
        """What checks input; None while the buffer has no dimensions and none are given.

        Args:
            v: A visual embedding to take the dimension from, if the buffer has none yet.
            q: The same for the question.
        """
        intake = self._intake
        if intake is not None:
            return intake
        self.replica.refresh()
        settings = self.replica.state.settings
        if settings["v_dim"] is None or settings["q_dim"] is None:
            if v is None and q is None:
                return None
            self._fix_dimensions(v, q)
            settings = self.replica.state.settings
        return self._make_intake(int(settings["v_dim"]), int(settings["q_dim"]))

    def _make_intake(self, v_dim: int, q_dim: int) -> Intake:
        fusion: EmbeddingFusion = self.fusion
        try:
            dim = fusion.output_dim(v_dim, q_dim)
        except ValueError as exc:
            raise ConfigError(str(exc), key="fusion") from exc
        metric = str(self.replica.state.settings["metric"])
        self._intake = Intake(
            v_dim=v_dim,
            q_dim=q_dim,
            metric=metric,
            fusion=fusion,
            scorer=self.scorer,
            max_experience_bytes=self.config.max_experience_bytes,
            max_commit_bytes=self.config.max_commit_bytes,
        )
        context = IndexContext(
            dim=dim,
            metric=metric,
            seed=self.config.index.seed,
            target_recall=self.config.index.target_recall,
        )
        self._choice = indexing.IndexChoice(self.config, self.registry, context)
        return self._intake

    def _fix_dimensions(self, v: Any, q: Any) -> None:
        """The first add decides the dimensions, for all processes."""
        settings = dict(self.replica.state.settings)
        found = {"v_dim": _last_dim(v), "q_dim": _last_dim(q)}
        for name, dim in found.items():
            if settings[name] is None:
                settings[name] = dim
        try:
            self.fusion.output_dim(settings["v_dim"], settings["q_dim"])
        except ValueError as exc:
            raise ConfigError(str(exc), key="fusion") from exc
        with self.maintenance:
            # Another process may have been first; its operation is then published already.
            self.commit_log.sync()
            self.replica.refresh()
            current = self.replica.state.settings
            if current["v_dim"] is None or current["q_dim"] is None:
                self._write_settings(settings)

    @property
    def choice(self) -> indexing.IndexChoice | None:
        """The index backends, once the dimensions are known."""
        return self._choice

    # ------------------------------------------------------------ index

    def _load_index(self) -> None:
        """At opening: segments, and fused again what no segment and no log holds."""
        if self.path is None:
            return
        settings = self.replica.state.settings
        if settings["v_dim"] is None or settings["q_dim"] is None:
            return
        intake = self._make_intake(int(settings["v_dim"]), int(settings["q_dim"]))
        assert self._choice is not None
        with self.replica.lock:
            manifest, opened = indexing.load(self.path, self.replica, self._choice)
            self._adopt(manifest, opened, self.control.words[c.INDEX_GENERATION])
            if manifest is not None and self.writable:
                words = self.control.words
                words[c.INDEX_GENERATION] = max(words[c.INDEX_GENERATION], manifest.generation)
                self.replica.tiers.generation = words[c.INDEX_GENERATION]
            self.replica.fill(intake.refuse)
            if self.recovering:
                self.control.words[c.ROWS_ADDED] = self.replica.tiers.tail_rows

    def _adopt(
        self, manifest: Manifest | None, opened: tuple[OpenSegment, ...], generation: int
    ) -> None:
        self.replica.adopt(manifest, opened, generation)

    def adopt_later(self) -> None:
        """Open newly published segments aside, in the background, and then change over."""
        if self._adopting.acquire(blocking=False):
            threading.Thread(target=self._adopt_aside, name="expbuf-adopt", daemon=True).start()

    def _adopt_aside(self) -> None:
        try:
            self.adopt_now()
        except (ExpbufError, OSError, ValueError) as exc:
            if not self.closed:
                _log.warning("the new index could not be opened; searches stay exact: %s", exc)
        finally:
            self._adopting.release()

    def adopt_now(self) -> None:
        """Open what the builder has published last, and search it from now on."""
        assert self.path is not None
        generation = self.control.words[c.INDEX_GENERATION]
        if self.closed or self._choice is None or self._intake is None:
            return
        manifest, opened = indexing.load(self.path, self.replica, self._choice)
        replica = self.replica
        with replica.lock:
            if self.closed:
                return
            if manifest is not None and replica.state.lsn < manifest.lsn:
                replica.refresh()
            if manifest is None and replica.tiers.segments:
                replica.tiers.generation = generation  # keep what is there
                return
            self._adopt(manifest, opened, generation)
            replica.fill(self._intake.refuse)
        self.registry.fire(
            "expbuf_on_index_swapped",
            path=str(self.path),
            lsn=manifest.lsn if manifest else 0,
            segments=len(opened),
        )

    def build_index(self) -> bool:
        """Build and publish segments now; False if another builder is at it or nothing is there."""
        if self.path is None or self.intake() is None or self._choice is None:
            return False
        if not self.builder_lock.try_acquire():
            return False
        try:
            words = self.control.words
            words[c.BUILT_ROWS] = words[c.ROWS_ADDED]
            self.replica.refresh()
            # Nothing derived is written before the log is durable up to it.
            self.commit_log.sync()
            indexing.build(
                self.path,
                self.replica,
                self._choice,
                self.fs,
                self.uuid,
                self.config.index.growth,
            )
        except Exception as exc:
            self.control.words[c.BUILDER_FAILURES] += 1
            _log.error("the index builder failed; searches stay exact: %s", exc)
            self.registry.fire("expbuf_on_builder_failed", path=str(self.path), error=str(exc))
            raise
        finally:
            self.builder_lock.release()
        self.adopt_now()
        return True

    # ------------------------------------------------------------ snapshots

    def snapshot(self, *, if_due: bool = False) -> int:
        """Switch logs, write the columns as of the switch, drop what nobody needs; the LSN.

        `if_due`: do nothing if another process was faster.
        """
        if self.path is None:
            with self.replica.lock:
                self.replica.refresh()
                return self.replica.state.lsn
        with self.maintenance:
            if if_due and not self.snapshot_is_due():
                return self.control.words[c.SNAPSHOT_LSN]
            self.commit_log.sync()
            lsn = self.commit_log.switch()
            self.commit_log.sync()
            with self.replica.lock:
                if self.replica.state.lsn <= lsn:
                    self.replica.follow_to(lsn)
                tree, columns = self.replica.state.dump()
                lsn = self.replica.state.lsn
            # The replica may be past the switch; the snapshot must not be past the disk.
            self.commit_log.flush(lsn)
            snapshots.write(self.path, self.uuid, tree, columns, self.fs)
            self.control.words[c.SNAPSHOT_LSN] = lsn
            self._drop_logs()
        return lsn

    def _drop_logs(self) -> None:
        """Delete logs that neither of the kept snapshots needs (maintenance lock held)."""
        assert self.path is not None
        oldest = snapshots.drop_old(self.path, self.fs)
        if len(snapshots.available(self.path)) < snapshots.KEPT:
            return  # one snapshot alone is no reason to trust it with everything
        with self.replica.lock:
            slots = self.replica.state.live_slots()
            ids = self.replica.state.id[slots]
            locations = self.replica.state.location[slots]
        self.adapter.drop_below(oldest, ids, locations)

    # ------------------------------------------------------------ upkeep

    def upkeep(self) -> None:
        """What a commit makes due; runs in the keeper's thread."""
        if self.closed:
            return
        words = self.control.words
        if self.path is None:
            state = self.replica.state
            if state.lsn - self._dropped_at > 10_000:
                with self.replica.lock:
                    self._dropped_at = state.lsn
                    self.adapter.drop_below(state.lsn, state.live_ids(), np.empty(0, np.int64))
            return
        if self.adapter.needs_preparation() and self.maintenance.try_acquire():
            try:
                self.commit_log.prepare()
            finally:
                self.maintenance.release()
        mode = self.config.index.builder
        if mode in ("process", "thread") and self.build_is_due():
            if mode == "thread":
                self.build_index()
            else:
                self._start_builder()
        if self.snapshot_is_due():
            self.snapshot(if_due=True)

    def snapshot_is_due(self) -> bool:
        """Whether the log behind the newest snapshot has grown long."""
        words = self.control.words
        return words[c.APPENDED] - words[c.SNAPSHOT_LSN] >= self.config.snapshot.every_ops

    def build_is_due(self) -> bool:
        """Whether enough has changed since the last build began."""
        words = self.control.words
        return words[c.ROWS_ADDED] - words[c.BUILT_ROWS] >= self.config.index.rebuild_every

    def upkeep_is_due(self) -> bool:
        """Cheap test after each commit."""
        if self.path is None:
            return self.replica.state.lsn - self._dropped_at > 10_000
        return (
            (self.config.index.builder in ("process", "thread") and self.build_is_due())
            or self.snapshot_is_due()
            or self.adapter.needs_preparation()
        )

    def is_alone(self) -> bool:
        """Whether no other process has the buffer open for writing."""
        return self.path is not None and holder(self.path / folder.LOCKS / "open") is None

    def _start_builder(self) -> None:
        """Start a builder process, unless one is there."""
        if self._builder is not None and not _ended(self._builder):
            return
        if not self.builder_lock.try_acquire():
            return
        self.builder_lock.release()
        words = self.control.words
        words[c.BUILT_ROWS] = words[c.ROWS_ADDED]
        self._builder = _spawn(builder_command(self.path, self.config))

    # ------------------------------------------------------------ closing

    def close(self) -> None:
        """Let go; the last to leave marks the buffer closed cleanly."""
        if self.closed:
            return
        if self._keeper is not None:
            self._keeper.stop()
        try:
            if self.writable and hasattr(self, "commit_log"):
                self._close_writable()
        finally:
            self.closed = True
            self.adapter.close()
            self.control.close()

    def _close_writable(self) -> None:
        failed: Exception | None = None
        try:
            self.commit_log.sync()
        except (StorageError, LockTimeout) as exc:
            failed = exc
        self.commit_log.close()
        if self._opening is None or self._open_lock is None or self.path is None:
            return
        with self._opening:
            try:
                if failed is None and self._open_lock.is_last():
                    self.replica.refresh()
                    if self.replica.state.lsn - self.control.words[c.SNAPSHOT_LSN] > 10_000:
                        self._final_snapshot()
                    self.adapter.finish(self.replica.state.lsn)
                    self.control.mark_clean(self.path / folder.CONTROL, self.fs)
            except (StorageError, OSError) as exc:
                _log.warning(
                    "%s was not closed cleanly; the next opening recovers: %s", self.path, exc
                )
            finally:
                self._open_lock.leave()
        if failed is not None:
            raise failed

    def _final_snapshot(self) -> None:
        """A short replay for the next opening."""
        assert self.path is not None
        tree, columns = self.replica.state.dump()
        snapshots.write(self.path, self.uuid, tree, columns, self.fs)
        self.control.words[c.SNAPSHOT_LSN] = self.replica.state.lsn

    def abandon(self) -> None:
        """In a forked child: forget everything without touching the folder."""
        self.closed = True
        self.adapter.after_fork()
        if self._choice is not None:
            self._choice.after_fork()
        self.control.close()


def builder_command(path: Path | None, config: BufferConfig) -> list[str]:
    """Command line of an index builder for this buffer."""
    index = config.index.model_dump(mode="json")
    wanted = {
        "index": {**index, "builder": "external"},
        "snapshot": config.snapshot.model_dump(mode="json"),
        "lock_timeout_s": config.lock_timeout_s,
    }
    folder_name = str(path)
    return [
        sys.executable,
        "-m",
        "expbuf_core",
        "builder",
        folder_name,
        "--config",
        json.dumps(wanted),
    ]


def _spawn(command: list[str]) -> int:
    """Start a process that outlives this one, in a session of its own; its pid."""
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    try:
        actions = [(os.POSIX_SPAWN_DUP2, null, 0), (os.POSIX_SPAWN_DUP2, null, 1)]
        return os.posix_spawn(command[0], command, os.environ, file_actions=actions, setsid=True)
    finally:
        os.close(null)


def _ended(pid: int) -> bool:
    """Whether a child has ended; reaps it."""
    try:
        return os.waitpid(pid, os.WNOHANG)[0] == pid
    except ChildProcessError:
        return True


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


def _map_for_reading(path: Path) -> Control | None:
    """The control page at `path`, or None where there is none."""
    try:
        if os.stat(path).st_size < c.PAGE_BYTES:
            return None
    except FileNotFoundError:
        return None
    control = Control.map(path, writable=False)
    control.note_inode(path)
    return control


class _Keeper:
    """A thread that does what commits make due; it starts with the first need."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._wanted: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._busy = False
        self._failed_at = 0.0

    def after_commit(self) -> None:
        """Called after each commit: almost always one comparison or three."""
        if self._busy or not self._session.upkeep_is_due():
            return
        if self._failed_at and time.monotonic() - self._failed_at < 1.0:
            return
        self._busy = True
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="expbuf-keeper", daemon=True)
            self._thread.start()
        self._wanted.put(self._session.upkeep)

    def _run(self) -> None:
        while (task := self._wanted.get()) is not None:
            try:
                task()
                self._failed_at = 0.0
            except Exception as exc:
                if not self._session.closed:
                    _log.warning("upkeep of %s failed and will be tried again: %s",
                                 self._session.path or "the buffer in memory", exc)  # fmt: skip
                self._failed_at = time.monotonic()
            finally:
                self._busy = False

    def stop(self) -> None:
        """Let the task under way end, and no other begin."""
        if self._thread is not None and self._thread is not threading.current_thread():
            self._wanted.put(None)
            self._thread.join(timeout=60)
