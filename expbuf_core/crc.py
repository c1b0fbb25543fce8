"""CRC-32, as zlib defines it, by the fastest code at hand.

Everything that is stored is checked at every read. zlib-ng does that ten times as fast as zlib; it
is an ordinary dependency where it has wheels, and elsewhere zlib gives the same numbers.
"""

from __future__ import annotations

try:
    from zlib_ng.zlib_ng import crc32
except ImportError:
    from zlib import crc32

__all__ = ["crc32"]
