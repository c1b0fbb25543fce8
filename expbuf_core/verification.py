"""`expbuf verify`: every stored byte is what was written, and all parts agree. Changes nothing."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from expbuf_core import checksums, segments, snapshots
from expbuf_core.buffer import ExperienceBuffer
from expbuf_core.contracts import Problem
from expbuf_core.errors import CorruptionError, StorageError
from expbuf_core.filesystem import is_missing
from expbuf_core.finding import pinned
from expbuf_core.inspection import columns_of

Progress = Callable[[int, int], None]
_PART = 1024  # experiences
_ADVICE = re.compile(r"[.;] [Rr]un `expbuf verify`$")


def verify(
    folder: str | os.PathLike[str], *, progress: Progress | None = None
) -> Iterator[Problem]:
    """Check a buffer's folder; it may be in use.

    Args:
        folder: Of the buffer.
        progress: Called now and then with (done, total) experiences, behind the log.

    Yields:
        What was found: damage, and notes (`damage` false) about what is harmless.
    """
    path = Path(folder)
    try:
        buffer = columns_of(path)
    except CorruptionError as exc:
        yield _damage(exc, str(path))
        rest = "reading stops there, so there may be more; `expbuf repair` goes over it"
        yield Problem(str(path), -1, rest, False)
        return
    with buffer:
        session = buffer._live()
        yield from _snapshots(path, session.uuid)
        yield from session.adapter.verify(session.replica.state.lsn)
        yield from _payloads(buffer, progress)
        yield from _index(segments.home(path, session.replica.state.representation))


def _snapshots(path: Path, uuid: bytes) -> Iterator[Problem]:
    try:
        lsns = snapshots.available(path)
    except CorruptionError as exc:
        yield _damage(exc, str(path))
        return
    for lsn in lsns:
        try:
            snapshots.read(path, lsn, uuid)
        except CorruptionError as exc:
            yield _damage(exc, str(path))
        except StorageError as exc:
            if not is_missing(exc):  # else dropped meanwhile
                yield Problem(str(snapshots.path_of(path, lsn)), -1, str(exc), True)


def _payloads(buffer: ExperienceBuffer, progress: Progress | None) -> Iterator[Problem]:
    """Every live experience has its payload, under its id, with embeddings as the buffer has them.

    A file that is missing is no damage where its payloads were evicted or moved meanwhile.
    """
    where, live = str(buffer.path), buffer.ids()
    for start in range(0, len(live), _PART):
        if progress is not None:
            progress(min(start + _PART, len(live)), len(live))
        try:
            held = pinned(buffer._live(), live[start : start + _PART], missing="skip")
        except CorruptionError as exc:
            yield _damage(exc, where)
            continue
        for i in range(len(held)):
            try:
                held.check(i)
            except CorruptionError as exc:
                yield _damage(exc, where)


def _damage(exc: CorruptionError, where: str) -> Problem:
    """`where`: what is damaged, if the error does not say."""
    offset = -1 if exc.offset is None else exc.offset
    return Problem(exc.path or where, offset, _ADVICE.sub("", str(exc)), True)


def _index(home: Path) -> Iterator[Problem]:
    """The index is derived: damage to it is a note."""
    try:
        manifest = segments.read_manifest(home)
    except StorageError as exc:
        yield Problem(str(home / segments.MANIFEST), 0, str(exc), False)
        return
    for info in manifest.segments if manifest else ():
        wanted = (
            (segments.vectors_path(home, info.name), info.vectors_bytes, info.vectors_crc),
            (segments.index_path(home, info.name, info.backend), info.index_bytes, info.index_crc),
        )
        for file, size, crc in wanted:
            try:
                if checksums.file_crc(file, size) != (size, crc):
                    message = f"{file.name}: damaged; the index will be built again"
                    yield Problem(str(file), -1, message, False)
            except StorageError as exc:
                if not is_missing(exc):
                    message = f"{_ADVICE.sub('', str(exc))}; the index will be built again"
                    yield Problem(str(file), -1, message, False)
                elif segments.read_manifest_or_none(home) == manifest:
                    message = f"{file.name}: missing; the index will be built again"
                    yield Problem(str(file), -1, message, False)
