"""Operations that are alike, taken together as they are read: a few arrays, not many objects."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from expbuf_core.codec import LoggedAdds
from expbuf_core.contracts import Buffer, LoggedOperation, LoggedRun
from expbuf_core.native import native

LEAST_RUN = 16
_LAST_LSN = (1 << 64) - 1  # that there can be
_NO_LENGTHS = np.empty(0, np.uint32)


def run_of(
    window: memoryview,
    at: int,
    end: int,
    stands_at: int,
    limit: int,
    *,
    epoch: int,
    salt_crc: int,
    data_log: bool,
    rows: bool,
    lsn: int | None,
    until_lsn: int,
    location: int,
) -> tuple[LoggedRun, int] | None:
    """Operations that are alike and follow each other, by native code.

    Args:
        window: Bytes of the log.
        at: Where in them the first frame begins.
        end: And where what was read ends.
        stands_at: Offset in the log of their beginning.
        limit: Offset in the log of its end.
        epoch: Of the frames.
        salt_crc: CRC-32 of the file's salt.
        data_log: Whether it is one, with rows,
        rows: and whether these are to be checked.
        lsn: Of the first; None: any.
        until_lsn: Of the last.
        location: What their offsets are counted from.

    Returns:
        The run, and where behind it the next frame begins in the window; None where there are few
        (of adds one is enough), or no native code is.
    """
    if native is None or (lsn is not None and lsn > _LAST_LSN):
        return None
    found = native.run(
        window,
        at,
        end,
        stands_at,
        limit,
        epoch,
        salt_crc,
        data_log,
        rows,
        lsn,
        min(until_lsn, _LAST_LSN),
        LEAST_RUN,
    )
    if found is None:
        return None
    first_lsn, kind, with_row, bodies, numbers, n, after, counts = found
    ids, places = np.frombuffer(numbers, np.int64, 2 * n).reshape(2, n)
    places |= location
    sizes = np.frombuffer(numbers, np.uint32, n, 16 * n)
    if counts is not None:
        body = np.frombuffer(bodies, np.uint8)[np.newaxis]
        of_each = np.frombuffer(counts, np.uint32)
        return LoggedAdds(first_lsn, kind, body, ids, places, sizes, of_each), after
    run = LoggedRun(
        first_lsn,
        kind,
        np.frombuffer(bodies, np.uint8).reshape(n, -1) if bodies else np.empty((n, 0), np.uint8),
        ids,
        places,
        sizes if with_row else None,
    )
    return run, after


class Alike:
    """Frames with successive LSNs, as they are read, to be taken together.

    Whoever reads fills the lists, which takes less than to make an object of each.

    Attributes:
        shapes: Number of the first of those of a kind, body length and number of rows; these.
        bodies: Of each; may be views of what is overwritten after `taken_together`.
        ids: First id of each.
        places: Where each one's rows are, behind `location`.
        sizes: Bytes of each one's rows.
        tables: Lengths of the rows, of those that have several.
    """

    def __init__(self, location: int = 0) -> None:
        self._location = location
        self.shapes: list[tuple[int, tuple[int, int, int]]] = []
        self.bodies: list[Buffer] = []
        self.ids: list[int] = []
        self.places: list[int] = []
        self.sizes: list[int] = []
        self.tables: dict[int, NDArray[np.uint32]] = {}

    def __len__(self) -> int:
        return len(self.places)

    def taken_together(self, first_lsn: int) -> list[LoggedOperation | LoggedRun]:
        """As operations, or as runs where many are alike; a copy."""
        items: list[LoggedOperation | LoggedRun] = []
        starts = [start for start, _ in self.shapes] + [len(self)]
        for i, (_, (kind, size, n)) in enumerate(self.shapes):
            start, end = starts[i : i + 2]
            if n <= 1 and end - start >= LEAST_RUN:
                items.append(self._run(first_lsn + start, kind, size, n, slice(start, end)))
            else:
                for number in range(start, end):
                    items.append(self._operation(first_lsn + number, kind, n, number))
        return items

    def _operation(self, lsn: int, kind: int, n: int, i: int) -> LoggedOperation:
        lengths = _NO_LENGTHS
        if n:
            lengths = self.tables[i] if n > 1 else np.array([self.sizes[i]], np.uint32)
        location = self._location | self.places[i]
        return LoggedOperation(lsn, kind, self.ids[i], bytes(self.bodies[i]), location, lengths)

    def _run(self, first_lsn: int, kind: int, size: int, n: int, which: slice) -> LoggedRun:
        joined = bytearray().join(self.bodies[which])
        return LoggedRun(
            first_lsn,
            kind,
            np.frombuffer(joined, np.uint8).reshape(-1, size) if size else _empty(which),
            np.array(self.ids[which], np.int64),
            np.array(self.places[which], np.int64) | self._location,
            np.array(self.sizes[which], np.uint32) if n else None,
        )


def _empty(which: slice) -> NDArray[np.uint8]:
    return np.empty((which.stop - which.start, 0), np.uint8)
