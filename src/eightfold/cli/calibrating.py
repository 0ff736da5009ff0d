"""Calibration samples from what the command line of `eightfold quantize` says."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from eightfold.cli import console
from eightfold.errors import ConfigError, plural
from eightfold.quant.recipe import AntiOutlier, Recipe

# Fewer than these show neither the ranges of inputs nor all the tokens that leave them.
FEW_TOKENS, FEW_SAMPLES = 512, 4

if TYPE_CHECKING:
    from eightfold.format.checkpoint import Checkpoint
    from eightfold.quant.dataset import Row
    from eightfold.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What the command line says of calibration data, for one model.

    Attributes:
        source: the model directory, whose tokenizer is used.
        recipe: what the samples are for.
        file: --calib.
        is_none: whether that says that there are no texts.
        limit: --calib-limit.
        texts: --calib-texts.
        ids: --calib-ids.
        anti_file: --anti-calib.
        add_bos: --add-bos.
        names_act_method: whether --act-method was given.
        is_needed: whether there have to be samples whatever the recipe needs.
    """

    source: Path
    recipe: Recipe
    file: Path | None
    is_none: bool
    limit: int | None
    texts: tuple[str, ...]
    ids: Path | None
    anti_file: Path | None
    add_bos: bool | None
    names_act_method: bool
    is_needed: bool = False

    @property
    def given(self) -> list[str]:
        """The options that name calibration data."""
        flags = {"--calib": self.file, "--calib-texts": self.texts, "--calib-ids": self.ids}
        return [flag for flag, value in flags.items() if value]

    def samples(self, checkpoint: Checkpoint) -> list[list[list[int]]]:
        """Return the samples for calibration and those for outlier suppression; none where none are used.

        Raises:
            ConfigError: two options name calibration data.
            InputError: a file of texts or ids is not what it should be.
        """
        from eightfold.quant.dataset import read_rows

        recipe = self.recipe
        found: list[list[list[int]]] = [[], []]
        sources = self.given
        if len(sources) > 1:
            raise ConfigError("calibration data", got=" and ".join(sources), expected="one of them")
        if self.anti_file is not None:
            if recipe.anti_outlier is None:
                console.note("there is no --anti-outlier; --anti-calib changes nothing.")
            else:
                found[1] = self._tokenized(read_rows(self.anti_file), checkpoint, self.anti_file)
        needs = self.is_needed or recipe.needs_samples(bool(found[1]))
        if needs and self.is_none and not sources:
            got, expected = f"none, for {recipe.scheme.value}", "texts: this recipe needs calibration"
            raise ConfigError("calib", got=got, expected=expected, action="Leave it out, and 64 texts are used.")
        if needs:
            found[0] = self._calibration(checkpoint)
            self._warn_of_few(found[1] or found[0])
        elif sources or self.limit is not None:
            console.note(f"nothing here needs calibration data; {[*sources, '--calib-limit'][0]} changes nothing.")
        if not recipe.has_static_inputs and self.names_act_method:
            console.note(f"{recipe.scheme.value} has no static inputs; --act-method changes nothing.")
        return found

    def _warn_of_few(self, samples: list[list[int]]) -> None:
        """Say where there is too little for what `smooth` looks for: ranges, and the tokens that leave them."""
        tokens = sum(map(len, samples))
        if self.recipe.anti_outlier is AntiOutlier.SMOOTH and (tokens < FEW_TOKENS or len(samples) < FEW_SAMPLES):
            console.note(
                f"{plural(len(samples), 'sample')} of {tokens} tokens may not show the largest inputs (sinks): give at "
                f"least {FEW_SAMPLES} samples and {FEW_TOKENS} tokens."
            )

    def _calibration(self, checkpoint: Checkpoint) -> list[list[int]]:
        from eightfold.quant import dataset

        if self.ids is not None:
            ids = dataset.read_token_ids(self.ids, self.limit, checkpoint.config.vocab_size)
            return self._cut(ids, checkpoint)
        if self.file is not None:
            rows = dataset.read_rows(self.file, self.limit)
        elif self.texts:
            rows = dataset.require_words(self.texts[: self.limit])
        else:
            rows = dataset.default_rows()[: self.limit]
            console.note(f"calibrating on the {len(rows)} texts that come with eightfold; --calib FILE takes your own.")
        return self._tokenized(rows, checkpoint, self.file)

    def _tokenized(self, rows: list[Row], checkpoint: Checkpoint, where: Path | None) -> list[list[int]]:
        """Return the token ids of rows, none longer than the model's context; `where` is their file."""
        from eightfold.quant import dataset

        # That a base model has no template for those of ours that are chats is nothing to note.
        tell = console.note if where is not None or self._tokenizer.has_chat_template else dataset.silent
        vocab_size, context = checkpoint.config.vocab_size, checkpoint.config.context
        samples = dataset.tokenize(rows, self._tokenizer, tell, where=where, vocab_size=vocab_size, context=context)
        return self._cut(samples, checkpoint)

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        from eightfold.tokenizer import Tokenizer

        found = Tokenizer(self.source, add_bos=self.add_bos)
        for note in found.notes:
            console.note(note)
        return found

    def _cut(self, samples: list[list[int]], checkpoint: Checkpoint) -> list[list[int]]:
        """Cut samples to the model's context."""
        from eightfold.quant import dataset

        context = checkpoint.config.context
        samples, cut = dataset.truncate(samples, context)
        if cut:
            console.note(
                f"{cut} of {len(samples)} calibration samples were cut to the model's context of {context} tokens."
            )
        return samples
