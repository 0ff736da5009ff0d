"""Longer contexts: the core against the reference, and against transformers where that is installed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from eightfold.format.checkpoint import Checkpoint
from eightfold.model import native as core
from eightfold.model.layers import read_attention
from eightfold.model.native.load import load_model
from eightfold.model.native.model import Chunk
from eightfold.model.reference.load import Decoder
from eightfold.quant.recipe import Recipe
from tests.conftest import FAMILIES, tiny_config
from tests.native.models import (
    DYNAMIC,
    ISAS,
    W8A8,
    Variant,
    keys_and_values_in_bfloat16,
    logits_of,
    native,
    write_variant,
)
from tests.native.test_model import ROUNDING, STEP, relative
from tests.native.test_share import Team

ORIGINAL = 32
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": ORIGINAL, "beta_fast": 8.0}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0 + i / 8 for i in range(8)],
    "long_factor": [1.0 + i for i in range(8)],
    "original_max_position_embeddings": ORIGINAL,
}
SETTINGS: dict[str, dict[str, Any]] = {
    "yarn": {"rope_scaling": YARN, "max_position_embeddings": ORIGINAL},
    "yarn, attention": {"rope_scaling": {**YARN, "attention_factor": 1.5}},
    "yarn, none": {"rope_scaling": {**YARN, "attention_factor": 1.0}},
    "dynamic": {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}, "max_position_embeddings": ORIGINAL},
    "longrope": {"rope_scaling": LONGROPE},
}
LENGTHS = (ORIGINAL, 4 * ORIGINAL)  # max_position_embeddings is the second unless a case says otherwise
TOKENS = np.random.default_rng(3).integers(0, 256, LENGTHS[-1]).tolist()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory):
    def make(name: str, architecture: str = FAMILIES[0], recipe: Recipe | None = None) -> Checkpoint:
        config = tiny_config(architecture, torch_dtype="float32" if recipe is None else "bfloat16", **SETTINGS[name])
        return write_variant(tmp_path_factory.mktemp("rope"), Variant(recipe, config))

    return make


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("architecture", FAMILIES)
@pytest.mark.parametrize("name", SETTINGS)
def test_logits_are_the_references(made, name, architecture, length):
    """Of a long text and of short ones: in the core, the longest sequence decides for all of them."""
    checkpoint = made(name, architecture)
    texts = [TOKENS[:length], *(TOKENS[i : i + 6] for i in range(6))]
    decoder = Decoder(checkpoint, longest=length)
    with keys_and_values_in_bfloat16():
        expected = [decoder.logits(text).numpy() for text in texts]
    model = native(checkpoint, ISAS[-1], longest=length)
    apart = [relative(logits_of(model, text), logits) for text, logits in zip(texts, expected, strict=True)]
    assert min(apart) <= ROUNDING
    assert max(apart) <= STEP


@pytest.mark.parametrize("recipe", [None, Recipe(W8A8, fa_quant=True), Recipe(DYNAMIC, kv_int8=True)])
@pytest.mark.parametrize("name", ["yarn, attention", "dynamic", "longrope"])
def test_any_cut_company_and_instruction_set_gives_the_same_bits_as_before(made, name, recipe):
    checkpoint = made(name, recipe=recipe)
    for isa in ISAS:
        model = native(checkpoint, isa, threads=2, longest=LENGTHS[-1])
        whole = logits_of(model, TOKENS)
        np.testing.assert_array_equal(logits_of(model, TOKENS, [1, 30, 33, 99, 127]), whole)
        np.testing.assert_array_equal(logits_of(model, TOKENS[:50]), whole[:50])  # of shorter ones, too


@pytest.mark.parametrize("name", ["yarn, attention", "dynamic", "longrope"])
def test_ranks_turn_their_heads_as_one_process_does(made, name):
    checkpoint = made(name, recipe=Recipe(W8A8, fa_quant=True))
    whole = logits_of(load_model(checkpoint, threads=1, longest=LENGTHS[-1]), TOKENS)
    team = Team(checkpoint, 2, threads=1, longest=LENGTHS[-1])
    found, _ = team.forward([Chunk(TOKENS, 0, range(1), len(TOKENS), wants_all=True)])
    np.testing.assert_array_equal(found, whole)
    team.close()


@pytest.mark.parametrize("recipe", [Recipe(W8A8, fa_quant=True), Recipe(W8A8, kv_int8=True)])
def test_calibration_sees_keys_as_large_as_they_are(made, recipe):
    def key_scale(name: str) -> Any:
        return read_attention(made(name, recipe=recipe), 0).key.scale

    np.testing.assert_allclose(key_scale("yarn, attention"), 1.5 * key_scale("yarn, none"), rtol=2**-7)  # in bfloat16


@pytest.mark.parametrize("name", SETTINGS)
def test_the_scale_is_set_only_where_it_is_not_one(made, name, monkeypatch):
    seen: list[float] = []

    class Recording(core.extension.Model):  # type: ignore[misc]
        def set_rope_scale(self, scale: float) -> None:
            seen.append(scale)
            super().set_rope_scale(scale)

    monkeypatch.setattr(core.extension, "Model", Recording)
    load_model(made(name), threads=1)
    expected = {
        "yarn": [0.1 * np.log(4) + 1],
        "yarn, attention": [1.5],
        "longrope": [np.sqrt(1 + np.log(4) / np.log(32))],
        "yarn, none": [],
        "dynamic": [],
    }
    assert seen == pytest.approx(expected[name])


def test_a_scale_is_checked_at_the_border_to_the_core():
    model = core.extension.Model(
        isa="scalar", threads=1, num_layers=1, hidden=[0, 8], intermediate=[0, 8], vocab=[0, 9], rank=0, heads=2,
        kv_heads=2, head_dim=4, eps=1e-5, symmetric_tokens=False, inv_freq=np.ones(2, np.float32),
    )  # fmt: skip
    for scale in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="scale: expected a finite number above 0"):
            model.set_rope_scale(scale)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_bfloat16_cache_is_all_that_is_between_the_core_and_transformers(made, name):
    transformers = pytest.importorskip("transformers")
    checkpoint = made(name)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        checkpoint.directory, dtype=torch.float32, attn_implementation="eager", local_files_only=True
    ).eval()
    for length in LENGTHS:
        with torch.inference_mode():
            expected = theirs(torch.tensor([TOKENS[:length]])).logits[0].numpy()
        np.testing.assert_allclose(Decoder(checkpoint).logits(TOKENS[:length]).numpy(), expected, rtol=0, atol=1e-4)
        found = logits_of(load_model(checkpoint, threads=1, longest=length), TOKENS[:length])
        assert relative(found, expected) <= 4 * 2.0**-9
