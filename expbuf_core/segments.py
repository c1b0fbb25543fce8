"""Segments on disk: the ids and fused vectors of each, its index, and the manifest that lists them.

    index/manifest.json              which segments are live, after which LSN
    index/000042.vectors             header page | ids | vectors, memory-mapped
    index/000042.faiss_cpu           what the index backend wrote
    index/1/…                        the same of representation 1, and so on

All of it is derived: what is lost or damaged is built again from the payloads. The first argument
of most functions here is the folder of one representation; `home` says which that is.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import stat
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from expbuf_core.answers import Found, checked
from expbuf_core.checksums import file_crc
from expbuf_core.contracts import IndexBackend, IndexSegment
from expbuf_core.crc import crc32
from expbuf_core.documents import MALFORMED, read_document
from expbuf_core.errors import CorruptionError, ExpbufError, PluginContractError, blame
from expbuf_core.filesystem import (
    FileSystem,
    is_damage,
    names_in,
    reading,
    remove,
    storage_errors,
)
from expbuf_core.sketch import Sketch, directions
from expbuf_core.submitting import Submitter

FOLDER = "index"
MANIFEST = "manifest.json"
_MAGIC = b"EXPBUFV1"
_HEADER = struct.Struct("<8sQQ16s")  # magic, rows, dim, uuid
_PAGE = 4096
_SKETCHED = 20_000  # rows; an index over more is faster than bounds for all of them
_WORTH_A_THREAD = 4 << 20  # bytes of vectors
VERSION = 1
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_]{0,99}")


class SegmentInfo(NamedTuple):
    """A segment as the manifest lists it. Ids lie in [first_id, end_id)."""

    name: str
    backend: str
    rows: int
    first_id: int
    end_id: int
    vectors_bytes: int
    vectors_crc: int
    index_bytes: int
    index_crc: int


class Manifest(NamedTuple):
    """The live segments. `lsn`: all operations up to it are in them."""

    lsn: int
    generation: int
    dim: int
    metric: str
    representation: str
    segments: tuple[SegmentInfo, ...]


def home(folder: Path, representation: int) -> Path:
    """Where the segments of a representation of the buffer in this folder lie."""
    return folder / FOLDER / str(representation) if representation else folder / FOLDER


def vectors_path(home: Path, name: str) -> Path:
    """Where a segment's ids and vectors lie."""
    return home / f"{name}.vectors"


def index_path(home: Path, info_name: str, backend: str) -> Path:
    """Where a segment's index lies."""
    return home / f"{info_name}.{backend}"


def _verify(path: Path, size: int, crc: int, *, hurry: bool = False) -> None:
    found_size, found = file_crc(path, size, hurry=hurry)
    if (found_size, found) != (size, crc):
        raise CorruptionError(
            f"{FOLDER}/{path.name}: "
            + (
                f"checksum {found:08x}, expected {crc:08x}"
                if found_size == size
                else f"{found_size} bytes, expected {size}"
            )
            + "; the index is derived and will be built again",
            path=path,
            offset=min(size, found_size),
        )


