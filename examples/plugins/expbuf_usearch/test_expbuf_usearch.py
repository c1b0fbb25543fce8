"""The index under the contract of index backends."""

import expbuf_usearch
import pytest
from expbuf_core.testing import IndexSuite

pytest.importorskip("usearch")


class TestUSearch(IndexSuite):
    provider = expbuf_usearch.expbuf_register_index_backends(None)[0]
