"""The command `expbuf`: what it prints, what it leaves behind, how it ends."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from expbuf_core import Experience, ExperienceBuffer, cli, doctor, transfer
from expbuf_core import folder as folders
from expbuf_core.plugins import default_registry
from expbuf_core.testing.crash import scratch_folder

CONFIG: dict[str, Any] = {
    "index": {"backend": "exact", "builder": "off"},
    "persistence": {"file": {"initial_bytes": 1 << 14, "segment_bytes": 1 << 14}},
}
YAML = """
experience_buffer:
  persistence: {file: {initial_bytes: 16384, segment_bytes: 16384}}
"""


@pytest.fixture
def home() -> Iterator[Path]:
    folder = scratch_folder()
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def buffer(home: Path) -> Path:
    """A folder with a few experiences."""
    folder = home / "memory"
    with ExperienceBuffer.open(folder, config=CONFIG) as opened:
        for serial in range(20):
            opened.add(Experience(v_embed=np.full(4, serial + 1.0), answer=f"answer {serial}"))
    (home / "small.yaml").write_text(YAML)
    return folder


def answers(folder: Path) -> list[str]:
    with ExperienceBuffer.load_from_disk(folder, config={"index": "exact"}) as opened:
        return [item.answer for item in opened]


ALL = [f"answer {serial}" for serial in range(20)]


class Ran:
    """How a command ended."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


Run = Callable[..., Ran]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*arguments: object) -> Ran:
        try:
            code = cli.main([str(argument) for argument in arguments])
        except SystemExit as exc:
            code = int(exc.code or 0)
        captured = capsys.readouterr()
        return Ran(code, captured.out, captured.err)

    return run


def spoil(folder: Path, text: bytes) -> None:
    """Flip a bit of a payload."""
    for path in folder.glob("experience_data.*.wal"):
        raw = bytearray(path.read_bytes())
        at = raw.find(text)
        if at >= 0:
            raw[at] ^= 1
            path.write_bytes(raw)
            return
    raise AssertionError(text)


# ---------------------------------------------------------------- usage


def test_wrong_usage_is_code_2(run: Run) -> None:
    for arguments in ((), ("dance",), ("migrate", "a", "b"), ("info",)):
        assert run(*arguments).code == 2
    assert run("--version").out == f"expbuf {version('expbuf-core')}\n"


def test_every_command_has_help(run: Run) -> None:
    overview = run("--help").out
    for name in ("info", "verify", "snapshot", "migrate", "repair", "doctor", "plugins"):
        assert f"    {name} " in overview
        assert run(name, "--help").code == 0


