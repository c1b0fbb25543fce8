"""The section `experience_buffer` of a configuration: its keys, their bounds, and how it is read.

Every choice of a backend has the form `{backend: NAME, NAME: {settings}}`; the settings under a
name are checked by the model that the backend brings. A later source wins over an earlier one:
defaults, YAML file or mapping, environment, keyword arguments.
"""

from __future__ import annotations

import difflib
import os
import reprlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ByteSize,
    Field,
    PrivateAttr,
    ValidationInfo,
    field_validator,
)

from expbuf_core.errors import ConfigError
from expbuf_core.plugins import KINDS, PluginRegistry, default_registry
from expbuf_core.validation import Float, Int, not_a_truth, validate

SECTION = "experience_buffer"
ENVIRONMENT = "EXPBUF__"


def _off(value: Any) -> Any:
    return "off" if value is False else value  # YAML 1.1 reads a bare `off` as false


Bytes = Annotated[ByteSize, BeforeValidator(not_a_truth)]


class _Section(BaseModel, extra="forbid", frozen=True, validate_default=True):
    """Keys that the core knows; any other is an error."""


class _Choice(_Section, extra="allow", frozen=True):
    """Chooses a backend; keys that are not its own are sections named after backends."""

    __pydantic_extra__: dict[str, dict[str, Any]]

    backend: str

    @property
    def sections(self) -> dict[str, dict[str, Any]]:
        """Settings as they were given, by backend."""
        return self.__pydantic_extra__ or {}

    def section(self, backend: str) -> dict[str, Any]:
        """Settings as they were given for one backend; `PluginRegistry.settings` checks them."""
        return self.sections.get(backend, {})


