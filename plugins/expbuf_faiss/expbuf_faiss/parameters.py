"""FAISS's search parameters: a class of its own for each type of index."""

from __future__ import annotations

from typing import Any

QUERY_BITS = 4
"""Bits to which RaBitQ rounds a query's coordinates; without rounding it is 50 times slower."""


def parameters(faiss: Any, index: Any, effort: int | None, selector: Any = None) -> Any:
    """Make what `index.search(..., params=)` takes.

    Args:
        faiss: The module.
        index: An index of any type.
        effort: Lists to look at (IVF) or candidates to keep (HNSW); None: the index's own.
        selector: An `IDSelector`, or None. The result keeps it alive.

    Returns:
        An object that may be used by several threads at once.
    """
    index = faiss.downcast_index(index)
    arguments: dict[str, Any] = {} if selector is None else {"sel": selector}
    if isinstance(index, faiss.IndexPreTransform):
        inner = parameters(faiss, index.index, effort, selector)
        return faiss.SearchParametersPreTransform(index_params=inner)
    if isinstance(index, faiss.IndexIVF):
        arguments["nprobe"] = index.nprobe if effort is None else effort
        if isinstance(index, _types(faiss, "IndexIVFRaBitQ", "IndexIVFRaBitQFastScan")):
            return faiss.IVFRaBitQSearchParameters(qb=QUERY_BITS, **arguments)
        if isinstance(index, faiss.IndexIVFPQ):
            return faiss.IVFPQSearchParameters(**arguments)
        return faiss.SearchParametersIVF(**arguments)
    if isinstance(index, faiss.IndexHNSW):
        ef_search = index.hnsw.efSearch if effort is None else effort
        return faiss.SearchParametersHNSW(efSearch=ef_search, **arguments)
    if isinstance(index, _types(faiss, "IndexRaBitQ", "IndexRaBitQFastScan")):
        return faiss.RaBitQSearchParameters(qb=QUERY_BITS, **arguments)
    if isinstance(index, faiss.IndexPQ):
        return faiss.SearchParametersPQ(**arguments)
    return faiss.SearchParameters(**arguments)


def most_effort(faiss: Any, index: Any) -> int | None:
    """Where more effort brings nothing more: None where there is nothing to choose."""
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexPreTransform):
        return most_effort(faiss, index.index)
    if isinstance(index, faiss.IndexIVF):
        return int(index.nlist)
    if isinstance(index, faiss.IndexHNSW):
        return int(index.ntotal)
    return None


def is_ivf(faiss: Any, index: Any) -> bool:
    """Whether effort means lists."""
    return faiss.try_extract_index_ivf(index) is not None


def keeps_vectors(faiss: Any, index: Any) -> bool:
    """Whether its similarities are exact, so that re-ranking brings nothing."""
    return isinstance(
        faiss.downcast_index(index),
        (faiss.IndexFlat, faiss.IndexIVFFlat, faiss.IndexHNSWFlat),
    )


def _types(faiss: Any, *names: str) -> tuple[type, ...]:
    return tuple(getattr(faiss, name) for name in names if hasattr(faiss, name))
