"""An HNSW index for expbuf by usearch, ranked again by the raw vectors."""

from __future__ import annotations

import mmap
import struct
import threading
import weakref
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
from expbuf_core import HostInfo, IndexBackend, IndexContext, IndexProvider, IndexSegment, hookimpl
from expbuf_core.exact_search import exact_rerank, exact_search
from pydantic import BaseModel, PositiveInt

_HEAD = struct.Struct("<8sII")  # magic, version, checksum of the rest
_MAGIC = b"EXPBUFUS"


class Settings(BaseModel, extra="forbid"):
    connectivity: PositiveInt = 16
    expansion_add: PositiveInt = 128
    expansion_search: PositiveInt = 64


class USearchSegment(IndexSegment):
    def __init__(self, index: Any, mapped: mmap.mmap, ids: Any, vectors: Any, metric: str) -> None:
        self._index, self._mapped = index, mapped  # the index looks into the map
        self._ids, self._vectors, self._metric = ids, vectors, metric
        self.lock = threading.Lock()  # usearch gives all searches with one thread the same scratch

    def search(self, queries: Any, k: int, allowed: Any) -> tuple[Any, Any]:
        count = len(self._ids)
        wanted = max(10, k + k // 2)
        if wanted * 4 > count:  # a graph pays off only where a part of it is looked at
            rows, similarities = exact_search(self._vectors, None, queries, k, self._metric, None)
        else:
            with self.lock:
                found = self._index.search(queries, wanted, threads=1)
            nearest = np.asarray(found.keys).reshape(len(queries), -1).astype(np.int64)
            counts = np.broadcast_to(getattr(found, "counts", nearest.shape[1]), len(queries))
            nearest[np.arange(nearest.shape[1]) >= np.asarray(counts)[:, None]] = -1
            rows, similarities = exact_rerank(self._vectors, nearest, queries, k, self._metric)
            short = rows[:, -1] < 0
            if short.any():  # the graph has parts that no path leads to
                rows[short], similarities[short] = exact_search(
                    self._vectors, None, np.ascontiguousarray(queries[short]), k, self._metric
                )
        return np.where(rows >= 0, self._ids[rows], -1), similarities

    def info(self) -> dict[str, Any]:
        return {"kind": "HNSW", "bytes": len(self._mapped)}


class USearchBackend(IndexBackend):
    def __init__(self, settings: Settings, context: IndexContext) -> None:
        from usearch.index import Index  # nothing heavy before a buffer wants it

        metric = "l2sq" if context.metric == "l2" else "ip"
        self._shape = {"ndim": context.dim, "metric": metric, "dtype": "f32", **dict(settings)}
        self._make, self._metric = Index, context.metric
        self._open: weakref.WeakSet[USearchSegment] = weakref.WeakSet()

    def build(self, ids: Any, vectors: Any, path: Path) -> None:
        index = self._make(**self._shape)
        index.add(np.arange(len(ids), dtype=np.uint64), np.asarray(vectors), threads=1)
        content = bytes(index.save())
        path.write_bytes(_HEAD.pack(_MAGIC, 1, crc32(content)) + content)

    def open(self, path: Path, ids: Any, vectors: Any) -> USearchSegment:
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        magic, version, crc = _HEAD.unpack_from(mapped)
        content = memoryview(mapped)[_HEAD.size :]
        if magic != _MAGIC or version != 1 or crc32(content) != crc:
            raise ValueError(f"{path} is no index of usearch, or damaged")
        index = self._make(**self._shape)
        index.view(np.frombuffer(content, np.uint8))
        if len(index) != len(ids):
            raise ValueError(f"{path} holds {len(index)} vectors, {len(ids)} wanted")
        segment = USearchSegment(index, mapped, ids, vectors, self._metric)
        self._open.add(segment)
        return segment

    def after_fork(self) -> None:
        for segment in self._open:
            segment.lock = threading.Lock()  # a thread that is not here may have held it


@hookimpl
def expbuf_register_index_backends(host: HostInfo) -> list[IndexProvider]:
    return [IndexProvider("usearch", api_version=1, factory=USearchBackend, settings=Settings)]
