"""The columns of one replica: what a process knows of every experience without its payload.

A ring of columns takes the place of a `collections.deque`: appending and evicting are O(1), and
every position is reached in O(1), where a deque walks. A *slot* is a place in the ring and is
reused; an *id* is for life. Ids rise along the ring, so an id is found by arithmetic while no ids
are missing, and by bisection otherwise.

`apply` is a pure function of logged values: every replica that has applied the same operations
holds the same state, whatever its configuration.
"""

from __future__ import annotations

import bisect
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
import numpy.ma  # else `np.unique` does, perhaps in the middle of a fork
from numpy.typing import NDArray

from expbuf_core import codec
from expbuf_core.contracts import LoggedOperation, LoggedRun
from expbuf_core.errors import FormatVersionError

COLUMNS: dict[str, Any] = {
    "id": np.int64,
    "location": np.int64,  # of the payload, for the storage adapter
    "length": np.uint32,  # of the payload
    "timestamp": np.float64,
    "reward": np.float64,  # NaN: unknown
    "confidence": np.float32,
    "priority": np.float32,
    "retrieval_count": np.uint32,
    "success_count": np.float32,
    "tags": np.int32,  # which set of tags, in State.tag_sets
    "sequence": np.int64,  # how many were added before it; unlike ids, without gaps
    "flags": np.uint8,
    "live": np.bool_,
}
REEMBEDDED_COLUMNS: dict[str, Any] = {name: COLUMNS[name] for name in ("id", "location", "length")}
REEMBEDDED = "reembedded_"  # begins their names in a snapshot
SCALAR_REWARD = 1  # the reward was updated by one number, which replaces the payload's components
_FIRST_CAPACITY = 1024
_SPARE_TAG_SETS = 1024
_IN_RUNS = (codec.ADD, codec.REMOVE, codec.PRIORITY, codec.OUTCOME)
_RUN_BYTES = 1 << 20


class Change(NamedTuple):
    """What an operation did, for what is derived from the state.

    Attributes:
        applied: Experiences it applied to.
        added: (n,) ids that it added, rising, or None.
        vectors: (n, dim) of the added ones, or None.
        removed: (n,) ids that it removed or evicted, or None; those just added may be among them.
        evicted: How many of them for lack of room.
        touched: (n,) slots whose value changed, those of removed experiences among them, or None.
        cleared: Everything was removed.
        settings: The settings changed.
        represented: The representation did: all fused vectors so far are of no more use.
        refused: LSNs of adds that came too late for the representation of their vectors.
    """

    applied: int = 0
    added: NDArray[np.int64] | None = None
    vectors: NDArray[np.float32] | None = None
    removed: NDArray[np.int64] | None = None
    evicted: int = 0
    touched: NDArray[np.int64] | None = None
    cleared: bool = False
    settings: bool = False
    represented: bool = False
    refused: tuple[int, ...] = ()


class Reembedded:
    """Payloads with new embeddings, which take the place of the old at a change of representation.

    Attributes:
        representation: That they are of.
        name: Of whoever makes the embeddings.
    """

    def __init__(self, representation: int, name: str) -> None:
        self.representation = representation
        self.name = name
        self._parts: list[dict[str, NDArray[Any]]] = []
        self._merged = False  # there is one part, in order

    def add(
        self, ids: NDArray[np.int64], locations: NDArray[np.int64], lengths: NDArray[np.uint32]
    ) -> None:
        """Note where payloads are; of an id that comes twice, the last counts."""
        self._parts.append({"id": ids, "location": locations, "length": lengths})
        self._merged = False

    def columns(self) -> dict[str, NDArray[Any]]:
        """(n,) `id` int64, rising, `location` int64 and `length` uint32."""
        if self._merged:
            return self._parts[0]
        joined = {
            name: np.concatenate([np.empty(0, kind), *(part[name] for part in self._parts)])
            for name, kind in REEMBEDDED_COLUMNS.items()
        }
        # Each id's last one: the first in reverse.
        _, last = np.unique(joined["id"][::-1], return_index=True)
        columns = {name: column[len(column) - 1 - last] for name, column in joined.items()}
        self._parts, self._merged = [columns], True
        return columns


