"""What a quantization is going to take, before a weight is read: bytes, memory, disk and time of each phase.

    seconds of a pass     sum over linears and batches of    T N c(kind, K) + widening N K + finding the output's memory
                          + T * what the rest of a layer takes
    seconds of weights    elements * what one takes to read from the source, to be rounded, to be copied to the disk's
                          cache; all of it is no less than what the disk takes for what is written
    peak                  what the process has + the largest phase: stored weights (mapped), integers, float32 copies,
                          one batch on its way, hidden states that live in memory

The constants c and the others come from probe.py. Bytes follow from the shapes and are exact.

Letters: T tokens, K inputs, N outputs, E hidden size, F intermediate size, V vocabulary.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from shutil import disk_usage
from typing import Any

from eightfold.errors import CapacityError
from eightfold.families import EMBEDDING, LM_HEAD, LinearShape, input_groups, layer_of, layer_prefix
from eightfold.format.checkpoint import Checkpoint
from eightfold.format.writer import total_bytes
from eightfold.machine import available_bytes, resident_bytes
from eightfold.quant.budget import budget_for
from eightfold.quant.hidden import GENERATIONS, sample_batches
from eightfold.quant.methods import AntiOutlier
from eightfold.quant.plan import Plan
from eightfold.quant.probe import MAPPED_BYTES, Machine, probe
from eightfold.quant.recipe import Recipe, assign_types, fa_layers
from eightfold.quant.survey import FEATURE_SAMPLES, needs_survey, smoothed_pairs
from eightfold.scheme import NEEDS_CALIBRATION, QuantType, weight_name

_MIB = 1 << 20

# What torch and its matrix library keep once they have computed: threads, packed pieces, the allocator's free lists;
# and what torch alone keeps once it has rounded weights.
_ENGINE_BYTES, _ROUNDING_BYTES = 160 * _MIB, 64 * _MIB

# Of a tensor that is only copied, so much is in memory.
_COPY_BYTES = 34 * _MIB

# Journal, description, tokenizer, rounding up to blocks of the file system.
_COMPANION_BYTES = 64 * _MIB


@dataclass(frozen=True)
class Phase:
    """One kind of work, over all layers.

    Attributes:
        name: for the user.
        seconds: estimated.
        read_bytes: from the source's disk.
        written_bytes: to the target's.
        peak_bytes: resident in this phase, mapped pages of the source included.
    """

    name: str
    seconds: float
    read_bytes: int = 0
    written_bytes: int = 0
    peak_bytes: int = 0

    def as_json(self) -> dict[str, Any]:
        """Return the phase as a JSON object."""
        return {
            "phase": self.name,
            "seconds": round(self.seconds, 2),
            "read_bytes": self.read_bytes,
            "written_bytes": self.written_bytes,
            "peak_mib": round(self.peak_bytes / _MIB, 1),
        }


@dataclass(frozen=True)
class RunPlan:
    """The phases of a run, and whether it fits this machine.

    Attributes:
        phases: in the order in which a layer meets them.
        output_bytes: tensors of the output.
        spilled_bytes: hidden states on disk while it runs.
        spills: whether hidden states live there only.
        free_bytes: on the target's disk.
        memory_bytes: the budget, or what the machine has free.
        machine: what was measured.
        refusal: why a run with this budget would be refused; empty when it would not.
        notes: what the estimate leaves out.
    """

    phases: tuple[Phase, ...]
    output_bytes: int
    spilled_bytes: int
    spills: bool
    free_bytes: int
    memory_bytes: int | None
    machine: Machine
    refusal: str = ""
    notes: tuple[str, ...] = ()

    @property
    def seconds(self) -> float:
        """Of all phases."""
        return sum(phase.seconds for phase in self.phases)

    @property
    def peak_bytes(self) -> int:
        """Of the largest phase."""
        return max(phase.peak_bytes for phase in self.phases)

    @property
    def disk_bytes(self) -> int:
        """Room that the target's disk must have."""
        return self.output_bytes + self.spilled_bytes + _COMPANION_BYTES

    @property
    def fits_disk(self) -> bool:
        """Whether the output and what goes with it fits."""
        return self.disk_bytes <= self.free_bytes

    @property
    def fits_memory(self) -> bool:
        """Whether the largest phase stays within the budget."""
        return not self.refusal and (self.memory_bytes is None or self.peak_bytes <= self.memory_bytes)

    def as_json(self) -> dict[str, Any]:
        """Return everything as one JSON object."""
        machine = self.machine
        return {
            "plan": [phase.as_json() for phase in self.phases],
            "seconds": round(self.seconds, 2),
            "peak_mib": round(self.peak_bytes / _MIB, 1),
            "read_bytes": sum(phase.read_bytes for phase in self.phases),
            "written_bytes": sum(phase.written_bytes for phase in self.phases),
            "output_bytes": self.output_bytes,
            "disk_bytes": self.disk_bytes,
            "disk_free_bytes": self.free_bytes,
            "memory_bytes": self.memory_bytes,
            "spills": self.spills,
            "fits_disk": self.fits_disk,
            "fits_memory": self.fits_memory,
            "machine": {
                "read_mb_s": round(1e-6 / machine.read, 1),
                "write_mb_s": round(1e-6 / machine.write, 1),
                "float_gflop_s": round(machine.gflops, 1),
                "quantize_elements_s": round(1 / machine.quantize),
                "busy": round(machine.busy, 2),
                "probe_seconds": round(machine.seconds, 2),
            },
            "refusal": self.refusal or None,
            "notes": list(self.notes),
        }

    def render(self) -> list[str]:
        """Return the lines of a table for a person."""
        header = ("phase", "time", "read", "write", "peak memory")
        rows = [
            (p.name, _time(p.seconds), _size(p.read_bytes), _size(p.written_bytes), _size(p.peak_bytes))
            for p in self.phases
        ]
        read, written = (sum(getattr(p, key) for p in self.phases) for key in ("read_bytes", "written_bytes"))
        rows.append(("all", _time(self.seconds), _size(read), _size(written), _size(self.peak_bytes)))
        widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
        lines = [
            "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
            for row in (header, *rows)
        ]
        notes = [*([f"refused: {self.refusal}"] if self.refusal else []), *(f"note: {note}" for note in self.notes)]
        return [*lines, "", *self._verdict(), *notes]

    def _verdict(self) -> list[str]:
        machine = self.machine
        states = "in files" if self.spills else "in memory"
        memory = "unknown" if self.memory_bytes is None else _size(self.memory_bytes)
        return [
            f"disk      {_size(self.disk_bytes)} needed ({_size(self.output_bytes)} for the model), "
            f"{_size(self.free_bytes)} free: {'fits' if self.fits_disk else 'DOES NOT FIT'}",
            f"memory    {_size(self.peak_bytes)} at most, {memory} to be had: "
            f"{'fits' if self.fits_memory else 'DOES NOT FIT'}; hidden states {states}",
            f"measured  read {1e-6 / machine.read:,.0f} MB/s, write {1e-6 / machine.write:,.0f} MB/s, "
            f"products {machine.gflops:,.0f} GFLOP/s, to int8 {1e-6 / machine.quantize:,.0f} M/s, "
            f"{machine.busy:.1f} times the quickest, in {machine.seconds:.1f} s",
        ]


