"""Words and numbers as a report writes them."""

from __future__ import annotations

import re
from datetime import datetime, timezone
from html import escape

_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")


def escaped(value: str) -> str:
    """Escaped for HTML, as an element's text or an attribute's value in quotes."""
    return escape(_UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", value))


def date(seconds: float, pattern: str = "%Y-%m-%d %H:%M UTC") -> str:
    """UTC seconds as a date; as a number where that is none."""
    try:
        return datetime.fromtimestamp(seconds, timezone.utc).strftime(pattern)
    except (ValueError, OverflowError, OSError):
        return f"{seconds:g} s"


def number(value: float) -> str:
    """To three digits."""
    text = f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return text.replace("-", "\N{MINUS SIGN}") if abs(value) > 1e-12 else "0"


def percent(value: float) -> str:
    """A share of 1 as a percentage."""
    return f"{100 * value:.0f}%"


def plural(count: int, singular: str, several: str | None = None) -> str:
    """A count with its noun."""
    return f"{count:,} {singular if count == 1 else several or singular + 's'}"


def size(count: float) -> str:
    """Bytes as text."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def duration(seconds: float) -> str:
    """A span of time as text, in its largest fitting unit."""
    for unit, length in (("d", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"
