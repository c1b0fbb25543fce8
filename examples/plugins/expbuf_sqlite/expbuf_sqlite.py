"""Storage for expbuf in one SQLite database.

Every append is one transaction, and durable when it returns (WAL, synchronous=FULL); so `sync` has
nothing to do. SQLite cannot tell a changed byte from another one: each operation carries a checksum
of its own and the LSN before it, so that neither a changed nor a missing one passes. Payloads carry
their checksums already.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import struct
import threading
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from zlib import crc32

import numpy as np
from expbuf_core import HostInfo, PersistenceProvider, hookimpl
from expbuf_core.contracts import (
    Appended,
    LogFollower,
    LoggedOperation,
    LogGone,
    PersistenceAdapter,
    PersistenceContext,
    Pin,
    Problem,
    Stamped,
)
from expbuf_core.errors import CorruptionError, FormatVersionError, StorageError, StorageFull
from expbuf_core.filesystem import storage_errors
from expbuf_core.frames import check_row
from pydantic import BaseModel, PositiveFloat

NAME = "experience_log.sqlite"
VERSION = 1
_SCHEMA = f"""
CREATE TABLE state (uuid BLOB, dropped INTEGER, last INTEGER, bytes INTEGER, crc INTEGER);
CREATE TABLE operations (lsn INTEGER PRIMARY KEY, previous INTEGER, kind INTEGER, first_id INTEGER,
    location INTEGER, body BLOB, lengths BLOB, seals BLOB, crc INTEGER);
