"""The LMDB environment of one file, shared by everything in this process that has it open.

LMDB allows a process to open a file once only: its locks are record locks, which belong to the
process, and go when any descriptor of the lock file is closed. So there is one object a file here,
however many buffers use it. All transactions are short and run inside `read` or `write`; nothing
that LMDB owns leaves them. That is what makes it possible to grow the map, and to fork.

LMDB lets those who write wait for each other without end: behind a process that is stopped, too. So
whoever is about to take its writer lock takes the lock file `transaction` first, which knows a time
limit and its holder. Behind it nobody ever waits for LMDB's lock, but for an instant when a holder
dies. Lock order: it is the last of all, behind append, flush and maintenance. Who waits for it is
not inside the gate, so that neither a fork nor a map that grows waits for them; who has it asks for
`_mutex` and the gate, and nobody asks for it who has one of those.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import lmdb

from expbuf_core import folder
from expbuf_core.errors import FormatVersionError, StorageError, StorageFull
from expbuf_core.filesystem import storage_errors
from expbuf_core.locks import ProcessLock
from expbuf_lmdb import layout
from expbuf_lmdb.trees import check_file

_log = logging.getLogger("expbuf")
T = TypeVar("T")
if TYPE_CHECKING:
    Txn = lmdb.Transaction[bytes]
    Cursor = lmdb.Cursor[bytes]
else:  # generic in its stubs only
    Txn = lmdb.Transaction
    Cursor = lmdb.Cursor

# How a file is open; a higher number can do all that a lower one can.
PRIVATE = 0  # reading, without LMDB's locks: nobody writes, or each read is checked
READING = 1  # reading, registered, so that no page is reused that is being read
WRITING = 2

_TRIES = 200
_FORK_WAIT_S = 20.0
_GROWN_AT_ONCE = 1 << 40


class Tables:
    """The databases of an environment."""

    def __init__(self, env: lmdb.Environment, *, create: bool = False) -> None:
        self.meta = env.open_db(layout.META, create=create)
        self.operations = env.open_db(layout.OPERATIONS, create=create)
        self.rows = env.open_db(layout.ROWS, create=create)


class _Gate:
    """Lets many threads through, each once at a time, or one alone.

    A signal handler that raises may take any step from the main thread, so what a thread has left
    undone is recognised by its name when it comes again. (And so `with` stands before plain locks
    only: the lock of a `Condition` may stay held where an exception comes into its `__enter__`.)
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._turn = threading.Condition(self._lock)
        self._inside: set[int] = set()  # threads
        self._alone = 0  # the thread that has it alone, or waits for that; 0: nobody

    def enter(self) -> None:
        """Call `leave` even if this raises."""
        me = threading.get_ident()
        with self._lock:
            while self._alone not in (0, me):
                self._turn.wait()
            if self._alone:
                self._alone = 0
                self._turn.notify_all()
            self._inside.add(me)

    def leave(self) -> None:
        with self._lock:
            self._inside.discard(threading.get_ident())
            if self._alone:
                self._turn.notify_all()

    def close(self, timeout_s: float | None = None) -> bool:
        """Keep others out, and wait until nobody is inside; False if that took too long."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        me = threading.get_ident()
        with self._lock:
            self._inside.discard(me)
            while self._alone not in (0, me):
                if not self._wait(deadline):
                    return False
            self._alone = me
            while self._inside:
                if not self._wait(deadline):
                    self._alone = 0
                    self._turn.notify_all()
                    return False
            return True

    def _wait(self, deadline: float | None) -> bool:
        rest = None if deadline is None else deadline - time.monotonic()
        if rest is not None and rest <= 0:
            return False
        self._turn.wait(rest)
        return True

    def open(self) -> None:
        with self._lock:
            if self._alone == threading.get_ident():
                self._alone = 0
                self._turn.notify_all()

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        try:
            self.close()
            yield
        finally:
            self.open()


class Environment:
    """One file, open in this process. Made by `acquire`, given back by `release`.

    Attributes:
        path: The file.
        lost: The process has forked since: acquire it anew.
    """

    def __init__(
        self, path: Path, mode: int, map_bytes: int, max_readers: int, lock_timeout_s: float
    ) -> None:
        self.path = path
        self.lost = False
        self._mode = mode
        self._map_bytes = map_bytes
        self._max_readers = max_readers
        self._lock_timeout_s = lock_timeout_s
        self._lock: ProcessLock | None = None  # around all that takes LMDB's writer lock
        self._gate = _Gate()
        self._open()

    def _open(self) -> None:
        check_file(self.path)
        try:
            self._env = self._opened()
            try:
                try:
                    self.tables = Tables(self._env)
                except lmdb.MapResizedError:  # another process has grown it since we looked
                    self._env.set_mapsize(0)
                    self.tables = Tables(self._env)
                self._map_size = self._env.info()["map_size"]
                if self._mode == WRITING and self._lock is None:
                    self._lock = transaction_lock(self.path, self._lock_timeout_s)
            except BaseException:
                # LMDB refuses to open a file twice, so nobody could try again.
                self._env.close()
                raise
        except lmdb.ReadonlyError as exc:
            raise StorageError(f"cannot open {self.path}: {exc}") from exc
        except lmdb.NotFoundError as exc:
            raise layout.corrupt(self.path, "a database is missing") from exc
        except lmdb.Error as exc:
            raise wrapped(exc, "open", self.path) from exc

    def _opened(self) -> lmdb.Environment:
        def opened(mode: int) -> lmdb.Environment:
            return lmdb.open(
                os.fsencode(self.path),
                subdir=False,
                create=False,
                map_size=self._map_bytes,
                max_dbs=layout.DATABASES,
                max_readers=self._max_readers,
                mode=0o666,
                # A reader that is kept for later would hold its place over a fork.
                max_spare_txns=0,
                readonly=mode != WRITING,
                lock=mode != PRIVATE,
                # A plain write map would let a full disk kill the process.
                writemap=False,
            )

        if self._mode == WRITING:
            _allocate_lock_file(self.path, self._max_readers)
        if self._mode == READING:
            try:
                return opened(READING)
            except (lmdb.Error, OSError) as exc:
                # No permission for the lock file: read unregistered, and check each read.
                denied = os.strerror(errno.EACCES) in str(exc) or os.strerror(errno.EROFS) in str(
                    exc
                )
                if not denied:
                    raise
                self._mode = PRIVATE
        return opened(self._mode)

    def can(self, mode: int) -> bool:
        """Whether it is open for that."""
        return mode <= self._mode

    def strengthen(self, mode: int) -> None:
        """Be able to do what `mode` can; for WRITING, the transaction lock is held."""
        if self.can(mode):
            return
        with self._gate.alone():
            if mode > self._mode:
                self._env.close()
                self._mode = mode
                self._open()

    def close(self) -> None:
        """For `release` alone."""
        with self._gate.alone():
            self._env.close()
        if self._lock is not None:
            self._lock.close()

    # ------------------------------------------------------------ transactions

    def read(self, work: Callable[[Txn, Tables], T]) -> T:
        """Run `work` on one state of the file; it returns nothing that belongs to LMDB."""
        for attempt in range(_TRIES):
            panic = False
            try:
                self._gate.enter()
                state, result, error = self._read_once(work)
                if self._mode == PRIVATE and self._reused_since(state):
                    continue
                if error is not None:
                    raise error
                return result  # type: ignore[return-value]
            except lmdb.MapResizedError:
                pass
            except lmdb.PanicError:  # as in `write`
                panic = True
            except lmdb.ReadersFullError as exc:
                if attempt > 20:
                    raise StorageError(
                        f"{self.path}: more than {self._env.max_readers()} reads at one instant; "
                        "raise persistence.lmdb.max_readers"
                    ) from exc
                self._env.reader_check()
                time.sleep(0.001 * attempt)
                continue
            except lmdb.Error as exc:
                raise wrapped(exc, "read", self.path) from exc
            finally:
                self._gate.leave()
            if panic:
                self._in_turn(self._reopen)
            else:
                self._adopt_map()
        raise StorageError(f"{self.path}: changes faster than it can be read")

    def _read_once(
        self, work: Callable[[Txn, Tables], T]
    ) -> tuple[int, T | None, lmdb.Error | StorageError | None]:
        """Number of the state that was read, and the result or the error."""
        txn = self._env.begin()
        try:
            return txn.id(), work(txn, self.tables), None
        except BaseException as exc:
            # A transaction has its place among the readers until nothing refers to it, and what
            # keeps an exception keeps the frames it came through.
            traceback.clear_frames(exc.__traceback__)
            if isinstance(exc, lmdb.Error | StorageError):
                return txn.id(), None, exc
            raise
        finally:
            txn.abort()
            del txn

    def _reused_since(self, state: int) -> bool:
        """Whether pages of this state may have been written over.

        What transaction n + 1 frees can be reused from n + 2 on: a reader that is not registered
        may trust what it read while no more than one was committed.
        """
        return self._env.info()["last_txnid"] > state + 1

    def write(self, work: Callable[[Txn, Tables], T]) -> T:
        """Run `work` in a transaction that is durable on return; if it raises, nothing happened.

        `work` may be run again where the map had to grow.

        Raises:
            LockTimeout: Another process, or thread, writes for too long; nothing was begun.
        """
        result: T = self._in_turn(self._write, work)
        return result

    def _in_turn(self, work: Callable[..., T], *args: Any) -> T:
        """Do what takes LMDB's writer lock, when no other process is at it."""
        lock = self._lock
        return work(*args) if lock is None else cast(T, lock.run(work, *args))

    def _write(self, work: Callable[[Txn, Tables], T]) -> T:
        """`write` (transaction lock held)."""
        for _ in range(_TRIES):
            try:
                self._gate.enter()
                size = self._map_size
                with self._env.begin(write=True) as txn:
                    return work(txn, self.tables)
            except lmdb.MapFullError:
                grow, panic = True, False
            except lmdb.MapResizedError:
                grow, panic = False, False
            except lmdb.PanicError:
                # The first page could not be written once: LMDB wants to be opened anew.
                grow, panic = False, True
            except lmdb.Error as exc:
                raise wrapped(exc, "write", self.path) from exc
            finally:
                self._gate.leave()
            if panic:
                self._reopen()
            elif grow:
                self._grow_map(size)
            else:
                self._adopt_map()
        raise StorageError(f"{self.path}: the map does not become large enough")

    def _reopen(self) -> None:
        with self._gate.alone():
            self._env.close()
            self._open()

    def _adopt_map(self) -> None:
        """Another process has grown the map."""
        with self._gate.alone():
            self._set_map(0)

    def _grow_map(self, size: int) -> None:
        """Double the map, unless another thread has."""
        with self._gate.alone():
            # Readers that died hold pages that could be reused instead.
            self._env.reader_check()
            if self._map_size == size:
                self._set_map(size + min(size, _GROWN_AT_ONCE))

    def _set_map(self, size: int) -> None:
        try:
            self._env.set_mapsize(size)
            self._map_size = self._env.info()["map_size"]
        except lmdb.Error as exc:
            raise wrapped(exc, "map", self.path) from exc

    # ------------------------------------------------------------ facts

    def clear_dead_readers(self) -> int:
        """Free the places of readers that died; how many there were."""
        try:
            self._gate.enter()
            return self._env.reader_check() if self._mode != PRIVATE else 0
        except lmdb.Error as exc:
            raise wrapped(exc, "check the readers of", self.path) from exc
        finally:
            self._gate.leave()

    def used_bytes(self) -> int:
        """Bytes of the file that were ever in use."""
        try:
            self._gate.enter()
            return (self._env.info()["last_pgno"] + 1) * self._page_bytes()
        finally:
            self._gate.leave()

    def last_transaction(self) -> int:
        """Number of the newest state."""
        try:
            self._gate.enter()
            return self._env.info()["last_txnid"]
        finally:
            self._gate.leave()

    _psize = 0

    def _page_bytes(self) -> int:
        if not self._psize:
            self._psize = self._env.stat()["psize"]
        return self._psize

    def stats(self) -> dict[str, Any]:
        """Facts worth showing."""

        def counted(txn: Txn, tables: Tables) -> dict[str, Any]:
            return {
                "operations": txn.stat(tables.operations)["entries"],
                "rows": txn.stat(tables.rows)["entries"],
            }

        facts = self.read(counted)
        try:
            self._gate.enter()
            info = self._env.info()
            facts["map_bytes"] = info["map_size"]
            facts["used_bytes"] = (info["last_pgno"] + 1) * self._page_bytes()
            facts["readers"] = info["num_readers"]
            return facts
        finally:
            self._gate.leave()


