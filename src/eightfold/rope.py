"""The rotary embedding as config.json says it: its types, what each of them has, and its two dialects.

transformers 4 writes `rope_theta` and `rope_scaling`, transformers 5 `rope_parameters`. What is computed from them
stands in model/layers.py.

Sources: transformers' modeling_rope_utils.py for the names, for what may be absent, and what that means; vLLM for how
far a model with YaRN or dynamic scaling looks back.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from eightfold.errors import ConfigError, UnsupportedError, one_of
from eightfold.values import COUNT, FLAG, POSITIVE, TEXT, Kind, checked, require, shorten, shown

MAX_SIZE = 10**9  # of anything that is counted: places in it fit 32 bits


class _Settings(NamedTuple):
    """What a rope type consists of, besides the base."""

    needed: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()


_OLD_CONTEXT = "original_max_position_embeddings"
_PART = "partial_rotary_factor"
LOCAL_BASE = "rope_local_base_freq"
_TYPES = {
    "default": _Settings(),
    "linear": _Settings(("factor",)),
    "dynamic": _Settings(("factor",)),
    "yarn": _Settings(
        ("factor", _OLD_CONTEXT),
        ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    ),
    "longrope": _Settings(("short_factor", "long_factor", _OLD_CONTEXT), ("factor", "attention_factor")),
    "llama3": _Settings(("factor", "low_freq_factor", "high_freq_factor", _OLD_CONTEXT)),
}
_OLD_NAMES = {"su": "longrope"}  # as in the first files of Phi-3
_STRETCHES_ONLY = ("dynamic", "yarn", "longrope")  # a factor below 1 means nothing in them


@dataclass(frozen=True)
class RopeParameters:
    """Rotary embedding: base and, for long contexts, how frequencies are stretched.

    Attributes:
        rope_theta: the base.
        rope_type: one of transformers' names.
        factor: how many times longer contexts become; of longrope, max_position_embeddings / the original ones where
            the file does not say it.
        original_max_position_embeddings: the context before that; of dynamic, max_position_embeddings.
        attention_factor: what cosines and sines are multiplied by; None: what follows from the others.
        beta_fast: YaRN keeps frequencies that turn at least so often in the original context,
        beta_slow: and stretches by the whole factor those that turn at most so often.
        mscale: with the next, YaRN's attention_factor where that is None; 0: not said.
        mscale_all_dim: see there.
        truncate: whether YaRN rounds the places between which it blends to whole pairs of channels.
        short_factor: longrope's divisor of each frequency up to the original context, (D/2,).
        long_factor: the same beyond.
    """

    rope_theta: float = 10000.0
    rope_type: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    truncate: bool = True
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()

    def context(self, max_position_embeddings: int) -> int:
        """Return the longest sequence unless more is asked for: YaRN's is in its own settings."""
        return self.reach(max_position_embeddings) if self.rope_type == "yarn" else max_position_embeddings

    def reach(self, max_position_embeddings: int) -> int:
        """Return the longest sequence that may be asked for."""
        if self.rope_type in ("yarn", "dynamic"):
            return int(self.original_max_position_embeddings * self.factor)
        return max_position_embeddings


# What float32 can hold, and its reciprocal and square too.
_NUMBER = POSITIVE._replace(least=1e-15, most=1e15)
_BASE = _NUMBER._replace(name="a number")
_SMALL = POSITIVE._replace(least=1e-3, most=1e3)  # twice in every score
_SHARE = Kind((int, float), "a number above 0 and up to 1", above=0, most=1, outside="a number above 0 and up to 1")
_PAIRS = Kind((list, tuple), "a list of numbers", each=_NUMBER)
_FIELDS = {
    "rope_type": TEXT,
    "factor": _NUMBER,
    "low_freq_factor": _NUMBER,
    "high_freq_factor": _NUMBER,
    _OLD_CONTEXT: COUNT._replace(most=MAX_SIZE),
    "attention_factor": _SMALL,
    "beta_fast": _NUMBER,
    "beta_slow": _NUMBER,
    "mscale": Kind((int, float), "a valid number", least=0, most=1e3),
    "mscale_all_dim": Kind((int, float), "a valid number", least=0, most=1e3),
    "truncate": FLAG,
    "short_factor": _PAIRS,
    "long_factor": _PAIRS,
}


