"""Two processes create one buffer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from expbuf_core import Experience, ExperienceBuffer, folder
from expbuf_core.folder import Identity

SETTINGS = {"index": {"backend": "exact", "builder": "off"}}


@pytest.mark.parametrize("adds", [0, 200], ids=["just made", "used already"])
def test_another_one_was_faster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, adds: int) -> None:
    """It was created between two looks: this process saw no buffer, and then its files."""
    path = tmp_path / "buffer"
    small = {"file": {"initial_bytes": 1 << 14, "segment_bytes": 1 << 14}}
    look = folder.read_identity
    first = [True]

    def nothing_yet(where: Path) -> Identity | None:
        found = look(where)
        if first and first.pop():
            with ExperienceBuffer.open(path, config={**SETTINGS, "persistence": small}) as other:
                for n in range(adds):
                    other.add(Experience(v_embed=np.full(64, n + 1.0)))
                if adds:
                    other.save_snapshot()
        return found

    monkeypatch.setattr(folder, "read_identity", nothing_yet)
    with ExperienceBuffer.open(path, config=SETTINGS) as buffer:
        assert not first
        assert len(buffer) == adds
