"""The documents: their examples run, and nothing that they promise to list is missing.

A page's Python examples are one program, in the order in which they stand, run in an empty folder
of its own. A comment before an example changes that:

    <!-- file: NAME -->   the example is written into that file
    <!-- alone -->        the example is a program by itself
    <!-- killed -->       the same, and it ends by SIGKILL

An example that is not for running is fenced as `text`, `console`, `toml` or `yaml`.
"""

from __future__ import annotations

import importlib
import inspect
import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from expbuf_core import contracts, errors, hookspecs, testing
from expbuf_core.config_schema import BufferConfig, load_config
from expbuf_core.filesystem import FileSystem
from expbuf_core.validation import iter_keys

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
TIMEOUT_S = 60

_EXAMPLE = re.compile(
    r"(?:<!-- (?P<mark>[a-z]+)(?:: (?P<name>\S+))? -->\n)?```(?P<language>\w+)\n(?P<code>.*?)^```",
    re.DOTALL | re.MULTILINE,
)


class Program(NamedTuple):
    """Python from a page. `mark`: "", "alone" or "killed"."""

    mark: str
    code: str


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def examples(page: Path) -> tuple[list[Program], dict[str, str]]:
    """The programs of a page, and the files it shows."""
    programs: list[Program] = []
    files: dict[str, str] = {}
    together: list[str] = []
    for found in _EXAMPLE.finditer(text_of(page)):
        mark, code = found["mark"] or "", found["code"]
        if found["language"] != "python":
            continue
        if mark == "file":
            files[found["name"]] = code
        elif mark in ("alone", "killed"):
            programs.append(Program(mark, code))
        else:
            assert not mark, f"{page.name}: unknown mark {mark!r}"
            together.append(code)
    if together:
        programs.insert(0, Program("", "\n".join(together)))
    return programs, files


def run(folder: Path, code: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("EXPBUF_")}
    return subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:__main__", "-c", code],
        cwd=folder,
        env={**environment, "PYTHONPATH": str(folder)},
        timeout=TIMEOUT_S,
        capture_output=True,
        text=True,
        check=False,
    )


# ---------------------------------------------------------------- examples run


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_examples_run(page: Path, tmp_path: Path) -> None:
    programs, files = examples(page)
    if page.name == "README.md":
        programs = []  # below
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    for name, code in files.items():
        (tmp_path / name).write_text(code, encoding="utf-8")
    for program in programs:
        done = run(tmp_path, program.code)
        wanted = -signal.SIGKILL if program.mark == "killed" else 0
        assert done.returncode == wanted, f"{program.code}\n{done.stdout}\n{done.stderr}"


def test_the_readme_program_is_killed_and_comes_back(tmp_path: Path) -> None:
    programs, _ = examples(ROOT / "README.md")
    (program,) = programs
    assert len(program.code.splitlines()) <= 20, "a program of a dozen lines or so"
    first = run(tmp_path, program.code)
    assert first.returncode == -signal.SIGKILL, first.stderr
    assert first.stdout.startswith("0 experiences"), first.stdout
    second = run(tmp_path, program.code)
    assert second.returncode == 0, second.stderr
    count = re.search(r"range\((\d+)\)", program.code)
    assert count
    assert second.stdout.startswith(f"{count[1]} experiences; recovered: "), second.stdout
    assert "successes: 5" in second.stdout, "outcomes came back, too"


PLUGINS_OF_THE_GUIDE = ["fresh", "interaction", "projected", "json_files"]
# With EXPBUF_LONG=1 they run, too.
SLOW = "p14 or p15 or p33 or p50"


def test_plugins_of_the_guide_have_tests() -> None:
    _, files = examples(DOCS / "plugins.md")
    named = [f"{test}expbuf_{name}.py" for name in PLUGINS_OF_THE_GUIDE for test in ("", "test_")]
    assert sorted(files) == sorted(named)


