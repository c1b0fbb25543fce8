"""Searching one immutable index on a GPU, with the CPU ready to answer in its place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from expbuf_core.contracts import IndexSegment
from expbuf_core.exact_search import exact_search, squared_norms, unpack_allowed
from expbuf_faiss import FaissSegment, RowFilter, runtime
from expbuf_faiss.calibration import CANDIDATES_FLOOR, Tuning
from expbuf_faiss.parameters import keeps_vectors, parameters
from expbuf_faiss_gpu.devices import DeviceBusy, DeviceError, Resident
from expbuf_faiss_gpu.searching import MOST, Candidates, candidates, rescored
from expbuf_faiss_gpu.takeover import EXACT, Takeover

_FEW = 1024  # so few allowed rows are compared one by one
_SPARE = 22  # candidates beyond k: what rounding on a GPU may have put behind the k-th

_Found = tuple[NDArray[np.int64], NDArray[np.float32]]


@dataclass
class Placed:
    """An index of the CPU and, if there was room, its copy on a GPU.

    Attributes:
        index: On the CPU, mapped where it can be.
        resident: On the GPU.
        takeover: Told when that fails.
        exact: The configured fallback is not the CPU's index but comparing every vector.
    """

    index: Any
    resident: Resident | None
    takeover: Takeover
    exact: bool = False

    def failed(self, error: DeviceError) -> None:
        """The GPU failed in the middle of work: do without it from now on.

        Raises:
            BackendUnavailable: Nothing may take its place.
        """
        self.exact = self.takeover.instead(error) == EXACT
        self.release()

    def release(self) -> None:
        """Give the GPU's memory back; the CPU answers what is still asked."""
        resident, self.resident = self.resident, None
        if resident is not None:
            resident.free()

    def where(self) -> str:
        """Where searches go, for people."""
        return "cpu" if self.resident is None else f"gpu {self.resident.device.number}"


