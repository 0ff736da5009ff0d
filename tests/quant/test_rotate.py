"""Rotations: orthogonal, the same each time, and without a trace in the logits of the float model."""

from __future__ import annotations

import json

import pytest
import torch

from eightfold.errors import UnsupportedError
from eightfold.families import all_norms
from eightfold.format.checkpoint import Checkpoint
from eightfold.model.reference.load import Decoder
from eightfold.model.reference.tensors import load_tensor
from eightfold.quant.orthogonal import paley, random_orthogonal
from eightfold.quant.pipeline import quantize_checkpoint
from eightfold.quant.recipe import ActMethod, AntiOutlier, Recipe, Target
from eightfold.quant.rotate import RotatedCheckpoint
from eightfold.scheme import QuantType
from tests.conftest import tiny_config, token_samples, write_model

pytestmark = pytest.mark.usefixtures("one_thread")

SAMPLES = token_samples(4)


def recipe(scheme=QuantType.W8A8, **options):
    return Recipe(scheme, anti_outlier=AntiOutlier.ROTATE, act_method=ActMethod.EXTREMES, **options)


# The matrices.

# Powers of two, one small Hadamard matrix beside them (12, 20, 28, 36), and none: 13 and 15 have a random part.
SIZES = [1, 2, 16, 48, 64, 80, 128, 256, 576, 896, 15, 52]


def matrix(size, seed=0):
    return random_orthogonal(size, seed).columns(torch.eye(size))


@pytest.mark.parametrize("size", SIZES)
def test_rotations_are_orthogonal(size):
    q = matrix(size).double()
    assert (q @ q.T - torch.eye(size)).abs().max() < 3e-6
    # One loud channel reaches all others alike, unless a part is random.
    is_even = size not in (15, 52)
    assert not is_even or (q.abs() - size**-0.5).abs().max() < 1e-6


@pytest.mark.parametrize("size", [4, 12, 20, 24, 28, 36, 44, 60, 104])
def test_paley_matrices_are_hadamard_matrices(size):
    found = paley(size)
    assert torch.equal(found.abs(), torch.ones(size, size))
    assert torch.equal(found @ found.T, size * torch.eye(size))


def test_where_paley_has_none_there_is_none():
    assert paley(52) is None and paley(6) is None


def test_a_seed_is_a_rotation():
    assert torch.equal(matrix(48), matrix(48))
    assert not torch.equal(matrix(48), matrix(48, seed=1))
    random_orthogonal.cache_clear()
    assert torch.equal(matrix(15), matrix(15))


def test_rows_are_rotated_by_the_transpose_and_runs_of_channels_alike():
    q, x = random_orthogonal(12, 0), torch.randn(24, 5, generator=torch.Generator().manual_seed(0))
    whole = torch.block_diag(matrix(12), matrix(12))
    torch.testing.assert_close(q.rows(x[:12]), matrix(12).T @ x[:12])
    torch.testing.assert_close(q.columns(x.T), x.T @ whole)
    torch.testing.assert_close(q.rows(x[:12, 0]), matrix(12).T @ x[:12, 0])


# The float model.

