"""From what a user says to a recipe: a file, options, and defaults by the scheme, the target and the model.

    options over a file -> defaults of models that can be calibrated -> Recipe

What goes by the names of its tensors gets no defaults, as nothing runs through it.

No torch: a command line is checked before that is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from eightfold.config import ModelConfig, has_engine, has_experts
from eightfold.errors import ConfigError
from eightfold.files import has_file, read_json
from eightfold.format.directory import CONFIG_NAME
from eightfold.parallel.world import World
from eightfold.quant.recipe import Recipe, with_defaults
from eightfold.quant.recipe_file import act_method_name, make_recipe, parse_level, read_recipe
from eightfold.scheme import NEEDS_CALIBRATION, SCHEMES, QuantType
from eightfold.vocabulary import TOKENIZER

_MEANINGS: dict[str, Callable[[Any], Any]] = {
    "scheme": SCHEMES.__getitem__,
    "act_method": act_method_name,
    "disable_level": parse_level,
    "save_float32": lambda name: name == "float32",
}


def meant(options: dict[str, Any]) -> dict[str, Any]:
    """Return options of a command line, by the names of Recipe's fields, as with_defaults() takes them."""
    return {name: _MEANINGS.get(name, lambda value: value)(value) for name, value in options.items()}


@dataclass(frozen=True, kw_only=True)
class AskedRecipe:
    """What a command line says of a recipe, for one model.

    Attributes:
        source: the model directory.
        options: by the names of Recipe's fields; they override the file.
        file: --recipe.
        all_static: --all-static.
        is_generic: --generic.
        legacy_names: --legacy-names.
        without_texts: --calib none.
        has_ids: whether there are token ids to calibrate on.
    """

    source: Path
    options: dict[str, Any]
    file: Path | None = None
    all_static: bool = False
    is_generic: bool = False
    legacy_names: bool = False
    without_texts: bool = False
    has_ids: bool = False

    @cached_property
    def settings_of_file(self) -> dict[str, Any]:
        return {} if self.file is None else read_recipe(self.file)

    @cached_property
    def chosen(self) -> dict[str, Any]:
        """What the recipe file and the command line say."""
        chosen = {**self.settings_of_file, **meant(self.options)}
        if self.all_static and chosen.get("target") is not None:
            raise ConfigError("all_static", got="it together with `target`", expected="one of them")
        return {**chosen, "target": None} if self.all_static else chosen

    @cached_property
    def plain(self) -> Recipe:
        """The recipe without the defaults of models that can be calibrated."""
        return make_recipe(self.chosen, self._where)

    @cached_property
    def recipe(self) -> Recipe:
        """The recipe.

        Raises:
            ConfigError: no scheme, a value of the wrong kind, or choices that exclude each other.
        """
        if self.goes_by_name:
            return self.plain
        return make_recipe(with_defaults(self.chosen, has_texts=self._has_texts), self._where)

    @cached_property
    def goes_by_name(self) -> bool:
        """Whether the names of tensors say enough: where the model cannot run here, or not as it is stored.

        Models with experts can go both ways. Without calibration they go by names: one tensor at a time, however they
        are stored.
        """
        config = self.source / CONFIG_NAME
        if self.is_generic or not has_file(config):
            return self.is_generic
        raw = read_json(config)
        if has_experts(raw):
            from eightfold.quant.name_plan import beyond_names

            return not (beyond_names(self.plain) or self.legacy_names or World.of_environment().size > 1)
        if has_engine(raw) and raw.get("quantization_config"):
            from eightfold.quant.name_plan import DATA_FREE
            from eightfold.quant.name_sources import is_quantized_elsewhere

            return self.plain.scheme in DATA_FREE and is_quantized_elsewhere(self.source)
        return bool(raw.get("architectures")) and not has_engine(raw)

    def notes(self, config: ModelConfig, *, has_limit: bool) -> Iterator[str]:
        """Tell what was chosen for the user, where other choices are worth knowing.

        Args:
            config: of the model.
            has_limit: whether types are going to be chosen by what they lose.
        """
        recipe = self.recipe
        is_float = QuantType.FLOAT in recipe.types_beside.values()
        if not has_limit and is_float and "target" not in self.chosen and not config.experts:
            yield (
                "down_proj stays float, which every reader takes. --target cpu or vllm-ascend stores it as w8a16: "
                "smaller, and nearly as accurate (docs/accuracy.md)."
            )
        is_free = recipe.scheme not in NEEDS_CALIBRATION and "anti_outlier" not in self.chosen
        if is_free and not self._has_texts and not self.without_texts:
            yield "without a tokenizer there are no calibration texts, so OUT is not smoothed; --calib-ids helps."

    @cached_property
    def _has_texts(self) -> bool:
        """Whether there are calibration samples unless something is wrong: texts need a tokenizer."""
        return not self.without_texts and (self.has_ids or has_file(self.source / TOKENIZER))

    @property
    def _where(self) -> str:
        return str(self.file or "the command line")
