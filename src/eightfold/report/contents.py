"""What a model directory holds, from its headers alone, and what the compiled core would run it with here."""

from __future__ import annotations

import os
import re
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from eightfold.config import ModelConfig
from eightfold.errors import UnsupportedError, shortlist
from eightfold.families import all_linears, all_norms, layer_linears
from eightfold.format.checkpoint import Checkpoint
from eightfold.model import native as core
from eightfold.model.native.model import PAGE
from eightfold.scheme import WEIGHT_OFFSET, QuantType, linear_tensors, weight_name
from eightfold.values import size_text

if TYPE_CHECKING:
    from eightfold.model.native._core import Isa


_ONE_EXPERT = re.compile(r"\.\d+\.")  # in the name of a module inside its layer


@dataclass(frozen=True)
class Part:
    """Modules that are stored alike."""

    name: str  # such as self_attn.q_proj
    layers: str  # such as 0-29, or 0-4,7
    scheme: str
    dtype: str  # the weight's
    shape: tuple[int, ...]  # one weight's
    count: int
    nbytes: int  # all tensors of these modules


@dataclass(frozen=True)
class Contents:
    """A directory at a glance."""

    directory: str
    architecture: str
    dtype: str
    scheme: str
    num_layers: int
    parameters: int  # the float model's, a tied head not counted
    active_parameters: int  # those that a token meets: all but the experts that it does not pass through
    files: int
    nbytes: int  # all tensors, a tied head not counted
    disk_bytes: int  # all weight files
    float_bytes: int  # the same model with every tensor in its dtype
    tied: bool
    notes: tuple[str, ...]
    parts: tuple[Part, ...]


def describe(checkpoint: Checkpoint) -> Contents:
    """Summarize a checkpoint; no weight is read."""
    config = checkpoint.config
    parameters = _parameters(checkpoint)
    files = {info.file for info in checkpoint.tensors.values()}
    description = checkpoint.description
    return Contents(
        directory=str(checkpoint.directory),
        architecture=config.architecture,
        dtype=checkpoint.dtype.value,
        scheme=description.model_quant_type if description else QuantType.FLOAT.value,
        num_layers=config.num_layers,
        parameters=parameters,
        active_parameters=parameters - _idle(config),
        files=len(files),
        nbytes=checkpoint.resident_bytes(),
        disk_bytes=sum(path.stat().st_size for path in files),
        float_bytes=parameters * checkpoint.dtype.itemsize + sum(info.nbytes for info in checkpoint.beside.values()),
        tied=config.tie_word_embeddings,
        notes=(*checkpoint.notes, *_notes(checkpoint)),
        parts=tuple(_parts(checkpoint)),
    )


def _parameters(checkpoint: Checkpoint) -> int:
    config = checkpoint.config
    linears = all_linears(config)
    if config.tie_word_embeddings:
        linears.pop(checkpoint.config.names.head)
    counts = [linear.n * linear.k + (linear.n if linear.has_bias else 0) for linear in linears.values()]
    return sum(counts) + config.vocab_size * config.hidden_size + sum(all_norms(config).values())


def _idle(config: ModelConfig) -> int:
    """Return how many parameters are of experts that a token does not pass through."""
    experts = config.experts
    if experts is None:
        return 0
    each = 3 * config.hidden_size * experts.intermediate_size
    return (experts.count - experts.per_token) * each * len(_sparse_layers(config))


def _sparse_layers(config: ModelConfig) -> list[int]:
    return [layer_idx for layer_idx in range(config.num_layers) if config.is_sparse(layer_idx)]


def _parts(checkpoint: Checkpoint) -> list[Part]:
    config = checkpoint.config
    parts = [_part(checkpoint, "embed_tokens", [checkpoint.config.names.embedding], "")]
    alike: dict[str, dict[QuantType, dict[str, int]]] = {}
    for layer_idx in range(config.num_layers):
        for linear in layer_linears(config, layer_idx):
            module = checkpoint.config.names.layer(layer_idx) + linear.name
            by_scheme = alike.setdefault(_ONE_EXPERT.sub(".#.", linear.name), {})
            by_scheme.setdefault(checkpoint.quant_type(module), {})[module] = layer_idx
    for name, by_scheme in alike.items():
        for modules in by_scheme.values():
            parts.append(_part(checkpoint, name, [*modules], ranges(sorted({*modules.values()}))))
    norms = list(all_norms(config))
    parts.append(_part(checkpoint, "norms", norms, ""))
    if not config.tie_word_embeddings:
        parts.append(_part(checkpoint, checkpoint.config.names.head, [checkpoint.config.names.head], ""))
    return parts