class OpenSegment:
    """A segment, open for searching. Immutable but for `live`, where rows only ever go out."""

    def __init__(
        self,
        info: SegmentInfo,
        ids: NDArray[np.int64],
        vectors: NDArray[np.float32],
        index: IndexSegment,
        live: NDArray[np.bool_],
        filters: bool,
        watch: object = None,
        metric: str = "",
    ) -> None:
        self.directions = directions(vectors)
        self.sketch: Sketch | None = None  # of a small one beside a large one
        self.watch = watch  # knows what went out since `live` was made
        self.filters = filters  # the index leaves rows out by itself
        self.info = info
        self.ids = ids
        self.vectors = vectors
        self.index = index
        self.metric = metric
        self.live = live
        self.dead = int(len(live) - np.count_nonzero(live))
        self.bitmap = np.packbits(live, bitorder="little")
        self._to_read = self.bitmap.view()  # for the index, which must not change it
        self._to_read.flags.writeable = False

    def check(self) -> None:
        """See that the vectors, as they are mapped, still are what was written.

        A mapping shows what its file holds now, and a disk may give back something else for a page
        that it read well at opening. Who writes such vectors elsewhere gives them a new checksum.

        Raises:
            CorruptionError: They are not.
        """
        whole = self.vectors.base  # the mapping, header and all
        if not isinstance(whole, np.ndarray) or whole.nbytes != self.info.vectors_bytes:
            raise TypeError(f"the vectors of segment {self.info.name} are no mapped file")
        found = crc32(whole.data)
        if found != self.info.vectors_crc:
            name = f"{self.info.name}.vectors"
            raise CorruptionError(
                f"{FOLDER}/{name}: checksum {found:08x}, expected {self.info.vectors_crc:08x}; it "
                "has changed since it was opened. Open the buffer anew: the index is derived and "
                "will be built again",
                path=getattr(whole, "filename", None) or name,
                offset=0,
            )

    def search(
        self, queries: NDArray[np.float32], k: int, allowed: NDArray[np.uint8] | None = None
    ) -> Found:
        """What the index finds, see `IndexSegment.search`; its arrays may come again.

        Raises:
            PluginContractError: It is no answer to this question.
        """
        if allowed is self.bitmap:
            allowed = self._to_read
        try:
            answer = self.index.search(queries, k, allowed)
        except Exception as exc:
            blame(exc, f"the index backend {self.info.backend!r}")
            raise
        return checked(answer, queries, k, self.info.backend, self.vectors, self.metric)

    def remove(self, ids: NDArray[np.int64]) -> None:
        """Take rows out; ids that are not here, or are out already, are skipped."""
        if not len(ids):
            return
        rows = np.searchsorted(self.ids, ids)
        rows[rows == len(self.ids)] = 0  # beyond the end: another id stands in row 0
        rows = np.unique(rows[(self.ids[rows] == ids) & self.live[rows]])
        if len(rows):
            self.live[rows] = False
            masks = (0xFF ^ (1 << (rows & 7))).astype(np.uint8)
            np.bitwise_and.at(self.bitmap, rows >> 3, masks)
            self.dead += len(rows)


def read_manifest(home: Path) -> Manifest | None:
    """The manifest, or None where there is none.

    Raises:
        CorruptionError: It is damaged, or cannot be read.
        StorageError: It cannot be read now.
    """
    path = home / MANIFEST
    try:
        document = read_document(path)
        if document is None:
            return None
        text = json.dumps(document["manifest"], sort_keys=True)
        if document["crc"] != crc32(text.encode()):
            raise ValueError("checksum mismatch")
        if document["version"] > VERSION:
            raise ValueError(f"version {document['version']}, newer than {VERSION}")
        body = document["manifest"]
        segments = tuple(SegmentInfo(**_checked(info)) for info in body.pop("segments"))
        return Manifest(segments=segments, **_checked(body))
    except MALFORMED as exc:
        raise CorruptionError(
            f"{FOLDER}/{MANIFEST}: {exc}; the index is derived and will be built again",
            path=path,
            offset=0,
        ) from exc


def _checked(facts: dict[str, Any]) -> dict[str, Any]:
    """Facts of a manifest or segment; a right checksum does not say that they make sense.

    Raises:
        ValueError: They do not.
    """
    for key, value in facts.items():
        if key in ("name", "backend"):
            right = isinstance(value, str) and _NAME.fullmatch(value) is not None
        elif key in ("metric", "representation"):
            right = isinstance(value, str)
        else:
            right = type(value) is int and 0 <= value < 1 << 63
        if not right:
            raise ValueError(f"{key} = {value!r}")
    return facts


def read_manifest_or_none(home: Path) -> Manifest | None:
    """The manifest, or None where it is missing or damaged."""
    try:
        return read_manifest(home)
    except CorruptionError:
        return None


