"""`plugins`, `plugin new`."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from expbuf_core.cli import output


def add_to(commands: Any) -> None:
    """Add these commands to the parser."""
    plugins = commands.add_parser("plugins", help="installed plugins, and what they offer")
    plugins.add_argument("--json", action="store_true", help="for programs")
    plugins.set_defaults(run=_plugins)

    plugin = commands.add_parser("plugin", help="begin a plugin of your own")
    new = plugin.add_subparsers(dest="what", required=True, metavar="COMMAND").add_parser(
        "new", help="write a module, its test, its pyproject.toml and its README"
    )
    new.add_argument("name", help="by which the configuration will select it")
    new.add_argument("--kind", required=True, choices=["persistence", "index", "scorer", "fusion"])
    new.add_argument("--into", default=".", metavar="FOLDER", help="default: here")
    new.set_defaults(run=_new)


def _plugins(options: argparse.Namespace) -> int:
    from expbuf_core.plugins import default_registry

    found = default_registry().plugins()
    if options.json:
        output.print_json([dataclasses.asdict(plugin) for plugin in found])
        return 0
    rows: list[list[Any]] = []
    errors: list[str] = []
    for plugin in found:
        whose = [plugin.distribution, plugin.version]
        for offer in plugin.providers:
            words = ", ".join(offer.capabilities) or None
            status = "cannot be selected" if offer.error else plugin.status
            rows.append([f"{offer.kind}:{offer.name}", *whose, offer.api_version, words, status])
        if plugin.events or not plugin.providers:
            told = f"{len(plugin.events)} events" if plugin.events else None
            rows.append([f"plugin:{plugin.name}", *whose, None, told, plugin.status])
        offered = [offer.error for offer in plugin.providers]
        errors += [error for error in (plugin.error, *offered) if error]
    output.table(["offers", "distribution", "version", "api", "capabilities", "status"], rows)
    for error in dict.fromkeys(errors):  # both sides of a clash say the same
        print(output.plain(error))
    return 0


def _new(options: argparse.Namespace) -> int:
    from expbuf_core.scaffold import new_plugin

    for path in new_plugin(options.name, options.kind, options.into):
        print(path)
    return 0
