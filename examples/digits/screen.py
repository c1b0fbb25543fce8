"""What the demo prints: progress, tables and words; plain lines where there is no terminal."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence

_TERMINAL = sys.stdout.isatty()
_COLOURS = _TERMINAL and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"
_UTF = "utf" in (sys.stdout.encoding or "").lower()
_BLOCKS = " ▏▎▍▌▋▊▉█" if _UTF else " #"
_RULE = "─" if _UTF else "-"


def style(text: str, codes: str) -> str:
    """Text in a style, where the terminal shows any."""
    return f"\x1b[{codes}m{text}\x1b[0m" if _COLOURS else text


def bold(text: str) -> str:
    return style(text, "1")


def dim(text: str) -> str:
    return style(text, "2")


def red(text: str) -> str:
    return style(text, "1;31")


def say(text: str = "") -> None:
    """Print at once, also into a pipe."""
    print(text, flush=True)


class Bar:
    """A progress bar on a terminal, a line now and then elsewhere.

    Args:
        label: What is going on.
        total: Steps in all.
        done: Steps done before.
    """

    def __init__(self, label: str, total: int, done: int = 0) -> None:
        self._label, self._total = label, max(1, total)
        self._began = self._drawn = time.monotonic()
        self._quarter = 4 * done // self._total
        self._printed = done

    def update(self, done: int, note: Callable[[], str]) -> None:
        """Show how far it is, and a note, which is only asked for when it is shown."""
        now = time.monotonic()
        if _TERMINAL:
            if now - self._drawn >= 0.05 or done >= self._total:
                self._drawn = now
                self._draw(done, note())
        elif 4 * done // self._total > self._quarter:
            self._quarter = 4 * done // self._total
            self._printed = done
            say(self._line(done, note()))

    def finish(self, done: int, note: Callable[[], str]) -> None:
        """Show the last state and leave it there."""
        if _TERMINAL:
            self._draw(done, note())
            say()
        elif done != self._printed:
            say(self._line(done, note()))

    def _line(self, done: int, note: str) -> str:
        return f"  {self._label:<13} {done:>5}/{self._total}  {note}"

    def _draw(self, done: int, note: str) -> None:
        columns = shutil.get_terminal_size().columns
        width = min(36, columns - 41 - len(note))
        if width < 8:  # a line that wraps could not be drawn over
            print(f"\r\x1b[K{self._line(done, note)[: columns - 1]}", end="", flush=True)
            return
        steps = len(_BLOCKS) - 1
        filled = min(width * steps, width * steps * done // self._total)
        bar = _BLOCKS[-1] * (filled // steps)
        if filled % steps:
            bar += _BLOCKS[filled % steps]
        seconds = time.monotonic() - self._began
        print(
            f"\r\x1b[K  {self._label:<13} {style(bar.ljust(width), '34')}"
            f" {done:>5}/{self._total}  {note}  {dim(f'{seconds:4.1f} s')}",
            end="",
            flush=True,
        )


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table; the first column is words, the others are numbers. An empty row is a rule."""
    widths = [max(len(row[i]) for row in (header, *rows) if row) for i in range(len(header))]
    rule = dim("  " + _RULE * (sum(widths) + 3 * (len(widths) - 1)))

    def line(cells: Sequence[str]) -> str:
        first = cells[0].ljust(widths[0])
        rest = (cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True))
        return "  " + "   ".join((first, *rest))

    say(bold(line(header)))
    say(rule)
    for row in rows:
        say(line(row) if row else rule)
