"""Checks of the plugin's linear in vLLM that need no model: check_linear.py; prints one JSON object.

What is checked here of GPUs is how their kernels prepare the tensors; that is torch, and runs anywhere.
"""

from __future__ import annotations

import json
import tempfile

import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.model_executor.kernels.linear import CutlassInt8ScaledMMLinearKernel, Int8ScaledMMLinearLayerConfig
from vllm.model_executor.layers.linear import ColumnParallelLinear

from eightfold.scheme import QuantType
from eightfold_vllm.config import EightfoldConfig
from eightfold_vllm.contents import Contents
from eightfold_vllm.linear import EightfoldLinearMethod

N, K, TOKENS = 48, 64, 5
NAMES = ("weight", "weight_scale", "input_scale", "input_zero_point", "azp_adj")
STATIC = Int8ScaledMMLinearLayerConfig(is_static_input_scheme=True, is_channelwise=True, input_symmetric=False)


class Given(EightfoldConfig):
    """A directory of one linear, of a type and with tensors that the check chooses."""

    def __init__(self, kind: QuantType, tensors: dict[str, torch.Tensor]) -> None:
        super().__init__()
        packed = tensors.get("deq_scale", torch.zeros(1)).dtype == torch.int64
        names = frozenset(f"one.{name}" for name in tensors)
        self._take(Contents("directory", {"one": kind}, names, packed, ()))


def loaded(kind: QuantType, tensors: dict[str, torch.Tensor], kernel: object = None) -> ColumnParallelLinear:
    layer = ColumnParallelLinear(K, N, bias="bias" in tensors, quant_config=Given(kind, tensors), prefix="one")
    for name, tensor in tensors.items():
        parameter = getattr(layer, name)
        parameter.weight_loader(parameter, tensor)
    if kernel is not None:
        layer.quant_method.kernel = kernel
    layer.quant_method.process_weights_after_loading(layer)
    return layer


def static(scale: float, offset: int, bias: torch.Tensor) -> dict[str, torch.Tensor]:
    weight, weight_scale = torch.randint(-127, 128, (N, K), dtype=torch.int8), torch.rand(N, 1) * 0.01 + 0.001
    deq = (scale * weight_scale).flatten()
    return {
        "weight": weight,
        "weight_scale": weight_scale,
        "weight_offset": torch.zeros(N, 1),
        "input_scale": torch.tensor([scale]),
        "input_offset": torch.tensor([float(offset)]),
        "quant_bias": torch.round(bias / deq - offset * weight.sum(1)).to(torch.int32),
        "deq_scale": deq,
    }


def expected(t: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    q = (x / t["input_scale"] + t["input_offset"]).round().clamp(-128, 127)
    return (q.double() @ t["weight"].double().T + t["quant_bias"]) * t["deq_scale"]


def worst(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted).abs().max() / wanted.abs().max())


def checks() -> dict[str, object]:
    torch.manual_seed(0)
    x, bias, out = torch.randn(TOKENS, K), torch.randn(N), {}
    tensors = static(0.031, -17, bias)
    out["bias of quant_bias"] = worst(loaded(QuantType.W8A8, tensors)(x)[0], expected(tensors, x))
    given = {**tensors, "bias": bias}
    out["bias as stored"] = worst(loaded(QuantType.W8A8, given)(x)[0], expected(tensors, x))
    without = {name: tensor for name, tensor in tensors.items() if not name.startswith("weight_")}
    out["scales of deq_scale"] = worst(loaded(QuantType.W8A8, without)(x)[0], expected(tensors, x))
    packed = {**without, "deq_scale": tensors["deq_scale"].view(torch.int32).to(torch.int64)}
    out["scales of packed deq_scale"] = worst(loaded(QuantType.W8A8, packed)(x)[0], expected(tensors, x))
    no_bias = static(0.031, -17, torch.zeros(N))
    out["no bias where there is none"] = loaded(QuantType.W8A8, no_bias).bias is None

    weight_only = {name: tensors[name] for name in ("weight", "weight_scale")}
    for title, offset in (("w8a16", 0), ("w8a16 with offsets", torch.randint(-128, 128, (N, 1)))):
        given = {**weight_only, "weight_offset": torch.zeros(N, 1) + offset, "bias": bias}
        real = (given["weight"] - given["weight_offset"]) * given["weight_scale"]
        out[title] = worst(loaded(QuantType.W8A16, given)(x)[0], x.double() @ real.double().T + bias)
    dynamic = {**weight_only, "bias": bias}
    real = tensors["weight"] * tensors["weight_scale"]
    out["w8a8-dynamic"] = worst(loaded(QuantType.W8A8_DYNAMIC, dynamic)(x)[0], x.double() @ real.double().T + bias)

    moved = kept = 0
    for offset in range(-128, 128):
        tensors = static(float(torch.rand(1)) * 0.1, offset, bias)
        kernel = CutlassInt8ScaledMMLinearKernel.__new__(CutlassInt8ScaledMMLinearKernel)
        kernel.config, kernel.layer_param_names = STATIC, NAMES
        layer = loaded(QuantType.W8A8, tensors, kernel)
        sums = tensors["weight"].sum(1)
        same = torch.equal(layer.azp_adj.flatten(), (offset * sums).to(torch.int32))
        kept += (
            int(layer.input_zero_point) == offset and same and float(layer.input_scale) == float(tensors["input_scale"])
        )
        low, high = (float(tensors["input_scale"]) * (end - offset) for end in (-128, 127))
        scale = torch.tensor((high - low) / 255)
        moved += int((-128 - torch.tensor(low) / scale).to(torch.int32)) != offset
    out["zero points that a GPU keeps"], out["that it would have moved"] = kept, moved
    return out


def main() -> None:
    with set_current_vllm_config(VllmConfig()), tempfile.NamedTemporaryFile() as meeting:
        init_distributed_environment(1, 0, f"file://{meeting.name}", 0, "gloo")
        initialize_model_parallel(1, 1)
        assert EightfoldLinearMethod.__name__
        print(json.dumps(checks()))


if __name__ == "__main__":
    main()