class EmbeddingConfig(_Section):
    """What the embeddings are like. Fixed when the buffer is created."""

    visual_dim: Int | None = Field(
        None,
        ge=0,
        le=1 << 20,
        description="Dimension of the visual embedding; 0: there is none; null: as first added.",
    )
    question_dim: Int | None = Field(
        None,
        ge=0,
        le=1 << 20,
        description="Dimension of the question embedding; 0: there is none; null: as first added.",
    )
    metric: Literal["cosine", "inner_product", "l2"] = Field(
        "cosine", description="How similar two fused embeddings are: cosine, inner_product or l2."
    )

    @field_validator("question_dim")
    @classmethod
    def _some_part(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value == 0 and info.data.get("visual_dim") == 0:
            raise ValueError("visual_dim and question_dim cannot both be 0")
        return value


class FusionConfig(_Choice):
    """How the visual and the question embedding become one vector."""

    backend: str = Field(
        "weighted_sum",
        description="weighted_sum (equal dimensions), weighted_concat (any), or a plugin's.",
    )


class PersistenceConfig(_Choice):
    """Where experiences are kept."""

    backend: str = Field(
        "file",
        description="file (write-ahead logs), lmdb, memory (nothing survives), or a plugin's.",
    )


class IndexConfig(_Choice):
    """How similar experiences are found, and when the index is built anew."""

    backend: str = Field(
        "faiss_cpu",
        description="faiss_cpu, faiss_gpu, exact (compares every vector), or a plugin's.",
    )
    fallback: tuple[str, ...] = Field(
        ("faiss_cpu", "exact"),
        description="Tried in this order when the backend is not installed or cannot run here.",
    )
    rebuild_every: Int = Field(
        1000, ge=1, description="Operations since the last build after which the next one starts."
    )
    growth: Float = Field(
        0.25,
        gt=0,
        le=10,
        description="Share of new or removed rows at which segments are merged into one.",
    )
    builder: Annotated[Literal["process", "thread", "off", "external"], BeforeValidator(_off)] = (
        Field(
            "process",
            description=(
                "Who builds: a process or a thread started on demand, a service run by hand "
                "(external), or nobody (off)."
            ),
        )
    )
    idle_s: Float = Field(
        10.0, gt=0, description="Seconds without work after which the builder process ends."
    )
    target_recall: Float = Field(
        0.95, gt=0, le=1, description="Recall at 10 that an approximate index is tuned to reach."
    )
    seed: Int = Field(0, ge=0, lt=1 << 32, description="For what the index draws at random.")


class PriorityConfig(_Choice):
    """What priority a new experience gets."""

    backend: str = Field(
        "weighted_sum",
        description=(
            "weighted_sum (uncertainty, reward, age), absolute_reward, td_error, or a plugin's."
        ),
    )


class SamplingConfig(_Section):
    """How experiences are drawn for replay: (priority + eps)^alpha · f(success rate) · ageing."""

    alpha: Float = Field(
        0.6, ge=0, le=4, description="Exponent of the priority; 0 draws without regard to it."
    )
    beta: Float = Field(
        0.4, ge=0, le=1, description="Exponent of the importance weights; 1 corrects in full."
    )
    eps: Float = Field(
        1e-3, gt=0, le=1e6, description="Added to every priority, so that 0 does not mean never."
    )
    success_prior: Float = Field(
        0.5, ge=0, le=1, description="Success rate that an experience without outcomes is given."
    )
    success_prior_count: Float = Field(
        2.0, ge=0, le=1e6, description="How many outcomes that prior counts as."
    )
    success_weight: Float = Field(
        1.0,
        ge=0,
        le=100,
        description=(
            "f(rate) = 1 + success_weight · (rate − success_prior), at least success_floor; 0 "
            "turns it off."
        ),
    )
    success_floor: Float = Field(
        0.05,
        ge=0,
        le=1,
        description="Least f(rate): what was never right stays in play; 0 may end that.",
    )
    ageing: Annotated[Literal["off", "adds", "time"], BeforeValidator(_off)] = Field(
        "off", description="Older experiences count less: off, by adds since, or by time."
    )
    half_life: Float | None = Field(
        None, gt=0, description="Adds or seconds in which the weight halves; needed for ageing."
    )
    stratified: bool = Field(
        True, description="One draw from each of batch_size equal parts of the total weight."
    )
    cache_bytes: Bytes = Field(
        ByteSize(256 << 20),
        ge=0,
        description=(
            "Memory that embeddings which were sampled may come to take in each process; 0: always "
            "read them."
        ),
    )
    samples_per_insert: Float | None = Field(
        None,
        gt=0,
        le=1e9,
        description="Draws that `ReplayBatches` makes at most for each experience added.",
    )
    insert_wait_s: Float = Field(
        60.0,
        ge=0,
        description="Seconds that it waits for the next experience before SampleLimitError.",
    )

    @field_validator("half_life")
    @classmethod
    def _needed_for_ageing(cls, value: float | None, info: ValidationInfo) -> float | None:
        if value is None and info.data.get("ageing", "off") != "off":
            raise ValueError(f"must be given for ageing: {info.data['ageing']}")
        return value


class SnapshotConfig(_Section):
    """When the columns are written as a whole, so that old logs can go."""

    every_ops: Int = Field(
        200_000,
        ge=1,
        description="Operations, or experiences added, after which a snapshot is taken.",
    )


class InferenceConfig(_Section, protected_namespaces=()):  # for `model_weight`
    """How the answers of similar experiences and the model's own become one."""

    k: Int = Field(8, ge=1, le=10_000, description="Neighbours that are asked.")
    min_experiences: Int = Field(
        32, ge=0, description="Below this many experiences nothing is recalled, only stored."
    )
    confident: Float = Field(
        0.6, ge=0, le=1, description="From this confidence on a consensus counts as a success."
    )
    model_weight: Float = Field(
        1.0, ge=0, le=1e6, description="The model votes with this weight times its confidence."
    )
    similarity_power: Float = Field(
        4.0, ge=0, le=100, description="A vote is weighed by the similarity to this power."
    )
    half_life_s: Float | None = Field(
        None, gt=0, description="Seconds in which the weight of a vote halves; null: never."
    )
    wrong_weight: Float = Field(
        0.5, ge=0, le=1e6, description="How much a known error speaks against its answer; 0: not."
    )


class BufferConfig(_Section):
    """Everything that can be configured, validated. Immutable; made by `load_config`."""

    path: Path | None = Field(
        None, description="Folder of the buffer; `open(path)` wins. null: in memory, or as opened."
    )
    max_size: Int = Field(
        100_000,
        ge=1,
        le=10**12,
        description="Most experiences held; the next one evicts the oldest.",
    )
    max_experience_bytes: Bytes = Field(
        ByteSize(16 << 20),
        ge=1024,
        le=1 << 30,
        description="Largest experience, encoded; a larger one is refused.",
    )
    max_commit_bytes: Bytes = Field(
        ByteSize(1 << 30),
        ge=1024,
        le=1 << 40,
        description="Largest batch that add_many takes as one commit.",
    )
    durability: Literal["sync", "group", "os"] = Field(
        "sync",
        description=(
            "sync: acknowledged is on disk; group: within group_interval_ms; os: when the "
            "system writes it. A killed process loses nothing under any of them."
        ),
    )
    group_interval_ms: Float = Field(
        10.0, gt=0, le=60_000, description="Most milliseconds between flushes under group."
    )
    lock_timeout_s: Float = Field(
        30.0, ge=0, le=1e9, description="Seconds to wait for another process before LockTimeout."
    )
    receipts_kept: Int = Field(
        10_000,
        ge=1,
        le=10**12,
        description="Receipts remembered, so that an outcome recorded twice counts once.",
    )
    embedding: EmbeddingConfig = Field(
        default_factory=EmbeddingConfig, description="What the embeddings are like."
    )
    fusion: FusionConfig = Field(
        default_factory=FusionConfig, description="How both embeddings become one vector."
    )
    persistence: PersistenceConfig = Field(
        default_factory=PersistenceConfig, description="Where experiences are kept."
    )
    index: IndexConfig = Field(
        default_factory=IndexConfig, description="How similar experiences are found."
    )
    priority: PriorityConfig = Field(
        default_factory=PriorityConfig, description="What priority a new experience gets."
    )
    sampling: SamplingConfig = Field(
        default_factory=SamplingConfig, description="How experiences are drawn for replay."
    )
    snapshot: SnapshotConfig = Field(
        default_factory=SnapshotConfig, description="When the columns are written as a whole."
    )
    inference: InferenceConfig = Field(
        default_factory=InferenceConfig, description="How votes become a consensus."
    )

    _skipped: tuple[str, ...] = PrivateAttr(default=())

    @field_validator("max_commit_bytes")
    @classmethod
    def _holds_one_experience(cls, value: ByteSize, info: ValidationInfo) -> ByteSize:
        if value < info.data.get("max_experience_bytes", 0):
            raise ValueError("must be at least max_experience_bytes")
        return value

    @property
    def explicit(self) -> frozenset[str]:
        """Dotted keys that were given and are not null; where others stand, the folder decides."""
        return frozenset(_leaves(self.model_dump(exclude_unset=True)))

    @property
    def skipped(self) -> tuple[str, ...]:
        """Sections of backends that are not installed: "persistence.lmdb"."""
        return self._skipped


def load_config(
    source: str | os.PathLike[str] | Mapping[str, Any] | BufferConfig | None = None,
    *,
    overrides: Mapping[str, Any] | None = None,
    env: Mapping[str, str] | None = None,
    registry: PluginRegistry | None = None,
) -> BufferConfig:
    """Read, merge and validate a configuration.

    Args:
        source: A YAML file or a mapping: either a document with a section `experience_buffer`,
            whose other sections are ignored, or that section itself. A `BufferConfig` stands for
            what was given explicitly for it, the environment included.
        overrides: By nested mappings, or by names such as `max_size`, `index__rebuild_every` or
            `index.rebuild_every`.
        env: Where to look for names such as `EXPBUF__INDEX__BACKEND`, whose values are YAML;
            default: the environment of the process.
        registry: Knows the backends that are installed; default: `default_registry()`.

    Raises:
        ConfigError: A key is unknown or its value out of bounds; one line for each, with the file
            or variable it came from. Or the file cannot be read.
    """
    registry = registry or default_registry()
    given = _Given()
    if isinstance(source, BufferConfig):
        given.merge(source.model_dump(exclude_unset=True), "configuration")
    else:
        given.merge(*_read(source))
        for name, value in sorted((os.environ if env is None else env).items()):
            if name.startswith(ENVIRONMENT):
                where = f"environment variable {name}"
                key = name.removeprefix(ENVIRONMENT).lower().replace("__", ".")
                given.merge(_nested(key, _yaml(value, where)), where)
    for name, value in (overrides or {}).items():
        given.merge(_nested(name.replace("__", "."), value), "keyword argument")

    _check_section_name(given)
    config = validate(BufferConfig, given.values, origin=given.origin)
    skipped = []
    for kind in KINDS:
        choice: _Choice = getattr(config, kind)
        for name, section in choice.sections.items():
            if name in registry.names(kind):
                registry.settings(kind, name, section, origin=given.origin)
            else:
                skipped.append(f"{kind}.{name}")
    config._skipped = tuple(skipped)
    return config


class _Given:
    """Values from several sources, merged, and for each where it came from."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self._origins: dict[str, str] = {}

    def merge(self, layer: Mapping[str, Any], origin: str) -> None:
        """Add a source that wins over those before it."""
        for key, value in layer.items():
            if key in KINDS and isinstance(value, str):
                value = {"backend": value}
            self._put(self.values, str(key), value, str(key), origin)

    def _put(self, into: dict[str, Any], key: str, value: Any, dotted: str, origin: str) -> None:
        if value is None and _may_be_empty(dotted):
            value = {}  # a section all of whose keys are commented out
        if not isinstance(value, Mapping):
            into[key] = value
            self._origins[dotted] = origin
            return
        if not isinstance(into.get(key), dict):
            into[key] = {}
        for name, inner in value.items():
            self._put(into[key], str(name), inner, f"{dotted}.{name}", origin)

    def origin(self, key: str) -> str:
        """Where a key came from; a section: one of its keys; one not given: a neighbour of it."""
        if key in self._origins:
            return self._origins[key]
        inside = [o for name, o in self._origins.items() if name.startswith(f"{key}.")]
        if inside:
            return inside[-1]
        around = key.rpartition(".")[0]
        near = [o for name, o in self._origins.items() if name.startswith(f"{around}.")]
        return near[-1] if around and near else ""


def _may_be_empty(dotted: str) -> bool:
    name, _, inner = dotted.partition(".")
    field = BufferConfig.model_fields.get(name)
    if field is None or not isinstance(field.annotation, type):
        return False
    if not inner:
        return issubclass(field.annotation, _Section)
    is_backend = "." not in inner and inner not in field.annotation.model_fields
    return issubclass(field.annotation, _Choice) and is_backend


def _read(source: str | os.PathLike[str] | Mapping[str, Any] | None) -> tuple[Any, str]:
    """The section and what to call its source."""
    if source is None:
        return {}, ""
    if isinstance(source, Mapping):
        where, document = "configuration", source
    else:
        if not isinstance(source, str | os.PathLike):
            raise ConfigError(
                f"config: expected a path, a mapping or a BufferConfig, not {reprlib.repr(source)}"
            )
        where = os.fspath(source)
        try:
            text = Path(source).read_text(encoding="utf-8")
        except (OSError, ValueError) as exc:
            reason = getattr(exc, "strerror", None) or str(exc)  # no path: it holds a NUL
            if isinstance(exc, UnicodeDecodeError):
                reason = "it is not UTF-8"
            raise ConfigError(f"{where}: cannot read the configuration: {reason}") from exc
        document = _yaml(text, where)
        document = {} if document is None else document
        if not isinstance(document, Mapping):
            raise ConfigError(f"{where}: expected a mapping, found {type(document).__name__}")
    if SECTION not in document:
        if document and all(_is_of_others(key, value) for key, value in document.items()):
            raise ConfigError(
                f"{where}: it has no section {SECTION!r}, and what it has is not expbuf's: "
                f"{', '.join(map(str, document))}"
            )
        return document, where
    section = document[SECTION]
    section = {} if section is None else section
    if not isinstance(section, Mapping):
        raise ConfigError(
            f"{where}: {SECTION} must be a mapping, not {type(section).__name__}", key=SECTION
        )
    return section, where


def _check_section_name(given: _Given) -> None:
    """Tell of a misspelt name of the section, which looks like a key, or one that is no key."""
    for key, value in given.values.items():
        if isinstance(value, dict) and difflib.get_close_matches(key, [SECTION], cutoff=0.8):
            where = given.origin(key)
            hint = f"the section is called {SECTION!r}"
            if key == SECTION:
                hint = f"the section is not part of a key: {ENVIRONMENT}MAX_SIZE, max_size=5000"
            raise ConfigError(f"{where}: {key}: {hint}" if where else f"{key}: {hint}", key=key)


def _is_of_others(key: Any, value: Any) -> bool:
    """Whether a section is none of ours, and no misspelt one."""
    known = BufferConfig.model_fields
    return isinstance(value, Mapping) and not difflib.get_close_matches(str(key), known, n=1)


def _yaml(text: str, where: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as exc:
        raise ConfigError(f"{where}: not valid YAML: {exc}") from exc


def _nested(dotted: str, value: Any) -> dict[str, Any]:
    first, _, rest = dotted.partition(".")
    return {first: _nested(rest, value) if rest else value}


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        elif value is not None:
            yield prefix + key