def read_rope(raw: Mapping[str, Any], where: Path, theta: float = RopeParameters.rope_theta) -> RopeParameters:
    """Read the rotary embedding: what a file says of it is obeyed, or refused.

    Args:
        raw: config.json, or the part of it that is the text model's.
        where: the file, for messages.
        theta: the base, where the file names none.

    Raises:
        ConfigError: a value is missing or wrong, or the two dialects contradict each other.
        UnsupportedError: a type that is not implemented, or a setting that its type does not have.
    """
    said = _said(raw, where)
    bases = {"rope_theta": raw.get("rope_theta")}
    bases.update({f"{key}.rope_theta": rope.pop("rope_theta", None) for key, rope in said.items()})
    thetas = {name: require(_BASE, value, name, where) for name, value in bases.items() if value is not None}
    _require_agreement(thetas, "the same base", where)
    _require_agreement(said, "the same scaling", where)
    rope = RopeParameters(**next(iter(said.values()), {}))
    return replace(rope, rope_theta=next(iter(thetas.values()), theta))


def read_rotary_part(raw: Mapping[str, Any], default: float | None, where: Path) -> float:
    """Read how much of a head is turned.

    Args:
        raw: config.json, or the part of it that is the text model's.
        default: where the file does not say; None: all of it, and nothing else is taken.
        where: the file, for messages.

    Raises:
        ConfigError: it is no part, or two places of the file contradict each other.
        UnsupportedError: less than the whole, in a family that turns it.
    """
    places = {"": raw, **{f"{key}.": raw.get(key) for key in ("rope_scaling", "rope_parameters")}}
    found = {
        f"{at}{_PART}": place[_PART]
        for at, place in places.items()
        if isinstance(place, Mapping) and place.get(_PART) is not None
    }
    for name, part in found.items():
        if default is None and part != 1:
            raise UnsupportedError(f'"{name}"', where=where, got=shown(part), expected="1")
    parts = {name: require(_SHARE, part, name, where) for name, part in found.items()}
    _require_agreement(parts, "the same part", where)
    return next(iter(parts.values()), 1.0 if default is None else default)


