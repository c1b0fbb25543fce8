"""The configuration: precedence, bounds, messages, and the commented default file."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel, ValidationError

from expbuf_core.config_schema import BufferConfig, load_config
from expbuf_core.contracts import HostInfo, IndexProvider
from expbuf_core.errors import ConfigError
from expbuf_core.hookspecs import hookimpl
from expbuf_core.plugins import KINDS, PluginRegistry, default_registry, discover
from expbuf_core.validation import iter_keys

CONFIGS = Path(__file__).parent.parent / "configs"


class TreeSettings(BaseModel, extra="forbid"):
    depth: int = 3


class Tree:
    @hookimpl
    def expbuf_register_index_backends(self, host: HostInfo) -> list[IndexProvider]:
        return [IndexProvider("tree", api_version=1, factory=dict, settings=TreeSettings)]


REGISTRY = discover("all").with_plugins([Tree()])


def load(
    source: Any = None,
    *,
    env: Mapping[str, str] | None = None,
    registry: PluginRegistry = REGISTRY,
    **overrides: Any,
) -> BufferConfig:
    return load_config(source, overrides=overrides, env=env or {}, registry=registry)


def write(folder: Path, text: str) -> Path:
    path = folder / "params.yaml"
    path.write_text(text, encoding="utf-8")
    return path


# ---------------------------------------------------------------- sources and precedence


def test_nothing_given_is_the_defaults() -> None:
    config = load()
    assert config == BufferConfig()
    assert config.explicit == frozenset()
    assert config.skipped == ()


def test_later_sources_win(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        """
        experience_buffer:
          max_size: 1
          index: {rebuild_every: 1, seed: 1, growth: 0.1}
        """,
    )
    env = {"EXPBUF__INDEX__REBUILD_EVERY": "2", "EXPBUF__INDEX__SEED": "2", "EXPBUF_X": "no"}
    config = load(path, env=env, index__seed=3)
    assert (config.max_size, config.index.growth) == (1, 0.1)
    assert config.index.rebuild_every == 2
    assert config.index.seed == 3
    assert config.index.idle_s == BufferConfig().index.idle_s


def test_the_environment_of_the_process_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXPBUF__MAX_SIZE", "7")
    assert load_config(registry=REGISTRY).max_size == 7


@pytest.mark.parametrize(
    ("name", "value", "key", "expected"),
    [
        ("INDEX__BACKEND", "exact", "index.backend", "exact"),
        ("INDEX", "exact", "index.backend", "exact"),
        ("INDEX__FALLBACK", "[exact]", "index.fallback", ("exact",)),
        ("MAX_SIZE", "5_000", "max_size", 5000),
        ("SAMPLING__STRATIFIED", "no", "sampling.stratified", False),
        ("SAMPLING__EPS", "1e-5", "sampling.eps", 1e-5),
        ("SAMPLING__HALF_LIFE", "null", "sampling.half_life", None),
        ("PATH", "/data/memory", "path", Path("/data/memory")),
    ],
)
def test_values_of_the_environment_are_yaml(
    name: str, value: str, key: str, expected: object
) -> None:
    found: Any = load(env={f"EXPBUF__{name}": value})
    for part in key.split("."):
        found = getattr(found, part)
    assert found == expected


@pytest.mark.parametrize(
    "overrides",
    [
        {"index": {"backend": "exact", "rebuild_every": 5}, "max_size": 9},
        {"index__backend": "exact", "index__rebuild_every": 5, "max_size": 9},
        {"index.backend": "exact", "index.rebuild_every": 5, "max_size": 9},
        {"index__rebuild_every": 5, "index": "exact", "max_size": 9},
    ],
)
def test_keywords_are_nested_flat_or_dotted(overrides: dict[str, Any]) -> None:
    config = load({"index": {"seed": 4}}, **overrides)
    assert (config.index.backend, config.index.rebuild_every, config.max_size) == ("exact", 5, 9)
    assert config.index.seed == 4
    assert config.explicit == {"index.backend", "index.rebuild_every", "index.seed", "max_size"}


def test_a_mapping_is_the_document_or_the_section() -> None:
    section = {"max_size": 3}
    assert load(section) == load({"experience_buffer": section, "trainer": {"lr": 1e-4}})


@pytest.mark.parametrize(
    "text", ["", "experience_buffer:", "experience_buffer:\n  index:\n  sampling:"]
)
def test_empty_sections_are_the_defaults(tmp_path: Path, text: str) -> None:
    assert load(write(tmp_path, text)) == BufferConfig()


def test_null_is_not_explicit(tmp_path: Path) -> None:
    config = load({"path": None, "embedding": {"visual_dim": None, "question_dim": 0}})
    assert config.explicit == {"embedding.question_dim"}


def test_a_loaded_configuration_can_be_loaded_again() -> None:
    first = load({"index": {"tree": {"depth": 2}}}, max_size=5)
    again = load(first, env={"EXPBUF__MAX_SIZE": "99"}, index__seed=1)
    assert (again.max_size, again.index.seed) == (5, 1)  # the environment was heard the first time
    assert again.explicit == first.explicit | {"index.seed"}
    assert load(first) == first


def test_it_survives_pickle_and_json() -> None:
    config = load({"index": {"tree": {"depth": 2}, "absent": {"x": 1}}}, path="somewhere")
    copy = pickle.loads(pickle.dumps(config))  # noqa: S301
    assert copy == config
    assert (copy.explicit, copy.skipped) == (config.explicit, config.skipped)
    assert load(config.model_dump(mode="json")) == config


def test_it_is_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        load().max_size = 3  # type: ignore[misc]


# ---------------------------------------------------------------- choices


@pytest.mark.parametrize("kind", KINDS)
def test_a_choice_may_be_a_plain_name(kind: str) -> None:
    assert getattr(load({kind: "other"}), kind).backend == "other"


def test_sections_of_backends_that_are_not_installed_are_skipped_and_listed() -> None:
    config = load({"index": {"tree": {"depth": 2}, "absent": {"any": {"thing": 1}}, "gone": None}})
    assert config.skipped == ("index.absent", "index.gone")
    assert config.index.section("tree") == {"depth": 2}
    assert config.index.section("absent") == {"any": {"thing": 1}}
    assert config.index.section("never") == {}


def test_sections_of_installed_backends_are_checked() -> None:
    with pytest.raises(ConfigError, match=r"index\.tree\.dept: unknown key.*'index\.tree\.depth'"):
        load({"index": {"tree": {"dept": 2}}})
    with pytest.raises(ConfigError, match=r"^keyword argument: index\.tree\.depth = 'deep': "):
        load({"index": {"tree": {"depth": 2}}}, index__tree__depth="deep")


# ---------------------------------------------------------------- what is refused


def test_errors_name_the_file_the_key_the_value_and_the_bound(tmp_path: Path) -> None:
    path = write(tmp_path, "experience_buffer: {index: {rebuild_every: 0}}")
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert str(caught.value) == (
        f"{path}: index.rebuild_every = 0: must be greater than or equal to 1"
    )
    assert caught.value.key == "index.rebuild_every"


def test_errors_name_where_each_value_came_from() -> None:
    with pytest.raises(ConfigError) as caught:
        load({"max_size": 0}, env={"EXPBUF__INDEX__SEED": "-1"}, sampling__beta=2)
    lines = str(caught.value).splitlines()
    assert [line.split(":")[0] for line in lines] == [
        "configuration",
        "environment variable EXPBUF__INDEX__SEED",
        "keyword argument",
    ]


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("max_sise", "did you mean 'max_size'?"),
        ("index__rebuild_evry", "did you mean 'index.rebuild_every'?"),
        ("rebuild_every", "did you mean 'index.rebuild_every'?"),
        ("sampling__k", "did you mean 'inference.k'?"),
        ("qqq", "known: path, max_size, "),
        ("index__qqq", "known: backend, fallback, "),
        ("index__exact__qqq", "there are none here"),
    ],
)
def test_unknown_keys_name_the_nearest(key: str, hint: str) -> None:
    dotted = key.replace("__", ".")
    with pytest.raises(ConfigError) as caught:
        load_config(overrides={key: 1}, env={}, registry=REGISTRY)
    assert str(caught.value).startswith(f"keyword argument: {dotted}: unknown key; {hint}")
    assert caught.value.key == dotted


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("max_size", 0),
        ("max_size", True),
        ("max_size", 2**63),
        ("max_size", 10**30),
        ("lock_timeout_s", 1e10),
        ("sampling.samples_per_insert", 1e300),
        ("priority.weighted_sum.reward_weight", 1e300),
        ("priority.weighted_sum.age_half_life_s", True),
        ("fusion.weighted_sum.visual_weight", True),
        ("max_size", 1.5),
        ("max_size", "many"),
        ("max_size", None),
        ("max_experience_bytes", "16 parsecs"),
        ("max_experience_bytes", 1),
        ("durability", "sometimes"),
        ("lock_timeout_s", -1),
        ("lock_timeout_s", float("nan")),
        ("group_interval_ms", float("inf")),
        ("embedding.visual_dim", -1),
        ("embedding.metric", "hamming"),
        ("index.builder", "nobody"),
        ("index.builder", True),
        ("index.target_recall", 1.01),
        ("index.growth", 0),
        ("sampling.eps", 0),
        ("sampling.ageing", "sometimes"),
        ("sampling.half_life", 0),
        ("inference.confident", 1.5),
        ("index", 5),
        ("sampling", "fast"),
    ],
)
def test_values_out_of_bounds_are_refused(key: str, value: object) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(overrides={key: value}, env={}, registry=REGISTRY)
    assert caught.value.key == key
    assert f"{key} = " in str(caught.value)


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"sampling": {"ageing": "time"}}, "sampling.half_life"),
        ({"embedding": {"visual_dim": 0, "question_dim": 0}}, "embedding.question_dim"),
        ({"max_experience_bytes": "1MiB", "max_commit_bytes": 2000}, "max_commit_bytes"),
    ],
)
def test_contradictions_are_refused(values: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(values)
    assert caught.value.key == key


def test_yaml_reads_off_as_false() -> None:
    values = yaml.safe_load("{index: {builder: off}, sampling: {ageing: off}}")
    assert values["index"]["builder"] is False
    config = load(values)
    assert (config.index.builder, config.sampling.ageing) == ("off", "off")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"a: [1", "not valid YAML"),
        (b"- 1\n- 2", "expected a mapping, found list"),
        (b"experience_buffer: 5", "must be a mapping, not int"),
        (b"\xff\xfe\xfa", "not UTF-8"),
        (b"!!python/object/apply:os.getpid []", "not valid YAML"),
    ],
)
def test_a_file_that_is_no_configuration(tmp_path: Path, text: bytes, reason: str) -> None:
    path = tmp_path / "params.yaml"
    path.write_bytes(text)
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert str(caught.value).startswith(str(path))
    assert reason in str(caught.value)


@pytest.mark.parametrize("name", ["experience_bufer", "experiencebuffer", "experience_buffers"])
def test_a_misspelt_section_is_told(tmp_path: Path, name: str) -> None:
    path = write(tmp_path, f"{name}: {{max_size: 5}}")
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert str(caught.value) == f"{path}: {name}: the section is called 'experience_buffer'"
    assert caught.value.key == name


def test_a_name_that_no_file_can_have() -> None:
    with pytest.raises(ConfigError, match=r"cannot read the configuration: .*null"):
        load("params\0.yaml")


def test_the_section_is_not_part_of_a_key() -> None:
    name = "EXPBUF__EXPERIENCE_BUFFER__MAX_SIZE"
    with pytest.raises(ConfigError, match=f"environment variable {name}: experience_buffer: the"):
        load(env={name: "5"})
    with pytest.raises(
        ConfigError, match="keyword argument: experience_buffer: the section is not"
    ):
        load(experience_buffer={"max_size": 5})


def test_an_unknown_section_names_where_it_came_from(tmp_path: Path) -> None:
    path = write(tmp_path, "experience_buffer: {indes: {backend: exact}}")
    with pytest.raises(ConfigError, match=r"params\.yaml: indes: unknown key; did you mean"):
        load(path)


def test_a_file_that_is_missing_or_a_folder(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.yaml", tmp_path):
        with pytest.raises(ConfigError, match="cannot read the configuration"):
            load(path)


# ---------------------------------------------------------------- the schema and the shipped files


def leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def test_every_key_says_what_it_is() -> None:
    assert all(key.description for key in iter_keys(BufferConfig))


def test_the_default_file_states_every_key_with_its_default() -> None:
    path = CONFIGS / "training_params.yaml"
    config = load(path, registry=default_registry())
    expected = {key.name for key in iter_keys(BufferConfig) if not key.section}
    stated = dict(leaves(yaml.safe_load(path.read_text())["experience_buffer"]))
    backends = {f"{kind}.{name}" for kind in KINDS for name in getattr(config, kind).sections}
    own = {key for key in stated if not any(f"{key}.".startswith(f"{b}.") for b in backends)}
    assert own == expected
    for kind in KINDS:
        assert getattr(config, kind).sections.keys() >= set(discover("all").names(kind)) - {
            "memory"
        }
    exclude: Any = {kind: set(getattr(config, kind).sections) for kind in KINDS}
    assert config.model_dump(exclude=exclude) == BufferConfig().model_dump()


def test_the_default_file_states_every_setting_of_installed_backends() -> None:
    registry = default_registry()
    config = load(CONFIGS / "training_params.yaml", registry=registry)
    for kind in KINDS:
        for name in registry.names(kind):
            section = getattr(config, kind).sections.get(name)
            if section is None:
                continue
            defaults = registry.settings(kind, name, {}).model_dump()
            assert registry.settings(kind, name, section).model_dump() == defaults
            assert section.keys() == defaults.keys(), f"{kind}.{name}"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_files_load_without_plugins(path: Path) -> None:
    load(path, registry=discover("all"))
