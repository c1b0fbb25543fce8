"""`expbuf backup` and `expbuf restore`: a consistent copy of a buffer that others go on using.

A backup is a buffer of its own: a folder that opens anywhere, stored by the same backend or
another. It holds what the buffer held at one LSN. Nobody waits for it, and no lock of the source is
held; see `frozen`. All else is a transfer: written aside, synced, read back, compared, and only
then a buffer.

Where a copy is gone on with, ids that the original gave after the copy was made must not come
again: they may be out in receipts and notes. So a copy's next id lies far ahead of the original's.
"""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from expbuf_core import folder
from expbuf_core.buffer import ExperienceBuffer
from expbuf_core.config_schema import load_config
from expbuf_core.contracts import LogGone
from expbuf_core.errors import ConfigError, StorageError
from expbuf_core.filesystem import FileSystem
from expbuf_core.frozen import freeze_with_vectors
from expbuf_core.plugins import default_registry
from expbuf_core.transfer import (
    Content,
    Progress,
    Storage,
    TransferReport,
    check_apart,
    check_target,
    copy,
    resolved,
)

_TRIES = 5
_LEAST_GAP = 1 << 20
_SINCE = 1_577_836_800  # 2020-01-01, UTC
_A_SECOND = 1 << 16


def backup(
    source: str | os.PathLike[str] | ExperienceBuffer,
    target: str | os.PathLike[str],
    *,
    persistence: str | None = None,
    config: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    filesystem: FileSystem | None = None,
) -> TransferReport:
    """Copy a buffer into a new folder while others use it.

    The copy holds what was published when it began, and nothing later; it is durable, and was read
    back and compared, when this returns. It keeps UUID, ids, priorities, rewards, counts, tags,
    receipts and settings; its next ids lie beyond all that the source can give meanwhile. Readers
    and writers of the source notice nothing; no permission to write it is needed.

    May be interrupted at any instant and called again; it goes on if the source is still at the
    same LSN, and begins anew otherwise. An unfinished backup does not open.

    Args:
        source: Folder of the buffer, or an open buffer (one in memory, too).
        target: A folder that does not exist, is empty, or holds an unfinished backup of the same.
        persistence: Name of the storage backend of the copy; default: the source's.
        config: A YAML file or a mapping whose section `persistence` has that backend's settings.
        progress: Called now and then with (done, total); each experience counts twice.
        filesystem: Does all writing to the target; for tests that record or fail it.

    Raises:
        StorageError: The target holds something else, or cannot be written; or so much is removed
            from the source that it cannot be read fast enough.
        CorruptionError: The source is damaged; `expbuf repair` salvages.
        PluginError: The backend cannot be used.
    """
    return _run("backup", source, target, persistence, config, progress, filesystem)


def restore(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    persistence: str | None = None,
    config: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    filesystem: FileSystem | None = None,
) -> TransferReport:
    """Make a buffer of a backup, in a new folder. The backup stays as it is.

    Like `backup` in the other direction: the ids of what is restored go on behind all that the lost
    buffer, or an earlier restoration of the same backup, can have given.

    Args:
        source: Folder of the backup; may be read-only.
        target: A folder that does not exist, is empty, or holds an unfinished restoration of it. An
            existing buffer is never overwritten.
        persistence: As for `backup`.
        config: As for `backup`.
        progress: As for `backup`.
        filesystem: As for `backup`.

    Raises:
        StorageError: The source is no finished backup; the rest as for `backup`.
        CorruptionError: The backup is damaged.
        PluginError: The backend cannot be used.
    """
    folder.check_finished(resolved(source))
    return _run("restore", source, target, persistence, config, progress, filesystem)


def _run(
    command: str,
    source: str | os.PathLike[str] | ExperienceBuffer,
    target: str | os.PathLike[str],
    persistence: str | None,
    config: str | os.PathLike[str] | Mapping[str, Any] | None,
    progress: Progress | None,
    filesystem: FileSystem | None,
) -> TransferReport:
    """Both of them: they differ in what they are called."""
    path = source.path if isinstance(source, ExperienceBuffer) else resolved(source)
    goal = resolved(target)
    if path is not None:
        check_apart(path, goal)
    storage = _storage(path, persistence, config)
    check_target(goal)
    words = ["expbuf", command, str(path), str(goal)]
    if persistence is not None:
        words += ["--persistence", persistence]
    if isinstance(config, str | os.PathLike):
        words += ["--config", os.path.abspath(config)]
    called = shlex.join(words) if path is not None else ""
    fs = filesystem or FileSystem()
    if isinstance(source, ExperienceBuffer):
        return _copied(source, goal, storage, progress, fs, called)
    assert path is not None
    # Not what the environment says: that is for the programs that use the buffer.
    own = load_config({"index": {"backend": "exact", "builder": "off"}}, env={})
    with ExperienceBuffer.open(path, config=own, mode="r") as buffer:
        return _copied(buffer, goal, storage, progress, fs, called)


def _storage(
    path: Path | None, persistence: str | None, config: Any, default: str = "file"
) -> Storage:
    """The backend of the copy."""
    registry = default_registry()
    if persistence is None:
        identity = None if path is None else folder.read_identity(path)
        if path is not None and identity is None:
            folder.check_finished(path)
            raise folder.no_buffer(path)
        persistence = identity.backend if identity is not None else default
    if config is not None and not isinstance(config, str | os.PathLike | Mapping):
        raise ConfigError(f"config: expected a file or a mapping, found {config!r}")
    return Storage.choose(registry, persistence, load_config(config, env={}, registry=registry))


def _copied(
    buffer: ExperienceBuffer,
    goal: Path,
    storage: Storage,
    progress: Progress | None,
    fs: FileSystem,
    called: str,
) -> TransferReport:
    """One consistent copy; where the source outruns it, of a newer state."""
    for _ in range(_TRIES):
        frozen, vectors = freeze_with_vectors(buffer)
        now = time.time()
        content = Content(
            frozen.uuid,
            frozen.state,
            beyond(frozen.next_id, now),
            frozen.next_lsn + _LEAST_GAP,
            frozen,
            vectors,
            vectors.check,
        )
        try:
            return copy(content, goal, storage, progress=progress, fs=fs, command=called)
        except LogGone:
            continue  # what was removed is gone from the disk, too: only a newer state is whole
    raise StorageError(
        f"{buffer.path}: experiences are removed and dropped faster than they can be copied; pause "
        "`remove` and `save_snapshot`, or copy to a faster disk"
    )


def beyond(number: int, now: float) -> int:
    """An id that no copy made before, and no original, has reached by counting up from `number`.

    Rises with time, by more a second than a buffer can take adds; so two copies made of one backup
    at different times do not meet, either.

    Args:
        number: The next id.
        now: UTC seconds.
    """
    return max(number + _LEAST_GAP, int((now - _SINCE) * _A_SECOND))
