"""`eightfold import-gguf`: a GGUF file as a float model directory."""

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


def import_gguf(
    source: Annotated[
        Path,
        typer.Argument(metavar="FILE.gguf", help="A GGUF file of a Llama, Mistral, Qwen2 or Qwen3 model. Only read."),
    ],
    target: Annotated[Path, typer.Argument(metavar="FLOAT_DIR", help="The directory to make.")],
    dtype: Annotated[FloatName, typer.Option(help="Type of the widened weights.")] = FloatName.bf16,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace FLOAT_DIR if it is a model directory.")
    ] = False,
) -> None:
    """Widen a GGUF file into a float model directory that `quantize`, `run` and `eval` take.

    Example: eightfold import-gguf smollm2.gguf smollm2-float
    """
    from eightfold.config import DType

    started = time.monotonic()
    console.require_torch("import-gguf")
    from eightfold.importers.gguf import import_gguf as convert

    config = convert(
        source,
        target,
        {FloatName.bf16: DType.BF16, FloatName.fp16: DType.F16}[dtype],
        overwrite=overwrite,
        progress=console.bars,
    )
    seconds = time.monotonic() - started
    print(f"{target}: {config.architecture}, {config.num_layers} layers, {dtype.value}, {seconds:.1f} s")
