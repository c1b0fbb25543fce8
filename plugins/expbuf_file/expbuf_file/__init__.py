"""Storage in plain files: write-ahead logs, one fsync a commit. See FORMAT.md."""

from __future__ import annotations

from typing import Any

from expbuf_core.contracts import HostInfo, PersistenceContext, PersistenceProvider
from expbuf_core.hookspecs import hookimpl
from expbuf_file.settings import FileSettings


def _factory(settings: FileSettings, context: PersistenceContext) -> Any:
    from expbuf_file.adapter import FilePersistenceAdapter

    return FilePersistenceAdapter(settings, context)


@hookimpl
def expbuf_register_persistence(host: HostInfo) -> list[PersistenceProvider]:
    """Offer the backend "file"."""
    return [
        PersistenceProvider(
            "file",
            api_version=1,
            factory=_factory,
            settings=FileSettings,
            capabilities=frozenset({"durable", "multiprocess"}),
        )
    ]
