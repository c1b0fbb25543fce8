"""`expbuf bench`: how fast a buffer is on this disk, in some seconds.

For a first answer on the machine where it is to run. What is compared with what, and how, is in the
repository's `benchmarks/`.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from expbuf_core.buffer import ExperienceBuffer
from expbuf_core.errors import StorageError
from expbuf_core.experience import Experience
from expbuf_core.filesystem import storage_errors

Progress = Callable[[int, int], None]

_LEAST_CALLS, _MOST_CALLS = 20, 2000
_SECONDS = 1.0
_BATCH = 1000


class Measured(NamedTuple):
    """One kind of call.

    Attributes:
        what: It was.
        per_second: Experiences, or calls where it is about no experiences.
        median_ms: Of a call.
        p99_ms: Of a call: 99 of 100 were faster.
        note: What else is worth knowing.
    """

    what: str
    per_second: float
    median_ms: float
    p99_ms: float
    note: str = ""


def measure(
    folder: str | os.PathLike[str],
    *,
    experiences: int = 20_000,
    dim: int = 256,
    config: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> list[Measured]:
    """Make a buffer of random experiences on the disk of a folder, measure it, remove it.

    Args:
        folder: On that disk; must exist. The buffer is a folder of its own in it.
        experiences: In the buffer while searches and samples are measured.
        dim: Of both embeddings.
        config: A YAML file or a mapping: backends, durability, index.
        progress: Called now and then with (done, total).

    Raises:
        StorageError: Nothing can be written there.
        ConfigError: The configuration is wrong.
    """
    place = Path(folder)
    if not place.is_dir():
        raise StorageError(f"{place} is no folder; name one on the disk that is to be measured")
    with storage_errors("write", place):
        scratch = Path(tempfile.mkdtemp(prefix="expbuf-bench.", dir=place))
    try:
        return _measured(scratch / "buffer", experiences, dim, config, progress)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _measured(
    path: Path, experiences: int, dim: int, config: Any, progress: Progress | None
) -> list[Measured]:
    rng = np.random.default_rng(0)
    found: list[Measured] = []
    steps = 9
    overrides: dict[str, Any] = {"index__builder": "off", "max_size": 2 * experiences + 10_000}

    def vectors(n: int) -> dict[str, Any]:
        v, q = rng.standard_normal((2, n, dim), dtype=np.float32)
        return {"v_embed": v, "q_embed": q, "confidence": rng.random(n)}

    def done(step: int) -> None:
        if progress is not None:
            progress(step, steps)

    done(0)
    with ExperienceBuffer.open(path, config=config, mode="x", seed=0, **overrides) as buffer:
        durability = buffer.config.durability
        one = [
            Experience(
                v_embed=rng.standard_normal(dim),
                q_embed=rng.standard_normal(dim),
                answer="7",
                confidence=0.5,
            )
            for _ in range(64)
        ]
        found.append(_timed("add", lambda i: buffer.add(one[i % 64]), note=durability))
        done(1)
        batch = vectors(_BATCH)
        found.append(
            _timed(
                f"add_many of {_BATCH}",
                lambda i: buffer.add_many(batch),
                each=_BATCH,
                note=durability,
                most=min(20, max(3, experiences // _BATCH)),
            )
        )
        done(2)
        while (missing := experiences - len(buffer)) > 0:
            buffer.add_many(vectors(min(missing, 4 * _BATCH)))
        done(3)
        queries = vectors(256)
        n = len(buffer)

        def search(i: int) -> Any:
            return buffer.search_index(
                v_embed=queries["v_embed"][i % 256], q_embed=queries["q_embed"][i % 256], k=10
            )

        found.append(_timed("search, exact", search, note=f"{n} experiences, none indexed"))
        done(4)
        started = time.perf_counter()
        if buffer.rebuild_index():
            seconds = time.perf_counter() - started
            found.append(
                Measured(
                    "build of the index",
                    n / seconds,
                    1e3 * seconds,
                    1e3 * seconds,
                    f"{n} experiences",
                )
            )
            done(5)
            kinds = {segment["backend"] for segment in buffer.stats()["index"]["segments"]}
            found.append(_timed("search, indexed", search, note=", ".join(sorted(kinds))))
        done(6)
        found.append(_timed("sample of 32", lambda i: buffer.sample(32), each=32))
        found.append(_timed("sample of 32, read", lambda i: buffer.sample(32).v_embed, each=32))
        done(7)
        ids = buffer.ids()
        chosen = rng.choice(ids, 4096)
        found.append(_timed("get", lambda i: buffer.get(int(chosen[i % 4096]))))
        done(8)
    started = time.perf_counter()
    ExperienceBuffer.load_from_disk(path, config=config, index__builder="off").close()
    seconds = time.perf_counter() - started
    found.append(Measured("open and close", 1 / seconds, 1e3 * seconds, 1e3 * seconds))
    done(9)
    return found


def _timed(
    what: str,
    call: Callable[[int], Any],
    *,
    each: int = 1,
    note: str = "",
    most: int = _MOST_CALLS,
) -> Measured:
    """Call for about a second."""
    call(0)  # the first one pays for what is made once
    times: list[float] = []
    end = time.perf_counter() + _SECONDS
    while len(times) < most and (len(times) < _LEAST_CALLS or time.perf_counter() < end):
        started = time.perf_counter()
        call(len(times))
        times.append(time.perf_counter() - started)
    ordered = np.sort(times)
    return Measured(
        what,
        each * len(times) / float(ordered.sum()),
        1e3 * float(np.median(ordered)),
        1e3 * float(np.quantile(ordered, 0.99)),
        note,
    )
