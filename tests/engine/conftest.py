"""Small random models with long contexts and a tokenizer, each made once."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.engine.models import Small, make


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Small]:
    """Return a model of tests.engine.models.RECIPES by name. Not to be modified."""
    made: dict[str, Small] = {}

    def get(name: str) -> Small:
        if name not in made:
            made[name] = make(tmp_path_factory.mktemp(name.replace(" ", "-")), name)
        return made[name]

    return get
