"""Following operations, and holding on to payloads."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from expbuf_core.contracts import Buffer, LogFollower, LoggedOperation, LogGone, Pin
from expbuf_core.errors import CorruptionError
from expbuf_lmdb import layout
from expbuf_lmdb.environment import Tables, Txn
from expbuf_lmdb.layout import END, GENERATION, STAGE_HEADER_BYTES

if TYPE_CHECKING:
    from expbuf_lmdb.adapter import LMDBPersistenceAdapter

_AT_ONCE = 512
_BYTES_AT_ONCE = 8 << 20
_PATIENCE_S = 5.0


class LMDBFollower(LogFollower):
    """Reads what LMDB has, and behind that what is in the stage.

    What leaves the stage has arrived in LMDB before: so when it is in neither, look again.
    """

    def __init__(self, adapter: LMDBPersistenceAdapter, after_lsn: int) -> None:
        self._adapter = adapter
        self._lsn = after_lsn
        self._at = (0, STAGE_HEADER_BYTES)  # generation and offset behind the last one read

    def read(self, until_lsn: int) -> Iterator[LoggedOperation]:
        words = self._adapter.words
        give_up_at = 0.0
        while self._lsn < until_lsn:
            generation, before = words[GENERATION], self._lsn
            yield from self._staged(generation, until_lsn)
            if self._lsn >= until_lsn:
                return
            found, following = self._adapter.read(self._stored, until_lsn)
            for operation in found:
                self._lsn = operation.lsn
                yield operation
            if self._lsn >= until_lsn or (following is not None and following > until_lsn):
                return
            if self._lsn > before:
                give_up_at = 0.0
                continue
            if self._next_staged > until_lsn:
                return  # numbers were left out; what comes next is not wanted yet
            if generation and generation == words[GENERATION]:
                raise self._missing()
            # The stage is being begun anew, or was while we looked.
            give_up_at = give_up_at or time.monotonic() + _PATIENCE_S
            if time.monotonic() > give_up_at:
                raise self._missing()
            time.sleep(0.0002)

    _next_staged = 0  # LSN of the first frame behind us in the stage, if that was not taken

    def _missing(self) -> CorruptionError:
        return layout.corrupt(
            self._adapter.path,
            f"operation {self._lsn + 1} was published and cannot be found",
            lsn=self._lsn + 1,
        )

    def _stored(
        self, txn: Txn, tables: Tables, until_lsn: int
    ) -> tuple[list[LoggedOperation], int | None]:
        """Operations that LMDB has, and the LSN of what it has behind them."""
        store = self._adapter.store
        if not store.reaches_back(txn, tables, self._lsn):
            raise LogGone
        found = [
            checked.operation
            for checked in store.operations(
                txn, tables, self._lsn, until_lsn, _AT_ONCE, _BYTES_AT_ONCE
            )
        ]
        last = found[-1].lsn if found else self._lsn
        return found, store.next_lsn(txn, tables, last)

    def _staged(self, generation: int, until_lsn: int) -> Iterator[LoggedOperation]:
        """Operations in the stage, from where we are in it."""
        adapter = self._adapter
        self._next_staged = 0
        if not generation:
            return
        if self._at[0] != generation:
            self._at = (generation, STAGE_HEADER_BYTES)
        end = adapter.words[END]
        for frame in adapter.staged(generation, self._at[1], end):
            lsn = frame.header.lsn
            if lsn > self._lsn:
                # What lies between may be in LMDB.
                next_one = lsn == self._lsn + 1 or adapter.read(
                    adapter.store.follows, lsn, self._lsn
                )
                if lsn > until_lsn or not next_one:
                    self._next_staged = lsn
                    return
                checked = adapter.checked_frame(frame)
                if checked is None:
                    return
                self._at = (generation, frame.offset + frame.header.data_bytes)
                self._lsn = lsn
                yield checked.operation
            else:
                self._at = (generation, frame.offset + frame.header.data_bytes)

    def skip(self, lsn: int, cursor: Any) -> None:
        self._lsn = lsn
        self._at = cursor


class LMDBPin(Pin):
    """Copies: a page of LMDB may be reused as soon as no transaction reads it."""

    def __init__(self, rows: list[bytes], lengths: list[int], path: Any) -> None:
        self._rows = rows
        self._lengths = lengths
        self._path = path

    def read(self, i: int) -> Buffer:
        row = self._rows[i]
        if len(row) != self._lengths[i]:
            raise layout.corrupt(
                self._path, f"a payload of {len(row)} bytes, {self._lengths[i]} were written"
            )
        return row

    def read_many(self, which: NDArray[np.int64]) -> list[Buffer]:
        rows, lengths = self._rows, self._lengths
        found: list[Buffer] = [rows[i] for i in which.tolist()]
        if [len(row) for row in found] != [lengths[i] for i in which.tolist()]:
            return super().read_many(which)  # which names the one that is wrong
        return found
