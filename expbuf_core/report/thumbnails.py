"""Small pictures of experiences, as `data:` addresses.

The convention, in this order:

1. `metadata["thumbnail"]`: an encoded PNG, JPEG, GIF or WebP as bytes; or pixels as a uint8 array,
   (height, width), (height, width, 1), (height, width, 3) RGB or (height, width, 4) RGBA.
2. `Experience.image`, if it holds such bytes rather than a path.

Pixels are thinned to at most 96 a side. Encoded pictures are taken as they are, up to 32 KiB: there
is no decoder here to shrink them. Paths are not followed: a report shows what the buffer holds.
"""

from __future__ import annotations

import base64
import struct
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from expbuf_core.experience import Experience

KEY = "thumbnail"
MOST_BYTES = 32 << 10
_MOST_PIXELS = 96
_COLOUR_TYPES = {1: 0, 3: 2, 4: 6}  # channels -> colour type of PNG
_ENCODED = (
    (b"\x89PNG\r\n\x1a\n", "image/png"),
    (b"\xff\xd8\xff", "image/jpeg"),
    (b"GIF87a", "image/gif"),
    (b"GIF89a", "image/gif"),
)


def thumbnail(experience: Experience) -> str | None:
    """The picture of an experience as a `data:` address; None where it has none that fits."""
    metadata = experience.metadata
    given: Any = metadata.get(KEY) if metadata is not None else None
    if isinstance(given, np.ndarray):
        pixels = _pixels(given)
        return None if pixels is None else _address("image/png", png(pixels))
    for picture in (given, experience.image):
        if isinstance(picture, bytes) and len(picture) <= MOST_BYTES:
            kind = _kind(picture)
            if kind is not None:
                return _address(kind, picture)
    return None


def png(pixels: NDArray[np.uint8]) -> bytes:
    """Encode (height, width, channels) uint8 pixels with 1, 3 or 4 channels."""
    height, width, channels = pixels.shape
    lines = np.zeros((height, 1 + width * channels), np.uint8)  # each begins with its filter: none
    lines[:, 1:] = pixels.reshape(height, -1)
    head = struct.pack(">IIBBBBB", width, height, 8, _COLOUR_TYPES[channels], 0, 0, 0)
    parts = ((b"IHDR", head), (b"IDAT", zlib.compress(lines.tobytes(), 6)), (b"IEND", b""))
    return _ENCODED[0][0] + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in parts
    )


def _pixels(array: NDArray[Any]) -> NDArray[np.uint8] | None:
    """(height, width, channels), thinned; None if these are no pixels."""
    if array.ndim == 2:
        array = array[:, :, None]
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] not in _COLOUR_TYPES:
        return None
    if 0 in array.shape:
        return None
    step = -(-max(array.shape[:2]) // _MOST_PIXELS)
    return array[::step, ::step]


def _kind(picture: bytes) -> str | None:
    for magic, kind in _ENCODED:
        if picture.startswith(magic):
            return kind
    if picture[:4] == b"RIFF" and picture[8:12] == b"WEBP":
        return "image/webp"
    return None


def _address(kind: str, picture: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(picture).decode('ascii')}"
