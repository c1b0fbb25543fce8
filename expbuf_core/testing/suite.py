"""What the suites of all four kinds share: the provider under test, and processes that use it."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
from pydantic import BaseModel

from expbuf_core.hookspecs import hookimpl
from expbuf_core.plugins import KINDS, Kind, Provider, default_registry
from expbuf_core.testing import processes
from expbuf_core.testing.processes import in_child

_STRANGER = "from expbuf_core.testing.suite import _stranger; _stranger()"


class Suite:
    """The contract of one kind of backend.

    Attributes:
        kind: What the backend is for.
        provider: The backend's name, or its provider.
        settings: Its section of the configuration.
    """

    kind: ClassVar[Kind]
    provider: ClassVar[str | Provider] = ""
    settings: ClassVar[Mapping[str, Any]] = {}

    def chosen(self) -> Provider:
        """The provider under test."""
        if isinstance(self.provider, str):
            return default_registry().get(self.kind, self.provider)
        return self.provider

    def make(self, *arguments: Any) -> Any:
        """Make a backend: its factory gets the settings, checked, and these arguments."""
        return self.chosen().factory(self._checked_settings(), *arguments)

    def _checked_settings(self) -> BaseModel:
        if isinstance(self.provider, str):
            return default_registry().settings(self.kind, self.provider, self.settings)
        return self.provider.settings.model_validate(dict(self.settings))

    def choice(self) -> dict[str, Any]:
        """The section of the configuration that selects it."""
        name = self._offered().name
        return {"backend": name, name: dict(self.settings)}

    def plugins(self) -> list[object]:
        """What `ExperienceBuffer.open(plugins=...)` needs for it: nothing where it is installed."""
        if isinstance(self.provider, str):
            return []
        provider = self._offered()

        def offer() -> list[Provider]:
            return [provider]

        hook = offer.__name__ = KINDS[self.kind].hook
        return [type("Offer", (), {hook: staticmethod(hookimpl(offer))})()]

    def _offered(self) -> Provider:
        """The provider, under a name that is free here: its plugin may well be installed, too."""
        provider = self.chosen()
        if isinstance(self.provider, str):
            return provider
        taken = {
            offered.name
            for plugin in default_registry().plugins()
            for offered in plugin.providers
            if offered.kind == self.kind
        }
        if provider.name not in taken:
            return provider
        return dataclasses.replace(provider, name=f"{provider.name}_under_test")

    def needs(self, capability: str) -> None:
        """Skip where the provider does not declare a capability."""
        if capability not in self.chosen().capabilities:
            pytest.skip(f'does not declare the capability "{capability}"')

    # ------------------------------------------------------------ other processes

    def elsewhere(self, method: str, *arguments: str | int) -> None:
        """Run a method of the suite in a process of its own, which was started apart.

        A fork is the next best where that process could not find the factory, as it is not at the
        top level of a module.
        """
        told = self._told()
        if told is None:
            in_child(lambda child: getattr(self, method)(*arguments))
            return
        done = subprocess.run(
            [sys.executable, "-c", _STRANGER],
            input=json.dumps({**told, "path": sys.path, "call": [method, *arguments]}),
            timeout=processes.TIMEOUT_S,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"the other process failed: {done.stderr[-3000:]}"

    def _told(self) -> dict[str, Any] | None:
        """All that another process needs to know, JSON-like; None where it could not be found."""
        provider: Any = self.provider
        if not isinstance(provider, str):
            places = [_whereabouts(provider.factory), _whereabouts(provider.settings)]
            if None in places:
                return None
            provider = {
                "type": _whereabouts(type(provider)),
                "name": provider.name,
                "api_version": provider.api_version,
                "capabilities": sorted(provider.capabilities),
                "found": places,
            }
        ours = [c for c in type(self).__mro__ if c.__module__.startswith("expbuf_core.testing.")]
        names = {name for c in ours for name in vars(c).get("__annotations__", ())}
        facts = {name: getattr(self, name) for name in names - {"kind", "provider", "settings"}}
        return {
            "suite": _whereabouts(ours[0]),
            "provider": provider,
            "settings": dict(self.settings),
            "facts": facts,
        }


def _whereabouts(thing: Any) -> list[str] | None:
    """Module, file and name of a class or function; None where these do not lead back to it."""
    module, name = getattr(thing, "__module__", None), getattr(thing, "__qualname__", "<>")
    file = getattr(sys.modules.get(module or ""), "__file__", None)
    if module is None or file is None or "<" in name:
        return None
    return [module, file, name]


def _found(module: str, file: str, name: str) -> Any:
    """The class or function at these whereabouts."""
    try:
        found: Any = importlib.import_module(module)
    except ImportError:
        found = None
    if getattr(found, "__file__", None) != file:  # a test's module may have no path of its own
        spec = importlib.util.spec_from_file_location(module, Path(file))
        assert spec is not None
        assert spec.loader is not None
        found = sys.modules[module] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(found)
    for part in name.split("."):
        found = getattr(found, part)
    return found


def _stranger() -> None:
    """In the other process: make the suite, and call what was asked for."""
    told = json.load(sys.stdin)
    sys.path[:] = told["path"]
    provider = told["provider"]
    if not isinstance(provider, str):
        factory, settings = (_found(*place) for place in provider["found"])
        provider = _found(*provider["type"])(
            provider["name"],
            api_version=provider["api_version"],
            factory=factory,
            settings=settings,
            capabilities=frozenset(provider["capabilities"]),
        )
    body = {**told["facts"], "provider": provider, "settings": told["settings"]}
    suite = type("Suite", (_found(*told["suite"]),), body)()
    method, *arguments = told["call"]
    getattr(suite, method)(*arguments)
