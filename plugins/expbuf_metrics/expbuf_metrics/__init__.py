"""Prometheus metrics of everything that expbuf tells its observers."""

from expbuf_metrics.exporter import Exporter
from expbuf_metrics.watching import watch

__all__ = ["Exporter", "plugin", "watch"]

plugin = Exporter()
