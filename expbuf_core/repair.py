"""`expbuf repair`: what can be saved of a damaged buffer goes to a new folder.

The newest intact snapshot, and every operation behind it that can still be read, in the order of
their LSNs; then every experience whose payload is intact. The index, the control page and the lock
files are not needed. The damaged folder is only read. What could not be saved is in the report, by
id, LSN, file and offset.
"""

from __future__ import annotations

import contextlib
import os
import shlex
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from expbuf_core import (
    codec,
    damaged_snapshots,
    folder,
    frames,
    opening,
    payloads,
    snapshots,
)
from expbuf_core import control as c
from expbuf_core.codec import RelogBody
from expbuf_core.commit import RESERVATION
from expbuf_core.config_schema import load_config
from expbuf_core.contracts import (
    Buffer,
    Damage,
    EmbeddingFusion,
    LoggedOperation,
    LogGone,
    PersistenceAdapter,
    Pin,
)
from expbuf_core.control import Control
from expbuf_core.documents import MALFORMED, read_document
from expbuf_core.embeddings import fuse, fused_dim
from expbuf_core.errors import (
    ConfigError,
    CorruptionError,
    FormatVersionError,
    PluginError,
    StorageError,
)
from expbuf_core.filesystem import FileSystem, read_file
from expbuf_core.locks import opener
from expbuf_core.plugins import PluginRegistry, default_registry
from expbuf_core.session import Session
from expbuf_core.state import State
from expbuf_core.transfer import (
    Content,
    Progress,
    Storage,
    check_apart,
    check_target,
    copy,
    resolved,
)

Ranges = tuple[tuple[int, int], ...]
"""Whole numbers from the first to the second of each pair, both included."""

SUFFIX = ".repaired"
_CHUNK = 512
_NO_UUID = bytes(16)
_ANY_SIZE = 1 << 62
_UNREADABLE = (LogGone, StorageError, OverflowError, ValueError)
_PLAUSIBLE = 1 << 40  # a number in the control page that is further ahead is damaged


@dataclass(frozen=True)
class RepairReport:
    """What was saved, and what was not.

    Attributes:
        folder: The damaged one, unchanged.
        target: The new one.
        uuid: Of the buffer, in both.
        backend: Storage backend of both.
        saved: Experiences in the new folder.
        lsn: Last operation that could be read.
        snapshot_lsn: Of the snapshot that was used; 0: none.
        lost_ids: Experiences that should be there and are not. Where the operation itself is lost
            that added them: the ids that it may have given.
        rebuilt_ids: Saved, while some or all of their columns are lost, and neither the log nor
            the payload says for certain what stood there. What it says is taken, such as the reward
            of the add; else confidence, priority, timestamp and counts are made up.
        lost_lsns: Operations that could not be read: additions, removals, updates, outcomes.
        damage: Bad places, each with file and offset; those that cost nothing among them.
        notes: What else is worth knowing.
    """

    folder: Path
    target: Path
    uuid: str
    backend: str
    saved: int
    lsn: int
    snapshot_lsn: int
    lost_ids: Ranges
    rebuilt_ids: Ranges
    lost_lsns: Ranges
    damage: tuple[Damage, ...]
    notes: tuple[str, ...]

    @property
    def complete(self) -> bool:
        """Whether nothing that is known of was lost."""
        return not (self.lost_ids or self.rebuilt_ids or self.lost_lsns)

    def __str__(self) -> str:
        lines = [f"{self.saved} experiences saved to {self.target}"]
        for ranges, what in (
            (self.lost_ids, "lost experiences: ids"),
            (self.rebuilt_ids, "saved with columns that are made up or not the newest: ids"),
            (self.lost_lsns, "lost operations: lsn"),
        ):
            if ranges:
                lines.append(f"{what} {shown(ranges)}")
        lines += [f"damage: {place.message}" for place in self.damage]
        lines += [f"note: {note}" for note in self.notes]
        if self.complete:
            lines.append("nothing was lost")
        return "\n".join(lines)


def shown(ranges: Ranges) -> str:
    """Ranges as people write them: 3, 7–9."""
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in ranges)


