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
    millions = f"{contents.parameters / 1e6:,.1f} M parameters"
    share = f"{contents.nbytes / contents.float_bytes:.0%} of the {contents.dtype} model"
    files = "1 file" if contents.files == 1 else f"{contents.files} files"
    print(contents.directory)
    print(f"  model   {contents.architecture}, {contents.num_layers} layers, {millions}, {contents.dtype}")
    print(f"  scheme  {contents.scheme}")
    print(f"  size    {size(contents.nbytes)} of tensors, {share}; {size(contents.disk_bytes)} in {files}")
    for text in contents.notes:
        print(f"  note    {text}")
    print()
    header = ("module", "layers", "scheme", "weight", "shape", "count", "size")
    rows = [
        (p.name, p.layers, p.scheme, p.dtype, "x".join(map(str, p.shape)), str(p.count), size(p.nbytes))
        for p in contents.parts
    ]
    for line in console.table(header, rows, right_from=4):
        print(f"  {line}")


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
        found[key.removesuffix("_bytes")] = (
            "unknown" if (nbytes := found.pop(key)) is None else console.size_text(nbytes)
        )
    for key, value in {**found, "packages": packages}.items():
        print(f"{key + ':':18}{' '.join(value) if isinstance(value, list) else value}")
