"""`eightfold inspect` and `eightfold env`: what is there."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from eightfold.cli import console

if TYPE_CHECKING:
    from eightfold.report.contents import Contents


def inspect(
    model: Annotated[Path, typer.Argument(metavar="DIR", help="A quantized or float model directory.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document as the last line.")] = False,
) -> None:
    """Say what a model directory holds: model, scheme of each group of layers, sizes. Reads no weights.

    Example: eightfold inspect Llama-3.2-1B-w8a8
    """
    from eightfold.format.checkpoint import Checkpoint
    from eightfold.report.contents import describe

    contents = describe(Checkpoint.open(model))
    if as_json:
        console.print_json(contents.as_dict())
    else:
        _print_contents(contents)


def _print_contents(contents: Contents) -> None:
    size = console.size_text
    share = contents.nbytes / contents.float_bytes
    print(f"{contents.directory}")
    print(f"  model   {contents.architecture}, {contents.num_layers} layers, {contents.parameters / 1e6:,.1f} M parameters, {contents.dtype}")
    print(f"  scheme  {contents.scheme}")
    files = "1 file" if contents.files == 1 else f"{contents.files} files"
    print(f"  size    {size(contents.nbytes)} of tensors, {share:.0%} of the {contents.dtype} model; {size(contents.disk_bytes)} in {files}")
    for text in contents.notes:
        print(f"  note    {text}")
    print()
    rows = [(part.name, part.layers, part.scheme, part.dtype, "x".join(map(str, part.shape)), str(part.count), size(part.nbytes)) for part in contents.parts]
    header = ("module", "layers", "scheme", "weight", "shape", "count", "size")
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    for row in (header, *rows):
        print("  " + "  ".join(cell.rjust(width) if i > 3 else cell.ljust(width) for i, (cell, width) in enumerate(zip(row, widths, strict=True))).rstrip())


def env(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document as the last line.")] = False,
) -> None:
    """Show versions, processor, instruction sets, threads and memory: what a bug report needs."""
    from eightfold.report.environment import environment

    found = environment()
    if as_json:
        console.print_json(found)
        return
    packages = ", ".join(f"{name} {version or '(not installed)'}" for name, version in found.pop("packages").items())
    for key in ("memory_bytes", "memory_available_bytes"):
        found[key.removesuffix("_bytes")] = "unknown" if found[key] is None else console.size_text(found.pop(key))
    for key, value in {**found, "packages": packages}.items():
        print(f"{key + ':':18}{' '.join(value) if isinstance(value, list) else value}")
