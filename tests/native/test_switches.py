"""Dense families that are Llamas with a few switches: the core against the reference, and against transformers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from eightfold.format.checkpoint import Checkpoint
from eightfold.model import native as core
from eightfold.model.native.load import load_model
from eightfold.model.native.model import PAGE
from eightfold.model.reference.load import Decoder
from eightfold.parallel.share import even_sizes
from eightfold.quant.recipe import Recipe
from tests.conftest import tiny_config, token_samples
from tests.native.models import (
    DYNAMIC,
    ISAS,
    W8A8,
    W8A16,
    Variant,
    answer_of,
    fresh_ones_in_bfloat16,
    keys_and_values_in_bfloat16,
    logits_of,
    native,
    write_variant,
)
from tests.native.test_model import ROUNDING, STEP, WIDE, relative
from tests.native.test_share import Team, outputs

_LAYERS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 5}
_GEMMA = {"hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 24, **_LAYERS}
FAMILIES: dict[str, dict[str, Any]] = {
    # Rows of one tensor; a head of which 6 channels are turned.
    "phi3": tiny_config("Phi3ForCausalLM", head_dim=12, partial_rotary_factor=0.5, pad_token_id=0),
    # A few channels, neighbours, are turned; gate and up in one tensor; norms before and behind.
    "glm4": tiny_config("Glm4ForCausalLM", partial_rotary_factor=0.5, attention_bias=True, pad_token_id=0),
    # Queries, keys and values by turns in one tensor.
    "internlm2": tiny_config("InternLM2ForCausalLM", head_dim=12, bias=False),
    "granite": tiny_config(
        "GraniteForCausalLM", head_dim=12, embedding_multiplier=3.0, residual_multiplier=0.3,
        attention_multiplier=0.4, logits_scaling=4.0,
    ),
    # Norms behind, and of all heads as one row.
    "olmo2": tiny_config("Olmo2ForCausalLM", head_dim=12),
    # gelu, soft caps, norms before and behind, large embeddings, every other layer slides.
    "gemma2": tiny_config(
        "Gemma2ForCausalLM", **_GEMMA, attn_logit_softcapping=2.0, final_logit_softcapping=30.0,
        tie_word_embeddings=True,
    ),
    # Another rope in sliding layers.
    "gemma3": tiny_config(
        "Gemma3ForCausalLM", model_type="gemma3_text", **_GEMMA, tie_word_embeddings=True, rope_local_base_freq=50.0,
        rope_scaling={"rope_type": "linear", "factor": 2.0},
    ),
}  # fmt: skip

_FAQUANT, _C8 = Recipe(W8A8, fa_quant=True), Recipe(DYNAMIC, kv_int8=True, kv_symmetric=False)
RECIPES = {
    "phi3": [Recipe(W8A8), Recipe(W8A16)],
    "glm4": [Recipe(W8A8), _C8],
    "internlm2": [_FAQUANT, Recipe(W8A16, weight_symmetric=False)],
    "granite": [_FAQUANT, Recipe(DYNAMIC), Recipe(W8A16, kv_int8=True)],
    "olmo2": [_FAQUANT, Recipe(W8A16)],
    "gemma2": [Recipe(W8A8), _FAQUANT, _C8, Recipe(W8A16)],
    "gemma3": [Recipe(W8A8), Recipe(W8A16, fa_quant=True)],
}
CASES = [(name, recipe) for name in FAMILIES for recipe in (None, *RECIPES[name])]
CASE = pytest.mark.parametrize(("name", "recipe"), CASES, ids=[f"{name}-{i}" for i, (name, _) in enumerate(CASES)])
SAMPLES = [*token_samples(4, seed=5), [200]]
TOKENS = [token for sample in token_samples(20, seed=3) for token in sample][:90]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory):
    known: dict[tuple[str, int], Checkpoint] = {}

    def make(name: str, recipe: Recipe | None) -> Checkpoint:
        key = name, CASES.index((name, recipe))
        if key not in known:
            known[key] = write_variant(tmp_path_factory.mktemp(name), Variant(recipe, FAMILIES[name]))
        return known[key]

    return make


def is_wide(recipe: Recipe | None) -> bool:
    return recipe is not None and (W8A16 in recipe.schemes or recipe.kv_int8)


@CASE
def test_logits_are_the_references(made, name, recipe):
    checkpoint = made(name, recipe)
    decoder = Decoder(checkpoint)
    with keys_and_values_in_bfloat16():
        expected = [decoder.logits(sample).numpy() for sample in SAMPLES]
    for isa in ISAS:
        model = native(checkpoint, isa)
        apart = [relative(logits_of(model, sample), logits) for sample, logits in zip(SAMPLES, expected, strict=True)]
        assert min(apart) <= (WIDE if is_wide(recipe) else ROUNDING), (isa, apart)
        assert max(apart) <= STEP, (isa, apart)


@CASE
def test_any_cut_number_of_threads_and_company_gives_the_same_bits(made, name, recipe):
    for isa in ISAS:
        model = native(made(name, recipe), isa, threads=2)
        whole = logits_of(model, TOKENS)
        np.testing.assert_array_equal(logits_of(model, TOKENS, [1, 2, 9, 17, 64, 65, 89]), whole)
        np.testing.assert_array_equal(logits_of(model, TOKENS[:50]), whole[:50])
        np.testing.assert_array_equal(logits_of(native(made(name, recipe), isa), TOKENS[:20], [1]), whole[:20])


@pytest.mark.parametrize("name", FAMILIES)
def test_the_likeliest_token_needs_no_logits(made, name):
    model = native(made(name, None), ISAS[-1], threads=2)
    answer = answer_of(model, TOKENS[:20], 12)
    logits = logits_of(model, [*TOKENS[:20], *answer])[19:-1]
    assert answer == logits.argmax(1).tolist()


@CASE
def test_shares_give_what_the_whole_gives(made, name, recipe):
    checkpoint = made(name, recipe)
    vocab = checkpoint.config.vocab_size
    whole = load_model(checkpoint, threads=1)
    whole.allocate_cache(2 * PAGE)
    expected = outputs(whole, vocab)
    for size in even_sizes(checkpoint.config)[1:]:
        team = Team(checkpoint, size, threads=1)
        for (logits, best), (logits_0, best_0) in zip(outputs(team, vocab), expected, strict=True):
            assert logits.tobytes() == logits_0.tobytes()
            assert best.tolist() == best_0.tolist()
        team.close()


@pytest.mark.parametrize("recipe", [_FAQUANT, _C8])
def test_a_prompt_in_float_has_soft_caps_too(made, recipe):
    checkpoint = made("gemma2", recipe)
    decoder = Decoder(checkpoint, attention="mindie")
    with fresh_ones_in_bfloat16():
        expected = [decoder.logits(sample).numpy() for sample in SAMPLES]
    model = native(checkpoint, ISAS[-1], attention="mindie")
    apart = [relative(logits_of(model, sample), logits) for sample, logits in zip(SAMPLES, expected, strict=True)]
    assert min(apart) <= (WIDE if is_wide(recipe) else ROUNDING) and max(apart) <= STEP, apart


# How far apart logits may be from transformers', of the largest: keys and values are bfloat16 here.
@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "internlm2"])
def test_a_bfloat16_cache_is_all_that_is_between_the_core_and_transformers(tmp_path, name):
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(**{**FAMILIES[name], "torch_dtype": "float32"})
    torch.manual_seed(0)
    theirs = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in theirs.parameters():  # initial weights are so small that nothing depends on attention
            parameter.copy_(torch.randn_like(parameter) * (0.3 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5))
    theirs.save_pretrained(tmp_path)
    with torch.inference_mode():
        expected = theirs(torch.tensor([TOKENS])).logits[0].numpy()
    checkpoint = Checkpoint.open(tmp_path)
    assert relative(Decoder(checkpoint).logits(TOKENS).numpy(), expected) <= 1e-4
    assert relative(logits_of(load_model(checkpoint, threads=1), TOKENS), expected) <= 4 * 2.0**-9


SIZES: dict[str, Any] = {
    "isa": "scalar", "threads": 1, "num_layers": 1, "hidden": [0, 8], "intermediate": [0, 8], "vocab": [0, 9],
    "rank": 0, "heads": 2, "kv_heads": 2, "head_dim": 8, "eps": 1e-5, "symmetric_tokens": False,
}  # fmt: skip
SWITCHES: dict[str, Any] = {
    "activation": "silu", "interleaved": False, "embedding_multiplier": 1.0, "residual_multiplier": 1.0,
    "score_multiplier": 0.0, "logits_multiplier": 1.0, "attention_softcap": 0.0, "logits_softcap": 0.0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        ("activation: expected silu or gelu_tanh", {"activation": "relu"}),
        ("multipliers: expected", {"embedding_multiplier": 0.0}),
        ("multipliers: expected", {"residual_multiplier": float("nan")}),
        ("multipliers: expected", {"logits_multiplier": -1.0}),
        ("score_multiplier, soft caps: expected", {"score_multiplier": -0.5}),
        ("score_multiplier, soft caps: expected", {"attention_softcap": float("inf")}),
        ("score_multiplier, soft caps: expected", {"logits_softcap": -30.0}),
    ],
)
def test_switches_are_checked_at_the_border_to_the_core(message, changes):
    model = core.extension.Model(**SIZES, inv_freq=np.ones(4, np.float32))
    model.set_switches(**SWITCHES)
    with pytest.raises(ValueError, match=message):
        model.set_switches(**{**SWITCHES, **changes})


def test_ropes_are_checked_at_the_border_to_the_core():
    for size in (0, 5):
        with pytest.raises(ValueError, match="inv_freq: expected one for each pair"):
            core.extension.Model(**SIZES, inv_freq=np.ones(size, np.float32))
    model = core.extension.Model(**SIZES, inv_freq=np.ones(3, np.float32))
    nothing = np.zeros(0, np.float32)
    attention: dict[str, Any] = {
        "window": 0, "query_norm": nothing, "key_norm": nothing, "query_inv": nothing, "score_scale": nothing,
        "key": [], "value": [], "is_local": True,
    }  # fmt: skip
    with pytest.raises(ValueError, match="is_local: expected set_local_rope before"):
        model.set_attention(0, "bf16", **attention)
    with pytest.raises(ValueError, match="inv_freq: expected as many as of the other rope"):
        model.set_local_rope(np.ones(4, np.float32), 1.0)
    with pytest.raises(ValueError, match="scale: expected a finite number above 0"):
        model.set_local_rope(np.ones(3, np.float32), 0.0)
    model.set_local_rope(np.ones(3, np.float32), 1.0)
    model.set_attention(0, "bf16", **attention)
    with pytest.raises(ValueError, match="local rope: it is set already"):
        model.set_local_rope(np.ones(3, np.float32), 1.0)
