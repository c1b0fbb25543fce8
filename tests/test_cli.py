"""The command `expbuf`: what it prints, what it leaves behind, how it ends."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from expbuf_core import Experience, ExperienceBuffer, StorageError, cli, doctor, exchange, transfer
from expbuf_core import folder as folders
from expbuf_core.cli import output
from expbuf_core.filesystem import FileSystem
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


def test_a_terminal_that_knows_fewer_letters_than_a_name_has(tmp_path: Path) -> None:
    folder = tmp_path / "Gedächtnis"
    ExperienceBuffer.open(folder).close()
    for command in ("doctor", "info", "verify"):
        done = subprocess.run(
            [sys.executable, "-m", "expbuf_core", command, str(folder)],
            capture_output=True,
            check=False,
            env={**os.environ, "PYTHONIOENCODING": "ascii:strict"},
        )
        assert b"Traceback" not in done.stderr
        assert done.returncode == 0, done.stderr


def in_terminal(*arguments: object, columns: int = 80) -> str:
    """What a command shows in a terminal, without colours."""
    command = [sys.executable, "-m", "expbuf_core", *map(str, arguments)]
    mine, theirs = pty.openpty()
    environment = {**os.environ, "COLUMNS": str(columns), "TERM": "xterm"}
    with subprocess.Popen(command, stdout=theirs, stderr=theirs, env=environment) as process:
        os.close(theirs)
        shown = b""
        with contextlib.suppress(OSError):  # that is how the end of a terminal reads
            while chunk := os.read(mine, 1 << 16):
                shown += chunk
        assert process.wait() == 0, shown
    os.close(mine)
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.decode())


def test_tables_fit_the_terminal(buffer: Path) -> None:
    pytest.importorskip("rich")
    narrow = in_terminal("search", buffer, "--id", 3, "-k", 2, "--explain", columns=60)
    assert "similarity  1" in narrow
    assert max(map(len, in_terminal("top", buffer, "--count", 1).splitlines())) <= 80


def test_whoever_reads_may_stop_early(buffer: Path) -> None:
    command = f"{sys.executable} -m expbuf_core sample {buffer} -n 5000 | head -1"
    command += "; exit ${PIPESTATUS[0]}"
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (141, "")
    assert done.stdout.count("\n") == 1


def test_a_signal_ends_it_cleanly(buffer: Path) -> None:
    command = [sys.executable, "-m", "expbuf_core", "top", str(buffer), "--interval", "0.01"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()  # it is at work
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err == b"\nexpbuf: top was interrupted; nothing is broken\n"


def test_an_emergency_needs_no_extra(buffer: Path, home: Path) -> None:
    config = ["--config", str(home / "small.yaml")]
    commands = [
        ["info", str(buffer)],
        ["verify", str(buffer)],
        ["doctor", str(buffer)],
        ["snapshot", str(buffer)],
        ["builder", str(buffer), "--idle-s", "0", "--config", '{"index": {"backend": "exact"}}'],
        ["migrate", str(buffer), str(home / "m"), "--persistence", "file", *config],
        ["repair", str(buffer), str(home / "r"), *config],
        ["backup", str(buffer), str(home / "b"), *config],
    ]
    code = f"""
import sys
for name in ("rich", "pyarrow", "faiss", "click", "typer"):
    sys.modules[name] = None
from expbuf_core.cli import main
print(*[main(command) for command in {commands!r}], file=sys.stderr)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    codes = done.stderr.splitlines()[-1].split()
    assert len(codes) == len(commands), done.stderr
    assert codes[2] in "03", "of the doctor: as it finds this machine"
    del codes[2]
    assert set(codes) == {"0"}, done.stderr


