"""Another fusion, metric, index or embedding: the end is the buffer that it would have been."""

from __future__ import annotations

import os
import random
import signal
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from module_helpers import (
    CONFIG,
    DIM,
    OpenBuffer,
    Worker,
    add_all,
    columns,
    contents,
    experience,
    find,
    finds,
    run_forked,
    vector,
)
from numpy.typing import NDArray

from expbuf_core import Experience, ExperienceBuffer, codec, indexing, reindexing, segments
from expbuf_core import control as c
from expbuf_core.commit import Draft
from expbuf_core.contracts import LogGone
from expbuf_core.errors import (
    ConfigError,
    CorruptionError,
    DimensionError,
    InvalidExperience,
    LockTimeout,
    StorageError,
)
from expbuf_core.filesystem import FileSystem
from expbuf_core.locks import ProcessLock
from expbuf_core.reindexing import reindex
from expbuf_core.repair import repair
from expbuf_core.session import CHANGING, Outdated
from expbuf_core.testing.crash import explore
from expbuf_core.testing.recording import RecordingFileSystem
from expbuf_core.transfer import migrate
from expbuf_core.verification import verify

LONG = os.environ.get("EXPBUF_LONG", "") not in ("", "0")
NEW_DIM = 9
SWAPPED = {
    "backend": "weighted_sum",
    "weighted_sum": {"visual_weight": 0.2, "question_weight": 0.8},
}
CHANGES: dict[str, dict[str, Any]] = {
    "weights": {"fusion": SWAPPED},
    "fusion": {"fusion": "weighted_concat"},
    "metric": {"embedding.metric": "l2"},
    "both": {"fusion": "weighted_concat", "embedding.metric": "inner_product"},
}


def serial_of(item: Experience) -> int:
    return int(str(item.answer).split()[1])


