"""Pydantic models checked with errors that name key, value, bound and where the value came from."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, NamedTuple, TypeVar

from pydantic import BaseModel, BeforeValidator, Field, ValidationError
from pydantic_core import ErrorDetails

from expbuf_core.errors import ConfigError

M = TypeVar("M", bound=BaseModel)


def not_a_truth(value: Any) -> Any:
    """What pydantic gets where a number is wanted: it would read `yes` as 1."""
    if isinstance(value, bool):
        raise ValueError("must be a number, not true or false")
    return value


Int = Annotated[int, BeforeValidator(not_a_truth)]
"""A whole number of a configuration; also for the settings of plugins."""

Float = Annotated[float, BeforeValidator(not_a_truth), Field(allow_inf_nan=False)]
"""A finite number of a configuration; also for the settings of plugins."""


class Key(NamedTuple):
    """A setting: its dotted name, its default and what it means. `default` of a section: None."""

    name: str
    default: Any
    description: str
    section: bool


def iter_keys(model: type[BaseModel], prefix: str = "") -> Iterator[Key]:
    """Yield every key of a model, sections before their own keys."""
    for name, field in model.model_fields.items():
        section = _is_model(field.annotation)
        default = None if section else field.get_default(call_default_factory=True)
        yield Key(prefix + name, default, field.description or "", section)
        if section:
            yield from iter_keys(field.annotation, f"{prefix}{name}.")  # type: ignore[arg-type]


def validate(
    model: type[M],
    data: Mapping[str, Any],
    *,
    prefix: str = "",
    origin: Callable[[str], str] = lambda key: "",
) -> M:
    """Make a `model` of `data`; unknown keys are errors also where the model would ignore them.

    Args:
        model: The pydantic model.
        data: What was configured.
        prefix: Put before every key in messages: "index.faiss_cpu.".
        origin: Says where the value of a dotted key came from; "" for nothing to say.

    Raises:
        ConfigError: One line for each key that is wrong.
    """
    try:
        result = model.model_validate(dict(data))
    except ValidationError as exc:
        found = [_describe(model, error, prefix) for error in exc.errors(include_url=False)]
    else:
        ignored = [] if model.model_config.get("extra") == "allow" else _ignored(model, data)
        found = [_unknown(model, (key,), prefix) for key in ignored]
        if not found:
            return result
    lines = [f"{where}: {line}" if (where := origin(key)) else line for key, line in found]
    raise ConfigError("\n".join(lines), key=found[0][0])


def _describe(model: type[BaseModel], error: ErrorDetails, prefix: str) -> tuple[str, str]:
    """(dotted key, one line) for an error of pydantic."""
    loc = error["loc"]
    parent = _model_at(model, loc[:-1])
    extra = parent is not None and loc and loc[-1] not in _names(parent)
    if error["type"] == "extra_forbidden" or (extra and error["type"] == "dict_type"):
        return _unknown(model, loc, prefix)
    key = prefix + ".".join(map(str, loc)) if loc else prefix.rstrip(".")
    if error["type"] == "missing":
        return key, f"{key}: required, and not given"
    message = error["msg"].replace("Input should be", "must be", 1)
    message = message.removeprefix("Value error, ").replace("a valid tuple", "a list")
    return key, f"{key} = {reprlib.repr(error['input'])}: {message}"


def _unknown(model: type[BaseModel], loc: Sequence[int | str], prefix: str) -> tuple[str, str]:
    """(dotted key, one line that names the nearest known key)."""
    *path, leaf = map(str, loc)
    inside = "".join(f"{part}." for part in path)
    parent = _model_at(model, path)
    siblings = list(parent.model_fields) if parent else []
    near = [inside + name for name in difflib.get_close_matches(leaf, siblings, n=1)]
    # Right name, wrong place: `rebuild_every` for `index.rebuild_every`.
    near += [key.name for key in iter_keys(model) if key.name.rpartition(".")[2] == leaf]
    key = f"{prefix}{inside}{leaf}"
    known = f"known: {', '.join(siblings)}" if siblings else "there are none here"
    hint = f"did you mean {prefix + near[0]!r}?" if near else known
    return key, f"{key}: unknown key; {hint}"


def _ignored(model: type[BaseModel], data: Mapping[str, Any]) -> list[str]:
    known = _names(model)
    return [key for key in data if key not in known]


def _names(model: type[BaseModel]) -> set[Any]:
    aliases = {field.alias for field in model.model_fields.values() if field.alias}
    return aliases | set(model.model_fields)


def _model_at(model: type[BaseModel], path: Sequence[int | str]) -> type[BaseModel] | None:
    for part in path:
        field = model.model_fields.get(str(part))
        if field is None or not _is_model(field.annotation):
            return None
        model = field.annotation  # type: ignore[assignment]
    return model


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)
