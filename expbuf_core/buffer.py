"""`ExperienceBuffer`: the memory of an agent that keeps learning."""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import importlib
import os
import threading
import time
import types
import weakref
from _thread import get_ident
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from expbuf_core import codec, finding, folder
from expbuf_core import control as c
from expbuf_core.codec import OutcomeBody
from expbuf_core.commit import Draft
from expbuf_core.conditions import Condition, matching_slots
from expbuf_core.config_schema import BufferConfig, load_config
from expbuf_core.dropped import Unclosed, close_dropped
from expbuf_core.embedding_cache import EmbeddingCache
from expbuf_core.embeddings import as_vectors
from expbuf_core.errors import (
    BufferClosed,
    BufferReplaced,
    ConfigError,
    ExpbufError,
    InvalidExperience,
    NotEnoughExperiences,
    ReadOnlyBuffer,
    ReceiptExpired,
    ReentrantCall,
    StorageError,
    UnknownExperienceError,
    shown,
)
from expbuf_core.experience import Experience
from expbuf_core.filesystem import FileSystem, storage_errors
from expbuf_core.intake import Accepted, Intake
from expbuf_core.locks import holder
from expbuf_core.opening import keeps_nothing
from expbuf_core.plain_adds import PlainAdds
from expbuf_core.plugins import PluginRegistry, default_registry
from expbuf_core.recovery import RecoveryReport
from expbuf_core.reindexing import Embed, Progress, ReindexReport, reembed
from expbuf_core.results import (
    PinnedExperiences,
    Receipt,
    SampleBatch,
    SearchBatch,
    SearchResult,
)
from expbuf_core.sampling import (
    Draw,
    importance_weights,
    restore_rng,
    rng_state,
)
from expbuf_core.session import Outdated, Session
from expbuf_core.state import State
from expbuf_core.submitting import Submitter
from expbuf_core.values import (
    ages,
    as_ids,
    check_batch_size,
    credits_of,
    in_order,
    is_row,
    listed,
    new_priorities,
    new_rewards,
    number,
    truth,
)

_fork_count = 0
_open_buffers: weakref.WeakSet[ExperienceBuffer] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    global _fork_count
    _fork_count += 1
    for buffer in list(_open_buffers):
        buffer._mutex = threading.RLock()
        buffer._inside = set()
        buffer._session.forked()


os.register_at_fork(after_in_child=_after_fork_in_child)

P = ParamSpec("P")
T = TypeVar("T")


def _call(
    method: Callable[Concatenate[ExperienceBuffer, P], T],
) -> Callable[Concatenate[ExperienceBuffer, P], T]:
    """A call of the buffer, in the middle of which its thread cannot close it.

    Its errors say what they mean where the buffer was closed or replaced meanwhile.
    """

    @functools.wraps(method)
    def call(self: ExperienceBuffer, /, *args: P.args, **kwargs: P.kwargs) -> T:
        inside, thread = self._inside, get_ident()
        outermost = thread not in inside
        try:
            inside.add(thread)
            return method(self, *args, **kwargs)
        except (OSError, ValueError, AttributeError, LookupError) as exc:
            self._explain(exc)
            raise
        finally:
            if outermost:
                inside.discard(thread)

    return call


