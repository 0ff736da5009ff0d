"""The quantizer on another device than the CPU.

Device `meta` holds shapes, no values, and does not mix with the CPU: all that a layer is made of must be there.
The whole pipeline runs where there is a CUDA device: the same files but for the last bits of observed ranges.
"""

from __future__ import annotations

import pytest
import torch

from eightfold.format.checkpoint import Checkpoint
from eightfold.model.reference.decoder import apply_block_
from eightfold.model.reference.load import Decoder
from eightfold.model.reference.tensors import load_tensor, use
from eightfold.quant.pipeline import quantize_checkpoint
from eightfold.quant.recipe import ActMethod, AntiOutlier, KVObserve, Recipe
from eightfold.scheme import QuantType
from tests.conftest import token_samples

pytestmark = pytest.mark.usefixtures("one_thread")

SAMPLES = token_samples(4)

RECIPES = {
    **{method.value: Recipe(QuantType.W8A8, anti_outlier=method) for method in AntiOutlier},
    **{act.value: Recipe(QuantType.W8A8, act_method=act) for act in (ActMethod.HISTOGRAM, ActMethod.AUTO)},
    "w8a16": Recipe(QuantType.W8A16, weight_symmetric=False),
    "dynamic": Recipe(QuantType.W8A8_DYNAMIC),
    "mix": Recipe(QuantType.W8A8_MIX, quantize_lm_head=True),
    "fa": Recipe(QuantType.W8A8, fa_quant=True, fa_amp=1),
    "kv": Recipe(QuantType.W8A16, kv_int8=True),
    "kv pre-rope": Recipe(QuantType.W8A8, kv_int8=True, kv_symmetric=False, kv_observe=KVObserve.PRE_ROPE),
    "level": Recipe(QuantType.W8A8, disable_level=2),
}


@pytest.mark.parametrize("name", RECIPES)
def test_all_of_a_layer_is_on_the_device(name, float_model, tmp_path, monkeypatch):
    quantize_checkpoint(float_model, tmp_path / "out", RECIPES[name], SAMPLES)
    monkeypatch.setattr(torch.Tensor, "__bool__", lambda tensor: True)  # "is it finite?" has no answer there
    decoder = Decoder(Checkpoint.open(tmp_path / "out"))
    for origin in ("prompt", "generated"):
        with use(torch.device("meta")):
            hidden = decoder.embed(SAMPLES[0])
            apply_block_(decoder.block(0), hidden, [len(SAMPLES[0])], decoder.turns(), origin)
        assert hidden.device.type == "meta"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", RECIPES)
def test_a_gpu_writes_what_the_cpu_writes(name, float_model, tmp_path):
    for device in ("cpu", "cuda"):
        quantize_checkpoint(float_model, tmp_path / device, RECIPES[name], SAMPLES, device=torch.device(device))
    cpu, cuda = (Checkpoint.open(tmp_path / device) for device in ("cpu", "cuda"))
    assert list(cpu.tensors) == list(cuda.tensors)
    for tensor in cpu.tensors:
        want, got = load_tensor(cpu, tensor), load_tensor(cuda, tensor)
        assert got.dtype == want.dtype
        if want.dtype == torch.int8:
            # A value within the last bits of a boundary may fall to either side.
            assert (got.int() - want.int()).abs().max() <= 1
            assert (got != want).float().mean() <= 0.01
        elif want.is_floating_point():
            # A differing rounding of one activation moves ranges behind it by a quantization step: 1 % of them.
            torch.testing.assert_close(got, want, rtol=0.02, atol=1e-6)
