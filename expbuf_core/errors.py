"""Every error that expbuf raises: one tree under `ExpbufError`.

An error is also the builtin that callers would expect (`ValueError`, `KeyError`, …). Its
message says what, where, expected and found, and what to do; the same facts are attributes.
"""

from __future__ import annotations

import os
from typing import Any


class ExpbufError(Exception):
    """Base of all errors of expbuf."""


# ---------------------------------------------------------------- input and use


class ConfigError(ExpbufError, ValueError):
    """A setting is unknown, out of bounds, or contradicts what the buffer was created with.

    Attributes:
        key: The first such key, dotted, or None where none is to blame.
    """

    def __init__(self, message: str, *, key: str | None = None) -> None:
        super().__init__(message)
        self.key = key


class InvalidExperience(ExpbufError, ValueError):
    """An experience, or a value given for one, cannot be stored; nothing was written."""


class DimensionError(InvalidExperience):
    """An embedding has another shape than the buffer holds; nothing was written.

    Attributes:
        expected: The dimension that the buffer holds, or None where the rank is wrong.
        found: The shape that was given.
    """

    def __init__(self, message: str, *, expected: int | None = None, found: Any = None) -> None:
        super().__init__(message)
        self.expected = expected
        self.found = found


class UnknownExperienceError(ExpbufError, KeyError):
    """An id was never issued, or (in `get`) its experience has been evicted or removed.

    Attributes:
        id: The first such id.
    """

    def __init__(self, message: str, *, id: int | None = None) -> None:
        super().__init__(message)
        self.id = id

    def __str__(self) -> str:  # KeyError would show the repr of the message
        return str(self.args[0])


class NotEnoughExperiences(ExpbufError, ValueError):
    """A sample was asked of an empty buffer, or of more experiences than match."""


class SampleLimitError(ExpbufError, TimeoutError):
    """A consumer has drawn as often as the limit on samples per insert allows.

    Attributes:
        drawn: How often it has drawn.
        allowed: How often it may, with what has been added so far.
    """

    def __init__(self, message: str, *, drawn: int = 0, allowed: int = 0) -> None:
        super().__init__(message)
        self.drawn = drawn
        self.allowed = allowed


class ReceiptExpired(ExpbufError, ValueError):
    """A receipt is older than the receipts that the buffer remembers; nothing was counted."""


class BufferClosed(ExpbufError, ValueError):
    """The buffer was used after `close`."""


class BufferReplaced(ExpbufError, RuntimeError):
    """The folder under an open buffer was removed, replaced or restored; open it again."""


class ReentrantCall(ExpbufError, RuntimeError):
    """A signal handler or finalizer used the buffer in the middle of a call of the same thread."""


class ReadOnlyBuffer(ExpbufError, PermissionError):
    """A write was asked of a buffer that is open in mode 'r'."""


# ---------------------------------------------------------------- plugins


class PluginError(ExpbufError):
    """Base of what can be wrong with a plugin."""


class PluginNotFound(PluginError, LookupError):
    """No installed plugin offers the backend that was named."""


class PluginLoadError(PluginError, ImportError):
    """A plugin that the configuration selects failed to import."""


class PluginContractError(PluginError, TypeError):
    """A plugin returned or did something that its contract rules out."""


class PluginVersionError(PluginError):
    """A plugin was written for another version of its contract."""


class BackendUnavailable(PluginError, RuntimeError):
    """A backend is installed but cannot run on this machine, and there is no fallback."""


# ---------------------------------------------------------------- storage


class StorageError(ExpbufError, OSError):
    """Base of what can go wrong with the folder of a buffer."""

    def __str__(self) -> str:  # OSError with one argument prints it; keep that with attributes set
        return str(self.args[0]) if self.args else ""


class LockTimeout(StorageError, TimeoutError):
    """A lock was not free in time.

    Attributes:
        pid: The process that holds it; where that waits for another lock, the one that holds that;
            None where it cannot be told.
    """

    def __init__(self, message: str, *, pid: int | None = None) -> None:
        super().__init__(message)
        self.pid = pid


class StorageFull(StorageError):
    """The disk, the quota or the map is full; the state is as before the call."""


class FormatVersionError(StorageError):
    """A file was written by a version of expbuf that this one does not read."""


class CorruptionError(StorageError):
    """Stored bytes are not what was written. Nothing was changed; `expbuf repair` salvages.

    Attributes:
        path: The damaged file.
        offset: First byte that is known to be wrong, or None where the whole file is meant.
        lsn: The operation that these bytes held, where known.
    """

    def __init__(
        self,
        message: str,
        *,
        path: str | os.PathLike[str] | None = None,
        offset: int | None = None,
        lsn: int | None = None,
    ) -> None:
        super().__init__(message)
        self.path = os.fspath(path) if path is not None else None
        self.offset = offset
        self.lsn = lsn


_SHOWN = 80  # characters of a value in a message


def shown(value: object) -> str:
    """A value in a message: short, and whatever it is."""
    try:
        text = repr(value)
    except Exception:  # nested too deep, an integer of thousands of digits, a `__repr__` that fails
        return f"a {type(value).__name__}"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}... (a {type(value).__name__})"


def blame(exc: Exception, who: str) -> None:
    """Note whose error it is, for the traceback; from Python 3.11 on."""
    note = getattr(exc, "add_note", None)
    if note is not None:
        note(f"raised by {who}")
