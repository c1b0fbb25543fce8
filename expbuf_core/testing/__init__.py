"""Contract suites for authors of plugins, and what tests of crashes and faults need."""

from expbuf_core.testing.fusion_suite import FusionSuite
from expbuf_core.testing.index_suite import IndexSuite
from expbuf_core.testing.persistence_suite import PersistenceSuite
from expbuf_core.testing.scorer_suite import ScorerSuite

__all__ = ["FusionSuite", "IndexSuite", "PersistenceSuite", "ScorerSuite"]
