"""8-bit directories -> what other engines read: one table, name -> exporter.

Planning reads headers and small tensors alone. What a format cannot hold is known before anything is written, and so
are all names, types and sizes. An exporter is a module with one function:

    plan(source, options) -> Export
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple, Protocol

from eightfold.errors import ConfigError, one_of
from eightfold.progress import Progress
from eightfold.values import PATH, choice, optional, setting


class Format(NamedTuple):
    """A format to export to."""

    module: str  # below this package
    readers: str  # for the help
    options: tuple[str, ...]  # of ExportOptions, those that it has


FORMATS: dict[str, Format] = {
    "compressed-tensors": Format("compressed_tensors", "vLLM, transformers, SGLang", ("activations",)),
    "gguf": Format("gguf", "llama.cpp, Ollama, OpenVINO GenAI", ("floats",)),
    "mindie": Format("mindie", "MindIE", ("files_from",)),
    "vllm-ascend": Format("vllm_ascend", "vllm-ascend", ("files_from",)),
}


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What a user may choose."""

    activations: str | None = setting(
        None,
        optional(choice("symmetric", "asymmetric")),
        "Of compressed-tensors: how a reader rounds the inputs of W8A8_DYNAMIC, of which our files do not tell. "
        "Default: symmetric, which all readers have.",
    )
    floats: str = setting(
        "keep",
        choice("keep", "q8_0"),
        "Of gguf: embeddings, head and linears that the model has in float stay exact, or are rounded to Q8_0, as "
        "llama.cpp's own quantizer does: half as large, and faster; needs --lossy.",
    )
    files_from: Path | None = setting(
        None,
        PATH,
        "For mindie and vllm-ascend: take a tokenizer and other small files that OUT lacks from here, such as the "
        "float model.",
        metavar="DIR",
    )


class Export(Protocol):
    """What is going to be written."""

    @property
    def losses(self) -> Sequence[str]:
        """What the source has and the format has not, a line each."""

    @property
    def notes(self) -> Sequence[str]:
        """What a user should know of the readers, a line each."""

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors to write."""

    def write(self, target: Path, *, overwrite: bool, progress: Progress) -> bool:
        """Write it through format/output.Output, or go on where it was stopped; return whether it was there already."""


def plan_export(source: Path, to: str, options: ExportOptions, *, lossy: bool) -> Export:
    """Return what an export would write.

    Args:
        source: an 8-bit directory. Only read.
        to: a name of FORMATS.
        options: see there.
        lossy: go on although something is lost.

    Raises:
        ConfigError: something would be lost, and nobody has agreed; or an option of another format is given.
        EightfoldError: the source is damaged, or has what the format cannot hold in any way.
    """
    for each in fields(options):
        if each.name not in FORMATS[to].options and (given := getattr(options, each.name)) != each.default:
            meant = [name for name, other in FORMATS.items() if each.name in other.options]
            raise ConfigError(each.name, got=given, expected=f"to: {one_of(meant)}, as the option is of no other",
                              action="Leave it out.")  # fmt: skip
    module = importlib.import_module(f"{__name__}.{FORMATS[to].module}")
    found: Export = module.plan(source, options)
    if found.losses and not lossy:
        raise ConfigError(
            f"export to {to}",
            where=source,
            got=f"what it cannot hold: {'; '.join(found.losses)}",
            expected="a model that it can hold",
            action="Give `lossy` to write the model without.",
        )
    return found