def runs(
    operations: Iterable[LoggedOperation | LoggedRun],
) -> Iterator[list[LoggedOperation] | LoggedRun]:
    """Group operations for `State.apply`: successive ones of a kind, where the kind allows it.

    What a run does is exactly what its operations do one by one; it takes a fraction of the time.
    What was read before an error comes before the error.
    """
    run: list[LoggedOperation] = []
    kind = size = 0
    failure: Exception | None = None
    following = iter(operations)
    while True:
        try:
            operation = next(following)
        except StopIteration:
            break
        except Exception as exc:
            failure = exc
            break
        if isinstance(operation, LoggedRun):
            if run:
                yield run
            run, kind, size = [], 0, 0
            if operation.kind in _IN_RUNS:
                yield operation
            else:
                yield from ([single] for single in operation.operations())
            continue
        if operation.kind != kind or size > _RUN_BYTES or kind not in _IN_RUNS:
            if run:
                yield run
            run, kind, size = [], operation.kind, 0
        run.append(operation)
        size += len(operation.body) + 1024
    if run:
        yield run
    if failure is not None:
        raise failure


def _rows(
    run: Sequence[LoggedOperation],
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.uint32]]:
    """Ids, locations and lengths of all payloads."""
    lengths = [operation.lengths for operation in run]
    sizes = set(map(len, lengths))
    if 0 in sizes and len(run) > 1:
        raise ValueError("an add without payloads among others")
    if sizes == {1}:
        ids = np.array([operation.first_id for operation in run], np.int64)
        locations = np.array([operation.location for operation in run], np.int64)
        return ids, locations, np.concatenate(lengths)
    places = [
        operation.location + np.cumsum(operation.lengths, dtype=np.int64) - operation.lengths
        for operation in run
    ]
    numbers = [
        np.arange(operation.first_id, operation.first_id + len(operation.lengths))
        for operation in run
    ]
    return np.concatenate(numbers), np.concatenate(places), np.concatenate(lengths)


