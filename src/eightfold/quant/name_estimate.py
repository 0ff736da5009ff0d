"""What a quantization by names would take: bytes are exact, memory is a bound, time is that of some tensors.

Tensors from everywhere in the model are really converted, beside OUT, and all are taken to go at their pace.
"""

from __future__ import annotations

import time
from pathlib import Path
from shutil import disk_usage

import torch

from eightfold.errors import CapacityError
from eightfold.format.shards import ShardedWriter, total_bytes
from eightfold.machine import available_bytes
from eightfold.quant.by_name import Converter, budget_of
from eightfold.quant.estimate import COMPANION_BYTES, Estimate, Phase, trial_place
from eightfold.quant.name_plan import NamePlan
from eightfold.quant.writing import TensorWriter

_TRIAL_UNITS = 24  # of everywhere in the model
_TRIAL_BYTES = 1 << 30  # of the output


def estimate_by_name(plan: NamePlan, *, target: Path, memory: int | None) -> Estimate:
    """Estimate a quantization by a trial of some tensors, in a folder beside the target that goes away again.

    Args:
        plan: what is to be done.
        target: where the output would go.
        memory: the budget in bytes, or None for what the machine has free.

    Raises:
        CheckpointError: a weight that is converted for the trial is damaged.
        OutputError: nothing can be written there, or another process is planning the same output.
    """
    folder = next(folder for folder in target.absolute().parents if folder.is_dir())
    budget, refusal = budget_of(plan), ""
    try:
        budget.spills(memory)
    except CapacityError as error:
        refusal = str(error)
    began = time.perf_counter()
    seconds, tried = _try(plan, folder / f".{target.name}.plan")
    written = total_bytes(tensor.planned for tensor in plan.tensors.values())
    read = sum(info.nbytes for info in plan.stored.tensors.values())
    return Estimate(
        phases=(Phase("tensors", seconds * written / max(1, tried), read, written),),
        peak_bytes=budget.needed,
        output_bytes=written,
        disk_bytes=written + COMPANION_BYTES,
        free_bytes=disk_usage(folder).free,
        memory_bytes=memory if memory is not None else available_bytes(),
        spills=False,
        trial_seconds=time.perf_counter() - began,
        refusal=refusal,
        notes=("the time to read depends on how much of the source is in the page cache now.",),
        measured=f"{min(_TRIAL_UNITS, len(plan.units))} tensors of the model",
    )


@torch.inference_mode()
def _try(plan: NamePlan, place: Path) -> tuple[float, int]:
    """Convert some tensors; return the seconds, and the bytes that were written."""
    step = max(1, len(plan.units) // _TRIAL_UNITS)
    units = plan.units[step // 2 :: step][:_TRIAL_UNITS]
    with trial_place(place) as out:
        out.mkdir()
        seconds, written = 0.0, 0
        for unit in units:
            planned = [plan.tensors[name].planned for name in plan.names_of(unit)]
            if written and written + total_bytes(planned) > _TRIAL_BYTES:
                continue
            began = time.perf_counter()
            with ShardedWriter(out, f"{len(list(out.iterdir()))}", planned) as files:
                Converter(plan, TensorWriter(plan.stored, plan.tensors, files)).write(unit)
                files.sync()
            seconds, written = seconds + time.perf_counter() - began, written + total_bytes(planned)
    return seconds, written
