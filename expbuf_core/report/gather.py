"""What a report is made of, read from a buffer that is opened in mode `r`."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from expbuf_core import codec, folder, snapshots
from expbuf_core.buffer import ExperienceBuffer
from expbuf_core.conditions import LiveColumns
from expbuf_core.config_schema import BufferConfig
from expbuf_core.contracts import LogGone
from expbuf_core.errors import CorruptionError, UnknownExperienceError
from expbuf_core.experience import Experience
from expbuf_core.finding import pinned
from expbuf_core.report.embedding_map import EmbeddingMap, embedding_map
from expbuf_core.report.health import Check, examine
from expbuf_core.report.thumbnails import thumbnail
from expbuf_core.sampling import sampling_weights
from expbuf_core.session import Session

LISTED = 8  # experiences in each ranking
_QUESTION_LENGTH = 200
_ANSWER_LENGTH = 120
_READ_AT_ONCE = 256
_MOST_OPERATIONS = 200_000  # of the log are looked through
_THUMBNAIL_BUDGET = 6 << 20  # characters of all thumbnails of the map
_CONFIDENCE = 1.96  # standard errors: an interval of 95%


class Columns(NamedTuple):
    """Of all live experiences, oldest first; each (n,)."""

    id: NDArray[np.int64]
    timestamp: NDArray[np.float64]
    reward: NDArray[np.float64]
    confidence: NDArray[np.float32]
    priority: NDArray[np.float32]
    retrievals: NDArray[np.float64]
    successes: NDArray[np.float64]

    @property
    def rate(self) -> NDArray[np.float64]:
        """Successes by retrievals; NaN where nothing was retrieved."""
        rates = np.full(len(self.id), np.nan)
        np.divide(self.successes, self.retrievals, out=rates, where=self.retrievals > 0)
        return rates


class Text(NamedTuple):
    """What can be said of an experience in few words. `problem`: why there is nothing."""

    question: str = ""
    answer: str = ""
    label: str = ""
    picture: str | None = None
    problem: str = ""


class Points(NamedTuple):
    """What the map shows: `rows` of the columns, where they lie, and what they say."""

    rows: NDArray[np.intp]
    map: EmbeddingMap
    texts: list[Text]
    all_pictures: bool


class Ranking(NamedTuple):
    """Some experiences in an order: rows of the columns and what they say."""

    rows: NDArray[np.intp]
    texts: list[Text]


class Outcomes(NamedTuple):
    """Recorded outcomes that the log still has, in order.

    Attributes:
        first_lsn: The log is known from here on.
        last_lsn: Up to here.
        lsn: (m,) of each outcome.
        success: (m,) whether the consensus was right.
        used: (m,) experiences that took part.
        add_lsn: (a,) of adds, rising.
        add_id: (a,) first id of each.
    """

    first_lsn: int
    last_lsn: int
    lsn: NDArray[np.int64]
    success: NDArray[np.bool_]
    used: NDArray[np.int64]
    add_lsn: NDArray[np.int64]
    add_id: NDArray[np.int64]


class Facts(NamedTuple):
    """Everything that a report shows."""

    folder: str
    backend: str
    made_at: float
    lsn: int
    stats: Mapping[str, Any]
    columns: Columns
    draws: NDArray[np.float64]  # probability of each to be drawn by `sample`
    ageing: bool  # which `draws` leaves out
    points: Points | None
    most_useful: Ranking
    least_useful: Ranking
    most_drawn: Ranking
    outcomes: Outcomes | None
    checks: list[Check]


def gather(
    path: str | os.PathLike[str],
    *,
    points: int,
    config: str | os.PathLike[str] | Mapping[str, Any] | BufferConfig | None = None,
    seed: int = 0,
) -> Facts:
    """Read what a report shows. Takes no lock that anybody waits for, and writes nothing.

    Args:
        path: Folder of a buffer; it may be in use.
        points: Most experiences on the map.
        config: For the settings of sampling, which the folder does not know.
        seed: Of the choice of points.

    Raises:
        StorageError: There is no buffer.
        CorruptionError: It is too damaged to be opened.
    """
    resolved = Path(os.path.abspath(os.fspath(path)))
    identity = folder.read_identity(resolved)
    with ExperienceBuffer.open(resolved, mode="r", config=config) as buffer:
        stats = buffer.stats()
        session = buffer._live()
        columns, vectors_of = _columns(session)
        lsn = session.replica.state.lsn
        sampling = session.config.sampling
        draws = sampling_weights(columns.priority, columns.retrievals, columns.successes, sampling)
        if len(draws):
            draws = draws / draws.sum()
        rankings = [_most_useful(columns), _least_useful(columns), _first(-draws)]
        reader = _Reader(buffer)
        shown = _points(reader, columns, vectors_of, points, rankings, seed)
        listed = [Ranking(rows, reader.texts(columns.id[rows])) for rows in rankings]
        outcomes, log_problem = _outcomes(session, lsn)
        problems = [*reader.problems, *log_problem]
        checks = examine(resolved, session.uuid, stats, str(buffer.recovery), problems, reader.read)
    return Facts(
        folder=str(resolved),
        backend=identity.backend if identity else "",
        made_at=time.time(),
        lsn=lsn,
        stats=stats,
        columns=columns,
        draws=draws,
        ageing=sampling.ageing != "off",
        points=shown,
        most_useful=listed[0],
        least_useful=listed[1],
        most_drawn=listed[2],
        outcomes=outcomes,
        checks=checks,
    )


def _columns(session: Session) -> tuple[Columns, Any]:
    """The columns, and a function from ids to fused vectors, all of one LSN."""
    replica = session.replica
    with replica.lock:
        live = LiveColumns(replica.state, session.config.sampling)
        columns = Columns(
            id=live.id,
            timestamp=live.timestamp,
            reward=live.reward,
            confidence=live.confidence,
            priority=live.priority,
            retrievals=live.retrieval_count.astype(np.float64),
            successes=live.success_count.astype(np.float64),
        )
        view = replica.tiers.view()
        dims = [segment.vectors.shape[1] for segment in view.segments]
        dim = dims[0] if dims else view.tail_vectors.shape[1]
        return columns, replica.tiers.gatherer(dim)


class _Reader:
    """Reads payloads; remembers those that could not be read."""

    def __init__(self, buffer: ExperienceBuffer) -> None:
        self._buffer = buffer
        self._known: dict[int, Text] = {}
        self.problems: list[str] = []
        self.read = 0

    def texts(self, ids: NDArray[np.int64]) -> list[Text]:
        """What the experiences say, in the order of the ids."""
        missing = np.array([i for i in ids.tolist() if i not in self._known], np.int64)
        for start in range(0, len(missing), _READ_AT_ONCE):
            self._read(missing[start : start + _READ_AT_ONCE])
        return [self._known[id_] for id_ in ids.tolist()]

    def _read(self, ids: NDArray[np.int64]) -> None:
        try:
            found = pinned(self._buffer._live(), ids, missing="skip")
        except CorruptionError as exc:  # their files are missing
            self.problems.append(str(exc))
            self._known.update(dict.fromkeys(ids.tolist(), Text(problem="cannot be read")))
            return
        gone = Text(problem="evicted while this report was made")
        self._known.update(dict.fromkeys(ids.tolist(), gone))
        for i, id_ in enumerate(found.ids.tolist()):
            try:
                self._known[id_] = _text(found[i])
                self.read += 1
            except (CorruptionError, UnknownExperienceError) as exc:
                self.problems.append(str(exc))
                self._known[id_] = Text(problem="the payload is damaged")


def _text(experience: Experience) -> Text:
    label = " ".join([experience.key or "", *(f"#{tag}" for tag in experience.tags)]).strip()
    image = experience.image
    if isinstance(image, str):
        label = f"{label} {image}".strip()
    return Text(
        _shortened(experience.question, _QUESTION_LENGTH),
        _shortened(_plain(experience.answer), _ANSWER_LENGTH),
        _shortened(label, _ANSWER_LENGTH),
        thumbnail(experience),
    )


def _plain(answer: Any) -> str:
    """An answer as text; a tree as JSON, in which arrays and bytes are named, not shown."""
    if answer is None:
        return ""
    if isinstance(answer, str):
        return answer
    return json.dumps(answer, ensure_ascii=False, default=_named)


def _named(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"array {value.shape} {value.dtype}"
    if isinstance(value, bytes):
        return f"{len(value)} bytes"
    return type(value).__name__


def _shortened(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"


# ---------------------------------------------------------------- rankings


def bounds(
    successes: NDArray[np.float64], retrievals: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """95% interval of success rates (Wilson 1927): what so few or so many outcomes allow to say.

    Args:
        successes: (n,), at most the retrievals; fractions of a success are taken as they are.
        retrievals: (n,), above 0.
    """
    z2 = _CONFIDENCE**2
    rate = np.clip(successes / retrievals, 0.0, 1.0)
    middle = rate + z2 / (2 * retrievals)
    width = np.sqrt(z2 * (rate * (1 - rate) / retrievals + z2 / (4 * retrievals**2)))
    scale = 1 + z2 / retrievals
    return (middle - width) / scale, (middle + width) / scale


def _most_useful(columns: Columns) -> NDArray[np.intp]:
    """By the lower end of the interval: 40 of 50 stands before 1 of 1."""
    tried, rate, mean = _tried(columns)
    good = tried[(rate >= mean) & (rate > 0)]
    low, _ = bounds(columns.successes[good], columns.retrievals[good])
    return good[_first(-low)]


def _least_useful(columns: Columns) -> NDArray[np.intp]:
    """By the upper end: 0 of 10 stands before 0 of 1."""
    tried, rate, mean = _tried(columns)
    bad = tried[rate < mean]
    _, high = bounds(columns.successes[bad], columns.retrievals[bad])
    return bad[_first(high)]


def _tried(columns: Columns) -> tuple[NDArray[np.intp], NDArray[np.float64], float]:
    """Rows that were retrieved, their rates, and the rate of all of them together."""
    tried = np.flatnonzero(columns.retrievals > 0)
    successes, retrievals = columns.successes[tried], columns.retrievals[tried]
    mean = float(successes.sum() / retrievals.sum()) if len(tried) else 0.0
    # What lies below the mean only by rounding does not count as worse than the others.
    return tried, successes / retrievals, mean - 1e-9


def _first(keys: NDArray[np.float64]) -> NDArray[np.intp]:
    return np.argsort(keys, kind="stable")[:LISTED]


# ---------------------------------------------------------------- map


def _points(
    reader: _Reader,
    columns: Columns,
    vectors_of: Any,
    most: int,
    rankings: Sequence[NDArray[np.intp]],
    seed: int,
) -> Points | None:
    n = len(columns.id)
    if n == 0:
        return None
    rows = np.arange(n)
    if n > most:
        drawn = np.random.default_rng(seed).choice(n, most, replace=False)
        rows = np.unique(np.concatenate([drawn, *rankings]))
    vectors = vectors_of(columns.id[rows])
    vectors[~np.isfinite(vectors).all(axis=1)] = 0.0  # of those that no part of the index holds
    texts = reader.texts(columns.id[rows])
    spent, all_pictures = 0, True
    for i in np.random.default_rng(seed).permutation(len(texts)).tolist():
        picture = texts[i].picture
        if picture is not None:
            spent += len(picture)
            if spent > _THUMBNAIL_BUDGET:
                texts[i], all_pictures = texts[i]._replace(picture=None), False
    return Points(rows, embedding_map(vectors, seed=seed), texts, all_pictures)


# ---------------------------------------------------------------- outcomes


def _outcomes(session: Session, lsn: int) -> tuple[Outcomes | None, list[str]]:
    """What the log still says about outcomes, and what is wrong with it."""
    assert session.path is not None
    first = max(0, lsn - _MOST_OPERATIONS)
    behind = (at for at in sorted(snapshots.available(session.path)) if at > first)
    for start in (first, *behind):
        try:
            return _read_outcomes(session, start, lsn), []
        except LogGone:
            continue
        except CorruptionError as exc:
            return None, [str(exc)]
    return None, []


def _read_outcomes(session: Session, start: int, lsn: int) -> Outcomes:
    lsns, success, used, add_lsn, add_id = [], [], [], [], []
    receipts: set[bytes] = set()
    first = 0
    follower = session.adapter.follow(start)
    try:
        for operation in follower.read(lsn):
            first = first or operation.lsn
            if operation.kind == codec.ADD:
                add_lsn.append(operation.lsn)
                add_id.append(operation.first_id)
            elif operation.kind == codec.OUTCOME:
                outcome = codec.decode_outcome(operation.body)
                if any(outcome.receipt):
                    if outcome.receipt in receipts:  # counted once
                        continue
                    receipts.add(outcome.receipt)
                lsns.append(operation.lsn)
                success.append(outcome.success)
                used.append(len(outcome.ids))
    finally:
        follower.close()
    return Outcomes(
        first,
        lsn,
        np.array(lsns, np.int64),
        np.array(success, bool),
        np.array(used, np.int64),
        np.array(add_lsn, np.int64),
        np.array(add_id, np.int64),
    )
