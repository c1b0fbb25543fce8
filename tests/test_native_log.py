"""The log as native code writes and reads it, against Python; adds of many threads together."""

from __future__ import annotations

import errno
import os
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from expbuf_core import Experience, ExperienceBuffer, alike, codec, frames
from expbuf_core import control as c
from expbuf_core.contracts import (
    LoggedOperation,
    LoggedRun,
    Operation,
    Stamped,
    behind,
    last_of,
    one_by_one,
)
from expbuf_core.crc import crc32
from expbuf_core.errors import CorruptionError, FormatVersionError, StorageError
from expbuf_core.native import native, why_not
from expbuf_core.state import State, runs
from expbuf_core.testing.faults import FaultyFileSystem
from expbuf_file import layout
from expbuf_file.logfile import BadFrame, LogFile

pytestmark = pytest.mark.skipif(native is None, reason=f"no native code: {why_not}")

CONFIG: dict[str, Any] = {"max_size": 10_000, "index": {"backend": "exact", "builder": "off"}}


# ---------------------------------------------------------------- the log


def filled(path: Path, rng: np.random.Generator, n: int = 150, **settings: Any) -> list[Experience]:
    """Experiences in a buffer, added by several threads, so that some share an operation."""
    vectors = rng.standard_normal((n, 2, 8)).astype(np.float32)
    given = [
        Experience(
            v_embed=v,
            q_embed=q,
            question=f"question {i} é" * (1 + i % 3 * (i > 60)),
            answer={"i": i},
            tags=("t",) if i % 50 == 7 else (),
            key=f"k{i}" if i % 60 == 3 else None,
            rewards=i / n if i % 5 else None,
        )
        for i, (v, q) in enumerate(vectors)
    ]
    with ExperienceBuffer.open(path, **{**CONFIG, **settings}) as buffer:
        buffer.add(given[0])
        assert buffer._session.commit_log._native is not None
        ids = {buffer.add(experience): i for i, experience in enumerate(given[1:50], 1)}
        threads = [
            threading.Thread(
                target=lambda k=k: ids.update(
                    {buffer.add(given[i]): i for i in range(50 + k, n, 5)}
                )
            )
            for k in range(5)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for id_, i in ids.items():
            found = buffer.get(id_)
            assert (found.question, found.answer) == (given[i].question, given[i].answer)
            assert (found.key, found.tags) == (given[i].key, given[i].tags)
            np.testing.assert_array_equal(found.v_embed, vectors[i, 0])
    return given


def check_frames(folder: Path) -> tuple[int, int]:
    """See that the logs are what Python would write; how many adds, and how many rows of theirs."""
    adds = rows_added = 0
    for number in layout.numbers(folder, layout.DATA):
        logs = [LogFile(folder, log, number, None) for log in (layout.DATA, layout.INDEX)]
        data, index = (log.path.read_bytes() for log in logs)
        index_at = layout.HEADER_BYTES
        for frame in logs[0].frames(layout.HEADER_BYTES, logs[0].size(), rows=True):
            if isinstance(frame, BadFrame) or frame.header.kind == frames.LOG_END:
                break
            header, body, lengths = frame.header, frame.body, frame.lengths
            rows_at = header.rows_offset
            rows = bytearray(data[rows_at : rows_at + header.rows_len])
            crcs = codec.content_crcs(rows, lengths)
            seals = frames.stamp_rows(rows, lengths, crcs, header.first_id)
            operation = Operation(header.kind, body, crc32(body), bytes(rows), lengths, seals)
            parts, index_parts, size, index_size = frames.encode(
                Stamped(header.lsn, header.first_id, operation),
                salt=logs[0].header.salt,
                epoch=number,
                durable_before=header.durable_before,
                data_offset=frame.offset,
            )
            assert data[frame.offset : frame.offset + size] == b"".join(map(bytes, parts))
            found = index[index_at : index_at + index_size]
            assert found == b"".join(map(bytes, index_parts))
            index_at += index_size
            if header.kind == codec.ADD:
                adds += 1
                rows_added += len(lengths)
                assert codec.encode_add(codec.decode_add(body)) == body
    return adds, rows_added


@pytest.mark.parametrize("durability", ["sync", "group", "os"])
def test_frames_are_what_python_would_write(
    durability: str, tmp_path: Path, rng: np.random.Generator
) -> None:
    filled(tmp_path / "b", rng, durability=durability)
    assert check_frames(tmp_path / "b")[1] == 150


def scanned(log: LogFile, *, rows: bool, start: int) -> tuple[list[Any], int]:
    """All that can be read of a log file, and where that ends."""
    found: list[Any] = []
    at, limit = start, log.size()
    while True:
        items, after = log.alike(at, limit, rows=rows)
        if not items:
            return found, at
        for operation in one_by_one(iter(items)):
            found.append(
                (*operation[:3], bytes(operation.body), operation.location, list(operation.lengths))
            )
        at = after


@pytest.mark.parametrize("log", [layout.DATA, layout.INDEX])
def test_scanning_whole_and_damaged(
    log: str, tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "b"
    filled(folder, rng)
    number = max(layout.numbers(folder, log))
    path = layout.path_of(folder, log, number)
    whole = path.read_bytes()
    begin = LogFile(folder, log, number, None).begin()
    assert begin is not None
    runs = []

    class Counting:
        @staticmethod
        def run(*args: Any) -> Any:
            assert native is not None
            found = native.run(*args)
            runs.append(found is not None)
            return found

    for case in range(80):
        raw = bytearray(whole)
        at = int(rng.integers(layout.HEADER_BYTES, len(raw)))
        if case % 4 == 1:
            raw[at] ^= 1 << int(rng.integers(8))
        elif case % 4 == 2:
            raw[at : at + 64] = bytes(len(raw[at : at + 64]))
        elif case % 4 == 3:
            del raw[at:]
        path.write_bytes(raw)
        for rows in (log == layout.DATA, False):
            results = []
            for code in (Counting, None):
                monkeypatch.setattr(alike, "native", code)
                results.append(
                    scanned(LogFile(folder, log, number, None), rows=rows, start=begin.end)
                )
            assert results[0] == results[1]
    assert sum(runs) > 80


# ---------------------------------------------------------------- logs by hand

SALT = bytes(range(16))
NUMBER = 3  # of the file, and its epoch
NO_ROWS = np.empty(0, np.uint32)


def framed(
    lsn: int,
    kind: int,
    first_id: int,
    body: bytes,
    rows: list[bytes],
    place: int,
    /,
    **lies: Any,
) -> tuple[bytes, bytes]:
    """A frame for both logs, of rows that have no header yet; its checksums are right, lies or not.

    What the header says instead is named as in `frames.Header`; `table`: lengths of the rows;
    `padding`: what stands behind.
    """
    ids = [(first_id + i) % (1 << 64) for i in range(len(rows))]
    contents = [crc32(row) for row in rows]
    seals = [crc32(struct.pack("<Q", id_), crc) for id_, crc in zip(ids, contents, strict=True)]
    stored = [
        struct.pack("<QII", *head) + row
        for *head, row in zip(ids, contents, seals, rows, strict=True)
    ]
    lengths = lies.pop("table", [len(row) for row in stored])
    table = b"".join(map(struct.Struct("<II").pack, lengths, seals))
    padding = lies.pop("padding", b"\0")
    said = {
        "lsn": lsn,
        "durable_before": 0,
        "data_offset": place,
        "first_id": first_id,
        "epoch": NUMBER,
        "kind": kind,
        "flags": 0,
        "body_len": len(body),
        "body_crc": crc32(body),
        "row_count": len(lengths),
        "table_crc": crc32(table) if lengths else 0,
        "rows_len": sum(lengths) % (1 << 64),
        **lies,
    }
    covered = struct.pack("<QQQQIHHIIIIQ", *said.values())
    head = struct.pack("<II", frames.MAGIC, crc32(covered, crc32(SALT))) + covered
    both = [head + body + table + b"".join(stored), head + body + table]
    return both[0] + padding * (-len(both[0]) % 8), both[1] + padding * (-len(both[1]) % 8)


class ByHand:
    """Two log files, in which anything may stand."""

    def __init__(self, folder: Path, first_lsn: int = 1) -> None:
        self.folder, self.lsn, self.next_id = folder, first_lsn, 1
        self.bytes = {layout.DATA: bytearray(), layout.INDEX: bytearray()}

    def put(
        self, kind: int, body: bytes, rows: list[bytes], /, first_id: int | None = None, **lies: Any
    ) -> None:
        """One frame; see `framed`."""
        first = self.next_id if first_id is None else first_id
        place = layout.HEADER_BYTES + len(self.bytes[layout.DATA])
        data, index = framed(self.lsn, kind, first if rows else 0, body, rows, place, **lies)
        self.bytes[layout.DATA] += data
        self.bytes[layout.INDEX] += index
        self.lsn = (self.lsn + 1) % (1 << 64)
        if rows and first_id is None:
            self.next_id += len(rows)

    def add(self, rng: np.random.Generator, n: int, **body: Any) -> None:
        """An add of n rows."""
        self.put(codec.ADD, add_body(rng, n, **body), some_rows(rng, n))

    def file(self, log: str, damage: Callable[[bytearray], None] | None = None) -> LogFile:
        """With room behind what was put, unless the damage takes it."""
        raw = bytearray(self.bytes[log]) + bytes(4096)
        if damage is not None:
            damage(raw)
        size = layout.HEADER_BYTES + len(raw)
        which = (layout.DATA, layout.INDEX).index(log)
        header = layout.FileHeader(which, NUMBER, size, bytes(16), SALT, 0)
        path = layout.path_of(self.folder, log, NUMBER)
        path.write_bytes(layout.encode_header(header).ljust(layout.HEADER_BYTES, b"\0") + raw)
        return LogFile(self.folder, log, NUMBER, None)


def some_rows(rng: np.random.Generator, n: int) -> list[bytes]:
    return [rng.bytes(int(size)) for size in rng.integers(0, 90, n)]


def add_body(
    rng: np.random.Generator,
    n: int,
    dim: int = 4,
    representation: int = 0,
    labels: dict[str, list[Any]] | None = None,
) -> bytes:
    columns = rng.standard_normal((4, n))
    return codec.encode_add(
        codec.AddBody(
            columns[0],
            np.where(columns[1] > 0, columns[1], np.nan),
            columns[2].astype(np.float32),
            columns[3].astype(np.float32),
            rng.standard_normal((n, dim)).astype(np.float32),
            labels,
            representation,
        )
    )


class Read(NamedTuple):
    """What was read: operations as tuples, where they end, how they came, and what stopped it."""

    operations: list[tuple[Any, ...]]
    end: int
    items: list[Any]
    error: str


def plainly(item: LoggedOperation) -> tuple[Any, ...]:
    return (*item[:3], bytes(item.body), item.location, item.lengths.tolist())


def read_by(
    code: Any,
    monkeypatch: pytest.MonkeyPatch,
    log: LogFile,
    *,
    rows: bool,
    lsn: int | None = None,
    until_lsn: int = (1 << 64) - 1,
) -> Read:
    """All that can be read of a log, by native code or by Python, and by whom one by one."""
    monkeypatch.setattr(alike, "native", code)
    items: list[Any] = []
    at, limit, error = layout.HEADER_BYTES, log.size(), ""
    while True:
        some, after = log.alike(at, limit, rows=rows, lsn=lsn, until_lsn=until_lsn)
        if not some:
            found = log.frame(at, limit, rows=rows)
            if isinstance(found, BadFrame):
                error = f"{found.reason} at {found.at}"
                break
            if (
                found.header.kind >= frames.LOG_BEGIN
                or found.header.lsn > until_lsn
                or found.header.lsn != (found.header.lsn if lsn is None else lsn)
            ):
                break
            some, after = [log.operation(found)], found.end
        items += some
        at, lsn = after, last_of(some[-1]) + 1
    return Read([plainly(item) for item in one_by_one(items)], at, items, error)


def several_kinds(log: ByHand, rng: np.random.Generator, n: int) -> None:
    """Stretches of operations of a kind, as a buffer would write them."""
    representation, receipts = 0, [b"", *(bytes([i]) * 16 for i in range(1, 6))]

    def put(operation: Operation) -> None:
        log.put(operation.kind, bytes(operation.body), [])

    def settings() -> None:
        changed = {"max_size": 300, "receipts_kept": 4, "representation": representation}
        put(codec.encode_settings({"metric": "cosine", **changed}))

    settings()
    until = log.lsn + n
    while log.lsn < until:
        kind, stretch = int(rng.integers(12)), int(rng.choice((1, 2, 5, 20, 40)))
        if kind == 0:
            representation += 1
            settings()
            continue
        for i in range(stretch):
            some = rng.integers(max(0, log.next_id - 300), log.next_id + 3, 3).astype(np.int64)
            if kind < 5:
                rows = 1 if kind == 1 else int(rng.integers(1, 41))
                late = representation - int(kind == 4 and i % 3 == 0 and representation > 0)
                tags = [["t"] if j % 2 else [] for j in range(rows)]
                labels = {"tags": tags, "keys": [None] * rows} if kind == 3 and i % 4 == 3 else None
                log.add(rng, rows, dim=4 + 2 * late, representation=late, labels=labels)
            elif kind < 7:
                put(codec.encode_priority(some, rng.random(3, np.float32)))
            elif kind < 9:
                receipt, issued = receipts[rng.integers(6)], int(rng.integers(log.lsn))
                credit = rng.random(3, np.float32)
                put(codec.encode_outcome(codec.OutcomeBody(receipt, issued, True, some, credit)))
            elif kind == 9:
                put(codec.encode_remove(some[:1]))
            else:
                put(codec.encode_reward(some, rng.random(3), rng.random(3, np.float32), None))


def same_state(one: State, other: State) -> None:
    (tree, columns), (other_tree, other_columns) = one.dump(), other.dump()
    assert tree == other_tree
    assert columns.keys() == other_columns.keys()
    for name, column in columns.items():
        np.testing.assert_array_equal(column, other_columns[name], err_msg=name)


def applied_together(items: list[Any]) -> State:
    """What becomes of a state by runs; with each, it is what its operations make one by one."""
    together, one_by_one_ = State(), State()
    for run in runs(iter(items)):
        operations = list(run.operations()) if isinstance(run, LoggedRun) else run
        changes = [one_by_one_.apply(operation) for operation in operations]
        change = together.apply_run(run)
        assert change.refused == tuple(lsn for each in changes for lsn in each.refused)
        if change.added is not None:
            parts = [(c.added, c.vectors) for c in changes if c.added is not None]
            assert change.added.tolist() == np.concatenate([ids for ids, _ in parts]).tolist()
            if len({vectors.shape[1] for _, vectors in parts if vectors is not None}) == 1:
                vectors = np.concatenate([of for _, of in parts if of is not None])
                np.testing.assert_array_equal(change.vectors, vectors)
        same_state(together, one_by_one_)
    return together


@pytest.mark.parametrize("seed", range(3))
def test_adds_of_any_size_among_others(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read and applied together, they are what they are one by one."""
    rng = np.random.default_rng(seed)
    log = ByHand(tmp_path)
    several_kinds(log, rng, 500)
    for name, rows in ((layout.DATA, True), (layout.DATA, False), (layout.INDEX, False)):
        file = log.file(name)
        natively = read_by(native, monkeypatch, file, rows=rows, lsn=1)
        adds = [item for item in natively.items if isinstance(item, codec.LoggedAdds)]
        assert max(map(len, adds)) > 10
        assert max(int(run.counts.max()) for run in adds) > 20
        plain = read_by(None, monkeypatch, file, rows=rows, lsn=1)
        assert natively.operations == plain.operations
        assert natively.end == plain.end
        assert [operation[0] for operation in plain.operations] == list(range(1, log.lsn))
        state = applied_together(natively.items)
        assert state.lsn == log.lsn - 1
        same_state(state, applied_together(plain.items))


@pytest.mark.parametrize("name", [layout.DATA, layout.INDEX])
def test_adds_of_any_size_damaged_or_bounded(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut, zeroed or changed, or read from one LSN to another: the same, and it ends there too."""
    rng = np.random.default_rng(7)
    log = ByHand(tmp_path)
    several_kinds(log, rng, 200)
    size, ends = len(log.bytes[name]), set()
    for case in range(160):
        at, bit = int(rng.integers(size)), int(rng.integers(8))

        def damage(raw: bytearray, case: int = case, at: int = at, bit: int = bit) -> None:
            if case % 5 == 1:
                raw[at] ^= 1 << bit
            elif case % 5 == 2:
                raw[at : at + 64] = bytes(len(raw[at : at + 64]))
            elif case % 5 == 3:
                del raw[at:]
            elif case % 5 == 4:
                raw[at:] = bytes(len(raw) - at)

        file = log.file(name, damage)
        bounds: dict[str, int] = {"lsn": 1}
        if case % 2:
            bounds["until_lsn"] = int(rng.integers(1, log.lsn + 2))
        for rows in (name == layout.DATA, False):
            found = [read_by(c, monkeypatch, file, rows=rows, **bounds) for c in (native, None)]
            assert found[0].operations == found[1].operations
            assert (found[0].end, found[0].error) == (found[1].end, found[1].error)
            ends.add(found[0].end)
    assert len(ends) > 80


def adds_of(log: ByHand, monkeypatch: pytest.MonkeyPatch) -> codec.LoggedAdds:
    """All that is in a log, which is one run."""
    monkeypatch.setattr(alike, "native", native)
    file = log.file(layout.DATA)
    file.forget(1 << 22)
    (run,), _ = file.alike(layout.HEADER_BYTES, file.size(), rows=True)
    assert isinstance(run, codec.LoggedAdds)
    return run


def test_adds_that_became_one_come_apart_again(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`LoggedAdds` has their number and LSNs, and those behind each of them."""
    log = ByHand(tmp_path, first_lsn=41)
    bodies = []
    for n in (1, 3, 40, 1, 2):
        log.next_id += n  # numbers may be left out
        bodies.append(add_body(rng, n, representation=5))
        log.put(codec.ADD, bodies[-1], some_rows(rng, n))
    run = adds_of(log, monkeypatch)
    assert (len(run), run.first_lsn, run.last_lsn, last_of(run)) == (5, 41, 45, 45)
    whole = list(run.operations())
    assert [operation.body for operation in whole] == bodies
    assert [len(operation.lengths) for operation in whole] == [1, 3, 40, 1, 2]
    for lsn in range(38, 45):
        rest = run.behind(lsn)
        assert rest.first_lsn == max(41, lsn + 1)
        assert (len(rest), rest.last_lsn) == (min(45 - lsn, 5), 45)
        wanted = [plainly(operation) for operation in whole if operation.lsn > lsn]
        assert [plainly(operation) for operation in rest.operations()] == wanted
        for again in range(lsn, 45):
            wanted = [plainly(operation) for operation in whole if operation.lsn > again]
            assert [plainly(each) for each in rest.behind(again).operations()] == wanted
    assert list(behind([run], 45)) == []
    assert len(run.behind(45)) == 0


def test_an_add_of_many_rows_and_many_of_one(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = ByHand(tmp_path)
    for n in (1, 10_000, *[1] * 3000):
        log.add(rng, n)
    file = log.file(layout.DATA)
    file.forget(1 << 22)
    natively = read_by(native, monkeypatch, file, rows=True, lsn=1)
    assert natively.operations == read_by(None, monkeypatch, file, rows=True, lsn=1).operations
    assert len(natively.operations) == 3002
    assert any(isinstance(i, codec.LoggedAdds) and i.counts.max() == 10_000 for i in natively.items)
    body = bytes(codec.encode_settings({"max_size": 4000}).body)
    settings = LoggedOperation(0, codec.SETTINGS, 0, body, 0, NO_ROWS)
    assert len(applied_together([settings, *natively.items]).live_ids()) == 4000


def test_adds_behind_another_operation_are_still_joined(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = ByHand(tmp_path)
    body = bytes(codec.encode_settings({"max_size": 4000}).body)
    for _ in range(3):
        log.put(codec.SETTINGS, body, [])
        log.add(rng, 1)
        for n in range(2, 12):
            log.add(rng, n)
    file = log.file(layout.INDEX)
    natively = read_by(native, monkeypatch, file, rows=False, lsn=1)
    joined = [len(item) for item in natively.items if isinstance(item, codec.LoggedAdds)]
    assert joined == [10] * 3
    assert natively.operations == read_by(None, monkeypatch, file, rows=False, lsn=1).operations


def test_adds_of_other_representations_or_dimensions_are_not_joined(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They may stand side by side: one may come too late for a change of the representation."""
    log = ByHand(tmp_path)
    for representation in (0, 1, 1, 0):
        log.add(rng, 3, representation=representation)
    log.add(rng, 3, dim=5)
    file = log.file(layout.INDEX)
    natively = read_by(native, monkeypatch, file, rows=False, lsn=1)
    assert [len(item) for item in natively.items] == [1, 2, 1, 1]
    assert natively.operations == read_by(None, monkeypatch, file, rows=False, lsn=1).operations


# What the header of a frame may say, and its table; checksums are right.
LIES: dict[str, list[Any]] = {
    "row_count": [0, 2, 3, frames.MAX_ROWS + 1, 1 << 29, (1 << 32) - 1],
    "body_len": [0, 15, 16, (1 << 31) - 1, (1 << 32) - 1],
    "rows_len": [
        *(0, 1, 1 << 32, (1 << 40) - 1, 1 << 40, (1 << 63) - 1, 1 << 63),
        *((1 << 64) - back for back in (1, 8, 72, 200)),
    ],
    "data_offset": [0, (1 << 40) - 1, 1 << 40, *range((1 << 63) - 1, (1 << 63) + 1), (1 << 64) - 1],
    "first_id": [0, (1 << 62) - 1, 1 << 62, *range((1 << 63) - 2, (1 << 63) + 1), (1 << 64) - 1],
    "lsn": [0, 1 << 63, (1 << 64) - 1],
    "kind": [0, 1, 3, 0xEF, 0xF0, 0xFFFF],
    "table": [[0] * 3, [(1 << 32) - 1] * 3, [15, 17, 30], [16, 16, (1 << 32) - 1], []],
    "epoch": [0, (1 << 32) - 1],
    "padding": [b"x"],
}


def lying_bodies(rng: np.random.Generator) -> list[bytes]:
    columns = add_body(rng, 3)[16:]
    heads = [
        *((3, 4, 0, 0), (3, 4, 0, 1), (3, 4, (1 << 32) - 1, 0), (2, 4, 0, 0), (0, 4, 0, 0)),
        *((3, 0, 0, 0), (0, 0, 0, 0), (3, 1 << 24, 0, 0), ((1 << 32) - 1, (1 << 32) - 1, 0, 0)),
        # 24 + 4 * dim, or n times that, is 2 ** 32 or 2 ** 64 and a little more
        *((1, (1 << 30) - 6, 0, 0), (3, (1 << 30) + 4, 0, 0), (1 << 30, (1 << 32) - 2, 0, 0)),
    ]
    packed = [struct.pack("<IIII", *head) for head in heads]
    return [b"", bytes(15), *packed, *(head + columns for head in packed), packed[5] + bytes(72)]


def hostile(rng: np.random.Generator) -> Iterator[tuple[bytes, int, dict[str, Any]]]:
    """Bodies, numbers of rows, and what else is said of them."""
    for name, values in LIES.items():
        for value in values:
            for n in (3, 1, 0):
                said = value[:n] if name == "table" else value
                yield (add_body(rng, n) if n else b"body"), n, {name: said}
    for low in (0, 3 * ((1 << 32) - 1) % (1 << 32)):  # the sum of the lengths, in 32 bits
        yield add_body(rng, 3), 3, {"table": [(1 << 32) - 1] * 3, "rows_len": low}
    for body in lying_bodies(rng):
        for n in (0, 1, 3):
            yield body, n, {}


def test_behind_the_last_lsn_there_is_none(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    for body in (None, b"of another kind"):
        log = ByHand(tmp_path, first_lsn=(1 << 64) - 20)
        for _ in range(40):
            if body is None:
                log.add(rng, 2)
            else:
                log.put(codec.REMOVE, body, [])
        file = log.file(layout.DATA)
        found = [read_by(code, monkeypatch, file, rows=True) for code in (native, None)]
        assert [len(each.operations) for each in found] == [20, 20]
        assert found[0][:2] == found[1][:2]


SMALL = bytes(codec.encode_settings({"max_size": 50}).body)


def became(items: list[Any]) -> tuple[str, State]:
    """Why a state takes no more, or "", and how far it came."""
    state = State()
    state.apply(LoggedOperation(0, codec.SETTINGS, 0, SMALL, 0, NO_ROWS))
    try:
        for run in runs(iter(items)):
            state.apply_run(run)
    except (CorruptionError, FormatVersionError) as exc:
        return type(exc).__name__, state
    return "", state


def test_lies_with_right_checksums(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, little_memory: None
) -> None:
    """Native code and Python read the same of them, or nothing, and applying it is the same."""
    taken = refused = 0
    for body, n, lies in hostile(rng):
        for times in (1, 20):
            log = ByHand(tmp_path)
            log.add(rng, 1)
            log.add(rng, 3)
            for _ in range(times):
                log.put(codec.ADD, body, some_rows(rng, n), **lies)
            log.add(rng, 1)
            log.add(rng, 3)
            for name, rows, lsn in (
                (layout.DATA, True, 1),
                (layout.DATA, False, 1),
                (layout.INDEX, False, None),
            ):
                file, case = log.file(name), (lies, body[:16], len(body), n, times, name, rows, lsn)
                found = [
                    read_by(code, monkeypatch, file, rows=rows, lsn=lsn) for code in (native, None)
                ]
                assert found[0].operations == found[1].operations, case
                assert (found[0].end, found[0].error) == (found[1].end, found[1].error), case
                why, state = became(found[0].items)
                for other in (found[1].items, list(one_by_one(iter(found[0].items)))):
                    assert became(other)[0] == why, case
                    if not why:
                        same_state(state, became(other)[1])
                whole = not why and len(found[0].operations) == times + 4
                taken, refused = taken + whole, refused + (not whole)
    assert taken > 50
    assert refused > 200


# ---------------------------------------------------------------- together

THREADS = 8
TIMEOUT_S = 30.0


class Disk(FaultyFileSystem):
    """A sync lasts until it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.syncs, self.held, self.go_on = 0, threading.Event(), threading.Event()
        self.go_on.set()

    def fdatasync(self, fd: int) -> None:
        self.syncs += 1
        self.held.set()
        assert self.go_on.wait(TIMEOUT_S)
        super().fdatasync(fd)


def plain(serial: int, **fields: Any) -> Experience:
    vector = np.random.default_rng(serial).standard_normal(8).astype(np.float32)
    return Experience(v_embed=vector, q_embed=vector, answer=serial, **fields)


class Crowd:
    """Threads that add while the first of them waits for the disk."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.disk = Disk()
        self.buffer = ExperienceBuffer.open(folder, **CONFIG, filesystem=self.disk, **settings)
        self.buffer.add(plain(0))
        self.results: dict[int, int | BaseException] = {}
        self.threads: list[threading.Thread] = []

    def add(self, experience: Experience) -> None:
        def run() -> None:
            serial: Any = experience.answer
            try:
                self.results[serial] = self.buffer.add(experience)
            except BaseException as exc:
                self.results[serial] = exc

        self.threads.append(threading.Thread(target=run))
        self.threads[-1].start()

    def gather(
        self, experiences: list[Experience], meanwhile: Callable[[], object] | None = None
    ) -> None:
        """Until all have come: the first is being synced, and something done before the others."""
        log = self.buffer._session.commit_log._native
        assert log is not None
        before = len(self.results)
        self.disk.held.clear()
        self.disk.go_on.clear()
        self.add(plain(100 + len(self.threads)))
        assert self.disk.held.wait(TIMEOUT_S)
        if meanwhile is not None:
            meanwhile()
        for experience in experiences:
            self.add(experience)
        deadline = time.monotonic() + TIMEOUT_S
        while log.inside + len(self.results) - before < 1 + len(experiences):
            assert time.monotonic() < deadline
            time.sleep(1e-3)

    def disperse(self) -> None:
        self.disk.go_on.set()
        for thread in self.threads:
            thread.join(TIMEOUT_S)
            assert not thread.is_alive()


def test_one_sync_for_all_that_came_meanwhile(tmp_path: Path) -> None:
    crowd = Crowd(tmp_path / "b")
    before = crowd.disk.syncs
    tagged = [plain(i, tags=("t",), key=f"k{i}") for i in range(1, 3)]
    crowd.gather(tagged + [plain(i) for i in range(3, 1 + THREADS)])
    words, deadline = crowd.buffer._session.control.words, time.monotonic() + TIMEOUT_S
    while words[c.NEXT_ID] < THREADS + 2:  # appended, all of them, beside the first one's sync
        assert time.monotonic() < deadline
        time.sleep(1e-3)
    crowd.disperse()
    assert crowd.disk.syncs - before == 2  # of the first, and of the others
    with crowd.buffer as buffer:
        assert sorted(map(str, crowd.results.values())) == sorted(map(str, range(1, THREADS + 2)))
        for serial, id_ in crowd.results.items():
            assert isinstance(id_, int)
            assert buffer.get(id_).answer == serial
            assert buffer.get(id_).key == (f"k{serial}" if serial < 3 else None)
        assert len(buffer) == THREADS + 2
    with ExperienceBuffer.open(tmp_path / "b") as again:
        assert len(again) == THREADS + 2


def test_many_that_come_again_share_operations(tmp_path: Path) -> None:
    """How many, depends on how many there were at the end of the sync before: tried some times."""
    crowd = Crowd(tmp_path / "b")
    operations = rows = round_ = 0
    while operations == rows and round_ < 10:
        crowd.gather([plain(i + 10 * round_) for i in range(1, 1 + THREADS)])
        crowd.disperse()
        round_ += 1
        operations, rows = check_frames(tmp_path / "b")
        assert rows == 1 + round_ * (THREADS + 1)
    assert operations < rows
    assert sorted(map(int, crowd.results.values())) == list(range(1, rows))  # type: ignore[arg-type]
    crowd.buffer.close()


def test_a_sync_that_fails_fails_for_all(tmp_path: Path) -> None:
    crowd = Crowd(tmp_path / "b")
    crowd.gather([plain(i) for i in range(1, THREADS)])
    crowd.disk.fail("fdatasync")
    crowd.disperse()
    crowd.disk.clear()
    with crowd.buffer as buffer:
        failed = {k for k, v in crowd.results.items() if isinstance(v, StorageError)}
        assert failed
        assert all("sync" in str(crowd.results[serial]) for serial in failed)
        later = buffer.add(plain(200))
        assert buffer.stats()["log_retirements"] >= 1
        stored = {e.answer for e in buffer}
        assert {k for k in crowd.results if k not in failed} <= stored
        assert not failed & stored
        assert buffer.get(later).answer == 200
    with ExperienceBuffer.open(tmp_path / "b") as again:
        assert {e.answer for e in again} == stored


class Interrupt(BaseException):
    """As KeyboardInterrupt is: no Exception."""


def test_an_interrupt_is_for_the_thread_that_it_came_to(tmp_path: Path) -> None:
    crowd = Crowd(tmp_path / "b")
    crowd.gather([plain(i) for i in range(1, 1 + THREADS)])
    sync, wanted = crowd.disk.fdatasync, crowd.disk.syncs + 1

    def fdatasync(fd: int) -> None:
        if crowd.disk.syncs == wanted - 1:  # of all that came meanwhile
            crowd.disk.syncs += 1
            raise Interrupt
        sync(fd)

    crowd.disk.fdatasync = fdatasync  # type: ignore[method-assign]
    crowd.disperse()
    with crowd.buffer as buffer:
        raised = [x for x in crowd.results.values() if isinstance(x, BaseException)]
        assert sum(isinstance(x, Interrupt) for x in raised) == 1
        assert len(raised) > 1
        for other in raised:
            assert isinstance(other, Interrupt | StorageError)
            assert isinstance(other, Interrupt) or "was interrupted" in str(other)
        buffer.add(plain(200))


def test_what_does_not_fit_the_disk_takes_no_others_along(tmp_path: Path) -> None:
    crowd = Crowd(tmp_path / "b")
    crowd.gather([plain(i) for i in range(1, 4)], lambda: crowd.disk.fail("pwrite"))
    crowd.disperse()
    assert crowd.disk.faults[0].seen
    crowd.disk.clear()
    with crowd.buffer as buffer:
        failed = [v for v in crowd.results.values() if isinstance(v, Exception)]
        assert len(failed) <= 1
        assert len(buffer) == 5 - len(failed)


def test_nobody_is_left_among_who_watch(tmp_path: Path) -> None:
    """There may be only so many: in the end all would sleep. On a slow disk nobody watches."""
    with ExperienceBuffer.open(tmp_path / "b", **CONFIG) as buffer:
        buffer.add(plain(0))
        log = buffer._session.commit_log._native
        assert log is not None

        def run() -> None:
            for serial in range(300):
                buffer.add(plain(serial))

        threads = [threading.Thread(target=run) for _ in range(THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(TIMEOUT_S)
            assert not thread.is_alive()
        assert log.watchers == 0


# ---------------------------------------------------------------- room that was only reserved

AHEAD = 1 << 20  # bytes of zeros


def of_a_large_log(folder: Path, **settings: Any) -> ExperienceBuffer:
    """A buffer with one experience, and 8 MiB for its first log."""
    sizes = {"initial_bytes": 8 * AHEAD, "segment_bytes": 8 * AHEAD}
    buffer = ExperienceBuffer.open(folder, **CONFIG, persistence={"file": sizes}, **settings)
    buffer.add(plain(0))
    return buffer


def long(serial: int) -> Experience:
    return plain(serial, question="?" * 16_000)


def ends(buffer: ExperienceBuffer) -> tuple[int, int]:
    """Of the data log, and of what of it was written ahead."""
    words = buffer._session.adapter._words  # type: ignore[attr-defined]
    return words[1], words[4]


def test_writes_as_far_ahead_as_python(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    def marks(name: str) -> list[tuple[int, int]]:
        with of_a_large_log(tmp_path / name) as buffer:
            return [(buffer.add(long(serial)), *ends(buffer))[1:] for serial in range(1, 200)]

    natively = marks("native")
    request.getfixturevalue("without_native_code")
    assert natively == marks("python")
    assert len({written for _, written in natively}) == 4
    assert all(end <= written <= end + AHEAD for end, written in natively)


def test_nobody_asks_python_for_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_python: list[object] = []
    with of_a_large_log(tmp_path / "b") as buffer:
        monkeypatch.setattr(
            ExperienceBuffer, "_add_in_python", lambda *args: in_python.append(args)
        )
        for serial in range(1, 200):
            buffer.add(long(serial))
        assert ends(buffer)[1] > 3 * AHEAD
    assert not in_python
    check_frames(tmp_path / "b")


@pytest.mark.parametrize("nth", [1, 2, 3], ids=["zeros", "data", "index"])
def test_a_fault_where_the_log_is_written_ahead(tmp_path: Path, nth: int) -> None:
    disk = FaultyFileSystem()
    with of_a_large_log(tmp_path / "b", filesystem=disk) as buffer:
        end, written = ends(buffer)
        serial = 0
        while written - end > 17_000:
            serial += 1
            buffer.add(long(serial))
            end, written = ends(buffer)
        disk.fail("pwrite", error=errno.ENOSPC, nth=nth, partial=0.5)
        disk.calls.clear()
        with pytest.raises(StorageError, match="write"):
            buffer.add(long(1000))
        assert disk.calls["pwrite"] >= nth
        disk.clear()
        assert ends(buffer)[0] == end
        later = buffer.add(long(2000))
        assert buffer.get(later).answer == 2000
        stored = [e.answer for e in buffer]
        assert stored == [*range(serial + 1), 2000]
    with ExperienceBuffer.open(tmp_path / "b") as again:
        assert [e.answer for e in again] == stored


def test_a_large_commit_is_not_written_twice(tmp_path: Path) -> None:
    """When threads share a commit depends on chance: tried until the log ends with such a one."""
    crowd = Crowd(tmp_path / "b", persistence={"file": {"initial_bytes": 32 * AHEAD}})
    round_, (end, written) = 0, ends(crowd.buffer)
    while end != written and round_ < 40:
        crowd.gather([plain(i, question="?" * 60_000) for i in range(1, 1 + THREADS)])
        crowd.disperse()
        round_ += 1
        end, written = ends(crowd.buffer)
        assert end <= written <= end + AHEAD
    assert end == written
    with crowd.buffer as buffer:
        buffer.add(plain(1000))
        assert ends(buffer)[1] == written + AHEAD
        assert len(buffer) == 2 + round_ * (THREADS + 1)
    check_frames(tmp_path / "b")


# ---------------------------------------------------------------- without it


def test_without_native_code(tmp_path: Path, rng: np.random.Generator) -> None:
    """The same folder, by a process that has none."""
    given = filled(tmp_path / "b", rng)
    code = (
        "import sys, numpy as np\n"
        "from expbuf_core import Experience, ExperienceBuffer\n"
        "from expbuf_core.native import native, why_not\n"
        "assert native is None and why_not == 'EXPBUF_NATIVE=0'\n"
        "with ExperienceBuffer.open(sys.argv[1], index={'builder': 'off'}) as buffer:\n"
        "    assert len(buffer) == 150, len(buffer)\n"
        "    v = np.ones(8, np.float32)\n"
        "    print(buffer.add(Experience(v_embed=v, q_embed=v, question='pure')))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "b")],
        env={**os.environ, "EXPBUF_NATIVE": "0"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    with ExperienceBuffer.open(tmp_path / "b", **CONFIG) as buffer:
        assert buffer.get(int(done.stdout)).question == "pure"
        assert len(buffer) == len(given) + 1
