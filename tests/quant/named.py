"""Directories of any family for tests: quantized by the names of their tensors, read, changed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from eightfold.errors import EightfoldError
from eightfold.format.description import read_description
from eightfold.quant.by_name import quantize_by_name
from eightfold.quant.name_plan import plan_by_name
from eightfold.quant.recipe import Recipe
from eightfold.scheme import QuantType

DYNAMIC, W8A16 = QuantType.W8A8_DYNAMIC, QuantType.W8A16


def quantize(source: Path, target: Path, scheme: QuantType = DYNAMIC, *, generic: bool = False, **options):
    recipe = Recipe(scheme, **{key: options.pop(key) for key in ("keep_float", "modules") if key in options})
    return quantize_by_name(plan_by_name(source, recipe, is_generic=generic), target, **options)


def refusal(source: Path, **options) -> str:
    with pytest.raises(EightfoldError) as error:
        quantize(source, source.parent / "out", **options)
    assert not (source.parent / "out").exists()
    return str(error.value).replace(f"{source}/", "").replace(str(source), "DIR")


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in path.glob("*.safetensors") for name, tensor in load_file(file).items()}


def tags_of(path: Path) -> dict[str, str]:
    return dict(read_description(path / "quant_model_description.json").tags)


def save(path: Path, tensors: dict[str, torch.Tensor], config: Mapping[str, object], parts: int = 1) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    for file in path.glob("*.safetensors*"):
        file.unlink()
    names = sorted(tensors)
    weight_map = {}
    for part in range(parts):
        name = "model.safetensors" if parts == 1 else f"model-{part + 1:05d}-of-{parts:05d}.safetensors"
        own = {key: tensors[key].clone().contiguous() for key in names[part::parts]}
        save_file(own, path / name)
        weight_map.update(dict.fromkeys(own, name))
    if parts > 1:
        (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (path / "config.json").write_text(json.dumps(config))
    return path


def config_of(path: Path) -> dict[str, object]:
    content: dict[str, object] = json.loads((path / "config.json").read_text())
    return content


def change(path: Path, changes: dict[str, torch.Tensor | None]) -> Path:
    """Replace, add or remove tensors of a model."""
    tensors = {**tensors_of(path), **changes}
    return save(path, {name: tensor for name, tensor in tensors.items() if tensor is not None}, config_of(path))
