"""Storage in LMDB: a B-tree with transactions, and a short log in front of it. See FORMAT.md."""

from __future__ import annotations

from typing import Any

from expbuf_core.contracts import HostInfo, PersistenceContext, PersistenceProvider
from expbuf_core.hookspecs import hookimpl
from expbuf_lmdb.settings import LMDBSettings


def _factory(settings: LMDBSettings, context: PersistenceContext) -> Any:
    from expbuf_lmdb.adapter import LMDBPersistenceAdapter

    return LMDBPersistenceAdapter(settings, context)


@hookimpl
def expbuf_register_persistence(host: HostInfo) -> list[PersistenceProvider]:
    """Offer the backend "lmdb"."""
    return [
        PersistenceProvider(
            "lmdb",
            api_version=1,
            factory=_factory,
            settings=LMDBSettings,
            capabilities=frozenset({"durable", "multiprocess"}),
        )
    ]
