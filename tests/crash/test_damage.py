"""Damage every byte of every file: it is detected, or provably does no harm."""

from __future__ import annotations

import contextlib
import random
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from crash_model import (
    LONG,
    Model,
    State,
    age_control,
    check_search,
    entry_of,
    experience,
    is_refused,
    open_buffer,
    state_of,
)
from two_processes import in_two_processes

from expbuf_core import ExperienceBuffer
from expbuf_core.errors import CorruptionError, FormatVersionError
from expbuf_core.testing.crash import scratch_folder
from expbuf_core.verification import verify

STRIDE = 1 if LONG else 197
END_BYTES = 80  # of the mark at the end of a log
KINDS = ("flip", "zero", "noise", "sector", "cut")


class Scene(NamedTuple):
    """A folder and what is in it."""

    folder: Path
    state: State
    clean: bool


@pytest.fixture(scope="module")
def scenes() -> Iterator[dict[str, Scene]]:
    home = scratch_folder()
    try:
        yield {
            "clean": make(home / "clean", snapshot=False),
            "snapshot": make(home / "snapshot", snapshot=True),
            "killed": killed(home),
        }
    finally:
        shutil.rmtree(home)


def make(folder: Path, *, snapshot: bool) -> Scene:
    with contextlib.closing(open_buffer(folder)) as buffer:
        write_some(buffer, snapshot=snapshot)
        state = state_of(buffer)
    return Scene(folder, state, clean=True)


def killed(home: Path) -> Scene:
    """As a kill leaves it: everything was acknowledged, nothing was closed."""
    with contextlib.closing(open_buffer(home / "live")) as buffer:
        write_some(buffer, snapshot=True)
        state = state_of(buffer)
        buffer._live().upkeep.stop()  # so that no file comes or goes while they are copied
        shutil.copytree(home / "live", home / "killed")
    return Scene(home / "killed", state, clean=False)


def write_some(buffer: ExperienceBuffer, *, snapshot: bool) -> None:
    for serial in range(1, 19):
        buffer.add(experience(serial, 0.5, 700))
    buffer.update_rewards([3, 4], [1.0, -2.0])
    if snapshot:
        buffer.save_snapshot()
    buffer.remove([5])
    buffer.add_many([experience(serial, None, 300) for serial in range(19, 24)])
    if snapshot:
        buffer.save_snapshot()
    buffer.update_priorities([7, 8], [3.0, 4.0])
    buffer.record_outcome([9], success=True)
    buffer.add(experience(24, 0.25, 40))


def damaged(raw: bytes, at: int, kind: str, rng: random.Random) -> bytes:
    data = bytearray(raw)
    if kind == "flip":
        data[at] ^= 1 << rng.randrange(8)
    elif kind == "zero":
        data[at] = 0
    elif kind == "noise":
        length = min(rng.choice((1, 4, 8, 100)), len(data) - at)
        data[at : at + length] = rng.randbytes(length)
    elif kind == "sector":
        begin = at - at % 512
        data[begin : begin + 512] = bytes(len(data[begin : begin + 512]))
    else:
        del data[at:]
    return bytes(data)


def positions(raw: bytes, stride: int, rng: random.Random) -> list[int]:
    """Every stride-th byte, all of the first header, and all where something stands first."""
    chosen = set(range(rng.randrange(stride), len(raw), stride))
    chosen.update(range(min(len(raw), 96)))
    for page in range(0, len(raw), 4096):  # the first frame behind each page's beginning
        if raw[page : page + 8].strip(b"\0"):
            chosen.update(range(page, min(len(raw), page + 88), 1 if LONG else 11))
    chosen.add(len(raw) - 1)
    return sorted(at for at in chosen if 0 <= at < len(raw))


def files(folder: Path) -> list[Path]:
    return sorted(
        path.relative_to(folder)
        for path in folder.rglob("*")
        if path.is_file() and path.parent.name != "locks"
    )


