"""Prometheus metrics of everything that expbuf tells its observers, once `start` was called."""

from expbuf_metrics.exporter import Exporter
from expbuf_metrics.watching import watch

__all__ = ["Exporter", "plugin", "start", "stop", "watch"]

plugin = Exporter(listening=False)
"""`Exporter`: the installed plugin. It costs nothing until `start`."""


def start() -> None:
    """Count from now on what this process does, in `prometheus_client.REGISTRY`."""
    plugin.listening = True


def stop() -> None:
    """Count no more; what was counted stays."""
    plugin.listening = False
