"""A recipe as a YAML file: the options of a command line, and a type for each pattern of module names.

scheme: w8a8
anti_outlier: m4
modules:
  "*.down_proj": w8a8-dynamic        # the last pattern that matches wins
  "model.layers.0.*": float
"""

from __future__ import annotations

import difflib
from dataclasses import fields
from enum import Enum
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from eightfold.errors import ConfigError, DependencyError, InputError, one_of
from eightfold.quant.recipe import Recipe
from eightfold.scheme import SCHEMES, QuantType

_KEYS = tuple(field.name for field in fields(Recipe))
_TYPE_NAMES = {**SCHEMES, "float": QuantType.FLOAT}
_NAMES = {kind: name for name, kind in _TYPE_NAMES.items()}


def read_recipe(path: Path) -> dict[str, Any]:
    """Read a recipe file; return its choices as Recipe's arguments, so that a command line can change some.

    Raises:
        InputError: unreadable, no YAML, or no mapping.
        ConfigError: an unknown key, or a value of the wrong kind.
    """
    try:
        import yaml
    except ImportError:
        raise DependencyError(
            "--recipe needs PyYAML", got="none installed", action="Install it: pip install 'eightfold[quantize]'"
        ) from None
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}", action="Check the path.") from None
    except (ValueError, yaml.YAMLError) as error:  # UnicodeDecodeError, and dates that do not exist
        raise InputError("recipe", where=path, got=f"no YAML ({error})", expected="keys and values") from None
    if not isinstance(content, dict):
        raise InputError("recipe", where=path, got=type(content).__name__, expected="keys and values")
    return {key: _value(str(key), value, path) for key, value in content.items()}


def make_recipe(choices: dict[str, Any], where: str = "recipe") -> Recipe:
    """Return the recipe of checked choices.

    Raises:
        ConfigError: no scheme, a value of the wrong kind, or choices that exclude each other.
    """
    if "scheme" not in choices:
        raise ConfigError("--scheme", got="none", expected=one_of(SCHEMES), action="Give it, or a --recipe that does.")
    try:
        return TypeAdapter(Recipe).validate_python(choices)
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(
            ".".join(map(str, first["loc"][:1])), where=where, got=repr(first["input"]), expected=_expected(first)
        ) from None


def recipe_content(recipe: Recipe) -> dict[str, Any]:
    """Return a recipe as plain values, by the names of the file."""
    content: dict[str, Any] = {}
    for name in _KEYS:
        value = getattr(recipe, name)
        if name == "modules":
            value = {pattern: _NAMES[kind] for pattern, kind in value}
        elif isinstance(value, QuantType):
            value = _NAMES[value]
        elif isinstance(value, Enum):
            value = value.value
        content[name] = list(value) if isinstance(value, tuple) else value
    return content


def render_recipe(recipe: Recipe) -> str:
    """Return the text of a recipe file that says what a recipe says."""
    import yaml

    text: str = yaml.safe_dump(recipe_content(recipe), sort_keys=False, allow_unicode=True)
    return text


def _value(key: str, value: Any, where: Path) -> Any:
    if key not in _KEYS:
        near = difflib.get_close_matches(key, _KEYS, n=1, cutoff=0.5)
        raise ConfigError(
            f"key {key!r}",
            where=where,
            got="a key that recipes do not have",
            expected=f"{near[0]!r}" if near else one_of(_KEYS),
        )
    if key == "scheme":
        return _type(value, "scheme", where, SCHEMES)
    if key == "modules":
        if not isinstance(value, dict):
            raise ConfigError("modules", where=where, got=repr(value), expected="pattern: type")
        return tuple((str(pattern), _type(name, "modules", where, _TYPE_NAMES)) for pattern, name in value.items())
    if key == "disable_level" and isinstance(value, str):
        return parse_level(value)
    if key == "act_method":
        return act_method_name(value)
    return tuple(value) if isinstance(value, list) else value


def _type(name: Any, key: str, where: Path, known: dict[str, QuantType]) -> QuantType:
    if not isinstance(name, str) or name not in known:
        raise ConfigError(key, where=where, got=repr(name), expected=one_of(known))
    return known[name]


def parse_level(text: str) -> int:
    """Return the n of `Ln`.

    Raises:
        ConfigError: anything else.
    """
    digits = text[1:] if text[:1] in ("L", "l") else ""
    if not (digits.isascii() and digits.isdigit() and len(digits) < 10):
        raise ConfigError("--disable-level", got=repr(text), expected="L0, L1, L2, ...: so many linears stay float")
    return int(digits)


def act_method_name(value: Any) -> Any:
    """Return an activation method's name; msModelSlim's numbers are understood."""
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        return value
    return {"1": "minmax", "2": "histogram", "3": "auto"}.get(str(value), value)


def _expected(problem: Any) -> str:
    message = str(problem["msg"])
    return message.removeprefix("Input should be ").removeprefix("a valid ")
