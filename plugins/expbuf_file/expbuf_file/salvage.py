"""Reading what is left of a damaged log, for `expbuf repair`. Nothing is changed.

Recovery stops at what is bad; this goes on behind it, also where the disk gives nothing back. The
salt in each frame's checksum tells frames from whatever else lies there. What the data log has lost
is looked for in the index log, which holds the same operations without their rows. Rows are not
checked here: the core does that.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from expbuf_core import frames
from expbuf_core.contracts import Damage, LoggedOperation
from expbuf_core.crc import crc32
from expbuf_core.errors import CorruptionError, StorageError
from expbuf_core.filesystem import SECTOR, open_to_read, storage_errors
from expbuf_file import layout
from expbuf_file.logfile import BadFrame, Begin, Frame, LogFile

_LOGS = (layout.DATA, layout.INDEX)
_STEP = 8 << 20
_NO_UUID = bytes(16)
_VOTES = 9


class _Bad(NamedTuple):
    """A bad place: behind which LSN, and whether any frame of its file stands behind it."""

    path: Path
    offset: int
    reason: str
    after: int
    last: bool


class _ScarredFile(LogFile):
    """A log file of which the disk may give back only parts. The rest reads as zeros.

    Attributes:
        unreadable: Offsets of the sectors that were met and not given back.
    """

    def __init__(
        self,
        folder: Path,
        log: str,
        number: int,
        uuid: bytes,
        header: layout.FileHeader | None = None,
    ) -> None:
        self.unreadable: set[int] = set()
        super().__init__(folder, log, number, uuid, header)

    def _read_into(self, view: memoryview, offset: int) -> int:
        with contextlib.suppress(CorruptionError):
            return super()._read_into(view, offset)
        size = max(min(len(view), self.size() - offset), 0)
        at = 0
        while at < size:
            place = offset + at
            end = min(at + SECTOR - place % SECTOR, size)
            try:
                super()._read_into(view[at:end], place)
            except CorruptionError:
                view[at:end] = bytes(end - at)
                self.unreadable.add(place - place % SECTOR)
            at = end
        return size

    def is_empty(self, offset: int, limit: int) -> bool:
        """Whether nothing but zeros stands in [offset, limit), as in room that was never used."""
        if self.last_nonzero(offset, limit) > offset:
            return False
        return not any(offset - SECTOR < place < limit for place in self.unreadable)

    def scars(self) -> Iterator[tuple[int, int]]:
        """Where what could not be read begins and ends, rising."""
        begin = end = -1
        for place in sorted(self.unreadable):
            if place != end:
                if end > 0:
                    yield begin, end
                begin = place
            end = place + SECTOR
        if end > 0:
            yield begin, end


class _Scan:
    """What a log file holds, bad places stepped over.

    Attributes:
        found: Operations by LSN; with an empty body where it is damaged and the rows are in place.
        bad: What was stepped over.
        jumps: By LSN: from which one the log goes on behind it.
        ends_at: LSN in the frame that ends the file; None where there is none.
        following: File that this frame names.
    """

    def __init__(self) -> None:
        self.found: dict[int, LoggedOperation] = {}
        self.bad: list[_Bad] = []
        self.jumps: dict[int, int] = {}
        self.ends_at: int | None = None
        self.following = 0


class _Link(NamedTuple):
    """A file of the log: what it continues, and where what follows it says that it ends.

    `kept`: For its payloads only; what the log goes on with from there is gone.
    """

    number: int
    begin: Begin | None
    end: int | None
    last_lsn: int | None
    below: int | None  # LSNs from here on are those of the next file
    kept: bool = False


def uuid_of(folder: Path) -> bytes:
    """The UUID that most headers of log files carry; b"" if there is none.

    Those with a right checksum are asked first.
    """
    intact: Counter[bytes] = Counter()
    others: Counter[bytes] = Counter()
    for log in _LOGS:
        for number in layout.numbers(folder, log):
            header, right = _peek(layout.path_of(folder, log, number))
            if header is not None and header.uuid != _NO_UUID:
                (intact if right else others)[header.uuid] += 1
    for votes in (intact, others):
        if votes:
            return votes.most_common(1)[0][0]
    return b""


def _peek(path: Path) -> tuple[layout.FileHeader | None, bool]:
    """The header of a log file as it stands there, and whether its checksum is right."""
    try:
        with open(open_to_read(path), "rb") as file:
            raw = file.read(layout.HEADER_BYTES)
    except OSError:
        return None, False
    end = layout._HEADER.size
    if len(raw) < end + 4:
        return None, False
    _magic, _version, *fields = layout._HEADER.unpack_from(raw)
    right = crc32(raw[:end]) == int.from_bytes(raw[end : end + 4], "little")
    return layout.FileHeader(*fields), right


class Salvage:
    """One pass over a damaged log.

    Attributes:
        files: Data logs whose headers are damaged and whose rows can be read all the same.
    """

    def __init__(self, folder: Path, uuid: bytes) -> None:
        self._folder = folder
        self._uuid = uuid
        self.files: dict[int, LogFile] = {}

    def operations(self, after_lsn: int) -> Iterator[LoggedOperation | Damage]:
        """See `PersistenceAdapter.salvage`."""
        data: dict[int, _ScarredFile | None] = {}
        every = {n for log in _LOGS for n in layout.numbers(self._folder, log)}
        for number in sorted(every):
            data[number], damage = self._open(layout.DATA, number)
            if damage is not None:
                yield damage
        chain = self._chain(data)
        last = after_lsn
        for link in chain:
            if link.last_lsn is not None and link.last_lsn <= after_lsn:
                continue  # in the snapshot already; its rows can be read by their locations
            for item in self._file(link, data[link.number], last, link is chain[-1]):
                if isinstance(item, Damage):
                    yield _behind(item, after_lsn)
                elif item.lsn > after_lsn:
                    yield item
                    last = item.lsn
            last = max(last, link.last_lsn or 0)

    # ------------------------------------------------------------ files

    def _open(self, log: str, number: int) -> tuple[_ScarredFile | None, Damage | None]:
        """A log file, also one with a damaged header; None where nothing of it can be used."""
        path = layout.path_of(self._folder, log, number)
        if not path.exists():
            other = layout.path_of(self._folder, layout.INDEX, number)
            used = log == layout.DATA and _may_have_frames(other)
            message = f"{path.name}: missing; what was stored in it is lost"
            return None, Damage(str(path), -1, 0, 0, message) if used else None
        try:
            with storage_errors("open", path):
                return _ScarredFile(self._folder, log, number, self._uuid), None
        except CorruptionError as exc:
            offset = -1 if exc.offset is None else exc.offset
            damage = Damage(str(path), offset, 0, 0, str(exc))
        except StorageError as exc:
            return None, Damage(str(path), -1, 0, 0, str(exc))
        stored, right = _peek(path)
        size = path.stat().st_size
        wanted = layout.FileHeader(_LOGS.index(log), number, size, self._uuid, _NO_UUID, 0)
        if (
            right
            and stored is not None
            and (stored.uuid, stored.number, stored.log)
            != (
                wanted.uuid,
                wanted.number,
                wanted.log,
            )
        ):
            return None, damage  # intact, and of another buffer or place
        try:
            file = _ScarredFile(self._folder, log, number, self._uuid, wanted)
        except StorageError:  # something else stands in its place
            return None, damage
        file.salt_crc = _salt_crc(file)
        if log == layout.DATA:
            self.files[number] = file
        return file, damage

    def _chain(self, data: dict[int, _ScarredFile | None]) -> list[_Link]:
        """The files that make up the log, oldest first, as far as that can be told."""
        begins: dict[int, Begin | None] = {}
        firsts: dict[int, int] = {}
        for number, file in data.items():
            begin = file.begin() if file is not None else None
            if begin is None:  # the index log has the same first frame
                index, _ = self._open(layout.INDEX, number)
                begin = index.begin() if index is not None else None
                first = [_first_lsn(each) for each in (file, index) if each is not None]
                if begin is None and not any(first):
                    continue  # prepared, and never used; or nothing is left of it
                firsts[number] = min(filter(None, first), default=0)
            begins[number] = begin
        chain: list[_Link] = []
        wanted: int | None = None
        for number in sorted(begins, reverse=True):
            if wanted is not None and number > wanted:
                continue  # given up: a later file continues an older one
            begin, following = begins[number], chain[-1] if chain else None
            end = last_lsn = below = None
            kept = False
            if following is not None:
                link = following.begin
                if link is None:
                    below = firsts.get(following.number) or None
                elif link.previous == number:
                    end, last_lsn = link.previous_end, link.previous_lsn
                else:
                    below, kept = link.previous_lsn + 1, True
            chain.append(_Link(number, begin, end, last_lsn, below, kept))
            wanted = begin.previous if begin is not None else None
        return chain[::-1]

    # ------------------------------------------------------------ one file

    def _file(
        self, link: _Link, file: _ScarredFile | None, last: int, newest: bool
    ) -> Iterator[LoggedOperation | Damage]:
        """Operations of a file in order, each behind the damage that took those before it."""
        path = layout.path_of(self._folder, layout.DATA, link.number)
        begin = link.begin
        expected = last + 1
        if begin is not None:
            if begin.previous_lsn > last:
                gone = layout.path_of(self._folder, layout.DATA, begin.previous)
                message = f"{gone.name}: operations up to lsn {begin.previous_lsn} are missing"
                yield Damage(str(gone), -1, expected, begin.previous_lsn, message)
            expected = begin.lsn
        scan = _Scan()
        if file is not None:
            scan = self._scan(file, link.end, expected - 1)
        if file is None or scan.bad:
            self._complete(scan, link, file is None, expected - 1)
        bad = list(scan.bad)

        def lost(first: int, until: int) -> Damage:
            for i, place in enumerate(bad):
                if place.after == first - 1 or (place.after < first and i == len(bad) - 1):
                    del bad[i]
                    return _damage(place, first, until)
            message = f"{path.name}: operations from lsn {first} to {until} are missing"
            return Damage(str(path), -1, first, until, message)

        for lsn in sorted(scan.found):
            if lsn < expected or (link.below is not None and lsn >= link.below):
                continue
            if lsn > expected:
                yield lost(expected, lsn - 1)
            yield scan.found[lsn]
            expected = max(lsn + 1, scan.jumps.get(lsn, 0))
        known = link.last_lsn if link.last_lsn is not None else scan.ends_at
        if known is not None and expected <= known:
            yield lost(expected, known)
            expected = known + 1
        for place in bad:
            if place.last and link.kept:
                continue  # left by whoever died while writing to it; see `verify_file`
            if place.last and newest and known is None and place.after == expected - 1:
                yield _damage(place, expected, 0)._replace(torn=True)
            else:
                yield _damage(place, 0, 0)
        if newest and scan.following:
            gone = layout.path_of(self._folder, layout.DATA, scan.following)
            message = f"{gone.name}: missing; it went on behind lsn {expected - 1}"
            yield Damage(str(gone), -1, expected, 0, message)

    def _scan(self, file: _ScarredFile, end: int | None, after: int) -> _Scan:
        """Read a log file, stepping over what is bad."""
        scan = _Scan()
        size = file.size()
        limit = size if end is None else min(end, size)
        offset, last, closed = layout.HEADER_BYTES, after, False
        while offset < limit and not closed:
            for found in file.frames(offset, limit, rows=file.header.log == 0):
                if isinstance(found, BadFrame):
                    offset, last = self._step_over(file, found, limit, scan, last)
                    break
                offset = found.end
                last = _take(scan, file, found, last)
                if found.header.kind == frames.LOG_END:
                    closed = True
                    break
        whole = max(file.header.size, layout.HEADER_BYTES) if end is None else end
        if not closed and size < whole:
            scan.bad.append(_Bad(file.path, size, "the file was cut", last, True))
        for begin, stop in file.scars():
            scan.bad.append(
                _Bad(file.path, begin, f"{stop - begin} bytes cannot be read", -1, False)
            )
        return scan

    def _step_over(
        self, file: _ScarredFile, bad: BadFrame, limit: int, scan: _Scan, last: int
    ) -> tuple[int, int]:
        """Use what can be used of a bad frame; where the next one is, and the last LSN."""
        offset = bad.offset
        frame = _partial(file, offset, limit)
        if frame is None:
            after = _next_frame(file, offset + 8, limit)
            if after == limit and file.is_empty(offset, limit):
                return limit, last  # room that was never used
            scan.bad.append(_Bad(file.path, bad.at, bad.reason, last, after == limit))
            return after, last
        after = frame.end
        if after > limit or _header_at(file, after, limit) is None:
            after = _next_frame(file, offset + 8, limit)
        scan.bad.append(_Bad(file.path, bad.at, bad.reason, last, after == limit))
        header = frame.header
        # Without rows, an operation is its body; with rows it is worth having without.
        usable = frame.body or header.row_count or not header.body_len
        if usable and len(frame.lengths) == header.row_count:
            return after, _take(scan, file, frame, last)
        if header.kind == frames.LOG_END:
            scan.ends_at = header.lsn
        return after, last if header.kind >= frames.LOG_BEGIN else max(last, header.lsn)

    def _complete(self, scan: _Scan, link: _Link, alone: bool, after: int) -> None:
        """Take from the index log what the data log has lost."""
        index, _ = self._open(layout.INDEX, link.number)
        if index is None:
            return
        other = self._scan(index, None, after)
        for lsn, operation in other.found.items():
            offset = operation.location & (layout.MAX_FILE_BYTES - 1)
            if link.last_lsn is not None and (lsn > link.last_lsn or offset > (link.end or 0)):
                continue  # given up
            known = scan.found.get(lsn)
            if known is None or not known.body:
                scan.found[lsn] = operation
        for lsn, jump in other.jumps.items():
            scan.jumps.setdefault(lsn, jump)
        if scan.ends_at is None:
            scan.ends_at, scan.following = other.ends_at, other.following
        if alone:
            scan.bad = other.bad


def _behind(damage: Damage, after_lsn: int) -> Damage:
    """What of a damage concerns the operations behind `after_lsn`."""
    first, last = damage.first_lsn, damage.last_lsn
    if not first or 0 < last <= after_lsn:
        return damage._replace(first_lsn=0, last_lsn=0)
    return damage._replace(first_lsn=max(first, after_lsn + 1))


def _damage(bad: _Bad, first: int, last: int) -> Damage:
    message = f"{bad.path.name}: {bad.reason} at offset {bad.offset}"
    return Damage(str(bad.path), bad.offset, first, last, message)


def _take(scan: _Scan, file: LogFile, frame: Frame, last: int) -> int:
    """Note a frame; the last LSN behind it."""
    header = frame.header
    if header.kind == frames.LOG_BEGIN:
        if frame.offset > layout.HEADER_BYTES:
            scan.jumps[last] = header.lsn
        return last
    if header.kind == frames.LOG_END:
        if len(frame.body) == layout.END_BODY.size:
            following = layout.END_BODY.unpack(frame.body)[0]
            there = following and layout.path_of(file.path.parent, layout.DATA, following).exists()
            scan.ends_at = header.lsn
            scan.following = 0 if there else following
        return last
    scan.found.setdefault(header.lsn, file.operation(frame))
    return max(last, header.lsn)


def _header_at(file: LogFile, offset: int, limit: int) -> frames.Header | None:
    """The header of a frame of this file and place."""
    if offset + frames.HEADER_BYTES > limit:
        return None
    header = frames.decode_header(file.read(offset, frames.HEADER_BYTES), 0, file.salt_crc)
    if header is None or header.epoch != file.number:
        return None
    return header if file.header.log or header.data_offset == offset else None


def _salt_crc(file: LogFile) -> int:
    """The CRC of a lost salt, computed back from the frames that it went into.

    A frame stands where it says that it stands, so nothing else is taken for one.
    """
    votes: Counter[int] = Counter()
    raw = bytes(file.read(0, min(file.size(), _STEP)))
    at = raw.find(frames._MAGIC_BYTES, layout.HEADER_BYTES)
    while 0 <= at <= len(raw) - frames.HEADER_BYTES and sum(votes.values()) < _VOTES:
        _, stored, *fields = frames.HEADER.unpack_from(raw, at)
        header = frames.Header(*fields)
        if header.epoch == file.number and (file.header.log or header.data_offset == at):
            votes[_before(stored, raw[at + 8 : at + frames.HEADER_BYTES])] += 1
        at = raw.find(frames._MAGIC_BYTES, at + 1)
    return votes.most_common(1)[0][0] if votes else 0


def _before(crc: int, data: bytes) -> int:
    """The CRC of what stood before these bytes, from that of both together."""
    state = crc ^ 0xFFFFFFFF
    for byte in reversed(data):
        i = _CRC_TOP[state >> 24]
        state = ((state ^ _CRC_TABLE[i]) << 8 & 0xFFFFFFFF) | (i ^ byte)
    return state ^ 0xFFFFFFFF


def _crc_table() -> list[int]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (0xEDB88320 if value & 1 else 0)
        table.append(value)
    return table


_CRC_TABLE = _crc_table()
_CRC_TOP = {value >> 24: i for i, value in enumerate(_CRC_TABLE)}  # no two top bytes are equal


def _next_frame(file: LogFile, start: int, limit: int) -> int:
    """Offset of the first frame of this file at or behind `start`; `limit` if there is none."""
    for at in range(start, limit, _STEP):
        raw = bytes(file.read(at, min(_STEP + frames.HEADER_BYTES, limit - at)))
        found = frames.find_header(raw, 0, file.salt_crc)
        while found is not None:
            if _header_at(file, at + found[0], limit) is not None:
                return at + found[0]
            found = frames.find_header(raw, found[0] + 8, file.salt_crc)
    return limit


def _partial(file: LogFile, offset: int, limit: int) -> Frame | None:
    """A frame with an intact header; without body or without lengths where these are damaged."""
    header = _header_at(file, offset, limit)
    if header is None:
        return None
    start = frames.HEADER_BYTES
    bare = start + header.body_len + 8 * header.row_count
    raw = file.read(offset, min(bare, limit - offset))
    body = bytes(raw[start : start + header.body_len])
    if len(body) < header.body_len or crc32(body) != header.body_crc:
        body = b""
    lengths = np.empty(0, np.uint32)
    if header.row_count:
        table = frames.decode_table(raw, header, 0)
        if table is not None and sum(table["length"].tolist()) == header.rows_len:
            lengths = table["length"].copy()
    size = frames.padded(bare if file.header.log else bare + header.rows_len)
    return Frame(offset, offset + size, header, body, lengths)


def _first_lsn(file: LogFile) -> int:
    """LSN of the first frame that is left in a file; 0 if there is none."""
    size = file.size()
    header = _header_at(file, _next_frame(file, layout.HEADER_BYTES, size), size)
    return header.lsn if header is not None else 0


def _may_have_frames(index: Path) -> bool:
    """Whether an index log was in use."""
    try:
        with open(open_to_read(index), "rb") as file:
            file.seek(layout.HEADER_BYTES)
            return bool(file.read(frames.HEADER_BYTES).strip(b"\0"))
    except OSError:
        return False
