"""What expbuf is measured beside: one small module a peer, all driven alike.

A peer runs in a process of its own (`worker.py`), in the interpreter that has it: its libraries,
threads and memory are its own. The harness (`client.py`) gives every worker the same data and the
same commands, in turns. `base.Peer` is what a peer's module implements.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Entry:
    """Where a peer's class is, without importing it.

    Attributes:
        module: Of `benchmarks.peers`.
        cls: The class there.
        ours: It runs in expbuf's environment, not in that of the peers.
    """

    module: str
    cls: str
    ours: bool = False


PEERS: dict[str, Entry] = {
    "expbuf": Entry("expbuf", "Expbuf", ours=True),
    "expbuf + builder": Entry("expbuf", "ExpbufBuilder", ours=True),
    "expbuf, LMDB": Entry("expbuf", "ExpbufLmdb", ours=True),
    "expbuf, os": Entry("expbuf", "ExpbufOs", ours=True),
    "expbuf, uncached": Entry("expbuf", "ExpbufUncached", ours=True),
    "raw log": Entry("raw", "RawLog"),
    "raw memory": Entry("raw", "RawMemory"),
    "SQLite": Entry("sqlite", "Sqlite"),
    "LMDB": Entry("lmdb_store", "Lmdb"),
    "sqlite-vec": Entry("sqlite", "SqliteVec"),
    "Chroma": Entry("chroma", "Chroma"),
    "LanceDB": Entry("lance", "Lance"),
    "Qdrant local": Entry("qdrant", "QdrantLocal"),
    "usearch": Entry("usearch_index", "Usearch"),
    "FAISS IVF": Entry("faiss_index", "FaissIvf"),
    "FAISS HNSW": Entry("faiss_index", "FaissHnsw"),
    "cpprb": Entry("cpprb_buffer", "Cpprb"),
    "TorchRL": Entry("torchrl_buffer", "TorchRL"),
    "tianshou": Entry("tianshou_buffer", "Tianshou"),
}