def by_layer_type(raw: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what a file says of the rotary embedding of full and of sliding layers, each as files say it of all.

    transformers 5 has settings for each type of layer, 4 a base for the layers that slide, which are never stretched.
    """
    said = raw.get("rope_parameters")
    nested = said if isinstance(said, Mapping) and isinstance(said.get("full_attention"), Mapping) else {}
    full = {**raw, "rope_parameters": nested["full_attention"]} if nested else dict(raw)
    return full, {"rope_theta": raw.get(LOCAL_BASE), "rope_parameters": nested.get("sliding_attention")}


def fit_rope(rope: RopeParameters, rotary_dim: int, max_position_embeddings: int, where: Path) -> RopeParameters:
    """Return the settings with what follows from the rest of a file, once they fit it.

    Args:
        rope: as read.
        rotary_dim: channels of a head that are turned.
        max_position_embeddings: of the file.
        where: the file, for messages.

    Raises:
        ConfigError: they do not fit the heads or the context, or cannot be computed.
    """
    if rope.rope_type == "dynamic":
        if rotary_dim < 4:
            raise ConfigError('"head_dim"', where=where, got=rotary_dim, expected="at least 4, for rope type dynamic")
        rope = replace(rope, original_max_position_embeddings=max_position_embeddings)
    if rope.rope_type == "yarn" and rope.rope_theta <= 1:
        raise ConfigError(
            '"rope_theta"', where=where, got=f"{rope.rope_theta:g}", expected="more than 1, for rope type yarn"
        )
    if rope.rope_type == "longrope":
        rope = _fit_longrope(rope, rotary_dim, max_position_embeddings, where)
    if rope.reach(max_position_embeddings) > MAX_SIZE:
        got = f"{rope.factor:g} times {rope.original_max_position_embeddings} positions"
        raise ConfigError('"factor"', where=where, got=got, expected=f"at most {MAX_SIZE} positions")
    return rope


def _fit_longrope(rope: RopeParameters, rotary_dim: int, context: int, where: Path) -> RopeParameters:
    for name in ("short_factor", "long_factor"):
        if len(found := getattr(rope, name)) != rotary_dim // 2:
            expected = f"{rotary_dim // 2}, one for each pair of a head's channels"
            raise ConfigError(f'"{name}"', where=where, got=f"{len(found)} numbers", expected=expected)
    original = rope.original_max_position_embeddings
    if original < 2:
        raise ConfigError(f'"{_OLD_CONTEXT}"', where=where, got=original, expected="at least 2, for rope type longrope")
    return replace(rope, factor=context / original) if rope.factor == _NOT_SAID else rope


_NOT_SAID = 0.0  # of a factor, until it is known


def _said(raw: Mapping[str, Any], where: Path) -> dict[str, dict[str, Any]]:
    """Return what each dialect says, where it says anything."""
    dialects = {key: _settings(raw, key, where) for key in ("rope_scaling", "rope_parameters")}
    return {key: rope for key, rope in dialects.items() if rope is not None}


def _require_agreement(said: Mapping[str, Any], expected: str, where: Path) -> None:
    """Compare what several keys of a file say of one thing.

    Raises:
        ConfigError: they contradict each other.
    """
    for one, other in itertools.pairwise(said):
        if said[one] != said[other]:
            values = [f"{value:g}" if isinstance(value, float) else str(value) for value in (said[one], said[other])]
            got = " and ".join(shorten(value, 140) for value in values)
            what = f'"{one}" and "{other}"'
            raise ConfigError(what, where=where, got=got, expected=expected, action="Remove the wrong one.")


def _settings(raw: Mapping[str, Any], key: str, where: Path) -> dict[str, Any] | None:
    """Return one dialect's rope settings, with a `rope_type`; None where the file does not have them.

    Raises:
        ConfigError: something that the type needs is absent, or the type itself.
        UnsupportedError: an unknown type, settings by the type of layer, or some that the type does not have.
    """
    value = raw.get(key)
    if value is None:
        return None
    if not isinstance(value, dict):
        raise ConfigError(f'"{key}"', where=where, got=shown(value), expected="an object or null")
    rope = {name: setting for name, setting in value.items() if setting is not None}
    nested = [name for name, setting in rope.items() if isinstance(setting, dict)]
    if nested:
        got = f"settings for {shorten(', '.join(nested), 200)}"
        raise UnsupportedError(f'"{key}"', where=where, got=got, expected="the same for all layers")
    kind = _take_type(rope, key, where)
    needed, optional = _TYPES[kind]
    if _OLD_CONTEXT in needed:
        _take_old_context(rope, raw.get(_OLD_CONTEXT), key, where)
    absent = [name for name in needed if name not in rope]
    if absent:
        expected = "a list of numbers" if absent[0] in ("short_factor", "long_factor") else "a number"
        raise ConfigError(f"rope scaling {kind}", where=where, got=f"no {', '.join(absent)}", expected=expected)
    unread = [name for name in rope if name not in ("rope_type", "rope_theta", *needed, *optional)]
    if unread:
        raise UnsupportedError(
            f'"{key}"',
            where=where,
            got=shorten(", ".join(unread), 200),
            expected=f"{', '.join(('rope_type', 'rope_theta', *needed, *optional))}, which are all that {kind} has",
        )
    rope.update(checked({**rope, "rope_type": kind}, _FIELDS, where))
    _require_order(rope, kind, where)
    if kind == "longrope":
        rope.setdefault("factor", _NOT_SAID)
        rope.update({name: tuple(map(float, rope[name])) for name in ("short_factor", "long_factor")})
    return rope


def _take_type(rope: dict[str, Any], key: str, where: Path) -> str:
    """Return the type that settings name by either key, of which `rope_type` is left."""
    old_name, new_name = rope.pop("type", None), rope.get("rope_type")
    if None not in (old_name, new_name) and old_name != new_name:
        got = f"{shown(old_name)} and {shown(new_name)}"
        raise ConfigError(f'"type" and "rope_type" of {key}', where=where, got=got, expected="one")
    kind = old_name if new_name is None else new_name
    rope.pop(_PART, None)  # see read_rotary_part
    others = [name for name in rope if name not in ("rope_type", "rope_theta")]
    if kind is None and others:
        got = f"{shorten(', '.join(others), 200)} without a rope_type"
        raise ConfigError(f'"{key}"', where=where, got=got, expected=f"one of {one_of(_TYPES)}")
    kind = _OLD_NAMES.get(kind, kind) if isinstance(kind, str) else "default" if kind is None else kind
    if not isinstance(kind, str) or kind not in _TYPES:
        raise UnsupportedError(
            "rope type", where=where, got=shorten(str(kind)) or "an empty text", expected=one_of(_TYPES)
        )
    return kind


def _take_old_context(rope: dict[str, Any], beside: Any, key: str, where: Path) -> None:
    """Let settings have the original context, which some files say beside them; transformers prefers that place."""
    if beside is None:
        return
    if rope.setdefault(_OLD_CONTEXT, beside) != beside:
        what, got = f'"{_OLD_CONTEXT}"', f"{shown(beside)}, and {shown(rope[_OLD_CONTEXT])} in {key}"
        raise ConfigError(what, where=where, got=got, expected="the same", action="Remove the wrong one.")


def _require_order(rope: Mapping[str, Any], kind: str, where: Path) -> None:
    """Check the settings that have to be greater than others."""
    if kind in _STRETCHES_ONLY and (factor := rope.get("factor", 1)) < 1:
        raise ConfigError('"factor"', where=where, got=f"{factor:g}", expected=f"at least 1, for rope type {kind}")
    if kind == "llama3" and rope["low_freq_factor"] >= rope["high_freq_factor"]:
        expected = f"more than low_freq_factor {rope['low_freq_factor']:g}"
        raise ConfigError('"high_freq_factor"', where=where, got=f"{rope['high_freq_factor']:g}", expected=expected)
    fast, slow = (rope.get(name, getattr(RopeParameters, name)) for name in ("beta_fast", "beta_slow"))
    if fast < slow:
        raise ConfigError('"beta_fast"', where=where, got=f"{fast:g}", expected=f"at least beta_slow, {slow:g}")


def in_both_dialects(raw: Mapping[str, Any], rope: RopeParameters, where: Path) -> dict[str, Any]:
    """Return `rope_theta`, `rope_scaling` and `rope_parameters` of a file whose settings have been read before."""
    said = next(iter(_said(raw, where).values()), {"rope_type": "default"})
    absent = ("factor",) if said.get("factor") == _NOT_SAID else ()
    known = ("rope_type", *itertools.chain(*_TYPES[rope.rope_type]))
    settings = {name: said[name] for name in known if name in said and name not in absent}
    settings = {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}
    return {
        "rope_theta": rope.rope_theta,
        "rope_scaling": _old_scaling(settings, raw.get("rope_scaling") or {}),
        "rope_parameters": {"rope_theta": rope.rope_theta, **settings},
    }


def _old_scaling(settings: dict[str, Any], said: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return `rope_scaling` by the names that all its readers take.

    Linear scaling is older than `rope_type`: MindIE refuses it by that name, transformers 4 and vLLM take `type` too.
    Where the file names a newer type, its own keys for it are kept; where it has none, MindIE reads longrope under
    `type` only, and the others under either.
    """
    kind, others = settings["rope_type"], {name: value for name, value in settings.items() if name != "rope_type"}
    if kind == "default":
        return None
    if kind == "llama3":
        return settings
    names = [name for name in ("type", "rope_type") if said.get(name) is not None and kind != "linear"]
    if not names:
        names = ["type", "rope_type"] if kind in ("yarn", "dynamic") else ["type"]
    return {**dict.fromkeys(names, kind), **others}
