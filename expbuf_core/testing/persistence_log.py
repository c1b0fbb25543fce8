"""What the contract suite for storage stands on: operations, folders, a stand-in for the core."""

from __future__ import annotations

import mmap
import random
import shutil
from collections.abc import Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from expbuf_core import codec, frames
from expbuf_core.contracts import (
    Appended,
    LoggedOperation,
    Operation,
    PersistenceAdapter,
    PersistenceContext,
    PersistenceProvider,
    Pin,
    Stamped,
    Words,
    one_by_one,
)
from expbuf_core.crc import crc32
from expbuf_core.errors import CorruptionError, FormatVersionError
from expbuf_core.filesystem import FileSystem
from expbuf_core.plugins import default_registry

IDS_A_COMMIT = 100_000
_NONE: NDArray[np.uint32] = np.empty(0, np.uint32)


# ---------------------------------------------------------------- operations


def operation(
    lsn: int, rows: int | None = None, *, row_bytes: int = 300, body_bytes: int = 200
) -> Stamped:
    """Operation `lsn`, always the same for the same arguments; every byte of it can be told.

    Args:
        lsn: Also decides the ids, `lsn * IDS_A_COMMIT` and on.
        rows: How many payloads; None: the LSN decides, often none.
        row_bytes: Payloads are that long at most.
        body_bytes: The same for the body.
    """
    draw = random.Random(lsn)
    body = draw.randbytes(draw.randrange(body_bytes + 1))
    count = draw.choice((0, 1, 1, 5, 0, 12)) if rows is None else rows
    if not count:
        kind = draw.choice((codec.REMOVE, codec.PRIORITY, codec.OUTCOME))
        return Stamped(lsn, 0, Operation(kind, body, crc32(body), b"", _NONE, _NONE))
    head = bytes(frames.ROW_HEADER_BYTES)
    contents = [head + draw.randbytes(draw.randrange(row_bytes + 1)) for _ in range(count)]
    content = bytearray().join(contents)
    lengths = np.array([len(row) for row in contents], np.uint32)
    first_id = lsn * IDS_A_COMMIT
    seals = frames.stamp_rows(content, lengths, codec.content_crcs(content, lengths), first_id)
    return Stamped(
        lsn, first_id, Operation(codec.ADD, body, crc32(body), bytes(content), lengths, seals)
    )


def alike(lsn: int, rows: int, *, row_bytes: int = 300) -> Stamped:
    """Operation `lsn`, of the kind and size of all others with as many payloads."""
    made = operation(lsn, rows, row_bytes=row_bytes)
    body = random.Random(lsn).randbytes(40)
    kind = codec.ADD if rows else codec.PRIORITY
    return made._replace(
        operation=made.operation._replace(kind=kind, body=body, body_crc=crc32(body))
    )


def relogged(lsn: int, rows: Sequence[bytes]) -> Stamped:
    """An operation that repeats payloads, each under the id that it has."""
    body = random.Random(lsn).randbytes(40)
    lengths = np.array([len(row) for row in rows], np.uint32)
    checked = [frames.check_row(row) for row in rows]
    seals = np.array([found[1] for found in checked if found is not None], np.uint32)
    return Stamped(
        lsn, 0, Operation(codec.RELOG, body, crc32(body), b"".join(rows), lengths, seals)
    )


def without_rows(lsn: int, body: bytes = b"") -> Stamped:
    """An operation with this body alone."""
    return Stamped(lsn, 0, Operation(codec.REMOVE, body, crc32(body), b"", _NONE, _NONE))


def rows_of(stamped: Stamped) -> list[bytes]:
    """The payloads of an operation."""
    data, found, at = bytes(stamped.operation.rows), [], 0
    for length in stamped.operation.lengths.tolist():
        found.append(data[at : at + length])
        at += length
    return found


def ids_of(stamped: Stamped) -> NDArray[np.int64]:
    """Their ids."""
    found = [frames.check_row(row) for row in rows_of(stamped)]
    return np.array([checked[0] for checked in found if checked is not None], np.int64)


def places_of(location: int, lengths: NDArray[np.uint32]) -> NDArray[np.int64]:
    """Where the payloads of an operation lie."""
    return location + np.cumsum(lengths, dtype=np.int64) - lengths


def assert_same(found: LoggedOperation, wanted: Stamped) -> None:
    """Check an operation that was read against the one that was written."""
    operation = wanted.operation
    assert found.lsn == wanted.lsn, f"lsn {found.lsn}, wanted {wanted.lsn}"
    assert found.kind == operation.kind, f"lsn {found.lsn}: kind {found.kind}"
    assert bytes(found.body) == bytes(operation.body), f"lsn {found.lsn}: another body"
    assert found.lengths.tolist() == operation.lengths.tolist(), f"lsn {found.lsn}: lengths"
    assert found.first_id == wanted.first_id, f"lsn {found.lsn}: first id {found.first_id}"
    assert 0 <= found.location < 1 << 63, f"lsn {found.lsn}: location {found.location}"


