"""Checkpoints that many tests read: each is made once."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from eightfold.format.checkpoint import Checkpoint
from tests.native.models import VARIANTS, write_variant


@pytest.fixture(scope="session")
def checkpoint_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Checkpoint]:
    """Return the checkpoint of a variant in models.VARIANTS by name. Not to be modified."""
    made: dict[str, Checkpoint] = {}

    def get(name: str) -> Checkpoint:
        if name not in made:
            made[name] = write_variant(tmp_path_factory.mktemp(name.replace(" ", "-")), VARIANTS[name])
        return made[name]

    return get
