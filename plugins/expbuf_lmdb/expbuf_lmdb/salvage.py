"""Reading what is left of a damaged log, for `expbuf repair`. Nothing is changed.

LMDB is not asked: it trusts its pages. They are read here, as far as the trees lead; and because a
page of a tree may be lost with all that only it leads to, the whole file is looked through for
frames and rows besides. Each proves itself by its checksums, wherever it lies. LMDB never changes a
page in place, so what was on a lost page is often found once more on the one that it replaced. What
is in the stage is a third copy of the newest operations.
"""

from __future__ import annotations

import contextlib
import struct
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from expbuf_core import codec, frames
from expbuf_core.contracts import Buffer, Damage, LoggedOperation, Pin
from expbuf_core.crc import crc32
from expbuf_core.errors import CorruptionError, FormatVersionError, StorageError
from expbuf_core.filesystem import read_file
from expbuf_lmdb import layout
from expbuf_lmdb.layout import STAGE_HEADER_BYTES
from expbuf_lmdb.pages import BIG, HEADER_BYTES, Bad, Node, PageFile

_STEP = 16 << 20
_MOST_STAGE_BYTES = 1 << 30  # where its header does not say how many there are
_ROW_HEAD = struct.Struct("<qII")  # id, CRC of the content, seal
_NO_ROWS: NDArray[np.uint32] = np.empty(0, np.uint32)


class _Found(NamedTuple):
    """A frame whose header is intact. `staged`: it lies in the stage."""

    header: frames.Header
    offset: int
    staged: bool


