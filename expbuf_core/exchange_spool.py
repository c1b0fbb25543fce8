"""What an import reads, checked and encoded aside, so that a transfer can copy it."""

from __future__ import annotations

import dataclasses
import os
import tempfile
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
from numpy.typing import NDArray

from expbuf_core import codec, frames
from expbuf_core.config_schema import BufferConfig
from expbuf_core.contracts import Buffer, Pin
from expbuf_core.embeddings import fused_dim
from expbuf_core.errors import ConfigError, InvalidExperience, StorageError
from expbuf_core.exchange_formats import Reader
from expbuf_core.exchange_records import Item
from expbuf_core.experience import Experience
from expbuf_core.filesystem import storage_errors
from expbuf_core.intake import Intake
from expbuf_core.plugins import PluginRegistry
from expbuf_core.state import State
from expbuf_core.transfer import Content, Progress

SETTINGS = ("v_dim", "q_dim", "metric", "fusion", "max_size", "receipts_kept")
"""Of a buffer, as they stand in the header of an export."""

_BATCH = 256


def new(item: Item) -> Experience:
    """An experience that is new to the buffer that it is added to."""
    return dataclasses.replace(item.experience, id=None)


class Spool:
    """Checks and encodes what is imported, into nameless files beside the target.

    So that bad input is met before anything is written, and a copy knows what it copies. Nothing of
    these files is left, whatever happens to the process.
    """

    def __init__(
        self,
        reader: Reader,
        options: BufferConfig,
        registry: PluginRegistry,
        goal: Path,
        progress: Progress | None,
    ) -> None:
        self._reader, self._options, self._registry = reader, options, registry
        self._progress = progress
        self.settings: dict[str, Any] = {}
        place = goal.parent
        with storage_errors("write", place):
            self._rows: IO[bytes] = tempfile.TemporaryFile(dir=place)  # noqa: SIM115
            self._fused: IO[bytes] = tempfile.TemporaryFile(dir=place)  # noqa: SIM115
        self._columns: dict[str, list[NDArray[Any]]] = {}
        self._tags: list[list[str]] = []
        self._rewards: dict[int, dict[str, float]] = {}
        self.ids = np.empty(0, np.int64)
        self.dim = 0

    def __enter__(self) -> Spool:
        try:
            self._read()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self._rows.close()
        self._fused.close()

    def copying(self, done: int, total: int) -> None:
        """Progress of the copy: the second and third third of it all."""
        if self._progress is not None:
            self._progress(self._reader.count + done, self._reader.count + total)

    # ------------------------------------------------------------ reading

    def _read(self) -> None:
        reader, at, done = self._reader, 0, 0
        intake: Intake | None = None
        last_id = -1
        for batch in reader.batches():
            for start in range(0, len(batch), _BATCH):
                items = batch[start : start + _BATCH]
                if intake is None:
                    intake = self._intake(items[0])
                ids = self._ids_of(items, done, last_id)
                last_id = int(ids[-1])
                at = self._store(intake, items, ids, at, done)
                done += len(items)
                if self._progress is not None:
                    self._progress(done, 3 * reader.count)
        if intake is None:
            self._settings(None, None)
        elif (self.settings["v_dim"], self.settings["q_dim"]) != (intake.v_dim, intake.q_dim):
            raise StorageError("the header and the embeddings of the source do not fit each other")
        self.ids = np.concatenate([self.ids, *self._columns.get("id", [])])

    def _ids_of(self, items: list[Item], done: int, last: int) -> NDArray[np.int64]:
        """Ids of these: their own, or consecutive ones."""
        if not self._reader.has("id"):
            return np.arange(done, done + len(items))
        try:
            ids = np.array([item.experience.id for item in items], np.int64)
        except (TypeError, ValueError, OverflowError) as exc:
            raise InvalidExperience(f"the ids of the source are no integers: {exc}") from exc
        if ids[0] <= last or ids[0] < 0 or (np.diff(ids) <= 0).any():
            raise InvalidExperience(
                "the ids of the source do not rise; sort it by id, or import it with new ids "
                "(add=True, --add)"
            )
        return ids

    def _settings(self, v_dim: int | None, q_dim: int | None) -> dict[str, Any]:
        """Of the new buffer: the source's where it says so, else the configuration's."""
        options, header = self._options, self._reader.header
        if header is not None:
            given = {name: header["settings"][name] for name in SETTINGS}
        else:
            choice = options.fusion
            section = choice.section(choice.backend)
            settings = self._registry.settings("fusion", choice.backend, section)
            fusion = self._registry.make("fusion", choice.backend, settings)
            given = {
                "v_dim": v_dim,
                "q_dim": q_dim,
                "metric": options.embedding.metric,
                "fusion": {
                    "name": choice.backend,
                    "version": int(fusion.version),
                    "settings": settings.model_dump(mode="json"),
                },
                "max_size": max(options.max_size, self._reader.count),
                "receipts_kept": options.receipts_kept,
            }
        self.settings = {**given, "representation": 0}
        return self.settings

    def _intake(self, first: Item) -> Intake:
        """What checks and encodes; dimensions are those of the first experience."""
        e = first.experience
        dims = [0 if x is None else int(np.shape(x)[-1]) for x in (e.v_embed, e.q_embed)]
        settings, registry = self._settings(*dims), self._registry
        fusion = settings["fusion"]
        name = str(fusion["name"])
        model = registry.settings("fusion", name, fusion["settings"])
        fuse = registry.make("fusion", name, model)
        if int(fuse.version) != fusion["version"]:
            raise StorageError(
                f"the source was written with version {fusion['version']} of the fusion "
                f"{fusion['name']!r}, installed is {fuse.version}; import it with add=True (--add) "
                "into a new buffer"
            )
        choice = self._options.priority
        section = choice.section(choice.backend)
        try:
            fused_dim(fuse, dims[0], dims[1], name)
        except ValueError as exc:
            raise ConfigError(
                f"{exc}: the source does not say which fusion its buffer had, so that is the "
                "configuration's",
                key="fusion",
            ) from exc
        intake = Intake(
            v_dim=dims[0],
            q_dim=dims[1],
            metric=str(settings["metric"]),
            fusion=fuse,
            scorer=registry.make(
                "priority",
                choice.backend,
                registry.settings("priority", choice.backend, section),
            ),
            max_experience_bytes=1 << 30,
            max_commit_bytes=1 << 40,
            names=(name, choice.backend),
        )
        self.dim = intake.dim
        return intake

    def _store(
        self, intake: Intake, items: list[Item], ids: NDArray[np.int64], at: int, done: int
    ) -> int:
        """Check, encode and keep a batch; where the next one begins."""
        given = [item.experience.priority for item in items]
        try:
            draft = intake.many([new(item) for item in items], given)
        except InvalidExperience as exc:
            raise _located(intake, items, done, exc) from exc
        rows, lengths = draft.rows, draft.operation.lengths
        assert rows is not None
        ends = at + np.cumsum(lengths, dtype=np.int64)
        start = 0
        view = bytearray(rows)
        for i, id_ in enumerate(ids.tolist()):
            length = int(lengths[i])
            row = view[start : start + length]
            frames.stamp_rows(row, lengths[i : i + 1], draft.content_crcs[i : i + 1], id_)
            self._rows.write(row)
            start += length
        body = codec.decode_add(draft.operation.body)
        self._fused.write(np.ascontiguousarray(body.vectors).tobytes())
        labels = body.labels or {}
        self._tags += labels.get("tags") or [[]] * len(items)
        sequence = [
            done + i if item.sequence is None else item.sequence for i, item in enumerate(items)
        ]
        counted = [item.experience for item in items]
        self._keep(
            {
                "id": ids,
                "location": ends - lengths,
                "length": lengths,
                "timestamp": body.timestamp,
                "reward": body.reward,
                "confidence": body.confidence,
                "priority": body.priority,
                "retrieval_count": _counts([e.retrieval_count for e in counted], np.uint32),
                "success_count": _counts([e.success_count for e in counted], np.float32),
                "sequence": _counts(sequence, np.int64),
                "flags": np.zeros(len(items), np.uint8),
                "live": np.ones(len(items), np.bool_),
            }
        )
        return int(ends[-1])

    def _keep(self, columns: dict[str, NDArray[Any]]) -> None:
        for name, values in columns.items():
            self._columns.setdefault(name, []).append(values)

    # ------------------------------------------------------------ handing over

    def content(self, uuid: bytes) -> Content:
        """What is to be copied."""
        self._rows.flush()
        self._fused.flush()
        header, n = self._reader.header or {}, len(self.ids)
        sets: dict[tuple[str, ...], int] = {(): 0}
        codes = [sets.setdefault(tuple(tags), len(sets)) for tags in self._tags]
        columns = {name: np.concatenate(parts) for name, parts in self._columns.items()}
        columns["tags"] = np.array(codes, np.int32)
        last = int(self.ids[-1]) + 1 if n else 0
        sequence = int(columns["sequence"].max()) + 1 if n else 0
        tree: dict[str, Any] = {
            "lsn": max(int(header.get("lsn", 0)), 1),
            "next_id": max(int(header.get("next_id", 0)), last),
            "settings": {**self.settings, "max_size": max(int(self.settings["max_size"]), n)},
            "reserved_id": 0,
            "reserved_lsn": 0,
            "total_added": max(int(header.get("total_added", 0)), sequence),
            "receipts": [],
            "receipts_horizon": 0,
            "rewards": {},
            "tag_sets": {str(code): list(tags) for tags, code in sets.items() if code},
        }
        if n:
            state = State.load(tree, columns)
        else:
            state = State()
            state.settings, state.lsn = tree["settings"], tree["lsn"]
            state.next_id, state.total_added = tree["next_id"], tree["total_added"]
        return Content(uuid, state, state.next_id, 1, self, self._vectors)

    def pin(
        self, ids: NDArray[np.int64], locations: NDArray[np.int64], lengths: NDArray[np.uint32]
    ) -> Pin:
        """See `PersistenceAdapter.pin`."""
        return _SpooledRows(self._rows.fileno(), locations.tolist(), lengths.tolist())

    def _vectors(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        rows = np.searchsorted(self.ids, ids)
        size = 4 * self.dim
        out = np.empty((len(ids), self.dim), np.float32)
        for i, row in enumerate(rows.tolist()):
            out[i] = np.frombuffer(os.pread(self._fused.fileno(), size, row * size), np.float32)
        return out


def _located(
    intake: Intake, items: list[Item], done: int, exc: InvalidExperience
) -> InvalidExperience:
    """The error with the number of the experience in the source."""
    for i, item in enumerate(items):
        try:
            intake.many([new(item)], [item.experience.priority])
        except InvalidExperience as own:
            return InvalidExperience(f"in experience {done + i}: {own}")
    return InvalidExperience(f"in experiences {done} to {done + len(items) - 1}: {exc}")


class _SpooledRows(Pin):
    def __init__(self, fd: int, places: list[int], lengths: list[int]) -> None:
        self._fd, self._places, self._lengths = fd, places, lengths

    def read(self, i: int) -> Buffer:
        return os.pread(self._fd, self._lengths[i], self._places[i])


def _counts(values: list[Any], dtype: Any) -> NDArray[Any]:
    """A column of numbers that are not negative.

    Raises:
        InvalidExperience: They are, or do not fit.
    """
    try:
        wide = np.array(values, np.float64 if dtype == np.float32 else np.int64)
        narrow = wide.astype(dtype)
        if not np.isfinite(wide).all() or (wide < 0).any() or (narrow < 0).any():
            raise ValueError("negative, or not finite")
        if dtype != np.float32 and (narrow.astype(np.int64) != wide).any():
            raise ValueError("too large")
    except (ValueError, TypeError, OverflowError) as exc:
        raise InvalidExperience(f"counts of the source: {exc}") from exc
    return cast("NDArray[Any]", narrow)
