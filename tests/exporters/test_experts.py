"""convert of mixtures of experts: what lies in a directory stays, what loaders look up is made, the rest is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from eightfold.check import by_name
from eightfold.errors import UnsupportedError
from eightfold.exporters import ExportOptions, plan_export
from eightfold.format.checkpoint import Checkpoint
from eightfold.format.named import NamedDirectory
from eightfold.progress import silent
from eightfold.quant.by_name import quantize_by_name
from eightfold.quant.name_plan import plan_by_name
from eightfold.quant.recipe import Recipe
from eightfold.scheme import QuantType
from tests.conftest import write_tokenizer
from tests.quant.families import save_random

DYNAMIC, W8A16 = QuantType.W8A8_DYNAMIC, QuantType.W8A16
LOADERS = ("vllm-ascend", "mindie")
EXPERT = "model.layers.0.mlp.experts.0.up_proj"


def made(folder: Path, family: str, **options: Any) -> Path:
    source = save_random(family, folder / "float")
    write_tokenizer(source)
    quantize_by_name(plan_by_name(source, Recipe(DYNAMIC, **options)), folder / "out")
    return folder / "out"


def convert(source: Path, target: Path, loader: str) -> list[str]:
    plan = plan_export(source, loader, ExportOptions(), lossy=False)
    plan.write(target, overwrite=False, progress=silent)
    assert by_name.check(NamedDirectory.open(target), loader).verdict.is_harmless
    Checkpoint.open(target).require_whole()
    return list(plan.notes)


def tensors(path: Path) -> dict[str, Any]:
    return load_file(next(path.glob("*.safetensors")))


def contents(path: Path) -> tuple[Any, Any]:
    return tuple(json.loads((path / name).read_text()) for name in ("config.json", "quant_model_description.json"))


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("family", ["Qwen3Moe", "Qwen2Moe", "Mixtral"])
def test_a_mixture_without_faults_stays_as_it_is(tmp_path, family, loader):
    out = made(tmp_path, family)
    assert convert(out, tmp_path / "new", loader) == ["nothing has to be repaired."]
    before, after = tensors(out), tensors(tmp_path / "new")
    assert before.keys() == after.keys()
    assert all(before[name].dtype == value.dtype and before[name].equal(value) for name, value in after.items())
    assert contents(tmp_path / "new") == contents(out)


@pytest.mark.parametrize("loader", LOADERS)
def test_what_a_mixture_lacks_is_made(tmp_path, loader):
    out = made(tmp_path, "Qwen2Moe")
    config, description = contents(out)
    (out / "config.json").write_text(json.dumps({key: value for key, value in config.items() if "quantize" not in key}))
    left = {key: value for key, value in description.items() if key.endswith("_proj.weight")}
    (out / "quant_model_description.json").rename(out / "quant_model_description_w8a8_dynamic.json")
    (out / "quant_model_description_w8a8_dynamic.json").write_text(json.dumps(left))
    file = next(out.glob("*.safetensors"))
    stored = {name: value for name, value in tensors(out).items() if not name.endswith("weight_offset")}
    file.chmod(0o600)
    save_file(stored, file)
    (out / "eightfold_journal.jsonl").unlink()
    notes = convert(out, tmp_path / "new", loader)
    assert any(note.startswith("config.json says these anew: ") for note in notes)
    assert contents(tmp_path / "new") == (config, description)
    assert f"{EXPERT}.weight_offset" in tensors(tmp_path / "new")


def test_experts_of_types_that_a_loader_lacks_are_named(tmp_path):
    out = made(tmp_path, "Qwen3Moe", modules=(("*.layers.1.mlp.experts.*", W8A16),))
    with pytest.raises(UnsupportedError, match=r"layers.1.mlp.experts in .*: got W8A16, expected one in a layer"):
        convert(out, tmp_path / "new", "vllm-ascend")
    out = made(tmp_path / "mixed", "Qwen3Moe", keep_float=("*.layers.1.mlp.experts.1.*",))
    with pytest.raises(UnsupportedError, match=r"layers.1.mlp.experts in .*: got FLOAT and W8A8_DYNAMIC, exp"):
        convert(out, tmp_path / "new", "mindie")
    assert not (tmp_path / "new").exists()
