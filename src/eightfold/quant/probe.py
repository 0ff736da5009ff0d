"""How fast this machine is at what a quantization does: a few pieces of the real work, at the shapes of one model.

    products      one linear of each input width and kind, over a few hundred tokens: seconds for an output element
    widening      float32 copies of stored weights, in memory that the system has to find first
    rest          a layer whose linears cost nothing: norms, rotation, attention, SwiGLU, and whoever watches
    weights       rows to int8
    disks         pieces of the source as they lie now, in the page cache or not; a file that is written and removed

All of it takes about three seconds. The pieces take turns, round after round, and the first round does not count,
because it also finds memory and code. Of each piece the quickest round says what the work costs; how much longer the
rounds took in all says how busy the machine is, and that holds for every piece alike: a few milliseconds of one piece
would mostly show whether another program ran just then. Bursts of a few hundred milliseconds make those two seconds 1.1
to 2.1 times as long on a machine where a run of minutes takes a steady 1.3 times; so the root of that number is used.

Letters: T tokens, K inputs, N outputs, E hidden size, F intermediate size.
"""

from __future__ import annotations

import math
import os
import tempfile
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eightfold.config import ModelConfig
from eightfold.errors import OutputError
from eightfold.families import input_groups, layer_norms, sliding_window
from eightfold.format.checkpoint import Checkpoint
from eightfold.format.pagecache import WriteBehind, drop
from eightfold.model.reference.attention import inverse_frequencies
from eightfold.model.reference.decoder import Batch, Block, GroupCall, LinearGroup, Norm
from eightfold.model.reference.kvcache import FloatAttention
from eightfold.model.reference.linear import FloatLinear, Linear, W8A8DynamicLinear, W8A16Linear
from eightfold.quant.attention import FAQuantObserver, KVObserver, WatchedAttention, Watcher
from eightfold.quant.calibrate import ObservedGroup, StaticMember, observer_for
from eightfold.quant.methods import ActMethod, AntiOutlier
from eightfold.quant.qparams import quantize_rows
from eightfold.quant.recipe import Recipe
from eightfold.quant.statistics import InputWatcher
from eightfold.quant.survey import WatchedGroup, needs_features, smoothed_pairs
from eightfold.scheme import NEEDS_CALIBRATION, QuantType

_PRODUCT_TOKENS = 512
_PRODUCT_FLOP = 6e9
_FRESH_BYTES = 64 << 20
_READ_PLACES, _READ_BYTES = 3, 96 << 20
_WRITE_BYTES, _WRITE_SECONDS = 320 << 20, 1.0
_ROUND_SECONDS, _MAX_ROUNDS = 2.0, 12
_STEP = 1 << 20  # bytes that are looked at, or written, at a time

# Tensors of this size and more are given back to the system, which finds new memory for the next: memory.py.
MAPPED_BYTES = 16 << 20


@dataclass(frozen=True)
class Machine:
    """What was measured; all in seconds."""

    product: Mapping[tuple[QuantType, int], float]  # (kind, K) -> for one output of one token
    widen: float  # for one element of a weight, to a new float32 tensor
    widen_again: float  # the same, to memory that is there
    fresh: float  # for one byte of memory that the system has to find
    quantize: float  # for one element of a weight
    survey_rest: float  # for one token of one layer
    calibrate_rest: float
    read: float  # for one byte of the source
    write: float  # for one byte of the output until it is on the disk
    copy: float  # of that, what this process does: checksum, copy; work goes on while the disk does the rest
    gflops: float  # of the float products, for a person
    busy: float  # how much longer work takes than in the quickest round; the times above contain it
    seconds: float  # that measuring took


