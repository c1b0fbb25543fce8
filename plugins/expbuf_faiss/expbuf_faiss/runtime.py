"""The only place that imports FAISS."""

from __future__ import annotations

import sys
from typing import Any

from expbuf_core.errors import BackendUnavailable

_faiss: Any = None


def load() -> Any:
    """Import FAISS and keep it to one OpenMP thread; call this before every use of it.

    One query gains nothing from more threads, on busy cores it is several times slower with them,
    and a process that ever used two hangs in its forked children. OpenMP keeps the number per
    calling thread, hence before every use; it costs less than a microsecond.

    Raises:
        BackendUnavailable: FAISS is not installed, or does not load on this machine.
    """
    global _faiss
    if _faiss is None:
        try:
            import faiss
        except Exception as exc:  # a wheel without its libraries raises RuntimeError, too
            raise BackendUnavailable(
                f"FAISS cannot be imported: {exc}; install it with `pip install faiss-cpu`"
            ) from exc
        _faiss = faiss
    _faiss.omp_set_num_threads(1)
    return _faiss


def after_fork() -> None:
    """In a forked child: the first call into FAISS must be this one."""
    if "faiss" in sys.modules:
        load()
