"""The proof that smoothing changes nothing."""

from __future__ import annotations

import pytest
import torch

from eightfold.errors import UnsupportedError
from eightfold.format.checkpoint import Checkpoint
from eightfold.model.reference.load import Decoder
from eightfold.quant.proof import compare_logits


def test_a_smoothed_model_that_computes_no_numbers_is_refused(float_model):
    decoder = Decoder(Checkpoint.open(float_model))
    states = torch.randn(3, decoder.checkpoint.config.hidden_size, generator=torch.Generator().manual_seed(0))
    assert compare_logits(decoder, states, states)[0] == 0
    with pytest.raises(UnsupportedError, match="got nan"):
        compare_logits(decoder, states, torch.full_like(states, torch.nan))
