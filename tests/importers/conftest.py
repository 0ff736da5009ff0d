"""A GGUF file to import."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.quant.conftest import one_thread as one_thread


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A whole llama file."""
    from tests.importers.gguf_source import Source, float_config  # not above: gguf may be absent

    return Source(float_config()).write(tmp_path / "tiny.gguf")