def repair(
    damaged: str | os.PathLike[str],
    target: str | os.PathLike[str] | None = None,
    *,
    persistence: str | None = None,
    config: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    filesystem: FileSystem | None = None,
) -> RepairReport:
    """Save what can be saved of a damaged buffer.

    The damaged folder is only read. The new one is written like a migration: it is no buffer until
    all of it was read back, and an interrupted call is begun anew.

    Args:
        damaged: Folder of the buffer; nobody may have it open.
        target: A folder that does not exist or is empty; default: the damaged one's name with
            `.repaired` behind it.
        persistence: Name of the storage backend, where neither the folder's identity nor its files
            can tell.
        config: A YAML file or a mapping: settings of the backend, and those of the buffer that
            are taken if the stored ones are lost.
        progress: Called now and then with (done, total) while the new folder is written.
        filesystem: Does all writing; for tests that record or fail it.

    Raises:
        StorageError: The buffer is in use, nothing in the folder is a buffer's, or the target
            cannot be written.
        FormatVersionError: A newer version of expbuf wrote it; that one has to repair it.
        PluginError: A backend or fusion that it needs is not installed.
    """
    path = resolved(damaged)
    goal = resolved(target) if target is not None else path.with_name(path.name + SUFFIX)
    check_apart(path, goal)
    check_target(goal)
    _check_unused(path)
    registry = default_registry()
    settings = load_config(config, env={}, registry=registry)
    damage: list[Damage] = []
    uuid, name = _identify(path, registry, persistence, damage)
    storage = Storage.choose(registry, name, settings)
    numbers = _Numbers.of(path, uuid)
    fallback = opening._first_settings(
        Session(None, settings, registry, mode="r", lock=None, fs=FileSystem())
    )
    with contextlib.closing(storage.open(path, uuid, FileSystem(), writable=False)) as adapter:
        replay = _replayed(path, uuid, adapter, fallback, numbers.witness)
        replay.damage[:0] = damage
        replay.settle(fallback, numbers.known_id(replay.state))
        state = replay.state
        content = Content(
            uuid,
            state,
            *numbers.next(state, replay),
            adapter,
            _Vectors(adapter, state, registry),
        )
        copy(
            content,
            goal,
            storage,
            progress=progress,
            fs=filesystem or FileSystem(),
            command=shlex.join(["expbuf", "repair", str(path), str(goal)]),
            anew=True,
        )
    return RepairReport(
        folder=path,
        target=goal,
        uuid=uuid.hex(),
        backend=name,
        saved=state.count,
        lsn=state.lsn,
        snapshot_lsn=replay.snapshot_lsn,
        lost_ids=_merged(replay.lost_ids),
        rebuilt_ids=_merged(replay.rebuilt_ids),
        lost_lsns=_merged(replay.lost_lsns),
        damage=tuple(dict.fromkeys(replay.damage)),
        notes=tuple(replay.notes),
    )


# ---------------------------------------------------------------- what buffer it is


def _check_unused(path: Path) -> None:
    if not path.is_dir():
        raise StorageError(f"{path} is no folder")
    lock = path / folder.LOCKS / "open"
    pid = opener(lock) if lock.exists() else None
    if pid is not None:
        raise StorageError(f"{path} is open in process {pid}; end that first")


def _identify(
    path: Path, registry: PluginRegistry, persistence: str | None, damage: list[Damage]
) -> tuple[bytes, str]:
    """UUID and storage backend; from whatever carries them where the identity is lost."""
    file = path / folder.IDENTITY
    try:
        identity = folder.read_identity(path)
        if identity is not None:
            found = _contradiction(path, registry, identity)
            if found is None:
                return identity.uuid, persistence or identity.backend
            message = f"{file.name}: it belongs to another buffer than all other files"
            damage.append(Damage(str(file), 0, 0, 0, message))
            return found[0], persistence or found[1]
        missing = f"{file.name}: missing"
        if (path / folder.UNFINISHED).exists():
            missing = f"{folder.UNFINISHED}: the folder is a copy that was not finished"
        damage.append(Damage(str(file), -1, 0, 0, missing))
    except CorruptionError as exc:
        damage.append(Damage(str(file), exc.offset or 0, 0, 0, str(exc)))
    for uuid, name in _in_logs(path, registry, [persistence] if persistence else None):
        return uuid, name
    votes = Counter(_other_uuids(path))
    backend = persistence or _stated_backend(file)
    if not votes or backend not in registry.names("persistence"):
        raise StorageError(
            f"{path}: the identity is lost, and nothing in the folder tells which buffer it was"
            + (", or by which backend it was stored; name it (--persistence)" if votes else "")
        )
    return votes.most_common(1)[0][0], str(backend)


