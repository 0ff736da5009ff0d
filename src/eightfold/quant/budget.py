"""How much memory a quantization needs, and where its hidden states go so that it stays within a budget.

    needed     what the process has when it begins + the largest step: a layer, or the head
    spilled    hidden states live in files:   needed
    resident   hidden states live in memory:  needed + 4 T E for each stream

A layer: its stored tensors (mapped; of experts, one at a time), its integers, one weight in float32 (a group of them
where a scale is looked for, all while it is trained), and one batch of tokens on their way through. Bounds, not
estimates: they count what may be resident at once, mapped pages included.

Letters: T tokens of all samples, E hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from eightfold.config import ModelConfig
from eightfold.errors import CapacityError
from eightfold.families import all_linears, expert_block, input_groups
from eightfold.format.checkpoint import Checkpoint
from eightfold.machine import available_bytes, resident_bytes
from eightfold.quant.hidden import sample_batches
from eightfold.quant.recipe import AntiOutlier, KVObserve, Recipe, Samples
from eightfold.quant.statistics import loud_tokens
from eightfold.quant.train import STEP_TOKENS, TRAINED_TOKENS
from eightfold.scheme import QuantType
from eightfold.values import mib

_MIB = 1 << 20

# Copies, code paths run for the first time, what the allocator keeps.
_SLACK_BYTES = 192 * _MIB

# The interpreter with torch, at least. What this process has is rounded up, so that a plan and the run name one number.
_BASE_BYTES, _BASE_STEP = 320 * _MIB, 64 * _MIB

_KEPT_TOKENS = 2048  # of the input of every group, for methods that search

_QUERY_ROWS = 256  # whose scores attention holds at a time


@dataclass(frozen=True)
class Budget:
    """What a run takes.

    Attributes:
        base: bytes resident before the first step.
        step: what the largest step adds.
        states: bytes of the hidden states of all samples, one generation.
        proved: bytes of those of the sample that proves smoothing.
    """

    base: int
    step: int
    states: int
    proved: int = 0

    @property
    def needed(self) -> int:
        """Bytes without which nothing goes."""
        return self.base + self.step

    def spills(self, memory: int | None, processes: int = 1) -> bool:
        """Return whether hidden states have to live in files.

        Args:
            memory: the most this process may have resident; None takes half of what is free.
            processes: how many share what is free.

        Raises:
            CapacityError: the budget is too small even so.
        """
        if memory is None:
            free = available_bytes()
            return free is not None and self.needed + self.states > self.base + free // (2 * processes)
        if memory < self.needed - _BASE_STEP:  # the next run may begin a step larger
            raise CapacityError(
                "memory budget",
                got=mib(memory - memory % _MIB if memory >= _MIB else memory),  # rounded down: it is too little
                expected=f"at least {-(-self.needed // _MIB)} MiB for one layer of this model",
                action="Give that as `memory`, or none.",
            )
        return memory < self.needed + self.states


def budget_for(checkpoint: Checkpoint, recipe: Recipe, samples: Samples, anti_samples: Samples = ()) -> Budget:
    """Return what a recipe takes on a model with these samples."""
    lengths = [len(sample) for sample in samples]
    width = checkpoint.config.hidden_size
    anti_lengths = [len(sample) for sample in anti_samples]
    passed = sum(map(len, recipe.float_samples(samples, anti_samples)))
    passed += sum(anti_lengths) if recipe.observes_float else 0
    proved = (anti_lengths or lengths)[0] if recipe.anti_outlier is not None else 0
    proved *= 2 if recipe.smooths_by_use else 1
    streams = passed + (sum(lengths) if recipe.calibrates else 0)
    base = base_bytes()
    layer = max(_layer_bytes(checkpoint, recipe, each) for each in (lengths, anti_lengths))
    step = max(layer, _head_bytes(checkpoint, recipe))
    return Budget(base, step + _SLACK_BYTES + 4 * width * proved, 4 * width * streams, 4 * width * proved)


def search_bytes(checkpoint: Checkpoint, recipe: Recipe, samples: Samples, kinds: int) -> int:
    """Return what a search for losses needs at least: a layer in float32 and in each type, and one batch both ways.

    Of gradients and states one batch is in memory.
    """
    config, lengths = checkpoint.config, [len(sample) for sample in samples]
    linears = [linear.n * linear.k for group in input_groups(config, 0) for linear in group.linears]
    layer = sum(linears) * (checkpoint.dtype.itemsize + 4 + kinds) + 8 * max(linears)
    # Autograd keeps what a layer computes, and each type has changes as wide as the outputs.
    batch = (3 + kinds) * _sample_bytes(checkpoint, 0, recipe, lengths)
    head = 4 * config.vocab_size * config.hidden_size
    return base_bytes() + max(layer + batch, 2 * head) + _SLACK_BYTES


def require_search_fits(
    checkpoint: Checkpoint, recipe: Recipe, samples: Samples, memory: int | None, kinds: int
) -> None:
    """Refuse a budget that is too small for a search.

    Raises:
        CapacityError: says what is needed.
    """
    needed = search_bytes(checkpoint, recipe, samples, kinds)
    if memory is not None and memory < needed - _BASE_STEP:
        raise CapacityError(
            "memory budget",
            got=mib(memory),
            expected=f"at least {-(-needed // _MIB)} MiB to find losses of this model",
            action="Give that as `memory`, or none.",
        )


def base_bytes() -> int:
    """Return what this process has before the first step."""
    return max(_BASE_BYTES, -(-(resident_bytes() or 0) // _BASE_STEP) * _BASE_STEP)


def _layer_bytes(checkpoint: Checkpoint, recipe: Recipe, lengths: Sequence[int]) -> int:
    """Return what the largest kind of layer takes: with one MLP, or with experts."""
    config = checkpoint.config
    kinds = {config.is_sparse(layer_idx): layer_idx for layer_idx in range(config.num_layers)}
    return max(_bytes_of_layer(checkpoint, layer_idx, recipe, lengths) for layer_idx in kinds.values())


def _bytes_of_layer(checkpoint: Checkpoint, layer_idx: int, recipe: Recipe, lengths: Sequence[int]) -> int:
    """Return what a layer takes: the stored weights are mapped all the while, integers from when they are made.

    Of experts one at a time is mapped; the integers of all are there while samples pass through the quantized layer.
    """
    config = checkpoint.config
    groups = [[linear.n * linear.k for linear in group.linears] for group in input_groups(config, layer_idx)]
    total, largest, group = sum(map(sum, groups)), max(map(max, groups)), max(map(sum, groups))
    block = expert_block(config, layer_idx)
    experts = [linear.n * linear.k for linear in block.linears] if block is not None else []
    one = 3 * max(experts, default=0)
    held = sum(experts) if recipe.calibrates else one
    largest = max(largest, *experts, 0)
    stored = (total + one) * checkpoint.dtype.itemsize
    passing = _sample_bytes(checkpoint, layer_idx, recipe, lengths) if lengths else 0
    float_pass = 4 * largest + max(passing, _scale_bytes(recipe, group))
    float_pass += total if recipe.smooths_by_use else 0  # computed in int8
    # Smoothed linears that stay float are held in float32 while samples pass.
    kept = 4 * total if recipe.anti_outlier is not None and _keeps_float(recipe) else 0
    if recipe.rotates:
        stored += 4 * total + 8 * largest  # in float32, the largest also as it is being rotated
    trained = 4 * (total + largest) + _trained_bytes(config) if recipe.train_steps and not experts else 0
    return stored + max(float_pass, trained, total + held + kept + 4 * largest + passing)


def _trained_bytes(config: ModelConfig) -> int:
    """Return what samples take while a layer is trained: two streams of them, and what one step has to remember."""
    step = 40 * config.hidden_size + 20 * config.intermediate_size
    return 4 * (2 * TRAINED_TOKENS * config.hidden_size + STEP_TOKENS * step)


def _scale_bytes(recipe: Recipe, group: int) -> int:
    """Return what finding a scale takes for a group of so many elements."""
    if recipe.anti_outlier is None:
        return 0
    method = recipe.anti_outlier
    searches = method in (AntiOutlier.M2, AntiOutlier.M3) or method.searches_exponents
    searches = searches or (recipe.smooths_by_use and QuantType.W8A16 in recipe.schemes)
    return (12 if searches else 4) * group


def _keeps_float(recipe: Recipe) -> bool:
    floats = any(kind is QuantType.FLOAT for _, kind in recipe.modules)
    return floats or bool(recipe.keep_float) or recipe.disable_level > 0


def _sample_bytes(checkpoint: Checkpoint, layer_idx: int, recipe: Recipe, lengths: Sequence[int]) -> int:
    """Return what samples take on their way through a layer."""
    config, wide = checkpoint.config, checkpoint.config.intermediate_size
    batches = [sum(lengths[index] for index in batch) for batch in sample_batches(lengths)]
    inputs = 3 * config.hidden_size + wide  # of the four groups
    # gate and up, their integer products, the input of down as it is divided and in float64; queries to attention's
    # output, turned and not; scores of some queries at a time.
    if config.experts is not None and config.is_sparse(layer_idx):
        wide = max(config.experts.intermediate_size, config.experts.shared_size) + config.experts.count
    found = max(batches) * 4 * (10 * config.hidden_size + 6 * wide)
    found += 3 * 4 * min(max(lengths), _QUERY_ROWS) * max(lengths) * config.num_heads
    if recipe.anti_outlier in (AntiOutlier.M2, AntiOutlier.M3):
        found += lengths[0] * 4 * inputs
    if recipe.smooths_by_use:
        found += (max(batches) + 2 * loud_tokens(lengths)) * 4 * config.intermediate_size
    if recipe.anti_outlier is not None and recipe.anti_outlier.searches_exponents:
        found += min(sum(lengths), _KEPT_TOKENS) * 4 * inputs
    if recipe.kv_int8 and recipe.kv_observe is KVObserve.PRE_ROPE:
        found += sum(lengths) * 4 * config.kv_size
    return found


def _head_bytes(checkpoint: Checkpoint, recipe: Recipe) -> int:
    """Return what the output head takes; a float one is copied and proved in small pieces."""
    head = all_linears(checkpoint.config)[checkpoint.config.names.head]
    if not recipe.quantize_lm_head:
        return 128 * _MIB + 4096 * 4 * head.k
    return head.n * head.k * (checkpoint.dtype.itemsize + 1 + 8)
