"""Layer by layer over all samples equals sample by sample through the whole fake-quantized model."""

from __future__ import annotations

import pytest
import torch

from eightfold.errors import InputError
from eightfold.families import input_groups
from eightfold.format.checkpoint import Checkpoint
from eightfold.model.reference.decoder import Batch, LinearGroup
from eightfold.model.reference.linear import asymmetric
from eightfold.model.reference.load import Decoder
from eightfold.model.reference.tensors import load_float32, load_tensor
from eightfold.quant.calibrate import MeanMinMax
from eightfold.quant.pipeline import quantize_checkpoint
from eightfold.quant.qparams import quantize_weight
from eightfold.quant.recipe import Recipe
from eightfold.scheme import QuantType
from tests.conftest import FAMILIES, tiny_config, token_samples, write_model


class NaiveGroup:
    """Fake quantization as the reference tool does it: one sample at a time, in float32, running means."""

    def __init__(self, weights, biases):
        self.weights, self.biases = weights, biases
        self.los, self.his = [], []

    def params(self):
        lo = min(sum(self.los) / len(self.los), 0.0)
        hi = max(sum(self.his) / len(self.his), 0.0)
        scale = torch.tensor((hi - lo) / 255, dtype=torch.float32)
        return scale, torch.round(-torch.tensor(lo, dtype=torch.float32) / scale) - 128

    def __call__(self, x, batch):
        self.los.append(x.min().item())
        self.his.append(x.max().item())
        scale, offset = self.params()
        fake = (torch.clamp(torch.round(x / scale + offset), -128, 127) - offset) * scale
        return tuple(torch.nn.functional.linear(fake, w, b) for w, b in zip(self.weights, self.biases, strict=True))


def naive_parameters(checkpoint, samples):
    """Return scale and offset of each group of each layer."""
    decoder = Decoder(checkpoint)
    layers = []
    for layer_idx in range(checkpoint.config.num_layers):
        groups = []
        for group in input_groups(checkpoint.config, layer_idx):
            names = [f"model.layers.{layer_idx}.{linear.name}" for linear in group.linears]
            quantized = [
                quantize_weight(load_float32(checkpoint, f"{name}.weight"), is_symmetric=True) for name in names
            ]
            weights = [weight.values.float() * weight.scale for weight in quantized]
            biases = [
                load_float32(checkpoint, f"{name}.bias") if f"{name}.bias" in checkpoint.tensors else None
                for name in names
            ]
            groups.append(NaiveGroup(weights, biases))
        layers.append(groups)
    with torch.inference_mode():
        for sample in samples:
            x = decoder.embed(sample)
            batch = Batch.of([len(sample)], decoder.turns())
            for layer_idx, groups in enumerate(layers):
                block = decoder.block(layer_idx)
                names = ("qkv", "o", "gate_up", "down")  # type: ignore[assignment]
                for name, group in zip(names, groups, strict=True):  # type: ignore[assignment]
                    object.__setattr__(block if hasattr(block, name) else block.mlp, name, group)
                x = block(x, batch)
    return [[group.params() for group in groups] for groups in layers]


@pytest.mark.parametrize("architecture", FAMILIES)
def test_layer_by_layer_equals_sample_by_sample(tmp_path, architecture):
    source = write_model(tmp_path / "float", tiny_config(architecture))
    samples = token_samples()
    recipe = Recipe(QuantType.W8A8, save_float32=True)
    quantize_checkpoint(source, tmp_path / "out", recipe, samples)
    made, naive = Checkpoint.open(tmp_path / "out"), naive_parameters(Checkpoint.open(source), samples)
    for layer_idx, groups in enumerate(naive):
        for group, (scale, offset) in zip(input_groups(made.config, layer_idx), groups, strict=True):
            for linear in group.linears:
                module = f"model.layers.{layer_idx}.{linear.name}"
                # Integer sums against float32 ones differ by 1e-6, which can flip the rounding of single values:
                # one flip in K >= 48 moves an output by about 1/255/sqrt(48) of its size, well below 2 %.
                assert load_tensor(made, f"{module}.input_scale").item() == pytest.approx(scale.item(), rel=0.02)
                assert load_tensor(made, f"{module}.input_offset").item() == pytest.approx(offset.item(), abs=3)