# ---------------------------------------------------------------- one object a file

_registry: dict[tuple[int, int], tuple[Environment, int]] = {}
_mutex = threading.RLock()
_leaked: list[object] = []  # what a fork left unusable; closing it could hang


def transaction_lock(path: Path, timeout_s: float) -> ProcessLock:
    """The lock around all that takes LMDB's writer lock; its folder exists."""
    return ProcessLock(path.parent / folder.LOCKS / layout.TRANSACTION, timeout_s)


def acquire(
    path: Path, mode: int, map_bytes: int, max_readers: int, lock_timeout_s: float
) -> Environment:
    """The environment in this file, able to do what `mode` says.

    Args:
        path: Of the file.
        mode: For WRITING, `locks/` must exist beside it.
        map_bytes: As configured; what is open already stays as it is,
        max_readers: and so with this
        lock_timeout_s: and with the time that is waited for another process that writes.

    Raises:
        CorruptionError: The file is no environment, or was cut.
        LockTimeout: Another process, or thread, writes for too long.
        StorageError: It cannot be opened.
    """
    with storage_errors("open", path):
        where = os.stat(path)
    key = (where.st_dev, where.st_ino)
    with _mutex:
        env, users = _registry.get(key, (None, 0))
        if env is not None and env.can(mode):
            _registry[key] = (env, users + 1)
            return env

    def opened() -> Environment:
        with _mutex:
            env, users = _registry.get(key, (None, 0))
            if env is None:
                env = Environment(path, mode, map_bytes, max_readers, lock_timeout_s)
            else:
                env.strengthen(mode)
            _registry[key] = (env, users + 1)
            return env

    if mode != WRITING:
        return opened()
    # LMDB's binding looks for the databases in a transaction for writing then.
    lock = transaction_lock(path, lock_timeout_s)
    try:
        return cast(Environment, lock.run(opened))
    finally:
        lock.close()