class ExperienceBuffer:
    """Keeps experiences, finds similar ones, tracks how useful they were, samples them for replay.

    Bounded like `collections.deque(maxlen=max_size)`: when it is full, the oldest is evicted, from
    store and index at once. Made by `open`. All methods may be called by several threads; several
    processes may have one folder open. In a forked child it opens itself again at first use; it can
    be pickled to a spawned one.

    An acknowledged write is never lost: when a method that writes returns, its effect is durable at
    the configured level (`durability`), and the next read in any process sees it.

    Attributes:
        config: As opened.
        recovery: What opening found.
    """

    def __init__(self, session: Session, arguments: dict[str, Any]) -> None:
        """Use `open`."""
        self._session = session
        self._arguments = arguments
        self._mutex: Any = threading.RLock()  # knows its owner; never entered twice
        self._inside: set[int] = set()  # threads
        self._forks = _fork_count
        self._rng = np.random.default_rng(arguments.get("seed"))
        self._submitter = _submitter()
        self._cache: EmbeddingCache | None = None
        self._unclosed = Unclosed(session)
        _open_buffers.add(self)

    # ------------------------------------------------------------ opening and closing

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str] | None = None,
        *,
        config: str | os.PathLike[str] | Mapping[str, Any] | BufferConfig | None = None,
        mode: str = "a",
        plugins: Sequence[object] = (),
        lock: AbstractContextManager[object] | None = None,
        seed: int | None = None,
        filesystem: FileSystem | None = None,
        **overrides: Any,
    ) -> ExperienceBuffer:
        """Open a buffer, and create it where there is none.

        The folder knows its own dimensions, metric and fusion; what the configuration gives
        besides must agree with them. `max_size` may change: a smaller one evicts the oldest.

        Args:
            path: Folder; None for the configuration's, else for a buffer in memory.
            config: A YAML file, a mapping, or None for the defaults.
            mode: "a" opens or creates, "x" creates, "r" reads only.
            plugins: Plugin objects for this buffer alone, besides the installed ones.
            lock: A context manager to hold around appends, besides the buffer's own locks.
            seed: Of `sample`; None: of the operating system.
            filesystem: Does all writing; for tests that record or fail it.
            **overrides: Keys of the configuration (`max_size=10_000`, `index="exact"`).

        Raises:
            ConfigError: A setting is wrong, or contradicts the folder.
            CorruptionError: Stored bytes are damaged; nothing was changed.
            StorageError: The folder is none, is no buffer, or cannot be used.
            LockTimeout: Another process holds the opening lock for too long.
            PluginError: A selected backend cannot be used.
        """
        if mode not in ("r", "a", "x"):
            raise ConfigError(f"mode = {mode!r}: must be 'r', 'a' or 'x'")
        _check_seed(seed)
        _check_objects(plugins, lock, filesystem)
        close_dropped()
        registry: PluginRegistry = default_registry()
        if plugins:
            registry = registry.with_plugins(plugins)
        settings = load_config(config, overrides=overrides or None, registry=registry)
        where = path if path is not None else settings.path
        in_memory = where is None or keeps_nothing(registry, settings.persistence.backend)
        if in_memory and mode == "r":
            raise ConfigError("a buffer in memory cannot be opened in mode 'r'")
        resolved = None if in_memory else _resolved(where)
        arguments = {
            "config": settings,
            "mode": mode,
            "plugins": tuple(plugins),
            "lock": lock,
            "seed": seed,
            "filesystem": filesystem,
            "path": resolved,
        }
        return cls(_open_session(arguments, registry), arguments)

    @classmethod
    def load_from_disk(cls, path: str | os.PathLike[str], **arguments: Any) -> ExperienceBuffer:
        """Open a buffer that must exist; arguments as for `open`.

        Raises:
            StorageError: There is no buffer at this path.
        """
        resolved = _resolved(path)
        if folder.read_identity(resolved) is None:
            folder.check_finished(resolved)
            raise folder.no_buffer(resolved)
        return cls.open(path, **arguments)

    def close(self) -> None:
        """Make everything durable and let go. A second call does nothing.

        Nothing is lost without it; closing spares the next opening the recovery. A buffer that is
        dropped without it is closed, and its memory given back, when the next one is opened.

        Raises:
            StorageError: It is closed; but what was written at "group" or "os" may not be durable,
                or (`LockTimeout`) another process held a lock. The next opening recovers.
            ReentrantCall: A signal handler or a finalizer has interrupted a call of this thread, or
                a function that was given to one wants to close. Nothing was done.
        """
        if self._forks != _fork_count:
            return
        thread = get_ident()
        # That call may hold any lock, and works with all that would be let go of.
        if thread in self._inside or self._session.is_entered():
            raise ReentrantCall(
                "the buffer was to be closed in the middle of a call of the same thread, by a "
                "signal handler, say; it is still open. Let the handler raise SystemExit or set a "
                "flag, and close the buffer where that arrives, as `with` does"
            )
        try:
            self._inside.add(thread)
            self._submitter.close()
            self._session.close()
            self._cache = None
            self._unclosed.closed()
            _open_buffers.discard(self)
        finally:
            self._inside.discard(thread)

    def __enter__(self) -> ExperienceBuffer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __reduce__(self) -> tuple[Callable[..., ExperienceBuffer], tuple[Any, ...]]:
        if self._session.path is None:
            raise TypeError("a buffer in memory cannot be pickled: nobody else can reach it")
        if self._arguments["lock"] is not None or self._arguments["filesystem"] is not None:
            raise TypeError("a buffer with a lock or file system of the caller's cannot be pickled")
        arguments = {name: self._arguments[name] for name in ("path", "config", "mode")}
        # A module goes by its name; other plugin objects must be picklable themselves.
        plugins = [
            (plugin.__name__, None) if isinstance(plugin, types.ModuleType) else (None, plugin)
            for plugin in self._arguments["plugins"]
        ]
        return _unpickled, (arguments, plugins, self._session.uuid)

    def _live(self) -> Session:
        """The session of this process."""
        session = self._session
        if self._forks != _fork_count:
            session = self._reopen_in_child()
        if session.closed:
            raise BufferClosed("the buffer is closed; open it again")
        return session

    def _explain(self, exc: Exception) -> None:
        """Raise what lies behind an error, if it is not that error."""
        session = self._session
        if isinstance(exc, ExpbufError) and not isinstance(exc, StorageError):
            return
        if session.abandoned:  # in a forked child, which could not open it anew
            return
        if session.closed:  # by another thread: what this one worked with went away
            raise BufferClosed("the buffer was closed during this call; open it again") from exc
        if isinstance(exc, StorageError) and session.is_replaced():
            raise BufferReplaced(
                f"{session.path}: the folder was removed or replaced while it was open; open the "
                "buffer again"
            ) from exc

    def _writer(self) -> Session:
        """The session of this process, which may write."""
        session = self._live()
        if not session.writable:
            raise ReadOnlyBuffer(
                f"{session.path} is open in mode 'r'; open it in mode 'a' to write"
            )
        return session

    def _reopen_in_child(self) -> Session:
        if self._mutex._is_owned():
            raise ReentrantCall(
                "the buffer was called by a signal handler or finalizer that interrupted the same "
                "thread while it opened the buffer anew in a forked child; let it set a flag"
            )
        with self._mutex:
            if self._forks == _fork_count:
                return self._session
            parent = self._session
            if parent.closed and not parent.abandoned:
                return parent
            self._submitter = _submitter()
            self._cache = None
            # The child must not repeat its parent's draws.
            self._rng = np.random.default_rng()
            if parent.path is None:
                raise BufferClosed(
                    "a buffer in memory belongs to the process that made it; open one here"
                )
            if not parent.abandoned:  # else opening has failed before: it is tried at each use
                parent.abandon()
            self._session = _open_session(self._arguments, parent.registry)
            self._unclosed.closed()
            self._unclosed = Unclosed(self._session)
            self._forks = _fork_count
            return self._session

    # ------------------------------------------------------------ facts

    @property
    def config(self) -> BufferConfig:
        """The configuration it was opened with."""
        return self._session.config

    @property
    def path(self) -> Path | None:
        """Its folder; None in memory."""
        return self._session.path

    @property
    def recovery(self) -> RecoveryReport:
        """What opening found."""
        return self._live().recovery

    @property
    @_call
    def max_size(self) -> int:
        """Most experiences that it holds."""
        session = self._live()
        session.refresh()
        return int(session.replica.state.settings["max_size"])

    @property
    @_call
    def lsn(self) -> int:
        """Last operation that this process has applied, after looking for newer ones."""
        session = self._live()
        session.refresh()
        return session.replica.state.lsn

    @_call
    def __len__(self) -> int:
        session = self._live()
        session.refresh()
        return session.replica.state.count

    @property
    @_call
    def total_added(self) -> int:
        """Experiences that any process has ever added, the evicted and removed ones among them."""
        session = self._live()
        session.refresh()
        return session.replica.state.total_added

    def is_full(self) -> bool:
        """Whether the next add evicts the oldest."""
        return len(self) >= self.max_size

    @_call
    def __contains__(self, id_: object) -> bool:
        if not isinstance(id_, int | np.integer):
            return False
        session = self._live()
        session.refresh()
        with session.replica.lock:
            state = session.replica.state
            return bool(0 <= id_ < state.next_id) and state.find_one(int(id_)) >= 0

    @_call
    def ids(self) -> NDArray[np.int64]:
        """(n,) int64, oldest first."""
        session = self._live()
        session.refresh()
        with session.replica.lock:
            return session.replica.state.live_ids()

    def __iter__(self) -> Iterator[Experience]:
        """Experiences, oldest first, as of the beginning; those evicted meanwhile are left out."""
        ids = self.ids()
        for start in range(0, len(ids), 256):
            yield from self._read_on(ids[start : start + 256])

    @_call
    def _read_on(self, ids: NDArray[np.int64]) -> Iterable[Experience]:
        return finding.pinned(self._live(), ids, missing="skip")

    def __repr__(self) -> str:
        session = self._session
        where = session.path or "in memory"
        if session.closed:
            return f"ExperienceBuffer({where}, closed)"
        with contextlib.suppress(ExpbufError):  # then what was known last is told
            session.refresh()
        return f"ExperienceBuffer({where}, {session.replica.state.count} experiences)"

    # ------------------------------------------------------------ writing

    def add(self, experience: Experience, *, priority: float | None = None) -> int:
        """Store one experience; it is found by the very next search, in every process.

        Args:
            experience: Its embeddings fix the buffer's dimensions if it is the first.
            priority: Instead of the scorer's, finite and at least 0.

        Returns:
            Its id, for life.

        Raises:
            InvalidExperience: Something in it cannot be stored; nothing was written.
            StorageError: It was not stored (StorageFull: there is no room).
        """
        plain = self._session.plain_adds
        if plain is not None and self._forks == _fork_count:
            try:
                found = plain.add(experience, priority)
            except (OSError, ValueError, AttributeError, LookupError) as exc:
                self._explain(exc)
                raise
            if isinstance(found, int):
                return found
            if found is not None and (id_ := self._finish_plainly(plain, found)) is not None:
                return id_
        return self._add_in_python(experience, priority)

    @_call
    def _finish_plainly(self, plain: PlainAdds, found: tuple[int, int, int | None]) -> int | None:
        """Do what is due behind an add; None: it must be made again."""
        try:
            return plain.finish(found)
        except Outdated:
            return None

    @_call
    def _add_in_python(self, experience: Experience, priority: float | None) -> int:
        session = self._writer()
        while True:
            intake, accepted = _accepted(session, experience, priority)
            try:
                id_ = session.add(intake, accepted)
            except Outdated:
                continue
            if session.asks_for_plain_adds:
                session.begin_plain_adds(self._inside)
            return id_

    @_call
    def add_many(
        self,
        experiences: Iterable[Experience] | Mapping[str, Any],
        *,
        priorities: ArrayLike | Sequence[float | None] | None = None,
    ) -> NDArray[np.int64]:
        """Store several experiences in one commit: all of them, or none.

        Args:
            experiences: Experiences; or, faster, a mapping of columns: `v_embed` (n, v_dim) and
                `q_embed` (n, q_dim) arrays, `confidence`, `timestamp`, `rewards` (n,) (NaN:
                unknown) or a mapping of such by component, `question`, `answer`, `trajectory`,
                `metadata`, `tags`, `image`, `key`, `probabilities` with n entries each.
            priorities: (n,) instead of the scorer's; None entries are left to it.

        Returns:
            (n,) int64 ids, consecutive.

        Raises:
            InvalidExperience: Something in one of them cannot be stored; nothing was written.
            StorageError: None was stored.
        """
        session = self._writer()
        given: Any = None if priorities is None else in_order(priorities, "priorities")
        if isinstance(experiences, Mapping):
            rank, v, q = 2, experiences.get("v_embed"), experiences.get("q_embed")
        else:
            if isinstance(experiences, Experience):
                raise InvalidExperience("add_many takes several experiences; give one to add")
            experiences = listed(experiences, "experiences")
            if not experiences:
                return np.empty(0, np.int64)
            first = experiences[0]
            if not isinstance(first, Experience):
                raise InvalidExperience(f"expected an Experience, found a {type(first).__name__}")
            rank, v, q = 1, first.v_embed, first.q_embed
        while True:
            intake = session.intake()
            if intake is None:
                draft = _draft_many(_first_intake(session, v, q, rank=rank), experiences, given)
                if not draft.content_crcs:
                    return np.empty(0, np.int64)
                intake = session.intake(v, q)
                assert intake is not None
            draft = _draft_many(intake, experiences, given)
            n = len(draft.content_crcs)
            if n == 0:
                return np.empty(0, np.int64)
            try:
                first_id = session.commit(draft)[1]
            except Outdated:
                continue
            return np.arange(first_id, first_id + n)

    @_call
    def submit(self, experience: Experience) -> concurrent.futures.Future[int]:
        """Store one experience without waiting for the disk.

        It is checked, scored and encoded before this returns, so that its arrays may be used again.

        Returns:
            A future of its id, resolved when the add is acknowledged; submissions that wait
            together share one flush. `asyncio.wrap_future` makes it awaitable. Where there can be
            no thread for it, as when the interpreter ends, this call waits.
        """
        session = self._writer()
        try:
            intake, accepted = _accepted(session, experience, None)
        except BufferClosed:  # by another thread
            raise
        except Exception as exc:
            self._explain(exc)
            refused: concurrent.futures.Future[int] = concurrent.futures.Future()
            refused.set_exception(exc)
            return refused
        return self._submitter.submit(self._add, intake, accepted)

    @_call
    def _add(self, intake: Intake, accepted: Accepted) -> int:
        """Store what was accepted; fused anew where the representation has changed since."""
        session = self._writer()
        while True:
            try:
                return session.add(intake, accepted)
            except Outdated:
                found = session.intake()
                assert found is not None
                intake, accepted = found, found.accept_again(accepted)

    @_call
    def sync(self) -> int:
        """Make durable everything written so far, by any process, at any level.

        Returns:
            The LSN up to which all is on disk.
        """
        return self._writer().commit_log.sync()

    @_call
    def remove(self, ids: ArrayLike | Iterable[int]) -> int:
        """Remove experiences from store and index.

        Returns:
            How many there were; those that are gone already are skipped.

        Raises:
            UnknownExperienceError: One of the ids was never issued; nothing was removed.
        """
        self._writer()
        session, array = self._known_ids(ids)
        if not len(array):
            return 0
        return session.commit(Draft(codec.encode_remove(array), weight=len(array)))[2]

    @_call
    def clear(self) -> int:
        """Remove everything; ids go on where they were. Returns how many there were."""
        return self._writer().commit(Draft(codec.encode_clear()))[2]

    @_call
    def update_priorities(self, ids: ArrayLike | Iterable[int], priorities: ArrayLike) -> int:
        """Set priorities; of an id that is given twice, the last counts.

        Args:
            ids: (n,)
            priorities: (n,) finite, at least 0.

        Returns:
            To how many it was applied; evicted and removed ids are skipped.

        Raises:
            UnknownExperienceError: One of the ids was never issued; nothing was changed.
            InvalidExperience: A priority is negative, NaN or infinite; nothing was changed.
        """
        self._writer()
        session, array = self._known_ids(ids)
        values = new_priorities(priorities, len(array))
        if not len(array):
            return 0
        return session.commit(Draft(codec.encode_priority(array, values), weight=0))[2]

    @_call
    def update_rewards(
        self,
        ids: ArrayLike | Iterable[int],
        values: ArrayLike | Sequence[Mapping[str, float] | float],
    ) -> int:
        """Set the rewards of experiences; their priorities are computed anew.

        Args:
            ids: (n,)
            values: n numbers, or mappings of named components.

        Returns:
            To how many it was applied; evicted and removed ids are skipped.

        Raises:
            UnknownExperienceError: One of the ids was never issued; nothing was changed.
            InvalidExperience: A reward is not a finite number; nothing was changed.
        """
        self._writer()
        session, array = self._known_ids(ids)
        totals, named = new_rewards(values)
        if len(totals) != len(array):
            raise InvalidExperience(f"{len(totals)} rewards for {len(array)} ids")
        if not len(array):
            return 0
        last = {id_: i for i, id_ in enumerate(array.tolist())}
        if len(last) != len(array):  # of an id that is given twice, the last counts
            chosen = list(last.values())
            array, totals = array[chosen], totals[chosen]
        components = {str(id_): named[i] for id_, i in last.items() if i in named}
        priorities = self._rescored(session, array, totals)
        operation = codec.encode_reward(array, totals, priorities, components or None)
        return session.commit(Draft(operation, weight=0))[2]

    def _rescored(
        self, session: Session, ids: NDArray[np.int64], totals: NDArray[np.float64]
    ) -> NDArray[np.float32]:
        """Priorities by the scorer, from what is stored of the experiences and new rewards."""
        intake = session.intake()
        if intake is None:
            return np.zeros(len(ids), np.float32)
        now = time.time()
        with session.replica.lock:
            state = session.replica.state
            slots = state.find(ids)
            live = slots >= 0
            confidence = np.where(live, state.confidence[slots], 0.0).astype(np.float32)
            age = np.where(live, ages(now, state.timestamp[slots]), np.float32(0))
        experiences = finding.pinned(session, ids[live], missing="skip")
        found = experiences.fields("probabilities", "metadata")
        stored = dict(zip(experiences.ids.tolist(), found, strict=True))
        fields = [stored.get(id_, {}) for id_ in ids.tolist()]
        return intake.score(
            confidence,
            totals,
            [one.get("probabilities") for one in fields],
            age,
            [one.get("metadata") for one in fields],
        )

    @_call
    def record_outcome(
        self,
        receipt_or_ids: Receipt | str | ArrayLike | Iterable[int],
        *,
        success: bool,
        credit: ArrayLike | Mapping[int, float] | None = None,
    ) -> int:
        """Count a retrieval for the experiences that were used, and a success if there was one.

        `retrieval_count` rises by 1 for each; `success_count` by its credit if `success`. With a
        receipt this happens exactly once, however often it is repeated, in whatever process, also
        across a crash.

        Args:
            receipt_or_ids: A search's receipt, its text form, or ids (counted at every call).
            success: Whether the consensus they took part in was right.
            credit: What part of the success is due to each: one number in [0, 1] for all, (n,) in
                the order of the ids, or a mapping by id (others get 0). Default: 1 each.

        Returns:
            How many were counted; 0 for a receipt that was counted before.

        Raises:
            ReceiptExpired: The receipt is older than those that are remembered.
            UnknownExperienceError: An id was never issued.
            InvalidExperience: The receipt is another buffer's, or a credit is out of bounds.
        """
        self._writer()
        success = truth(success, "success")
        token, lsn = b"", 0
        ids: Any
        if isinstance(receipt_or_ids, str):
            receipt_or_ids = Receipt.parse(receipt_or_ids)
        if isinstance(receipt_or_ids, Receipt):
            receipt = receipt_or_ids
            session = self._live()
            if receipt.buffer != session.name:
                raise InvalidExperience("the receipt is of another buffer; nothing was counted")
            token, lsn, ids = receipt.checked()
            session.refresh()
            with session.replica.lock:
                state = session.replica.state
                if token in state.receipts:
                    return 0
                if lsn < state.receipts_horizon:
                    raise ReceiptExpired(
                        f"the receipt is of lsn {lsn}; receipts are remembered back to lsn "
                        f"{state.receipts_horizon} (receipts_kept = "
                        f"{state.settings['receipts_kept']}); nothing was counted"
                    )
        elif isinstance(receipt_or_ids, SearchResult | SearchBatch):
            raise InvalidExperience("record_outcome takes a search's receipt: give its `.receipt`")
        else:
            ids = receipt_or_ids
        session, array = self._known_ids(ids)
        shares = credits_of(credit, array)
        if not len(array):
            return 0
        outcome = OutcomeBody(token or bytes(16), lsn, success, array, shares)
        return session.commit(Draft(codec.encode_outcome(outcome), weight=0))[2]

    @_call
    def add_to_index(self, ids: ArrayLike | Iterable[int]) -> int:
        """See that stored experiences are indexed; they are, so this is idempotent.

        An add is indexed at once. What is left to do is where derived data were lost: vectors that
        no tier holds are fused again from the payloads.

        Returns:
            How many of the ids are live, and so indexed.

        Raises:
            UnknownExperienceError: One of the ids was never issued.
        """
        session, array = self._known_ids(ids)
        intake = session.intake()
        if intake is None:
            return 0
        with session.replica.lock:
            live = array[session.replica.state.find(array) >= 0]
            if not session.replica.tiers.holds(live).all():
                session.fill_index()
        return len(live)

    def _known_ids(self, ids: Any) -> tuple[Session, NDArray[np.int64]]:
        session = self._live()
        array = ids if is_row(ids, np.int64) else as_ids(ids)
        session.refresh()
        if len(array):
            next_id = session.replica.state.next_id
            # A negative one is huge as an unsigned number.
            if np.maximum.reduce(array.view(np.uint64)) >= next_id:
                bad = array[(array < 0) | (array >= next_id)]
                raise _never_issued(int(bad[0]), next_id)
        return session, array

    # ------------------------------------------------------------ reading

    @_call
    def get(self, id_: int) -> Experience:
        """One experience by its id.

        Raises:
            UnknownExperienceError: It was never issued, or is evicted or removed.
            CorruptionError: Its payload is damaged.
        """
        if isinstance(id_, bool) or not isinstance(id_, int | np.integer):
            raise InvalidExperience(f"an id is an integer, not {shown(id_)}")
        session = self._live()
        session.refresh()
        if not 0 <= id_ < session.replica.state.next_id:
            raise _never_issued(int(id_), session.replica.state.next_id)
        return finding.pinned(session, np.array([id_], np.int64), missing="raise")[0]

    def __getitem__(self, id_: int) -> Experience:
        return self.get(id_)

    @_call
    def search_index(
        self,
        *,
        v_embed: Any = None,
        q_embed: Any = None,
        hybrid_embed: Any = None,
        k: int | None = None,
        where: Condition | None = None,
        exclude: ArrayLike | Iterable[int] | None = (),
    ) -> SearchResult:
        """Find the k most similar experiences. Sees everything that was acknowledged before.

        Args:
            v_embed: (v_dim,); may be left out, which counts as zeros.
            q_embed: (q_dim,); likewise.
            hybrid_embed: (dim,) a fused vector, instead of both.
            k: At least 1; default: `inference.k` of the configuration.
            where: A condition on columns, as in `lambda c: c.reward > 0`; see `LiveColumns`.
                Still k hits when k match; costs a pass over the columns.
            exclude: Ids to leave out.

        Returns:
            Up to k hits, the most similar first: k whenever k live experiences are left.

        Raises:
            InvalidExperience: k < 1, or an embedding is wrong.
        """
        asked = v_embed, q_embed, hybrid_embed
        return finding.search_one(self._live(), asked, k, where, exclude)

    @_call
    def search_many(
        self,
        *,
        v_embed: Any = None,
        q_embed: Any = None,
        hybrid_embed: Any = None,
        k: int | None = None,
        where: Condition | None = None,
        exclude: ArrayLike | Iterable[int] | None = (),
    ) -> SearchBatch:
        """Find the k most similar experiences for each of n queries.

        Args:
            v_embed: (n, v_dim)
            q_embed: (n, q_dim)
            hybrid_embed: (n, dim) instead of both.
            k: As for `search_index`; where results are many, no more than `max_size`.
            where: As for `search_index`.
            exclude: As for `search_index`, for all queries.

        Returns:
            ids (n, k) int64 padded with -1, similarities (n, k) float32 padded with -inf, n
            receipts.
        """
        asked = v_embed, q_embed, hybrid_embed
        return finding.search_batch(self._live(), asked, k, where, exclude)

    # ------------------------------------------------------------ sampling

    @_call
    def sample(
        self,
        batch_size: int,
        *,
        beta: float | None = None,
        rng: np.random.Generator | None = None,
        where: Condition | None = None,
        replace: bool = True,
        uniform: bool = False,
    ) -> SampleBatch:
        """Draw experiences in proportion to their sampling weight.

        P(i) = w_i / sum(w); is_weight_i = (N * P(i)) ** -beta, divided by the batch's maximum
        (Schaul et al. 2016, section 3.4). Sees every commit up to `batch.lsn`. Cost
        O(batch_size * log N).

        Args:
            batch_size: At least 1.
            beta: In [0, 1]; 0 turns the correction off. Default: the configured value.
            rng: A stream of the caller's; default: the buffer's own (see `seed` of `open`).
            where: Draw only from what meets a condition on columns; see `search_index`.
            replace: False: no experience twice.
            uniform: Without regard to priorities.

        Returns:
            `ids` (batch_size,) int64, `is_weights` (batch_size,) float32 in (0, 1], lazily decoded
            experiences. Stratified, it comes roughly oldest first: shuffle it before cutting it
            into minibatches.

        Raises:
            NotEnoughExperiences: The buffer is empty, or too small for `replace=False`, or nothing
                meets the condition.
            InvalidExperience: batch_size < 1, or beta is out of bounds.
        """
        check_batch_size(batch_size)
        if rng is not None and not isinstance(rng, np.random.Generator):
            raise InvalidExperience(
                f"rng must be a numpy.random.Generator, not {shown(rng)}; "
                "numpy.random.default_rng(seed) makes one"
            )
        session = self._live()
        beta = session.config.sampling.beta if beta is None else number(beta, "beta", 0.0, 1.0)
        session.refresh()
        stream = self._rng if rng is None else rng

        def choose(state: State) -> tuple[PinnedExperiences, tuple[Draw, int]]:
            sampler = session.replica.sampler
            if state.count == 0:
                raise NotEnoughExperiences("the buffer is empty: nothing can be sampled")
            if where is not None:
                slots = matching_slots(where, state, session.config.sampling)
                draw = sampler.draw_where(
                    slots, int(batch_size), rng=stream, replace=replace, uniform=uniform
                )
            elif uniform and replace:
                draw = sampler.uniform(int(batch_size), rng=stream)
            elif uniform:
                draw = _uniform_without_replacement(state, int(batch_size), stream)
            elif not replace:
                draw = sampler.draw_without_replacement(int(batch_size), rng=stream)
            else:
                draw = sampler.draw(int(batch_size), rng=stream)
            ids, cache = state.id.take(draw.slots), self._embedding_cache(session)
            return PinnedExperiences(ids, draw.slots, state, cache), (draw, state.lsn)

        chosen, (draw, lsn) = finding.held(session, choose)
        weights = importance_weights(draw.probabilities, beta)
        return SampleBatch(chosen, weights, draw.probabilities, lsn)

    def _embedding_cache(self, session: Session) -> EmbeddingCache | None:
        """Of this process, made when the first sample is drawn (replica lock held)."""
        budget = int(session.config.sampling.cache_bytes)
        if not budget:
            return None
        settings = session.replica.state.settings
        wanted = settings["v_dim"] or 0, settings["q_dim"] or 0, settings["max_size"]
        if self._cache is None or self._cache.made_for != wanted:
            self._cache = EmbeddingCache(budget, *wanted)
        return self._cache

    def rng_state(self) -> dict[str, Any]:
        """State of the buffer's random stream, JSON-like; `set_rng_state` restores it."""
        return rng_state(self._rng)

    def set_rng_state(self, state: Mapping[str, Any]) -> None:
        """Go on drawing where `rng_state` was taken."""
        if not isinstance(state, Mapping):
            raise ConfigError(f"not the state of a random generator: {shown(state)}")
        self._rng = restore_rng(dict(state))

    # ------------------------------------------------------------ upkeep

    @_call
    def save_snapshot(self) -> int:
        """Write a snapshot and drop the logs that it replaces; writers go on meanwhile.

        Returns:
            The LSN it stands for.
        """
        return self._writer().upkeep.snapshot()

    @_call
    def rebuild_index(self) -> bool:
        """Build the index now, in this process; searches go on meanwhile.

        Returns:
            False if there is nothing to build, or another builder is at it.
        """
        return self._writer().upkeep.build_index()

    @_call
    def reembed(
        self,
        embed: Embed,
        *,
        batch_size: int = 256,
        name: str = "",
        progress: Progress | None = None,
    ) -> ReindexReport:
        """Give all experiences new embeddings, of the same dimensions or others.

        Searches go on with the old ones, in all processes, until all is done; then the new ones
        count everywhere at once. Adds go on, too, and wait only for the last few experiences; from
        then on they have to bring embeddings of the new kind. Ids, priorities, counts, rewards and
        receipts stay. Takes room in the log for all payloads once more, until the old ones are
        dropped.

        May be killed at any instant: what was embedded is in the log, and the next call with the
        same `name` goes on there.

        Args:
            embed: Called with up to `batch_size` experiences; returns a mapping with `v_embed`
                (n, v_dim), `q_embed` (n, q_dim), or both; a part that it leaves out stays. It must
                not add to this buffer.
            batch_size: At least 1.
            name: Of the embedding model. Another name begins anew.
            progress: Called now and then with ("embed" | "fuse" | "index", done, total).

        Raises:
            InvalidExperience: The function returned something else; nothing has changed.
            DimensionError: The embeddings of two batches differ in their dimensions.
            ConfigError: The buffer's fusion does not take such dimensions.
            LockTimeout: Another change is under way.
        """
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise InvalidExperience(f"batch_size must be an integer >= 1, not {shown(batch_size)}")
        if not callable(embed):
            raise InvalidExperience(f"embed must be a function, not a {type(embed).__name__}")
        if not isinstance(name, str):
            raise InvalidExperience(f"name must be text, not a {type(name).__name__}")
        return reembed(self._writer(), embed, batch_size=batch_size, name=name, progress=progress)

    @_call
    def stats(self) -> dict[str, Any]:
        """Facts worth showing, JSON-like."""
        session = self._live()
        session.refresh()
        replica, words = session.replica, session.control.words
        with replica.lock:
            state, tiers = replica.state, replica.tiers
            live = state.live_slots()
            known = ~np.isnan(state.reward[live])
            facts: dict[str, Any] = {
                "experiences": state.count,
                "max_size": int(state.settings["max_size"]),
                "total_added": state.total_added,
                "next_id": state.next_id,
                "lsn": state.lsn,
                "durable_lsn": int(words[c.DURABLE]),
                "appended_lsn": int(words[c.APPENDED]),
                "snapshot_lsn": int(words[c.SNAPSHOT_LSN]),
                "settings": dict(state.settings),
                "rewards_known": int(np.count_nonzero(known)),
                "mean_reward": float(state.reward[live][known].mean()) if known.any() else None,
                "retrievals": int(state.retrieval_count[live].sum(dtype=np.int64)),
                "successes": float(state.success_count[live].sum(dtype=np.float64)),
                "index": {
                    "lsn": tiers.lsn,
                    "tail_rows": tiers.tail_rows,
                    "segments": [
                        {
                            "name": segment.info.name,
                            "backend": segment.info.backend,
                            "rows": segment.info.rows,
                            "dead": segment.dead,
                            **segment.index.info(),
                        }
                        for segment in tiers.segments
                    ],
                    "builder_failures": int(words[c.BUILDER_FAILURES]),
                    "changed_rows": max(0, int(words[c.ROWS_ADDED] - words[c.BUILT_ROWS])),
                },
                "log_retirements": int(words[c.RETIREMENTS]),
            }
        if session.path is not None:  # of another process that is building the index just now
            facts["index"]["building_pid"] = holder(session.path / folder.LOCKS / "builder")
        facts["storage"] = session.adapter.stats()
        facts["flush_error"] = session.commit_log.flush_error if session.writable else None
        return facts