def _part(checkpoint: Checkpoint, name: str, modules: list[str], layers: str) -> Part:
    first = checkpoint.tensors[weight_name(modules[0])]
    scheme = QuantType.FLOAT if name in ("embed_tokens", "norms") else checkpoint.quant_type(modules[0])
    suffixes = {spec.suffix for spec in linear_tensors(scheme, has_bias=True)}
    nbytes = sum(
        checkpoint.tensors[f"{module}.{suffix}"].nbytes
        for module in modules
        for suffix in suffixes
        if f"{module}.{suffix}" in checkpoint.tensors
    )
    return Part(name, layers, scheme.value, first.dtype, first.shape, len(modules), nbytes)


def _notes(checkpoint: Checkpoint) -> list[str]:
    config = checkpoint.config
    notes = []
    if beside := checkpoint.beside:
        size = size_text(sum(info.nbytes for info in beside.values()))
        notes.append(
            f"{len(beside)} tensors ({size}) are not of the text model ({shortlist(beside, 1)}): not read here"
        )
    if checkpoint.is_quantized:
        types = {
            name: checkpoint.quant_type(name) for name in all_linears(config) if name != checkpoint.config.names.head
        }
        kinds = Counter(types.values())
        quantized = sum(count for kind, count in kinds.items() if kind is not QuantType.FLOAT)
        kept = kinds[QuantType.FLOAT]
        head_is_float = (
            config.tie_word_embeddings or checkpoint.quant_type(checkpoint.config.names.head) is QuantType.FLOAT
        )
        others = (f"{kept} of them, " if kept else "") + "embedding, norms" + (", lm_head" if head_is_float else "")
        int8 = f"{quantized} of {len(types)} linears in the layers" + ("" if head_is_float else ", lm_head")
        notes.append(f"int8: {int8}; float: {others}")
        bare = sum(
            f"{name}.{WEIGHT_OFFSET}" not in checkpoint.tensors
            for name, kind in types.items()
            if kind is not QuantType.FLOAT
        )
        if bare:
            notes.append(f"{bare} quantized linears come without {WEIGHT_OFFSET}: symmetric")
    if config.experts is not None:
        experts, shared = config.experts, " and one for all tokens" if config.experts.shared_size else ""
        where = f"layer{'s' * (len(layers) > 1)} {ranges(layers)}" if (layers := _sparse_layers(config)) else "no layer"
        notes.append(f"experts: {experts.count}{shared} in {where}; a token passes through {experts.per_token} of them")
    notes += _positions(config)
    if config.tie_word_embeddings and weight_name(checkpoint.config.names.head) in checkpoint.tensors:
        notes.append("lm_head is tied to the embedding; its copy on disk is there for other readers and counted once")
    return notes


def _positions(config: ModelConfig) -> list[str]:
    """Say how far a model looks back whose rope type is made for more than it was trained on."""
    original = config.rope.original_max_position_embeddings
    known = {
        "yarn": f"{config.context}, which yarn makes of {original}",
        "dynamic": f"{config.context}, and by dynamic scaling up to {config.reach} with --max-model-len",
        "longrope": f"{config.context} by longrope, with other factors where --max-model-len is at most {original}",
    }
    return [f"positions: {known[config.rope.rope_type]}"] if config.rope.rope_type in known else []


def ranges(numbers: list[int]) -> str:
    """Return sorted numbers as `0-4,7,9-11`."""
    pieces: list[list[int]] = []
    for number in numbers:
        if pieces and number == pieces[-1][-1] + 1:
            pieces[-1][1:] = [number]
        else:
            pieces.append([number])
    return ",".join("-".join(map(str, piece)) for piece in pieces)


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
    if checkpoint.quant_type(checkpoint.config.names.head) is not QuantType.FLOAT:
        return []
    dtype = checkpoint.tensors[checkpoint.head_weight()].dtype
    how = f"{isa.dot} over an int8 copy, then the exact logits of all that may be the largest"
    return [Kernel("likeliest token", QuantType.FLOAT.value, dtype, 1, how)]


def _linears(checkpoint: Checkpoint, isa: Isa) -> list[Kernel]:
    counts: dict[tuple[QuantType, str], int] = {}
    for name in all_linears(checkpoint.config):
        stored = checkpoint.head_weight() if name == checkpoint.config.names.head else weight_name(name)
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
