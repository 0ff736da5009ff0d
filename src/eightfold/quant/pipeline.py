"""quantize_checkpoint(): a float directory in, an int8 directory out, one layer in memory at a time.

For each layer: read -> quantize weights -> (static W8A8: run the calibration samples through it) -> write -> forget.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from eightfold.config import both_dialects
from eightfold.errors import CheckpointError, ConfigError
from eightfold.families import (
    EMBEDDING,
    FINAL_NORM,
    LM_HEAD,
    InputGroup,
    LinearShape,
    input_groups,
    layer_norms,
    layer_prefix,
)
from eightfold.format.checkpoint import CONFIG_NAME, Checkpoint
from eightfold.format.description import render_description
from eightfold.format.sidecars import copy_sidecars, resolve_auto_map
from eightfold.format.writer import OutputDirectory, ShardedWriter, total_bytes, write_json
from eightfold.progress import Progress, silent
from eightfold.quant.calibrate import ObservedGroup, quantized_member
from eightfold.quant.observe import MeanMinMax
from eightfold.quant.qparams import QuantizedWeight, pack_deq_scale, quantize_weight, static_params
from eightfold.quant.recipe import OutputTensor, Recipe, assign_types, plan_output, split_groups, tensor_name
from eightfold.reference.decoder import Block, GroupCall, LinearGroup, apply_block_
from eightfold.reference.load import Decoder
from eightfold.reference.tensors import TORCH_DTYPES, load_float32, load_tensor, require_finite, require_range, to_array
from eightfold.scheme import (
    DEQ_SCALE,
    INPUT_OFFSET,
    INPUT_SCALE,
    NEEDS_CALIBRATION,
    QUANT_BIAS,
    WEIGHT,
    WEIGHT_OFFSET,
    WEIGHT_SCALE,
    QuantType,
    description_names,
    linear_tensors,
    weight_file_stem,
    weight_name,
)


@dataclass
class Outcome:
    """What a quantization did."""

    tensors: int
    nbytes: int  # of tensor data written
    quantized: int  # linears
    kept_float: list[str]  # linears, without lm_head
    notes: list[str] = field(default_factory=list)  # for the user, one line each


def quantize_checkpoint(
    source: Path,
    target: Path,
    recipe: Recipe,
    samples: Sequence[Sequence[int]] | None = None,
    *,
    overwrite: bool = False,
    part_bytes: int | None = None,
    legacy_names: bool = False,
    progress: Progress = silent,
) -> Outcome:
    """Quantize a float model directory.

    Args:
        source: the float model. Only read.
        target: the directory to make; it appears when everything is written.
        recipe: what to do.
        samples: token ids of the calibration samples; needed for static W8A8, unused otherwise.
        overwrite: replace an existing model directory at `target`.
        part_bytes: start a new weight file at this size; None writes one file.
        legacy_names: also write the description under its older name and `quantize` into config.json.
        progress: who is told.

    Raises:
        EightfoldError: see errors.py; `target` is then as it was.
    """
    checkpoint = Checkpoint.open(source)
    if checkpoint.is_quantized:
        raise CheckpointError(
            "model",
            where=source,
            got="a quantized one",
            expected="float weights",
            action="Start from its float original.",
        )
    static = recipe.scheme in NEEDS_CALIBRATION
    if static and not samples:
        raise ConfigError(f"calibration samples for {recipe.scheme.value}", got="none", expected="at least one")
    types = assign_types(checkpoint.config, recipe)
    plan = plan_output(checkpoint, recipe, types)
    planned = [tensor.planned for tensor in plan.values()]
    outcome = _outcome(checkpoint, recipe, types, total_bytes(planned))
    with OutputDirectory(target, source=source, overwrite=overwrite) as output:
        output.require_space(outcome.nbytes)
        writer = ShardedWriter(output.path, weight_file_stem(recipe.scheme), planned, part_bytes=part_bytes)
        try:
            run = _Run(checkpoint, recipe, types, plan, writer)
            run.write_all(samples if static else None, progress)
            writer.close()
        finally:
            writer.abandon()
        _write_companions(checkpoint, output.path, recipe, plan, legacy_names, outcome)
    return outcome


def _outcome(checkpoint: Checkpoint, recipe: Recipe, types: dict[str, QuantType], nbytes: int) -> Outcome:
    kept = [name for name, kind in types.items() if kind is QuantType.FLOAT and name != LM_HEAD]
    outcome = Outcome(0, nbytes, len(types) - len(kept) - 1, kept)
    if split := split_groups(checkpoint.config, types):
        outcome.notes.append(
            f"{len(split)} groups of linears that share an input are stored in two ways (such as {split[0]}): "
            "vllm-ascend refuses that, MindIE takes it only with W8A8. Keep whole groups float."
        )
    if not outcome.quantized:
        outcome.notes.append("every linear is kept float: nothing is quantized.")
    config = checkpoint.config
    if config.architecture == "LlamaForCausalLM" and config.head_dim * config.num_heads != config.hidden_size:
        outcome.notes.append(
            f"head_dim is {config.head_dim} and not hidden_size / heads, which MindIE takes for Llama: "
            "it would misread OUT."
        )
    if not recipe.weight_symmetric:
        outcome.notes.append("asymmetric W8A16: MindIE reads it rightly, vllm-ascend drops the sign of the offset.")
    return outcome


@dataclass
class _Run:
    """The state that the steps of one quantization share."""

    checkpoint: Checkpoint
    recipe: Recipe
    types: dict[str, QuantType]
    plan: dict[str, OutputTensor]
    writer: ShardedWriter

    @torch.inference_mode()
    def write_all(self, samples: Sequence[Sequence[int]] | None, progress: Progress) -> None:
        config = self.checkpoint.config
        decoder = Decoder(self.checkpoint)
        hidden = None if samples is None else decoder.embed([token for sample in samples for token in sample])
        lengths = [len(sample) for sample in samples or ()]
        with progress(f"quantize to {self.recipe.scheme.value}", config.num_layers, "layer") as task:
            task.at("embedding")
            self._require_tied_head()
            self.copy(weight_name(EMBEDDING))
            for layer_idx in range(config.num_layers):
                task.at(f"layer {layer_idx}: {'weights' if hidden is None else 'calibrate'}")
                layer = _Layer(self, layer_idx)
                if hidden is not None:
                    apply_block_(layer.observed_block(decoder), hidden, lengths, decoder.inv_freq)
                task.at(f"layer {layer_idx}: write")
                layer.write()
                task.advance()
            task.at("head")
            self.copy(weight_name(FINAL_NORM))
            self.copy(weight_name(LM_HEAD), self.checkpoint.head_weight())

    def _require_tied_head(self) -> None:
        """Refuse a model that calls itself tied and holds another head: which one is meant cannot be known."""
        head, used = weight_name(LM_HEAD), self.checkpoint.head_weight()
        if head == used or head not in self.checkpoint.tensors:
            return
        require_finite(load_tensor(self.checkpoint, used), used, self.checkpoint)
        if not torch.equal(load_tensor(self.checkpoint, head), load_tensor(self.checkpoint, used)):
            raise CheckpointError(
                head,
                where=self.checkpoint.directory,
                got="values that differ from the embedding's",
                expected="the same, because config.json says tie_word_embeddings",
                action="Correct config.json, or remove the tensor.",
            )

    def write_tensor(self, name: str, tensor: Tensor) -> None:
        dtype = self.plan[name].planned.dtype
        if tensor.is_floating_point() and tensor.dtype != TORCH_DTYPES[dtype]:
            require_range(tensor, dtype, name, self.checkpoint.directory, "Use --save-dtype float32.")
        self.writer.write(name, to_array(tensor, dtype))

    def copy(self, name: str, source: str | None = None) -> None:
        """Write a float tensor as it is, or widened."""
        source = source or name
        tensor = load_tensor(self.checkpoint, source)
        require_finite(tensor, source, self.checkpoint)
        self.write_tensor(name, tensor.reshape(self.plan[name].planned.shape))
        self.checkpoint.release([source])

    def disk_dtype(self, name: str) -> torch.dtype:
        return TORCH_DTYPES[self.plan[name].planned.dtype]


class _Layer:
    """One decoder layer on its way from float to int8."""

    def __init__(self, run: _Run, layer_idx: int) -> None:
        self._run, self._idx = run, layer_idx
        self._prefix = layer_prefix(layer_idx)
        self._weights: dict[str, QuantizedWeight] = {}
        self._observers: dict[str, MeanMinMax] = {}
        self._groups = input_groups(run.checkpoint.config)
        for linear in self._linears():
            if run.types[self._prefix + linear.name] is not QuantType.FLOAT:
                weight = load_float32(run.checkpoint, weight_name(self._prefix + linear.name))
                self._weights[linear.name] = quantize_weight(weight, is_symmetric=run.recipe.weight_symmetric)

    def _linears(self) -> list[LinearShape]:
        return [linear for group in self._groups for linear in group.linears]

    def observed_block(self, decoder: Decoder) -> Block:
        """Return the layer with its linears quantized and their inputs observed."""
        return decoder.block(self._idx, [self._observed_group(decoder, group) for group in self._groups])

    def _observed_group(self, decoder: Decoder, group: InputGroup) -> GroupCall:
        if not any(linear.name in self._weights for linear in group.linears):
            return LinearGroup(tuple(decoder.linear(self._prefix, linear) for linear in group.linears))
        observer = MeanMinMax(self._prefix + group.title)
        self._observers.update({linear.name: observer for linear in group.linears})
        return ObservedGroup(
            observer,
            tuple(
                quantized_member(self._weights[linear.name], self._bias(linear))
                if linear.name in self._weights
                else decoder.linear(self._prefix, linear)
                for linear in group.linears
            ),
        )

    def _bias(self, linear: LinearShape) -> Tensor | None:
        names = [
            tensor_name(self._prefix + linear.name, spec)
            for spec in linear_tensors(QuantType.FLOAT, linear.has_bias)[1:]
        ]
        return load_float32(self._run.checkpoint, names[0]) if names else None

    def write(self) -> None:
        """Write all tensors of the layer and let go of it."""
        for linear in self._linears():
            module = self._prefix + linear.name
            for spec in linear_tensors(self._run.types[module], linear.has_bias):
                if spec.tag is QuantType.FLOAT:
                    self._run.copy(tensor_name(module, spec))
            for suffix, tensor in self._int8_tensors(linear).items():
                self._run.write_tensor(f"{module}.{suffix}", tensor)
        for name in layer_norms(self._run.checkpoint.config):
            self._run.copy(weight_name(self._prefix + name))
        self._run.checkpoint.release(self._run.checkpoint.layer_tensors(self._prefix))

    def _int8_tensors(self, linear: LinearShape) -> dict[str, Tensor]:
        """Return what a quantized linear stores beside its float bias, by suffix."""
        weight = self._weights.get(linear.name)
        if weight is None:
            return {}
        stored = {WEIGHT: weight.values, WEIGHT_SCALE: weight.scale, WEIGHT_OFFSET: weight.offset}
        observer = self._observers.get(linear.name)
        if observer is not None:
            stored.update(self._static_tensors(linear, weight, observer))
        return stored

    def _static_tensors(self, linear: LinearShape, weight: QuantizedWeight, observer: MeanMinMax) -> dict[str, Tensor]:
        module = self._prefix + linear.name
        scale, offset = observer.params()
        # Deviates: the reference multiplies the float32 scale. A reader quantizes with the scale it finds in the
        # file, rounded to the model's dtype (up to 0.4 % off in bfloat16), so that one belongs into deq_scale.
        scale = scale.to(self._run.disk_dtype(f"{module}.{INPUT_SCALE}")).to(torch.float32)
        deq_scale, quant_bias = static_params(weight, self._bias(linear), scale, offset)
        if self._run.disk_dtype(f"{module}.{DEQ_SCALE}") is torch.int64:
            deq_scale = pack_deq_scale(deq_scale)
        return {INPUT_SCALE: scale, INPUT_OFFSET: offset, QUANT_BIAS: quant_bias, DEQ_SCALE: deq_scale}


def _write_companions(
    checkpoint: Checkpoint,
    directory: Path,
    recipe: Recipe,
    plan: dict[str, OutputTensor],
    legacy_names: bool,
    outcome: Outcome,
) -> None:
    """Write config.json, the description and the files that are carried over."""
    source = checkpoint.directory
    raw, modules, note = resolve_auto_map(checkpoint.config_raw, source)
    if note:
        outcome.notes.append(note)
    copy_sidecars(source, directory)
    for module in modules:
        (directory / module.name).write_bytes(module.read_bytes())
    config = both_dialects(raw, checkpoint.config, checkpoint.dtype)
    if legacy_names:
        config["quantize"] = recipe.scheme.value.lower()
    write_json(directory / CONFIG_NAME, config)
    text = render_description(recipe.scheme, {name: tensor.tag for name, tensor in plan.items()})
    for name in description_names(recipe.scheme, legacy_names):
        (directory / name).write_text(text, encoding="utf-8")
    outcome.tensors = len(plan)
