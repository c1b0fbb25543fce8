"""The contract suite for storage is a test itself: adapters with one planted bug each fail it."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from expbuf_core.contracts import (
    Appended,
    LogFollower,
    LoggedOperation,
    LoggedRun,
    LogGone,
    PersistenceAdapter,
    PersistenceContext,
    PersistenceProvider,
    Pin,
    Problem,
    Stamped,
)
from expbuf_core.errors import CorruptionError, StorageError
from expbuf_core.filesystem import FileSystem
from expbuf_core.testing.faults import FaultyFileSystem
from expbuf_core.testing.persistence_suite import PersistenceSuite
from expbuf_file import layout
from expbuf_file.adapter import FilePersistenceAdapter
from expbuf_file.follower import FileFollower, FilePin
from expbuf_file.settings import FileSettings

SETTINGS = {"initial_bytes": 1 << 14, "segment_bytes": 1 << 15}
Places = NDArray[np.int64]
Lengths = NDArray[np.uint32]


class Plain(FilePersistenceAdapter):
    """Takes no operations together: so what a bug changes is what the core uses."""

    recover_alike = PersistenceAdapter.recover_alike


class PlainFollower(FileFollower):
    read_alike = LogFollower.read_alike


class Sound(FilePersistenceAdapter):
    """No bug: what the others are compared with."""

    def pin(self, ids: Places, locations: Places, lengths: Lengths) -> Pin:
        return super().pin(ids, locations, lengths)


class LosesTheLast(Plain):
    def recover(self, after_lsn: int, durable_lsn: int) -> Iterator[LoggedOperation]:
        return iter(list(super().recover(after_lsn, durable_lsn))[:-1])


class SwapsOperations(Plain):
    def recover(self, after_lsn: int, durable_lsn: int) -> Iterator[LoggedOperation]:
        found = list(super().recover(after_lsn, durable_lsn))
        found[4:6] = reversed(found[4:6])
        return iter(found)


class ForgetsIds(Plain):
    def recover(self, after_lsn: int, durable_lsn: int) -> Iterator[LoggedOperation]:
        return (item._replace(first_id=0) for item in super().recover(after_lsn, durable_lsn))


class DoesNotSync(Plain):
    def sync(self) -> None:
        pass


class _NoFolderSync(FileSystem):
    def __init__(self, inner: FileSystem) -> None:
        self._inner = inner

    def __getattribute__(self, name: str) -> Any:
        if name in ("_inner", "sync_folder"):
            return super().__getattribute__(name)
        return getattr(self._inner, name)

    def sync_folder(self, path: Path) -> None:
        pass


class DoesNotSyncTheFolder(Plain):
    def __init__(self, settings: FileSettings, context: PersistenceContext) -> None:
        fs = _NoFolderSync(context.fs)
        super().__init__(
            settings, PersistenceContext(context.path, context.uuid, fs, context.words)
        )


class SyncsOnlyTheCurrentFile(Plain):
    def sync(self) -> None:
        self._words[3] = self._words[0]
        super().sync()


class SwallowsFailedSyncs(Plain):
    def sync(self) -> None:
        with contextlib.suppress(StorageError):
            super().sync()


class TruncatesBeforeItIsDurable(Plain):
    def start(self, lsn: int, recovered_lsn: int) -> None:
        for number in self._reader.scanned[-1:]:
            self._logs.trim(number, max(self._reader.end - 4096, 4096))
        super().start(lsn, recovered_lsn)


class _WrongRow(Pin):
    def __init__(self, pin: Pin, count: int) -> None:
        self._pin, self._count = pin, count

    def read(self, i: int) -> Any:
        return self._pin.read((i + 1) % self._count)


class PinsAnotherRow(Plain):
    def pin(self, ids: Places, locations: Places, lengths: Lengths) -> Pin:
        return _WrongRow(super().pin(ids, locations, lengths), len(ids))


class _Lazy(Pin):
    def __init__(self, adapter: FilePersistenceAdapter, *wanted: Any) -> None:
        self._adapter, self._wanted = adapter, wanted

    def read(self, i: int) -> Any:
        return FilePersistenceAdapter.pin(self._adapter, *self._wanted).read(i)


class PinsLazily(Plain):
    def pin(self, ids: Places, locations: Places, lengths: Lengths) -> Pin:
        return _Lazy(self, ids, locations, lengths)


class _NeverSkips(PlainFollower):
    def skip(self, lsn: int, cursor: Any) -> None:
        pass


class _SkipsTooMuch(PlainFollower):
    def skip(self, lsn: int, cursor: Any) -> None:
        self._lsn = lsn + 1


class _ReadsOn(PlainFollower):
    def read(self, until_lsn: int) -> Iterator[LoggedOperation]:
        return super().read(until_lsn + 1)


class _SeesNoGrowth(PlainFollower):
    _seen = False

    def read(self, until_lsn: int) -> Iterator[LoggedOperation]:
        if self._seen:
            return
        self._seen = until_lsn > 0
        yield from super().read(until_lsn)


class _FollowsWrongly(Plain):
    kind: type[FileFollower] = FileFollower

    def follow(self, after_lsn: int) -> LogFollower:
        files = self._start_of(after_lsn)
        return self.kind(self._folder, self._uuid, after_lsn, files)


class NeverSkips(_FollowsWrongly):
    kind = _NeverSkips


class SkipsTooMuch(_FollowsWrongly):
    kind = _SkipsTooMuch


class ReadsOn(_FollowsWrongly):
    kind = _ReadsOn


class LosesTheLastOfARun(FilePersistenceAdapter):
    def recover_alike(
        self, after_lsn: int, durable_lsn: int
    ) -> Iterator[LoggedOperation | LoggedRun]:
        return iter(list(super().recover_alike(after_lsn, durable_lsn))[:-1])


class _FollowsNoRuns(FileFollower):
    def read_alike(self, until_lsn: int) -> Iterator[LoggedOperation | LoggedRun]:
        return (
            found for found in super().read_alike(until_lsn) if not isinstance(found, LoggedRun)
        )


class FollowsNoRuns(_FollowsWrongly):
    kind = _FollowsNoRuns


class SeesNoGrowth(_FollowsWrongly):
    kind = _SeesNoGrowth


class HidesGaps(Plain):
    """Follows from the oldest log there is, whatever was asked."""

    def follow(self, after_lsn: int) -> LogFollower:
        try:
            return super().follow(after_lsn)
        except LogGone:
            chain = self._logs.chain(1 << 62)
            after_lsn = chain[min(chain)].previous_lsn
            return super().follow(after_lsn)


class AppendsOneByOne(Plain):
    def append(self, stamped: Sequence[Stamped], durable_lsn: int) -> list[Appended]:
        return [super(AppendsOneByOne, self).append([item], durable_lsn)[0] for item in stamped]


class RemembersItsOwnEnd(Plain):
    _end: tuple[int, int, int] | None = None

    def append(self, stamped: Sequence[Stamped], durable_lsn: int) -> list[Appended]:
        if self._end is not None:
            self._set_end(*self._end)
        places = super().append(stamped, durable_lsn)
        self._end = (self._words[0], self._words[1], self._words[2])
        return places


class RaisesRawErrors(Plain):
    def append(self, stamped: Sequence[Stamped], durable_lsn: int) -> list[Appended]:
        try:
            return super().append(stamped, durable_lsn)
        except StorageError as exc:
            raise OSError(exc.errno, "raw") from None


class TakesTornTailsForDamage(Plain):
    def recover(self, after_lsn: int, durable_lsn: int) -> Iterator[LoggedOperation]:
        yield from super().recover(after_lsn, durable_lsn)
        if self._reader.torn_bytes:
            raise CorruptionError("torn", path=self._folder)


class TakesDamageForTornTails(Plain):
    def recover(self, after_lsn: int, durable_lsn: int) -> Iterator[LoggedOperation]:
        try:
            yield from super().recover(after_lsn, durable_lsn)
        except CorruptionError:
            return


class ChangesWhatItRecovers(Plain):
    def recover(self, after_lsn: int, durable_lsn: int) -> Iterator[LoggedOperation]:
        yield from super().recover(after_lsn, durable_lsn)
        self._logs.trim(self._reader.number, self._reader.end)


class IgnoresWhatWasDurable(Plain):
    def recover(self, after_lsn: int, durable_lsn: int) -> Iterator[LoggedOperation]:
        return super().recover(after_lsn, 0)


class FindsNothing(Plain):
    def verify(self, until_lsn: int) -> Iterator[Problem]:
        return iter(())


class FindsTooMuch(Plain):
    def verify(self, until_lsn: int) -> Iterator[Problem]:
        yield from super().verify(until_lsn)
        yield Problem(str(self._folder), -1, "who knows", True)


class DropsLivePayloads(Plain):
    def drop_below(self, lsn: int, live_ids: Places, live_locations: Places) -> None:
        super().drop_below(lsn, live_ids[:0], live_locations[:0])


class MovesNothingAndDropsIt(DropsLivePayloads):
    def survivors(self, live_locations: Places, lengths: Lengths) -> NDArray[np.bool_]:
        return np.zeros(len(live_locations), bool)


class DropsTheOperationsBehind(Plain):
    def drop_below(self, lsn: int, live_ids: Places, live_locations: Places) -> None:
        super().drop_below(lsn + 8, live_ids, live_locations)


class NeverDrops(Plain):
    def drop_below(self, lsn: int, live_ids: Places, live_locations: Places) -> None:
        pass


class RetiresTooMuch(Plain):
    def retire(self, durable_lsn: int, keep_lsn: int, next_lsn: int) -> None:
        super().retire(durable_lsn, durable_lsn, next_lsn)


class RetiresTooLittle(Plain):
    def retire(self, durable_lsn: int, keep_lsn: int, next_lsn: int) -> None:
        chain = self._logs.chain(durable_lsn)
        last = max(
            found.header.lsn
            for found in self._logs.open(layout.DATA, max(chain)).frames(4096, 1 << 30, rows=False)
            if hasattr(found, "header")
        )
        super().retire(durable_lsn, max(keep_lsn, last), next_lsn)


class ForksBadly(Plain):
    def after_fork(self) -> None:
        super().after_fork()
        self._words[1] = 4096


class ServesOnlyItsFamily(Plain):
    """What it knows, forks inherit; a process that was started apart does not."""

    created: set[Path] = set()  # noqa: RUF012

    def create(self, lsn: int) -> None:
        super().create(lsn)
        self.created.add(self._folder)

    def attach(self) -> None:
        assert self._folder in self.created
        super().attach()


class WritesPastTheFileSystem(Plain):
    def __init__(self, settings: FileSettings, context: PersistenceContext) -> None:
        super().__init__(settings, dataclasses.replace(context, fs=FileSystem()))


class BelievesOnlyWhatWasSynced(Plain):
    def recover(self, after_lsn: int, durable_lsn: int) -> Iterator[LoggedOperation]:
        found = super().recover(after_lsn, durable_lsn)
        return (item for item in found if item.lsn <= durable_lsn)


class SharesOneFollower(Plain):
    _shared: LogFollower | None = None

    def follow(self, after_lsn: int) -> LogFollower:
        if self._shared is None:
            self._shared = super().follow(after_lsn)
        return self._shared


class _OldPlaces(LogFollower):
    def __init__(self, follower: LogFollower, places: dict[int, int]) -> None:
        self._follower, self._places = follower, places

    def read(self, until_lsn: int) -> Iterator[LoggedOperation]:
        for item in self._follower.read(until_lsn):
            yield item._replace(location=self._places.get(item.lsn, item.location))

    def skip(self, lsn: int, cursor: Any) -> None:
        self._follower.skip(lsn, cursor)


class FollowersKnowOldPlaces(Plain):
    """Where an operation lay before the log was retired is where they say it lies."""

    def __init__(self, settings: FileSettings, context: PersistenceContext) -> None:
        super().__init__(settings, context)
        self._places: dict[int, int] = {}

    def append(self, stamped: Sequence[Stamped], durable_lsn: int) -> list[Appended]:
        places = super().append(stamped, durable_lsn)
        pairs = zip(stamped, places, strict=True)
        self._places |= {item.lsn: place.location for item, place in pairs}
        return places

    def follow(self, after_lsn: int) -> LogFollower:
        return _OldPlaces(super().follow(after_lsn), self._places)


class _OneBuffer(Pin):
    def __init__(self, pin: Pin) -> None:
        self._pin, self._bytes = pin, bytearray(1 << 16)

    def read(self, i: int) -> Any:
        row = self._pin.read(i)
        self._bytes[: len(row)] = row
        return memoryview(self._bytes)[: len(row)]


class ReadsIntoOneBuffer(Plain):
    def pin(self, ids: Places, locations: Places, lengths: Lengths) -> Pin:
        return _OneBuffer(super().pin(ids, locations, lengths))


class DropsMoreWhenItFailed(Plain):
    def drop_below(self, lsn: int, live_ids: Places, live_locations: Places) -> None:
        try:
            super().drop_below(lsn, live_ids, live_locations)
        except StorageError:
            super().drop_below(lsn, live_ids[:0], live_locations[:0])


class ForgetsToClose(Plain):
    def finish(self, last_lsn: int) -> None:
        self.sync()


class CountsSurvivorsWrongly(Plain):
    def survivors(self, live_locations: Places, lengths: Lengths) -> NDArray[np.bool_]:
        return super().survivors(live_locations, lengths)[:-1]


class AcceptsStrangers(Plain):
    def __init__(self, settings: FileSettings, context: PersistenceContext) -> None:
        super().__init__(
            settings, PersistenceContext(context.path, bytes(range(16)), context.fs, context.words)
        )


class LeaksDescriptors(Plain):
    def attach(self) -> None:
        super().attach()

    def follow(self, after_lsn: int) -> LogFollower:
        os.open("/dev/null", os.O_RDONLY)
        return super().follow(after_lsn)


class TellsNoJson(Plain):
    def stats(self) -> dict[str, Any]:
        return {"files": np.int64(3)}


class LosesOnSwitching(Plain):
    def switch(self, next_lsn: int, durable_lsn: int) -> None:
        self._words[1] -= 8
        super().switch(next_lsn, durable_lsn)


class HastensByAppending(Plain):
    """What it wants to be written early it writes once more, wherever the log has got to."""

    _last: Sequence[Stamped] = ()

    def append(self, stamped: Sequence[Stamped], durable_lsn: int) -> list[Appended]:
        self._last = stamped
        return super().append(stamped, durable_lsn)

    def hasten(self) -> None:
        if self._last:
            super().append(self._last, 0)


class MovesPinsWithTheFile(Plain):
    """Locations are those of another file after a retirement."""

    def retire(self, durable_lsn: int, keep_lsn: int, next_lsn: int) -> None:
        super().retire(durable_lsn, keep_lsn, next_lsn)
        self._moved = True

    _moved = False

    def pin(self, ids: Places, locations: Places, lengths: Lengths) -> Pin:
        if not self._moved:
            return super().pin(ids, locations, lengths)
        number = self._words[0]
        file = self._logs.shared(layout.DATA, number)
        places = [place & ((1 << layout.OFFSET_BITS) - 1) for place in locations.tolist()]
        moved = [number << layout.OFFSET_BITS | place for place in places]
        return FilePin({number: file}, moved, lengths.tolist())


# Which test must catch it. Others may, too.
CAUGHT: list[tuple[type[PersistenceAdapter], str]] = [
    (SeesNoGrowth, "test_p8_another_adapter_joins"),
    (BelievesOnlyWhatWasSynced, "test_p13_a_killed_process"),
    (SharesOneFollower, "test_p15_syncs_beside_appends"),
    (FollowersKnowOldPlaces, "test_p18_locations_behind_a_retirement"),
    (ReadsIntoOneBuffer, "test_p26_any_thread_reads_a_pin"),
    (DropsMoreWhenItFailed, "test_p33_dropping_may_die"),
    (ForgetsToClose, "test_p35_a_missing_end_is_damage"),
    (CountsSurvivorsWrongly, "test_p38_survivors_move"),
    (RaisesRawErrors, "test_p40_a_full_disk"),
    (MovesNothingAndDropsIt, "test_p51_snapshots_and_eviction"),
    (SeesNoGrowth, "test_p52_processes_share_a_buffer"),
    (LosesTheLast, "test_p2_recovers_what_was_appended"),
    (LosesTheLastOfARun, "test_p2_operations_that_are_alike"),
    (FollowsNoRuns, "test_p2_operations_that_are_alike"),
    (SwapsOperations, "test_p2_recovers_what_was_appended"),
    (ForgetsIds, "test_p2_recovers_what_was_appended"),
    (FindsNothing, "test_p2_changed_content"),
    (TakesDamageForTornTails, "test_p2_changed_content"),
    (TakesTornTailsForDamage, "test_p3_a_torn_tail_is_left_out"),
    (IgnoresWhatWasDurable, "test_p4_missing_operations_are_damage"),
    (ChangesWhatItRecovers, "test_p5_recovering_changes_nothing"),
    (TruncatesBeforeItIsDurable, "test_p6_goes_on_behind_what_was_recovered"),
    (AppendsOneByOne, "test_p10_all_or_nothing"),
    (RaisesRawErrors, "test_p10_all_or_nothing"),
    (PinsAnotherRow, "test_p11_locations"),
    (RemembersItsOwnEnd, "test_p12_appends_alternate"),
    (DoesNotSync, "test_p14_power_losses"),
    (DoesNotSyncTheFolder, "test_p14_power_losses"),
    (SyncsOnlyTheCurrentFile, "test_p14_power_losses"),
    (SwallowsFailedSyncs, "test_p16_a_failing_sync_raises"),
    (RetiresTooMuch, "test_p17_retires"),
    (RetiresTooLittle, "test_p17_retires"),
    (MovesPinsWithTheFile, "test_p17_retires"),
    (HastensByAppending, "test_p19_hastens"),
    (ReadsOn, "test_p20_follows_from_anywhere"),
    (SeesNoGrowth, "test_p20_follows_as_it_grows"),
    (NeverSkips, "test_p22_skips_its_own"),
    (SkipsTooMuch, "test_p22_skips_its_own"),
    (HidesGaps, "test_p23_what_was_dropped_is_gone"),
    (PinsLazily, "test_p24_pins_outlive_what_they_pin"),
    (LosesOnSwitching, "test_p30_switches"),
    (DropsLivePayloads, "test_p32_keeps_what_is_needed"),
    (DropsTheOperationsBehind, "test_p32_keeps_what_is_needed"),
    (NeverDrops, "test_p32_a_steady_buffer_does_not_grow"),
    (FindsTooMuch, "test_p34_finds_nothing_where_nothing_is"),
    (LeaksDescriptors, "test_p36_closes_twice"),
    (TellsNoJson, "test_p37_facts_are_json"),
    (AcceptsStrangers, "test_p42_files_of_another_buffer"),
    (ForksBadly, "test_p44_a_forked_child"),
    (ServesOnlyItsFamily, "test_p45_a_stranger"),
    (WritesPastTheFileSystem, "test_p1_what_an_interrupted_creation_left_is_replaced"),
    (WritesPastTheFileSystem, "test_p10_all_or_nothing"),
    (LosesTheLast, "test_p50_a_buffer_that_is_killed"),
]


def suite_of(adapter: type[PersistenceAdapter]) -> PersistenceSuite:
    class Suite(PersistenceSuite):
        provider = PersistenceProvider(
            "planted",
            api_version=1,
            factory=adapter,
            settings=FileSettings,
            capabilities=frozenset({"durable", "multiprocess"}),
        )
        settings = SETTINGS

    return Suite()


@pytest.mark.parametrize(
    ("adapter", "test"),
    CAUGHT,
    ids=[f"{bug.__name__}-{test[5:].split('_')[0]}" for bug, test in CAUGHT],
)
def test_planted_bugs_are_caught(
    adapter: type[PersistenceAdapter], test: str, tmp_path: Path
) -> None:
    # `pytest.raises` within the suite fails with an exception of its own.
    with pytest.raises((Exception, pytest.fail.Exception)):
        getattr(suite_of(adapter), test)(tmp_path)


@pytest.mark.parametrize("test", sorted({test for _, test in CAUGHT}))
def test_a_provider_may_be_an_object(test: str, tmp_path: Path) -> None:
    getattr(suite_of(Sound), test)(tmp_path)


FAULTS = [
    "test_p1_what_an_interrupted_creation_left_is_replaced",
    "test_p10_all_or_nothing",
    "test_p16_a_failing_sync_raises",
    "test_p17_retiring_fails_anywhere",
    "test_p33_dropping_may_die",
    "test_p40_a_full_disk",
]


@pytest.mark.parametrize("test", FAULTS)
def test_faults_that_cannot_be_played_are_no_findings(test: str, tmp_path: Path) -> None:
    """A library that writes by itself is neither blamed nor praised for faults it never met."""
    suite = suite_of(WritesPastTheFileSystem)
    type(suite).writes_through_fs = False
    with pytest.raises(pytest.skip.Exception, match=r"by itself|through `context.fs`"):
        getattr(suite, test)(tmp_path)


class PlaysItsFaults(PersistenceSuite):
    """As the suite of a backend does whose library writes by itself."""

    settings = SETTINGS
    writes_through_fs = False

    @contextlib.contextmanager
    def failing_sync(
        self, fs: FaultyFileSystem, adapter: PersistenceAdapter, *, drop: bool
    ) -> Iterator[None]:
        def failing(*_: object) -> None:
            raise OSError(errno.EIO, "of the library's own")

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(FileSystem, "fdatasync", failing)
            yield


def test_a_library_may_play_its_faults_itself(tmp_path: Path) -> None:
    class Suite(PlaysItsFaults):
        provider = suite_of(WritesPastTheFileSystem).provider

    Suite().test_p16_a_failing_sync_raises(tmp_path)


def test_every_behaviour_has_a_bug() -> None:
    tested = {name.split("_")[1] for name in dir(PersistenceSuite) if name.startswith("test_p")}
    assert tested == {test.split("_")[1] for _, test in CAUGHT}


def test_every_test_states_its_number() -> None:
    names = [name for name in dir(PersistenceSuite) if name.startswith("test_")]
    assert len(names) > 40
    for name in names:
        number = name.split("_")[1].upper()
        first, _, _ = getattr(PersistenceSuite, name).__doc__.partition(": ")
        assert number in first.split(", "), name
