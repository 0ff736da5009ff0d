"""Dense families that differ from Llama: every recipe gives a model that this program reads and that stays close."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file

from eightfold.check.by_name import check
from eightfold.errors import UnsupportedError
from eightfold.files import read_json, write_json
from eightfold.format.checkpoint import Checkpoint
from eightfold.format.named import NamedDirectory
from eightfold.model.reference.load import Decoder
from eightfold.quant.by_name import quantize_by_name
from eightfold.quant.name_plan import plan_by_name
from eightfold.quant.pipeline import quantize_checkpoint
from eightfold.quant.recipe import AntiOutlier, Recipe
from eightfold.scheme import QuantType
from tests.conftest import tiny_config, token_samples, write_model

transformers = pytest.importorskip("transformers")

from tests.reference import dense_models  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = ("phi3", "glm4", "granite", "olmo2", "gemma2", "gemma3-wrapped", "internlm2")
SAMPLES = token_samples(4)
DYNAMIC, W8A8, W8A16 = QuantType.W8A8_DYNAMIC, QuantType.W8A8, QuantType.W8A16
MOST_DIFFERENT = ("phi3", "gemma3-wrapped", "internlm2")
RECIPES = {
    "dynamic": Recipe(DYNAMIC),
    "w8a16": Recipe(W8A16),
    "static": Recipe(W8A8),
    "m2": Recipe(W8A8, anti_outlier=AntiOutlier.M2),
    "m4": Recipe(W8A8, anti_outlier=AntiOutlier.M4, kv_int8=True),
    "smooth": Recipe(W8A8, anti_outlier=AntiOutlier.SMOOTH),
    "faquant": Recipe(W8A8, fa_quant=True),
    "mix": Recipe(QuantType.W8A8_MIX, kv_int8=True),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder, made = tmp_path_factory.mktemp("models"), {}
    for name in NAMES[:-1]:
        made[name] = dense_models.save(dense_models.make(name).to(torch.bfloat16), folder / name)
    llama = write_model(folder / "llama", tiny_config(attention_bias=False), tokenizer=False)
    made["internlm2"] = dense_models.relaid_as_internlm2(llama, folder / "internlm2")
    return made


def logits(directory):
    return Decoder(Checkpoint.open(directory)).logits(SAMPLES[0])


@pytest.mark.parametrize(
    ("name", "recipe"),
    [(name, recipe) for name in NAMES for recipe in RECIPES if recipe in ("static", "m4") or name in MOST_DIFFERENT],
)
def test_what_is_quantized_stays_close(models, tmp_path, name, recipe):
    outcome = quantize_checkpoint(models[name], tmp_path / "out", RECIPES[recipe], SAMPLES)
    expected, found = logits(models[name]), logits(tmp_path / "out")
    error = float((found - expected).norm() / expected.norm())
    assert error < 0.2, error
    if outcome.smoothing is not None:
        assert outcome.smoothing.max_logit_difference < 2e-3 * outcome.smoothing.max_logit
    left = [note for note in outcome.notes if "smooths" in note]
    assert bool(left) is (name == "olmo2" and RECIPES[recipe].anti_outlier is not None)


@pytest.mark.parametrize("name", ["phi3", "glm4", "gemma3-wrapped", "internlm2"])
def test_by_name_they_become_the_same_bytes(models, tmp_path, name):
    quantize_checkpoint(models[name], tmp_path / "engine", Recipe(DYNAMIC))
    quantize_by_name(plan_by_name(models[name], Recipe(DYNAMIC)), tmp_path / "names")
    ours: dict[str, torch.Tensor] = {}
    theirs: dict[str, torch.Tensor] = {}
    for found, folder in ((ours, "engine"), (theirs, "names")):
        for file in (tmp_path / folder).glob("*.safetensors"):
            found.update(load_file(file))
    assert ours.keys() == theirs.keys()
    assert all(ours[key].equal(theirs[key]) and ours[key].dtype == theirs[key].dtype for key in ours)
    described, config = "quant_model_description.json", "config.json"
    for file in (described, config):
        assert read_json(tmp_path / "engine" / file) == read_json(tmp_path / "names" / file)
    if name == "gemma3-wrapped":
        assert any(key.startswith("vision_tower.") for key in ours)
    checked = check(NamedDirectory.open(tmp_path / "engine"), "vllm-ascend")
    assert checked.verdict.is_harmless


def test_a_wrapper_of_another_text_model_is_refused(models, tmp_path):
    source = tmp_path / "m"
    shutil.copytree(models["gemma3-wrapped"], source)
    raw = read_json(source / "config.json")
    raw["text_config"]["model_type"] = "llama"
    write_json(source / "config.json", raw)
    with pytest.raises(UnsupportedError, match="text_config"):
        quantize_checkpoint(source, tmp_path / "out", Recipe(DYNAMIC))
