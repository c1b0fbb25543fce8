"""A buffer seen from outside: what it holds, how far its parts lag, who has it open.

Opened to read only, and without its index: nothing is written, no lock is taken that anybody waits
for, and no index library is imported.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from expbuf_core import control as c
from expbuf_core import folder, segments, snapshots
from expbuf_core.buffer import ExperienceBuffer
from expbuf_core.config_schema import load_config
from expbuf_core.errors import CorruptionError
from expbuf_core.filesystem import FileSystem
from expbuf_core.locks import holder, opener
from expbuf_core.plugins import default_registry
from expbuf_core.session import Session
from expbuf_core.state import State

_LOCKS = ("opening", "append", "flush", "maintenance", "builder", "transaction")


class _ColumnsSession(Session):
    """A session that opens no segment and fuses no vector."""

    def load_index(self) -> None:
        """Columns are enough."""


def columns_of(
    path: str | os.PathLike[str],
    *,
    config: str | os.PathLike[str] | Mapping[str, Any] | None = None,
) -> ExperienceBuffer:
    """Open a buffer to read only and without its index: for all but searches.

    Opens in the time of its columns, whatever the size of its index.

    Args:
        path: Its folder.
        config: A YAML file or a mapping; for instance how samples are drawn.

    Raises:
        StorageError: The folder is no buffer, or cannot be read.
        CorruptionError: It is damaged.
        ConfigError: The configuration is wrong.
    """
    # Not what the environment says: that is for the programs that use the buffer.
    own = {"index": {"backend": "exact", "builder": "off"}}
    settings = load_config(config, overrides=own, env={})
    where = Path(os.path.abspath(os.fspath(path)))
    session = _ColumnsSession(
        where, settings, default_registry(), mode="r", lock=None, fs=FileSystem()
    )
    session.open()
    arguments = {
        "config": settings,
        "mode": "r",
        "plugins": (),
        "lock": None,
        "seed": None,
        "filesystem": None,
        "path": where,
    }
    return ExperienceBuffer(session, arguments)


# ---------------------------------------------------------------- who has it open


class Opener(NamedTuple):
    """A process that has the buffer open for writing.

    Attributes:
        pid: Its id.
        command: Its command line, "" where it cannot be read.
        locks: Those that it holds right now, besides the one that says that it is here.
    """

    pid: int
    command: str
    locks: tuple[str, ...]


def openers(path: str | os.PathLike[str]) -> list[Opener]:
    """Processes that have a buffer open for writing. Those that only read leave no trace."""
    where = Path(path) / folder.LOCKS
    known = _record_locks()
    held: dict[int, set[str]] = {}
    for name in ("open", *_LOCKS):
        file = where / name
        try:
            stat = os.stat(file)
        except OSError:
            continue
        pids = set(known.get((os.major(stat.st_dev), os.minor(stat.st_dev), stat.st_ino), ()))
        seen = opener(file) if name == "open" else holder(file)
        for pid in pids or ({seen} if seen is not None else ()):
            held.setdefault(pid, set()).add(name)
    return [
        Opener(pid, _command(pid), tuple(name for name in _LOCKS if name in names))
        for pid, names in sorted(held.items())
    ]


def _record_locks() -> dict[tuple[int, int, int], set[int]]:
    """Holders of record locks by (major, minor, inode), as far as the system tells."""
    found: dict[tuple[int, int, int], set[int]] = {}
    try:
        lines = Path("/proc/locks").read_text().splitlines()
    except OSError:
        return found
    for line in lines:
        words = line.split()
        # 1: POSIX  ADVISORY  READ 4711 fd:00:262153 0 EOF; a waiting one has -> in the second place
        if len(words) < 6 or words[1] != "POSIX" or words[5].count(":") != 2:
            continue
        major, minor, inode = words[5].split(":")
        if words[4].isdigit() and int(words[4]) > 0:
            key = (int(major, 16), int(minor, 16), int(inode))
            found.setdefault(key, set()).add(int(words[4]))
    return found


def _command(pid: int) -> str:
    try:
        raw = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return ""
    return raw.replace(b"\0", b" ").decode("utf-8", "replace").strip()


# ---------------------------------------------------------------- what it holds


def inspect(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Facts about a buffer, JSON-like. It may be in use, or damaged.

    Returns:
        What `ExperienceBuffer.stats` returns, and: "path", "uuid", "backend", "open_by",
        "snapshots", "lag", "bytes". Of a damaged buffer, "damage" says what is wrong, and what
        cannot be known is missing.

    Raises:
        StorageError: The folder is no buffer, or cannot be read.
    """
    where = Path(path)
    facts: dict[str, Any] = {"path": str(where)}
    damage: str | None = None
    index: dict[str, Any] | None = None
    try:
        identity = folder.read_identity(where)
        if identity is None:
            folder.check_finished(where)
            raise folder.no_buffer(where)
        facts |= {"uuid": identity.uuid.hex(), "backend": identity.backend}
        with columns_of(where) as buffer:
            facts |= {"recovery": str(buffer.recovery), **buffer.stats()}
            facts["lag"] = _lag(buffer, facts)
            index = {**facts["index"], **_published(where, buffer._live().replica.state)}
            facts["lag"]["index_operations"] = facts["lsn"] - index["lsn"]
    except CorruptionError as exc:
        damage = str(exc)
    facts["open_by"] = [each._asdict() for each in openers(where)]
    facts["snapshots"] = list(_snapshots(where))
    facts["bytes"] = _sizes(where)
    facts["index"] = index if index is not None else _published(where, None)
    if damage is not None:
        facts["damage"] = damage
    return facts


