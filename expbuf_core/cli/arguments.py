"""Kinds of arguments."""

from __future__ import annotations

import argparse
from typing import TypeVar

_T = TypeVar("_T", int, float)


class WrongUsage(Exception):
    """Arguments that do not go together, or do not suffice: exit code 2."""


def _number(kind: type[_T], text: str) -> _T:
    try:
        return kind(text)
    except ValueError:
        what = "a whole number" if kind is int else "a number"
        raise argparse.ArgumentTypeError(f"expected {what}, found {text!r}") from None


def natural(text: str) -> int:
    """A whole number of at least 0."""
    value = _number(int, text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must be at least 0, not {text}")
    return value


def positive(text: str) -> int:
    """A whole number of at least 1."""
    value = _number(int, text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {text}")
    return value


def idle_seconds(text: str) -> float:
    """Seconds to wait for work."""
    value = _number(float, text)
    if not value >= 0:
        raise argparse.ArgumentTypeError(f"must be at least 0, not {text}")
    return value


def seconds(text: str) -> float:
    """Seconds between two looks."""
    value = _number(float, text)
    if not 0.01 <= value <= 86400:
        raise argparse.ArgumentTypeError(f"must be in [0.01, 86400], not {text}")
    return value
