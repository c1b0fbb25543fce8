"""Files that the disk does not give back, and things that stand in the place of files."""

from __future__ import annotations

import errno
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from module_helpers import (
    DIM,
    OpenBuffer,
    add_all,
    answers,
    columns,
    expected,
    experience,
    find,
    finds,
)

from expbuf_core.backup import backup
from expbuf_core.errors import CorruptionError, StorageError
from expbuf_core.exchange import export_experiences
from expbuf_core.repair import repair
from expbuf_core.testing.faults import unreadable
from expbuf_core.verification import verify

SECTOR = 512


@pytest.fixture
def made(open_buffer: OpenBuffer, folder: Path) -> Path:
    """A folder of 18 experiences: two snapshots, an index, and a log behind."""
    with open_buffer() as buffer:
        add_all(buffer, range(6))
        buffer.save_snapshot()
        add_all(buffer, range(6, 12))
        buffer.rebuild_index()
        buffer.save_snapshot()
        add_all(buffer, range(12, 18))
    return folder


def newest(folder: Path, pattern: str) -> Path:
    return max(folder.glob(pattern))


def told(folder: Path) -> list[tuple[str | None, int]]:
    return [(problem.path, problem.offset) for problem in verify(folder) if problem.damage]


@pytest.mark.parametrize("offset", [0, 4096, 4608])
def test_a_log_that_cannot_be_read_is_damage(
    made: Path, open_buffer: OpenBuffer, offset: int
) -> None:
    """Opening says where, verifying finds it, repairing saves the rest."""
    log = newest(made, "experience_data.*")
    with unreadable(log, offset, SECTOR):
        for mode in ("a", "r"):
            with pytest.raises(CorruptionError, match=r"cannot read .*: Input/output") as caught:
                open_buffer(mode=mode)
            assert (caught.value.path, caught.value.offset) == (str(log), offset)
        assert (str(log), offset) in told(made)
        report = repair(made)
    assert any(place.path == str(log) and place.offset == offset for place in report.damage)
    gone = {id_ for a, b in report.lost_ids for id_ in range(a, b + 1)}
    assert report.saved == 18 - len(gone)
    assert bool(gone) == (offset > 0)  # a header can be made good
    with open_buffer() as again:  # nothing was changed
        assert answers(again) == expected(range(18))


def test_reading_ahead_into_what_cannot_be_read_is_no_damage(
    made: Path, open_buffer: OpenBuffer
) -> None:
    """What lies behind the end of the log was wanted by nobody."""
    with open_buffer() as buffer:
        buffer.add_many({"v_embed": [[1.0] * 6] * 2, "q_embed": [[1.0] * 6] * 2})
        log = newest(made, "experience_data.*")
        end = len(log.read_bytes().rstrip(b"\0")) // SECTOR * SECTOR + SECTOR
        with unreadable(log, end), open_buffer(mode="r") as reader:
            assert len(reader) == 20


