"""Contract suites for authors of plugins, and what tests of crashes and faults need."""

from expbuf_core.testing.index_suite import IndexSuite
from expbuf_core.testing.persistence_suite import PersistenceSuite

__all__ = ["IndexSuite", "PersistenceSuite"]
