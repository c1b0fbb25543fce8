"""The index builder as a process of its own: last in line for processors, one thread, one a buffer.

    python -m expbuf_core builder FOLDER

A process of its own (and a subprocess, not `multiprocessing`: scripts without a main guard must
work) so that rebuilding costs readers nothing. It ends when it has been idle for a while. Killed at
any moment it leaves the old index in place, and the next one goes on.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from expbuf_core import control as c
from expbuf_core import idle
from expbuf_core.config_schema import BufferConfig, load_config
from expbuf_core.errors import ConfigError, ExpbufError, LockTimeout
from expbuf_core.upkeep import builder_program

_log = logging.getLogger("expbuf")
_POLL_S = 0.05
_PATIENCE_S = 20.0
_SHARE = 1 / 8
_TAKEN = ("index", "snapshot", "lock_timeout_s")
_OF_THE_BUFFER = {"max_size", "receipts_kept", "embedding", "fusion"}


def builder_config(given: Mapping[str, Any] | None) -> BufferConfig:
    """The configuration of a builder. It never changes what the buffer is.

    Whoever opens a buffer with a smaller `max_size` evicts. That is for the programs that use it:
    here no such key may be given, and one in the environment does not count.

    Args:
        given: Sections `index` and `snapshot`, and `lock_timeout_s`.

    Raises:
        ConfigError: There is something else in it, or a value is wrong.
    """
    if not isinstance(given, Mapping | None):
        raise ConfigError(f"expected a mapping of sections, found a {type(given).__name__}")
    for key in given or {}:
        if key not in _TAKEN:
            raise ConfigError(
                f"{key}: not for a builder, which takes only {', '.join(_TAKEN)}; the rest is for "
                "the programs that use the buffer",
                key=str(key),
            )
    return load_config(
        load_config(given).model_dump(exclude_unset=True, exclude=_OF_THE_BUFFER), env={}
    )


class IndexBuilder:
    """Builds the index of one buffer whenever enough has changed.

    Args:
        path: Folder of the buffer.
        config: As for `builder_config`.
    """

    def __init__(self, path: str | os.PathLike[str], config: dict[str, Any] | None = None) -> None:
        from expbuf_core.buffer import ExperienceBuffer

        self.buffer = ExperienceBuffer.load_from_disk(path, config=builder_config(config))
        self._session = self.buffer._live()

    def run(self, *, idle_s: float) -> int:
        """Build until nothing has been due for `idle_s`, or nobody else has the buffer open.

        Returns:
            The number of builds.
        """
        session = self._session
        builds = 0
        idle_since = time.monotonic()
        seen = -1
        while time.monotonic() - idle_since < idle_s:
            words = session.control.words
            if words[c.APPENDED] != seen:
                seen = int(words[c.APPENDED])
                session.refresh()
                idle_since = time.monotonic()
            if self.due():
                if not session.upkeep.build_index():
                    return builds  # another builder is at it
                builds += 1
                continue
            if session.upkeep.snapshot_is_due():
                session.upkeep.snapshot(if_due=True)
            if session.upkeep.is_alone():
                return builds  # nobody is left to build for
            time.sleep(_POLL_S)
        return builds

    def due(self) -> bool:
        """Whether enough has changed since the published index."""
        replica, index = self._session.replica, self._session.config.index
        dead = sum(segment.dead for segment in replica.tiers.segments)
        rows = sum(segment.info.rows for segment in replica.tiers.segments)
        if self._session.upkeep.index_is_damaged():
            return True  # though this process may have opened it in time
        return replica.tiers.tail_rows >= index.rebuild_every or dead >= max(
            index.rebuild_every, index.growth * rows
        )

    def yield_to_others(self, starved: Callable[[], object]) -> None:
        """Build with what others leave of the processors; see `idle.run`."""
        self._session.upkeep.build_by = partial(
            idle.run, patience_s=_PATIENCE_S, share=_SHARE, starved=starved
        )

    def close(self) -> None:
        """Let go of the buffer."""
        self.buffer.close()


def main(
    path: str, config: str | None, idle_s: float | None, *, whole: bool, hurry: bool = False
) -> int:
    """Entry point of the process; its exit code.

    Args:
        path: Folder of the buffer.
        config: Sections of the configuration, as JSON.
        idle_s: As in `IndexBuilder.run`.
        whole: This process is a builder and nothing else: it may end at any moment, or begin anew.
        hurry: Compete for processors, if at the lowest priority.
    """
    os.nice(19)
    logging.basicConfig(level=logging.WARNING, format="expbuf: %(message)s")  # as the commands do
    try:
        builder = IndexBuilder(path, json.loads(config) if config else None)
    except (ExpbufError, LockTimeout) as exc:
        _log.error("the index builder cannot open %s: %s", path, exc)
        return 1
    if whole and not hurry:
        builder.yield_to_others(partial(_begin_anew, path, config, idle_s))
    try:
        idle_for = idle_s if idle_s is not None else float(builder.buffer.config.index.idle_s)
        builder.run(idle_s=idle_for)
    except idle.StillAtWork:
        # Whatever is at work would go on without the builder's lock. As after a kill, the old index
        # is in place.
        os._exit(130)
    except Exception:
        if not Path(path).exists():
            return 0  # the buffer was deleted
        _log.exception("the index builder of %s ended with an error", path)
        return 1
    finally:
        if not Path(path).exists():
            logging.disable()  # deleted under us: there is nothing to close, and nobody to tell
        builder.close()
    return 0


def _begin_anew(path: str, config: str | None, idle_s: float | None) -> None:
    """Become a builder that hurries: a thread cannot leave the idle class. Locks go with it."""
    _log.info("the index builder hardly gets a processor; it begins anew and competes for one")
    command = [*builder_program(), "--hurry"]
    if config is not None:
        command += ["--config", config]
    if idle_s is not None:
        command += ["--idle-s", str(idle_s)]
    try:
        os.execv(command[0], [*command, "--", path])
    except OSError as exc:
        _log.warning("the index builder cannot begin anew and goes on slowly: %s", exc)
