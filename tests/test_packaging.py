"""What is shipped: each distribution's wheel, metadata, declared dependencies and import cost."""

from __future__ import annotations

import ast
import functools
import importlib.metadata
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Callable
from email.message import Message
from email.parser import Parser
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = [ROOT, *sorted(path.parent for path in ROOT.glob("plugins/*/pyproject.toml"))]
HEAVY = {"faiss", "lmdb", "torch", "scipy", "sklearn", "matplotlib", "hypothesis", "pytest"}
Build = Callable[[Path], zipfile.ZipFile]
RUNS_CODE = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}


def project(folder: Path) -> dict[str, Any]:
    return tomllib.loads((folder / "pyproject.toml").read_text("utf-8"))["project"]


def package(folder: Path) -> str:
    return "expbuf_core" if folder == ROOT else folder.name


def sources(folder: Path) -> list[Path]:
    return sorted((folder / package(folder)).rglob("*.py"))


def imported_modules(path: Path) -> set[str]:
    """Top-level names of everything that a file imports, at whatever depth."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"), str(path))):
        if isinstance(node, ast.Import):
            found.update(alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module.partition(".")[0])
    return found


every_distribution = pytest.mark.parametrize(
    "folder", FOLDERS, ids=[package(folder) for folder in FOLDERS]
)


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """Builds the wheel of the distribution in a folder, once."""

    @functools.cache
    def build(folder: Path) -> zipfile.ZipFile:
        out = tmp_path_factory.mktemp(package(folder))
        command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(out)]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        (path,) = out.glob("*.whl")
        return zipfile.ZipFile(io.BytesIO(path.read_bytes()))

    return build


def metadata(wheel: zipfile.ZipFile) -> Message:
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    return Parser().parsestr(wheel.read(name).decode())


@every_distribution
def test_wheel_holds_the_package_and_nothing_else(folder: Path, build: Build) -> None:
    name = package(folder)
    names = set(build(folder).namelist())
    assert {f"{name}/__init__.py", f"{name}/py.typed"} <= names
    assert any(re.fullmatch(r".*\.dist-info/licenses/LICENSE", file) for file in names)
    tops = {file.partition("/")[0] for file in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {name}
    on_disk = {path.relative_to(folder).as_posix() for path in sources(folder)}
    assert on_disk <= names


def test_native_code_is_there_where_it_can_be() -> None:
    """Else its tests are skipped, and nobody notices."""
    from expbuf_core.native import native, why_not

    compiler = shlex.split(sysconfig.get_config_var("CC") or "cc")[0]
    if os.environ.get("EXPBUF_NATIVE") == "0" or shutil.which(compiler) is None:
        pytest.skip("switched off, or no C compiler")
    assert native is not None, why_not


@every_distribution
def test_wheel_metadata(folder: Path, build: Build) -> None:
    fields = metadata(build(folder))
    assert fields["Name"] == package(folder).replace("_", "-")
    assert fields["License-Expression"] == "MIT"
    assert fields["Requires-Python"] == ">=3.10"
    assert fields["Summary"]
    assert fields.get_payload().strip()  # the README


@every_distribution
def test_licence_is_the_same_everywhere(folder: Path) -> None:
    assert (folder / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()


@every_distribution
def test_versions_agree(folder: Path, build: Build) -> None:
    import expbuf_core

    assert metadata(build(folder))["Version"] == expbuf_core.__version__
    assert importlib.metadata.version(package(folder)) == expbuf_core.__version__


@every_distribution
def test_sibling_requirements_admit_the_present_versions(folder: Path) -> None:
    fields = project(folder)
    extras = fields.get("optional-dependencies", {}).values()
    for text in [*fields["dependencies"], *(text for extra in extras for text in extra)]:
        requirement = Requirement(text)
        if requirement.name.startswith("expbuf-") and not requirement.extras:
            assert requirement.specifier, f"{text} has no bounds"
            assert requirement.specifier.contains(importlib.metadata.version("expbuf-core"))


@pytest.mark.parametrize("folder", FOLDERS[1:], ids=package)
def test_plugin_is_found_through_its_entry_point(folder: Path) -> None:
    offered = {
        entry.name: entry.value
        for entry in importlib.metadata.entry_points(group="expbuf")
        if entry.dist is not None and entry.dist.name == package(folder).replace("_", "-")
    }
    assert offered == project(folder).get("entry-points", {}).get("expbuf", {})


@every_distribution
def test_what_is_imported_is_declared(folder: Path) -> None:
    fields = project(folder)
    extras = fields.get("optional-dependencies", {}).values()
    texts = [*fields["dependencies"], *(text for extra in extras for text in extra)]
    declared = {re.sub(r"[-_.]+", "_", Requirement(text).name).lower() for text in texts}
    if "pyyaml" in declared:
        declared.add("yaml")
    if "pydantic" in declared:
        declared |= {"pydantic_core", "typing_extensions"}  # it never comes without these two
    if any(name.startswith("faiss") for name in declared) or package(folder) == "expbuf_faiss":
        declared.add("faiss")  # expbuf_faiss leaves the choice of the wheel to who depends on it
    for path in sources(folder):
        foreign = imported_modules(path) - set(sys.stdlib_module_names) - {package(folder)}
        assert foreign <= declared, f"{path} imports {sorted(foreign - declared)}"


@every_distribution
def test_importing_the_package_imports_nothing_heavy(folder: Path) -> None:
    code = f"import sys, {package(folder)}; print(*sorted(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert not HEAVY & set(done.stdout.split())


def test_core_imports_no_plugin() -> None:
    code = "import sys, expbuf_core; print(*sorted(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    plugins = {package(folder) for folder in FOLDERS[1:]}
    assert not plugins & set(done.stdout.split())
    for path in sources(ROOT):
        assert not plugins & imported_modules(path), path


@every_distribution
def test_nothing_that_is_read_can_run_code(folder: Path) -> None:
    for path in sources(folder):
        assert not RUNS_CODE & imported_modules(path), path
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            if isinstance(node.func, ast.Name):
                assert node.func.id not in {"eval", "exec"}, f"{path}:{node.lineno}"
            if isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name):
                called = f"{node.func.value.id}.{node.func.attr}"
                assert called not in {"yaml.load", "yaml.unsafe_load"}, f"{path}:{node.lineno}"
            for keyword in node.keywords:
                if keyword.arg == "allow_pickle":
                    assert isinstance(keyword.value, ast.Constant)
                    assert keyword.value.value is False, f"{path}:{node.lineno}"
