"""Which experiences to replay: sampling weights, draws, importance weights, random streams.

The sampling weight of experience i, after Schaul et al. 2016 ("Prioritized Experience Replay"):

    w_i = (p_i + eps)^alpha * f(rate_i) * 2^(t_i / half_life)        P(i) = w_i / sum_j w_j

Weights are derived from the columns of a replica and never stored. What is drawn is a function of
the live experiences in their order, the settings and the random stream: two replicas of the same
LSN draw the same batch from the same seed, though their rings may lie differently in memory. (The
sums are then rounded differently. That shows in the last bits of the probabilities, and in a draw
about once in 10^12, when it falls on the very boundary between two experiences.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from expbuf_core.errors import ConfigError, NotEnoughExperiences
from expbuf_core.sum_tree import SumTree

_AGE_HEADROOM = 256  # 2^256 and a priority of float32 to a moderate alpha stay finite in float64
_AGE_TINY = 2.0**-512  # a total below this has lost the precision of its smaller weights
_CLOCK_END = 2.0**52
_REBUILD_FRACTION = 8  # from capacity / 8 dirty slots on, one pass over all is cheaper
_REJECTION_TRIES = 4
_ORDINARY = 1e-37  # no weight of what is more likely than this underflows in float32

Slots = NDArray[np.int64]
Weights = NDArray[np.float64]


class Settings(Protocol):
    """What is configured about sampling: section `sampling` of the configuration."""

    @property
    def alpha(self) -> float:
        """Exponent of the priority; 0 samples without regard to it."""

    @property
    def beta(self) -> float:
        """Exponent of the importance weights."""

    @property
    def eps(self) -> float:
        """Added to every priority, so that 0 is not never."""

    @property
    def success_prior(self) -> float:
        """Success rate that an experience is taken to have before it has outcomes."""

    @property
    def success_prior_count(self) -> float:
        """How many outcomes that prior counts as."""

    @property
    def success_weight(self) -> float:
        """How much the success rate matters; 0 turns it off."""

    @property
    def success_floor(self) -> float:
        """Least factor for the success rate: what was never right stays in play."""

    @property
    def ageing(self) -> str:
        """How weights age: "off", or by "adds" or "time"."""

    @property
    def half_life(self) -> float | None:
        """Adds or seconds in which the weight of an experience halves."""

    @property
    def stratified(self) -> bool:
        """One draw from each of `batch_size` equal parts of the sum."""


@dataclass(frozen=True)
class SamplingSettings:
    """`Settings` with their default values."""

    alpha: float = 0.6
    beta: float = 0.4
    eps: float = 1e-3
    success_prior: float = 0.5
    success_prior_count: float = 2.0
    success_weight: float = 1.0
    success_floor: float = 0.05
    ageing: str = "off"
    half_life: float | None = None
    stratified: bool = True


class Columns(Protocol):
    """What the sampler reads of a replica (`expbuf_core.state.State`): a ring of columns.

    Ring positions rise from `head` (the oldest) to `tail` (behind the newest); position p lies in
    slot p modulo `capacity`. What lies outside is not live.
    """

    @property
    def capacity(self) -> int:
        """Slots, a power of two."""

    @property
    def head(self) -> int:
        """Ring position of the oldest."""

    @property
    def tail(self) -> int:
        """Ring position behind the newest."""

    @property
    def count(self) -> int:
        """Live experiences."""

    @property
    def moves(self) -> int:
        """How often slots were given new places; `capacity` changes only then."""

    @property
    def live(self) -> NDArray[np.bool_]:
        """The slot holds an experience."""

    @property
    def sequence(self) -> NDArray[np.int64]:
        """How many were added before."""

    @property
    def timestamp(self) -> NDArray[np.float64]:
        """UTC seconds."""

    @property
    def priority(self) -> NDArray[np.float32]:
        """Finite, at least 0."""

    @property
    def retrieval_count(self) -> NDArray[Any]:
        """Outcomes that the experience took part in."""

    @property
    def success_count(self) -> NDArray[Any]:
        """Those that were right, or the credit for them."""

    def live_slots(self) -> Slots:
        """Slots of the live experiences, oldest first."""


# ---------------------------------------------------------------- weights


def success_rate(
    retrieval_count: ArrayLike, success_count: ArrayLike, prior: float, prior_count: float
) -> Weights:
    """Smoothed success rate: (successes + prior * prior_count) / (retrievals + prior_count).

    That is the prior itself for an experience without outcomes.
    """
    tries = np.asarray(retrieval_count, dtype=np.float64) + prior_count
    successes = np.asarray(success_count, dtype=np.float64) + prior * prior_count
    if prior_count > 0:
        successes /= tries
        return successes
    rate: Weights = np.divide(successes, tries, out=np.full(tries.shape, prior), where=tries > 0)
    return rate


def sampling_weights(
    priority: ArrayLike,
    retrieval_count: ArrayLike,
    success_count: ArrayLike,
    settings: Settings,
    age_exponent: ArrayLike | None = None,
) -> Weights:
    """Sampling weights of n experiences.

    w = (p + eps)^alpha * f(rate) * 2^age_exponent, with the smoothed `success_rate` and
    f(rate) = max(success_floor, 1 + success_weight * (rate - prior)). So f(prior) = 1: an
    experience without outcomes is neither favoured nor starved; f rises with the rate; and its
    floor keeps every experience in play. With the default prior of 0.5 and success_weight of 1,
    what is always right comes up to three times as often as what is always wrong.

    Args:
        priority: (n,) finite, at least 0.
        retrieval_count: (n,)
        success_count: (n,)
        settings: See `Settings`.
        age_exponent: (n,) half-lives by which each is younger than a common reference, or None.

    Returns:
        (n,) float64, finite, at least 0; all 0 only where eps and all priorities are 0.
    """
    weight = np.add(priority, settings.eps, dtype=np.float64)
    if settings.alpha != 1.0:
        weight **= settings.alpha
    if settings.success_weight != 0.0:
        tries = np.asarray(retrieval_count)
        if np.count_nonzero(tries):  # else f is 1, exactly: see `_success_factor`
            weight *= _success_factor(tries, success_count, settings)
    if age_exponent is not None:
        # Whole powers of two are exact: a weight has the same mantissa under every reference, so
        # the draws do not depend on when a replica moved its reference.
        exponent = np.asarray(age_exponent, dtype=np.float64)
        whole = np.floor(exponent)
        steps = np.clip(whole, -5000, 5000).astype(np.int32)
        weight = np.ldexp(weight * np.exp2(exponent - whole), steps)
    return weight


def _success_factor(
    retrieval_count: NDArray[Any], success_count: ArrayLike, settings: Settings
) -> Weights:
    """f(rate), (n,); exactly 1 without outcomes, whatever the prior.

    By rate - prior = (successes - prior * retrievals) / (retrievals + prior_count), which rounds to
    0 there; the difference of the two would not.
    """
    prior, tries = settings.success_prior, retrieval_count.astype(np.float64)
    factor = np.asarray(success_count, dtype=np.float64) - prior * tries
    tries += settings.success_prior_count
    np.divide(factor, tries, out=factor, where=tries > 0)
    factor *= settings.success_weight
    factor += 1.0
    floored: Weights = np.maximum(factor, settings.success_floor)
    return floored


def importance_weights(probabilities: ArrayLike, beta: float) -> NDArray[np.float32]:
    """Weights that undo the bias of prioritized sampling: (N * P(i))^-beta / max over the batch.

    Schaul et al. 2016, section 3.4. N, the experiences that could have been drawn, cancels out.

    Args:
        probabilities: (n,) above 0.
        beta: In [0, 1]; 0 gives ones.

    Returns:
        (n,) float32 in (0, 1].
    """
    p = np.asarray(probabilities, np.float64)
    if p.size == 0:
        return np.empty(0, np.float32)
    # (N P)^-beta / max = (P / least P)^-beta, which is at most 1 and never overflows.
    least = np.minimum.reduce(p, axis=None)
    if least > _ORDINARY:
        weights: NDArray[np.float32] = ((p / least) ** -beta).astype(np.float32)
        return weights
    p = np.maximum(p, np.finfo(np.float64).tiny)
    p /= np.minimum.reduce(p, axis=None)
    bounded: NDArray[np.float32] = np.maximum(
        (p**-beta).astype(np.float32), np.finfo(np.float32).tiny
    )
    return bounded


# ---------------------------------------------------------------- the sampler


class Draw(NamedTuple):
    """What was drawn. `slots`: (n,) int64; `probabilities`: (n,) float64, that of each one draw."""

    slots: Slots
    probabilities: Weights


class PrioritySampler:
    """Draws slots of a replica in proportion to their sampling weights.

    The replica says which slots changed (`mark`), which costs next to nothing; the weights are
    derived when the next draw needs them. Not thread-safe: the caller holds the replica's lock for
    `mark` and for draws alike.

    All draws raise `NotEnoughExperiences` where there is nothing to draw from. Where all weights
    are 0 (eps 0 and no priority above 0), they are uniform.
    """

    def __init__(self, columns: Columns, settings: Settings) -> None:
        """Make a sampler.

        Args:
            columns: Read at each draw; may be replaced by others (then call `mark_all`).
            settings: See `Settings`.

        Raises:
            ConfigError: The ageing is unknown or lacks a half-life.
        """
        if settings.ageing not in ("off", "adds", "time"):
            raise ConfigError(f"ageing must be 'off', 'adds' or 'time', not {settings.ageing!r}")
        if settings.ageing != "off" and not (settings.half_life and settings.half_life > 0):
            raise ConfigError(
                f"ageing {settings.ageing!r} needs a half_life above 0, not {settings.half_life!r}"
            )
        self.columns = columns
        self.settings = settings
        self._tree = SumTree(columns.capacity)
        self._reference = 0.0  # age 0, in whole half-lives of the clock chosen by `ageing`
        self._all_dirty = True
        self._dirty: list[Slots] = []
        self._dirty_ones: list[int] = []
        self._n_dirty = 0
        self._head = 0  # of the ring, when the tree was last brought up to date
        self._moves = columns.moves  # likewise
        self._start: float | None = None  # sum of the weights in the slots before the oldest one's
        self._live_slots: Slots | None = None
        self._strata = np.empty(0)  # 0, 1, 2, … for a batch

    # ------------------------------------------------------------ what changed

    def mark(self, slots: Slots | int | None) -> None:
        """Say that an operation was applied, and which slots it filled, changed or emptied.

        What fell off the old end of the ring need not be named, and slots that were given new
        places are noticed. An array is kept until the next draw: do not write to it.
        """
        if slots is None or self._all_dirty:
            return
        if isinstance(slots, (int, np.integer)):
            self._dirty_ones.append(int(slots))
            self._n_dirty += 1
        else:
            self._dirty.append(slots)
            self._n_dirty += len(slots)
        if self._n_dirty * _REBUILD_FRACTION > self._tree.capacity:
            self.mark_all()

    def mark_all(self) -> None:
        """Say that any slot may have changed."""
        self._all_dirty = True
        self._forget_dirty()

    def _forget_dirty(self) -> None:
        self._dirty.clear()
        self._dirty_ones.clear()
        self._n_dirty = 0
        self._live_slots = None

    def _refresh(self) -> None:
        columns = self.columns
        fallen = columns.head - self._head
        moved = columns.moves != self._moves or columns.capacity != self._tree.capacity
        if self._all_dirty or moved or fallen * _REBUILD_FRACTION > columns.capacity:
            self._rebuild()
        elif fallen or self._n_dirty:
            if fallen:
                self._dirty.append(np.arange(self._head, columns.head) & (columns.capacity - 1))
            self._apply_dirty()
        else:
            return
        self._head, self._moves = columns.head, columns.moves
        self._start = None

    def _apply_dirty(self) -> None:
        if self._dirty_ones:
            self._dirty.append(np.array(self._dirty_ones, dtype=np.int64))
        slots = self._dirty[0] if len(self._dirty) == 1 else np.concatenate(self._dirty)
        live = self.columns.live.take(slots)
        ages = None
        if self.settings.ageing != "off":
            clock = self._clock(slots)
            newest = float(clock.max(where=live, initial=-np.inf))
            if newest - self._reference > _AGE_HEADROOM:
                step = int(np.floor(newest)) - int(self._reference)
                self._reference += step
                self._tree.scale(-min(step, 5000))
            # An emptied slot may hold any time: keep it from overflowing.
            ages = np.where(live, clock - self._reference, 0.0)
        weights = self._weights(slots, ages)
        weights *= live
        self._tree.update(slots, weights)
        self._forget_dirty()
        if ages is not None and self._tree.total < _AGE_TINY:
            self._rebuild()  # only old ones are left: their weights need a nearer reference

    def _rebuild(self) -> None:
        if self._tree.capacity != self.columns.capacity:
            self._tree = SumTree(self.columns.capacity)
        slots = self.columns.live_slots()
        ages = None
        if self.settings.ageing != "off" and slots.size:
            clock = self._clock(slots)
            self._reference = float(np.floor(clock.max()))
            ages = clock - self._reference
        weights = np.zeros(self.columns.capacity)
        weights[slots] = self._weights(slots, ages)
        self._tree.rebuild(weights)
        self._forget_dirty()
        self._all_dirty = False
        self._live_slots = slots

    def _weights(self, slots: Slots, ages: Weights | None) -> Weights:
        columns = self.columns
        tries = columns.retrieval_count.take(slots)
        # Without a retrieval there is no success: one column less to look for all over the memory.
        successes = columns.success_count.take(slots) if np.count_nonzero(tries) else 0.0
        return sampling_weights(columns.priority.take(slots), tries, successes, self.settings, ages)

    def _clock(self, slots: Slots) -> Weights:
        """When each was added, in half-lives."""
        by_adds = self.settings.ageing == "adds"
        time = self.columns.sequence[slots] if by_adds else self.columns.timestamp[slots]
        half_life = self.settings.half_life or 1.0
        # Beyond 2^52 half-lives a float64 has no fractions any more, and infinity would follow.
        end = _CLOCK_END * half_life
        clock: Weights = np.clip(time.astype(np.float64), -end, end) / half_life
        return clock

    def _live(self) -> Slots:
        """Live slots, oldest first."""
        if self._live_slots is None:
            self._live_slots = self.columns.live_slots()
        return self._live_slots

    def _find(self, u: Weights) -> tuple[Slots, Weights]:
        """Slots and weights under points of the sum, counted from the oldest experience on."""
        head = self._head & (self._tree.capacity - 1)
        if head:
            if self._start is None:
                self._start = self._tree.before(head)
            total = self._tree.total
            u = u + self._start
            u -= total * (u >= total)
        return self._tree.find_with_weights(u)

    # ------------------------------------------------------------ draws

    def draw(
        self, batch_size: int, *, rng: np.random.Generator, stratified: bool | None = None
    ) -> Draw:
        """Draw with replacement, P(i) = w_i / sum(w). Cost O(batch_size * log capacity).

        Args:
            batch_size: At least 1.
            rng: The random stream.
            stratified: One draw from each of `batch_size` equal parts of the sum, so that the batch
                has less variance; the oldest first. Default: the setting.
        """
        self._check(batch_size)
        total = self._tree.total
        if not total > 0.0:
            return self.uniform(batch_size, rng=rng)
        u = rng.random(batch_size)
        if self.settings.stratified if stratified is None else stratified:
            if len(self._strata) != batch_size:
                self._strata = np.arange(batch_size, dtype=np.float64)
            u += self._strata
            u *= total / batch_size
        else:
            u *= total
        slots, weights = self._find(u)
        weights /= total
        return Draw(slots, weights)

    def uniform(self, batch_size: int, *, rng: np.random.Generator) -> Draw:
        """Draw with replacement, each live experience with the same probability.

        Cost O(batch_size), unless experiences were removed from the middle: then one pass over the
        ring after each change.
        """
        self._check(batch_size)
        columns = self.columns
        n = columns.count
        chosen = rng.integers(0, n, batch_size)
        if columns.tail - columns.head == n:
            slots = (columns.head + chosen) & (columns.capacity - 1)
        else:
            slots = self._live()[chosen]
        return Draw(slots, np.full(batch_size, 1.0 / n))

    def draw_without_replacement(self, batch_size: int, *, rng: np.random.Generator) -> Draw:
        """Draw different experiences, one after the other, each in proportion to what is left.

        The order is that of the draws. The probabilities are those of the first draw, w_i / sum(w);
        the exact probability of being in the batch has no closed form. It is 0 for what ageing has
        made too light for the sum, which comes last.

        Cost O(batch_size * log capacity) as long as the batch is small beside what carries the
        weight; else O(capacity).

        Raises:
            NotEnoughExperiences: Fewer than `batch_size` experiences have a weight above 0.
        """
        self._check(batch_size)
        if batch_size > self.columns.count:
            raise NotEnoughExperiences(
                f"{batch_size} different experiences were asked for, "
                f"the buffer holds {self.columns.count}"
            )
        total = self._tree.total
        if not total > 0.0:
            slots = rng.choice(self._live(), batch_size, replace=False)
            return Draw(slots, np.full(batch_size, 1.0 / self.columns.count))
        # To draw with replacement and skip repetitions is the same distribution. Heavy weights
        # may repeat for ever, so after a few rounds the rest comes from an exact race.
        slots = np.empty(0, np.int64)
        for _ in range(_REJECTION_TRIES):
            missing = batch_size - slots.size
            if missing <= 0:
                break
            more = self._find(rng.random(missing + missing // 4 + 8) * total)[0]
            slots = _unique_in_order(np.concatenate([slots, more]))
        slots = slots[:batch_size]
        if slots.size < batch_size:
            live = self._live()
            others = live[~np.isin(live, slots)]
            more = self._race(batch_size - slots.size, others, rng, drawn=slots.size)
            slots = np.concatenate([slots, more])
        return Draw(slots, self._tree.weights(slots) / total)

    def _race(self, n: int, slots: Slots, rng: np.random.Generator, *, drawn: int = 0) -> Slots:
        """Make n successive draws without replacement among these slots; `drawn` came before."""
        # Efraimidis & Spirakis 2006: the n smallest of E_i / w_i, with E_i standard exponential,
        # are n successive draws without replacement, in that order. In logarithms, which hold
        # every age: in the tree the weights of the oldest underflow.
        weights = self._weights(slots, None)
        slots, weights = slots[weights > 0.0], weights[weights > 0.0]
        if slots.size < n:
            raise NotEnoughExperiences(
                f"{drawn + n} different experiences were asked for, but only {drawn + slots.size} "
                "have a sampling weight above 0; a larger sampling.eps reaches the others"
            )
        log_weights = np.log(weights)
        if self.settings.ageing != "off":
            clock = self._clock(slots)
            log_weights += (clock - np.floor(clock.max())) * np.log(2.0)
        arrival = np.log(rng.standard_exponential(slots.size)) - log_weights
        winners = np.argpartition(arrival, n - 1)[:n]
        return slots[winners[np.argsort(arrival[winners], kind="stable")]]

    def draw_where(
        self,
        matching: NDArray[np.bool_] | Slots,
        batch_size: int,
        *,
        rng: np.random.Generator,
        stratified: bool | None = None,
        replace: bool = True,
        uniform: bool = False,
    ) -> Draw:
        """Draw among the slots that match a condition, P(i) = w_i / their sum.

        Args:
            matching: (capacity,) bool, or the (n,) matching slots, each once and best in the order
                of the ring, oldest first. Slots that hold no experience are left out.
            batch_size: At least 1.
            rng: The random stream.
            stratified: See `draw`.
            replace: False: none twice; probabilities as in `draw_without_replacement`.
            uniform: All with the same probability.
        """
        self._check(batch_size)
        slots: Slots = np.asarray(matching)
        if slots.dtype == np.bool_:
            live = self._live()
            slots = live[slots[live]]
        else:
            slots = slots[self.columns.live[slots]]
        if slots.size == 0:
            raise NotEnoughExperiences("no experience matches the condition")
        if not replace and batch_size > slots.size:
            raise NotEnoughExperiences(
                f"{batch_size} different experiences were asked for, {slots.size} match the "
                "condition"
            )
        even = np.full(batch_size, 1.0 / slots.size)
        if uniform:
            return Draw(rng.choice(slots, batch_size, replace=replace), even)
        sums = np.cumsum(self._tree.weights(slots))
        total = float(sums[-1])
        if not total > 0.0:
            return Draw(rng.choice(slots, batch_size, replace=replace), even)
        if not replace:
            chosen = self._race(batch_size, slots, rng)
            return Draw(chosen, self._tree.weights(chosen) / total)
        u = rng.random(batch_size)
        if self.settings.stratified if stratified is None else stratified:
            u = (u + np.arange(batch_size)) / batch_size
        u = np.minimum(u * total, np.nextafter(total, 0.0))  # so no weight of 0 is found at the end
        chosen = slots[sums.searchsorted(u, side="right")]
        return Draw(chosen, self._tree.weights(chosen) / total)

    def _check(self, batch_size: int) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {batch_size}")
        self._refresh()
        if self.columns.count == 0:
            raise NotEnoughExperiences("the buffer is empty: there is nothing to sample")


def _unique_in_order(slots: Slots) -> Slots:
    _, first = np.unique(slots, return_index=True)
    return slots[np.sort(first)]


# ---------------------------------------------------------------- random streams

_BIT_GENERATORS = ("PCG64", "PCG64DXSM", "MT19937", "Philox", "SFC64")
_EXACT = 1 << 53  # integers beyond this do not survive every JSON reader


def rng_state(rng: np.random.Generator) -> dict[str, Any]:
    """State of a random stream as a JSON tree, for `restore_rng`."""
    tree = _to_json(rng.bit_generator.state)
    if not isinstance(tree, dict):
        raise TypeError(f"{type(rng.bit_generator).__name__} has no state that can be saved")
    return tree


def restore_rng(state: dict[str, Any]) -> np.random.Generator:
    """Make the random stream that `rng_state` described; it goes on where that one stood.

    Raises:
        ConfigError: `state` is not such a description.
    """
    name = state.get("bit_generator") if isinstance(state, dict) else None
    if name not in _BIT_GENERATORS:  # by name from a fixed list: a file cannot choose what runs
        raise ConfigError(f"not the state of a known random generator: {name!r}")
    generator = getattr(np.random, str(name))()
    try:
        generator.state = _from_json(state)
    except (TypeError, ValueError, LookupError, OverflowError) as exc:
        raise ConfigError(f"the saved state of {name} is damaged: {exc}") from exc
    return np.random.Generator(generator)


def _to_json(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _to_json(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return {"dtype": str(value.dtype), "values": [_to_json(item) for item in value.tolist()]}
    if isinstance(value, (int, np.integer)):
        number = int(value)
        return number if -_EXACT <= number <= _EXACT else hex(number)
    return value


def _from_json(value: Any) -> Any:
    if isinstance(value, dict):
        if value.keys() == {"dtype", "values"}:
            return np.array([_from_json(item) for item in value["values"]], dtype=value["dtype"])
        return {key: _from_json(item) for key, item in value.items()}
    if isinstance(value, str) and value.startswith(("0x", "-0x")):
        return int(value, 16)
    return value