def plan_run(
    checkpoint: Checkpoint, recipe: Recipe, sample_lengths: Sequence[int], *, target: Path, memory: int | None
) -> RunPlan:
    """Plan a quantization; reads headers and a few pieces of weights, and probes this machine for some seconds.

    Args:
        checkpoint: the float model.
        recipe: what to do.
        sample_lengths: tokens of each calibration sample; empty for recipes that need none.
        target: where the output would go. Beside it a file is written and removed.
        memory: the budget in bytes, or None for what the machine has free.

    Raises:
        OutputError: nothing can be written there.
    """
    started = _process_seconds()
    base = resident_bytes() or 300 * _MIB
    types = assign_types(checkpoint.config, recipe)
    folder = _existing(target)
    lengths = list(sample_lengths) if recipe.needs_samples else []
    spills, refusal = _spills(checkpoint, recipe, lengths, memory)
    kept = _ENGINE_BYTES if lengths else _ROUNDING_BYTES
    machine = probe(checkpoint, recipe, sorted(set(types.values())), lengths, folder)
    work = _Work(checkpoint, recipe, types, lengths, machine, base + kept, spills)
    phases = [phase for phase in work.phases() if phase is not None]
    return RunPlan(
        phases=(Phase("start", started, peak_bytes=base), *phases, *_waiting(phases, machine)),
        output_bytes=work.output_bytes,
        spilled_bytes=GENERATIONS * work.state_bytes,
        spills=spills,
        refusal=refusal,
        free_bytes=disk_usage(folder).free,
        memory_bytes=memory if memory is not None else available_bytes(),
        machine=machine,
        notes=_notes(recipe),
    )