CREATE TABLE payloads (location INTEGER PRIMARY KEY, row BLOB);
PRAGMA user_version = {VERSION};
"""
_OPERATION = struct.Struct("<QQHQQ")  # lsn, previous, kind, first_id, location
_STATE = struct.Struct("<16sQQQ")
_AT_ONCE = 500


class Settings(BaseModel, extra="forbid"):
    timeout_s: PositiveFloat = 30.0  # how long a transaction waits for those of other processes


class State(NamedTuple):
    """The one line of the table `state`."""

    uuid: bytes
    dropped: int  # operations up to this LSN may be gone
    last: int  # LSN of the newest operation, or where the log began anew
    bytes: int  # of all payloads that were ever stored: the next location

    def sealed(self) -> tuple[Any, ...]:
        return (*self, crc32(_STATE.pack(*self)))


def _crc(lsn: int, previous: int, kind: int, first_id: int, at: int, *blobs: bytes) -> int:
    crc = crc32(_OPERATION.pack(lsn, previous, kind, first_id, at))
    for blob in blobs:
        crc = crc32(blob, crc32(struct.pack("<Q", len(blob)), crc))
    return crc


class Database:
    """A connection that writes and one that reads, each used by one thread at a time.

    SQLite must not be carried over a fork, not even to be closed. So both connections are closed
    before every fork, and opened again when they are next needed.
    """

    _all: weakref.WeakSet[Database] = weakref.WeakSet()
    _forks = threading.Lock()
    _forking: list[Database] = []

    def __init__(self, path: Path, timeout_s: float) -> None:
        self.path = path
        self._timeout_s = timeout_s
        self._reader: sqlite3.Connection | None = None
        self._writer: sqlite3.Connection | None = None
        self._read_lock, self._write_lock = threading.RLock(), threading.RLock()
        with self._forks:
            self._all.add(self)

    @contextlib.contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """Everything read in here belongs to one state."""
        with self._read_lock, self._errors():
            db = self._reader = self._reader or self._connect("ro")
            db.execute("BEGIN")
            try:
                yield db
            finally:
                if db.in_transaction:
                    db.execute("COMMIT")

    @contextlib.contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """A transaction; durable afterwards, or as if it had never been."""
        with self._write_lock, self._errors():
            if self._writer is None:
                self._writer = self._connect("rw")
                self._writer.execute("PRAGMA journal_mode = WAL")
                self._writer.execute("PRAGMA synchronous = FULL")
                self._writer.execute("PRAGMA wal_autocheckpoint = 256")
                # A reader that is there to the last keeps the writer from tidying up when it
                # closes: closing changes no file.
                with self.reading() as reader:
                    reader.execute("SELECT count(*) FROM state").fetchone()
            db = self._writer
            db.execute("BEGIN IMMEDIATE")
            try:
                yield db
                db.execute("COMMIT")
            except BaseException:
                if db.in_transaction:
                    db.execute("ROLLBACK")
                raise

    def checkpoint(self, *, end: bool = False) -> None:
        """Move the WAL into the database; `end`: and do without a WAL from now on, if possible."""
        with self._write_lock, self._errors():
            with self.writing():
                pass
            assert self._writer is not None
            self._writer.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
            if end:
                self._close_reader()
                with contextlib.suppress(sqlite3.OperationalError):  # others are reading
                    self._writer.execute("PRAGMA journal_mode = DELETE").fetchall()

    def close(self) -> None:
        with self._write_lock:
            if self._writer is not None:
                self._writer.close()
                self._writer = None
        self._close_reader()

    def __del__(self) -> None:
        self.close()

    def _close_reader(self) -> None:
        with self._read_lock:
            if self._reader is not None:
                self._reader.close()
                self._reader = None

    def _connect(self, mode: str) -> sqlite3.Connection:
        db = sqlite3.connect(
            f"{self.path.absolute().as_uri()}?mode={mode}",
            uri=True,
            isolation_level=None,
            check_same_thread=False,
            timeout=self._timeout_s,
        )
        db.text_factory = bytes  # none is stored; what is damaged may look like text
        db.execute("PRAGMA trusted_schema = OFF")
        db.execute("PRAGMA cell_size_check = ON")
        return db

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as exc:
            text = str(exc)
            if "full" in text:
                message = f"cannot write {self.path}: {text}; free some room and try again"
                raise StorageFull(message) from exc
            if any(word in text for word in ("malformed", "not a database", "no such", "decode")):
                raise CorruptionError(f"{self.path}: {text}", path=self.path) from exc
            raise StorageError(f"{self.path}: {text}") from exc

    @classmethod
    def before_fork(cls) -> None:
        cls._forks.acquire()
        cls._forking = list(cls._all)
        for database in cls._forking:
            database._write_lock.acquire()
            database._read_lock.acquire()
            database.close()

    @classmethod
    def after_fork(cls) -> None:
        for database in cls._forking:
            database._read_lock.release()
            database._write_lock.release()
        cls._forking = []
        cls._forks.release()


os.register_at_fork(
    before=Database.before_fork,
    after_in_parent=Database.after_fork,
    after_in_child=Database.after_fork,
)


class SQLitePersistence(PersistenceAdapter):
    def __init__(self, settings: Settings, context: PersistenceContext) -> None:
        if context.path is None:
            raise StorageError("the sqlite backend needs a folder")
        self._path = context.path / NAME
        self._uuid, self._fs = context.uuid, context.fs
        self._timeout_s = settings.timeout_s
        self._db = Database(self._path, settings.timeout_s)

    # ------------------------------------------------------------ creating and recovering

    def create(self, lsn: int) -> None:
        self._db.close()
        aside = self._path.with_name(f"{NAME}.tmp")
        with storage_errors("create", self._path):
            for path in (self._path, aside):
                for suffix in ("", "-wal", "-shm", "-journal"):
                    self._fs.unlink(path.with_name(path.name + suffix))
            os.close(self._fs.open(aside, exclusive=True))
        made = Database(aside, self._timeout_s)
        with made._errors(), contextlib.closing(made._connect("rw")) as db:
            db.executescript(_SCHEMA)
            first = State(self._uuid, 0, 0, 0)  # nothing is missing before `lsn`, whatever it is
            db.execute("INSERT INTO state VALUES (?, ?, ?, ?, ?)", first.sealed())
        with storage_errors("create", self._path):
            self._fs.replace(aside, self._path)
            self._fs.sync_folder(self._path.parent)

    def recover(self, after_lsn: int, durable_lsn: int) -> Iterator[LoggedOperation]:
        state = self._state()
        if state.dropped > after_lsn:
            raise self._damage(f"the log begins behind {state.dropped}, wanted from {after_lsn} on")
        if max(state.last, after_lsn) < durable_lsn:
            raise self._damage(f"ends at {state.last}, but {durable_lsn} was durable", durable_lsn)
        at = after_lsn
        for operation, flaw in self._operations(after_lsn, state.last, payloads=True):
            if flaw:
                raise self._damage(flaw, operation.lsn)
            at = operation.lsn
            yield operation
        if at < state.last:
            raise self._damage(f"operations {at + 1} to {state.last} are missing", at + 1)

    def torn(self) -> tuple[int, int]:
        return 0, 0  # SQLite has left it out without a word

    def start(self, lsn: int, recovered_lsn: int) -> None:
        with self._db.writing() as db:  # makes durable what a killed process had not synced
            state = self._state(db)
            self._store(db, state._replace(last=max(state.last, recovered_lsn)))
        self._db.checkpoint()

    def attach(self) -> None:
        self._state()

    # ------------------------------------------------------------ appending

    def append(self, stamped: Sequence[Stamped], durable_lsn: int) -> list[Appended]:
        places = []
        with self._db.writing() as db:
            state = self._state(db)
            last, at = state.last, state.bytes
            for lsn, first_id, operation in stamped:
                lengths = np.asarray(operation.lengths, "<u4")
                blobs = (
                    bytes(operation.body),
                    lengths.tobytes(),
                    np.asarray(operation.row_crcs, "<u4").tobytes(),
                )
                fields = (lsn, last, operation.kind, first_id, at)
                db.execute(
                    "INSERT INTO operations VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                    (*fields, *blobs, _crc(*fields, *blobs)),
                )
                places.append(Appended(at, lsn))
                begin, rows = at, memoryview(operation.rows)
                ends = (begin + np.cumsum(lengths, dtype=np.int64)).tolist()
                for end in ends:
                    row = rows[at - begin : end - begin]
                    db.execute("INSERT INTO payloads VALUES (?, ?)", (at, row))
                    at = end
                last = lsn
            self._store(db, state._replace(last=last, bytes=at))
        return places

    def sync(self) -> None:
        """Every append is durable when it returns."""

    def switch(self, next_lsn: int, durable_lsn: int) -> None:
        """There is one log."""

    def retire(self, durable_lsn: int, keep_lsn: int, next_lsn: int) -> None:
        with self._db.writing() as db:
            state = self._state(db)
            found = db.execute(
                "SELECT location FROM operations WHERE lsn > ? ORDER BY lsn", (keep_lsn,)
            ).fetchone()
            if found is not None:
                db.execute("DELETE FROM payloads WHERE location >= ?", found)
                db.execute("DELETE FROM operations WHERE lsn > ?", (keep_lsn,))
            self._store(db, state._replace(last=min(state.last, keep_lsn)))

    # ------------------------------------------------------------ reading

    def follow(self, after_lsn: int) -> LogFollower:
        return Follower(self, after_lsn)

    def pin(self, ids: Any, locations: Any, lengths: Any) -> Pin:
        rows = []
        with self._db.reading() as db:
            for place in locations.tolist():
                found = db.execute("SELECT row FROM payloads WHERE location = ?", (place,))
                row = found.fetchone()
                if row is None:
                    raise LogGone
                rows.append(row[0])
        return Rows(rows, lengths.tolist(), self._path)

    def _state(self, db: sqlite3.Connection | None = None) -> State:
        if db is None:
            if not self._path.exists():
                raise self._damage("the log is missing")
            with self._db.reading() as reader:
                return self._state(reader)
        (version,) = db.execute("PRAGMA user_version").fetchone()
        if version > VERSION:
            raise FormatVersionError(f"{self._path}: version {version}; this one reads {VERSION}")
        found = db.execute("SELECT * FROM state").fetchall()
        try:
            (line,) = found
            state = State(*line[:4])
            intact = state.sealed() == line
        except (struct.error, TypeError, ValueError):
            intact = False
        if not intact:
            raise self._damage("the table `state` is not what was written")
        if state.uuid != self._uuid:
            raise self._damage(f"belongs to another buffer ({state.uuid.hex()})")
        return state

    def _store(self, db: sqlite3.Connection, state: State) -> None:
        db.execute("DELETE FROM state")
        db.execute("INSERT INTO state VALUES (?, ?, ?, ?, ?)", state.sealed())

    def _operations(
        self, after_lsn: int, until_lsn: int, *, payloads: bool = False, linked: bool = True
    ) -> Iterator[tuple[LoggedOperation, str]]:
        """Operations in (after_lsn, until_lsn], each with what is wrong with it, or ""."""
        at = after_lsn
        while True:
            with self._db.reading() as db:  # no cursor stays open over a yield: see Database
                found = db.execute(
                    "SELECT * FROM operations WHERE lsn > ? AND lsn <= ? ORDER BY lsn LIMIT ?",
                    (at, until_lsn, _AT_ONCE),
                ).fetchall()
            for line in found:
                operation, previous, seals, flaw = self._decoded(line)
                if not flaw and linked and previous > at:
                    if at == after_lsn and self._state().dropped > at:
                        raise LogGone
                    flaw = f"operations {at + 1} to {previous} are missing"
                if not flaw and payloads:
                    flaw = self._flaw_of_rows(operation, seals)
                at = operation.lsn
                yield operation, flaw
            if len(found) < _AT_ONCE:
                return

    def _decoded(self, line: Any) -> tuple[LoggedOperation, int, Any, str]:
        lsn, previous, kind, first_id, location, body, lengths, seals, crc = line
        try:
            sound = _crc(lsn, previous, kind, first_id, location, body, lengths, seals) == crc
        except (struct.error, TypeError):
            sound = False
        if not sound:
            none = np.empty(0, np.uint32)
            nothing = LoggedOperation(lsn, 0, 0, b"", 0, none)
            return nothing, 0, none, f"operation {lsn} is not what was written"
        sizes = np.frombuffer(lengths, "<u4").astype(np.uint32)
        operation = LoggedOperation(lsn, kind, first_id, body, location, sizes)
        return operation, previous, np.frombuffer(seals, "<u4"), ""

    def _flaw_of_rows(self, operation: LoggedOperation, seals: Any) -> str:
        first, count = operation.location, len(operation.lengths)
        end = first + int(operation.lengths.sum(dtype=np.int64))
        with self._db.reading() as db:
            found = db.execute(
                "SELECT * FROM payloads WHERE location >= ? AND location < ? ORDER BY location",
                (first, end),
            ).fetchall()
        at = first
        for i, (location, row) in enumerate(found[:count]):
            checked = check_row(row) if isinstance(row, bytes) else None
            right = (operation.first_id + i if operation.first_id else None, seals[i])
            if location != at or checked is None or checked[1] != right[1]:
                break
            if len(row) != operation.lengths[i] or right[0] not in (None, checked[0]):
                break
            at += len(row)
        if len(found) != count or at != end:
            return f"a payload of operation {operation.lsn} is not what was written"
        return ""

    # ------------------------------------------------------------ upkeep

    def drop_below(self, lsn: int, live_ids: Any, live_locations: Any) -> None:
        with self._db.writing() as db:
            state = self._state(db)
            self._store(db, state._replace(dropped=max(state.dropped, min(lsn, state.last))))
            db.execute("DELETE FROM operations WHERE lsn <= ?", (lsn,))
            found = db.execute("SELECT location FROM operations ORDER BY lsn LIMIT 1").fetchone()
            end = found[0] if found is not None else state.bytes
        at = -1
        while True:  # in pieces, so that appends need not wait long
            with self._db.writing() as db:
                found = db.execute(
                    "SELECT location FROM payloads WHERE location > ? AND location < ? LIMIT 2000",
                    (at, end),
                ).fetchall()
                stored = np.array(found, np.int64).reshape(-1)
                dead = np.setdiff1d(stored, live_locations)
                db.executemany("DELETE FROM payloads WHERE location = ?", dead[:, None].tolist())
            if not len(stored):
                return
            at = int(stored.max())

    def verify(self, until_lsn: int) -> Iterator[Problem]:
        try:
            state = self._state()
            with self._db.reading() as db:
                found = [str(line[0]) for line in db.execute("PRAGMA quick_check(20)")]
            yield from (self._problem(text) for text in found if text != "b'ok'")
            at = state.dropped
            for operation, flaw in self._operations(at, min(until_lsn, state.last), payloads=True):
                at = operation.lsn
                if flaw:
                    yield self._problem(flaw)
            if at < min(until_lsn, state.last):
                yield self._problem(f"operations {at + 1} to {state.last} are missing")
            yield from self._problems_of_payloads()
        except StorageError as exc:
            yield self._problem(str(exc))
        except LogGone:
            pass  # dropped meanwhile

    def _problems_of_payloads(self) -> Iterator[Problem]:
        at = -1
        while True:
            with self._db.reading() as db:
                found = db.execute(
                    "SELECT * FROM payloads WHERE location > ? ORDER BY location LIMIT ?",
                    (at, _AT_ONCE),
                ).fetchall()
            for at, row in found:
                if not isinstance(row, bytes) or check_row(row) is None:
                    yield self._problem(f"the payload at {at} is not what was written")
            if not found:
                return

    def stats(self) -> dict[str, Any]:
        with self._db.reading() as db:
            state = self._state(db)
            pages, size, free = (
                db.execute(f"PRAGMA {name}").fetchone()[0]
                for name in ("page_count", "page_size", "freelist_count")
            )
        return {
            "file": NAME,
            "bytes": pages * size,
            "free_bytes": free * size,
            "last_lsn": state.last,
            "dropped_lsn": state.dropped,
        }

    def finish(self, last_lsn: int) -> None:
        self._db.checkpoint(end=True)

    def close(self) -> None:
        self._db.close()

    def after_fork(self) -> None:
        """Nothing to drop: connections do not live through a fork (see `Database`)."""

    def _damage(self, message: str, lsn: int | None = None) -> CorruptionError:
        return CorruptionError(f"{self._path}: {message}", path=self._path, lsn=lsn)

    def _problem(self, message: str) -> Problem:
        return Problem(str(self._path), -1, f"{self._path}: {message}", True)


class Follower(LogFollower):
    def __init__(self, adapter: SQLitePersistence, after_lsn: int) -> None:
        self._adapter, self._lsn = adapter, after_lsn

    def read(self, until_lsn: int) -> Iterator[LoggedOperation]:
        if until_lsn <= self._lsn:
            return
        for operation, flaw in self._adapter._operations(self._lsn, until_lsn):
            if flaw:
                raise self._adapter._damage(flaw, operation.lsn)
            self._lsn = operation.lsn
            yield operation
        if self._lsn < until_lsn and self._adapter._state().dropped > self._lsn:
            raise LogGone

    def skip(self, lsn: int, cursor: Any) -> None:
        self._lsn = lsn


class Rows(Pin):
    """Payloads in memory: whatever becomes of the database, they stay."""

    def __init__(self, rows: list[Any], lengths: list[int], path: Path) -> None:
        self._rows, self._lengths, self._path = rows, lengths, path

    def read(self, i: int) -> bytes:
        row = self._rows[i]
        if not isinstance(row, bytes) or len(row) != self._lengths[i]:
            raise CorruptionError(f"{self._path}: a payload is damaged", path=self._path)
        return row


@hookimpl
def expbuf_register_persistence(host: HostInfo) -> list[PersistenceProvider]:
    return [
        PersistenceProvider(
            "sqlite",
            api_version=1,
            factory=SQLitePersistence,
            settings=Settings,
            capabilities=frozenset({"durable", "multiprocess"}),
        )
    ]
