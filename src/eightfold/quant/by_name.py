"""quantize_by_name(): weights of any family in int8, from the names of its tensors, without running the model.

    for each layer: for each linear: a few rows to float32 -> integers and scale -> write;  then a line of the journal

Only one linear's integers, or a few rows of a copied tensor, are in memory. The arithmetic is that of qparams.py, so
that a model which can run too becomes the same bytes either way. What the source has stored in int8 stays as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from eightfold.config import CONFIG_DTYPES, EXPERT_KEYS, DType, has_engine, parse_config
from eightfold.files import write_json
from eightfold.format.description import render_description
from eightfold.format.directory import CONFIG_NAME
from eightfold.format.journal import layers_done
from eightfold.format.output import Output
from eightfold.format.shards import total_bytes
from eightfold.format.source import keep_times, require_same_times
from eightfold.format.streaming import Damaged, copy_companions, open_writer, take_over
from eightfold.format.target import REPORT_NAME
from eightfold.layouts import Layout
from eightfold.model.reference.linear import row_pieces
from eightfold.progress import Progress, silent
from eightfold.quant.budget import Budget, base_bytes
from eightfold.quant.identity import differences, identity
from eightfold.quant.mixture import loader_settings
from eightfold.quant.name_plan import NamePlan, Unit
from eightfold.quant.name_rows import Rows
from eightfold.quant.name_sources import Source
from eightfold.quant.outcome import Outcome
from eightfold.quant.qparams import quantize_rows
from eightfold.quant.writing import TensorWriter
from eightfold.scheme import BIAS, WEIGHT, WEIGHT_OFFSET, WEIGHT_SCALE, QuantType, description_names, weight_file_stem
from eightfold.scheme import linear_tensors as tensors_of
from eightfold.written_config import both_dialects

_REDUNDANT = ("quantization_config", "compression_config", "quantize", "transformers_weights")
_SLACK_BYTES = 256 << 20


def quantize_by_name(
    plan: NamePlan,
    target: Path,
    *,
    overwrite: bool = False,
    part_bytes: int | None = None,
    memory: int | None = None,
    progress: Progress = silent,
) -> Outcome:
    """Quantize a model of any family, or go on with one that was begun.

    Args:
        plan: of name_plan.plan_by_name().
        target: the directory to make; it appears when everything is written, see format/output.py.
        overwrite: replace what quantize has written at `target` before.
        part_bytes: start a new weight file at this size; None writes one file.
        memory: how much this process may have resident, in bytes; None does not look.
        progress: who is told.

    Raises:
        EightfoldError: see errors.py; `target` is then as it was, unless the error is one that running again may not
            meet, such as a full disk.
    """
    budget_of(plan).spills(memory)
    layout = {"part_bytes": part_bytes, "generic": plan.layout.takes_any}
    head, source = identity(plan.stored, plan.recipe, [], layout=layout), plan.stored.directory
    growing = Output(target, head, source=source, explain=differences, overwrite=overwrite, progress=progress)
    with growing as output:
        return _Job(plan, part_bytes, progress).do(output)


def budget_of(plan: NamePlan) -> Budget:
    """Return what the largest linear takes: as it is stored, its integers, and some of its rows in float32."""
    sizes = [unit.source.shape for unit in plan.units if unit.kind is not QuantType.FLOAT]
    largest = max((n * k for n, k in sizes), default=0)
    return Budget(base_bytes(), 3 * largest + _SLACK_BYTES, 0)


@dataclass(frozen=True)
class _Job:
    plan: NamePlan
    part_bytes: int | None
    progress: Progress

    def do(self, output: Output) -> Outcome:
        """Write what is not written yet."""
        plan = self.plan
        outcome = Outcome(plan.recipe, plan.types, notes=list(plan.notes), layers=plan.num_layers)
        if output.is_complete:
            outcome.already_complete, outcome.layers_resumed = True, outcome.layers
            return outcome
        if output.journal.steps:
            require_same_times(plan.stored, output)
        try:
            self._write(output, outcome)
        except Damaged as damage:
            output.restart()
            outcome.restarted = str(damage)
            self._write(output, outcome)
        return outcome

    def _write(self, output: Output, outcome: Outcome) -> None:
        plan, journal = self.plan, output.journal
        if not journal.steps:
            keep_times(plan.stored, output)
        outcome.layers_resumed = layers_done(journal.entries)
        planned = [tensor.planned for tensor in plan.tensors.values()]
        outcome.tensors, outcome.nbytes = len(planned), total_bytes(planned)
        with open_writer(output, weight_file_stem(plan.recipe.scheme), planned, self.part_bytes) as files:
            writer = TensorWriter(plan.stored, plan.tensors, files)
            written = take_over(journal.entries, files, self.progress)
            output.require_space(total_bytes(tensor for tensor in planned if tensor.name not in written))
            self._take_steps(output, writer)
        self._write_companions(output, outcome)
        output.finish(files.file_checksums())

    @torch.inference_mode()
    def _take_steps(self, output: Output, writer: TensorWriter) -> None:
        plan, converter = self.plan, Converter(self.plan, writer)
        units: dict[str, list[Unit]] = {step: [] for step in plan.steps}
        for unit in plan.units:
            units[unit.step].append(unit)
        with self.progress(f"quantize to {plan.recipe.scheme.value}", len(plan.units), "tensor") as task:
            for step, members in units.items():
                is_written = step in output.journal.steps
                for unit in members:
                    if not is_written:
                        task.at(unit.name)
                        converter.write(unit)
                    task.advance()
                if not is_written:
                    output.journal.append({"step": step, "tensors": writer.finished()})

    def _write_companions(self, output: Output, outcome: Outcome) -> None:
        """Write the files that are carried over, the description, the report, and last config.json."""
        plan, scheme = self.plan, self.plan.recipe.scheme
        raw, notes = copy_companions(plan.stored, output)
        outcome.notes += notes
        tags = {name: tensor.tag for name, tensor in plan.tensors.items()}
        text = render_description(scheme, {**tags, **plan.entries})
        for name in description_names(scheme, legacy=False):
            (output.path / name).write_text(text, encoding="utf-8")
        write_json(output.path / REPORT_NAME, outcome.report())
        settings = loader_settings(plan.layout, plan.types, plan.parts, scheme)
        write_json(output.path / CONFIG_NAME, config_for(dict(raw), plan.layout, settings, plan.dtype))


def config_for(raw: dict[str, Any], layout: Layout, settings: Mapping[str, str], dtype: DType) -> dict[str, Any]:
    """Return config.json's object for the loaders of other engines.

    Everything is kept, also what is nested, but what the source says of its own quantization: it would hide the
    description. The dtype is written in both dialects, and the number of experts by the family's own name too.
    """
    runs_here = has_engine(raw)
    out = (
        both_dialects(raw, parse_config(raw, Path(CONFIG_NAME)), dtype)
        if runs_here
        else _for_loaders(raw, layout, dtype)
    )
    if isinstance(out.get("text_config"), dict):
        out["text_config"] = _for_loaders(out["text_config"], layout, dtype)
    out.update(settings)
    if layout.published:
        out["architectures"] = [layout.published]
    return out


def _for_loaders(raw: dict[str, Any], layout: Layout, dtype: DType) -> dict[str, Any]:
    out = {key: value for key, value in raw.items() if key not in _REDUNDANT}
    if "dtype" in raw or "torch_dtype" in raw or "architectures" in raw:
        out["torch_dtype"] = out["dtype"] = next(name for name, known in CONFIG_DTYPES.items() if known is dtype)
    count = next((raw[key] for key in EXPERT_KEYS if key in raw), None)
    if count is not None and layout.experts is not None:
        out.setdefault(layout.expert_key, count)
    return out


class Converter:
    """Makes what is planned of what is stored."""

    def __init__(self, plan: NamePlan, writer: TensorWriter) -> None:
        self._plan, self._stored, self._writer = plan, plan.stored, writer

    def write(self, unit: Unit) -> None:
        """Write all tensors of a linear, or a tensor that is in none."""
        source = unit.source
        if unit.kind is not QuantType.FLOAT:
            self._write_quantized(unit)
        elif unit.is_linear or source.scale:
            self._write_float(f"{unit.name}.{WEIGHT}" if unit.is_linear else unit.name, source)
        else:
            self._writer.copy(unit.name, source.tensor)
        if unit.bias is not None:
            self._writer.write(f"{unit.name}.{BIAS}", Rows(self._stored, unit.bias).all())
        self._release(source)

    def _write_quantized(self, unit: Unit) -> None:
        rows = Rows(self._stored, unit.source)
        n, k = unit.source.shape
        is_symmetric = unit.kind is not QuantType.W8A16 or self._plan.recipe.weight_symmetric
        made = rows.integers() or quantize_rows(n, k, rows, is_symmetric=is_symmetric)
        tensors = {WEIGHT: made.values, WEIGHT_SCALE: made.scale, WEIGHT_OFFSET: made.offset}
        for spec in tensors_of(unit.kind, has_bias=False):
            self._writer.write(f"{unit.name}.{spec.suffix}", tensors[spec.suffix])

    def _write_float(self, name: str, source: Source) -> None:
        if not source.scale and source.expert is None and source.shape == self._stored.tensors[source.tensor].shape:
            self._writer.copy(name, source.tensor)
        else:
            rows = Rows(self._stored, source)
            for piece in row_pieces(torch.empty(1).expand(source.shape)):
                self._writer.append(name, rows(piece.start, piece.stop))
            self._writer.done(name)

    def _release(self, source: Source) -> None:
        info = self._stored.tensors[source.tensor]
        count = info.shape[0] if source.expert is not None else 1
        each = info.nbytes // max(1, count)
        begin = each * (source.expert or 0)
        self._stored.release_part(source.tensor, begin, begin + each)
