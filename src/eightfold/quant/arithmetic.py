"""What of a machine decides the bits of float32 results: ranks that share one model have to agree on them.

Which instructions torch and its libraries use depends on the CPU and on variables such as ATEN_CPU_CAPABILITY or
MKL_CBWR; so besides the name of the instruction set, results themselves are compared. Threads are not: they change
nothing at the shapes here, see docs/distributed_quantize.md.

Letters: T rows, K inputs, N outputs.
"""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

# (T, K, N): one row, as many as divide evenly and as do not, and sums long enough to be cut into blocks.
_SHAPES = ((1, 64, 64), (64, 576, 192), (257, 1536, 64), (130, 4096, 128), (64, 14336, 32))


def float_facts() -> dict[str, str]:
    """Return what decides the bits of float32 results here, by names that a user is told."""
    return {
        "instruction set": torch.backends.cpu.get_cpu_capability(),
        "float32 arithmetic": f"{_checksum(_results()):08x}",
    }


def _results() -> list[Tensor]:
    """Return products, and what else a decoder computes."""
    x_TK, heads = _spread(64, 1024), _spread(1, 4, 64, 64)
    return [
        *(torch.nn.functional.linear(_spread(T, K), _spread(N, K)) for T, K, N in _SHAPES),
        torch.softmax(x_TK, -1),
        torch.nn.functional.silu(x_TK),
        (x_TK * x_TK).mean(-1).rsqrt(),
        torch.nn.functional.scaled_dot_product_attention(heads, heads, heads, is_causal=True),
    ]


def _spread(*shape: int) -> Tensor:
    """Return numbers between -1 and 1, by integer arithmetic, so that they are the same anywhere."""
    numbers = torch.arange(torch.Size(shape).numel(), device="cpu") * 2654435761 % 2**32
    return (numbers.to(torch.float64) / 2**31 - 1).to(torch.float32).reshape(shape)


def _checksum(results: list[Tensor]) -> int:
    checksum = 0
    for result in results:
        checksum = zlib.crc32(result.contiguous().numpy().tobytes(), checksum)
    return checksum
