"""What several files of tests use."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.quant.families import save_random


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Small products are fastest so, where a file makes many."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function that saves a family's random model once; nobody may change it."""
    root = tmp_path_factory.mktemp("families")
    return lambda name: root / name if (root / name).exists() else save_random(name, root / name)
