"""`eightfold quantize`: options to a recipe, and what came of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eightfold.cli.calibration import Calibration
from eightfold.cli.options import argument, as_json, settings
from eightfold.cli.quantize_run import Command, ranks_of_environment
from eightfold.errors import OutputError
from eightfold.quant.recipe import Recipe
from eightfold.values import BYTES, PATH, SWITCH, TEXTS, choice, number_above, parse_size, setting, whole

_CALIBRATION, _OUTPUT, _RUNNING = "Calibration data", "Output", "Running"  # headings in the help


@dataclass(frozen=True, kw_only=True)
class QuantizeCommand:
    """Turn a float Llama-family model into an 8-bit one.

    Example: eightfold quantize Llama-3.2-1B Llama-3.2-1B-w8a8 --scheme w8a8 --anti-outlier m4 --calib prompts.jsonl

    One layer is in memory at a time, and each is on disk before the next begins: after a crash, a full disk or Ctrl-C
    the same command goes on where it stopped. OUT is laid out for MindIE and vllm-ascend; `eightfold run` and `eval`
    take it when it is complete, and `eightfold check` tells what those loaders would do with it.

    Several processes share the work and make the same bytes: torchrun --nproc_per_node 2 -m eightfold quantize ...
    """

    source: Path = argument("FLOAT_DIR", "A float model: config.json and safetensors files. Only read.")
    target: Path = argument("OUT", "The directory to make. It is a model when everything is written.")
    choices: dict[str, Any] = settings(
        Recipe, "scheme", "weight_symmetric", "anti_outlier", "act_method", "fa_quant", "fa_amp", "kv_int8",
        "kv_symmetric", "kv_observe", "keep_float", "disable_level", "exact_levels", "quantize_lm_head", "save_float32",
    )  # fmt: skip
    recipe_file: Path | None = setting(
        None,
        PATH,
        "Choices from a YAML file; options on the command line go before them.",
        flag="--recipe",
        metavar="FILE",
        group="Scheme",
    )
    save_recipe: Path | None = setting(
        None, PATH, "Also write the choices of this command line as such a file.", metavar="FILE", group="Scheme"
    )
    calib: Path | None = setting(
        None,
        PATH,
        "Calibration texts, one a line: JSON with text, prompt, inputs_pretokenized or messages, or plain. Default: a "
        "mixed set of 64.",
        metavar="FILE",
        group=_CALIBRATION,
    )
    calib_limit: int | None = setting(None, whole(1), "Use the first N calibration rows.", group=_CALIBRATION)
    calib_texts: tuple[str, ...] = setting((), TEXTS, "A calibration text.", group=_CALIBRATION)
    calib_ids: Path | None = setting(
        None,
        PATH,
        "Calibration samples as token ids, one JSON list a line; no tokenizer is needed.",
        metavar="FILE",
        group=_CALIBRATION,
    )
    part_size_gb: float | None = setting(
        None,
        number_above(0)._replace(least=1e-6),
        "Split the weights into files of this size (GiB).",
        metavar="GB",
        group=_OUTPUT,
    )
    legacy_names: bool = setting(
        False,
        SWITCH,
        "The layout of older MindIE: the description also under its suffixed name, `quantize` in config.json, smoothed "
        "norms as .module.weight and .module.bias.",
        group=_OUTPUT,
    )
    overwrite: bool = setting(
        False,
        SWITCH,
        "Replace OUT if quantize has written it. The old model stays until the new one is complete.",
        group=_OUTPUT,
    )
    device: str = setting(
        "cpu",
        choice("cpu", "cuda", "npu"),
        "cpu, cuda, or npu: the last needs torch_npu, and is the CPU without it.",
        metavar="DEVICE",
        group=_RUNNING,
    )
    memory: int | None = setting(
        None,
        BYTES,
        "How much memory to use at most, such as 8GiB. What does not fit lives in files below OUT; the result is the "
        "same. Default: half of what is free.",
        metavar="SIZE",
        group=_RUNNING,
        read=parse_size,
    )
    plan: bool = setting(
        False,
        SWITCH,
        "Only say what it would take: memory, disk, bytes to read and write, time. Writes nothing.",
        group=_RUNNING,
    )
    as_json: bool = as_json(_RUNNING)

    def execute(self) -> None:
        """Quantize, or say what it would take."""
        started = time.monotonic()
        command = Command(
            source=self.source,
            target=self.target,
            recipe=self._recipe(),
            calibration=Calibration(self.calib, self.calib_limit, self.calib_texts, self.calib_ids),
            part_bytes=None if self.part_size_gb is None else max(1, round(self.part_size_gb * 2**30)),
            legacy_names=self.legacy_names,
            device=self.device,
            memory=self.memory,
            overwrite=self.overwrite,
            as_json=self.as_json,
            names_act_method="act_method" in self.choices,
            started=started,
        )
        with ranks_of_environment() as ranks:
            if self.plan:
                command.plan(ranks)
                return
            outcome = command.do(ranks)
            if ranks.is_first and self.save_recipe is not None:
                _save(command.recipe, self.save_recipe)
            command.tell(outcome, ranks)

    def _recipe(self) -> Recipe:
        """Return the recipe of the file, changed by the options that were given."""
        from eightfold.quant.recipe_file import act_method_name, make_recipe, parse_level, read_recipe
        from eightfold.scheme import SCHEMES

        meanings: dict[str, Callable[[Any], Any]] = {
            "scheme": SCHEMES.__getitem__,
            "act_method": act_method_name,
            "disable_level": parse_level,
            "save_float32": lambda name: name == "float32",
        }
        choices = {name: meanings.get(name, lambda value: value)(value) for name, value in self.choices.items()}
        file = {} if self.recipe_file is None else read_recipe(self.recipe_file)
        return make_recipe({**file, **choices}, str(self.recipe_file or "the command line"))


def _save(recipe: Recipe, path: Path) -> None:
    from eightfold.quant.recipe_file import render_recipe

    try:
        path.write_text(render_recipe(recipe), encoding="utf-8")
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}", action="Check the path.") from None
