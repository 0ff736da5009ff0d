"""A recipe as a YAML file: the options of a command line, and a type for each pattern of module names.

scheme: w8a8
anti_outlier: m4
modules:
  "*.down_proj": w8a8-dynamic        # the last pattern that matches wins
  "model.layers.0.*": float

It is read strictly: no key stands twice, and no value is taken for one of another kind.
"""

from __future__ import annotations

import difflib
import json
from dataclasses import fields
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eightfold.errors import ConfigError, DependencyError, InputError, one_of
from eightfold.quant.recipe import ActMethod, AntiOutlier, KVObserve, Recipe
from eightfold.scheme import SCHEMES, QuantType
from eightfold.values import SWITCH, TEXT, WHOLE, Kind

if TYPE_CHECKING:
    import yaml

_KEYS = tuple(field.name for field in fields(Recipe))
_PLAIN = {"bool": SWITCH, "int": WHOLE}
_KINDS = {
    **{field.name: _PLAIN[str(field.type)] for field in fields(Recipe) if field.type in _PLAIN},
    "disable_level": WHOLE._replace(name="a whole number or Ln"),
    "keep_float": Kind((list,), "a list of patterns, such as ['*.down_proj']", each=TEXT),
}
_METHODS: dict[str, type[Enum]] = {"anti_outlier": AntiOutlier, "act_method": ActMethod, "kv_observe": KVObserve}
_TYPE_NAMES = {**SCHEMES, "float": QuantType.FLOAT}
_NAMES = {kind: name for name, kind in _TYPE_NAMES.items()}


def read_recipe(path: Path) -> dict[str, Any]:
    """Read a recipe file; return its choices as Recipe's arguments, so that a command line can change some.

    Raises:
        InputError: unreadable, no YAML, or no mapping.
        ConfigError: an unknown key, one that stands twice, or a value of the wrong kind.
    """
    try:
        import yaml
    except ImportError:
        raise DependencyError(
            "a recipe file needs PyYAML", got="none installed", action="Install it: pip install 'eightfold[quantize]'"
        ) from None
    try:
        text = path.read_text(encoding="utf-8")
        _require_once(yaml.compose(text, yaml.SafeLoader), path)
        content = yaml.safe_load(text)
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
        raise ConfigError(
            "scheme", got="none", expected=one_of(SCHEMES), action="Give it, or a `recipe_file` that does."
        )
    return Recipe(**{key: _method(key, value, where) for key, value in choices.items()})


def _method(key: str, value: Any, where: str) -> Any:
    """Return the method that a name means; lists of patterns as tuples, and other values as they are."""
    if key not in _METHODS or (key == "anti_outlier" and value is None):
        return tuple(value) if isinstance(value, list) else value
    try:
        return _METHODS[key](value)
    except ValueError:
        known = one_of(repr(method.value) for method in _METHODS[key])
        raise ConfigError(key, where=where, got=_shown(value), expected=known) from None


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


def _require_once(node: yaml.Node | None, where: Path) -> None:
    """Refuse keys that stand twice, in the file or in a value: YAML itself lets the last one win."""
    whole = _entries(node)
    for entries in (whole, *(_entries(value) for _, value in whole)):
        lines: dict[str, int] = {}
        for key, _ in entries:
            line = key.start_mark.line + 1
            name = str(key.value)
            if name in lines:
                got = f"it in line {lines[name]} and in line {line}"
                raise ConfigError(f"key {name!r}", where=where, got=got, expected="it once", action="Remove one.")
            lines[name] = line


def _entries(node: yaml.Node | None) -> list[tuple[yaml.Node, yaml.Node]]:
    """Return the keys and values of a mapping; nothing of other nodes."""
    import yaml

    return list(node.value) if isinstance(node, yaml.MappingNode) else []


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
        if not (isinstance(value, dict) and all(isinstance(pattern, str) for pattern in value)):
            raise ConfigError("modules", where=where, got=_shown(value), expected="pattern: type")
        return tuple((pattern, _type(name, "modules", where, _TYPE_NAMES)) for pattern, name in value.items())
    if key == "disable_level" and isinstance(value, str):
        return parse_level(value)
    if key == "act_method":
        return act_method_name(value)
    if key in _KINDS and not _KINDS[key].fits(value):
        raise ConfigError(key, where=where, got=_shown(value), expected=_KINDS[key].name)
    return value  # names of methods are looked up by make_recipe


def _shown(value: Any) -> str:
    """Return a value as a recipe spells it, as far as Python spells it otherwise."""
    return json.dumps(value) if value is None or isinstance(value, bool) else repr(value)


def _type(name: Any, key: str, where: Path, known: dict[str, QuantType]) -> QuantType:
    if not isinstance(name, str) or name not in known:
        raise ConfigError(key, where=where, got=_shown(name), expected=one_of(known))
    return known[name]


def parse_level(text: str) -> int:
    """Return the n of `Ln`.

    Raises:
        ConfigError: anything else.
    """
    digits = text[1:] if text[:1] in ("L", "l") else ""
    if not (digits.isascii() and digits.isdigit() and len(digits) < 10):
        raise ConfigError("disable_level", got=repr(text), expected="L0, L1, L2, ...: so many linears stay float")
    return int(digits)


def act_method_name(value: Any) -> Any:
    """Return an activation method's name; msModelSlim's numbers are understood."""
    is_number = WHOLE.fits(value) or isinstance(value, str)
    return {"1": "minmax", "2": "histogram", "3": "auto"}.get(str(value), value) if is_number else value
