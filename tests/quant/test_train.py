"""Training of scales and ranges: nearer to the float model, the same bytes each time, and nothing else changed."""

from __future__ import annotations

import re

import pytest
import torch

from eightfold.errors import ConfigError
from eightfold.format.checkpoint import Checkpoint
from eightfold.model.reference.linear import asymmetric, divided_to_int8
from eightfold.model.reference.load import Decoder
from eightfold.quant import run
from eightfold.quant.pipeline import quantize_checkpoint
from eightfold.quant.recipe import ActMethod, AntiOutlier, Recipe
from eightfold.quant.smooth import EXPONENTS
from eightfold.quant.train import through_levels, train_layer
from eightfold.scheme import QuantType
from tests.conftest import tiny_config, token_samples, write_model
from tests.quant.families import random_model

pytestmark = pytest.mark.usefixtures("one_thread")

SAMPLES = token_samples(8, vocab=64)
SMOOTH = {"anti_outlier": AntiOutlier.SMOOTH, "act_method": ActMethod.EXTREMES}


def quantized(source, out, scheme=QuantType.W8A8, **choices):
    options = {name: choices.pop(name) for name in ("memory",) if name in choices}
    outcome = quantize_checkpoint(source, out, Recipe(scheme, **{**SMOOTH, **choices}), SAMPLES, **options)
    return Checkpoint.open(out), outcome


def error(source, checkpoint):
    """Deviation of logits on the calibration samples from those of the float model, as a share of their own."""
    want, found = (
        torch.cat([Decoder(each).logits(sample) for sample in SAMPLES])
        for each in (Checkpoint.open(source), checkpoint)
    )
    return float((found - want).std() / want.std())


# Linears in one tensor; norms behind attention and MLP, gelu, a window and capped scores.
TRAINED = [("Phi3", QuantType.W8A8), ("Gemma2", QuantType.W8A8), ("Gemma2", QuantType.W8A8_DYNAMIC)]


@pytest.mark.parametrize(("family", "scheme"), TRAINED)
def test_training_comes_nearer_to_the_float_model(tmp_path, monkeypatch, family, scheme):
    source, model, chance = tmp_path / "float", random_model(family), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for values in model.parameters():
            # Layers that do something, with inputs of which some channels are larger.
            values.mul_(8 if values.dim() > 1 else torch.randn(values.shape, generator=chance).exp())
    model.save_pretrained(source)
    monkeypatch.setitem(EXPONENTS, scheme, ((0.0, 0.0), (0.0, 0.0)))  # smoothing leaves something to do
    plain, _ = quantized(source, tmp_path / "plain", scheme)
    trained, outcome = quantized(source, tmp_path / "trained", scheme, train_steps=40)
    assert error(source, trained) < (0.9 if scheme is QuantType.W8A8 else 0.97) * error(source, plain)
    notes = outcome.smoothing.choices.values()
    assert any("trained" in note for note in notes)
    kept = [float(share) for note in notes for share in re.findall("trained and (.*) of the range", note)]
    assert (len(kept) > 0) == (scheme is QuantType.W8A8)
    assert all(0.5 < share < 1.2 for share in kept)


def test_training_changes_nothing_of_the_float_model(tmp_path):
    source = write_model(tmp_path / "float", tiny_config(), tokenizer=False)
    found, outcome = quantized(source, tmp_path / "out", train_steps=20, keep_float=("*down_proj",), save_float32=True)
    assert outcome.smoothing.max_logit_difference <= 1e-5 * outcome.smoothing.max_logit
    assert not any("down" in title for title in outcome.smoothing.choices)
    assert found.quant_type("model.layers.0.mlp.down_proj") is QuantType.FLOAT


def test_the_same_bytes_again_also_from_files_and_after_a_stop(tmp_path, monkeypatch):
    source = write_model(tmp_path / "float", tiny_config(), tokenizer=False)

    def weights(name):
        return (tmp_path / name / "quant_model_weight_w8a8.safetensors").read_bytes()

    quantized(source, tmp_path / "once", train_steps=5)
    monkeypatch.setattr("eightfold.quant.budget.Budget.spills", lambda *_: True)
    train = train_layer

    def stops(decoder, layer_idx, *others):
        if layer_idx == 1:
            raise KeyboardInterrupt
        return train(decoder, layer_idx, *others)

    monkeypatch.setattr(run, "train_layer", stops)
    with pytest.raises(KeyboardInterrupt):
        quantized(source, tmp_path / "again", train_steps=5)
    monkeypatch.setattr(run, "train_layer", train)
    _, outcome = quantized(source, tmp_path / "again", train_steps=5)
    assert outcome.layers_resumed == 1
    assert weights("once") == weights("again")


def test_levels_are_those_of_the_integers_and_a_wider_range_has_the_gradient_of_its_errors():
    x = torch.randn(9, 7, generator=torch.Generator().manual_seed(0)).requires_grad_()
    lo, hi = torch.tensor(-1.5, requires_grad=True), torch.tensor(2.0, requires_grad=True)
    found = through_levels(x, lo, hi)
    scale, offset = asymmetric(lo.detach()[None], hi.detach()[None])
    integers = divided_to_int8(x.detach(), scale.expand(9)[:, None], offset.expand(9)[:, None])
    want = (integers.float() - offset) * scale
    assert torch.allclose(found, want, atol=1e-6)
    found.sum().backward()
    inside = (integers > -128) & (integers < 127)
    assert torch.equal(x.grad[inside], torch.ones(int(inside.sum())))
    assert torch.equal(x.grad[(x < lo - scale) | (x > hi + scale)].unique(), torch.zeros(1))
    errors = torch.where(inside, (want - x) / scale, integers - offset).sum() / 255
    assert torch.allclose(hi.grad, errors, atol=1e-3)
    assert torch.allclose(lo.grad, -errors, atol=1e-3)


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"anti_outlier": None}, "got no `anti_outlier`, expected smooth or rotate"),
        ({"anti_outlier": AntiOutlier.M4}, "got anti_outlier m4, expected smooth or rotate"),
        ({"act_method": ActMethod.MINMAX}, "got act_method minmax, expected extremes"),
        ({"disable_level": 2}, "got disable_level beside it"),
        ({"train_steps": -1}, "got -1, expected 0 or more"),
    ],
)
def test_what_cannot_be_trained_is_refused(choices, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        Recipe(QuantType.W8A8, **{**SMOOTH, "train_steps": 1, **choices})