def release(env: Environment) -> None:
    """The last to give it back closes it."""
    with _mutex:
        for key, (known, users) in list(_registry.items()):
            if known is env:
                if users > 1:
                    _registry[key] = (env, users - 1)
                else:
                    del _registry[key]
                    env.close()


def _before_fork() -> None:
    # With no transaction under way anywhere, the child can close what it inherits without touching
    # anything that is shared. It must: LMDB's binding refuses to open one file twice.
    _mutex.acquire()
    for env, _ in _registry.values():
        if not env._gate.close(_FORK_WAIT_S):
            _leaked.append(env)


def _after_fork_in_parent() -> None:
    for env, _ in _registry.values():
        if env in _leaked:
            _leaked.remove(env)
        else:
            env._gate.open()
    _mutex.release()


def _after_fork_in_child() -> None:
    global _mutex
    for env, _ in _registry.values():
        env.lost = True
        if env not in _leaked:
            env._env.close()
            env._gate = _Gate()
    _registry.clear()
    _mutex = threading.RLock()


os.register_at_fork(
    before=_before_fork,
    after_in_parent=_after_fork_in_parent,
    after_in_child=_after_fork_in_child,
)


# ---------------------------------------------------------------- errors

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_READER_BYTES, _LOCK_BYTES = 64, 128  # in LMDB's lock file: of a reader, and besides them
_DAMAGED = (
    lmdb.CorruptedError,
    lmdb.InvalidError,
    lmdb.PageNotFoundError,
    lmdb.BadValsizeError,
    lmdb.CursorFullError,
    lmdb.PageFullError,
    lmdb.BadTxnError,
    lmdb.IncompatibleError,
)


