"""The backend that keeps everything in this process's memory, under the contract of storage."""

from __future__ import annotations

from expbuf_core.testing.persistence_suite import PersistenceSuite


class TestMemory(PersistenceSuite):
    provider = "memory"
