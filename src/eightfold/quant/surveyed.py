"""What was found about a layer, kept on disk until the layer is written: numbers as JSON, tensors as safetensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eightfold.config import DType
from eightfold.format.safetensors import FileWriter, MappedFile, PlannedTensor, read_header
from eightfold.model.reference.tensors import to_array
from eightfold.quant.attention import KVParams
from eightfold.quant.hidden import file_checksum
from eightfold.quant.smooth import SmoothScale
from eightfold.quant.survey import LayerSurvey

_SCALE = "scale:"
_CACHE = ("key_scale", "key_offset", "value_scale", "value_offset")


def survey_facts(survey: LayerSurvey) -> dict[str, Any]:
    """Return the numbers of a survey, for a line of the journal."""
    kv = survey.kv
    return {
        "notes": {title: scale.note for title, scale in survey.scales.items()},
        "range_params": dict(survey.range_params),
        "stretch": survey.stretch,
        "keys": None if kv is None else [kv.clipped_keys, kv.keys],
    }


def save_survey(path: Path, survey: LayerSurvey) -> int | None:
    """Write the tensors of a survey; return the CRC-32 of the file, which is then safely on disk."""
    tensors = {_SCALE + title: scale.scale for title, scale in survey.scales.items()}
    if survey.kv is not None:
        tensors.update({name: getattr(survey.kv, name) for name in _CACHE})
    path.unlink(missing_ok=True)  # what a killed run has left
    writer = FileWriter(path, [PlannedTensor(name, DType.F32, tuple(t.shape)) for name, t in tensors.items()])
    try:
        for name, tensor in tensors.items():
            writer.write(name, to_array(tensor, DType.F32))
        writer.sync()
        writer.close()
    finally:
        writer.abandon()
    return file_checksum(path)


def load_survey(path: Path, facts: Mapping[str, Any]) -> LayerSurvey:
    """Return a survey as it was saved."""
    infos = read_header(path)
    file = MappedFile(path)

    def tensor(name: str) -> Tensor:
        return torch.from_numpy(file.array(infos[name]).copy()).to(torch.get_default_device())

    scales = {title: SmoothScale(tensor(_SCALE + title), note) for title, note in facts["notes"].items()}
    key_scale, key_offset, value_scale, value_offset = _CACHE
    kv = None
    if facts["keys"] is not None:
        clipped, total = facts["keys"]
        kv = KVParams(tensor(key_scale), tensor(key_offset), tensor(value_scale), tensor(value_offset), clipped, total)
    return LayerSurvey(scales, facts["range_params"], kv, facts["stretch"])
