"""Copying a whole buffer into a new folder, to another storage backend or the same.

The copy is the same buffer: UUID, ids, counters, priorities, rewards, tags, receipts and settings
stay, and its log goes on behind the LSN of the source. So receipts and ids that are out remain
valid; only the place is new.

    migration.json -> SETTINGS, RELOG …, CARRY, synced -> read back and compared -> expbuf.json
    -> migration.json goes

A folder with `migration.json` does not open. So a copy that was interrupted at any instant is no
buffer yet; the next call goes on behind the last experience that is in the target's log, and reads
all of it back, or begins anew where the source has changed.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel

from expbuf_core import codec, folder, frames
from expbuf_core import control as c
from expbuf_core.buffer import ExperienceBuffer
from expbuf_core.config_schema import BufferConfig, load_config
from expbuf_core.contracts import (
    LogGone,
    Operation,
    PersistenceAdapter,
    PersistenceContext,
    PersistenceProvider,
    Pin,
    Stamped,
)
from expbuf_core.control import Control
from expbuf_core.crc import crc32
from expbuf_core.errors import ConfigError, CorruptionError, StorageError
from expbuf_core.filesystem import FileSystem, storage_errors
from expbuf_core.locks import ProcessLock
from expbuf_core.plugins import PluginRegistry, default_registry
from expbuf_core.relog import relog_draft
from expbuf_core.state import State, runs

NOTE = folder.UNFINISHED
"""Marks a target that is not finished: what is being copied into it."""

Progress = Callable[[int, int], None]
"""Called with (done, total); each experience counts twice: written, and read back."""

_BATCH_ROWS = 512
_BATCH_BYTES = 4 << 20  # of payloads in one operation
_SYNC_BYTES = 64 << 20  # written between two syncs
_TARGET_TIMEOUT_S = 1.0


@dataclass(frozen=True)
class TransferReport:
    """What was copied.

    Attributes:
        target: The new folder.
        uuid: Of the buffer, old and new.
        backend: That the new folder is stored with.
        experiences: That were copied.
        resumed: How many of them an interrupted call had copied before.
        lsn: Last operation of the new buffer.
    """

    target: Path
    uuid: str
    backend: str
    experiences: int
    resumed: int
    lsn: int


class Payloads(Protocol):
    """What the payloads of a copy are read from: a storage adapter, or what is like one there."""

    def pin(
        self, ids: NDArray[np.int64], locations: NDArray[np.int64], lengths: NDArray[np.uint32]
    ) -> Pin:
        """See `PersistenceAdapter.pin`."""
        ...


class Content(NamedTuple):
    """A buffer that is to be copied. Nothing of it changes meanwhile.

    Attributes:
        uuid: Its 16 bytes.
        state: Its columns, at its last LSN.
        next_id: Ids from here on are free.
        next_lsn: LSNs from here on are free.
        adapter: Pins its payloads. Those that were copied may be dropped meanwhile (`LogGone`).
        vectors: The fused vectors, (n, dim) float32, of (n,) live ids.
        check: Raises a `CorruptionError` if any that was given may not be right.
    """

    uuid: bytes
    state: State
    next_id: int
    next_lsn: int
    adapter: Payloads
    vectors: Callable[[NDArray[np.int64]], NDArray[np.float32]]
    check: Callable[[], None] = lambda: None

    def carried(self) -> dict[str, Any]:
        """What is taken over besides experiences."""
        state = self.state
        return {
            "next_id": self.next_id,
            "total_added": state.total_added,
            "receipts": [[receipt.hex(), lsn] for receipt, lsn in state.receipts.items()],
            "receipts_horizon": state.receipts_horizon,
        }


class Storage(NamedTuple):
    """A storage backend with its settings."""

    name: str
    provider: PersistenceProvider
    settings: BaseModel

    @classmethod
    def choose(cls, registry: PluginRegistry, name: str, config: BufferConfig) -> Storage:
        """The backend of this name, with its section of a configuration.

        Raises:
            PluginError: It cannot be selected.
            ConfigError: It keeps nothing when its process ends.
        """
        provider = cast("PersistenceProvider", registry.get("persistence", name))
        if "durable" not in provider.capabilities:
            raise ConfigError(
                f"the persistence backend {name!r} keeps nothing when its process ends; choose "
                "one that does",
                key="persistence.backend",
            )
        settings = registry.settings("persistence", name, config.persistence.section(name))
        return cls(name, provider, settings)

    def open(
        self, path: Path, uuid: bytes, fs: FileSystem, words: Any = None, *, writable: bool
    ) -> PersistenceAdapter:
        """An adapter for a folder."""
        own = [0] * 8 if words is None else words
        adapter: PersistenceAdapter = self.provider.factory(
            self.settings,
            PersistenceContext(path=path, uuid=uuid, fs=fs, words=own, writable=writable),
        )
        return adapter


# ---------------------------------------------------------------- a live buffer


def migrate(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    persistence: str,
    *,
    config: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    filesystem: FileSystem | None = None,
) -> TransferReport:
    """Copy a buffer into a new folder, with another storage backend or the same.

    The source may be in use. Its readers go on; its writers wait, since its append lock is held
    until the copy is finished, and get a `LockTimeout` after their `lock_timeout_s`. The source is
    left as it is. Close it, and open the target in its place: both have the same UUID.

    May be interrupted at any instant, and called again to go on. If the source has changed
    meanwhile, the copy begins anew.

    Args:
        source: Folder of the buffer.
        target: A folder that does not exist, is empty, or holds an unfinished copy of the same.
        persistence: Name of the storage backend.
        config: A YAML file or a mapping whose section `persistence` has its settings.
        progress: Called now and then with (done, total).
        filesystem: Does all writing to the target; for tests that record or fail it.

    Raises:
        StorageError: The target holds something else, or cannot be written.
        CorruptionError: The source is damaged; `expbuf repair` salvages.
        LockTimeout: Another process holds a lock of the source or the target for too long.
        PluginError: The backend cannot be used.
    """
    origin, goal = resolved(source), resolved(target)
    check_apart(origin, goal)
    registry = default_registry()
    storage = Storage.choose(registry, persistence, load_config(config, env={}, registry=registry))
    check_target(goal)
    command = ["expbuf", "migrate", str(origin), str(goal), "--persistence", persistence]
    if isinstance(config, str | os.PathLike):
        command += ["--config", os.path.abspath(config)]
    with _opened(origin) as content:
        return copy(
            content,
            goal,
            storage,
            progress=progress,
            fs=filesystem or FileSystem(),
            command=shlex.join(command),
        )


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Content]:
    """A buffer with its writers shut out."""
    # Not what the environment says: that is for the programs that use the buffer.
    config = load_config({"index": {"backend": "exact", "builder": "off"}}, env={})
    # Where nothing may be written nobody writes, and there is no lock to be had.
    mode = "a" if os.access(path, os.W_OK) else "r"
    with ExperienceBuffer.load_from_disk(path, config=config, mode=mode) as buffer:
        session = buffer._live()
        if mode == "r" and session.control.is_mapped():
            raise StorageError(
                f"{path} is open for writing elsewhere, and this user may not write there, so "
                "writers cannot be kept waiting; close it, or migrate as its owner"
            )
        with contextlib.ExitStack() as held:
            words = session.control.words
            if session.writable:
                lock = ProcessLock(path / folder.LOCKS / "append", config.lock_timeout_s)
                held.callback(lock.close)
                session.commit_log.sync()  # so that little is left to do while writers wait
                held.enter_context(lock)
                session.commit_log.settle()  # what others have written before the lock was ours
            session.refresh()
            with session.replica.lock:
                state = session.replica.state
                settings = state.settings
                intake = session.intake() if None not in _dims(settings) else None
                if intake is not None:
                    session.replica.fill(intake.refuse)
                vectors = session.replica.tiers.gatherer(0 if intake is None else intake.dim)
            next_id, next_lsn = state.next_id, state.lsn + 1
            if session.writable:
                next_id, next_lsn = max(next_id, words[c.NEXT_ID]), words[c.NEXT_LSN]
            else:  # how the last process ended is not known
                next_id = max(next_id, state.reserved_id)
                next_lsn = max(next_lsn, state.reserved_lsn)
            yield Content(
                session.uuid, state, next_id, next_lsn, session.adapter, vectors, vectors.check
            )


def _dims(settings: Mapping[str, Any]) -> tuple[int | None, int | None]:
    return settings["v_dim"], settings["q_dim"]


# ---------------------------------------------------------------- copying


def copy(
    content: Content,
    target: Path,
    storage: Storage,
    *,
    progress: Progress | None,
    fs: FileSystem,
    command: str = "",
    anew: bool = False,
) -> TransferReport:
    """Write a buffer into a new folder, read it back, and only then let it be one.

    Args:
        content: The buffer.
        target: The folder.
        storage: How it is stored there.
        progress: Called now and then with (done, total).
        fs: Does all writing.
        command: For those who find the folder unfinished: what was called, as in a shell.
        anew: Do not go on with what an interrupted call has left.

    Raises:
        StorageError: As for `migrate`; or what was read back is not what was to be written.
    """
    check_target(target)
    with storage_errors("create", target):
        fs.mkdir(target / folder.LOCKS)
        fs.sync_folder(target.parent)
    lock = ProcessLock(target / folder.LOCKS / "opening", _TARGET_TIMEOUT_S)
    try:
        with lock:
            check_target(target)  # again, under the lock
            return _Copy(content, target, storage, progress, fs, command).run(anew)
    finally:
        lock.close()


class _Copy:
    """One call of `copy`, under the lock of the target."""

    def __init__(
        self,
        content: Content,
        target: Path,
        storage: Storage,
        progress: Progress | None,
        fs: FileSystem,
        command: str,
    ) -> None:
        self._command = command
        self.content = content
        self.target = target
        self.storage = storage
        self.fs = fs
        state = content.state
        slots = state.live_slots()
        self.ids = state.id[slots]
        self.lengths = state.length[slots]
        self._seals = np.zeros(len(self.ids), np.uint32)  # of the payloads that were copied
        self._sealed = np.zeros(len(self.ids), bool)
        self._progress = progress
        self._done = 0

    def run(self, anew: bool) -> TransferReport:
        """See `copy`."""
        content, fs = self.content, self.fs
        note = folder.read_unfinished(self.target)
        wanted = self._note()
        resumable = note is not None and not anew
        if note is not None:
            resumable &= all(note.get(key) == wanted[key] for key in ("uuid", "lsn", "backend"))
        if note is not None and note["uuid"] != wanted["uuid"]:
            raise StorageError(
                f"{self.target} holds the unfinished copy of another buffer ({note['uuid']}); "
                "remove it, or choose a new folder"
            )
        if not resumable:
            self._clear()  # durably, before a note calls it part of this copy
            with storage_errors("write", self.target / NOTE):
                fs.sync_folder(self.target)
                fs.write_atomically(self.target / NOTE, [json.dumps(wanted, indent=1).encode()])
        control = Control.map(self.target / folder.CONTROL, writable=True)
        try:
            control.reset(content.uuid)
            lsn, resumed = self._write(control, resumable)
            self._verify(lsn)
            try:
                content.check()
            except CorruptionError:
                self._clear()  # who calls again begins anew
                raise
            control.mark_clean(self.target / folder.CONTROL, fs)
        finally:
            control.close()
        folder.write_identity(self.target, self.storage.name, content.uuid, fs)
        with storage_errors("remove", self.target / NOTE):
            fs.unlink(self.target / NOTE)  # from here on it is a buffer
            fs.sync_folder(self.target)
        uuid = content.uuid.hex()
        return TransferReport(self.target, uuid, self.storage.name, len(self.ids), resumed, lsn)

    def _note(self) -> dict[str, Any]:
        facts: dict[str, Any] = {
            "uuid": self.content.uuid.hex(),
            "lsn": self.content.state.lsn,
            "backend": self.storage.name,
            "command": self._command,
        }
        return {**facts, "crc": crc32(json.dumps(facts).encode())}

    def _open(self, words: Any = None, *, writable: bool) -> PersistenceAdapter:
        return self.storage.open(self.target, self.content.uuid, self.fs, words, writable=writable)

    def _clear(self) -> None:
        """Remove what an earlier copy of another state has left."""
        for path in sorted(self.target.rglob("*"), reverse=True):
            inside = path.relative_to(self.target).parts[0]
            if inside in (folder.LOCKS, folder.CONTROL, NOTE):
                continue
            with storage_errors("remove", path):
                if path.is_dir() and not path.is_symlink():
                    path.rmdir()
                else:
                    self.fs.unlink(path)

    def _step(self, count: int) -> None:
        self._done += count
        if self._progress is not None:
            self._progress(self._done, 2 * len(self.ids))

    # ------------------------------------------------------------ writing

    def _write(self, control: Control, resumable: bool) -> tuple[int, int]:
        """Write what the target lacks; its last LSN, and how many experiences were there."""
        content, words = self.content, control.words
        own = words[c.ADAPTER : c.ADAPTER + 8] if isinstance(words, memoryview) else None
        adapter, state = self._resumed(own) if resumable else (None, State())
        if adapter is None:
            self._clear()
            with contextlib.closing(self._open(own, writable=True)) as made:
                made.create(1)
            adapter = self._open(own, writable=True)
            state = _recovered(adapter, 0)
        if state.next_id > content.next_id:
            # The call before this one found more ids reserved: the source had not been closed in
            # order then. To leave some out does no harm.
            content = self.content = content._replace(next_id=state.next_id)
        with contextlib.ExitStack() as opened:
            if isinstance(own, memoryview):
                opened.callback(own.release)
            opened.callback(adapter.close)
            # Behind the numbers of the source, as after a crash that has left a gap.
            log = _Log(adapter, max(state.lsn + 1, content.next_lsn))
            adapter.start(log.next_lsn, state.lsn)
            if not state.settings:
                log.append(codec.encode_settings(content.state.settings))
            resumed = int(np.searchsorted(self.ids, state.next_id))
            self._step(resumed)
            for part in self._batches(resumed):
                log.append(self._relogged(part))
                self._step(part.stop - part.start)
            if not state.settings or _uncarried(state, content) is not None:
                log.append(codec.encode_carry(content.carried()))
            log.sync()
            last = log.next_lsn - 1
            adapter.finish(last)
        words[c.APPENDED] = words[c.PUBLISHED] = words[c.DURABLE] = last
        words[c.NEXT_LSN], words[c.NEXT_ID] = last + 1, content.next_id
        return last, resumed

    def _resumed(self, own: Any) -> tuple[PersistenceAdapter | None, State]:
        """What an interrupted call has written; None where that is of no use."""
        adapter = self._open(own, writable=True)
        try:
            state = _recovered(adapter, 0)
            if _difference(self.content.state, state) is None:
                return adapter, state
        except CorruptionError:
            pass  # nothing in it is needed
        except BaseException:
            adapter.close()
            raise
        adapter.close()
        return None, State()

    def _batches(self, start: int) -> Iterator[slice]:
        """Places of the experiences that go into one operation each."""
        while start < len(self.ids):
            sizes = np.cumsum(self.lengths[start : start + _BATCH_ROWS], dtype=np.int64)
            count = max(1, int(np.searchsorted(sizes, _BATCH_BYTES, side="right")))
            yield slice(start, start + count)
            start += count

    def _relogged(self, part: slice) -> Operation:
        content, ids = self.content, self.ids[part]
        state = content.state
        slots = state.find(ids)
        pin = content.adapter.pin(ids, state.location[slots], state.length[slots])
        operation = relog_draft(state, ids, slots, pin, content.vectors(ids)).operation
        self._seals[part], self._sealed[part] = operation.row_crcs, True
        return operation

    # ------------------------------------------------------------ reading back

    def _verify(self, lsn: int) -> None:
        """Read the target as a stranger would, and compare everything."""
        content = self.content
        adapter = self._open(writable=False)
        with contextlib.closing(adapter):
            state = _recovered(adapter, lsn)
            what = _difference(content.state, state) or _uncarried(state, content)
            if what is not None:
                raise self._differs(what)
            self._done = len(self.ids)
            for part in self._batches(0):
                ids = self.ids[part]
                slots = state.find(ids)
                copied = adapter.pin(ids, state.location[slots], state.length[slots])
                original = self._original(part)
                for i, id_ in enumerate(ids.tolist()):
                    row = copied.read(i)
                    if original is not None:
                        same = row == original.read(i)
                    else:
                        same = frames.check_row(row) == (id_, int(self._seals[part][i]))
                    if not same:
                        raise self._differs(f"the payload of experience {id_}")
                self._step(len(ids))

    def _original(self, part: slice) -> Pin | None:
        """The payloads in the source; None where they are gone and their seals are known."""
        state, ids = self.content.state, self.ids[part]
        slots = state.find(ids)
        try:
            return self.content.adapter.pin(ids, state.location[slots], state.length[slots])
        except LogGone:
            if not self._sealed[part].all():
                raise
            return None

    def _differs(self, what: str) -> StorageError:
        return StorageError(
            f"{self.target}: {what}, read back, differs from the source; the copy was not "
            "finished. Remove the folder and try again, on another disk if it happens again"
        )


class _Log:
    """Appends operations and syncs now and then. Only this process can see the target."""

    def __init__(self, adapter: PersistenceAdapter, lsn: int) -> None:
        self._adapter = adapter
        self.next_lsn = lsn
        self._durable = 0
        self._unsynced = 0

    def append(self, operation: Operation) -> None:
        self._adapter.append([Stamped(self.next_lsn, 0, operation)], self._durable)
        self.next_lsn += 1
        self._unsynced += len(operation.body) + len(operation.rows)
        if self._unsynced > _SYNC_BYTES:
            self.sync()

    def sync(self) -> None:
        self._adapter.sync()
        self._durable, self._unsynced = self.next_lsn - 1, 0


def _recovered(adapter: PersistenceAdapter, durable_lsn: int) -> State:
    """The state that a log leads to."""
    state = State()
    for run in runs(adapter.recover_alike(0, durable_lsn)):
        state.apply_run(run)
    return state


def _difference(source: State, target: State) -> str | None:
    """What of a copy, as far as it has come, is not as in the source; None if all of it is."""
    if source.settings != target.settings:
        return "the settings"
    here, there = source.live_slots()[: target.count], target.live_slots()
    for name in ("length", *codec.RELOG_COLUMNS):
        left, right = getattr(source, name)[here], getattr(target, name)[there]
        if left.tobytes() != right.tobytes():  # by bytes: NaN is a value, too
            return f"the column {name!r}"
    tags = [
        [side.tag_sets[code] for code in side.tags[slots].tolist()]
        for side, slots in ((source, here), (target, there))
    ]
    if tags[0] != tags[1]:
        return "the tags"
    ids = target.live_ids().tolist()
    named = {id_: source.rewards[id_] for id_ in ids if id_ in source.rewards}
    return "the named rewards" if named != target.rewards else None


def _uncarried(state: State, content: Content) -> str | None:
    """What of a copy is missing or other behind its last experience; None if nothing is."""
    source = content.state
    for what, found, expected in (
        ("the number of experiences", state.count, source.count),
        ("the next id", state.next_id, content.next_id),
        ("the number of all that were added", state.total_added, source.total_added),
        ("the horizon of receipts", state.receipts_horizon, source.receipts_horizon),
    ):
        if found != expected:
            return f"{what} ({found}, expected {expected})"
    alike = list(state.receipts.items()) == list(source.receipts.items())
    return None if alike else "the list of receipts"


# ---------------------------------------------------------------- folders


def resolved(path: str | os.PathLike[str]) -> Path:
    """The folder itself, links followed."""
    return Path(os.path.realpath(os.fspath(path)))


def check_apart(source: Path, target: Path) -> None:
    """See that neither folder is, or lies in, the other."""
    if source == target or source in target.parents or target in source.parents:
        raise StorageError(f"{target} and {source}: one must not be, or hold, the other")


def check_target(target: Path) -> None:
    """See that a copy may be written here, or gone on with.

    Raises:
        StorageError: The folder holds something else.
    """
    with storage_errors("list", target):
        if not target.exists():
            return
        if not target.is_dir():
            raise StorageError(f"{target} is a file; a buffer is a folder")
        names = {name for name in os.listdir(target) if not name.endswith(".tmp")}
    if NOTE in names or names <= {folder.LOCKS}:
        return
    what = "a buffer already" if folder.IDENTITY in names else "other files"
    raise StorageError(f"{target} holds {what}; choose a new or empty folder")