def test_looking_writes_nothing_and_waits_for_nobody(
    run: Run, buffer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def contents() -> dict[str, bytes]:
        return {
            str(path.relative_to(buffer)): path.read_bytes()
            for path in sorted(buffer.rglob("*"))
            if path.is_file()
        }

    looks = (
        ("info",), ("get", 3), ("sample",), ("verify",), ("top", "--count", 1, "--interval", 0.01),
        ("search", "--id", 3, "--exact"),
    )  # fmt: skip
    before = contents()
    with ExperienceBuffer.open(buffer, config=CONFIG) as opened:
        opened._live().open_lock  # noqa: B018  (a writer is there)
        held = contents()

        def refused(*arguments: object) -> None:
            raise AssertionError("a reader took a lock")

        monkeypatch.setattr("expbuf_core.locks.fcntl.lockf", refused)
        for command, *rest in looks:
            done = run(command, buffer, *rest)
            assert (done.code, done.err) == (0, ""), (command, done.err)
        monkeypatch.undo()
        assert contents() == held
    before = contents()
    for command, *rest in looks:
        assert run(command, buffer, *rest).code == 0
    assert contents() == before


# ---------------------------------------------------------------- looking


def test_info(run: Run, buffer: Path, home: Path) -> None:
    facts = json.loads(run("info", buffer, "--json").out)
    assert (facts["experiences"], facts["backend"]) == (20, "file")
    assert "20 experiences" in run("info", buffer).out
    missing = run("info", home / "nothing")
    assert (missing.code, missing.out) == (1, "")
    assert missing.err.startswith("expbuf: ")
    assert missing.err.count("\n") == 1
    spoil(buffer, b"answer 7")
    damaged = run("info", buffer)
    assert damaged.code == 3
    assert "DAMAGE" in damaged.out
    assert "damage" in json.loads(run("info", buffer, "--json").out)


def test_get(run: Run, buffer: Path) -> None:
    assert "answer 3" in run("get", buffer, 3, 4).out
    lines = run("get", buffer, 3, 4, "--json").out.splitlines()
    first = json.loads(lines[0])
    assert (first["id"], first["answer"], first["v_embed"]) == (3, "answer 3", [4.0] * 4)
    assert "[4.0, 4.0, 4.0, 4.0]" in run("get", buffer, 3, "--embeddings").out
    gone = run("get", buffer, 99)
    assert (gone.code, gone.out) == (1, "")
    assert "id 99 was never issued" in gone.err


def test_what_is_stored_does_not_steer_the_terminal(run: Run, buffer: Path) -> None:
    with ExperienceBuffer.load_from_disk(buffer, config=CONFIG) as opened:
        id_ = opened.add(Experience(v_embed=np.ones(4), answer="\x1b[2J\r\n\ud800"))
    for done in (run("get", buffer, id_), run("search", buffer, "--id", 3, "--exact", "-k", 30)):
        assert done.code == 0
        assert "\x1b" not in done.out
        assert "\\x1b[2J\\r\\n\\ud800" in done.out


def test_search(run: Run, buffer: Path, home: Path) -> None:
    with ExperienceBuffer.load_from_disk(buffer, config=CONFIG) as opened:
        far = opened.add(Experience(v_embed=[1, 0, 0, -1], tags=("far",)))
        assert opened.rebuild_index()
        near = opened.add(Experience(v_embed=[1, 0, 0, -0.9]))
        opened.record_outcome([near], success=True)
    hits = json.loads(run("search", buffer, "--id", far, "-k", 3, "--json").out)["hits"]
    assert hits[0]["id"] == near
    assert far not in [hit["id"] for hit in hits]
    assert [hit["tier"] for hit in hits] == ["tail", "000001", "000001"]
    assert (hits[0]["retrieval_count"], hits[0]["backend"]) == (1, "exact")
    for hit in hits:
        assert hit["exact"] == pytest.approx(hit["similarity"], abs=1e-6)
        assert hit["visual"] == pytest.approx(hit["similarity"], abs=1e-6)
        assert hit["question"] is None
    np.save(home / "v.npy", np.array([[1, 0, 0, -1]], np.float32))
    (home / "v.json").write_text("[1, 0, 0, -1]")
    for name in ("v.npy", "v.json"):
        done = run("search", buffer, "--visual", home / name, "-k", 1, "--json")
        assert json.loads(done.out)["hits"][0]["id"] == far
    done = run("search", buffer, "--vector", home / "v.npy", "--tag", "far", "--json")
    assert [hit["id"] for hit in json.loads(done.out)["hits"]] == [far]
    (home / "v.json").write_text("nonsense")
    assert "neither an npy file" in run("search", buffer, "--visual", home / "v.json").err
    assert run("search", buffer).code == 2
    assert "similarity" in run("search", buffer, "--id", far, "--explain").out


def test_sample(run: Run, buffer: Path) -> None:
    once, again = (run("sample", buffer, "-n", 5, "--seed", 1, "--json").out for _ in range(2))
    assert once == again
    assert len(json.loads(once)["draws"]) == 5
    assert run("sample", buffer, "--uniform").out.count("\n") == 11
    with ExperienceBuffer.load_from_disk(buffer, config=CONFIG) as opened:
        opened.clear()
    empty = run("sample", buffer)
    assert empty.code == 1
    assert "is empty" in empty.err


def test_top(run: Run, buffer: Path) -> None:
    with ExperienceBuffer.load_from_disk(buffer, config=CONFIG) as opened:
        real = cli.looking.time.strftime

        def meanwhile(*arguments: Any) -> str:
            opened.add(Experience(v_embed=np.ones(4)))  # between two lines
            return str(real(*arguments))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("expbuf_core.cli.looking.time.strftime", meanwhile)
            done = run("top", buffer, "--count", 3, "--interval", 0.01, "--search")
        assert done.code == 0
        assert len(done.out.splitlines()) == 4
        document = json.loads(run("top", buffer, "--count", 1, "--interval", 0.01, "--json").out)
        assert document["experiences"] == 23
        assert document["processes"] == 1
    assert run("top", buffer, "--interval", 0).code == 2


def test_init(run: Run, home: Path) -> None:
    new = ("init", home / "new", "--max-size", 7, "--v-dim", 4, "--q-dim", 3, "--metric", "l2")
    done = run(*new, "--fusion", "weighted_concat", "--json")
    facts = json.loads(done.out)
    assert (facts["max_size"], facts["v_dim"], facts["q_dim"]) == (7, 4, 3)
    assert (facts["metric"], facts["fusion"]["name"]) == ("l2", "weighted_concat")
    again = run(*new)
    assert again.code == 1
    assert "holds a buffer already" in again.err
    assert run("init", home / "other", "--max-size", 0).code == 2
    assert run("init", home / "third").out.endswith("an empty buffer for 100000 experiences\n")


def test_verify(run: Run, buffer: Path) -> None:
    assert run("verify", buffer).code == 0
    spoil(buffer, b"answer 7")
    found = run("verify", buffer)
    assert found.code == 3
    assert "DAMAGE" in found.out
    assert "Run `expbuf verify`" not in found.out
    damage, rest = json.loads(run("verify", buffer, "--json").out)
    assert damage["damage"] is True
    assert rest["damage"] is False
    assert "reading stops there" in rest["message"]


def test_snapshot(run: Run, buffer: Path) -> None:
    assert run("snapshot", buffer).out.startswith("snapshot of lsn ")
    assert run("snapshot", buffer.parent / "nothing").code == 1


def test_plugins(run: Run) -> None:
    names = {plugin["name"] for plugin in json.loads(run("plugins", "--json").out)}
    assert {"builtin", "file"} <= names
    text = run("plugins").out
    assert re.search(
        r"^persistence:file +expbuf-file +\S+ +1 +durable, multiprocess +ok$", text, re.M
    )
    assert re.search(r"^plugin:metrics +expbuf-metrics +\S+ +- +\d+ events +ok$", text, re.M)


def test_plugins_that_cannot_be_used(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    real = default_registry().plugins()
    clash = dataclasses.replace(real[0].providers[0], error="several plugins offer it: a and b")
    found = [
        dataclasses.replace(real[0], providers=(clash,)),
        dataclasses.replace(real[1], providers=(clash,)),
        dataclasses.replace(real[1], name="x", status="failed", error="no module", providers=()),
    ]
    monkeypatch.setattr("expbuf_core.plugins.PluginRegistry.plugins", lambda self: found)
    text = run("plugins").out
    assert text.count("several plugins offer it: a and b") == 1
    assert text.count("cannot be selected") == 2
    assert re.search(r"^plugin:x .* failed$", text, re.M)
    assert text.endswith("\nno module\n")


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


def test_migrate_names_those_who_go_on_with_the_old_one(run: Run, buffer: Path, home: Path) -> None:
    with ExperienceBuffer.open(buffer, config=CONFIG):
        done = run("migrate", buffer, home / "copy", "--persistence", "file", "--json")
    assert done.code == 0
    assert json.loads(done.out)["experiences"] == 20
    assert f"process {os.getpid()} still has {buffer} open" in done.err


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("search", "memory"), "nothing to be similar to"),
        (("search", "memory", "--id", 0, "--vector", "v.npy"), "too much to be similar to"),
        (("search", "memory", "--vector", "a.npy", "--question", "q.npy"), "too much"),
        (("sample", "memory", "--seed", -1), "at least 0"),
        (("sample", "memory", "-n", "x"), "expected a whole number, found 'x'"),
        (("builder", "memory", "--idle-s", -1), "at least 0"),
        (("builder", "memory", "--idle-s", "nan"), "at least 0"),
        (("builder", "memory", "--config", "{bad"), "expected JSON"),
        (("builder", "memory", "--config", "[1]"), "expected a mapping of sections"),
        (("builder", "memory", "--config", '{"max_size": 1}'), "max_size: not for a builder"),
        (("builder", "memory", "--config", '{"index": {"seed": -1}}'), "index.seed = -1"),
        (("init", "new", "--v-dim", -1), "at least 0"),
        (("export", "memory", "memory.csv"), "no format for .csv"),
        (("import", "made", "new", "--skip", -1), "at least 0"),
    ],
)
def test_arguments_that_make_no_sense(
    run: Run, buffer: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[Any, ...], word: str
) -> None:
    monkeypatch.chdir(buffer.parent)
    before = sorted(path.name for path in buffer.parent.iterdir())
    done = run(*arguments)
    assert done.code == 2
    assert word in done.err
    assert sorted(path.name for path in buffer.parent.iterdir()) == before


