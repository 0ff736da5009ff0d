"""Models of known families that this program does not read: those without an engine, and stacked experts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from eightfold.architectures import KNOWN
from eightfold.config import has_engine, has_experts
from eightfold.errors import EightfoldError, UnsupportedError, shortlist
from eightfold.format.directory import CONFIG_NAME
from eightfold.format.safetensors import TensorInfo
from eightfold.layouts import EXPERTS_PART, Layout, engine_names, known, layout_of
from eightfold.values import shorten


def require_engine(raw: Mapping[str, Any], directory: Path, *, is_quantized: bool) -> None:
    """Refuse a model of a family that this program quantizes and does not run.

    Raises:
        UnsupportedError: it is one; the engines that run it are named.
    """
    row = elsewhere(raw, is_quantized=is_quantized)
    if row is None:
        return
    name = shorten(raw["architectures"][0], 200)
    got, action = f"a {name}, which runs in other engines ({engine_names(row)})", "quantizes it for these"
    if is_quantized:
        got, action = f"an 8-bit {name}, which was made for other engines ({engine_names(row)})", "checks it"
    raise UnsupportedError(
        "model",
        where=directory,
        got=got,
        expected=KNOWN,
        action=f"eightfold {action}, and does not run it.",
    )


def elsewhere(raw: Mapping[str, Any], *, is_quantized: bool) -> Layout | None:
    """Return the row of a family that this program quantizes and does not run; None for any other."""
    return None if has_engine(raw) else _row(raw, is_quantized=is_quantized)


def _row(raw: Mapping[str, Any], *, is_quantized: bool) -> Layout | None:
    """Return the row of a family; for an 8-bit model that of any, as quantizing takes any."""
    named = raw.get("architectures")
    if is_quantized and isinstance(named, list) and len(named) == 1 and isinstance(named[0], str):
        return layout_of(raw, Path(CONFIG_NAME), is_generic=True)
    return known(raw)


def explain_stacked(raw: Mapping[str, Any], directory: Path, tensors: Iterable[TensorInfo]) -> EightfoldError | None:
    """Return what to say of a model whose experts lie in one tensor; None where they are not the reason."""
    found = [info.name for info in tensors if len(info.shape) == 3 and EXPERTS_PART in info.name.split(".")]
    if not found or not has_experts(raw):
        return None
    return UnsupportedError(
        "experts",
        where=directory,
        got=f"all of a layer in one tensor ({shortlist(found, 2)})",
        expected="a matrix for each",
        action="`eightfold quantize --scheme w8a8-dynamic` takes them apart; so does transformers' save_pretrained().",
    )