def write_manifest(home: Path, manifest: Manifest, fs: FileSystem) -> None:
    """Replace the manifest atomically and durably."""
    body = {**manifest._asdict(), "segments": [info._asdict() for info in manifest.segments]}
    text = json.dumps(body, sort_keys=True)
    document = json.dumps(
        {"version": VERSION, "manifest": body, "crc": crc32(text.encode())}, indent=1
    )
    with storage_errors("write", home / MANIFEST):
        fs.write_atomically(home / MANIFEST, [document.encode()])


def write_vectors(
    path: Path,
    ids: NDArray[np.int64],
    vectors: Iterator[NDArray[np.float32]],
    dim: int,
    uuid: bytes,
    fs: FileSystem,
) -> None:
    """Write a file of ids and vectors; whole and durable, or not there."""
    offset = _vectors_offset(len(ids))

    def chunks() -> Iterator[bytes]:
        head = _HEADER.pack(_MAGIC, len(ids), dim, uuid).ljust(_PAGE, b"\0")
        yield (head + np.ascontiguousarray(ids).tobytes()).ljust(offset, b"\0")
        for block in vectors:
            yield np.ascontiguousarray(block, np.float32).tobytes()

    with storage_errors("write", path):
        fs.mkdir(path.parent)
        fs.write_atomically(path, chunks())


def write_segment(
    home: Path,
    name: str,
    *,
    uuid: bytes,
    ids: NDArray[np.int64],
    vectors: Iterator[NDArray[np.float32]],
    dim: int,
    end_id: int,
    backend_name: str,
    backend: IndexBackend,
    fs: FileSystem,
) -> SegmentInfo:
    """Write a segment: vectors, then the index over them; durable on return.

    Args:
        home: Of the representation.
        name: Of the segment, new.
        uuid: Of the buffer.
        ids: (n,) int64, rising.
        vectors: Blocks of (…, dim) float32, in the order of the ids.
        dim: Of the vectors.
        end_id: No id at or above it was issued when the segment was cut.
        backend_name: Names the index file.
        backend: Builds the index.
        fs: Writes.
    """
    target = vectors_path(home, name)
    path = index_path(home, name, backend_name)
    for place in (target, path):
        remove(place, fs)
    temporary = path.with_name(path.name + f".{os.getpid()}.tmp")
    try:
        write_vectors(target, ids, vectors, dim, uuid, fs)
        stored_ids, stored = map_vectors(target, dim)
        with storage_errors("write", path):
            fs.unlink(temporary)
            backend.build(stored_ids, stored, temporary)
            fd = fs.open(temporary)
            try:
                fs.fsync(fd)
            finally:
                fs.close(fd)
            fs.replace(temporary, path)
            fs.sync_folder(path.parent)
    except BaseException:
        # Others may need the room: a full disk is the likeliest reason.
        for left in (temporary, target):
            with contextlib.suppress(OSError):
                fs.unlink(left)
        raise
    vectors_bytes, vectors_crc = file_crc(target)
    index_bytes, index_crc = file_crc(path)
    return SegmentInfo(
        name=name,
        backend=backend_name,
        rows=len(ids),
        first_id=int(ids[0]),
        end_id=end_id,
        vectors_bytes=vectors_bytes,
        vectors_crc=vectors_crc,
        index_bytes=index_bytes,
        index_crc=index_crc,
    )


def _vectors_offset(rows: int) -> int:
    return (_PAGE + 8 * rows + 63) & ~63


