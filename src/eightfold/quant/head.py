"""The output head as int8, for those who ask for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from eightfold.families import LM_HEAD
from eightfold.model.reference.decoder import spans_of
from eightfold.model.reference.load import Decoder
from eightfold.model.reference.tensors import load_float32
from eightfold.quant.calibrate import observer_for
from eightfold.quant.hidden import HiddenStates
from eightfold.quant.layer import static_tensors
from eightfold.quant.qparams import quantize_weight
from eightfold.quant.recipe import Recipe
from eightfold.scheme import NEEDS_CALIBRATION, WEIGHT, WEIGHT_OFFSET, WEIGHT_SCALE, QuantType


@dataclass(frozen=True)
class QuantizedHead:
    """lm_head on its way to int8."""

    decoder: Decoder
    recipe: Recipe
    kind: QuantType
    range_param: float | None
    stored_dtype: Callable[[str], torch.dtype]

    def tensors(self, hidden: HiddenStates | None) -> dict[str, Tensor]:
        """Return the head's tensors by full name.

        Args:
            hidden: the calibration samples after the last layer; only static types look at them.
        """
        checkpoint = self.decoder.checkpoint
        is_symmetric = self.kind is not QuantType.W8A16 or self.recipe.weight_symmetric
        weight = quantize_weight(load_float32(checkpoint, checkpoint.head_weight()), is_symmetric=is_symmetric)
        stored = {WEIGHT: weight.values, WEIGHT_SCALE: weight.scale, WEIGHT_OFFSET: weight.offset}
        if self.kind in NEEDS_CALIBRATION:
            assert hidden is not None
            params = self._observe(hidden)
            stored.update(static_tensors(weight, None, params, LM_HEAD, self.stored_dtype))
        return {f"{LM_HEAD}.{suffix}": tensor for suffix, tensor in stored.items()}

    def _observe(self, hidden: HiddenStates) -> tuple[Tensor, Tensor]:
        norm = self.decoder.final_norm()
        observer = observer_for(self.recipe.act_method, LM_HEAD, self.range_param)
        for sizes, states_TE in hidden.pieces():
            observer.update(norm(states_TE), spans_of(sizes))
        return observer.params()
