"""The site that `make docs` builds, as far as it can be checked without building it."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml

import expbuf_core
from expbuf_core import errors

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
CONCEPTS = (DOCS / "concepts.md").read_text(encoding="utf-8")
FIGURES = [DOCS / path for path in re.findall(r"\]\((images/[\w-]+\.svg)\)", CONCEPTS)]
SVG = "{http://www.w3.org/2000/svg}"


def pages_of(nav: Any) -> list[str]:
    """Pages of a navigation, from the first to the last."""
    if isinstance(nav, str):
        return [nav]
    children = nav.values() if isinstance(nav, dict) else nav
    return [page for child in children for page in pages_of(child)]


def site() -> Any:
    return yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))


def test_every_page_is_in_the_navigation_once() -> None:
    named = pages_of(site()["nav"])
    assert len(named) == len(set(named))
    own = {page for page in named if not page.startswith("repository/")}
    assert {path.name for path in DOCS.glob("*.md")} <= own


def test_pages_from_outside_are_linked_by_a_page_and_so_are_on_the_site() -> None:
    for page in pages_of(site()["nav"]):
        prefix, _, path = page.partition("repository/")
        if prefix == "" and path:
            assert (ROOT / path).is_file(), page
            link = f"](../{path}"
            assert any(link in own.read_text(encoding="utf-8") for own in DOCS.glob("*.md")), page


def test_the_site_loads_nothing_from_elsewhere() -> None:
    config = site()
    assert config["theme"]["font"] is False
    assert not re.search(r"https?:", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"))


def test_the_api_page_names_what_there_is() -> None:
    page = (DOCS / "api.md").read_text(encoding="utf-8")
    targets = re.findall(r"^::: (\S+)$", page, re.M)
    assert len(targets) == len(set(targets))
    for target in targets:
        module, _, name = target.rpartition(".")
        found = getattr(importlib.import_module(module), name)
        assert found.__doc__, target


def test_every_public_name_is_documented() -> None:
    text = "\n".join((DOCS / page).read_text("utf-8") for page in ("api.md", "plugins.md"))
    for name in expbuf_core.__all__:
        kind = getattr(expbuf_core, name)
        if isinstance(kind, type) and issubclass(kind, errors.ExpbufError):
            continue  # test_docs.py sees to these
        assert name.startswith("__") or re.search(rf"\b{name}\b", text), name


@pytest.mark.parametrize("path", FIGURES, ids=lambda path: path.name)
def test_figures_read_well_in_light_and_dark_and_without_eyes(path: Path) -> None:
    root = ElementTree.parse(path).getroot()
    assert (root.findtext(f"{SVG}title") or "").strip()
    assert len((root.findtext(f"{SVG}desc") or "").split()) > 20
    style = root.findtext(f"{SVG}style") or ""
    light, _, dark = style.partition("@media (prefers-color-scheme: dark)")
    coloured = re.compile(r"^\s*\.?([\w-]+) \{[^}]*(?:fill|stroke): #", re.M)
    assert set(coloured.findall(light)) == set(coloured.findall(dark))
    for element in root.iter():
        assert "fill" not in element.attrib, "colours belong into the style, for both themes"
        assert element.tag not in (f"{SVG}script", f"{SVG}image", f"{SVG}foreignObject")
        assert not [value for name, value in element.attrib.items() if "href" in name]


def test_there_are_figures_for_the_four_paths() -> None:
    names = [path.stem for path in FIGURES]
    assert names == ["write-path", "read-path", "recovery", "index-swap"]


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", *sorted(DOCS.glob("*.md"))], ids=lambda page: page.name
)
def test_every_example_says_what_it_is(page: Path) -> None:
    """Python that is fenced as anything else would not be run by test_docs.py."""
    fences = re.findall(r"^```(.*)$", page.read_text(encoding="utf-8"), re.M)
    for opening, closing in zip(fences[::2], fences[1::2], strict=True):
        assert opening in ("python", "text", "console", "toml", "yaml", "json"), opening
        assert closing == ""


def test_a_bar_in_a_cell_shows_no_backslash() -> None:
    pytest.importorskip("mkdocs")
    spec = importlib.util.spec_from_file_location("mkdocs_hooks", DOCS / "mkdocs_hooks.py")
    assert spec is not None
    assert spec.loader is not None
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    cell = r"<td><code>a \| b</code> \| c</td>"
    html = rf"<pre><code>x \| y</code></pre><table>{cell}</table>"
    assert hooks.on_page_content(html) == html.replace(r"a \| b", "a | b")
