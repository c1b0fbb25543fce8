"""Experiences by id and by likeness: looked up, held on to, searched for."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from expbuf_core.conditions import Condition, matching_slots
from expbuf_core.contracts import LogGone
from expbuf_core.embeddings import as_vectors
from expbuf_core.errors import (
    InvalidExperience,
    UnknownExperienceError,
    shown,
)
from expbuf_core.results import PinnedExperiences, Receipt, SearchBatch, SearchResult
from expbuf_core.session import Session
from expbuf_core.state import State
from expbuf_core.tiers import best, search
from expbuf_core.values import as_ids

Parts = tuple[Any, Any, Any]
"""What is searched for: a visual and a question embedding, or a fused one; None where it lacks."""

Left = ArrayLike | Iterable[int] | None
"""Ids to leave out."""

_PIN_TRIES = 5
_MOST = 1 << 31  # results of a search
_PADDED = 1 << 24  # results of a batch, as many as whose padding is no matter
_SEARCH_TRIES = 3
_CHANGES = 100  # of the representation that a search may meet

Rest = TypeVar("Rest")


# ---------------------------------------------------------------- by id


def held(
    session: Session, choose: Callable[[State], tuple[PinnedExperiences, Rest]]
) -> tuple[PinnedExperiences, Rest]:
    """Experiences whose payloads stay readable, whatever is evicted and deleted from now on.

    Args:
        session: Of the buffer.
        choose: Which, and whatever belongs to them; called under the lock of the replica.

    Raises:
        CorruptionError: Their payloads are gone.
    """
    for attempt in range(_PIN_TRIES):
        with session.replica.lock:
            chosen, rest = choose(session.replica.state)
        try:
            chosen.pin(
                session.adapter.pin(chosen.ids, chosen.locations, chosen.lengths),
                session.tell_corruption,
            )
        except LogGone as exc:  # evicted and deleted since: look again at what there is
            gone = exc
            session.catch_up_after_deletion(attempt)
        else:
            return chosen, rest
    raise session.payloads_gone(gone)


def pinned(session: Session, ids: NDArray[np.int64], *, missing: str) -> PinnedExperiences:
    """Experiences by id, held on to. `missing`: "raise" or "skip"."""

    def choose(state: State) -> tuple[PinnedExperiences, None]:
        slots, complete = state.look_up(ids)
        if complete:
            return PinnedExperiences(ids, slots, state), None
        present = slots >= 0
        if missing == "raise":
            gone = int(ids[~present][0])
            raise UnknownExperienceError(
                f"experience {gone} is no longer here: it was evicted or removed", id=gone
            )
        return PinnedExperiences(ids[present], slots[present], state), None

    return held(session, choose)[0]


# ---------------------------------------------------------------- by likeness


def search_one(
    session: Session, parts: Parts, k: int | None, where: Condition | None, exclude: Left
) -> SearchResult:
    """See `ExperienceBuffer.search_index`."""
    started = _started(session)
    session.refresh()
    k = _checked_k(session, k)
    asked = _Question(session, parts, rank=1)
    left_out = _left_out(exclude)
    for _ in range(_SEARCH_TRIES):
        found, similarities = _search(session, asked, k, where, left_out)
        ids, values = found[0], similarities[0]
        if ids[-1] < 0:
            ids, values = ids[ids >= 0], values[ids >= 0]
        chosen = pinned(session, ids, missing="skip")
        if len(chosen) == len(values):
            break
        # Removed since by another thread: others may take its place at the next try.
        values = values[np.isin(ids, chosen.ids)]
    sampling, lsn = session.config.sampling, session.replica.state.lsn
    if started is not None:
        _tell(session, lsn, k, 1, started)
    return SearchResult(
        chosen,
        values,
        prior=(sampling.success_prior, sampling.success_prior_count),
        buffer=session.name,
        lsn=lsn,
    )


def search_batch(
    session: Session, parts: Parts, k: int | None, where: Condition | None, exclude: Left
) -> SearchBatch:
    """See `ExperienceBuffer.search_many`."""
    started = _started(session)
    session.refresh()
    k = _checked_k(session, k)
    asked = _Question(session, parts, rank=2)
    left_out, replica = _left_out(exclude), session.replica
    most = min(int(replica.state.settings["max_size"]), _MOST - 1)
    if k > most and k * len(asked.vectors) > _PADDED:
        raise InvalidExperience(
            f"k = {k:,}: results are padded to it, and this buffer holds at most {most:,} "
            "experiences; ask for no more"
        )
    for _ in range(_SEARCH_TRIES):
        ids, similarities = _search(session, asked, k, where, left_out)
        with replica.lock:
            gone = replica.state.find(ids.reshape(-1)).reshape(ids.shape) < 0
        gone &= ids >= 0
        if not gone.any():
            break
        # Removed since by another thread: others may take its place at the next try.
        ids, similarities = _without(gone, ids, similarities, k)
    missing = ((0, 0), (0, k - ids.shape[1]))
    ids = np.pad(ids, missing, constant_values=-1)
    similarities = np.pad(similarities, missing, constant_values=-np.inf)
    prefix, lsn = session.name, session.replica.state.lsn
    receipts = [
        Receipt.new(prefix, lsn, tuple(id_ for id_ in row if id_ >= 0)) for row in ids.tolist()
    ]
    if started is not None:
        _tell(session, lsn, k, len(ids), started)
    return SearchBatch(ids, similarities, receipts)


class _Question:
    """What is searched for, fused as the buffer does at the time.

    Attributes:
        vectors: (m, dim) float32, checked as far as the buffer knows what it holds.
        representation: That they are of; None where the buffer holds nothing yet.
    """

    __slots__ = ("_parts", "_rank", "_session", "representation", "vectors")

    vectors: NDArray[np.float32]
    representation: int | None

    def __init__(self, session: Session, parts: Parts, *, rank: int) -> None:
        self._session = session
        self._parts = parts
        self._rank = rank
        self.fuse()

    def fuse(self) -> None:
        """Fuse, again where the representation has changed since."""
        intake = self._session.intake()
        if intake is not None:
            self.representation = intake.representation
            self.vectors = intake.query(*self._parts, rank=self._rank)
            return
        named = zip(("v_embed", "q_embed", "hybrid_embed"), self._parts, strict=True)
        rank = self._rank
        given = [as_vectors(x, name, rank=rank, dim=None) for name, x in named if x is not None]
        if not given:
            raise InvalidExperience("a search needs v_embed, q_embed or hybrid_embed")
        self.representation = None
        self.vectors = np.empty((1 if rank == 1 else len(given[0]), 0), np.float32)


def _checked_k(session: Session, k: int | None) -> int:
    if k is None:
        return int(session.config.inference.k)
    if isinstance(k, bool) or not isinstance(k, int | np.integer) or k < 1:
        raise InvalidExperience(f"k must be an integer of at least 1, not {shown(k)}")
    return min(int(k), _MOST)  # nothing holds more


def _left_out(exclude: Left) -> NDArray[np.int64]:
    return as_ids(() if exclude is None else exclude, "exclude")


def _search(
    session: Session,
    asked: _Question,
    k: int,
    where: Condition | None,
    left_out: NDArray[np.int64],
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Ids and similarities, (m, up to k), padded with -1 and -inf.

    What is removed while the search is under way may be among them: filter once more.
    """
    replica = session.replica
    for _ in range(_CHANGES):
        with replica.lock:
            state, tiers = replica.state, replica.tiers
            if asked.representation in (tiers.representation, None):
                view, count, metric = tiers.view(), state.count, tiers.metric
                allowed = None
                if where is not None:
                    slots = matching_slots(where, state, session.config.sampling)
                    allowed = state.id[slots]
                    count = len(allowed)
                break
        session.refresh()
        asked.fuse()
    else:
        raise RuntimeError("the representation has changed during each of many tries")
    wanted = min(k + len(left_out), max(count, 1))
    ids, similarities = search(view, metric, asked.vectors, wanted, allowed)
    if not len(left_out):
        return ids, similarities
    return _without(np.isin(ids, left_out), ids, similarities, k)


def _without(
    gone: NDArray[np.bool_], ids: NDArray[np.int64], similarities: NDArray[np.float32], k: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Results without some of them, at most k."""
    similarities = np.where(gone, np.float32(-np.inf), similarities)
    ids, similarities = best(ids, similarities, k)
    return np.where(np.isneginf(similarities), -1, ids), similarities


# ---------------------------------------------------------------- the event


def _started(session: Session) -> float | None:
    """When a search began; None where nobody wants to know."""
    return time.monotonic() if "expbuf_on_searched" in session.registry.events else None


def _tell(session: Session, lsn: int, k: int, queries: int, started: float) -> None:
    seconds = time.monotonic() - started
    wanted, choice = session.config.index.backend, session.choice
    searched = session.replica.tiers.segments
    session.registry.fire(
        "expbuf_on_searched",
        path=str(session.path or ""),
        lsn=lsn,
        k=k,
        queries=queries,
        seconds=seconds,
        degraded=(choice is not None and choice.unopened)
        or any(segment.info.backend != wanted for segment in searched),
    )
