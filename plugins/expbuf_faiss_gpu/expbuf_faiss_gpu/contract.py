"""The contract of index backends, for each way in which an index lies on a GPU.

Run by `python -m expbuf_faiss_gpu.selfcheck`, on a real GPU. Needs `expbuf-core[testing]`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from expbuf_core.contracts import IndexBackend, IndexContext
from expbuf_core.testing import IndexSuite
from expbuf_core.testing.index_suite import Case, Vectors
from expbuf_faiss_gpu.backend import FaissGpuBackend
from expbuf_faiss_gpu.settings import FaissGpuSettings

SMALL = 1500
"""Rows below which "auto" compares every vector on the CPU, here."""


class OnGpu(IndexSuite):
    """What is the same in all of them."""

    provider = "faiss_gpu"
    settings: ClassVar[Mapping[str, Any]] = {"flat_below": SMALL}
    rows = 6000
    on_gpu: ClassVar[bool] = True

    def backend(self, metric: str, dim: int | None = None) -> IndexBackend:
        """As in the suite, with a fallback: in a forked child the CPU has to take over."""
        settings = FaissGpuSettings(**self.settings)
        context = IndexContext(
            dim=dim or self.dim, metric=metric, target_recall=0.95, fallback=("faiss_cpu",)
        )
        return FaissGpuBackend(settings, context)

    def case(
        self,
        folder: Path,
        metric: str = "cosine",
        *,
        rows: int | None = None,
        first_id: int = 1000,
        given: Vectors | None = None,
    ) -> Case:
        """As in the suite; and it lies where it should."""
        case = super().case(folder, metric, rows=rows, first_id=first_id, given=given)
        if len(case.ids) >= SMALL:
            assert case.segment.info()["device"].startswith("gpu" if self.on_gpu else "cpu")
        return case


class TestLists(OnGpu):
    """What large segments get: an inverted file of full vectors."""

    min_recall = 0.93


class TestHalfPrecision(OnGpu):
    """The same with vectors of 16 bits a number."""

    settings: ClassVar[Mapping[str, Any]] = {"flat_below": SMALL, "float16": True}
    min_recall = 0.93


class TestFlat(OnGpu):
    """What segments without structure get: every vector is compared."""

    settings: ClassVar[Mapping[str, Any]] = {"flat_below": SMALL, "index": "flat"}
    min_recall = 1.0


class TestFlatHalfPrecision(OnGpu):
    """The same with vectors of 16 bits a number."""

    settings: ClassVar[Mapping[str, Any]] = {
        "flat_below": SMALL,
        "index": "flat",
        "float16": True,
    }
    min_recall = 0.99


class TestCodes(OnGpu):
    """What may be asked for by name: codes, re-ranked."""

    settings: ClassVar[Mapping[str, Any]] = {"index": "IVFPQ", "nlist": 32, "m": 8}
    dim = 64


class TestNotOnGpu(OnGpu):
    """An index that no GPU can hold is searched on the CPU."""

    settings: ClassVar[Mapping[str, Any]] = {"index": "IVF64,RaBitQ"}
    on_gpu = False
    test_x42_another_process: ClassVar[Any] = None  # it would have no fallback, and refuse
