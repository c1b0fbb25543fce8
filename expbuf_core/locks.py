"""Locks between processes that die with their holder.

POSIX record locks, on files that are used for nothing else. They have two traps, both met here:
closing *any* descriptor of such a file drops the lock, so each file is opened once a process,
through a registry; and they do not exclude threads of one process, so a thread lock goes on top.
(`flock` would stay held by a forked child of a killed holder; a `multiprocessing.Lock` stays locked
for ever when its holder dies.)
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import threading
import time
from pathlib import Path
from types import TracebackType

from expbuf_core.errors import LockTimeout
from expbuf_core.filesystem import storage_errors

# struct flock on 64-bit Linux and (reordered) macOS; only read to name the holder of a lock.
_FLOCK = struct.Struct("hhqqi4x")


class _LockFile:
    """One open lock file of this process, and who in it holds what."""

    def __init__(self, path: Path, *, writable: bool) -> None:
        flags = (os.O_RDWR | os.O_CREAT) if writable else os.O_RDONLY
        self.fd = os.open(path, flags | os.O_CLOEXEC, 0o666)
        self.path = path
        self.mutex = threading.Lock()
        self.sharers = 0
        self.users = 0
        stat = os.fstat(self.fd)
        self.key = (stat.st_dev, stat.st_ino)


_files: dict[tuple[int, int], _LockFile] = {}
_registry_mutex = threading.Lock()


def _known(path: Path) -> _LockFile | None:
    try:
        stat = os.stat(path)
    except FileNotFoundError:
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
        if file.users == 0 and file.fd >= 0:
            _files.pop(file.key, None)
            os.close(file.fd)
            file.fd = -1


def _forget_in_child() -> None:
    # Record locks are not inherited. Closing the descriptors here cannot drop the parent's.
    global _registry_mutex
    _registry_mutex = threading.Lock()
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
    with _registry_mutex:
        file = _known(path)
        if file is not None:
            return _holder(file.fd)
        # This process holds no lock on it, so a descriptor may come and go.
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            return _holder(fd)
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


class ProcessLock:
    """A lock that excludes the threads of all processes. Not reentrant.

    Args:
        path: Its file, in a folder that exists.
        timeout_s: How long `acquire` waits.
    """

    def __init__(self, path: Path, timeout_s: float) -> None:
        self._file = _open(path)
        self.timeout_s = timeout_s

    def acquire(self, timeout_s: float | None = None) -> None:
        """Take the lock.

        Raises:
            LockTimeout: It was not free in time; `.pid` is the holder's.
        """
        timeout = self.timeout_s if timeout_s is None else timeout_s
        file = self._file
        if not file.mutex.acquire(timeout=timeout):
            raise LockTimeout(
                f"{file.path}: another thread of this process (pid {os.getpid()}) has held the "
                f"lock for {timeout:g} s",
                pid=os.getpid(),
            )
        try:
            if not _try_record_lock(file.fd, fcntl.LOCK_EX):
                self._wait(file, timeout)
        except BaseException:
            file.mutex.release()
            raise

    def _wait(self, file: _LockFile, timeout: float) -> None:
        # The kernel's blocking call knows no timeout; holders need some 50 microseconds.
        deadline = time.monotonic() + timeout
        pause = 2e-5
        while not _try_record_lock(file.fd, fcntl.LOCK_EX):
            if time.monotonic() > deadline:
                pid = _holder(file.fd)
                who = f"process {pid}" if pid else "another process"
                raise LockTimeout(
                    f"{file.path}: {who} has held the lock for {timeout:g} s; is it stopped or "
                    "hung? The lock is freed when it ends",
                    pid=pid,
                )
            time.sleep(pause)
            pause = min(pause * 1.5, 1e-3)

    def try_acquire(self) -> bool:
        """Take the lock if it is free now."""
        file = self._file
        if not file.mutex.acquire(blocking=False):
            return False
        try:
            if _try_record_lock(file.fd, fcntl.LOCK_EX):
                return True
        except BaseException:
            file.mutex.release()
            raise
        file.mutex.release()
        return False

    def release(self) -> None:
        """Let go."""
        fcntl.lockf(self._file.fd, fcntl.LOCK_UN)
        self._file.mutex.release()

    def close(self) -> None:
        """Let go of the file; the lock is not used any more."""
        _close(self._file)

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

    Call the methods under the `opening` lock only.
    """

    def __init__(self, path: Path) -> None:
        self._file = _open(path)

    def is_first(self) -> bool:
        """Take the lock alone; False if anyone has the buffer open (this process included)."""
        return self._file.sharers == 0 and _try_record_lock(self._file.fd, fcntl.LOCK_EX)

    def share(self) -> None:
        """Hold it shared from now on; from alone to shared there is no gap."""
        if self._file.sharers == 0:
            fcntl.lockf(self._file.fd, fcntl.LOCK_SH)
        self._file.sharers += 1

    def is_last(self) -> bool:
        """Turn shared into alone if nobody else has the buffer open."""
        return self._file.sharers == 1 and _try_record_lock(self._file.fd, fcntl.LOCK_EX)

    def leave(self) -> None:
        """Let go of one share, or of holding it alone."""
        self._file.sharers = max(0, self._file.sharers - 1)
        if self._file.sharers == 0:
            fcntl.lockf(self._file.fd, fcntl.LOCK_UN)

    def close(self) -> None:
        """Let go of the file; the lock is not used any more."""
        _close(self._file)


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

    def close(self) -> None:
        """Nothing to let go of."""

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *exc: object) -> None:
        self.release()
