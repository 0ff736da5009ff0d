"""What a quantization would take, before it begins: bytes, memory, disk and time.

Bytes follow from the shapes and are exact. Memory is what `--memory` goes by (budget.py). Time is measured: the first
three layers of the model, with its embedding and head, are really quantized, beside OUT and with some of the samples.
The first also finds memory and code; the quicker one of the others counts for all. Layers with experts and layers
without count apart. More samples than that cost in proportion to their tokens T, as two trials show:

    seconds of a layer = weights + tokens * T
"""

from __future__ import annotations

import fcntl
import os
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from shutil import disk_usage, rmtree
from typing import Any

from eightfold.config import ModelConfig
from eightfold.errors import CapacityError, OutputError, remember_kept
from eightfold.families import LinearShape, all_linears, expert_block, layer_linears, layer_of
from eightfold.format.checkpoint import Checkpoint
from eightfold.format.journal import partial_path
from eightfold.format.output import cannot_write
from eightfold.machine import available_bytes
from eightfold.progress import Progress, Task, silent
from eightfold.quant.budget import budget_for
from eightfold.quant.hidden import GENERATIONS
from eightfold.quant.pipeline import quantize_checkpoint
from eightfold.quant.plan import OutputPlan, assign_types, attention_modules, fa_layers
from eightfold.quant.recipe import Recipe, Samples
from eightfold.quant.rotate import rotated
from eightfold.scheme import weight_name
from eightfold.values import size_text

_MIB = 1 << 20

# Journal, description, tokenizer, rounding up to blocks of the file system.
COMPANION_BYTES = 64 * _MIB

_TRIAL_LAYERS = 3

# A trial's samples: so many products of a layer's weights, within bounds of tokens.
_TRIAL_PRODUCTS, _LEAST_TOKENS, _MOST_TOKENS = 4e11, 512, 8192


@dataclass(frozen=True)
class Phase:
    """One kind of work, over all layers: its seconds, and the bytes it reads from the source and writes to OUT."""

    phase: str
    seconds: float
    read_bytes: int = 0
    written_bytes: int = 0

    def as_json(self) -> dict[str, Any]:
        """Return it with its seconds rounded."""
        return asdict(replace(self, seconds=round(self.seconds, 2)))


