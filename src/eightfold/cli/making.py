"""`eightfold synth`: float model directories of random weights."""

from __future__ import annotations

import time
from dataclasses import MISSING, dataclass
from pathlib import Path

from eightfold.cli import console
from eightfold.cli.options import argument
from eightfold.config import DType
from eightfold.synth.shapes import MODELS
from eightfold.values import SWITCH, choice, setting, size_text, whole

DTYPES = {"bf16": DType.BF16, "fp16": DType.F16}


@dataclass(frozen=True, kw_only=True)
class SynthCommand:
    """Make a random float model of a real model's shape, for plans and tests.

    Example: eightfold synth --like llama3-70b --layers 2 wide; eightfold quantize wide out --scheme w8a16 --plan

    The weights are random, with a few outlier channels as in trained models, so that every scheme has something to do;
    the model's answers mean nothing. Its tokenizer has one token for each byte.
    """

    target: Path = argument("DIR", "The directory to make. It appears when it is complete.")
    like: str = setting(MISSING, choice(*MODELS), "Model whose shape to use; tiny is nobody's, and takes a second.")
    layers: int | None = setting(None, whole(1), "Number of layers, at full width. Default: all of them.")
    seed: int = setting(0, whole(0), "Seed of the weights; the same seed gives the same bytes.")
    dtype: str = setting("bf16", choice(*DTYPES), "Type of the weights.")
    overwrite: bool = setting(False, SWITCH, "Replace what synth has written to DIR.")

    def execute(self) -> None:
        from eightfold.synth.checkpoint import synthesize

        started = time.monotonic()
        made = synthesize(
            self.like,
            self.target,
            layers=self.layers,
            seed=self.seed,
            dtype=DTYPES[self.dtype],
            overwrite=self.overwrite,
            progress=console.bars,
        )
        seconds = time.monotonic() - started
        size = size_text(made.nbytes)
        print(f"{self.target}: {made.layers} layers like {self.like}, {self.dtype}, {size}, {seconds:.1f} s")