def _lag(buffer: ExperienceBuffer, facts: Mapping[str, Any]) -> dict[str, int]:
    """How far what follows the log is behind it, in operations."""
    session = buffer._live()
    words = session.control.words
    appended = max(int(words[c.APPENDED]), facts["lsn"])
    if session.control.is_mapped():
        durable = int(words[c.DURABLE])
    else:
        durable = facts["lsn"]  # nobody has it open: what is there was read from the disk
    newest = snapshots.available(Path(facts["path"]))
    return {
        "unsynced_operations": max(0, appended - durable),
        "snapshot_operations": _behind_snapshot(buffer, facts["lsn"], newest),
    }


def _behind_snapshot(buffer: ExperienceBuffer, lsn: int, available: list[int]) -> int:
    """Operations behind the newest snapshot; LSNs that nobody was given do not count."""
    opening, newest = buffer.recovery, available[0] if available else 0
    if opening.snapshot_lsn == newest:
        return opening.replayed + lsn - opening.lsn
    return lsn - newest


def _published(where: Path, state: State | None) -> dict[str, Any]:
    """The published segments, and how many experiences are in none of them."""
    representation = 0 if state is None else state.representation
    manifest = segments.read_manifest_or_none(segments.home(where, representation))
    listed = manifest.segments if manifest is not None else ()
    found: dict[str, Any] = {
        "lsn": manifest.lsn if manifest is not None else 0,
        "segments": [
            {
                "name": info.name,
                "backend": info.backend,
                "rows": info.rows,
                "bytes": info.vectors_bytes + info.index_bytes,
            }
            for info in listed
        ],
        "building_pid": holder(where / folder.LOCKS / "builder"),
    }
    if state is not None:
        end_id = max((info.end_id for info in listed), default=0)
        tail = int(np.count_nonzero(state.live_ids() >= end_id))
        found["tail_rows"] = tail
        found["dead_rows"] = sum(info.rows for info in listed) - (state.count - tail)
    return found


def _snapshots(where: Path) -> Iterator[dict[str, Any]]:
    now = time.time()
    for lsn in snapshots.available(where):
        try:
            stat = snapshots.path_of(where, lsn).stat()
        except OSError:
            continue  # dropped meanwhile
        yield {"lsn": lsn, "bytes": stat.st_size, "age_s": round(max(0.0, now - stat.st_mtime), 3)}


def _sizes(where: Path) -> dict[str, int]:
    """Bytes on disk, by what they are for."""
    sizes = {"log": 0, "snapshots": 0, "index": 0, "free": 0}
    for root, _, names in os.walk(where):
        part = os.path.relpath(root, where).split(os.sep)[0]
        kind = part if part in ("snapshots", "index") else "log"
        for name in names:
            try:
                sizes[kind] += os.stat(os.path.join(root, name)).st_blocks * 512
            except OSError:
                continue  # dropped meanwhile
    place = os.statvfs(where)
    sizes["free"] = place.f_bavail * place.f_frsize
    return sizes


# ---------------------------------------------------------------- what happens