@dataclass(frozen=True)
class Estimate:
    """What a run would take, and whether it fits this machine.

    Attributes:
        phases: in the order in which the run meets them.
        peak_bytes: the most that is resident at once; as `memory`, it is enough.
        output_bytes: tensors of the output.
        disk_bytes: room that the target's disk must have, hidden states included.
        free_bytes: room that it has.
        memory_bytes: the budget, or what the machine has free; None where that is unknown.
        spills: whether hidden states live in files only.
        trial_seconds: how long measuring took.
        refusal: why a run with this budget would be refused; empty when it would not.
        notes: what the estimate leaves out.
        measured: what was tried.
    """

    phases: tuple[Phase, ...]
    peak_bytes: int
    output_bytes: int
    disk_bytes: int
    free_bytes: int
    memory_bytes: int | None
    spills: bool
    trial_seconds: float
    measured: str
    refusal: str = ""
    notes: tuple[str, ...] = ()

    def total(self, what: str) -> Any:
        """Return the sum over all phases of `seconds`, `read_bytes` or `written_bytes`."""
        return sum(getattr(phase, what) for phase in self.phases)

    @property
    def fits_disk(self) -> bool:
        """Whether the output and what goes with it fits."""
        return self.disk_bytes <= self.free_bytes

    @property
    def fits_memory(self) -> bool:
        """Whether the run stays within the budget."""
        return not self.refusal and (self.memory_bytes is None or self.peak_bytes <= self.memory_bytes)

    def as_json(self) -> dict[str, Any]:
        """Return everything as one JSON object."""
        return {
            "plan": [p.as_json() for p in self.phases],
            **{key: value for key, value in self._all.as_json().items() if key != "phase"},
            "peak_mib": -(-self.peak_bytes // _MIB),
            "output_bytes": self.output_bytes,
            "disk_bytes": self.disk_bytes,
            "disk_free_bytes": self.free_bytes,
            "memory_bytes": self.memory_bytes,
            "spills": self.spills,
            "fits_disk": self.fits_disk,
            "fits_memory": self.fits_memory,
            "trial_seconds": round(self.trial_seconds, 2),
            "refusal": self.refusal or None,
            "notes": list(self.notes),
        }

    @property
    def _all(self) -> Phase:
        return Phase("all", *(self.total(what) for what in ("seconds", "read_bytes", "written_bytes")))

    def render(self) -> list[str]:
        """Return the lines of a table for a person."""
        rows = [("phase", "time", "read", "write")]
        rows += [
            (p.phase, _time(p.seconds), size_text(p.read_bytes), size_text(p.written_bytes))
            for p in (*self.phases, self._all)
        ]
        states = "in files" if self.spills else "in memory"
        memory = "unknown" if self.memory_bytes is None else f"{self.memory_bytes // _MIB} MiB"
        return [
            *(f"{name:<14}" + "".join(f"{cell:>12}" for cell in cells) for name, *cells in rows),
            "",
            f"disk      {size_text(self.disk_bytes)} needed ({size_text(self.output_bytes)} for the model), "
            f"{size_text(self.free_bytes)} free: {'fits' if self.fits_disk else 'DOES NOT FIT'}",
            f"memory    {-(-self.peak_bytes // _MIB)} MiB at most, {memory} available: "
            f"{'fits' if self.fits_memory else 'DOES NOT FIT'}; hidden states {states}",
            f"measured  {self.measured}, in {self.trial_seconds:.1f} s",
            *([f"refused: {self.refusal}"] if self.refusal else []),
            *(f"note: {note}" for note in self.notes),
        ]


def estimate_run(
    checkpoint: Checkpoint,
    recipe: Recipe,
    samples: Samples,
    anti_samples: Samples = (),
    *,
    target: Path,
    memory: int | None,
    progress: Progress = silent,
    has_limit: bool = False,
) -> Estimate:
    """Estimate a quantization by a trial of three layers, in a folder beside the target that goes away again.

    Args:
        checkpoint: the float model.
        recipe: what to do.
        samples: token ids of the calibration samples.
        anti_samples: those for outlier suppression alone.
        target: where the output would go.
        memory: the budget in bytes, or None for what the machine has free.
        progress: who is told.
        has_limit: whether a loss has to be kept: losses are then looked for, and what is made is proved.

    Raises:
        OutputError: nothing can be written there, or another process is planning the same output.
    """
    started = _process_seconds()
    anti_samples = anti_samples if recipe.anti_outlier is not None else []
    samples = samples if recipe.needs_samples(bool(anti_samples)) else []
    folder = next(folder for folder in target.absolute().parents if folder.is_dir())
    budget, refusal = budget_for(checkpoint, recipe, samples, anti_samples), ""
    try:
        spills = budget.spills(memory)
    except CapacityError as error:
        spills, refusal = True, str(error)
    spilled = GENERATIONS * (budget.states + budget.proved)
    times, seconds = _try(checkpoint, recipe, (samples, anti_samples), folder / f".{target.name}.plan", progress)
    phases, output_bytes = _phases(checkpoint, recipe, sum(map(len, [*samples, *anti_samples])), times)
    if has_limit:
        more, kept = _losses(checkpoint, recipe, samples, folder / f".{target.name}.plan", memory, progress)
        phases, spilled = [*phases, *more], spilled + kept
    return Estimate(
        phases=(Phase("start", started), *phases),
        peak_bytes=budget.needed + (0 if spills else budget.states),
        output_bytes=output_bytes,
        disk_bytes=output_bytes + spilled + COMPANION_BYTES,
        free_bytes=disk_usage(folder).free,
        memory_bytes=memory if memory is not None else available_bytes(),
        spills=spills,
        trial_seconds=seconds,
        refusal=refusal,
        notes=_notes(recipe, has_limit),
        measured=f"{_trial_layers(checkpoint.config)} layers of the model",
    )


class _Times:
    """How long a run took for each of its steps, by their names; a Progress."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._step, self._since = "open", time.perf_counter()

    def mark(self, step: str) -> None:
        now = time.perf_counter()
        self.seconds[self._step] += now - self._since
        self._step, self._since = step, now

    @contextmanager
    def __call__(self, title: str, total: int, unit: str) -> Iterator[Task]:
        times, kind = self, "float pass" if "quantize" not in title else "layer"

        class Marks(Task):
            def at(self, text: str) -> None:
                times.mark(text.partition(",")[0].replace("layer", kind))

        yield Marks()
        self.mark("end")


# So many tokens, and the seconds of each step.
_Trial = tuple[int, Mapping[str, float]]


def _trial_layers(config: ModelConfig) -> int:
    """Return how many layers a trial takes: three, or as many more as lie before the first of another kind."""
    firsts = {config.is_sparse(layer_idx): layer_idx for layer_idx in reversed(range(config.num_layers))}
    return min(max(_TRIAL_LAYERS, *(first + 1 for first in firsts.values())), config.num_layers)


def _seconds(config: ModelConfig, trials: Sequence[_Trial], step: str, tokens: int) -> float:
    """Return the seconds of one step of all layers for so many tokens; those with experts count apart."""
    counts = Counter(config.is_sparse(layer_idx) for layer_idx in range(config.num_layers))
    tried = range(_trial_layers(config))
    return sum(
        count * _layer_seconds(trials, step, tokens, [i for i in tried if config.is_sparse(i) is kind])
        for kind, count in counts.items()
    )


def _layer_seconds(trials: Sequence[_Trial], step: str, tokens: int, layers: Sequence[int]) -> float:
    """Return the seconds of one layer for so many tokens: on the line through the first and the last trial."""

    def quickest(seconds: Mapping[str, float]) -> float:
        """After the first layer of the model, unless that is all there is."""
        found = [seconds.get(f"{step} {layer_idx}", 0.0) for layer_idx in layers if layer_idx or len(layers) == 1]
        return min(filter(None, found), default=seconds.get(f"{step} {layers[0]}", 0.0))

    (most, more), (least, fewer) = ((count, quickest(seconds)) for count, seconds in (trials[0], trials[-1]))
    slope = max(0.0, more - fewer) / (most - least) if most != least else 0.0
    return more + slope * (tokens - most)


def _products(config: ModelConfig) -> int:
    """Return how many elements of the largest kind of layer a token is multiplied by."""
    found = []
    for layer_idx in range(_trial_layers(config)):
        block, experts = expert_block(config, layer_idx), config.experts
        all_of_them = _elements(layer_linears(config, layer_idx))
        others = 0 if block is None or experts is None else experts.count - experts.per_token
        found.append(all_of_them - others * _elements(block.experts[0] if block is not None else ()))
    return max(found)


def _elements(linears: Iterable[LinearShape]) -> int:
    return sum(linear.n * linear.k for linear in linears)


def _try(
    checkpoint: Checkpoint, recipe: Recipe, samples: tuple[Samples, Samples], place: Path, progress: Progress
) -> tuple[list[_Trial], float]:
    """Quantize three layers, with as many samples as say enough of all and with fewer; return how long all took too."""
    began = time.perf_counter()
    model = checkpoint.first_layers(_trial_layers(checkpoint.config))
    shortened = _for_layers(model, recipe)
    most = int(min(max(_TRIAL_PRODUCTS / _products(model.config), _LEAST_TOKENS), _MOST_TOKENS))
    chosen = [_spread(each, most) for each in samples]
    is_all = list(map(len, chosen)) == list(map(len, samples))
    rounds = [chosen] if is_all else [chosen, [_spread(each, most // 2) for each in samples]]
    trials: list[_Trial] = []
    with progress("time three layers", len(rounds), "trial") as task:
        for trial in rounds:
            with trial_place(place) as out:
                times = _Times()
                quantize_checkpoint(model, out, shortened, *trial, progress=times)
                times.mark("done")
            trials.append((sum(map(len, [*trial[0], *trial[1]])), times.seconds))
            task.advance()
    return trials, time.perf_counter() - began


@contextmanager
def trial_place(path: Path) -> Iterator[Path]:
    """Make a folder for a trial's output, which goes away again; what a killed plan has left there is removed.

    Raises:
        OutputError: it cannot be made, or another process has it.
    """
    out = path / "out"
    try:
        path.mkdir(mode=0o700, exist_ok=True)
        folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            made = (out, partial_path(out))
            try:
                for left in made:
                    rmtree(left, ignore_errors=True)
                yield out
            finally:
                for left in made:
                    rmtree(left, ignore_errors=True)
                with suppress(OSError):  # the next plan removes what could not be removed
                    path.rmdir()
        finally:
            os.close(folder)
    except BlockingIOError:
        raise OutputError(f"cannot write to {path}: another plan at work", action="Wait for it to end.") from None
    except OSError as error:
        raise cannot_write(path, error) from None
    except BaseException as error:  # Ctrl-C too
        remember_kept(error, "")  # what the trial had finished is gone with its folder
        raise


def _for_layers(model: Checkpoint, recipe: Recipe) -> Recipe:
    """Return a recipe as it is for a model of fewer layers: without patterns that match none of its modules."""
    names = [*all_linears(model.config), *(attention_modules(model.config) if recipe.fa_quant else ())]

    def matches(pattern: str) -> bool:
        return any(fnmatchcase(name, pattern) for name in names)

    return replace(
        recipe,
        modules=tuple(row for row in recipe.modules if matches(row[0])),
        keep_float=tuple(pattern for pattern in recipe.keep_float if matches(pattern)),
        disable_level=min(recipe.disable_level, 1),
        fa_amp=min(recipe.fa_amp, 1),
    )


def _spread(samples: Samples, tokens: int) -> list[Sequence[int]]:
    """Return samples from everywhere that have about so many tokens together; all, if those have no more."""
    total = sum(map(len, samples))
    count = max(1, len(samples) * tokens // total) if total > tokens else len(samples)
    return [samples[i * len(samples) // count] for i in range(count)]


def _phases(checkpoint: Checkpoint, recipe: Recipe, tokens: int, trials: Sequence[_Trial]) -> tuple[list[Phase], int]:
    """Return the phases but for the start, and the bytes of the output's tensors."""
    config, times = checkpoint.config, trials[0][1]
    model = rotated(checkpoint, recipe)
    planned = OutputPlan(model, recipe, assign_types(config, recipe), fa_layers(config, recipe)).tensors.values()
    sizes = {tensor.planned.name: tensor.planned.nbytes for tensor in planned}
    read = sum(info.nbytes for name, info in checkpoint.tensors.items() if layer_of(name) is not None)
    embedding = weight_name(config.names.embedding)
    written = sum(size for name, size in sizes.items() if layer_of(name) is not None)
    found = [
        Phase("open", times["open"]),
        Phase("embedding", times["embedding"], checkpoint.tensors[embedding].nbytes, sizes[embedding]),
    ]
    if recipe.decides_by_comparison:
        found.append(Phase("float pass", _seconds(config, trials, "float pass", tokens), read))
    found += [
        Phase("layers", _seconds(config, trials, "layer", tokens), read, written),
        Phase(
            "head",
            times["head"],
            model.tensors[model.head_weight()].nbytes,
            sum(sizes.values()) - sizes[embedding] - written,
        ),
        Phase("finish", times["end"]),
    ]
    return found, sum(sizes.values())


def _process_seconds() -> float:
    """Return how long this process has been running: a run starts in the same way."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        uptime = float(Path("/proc/uptime").read_text().split()[0])
        return uptime - int(fields[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return time.process_time()


def _losses(
    checkpoint: Checkpoint, recipe: Recipe, samples: Samples, place: Path, memory: int | None, progress: Progress
) -> tuple[list[Phase], int]:
    """Return how long looking for losses and a proof take, by trying three layers, and the bytes of what is kept."""
    from eightfold.quant.within import analyze, held_out, proof_seconds, question_of

    model, count = checkpoint.first_layers(_trial_layers(checkpoint.config)), checkpoint.config.num_layers
    rest, held = held_out(samples) if len(samples) > 1 else (samples, samples)
    began = time.perf_counter()
    with trial_place(place) as folder:
        folder.mkdir()
        analyze(model, _for_layers(model, recipe), rest, folder, memory=memory, progress=progress)
    seconds = (time.perf_counter() - began) * count / model.config.num_layers
    read = sum(info.nbytes for name, info in checkpoint.tensors.items() if layer_of(name) is not None)
    question = question_of(checkpoint, recipe, rest, None)
    tokens, width = sum(map(len, question.pieces)), checkpoint.config.hidden_size
    proof = proof_seconds(model, held) * count / model.config.num_layers
    return [Phase("losses", seconds, 2 * read), Phase("proof", proof, 2 * read)], 4 * tokens * width * (count + 9)


def _notes(recipe: Recipe, has_limit: bool) -> tuple[str, ...]:
    notes = ["the time to read depends on how much of the source is in the page cache now."]
    if recipe.decides_by_comparison:
        notes.append("which linears stay float is known only after the float pass; all are counted as quantized.")
    if has_limit:
        notes.append("which types linears get is known only after the losses; a proof that fails makes the model anew.")
    return tuple(notes)


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
