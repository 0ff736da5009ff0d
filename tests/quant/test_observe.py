"""Activation method 1: the mean of each sample's extremes, as far as samples have been seen."""

from __future__ import annotations

import pytest
import torch

from eightfold.errors import InputError
from eightfold.model.reference.linear import asymmetric
from eightfold.quant.calibrate import MeanMinMax

SAMPLES = torch.tensor([[-1.0, 5.0], [0.0, 3.0], [-4.0, 2.0], [2.0, 9.0]])  # four tokens
SPANS = [(0, 1), (1, 3), (3, 4)]  # three samples: extremes (-1, 5), (-4, 3), (2, 9)


def expected(los, his):
    scale, offset = asymmetric(torch.tensor(los).mean()[None], torch.tensor(his).mean()[None])
    return scale.item(), offset.item()


def test_final_parameters_come_from_means_and_not_extremes():
    observer = MeanMinMax("x")
    observer.update(SAMPLES, SPANS)
    scale, offset = observer.params()
    assert (scale.item(), offset.item()) == expected([-1.0, -4.0, 2.0], [5.0, 3.0, 9.0])
    assert (scale.item(), offset.item()) != expected([-4.0], [9.0])


def test_each_sample_gets_the_parameters_of_its_moment():
    scale, offset = MeanMinMax("x").update(SAMPLES, SPANS)
    assert scale.shape == offset.shape == (4, 1)
    first, second = expected([-1.0], [5.0]), expected([-1.0, -4.0], [5.0, 3.0])
    assert (scale[0].item(), offset[0].item()) == first
    assert (scale[1].item(), offset[1].item()) == second == (scale[2].item(), offset[2].item())


def test_cutting_the_samples_into_calls_changes_nothing():
    whole, parts = MeanMinMax("x"), MeanMinMax("x")
    scale, offset = whole.update(SAMPLES, SPANS)
    pieces = [parts.update(SAMPLES[:1], [(0, 1)]), parts.update(SAMPLES[1:], [(0, 2), (2, 3)])]
    assert torch.equal(scale, torch.cat([piece[0] for piece in pieces]))
    assert torch.equal(offset, torch.cat([piece[1] for piece in pieces]))
    assert whole.params()[0].item() == parts.params()[0].item()


def test_sample_that_is_not_finite_is_named():
    observer = MeanMinMax("model.layers.3.qkv")
    observer.update(SAMPLES[:1], [(0, 1)])
    broken = torch.tensor([[0.0, 1.0], [float("nan"), 1.0]])
    with pytest.raises(InputError, match=r"input of model\.layers\.3\.qkv in calibration sample 2 .*finite numbers"):
        observer.update(broken, [(0, 1), (1, 2)])
