"""Configs from files and `key=value` words, and their keys as a person reads them.

A config is a frozen pydantic model; this module knows nothing of any particular one.
"""

from __future__ import annotations

import json
import tomllib
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator
from pydantic.fields import FieldInfo

from tinsmith.kitchen.errors import ConfigError, nearest


class RecipeConfig(BaseModel):
    """Base of all recipe configs: immutable, no unknown keys, each field documented by the string under it."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True)

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_flags_for_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        """pydantic takes true for 1."""
        annotation = cls.model_fields[str(info.field_name)].annotation
        kinds = {annotation, *get_args(annotation)}
        if isinstance(value, bool) and kinds & {int, float} and bool not in kinds:
            raise ValueError("Input should be a number, not true or false")
        return value


ConfigT = TypeVar("ConfigT", bound=RecipeConfig)


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfigKey:
    name: str
    type: str
    default: str | None
    """As one would type it; `None` if the key is required."""
    doc: str


def config_keys(config_type: type[RecipeConfig], defaults: Mapping[str, Any] | None = None) -> list[ConfigKey]:
    """The keys of a config, with the defaults that a recipe sets instead of its own."""
    own = defaults or {}
    return [
        ConfigKey(
            name=name,
            type=_type_text(field.annotation),
            default=None if field.is_required() and name not in own else _value_text(own.get(name, field.default)),
            doc=" ".join((field.description or "").split()),
        )
        for name, field in config_type.model_fields.items()
    ]


def make_config(
    config_type: type[ConfigT],
    overrides: Sequence[str],
    *,
    file: Path | None = None,
    defaults: Mapping[str, Any] | None = None,
) -> ConfigT:
    """A complete config: defaults, then `file` (TOML, YAML or JSON), then `key=value` words.

    Raises `ConfigError` naming every bad key and value.
    """
    values = dict(defaults or {}) | ({} if file is None else dict(read_config_file(file)))
    for word in overrides:
        key, equals, text = word.partition("=")
        if not equals or not key:
            raise ConfigError(f"{word!r} is not of the form key=value")
        field = config_type.model_fields.get(key)
        values[key] = None if field is not None and _means_none(text, field) else text
    try:
        return config_type.model_validate(values)
    except ValidationError as error:
        raise ConfigError(explain(error, config_type)) from error


def read_config_file(path: Path) -> Mapping[str, Any]:
    """Raises `ConfigError` for a file that is missing, of another kind, or holds no mapping."""
    readers: dict[str, Callable[[str], Any]] = {
        ".toml": tomllib.loads,
        ".json": json.loads,
        ".yaml": _load_yaml,
        ".yml": _load_yaml,
    }
    if path.suffix not in readers:
        raise ConfigError(f"config file {str(path)!r} must end in {', '.join(readers)}")
    try:
        values = readers[path.suffix](path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the config file {str(path)!r}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"config file {str(path)!r} is not valid {path.suffix[1:].upper()}: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"config file {str(path)!r} must hold keys and values, not {type(values).__name__}")
    return values


def _load_yaml(text: str) -> Any:
    try:
        yaml: Any = import_module("yaml")
    except ImportError as error:
        raise ConfigError("reading YAML needs the package pyyaml; install it, or write the config as TOML") from error
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error


def _means_none(text: str, field: FieldInfo) -> bool:
    return text.lower() in ("none", "null") and type(None) in get_args(field.annotation)


def explain(error: ValidationError, config_type: type[RecipeConfig]) -> str:
    """Every bad key and value, one per line."""
    lines = []
    for problem in error.errors():
        key = ".".join(str(part) for part in problem["loc"])
        match problem["type"]:
            case "extra_forbidden":
                known = config_type.model_fields
                lines.append(f"unknown key {key!r}; the keys are {', '.join(known)}{nearest(key, known)}")
            case "missing":
                lines.append(f"key {key!r} is required: {config_type.model_fields[key].description}")
            case _ if not key:
                lines.append(problem["msg"].removeprefix("Value error, "))
            case _:
                lines.append(f"{key}={problem['input']!r}: {problem['msg'].removeprefix('Value error, ')}")
    return "\n".join(lines)


def _type_text(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return "|".join(str(choice) for choice in get_args(annotation))
    if get_origin(annotation) in (Union, types.UnionType):
        return "|".join(_type_text(choice) for choice in get_args(annotation))
    names = {type(None): "none", str: "text", Path: "path", bool: "true|false"}
    return names.get(annotation) or str(annotation.__name__)


def _value_text(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)
