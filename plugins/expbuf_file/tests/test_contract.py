"""The file backend under the contract of storage: with tiny log files, and with the default."""

from __future__ import annotations

from expbuf_core.testing.persistence_suite import PersistenceSuite


class TestFile(PersistenceSuite):
    provider = "file"
    crash_states = 40  # each writes and reads a log file of 1 MiB


class TestSmallFiles(PersistenceSuite):
    provider = "file"
    settings = {"initial_bytes": 1 << 14, "segment_bytes": 1 << 15}  # noqa: RUF012
