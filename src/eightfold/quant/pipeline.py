"""quantize_checkpoint(): a float directory in, an int8 directory out, one layer in memory at a time.

For each layer: survey the float model -> smooth and quantize weights -> calibrate -> write -> forget.
Only automatic roll-back has to compare all layers first; then the surveys of all layers come before the first write.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eightfold.config import both_dialects
from eightfold.errors import CheckpointError, ConfigError
from eightfold.families import EMBEDDING, FINAL_NORM, LM_HEAD, input_groups, layer_prefix
from eightfold.format.checkpoint import CONFIG_NAME, Checkpoint
from eightfold.format.description import render_description
from eightfold.format.sidecars import copy_sidecars, resolve_auto_map
from eightfold.format.writer import OutputDirectory, ShardedWriter, total_bytes, write_json
from eightfold.progress import Progress, silent
from eightfold.quant.fallback import attention_back, roll_back
from eightfold.quant.head import QuantizedHead
from eightfold.quant.layer import QuantizedLayer, norm_tensors
from eightfold.quant.outcome import REPORT_NAME, Outcome, Smoothing, notes_for
from eightfold.quant.plan import OutputTensor, Plan
from eightfold.quant.proof import UnchangedProof
from eightfold.quant.recipe import Recipe, assign_types, fa_layers, require_level
from eightfold.quant.survey import FloatPass, LayerSurvey, needs_survey
from eightfold.reference.decoder import apply_block_
from eightfold.reference.device import CPU, use
from eightfold.reference.load import Decoder
from eightfold.reference.tensors import TORCH_DTYPES, mapped_tensor, require_finite, require_range, to_array
from eightfold.scheme import QuantType, description_names, weight_file_stem, weight_name


def quantize_checkpoint(
    source: Path,
    target: Path,
    recipe: Recipe,
    samples: Sequence[Sequence[int]] | None = None,
    *,
    overwrite: bool = False,
    part_bytes: int | None = None,
    legacy_names: bool = False,
    device: torch.device = CPU,
    progress: Progress = silent,
) -> Outcome:
    """Quantize a float model directory.

    Args:
        source: the float model. Only read.
        target: the directory to make; it appears when everything is written.
        recipe: what to do.
        samples: token ids of the calibration samples, for recipes that need them.
        overwrite: replace an existing model directory at `target`.
        part_bytes: start a new weight file at this size; None writes one file.
        legacy_names: the older MindIE layout: the description also under its suffixed name, `quantize` in config.json,
            smoothed norms as `.module.weight` and `.module.bias`.
        device: where the float model and its observers compute. Integer products are exact on any; what float32 sums
            round differently moves an observed range in its last bits.
        progress: who is told.

    Raises:
        EightfoldError: see errors.py; `target` is then as it was.
    """
    checkpoint = open_float(source)
    samples = list(samples or ()) if recipe.needs_samples else []
    if recipe.needs_samples and not samples:
        raise ConfigError(f"calibration samples for {recipe.scheme.value}", got="none", expected="at least one")
    types = assign_types(checkpoint.config, recipe)
    require_level(recipe, types)
    outcome = Outcome(recipe, types, notes=notes_for(checkpoint.config, recipe, types))
    if samples:
        outcome.took_samples(samples)
    with OutputDirectory(target, source=source, overwrite=overwrite) as output, use(device):
        run = _Run(checkpoint, recipe, samples, outcome, fa_layers(checkpoint.config, recipe), progress)
        if recipe.decides_by_comparison:
            run.compare_layers()
        plan = Plan(checkpoint, recipe, outcome.types, run.fa_layers, legacy_names).tensors
        planned = [tensor.planned for tensor in plan.values()]
        outcome.tensors, outcome.nbytes = len(planned), total_bytes(planned)
        output.require_space(outcome.nbytes)
        writer = ShardedWriter(output.path, weight_file_stem(recipe.scheme), planned, part_bytes=part_bytes)
        try:
            run.write_all(_Sink(checkpoint, plan, writer))
            writer.close()
        finally:
            writer.abandon()
        _write_companions(checkpoint, output.path, recipe, plan, legacy_names, outcome)
    return outcome


def open_float(source: Path) -> Checkpoint:
    """Open a model that is to be quantized.

    Raises:
        CheckpointError: it is quantized already.
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
    return checkpoint


