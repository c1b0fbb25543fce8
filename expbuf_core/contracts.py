"""What a plugin promises, and what it may rely on.

Four kinds of plugin: storage (`PersistenceAdapter`), vector index (`IndexBackend`), initial
priority (`PriorityScorer`) and embedding fusion (`EmbeddingFusion`). Each is offered as a provider:
frozen data with a name, the version of the contract it was written for, a factory and a pydantic
model of its settings. `expbuf_core.testing` has a suite for each contract.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel

from expbuf_core.errors import CorruptionError, StorageError, StorageFull

if TYPE_CHECKING:
    from expbuf_core.filesystem import FileSystem

API_VERSION = 1
"""Version of the contracts in this module; a provider states the one it was written for."""

Buffer = bytes | bytearray | memoryview


class Words(Protocol):
    """64-bit words by number; a load or a store of one is never torn."""

    def __getitem__(self, index: int, /) -> int: ...

    def __setitem__(self, index: int, value: int, /) -> None: ...


@dataclass(frozen=True)
class HostInfo:
    """What a plugin is told about its host.

    Attributes:
        core_version: Version of expbuf-core.
        api_version: Version of the contracts that this core speaks.
    """

    core_version: str
    api_version: int


class NoSettings(BaseModel, extra="forbid"):
    """For a backend that has nothing to configure."""


@dataclass(frozen=True)
class _Provider:
    """A named backend.

    Attributes:
        name: Chosen in the configuration by this name: lower case, digits and underscores.
        api_version: Version of the contract the backend was written for; state it as a literal.
        factory: Makes the backend; see the subclass for its arguments.
        settings: Model of the section of the configuration that carries the backend's name.
        capabilities: Optional features that the backend has; see the subclass.
    """

    name: str
    api_version: int = field(kw_only=True)
    factory: Callable[..., Any] = field(kw_only=True)
    settings: type[BaseModel] = field(default=NoSettings, kw_only=True)
    capabilities: frozenset[str] = field(default=frozenset(), kw_only=True)


class PersistenceProvider(_Provider):
    """Offers a `PersistenceAdapter`: `factory(settings, context: PersistenceContext)`.

    Capabilities: "durable" (survives the process), "multiprocess" (several at once).
    """


class IndexProvider(_Provider):
    """Offers an `IndexBackend`: `factory(settings, context: IndexContext)`.

    Capabilities: "filter" (`IndexSegment.search` honours `allowed`; without it the core asks for
    more and filters itself), "verifies" (`IndexBackend.open` checks every byte of the file, and
    says what checksum all have, `IndexSegment.file_crc`; without either the core reads the file
    through and compares its checksum).
    """


class ScorerProvider(_Provider):
    """Offers a `PriorityScorer`: `factory(settings)`."""


class FusionProvider(_Provider):
    """Offers an `EmbeddingFusion`: `factory(settings)`."""


# ---------------------------------------------------------------- priority


@dataclass(frozen=True)
class ScoringBatch:
    """New experiences whose initial priority is wanted. All arrays have the same length n.

    Attributes:
        confidence: (n,) float32 in [0, 1].
        total_reward: (n,) float32; 0 where the reward is not known yet.
        reward_known: (n,) bool.
        probabilities: n entries, each None or a (classes,) float32 array that sums to 1.
        age: (n,) float32, seconds since the experience happened; 0 at insertion.
        metadata: n entries, each None or what the experience carries; or empty: none carries any.
    """

    confidence: NDArray[np.float32]
    total_reward: NDArray[np.float32]
    reward_known: NDArray[np.bool_]
    probabilities: Sequence[NDArray[np.float32] | None]
    age: NDArray[np.float32]
    metadata: Sequence[Mapping[str, Any] | None] = ()

    def __len__(self) -> int:
        return len(self.confidence)


class PriorityScorer(Protocol):
    """Gives new experiences their first priority.

    Called by several threads at once, outside all locks; must not change its arguments. What it
    returns is logged, so recovery never calls it.

    It may have a method `one` besides, which single adds ask first: the same for one experience,
    without arrays of one number. Its arguments are the entries of a `ScoringBatch` as Python
    numbers, by name; it returns what the batch would get, or None: ask with a batch.

        def one(self, *, confidence: float, total_reward: float, reward_known: bool,
                probabilities: NDArray[np.float32] | None, age: float,
                metadata: Mapping[str, Any] | None) -> float | None: ...
    """

    def __call__(self, batch: ScoringBatch) -> NDArray[np.floating[Any]]:
        """Return (n,) priorities, finite and not negative."""
        ...


# ---------------------------------------------------------------- fusion


class EmbeddingFusion(Protocol):
    """Makes one vector of the visual and the question embedding.

    A pure function of parts and settings, the same in every process and for every batch size up
    to rounding; called by several threads at once. Raise `version` when the results change.

    Attributes:
        version: Of the results; stored with the buffer.
    """

    version: int

    def output_dim(self, v_dim: int, q_dim: int) -> int:
        """Dimension of the result.

        A part that the buffer does not use has dimension 0.

        Raises:
            ValueError: These dimensions cannot be fused; the message says why.
        """
        ...

    def __call__(self, v: NDArray[np.float32], q: NDArray[np.float32]) -> NDArray[np.float32]:
        """Fuse (n, v_dim) and (n, q_dim) to (n, output_dim) float32, finite for finite parts.

        A query that lacks one part gives zeros for it.
        """
        ...


# ---------------------------------------------------------------- index


def _tell_nobody(used: str, reason: str) -> None:
    """What a context does that was made without a buffer."""


@dataclass(frozen=True)
class IndexContext:
    """What an index backend is made for.

    Attributes:
        dim: Dimension of the vectors.
        metric: "cosine" (the vectors come normalised: take the inner product), "inner_product"
            or "l2".
        seed: For whatever the backend draws at random.
        target_recall: Recall at 10 that an approximate index should reach.
        fallback: Names of the backends that may take this one's place, the most wanted first.
            Empty: what cannot be done as configured is an error.
        on_fallback: Called as `on_fallback(used, reason)` by a backend that goes on in another way
            instead of failing, `used` being one of `fallback`. Logs a warning and fires
            `expbuf_on_fallback`; from any thread, whatever locks it holds.
    """

    dim: int
    metric: str
    seed: int = 0
    target_recall: float = 0.95
    fallback: tuple[str, ...] = ()
    on_fallback: Callable[[str, str], None] = field(default=_tell_nobody, repr=False, compare=False)


class IndexSegment(ABC):
    """An immutable index, open for searching. Never changed after `build`.

    `search` is called by several threads at once, also in a forked child. A segment may be
    dropped while a search in another thread still holds it.

    Attributes:
        file_crc: CRC-32 of the whole file, as `IndexBackend.open` has read it; None: it has not.
            With the capability "verifies" it spares the core a pass over the file: one that is
            intact may still be another one.
    """

    file_crc: int | None = None

    @abstractmethod
    def search(
        self, queries: NDArray[np.float32], k: int, allowed: NDArray[np.uint8] | None
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Find the k most similar vectors for each query.

        Args:
            queries: (m, dim) float32, C-contiguous.
            k: At least 1; may exceed what the segment holds.
            allowed: None, or (ceil(n/8),) uint8: a bitmap with one bit a row, in the order given
                to `build`, least significant bit first; only set rows may be returned. Always None
                for a backend without the capability "filter".

        Returns:
            ids (m, k) int64 as given to `build`, padded with -1; similarities (m, k) float32,
            larger is closer under every metric (for L2 the negative squared distance), in falling
            order, padded with -inf.
        """

    def info(self) -> dict[str, Any]:
        """Facts worth showing (kind, parameters, bytes), JSON-like."""
        return {}

    def close(self) -> None:  # noqa: B027  (optional)
        """Free what the segment holds."""


