"""`expbuf plugin new`: the beginning of a plugin, with tests that pass."""

from __future__ import annotations

import keyword
import os
import re
from pathlib import Path
from string import Template
from typing import Any

from expbuf_core._version import __version__
from expbuf_core.errors import ConfigError
from expbuf_core.plugins import default_registry

KINDS = ("persistence", "index", "scorer", "fusion")

_NAME = re.compile(r"[a-z][a-z0-9_]*")


def new_plugin(name: str, kind: str, parent: str | os.PathLike[str] = ".") -> list[Path]:
    """Write a plugin of one module, its test, its pyproject.toml and its README.

    Args:
        name: By which the configuration will select it: lower-case letters, digits, underscores.
        kind: One of `KINDS`.
        parent: Where the folder `expbuf_NAME` is made.

    Returns:
        The files.

    Raises:
        ConfigError: The name or the kind is not allowed, or the folder exists.
    """
    if not _NAME.fullmatch(name) or keyword.iskeyword(name):
        raise ConfigError(
            f"name {name!r}; expected lower-case letters, digits and underscores, a letter first, "
            "and no keyword of Python's"
        )
    if kind not in KINDS:
        raise ConfigError(f"kind {kind!r}; expected one of {', '.join(KINDS)}")
    section: Any = {"scorer": "priority"}.get(kind, kind)
    if name in default_registry().names(section):
        raise ConfigError(
            f"name {name!r}: a {kind} of this name is installed; the two could not be told apart"
        )
    folder = Path(parent) / f"expbuf_{name}"
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        raise ConfigError(f"{folder} exists already; nothing was written") from None
    minor = int(__version__.split(".")[1])
    words = {
        "name": name,
        "module": folder.name,
        "distribution": folder.name.replace("_", "-"),
        "cls": "".join(part.capitalize() for part in name.split("_")),
        "kind": kind,
        "section": section,
        "suite": f"{kind.capitalize()}Suite",
        "bounds": f">=0.{minor},<0.{minor + 1}",
    }
    files = {
        f"{folder.name}.py": _MODULES[kind],
        f"test_{folder.name}.py": _TESTS[kind],
        "pyproject.toml": _PYPROJECT,
        "README.md": _README,
    }
    written = []
    for file, template in files.items():
        path = folder / file
        path.write_text(Template(template).substitute(words).lstrip(), encoding="utf-8")
        written.append(path)
    return written


_PYPROJECT = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "$distribution"
version = "0.1.0"
description = "A plugin for expbuf: $kind $name"
requires-python = ">=3.10"
dependencies = ["expbuf-core$bounds"]

[project.optional-dependencies]
test = ["expbuf-core[testing]$bounds"]

[project.entry-points.expbuf]
$name = "$module"

[tool.hatch.build.targets.wheel]
include = ["$module.py"]
"""

_README = """
# $distribution

    pip install .

```yaml
experience_buffer:
  $section: $name
```