@dataclass
class _Sink:
    """Where tensors go."""

    checkpoint: Checkpoint
    plan: dict[str, OutputTensor]
    writer: ShardedWriter

    def write(self, name: str, tensor: Tensor) -> None:
        dtype = self.plan[name].planned.dtype
        if tensor.is_floating_point() and tensor.dtype != TORCH_DTYPES[dtype]:
            require_range(tensor, dtype, name, self.checkpoint.directory, "Use --save-dtype float32.")
        self.writer.write(name, to_array(tensor, dtype))

    def copy(self, name: str, source: str | None = None) -> None:
        """Write a float tensor as it is, or widened."""
        source = source or name
        tensor = mapped_tensor(self.checkpoint, source)
        require_finite(tensor, source, self.checkpoint)
        self.write(name, tensor.reshape(self.plan[name].planned.shape))
        self.checkpoint.release([source])

    def write_below(self, prefix: str, made: dict[str, Tensor]) -> None:
        """Write every planned tensor of a layer: as made, or as in the source."""
        for name in (name for name in self.plan if name.startswith(prefix)):
            if name in made:
                self.write(name, made[name])
            else:
                self.copy(name)

    def stored_dtype(self, name: str) -> torch.dtype:
        return TORCH_DTYPES[self.plan[name].planned.dtype]


