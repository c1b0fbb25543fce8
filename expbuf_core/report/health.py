"""Health of a buffer's folder: what can be told without reading every byte."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from expbuf_core import segments, snapshots
from expbuf_core.errors import CorruptionError, ExpbufError
from expbuf_core.report.words import duration, size

_READ_AT_MOST = 256 << 20  # bytes of a snapshot that is read to see whether it is intact
_MANY_DEAD = 0.5
_LONG_TAIL = 50_000  # vectors that every search compares one by one


class Check(NamedTuple):
    """One finding. `level`: "ok", "note" or "problem"."""

    topic: str
    level: str
    message: str
    advice: str = ""


def examine(
    folder: Path,
    uuid: bytes,
    stats: Mapping[str, Any],
    recovery: str,
    problems: Sequence[str],
    payloads_read: int,
) -> list[Check]:
    """Look at logs, snapshots and index.

    Args:
        folder: Of the buffer.
        uuid: Of the buffer.
        stats: Of `ExperienceBuffer.stats`.
        recovery: What opening found, as text.
        problems: What reading has run into, as text.
        payloads_read: How many payloads were read and found intact.
    """
    return [
        Check("opening", "ok", recovery),
        _payloads(problems, payloads_read),
        _log(stats),
        *_snapshots(folder, uuid, int(stats["lsn"])),
        *_index(folder, stats),
    ]


def _payloads(problems: Sequence[str], payloads_read: int) -> Check:
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        return Check(
            "payloads",
            "problem",
            f"{problems[0]}{more}",
            "Run `expbuf verify`, which reads every byte; see the guide, “After damage”.",
        )
    return Check("payloads", "ok", f"Read for this report and found intact: {payloads_read:,}.")


def _log(stats: Mapping[str, Any]) -> Check:
    retired = int(stats["log_retirements"])
    durable, lsn = int(stats["durable_lsn"]), int(stats["lsn"])
    if retired:
        times = "once" if retired == 1 else f"{retired} times"
        return Check(
            "log",
            "note",
            f"A log file was given up {times} since the buffer was opened: a sync failed, or a "
            "process died while it wrote. Nothing that was acknowledged is lost.",
            "If no process was killed, look at the disk.",
        )
    if 0 < durable < lsn:
        return Check(
            "log",
            "note",
            f"{lsn - durable:,} of {lsn:,} operations are not synced yet, which is as configured "
            "under `durability: group` or `os`.",
        )
    return Check("log", "ok", f"Operation {lsn:,} is the last; none waits to be synced.")


def _snapshots(folder: Path, uuid: bytes, lsn: int) -> list[Check]:
    found = []
    for snapshot in snapshots.available(folder):
        path = snapshots.path_of(folder, snapshot)
        try:
            facts = os.stat(path)
            if facts.st_size <= _READ_AT_MOST:
                snapshots.read(folder, snapshot, uuid)
                state = "intact"
            else:
                state = "not read, being large"
        except CorruptionError as exc:
            found.append(
                Check("snapshot", "problem", str(exc), "The older snapshot and the log replace it.")
            )
            continue
        except (OSError, ExpbufError):
            continue  # dropped meanwhile
        age = duration(max(0.0, time.time() - facts.st_mtime))
        behind = max(0, lsn - snapshot)
        message = f"lsn {snapshot:,}: {state}, {size(facts.st_size)}, {age} old"
        if not found:
            message += f"; the next opening replays {behind:,} operations"
        found.append(Check("snapshot", "ok", message + "."))
    if not found:
        message = "There is none yet: opening replays the whole log."
        found.append(Check("snapshot", "note" if lsn > 10_000 else "ok", message))
    return found


def _index(folder: Path, stats: Mapping[str, Any]) -> list[Check]:
    index = stats["index"]
    tail = int(index["tail_rows"])
    checks = []
    try:
        home = segments.home(folder, int(stats["settings"].get("representation", 0)))
        manifest = segments.read_manifest(home)
    except CorruptionError as exc:
        return [Check("index", "note", str(exc), "Searches are exact until it is built again.")]
    listed = manifest.segments if manifest else ()
    opened = {segment["name"] for segment in index["segments"]}
    for info in listed:
        if info.name not in opened:
            message = f"Segment {info.name} ({info.backend}, {info.rows:,} rows) was not opened."
            advice = "The log of this program says why; it will be built again."
            checks.append(Check("index", "note", message, advice))
    for segment in index["segments"]:
        rows, dead = int(segment["rows"]), int(segment["dead"])
        share = dead / rows if rows else 0.0
        kind = segment.get("factory") or segment.get("kind") or ""
        named = (
            segment["backend"]
            if kind in ("", segment["backend"])
            else (f"{segment['backend']} ({kind})")
        )
        recall = segment.get("recall")
        parts = [f"Segment {segment['name']}: {named}"]
        parts.append(f"{rows:,} rows, {share:.0%} of them removed")
        if isinstance(recall, float):
            parts.append(f"recall {recall:.3f} when it was built")
        level = "note" if share > _MANY_DEAD else "ok"
        checks.append(Check("index", level, ", ".join(parts) + "."))
    if tail > _LONG_TAIL:
        message = f"{tail:,} experiences are in no segment and are compared one by one."
        advice = "Let a builder run (`index.builder`, `expbuf builder FOLDER`)."
        checks.append(Check("index", "note", message, advice))
    else:
        message = f"Newer than every segment, and searched exactly: {tail:,}."
        checks.append(Check("index", "ok", message))
    failures = int(index["builder_failures"])
    if failures:
        message = f"The builder has failed {failures} times since the buffer was opened."
        checks.append(Check("builder", "problem", message, "Run `expbuf doctor FOLDER`."))
    return checks
