"""`eightfold quantize`: options to a recipe, and what came of it."""

from __future__ import annotations

import math
import time
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from eightfold.cli.calibration import Calibration
from eightfold.cli.quantize_run import Command, ranks_of_environment
from eightfold.cli.serving import parse_size
from eightfold.errors import ConfigError, OutputError

if TYPE_CHECKING:
    from eightfold.quant.recipe import Recipe


# Headings in the help.
_CALIBRATION, _ACTIVATIONS, _ATTENTION, _FLOAT, _OUTPUT, _RUNNING = (
    "Calibration data",
    "Activations and outliers",
    "Attention and its cache",
    "What stays float",
    "Output",
    "Running",
)


class SchemeName(str, Enum):
    """Schemes by their names on the command line."""

    w8a8 = "w8a8"
    w8a8_dynamic = "w8a8-dynamic"
    w8a8_mix = "w8a8-mix"
    w8a16 = "w8a16"


class SaveDtype(str, Enum):
    """How floating tensors are stored."""

    model = "model"
    float32 = "float32"


class Observe(str, Enum):
    """Where keys are observed for an int8 cache."""

    post_rope = "post-rope"
    pre_rope = "pre-rope"


class Method(str, Enum):
    """Outlier suppression."""

    m1 = "m1"
    m2 = "m2"
    m3 = "m3"
    m4 = "m4"
    m5 = "m5"
    m6 = "m6"


class Device(str, Enum):
    """What computes while calibrating."""

    cpu = "cpu"
    cuda = "cuda"
    npu = "npu"


class Act(str, Enum):
    """Activation methods, by name or by msModelSlim's number."""

    minmax = "minmax"
    histogram = "histogram"
    auto = "auto"
    one = "1"
    two = "2"
    three = "3"


