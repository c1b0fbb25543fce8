"""The command line. What an emergency needs runs on the standard library alone.

Exit codes of all commands:

    0    fine
    1    an error: the message says what to do
    2    wrong usage
    3    done, and not all is well: `verify` found damage, `repair` could not save everything,
         `doctor` found a problem
    130  interrupted (Ctrl-C): nothing is broken; `migrate` and `repair` can be called again
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

from expbuf_core._version import __version__
from expbuf_core.errors import ExpbufError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; its exit code."""
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

    migrate = commands.add_parser("migrate", help="copy a buffer to another storage backend")
    migrate.add_argument("source")
    migrate.add_argument("target", help="a new folder, or one to go on with")
    migrate.add_argument("--persistence", required=True, metavar="NAME", help="such as file, lmdb")
    migrate.add_argument("--config", help="a YAML file with the backend's settings")
    migrate.add_argument("--json", action="store_true", help="for programs")

    repair = commands.add_parser("repair", help="save what is intact of a damaged buffer")
    repair.add_argument("folder", help="is only read")
    repair.add_argument("target", nargs="?", help="a new folder; default: FOLDER.repaired")
    repair.add_argument("--persistence", metavar="NAME", help="where the folder cannot tell")
    repair.add_argument("--config", help="a YAML file: settings in the place of lost ones")
    repair.add_argument("--json", action="store_true", help="for programs")

    doctor = commands.add_parser("doctor", help="what here may be in the way")
    doctor.add_argument("folder", nargs="?", help="of a buffer, or where one is to be made")
    doctor.add_argument("--config", help="a YAML file to check")
    doctor.add_argument("--json", action="store_true", help="for programs")

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
    except KeyboardInterrupt:
        print(f"\nexpbuf: {options.command} was interrupted", file=sys.stderr)
        return 130


def _progress(what: str) -> Callable[[int, int], None] | None:
    """Shows how far a command is, to whoever watches."""
    if not sys.stderr.isatty():
        return None

    def show(done: int, total: int) -> None:
        share = 100 * done // total if total else 100
        end = "\n" if done >= total else ""
        print(f"\r{what}: {share} %", end=end, file=sys.stderr, flush=True)

    return show


def _as_json(report: Any) -> str:
    return json.dumps(dataclasses.asdict(report), default=str)


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


def _migrate(options: argparse.Namespace) -> int:
    from expbuf_core.transfer import migrate

    report = migrate(
        options.source,
        options.target,
        options.persistence,
        config=options.config,
        progress=_progress("copying and comparing"),
    )
    if options.json:
        print(_as_json(report))
    else:
        print(f"{report.experiences} experiences are in {report.target} ({report.backend})")
    return 0


def _repair(options: argparse.Namespace) -> int:
    from expbuf_core.repair import repair

    report = repair(
        options.folder,
        options.target,
        persistence=options.persistence,
        config=options.config,
        progress=_progress("saving and comparing"),
    )
    print(_as_json(report) if options.json else report)
    return 0 if report.complete else 3


def _doctor(options: argparse.Namespace) -> int:
    from expbuf_core.doctor import examine

    found = list(examine(options.folder, options.config))
    if options.json:
        print(json.dumps([finding._asdict() for finding in found]))
    else:
        for finding in found:
            mark = "" if finding.level == "ok" else f"{finding.level.upper()}: "
            print(f"{finding.topic:14s} {mark}{finding.message}")
            if finding.advice:
                print(f"{'':14s} -> {finding.advice}")
    return 3 if any(finding.level == "problem" for finding in found) else 0


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
