"""Discovery and the registry, with distributions that are fine, broken, clashing or too new."""

from __future__ import annotations

import functools
import logging
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.metadata import EntryPoint, distributions
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import BaseModel

from expbuf_core import Experience, ExperienceBuffer, plugins
from expbuf_core.contracts import (
    API_VERSION,
    FusionProvider,
    HostInfo,
    PersistenceAdapter,
    PersistenceProvider,
    ScorerProvider,
)
from expbuf_core.errors import (
    BackendUnavailable,
    ConfigError,
    PluginContractError,
    PluginLoadError,
    PluginNotFound,
    PluginVersionError,
)
from expbuf_core.hookspecs import hookimpl
from expbuf_core.plugins import PluginInfo, PluginRegistry, discover

Install = Callable[..., None]

PREAMBLE = """
from expbuf_core.contracts import IndexProvider, PersistenceProvider, ScorerProvider
from expbuf_core.hookspecs import hookimpl
"""


def scorer(name: str = "surprise", version: int = API_VERSION) -> str:
    return f"""
        @hookimpl
        def expbuf_register_priority_scorers(host):
            return [ScorerProvider({name!r}, api_version={version}, factory=object)]
    """


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Make distributions of one module each; only these are found."""
    before = set(sys.modules)

    def add(name: str, code: str, **options: str) -> None:
        write_distribution(tmp_path, name, code, **options)

    def found(group: str) -> list[EntryPoint]:
        every = [e for d in distributions(path=[str(tmp_path)]) for e in d.entry_points]
        return [entry for entry in every if entry.group == group]

    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(plugins, "entry_points", found)
    yield add
    for module in set(sys.modules) - before:
        if module.startswith("fake_"):
            del sys.modules[module]


def write_distribution(
    folder: Path, name: str, code: str, *, version: str = "1.0", entry: str = "", target: str = ""
) -> None:
    module = "fake_" + name.replace("-", "_")
    (folder / f"{module}.py").write_text(PREAMBLE + textwrap.dedent(code))
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "entry_points.txt").write_text(f"[expbuf]\n{entry or name} = {target or module}\n")


def info(registry: PluginRegistry, name: str) -> PluginInfo:
    (found,) = [plugin for plugin in registry.plugins() if plugin.name == name]
    return found


# ---------------------------------------------------------------- what works


def test_storage_that_keeps_nothing_gets_no_folder(tmp_path: Path) -> None:
    """Whoever wrote it: a folder would be there at the next opening, and hold nothing."""
    built_in = discover().get("persistence", "memory")

    class Volatile:
        @hookimpl
        def expbuf_register_persistence(self) -> list[Any]:
            return [replace(built_in, name="volatile")]

    for _ in range(2):
        with ExperienceBuffer.open(
            tmp_path / "memory", plugins=[Volatile()], persistence="volatile", index="exact"
        ) as buffer:
            assert (len(buffer), buffer.path) == (0, None)
            buffer.add(Experience(v_embed=np.ones(4)))
    assert not (tmp_path / "memory").exists()


def test_builtins_come_through_the_same_hooks(install: Install) -> None:
    registry = discover()
    assert registry.names("persistence") == ["memory"]
    assert registry.names("index") == ["exact"]
    assert registry.names("fusion") == ["weighted_concat", "weighted_sum"]
    assert registry.names("priority") == ["absolute_reward", "td_error", "weighted_sum"]
    builtin = info(registry, "builtin")
    assert (builtin.status, builtin.distribution) == ("ok", "expbuf-core")
    assert all(provider.error is None for provider in builtin.providers)


def test_a_plugin_is_found_and_described(install: Install) -> None:
    install(
        "good",
        """
        @hookimpl
        def expbuf_register_priority_scorers(host):
            assert host.api_version == 1 and host.core_version
            return (ScorerProvider("surprise", api_version=1, factory=dict,
                                   capabilities=frozenset({"b", "a"})),)
        @hookimpl
        def expbuf_on_evicted(count): pass
        """,
        version="2.3",
    )
    registry = discover()
    provider = registry.get("priority", "surprise")
    assert isinstance(provider, ScorerProvider)
    assert provider.factory is dict
    found = info(registry, "good")
    assert (found.distribution, found.version, found.status, found.error) == (
        "good",
        "2.3",
        "ok",
        None,
    )
    assert found.events == ("expbuf_on_evicted",)
    (offered,) = found.providers
    assert (offered.kind, offered.name, offered.api_version) == ("priority", "surprise", 1)
    assert offered.capabilities == ("a", "b")


def test_an_entry_point_to_something_without_hooks_is_told(install: Install) -> None:
    """To the hook itself, say: it would offer nothing, and nobody would know why."""
    install("right", f"{scorer()}\n        nothing = None\n")
    for name, target in (("hook", "expbuf_register_priority_scorers"), ("none", "nothing")):
        install(name, "", target=f"fake_right:{target}")
    install("empty", "")
    registry = discover()
    assert "surprise" in registry.names("priority")
    for name in ("hook", "none", "empty"):
        found = info(registry, name)
        assert found.status == "refused"
        assert "without hooks; a plugin is a module" in str(found.error)


def test_a_hook_may_leave_out_its_argument(install: Install) -> None:
    install("terse", scorer().replace("(host)", "()"))
    assert "surprise" in discover().names("priority")


def test_an_optional_hook_may_be_unknown(install: Install) -> None:
    later = "@hookimpl(optionalhook=True)\ndef expbuf_on_later(): pass"
    install("ahead", textwrap.dedent(scorer()) + later)
    assert discover().get("priority", "surprise").name == "surprise"


def test_settings_are_checked_by_the_model_of_the_backend(install: Install) -> None:
    registry = discover()
    settings = registry.settings("fusion", "weighted_sum", {"visual_weight": 0.5})
    assert settings.model_dump()["visual_weight"] == 0.5
    with pytest.raises(ConfigError, match=r"fusion\.weighted_sum\.visual_weight = 7: .* 1$"):
        registry.settings("fusion", "weighted_sum", {"visual_weight": 7})
    with pytest.raises(ConfigError, match=r"did you mean 'fusion\.weighted_sum\.visual_weight'"):
        registry.settings("fusion", "weighted_sum", {"visual_wieght": 1})


def test_unknown_settings_are_errors_also_where_the_model_would_ignore_them() -> None:
    class Lax(BaseModel):
        depth: int = 1

    class Plugin:
        @hookimpl
        def expbuf_register_priority_scorers(self, host: HostInfo) -> list[ScorerProvider]:
            return [ScorerProvider("lax", api_version=1, factory=dict, settings=Lax)]

    registry = discover("all").with_plugins([Plugin()])
    assert registry.settings("priority", "lax", {"depth": 2}) == Lax(depth=2)
    with pytest.raises(
        ConfigError, match=r"priority\.lax\.dept: unknown key.*priority\.lax\.depth"
    ):
        registry.settings("priority", "lax", {"dept": 2})


# ---------------------------------------------------------------- what is not there


def test_an_unknown_name_lists_what_is_installed_and_the_nearest(install: Install) -> None:
    install(
        "lmdb",
        """
        @hookimpl
        def expbuf_register_persistence(host):
            return [PersistenceProvider("lmdb", api_version=1, factory=dict)]
        """,
    )
    with pytest.raises(PluginNotFound) as caught:
        discover().get("persistence", "lmbd")
    assert str(caught.value) == (
        "no persistence backend named 'lmbd'; installed: lmdb, memory. Did you mean 'lmdb'?"
    )


@pytest.mark.parametrize(
    ("kind", "name", "command"),
    [
        ("persistence", "file", "pip install expbuf-file"),
        ("persistence", "lmdb", "pip install expbuf-lmdb"),
        ("persistence", "lmbd", "Did you mean 'lmdb'? To install it: pip install expbuf-lmdb"),
        ("index", "faiss_cpu", "pip install expbuf-faiss-cpu"),
        ("index", "faiss_gpu", "pip install expbuf-faiss-gpu"),
    ],
)
def test_a_known_backend_comes_with_the_command_that_installs_it(
    install: Install, kind: Any, name: str, command: str
) -> None:
    with pytest.raises(PluginNotFound) as caught:
        discover().get(kind, name)
    assert str(caught.value).endswith(command)


# ---------------------------------------------------------------- what is broken


def test_a_failing_import_is_fatal_only_when_it_may_be_meant(install: Install) -> None:
    install("broken-dist", "import no_such_module_anywhere", version="0.4", entry="surprise")
    registry = discover()
    assert registry.get("priority", "weighted_sum").name == "weighted_sum"
    found = info(registry, "surprise")
    assert found.status == "failed"
    assert found.error is not None
    for fact in ("'surprise' (broken-dist 0.4)", "no_such_module_anywhere"):
        assert fact in found.error
    with pytest.raises(PluginLoadError) as caught:
        registry.get("priority", "surprise")
    assert str(caught.value).startswith("no priority scorer named 'surprise'; installed: ")
    assert found.error in str(caught.value)
    cause = caught.value.__cause__
    assert isinstance(cause, PluginLoadError)
    assert isinstance(cause.__cause__, ModuleNotFoundError)


def test_a_plugin_that_exits_at_import_ends_nothing(install: Install) -> None:
    install("quitter", "raise SystemExit(3)")
    assert info(discover(), "quitter").status == "failed"


def test_a_known_backend_that_fails_to_import_is_not_said_to_be_missing(install: Install) -> None:
    install("expbuf-lmdb", "raise OSError('liblmdb.so is gone')", entry="lmdb")
    with pytest.raises(PluginLoadError) as caught:
        discover().get("persistence", "lmdb")
    assert "pip install" not in str(caught.value)
    assert "liblmdb.so is gone" in str(caught.value)


BAD = {
    "no list": ("return None", "NoneType"),
    "bare": ("return ScorerProvider('x', api_version=1, factory=dict)", "ScorerProvider"),
    "class": ("return [IndexProvider('x', api_version=1, factory=dict)]", "no ScorerProvider"),
    "string": ("return 'abc'", "returned str"),
    "upper": ("return [ScorerProvider('Big', api_version=1, factory=dict)]", "'Big'"),
    "dash": ("return [ScorerProvider('a-b', api_version=1, factory=dict)]", "'a-b'"),
    "newline": (r"return [ScorerProvider('ab\n', api_version=1, factory=dict)]", "name"),
    "version": ("return [ScorerProvider('x', api_version='1', factory=dict)]", "api_version '1'"),
    "factory": ("return [ScorerProvider('x', api_version=1, factory=None)]", "factory None"),
    "settings": (
        "return [ScorerProvider('x', api_version=1, factory=dict, settings=dict)]",
        "pydantic.BaseModel",
    ),
    "capabilities": (
        "return [ScorerProvider('x', api_version=1, factory=dict, capabilities='filter')]",
        "capabilities 'filter'",
    ),
    "raises": ("raise RuntimeError('too early')", "RuntimeError: too early"),
    "yields": ("yield []", "returned generator"),
}


@pytest.mark.parametrize(("body", "reason"), BAD.values(), ids=BAD)
def test_what_a_hook_returns_is_checked(install: Install, body: str, reason: str) -> None:
    install(
        "odd", f"@hookimpl\ndef expbuf_register_priority_scorers(host):\n    {body}\n{INDEX_TOO}"
    )
    registry = discover()
    found = info(registry, "odd")
    assert found.status == "refused"
    assert found.error is not None
    for fact in ("'odd' (odd 1.0)", "expbuf_register_priority_scorers", reason):
        assert fact in found.error
    # Taken whole or not at all: what it offers besides is not there either.
    assert "besides" not in registry.names("index")
    with pytest.raises(PluginContractError, match="'odd'"):
        registry.get("index", "besides")


INDEX_TOO = """
@hookimpl
def expbuf_register_index_backends(host):
    return [IndexProvider("besides", api_version=1, factory=dict)]
