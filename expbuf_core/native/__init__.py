"""The path of a plain add, compiled; everything works without it, and takes longer.

Between two syncs the processor's caches forget Python: a durable add costs several times what it
costs in a loop. So what every add does (check, score, fuse, encode, number, append, sync) is here a
second time, from the experience to the acknowledgement, in C, for the plain case alone: arrays of
floats or lists of them, JSON-like trees with bytes, tuples and what numpy has of numbers, no
probabilities, built-in scorer and fusion, storage in files, a lock that is free, a log with room.
In every other case, and wherever something is wrong, this says so before it has changed anything,
and Python does the whole.

    module.c    the extension module
    adder.h     `Adder`: an experience -> its id            as buffer.add, session
    encoder.h   `Encoder`: an experience -> `Accepted`      as intake, codec, builtin.fusions
    text.h      trees -> JSON                               as codec
    log.h       `Log`: `Accepted` -> the log, group commit  as commit, frames, expbuf_file.adapter
    scan.h      `run`: frames that are alike -> arrays      as alike, expbuf_file.logfile
    sleep.h     futexes; `Mutex`, held without the GIL      as locks, waiting
    crc.h       CRC-32                                      as crc

Python stays the definition: tests hold both against each other byte by byte (fused vectors up to
rounding), and run what is tested of crashes, faults and processes with both.

Built with the package where there is a C compiler (`hatch_build.py`). `EXPBUF_NATIVE=0` in the
environment leaves it out. What was built from other sources than those beside it, or for another
version of the Python code, is left out as well.
"""

from __future__ import annotations

import importlib
import os
import zlib
from pathlib import Path
from types import ModuleType

__all__ = ["native", "why_not"]

# What native code and Python rely on of each other has this number, in module.c, too. Whoever
# changes some of it raises both.
FITS = 3
_NAME = "expbuf_core.native._native"


def _load() -> tuple[ModuleType | None, str]:
    """The extension module, or why there is none."""
    if os.environ.get("EXPBUF_NATIVE", "1") == "0":
        return None, "EXPBUF_NATIVE=0"
    try:
        found = importlib.import_module(_NAME)
    except ModuleNotFoundError as exc:
        if exc.name != _NAME:
            raise
        return None, f"it was not compiled when {Path(__file__).parents[1]} was installed"
    except ImportError as exc:
        return None, str(exc)
    fault = misfit(found, Path(__file__).parent)
    return (None, fault) if fault else (found, "")


def misfit(found: ModuleType, folder: Path) -> str:
    """Why this extension module does not go with the Python code here; "" if it does.

    Args:
        found: As it was imported.
        folder: Where its sources are, if they are there: an editable installation that has gone on
            to other sources is as common as it is hard to see.
    """
    number = getattr(found, "FITS", "none")
    if number != FITS:
        return (
            f"{found.__file__} is of another version of expbuf-core: its number is {number}, "
            f"expected {FITS}"
        )
    sources = sorted(folder.glob("*.[ch]"))
    if found.SOURCES and sources:  # 0: compiled by hand
        crc = zlib.crc32(b"".join(path.read_bytes() for path in sources))
        if crc != found.SOURCES:
            return f"{found.__file__} was compiled from other sources than those in {folder}"
    return ""


native, why_not = _load()
