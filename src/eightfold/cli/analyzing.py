"""`eightfold analyze`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from eightfold.cli import console
from eightfold.cli.calibrating import Calibration
from eightfold.cli.losses import analysis_lines
from eightfold.cli.options import add_bos, as_json, model_argument, settings
from eightfold.quant.asked import meant
from eightfold.quant.recipe import Recipe, with_defaults
from eightfold.quant.recipe_file import make_recipe
from eightfold.values import BYTES, PATH, TEXTS, parse_size, setting, whole

if TYPE_CHECKING:
    from eightfold.format.checkpoint import Checkpoint
    from eightfold.quant.analysis import Analysis

_CALIBRATION = "Calibration data"


@dataclass(frozen=True, kw_only=True)
class AnalyzeCommand:
    """Say which linears of a float model lose most as int8, with which type, and what it costs to keep them.

    Example: eightfold analyze Llama-3.2-1B --html losses.html

    The loss of each group of linears that share an input is estimated as KL divergence at the model's end, by one pass
    of gradients over the beginnings of the calibration samples. Smoothing is as `quantize` would do it. Nothing is
    written but the page.
    """

    source: Path = model_argument("FLOAT_DIR", "A float model: config.json and safetensors files. It is only read.")
    choices: dict[str, Any] = settings(Recipe, "scheme", "target", "keep_float", scheme="w8a8", target="cpu")
    calib: Path | None = setting(
        None, PATH, "Calibration texts, as for quantize. Default: a mixed set of 64.", metavar="FILE",
        group=_CALIBRATION,
    )  # fmt: skip
    calib_limit: int | None = setting(None, whole(1), "Use only the first N calibration rows.", group=_CALIBRATION)
    calib_texts: tuple[str, ...] = setting((), TEXTS, "A calibration text.", group=_CALIBRATION)
    calib_ids: Path | None = setting(
        None, PATH, "Calibration samples as token ids, as for quantize.", metavar="FILE", group=_CALIBRATION
    )
    add_bos: bool | None = add_bos(_CALIBRATION)
    memory: int | None = setting(
        None, BYTES, "Use at most this much memory, such as 8GiB. Default: half of the free memory.", metavar="SIZE",
        read=parse_size,
    )  # fmt: skip
    html: Path | None = setting(None, PATH, "Write a page with charts, which needs nothing else.", metavar="FILE")
    as_json: bool = as_json()

    def execute(self) -> None:
        if self.html is not None:
            from eightfold.report.page import require_place

            require_place(self.html, "html")
        checkpoint = self._checkpoint
        samples, _ = self._calibration.samples(checkpoint)
        console.require_torch("analyze")
        found = self._analysis(checkpoint, samples)
        if self.html is not None:
            self._write_page(found, self.html)
        if self.as_json:
            console.print_json(found.to_json())
        else:
            print("\n".join(analysis_lines(str(self.source), found)))
            if self.html is not None:
                print(f"page: {self.html}")

    @cached_property
    def recipe(self) -> Recipe:
        return make_recipe(with_defaults(meant(self.choices), has_texts=True), "the command line")

    @cached_property
    def _checkpoint(self) -> Checkpoint:
        from eightfold.format.checkpoint import quantized_already
        from eightfold.quant.choice import require_known_losses

        checkpoint = console.opened(self.source)
        if checkpoint.is_quantized:
            raise quantized_already(self.source)
        require_known_losses("analyze", self.recipe, checkpoint.config)
        return checkpoint

    @cached_property
    def _calibration(self) -> Calibration:
        return Calibration(
            source=self.source,
            recipe=self.recipe,
            file=self.calib,
            is_none=False,
            limit=self.calib_limit,
            texts=self.calib_texts,
            ids=self.calib_ids,
            anti_file=None,
            add_bos=self.add_bos,
            names_act_method=False,
            is_needed=True,
        )

    def _analysis(self, checkpoint: Checkpoint, samples: list[list[int]]) -> Analysis:
        from eightfold.quant.within import analyze

        with TemporaryDirectory(prefix="eightfold-") as folder:
            found = analyze(checkpoint, self.recipe, samples, Path(folder), memory=self.memory, progress=console.bars)
        return with_texts(found, self.source)

    def _write_page(self, found: Analysis, path: Path) -> None:
        from eightfold.report.analysis_page import render
        from eightfold.report.page import write_page

        write_page(path, render(found))


def with_texts(found: Analysis, source: Path) -> Analysis:
    """Return the analysis with the texts of tokens in place of their ids, where there is a tokenizer."""
    from eightfold.files import has_file
    from eightfold.tokenizer import Tokenizer
    from eightfold.vocabulary import TOKENIZER

    if not has_file(source / TOKENIZER):
        return found
    tokenizer = Tokenizer(source)
    return dataclasses.replace(
        found,
        ranges=tuple(
            dataclasses.replace(
                each,
                tokens=tuple(
                    (sample, at, tokenizer.decode([int(text)], keep_special=True), size)
                    for sample, at, text, size in each.tokens
                ),
            )
            for each in found.ranges
        ),
    )