"""


@pytest.mark.parametrize(
    ("code", "facts"),
    [
        ("@hookimpl\ndef expbuf_register_scorers(host): return []", ["expbuf_register_scorers"]),
        (
            "@hookimpl\ndef expbuf_on_commited(lsn): pass",
            ["unknown hook expbuf_on_commited", "did you mean expbuf_on_committed(path, lsn,"],
        ),
        ("@hookimpl\ndef expbuf_on_evicted(path, number): pass", ["number", "expbuf_on_evicted"]),
        ("@hookimpl(hookwrapper=True)\ndef expbuf_on_evicted(): yield", ["wraps"]),
        ("@hookimpl(wrapper=True)\ndef expbuf_on_evicted(): return (yield)", ["wraps"]),
        ("def expbuf_on_evicted(path): pass", ["expbuf_on_evicted without the decorator"]),
    ],
    ids=["unknown", "misspelt", "argument", "old wrapper", "wrapper", "unmarked"],
)
def test_hooks_are_checked(install: Install, code: str, facts: list[str]) -> None:
    install("odd", textwrap.dedent(scorer()) + "\n" + code)
    registry = discover()
    found = info(registry, "odd")
    assert found.status == "refused"
    assert found.error is not None
    for fact in ["'odd' (odd 1.0)", *facts]:
        assert fact in found.error
    assert found.events == ()
    assert "expbuf_on_evicted" not in registry.events
    assert "surprise" not in registry.names("priority")
    with pytest.raises(PluginContractError, match="'odd'"):
        registry.get("priority", "surprise")


@pytest.mark.parametrize(
    ("version", "words"),
    [(API_VERSION + 1, ["too new", "upgrade expbuf-core"]), (0, ["too old", "upgrade other"])],
)
def test_a_provider_of_another_version_is_fatal_only_when_selected(
    install: Install, version: int, words: list[str]
) -> None:
    install("other", scorer(version=version) + INDEX_TOO.replace("\n", "\n        "))
    registry = discover()
    assert "surprise" not in registry.names("priority")
    assert registry.get("index", "besides").name == "besides"
    with pytest.raises(PluginVersionError) as caught:
        registry.get("priority", "surprise")
    for word in ["'other' (other 1.0)", *words]:
        assert word in str(caught.value)
    (error,) = [p.error for p in info(registry, "other").providers if p.name == "surprise"]
    assert error == str(caught.value)


def test_a_name_that_two_distributions_offer_is_refused_when_selected(install: Install) -> None:
    install("one", scorer())
    install("two", scorer(), version="7")
    registry = discover()
    assert "surprise" not in registry.names("priority")
    assert "weighted_sum" in registry.names("priority")
    with pytest.raises(PluginContractError, match=r"'one' \(one 1\.0\) and 'two' \(two 7\)"):
        registry.get("priority", "surprise")
    assert discover("two").get("priority", "surprise").name == "surprise"


def test_a_builtin_cannot_be_replaced_in_silence(install: Install) -> None:
    install("mine", scorer("weighted_sum"))
    with pytest.raises(PluginContractError, match=r"\(expbuf-core .*\) and 'mine' \(mine 1\.0\)"):
        discover().get("priority", "weighted_sum")


def test_the_default_registry_warns_about_broken_plugins_once(
    install: Install, caplog: pytest.LogCaptureFixture
) -> None:
    install("broken", "1 / 0")
    plugins.default_registry.cache_clear()
    try:
        assert plugins.default_registry() is plugins.default_registry()
    finally:
        plugins.default_registry.cache_clear()
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("expbuf", logging.WARNING)
    assert "ZeroDivisionError" in record.getMessage()


# ---------------------------------------------------------------- disabling


@pytest.mark.parametrize("value", ["1", "all", "other, good"])
def test_disabled_plugins_are_not_imported(install: Install, value: str) -> None:
    install("good", "import sys\nsys.modules['fake_trace'] = sys\n" + textwrap.dedent(scorer()))
    registry = discover(value)
    assert "fake_trace" not in sys.modules
    assert info(registry, "good").status == "disabled"
    assert "weighted_sum" in registry.names("priority")
    with pytest.raises(PluginNotFound, match=r"Disabled by EXPBUF_DISABLE_PLUGINS: good\."):
        registry.get("priority", "surprise")


@pytest.mark.parametrize("value", ["", "other", "goo"])
def test_other_plugins_stay_enabled(install: Install, value: str) -> None:
    install("good", scorer())
    assert "surprise" in discover(value).names("priority")


def test_the_environment_disables(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install("good", scorer())
    monkeypatch.setenv("EXPBUF_DISABLE_PLUGINS", "good")
    plugins.default_registry.cache_clear()
    try:
        assert "surprise" not in plugins.default_registry().names("priority")
    finally:
        plugins.default_registry.cache_clear()


# ---------------------------------------------------------------- objects passed by hand


class Observer:
    def __init__(self, *, fail: bool = False) -> None:
        self.fail = fail
        self.seen: list[tuple[int, str]] = []

    @hookimpl
    def expbuf_on_committed(self, lsn: int, kind: str) -> None:
        if self.fail:
            raise RuntimeError("observer is broken")
        self.seen.append((lsn, kind))


class Offers:
    def __init__(self, name: str) -> None:
        self.name = name

    @hookimpl
    def expbuf_register_priority_scorers(self) -> list[ScorerProvider]:
        return [ScorerProvider(self.name, api_version=1, factory=dict)]


def test_passed_objects_leave_the_registry_as_it_was(install: Install) -> None:
    registry = discover()
    extended = registry.with_plugins([Offers("mine"), Offers("other")])
    assert {"mine", "other", "weighted_sum"} <= set(extended.names("priority"))
    assert "mine" not in registry.names("priority")
    assert registry.with_plugins([]) is registry


def test_passing_what_is_there_already_changes_nothing(install: Install) -> None:
    plugin = Offers("mine")
    extended = discover().with_plugins([plugin, plugin])
    assert extended.with_plugins([plugin]) is extended
    assert extended.get("priority", "mine").name == "mine"


def test_what_is_passed_must_be_right() -> None:
    class Typo:
        @hookimpl
        def expbuf_on_comitted(self) -> None: ...

    registry = discover("all")
    with pytest.raises(PluginContractError, match="expbuf_on_comitted"):
        registry.with_plugins([Typo()])
    with pytest.raises(PluginContractError, match="is a class"):
        registry.with_plugins([Observer])
    provider = ScorerProvider("mine", api_version=1, factory=dict)
    for hookless in (object(), provider, Offers("mine").expbuf_register_priority_scorers, textwrap):
        with pytest.raises(PluginContractError, match="without hooks"):
            registry.with_plugins([hookless])
    with pytest.raises(
        PluginContractError,
        match=r"\(expbuf-core .*\) and 'Offers' \(plugins=\); give yours another name",
    ):
        registry.with_plugins([Offers("weighted_sum")])


# ---------------------------------------------------------------- events

FACTS = {"path": "", "lsn": 7, "kind": "add", "count": 1, "seconds": 0.5}


def test_observers_are_told_what_they_ask_for() -> None:
    observer = Observer()
    registry = discover("all").with_plugins([observer])
    assert "expbuf_on_committed" in registry.events
    registry.fire("expbuf_on_committed", **FACTS)
    assert observer.seen == [(7, "add")]


def test_an_observer_that_raises_is_logged_and_the_others_are_told(
    caplog: pytest.LogCaptureFixture,
) -> None:
    observers = [Observer(), Observer(fail=True), Observer()]
    registry = discover("all").with_plugins(observers)
    registry.fire("expbuf_on_committed", **FACTS)
    assert [observer.seen for observer in observers] == [[(7, "add")], [], [(7, "add")]]
    (record,) = caplog.records
    assert record.name == "expbuf"
    assert record.exc_info
    assert "Observer" in record.getMessage()
    assert "expbuf_on_committed" in record.getMessage()


class Switched(Observer):
    def __init__(self, listening: bool) -> None:
        super().__init__()
        self.listening = listening


def test_who_does_not_listen_is_not_told_and_may_begin_at_any_time() -> None:
    idle = Switched(False)
    registry = discover("all").with_plugins([idle])
    assert "expbuf_on_committed" not in registry.events
    registry.fire("expbuf_on_committed", **FACTS)
    idle.listening = True
    assert "expbuf_on_committed" in registry.events
    registry.fire("expbuf_on_committed", **FACTS)
    idle.listening = False
    other = registry.with_plugins([Observer()])
    assert "expbuf_on_committed" in other.events
    other.fire("expbuf_on_committed", **FACTS)
    assert idle.seen == [(7, "add")]


def test_listening_must_be_a_plain_attribute() -> None:
    """Asking for it happens at every commit, and must not be able to fail one."""

    class Computed(Observer):
        @property
        def listening(self) -> bool:
            raise RuntimeError("not now")

    registry = discover("all")
    for bad in (Computed(), Switched(None)):  # type: ignore[arg-type]
        with pytest.raises(PluginContractError, match="`listening` must be a plain attribute"):
            registry.with_plugins([bad])


def test_searches_are_told(tmp_path: Path) -> None:
    told: list[dict[str, object]] = []

    class Watcher:
        @hookimpl
        def expbuf_on_searched(
            self, path: str, lsn: int, k: int, queries: int, seconds: float, degraded: bool
        ) -> None:
            assert seconds > 0
            told.append({"path": path, "lsn": lsn, "k": k, "n": queries, "degraded": degraded})
            raise RuntimeError("no search fails by that")

    for path in (None, tmp_path / "memory"):
        with ExperienceBuffer.open(path, plugins=[Watcher()], index="exact") as buffer:
            buffer.add(Experience(v_embed=np.ones(4), q_embed=np.ones(4)))
            assert len(buffer.search_index(v_embed=np.ones(4), k=2)) == 1
            buffer.search_many(v_embed=np.ones((3, 4)), k=5)
            facts = {"path": str(path or ""), "lsn": buffer.lsn, "degraded": False}
            assert told == [{**facts, "k": 2, "n": 1}, {**facts, "k": 5, "n": 3}]
            told.clear()


def test_firing_without_observers_calls_nothing_and_a_misspelt_event_is_an_error() -> None:
    registry = discover("all")
    assert "expbuf_on_evicted" not in registry.events
    registry.fire("expbuf_on_evicted", path="", lsn=1, count=1)
    with pytest.raises(KeyError):
        registry.fire("expbuf_on_evict", path="", lsn=1, count=1)


# ---------------------------------------------------------------- a real process


def test_an_installed_plugin_is_found_and_nothing_heavy_is_imported(tmp_path: Path) -> None:
    write_distribution(tmp_path, "good", scorer())
    script = """
        import sys
        import expbuf_core.plugins
        registry = expbuf_core.plugins.default_registry()
        registry.get("priority", "surprise")
        heavy = {"faiss", "lmdb", "torch"} & set(sys.modules)
        sys.exit(f"imported {heavy}" if heavy else 0)
    """
    result = subprocess.run(
        [
            sys.executable,
            "-c",
            f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n" + textwrap.dedent(script),
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 0, result.stderr


# ---------------------------------------------------------------- what a factory makes


class Fusion:
    version: Any = 1

    def output_dim(self, v_dim: int, q_dim: int) -> int:
        return v_dim

    def __call__(self, v: Any, q: Any) -> Any:
        return v


def raising(error: Exception) -> Any:
    def factory(*_: Any) -> Any:
        raise error

    return factory


@pytest.mark.parametrize(
    ("kind", "factory", "error", "word"),
    [
        ("priority", raising(KeyError("x")), PluginContractError, "failed in its factory: KeyErr"),
        ("persistence", raising(KeyError("x")), PluginContractError, "in its factory: KeyErr"),
        ("persistence", raising(OSError("no library")), BackendUnavailable, "no library"),
        (
            "persistence",
            lambda *_: None,
            PluginContractError,
            "NoneType, which is no Persist",
        ),
        (
            "persistence",
            lambda *_: type("Half", (PersistenceAdapter,), {"append": max})(),
            PluginContractError,
            "in its factory: TypeError: .*abstract class Half .*attach",
        ),
        ("priority", raising(OSError("no device")), BackendUnavailable, "no device"),
        ("priority", raising(ConfigError("of its own")), ConfigError, "^of its own$"),
        ("priority", lambda settings: None, PluginContractError, "made a NoneType, which cannot"),
        ("priority", lambda settings: 7, PluginContractError, "made a int, which cannot be called"),
        ("fusion", raising(TypeError("x")), PluginContractError, "failed in its factory: TypeErr"),
        ("fusion", lambda settings: None, PluginContractError, "has no method output_dim"),
        (
            "fusion",
            lambda settings: type("NoVersion", (Fusion,), {"version": None})(),
            PluginContractError,
            "made a NoVersion, whose version is None; expected an integer",
        ),
        (
            "fusion",
            lambda settings: type("Text", (Fusion,), {"version": "1.0"})(),
            PluginContractError,
            "whose version is '1.0'",
        ),
        (
            "fusion",
            lambda settings: type("Mute", (), {"version": 1, "output_dim": max})(),
            PluginContractError,
            "made a Mute, which cannot be called",
        ),
    ],
)
def test_a_factory_that_makes_something_else_is_told(
    kind: Any, factory: Any, error: type[Exception], word: str
) -> None:
    class Mine:
        @hookimpl
        def expbuf_register_priority_scorers(self) -> list[ScorerProvider]:
            return [ScorerProvider("mine", api_version=1, factory=factory)]

        @hookimpl
        def expbuf_register_embedding_fusions(self) -> list[FusionProvider]:
            return [FusionProvider("mine", api_version=1, factory=factory)]

        @hookimpl
        def expbuf_register_persistence(self) -> list[PersistenceProvider]:
            return [PersistenceProvider("mine", api_version=1, factory=factory)]

    plugins = [Mine()]
    with pytest.raises(error, match=word) as caught:
        ExperienceBuffer.open(plugins=plugins, **{kind: "mine"})
    if error is not ConfigError:
        assert str(caught.value).startswith("the ")
        assert " 'mine'" in str(caught.value)


# ---------------------------------------------------------------- plugins by hand


def test_a_hook_may_have_another_name_as_a_function() -> None:
    kinds = []

    def count(self: Any, kind: str) -> None:
        kinds.append(kind)

    class Alias:
        expbuf_on_committed = hookimpl(count)

    registry = discover("all").with_plugins([Alias()])
    registry.fire("expbuf_on_committed", **FACTS)
    assert kinds == ["add"]


def test_a_hook_that_is_no_function_is_told() -> None:
    """It would be passed over in silence."""

    class Part:
        def __init__(self) -> None:
            self.expbuf_on_committed = hookimpl(functools.partial(print))

    with pytest.raises(PluginContractError, match="expbuf_on_committed by a partial; it must be"):
        discover("all").with_plugins([Part()])


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"plugins": 5}, "plugins = 5: must be a list of plugin objects"),
        ({"plugins": "faiss"}, "plugins = 'faiss': must be a list"),
        ({"plugins": Observer()}, "must be a list of plugin objects"),
        ({"plugins": None}, "plugins = None: must be a list"),
        ({"plugins": ["expbuf_metrics"]}, "'expbuf_metrics' is no plugin; give objects with hooks"),
        ({"plugins": [Observer(), None]}, "None is no plugin"),
        ({"plugins": [7]}, "7 is no plugin"),
        ({"plugins": [{}]}, "{} is no plugin"),
        ({"lock": 5}, "lock = 5: must be a context manager"),
        ({"filesystem": 5}, "filesystem = 5: must be an"),
    ],
)
def test_objects_that_are_none_are_refused(arguments: Any, word: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ExperienceBuffer.open(**arguments)
    assert word in str(caught.value)
