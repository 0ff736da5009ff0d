"""Mixtures of experts: the float decoder and transformers agree on logits, and what is 8-bit stays close to it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from eightfold.errors import CheckpointError
from eightfold.evaluate import evaluate_reference
from eightfold.format.checkpoint import Checkpoint
from eightfold.model.reference.decoder import Batch, GatedMLP, LinearGroup
from eightfold.model.reference.experts import Router, SparseMLP
from eightfold.model.reference.linear import FloatLinear, W8A8DynamicLinear, W8A16Linear
from eightfold.model.reference.load import Decoder
from eightfold.quant.by_name import quantize_by_name
from eightfold.quant.name_plan import plan_by_name
from eightfold.quant.recipe import Recipe
from eightfold.scheme import QuantType
from tests.conftest import SPARSE, tiny_config, token_samples, write_model
from tests.reference.test_against_transformers import our_logits, rounding, text, their_greedy, their_logits

QWEN3, QWEN2, MIXTRAL = SPARSE
LENGTH = 60


def write(tmp_path: Path, architecture: str, **changes: Any) -> Path:
    return write_model(tmp_path, tiny_config(architecture, **changes), tokenizer=False)


def difference(directory: Path, config: dict[str, Any]) -> tuple[float, float]:
    """Return how far our logits are from transformers', and how far rounding may bring them."""
    ours, theirs = our_logits(directory, text(LENGTH)), their_logits(directory, text(LENGTH))
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max()), min(1e-4, rounding(theirs, config))


SETTINGS: list[tuple[str, dict[str, Any]]] = [
    *((architecture, {}) for architecture in SPARSE),
    *((architecture, {"tie_word_embeddings": True, "torch_dtype": "float32"}) for architecture in SPARSE),
    *((architecture, {"num_experts_per_tok": 1}) for architecture in SPARSE),
    *((architecture, {"num_experts_per_tok": 5}) for architecture in SPARSE),
    *((architecture, {"num_experts": 1, "num_experts_per_tok": 1}) for architecture in SPARSE),
    *((architecture, {"norm_topk_prob": False}) for architecture in SPARSE),
    *((architecture, {"norm_topk_prob": None}) for architecture in SPARSE),
    *((architecture, {"decoder_sparse_step": 2, "num_hidden_layers": 5}) for architecture in SPARSE),
    *((architecture, {"decoder_sparse_step": 3, "num_hidden_layers": 4}) for architecture in (QWEN3, QWEN2)),
    *((architecture, {"mlp_only_layers": [1, 3], "num_hidden_layers": 4}) for architecture in SPARSE),
    *((architecture, {"mlp_only_layers": [0, 1]}) for architecture in (QWEN3, QWEN2)),
    *(
        (architecture, {"decoder_sparse_step": 2, "mlp_only_layers": [1, 2, 9], "num_hidden_layers": 4})
        for architecture in (QWEN3, QWEN2)
    ),
    (QWEN3, {"attention_bias": True}),
    (QWEN2, {"qkv_bias": False}),
    *((architecture, {"sliding_window": 7}) for architecture in SPARSE),
    *(
        (architecture, {"sliding_window": 7, "use_sliding_window": True, "max_window_layers": layers})
        for architecture in (QWEN3, QWEN2)
        for layers in (0, 1, 3)
    ),
    (QWEN2, {"num_hidden_layers": 4, "sliding_window": 7, "use_sliding_window": True, "max_window_layers": 3}),
    (MIXTRAL, {"num_local_experts": 5, "num_experts": None}),
    (QWEN3, {"num_local_experts": 5, "num_experts": None}),
    # What a file leaves out, the classes know.
    (MIXTRAL, {"rope_theta": None, "rms_norm_eps": None, "num_experts_per_tok": None}),
    (QWEN2, {"num_experts": 9, "num_experts_per_tok": None, "qkv_bias": None}),
]


@pytest.mark.parametrize(("architecture", "changes"), SETTINGS)
def test_logits_are_those_of_transformers(tmp_path, architecture, changes):
    config = tiny_config(architecture, **changes)
    if architecture == QWEN2:
        config["head_dim"] = config["hidden_size"] // config["num_attention_heads"]  # its class has no other
    config = {key: value for key, value in config.items() if value is not None}
    found, allowed = difference(write_model(tmp_path, config, tokenizer=False), config)
    assert found <= allowed


