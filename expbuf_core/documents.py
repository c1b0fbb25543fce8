"""JSON documents of the folder: identity, index manifest, notes. Each has a checksum of its own.

What stands under their names may be anything, and a checksum can be compared only behind the
parser. So what a damaged file can do to a parser ends here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from expbuf_core.filesystem import read_if_there

MALFORMED = (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)
"""What looking into a document raises that nobody has written."""

_MOST_BYTES = 16 << 20  # far more than any of them has


def read_document(path: Path) -> dict[str, Any] | None:
    """The document; None where the file is missing.

    Raises:
        ValueError: There is none in the file; or another one of `MALFORMED`.
        CorruptionError: It cannot be read, or is no file.
        StorageError: It cannot be read now.
    """
    raw = read_if_there(path, _MOST_BYTES)
    if raw is None:
        return None
    document = json.loads(raw)
    if not isinstance(document, dict):
        raise ValueError(f"no JSON object, but {type(document).__name__}")
    return document
