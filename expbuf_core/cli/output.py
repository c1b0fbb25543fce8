"""What commands print: aligned text, JSON for programs, and progress for whoever watches.

With `rich` (the extra `cli`) tables and progress in a terminal are drawn by it. Text that goes into
a pipe or a file is the same with and without.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

Progress = Callable[[int, int], None]

RESUMABLE = "run the same command again to go on"


def terminal() -> Any:
    """The console of rich for stdout; None where it is no terminal, or rich is missing."""
    if not sys.stdout.isatty() or importlib.util.find_spec("rich") is None:
        return None
    from rich.console import Console

    return Console()


# ---------------------------------------------------------------- JSON


def as_json(value: Any) -> Any:
    """What JSON can hold: NaN and infinities are null, arrays are lists."""
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, np.integer):
        return int(value)
    if isinstance(value, np.ndarray):
        return as_json(value.tolist())
    if isinstance(value, Mapping):
        return {str(key): as_json(item) for key, item in value.items()}
    if hasattr(value, "_asdict"):
        return as_json(value._asdict())
    if isinstance(value, list | tuple):
        return [as_json(item) for item in value]
    if value is None or isinstance(value, str | int):
        return value
    return str(value)


def print_json(value: Any) -> None:
    """One line of JSON, in ASCII."""
    print(json.dumps(as_json(value), allow_nan=False), flush=True)


# ---------------------------------------------------------------- text


def plain(value: Any) -> str:
    """A value as people read it, on one line."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float | np.floating):
        return f"{float(value):.4g}"
    text = value if isinstance(value, str) else str(value)
    # Nothing that is stored may steer the terminal.
    return "".join(ch if ch.isprintable() else repr(ch)[1:-1] for ch in text)


def shortened(text: str, width: int) -> str:
    """At most so many characters."""
    return text if len(text) <= width else text[: width - 1] + "…"


def size(count: float) -> str:
    """Bytes as people read them."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def duration(seconds: float) -> str:
    """Seconds as people read them."""
    for unit, length in (("d", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


def pairs(facts: Sequence[tuple[str, Any]]) -> None:
    """Names and values, one a line."""
    width = max((len(name) for name, _ in facts), default=0)
    console = terminal()
    for name, value in facts:
        text = plain(value)
        if console is None:
            print(f"{name:{width}s}  {text}")
        else:
            from rich.text import Text

            console.print(Text.assemble((f"{name:{width}s}  ", "bold"), text), soft_wrap=True)


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Rows under a heading, numbers to the right; in a terminal that is too narrow, as blocks."""
    cells = [[plain(cell) for cell in row] for row in rows]
    right = [
        all(isinstance(row[i], int | float | np.number | None) for row in rows)
        for i in range(len(columns))
    ]
    widths = [max(len(line[i]) for line in [list(columns), *cells]) for i in range(len(columns))]
    console = terminal()
    if console is None:
        for line in [list(columns), *cells]:
            aligned = (
                cell.rjust(width) if to_right else cell.ljust(width)
                for cell, width, to_right in zip(line, widths, right, strict=True)
            )
            print("  ".join(aligned).rstrip())
        return
    if sum(widths) + 2 * len(widths) > console.width:
        for i, line in enumerate(cells):
            if i:
                print()
            pairs(list(zip(columns, line, strict=True)))
        return
    from rich.table import Table
    from rich.text import Text

    drawn = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 1))
    for name, to_right in zip(columns, right, strict=True):
        drawn.add_column(name, justify="right" if to_right else "left")
    for line in cells:
        drawn.add_row(*(Text(cell) for cell in line))
    console.print(drawn)


# ---------------------------------------------------------------- progress


@contextlib.contextmanager
def progress(what: str) -> Iterator[Progress | None]:
    """Shows how far a command is, how fast, and how long it takes; None where nobody watches.

    Args:
        what: Is going on.
    """
    if not sys.stderr.isatty():
        yield None
        return
    if importlib.util.find_spec("rich") is None:
        yield plain_progress(what)
        return
    from rich import progress as rich
    from rich.console import Console

    bar = rich.Progress(
        rich.TextColumn("{task.description}"),
        rich.BarColumn(),
        rich.TaskProgressColumn(),
        rich.TextColumn("{task.fields[rate]}"),
        rich.TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )
    task = bar.add_task(what, total=None, rate="")
    started = time.monotonic()

    def show(done: int, total: int) -> None:
        rate = f"{done / max(time.monotonic() - started, 1e-3):,.0f}/s"
        bar.update(task, completed=done, total=max(total, 1), rate=rate)

    with bar:
        yield show


def plain_progress(what: str) -> Progress:
    """The same on one line of any terminal."""
    started = time.monotonic()
    width = 0

    def show(done: int, total: int) -> None:
        nonlocal width
        passed = max(time.monotonic() - started, 1e-3)
        share = 100 * done // total if total else 100
        text = f"{what}: {share} %, {done / passed:,.0f}/s"
        if 0 < done < total:
            text += f", {duration(passed * (total - done) / done)} left"
        end = "\n" if done >= total else ""
        print(f"\r{text:{width}s}", end=end, file=sys.stderr, flush=True)
        width = len(text)

    return show