def _resolved(where: object) -> Path:
    """The absolute path of a buffer's folder.

    Raises:
        ConfigError: It is no path.
        StorageError: The system does not take it.
    """
    if not isinstance(where, str | os.PathLike | bytes) or not os.fspath(where):
        raise ConfigError(f"path = {where!r}: must be the path of a folder", key="path")
    with storage_errors("open", os.fsdecode(where)):
        path = os.path.abspath(os.fsdecode(where))  # needs the working directory to be there
    if "\0" in path:
        raise ConfigError(f"path = {where!r}: must not contain NUL", key="path")
    with storage_errors("open", Path(path)):
        try:
            os.stat(path)  # a name that is too long, a folder that may not be looked into
        except FileNotFoundError:
            if os.fsdecode(where).startswith("~"):  # `rm -r ~` removes more than was made here
                raise ConfigError(
                    f"path = {where!r}: ~ is not expanded; give os.path.expanduser(path), or "
                    f"'./~…' for a new folder of that name",
                    key="path",
                ) from None
    return Path(path)


def _open_session(arguments: Mapping[str, Any], registry: PluginRegistry) -> Session:
    session = Session(
        arguments["path"],
        arguments["config"],
        registry,
        mode="a" if arguments["mode"] == "x" and arguments.get("opened") else arguments["mode"],
        lock=arguments["lock"],
        fs=arguments["filesystem"] or FileSystem(),
    )
    session.open()
    if isinstance(arguments, dict):
        arguments["opened"] = True
    return session


