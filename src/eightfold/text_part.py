"""What config.json says of a text model that is a part of a larger one, which sees images too."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eightfold.architectures import Family
from eightfold.errors import ConfigError, UnsupportedError, one_of
from eightfold.values import shorten, shown

SECTIONS = ("mrope_section", "mrope_interleaved")


def text_part(raw: Mapping[str, Any], family: Family, where: Path) -> Mapping[str, Any]:
    """Return what a file says of the text model; of a wrapper that is a part of it, in older files all of it.

    Raises:
        ConfigError: `text_config` is no object.
        UnsupportedError: its text model is of another family.
    """
    inner = raw.get("text_config") if family.is_wrapper else None
    if inner is None:
        return raw
    if not isinstance(inner, dict):
        raise ConfigError('"text_config"', where=where, got=shown(inner), expected="an object")
    if inner.get("model_type") not in (None, *family.text_types):
        what, got = '"model_type" of text_config', shorten(str(inner["model_type"]))
        raise UnsupportedError(what, where=where, got=got, expected=one_of(family.text_types))
    outer = {key: raw[key] for key in ("torch_dtype", "dtype") if raw.get(key) is not None}
    inner = {key: value for key, value in inner.items() if not outer or key not in ("torch_dtype", "dtype")}
    is_tied = [part["tie_word_embeddings"] for part in (raw, inner) if part.get("tie_word_embeddings") is not None]
    # Files of before transformers 5 say it inside, and the class of the whole then writes its own default outside.
    tied = {"tie_word_embeddings": next((tied for tied in is_tied if tied), is_tied[0])} if is_tied else {}
    return {**inner, **outer, **tied}


def without_sections(raw: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """Return a wrapper's settings without what distinguishes time, height and width, which are one in a text."""
    out = dict(raw)
    for key in ("rope_scaling", "rope_parameters"):
        if family.is_wrapper and isinstance(raw.get(key), dict):
            rope = {name: value for name, value in raw[key].items() if name not in SECTIONS}
            out[key] = {name: "default" if value == "mrope" else value for name, value in rope.items()}
    return out
