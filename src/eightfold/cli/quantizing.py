"""`eightfold quantize`: options to a recipe, calibration files to token ids."""

from __future__ import annotations

import math
import time
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from eightfold.cli import console
from eightfold.errors import ConfigError

if TYPE_CHECKING:
    from eightfold.format.checkpoint import Checkpoint


# Headings in the help.
_CALIBRATION, _OUTPUT = "Calibration data", "Output"


class SchemeName(str, Enum):
    """Schemes by their names on the command line."""

    w8a8 = "w8a8"
    w8a8_dynamic = "w8a8-dynamic"
    w8a16 = "w8a16"


class SaveDtype(str, Enum):
    """How floating tensors are stored."""

    model = "model"
    float32 = "float32"


def quantize(
    source: Annotated[
        Path, typer.Argument(metavar="FLOAT_DIR", help="A float model: config.json and safetensors files. Only read.")
    ],
    target: Annotated[
        Path, typer.Argument(metavar="OUT", help="The directory to make. It appears when everything is written.")
    ],
    scheme: Annotated[
        SchemeName,
        typer.Option(
            metavar="SCHEME",
            help="w8a8: static int8 activations, needs calibration. w8a8-dynamic: int8 activations, by token. "
            "w8a16: int8 weights only.",
        ),
    ],
    calib: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            rich_help_panel=_CALIBRATION,
            help="Calibration texts, one a line: JSON with text, prompt, inputs_pretokenized or messages, or plain. "
            "Default: a mixed set of 64.",
        ),
    ] = None,
    calib_limit: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", rich_help_panel=_CALIBRATION, help="Use the first N calibration rows."),
    ] = None,
    calib_texts: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT", rich_help_panel=_CALIBRATION, help="A calibration text; may be given several times."
        ),
    ] = None,
    calib_ids: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            rich_help_panel=_CALIBRATION,
            help="Calibration samples as token ids, one JSON list a line; no tokenizer is needed.",
        ),
    ] = None,
    weight_symmetric: Annotated[
        bool, typer.Option(help="Weights without offset. --no-weight-symmetric is for w8a16.")
    ] = True,
    keep_float: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN", help="Leave linears float: a module name with * and ?; may be given several times."
        ),
    ] = None,
    save_dtype: Annotated[
        SaveDtype,
        typer.Option(
            metavar="TYPE",
            rich_help_panel=_OUTPUT,
            help="Store floating tensors as the model does (model), or all as float32.",
        ),
    ] = SaveDtype.model,
    part_size_gb: Annotated[
        float | None,
        typer.Option(
            min=1e-6, metavar="GB", rich_help_panel=_OUTPUT, help="Split the weights into files of this size (GiB)."
        ),
    ] = None,
    legacy_names: Annotated[
        bool,
        typer.Option(
            "--legacy-names",
            rich_help_panel=_OUTPUT,
            help="Also write the description under its older, suffixed name, for older MindIE.",
        ),
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", rich_help_panel=_OUTPUT, help="Replace OUT if it is a model directory.")
    ] = False,
) -> None:
    """Turn a float Llama-family model into an 8-bit one.

    One layer is in memory at a time. OUT is laid out for MindIE and vllm-ascend; `eightfold run` and `eval` take it.

    Example: eightfold quantize Llama-3.2-1B Llama-3.2-1B-w8a8 --scheme w8a8 --calib prompts.jsonl
    """
    from eightfold.format.checkpoint import Checkpoint
    from eightfold.format.writer import OutputDirectory
    from eightfold.quant.recipe import Recipe, assign_types
    from eightfold.scheme import NEEDS_CALIBRATION, SCHEMES

    started = time.monotonic()
    quant_type = SCHEMES[scheme.value]
    recipe = Recipe(quant_type, weight_symmetric, tuple(keep_float or ()), save_dtype is SaveDtype.float32)
    part_bytes = _part_bytes(part_size_gb)
    calibration = _Calibration(calib, calib_limit, tuple(calib_texts or ()), calib_ids)
    # What can be refused is refused before torch is loaded and texts are tokenized.
    checkpoint = Checkpoint.open(source)
    assign_types(checkpoint.config, recipe)
    OutputDirectory(target, source=source, overwrite=overwrite)
    samples = None
    if quant_type in NEEDS_CALIBRATION:
        samples = calibration.samples(checkpoint)
    elif calibration.given:
        calibration.check()
        console.note(f"{scheme.value} needs no calibration data; {calibration.given} changes nothing.")
    console.require_torch("quantize")
    from eightfold.quant.pipeline import quantize_checkpoint

    outcome = quantize_checkpoint(
        source,
        target,
        recipe,
        samples,
        overwrite=overwrite,
        part_bytes=part_bytes,
        legacy_names=legacy_names,
        progress=console.bars,
    )
    for text in outcome.notes:
        console.note(text)
    kept = f", {len(outcome.kept_float)} kept float" if outcome.kept_float else ""
    print(
        f"{target}: {outcome.quantized} linears as {quant_type.value}{kept}, {console.size_text(outcome.nbytes)}, "
        f"{time.monotonic() - started:.1f} s"
    )


def _part_bytes(part_size_gb: float | None) -> int | None:
    if part_size_gb is None:
        return None
    nbytes = part_size_gb * 2**30
    if not math.isfinite(nbytes):
        raise ConfigError("--part-size-gb", got=part_size_gb, expected="a finite number")
    return max(1, round(nbytes))


class _Calibration:
    """The calibration options together."""

    def __init__(self, file: Path | None, limit: int | None, texts: tuple[str, ...], ids: Path | None) -> None:
        self._file, self._limit, self._texts, self._ids = file, limit, texts, ids
        options = {"--calib": file, "--calib-texts": texts, "--calib-ids": ids}
        self._sources = [name for name, value in options.items() if value]
        self.given = self._sources[0] if self._sources else "--calib-limit" if limit is not None else None

    def check(self) -> None:
        """Refuse two sources at once.

        Raises:
            ConfigError: more than one of the options.
        """
        if len(self._sources) > 1:
            raise ConfigError("calibration data", got=" and ".join(self._sources), expected="one of them")

    def samples(self, checkpoint: Checkpoint) -> list[list[int]]:
        """Return the calibration samples as token ids, none longer than the model's context."""
        from eightfold.quant import dataset
        from eightfold.tokenizer import Tokenizer

        self.check()
        rows: list[dataset.Row]
        if self._ids is not None:
            samples = dataset.read_token_ids(self._ids, self._limit, checkpoint.config.vocab_size)
        else:
            if self._file is not None:
                rows = dataset.read_rows(self._file, self._limit)
            elif self._texts:
                rows = [*self._texts[: self._limit]]
            else:
                rows = dataset.default_rows()[: self._limit]
                console.note(
                    f"calibrating on the {len(rows)} texts that come with eightfold; --calib FILE takes your own."
                )
            samples = dataset.tokenize(rows, Tokenizer(checkpoint.directory))
        context = checkpoint.config.max_position_embeddings
        samples, cut = dataset.truncate(samples, context)
        if cut:
            console.note(
                f"{cut} of {len(samples)} calibration samples were cut to the model's context of {context} tokens."
            )
        return samples