def _unpickled(
    arguments: dict[str, Any], plugins: list[tuple[str | None, Any]], uuid: bytes
) -> ExperienceBuffer:
    """Open in another process what was pickled in one; it draws a random stream of its own."""
    objects = tuple(importlib.import_module(name) if name else plugin for name, plugin in plugins)
    registry = default_registry()
    if objects:
        registry = registry.with_plugins(objects)
    identity = folder.read_identity(arguments["path"])
    if identity is None or identity.uuid != uuid:
        raise BufferReplaced(f"{arguments['path']} no longer holds the buffer that was pickled")
    complete = {
        **arguments,
        "mode": "a" if arguments["mode"] == "x" else arguments["mode"],
        "plugins": objects,
        "lock": None,
        "seed": None,
        "filesystem": None,
    }
    return ExperienceBuffer(_open_session(complete, registry), complete)


def _accepted(session: Session, experience: Any, priority: float | None) -> tuple[Intake, Accepted]:
    """An experience that can be stored, and what has found it so; fixes the dimensions at first."""
    if not isinstance(experience, Experience):
        raise InvalidExperience(f"expected an Experience, found a {type(experience).__name__}")
    intake = session.intake()
    if intake is None:
        v, q = experience.v_embed, experience.q_embed
        _first_intake(session, v, q, rank=1).one(experience, priority)
        intake = session.intake(v, q)
        assert intake is not None
    return intake, intake.accept(experience, priority)


