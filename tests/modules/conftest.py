"""Lets the tests in this folder import their helpers by name, and closes what they leave open."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from expbuf_core import ExperienceBuffer
from expbuf_core.testing.crash import scratch_folder

_HERE = str(Path(__file__).parent)
if _HERE not in sys.path:
    sys.path.insert(0, _HERE)

from module_helpers import OpenBuffer, Opened  # noqa: E402  (after the path is set)


@pytest.fixture
def folder() -> Iterator[Path]:
    """Where a buffer may be created; on no disk, where the machine offers that, to be quick."""
    home = scratch_folder()
    yield home / "memory"
    shutil.rmtree(home)


@pytest.fixture
def open_buffer(folder: Path) -> Iterator[OpenBuffer]:
    """Opens small buffers in `folder` (or elsewhere), and closes them at the end."""
    opened = Opened(folder)
    yield opened
    opened.close()


@pytest.fixture(params=["file", "memory"])
def buffer(request: pytest.FixtureRequest, open_buffer: Any) -> ExperienceBuffer:
    """A new buffer with room for 8 experiences, in a folder or in memory."""
    made: ExperienceBuffer
    made = open_buffer(max_size=8) if request.param == "file" else open_buffer.memory(max_size=8)
    return made
