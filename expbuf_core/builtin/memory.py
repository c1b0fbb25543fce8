"""Storage in this process alone: for trials, tests and caches that may be lost."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel

from expbuf_core import frames
from expbuf_core.contracts import (
    Appended,
    Buffer,
    LogFollower,
    LoggedOperation,
    LogGone,
    PersistenceAdapter,
    PersistenceContext,
    Pin,
    Problem,
    Stamped,
)


class MemoryPersistence(PersistenceAdapter):
    """Keeps operations in a list and payloads by location; nothing survives the process."""

    def __init__(self, settings: BaseModel, context: PersistenceContext) -> None:
        self._operations: list[LoggedOperation] = []
        self._dropped = 0  # LSN up to which operations were dropped
        self._rows: dict[int, bytes] = {}
        self._end = 0  # location of the next row, as if they stood one behind the other
        self._mutex = threading.Lock()

    def create(self, lsn: int) -> None:
        self._operations.clear()

    def recover(self, after_lsn: int, durable_lsn: int) -> Iterator[LoggedOperation]:
        return iter([op for op in self._operations if op.lsn > after_lsn])

    def torn(self) -> tuple[int, int]:
        return 0, 0

    def start(self, lsn: int, recovered_lsn: int) -> None:
        pass

    def attach(self) -> None:
        pass

    def append(self, stamped: Sequence[Stamped], durable_lsn: int) -> list[Appended]:
        places = []
        with self._mutex:
            for item in stamped:
                operation = item.operation
                view = memoryview(operation.rows)
                at, location = 0, self._end
                for length in operation.lengths.tolist():
                    self._rows[location + at] = bytes(view[at : at + length])
                    at += length
                self._end += at
                body = bytes(operation.body)
                lengths = operation.lengths
                self._operations.append(
                    LoggedOperation(
                        item.lsn, operation.kind, item.first_id, body, location, lengths
                    )
                )
                places.append(Appended(location, item.lsn))
        return places

    def sync(self) -> None:
        pass

    def retire(self, durable_lsn: int, keep_lsn: int, next_lsn: int) -> None:
        pass

    def follow(self, after_lsn: int) -> LogFollower:
        return _Follower(self, after_lsn)

    def read(self, after_lsn: int, until_lsn: int) -> list[LoggedOperation]:
        """Operations in (after_lsn, until_lsn]."""
        with self._mutex:
            if after_lsn < self._dropped and after_lsn < until_lsn:
                raise LogGone
            return [op for op in self._operations if after_lsn < op.lsn <= until_lsn]

    def pin(
        self, ids: NDArray[np.int64], locations: NDArray[np.int64], lengths: NDArray[np.uint32]
    ) -> Pin:
        try:
            return _Pin([self._rows[location] for location in locations.tolist()])
        except KeyError:
            raise LogGone from None

    def switch(self, next_lsn: int, durable_lsn: int) -> None:
        pass

    def drop_below(
        self, lsn: int, live_ids: NDArray[np.int64], live_locations: NDArray[np.int64]
    ) -> None:
        keep = set(live_locations.tolist())
        with self._mutex:
            self._operations = [op for op in self._operations if op.lsn > lsn]
            newer = (op.location for op in self._operations if len(op.lengths))
            first_newer = min(newer, default=self._end)
            for location in [location for location in self._rows if location not in keep]:
                if location < first_newer:
                    del self._rows[location]
            self._dropped = max(self._dropped, lsn)

    def verify(self, until_lsn: int) -> Iterator[Problem]:
        for location, row in list(self._rows.items()):
            if frames.check_row(row) is None:
                yield Problem("memory", location, "a payload is damaged", True)

    def stats(self) -> dict[str, Any]:
        return {
            "operations": len(self._operations),
            "bytes": sum(map(len, self._rows.values())),
        }

    def finish(self, last_lsn: int) -> None:
        pass

    def close(self) -> None:
        self._operations.clear()
        self._rows.clear()

    def after_fork(self) -> None:
        self._mutex = threading.Lock()


class _Follower(LogFollower):
    def __init__(self, adapter: MemoryPersistence, after_lsn: int) -> None:
        self._adapter = adapter
        self._lsn = after_lsn

    def read(self, until_lsn: int) -> Iterator[LoggedOperation]:
        for operation in self._adapter.read(self._lsn, until_lsn):
            self._lsn = operation.lsn
            yield operation

    def skip(self, lsn: int, cursor: Any) -> None:
        self._lsn = lsn


class _Pin(Pin):
    def __init__(self, rows: list[bytes]) -> None:
        self._rows = rows

    def read(self, i: int) -> Buffer:
        return self._rows[i]

    def read_many(self, which: NDArray[np.int64]) -> list[Buffer]:
        rows = self._rows
        return [rows[i] for i in which.tolist()]
