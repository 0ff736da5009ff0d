"""The extension's types, for mypy and editors, are those of the extension."""

from __future__ import annotations

import importlib
import os
from pathlib import Path

import pytest
from nanobind.stubgen import StubGen  # type: ignore[import-untyped]

from eightfold.model import native as core

STUB = Path(core.__file__).with_name("_core.pyi")


@pytest.mark.skipif("EIGHTFOLD_TEST_CORE" in os.environ, reason="of another build")
def test_the_stub_is_current():
    module = importlib.import_module("eightfold.model.native._core")
    generator = StubGen(module, quiet=True)
    generator.put(module)
    assert STUB.read_text() == generator.get(), (
        f"write it anew: python -m nanobind.stubgen -m {module.__name__} -o {STUB}"
    )
