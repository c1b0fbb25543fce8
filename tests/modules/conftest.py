"""Lets the tests in this folder import their helpers by name, and closes what they leave open."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

_HERE = str(Path(__file__).parent)
if _HERE not in sys.path:
    sys.path.insert(0, _HERE)

from module_helpers import OpenBuffer, Opened  # noqa: E402  (after the path is set)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where a buffer may be created."""
    return tmp_path / "memory"


@pytest.fixture
def open_buffer(folder: Path) -> Iterator[OpenBuffer]:
    """Opens small buffers in `folder` (or elsewhere), and closes them at the end."""
    opened = Opened(folder)
    yield opened
    opened.close()
