"""What is intact of a damaged snapshot, and what the log and the payloads say of the rest.

Each column has a checksum, so damage costs a column or two. What stood there is looked up in the
log as far as that reaches back: experiences as they were added or logged again, and what was
updated since. Payloads have tags and the rewards of the add.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from expbuf_core import codec, snapshots
from expbuf_core.contracts import Damage, LoggedOperation
from expbuf_core.crc import crc32
from expbuf_core.filesystem import read_file
from expbuf_core.state import COLUMNS, SCALAR_REWARD, State

_UPDATED = ("reward", "priority", "retrieval_count", "success_count", "flags")
_MOST_TREE_BYTES = 1 << 32  # the checksum of the header may be what is damaged
_UPDATES = (codec.PRIORITY, codec.REWARD, codec.OUTCOME)

Fields = Callable[[State, NDArray[np.int64]], Iterator[Mapping[str, Any] | None]]
"""Yields what is in the payloads of experiences; None where one cannot be read."""


class Remains(NamedTuple):
    """What could be had of a damaged snapshot.

    Attributes:
        state: After its LSN.
        lost: Columns that are damaged.
        unknown: (n,) ids of experiences of which a lost column is made up, or may be an older one.
    """

    state: State
    lost: tuple[str, ...]
    unknown: NDArray[np.int64]


def read(
    file: Path, log: Callable[[], Iterable[LoggedOperation | Damage]], fields: Fields
) -> Remains | None:
    """What is left; None if that is too little.

    Args:
        file: The snapshot.
        log: All of the log that can be read, as by `PersistenceAdapter.salvage(0)`.
        fields: Reads payloads.
    """
    try:
        tree, columns, lost = _intact(file)
        if not {"id", "location", "length"} <= set(columns):
            return None
        n = len(columns["id"])
        made_up = {
            "reward": np.full(n, np.nan),
            "confidence": np.ones(n, np.float32),
            "priority": np.ones(n, np.float32),
            "sequence": _bounds_of_sequence(tree, columns["id"])[0],
            "live": np.ones(n, bool),  # as it was: only live ones are in a snapshot
        }
        for name in lost:
            columns[name] = made_up.get(name, np.zeros(n, COLUMNS[name]))
        state = snapshots.state_of(tree, columns)
        replaced = set(lost) - {"live"}
        if not replaced:
            return Remains(state, lost, np.empty(0, np.int64))
        search = _Search(snapshots.state_of(tree, columns), replaced)
        if "sequence" in replaced:
            search.is_known("sequence", np.equal(*_bounds_of_sequence(tree, columns["id"])))
        search.in_log(log())
        search.put_into(state)
        search.in_payloads(state, fields)
        return Remains(state, lost, state.id[:n][~search.known()])
    except (OSError, *codec.UNDECODABLE):
        return None


def _intact(file: Path) -> tuple[dict[str, Any], dict[str, NDArray[Any]], tuple[str, ...]]:
    """Tree, columns that are intact, and names of those of experiences that are not.

    Raises:
        ValueError: The tree is damaged; or another one of `UNDECODABLE`.
        OSError: The file cannot be read.
    """
    header = snapshots._HEADER
    _, _, tree_crc, tree_bytes, _, _ = header.unpack(read_file(file, most=header.size))
    if tree_bytes > _MOST_TREE_BYTES:
        raise ValueError(f"a tree of {tree_bytes} bytes")
    text = read_file(file, header.size, tree_bytes)
    if crc32(text) != tree_crc:
        raise ValueError("checksum mismatch in the tree")
    tree = codec.load_json(text)
    raw = read_file(file, header.size + tree_bytes, snapshots.column_bytes(tree))
    at = 0
    columns: dict[str, NDArray[Any]] = {}
    lost = []
    for name, (dtype, n, crc) in tree["columns"].items():
        part = raw[at : at + np.dtype(dtype).itemsize * n]
        at += np.dtype(dtype).itemsize * n
        if crc32(part) == crc:
            columns[name] = np.frombuffer(part, dtype)
        elif name in COLUMNS:
            lost.append(name)
        else:
            tree.pop("reembedded", None)  # work that was not finished: it begins anew
    return tree, columns, tuple(lost)


def _bounds_of_sequence(
    tree: Mapping[str, Any], ids: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """At least and at most so many were added before each. They meet where no id is unused."""
    total, place = int(tree["total_added"]), np.arange(len(ids))
    least = np.maximum(place, total - (int(tree["next_id"]) - ids))
    return least, np.minimum(ids, total - (len(ids) - place))


class _Search:
    """Looks for what lost columns held. Slots are the places in the columns.

    Args:
        scratch: The snapshot; what the log says goes there, also where nothing is lost.
        lost: Names of the columns.
    """

    def __init__(self, scratch: State, lost: set[str]) -> None:
        self._scratch = scratch
        self._lost = lost
        n = scratch.count
        self._last_lsn = scratch.lsn
        self._remembered = set(scratch.receipts)
        scratch.receipts.clear()  # each is counted when its operation comes
        scratch.receipts_horizon = 0
        self._known = {name: np.zeros(n, bool) for name in lost}

    def is_known(self, name: str, slots: NDArray[np.bool_]) -> None:
        """Of these, what is made up for a lost column is right for certain."""
        self._known[name] |= slots

    def in_log(self, found: Iterable[LoggedOperation | Damage]) -> None:
        """Follow the log up to the snapshot."""
        last = 0
        for item in found:
            if isinstance(item, Damage):
                continue
            if item.lsn > self._last_lsn:
                break
            if item.lsn != last + 1:
                self._forget_updates()
            last = item.lsn
            if item.body:  # an add or relog without is no update
                try:
                    self._follow(item)
                except codec.UNDECODABLE:
                    self._forget_updates()
        if last != self._last_lsn:
            self._forget_updates()

    def _forget_updates(self) -> None:
        """What is missing in the log, damaged or dropped, may have been updates."""
        self._set_known(slice(None), _UPDATED, False)

    def _set_known(self, slots: Any, names: Iterable[str], value: bool) -> None:
        for name in self._lost.intersection(names):
            self._known[name][slots] = value

    def _follow(self, operation: LoggedOperation) -> None:
        if operation.kind == codec.ADD:
            self._added(operation)
        elif operation.kind == codec.RELOG:
            self._logged_again(operation)
        elif operation.kind in _UPDATES:
            self._scratch.apply(operation)
            if operation.kind == codec.OUTCOME:
                self._doubt(operation)

    def _added(self, operation: LoggedOperation) -> None:
        state, body = self._scratch, codec.decode_add(operation.body)
        slots = state.find(operation.first_id + np.arange(len(operation.lengths)))
        here = slots >= 0
        slots = slots[here]
        for name in ("timestamp", "reward", "confidence", "priority"):
            getattr(state, name)[slots] = getattr(body, name)[here]
        state.tags[slots] = state._tag_column(body.labels or {}, len(here))[here]
        state.retrieval_count[slots] = 0
        state.success_count[slots] = 0
        state.flags[slots] = 0
        self._set_known(slots, ("timestamp", "confidence", "tags", *_UPDATED), True)

    def _logged_again(self, operation: LoggedOperation) -> None:
        state, body = self._scratch, codec.decode_relog(operation.body)
        slots = state.find(body.columns["id"])
        here = slots >= 0
        slots = slots[here]
        for name, column in body.columns.items():
            getattr(state, name)[slots] = column[here]
        self._set_known(slots, codec.RELOG_COLUMNS, True)
        if body.labels is not None:
            state.tags[slots] = state._tag_column(body.labels, len(here))[here]
            self._set_known(slots, ("tags",), True)

    def _doubt(self, operation: LoggedOperation) -> None:
        """Where a receipt is forgotten, so is which of its outcomes counted."""
        outcome = codec.decode_outcome(operation.body)
        if outcome.receipt and outcome.receipt not in self._remembered:
            slots = self._scratch.find(outcome.ids)
            self._set_known(slots[slots >= 0], ("retrieval_count", "success_count"), False)

    def put_into(self, state: State) -> None:
        """Put what the log says in the place of what is lost."""
        scratch, n = self._scratch, state.count
        for name in self._lost:
            getattr(state, name)[:n] = getattr(scratch, name)[:n]
        if "tags" in self._lost:
            state.tag_sets, state._tag_codes = scratch.tag_sets, scratch._tag_codes

    def in_payloads(self, state: State, fields: Fields) -> None:
        """What no log says: tags, and rewards that were not updated, or that they were."""
        wanted = self._lost & {"tags", "reward", "flags"}
        if not wanted:
            return
        slots = np.flatnonzero(~np.logical_and.reduce([self._known[name] for name in wanted]))
        ids = state.id[slots]
        for slot, id_, found in zip(slots.tolist(), ids.tolist(), fields(state, ids), strict=True):
            if found is None:
                continue
            tags = found.get("tags", [])
            if "tags" in wanted and isinstance(tags, list | tuple):
                state.tags[slot] = state._tag_column({"tags": [tags]}, 1)[0]
                self._known["tags"][slot] = True
            if wanted & {"reward", "flags"}:
                self._reward_of(state, slot, id_, found.get("rewards"))

    def _reward_of(self, state: State, slot: int, id_: int, at_the_add: Any) -> None:
        """The total, or that it is a number of its own, from components: the last, or the first."""
        known, last = self._known, state.rewards.get(id_)
        total = math.nan
        with contextlib.suppress(TypeError, ValueError, AttributeError, OverflowError):
            total = math.fsum((at_the_add if last is None else last).values())
        if "reward" not in self._lost:
            if not known["flags"][slot]:
                own = last is None and not math.isnan(state.reward[slot])
                own = own and bool(state.reward[slot] != total)
                state.flags[slot] = SCALAR_REWARD if own else 0
                known["flags"][slot] = own or last is not None
        elif not known["reward"][slot]:
            updated = "flags" in self._lost or state.flags[slot] & SCALAR_REWARD
            state.reward[slot] = total
            known["reward"][slot] = not math.isnan(total) and (last is not None or not updated)

    def known(self) -> NDArray[np.bool_]:
        """(n,) whether all that was lost of an experience was found."""
        found: NDArray[np.bool_] = np.logical_and.reduce(list(self._known.values()))
        return found