def use(folder: Path, scene: Scene) -> None:
    """Read all, write more, reopen."""
    with contextlib.closing(open_buffer(folder)) as buffer:
        found = state_of(buffer)
        assert found == scene.state, "silently another state"
        check_search(buffer, found)
        new = buffer.add(experience(1000, 0.5, 20))
        assert new > max(entry.id for entry in found)
        expected = Model(found)
        expected.add(entry_of(buffer.get(new)))
    with contextlib.closing(open_buffer(folder)) as buffer:
        assert state_of(buffer) == expected.state(), "changed by the next opening"


def attempt(folder: Path, scene: Scene, path: Path, raw: bytes, at: int) -> str:
    """What comes of using a folder in which `path` is damaged from `at` on."""
    before = {name: (folder / name).read_bytes() for name in files(folder)}
    told = any(problem.damage for problem in verify(folder))
    assert before == {name: (folder / name).read_bytes() for name in files(folder)}
    if path.suffix == ".snap" or path.name.startswith("experience_data."):
        # Zeros behind the end mean nothing, and its mark only repeats what the next file says.
        end = len(raw.rstrip(b"\0")) - END_BYTES
        assert told or before[path] == raw or at >= end, "verify found nothing"
    refusal = is_refused(folder)
    if refusal is None:
        try:
            use(folder, scene)
        except (CorruptionError, FormatVersionError) as exc:
            refusal = exc
        else:
            return "harmless"
    else:
        # Nothing was made worse: with the right bytes in place again, all is there.
        (folder / path).write_bytes(raw)
        use(folder, scene)
    assert isinstance(refusal, CorruptionError | FormatVersionError), repr(refusal)
    assert told, f"verify found nothing, but: {refusal}"
    if isinstance(refusal, CorruptionError):
        assert refusal.path is not None, f"no path: {refusal}"
        assert refusal.offset is not None, f"no offset: {refusal}"
        assert Path(refusal.path).name in str(refusal)
    return "detected"


@pytest.mark.parametrize("name", ["clean", "snapshot", "killed"])
def test_verify_finds_nothing_where_nothing_is(scenes: dict[str, Scene], name: str) -> None:
    assert [problem for problem in verify(scenes[name].folder) if problem.damage] == []


@pytest.mark.usefixtures("little_memory")
@pytest.mark.parametrize("name", ["clean", "snapshot", "killed"])
def test_every_byte(scenes: dict[str, Scene], name: str) -> None:
    scene = scenes[name]
    rng = random.Random(name)
    cases = [
        (path, at, kind)
        for path in files(scene.folder)
        for at in positions((scene.folder / path).read_bytes(), STRIDE, rng)
        for kind in (KINDS if LONG else (rng.choice(KINDS),))
    ]
    found = in_two_processes(lambda part: outcomes_of(scene, cases[part::2]))
    failures = [text for outcomes in found for text in outcomes["failures"]]
    assert not failures, f"{len(failures)} failures:\n" + "\n".join(failures[:20])
    assert sum(outcomes["detected"] for outcomes in found)


def outcomes_of(scene: Scene, cases: Sequence[tuple[Path, int, str]]) -> dict[str, Any]:
    """How often damage was detected, and what else became of it."""
    detected = 0
    failures = []
    home = scratch_folder()
    try:
        for path, at, kind in cases:
            folder = home / "image"
            shutil.copytree(scene.folder, folder)
            age_control(folder / "control", rebooted=False)
            right = (folder / path).read_bytes()
            rng = random.Random(f"{path} {at} {kind}")
            (folder / path).write_bytes(damaged(right, at, kind, rng))
            try:
                detected += attempt(folder, scene, path, right, at) == "detected"
            except Exception as exc:
                reason = str(exc).partition("\n")[0]
                failures.append(f"{path}, {kind} at {at}: {type(exc).__name__}: {reason}")
            shutil.rmtree(folder)
    finally:
        shutil.rmtree(home)
    return {"detected": detected, "failures": failures}
