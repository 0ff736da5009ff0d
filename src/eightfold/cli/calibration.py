"""The calibration options of `eightfold quantize`, together."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from eightfold.cli import console
from eightfold.errors import ConfigError

if TYPE_CHECKING:
    from eightfold.format.checkpoint import Checkpoint
    from eightfold.quant.dataset import Row


class Calibration:
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
        rows: list[Row]
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
