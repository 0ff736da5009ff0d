"""What the compiled core would run a model with on this machine, and why."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from eightfold.errors import UnsupportedError
from eightfold.families import LM_HEAD, all_linears
from eightfold.format.checkpoint import Checkpoint
from eightfold.model import native as core
from eightfold.model.native.model import PAGE
from eightfold.scheme import QuantType, weight_name

if TYPE_CHECKING:
    from eightfold.model.native._core import Isa

# How a token is written down before it meets the weights.
_INPUTS = {
    QuantType.W8A8: "int8 token, static scale",
    QuantType.W8A8_DYNAMIC: "int8 token, its own scale",
    QuantType.W8A8_MIX: "int8 token, its own scale in a prompt, static in an answer",
    QuantType.W8A16: "16-bit token, two int8 passes: high and low byte",
}


@dataclass(frozen=True)
class Kernel:
    """Modules that are computed alike."""

    modules: str  # such as linears
    scheme: str
    dtype: str  # the weights', or the cache's
    count: int
    how: str


@dataclass(frozen=True)
class Native:
    """The compiled core on this machine; with a problem, the rest is empty."""

    problem: str = ""
    isa: str = ""
    isa_reason: str = ""
    available_isas: tuple[str, ...] = ()
    threads: int = 0
    threads_reason: str = ""
    kernels: tuple[Kernel, ...] = ()


def describe_native(checkpoint: Checkpoint) -> Native:
    """Say which kernel each kind of module gets; no weight is read.

    Raises:
        ConfigError: EIGHTFOLD_ISA or EIGHTFOLD_THREADS makes no sense here.
    """
    try:
        available = tuple(core.extension.available_isas())
    except UnsupportedError as error:
        return Native(problem=str(error))
    chosen = core.choose_isa()
    (isa,) = (isa for isa in core.extension.isas() if isa.name == chosen)
    forced, counted = (os.environ.get(name) for name in (core.ISA_VARIABLE, core.THREADS_VARIABLE))
    return Native(
        isa=chosen,
        isa_reason=f"{core.ISA_VARIABLE} says so" if forced else "the best this CPU has",
        available_isas=available,
        threads=core.choose_threads(),
        threads_reason=f"{core.THREADS_VARIABLE} says so" if counted else "one for each CPU this process may use",
        kernels=(*_linears(checkpoint, isa), *_choice(checkpoint, isa), *_attention(checkpoint, isa)),
    )


def _choice(checkpoint: Checkpoint, isa: Isa) -> list[Kernel]:
    if checkpoint.quant_type(LM_HEAD) is not QuantType.FLOAT:
        return []
    dtype = checkpoint.tensors[checkpoint.head_weight()].dtype
    how = f"{isa.dot} over an int8 copy, then the exact logits of all that may be the largest"
    return [Kernel("likeliest token", QuantType.FLOAT.value, dtype, 1, how)]


def _linears(checkpoint: Checkpoint, isa: Isa) -> list[Kernel]:
    counts: dict[tuple[QuantType, str], int] = {}
    for name in all_linears(checkpoint.config):
        stored = checkpoint.head_weight() if name == LM_HEAD else weight_name(name)
        key = checkpoint.quant_type(name), checkpoint.tensors[stored].dtype
        counts[key] = counts.get(key, 0) + 1
    return [
        Kernel("linears", kind.value, dtype, count, _linear_kernel(kind, isa, dtype))
        for (kind, dtype), count in counts.items()
    ]


def _linear_kernel(kind: QuantType, isa: Isa, dtype: str) -> str:
    if kind is QuantType.FLOAT:
        rows = "over float32 rows" if dtype == "F32" else f"over {dtype} rows widened to float32"
        return f"{isa.fma} {rows}, {isa.weight_rows} rows x {isa.float_tokens} tokens"
    tile = f"{isa.weight_rows} rows x {isa.tokens} tokens"
    tiles = f"{tile}, or x {isa.packed_tokens} in lanes where a step has more than {core.extension.FEW_TOKENS}"
    return f"{isa.dot}, {tiles}; {_INPUTS[kind]}; exact int32 sums"


def _attention(checkpoint: Checkpoint, isa: Isa) -> list[Kernel]:
    kinds = [checkpoint.attention_type(i) for i in range(checkpoint.config.num_layers)]
    how = {
        QuantType.FLOAT: f"{isa.fma}; keys and values in bfloat16",
        QuantType.FAQUANT: f"{isa.dot}; queries, keys and values int8 by head, probabilities 7 bits",
        QuantType.C8: f"{isa.dot}, two passes; keys and values int8 by channel, queries and probabilities 16 bits",
    }
    stored = {kind: "BF16" if kind is QuantType.FLOAT else "I8" for kind in kinds}
    return [
        Kernel("attention", kind.value, dtype, kinds.count(kind), f"{how[kind]}; softmax by pages of {PAGE}")
        for kind, dtype in stored.items()
    ]
