"""Models in other containers -> model directories: one table, what a path holds -> importer.

An importer is a module of two functions and a constant, which loads what it needs when it converts:

    recognizes(source) -> bool                  by names of files and config.json alone
    convert(source, target, options) -> str     writes through format/output.Output; returns a line about what was made
    NEEDS_TORCH
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast

from eightfold.config import DType
from eightfold.errors import UnsupportedError, one_of
from eightfold.progress import Progress, silent
from eightfold.scheme import QuantType

# What it is -> module of this package; the first that recognizes a path takes it.
KINDS = {
    "a GGUF file": "gguf_entry",
    "a compressed-tensors directory of int8": "compressed_tensors",
    "a directory of float8, int4 or float4": "widened",
}


@dataclass(frozen=True, kw_only=True)
class ImportOptions:
    """How to import.

    Attributes:
        dtype: BF16 or F16: of weights that become float.
        scheme: W8A16: make an 8-bit directory of a GGUF file; None: what the importer makes of it by itself.
        overwrite: replace what an import has written at the target before.
        progress: who is told.
    """

    dtype: DType = DType.BF16
    scheme: QuantType | None = None
    overwrite: bool = False
    progress: Progress = silent


class Importer(Protocol):
    """One module of this package."""

    NEEDS_TORCH: bool

    def recognizes(self, source: Path) -> bool:
        """Whether a path holds what this one reads."""

    def convert(self, source: Path, target: Path, options: ImportOptions) -> str:
        """Make a directory of it that appears when everything is written; return a line about what was made.

        Raises:
            EightfoldError: see errors.py; `target` is then as it was, or keeps finished steps.
        """


def importer_of(source: Path) -> Importer:
    """Return the importer that reads what a path holds.

    Raises:
        UnsupportedError: there is none.
    """
    for module in KINDS.values():
        importer = cast(Importer, importlib.import_module(f"{__name__}.{module}"))
        if importer.recognizes(source):
            return importer
    raise UnsupportedError(
        "model to import",
        where=source,
        got="nothing that is imported" if source.exists() else "nothing there",
        expected=one_of(KINDS),
        action="A float directory needs no import: quantize, run and eval read it." if source.is_dir() else "",
    )