def _first_intake(session: Session, v: Any, q: Any, *, rank: int) -> Intake:
    """Checks the first experiences as if the buffer had their dimensions.

    Only when they are found good are their dimensions logged as the buffer's.
    """
    if v is None and q is None:
        raise InvalidExperience("an experience needs v_embed, q_embed, or both")
    settings = session.replica.state.settings
    dims = []
    for name, dim, value in (("v_embed", settings["v_dim"], v), ("q_embed", settings["q_dim"], q)):
        if dim is None and value is not None:
            dim = as_vectors(value, name, rank=rank, dim=None).shape[-1]
        dims.append(int(dim or 0))
    try:
        return Intake(
            v_dim=dims[0],
            q_dim=dims[1],
            metric=str(settings["metric"]),
            fusion=session.fusion,
            scorer=session.scorer,
            names=(str(settings["fusion"]["name"]), session.config.priority.backend),
            max_experience_bytes=session.config.max_experience_bytes,
            max_commit_bytes=session.config.max_commit_bytes,
        )
    except ValueError as exc:
        raise ConfigError(str(exc), key="fusion") from exc


def _draft_many(intake: Intake, experiences: Any, priorities: Any) -> Draft:
    if isinstance(experiences, Mapping):
        return intake.columns(experiences, priorities)
    return intake.many(experiences, priorities)


