"""Discovery of plugins, and the registry of the backends they offer.

A plugin is any object, mostly a module, with hook implementations (`expbuf_core.hookspecs`) behind
an entry point of the group `expbuf`. It is taken whole or not at all: one that fails to import or
breaks the contract is reported, and becomes an error only when the configuration selects what it
may have offered.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import logging
import os
import re
import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Literal

import numpy as np
import pluggy
from pydantic import BaseModel

from expbuf_core import hookspecs
from expbuf_core._version import __version__
from expbuf_core.contracts import (
    API_VERSION,
    FusionProvider,
    HostInfo,
    IndexProvider,
    PersistenceAdapter,
    PersistenceProvider,
    ScorerProvider,
)
from expbuf_core.errors import (
    BackendUnavailable,
    ConfigError,
    ExpbufError,
    PluginContractError,
    PluginError,
    PluginLoadError,
    PluginNotFound,
    PluginVersionError,
)
from expbuf_core.validation import validate

logger = logging.getLogger("expbuf")

GROUP = "expbuf"
OLDEST_API_VERSION = 1
"""Providers written for an older contract than this are refused, as are those for a newer one."""

Kind = Literal["persistence", "index", "priority", "fusion"]
Provider = PersistenceProvider | IndexProvider | ScorerProvider | FusionProvider


@dataclass(frozen=True)
class _KindOf:
    noun: str
    hook: str
    provider: type[Provider]
    known: Mapping[str, str]  # backend -> the distribution that brings it


KINDS: Mapping[Kind, _KindOf] = {
    "persistence": _KindOf(
        "persistence backend",
        "expbuf_register_persistence",
        PersistenceProvider,
        {"file": "expbuf-file", "lmdb": "expbuf-lmdb"},
    ),
    "index": _KindOf(
        "index backend",
        "expbuf_register_index_backends",
        IndexProvider,
        {"faiss_cpu": "expbuf-faiss-cpu", "faiss_gpu": "expbuf-faiss-gpu"},
    ),
    "priority": _KindOf("priority scorer", "expbuf_register_priority_scorers", ScorerProvider, {}),
    "fusion": _KindOf("embedding fusion", "expbuf_register_embedding_fusions", FusionProvider, {}),
}
"""What can be chosen; each kind is also the name of its section in the configuration."""

_NO_PLUGINS = (str, bytes, int, float, Mapping, list, tuple, set, frozenset)
_NAME = re.compile(r"[a-z][a-z0-9_]*")
_SPECS = {
    name: tuple(inspect.signature(spec).parameters)
    for name, spec in vars(hookspecs).items()
    if hasattr(spec, f"{hookspecs.PROJECT}_spec")
}
_EVENTS = [name for name in _SPECS if name.startswith("expbuf_on_")]
_BUILTIN = EntryPoint("builtin", "expbuf_core.builtin", GROUP)  # not imported here: it lies above


@dataclass(frozen=True)
class ProviderInfo:
    """A backend that a plugin offers. `error` says why it cannot be selected, or is None."""

    kind: str
    name: str
    api_version: int
    capabilities: tuple[str, ...]
    error: str | None


@dataclass(frozen=True)
class PluginInfo:
    """A plugin that was found.

    Attributes:
        name: Of its entry point.
        distribution: That brought it; "" for one that was passed as an object.
        version: Of the distribution.
        status: "ok"; "disabled" by `EXPBUF_DISABLE_PLUGINS`; "failed" to import; "refused" since it
            breaks the contract.
        error: Why it failed or was refused, or None.
        providers: What it offers.
        events: Hooks by which it observes.
    """

    name: str
    distribution: str
    version: str
    status: Literal["ok", "disabled", "failed", "refused"]
    error: str | None
    providers: tuple[ProviderInfo, ...]
    events: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class _Source:
    """A plugin as it was found: the object, or the reason why there is none."""

    name: str
    distribution: str = ""
    version: str = ""
    plugin: object = None
    error: PluginLoadError | None = None
    disabled: bool = False

    def __str__(self) -> str:
        origin = f"{self.distribution} {self.version}" if self.distribution else "plugins="
        return f"{self.name!r} ({origin})"


@dataclass(frozen=True)
class _Offer:
    provider: Provider
    source: _Source


class Events:
    """Tells plugins what has happened. Costs one look-up where no plugin listens.

    Whether one listens (its attribute `listening`, if it has one) is asked each time: it may be
    switched on and off while buffers are open.
    """

    def __init__(self, manager: pluggy.PluginManager) -> None:
        self._observers = {
            event: tuple(getattr(manager.hook, event).get_hookimpls()) for event in _EVENTS
        }

    def __contains__(self, event: str) -> bool:
        for observer in self._observers[event]:  # a loop: `any` takes three times as long
            if getattr(observer.plugin, "listening", True):
                return True
        return False

    def observers(self, event: str) -> tuple[Any, ...]:
        """The plugins that may listen to it."""
        return tuple(observer.plugin for observer in self._observers[event])

    def fire(self, event: str, **facts: Any) -> None:
        """Call the observers of an event that listen; one that raises is logged, no more.

        No lock may be held.

        Args:
            event: Name of an `expbuf_on_` hook.
            **facts: All its arguments.
        """
        for observer in self._observers[event]:
            if not getattr(observer.plugin, "listening", True):
                continue
            try:
                observer.function(*[facts[name] for name in observer.argnames])
            except Exception:
                logger.exception("plugin %r failed in %s", observer.plugin_name, event)


class PluginRegistry:
    """The backends that can be selected, and the observers of events. Immutable.

    `default_registry()` has what is installed; `with_plugins` makes one with more for one buffer.
    """

    def __init__(self, sources: Sequence[_Source]) -> None:
        self._sources = tuple(sources)
        self._errors: dict[_Source, PluginError] = {}
        self._observed: dict[_Source, tuple[str, ...]] = {}
        self._offers: dict[Kind, dict[str, list[_Offer]]] = {kind: {} for kind in KINDS}
        manager = pluggy.PluginManager(hookspecs.PROJECT)
        manager.add_hookspecs(hookspecs)
        for source in self._sources:
            if source.error is not None:
                self._errors[source] = source.error
            elif not source.disabled:
                try:
                    self._take(manager, source)
                except PluginError as error:
                    self._errors[source] = error
                    if manager.is_registered(source.plugin):
                        manager.unregister(source.plugin)
        self.events = Events(manager)
        self.fire = self.events.fire

    def _take(self, manager: pluggy.PluginManager, source: _Source) -> None:
        hooks = list(_register(manager, source))
        offers = [
            (kind, _Offer(provider, source))
            for kind, about in KINDS.items()
            for hook, implementation in hooks
            if hook == about.hook
            for provider in _providers(about, implementation, source)
        ]
        for kind, offer in offers:  # whole or not at all
            self._offers[kind].setdefault(offer.provider.name, []).append(offer)
        self._observed[source] = tuple(sorted(hook for hook, _ in hooks if hook in _EVENTS))

    # ------------------------------------------------------------ selecting

    def get(self, kind: Kind, name: str) -> Provider:
        """Select a backend by its name in the configuration.

        Raises:
            PluginNotFound: Nothing that is installed offers it.
            PluginLoadError: Nor does it, but a plugin that may have offered it failed to import.
            PluginVersionError: It was written for another version of the contract.
            PluginContractError: Several plugins offer it, or one that may have was refused.
        """
        offers = self._offers[kind].get(name)
        if not offers:
            raise self._not_found(kind, name)
        if (error := self._objection(kind, name)) is not None:
            raise error
        return offers[0].provider

    def names(self, kind: Kind) -> list[str]:
        """Names that can be selected, sorted."""
        return sorted(name for name in self._offers[kind] if self._objection(kind, name) is None)

    def settings(
        self,
        kind: Kind,
        name: str,
        section: Mapping[str, Any],
        *,
        origin: Callable[[str], str] = lambda key: "",
    ) -> BaseModel:
        """Validate the section of the configuration that is named after a backend.

        Args:
            kind: Of the backend.
            name: Of the backend; errors as in `get`.
            section: Its settings.
            origin: Says where the value of a dotted key came from, for messages.

        Raises:
            ConfigError: A key is unknown or its value out of bounds.
        """
        model = self.get(kind, name).settings
        return validate(model, section, prefix=f"{kind}.{name}.", origin=origin)

    def make(
        self, kind: Literal["persistence", "priority", "fusion"], name: str, *arguments: Any
    ) -> Any:
        """Make a storage adapter, a scorer or a fusion, and see that it is one.

        Args:
            kind: Of the backend.
            name: Of the backend; errors as in `get`.
            arguments: Of its factory: what `settings` has validated, and for storage its context.

        Raises:
            BackendUnavailable: It cannot run here.
            PluginContractError: Its factory failed in another way, or made something else.
        """
        what = f"the {KINDS[kind].noun} {name!r}"
        try:
            made = self.get(kind, name).factory(*arguments)
        except ExpbufError:
            raise
        except (ImportError, RuntimeError, OSError) as exc:
            raise BackendUnavailable(
                f"{what} cannot run here: {type(exc).__name__}: {exc}"
            ) from exc
        except Exception as exc:
            raise PluginContractError(
                f"{what} failed in its factory: {type(exc).__name__}: {exc}"
            ) from exc
        if wrong := _WRONG[kind](made):
            raise PluginContractError(f"{what}: its factory made a {type(made).__name__}, {wrong}")
        return made

    def plugins(self) -> list[PluginInfo]:
        """Describe every plugin that was found, also those that cannot be used."""
        return [self._info(source) for source in self._sources]

    def with_plugins(self, plugins: Sequence[object]) -> PluginRegistry:
        """Make a registry that has these objects too. Those it has already change nothing.

        Raises:
            ConfigError: One of them is text, a number or a container, and so no plugin.
            PluginError: One of them cannot be used; what is passed by hand is meant to be.
        """
        for plugin in plugins:
            if isinstance(plugin, _NO_PLUGINS) or plugin is None:
                raise ConfigError(
                    f"plugins: {reprlib.repr(plugin)} is no plugin; give objects with hooks, such "
                    "as a module (a plugin that is installed is found by itself)"
                )
        have = {id(source.plugin) for source in self._sources}
        added = [_Source(_name_of(plugin), plugin=plugin) for plugin in plugins]
        added = list({id(new.plugin): new for new in added if id(new.plugin) not in have}.values())
        if not added:
            return self
        registry = PluginRegistry([*self._sources, *added])
        for source in added:
            if source in registry._errors:
                raise registry._errors[source]
        for kind, named in registry._offers.items():
            for name, offers in named.items():
                if offers[-1].source in added and (error := registry._objection(kind, name)):
                    raise error
        return registry

    # ------------------------------------------------------------ what is wrong

    def _objection(self, kind: Kind, name: str) -> PluginError | None:
        """Why an offered name cannot be selected; made anew, so that tracebacks do not grow."""
        offers = self._offers[kind][name]
        what = f"{KINDS[kind].noun} {name!r}"
        if len(offers) > 1:
            who = " and ".join(str(offer.source) for offer in offers)
            last = offers[-1].source
            advice = "give yours another name"
            if last.distribution:
                advice = f"uninstall one, or leave one out by EXPBUF_DISABLE_PLUGINS={last.name}"
            return PluginContractError(f"several plugins offer the {what}: {who}; {advice}")
        provider, source = offers[0].provider, offers[0].source
        if OLDEST_API_VERSION <= provider.api_version <= API_VERSION:
            return None
        age, upgrade = "old", source.distribution or source.name
        if provider.api_version > API_VERSION:
            age, upgrade = "new", "expbuf-core"
        return PluginVersionError(
            f"the {what} of plugin {source} is too {age}: it was written for contract version "
            f"{provider.api_version}, and expbuf-core {__version__} speaks "
            f"{OLDEST_API_VERSION} to {API_VERSION}; upgrade {upgrade}"
        )

    def _not_found(self, kind: Kind, name: str) -> PluginError:
        about, installed = KINDS[kind], self.names(kind)
        parts = [f"no {about.noun} named {name!r}; installed: {', '.join(installed) or 'none'}."]
        candidates = {*installed, *about.known}
        near = [name] if name in candidates else difflib.get_close_matches(name, candidates, n=1)
        if near and near[0] != name:
            parts.append(f"Did you mean {near[0]!r}?")
        present = {re.sub(r"[-_.]+", "-", source.distribution).lower() for source in self._sources}
        if near and near[0] not in installed and (wheel := about.known[near[0]]) not in present:
            parts.append(f"To install it: pip install {wheel}")
        if disabled := [source.name for source in self._sources if source.disabled]:
            parts.append(f"Disabled by EXPBUF_DISABLE_PLUGINS: {', '.join(disabled)}.")
        parts += map(str, self._errors.values())
        message = " ".join(parts)
        if not self._errors:
            return PluginNotFound(message)
        # Blame the plugin that most likely had it.
        blamed = min(self._errors, key=lambda source: source.name != name)
        error = type(self._errors[blamed])(message)
        error.__cause__ = self._errors[blamed]
        return error

    def _info(self, source: _Source) -> PluginInfo:
        error = self._errors.get(source)
        status: Literal["ok", "disabled", "failed", "refused"] = "ok"
        if source.disabled:
            status = "disabled"
        elif error is not None:
            status = "failed" if isinstance(error, PluginLoadError) else "refused"
        providers = tuple(
            ProviderInfo(
                kind,
                name,
                offer.provider.api_version,
                tuple(sorted(offer.provider.capabilities)),
                str(objection) if (objection := self._objection(kind, name)) else None,
            )
            for kind, named in self._offers.items()
            for name, offers in named.items()
            for offer in offers
            if offer.source is source
        )
        return PluginInfo(
            source.name,
            source.distribution,
            source.version,
            status,
            str(error) if error else None,
            providers,
            self._observed.get(source, ()),
        )


# ---------------------------------------------------------------- the contract of a plugin


def _register(
    manager: pluggy.PluginManager, source: _Source
) -> Iterator[tuple[str, Callable[..., Any]]]:
    """Register a plugin and check all its hooks before any runs; (hook, implementation) of each."""
    plugin = source.plugin
    if inspect.isclass(plugin):
        raise PluginContractError(f"plugin {source} is a class; pass an instance of it")
    if inspect.isroutine(plugin):
        raise _without_hooks(source)
    # Asked at every commit, which it must not be able to fail: so no property.
    computed = isinstance(getattr(type(plugin), "listening", None), property)
    if computed or not isinstance(getattr(plugin, "listening", True), bool):
        raise PluginContractError(
            f"plugin {source}: `listening` must be a plain attribute, True or False"
        )
    name = str(source)
    if manager.has_plugin(name):  # a second object of the same class
        name += f" at {id(plugin):#x}"
    try:
        manager.register(plugin, name)
    except (pluggy.PluginValidationError, ValueError) as exc:
        raise PluginContractError(f"plugin {source} was refused: {exc}") from exc
    for caller in manager.get_hookcallers(plugin) or ():
        for implementation in caller.get_hookimpls():
            if implementation.plugin is not plugin:
                continue
            if not caller.has_spec() and not implementation.optionalhook:
                raise _unknown_hook(source, caller.name)
            if implementation.hookwrapper or getattr(implementation, "wrapper", False):
                raise PluginContractError(
                    f"plugin {source} wraps {caller.name}; implement it, wrappers never run"
                )
            if caller.has_spec():
                yield caller.name, implementation.function
    own = {name: found for name in _SPECS if (found := _own(plugin, name)) is not None}
    mark = f"{hookspecs.PROJECT}_impl"
    if forgotten := [name for name, found in own.items() if not hasattr(found, mark)]:
        raise PluginContractError(
            f"plugin {source} defines {', '.join(forgotten)} without the decorator @hookimpl"
        )
    for name, found in own.items():
        if not inspect.isroutine(found):  # passed over in silence
            raise PluginContractError(
                f"plugin {source} implements {name} by a {type(found).__name__}; it must be a "
                "function or a method"
            )
    if not manager.get_hookcallers(plugin):
        raise _without_hooks(source)


def _own(plugin: object, name: str) -> Any:
    """What the plugin defines by that name; None where it merely imports the specification."""
    found = getattr(plugin, name, None)
    is_spec = hasattr(found, f"{hookspecs.PROJECT}_spec")
    return found if callable(found) and not is_spec else None


def _without_hooks(source: _Source) -> PluginContractError:
    return PluginContractError(
        f"plugin {source} is a {type(source.plugin).__name__} without hooks; a plugin is a module "
        "or an object that has functions or methods with @hookimpl, not such a function, nor what "
        "one returns"
    )


def _unknown_hook(source: _Source, hook: str) -> PluginContractError:
    near = difflib.get_close_matches(hook, _SPECS, n=1)
    hint = f"did you mean {near[0]}({', '.join(_SPECS[near[0]])})?" if near else "no such hook"
    return PluginContractError(f"plugin {source} implements the unknown hook {hook}; {hint}")


def _providers(about: _KindOf, hook: Callable[..., Any], source: _Source) -> list[Provider]:
    """Ask one plugin for its providers of one kind, and check them."""
    host = HostInfo(core_version=__version__, api_version=API_VERSION)
    try:
        offered = hook(host) if inspect.signature(hook).parameters else hook()
    except Exception as exc:
        raise PluginContractError(
            f"plugin {source} failed in {about.hook}: {type(exc).__name__}: {exc}"
        ) from exc
    wanted = about.provider.__name__
    if not isinstance(offered, Sequence) or isinstance(offered, str):
        raise PluginContractError(
            f"plugin {source} returned {type(offered).__name__} from {about.hook}; "
            f"expected a sequence of {wanted}"
        )
    for provider in offered:
        if flaw := _flaw(provider, about.provider):
            raise PluginContractError(
                f"plugin {source} returned an invalid provider from {about.hook}: {flaw}"
            )
    return list(offered)


def _flaw(provider: Any, wanted: type[Provider]) -> str | None:
    if not isinstance(provider, wanted):
        return f"{provider!r} is no {wanted.__name__}"
    name, version, settings = provider.name, provider.api_version, provider.settings
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        return f"name {name!r}; expected lower-case letters, digits and underscores"
    if not isinstance(version, int) or isinstance(version, bool):
        return f"{name}: api_version {version!r}; expected an integer such as {API_VERSION}"
    if not callable(provider.factory):
        return f"{name}: factory {provider.factory!r} cannot be called"
    if not (isinstance(settings, type) and issubclass(settings, BaseModel)):
        return f"{name}: settings {settings!r}; expected a subclass of pydantic.BaseModel"
    if not isinstance(provider.capabilities, frozenset):
        return f"{name}: capabilities {provider.capabilities!r}; expected a frozenset of words"
    return None


def _not_callable(made: Any) -> str | None:
    return None if callable(made) else "which cannot be called"


def _not_a_fusion(made: Any) -> str | None:
    if not callable(getattr(made, "output_dim", None)):
        return "which has no method output_dim"
    version = getattr(made, "version", None)
    if not isinstance(version, int | np.integer) or isinstance(version, bool):
        return f"whose version is {version!r}; expected an integer such as 1"
    return _not_callable(made)


def _not_an_adapter(made: Any) -> str | None:
    return None if isinstance(made, PersistenceAdapter) else "which is no PersistenceAdapter"


_WRONG = {"persistence": _not_an_adapter, "priority": _not_callable, "fusion": _not_a_fusion}


# ---------------------------------------------------------------- discovery


def _name_of(plugin: object) -> str:
    return getattr(plugin, "__name__", None) or type(plugin).__name__


def discover(disabled: str = "") -> PluginRegistry:
    """Load what is installed, each plugin on its own.

    Args:
        disabled: "" for none; "1" or "all" for every plugin but the built-in ones; else the names
            of entry points, separated by commas. A disabled plugin is not imported.
    """
    every = disabled.strip() in {"1", "all"}
    names = {name.strip() for name in disabled.split(",")}
    found = sorted(entry_points(group=GROUP), key=lambda point: (point.name, point.value))
    return PluginRegistry(
        [
            _load(_BUILTIN, disabled=False),
            *(_load(point, disabled=every or point.name in names) for point in found),
        ]
    )


def _load(point: EntryPoint, *, disabled: bool) -> _Source:
    name, version = "expbuf-core", __version__
    if point.dist is not None:
        name, version = point.dist.name, point.dist.version
    found = functools.partial(_Source, point.name, name, version, disabled=disabled)
    if disabled:
        return found()
    try:
        return found(plugin=point.load())
    except (Exception, SystemExit) as exc:  # a module may do anything when it is imported
        cause = f"{type(exc).__name__}: {exc}"
        error = PluginLoadError(f"plugin {found()} failed to import {point.value}: {cause}")
        error.__cause__ = exc
        return found(error=error)


@functools.cache
def default_registry() -> PluginRegistry:
    """The registry of what is installed, made once a process; heeds `EXPBUF_DISABLE_PLUGINS`."""
    registry = discover(os.environ.get("EXPBUF_DISABLE_PLUGINS", ""))
    for plugin in registry.plugins():
        if plugin.error is not None:
            logger.warning("%s", plugin.error)
    return registry