def map_vectors(path: Path, dim: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Map a segment's ids (n,) and vectors (n, dim), read-only.

    Raises:
        CorruptionError: The file is not such a segment.
    """
    with reading(path, what="map"):
        empty = os.stat(path).st_size == 0  # which cannot be mapped
        raw = np.empty(0, np.uint8) if empty else np.memmap(path, np.uint8, mode="r")
    if len(raw) >= _PAGE:
        magic, rows, found_dim, _uuid = _HEADER.unpack_from(raw[: _HEADER.size].tobytes())
        offset = _vectors_offset(rows)
        if magic == _MAGIC and found_dim == dim and len(raw) == offset + 4 * rows * dim:
            ids = raw[_PAGE : _PAGE + 8 * rows].view(np.int64)
            return ids, raw[offset:].view(np.float32).reshape(rows, dim)
    raise CorruptionError(
        f"{FOLDER}/{path.name}: not the vectors of a segment of dimension {dim}; the index will "
        "be built again",
        path=path,
        offset=0,
    )


def open_segment(
    home: Path,
    info: SegmentInfo,
    dim: int,
    backend: IndexBackend,
    live_ids: NDArray[np.int64],
    *,
    next_id: int | None = None,
    filters: bool,
    verifies: bool = False,
    watch: object = None,
    hurry: bool = False,
    metric: str = "",
) -> OpenSegment:
    """Verify, map and open a segment.

    Args:
        home: Of the representation.
        info: As the manifest lists it.
        dim: Of the vectors.
        backend: Opens the index.
        live_ids: (n,) rising; rows of other ids are out from the start.
        next_id: But not those of ids from here on, which whoever says what is live has not seen
            yet; it takes them out before it searches. Default: all were seen.
        filters: The backend has the capability "filter".
        verifies: The backend has the capability "verifies".
        watch: Of the tiers, begun when they had these live ids.
        hurry: Use two cores: somebody waits who can do nothing else meanwhile.
        metric: Of the vectors, to check what the index answers.

    Raises:
        CorruptionError: Its files are not what was written.
        PluginContractError: The backend opens no segment.
    """
    vectors_file = vectors_path(home, info.name)
    index_file = index_path(home, info.name, info.backend)
    expected = info.vectors_bytes, info.vectors_crc
    if hurry and verifies and info.vectors_bytes >= _WORTH_A_THREAD:
        # Each reads as much as the other.
        with Submitter(1, "expbuf-verify") as other:
            verifying = other.submit(_verify, vectors_file, *expected)
            try:
                ids, vectors = map_vectors(vectors_file, dim)
                index = _open_index(backend, info, index_file, ids, vectors)
            finally:
                verifying.result()
    else:
        _verify(vectors_file, *expected, hurry=hurry)
        if not verifies:
            _verify(index_file, info.index_bytes, info.index_crc, hurry=hurry)
        ids, vectors = map_vectors(vectors_file, dim)
        index = _open_index(backend, info, index_file, ids, vectors)
    if verifies:
        _see_which(index, info, index_file)
    if not len(ids) or (info.rows, info.first_id) != (len(ids), ids[0]) or ids[-1] >= info.end_id:
        raise CorruptionError(
            f"{FOLDER}/{vectors_file.name}: holds other ids than {FOLDER}/{MANIFEST} says; the "
            "index will be built again",
            path=vectors_file,
            offset=_PAGE,
        )
    live = np.zeros(len(ids), bool)
    if len(live_ids):
        live = live_ids[rows_of(live_ids, ids)] == ids
    if next_id is not None:
        live |= ids >= next_id
    return OpenSegment(info, ids, vectors, index, live, filters, watch, metric)


def _see_which(index: IndexSegment, info: SegmentInfo, path: Path) -> None:
    """See that an index file that its backend has verified is the one that the manifest means.

    Raises:
        CorruptionError: It is another one, of another time or buffer.
    """
    found = index.file_crc
    if found is None:
        _verify(path, info.index_bytes, info.index_crc)
    elif found != info.index_crc:
        index.close()
        raise CorruptionError(
            f"{FOLDER}/{path.name}: intact, with checksum {found:08x}, but not the file that "
            f"{MANIFEST} means, which has {info.index_crc:08x}; the index will be built again",
            path=path,
            offset=0,
        )


def _open_index(
    backend: IndexBackend,
    info: SegmentInfo,
    path: Path,
    ids: NDArray[np.int64],
    vectors: NDArray[np.float32],
) -> IndexSegment:
    name = info.backend
    try:
        index = backend.open(path, ids, vectors)
    except (ExpbufError, OSError, ValueError, RuntimeError):
        raise
    except Exception as exc:
        raise PluginContractError(
            f"the index backend {name!r} failed to open {path.name}: {type(exc).__name__}: {exc}"
        ) from exc
    if not isinstance(index, IndexSegment):
        raise PluginContractError(
            f"the index backend {name!r} opened {path.name} as a {type(index).__name__}; expected "
            "an IndexSegment"
        )
    return index


def rows_of(here: NDArray[np.int64], ids: NDArray[np.int64]) -> NDArray[np.intp]:
    """Row of each id in rising `here`, which is not empty; any row for an id that is not there."""
    n, first = len(here), int(here[0])
    if int(here[-1]) - first == n - 1:  # none is missing, as nearly always: no need to search
        return np.clip(ids - first, 0, n - 1)
    rows = np.searchsorted(here, ids)
    rows[rows == n] = 0
    return rows


def sketch_small_ones(opened: tuple[OpenSegment, ...], metric: str) -> None:
    """Make bounds for the rows of small segments beside a large one.

    These are often searched by comparing all of their rows, and what the large one has found tells
    that hardly any can count.
    """
    large = next((one for one in opened if one.directions is not None), None)
    if large is None or large.directions is None:
        return
    for one in opened:
        known = one.sketch.known if one.sketch is not None else None
        if one is not large and one.info.rows <= _SKETCHED and known is not large.directions:
            one.sketch = Sketch.whole(large.directions, one.vectors, metric)


def drop_unlisted(home: Path, manifest: Manifest | None, fs: FileSystem) -> None:
    """Delete segment files that the manifest does not list (builder lock held)."""
    wanted = {MANIFEST}
    for info in manifest.segments if manifest else ():
        wanted |= {f"{info.name}.vectors", f"{info.name}.{info.backend}"}
    for name in names_in(home):
        if name not in wanted and not name.isdigit():
            remove(home / name, fs)


def clear_the_way(home: Path, fs: FileSystem) -> None:
    """Remove what keeps an index from being written here (builder lock held).

    What cannot be removed without more ado stays, and writing tells of it: a folder with something
    in it, and a link to a place that is not there now.
    """
    root = home if home.name == FOLDER else home.parent
    for place in dict.fromkeys((root, home)):
        try:
            blocked = not stat.S_ISDIR(os.stat(place).st_mode)
        except OSError as exc:
            blocked = is_damage(exc)  # as of a link to itself
        if blocked:
            fs.unlink(place)
    if (home / MANIFEST).is_dir():
        remove(home / MANIFEST, fs)


def drop_representations(folder: Path, doomed: Callable[[int], bool], fs: FileSystem) -> None:
    """Delete all segments of some representations.

    Args:
        folder: Of the buffer.
        doomed: By number, whether to delete.
        fs: Deletes.
    """
    names = names_in(folder / FOLDER)
    if doomed(0):
        for name in names:
            if not name.isdigit():
                remove(folder / FOLDER / name, fs)
    for name in names:
        if name.isdigit() and doomed(int(name)):
            place = folder / FOLDER / name
            if place.is_dir():
                for file in os.listdir(place):
                    remove(place / file, fs)
            remove(place, fs)


def describe(segment: OpenSegment) -> dict[str, Any]:
    """Facts worth showing."""
    return {
        "name": segment.info.name,
        "backend": segment.info.backend,
        "rows": segment.info.rows,
        "dead": segment.dead,
        "bytes": segment.info.vectors_bytes + segment.info.index_bytes,
        **segment.index.info(),
    }