`pip install -e '.[test]' && pytest` runs the contract of its kind.
"""

_SCORER = '''
"""Initial priority: say here what makes an experience worth replaying."""

import numpy as np
from expbuf_core import HostInfo, ScorerProvider, ScoringBatch, hookimpl
from pydantic import BaseModel, PositiveFloat


class Settings(BaseModel, extra="forbid"):
    scale: PositiveFloat = 1.0


class ${cls}Scorer:
    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def __call__(self, batch: ScoringBatch) -> np.ndarray:  # (n,), finite, none below 0
        return self.settings.scale * np.abs(batch.total_reward) + (1 - batch.confidence)


@hookimpl
def expbuf_register_priority_scorers(host: HostInfo) -> list[ScorerProvider]:
    return [ScorerProvider("$name", api_version=1, factory=${cls}Scorer, settings=Settings)]
'''

_FUSION = '''
"""A fusion: say here how two embeddings become one."""

import numpy as np
from expbuf_core import FusionProvider, HostInfo, hookimpl
from pydantic import BaseModel, PositiveFloat


class Settings(BaseModel, extra="forbid"):
    question_factor: PositiveFloat = 1.0


class ${cls}Fusion:
    version = 1  # raise it when the results change

    def __init__(self, settings: Settings) -> None:
        self.factor = np.float32(settings.question_factor)

    def output_dim(self, v_dim: int, q_dim: int) -> int:
        if v_dim + q_dim == 0:
            raise ValueError("there is nothing to fuse: both dimensions are 0")
        return v_dim + q_dim

    def __call__(self, v: np.ndarray, q: np.ndarray) -> np.ndarray:  # (n, output_dim) float32
        return np.concatenate([v, q * self.factor], axis=1)


@hookimpl
def expbuf_register_embedding_fusions(host: HostInfo) -> list[FusionProvider]:
    return [FusionProvider("$name", api_version=1, factory=${cls}Fusion, settings=Settings)]
'''

_INDEX = '''
"""An index: it compares every vector, until you make it faster."""

from pathlib import Path
from typing import Any

import numpy as np
from expbuf_core import HostInfo, IndexBackend, IndexContext, IndexProvider, IndexSegment, hookimpl
from expbuf_core.exact_search import exact_search, unpack_allowed
from pydantic import BaseModel, PositiveInt


class Settings(BaseModel, extra="forbid"):
    effort: PositiveInt = 1  # not used yet


class ${cls}Segment(IndexSegment):
    def __init__(self, stored: Any, ids: Any, metric: str) -> None:
        self._stored, self._ids, self._metric = stored, ids, metric

    def search(self, queries: Any, k: int, allowed: Any) -> Any:
        mask = None if allowed is None else unpack_allowed(allowed, len(self._ids))
        rows, similarities = exact_search(self._stored, None, queries, k, self._metric, mask)
        return np.where(rows >= 0, self._ids[rows], -1), similarities


class ${cls}Backend(IndexBackend):
    def __init__(self, settings: Settings, context: IndexContext) -> None:
        self._settings, self._context = settings, context  # import what is heavy here, no earlier

    def build(self, ids: Any, vectors: Any, path: Path) -> None:
        with path.open("wb") as file:  # np.save would append .npy to a bare name
            np.save(file, vectors)

    def open(self, path: Path, ids: Any, vectors: Any) -> ${cls}Segment:
        stored = np.load(path, mmap_mode="r")  # never unpickles; raises where the file was cut
        if stored.shape != vectors.shape or stored.dtype != vectors.dtype:
            raise ValueError(f"{path} is no index of these vectors")
        return ${cls}Segment(stored, ids, self._context.metric)


@hookimpl
def expbuf_register_index_backends(host: HostInfo) -> list[IndexProvider]:
    return [
        IndexProvider(
            "$name",
            api_version=1,
            factory=${cls}Backend,
            settings=Settings,
            capabilities=frozenset({"filter"}),
        )
    ]
'''

_PERSISTENCE = '''
"""Storage: it keeps everything in memory, until you give it a disk.

