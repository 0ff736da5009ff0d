"""`eightfold quantize`."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from eightfold.cli import console
from eightfold.cli.calibrating import Calibration
from eightfold.cli.losses import MAX_KL, found_lines
from eightfold.cli.options import add_bos, argument, as_json, flags_of, in_flags, model_argument, settings
from eightfold.cli.outcomes import (
    document,
    require_place_of_report,
    summary,
    tell_outcome,
    write_decisions,
    write_losses,
)
from eightfold.errors import ConfigError
from eightfold.machine import peak_resident_bytes
from eightfold.parallel.world import World
from eightfold.quant.asked import AskedRecipe
from eightfold.quant.recipe import Recipe
from eightfold.quant.recipe_file import write_recipe
from eightfold.values import BYTES, PATH, SWITCH, TEXTS, Kind, choice, parse_size, setting, whole

if TYPE_CHECKING:
    import torch

    from eightfold.format.checkpoint import Checkpoint
    from eightfold.parallel.ranks import Ranks
    from eightfold.quant.analysis import Analysis
    from eightfold.quant.estimate import Estimate
    from eightfold.quant.name_plan import NamePlan
    from eightfold.quant.outcome import Outcome

_CALIBRATION, _OUTPUT, _RUNNING = "Calibration data", "Output", "Running"  # headings in the help


@dataclass(frozen=True, kw_only=True)
class QuantizeCommand:
    """Turn a float model into an 8-bit one.

    Example: eightfold quantize Llama-3.2-1B Llama-3.2-1B-w8a8 --scheme w8a8 --calib prompts.jsonl

    One layer is in memory at a time, and each is on disk before the next begins: after a crash, a full disk or Ctrl-C,
    the same command continues where it stopped. OUT has the layout that MindIE and vllm-ascend load. `eightfold run`
    and `eval` load it too, and `eightfold check` reports what those loaders would do with it.

    In a mixture of experts the experts are w8a8-dynamic under every scheme, and their routers stay float; calibration
    is for attention. Families that eightfold cannot run take w8a8-dynamic and w8a16, which need no calibration: their
    linears are known by name. docs/families.md lists the families and what stays float in each.

    Several processes share the work and make the same bytes: torchrun --nproc_per_node 2 -m eightfold quantize ...
    """

    FIRST: ClassVar = ("scheme", "target", "max_kl", "calib", "plan")

    source: Path = model_argument("FLOAT_DIR", "A float model: config.json and safetensors files. It is only read.")
    out: Path = argument("OUT", "The directory to make. It appears when it is complete.")
    choices: dict[str, Any] = settings(
        Recipe, "scheme", "target", "weight_symmetric", "anti_outlier", "act_method", "train_steps", "fa_quant",
        "fa_amp", "kv_int8", "kv_symmetric", "kv_observe", "keep_float", "disable_level", "exact_levels",
        "quantize_lm_head", "dtype", "save_float32",
    )  # fmt: skip
    all_static: bool = setting(
        False,
        SWITCH,
        "Store every linear as a static scheme says, down_proj too: the fastest and the least accurate.",
        group="Scheme",
    )
    max_kl: float | None = setting(
        None,
        MAX_KL,
        "Keep the KL divergence from the float model within so many nats, such as 0.01, with the fewest bytes a token: "
        "linears get the types that the target takes by what each loses, and held-out calibration texts prove it.",
        metavar="NATS",
        group="Scheme",
    )
    recipe_file: Path | None = setting(
        None,
        PATH,
        "Read settings from a YAML file; options on the command line override them.",
        flag="--recipe",
        metavar="FILE",
        group="Scheme",
    )
    generic: bool = setting(
        False,
        SWITCH,
        "Quantize a model of an unknown family by the names of its tensors: every matrix of a layer but routers and "
        "what --keep-float names. For w8a8-dynamic and w8a16.",
        group="Scheme",
    )
    save_recipe: Path | None = setting(
        None, PATH, "Write the settings of this run to such a file.", metavar="FILE", group="Scheme"
    )
    calib: Path | None = setting(
        None,
        PATH,
        "Calibration texts: a JSON list, JSON on each line, or plain text on each line. A row of JSON is a text, or an "
        "object with inputs_pretokenized, text, prompt, messages, conversations or instruction. Default: a mixed set "
        "of 64. none: no texts, so that w8a8-dynamic and w8a16 are not smoothed.",
        metavar="FILE",
        group=_CALIBRATION,
    )
    calib_limit: int | None = setting(None, whole(1), "Use only the first N calibration rows.", group=_CALIBRATION)
    calib_texts: tuple[str, ...] = setting((), TEXTS, "A calibration text.", group=_CALIBRATION)
    calib_ids: Path | None = setting(
        None,
        PATH,
        "Calibration samples as token ids: JSON lists, one on each line or in a list; no tokenizer is needed.",
        metavar="FILE",
        group=_CALIBRATION,
    )
    anti_calib: Path | None = setting(
        None,
        PATH,
        "Texts from which --anti-outlier takes its scales, as --calib. Default: the calibration texts.",
        metavar="FILE",
        group=_CALIBRATION,
    )
    add_bos: bool | None = add_bos(_CALIBRATION)
    part_bytes: int | None = setting(
        None,
        Kind((int,), "a finite number above 0", least=1, outside="a finite number above 0"),
        "Split the weights into files of this size (GiB).",
        flag="--part-size-gb",
        metavar="GB",
        group=_OUTPUT,
        read=lambda text: round(float(text) * 2**30),
    )
    legacy_names: bool = setting(
        False,
        SWITCH,
        "Use the layout of older MindIE releases: the description also under its suffixed name, `quantize` in "
        "config.json, and smoothed norms as .module.weight and .module.bias.",
        group=_OUTPUT,
    )
    overwrite: bool = setting(
        False,
        SWITCH,
        "Replace OUT if quantize has written it. The old model stays until the new one is complete.",
        group=_OUTPUT,
    )
    report: Path | None = setting(
        None,
        PATH,
        "Write a page (HTML) of how each linear is stored and why, what the linears read, and sizes.",
        metavar="FILE",
        group=_OUTPUT,
    )
    device: str = setting(
        "cpu",
        choice("cpu", "cuda", "npu"),
        "Compute on cpu, cuda or npu; npu needs torch_npu, and without it the CPU is used.",
        metavar="DEVICE",
        group=_RUNNING,
    )
    memory: int | None = setting(
        None,
        BYTES,
        "Use at most this much memory, such as 8GiB. What does not fit is kept in files beside OUT; the result is the "
        "same. Default: half of the free memory.",
        metavar="SIZE",
        group=_RUNNING,
        read=parse_size,
    )
    plan: bool = setting(
        False,
        SWITCH,
        "Only report what the run would take: memory, disk, bytes to read and write, time. Quantizes three layers, or "
        "some tensors, for a trial, and leaves nothing behind.",
        group=_RUNNING,
    )
    as_json: bool = as_json(_RUNNING)

    def execute(self) -> None:
        started = time.monotonic()
        if self.report is not None:
            require_place_of_report(self.report, self.out, is_plan=self.plan)
        with self._recipe_named():
            self._require_known_losses()
            _ = self.recipe  # is refused before anything else happens
        with _ranks_of_environment() as ranks, self._recipe_named():
            if self.plan:
                if ranks.is_first:
                    self._show_plan()
                return
            outcome = self._quantize_by_name(ranks) if self._goes_by_name else self._quantize(ranks)
            if ranks.is_first and self.save_recipe is not None:
                write_recipe(self.recipe, self.save_recipe)
            if ranks.is_first and self.report is not None:
                self._write_report(self.report, outcome)
            self._tell(outcome, ranks, started)

    @contextmanager
    def _recipe_named(self) -> Iterator[None]:
        """Let an error about a setting of the recipe file name the file, and not an option that nobody has given."""
        try:
            yield
        except ConfigError as error:
            if self.recipe_file is None:
                raise
            names = [name for name in self._asked.settings_of_file if name not in self.choices]
            named = {f"`{name}`": f"{name} of {self.recipe_file}" for name in names}
            raise ConfigError(in_flags(error, {**named, **{n: f"{n} in {self.recipe_file}" for n in names}})) from None

    @cached_property
    def _asked(self) -> AskedRecipe:
        return AskedRecipe(
            source=self.source,
            options=self.choices,
            file=self.recipe_file,
            all_static=self.all_static,
            is_generic=self.generic,
            legacy_names=self.legacy_names,
            without_texts=self._without_texts,
            has_ids=self.calib_ids is not None,
        )

    @property
    def recipe(self) -> Recipe:
        return self._asked.recipe

    @property
    def _goes_by_name(self) -> bool:
        return self._asked.goes_by_name

    @property
    def _without_texts(self) -> bool:
        return self.calib is not None and str(self.calib) == "none"

    def _write_report(self, path: Path, outcome: Outcome) -> None:
        if self._analyses:
            write_losses(path, self._analyses[0], self.source, outcome)
        elif self._goes_by_name:
            write_decisions(path, outcome, self._name_plan.stored, None, self.source, self.out)
        else:
            write_decisions(path, outcome, self._checkpoint, self._checkpoint.config, self.source, self.out)

    def _quantize(self, ranks: Ranks) -> Outcome:
        """Quantize. The texts are read and tokenized by one process."""
        # What can be refused is refused before torch is loaded and texts are tokenized.
        samples = self._calibration.samples(self._checkpoint) if ranks.is_first else []
        samples = ranks.share(samples)
        console.require_torch("quantize")
        if ranks.is_first:
            self._tell_what_is_known()
        if self.max_kl is not None:
            return self._quantize_within(self.max_kl, samples[0])
        from eightfold.progress import silent
        from eightfold.quant.pipeline import quantize_checkpoint

        return quantize_checkpoint(
            self.source,
            self.out,
            self.recipe,
            *samples,
            overwrite=self.overwrite,
            part_bytes=self.part_bytes,
            legacy_names=self.legacy_names,
            device=self._torch_device(ranks),
            memory=self.memory,
            progress=console.bars if ranks.is_first else silent,
            ranks=ranks,
            tells_ranges=self.report is not None,
        )

    def _require_known_losses(self) -> None:
        """Refuse --max-kl where no samples can run through the layers of this process."""
        if self.max_kl is None:
            return
        refused = (
            (World.of_environment().size > 1, "several processes", "one"),
            (self._goes_by_name, "a model that is quantized by names", "one that eightfold runs, and no mixture"),
            (self.device != "cpu", f"it with `device` {self.device}", "cpu"),
            (self.anti_calib is not None, "it with `anti_calib`", "one of them"),
        )
        for is_refused, got, expected in refused:
            if is_refused:
                raise ConfigError("max_kl", got=got, expected=expected)

    def _quantize_within(self, limit: float, samples: list[list[int]]) -> Outcome:
        """Quantize so that a KL divergence is kept, and tell what was found."""
        from eightfold.quant.within import quantize_within

        outcome, analysis = quantize_within(
            self._checkpoint,
            self.out,
            self.recipe,
            samples,
            limit,
            memory=self.memory,
            progress=console.bars,
            tell=console.note,
            overwrite=self.overwrite,
            part_bytes=self.part_bytes,
            legacy_names=self.legacy_names,
        )
        if analysis is not None:
            self._analyses.append(analysis)
        if analysis is not None and not self.as_json:
            print("\n".join(found_lines(analysis, limit)))
        return outcome

    @cached_property
    def _analyses(self) -> list[Analysis]:
        """What was found of the model on the way; empty without --max-kl."""
        return []

    @cached_property
    def _name_plan(self) -> NamePlan:
        """What a model is going to be by the names of its tensors. What does not go with it is refused."""
        from eightfold.format.target import QUANTIZE, check_target
        from eightfold.quant.name_plan import plan_by_name

        found = plan_by_name(self.source, self.recipe, is_generic=self.generic)
        check_target(self.out, QUANTIZE, source=self.source, overwrite=self.overwrite or self.plan)
        return found

    def _quantize_by_name(self, ranks: Ranks) -> Outcome:
        """Quantize a model of which the names of tensors say enough."""
        if ranks.size > 1:
            expected, action = "one, for a model that is quantized by names", "Start it without torchrun."
            raise ConfigError("processes", got=ranks.size, expected=expected, action=action)
        if self.legacy_names:
            raise ConfigError("legacy_names", got="it", expected="it left out, as the model is known by its names only")
        plan = self._name_plan
        if given := self._calibration.given:
            console.note(f"nothing here needs calibration data; {given[0]} changes nothing.")
        console.require_torch("quantize")
        self._tell_notes([*plan.stored.notes, *plan.notes])
        from eightfold.quant.by_name import quantize_by_name

        return quantize_by_name(
            plan,
            self.out,
            overwrite=self.overwrite,
            part_bytes=self.part_bytes,
            memory=self.memory,
            progress=console.bars,
        )

    def _show_plan(self) -> None:
        if self._goes_by_name:
            self._show_name_plan()
            return
        checkpoint = self._checkpoint
        samples = self._calibration.samples(checkpoint)
        console.require_torch("quantize --plan")
        self._tell_what_is_known()
        from eightfold.quant.estimate import estimate_run

        found = estimate_run(
            checkpoint,
            self.recipe,
            *samples,
            target=self.out,
            memory=self.memory,
            progress=console.bars,
            has_limit=self.max_kl is not None,
        )
        self._print_plan(found)

    def _show_name_plan(self) -> None:
        plan = self._name_plan
        console.require_torch("quantize --plan")
        self._tell_notes([*plan.stored.notes, *plan.notes])
        from eightfold.quant.name_estimate import estimate_by_name

        self._print_plan(estimate_by_name(plan, target=self.out, memory=self.memory))

    def _print_plan(self, found: Estimate) -> None:
        if self.as_json:
            console.print_json(found.as_json())
        else:
            print("\n".join(found.render()))

    @cached_property
    def _checkpoint(self) -> Checkpoint:
        """The float model. A recipe or an output directory that does not go with it is refused."""
        from eightfold.format.target import QUANTIZE, check_target
        from eightfold.quant.plan import assign_types, require_level

        checkpoint = console.opened(self.source)
        require_level(checkpoint.config, self.recipe, assign_types(checkpoint.config, self.recipe))
        check_target(self.out, QUANTIZE, source=self.source, overwrite=self.overwrite or self.plan)
        return checkpoint

    def _tell_what_is_known(self) -> None:
        """Tell what a recipe on this model leads to, before the work."""
        from eightfold.quant.outcome import notes_for
        from eightfold.quant.plan import assign_types

        types = assign_types(self._checkpoint.config, self.recipe)
        self._tell_notes(
            [
                *self._asked.notes(self._checkpoint.config, has_limit=self.max_kl is not None),
                *notes_for(self._checkpoint, self.recipe, types),
            ]
        )

    def _tell_notes(self, notes: list[str]) -> None:
        """Tell those that were not told yet."""
        for text in notes:
            if text not in self._told:
                console.note(text)
                self._told.add(text)

    @cached_property
    def _told(self) -> set[str]:
        return set()

    @cached_property
    def _calibration(self) -> Calibration:
        return Calibration(
            source=self.source,
            recipe=self.recipe,
            file=None if self._without_texts else self.calib,
            is_none=self._without_texts,
            limit=self.calib_limit,
            texts=self.calib_texts,
            ids=self.calib_ids,
            anti_file=self.anti_calib,
            add_bos=self.add_bos,
            names_act_method="act_method" in self.choices,
            is_needed=self.max_kl is not None,
        )

    def _torch_device(self, ranks: Ranks) -> torch.device:
        from eightfold.model.reference.tensors import find_device

        if ranks.size > 1 and self.device != "cpu":
            action = "Start it without torchrun, or leave out `device`."
            raise ConfigError("device", got=self.device, expected=f"cpu, for {ranks.size} processes", action=action)
        found, remark = find_device(self.device)
        if remark:
            console.note(in_flags(remark, flags_of(QuantizeCommand)))
        return found

    def _tell(self, outcome: Outcome, ranks: Ranks, started: float) -> None:
        seconds = time.monotonic() - started
        peaks = ranks.gather(peak_resident_bytes())
        if not ranks.is_first:
            return
        if self.as_json:
            console.print_json(document(outcome, seconds, peaks))
        elif outcome.already_complete:
            print(f"{self.out}: already complete")
        else:
            tell_outcome(outcome)
            self._tell_notes(outcome.notes)
            print(f"{self.out}: {summary(outcome)}, {seconds:.1f} s")


@contextmanager
def _ranks_of_environment() -> Iterator[Ranks]:
    """The processes that torchrun has started; an error of one ends all."""
    from eightfold.parallel.ranks import Ranks

    world = World.of_environment()
    if world.size > 1:
        console.require_torch("quantize")
    ranks = Ranks(world)
    try:
        yield ranks
    except BaseException as error:
        ranks.fail(error)
        raise
    ranks.end()
