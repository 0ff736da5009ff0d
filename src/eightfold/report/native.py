"""What the compiled core would run a model with on this machine, and why."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from typing import Any

from eightfold.errors import UnsupportedError
from eightfold.families import LM_HEAD, all_linears
from eightfold.format.checkpoint import Checkpoint
from eightfold.model.native import core, kernels
from eightfold.scheme import QuantType, weight_name


@dataclass(frozen=True)
class Kernel:
    """Modules that are computed alike."""

    modules: str  # such as linears
    scheme: str
    dtype: str  # of the weights, or of the cache
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

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)


def describe_native(checkpoint: Checkpoint) -> Native:
    """Say which kernel each kind of module gets; no weight is read.

    Raises:
        ConfigError: EIGHTFOLD_ISA or EIGHTFOLD_THREADS makes no sense here.
    """
    try:
        available = tuple(core.extension().available_isas())
    except UnsupportedError as error:
        return Native(problem=str(error))
    isa = core.choose_isa()
    forced, counted = (os.environ.get(name) for name in (core.ISA_VARIABLE, core.THREADS_VARIABLE))
    return Native(
        isa=isa,
        isa_reason=f"{core.ISA_VARIABLE} says so" if forced else "the best this CPU has",
        available_isas=available,
        threads=core.choose_threads(),
        threads_reason=f"{core.THREADS_VARIABLE} says so" if counted else "one for each CPU this process may use",
        kernels=_kernels(checkpoint, kernels.ISAS[isa]),
    )


def _kernels(checkpoint: Checkpoint, isa: kernels.Isa) -> tuple[Kernel, ...]:
    return *_linears(checkpoint, isa), *_choice(checkpoint, isa), *_attention(checkpoint, isa)


def _choice(checkpoint: Checkpoint, isa: kernels.Isa) -> list[Kernel]:
    if checkpoint.quant_type(LM_HEAD) is not QuantType.FLOAT:
        return []
    dtype = checkpoint.tensors[checkpoint.head_weight()].dtype
    return [Kernel("likeliest token", QuantType.FLOAT.value, dtype, 1, kernels.head_kernel(isa))]


def _linears(checkpoint: Checkpoint, isa: kernels.Isa) -> list[Kernel]:
    counts: dict[tuple[QuantType, str], int] = {}
    for name in all_linears(checkpoint.config):
        stored = checkpoint.head_weight() if name == LM_HEAD else weight_name(name)
        key = checkpoint.quant_type(name), checkpoint.tensors[stored].dtype
        counts[key] = counts.get(key, 0) + 1
    return [
        Kernel("linears", kind.value, dtype, count, kernels.linear_kernel(kind, isa, dtype))
        for (kind, dtype), count in counts.items()
    ]


def _attention(checkpoint: Checkpoint, isa: kernels.Isa) -> list[Kernel]:
    kinds = [checkpoint.attention_type(i) for i in range(checkpoint.config.num_layers)]
    return [
        Kernel(
            "attention",
            kind.value,
            "BF16" if kind is QuantType.FLOAT else "I8",
            kinds.count(kind),
            kernels.attention_kernel(kind, isa),
        )
        for kind in dict.fromkeys(kinds)
    ]
