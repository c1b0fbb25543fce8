"""docs/cli.md: every command and option is on it, and its examples run."""

from __future__ import annotations

import argparse
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from expbuf_core import cli
from expbuf_core.cli.main import parser

PAGE = Path(__file__).parents[1] / "docs" / "cli.md"
OF_ARGPARSE = {"-h", "--help", "--version"}


def commands(of: argparse.ArgumentParser, name: str) -> Iterator[tuple[str, argparse.Action]]:
    """Arguments of all commands, by the name of the command."""
    for action in of._actions:
        if isinstance(action, argparse._SubParsersAction):
            for word, command in action.choices.items():
                yield from commands(command, f"{name} {word}")
        else:
            yield name, action


def sections() -> dict[str, str]:
    found = re.findall(
        r"^### `(expbuf [\w ]+)`\n(.*?)(?=^#{2,3} |\Z)", PAGE.read_text("utf-8"), re.M | re.S
    )
    return dict(found)


def test_every_command_and_option_is_documented() -> None:
    documented = sections()
    known = {name for name, _ in commands(parser(), "expbuf")} - {"expbuf", "expbuf plugin"}
    assert set(documented) == known
    missing = []
    for name, action in commands(parser(), "expbuf"):
        if name not in documented or OF_ARGPARSE & set(action.option_strings):
            continue
        (word, *others) = action.option_strings[::-1] or [action.dest]
        if not re.search(rf"`{re.escape(word)}[` ]", documented[name]):
            missing.append(f"{name} {word}")
        assert not others, f"{name} {word} has two names"
    assert not missing
    for name, text in documented.items():
        options = {o for n, action in commands(parser(), "expbuf") if n == name
                   for o in action.option_strings}  # fmt: skip
        shown = set(re.findall(r"`(--?[a-z][\w-]*)[` ]", text.partition("| | |")[2]))
        assert shown <= options, f"{name}: {sorted(shown - options)} is documented and not there"


def test_choices_are_documented() -> None:
    documented = sections()
    for name, action in commands(parser(), "expbuf"):
        if action.choices and not isinstance(action, argparse._SubParsersAction):
            for choice in action.choices:
                assert f"`{choice}`" in documented[name], f"{name}: {choice}"


def test_every_command_has_an_example() -> None:
    for name, text in sections().items():
        assert re.search(rf"^{name}( |$)", text, re.M), name


def examples() -> Iterator[tuple[str, str, str]]:
    """(kind, name, text) of what the page shows, in order."""
    pattern = (
        r"<!-- file: (?P<file>\S+) -->\n```\w+\n(?P<text>.*?)^```"
        r"|<!-- npy: (?P<npy>\S+) (?P<values>\[[^\n]*\]) -->"
        r"|^```console\n(?P<code>.*?)^```"
    )
    for found in re.finditer(pattern, PAGE.read_text("utf-8"), re.M | re.S):
        if found["file"]:
            yield "file", found["file"], found["text"]
        elif found["npy"]:
            yield "npy", found["npy"], found["values"]
        else:
            yield "console", "", found["code"]


def test_the_examples_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("expbuf_core.measuring._SECONDS", 0.001)
    monkeypatch.setattr("os.nice", lambda by: None)  # of a builder, which is this process here
    ran = 0
    for kind, name, text in examples():
        if kind != "console":
            Path(name).parent.mkdir(exist_ok=True)
        if kind == "file":
            Path(name).write_text(text)
        elif kind == "npy":
            np.save(name, np.array(json.loads(text), np.float32))
        else:
            for line in text.splitlines():
                command, _, comment = line.partition("  #")
                program, *arguments = shlex.split(command)
                assert program == "expbuf"
                wanted = set(re.findall(r"\d+", comment)) if "exit code" in comment else {"0"}
                code = cli.main(arguments)
                shown = capsys.readouterr()
                assert str(code) in wanted, f"{line}\n{shown.out}\n{shown.err}"
                assert shown.out or code or arguments[0] == "builder", line
                ran += 1
    assert ran >= len(sections())
