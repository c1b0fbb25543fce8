"""The contract of index backends, on a stand-in for a GPU that ignores selectors."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, ClassVar

import pytest

from expbuf_faiss_gpu import contract

pytestmark = pytest.mark.usefixtures("board")
LONG = os.environ.get("EXPBUF_LONG", "") not in ("", "0")


class TestLists(contract.TestLists):
    rows = 2400
    settings: ClassVar[Mapping[str, Any]] = {
        "flat_below": contract.SMALL,
        "nlist": 32,
        "train_iterations": 3,
    }


class TestFlat(contract.TestFlat):
    rows = 2400
    test_x42_another_process: ClassVar[Any] = None  # two interpreters; once is enough


if LONG:
    from expbuf_faiss_gpu.contract import (  # noqa: F401
        TestCodes,
        TestFlatHalfPrecision,
        TestHalfPrecision,
        TestNotOnGpu,
    )
