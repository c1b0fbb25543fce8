"""The files of an export: one Parquet file, or a folder of JSON Lines and npy.

Both are written under a temporary name and appear whole or not at all. Parquet needs pyarrow (the
extra `parquet`), which is imported when it is used.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import re
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from expbuf_core.errors import BackendUnavailable, StorageError
from expbuf_core.exchange_records import COLUMNS, VERSION, Item, item_of, record_of
from expbuf_core.experience import Experience
from expbuf_core.filesystem import FileSystem, storage_errors

PARTS = ("v_embed", "q_embed")
HEADER = "export.json"
_RECORDS = "experiences.jsonl"
_BATCH = 512
_GROUP_ROWS = 1 << 15
_GROUP_BYTES = 64 << 20

Header = dict[str, Any]


class Writer(ABC):
    """Writes one export. Use as a context manager: an error, or Ctrl-C, leaves nothing.

    Args:
        target: That does not exist yet.
        header: What there is to know besides experiences; `experiences` and `settings` in it.
        fs: Makes it durable.
    """

    def __init__(self, target: Path, header: Header, fs: FileSystem) -> None:
        self.target = target
        self.header = header
        self.fs = fs
        self.dims = {
            "v_embed": int(header["settings"]["v_dim"] or 0),
            "q_embed": int(header["settings"]["q_dim"] or 0),
        }
        self.temporary = target.with_name(f"{target.name}.{os.getpid()}.tmp")
        self._lock: int | None = None
        with storage_errors("write", self.temporary):
            self._remove_leftovers()
            self.begin()
            self._lock = _locked(self.temporary)

    @abstractmethod
    def begin(self) -> None:
        """Make the temporary file or folder."""

    @abstractmethod
    def write(self, experiences: Sequence[Experience], sequence: Sequence[int]) -> None:
        """Write the next experiences."""

    @abstractmethod
    def finish(self) -> None:
        """Write what comes last, durably."""

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        try:
            if kind is None:
                with storage_errors("write", self.target):
                    self.finish()
                    if self.target.exists():
                        raise StorageError(f"{self.target} has appeared meanwhile")
                    self.fs.replace(self.temporary, self.target)
                    self.fs.sync_folder(self.target.parent)
        finally:
            self.discard()

    def discard(self) -> None:
        """Remove what is not finished."""
        self._remove(self.temporary)
        if self._lock is not None:
            self.fs.close(self._lock)
            self._lock = None

    def _remove(self, path: Path) -> None:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            self.fs.unlink(path)

    def _remove_leftovers(self) -> None:
        """Remove what exports to the same target have left that were killed."""
        name = re.compile(re.escape(self.target.name) + r"\.\d+\.tmp")
        with contextlib.suppress(PermissionError):  # to list the folder; or it is another user's
            for path in self.target.parent.iterdir():
                lock = _locked(path) if name.fullmatch(path.name) else None
                if lock is not None:
                    try:
                        self._remove(path)
                    finally:
                        self.fs.close(lock)

    def sync(self, path: Path) -> None:
        """Make a file durable."""
        fd = self.fs.open(path)
        try:
            self.fs.fsync(fd)
        finally:
            self.fs.close(fd)


def _locked(path: Path) -> int | None:
    """A descriptor that locks an unfinished export; None where that cannot be had.

    Then another process has it, or the file is gone or another user's, or the file system knows no
    locks; it is left alone. The kernel frees the lock when the process ends. The number of the
    process would tell less: those of other containers that use the folder are not known here.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        return None
    return fd


class Reader(ABC):
    """Reads one export, or a file of somebody else's with some of its columns.

    Attributes:
        header: As written; None in a file that lacks it.
        count: Experiences in it.
        names: Of all columns that it has, known or not.
    """

    header: Header | None
    count: int
    names: set[str]

    @abstractmethod
    def has(self, column: str) -> bool:
        """Whether every record has a value there."""

    @abstractmethod
    def batches(self) -> Iterator[list[Item]]:
        """All experiences, in order."""

    def close(self) -> None:  # noqa: B027  (optional)
        """Let go of the files."""

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