MATTERS: list[tuple[str, dict[str, Any]]] = [
    (QWEN3, {"norm_topk_prob": False}),
    (QWEN2, {"norm_topk_prob": False}),
    (MIXTRAL, {"num_experts_per_tok": 3}),
    (QWEN3, {"sliding_window": 7, "use_sliding_window": True}),
    (QWEN2, {"sliding_window": 7, "use_sliding_window": True, "max_window_layers": 1}),
    (MIXTRAL, {"sliding_window": 7}),
    (MIXTRAL, {"rope_theta": 1e6}),
]


@pytest.mark.parametrize(("architecture", "changes"), MATTERS)
def test_settings_that_are_compared_matter(tmp_path, architecture, changes):
    plain, changed = write(tmp_path / "a", architecture), write(tmp_path / "b", architecture, **changes)
    assert float((our_logits(plain, text(LENGTH)) - our_logits(changed, text(LENGTH))).abs().max()) > 0.01


@pytest.mark.parametrize("architecture", SPARSE)
def test_greedy_generation(tmp_path, architecture):
    directory = write(tmp_path, architecture, head_dim=12)
    ours = list(Decoder(Checkpoint.open(directory)).generate(text(12), 12))
    assert ours == their_greedy(directory, text(12), 12, None)


@pytest.mark.parametrize("architecture", SPARSE)
def test_all_experts_and_the_shared_one_matter(tmp_path, architecture):
    """Each of them counts with its own weights: any that is changed changes the logits."""
    directory = write(tmp_path, architecture)
    plain, stored = our_logits(directory, text(LENGTH)), load_file(directory / "model.safetensors")
    parts = [name for name in stored if ".layers.1." in name and (".mlp." in name or ".block_sparse_moe." in name)]
    assert len(parts) == 1 + 15 + (4 if architecture == QWEN2 else 0)
    for name in parts:
        save_file({**stored, name: stored[name] * 1.5}, directory / "model.safetensors")
        assert float((our_logits(directory, text(LENGTH)) - plain).abs().max()) > 1e-3, name


def test_ties_go_to_the_lowest_index():
    gate = torch.tensor([[0.0], [2.0], [1.0], [2.0], [2.0], [1.0]])
    weights, chosen = Router(FloatLinear(gate, None), 4, normalizes=True)(torch.tensor([[1.0], [0.0], [-1.0]]))
    assert chosen.tolist() == [[1, 3, 4, 2], [0, 1, 2, 3], [0, 2, 5, 1]]
    torch.testing.assert_close(weights.sum(1), torch.ones(3))
    torch.testing.assert_close(weights[1], torch.full((4,), 0.25))


def test_weights_are_of_all_experts_unless_they_are_normalized():
    gate, x = torch.log(torch.tensor([[0.1], [0.4], [0.5]])), torch.ones(1, 1)
    plain, _ = Router(FloatLinear(gate, None), 2, normalizes=False)(x)
    normal, chosen = Router(FloatLinear(gate, None), 2, normalizes=True)(x)
    assert chosen.tolist() == [[2, 1]]
    torch.testing.assert_close(plain, torch.tensor([[0.5, 0.4]]))
    torch.testing.assert_close(normal, torch.tensor([[5 / 9, 4 / 9]]))


@pytest.mark.parametrize("architecture", SPARSE)
def test_tied_experts_that_are_equal_give_what_transformers_gives(tmp_path, architecture):
    """Whichever of them transformers takes: with so many ties that a wrong choice of weights would show."""
    directory = write(tmp_path, architecture, head_dim=12, num_experts=6, num_experts_per_tok=3)
    stored = load_file(directory / "model.safetensors")
    for name in list(stored):
        if name.endswith((".mlp.gate.weight", ".block_sparse_moe.gate.weight")):
            stored[name][1:] = stored[name][1]
        if ".experts." in name:
            stored[name] = stored[re.sub(r"experts\.\d+", "experts.1", name)]
    save_file({name: tensor.clone() for name, tensor in stored.items()}, directory / "model.safetensors")
    found, allowed = difference(directory, tiny_config(architecture, head_dim=12))
    assert found <= allowed


