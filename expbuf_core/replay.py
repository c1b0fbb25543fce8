"""`ReplayBatches`: replay as an iterable, for training loops and PyTorch's `DataLoader`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from expbuf_core.errors import InvalidExperience

if TYPE_CHECKING:
    from expbuf_core.buffer import ExperienceBuffer
    from expbuf_core.conditions import Condition
    from expbuf_core.results import SampleBatch

COLUMNS = (
    "ids",
    "is_weights",
    "v_embed",
    "q_embed",
    "total_reward",
    "confidence",
    "priority",
)


def as_arrays(batch: SampleBatch) -> dict[str, Any]:
    """A sample as a mapping of arrays, one for each of `COLUMNS`."""
    return {name: getattr(batch, name) for name in COLUMNS}


class ReplayBatches:
    """Batches drawn from a buffer, one after the other, always from its newest state.

    Iterate over it, or hand it to a `DataLoader`; torch itself is not needed:

        batches = ReplayBatches(buffer, 256, length=1000, seed=0)
        loader = DataLoader(batches, batch_size=None, num_workers=4)

    Every process that draws has a random stream of its own: a worker, forked or spawned, opens the
    buffer again by itself and shares no draws with the others. Which of them draws which batch
    makes no odds, so a `DataLoader` may take the batches by number; the number is not looked at.

    Args:
        buffer: In a folder, if several processes are to draw.
        batch_size: Experiences a batch.
        length: Batches an epoch; a `DataLoader` needs it. None: without end.
        seed: Of the random streams; None: as the buffer's own. In the workers of a `DataLoader`
            the draws follow from this and from torch's seed, so they differ from epoch to epoch.
        beta: As in `ExperienceBuffer.sample`, as are the next two.
        where: A condition.
        uniform: Without regard to priorities.
        transform: What is made of a sample; default `as_arrays`. With spawned workers it must be
            picklable.
    """

    def __init__(
        self,
        buffer: ExperienceBuffer,
        batch_size: int,
        *,
        length: int | None = None,
        seed: int | None = None,
        beta: float | None = None,
        where: Condition | None = None,
        uniform: bool = False,
        transform: Callable[[SampleBatch], Any] = as_arrays,
    ) -> None:
        if length is not None and length < 1:
            raise InvalidExperience(f"length must be at least 1, not {length}")
        self._buffer = buffer
        self._arguments = {
            "batch_size": batch_size,
            "beta": beta,
            "where": where,
            "uniform": uniform,
        }
        self._length = length
        self._seed = seed
        self._transform = transform
        self._home = os.getpid()
        self._stream: tuple[Any, np.random.Generator] | None = None

    def __len__(self) -> int:
        if self._length is None:
            raise TypeError("without end: give a length for a DataLoader")
        return self._length

    def __getitem__(self, number: int) -> Any:
        """The next batch; `number` only says when an epoch is over."""
        if self._length is not None and not 0 <= number < self._length:
            raise IndexError(number)
        return self.draw()

    def __iter__(self) -> Iterator[Any]:
        drawn = 0
        while self._length is None or drawn < self._length:
            yield self.draw()
            drawn += 1

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_stream": None}

    def draw(self) -> Any:
        """One batch.

        Raises:
            NotEnoughExperiences: The buffer is empty, or nothing meets the condition.
        """
        arguments: dict[str, Any] = self._arguments
        return self._transform(self._buffer.sample(rng=self._rng(), **arguments))

    def _rng(self) -> np.random.Generator | None:
        """The stream of this process; None for the buffer's own, which forks by itself."""
        if self._seed is None:
            return None
        who = self._who()
        if self._stream is None or self._stream[0] != who:
            self._stream = who, np.random.default_rng([self._seed, *who])
        return self._stream[1]

    def _who(self) -> tuple[int, ...]:
        """Numbers that no two processes of an epoch share."""
        torch: Any = sys.modules.get("torch.utils.data")
        worker = torch.get_worker_info() if torch is not None else None
        if worker is not None:
            return int(worker.id), int(worker.seed)
        pid = os.getpid()
        return () if pid == self._home else (pid,)
