"""Locks between processes that die with their holder.

POSIX record locks, on files that are used for nothing else. They have two traps, both met here:
closing *any* descriptor of such a file drops the lock, so each file is opened once a process,
through a registry; and they do not exclude threads of one process, so a thread lock goes on top.
(`flock` would stay held by a forked child of a killed holder; a `multiprocessing.Lock` stays locked
for ever when its holder dies.)

A signal handler may raise in the main thread (Ctrl-C does): when a function is entered, and when a
builtin returns. So that no lock stays held then, what a lock protects is handed to `run`, whose
`finally` blocks call one builtin each, and no function of ours.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from expbuf_core.errors import BufferClosed, LockTimeout, ReentrantCall
from expbuf_core.filesystem import is_plain, open_for_good, storage_errors
from expbuf_core.native import native

# struct flock on 64-bit Linux and (reordered) macOS; only read to name the holder of a lock.
_FLOCK = struct.Struct("hhqqi4x")

Result = TypeVar("Result")
# Native code takes it without the interpreter's lock.
_Mutex = threading.RLock if native is None else native.Mutex


class _LockFile:
    """One open lock file of this process, and who in it holds what."""

    def __init__(self, path: Path, *, writable: bool) -> None:
        flags = (os.O_RDWR | os.O_CREAT) if writable else os.O_RDONLY
        self.fd = open_for_good(path, flags)
        if not is_plain(self.fd):
            os.close(self.fd)
            raise OSError(errno.EINVAL, "something else stands in its place")
        self.path = path
        self.mutex: Any = _Mutex()  # knows its owner; never entered twice
        self.running = False  # by `run`
        self.sharers = 0
        self.users = 0
        stat = os.fstat(self.fd)
        self.key = (stat.st_dev, stat.st_ino)


_files: dict[tuple[int, int], _LockFile] = {}
_registry_mutex: Any = threading.RLock()  # knows its owner; never entered twice


def registry_is_mine() -> bool:
    """Whether this thread is just opening or closing a lock file, or looking for a holder."""
    return bool(_registry_mutex._is_owned())


def _known(path: Path) -> _LockFile | None:
    try:
        stat = os.stat(path)
    except OSError:  # to open it says why
        return None
    return _files.get((stat.st_dev, stat.st_ino))


def _open(path: Path) -> _LockFile:
    with _registry_mutex:
        file = _known(path)
        if file is None:
            with storage_errors("open the lock file", path):
                file = _LockFile(path, writable=True)
            file = _files.setdefault(file.key, file)
        file.users += 1
        return file


def _close(file: _LockFile) -> None:
    """Let go of a lock file; the last user closes it, and with it drops what is still held."""
    with _registry_mutex:
        file.users -= 1
    while not _closed_unless_used(file):
        time.sleep(1e-3)


def _closed_unless_used(file: _LockFile) -> bool:
    """Close it if nobody uses it any more; False while a thread is still inside.

    Its unlocking would meet whatever file gets the descriptor's number.
    """
    with _registry_mutex:  # all the while: who opened the file anew in between would lose its lock
        if file.users or file.fd < 0:
            return True
        try:
            if not file.mutex.acquire(blocking=False):
                return False
            _files.pop(file.key, None)
            fd, file.fd = file.fd, -1
            os.close(fd)
            return True
        finally:
            try:  # noqa: SIM105  (`suppress` is no builtin)
                file.mutex.release()
            except RuntimeError:  # it was not acquired
                pass


def _check_open(file: _LockFile) -> None:
    if file.fd < 0:
        raise BufferClosed("the buffer is closed; open it again")


def _forget_in_child() -> None:
    # Record locks are not inherited. Closing the descriptors here cannot drop the parent's.
    global _registry_mutex
    _registry_mutex = threading.RLock()
    for file in _files.values():
        os.close(file.fd)
        file.fd = -1
    _files.clear()


os.register_at_fork(after_in_child=_forget_in_child)


def _try_record_lock(fd: int, operation: int) -> bool:
    try:
        fcntl.lockf(fd, operation | fcntl.LOCK_NB)
        return True
    except OSError as exc:
        if exc.errno in (errno.EACCES, errno.EAGAIN):
            return False
        raise


def holder(path: Path) -> int | None:
    """Pid of a process, other than this one, that holds a lock on the file; None if nobody does.

    Needs permission to read the file only.
    """
    return _looked_at(path, _holder)


def _looked_at(path: Path, look: Callable[[int], Result | None]) -> Result | None:
    """What a descriptor of a lock file says; None if there is none."""
    with _registry_mutex:
        file = _known(path)
        if file is not None:
            return look(file.fd)
        # This process holds no lock on it, so a descriptor may come and go.
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError:
            return None
        try:
            return look(fd)
        finally:
            os.close(fd)


def opener(path: Path) -> int | None:
    """Like `holder`, for the file of an `OpenLock`; this process counts, too."""
    file = _known(path)
    return os.getpid() if file is not None and file.sharers else holder(path)


def _holder(fd: int) -> int | None:
    try:
        raw = fcntl.fcntl(fd, fcntl.F_GETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0))
    except OSError:
        return None
    kind, _, _, _, pid = _FLOCK.unpack(raw)
    return pid if kind != fcntl.F_UNLCK and pid > 0 else None


# ---------------------------------------------------------------- who is to blame

# Who waits while it holds other locks notes in their files what for, so that those behind it learn
# whom all of them wait for: "PID NAME\n", the waiting process and the lock beside this one. A note
# of a process that does not hold the lock counts for nothing.
_NOTE_BYTES = 256
_NOTED_AFTER_S = 0.005


def _note_waiting(file: _LockFile) -> list[_LockFile]:
    """Note that this thread waits for a lock; where."""
    note = f"{os.getpid()} {file.path.name}\n".encode()
    noted = []
    for each in list(_files.values()):
        if each is not file and each.mutex._is_owned() and each.path.parent == file.path.parent:
            with contextlib.suppress(OSError):  # such as a full disk
                os.pwrite(each.fd, note, 0)
                noted.append(each)
    return noted


def _erase_notes(noted: list[_LockFile]) -> None:
    for each in noted:
        with contextlib.suppress(OSError):
            os.ftruncate(each.fd, 0)


def _awaited_by(path: Path, pid: int) -> Path | None:
    """The lock that a process waits for while it holds this one."""
    raw = _looked_at(path, lambda fd: os.pread(fd, _NOTE_BYTES, 0)) or b""
    who, _, name = raw.partition(b"\n")[0].partition(b" ")
    return path.with_name(name.decode()) if name and who == str(pid).encode() else None


def _root_of(path: Path, pid: int | None) -> tuple[Path, int | None]:
    """The lock, and the process, that all wait for who wait behind this holder of this lock."""
    seen = set()
    while pid is not None and path not in seen:
        seen.add(path)
        awaited = _awaited_by(path, pid)
        following = None if awaited is None else holder(awaited)
        if awaited is None or following is None:
            break
        path, pid = awaited, following
    return path, pid


def _timed_out(path: Path, who: str, pid: int | None, timeout: float) -> LockTimeout:
    root, culprit = _root_of(path, pid)
    message = f"{path}: {who} has held the lock for {timeout:g} s"
    if root != path:
        message += f", and waits for {root.name}, which process {culprit} holds"
    return LockTimeout(
        f"{message}; is it stopped or hung? The lock is freed when it ends", pid=culprit
    )


def _has_it_already(what: object, running: bool) -> ReentrantCall | LockTimeout:
    if not running:
        return _kept_by_a_thread(what, 0, "this thread")
    return ReentrantCall(
        "the buffer was called by a signal handler or finalizer that interrupted a call of the "
        "same thread; let it set a flag, or call from another thread"
    )


def _kept_by_a_thread(
    what: object, timeout: float, who: str = "another thread of this process"
) -> LockTimeout:
    me = os.getpid()
    if isinstance(what, Path):
        pid = holder(what)
        if pid is not None:  # that thread has only the turn to wait for another process
            return _timed_out(what, f"process {pid}", pid, timeout)
        if _root_of(what, me)[0] != what:
            return _timed_out(what, f"{who} (pid {me})", me, timeout)
    return LockTimeout(f"{what}: {who} (pid {me}) has held the lock for {timeout:g} s", pid=me)


class ProcessLock:
    """A lock that excludes the threads of all processes. Not reentrant.

    Args:
        path: Its file, in a folder that exists.
        timeout_s: How long it is waited for.
    """

    def __init__(self, path: Path, timeout_s: float) -> None:
        self.file = _open(path)
        self.timeout_s = timeout_s

    def run(
        self,
        work: Callable[..., Result],
        *args: Any,
        pause: Callable[[], bool] | None = None,
    ) -> Result | None:
        """Do something while the lock is held.

        Args:
            work: Is called with `args`.
            *args: Its arguments.
            pause: Waits a little while another process has the lock; whether to go on waiting.

        Returns:
            What `work` returned; None where `pause` gave up.

        Raises:
            LockTimeout: It was not free in time; `.pid` is the holder's.
            ReentrantCall: This thread is in here already: a signal handler interrupted it.
        """
        file, timeout = self.file, self.timeout_s
        mutex = file.mutex
        if mutex._is_owned():
            raise _has_it_already(file.path, file.running)
        try:
            if not mutex.acquire(timeout=timeout):
                raise _kept_by_a_thread(file.path, timeout)
            _check_open(file)
            try:
                file.running = True
                if _try_record_lock(file.fd, fcntl.LOCK_EX) or self._wait(file, timeout, pause):
                    return work(*args)
                return None
            finally:
                file.running = False
                fcntl.lockf(file.fd, fcntl.LOCK_UN)
        finally:
            try:  # noqa: SIM105  (`suppress` is no builtin)
                mutex.release()
            except RuntimeError:  # it was not acquired
                pass

    def try_run(self, work: Callable[..., object], *args: Any) -> bool:
        """Do something while the lock is held, if it is free now; whether it was."""
        file, ran = self.file, False
        mutex = file.mutex
        if mutex._is_owned():
            return False
        try:
            if mutex.acquire(blocking=False):
                _check_open(file)
                try:
                    ran = _try_record_lock(file.fd, fcntl.LOCK_EX)
                    if ran:
                        work(*args)
                finally:
                    fcntl.lockf(file.fd, fcntl.LOCK_UN)
            return ran
        finally:
            try:  # noqa: SIM105  (`suppress` is no builtin)
                mutex.release()
            except RuntimeError:  # it was not acquired
                pass

    def acquire(self, timeout_s: float | None = None) -> None:
        """Take the lock; `run` is to be preferred.

        Raises:
            LockTimeout: It was not free in time, or this thread has it already; `.pid` is the
                holder's.
        """
        timeout = self.timeout_s if timeout_s is None else timeout_s
        file = self.file
        if file.mutex._is_owned():
            raise _kept_by_a_thread(file.path, 0, "this thread")
        try:
            if not file.mutex.acquire(timeout=timeout):
                raise _kept_by_a_thread(file.path, timeout)
            _check_open(file)
            if not _try_record_lock(file.fd, fcntl.LOCK_EX):
                self._wait(file, timeout, None)
        except BaseException:
            self.release()
            raise

    def _wait(self, file: _LockFile, timeout: float, pause: Callable[[], bool] | None) -> bool:
        """Wait for the record lock; False if `pause` gives up."""
        # The kernel's blocking call knows no timeout; holders need some 50 microseconds.
        started = time.monotonic()
        sleep_s = 2e-5
        noted: list[_LockFile] | None = None
        try:
            while True:
                if pause is None:
                    time.sleep(sleep_s)
                    sleep_s = min(sleep_s * 1.5, 1e-3)
                elif not pause():
                    return False
                if _try_record_lock(file.fd, fcntl.LOCK_EX):
                    return True
                waited = time.monotonic() - started
                if waited > timeout:
                    pid = _holder(file.fd)
                    who = f"process {pid}" if pid else "another process"
                    raise _timed_out(file.path, who, pid, timeout)
                if noted is None and waited > _NOTED_AFTER_S:
                    noted = _note_waiting(file)
        finally:
            _erase_notes(noted or [])

    def try_acquire(self) -> bool:
        """Take the lock if it is free now; `try_run` is to be preferred."""
        file = self.file
        if file.mutex._is_owned() or not file.mutex.acquire(blocking=False):
            return False
        try:
            if _try_record_lock(file.fd, fcntl.LOCK_EX):
                return True
        except BaseException:
            self.release()
            raise
        self.release()
        return False

    def release(self) -> None:
        """Let go; nothing happens where this thread does not hold it."""
        mutex = self.file.mutex
        if mutex._is_owned():
            try:
                if self.file.fd >= 0:
                    fcntl.lockf(self.file.fd, fcntl.LOCK_UN)
            finally:
                mutex.release()

    def is_mine(self) -> bool:
        """Whether this thread is inside, by this object or another one on the same file."""
        return bool(self.file.mutex._is_owned())

    def drain(self) -> None:
        """Wait until all threads of this process that are inside, or wait for others, are out."""
        with self.file.mutex:
            pass

    def close(self) -> None:
        """Let go of the file; the lock is not used any more."""
        _close(self.file)

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()


class OpenLock:
    """Who has the buffer open: held shared by every opener, alone by the first while it recovers.

    Call the methods under the `opening` lock only. Who marks nothing clean may leave without it.
    """

    def __init__(self, path: Path) -> None:
        self._file = _open(path)
        self._alone = self._shares = False

    def is_first(self) -> bool:
        """Take the lock alone; False if anyone has the buffer open (this process included)."""
        file = self._file
        with file.mutex:
            self._alone = file.sharers == 0 and _try_record_lock(file.fd, fcntl.LOCK_EX)
            return self._alone

    def share(self) -> None:
        """Hold it shared from now on; from alone to shared there is no gap."""
        file = self._file
        with file.mutex:
            if file.sharers == 0:
                fcntl.lockf(file.fd, fcntl.LOCK_SH)
            file.sharers += 1
            self._shares = True

    def is_last(self) -> bool:
        """Turn shared into alone if nobody else has the buffer open."""
        file = self._file
        with file.mutex:
            return file.sharers == 1 and _try_record_lock(file.fd, fcntl.LOCK_EX)

    def leave(self) -> None:
        """Let go of what this one holds: its share, or the whole."""
        file = self._file
        with file.mutex:
            if self._shares:
                file.sharers -= 1
            elif not self._alone:
                return
            self._alone = self._shares = False
            if file.sharers == 0:
                fcntl.lockf(file.fd, fcntl.LOCK_UN)

    def is_mine(self) -> bool:
        """Whether this thread is in the middle of one of these methods."""
        return bool(self._file.mutex._is_owned())

    def close(self) -> None:
        """Leave, and let go of the file; the lock is not used any more."""
        self.leave()
        _close(self._file)


class ThreadLock:
    """`ProcessLock` for a buffer that only this process can see."""

    def __init__(self, timeout_s: float) -> None:
        self._mutex: Any = threading.RLock()
        self._running = False
        self.timeout_s = timeout_s

    def run(
        self,
        work: Callable[..., Result],
        *args: Any,
        pause: Callable[[], bool] | None = None,
    ) -> Result | None:
        """Do something while the lock is held; see `ProcessLock.run`."""
        mutex = self._mutex
        if mutex._is_owned():
            raise _has_it_already("the buffer", self._running)
        try:
            if not mutex.acquire(timeout=self.timeout_s):
                raise _kept_by_a_thread("the buffer", self.timeout_s)
            try:
                self._running = True
                return work(*args)
            finally:
                self._running = False
        finally:
            try:  # noqa: SIM105  (`suppress` is no builtin)
                mutex.release()
            except RuntimeError:  # it was not acquired
                pass

    def try_run(self, work: Callable[..., object], *args: Any) -> bool:
        """Do something while the lock is held, if it is free now; whether it was."""
        mutex = self._mutex
        if mutex._is_owned():
            return False
        try:
            if mutex.acquire(blocking=False):
                work(*args)
                return True
            return False
        finally:
            try:  # noqa: SIM105  (`suppress` is no builtin)
                mutex.release()
            except RuntimeError:  # it was not acquired
                pass

    def acquire(self, timeout_s: float | None = None) -> None:
        """Take the lock, or raise `LockTimeout`."""
        timeout = self.timeout_s if timeout_s is None else timeout_s
        if self._mutex._is_owned():
            raise _kept_by_a_thread("the buffer", 0, "this thread")
        if not self._mutex.acquire(timeout=timeout):
            raise _kept_by_a_thread("the buffer", timeout)

    def try_acquire(self) -> bool:
        """Take the lock if it is free."""
        return not self._mutex._is_owned() and bool(self._mutex.acquire(blocking=False))

    def release(self) -> None:
        """Let go; nothing happens where this thread does not hold it."""
        if self._mutex._is_owned():
            self._mutex.release()

    def is_mine(self) -> bool:
        """Whether this thread is inside."""
        return bool(self._mutex._is_owned())

    def drain(self) -> None:
        """Wait until no thread is inside."""
        with self._mutex:
            pass

    def close(self) -> None:
        """Nothing to let go of."""

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *exc: object) -> None:
        self.release()