class IndexBackend(ABC):
    """Builds immutable segments and opens them. The core owns freshness, removal and swapping."""

    @abstractmethod
    def build(self, ids: NDArray[np.int64], vectors: NDArray[np.float32], path: Path) -> None:
        """Write an index of these vectors to one new file.

        Args:
            ids: (n,) int64, rising, n at least 1.
            vectors: (n, dim) float32, row i belongs to ids[i]; may be a read-only memory map, which
                stays readable beside the segment (see `open`).
            path: A file that does not exist yet. The core syncs and renames it and stores a
                checksum, which is verified before `open`.
        """

    @abstractmethod
    def open(
        self, path: Path, ids: NDArray[np.int64], vectors: NDArray[np.float32]
    ) -> IndexSegment:
        """Open what `build` wrote.

        Args:
            path: The file, complete; verified, unless the backend says that it does so itself.
            ids: (n,) int64, as given to `build`.
            vectors: (n, dim) float32 memory map, as given to `build`: for exact re-ranking.
        """

    def after_fork(self) -> None:  # noqa: B027  (optional)
        """Called in a forked child before its first search."""


# ---------------------------------------------------------------- storage


class Operation(NamedTuple):
    """An operation that is about to be written.

    Attributes:
        kind: See `expbuf_core.codec`.
        body: Everything that replicas need to apply it.
        body_crc: CRC-32 of the body.
        rows: Payloads, one after the other; empty for most kinds.
        lengths: (n,) uint32, bytes of each row.
        row_crcs: (n,) uint32, CRC-32 of each row.
    """

    kind: int
    body: Buffer
    body_crc: int
    rows: Buffer
    lengths: NDArray[np.uint32]
    row_crcs: NDArray[np.uint32]


