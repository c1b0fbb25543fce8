"""Reading everything behind a snapshot, and telling a torn tail from damage."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from expbuf_core.contracts import LoggedOperation, LoggedRun, last_of
from expbuf_lmdb import layout
from expbuf_lmdb.environment import Tables, Txn
from expbuf_lmdb.layout import STAGE_HEADER_BYTES, StageHeader, State
from expbuf_lmdb.trees import check_trees

if TYPE_CHECKING:
    from expbuf_lmdb.adapter import LMDBPersistenceAdapter

_AT_ONCE = 4096
_BYTES_AT_ONCE = 4 << 20


@dataclass
class Recovered:
    """Where a recovery stopped.

    Attributes:
        last_lsn: Of the last operation.
        stored_lsn: Of the last one that LMDB has.
        address: Behind the last one.
        stage: Its header, if it counts.
        end: Where its intact frames end.
        generation: Every stage so far is this old at most.
        torn_bytes: Of a frame that is there in part.
    """

    last_lsn: int
    stored_lsn: int = 0
    address: int = 0
    stage: StageHeader | None = None
    end: int = STAGE_HEADER_BYTES
    generation: int = 0
    torn_bytes: int = 0


def recover(
    adapter: LMDBPersistenceAdapter, recovered: Recovered, after_lsn: int, durable_lsn: int
) -> Iterator[LoggedOperation | LoggedRun]:
    """See `PersistenceAdapter.recover_alike`; fills in `recovered`."""
    adapter.last_transaction()  # opens the file, and says what is wrong with it as a whole
    check_trees(adapter.path)
    state, stored, address = adapter.read(_situation, adapter)
    if not adapter.read(adapter.store.reaches_back, after_lsn):
        raise layout.corrupt(
            adapter.path,
            f"operations up to {state.floor} were dropped, but those from {after_lsn + 1} on are "
            "needed: a snapshot is missing",
            lsn=after_lsn + 1,
        )
    # An operation may be in the snapshot and nowhere else: then LMDB lost it.
    if stored < after_lsn:
        durable_lsn = max(durable_lsn, after_lsn)
    recovered.stored_lsn, recovered.address = stored, address
    recovered.generation = state.generation
    last = max(after_lsn, state.floor)
    while last < stored:
        items = adapter.read(adapter.store.together, last, stored, _AT_ONCE, _BYTES_AT_ONCE)
        if not items:
            raise layout.corrupt(adapter.path, f"operation {last + 1} is missing", lsn=last + 1)
        for item in items:
            recovered.last_lsn = last = last_of(item)
            yield item
    recovered.last_lsn = last = stored
    for operation in _staged(adapter, recovered, state):
        if operation.lsn > after_lsn:
            yield operation
    last = recovered.last_lsn
    proof = max(durable_lsn, _proof(adapter, recovered))
    if proof > last:
        raise layout.corrupt(
            adapter.path, f"operation {proof} was durable and is missing", lsn=last + 1
        )


def _situation(txn: Txn, tables: Tables, adapter: LMDBPersistenceAdapter) -> tuple[State, int, int]:
    store = adapter.store
    state = store.state(txn, tables)
    return state, store.last_lsn(txn, tables), store.end_address(txn, tables, state)


def _staged(
    adapter: LMDBPersistenceAdapter, recovered: Recovered, state: State
) -> Iterator[LoggedOperation]:
    """What the stage has behind LMDB: the frames that are whole, as far as they reach."""
    stage = adapter.stage
    header = stage.header()
    if header is None:
        return  # a power loss while it was begun anew: LMDB had everything
    if header.uuid != adapter.uuid:
        raise layout.corrupt(stage.path, "it belongs to another buffer", offset=0)
    recovered.generation = max(recovered.generation, header.generation)
    if header.generation < state.generation or header.salt != adapter.store.salt:
        return  # what it held is in LMDB, or was given up
    if header.last_lsn > recovered.stored_lsn:
        raise layout.corrupt(
            adapter.path,
            f"operation {header.last_lsn} was stored and is missing",
            lsn=recovered.stored_lsn + 1,
        )
    recovered.stage = header
    recovered.address = max(recovered.address, header.base + STAGE_HEADER_BYTES)
    size = stage.size()
    for frame in stage.frames(
        STAGE_HEADER_BYTES, size, header.salt, header.generation, header.base
    ):
        lsn = frame.header.lsn
        if lsn > recovered.last_lsn:
            checked = adapter.checked_frame(frame, rows=True)
            if checked is None:
                recovered.torn_bytes = frame.header.data_bytes
                return
            if not adapter.read(adapter.store.follows, lsn, recovered.last_lsn):
                raise layout.corrupt(
                    adapter.path,
                    f"operation {recovered.last_lsn + 1} is missing",
                    lsn=recovered.last_lsn + 1,
                )
            recovered.last_lsn = lsn
            yield checked.operation
        recovered.end = frame.offset + frame.header.data_bytes
        recovered.address = max(recovered.address, header.base + recovered.end)


def _proof(adapter: LMDBPersistenceAdapter, recovered: Recovered) -> int:
    """The highest LSN that anything in the stage says was durable."""
    if recovered.stage is None:
        return 0
    return adapter.stage.proof(adapter.store.salt, recovered.stage.generation)
