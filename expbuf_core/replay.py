"""`ReplayBatches`: replay as an iterable, for training loops and PyTorch's `DataLoader`."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from expbuf_core.errors import ConfigError, InvalidExperience, SampleLimitError, shown
from expbuf_core.sampling import restore_rng, rng_state
from expbuf_core.values import check_batch_size

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

    With `samples_per_insert` a learner never runs further ahead of those who add than this: all
    draws together stay at or below that many for each experience added, where what the buffer holds
    at the beginning counts as added. A draw beyond it waits. Nobody who adds ever waits. The
    workers of a `DataLoader` share the count; looking at it at once, they may exceed it by a batch
    each.

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
        samples_per_insert: Above 0, `math.inf` for no limit. Default: the configured one.
        insert_wait_s: Seconds to wait for the next experience. Default: the configured time.

    Raises:
        InvalidExperience: One of them is not that, or out of bounds.
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
        samples_per_insert: float | None = None,
        insert_wait_s: float | None = None,
    ) -> None:
        check_batch_size(batch_size)
        _check_whole(length, "length", 1)
        _check_whole(seed, "seed", 0)
        if not callable(transform):
            raise InvalidExperience(f"transform must be a function, not {shown(transform)}")
        self._buffer = buffer
        self._arguments = {
            "batch_size": batch_size,
            "beta": beta,
            "where": where,
            "uniform": uniform,
        }
        self._length = None if length is None else int(length)
        self._seed = None if seed is None else int(seed)
        self._transform = transform
        self._home = os.getpid()
        self._stream: tuple[Any, np.random.Generator] | None = None
        sampling = buffer.config.sampling
        ratio = sampling.samples_per_insert if samples_per_insert is None else samples_per_insert
        wait_s = sampling.insert_wait_s if insert_wait_s is None else insert_wait_s
        _check_real(wait_s, "insert_wait_s")
        if ratio is not None:
            _check_real(ratio, "samples_per_insert")
        self._limit = None if ratio in (None, np.inf) else _Limit(buffer, float(ratio), wait_s)

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
            SampleLimitError: `samples_per_insert` is reached, and nothing was added in time.
        """
        arguments: dict[str, Any] = self._arguments
        if self._limit is not None:
            self._limit.wait(self._buffer, arguments["batch_size"])
        batch = self._buffer.sample(rng=self._rng(), **arguments)
        if self._limit is not None:
            self._limit.count(len(batch))
        return self._transform(batch)

    # ------------------------------------------------------------ to go on after a restart

    def state_dict(self) -> dict[str, Any]:
        """Where it stands, JSON-like: the random stream of this process, and the draws counted.

        With the same state and a buffer at the same LSN, the same batches follow. Streams of
        workers are not in it: theirs follow from torch's seed.
        """
        rng = self._rng()
        return {
            "rng": self._buffer.rng_state() if rng is None else rng_state(rng),
            "limit": None if self._limit is None else self._limit.state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken.

        Raises:
            ConfigError: That is no such state.
        """
        try:
            rng, limit = dict(state["rng"]), state["limit"]
            counted = None if limit is None else (int(limit["begin"]), int(limit["drawn"]))
        except (TypeError, KeyError, ValueError) as exc:
            raise ConfigError(f"not a state of ReplayBatches: {exc!r}") from exc
        if self._seed is None:
            self._buffer.set_rng_state(rng)
        else:
            self._stream = self._who(), restore_rng(rng)
        if self._limit is not None and counted is not None:
            self._limit.restore(*counted)

    # ------------------------------------------------------------ random streams

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


def _check_whole(value: Any, name: str, least: int) -> None:
    if value is None:
        return
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not whole or value < least:
        raise InvalidExperience(
            f"{name} must be an integer of at least {least}, not {shown(value)}"
        )


def _check_real(value: Any, name: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        raise InvalidExperience(f"{name} must be a number, not {shown(value)}")


_COUNTERS = 1 << 12
_MOST = 2.0**62
_FIRST_PAUSE_S, _LAST_PAUSE_S = 0.0005, 0.05


class _Limit:
    """Draws counted against experiences added.

    Every process that draws counts in a word of its own, chosen by its pid, in memory that forked
    and spawned children share with the process that made this: no lock, which would stay locked
    for ever when its holder is killed.
    """

    def __init__(self, buffer: ExperienceBuffer, ratio: float, wait_s: float) -> None:
        if not 0 < ratio < np.inf:
            raise InvalidExperience(f"samples_per_insert must be above 0, not {ratio}")
        if not wait_s >= 0:
            raise InvalidExperience(f"insert_wait_s must not be negative, not {wait_s}")
        self._ratio = ratio
        self._wait_s = float(wait_s)
        self._begin = buffer.total_added - len(buffer)
        self._counters = multiprocessing.RawArray("q", _COUNTERS)

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        if multiprocessing.context.get_spawning_popen() is None:
            # To somebody who is no child: shares nothing with this process, and counts anew.
            state["_counters"] = None
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self._counters is None:
            self._counters = multiprocessing.RawArray("q", _COUNTERS)

    def state(self) -> dict[str, int]:
        """Where it stands."""
        return {"begin": self._begin, "drawn": self._drawn()}

    def restore(self, begin: int, drawn: int) -> None:
        """Go on there."""
        self._begin = begin
        self._counters[:] = [drawn] + [0] * (_COUNTERS - 1)

    def _drawn(self) -> int:
        return int(np.frombuffer(self._counters, np.int64).sum())

    def count(self, n: int) -> None:
        """Say that n experiences were drawn."""
        self._counters[os.getpid() % _COUNTERS] += n

    def wait(self, buffer: ExperienceBuffer, n: int) -> None:
        """Return when n more may be drawn.

        Raises:
            SampleLimitError: Nothing was added in time.
        """
        seen, pause, deadline = -1, _FIRST_PAUSE_S, 0.0
        while True:
            added = buffer.total_added - self._begin
            drawn, allowed = self._drawn(), int(min(self._ratio * added, _MOST))
            if drawn + n <= allowed:
                return
            now = time.monotonic()
            if added != seen:
                seen, pause, deadline = added, _FIRST_PAUSE_S, now + self._wait_s
            if now >= deadline:
                raise SampleLimitError(
                    f"{drawn} draws of {allowed} that {added} experiences allow at "
                    f"{self._ratio:g} samples per insert: {n} more were asked for, and nothing was "
                    f"added for {self._wait_s:g} s; nothing was drawn",
                    drawn=drawn,
                    allowed=allowed,
                )
            time.sleep(min(pause, deadline - now))
            pause = min(2 * pause, _LAST_PAUSE_S)