def wrapped(exc: lmdb.Error, what: str, path: Path) -> StorageError:
    """The error of ours for one of LMDB's."""
    text = f"cannot {what} {path}: {exc}"
    if isinstance(exc, lmdb.DiskError | lmdb.MapFullError) or _says(exc, _FULL):
        return StorageFull(f"{text}; free some room and try again")
    # LMDB takes a short write, which is what a full disk gives first, for an I/O error.
    if _says(exc, (errno.EIO,)) and _is_full(path):
        return StorageFull(f"{text}; the disk is full: free some room and try again")
    if isinstance(exc, lmdb.VersionMismatchError):
        return FormatVersionError(f"{text}; another version of LMDB wrote it")
    if isinstance(exc, _DAMAGED):
        return layout.corrupt(path, str(exc))
    return StorageError(text)


def _says(exc: lmdb.Error, codes: tuple[int, ...]) -> bool:
    return getattr(exc, "code", 0) in codes or any(os.strerror(code) in str(exc) for code in codes)


def _allocate_lock_file(path: Path, max_readers: int) -> None:
    """Make LMDB's lock file, where there is none, with room on the disk for all of it.

    LMDB extends it by a hole and stores into its map: on a full disk that kills the process.
    """
    lock = path.with_name(f"{path.name}-lock")
    if lock.exists() and lock.stat().st_size:
        return
    with storage_errors("make", lock):
        fd = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            os.posix_fallocate(fd, 0, _LOCK_BYTES + _READER_BYTES * max_readers)
        finally:
            os.close(fd)


def _is_full(path: Path) -> bool:
    try:
        room = os.statvfs(path if path.exists() else path.parent)
    except OSError:
        return False
    return room.f_bavail * room.f_frsize < 1 << 20