def _submitter() -> Submitter:
    return Submitter(8, "expbuf-submit")


def _never_issued(id_: int, next_id: int) -> UnknownExperienceError:
    return UnknownExperienceError(
        f"id {id_} was never issued; ids so far are below {next_id}", id=id_
    )


def _uniform_without_replacement(state: State, n: int, rng: np.random.Generator) -> Draw:
    if n > state.count:
        raise NotEnoughExperiences(
            f"{n} different experiences were asked for, the buffer holds {state.count}"
        )
    slots = rng.choice(state.live_slots(), n, replace=False)
    return Draw(slots, np.full(n, 1.0 / state.count))


def _check_seed(seed: Any) -> None:
    try:
        np.random.default_rng(seed)
    except (TypeError, ValueError) as exc:
        raise ConfigError(f"seed = {shown(seed)}: {exc}") from exc


def _check_objects(plugins: Any, lock: Any, filesystem: Any) -> None:
    """Raise where arguments of `open` are not the objects that they must be."""
    if not isinstance(plugins, Sequence) or isinstance(plugins, str | bytes):
        raise ConfigError(f"plugins = {shown(plugins)}: must be a list of plugin objects")
    if lock is not None and not (hasattr(lock, "__enter__") and hasattr(lock, "__exit__")):
        raise ConfigError(
            f"lock = {shown(lock)}: must be a context manager, such as threading.Lock()"
        )
    if filesystem is not None and not isinstance(filesystem, FileSystem):
        raise ConfigError(
            f"filesystem = {shown(filesystem)}: must be an expbuf_core.filesystem.FileSystem"
        )