def new_parts(serial: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    return vector(serial + 2_000_000, NEW_DIM), vector(serial + 3_000_000, NEW_DIM)


def embed(items: Sequence[Experience]) -> dict[str, Any]:
    """Another model."""
    parts = [new_parts(serial_of(item)) for item in items]
    return {"v_embed": [v for v, _ in parts], "q_embed": np.stack([q for _, q in parts])}


def renewed(serial: int, **fields: Any) -> Experience:
    v, q = new_parts(serial)
    return experience(serial, v_embed=v, q_embed=q, **fields)


def finds_renewed(buffer: ExperienceBuffer, serial: int) -> bool:
    v, q = new_parts(serial)
    hits = buffer.search_index(v_embed=v, q_embed=q, k=1)
    return len(hits) == 1 and hits[0].experience.answer == f"answer {serial}"


def live_through(buffer: ExperienceBuffer, make: Any = experience) -> None:
    """Everything that one can do to a buffer; 27 experiences are left."""
    for serial in range(20):
        buffer.add(
            make(serial, rewards={"x": 0.5} if serial % 2 else None, tags=(f"t{serial % 3}",))
        )
    buffer.add_many([make(serial, trajectory=[np.arange(3), b"raw"]) for serial in range(20, 34)])
    buffer.remove([7, 8, 33])
    buffer.update_priorities([4, 5], [9.0, 8.0])
    buffer.update_rewards([6], [{"late": 2.0}])
    buffer.update_priorities([6], [0.5])  # that of a later reward goes by the clock


OLD_QUESTIONS = [
    {"v_embed": vector(i), "q_embed": vector(i + 1_000_000)} for i in (3, 9, 25, 32, 77)
]
NEW_QUESTIONS = [
    dict(zip(("v_embed", "q_embed"), new_parts(i), strict=True)) for i in range(0, 40, 9)
]


class Known:
    """What a buffer holds and answers; equal but for rounding."""

    def __init__(self, buffer: ExperienceBuffer, questions: Any) -> None:
        items = [
            (item.tags, item.rewards, repr(item.trajectory), np.asarray(item.q_embed).tobytes())
            for item in buffer
        ]
        found = [buffer.search_index(**question, k=6) for question in questions]
        self.exact = (contents(buffer), items, [[hit.id for hit in hits] for hits in found])
        self.similarities = [[hit.similarity for hit in hits] for hits in found]

    def __eq__(self, other: object) -> bool:
        assert isinstance(other, Known)
        return self.exact == other.exact and np.allclose(self.similarities, other.similarities)


# ---------------------------------------------------------------- the end state


@pytest.mark.parametrize("change", list(CHANGES))
@pytest.mark.parametrize("indexed", [False, True])
def test_reindex(open_buffer: OpenBuffer, folder: Path, change: str, indexed: bool) -> None:
    buffer = open_buffer(max_size=30)
    live_through(buffer)
    if indexed:
        buffer.rebuild_index()
    buffer.add(experience(34))
    receipt = str(find(buffer, 3, k=3).receipt)
    report = reindex(folder, config=CONFIG, **CHANGES[change])
    assert (report.representation, report.experiences) == (1, len(buffer))

    fresh = open_buffer(folder.with_name("fresh"), max_size=30, **CHANGES[change])
    live_through(fresh)
    fresh.add(experience(34))
    assert Known(buffer, OLD_QUESTIONS) == Known(fresh, OLD_QUESTIONS)
    assert buffer.record_outcome(receipt, success=True) == 3, "receipts stay valid"
    assert [buffer.add(experience(i)) for i in (35, 36)] == [35, 36]
    assert finds(buffer, 36)
    buffer.rebuild_index()
    assert finds(buffer, 36)
    assert finds(buffer, 34)
    buffer.close()
    with ExperienceBuffer.open(folder, max_size=30) as again:
        assert finds(again, 35)
        assert again.stats()["settings"]["representation"] == 1
    assert not [problem for problem in verify(folder) if problem.damage]


@pytest.mark.parametrize("where", ["file", "memory"])
def test_reembed(open_buffer: Any, folder: Path, where: str) -> None:
    buffer = open_buffer(max_size=30) if where == "file" else open_buffer.memory(max_size=30)
    live_through(buffer)
    receipt = find(buffer, 3, k=3).receipt
    steps: list[tuple[str, int, int]] = []
    report = buffer.reembed(embed, batch_size=5, progress=lambda *step: steps.append(step))
    assert (report.representation, report.experiences, report.resumed) == (1, 27, 0)
    assert ("embed", 27, 27) in steps

    fresh = open_buffer(folder.with_name("fresh"), max_size=30)
    live_through(fresh, renewed)
    assert Known(buffer, NEW_QUESTIONS) == Known(fresh, NEW_QUESTIONS)
    assert buffer.record_outcome(receipt, success=True) == 3
    with pytest.raises(DimensionError, match=f"dimension {NEW_DIM}"):
        buffer.add(experience(50))
    assert buffer.add(renewed(50)) == 34
    assert finds_renewed(buffer, 50)


def test_a_part_that_is_left_out_stays(open_buffer: OpenBuffer) -> None:
    buffer = open_buffer()
    buffer.add_many(columns(range(5)))
    buffer.reembed(lambda items: {"q_embed": [vector(serial_of(x) + 9, DIM) for x in items]})
    item = buffer.get(3)
    assert np.array_equal(item.v_embed, vector(3))
    assert np.array_equal(item.q_embed, vector(12))
    hits = buffer.search_index(v_embed=vector(3), q_embed=vector(12), k=1)
    assert hits[0].id == 3


def test_another_index(open_buffer: OpenBuffer, folder: Path) -> None:
    pytest.importorskip("faiss")
    buffer = open_buffer()
    buffer.add_many(columns(range(40)))
    buffer.rebuild_index()
    report = reindex(folder, config=CONFIG, **{"index.backend": "faiss_cpu"})
    assert report.representation == 0, "the vectors are the same"
    buffer.close()
    again = open_buffer()
    assert [item["backend"] for item in again.stats()["index"]["segments"]] == ["faiss_cpu"]
    assert finds(again, 17)


def test_nothing_to_be_changed(open_buffer: OpenBuffer, folder: Path) -> None:
    empty = open_buffer()
    assert empty.reembed(embed).representation == 0
    assert reindex(folder, config=CONFIG, fusion="weighted_concat").representation == 1
    empty.add(experience(1))
    assert find(empty, 1)[0].similarity == pytest.approx(1.0)
    assert empty.stats()["settings"]["fusion"]["name"] == "weighted_concat"
    with pytest.raises(StorageError, match="no buffer"):
        reindex(folder.with_name("nowhere"), fusion="weighted_concat")


def test_change_after_change(open_buffer: OpenBuffer, folder: Path) -> None:
    buffer = open_buffer()
    buffer.add_many(columns(range(30)))
    buffer.rebuild_index()
    assert reindex(folder, config=CONFIG, fusion="weighted_concat").representation == 1
    assert buffer.reembed(embed).representation == 2
    assert reindex(folder, config=CONFIG, **CHANGES["weights"]).representation == 3
    assert all(finds_renewed(buffer, serial) for serial in range(30))
    names = sorted(os.listdir(folder / segments.FOLDER))
    assert names == ["3"], "of other representations nothing is left"


# ---------------------------------------------------------------- others meanwhile


def test_another_process_meets_it(open_buffer: OpenBuffer, folder: Path) -> None:
    buffer = open_buffer()
    buffer.add_many(columns(range(30)))
    with Worker(folder) as worker:
        assert worker("finds(buffer, 3)")
        reindex(folder, config=CONFIG, fusion="weighted_concat")
        assert worker("finds(buffer, 3)")
        assert worker("buffer.add(experience(30))") == 30
        assert finds(buffer, 30)
        buffer.reembed(embed)
        with pytest.raises(RuntimeError, match="DimensionError"):
            worker("buffer.add(experience(31))")
        assert worker("len(buffer)") == 31
    with ExperienceBuffer.open(folder, mode="r") as reader:
        assert finds_renewed(reader, 30)


def test_a_reader_follows(open_buffer: OpenBuffer, folder: Path) -> None:
    buffer = open_buffer()
    buffer.add_many(columns(range(30)))
    with ExperienceBuffer.open(folder, mode="r") as reader:
        assert finds(reader, 3)
        buffer.reembed(embed)
        assert finds_renewed(reader, 3)


@pytest.mark.parametrize("backend", ["file", "lmdb"])
def test_the_log_is_given_up_behind_two_changes(
    open_buffer: OpenBuffer, folder: Path, backend: str
) -> None:
    """Where payloads are now, a replica does not ask operations from before the last change."""
    pytest.importorskip(f"expbuf_{backend}")
    settings = {"persistence": {"backend": backend}}
    buffer, idle = open_buffer(**settings), open_buffer(**settings)
    buffer.add_many(columns(range(5)))
    buffer.reembed(embed)
    reindex(folder, config=CONFIG, fusion="weighted_concat")
    joined = open_buffer(**settings)
    assert len(idle) == len(joined) == 5
    buffer._live().control.words[c.FLUSHING] = 1  # as one leaves it who dies in a sync
    buffer.add(renewed(5))
    for replica in (buffer, idle, joined):
        for serial, item in enumerate(replica):
            assert np.array_equal(np.asarray(item.v_embed), new_parts(serial)[0])
    for _ in range(2):  # then logs go that nobody seems to need
        joined.save_snapshot()
        buffer.add(renewed(6))
    joined.save_snapshot()
    assert not list(verify(folder))
    with ExperienceBuffer.open(folder, mode="r") as reader:
        assert all(finds_renewed(reader, serial) for serial in range(6))


def test_a_replica_that_starts_anew_meets_it(
    open_buffer: OpenBuffer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It looked before the change, what it looked for is gone, and it looks again behind it."""
    buffer, other = open_buffer(), open_buffer()
    buffer.add_many(columns(range(30)))
    session = buffer._live()
    fill, filled = session.replica.fill, []

    def gone(refuse: Any) -> int:
        filled.append(refuse)
        if len(filled) == 1:
            other.reembed(embed)
            raise LogGone
        return fill(refuse)

    monkeypatch.setattr(session.replica, "fill", gone)
    session._start_anew()
    assert len(filled) > 1
    assert finds_renewed(buffer, 3)
    buffer.add(renewed(30))
    assert finds_renewed(other, 30)


def test_the_first_intake_is_of_one_representation(
    open_buffer: OpenBuffer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dimensions, fusion and number are read while no other thread can apply a change."""
    buffer = open_buffer()
    session, locked = buffer._live(), []
    follow = session._follow_fusion

    def watched() -> None:
        locked.append(session.replica.lock._is_owned())  # type: ignore[attr-defined]
        follow()

    monkeypatch.setattr(session, "_follow_fusion", watched)
    buffer.add(experience(0))
    assert locked
    assert all(locked)


def test_what_comes_while_it_is_made(open_buffer: OpenBuffer, folder: Path) -> None:
    """An add while embeddings are made is embedded, too."""
    buffer, other = open_buffer(), open_buffer()
    buffer.add_many(columns(range(10)))
    seen: list[int] = []

    def and_add(items: Sequence[Experience]) -> dict[str, Any]:
        if not seen:
            other.add(experience(10))
            other.remove([2])
        seen.extend(serial_of(item) for item in items)
        return embed(items)

    assert buffer.reembed(and_add, batch_size=3).experiences == 10
    assert sorted(seen) in ([*range(11)], [0, 1, *range(3, 11)])
    assert finds_renewed(other, 10)
    assert 2 not in buffer


def test_an_add_that_was_overtaken_is_made_again(open_buffer: OpenBuffer, folder: Path) -> None:
    buffer = open_buffer()
    buffer.add_many(columns(range(10)))
    session = buffer._live()
    intake = session.intake()
    assert intake is not None
    late = intake.one(experience(10), None)
    reindex(folder, config=CONFIG, fusion="weighted_concat")
    with pytest.raises(Outdated):
        session.commit(late)

    # The same where it had looked before the change began, and came behind it.
    lsn, first_id = session.commit_log.commit(intake.one(experience(10), None))
    for _ in range(2):  # threads whose additions were one operation ask one after the other
        with pytest.raises(Outdated):
            session._check_overtaken(lsn, first_id, 1)
    assert len(buffer) == 10
    assert buffer.add(experience(10)) == 11, "the id was given, and is not given again"
    assert finds(buffer, 10)
    buffer.close()
    with ExperienceBuffer.open(folder) as again:
        assert again.ids().tolist() == [*range(10), 11]
        assert finds(again, 10)


@pytest.mark.parametrize("backend", ["file", "lmdb"])
@pytest.mark.parametrize("overtaken", [True, False])
def test_an_add_that_was_overtaken_and_is_in_a_snapshot_before_its_writer_looks(
    open_buffer: OpenBuffer, folder: Path, backend: str, overtaken: bool
) -> None:
    """Its operation is gone from the log, and the snapshot has only what became of it."""
    pytest.importorskip(f"expbuf_{backend}")
    settings = {"persistence": {"backend": backend, "lmdb": {"stage_bytes": 1 << 14}}}
    buffer, other = open_buffer(**settings), open_buffer(**settings)
    buffer.add_many(columns(range(10)))
    buffer.save_snapshot()
    session = other._live()
    intake = session.intake()
    assert intake is not None
    drafts = [intake.many([experience(serial) for serial in (10, 11)], None)]
    if overtaken:
        reindex(folder, config=CONFIG, fusion="weighted_concat")
    lsn, first_id = session.commit_log.commit(drafts.pop())
    reindex(folder, config=CONFIG, fusion="weighted_sum")
    for serial in range(12, 16):
        buffer.remove([buffer.add(experience(serial, question="?" * 9000))])
        buffer.save_snapshot()
    if overtaken:
        with pytest.raises(Outdated):
            session._check_overtaken(lsn, first_id, 2)
    else:
        session._check_overtaken(lsn, first_id, 2)
    assert session.replica.began > lsn
    assert (first_id in other) is (first_id + 1 in other) is not overtaken


@pytest.mark.parametrize("change", ["fusion", "dimensions"])
def test_what_was_submitted_before_the_change(
    open_buffer: OpenBuffer, folder: Path, change: str
) -> None:
    """It was accepted for a representation that the buffer has left when it is written."""
    buffer = open_buffer()
    buffer.add_many(columns(range(10)))
    go_on = threading.Event()
    busy = [buffer._submitter.submit(go_on.wait, 30) for _ in range(32)]  # all of its threads
    future = buffer.submit(experience(10))
    if change == "fusion":
        reindex(folder, config=CONFIG, fusion="weighted_concat")
    else:
        buffer.reembed(embed)
    assert not future.done()
    go_on.set()
    assert all(each.result(30) for each in busy)
    if change == "fusion":
        assert future.result(30) == 10
        assert finds(buffer, 10)
    else:
        with pytest.raises(DimensionError, match=f"{DIM}.*{NEW_DIM}"):
            future.result(30)
        assert len(buffer) == 10


@pytest.mark.parametrize("dim", [DIM, NEW_DIM])
@pytest.mark.parametrize("durability", ["sync", "os"])
def test_an_add_that_lands_while_the_last_are_embedded(
    open_buffer: OpenBuffer, monkeypatch: pytest.MonkeyPatch, dim: int, durability: str
) -> None:
    """It had looked before adds had to wait: it is neither embedded yet nor refused."""
    buffer, other = open_buffer(durability=durability), open_buffer(durability=durability)
    buffer.add_many(columns(range(10)))
    session, switch = other._live(), reindexing._Change._switch
    intake = session.intake()
    assert intake is not None
    late = [intake.one(experience(serial), None) for serial in (12, 11)]

    def behind_an_add(change: Any) -> int:
        other.add(experience(10))  # something is left to be embedded
        return switch(change)

    def landing(items: Sequence[Experience]) -> dict[str, Any]:
        if late and session.control.words[c.REPRESENTATION] & CHANGING:
            session.commit_log.commit(late.pop())
        return {part: [made(item, dim) for item in items] for part in ("v_embed", "q_embed")}

    def made(item: Experience, dim: int) -> NDArray[np.float32]:
        return vector(serial_of(item) + 2_000_000, dim)

    monkeypatch.setattr(reindexing._Change, "_switch", behind_an_add)
    assert buffer.reembed(landing).experiences == 13
    assert not late
    buffer.close()
    for each in (other, open_buffer(mode="r")):
        assert [serial_of(item) for item in each] == [*range(13)]
        assert all(np.array_equal(item.v_embed, made(item, dim)) for item in each)
        v = vector(2_000_012, dim)
        assert each.search_index(v_embed=v, q_embed=v, k=1)[0].id == 12


def test_what_comes_into_an_empty_buffer_before_the_change_counts(
    open_buffer: OpenBuffer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There was nothing to learn the new dimensions from until adds had to wait."""
    buffer, other = open_buffer(), open_buffer()
    buffer.add(experience(0))
    buffer.clear()
    switch = reindexing._Change._switch

    def behind_an_add(change: Any) -> int:
        other.add(experience(1))
        return switch(change)

    monkeypatch.setattr(reindexing._Change, "_switch", behind_an_add)
    assert buffer.reembed(embed).representation == 1
    for each in (buffer, other):
        assert each.stats()["settings"]["v_dim"] == NEW_DIM
        assert finds_renewed(each, 1)
    buffer.add(renewed(2))
    assert finds_renewed(other, 2)


def test_a_change_that_died_holds_nobody_up(open_buffer: OpenBuffer) -> None:
    buffer = open_buffer()
    buffer.add_many(columns(range(3)))
    words = buffer._live().control.words
    words[c.REPRESENTATION] |= CHANGING
    assert buffer.add(experience(3)) == 3
    assert words[c.REPRESENTATION] == 0


def test_adds_wait_for_the_last_embeddings(open_buffer: OpenBuffer) -> None:
    buffer, other = open_buffer(), open_buffer()
    buffer.add_many(columns(range(4)))
    lock = buffer._live().representation_lock()
    buffer._live().control.words[c.REPRESENTATION] |= CHANGING
    done = threading.Event()
    adder = threading.Thread(target=lambda: (other.add(experience(4)), done.set()))
    with lock:
        adder.start()
        assert not done.wait(0.05)
        assert finds(other, 2), "searches do not wait"
    adder.join()
    assert done.is_set()


def test_what_has_landed_does_not_wait(
    open_buffer: OpenBuffer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An add that is in the log when it sees that a change began is acknowledged, however long."""
    buffer, other = open_buffer(), open_buffer()
    buffer.add_many(columns(range(4)))
    session = other._live()
    commit = session.commit_log.commit

    def beginning(work: Any) -> tuple[int, int]:
        session.control.words[c.REPRESENTATION] |= CHANGING
        return commit(work)

    monkeypatch.setattr(session.commit_log, "commit", beginning)
    with buffer._live().representation_lock():  # this thread cannot have it once more
        assert other.add(experience(4)) == 4
    assert finds(buffer, 4)


def test_one_change_at_a_time(open_buffer: OpenBuffer, folder: Path) -> None:
    buffer = open_buffer()
    buffer.add_many(columns(range(4)))

    def meanwhile(items: Sequence[Experience]) -> dict[str, Any]:
        with pytest.raises(LockTimeout):
            reindex(folder, config={**CONFIG, "lock_timeout_s": 0.01}, fusion="weighted_concat")
        return embed(items)

    buffer.reembed(meanwhile)
    assert finds_renewed(buffer, 1)


@pytest.mark.parametrize("second", ["fusion", "metric", "reembed"])
@pytest.mark.parametrize("first", ["metric", "reembed"])
def test_a_change_that_waited_keeps_what_the_other_made(
    open_buffer: OpenBuffer,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    first: str,
    second: str,
) -> None:
    """It was asked for before the other began to count, and finds another buffer then."""
    buffer, other = open_buffer(), open_buffer()
    buffer.add_many(columns(range(8)))
    changes: dict[str, Any] = {
        "metric": lambda: reindex(folder, config=CONFIG, **{"embedding.metric": "l2"}),
        "fusion": lambda: reindex(folder, config=CONFIG, fusion="weighted_concat"),
        "reembed": lambda: other.reembed(embed, name="model"),
    }
    lock, waited = ProcessLock.acquire, []

    def behind_the_first(self: ProcessLock, timeout_s: float | None = None) -> None:
        if self.file.path.name == "reindex" and not waited:
            waited.append(self)
            changes[first]()
        lock(self, timeout_s)

    monkeypatch.setattr(ProcessLock, "acquire", behind_the_first)
    changes[second]()
    settings = buffer.stats()["settings"]
    assert settings["representation"] == (1 if first == second == "metric" else 2)
    assert settings["metric"] == ("l2" if "metric" in (first, second) else "cosine")
    assert (settings["fusion"]["name"] == "weighted_concat") == (second == "fusion")
    assert settings["v_dim"] == (NEW_DIM if "reembed" in (first, second) else DIM)
    finding = finds_renewed if "reembed" in (first, second) else finds
    assert all(finding(buffer, serial) for serial in range(8))


def test_a_change_behind_one_that_died_unpublished(
    open_buffer: OpenBuffer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its settings are in the log, and nobody has seen them: their number is taken all the same."""
    buffer, other = open_buffer(), open_buffer()
    buffer.add_many(columns(range(4)))
    log, settings = buffer._live().commit_log, buffer.stats()["settings"]
    changed = codec.encode_settings({**settings, "metric": "l2", "representation": 1})

    def dying(entries: object) -> None:
        raise Stopped

    monkeypatch.setattr(log, "_finish", dying)
    with pytest.raises(Stopped):
        log.commit(Draft(changed, weight=0))
    assert other.reembed(embed).representation == 2
    assert other.stats()["settings"]["metric"] == "l2"
    assert all(finds_renewed(other, serial) for serial in range(4))


def test_one_change_of_threads_at_a_time(open_buffer: Any) -> None:
    """Also where there is no folder."""
    buffer = open_buffer.memory(lock_timeout_s=0.01)
    buffer.add_many(columns(range(4)))
    errors: list[BaseException] = []

    def too() -> None:
        try:
            buffer.reembed(embed, name="another")
        except LockTimeout as exc:
            errors.append(exc)

    def meanwhile(items: Sequence[Experience]) -> dict[str, Any]:
        thread = threading.Thread(target=too)
        thread.start()
        thread.join()
        return embed(items)

    assert buffer.reembed(meanwhile).representation == 1
    assert len(errors) == 1


@pytest.mark.parametrize("step", ["fuse", "index"])
@pytest.mark.parametrize("left", [0, 3])
def test_all_that_was_chosen_goes_meanwhile(
    open_buffer: OpenBuffer, folder: Path, step: str, left: int
) -> None:
    """Nothing is left to be indexed aside; what came instead, if anything, is."""
    buffer, other = open_buffer(), open_buffer()
    buffer.add_many(columns(range(5)))
    steps: list[str] = []

    def going(what: str, done: int, total: int) -> None:
        if what == step and step not in steps:
            other.clear()
            add_all(other, range(5, 5 + left))
            assert len(buffer) == left, "this thread sees it at once"
        steps.append(what)

    report = buffer.reembed(embed, progress=going)
    assert step in steps
    assert (report.representation, report.experiences) == (1, left)
    assert all(finds_renewed(buffer, serial) for serial in range(5, 5 + left))
    assert buffer.add(renewed(20)) == 5 + left
    assert finds_renewed(other, 20)
    assert not list((folder / segments.FOLDER).glob("*/part-*")), "parts of what is gone"


def test_it_is_opened_before_it_counts(
    open_buffer: OpenBuffer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that the first search of the new representation does not wait for its files."""
    buffer = open_buffer()
    buffer.add_many(columns(range(30)))
    buffer.rebuild_index()
    session = buffer._live()
    switch, load, loading = reindexing._Change._switch, indexing.load, []

    def watched(*args: Any) -> Any:
        loading.append(threading.current_thread())
        return load(*args)

    def looking(change: Any) -> int:
        session.upkeep.adopt_now()
        assert session.prepared is not None
        assert finds(buffer, 3)
        lsn = switch(change)
        monkeypatch.setattr(indexing, "load", watched)
        return lsn

    monkeypatch.setattr(reindexing._Change, "_switch", looking)
    reindex(folder, config=CONFIG, fusion="weighted_concat")
    assert finds(buffer, 3)
    assert threading.current_thread() not in loading  # it may look again in the background
    assert [item["rows"] for item in buffer.stats()["index"]["segments"]] == [30]


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("made", "error", "words"),
    [
        (lambda items: None, InvalidExperience, "must return a mapping"),
        (lambda items: {}, InvalidExperience, "must return a mapping"),
        (lambda items: {"v": 1}, InvalidExperience, "must return a mapping"),
        (lambda items: {"v_embed": np.ones((1, DIM))}, InvalidExperience, "1 embeddings for 2"),
        (lambda items: {"v_embed": np.ones(DIM)}, DimensionError, "expected shape"),
        (lambda items: {"v_embed": np.full((2, DIM), np.nan)}, InvalidExperience, "finite"),
        (lambda items: {"v_embed": np.ones((2, 3))}, ConfigError, "weighted_sum"),
    ],
)
def test_embeddings_that_make_no_sense(
    open_buffer: OpenBuffer, made: Any, error: type[Exception], words: str
) -> None:
    buffer = open_buffer()
    buffer.add_many(columns(range(4)))
    before = Known(buffer, OLD_QUESTIONS), buffer.lsn
    with pytest.raises(error, match=words):
        buffer.reembed(made, batch_size=2)
    assert (Known(buffer, OLD_QUESTIONS), buffer.lsn) == before


def test_dimensions_must_agree(open_buffer: OpenBuffer) -> None:
    buffer = open_buffer()
    buffer.add_many(columns(range(4)))
    sizes = iter([7, 8])

    def made(items: Sequence[Experience]) -> dict[str, Any]:
        dim = next(sizes)
        return {"v_embed": np.ones((len(items), dim)), "q_embed": np.ones((len(items), dim))}

    with pytest.raises(DimensionError):
        buffer.reembed(made, batch_size=2)
    assert finds(buffer, 2), "what counts is what counted before"


def test_a_fusion_that_does_not_fit(open_buffer: OpenBuffer, folder: Path) -> None:
    buffer = open_buffer(fusion="weighted_concat")
    buffer.add(Experience(v_embed=np.ones(3), q_embed=np.ones(5)))
    with pytest.raises(ConfigError, match="weighted_sum"):
        reindex(folder, config=CONFIG, fusion="weighted_sum")
    assert buffer.stats()["settings"]["representation"] == 0


def test_a_fusion_that_does_not_fit_what_came_meanwhile(
    open_buffer: OpenBuffer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The buffer had no dimensions yet when the change began."""
    buffer = open_buffer(fusion="weighted_concat")
    switch = reindexing._Change._switch

    def behind_the_first(change: Any) -> int:
        buffer.add(Experience(v_embed=np.ones(3), q_embed=np.ones(5)))
        return switch(change)

    monkeypatch.setattr(reindexing._Change, "_switch", behind_the_first)
    with pytest.raises(ConfigError, match="weighted_sum"):
        reindex(folder, config=CONFIG, fusion="weighted_sum")
    assert buffer.add(Experience(v_embed=np.ones(3), q_embed=np.ones(5))) == 1
    assert buffer.stats()["settings"]["representation"] == 0


# ---------------------------------------------------------------- going on


class Stopped(Exception):
    """What a test stops a change with."""


def stopping(after: int, seen: list[int]) -> Any:
    def made(items: Sequence[Experience]) -> Mapping[str, Any]:
        if len(seen) >= after:
            raise Stopped
        seen.extend(serial_of(item) for item in items)
        return embed(items)

    return made


@pytest.mark.parametrize("snapshots", [0, 3])
def test_an_interrupted_call_is_gone_on_with(
    open_buffer: OpenBuffer, folder: Path, snapshots: int
) -> None:
    buffer = open_buffer()
    buffer.add_many(columns(range(200)))
    seen: list[int] = []
    with pytest.raises(Stopped):
        buffer.reembed(stopping(120, seen), batch_size=20, name="model")
    assert finds(buffer, 3), "nothing of it counts yet"
    for serial in range(200, 200 + snapshots):  # logs are switched and dropped meanwhile
        buffer.add(experience(serial))
        buffer.save_snapshot()
    buffer.remove([5])
    buffer.close()
    buffer = open_buffer()
    report = buffer.reembed(stopping(10_000, seen), batch_size=20, name="model")
    assert report.resumed == 120
    assert sorted(seen) == [*range(200 + snapshots)], "each was embedded once"
    rest = [serial for serial in range(200 + snapshots) if serial != 5]
    assert all(finds_renewed(buffer, serial) for serial in rest)
    buffer.close()
    again = open_buffer()
    assert all(finds_renewed(again, serial) for serial in rest)


def test_gone_on_with_when_the_first_are_gone(open_buffer: OpenBuffer) -> None:
    """All is embedded, and what the dimensions were learned from was evicted."""
    buffer = open_buffer()
    buffer.add_many(columns(range(20)))

    def stop(step: str, done: int, total: int) -> None:
        if step == "fuse":
            raise Stopped

    with pytest.raises(Stopped):
        buffer.reembed(embed, progress=stop)
    buffer.remove([0, 1])
    seen: list[int] = []
    report = buffer.reembed(stopping(0, seen))
    assert (report.representation, report.resumed, seen) == (1, 20, [])
    assert all(finds_renewed(buffer, serial) for serial in range(2, 20))


def test_dimensions_must_agree_when_the_first_are_gone(open_buffer: OpenBuffer) -> None:
    buffer = open_buffer()
    buffer.add_many(columns(range(4)))
    with pytest.raises(Stopped):
        buffer.reembed(stopping(2, []), batch_size=2)
    buffer.remove([0])

    def of_others(items: Sequence[Experience]) -> dict[str, Any]:
        return {part: np.ones((len(items), NEW_DIM + 1)) for part in ("v_embed", "q_embed")}

    with pytest.raises(DimensionError):
        buffer.reembed(of_others)
    assert finds(buffer, 2), "what counts is what counted before"


def test_another_model_begins_anew(open_buffer: OpenBuffer, folder: Path) -> None:
    buffer = open_buffer()
    buffer.add_many(columns(range(20)))
    with pytest.raises(Stopped):
        buffer.reembed(stopping(10, []), batch_size=5, name="one")
    seen: list[int] = []
    assert buffer.reembed(stopping(100, seen), batch_size=5, name="two").resumed == 0
    assert sorted(seen) == [*range(20)]


def test_a_reindex_drops_what_was_embedded(open_buffer: OpenBuffer, folder: Path) -> None:
    buffer = open_buffer()
    buffer.add_many(columns(range(20)))
    with pytest.raises(Stopped):
        buffer.reembed(stopping(10, []), batch_size=5)
    assert reindex(folder, config=CONFIG, fusion="weighted_concat").representation == 2
    assert all(finds(buffer, serial) for serial in range(20))
    assert buffer._live().replica.state.reembedded is None


def test_finished_parts_are_kept(
    open_buffer: OpenBuffer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reindexing, "_PART_ROWS", 16)
    monkeypatch.setattr(reindexing, "_READ_ROWS", 8)
    buffer = open_buffer()
    buffer.add_many(columns(range(70)))
    steps: list[int] = []

    def stop(step: str, done: int, total: int) -> None:
        if step == "fuse":
            steps.append(done)
            if done >= 40:
                raise Stopped

    with pytest.raises(Stopped):
        reindex(folder, config=CONFIG, fusion="weighted_concat", progress=stop)
    buffer.remove([3, 20, 50])
    parts = sorted((folder / segments.FOLDER / "1").glob("part-*"))
    assert len(parts) == 2
    raw = bytearray(parts[1].read_bytes())
    raw[-1] ^= 1
    parts[1].write_bytes(raw)  # a damaged part is made again
    report = reindex(folder, config=CONFIG, fusion="weighted_concat")
    assert report.resumed == 15
    assert all(finds(buffer, serial) for serial in range(70) if serial not in (3, 20, 50))
    assert [item["rows"] for item in buffer.stats()["index"]["segments"]] == [67]


def test_nothing_is_fused_ahead_of_the_log(
    open_buffer: OpenBuffer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power loss must not leave vectors of embeddings that it took."""
    buffer = open_buffer(durability="os")
    buffer.add_many(columns(range(20)))
    words, write, seen = buffer._live().control.words, segments.write_vectors, []

    def watched(*args: Any) -> None:
        seen.append((words[c.DURABLE], words[c.APPENDED]))
        write(*args)

    monkeypatch.setattr(segments, "write_vectors", watched)
    buffer.reembed(embed)
    assert seen
    assert all(durable == appended for durable, appended in seen)


class Dying(FileSystem):
    """Kills its process at one of its calls."""

    left = 0

    def __getattribute__(self, name: str) -> Any:
        if name in ("pwrite", "pwritev", "fsync", "fdatasync", "replace", "unlink", "sync_folder"):
            Dying.left -= 1
            if Dying.left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return super().__getattribute__(name)


def change_and_die(folder: str, kind: str, calls: int) -> int:
    """Exit code of a process that makes a change, and is killed at so many calls."""

    def change() -> None:
        Dying.left = calls
        reindexing._PART_ROWS, reindexing._READ_ROWS, reindexing._FEW = 64, 16, 8
        if kind == "reindex":
            reindex(folder, config=CONFIG, fusion="weighted_concat", filesystem=Dying())
            return
        with ExperienceBuffer.open(folder, config=CONFIG, filesystem=Dying()) as buffer:
            buffer.reembed(embed, batch_size=16)

    return run_forked(change)


@pytest.mark.parametrize("kind", ["reindex", "reembed"])
def test_killed_at_random_points(open_buffer: OpenBuffer, folder: Path, kind: str) -> None:
    """SIGKILL at the n-th call that changes a file, while another process adds and searches."""
    buffer = open_buffer()
    buffer.add_many(columns(range(150)))
    buffer.rebuild_index()
    stop, turns, failures = threading.Event(), threading.Semaphore(0), []
    added = list(range(150))

    def adding() -> None:
        try:
            serial = 150
            while True:
                turns.acquire()  # some for each child
                if stop.is_set():
                    return
                try:
                    buffer.add(experience(serial))
                    old = True
                except DimensionError:
                    buffer.add(renewed(serial))
                    old = False
                added.append(serial)
                try:
                    found = finds(buffer, serial) if old else finds_renewed(buffer, serial)
                except DimensionError:  # it was changed in between
                    found = finds_renewed(buffer, serial)
                assert found or finds_renewed(buffer, serial), f"{serial} is not found"
                serial += 1
        except BaseException as exc:
            failures.append(exc)

    adder = threading.Thread(target=adding)
    adder.start()
    rng, kills = random.Random(kind), 0
    try:
        with Worker(folder) as worker:  # whose forks have all modules at hand
            while True:
                calls = rng.randrange(2, 60) if kills < (100 if LONG else 5) else 1 << 30
                turns.release(10)
                change = f"change_and_die({str(folder)!r}, {kind!r}, {calls})"
                code = worker(f"__import__('test_reindexing').{change}")
                if code == 0:
                    break
                assert code == -signal.SIGKILL
                kills += 1
    finally:
        stop.set()
        turns.release()
        adder.join()
    assert not failures, failures
    finding = finds if kind == "reindex" else finds_renewed
    assert [serial_of(item) for item in buffer] == added
    assert all(finding(buffer, serial) for serial in added)
    buffer.close()
    again = open_buffer()
    assert [serial_of(item) for item in again] == added
    assert all(finding(again, serial) for serial in added)
    again.close()
    assert not [problem for problem in verify(folder) if problem.damage]


def test_every_state_that_a_power_loss_can_leave() -> None:
    """What was acknowledged is there, in the one representation or in the other."""

    def workload(fs: RecordingFileSystem, folder: Path, acknowledge: Any) -> None:
        buffer = ExperienceBuffer.open(folder, config=CONFIG, filesystem=fs)
        buffer.add_many(columns(range(6)))
        acknowledge("added")
        buffer.reembed(embed, batch_size=4)
        acknowledge("embedded")
        buffer.add(renewed(6))
        acknowledge("more")
        reindex(folder, config=CONFIG, fusion="weighted_concat", filesystem=fs)
        acknowledge("indexed")

    outcomes = set()

    def recover(folder: Path, acknowledged: Sequence[Any], started: Sequence[Any]) -> None:
        if "added" not in acknowledged:
            return
        with ExperienceBuffer.open(folder, config=CONFIG) as buffer:
            number = buffer.stats()["settings"]["representation"]
            outcomes.add(number)
            assert number >= ("embedded" in acknowledged) + ("indexed" in acknowledged)
            n = len(buffer)
            assert n >= 6 + ("more" in acknowledged)
            if number == 0:
                assert all(finds(buffer, serial) for serial in range(n))
                buffer.reembed(embed, batch_size=4)
            assert all(finds_renewed(buffer, serial) for serial in range(n))
            assert buffer.add(renewed(7)) == n
            assert finds_renewed(buffer, 7)

    result = explore(workload, recover, states=1500 if LONG else 60)
    result.raise_for_failures()
    assert {0, 1} <= outcomes


def test_repair_without_the_change(open_buffer: OpenBuffer, folder: Path) -> None:
    """Only the operation that made new embeddings count is damaged: they are there all the same."""
    buffer = open_buffer()
    buffer.add_many(columns(range(8)))
    buffer.reembed(embed)
    buffer.add_many({name: [new_parts(8)[i]] for i, name in enumerate(("v_embed", "q_embed"))})
    buffer.close()
    for path in [*folder.glob("*.wal")]:
        raw = path.read_bytes()
        path.write_bytes(raw.replace(b'"representation":1', b'"representation":7'))
    target = folder.with_name("repaired")
    report = repair(folder, target)
    assert any("representation 1 is lost" in note for note in report.notes)
    with ExperienceBuffer.open(target, config={"index": {"builder": "off"}}) as again:
        assert len(again) == 9
        assert all(finds_renewed(again, serial) for serial in range(8))


@pytest.mark.parametrize("embedded", [0, 2])
def test_payloads_of_other_dimensions(open_buffer: OpenBuffer, folder: Path, embedded: int) -> None:
    """As a change leaves them that counts before all is embedded."""
    buffer = open_buffer()
    buffer.add_many(columns(range(4)))
    with pytest.raises(Stopped):
        buffer.reembed(stopping(embedded, []), batch_size=2)
    settings = buffer.stats()["settings"]
    changed = {**settings, "v_dim": NEW_DIM, "q_dim": NEW_DIM, "representation": 1}
    said = rf"wal: experience {embedded} at offset \d+ .*\(6, 6\).*\(9, 9\).*`expbuf repair`"
    with pytest.raises(CorruptionError, match=said):
        buffer._live().commit(Draft(codec.encode_settings(changed), weight=0))
    buffer.close()
    for mode in ("a", "r"):
        with pytest.raises(CorruptionError, match=said) as caught:
            open_buffer(mode=mode)
        assert caught.value.path is not None
        assert caught.value.offset is not None
    with pytest.raises(CorruptionError, match=said):
        reindex(folder, config=CONFIG, fusion="weighted_concat")

    problems = [problem for problem in verify(folder) if problem.damage]
    assert len(problems) == 4 - embedded
    for id_, problem in enumerate(problems, embedded):
        assert f"experience {id_} " in problem.message
        assert Path(problem.path).parent == folder
    report = repair(folder, folder.with_name("repaired"))
    assert report.saved == embedded
    assert report.lost_ids == ((embedded, 3),)
    for place, problem in zip(report.damage, problems, strict=True):
        assert problem.message.startswith(place.message)
    assert any("other dimensions" in note and "expbuf get" in note for note in report.notes)
    again = open_buffer(folder.with_name("repaired"))
    assert [serial_of(item) for item in again] == [*range(embedded)]
    assert all(finds_renewed(again, serial) for serial in range(embedded))


def test_a_copy_of_a_changed_buffer(open_buffer: OpenBuffer, folder: Path) -> None:
    buffer = open_buffer()
    buffer.add_many(columns(range(8)))
    buffer.reembed(embed)
    buffer.close()
    migrate(folder, folder.with_name("copy"), "file")
    with ExperienceBuffer.open(folder.with_name("copy"), index="exact") as copy:
        assert copy.add(renewed(8)) == 8
        assert all(finds_renewed(copy, serial) for serial in range(9))