Then declare the capability "durable", and "multiprocess" once several processes may use one buffer:
the suite skips less. `context.path` is the folder; write through `context.fs` alone, so that the
suite can make it fail and cut it off. The page docs/plugins.md of expbuf numbers what is promised,
as the suite does, and has a complete backend on files.
"""

import threading
from collections.abc import Iterator, Sequence
from typing import Any

from expbuf_core import (
    HostInfo,
    PersistenceAdapter,
    PersistenceContext,
    PersistenceProvider,
    hookimpl,
)
from expbuf_core.contracts import (
    Appended,
    LogFollower,
    LoggedOperation,
    LogGone,
    Pin,
    Problem,
    Stamped,
)
from expbuf_core.frames import check_row
from pydantic import BaseModel


class Settings(BaseModel, extra="forbid"):
    pass


class ${cls}Persistence(PersistenceAdapter):
    def __init__(self, settings: Settings, context: PersistenceContext) -> None:
        self._settings, self._context = settings, context
        self._mutex = threading.Lock()
        self._log: list[LoggedOperation] = []
        self._rows: dict[int, bytes] = {}  # by location
        self._end = 0  # the next location
        self._dropped = 0

    def create(self, lsn: int) -> None:
        self._log.clear()

    def recover(self, after_lsn: int, durable_lsn: int) -> Iterator[LoggedOperation]:
        return iter([operation for operation in self._log if operation.lsn > after_lsn])

    def torn(self) -> tuple[int, int]:
        return 0, 0

    def start(self, lsn: int, recovered_lsn: int) -> None:
        pass

    def attach(self) -> None:
        pass

    def append(self, stamped: Sequence[Stamped], durable_lsn: int) -> list[Appended]:
        places = []
        with self._mutex:
            for lsn, first_id, operation in stamped:
                first, rows, at = self._end, memoryview(operation.rows), 0
                for length in operation.lengths.tolist():
                    self._rows[first + at] = bytes(rows[at : at + length])
                    at += length
                self._end += at
                body, lengths = bytes(operation.body), operation.lengths
                logged = LoggedOperation(lsn, operation.kind, first_id, body, first, lengths)
                self._log.append(logged)
                places.append(Appended(first, lsn))
        return places

    def sync(self) -> None:
        pass

    def retire(self, durable_lsn: int, keep_lsn: int, next_lsn: int) -> None:
        with self._mutex:
            self._log = [operation for operation in self._log if operation.lsn <= keep_lsn]

    def follow(self, after_lsn: int) -> LogFollower:
        return ${cls}Follower(self, after_lsn)

    def read(self, after_lsn: int, until_lsn: int) -> list[LoggedOperation]:
        with self._mutex:
            if after_lsn < min(self._dropped, until_lsn):
                raise LogGone
            return [operation for operation in self._log if after_lsn < operation.lsn <= until_lsn]

    def pin(self, ids: Any, locations: Any, lengths: Any) -> Pin:
        try:
            return ${cls}Pin([self._rows[location] for location in locations.tolist()])
        except KeyError:
            raise LogGone from None

    def switch(self, next_lsn: int, durable_lsn: int) -> None:
        pass

    def drop_below(self, lsn: int, live_ids: Any, live_locations: Any) -> None:
        live = set(live_locations.tolist())
        with self._mutex:
            self._dropped = max(self._dropped, lsn)
            self._log = [operation for operation in self._log if operation.lsn > lsn]
            behind = self._log[0].location if self._log else self._end
            dead = [at for at in self._rows if at < behind and at not in live]
            for at in dead:
                del self._rows[at]

    def verify(self, until_lsn: int) -> Iterator[Problem]:
        for at, row in list(self._rows.items()):
            if check_row(row) is None:
                yield Problem("$name", at, f"the payload at {at} is damaged", True)

    def stats(self) -> dict[str, Any]:
        return {"operations": len(self._log), "bytes": sum(map(len, self._rows.values()))}

    def finish(self, last_lsn: int) -> None:
        pass

    def close(self) -> None:
        pass

    def after_fork(self) -> None:
        self._mutex = threading.Lock()


class ${cls}Follower(LogFollower):
    def __init__(self, adapter: ${cls}Persistence, after_lsn: int) -> None:
        self._adapter, self._lsn = adapter, after_lsn

    def read(self, until_lsn: int) -> Iterator[LoggedOperation]:
        for operation in self._adapter.read(self._lsn, until_lsn):
            self._lsn = operation.lsn
            yield operation

    def skip(self, lsn: int, cursor: Any) -> None:
        self._lsn = lsn


class ${cls}Pin(Pin):
    def __init__(self, rows: list[bytes]) -> None:
        self._rows = rows

    def read(self, i: int) -> bytes:
        return self._rows[i]


@hookimpl
def expbuf_register_persistence(host: HostInfo) -> list[PersistenceProvider]:
    return [
        PersistenceProvider(
            "$name", api_version=1, factory=${cls}Persistence, settings=Settings
        )
    ]
'''

_MODULES = {"persistence": _PERSISTENCE, "index": _INDEX, "scorer": _SCORER, "fusion": _FUSION}

_TEST = '''
"""The contract of its kind. Once it is installed, `provider = "$name"` will do."""

import $module
from expbuf_core.testing import $suite


class Test$cls($suite):
    provider = $module.HOOK(None)[0]
'''

_TESTS = {
    kind: _TEST.replace("HOOK", hook)
    for kind, hook in {
        "persistence": "expbuf_register_persistence",
        "index": "expbuf_register_index_backends",
        "scorer": "expbuf_register_priority_scorers",
        "fusion": "expbuf_register_embedding_fusions",
    }.items()
}
