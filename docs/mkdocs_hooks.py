"""Hooks of mkdocs: pages and files of the repository that lie outside docs/ join the site.

The documents link to each other as they lie in the repository, so that every link works there. On
the site, whatever such a link leads to is taken along: Markdown becomes a page, a folder stands for
its README, and any other file can be downloaded. Loaded by mkdocs.yml; nothing else runs this.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from posixpath import dirname, relpath
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
DOCS = Path(__file__).resolve().parent
OUTSIDE = "repository"  # where on the site files from outside docs/ lie
_LINK = re.compile(r"(\]\()([^)\s#]+)((?:#[^)\s]*)?\))")
_CODE = re.compile(r"<code>[^<]*</code>")
_FENCE = re.compile(r"(^```.*?^```)", re.MULTILINE | re.DOTALL)


def on_files(files: Files, *, config: MkDocsConfig, **_: Any) -> Files:
    """Take along what the documents link to, and what that links to."""
    waiting = sorted(DOCS.glob("*.md"))
    seen = set(waiting)
    while waiting:
        page = waiting.pop()
        for target in _targets(page):
            if target in seen:
                continue
            seen.add(target)
            if not target.is_relative_to(DOCS):
                uri = _uri(target)
                files.append(File.generated(config, uri, abs_src_path=str(target)))
            if target.suffix == ".md":
                waiting.append(target)
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Let links lead to where things lie on the site."""
    source = Path(page.file.abs_src_path)
    here = page.file.src_uri

    def moved(found: re.Match[str]) -> str:
        target = _resolved(source, found[2])
        if target is None:
            return found[0]
        return f"{found[1]}{relpath(_uri(target), dirname(here) or '.')}{found[3]}"

    parts = _FENCE.split(markdown)
    parts[::2] = [_LINK.sub(moved, prose) for prose in parts[::2]]
    return "".join(parts)


def on_page_content(html: str, **_: Any) -> str:
    """In a cell's code a bar is written with a backslash, which the repository does not show."""
    tables = re.split(r"(<table>.*?</table>)", html, flags=re.DOTALL)
    tables[1::2] = [
        _CODE.sub(lambda code: code[0].replace("\\|", "|"), table) for table in tables[1::2]
    ]
    return "".join(tables)


def _targets(page: Path) -> list[Path]:
    prose = _FENCE.sub("", page.read_text(encoding="utf-8"))
    found = (_resolved(page, link) for _, link, _ in _LINK.findall(prose))
    return [target for target in found if target is not None]


def _resolved(page: Path, link: str) -> Path | None:
    """The file of the repository that a link leads to; None for what is elsewhere."""
    if re.match(r"[a-z]+:", link):
        return None
    target = Path(os.path.normpath(page.parent / link))
    if target.is_dir():
        target /= "README.md"
    return target if target.is_file() and target.is_relative_to(ROOT) else None


def _uri(target: Path) -> str:
    """Where a file of the repository lies on the site."""
    if target.is_relative_to(DOCS):
        return target.relative_to(DOCS).as_posix()
    return f"{OUTSIDE}/{target.relative_to(ROOT).as_posix()}"
