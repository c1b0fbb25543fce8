"""What stands in the environment's tables: frames by LSN, rows by location, a few records."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from expbuf_core import alike, frames
from expbuf_core.contracts import Buffer, LoggedOperation, LoggedRun
from expbuf_core.crc import crc32
from expbuf_lmdb import layout
from expbuf_lmdb.environment import Cursor, Tables, Txn
from expbuf_lmdb.layout import State, key, number
from expbuf_lmdb.trees import check_trees

_NO_LENGTHS: NDArray[np.uint32] = np.empty(0, np.uint32)


class Checked(NamedTuple):
    """A frame whose header, body and table were checked."""

    header: frames.Header
    operation: LoggedOperation
    seals: list[int]


class Store:
    """Reads and writes the tables of one environment, inside transactions of the caller.

    Args:
        path: Of the environment, for messages.
        uuid: Of the buffer.
    """

    def __init__(self, path: Path, uuid: bytes) -> None:
        self.path = path
        self._uuid = uuid
        self.salt = b""
        self._salt_crc = 0

    # ------------------------------------------------------------ records

    def read_header(self, txn: Txn, tables: Tables) -> None:
        """Check whose environment it is, and learn its salt."""
        raw = txn.get(layout.HEADER_KEY, db=tables.meta)
        self.salt = layout.decode_header(raw, self.path, self._uuid)
        self._salt_crc = crc32(self.salt)

    def state(self, txn: Txn, tables: Tables) -> State:
        """The record `state`."""
        return layout.decode_state(txn.get(layout.STATE_KEY, db=tables.meta), self.path, self.salt)

    def put_state(self, txn: Txn, tables: Tables, state: State) -> None:
        """Replace it."""
        txn.put(layout.STATE_KEY, layout.encode_state(state, self.salt), db=tables.meta)

    def put_begin(self, txn: Txn, tables: Tables, lsn: int, previous: int) -> None:
        """Note that the log goes on at `lsn` behind `previous`."""
        if lsn != previous + 1:
            record = layout.encode_begin(lsn, previous, self.salt)
            txn.put(layout.begin_key(lsn), record, db=tables.meta)

    def follows(self, txn: Txn, tables: Tables, lsn: int, previous: int) -> bool:
        """Whether nothing is missing between `previous` and `lsn`."""
        if lsn == previous + 1:
            return True
        raw = txn.get(layout.begin_key(lsn), db=tables.meta)
        before = layout.decode_begin(raw, lsn, self.salt)
        return before is not None and before <= previous < lsn

    def reaches_back(self, txn: Txn, tables: Tables, after_lsn: int) -> bool:
        """Whether everything behind `after_lsn` is still there."""
        floor = self.state(txn, tables).floor
        # What lies between may never have been: the log began anew right behind it.
        return after_lsn >= floor or self.follows(txn, tables, floor + 1, after_lsn)

    # ------------------------------------------------------------ operations

    def last_lsn(self, txn: Txn, tables: Tables) -> int:
        """LSN of the newest operation."""
        with txn.cursor(db=tables.operations) as cursor:
            if cursor.last():
                return self.number_of(cursor.key())
        return self.state(txn, tables).floor

    def end_address(self, txn: Txn, tables: Tables, state: State) -> int:
        """Address behind the newest operation."""
        with txn.cursor(db=tables.operations) as cursor:
            if not cursor.last():
                return state.address
            header = self._decoded(self.number_of(cursor.key()), cursor.value())
            return max(state.address, header.data_offset + header.data_bytes)

    def put(self, txn: Txn, tables: Tables, header: frames.Header, data: Buffer) -> None:
        """Add the newest operation, as it stands in the stage.

        Args:
            txn: For writing.
            tables: Of the environment.
            header: Of the frame.
            data: The frame with its rows.
        """
        view = memoryview(data)
        at = frames.HEADER_BYTES + header.body_len + 8 * header.row_count
        done = txn.put(key(header.lsn), bytes(view[:at]), db=tables.operations, append=True)
        if header.row_count == 1:
            row = bytes(view[at : at + header.rows_len])
            done = txn.put(key(header.rows_offset), row, db=tables.rows, append=True) and done
        elif header.row_count:
            table = frames.decode_table(view, header, 0)
            if table is None:
                raise layout.corrupt(
                    self.path.with_name(layout.STAGE),
                    "checksum mismatch in a row table",
                    lsn=header.lsn,
                )
            sizes = table["length"].astype(np.int64)
            ends = np.cumsum(sizes)
            places = (header.rows_offset + ends - sizes).astype(">u8").tobytes()
            items = []
            for i, (end, size) in enumerate(zip(ends.tolist(), sizes.tolist(), strict=True)):
                row = bytes(view[at + end - size : at + end])
                items.append((places[8 * i : 8 * i + 8], row))
            with txn.cursor(db=tables.rows) as cursor:
                done = cursor.putmulti(items, append=True)[1] == len(items) and done
        if not done:
            raise layout.corrupt(
                self.path, "a key that is larger than the newest one", lsn=header.lsn
            )

    def operations(
        self, txn: Txn, tables: Tables, after_lsn: int, until_lsn: int, limit: int, room: int
    ) -> Iterator[Checked]:
        """Operations in (after_lsn, until_lsn], checked but for their rows.

        Args:
            txn: For reading.
            tables: Of the environment.
            after_lsn: Where to begin.
            until_lsn: Where to end.
            limit: At most so many,
            room: and no more than one beyond so many bytes.

        Raises:
            CorruptionError: One is damaged, or missing.
        """
        with txn.cursor(db=tables.operations) as cursor:
            found = cursor.set_range(key(after_lsn + 1))
            previous = after_lsn
            while found and limit and room > 0:
                lsn, value = self.number_of(cursor.key()), cursor.value()
                if lsn > until_lsn:
                    return
                if not self.follows(txn, tables, lsn, previous):
                    raise layout.corrupt(
                        self.path, f"operation {previous + 1} is missing", lsn=previous + 1
                    )
                yield self.checked(lsn, value)
                previous = lsn
                limit -= 1
                room -= len(value)
                found = cursor.next()

    def together(
        self, txn: Txn, tables: Tables, after_lsn: int, until_lsn: int, limit: int, room: int
    ) -> list[LoggedOperation | LoggedRun]:
        """`operations`, checked with their rows, and those that are alike taken together.

        What is not plainly the next one, intact, is left to `checked` and `check_rows`, which say
        what is wrong with it: they take several times as long.
        """
        items: list[LoggedOperation | LoggedRun] = []
        found, first, previous = alike.Alike(), after_lsn + 1, after_lsn
        shape: tuple[int, int, int] | None = None
        with txn.cursor(db=tables.operations) as cursor, txn.cursor(db=tables.rows) as rows:
            at = cursor.set_range(key(after_lsn + 1))
            following = cursor.iternext() if at else iter(())
            for raw, value in following:
                lsn = self.number_of(raw)
                if lsn > until_lsn or limit <= 0 or room <= 0:
                    break
                if not self.follows(txn, tables, lsn, previous):
                    raise layout.corrupt(
                        self.path, f"operation {previous + 1} is missing", lsn=previous + 1
                    )
                header = self._plain(rows, lsn, value)
                if lsn != previous + 1 or header is None:
                    items += found.taken_together(first)
                    found, first, shape = alike.Alike(), lsn, None
                if header is None:
                    checked = self.checked(lsn, value)
                    self.check_rows(txn, tables, checked)
                    items.append(checked.operation)
                    first = lsn + 1
                else:
                    start, size, n = frames.HEADER_BYTES, header.body_len, header.row_count
                    if (header.kind, size, n) != shape:
                        shape = (header.kind, size, n)
                        found.shapes.append((len(found), shape))
                    if n > 1:
                        table = np.frombuffer(value, frames.TABLE_ENTRY, n, start + size)
                        found.tables[len(found)] = table["length"].copy()
                    found.bodies.append(value[start : start + size])
                    found.ids.append(header.first_id)
                    found.places.append(header.data_offset + start + size + 8 * n)
                    found.sizes.append(header.rows_len)
                previous = lsn
                limit -= 1
                room -= len(value)
        return items + found.taken_together(first)

    def _plain(self, rows: Cursor, lsn: int, value: bytes) -> frames.Header | None:
        """The header of an operation that is intact with its rows; None where it may not be."""
        header = frames.decode_header(value, 0, self._salt_crc)
        if header is None or header.lsn != lsn:
            return None
        start = frames.HEADER_BYTES
        table_at = start + header.body_len
        n = header.row_count
        if len(value) != table_at + 8 * n or crc32(value[start:table_at]) != header.body_crc:
            return None
        if not n:
            return None if header.rows_len else header
        raw = value[table_at:]
        if crc32(raw) != header.table_crc:
            return None
        place, id_ = header.data_offset + len(value), header.first_id
        if n > 1 and not id_:
            return None  # rows of any ids
        unpack, pack, row_header = frames.ROW.unpack_from, frames.ID.pack, frames.ROW_HEADER_BYTES
        end = place + header.rows_len
        # They stand one behind the other, as do those of the next operation.
        if rows.key() != key(place) and not rows.set_key(key(place)):
            return None
        for length, seal in frames.TABLE_ROW.iter_unpack(raw):
            stored, row = rows.item()
            if stored != key(place) or len(row) != length or length < row_header:
                return None
            own, crc, own_seal = unpack(row)
            if (
                own != id_
                or own_seal != seal
                or crc32(row[row_header:]) != crc
                or crc32(pack(id_), crc) != seal
            ):
                return None
            place += length
            id_ += 1
            rows.next()
        return header if place == end else None

    def next_lsn(self, txn: Txn, tables: Tables, after_lsn: int) -> int | None:
        """LSN of the first operation behind `after_lsn`."""
        with txn.cursor(db=tables.operations) as cursor:
            found = cursor.set_range(key(after_lsn + 1))
            return self.number_of(cursor.key()) if found else None

    def number_of(self, raw: bytes) -> int:
        """The LSN or location that is a key."""
        try:
            return number(raw)
        except ValueError as exc:
            raise layout.corrupt(self.path, str(exc)) from exc

    def _decoded(self, lsn: int, value: bytes) -> frames.Header:
        header = frames.decode_header(value, 0, self._salt_crc)
        if header is None or header.lsn != lsn:
            raise layout.corrupt(self.path, f"operation {lsn} has a damaged header", lsn=lsn)
        return header

    def checked(self, lsn: int, value: bytes) -> Checked:
        """Check a frame as it stands in the table."""
        header = self._decoded(lsn, value)
        start = frames.HEADER_BYTES
        if len(value) != start + header.body_len + 8 * header.row_count:
            raise layout.corrupt(self.path, f"operation {lsn} has another length", lsn=lsn)
        body = value[start : start + header.body_len]
        if crc32(body) != header.body_crc:
            raise layout.corrupt(self.path, f"checksum mismatch in operation {lsn}", lsn=lsn)
        return checked_operation(header, value, body, self.path)

    # ------------------------------------------------------------ rows

    def check_rows(self, txn: Txn, tables: Tables, found: Checked) -> None:
        """See that all rows of an operation are there, and what was written."""
        header, operation = found.header, found.operation
        place = header.rows_offset
        for i, (length, seal) in enumerate(
            zip(operation.lengths.tolist(), found.seals, strict=True)
        ):
            row = txn.get(key(place), db=tables.rows)
            checked = frames.check_row(row) if row is not None and len(row) == length else None
            expected = header.first_id + i if header.first_id else None
            if checked is None or checked[1] != seal or expected not in (None, checked[0]):
                what = "is missing" if row is None else "is damaged"
                raise layout.corrupt(
                    self.path, f"row {i} of operation {header.lsn} {what}", lsn=header.lsn
                )
            place += length

    # ------------------------------------------------------------ deleting

    def delete_behind(self, txn: Txn, tables: Tables, lsn: int) -> None:
        """Delete operations behind `lsn`, with their rows."""
        with txn.cursor(db=tables.operations) as cursor:
            if not cursor.set_range(key(lsn + 1)):
                return
            first = self._decoded(self.number_of(cursor.key()), cursor.value())
            self._see_that_it_can_go(lsn, first.data_offset)
            while cursor.key():
                if not cursor.delete():
                    break
        with txn.cursor(db=tables.rows) as cursor:
            found = cursor.set_range(key(first.data_offset))
            while found and cursor.key():
                if not cursor.delete():
                    break

    def _see_that_it_can_go(self, lsn: int, address: int) -> None:
        """Before operations behind `lsn` are deleted, and rows from `address` on.

        They are in the state that this transaction began with, or it put them there itself.
        """

        def deleted(table: bytes, keys: NDArray[np.int64]) -> NDArray[np.bool_]:
            return keys > lsn if table == layout.OPERATIONS else keys >= address

        check_trees(self.path, deleted)

    def dropping_from(self, txn: Txn, tables: Tables, state: State, lsn: int) -> int:
        """The address below which rows belong to operations up to `lsn`."""
        with txn.cursor(db=tables.operations) as cursor:
            if not cursor.set_range(key(lsn + 1)):
                return self.end_address(txn, tables, state)
            return self._decoded(self.number_of(cursor.key()), cursor.value()).data_offset


def checked_operation(header: frames.Header, frame: Buffer, body: bytes, path: Path) -> Checked:
    """What replicas see of a frame whose header and body were checked.

    Raises:
        CorruptionError: Its table of rows is damaged.
    """
    lengths, seals = _NO_LENGTHS, []
    if header.row_count:
        table = frames.decode_table(frame, header, 0)
        if table is None or int(table["length"].sum(dtype=np.int64)) != header.rows_len:
            raise layout.corrupt(
                path, f"operation {header.lsn} has a damaged row table", lsn=header.lsn
            )
        lengths, seals = table["length"].copy(), table["crc"].tolist()
    operation = LoggedOperation(
        header.lsn, header.kind, header.first_id, body, header.rows_offset, lengths
    )
    return Checked(header, operation, seals)
