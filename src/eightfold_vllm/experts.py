"""Experts in vLLM: by its kernels for int8 weights and a range for each token, where it has one for the machine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from eightfold.errors import UnsupportedError, one_of
from eightfold.scheme import QuantType

if TYPE_CHECKING:
    from eightfold_vllm.config import EightfoldConfig

_DYNAMIC = (QuantType.W8A8_DYNAMIC, QuantType.W8A8_MIX)


def experts_method(config: EightfoldConfig, layer: Any, prefix: str) -> Any:
    """Return how the experts of a layer compute.

    Raises:
        UnsupportedError: their types differ, or vLLM has no kernel for them here.
    """
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod

    kinds = set(config.experts_of(prefix).values())
    if kinds <= {QuantType.FLOAT}:
        return UnquantizedFusedMoEMethod(layer.moe_config)
    assert config.contents is not None
    if len(kinds) > 1 or not kinds <= set(_DYNAMIC):
        raise UnsupportedError(
            f"experts {prefix}",
            where=config.contents.path,
            got=", ".join(sorted(kind.value for kind in kinds)),
            expected=f"{one_of(kind.value for kind in _DYNAMIC)} or FLOAT, one type for all",
            action="Quantize the experts with w8a8-dynamic.",
        )
    try:
        return _dynamic(layer)
    except (NotImplementedError, ValueError) as error:
        raise UnsupportedError(
            f"experts {prefix}",
            where=config.contents.path,
            got=f"a machine for which vLLM has no int8 kernel ({error})",
            expected="a GPU, or a CPU with AMX",
            action="Serve it with `eightfold serve`, or with the experts kept float (`--keep-float '*experts*'`).",
        ) from error


def _dynamic(layer: Any) -> Any:
    """Return vLLM's own method for compressed-tensors, whose tensors have the same names and meaning."""
    from compressed_tensors.quantization import QuantizationArgs
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
        compressed_tensors_moe_w8a8_int8,
    )

    weight = QuantizationArgs(num_bits=8, type="int", strategy="channel", symmetric=True, dynamic=False)
    token = QuantizationArgs(num_bits=8, type="int", strategy="token", symmetric=True, dynamic=True)
    return compressed_tensors_moe_w8a8_int8.CompressedTensorsW8A8Int8MoEMethod(weight, token, layer.moe_config)
