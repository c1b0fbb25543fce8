"""Contract suites for authors of plugins, and what tests of crashes and faults need."""

from expbuf_core.testing.index_suite import IndexSuite

__all__ = ["IndexSuite"]
