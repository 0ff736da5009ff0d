"""Outlier suppression must not change the float model: run one sample through both and compare logits."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from eightfold.errors import UnsupportedError
from eightfold.reference.decoder import Batch, Block
from eightfold.reference.load import Decoder

# Moving a scale from one factor to another changes float32 results in their last bits: measured, 2e-6 of the largest
# logit. What is wrong by a factor somewhere shows at 1e-2 and above.
MAX_RELATIVE_DIFFERENCE = 1e-3

_TOKENS = 128  # logits of so many positions are held at a time


class UnchangedProof:
    """A sample on its way through the smoothed float model."""

    def __init__(self, decoder: Decoder, sample: Sequence[int]) -> None:
        self._decoder = decoder
        self._hidden_TE = decoder.embed(sample)
        self._batch = Batch.of([len(sample)], decoder.inv_freq)

    def advance(self, block: Block) -> None:
        """Move the sample through the next layer."""
        self._hidden_TE = block(self._hidden_TE, self._batch)

    def finish(self, float_TE: Tensor) -> tuple[float, float]:
        """Compare with the same sample's hidden states in the float model.

        Returns:
            The largest difference of a logit, and the largest logit.

        Raises:
            UnsupportedError: they differ by more than rounding.
        """
        head = self._decoder.head()
        difference = largest = 0.0
        for at in range(0, len(float_TE), _TOKENS):
            expected = head(float_TE[at : at + _TOKENS])
            found = head(self._hidden_TE[at : at + _TOKENS])
            difference = max(difference, float((found - expected).abs().max()))
            largest = max(largest, float(expected.abs().max()))
        if not difference <= MAX_RELATIVE_DIFFERENCE * largest:
            raise UnsupportedError(
                "largest change of a logit by outlier suppression",
                where=self._decoder.checkpoint.directory,
                got=f"{difference:g} (the largest logit is {largest:g})",
                expected=f"at most {MAX_RELATIVE_DIFFERENCE * largest:g}",
                action="Use another --anti-outlier method, or --save-dtype float32.",
            )
        return difference, largest
