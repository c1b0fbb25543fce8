"""`LMDBPersistenceAdapter`: operations and payloads in LMDB, behind a short log of what is new.

    append  ->  stage.wal           (append lock; no sync)
    sync    ->  log.mdb             (flush lock; one transaction for all that the stage holds)

LMDB syncs in every transaction, and its transactions exclude one another. So an append must not be
one: commits of many threads and processes gather in the stage, where everybody can read them and
where a killed process leaves them, and each sync moves all of them into LMDB at once. What is in
the stage only is not durable, and nobody was told that it is.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import lmdb
import numpy as np
from numpy.typing import NDArray

from expbuf_core import folder, frames
from expbuf_core.contracts import (
    Appended,
    Buffer,
    Damage,
    LogFollower,
    LoggedOperation,
    LoggedRun,
    LogGone,
    LogInterrupted,
    PersistenceAdapter,
    PersistenceContext,
    Pin,
    Problem,
    Stamped,
    Words,
    one_by_one,
)
from expbuf_core.crc import crc32
from expbuf_core.errors import StorageError, StorageFull
from expbuf_core.filesystem import storage_errors
from expbuf_lmdb import layout
from expbuf_lmdb.environment import (
    PRIVATE,
    READING,
    WRITING,
    Environment,
    Tables,
    Txn,
    acquire,
    release,
    wrapped,
)
from expbuf_lmdb.follower import LMDBFollower, LMDBPin
from expbuf_lmdb.layout import (
    BASE,
    DRAINED,
    END,
    GENERATION,
    LAST,
    STAGE_HEADER_BYTES,
    STORED,
    StageHeader,
    State,
    key,
)
from expbuf_lmdb.recovering import Recovered, recover
from expbuf_lmdb.salvage import Salvage, SalvagedPin
from expbuf_lmdb.settings import LMDBSettings
from expbuf_lmdb.stage import Stage, StagedFrame
from expbuf_lmdb.store import Checked, Store, checked_operation
from expbuf_lmdb.trees import check_trees
from expbuf_lmdb.verifying import verify

P = ParamSpec("P")
T = TypeVar("T")

_ROOM_STEP = 1 << 20
_MOST_ROOM_AHEAD = 16 << 20
_RESERVE = 256 << 10  # for operations without rows, which must work on a full disk
_PAGE = 4096
# A damaged page can send LMDB 64 KiB past its end for a node, and 64 KiB further for a key. Behind
# the end of the file that kills the process, so the last page is never near it.
_TAIL = 256 << 10
_DELETED_AT_ONCE = 2000
_LOOKED_AT_ONCE = 20_000
_TRIES = 50
_GIVEN_WAY_S = 2e-3  # locks are looked at once a millisecond


class LMDBPersistenceAdapter(PersistenceAdapter):
    """See `PersistenceAdapter` for the contract and FORMAT.md for the files.

    Attributes:
        path: Of the environment.
        uuid: Of the buffer.
        store: Its tables.
        stage: What LMDB does not have yet.
    """

    def __init__(self, settings: LMDBSettings, context: PersistenceContext) -> None:
        if context.path is None:
            raise StorageError("the lmdb backend needs a folder")
        self._settings = settings
        self._folder: Path = context.path
        self._fs = context.fs
        self._shared_words = context.words
        self._private_words: Words | None = None
        self._stage_size = 0  # 0: look
        self._writes = context.writable
        self._lock_timeout_s = context.lock_timeout_s
        self.path = context.path / layout.DATA
        self.uuid = context.uuid
        self.store = Store(self.path, context.uuid)
        self.stage = Stage(context.path, context.fs)
        self._env: Environment | None = None
        self._mutex = threading.Lock()
        self._recovered = Recovered(0)
        self._drained = (0, STAGE_HEADER_BYTES)  # generation and offset: LMDB has what is before
        self._data_fd = -1
        self._salvage: Salvage | None = None
        self._room_until = 0  # frames up to this address will find room in LMDB's file

    @property
    def words(self) -> Words:
        """Shared with all processes; what has just recovered has its own."""
        return self._shared_words if self._private_words is None else self._private_words

    # ------------------------------------------------------------ the environment

    def _environment(self) -> Environment:
        env = self._env
        if env is None or env.lost:
            with self._mutex:
                env = self._env
                if env is None or env.lost:
                    env = self._acquire()
        return env

    def _acquire(self) -> Environment:
        mode = WRITING
        if not self._writes:
            mode = READING if self._private_words is None else PRIVATE
        settings = self._settings
        if not self.path.exists():
            raise layout.corrupt(self.path, "the file is missing")
        if mode == WRITING:
            with storage_errors("create", self._folder / folder.LOCKS):
                self._fs.mkdir(self._folder / folder.LOCKS)
        env = acquire(
            self.path, mode, settings.map_bytes, settings.max_readers, self._lock_timeout_s
        )
        try:
            env.read(self.store.read_header)
        except BaseException:
            release(env)
            raise
        self._env = env
        return env

    def read(
        self,
        work: Callable[Concatenate[Txn, Tables, P], T],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> T:
        """Run `work` in a transaction for reading."""
        return self._environment().read(lambda txn, tables: work(txn, tables, *args, **kwargs))

    def last_transaction(self) -> int:
        """Number of LMDB's newest state."""
        return self._environment().last_transaction()

    def _write(
        self,
        work: Callable[Concatenate[Txn, Tables, P], T],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> T:
        """Run `work` in a transaction that is durable on return.

        Raises:
            LockTimeout: Another process, or thread, writes for too long; nothing was begun.
        """
        return self._environment().write(lambda txn, tables: work(txn, tables, *args, **kwargs))

    # ------------------------------------------------------------ creation and recovery

    def create(self, lsn: int) -> None:
        self._refuse_to_replace()
        self.close()
        self._private_words, self._stage_size = None, 0
        self.store = Store(self.path, self.uuid)
        salt = secrets.token_bytes(16)
        state = State(floor=lsn - 1, address=STAGE_HEADER_BYTES, generation=1)
        header = StageHeader(self.uuid, salt, 1, 0, lsn - 1, self._configured_bytes())
        temporary = self.path.with_name(f"{self.path.name}.{os.getpid()}.tmp")
        try:
            self._make_environment(temporary, salt, state, lsn)
            self.stage.make(header)
            with storage_errors("create", self.path):
                self._fs.replace(temporary, self.path)
        except BaseException:
            with contextlib.suppress(OSError):
                self._fs.unlink(temporary)
            raise
        with storage_errors("sync", self._folder):
            self._fs.sync_folder(self._folder)
        self._set_words(header, lsn - 1, lsn - 1)

    def _refuse_to_replace(self) -> None:
        """A creation that was interrupted leaves no experiences; what has some was a buffer."""
        if not self.path.exists():
            return
        settings = self._settings
        env = acquire(
            self.path, PRIVATE, settings.map_bytes, settings.max_readers, self._lock_timeout_s
        )
        try:
            found = env.stats()["rows"]
        finally:
            release(env)
        found = found or self._staged_rows()
        if found:
            raise layout.corrupt(
                self.path, f"{found} experiences are there, and no buffer is; restore its identity"
            )

    def _staged_rows(self) -> int:
        """Experiences in a stage, whosever it is."""
        stage = Stage(self._folder, self._fs)
        with contextlib.closing(stage), contextlib.suppress(StorageError):
            header = stage.header()
            if header is not None:
                _, salt, generation, base, *_ = header
                found = stage.frames(STAGE_HEADER_BYTES, stage.size(), salt, generation, base)
                return sum(frame.header.row_count for frame in found)
        return 0

    def _make_environment(self, temporary: Path, salt: bytes, state: State, lsn: int) -> None:
        """Create it aside, complete and synced: LMDB's own creation is not atomic."""
        with storage_errors("create", temporary):
            self._fs.unlink(temporary)
        try:
            env = lmdb.open(
                os.fsencode(temporary),
                subdir=False,
                lock=False,
                map_size=self._settings.map_bytes,
                max_dbs=layout.DATABASES,
                mode=0o666,
                lib_version=0,
            )
            try:
                tables = Tables(env, create=True)
                with env.begin(write=True) as txn:
                    record = layout.encode_header(self.uuid, salt)
                    txn.put(layout.HEADER_KEY, record, db=tables.meta)
                    record = layout.encode_state(state, salt)
                    txn.put(layout.STATE_KEY, record, db=tables.meta)
                    if lsn > 1:  # nothing is missing before it
                        record = layout.encode_begin(lsn, 0, salt)
                        txn.put(layout.begin_key(lsn), record, db=tables.meta)
            finally:
                env.close()
        except lmdb.Error as exc:
            raise wrapped(exc, "create", self.path) from exc
        with storage_errors("create", self.path):
            fd = self._fs.open(temporary)
            try:
                end = os.fstat(fd).st_size
                self._fs.pwrite(fd, bytes(_ROOM_STEP), end)
                self._fs.fsync(fd)
            finally:
                self._fs.close(fd)

    def _configured_bytes(self) -> int:
        """Of a stage that is made now."""
        return (self._settings.stage_bytes + _PAGE - 1) // _PAGE * _PAGE

    def _stage_bytes(self) -> int:
        """Of the stage in use, for which another process may have been configured otherwise."""
        if not self._stage_size:
            self._stage_size = self.stage.size()
        return self._stage_size

    def _set_words(self, header: StageHeader, last: int, stored: int) -> None:
        words = self.words
        words[GENERATION] = 0
        words[STORED] = stored
        words[LAST] = last
        words[BASE] = header.base
        words[END] = STAGE_HEADER_BYTES
        words[DRAINED] = STAGE_HEADER_BYTES
        words[GENERATION] = header.generation

    def recover(self, after_lsn: int, durable_lsn: int) -> Iterator[LoggedOperation]:
        return one_by_one(self.recover_alike(after_lsn, durable_lsn))

    def recover_alike(
        self, after_lsn: int, durable_lsn: int
    ) -> Iterator[LoggedOperation | LoggedRun]:
        if self._private_words is None:
            # Until `start`, or for as long as this is a reader that nobody else is beside.
            self._private_words = [0] * 8
            self.stage.close()  # read what is there now
            if not self._writes:
                self._give_back()
        found = self._recovered = Recovered(after_lsn)
        yield from recover(self, found, after_lsn, durable_lsn)
        if found.stage is not None:
            self._set_words(found.stage, found.last_lsn, found.stored_lsn)
            self._private_words[END] = found.end

    def torn(self) -> tuple[int, int]:
        return self._recovered.torn_bytes, int(self._recovered.torn_bytes > 0)

    def start(self, lsn: int, recovered_lsn: int) -> None:
        found = self._recovered
        generation = found.generation + 1
        self._write(self._start, lsn, recovered_lsn, generation)
        for name in os.listdir(self._folder):
            if name.startswith((layout.DATA, layout.STAGE)) and name.endswith(".tmp"):
                with contextlib.suppress(OSError):  # room only
                    self._fs.unlink(self._folder / name)
        base = found.address - STAGE_HEADER_BYTES
        size = self._configured_bytes()
        header = StageHeader(self.uuid, self.store.salt, generation, base, recovered_lsn, size)
        # An old stage counts for nothing from now on, whether the new one is on disk or not.
        old_size = 0 if found.stage is None else self.stage.size()
        if old_size != size:
            try:
                self.stage.make(header)
            except StorageFull:  # the old one will do
                if old_size <= STAGE_HEADER_BYTES:
                    raise
                header, size = header._replace(size=old_size), old_size
        if old_size == size:
            self.stage.begin(header, durable=True)
        self._private_words, self._stage_size = None, 0
        self._set_words(header, recovered_lsn, recovered_lsn)
        self._environment().clear_dead_readers()
        self._room_until = 0
        self._make_room(base, 0, rows=False)

    def _start(
        self, txn: Txn, tables: Tables, lsn: int, recovered_lsn: int, generation: int
    ) -> None:
        found, store = self._recovered, self.store
        state = store.state(txn, tables)
        stored = store.last_lsn(txn, tables)
        if found.stage is not None:
            stage = found.stage
            for frame in self.stage.frames(
                STAGE_HEADER_BYTES, found.end, stage.salt, stage.generation, stage.base
            ):
                if stored < frame.header.lsn <= recovered_lsn:
                    store.put(txn, tables, frame.header, frame.data)
        store.delete_behind(txn, tables, recovered_lsn)
        store.put_begin(txn, tables, lsn, recovered_lsn)
        address = max(state.address, found.address)
        store.put_state(txn, tables, state._replace(address=address, generation=generation))

    def attach(self) -> None:
        self._private_words, self._stage_size = None, 0
        self.stage.close()  # whoever recovered may have made another
        self._give_back()
        self._environment()

    # ------------------------------------------------------------ appending

    def append(self, stamped: Sequence[Stamped], durable_lsn: int) -> list[Appended]:
        words, salt = self.words, self._salt()
        generation, base, start = words[GENERATION], words[BASE], words[END]
        parts, places, end = self._laid_out(stamped, salt, generation, base, start, durable_lsn)
        if end - start > self._stage_bytes() - STAGE_HEADER_BYTES:
            return self._append_directly(stamped, parts, places, end - start)
        if base + end > self._room_until:
            rows = any(len(item.operation.lengths) for item in stamped)
            self._make_room(base + end, end - start, rows=rows)
        if end > self._stage_bytes():
            self._drain()
            self._begin_stage(base + start)
            return self.append(stamped, durable_lsn)
        self.stage.write(parts, start)
        words[LAST] = stamped[-1].lsn
        words[END] = end
        return places

    def _salt(self) -> bytes:
        if not self.store.salt:
            self._environment()
        return self.store.salt

    def _laid_out(
        self,
        stamped: Sequence[Stamped],
        salt: bytes,
        generation: int,
        base: int,
        at: int,
        durable_lsn: int,
    ) -> tuple[list[Buffer], list[Appended], int]:
        """Parts for the stage, where each operation goes, and where they end."""
        parts: list[Buffer] = []
        places: list[Appended] = []
        epoch = generation & 0xFFFFFFFF
        for item in stamped:
            data, _, size, _ = frames.encode(
                item, salt=salt, epoch=epoch, durable_before=durable_lsn, data_offset=base + at
            )
            parts += data
            operation = item.operation
            rows = frames.HEADER_BYTES + len(operation.body) + 8 * len(operation.lengths)
            places.append(Appended(base + at + rows, (generation, at + size)))
            at += size
        return parts, places, at

    def _append_directly(
        self, stamped: Sequence[Stamped], parts: list[Buffer], places: list[Appended], size: int
    ) -> list[Appended]:
        """Write a commit that the stage cannot hold into LMDB."""
        words = self.words
        data = memoryview(b"".join(parts))
        end = words[BASE] + words[END] + size

        def put(txn: Txn, tables: Tables) -> None:
            self._put_staged(txn, tables)
            at, salt_crc = 0, crc32(self.store.salt)
            while at < len(data):
                header = frames.decode_header(data, at, salt_crc)
                assert header is not None
                self.store.put(txn, tables, header, data[at : at + header.data_bytes])
                at += header.data_bytes

        self._room_until = 0  # LMDB takes what it needs, and this leaves nothing ahead
        try:
            self._write(put)
        except StorageError as exc:
            self._see_that_nothing_happened(stamped[0].lsn, exc)
            raise
        words[LAST] = stamped[-1].lsn
        self._note_stored(stamped[-1].lsn)
        try:
            self._begin_stage(end)
        except StorageError as exc:
            raise LogInterrupted(str(exc)) from exc
        generation = words[GENERATION]
        return [Appended(place.location, (generation, STAGE_HEADER_BYTES)) for place in places]

    def _see_that_nothing_happened(self, lsn: int, failed: StorageError) -> None:
        """After an error from a commit: the first page may have been written all the same.

        Raises:
            LogInterrupted: LMDB has operation `lsn`, or it cannot be told.
        """
        try:
            if self.read(self.store.last_lsn) < lsn:
                return
        except StorageError as exc:
            raise LogInterrupted(f"{failed}; it cannot be read back, too: {exc}") from failed
        raise LogInterrupted(str(failed)) from failed

    def _begin_stage(self, address: int, generation: int | None = None) -> None:
        """Begin the stage anew: LMDB has everything (append lock held)."""
        words = self.words
        generation = generation or words[GENERATION] + 1
        header = StageHeader(
            self.uuid,
            self.store.salt,
            generation,
            address - STAGE_HEADER_BYTES,
            words[LAST],
            self._stage_bytes(),
        )
        # Not synced: if power fails, the old stage returns, and LMDB has all that it held.
        self.stage.begin(header, durable=False)
        self._set_words(header, words[LAST], words[LAST])

    # ------------------------------------------------------------ from the stage into LMDB

    def sync(self) -> None:
        self._drain()

    def _drain(self) -> None:
        """Move everything that is staged into LMDB, in one transaction, durably."""
        words = self.words
        if words[STORED] >= words[LAST]:
            return
        stored, generation, at = self._write(self._put_staged)
        self._note_stored(stored)
        self._drained = (generation, at)
        if words[GENERATION] == generation:
            words[DRAINED] = at

    def _note_stored(self, lsn: int) -> None:
        # Two may do this at once; then the lower one may win, which is true as well.
        if lsn > self.words[STORED]:
            self.words[STORED] = lsn

    def _put_staged(self, txn: Txn, tables: Tables) -> tuple[int, int, int]:
        """Put what LMDB does not have yet.

        Returns:
            The last LSN that it then has; generation and offset in the stage up to where that is.

        The stage is not begun anew meanwhile: that waits until LMDB has all of it.
        """
        words, store = self.words, self.store
        stored = store.last_lsn(txn, tables)
        generation, end, base = words[GENERATION], words[END], words[BASE]
        at = self._drained[1] if self._drained[0] == generation else STAGE_HEADER_BYTES
        state = store.state(txn, tables)
        # A stage of an older generation was given up, a moment ago or half-way: what it holds
        # beyond LMDB is gone for ever.
        if stored >= words[LAST] or generation < state.generation:
            # Whoever put it here may have met an error behind that: see that it is synced.
            store.put_state(txn, tables, state)
            return stored, generation, at
        for frame in self.staged(generation, at, end, base):
            lsn = frame.header.lsn
            if lsn > stored:
                if not store.follows(txn, tables, lsn, stored):
                    raise layout.corrupt(
                        self.path, f"operation {stored + 1} is missing", lsn=stored + 1
                    )
                store.put(txn, tables, frame.header, frame.data)
                stored = lsn
            at = frame.offset + frame.header.data_bytes
        if at != end and words[GENERATION] == generation:  # else LMDB had all that it held
            raise layout.corrupt(
                self.stage.path, "a damaged frame that LMDB does not have", offset=at
            )
        return stored, generation, at

    def staged(
        self, generation: int, offset: int, end: int, base: int | None = None
    ) -> Iterator[StagedFrame]:
        """Frames in the stage, from `offset` to `end`."""
        where = self.words[BASE] if base is None else base
        return self.stage.frames(offset, end, self.store.salt, generation, where)

    def checked_frame(self, frame: StagedFrame, *, rows: bool = False) -> Checked | None:
        """Check a frame of the stage behind its header; None if it is damaged."""
        header, data = frame.header, frame.data
        start = frames.HEADER_BYTES
        body = bytes(data[start : start + header.body_len])
        if crc32(body) != header.body_crc:
            return None
        try:
            checked = checked_operation(header, data, body, self.stage.path)
        except StorageError:
            return None
        if rows and header.row_count:
            table = frames.decode_table(data, header, 0)
            first = start + header.body_len + 8 * header.row_count
            if (
                table is None
                or frames.check_rows(data, first, header.first_id or None, table) is not None
            ):
                return None
        return checked

    # ------------------------------------------------------------ room on the disk

    def _make_room(self, address: int, size: int, *, rows: bool) -> None:
        """See that LMDB will find room for everything up to this address (append lock held).

        So a full disk shows before anything was written, and a sync need not fail of it.
        """
        # A row takes whole pages, where it does not fit into half of one.
        wanted = 2 * (size + self._undrained()) + _TAIL + (_RESERVE if rows else 0)
        used = self._environment().used_bytes()
        with storage_errors("read", self.path):
            have = os.fstat(self._data_descriptor()).st_size
        if used + wanted > have:
            try:
                have += self._extend(used + wanted - have, have)
            except StorageFull:
                # It asks for more than is needed now; what it got may do.
                have = os.fstat(self._data_descriptor()).st_size
                if used + wanted > have:
                    if rows:
                        raise
                    return
        # Not asked again before others and we have appended half of what is left.
        self._room_until = address + max(0, have - used - wanted - _RESERVE) // 2

    def _extend(self, lacking: int, have: int) -> int:
        """Let the file grow by written zeros, at least by so many; by how many."""
        step = min(max(have // 4, _ROOM_STEP), _MOST_ROOM_AHEAD)
        grow = (lacking + step - 1) // step * step

        def extend(txn: Txn, tables: Tables) -> None:
            # In LMDB's writer lock: nobody else can write behind the end now.
            fd = self._data_descriptor()
            with storage_errors("extend", self.path):
                end = os.fstat(fd).st_size
                for at in range(end, end + grow, _ROOM_STEP):
                    self._fs.pwrite(fd, bytes(min(_ROOM_STEP, end + grow - at)), at)

        self._write(extend)
        return grow

    def _data_descriptor(self) -> int:
        if self._data_fd < 0:
            with storage_errors("open", self.path):
                self._data_fd = self._fs.open(self.path)
        return self._data_fd

    def _undrained(self) -> int:
        """Bytes in the stage that LMDB does not have."""
        words = self.words
        return 0 if words[STORED] >= words[LAST] else max(0, words[END] - words[DRAINED])

    def needs_preparation(self) -> bool:
        # At "os" nobody syncs: without this an append would have to wait for LMDB now and then.
        return self._undrained() > self._stage_bytes() // 2

    def prepare(self) -> None:
        self._drain()

    # ------------------------------------------------------------ switching and retiring

    def switch(self, next_lsn: int, durable_lsn: int) -> None:
        pass  # there is one log, and what is dropped from it leaves no hole

    def retire(self, durable_lsn: int, keep_lsn: int, next_lsn: int) -> None:
        words = self.words
        address, generation = self._write(self._retire, keep_lsn, next_lsn)
        words[LAST] = keep_lsn
        self._begin_stage(address, generation)

    def _retire(self, txn: Txn, tables: Tables, keep_lsn: int, next_lsn: int) -> tuple[int, int]:
        """Take over what is kept, delete what is not; where and how the next stage begins."""
        words, store = self.words, self.store
        state = store.state(txn, tables)
        stored = store.last_lsn(txn, tables)
        address = max(store.end_address(txn, tables, state), words[BASE] + words[END])
        for frame in self.staged(words[GENERATION], STAGE_HEADER_BYTES, words[END]):
            if stored < frame.header.lsn <= keep_lsn:
                store.put(txn, tables, frame.header, frame.data)
                stored = frame.header.lsn
        if stored < keep_lsn:
            raise StorageError(
                f"{self.path}: the log was given up, and operations {stored + 1} to {keep_lsn} "
                "cannot be read back"
            )
        store.delete_behind(txn, tables, keep_lsn)
        store.put_begin(txn, tables, next_lsn, keep_lsn)
        # An appender may have died while it began the stage anew.
        header = self.stage.header()
        known = 0 if header is None else header.generation
        generation = max(words[GENERATION], state.generation, known) + 1
        store.put_state(txn, tables, state._replace(address=address, generation=generation))
        return address, generation

    # ------------------------------------------------------------ reading

    def follow(self, after_lsn: int) -> LogFollower:
        if not self.read(self.store.reaches_back, after_lsn):
            raise LogGone
        return LMDBFollower(self, after_lsn)

    def pin(
        self, ids: NDArray[np.int64], locations: NDArray[np.int64], lengths: NDArray[np.uint32]
    ) -> Pin:
        places, sizes = locations.tolist(), lengths.tolist()
        if self._salvage is not None:
            return SalvagedPin(list(map(self._salvage.row, ids.tolist(), places, sizes)))
        for _ in range(_TRIES):
            generation = self.words[GENERATION]
            rows = self.read(self._rows_at, places)
            missing = [i for i, row in enumerate(rows) if row is None]
            if not missing:
                break
            staged = [self._staged_row(generation, places[i], sizes[i]) for i in missing]
            # Read first, asked then: a stage that was begun anew meanwhile has other bytes there.
            if generation and generation == self._stage_generation():
                if None in staged:
                    raise LogGone(self.path)
                for i, row in zip(missing, staged, strict=True):
                    rows[i] = row
                break
        else:
            raise LogGone(self.path)
        return LMDBPin([row for row in rows if row is not None], sizes, self.path)

    def _rows_at(self, txn: Txn, tables: Tables, places: list[int]) -> list[bytes | None]:
        db = tables.rows
        return [txn.get(key(place), db=db) for place in places]

    def _stage_generation(self) -> int:
        """Of the stage now. Nobody changes words of our own, so then the file is asked."""
        if self._private_words is None:
            return self.words[GENERATION]
        header = self.stage.header()
        return 0 if header is None else header.generation

    def _staged_row(self, generation: int, place: int, length: int) -> bytes | None:
        """The row at this address, if the stage reaches there."""
        words = self.words
        offset = place - words[BASE]
        if offset < STAGE_HEADER_BYTES or offset + length > words[END]:
            return None
        return self.stage.read(generation, offset, length)

    # ------------------------------------------------------------ upkeep

    def drop_below(
        self, lsn: int, live_ids: NDArray[np.int64], live_locations: NDArray[np.int64]
    ) -> None:
        self._drain()
        live = np.unique(live_locations)

        def deleted(table: bytes, keys: NDArray[np.int64]) -> NDArray[np.bool_]:
            return keys <= lsn if table == layout.OPERATIONS else ~_are_among(keys, live)

        stay = self.read(lambda *_: check_trees(self.path, deleted))
        if stay[layout.ROWS] < len(live):
            self.read(self._see_that_rows_are_there, lsn, live)
        address = self._write(self._raise_floor, lsn)
        at = 0
        while True:
            keys = self.read(self._keys, layout.ROWS, at, address)
            if not keys:
                break
            numbers = np.frombuffer(b"".join(keys), ">u8").astype(np.int64)
            at = int(numbers[-1]) + 1
            dead = numbers[~_are_among(numbers, live)].tolist()
            for start in range(0, len(dead), _DELETED_AT_ONCE):
                part = [key(place) for place in dead[start : start + _DELETED_AT_ONCE]]
                self._write(self._delete, layout.ROWS, part)
                self._give_way()
        while keys := self.read(self._keys, layout.OPERATIONS, 0, lsn + 1):
            for start in range(0, len(keys), _DELETED_AT_ONCE):
                part = keys[start : start + _DELETED_AT_ONCE]
                self._write(self._delete, layout.OPERATIONS, part)
                self._give_way()
        self._environment().clear_dead_readers()

    def _give_way(self) -> None:
        """Between two transactions: who waits for their lock looks at it now and then only."""
        time.sleep(_GIVEN_WAY_S)

    def _see_that_rows_are_there(
        self, txn: Txn, tables: Tables, lsn: int, live: NDArray[np.int64]
    ) -> None:
        """A damaged key makes a live row look dead. What is newer than `lsn` may be given up."""
        end = self.store.dropping_from(txn, tables, State(0, 0, 0), lsn)
        with txn.cursor(db=tables.rows) as cursor:
            for place in live[live < end].tolist():
                if not cursor.set_key(key(place)):
                    raise layout.corrupt(self.path, f"the payload at {place} is missing")

    def _raise_floor(self, txn: Txn, tables: Tables, lsn: int) -> int:
        """Let nobody begin below `lsn` any more; the address below which rows may go."""
        store = self.store
        state = store.state(txn, tables)
        address = store.dropping_from(txn, tables, state, lsn)
        # Operations behind `lsn` may all be in the stage.
        end = store.end_address(txn, tables, state)
        floor = max(state.floor, min(lsn, store.last_lsn(txn, tables)))
        store.put_state(txn, tables, state._replace(floor=floor, address=max(end, state.address)))
        with txn.cursor(db=tables.meta) as cursor:  # begins that nobody can come to any more
            found = cursor.set_range(layout.BEGIN_PREFIX)
            while found and cursor.key() < layout.begin_key(floor + 1):
                if not cursor.key().startswith(layout.BEGIN_PREFIX):
                    break
                cursor.delete()
                found = bool(cursor.key())
        return address

    def _keys(self, txn: Txn, tables: Tables, name: bytes, first: int, end: int) -> list[bytes]:
        """Some keys in [first, end)."""
        found: list[bytes] = []
        with txn.cursor(db=getattr(tables, name.decode())) as cursor:
            if not cursor.set_range(key(first)):
                return found
            last = key(end)
            for raw in cursor.iternext(keys=True, values=False):
                if raw >= last or len(found) >= _LOOKED_AT_ONCE:
                    break
                found.append(raw)
        return found

    def _delete(self, txn: Txn, tables: Tables, name: bytes, keys: list[bytes]) -> None:
        db = getattr(tables, name.decode())
        for raw in keys:
            txn.delete(raw, db=db)

    def verify(self, until_lsn: int) -> Iterator[Problem]:
        return verify(self, until_lsn)

    def identify(self) -> bytes:
        salvage = Salvage(self._folder, self.uuid)
        try:
            return salvage.uuid()
        finally:
            salvage.close()

    def salvage(self, after_lsn: int) -> Iterator[LoggedOperation | Damage]:
        self._let_go_of_salvage()
        self._salvage = Salvage(self._folder, self.uuid)
        return self._salvage.operations(after_lsn)

    def _let_go_of_salvage(self) -> None:
        salvage, self._salvage = self._salvage, None
        if salvage is not None:
            salvage.close()

    def stats(self) -> dict[str, Any]:
        words = self.words
        facts = self._environment().stats()
        with contextlib.suppress(OSError):
            facts["file_bytes"] = os.stat(self.path).st_size
        facts["staged_operations"] = max(0, words[LAST] - words[STORED])
        facts["staged_bytes"] = max(0, words[END] - STAGE_HEADER_BYTES)
        return facts

    def finish(self, last_lsn: int) -> None:
        self._drain()
        words = self.words
        if words[END] > STAGE_HEADER_BYTES:
            self._begin_stage(words[BASE] + words[END])
        header = self.stage.header()
        if header is None or header.last_lsn != words[LAST]:
            raise StorageError(f"{self.stage.path} was changed while the buffer was open")
        self.stage.begin(header, durable=True)
        used = self._environment().used_bytes() + _TAIL
        with storage_errors("finish", self.path):
            if os.fstat(self._data_descriptor()).st_size != used:
                self._fs.truncate(self._data_descriptor(), used)
                self._fs.fsync(self._data_descriptor())

    def close(self) -> None:
        self._give_back()
        self._let_go_of_salvage()
        self.stage.close()
        if self._data_fd >= 0:
            self._fs.close(self._data_fd)
            self._data_fd = -1

    def _give_back(self) -> None:
        env, self._env = self._env, None
        if env is not None and not env.lost:
            release(env)

    def after_fork(self) -> None:
        # The environment was given up right after the fork; see `environment`.
        self._env = None
        self._mutex = threading.Lock()
        self.close()


def _are_among(numbers: NDArray[np.int64], rising: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which of these numbers are among others, which rise."""
    behind = np.searchsorted(rising, numbers, side="right")
    found: NDArray[np.bool_] = behind > np.searchsorted(rising, numbers)
    return found