class Stamped(NamedTuple):
    """An operation with its place in the log. `first_id`: id of its first row (0 without rows)."""

    lsn: int
    first_id: int
    operation: Operation


class LoggedOperation(NamedTuple):
    """An operation as read from the log.

    Attributes:
        lsn: Its place in the order.
        kind: See `expbuf_core.codec`.
        first_id: Id of its first row; 0 without rows.
        body: As written.
        location: Where its first row lies, a number the adapter understands; row i lies at
            `location + lengths[:i].sum()`. Fits into 63 bits.
        lengths: (n,) uint32, bytes of each row.
    """

    lsn: int
    kind: int
    first_id: int
    body: Buffer
    location: int
    lengths: NDArray[np.uint32]


@dataclass(frozen=True)
class LoggedRun:
    """Successive operations of one kind that are alike, read from the log together.

    The columns are those of operations here, and of rows in `codec.LoggedAdds`, which is one, too;
    the methods mean the same.

    Attributes:
        first_lsn: Of the first; those of the others follow it without gaps.
        kind: See `expbuf_core.codec`.
        bodies: (n, size) uint8, as written.
        first_ids: (n,) int64, as in `LoggedOperation`.
        locations: (n,) int64, as in `LoggedOperation`.
        lengths: (n,) uint32, bytes of the one row that each has; None: they have none.
    """

    first_lsn: int
    kind: int
    bodies: NDArray[np.uint8]
    first_ids: NDArray[np.int64]
    locations: NDArray[np.int64]
    lengths: NDArray[np.uint32] | None

    def __len__(self) -> int:
        return len(self.bodies)

    @property
    def last_lsn(self) -> int:
        """Of the last."""
        return self.first_lsn + len(self) - 1

    def behind(self, lsn: int) -> LoggedRun:
        """Those behind `lsn`."""
        cut = max(0, lsn + 1 - self.first_lsn)
        if not cut:
            return self
        columns = (self.bodies[cut:], self.first_ids[cut:], self.locations[cut:])
        lengths = None if self.lengths is None else self.lengths[cut:]
        return LoggedRun(self.first_lsn + cut, self.kind, *columns, lengths)

    def operations(self) -> Iterator[LoggedOperation]:
        """One by one."""
        lengths = np.empty((len(self), 0), np.uint32)
        if self.lengths is not None:
            lengths = self.lengths[:, None]
        columns = zip(self.first_ids.tolist(), self.locations.tolist(), lengths, strict=True)
        for i, (first_id, location, own) in enumerate(columns):
            body = self.bodies[i].tobytes()
            yield LoggedOperation(self.first_lsn + i, self.kind, first_id, body, location, own)


def last_of(item: LoggedOperation | LoggedRun) -> int:
    """Of an operation, or of the last of several."""
    return item.lsn if isinstance(item, LoggedOperation) else item.last_lsn


def one_by_one(items: Iterable[LoggedOperation | LoggedRun]) -> Iterator[LoggedOperation]:
    """The operations of which some are taken together."""
    for item in items:
        if isinstance(item, LoggedRun):
            yield from item.operations()
        else:
            yield item


def behind(
    items: Iterable[LoggedOperation | LoggedRun], lsn: int
) -> Iterator[LoggedOperation | LoggedRun]:
    """Of operations in order, those behind `lsn`."""
    for item in items:
        if isinstance(item, LoggedOperation):
            if item.lsn > lsn:
                yield item
        elif item.last_lsn > lsn:
            yield item.behind(lsn)


