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

from eightfold.errors import ConfigError, DependencyError, InputError, OutputError, one_of
from eightfold.files import read_text, write_whole
from eightfold.quant.recipe import ActMethod, AntiOutlier, KVObserve, ModelDType, Recipe, Target
from eightfold.scheme import SCHEMES, QuantType
from eightfold.values import SWITCH, TEXT, WHOLE, Kind, shorten, shown

if TYPE_CHECKING:
    import yaml

# Of a file, and of what stands in it: beyond what any model needs.
_MOST_BYTES, _MOST_VALUES, _MOST_CHARACTERS, _MOST_DEPTH = 1 << 20, 20_000, 1000, 8

_KEYS = tuple(field.name for field in fields(Recipe))
_PLAIN = {"bool": SWITCH, "int": WHOLE}
_KINDS = {
    **{field.name: _PLAIN[str(field.type)] for field in fields(Recipe) if field.type in _PLAIN},
    "disable_level": WHOLE._replace(name="a whole number or Ln"),
    "keep_float": Kind((list,), "a list of patterns, such as ['*.down_proj']", each=TEXT),
}
_METHODS: dict[str, type[Enum]] = {
    "target": Target,
    "anti_outlier": AntiOutlier,
    "act_method": ActMethod,
    "kv_observe": KVObserve,
    "dtype": ModelDType,
}
_MAY_BE_NONE = ("target", "anti_outlier", "dtype")
_TYPE_NAMES = {**SCHEMES, "float": QuantType.FLOAT}
_NAMES = {kind: name for name, kind in _TYPE_NAMES.items()}


def read_recipe(path: Path) -> dict[str, Any]:
    """Read a recipe file; return its choices as Recipe's arguments, so that a command line can change some.

    Raises:
        InputError: unreadable, no YAML, or no mapping.
        ConfigError: an unknown key, one that stands twice, or a value of the wrong kind.
    """
    return {key: _value(key, value, path) for key, value in read_yaml(path, "recipe").items()}


def read_yaml(path: Path, what: str) -> dict[Any, Any]:
    """Read a mapping that people write, within modest limits.

    Args:
        path: the file.
        what: it is, for messages.

    Raises:
        InputError: unreadable, no YAML, or no mapping.
        ConfigError: a key stands twice.
    """
    try:
        import yaml
    except ImportError:
        raise DependencyError(
            f"a {what} file needs PyYAML", got="none installed", action="Install it: pip install 'eightfold[quantize]'"
        ) from None
    text, _ = read_text(path, what, _MOST_BYTES)
    try:
        _require_modest(text, path)
        _require_once(yaml.compose(text, yaml.SafeLoader), path)
        content = yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:  # dates that do not exist
        got = f"no YAML ({shorten(str(error), 300)})"
        raise InputError(what, where=path, got=got, expected="keys and values") from None
    if not isinstance(content, dict):
        raise InputError(what, where=path, got=type(content).__name__, expected="keys and values")
    return content


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
    if key == "anti_outlier" and value == "none":
        return None
    if key not in _METHODS or (key in _MAY_BE_NONE and value is None):
        return tuple(value) if isinstance(value, list) else value
    try:
        return _METHODS[key](value)
    except ValueError:
        known = one_of(repr(method.value) for method in _METHODS[key])
        raise ConfigError(key, where=where, got=_shown(value), expected=known) from None


def recipe_content(recipe: Recipe) -> dict[str, Any]:
    """Return a recipe as plain values, by the names of the file; a dtype stands there only if it is asked for."""
    content: dict[str, Any] = {}
    for name in _KEYS:
        value = getattr(recipe, name)
        if name == "dtype" and value is None:
            continue
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


def write_recipe(recipe: Recipe, path: Path) -> None:
    """Write a recipe file.

    Raises:
        OutputError: it cannot be written there.
    """
    try:
        write_whole(path, render_recipe(recipe).encode())
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}", action="Check the path.") from None


def _require_modest(text: str, where: Path) -> None:
    """Refuse what takes more time and memory than a recipe: a few bytes of YAML can mean gigabytes.

    Raises:
        InputError: it is beyond the limits.
    """
    import yaml

    depth = count = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        count += isinstance(event, yaml.NodeEvent)
        length = len(event.value) if isinstance(event, yaml.ScalarEvent) else 0
        limits = (
            (getattr(event, "anchor", None) is not None, "an anchor or alias (& or *)", "every value in its place"),
            (depth > _MOST_DEPTH, f"values in more than {_MOST_DEPTH} others", "key: value"),
            (count > _MOST_VALUES, f"more than {_MOST_VALUES} values", "fewer, with patterns of names"),
            (length > _MOST_CHARACTERS, f"a value of {length} characters", f"at most {_MOST_CHARACTERS}"),
        )
        for is_beyond, got, expected in limits:
            if is_beyond:
                line = event.start_mark.line + 1 if event.start_mark else 0
                raise InputError(f"line {line} of the recipe", where=where, got=got, expected=expected)


def _require_once(node: yaml.Node | None, where: Path) -> None:
    """Refuse keys that stand twice, in the file or in a value: YAML itself lets the last one win."""
    whole = _entries(node)
    for entries in (whole, *(_entries(value) for _, value in whole)):
        lines: dict[str, int] = {}
        for key, _ in entries:
            line = key.start_mark.line + 1
            name = shorten(str(key.value))
            if key.tag == "tag:yaml.org,2002:merge":
                raise ConfigError(f"key {name!r}", where=where, got="a merge of mappings", expected="keys of a recipe")
            if name in lines:
                got = f"it in line {lines[name]} and in line {line}"
                raise ConfigError(f"key {name!r}", where=where, got=got, expected="it once", action="Remove one.")
            lines[name] = line


def _entries(node: yaml.Node | None) -> list[tuple[yaml.Node, yaml.Node]]:
    """Return the keys and values of a mapping; nothing of other nodes."""
    import yaml

    return list(node.value) if isinstance(node, yaml.MappingNode) else []


def _value(key: Any, value: Any, where: Path) -> Any:
    if key not in _KEYS:
        near = difflib.get_close_matches(shown(key), _KEYS, n=1, cutoff=0.5)
        raise ConfigError(
            f"key {shown(key)}",
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
    return json.dumps(value) if value is None or isinstance(value, bool) else shown(value)


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
        raise ConfigError("disable_level", got=shown(text), expected="L0, L1, L2, ...: so many linears stay float")
    return int(digits)


def act_method_name(value: Any) -> Any:
    """Return an activation method's name; msModelSlim's numbers are understood."""
    names = {1: "minmax", 2: "histogram", 3: "auto"}
    names_by_text = {str(number): name for number, name in names.items()}
    if isinstance(value, str):
        return names_by_text.get(value, value)
    return names.get(value, value) if WHOLE.fits(value) else value