class GpuSegment(FaissSegment):
    """Asks the copy on the GPU, and the CPU for what a GPU cannot do.

    That is: more than 2048 results or lists, what is left of rows after nearly all were removed,
    searches while something longer keeps the GPU busy, and everything once the GPU has failed.
    """

    def __init__(
        self,
        placed: Placed,
        ids: NDArray[np.int64],
        vectors: NDArray[np.float32],
        metric: str,
        tuning: Tuning,
        facts: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(placed.index, ids, vectors, metric, tuning, facts)
        self._placed = placed
        faiss = runtime.load()
        self._full = keeps_vectors(faiss, placed.index)
        self._unfiltered: dict[int | None, Any] = {}

    def search(
        self, queries: NDArray[np.float32], k: int, allowed: NDArray[np.uint8] | None
    ) -> _Found:
        """See `IndexSegment.search`.

        Raises:
            BackendUnavailable: The GPU failed, and the configuration has no fallback.
        """
        if self._placed.exact:
            return self._exact.search(queries, k, allowed)
        return super().search(queries, k, allowed)

    def search_index(
        self, queries: NDArray[np.float32], k: int, effort: int | None, chosen: RowFilter
    ) -> _Found:
        """Ask the GPU, or the CPU where a GPU cannot answer."""
        found = self._on_gpu(queries, k, effort, chosen)
        if found is None:
            return super().search_index(queries, k, effort, chosen)
        rows, distances, short = found
        if short.any():
            rows[short], distances[short] = super().search_index(queries[short], k, effort, chosen)
        return rows, distances

    def _on_gpu(
        self, queries: NDArray[np.float32], k: int, effort: int | None, chosen: RowFilter
    ) -> Candidates | None:
        resident = self._placed.resident
        if resident is None or k > MOST or (effort or 0) > MOST:
            return None
        try:
            asked = self._parameters(effort)
            return candidates(resident, queries, k, asked, chosen, len(self._ids))
        except DeviceBusy:
            return None
        except DeviceError as exc:
            self._placed.failed(exc)
            return None

    def _parameters(self, effort: int | None) -> Any:
        """FAISS's search parameters, without a selector: it would be ignored."""
        if effort is None:
            return None
        found = self._unfiltered.get(effort)
        if found is None:
            if len(self._unfiltered) >= 64:
                self._unfiltered.clear()
            found = self._unfiltered[effort] = parameters(runtime.load(), self._index, effort)
        return found

    def _ranked(
        self, queries: NDArray[np.float32], k: int, effort: int | None, chosen: RowFilter
    ) -> _Found:
        rerank = self._tuning.rerank
        if not rerank and not self._full:  # codes are to decide alone
            return super()._ranked(queries, k, effort, chosen)
        wanted = k if self._full else rerank * max(k, CANDIDATES_FLOOR)
        rows, _ = self.search_index(queries, min(wanted, chosen.count), effort, chosen)
        return rescored(self._vectors, rows, queries, k, self._metric)

    def info(self) -> dict[str, Any]:
        """Facts worth showing."""
        return {**super().info(), "device": self._placed.where()}

    def close(self) -> None:
        """Give the GPU's memory back; the CPU answers what is still asked."""
        self._placed.release()


class GpuFlatSegment(IndexSegment):
    """Compares every vector, on a GPU: there is no index, only a copy of the vectors."""

    def __init__(
        self,
        placed: Placed,
        ids: NDArray[np.int64],
        vectors: NDArray[np.float32],
        metric: str,
    ) -> None:
        self._placed = placed
        self._ids = np.asarray(ids)
        self._vectors = np.asarray(vectors)
        self._metric = metric
        self._squared: NDArray[np.float32] | None = None
        self._everything = RowFilter(runtime.load(), None, len(self._ids))
        self._filter = self._everything

    def search(
        self, queries: NDArray[np.float32], k: int, allowed: NDArray[np.uint8] | None
    ) -> _Found:
        """See `IndexSegment.search`.

        Raises:
            BackendUnavailable: The GPU failed, and the configuration has no fallback.
        """
        chosen = self._everything if allowed is None else self._filter
        if chosen.allowed is not allowed:
            chosen = self._filter = RowFilter(runtime.load(), allowed, len(self._ids))
        wanted = min(k + _SPARE, chosen.count)
        found = None
        if chosen.count > _FEW and k + _SPARE <= MOST:
            found = self._on_gpu(queries, wanted, chosen)
        if found is None:
            rows, similarities = self._compared(queries, k, allowed)
        else:
            rows, similarities = rescored(self._vectors, found.rows, queries, k, self._metric)
            # The bitmap may have changed since its rows were counted: look at what came back.
            short = found.short | (rows[:, min(k, wanted) - 1] < 0)
            if short.any():
                rows[short], similarities[short] = self._compared(queries[short], k, allowed)
        return np.where(rows >= 0, self._ids[rows], -1), similarities

    def _compared(
        self, queries: NDArray[np.float32], k: int, allowed: NDArray[np.uint8] | None
    ) -> _Found:
        """(m, k) rows and similarities, found on the CPU, and the same to the last bit."""
        if self._metric == "l2" and self._squared is None:
            self._squared = squared_norms(self._vectors)
        mask = None if allowed is None else unpack_allowed(allowed, len(self._ids))
        rows, _ = exact_search(self._vectors, self._squared, queries, k, self._metric, mask)
        return rescored(self._vectors, rows, queries, k, self._metric)

    def _on_gpu(self, queries: NDArray[np.float32], k: int, chosen: RowFilter) -> Candidates | None:
        resident = self._placed.resident
        if resident is None:
            return None
        try:
            runtime.load()
            return candidates(resident, queries, k, None, chosen, len(self._ids))
        except DeviceBusy:
            return None
        except DeviceError as exc:
            self._placed.failed(exc)
            return None

    def info(self) -> dict[str, Any]:
        """Facts worth showing."""
        where = self._placed.where()
        return {"kind": "flat", "rows": len(self._ids), "bytes": 0, "recall": 1.0, "device": where}

    def close(self) -> None:
        """Give the GPU's memory back; the CPU answers what is still asked."""
        self._placed.release()
