"""Changing the representation: other fusion, metric, index or embeddings, while others go on.

    rows with new embeddings -> vectors, fused and staged -> index, aside -> one logged SETTINGS
    (`reembed` only)            parts of `index/N`           manifest        representation: N

The fused vectors of a buffer are of one *representation*, which has a number. What the next one
needs is made beside what is searched, in a folder of its own. Until SETTINGS is logged nothing of
it counts; from there on, in every process, nothing else does. What came in meanwhile each replica
fuses again, from the payloads.

Killed at any instant, a change leaves what it has done: rows in the log, finished parts in the
folder. The next call goes on there.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from expbuf_core import checksums, codec, folder, frames, indexing, payloads, segments
from expbuf_core import control as c
from expbuf_core.codec import ReembedBody
from expbuf_core.commit import Draft, Lock
from expbuf_core.config_schema import BufferConfig, load_config
from expbuf_core.contracts import EmbeddingFusion, LogGone, Operation
from expbuf_core.crc import crc32
from expbuf_core.embeddings import as_vectors, fuse, fused_dim
from expbuf_core.errors import ConfigError, CorruptionError, InvalidExperience, StorageError
from expbuf_core.experience import Experience
from expbuf_core.filesystem import FileSystem, storage_errors
from expbuf_core.plugins import PluginRegistry, default_registry
from expbuf_core.results import PinnedExperiences
from expbuf_core.segments import Manifest, SegmentInfo
from expbuf_core.session import CHANGING, Session

Embed = Callable[[Sequence[Experience]], Mapping[str, Any]]
"""Makes embeddings: n experiences to `{"v_embed": (n, v_dim), "q_embed": (n, q_dim)}`."""

Progress = Callable[[str, int, int], None]
"""Called with ("embed" | "fuse" | "index", done, total)."""

_PART_ROWS = 1 << 16  # vectors in one part: what a kill loses at most
_READ_ROWS = 512  # payloads read, or moved, at once
_COMMIT_BYTES = 4 << 20  # of rows in one operation
_FEW = 1024  # so many may be left to be fused by each replica for itself
_ROUNDS = 4  # of building for what came in meanwhile
_TRIES = 100
_LONG_S = 600.0  # for a snapshot to be finished
_PART = re.compile(r"part-(\d{6})-([0-9a-f]{8})\.vectors")


@dataclass(frozen=True)
class ReindexReport:
    """What was changed.

    Attributes:
        path: Folder of the buffer; None in memory.
        representation: Number of the one that counts now; the same as before where only the index
            backend was changed.
        experiences: In the buffer.
        resumed: How many an interrupted call had re-embedded or fused before.
        lsn: From which operation on it counts.
    """

    path: Path | None
    representation: int
    experiences: int
    resumed: int
    lsn: int


def reindex(
    path: str | os.PathLike[str],
    *,
    config: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    filesystem: FileSystem | None = None,
    **overrides: Any,
) -> ReindexReport:
    """Change fusion, metric or index backend of a buffer, from the embeddings that it has.

    Other processes may search and add meanwhile: they go over by themselves. May be killed at any
    instant, and called again to go on.

    Args:
        path: Folder of the buffer.
        config: A YAML file or a mapping; of it count `fusion`, `embedding.metric` and `index`.
            What it does not name stays, and the index is built by `index` in any case.
        progress: Called now and then.
        filesystem: Does all writing; for tests that record or fail it.
        **overrides: Keys of the configuration (`fusion="weighted_concat"`).

    Raises:
        ConfigError: The fusion does not go with the buffer's dimensions.
        StorageError: There is no buffer, or it cannot be written.
        LockTimeout: Another change is under way.
        PluginError: A backend cannot be used.
    """
    registry = default_registry()
    wanted = load_config(config, overrides=overrides or None, env={}, registry=registry)
    place = Path(os.path.abspath(os.fspath(path)))
    if folder.read_identity(place) is None:
        raise folder.no_buffer(place)
    with _opened(place, wanted, registry, filesystem or FileSystem()) as session:
        with _alone(session):
            settings = _wanted_settings(session, wanted)
            if settings != session.replica.state.settings:
                return _Change(session, progress).to(settings)
        return _rebuilt(session)


def reembed(
    session: Session,
    embed: Embed,
    *,
    batch_size: int,
    name: str,
    progress: Progress | None,
) -> ReindexReport:
    """Replace the embeddings of all experiences; see `ExperienceBuffer.reembed`."""
    with _alone(session):
        change = _Change(session, progress, _Embedding(embed, batch_size, name))
        return change.to(session.replica.state.settings)


@contextlib.contextmanager
def _alone(session: Session) -> Iterator[None]:
    """Exclude other changes; inside, all is seen that those before have made of the buffer."""
    lock = session.change_lock()
    with contextlib.closing(lock), lock:
        session.commit_log.sync()  # one may have died before it published its settings
        session.refresh()
        yield


# ---------------------------------------------------------------- what is wanted


@contextlib.contextmanager
def _opened(
    path: Path, wanted: BufferConfig, registry: PluginRegistry, fs: FileSystem
) -> Iterator[Session]:
    index = {**wanted.index.model_dump(mode="json"), "builder": "off"}
    # The fusion is not given: it may contradict the folder, and is to.
    config = load_config(
        {"index": index, "lock_timeout_s": wanted.lock_timeout_s}, env={}, registry=registry
    )
    session = Session(path, config, registry, mode="a", lock=None, fs=fs)
    session.any_fusion = True
    session.open()
    try:
        yield session
    finally:
        session.close()


def _wanted_settings(session: Session, wanted: BufferConfig) -> dict[str, Any]:
    settings = dict(session.replica.state.settings)
    if "embedding.metric" in wanted.explicit:
        settings["metric"] = wanted.embedding.metric
    if any(key == "fusion" or key.startswith("fusion.") for key in wanted.explicit):
        name = wanted.fusion.backend
        section = wanted.fusion.section(name)
    else:
        name, section = settings["fusion"]["name"], settings["fusion"]["settings"]
    model = session.registry.settings("fusion", name, section)
    fusion = _fusion(session.registry, name, model)
    settings["fusion"] = {
        "name": name,
        "version": int(fusion.version),
        "settings": model.model_dump(mode="json"),
    }
    return settings


def _fusion(registry: PluginRegistry, name: str, model: Any) -> EmbeddingFusion:
    fusion: EmbeddingFusion = registry.make("fusion", name, model)
    return fusion


def _rebuilt(session: Session) -> ReindexReport:
    """The same vectors in another index."""
    state = session.replica.state
    if session.path is not None and session.intake() is not None:
        while not session.upkeep.build_index(anew=True):
            with _held(session.builder_lock):  # another builder is at it: wait for it
                pass
    return ReindexReport(session.path, state.representation, state.count, 0, state.lsn)


@contextlib.contextmanager
def _held(lock: Lock) -> Iterator[None]:
    lock.acquire(_LONG_S)
    try:
        yield
    finally:
        lock.release()


# ---------------------------------------------------------------- new embeddings


class _Embedding(NamedTuple):
    """Who makes new embeddings."""

    embed: Embed
    batch_size: int
    name: str

    def run(
        self, experiences: PinnedExperiences, dims: tuple[int, int] | None
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """New embeddings of a batch, checked; a part that is not given stays.

        Args:
            experiences: n.
            dims: That others of this change have; None for the first.

        Returns:
            (n, v_dim) and (n, q_dim) float32.
        """
        made = self.embed(list(experiences))
        if not isinstance(made, Mapping) or not made or not {*made} <= {"v_embed", "q_embed"}:
            found = sorted(map(str, made)) if isinstance(made, Mapping) else type(made).__name__
            raise InvalidExperience(
                "the function must return a mapping with v_embed, q_embed, or both; it returned "
                f"{found}"
            )
        parts = []
        for part, dim in zip(("v_embed", "q_embed"), dims or (None, None), strict=True):
            if part in made:
                vectors = as_vectors(made[part], part, rank=2, dim=dim)
            else:
                vectors = experiences.embeddings(part)
            if len(vectors) != len(experiences):
                raise InvalidExperience(
                    f"{part}: {len(vectors)} embeddings for {len(experiences)} experiences"
                )
            parts.append(vectors)
        return parts[0], parts[1]


# ---------------------------------------------------------------- the change


class _Change:
    """One change of the representation of a buffer that this session has open for writing.

    It is the only one from its beginning to its end, see `_alone`.
    """

    def __init__(
        self, session: Session, progress: Progress | None, embedding: _Embedding | None = None
    ) -> None:
        self.session = session
        self.embedding = embedding
        self._progress = progress or (lambda step, done, total: None)
        self._resumed = 0
        self._dims: tuple[int, int] | None = None

    def to(self, settings: Mapping[str, Any]) -> ReindexReport:
        """Make it, to these settings; their representation is chosen here."""
        session = self.session
        self.settings = dict(settings)
        self.settings["representation"] = self._number()
        if session.intake() is not None:
            self._make()
        lsn = self._switch()
        self._clear_away()
        state = session.replica.state
        return ReindexReport(session.path, state.representation, state.count, self._resumed, lsn)

    def _number(self) -> int:
        """Number of the new representation; an interrupted call's, if this one goes on with it."""
        with self.session.replica.lock:
            state = self.session.replica.state
            pending = state.reembedded
            newest = max(state.representation, pending.representation if pending else 0)
            if pending is None or self.embedding is None or pending.name != self.embedding.name:
                return newest + 1
            self._resumed = len(pending.columns()["id"])
            return pending.representation

    @property
    def number(self) -> int:
        """Of the new representation."""
        return int(self.settings["representation"])

    def _make(self) -> None:
        """Everything that can be done before the change counts."""
        if self.embedding is not None:
            self._embed()
            if self._dims is None:  # there is nothing to be embedded
                return
            self.settings["v_dim"], self.settings["q_dim"] = self._dims
        self._fuse_by(self.settings)
        if self.session.path is not None:
            self._build(self.session.path)

    def _fuse_by(self, settings: Mapping[str, Any]) -> None:
        """Make the fusion of these settings, and see that it takes their dimensions."""
        registry, stored = self.session.registry, settings["fusion"]
        model = registry.settings("fusion", stored["name"], stored["settings"])
        self.fusion = _fusion(registry, stored["name"], model)
        try:
            dims = settings["v_dim"], settings["q_dim"]
            self.dim = fused_dim(self.fusion, *dims, stored["name"])
        except ValueError as exc:
            raise ConfigError(str(exc), key="fusion") from exc

    # ------------------------------------------------------------ rows with new embeddings

    def _without_embedding(self) -> tuple[NDArray[np.int64], int]:
        """Live ids that the new representation has no embeddings for, and the id that is next."""
        with self.session.replica.lock:
            state = self.session.replica.state
            ids, pending = state.live_ids(), state.reembedded
            if pending is not None and pending.representation == self.number:
                ids = ids[~np.isin(ids, pending.columns()["id"], assume_unique=True)]
            return ids, state.next_id

    def _embed(self) -> int:
        """Log rows with new embeddings for all that have none.

        Returns:
            The id that was next when it was seen what has none: experiences from there on have
            come since, and are not embedded.
        """
        embedding, session = self.embedding, self.session
        assert embedding is not None
        if self._dims is None:
            self._dims = self._dims_so_far()
        missing, next_id = self._without_embedding()
        total = session.replica.state.count
        done = total - len(missing)
        for start in range(0, len(missing), embedding.batch_size):
            chosen = self._pinned(missing[start : start + embedding.batch_size])
            if len(chosen):
                v, q = embedding.run(chosen, self._dims)
                self._fits(v.shape[1], q.shape[1])
                self._dims = (v.shape[1], q.shape[1])
                self._log(chosen, v, q)
            done += embedding.batch_size
            self._progress("embed", min(done, total), total)
        return next_id

    def _dims_so_far(self) -> tuple[int, int] | None:
        """Dimensions of what an interrupted call has embedded."""
        while True:
            with self.session.replica.lock:
                state = self.session.replica.state
                pending = state.reembedded
                if pending is None or pending.representation != self.number:
                    return None
                ids = pending.columns()["id"]
                ids = ids[state.find(ids) >= 0]
            if not len(ids):
                return None
            _, v, q = self._parts(ids[-1:])  # the newest, which is evicted last
            if len(v):
                return v.shape[1], q.shape[1]

    def _fits(self, v_dim: int, q_dim: int) -> None:
        """See that the buffer's fusion takes such embeddings, before any is logged."""
        if self._dims is None:
            try:
                fused_dim(self.session.fusion, v_dim, q_dim)
            except ValueError as exc:
                raise ConfigError(str(exc), key="fusion") from exc

    def _log(
        self, chosen: PinnedExperiences, v: NDArray[np.float32], q: NDArray[np.float32]
    ) -> None:
        assert self.embedding is not None
        rows, begin = bytearray(), 0
        lengths: list[int] = []
        seals: list[int] = []
        ids = chosen.ids
        for i, id_ in enumerate(ids.tolist()):
            row = codec.reembedded_row(chosen.raw(i), v[i], q[i])
            length = np.array([len(row)], np.uint32)
            seal = frames.stamp_rows(row, length, codec.content_crcs(row, length), id_)
            rows += row
            lengths.append(len(row))
            seals.append(int(seal[0]))
            if len(rows) < _COMMIT_BYTES and i + 1 < len(ids):
                continue
            body = codec.encode_reembed(
                ReembedBody(self.number, self.embedding.name, ids[begin : i + 1])
            )
            operation = Operation(
                codec.REEMBED,
                body,
                crc32(body),
                bytes(rows),
                np.array(lengths, np.uint32),
                np.array(seals, np.uint32),
            )
            self.session.commit(Draft(operation, weight=0))
            rows, begin, lengths, seals = bytearray(), i + 1, [], []

    # ------------------------------------------------------------ reading

    def _pinned(self, ids: NDArray[np.int64]) -> PinnedExperiences:
        """Experiences, as they are searched now; those that are gone are left out."""
        session = self.session
        for attempt in range(_TRIES):
            with session.replica.lock:
                state = session.replica.state
                slots = state.find(ids)
                live = slots >= 0
                chosen = PinnedExperiences(ids[live], slots[live], state)
            try:
                pin = session.adapter.pin(chosen.ids, chosen.locations, chosen.lengths)
            except LogGone as exc:
                gone = exc
                session.catch_up_after_deletion(attempt)
                continue
            chosen.pin(pin, session.tell_corruption)
            return chosen
        raise session.payloads_gone(gone)

    def _parts(
        self, ids: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.float32]]:
        """Ids that are live, and their embeddings as the new representation has them."""
        session = self.session
        for attempt in range(_TRIES):
            with session.replica.lock:
                state = session.replica.state
                slots = state.find(ids)
                ids, slots = ids[slots >= 0], slots[slots >= 0]
                places, lengths = state.location[slots], state.length[slots]
                dims = state.dims if self.embedding is None else self._dims
                if self.embedding is not None and state.reembedded is not None:
                    new = state.reembedded.columns()
                    at = np.searchsorted(new["id"], ids)
                    at[at == len(new["id"])] = 0
                    here = new["id"][at] == ids if len(new["id"]) else np.zeros(len(ids), bool)
                    ids, places, lengths = (
                        ids[here],
                        new["location"][at[here]],
                        new["length"][at[here]],
                    )
            try:
                pin = session.adapter.pin(ids, places, lengths)
                break
            except LogGone as exc:
                gone = exc
                session.catch_up_after_deletion(attempt)
        else:
            raise session.payloads_gone(gone)
        if not len(ids):
            return ids, np.empty((0, 0), np.float32), np.empty((0, 0), np.float32)
        return ids, *payloads.read_embeddings(pin, ids, dims)

    # ------------------------------------------------------------ the index, aside

    def _build(self, path: Path) -> None:
        """Fuse and index what there is; then what has come in meanwhile, until that is little."""
        session, fs = self.session, self.session.fs
        home = segments.home(path, self.number)
        target = {**self.settings, "dim": self.dim}
        if indexing.read_target(home) != target:
            segments.drop_representations(path, lambda number: number == self.number, fs)
            indexing.write_target(home, target, fs)
        choice = session.index_choice(self.dim, str(self.settings["metric"]), self.number)
        wanted = indexing.representation(self.settings)
        with contextlib.suppress(CorruptionError):
            found = segments.read_manifest(home)
        done = list(found.segments) if found and found.representation == wanted else []
        for _ in range(_ROUNDS):
            end = max((info.end_id for info in done), default=0)
            with session.replica.lock:
                session.refresh()
                state = session.replica.state
                lsn, next_id, live = state.lsn, state.next_id, state.live_ids()
            if self.embedding is not None:
                next_id = min([next_id, *self._without_embedding()[0][:1].tolist()])
            new = live[(live >= end) & (live < next_id)]
            if len(new) <= (_FEW if done else 0):
                break
            session.commit_log.sync()  # nothing derived is ahead of the log, parts neither
            made = self._segment(home, choice, new, end, next_id, len(done))
            if made is not None:
                done.append(made)
                manifest = Manifest(
                    lsn=lsn,
                    generation=len(done),
                    dim=self.dim,
                    metric=str(self.settings["metric"]),
                    representation=wanted,
                    segments=tuple(done),
                )
                segments.write_manifest(home, manifest, fs)
            _drop_parts(home, fs)
            if self.embedding is not None:
                self._embed()
        self._announce(choice)

    def _segment(
        self,
        home: Path,
        choice: indexing.IndexChoice,
        ids: NDArray[np.int64],
        first_id: int,
        end_id: int,
        number: int,
    ) -> SegmentInfo | None:
        """Fuse and index these ids, which lie in [first_id, end_id); None if all are gone."""
        parts = self._staged(home, ids, first_id)
        backend = choice.chosen()
        with self.session.replica.lock:
            live = self.session.replica.state.live_ids()
        kept = [np.isin(part_ids, live, assume_unique=True) for part_ids, _ in parts]
        if not any(keep.any() for keep in kept):
            return None
        self._progress("index", 0, 1)
        made = segments.write_segment(
            home,
            f"{number + 1:06d}",
            uuid=self.session.uuid,
            ids=np.concatenate([part[0][keep] for part, keep in zip(parts, kept, strict=True)]),
            vectors=(
                part[1][rows[at : at + _PART_ROWS // 4]]
                for part, keep in zip(parts, kept, strict=True)
                for rows in (np.flatnonzero(keep),)
                for at in range(0, len(rows), _PART_ROWS // 4)
            ),
            dim=self.dim,
            end_id=end_id,
            backend_name=backend,
            backend=choice.make(backend),
            fs=self.session.fs,
        )
        self._progress("index", 1, 1)
        return made

    def _staged(
        self, home: Path, ids: NDArray[np.int64], first_id: int
    ) -> list[tuple[NDArray[np.int64], NDArray[np.float32]]]:
        """Fused vectors of these ids, in files of some ten thousand each; those there are kept."""
        fs, parts = self.session.fs, []
        for path in _parts_of(home):
            part = segments.map_vectors(path, self.dim)
            if part[0][0] < first_id:  # of a segment that is finished
                _drop_parts(home, fs)
                break
            parts.append(part)
        begin = int(np.searchsorted(ids, parts[-1][0][-1], side="right")) if parts else 0
        if self.embedding is None:
            self._resumed = max(self._resumed, begin)
        self._progress("fuse", begin, len(ids))
        while begin < len(ids):
            some = ids[begin : begin + _PART_ROWS]
            found, vectors = self._fused(some, begin, len(ids))
            begin += len(some)
            if not len(found):
                continue
            with storage_errors("write", home):
                path = home / f"part.{os.getpid()}.tmp"
                segments.write_vectors(
                    path, found, iter([vectors]), self.dim, self.session.uuid, fs
                )
                final = home / f"part-{len(parts):06d}-{checksums.file_crc(path)[1]:08x}.vectors"
                fs.replace(path, final)
                fs.sync_folder(home)
            parts.append(segments.map_vectors(final, self.dim))
        return parts

    def _fused(
        self, ids: NDArray[np.int64], done: int, total: int
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        found, blocks = [], []
        for start in range(0, len(ids), _READ_ROWS):
            live, v, q = self._parts(ids[start : start + _READ_ROWS])
            if len(live):
                found.append(live)
                metric = str(self.settings["metric"])
                name = self.settings["fusion"]["name"]
                blocks.append(fuse(self.fusion, metric, v, q, self.dim, name))
            self._progress("fuse", done + min(start + _READ_ROWS, len(ids)), total)
        if not found:
            return np.empty(0, np.int64), np.empty((0, self.dim), np.float32)
        return np.concatenate(found), np.concatenate(blocks)

    def _announce(self, choice: indexing.IndexChoice) -> None:
        """Let all processes open the new index before it counts, and open it here."""
        session, words = self.session, self.session.control.words
        words[c.NEXT_REPRESENTATION] = self.number
        words[c.INDEX_GENERATION] += 1  # which makes them look
        assert session.path is not None
        settings = self.settings
        manifest, opened = indexing.load(session.path, session.replica, choice, settings)
        if manifest is not None:
            session.prepare(choice, manifest, opened)

    # ------------------------------------------------------------ from here on it counts

    def _switch(self) -> int:
        """Log the change; the LSN. Adds wait meanwhile: for the last embeddings, if any."""
        session, words = self.session, self.session.control.words
        with _held(session.maintenance), session.representation_lock():
            words[c.REPRESENTATION] = session.replica.state.representation | CHANGING
            for _ in range(_TRIES):
                session.commit_log.sync()
                session.refresh()
                condition = {}
                if self.embedding is not None:
                    # An add that had looked before the word was set may still come, now or behind
                    # the last rows. Then the settings do nothing, and it is embedded as well.
                    condition = {"if_next_id": self._embed()}
                    if self._dims is None:  # there is nothing to be embedded
                        words[c.REPRESENTATION] = session.replica.state.representation
                        return session.replica.state.lsn
                settings = {**self._last_settings(), **condition}
                if settings["v_dim"] is not None and settings["q_dim"] is not None:
                    self._fuse_by(settings)  # the first add may have come meanwhile
                lsn, _, _ = session.commit(Draft(codec.encode_settings(settings), weight=0))
                if session.replica.state.representation == self.number:
                    words[c.REPRESENTATION] = self.number
                    return lsn
        raise StorageError(f"{session.path}: adds do not cease; the change was not made")

    def _last_settings(self) -> dict[str, Any]:
        """The new settings, with what others have set meanwhile."""
        current = dict(self.session.replica.state.settings)
        current.update((key, self.settings[key]) for key in ("metric", "fusion", "representation"))
        if self._dims is not None:
            current["v_dim"], current["q_dim"] = self._dims
        return current

    def _clear_away(self) -> None:
        """Delete what no representation needs that counts or may come to count."""
        session = self.session
        if session.path is None:
            return
        session.control.words[c.NEXT_REPRESENTATION] = 0
        number = session.replica.state.representation
        if session.builder_lock.try_acquire():  # else the next build does it
            try:
                segments.drop_representations(session.path, lambda n: n != number, session.fs)
            finally:
                session.builder_lock.release()


def _parts_of(home: Path) -> list[Path]:
    """Intact parts in order; what follows a damaged or missing one is left out."""
    names = sorted(name for name in os.listdir(home) if _PART.fullmatch(name))
    intact = []
    for i, name in enumerate(names):
        match = _PART.fullmatch(name)
        assert match is not None
        if int(match[1]) != i or checksums.file_crc(home / name)[1] != int(match[2], 16):
            break
        intact.append(home / name)
    return intact


def _drop_parts(home: Path, fs: FileSystem) -> None:
    for name in os.listdir(home):
        if _PART.fullmatch(name):
            fs.unlink(home / name)
