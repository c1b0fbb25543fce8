"""What the FAISS plugins of expbuf share: settings, building, segment files, searching.

Importing this package does not import FAISS. A plugin for another device subclasses
`FaissBackend` (which index to build, where to place it) and `FaissSegment` (how to ask it).
"""

from expbuf_faiss.backend import FaissBackend
from expbuf_faiss.plans import Plan
from expbuf_faiss.segment import FaissSegment, RowFilter
from expbuf_faiss.settings import FaissSettings

__all__ = ["FaissBackend", "FaissSegment", "FaissSettings", "Plan", "RowFilter"]