@pytest.mark.parametrize("plugin", PLUGINS_OF_THE_GUIDE)
def test_a_plugin_of_the_guide_passes_its_suite(plugin: str, tmp_path: Path) -> None:
    _, files = examples(DOCS / "plugins.md")
    for name in (f"expbuf_{plugin}.py", f"test_expbuf_{plugin}.py"):
        (tmp_path / name).write_text(files[name], encoding="utf-8")
    long = os.environ.get("EXPBUF_LONG", "") not in ("", "0")
    chosen = [] if long else ["-k", f"not ({SLOW})"]
    memory = Path("/dev/shm")  # where a sync costs nothing
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        # Rewriting the suite's assertions takes longer than most of it.
        options = ["-q", "-p", "no:cacheprovider", "-p", "no:hypothesispytest", "--assert=plain"]
        options += ["--basetemp", f"{folder}/tests", *chosen]
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *options, f"test_expbuf_{plugin}.py"],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(tmp_path)},
            timeout=1000 if long else TIMEOUT_S,
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert " passed" in done.stdout


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_yaml_examples_load(page: Path) -> None:
    for found in _EXAMPLE.finditer(text_of(page)):
        if found["language"] == "yaml":
            document = yaml.safe_load(found["code"])
            if "experience_buffer" in document:
                # Backends of the tutorial are not installed; everything else must be right.
                load_config(document)


# ---------------------------------------------------------------- nothing is missing


def signature(function: Any) -> str:
    """As it is written in the source: `name(host: HostInfo) -> X`."""
    parameters = inspect.signature(function)
    text = ", ".join(
        f"{p.name}: {p.annotation}" if p.annotation is not p.empty else p.name
        for p in parameters.parameters.values()
    )
    return f"{function.__name__}({text}) -> {parameters.return_annotation}"


def blocks(page: Path, mark: str) -> list[str]:
    """Lines of the fenced blocks behind a comment."""
    pattern = rf"<!-- {re.escape(mark)} -->\n```text\n(.*?)^```"
    found = re.findall(pattern, text_of(page), re.DOTALL | re.MULTILINE)
    assert found, f"{page.name}: no block marked {mark!r}"
    return [line for block in found for line in block.splitlines() if line.strip()]


def test_every_hook_is_documented_with_its_signature() -> None:
    specs = [
        signature(function)
        for name, function in vars(hookspecs).items()
        if hasattr(function, f"{hookspecs.PROJECT}_spec") and name.startswith("expbuf_")
    ]
    assert len(specs) == 12
    assert sorted(blocks(DOCS / "plugins.md", "hooks")) == sorted(specs)
    for spec in specs:
        if spec.startswith("expbuf_on_"):
            assert f"\n| `{spec.partition('(')[0]}` |" in text_of(DOCS / "plugins.md")


@pytest.mark.parametrize(
    "name",
    ["IndexBackend", "IndexSegment", "PersistenceAdapter", "LogFollower", "Pin", "FileSystem"],
)
def test_every_method_of_a_contract_is_documented(name: str) -> None:
    documented = {
        line.partition(")")[0] + ")" for line in blocks(DOCS / "plugins.md", f"methods: {name}")
    }
    declared = set()
    for method, function in vars(getattr(contracts, name, FileSystem)).items():
        if not method.startswith("_") and inspect.isfunction(function):
            declared.add(f"{method}{_without_types(inspect.signature(function))}")
    assert documented == declared


def _without_types(signature: inspect.Signature) -> str:
    """What a caller must know of it: names, defaults, and what goes by its name only."""
    _, *parameters = signature.parameters.values()
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in parameters]
    return str(signature.replace(parameters=bare, return_annotation=inspect.Signature.empty))


@pytest.mark.parametrize(
    "name", ["ScoringBatch", "IndexContext", "PersistenceContext", "Operation", "LoggedOperation"]
)
def test_every_field_of_a_contract_is_documented(name: str) -> None:
    kind = getattr(contracts, name)
    for field in getattr(kind, "_fields", None) or kind.__dataclass_fields__:
        assert f"`{field}`" in text_of(DOCS / "plugins.md"), field


def test_numbers_of_the_suites_are_documented() -> None:
    documented = set(re.findall(r"^- \*\*([PXSF]\d+)\*\*", text_of(DOCS / "plugins.md"), re.M))
    tested = set()
    for module in (ROOT / "expbuf_core" / "testing").glob("*.py"):
        numbers = set(re.findall(r'"""([A-Z]\d+)\b', text_of(module)))
        assert numbers <= documented, f"{module.name}: {sorted(numbers - documented)}"
        tested |= numbers
    assert {number[0] for number in tested} == set("PXSF")
    assert len(tested) > 0.8 * len(documented)


