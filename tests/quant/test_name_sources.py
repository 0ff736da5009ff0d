"""Sources that are quantized: what float8, int8 and 4-bit weights mean, and what is refused of them."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from eightfold.format.checkpoint import Checkpoint
from eightfold.quant.qparams import quantize_weight
from tests.conftest import tiny_config, write_model
from tests.quant.named import DYNAMIC, change, config_of, quantize, refusal, save, tags_of, tensors_of
from tests.refusal import error_line

pytestmark = pytest.mark.usefixtures("one_thread")


def fp8_blocks(weight: torch.Tensor, size: int = 128) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return a weight as float8 with a scale for each block, the scales, and what they mean in float32."""
    n, k = weight.shape
    grid = (-(-n // size), -(-k // size))
    padded = torch.zeros(grid[0] * size, grid[1] * size)
    padded[:n, :k] = weight.float()
    blocks = padded.view(grid[0], size, grid[1], size)
    scale = blocks.abs().amax((1, 3)) / 448
    stored = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn)
    wide = (stored.float() * scale[:, None, :, None]).view_as(padded)[:n, :k].contiguous()
    return stored.view(torch.float8_e4m3fn).reshape(padded.shape)[:n, :k].contiguous(), scale, wide


@pytest.fixture
def fp8(tmp_path, saved):
    """A DeepSeek in float8, sides no multiples of the blocks, scales in other files; and its wide float32 weights."""
    tensors, wide = {}, {}
    for name, tensor in tensors_of(saved("DeepseekV3")).items():
        is_linear = tensor.dim() == 2 and "layers" in name and not name.endswith("mlp.gate.weight")
        if is_linear:
            stored, scale, wide[name] = fp8_blocks(tensor, 20)
            tensors.update({name: stored, name + "_scale_inv": scale})
        else:
            tensors[name] = tensor
    config = {
        **config_of(saved("DeepseekV3")),
        "quantization_config": {"quant_method": "fp8", "weight_block_size": [20, 20]},
    }
    return save(tmp_path / "fp8", tensors, config, parts=3), wide


def test_float8_blocks_are_widened_in_float32(tmp_path, fp8):
    source, wide = fp8
    quantize(source, tmp_path / "out")
    made, tags = tensors_of(tmp_path / "out"), tags_of(tmp_path / "out")
    assert not [name for name in made if name.endswith("_scale_inv")]
    assert Counter(tensor.dtype for tensor in made.values()).keys() == {torch.int8, torch.float32, torch.bfloat16}
    for name, weight in wide.items():
        if tags[name] == "FLOAT":
            assert name.endswith("kv_b_proj.weight")
            assert made[name].equal(weight.to(torch.bfloat16))
        else:
            assert made[name].equal(quantize_weight(weight, is_symmetric=True).values)
    assert "quantization_config" not in config_of(tmp_path / "out")


def test_a_family_with_an_engine_in_float8_can_run(cli, tmp_path):
    config = {
        **tiny_config("Qwen3ForCausalLM"),
        "quantization_config": {"quant_method": "fp8", "weight_block_size": [32, 32]},
    }
    source = write_model(tmp_path / "m", config)
    tensors = tensors_of(source)
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        tensors[name], tensors[f"{name}_scale_inv"], _ = fp8_blocks(tensors[name], 32)
    save(source, tensors, config)
    assert cli("quantize", source, tmp_path / "out", "--scheme", "w8a8-dynamic").code == 0
    assert Checkpoint.open(tmp_path / "out").quant_type("model.layers.1.mlp.up_proj") is DYNAMIC
    done = cli("run", tmp_path / "out", "--prompt", "a", "--max-new-tokens", 3, "--backend", "reference")
    assert done.code == 0
    assert "3 tokens" in done.err
    assert "quantization_config" in error_line(cli("quantize", source, tmp_path / "b", "--scheme", "w8a8"))


def test_power_of_two_scales(tmp_path, saved):
    source, at = saved("Glm4Moe"), "model.layers.0.self_attn.o_proj.weight"
    tensors = tensors_of(source)
    exponents = torch.tensor([[120], [131]], dtype=torch.uint8)
    stored = torch.randn(32, 32).to(torch.float8_e4m3fn)
    config = {**config_of(source), "quantization_config": {"weight_block_size": [16, 32]}}
    save(tmp_path / "m", {**tensors, at: stored, at + "_scale_inv": exponents}, config)
    quantize(tmp_path / "m", tmp_path / "out")
    scale = torch.tensor([2.0**-7, 2.0**4]).repeat_interleave(16)[:, None]
    expected = quantize_weight(stored.float() * scale, is_symmetric=True)
    assert tensors_of(tmp_path / "out")[at].equal(expected.values)


def test_a_scale_for_each_channel_and_one_for_all(tmp_path, saved):
    source, at = saved("Glm4Moe"), "model.layers.0.self_attn"
    stored, scale = torch.randn(32, 32).to(torch.float8_e4m3fn), torch.rand(32, 1) + 0.5
    changes = {
        f"{at}.o_proj.weight": stored,
        f"{at}.o_proj.weight_scale": scale.to(torch.bfloat16),
        f"{at}.q_proj.weight": stored,
        f"{at}.q_proj.weight_scale": torch.tensor(0.25),
    }
    save(tmp_path / "m", {**tensors_of(source), **changes}, config_of(source))
    quantize(tmp_path / "m", tmp_path / "out")
    made = tensors_of(tmp_path / "out")
    for name, factor in (("o_proj", scale.to(torch.bfloat16).float()), ("q_proj", 0.25)):
        assert made[f"{at}.{name}.weight"].equal(quantize_weight(stored.float() * factor, is_symmetric=True).values)


def test_int8_weights_are_taken_over_as_they_are(tmp_path, saved):
    source, changes = saved("DeepseekV3"), {}
    stored, scale = torch.randint(-128, 128, (16, 32), dtype=torch.int8), torch.rand(16, 1).to(torch.bfloat16)
    at = "model.layers.0.self_attn"
    changes = {f"{at}.q_a_proj.weight": stored, f"{at}.q_a_proj.weight_scale": scale}
    kv = torch.randint(-128, 128, (64, 16), dtype=torch.int8)
    changes |= {f"{at}.kv_b_proj.weight": kv, f"{at}.kv_b_proj.weight_scale": torch.full((64, 1), 0.5)}
    save(tmp_path / "m", {**tensors_of(source), **changes}, config_of(source))
    quantize(tmp_path / "m", tmp_path / "out")
    made = tensors_of(tmp_path / "out")
    assert made[f"{at}.q_a_proj.weight"].equal(stored)
    assert made[f"{at}.q_a_proj.weight_scale"].equal(scale.float())
    assert not made[f"{at}.q_a_proj.weight_offset"].any()
    assert made[f"{at}.kv_b_proj.weight"].equal((kv * 0.5).to(torch.bfloat16))


def test_both_halves_of_a_joined_float8_weight_have_their_own_scales(tmp_path, saved):
    source, at = saved("Glm4"), "model.layers.0.mlp"
    stored, scale, wide = fp8_blocks(torch.randn(96, 32) * torch.arange(1, 97)[:, None], 16)
    changes = {f"{at}.gate_up_proj.weight": stored, f"{at}.gate_up_proj.weight_scale_inv": scale}
    config = {**config_of(source), "quantization_config": {"weight_block_size": [16, 16]}}
    save(tmp_path / "m", {**tensors_of(source), **changes}, config)
    quantize(tmp_path / "m", tmp_path / "out")
    made, expected = tensors_of(tmp_path / "out"), quantize_weight(wide, is_symmetric=True)
    for suffix, values in (("weight", expected.values), ("weight_scale", expected.scale)):
        assert torch.cat([made[f"{at}.gate_proj.{suffix}"], made[f"{at}.up_proj.{suffix}"]]).equal(values)


# --- experts in one tensor

EXPERTS = "model.layers.1.mlp.experts"


def stacked(tmp_path, saved, changes, **config):
    """Save a Qwen3-MoE whose experts of layer 1 are what is given."""
    tensors = {name: t for name, t in tensors_of(saved("Qwen3Moe")).items() if not name.startswith(EXPERTS)}
    return save(tmp_path / "m", {**tensors, **changes}, {**config_of(saved("Qwen3Moe")), **config})


def require_experts(out, joined, down):
    """Assert that experts are what (E, 2I, H) and (E, H, I) float32 become."""
    made = tensors_of(out)
    for e in range(len(joined)):
        names = [f"{EXPERTS}.{e}.{name}_proj" for name in ("gate", "up", "down")]
        for name, wide in zip(names, (*joined[e].chunk(2), down[e]), strict=True):
            expected = quantize_weight(wide.contiguous(), is_symmetric=True)
            assert made[f"{name}.weight"].equal(expected.values)
            assert made[f"{name}.weight_scale"].equal(expected.scale)


@pytest.mark.parametrize("is_input_major", [False, True])
@pytest.mark.parametrize("suffix", ["", ".weight"])
def test_stacked_experts_in_float8_blocks(tmp_path, saved, is_input_major, suffix):
    changes, wide = {}, {}
    for name, n, k in (("gate_up_proj", 48, 32), ("down_proj", 32, 24)):
        shape = (4, k, n) if is_input_major else (4, n, k)
        found = [fp8_blocks(each, 20) for each in torch.randn(shape) * torch.arange(1, 5)[:, None, None]]
        stored, scale, meant = (torch.stack(part) for part in zip(*found, strict=True))
        wide[name] = meant.mT if is_input_major else meant
        changes |= {f"{EXPERTS}.{name}{suffix}": stored, f"{EXPERTS}.{name}{suffix}_scale_inv": scale}
    source = stacked(tmp_path, saved, changes, quantization_config={"weight_block_size": [20, 20]})
    quantize(source, tmp_path / "out")
    require_experts(tmp_path / "out", wide["gate_up_proj"], wide["down_proj"])


def test_stacked_experts_with_a_scale_for_each_row_or_expert(tmp_path, saved):
    joined, down = (torch.randn(shape).to(torch.float8_e4m3fn) for shape in ((4, 48, 32), (4, 32, 24)))
    rows, each = torch.rand(4, 48, 1) + 0.5, torch.rand(4) + 0.5
    changes = {f"{EXPERTS}.gate_up_proj": joined, f"{EXPERTS}.gate_up_proj_scale": rows.to(torch.bfloat16)}
    changes |= {f"{EXPERTS}.down_proj": down, f"{EXPERTS}.down_proj_scale": each}
    quantize(stacked(tmp_path, saved, changes), tmp_path / "out")
    wide = joined.float() * rows.to(torch.bfloat16).float()
    require_experts(tmp_path / "out", wide, down.float() * each[:, None, None])


def test_stacked_experts_in_int8_are_taken_over(tmp_path, saved):
    joined = torch.randint(-128, 128, (4, 48, 32), dtype=torch.int8)
    down, scale = torch.randint(-128, 128, (4, 32, 24), dtype=torch.int8), torch.rand(4, 48, 1) + 0.5
    changes = {f"{EXPERTS}.gate_up_proj": joined, f"{EXPERTS}.gate_up_proj_scale": scale}
    changes |= {f"{EXPERTS}.down_proj": down, f"{EXPERTS}.down_proj_scale": torch.full((4, 1, 1), 0.25)}
    quantize(stacked(tmp_path, saved, changes), tmp_path / "out")
    made = tensors_of(tmp_path / "out")
    for e in range(4):
        at = f"{EXPERTS}.{e}"
        assert torch.cat([made[f"{at}.gate_proj.weight"], made[f"{at}.up_proj.weight"]]).equal(joined[e])
        assert torch.cat([made[f"{at}.gate_proj.weight_scale"], made[f"{at}.up_proj.weight_scale"]]).equal(scale[e])
        assert made[f"{at}.down_proj.weight"].equal(down[e])
        assert made[f"{at}.down_proj.weight_scale"].equal(torch.full((32, 1), 0.25))


# --- 4 bits


def int4(weight: torch.Tensor, group: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Return a weight as compressed-tensors packs it in 4 bits, by the end of its names, and what that means."""
    n, k = weight.shape
    scale = (weight.view(n, -1, group).abs().amax(2) / 7).to(torch.bfloat16)
    wide_scale = scale.float().repeat_interleave(group, 1)
    values = (weight / wide_scale).round().clamp(-8, 7).to(torch.int64)
    padded = torch.nn.functional.pad(values + 8, (0, -k % 8)).view(n, -1, 8)
    packed = (padded << (4 * torch.arange(8))).sum(2).to(torch.int32)
    parts = {"weight_packed": packed, "weight_scale": scale, "weight_shape": torch.tensor([n, k])}
    return parts, values * wide_scale


@pytest.fixture
def kimi(tmp_path, saved):
    """A DeepSeek whose routed experts are packed in 4 bits, and one other linear whose width is no multiple of 8."""
    tensors, wide = dict(tensors_of(saved("DeepseekV3"))), {}
    odd = "model.layers.0.self_attn.o_proj.weight"
    for name in [name for name in tensors if ".experts." in name] + [odd]:
        weight = torch.randn(32, 20) if name == odd else tensors[name].float()
        parts, wide[name] = int4(weight, 20 if name == odd else 8)
        tensors |= {name.removesuffix("weight") + end: tensor for end, tensor in parts.items()}
        del tensors[name]
    method = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    config = {**config_of(saved("DeepseekV3")), "quantization_config": method}
    return save(tmp_path / "kimi", tensors, config, parts=2), wide


def test_packed_int4_is_widened(tmp_path, kimi):
    source, wide = kimi
    quantize(source, tmp_path / "out")
    made = tensors_of(tmp_path / "out")
    assert len(wide) == 13
    for name, weight in wide.items():
        expected = quantize_weight(weight, is_symmetric=True)
        assert made[name].equal(expected.values)
        assert made[f"{name}_scale"].equal(expected.scale)
    assert not [name for name in made if name.endswith(("packed", "weight_shape"))]
    assert "quantization_config" not in config_of(tmp_path / "out")


def mxfp4(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return random blocks of 32 values in 4 bits, and their scales."""
    blocks = torch.randint(0, 256, (*shape[:-1], shape[-1] // 32, 16), dtype=torch.uint8)
    return blocks, torch.randint(118, 132, blocks.shape[:-1], dtype=torch.uint8)


def test_float4_blocks_of_gpt_oss_are_what_transformers_makes_of_them(tmp_path, saved):
    packed, wide = dict(tensors_of(saved("GptOss"))), dict(tensors_of(saved("GptOss")))
    for layer in (0, 1):
        # As in the published ones, down_proj is square: sizes do not tell that rows are outputs.
        for name, n, k in (("gate_up_proj", 64, 32), ("down_proj", 32, 32)):
            at = f"model.layers.{layer}.mlp.experts.{name}"
            blocks, scales = mxfp4(4, n, k)
            packed |= {f"{at}_blocks": blocks, f"{at}_scales": scales}
            wide[at] = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
            packed[f"{at}_bias"] = wide[f"{at}_bias"] = torch.randn(4, n).to(torch.bfloat16)
            del packed[at]
    config = config_of(saved("GptOss"))
    quantize(save(tmp_path / "wide", wide, config), tmp_path / "a")
    quantize(save(tmp_path / "packed", packed, {**config, "quantization_config": {}}), tmp_path / "b")
    one, other = tensors_of(tmp_path / "a"), tensors_of(tmp_path / "b")
    assert one.keys() == other.keys()
    assert sum("experts" in name and tensor.dtype == torch.int8 for name, tensor in one.items()) == 24
    assert all(tensor.equal(other[name]) for name, tensor in one.items())


def test_float4_experts_of_one_matrix_each(tmp_path, saved):
    source, at = saved("DeepseekV3"), f"{EXPERTS}.2.down_proj"
    blocks, scales = mxfp4(32, 64)
    changes = {f"{at}.weight": blocks.reshape(32, 32).view(torch.int8), f"{at}.scale": scales}
    others = {name: tensor for name, tensor in tensors_of(source).items() if "experts" not in name}
    same = {
        f"model.layers.1.mlp.experts.{e}.{n}_proj.weight": torch.ones(64, 32) for e in range(4) for n in ("gate", "up")
    }
    same |= {f"model.layers.1.mlp.experts.{e}.down_proj.weight": torch.ones(32, 64) for e in range(4)}
    save(tmp_path / "m", {**others, **same, **changes}, config_of(source))
    quantize(tmp_path / "m", tmp_path / "out")
    wide = convert_moe_packed_tensors(blocks[None], scales[None], dtype=torch.float32)[0].T.contiguous()
    assert tensors_of(tmp_path / "out")[f"{at}.weight"].equal(quantize_weight(wide, is_symmetric=True).values)


def test_a_family_with_an_engine_in_int4_can_run(cli, tmp_path):
    config = {**tiny_config("LlamaForCausalLM"), "quantization_config": {"quant_method": "compressed-tensors"}}
    source = write_model(tmp_path / "m", config)
    tensors = tensors_of(source)
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        parts, _ = int4(tensors.pop(name).float(), 16)
        tensors |= {name.removesuffix("weight") + end: tensor for end, tensor in parts.items()}
    save(source, tensors, config)
    assert cli("quantize", source, tmp_path / "out", "--scheme", "w8a8-dynamic").code == 0
    assert Checkpoint.open(tmp_path / "out").quant_type("model.layers.1.mlp.up_proj") is DYNAMIC


# --- bad input


def test_scales_that_are_missing_zero_or_too_few(fp8):
    source, _ = fp8
    name = "model.layers.0.self_attn.q_a_proj.weight"
    scale = tensors_of(source)[f"{name}_scale_inv"]
    assert refusal(change(source, {f"{name}_scale_inv": None})).startswith(
        f"scales of {name} in model.safetensors: got none, expected a tensor {name}_scale_inv or "
    )
    assert refusal(change(source, {f"{name}_scale_inv": scale * 0})) == (
        f"values of {name}_scale_inv in model.safetensors: got 0, expected finite scales above 0. "
        "The weights are damaged; fetch the model again."
    )
    assert refusal(change(source, {f"{name}_scale_inv": scale[:, :1].clone()})).startswith(
        f"shape of {name}_scale_inv in model.safetensors: got [1, 1], expected "
    )


def test_scales_of_stacked_experts_that_are_missing_zero_or_too_few(tmp_path, saved):
    name, config = f"{EXPERTS}.gate_up_proj", {"quantization_config": {"weight_block_size": [16, 16]}}
    joined, down = torch.ones(4, 48, 32).to(torch.float8_e4m3fn), {f"{EXPERTS}.down_proj": torch.ones(4, 32, 24)}
    scale = torch.ones(4, 3, 2)

    def refused(scale):
        changes = {name: joined, **down, **({} if scale is None else {f"{name}_scale_inv": scale})}
        return refusal(stacked(tmp_path, saved, changes, **config))

    assert refused(None) == (
        f"scales of {name} in model.safetensors: got none, expected a tensor {name}_scale_inv or {name}_scale. "
        "Fetch the model again, with all of its files."
    )
    scale[2, 0, 1] = 0
    assert refused(scale).startswith(f"values of {name}_scale_inv in model.safetensors: got 0, expected finite scales")
    assert refused(scale[:3]) == (
        f"shape of {name}_scale_inv in model.safetensors: got [3, 3, 2], expected [4, ...], some for each expert."
        " Fetch the model again, with all of its files."
    )
    assert refused(scale[:, :2]) == (
        f"shape of {name}_scale_inv in model.safetensors: got [4, 2, 2], expected [4, 3, 2] for blocks of 16 x 16, "
        "or [4, 48, 1]. Fetch the model again, with all of its files."
    )


@pytest.mark.parametrize("shape", [(3,), (32, 48), ()])
def test_a_bias_that_does_not_fit_its_weight(tmp_path, saved, shape):
    name, joined = "model.layers.0.self_attn.o_proj", f"{EXPERTS}.gate_up_proj"
    experts = {joined: torch.ones(4, 48, 32), f"{EXPERTS}.down_proj": torch.ones(4, 32, 24)}
    for bias, expected in ((f"{name}.bias", [32]), (f"{joined}_bias", [4, 48])):
        source = stacked(tmp_path, saved, {**experts, bias: torch.ones(shape)})
        assert refusal(source) == (
            f"shape of {bias} in model.safetensors: got {list(shape)}, expected {expected}, as its weight."
            " Fetch the model again, with all of its files."
        )


PACKED = "model.layers.1.mlp.experts.1.up_proj.weight"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"scale": None}, f"{PACKED}_scale in FILE: got none, expected it beside a packed weight. Fetch "),
        ({"shape": None}, f"{PACKED}_shape in FILE: got none, expected it beside a packed weight. Fetch "),
        ({"packed": None}, f"{PACKED}_scale in DIR: got no {PACKED}, expected the weight that it scales"),
        ({"scale": torch.ones(24, 3)}, f"shape of {PACKED}_scale in FILE: got [24, 3], expected [24, one for each "),
        ({"scale": torch.zeros(24, 4)}, f"values of {PACKED}_scale in FILE: got 0, expected finite scales above 0. "),
        ({"zero_point": torch.ones(3, 4, dtype=torch.int32)}, "got an offset of integers, expected symmetric weights."),
        ({"g_idx": torch.ones(32, dtype=torch.int32)}, "got columns in an order of their own, expected groups of "),
        ({"packed": torch.ones(24, 16, dtype=torch.uint8)}, f"{PACKED}_packed in FILE: got U8 [24, 16], expected I32 "),
        ({"shape": torch.tensor([24, 31])}, f"values of {PACKED}_shape in FILE: got [24, 31], expected [24, 32], as "),
        ({"shape": torch.tensor([24, 64])}, f"shape of {PACKED}_packed in FILE: got [24, 4], expected [24, 8] for "),
        ({"shape": torch.ones(2)}, f"shape of {PACKED}_packed in FILE: got [24, 4], expected two sizes in {PACKED}_s"),
        ({"": torch.ones(24, 32)}, f"dtype of {PACKED} in FILE: got F32 with scales, expected F32, F16 or BF16, or "),
    ],
)
def test_packed_int4_that_is_not_whole(kimi, changes, expected):
    named = {(f"{PACKED}_{end}" if end else PACKED): tensor for end, tensor in changes.items()}
    assert expected in refusal(change(kimi[0], named)).replace("model.safetensors", "FILE")


def test_float4_blocks_without_their_scales(tmp_path, saved):
    at = "model.layers.1.mlp.experts.gate_up_proj"
    tensors = {name: tensor for name, tensor in tensors_of(saved("GptOss")).items() if name != at}
    blocks, scales = mxfp4(4, 64, 32)

    def refused(**others):
        return refusal(save(tmp_path / "m", {**tensors, f"{at}_blocks": blocks, **others}, config_of(saved("GptOss"))))

    assert refused() == (
        f"scales of {at}_blocks in model.safetensors: got none, expected [4, 64, 1], one for 32 values. "
        "Fetch the model again, with all of its files."
    )
    assert f"got shape [4, 60, 1] of {at}_scales" in refused(**{f"{at}_scales": scales[:, :60]})
    assert f"dtype of {at}_blocks" in refused(**{f"{at}_scales": scales.float()})


def test_weights_of_other_tools(tmp_path, saved):
    packed = {"model.layers.0.x.qweight": torch.zeros(4, 4, dtype=torch.int32)}
    source = save(tmp_path / "m", {**tensors_of(saved("Mixtral")), **packed}, config_of(saved("Mixtral")))
    assert "weights that another tool has quantized" in refusal(source)
