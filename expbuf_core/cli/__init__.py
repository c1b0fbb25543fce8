"""The command `expbuf`: one parser of the standard library for all commands.

The commands of an emergency run on what the core itself needs. Where `rich` is installed (the extra
`cli`), tables and progress in a terminal are drawn with it. Modules are imported by the commands
that need them, so `expbuf info` starts without any index library.

Exit codes of all commands:

    0    fine
    1    an error: the message says what to do
    2    wrong usage
    3    done, and not all is well: `info` or `verify` found damage, `repair` could not save
         everything, `doctor` found a problem
    130  interrupted (Ctrl-C): nothing is broken
    141  whoever read the output has stopped reading (`expbuf … | head`)
"""

from expbuf_core.cli.main import main

__all__ = ["main"]
