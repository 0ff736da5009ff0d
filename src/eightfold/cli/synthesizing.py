"""`eightfold synth`: a random float model of a real model's shape."""

from __future__ import annotations

import time
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from eightfold.cli import console


class FloatName(str, Enum):
    """Float types by their short names."""

    bf16 = "bf16"
    fp16 = "fp16"


class Like(str, Enum):
    """Models whose shapes are known; synth/shapes.py has their configurations."""

    llama3_70b = "llama3-70b"
    llama3_8b = "llama3-8b"
    llama32_1b = "llama3.2-1b"
    qwen2_7b = "qwen2-7b"


def synth(
    target: Annotated[Path, typer.Argument(metavar="DIR", help="The directory to make. It appears when it is whole.")],
    like: Annotated[Like, typer.Option(metavar="MODEL", help="llama3-70b, llama3-8b, llama3.2-1b or qwen2-7b.")],
    layers: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="So many layers at full width. Default: all of them.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="The same seed gives the same bytes.")] = 0,
    dtype: Annotated[FloatName, typer.Option(metavar="TYPE", help="bf16 or fp16.")] = FloatName.bf16,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace DIR if it is a model directory.")] = False,
) -> None:
    """Make a random float model of a real model's shape, to plan with and to test with.

    Weights are random, with a few outlier channels as trained models have them, so that every scheme has something to
    do; what the model says means nothing. Its tokenizer has one token for each byte.

    Example: eightfold synth --like llama3-70b --layers 2 wide; eightfold quantize wide out --scheme w8a16 --plan
    """
    from eightfold.config import DType
    from eightfold.synth.checkpoint import synthesize

    started = time.monotonic()
    made = synthesize(
        like.value,
        target,
        layers=layers,
        seed=seed,
        dtype={FloatName.bf16: DType.BF16, FloatName.fp16: DType.F16}[dtype],
        overwrite=overwrite,
        progress=console.bars,
    )
    seconds = time.monotonic() - started
    size = console.size_text(made.nbytes)
    print(f"{target}: {made.config.num_layers} layers like {like.value}, {dtype.value}, {size}, {seconds:.1f} s")