def _contradiction(
    path: Path, registry: PluginRegistry, identity: folder.Identity
) -> tuple[bytes, str] | None:
    """UUID and backend that a log says, where nothing in the folder has those of the identity."""
    if identity.uuid in _other_uuids(path):
        return None
    found = list(_in_logs(path, registry))
    return None if identity.uuid in [uuid for uuid, _ in found] else next(iter(found), None)


def _in_logs(
    path: Path, registry: PluginRegistry, names: Sequence[str] | None = None
) -> Iterator[tuple[bytes, str]]:
    """UUIDs that logs have, with the backends that keep them; those of `names` are asked."""
    for name in registry.names("persistence") if names is None else names:
        with contextlib.suppress(StorageError, ConfigError, PluginError):
            storage = Storage.choose(registry, name, load_config({}, env={}, registry=registry))
            adapter = storage.open(path, _NO_UUID, FileSystem(), writable=False)
            with contextlib.closing(adapter):
                uuid = adapter.identify()
            if len(uuid) == 16:
                yield uuid, name


def _other_uuids(path: Path) -> Iterator[bytes]:
    """UUIDs in the headers of snapshots, and in the control page."""
    for lsn in _snapshots(path, []):
        with contextlib.suppress(OSError):
            size = snapshots._HEADER.size
            head = read_file(snapshots.path_of(path, lsn), most=size)
            if len(head) == size:
                yield snapshots._HEADER.unpack(head)[4]
    page = _control(path)
    if page is not None:
        with contextlib.closing(page):
            raw = b"".join(page.words[c.UUID + i].to_bytes(8, "little") for i in (0, 1))
        if raw != _NO_UUID:
            yield raw


def _snapshots(path: Path, damage: list[Damage]) -> list[int]:
    """LSNs of the snapshots, newest first; none where their folder cannot be read."""
    try:
        return snapshots.available(path)
    except CorruptionError as exc:
        damage.append(Damage(exc.path or str(path), -1, 0, 0, str(exc)))
        return []


def _control(path: Path) -> Control | None:
    """The control page; None where it is missing or cannot be read."""
    with contextlib.suppress(StorageError):
        return Control.map_existing(path / folder.CONTROL)
    return None


def _stated_backend(file: Path) -> str | None:
    with contextlib.suppress(OSError, *MALFORMED):
        return str((read_document(file) or {})["backend"])
    return None


class _Numbers:
    """What the control page says of numbers; nothing where it is damaged or of another time."""

    def __init__(self, witness: int = 0, next_id: int = 0, next_lsn: int = 0) -> None:
        self.witness = witness
        self._next_id = next_id
        self._next_lsn = next_lsn

    @classmethod
    def of(cls, path: Path, uuid: bytes) -> _Numbers:
        page = _control(path)
        if page is None:
            return cls()
        with contextlib.closing(page):
            words = page.words
            witness = page.witness(uuid)
            if not witness or not words[c.DURABLE] <= words[c.APPENDED] < words[c.NEXT_LSN]:
                return cls()
            return cls(witness, words[c.NEXT_ID], words[c.NEXT_LSN])

    def known_id(self, state: State) -> int:
        """The next id at the end of the log; 0 where that is not known."""
        next_id = max(state.next_id, state.reserved_id)
        plausible = state.next_id <= self._next_id < next_id + _PLAUSIBLE
        return self._next_id if self.witness and plausible else 0

    def next(self, state: State, replay: _Replay) -> tuple[int, int]:
        """Id and LSN that nobody has seen yet."""
        lsn = max([state.lsn, *(last for _, last in replay.lost_lsns)])
        next_id, next_lsn = max(state.next_id, state.reserved_id), max(lsn + 1, state.reserved_lsn)
        known = self.known_id(state)
        if known:
            next_id = known
        elif replay.open_end:
            next_id += frames.MAX_ROWS  # what was behind the end is not known
        if self.witness and next_lsn <= self._next_lsn < next_lsn + _PLAUSIBLE:
            next_lsn = self._next_lsn
        elif replay.open_end:
            next_lsn += RESERVATION
        return next_id, next_lsn