def _waiting(phases: Sequence[Phase], machine: Machine) -> list[Phase]:
    """Return the time for which all else is done and the disk is not; it writes while other work goes on."""
    seconds = sum(phase.written_bytes for phase in phases) * machine.write - sum(phase.seconds for phase in phases)
    return [Phase("the disk", seconds)] if seconds > 0 else []


def _spills(checkpoint: Checkpoint, recipe: Recipe, lengths: Sequence[int], memory: int | None) -> tuple[bool, str]:
    """Return whether hidden states would live in files, and why a run would be refused, if it would."""
    try:
        return budget_for(checkpoint, recipe, [range(length) for length in lengths]).spills(memory), ""
    except CapacityError as error:
        return True, str(error)


def _existing(target: Path) -> Path:
    """Return the directory, or the one above it that exists."""
    folder = target.absolute()
    while not folder.is_dir():
        folder = folder.parent
    return folder


def _process_seconds() -> float:
    """Return how long this process has been running: a run starts in the same way."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        uptime = float(Path("/proc/uptime").read_text().split()[0])
        return uptime - int(fields[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return time.process_time()


def _notes(recipe: Recipe) -> tuple[str, ...]:
    notes = ["the time to read depends on how much of the source is in the page cache now."]
    if recipe.anti_outlier in (AntiOutlier.M2, AntiOutlier.M3, AntiOutlier.M6):
        notes.append(f"{recipe.anti_outlier.value} searches its scales; that time is not in this plan.")
    if recipe.decides_by_comparison:
        notes.append("which linears stay float is known only after the survey; all are counted as quantized.")
    return tuple(notes)


@dataclass
class _Work:
    """The arithmetic of a plan."""

    checkpoint: Checkpoint
    recipe: Recipe
    types: dict[str, QuantType]
    lengths: list[int]
    machine: Machine
    base: int
    spills: bool
    linears: list[LinearShape] = field(init=False)

    def __post_init__(self) -> None:
        self.config = self.checkpoint.config
        self.linears = [linear for group in input_groups(self.config) for linear in group.linears]
        self.itemsize = self.checkpoint.dtype.itemsize
        recipe = self.recipe
        planned = Plan(self.checkpoint, recipe, self.types, fa_layers(self.config, recipe)).tensors
        tensors = [tensor.planned for tensor in planned.values()]
        self.output_bytes = total_bytes(tensors)
        self.layer_out = total_bytes(tensor for tensor in tensors if layer_of(tensor.name) == 0)
        self.head_out = total_bytes(tensor for tensor in tensors if tensor.name.startswith(f"{LM_HEAD}."))
        self.embedding = self.checkpoint.tensors[weight_name(EMBEDDING)].nbytes
        self.layer_in = sum(
            self.checkpoint.tensors[name].nbytes for name in self.checkpoint.layer_tensors(layer_prefix(0))
        )
        everything = recipe.anti_outlier is not None or recipe.kv_int8
        surveyed = self.lengths if everything else self.lengths[:FEATURE_SAMPLES]
        self.surveyed = surveyed if needs_survey(recipe) else []
        self.calibrated = self.lengths if recipe.calibrates else []
        self.proved = self.lengths[:1] if recipe.anti_outlier is not None else []
        streams = sum(self.surveyed) + sum(self.calibrated) + sum(self.proved)
        self.state_bytes = 4 * self.config.hidden_size * streams

    # --- memory

    @property
    def _largest(self) -> int:
        return max(linear.n * linear.k for linear in self.linears)

    @property
    def _integers(self) -> int:
        return sum(linear.n * linear.k for linear in self.linears if self._kind(linear) is not QuantType.FLOAT)

    def _kind(self, linear: LinearShape) -> QuantType:
        return self.types[layer_prefix(0) + linear.name]

    def _batch(self, lengths: Sequence[int]) -> int:
        """Return the tokens of the largest batch."""
        return max((sum(lengths[i] for i in batch) for batch in sample_batches(lengths)), default=0)

    def _survey_bytes(self) -> int:
        if not self.surveyed:
            return 0
        config, tokens = self.config, self._batch(self.surveyed)
        passing = 4 * tokens * (4 * config.hidden_size + 2 * config.intermediate_size)
        return self.layer_in + 4 * self._largest + max(passing, self._scale_bytes())

    def _scale_bytes(self) -> int:
        titles = {pair.group for pair in smoothed_pairs(self.recipe.anti_outlier)}
        groups = [group for group in input_groups(self.config) if group.title in titles]
        return max((4 * sum(linear.n * linear.k for linear in group.linears) for group in groups), default=0)

    def _calibrate_bytes(self) -> int:
        if not self.calibrated:
            return 0
        config, tokens = self.config, self._batch(self.calibrated)
        widened = 4 * self._largest if QuantType.W8A16 in self.types.values() else 0
        static = 1 if self.recipe.schemes & NEEDS_CALIBRATION else 0
        wide = (3 + static) * config.intermediate_size + 4 * config.hidden_size
        return self.layer_in + self._integers + widened + 4 * tokens * wide

    def _prove_bytes(self) -> int:
        return self.layer_in + self._integers + 4 * self._largest if self.proved else 0

    def _resident_states(self) -> int:
        return 0 if self.spills else self.state_bytes

    # --- time

    def _pass(self, lengths: Sequence[int], rest: float, *, quantized: bool) -> float:
        """Return the seconds of one layer for these samples."""
        seconds = sum(lengths) * rest
        for batch in sample_batches(lengths):
            tokens = sum(lengths[i] for i in batch)
            seconds += sum(self._linear(linear, tokens, quantized=quantized) for linear in self.linears)
        return seconds

    def _linear(self, linear: LinearShape, tokens: int, *, quantized: bool) -> float:
        kind = self._kind(linear) if quantized else QuantType.FLOAT
        machine, elements = self.machine, linear.n * linear.k
        seconds = tokens * linear.n * machine.product[kind, linear.k]
        if kind in (QuantType.FLOAT, QuantType.W8A16):
            seconds += elements * machine.widen_again
        output = 4 * tokens * linear.n
        if output >= MAPPED_BYTES:
            seconds += output * machine.fresh
        return seconds

    def _scaling(self) -> float:
        """Return the seconds in which one layer's weights are looked at for smoothing."""
        titles = {pair.group for pair in smoothed_pairs(self.recipe.anti_outlier)}
        elements = sum(
            linear.n * linear.k
            for group in input_groups(self.config)
            if group.title in titles
            for linear in group.linears
        )
        return 2 * elements * self.machine.widen

    def phases(self) -> list[Phase | None]:
        """Return all phases but the start."""
        layers, machine, base = self.config.num_layers, self.machine, self.base
        states = self._resident_states()
        weights = sum(linear.n * linear.k for linear in self.linears)
        reads = 2 if self.recipe.decides_by_comparison else 1
        survey = (
            self._pass(self.surveyed, machine.survey_rest, quantized=False) + self._scaling() if self.surveyed else 0
        )
        calibrate = self._pass(self.calibrated, machine.calibrate_rest, quantized=True) if self.calibrated else 0.0
        prove = self._pass(self.proved, machine.survey_rest, quantized=False) + 2 * weights * machine.widen
        moved = 4 * self.config.hidden_size * (sum(self.surveyed) + sum(self.calibrated) + sum(self.proved))
        head_in = self.checkpoint.tensors[self.checkpoint.head_weight()].nbytes
        layer_read = layers * self.layer_in * reads
        return [
            self._copy("embedding", self.embedding, self.embedding),
            Phase("read layers", layer_read * machine.read, layer_read, 0, base + self.layer_in + states),
            Phase("survey", layers * survey, 0, 0, base + self._survey_bytes() + states) if self.surveyed else None,
            Phase(
                "quantize",
                layers * self._integers * machine.quantize,
                peak_bytes=base + self.layer_in + self._integers + states,
            ),
            Phase("calibrate", layers * calibrate, 0, 0, base + self._calibrate_bytes() + states)
            if self.calibrated
            else None,
            Phase("prove", layers * prove, 0, 0, base + self._prove_bytes() + states) if self.proved else None,
            Phase(
                "write layers",
                layers * self.layer_out * machine.copy,
                0,
                layers * self.layer_out,
                base + self.layer_in + self._integers + states,
            ),
            Phase("hidden states", layers * moved * machine.copy, 0, layers * moved, base + states) if moved else None,
            self._copy("head", head_in * (1 + len(self.proved)), self.head_out, states),
        ]

    def _copy(self, name: str, read: int, written: int, states: int = 0) -> Phase:
        seconds = read * self.machine.read + written * self.machine.copy
        return Phase(name, seconds, read, written, self.base + _COPY_BYTES + states)


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _size(nbytes: int) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= scale:
            return f"{nbytes / scale:.2f} {unit}" if unit == "GB" else f"{nbytes / scale:.0f} {unit}"
    return "-" if nbytes == 0 else f"{nbytes} B"
