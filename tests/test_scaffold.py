"""`expbuf plugin new`: what it writes passes the suite of its kind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from expbuf_core.cli import main
from expbuf_core.errors import ConfigError
from expbuf_core.plugins import KINDS as PLUGIN_KINDS
from expbuf_core.scaffold import KINDS, new_plugin

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@pytest.mark.parametrize("kind", KINDS)
def test_its_tests_pass(kind: str, tmp_path: Path) -> None:
    module, test, project, readme = new_plugin("my_own", kind, tmp_path)
    assert {module.parent, test.parent, project.parent} == {tmp_path / "expbuf_my_own"}
    run_tests(module.parent)
    facts = tomllib.loads(project.read_text())
    assert facts["project"]["entry-points"]["expbuf"] == {"my_own": "expbuf_my_own"}
    assert "my_own" in readme.read_text()
    assert sorted(path.name for path in module.parent.iterdir()) == sorted(
        path.name for path in (module, test, project, readme)
    )


@pytest.mark.parametrize("kind", ["scorer", "fusion"])  # these open a buffer, with all plugins
def test_they_pass_beside_the_installed_plugin(kind: str, tmp_path: Path) -> None:
    module, *_ = new_plugin("my_own", kind, tmp_path)
    metadata = tmp_path / "installed" / "expbuf_my_own-0.1.0.dist-info"
    metadata.mkdir(parents=True)
    metadata.joinpath("METADATA").write_text(
        "Metadata-Version: 2.1\nName: expbuf-my-own\nVersion: 0.1.0\n"
    )
    metadata.joinpath("entry_points.txt").write_text("[expbuf]\nmy_own = expbuf_my_own\n")
    run_tests(module.parent, metadata.parent)


def run_tests(folder: Path, *path: Path) -> None:
    # Rewriting the suites' assertions takes longer than they do, and only makes messages longer.
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:hypothesispytest", "--assert=plain"]
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "pytest", *options, "."],
        cwd=folder,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(map(str, [folder, *path])),
            "PYTHONDONTWRITEBYTECODE": "1",
        },
        timeout=200,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout


@pytest.mark.parametrize("kind", KINDS)
def test_what_it_writes_is_tidy(kind: str, tmp_path: Path) -> None:
    for path in new_plugin("my_own", kind, tmp_path):
        text = path.read_text()
        assert "$" not in text
        assert not text.startswith("\n")
        assert text.endswith("\n")
        assert all(len(line) <= 100 and line == line.rstrip() for line in text.splitlines())


def test_every_kind_can_be_begun() -> None:
    assert len(KINDS) == len(PLUGIN_KINDS)


@pytest.mark.parametrize("name", ["", "My", "my-own", "1st", "class", "../up", "a b"])
def test_names_that_cannot_be_selected(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a letter first, and no keyword of Python"):
        new_plugin(name, "scorer", tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("name", "kind"), [("weighted_sum", "scorer"), ("file", "persistence")])
def test_names_that_are_taken(name: str, kind: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="of this name is installed"):
        new_plugin(name, kind, tmp_path)
    assert not list(tmp_path.iterdir())
    assert new_plugin(name, "index", tmp_path)  # each kind has names of its own


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    module, *_ = new_plugin("mine", "scorer", tmp_path)
    before = module.read_text()
    with pytest.raises(ConfigError, match="exists"):
        new_plugin("mine", "fusion", tmp_path)
    assert module.read_text() == before


def test_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["plugin", "new", "mine", "--kind", "scorer"]) == 0
    said = capsys.readouterr().out
    assert "expbuf_mine/expbuf_mine.py" in said
    assert (tmp_path / "expbuf_mine" / "test_expbuf_mine.py").exists()
    assert main(["plugin", "new", "mine", "--kind", "scorer"]) == 1
    assert "exists already" in capsys.readouterr().err
    assert main(["plugin", "new", "other", "--kind", "index", "--into", "there"]) == 0
    assert (tmp_path / "there" / "expbuf_other" / "expbuf_other.py").exists()
