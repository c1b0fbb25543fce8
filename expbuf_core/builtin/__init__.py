"""The backends that need nothing but numpy, offered through the same hooks as any plugin's."""

from __future__ import annotations

from pydantic import BaseModel

from expbuf_core.builtin.exact import ExactIndexBackend, ExactSettings
from expbuf_core.builtin.fusions import FusionSettings, WeightedConcat, WeightedSum
from expbuf_core.builtin.scorers import (
    AbsoluteReward,
    AbsoluteRewardSettings,
    TDError,
    TDErrorSettings,
    WeightedSumScorer,
    WeightedSumSettings,
)
from expbuf_core.contracts import (
    FusionProvider,
    HostInfo,
    IndexProvider,
    PersistenceAdapter,
    PersistenceContext,
    PersistenceProvider,
    ScorerProvider,
)
from expbuf_core.hookspecs import hookimpl


def _memory(settings: BaseModel, context: PersistenceContext) -> PersistenceAdapter:
    from expbuf_core.builtin.memory import MemoryPersistence

    return MemoryPersistence(settings, context)


@hookimpl
def expbuf_register_persistence(host: HostInfo) -> list[PersistenceProvider]:
    """Offer "memory": nothing on disk, gone with the process."""
    return [PersistenceProvider("memory", api_version=1, factory=_memory)]


@hookimpl
def expbuf_register_index_backends(host: HostInfo) -> list[IndexProvider]:
    """Offer "exact": every vector is compared."""
    return [
        IndexProvider(
            "exact",
            api_version=1,
            factory=ExactIndexBackend,
            settings=ExactSettings,
            capabilities=frozenset({"filter"}),
        )
    ]


@hookimpl
def expbuf_register_priority_scorers(host: HostInfo) -> list[ScorerProvider]:
    """Offer "weighted_sum" of uncertainty, reward and age, "absolute_reward" and "td_error"."""
    return [
        ScorerProvider(
            "weighted_sum", api_version=1, factory=WeightedSumScorer, settings=WeightedSumSettings
        ),
        ScorerProvider(
            "absolute_reward",
            api_version=1,
            factory=AbsoluteReward,
            settings=AbsoluteRewardSettings,
        ),
        ScorerProvider("td_error", api_version=1, factory=TDError, settings=TDErrorSettings),
    ]


@hookimpl
def expbuf_register_embedding_fusions(host: HostInfo) -> list[FusionProvider]:
    """Offer "weighted_sum" and "weighted_concat"."""
    return [
        FusionProvider("weighted_sum", api_version=1, factory=WeightedSum, settings=FusionSettings),
        FusionProvider(
            "weighted_concat", api_version=1, factory=WeightedConcat, settings=FusionSettings
        ),
    ]
