"""`eightfold export`, `import` and `import-gguf`: models of other engines' formats, to them and from them."""

from __future__ import annotations

import time
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eightfold.cli import console
from eightfold.cli.making import DTYPES
from eightfold.cli.options import argument, as_json, model_argument, settings
from eightfold.errors import ConfigError
from eightfold.exporters import FORMATS, ExportOptions, plan_export
from eightfold.importers import ImportOptions, importer_of
from eightfold.scheme import SCHEMES
from eightfold.values import SWITCH, choice, optional, setting, size_text

if TYPE_CHECKING:
    from eightfold.importers import Importer


@dataclass(frozen=True, kw_only=True)
class ExportCommand:
    """Write an 8-bit directory as another engine reads it. The integers stay as they are.

    Example: eightfold export Qwen2.5-7B-w8a16 Qwen2.5-7B.gguf --to gguf

    Nothing is calibrated or rounded anew. Before it writes, it says what the format cannot hold and asks for --lossy,
    and what readers of the format do otherwise than this program. A run that was stopped goes on where it was.
    """

    source: Path = model_argument("OUT", "An 8-bit directory, as quantize makes it. It is only read.")
    target: Path = argument("DIR", "The directory to make, or of gguf the file. It appears when it is complete.")
    to: str = setting(
        MISSING,
        choice(*FORMATS),
        "Format: " + "; ".join(f"{n} ({f.readers})" for n, f in FORMATS.items()) + ".",
    )
    chosen: dict[str, Any] = settings(ExportOptions, "activations", "floats", "files_from")
    lossy: bool = setting(False, SWITCH, "Write the model without what the format cannot hold.")
    overwrite: bool = setting(False, SWITCH, "Replace what export has written to DIR.")
    as_json: bool = as_json()

    def execute(self) -> None:
        _export(self)


@dataclass(frozen=True, kw_only=True)
class ConvertCommand:
    """Repair an 8-bit directory for a loader that refuses or misreads it: one of another tool, or an edited one.

    Example: eightfold convert Qwen2.5-7B-w8a8 Qwen2.5-7B-w8a8-fixed --for vllm-ascend

    `eightfold check DIR --for ...` tells what is wrong. Descriptions of older names or without entries, tensors that a
    writer left out, types that do not fit the model's, config.json and the tokenizer in one dialect only, and file
    modes are repaired, and every number stays. What the loader does not have at all is said, and asks for --lossy. The
    result is checked by the loader's rules before it appears. `export --to` does the same.
    """

    source: Path = model_argument("OUT", "An 8-bit directory of any writer. It is only read.")
    target: Path = argument("DIR", "The directory to make. It appears when it is complete.")
    to: str = setting(MISSING, choice("mindie", "vllm-ascend"), "The loader that is going to read it.", flag="--for")
    chosen: dict[str, Any] = settings(ExportOptions, "files_from")
    lossy: bool = setting(False, SWITCH, "Leave out, widen or round anew what the loader does not have.")
    overwrite: bool = setting(False, SWITCH, "Replace what convert or export has written to DIR.")
    as_json: bool = as_json()

    def execute(self) -> None:
        _export(self)


def _export(command: ExportCommand | ConvertCommand) -> None:
    started = time.monotonic()
    plan = plan_export(command.source, command.to, ExportOptions(**command.chosen), lossy=command.lossy)
    notes = [*(f"lost: {text}" for text in plan.losses), *plan.notes]
    for text in notes:
        console.note(text)
    was_there = plan.write(command.target, overwrite=command.overwrite, progress=console.bars)
    seconds = time.monotonic() - started
    if command.as_json:
        facts = {"to": command.to, "nbytes": plan.nbytes, "already_complete": was_there, "seconds": round(seconds, 3)}
        console.print_json({**facts, "losses": list(plan.losses), "notes": list(plan.notes)})
    elif was_there:
        print(f"{command.target}: already complete")
    else:
        print(f"{command.target}: {command.to}, {size_text(plan.nbytes)}, {seconds:.1f} s")


@dataclass(frozen=True, kw_only=True)
class ImportCommand:
    """Make a model directory of another format's model: 8-bit where its integers can stay, float otherwise.

    Example: eightfold import Llama-3.1-8B-Instruct-quantized.w8a8 OUT

    What MODEL is, its files say: a compressed-tensors directory with int8 weights, one scale for each output, becomes
    an 8-bit directory with the same integers and scales; one of float8, int4 or float4, and a GGUF file of a Llama,
    Mistral, Qwen2 or Qwen3 model, become float directories for quantize, run and eval.
    """

    source: Path = model_argument("MODEL", "A directory or a GGUF file. It is only read.")
    target: Path = argument("DIR", "The directory to make. It appears when it is complete.")
    dtype: str = setting("bf16", choice(*DTYPES), "Type of weights that become float.")
    scheme: str | None = setting(
        None,
        optional(choice("w8a16")),
        "Make an 8-bit directory of a GGUF file in Q8_0: integers stay where all blocks of a row have one scale, as "
        "export writes them; other rows are rounded anew. Default: a float directory.",
    )
    overwrite: bool = setting(False, SWITCH, "Replace what import has written to DIR.")

    def execute(self) -> None:
        importer, scheme = importer_of(self.source), SCHEMES[self.scheme] if self.scheme else None
        if scheme is not None and self.source.is_dir():
            action = "Leave the option out: integers that can stay do."
            raise ConfigError("scheme", got=self.scheme, expected="a GGUF file to import", action=action)
        options = ImportOptions(
            dtype=DTYPES[self.dtype], scheme=scheme, overwrite=self.overwrite, progress=console.bars
        )
        _import(importer, "import", self.source, self.target, options)


@dataclass(frozen=True, kw_only=True)
class ImportGgufCommand:
    """Convert a GGUF file into a float model directory; `import` by an older name.

    Example: eightfold import-gguf smollm2.gguf smollm2-float
    """

    source: Path = argument("FILE.gguf", "A GGUF file of a Llama, Mistral, Qwen2 or Qwen3 model. It is only read.")
    target: Path = argument("FLOAT_DIR", "The directory to make. It appears when it is complete.")
    dtype: str = setting("bf16", choice(*DTYPES), "Type of the widened weights.")
    overwrite: bool = setting(False, SWITCH, "Replace what import-gguf has written to FLOAT_DIR.")

    def execute(self) -> None:
        from eightfold.importers import gguf_entry

        options = ImportOptions(dtype=DTYPES[self.dtype], overwrite=self.overwrite, progress=console.bars)
        _import(gguf_entry, "import-gguf", self.source, self.target, options)


def _import(importer: Importer, command: str, source: Path, target: Path, options: ImportOptions) -> None:
    started = time.monotonic()
    if importer.NEEDS_TORCH:
        console.require_torch(command)
    made = importer.convert(source, target, options)
    print(f"{target}: {made}, {time.monotonic() - started:.1f} s")