# ---------------------------------------------------------------- JSON Lines and npy


class JsonLinesWriter(Writer):
    """A folder: experiences.jsonl, an npy file for each embedding, export.json."""

    def begin(self) -> None:
        self.discard()
        self.fs.mkdir(self.temporary)
        n = int(self.header["experiences"])
        self._lines: IO[str] = open(self.temporary / _RECORDS, "x", encoding="ascii")  # noqa: SIM115
        self._arrays: dict[str, IO[bytes]] = {}
        for part, dim in self.dims.items():
            if dim:
                file = self._arrays[part] = open(self.temporary / f"{part}.npy", "xb")  # noqa: SIM115
                shape = {"descr": "<f4", "fortran_order": False, "shape": (n, dim)}
                np.lib.format.write_array_header_1_0(file, shape)

    def write(self, experiences: Sequence[Experience], sequence: Sequence[int]) -> None:
        with storage_errors("write", self.temporary):
            for experience, number in zip(experiences, sequence, strict=True):
                record = record_of(experience, number)
                if record["image_bytes"] is not None:
                    record["image_bytes"] = base64.b64encode(record["image_bytes"]).decode()
                self._lines.write(json.dumps(record, separators=(",", ":"), allow_nan=False) + "\n")
                for part, file in self._arrays.items():
                    file.write(np.ascontiguousarray(getattr(experience, part), "<f4").tobytes())

    def finish(self) -> None:
        (self.temporary / HEADER).write_text(json.dumps(self.header, indent=1), encoding="ascii")
        self._close()
        for path in self.temporary.iterdir():
            self.sync(path)
        self.fs.sync_folder(self.temporary)

    def discard(self) -> None:
        self._close()
        super().discard()

    def _close(self) -> None:
        for file in (*getattr(self, "_arrays", {}).values(), getattr(self, "_lines", None)):
            if file is not None:
                file.close()


class JsonLinesReader(Reader):
    """What `JsonLinesWriter` writes; `experiences.jsonl` and one npy file are enough.

    Args:
        source: The folder.

    Raises:
        StorageError: A file is missing, or they do not fit each other.
    """

    def __init__(self, source: Path) -> None:
        self._source = source
        self.header = None
        if (source / HEADER).exists():
            with storage_errors("read", source / HEADER):
                self.header = checked_header(_json_of(source / HEADER), source)
        self._arrays: dict[str, NDArray[Any]] = {}
        for part in PARTS:
            path = source / f"{part}.npy"
            if path.exists():
                self._arrays[part] = _mapped(path)
        if not self._arrays:
            raise StorageError(f"{source}: neither v_embed.npy nor q_embed.npy is there")
        counts = {part: len(array) for part, array in self._arrays.items()}
        self._columns: set[str] | None = None
        self.count = 0
        self.names = set(self._arrays)
        for _, record in self._records():
            self.names |= record.keys()
            here = {name for name, value in record.items() if value is not None}
            self._columns = here if self._columns is None else self._columns & here
            self.count += 1
        if set(counts.values()) != {self.count}:
            found = ", ".join(f"{part}.npy {n}" for part, n in counts.items())
            raise StorageError(f"{source}: {_RECORDS} has {self.count} lines, {found} rows")

    def has(self, column: str) -> bool:
        return self._columns is not None and column in self._columns

    def _records(self) -> Iterator[tuple[int, dict[str, Any]]]:
        path = self._source / _RECORDS
        with storage_errors("read", path), open(path, "rb") as lines:
            for i, line in enumerate(lines):
                try:
                    record = json.loads(line)
                except (ValueError, RecursionError) as exc:
                    raise StorageError(f"{path}: line {i + 1} is no JSON: {exc}") from exc
                if not isinstance(record, dict):
                    raise StorageError(f"{path}: line {i + 1} is no JSON object")
                yield i, record

    def batches(self) -> Iterator[list[Item]]:
        batch: list[Item] = []
        v, q = (self._arrays.get(part) for part in PARTS)
        for i, record in self._records():
            where = f"{self._source / _RECORDS}, line {i + 1}"
            parts = [None if a is None else np.array(a[i]) for a in (v, q)]
            batch.append(item_of(record, parts[0], parts[1], where))
            if len(batch) == _BATCH:
                yield batch
                batch = []
        if batch:
            yield batch


