"""The index that is none: exact search of the raw vectors. Always there, and never wrong."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel

from expbuf_core.contracts import IndexBackend, IndexContext, IndexSegment
from expbuf_core.crc import crc32
from expbuf_core.errors import CorruptionError
from expbuf_core.exact_search import exact_search, squared_norms, unpack_allowed

_MAGIC = b"EXPBEXA1"
_HEADER = struct.Struct("<8sQI")  # magic, count, dim; a CRC-32 of these follows
_CRC = struct.Struct("<I")


class ExactSettings(BaseModel, extra="forbid"):
    """The exact index has nothing to configure."""


class ExactSegment(IndexSegment):
    """Searches mapped vectors as they are; also of use to other backends for small segments."""

    def __init__(
        self, ids: NDArray[np.int64], vectors: NDArray[np.float32], metric: str, kind: str = "exact"
    ) -> None:
        self._ids = np.asarray(ids)
        self._vectors = np.asarray(vectors)
        self._metric = metric
        self._kind = kind
        self._squared: NDArray[np.float32] | None = None

    def search(
        self, queries: NDArray[np.float32], k: int, allowed: NDArray[np.uint8] | None
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """See `IndexSegment.search`. Recall is 1."""
        if self._metric == "l2" and self._squared is None:
            # Two threads may both do this; they store the same.
            self._squared = squared_norms(self._vectors)
        mask = None if allowed is None else unpack_allowed(allowed, len(self._ids))
        rows, similarities = exact_search(
            self._vectors, self._squared, queries, k, self._metric, mask
        )
        return np.where(rows >= 0, self._ids[rows], -1), similarities

    def info(self) -> dict[str, Any]:
        """Facts worth showing."""
        return {"kind": self._kind, "rows": len(self._ids), "bytes": 0, "recall": 1.0}


class ExactIndexBackend(IndexBackend):
    """Offers exact search as an index backend; its file only says what it belongs to."""

    def __init__(self, settings: ExactSettings, context: IndexContext) -> None:
        self._context = context

    def build(self, ids: NDArray[np.int64], vectors: NDArray[np.float32], path: Path) -> None:
        """Write count and dimension."""
        header = _HEADER.pack(_MAGIC, len(ids), self._context.dim)
        path.write_bytes(header + _CRC.pack(crc32(header)))

    def open(
        self, path: Path, ids: NDArray[np.int64], vectors: NDArray[np.float32]
    ) -> ExactSegment:
        """Search `vectors`, once the file is known to be theirs.

        Raises:
            CorruptionError: The file is damaged, or belongs to other vectors.
        """
        with path.open("rb") as file:
            data = file.read(_HEADER.size + _CRC.size + 1)
        header = _HEADER.pack(_MAGIC, len(ids), self._context.dim)
        if data != header + _CRC.pack(crc32(header)) or vectors.shape != (
            len(ids),
            self._context.dim,
        ):
            raise CorruptionError(
                f"{path}: not the exact index of {len(ids)} vectors of dimension "
                f"{self._context.dim}; it has to be built again",
                path=path,
                offset=0,
            )
        return ExactSegment(ids, vectors, self._context.metric)
