"""`expbuf export` and `expbuf import`: experiences as files that other programs read.

Parquet for pandas, Hugging Face datasets, DuckDB and the like; JSON Lines beside npy files where no
library is wanted. An export into a new buffer gives back what was there: ids, counts, priorities,
rewards, tags, trajectories, metadata, timestamps, and every bit of the embeddings. What is not in
it: receipts (who waits for a verdict needs `backup`), and the index, which is built again.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from expbuf_core.buffer import ExperienceBuffer
from expbuf_core.config_schema import BufferConfig, load_config
from expbuf_core.contracts import LogGone
from expbuf_core.errors import DimensionError, InvalidExperience, StorageError
from expbuf_core.exchange_formats import (
    PARTS,
    WRITERS,
    Header,
    Reader,
    Writer,
    reader_of,
)
from expbuf_core.exchange_records import COLUMNS, VERSION, Item
from expbuf_core.exchange_spool import SETTINGS, Spool, new
from expbuf_core.filesystem import FileSystem
from expbuf_core.frozen import Frozen, freeze
from expbuf_core.inspection import columns_of
from expbuf_core.plugins import default_registry
from expbuf_core.transfer import Progress, Storage, check_target, copy, resolved

Format = Literal["parquet", "jsonl"]

_log = logging.getLogger("expbuf")
_BATCH = 256
_TRIES = 5


@dataclass(frozen=True)
class ExportReport:
    """What was exported.

    Attributes:
        target: The file or folder.
        format: Its format.
        experiences: In it.
        lsn: They are as after this operation.
    """

    target: Path
    format: str
    experiences: int
    lsn: int


@dataclass(frozen=True)
class ImportReport:
    """What was imported.

    Attributes:
        target: The buffer's folder.
        experiences: That were imported.
        first_id: Id of the first one; None where there is none.
        last_id: Id of the last one.
        kept_ids: They have the ids that the source gives them.
    """

    target: Path
    experiences: int
    first_id: int | None
    last_id: int | None
    kept_ids: bool


# ---------------------------------------------------------------- export


def export_experiences(
    source: str | os.PathLike[str] | ExperienceBuffer,
    target: str | os.PathLike[str],
    *,
    file_format: Format | None = None,
    progress: Progress | None = None,
) -> ExportReport:
    """Write all experiences, as they are at one LSN, to files; the buffer may be in use.

    The target appears whole and durable, or not at all. Nobody waits for it.

    Args:
        source: Folder of the buffer, or an open buffer.
        target: A file (Parquet) or folder (JSON Lines and npy) that does not exist.
        file_format: Default: "parquet" for a name that ends in .parquet, else "jsonl".
        progress: Called now and then with (done, total).

    Raises:
        StorageError: The target exists, lies in the buffer's folder, or cannot be written.
        CorruptionError: The source is damaged.
        BackendUnavailable: The format needs a library that is not installed.
    """
    goal = resolved(target)
    chosen = file_format or ("parquet" if goal.suffix == ".parquet" else "jsonl")
    if chosen not in WRITERS:
        raise StorageError(f"no format {chosen!r}; there are: {', '.join(WRITERS)}")
    if goal.exists():
        raise StorageError(f"{goal} exists already; choose a new name")
    if not goal.parent.is_dir():
        raise StorageError(f"{goal.parent} is no folder")
    home = source.path if isinstance(source, ExperienceBuffer) else resolved(source)
    if home is not None and goal.is_relative_to(home):
        raise StorageError(f"{goal} lies in the buffer's own folder; choose another place")
    if isinstance(source, ExperienceBuffer):
        return _export(source, goal, chosen, progress)
    with columns_of(source) as buffer:
        return _export(buffer, goal, chosen, progress)


def _export(
    buffer: ExperienceBuffer, goal: Path, chosen: str, progress: Progress | None
) -> ExportReport:
    for _ in range(_TRIES):
        frozen = freeze(buffer)
        ids = frozen.state.live_ids()
        header: Header = {
            "format": "expbuf-export",
            "version": VERSION,
            "experiences": len(ids),
            "uuid": frozen.uuid.hex(),
            "lsn": frozen.state.lsn,
            "next_id": frozen.next_id,
            "total_added": frozen.state.total_added,
            "settings": {name: frozen.state.settings[name] for name in SETTINGS},
        }
        try:
            with WRITERS[chosen](goal, header, FileSystem()) as writer:
                _write(frozen, ids, writer, progress)
        except LogGone:
            continue  # what was evicted is gone from the disk, too: only a newer state is whole
        return ExportReport(goal, chosen, len(ids), frozen.state.lsn)
    raise StorageError(
        f"{buffer.path}: experiences are removed and dropped faster than they can be read; pause "
        "`remove` and `save_snapshot`, or export to a faster disk"
    )


def _write(
    frozen: Frozen, ids: NDArray[np.int64], writer: Writer, progress: Progress | None
) -> None:
    state = frozen.state
    for start in range(0, len(ids), _BATCH):
        part = ids[start : start + _BATCH]
        experiences = frozen.experiences(part)
        writer.write(list(experiences), state.sequence[state.find(part)].tolist())
        if progress is not None:
            progress(start + len(part), len(ids))


# ---------------------------------------------------------------- import


def import_experiences(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    add: bool = False,
    skip: int = 0,
    persistence: str | None = None,
    config: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    filesystem: FileSystem | None = None,
) -> ImportReport:
    """Read experiences from files.

    Into a new folder, everything is as it was exported; the buffer gets a UUID of its own. It may
    be interrupted and called again, and does not open before it is whole. With `add`, they are
    added to a buffer that exists, or to a new one, as experiences that have just come in: with new
    ids, and counts of 0, but with their timestamps, rewards and priorities.

    A file of somebody else's needs a column v_embed or q_embed; columns of other names are not
    looked at. Without ids it gets new ones; without priorities the scorer gives them; without
    timestamps the time is now.

    Args:
        source: A Parquet file, or a folder with experiences.jsonl and npy files.
        target: The buffer's folder; must be new or empty, except with `add`.
        add: Add to what is there.
        skip: With `add`: so many experiences of the source are there already.
        persistence: Name of the storage backend of a new folder; default: the configuration's.
        config: A YAML file or a mapping; for what the source does not say of a new buffer.
        progress: Called now and then with (done, total).
        filesystem: Does all writing to the target; for tests that record or fail it.

    Raises:
        StorageError: The source cannot be read, or the target holds something else.
        InvalidExperience: Something in the source cannot be stored. Into a new folder, nothing was
            imported then; with `add`, whole batches before it were.
        BackendUnavailable: The format needs a library that is not installed.
    """
    goal = resolved(target)
    fs = filesystem or FileSystem()
    overrides = {} if persistence is None else {"persistence": {"backend": persistence}}
    with reader_of(resolved(source)) as reader:
        if surplus := sorted(reader.names - {*COLUMNS, *PARTS}):
            known = ", ".join([*COLUMNS, *PARTS])
            _log.warning(
                "%s: not looked at: %s; known columns are %s", source, ", ".join(surplus), known
            )
        if add:
            options = load_config(config, overrides=overrides or None)
            return _added(reader, goal, options, skip, progress, fs)
        check_target(goal)
        registry = default_registry()
        options = load_config(config, env={}, overrides=overrides or None, registry=registry)
        storage = Storage.choose(registry, options.persistence.backend, options)
        with Spool(reader, options, registry, goal, progress) as spool:
            content = spool.content(_uuid_for(resolved(source), goal))
            words = ["expbuf", "import", str(resolved(source)), str(goal)]
            if persistence is not None:
                words += ["--persistence", persistence]
            if isinstance(config, str | os.PathLike):
                words += ["--config", os.path.abspath(config)]
            report = copy(
                content,
                goal,
                storage,
                progress=spool.copying,
                fs=fs,
                command=shlex.join(words),
            )
    ids = spool.ids
    first, last = (int(ids[0]), int(ids[-1])) if len(ids) else (None, None)
    return ImportReport(goal, report.experiences, first, last, reader.has("id"))


def _uuid_for(source: Path, goal: Path) -> bytes:
    """UUID of the new buffer: another for each import, the same when it is called again."""
    stat = source.stat()
    facts = f"{source} {stat.st_ino} {stat.st_size} {stat.st_mtime_ns} {goal}"
    return hashlib.blake2b(facts.encode("utf-8", "surrogateescape"), digest_size=16).digest()


def _added(
    reader: Reader,
    goal: Path,
    options: BufferConfig,
    skip: int,
    progress: Progress | None,
    fs: FileSystem,
) -> ImportReport:
    """Add to a buffer, a batch a commit."""
    first: int | None = None
    last: int | None = None
    done = skip
    with ExperienceBuffer.open(goal, config=options, filesystem=fs) as buffer:
        for batch in _batches(reader, skip):
            try:
                ids = buffer.add_many(
                    [new(item) for item in batch],
                    priorities=[item.experience.priority for item in batch],
                )
            except DimensionError:
                raise
            except InvalidExperience as exc:
                where = f"in experiences {done} to {done + len(batch) - 1}"
                raise InvalidExperience(f"{where}: {exc}") from exc
            first = int(ids[0]) if first is None else first
            last = int(ids[-1])
            done += len(batch)
            if progress is not None:
                progress(done, reader.count)
    return ImportReport(goal, done - skip, first, last, False)


def _batches(reader: Reader, skip: int) -> Iterator[list[Item]]:
    for batch in reader.batches():
        if skip < len(batch):
            yield batch[skip:]
        skip = max(0, skip - len(batch))