def test_a_part_of_a_batch_keeps_sequences_and_prompts_apart():
    angles = torch.arange(9.0)[:, None]
    batch = Batch([(0, 4), (4, 4), (4, 9)], [2, 0, 5], angles, -angles)
    part = batch.pick(torch.tensor([1, 3, 4, 8]))
    assert (part.spans, part.prompt_lens) == ([(0, 2), (2, 2), (2, 4)], [1, 0, 2])
    assert part.generated_T().tolist() == [False, True, False, False]
    assert part.cos_TD[:, 0].tolist() == [1, 3, 4, 8]
    assert batch.pick(torch.tensor([5])).spans == [(0, 0), (0, 0), (0, 1)]


# --- 8-bit, made by the names of the tensors


def quantized(source: Path, target: Path, scheme: QuantType, **choices: Any) -> Path:
    quantize_by_name(plan_by_name(source, Recipe(scheme, **choices)), target)
    return target


def distance(directory: Path, source: Path) -> float:
    """Return the mean KL divergence of a model from its float original."""
    judged, against = (Decoder(Checkpoint.open(path)) for path in (directory, source))
    kl = evaluate_reference(judged, token_samples(), against).kl_mean
    assert kl is not None
    return kl


@pytest.mark.parametrize(
    ("scheme", "most", "choices"),
    [
        (QuantType.W8A16, 0.001, {"modules": (("*.experts.*", QuantType.W8A16),)}),
        (QuantType.W8A16, 0.01, {}),  # with experts in W8A8_DYNAMIC, as loaders want it
        (QuantType.W8A8_DYNAMIC, 0.01, {}),
    ],
    ids=["w8a16", "w8a16, dynamic experts", "dynamic"],
)
@pytest.mark.parametrize("architecture", SPARSE)
def test_what_is_quantized_by_names_is_close_to_the_float_model(tmp_path, architecture, scheme, most, choices):
    source = write(tmp_path / "float", architecture)
    out = quantized(source, tmp_path / "out", scheme, **choices)
    assert 0 < distance(out, source) <= most
    found = Decoder(Checkpoint.open(out)).block(1).mlp
    assert isinstance(found, SparseMLP)
    kind = W8A16Linear if choices else W8A8DynamicLinear
    for expert in found.experts:
        assert isinstance(expert, GatedMLP)
        assert isinstance(expert.down, LinearGroup)
        assert isinstance(expert.down.linears[0], kind)
    assert isinstance(found.router.linear, FloatLinear)


@pytest.mark.parametrize("architecture", SPARSE)
def test_entries_without_a_tensor_are_no_damage(tmp_path, architecture):
    """Loaders look for them; earlier outputs have no head beside a tied embedding, either."""
    source = write(tmp_path / "float", architecture, tie_word_embeddings=True)
    out = quantized(source, tmp_path / "out", QuantType.W8A8_DYNAMIC)
    before = our_logits(out, text(9))
    (weights,) = out.glob("*.safetensors")
    stored = load_file(weights)
    del stored["lm_head.weight"]
    save_file(stored, weights)
    path = out / "quant_model_description.json"
    at = "block_sparse_moe" if architecture == MIXTRAL else "mlp"
    tags = {**json.loads(path.read_text()), f"model.layers.0.{at}.experts.weight": "W8A8_DYNAMIC"}
    path.write_text(json.dumps(tags))
    assert torch.equal(our_logits(out, text(9)), before)
    path.write_text(json.dumps({**tags, f"model.layers.0.{at}.experts.9.weight": "W8A8_DYNAMIC"}))
    with pytest.raises(CheckpointError, match=r"names in .*: got 1 missing \(model.layers.0.*experts.9.weight\)"):
        Checkpoint.open(out)


def test_the_commands(cli, tmp_path):
    source = write_model(tmp_path / "float", tiny_config(MIXTRAL))
    made = cli("quantize", source, tmp_path / "out", "--scheme", "w8a8-dynamic")
    assert made.code == 0, made.err
    assert "eightfold itself does not run" not in made.err
    words = ("--prompt", "hello", "--max-new-tokens", 3, "--backend", "reference", "--json")
    done = cli("run", tmp_path / "out", *words)
    assert (done.code, done.json()["backend"]) == (0, "reference")
    measured = cli("eval", tmp_path / "out", "--against", source, "--chunks", 1, "--chunk-len", 60,
                   "--backend", "reference", "--json")  # fmt: skip
    assert measured.code == 0, measured.err
    assert 0 < measured.json()["kl_mean"] < 0.01