def quantize(
    source: Annotated[
        Path, typer.Argument(metavar="FLOAT_DIR", help="A float model: config.json and safetensors files. Only read.")
    ],
    target: Annotated[
        Path, typer.Argument(metavar="OUT", help="The directory to make. It is a model when everything is written.")
    ],
    scheme: Annotated[
        SchemeName | None,
        typer.Option(
            metavar="SCHEME",
            help="w8a8: static int8 activations, needs calibration. w8a8-dynamic: int8 activations, by token. "
            "w8a8-mix: a prompt's tokens dynamic, generated ones static. w8a16: int8 weights only.",
        ),
    ] = None,
    recipe_file: Annotated[
        Path | None,
        typer.Option(
            "--recipe", metavar="FILE", help="Choices from a YAML file; options on the command line go before them."
        ),
    ] = None,
    save_recipe: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write the choices of this command line as such a file.")
    ] = None,
    weight_symmetric: Annotated[
        bool | None,
        typer.Option(
            "--weight-symmetric/--no-weight-symmetric",
            help="Weights without offset (default). --no-weight-symmetric is for w8a16.",
            show_default=False,
        ),
    ] = None,
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
    anti_outlier: Annotated[
        Method | None,
        typer.Option(
            metavar="M",
            rich_help_panel=_ACTIVATIONS,
            help="Move outliers from activations into weights: m1 SmoothQuant, m2 grid search, m3 weight-aware, "
            "m4 iterative (also o_proj and down_proj: the best for static w8a8), m5 CBQ, m6 searched (slow).",
        ),
    ] = None,
    act_method: Annotated[
        Act | None,
        typer.Option(
            metavar="METHOD",
            rich_help_panel=_ACTIVATIONS,
            help="Range of static inputs: minmax (1), histogram (2), or auto (3) by input. Default: minmax.",
        ),
    ] = None,
    fa_quant: Annotated[
        bool | None,
        typer.Option("--fa-quant", rich_help_panel=_ATTENTION, help="FAQuant: q, k and v to int8, and an int8 cache."),
    ] = None,
    fa_amp: Annotated[
        int | None,
        typer.Option(
            min=0, metavar="N", rich_help_panel=_ATTENTION, help="Leave FAQuant out in the N layers it suits least."
        ),
    ] = None,
    kv_int8: Annotated[
        bool | None,
        typer.Option("--kv-int8", rich_help_panel=_ATTENTION, help="C8: an int8 key/value cache, scaled by channel."),
    ] = None,
    kv_symmetric: Annotated[
        bool | None,
        typer.Option(
            "--kv-symmetric/--no-kv-symmetric",
            rich_help_panel=_ATTENTION,
            help="The cache without offsets (default): loaders misread the others.",
            show_default=False,
        ),
    ] = None,
    kv_observe: Annotated[
        Observe | None,
        typer.Option(
            metavar="WHERE",
            rich_help_panel=_ATTENTION,
            help="Take the range of keys after RoPE, as they are cached (post-rope, default), or before it, as "
            "msModelSlim does (pre-rope).",
        ),
    ] = None,
    keep_float: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN",
            rich_help_panel=_FLOAT,
            help="Leave linears float: a module name with * and ?; may be given several times. The name of an "
            "attention module leaves FAQuant out there.",
        ),
    ] = None,
    disable_level: Annotated[
        str | None,
        typer.Option(
            metavar="Ln",
            rich_help_panel=_FLOAT,
            help="Leave the n linears with the widest inputs float, and those that share their input.",
        ),
    ] = None,
    exact_levels: Annotated[
        bool | None,
        typer.Option(
            "--exact-levels", rich_help_panel=_FLOAT, help="Just n linears, even if that cuts q, k and v apart."
        ),
    ] = None,
    quantize_lm_head: Annotated[
        bool | None, typer.Option("--quantize-lm-head", rich_help_panel=_FLOAT, help="The output head to int8 too.")
    ] = None,
    save_dtype: Annotated[
        SaveDtype | None,
        typer.Option(
            metavar="TYPE",
            rich_help_panel=_OUTPUT,
            help="Store floating tensors as the model does (model, default), or all as float32.",
        ),
    ] = None,
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
            help="The layout of older MindIE: the description also under its suffixed name, `quantize` in "
            "config.json, smoothed norms as .module.weight and .module.bias.",
        ),
    ] = False,
    device: Annotated[
        Device,
        typer.Option(metavar="DEVICE", help="cpu, cuda, or npu: the last needs torch_npu, and is the CPU without it."),
    ] = Device.cpu,
    memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            rich_help_panel=_RUNNING,
            help="How much memory to use at most, such as 8GiB. What does not fit lives in files below OUT; the "
            "result is the same. Default: half of what is free.",
        ),
    ] = None,
    plan: Annotated[
        bool,
        typer.Option(
            "--plan",
            rich_help_panel=_RUNNING,
            help="Only say what it would take: memory, disk, bytes to read and write, time. Writes nothing.",
        ),
    ] = False,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite",
            rich_help_panel=_OUTPUT,
            help="Replace OUT if quantize has written it. The old model stays until the new one is complete.",
        ),
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", rich_help_panel=_RUNNING, help="Print one JSON document as the last line.")
    ] = False,
) -> None:
    """Turn a float Llama-family model into an 8-bit one.

    One layer is in memory at a time, and each is on disk before the next begins: after a crash, a full disk or Ctrl-C
    the same command goes on where it stopped. OUT is laid out for MindIE and vllm-ascend; `eightfold run` and `eval`
    take it when it is complete, and `eightfold check` tells what those loaders would do with it.

    Several processes share the work and make the same bytes: torchrun --nproc_per_node 2 -m eightfold quantize ...

    Example: eightfold quantize Llama-3.2-1B Llama-3.2-1B-w8a8 --scheme w8a8 --anti-outlier m4 --calib prompts.jsonl
    """
    started = time.monotonic()
    recipe = _recipe(
        recipe_file,
        scheme=scheme,
        weight_symmetric=weight_symmetric,
        keep_float=tuple(keep_float) if keep_float else None,
        quantize_lm_head=quantize_lm_head,
        anti_outlier=anti_outlier,
        act_method=act_method,
        disable_level=disable_level,
        exact_levels=exact_levels,
        fa_quant=fa_quant,
        fa_amp=fa_amp,
        kv_int8=kv_int8,
        kv_symmetric=kv_symmetric,
        kv_observe=kv_observe,
        save_float32=None if save_dtype is None else save_dtype is SaveDtype.float32,
    )
    command = Command(
        source=source,
        target=target,
        recipe=recipe,
        calibration=Calibration(calib, calib_limit, tuple(calib_texts or ()), calib_ids),
        part_bytes=_part_bytes(part_size_gb),
        legacy_names=legacy_names,
        device=device.value,
        memory=None if memory is None else parse_size(memory, "--memory"),
        overwrite=overwrite,
        as_json=as_json,
        names_act_method=act_method is not None,
        started=started,
    )
    with ranks_of_environment() as ranks:
        if plan:
            command.plan(ranks)
            return
        outcome = command.do(ranks)
        if ranks.is_first and save_recipe is not None:
            _save(command.recipe, save_recipe)
        command.tell(outcome, ranks)


def _recipe(file: Path | None, **options: Any) -> Recipe:
    """Return the recipe of a file, changed by the options that were given."""
    from eightfold.quant.recipe_file import act_method_name, make_recipe, parse_level, read_recipe
    from eightfold.scheme import SCHEMES

    given = {key: value.value if isinstance(value, Enum) else value for key, value in options.items()}
    choices = {key: value for key, value in given.items() if value is not None}
    if "scheme" in choices:
        choices["scheme"] = SCHEMES[choices["scheme"]]
    if "act_method" in choices:
        choices["act_method"] = act_method_name(choices["act_method"])
    if "disable_level" in choices:
        choices["disable_level"] = parse_level(choices["disable_level"])
    return make_recipe({**(read_recipe(file) if file is not None else {}), **choices}, str(file or "the command line"))


def _save(recipe: Recipe, path: Path) -> None:
    from eightfold.quant.recipe_file import render_recipe

    try:
        path.write_text(render_recipe(recipe), encoding="utf-8")
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}", action="Check the path.") from None


def _part_bytes(part_size_gb: float | None) -> int | None:
    if part_size_gb is None:
        return None
    nbytes = part_size_gb * 2**30
    if not math.isfinite(nbytes):
        raise ConfigError("--part-size-gb", got=part_size_gb, expected="a finite number")
    return max(1, round(nbytes))
