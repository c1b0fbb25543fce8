"""`expbuf repair` of LMDB: what is intact anywhere is saved, the rest is named."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from expbuf_core import Experience, ExperienceBuffer
from expbuf_core.contracts import Damage
from expbuf_core.errors import StorageError
from expbuf_core.repair import RepairReport, repair
from expbuf_core.testing.crash import scratch_folder
from expbuf_core.testing.persistence_log import Core, Place, operation
from expbuf_core.verification import verify
from expbuf_lmdb import layout
from expbuf_lmdb.adapter import LMDBPersistenceAdapter
from expbuf_lmdb.pages import PageFile

LONG = os.environ.get("EXPBUF_LONG", "") not in ("", "0")
SMALL = {"map_bytes": 1 << 20, "stage_bytes": 1 << 14}
CONFIG: dict[str, Any] = {
    "max_size": 40,
    "index": {"backend": "exact", "builder": "off"},
    "persistence": {"backend": "lmdb", "lmdb": SMALL},
}
Facts = tuple[Any, ...]


class Scene(NamedTuple):
    """A folder, what is in it, and each payload as it was stored."""

    folder: Path
    state: dict[int, Facts]
    rows: dict[int, bytes]


def experience(serial: int, padding: int) -> Experience:
    rng = np.random.default_rng(serial)
    return Experience(
        v_embed=rng.standard_normal(4).astype(np.float32),
        q_embed=rng.standard_normal(4).astype(np.float32),
        question="?" * padding,
        answer=f"answer {serial}",
        confidence=0.5,
        rewards={"correct": 0.25 * (serial % 4)},
    )


def state_of(buffer: ExperienceBuffer) -> dict[int, Facts]:
    return {
        int(item.id or 0): (
            item.answer,
            item.question,
            np.asarray(item.v_embed).tobytes(),
            item.total_reward,
            item.priority,
            item.retrieval_count,
        )
        for item in buffer
    }


def rows_of(buffer: ExperienceBuffer) -> dict[int, bytes]:
    session = buffer._live()
    state = session.replica.state
    slots = state.live_slots()
    ids = state.id[slots]
    pin = session.adapter.pin(ids, state.location[slots], state.length[slots])
    return {id_: bytes(pin.read(i)) for i, id_ in enumerate(ids.tolist())}


def make(folder: Path, *, snapshot: bool, killed: bool) -> Scene:
    with ExperienceBuffer.open(folder, config=CONFIG) as buffer:
        for serial in range(18):
            buffer.add(experience(serial, 700))
        if snapshot:
            buffer.save_snapshot()
        buffer.update_rewards([3, 4], [1.0, -2.0])
        buffer.remove([5])
        buffer.add_many([experience(serial, 300) for serial in range(18, 24)])
        if snapshot:
            buffer.save_snapshot()
        buffer.update_priorities([7, 8], [3.0, 4.0])
        for serial in range(24, 34):
            # Some in pages of their own, some beside others.
            buffer.add(experience(serial, 5000 if serial % 3 else 900))
        buffer.record_outcome([9], success=True)
        made = Scene(folder, state_of(buffer), rows_of(buffer))
        if killed:
            buffer._live().upkeep.stop()
            shutil.copytree(folder, folder.with_name("killed"))
            return made._replace(folder=folder.with_name("killed"))
    return made


@pytest.fixture(scope="module")
def scenes() -> Iterator[dict[str, Scene]]:
    home = scratch_folder()
    try:
        yield {
            "plain": make(home / "plain", snapshot=False, killed=False),
            "snapshot": make(home / "snapshot", snapshot=True, killed=False),
            "killed": make(home / "live", snapshot=True, killed=True),
        }
    finally:
        shutil.rmtree(home)


@pytest.fixture
def home() -> Iterator[Path]:
    folder = scratch_folder()
    yield folder
    shutil.rmtree(folder)


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


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
    report = repair(folder, config={"persistence": CONFIG["persistence"]})
    assert contents(folder) == before, "the damaged folder was changed"
    assert [problem for problem in verify(report.target) if problem.damage] == []
    with ExperienceBuffer.open(report.target) as buffer:
        state = state_of(buffer)
        assert buffer.add(experience(99, 1)) > max([*scene.state, *state])
    lost, rebuilt = ids_in(report.lost_ids), ids_in(report.rebuilt_ids)
    missing = set(scene.state) - set(state)
    assert missing <= lost if report.lost_lsns else missing == lost, f"{report}"
    for id_ in set(state) & set(scene.state):
        assert state[id_][:3] == scene.state[id_][:3], "another payload"
        if not report.lost_lsns and id_ not in rebuilt:
            assert state[id_] == scene.state[id_], f"{id_}: {report}"
    if missing:
        # A payload that is whole anywhere is saved, wherever the trees lead. (Where its operation
        # is lost, too, nothing is left that tells it from one that was removed.)
        left = b"".join(before.get(folder / name, b"") for name in (layout.DATA, layout.STAGE))
        whole = {id_ for id_ in missing if scene.rows[id_] in left}
        assert not whole or report.lost_lsns, f"{whole} could be saved: {report}"
        assert report.damage
    return report, state


def changed(name: str, change: Callable[[bytearray], None]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        raw = bytearray((folder / name).read_bytes())
        change(raw)
        (folder / name).write_bytes(raw)

    return damage


def overwritten(raw: bytearray, what: bytes) -> None:
    """Damage every copy of these bytes."""
    at = raw.find(what)
    while at >= 0:
        raw[at] ^= 0x55
        at = raw.find(what)


# ---------------------------------------------------------------- damage of many kinds


@pytest.mark.parametrize("name", ["plain", "snapshot", "killed"])
def test_nothing_is_lost_where_nothing_is_damaged(
    scenes: dict[str, Scene], name: str, home: Path
) -> None:
    report, state = repaired(scenes[name], home, lambda folder: None)
    assert report.complete
    assert report.damage == ()
    assert state == scenes[name].state


@pytest.mark.parametrize("name", ["plain", "snapshot", "killed"])
@pytest.mark.parametrize("kind", ["bit", "sector", "page"])
def test_damage_anywhere(scenes: dict[str, Scene], name: str, kind: str, home: Path) -> None:
    scene, rng = scenes[name], random.Random(name + kind)
    for _ in range(300 if LONG else 4):
        file = rng.choice((layout.DATA, layout.DATA, layout.DATA, layout.STAGE))
        size = len((scene.folder / file).read_bytes().rstrip(b"\0"))
        at = rng.randrange(size)

        def change(raw: bytearray, at: int = at) -> None:
            if kind == "bit":
                raw[at] ^= 1 << rng.randrange(8)
            elif kind == "sector":
                raw[at // 512 * 512 : at // 512 * 512 + 512] = bytes(512)
            else:
                raw[at // 4096 * 4096 : at // 4096 * 4096 + 4096] = rng.randbytes(4096)

        report, state = repaired(scene, home, changed(file, change))
        assert len(state) >= len(scene.state) - 8, f"{file} at {at}: {report}"


@pytest.mark.parametrize("name", ["plain", "snapshot", "killed"])
def test_both_first_pages_are_gone(scenes: dict[str, Scene], name: str, home: Path) -> None:
    """No tree can be found; everything else is where it was."""

    def change(raw: bytearray) -> None:
        raw[:8192] = random.Random(0).randbytes(8192)

    report, state = repaired(scenes[name], home, changed(layout.DATA, change))
    assert report.complete
    assert state == scenes[name].state
    assert any(
        "first page" in place.message or "page size" in place.message for place in report.damage
    )


@pytest.mark.parametrize("table", [layout.META, layout.OPERATIONS, layout.ROWS])
def test_the_root_of_a_table_is_gone(scenes: dict[str, Scene], table: bytes, home: Path) -> None:
    scene = scenes["snapshot"]
    file = PageFile(scene.folder / layout.DATA)
    root = file._roots[table]
    file.close()

    def change(raw: bytearray) -> None:
        raw[root * 4096 : root * 4096 + 4096] = bytes(4096)

    report, state = repaired(scene, home, changed(layout.DATA, change))
    (place,) = (each for each in report.damage if f"page {root} " in each.message)
    assert place.offset == root * 4096
    assert Path(place.path).name == layout.DATA
    assert len(state) >= len(scene.state) - 8


def test_a_file_that_was_cut(scenes: dict[str, Scene], home: Path) -> None:
    for name, scene in scenes.items():
        rng = random.Random(name)
        size = (scene.folder / layout.DATA).stat().st_size
        for _ in range(30 if LONG else 2):
            length = rng.randrange(20_000, size)
            repaired(scene, home, lambda folder, n=length: os.truncate(folder / layout.DATA, n))  # type: ignore[misc]


def test_what_lmdb_lost_comes_from_the_stage(scenes: dict[str, Scene], home: Path) -> None:
    """What was stored last stands in the stage as well, until that is begun anew."""
    scene = scenes["killed"]

    def change(raw: bytearray) -> None:
        overwritten(raw, scene.rows[33][:64])
        overwritten(raw, scene.rows[32][:64])

    report, state = repaired(scene, home, changed(layout.DATA, change))
    assert report.complete
    assert state == scene.state


def test_a_damaged_body_is_rebuilt_from_the_payloads(scenes: dict[str, Scene], home: Path) -> None:
    scene = scenes["plain"]
    place = Place(home, "lmdb", SMALL, name="look")
    shutil.copytree(scene.folder, place.folder, dirs_exist_ok=True)
    uuid = repair_uuid(scene)
    reader = place.adapter(writable=False, uuid=uuid)
    bodies = {logged.first_id: bytes(logged.body) for logged in reader.recover(0, 0)}
    place.close()
    report, state = repaired(
        scene, home, changed(layout.DATA, lambda raw: overwritten(raw, bodies[18]))
    )
    assert report.rebuilt_ids == ((18, 23),)
    assert report.lost_ids == ()
    assert set(state) == set(scene.state)


def repair_uuid(scene: Scene) -> bytes:
    place = Place(scene.folder.parent, "lmdb", SMALL, name=scene.folder.name)
    found = place.adapter(writable=False, uuid=bytes(16)).identify()
    place.close()
    return found


# ---------------------------------------------------------------- what tells whose it is


def test_without_an_identity(scenes: dict[str, Scene], home: Path) -> None:
    """The header tells it; where that is gone, too, the stage does."""
    scene = scenes["snapshot"]
    for headers in (True, False):

        def damage(folder: Path, headers: bool = headers) -> None:
            (folder / "expbuf.json").unlink()
            if not headers:
                changed(layout.DATA, lambda raw: overwritten(raw, layout.HEADER_MAGIC))(folder)

        report, state = repaired(scene, home, damage)
        assert (report.backend, report.complete) == ("lmdb", True)
        assert state == scene.state


def test_whose_frames_they_are_is_lost(scenes: dict[str, Scene], home: Path) -> None:
    """Without the salt no operation proves itself; what snapshots say is saved all the same."""

    def damage(folder: Path) -> None:
        changed(layout.DATA, lambda raw: overwritten(raw, layout.HEADER_MAGIC))(folder)
        (folder / layout.STAGE).unlink()

    report, state = repaired(scenes["snapshot"], home, damage)
    assert report.snapshot_lsn > 0
    assert {id_ for id_ in scenes["snapshot"].state if id_ < 24} <= set(state)
    assert report.lost_lsns
    folder = home / "plain"
    shutil.copytree(scenes["plain"].folder, folder)
    damage(folder)
    with pytest.raises(StorageError, match="neither a snapshot nor any operation"):
        repair(folder)


def test_without_the_environment(scenes: dict[str, Scene], home: Path) -> None:
    """What is left then are the newest operations, in the stage."""
    scene = scenes["killed"]
    report, state = repaired(scene, home, lambda folder: (folder / layout.DATA).unlink())
    assert any("cannot open" in place.message for place in report.damage)
    assert 33 in state


def test_snapshots_are_gone(home: Path) -> None:
    """The operations that they replaced were dropped: payloads are all that is left of them."""
    folder = home / "made"
    with ExperienceBuffer.open(folder, config=CONFIG) as buffer:
        for start in range(0, 80, 20):
            for serial in range(start, start + 20):
                buffer.add(experience(serial, 900))
            buffer.save_snapshot()
        scene = Scene(folder, state_of(buffer), rows_of(buffer))
    report, state = repaired(scene, home, lambda folder: shutil.rmtree(folder / "snapshots"))
    assert report.lost_lsns[0][0] == 1
    assert ids_in(report.rebuilt_ids)
    assert set(scene.state) <= set(state), "an experience whose payload is whole was not saved"


# ---------------------------------------------------------------- the log


def salvaged(core: Core) -> list[Any]:
    adapter = core.place.adapter(writable=False)
    assert isinstance(adapter, LMDBPersistenceAdapter)
    found = list(adapter.salvage(0))
    adapter.close()
    return found


def test_what_was_given_up_stays_given_up(tmp_path: Path) -> None:
    """Pages that no tree leads to still hold it; and the numbers between are not missing."""
    core = Core(Place(tmp_path, "lmdb", SMALL)).create()
    for _ in range(6):
        core.extend(8).sync()
        for lost in range(core.last - 3, core.last + 1):
            del core.wrote[lost]
        core.adapter.retire(core.last, core.last, core.next_lsn + 3)
        core.next_lsn += 3
        core.extend(2)
    core.sync()
    core.adapter.close()
    file = core.place.folder / layout.DATA
    raw = bytearray(file.read_bytes())
    reader = PageFile(file)
    root = reader._roots[layout.ROWS]
    reader.close()
    raw[root * 4096 : root * 4096 + 4096] = bytes(4096)
    file.write_bytes(raw)
    found = salvaged(core)
    operations = [item for item in found if not isinstance(item, Damage)]
    core.agree(operations, payloads=())
    assert all(item.first_lsn == 0 for item in found if isinstance(item, Damage))


def test_a_torn_tail_is_told_as_one(tmp_path: Path) -> None:
    core = Core(Place(tmp_path, "lmdb", SMALL)).create().extend(5).sync()
    core.append(operation(core.next_lsn, 3, body_bytes=900))
    core.adapter.close()
    stage = core.place.folder / layout.STAGE
    raw = bytearray(stage.read_bytes())
    raw[len(raw.rstrip(b"\0")) - 12] ^= 1  # in the last row
    stage.write_bytes(raw)
    *operations, last = salvaged(core)
    assert [item.lsn for item in operations] == [1, 2, 3, 4, 5]
    assert isinstance(last, Damage)
    assert (last.first_lsn, last.torn) == (6, True)
