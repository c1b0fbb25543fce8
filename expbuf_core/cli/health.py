"""`verify`, `repair`, `doctor`: is all well, and if not, what can be saved."""

from __future__ import annotations

import argparse
from typing import Any

from expbuf_core.cli import output


def add_to(commands: Any) -> None:
    """Add these commands to the parser."""
    verify = commands.add_parser("verify", help="check every stored byte, changing none")
    verify.add_argument("folder")
    verify.add_argument("--json", action="store_true", help="for programs")
    verify.set_defaults(run=_verify)

    repair = commands.add_parser("repair", help="save what is intact of a damaged buffer")
    repair.add_argument("folder", help="is only read")
    repair.add_argument("target", nargs="?", help="a new folder; default: FOLDER.repaired")
    repair.add_argument("--persistence", metavar="NAME", help="where the folder cannot tell")
    repair.add_argument(
        "--config", metavar="FILE", help="a YAML file: settings in the place of lost ones"
    )
    repair.add_argument("--json", action="store_true", help="for programs")
    repair.set_defaults(run=_repair, interrupted=output.RESUMABLE)

    doctor = commands.add_parser("doctor", help="what here may be in the way")
    doctor.add_argument("folder", nargs="?", help="of a buffer, or where one is to be made")
    doctor.add_argument("--config", metavar="FILE", help="a YAML file to check")
    doctor.add_argument("--json", action="store_true", help="for programs")
    doctor.set_defaults(run=_doctor)


def _verify(options: argparse.Namespace) -> int:
    from expbuf_core.verification import verify

    with output.progress("reading every byte") as progress:
        problems = list(verify(options.folder, progress=progress))
    if options.json:
        output.print_json(problems)
    else:
        for problem in problems:
            print(f"{'DAMAGE' if problem.damage else 'note'}: {output.plain(problem.message)}")
        if not problems:
            print("every byte is what was written")
    return 3 if any(problem.damage for problem in problems) else 0


def _repair(options: argparse.Namespace) -> int:
    import dataclasses

    from expbuf_core.repair import repair

    with output.progress("saving and comparing") as progress:
        report = repair(
            options.folder,
            options.target,
            persistence=options.persistence,
            config=options.config,
            progress=progress,
        )
    if options.json:
        output.print_json(dataclasses.asdict(report))
    else:
        print(report)
    return 0 if report.complete else 3


def _doctor(options: argparse.Namespace) -> int:
    from expbuf_core.doctor import examine

    found = list(examine(options.folder, options.config))
    if options.json:
        output.print_json(found)
    else:
        for finding in found:
            mark = "" if finding.level == "ok" else f"{finding.level.upper()}: "
            print(f"{finding.topic:14s} {mark}{finding.message}")
            if finding.advice:
                print(f"{'':14s} -> {finding.advice}")
    return 3 if any(finding.level == "problem" for finding in found) else 0
