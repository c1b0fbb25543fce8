"""`expbuf verify`: every stored byte is what was written, and all parts agree. Changes nothing."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from expbuf_core import checksums, frames, segments, snapshots
from expbuf_core.buffer import ExperienceBuffer
from expbuf_core.contracts import LogGone, Pin, Problem
from expbuf_core.errors import CorruptionError, ExpbufError
from expbuf_core.inspection import columns_of
from expbuf_core.session import Session

Progress = Callable[[int, int], None]
_PART = 1024  # experiences
_TRIES = 5


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
        offset = -1 if exc.offset is None else exc.offset
        message = str(exc).removesuffix(". Run `expbuf verify`")
        yield Problem(exc.path or str(path), offset, message, True)
        rest = "reading stops there, so there may be more; `expbuf repair` goes over it"
        yield Problem(str(path), -1, rest, False)
        return
    with buffer:
        session = buffer._live()
        for lsn in snapshots.available(path):
            try:
                snapshots.read(path, lsn, session.uuid)
            except CorruptionError as exc:
                offset = -1 if exc.offset is None else exc.offset
                yield Problem(exc.path or "", offset, str(exc), True)
            except ExpbufError:
                continue  # dropped meanwhile
        yield from session.adapter.verify(session.replica.state.lsn)
        yield from _payloads(buffer, progress)
        yield from _index(segments.home(path, session.replica.state.representation))


def _payloads(buffer: ExperienceBuffer, progress: Progress | None) -> Iterator[Problem]:
    """Every live experience has its payload, under its id."""
    session = buffer._live()
    with session.replica.lock:
        state = session.replica.state
        live = state.id[state.live_slots()]
    for start in range(0, len(live), _PART):
        if progress is not None:
            progress(min(start + _PART, len(live)), len(live))
        ids, locations, pin = _held(session, live[start : start + _PART])
        if pin is None:
            if len(ids):
                message = f"payloads of {len(ids)} experiences from id {ids[0]} are missing"
                yield Problem(str(session.path), -1, message, True)
            continue
        for i, id_ in enumerate(ids.tolist()):
            try:
                checked = frames.check_row(pin.read(i))
            except CorruptionError as exc:
                yield Problem(exc.path or "", exc.offset or -1, str(exc), True)
                continue
            if checked is None or checked[0] != id_:
                message = f"the payload of experience {id_} is damaged"
                yield Problem(str(session.path), int(locations[i]) & ((1 << 40) - 1), message, True)


def _held(
    session: Session, ids: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64], Pin | None]:
    """Which of these are live now, where their payloads are, and a hold on them; None: gone.

    A file that is missing is no damage where its payloads were evicted or moved meanwhile.
    """
    for attempt in range(_TRIES):
        with session.replica.lock:
            state = session.replica.state
            slots = state.find(ids)
            here = slots >= 0
            found, slots = ids[here], slots[here]
            locations, lengths = state.location[slots], state.length[slots]
        try:
            return found, locations, session.adapter.pin(found, locations, lengths)
        except LogGone:
            session.catch_up_after_deletion(attempt)
    return found, locations, None


def _index(home: Path) -> Iterator[Problem]:
    """The index is derived: damage to it is a note."""
    try:
        manifest = segments.read_manifest(home)
    except CorruptionError as exc:
        yield Problem(exc.path or "", 0, str(exc), False)
        return
    for info in manifest.segments if manifest else ():
        wanted = (
            (segments.vectors_path(home, info.name), info.vectors_bytes, info.vectors_crc),
            (segments.index_path(home, info.name, info.backend), info.index_bytes, info.index_crc),
        )
        for file, size, crc in wanted:
            try:
                if checksums.file_crc(file) != (size, crc):
                    message = f"{file.name}: damaged; the index will be built again"
                    yield Problem(str(file), -1, message, False)
            except ExpbufError:
                if segments.read_manifest_or_none(home) == manifest:
                    message = f"{file.name}: missing; the index will be built again"
                    yield Problem(str(file), -1, message, False)