class Salvage:
    """One pass over a damaged environment and its stage.

    Args:
        folder: Of the buffer.
        uuid: Of the buffer; zeros where it is not known.
    """

    def __init__(self, folder: Path, uuid: bytes) -> None:
        self.path = folder / layout.DATA
        self._stage_path = folder / layout.STAGE
        self._uuid = uuid
        self._missing = ""
        self._file: PageFile | None = None
        try:
            self._file = PageFile(self.path)
        except StorageError as exc:
            self._missing = str(exc)
        self._wrong_with_stage = ""
        self._stage = self._staged_bytes()
        self._copies = _Copies()
        self._rows: dict[int, Node] = {}
        self._staged: list[_Found] = []
        self._remains: list[_Found] = []
        self._staged_rows = _Copies()

    def _staged_bytes(self) -> bytes:
        """The stage; nothing where it cannot be read."""
        path = self._stage_path
        try:
            header = layout.decode_stage_header(read_file(path, most=STAGE_HEADER_BYTES), path)
            if header is None:
                self._wrong_with_stage = f"{path.name}: the header is damaged"
            elif self._uuid not in (bytes(16), header.uuid):
                self._wrong_with_stage = f"{path.name}: it belongs to another buffer"
            return read_file(path, most=_MOST_STAGE_BYTES if header is None else header.size)
        except FormatVersionError:
            raise
        except OSError as exc:
            missing = isinstance(exc, FileNotFoundError)
            self._wrong_with_stage = f"{path.name}: missing" if missing else str(exc)
            return b""

    def close(self) -> None:
        """Let go of the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    # ------------------------------------------------------------ whose it is

    def uuid(self) -> bytes:
        """The UUID that most records carry; b"" if none does."""
        votes = Counter(uuid for uuid, _ in self._headers() if uuid != bytes(16))
        return votes.most_common(1)[0][0] if votes else b""

    def _salt(self) -> bytes:
        """The salt of this buffer's frames; b"" if all records of it are lost."""
        votes = Counter(salt for uuid, salt in self._headers() if uuid == self._uuid)
        return votes.most_common(1)[0][0] if votes else b""

    def _headers(self) -> Iterator[tuple[bytes, bytes]]:
        """UUID and salt in each intact record that has them."""
        raw = self._stage[:STAGE_HEADER_BYTES]
        header = layout.decode_stage_header(raw, self._stage_path) if raw else None
        if header is not None:
            yield header.uuid, header.salt
        for _, raw in self._chunks():
            at = raw.find(layout.HEADER_MAGIC)
            while at >= 0:
                found = layout.peek_header(raw[at : at + layout.HEADER_RECORD_BYTES])
                if found is not None:
                    yield found
                at = raw.find(layout.HEADER_MAGIC, at + 1)

    def _chunks(self) -> Iterator[tuple[int, bytes]]:
        """The file in whole pages, with where each part begins; holes are left out."""
        if self._file is not None:
            start = self._file.data_behind(0)
            while raw := self._file.read(start, _STEP):
                yield start, raw
                start = self._file.data_behind(start + len(raw))

    # ------------------------------------------------------------ operations

    def operations(self, after_lsn: int) -> Iterator[LoggedOperation | Damage]:
        """See `PersistenceAdapter.salvage`."""
        if self._file is None:
            yield Damage(str(self.path), -1, 0, 0, self._missing)
        salt = self._salt()
        salt_crc = crc32(salt)
        begins = self._look_through(salt_crc, salt)
        self._rows_by_trees()
        if not salt:
            message = f"{self.path.name}: whose frames these are is lost; no operation can be read"
            yield Damage(str(self.path), -1, after_lsn + 1, 0, message)
            return
        known = self._by_trees(salt_crc)
        floor = self._floor(salt)
        proof = self._read_stage(salt_crc)
        yield from self._bad_places()
        self._complete(known, max([proof, *known]), floor)
        given_up = [(previous, lsn) for lsn, previous in begins.items()]
        expected, behind = after_lsn + 1, 0
        for lsn in sorted(known):
            if any(first < lsn < end for first, end in given_up):
                continue
            newest = lsn > proof and lsn == max(known)
            operation, damage = self._operation(known[lsn], newest=newest)
            header = known[lsn][0].header
            if lsn > after_lsn:
                if lsn > expected and not begins.get(lsn, lsn) < expected:
                    yield from self._lost(expected, lsn - 1, behind, header.data_offset)
                if damage is not None:
                    yield damage
                if operation is not None:
                    yield operation
                expected = lsn + 1
            behind = max(behind, header.data_offset + header.data_bytes)
        if proof >= expected:
            yield from self._lost(expected, proof, behind, 1 << 63)
        elif self._wrong_with_stage:
            # What it held alone was not durable, and yet acknowledged where no more was asked for.
            yield Damage(str(self._stage_path), -1, expected, 0, self._wrong_with_stage, torn=True)

    def _by_trees(self, salt_crc: int) -> dict[int, list[_Found]]:
        """Operations that the trees lead to, by LSN."""
        known: dict[int, list[_Found]] = {}
        if self._file is None:
            return known
        for node in self._file.entries(layout.OPERATIONS):
            raw = self._file.read(node.offset, frames.HEADER_BYTES)
            header = frames.decode_header(raw, 0, salt_crc)
            if header is None or layout.key(header.lsn) != node.key:
                page = node.offset // self._file.page_bytes
                self._file.bad.append(Bad(page, layout.OPERATIONS, "a damaged frame"))
                continue
            known.setdefault(header.lsn, []).append(_Found(header, node.offset, False))
        return known

    def _rows_by_trees(self) -> None:
        for node in self._file.entries(layout.ROWS) if self._file is not None else ():
            with contextlib.suppress(ValueError):  # a damaged key; the row may be found by its id
                self._rows[layout.number(node.key)] = node

    def _floor(self, salt: bytes) -> int:
        """Operations up to here were dropped on purpose; 0 where that is lost."""
        if self._file is not None:
            for node in self._file.entries(layout.META):
                if node.key == layout.STATE_KEY:
                    raw = self._file.read(node.offset, node.length)
                    with contextlib.suppress(CorruptionError):
                        return layout.decode_state(raw, self.path, salt).floor
        return 0

    def _complete(self, known: dict[int, list[_Found]], last: int, floor: int) -> None:
        """Add what lies elsewhere of operations up to `last`, and in a damaged file behind it."""
        # Of a log that was given up nothing is taken, nor of what was dropped: pages that no tree
        # leads to any more are used where something is missing, and for nothing else.
        damaged = self._file is not None and bool(self._file.bad or self._file.wrong)
        copies = [found for each in self._copies.frames.values() for found in each]
        for found in [*copies, *self._remains]:
            lsn = found.header.lsn
            if lsn in known or (floor < lsn and (lsn <= last or damaged)):
                known.setdefault(lsn, []).append(found)
        for found in self._staged:
            known.setdefault(found.header.lsn, []).append(found)

    def _look_through(self, salt_crc: int, salt: bytes) -> dict[int, int]:
        """Note what lies anywhere; LSNs at which the log began anew, and behind what."""
        begins: dict[int, int] = {}
        if self._file is None:
            return begins
        for start, raw in self._chunks():
            self._copies.take(raw, start, self._file.page_bytes, salt_crc)
            at = raw.find(layout.BEGIN_PREFIX)
            while at >= 0:
                begin = at + len(layout.BEGIN_PREFIX)
                lsn = int.from_bytes(raw[begin : begin + 8], "big")
                record = raw[begin + 8 : begin + 8 + layout.BEGIN_RECORD_BYTES]
                previous = layout.decode_begin(record, lsn, salt)
                if previous is not None:
                    begins[lsn] = previous
                at = raw.find(layout.BEGIN_PREFIX, at + 1)
        self._copies.settle()
        return begins

    def _read_stage(self, salt_crc: int) -> int:
        """Note the newest frames in the stage; the highest LSN that was certainly durable."""
        raw, proof = self._stage, 0
        header = layout.decode_stage_header(raw, self._stage_path) if raw else None
        found, at = [], STAGE_HEADER_BYTES
        while (place := frames.find_header(raw, at, salt_crc)) is not None:
            found.append(_Found(place[1], place[0], True))
            at = place[0] + 8
        epoch = max((each.header.epoch for each in found), default=0)
        if header is not None:
            epoch, proof = header.generation & 0xFFFFFFFF, header.last_lsn
        self._staged = [each for each in found if each.header.epoch == epoch]
        # Older ones have been in LMDB for long, or were given up.
        self._remains = [each for each in found if each.header.epoch != epoch]
        self._staged_rows.take_rows(raw, 0)
        self._staged_rows.take_rows(raw[1:], 1)  # they stand at any offset there
        self._staged_rows.settle()
        return max([proof, *(each.header.durable_before for each in self._staged)])

    def _bad_places(self) -> Iterator[Damage]:
        """What cost nothing, or nothing that is told elsewhere."""
        name = self.path.name
        if self._file is None:
            return
        if self._file.wrong:
            yield Damage(str(self.path), 0, 0, 0, f"{name}: {self._file.wrong}")
        for bad in dict.fromkeys(self._file.bad):
            offset = bad.page * self._file.page_bytes
            table = f" of the table {bad.of.decode()}" if bad.of else ""
            message = f"{name}: {bad.reason}, page {bad.page}{table}"
            yield Damage(str(self.path), offset, 0, 0, message)

    def _lost(
        self, first: int, last: int, behind: int, before: int
    ) -> Iterator[LoggedOperation | Damage]:
        """Operations that are nowhere; what they added may be there all the same.

        Args:
            first: Of their LSNs.
            last: Of their LSNs.
            behind: Their rows have locations from here on,
            before: and lower ones than this.
        """
        offset = -1
        for bad in self._file.bad if self._file is not None else ():
            if bad.of == layout.OPERATIONS and offset < 0 and self._file is not None:
                offset = bad.page * self._file.page_bytes
        which = f"operation {first} is" if first == last else f"operations {first} to {last} are"
        message = f"{self.path.name}: {which} missing"
        yield Damage(str(self.path), offset, first, last, message)
        run: list[int] = []
        end = -1
        for place in [*sorted(at for at in self._rows if behind <= at < before), -1]:
            if run and place != end:
                lengths = np.array([self._rows[at].length for at in run], np.uint32)
                yield LoggedOperation(last, codec.RELOG, 0, b"", run[0], lengths)
                run = []
            if place >= 0:
                run.append(place)
                end = place + self._rows[place].length

    def _operation(
        self, copies: list[_Found], *, newest: bool
    ) -> tuple[LoggedOperation | None, Damage | None]:
        """The best copy of an operation, and what is wrong with it.

        Args:
            copies: Of it.
            newest: It is the last one, and nothing says that it was ever durable.
        """
        header, best = copies[0].header, None
        lsn = header.lsn
        for found in copies:
            if found.header != header:
                continue  # an attempt to append it that failed
            bare = frames.HEADER_BYTES + header.body_len + 8 * header.row_count
            size = header.data_bytes if found.staged else bare
            raw = self._read(found.offset, size, staged=found.staged)
            body = raw[frames.HEADER_BYTES : frames.HEADER_BYTES + header.body_len]
            intact = len(body) == header.body_len and crc32(body) == header.body_crc
            lengths = _NO_ROWS
            if header.row_count:
                table = frames.decode_table(raw, header, 0)
                if table is None or sum(table["length"].tolist()) != header.rows_len:
                    continue
                lengths = table["length"].copy()
                first_id = header.first_id or None
                torn = found.staged and frames.check_rows(raw, bare, first_id, table) is not None
                if newest and torn:
                    continue
            elif not intact:
                continue
            if best is None or intact:
                best = LoggedOperation(
                    lsn,
                    header.kind,
                    header.first_id,
                    body if intact else b"",
                    header.rows_offset,
                    lengths,
                )
            if intact:
                break
        path = self._stage_path if copies[0].staged else self.path
        where = str(path), copies[0].offset
        if best is None:
            message = f"{path.name}: operation {lsn} is damaged"
            torn = newest and all(found.staged for found in copies)
            return None, Damage(*where, lsn, lsn, message, torn)
        if not best.body and header.body_len:
            message = f"{path.name}: checksum mismatch in operation {lsn}"
            return best, Damage(*where, 0, 0, message)
        return best, None

    # ------------------------------------------------------------ rows

    def _read(self, offset: int, length: int, *, staged: bool) -> bytes:
        if staged:
            return self._stage[offset : offset + length]
        # No length is believed: what is longer than the file is cut by its end.
        return self._file.read(offset, length) if self._file is not None else b""

    def row(self, id_: int, location: int, length: int) -> tuple[bytes, Path, int]:
        """A row, damaged if no intact copy of it is anywhere; with file and offset."""
        node, first = self._rows.get(location), None
        places = [(node.offset, False)] if node is not None else []
        places += [(offset, False) for offset in self._copies.at(location)]
        places += self._in_stage(location, length)
        for offset, staged in places:
            raw = self._read(offset, length, staged=staged)
            found = raw, self._stage_path if staged else self.path, offset
            if frames.check_row(raw) is not None:
                return found
            first = first or found
        alone = self._alone(id_, length)
        if alone is not None:
            return alone
        if first is None:
            raise layout.corrupt(self.path, f"the payload of experience {id_} is missing")
        return first

    def _in_stage(self, location: int, length: int) -> list[tuple[int, bool]]:
        found = []
        for each in [*self._staged, *self._remains]:
            header = each.header
            start = location - header.rows_offset
            if 0 <= start and start + length <= header.rows_len:
                found.append((each.offset + header.rows_offset - header.data_offset + start, True))
        return found

    def _alone(self, id_: int, length: int) -> tuple[bytes, Path, int] | None:
        """A row that no key leads to any more, if there is only one of this id."""
        found: dict[bytes, tuple[Path, int]] = {}
        for copies, path in ((self._copies, self.path), (self._staged_rows, self._stage_path)):
            for offset in copies.of_id(id_):
                raw = self._read(offset, length, staged=path is self._stage_path)
                checked = frames.check_row(raw)
                if checked is not None and checked[0] == id_:
                    found.setdefault(raw, (path, offset))
        if len(found) != 1:
            return None
        ((raw, where),) = found.items()
        return raw, *where