class Appended(NamedTuple):
    """Where an operation was written. `cursor`: hand it to `LogFollower.skip` to step over it."""

    location: int
    cursor: Any


class OpenLog(NamedTuple):
    """Files of frames that adds may be appended to in the adapter's place.

    Under the append lock, and as `append` would: the frame with its payloads into the data log, the
    same without them into the index log, then the adapter's words. Those are, by number: 0 the
    number of the files, 1 and 2 the ends of data and index log, 3 the number of the newest file
    of which all before it are synced (under the flush lock), 4 up to where the data log was
    written. What goes beyond that and is smaller than 64 KiB overwrites zeros that are written
    first, 1 MiB from there on or to the end of the file; in either case the word says so. Nobody
    but the adapter begins another file.

    Attributes:
        data_fd: Of the data log; open until the next `append`, `switch`, `retire` or `close`.
        index_fd: Of the index log, likewise.
        number: Of both, and the epoch of their frames. A location is `number << 40 | offset`, and a
            cursor (number, offset in the index log).
        data_size: Bytes of the data log, 80 of which are for the frame that ends it.
        index_size: Bytes of the index log, likewise.
        salt: Of the frames of both.
        path: Of the data log, for messages.
    """

    data_fd: int
    index_fd: int
    number: int
    data_size: int
    index_size: int
    salt: bytes
    path: Path


class LogFollower(ABC):
    """Reads the operations of one log in order, as they come. One a replica; not thread-safe."""

    @abstractmethod
    def read(self, until_lsn: int) -> Iterator[LoggedOperation]:
        """Yield the operations behind the last one read, up to and including `until_lsn`.

        Returns without waiting when it has reached `until_lsn`, which is published and so
        complete.

        Raises:
            CorruptionError: What stands there is not what was written.
            LogGone: The position was dropped: start again from the newest snapshot.
        """

    def read_alike(self, until_lsn: int) -> Iterator[LoggedOperation | LoggedRun]:
        """`read`, with operations that are alike taken together, where that is faster."""
        return self.read(until_lsn)

    @abstractmethod
    def skip(self, lsn: int, cursor: Any) -> None:
        """Step over the next operation, which this process wrote itself and has at hand."""

    def close(self) -> None:  # noqa: B027  (optional)
        """Free what the follower holds."""


class LogInterrupted(StorageError):
    """An append failed and could not be undone; the core retires the log before the next one."""


class LogPostponed(StorageFull):
    """There is no room to begin a new log. All that was recovered is safe and can be read.

    Raised by `PersistenceAdapter.start` alone, by an adapter whose `retire` can begin that log
    later; the core calls it before the first append, and as often as it fails for lack of room.
    """