MODELS = {
    "untied": tiny_config(torch_dtype="float32"),
    "tied": tiny_config(torch_dtype="float32", tie_word_embeddings=True),
    "biases": tiny_config(torch_dtype="float32", attention_bias=True, mlp_bias=True),
    "one head each": tiny_config(torch_dtype="float32", num_key_value_heads=4),
    "sizes without a Hadamard matrix": tiny_config(torch_dtype="float32", hidden_size=52, head_dim=26),
    "qwen2": tiny_config("Qwen2ForCausalLM", torch_dtype="float32", head_dim=12),
    "qwen3": tiny_config("Qwen3ForCausalLM", torch_dtype="float32"),
    "mistral": tiny_config("MistralForCausalLM", torch_dtype="float32"),
    "one tensor of q, k and v": tiny_config("Phi3ForCausalLM", torch_dtype="float32"),
    "rows by heads": tiny_config("InternLM2ForCausalLM", torch_dtype="float32"),
    "granite": tiny_config(
        "GraniteForCausalLM", torch_dtype="float32", embedding_multiplier=3.0, residual_multiplier=0.5
    ),
    "bfloat16": tiny_config("Qwen2ForCausalLM", tie_word_embeddings=True),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {name: write_model(folder / name, config, tokenizer=False) for name, config in MODELS.items()}


def logits(checkpoint):
    return Decoder(checkpoint).logits(SAMPLES[0])


@pytest.mark.parametrize("name", MODELS)
def test_the_float_model_has_the_same_logits(models, name):
    source = Checkpoint.open(models[name])
    rotated = RotatedCheckpoint(source)
    want = logits(source)
    torch.testing.assert_close(logits(rotated), want, rtol=0, atol=1e-5 * float(want.abs().max()))
    # And they are other weights.
    layer = source.config.names.layer(1)
    for linear in (f"{layer}{source.config.names.down}", f"{layer}{source.config.names.o}", source.config.names.head):
        stored = source.head_weight() if linear == source.config.names.head else f"{linear}.weight"
        assert (load_tensor(rotated, f"{linear}.weight") - load_tensor(source, stored).float()).abs().max() > 0.1


def test_a_rotation_hides_a_loud_channel(models):
    source = Checkpoint.open(models["untied"])
    loud = torch.zeros(1, 48)
    loud[0, 7] = 1000.0
    spread = random_orthogonal(48, 0).columns(loud)
    assert spread.abs().max() < 1000 / 6.9  # sqrt(48)
    name = "model.layers.0.self_attn.q_proj.weight"
    gain = load_tensor(source, "model.layers.0.input_layernorm.weight")
    want = (loud * gain) @ load_tensor(source, name).T
    torch.testing.assert_close(spread @ load_tensor(RotatedCheckpoint(source), name).T, want, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("name", ["tied", "biases", "one tensor of q, k and v"])
def test_what_is_written_is_a_plain_untied_model(models, tmp_path, name):
    quantize_checkpoint(models[name], tmp_path / "out", recipe(keep_float=("*",)), SAMPLES)
    out, source = Checkpoint.open(tmp_path / "out"), Checkpoint.open(models[name])
    want = logits(source)
    torch.testing.assert_close(logits(out), want, rtol=0, atol=1e-5 * float(want.abs().max()))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    assert all((load_tensor(out, f"{norm}.weight") == 1).all() for norm in all_norms(out.config))
    head = load_tensor(out, f"{out.config.names.head}.weight")
    assert head.shape == (320, 48)
    assert not torch.equal(head, load_tensor(out, f"{out.config.names.embedding}.weight"))


# The quantized one.


def made(source, folder, scheme=QuantType.W8A8, **options):
    quantize_checkpoint(source, folder, recipe(scheme, **options), SAMPLES)
    return Checkpoint.open(folder)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("scheme", "options"),
    [
        (QuantType.W8A8, {"target": Target.MINDIE}),
        (QuantType.W8A8, {"target": Target.CPU, "kv_int8": True}),
        (QuantType.W8A8, {"quantize_lm_head": True, "fa_quant": True}),
        (QuantType.W8A8_DYNAMIC, {"disable_level": 1}),
        (QuantType.W8A16, {}),
    ],
)
def test_a_rotated_model_in_int8_is_near_float(models, tmp_path, scheme, options):
    out = made(models["bfloat16"], tmp_path / "out", scheme, **options)
    found, want = logits(out), logits(Checkpoint.open(models["bfloat16"]))
    assert float((found - want).std() / want.std()) < 0.2
    proof = json.loads((tmp_path / "out" / "eightfold_report.json").read_text())["anti_outlier"]
    assert 0 <= proof["max_logit_difference"] < 1e-4 * proof["max_logit"]


def test_two_runs_and_a_resumed_one_give_the_same_bytes(models, tmp_path, monkeypatch):
    from eightfold.quant import run

    source = models["bfloat16"]
    made(source, tmp_path / "a")
    random_orthogonal.cache_clear()
    made(source, tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")

    quantize_layer = run.Run._quantize_layer

    def stopped(self, layer_idx, *others):
        if layer_idx == 1:
            raise KeyboardInterrupt
        quantize_layer(self, layer_idx, *others)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(run.Run, "_quantize_layer", stopped)
        made(source, tmp_path / "c")
    made(source, tmp_path / "c")
    assert contents(tmp_path / "a") == contents(tmp_path / "c")


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        (tiny_config("Olmo2ForCausalLM"), "norms behind attention and MLP"),
        (tiny_config("Gemma2ForCausalLM"), "norms behind attention and MLP"),
        (tiny_config("Qwen3MoeForCausalLM"), "experts, whose router reads a norm as it is"),
    ],
)
def test_models_that_cannot_be_rotated_are_refused(tmp_path, config, problem):
    source = write_model(tmp_path / "source", config, tokenizer=False)
    with pytest.raises(UnsupportedError, match=problem) as refused:
        made(source, tmp_path / "out", QuantType.W8A8_DYNAMIC)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()