class _Copies:
    """What lies anywhere in a file of LMDB, whether a tree leads there or not.

    Attributes:
        frames: By LSN.
    """

    def __init__(self) -> None:
        self.frames: dict[int, list[_Found]] = {}
        self._keys: list[NDArray[np.uint64]] = []
        self._places: list[NDArray[np.int64]] = []
        self._ids: list[int] = []
        self._starts: list[int] = []

    def take(self, raw: bytes, start: int, page_bytes: int, salt_crc: int) -> None:
        """Note what some whole pages hold."""
        self._take_frames(raw, start, salt_crc)
        self._take_nodes(raw, start, page_bytes)
        self.take_rows(raw, start)

    def _take_frames(self, raw: bytes, start: int, salt_crc: int) -> None:
        at = raw.find(frames._MAGIC_BYTES)
        while at >= 0:
            header = frames.decode_header(raw, at, salt_crc)
            if header is not None:
                found = _Found(header, start + at, False)
                self.frames.setdefault(header.lsn, []).append(found)
            at = raw.find(frames._MAGIC_BYTES, at + 1)

    def take_rows(self, raw: bytes, start: int) -> None:
        """Whatever begins like a row: an id, a checksum, and the seal of both."""
        halves = np.frombuffer(raw[: len(raw) // 2 * 2], "=u2")
        # Below 2^40, as all ids are, and not in the midst of zeros.
        like = (halves[3:-4] == 0) & (halves[2:-5] < 1 << 8)
        like &= (halves[4:-3] | halves[5:-2] | halves[6:-1] | halves[7:]) != 0
        for at in (np.flatnonzero(like) * 2).tolist():
            _, crc, seal = _ROW_HEAD.unpack_from(raw, at)
            if crc32(raw[at : at + 8], crc) == seal:
                self._ids.append(int.from_bytes(raw[at : at + 8], "little"))
                self._starts.append(start + at)

    def _take_nodes(self, raw: bytes, start: int, page_bytes: int) -> None:
        """Whatever looks like a node with a key of 8 bytes; its row will have to prove itself."""
        halves = np.frombuffer(raw[: len(raw) // 2 * 2], "=u2")
        at = np.flatnonzero((halves[3:] == 8) & (halves[2:-1] <= BIG)) * 2
        at = at[at + 24 <= len(raw)]
        data = np.frombuffer(raw, np.uint8)
        eight = np.arange(8)
        keys = data[at[:, None] + 8 + eight].copy().view(">u8")[:, 0].astype(np.uint64)
        places = at.astype(np.int64) + 16 + start
        big = halves[at // 2 + 2] == BIG
        numbers = data[at[big, None] + 16 + eight].copy().view("=u8")[:, 0]
        numbers[numbers > np.uint64(1 << 40)] = 0  # of no file
        places[big] = numbers.astype(np.int64) * page_bytes + HEADER_BYTES
        self._keys.append(keys)
        self._places.append(places)

    def settle(self) -> None:
        """Make what was noted ready to be looked up."""
        none = np.empty(0, np.int64)
        keys = np.concatenate([none.astype(np.uint64), *self._keys])
        order = np.argsort(keys, kind="stable")
        self._keys = [keys[order]]
        self._places = [np.concatenate([none, *self._places])[order]]
        ids = np.array(self._ids, np.int64)
        order = np.argsort(ids, kind="stable")
        self._sorted_ids, self._sorted_starts = ids[order], np.array(self._starts, np.int64)[order]

    def at(self, location: int) -> list[int]:
        """Where rows with this location may lie."""
        if not self._keys:
            return []
        wanted = np.uint64(location)
        first = np.searchsorted(self._keys[0], wanted, "left")
        end = np.searchsorted(self._keys[0], wanted, "right")
        return [int(place) for place in self._places[0][first:end]]

    def of_id(self, id_: int) -> list[int]:
        """Where rows of this id begin."""
        if not self._keys:
            return []
        first = np.searchsorted(self._sorted_ids, id_, "left")
        end = np.searchsorted(self._sorted_ids, id_, "right")
        return [int(place) for place in self._sorted_starts[first:end]]


class SalvagedPin(Pin):
    """Rows as they were found."""

    def __init__(self, found: list[tuple[bytes, Path, int]]) -> None:
        self._found = found

    def read(self, i: int) -> Buffer:
        return self._found[i][0]

    def where(self, i: int) -> tuple[str, int]:
        return str(self._found[i][1]), self._found[i][2]
