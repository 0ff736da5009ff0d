"""The whole quantizer against msModelSlim's checkpoints of SmolLM2: smoothing, cache, attention, roll-back.

Needs EIGHTFOLD_GOLDEN, EIGHTFOLD_SMOL and EIGHTFOLD_BOOLQ. What is measured on the float model agrees to rounding. What
is measured while the linears are quantized (FAQuant's ranges, input_scale) is chaotic: a changed last bit tips an
integer, and a few layers later most differ. There the first layer is compared closely, and all layers with products
summed as the reference sums them, of dequantized float32 values and one sample after the other.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from eightfold.format.checkpoint import Checkpoint
from eightfold.quant.dataset import read_rows, tokenize
from eightfold.quant.pipeline import quantize_checkpoint
from eightfold.quant.recipe import ActMethod, AntiOutlier, KVObserve, Recipe
from eightfold.scheme import QuantType
from eightfold.tokenizer import Tokenizer

pytestmark = [pytest.mark.golden, pytest.mark.slow]


def made(tmp_path: Path, smol: Path, limit: int | None = None, **choices) -> Checkpoint:
    calibration = os.environ.get("EIGHTFOLD_BOOLQ")
    if not calibration:
        pytest.skip("EIGHTFOLD_BOOLQ is not set")
    source = smol / "smol-fp16"
    samples = tokenize(read_rows(Path(calibration), limit), Tokenizer(source))
    quantize_checkpoint(source, tmp_path / "out", Recipe(QuantType.W8A8, save_float32=True, **choices), samples)
    return Checkpoint.open(tmp_path / "out")


def require_same_description(checkpoint: Checkpoint, golden: Path, name: str) -> dict[str, np.ndarray]:
    """Compare entries, their order, dtypes and shapes; return the reference's small tensors."""
    theirs = json.loads((golden / "descriptions" / f"{name}.json").read_text())
    ours = json.loads((checkpoint.directory / "quant_model_description.json").read_text())
    assert list(ours.items()) == list(theirs.items())
    tensors = load_file(golden / "tensors" / f"{name}.safetensors")
    for tensor, values in tensors.items():
        mine = checkpoint.array(tensor)
        assert (mine.dtype, mine.shape) == (values.dtype, values.shape), tensor
    return tensors


def relative(checkpoint: Checkpoint, tensors: dict[str, np.ndarray], *endings: str) -> np.ndarray:
    """Return the relative differences of all tensors whose names end so, by tensor: the worst of each."""
    names = [name for name in tensors if name.endswith(endings)]
    assert names
    return np.array([np.abs(checkpoint.array(name) / tensors[name] - 1).max() for name in names])


@pytest.mark.parametrize("is_symmetric", [True, False])
def test_cache_parameters(tmp_path, golden, smol, is_symmetric):
    choices = {"kv_int8": True, "kv_symmetric": is_symmetric, "kv_observe": KVObserve.PRE_ROPE}
    checkpoint = made(tmp_path, smol, **choices)
    tensors = require_same_description(checkpoint, golden, f"kv-int8-{'sym' if is_symmetric else 'asym'}")
    assert relative(checkpoint, tensors, "kv_cache_scale").max() <= 1e-4
    offsets = [name for name in tensors if name.endswith("kv_cache_offset")]
    assert len(offsets) == 60
    assert all(np.array_equal(checkpoint.array(name), tensors[name]) for name in offsets)


def test_attention_parameters(tmp_path, golden, smol):
    checkpoint = made(tmp_path, smol, fa_quant=True)
    tensors = require_same_description(checkpoint, golden, "fa-quant")
    first = {name: value for name, value in tensors.items() if name.startswith("model.layers.0.self_attn.fa_")}
    assert relative(checkpoint, first, ".scale").max() <= 1e-4


def test_attention_parameters_with_the_reference_products(tmp_path, golden, smol, float_products):
    checkpoint = made(tmp_path, smol, fa_quant=True)
    tensors = require_same_description(checkpoint, golden, "fa-quant")
    scales = [name for name in tensors if ".self_attn.fa_" in name and name.endswith(".scale")]
    apart = np.concatenate([np.abs(checkpoint.array(name) / tensors[name] - 1).ravel() for name in scales])
    assert len(apart) == 30 * 15
    print("median", np.median(apart), "worst", apart.max())
    assert np.median(apart) <= 0.0025
    assert apart.max() <= 0.05


def test_histogram_ranges(tmp_path, golden, smol):
    checkpoint = made(tmp_path, smol, act_method=ActMethod.HISTOGRAM)
    tensors = require_same_description(checkpoint, golden, "w8a8-act2")
    first = {name: value for name, value in tensors.items() if name.startswith("model.layers.0.self_attn.q_proj")}
    assert relative(checkpoint, first, "input_scale").max() <= 1e-4


def test_histogram_ranges_with_the_reference_products(tmp_path, golden, smol, float_products):
    checkpoint = made(tmp_path, smol, act_method=ActMethod.HISTOGRAM)
    tensors = require_same_description(checkpoint, golden, "w8a8-act2")
    apart = relative(checkpoint, tensors, "input_scale")
    assert len(apart) == 210
    print("within 2 %", (apart <= 0.02).sum(), "worst", apart.max())
    assert (apart <= 0.02).sum() >= 200


# One of 60 groups is smoothed by another threshold in m2, one of 120 by other exponents in m6: near-ties.
@pytest.mark.parametrize(("method", "differing"), [("m1", 0), ("m2", 1), ("m3", 0), ("m4", 0), ("m5", 0), ("m6", 1)])
def test_smoothed_weights(tmp_path, golden, smol, method, differing):
    checkpoint = made(tmp_path, smol, 8 if method == "m6" else None, anti_outlier=AntiOutlier(method))
    tensors = require_same_description(checkpoint, golden, f"w8a8-{method}")
    assert (relative(checkpoint, tensors, "norm.weight") > 1e-4).sum() <= differing
    integers = load_file(golden / "tensors" / f"w8a8-{method}.int8.safetensors")
    if method == "m6":  # the near-tie is in the first of these
        integers = {name: values for name, values in integers.items() if "layers.0.self_attn." not in name}
    apart = [np.abs(checkpoint.array(name).astype(int) - values) for name, values in integers.items()]
    assert max(int(difference.max()) for difference in apart) <= 1
    assert sum(int((difference > 0).sum()) for difference in apart) <= 1e-3 * sum(d.size for d in apart)


def test_exact_levels(tmp_path, golden, smol):
    checkpoint = made(tmp_path, smol, disable_level=5, exact_levels=True)
    require_same_description(checkpoint, golden, "w8a8-L5")
