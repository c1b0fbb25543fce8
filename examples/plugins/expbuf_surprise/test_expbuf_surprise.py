"""The scorer under the contract of scorers."""

import expbuf_surprise
from expbuf_core.testing import ScorerSuite


class TestSurprise(ScorerSuite):
    provider = expbuf_surprise.expbuf_register_priority_scorers(None)[0]


class TestScaled(TestSurprise):
    settings = {"reward_scale": 2.0}
