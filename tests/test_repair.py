"""`repair`: what is intact is saved, and what is reported lost is what was hit."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from expbuf_core import Experience, ExperienceBuffer, damaged_snapshots, snapshots
from expbuf_core import control as c
from expbuf_core.config_schema import load_config
from expbuf_core.contracts import Damage, PersistenceAdapter
from expbuf_core.damaged_snapshots import Remains
from expbuf_core.errors import CorruptionError, StorageError
from expbuf_core.filesystem import FileSystem
from expbuf_core.folder import read_identity
from expbuf_core.plugins import default_registry
from expbuf_core.repair import RepairReport, repair, shown
from expbuf_core.state import COLUMNS, State
from expbuf_core.testing.crash import scratch_folder
from expbuf_core.transfer import Storage
from expbuf_core.verification import verify

LONG = os.environ.get("EXPBUF_LONG", "") not in ("", "0")
DIM = 4
CONFIG: dict[str, Any] = {
    "max_size": 40,
    "index": {"backend": "exact", "builder": "off"},
    "persistence": {"file": {"initial_bytes": 1 << 14, "segment_bytes": 1 << 14}},
}

Facts = tuple[Any, ...]


def opened(folder: Path, **settings: Any) -> ExperienceBuffer:
    return ExperienceBuffer.open(folder, config=CONFIG, **settings)


def experience(serial: int, padding: int = 300) -> Experience:
    rng = np.random.default_rng(serial)
    return Experience(
        v_embed=rng.standard_normal(DIM).astype(np.float32),
        q_embed=rng.standard_normal(DIM).astype(np.float32),
        question="?" * padding,
        answer=f"answer {serial}",
        confidence=0.5,
        rewards={"correct": 0.25 * (serial % 4)},
        tags=("odd",) if serial % 2 else (),
        timestamp=1_700_000_000.0 + serial,
    )


def facts_of(item: Experience) -> Facts:
    """Everything about an experience."""
    return (
        item.answer,
        item.question,
        np.asarray(item.v_embed).tobytes(),
        np.asarray(item.q_embed).tobytes(),
        item.confidence,
        item.rewards if isinstance(item.rewards, float | None) else dict(item.rewards),
        item.tags,
        item.timestamp,
        item.priority,
        item.retrieval_count,
        item.success_count,
    )


def state_of(buffer: ExperienceBuffer) -> dict[int, Facts]:
    return {int(item.id or 0): facts_of(item) for item in buffer}


class Scene(NamedTuple):
    """A folder, what is in it, and ids of receipts."""

    folder: Path
    state: dict[int, Facts]
    counted: str
    fresh: str


def write_some(buffer: ExperienceBuffer, *, snapshot: bool) -> tuple[str, str]:
    for serial in range(18):
        buffer.add(experience(serial, 700))
    buffer.update_rewards([3, 4], [1.0, -2.0])
    if snapshot:
        buffer.save_snapshot()
    counted = str(buffer.search_index(v_embed=np.ones(DIM), k=3).receipt)
    assert buffer.record_outcome(counted, success=True) == 3
    buffer.remove([5])
    buffer.add_many([experience(serial) for serial in range(18, 24)])
    if snapshot:
        buffer.save_snapshot()
    buffer.update_priorities([7, 8], [3.0, 4.0])
    buffer.record_outcome([9], success=True)
    buffer.update_rewards([10], [{"late": 2.0}])
    for serial in range(24, 34):
        buffer.add(experience(serial, 900))
    return counted, str(buffer.search_index(v_embed=np.ones(DIM), k=2).receipt)


def make(folder: Path, *, snapshot: bool) -> Scene:
    with opened(folder) as buffer:
        receipts = write_some(buffer, snapshot=snapshot)
        state = state_of(buffer)
    return Scene(folder, state, *receipts)


def bare(scene: Scene) -> Scene:
    """Without index logs, which hold all operations a second time."""
    for path in scene.folder.glob("index_operations.*"):
        path.unlink()
    return scene


def killed(home: Path) -> Scene:
    """As a kill leaves it: with index logs, and without a LOG_END."""
    with opened(home / "live") as buffer:
        receipts = write_some(buffer, snapshot=True)
        state = state_of(buffer)
        buffer._live().upkeep.stop()  # so that no file comes or goes while they are copied
        shutil.copytree(home / "live", home / "killed")
    return Scene(home / "killed", state, *receipts)


@pytest.fixture(scope="module")
def scenes() -> Iterator[dict[str, Scene]]:
    home = scratch_folder()
    try:
        yield {
            "plain": make(home / "plain", snapshot=False),
            "bare": bare(make(home / "bare", snapshot=False)),
            "snapshot": make(home / "snapshot", snapshot=True),
            "killed": killed(home),
        }
    finally:
        shutil.rmtree(home)


@pytest.fixture
def home() -> Iterator[Path]:
    folder = scratch_folder()
    yield folder
    shutil.rmtree(folder)


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def ids_in(ranges: tuple[tuple[int, int], ...]) -> set[int]:
    return {id_ for first, last in ranges for id_ in range(first, last + 1)}


def repaired(
    scene: Scene, home: Path, damage: Callable[[Path], None]
) -> tuple[RepairReport, dict[int, Facts]]:
    """Damage a copy, repair it, and check what always holds."""
    folder = home / "buffer"
    for path in (folder, home / "buffer.repaired"):
        shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(scene.folder, folder)
    damage(folder)
    before = contents(folder)
    report = repair(folder)
    assert contents(folder) == before, "the damaged folder was changed"
    assert report.target == home / "buffer.repaired"
    assert not (report.target / "migration.json").exists()
    assert [problem for problem in verify(report.target) if problem.damage] == []
    with opened(report.target) as buffer:
        state = state_of(buffer)
        vectors = np.asarray([np.frombuffer(facts[2], np.float32) for facts in state.values()])
        new = buffer.add(experience(999))
        assert new > max([*scene.state, *state])
        assert len(buffer.search_index(v_embed=vectors[0], k=1)) == 1
    assert report.saved == len(state)
    lost, rebuilt = ids_in(report.lost_ids), ids_in(report.rebuilt_ids)
    missing = set(scene.state) - set(state)
    # A lost operation may have added experiences that another lost one has removed.
    assert missing <= lost if report.lost_lsns else missing == lost, f"{report}"
    if not report.lost_lsns:
        assert set(state) <= set(scene.state), "what was removed came back"
        wrong = [i for i in state if i not in rebuilt and state[i] != scene.state[i]]
        assert not wrong, f"{wrong}: {report}"
    for id_ in set(state) & set(scene.state):
        assert state[id_][:4] == scene.state[id_][:4], "another payload"
    return report, state


def flip(path: str, at: int, mask: int = 0x10) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        file = folder / path
        raw = bytearray(file.read_bytes())
        raw[at] ^= mask
        file.write_bytes(raw)

    return damage


def find(scene: Scene, text: bytes) -> tuple[str, int]:
    """File and offset of the only payload with this text."""
    for path in sorted(scene.folder.glob("experience_data.*.wal")):
        at = path.read_bytes().find(text)
        if at >= 0:
            return path.name, at
    raise AssertionError(f"{text!r} is nowhere")


# ---------------------------------------------------------------- damage of many kinds


@pytest.mark.parametrize("name", ["plain", "bare", "snapshot", "killed"])
def test_nothing_is_lost_where_nothing_is_damaged(
    scenes: dict[str, Scene], name: str, home: Path
) -> None:
    scene = scenes[name]
    report, state = repaired(scene, home, lambda folder: None)
    assert report.complete
    assert report.damage == ()
    assert state == scene.state
    with opened(report.target) as buffer:
        assert buffer.record_outcome(scene.counted, success=True) == 0
        assert buffer.record_outcome(scene.fresh, success=True) == 2


@pytest.mark.parametrize("name", ["plain", "bare", "snapshot", "killed"])
def test_a_flipped_byte_anywhere(scenes: dict[str, Scene], name: str, home: Path) -> None:
    scene, rng = scenes[name], random.Random(name)
    files = [path for path in contents(scene.folder) if not path.startswith("locks")]
    for _ in range(2000 if LONG else 40):
        path = rng.choice(files)
        raw = (scene.folder / path).read_bytes()
        at = rng.randrange(len(raw.rstrip(b"\0")) or 1)
        report, state = repaired(scene, home, flip(path, at, 1 << rng.randrange(8)))
        where = f"{name}: {path} at {at}: {report}"
        assert len(state) >= len(scene.state) - 6, where
        if not path.startswith("experience_data."):
            assert report.complete, where
            assert state == scene.state, where
        else:
            assert len(report.lost_lsns) <= 1, where


@pytest.mark.parametrize("name", ["plain", "bare", "snapshot", "killed"])
def test_a_damaged_payload_costs_that_experience(
    scenes: dict[str, Scene], name: str, home: Path
) -> None:
    path, at = find(scenes[name], b'"answer 12"')
    report, _ = repaired(scenes[name], home, flip(path, at))
    assert report.lost_ids == ((12, 12),)
    assert report.lost_lsns == ()
    assert report.rebuilt_ids == ()
    assert any(Path(place.path).name == path for place in report.damage)
    assert "lost experiences: ids 12\n" in str(report)
    assert not report.complete


def test_one_of_many_added_together_is_lost_alone(scenes: dict[str, Scene], home: Path) -> None:
    path, at = find(scenes["plain"], b'"answer 20"')
    report, _ = repaired(scenes["plain"], home, flip(path, at))
    assert report.lost_ids == ((20, 20),)


def frame_of(scene: Scene, text: bytes) -> tuple[str, int]:
    """File and offset of the frame around the payload with this text."""
    path, at = find(scene, text)
    return path, (scene.folder / path).read_bytes().rfind(b"EXPF", 0, at)


def test_a_damaged_body_is_rebuilt_from_the_payloads(scenes: dict[str, Scene], home: Path) -> None:
    scene = scenes["bare"]
    path, at = frame_of(scene, b'"answer 20"')
    report, state = repaired(scene, home, flip(path, at + 72 + 30))
    assert report.rebuilt_ids == ((18, 23),)
    assert report.lost_ids == ()
    assert state[20][5] == {"correct": 0.0}
    assert state[21][6] == ("odd",)
    assert f"ids {shown(((18, 23),))}" in str(report)


def test_a_damaged_body_is_taken_from_the_index_log(scenes: dict[str, Scene], home: Path) -> None:
    scene = scenes["killed"]
    path, at = frame_of(scene, b'"answer 33"')
    report, state = repaired(scene, home, flip(path, at + 72 + 30))
    assert report.complete
    assert report.damage
    assert state == scene.state


@pytest.mark.parametrize("at", [4, 8, 70])
def test_a_damaged_frame_header_costs_one_operation(
    scenes: dict[str, Scene], home: Path, at: int
) -> None:
    scene = scenes["bare"]
    path, begin = frame_of(scene, b'"answer 20"')
    report, _ = repaired(scene, home, flip(path, begin + at))
    assert report.lost_ids == ((18, 23),)
    ((first, last),) = report.lost_lsns
    assert first == last
    (place,) = (place for place in report.damage if place.first_lsn)
    assert (Path(place.path).name, place.offset) == (path, begin)


def test_an_update_that_is_lost_is_told(scenes: dict[str, Scene], home: Path) -> None:
    scene = scenes["bare"]
    path, begin = frame_of(scene, b'"answer 17"')
    raw = (scene.folder / path).read_bytes()
    after = raw.find(b"EXPF", begin + 4)
    report, state = repaired(scene, home, flip(path, after + 9))  # the rewards of 3 and 4
    assert report.lost_ids == ()
    assert len(report.lost_lsns) == 1
    assert state[3] != scene.state[3]
    assert {i: s for i, s in state.items() if i not in (3, 4)} == {
        i: s for i, s in scene.state.items() if i not in (3, 4)
    }


@pytest.mark.parametrize("name", ["plain", "bare", "snapshot", "killed"])
@pytest.mark.parametrize("at", [0, 10, 20, 40, 50, 64, 72])
def test_a_damaged_file_header_costs_nothing(
    scenes: dict[str, Scene], name: str, home: Path, at: int
) -> None:
    scene = scenes[name]
    for path in sorted(scene.folder.glob("experience_data.*.wal"))[:3]:
        report, state = repaired(scene, home, flip(path.name, at))
        if (
            48 <= at < 64
            and not (
                scene.folder / path.name.replace("experience_data", "index_operations")
            ).exists()
        ):
            continue  # the salt, which nothing else has
        assert report.complete, f"{path.name}: {report}"
        assert state == scene.state


@pytest.mark.parametrize("name", ["plain", "bare", "snapshot", "killed"])
def test_every_data_log_may_be_missing(scenes: dict[str, Scene], name: str, home: Path) -> None:
    scene = scenes[name]
    for path in sorted(scene.folder.glob("experience_data.*.wal")):
        if len([*path.parent.glob("experience_data.*.wal")]) < 2 or not any(
            path.read_bytes()[4096:]
        ):
            continue
        report, state = repaired(scene, home, lambda folder, n=path.name: (folder / n).unlink())  # type: ignore[misc]
        raw = path.read_bytes()
        held = {id_ for id_, facts in scene.state.items() if f'"{facts[0]}"'.encode() in raw}
        assert ids_in(report.lost_ids) == held & set(scene.state)
        assert set(state) >= set(scene.state) - held
        if held:
            assert any(path.name in place.message for place in report.damage), str(report)


@pytest.mark.parametrize("name", ["plain", "bare", "snapshot", "killed"])
def test_a_file_that_was_cut(scenes: dict[str, Scene], name: str, home: Path) -> None:
    scene, rng = scenes[name], random.Random(name)
    logs = sorted(scene.folder.glob("experience_data.*.wal"))
    for _ in range(100 if LONG else 10):
        path = rng.choice(logs)
        raw = path.read_bytes()
        at = rng.randrange(len(raw.rstrip(b"\0")))

        def cut(folder: Path, name: str = path.name, at: int = at) -> None:
            os.truncate(folder / name, at)

        report, state = repaired(scene, home, cut)
        whole = {
            id_
            for id_, facts in scene.state.items()
            if f'"{facts[0]}"'.encode() not in raw[max(0, at - 200) :]
        }
        assert whole <= set(state), f"{path.name} at {at}: {report}"


@pytest.mark.parametrize("name", ["snapshot", "killed"])
def test_both_snapshots_damaged(scenes: dict[str, Scene], name: str, home: Path) -> None:
    scene, rng = scenes[name], random.Random(name)
    assert len(snapshots.available(scene.folder)) == 2
    for _ in range(100 if LONG else 10):
        positions = [rng.random(), rng.random()]

        def damage(folder: Path, positions: list[float] = positions) -> None:
            for lsn, share in zip(snapshots.available(folder), positions, strict=True):
                file = snapshots.path_of(folder, lsn)
                raw = bytearray(file.read_bytes())
                raw[int(share * len(raw))] ^= 0x40
                file.write_bytes(raw)

        report, state = repaired(scene, home, damage)
        assert len([p for p in report.damage if p.path.endswith(".snap")]) == 2
        if not report.lost_lsns:
            assert state == scene.state


def test_snapshots_and_the_logs_behind_them_are_gone(scenes: dict[str, Scene], home: Path) -> None:
    """What is left is one log that begins in the middle, without any settings."""
    scene = scenes["snapshot"]
    last = sorted(scene.folder.glob("experience_data.*.wal"))[-1]

    def damage(folder: Path) -> None:
        shutil.rmtree(folder / "snapshots")
        for path in folder.glob("*.wal"):
            if path.name != last.name:
                path.unlink()

    report, state = repaired(scene, home, damage)
    assert state
    assert report.lost_lsns[0][0] == 1
    assert any("settings" in note for note in report.notes)
    held = {i for i, facts in scene.state.items() if f'"{facts[0]}"'.encode() in last.read_bytes()}
    assert set(state) == held


def test_columns_of_a_damaged_snapshot_are_used(home: Path) -> None:
    """Where the log before it is gone, a snapshot with a bad column is better than none."""
    with opened(home / "made") as buffer:
        for _ in range(4):
            for serial in range(20):
                buffer.add(experience(serial, 900))
            buffer.update_priorities(buffer.ids()[-20:], np.arange(1.0, 21.0))
            buffer.save_snapshot()
        state = state_of(buffer)
        lsn = buffer.lsn
    scene = Scene(home / "made", state, "", "")
    assert min(int(p.name.split(".")[1]) for p in scene.folder.glob("experience_data*")) > 1

    def damage(folder: Path) -> None:
        for each in snapshots.available(folder):
            file = snapshots.path_of(folder, each)
            raw = bytearray(file.read_bytes())
            raw[-1] ^= 1  # in the last column: live
            file.write_bytes(raw)

    report, found = repaired(scene, home, damage)
    assert report.snapshot_lsn == lsn
    assert found == state
    assert any("columns are lost: live" in note for note in report.notes)


def test_ids_that_were_skipped_push_no_lost_one_out(home: Path) -> None:
    """Numbers are skipped behind a writer that died: far more than the buffer holds."""
    with opened(home / "made") as buffer:
        buffer.add_many([experience(serial) for serial in range(10)])
        buffer.add_many([experience(serial) for serial in range(10, 13)])
        buffer.add(experience(13))
        buffer._live().control.words[c.APPENDING] = 1  # as an appender that died leaves it
        newest = buffer.add(experience(14))
        assert newest > 1 << 16
        state = state_of(buffer)
    scene = bare(Scene(home / "made", state, "", ""))

    def damage(folder: Path) -> None:
        path, at = frame_of(scene, b'"answer 11"')
        flip(path, at + 72 + 30)(folder)  # the body
        shutil.rmtree(folder / "snapshots")
        flip(*find(scene, b'"answer 11"'))(folder)
        path, at = frame_of(scene, b'"answer 13"')
        flip(path, at + 8)(folder)  # the operation

    report, state = repaired(scene, home, damage)
    assert set(scene.state) - set(state) == {11, 13}, f"{report} {sorted(state)}"
    assert {11, 13} <= ids_in(report.lost_ids), str(report)
    assert not {10, 12, newest} & ids_in(report.lost_ids)


def test_lost_ids_that_were_evicted_since_are_not_listed(home: Path) -> None:
    with opened(home / "made") as buffer:
        for serial in range(120):
            buffer.add(experience(serial, 1500))
        state = state_of(buffer)
    scene = bare(Scene(home / "made", state, "", ""))

    def damage(folder: Path) -> None:
        for serial in (5, 50, 100):
            path, at = frame_of(scene, b'"answer %d"' % serial)
            flip(path, at + 8)(folder)
        shutil.rmtree(folder / "snapshots", ignore_errors=True)

    report, _ = repaired(scene, home, damage)
    assert report.lost_ids == ((100, 100),)


def spoil(file: Path, names: Iterable[str]) -> None:
    """Damage these columns of a snapshot."""
    raw, header = bytearray(file.read_bytes()), snapshots._HEADER
    at = header.size + header.unpack_from(raw)[3]
    for name, (dtype, n, _) in json.loads(raw[header.size : at])["columns"].items():
        if name in names:
            raw[at] ^= 1
        at += np.dtype(dtype).itemsize * n
    file.write_bytes(raw)


SPOILED = [name for name in COLUMNS if name not in ("id", "location", "length")]
UPDATED = ("reward", "priority", "retrieval_count", "success_count", "flags")


@pytest.fixture(scope="module")
def updated() -> Iterator[Scene]:
    """Both snapshots are behind updates that the log no longer has."""
    home = scratch_folder()
    with opened(home / "updated") as buffer:
        for _ in range(6):
            ids = buffer.add_many([experience(serial, 900) for serial in range(30)])
            buffer.record_outcome(ids[:20], success=True)
            buffer.save_snapshot()
        buffer.update_rewards(ids[:10], [9.0] * 10)
        buffer.update_rewards(ids[10:20], [{"late": 2.0}] * 10)
        buffer.update_priorities(ids[5:15], [5.0] * 10)
        buffer.record_outcome(ids[15:25], success=False)
        for _ in range(3):
            buffer.save_snapshot()
            buffer.remove([buffer.add(experience(50))])
        buffer.save_snapshot()
        state = state_of(buffer)
    yield Scene(home / "updated", state, "", "")
    shutil.rmtree(home)


@pytest.mark.parametrize("name", [*SPOILED, "all"])
def test_whose_columns_are_lost_is_listed(updated: Scene, home: Path, name: str) -> None:
    names = SPOILED if name == "all" else [name]

    def damage(folder: Path) -> None:
        for lsn in snapshots.available(folder):
            spoil(snapshots.path_of(folder, lsn), names)

    report, state = repaired(updated, home, damage)  # whoever differs is in `rebuilt_ids`
    assert report.lost_ids == report.lost_lsns == ()
    assert set(state) == set(updated.state)
    updates_are_lost = name in (*UPDATED, "all")
    assert bool(report.rebuilt_ids) == updates_are_lost
    assert report.complete != updates_are_lost
    assert ("nothing was lost" in str(report)) == report.complete
    for id_, facts in state.items():  # what the log says of the add is right in any case
        assert facts[4] == updated.state[id_][4]
        assert facts[6:8] == updated.state[id_][6:8]
    if name == "flags":  # an updated total is known by what it is not
        assert state == updated.state


@pytest.mark.parametrize("name", ["snapshot", "killed"])
@pytest.mark.parametrize("column", [*SPOILED, "all"])
def test_lost_columns_are_found_in_the_log(
    scenes: dict[str, Scene], home: Path, name: str, column: str
) -> None:
    """All of them, where it is whole up to the snapshot."""
    folder = home / "buffer"
    shutil.copytree(scenes[name].folder, folder)
    names = SPOILED if column == "all" else [column]
    for intact, remains in spoiled_and_read(folder, names):
        assert set(remains.lost) == set(names)
        assert columns_of(remains.state) == columns_of(intact)
        assert remains.state.receipts == intact.receipts
        assert remains.unknown.tolist() == []


def spoiled_and_read(folder: Path, names: Sequence[str]) -> Iterator[tuple[State, Remains]]:
    """Each snapshot as it was, and what is left of it without these columns or any payload."""
    identity = read_identity(folder)
    assert identity is not None
    storage = Storage.choose(default_registry(), "file", load_config({}, env={}))
    adapter = storage.open(folder, identity.uuid, FileSystem(), writable=False)
    with contextlib.closing(adapter):
        for lsn in snapshots.available(folder):
            intact, file = (
                snapshots.read(folder, lsn, identity.uuid),
                snapshots.path_of(folder, lsn),
            )
            spoil(file, names)
            remains = damaged_snapshots.read(
                file, lambda: adapter.salvage(0), lambda state, ids: iter([None] * len(ids))
            )
            assert remains is not None
            yield intact, remains


def test_outcomes_of_receipts_that_are_forgotten_are_not_certain(home: Path) -> None:
    """Nothing says whether they counted: another outcome of the same receipt may have."""
    with opened(home / "buffer", receipts_kept=1) as buffer:
        buffer.add_many([experience(serial) for serial in range(9)])
        found = [buffer.search_index(v_embed=experience(n).v_embed, k=2) for n in (1, 2)]
        for result in (*found, found[1]):
            buffer.record_outcome(result.receipt, success=True)
        buffer.save_snapshot()
    first = set(found[0].ids.tolist())
    ((intact, remains),) = spoiled_and_read(home / "buffer", ["retrieval_count"])
    assert columns_of(remains.state) == columns_of(intact)
    assert set(remains.unknown.tolist()) == first


def columns_of(state: State) -> dict[str, list[Any]]:
    columns = {name: getattr(state, name)[: state.count].tolist() for name in COLUMNS}
    return {**columns, "tags": [state.tag_sets[code] for code in columns["tags"]]}


# ---------------------------------------------------------------- identity, control page, index


@pytest.mark.parametrize("name", ["plain", "bare", "snapshot", "killed"])
def test_without_identity_control_page_locks_and_index(
    scenes: dict[str, Scene], name: str, home: Path
) -> None:
    scene = scenes[name]

    def damage(folder: Path) -> None:
        (folder / "expbuf.json").unlink()
        (folder / "control").write_bytes(os.urandom(4096))
        shutil.rmtree(folder / "locks")
        (folder / "index").mkdir(exist_ok=True)
        (folder / "index" / "manifest.json").write_text("{")

    report, state = repaired(scene, home, damage)
    assert state == scene.state
    assert [Path(place.path).name for place in report.damage] == ["expbuf.json"]
    with opened(report.target) as buffer:  # the same UUID: receipts are valid
        assert buffer.record_outcome(scene.counted, success=True) == 0
        assert buffer.record_outcome(scene.fresh, success=True) == 2


def test_a_damaged_identity_is_not_believed(scenes: dict[str, Scene], home: Path) -> None:
    scene = scenes["plain"]

    def damage(folder: Path) -> None:
        file = folder / "expbuf.json"
        text = file.read_text()
        digit = text.split('"uuid": "')[1][0]
        file.write_text(
            text.replace(f'"uuid": "{digit}', f'"uuid": "{"0" if digit > "0" else "1"}')
        )

    report, state = repaired(scene, home, damage)
    assert state == scene.state
    assert report.uuid in (scene.folder / "expbuf.json").read_text()


@pytest.mark.parametrize("name", ["plain", "bare", "snapshot", "killed"])
def test_the_identity_of_another_buffer_is_not_believed(
    scenes: dict[str, Scene], name: str, home: Path
) -> None:
    """All other files contradict it."""
    scene = scenes[name]
    opened(home / "another").close()

    def damage(folder: Path) -> None:
        shutil.copyfile(home / "another" / "expbuf.json", folder / "expbuf.json")

    report, state = repaired(scene, home, damage)
    assert state == scene.state
    assert report.uuid in (scene.folder / "expbuf.json").read_text()
    assert [Path(place.path).name for place in report.damage] == ["expbuf.json"]


def test_what_is_no_buffer(home: Path) -> None:
    with pytest.raises(StorageError, match="no folder"):
        repair(home / "nothing")
    (home / "empty").mkdir()
    with pytest.raises(StorageError, match="identity is lost"):
        repair(home / "empty")
    assert sorted(path.name for path in home.iterdir()) == ["empty"]


# ---------------------------------------------------------------- the rest


def test_a_torn_tail_is_no_loss(scenes: dict[str, Scene], home: Path) -> None:
    """On another machine nothing says that the last bytes were durable."""
    scene = scenes["killed"]

    def damage(folder: Path) -> None:
        (folder / "control").unlink()
        for path in folder.glob("index_operations.*"):
            path.unlink()
        last = max(
            folder.glob("experience_data.*.wal"), key=lambda p: b"answer 33" in p.read_bytes()
        )
        raw = bytearray(last.read_bytes())
        raw[raw.rfind(b"EXPF") + 20] ^= 1
        last.write_bytes(raw)

    folder = home / "buffer"
    shutil.copytree(scene.folder, folder)
    damage(folder)
    report = repair(folder)
    assert report.lost_lsns == ()
    assert any("torn tail" in note for note in report.notes)
    with opened(report.target) as buffer:
        assert set(scene.state) - set(buffer.ids().tolist()) == {max(scene.state)}
        assert buffer.add(experience(1)) > max(scene.state), "an id is never given twice"


def test_the_last_operation_was_durable(scenes: dict[str, Scene], home: Path) -> None:
    """The same bytes are damage where the control page says so."""
    scene = scenes["bare"]
    path, begin = frame_of(scene, b'"answer 33"')
    report, _ = repaired(scene, home, flip(path, begin + 20))
    assert len(report.lost_lsns) == 1
    assert report.lost_ids == ((max(scene.state), max(scene.state)),)


def test_a_buffer_in_use_is_left_alone(home: Path) -> None:
    with opened(home / "live") as buffer:
        buffer.add(experience(1))
        with pytest.raises(StorageError, match=f"open in process {os.getpid()}"):
            repair(home / "live")


def test_the_target_must_be_free(scenes: dict[str, Scene], home: Path) -> None:
    folder = scenes["plain"].folder
    (home / "taken").mkdir()
    (home / "taken" / "letter.txt").write_text("dear")
    with pytest.raises(StorageError, match="holds other files"):
        repair(folder, home / "taken")
    with pytest.raises(StorageError, match="one must not be, or hold, the other"):
        repair(folder, folder / "inside")
    report = repair(folder, home / "fine")
    with pytest.raises(StorageError, match="holds a buffer already"):
        repair(folder, home / "fine")
    assert report.complete


def test_a_repair_that_was_killed_begins_anew(scenes: dict[str, Scene], home: Path) -> None:
    code = (
        "import os, signal, sys\n"
        "from expbuf_core.repair import repair\n"
        "repair(sys.argv[1], sys.argv[2],\n"
        "       progress=lambda done, total: os.kill(os.getpid(), signal.SIGKILL))\n"
    )
    folder, target = str(scenes["plain"].folder), home / "target"
    done = subprocess.run([sys.executable, "-c", code, folder, str(target)], check=False)
    assert done.returncode == -signal.SIGKILL
    with pytest.raises(StorageError, match=f"is no buffer yet.*expbuf repair {folder} {target}`"):
        opened(target)
    assert repair(folder, target).complete
    with contextlib.closing(opened(target)) as buffer:
        assert state_of(buffer) == scenes["plain"].state


def test_a_repair_that_was_killed_at_its_end_begins_anew(
    scenes: dict[str, Scene], home: Path
) -> None:
    """What it had saved may be less than what is there by now."""
    scene, folder = scenes["bare"], home / "buffer"

    class Killed(BaseException):
        pass

    class KilledAtTheEnd(FileSystem):
        def unlink(self, path: Path) -> None:
            if path.name == "migration.json":
                raise Killed
            super().unlink(path)

    shutil.copytree(scene.folder, folder)
    aside = find(scene, b'"answer 20"')[0]
    (folder / aside).rename(home / aside)
    with pytest.raises(Killed):
        repair(folder, filesystem=KilledAtTheEnd())
    (home / aside).rename(folder / aside)
    report = repair(folder)
    with opened(report.target) as buffer:
        assert state_of(buffer) == scene.state
    assert (report.saved, report.complete) == (len(scene.state), True)


def test_a_backend_without_a_salvage_of_its_own_stops_at_damage() -> None:
    class Stub:
        salvage = PersistenceAdapter.salvage

        def recover(self, after_lsn: int, durable_lsn: int) -> Iterator[Any]:
            yield from ()
            raise CorruptionError("bad", path="file", offset=7)

    found = list(Stub().salvage(3))  # type: ignore[arg-type]
    assert found == [Damage("file", 7, 4, 4, "bad"), Damage("file", 7, 5, 0, "bad")]
    assert PersistenceAdapter.identify(Stub()) == b""  # type: ignore[arg-type]
