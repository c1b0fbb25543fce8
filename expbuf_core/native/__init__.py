"""The path of a plain add, compiled; everything works without it, and takes longer.

Between two syncs the processor's caches forget Python: a durable add costs several times what it
costs in a loop. So what every add does (check, score, fuse, encode, number, append, sync) is here a
second time, in C, for the plain case alone: numpy arrays of float32, JSON-like trees, built-in
scorer and fusion, storage in files, a lock that is free, a log with room. In every other case, and
wherever something is wrong, this says so before it has changed anything, and Python does the whole.

    module.c    the extension module
    encoder.h   `Encoder`: an experience -> `Accepted`      as intake, codec, builtin.fusions
    text.h      trees -> JSON                               as codec
    log.h       `Log`: `Accepted` -> the log, group commit  as commit, frames, expbuf_file.adapter
    scan.h      `run`: frames that are alike -> arrays      as expbuf_file.logfile
    sleep.h     futexes; `Mutex`, held without the GIL      as locks, waiting
    crc.h       CRC-32                                      as crc

Python stays the definition: tests hold both against each other byte by byte (fused vectors up to
rounding), and run what is tested of crashes, faults and processes with both.

Built with the package where there is a C compiler (`hatch_build.py`). `EXPBUF_NATIVE=0` in the
environment leaves it out.
"""

from __future__ import annotations

import os
from types import ModuleType

__all__ = ["native", "why_not"]


def _load() -> tuple[ModuleType | None, str]:
    """The extension module, or why there is none."""
    if os.environ.get("EXPBUF_NATIVE", "1") == "0":
        return None, "EXPBUF_NATIVE=0"
    try:
        from expbuf_core.native import _native
    except ImportError as exc:
        return None, str(exc)
    return _native, ""


native, why_not = _load()
