"""The contract of index backends, for what FAISS on the CPU builds in each situation."""

from __future__ import annotations

from typing import Any, ClassVar

from expbuf_core.testing import IndexSuite


class TestFlat(IndexSuite):
    """What small segments get."""

    provider = "faiss_cpu"
    min_recall = 1.0


class TestCodes(IndexSuite):
    """What large segments get: an inverted file of codes, re-ranked."""

    provider = "faiss_cpu"
    settings: ClassVar[dict[str, Any]] = {"flat_below": 1500}
    rows = 6000
    dim = 128
    min_recall = 0.93


class TestLists(IndexSuite):
    """What large segments of short vectors get: an inverted file of full vectors."""

    provider = "faiss_cpu"
    settings: ClassVar[dict[str, Any]] = {"flat_below": 1500, "mmap": False}
    rows = 6000
    dim = 24
    min_recall = 0.93


class TestIvfPq(IndexSuite):
    """What the configuration may ask for by name."""

    provider = "faiss_cpu"
    settings: ClassVar[dict[str, Any]] = {
        "index": "IVFPQ",
        "n_lists": 32,
        "n_probes": 16,
        "m": 8,
        "nbits": 6,
    }
    dim = 64