def test_errors_of_the_builder_look_like_all_others(buffer: Path) -> None:
    command = [sys.executable, "-m", "expbuf_core", "builder", str(buffer / "nowhere")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("expbuf: the index builder cannot open ")


def test_what_is_named_must_be_there(run: Run, buffer: Path, home: Path) -> None:
    """No fallback for an index that was asked for; no folder for what keeps nothing."""
    assert "no index backend named 'granite'" in run("reindex", buffer, "--index", "granite").err
    done = run("init", home / "new", "--persistence", "memory")
    assert (done.code, (home / "new").exists()) == (1, False)
    assert "keeps nothing" in done.err
    assert "v.npy: cannot be read" in run("search", buffer, "--vector", home / "v.npy").err
    (home / "v.npy").write_bytes(b"no numbers")
    assert "allow_pickle" not in run("search", buffer, "--vector", home / "v.npy").err


def test_folders_that_hold_no_buffer(run: Run, buffer: Path, home: Path) -> None:
    assert "nothing is no buffer: there is no such folder" in run("info", home / "nothing").err
    assert "is no buffer: it has no expbuf.json\n" in run("info", home).err
    assert run("snapshot", buffer).code == 0
    (buffer / "expbuf.json").unlink()
    damaged = run("info", buffer)
    assert damaged.code == 3
    assert "finds the identity again" in " ".join(damaged.out.split())


@pytest.mark.parametrize("command", ["migrate", "repair", "backup", "restore"])
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
            patch.setattr(output, "progress", lambda what, e=interrupt: contextlib.nullcontext(e))
            ended = run(*arguments)
        assert ended.code == 130
        assert ended.err == f"\nexpbuf: {command} was interrupted; {output.RESUMABLE}\n"
        assert run("info", home / "copy").code == 1, "it is no buffer yet"
        assert answers(buffer) == ALL
    assert run(*arguments).code == 0
    assert answers(home / "copy") == ALL


def test_progress_is_shown_to_a_terminal_only(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with output.progress("copying") as show:
        assert show is None
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setitem(sys.modules, "rich", None)  # as where it is not installed
    clock = iter([0.0, 2.0, 4.0, 8.0])
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    with output.progress("copying") as show:
        assert show is not None
        for done in (0, 1000, 4000):
            show(done, 4000)
    assert capsys.readouterr().err.split("\r") == [
        "",
        "copying: 0 %, 0/s",
        "copying: 25 %, 250/s, 12 s left",
        "copying: 100 %, 500/s          \n",
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


# ---------------------------------------------------------------- copies


def test_backup_and_restore(run: Run, buffer: Path, home: Path) -> None:
    done = run("backup", buffer, home / "b", "--config", home / "small.yaml")
    assert (done.code, done.err) == (0, "")
    assert done.out == f"20 experiences are in {home / 'b'} (file)\n"
    shutil.rmtree(buffer)
    report = json.loads(run("restore", home / "b", buffer, "--json").out)
    assert (report["experiences"], report["backend"]) == (20, "file")
    assert answers(buffer) == ALL
    again = run("restore", home / "b", buffer)
    assert again.code == 1
    assert "holds a buffer already" in again.err


def test_export_and_import(run: Run, buffer: Path, home: Path) -> None:
    done = run("export", buffer, home / "e", "--json")
    report = json.loads(done.out)
    assert (report["format"], report["experiences"]) == ("jsonl", 20)
    done = run("import", home / "e", home / "new", "--config", home / "small.yaml")
    assert done.out == f"20 experiences are in {home / 'new'}, with their ids\n"
    assert answers(home / "new") == ALL
    done = run("import", home / "e", home / "new", "--add", "--skip", 15)
    assert done.out == f"5 experiences are in {home / 'new'}, as ids 20 to 24\n"
    assert run("export", buffer, home / "e").code == 1


def test_an_export_does_not_go_into_the_buffer(run: Run, buffer: Path) -> None:
    for name in ("e", "e.parquet"):
        done = run("export", buffer, buffer / name)
        assert done.code == 1
        assert "lies in the buffer's own folder" in done.err
    with ExperienceBuffer.open(buffer, config=CONFIG) as opened, pytest.raises(StorageError):
        exchange.export_experiences(opened, buffer / "e")
    assert not (buffer / "e").exists()


def test_an_addition_of_nothing_says_so(run: Run, buffer: Path, home: Path) -> None:
    run("export", buffer, home / "e")
    done = run("import", home / "e", buffer, "--add", "--skip", 99)
    assert (done.code, "nothing (more) for" in done.out) == (0, True)
    assert "None" not in done.out


def test_a_closed_stream_is_no_error(buffer: Path) -> None:
    for closed in (">&-", "2>&-", ">&- 2>&-"):
        command = f"exec {sys.executable} -m expbuf_core info {buffer} --json {closed}"
        done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")


def test_an_interrupted_addition_says_how_to_go_on(
    run: Run, buffer: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run("export", buffer, home / "e").code == 0
    monkeypatch.setattr("expbuf_core.exchange_formats._BATCH", 7)
    real = ExperienceBuffer.add_many
    calls = [0]

    def interrupted(self: ExperienceBuffer, *arguments: Any, **named: Any) -> Any:
        calls[0] += 1
        if calls[0] == 3:
            raise KeyboardInterrupt
        return real(self, *arguments, **named)

    monkeypatch.setattr(ExperienceBuffer, "add_many", interrupted)
    ended = run("import", home / "e", home / "new", "--add", "--config", home / "small.yaml")
    assert ended.code == 130
    skip = re.search(r"go on with --skip (\d+)", ended.err)
    assert skip
    assert run("import", home / "e", home / "new", "--add", "--skip", skip[1]).code == 0
    assert answers(home / "new") == ALL


def test_reindex(run: Run, buffer: Path) -> None:
    done = run("reindex", buffer, "--metric", "l2", "--index", "exact", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["experiences"] == 20
    assert json.loads(run("info", buffer, "--json").out)["settings"]["metric"] == "l2"
    assert run("reindex", buffer, "--fusion", "granite").code == 1


def test_report(run: Run, buffer: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    done = run("report", buffer, "--output", home / "page.html", "--open", "--points", 5)
    assert (done.code, done.out) == (0, f"{home / 'page.html'}\n")
    assert opened == [(home / "page.html").as_uri()]
    assert run("report", buffer).out == f"{buffer}.html\n"


def test_bench_leaves_nothing(run: Run, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("expbuf_core.measuring._SECONDS", 0.001)
    found = json.loads(run("bench", home, "--experiences", 100, "--dim", 4, "--json").out)
    assert {"add", "search, exact", "get", "open and close"} <= {m["what"] for m in found}
    assert all(m["per_second"] > 0 and m["median_ms"] <= m["p99_ms"] for m in found)
    assert list(home.iterdir()) == []


def test_the_demo_is_killed_and_goes_on(run: Run, home: Path) -> None:
    report = json.loads(run("demo", home / "memory", "--questions", 40, "--json").out)
    assert report["killed_at"] == 20
    assert report["acknowledged"] == 20 <= report["found"]
    assert report["lost"] == 0
    assert run("demo", home / "memory").code == 1
    with ExperienceBuffer.load_from_disk(home / "memory", config={"index": "exact"}) as memory:
        assert len(memory) >= 40


def test_a_demo_without_storage_says_so(home: Path) -> None:
    """Installed alone, the core has none; the agent's process would end in a traceback."""
    done = subprocess.run(
        [sys.executable, "-m", "expbuf_core", "demo", home / "memory"],
        env={**os.environ, "EXPBUF_DISABLE_PLUGINS": "all"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("expbuf: no persistence backend named 'file'")
    assert "Traceback" not in done.stderr
    assert not (home / "memory").exists()


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
    topics = {finding["topic"] for finding in found}
    assert topics >= {"versions", "native code", "plugin", "faiss", "fork"}
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


def test_doctor_knows_which_storage_is_missing(
    run: Run, buffer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    identity = folders.read_identity(buffer)
    assert identity is not None
    folders.write_identity(buffer, "granite", identity.uuid, FileSystem())
    monkeypatch.setattr(doctor, "_sync_times", lambda place: [1e-3] * 5)
    done = run("doctor", buffer)
    assert done.code == 3
    assert "PROBLEM: a buffer stored by 'granite', which cannot be had here" in done.out


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
