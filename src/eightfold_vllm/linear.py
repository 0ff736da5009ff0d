"""Products of a linear in vLLM, by the kernels that vLLM chooses for the machine.

Letters: N output features, K input features of this rank; o the input's zero point, x the input, w the weight.

    W8A8           y = ((q(x) - o) w) input_scale weight_scale + bias      q(x) = clamp(rne(x / input_scale + o))
    W8A8_DYNAMIC   the same, with a scale and a zero point for each token
    W8A16          y = x ((w - weight_offset) weight_scale) + bias

A static linear's bias also lies in quant_bias = rne(bias / deq_scale - o sum_k w), from which it is had where a writer
left it out.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.model_executor.kernels.linear import init_int8_linear_kernel
from vllm.model_executor.layers.linear import LinearMethodBase, register_weight_loader_v2_supported_method
from vllm.model_executor.parameter import (
    ChannelQuantScaleParameter,
    ModelWeightParameter,
    PerTensorScaleParameter,
)

from eightfold.errors import CheckpointError, ConfigError, one_of
from eightfold.scheme import (
    BIAS,
    DEQ_SCALE,
    INPUT_OFFSET,
    INPUT_SCALE,
    QUANT_BIAS,
    WEIGHT,
    WEIGHT_OFFSET,
    WEIGHT_SCALE,
    QuantType,
)

_DYNAMIC = "EIGHTFOLD_DYNAMIC"  # the environment variable; vLLM's workers inherit it
_ZERO_POINT, _ZERO_SUMS = "input_zero_point", "azp_adj"  # by vLLM's names


def dynamic_is_symmetric() -> bool:
    """Return how a token's range is taken: from its largest value alone, as NPUs do, or from both ends.

    Raises:
        ConfigError: the environment variable says something else.
    """
    said = os.environ.get(_DYNAMIC, "asymmetric")
    known = ("asymmetric", "symmetric")
    if said not in known:
        raise ConfigError(_DYNAMIC, got=said, expected=one_of(known))
    return said == "symmetric"


@register_weight_loader_v2_supported_method
class EightfoldLinearMethod(LinearMethodBase):
    """A linear, or several that vLLM has joined, of one quantized type."""

    def __init__(self, kind: QuantType, stored: frozenset[str], packed: bool) -> None:
        """Take what the directory says.

        Args:
            kind: any but FLOAT.
            stored: the suffixes of the tensors that are there.
            packed: deq_scale is int64 and holds the bits of float32.
        """
        self.kind, self.stored, self.packed = kind, stored, packed

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Register a parameter for each stored tensor, under its name, so that vLLM loads and divides them."""
        loader, rows = extra_weight_attrs["weight_loader"], sum(output_partition_sizes)
        layer.logical_widths = output_partition_sizes
        layer.params_dtype = params_dtype
        layer.input_is_divided = input_size_per_partition != input_size
        weight = torch.empty(rows, input_size_per_partition, dtype=torch.int8)
        layer.register_parameter(
            WEIGHT, ModelWeightParameter(data=weight, input_dim=1, output_dim=0, weight_loader=loader)
        )
        by_row = {
            WEIGHT_SCALE: torch.empty(rows, 1, dtype=torch.float32),
            WEIGHT_OFFSET: torch.empty(rows, 1, dtype=torch.float32),
            QUANT_BIAS: torch.empty(rows, dtype=torch.int32),
            DEQ_SCALE: torch.empty(rows, dtype=torch.int64 if self.packed else torch.float32),
        }
        for name in self.stored & by_row.keys():
            parameter = ChannelQuantScaleParameter(data=by_row[name], output_dim=0, weight_loader=loader)
            layer.register_parameter(name, parameter)
        for name in self.stored & {INPUT_SCALE, INPUT_OFFSET}:  # one for each part
            data = torch.empty(len(output_partition_sizes), dtype=torch.float32)
            layer.register_parameter(name, PerTensorScaleParameter(data=data, weight_loader=loader))
        if self.kind is not QuantType.W8A16:
            is_static = self.kind is QuantType.W8A8
            self.kernel = init_int8_linear_kernel(
                is_channelwise=True,
                is_static_input_scheme=is_static,
                input_symmetric=not is_static and dynamic_is_symmetric(),
                module_name=type(self).__name__,
            )

    def process_weights_after_loading(self, layer: Any) -> None:
        """Bring the loaded tensors into the form that the kernel wants."""
        if self.kind is QuantType.W8A8:
            self._settle_static(layer)
        elif layer.bias is not None and BIAS not in self.stored:
            raise CheckpointError(
                f"{layer.prefix}.{BIAS}",
                got="none",
                expected="the bias that config.json says",
                action="Write it again.",
            )
        if self.kind is QuantType.W8A16:
            _settle_weight_only(layer)
            return
        static = (layer.input_scale.clone(), layer.input_offset.clone()) if self.kind is QuantType.W8A8 else None
        row_sums = layer.weight.sum(1, dtype=torch.int32) if static else None
        for name in self.stored & {WEIGHT_OFFSET, QUANT_BIAS, DEQ_SCALE, INPUT_OFFSET}:
            delattr(layer, name)
        if static is None:
            _set(layer, INPUT_SCALE, None)
            _set(layer, _ZERO_POINT, None)
        else:
            _set(layer, _ZERO_POINT, static[1].to(torch.int8))
        _set(layer, _ZERO_SUMS, None)
        self.kernel.process_weights_after_loading(layer)
        if static is not None and row_sums is not None:
            _keep_zero_point(layer, *static, row_sums)

    def _settle_static(self, layer: Any) -> None:
        """Have the scale of the weight and the bias, from deq_scale and quant_bias where they are not stored."""
        widths = torch.tensor(layer.logical_widths, device=layer.weight.device)
        scale_N, offset_N = (
            getattr(layer, name).repeat_interleave(widths).double() for name in (INPUT_SCALE, INPUT_OFFSET)
        )
        if WEIGHT_SCALE in self.stored:
            deq_N = scale_N * layer.weight_scale.flatten()
        else:
            stored_N = layer.deq_scale.data
            deq_N = (stored_N.to(torch.int32).view(torch.float32) if self.packed else stored_N).double()
            _set(layer, WEIGHT_SCALE, (deq_N / scale_N).float()[:, None])
        if BIAS in self.stored:
            return
        if QUANT_BIAS not in self.stored:
            raise CheckpointError(f"{layer.prefix}.{QUANT_BIAS}", got="none", expected="it, or a float bias")
        # K < 2 ** 24 / 127, so float32 holds the sums.
        sums_N = layer.weight.sum(1, dtype=torch.int32).float()
        if layer.input_is_divided:
            sums_N = tensor_model_parallel_all_reduce(sums_N)
        bias_N = (layer.quant_bias + offset_N * sums_N) * deq_N
        if layer.bias is not None or bool(bias_N.any()):
            _set(layer, BIAS, bias_N.to(layer.params_dtype))

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return the product of x, (..., K), in its dtype."""
        if self.kind is not QuantType.W8A16:
            return self.kernel.apply_weights(layer, x, bias)
        if x.device.type != "cpu":
            weight = layer.weight.to(x.dtype)  # exact, as is the difference: at most 255 in eight bits
            weight = weight if layer.weight_offset is None else weight - layer.weight_offset
            return torch.nn.functional.linear(x, weight * layer.weight_scale[:, None], bias)
        rows = x.reshape(-1, x.shape[-1])
        y = torch._weight_int8pack_mm(rows.contiguous(), layer.weight, layer.weight_scale)
        if layer.weight_offset is not None:
            y = y - rows.sum(-1, keepdim=True, dtype=torch.float32).mul(layer.weight_offset).to(y.dtype)
        if bias is not None:
            y = y + bias
        return y.reshape(*x.shape[:-1], -1)


def _settle_weight_only(layer: Any) -> None:
    """Leave the weight as it is, its scale in the model's dtype; an offset as the form of the product needs it."""
    scale_N, stored = layer.weight_scale.data.flatten(), getattr(layer, WEIGHT_OFFSET, None)
    offset_N = None if stored is None or not bool(stored.any()) else stored.data
    if offset_N is not None:
        of_sums = layer.weight.device.type == "cpu"  # there it is multiplied by the sum of a token's values
        offset_N = offset_N.flatten() * scale_N if of_sums else offset_N.to(layer.params_dtype)
    _set(layer, WEIGHT_OFFSET, offset_N)
    _set(layer, WEIGHT, layer.weight.data)
    _set(layer, WEIGHT_SCALE, scale_N.to(layer.params_dtype))


def _keep_zero_point(layer: Any, scale_P: Tensor, offset_P: Tensor, sums_N: Tensor) -> None:
    """Set scale and zero point as they are stored, if all P parts have the same.

    vLLM rebuilds them from the range that the parts have together; on GPUs it then cuts the zero point, which may be
    an integer less the rounding of float32, instead of rounding it.
    """
    if len({*scale_P.tolist()}) > 1 or len({*offset_P.tolist()}) > 1:
        return
    zero_point = getattr(layer, _ZERO_POINT, None)
    if zero_point is None or zero_point.numel() != 1 or zero_point.dtype != torch.int32:
        return
    zero_point.data.fill_(int(offset_P[0]))
    layer.input_scale.data.fill_(float(scale_P[0]))
    folded = getattr(layer, _ZERO_SUMS, None)
    if folded is not None and folded.dtype == torch.int32:
        folded.data.copy_((int(offset_P[0]) * sums_N).view_as(folded))


def _set(layer: Any, name: str, data: Tensor | None) -> None:
    """Put a plain parameter in the place of whatever has this name."""
    if hasattr(layer, name):
        delattr(layer, name)
    layer.register_parameter(name, None if data is None else Parameter(data, requires_grad=False))
