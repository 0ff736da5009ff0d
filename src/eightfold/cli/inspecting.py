"""`eightfold inspect` and `eightfold env`: what is there."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from eightfold.cli import console

if TYPE_CHECKING:
    from eightfold.report.contents import Contents
    from eightfold.report.native import Native


def inspect(
    model: Annotated[Path, typer.Argument(metavar="DIR", help="A quantized or float model directory.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document as the last line.")] = False,
) -> None:
    """Say what a model directory holds, and how this CPU would compute it. Reads no weights.

    EIGHTFOLD_ISA forces an instruction set, EIGHTFOLD_THREADS a number of threads.

    Example: eightfold inspect Llama-3.2-1B-w8a8
    """
    from eightfold.format.checkpoint import Checkpoint
    from eightfold.report.contents import describe
    from eightfold.report.native import describe_native

    checkpoint = Checkpoint.open(model)
    contents, native = describe(checkpoint), describe_native(checkpoint)
    if as_json:
        console.print_json({**asdict(contents), "native": asdict(native)})
        return
    _print_contents(contents)
    print()
    _print_native(native)


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


def _print_native(native: Native) -> None:
    if native.problem:
        print(f"  cpu      {native.problem}")
        return
    others = [isa for isa in native.available_isas if isa != native.isa]
    also = f"; EIGHTFOLD_ISA also takes {' or '.join(others)}" if others else ""
    print(f"  cpu      {native.isa}, {native.isa_reason}{also}")
    print(f"  threads  {native.threads}, {native.threads_reason}")
    print()
    header = ("computed", "scheme", "stored", "count", "by")
    rows = [(k.modules, k.scheme, k.dtype, str(k.count), k.how) for k in native.kernels]
    for line in console.table(header, rows, right_from=len(header)):
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