# ---------------------------------------------------------------- what was in it


def _replayed(
    path: Path,
    uuid: bytes,
    adapter: PersistenceAdapter,
    fallback: Mapping[str, Any],
    witness: int,
) -> _Replay:
    """The state that can be reached, by the best way there is."""
    damage: list[Damage] = []
    for lsn in _snapshots(path, damage):
        file = snapshots.path_of(path, lsn)
        try:
            state = snapshots.read(path, lsn, uuid)
        except FormatVersionError:
            raise
        except StorageError as exc:
            offset = getattr(exc, "offset", None)
            damage.append(Damage(str(file), -1 if offset is None else offset, 0, 0, str(exc)))
            continue
        replay = _Replay(state, adapter, path, witness)
        replay.damage += damage
        replay.run()
        return replay
    # Without a snapshot, the log alone; unless it lacks something that a damaged one still has.
    state = State()
    state.settings = {**fallback, "max_size": _ANY_SIZE}
    replay = _Replay(state, adapter, path, witness)
    replay.run()
    if replay.lost_lsns:
        replays = list(_behind_damaged_snapshots(path, adapter, witness))
        if replays:
            replay = min(replays, key=lambda each: (each.count_lost(), len(each.rebuilt_ids)))
        else:
            replay.notes.append(
                "experiences that were removed by lost operations may have come back, and updates "
                "by them are undone"
            )
    replay.damage[:0] = damage
    return replay


def _behind_damaged_snapshots(
    path: Path, adapter: PersistenceAdapter, witness: int
) -> Iterator[_Replay]:
    """What each of the snapshots leads to, newest first, of which enough is intact."""

    def fields(state: State, ids: NDArray[np.int64]) -> Iterator[Mapping[str, Any] | None]:
        slots = state.find(ids)
        for row, _ in _rows(adapter, ids, state.location[slots], state.length[slots]):
            try:
                found = None if frames.check_row(row) is None else codec.decode_row(row).fields
            except codec.UNDECODABLE:
                found = None
            yield found

    for lsn in _snapshots(path, []):
        file = snapshots.path_of(path, lsn)
        remains = damaged_snapshots.read(file, lambda: adapter.salvage(0), fields)
        if remains is None:
            continue
        replay = _Replay(remains.state, adapter, path, witness)
        replay.run()
        replay.rebuilt_ids += [(id_, id_) for id_ in remains.unknown.tolist()]
        if remains.lost:
            names, unknown = ", ".join(remains.lost), len(remains.unknown)
            replay.notes.append(
                f"of the experiences up to lsn {lsn} these columns are lost: {names}; what stood "
                f"there is known otherwise{f' but for {unknown} of them' if unknown else ''}"
            )
        yield replay


