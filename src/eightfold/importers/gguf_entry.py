"""How `import` takes a GGUF file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from eightfold.config import DType

if TYPE_CHECKING:
    from eightfold.importers import ImportOptions

NEEDS_TORCH = True

_DTYPES = {DType.BF16: "bf16", DType.F16: "fp16"}


def recognizes(source: Path) -> bool:
    """Whether it looks like a GGUF file, or is missing and is called like one."""
    if source.suffix == ".gguf" and not source.is_dir():
        return True
    return source.is_file() and _magic(source) == b"GGUF"


def _magic(source: Path) -> bytes:
    with source.open("rb") as file:
        return file.read(4)


def convert(source: Path, target: Path, options: ImportOptions) -> str:
    """Widen the file into a float directory, or make an 8-bit one; see gguf.import_gguf() and gguf_w8a16."""
    from eightfold.importers.gguf import import_gguf

    if options.scheme is not None:
        from eightfold.importers.gguf_w8a16 import import_w8a16

        return import_w8a16(source, target, options)
    config = import_gguf(source, target, options.dtype, overwrite=options.overwrite, progress=options.progress)
    return f"{config.architecture}, {config.num_layers} layers, {_DTYPES[options.dtype]}"