class State:
    """Columns, settings and receipts after a prefix of the operations."""

    def __init__(self) -> None:
        self.lsn = 0
        self.next_id = 0
        self.settings: dict[str, Any] = {}
        self.reserved_id = 0
        self.reserved_lsn = 0
        self.count = 0  # live experiences
        self.total_added = 0
        self.receipts: OrderedDict[bytes, int] = OrderedDict()  # receipt -> LSN of its outcome
        self.receipts_horizon = 0  # highest LSN of an outcome whose receipt is forgotten
        self.rewards: dict[int, dict[str, float]] = {}  # named components given later, by id
        self.tag_sets: list[tuple[str, ...]] = [()]
        self._tag_codes: dict[tuple[str, ...], int] = {(): 0}
        self._most_tag_sets = _SPARE_TAG_SETS  # before those out of use are forgotten
        self.reembedded: Reembedded | None = None  # while embeddings are being replaced
        self.capacity = 0  # slots, a power of two
        self.head = 0  # ring position of the oldest slot in use
        self.tail = 0  # ring position behind the newest
        self.moves = 0  # how often slots were given new places
        self._dropped: NDArray[np.int64] | None = None  # slots that the operation emptied
        self._grow(_FIRST_CAPACITY)

    id: NDArray[np.int64]
    location: NDArray[np.int64]
    length: NDArray[np.uint32]
    timestamp: NDArray[np.float64]
    reward: NDArray[np.float64]
    confidence: NDArray[np.float32]
    priority: NDArray[np.float32]
    retrieval_count: NDArray[np.uint32]
    success_count: NDArray[np.float32]
    tags: NDArray[np.int32]
    sequence: NDArray[np.int64]
    flags: NDArray[np.uint8]
    live: NDArray[np.bool_]

    @property
    def representation(self) -> int:
        """Which representation the fused vectors of the buffer are of."""
        return int(self.settings.get("representation", 0))

    @property
    def dims(self) -> tuple[Any, Any]:
        """Dimensions of the embeddings; None while they are not known."""
        return self.settings.get("v_dim"), self.settings.get("q_dim")

    # ------------------------------------------------------------ the ring

    def _grow(self, capacity: int) -> None:
        """Move the ring into larger columns; positions begin at 0 again."""
        order = self.slots()
        n = len(order)
        for name, dtype in COLUMNS.items():
            new = np.zeros(capacity, dtype)
            if n:
                new[:n] = getattr(self, name)[order]
            setattr(self, name, new)
        self.capacity, self.head, self.tail = capacity, 0, n
        self.moves += 1

    def _compact(self) -> None:
        """Drop dead slots from the middle of the ring."""
        order = self.live_slots()
        n = len(order)
        for name in COLUMNS:
            column = getattr(self, name)
            column[:n] = column[order]
            column[n:] = 0
        self.head, self.tail = 0, n
        self.moves += 1

    def slots(self) -> NDArray[np.int64]:
        """All slots in use, oldest first, dead ones among them."""
        if self.capacity == 0:
            return np.empty(0, np.int64)
        return np.arange(self.head, self.tail) & (self.capacity - 1)

    def live_slots(self) -> NDArray[np.int64]:
        """Slots of the live experiences, oldest first."""
        order = self.slots()
        return order if self.count == len(order) else order[self.live[order]]

    def _in_order(self, name: str, order: NDArray[np.int64]) -> NDArray[Any]:
        """A copy of a column for these live slots, oldest first."""
        column: NDArray[Any] = getattr(self, name)
        if len(order) != self.tail - self.head:
            return column[order]
        # All slots are live: two plain copies are an order of magnitude faster than picking.
        mask = self.capacity - 1
        head, n = self.head & mask, len(order)
        first = column[head : head + n]
        return np.concatenate([first, column[: n - len(first)]])

    def live_ids(self, first: int = 0) -> NDArray[np.int64]:
        """Ids of the live experiences from that one on, rising."""
        if first <= 0:
            return self._in_order("id", self.live_slots())
        mask = self.capacity - 1
        used = range(self.head, self.tail)
        begin = self.head + bisect.bisect_left(used, first, key=lambda at: int(self.id[at & mask]))
        order = np.arange(begin, self.tail) & mask
        ids: NDArray[np.int64] = self.id[order[self.live[order]]]
        return ids

    def find(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Slots of these ids; -1 where the experience is not (or no longer) here.

        Cost O(len(ids)) while no ids are missing, else O(len(ids) * log N).
        """
        return self.look_up(ids)[0]

    def look_up(self, ids: NDArray[np.int64]) -> tuple[NDArray[np.int64], bool]:
        """`find`, and whether all are here."""
        n = self.tail - self.head
        if n == 0 or len(ids) == 0:
            return np.full(len(ids), -1, np.int64), not len(ids)
        mask = self.capacity - 1
        first = int(self.id[self.head & mask])
        if n == self.count and int(self.id[(self.tail - 1) & mask]) - first == n - 1:
            # None is missing, and all are live: nothing need be looked up. A negative offset is
            # huge as an unsigned number.
            offsets = ids - first
            slots = (offsets + self.head) & mask
            if np.maximum.reduce(offsets.view(np.uint64)) < n:
                return slots, True
            return np.where(offsets.view(np.uint64) < n, slots, -1), False
        slots = (ids + (self.head - first)) & mask
        there = self.id.take(slots)  # `take` and `put` take half the time of brackets
        if there.tobytes() == ids.tobytes() and self.live.take(slots).all():
            return slots, True  # as almost always
        found = there == ids
        if not found.all():
            slots = self._bisect(ids)
            found = self.id[slots] == ids
        found &= self.live.take(slots)
        complete = bool(found.all())
        return slots if complete else np.where(found, slots, -1), complete

    def _bisect(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        mask = self.capacity - 1
        head, tail = self.head & mask, self.tail & mask
        if self.tail - self.head < self.capacity and head < tail:
            return head + np.minimum(np.searchsorted(self.id[head:tail], ids), tail - head - 1)
        old, new = self.id[head:], self.id[:tail]
        in_old = np.searchsorted(old, ids)
        in_new = np.searchsorted(new, ids)
        return np.where(in_old < len(old), head + in_old, np.minimum(in_new, max(tail - 1, 0)))

    def find_one(self, id_: int) -> int:
        """Slot of one id, or -1."""
        n = self.tail - self.head
        if n == 0:
            return -1
        mask = self.capacity - 1
        offset = id_ - int(self.id[self.head & mask])
        if 0 <= offset < n:
            slot = (self.head + offset) & mask
            if self.id[slot] == id_:
                return slot if self.live[slot] else -1
        return int(self.find(np.array([id_], np.int64))[0])

    # ------------------------------------------------------------ operations

    def apply(self, *run: LoggedOperation) -> Change:
        """Apply the next operation, or the next run of operations (see `runs`).

        Raises:
            CorruptionError: A body is intact and makes no sense.
        """
        first = run[0]
        try:
            handler = self._HANDLERS[first.kind]
        except KeyError:
            raise FormatVersionError(
                f"operation {first.lsn} is of kind {first.kind}, unknown to this expbuf; a newer "
                "version wrote it"
            ) from None
        try:
            change = handler(self, *run)
        except codec.UNDECODABLE as exc:
            raise codec.corrupt_body(first.lsn, first.kind, exc) from exc
        self.lsn = run[-1].lsn
        return change

    def apply_run(self, run: list[LoggedOperation] | LoggedRun) -> Change:
        """`apply` of what `runs` makes."""
        if not isinstance(run, LoggedRun):
            return self.apply(*run)
        change = None
        try:
            if run.kind == codec.ADD:
                change = self._add_alike(run)
            elif run.kind == codec.PRIORITY:
                change = self._prioritize_alike(run)
            elif run.kind == codec.OUTCOME:
                change = self._outcome_alike(run)
        except codec.UNDECODABLE as exc:
            raise codec.corrupt_body(run.first_lsn, run.kind, exc) from exc
        if change is None:
            return self.apply(*run.operations())
        self.lsn = run.last_lsn
        return change

    def _prioritize_alike(self, run: LoggedRun) -> Change | None:
        body = codec.decode_priorities(run.bodies)
        return None if body is None else self._prioritize(*body)

    def _add_alike(self, run: LoggedRun) -> Change | None:
        body = codec.decode_adds(run.bodies)
        if body is None or body.representation != self.representation or run.lengths is None:
            return None
        return self._insert(body, run.first_ids, run.locations, run.lengths)

    def _add(self, *run: LoggedOperation) -> Change:
        representation = self.settings.get("representation", 0)
        late = [op for op in run if codec.add_representation(op.body) != representation]
        if late:
            return self._add_in_time(run, late)
        body = codec.decode_add(*[operation.body for operation in run])
        return self._insert(body, *_rows(run))

    def _insert(
        self,
        body: codec.AddBody,
        ids: NDArray[np.int64],
        locations: NDArray[np.int64],
        lengths: NDArray[np.uint32],
    ) -> Change:
        n = len(body.timestamp)
        if n != len(ids):
            raise ValueError(f"{n} experiences with {len(ids)} payloads")
        if ids[0] < self.next_id or (ids[1:] <= ids[:-1]).any():
            raise ValueError("an id was issued before")
        max_size = int(self.settings["max_size"])
        removed = self._make_room(n, max_size)
        at, touched = self._claim(n)
        self.id[at] = ids
        self.location[at] = locations
        self.length[at] = lengths
        self.timestamp[at] = body.timestamp
        self.reward[at] = body.reward
        self.confidence[at] = body.confidence
        self.priority[at] = body.priority
        self.retrieval_count[at] = 0
        self.success_count[at] = 0
        self.tags[at] = self._tag_column(body.labels, n) if body.labels else 0
        self.flags[at] = 0
        self.live[at] = True
        self.sequence[at] = np.arange(self.total_added, self.total_added + n)
        self.total_added += n
        self.next_id = int(ids[-1]) + 1
        if self.count > max_size:  # one add larger than the buffer
            more = self._evict(self.count - max_size)
            removed = more if removed is None else np.concatenate([removed, more])
        self._forget_tag_sets()
        dropped = self._take_dropped()
        if dropped is not None:
            touched = np.concatenate([touched, dropped])
        evicted = 0 if removed is None else len(removed)
        return Change(n, ids, body.vectors, removed, evicted, touched)

    def _add_in_time(self, run: Sequence[LoggedOperation], late: list[LoggedOperation]) -> Change:
        """Leave out adds that a change of representation has overtaken.

        Their writers have not acknowledged them, and add again. The ids stay unused.
        """
        for operation in late:
            if codec.add_representation(operation.body) > self.representation:
                raise ValueError(
                    f"an add of a representation that comes after operation {self.lsn}"
                )
        refused = tuple(operation.lsn for operation in late)
        rest = [operation for operation in run if operation.lsn not in refused]
        change = self._add(*rest) if rest else Change()
        last = run[-1]
        self.next_id = max(self.next_id, last.first_id + len(last.lengths))
        return change._replace(refused=refused)

    def _claim(self, n: int) -> tuple[slice | NDArray[np.int64], NDArray[np.int64]]:
        """Slots for n new experiences, for indexing (a slice is faster) and as an array."""
        start = self.tail & (self.capacity - 1)
        self.tail += n
        self.count += n
        slots = np.arange(start, start + n)
        if start + n <= self.capacity:
            return slice(start, start + n), slots
        slots &= self.capacity - 1
        return slots, slots

    def relocate(self, operation: LoggedOperation) -> None:
        """Take from an operation that was applied before only where its payloads are now."""
        if operation.kind == codec.ADD:
            self._move(*_rows([operation]))
        elif operation.kind == codec.RELOG:
            ids = codec.decode_relog(operation.body).columns["id"]
            self._move(ids, *_rows([operation])[1:])
        elif operation.kind == codec.REEMBED:
            self._replace(operation)

    def _move(
        self, ids: NDArray[np.int64], locations: NDArray[np.int64], lengths: NDArray[np.uint32]
    ) -> int:
        """Say where payloads are; how many of the experiences are still here."""
        slots = self.find(ids)
        here = slots >= 0
        self.location[slots[here]] = locations[here]
        self.length[slots[here]] = lengths[here]
        return int(here.sum())

    def _relog(self, operation: LoggedOperation) -> Change:
        body = codec.decode_relog(operation.body)
        ids = body.columns["id"]
        n = len(ids)
        if n != len(operation.lengths) or (n > 1 and bool((np.diff(ids) <= 0).any())):
            raise ValueError(f"{n} experiences with {len(operation.lengths)} payloads")
        _, locations, _ = _rows([operation])
        moved = self._move(ids, locations, operation.lengths)
        new = np.flatnonzero(ids >= self.next_id)  # others were removed or evicted meanwhile
        if not len(new):
            return Change(moved)
        removed = self._make_room(len(new), int(self.settings["max_size"]))
        at, touched = self._claim(len(new))
        for name in codec.RELOG_COLUMNS:
            getattr(self, name)[at] = body.columns[name][new]
        self.location[at], self.length[at] = locations[new], operation.lengths[new]
        labels = body.labels or {}
        self.tags[at] = self._tag_column(labels, n)[new]
        for id_, named in labels.get("rewards", {}).items():
            self.rewards[int(id_)] = {str(name): float(x) for name, x in named.items()}
        self.live[at] = True
        self._forget_tag_sets()
        self.next_id = int(ids[-1]) + 1
        self.total_added = max(self.total_added, int(self.sequence[touched[-1]]) + 1)
        dropped = self._take_dropped()
        if dropped is not None:
            touched = np.concatenate([touched, dropped])
        return Change(
            n,
            added=ids[new],
            vectors=body.vectors[new],
            removed=removed,
            evicted=0 if removed is None else len(removed),
            touched=touched,
        )

    def _reembed(self, operation: LoggedOperation) -> Change:
        return Change(self._replace(operation))

    def _replace(self, operation: LoggedOperation) -> int:
        """Note payloads with new embeddings; how many of the experiences are still here."""
        body = codec.decode_reembed(operation.body)
        n = len(body.ids)
        if n != len(operation.lengths) or (n > 1 and bool((np.diff(body.ids) <= 0).any())):
            raise ValueError(f"{n} experiences with {len(operation.lengths)} payloads")
        if body.representation <= self.representation:
            # What was written again after the change; or of an attempt that others overtook.
            same = body.representation == self.representation
            return self._move(body.ids, *_rows([operation])[1:]) if n and same else 0
        pending = self.reembedded
        if pending is None or (pending.representation, pending.name) != body[:2]:
            pending = self.reembedded = Reembedded(body.representation, body.name)
        if not n:
            return 0
        here = self.find(body.ids) >= 0
        _, locations, lengths = _rows([operation])
        pending.add(body.ids[here], locations[here], np.asarray(lengths)[here])
        return int(here.sum())

    def _carry(self, operation: LoggedOperation) -> Change:
        facts = codec.load_json(operation.body)
        self.next_id = max(self.next_id, int(facts["next_id"]))
        self.total_added = max(self.total_added, int(facts["total_added"]))
        for receipt, lsn in facts["receipts"]:
            self.receipts[bytes.fromhex(receipt)] = int(lsn)
        self.receipts_horizon = max(self.receipts_horizon, int(facts["receipts_horizon"]))
        return Change()

    def _tag_column(self, labels: Mapping[str, Any], n: int) -> NDArray[np.int32]:
        codes = np.zeros(n, np.int32)
        for i, tags in enumerate(labels.get("tags", ())):
            if tags:
                key = tuple(str(tag) for tag in tags)
                code = self._tag_codes.get(key)
                if code is None:
                    code = self._tag_codes[key] = len(self.tag_sets)
                    self.tag_sets.append(key)
                codes[i] = code
        return codes

    def _forget_tag_sets(self) -> None:
        """Now and then, keep only the sets of tags that live experiences have, renumbered.

        As many again may come before the next time, and so many that a pass over the columns
        matters to none of them.
        """
        if len(self.tag_sets) <= self._most_tag_sets:
            return
        used = np.unique(np.append(self.tags[self.live_slots()], 0))
        codes = np.zeros(len(self.tag_sets), np.int32)
        codes[used] = np.arange(len(used))
        self.tags = codes[self.tags]
        self.tag_sets = [self.tag_sets[code] for code in used.tolist()]
        self._tag_codes = {key: code for code, key in enumerate(self.tag_sets)}
        self._most_tag_sets = 2 * len(used) + max(_SPARE_TAG_SETS, self.count // 64)

    def _make_room(self, n: int, max_size: int) -> NDArray[np.int64] | None:
        """Evict what n new experiences push out, and see that the ring has n free slots."""
        excess = self.count + n - max_size
        removed = self._evict(min(excess, self.count)) if excess > 0 and self.count else None
        used = self.tail - self.head
        if used + n > self.capacity:
            if used - self.count > self.capacity // 4 and self.count + n <= self.capacity:
                self._compact()
            else:
                capacity = self.capacity
                while self.count + n > capacity or used + n > capacity:
                    capacity *= 2
                self._grow(capacity)
        return removed

    def _evict(self, n: int) -> NDArray[np.int64]:
        """Remove the n oldest live experiences."""
        mask = self.capacity - 1
        if n == 1:
            at = self.head
            while not self.live[at & mask]:
                at += 1
            slots = np.array([at & mask], np.int64)
        else:
            slots = np.arange(self.head, self.head + n) & mask
            if not self.live[slots].all():
                slots = self.live_slots()[:n]
        return self._drop(slots)

    def _drop(self, slots: NDArray[np.int64]) -> NDArray[np.int64]:
        """Mark slots dead and give the dead prefix of the ring back."""
        ids = self.id[slots]
        self.live[slots] = False
        self._dropped = slots if self._dropped is None else np.concatenate([self._dropped, slots])
        self.count -= len(slots)
        if self.rewards:
            for id_ in ids.tolist():
                self.rewards.pop(id_, None)
        mask = self.capacity - 1
        if self.count == 0:
            self.head = self.tail
        else:
            look = 16
            while not self.live[self.head & mask]:
                start = self.head & mask
                ahead = self.live[start : start + min(look, self.tail - self.head)]
                self.head += int(ahead.argmax()) or len(ahead)
                look *= 4
        return ids

    def _take_dropped(self) -> NDArray[np.int64] | None:
        dropped, self._dropped = self._dropped, None
        return dropped

    def _live_of(self, ids: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        slots = self.find(ids)
        known = slots >= 0
        return slots[known], known

    def _remove(self, *run: LoggedOperation) -> Change:
        ids = [codec.decode_ids(operation.body) for operation in run]
        slots, _ = self._live_of(np.unique(np.concatenate(ids)))
        if not len(slots):
            return Change()
        return Change(len(slots), removed=self._drop(slots), touched=self._take_dropped())

    def _priority(self, *run: LoggedOperation) -> Change:
        return self._prioritize(*codec.decode_priority(*[operation.body for operation in run]))

    def _prioritize(self, ids: NDArray[np.int64], priorities: NDArray[np.float32]) -> Change:
        slots, complete = self.look_up(ids)
        if not complete:
            known = slots >= 0
            slots, priorities = slots[known], priorities[known]
        self.priority.put(slots, priorities)  # of repeated ids the last counts
        return Change(len(slots), touched=slots)

    def _reward(self, operation: LoggedOperation) -> Change:
        ids, rewards, priorities, components = codec.decode_reward(operation.body)
        slots, known = self._live_of(ids)
        self.reward[slots] = rewards[known]
        self.priority[slots] = priorities[known]
        if not components:
            self.flags[slots] |= SCALAR_REWARD
            if self.rewards:
                for id_ in ids[known].tolist():
                    self.rewards.pop(id_, None)
            return Change(len(slots), touched=slots)
        for id_, slot in zip(ids[known].tolist(), slots.tolist(), strict=True):
            named = components.get(str(id_))
            if named is None:
                self.flags[slot] |= SCALAR_REWARD
                self.rewards.pop(id_, None)
            else:
                self.flags[slot] &= 0xFF ^ SCALAR_REWARD
                self.rewards[id_] = {str(name): float(x) for name, x in named.items()}
        return Change(len(slots), touched=slots)

    def _outcome(self, *run: LoggedOperation) -> Change:
        outcomes = [codec.decode_outcome(operation.body) for operation in run]
        counted = [
            outcome
            for outcome, operation in zip(outcomes, run, strict=True)
            if not outcome.receipt
            or self._redeem(outcome.receipt, outcome.receipt_lsn, operation.lsn)
        ]
        if not counted:
            return Change()
        slots, _ = self._live_of(np.concatenate([outcome.ids for outcome in counted]))
        np.add.at(self.retrieval_count, slots, 1)
        right = [outcome for outcome in counted if outcome.success]
        if right:
            lucky, known = self._live_of(np.concatenate([outcome.ids for outcome in right]))
            credit = np.concatenate([outcome.credit for outcome in right])
            np.add.at(self.success_count, lucky, credit[known])
        return Change(len(slots), touched=slots)

    def _outcome_alike(self, run: LoggedRun) -> Change | None:
        body = codec.decode_outcomes(run.bodies)
        if body is None:
            return None
        named = zip(body.receipts, body.receipt_lsns, strict=True)
        counted = np.array(
            [
                not receipt or self._redeem(receipt, receipt_lsn, lsn)
                for lsn, (receipt, receipt_lsn) in enumerate(named, run.first_lsn)
            ]
        )
        if not counted.any():
            return Change()
        slots, _ = self._live_of(body.ids[counted].ravel())
        np.add.at(self.retrieval_count, slots, 1)
        right = counted & body.success
        if right.any():
            lucky, known = self._live_of(body.ids[right].ravel())
            np.add.at(self.success_count, lucky, body.credit[right].ravel()[known])
        return Change(len(slots), touched=slots)

    def _redeem(self, receipt: bytes, receipt_lsn: int, lsn: int) -> bool:
        """Remember a receipt; False if it was counted before, or is too old to tell."""
        if receipt in self.receipts or receipt_lsn < self.receipts_horizon:
            return False
        self.receipts[receipt] = lsn
        while len(self.receipts) > int(self.settings["receipts_kept"]):
            _, self.receipts_horizon = self.receipts.popitem(last=False)
        return True

    def _clear(self, operation: LoggedOperation) -> Change:
        slots = self.live_slots()
        ids = self._drop(slots) if len(slots) else np.empty(0, np.int64)
        return Change(len(ids), removed=ids, touched=self._take_dropped(), cleared=True)

    def _set(self, operation: LoggedOperation) -> Change:
        settings = codec.load_json(operation.body)
        if not isinstance(settings, dict):
            raise ValueError("settings that are no mapping")
        if settings.pop("if_next_id", self.next_id) < self.next_id:
            return Change()  # something was added that whoever wrote these had not seen
        for name in ("v_dim", "q_dim"):
            # Whoever wrote these may not have seen the first add, which decides them for good.
            if settings.get(name) is None and self.settings.get(name) is not None:
                settings[name] = self.settings[name]
        before = self.representation if self.settings else None
        self.settings = settings
        represented = before is not None and before != self.representation
        pending = self.reembedded
        if pending is not None and self.representation >= pending.representation:
            if self.representation == pending.representation:
                self._move(*pending.columns().values())
            self.reembedded = None
        excess = self.count - int(settings["max_size"])
        removed = self._evict(excess) if excess > 0 else None
        return Change(
            removed=removed,
            evicted=0 if removed is None else len(removed),
            touched=self._take_dropped(),
            settings=True,
            represented=represented,
        )

    def _reserve(self, operation: LoggedOperation) -> Change:
        self.reserved_id, self.reserved_lsn = codec.decode_reserve(operation.body)
        return Change()

    _HANDLERS: ClassVar[dict[int, Callable[..., Change]]] = {
        codec.ADD: _add,
        codec.REMOVE: _remove,
        codec.PRIORITY: _priority,
        codec.REWARD: _reward,
        codec.OUTCOME: _outcome,
        codec.CLEAR: _clear,
        codec.SETTINGS: _set,
        codec.RESERVE: _reserve,
        codec.RELOG: _relog,
        codec.CARRY: _carry,
        codec.REEMBED: _reembed,
    }

    # ------------------------------------------------------------ snapshots

    def dump(self) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
        """Everything, as a JSON-like tree and as columns of the live experiences."""
        order = self.live_slots()
        used = np.unique(self.tags[order]).tolist()
        tree = {
            "lsn": self.lsn,
            "next_id": self.next_id,
            "settings": self.settings,
            "reserved_id": self.reserved_id,
            "reserved_lsn": self.reserved_lsn,
            "total_added": self.total_added,
            "receipts": [[receipt.hex(), lsn] for receipt, lsn in self.receipts.items()],
            "receipts_horizon": self.receipts_horizon,
            "rewards": {str(id_): named for id_, named in self.rewards.items()},
            "tag_sets": {str(code): list(self.tag_sets[code]) for code in used if code},
        }
        columns = {name: self._in_order(name, order) for name in COLUMNS}
        pending = self.reembedded
        if pending is not None:
            tree["reembedded"] = {"representation": pending.representation, "name": pending.name}
            for name, column in pending.columns().items():
                columns[REEMBEDDED + name] = column
        return tree, columns

    @classmethod
    def load(cls, tree: Mapping[str, Any], columns: Mapping[str, NDArray[Any]]) -> State:
        """The inverse of `dump`."""
        state = cls()
        n = len(columns["id"])
        capacity = _FIRST_CAPACITY
        while capacity < n:
            capacity *= 2
        state._grow(capacity)
        for name in COLUMNS:
            getattr(state, name)[:n] = columns[name]
        state.tail = state.count = n
        state.lsn = int(tree["lsn"])
        state.next_id = int(tree["next_id"])
        state.settings = dict(tree["settings"])
        state.reserved_id = int(tree["reserved_id"])
        state.reserved_lsn = int(tree["reserved_lsn"])
        state.total_added = int(tree["total_added"])
        for receipt, lsn in tree["receipts"]:
            state.receipts[bytes.fromhex(receipt)] = int(lsn)
        state.receipts_horizon = int(tree["receipts_horizon"])
        state.rewards = {int(id_): dict(named) for id_, named in tree["rewards"].items()}
        codes = np.zeros(max([0, *map(int, tree["tag_sets"])]) + 1, np.int32)
        for code, tags in tree["tag_sets"].items():
            key = tuple(tags)
            codes[int(code)] = state._tag_codes[key] = len(state.tag_sets)
            state.tag_sets.append(key)
        state.tags[:n] = codes[state.tags[:n]]
        if "reembedded" in tree:
            noted = tree["reembedded"]
            state.reembedded = Reembedded(int(noted["representation"]), str(noted["name"]))
            state.reembedded.add(*(columns[REEMBEDDED + name] for name in REEMBEDDED_COLUMNS))
        return state
