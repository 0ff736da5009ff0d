"""The steps of one quantization, each of which is finished and journalled before the next begins.

    float pass 0 .. L-1         only where all layers are compared before the first is written
    embedding                   and a head that stays as it is
    layer 0 .. layer L-1        what enters layer i -> float pass -> smooth, quantize -> calibrate -> write -> i + 1
    head

The state that enters a layer is up to five streams of hidden states (hidden.py), and nothing else:

    float       all samples through the float model, for its statistics
    anti        samples for outlier suppression, where they are others, through the float model
    quantized   all samples through the layers as they are going to be computed, for calibration
    plain       the first sample through the float model, where no other stream is quite that
    smoothed    the first sample through the smoothed float model, for the proof that smoothing changes nothing

Of several processes all walk through the layers, each with its own samples; rank 0 writes the output, and a step into
the journal when all have their hidden states safely on disk.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eightfold.errors import CheckpointError, UnsupportedError
from eightfold.families import input_groups
from eightfold.format.checkpoint import Checkpoint
from eightfold.format.journal import Entry, Journal
from eightfold.format.safetensors import checksum_of_file
from eightfold.model.reference.linear import float_linear, release_widened
from eightfold.model.reference.load import Decoder
from eightfold.model.reference.tensors import (
    TORCH_DTYPES,
    load_rows_float32,
    mapped_tensor,
    require_finite,
)
from eightfold.parallel.ranks import Ranks
from eightfold.progress import Progress, Task
from eightfold.quant.experts import passing_experts
from eightfold.quant.float_pass import FloatPass, LayerStatistics
from eightfold.quant.hidden import BackgroundSync, HiddenStates
from eightfold.quant.layer import QuantizedLayer, head_tensors, norm_tensors
from eightfold.quant.mixture import idle_notes
from eightfold.quant.outcome import Outcome, Smoothing, notes_for
from eightfold.quant.plan import OutputPlan, attention_back, fa_layers, roll_back
from eightfold.quant.recipe import ActMethod, Recipe, Samples
from eightfold.quant.statistics import unshared
from eightfold.quant.train import train_layer
from eightfold.quant.writing import TensorWriter
from eightfold.scheme import NEEDS_CALIBRATION, QuantType, weight_name

# Moving a scale from one factor to another changes float32 results in their last bits: measured, 2e-6 of the largest
# logit. What is wrong by a factor somewhere shows at 1e-2 and above.
MAX_RELATIVE_DIFFERENCE = 1e-3

# Logits of so many positions and words are held at a time, and so many rows of the head.
_TOKENS, _ROWS = 512, 4096


class Notes:
    """What a rank that does not write knows of the journal: what it said at the start, and the steps since."""

    def __init__(self, entries: Sequence[Entry]) -> None:
        self.steps = {entry["step"]: entry for entry in entries if "step" in entry}

    def append(self, entry: Entry) -> None:
        """Take note of a finished step."""
        self.steps[entry["step"]] = entry


@dataclass(frozen=True)
class Job:
    """What is to be done: see quantize_checkpoint()."""

    checkpoint: Checkpoint
    recipe: Recipe
    samples: Samples
    part_bytes: int | None
    legacy_names: bool
    spills: bool
    progress: Progress
    ranks: Ranks
    anti_samples: Samples = ()
    tells_ranges: bool = False
    source: Checkpoint | None = None  # what the float model was before it was rotated, where it is


class Run:
    """The state that the steps of one quantization share."""

    def __init__(self, job: Job, outcome: Outcome, work: Path, journal: Journal | Notes, sync: BackgroundSync) -> None:
        self._job, self.outcome, self._work, self._journal, self._sync = job, outcome, work, journal, sync
        self.checkpoint, self.recipe, self._ranks = job.checkpoint, job.recipe, job.ranks
        self.fa_layers = fa_layers(self.checkpoint.config, self.recipe)
        self.decoder = Decoder(self.checkpoint)
        self._source = self.decoder if job.source in (None, job.checkpoint) else Decoder(job.source)
        self._plan: OutputPlan | None = None
        self._streams: list[HiddenStates] = []
        self.float_pass: FloatPass | None = None
        if self.recipe.needs_float_pass:
            stream = self._stream("float", self.recipe.float_samples(job.samples, job.anti_samples))
            has_two = job.anti_samples and self.recipe.observes_float
            anti = self._stream("anti", job.anti_samples) if has_two else stream
            self.float_pass = FloatPass(
                self.decoder, self.recipe, outcome.types, stream, self._ranks, anti, tells_ranges=job.tells_ranges
            )
            outcome.ranges = self.float_pass.ranges
        first = (job.anti_samples or job.samples)[:1]
        self.smoothed = self._stream("smoothed", first) if self.recipe.anti_outlier is not None else None
        self.plain = self._stream("plain", first, self._source) if self.recipe.smooths_by_use else None
        self.calibrated = self._stream("quantized", job.samples) if self.recipe.calibrates else None

    def _stream(self, name: str, samples: Sequence[Sequence[int]], decoder: Decoder | None = None) -> HiddenStates:
        folder, spills = self._work, self._job.spills
        found = HiddenStates(
            name, decoder or self.decoder, samples, folder, self._sync, spills=spills, ranks=self._ranks
        )
        self._streams.append(found)
        return found

    @property
    def spilled_bytes(self) -> int:
        """How much more room on disk the hidden states need."""
        return sum(stream.disk_bytes for stream in self._streams)

    # --- the journal

    def resume(self) -> bool:
        """Go on with what an earlier run has left; return whether rank 0 finds it intact."""
        found: dict[str, tuple[int, int]] = {}
        for entry in self._journal.steps.values():
            found.update({name: (layer_idx, checksum) for name, (layer_idx, checksum) in entry["states"].items()})
            if "file" in entry and self._ranks.is_first and self._lost_statistics(entry):
                return False
        return all(stream.resume(*found[stream.name]) for stream in self._streams if stream.name in found)

    def _lost_statistics(self, entry: Entry) -> bool:
        try:
            return bool(checksum_of_file(self._statistics_path(entry["layer"])) != entry["file"])
        except (OSError, CheckpointError):
            return True

    def _finish(self, step: str, moved: Sequence[HiddenStates] = (), **facts: Any) -> None:
        """Write a step into the journal, when all that it made is safely on disk, whoever made it."""
        self._sync.wait()
        for stream in moved:
            stream.finish()
        states = {stream.name: [stream.layer_idx, stream.checksum] for stream in moved}
        self._journal.append({"step": step, **facts, "states": states})

    # --- all layers compared

    @torch.inference_mode()
    def compare_layers(self) -> None:
        """Pass through all layers of the float model, and decide what is rolled back."""
        self._pass_all_layers()
        config, recipe = self.checkpoint.config, self.recipe
        found = [self._kept_statistics(layer_idx) for layer_idx in range(config.num_layers)]
        if recipe.disable_level:
            self.outcome.rolled_back = roll_back(config, recipe, self.outcome.types, self._range_params(found))
            float_linears = {row.module: QuantType.FLOAT for row in self.outcome.rolled_back}
            self.outcome.types = {**self.outcome.types, **float_linears}
            self.outcome.notes = notes_for(self.checkpoint, recipe, self.outcome.types)
        if recipe.fa_amp:
            self._take_attention_back(found)

    def _pass_all_layers(self) -> None:
        assert self.float_pass is not None
        count = self.checkpoint.config.num_layers
        with self._job.progress("float pass", count, "layer") as task:
            for layer_idx in range(count):
                task.at(f"layer {layer_idx}")
                step = f"float pass {layer_idx}"
                if step not in self._journal.steps:
                    found = self.float_pass.layer(layer_idx)
                    checksum = found.save(self._statistics_path(layer_idx)) if self._ranks.is_first else None
                    self._finish(step, self.float_pass.streams, layer=layer_idx, file=checksum)
                    self.decoder.release_block(layer_idx)
                task.advance()

    def _statistics_path(self, layer_idx: int) -> Path:
        return self._work / f"statistics-{layer_idx:05d}"

    def _kept_statistics(self, layer_idx: int) -> LayerStatistics:
        path = self._statistics_path(layer_idx)
        return self._ranks.share(LayerStatistics.load(path) if self._ranks.is_first else LayerStatistics())

    def _range_params(self, layers: Sequence[LayerStatistics]) -> dict[str, float]:
        found = {
            self.checkpoint.config.names.layer(layer_idx) + linear.name: statistics.range_params[group.title]
            for layer_idx, statistics in enumerate(layers)
            for group in input_groups(self.checkpoint.config, layer_idx)
            for linear in group.linears
        }
        if self.recipe.quantize_lm_head:
            assert self.float_pass is not None
            found[self.checkpoint.config.names.head] = self._ranks.share(
                self.float_pass.head_range_param() if self._ranks.is_first else 0.0
            )
        return found

    def _take_attention_back(self, layers: Sequence[LayerStatistics]) -> None:
        scores = {i: s.stretch for i, s in enumerate(layers) if i in self.fa_layers and s.stretch is not None}
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

    # --- one layer after the other

    @torch.inference_mode()
    def write_all(self, plan: OutputPlan, writer: TensorWriter | None) -> None:
        """Write every tensor that is not written yet; without a writer, compute this rank's part of it."""
        self._plan = plan
        count = self.checkpoint.config.num_layers
        with self._job.progress(f"quantize to {self.recipe.scheme.value}", count, "layer") as task:
            task.at("embedding")
            if writer is not None and "embedding" not in self._journal.steps:
                self._copy_ends(writer)
                self._finish("embedding", tensors=writer.finished())
            for layer_idx in range(count):
                task.at(f"layer {layer_idx}")
                if f"layer {layer_idx}" not in self._journal.steps:
                    self._quantize_layer(layer_idx, writer, task)
                self._record(self._journal.steps[f"layer {layer_idx}"])
                task.advance()
            task.at("head")
            if writer is not None:
                self._finish_head(writer)
        self.outcome.add_clipping_note()
        self.outcome.notes += idle_notes(self.outcome.idle_experts)

    def _copy_ends(self, writer: TensorWriter) -> None:
        """Copy the embedding, a head that stays as it is, and what is beside a text model."""
        self._require_tied_head()
        writer.copy(weight_name(self.checkpoint.config.names.embedding))
        if self.outcome.types[self.checkpoint.config.names.head] is QuantType.FLOAT:
            writer.copy(weight_name(self.checkpoint.config.names.head), self.checkpoint.head_weight())
        for name in self.checkpoint.beside:
            writer.copy(name)

    def _quantize_layer(self, layer_idx: int, writer: TensorWriter | None, task: Task) -> None:
        """Take every stream, and the output, from the state that enters a layer to the state that enters the next."""
        statistics, moved = self._statistics(layer_idx)
        if self.recipe.train_steps:
            statistics = self._trained(layer_idx, statistics, task)
        layer = self._quantized(layer_idx, statistics)
        if self.calibrated is not None:
            self.calibrated.advance(layer.observed_block(), layer.observers)
            moved.append(self.calibrated)
        if layer.attention is not None:
            for other in self._ranks.gather(layer.attention)[1:]:
                layer.attention.merge(other)
        if self.smoothed is not None:
            release_widened()  # smoothed weights are float32 and have memory of their own
            self.smoothed.advance(layer.smoothed.block(statistics.chosen))
            moved.append(self.smoothed)
        if self.plain is not None:
            linear = functools.partial(self._source.linear, self.checkpoint.config.names.layer(layer_idx))
            mlp = passing_experts(self._source, layer_idx, linear, chosen_TJ=statistics.chosen)
            self.plain.advance(self._source.block(layer_idx, mlp=mlp))
            moved.append(self.plain)
        tensors = None
        self._write_experts(layer, writer)
        if writer is not None:
            writer.write_below(self.checkpoint.config.names.layer(layer_idx), layer.tensors())
            tensors = writer.finished()
        self.decoder.release_block(layer_idx)  # and the source's, whose tensors these are
        kv, idle = statistics.kv, self._idle_experts(layer, statistics)
        self._finish(
            f"layer {layer_idx}",
            moved,
            layer=layer_idx,
            tensors=tensors,
            notes=layer.choices,
            keys=None if kv is None else [kv.clipped_keys, kv.keys],
            **({} if idle is None else {"idle": idle}),
        )

    def _trained(self, layer_idx: int, statistics: LayerStatistics, task: Task) -> LayerStatistics:
        assert self.calibrated is not None and self.float_pass is not None
        steps, streams = self.recipe.train_steps, (self.calibrated, self.float_pass.hidden)
        tell = lambda step: task.at(f"layer {layer_idx}, step {step + 1} of {steps}")  # noqa: E731
        found = train_layer(self.decoder, layer_idx, steps, self.outcome.types, statistics, streams, tell)
        task.at(f"layer {layer_idx}")
        return found

    def _write_experts(self, layer: QuantizedLayer, writer: TensorWriter | None) -> None:
        """Quantize and write the linears of experts that no sample needs: one at a time in each rank."""
        ranks = self._ranks
        for at in range(0, len(layer.later), ranks.size):
            mine = layer.later[at : at + ranks.size][ranks.rank :][:1]
            for made in ranks.gather([(linear, layer.quantize(linear)) for linear in mine]):
                for linear, weight in made:
                    if writer is not None:
                        writer.write_made(layer.expert_tensors(linear, weight))
            for linear in mine:
                self.checkpoint.release(
                    [weight_name(self.checkpoint.config.names.layer(layer.layer_idx) + linear.name)]
                )

    def _idle_experts(self, layer: QuantizedLayer, statistics: LayerStatistics) -> list[int] | None:
        """Return the experts that no token has passed through; None where there are none, or no samples."""
        if layer.routing is None:
            return None
        found = [statistics.tokens] if self.calibrated is None else self._ranks.gather(layer.routing.tokens_N)
        tokens = [tokens_N for tokens_N in found if tokens_N is not None]
        return (torch.stack(tokens).sum(0) == 0).nonzero().flatten().tolist() if tokens else None

    def _quantized(self, layer_idx: int, statistics: LayerStatistics) -> QuantizedLayer:
        """Quantize the linears: all of them where samples are going to pass, else this rank's, for rank 0."""
        ranks, passes = self._ranks, self.calibrated
        layer = QuantizedLayer(
            self.decoder,
            layer_idx,
            self.recipe,
            self.outcome.types,
            layer_idx in self.fa_layers,
            statistics,
            self._stored_dtype,
            in_order=unshared if passes is None else passes.in_order,
            chosen=slice(ranks.rank, None, ranks.size) if passes is None else slice(None),
            passes=passes is not None,
        )
        if passes is None:
            for weights in ranks.gather(layer.weights)[1:]:
                layer.weights.update(weights)
        return layer

    def _stored_dtype(self, name: str) -> torch.dtype:
        assert self._plan is not None
        return TORCH_DTYPES[self._plan.tensors[name].planned.dtype]

    def _statistics(self, layer_idx: int) -> tuple[LayerStatistics, list[HiddenStates]]:
        """Return what is known of a layer, and the streams that had to move for it."""
        if self.recipe.decides_by_comparison:
            return self._kept_statistics(layer_idx), []
        if self.float_pass is not None:
            return self.float_pass.layer(layer_idx), self.float_pass.streams
        return LayerStatistics(), []

    def _record(self, entry: dict[str, Any]) -> None:
        """Take into the outcome what was decided about a layer."""
        if entry["notes"] or self.recipe.rotates:
            smoothing = self.outcome.smoothing = self.outcome.smoothing or Smoothing()
            for title, note in entry["notes"].items():
                smoothing.choices[self.checkpoint.config.names.layer(entry["layer"]) + title] = note
        if "idle" in entry:
            self.outcome.idle_experts[entry["layer"]] = entry["idle"]
        if entry["keys"] is not None:
            self.outcome.clipped_keys += entry["keys"][0]
            self.outcome.keys += entry["keys"][1]

    def _finish_head(self, writer: TensorWriter) -> None:
        if "head" not in self._journal.steps:
            self._write_head(writer)
            self._finish("head", tensors=writer.finished(), proof=self._prove())
        if self.outcome.smoothing is not None:
            proof = self._journal.steps["head"]["proof"]
            self.outcome.smoothing.max_logit_difference, self.outcome.smoothing.max_logit = proof

    def _write_head(self, writer: TensorWriter) -> None:
        has_bias, kind = self.recipe.anti_outlier is not None, self.outcome.types[self.checkpoint.config.names.head]
        made = self._final_norm() if has_bias else {}
        writer.write_below(self.checkpoint.config.names.final_norm + ".", made)
        if kind is not QuantType.FLOAT:
            is_auto = kind in NEEDS_CALIBRATION and self.recipe.act_method is ActMethod.AUTO
            range_param = self.float_pass.head_range_param() if self.float_pass is not None and is_auto else None
            hidden = (
                self.float_pass.hidden if self.calibrated is None and self.float_pass is not None else self.calibrated
            )
            made = head_tensors(self.decoder, self.recipe, kind, self._stored_dtype, hidden, range_param)
            writer.write_below(self.checkpoint.config.names.head + ".", made)

    def _final_norm(self) -> dict[str, Tensor]:
        config = self.checkpoint.config
        return norm_tensors(config.names.final_norm, self.decoder.final_norm().gain - config.norm_offset)

    def _prove(self) -> tuple[float, float] | None:
        if self.smoothed is None or self.float_pass is None:
            return None
        plain = self.plain or self.float_pass.anti
        return compare_logits(self._source, plain.first_sample(), self.smoothed.first_sample(), self.decoder)

    def _require_tied_head(self) -> None:
        """Refuse a model that calls itself tied and holds another head: which one is meant cannot be known."""
        source = self._source.checkpoint
        head, used = weight_name(source.config.names.head), source.head_weight()
        if head == used or head not in source.tensors:
            return
        require_finite(mapped_tensor(source, used), used, source)
        if not torch.equal(mapped_tensor(source, head), mapped_tensor(source, used)):
            raise CheckpointError(
                head,
                where=source.directory,
                got="values that differ from the embedding's",
                expected="the same, because config.json says tie_word_embeddings",
                action="Correct config.json, or remove the tensor.",
            )


