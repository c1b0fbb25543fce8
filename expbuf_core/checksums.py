"""The CRC-32 of a large file, by two threads where there are two cores.

Reading and checking are all that opening a large index takes, and both release the interpreter.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

from expbuf_core.crc import crc32
from expbuf_core.filesystem import open_to_read, reading
from expbuf_core.submitting import Submitter

_CHUNK = 1 << 18  # stays in the processor's cache between reading and checking
_SPLIT = 32 << 20  # a smaller file is not worth a thread
_POLYNOMIAL = 0xEDB88320  # of CRC-32, its highest power in the lowest bit


def file_crc(path: Path, expected: int | None = None, *, hurry: bool = False) -> tuple[int, int]:
    """(bytes, CRC-32) of a file; reads it through once, which also warms the page cache.

    A `CorruptionError` says that it cannot be read; the offset is not known.

    Args:
        path: Of the file.
        expected: Its size. One of another size is not read: a damaged one may have any.
        hurry: By two threads, where nothing else could use the other core meanwhile.

    Returns:
        Its size, and its checksum; 0 for one of another size than expected.
    """
    with reading(path), open(open_to_read(path), "rb", buffering=0) as file:
        fd, size = file.fileno(), os.fstat(file.fileno()).st_size
        if expected not in (None, size):
            return size, 0
        if not hurry or size < _SPLIT or len(os.sched_getaffinity(0)) < 2:
            return _part_crc(fd, 0, None)
        middle = size // 2
        with Submitter(1, "expbuf-checksum") as other:
            later = other.submit(_part_crc, fd, middle, None)
            first, crc = _part_crc(fd, 0, middle)
            second, its_crc = later.result()
    if first < middle:  # it was cut meanwhile
        return first, crc
    return first + second, joined_crc(crc, its_crc, second)


def _part_crc(fd: int, at: int, end: int | None) -> tuple[int, int]:
    """(bytes, CRC-32) of a file from `at` to `end`, or to where it ends."""
    crc = size = 0
    chunk = memoryview(bytearray(_CHUNK))
    while end is None or at < end:
        n = os.preadv(fd, [chunk if end is None else chunk[: end - at]], at)
        if not n:
            break
        crc = crc32(chunk[:n], crc)
        size += n
        at += n
    return size, crc


def joined_crc(first: int, second: int, second_bytes: int) -> int:
    """CRC-32 of two parts one behind the other, from those of each.

    A checksum is the remainder of a polynomial over GF(2): bytes that follow multiply what is
    before them by x^8 each.
    """
    power, k = 1 << 31, 3
    while second_bytes:
        if second_bytes & 1:
            power = _product(_squares()[k], power)
        second_bytes >>= 1
        k = (k + 1) % 32  # x^(2^32) is x
    return _product(power, first) ^ second


@cache
def _squares() -> list[int]:
    """x^(2^k), k from 0 to 31."""
    found = [1 << 30]
    while len(found) < 32:
        found.append(_product(found[-1], found[-1]))
    return found


def _product(a: int, b: int) -> int:
    """Of two polynomials, modulo that of CRC-32; the coefficient of x^0 is the highest bit."""
    product, bit = 0, 1 << 31
    while bit:
        if a & bit:
            product ^= b
        b = b >> 1 ^ (_POLYNOMIAL if b & 1 else 0)
        bit >>= 1
    return product