class _Replay:
    """Applies what `salvage` finds, and keeps count of what it does not.

    Attributes:
        snapshot_lsn: Where it began.
        open_end: Operations may have been lost behind the last one.
    """

    def __init__(self, state: State, adapter: PersistenceAdapter, path: Path, witness: int) -> None:
        self.state = state
        self.snapshot_lsn = state.lsn
        self.open_end = False
        self.damage: list[Damage] = []
        self.notes: list[str] = []
        self.lost_lsns: list[tuple[int, int]] = []
        self.lost_ids: list[tuple[int, int]] = []
        self.rebuilt_ids: list[tuple[int, int]] = []
        self._adapter = adapter
        self._path = path
        self._witness = witness
        self._gap = False  # since the last add that was applied
        self._lost_rows: list[int] = []  # ids of payloads without columns that are damaged, too

    def count_lost(self) -> int:
        """How many operations, at most."""
        return sum(last - first + 1 for first, last in _merged(self.lost_lsns))

    def run(self) -> None:
        """Apply all that can be read behind the state."""
        state = self.state
        for item in self._adapter.salvage(state.lsn):
            if isinstance(item, Damage):
                self._damaged(item)
            elif not item.body and item.kind in (codec.ADD, codec.RELOG):
                self._rebuild(item)
            else:
                self._apply(item)
        reached = max([state.lsn, *(last for _, last in self.lost_lsns)])
        if self._witness > reached:
            message = f"operations {reached + 1} to {self._witness} were durable and are missing"
            self._damaged(Damage(str(self._path), -1, reached + 1, self._witness, message))
        self.open_end |= self._gap

    def _damaged(self, place: Damage) -> None:
        self.damage.append(place)
        first = place.first_lsn
        if not first:
            return
        self.open_end |= not place.last_lsn
        if place.torn and self._witness < first:
            self.notes.append(
                f"what stands at the end of the log from lsn {first} on is no whole operation: a "
                "torn tail that was never acknowledged, unless it was damaged later"
            )
            return
        self.lost_lsns.append((first, place.last_lsn or max(first, self._witness)))
        self._gap = True

    def _apply(self, operation: LoggedOperation) -> None:
        state, next_id = self.state, self.state.next_id
        try:
            self._follow_representation(operation)
            change = state.apply(operation)
        except CorruptionError as exc:
            self._damaged(Damage(str(self._path), -1, operation.lsn, operation.lsn, str(exc)))
            return
        if operation.kind in (codec.ADD, codec.RELOG) and change.added is not None:
            self._gap_closed(next_id, int(change.added[0]))
        elif operation.kind == codec.REMOVE:
            for id_ in codec.decode_ids(operation.body).tolist():
                self._not_lost(id_)
        elif operation.kind == codec.CLEAR:
            self.lost_ids.clear()
            self._lost_rows.clear()

    def _follow_representation(self, operation: LoggedOperation) -> None:
        """Where a change of representation is lost, go over at the first add behind it."""
        state = self.state
        if operation.kind != codec.ADD:
            return
        number = codec.add_representation(operation.body)
        if number <= state.representation or not self._gap:
            return
        made = codec.encode_settings({**state.settings, "representation": number})
        state.apply(LoggedOperation(state.lsn, codec.SETTINGS, 0, made.body, 0, made.lengths))
        state.settings = {**state.settings, "v_dim": None, "q_dim": None}
        self.notes.append(
            f"the change to representation {number} is lost: dimensions are taken from the "
            "embeddings, the fusion is taken to be as before"
        )

    def _gap_closed(self, next_id: int, first_id: int) -> None:
        """An add after lost operations: the ids between are those that they may have given."""
        if self._gap and first_id > next_id:
            self.lost_ids.append((next_id, first_id - 1))
        self._gap = False

    def _not_lost(self, id_: int) -> None:
        """It was removed later, so nothing is missing."""
        with contextlib.suppress(ValueError):
            self._lost_rows.remove(id_)
        for i, (first, last) in enumerate(self.lost_ids):
            if first <= id_ <= last:
                parts = [(first, id_ - 1), (id_ + 1, last)]
                self.lost_ids[i : i + 1] = [(a, b) for a, b in parts if a <= b]
                return

    def _rebuild(self, operation: LoggedOperation) -> None:
        """Experiences whose columns are lost, from their payloads."""
        state, n = self.state, len(operation.lengths)
        is_add = operation.kind == codec.ADD
        next_id, total = state.next_id, state.total_added
        ends = np.cumsum(operation.lengths, dtype=np.int64)
        places = operation.location + ends - operation.lengths
        ids = operation.first_id + np.arange(n)
        if is_add:
            self._gap_closed(next_id, operation.first_id)
        for i, (row, damage) in enumerate(_rows(self._adapter, ids, places, operation.lengths)):
            checked = frames.check_row(row)
            if checked is None or (is_add and checked[0] != ids[i]):
                self.damage.append(damage)
                if is_add:
                    self._lost_rows.append(int(ids[i]))
                continue
            if not is_add and self._is_readable(checked[0]):
                continue  # what wrote it anew is lost; it may have meant other embeddings
            body = self._made_up(checked[0], codec.decode_row(row).fields, total + i)
            at, length = int(places[i]), operation.lengths[i : i + 1]
            relog = LoggedOperation(operation.lsn, codec.RELOG, 0, body, at, length)
            if state.apply(relog).added is not None:
                self.rebuilt_ids.append((checked[0], checked[0]))
        state.lsn = operation.lsn
        if is_add:
            state.next_id = max(state.next_id, operation.first_id + n)
            state.total_added = max(state.total_added, total + n)

    def _is_readable(self, id_: int) -> bool:
        """Whether an experience is here, with its payload."""
        state, ids = self.state, np.array([id_])
        slots = state.find(ids)
        if slots[0] < 0:
            return False
        rows = _rows(self._adapter, ids, state.location[slots], state.length[slots])
        return all(frames.check_row(row) is not None for row, _ in rows)

    def _made_up(self, id_: int, fields: Mapping[str, Any], sequence: int) -> bytes:
        """Columns for a payload: what it has itself, and what is usual for the rest."""
        state = self.state
        newest = state.live_slots()[-1:]
        rewards = fields.get("rewards")
        reward = float("nan") if rewards is None else 0.0
        with contextlib.suppress(TypeError, ValueError):
            reward = float(sum(rewards.values()) if isinstance(rewards, Mapping) else rewards)  # type: ignore[arg-type]
        columns: dict[str, Any] = {
            "id": id_,
            "sequence": sequence,
            "timestamp": state.timestamp[newest[0]] if len(newest) else 0.0,
            "reward": reward,
            "confidence": 1.0,
            "priority": float(state.priority[state.live_slots()].max()) if len(newest) else 1.0,
            "retrieval_count": 0,
            "success_count": 0.0,
            "flags": 0,
        }
        arrays = {
            name: np.array([columns[name]], kind) for name, kind in codec.RELOG_COLUMNS.items()
        }
        tags = fields.get("tags")
        labels = {"tags": [list(tags)], "rewards": {}} if isinstance(tags, list | tuple) else None
        return codec.encode_relog(RelogBody(arrays, np.empty((1, 0), np.float32), labels))

    # ------------------------------------------------------------ behind the last operation

    def settle(self, fallback: Mapping[str, Any], next_id: int) -> None:
        """Leave out what has no intact payload, and complete the settings.

        Args:
            fallback: Settings where they are lost.
            next_id: At the end of the log; 0 where that is not known.

        Raises:
            StorageError: Nothing is left.
        """
        state = self.state
        if not state.lsn:
            raise StorageError(f"{self._path}: neither a snapshot nor any operation can be read")
        if self._gap and next_id > state.next_id:
            self._gap_closed(state.next_id, next_id)
        elif self._gap and not next_id:
            self.notes.append(
                f"operations are lost at the end of the log; what they added had ids from "
                f"{state.next_id} on"
            )
        self.lost_ids[:] = _newest(self._lost_rows, self.lost_ids, state)
        settings = dict(state.settings)
        if settings["max_size"] == _ANY_SIZE:
            settings["max_size"] = max(int(fallback["max_size"]), state.count)
            self.notes.append("the settings of the buffer are lost; those configured are taken")
        unreadable = self._unreadable(settings)
        state.settings = settings
        if unreadable:
            remove = codec.encode_remove(np.array(unreadable, np.int64))
            none = np.empty(0, np.uint32)
            state.apply(LoggedOperation(state.lsn, codec.REMOVE, 0, remove.body, 0, none))
            self.lost_ids += [(id_, id_) for id_ in unreadable]
            gone = set(unreadable)
            self.rebuilt_ids[:] = [pair for pair in self.rebuilt_ids if pair[0] not in gone]
        live = set(state.live_ids().tolist()) if self.rebuilt_ids else set()
        self.rebuilt_ids[:] = [pair for pair in self.rebuilt_ids if pair[0] in live]

    def _unreadable(self, settings: dict[str, Any]) -> list[int]:
        """Live experiences without a payload of use; takes lost dimensions from the others."""
        state = self.state
        ids, unreadable, misfits = state.live_ids(), [], []
        for start in range(0, len(ids), _CHUNK):
            part = ids[start : start + _CHUNK]
            slots = state.find(part)
            rows = _rows(self._adapter, part, state.location[slots], state.length[slots])
            for id_, (row, damage) in zip(part.tolist(), rows, strict=True):
                checked = frames.check_row(row)
                if checked is None or checked[0] != id_:
                    self.damage.append(damage)
                    unreadable.append(id_)
                    continue
                try:
                    decoded = codec.decode_row(row)
                except codec.UNDECODABLE:
                    unreadable.append(id_)
                    continue
                for name, part_ in (("v_dim", decoded.v_embed), ("q_dim", decoded.q_embed)):
                    if settings[name] is None:
                        settings[name] = len(part_)
                dims = settings["v_dim"], settings["q_dim"]
                message = payloads.misfit_message(damage.path, damage.offset, id_, row, dims)
                if message is not None:
                    self.damage.append(damage._replace(message=message))
                    unreadable.append(id_)
                    misfits.append((id_, id_))
        if misfits:
            self.notes.append(
                "intact, with embeddings of other dimensions than the buffer's: "
                f"{shown(_merged(misfits))}; `expbuf get {self._path} ID` shows what they hold"
            )
        return unreadable