def _json_of(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except ValueError as exc:
        raise StorageError(f"{path}: no JSON: {exc}") from exc


def _mapped(path: Path) -> NDArray[Any]:
    """The array of an npy file."""
    try:
        with storage_errors("read", path):
            array = np.load(path, mmap_mode="r", allow_pickle=False)
    except ValueError as exc:
        raise StorageError(f"{path}: no array: {exc}") from exc
    if array.ndim != 2:
        raise StorageError(f"{path}: expected shape (n, dim), found {array.shape}")
    return np.asarray(array)


# ---------------------------------------------------------------- Parquet


def _pyarrow() -> tuple[ModuleType, ModuleType]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as exc:
        raise BackendUnavailable(
            "Parquet needs pyarrow, which is not installed: pip install 'expbuf-core[parquet]', or "
            "use the format jsonl"
        ) from exc
    return pyarrow, pyarrow.parquet


class ParquetWriter(Writer):
    """One Parquet file; the header is in its metadata under `expbuf`."""

    def begin(self) -> None:
        self._arrow, parquet = _pyarrow()
        a = self._arrow
        types = {
            "int64": a.int64(),
            "float32": a.float32(),
            "float64": a.float64(),
            "text": a.string(),
            "texts": a.list_(a.string()),
            "bytes": a.binary(),
            "float32s": a.list_(a.float32()),
        }
        fields = [a.field(name, types[kind]) for name, kind in COLUMNS.items()]
        for part, dim in self.dims.items():
            if dim:
                fields.append(a.field(part, a.list_(a.float32(), dim)))
        schema = a.schema(fields, metadata={"expbuf": json.dumps(self.header)})
        self._schema = schema
        self._waiting: list[Any] = []
        self._writer = parquet.ParquetWriter(self.temporary, schema, compression="zstd")

    def write(self, experiences: Sequence[Experience], sequence: Sequence[int]) -> None:
        a = self._arrow
        records = [record_of(e, n) for e, n in zip(experiences, sequence, strict=True)]
        columns = []
        for field in self._schema:
            dim = self.dims.get(field.name)
            if dim:
                flat = np.concatenate([np.asarray(getattr(e, field.name)) for e in experiences])
                columns.append(a.FixedSizeListArray.from_arrays(a.array(flat, a.float32()), dim))
            else:
                columns.append(a.array([r[field.name] for r in records], field.type))
        self._waiting.append(a.Table.from_arrays(columns, schema=self._schema))
        rows = sum(table.num_rows for table in self._waiting)
        if rows >= _GROUP_ROWS or sum(table.nbytes for table in self._waiting) >= _GROUP_BYTES:
            self._write_group()

    def _write_group(self) -> None:
        """Write what waits as one group: readers are slow where there are many small ones."""
        if self._waiting:
            with storage_errors("write", self.temporary):
                self._writer.write_table(self._arrow.concat_tables(self._waiting))
            self._waiting.clear()

    def finish(self) -> None:
        self._write_group()
        self._writer.close()
        self.sync(self.temporary)

    def discard(self) -> None:
        if getattr(self, "_writer", None) is not None and self.temporary.exists():
            self._writer.close()
        super().discard()


class ParquetReader(Reader):
    """A Parquet file: an export, or one with columns of these names.

    Args:
        source: The file.

    Raises:
        BackendUnavailable: pyarrow is not installed.
        StorageError: It is no Parquet file, or has no embeddings.
    """

    def __init__(self, source: Path) -> None:
        arrow, parquet = _pyarrow()
        self._source = source
        try:
            with storage_errors("read", source):
                self._file = parquet.ParquetFile(source)
        except arrow.ArrowException as exc:
            raise StorageError(f"{source}: no Parquet file: {exc}") from exc
        schema = self._file.schema_arrow
        self.names = set(schema.names)
        if not self.names & set(PARTS):
            raise StorageError(f"{source}: neither a column v_embed nor a column q_embed is there")
        self.count = self._file.metadata.num_rows
        raw = (schema.metadata or {}).get(b"expbuf")
        self.header = None
        if raw is not None:
            try:
                self.header = checked_header(json.loads(raw), source)
            except ValueError as exc:
                raise StorageError(f"{source}: its expbuf metadata are damaged: {exc}") from exc

    def has(self, column: str) -> bool:
        return column in self.names

    def batches(self) -> Iterator[list[Item]]:
        wanted = [name for name in (*COLUMNS, *PARTS) if name in self.names]
        number = 0
        with storage_errors("read", self._source):
            for table in self._file.iter_batches(_BATCH, columns=wanted):
                yield list(self._items(table, number))
                number += table.num_rows

    def _items(self, table: Any, number: int) -> Iterator[Item]:
        parts: dict[str, Any] = dict.fromkeys(PARTS)
        for part in PARTS:
            if part in self.names:
                parts[part] = _vectors(table.column(part), self._source, part)
        names = [name for name in table.schema.names if name not in PARTS]
        records = table.select(names).to_pylist()
        for i, record in enumerate(records):
            v, q = (None if a is None else a[i] for a in parts.values())
            yield item_of(record, v, q, f"{self._source}, row {number + i}")

    def close(self) -> None:
        self._file.close()


def _vectors(column: Any, source: Path, name: str) -> NDArray[Any]:
    """(n, dim) of a column of lists."""
    if column.null_count:
        raise StorageError(f"{source}: {column.null_count} rows lack {name}")
    try:
        flat = column.flatten().to_numpy(zero_copy_only=False)
        return np.asarray(flat).reshape(len(column), -1) if len(column) else np.empty((0, 0))
    except (ValueError, AttributeError) as exc:
        raise StorageError(f"{source}: {name}: expected lists of one length: {exc}") from exc


# ---------------------------------------------------------------- which

WRITERS: dict[str, type[Writer]] = {"parquet": ParquetWriter, "jsonl": JsonLinesWriter}


def reader_of(source: Path) -> Reader:
    """What reads this file or folder.

    Raises:
        StorageError: It is none of the formats.
    """
    if source.is_dir():
        if (source / _RECORDS).exists():
            return JsonLinesReader(source)
        raise StorageError(f"{source} is no export: it has no {_RECORDS}")
    if not source.exists():
        raise StorageError(f"{source} does not exist")
    return ParquetReader(source)


def checked_header(header: Any, source: Path) -> Header:
    """A header that can be relied on.

    Raises:
        StorageError: A newer version wrote it, or it lacks something.
    """
    try:
        version = int(header["version"])
        if version > VERSION:
            raise StorageError(
                f"{source}: an export of version {version}; this expbuf reads up to {VERSION}"
            )
        settings = header["settings"]
        for name in ("v_dim", "q_dim", "max_size", "receipts_kept"):
            if settings[name] is not None:
                settings[name] = int(settings[name])
        if not isinstance(settings["fusion"]["settings"], dict):
            raise TypeError("fusion")
        for name in ("next_id", "total_added", "lsn"):
            header[name] = int(header[name])
    except (KeyError, TypeError, ValueError) as exc:
        raise StorageError(f"{source}: its header is damaged ({exc!r})") from exc
    return dict(header)
