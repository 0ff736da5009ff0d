"""config.json of the dense families that differ from Llama: what is read, what it stands for, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from eightfold.config import DType, parse_config
from eightfold.errors import EightfoldError
from eightfold.families import all_linears, layer_norms, settle_names, slides, sliding_window, smooth_pairs
from eightfold.format.checkpoint import Checkpoint
from eightfold.tokenizer import stop_token_ids
from eightfold.written_config import both_dialects

WHERE = Path("m/config.json")
SIZES = {
    "vocab_size": 320,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
# As published: what its class knows is left out.
GEMMA3_4B = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "model_type": "gemma3",
    "text_config": {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "torch_dtype": "bfloat16",
    "vision_config": {"hidden_size": 1152, "num_hidden_layers": 27},
}


def raw(architecture: str, **changes: Any) -> dict[str, Any]:
    return {"architectures": [architecture], **SIZES, **changes}


def parse(config: dict[str, Any]) -> Any:
    return parse_config(json.loads(json.dumps(config)), WHERE)


def refusal(config: dict[str, Any]) -> str:
    with pytest.raises(EightfoldError) as caught:
        parse(config)
    return str(caught.value)


def test_a_published_gemma_3():
    config = parse(GEMMA3_4B)
    sizes = (config.vocab_size, config.num_heads, config.num_kv_heads, config.head_dim, config.context)
    assert sizes == (262208, 8, 4, 256, 131072)
    assert config.tie_word_embeddings
    assert config.dtype is DType.BF16
    assert (config.activation, config.norm_places, config.norm_offset) == ("gelu_tanh", "both", 1.0)
    assert (config.embedding_multiplier, config.score_scale) == (2560**0.5, 1 / 16)
    assert [sliding_window(config, i) for i in range(6)] == [1024] * 5 + [None]
    assert [slides(config, i) for i in (4, 5)] == [True, False]
    assert config.local_rope is not None
    assert [(rope.rope_theta, rope.factor) for rope in (config.local_rope, config.rope)] == [(1e4, 1.0), (1e6, 8.0)]


def test_gemma_3_is_written_for_every_loader():
    out = both_dialects(GEMMA3_4B, parse(GEMMA3_4B), DType.BF16)
    text = out["text_config"]
    assert out["model_type"] == "gemma3"
    assert (out["dtype"], text["dtype"], text["model_type"]) == ("bfloat16", "bfloat16", "gemma3_text")
    assert (text["rope_theta"], text["rope_local_base_freq"]) == (1e6, 1e4)
    assert text["rope_parameters"]["full_attention"] == {"rope_theta": 1e6, "rope_type": "linear", "factor": 8.0}
    assert text["rope_parameters"]["sliding_attention"] == {"rope_theta": 1e4, "rope_type": "default"}
    assert parse(out) == parse(GEMMA3_4B)


@pytest.mark.parametrize(
    "config",
    [
        raw("Gemma2ForCausalLM", sliding_window=8),
        raw("Glm4ForCausalLM"),
        raw("Phi3ForCausalLM", partial_rotary_factor=0.75, sliding_window=None),
        raw("GraniteForCausalLM", logits_scaling=8, residual_multiplier=0.5),
        raw("InternLM2ForCausalLM", bias=False, rope_scaling={"type": "dynamic", "factor": 2.0}),
        raw("Qwen2_5_VLForConditionalGeneration", rope_scaling={"type": "mrope", "mrope_section": [2, 3, 3]}),
    ],
    ids=lambda config: config["architectures"][0],
)
def test_what_is_written_means_the_same(config):
    out = both_dialects(config, parse(config), DType.F16)
    assert parse(out) == parse({**config, "dtype": "float16"})
    for key in ("rope_scaling", "rope_parameters"):
        assert (config.get("rope_scaling") or {}).get("mrope_section") == (out[key] or {}).get("mrope_section")


def test_switches_follow_from_the_row():
    glm, phi = parse(raw("GlmForCausalLM")), parse(raw("Phi3ForCausalLM", sliding_window=None))
    assert (glm.rotary_dim, glm.rotary_interleaved, glm.rms_norm_eps) == (8, True, 1.5625e-07)
    assert (phi.rotary_dim, phi.rotary_interleaved, sliding_window(phi, 0)) == (16, False, None)
    assert all_linears(phi)["model.layers.0.self_attn.qkv_proj"].n == 64 + 2 * 32
    gemma = parse(raw("Gemma2ForCausalLM", final_logit_softcapping=None))
    assert (gemma.attention_softcap, gemma.logits_softcap) == (50.0, None)
    granite = parse(raw("GraniteForCausalLM", logits_scaling=8, attention_multiplier=0.5))
    assert (granite.logits_multiplier, granite.score_scale) == (1 / 8, 0.5)
    olmo = parse(raw("Olmo2ForCausalLM"))
    assert [pair.group for pair in smooth_pairs(olmo)] == ["o", "down"]
    assert layer_norms(olmo) == {
        "post_attention_layernorm": 48,
        "post_feedforward_layernorm": 48,
        "self_attn.q_norm": 64,
        "self_attn.k_norm": 32,
    }
    # Another family's keys change nothing.
    assert parse(raw("LlamaForCausalLM", logits_scaling=8, final_logit_softcapping=3.0)).logits_multiplier == 1


def test_a_plan_looks_at_the_first_layers_of_a_wrapper(tmp_path):
    pytest.importorskip("transformers")
    from tests.reference import dense_models

    checkpoint = Checkpoint.open(dense_models.save(dense_models.make("gemma3-wrapped"), tmp_path / "m"))
    first = checkpoint.first_layers(1)
    assert (first.config.num_layers, first.config.layer_types) == (1, ("sliding_attention",))
    assert first.beside.keys() == checkpoint.beside.keys()
    assert stop_token_ids(tmp_path / "none", checkpoint.config_raw) == {257}


def test_a_head_of_three_in_one_tensor():
    linear = all_linears(parse(raw("InternLM2ForCausalLM")))["model.layers.0.attention.wqkv"]
    rows = [part.indices() for part in linear.parts]
    assert [len(part) for part in rows] == [64, 32, 32]
    assert sorted(row for part in rows for row in part) == list(range(linear.n))
    assert (rows[0][31], rows[0][32], rows[1][0], rows[2][0]) == (31, 64, 32, 48)


@pytest.mark.parametrize(
    ("layers", "head"),
    [
        ("language_model.model.layers.", "language_model.lm_head"),
        ("model.language_model.layers.", "lm_head"),
        ("model.layers.", "lm_head"),
    ],
)
@pytest.mark.parametrize("said", [None, True, False])
@pytest.mark.parametrize("is_stored", [True, False])
def test_where_a_wrapper_has_its_text_model(layers, head, said, is_stored):
    config = {"architectures": ["Mistral3ForConditionalGeneration"], "text_config": dict(SIZES)}
    config |= {} if said is None else {"tie_word_embeddings": said}
    stored = [f"{layers.removesuffix('layers.')}embed_tokens.weight", *([f"{head}.weight"] if is_stored else [])]
    found = settle_names(parse(config), config, stored)
    assert (found.names.layers, found.names.head) == (layers, head)
    assert found.tie_word_embeddings is (not is_stored if said is None else said)


@pytest.mark.parametrize(("whole", "part"), [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("is_stored", [True, False])
def test_a_wrapper_that_contradicts_its_text_model_has_the_head_that_is_stored(whole, part, is_stored):
    """Older classes write False for the whole of a tied model; transformers 5 means it."""
    config = {
        "architectures": ["Mistral3ForConditionalGeneration"],
        "text_config": {**SIZES, "tie_word_embeddings": part},
        "tie_word_embeddings": whole,
    }
    stored = ["model.language_model.embed_tokens.weight", *(["lm_head.weight"] if is_stored else [])]
    found = settle_names(parse(config), config, stored)
    assert found.tie_word_embeddings is (whole or (part and not is_stored))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (raw("Mistral3ForConditionalGeneration", text_config=[1]), '"text_config" in {}: got [1], expected an object'),
        (
            raw("Mistral3ForConditionalGeneration", text_config={**SIZES, "model_type": "ministral3"}),
            '"model_type" of text_config in {}: got ministral3, expected mistral',
        ),
        (
            raw("Glm4ForCausalLM", partial_rotary_factor=0.1),
            '"partial_rotary_factor" in {}: got 0.1 of 16 channels, expected an even number of channels',
        ),
        (
            raw("Glm4ForCausalLM", partial_rotary_factor=1.5),
            '"partial_rotary_factor" in {}: got 1.5, expected a number above 0 and up to 1',
        ),
        (
            raw("Phi3ForCausalLM", partial_rotary_factor=0.5, rope_parameters={"partial_rotary_factor": 0.75}),
            '"partial_rotary_factor" and "rope_parameters.partial_rotary_factor" in {}: got 0.5 and 0.75, '
            "expected the same part. Remove the wrong one.",
        ),
        (
            raw("Gemma3ForCausalLM", use_bidirectional_attention=True),
            '"use_bidirectional_attention" in {}: got true, expected false',
        ),
        (
            raw("Gemma3ForCausalLM", sliding_window_pattern=0),
            '"sliding_window_pattern" in {}: got 0, expected greater than 0',
        ),
        (
            raw("Gemma2ForCausalLM", hidden_activation="relu"),
            '"hidden_activation" in {}: got relu, expected silu, swish or gelu_pytorch_tanh',
        ),
        (raw("GraniteForCausalLM", logits_scaling=0), '"logits_scaling" in {}: got 0, expected greater than 0'),
        (
            raw("Gemma2ForCausalLM", attn_logit_softcapping="x"),
            "\"attn_logit_softcapping\" in {}: got 'x', expected a valid number",
        ),
        (raw("InternLM2ForCausalLM", bias=1), '"bias" in {}: got 1, expected a valid boolean'),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(config, message):
    assert refusal(config) == message.format(WHERE)
