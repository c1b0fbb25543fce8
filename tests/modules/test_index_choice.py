"""Which index a buffer uses, and who is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from module_helpers import OpenBuffer, experience, finds

from expbuf_core import hookimpl


class Witness:
    """Hears of every fallback."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, str, str]] = []

    @hookimpl
    def expbuf_on_fallback(self, kind: str, wanted: str, used: str, reason: str) -> None:
        self.heard.append((kind, wanted, used))


def test_a_fallback_is_told_at_every_opening(open_buffer: OpenBuffer, folder: Path) -> None:
    """Not only where something is built: an operator must not have to wait for that."""
    wanted: dict[str, Any] = {"index": {"backend": "nowhere", "fallback": ["exact"]}}
    for serial in range(2):
        witness = Witness()
        buffer = open_buffer(plugins=[witness], **wanted)
        buffer.add(experience(serial))
        buffer.add(experience(serial + 10))
        assert finds(buffer, serial)
        assert witness.heard == [("index", "nowhere", "exact")]
        buffer.rebuild_index()
        assert len(witness.heard) == 1, "once an opening is enough"
        buffer.close()


def test_no_fallback_no_event(open_buffer: OpenBuffer) -> None:
    witness = Witness()
    buffer = open_buffer(plugins=[witness])
    buffer.add(experience(1))
    buffer.rebuild_index()
    assert witness.heard == []
