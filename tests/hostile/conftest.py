"""A float model to damage."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import tiny_config


@pytest.fixture
def weights(float_model) -> Path:
    return float_model / "model.safetensors"


@pytest.fixture
def replace(weights) -> Callable[..., None]:
    """Change the tensors of the model; None removes one."""

    def change(tensors: dict[str, torch.Tensor | None]) -> None:
        merged = {**load_file(str(weights)), **tensors}
        save_file({name: tensor for name, tensor in merged.items() if tensor is not None}, str(weights))

    return change


@pytest.fixture
def configure(float_model) -> Callable[..., None]:
    """Change config.json."""

    def change(**fields: Any) -> None:
        config = {key: value for key, value in tiny_config(**fields).items() if value is not ...}
        (float_model / "config.json").write_text(json.dumps(config))

    return change
