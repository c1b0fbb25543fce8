"""Conditions on columns: which experiences a search or a sample may choose from.

    buffer.search_index(v_embed=v, q_embed=q, where=lambda c: (c.reward > 0) & c.has_tag("xray"))

A condition is a function from columns to a mask. It runs on whole arrays, so it costs one pass over
the columns it reads.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from expbuf_core.errors import InvalidExperience
from expbuf_core.sampling import Settings, success_rate
from expbuf_core.state import State


class LiveColumns:
    """Columns of all live experiences, oldest first; every array is (n,).

    Attributes:
        slots: int64, private places; `id` is what names an experience.
    """

    def __init__(self, state: State, settings: Settings) -> None:
        self._state = state
        self._settings = settings
        self.slots = state.live_slots()

    def __len__(self) -> int:
        return len(self.slots)

    def __getattr__(self, name: str) -> NoReturn:
        known = ", ".join(name for name in vars(LiveColumns) if not name.startswith("_"))
        raise AttributeError(
            f"there is no column {name!r}; known: {known}. What stands in a payload is not in a "
            "column: a tag is",
            name=name,
            obj=self,
        )

    @property
    def id(self) -> NDArray[np.int64]:
        """int64."""
        return self._state.id[self.slots]

    @property
    def reward(self) -> NDArray[np.float64]:
        """float64, the total reward; NaN while unknown, which no comparison matches."""
        return self._state.reward[self.slots]

    @property
    def confidence(self) -> NDArray[np.float32]:
        """float32."""
        return self._state.confidence[self.slots]

    @property
    def priority(self) -> NDArray[np.float32]:
        """float32."""
        return self._state.priority[self.slots]

    @property
    def retrieval_count(self) -> NDArray[np.uint32]:
        """uint32."""
        return self._state.retrieval_count[self.slots]

    @property
    def success_count(self) -> NDArray[np.float32]:
        """float32."""
        return self._state.success_count[self.slots]

    @property
    def success_rate(self) -> NDArray[np.float64]:
        """float64 in [0, 1], smoothed by the configured prior."""
        settings = self._settings
        return success_rate(
            self.retrieval_count,
            self.success_count,
            settings.success_prior,
            settings.success_prior_count,
        )

    @property
    def timestamp(self) -> NDArray[np.float64]:
        """float64, UTC seconds."""
        return self._state.timestamp[self.slots]

    @property
    def age_s(self) -> NDArray[np.float64]:
        """float64, seconds since the timestamp."""
        return time.time() - self.timestamp

    def has_tag(self, *tags: str) -> NDArray[np.bool_]:
        """Bool: which carry all of these tags."""
        for tag in tags:
            if not isinstance(tag, str):
                raise InvalidExperience(f"has_tag takes tags, each for itself: {tag!r} is none")
        wanted = set(tags)
        known = np.array([wanted <= set(tag_set) for tag_set in self._state.tag_sets], bool)
        return known[self._state.tags[self.slots]]


Condition = Callable[[LiveColumns], NDArray[np.bool_]]


def matching_slots(condition: Condition, state: State, settings: Settings) -> NDArray[np.int64]:
    """Slots of the live experiences that meet a condition, oldest first.

    Raises:
        InvalidExperience: The condition did not return one truth value for each experience.
    """
    if not callable(condition):
        raise InvalidExperience(
            "where: expected a function of columns that returns a mask, as in "
            f"`where=lambda c: c.reward > 0`; found a {type(condition).__name__}"
        )
    columns = LiveColumns(state, settings)
    with np.errstate(invalid="ignore"):
        mask = np.asarray(condition(columns))
    if mask.shape != (len(columns),) or mask.dtype != np.bool_:
        raise InvalidExperience(
            f"where: the condition returned {mask.dtype} of shape {mask.shape}; expected bool of "
            f"shape ({len(columns)},)"
        )
    return columns.slots[mask]
