"""Checking a log file that may be in use, for `expbuf verify`."""

from __future__ import annotations

from collections.abc import Iterator

from expbuf_core import frames
from expbuf_core.contracts import Problem
from expbuf_file import layout
from expbuf_file.logfile import BadFrame, LogFile


def verify_file(
    file: LogFile, end: int | None, until_lsn: int, last: bool, *, linked: bool = True
) -> Iterator[Problem]:
    """Check a file up to `end`, where its successor says it ends (None: there is none).

    `linked`: It is part of the log, not just kept for payloads that are still in use; of such a
    file nobody says any more where it ends. If it was given up, because somebody died while writing
    to it, that stands behind its last frame. (Payloads in use are checked by themselves.)
    """
    path = str(file.path)
    begin = file.begin()
    at = layout.HEADER_BYTES
    if begin is None:
        if file.header.flags & layout.BORN_IN_USE or file.proof(at, file.size()):
            yield Problem(path, at, f"{file.path.name}: the first frame is damaged", True)
        elif file.size() < file.header.size:
            yield Problem(path, file.size(), f"{file.path.name}: the file was cut", True)
        return
    size = file.size()
    limit = size if end is None else end
    if size < limit:
        yield Problem(path, size, f"{file.path.name}: the file was cut at {size} of {limit}", True)
        limit = size
    cut = linked and end is None and size < file.header.size  # as when it was closed cleanly
    lsn = begin.lsn - 1
    sealed = False
    for found in file.frames(at, limit, rows=True):
        if isinstance(found, BadFrame):
            if not linked and next(file.headers(found.offset + 8, limit), None) is None:
                return
            # What is durable was written before: so read again behind the proof, not before it.
            proof = file.proof(found.offset + 8, limit)
            file.forget()
            again = next(file.frames(found.offset, limit, rows=True))
            if lsn >= until_lsn and not isinstance(again, BadFrame):
                return  # it was being written when it was read
            torn = last and not cut and lsn >= until_lsn and proof <= lsn
            if not torn:
                yield Problem(path, found.at, str(file.corrupt(found, lsn + 1)), True)
            elif file.last_nonzero(found.offset, limit) > found.offset and not until_lsn:
                yield Problem(path, found.at, f"{file.path.name}: a torn tail", False)
            return
        if found.header.kind == frames.LOG_END:
            sealed = True
            break
        lsn = found.header.lsn
    if cut and not sealed:
        yield Problem(path, size, f"{file.path.name}: the file was cut at {size}", True)
