"""The float decoder and transformers agree on logits and on greedy continuations, for every family and setting."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from eightfold.format.checkpoint import Checkpoint
from eightfold.model.reference.load import Decoder
from eightfold.tokenizer import Tokenizer
from tests.conftest import FAMILIES, tiny_config, write_model

transformers = pytest.importorskip("transformers")

LENGTH = 100  # tokens of a text: longer than every window and than the llama3 case's original context
WINDOW = 7
DTYPES = ("float32", "bfloat16", "float16")


@pytest.fixture(autouse=True, scope="module")
def _no_progress_bars():
    transformers.utils.logging.disable_progress_bar()
    yield
    transformers.utils.logging.enable_progress_bar()


def text(length: int = LENGTH, seed: int = 3) -> list[int]:
    return torch.randint(0, 256, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def their_model(directory: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", local_files_only=True
    ).eval()


@torch.inference_mode()
def their_logits(directory: Path, token_ids: list[int]) -> torch.Tensor:
    return their_model(directory)(torch.tensor([token_ids])).logits[0]


def our_logits(directory: Path, token_ids: list[int]) -> torch.Tensor:
    return Decoder(Checkpoint.open(directory)).logits(token_ids)


def rounding(expected: torch.Tensor, config: Any) -> float:
    """Return how far two right float32 computations may be apart.

    A rounding is at most 2**-24 of the value. A sum of K terms, in any order, collects K of them with random signs,
    so sqrt(K); a layer is 8 such stages one after the other (norm, qkv, rope, softmax, o, norm, gate/up, down), the
    head 2, each adding its own noise, again with random signs. Both sides round: twice that. Wrong arithmetic is
    four orders of magnitude away; see test_settings_that_are_compared_matter.
    """
    stages = 8 * config["num_hidden_layers"] + 2
    terms = max(config["hidden_size"], config["intermediate_size"])
    return 2 * math.sqrt(stages * terms) * 2**-24 * float(expected.abs().max())


def assert_same_logits(tmp_path: Path, config: dict[str, Any], token_ids: list[int] | None = None) -> None:
    token_ids = token_ids or text()
    directory = write_model(tmp_path / "float", config, tokenizer=False)
    ours, theirs = our_logits(directory, token_ids), their_logits(directory, token_ids)
    assert ours.dtype == torch.float32
    assert ours.shape == theirs.shape
    torch.testing.assert_close(ours, theirs, rtol=0, atol=rounding(theirs, config))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("architecture", FAMILIES)
def test_every_family_dtype_and_head(tmp_path, architecture, dtype, tied):
    assert_same_logits(tmp_path, tiny_config(architecture, torch_dtype=dtype, tie_word_embeddings=tied))


@pytest.mark.parametrize("kv_heads", [4, 2, 1], ids=["MHA", "GQA", "MQA"])
@pytest.mark.parametrize("head_dim", [None, 4, 16], ids=["dim=E/H", "narrow", "wide"])
@pytest.mark.parametrize("architecture", FAMILIES)
def test_every_head_layout(tmp_path, architecture, head_dim, kv_heads):
    config = tiny_config(architecture, num_key_value_heads=kv_heads, head_dim=head_dim)
    if head_dim is None:
        del config["head_dim"]  # what most published files do; Qwen3 alone then means 128
        if architecture == "Qwen3ForCausalLM":
            config["head_dim"] = 12
    assert_same_logits(tmp_path, config)


@pytest.mark.parametrize(
    ("architecture", "biases"),
    [
        ("LlamaForCausalLM", {"attention_bias": True}),
        ("LlamaForCausalLM", {"mlp_bias": True}),
        ("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}),
        ("Qwen3ForCausalLM", {"attention_bias": True}),
        # Not theirs to set: Mistral has none and Qwen2 has those of q, k and v, whatever the file says.
        ("MistralForCausalLM", {"attention_bias": True, "mlp_bias": True}),
        ("Qwen2ForCausalLM", {"attention_bias": False, "mlp_bias": True}),
    ],
)
def test_biases(tmp_path, architecture, biases):
    assert_same_logits(tmp_path, tiny_config(architecture, **biases))


LINEAR = {"rope_type": "linear", "factor": 4.0}
# Wavelengths of 6 to 20,000 positions: kept, blended and stretched frequencies are all among them.
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


@pytest.mark.parametrize("scaling", [LINEAR, LLAMA3], ids=["linear", "llama3"])
@pytest.mark.parametrize("dialect", ["rope_scaling", "rope_parameters", "type"])
@pytest.mark.parametrize("architecture", FAMILIES)
def test_stretched_positions_beyond_the_original_context(tmp_path, architecture, dialect, scaling):
    config = tiny_config(architecture)
    if dialect == "rope_parameters":
        del config["rope_theta"], config["rope_scaling"]
        config["rope_parameters"] = {"rope_theta": 10000.0, **scaling}
    elif dialect == "type":
        config["rope_scaling"] = {"type": scaling["rope_type"], **scaling}
        del config["rope_scaling"]["rope_type"]
    else:
        config["rope_scaling"] = scaling
    assert_same_logits(tmp_path, config)


# Of 8 pairs: YaRN keeps the first ones and stretches the last.
ORIGINAL = LENGTH // 4
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": ORIGINAL}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0 + i / 8 for i in range(8)],
    "long_factor": [1.0 + i for i in range(8)],
    "original_max_position_embeddings": ORIGINAL,
}
STRETCHED = {
    "yarn": (YARN, ORIGINAL),
    "yarn, base 100": ({**YARN, "rope_theta": 100.0}, LENGTH),
    "yarn, betas": ({**YARN, "beta_fast": 4.0, "beta_slow": 0.5, "truncate": False}, LENGTH),
    "yarn, one place": ({**YARN, "beta_fast": 2.0, "beta_slow": 2.0, "truncate": False}, LENGTH),
    "yarn, mscales": ({**YARN, "factor": 40.0, "mscale": 0.7, "mscale_all_dim": 1.3}, LENGTH),
    "yarn, one mscale": ({**YARN, "mscale": 0.7, "mscale_all_dim": 0.0}, LENGTH),
    "yarn, attention": ({**YARN, "attention_factor": 1.5}, LENGTH),
    "dynamic": ({"rope_type": "dynamic", "factor": 4.0}, ORIGINAL),
    "longrope": (LONGROPE, LENGTH),
    "longrope, factor": ({**LONGROPE, "factor": 9.0}, LENGTH),
    "longrope, attention": ({**LONGROPE, "attention_factor": 1.5}, LENGTH),
}


@pytest.mark.parametrize("length", [ORIGINAL, ORIGINAL + 1, LENGTH])
@pytest.mark.parametrize("scaling", STRETCHED)
@pytest.mark.parametrize("architecture", FAMILIES)
def test_four_times_the_original_context(tmp_path, architecture, scaling, length):
    rope, positions = STRETCHED[scaling]
    config = tiny_config(architecture, rope_scaling=rope, max_position_embeddings=positions)
    config["rope_theta"] = rope.get("rope_theta", config["rope_theta"])
    assert_same_logits(tmp_path, config, text(length))


@pytest.mark.parametrize("scaling", ["yarn", "yarn, attention", "dynamic", "longrope"])
def test_what_is_compared_at_four_times_the_original_context_matters(tmp_path, scaling):
    rope, positions = STRETCHED[scaling]
    stretched = write_model(tmp_path / "a", tiny_config(rope_scaling=rope, max_position_embeddings=positions))
    plain = write_model(tmp_path / "b", tiny_config(max_position_embeddings=positions))
    ours, theirs = our_logits(plain, text()), their_logits(stretched, text())
    assert float((ours - theirs).abs().max()) > 1000 * rounding(theirs, tiny_config())


@pytest.mark.parametrize("changes", [{"rope_theta": 500000.0}, {"rope_theta": 100}, {"rms_norm_eps": 0.5}])
def test_rotary_base_and_norm_epsilon(tmp_path, changes):
    assert_same_logits(tmp_path, tiny_config(**changes))


WINDOWS = [
    ("MistralForCausalLM", {"sliding_window": WINDOW}),
    ("MistralForCausalLM", {"sliding_window": None}),
    ("MistralForCausalLM", {"sliding_window": 1}),
    ("MistralForCausalLM", {"sliding_window": LENGTH}),
    ("MistralForCausalLM", {"sliding_window": LENGTH - 1}),
    *(
        (architecture, {"sliding_window": WINDOW, **changes})
        for architecture in ("Qwen2ForCausalLM", "Qwen3ForCausalLM")
        for changes in (
            {"use_sliding_window": True, "max_window_layers": 0},
            {"use_sliding_window": True, "max_window_layers": 1},
            {"use_sliding_window": True, "max_window_layers": 2},
            {"use_sliding_window": False, "max_window_layers": 0},
            {"max_window_layers": 0},
            {"use_sliding_window": True, "layer_types": ["sliding_attention", "full_attention"]},
            {"use_sliding_window": True, "layer_types": ["full_attention", "sliding_attention"]},
            {"use_sliding_window": True, "layer_types": ["full_attention", "full_attention"], "max_window_layers": 0},
        )
    ),
    ("LlamaForCausalLM", {"sliding_window": WINDOW}),  # Llama has none, whatever the file says
]


@pytest.mark.parametrize(("architecture", "changes"), WINDOWS)
def test_sliding_windows_shorter_than_the_text(tmp_path, architecture, changes):
    assert_same_logits(tmp_path, tiny_config(architecture, **changes))


@pytest.mark.parametrize("length", [1, 2, WINDOW - 1, WINDOW, WINDOW + 1])
def test_texts_around_the_length_of_the_window(tmp_path, length):
    assert_same_logits(tmp_path, tiny_config("MistralForCausalLM", sliding_window=WINDOW), text(length))


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("LlamaForCausalLM", {"rope_scaling": LINEAR}),
        ("LlamaForCausalLM", {"rope_scaling": LLAMA3}),
        ("LlamaForCausalLM", {"rope_scaling": {**LLAMA3, "low_freq_factor": 2.0}}),
        ("LlamaForCausalLM", {"rope_theta": 500000.0}),
        ("LlamaForCausalLM", {"rms_norm_eps": 1e-3}),
        ("MistralForCausalLM", {"sliding_window": LENGTH - 1}),
        ("Qwen2ForCausalLM", {"sliding_window": WINDOW, "use_sliding_window": True, "max_window_layers": 1}),
    ],
)
def test_settings_that_are_compared_matter(tmp_path, architecture, changes):
    # Without the setting the logits are elsewhere by far more than the tolerance: the tests above would see it missing.
    plain, changed = tiny_config(architecture), tiny_config(architecture, **changes)
    ours = [
        our_logits(write_model(tmp_path / name, config, tokenizer=False), text())
        for name, config in (("plain", plain), ("changed", changed))
    ]
    assert float((ours[0] - ours[1]).abs().max()) > 100 * rounding(ours[0], plain)


def their_greedy(directory: Path, prompt: list[int], new: int, stop: list[int] | None) -> list[int]:
    model = their_model(directory)
    model.generation_config = transformers.GenerationConfig(
        do_sample=False, max_new_tokens=new, eos_token_id=stop, pad_token_id=0
    )
    return model.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)))[0, len(prompt) :].tolist()


GENERATIONS = [
    *((architecture, {}) for architecture in FAMILIES),
    ("LlamaForCausalLM", {"rope_scaling": LLAMA3, "tie_word_embeddings": True}),
    ("MistralForCausalLM", {"sliding_window": WINDOW}),
    ("Qwen2ForCausalLM", {"sliding_window": WINDOW, "use_sliding_window": True, "max_window_layers": 1}),
]


@pytest.mark.parametrize(("architecture", "changes"), GENERATIONS)
def test_greedy_generation(tmp_path, architecture, changes):
    # The two best logits of these models are never within rounding of each other, so there is one right continuation.
    directory = write_model(tmp_path / "float", tiny_config(architecture, **changes), tokenizer=False)
    decoder, prompt = Decoder(Checkpoint.open(directory)), text(12)
    assert list(decoder.generate(prompt, 24)) == their_greedy(directory, prompt, 24, None)


SENTENCES = [
    "The capital of France is Paris, and the capital of Italy is Rome.",
    "def add(a, b):\n    return a + b\n",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich. 你好，世界 🙂",
]


@pytest.mark.golden
def test_real_model(smol):
    directory = smol / "smol-bf16"
    checkpoint = Checkpoint.open(directory)
    model, tokenizer, decoder = their_model(directory), Tokenizer(directory), Decoder(checkpoint)
    for sentence in SENTENCES:
        token_ids = tokenizer.encode(sentence)
        with torch.inference_mode():
            theirs = model(torch.tensor([token_ids])).logits[0]
        ours = decoder.logits(token_ids)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=rounding(theirs, checkpoint.config_raw))


@pytest.mark.golden
def test_real_model_continues_greedily(smol):
    directory = smol / "smol-bf16"
    question = [{"role": "user", "content": "Name a colour."}]
    prompt = Tokenizer(directory).encode_chat(question, add_generation_prompt=True)
    ours = list(Decoder(Checkpoint.open(directory)).generate(prompt, 16))
    theirs = their_greedy(directory, prompt, 16, [2])
    assert ours[: len(theirs)] == theirs
