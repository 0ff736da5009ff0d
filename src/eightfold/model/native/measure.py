"""How fast the native model runs, and how fast this machine could.

A repetition feeds fresh random prompts, then its own likeliest tokens back, whatever they are. The first token of a
batch is there when every sequence has one; what comes before is prefill, what comes after is decoding.

Letters: B sequences, P prompt tokens of each, T new tokens of each.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from statistics import median
from typing import Any, NamedTuple

import numpy as np

from eightfold.config import ModelConfig
from eightfold.errors import CapacityError
from eightfold.families import all_linears, expert_block, sliding_window
from eightfold.format.checkpoint import Checkpoint
from eightfold.machine import available_bytes, peak_resident_bytes
from eightfold.model import native as core
from eightfold.model.native.model import PAGE, Chunk, NativeModel
from eightfold.scheme import QuantType, weight_name

READ_BYTES = 1 << 30  # of the buffer that is read to measure the bandwidth
PASSES = 3  # over it; the best counts

# Tokens of a prompt that run at once, as in the engine: enough for the matrix products, little enough for memory.
PREFILL_TOKENS = 512


class Rates(NamedTuple):
    """Tokens a second, all sequences together."""

    prefill_tok_s: float
    decode_tok_s: float
    output_tok_s: float


@dataclass(frozen=True)
class Workload:
    """What one repetition computes: B sequences of P tokens in and T out."""

    prompt_len: int = 512
    new_tokens: int = 128  # at least 2: the rate of decoding is taken between the first and the last
    batch: int = 1

    @property
    def context(self) -> int:
        return self.prompt_len + self.new_tokens

    @property
    def pages(self) -> int:
        return -(-self.context // PAGE)

    def rates(self, prefill_s: float, decode_s: float) -> Rates:
        """Divide a repetition's tokens by its seconds: to each sequence's first token, and from there to the last."""
        return Rates(
            prefill_tok_s=self.batch * self.prompt_len / prefill_s,
            decode_tok_s=self.batch * (self.new_tokens - 1) / decode_s,
            output_tok_s=self.batch * self.new_tokens / (prefill_s + decode_s),
        )

    def require_context(self, config: ModelConfig) -> None:
        """Compare with the model's context.

        Raises:
            CapacityError: a sequence is longer.
        """
        if self.context > config.context:
            raise CapacityError(
                "context",
                got=f"{self.prompt_len} tokens in and {self.new_tokens} out",
                expected=f"at most {config.context} together, which is all this model can look back on",
                action="Lower `prompt_len` or `new_tokens`.",
            )


class Runner:
    """Repeats a workload on a model, in one cache that is allocated in advance and overwritten each time."""

    def __init__(self, model: NativeModel, work: Workload, seed: int = 0) -> None:
        work.require_context(model.config)
        self.model, self.work, self._random = model, work, np.random.default_rng(seed)
        model.allocate_cache(work.batch * work.pages * PAGE, "Lower `batch`, `prompt_len` or `new_tokens`.")

    def once(self) -> Rates:
        shape = (self.work.batch, self.work.prompt_len)
        prompts = self._random.integers(0, self.model.config.vocab_size, shape).tolist()
        started = time.perf_counter()
        tokens = self._prefill(prompts)
        first = time.perf_counter()
        for step in range(1, self.work.new_tokens):
            tokens = self._decode(tokens, self.work.prompt_len + step - 1)
        return self.work.rates(first - started, time.perf_counter() - first)

    def _prefill(self, prompts: list[list[int]]) -> list[int]:
        best: list[int] = []
        step = self.work.prompt_len if self.model.float_prompts else PREFILL_TOKENS
        for chunks in _packed(prompts, self.work.pages, step):
            _, found = self.model.forward(chunks)
            best += found.tolist()
        return best

    def _decode(self, tokens: list[int], position: int) -> list[int]:
        used, pages = position // PAGE + 1, self.work.pages
        _, best = self.model.forward(
            [
                Chunk([token], position, range(i * pages, i * pages + used), self.work.prompt_len, logits=False)
                for i, token in enumerate(tokens)
            ]
        )
        found: list[int] = best.tolist()
        return found


def _packed(prompts: list[list[int]], pages: int, step: int) -> Iterator[list[Chunk]]:
    """Cut prompts into steps of so many tokens; sequence i owns the pages from i * pages on."""
    chunks: list[Chunk] = []
    room = step
    for i, prompt in enumerate(prompts):
        at = 0
        while at < len(prompt):
            end = min(at + room, len(prompt))
            used = range(i * pages, i * pages + -(-end // PAGE))
            chunks.append(Chunk(prompt[at:end], at, used, len(prompt), wants=end == len(prompt), logits=False))
            room -= end - at
            at = end
            if not room:
                yield chunks
                chunks, room = [], step
    if chunks:
        yield chunks


class Ceiling:
    """Measures what this machine can do at most; its buffer is larger than any cache."""

    def __init__(self, threads: int) -> None:
        """Allocate and fill the buffer.

        Raises:
            CapacityError: not enough memory for it.
        """
        free = available_bytes()
        if free is not None and free < READ_BYTES:
            raise CapacityError(
                "buffer to measure the bandwidth with",
                got=f"{free / 2**20:.0f} MiB of free memory",
                expected=f"at least {READ_BYTES / 2**20:.0f} MiB",
                action="Close other programs.",
            )
        self._threads = threads
        self._probe = core.extension.ReadProbe(threads, READ_BYTES)

    def read_gb_s(self) -> float:
        """Return 10^9 bytes a second that all threads read together."""
        return self._probe.gb_s(PASSES)

    def int8_tops(self) -> float:
        """Return 10^12 operations a second, two for each product of bytes that all threads sum in registers."""
        return core.extension.int8_tops(self._threads, PASSES)


@dataclass
class Measurement:
    """One entry for each repetition."""

    rates: list[Rates] = field(default_factory=list)
    read_gb_s: list[float] = field(default_factory=list)
    int8_tops: list[float] = field(default_factory=list)
    peak_rss_bytes: int | None = None  # before the buffer of the ceiling was there

    def of(self, name: str) -> list[float]:
        values: list[float] = [getattr(r, name) for r in self.rates] if name in Rates._fields else getattr(self, name)
        return values


def measure(runner: Runner, repeat: int, advance: Callable[[], None] = lambda: None) -> Measurement:
    """Warm up once; then measure ceiling and model in turn, because the speed of a shared machine drifts.

    Raises:
        CapacityError: no memory for the buffer of the ceiling.
    """
    found = Measurement()
    runner.once()
    found.peak_rss_bytes = peak_resident_bytes()
    advance()
    model = runner.model
    ceiling, hosts = Ceiling(model.threads * model.neighbours), -(-model.world_size // model.neighbours)
    for _ in range(repeat):
        found.read_gb_s.append(ceiling.read_gb_s() * hosts)
        found.int8_tops.append(ceiling.int8_tops() * hosts)
        found.rates.append(runner.once())
        advance()
    return found


def summary(found: Measurement, checkpoint: Checkpoint, model: NativeModel, work: Workload) -> dict[str, Any]:
    """Return medians, and what share of the ceiling they are: the keys that `eightfold bench --json` prints."""
    prefill, decode, output = (median(found.of(name)) for name in Rates._fields)
    bandwidth, tops = median(found.read_gb_s), median(found.int8_tops)
    mean_context = work.prompt_len + work.new_tokens / 2
    page_bytes = model.page_bytes * model.world_size
    weight_bytes = model.all_weight_bytes - unread_bytes(checkpoint, work.batch)
    step_bytes = weight_bytes + work.batch * cache_bytes(checkpoint, page_bytes, mean_context)
    read_gb_s = step_bytes * decode / work.batch / 1e9
    return {
        "prefill_tok_s": prefill,
        "decode_tok_s": decode,
        "output_tok_s": output,
        "bytes_per_token": round(step_bytes),
        "read_gb_s": read_gb_s,
        "measured_bandwidth_gb_s": bandwidth,
        "bandwidth_fraction": read_gb_s / bandwidth,
        "measured_int8_tops": tops,
        "int8_fraction": 2 * int8_elements(checkpoint) * prefill / (tops * 1e12),
        "peak_rss_mib": None if found.peak_rss_bytes is None else found.peak_rss_bytes / 2**20,
        "isa": model.isa,
        "threads": model.threads,
        "batch": work.batch,
        "prompt_len": work.prompt_len,
        "new_tokens": work.new_tokens,
        "repeat": len(found.rates),
        "weights_bytes": model.all_weight_bytes,
        "kv_bytes_per_token": page_bytes // PAGE,
        "world_size": model.world_size,
        "resident_weights_mib": model.resident_weights_mib,
    }


def int8_elements(checkpoint: Checkpoint) -> int:
    """Return how many int8 weights every token of a prompt meets: those of the layers, not the head's.

    Of experts, those of as many as a token passes through.
    """
    sizes = {
        name: linear.n * linear.k
        for name, linear in all_linears(checkpoint.config).items()
        if name != checkpoint.config.names.head and checkpoint.quant_type(name) is not QuantType.FLOAT
    }
    routed = sum(sizes.get(name, 0) for name in _routed(checkpoint.config))
    experts = checkpoint.config.experts
    return sum(sizes.values()) - (0 if experts is None else routed - routed * experts.per_token // experts.count)


def _routed(config: ModelConfig) -> Iterator[str]:
    """Yield the linears of the experts that a router chooses from."""
    for layer_idx in range(config.num_layers):
        if (block := expert_block(config, layer_idx)) is not None:
            yield from (config.names.layer(layer_idx) + linear.name for expert in block.experts for linear in expert)


def unread_bytes(checkpoint: Checkpoint, tokens: int) -> float:
    """Return the bytes of experts that a step of so many tokens is not likely to choose, if it chooses evenly."""
    experts = checkpoint.config.experts
    if experts is None:
        return 0.0
    stored = sum(checkpoint.tensors[weight_name(name)].nbytes for name in _routed(checkpoint.config))
    return stored * (1 - experts.per_token / experts.count) ** tokens


def cache_bytes(checkpoint: Checkpoint, page_bytes: int, context: float) -> float:
    """Return the bytes of keys and values that one new token of a sequence reads.

    Args:
        checkpoint: its int8 attention and sliding windows count.
        page_bytes: of all layers.
        context: positions that the token sees, itself included.
    """
    config = checkpoint.config
    layers = range(config.num_layers)
    widths = [2 if checkpoint.attention_type(i) is QuantType.FLOAT else 1 for i in layers]  # bytes of an element
    seen = [min(context, sliding_window(config, i) or context) for i in layers]
    read = sum(width * positions for width, positions in zip(widths, seen, strict=True))
    return page_bytes / PAGE * read / sum(widths)