class _Run:
    """The state that the steps of one quantization share."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        recipe: Recipe,
        samples: Sequence[Sequence[int]],
        outcome: Outcome,
        fa_layers: frozenset[int],
        progress: Progress,
    ) -> None:
        self.checkpoint, self.recipe, self.samples, self.outcome = checkpoint, recipe, samples, outcome
        self.fa_layers, self.progress = fa_layers, progress
        self.decoder = Decoder(checkpoint)
        self.float_pass = FloatPass(self.decoder, recipe, samples) if needs_survey(recipe) else None
        self.surveys: list[LayerSurvey] = []  # of all layers, when they had to be compared

    @torch.inference_mode()
    def compare_layers(self) -> None:
        """Survey all layers and decide what is rolled back."""
        config, recipe = self.checkpoint.config, self.recipe
        assert self.float_pass is not None
        with self.progress("survey", config.num_layers, "layer") as task:
            for layer_idx in range(config.num_layers):
                task.at(f"layer {layer_idx}")
                self.surveys.append(self.float_pass.survey(layer_idx))
                self.decoder.release_block(layer_idx)
                task.advance()
        if recipe.disable_level:
            self.outcome.rolled_back = roll_back(
                config, self.outcome.types, self._range_params(), recipe.disable_level, recipe.exact_levels
            )
            float_linears = {row.module: QuantType.FLOAT for row in self.outcome.rolled_back}
            self.outcome.types = {**self.outcome.types, **float_linears}
            self.outcome.notes = notes_for(config, recipe, self.outcome.types)
        if recipe.fa_amp:
            self._take_attention_back()

    def _range_params(self) -> dict[str, float]:
        config = self.checkpoint.config
        found = {
            layer_prefix(layer_idx) + linear.name: survey.range_params[group.title]
            for layer_idx, survey in enumerate(self.surveys)
            for group in input_groups(config)
            for linear in group.linears
        }
        if self.recipe.quantize_lm_head:
            assert self.float_pass is not None
            found[LM_HEAD] = self.float_pass.head_range_param()
        return found

    def _take_attention_back(self) -> None:
        scores = {i: s.stretch for i, s in enumerate(self.surveys) if i in self.fa_layers and s.stretch is not None}
        self.outcome.stretch_scores = scores
        self.outcome.attention_float = attention_back(scores, self.recipe.fa_amp)
        self.fa_layers -= frozenset(self.outcome.attention_float)
        if self.recipe.fa_amp > len(scores):
            self.outcome.notes.append(
                f"--fa-amp {self.recipe.fa_amp}: the model has {len(scores)} attention layers; all go without FAQuant."
            )
        self.outcome.notes.append(
            f"FAQuant is left out in {len(self.outcome.attention_float)} layers: MindIE's Llama refuses such a model."
        )

    @torch.inference_mode()
    def write_all(self, sink: _Sink) -> None:
        config, recipe = self.checkpoint.config, self.recipe
        hidden = self.decoder.embed([t for s in self.samples for t in s]) if recipe.calibrates else None
        lengths = [len(sample) for sample in self.samples]
        proof = UnchangedProof(self.decoder, self.samples[0]) if recipe.anti_outlier is not None else None
        with self.progress(f"quantize to {recipe.scheme.value}", config.num_layers, "layer") as task:
            task.at("embedding")
            self._require_tied_head()
            sink.copy(weight_name(EMBEDDING))
            for layer_idx in range(config.num_layers):
                task.at(f"layer {layer_idx}: {'calibrate' if self.samples else 'weights'}")
                layer = self._layer(layer_idx, sink)
                if hidden is not None:
                    apply_block_(layer.observed_block(), hidden, lengths, self.decoder.inv_freq)
                if proof is not None:
                    proof.advance(layer.smoothed.block())
                task.at(f"layer {layer_idx}: write")
                sink.write_below(layer_prefix(layer_idx), layer.tensors())
                self.decoder.release_block(layer_idx)
                task.advance()
            task.at("head")
            self._write_head(sink, hidden, lengths)
        if proof is not None and self.float_pass is not None:
            self._finish_proof(proof, self.float_pass.first_sample())
        self.outcome.add_clipping_note()

    def _layer(self, layer_idx: int, sink: _Sink) -> QuantizedLayer:
        if self.surveys:
            survey, self.surveys[layer_idx] = self.surveys[layer_idx], LayerSurvey()
        elif self.float_pass is not None:
            survey = self.float_pass.survey(layer_idx)
        else:
            survey = LayerSurvey()
        self._record(layer_idx, survey)
        return QuantizedLayer(
            self.decoder,
            layer_idx,
            self.recipe,
            self.outcome.types,
            layer_idx in self.fa_layers,
            survey,
            sink.stored_dtype,
        )

    def _record(self, layer_idx: int, survey: LayerSurvey) -> None:
        if survey.scales:
            smoothing = self.outcome.smoothing = self.outcome.smoothing or Smoothing()
            for title, scale in survey.scales.items():
                smoothing.choices[layer_prefix(layer_idx) + title] = scale.note
        if survey.kv is not None:
            self.outcome.clipped_keys += survey.kv.clipped_keys
            self.outcome.keys += survey.kv.keys

    def _write_head(self, sink: _Sink, hidden_TE: Tensor | None, lengths: list[int]) -> None:
        kind = self.outcome.types[LM_HEAD]
        made = norm_tensors(FINAL_NORM, self.decoder.final_norm().gain) if self.recipe.anti_outlier else {}
        if kind is not QuantType.FLOAT:
            range_param = self.float_pass.head_range_param() if self.float_pass is not None else None
            head = QuantizedHead(self.decoder, self.recipe, kind, range_param, sink.stored_dtype)
            made.update(head.tensors(hidden_TE, lengths))
        sink.write_below(FINAL_NORM + ".", made)
        if kind is QuantType.FLOAT:
            sink.copy(weight_name(LM_HEAD), self.checkpoint.head_weight())
        else:
            sink.write_below(LM_HEAD + ".", made)

    def _finish_proof(self, proof: UnchangedProof, float_TE: Tensor) -> None:
        assert self.outcome.smoothing is not None
        difference, largest = proof.finish(float_TE)
        self.outcome.smoothing.max_logit_difference, self.outcome.smoothing.max_logit = difference, largest

    def _require_tied_head(self) -> None:
        """Refuse a model that calls itself tied and holds another head: which one is meant cannot be known."""
        head, used = weight_name(LM_HEAD), self.checkpoint.head_weight()
        if head == used or head not in self.checkpoint.tensors:
            return
        require_finite(mapped_tensor(self.checkpoint, used), used, self.checkpoint)
        if not torch.equal(mapped_tensor(self.checkpoint, head), mapped_tensor(self.checkpoint, used)):
            raise CheckpointError(
                head,
                where=self.checkpoint.directory,
                got="values that differ from the embedding's",
                expected="the same, because config.json says tie_word_embeddings",
                action="Correct config.json, or remove the tensor.",
            )


def _write_companions(
    checkpoint: Checkpoint,
    directory: Path,
    recipe: Recipe,
    plan: dict[str, OutputTensor],
    legacy_names: bool,
    outcome: Outcome,
) -> None:
    """Write config.json, the description, the report and the files that are carried over."""
    source = checkpoint.directory
    raw, modules, note = resolve_auto_map(checkpoint.config_raw, source)
    if note:
        outcome.notes.append(note)
    copy_sidecars(source, directory)
    for module in modules:
        (directory / module.name).write_bytes(module.read_bytes())
    config: dict[str, Any] = both_dialects(raw, checkpoint.config, checkpoint.dtype)
    if legacy_names:
        config["quantize"] = recipe.scheme.value.lower()
    if outcome.types[LM_HEAD] is not QuantType.FLOAT:
        config["tie_word_embeddings"] = False
    write_json(directory / CONFIG_NAME, config)
    text = render_description(recipe.scheme, {name: tensor.tag for name, tensor in plan.items()})
    for name in description_names(recipe.scheme, legacy_names):
        (directory / name).write_text(text, encoding="utf-8")
    write_json(directory / REPORT_NAME, outcome.report())