def compare_logits(
    decoder: Decoder, float_TE: Tensor, smoothed_TE: Tensor, rotated: Decoder | None = None
) -> tuple[float, float]:
    """Compare what enters the final norm in both models.

    Args:
        decoder: the float model.
        float_TE: of it.
        smoothed_TE: of the smoothed model.
        rotated: whose norm and head follow in that one; None: the same. A rotated head counts as it is before it is
            stored: that rounds it, as it rounds weights that stay float.

    Returns:
        The largest difference of a logit, and the largest logit.

    Raises:
        UnsupportedError: they differ by more than rounding.
    """
    checkpoint, rotated = decoder.checkpoint, rotated or decoder
    expected_TE, found_TE = decoder.final_norm()(float_TE), rotated.final_norm()(smoothed_TE)
    difference = largest = 0.0
    for row in range(0, checkpoint.config.vocab_size, _ROWS):
        weight = rotated_weight = _head_rows(checkpoint, row)
        if rotated is not decoder:
            rotated_weight = _head_rows(rotated.checkpoint, row)
        for at in range(0, len(float_TE), _TOKENS):
            expected = float_linear(expected_TE[at : at + _TOKENS], weight, None)
            found = float_linear(found_TE[at : at + _TOKENS], rotated_weight, None)
            difference = _larger(difference, float((found - expected).abs().max()))
            largest = _larger(largest, float(expected.abs().max()))
        checkpoint.release([checkpoint.head_weight()])
    if not difference <= MAX_RELATIVE_DIFFERENCE * largest:
        raise UnsupportedError(
            "largest change of a logit by outlier suppression",
            where=checkpoint.directory,
            got=f"{difference:g} (the largest logit is {largest:g})",
            expected=f"at most {MAX_RELATIVE_DIFFERENCE * largest:g}",
            action="Use another `anti_outlier` method, or store float32 (`save_float32`).",
        )
    return difference, largest


def _head_rows(checkpoint: Checkpoint, begin: int) -> Tensor:
    end = min(begin + _ROWS, checkpoint.config.vocab_size)
    return load_rows_float32(checkpoint, checkpoint.head_weight(), begin, end)


def _larger(a: float, b: float) -> float:
    """Return the larger; what is not a number is never passed over."""
    return b if math.isnan(b) or b > a else a