def probe(
    checkpoint: Checkpoint, recipe: Recipe, kinds: Sequence[QuantType], lengths: Sequence[int], folder: Path
) -> Machine:
    """Measure this machine.

    Args:
        checkpoint: the float model; a few pieces of its files are read.
        recipe: what would be done.
        kinds: how linears would be stored.
        lengths: tokens of the samples that would run.
        folder: on the disk that the output would go to; a file there is written and removed.
    """
    began = time.perf_counter()
    config = checkpoint.config
    stored = torch.bfloat16 if checkpoint.dtype.itemsize == 2 else torch.float32
    widths = sorted({linear.k for group in input_groups(config) for linear in group.linears})
    works: dict[Any, Callable[[], object]] = dict(_widening(stored))
    works["quantize"] = _quantizing(widths[-1], stored, recipe)
    for kind in {QuantType.FLOAT, *kinds} if lengths else ():
        works.update({(kind, k): _product(kind, k, stored) for k in widths})
    sizes = _sizes(config, lengths)
    if lengths:
        works["survey"] = _rest(config, recipe, sizes, _survey_groups)
    if lengths and recipe.calibrates:
        works["calibrate"] = _rest(config, recipe, sizes, _observed_groups)
    with torch.inference_mode():
        found, busy = _take_turns(works)
    widen, widen_again = (found[name] / (_FRESH_BYTES // 4) for name in ("fresh", "again"))
    product = {(kind, k): _per_output(kind, k, found[kind, k], widen_again) for kind, k in filter(_is_product, works)}
    floats = [2 * k / product[kind, k] for kind, k in product if kind is QuantType.FLOAT]
    write, copy = _writing(folder)
    return Machine(
        product=product,
        widen=widen,
        widen_again=widen_again,
        fresh=max(0.0, widen - widen_again) / 4,
        quantize=found["quantize"] / (_quantized_rows(widths[-1]) * widths[-1]),
        survey_rest=found.get("survey", 0.0) / max(1, sum(sizes)),
        calibrate_rest=found.get("calibrate", 0.0) / max(1, sum(sizes)),
        read=_reading(checkpoint),
        write=write,
        copy=copy,
        gflops=1e-9 * max(floats, default=0.0),
        busy=busy,
        seconds=time.perf_counter() - began,
    )


def _take_turns(works: Mapping[Any, Callable[[], object]]) -> tuple[dict[Any, float], float]:
    """Return the seconds of each work as the machine is, and how many times its quickest that is."""
    rounds: list[dict[Any, float]] = []
    began = time.perf_counter()
    while len(rounds) < 3 or (len(rounds) < _MAX_ROUNDS and time.perf_counter() - began < _ROUND_SECONDS):
        rounds.append({key: _seconds(work) for key, work in works.items()})
    del rounds[0]
    quickest = {key: min(found[key] for found in rounds) for key in works}
    slower = sum(sum(found.values()) for found in rounds) / (len(rounds) * sum(quickest.values()))
    busy = math.sqrt(slower)  # some of what two seconds show has passed before a run is over
    return {key: seconds * busy for key, seconds in quickest.items()}, busy


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _widening(stored: torch.dtype) -> dict[str, Callable[[], object]]:
    weight = torch.ones(_FRESH_BYTES // 4, dtype=stored)
    there = torch.empty(_FRESH_BYTES // 4)
    return {"fresh": lambda: weight.to(torch.float32, copy=True), "again": lambda: there.copy_(weight)}


def _is_product(key: object) -> bool:
    return isinstance(key, tuple)


def _product_rows(k: int) -> int:
    return max(32, min(4096, int(_PRODUCT_FLOP / (2 * _PRODUCT_TOKENS * k))))


def _product(kind: QuantType, k: int, stored: torch.dtype) -> Callable[[], object]:
    x_TK = torch.randn(_PRODUCT_TOKENS, k)
    linear = _linear(kind, _product_rows(k), k, stored)
    if isinstance(linear, StaticMember):
        member, ones = linear, torch.ones(_PRODUCT_TOKENS, 1)
        xq_TK = torch.ones(_PRODUCT_TOKENS, k, dtype=torch.int8)
        return lambda: member.multiply(xq_TK, ones, ones)
    return lambda: linear(x_TK)


def _per_output(kind: QuantType, k: int, seconds: float, widen_again: float) -> float:
    """Return the seconds of one output of one token, without widening the weight."""
    n = _product_rows(k)
    if kind in (QuantType.FLOAT, QuantType.W8A16):
        seconds = max(seconds - n * k * widen_again, seconds / 2)
    return seconds / (_PRODUCT_TOKENS * n)


def _linear(kind: QuantType, n: int, k: int, stored: torch.dtype) -> Linear:
    if kind is QuantType.FLOAT:
        return FloatLinear(torch.ones(n, k, dtype=stored), None)
    integers, ones = torch.ones(n, k, dtype=torch.int8), torch.ones(n)
    if kind is QuantType.W8A16:
        return W8A16Linear(integers, ones[:, None], torch.zeros(n, 1), None)
    sums = torch.full((n,), k, dtype=torch.int32)
    if kind is QuantType.W8A8_DYNAMIC:
        return W8A8DynamicLinear(integers, ones, sums, None)
    return StaticMember(integers, ones, sums, None)


def _quantized_rows(k: int) -> int:
    return max(1, (1 << 22) // k)


def _quantizing(k: int, stored: torch.dtype, recipe: Recipe) -> Callable[[], object]:
    n = _quantized_rows(k)
    weight, column = torch.ones(n, k, dtype=stored), torch.ones(k)

    def rows(begin: int, end: int) -> Tensor:
        piece = weight[begin:end].to(torch.float32, copy=True)
        bool(torch.isfinite(piece.sum()))
        return piece if recipe.anti_outlier is None else piece.mul_(column)

    symmetric = recipe.weight_symmetric
    return lambda: quantize_rows(n, k, rows, is_symmetric=symmetric)


# --- a layer without its linears


@dataclass(frozen=True)
class _Free:
    """A linear whose output costs nothing."""

    y_TN: Tensor

    def __call__(self, x_TK: Tensor) -> Tensor:
        """Return outputs that were there before."""
        return self.y_TN


def _rest(
    config: ModelConfig,
    recipe: Recipe,
    sizes: Sequence[int],
    groups: Callable[
        [ModelConfig, Recipe, dict[str, tuple[Linear, ...]], int], tuple[list[GroupCall], tuple[Watcher, ...]]
    ],
) -> Callable[[], object]:
    """Return all that a layer does with samples of these lengths, but for the linears."""
    tokens = sum(sizes)
    free: dict[str, tuple[Linear, ...]] = {
        group.title: tuple(_Free(torch.randn(tokens, linear.n)) for linear in group.linears)
        for group in input_groups(config)
    }
    hidden = torch.randn(tokens, config.hidden_size)
    batch = Batch.of(sizes, inverse_frequencies(config.rope, config.head_dim))

    def layer() -> None:
        calls, watchers = groups(config, recipe, free, tokens)
        attention = WatchedAttention(FloatAttention(sliding_window(config, 0)), watchers)
        norms = {name: Norm(torch.ones(size), config.rms_norm_eps) for name, size in layer_norms(config).items()}
        block = Block(
            config,
            norms["input_layernorm"],
            norms["post_attention_layernorm"],
            norms.get("self_attn.q_norm"),
            norms.get("self_attn.k_norm"),
            calls[0],
            attention,
            calls[1],
            calls[2],
            calls[3],
        )
        hidden.copy_(block(hidden, batch)).clamp_(-9, 9)

    return layer


def _sizes(config: ModelConfig, lengths: Sequence[int]) -> list[int]:
    """Return sample lengths for a trial: as many as it takes for hidden states of MAPPED_BYTES, 2,048 at most."""
    room = max(16, min(2048, MAPPED_BYTES // (4 * config.hidden_size)))
    sizes: list[int] = []
    for length in sorted(lengths)[len(lengths) // 2 :] + sorted(lengths)[: len(lengths) // 2]:
        if room <= 0:
            break
        sizes.append(min(length, room))
        room -= length
    return sizes


def _survey_groups(
    config: ModelConfig, recipe: Recipe, free: dict[str, tuple[Linear, ...]], tokens: int
) -> tuple[list[GroupCall], tuple[Watcher, ...]]:
    smoothed = {pair.group for pair in smoothed_pairs(recipe.anti_outlier)}
    frequencies = inverse_frequencies(config.rope, config.head_dim)
    kv = KVObserver(recipe.kv_observe, frequencies, config.max_position_embeddings) if recipe.kv_int8 else None
    calls: list[GroupCall] = []
    for group in input_groups(config):
        watcher = None
        if group.title in smoothed or needs_features(recipe):
            keeps = recipe.anti_outlier in (AntiOutlier.M2, AntiOutlier.M3)
            watcher = InputWatcher(
                group.title, tokens, keep_first=keeps, keep_tokens=recipe.anti_outlier is AntiOutlier.M6
            )
        outputs = kv.projections if kv is not None and group.title == "qkv" else None
        calls.append(WatchedGroup(LinearGroup(free[group.title]), watcher, outputs))
    return calls, () if kv is None else (kv,)


def _observed_groups(
    config: ModelConfig, recipe: Recipe, free: dict[str, tuple[Linear, ...]], tokens: int
) -> tuple[list[GroupCall], tuple[Watcher, ...]]:
    calls: list[GroupCall] = []
    for group in input_groups(config):
        if recipe.schemes & NEEDS_CALIBRATION:
            method = ActMethod.HISTOGRAM if recipe.act_method is ActMethod.AUTO else recipe.act_method
            calls.append(ObservedGroup(observer_for(method, group.title, None), free[group.title]))
        else:
            calls.append(LinearGroup(free[group.title]))
    return calls, (FAQuantObserver(),) if recipe.fa_quant else ()


# --- disks


def _reading(checkpoint: Checkpoint) -> float:
    """Return the seconds for a byte of the source, from runs of bytes in its largest tensors."""
    names = sorted(checkpoint.tensors, key=lambda name: -checkpoint.tensors[name].nbytes)
    total, seconds = 0, 0.0
    for place, name in enumerate(names[:: max(1, len(names) // (2 * _READ_PLACES))][: _READ_PLACES + 1]):
        flat = checkpoint.array(name).reshape(-1)
        step = _STEP // flat.itemsize
        started = time.perf_counter()
        for at in range(0, min(len(flat), _READ_BYTES // flat.itemsize), step):
            torch.from_numpy(flat[at : at + step]).view(torch.int16).amax()
        if place:  # the first also finds the memory in which all are held
            seconds += time.perf_counter() - started
            total += min(flat.nbytes, _READ_BYTES)
        checkpoint.release([name])
    return seconds / max(1, total)


def _writing(folder: Path) -> tuple[float, float]:
    """Return the seconds for a byte that is summed up, written and on disk, and how many of them the CPU works.

    Raises:
        OutputError: nothing can be written there.
    """
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            return _write_run(file.fileno())
    except OSError as error:
        raise OutputError(
            f"cannot write to {folder}: {error.strerror or error}", action="Choose a directory you may write to."
        ) from None


def _write_run(file: int) -> tuple[float, float]:
    data, behind = os.urandom(_STEP), WriteBehind(file)
    started, worked = time.perf_counter(), time.process_time()
    written = 0
    for at in range(0, _WRITE_BYTES, len(data)):
        if time.perf_counter() - started > _WRITE_SECONDS:
            break
        written = at + len(data)
        zlib.crc32(data)
        os.pwrite(file, data, at)
        behind.wrote(at, at + len(data))
    os.fdatasync(file)
    seconds, worked = time.perf_counter() - started, time.process_time() - worked
    drop(file, 0, written)
    return seconds / written, min(seconds, worked) / written
