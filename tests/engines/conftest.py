"""Where `make engines` has put the environments and the models."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def home() -> Path:
    if "EIGHTFOLD_ENGINES" not in os.environ:
        pytest.skip("EIGHTFOLD_ENGINES is not set: run `make engines`")
    return Path(os.environ["EIGHTFOLD_ENGINES"]).absolute()
