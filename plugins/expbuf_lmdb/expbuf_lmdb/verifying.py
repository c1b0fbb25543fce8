"""Checking everything that is stored, while it may be in use."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from lmdb.verify import VerifyError
from lmdb.verify import verify as verify_pages

from expbuf_core import frames
from expbuf_core.contracts import Problem
from expbuf_core.errors import CorruptionError, StorageError
from expbuf_lmdb.environment import Tables, Txn
from expbuf_lmdb.layout import STAGE_HEADER_BYTES, key
from expbuf_lmdb.trees import check_file, check_trees

if TYPE_CHECKING:
    from expbuf_lmdb.adapter import LMDBPersistenceAdapter

_AT_ONCE = 512
_BYTES_AT_ONCE = 8 << 20
_TRIES = 3


def verify(adapter: LMDBPersistenceAdapter, until_lsn: int) -> Iterator[Problem]:
    """See `PersistenceAdapter.verify`."""
    path = str(adapter.path)
    try:
        check_file(adapter.path)
        wrong = _pages(adapter)
    except StorageError as exc:
        yield Problem(path, getattr(exc, "offset", None) or 0, str(exc), True)
        return
    for message in wrong:
        yield Problem(path, -1, f"{adapter.path.name}: {message}", True)
    if wrong:
        return  # LMDB had better not be sent through these trees
    try:
        _operations(adapter)
        yield from _rows(adapter)
    except CorruptionError as exc:
        yield Problem(exc.path or path, -1, str(exc), True)
    yield from _stage(adapter, until_lsn)


def _pages(adapter: LMDBPersistenceAdapter) -> list[str]:
    """What is wrong with LMDB's own structure, which has no checksums."""
    wrong: list[str] = []
    for _ in range(_TRIES):
        before = adapter.last_transaction()
        try:
            wrong = list(verify_pages(str(adapter.path), subdir=False))  # type: ignore[no-untyped-call]
        except VerifyError as exc:
            wrong = [str(exc)]
        if not wrong:
            # It does not ask whether nodes overlap, and whether keys are ours.
            adapter.read(lambda *_: check_trees(adapter.path))
        if not wrong or adapter.last_transaction() == before:
            return wrong
    return []  # others write all the time: two of its pages may be of different states


def _operations(adapter: LMDBPersistenceAdapter) -> None:
    lsn, last = adapter.read(_bounds, adapter)
    while lsn < last:
        try:
            found = adapter.read(_some_operations, adapter, lsn)
        except CorruptionError:
            floor, _ = adapter.read(_bounds, adapter)
            if floor > lsn:  # dropped meanwhile
                lsn = floor
                continue
            raise
        if found is None:
            return
        lsn = found


def _bounds(txn: Txn, tables: Tables, adapter: LMDBPersistenceAdapter) -> tuple[int, int]:
    state = adapter.store.state(txn, tables)
    return state.floor, adapter.store.last_lsn(txn, tables)


def _some_operations(
    txn: Txn, tables: Tables, adapter: LMDBPersistenceAdapter, after_lsn: int
) -> int | None:
    """Check some operations; the last LSN, or None if there was none."""
    store, last = adapter.store, None
    for checked in store.operations(txn, tables, after_lsn, 1 << 63, _AT_ONCE, _BYTES_AT_ONCE):
        store.check_rows(txn, tables, checked)
        last = checked.header.lsn
    return last


def _rows(adapter: LMDBPersistenceAdapter) -> Iterator[Problem]:
    """Rows whose operations were dropped have only themselves to go by."""
    at: int | None = 0
    while at is not None:
        at, bad = adapter.read(_some_rows, adapter, at)
        for place in bad:
            yield Problem(
                str(adapter.path), -1, f"{adapter.path.name}: row {place} is damaged", True
            )


def _some_rows(
    txn: Txn, tables: Tables, adapter: LMDBPersistenceAdapter, first: int
) -> tuple[int | None, list[int]]:
    bad: list[int] = []
    size = 0
    with txn.cursor(db=tables.rows) as cursor:
        found = cursor.set_range(key(first))
        while found:
            place, row = adapter.store.number_of(cursor.key()), cursor.value()
            if size > _BYTES_AT_ONCE:
                return place, bad
            if frames.check_row(row) is None:
                bad.append(place)
            size += len(row)
            found = cursor.next()
    return None, bad


def _stage(adapter: LMDBPersistenceAdapter, until_lsn: int) -> Iterator[Problem]:
    """What LMDB does not have must be whole in the stage."""
    stage = adapter.stage
    for _ in range(_TRIES):
        header = stage.header()
        _, stored = adapter.read(_bounds, adapter)
        last = stored
        if header is not None:
            for frame in stage.frames(
                STAGE_HEADER_BYTES, stage.size(), header.salt, header.generation, header.base
            ):
                if frame.header.lsn > last:
                    if adapter.checked_frame(frame, rows=True) is None:
                        break
                    last = frame.header.lsn
        if last >= until_lsn:
            if header is None or header.uuid != adapter.uuid:
                yield Problem(str(stage.path), 0, f"{stage.path.name}: the header is damaged", True)
            elif header.last_lsn > stored:
                message = (
                    f"{adapter.path.name}: operation {header.last_lsn} was stored and is missing"
                )
                yield Problem(str(adapter.path), -1, message, True)
            return
    yield Problem(
        str(stage.path), -1, f"{stage.path.name}: operation {last + 1} is missing or damaged", True
    )
