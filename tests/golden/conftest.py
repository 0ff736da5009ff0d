"""The one thing in which calibration differs from the reference tool, undone."""

from __future__ import annotations

import pytest
import torch

from eightfold.model.reference.linear import to_int8_
from eightfold.quant.calibrate import ObservedGroup


@pytest.fixture
def float_products(monkeypatch):
    """Multiply while calibrating what the reference multiplies, in its order."""

    def call(group, x_TK, batch):
        scale_T1, offset_T1 = group.observer.update(x_TK, batch.spans)
        real_TK = (to_int8_(x_TK / scale_T1, offset_T1).to(torch.float32) - offset_T1) * scale_T1
        return tuple(torch.cat([product(member, real_TK[b:e]) for b, e in batch.spans]) for member in group.members)

    def product(member, real_SK):
        return torch.nn.functional.linear(real_SK, member.weight * member.weight_scale[:, None], member.bias)

    monkeypatch.setattr(ObservedGroup, "__call__", call)
