"""Opening a buffer: in memory, new, first after everybody left, joining others, or to read only.

Who opens first recovers, alone under the open lock; whoever has the buffer open holds that lock
shared. All of it happens under the opening lock, so that "the lock is held shared" means "somebody
who is alive has seen the recovery through".
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from expbuf_core import codec, folder, memory, recovery
from expbuf_core import control as c
from expbuf_core.commit import CommitLog, Draft, Lock
from expbuf_core.contracts import LogPostponed, PersistenceContext, Words
from expbuf_core.control import Control
from expbuf_core.errors import (
    ConfigError,
    CorruptionError,
    PluginError,
    StorageError,
)
from expbuf_core.filesystem import storage_errors
from expbuf_core.locks import OpenLock, ThreadLock, opener
from expbuf_core.recovery import Loaded, RecoveryReport
from expbuf_core.replica import Replica

if TYPE_CHECKING:
    from expbuf_core.plugins import PluginRegistry
    from expbuf_core.session import Session

_log = logging.getLogger("expbuf")
_POLL_S = 0.005
_TRIES = 10


def open_session(session: Session) -> RecoveryReport:
    """Create, recover or join the buffer; what was found."""
    started = time.monotonic()
    memory.keep_freed()
    clean = first = True
    try:
        if session.path is None:
            loaded = _in_memory(session)
        elif session.mode == "r":
            loaded, first, clean = _to_read_in_peace(session, session.path)
        else:
            loaded, first, clean = _to_write(session, session.path)
    except BaseException:
        session.give_up()
        raise
    state = session.replica.state
    return RecoveryReport(
        lsn=state.lsn,
        experiences=state.count,
        snapshot_lsn=loaded.snapshot_lsn,
        replayed=loaded.replayed,
        torn_bytes=loaded.torn_bytes,
        clean=clean,
        first=first,
        seconds=time.monotonic() - started,
        warnings=loaded.warnings,
    )


# ---------------------------------------------------------------- parts


def _make_replica(session: Session, backend: str) -> Replica:
    """Adapter and replica, both empty."""
    registry, config = session.registry, session.config
    settings = registry.settings("persistence", backend, config.persistence.section(backend))
    words = session.control.words
    own: Words = [0] * 8
    if isinstance(words, memoryview):
        own = session.adapter_words = words[c.ADAPTER : c.ADAPTER + 8]
    adapter = registry.make(
        "persistence",
        backend,
        settings,
        PersistenceContext(
            path=session.path,
            uuid=session.uuid,
            fs=session.fs,
            words=own,
            writable=session.writable,
            lock_timeout_s=config.lock_timeout_s,
        ),
    )
    session.adapter = adapter
    session.replica = Replica(adapter, session.control, config.sampling, session.path, session.uuid)
    return session.replica


def _make_commit_log(session: Session, append_lock: Lock, flush_lock: Lock) -> None:
    in_memory = session.path is None
    session.commit_log = CommitLog(
        session.adapter,
        session.control,
        append_lock=append_lock,
        flush_lock=flush_lock,
        durability="os" if in_memory else session.config.durability,
        group_interval_s=session.config.group_interval_ms / 1000,
        written=session.upkeep.written if in_memory else session.replica.written,
        appended=session.upkeep.after_commit,
        outer=session.outer_lock,
        check=session.check_folder,
        reserves=not in_memory,
    )


def _write_settings(session: Session, settings: Mapping[str, Any]) -> None:
    session.commit(Draft(codec.encode_settings(settings), weight=0))


def _first_settings(session: Session) -> dict[str, Any]:
    config = session.config
    return {
        "v_dim": config.embedding.visual_dim,
        "q_dim": config.embedding.question_dim,
        "metric": config.embedding.metric,
        "fusion": session.fusion_settings(),
        "representation": 0,
        "max_size": config.max_size,
        "receipts_kept": config.receipts_kept,
    }


@contextlib.contextmanager
def _corruption_told(session: Session) -> Iterator[None]:
    try:
        yield
    except CorruptionError as exc:
        session.tell_corruption(exc)
        raise


# ---------------------------------------------------------------- in memory


def keeps_nothing(registry: PluginRegistry, backend: str) -> bool:
    """Whether a backend is known to lose everything with its process: it gets no folder."""
    try:
        return "durable" not in registry.get("persistence", backend).capabilities
    except PluginError:
        return False  # opening will say why


def _in_memory(session: Session) -> Loaded:
    timeout = session.config.lock_timeout_s
    session.uuid = folder.new_uuid()
    session.control = Control.private()
    session.maintenance, session.builder_lock = ThreadLock(timeout), ThreadLock(timeout)
    chosen = session.config.persistence.backend
    _make_replica(session, chosen if keeps_nothing(session.registry, chosen) else "memory")
    session.adapter.create(1)
    session.control.words[c.NEXT_LSN] = 1
    _make_commit_log(session, ThreadLock(timeout), ThreadLock(timeout))
    _write_settings(session, _first_settings(session))
    return Loaded()


# ---------------------------------------------------------------- to write


def _to_write(session: Session, path: Path) -> tuple[Loaded, bool, bool]:
    """(what was loaded, whether this process is the first, whether the last closed cleanly)."""
    if path.exists() and not path.is_dir():
        raise StorageError(f"{path} is a file; a buffer is a folder")
    if folder.read_identity(path) is None:
        folder.check_new(path)
    if not path.exists():
        session.registry.get("persistence", session.config.persistence.backend)  # or no folder
    locks = path / folder.LOCKS
    with storage_errors("create", locks):
        session.fs.mkdir(locks)
    session.opening_lock = session.lock_file("opening")
    session.maintenance = session.lock_file("maintenance")
    session.builder_lock = session.lock_file("builder")
    open_lock = session.open_lock = OpenLock(locks / "open")
    session.locks.append(open_lock)
    with session.opening_lock:
        first = open_lock.is_first()
        try:
            loaded, clean = _enter(session, path, first)
            if first:
                session.control.activate()
            session.generation = session.control.words[c.GENERATION]
            session.commit_log.write_natively(
                session.control_path, session.fs, session.config.max_commit_bytes
            )
            open_lock.share()
        except BaseException:
            if first:
                open_lock.leave()
            raise
    try:
        _reconcile(session)
        session.load_index()
        if first:
            # What no segment holds yet counts as added since the last build.
            session.control.words[c.ROWS_ADDED] = session.replica.tiers.tail_rows
        session.upkeep.begin(loaded.rows, first=first)
    except BaseException:
        session.close()
        raise
    return loaded, first, clean


def _enter(session: Session, path: Path, first: bool) -> tuple[Loaded, bool]:
    """Create, recover or join (opening lock held; open lock held alone if `first`)."""
    if not first and not folder.shared_memory_is_coherent(path):
        raise StorageError(
            f"{path} lies on a network file system ({folder.file_system(path)}), where several "
            "processes cannot share a buffer, and another process has it open"
        )
    identity = folder.read_identity(path)
    if identity is not None and session.mode == "x":
        raise StorageError(f"{path} holds a buffer already; mode 'x' creates a new one")
    append_lock, flush_lock = session.lock_file("append"), session.lock_file("flush")
    if identity is None:
        folder.check_new(path)
        session.uuid, backend = folder.new_uuid(), session.config.persistence.backend
        _check_other_logs(session, path, backend)
    else:
        _check_backend(session, identity.backend)
        session.uuid, backend = identity.uuid, identity.backend
    _check_several(session, backend, first)
    session.map_control(path)
    control = session.control
    if identity is None:
        control.reset(session.uuid)
        _make_replica(session, backend)
        session.adapter.create(1)
        control.words[c.NEXT_LSN] = 1
        _make_commit_log(session, append_lock, flush_lock)
        _write_settings(session, _first_settings(session))
        session.commit_log.sync()
        folder.write_identity(path, backend, session.uuid, session.fs)
        return Loaded(), True
    if first:
        witness, clean = control.witness(session.uuid), control.closed_cleanly(session.uuid)
        left = (control.words[c.NEXT_ID], control.words[c.NEXT_LSN]) if clean else None
        replica = _make_replica(session, backend)
        with _corruption_told(session):
            loaded = recovery.recover(replica, path, witness)
        _begin_anew(session, loaded, left)
    else:
        clean = False
        control.check(path / folder.CONTROL, session.uuid)
        replica = _make_replica(session, backend)
        session.adapter.attach()
        loaded = recovery.follow_from_snapshot(replica, path)
        replica.broken = False
    _make_commit_log(session, append_lock, flush_lock)
    return loaded, clean


def _check_backend(session: Session, stored: str) -> None:
    wanted = session.config.persistence.backend
    if wanted != stored and "persistence.backend" in session.config.explicit:
        raise ConfigError(
            f"persistence.backend = {wanted!r}, but {session.path} was created with {stored!r}; to "
            f"move it: expbuf migrate {session.path} TARGET --persistence {wanted}",
            key="persistence.backend",
        )


def _check_other_logs(session: Session, path: Path, backend: str) -> None:
    """A folder without identity may hold what another backend keeps: its `create` cannot know."""
    with storage_errors("list", path):
        if not set(os.listdir(path)) - {folder.LOCKS, folder.CONTROL}:
            return
    registry = session.registry
    for name in registry.names("persistence"):
        provider = registry.get("persistence", name)
        if name == backend or "durable" not in provider.capabilities:
            continue
        uuid = b""
        with contextlib.suppress(StorageError, ConfigError, PluginError):
            settings = registry.settings("persistence", name, {})
            context = PersistenceContext(
                path=path, uuid=bytes(16), fs=session.fs, words=[0] * 8, writable=False
            )
            with contextlib.closing(provider.factory(settings, context)) as adapter:
                uuid = adapter.identify()
        if uuid:
            raise CorruptionError(
                f"{path}: holds the log of a buffer that the backend {name!r} keeps, but "
                f"{folder.IDENTITY} is missing; restore it from a backup or run `expbuf repair`. "
                "If nothing was ever added to it, remove the folder",
                path=path / folder.IDENTITY,
                offset=0,
            )


def _check_several(session: Session, backend: str, first: bool) -> None:
    """A backend that cannot serve several processes is not given to a second one."""
    provider = session.registry.get("persistence", backend)
    if not first and "multiprocess" not in provider.capabilities:
        raise StorageError(
            f"the persistence backend {backend!r} serves one process at a time, and another one "
            f"has {session.path} open"
        )


def _begin_anew(session: Session, loaded: Loaded, left: tuple[int, int] | None) -> None:
    """Set the control page and begin a new log behind what was recovered.

    Ids and LSNs that were seen and then lost with the power must not come again.

    Args:
        session: Has recovered.
        loaded: What was recovered.
        left: The next id and LSN of the session that has closed the buffer in order; they are those
            behind the log, or more, where it was the first behind a crash. None: it has not.
    """
    state, control = session.replica.state, session.control
    beyond = (state.reserved_id, state.reserved_lsn) if left is None else left
    next_id, next_lsn = max(state.next_id, beyond[0]), max(state.lsn + 1, beyond[1])
    control.reset(session.uuid)
    words = control.words
    words[c.APPENDED] = words[c.PUBLISHED] = words[c.DURABLE] = state.lsn
    words[c.NEXT_LSN], words[c.NEXT_ID] = next_lsn, next_id
    words[c.RESERVED_ID], words[c.RESERVED_LSN] = state.reserved_id, state.reserved_lsn
    words[c.SNAPSHOT_LSN] = loaded.snapshot_lsn
    words[c.REPRESENTATION] = state.representation
    try:
        session.adapter.start(next_lsn, state.lsn)
    except LogPostponed as exc:
        words[c.APPENDING] = c.POSTPONED  # whoever appends next begins the log
        _log.warning("%s can be read, but not written before there is room: %s", session.path, exc)
    session.replica.settled()


# ---------------------------------------------------------------- to read


class _Overtaken(Exception):
    """Others have recovered the buffer while a reader opened it, which met an error."""

    def __init__(self, met: StorageError) -> None:
        super().__init__(str(met))
        self.met = met


def _to_read_in_peace(session: Session, path: Path) -> tuple[Loaded, bool, bool]:
    """`_to_read`, and once more where others recover the buffer meanwhile."""
    for attempt in range(_TRIES):
        try:
            return _to_read(session, path)
        except _Overtaken as exc:
            if attempt + 1 == _TRIES:
                raise exc.met from None
        session.adapter.close()
        session.let_go()
        session.adapter_words = session.watched = None
    raise AssertionError("unreachable")


def _to_read(session: Session, path: Path) -> tuple[Loaded, bool, bool]:
    identity = folder.read_identity(path)
    if identity is None:
        folder.check_finished(path)
        raise folder.no_buffer(path)
    session.uuid = identity.uuid
    _check_backend(session, identity.backend)
    session.maintenance = session.builder_lock = ThreadLock(session.config.lock_timeout_s)
    live = _live_control(path, session.uuid, session.config.lock_timeout_s)
    session.control = live or Control.private()
    replica = _make_replica(session, identity.backend)
    if live is not None:
        session.generation = live.words[c.GENERATION]
        session.adapter.attach()
        with _unless_overtaken(session, live):
            loaded, clean = recovery.follow_from_snapshot(replica, path), False
        replica.broken = False
    else:
        # Nobody has it open: recover in private, and change nothing.
        witness, clean = 0, False
        page = session.watched = Control.map_existing(path / folder.CONTROL)
        if page is not None:
            session.generation = page.words[c.GENERATION]
            witness, clean = page.witness(session.uuid), page.closed_cleanly(session.uuid)
        with _corruption_told(session), _unless_overtaken(session, page):
            loaded = recovery.recover(replica, path, witness)
        session.control.words[c.PUBLISHED] = replica.state.lsn
    _reconcile(session)
    session.load_index()
    return loaded, live is None, clean


@contextlib.contextmanager
def _unless_overtaken(session: Session, page: Control | None) -> Iterator[None]:
    """What a reader misses where others recover meanwhile is no damage. `page`: as it was found."""
    try:
        yield
    except StorageError as exc:
        assert session.path is not None
        recovered = page is not None and page.words[c.GENERATION] != session.generation
        joined = session.control.is_mapped()  # there were writers from the beginning
        if recovered or (not joined and _has_writer(session.path)):
            raise _Overtaken(exc) from exc
        raise


def _has_writer(path: Path) -> bool:
    lock = path / folder.LOCKS / "open"
    with storage_errors("look at", lock):
        return lock.exists() and opener(lock) is not None


def _live_control(path: Path, uuid: bytes, timeout_s: float) -> Control | None:
    """The control page if a process has the buffer open for writing, else None."""
    if not _has_writer(path):
        return None
    control = Control.map_existing(path / folder.CONTROL)
    if control is None:
        return None
    deadline = time.monotonic() + timeout_s
    while control.words[c.GENERATION] == 0:  # being recovered right now
        if time.monotonic() > deadline or not _has_writer(path):
            control.close()
            return None
        time.sleep(_POLL_S)
    try:
        control.check(path / folder.CONTROL, uuid)
    except BaseException:
        control.close()
        raise
    return control


# ---------------------------------------------------------------- configuration against folder

_DIMS = (("visual_dim", "v_dim"), ("question_dim", "q_dim"))


def _reconcile(session: Session) -> None:
    """Compare the configuration with what the folder was created with.

    What may change is changed by a logged operation, for all processes; the rest is an error.
    """
    stored = session.replica.state.settings
    config, explicit = session.config, session.config.explicit
    for key, name in (("metric", "metric"), *_DIMS):
        wanted = getattr(config.embedding, key)
        dotted = f"embedding.{key}"
        if dotted in explicit and wanted is not None and stored[name] not in (None, wanted):
            raise ConfigError(
                f"{dotted} = {wanted!r}, but {session.path} was created with {stored[name]!r}; "
                "open it without that key, or change the buffer by `expbuf reindex`",
                key=dotted,
            )
    _reconcile_fusion(session, stored["fusion"])
    if not session.writable:
        return
    with session.maintenance:  # so that two that open at once do not undo each other's change
        session.commit_log.sync()
        session.refresh()
        stored = session.replica.state.settings
        changed = dict(stored)
        for key in ("max_size", "receipts_kept"):
            if key in explicit:
                changed[key] = getattr(config, key)
        for key, name in _DIMS:
            if stored[name] is None:
                changed[name] = getattr(config.embedding, key)
        if changed != stored:
            _write_settings(session, changed)


def _reconcile_fusion(session: Session, stored: Mapping[str, Any]) -> None:
    wanted = session.fusion_settings()
    if wanted == stored:
        return
    if any(key == "fusion" or key.startswith("fusion.") for key in session.config.explicit):
        raise ConfigError(
            f"fusion: configured {wanted}, but {session.path} was created with {stored}; open it "
            "without that key, or change the buffer by `expbuf reindex`",
            key="fusion",
        )
    session.use_fusion(stored)
