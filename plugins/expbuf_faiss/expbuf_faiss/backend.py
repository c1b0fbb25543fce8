"""The index backend: builds segments with FAISS and opens them."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from expbuf_core.builtin.exact import ExactSegment
from expbuf_core.contracts import IndexBackend, IndexContext, IndexSegment
from expbuf_core.errors import (
    BackendUnavailable,
    ConfigError,
    CorruptionError,
    StorageError,
    StorageFull,
)
from expbuf_core.exact_search import METRICS
from expbuf_core.filesystem import storage_errors
from expbuf_faiss import runtime, segment_file, training
from expbuf_faiss.building import Building
from expbuf_faiss.calibration import Tuning
from expbuf_faiss.parameters import is_ivf
from expbuf_faiss.plans import FLAT, Plan, plans, sub_vectors
from expbuf_faiss.segment import FaissSegment
from expbuf_faiss.settings import FaissSettings


class FaissBackend(IndexBackend):
    """FAISS on the CPU; the base of what runs elsewhere.

    A subclass may override `plans` (which indexes suit its device), `train` and `add` (where the
    work is done), `place` (to move an index to a device when a segment is opened), `open_flat` and
    `segment_type`.
    """

    segment_type: type[FaissSegment] = FaissSegment

    def __init__(self, settings: FaissSettings, context: IndexContext) -> None:
        if importlib.util.find_spec("faiss") is None:
            raise BackendUnavailable("FAISS is not installed; try `pip install faiss-cpu`")
        if context.metric not in METRICS:
            raise ConfigError(f"metric: {context.metric!r}; expected one of {', '.join(METRICS)}")
        if settings.index == "IVFPQ":
            sub_vectors(settings, context.dim)  # refuse now what would fail in the builder
        self.settings = settings
        self.context = context

    def build(self, ids: NDArray[np.int64], vectors: NDArray[np.float32], path: Path) -> None:
        """Write a segment file; see `IndexBackend.build`.

        Raises:
            ConfigError: The settings do not make an index that fits.
            StorageError: The file cannot be written.
        """
        vectors = np.asarray(vectors)  # a plain view: slicing a numpy.memmap object is slow
        chosen = self.plans(len(vectors))
        # A flat index needs no FAISS, whose import takes longer than building it.
        built = None if chosen[0] == FLAT else Building(runtime.load(), self, vectors).run(chosen)
        if built is None:
            facts: dict[str, Any] = {"kind": "flat"}
        else:
            faiss = runtime.load()
            facts = {
                "kind": "faiss",
                "factory": built.plan.factory,
                "metric": self.context.metric,
                "effort": built.tuning.effort,
                "effort_is": "nprobe" if is_ivf(faiss, built.index) else "ef_search",
                "rerank": built.tuning.rerank,
                "recall": round(built.tuning.recall, 4),
                "faiss": faiss.__version__,
            }
            _write(faiss, built.index, path)
        segment_file.finish(path, len(vectors), self.context.dim, facts)

    def open(
        self, path: Path, ids: NDArray[np.int64], vectors: NDArray[np.float32]
    ) -> IndexSegment:
        """Open a segment file; see `IndexBackend.open`.

        Raises:
            CorruptionError: The file is damaged, or belongs to other vectors.
        """
        content = segment_file.check(path, len(ids), self.context.dim)
        segment = self._opened(path, content, ids, vectors)
        segment.file_crc = content.crc
        return segment

    def _opened(
        self,
        path: Path,
        content: segment_file.Content,
        ids: NDArray[np.int64],
        vectors: NDArray[np.float32],
    ) -> IndexSegment:
        facts = content.facts
        if facts["kind"] == "flat":
            return self.open_flat(ids, vectors)
        faiss = runtime.load()
        flags = faiss.IO_FLAG_MMAP_IFC if self.settings.mmap else 0
        try:
            with _spelt(path, os.O_RDONLY) as name:
                index = faiss.read_index(name, flags)
        except RuntimeError as exc:
            raise CorruptionError(
                f"{path}: FAISS cannot read it: {exc}; the index has to be built again", path=path
            ) from exc
        kind = faiss.METRIC_L2 if self.context.metric == "l2" else faiss.METRIC_INNER_PRODUCT
        found, expected = (
            (index.ntotal, index.d, index.metric_type),
            (len(ids), self.context.dim, kind),
        )
        if found != expected:
            raise CorruptionError(
                f"{path}: an index of (rows, dim, metric) {found}; {expected} expected; "
                "it has to be built again",
                path=path,
            )
        return self.segment_type(
            self.place(index),
            ids,
            vectors,
            self.context.metric,
            Tuning(facts["effort"], facts["rerank"], facts["recall"], True),
            {**facts, "bytes": content.index_bytes},
        )

    def after_fork(self) -> None:
        """Keep FAISS from waiting for threads that the child does not have."""
        runtime.after_fork()

    # ------------------------------------------------------------ for subclasses

    def plans(self, rows: int) -> list[Plan]:
        """What to build, best first; the last one is taken whatever it reaches."""
        return plans(self.settings, rows, self.context.dim)

    def train(self, index: Any, sample: NDArray[np.float32]) -> None:
        """Train an index."""
        index.train(sample)

    def add(self, index: Any, vectors: NDArray[np.float32]) -> None:
        """Add all vectors to a trained index."""
        training.add(index, vectors)

    def place(self, index: Any) -> Any:
        """Move an index that was built or read to where it is searched."""
        return index

    def open_flat(self, ids: NDArray[np.int64], vectors: NDArray[np.float32]) -> IndexSegment:
        """Open a segment that has no index: its vectors are searched where they are mapped."""
        return ExactSegment(ids, vectors, self.context.metric, kind="flat")


@contextlib.contextmanager
def _spelt(path: Path, flags: int) -> Iterator[str]:
    """A path as FAISS takes it, which is UTF-8 only: what is not goes by its descriptor."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        with storage_errors("open", path):
            fd = os.open(path, flags | os.O_CLOEXEC, 0o666)
        try:
            yield f"/proc/self/fd/{fd}"
        finally:
            os.close(fd)
    else:
        yield str(path)


def _write(faiss: Any, index: Any, path: Path) -> None:
    try:
        with _spelt(path, os.O_WRONLY | os.O_CREAT) as name:
            faiss.write_index(index, name)
    except RuntimeError as exc:
        full = "No space left" in str(exc)
        raise (StorageFull if full else StorageError)(
            f"cannot write {path}: {str(exc).splitlines()[-1]}"
        ) from exc
