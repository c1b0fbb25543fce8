"""Offers the index backend "faiss_cpu" to expbuf. FAISS is imported at its first use, not here."""

from __future__ import annotations

from expbuf_core.contracts import HostInfo, IndexProvider
from expbuf_core.hookspecs import hookimpl
from expbuf_faiss import FaissBackend, FaissSettings


@hookimpl
def expbuf_register_index_backends(host: HostInfo) -> list[IndexProvider]:
    """Offer "faiss_cpu"."""
    return [
        IndexProvider(
            "faiss_cpu",
            api_version=1,
            factory=FaissBackend,
            settings=FaissSettings,
            capabilities=frozenset({"filter", "verifies"}),
        )
    ]