def _rows(
    adapter: PersistenceAdapter,
    ids: NDArray[np.int64],
    places: NDArray[np.int64],
    lengths: NDArray[np.uint32],
) -> Iterator[tuple[Buffer, Damage]]:
    """Payloads as stored, nothing for what cannot be read; and what to say of one that is bad."""
    try:
        together: Pin | None = adapter.pin(ids, places, lengths)
    except _UNREADABLE:
        together = None
    for i in range(len(ids)):
        one = slice(i, i + 1)
        try:
            pin, at = together, i
            if pin is None:
                pin, at = adapter.pin(ids[one], places[one], lengths[one]), 0
            file, offset = pin.where(at)
            message = f"{Path(file).name or 'storage'}: the payload at offset {offset} is damaged"
            yield pin.read(at), Damage(file, offset, 0, 0, message)
        except _UNREADABLE as exc:
            path, known = getattr(exc, "path", None), getattr(exc, "offset", None)
            message = str(exc) or str(exc.__cause__ or "a payload is missing")
            yield b"", Damage(path or "", -1 if known is None else known, 0, 0, message)


class _Vectors:
    """Fused vectors, made again from the payloads."""

    def __init__(self, adapter: PersistenceAdapter, state: State, registry: PluginRegistry) -> None:
        self._adapter = adapter
        self._state = state
        self._registry = registry
        self._made: tuple[EmbeddingFusion, int] | None = None

    def _fusion(self) -> tuple[EmbeddingFusion, int]:
        if self._made is None:
            stored = self._state.settings["fusion"]
            name = stored["name"]
            settings = self._registry.settings("fusion", name, stored["settings"])
            fusion: EmbeddingFusion = self._registry.make("fusion", name, settings)
            if int(fusion.version) != stored["version"]:
                raise ConfigError(
                    f"the fusion {name!r} of the buffer has version {stored['version']}, the "
                    f"installed one {fusion.version}; install that version to repair",
                    key="fusion",
                )
            dims = self._state.settings["v_dim"], self._state.settings["q_dim"]
            self._made = fusion, fused_dim(fusion, *dims, name)
        return self._made

    def __call__(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        state = self._state
        slots = state.find(ids)
        rows = _rows(self._adapter, ids, state.location[slots], state.length[slots])
        decoded = [codec.decode_row(row) for row, _ in rows]
        fusion, dim = self._fusion()
        v, q = (
            np.stack([row.v_embed for row in decoded]),
            np.stack([row.q_embed for row in decoded]),
        )
        return fuse(fusion, str(state.settings["metric"]), v, q, dim)


# ---------------------------------------------------------------- ranges


def _merged(ranges: Iterable[tuple[int, int]]) -> Ranges:
    """Rising, and those that touch as one."""
    merged: list[tuple[int, int]] = []
    for first, last in sorted(ranges):
        if merged and first <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(merged[-1][1], last))
        else:
            merged.append((first, last))
    return tuple(merged)


def _newest(
    lost: Iterable[int], possible: Iterable[tuple[int, int]], state: State
) -> list[tuple[int, int]]:
    """Of lost ids, those that need not have been evicted by now.

    Args:
        lost: Of experiences that were there.
        possible: Ids that lost operations may have given. They push nothing out: most may never
            have been used, since numbers are skipped after a crash. For the same reason those that
            were may be the first of a range as well as the last.
        state: With the experiences that were found.
    """
    known = np.union1d(state.live_ids(), np.array(list(lost), np.int64))
    kept: list[tuple[int, int]] = []
    for first, last in [*((id_, id_) for id_ in lost), *_merged(possible)]:
        newer = len(known) - int(np.searchsorted(known, last, side="right"))
        left = int(state.settings["max_size"]) - newer
        if left > 0:
            kept += [(first, min(last, first + left - 1)), (max(first, last - left + 1), last)]
    return kept
