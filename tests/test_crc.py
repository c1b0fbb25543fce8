"""Checksums are the same whichever library makes them."""

from __future__ import annotations

import subprocess
import sys
import zlib

import numpy as np

from expbuf_core.crc import crc32


def test_the_same_as_zlib(rng: np.random.Generator) -> None:
    data = rng.bytes(70_000)
    for n in [*range(300), 1023, 4096, 65_537]:
        for at in (0, 1, 3, 8):
            part = memoryview(data)[at : at + n]
            assert crc32(part) == zlib.crc32(part)
            assert crc32(part, 0xDEADBEEF) == zlib.crc32(part, 0xDEADBEEF)
    numbers = np.frombuffer(data, np.float32)[:999]
    assert crc32(numbers.data) == zlib.crc32(bytearray(numbers.tobytes()))


def test_where_zlib_ng_is_missing() -> None:
    code = (
        "import sys, zlib; sys.modules['zlib_ng'] = None\n"
        "from expbuf_core import crc; assert crc.crc32 is zlib.crc32"
    )
    subprocess.run([sys.executable, "-c", code], timeout=60, check=True)
