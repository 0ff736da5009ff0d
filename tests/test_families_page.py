"""docs/families.md says what layouts.py says."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from eightfold.layouts import ROWS

SCRIPT = Path(__file__).parent.parent / "docs" / "make_families.py"


def test_page_is_up_to_date() -> None:
    spec = importlib.util.spec_from_file_location("make_families", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.check(), "run: python docs/make_families.py"
    assert all(f"| `{row.model_type}` | `{row.architecture}` |" in module.tables() for row in ROWS)
