"""A small quantized model with a chat template and a context of 1,024 tokens."""

from __future__ import annotations

import pytest

from tests.engine.models import Small, make


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Small:
    """Not to be modified."""
    return make(tmp_path_factory.mktemp("small"), "w8a8")
