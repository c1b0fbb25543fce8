"""`expbuf report`: what a buffer holds, and how it fares, on one page for a browser."""

from expbuf_core.report.page import write_report

__all__ = ["write_report"]
