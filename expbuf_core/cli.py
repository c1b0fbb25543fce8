"""The command line. What an emergency needs runs on the standard library alone."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence

from expbuf_core._version import __version__
from expbuf_core.errors import ExpbufError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit code: 0 fine, 1 an error, 2 wrong usage, 3 damage found."""
    parser = argparse.ArgumentParser(prog="expbuf", description="The experience buffer's tools.")
    parser.add_argument("--version", action="version", version=f"expbuf {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    info = commands.add_parser("info", help="what a buffer holds, and its health")
    info.add_argument("folder")
    info.add_argument("--json", action="store_true", help="for programs")

    verify = commands.add_parser("verify", help="check every stored byte, changing none")
    verify.add_argument("folder")
    verify.add_argument("--json", action="store_true", help="for programs")

    snapshot = commands.add_parser("snapshot", help="write a snapshot and drop what it replaces")
    snapshot.add_argument("folder")

    plugins = commands.add_parser("plugins", help="installed plugins, and what they offer")
    plugins.add_argument("--json", action="store_true", help="for programs")

    plugin = commands.add_parser("plugin", help="begin a plugin of your own")
    new = plugin.add_subparsers(required=True, metavar="COMMAND").add_parser(
        "new", help="write a module, its test, its pyproject.toml and its README"
    )
    new.add_argument("name", help="by which the configuration will select it")
    new.add_argument("--kind", required=True, choices=["persistence", "index", "scorer", "fusion"])
    new.add_argument("--into", default=".", help="where its folder is made; default: here")

    builder = commands.add_parser("builder", help="build the index whenever enough has changed")
    builder.add_argument("folder")
    builder.add_argument("--config", help="sections of the configuration, as JSON")
    builder.add_argument("--idle-s", type=float, help="end after so many seconds without work")

    options = parser.parse_args(arguments)
    try:
        return int(globals()[f"_{options.command}"](options))
    except (ExpbufError, OSError) as exc:
        print(f"expbuf: {exc}", file=sys.stderr)
        return 1


def _info(options: argparse.Namespace) -> int:
    from expbuf_core.buffer import ExperienceBuffer

    with ExperienceBuffer.open(options.folder, mode="r") as buffer:
        facts = {"recovery": str(buffer.recovery), **buffer.stats()}
    if options.json:
        print(json.dumps(facts))
        return 0
    for name, value in facts.items():
        print(f"{name:16s} {value}")
    return 0


def _verify(options: argparse.Namespace) -> int:
    from expbuf_core.verification import verify

    problems = list(verify(options.folder))
    if options.json:
        print(json.dumps([problem._asdict() for problem in problems]))
    else:
        for problem in problems:
            print(f"{'DAMAGE' if problem.damage else 'note'}: {problem.message}")
        if not problems:
            print("every byte is what was written")
    return 3 if any(problem.damage for problem in problems) else 0


def _snapshot(options: argparse.Namespace) -> int:
    from expbuf_core.buffer import ExperienceBuffer

    with ExperienceBuffer.load_from_disk(options.folder) as buffer:
        print(f"snapshot of lsn {buffer.save_snapshot()}")
    return 0


def _plugins(options: argparse.Namespace) -> int:
    from expbuf_core.plugins import default_registry

    found = default_registry().plugins()
    if options.json:
        print(json.dumps([dataclasses.asdict(plugin) for plugin in found]))
        return 0
    for plugin in found:
        offers = ", ".join(f"{p.kind}:{p.name}" for p in plugin.providers) or "nothing"
        print(
            f"{plugin.name:12s} {plugin.distribution} {plugin.version}  {plugin.status}  {offers}"
        )
        if plugin.error:
            print(f"{'':12s} {plugin.error}")
    return 0


def _plugin(options: argparse.Namespace) -> int:
    from expbuf_core.scaffold import new_plugin

    for path in new_plugin(options.name, options.kind, options.into):
        print(path)
    return 0


def _builder(options: argparse.Namespace) -> int:
    from expbuf_core.builder import main as build

    return build(options.folder, options.config, options.idle_s)
