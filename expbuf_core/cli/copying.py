"""`backup`, `restore`, `migrate`, `export`, `import`: a buffer, or what is in it, elsewhere."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from expbuf_core.cli import output
from expbuf_core.cli.arguments import WrongUsage, natural

if TYPE_CHECKING:
    from expbuf_core.transfer import TransferReport


_FILES = {".arrow", ".csv", ".feather", ".json", ".jsonl", ".npy", ".npz", ".pq", ".tsv", ".zip"}
"""Names that ask for a file, in a format that is not written."""


def add_to(commands: Any) -> None:
    """Add these commands to the parser."""
    backup = commands.add_parser("backup", help="copy a buffer while others use it")
    backup.add_argument("source")
    backup.add_argument("target", help="a new folder, or one to go on with")
    _storage(backup, "default: the source's")
    backup.set_defaults(run=_backup, interrupted=output.RESUMABLE)

    restore = commands.add_parser("restore", help="make a buffer of a backup, in a new folder")
    restore.add_argument("source", help="the backup; is only read")
    restore.add_argument("target", help="a new folder, or one to go on with")
    _storage(restore, "default: the backup's")
    restore.set_defaults(run=_restore, interrupted=output.RESUMABLE)

    migrate = commands.add_parser("migrate", help="copy a buffer to another storage backend")
    migrate.add_argument("source")
    migrate.add_argument("target", help="a new folder, or one to go on with")
    _storage(migrate, "such as file, lmdb", required=True)
    migrate.set_defaults(run=_migrate, interrupted=output.RESUMABLE)

    export = commands.add_parser("export", help="experiences as files for other programs")
    export.add_argument("source")
    export.add_argument("target", help="NAME.parquet, or a new folder for JSON Lines and npy")
    export.add_argument("--format", choices=["parquet", "jsonl"], help="default: by the name")
    export.add_argument("--json", action="store_true", help="for programs")
    export.set_defaults(run=_export, interrupted="nothing was left; run it again")

    load = commands.add_parser("import", help="experiences from such files")
    load.add_argument("source", help="a Parquet file, or a folder with JSON Lines and npy")
    load.add_argument("target", help="the buffer's folder: new, except with --add")
    load.add_argument(
        "--add", action="store_true", help="with new ids; to what is there, if anything"
    )
    load.add_argument(
        "--skip", type=natural, default=0, metavar="N", help="with --add: not the first"
    )
    _storage(load, "of a new folder; default: the configuration's")
    load.set_defaults(run=_import, interrupted=output.RESUMABLE)


def _storage(command: argparse.ArgumentParser, text: str, *, required: bool = False) -> None:
    command.add_argument("--persistence", required=required, metavar="NAME", help=text)
    command.add_argument("--config", metavar="FILE", help="a YAML file with the backend's settings")
    command.add_argument("--json", action="store_true", help="for programs")


def _report(options: argparse.Namespace, report: Any, text: str) -> int:
    if options.json:
        output.print_json(dataclasses.asdict(report))
    else:
        print(text)
    return 0


def _copied(options: argparse.Namespace, copy: Callable[..., TransferReport]) -> int:
    with output.progress("copying and comparing") as progress:
        report = copy(
            options.source,
            options.target,
            persistence=options.persistence,
            config=options.config,
            progress=progress,
        )
    text = f"{report.experiences} experiences are in {report.target} ({report.backend})"
    return _report(options, report, text)


def _backup(options: argparse.Namespace) -> int:
    from expbuf_core.backup import backup

    return _copied(options, backup)


def _restore(options: argparse.Namespace) -> int:
    from expbuf_core.backup import restore

    return _copied(options, restore)


def _migrate(options: argparse.Namespace) -> int:
    from expbuf_core.inspection import openers
    from expbuf_core.transfer import migrate

    code = _copied(options, migrate)
    for opener in openers(options.source):
        if "expbuf_core builder" not in opener.command:
            print(
                f"expbuf: process {opener.pid} still has {options.source} open; what it writes "
                f"from now on is not in {options.target}. End it, and open that one instead",
                file=sys.stderr,
            )
    return code


def _export(options: argparse.Namespace) -> int:
    from pathlib import Path

    from expbuf_core.exchange import export_experiences

    suffix = Path(options.target).suffix.lower()
    if options.format is None and suffix in _FILES:
        raise WrongUsage(
            f"{options.target}: there is no format for {suffix}; name a file NAME.parquet, or a "
            "new folder for JSON Lines and npy (--format jsonl, whatever its name)"
        )
    with output.progress("exporting") as progress:
        report = export_experiences(
            options.source, options.target, file_format=options.format, progress=progress
        )
    text = f"{report.experiences} experiences are in {report.target} ({report.format})"
    return _report(options, report, text)


def _import(options: argparse.Namespace) -> int:
    from expbuf_core.exchange import import_experiences

    with output.progress("importing") as shown:
        done = options.skip

        def progress(now: int, total: int) -> None:
            nonlocal done
            done = now
            if options.add:
                options.interrupted = f"go on with --skip {done}"
            if shown is not None:
                shown(now, total)

        report = import_experiences(
            options.source,
            options.target,
            add=options.add,
            skip=options.skip,
            persistence=options.persistence,
            config=options.config,
            progress=progress,
        )
    if not report.experiences:
        return _report(options, report, f"the source has nothing (more) for {report.target}")
    kept = "with their ids" if report.kept_ids else f"as ids {report.first_id} to {report.last_id}"
    return _report(
        options, report, f"{report.experiences} experiences are in {report.target}, {kept}"
    )
