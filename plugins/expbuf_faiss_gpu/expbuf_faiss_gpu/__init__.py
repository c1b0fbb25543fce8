"""Offers the index backend "faiss_gpu" to expbuf. Nothing here looks for a GPU or imports FAISS.

The wheel of FAISS for GPUs holds the CPU indexes, too, and cannot stand beside the one for CPUs.
So "faiss_cpu" is offered as well, unless the plugin for CPUs does that.
"""

from __future__ import annotations

import importlib.util

from expbuf_core.contracts import HostInfo, IndexProvider
from expbuf_core.hookspecs import hookimpl
from expbuf_faiss import FaissSettings
from expbuf_faiss_gpu.backend import FaissGpuBackend, cpu_backend
from expbuf_faiss_gpu.settings import FaissGpuSettings


@hookimpl
def expbuf_register_index_backends(host: HostInfo) -> list[IndexProvider]:
    """Offer "faiss_gpu", and "faiss_cpu" where nobody else does."""
    capabilities = frozenset({"filter", "verifies"})
    offered = [
        IndexProvider(
            "faiss_gpu",
            api_version=1,
            factory=FaissGpuBackend,
            settings=FaissGpuSettings,
            capabilities=capabilities,
        )
    ]
    if importlib.util.find_spec("expbuf_faiss_cpu") is None:
        offered.append(
            IndexProvider(
                "faiss_cpu",
                api_version=1,
                factory=cpu_backend,
                settings=FaissSettings,
                capabilities=capabilities,
            )
        )
    return offered