class LogGone(Exception):
    """The log behind a follower's position was dropped after a snapshot; reload from it.

    Attributes:
        path: The file that is missing, where that is known. Should it turn out that nobody was to
            drop it, the error says which it is.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        super().__init__()
        self.path = None if path is None else os.fspath(path)


class Pin(ABC):
    """Keeps payloads readable, also when they are evicted and their files are deleted."""

    @abstractmethod
    def read(self, i: int) -> Buffer:
        """Bytes of the i-th pinned row, exactly its stored length.

        Raises:
            CorruptionError: The file is shorter than that.
        """

    def read_many(self, which: NDArray[np.int64]) -> list[Buffer]:
        """`read` for several at once, in this order; override it where that is faster."""
        return [self.read(i) for i in which.tolist()]

    def where(self, i: int) -> tuple[str, int]:
        """File and offset of the i-th pinned row, for messages; ("", -1) where there are none."""
        return "", -1


@dataclass(frozen=True)
class PersistenceContext:
    """What a storage adapter is made for.

    Attributes:
        path: Folder of the buffer; None for a backend that is not durable.
        uuid: 16 bytes that name the buffer; every file carries them.
        fs: All writing goes through it (`expbuf_core.filesystem`).
        words: Eight 64-bit words shared by all processes that have the buffer open, for the
            adapter's own use. Written only under the append lock, except where the adapter says
            otherwise; all 0 when the first process recovers. A cache, never the truth.
        writable: False: nothing in the folder may change.
        lock_timeout_s: How long the user wants another process to be waited for. An adapter that
            waits for others gives up then, with a `LockTimeout`, before anything has happened.
    """

    path: Path | None
    uuid: bytes
    fs: FileSystem
    words: Words
    writable: bool = True
    lock_timeout_s: float = 30.0


class Problem(NamedTuple):
    """One finding of `verify`. `offset` is -1 where the whole file is meant."""

    path: str
    offset: int
    message: str
    damage: bool


class Damage(NamedTuple):
    """What `salvage` met and could not read, or had to read elsewhere.

    Attributes:
        path: The file.
        offset: In it; -1 where the whole file is meant.
        first_lsn: First operation that is lost here; 0 where none is.
        last_lsn: Last one; 0 where that cannot be told: all from `first_lsn` to the end of the log.
        message: What is wrong.
        torn: Nothing that is stored says that it was ever durable: it may be a torn tail.
    """

    path: str
    offset: int
    first_lsn: int
    last_lsn: int
    message: str
    torn: bool = False


class PersistenceAdapter(ABC):
    """Keeps a log of operations with their payloads, and nothing else.

    The core decides order, numbers, locks, snapshots and what may be deleted. Every method says
    which locks its caller holds. Errors of the operating system are wrapped in `StorageError`,
    a full disk in `StorageFull`; after either nothing of the call is visible.
    """

    @abstractmethod
    def create(self, lsn: int) -> None:
        """Make an empty log whose next operation is `lsn`, durable on return (open lock held).

        Leftovers of an interrupted creation are replaced.
        """

    @abstractmethod
    def recover(self, after_lsn: int, durable_lsn: int) -> Iterator[LoggedOperation]:
        """Read the log behind `after_lsn`, verify every byte, and stop before a torn tail.

        The open lock is held alone: no other process has the buffer open. LSNs rise, with gaps
        only where a log was begun by `create`, `start` or `retire`.

        Args:
            after_lsn: LSN of the snapshot that was loaded, or 0.
            durable_lsn: Highest LSN that is known to have been durable, or 0: a bad frame at or
                below it is damage, not a torn tail.

        Raises:
            CorruptionError: Damage, before or behind intact operations.
        """

    def recover_alike(
        self, after_lsn: int, durable_lsn: int
    ) -> Iterator[LoggedOperation | LoggedRun]:
        """`recover`, with operations that are alike taken together, where that is faster."""
        return self.recover(after_lsn, durable_lsn)

    @abstractmethod
    def torn(self) -> tuple[int, int]:
        """(bytes, operations) that the last `recover` found torn and left out."""

    @abstractmethod
    def start(self, lsn: int, recovered_lsn: int) -> None:
        """After `recover`: begin to write at `lsn` behind `recovered_lsn`, durable on return.

        What `recover` left out can never come back afterwards.

        Raises:
            LogPostponed: The disk is full, and `retire` will begin the log (optional).
        """

    @abstractmethod
    def attach(self) -> None:
        """Join a buffer that another process has recovered and holds open (open lock shared)."""

    @abstractmethod
    def append(self, stamped: Sequence[Stamped], durable_lsn: int) -> list[Appended]:
        """Write operations at the end of the log (append lock held); need not be durable yet.

        All of them or, on an error, none. `durable_lsn` is what is known to be durable now.
        """

    def open_log(self) -> OpenLog | None:
        """The files that `append` goes on in, where the core may lay down adds itself.

        For an adapter whose log is files of frames (`expbuf_core.frames`), see `OpenLog`. Called
        behind `append` (append lock held). Default: None, never.
        """
        return None

    def synced_log(self) -> tuple[int, int] | None:
        """(descriptor, number) of the log file that `sync` has just synced, for the same.

        Called behind `sync` (flush lock held); the descriptor stays open until the next `sync`,
        `retire` or `close`.
        """
        return None

    def hasten(self) -> None:  # noqa: B027  (optional)
        """What this process appended last is about to be synced: start to write it out.

        Called behind `append`, without a lock; must not wait, and must not fail.
        """

    @abstractmethod
    def sync(self) -> None:
        """Make durable what any process appended before the call (flush lock held).

        Runs beside `append` in other threads and processes.

        Raises:
            StorageError: The log may lie about its pages from now on: the core retires it.
            LockTimeout: No sync was tried, and none has failed: it is called again.
        """

    @abstractmethod
    def retire(self, durable_lsn: int, keep_lsn: int, next_lsn: int) -> None:
        """Give up a log that may lie about its pages (append and flush locks held).

        Called when a sync failed or an appender died half-way. Goes on in a new log that holds
        the operations in (durable_lsn, keep_lsn] again and begins anew at `next_lsn`; operations
        behind `keep_lsn` are gone for ever. Durable on return; on an error nothing has changed.
        """

    @abstractmethod
    def follow(self, after_lsn: int) -> LogFollower:
        """A reader of the operations behind `after_lsn`."""

    @abstractmethod
    def pin(
        self, ids: NDArray[np.int64], locations: NDArray[np.int64], lengths: NDArray[np.uint32]
    ) -> Pin:
        """Hold on to the payloads of these experiences.

        Raises:
            LogGone: One of them is deleted; the caller's replica lags behind.
        """

    @abstractmethod
    def switch(self, next_lsn: int, durable_lsn: int) -> None:
        """End the current log and begin the next (append lock held): O(1) if one is prepared.

        `next_lsn` is the next operation's; the rest as for `append`.
        """

    def needs_preparation(self) -> bool:
        """Whether `prepare` would shorten the next switch; cheap, asked after each commit."""
        return False

    def prepare(self) -> None:  # noqa: B027  (optional)
        """Do the long part of the next switch beforehand (maintenance lock held)."""

    def install_prepared(self) -> None:  # noqa: B027  (optional)
        """Do the short part, right behind `prepare` (append lock held)."""

    @abstractmethod
    def drop_below(
        self, lsn: int, live_ids: NDArray[np.int64], live_locations: NDArray[np.int64]
    ) -> None:
        """Delete what no snapshot and no live experience needs (maintenance lock held).

        Args:
            lsn: Operations up to this one are in every snapshot that is kept.
            live_ids: (n,) ids, rising, of the experiences whose payloads must stay.
            live_locations: (n,) their locations.
        """

    def survivors(
        self, live_locations: NDArray[np.int64], lengths: NDArray[np.uint32]
    ) -> NDArray[np.bool_]:
        """Which live payloads alone keep mostly dead storage from being deleted.

        The core logs them again as an ordinary operation, so that the next `drop_below` can free
        what they lay in. Default: none.
        """
        return np.zeros(len(live_locations), bool)

    def is_scattered(self) -> bool:
        """Whether what is stored has come to lie in so many pieces that opening takes longer.

        Asked behind `start`. A snapshot follows, whose `survivors` and `drop_below` had better
        leave fewer, at the latest when that has happened twice. Default: no.
        """
        return False

    @abstractmethod
    def verify(self, until_lsn: int) -> Iterator[Problem]:
        """Check every byte that is stored, without changing any.

        Args:
            until_lsn: Operations behind it may be half-written by live processes: no finding.
        """

    def identify(self) -> bytes:
        """UUID that the stored files carry, for a buffer whose identity is lost; b"" if none does.

        The adapter was made with a `uuid` of zeros, and is asked nothing else. Nothing may change.
        """
        return b""

    def salvage(self, after_lsn: int) -> Iterator[LoggedOperation | Damage]:
        """Read what is intact of a damaged log behind `after_lsn`, in order of LSNs.

        Called in the place of `recover`, on an adapter that is not `writable`; nothing may change.
        Afterwards `pin` reads what it can of damaged storage, and need not have checked it.
        Default: what `recover` yields before it meets damage, and behind it if it can begin there.

        Yields:
            Operations whose bodies are intact; their rows may be damaged. An operation whose rows
            are in place and whose body is lost comes with an empty body. Before an operation, the
            damage in which those that should stand there were lost.
        """
        last = after_lsn
        while True:
            begin = last
            try:
                for operation in self.recover(begin, 0):
                    yield operation
                    last = operation.lsn
                return
            except CorruptionError as exc:
                offset = -1 if exc.offset is None else exc.offset
                bad = max(last + 1, exc.lsn or 0)
                stuck = last == begin > after_lsn and bad == last + 1
                yield Damage(exc.path or "", offset, last + 1, 0 if stuck else bad, str(exc))
                if stuck:
                    return
                last = bad

    @abstractmethod
    def stats(self) -> dict[str, Any]:
        """Facts worth showing: files, bytes, positions; JSON-like."""

    @abstractmethod
    def finish(self, last_lsn: int) -> None:
        """Mark the log closed cleanly behind `last_lsn`, durably (open lock held alone)."""

    @abstractmethod
    def close(self) -> None:
        """Let go of everything; the folder stays as it is."""

    @abstractmethod
    def after_fork(self) -> None:
        """Called in a forked child: drop descriptors and threads without touching the folder."""