def test_it_is_a_module_too(buffer: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "expbuf_core", "info", str(buffer)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "experiences" in done.stdout


# ---------------------------------------------------------------- looking


def test_info(run: Run, buffer: Path, home: Path) -> None:
    facts = json.loads(run("info", buffer, "--json").out)
    assert facts["experiences"] == 20
    assert "20 experiences" in run("info", buffer).out
    missing = run("info", home / "nothing")
    assert (missing.code, missing.out) == (1, "")
    assert missing.err.startswith("expbuf: ")
    assert missing.err.count("\n") == 1


def test_verify(run: Run, buffer: Path) -> None:
    assert run("verify", buffer).code == 0
    spoil(buffer, b"answer 7")
    found = run("verify", buffer)
    assert found.code == 3
    assert "DAMAGE" in found.out
    assert json.loads(run("verify", buffer, "--json").out)[0]["damage"] is True


def test_snapshot(run: Run, buffer: Path) -> None:
    assert run("snapshot", buffer).out.startswith("snapshot of lsn ")
    assert run("snapshot", buffer.parent / "nothing").code == 1


def test_plugins(run: Run) -> None:
    names = {plugin["name"] for plugin in json.loads(run("plugins", "--json").out)}
    assert {"builtin", "file"} <= names
    assert "persistence:file" in run("plugins").out


# ---------------------------------------------------------------- migrate and repair


def test_migrate(run: Run, buffer: Path, home: Path) -> None:
    config = ("--config", home / "small.yaml")
    done = run("migrate", buffer, home / "copy", "--persistence", "file", *config)
    assert (done.code, done.err) == (0, "")
    assert done.out == f"20 experiences are in {home / 'copy'} (file)\n"
    assert answers(home / "copy") == answers(buffer) == ALL
    again = run("migrate", buffer, home / "copy", "--persistence", "file", *config)
    assert again.code == 1
    assert "holds a buffer already" in again.err
    done = run("migrate", buffer, home / "two", "--persistence", "file", "--json", *config)
    report = json.loads(done.out)
    assert (report["experiences"], report["resumed"]) == (20, 0)
    assert report["target"] == str(home / "two")
    wrong = run("migrate", buffer, home / "three", "--persistence", "fiel")
    assert wrong.code == 1
    assert "Did you mean 'file'?" in wrong.err


@pytest.mark.parametrize("command", ["migrate", "repair"])
def test_ctrl_c_breaks_nothing(
    run: Run, buffer: Path, home: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    arguments = [command, buffer, home / "copy", "--config", home / "small.yaml"]
    if command == "migrate":
        arguments += ["--persistence", "file"]
    for calls in range(3):
        left = [calls]

        def interrupt(done: int, total: int, left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(transfer, "_BATCH_ROWS", 7)
            patch.setattr(cli, "_progress", lambda what, each=interrupt: each)
            ended = run(*arguments)
        assert ended.code == 130
        assert f"{command} was interrupted" in ended.err
        assert run("info", home / "copy").code == 1, "it is no buffer yet"
        assert answers(buffer) == ALL
    assert run(*arguments).code == 0
    assert answers(home / "copy") == ALL


def test_progress_is_shown_to_a_terminal_only(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli._progress("copying") is None
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    show = cli._progress("copying")
    assert show is not None
    for done in (0, 1, 4):
        show(done, 4)
    show(0, 0)
    assert capsys.readouterr().err.split("\r") == [
        "",
        "copying: 0 %",
        "copying: 25 %",
        "copying: 100 %\n",
        "copying: 100 %\n",
    ]


def test_repair(run: Run, buffer: Path, home: Path) -> None:
    config = ("--config", home / "small.yaml")
    fine = run("repair", buffer, home / "fine", *config)
    assert fine.code == 0
    assert "nothing was lost" in fine.out
    spoil(buffer, b"answer 7")
    done = run("repair", buffer, *config)
    assert done.code == 3
    assert f"19 experiences saved to {buffer}.repaired\n" in done.out
    assert "lost experiences: ids 7\n" in done.out
    assert answers(Path(f"{buffer}.repaired")) == [text for text in ALL if text != "answer 7"]
    report = json.loads(run("repair", buffer, home / "again", "--json", *config).out)
    assert report["lost_ids"] == [[7, 7]]
    assert report["saved"] == 19
    assert report["damage"]
    assert run("repair", home / "nothing").code == 1


# ---------------------------------------------------------------- doctor


def levels(found: list[doctor.Finding], topic: str) -> list[str]:
    return [finding.level for finding in found if finding.topic == topic]


def test_doctor(run: Run, buffer: Path) -> None:
    before = sorted(path.name for path in buffer.iterdir())
    done = run("doctor", buffer)
    assert "a sync of 4096 bytes takes" in done.out
    assert "stored by 'file'" in done.out
    assert sorted(path.name for path in buffer.iterdir()) == before
    found = json.loads(run("doctor", "--json").out)
    assert {finding["topic"] for finding in found} >= {"versions", "plugin", "faiss", "fork"}
    worst = max(finding["level"] == "problem" for finding in found)
    assert run("doctor").code == (3 if worst else 0)


def test_doctor_knows_the_folders(buffer: Path, home: Path) -> None:
    assert levels(list(doctor.examine(home / "new" / "one")), "folder") == ["note"]
    assert not (home / "new").exists()
    with ExperienceBuffer.open(buffer, config=CONFIG):
        found = [f for f in doctor.examine(buffer) if f.topic == "folder"]
        assert any(f"process {os.getpid()} has it open" in f.message for f in found)
    (home / "unfinished").mkdir()
    (home / "unfinished" / transfer.NOTE).write_text("{}")
    assert levels(list(doctor.examine(home / "unfinished")), "folder") == ["warning"]
    (buffer / "expbuf.json").write_text("{}")
    assert levels(list(doctor.examine(buffer)), "folder") == ["problem"]


@pytest.mark.parametrize(
    ("kind", "level", "word"),
    [
        ("ext4", "ok", "ext4"),
        ("nfs4", "warning", "one process at a time"),
        ("overlay", "warning", "volume"),
        ("tmpfs", "warning", "reboot"),
        ("", "ok", "unknown"),
    ],
)
def test_doctor_knows_file_systems(
    home: Path, monkeypatch: pytest.MonkeyPatch, kind: str, level: str, word: str
) -> None:
    monkeypatch.setattr(folders, "file_system", lambda folder: kind)
    (finding,) = (f for f in doctor.examine(home) if f.topic == "file system")
    assert finding.level == level
    assert word in finding.message + finding.advice


@pytest.mark.parametrize(("seconds", "level"), [(1e-6, "note"), (1e-3, "ok"), (0.05, "warning")])
def test_doctor_judges_syncs(
    home: Path, monkeypatch: pytest.MonkeyPatch, seconds: float, level: str
) -> None:
    monkeypatch.setattr(doctor, "_sync_times", lambda place: [seconds] * 5)
    assert levels(list(doctor.examine(home)), "fsync") == [level]


def test_doctor_measures_nothing_where_it_may_not_write(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(place: Path) -> list[float]:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(doctor, "_sync_times", refused)
    assert levels(list(doctor.examine(home)), "fsync") == ["note"]


def test_doctor_names_both_faiss_wheels(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    both = {"faiss": ["faiss-gpu-cu12", "faiss-cpu", "faiss-cpu"]}
    monkeypatch.setattr(doctor, "packages_distributions", lambda: both)
    done = run("doctor")
    assert done.code == 3
    assert "PROBLEM: faiss-cpu and faiss-gpu-cu12 are installed" in done.out
    assert "pip uninstall -y faiss-cpu faiss-gpu-cu12" in done.out
    monkeypatch.setattr(doctor, "packages_distributions", dict)
    assert levels(list(doctor.examine()), "faiss") == ["note"]


def test_doctor_checks_a_configuration(run: Run, home: Path) -> None:
    file = home / "config.yaml"
    file.write_text("experience_buffer: {index: {backend: exact, granite: {a: 1}}}")
    found = list(doctor.examine(config=file))
    assert levels(found, "configuration") == ["ok", "warning"]
    assert "index.granite" in found[-1].message
    file.write_text("experience_buffer: {index: {backend: granite, fallback: [exact]}}")
    assert levels(list(doctor.examine(config=file)), "configuration") == ["ok", "warning"]
    file.write_text("experience_buffer: {persistence: granite}")
    assert levels(list(doctor.examine(config=file)), "configuration") == ["ok", "problem"]
    file.write_text("experience_buffer: {max_sice: 3}")
    done = run("doctor", "--config", file)
    assert done.code == 3
    assert "max_sice" in done.out


def test_doctor_tells_of_broken_plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    real = default_registry().plugins()
    broken = [
        real[0].__class__("bad", "expbuf-bad", "1", "failed", "no module 'bad'", (), ()),
        real[0].__class__("off", "expbuf-off", "1", "disabled", None, (), ()),
    ]
    monkeypatch.setattr("expbuf_core.plugins.PluginRegistry.plugins", lambda self: broken)
    assert levels(list(doctor.examine()), "plugin") == ["problem", "note"]


def test_doctor_warns_of_two_openmp_runtimes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KMP_DUPLICATE_LIB_OK", "TRUE")
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert levels(list(doctor.examine()), "openmp") == ["warning", "ok"]
