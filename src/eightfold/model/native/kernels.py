"""What the compiled core computes each kind of module with: the facts that `inspect` shows, in one place.

The sources are csrc/gemm.h, attend.h and simd_*.h; a test compares the numbers with them.
"""

from __future__ import annotations

from dataclasses import dataclass

from eightfold.model.native.model import PAGE
from eightfold.scheme import QuantType


@dataclass(frozen=True)
class Isa:
    """An instruction set's share of the kernels.

    Attributes:
        needs: what the CPU must have.
        dot: how four unsigned bytes meet four signed ones in each lane.
        fma: how float32 products are summed.
        lanes: of 4 bytes.
        tokens: rows of activations that meet four weight rows in registers, in int8, where a step has few.
        packed_tokens: the same where it has more than FEW_TOKENS: tokens are then the lanes.
        float_tokens: the same in float32.
    """

    needs: str
    dot: str
    fma: str
    lanes: int
    tokens: int
    packed_tokens: int
    float_tokens: int


# By the name that EIGHTFOLD_ISA takes, worst first.
ISAS = {
    "scalar": Isa("any CPU", "plain integer products", "plain float32 products", 1, 6, 16, 4),
    "avx2": Isa("AVX2, FMA and F16C", "vpmaddwd on bytes widened to 16 bits", "float32 FMA", 8, 2, 16, 2),
    "avx512": Isa("AVX-512 F, BW, VL, DQ and VNNI", "vpdpbusd", "float32 FMA", 16, 6, 64, 4),
}

WEIGHT_ROWS = 4  # that meet the tokens of a tile
FEW_TOKENS = 8  # of a step

# How a token is written down before it meets the weights.
_INPUTS = {
    QuantType.W8A8: "int8 token, static scale",
    QuantType.W8A8_DYNAMIC: "int8 token, its own scale",
    QuantType.W8A8_MIX: "int8 token, its own scale in a prompt, static in an answer",
    QuantType.W8A16: "16-bit token, two int8 passes: high and low byte",
}


def linear_kernel(kind: QuantType, isa: Isa, weight: str) -> str:
    """Say how a linear is computed.

    Args:
        kind: how it is stored.
        isa: what computes it.
        weight: its dtype in the file.
    """
    if kind is QuantType.FLOAT:
        rows = "over float32 rows" if weight == "F32" else f"over {weight} rows widened to float32"
        return f"{isa.fma} {rows}, {_tile(isa.float_tokens)}"
    tiles = f"{_tile(isa.tokens)}, or x {isa.packed_tokens} in lanes where a step has more than {FEW_TOKENS}"
    return f"{isa.dot}, {tiles}; {_INPUTS[kind]}; exact int32 sums"


def head_kernel(isa: Isa) -> str:
    """Say how the likeliest token is found behind a float head."""
    return f"{isa.dot} over an int8 copy, then the exact logits of all that may be the largest"


def attention_kernel(kind: QuantType, isa: Isa) -> str:
    """Say how an attention is computed."""
    how = {
        QuantType.FLOAT: f"{isa.fma}; keys and values in bfloat16",
        QuantType.FAQUANT: f"{isa.dot}; queries, keys and values int8 by head, probabilities 7 bits",
        QuantType.C8: f"{isa.dot}, two passes; keys and values int8 by channel, queries and probabilities 16 bits",
    }
    return f"{how[kind]}; softmax by pages of {PAGE}"


def _tile(tokens: int) -> str:
    return f"{WEIGHT_ROWS} rows x {tokens} tokens"
