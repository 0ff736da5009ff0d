"""An analysis keeps its values on the way through JSON."""

from __future__ import annotations

import json

import pytest

from eightfold.errors import CheckpointError
from eightfold.quant.analysis import Analysis, Choice, GroupLoss, InputRange

FOUND = Analysis(
    model="m",
    scheme="W8A8",
    target="cpu",
    samples=2,
    tokens=30,
    float_bytes=100,
    out_bytes=60,
    groups=(GroupLoss(0, "qkv", ("layers.0.q", "layers.0.k"), {"W8A8": 5, "FLOAT": 10}, {"W8A8": 0.5, "FLOAT": 0.0}),),
    ranges=(InputRange(0, "down", -1.0, 9.5, 2.0, ((3, 9.5),), ((0, 0, "<s>", 9.5),)),),
    choices=(Choice("layers.0.q", "W8A8", "little is lost"),),
    kl=0.01,
    top1=0.9,
    held_out_tokens=20,
)


def test_an_analysis_survives_json():
    assert Analysis.from_json(json.loads(json.dumps(FOUND.to_json()))) == FOUND


def test_an_analysis_of_another_format_is_refused():
    with pytest.raises(CheckpointError, match="format of an analysis"):
        Analysis.from_json({**FOUND.to_json(), "format": 2})


def test_an_incomplete_analysis_is_refused():
    found = FOUND.to_json()
    del found["ranges"]
    with pytest.raises(CheckpointError, match="analysis"):
        Analysis.from_json(found)
