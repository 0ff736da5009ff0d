"""What `eightfold quantize` does with its options, in one process or in several, and what it says of it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eightfold.cli import console
from eightfold.cli.calibration import Calibration
from eightfold.errors import ConfigError
from eightfold.machine import peak_resident_bytes
from eightfold.parallel.world import World

if TYPE_CHECKING:
    import torch

    from eightfold.format.checkpoint import Checkpoint
    from eightfold.parallel.ranks import Ranks
    from eightfold.quant.outcome import Outcome
    from eightfold.quant.recipe import Recipe


@contextmanager
def ranks_of_environment() -> Iterator[Ranks]:
    """The processes that torchrun has started; an error of one ends all."""
    from eightfold.parallel.ranks import Ranks

    world = World.of_environment()
    if world.size > 1:
        console.require_torch("quantize")
    ranks = Ranks(world)
    try:
        yield ranks
    except BaseException as error:
        ranks.fail(error)
        raise
    ranks.end()


@dataclass(frozen=True)
class Command:
    """What was asked for."""

    source: Path
    target: Path
    recipe: Recipe
    calibration: Calibration
    part_bytes: int | None
    legacy_names: bool
    device: str
    memory: int | None
    overwrite: bool
    as_json: bool
    names_act_method: bool
    started: float

    def plan(self, ranks: Ranks) -> None:
        """Say what it would take."""
        if ranks.is_first:
            checkpoint = self._checked(is_plan=True)
            samples = self._samples(checkpoint) or []
            _show_plan(checkpoint, self.recipe, samples, self.target, self.memory, self.as_json)

    def do(self, ranks: Ranks) -> Outcome:
        """Quantize. The texts are read and tokenized by one process."""
        # What can be refused is refused before torch is loaded and texts are tokenized.
        samples = self._samples(self._checked()) if ranks.is_first else None
        samples = ranks.share(samples)
        console.require_torch("quantize")
        from eightfold.progress import silent
        from eightfold.quant.pipeline import quantize_checkpoint

        return quantize_checkpoint(
            self.source,
            self.target,
            self.recipe,
            samples,
            overwrite=self.overwrite,
            part_bytes=self.part_bytes,
            legacy_names=self.legacy_names,
            device=_torch_device(self.device, ranks),
            memory=self.memory,
            progress=console.bars if ranks.is_first else silent,
            ranks=ranks,
        )

    def _checked(self, *, is_plan: bool = False) -> Checkpoint:
        """Open the float model; refuse a recipe or an output directory that does not go with it."""
        from eightfold.format.checkpoint import Checkpoint
        from eightfold.format.output import QUANTIZE, check_target
        from eightfold.quant.recipe import assign_types, require_level

        checkpoint = Checkpoint.open(self.source)
        require_level(self.recipe, assign_types(checkpoint.config, self.recipe))
        check_target(self.target, QUANTIZE, source=self.source, overwrite=self.overwrite or is_plan)
        return checkpoint

    def _samples(self, checkpoint: Checkpoint) -> list[list[int]] | None:
        """Return the calibration samples; None when the recipe has no use for any."""
        recipe, found = self.recipe, None
        if recipe.needs_samples:
            found = self.calibration.samples(checkpoint)
        elif self.calibration.given:
            self.calibration.check()
            console.note(f"nothing here needs calibration data; {self.calibration.given} changes nothing.")
        if not recipe.has_static_inputs and self.names_act_method:
            console.note(f"{recipe.scheme.value} has no static inputs; --act-method changes nothing.")
        return found

    def tell(self, outcome: Outcome, ranks: Ranks) -> None:
        """Say what came of it."""
        seconds = time.monotonic() - self.started
        peaks = ranks.gather(peak_resident_bytes())
        if not ranks.is_first:
            return
        if self.as_json:
            console.print_json(_document(outcome, seconds, peaks))
        elif outcome.already_complete:
            print(f"{self.target}: already complete")
        else:
            _report(outcome)
            print(f"{self.target}: {_summary(outcome)}, {seconds:.1f} s")


def _torch_device(device: str, ranks: Ranks) -> torch.device:
    from eightfold.model.reference.device import find_device

    if ranks.size > 1 and device != "cpu":
        raise ConfigError("--device", got=device, expected=f"cpu, for {ranks.size} processes")

    found, remark = find_device(device)
    if remark:
        console.note(remark)
    return found


def _show_plan(
    checkpoint: Checkpoint,
    recipe: Recipe,
    samples: list[list[int]],
    target: Path,
    budget: int | None,
    as_json: bool,
) -> None:
    from eightfold.quant.estimate import estimate_run

    found = estimate_run(checkpoint, recipe, samples, target=target, memory=budget, progress=console.bars)
    if as_json:
        console.print_json(found.as_json())
    else:
        print("\n".join(found.render()))


def _document(outcome: Outcome, seconds: float, peaks: list[int | None]) -> dict[str, Any]:
    """Return what --json prints; `peaks` are bytes of each process."""
    resident = [None if peak is None else round(peak / 2**20, 1) for peak in peaks]
    return {
        "layers": outcome.layers,
        "layers_resumed": outcome.layers_resumed,
        "already_complete": outcome.already_complete,
        "seconds": round(seconds, 3),
        "peak_rss_mib": resident[0],
        "world_size": len(resident),
        "ranks_peak_rss_mib": resident,
        "scheme": outcome.recipe.scheme.value,
        "quantized": outcome.quantized,
        "nbytes": outcome.nbytes,
        "restarted": outcome.restarted or None,
        "notes": outcome.notes,
    }


def _report(outcome: Outcome) -> None:
    """Tell what was decided on the way."""
    if outcome.smoothing is not None:
        proof = outcome.smoothing
        print(
            f"outlier suppression {outcome.recipe.anti_outlier.value if outcome.recipe.anti_outlier else ''}: "
            f"{len(proof.choices)} groups; the float model's logits move by {proof.max_logit_difference:.2g} at most "
            f"(largest {proof.max_logit:.3g})"
        )
    if outcome.rolled_back:
        rows = [
            [row.module, f"{row.range_param:.2f}", "shares the input of one above" if row.of_group else "widest inputs"]
            for row in sorted(outcome.rolled_back, key=lambda row: -row.range_param)
        ]
        print("\n".join(console.table(("kept float", "range / std", "why"), rows, right_from=99)))
    if outcome.restarted:
        console.note(f"what an earlier run had finished was damaged ({outcome.restarted}): all was made anew.")
    elif outcome.layers_resumed:
        console.note(f"{outcome.layers_resumed} layers were finished by an earlier run.")
    for text in outcome.notes:
        console.note(text)


def _summary(outcome: Outcome) -> str:
    kept = f", {len(outcome.kept_float)} kept float" if outcome.kept_float else ""
    return f"{outcome.quantized} linears as {outcome.recipe.scheme.value}{kept}, {console.size_text(outcome.nbytes)}"