def test_first_input_is_observed_exactly(tmp_path, float_model):
    # Nothing is quantized before the first q/k/v, so its parameters are those of the float model to the last bit.
    samples = token_samples()
    quantize_checkpoint(float_model, tmp_path / "out", Recipe(QuantType.W8A8, save_float32=True), samples)
    (scale, offset), *_ = naive_parameters(Checkpoint.open(float_model), samples)[0]
    made = Checkpoint.open(tmp_path / "out")
    assert load_tensor(made, "model.layers.0.self_attn.q_proj.input_scale").item() == pytest.approx(
        scale.item(), rel=1e-6
    )
    assert load_tensor(made, "model.layers.0.self_attn.q_proj.input_offset").item() == offset.item()


def test_upstream_quantization_changes_what_is_observed(tmp_path, float_model):
    # The observers of layer 1 must see layer 0 quantized: keeping layer 0 float gives other parameters.
    samples = token_samples()
    quantize_checkpoint(float_model, tmp_path / "a", Recipe(QuantType.W8A8, save_float32=True), samples)
    kept = Recipe(QuantType.W8A8, keep_float=("model.layers.0.*",), save_float32=True)
    quantize_checkpoint(float_model, tmp_path / "b", kept, samples)
    name = "model.layers.1.mlp.down_proj.input_scale"
    a, b = (load_tensor(Checkpoint.open(tmp_path / d), name).item() for d in "ab")
    assert a != b
    assert a == pytest.approx(b, rel=0.1)


def test_float_groups_are_not_observed():
    # A group with nothing to quantize is the plain one.
    group = LinearGroup((lambda x: x + 1,))
    assert group(torch.ones(1, 2), None)[0].tolist() == [[2.0, 2.0]]


# --- activation method 1: the mean of each sample's extremes, as far as samples have been seen

TOKENS = torch.tensor([[-1.0, 5.0], [0.0, 3.0], [-4.0, 2.0], [2.0, 9.0]])  # four tokens
SPANS = [(0, 1), (1, 3), (3, 4)]  # three samples: extremes (-1, 5), (-4, 3), (2, 9)


def expected(los, his):
    scale, offset = asymmetric(torch.tensor(los).mean()[None], torch.tensor(his).mean()[None])
    return scale.item(), offset.item()


def test_final_parameters_come_from_means_and_not_extremes():
    observer = MeanMinMax("x")
    observer.update(TOKENS, SPANS)
    scale, offset = observer.params()
    assert (scale.item(), offset.item()) == expected([-1.0, -4.0, 2.0], [5.0, 3.0, 9.0])
    assert (scale.item(), offset.item()) != expected([-4.0], [9.0])


def test_each_sample_gets_the_parameters_of_its_moment():
    scale, offset = MeanMinMax("x").update(TOKENS, SPANS)
    assert scale.shape == offset.shape == (4, 1)
    first, second = expected([-1.0], [5.0]), expected([-1.0, -4.0], [5.0, 3.0])
    assert (scale[0].item(), offset[0].item()) == first
    assert (scale[1].item(), offset[1].item()) == second == (scale[2].item(), offset[2].item())


def test_cutting_the_samples_into_calls_changes_nothing():
    whole, parts = MeanMinMax("x"), MeanMinMax("x")
    scale, offset = whole.update(TOKENS, SPANS)
    pieces = [parts.update(TOKENS[:1], [(0, 1)]), parts.update(TOKENS[1:], [(0, 2), (2, 3)])]
    assert torch.equal(scale, torch.cat([piece[0] for piece in pieces]))
    assert torch.equal(offset, torch.cat([piece[1] for piece in pieces]))
    assert whole.params()[0].item() == parts.params()[0].item()


def test_a_sample_that_is_not_finite_is_named():
    observer = MeanMinMax("model.layers.3.qkv")
    observer.update(TOKENS[:1], [(0, 1)])
    broken = torch.tensor([[0.0, 1.0], [float("nan"), 1.0]])
    with pytest.raises(InputError, match=r"input of model\.layers\.3\.qkv in calibration sample 2 .*finite numbers"):
        observer.update(broken, [(0, 1), (1, 2)])
