"""From a command line to an exit code."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Callable, Sequence

from expbuf_core._version import __version__
from expbuf_core.cli import (
    copying,
    finding,
    health,
    looking,
    plugin_commands,
    trying,
    upkeep_commands,
)
from expbuf_core.cli.arguments import WrongUsage
from expbuf_core.errors import ExpbufError

GROUPS = (looking, finding, health, upkeep_commands, copying, trying, plugin_commands)

OK, ERROR, USAGE, NOT_WELL, INTERRUPTED, NO_READER = 0, 1, 2, 3, 130, 141


def parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    top = argparse.ArgumentParser(
        prog="expbuf",
        description="The experience buffer's tools.",
        epilog="exit codes: 0 fine, 1 error, 2 wrong usage, 3 done and not all is well, "
        "130 interrupted",
    )
    top.add_argument("--version", action="version", version=f"expbuf {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for group in GROUPS:
        group.add_to(commands)
    return top


def _have_streams() -> None:
    """Print to nowhere where a stream was closed from outside (`>&-`), as `print` does."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115  (until the process ends)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; its exit code. Without arguments: those of this process, which is for that."""
    if arguments is None:
        _have_streams()
        for stream in (sys.stdout, sys.stderr):  # a terminal may not know all that a name holds
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
    options = parser().parse_args(arguments)
    options.own_process = arguments is None
    run: Callable[[argparse.Namespace], int] = options.run
    try:
        code = run(options)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # Python flushes stdout once more when it ends: let that go nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return NO_READER
    except WrongUsage as exc:
        print(f"expbuf {options.command}: error: {exc}", file=sys.stderr)
        return USAGE
    except (ExpbufError, OSError) as exc:
        print(f"expbuf: {exc}", file=sys.stderr)
        return ERROR
    except KeyboardInterrupt:
        hint = getattr(options, "interrupted", "nothing is broken")
        print(f"\nexpbuf: {options.command} was interrupted; {hint}", file=sys.stderr)
        return INTERRUPTED