# ---------------------------------------------------------------- folders


def provider_of(given: str | PersistenceProvider) -> PersistenceProvider:
    """The provider that a suite names, or is."""
    if isinstance(given, str):
        return cast(PersistenceProvider, default_registry().get("persistence", given))
    return given


class Place:
    """A folder for one buffer, with the words that its processes share beside it.

    Args:
        root: An existing folder of the test's own.
        provider: Name of a backend, or the provider itself.
        settings: Its section of the configuration.
        name: Of the folder below `root`.
        fs: For all writing.
    """

    def __init__(
        self,
        root: Path,
        provider: str | PersistenceProvider,
        settings: Mapping[str, Any],
        *,
        name: str = "buffer",
        fs: FileSystem | None = None,
    ) -> None:
        self.root = root
        self.folder = root / name
        self.uuid = bytes(range(16))
        self.fs = fs or FileSystem()
        self._given = provider
        self._settings = settings
        self._adapters: list[PersistenceAdapter] = []
        self.folder.mkdir(exist_ok=True)
        path = root / f"{name}.words"
        if not path.exists():
            path.write_bytes(bytes(mmap.PAGESIZE))
        with open(path, "r+b") as file:
            self.words: Words = memoryview(mmap.mmap(file.fileno(), mmap.PAGESIZE)).cast("Q")

    @property
    def provider(self) -> PersistenceProvider:
        """The provider under test."""
        return provider_of(self._given)

    def adapter(
        self,
        *,
        fs: FileSystem | None = None,
        writable: bool = True,
        uuid: bytes | None = None,
        words: Words | None = None,
    ) -> PersistenceAdapter:
        """An adapter on the folder; `close` closes it, where the test has not."""
        provider = self.provider
        if isinstance(self._given, str):
            settings = default_registry().settings("persistence", self._given, self._settings)
        else:
            settings = provider.settings.model_validate(dict(self._settings))
        context = PersistenceContext(
            path=self.folder if "durable" in provider.capabilities else None,
            uuid=uuid or self.uuid,
            fs=fs or self.fs,
            words=self.words if words is None else words,
            writable=writable,
        )
        adapter = cast(PersistenceAdapter, provider.factory(settings, context))
        self._adapters.append(adapter)
        return adapter

    def forget(self) -> None:
        """Clear the words, as the first opener does before it recovers."""
        for i in range(8):
            self.words[i] = 0

    def close(self) -> None:
        """Close every adapter that was made; closing twice must do no harm."""
        while self._adapters:
            self._adapters.pop().close()

    def copy(self, name: str) -> Place:
        """The same folder under another name, with words of its own."""
        shutil.copytree(self.folder, self.root / name)
        return Place(self.root, self._given, self._settings, name=name, fs=self.fs)


