"""What the format's own library and transformers make of our exports.

Both are no dependency of ours: `pip install compressed-tensors accelerate` beside torch and transformers runs these.
"""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from eightfold.exporters import ExportOptions, plan_export
from eightfold.format.checkpoint import Checkpoint
from eightfold.model.reference.load import Decoder
from eightfold.progress import silent
from eightfold.quant.by_name import quantize_by_name
from eightfold.quant.name_plan import plan_by_name
from eightfold.quant.pipeline import quantize_checkpoint
from eightfold.quant.recipe import Recipe
from eightfold.scheme import QuantType
from tests.conftest import tiny_config, token_samples, write_model
from tests.quant.families import save_random

pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
pytest.importorskip("accelerate", reason="accelerate is not installed")
transformers = pytest.importorskip("transformers")

from compressed_tensors.compressors import BaseCompressor  # noqa: E402
from compressed_tensors.quantization import QuantizationConfig  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

W8A8, DYNAMIC, MIX, W8A16 = QuantType.W8A8, QuantType.W8A8_DYNAMIC, QuantType.W8A8_MIX, QuantType.W8A16
MIXTURE = {"modules": (("*.mlp.down_proj", W8A16), ("*.0.self_attn.o_proj", DYNAMIC)), "keep_float": ("*.1.*.o_proj",)}


@pytest.fixture
def made(tmp_path):
    """A function that quantizes a tiny Qwen2 in float32 and exports it; it returns both directories."""

    def make(scheme, *, activations=None, tied=False, **recipe):
        config = tiny_config("Qwen2ForCausalLM", hidden_size=64, torch_dtype="float32", tie_word_embeddings=tied)
        source = write_model(tmp_path / "float", config)
        quantize_checkpoint(source, tmp_path / "int8", Recipe(scheme, **recipe), token_samples())
        plan = plan_export(tmp_path / "int8", "compressed-tensors", ExportOptions(activations=activations), lossy=False)
        plan.write(tmp_path / "out", overwrite=False, progress=silent)
        return tmp_path / "int8", tmp_path / "out"

    return make


def logits_there(out, ids, **options):
    """Return what transformers computes."""
    model = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, **options).eval()
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].float()


def logits_here(directory, ids, dynamic="symmetric"):
    return Decoder(Checkpoint.open(directory), dynamic=dynamic).logits(ids)


def close(ours, theirs, most):
    """Whether two sets of logits differ by so much of their spread at most."""
    return float((ours - theirs).std() / ours.std()) < most


@pytest.mark.parametrize(
    ("scheme", "options", "most"),
    [
        # We multiply by 1 / scale where they divide, and for a token they divide by 127.5 and we by 127: inputs near
        # the middle of two integers may become either.
        (W8A8, {}, 0.02),
        (W8A8, {"tied": True}, 0.02),
        (DYNAMIC, {}, 0.02),
        (DYNAMIC, {"activations": "asymmetric"}, 0.02),
        (MIX, {}, 0.02),
        (W8A16, {}, 1e-4),
        (W8A8, MIXTURE, 0.02),
    ],
)
def test_transformers_computes_what_we_do(made, scheme, options, most):
    ours, out = made(scheme, **options)
    ids = [token for sample in token_samples() for token in sample][:48]
    expected = logits_here(ours, ids, options.get("activations", "symmetric"))
    assert close(expected, logits_there(out, ids), most)


def test_packed_offsets_are_read_when_weights_are_widened_at_load(made):
    ours, out = made(W8A16, weight_symmetric=False)
    ids = token_samples()[0]
    settings = transformers.CompressedTensorsConfig(dequantize=True)
    assert close(logits_here(ours, ids), logits_there(out, ids, quantization_config=settings), 1e-4)


def test_packed_experts_are_read(tmp_path):
    source = save_random("Qwen3Moe", tmp_path / "float")
    recipe = Recipe(W8A16, modules=(("*.experts.*", W8A16),))
    quantize_by_name(plan_by_name(source, recipe), tmp_path / "int8")
    plan = plan_export(tmp_path / "int8", "compressed-tensors", ExportOptions(), lossy=False)
    plan.write(tmp_path / "out", overwrite=False, progress=silent)
    ids = token_samples(vocab=24)[0]
    assert close(logits_here(tmp_path / "int8", ids), logits_there(tmp_path / "out", ids), 1e-4)


@pytest.mark.parametrize("is_symmetric", [True, False])
def test_the_library_unpacks_what_was_packed(made, is_symmetric):
    ours, out = made(W8A16, weight_symmetric=is_symmetric)
    config = QuantizationConfig.model_validate(json.loads((out / "config.json").read_text())["quantization_config"])
    (scheme,) = config.config_groups.values()
    stored, before = load_file(out / "model.safetensors"), load_file(next(ours.glob("*.safetensors")))
    module = "model.layers.1.mlp.up_proj"
    own = {name.rpartition(".")[2]: value for name, value in stored.items() if name.startswith(f"{module}.")}
    found = BaseCompressor.get_value_from_registry(config.format).decompress(own, scheme)["weight"]
    integers = before[f"{module}.weight"].float() - before[f"{module}.weight_offset"]
    torch.testing.assert_close(found, integers * before[f"{module}.weight_scale"], rtol=0, atol=0)


@pytest.mark.parametrize(("scheme", "recipe"), [(W8A8, MIXTURE), (DYNAMIC, {}), (W8A16, {})])
def test_the_library_takes_config_json(made, scheme, recipe):
    _, out = made(scheme, **recipe)
    raw = json.loads((out / "config.json").read_text())["quantization_config"]
    config = QuantizationConfig.model_validate(raw)
    assert config.quantization_status == "compressed"
    assert len(config.config_groups) == (3 if recipe else 1)
