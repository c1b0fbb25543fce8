"""The page: facts as one HTML file that needs nothing else.

Whatever a user may have stored is escaped, and a content security policy allows no script but the
page's own, by its checksum, and no address but `data:` pictures: were an escape forgotten, nothing
would run and nothing would be loaded.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
from numpy.typing import NDArray

from expbuf_core._version import __version__
from expbuf_core.config_schema import BufferConfig
from expbuf_core.errors import ConfigError
from expbuf_core.filesystem import FileSystem, storage_errors
from expbuf_core.report.cards import rankings
from expbuf_core.report.gather import Facts, gather
from expbuf_core.report.panels import distributions, over_time
from expbuf_core.report.words import date, escaped, number, percent, plural, size

DEFAULT_POINTS = 20_000


def write_report(
    folder: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    points: int = DEFAULT_POINTS,
    config: str | os.PathLike[str] | Mapping[str, Any] | BufferConfig | None = None,
    seed: int = 0,
) -> Path:
    """Write what a buffer holds, and how it fares, as one self-contained HTML page.

    Opens the buffer in mode `r`: it may be in use, nobody waits, and nothing of it is changed. The
    page replaces what stood at `output`, whole or not at all.

    Args:
        folder: Of the buffer.
        output: The page; its folder must exist.
        points: Most experiences on the map, at least 1; of more, so many are drawn at random.
        config: Where sampling is configured, which decides what replay draws most.
        seed: Of that random choice; the same buffer and seed give the same map.

    Returns:
        Where the page is.

    Raises:
        StorageError: There is no buffer, or the page cannot be written.
        CorruptionError: The buffer is too damaged to be opened.
        ConfigError: `points` is below 1, the page would lie in the buffer's folder, or the
            configuration is wrong.
    """
    if isinstance(points, bool) or not isinstance(points, int) or points < 1:
        raise ConfigError(f"points = {points!r}: must be an integer of at least 1")
    target = Path(os.path.abspath(os.fspath(output)))
    if target.is_relative_to(os.path.abspath(os.fspath(folder))):
        raise ConfigError(f"{target} lies in the buffer's folder; write the report elsewhere")
    page = render(gather(folder, points=points, config=config, seed=seed))
    with storage_errors("write the report", target):
        FileSystem().write_atomically(target, [page.encode("utf-8", "replace")])
    return target


def render(facts: Facts) -> str:
    """The page as text."""
    style, script = _resource("style.css"), _resource("script.js")
    checksum = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return Template(_resource("page.html")).substitute(
        policy=(
            "default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
            f"script-src 'sha256-{checksum}'; base-uri 'none'; form-action 'none'"
        ),
        style=style,
        script=script,
        state="filled" if len(facts.columns.id) else "empty",
        name=escaped(Path(facts.folder).name or facts.folder),
        folder=escaped(facts.folder),
        made_at=date(facts.made_at),
        lsn=f"{facts.lsn:,}",
        backend=escaped(facts.backend),
        version=escaped(__version__),
        verdict=_verdict(facts),
        figures=_figures(facts),
        map=_map(facts),
        distributions=distributions(facts),
        time=over_time(facts),
        experiences=rankings(facts),
        checks=_checks(facts),
        settings=_settings(facts),
        data=_data(facts),
    )


def _resource(name: str) -> str:
    return (resources.files("expbuf_core.report") / name).read_text(encoding="utf-8")


# ---------------------------------------------------------------- head


def _verdict(facts: Facts) -> str:
    levels = {check.level for check in facts.checks}
    if "problem" in levels:
        level, text = "problem", "Something is wrong"
    elif "note" in levels:
        level, text = "note", "Healthy, with a remark"
    else:
        level, text = "ok", "Healthy"
    return f'<a class="verdict {level}" href="#health">{text}</a>'


def _figures(facts: Facts) -> str:
    columns, stats = facts.columns, facts.stats
    n = len(columns.id)
    used, tried = float(columns.successes.sum()), float(columns.retrievals.sum())
    known = columns.reward[~np.isnan(columns.reward)]
    on_disk = _bytes_on_disk(Path(facts.folder))
    full = n / facts.stats["max_size"]
    figures = [
        ("Experiences", f"{n:,}", f"of at most {stats['max_size']:,}", full),
        (
            "Retrieved and right",
            percent(used / tried) if tried else "–",
            f"{plural(int(tried), 'use')} with an outcome" if tried else "no outcome recorded yet",
            None,
        ),
        (
            "Ever retrieved",
            percent(np.count_nonzero(columns.retrievals) / n) if n else "–",
            f"{np.count_nonzero(columns.retrievals):,} experiences",
            None,
        ),
        (
            "Mean reward",
            number(float(known.mean())) if len(known) else "–",
            f"known for {percent(len(known) / n)}" if n else "no experiences yet",
            None,
        ),
        ("Added so far", f"{stats['total_added']:,}", f"{stats['total_added'] - n:,} gone", None),
        ("On disk", size(on_disk), f"{size(on_disk / n)} each" if n else "an empty buffer", None),
    ]
    return "".join(
        f"<div><dt>{escaped(name)}</dt><dd>{escaped(value)}</dd>"
        f'<dd class="small">{escaped(more)}</dd>'
        + ("" if bar is None else f'<meter min="0" max="1" value="{bar:.4f}"></meter>')
        + "</div>"
        for name, value, more, bar in figures
    )


def _bytes_on_disk(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            if path.is_file():
                total += path.stat().st_size
        except OSError:
            continue  # deleted meanwhile
    return total


# ---------------------------------------------------------------- map


def _map(facts: Facts) -> str:
    points = facts.points
    if points is None:
        return _resource("empty.html")
    n, shown = len(facts.columns.id), len(points.rows)
    if shown < n:
        sampled = (
            f"<b>A sample:</b> {shown:,} of {n:,} experiences, drawn at random, and those listed "
            "below."
        )
    else:
        sampled = f"All {plural(n, 'experience')}." if n > 1 else "The one experience there is."
    pictures = "" if points.all_pictures else " Not every one has its picture here, for brevity."
    return Template(_resource("map.html")).substitute(
        sampled=sampled + pictures,
        fitted=f"t-SNE of {points.map.landmarks:,} of them, the others placed among these"
        if points.map.landmarks < shown
        else "t-SNE",
        explained=percent(points.map.explained),
    )


def _data(facts: Facts) -> str:
    """What the script draws, as JSON that cannot end its own element."""
    if facts.points is None:
        return "null"
    columns, points = facts.columns, facts.points
    strings: dict[str, int] = {}

    def codes(values: Iterable[str]) -> str:
        found = [strings.setdefault(value, len(strings)) for value in values]
        return _packed(np.array(found, np.uint32))

    rows, texts = points.rows, points.texts
    tree = {
        "n": len(rows),
        "id": _packed(columns.id[rows].astype(np.float64)),
        "maps": [_packed(_coordinates(xy)) for xy in points.map[:2]],
        "rate": _packed(columns.rate[rows].astype(np.float32)),
        "retrievals": _packed(columns.retrievals[rows].astype(np.float32)),
        "successes": _packed(columns.successes[rows].astype(np.float32)),
        "priority": _packed(columns.priority[rows]),
        "reward": _packed(columns.reward[rows].astype(np.float32)),
        "confidence": _packed(columns.confidence[rows]),
        "timestamp": _packed(columns.timestamp[rows]),
        "question": codes(text.question for text in texts),
        "answer": codes(text.answer for text in texts),
        "label": codes(text.label or text.problem for text in texts),
        "picture": codes(text.picture or "" for text in texts),
        "now": facts.made_at,
        "strings": list(strings),
    }
    text = json.dumps(tree, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _coordinates(xy: NDArray[np.float32]) -> NDArray[np.uint16]:
    return np.round(np.clip(xy, 0, 1) * 65535).astype(np.uint16)


def _packed(array: NDArray[Any]) -> str:
    little = array.astype(array.dtype.newbyteorder("<"), copy=False)
    return base64.b64encode(np.ascontiguousarray(little).tobytes()).decode("ascii")


# ---------------------------------------------------------------- health


def _checks(facts: Facts) -> str:
    names = {"ok": "Fine", "note": "Remark", "problem": "Problem"}
    rows = [
        f'<tr class="{check.level}"><td><span class="dot"></span>{names[check.level]}</td>'
        f"<th scope=row>{escaped(check.topic)}</th><td>{escaped(check.message)}"
        + (f'<div class="advice">{escaped(check.advice)}</div>' if check.advice else "")
        + "</td></tr>"
        for check in facts.checks
    ]
    return "".join(rows)


def _settings(facts: Facts) -> str:
    """Small facts, as terms and descriptions."""
    settings, storage = facts.stats["settings"], facts.stats["storage"]
    fusion = settings["fusion"]
    dims = [settings["v_dim"], settings["q_dim"]]
    embeddings = f"image {dims[0]}, question {dims[1]}"
    if None in dims:
        embeddings = "decided by the first add"
    rows = [
        ("Folder", facts.folder),
        ("Embeddings", embeddings),
        ("Fusion", f"{fusion['name']} {json.dumps(fusion['settings'])}"),
        ("Metric", str(settings["metric"])),
        ("Operations", f"{facts.lsn:,}"),
        *((f"Storage, {name}", _storage(value)) for name, value in storage.items()),
    ]
    return "".join(f"<dt>{escaped(name)}</dt><dd>{escaped(value)}</dd>" for name, value in rows)


def _storage(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(
            size(item)
            if key == "bytes"
            else f"{key} {_storage(item)}"
            if key != "files"
            else plural(int(item), "file")
            for key, item in value.items()
        )
    return f"{value:,}" if isinstance(value, int) else str(value)