@pytest.mark.parametrize("suite", testing.__all__)
def test_every_attribute_of_a_suite_is_documented(suite: str) -> None:
    for kind in getattr(testing, suite).__mro__[:-1]:
        for name in inspect.get_annotations(kind):
            assert name == "kind" or f"`{name}`" in text_of(DOCS / "plugins.md"), name


def test_numbers_are_given_once() -> None:
    numbers = re.findall(r"^- \*\*([PXSF]\d+)\*\*", text_of(DOCS / "plugins.md"), re.M)
    assert len(numbers) == len(set(numbers))


def test_every_error_is_documented() -> None:
    page = text_of(DOCS / "errors.md")
    for name, error in vars(errors).items():
        if not inspect.isclass(error) or not issubclass(error, errors.ExpbufError):
            continue
        section = re.search(rf"^### `{name}`\n(.*?)(?=^#|\Z)", page, re.M | re.S)
        assert section, f"docs/errors.md lacks {name}"
        if error is not errors.ExpbufError:
            bases = ", ".join(f"`{base.__name__}`" for base in error.__bases__)
            assert f"Is a {bases}." in section[1], f"{name}: its bases are {bases}"
        for attribute in re.findall(r"^        (\w+): ", error.__doc__ or "", re.M):
            assert f"`.{attribute}`" in section[1], f"{name}.{attribute}"
    named = set(re.findall(r"^### `(\w+)`", page, re.M))
    assert named <= {*vars(errors), *vars(contracts)}


def test_the_configuration_reference_is_current() -> None:
    sys.path.insert(0, str(DOCS))
    try:
        generator = importlib.import_module("generate_configuration")
    finally:
        sys.path.remove(str(DOCS))
    stored = text_of(DOCS / "configuration.md")
    assert generator.document(stored) == stored, "run python docs/generate_configuration.py"


def test_every_key_is_documented() -> None:
    page = text_of(DOCS / "configuration.md")
    for key in iter_keys(BufferConfig):
        assert f"`{key.name}`" in page, key.name


def test_tests_that_are_named_exist() -> None:
    """An invariant that names a test which is gone would be proved by nothing."""
    for page in PAGES:
        for file, name in re.findall(r"`([\w/.]+\.py)::(\w+)`", text_of(page)):
            path = ROOT / file
            assert path.exists(), f"{page.name}: {file}"
            assert re.search(rf"^\s*(?:def|class) {name}\b", path.read_text(), re.M), (
                f"{page.name}: {file}::{name}"
            )


def test_every_invariant_names_its_tests() -> None:
    page = text_of(DOCS / "ARCHITECTURE.md")
    rows = re.findall(r"^\| \*\*(I\d+)\*\* \|(.*)$", page, re.M)
    assert [name for name, _ in rows] == [f"I{i}" for i in range(1, 11)]
    for name, row in rows:
        assert re.search(r"`[\w/.]+\.py::\w+`", row), name


def test_links_lead_somewhere() -> None:
    pages = [*PAGES, *ROOT.glob("*.md"), *ROOT.glob("plugins/*/*.md"), *ROOT.glob("docs/*/*.md")]
    broken = []
    for page in dict.fromkeys(pages):
        prose = re.sub(r"^```.*?^```", "", text_of(page), flags=re.M | re.S)
        for target in re.findall(r"\]\(([^)\s]+)\)", prose):
            if re.match(r"[a-z]+:", target):
                continue
            file, _, anchor = target.partition("#")
            path = (page.parent / file).resolve() if file else page
            known = path.exists() and (not anchor or anchor in anchors(text_of(path)))
            if not known:
                broken.append(f"{page.relative_to(ROOT)}: {target}")
    assert not broken


def anchors(text: str) -> set[str]:
    """Anchors that a renderer makes of the headings."""
    found = set()
    for title in re.findall(r"^#+ (.*)$", text, re.M):
        plain = re.sub(r"[^\w\- ]", "", title.strip().lower())
        found.add(plain.replace(" ", "-"))
    return found


def test_modules_of_the_map_exist_and_none_is_missing() -> None:
    page = text_of(DOCS / "ARCHITECTURE.md")
    modules = {
        path.relative_to(ROOT).as_posix()
        for path in ROOT.glob("expbuf_core/**/*.py")
        if not path.name.startswith("__") and path.name != "_version.py"
    }
    named = set(re.findall(r"^\| `(expbuf_core/[\w/]+\.py)` \|", page, re.M))
    assert named == modules
