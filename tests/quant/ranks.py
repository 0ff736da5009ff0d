"""One of several processes that quantize a model, as test_distributed.py starts them: python -m tests.quant.ranks JOB.

A job is a JSON object: source, folder of the outputs, names of recipes, and what is to go wrong in one of the ranks.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from eightfold.errors import EightfoldError, InputError
from eightfold.parallel.ranks import Ranks
from eightfold.parallel.world import World
from eightfold.quant import hidden, identity
from eightfold.quant.pipeline import quantize_checkpoint
from eightfold.quant.recipe import ActMethod, AntiOutlier, KVObserve, Recipe
from eightfold.quant.run import Run
from eightfold.scheme import QuantType
from tests.conftest import token_samples

SAMPLES = token_samples(11, seed=6)  # of lengths with which ranks take batches out of turn
BATCH_TOKENS = 32  # so that there are several rounds, and a last one in which ranks are without samples

RECIPES = {
    "minmax": Recipe(QuantType.W8A8),
    "m4 fa": Recipe(QuantType.W8A8, anti_outlier=AntiOutlier.M4, fa_quant=True),
    "m2 histogram": Recipe(QuantType.W8A8, anti_outlier=AntiOutlier.M2, act_method=ActMethod.HISTOGRAM),
    "m6 auto kv": Recipe(
        QuantType.W8A8,
        anti_outlier=AntiOutlier.M6,
        act_method=ActMethod.AUTO,
        kv_int8=True,
        kv_observe=KVObserve.PRE_ROPE,
    ),
    "levels": Recipe(
        QuantType.W8A8,
        anti_outlier=AntiOutlier.M1,
        fa_quant=True,
        fa_amp=1,
        disable_level=2,
        quantize_lm_head=True,
    ),
    "smooth extremes fa": Recipe(
        QuantType.W8A8, anti_outlier=AntiOutlier.SMOOTH, act_method=ActMethod.EXTREMES, fa_quant=True
    ),
    "smooth head": Recipe(
        QuantType.W8A8,
        anti_outlier=AntiOutlier.SMOOTH,
        act_method=ActMethod.EXTREMES,
        quantize_lm_head=True,
        disable_level=1,
    ),
    "rotate kv": Recipe(QuantType.W8A8, anti_outlier=AntiOutlier.ROTATE, act_method=ActMethod.EXTREMES, kv_int8=True),
    "flex": Recipe(QuantType.W8A8_DYNAMIC, anti_outlier=AntiOutlier.FLEX),
    "w8a16": Recipe(QuantType.W8A16, weight_symmetric=False),
    "m3 mix kv": Recipe(QuantType.W8A8_MIX, anti_outlier=AntiOutlier.M3, kv_int8=True),
    "m2 auto anti": Recipe(QuantType.W8A8, anti_outlier=AntiOutlier.M2, act_method=ActMethod.AUTO, kv_int8=True),
    "m5 dynamic": Recipe(QuantType.W8A8_DYNAMIC, anti_outlier=AntiOutlier.M5, quantize_lm_head=True),
}


def quantize(source: Path, target: Path, name: str, **options: Any) -> None:
    """Quantize in batches so small that there are many."""
    hidden.BATCH_TOKENS, hidden._FEW_TOKENS = BATCH_TOKENS, 1
    torch.set_num_threads(1)
    anti = token_samples(7, seed=8) if name.endswith("anti") else None
    quantize_checkpoint(source, target, RECIPES[name], SAMPLES, anti, part_bytes=60_000, **options)


def die_after(steps: int) -> None:
    """Let this process be killed when it has come to the end of so many steps, but before that is written down."""
    finish: Callable[..., None] = Run._finish
    left = iter(range(steps))

    def killed(run: Run, *args: Any, **facts: Any) -> None:
        if next(left, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        finish(run, *args, **facts)

    Run._finish = killed  # type: ignore[assignment, method-assign]


def fail_after(steps: int) -> None:
    """Let this process fail when it has come to the end of so many steps."""
    finish: Callable[..., None] = Run._finish
    left = iter(range(steps))

    def failing(run: Run, *args: Any, **facts: Any) -> None:
        if next(left, None) is None:
            raise InputError("sample 7", got="nonsense")
        finish(run, *args, **facts)

    Run._finish = failing  # type: ignore[method-assign]


def wait_in_layers() -> None:
    """Let this process be busy for long at the end of a layer."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(3))
    finish: Callable[..., None] = Run._finish

    def waiting(run: Run, step: str, *args: Any, **facts: Any) -> None:
        if step.startswith("layer"):
            time.sleep(60)
        finish(run, step, *args, **facts)

    Run._finish = waiting  # type: ignore[method-assign]


def look_elsewhere(folder: str) -> None:
    """Let this process find another directory under the output's path, as a host with a disk of its own does."""
    share = Ranks.share

    def share_elsewhere(ranks: Ranks, value: Any) -> Any:
        found = share(ranks, value)
        return (Path(folder) / found[0].name, *found[1:]) if isinstance(found, tuple) else found

    Ranks.share = share_elsewhere  # type: ignore[assignment, method-assign]


def main() -> int:
    """Do a job."""
    job = json.loads(sys.argv[1])
    is_odd = int(os.environ["RANK"]) == job.get("odd")
    if is_odd and "dies" in job:
        die_after(job["dies"])
    if is_odd and "fails" in job:
        fail_after(job["fails"])
    if not is_odd and job.get("waits"):
        wait_in_layers()
    if is_odd and "version" in job:
        identity.__version__ = job["version"]  # type: ignore[attr-defined]
    if is_odd and "elsewhere" in job:
        look_elsewhere(job["elsewhere"])
    ranks = Ranks(World.of_environment())
    try:
        for name in job["names"]:
            quantize(Path(job["source"]), Path(job["folder"]) / name, name, ranks=ranks)
    except BaseException as error:
        ranks.fail(error)
        if not isinstance(error, EightfoldError):
            raise
        print(f"eightfold: {error}", file=sys.stderr)
        return 2
    ranks.end()
    return 0


if __name__ == "__main__":
    sys.exit(main())
