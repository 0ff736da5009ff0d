"""quantize_checkpoint(): a float directory in, an int8 directory out, one layer in memory at a time.

For each layer: float pass -> smooth and quantize weights -> calibrate -> write -> journal -> forget.
Only automatic roll-back has to compare all layers first; then the float pass through all of them comes before the first
write.

A run that is killed has lost the layer it was in: started again, it goes on with the next (run.py, format/output.py).
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from eightfold.errors import ConfigError, OutputError
from eightfold.families import family_layout
from eightfold.files import write_json
from eightfold.format.checkpoint import Checkpoint, quantized_already
from eightfold.format.description import render_description
from eightfold.format.directory import CONFIG_NAME
from eightfold.format.journal import WORK_NAME, layers_done
from eightfold.format.output import Output
from eightfold.format.shards import total_bytes
from eightfold.format.source import keep_times, require_same_times
from eightfold.format.streaming import Damaged, copy_companions, open_writer, take_over
from eightfold.format.target import REPORT_NAME
from eightfold.model.reference.tensors import CPU, use
from eightfold.parallel.ranks import Ranks
from eightfold.progress import Progress, silent
from eightfold.quant.budget import budget_for
from eightfold.quant.hidden import BackgroundSync
from eightfold.quant.identity import differences, float_facts, identity
from eightfold.quant.mixture import loader_settings, rules_of
from eightfold.quant.outcome import Outcome, Proof, notes_for, samples_facts
from eightfold.quant.plan import OutputPlan, assign_types, require_level
from eightfold.quant.recipe import Recipe, Samples, require
from eightfold.quant.rotate import rotated
from eightfold.quant.run import Job, Notes, Run
from eightfold.quant.writing import TensorWriter
from eightfold.scheme import QuantType, description_names, weight_file_stem
from eightfold.written_config import both_dialects


def quantize_checkpoint(
    source: Path | Checkpoint,
    target: Path,
    recipe: Recipe,
    samples: Samples | None = None,
    anti_samples: Samples | None = None,
    *,
    overwrite: bool = False,
    part_bytes: int | None = None,
    legacy_names: bool = False,
    device: torch.device = CPU,
    memory: int | None = None,
    progress: Progress = silent,
    ranks: Ranks | None = None,
    tells_ranges: bool = False,
    asked: Mapping[str, Any] | None = None,
    prove: Callable[[Checkpoint], Proof] | None = None,
) -> Outcome:
    """Quantize a float model directory, or go on with one that was begun.

    Args:
        source: the float model, a directory or an open one. Only read.
        target: the directory to make; it appears when everything is written, see format/output.py.
        recipe: what to do.
        samples: token ids of the calibration samples, for recipes that need them.
        anti_samples: those from which outlier suppression takes its scales; none for the same.
        overwrite: replace what quantize has written at `target` before.
        part_bytes: start a new weight file at this size; None writes one file.
        legacy_names: the older MindIE layout: the description also under its suffixed name, `quantize` in config.json,
            smoothed norms as `.module.weight` and `.module.bias`.
        device: where the float model and its observers compute. Integer products are exact on any; what float32 sums
            round differently moves an observed range in its last bits.
        memory: how much this process may have resident, in bytes; None takes half of what is free. What does not fit
            lives in files; the output is the same.
        progress: who is told.
        ranks: the processes that do this together, each of which calls this function; None for this one alone. The
            output is the same. What is returned to others than rank 0 is not the whole outcome.
        tells_ranges: let the outcome have the ranges of all inputs, where samples run through the float model.
        asked: what the recipe was chosen by; it stands in the journal.
        prove: measures the model when all is written, before it appears at `target`; an error of it removes the model.

    Raises:
        EightfoldError: see errors.py; `target` is then as it was, unless the error is one that running again may not
            meet, such as a full disk.
    """
    ranks = ranks or Ranks()
    checkpoint = source if isinstance(source, Checkpoint) else open_float(source)
    anti_samples = list(anti_samples or []) if recipe.anti_outlier is not None else []
    samples = _needed_samples(recipe, samples, bool(anti_samples))
    require_level(checkpoint.config, recipe, assign_types(checkpoint.config, recipe))
    layout = {"part_bytes": part_bytes, "legacy_names": legacy_names}
    head = identity(checkpoint, recipe, samples, anti_samples, layout=layout, device=device.type)
    head |= {} if asked is None else {"asked": dict(asked)}
    spills = budget_for(checkpoint, recipe, samples, anti_samples).spills(memory, ranks.size)
    if ranks.size > 1:
        require(not recipe.train_steps, "train_steps", f"{ranks.size} processes", "one process", "Train no steps (0).")
        ranks.require_alike({**head, "torch": torch.__version__, **float_facts()})
    job = _Job(
        rotated(checkpoint, recipe),
        recipe,
        samples,
        part_bytes,
        legacy_names,
        spills,
        progress,
        ranks,
        anti_samples,
        tells_ranges,
        checkpoint,
        prove,
    )
    if not ranks.is_first:
        return job.help()
    directory = checkpoint.directory
    growing = Output(target, head, source=directory, explain=differences, overwrite=overwrite, progress=progress)
    with growing as output, use(device):
        return job.do(output)


def _needed_samples(recipe: Recipe, samples: Samples | None, has_anti_samples: bool) -> Samples:
    """Return the samples that a recipe needs, which may be none."""
    if not recipe.needs_samples(has_anti_samples):
        return []
    if not samples:
        what, action = f"calibration samples for {recipe.scheme.value}", "Give texts or token ids."
        raise ConfigError(what, got="none", expected="at least one", action=action)
    return list(samples)


def open_float(source: Path) -> Checkpoint:
    """Open a model that is to be quantized.

    Raises:
        CheckpointError: it is quantized already.
    """
    checkpoint = Checkpoint.open(source)
    if checkpoint.is_quantized:
        raise quantized_already(source)
    return checkpoint


@dataclass(frozen=True)
class _Job(Job):
    """A job, and how it is done."""

    prove: Callable[[Checkpoint], Proof] | None = None

    def outcome(self) -> Outcome:
        """Return the outcome before anything is done."""
        types = assign_types(self.checkpoint.config, self.recipe)
        notes, layers = notes_for(self.checkpoint, self.recipe, types), self.checkpoint.config.num_layers
        outcome = Outcome(self.recipe, types, notes=notes, layers=layers)
        data = {"calibration": self.samples, "anti_calibration": self.anti_samples}
        outcome.samples = {name: samples_facts(samples) for name, samples in data.items() if samples}
        return outcome

    def do(self, output: Output) -> Outcome:
        """Write what is not written yet."""
        if output.is_complete:
            return self._leave_complete()
        if output.journal.steps:
            require_same_times(self.checkpoint, output)
        try:
            outcome = self._begin(output)
        except Damaged as damage:
            self.ranks.share(str(damage))
            output.restart()
            outcome = self._begin(output)
            outcome.restarted = str(damage)
        return outcome

    def _leave_complete(self) -> Outcome:
        self.ranks.share(None)
        outcome = self.outcome()
        outcome.already_complete, outcome.layers_resumed = True, outcome.layers
        return outcome

    def _begin(self, output: Output) -> Outcome:
        if not output.journal.steps:
            keep_times(self.checkpoint, output)
        if self.ranks.size > 1:
            token = f"token-{secrets.token_hex(8)}"  # in the work folder, so it goes with it
            (output.work / token).touch()
            self.ranks.share((output.path, output.journal.entries, token))
        outcome = self.outcome()
        outcome.layers_resumed = layers_done(output.journal.entries)
        with BackgroundSync() as sync:
            run = Run(self, outcome, output.work, output.journal, sync)
            plan, checksums = self._take_steps(run, output)
        _write_companions(self.checkpoint, plan, outcome, output)
        if self.prove is not None:
            outcome.proof = self.prove(Checkpoint.open(output.path, may_be_begun=True))
            write_json(output.path / REPORT_NAME, outcome.report())
        output.finish(checksums)
        return outcome

    def help(self) -> Outcome:
        """Compute this rank's part of what rank 0 has not written yet.

        Raises:
            OutputError: this rank does not see the directory that rank 0 writes to.
        """
        outcome = self.outcome()
        while (begun := self.ranks.share(None)) is not None:
            path, entries, token = begun
            if not (path / WORK_NAME / token).exists():
                raise OutputError(
                    f"output directory {path}",
                    got="another one, or none",
                    expected="the directory that rank 0 writes to",
                    action="OUT has to be one directory that all hosts see: put it on a file system they share.",
                )
            outcome = self.outcome()
            try:
                with BackgroundSync() as sync:
                    self._help(Run(self, outcome, path / WORK_NAME, Notes(entries), sync))
                break
            except Damaged:
                pass
        return outcome

    def _help(self, run: Run) -> None:
        run.resume()
        self._require_sound()
        if self.recipe.decides_by_comparison:
            run.compare_layers()
        self._require_sound()
        run.write_all(self._plan(run), None)

    def _require_sound(self) -> None:
        """Hear from rank 0 whether what an earlier run has left is what its journal says.

        Raises:
            Damaged: it is not.
        """
        if damage := self.ranks.share(""):
            raise Damaged(damage)

    def _plan(self, run: Run) -> OutputPlan:
        return OutputPlan(self.checkpoint, self.recipe, run.outcome.types, run.fa_layers, self.legacy_names)

    def _take_steps(self, run: Run, output: Output) -> tuple[OutputPlan, dict[str, int]]:
        """Take all steps that are left; return the plan and the CRC-32 of every weight file."""
        if not run.resume():
            raise Damaged("hidden states")
        self.ranks.share("")
        if self.recipe.decides_by_comparison:
            output.require_space(run.spilled_bytes)
            run.compare_layers()
        plan = self._plan(run)
        planned = [tensor.planned for tensor in plan.tensors.values()]
        run.outcome.tensors, run.outcome.nbytes = len(planned), total_bytes(planned)
        with open_writer(output, weight_file_stem(self.recipe.scheme), planned, self.part_bytes) as files:
            writer = TensorWriter(self.checkpoint, plan.tensors, files)
            written = take_over(output.journal.entries, files, self.progress)
            self.ranks.share("")
            output.require_space(total_bytes(t for t in planned if t.name not in written) + run.spilled_bytes)
            run.write_all(plan, writer)
        return plan, files.file_checksums()


def _write_companions(checkpoint: Checkpoint, plan: OutputPlan, outcome: Outcome, output: Output) -> None:
    """Write the files that are carried over, the description, the report, and last config.json."""
    scheme, directory = plan.recipe.scheme, output.path
    raw, notes = copy_companions(checkpoint, output)
    outcome.notes += notes
    config: dict[str, Any] = both_dialects(raw, checkpoint.config, plan.recipe.dtype_of(checkpoint.dtype))
    parts = {name: rule.part for name, rule in rules_of(checkpoint.config).items()}
    config |= loader_settings(family_layout(checkpoint.config.architecture), outcome.types, parts, scheme)
    if plan.legacy_names:
        config.setdefault("quantize", scheme.value.lower())
    if outcome.types[checkpoint.config.names.head] is not QuantType.FLOAT:
        config["tie_word_embeddings"] = False
        if isinstance(config.get("text_config"), dict):
            config["text_config"]["tie_word_embeddings"] = False
    text = render_description(scheme, plan.tags)
    for name in description_names(scheme, plan.legacy_names):
        (directory / name).write_text(text, encoding="utf-8")
    write_json(directory / REPORT_NAME, outcome.report())
    write_json(directory / CONFIG_NAME, config)