class Core:
    """Plays the core for one adapter: numbers operations, and remembers what was written.

    Args:
        place: Where.
        adapter: In use; None: a new one.
        wrote: What is in the log, by LSN.
    """

    def __init__(
        self,
        place: Place,
        adapter: PersistenceAdapter | None = None,
        wrote: Mapping[int, Stamped] | None = None,
    ) -> None:
        self.place = place
        self.adapter = adapter or place.adapter()
        self.wrote: dict[int, Stamped] = dict(wrote or {})
        self.at: dict[int, Appended] = {}
        self.next_lsn = max(self.wrote, default=0) + 1
        self.durable = 0
        self._writes = False

    @property
    def last(self) -> int:
        """LSN of the last operation."""
        return max(self.wrote, default=0)

    def create(self) -> Core:
        """Begin with an empty log."""
        self.place.forget()
        self.adapter.create(self.next_lsn)
        self._writes = True
        return self

    def reopen(self, *, lsn: int | None = None, durable: int = 0) -> Core:
        """Another adapter recovers the folder, checks what it finds, and goes on at `lsn`."""
        self.adapter.close()
        self.place.forget()
        after = Core(self.place, wrote=self.wrote)
        after.recovers(durable=durable)
        after.next_lsn = lsn or self.last + 1
        after.adapter.start(after.next_lsn, self.last)
        after.durable = self.last
        after._writes = True
        return after

    def append(self, *stamped: Stamped) -> list[Appended]:
        """Append these operations (default: the next one) as one call."""
        items = list(stamped) or [operation(self.next_lsn)]
        places = self.adapter.append(items, self.durable)
        assert len(places) == len(items), "not one `Appended` for each operation"
        for item, at in zip(items, places, strict=True):
            self.wrote[item.lsn] = item
            self.at[item.lsn] = at
            self.next_lsn = item.lsn + 1
        return places

    def extend(self, count: int, **shape: Any) -> Core:
        """Append so many operations, one by one."""
        for _ in range(count):
            self.append(operation(self.next_lsn, **shape))
        return self

    def sync(self) -> Core:
        """Make all of it durable."""
        self.adapter.sync()
        self.durable = self.last
        return self

    def finish(self) -> Core:
        """Close in order."""
        self.sync()
        self.adapter.finish(self.last)
        self.adapter.close()
        return self

    # -- checking

    def recovers(
        self, after_lsn: int = 0, *, durable: int = 0, payloads: Container[int] | None = None
    ) -> list[LoggedOperation]:
        """Recover, and check that it yields exactly what was written behind `after_lsn`.

        An adapter that writes is never asked to recover: a reader does, in private.
        """
        if self._writes and "durable" in self.place.provider.capabilities:
            reader = Core(self.place, self.place.adapter(writable=False, words=[0] * 8), self.wrote)
            found = reader.recovers(after_lsn, durable=durable, payloads=payloads)
            reader.adapter.close()
            return found
        together = one_by_one(self.adapter.recover_alike(after_lsn, durable))
        self.agree(list(together), after_lsn, payloads)
        found = list(self.adapter.recover(after_lsn, durable))
        self.agree(found, after_lsn, payloads)
        return found

    def follows(self, after_lsn: int = 0, payloads: Container[int] | None = None) -> None:
        """The same for following; of operations that are not in `payloads`, these may be gone."""
        self.agree(list(self.adapter.follow(after_lsn).read(self.last)), after_lsn, payloads)
        together = self.adapter.follow(after_lsn).read_alike(self.last)
        self.agree(list(one_by_one(together)), after_lsn, payloads)

    def agree(
        self,
        found: Sequence[LoggedOperation],
        after_lsn: int = 0,
        payloads: Container[int] | None = None,
    ) -> None:
        """Check that these are all operations behind `after_lsn`, with their payloads."""
        wanted = sorted(lsn for lsn in self.wrote if lsn > after_lsn)
        assert [logged.lsn for logged in found] == wanted, (
            f"operations {_shown([logged.lsn for logged in found])}, wanted {_shown(wanted)}"
        )
        for logged in found:
            assert_same(logged, self.wrote[logged.lsn])
            if payloads is None or logged.lsn in payloads:
                self.payloads_agree(logged)

    def payloads_agree(self, logged: LoggedOperation) -> None:
        """Check that an operation's payloads can be read where it says they lie."""
        if not len(logged.lengths):
            return
        wanted = self.wrote[logged.lsn]
        pin = self.adapter.pin(
            ids_of(wanted), places_of(logged.location, logged.lengths), logged.lengths
        )
        for i, row in enumerate(rows_of(wanted)):
            assert bytes(pin.read(i)) == row, f"lsn {logged.lsn}: payload {i} is another one"

    def pin(
        self, lsns: Iterable[int], order: Sequence[int] | None = None
    ) -> tuple[Pin, list[bytes]]:
        """Pin the payloads of these operations of ours; the pin, and what it must hold."""
        ids: list[int] = []
        places: list[int] = []
        lengths: list[int] = []
        rows: list[bytes] = []
        for lsn in lsns:
            wanted = self.wrote[lsn]
            ids += ids_of(wanted).tolist()
            places += places_of(self.at[lsn].location, wanted.operation.lengths).tolist()
            lengths += wanted.operation.lengths.tolist()
            rows += rows_of(wanted)
        chosen = list(range(len(ids))) if order is None else list(order)
        pin = self.adapter.pin(
            np.array([ids[i] for i in chosen], np.int64),
            np.array([places[i] for i in chosen], np.int64),
            np.array([lengths[i] for i in chosen], np.uint32),
        )
        return pin, [rows[i] for i in chosen]

    def live(self, lsns: Iterable[int]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Ids and locations of the payloads of these operations, as `drop_below` wants them."""
        chosen = [lsn for lsn in sorted(lsns) if len(self.wrote[lsn].operation.lengths)]
        ids = [ids_of(self.wrote[lsn]) for lsn in chosen]
        places = [
            places_of(self.at[lsn].location, self.wrote[lsn].operation.lengths) for lsn in chosen
        ]
        none = np.empty(0, np.int64)
        return np.concatenate([none, *ids]), np.concatenate([none, *places])


def _shown(lsns: Sequence[int]) -> str:
    if len(lsns) <= 12:
        return str(list(lsns))
    return f"[{lsns[0]}, {lsns[1]}, …, {lsns[-1]}] ({len(lsns)})"


# ---------------------------------------------------------------- damage


def outcome(place: Place, wrote: Mapping[int, Stamped], *, durable: int | None = None) -> str:
    """What recovering a folder comes to: "same", or "refused" with a proper error.

    `durable` is what recovering is told to be durable; None: all of it.

    Raises:
        AssertionError: It yields something else than what was written.
    """
    place.forget()
    core = Core(place, place.adapter(writable=False), wrote)
    try:
        core.recovers(durable=core.last if durable is None else durable)
    except (CorruptionError, FormatVersionError) as exc:
        if isinstance(exc, CorruptionError) and not exc.path:
            raise AssertionError(f"the error names no file: {exc}") from exc
        return "refused"
    finally:
        place.close()
    return "same"


def image(files: Iterable[Path]) -> dict[Path, bytes]:
    """Content of these files."""
    return {path: path.read_bytes() for path in files}