def test_a_torn_tail_that_cannot_be_read_may_be_none(made: Path, open_buffer: OpenBuffer) -> None:
    """Opening drops nothing that it cannot look at; repairing tells that there may be more."""
    log = newest(made, "experience_data.*")
    raw = log.read_bytes()
    last = raw.rindex(b"EXPF", 0, raw.rindex(b"EXPF"))  # the last operation, before the end mark
    start = -(-last // SECTOR) * SECTOR
    (made / "control").unlink()
    with unreadable(log, start):
        with pytest.raises(CorruptionError, match="cannot read"):
            open_buffer()
        report = repair(made)
    assert not report.complete or any("torn tail" in note for note in report.notes)


def test_a_payload_that_cannot_be_read(made: Path, open_buffer: OpenBuffer) -> None:
    log = next(log for log in made.glob("*.wal") if b"answer 0" in log.read_bytes())
    offset = log.read_bytes().index(b"answer 0")
    with open_buffer() as buffer, unreadable(log, offset, 1):
        with pytest.raises(CorruptionError, match="cannot read") as caught:
            answers(buffer)
        assert caught.value.path == str(log)
        assert offset - SECTOR < (caught.value.offset or 0) <= offset
        assert any(place == str(log) for place, _ in told(made))


@pytest.mark.parametrize("which", [0, 1])
def test_one_of_two_snapshots_that_cannot_be_read(
    made: Path, open_buffer: OpenBuffer, which: int
) -> None:
    snapshot = sorted(made.glob("snapshots/*.snap"))[which]
    with unreadable(snapshot, SECTOR):
        assert told(made) == [(str(snapshot), SECTOR)]
        with open_buffer(mode="r") as buffer:
            assert answers(buffer) == expected(range(18))
            assert len(buffer.recovery.warnings) == which  # the newer one is passed over
        assert repair(made).saved == 18


def test_a_snapshot_that_cannot_be_opened_now_is_not_passed_over(
    made: Path, open_buffer: OpenBuffer
) -> None:
    """Too many open files are no damage."""
    snapshot = newest(made, "snapshots/*.snap")
    with unreadable(snapshot, error=errno.EMFILE):
        with pytest.raises(StorageError, match="Too many open files") as caught:
            open_buffer()
        assert not isinstance(caught.value, CorruptionError)


def test_an_identity_that_cannot_be_read(made: Path, open_buffer: OpenBuffer) -> None:
    identity = made / "expbuf.json"
    with unreadable(identity):
        with pytest.raises(CorruptionError, match="cannot read"):
            open_buffer()
        assert told(made) == [(str(identity), 0)]
        report = repair(made)
    assert (report.saved, report.complete) == (18, True)
    assert [place.path for place in report.damage] == [str(identity)]


def test_a_missing_identity_is_damage(made: Path, open_buffer: OpenBuffer) -> None:
    identity = made / "expbuf.json"
    identity.unlink()
    for mode in ("r", "a"):
        with pytest.raises(CorruptionError, match=r"expbuf\.json") as caught:
            open_buffer(mode=mode)
        assert (caught.value.path, caught.value.offset) == (str(identity), 0)
    assert told(made) == [(str(identity), 0)]
    assert repair(made).saved == 18


# ---------------------------------------------------------------- the index


def itself(path: Path) -> None:
    path.symlink_to(path.name)


def nowhere(path: Path) -> None:
    path.symlink_to(path.name + ".gone")


def nothing_in_it(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize(
    ("name", "instead"),
    [
        (name, instead)
        for name in ("manifest.json", "*.vectors", "*.exact", "")
        for instead in (Path.mkdir, itself, nowhere, nothing_in_it, os.mkfifo)
        if name or instead is not nowhere  # the place that a link names may come back
    ],
)
def test_something_else_in_the_place_of_the_index_costs_no_data(
    made: Path,
    open_buffer: OpenBuffer,
    name: str,
    instead: Callable[[Path], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It is told, searches are exact, and building it again replaces what stands there."""
    path = next((made / "index").glob(name)) if name else made / "index"
    if not name:
        shutil.rmtree(path)
    else:
        path.unlink()
    instead(path)
    with caplog.at_level(logging.WARNING, "expbuf"), open_buffer(mode="r") as reader:
        assert all(finds(reader, i) for i in range(18))
    assert ("the index is not used" in caplog.text) != (name == "" and instead is Path.mkdir)
    assert told(made) == []
    with open_buffer() as buffer:
        assert all(finds(buffer, i) for i in range(18))
        assert buffer.rebuild_index()
    caplog.clear()
    with caplog.at_level(logging.WARNING, "expbuf"), open_buffer() as again:
        assert again.stats()["index"]["segments"]
        assert all(finds(again, i) for i in range(18))
    assert caplog.text == ""


@pytest.mark.parametrize("pattern", ["manifest.json", "*.vectors", "*.exact"])
def test_an_index_that_cannot_be_read(
    made: Path, open_buffer: OpenBuffer, pattern: str, caplog: pytest.LogCaptureFixture
) -> None:
    with unreadable(newest(made, f"index/{pattern}")):
        assert [problem.damage for problem in verify(made)] == [False]
        with caplog.at_level(logging.WARNING, "expbuf"), open_buffer() as buffer:
            assert "the index is not used and will be built again: cannot read" in caplog.text
            assert all(finds(buffer, i) for i in range(18))
            assert buffer.rebuild_index()


def test_an_intact_index_file_of_another_buffer_is_not_searched(
    folder: Path, open_buffer: OpenBuffer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its own checksums are right, and so are rows and dimension."""
    index = {"index__backend": "faiss_cpu", "index__faiss_cpu__flat_below": 100}
    for path, first in ((folder, 0), (tmp_path / "another", 1000)):
        with open_buffer(path, **index) as buffer:
            buffer.add_many(columns(range(first, first + 300)))
            assert buffer.rebuild_index()
    shutil.copyfile(
        newest(tmp_path / "another", "index/*.faiss_cpu"), newest(folder, "index/*.faiss_cpu")
    )
    for mode in ("r", "a"):
        with caplog.at_level(logging.WARNING, "expbuf"), open_buffer(mode=mode, **index) as buffer:
            assert "the index is not used" in caplog.text
            assert np.allclose([find(buffer, i)[0].similarity for i in range(300)], 1.0, atol=1e-5)
        caplog.clear()


def scribble(vectors: Path) -> None:
    """As a disk that gives back something else when it reads a page again."""
    with open(vectors, "r+b") as file:
        file.seek(-DIM * 4, os.SEEK_END)
        file.write(np.full(DIM, 3.0, np.float32).tobytes())


@pytest.mark.parametrize("anew", [False, True])
def test_a_segment_that_changes_while_it_is_open_is_not_built_upon(
    folder: Path, open_buffer: OpenBuffer, anew: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Its mapping shows the change; a new segment would give it a right checksum."""
    with open_buffer() as buffer:
        add_all(buffer, range(12))
        assert buffer.rebuild_index()
        scribble(newest(folder, "index/*.vectors"))
        if anew:  # another process has met it
            with open_buffer():
                pass
        add_all(buffer, range(12, 18))
        with caplog.at_level(logging.WARNING, "expbuf"):
            assert buffer.rebuild_index()
        assert "made anew from the payloads" in caplog.text
        assert all(finds(buffer, i) for i in range(18))
    caplog.clear()
    with caplog.at_level(logging.WARNING, "expbuf"), open_buffer() as again:
        assert all(finds(again, i) for i in range(18))
        assert np.allclose([find(again, i)[0].similarity for i in range(18)], 1.0)
    assert caplog.text == ""


def test_a_segment_that_changes_while_it_is_open_is_not_copied(
    folder: Path, open_buffer: OpenBuffer, tmp_path: Path
) -> None:
    """A copy logs fused vectors: what is wrong there would be searched for long."""
    target = tmp_path / "copy"
    with open_buffer() as buffer:
        add_all(buffer, range(12))
        assert buffer.rebuild_index()
        vectors = newest(folder, "index/*.vectors")
        good = vectors.read_bytes()
        scribble(vectors)
        with pytest.raises(CorruptionError, match="has changed since it was opened") as caught:
            backup(buffer, target)
        assert caught.value.path == str(vectors)
        with pytest.raises(StorageError, match="unfinished copy"):
            open_buffer(target, mode="r")
        vectors.write_bytes(good)
        assert backup(buffer, target).experiences == 12
    with open_buffer(target) as copy:
        assert np.allclose([find(copy, i)[0].similarity for i in range(12)], 1.0)


def test_too_many_open_files_say_nothing_of_the_index(made: Path, open_buffer: OpenBuffer) -> None:
    full = unreadable(made / "index" / "manifest.json", error=errno.EMFILE)
    with full, pytest.raises(StorageError, match="Too many open files"):
        open_buffer()


# ---------------------------------------------------------------- what is no file


@pytest.mark.parametrize("instead", [Path.mkdir, itself, nowhere, os.mkfifo])
@pytest.mark.parametrize("name", ["expbuf.json", "experience_data.*"])
def test_something_else_in_the_place_of_a_file_is_damage(
    made: Path, open_buffer: OpenBuffer, name: str, instead: Callable[[Path], None]
) -> None:
    """Nobody waits for a FIFO to be written to."""
    path = newest(made, name)
    path.unlink()
    instead(path)
    for mode in ("a", "r"):
        with pytest.raises(CorruptionError) as caught:
            open_buffer(mode=mode)
        assert caught.value.path == str(path)
    assert (str(path), 0) in told(made)
    report = repair(made)
    assert report.saved == (18 if name == "expbuf.json" else 12)
    assert any(place.path == str(path) for place in report.damage)


@pytest.mark.parametrize("instead", [Path.mkdir, itself, nowhere, os.mkfifo])
def test_something_else_in_the_place_of_an_index_log_costs_no_data(
    made: Path, open_buffer: OpenBuffer, instead: Callable[[Path], None]
) -> None:
    path = newest(made, "index_operations.*")
    path.unlink()
    instead(path)
    for mode in ("r", "a"):
        with open_buffer(mode=mode) as buffer:
            assert answers(buffer) == expected(range(18))
            assert buffer.stats()
    assert not os.path.lexists(path)


@pytest.mark.parametrize("instead", [itself, os.mkfifo, Path.mkdir])
@pytest.mark.parametrize("name", ["control", "locks/open", "locks/append", "locks"])
def test_something_else_where_processes_meet(
    made: Path, open_buffer: OpenBuffer, name: str, instead: Callable[[Path], None]
) -> None:
    """Writing is not possible then; what is stored is not touched, and can be saved."""
    path = made / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    instead(path)
    if (name, instead) != ("locks", Path.mkdir):
        with pytest.raises(StorageError, match=str(path)) as caught:
            open_buffer()
        assert not isinstance(caught.value, CorruptionError)
    assert told(made) in ([], [(str(path), 0)])
    assert repair(made).saved == 18


@pytest.mark.parametrize("instead", [itself, nothing_in_it])
def test_something_else_in_the_place_of_the_snapshots(
    folder: Path, open_buffer: OpenBuffer, instead: Callable[[Path], None]
) -> None:
    """The log alone will do, where nothing was dropped from it."""
    with open_buffer() as buffer:
        add_all(buffer, range(6))
        buffer.save_snapshot()
    place = folder / "snapshots"
    shutil.rmtree(place)
    instead(place)
    with open_buffer(mode="r") as buffer:
        assert answers(buffer) == expected(range(6))
        assert str(place) in buffer.recovery.warnings[0]
    assert told(folder) == [(str(place), 0)]
    report = repair(folder)
    assert (report.saved, report.complete) == (6, True)
    assert [place.path for place in report.damage] == [str(place)]


def test_a_folder_in_the_place_of_a_snapshot(made: Path, open_buffer: OpenBuffer) -> None:
    """It is damage of that one, and goes with it."""
    oldest = min(made.glob("snapshots/*.snap"))
    oldest.unlink()
    oldest.mkdir()
    with open_buffer() as buffer:
        assert answers(buffer) == expected(range(18))
        for serial in (18, 19):
            add_all(buffer, range(serial, serial + 1))
            buffer.save_snapshot()
    assert not oldest.exists()


@pytest.mark.parametrize("instead", [itself, nowhere, os.mkfifo])
def test_something_else_in_the_place_of_a_snapshot(
    made: Path, open_buffer: OpenBuffer, instead: Callable[[Path], None]
) -> None:
    """It is passed over: also a link to nothing, which is listed and cannot be opened."""
    snapshot = newest(made, "snapshots/*.snap")
    snapshot.unlink()
    instead(snapshot)
    assert told(made) == [(str(snapshot), 0)]
    for mode in ("r", "a"):
        with open_buffer(mode=mode) as buffer:
            assert answers(buffer) == expected(range(18))
            assert snapshot.name in buffer.recovery.warnings[0]
    assert repair(made).saved == 18


def without_the_first_log(folder: Path, open_buffer: OpenBuffer) -> Path:
    """Three experiences in snapshots, and a log for each, of which the first goes."""
    for serial in range(3):
        with open_buffer() as buffer:
            buffer.add(experience(serial, question="?" * 9000))
            buffer.rebuild_index()
            buffer.save_snapshot()
    log = min(folder.glob("experience_data.*"))
    log.unlink()
    return log


@pytest.mark.parametrize("instead", [itself, nowhere])
def test_opening_does_not_look_at_a_log_that_snapshots_cover(
    folder: Path, open_buffer: OpenBuffer, instead: Callable[[Path], None]
) -> None:
    """Who looks at the payloads in it is told."""
    log = without_the_first_log(folder, open_buffer)
    instead(log)
    for mode in ("r", "a"):
        with open_buffer(mode=mode) as buffer:
            assert len(buffer) == 3
            with pytest.raises(CorruptionError) as caught:
                answers(buffer)
            assert caught.value.path == str(log)
    assert (str(log), 0) in told(folder)


def test_a_missing_log_is_named_by_all_who_need_it(
    folder: Path, open_buffer: OpenBuffer, tmp_path: Path
) -> None:
    """No one takes its payloads for evicted ones, or says more of them than is known."""
    log = without_the_first_log(folder, open_buffer)
    with open_buffer() as buffer:
        for use in (
            lambda: buffer.get(0),
            lambda: answers(buffer),
            lambda: buffer.sample(64),
            lambda: find(buffer, 0, k=3),
            lambda: buffer.update_rewards([0, 2], [1.0, 1.0]),
            lambda: buffer.reembed(lambda parts: {"v_embed": [part.v_embed for part in parts]}),
            lambda: backup(buffer, tmp_path / "copy"),
            lambda: export_experiences(buffer, tmp_path / "exported"),
        ):
            with pytest.raises(CorruptionError, match=f"{log.name}: missing") as caught:
                use()
            assert caught.value.path == str(log)
        assert buffer.get(2).answer == "answer 2"
    assert [place for place, _ in told(folder)] == [str(log)]
    shutil.rmtree(folder / "index")
    with pytest.raises(CorruptionError, match=f"{log.name}: missing"):
        open_buffer()


# ---------------------------------------------------------------- what nobody has written


def too_deep(path: Path) -> None:
    path.write_bytes(b"[" * 100_000)


def too_large_a_number(path: Path) -> None:
    path.write_bytes(b'{"format": 1e999, "manifest": {"lsn": 1e999}, "crc": 1e999}')


def no_object(path: Path) -> None:
    path.write_bytes(b"null")


def beyond_memory(path: Path) -> None:
    os.truncate(path, 1 << 42)


@pytest.mark.usefixtures("little_memory")
@pytest.mark.parametrize("change", [too_deep, too_large_a_number, no_object, beyond_memory])
@pytest.mark.parametrize("name", ["expbuf.json", "index/manifest.json"])
def test_a_document_that_nobody_has_written(
    made: Path, open_buffer: OpenBuffer, name: str, change: Callable[[Path], None]
) -> None:
    """A checksum can be compared only behind the parser, which believes what it reads."""
    change(made / name)
    for mode in ("r", "a"):
        if name == "expbuf.json":
            with pytest.raises(CorruptionError) as caught:
                open_buffer(mode=mode)
            assert (caught.value.path, caught.value.offset) == (str(made / name), 0)
        else:
            with open_buffer(mode=mode) as buffer:
                assert all(finds(buffer, i) for i in range(18))
    assert repair(made).saved == 18


@pytest.mark.parametrize("pattern", ["experience_data.*", "*.vectors", "*.exact", "*.faiss_cpu"])
def test_a_file_beyond_all_disks_is_not_read_to_its_end(
    folder: Path, open_buffer: OpenBuffer, pattern: str
) -> None:
    """How long it is stands elsewhere, behind a checksum; the file system need not be right."""
    index = {"index__backend": "faiss_cpu"} if pattern.endswith("faiss_cpu") else {}
    with open_buffer(**index) as buffer:
        add_all(buffer, range(6))
        buffer.rebuild_index()
    beyond_memory(newest(folder, f"**/{pattern}"))
    assert told(folder) == []
    assert repair(folder).saved == 6
    for mode in ("r", "a"):
        with open_buffer(mode=mode, **index) as buffer:
            assert all(finds(buffer, i) for i in range(6))


@pytest.mark.usefixtures("little_memory")
def test_a_snapshot_beyond_all_memory(made: Path, open_buffer: OpenBuffer) -> None:
    """Its own tree says how long it is, behind a checksum; the file system need not be right."""
    snapshot = newest(made, "snapshots/*.snap")
    size = snapshot.stat().st_size
    beyond_memory(snapshot)
    assert told(made) == [(str(snapshot), size)]
    for mode in ("r", "a"):
        with open_buffer(mode=mode) as buffer:
            assert answers(buffer) == expected(range(18))
    for each in made.glob("snapshots/*.snap"):
        beyond_memory(each)
    report = repair(made)
    assert (report.saved, report.rebuilt_ids) == (18, ())