class Tick(NamedTuple):
    """What happened in a buffer within some time; rates are a second.

    Attributes:
        seconds: The time.
        experiences: There are now.
        adds: Rate of added experiences.
        operations: Rate of commits of any kind.
        evictions: Rate of experiences that left.
        retrievals: Rate of counted retrievals of live experiences.
        successes: Rate of their successes.
        unsynced: Operations that were written and not yet on disk, on average.
        sync_wait_ms: How long an operation waited for the disk, on average; None where none came.
        snapshot_operations: Operations behind the newest snapshot.
        read_ms: What this process needed to catch up and read an experience; None where none is.
        search_ms: What it needed for a search; None where it was not asked to.
        index_rows: Experiences that no segment holds yet.
        building_pid: Of the process that builds the index, or None.
        processes: That have the buffer open for writing.
        log_retirements: Logs given up since the buffer was opened.
    """

    seconds: float
    experiences: int
    adds: float
    operations: float
    evictions: float
    retrievals: float
    successes: float
    unsynced: float
    sync_wait_ms: float | None
    snapshot_operations: int
    read_ms: float | None
    search_ms: float | None
    index_rows: int
    building_pid: int | None
    processes: int
    log_retirements: int


class Watch:
    """Watches a buffer without disturbing it.

    By two words of shared memory, looked at some hundred times a second, and by the log that all
    replicas follow.

    Args:
        path: Folder of the buffer.
        searches: Measure searches, too: opens the index.

    Raises:
        StorageError: As for `columns_of`.
    """

    _POLL_S = 0.002

    def __init__(self, path: str | os.PathLike[str], *, searches: bool = False) -> None:
        self.path = Path(path)
        self.buffer = columns_of(path)
        self._searched = ExperienceBuffer.open(path, mode="r") if searches else None
        self._last = self._counts()
        self._at = time.monotonic()

    def close(self) -> None:
        """Let go."""
        if self._searched is not None:
            self._searched.close()
        self.buffer.close()

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _counts(self) -> dict[str, float]:
        session = self.buffer._live()
        session.refresh()
        with session.replica.lock:
            state = session.replica.state
            live = state.live_slots()
            return {
                "lsn": float(state.lsn),
                "count": state.count,
                "added": state.total_added,
                "retrievals": float(state.retrieval_count[live].sum(dtype="int64")),
                "successes": float(state.success_count[live].sum(dtype="float64")),
            }

    def _measured(self) -> tuple[float | None, float | None]:
        """Milliseconds of reading an experience, and of a search for what is similar to it."""
        started = time.perf_counter()
        if not len(self.buffer):
            return None, None
        (experience,) = self.buffer.sample(1, uniform=True)
        read_ms = 1e3 * (time.perf_counter() - started)
        if self._searched is None:
            return read_ms, None
        started = time.perf_counter()
        self._searched.search_index(v_embed=experience.v_embed, q_embed=experience.q_embed)
        return read_ms, 1e3 * (time.perf_counter() - started)

    def tick(self, seconds: float) -> Tick:
        """Watch for so long; what happened.

        How long operations wait for the disk follows from how many wait at a time, and from how
        many come (Little's law): nothing has to be measured in the processes that write.
        """
        waiting = polls = 0
        session = self.buffer._live()
        words = session.control.words
        first, end = int(words[c.APPENDED]), self._at + seconds
        while (left := end - time.monotonic()) > 0:
            words = session.control.words
            durable = int(words[c.DURABLE])  # first: an operation is appended before it is durable
            waiting += max(0, int(words[c.APPENDED]) - durable)
            polls += 1
            time.sleep(min(self._POLL_S, left))
        read_ms, search_ms = self._measured()
        now, before = time.monotonic(), self._last
        passed = max(now - self._at, 1e-9)
        self._at, self._last = now, self._counts()
        session = self.buffer._live()
        words = session.control.words
        mapped = session.control.is_mapped()
        came = (int(words[c.APPENDED]) - first) / passed if mapped else 0.0
        unsynced = waiting / polls if polls and mapped else 0.0
        here = self._last
        rate = {name: (here[name] - before[name]) / passed for name in here}
        newest = snapshots.available(self.path)
        index = _published(self.path, session.replica.state)
        return Tick(
            seconds=passed,
            experiences=int(here["count"]),
            adds=rate["added"],
            operations=rate["lsn"],
            evictions=max(0.0, rate["added"] - rate["count"]),
            retrievals=max(0.0, rate["retrievals"]),
            successes=max(0.0, rate["successes"]),
            unsynced=unsynced,
            sync_wait_ms=1e3 * unsynced / came if came > 0 else None,
            snapshot_operations=_behind_snapshot(self.buffer, int(here["lsn"]), newest),
            read_ms=read_ms,
            search_ms=search_ms,
            index_rows=index["tail_rows"],
            building_pid=index["building_pid"],
            processes=len(openers(self.path)),
            log_retirements=int(words[c.RETIREMENTS]) if mapped else 0,
        )
