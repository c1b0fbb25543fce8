"""The hooks that a plugin may implement, as pluggy specifications.

The `register` hooks *offer* named providers once, at start-up; nothing on a hot path goes through
a hook. The `on` hooks are events: they return None, run outside all locks, and an exception in
one is logged and never fails the operation that caused it. An observer that has an attribute
`listening` is told nothing while that is false, and costs nothing then.
"""

from __future__ import annotations

from collections.abc import Sequence

import pluggy

from expbuf_core.contracts import (
    FusionProvider,
    HostInfo,
    IndexProvider,
    PersistenceProvider,
    ScorerProvider,
)

PROJECT = "expbuf"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def expbuf_register_persistence(host: HostInfo) -> Sequence[PersistenceProvider]:
    """Offer storage backends, each under a name of its own.

    Called once per plugin registry, before any buffer opens. No file, network or GPU access and
    no heavy import: leave those to `PersistenceProvider.factory`. Contract suite:
    `expbuf_core.testing.PersistenceSuite`.

    Args:
        host: Versions of the core and of this contract.

    Returns:
        One provider per backend; empty when this machine cannot run any.
    """
    raise NotImplementedError  # never runs; keeps a strict type checker quiet


@hookspec
def expbuf_register_index_backends(host: HostInfo) -> Sequence[IndexProvider]:
    """Offer index backends, each under a name of its own.

    Called once per plugin registry, before any buffer opens; the same restrictions as for
    storage. Contract suite: `expbuf_core.testing.IndexSuite`.

    Args:
        host: Versions of the core and of this contract.

    Returns:
        One provider per backend; empty when this machine cannot run any.
    """
    raise NotImplementedError


@hookspec
def expbuf_register_priority_scorers(host: HostInfo) -> Sequence[ScorerProvider]:
    """Offer scorers of initial priority, each under a name of its own.

    Contract suite: `expbuf_core.testing.ScorerSuite`.

    Args:
        host: Versions of the core and of this contract.

    Returns:
        One provider per scorer.
    """
    raise NotImplementedError


@hookspec
def expbuf_register_embedding_fusions(host: HostInfo) -> Sequence[FusionProvider]:
    """Offer fusions of the visual and the question embedding, each under a name of its own.

    Contract suite: `expbuf_core.testing.FusionSuite`.

    Args:
        host: Versions of the core and of this contract.

    Returns:
        One provider per fusion.
    """
    raise NotImplementedError


@hookspec
def expbuf_on_committed(path: str, lsn: int, kind: str, count: int, seconds: float) -> None:
    """Told after this process has acknowledged a write.

    Args:
        path: Folder of the buffer, or "" for one in memory.
        lsn: Log position of the commit.
        kind: "add", "remove", "priority", "reward", "outcome", "clear", "settings" or "relog".
        count: Experiences that the commit concerns.
        seconds: From the call to the acknowledgement.
    """


@hookspec
def expbuf_on_searched(
    path: str, lsn: int, k: int, queries: int, seconds: float, degraded: bool
) -> None:
    """Told after this process has answered a search.

    Args:
        path: Folder of the buffer, or "" for one in memory.
        lsn: Log position that the answer includes.
        k: Results that were asked for.
        queries: 1, or how many `search_many` was given.
        seconds: From the call to the answer.
        degraded: The configured index took no part: a fallback built the segments, or they could
            not be opened. The answer is complete all the same.
    """


@hookspec
def expbuf_on_evicted(path: str, lsn: int, count: int) -> None:
    """Told when adds have evicted the oldest experiences, once this process has followed them.

    That is at its next read, or some dozens of adds later.

    Args:
        path: Folder of the buffer, or "" for one in memory.
        lsn: Log position up to which this process has followed.
        count: Experiences evicted since the last such event in this process.
    """


@hookspec
def expbuf_on_recovered(path: str, lsn: int, count: int, seconds: float) -> None:
    """Told when a buffer was opened.

    Args:
        path: Folder of the buffer.
        lsn: Last log position that was found.
        count: Experiences in the buffer.
        seconds: What opening took.
    """


@hookspec
def expbuf_on_index_swapped(path: str, lsn: int, segments: int) -> None:
    """Told when this process has begun to search a new set of segments.

    Args:
        path: Folder of the buffer, or "" for one in memory.
        lsn: Log position up to which the segments were built.
        segments: How many segments there are now.
    """


@hookspec
def expbuf_on_builder_failed(path: str, error: str) -> None:
    """Told when the index builder has failed; searches stay exact.

    Args:
        path: Folder of the buffer, or "" for one in memory.
        error: What went wrong.
    """


@hookspec
def expbuf_on_fallback(kind: str, wanted: str, used: str, reason: str) -> None:
    """Told when a backend could not be used and its fallback took over.

    Args:
        kind: What the backend is for: "index".
        wanted: Name of the backend that the configuration selects.
        used: Name of the backend in its place.
        reason: Why.
    """


@hookspec
def expbuf_on_corruption(path: str, offset: int, error: str) -> None:
    """Told when damaged bytes were found, before the error is raised.

    Args:
        path: The damaged file.
        offset: First wrong byte, or -1 where the whole file is meant.
        error: What is wrong.
    """
